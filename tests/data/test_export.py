"""Rows to Parquet and back through another reader; a file that is not whole never has the name asked for."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from turbopump.core.errors import DatasetError
from turbopump.data import export
from turbopump.data.export import export_parquet
from turbopump.data.inputs.recognise import open_input
from turbopump.data.manifest import Field
from turbopump.data.ragged import Ragged, offsets_of, ragged_of

FIELDS = (
    Field("n", "int16"),
    Field("grid", "float32", (2, 3)),
    Field("ids", "uint32", kind="ragged"),
    Field("pairs", "float64", (2,), "ragged"),
    Field("data", "uint8", kind="bytes"),
    Field("text", "uint8", kind="text"),
)


def chunk(begin, rows=10):
    numbers = range(begin, begin + rows)
    return {
        "n": np.array(numbers, np.int16),
        "grid": np.arange(rows * 6, dtype=np.float32).reshape(rows, 2, 3),
        "ids": ragged_of([np.arange(i % 4, dtype=np.uint32) for i in numbers]),
        "pairs": Ragged(np.ones((rows, 2)), offsets_of([1] * rows)),
        "data": ragged_of([bytes([i]) * (i % 3) for i in numbers]),
        "text": ragged_of([f"é{i}" for i in numbers]),
    }


@pytest.mark.parametrize("group_bytes", [1, 1 << 26])
def test_rows_come_back(tmp_path, monkeypatch, group_bytes):
    monkeypatch.setattr(export, "ROW_GROUP_BYTES", group_bytes)
    path = tmp_path / "out" / "train.parquet"
    assert export_parquet((chunk(i) for i in range(0, 50, 10)), FIELDS, path) == 50
    assert pq.ParquetFile(path).num_row_groups == (5 if group_bytes == 1 else 1)
    rows = pq.read_table(path).to_pylist()
    assert rows[13]["text"] == "é13" and rows[13]["data"] == b"\x0d" and rows[13]["ids"] == [0]
    assert rows[13]["grid"] == chunk(10)["grid"][3].tolist() and rows[13]["pairs"] == [[1.0, 1.0]]
    source = open_input([str(path)])
    assert source.fields == FIELDS and source.num_rows == 50
    assert [p.name for p in path.parent.iterdir()] == ["train.parquet"]


def test_what_fails_leaves_nothing(tmp_path):
    def broken():
        yield chunk(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_parquet(broken(), FIELDS, tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="no text 'text'"):
        export_parquet([{**chunk(0), "text": np.zeros(10)}], FIELDS, tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="'n' is int64"):
        export_parquet([{**chunk(0), "n": np.arange(10)}], FIELDS, tmp_path / "a.parquet")
    (tmp_path / "file").write_text("")
    with pytest.raises(DatasetError, match="file stands where a directory"):
        export_parquet([chunk(0)], FIELDS, tmp_path / "file" / "a.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert export_parquet([], FIELDS, tmp_path / "empty.parquet") == 0
