"""One shard: a standard Arrow IPC file of one uncompressed record batch, and the checksums of its blocks.

Writing one is a pure function of its rows: the same rows give the same bytes. A field of fixed rows is one buffer of
values; one of different lengths is a large list (large binary, large string): int64 offsets and values. The schema's
metadata holds as much padding as it takes for the first buffer to start on a page, so that reads past the page cache
and page-sized blocks of checksums meet whole pages of the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.core.files import digest, digest_file
from turbopump.data.gather import kernels
from turbopump.data.manifest import Field, ShardEntry
from turbopump.data.ragged import Ragged

PAGE_BYTES = 4096
Column = np.ndarray | Ragged


def write_shard(
    file: Path, fields: Sequence[Field], columns: Sequence[Column], block_bytes: int
) -> tuple[ShardEntry, np.ndarray]:
    """Write `columns` (arrays [rows, *shape], `Ragged` where rows differ in length) to `file`.

    Returns the shard's entry and the checksums of its blocks, uint64. Raises `OSError`.
    """
    import pyarrow as pa

    arrays = [_arrow(field, column) for field, column in zip(fields, columns, strict=True)]
    types = [pa.field(field.name, array.type, nullable=False) for field, array in zip(fields, arrays, strict=True)]
    padding = 8
    for _ in range(4):  # padded to 8 bytes itself, so that the first guess may miss
        schema = pa.schema(types, metadata=_metadata(fields, padding))
        offset = _body_offset(schema)
        if offset % PAGE_BYTES == 0:
            break
        padding += -offset % PAGE_BYTES
    with file.open("wb") as sink:
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(arrays, schema=schema))
    buffers = _buffers(file, fields)
    raw = [part for column in columns for part in _parts(column)]
    sums = [kernels().sums(part, block_bytes) for part in raw]
    all_sums = np.concatenate(sums)
    entry = ShardEntry(
        file.name, len(columns[0]), file.stat().st_size, digest_file(file), digest(all_sums.data), tuple(buffers)
    )
    return entry, all_sums


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


def _body_offset(schema: Any) -> int:
    """Where the first buffer of a file of this schema starts: the same for any number of rows but none."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    arrays = [_one_row(field.type) for field in schema]
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))
    data = sink.getvalue()
    first = pa.ipc.open_file(pa.BufferReader(data)).get_batch(0).column(0)
    return int(_data_buffers(first)[0].address - data.address)


def _one_row(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_large_string(kind) or pa.types.is_large_binary(kind):
        return pa.array([b"-"], pa.large_binary()).cast(kind)
    if pa.types.is_large_list(kind):
        return pa.LargeListArray.from_arrays(np.array([0, 1]), _one_row(kind.value_type))
    if pa.types.is_fixed_size_list(kind):
        values = pa.array(np.zeros(kind.list_size, kind.value_type.to_pandas_dtype()))
        return pa.FixedSizeListArray.from_arrays(values, kind.list_size)
    return pa.array(np.zeros(1, kind.to_pandas_dtype()))


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


def _buffers(file: Path, fields: Sequence[Field]) -> list[tuple[int, int]]:
    """(offset in the file, bytes) of the raw buffers of each field."""
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        base = source.read_buffer(source.size()).address
        batch = pa.ipc.open_file(source).get_batch(0)
        found = []
        for field, column in zip(fields, batch.columns, strict=True):
            sizes = [batch.num_rows * field.row_bytes]
            if not field.fixed:
                offsets = np.frombuffer(_data_buffers(column)[0], np.int64, batch.num_rows + 1)
                sizes = [offsets.nbytes, int(offsets[-1]) * field.row_bytes]
            for buffer, size in zip(_data_buffers(column), sizes, strict=True):
                found.append((int(buffer.address - base) if size else 0, size))
    return found


def _data_buffers(column: Any) -> list[Any]:
    """The values of a column, or its offsets and its values; the bitmaps of what is null are not ours."""
    import pyarrow as pa

    buffers = column.buffers()
    kind = column.type
    if pa.types.is_large_list(kind) or pa.types.is_large_binary(kind) or pa.types.is_large_string(kind):
        return [buffers[1], buffers[-1]]
    return [buffers[-1]]
