"""Rows of a dataset as Parquet, which any tool reads: streamed, with one chunk and one row group in memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from turbopump.core.errors import DatasetError
from turbopump.core.files import explain_os_error, fsync_directory
from turbopump.data.manifest import Field
from turbopump.data.ragged import Ragged

ROW_GROUP_BYTES = 64 << 20


def export_parquet(rows: Iterable[Mapping[str, np.ndarray | Ragged]], fields: Sequence[Field], path: Path) -> int:
    """Write chunks of rows to the one Parquet file `path`, which appears when it is whole; the number of rows.

    Arrays of fixed shape become fixed-size lists, ragged ones lists, bytes `large_binary`, text `large_string`.
    Raises `DatasetError` where it cannot be written, or a chunk does not hold the fields.
    """
    schema = pa.schema([pa.field(item.name, arrow_type(item), nullable=False) for item in fields])
    handle, staging = _staging_file(path)
    try:
        with os.fdopen(handle, "wb") as file:
            count = _write(rows, fields, schema, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        fsync_directory(path.parent)
    except BaseException as error:  # also Ctrl-C: no staging file may stay behind
        Path(staging).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise DatasetError(explain_os_error(error, path)) from error
        raise
    return count


def _staging_file(path: Path) -> tuple[int, str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.fchmod(handle, 0o644)
    except OSError as error:
        raise DatasetError(explain_os_error(error, path)) from error
    return handle, staging


def _write(
    rows: Iterable[Mapping[str, np.ndarray | Ragged]], fields: Sequence[Field], schema: pa.Schema, file: object
) -> int:
    count, waiting, waiting_bytes = 0, [], 0
    with pq.ParquetWriter(file, schema, compression="zstd", write_page_checksum=True) as writer:
        for chunk in rows:
            arrays = [_arrow_array(item, chunk) for item in fields]
            batch = pa.RecordBatch.from_arrays(arrays, schema=schema)
            waiting.append(batch)
            waiting_bytes += batch.nbytes
            count += batch.num_rows
            if waiting_bytes >= ROW_GROUP_BYTES:
                writer.write_table(pa.Table.from_batches(waiting, schema), row_group_size=1 << 62)
                waiting, waiting_bytes = [], 0
        if waiting:
            writer.write_table(pa.Table.from_batches(waiting, schema), row_group_size=1 << 62)
    return count


def arrow_type(item: Field) -> pa.DataType:
    """The Arrow type that holds a field."""
    if item.kind == "text":
        return pa.large_string()
    if item.kind == "bytes":
        return pa.large_binary()
    kind = pa.from_numpy_dtype(np.dtype(item.dtype))
    for length in reversed(item.shape):
        kind = pa.list_(kind, length)
    return pa.large_list(kind) if item.kind == "ragged" else kind


def _arrow_array(item: Field, chunk: Mapping[str, np.ndarray | Ragged]) -> pa.Array:
    column = chunk.get(item.name)
    if column is None or isinstance(column, Ragged) != (item.kind != "array"):
        raise DatasetError(f"a chunk of rows has no {item.kind} {item.name!r}: it holds {', '.join(chunk)}")
    if not isinstance(column, Ragged):
        return _nested(column, item)
    offsets = pa.py_buffer(np.ascontiguousarray(column.offsets, np.int64))
    if item.kind == "ragged":
        return pa.LargeListArray.from_arrays(pa.array(column.offsets, pa.int64()), _nested(column.values, item))
    values = pa.py_buffer(np.ascontiguousarray(column.values))
    return pa.Array.from_buffers(arrow_type(item), len(column), [None, offsets, values])


def _nested(values: np.ndarray, item: Field) -> pa.Array:
    if values.shape[1:] != item.shape or values.dtype != item.dtype:
        raise DatasetError(
            f"{item.name!r} is {values.dtype} {list(values.shape[1:])}, not {item.dtype} {list(item.shape)}"
        )
    array = pa.array(np.ascontiguousarray(values).reshape(-1))
    for length in reversed(item.shape):
        array = pa.FixedSizeListArray.from_arrays(array, length)
    return array
