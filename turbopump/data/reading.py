"""Batches of rows of one split from mapped shards, checked before anybody sees them.

Shards are mapped when they are first used; a batch is one pass of gather.cpp over them. Pages that may be cold are
asked for, all of a batch at once, before the first is touched. A batch goes to fresh arrays, or to `buffers` that are
used again: those start on a page. `ranged` does the same through a reader of byte ranges.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from turbopump.core.errors import CorruptDataError
from turbopump.core.files import digest
from turbopump.data import gather
from turbopump.data.aligned import aligned_empty
from turbopump.data.gather import Result, Store, address, kernels, require_room
from turbopump.data.manifest import Field, Manifest, ShardEntry, num_buffers, sums_name
from turbopump.data.ragged import Ragged, offsets_of

Index = np.ndarray | Sequence[int]
RESTORE = "restore the file from a copy or pack the dataset again"
RESIDENT_SHARE = 0.9  # of a shard's pages: with fewer in memory its pages are asked for before they are touched


class Files(Protocol):
    """Where the files of a dataset are. `refetches`: what differs from its checksum may be right when it is fetched
    once more; `restore` is what to do where it is not."""

    restore: str
    refetches: bool

    def buffer(self, shard: ShardEntry, offset: int, size: int) -> tuple[np.ndarray, bool]:
        """Part of a shard in memory, uint8 [size], and whether its pages may have to be read first."""
        ...

    def part(self, file: str, offset: int, size: int) -> np.ndarray:
        """A copy of some bytes of a file."""
        ...

    def parts(self, wanted: Iterable[tuple[str, int, int]]) -> Iterator[np.ndarray]:
        """`part` of each (file, offset, bytes), in order."""
        ...

    def whole(self, file: str) -> bytes:
        """A small file."""
        ...

    def location(self, file: str) -> str:
        """What errors name."""
        ...

    def key(self, file: str) -> str:
        """What a range reader opens."""
        ...


class LocalFiles:
    """A directory. Shards are mapped whole, when first used, for as long as the dataset is open."""

    refetches = False
    restore = RESTORE

    def __init__(self, path: Path) -> None:
        self._path = path
        self._maps: dict[str, np.ndarray] = {}

    def location(self, file: str) -> str:
        return str(self._path / file)

    key = location

    def whole(self, file: str) -> bytes:
        try:
            return (self._path / file).read_bytes()
        except OSError as error:
            raise CorruptDataError(f"{self._path / file} is missing or unreadable: {error.strerror}") from error

    def parts(self, wanted: Iterable[tuple[str, int, int]]) -> Iterator[np.ndarray]:
        return (self.part(*one) for one in wanted)

    def buffer(self, shard: ShardEntry, offset: int, size: int) -> tuple[np.ndarray, bool]:
        if shard.file not in self._maps:
            self._maps[shard.file] = _map(self._path / shard.file, shard.bytes)
        mapped = self._maps[shard.file]
        return mapped[offset : offset + size], resident_share(mapped) < RESIDENT_SHARE

    def part(self, file: str, offset: int, size: int) -> np.ndarray:
        path = self._path / file
        try:
            with path.open("rb") as handle:
                handle.seek(offset)
                data = handle.read(size)
        except OSError as error:
            raise CorruptDataError(f"{path} is missing or unreadable ({error.strerror}): {RESTORE}") from error
        if len(data) != size:
            raise _cut_short(str(path), offset + len(data), offset + size)
        return np.frombuffer(data, np.uint8)


def _map(path: Path, size: int) -> np.ndarray:
    if not size:
        return np.empty(0, np.uint8)
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            there = os.fstat(handle).st_size
            if there < size:
                raise _cut_short(str(path), there, size)
            mapped = mmap.mmap(handle, size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(handle)
    except OSError as error:
        hint = "fewer, larger shards, or a higher vm.max_map_count" if error.errno == 12 else RESTORE
        raise CorruptDataError(f"{path} cannot be mapped ({error.strerror}): {hint}") from error
    mapped.madvise(mmap.MADV_RANDOM)  # else each fault reads what the disk's read-ahead says, up to megabytes
    return np.frombuffer(mapped, np.uint8)


def _cut_short(path: str, there: int, expected: int) -> CorruptDataError:
    return CorruptDataError(f"{path} has {there} bytes where {expected} were written (cut short): {RESTORE}")


class SplitData:
    """The rows of one split. `field` is a number; indices are rows of the split, in any order, any number of times.

    Raises `IndexError` for a row that is not there, `CorruptDataError` naming file, block and row where stored bytes
    differ from their checksum. Safe in several threads.
    """

    batches_ahead = 0  # how many batches may be announced by `prefetch` before they are read

    def __init__(self, files: Files, manifest: Manifest, split: str) -> None:
        self.fields = manifest.fields
        self._files, self._split, self._manifest = files, split, manifest
        self.shards: tuple[ShardEntry, ...] = manifest.splits[split].shards
        self.bounds = offsets_of([shard.rows for shard in self.shards])
        number = num_buffers(self.fields)
        self._first = {i: num_buffers(self.fields[:i]) for i in range(len(self.fields))}  # buffer of each field
        block_bytes = manifest.block_bytes
        sizes = np.array([[size for _, size in shard.buffers] for shard in self.shards], np.int64).reshape(-1, number)
        self._stores = [Store(self.bounds, np.ascontiguousarray(sizes[:, b]), block_bytes) for b in range(number)]
        blocks = -(-sizes // block_bytes)
        self._sums_at = offsets_of(blocks.sum(axis=1))
        self._lock = threading.RLock()
        self._kernels = kernels()
        values = [(self._stores[self._first[i]], item) for i, item in enumerate(self.fields)]
        self._quick_rows = [self._kernels.quick_rows(store, item.row_bytes) for store, item in values]
        self._quick_windows = [self._kernels.quick_windows(store, item.item_bytes) for store, item in values]
        self._widening = [widening_of(item, True) for item in self.fields]
        self._quick_ragged = {
            i: self._kernels.quick_ragged(*self._stores[first : first + 2], self.fields[i].row_bytes)
            for i, first in self._first.items()
            if not self.fields[i].fixed
        }

    def __len__(self) -> int:
        return int(self.bounds[-1])

    # ---- batches ------------------------------------------------------------------------------------------------

    def rows(self, field: int, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        """Rows of a field of fixed shape: [n, *shape], into `out` where it is given."""
        plain = type(index) is _ndarray and index.dtype is _INT64
        if plain and out is not None and not self._quick_rows[field](index, out):  # few us for small rows
            return out
        item, ids = self.fields[field], as_ids(index)
        if out is None:
            out = np.empty((len(ids), *item.shape), item.dtype)
        if self._quick_rows[field](ids, out):
            store = self._stores[self._first[field]]
            self._run(field, lambda r: self._kernels.rows(store, ids, item.row_bytes, True, out, r), ids)
        return out

    def windows(
        self, start: Index, items: int, *, wide: bool = True, out: np.ndarray | None = None, field: int = 0
    ) -> np.ndarray:
        """Windows of `items` numbers from row `start` of a field of single numbers on: [n, items], as stored or
        (`wide`, of integers) int64.

        Windows may cross shards.
        """
        widening = self._widening[field] if wide else gather.AS_STORED
        plain = type(start) is _ndarray and start.dtype is _INT64
        if plain and out is not None and not self._quick_windows[field](items, widening, start, out):
            return out
        item, ids = self.fields[field], as_ids(start)
        if out is None:
            out = np.empty((len(ids), items), np.int64 if widening else item.dtype)
        if self._quick_windows[field](items, widening, ids, out):
            store, size = self._stores[self._first[field]], item.item_bytes
            self._run(field, lambda r: self._kernels.windows(store, ids, items, size, widening, True, out, r), ids)
        return out

    def ragged(self, field: int, index: Index, out: RaggedBuffers | None = None) -> Ragged:
        """Rows of a field whose rows differ in length."""
        item, ids = self.fields[field], as_ids(index)
        if out is None:
            out = RaggedBuffers(item, len(ids))
        if self._quick_ragged[field](ids, out.offsets, out.values):
            self._read_ragged(field, ids, out)
        return out.batch(len(ids))

    def _read_ragged(self, field: int, ids: np.ndarray, out: RaggedBuffers) -> None:
        require_room(out.offsets.nbytes, 8 * (len(ids) + 1))
        first, size = self._first[field], self.fields[field].row_bytes
        offsets, values = self._stores[first], self._stores[first + 1]
        while True:
            result = self._run(
                field,
                lambda r: self._kernels.ragged(offsets, values, ids, size, True, out.offsets, out.values, r), ids,
            )  # fmt: skip
            if result.status != gather.TOO_SMALL:
                return
            out.grow(result.block)

    def batch(self, index: Index, buffers: Sequence[Any] | None = None) -> tuple[Any, ...]:
        """All fields of the rows `index`: arrays, and `Ragged` where rows differ in length; in `buffers` if given."""
        ids = np.ascontiguousarray(index, np.int64)
        return tuple(
            self.rows(i, ids, None if buffers is None else buffers[i][: len(ids)])
            if item.fixed
            else self.ragged(i, ids, None if buffers is None else buffers[i])
            for i, item in enumerate(self.fields)
        )

    def buffers(self, rows: int) -> tuple[Any, ...]:
        """Memory for batches of up to `rows` rows, for `batch` to use again and again."""
        return tuple(
            aligned_empty((rows, *item.shape), item.dtype) if item.fixed else RaggedBuffers(item, rows)
            for item in self.fields
        )

    def lengths(self, field: int) -> np.ndarray:
        """The length of every row of a field whose rows differ in length, int64 [rows]: the stored length table."""
        parts = []
        for shard in range(len(self.shards)):
            self.check_shard(field, shard, buffers=1)
            parts.append(np.diff(self._whole(field, 0, shard).view(np.int64)))
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def prefetch(self, index: Index) -> None:
        """Tell of a batch to come; batches must then be asked for in the same order. Free where shards are mapped."""

    def prefetch_windows(self, start: Index, items: int) -> None:
        """The same for `windows`."""

    def forget(self) -> None:
        """Drop what was announced and not read."""

    def expect_order(self, order: str, window_samples: int, num_samples: int) -> int:
        """Learn the order of the reads to come: how many samples to announce beyond `batches_ahead` batches."""
        return 0

    # ---- whole shards --------------------------------------------------------------------------------------------

    def shard_rows(self, field: int, shard: int) -> np.ndarray | Ragged:
        """All rows of a field in one shard, checked: views of the map where there is one."""
        item, entry = self.fields[field], self.shards[shard]
        self.check_shard(field, shard)
        values = self._whole(field, 0 if item.fixed else 1, shard).view(item.dtype)
        if item.fixed:
            return values.reshape(entry.rows, *item.shape)
        offsets = self._whole(field, 0, shard).view(np.int64)
        if offsets[0] != 0 or (np.diff(offsets) < 0).any() or offsets[-1] * item.row_bytes > values.nbytes:
            raise CorruptDataError(
                f"{self._name(shard)}: the offsets of {item.name!r} are not in order: {self._files.restore}"
            )
        return Ragged(values.reshape(-1, *item.shape), offsets, item.kind)  # type: ignore[arg-type]

    def check_shard(self, field: int, shard: int, buffers: int = 2) -> None:
        """Check every block of (the first `buffers` of) one field of one shard that was not checked before."""
        for buffer in range(min(buffers, 1 if self.fields[field].fixed else 2)):
            self._whole(field, buffer, shard)
            store = self._stores[self._first[field] + buffer]
            if store.unknown[shard]:
                result = Result()
                self._kernels.check(store, shard, 0, int(store.blocks[shard]), result)
                self._raise(field, result, None)

    def bad_blocks(self, shard: int, buffer: int, first: int, data: np.ndarray) -> list[str]:
        """What is wrong with `data`, uint8: blocks from `first` on of a shard's buffer (numbered over all fields)."""
        with self._lock:
            self._add_sums([shard])
        sums = self._kernels.sums(data, self._manifest.block_bytes)
        expected = self._stores[buffer].sums[shard]
        assert expected is not None  # just added
        bad = np.flatnonzero(sums != expected[first : first + len(sums)])
        field = max(i for i, number in self._first.items() if number <= buffer)
        return [self._problem(field, Result(gather.MISMATCH, 0, shard, first + block), None) for block in bad.tolist()]

    def locate(self, row: int) -> str:
        """Where a row is stored, for errors: the file and the row in it."""
        shard = int(np.searchsorted(self.bounds, row, "right")) - 1
        return f"row {row - int(self.bounds[shard])} of {self._name(shard)}"

    # ---- shards into memory ----------------------------------------------------------------------------------------

    def _whole(self, field: int, buffer: int, shard: int) -> np.ndarray:
        """The bytes of one buffer of one shard, in memory for as long as the dataset is open."""
        number = self._first[field] + buffer
        store = self._stores[number]
        found = store.memory[shard]
        if found is not None:
            return found
        with self._lock:
            if store.memory[shard] is None:
                self._add_sums([shard])
                offset, size = self.shards[shard].buffers[number]
                memory, cold = self._files.buffer(self.shards[shard], offset, size)
                store.add_memory(shard, memory, cold)
            memory = store.memory[shard]  # type: ignore[assignment]
            return memory

    def _add_sums(self, shards: Sequence[int]) -> None:
        """The checksums of shards, themselves checked, to the stores of all their buffers."""
        todo = [shard for shard in shards if self._stores[0].sums[shard] is None]
        name = sums_name(self._split)
        for last in (not self._files.refetches, True):
            wanted = [(name, 8 * int(self._sums_at[i]), 8 * int(self._sums_at[i + 1] - self._sums_at[i])) for i in todo]
            damaged = []
            for shard, part in zip(todo, self._files.parts(wanted), strict=True):
                if digest(part.data) == self.shards[shard].sums_xxh3:
                    self._divide_sums(shard, part.view(np.uint64))
                else:
                    damaged.append(shard)
            todo = damaged
            if not todo:
                return
            if last:
                file = self.shards[todo[0]].file
                raise CorruptDataError(
                    f"{self._files.location(name)}: the checksums of {file} are damaged: {self._files.restore}"
                )

    def _divide_sums(self, shard: int, sums: np.ndarray) -> None:
        at = offsets_of([int(store.blocks[shard]) for store in self._stores])
        for number, store in list(enumerate(self._stores))[::-1]:  # the first one last: it tells that all are there
            store.add_sums(shard, sums[at[number] : at[number + 1]])

    def release(self, shard: int) -> None:
        """Let go of a shard's memory, where one after the other is fetched. Not while another thread reads."""
        for store in self._stores:
            store.remove_memory(shard)

    def _run(self, field: int, work: Any, ids: np.ndarray) -> Result:
        """Run a kernel, mapping what it misses, until it has done the batch; raises what it found."""
        result = Result()
        while True:
            work(result)
            if result.status == gather.OK or result.status == gather.TOO_SMALL:
                return result
            if result.status != gather.UNMAPPED:
                self._raise(field, result, ids)
            needed = np.unique(np.searchsorted(self.bounds, ids, "right") - 1).tolist()  # all at once: few beginnings
            for shard in {*needed, result.shard} & set(range(len(self.shards))):
                for buffer in range(1 if self.fields[field].fixed else 2):
                    self._whole(field, buffer, shard)

    def _raise(self, field: int, result: Result, ids: np.ndarray | None) -> None:
        if result.status == gather.OUT_OF_RANGE:
            given = f"row {int(ids[result.place])}" if ids is not None else "a row"
            raise IndexError(f"{given} of split {self._split!r} is out of range: it has rows 0 to {len(self) - 1}")
        if result.status != gather.OK:
            raise CorruptDataError(self._problem(field, result, ids))

    def _problem(self, field: int, result: Result, ids: np.ndarray | None) -> str:
        name, item = self._name(result.shard), self.fields[field]
        row = f", met at row {int(ids[result.place])} of the split" if ids is not None else ""
        if result.status == gather.CUT_SHORT:
            return f"{name} was cut short or its disk failed while it was read{row}: {self._files.restore}"
        if result.status == gather.BAD_OFFSETS:
            return f"{name}: the offsets of {item.name!r} are not in order{row}: {self._files.restore}"
        begin = result.block * self._manifest.block_bytes
        return (
            f"{name}: block {result.block} of {item.name!r} (from byte {begin} of its values) differs from its "
            f"checksum{row}: {self._files.restore}"
        )

    def _name(self, shard: int) -> str:
        return self._files.location(self.shards[shard].file)


