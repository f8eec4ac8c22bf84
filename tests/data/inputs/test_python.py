"""Live objects as inputs: samples of every kind, tables without importing their library, and what does not fit."""

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pytest

from tests.data.inputs.reading import values_of
from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.inputs.python import from_python


def read(source):
    (partition,) = source.partitions(1)
    rows, keys = [], []
    for chunk, chunk_keys in source.read(partition):
        columns = {name: values_of(column) for name, column in chunk.items()}
        rows += [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        keys += list(chunk_keys)
    return rows, keys


class Samples:
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return {"x": [i, 1], "y": f"t{i}"}


class Frame:
    """What a DataFrame of any library offers."""

    def __init__(self, table):
        self._table = table

    def __arrow_c_stream__(self, requested_schema=None):
        return self._table.__arrow_c_stream__(requested_schema)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (iter(["a", "é"]), [{"text": "a"}, {"text": "é"}]),
        ([b"a", b""], [{"bytes": b"a"}, {"bytes": b""}]),
        (({"n": i, "t": "x"} for i in range(2)), [{"n": 0, "t": "x"}, {"n": 1, "t": "x"}]),
        ([(np.zeros(2, np.float32), 1)], [{"x": [0, 0], "y": 1}]),
        ([np.arange(2), np.arange(3)], [{"x": [0, 1]}, {"x": [0, 1, 2]}]),
        (Samples(), [{"x": [0, 1], "y": "t0"}, {"x": [1, 1], "y": "t1"}]),
        ({"a": np.arange(2), "b": np.ones((2, 2))}, [{"a": 0, "b": [1, 1]}, {"a": 1, "b": [1, 1]}]),
        ((np.arange(2), np.arange(2)), [{"x": 0, "y": 0}, {"x": 1, "y": 1}]),
    ],
)
def test_samples(given, rows):
    assert read(from_python(given)) == (rows, list(range(len(rows))))


def test_tables():
    table = pa.table({"t": ["a", "b"], "n": [1, 2]})
    rows = [{"t": "a", "n": 1}, {"t": "b", "n": 2}]
    for given in (table, table.to_batches()[0], table.to_reader(), Frame(table), pyarrow.dataset.dataset(table)):
        assert read(from_python(given)) == (rows, [0, 1])
    assert read(from_python(table, key="t", columns=["n"])) == ([{"n": 1}, {"n": 2}], ["a", "b"])
    with pytest.raises(DatasetError, match="the table: 'n' of row 1 is null"):
        read(from_python(pa.table({"n": [1, None]})))


def test_memory_is_bounded_and_one_pass_is_all():
    made = []
    source = from_python(made.append(i) or {"x": np.zeros(1 << 20, np.uint8), "n": i} for i in range(3000))
    (partition,) = source.partitions(1)
    chunk, _ = next(source.read(partition))
    assert len(chunk["n"]) <= 8 and len(made) < 20
    made.clear()
    texts = from_python(iter(made.append(i) or b"" for i in range(1 << 20)))
    next(texts.read(*texts.partitions(1)))
    assert len(made) < 1 << 18
    with pytest.raises(UsageError, match="read once"):
        source.read(partition)


@pytest.mark.parametrize("sample", [b"%d", "%d", "é%d"])
def test_texts_and_bytes_are_the_same_rows_alone_or_in_mappings(sample):
    samples = [sample % i * (i % 400) for i in range(6000)]  # several groups, empty ones among them
    name = "text" if isinstance(sample, str) else "bytes"
    rows = [{name: value} for value in samples]
    assert read(from_python(iter(samples))) == read(from_python(iter(rows))) == (rows, list(range(6000)))
    mixed = [row if i == 4000 else value for i, (row, value) in enumerate(zip(rows, samples, strict=True))]
    assert read(from_python(iter(mixed)))[0] == rows
    assert read(from_python(iter(samples[1:9]), key=name))[1] == samples[1:9]
    with pytest.raises(UsageError, match="sample 0 has no column 'y'"):
        from_python(iter(samples), columns=["y"])


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ([], UsageError, "holds no record"),
        ("text", UsageError, "one text is no dataset"),
        (7, UsageError, "cannot pack a int"),
        ({"a": np.zeros(2), "b": np.zeros(3)}, DatasetError, "different numbers of rows"),
        ([{"a": 1}, {"b": 1}], DatasetError, "sample 1 has no 'a'"),
        ([{"a": 1}] * 2000 + [{"a": "x"}], DatasetError, "sample 2000: 'a' is a str"),
        ([np.zeros(2)] * 2000 + [np.zeros(3)], DatasetError, "sample 2000: 'x' is a ndarray of shape"),
        ([{"a": None}], DatasetError, "sample 0: 'a' is null"),
        ([{"a": {}}], DatasetError, "sample 0: 'a' is a nested object"),
        ([b"a"] * 3000 + ["b"], DatasetError, "sample 3000 has no 'bytes'"),
        ([b"a"] * 3000 + [None], DatasetError, "sample 3000 has no 'bytes'"),
        (["a"] * 3000 + ["\ud800"], DatasetError, "sample 3000: 'text' is not UTF-8"),
        (["fine", "\ud800"], DatasetError, "sample 1: 'text' is not UTF-8"),
        ([{"a": 1 << 70}], DatasetError, "sample 0: 'a' .*does not fit"),
        ([{"a": np.array(["x"])}], DatasetError, "sample 0: 'a' is a ndarray that is no array of numbers"),
    ],
)
def test_what_does_not_fit_is_named(given, error, message):
    with pytest.raises(error, match=message):
        read(from_python(given))
