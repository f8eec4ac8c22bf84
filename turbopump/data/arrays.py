"""Arrays into a dataset: `.npy`/`.npz` files, arrays in memory, and iterators of samples, one row a sample."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.manifest import DTYPES, Field, Manifest
from turbopump.data.order import held_out
from turbopump.data.writer import DatasetWriter

ROWS_AT_ONCE = 1024

Chunk = Mapping[str, np.ndarray]  # [rows, *shape] a field


def rows_of(source: Any) -> tuple[Any, Iterator[Any]]:
    """The first record of an iterable, map-style dataset or tuple/mapping of arrays, and an iterator over all.

    For arrays the records are chunks (mappings of arrays with leading rows). Raises `UsageError` where there is none.
    """
    if isinstance(source, np.ndarray):
        source = (source,)
    if isinstance(source, tuple) and source and all(isinstance(item, np.ndarray) for item in source):
        source = _named(source)
    if isinstance(source, Mapping):
        return source, _slices({str(name): np.asarray(array) for name, array in source.items()}, "the arrays")
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        records: Iterator[Any] = (source[i] for i in range(len(source)))
    elif hasattr(source, "__iter__"):
        records = iter(source)
    else:
        raise UsageError(f"cannot pack a {type(source).__name__}: give paths, arrays, or an iterable of samples")
    try:
        first = next(records)
    except StopIteration:
        raise UsageError("nothing to pack: the source holds no record") from None
    everything = itertools.chain([first], records)
    return first, everything if isinstance(first, (str, bytes)) else _stacked(everything)


def read_array_files(paths: Sequence[str]) -> Iterator[Chunk]:
    """Chunks of `.npz` files (one field an array) and `.npy` files (field `x`), in the order given."""
    for path in map(Path, paths):
        if path.suffix not in (".npy", ".npz"):
            raise UsageError(f"{path} is not .npy or .npz: arrays and text cannot be packed into one dataset")
        try:
            loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
            arrays = {"x": loaded} if path.suffix == ".npy" else {name: loaded[name] for name in loaded.files}
        except FileNotFoundError as error:
            raise UsageError(f"no file {path}: give a .npy or .npz file") from error
        except (OSError, ValueError, EOFError) as error:
            raise DatasetError(f"cannot read {path} as numpy arrays without pickled objects: {error}") from error
        except Exception as error:  # zipfile and zlib have errors of their own for a damaged archive
            raise DatasetError(f"{path} is damaged: {error}") from error
        yield from _slices(arrays, str(path))


def pack_arrays(
    chunks: Iterator[Chunk], destination: Path, validation: float, overwrite: bool, sources: Sequence[str]
) -> Manifest:
    """Write a dataset of kind `arrays`; each row is held out or not by a hash of its number."""
    try:
        first = next(chunks)
    except StopIteration:
        raise UsageError("nothing to pack: the source holds no row") from None
    fields = [_field(name, array) for name, array in first.items()]
    with DatasetWriter(destination, kind="arrays", fields=fields, overwrite=overwrite) as writer:
        row = 0
        for chunk in itertools.chain([first], chunks):
            values = [_values(field, chunk, row) for field in fields]
            count = len(values[0])
            out = held_out(np.arange(row, row + count), validation)
            for split, mine in (("train", ~out), ("validation", out)):
                if mine.any():
                    writer.append(split, [array[mine] for array in values])
            row += count
        return writer.finish(sources=sources)


def _field(name: str, array: np.ndarray) -> Field:
    dtype = "uint8" if array.dtype == bool else array.dtype.newbyteorder("=").name
    if dtype not in DTYPES:
        raise DatasetError(f"array {name!r} holds {array.dtype}, which is not one of {', '.join(DTYPES)}")
    return Field(name, dtype, tuple(array.shape[1:]))


def _values(field: Field, chunk: Chunk, row: int) -> np.ndarray:
    if field.name not in chunk:
        raise DatasetError(f"no array {field.name!r} from row {row} on (there is: {', '.join(chunk)})")
    array = chunk[field.name]
    if array.shape[1:] != field.shape:
        raise DatasetError(f"{field.name!r} has shape {array.shape[1:]} from row {row} on, {field.shape} before")
    if not np.can_cast(array.dtype, field.dtype, "same_kind"):
        raise DatasetError(f"{field.name!r} holds {array.dtype} from row {row} on, {field.dtype} before")
    return array.astype(field.dtype, copy=False)


def _slices(arrays: Chunk, what: str) -> Iterator[Chunk]:
    if not arrays:
        raise UsageError(f"{what}: no array in it")
    if any(array.ndim == 0 for array in arrays.values()):
        raise DatasetError(f"{what}: an array without rows (a single number) cannot be packed")
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DatasetError(f"{what}: the arrays have different numbers of rows: {lengths}")
    for begin in range(0, next(iter(lengths.values())), ROWS_AT_ONCE):
        yield {name: array[begin : begin + ROWS_AT_ONCE] for name, array in arrays.items()}


def _named(sample: Sequence[Any]) -> dict[str, Any]:
    names = ("x", "y") if len(sample) <= 2 else tuple(f"x{i}" for i in range(len(sample)))
    return dict(zip(names, sample, strict=False))


def _stacked(records: Iterator[Any]) -> Iterator[Chunk]:
    row = 0
    while group := list(itertools.islice(records, ROWS_AT_ONCE)):
        columns: dict[str, list[np.ndarray]] = {}
        for number, sample in enumerate(group, row):
            if not isinstance(sample, Mapping):
                sample = _named(sample if isinstance(sample, (tuple, list)) else (sample,))
            for name, value in sample.items():
                columns.setdefault(str(name), []).append(np.asarray(value))
            if len({len(values) for values in columns.values()}) > 1:
                raise DatasetError(f"sample {number} has other fields than those before it ({', '.join(columns)})")
        try:
            chunk = {name: np.stack(values) for name, values in columns.items()}
        except ValueError as error:
            raise DatasetError(f"samples {row} to {row + len(group) - 1} are not of one shape: {error}") from error
        yield chunk
        row += len(group)
