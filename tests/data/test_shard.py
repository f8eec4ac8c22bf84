"""One shard: an Arrow file as pyarrow reads it, whose entry says where each buffer lies."""

import numpy as np
import pyarrow as pa
import pytest

from turbopump.core.files import digest_file
from turbopump.data import shard
from turbopump.data.manifest import Field
from turbopump.data.pieces import Pieces, Pool
from turbopump.data.ragged import ragged_of

FIELDS = [
    Field("b", "uint8", (), "bytes"),
    Field("x", "float32", (2, 3)),
    Field("r", "int16", (2,), "ragged"),
    Field("t", "uint8", (), "text"),
]


def columns_of(rows):
    rng = np.random.default_rng(rows)
    lengths = rng.integers(0, 40, rows)
    return [
        ragged_of([rng.bytes(int(n)) for n in lengths]),
        rng.standard_normal((rows, 2, 3)).astype(np.float32),
        ragged_of([rng.integers(0, 9, (int(n) % 5, 2)).astype(np.int16) for n in lengths]),
        ragged_of(["ü" * int(n) for n in lengths]),
    ]


def buffers_of(columns, piece_bytes):
    arrays = [a for c in columns for a in ([c] if isinstance(c, np.ndarray) else [c.offsets, c.values])]
    buffers = [Pieces(Pool(piece_bytes)) for _ in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        buffer.append(array)
    return buffers


@pytest.mark.parametrize(("rows", "piece_bytes"), [(1, 128), (50, 128), (700, 128 * 9)])
def test_the_file_holds_the_rows_at_the_places_of_its_entry(tmp_path, rows, piece_bytes):
    columns = columns_of(rows)
    buffers = buffers_of(columns, piece_bytes)
    entry, sums = shard.write_shard(tmp_path / "s.arrow", FIELDS, rows, buffers, 128)
    data = (tmp_path / "s.arrow").read_bytes()
    assert (entry.bytes, entry.xxh3, entry.rows) == (len(data), digest_file(tmp_path / "s.arrow"), rows)
    assert entry.buffers[0][0] % shard.PAGE_BYTES == 0 and len(sums) == entry.num_blocks(128)
    for (offset, size), buffer in zip(entry.buffers, buffers, strict=True):
        assert data[offset : offset + size] == b"".join(piece.tobytes() for piece in buffer)
    assert shard.not_as_described(str(tmp_path / "s.arrow"), entry, FIELDS) == []
    batch = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0)
    batch.validate(full=True)
    assert batch.column(0).to_pylist() == list(columns[0]) and batch.column(3).to_pylist() == list(columns[3])
    assert batch.column(2).to_pylist() == [row.tolist() for row in columns[2]]


def test_memory_that_holds_nothing_is_never_written_as_if_it_did():
    layout = shard._Layout([np.empty(5, np.int64)])
    layout.write(pa.py_buffer(b"what pyarrow copied"))
    with pytest.raises(RuntimeError, match="which hold nothing"):
        layout.check()
