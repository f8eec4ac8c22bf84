"""What every input of `pack` is: rows with one schema, cut into partitions that processes read alone, in any order.

    files ── partitions(target_bytes) ──> Partition(parts of files) ── read(partition) ──> (chunk, keys), ...

Partitions are a function of the files (names, sizes) and `target_bytes` alone. Reading all of them in order gives the
same rows with the same keys whatever `target_bytes` was. A key decides which split a row goes to, so that it does not
depend on other files: the row's key column, the file's name where a row is a file, the sample's name in an archive,
else a number made of the file's name and the row's place in it.

`FileInput` holds what formats share: a format says how a file may be cut (`pieces`) and reads a piece (`read_part`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from turbopump.core.errors import DatasetError, UsageError
from turbopump.core.files import digest
from turbopump.data.inputs.files import InputFile, check_unchanged
from turbopump.data.manifest import Field
from turbopump.data.ragged import Ragged

CHUNK_BYTES = 8 << 20
LOOK_ROWS = 1000  # rows that the schema is taken from, where a format does not state it
LOOK_BYTES = 1 << 20

Column = np.ndarray | Ragged
Chunk = Mapping[str, Column]
Keys = Sequence[str] | Sequence[bytes] | np.ndarray  # one a row; arrays are uint64


@dataclass(frozen=True)
class Part:
    """A range of a file, in what its format counts: bytes, or rows; `end` is exclusive.

    `first_row` is the number in the file of its first row, where the format needs to be told.
    """

    file: InputFile
    begin: int
    end: int
    first_row: int = 0


@dataclass(frozen=True)
class Partition:
    """Parts that one process reads alone. `split` is the split that the input itself assigns, or empty."""

    index: int
    parts: tuple[Part, ...]
    split: str = ""

    @property
    def key(self) -> str:
        """Digest of which parts of which files in which state; without folders, so that data may be moved."""
        stated = [[p.file.name, p.file.size, p.file.mtime_ns, p.begin, p.end] for p in self.parts]
        return digest(repr([self.split, stated]).encode())  # repr also of names that are not UTF-8


@dataclass
class Dropped:
    """Counts the rows left out for a null, in this process, so far."""

    rows: int = 0


@dataclass(frozen=True)
class Selection:
    """What of each row is wanted: all columns, or these; `key` is the column that decides the split. A column that is
    not there and whose name has dots is a path into nested objects (`meta.lang`). Rows with a null in what is wanted
    are left out and counted in `dropped`; where that is None, a null is an error.
    """

    columns: tuple[str, ...] = ()
    key: str | None = None
    dropped: Dropped | None = None

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns to read; empty for all of them."""
        if not self.columns or self.key is None or self.key in self.columns:
            return self.columns
        return (*self.columns, self.key)

    def check(self, known: Sequence[str], where: str) -> None:
        """Raises `UsageError` where a column asked for is not among the `known`."""
        for name in self.needed:
            self._check_one(name, known, where)
        if self.key is not None:
            self._check_one(self.key, known, where)

    def _check_one(self, name: str, known: Sequence[str], where: str) -> None:
        if name not in known:
            raise UsageError(f"{where} has no column {name!r}: it has {', '.join(known)}")

    def of_row(self, row: Mapping[str, Any], where: Callable[[], str]) -> Mapping[str, Any]:
        """The columns wanted of a row. Raises `UsageError` where it lacks one."""
        if not self.needed:
            if self.key is not None and self.key not in row:
                self.check(list(row), where())
            return row
        return {name: row[name] if name in row else self._at_path(row, name, where) for name in self.needed}

    def _at_path(self, row: Mapping[str, Any], path: str, where: Callable[[], str]) -> Any:
        value: Any = row
        for name in path.split("."):
            if value is None:
                return None  # of an object that is null, every member is
            if not isinstance(value, Mapping) or name not in value:
                self._check_one(path, list(row), where())
                return None  # not reached: a path is no column
            value = value[name]
        return value

    def kept(self, rows: Iterable[tuple[Mapping[str, Any], Any, int]]) -> Iterator[tuple[Mapping[str, Any], Any, int]]:
        """Of (row, anything, bytes) those without a null, where rows with one are to be left out."""
        for item in rows:
            if self.dropped is not None and has_null(item[0]):
                self.dropped.rows += 1
            else:
                yield item

    def fields(self, fields: Sequence[Field]) -> tuple[Field, ...]:
        """Of the fields read, those that become part of the dataset."""
        return tuple(item for item in fields if not self.columns or item.name in self.columns)

    def apply(self, chunk: Chunk, numbers: Keys) -> tuple[Chunk, Keys]:
        """The chunk without columns read for the key alone, and the keys: the key column, else `numbers`."""
        keys = numbers if self.key is None else keys_of(chunk[self.key])
        if self.columns and self.key is not None and self.key not in self.columns:
            chunk = {name: column for name, column in chunk.items() if name != self.key}
        return chunk, keys


def has_null(row: Mapping[str, Any]) -> bool:
    return any(value is None for value in row.values())


class Input(Protocol):
    """`total_bytes` of the source and `num_rows` are None where they are not cheaply known; `class_names` are the
    names behind integer labels, by field; `splits` those that the source itself assigns, by file, or none."""

    name: str
    fields: tuple[Field, ...]
    num_rows: int | None
    class_names: Mapping[str, tuple[str, ...]]
    splits: Mapping[str, str]

    @property
    def total_bytes(self) -> int | None: ...

    @property
    def selection(self) -> Selection: ...

    def partitions(self, target_bytes: int) -> Iterator[Partition]:
        """Parts of about `target_bytes` of input each, in the order of the rows."""
        ...

    def read(self, partition: Partition) -> Iterator[tuple[Chunk, Keys]]:
        """The rows in order, at most about 8 MiB at once (a longer row is alone). Raises `DatasetError` naming file
        and row where something is wrong, or where a file is not what it was when the partition was made."""
        ...


