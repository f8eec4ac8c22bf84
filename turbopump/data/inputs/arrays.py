"""`.npy` (field `x`) and `.npz` (one field an array): parts are ranges of rows, `.npy` read through a memory map.

Rows are numbered through all files, and the number is the key: the split of arrays on disk is that of the same arrays
in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.data.inputs.files import InputFile, reading
from turbopump.data.inputs.protocol import Chunk, FileInput, Keys, Part, Selection, same_fields
from turbopump.data.manifest import DTYPES, Field

SUFFIXES = (".npy", ".npz")
ROWS_AT_ONCE_BYTES = 8 << 20


@dataclass
class ArraysInput(FileInput):
    all_fields: tuple[Field, ...] = ()
    first_rows: tuple[int, ...] = ()  # of each file
    rows: tuple[int, ...] = ()

    def pieces(self, file: InputFile, target_bytes: int) -> Iterator[tuple[Part, int]]:
        number = self.files.index(file)
        rows = self.rows[number]
        step = rows if file.name.endswith(".npz") else max(1, rows * target_bytes // max(1, file.size))
        for begin in range(0, rows, max(1, step)):
            end = min(begin + step, rows)
            yield Part(file, begin, end, self.first_rows[number] + begin), file.size * (end - begin) // rows

    def read_part(self, part: Part) -> Iterator[tuple[Chunk, Keys]]:
        with reading(part.file, "numpy arrays"):
            arrays = {item.name: array for item, array in _load(part.file, self.selection).items()}
            yield from chunks_of_arrays(arrays, part.begin, part.end, part.first_row)


def chunks_of_arrays(
    arrays: Mapping[str, np.ndarray], begin: int, end: int, first_row: int
) -> Iterator[tuple[Chunk, Keys]]:
    """Rows `begin` to `end` as views where the dtype is stored as it is; keys are row numbers from `first_row` on."""
    row_bytes = max(1, sum(a.itemsize * int(np.prod(a.shape[1:])) for a in arrays.values()))
    step = max(1, ROWS_AT_ONCE_BYTES // row_bytes)
    for at in range(begin, end, step):
        stop = min(at + step, end)
        first = first_row + at - begin
        yield {n: _native(a[at:stop]) for n, a in arrays.items()}, np.arange(first, first + stop - at, dtype=np.uint64)


def arrays_input(files: tuple[InputFile, ...], selection: Selection) -> ArraysInput:
    """Raises `DatasetError` for pickled objects, dtypes that no field has, and arrays of different lengths."""
    first_rows, rows, total = [], [], 0
    fields: tuple[Field, ...] = ()
    for file in files:
        with reading(file, "numpy arrays without pickled objects"):
            arrays = _load(file, selection)
        first_rows.append(total)
        rows.append(len(next(iter(arrays.values()))))
        total += rows[-1]
        fields = fields or tuple(arrays)
        same_fields(fields, tuple(arrays), file, files[0])
    if not total:
        raise DatasetError(f"nothing to pack: {files[0].path} holds no row")
    made = ArraysInput("arrays", files, selection.fields(fields), selection, total)
    made.all_fields, made.first_rows, made.rows = fields, tuple(first_rows), tuple(rows)
    return made


def _load(file: InputFile, selection: Selection) -> dict[Field, np.ndarray]:
    """The arrays of a file by their fields."""
    try:
        if file.name.endswith(".npy"):
            arrays: Mapping[str, np.ndarray] = {"x": np.load(file.path, mmap_mode="r", allow_pickle=False)}
        else:
            with np.load(file.path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError):
        raise
    except Exception as error:  # zipfile, zlib and the header's parser have errors of their own for a damaged file
        raise DatasetError(f"{file.path} is damaged: {error}") from error
    selection.check(list(arrays), file.path)
    if not arrays:
        raise DatasetError(f"{file.path}: no array in it")
    wanted = {n: a for n, a in arrays.items() if not selection.needed or n in selection.needed}
    if any(array.ndim == 0 for array in wanted.values()):
        raise DatasetError(f"{file.path}: an array without rows (a single number) cannot be packed")
    lengths = {name: len(array) for name, array in wanted.items()}
    if len(set(lengths.values())) > 1:
        raise DatasetError(f"{file.path}: the arrays have different numbers of rows: {lengths}")
    return {field_of_array(name, array, file.path): array for name, array in wanted.items()}


def field_of_array(name: str, array: np.ndarray, where: str) -> Field:
    dtype = "uint8" if array.dtype == bool else array.dtype.newbyteorder("=").name
    if dtype not in DTYPES:
        raise DatasetError(f"{where}: array {name!r} holds {array.dtype}, which is not one of {', '.join(DTYPES)}")
    return Field(name, dtype, tuple(array.shape[1:]))


def _native(array: np.ndarray) -> np.ndarray:
    if array.dtype == bool:
        return array.view(np.uint8)
    return array.astype(array.dtype.newbyteorder("="), copy=False)