_INT64, _ndarray = np.dtype(np.int64), np.ndarray  # looked up once, not at every batch


def as_ids(index: Index) -> np.ndarray:
    """`index` as a contiguous array of int64; as it is where it is one."""
    if type(index) is np.ndarray and index.dtype is _INT64 and index.flags.c_contiguous:
        return index
    return np.ascontiguousarray(index, np.int64)


def widening_of(item: Field, wide: bool) -> int:
    """How numbers of a field become int64; those that are no integers stay as they are."""
    kinds = {"u": gather.FROM_UNSIGNED, "i": gather.FROM_SIGNED}
    return kinds.get(np.dtype(item.dtype).kind, gather.AS_STORED) if wide else gather.AS_STORED


class RaggedBuffers:
    """Memory for batches of rows that differ in length; grows to the largest batch."""

    def __init__(self, field: Field, rows: int) -> None:
        self._field = field
        self.offsets = np.zeros(rows + 1, np.int64)
        self.values = aligned_empty((0, *field.shape), field.dtype)

    def grow(self, elements: int) -> None:
        if elements > len(self.values):
            self.values = aligned_empty((elements + elements // 8, *self._field.shape), self._field.dtype)

    def batch(self, rows: int) -> Ragged:
        """The batch of `rows` rows that was put here."""
        total = int(self.offsets[rows])
        return Ragged(self.values[:total], self.offsets[: rows + 1], self._field.kind)  # type: ignore[arg-type]


def resident_share(mapped: np.ndarray) -> float:
    """The share of a map's pages that are in memory, by mincore(2); 1 where nobody can tell."""
    if not len(mapped):
        return 1.0
    pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
    failed = _libc.mincore(ctypes.c_void_p(address(mapped)), ctypes.c_size_t(len(mapped)), pages.ctypes)
    return 1.0 if failed else float((pages & 1).mean())


_libc = ctypes.CDLL(None, use_errno=True)
