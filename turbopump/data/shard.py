"""One shard: a standard Arrow IPC file of one uncompressed record batch, and the checksums of its blocks.

Writing one is a pure function of its rows: the same rows give the same bytes. A field of fixed rows is one buffer of
values; one of different lengths is a large list (large binary, large string): int64 offsets and values. The schema's
metadata holds as much padding as it takes for the first buffer to start on a page, so that reads past the page cache
and page-sized blocks of checksums meet whole pages of the file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.core.files import digest
from turbopump.data.manifest import Field, ShardEntry
from turbopump.data.pieces import Pieces
from turbopump.data.ragged import Ragged
from turbopump.data.shard_file import write_parts

PAGE_BYTES = 4096
Column = np.ndarray | Ragged


def write_shard(
    file: Path, fields: Sequence[Field], rows: int, buffers: Sequence[Pieces], block_bytes: int
) -> tuple[ShardEntry, np.ndarray]:
    """Write `rows` rows to `file`; `buffers`, in the order of the fields: the values of one of fixed rows, the offsets
    (int64 [rows + 1], from 0 on) and the values of another.

    Returns the shard's entry and the checksums of its blocks, uint64. The file's write-back has begun, and has not
    ended. Raises `OSError`.
    """
    sizes = [buffer.size for buffer in buffers]
    layout = _laid_out(fields, rows, sizes)
    parts: list[tuple[np.ndarray, int]] = []
    for segment in layout.segments:
        if isinstance(segment, bytes):
            parts.append((np.frombuffer(segment, np.uint8), 0))
        else:
            parts += [(piece, block_bytes) for piece in buffers[segment]]
    with file.open("wb", buffering=0) as sink:
        whole, sums = write_parts(sink.fileno(), parts)
    places = tuple(zip(layout.offsets, sizes, strict=True))
    return ShardEntry(file.name, rows, layout.tell(), whole, digest(sums.data), places), sums


class _Layout(io.RawIOBase):
    """What Arrow writes to it: the bytes around the buffers, and at which place each buffer comes (0 if empty).

    The buffers that Arrow is given are of the right sizes and hold nothing: memory that is never touched, told by its
    address. What they stand for goes to the disk from where it is, without a copy.
    """

    def __init__(self, stand_ins: Sequence[np.ndarray]) -> None:
        self._numbers = {array.ctypes.data: number for number, array in enumerate(stand_ins) if array.nbytes}
        self.segments: list[bytes | int] = []
        self.offsets = [0] * len(stand_ins)
        self._sizes = [array.nbytes for array in stand_ins]
        self._at = 0

    def write(self, data: Any) -> int:
        import pyarrow as pa

        buffer = pa.py_buffer(data)
        number = self._numbers.get(buffer.address)
        if number is None or buffer.size != self._sizes[number]:
            self.segments.append(buffer.to_pybytes())
        else:
            self.segments.append(number)
            self.offsets[number] = self._at
            del self._numbers[buffer.address]
        self._at += buffer.size
        return int(buffer.size)

    def tell(self) -> int:
        return self._at

    def writable(self) -> bool:
        return True

    def check(self) -> None:
        if self._numbers:
            raise RuntimeError("pyarrow wrote copies of the buffers it was given, which hold nothing")


def _laid_out(fields: Sequence[Field], rows: int, sizes: Sequence[int]) -> _Layout:
    """Where the parts of a shard of these rows and sizes of buffers come to lie."""
    import pyarrow as pa

    left = iter(sizes)
    columns = [_stand_in(field, rows, left) for field in fields]
    arrays = [_arrow(field, column) for field, column in zip(fields, columns, strict=True)]
    types = [pa.field(field.name, array.type, nullable=False) for field, array in zip(fields, arrays, strict=True)]
    padding = 8
    for _ in range(4):  # padded to 8 bytes itself, so that the first guess may miss
        schema = pa.schema(types, metadata=_metadata(fields, padding))
        layout = _Layout([part for column in columns for part in _parts(column)])
        with pa.ipc.new_file(layout, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
        layout.check()
        offset = layout.offsets[0]  # the offsets or the values of the first field: never empty
        if offset % PAGE_BYTES == 0:
            break
        padding += -offset % PAGE_BYTES
    return layout


def _stand_in(field: Field, rows: int, sizes: Iterator[int]) -> Column:
    """A column whose buffers have the sizes that come next, with nothing in them but the ends of the offsets."""
    if field.fixed:
        next(sizes)
        return np.empty((rows, *field.shape), field.dtype)
    offsets = np.empty(next(sizes) // 8, np.int64)
    values = np.empty((next(sizes) // field.row_bytes, *field.shape), field.dtype)
    offsets[[0, -1]] = 0, len(values)
    return Ragged(values, offsets, field.kind)  # type: ignore[arg-type]


def not_as_described(
    file: str, shard: ShardEntry, fields: Sequence[Field], whole: np.ndarray | None = None
) -> list[str]:
    """What any Arrow tool would see in a shard (in its bytes, if given) that differs from its entry and the fields."""
    import pyarrow as pa

    try:
        with pa.memory_map(file) if whole is None else pa.BufferReader(pa.py_buffer(whole)) as source:
            reader = pa.ipc.open_file(source)
            rows, found = reader.get_batch(0).num_rows, reader.schema
    except (pa.ArrowException, OSError) as error:
        return [f"{file} is no Arrow file: {error}"]
    described = dict(found.metadata or {})
    told = {name.encode(): value.encode() for name, value in _metadata(fields, 0).items()}
    told[b"padding"] = described.get(b"padding", b"")
    if described != told or not found.equals(pa.schema([_arrow_field(field) for field in fields])):
        return [f"{file}: its schema differs from the fields in manifest.json"]
    return [] if rows == shard.rows else [f"{file}: {rows} rows where {shard.rows} are expected"]


def _arrow_field(field: Field) -> Any:
    import pyarrow as pa

    empty = np.empty((0, *field.shape), field.dtype)
    column = empty if field.fixed else Ragged(empty, np.zeros(1, np.int64), field.kind)  # type: ignore[arg-type]
    return pa.field(field.name, _arrow(field, column).type, nullable=False)


def _parts(column: Column) -> list[np.ndarray]:
    """The bytes of a column's buffers, as they are stored."""
    arrays = [column] if isinstance(column, np.ndarray) else [column.offsets, column.values]
    return [np.ascontiguousarray(array).reshape(-1).view(np.uint8) for array in arrays]


def _metadata(fields: Sequence[Field], padding: int) -> dict[str, str]:
    shapes = {f"{field.name}.shape": ",".join(map(str, field.shape)) for field in fields}
    media = {f"{field.name}.media": field.media for field in fields if field.media}
    return {**shapes, **media, "padding": " " * padding}


def _arrow(field: Field, column: Column) -> Any:
    import pyarrow as pa

    if isinstance(column, np.ndarray):
        return _numbers(column.reshape(-1), field)
    if field.kind in ("bytes", "text"):
        kind = pa.large_binary() if field.kind == "bytes" else pa.large_string()
        buffers = [None, pa.py_buffer(column.offsets), pa.py_buffer(np.ascontiguousarray(column.values))]
        return pa.Array.from_buffers(kind, len(column), buffers)
    return pa.LargeListArray.from_arrays(pa.array(column.offsets), _numbers(column.values.reshape(-1), field))


def _numbers(flat: np.ndarray, field: Field) -> Any:
    import pyarrow as pa

    values = pa.array(flat)
    return pa.FixedSizeListArray.from_arrays(values, int(np.prod(field.shape))) if field.shape else values
