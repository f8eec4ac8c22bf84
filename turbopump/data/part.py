"""One part of a dataset: the rows of one partition of the input, written by one process, sealed when it is whole.

Writing one is a pure function of its rows, so parts can be written by any process in any order. `PartWriter` gathers
rows and hands full shards to a thread; `finish` seals the part by a small JSON file with its entries. `writer` makes a
dataset of parts.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from turbopump.core.errors import DatasetError, UsageError
from turbopump.core.files import digest, digest_file, explain_os_error, to_json
from turbopump.data.manifest import DTYPES, Field, ShardEntry, SplitEntry, check_file_name
from turbopump.data.pieces import Pieces, Pool, pool_for
from turbopump.data.ragged import Ragged
from turbopump.data.shard import Column, write_shard

BLOCK_BYTES = 1 << 12  # of one checksum: a page, so that a random read need not fetch much more than its rows
SHARD_BYTES = 1 << 26  # what a writer holds in memory for each split


@dataclass(frozen=True)
class PartEntry:
    """What one part holds, by split; `xxh3` seals the file of its checksums."""

    part: int
    splits: Mapping[str, SplitEntry]
    sums_xxh3: str
    skipped: int = 0


class _Column:
    """Rows of one field that wait for their shard to be full: its buffers as they are stored."""

    def __init__(self, item: Field, pool: Pool) -> None:
        self.buffers = [Pieces(pool) for _ in range(1 if item.fixed else 2)]  # of values; of offsets and values
        self._values = 0

    def append(self, column: Column) -> None:
        if isinstance(column, np.ndarray):
            self.buffers[0].append(column)
            return
        offsets, values = self.buffers
        begin = column.offsets[0]
        offsets.append(column.offsets[bool(offsets.size) :] + (self._values - begin))
        values.append(column.values[begin : column.offsets[-1]])
        self._values += int(column.offsets[-1] - begin)


@dataclass
class _Pending:
    """The shard of one split that is being gathered, and what its shards before it were."""

    columns: list[_Column]
    rows: int = 0
    bytes: int = 0
    shards: list[ShardEntry] = field(default_factory=list)
    sums: list[np.ndarray] = field(default_factory=list)
    source_bytes: int = 0
    documents: int = 0
    document_sizes: Counter[int] = field(default_factory=Counter)


class PartWriter:
    """Writes one part into a staging directory; `finish` seals it. Raises `DatasetError` for a full disk."""

    def __init__(
        self, staging: Path, part: int, fields: Sequence[Field], *, shard_bytes: int = SHARD_BYTES,
        block_bytes: int = BLOCK_BYTES, shown: Path | None = None,
    ) -> None:  # fmt: skip
        self._staging, self._part = staging, part
        self._shown = shown or staging  # what errors name
        self.fields = checked_fields(fields)
        self._shard_bytes, self._block_bytes = shard_bytes, block_bytes
        num_buffers = sum(1 if item.fixed else 2 for item in self.fields)
        self._pool = pool_for(shard_bytes, block_bytes, num_buffers)
        self._splits: dict[str, _Pending] = {}
        self._thread: ThreadPoolExecutor | None = None
        self._writing: Future[None] | None = None

    def append(
        self,
        split: str,
        columns: Sequence[Column],
        *,
        source_bytes: int = 0,
        document_sizes: Sequence[int] | np.ndarray = (),
    ) -> None:
        """Add rows to a split: an array [rows, *shape] or a `Ragged` a field. They are copied."""
        columns = [_checked(item, column) for item, column in zip(self.fields, columns, strict=True)]
        if len({len(column) for column in columns}) != 1:
            raise UsageError(
                f"fields of one batch have different numbers of rows: {', '.join(map(str, map(len, columns)))}"
            )
        if split not in self._splits:
            _check_split(split)
        pending = self._splits.setdefault(split, _Pending(self._empty()))
        pending.source_bytes += source_bytes
        pending.documents += len(document_sizes)
        pending.document_sizes.update((max(1, int(n)) - 1).bit_length() for n in document_sizes)
        rows, begin = len(columns[0]), 0
        sizes = self._row_bytes(columns)
        while begin < rows:
            room = self._shard_bytes - pending.bytes
            fit = int(np.searchsorted(sizes - (sizes[begin - 1] if begin else 0), room, "right"))
            end = max(fit, begin + (not pending.rows))  # a record larger than a shard has one of its own
            if end > begin:
                for waiting, column in zip(pending.columns, columns, strict=True):
                    waiting.append(column[begin:end] if isinstance(column, np.ndarray) else column.rows(begin, end))
                pending.rows += end - begin
                pending.bytes += int(sizes[end - 1] - (sizes[begin - 1] if begin else 0))
            if end < rows or pending.bytes >= self._shard_bytes:
                self._write(split, pending)
            begin = end

    def _empty(self) -> list[_Column]:
        return [_Column(item, self._pool) for item in self.fields]

    def _row_bytes(self, columns: Sequence[Column]) -> np.ndarray:
        """Bytes of all rows up to and with each."""
        fixed = sum(item.row_bytes if item.fixed else 8 for item in self.fields)
        sizes = np.arange(1, len(columns[0]) + 1) * fixed
        for item, column in zip(self.fields, columns, strict=True):
            if isinstance(column, Ragged):
                sizes = sizes + (column.offsets[1:] - column.offsets[0]) * item.row_bytes
        return sizes

    def _write(self, split: str, pending: _Pending) -> None:
        """Hand the rows that wait to the thread that writes: hashing and the disk go on beside the reading."""
        self._wait()
        file = self._staging / f"part-{self._part:06d}-{len(pending.shards):03d}-{split}.arrow"
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "turbopump-writer")
        self._writing = self._thread.submit(self._store, file, pending.columns, pending.rows, pending)
        pending.columns, pending.rows, pending.bytes = self._empty(), 0, 0

    def _store(self, file: Path, columns: Sequence[_Column], rows: int, pending: _Pending) -> None:
        buffers = [buffer for column in columns for buffer in column.buffers]
        entry, sums = write_shard(file, self.fields, rows, buffers, self._block_bytes)
        for buffer in buffers:
            buffer.free()
        pending.shards.append(entry)
        pending.sums.append(sums)

    def _wait(self) -> None:
        """Until the shard under way is written: two of them are in memory at most."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except OSError as error:
            raise DatasetError(explain_os_error(error, self._shown)) from error

    def abort(self) -> None:
        """End the thread; what it was writing is nobody's. Harmless after `finish`."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
            self._thread = None

    def finish(self, skipped: int = 0) -> PartEntry:
        """Write what is pending, then the files that make the part whole."""
        for name, pending in sorted(self._splits.items()):
            if pending.rows:
                self._write(name, pending)
        self._wait()
        self.abort()
        sums = [array for _, pending in sorted(self._splits.items()) for array in pending.sums]
        splits = {
            name: SplitEntry(
                sum(shard.rows for shard in p.shards), p.source_bytes, p.documents,
                {str(1 << size): count for size, count in sorted(p.document_sizes.items())}, tuple(p.shards),
            )
            for name, p in sorted(self._splits.items())
        }  # fmt: skip
        file = self._staging / sums_file(self._part)
        try:
            file.write_bytes(np.concatenate([np.empty(0, np.uint64), *sums]).tobytes())
            entry = PartEntry(self._part, splits, digest_file(file), skipped)
            data = to_json(entry)
            seal = self._staging / f"part-{self._part:06d}.json"
            seal.write_bytes(data + b"\n" + digest(data).encode())  # `commit` makes all of it durable at once
        except OSError as error:
            raise DatasetError(explain_os_error(error, self._shown)) from error
        return entry


def sums_file(part: int) -> str:
    return f"part-{part:06d}.sums"


def _checked(item: Field, column: Column) -> Column:
    if item.fixed != isinstance(column, np.ndarray):
        raise UsageError(f"field {item.name!r} is of kind {item.kind}, which a {type(column).__name__} is not")
    values = column if isinstance(column, np.ndarray) else column.values
    if values.shape[1:] != item.shape:
        raise UsageError(f"field {item.name!r}: rows of shape {values.shape[1:]} given, {item.shape} expected")
    values = np.ascontiguousarray(values, item.dtype)
    return values if isinstance(column, np.ndarray) else Ragged(values, column.offsets, column.kind)


def _check_split(name: str) -> None:
    try:
        check_file_name(name)
    except ValueError as error:
        raise UsageError(f"a split cannot be called {name!r}: its files are named after it") from error


def checked_fields(fields: Sequence[Field]) -> tuple[Field, ...]:
    """The fields; raises `UsageError` for one that cannot be stored."""
    names = [item.name for item in fields]
    if not names or len(set(names)) != len(names):
        raise UsageError(f"fields must be one or more of different names: {', '.join(names) or 'none'} given")
    for item in fields:
        if item.dtype not in DTYPES:
            raise UsageError(f"field {item.name!r} has dtype {item.dtype}; allowed: {', '.join(DTYPES)}")
        if 0 in item.shape:
            raise UsageError(f"field {item.name!r} has rows of shape {item.shape}, which hold nothing")
    return tuple(fields)


def fsync(file: Path) -> None:
    handle = os.open(file, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