@dataclass
class FileInput:
    """An input made of files. Subclasses override `pieces` and `read_part`."""

    name: str
    files: tuple[InputFile, ...]
    fields: tuple[Field, ...] = ()
    selection: Selection = Selection()
    num_rows: int | None = None
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    splits: Mapping[str, str] = field(default_factory=dict)  # by file name; empty where the input has none

    @property
    def total_bytes(self) -> int | None:
        return sum(file.size for file in self.files)

    def pieces(self, file: InputFile, target_bytes: int) -> Iterator[tuple[Part, int]]:
        """The parts that `file` may be cut into, in order and without gaps, and about how many bytes each has."""
        yield Part(file, 0, file.size), file.size

    def read_part(self, part: Part) -> Iterator[tuple[Chunk, Keys]]:
        """The rows of a part, with all columns of `selection.needed` and the keys they have without a key column."""
        raise NotImplementedError

    def split_of(self, file: InputFile) -> str:
        return self.splits.get(file.name, "")

    def partitions(self, target_bytes: int) -> Iterator[Partition]:
        if target_bytes < 1:
            raise UsageError(f"target_bytes ({target_bytes}) must be at least 1")
        index, size = 0, 0
        parts: list[Part] = []
        for file in self.files:
            if parts and self.split_of(file) != self.split_of(parts[-1].file):
                yield Partition(index, tuple(parts), self.split_of(parts[-1].file))
                index, size, parts = index + 1, 0, []
            for part, piece_bytes in self.pieces(file, target_bytes):
                if parts and parts[-1].file is file and parts[-1].end == part.begin:
                    parts[-1] = dataclasses.replace(parts[-1], end=part.end)
                else:
                    parts.append(part)
                size += piece_bytes
                if size >= target_bytes:
                    yield Partition(index, tuple(parts), self.split_of(file))
                    index, size, parts = index + 1, 0, []
        if parts:
            yield Partition(index, tuple(parts), self.split_of(parts[-1].file))

    def read(self, partition: Partition) -> Iterator[tuple[Chunk, Keys]]:
        for part in partition.parts:
            check_unchanged(part.file)
            for chunk, numbers in self.read_part(part):
                yield from cut(*self.selection.apply(chunk, numbers))
            check_unchanged(part.file)


def keys_of(column: Column) -> Keys:
    """The values of a column as keys. Raises `UsageError` for one that holds neither text, bytes nor integers."""
    if isinstance(column, Ragged):
        if column.kind in ("text", "bytes"):
            return list(column)
    elif column.ndim == 1 and column.dtype.kind in "iu":
        return column.astype(np.uint64) if column.dtype.kind == "u" else column.astype(np.int64).view(np.uint64)
    raise UsageError("the key column must hold text, bytes or integers: choose another column")


def numbered(file: InputFile, numbers: np.ndarray) -> np.ndarray:
    """Keys uint64 [rows] of the places `numbers` in a file: stable when other files come or go."""
    return numbers.astype(np.uint64) + np.uint64(int(digest(file.name.encode("utf-8", "surrogateescape")), 16))


def num_rows_of(chunk: Chunk) -> int:
    return len(next(iter(chunk.values())))


def bytes_of(column: Column) -> int:
    return column.values.nbytes if isinstance(column, Ragged) else column.nbytes


def rows_of_chunk(chunk: Chunk, begin: int, end: int) -> Chunk:
    """Rows `begin` to `end` as views."""
    return {n: c.rows(begin, end) if isinstance(c, Ragged) else c[begin:end] for n, c in chunk.items()}


def cut(chunk: Chunk, keys: Keys) -> Iterator[tuple[Chunk, Keys]]:
    """The chunk in parts of at most `CHUNK_BYTES`, or of one row; without rows nothing."""
    rows, size = num_rows_of(chunk), sum(map(bytes_of, chunk.values()))
    if size <= CHUNK_BYTES or rows == 1:
        if rows:
            yield chunk, keys
        return
    half = rows // 2
    yield from cut(rows_of_chunk(chunk, 0, half), keys[:half])
    yield from cut(rows_of_chunk(chunk, half, rows), keys[half:])


def same_fields(first: Sequence[Field], other: Sequence[Field], file: InputFile, of: InputFile) -> None:
    """Raises `DatasetError` where a later file states another schema than the first one."""
    if tuple(first) == tuple(other):
        return
    mine, theirs = {f.name: f for f in other}, {f.name: f for f in first}
    for name in [*theirs, *mine]:
        if mine.get(name) != theirs.get(name):
            raise DatasetError(
                f"{file.path}: column {name!r} is {describe(mine.get(name))}, but {describe(theirs.get(name))} in "
                f"{of.path}: pack files of one schema, or name the columns they share"
            )
    raise DatasetError(f"{file.path} has its columns in another order than {of.path}: write them in one order")


def describe(item: Field | None) -> str:
    if item is None:
        return "missing"
    shape = f" [{', '.join(map(str, item.shape))}]" if item.shape else ""
    return item.kind if item.kind in ("bytes", "text") else f"{item.kind} of {item.dtype}{shape}"
