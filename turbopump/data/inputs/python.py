"""What a script or notebook holds: iterables of samples, arrays, map-style datasets, DataFrames, Arrow tables.

A DataFrame or table is anything with Arrow's PyCapsule interface (`__arrow_c_stream__`: pandas, Polars, DuckDB,
pyarrow) or a pyarrow dataset. All of it is read once, in this process: there is one partition. The key is the number of
the row, or a column.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.inputs.arrays import chunks_of_arrays, field_of_array
from turbopump.data.inputs.columns import chunks_of_batch, class_names_of, fields_of_schema
from turbopump.data.inputs.protocol import (
    LOOK_BYTES,
    LOOK_ROWS,
    Chunk,
    Dropped,
    Keys,
    Partition,
    Selection,
    cut,
    has_null,
)
from turbopump.data.inputs.rows import Row, chunk_of_rows, column_of_values, fields_of_rows, grouped
from turbopump.data.manifest import Field

GROUP_BYTES = 1 << 20  # of samples stacked at once: freed soon enough for the allocator to use the memory again
_PLAIN = ({bytes}, {str})


@dataclass
class PythonInput:
    """One pass over a live object."""

    fields: tuple[Field, ...]
    chunks: Iterator[tuple[Chunk, Keys]]
    selection: Selection
    num_rows: int | None = None
    total_bytes: int | None = None
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)  # none
    name: str = "python"
    _started: bool = False

    def partitions(self, target_bytes: int) -> Iterator[Partition]:
        yield Partition(0, ())

    def read(self, partition: Partition) -> Iterator[tuple[Chunk, Keys]]:
        if self._started:
            raise UsageError("objects in memory are read once: call pack with the object again")
        self._started = True
        return self.chunks


def from_python(
    source: Any, *, key: str | None = None, columns: Sequence[str] = (), drop_nulls: bool = False
) -> PythonInput:
    """An input of `source`: mappings, tuples (fields x and y, or x0, x1 ...), texts (`text`), bytes (`bytes`) or arrays
    (`x`), one a row, from any iterable or map-style dataset; a mapping or tuple of arrays with one row a sample; a
    DataFrame or table.

    Raises `UsageError` for what is none of these or holds nothing, `DatasetError` naming the sample that does not fit.
    """
    selection = Selection(tuple(columns), key, Dropped() if drop_nulls else None)
    batches = _batches(source)
    if batches is not None:
        return _from_batches(*batches, selection)
    if isinstance(source, np.ndarray):
        source = (source,)
    if isinstance(source, tuple) and source and all(isinstance(item, np.ndarray) for item in source):
        source = _named(source)
    if isinstance(source, Mapping) and source and all(hasattr(v, "__len__") for v in source.values()):
        return _from_arrays({str(name): np.asarray(array) for name, array in source.items()}, selection)
    return _from_rows(_records(source), selection)


def _batches(source: Any) -> tuple[pa.Schema, Iterator[pa.RecordBatch]] | None:
    if isinstance(source, pa.RecordBatch):
        return source.schema, iter([source])
    if isinstance(source, (pa.Table, pa.RecordBatchReader)) or hasattr(source, "__arrow_c_stream__"):
        reader = source if isinstance(source, pa.RecordBatchReader) else pa.RecordBatchReader.from_stream(source)
        return reader.schema, iter(reader)
    if hasattr(source, "to_batches") and isinstance(getattr(source, "schema", None), pa.Schema):
        return source.schema, iter(source.to_batches())  # a pyarrow dataset
    return None


def _from_batches(schema: pa.Schema, batches: Iterable[pa.RecordBatch], selection: Selection) -> PythonInput:
    fields = fields_of_schema(schema, selection, "the table")

    def chunks() -> Iterator[tuple[Chunk, Keys]]:
        row = 0
        try:
            for batch in batches:
                for chunk, numbers in chunks_of_batch(batch, fields, row, "the table", selection.dropped):
                    yield from cut(*selection.apply(chunk, numbers.astype(np.uint64)))
                row += batch.num_rows
        except pa.ArrowException as error:
            raise DatasetError(f"the table cannot be read after row {row}: {error}") from error

    return PythonInput(selection.fields(fields), chunks(), selection, class_names=class_names_of(schema))


def _from_arrays(arrays: dict[str, np.ndarray], selection: Selection) -> PythonInput:
    selection.check(list(arrays), "the mapping of arrays")
    if any(array.ndim == 0 for array in arrays.values()):
        raise DatasetError("the arrays: an array without rows (a single number) cannot be packed")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DatasetError(f"the arrays have different numbers of rows: {lengths}")
    num_rows = next(iter(lengths.values()))
    if num_rows and all(array.dtype.kind in "biuf" for array in arrays.values()):
        wanted = {name: array for name, array in arrays.items() if not selection.needed or name in selection.needed}
        fields = tuple(field_of_array(name, array, "the arrays") for name, array in wanted.items())
        chunks = (selection.apply(*chunk) for chunk in chunks_of_arrays(wanted, 0, num_rows, 0))
        return PythonInput(selection.fields(fields), chunks, selection, num_rows)
    rows = ({name: array[i] for name, array in arrays.items()} for i in range(num_rows))
    made = _from_rows(rows, selection)
    made.num_rows = num_rows
    return made


def _records(source: Any) -> Iterator[Any]:
    if isinstance(source, (str, bytes)):
        raise UsageError("one text is no dataset: give an iterable of texts, or the path of a file")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__") and not isinstance(source, Mapping):
        return (source[i] for i in range(len(source)))
    if hasattr(source, "__iter__") and not isinstance(source, Mapping):
        return iter(source)
    raise UsageError(f"cannot pack a {type(source).__name__}: give paths, arrays, a table, or an iterable of samples")


def _row(sample: Any) -> Row:
    if isinstance(sample, str):
        return {"text": sample}
    if isinstance(sample, (bytes, bytearray)):
        return {"bytes": bytes(sample)}
    if not isinstance(sample, Mapping):
        sample = _named(sample if isinstance(sample, (tuple, list)) else (sample,))
    return {str(name): _value(value) for name, value in sample.items()}


def _value(value: Any) -> Any:
    """Lists and tensors as arrays; plain values stay as they are."""
    if isinstance(value, (list, tuple)) or (hasattr(value, "__array__") and not isinstance(value, np.ndarray)):
        try:
            return np.asarray(value)
        except (ValueError, TypeError, RuntimeError):
            return value  # the row's check says which one it is
    return value


def _named(sample: Sequence[Any]) -> dict[str, Any]:
    names = ("x", "y") if len(sample) <= 2 else tuple(f"x{i}" for i in range(len(sample)))
    return dict(zip(names, sample, strict=False))


def _from_rows(samples: Iterator[Any], selection: Selection) -> PythonInput:
    look: list[Any] = []
    rows: list[Row] = []
    look_bytes = 0
    for sample in samples:
        look.append(sample)
        rows.append(_selected(sample, len(rows), selection))
        look_bytes += _bytes_of_row(rows[-1])
        if len(look) >= LOOK_ROWS or look_bytes >= LOOK_BYTES:
            break
    if not look:
        raise UsageError("nothing to pack: the source holds no record")
    numbers = [i for i, row in enumerate(rows) if selection.dropped is None or not has_null(row)]
    if not numbers:
        raise DatasetError(f"nothing to pack: each of the first {len(look)} samples has a null")
    fields = fields_of_rows([rows[i] for i in numbers], lambda i: f"sample {numbers[i]}")
    every = itertools.chain(look, samples)
    types = set(map(type, look))
    plain = types in _PLAIN
    found = _plain_chunks(every, types.pop(), fields, selection) if plain else _row_chunks(every, fields, selection)
    chunks = (part for chunk, keys in found for part in cut(*selection.apply(chunk, keys)))
    return PythonInput(selection.fields(fields), chunks, selection)


def _row_chunks(
    samples: Iterator[Any], fields: Sequence[Field], selection: Selection, first: int = 0
) -> Iterator[tuple[Chunk, Keys]]:
    """Samples of any kind, the first of them number `first`, with their numbers."""
    rows = ((_selected(sample, number, selection), number) for number, sample in enumerate(samples, first))
    for group in grouped(selection.kept((row, number, _bytes_of_row(row)) for row, number in rows), GROUP_BYTES):
        numbers = [number for _, number, _ in group]
        where = lambda i: f"sample {numbers[i]}"  # noqa: B023, E731 - used before it changes
        yield chunk_of_rows([row for row, _, _ in group], fields, where), np.array(numbers, np.uint64)


def _plain_chunks(
    samples: Iterator[Any], kind: type[Any], fields: Sequence[Field], selection: Selection
) -> Iterator[tuple[Chunk, Keys]]:
    """Samples that are bytes or text: no mapping is made of each. Others among them are made rows."""
    first, (item,) = 0, fields
    for group in _plain_groups(samples, kind):
        end = first + len(group)
        if type(group[-1]) is kind:  # only the last may be another
            column = column_of_values(item, group, lambda i: f"sample {first + i}")  # noqa: B023
            yield {item.name: column}, np.arange(first, end, dtype=np.uint64)
        else:
            yield from _row_chunks(iter(group), fields, selection, first)
        first = end


def _plain_groups(samples: Iterator[Any], kind: type[Any]) -> Iterator[list[Any]]:
    """Consecutive samples of about `GROUP_BYTES`; one of another type than `kind` ends its group."""
    group: list[Any] = []
    size = 0
    for sample in samples:
        group.append(sample)
        size += 8 + len(sample) if type(sample) is kind else GROUP_BYTES  # 8: of the offset
        if size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def _bytes_of_row(row: Row) -> int:
    return sum(getattr(value, "nbytes", len(value) if isinstance(value, (str, bytes)) else 8) for value in row.values())


def _selected(sample: Any, number: int, selection: Selection) -> Row:
    """What is wanted of a sample."""
    return selection.of_row(_row(sample), lambda: f"sample {number}")
