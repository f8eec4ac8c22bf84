"""Batches of rows of one split through a reader of byte ranges: direct reads past the page cache, or an object store.

The whole blocks around a batch's rows are fetched, many at once, checked, and the rows copied out of them; `prefetch`
tells the reader of batches to come. The same batches as `reading` gives. Offsets of rows of different lengths are kept
in memory for each shard that was used (8 bytes a row). The reader's memory holds one batch, so batches go one by one.

Announcements are advice: a batch that was not announced, or comes before its turn, is read all the same.
"""

from __future__ import annotations

import warnings
from contextlib import suppress
from typing import Any

import numpy as np

from turbopump.core.errors import CorruptDataError, DatasetError
from turbopump.data import gather
from turbopump.data.gather import Fetched, Result, require_room
from turbopump.data.manifest import Manifest
from turbopump.data.ragged import Ragged, offsets_of
from turbopump.data.ranges import RangeReader
from turbopump.data.reading import Files, Index, RaggedBuffers, SplitData, widening_of
from turbopump.data.remote import RemoteReader
from turbopump.data.remote_files import OrderAdvice

OFFSETS_AT_ONCE = 64  # shards


class RangedSplit(SplitData):
    """The rows of one split, fetched by `reader`; see `SplitData`."""

    ranged = True

    def __init__(
        self, files: Files, manifest: Manifest, split: str, reader: RangeReader, *, batches_ahead: int
    ) -> None:
        super().__init__(files, manifest, split)
        self._reader, self.batches_ahead = reader, batches_ahead
        self._handles = np.full(len(self.shards), -1, np.int32)
        self._offsets = np.array([[at for at, _ in shard.buffers] for shard in self.shards], np.int64)

    def rows(self, field: int, index: Index, out: np.ndarray | None = None) -> np.ndarray:
        item, ids = self.fields[field], np.ascontiguousarray(index, np.int64)
        if out is None:
            out = np.empty((len(ids), *item.shape), item.dtype)
        require_room(out.nbytes, len(ids) * item.row_bytes)
        shard, row = self._locate(ids)
        begin = row * item.row_bytes
        self._fetch(field, 0, shard, begin, begin + item.row_bytes, np.arange(len(ids)) * item.row_bytes, out, ids)
        return out

    def windows(
        self, start: Index, items: int, *, wide: bool = True, out: np.ndarray | None = None, field: int = 0
    ) -> np.ndarray:
        item, ids = self.fields[field], np.ascontiguousarray(start, np.int64)
        widening = widening_of(item, wide)
        if out is None:
            out = np.empty((len(ids), items), np.int64 if widening else item.dtype)
        out_bytes, size = 8 if widening else item.item_bytes, item.item_bytes
        require_room(out.nbytes, len(ids) * items * out_bytes)
        shard, first, last, place = self._pieces(ids, items)
        met = ids[place // items]
        self._fetch(field, 0, shard, first * size, last * size, place * out_bytes, out, met, widening)
        return out

    def ragged(self, field: int, index: Index, out: RaggedBuffers | None = None) -> Ragged:
        item, ids = self.fields[field], np.ascontiguousarray(index, np.int64)
        out = out or RaggedBuffers(item, len(ids))
        require_room(out.offsets.nbytes, 8 * (len(ids) + 1))
        shard, begin, end = self._ragged_places(field, ids)
        size = item.row_bytes
        out.offsets[: len(ids) + 1] = offsets_of((end - begin) // size)
        out.grow(int(out.offsets[len(ids)]))
        self._fetch(field, 1, shard, begin, end, out.offsets[: len(ids)] * size, out.values, ids)
        return out.batch(len(ids))

    def prefetch(self, index: Index) -> None:
        ids = np.ascontiguousarray(index, np.int64)
        with self._lock, suppress(DatasetError):  # what is wrong with it the read will say
            for number, item in enumerate(self.fields):
                if item.fixed:
                    shard, row = self._locate(ids)
                    places = shard, row * item.row_bytes, (row + 1) * item.row_bytes
                else:
                    places = self._ragged_places(number, ids)
                self._ask(number, 0 if item.fixed else 1, *places)

    def prefetch_windows(self, start: Index, items: int) -> None:
        with self._lock, suppress(DatasetError):
            shard, first, last, _ = self._pieces(np.ascontiguousarray(start, np.int64), items)
            size = self.fields[0].item_bytes
            self._ask(0, 0, shard, first * size, last * size)

    def forget(self) -> None:
        with self._lock:
            self._reader.forget()

    def expect_order(self, order: str, window_samples: int, num_samples: int) -> int:
        """Warns where a store's cache and the order do not go together."""
        if not isinstance(self._reader, RemoteReader):
            return 0
        num_bytes = sum(shard.bytes for shard in self.shards)
        advice = OrderAdvice(f"split {self._split!r}", num_bytes, num_samples, self._reader)
        if said := advice.warning(order, window_samples):
            warnings.warn(said, stacklevel=2)
        return advice.samples_ahead(order, window_samples)

    def lengths(self, field: int) -> np.ndarray:
        for first in range(0, len(self.shards), OFFSETS_AT_ONCE):
            self._load_offsets(field, list(range(first, min(first + OFFSETS_AT_ONCE, len(self.shards)))))
        return super().lengths(field)

    def _locate(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(shard, row in it) of rows of the split."""
        if len(ids) and (ids.min() < 0 or ids.max() >= len(self)):
            wrong = ids[(ids < 0) | (ids >= len(self))][0]
            raise IndexError(f"row {wrong} of split {self._split!r} is out of range: it has rows 0 to {len(self) - 1}")
        shard = np.searchsorted(self.bounds, ids, "right") - 1
        return shard, ids - self.bounds[shard]

    def _ask(self, field: int, buffer: int, shard: np.ndarray, begin: np.ndarray, end: np.ndarray) -> None:
        some = end > begin
        if some.any():
            ranges = self._blocks(field, buffer, shard[some], begin[some], end[some])[:3]
            with self._lock:
                self._reader.prefetch(*ranges)

    def _blocks(self, field: int, buffer: int, shard: np.ndarray, begin: np.ndarray, end: np.ndarray) -> Any:
        """Handles, offsets and lengths of the whole blocks around bytes [begin, end) of the shards' buffers; then the
        first block of each, and how far into it the bytes begin."""
        number = self._first[field] + buffer
        block = self._manifest.block_bytes
        for one in np.unique(shard[self._handles[shard] < 0]).tolist():
            entry = self.shards[one]
            self._handles[one] = self._reader.open(self._files.key(entry.file), entry.bytes)
        first = begin // block
        stop = np.minimum(-(-end // block) * block, self._stores[number].sizes[shard])
        offsets = self._offsets[shard, number] + first * block
        return self._handles[shard], offsets, stop - first * block, first, begin - first * block

    def _fetch(
        self, field: int, buffer: int, shard: np.ndarray, begin: np.ndarray, end: np.ndarray, to: np.ndarray,
        out: np.ndarray, ids: np.ndarray, wide: int = gather.AS_STORED,
    ) -> None:  # fmt: skip
        """Bytes [begin, end) of buffers to bytes `to` of `out`; `ids` are the rows they belong to, for errors."""
        some = end > begin
        if not some.all():
            shard, begin, end, to, ids = shard[some], begin[some], end[some], to[some], ids[some]
        if not len(shard):
            return
        store = self._stores[self._first[field] + buffer]
        item_bytes = self.fields[field].item_bytes if wide else 1
        with self._lock:
            self._add_sums(np.unique(shard).tolist())
            handles, offsets, lengths, first, skip = self._blocks(field, buffer, shard, begin, end)
            for read in (self._reader.read, self._reader.refetch):  # a copy may be damaged where the original is not
                at = read(handles, offsets, lengths)
                ranges = Fetched(at, shard, first, lengths, skip, end - begin, np.ascontiguousarray(to))
                result = Result()
                self._kernels.fetched(store, ranges, item_bytes, wide, out, result)
                if result.status == gather.OK:
                    break
        self._raise(field, result, ids)

    def _pieces(self, start: np.ndarray, items: int) -> tuple[np.ndarray, ...]:
        """Shard, first and last item in it, and place in the output of the pieces of windows."""
        if len(start) and (start.min() < 0 or start.max() > len(self) - items):
            raise IndexError(f"a window of {items} reaches past the {len(self)} rows of split {self._split!r}")
        shard = np.searchsorted(self.bounds, start, "right") - 1
        place, todo = np.arange(len(start)) * items, np.full(len(start), items)
        row = start - self.bounds[shard]
        found: list[tuple[np.ndarray, ...]] = []
        while len(shard) or not found:
            count = np.minimum(todo, self.bounds[shard + 1] - self.bounds[shard] - row)
            found.append((shard, row, row + count, place))
            more = todo > count
            shard, row = shard[more] + 1, np.zeros(int(more.sum()), np.int64)
            place, todo = (place + count)[more], (todo - count)[more]
        return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))

    def _ragged_places(self, field: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shard and bytes [begin, end) of the values of rows, from the offsets."""
        shard, row = self._locate(ids)
        pairs = np.empty((len(ids), 2), np.int64)
        shards = np.unique(shard).tolist()
        self._load_offsets(field, shards)
        for one in shards:
            offsets = self._whole(field, 0, one).view(np.int64)
            mine = shard == one
            pairs[mine, 0], pairs[mine, 1] = offsets[row[mine]], offsets[row[mine] + 1]
        size = self.fields[field].row_bytes
        sizes = self._stores[self._first[field] + 1].sizes[shard]
        bad = (pairs[:, 0] < 0) | (pairs[:, 1] < pairs[:, 0]) | (pairs[:, 1] > sizes // size)
        if bad.any():
            place = int(np.argmax(bad))
            self._raise(field, Result(gather.BAD_OFFSETS, place, int(shard[place])), ids)
        return shard, pairs[:, 0] * size, pairs[:, 1] * size

    def _load_offsets(self, field: int, shards: list[int]) -> None:
        """The offsets of a field in these shards, checked; those of a store several at once."""
        number = self._first[field]
        store = self._stores[number]
        with self._lock:
            for last in (not self._files.refetches, True):
                todo = [i for i in shards if store.memory[i] is None] if self._files.refetches else []
                self._add_sums(todo)
                wanted = [(self.shards[i].file, *self.shards[i].buffers[number]) for i in todo]
                for i, memory in zip(todo, self._files.parts(wanted), strict=True):
                    store.add_memory(i, memory, False)
                damaged = [i for i in shards if not self._is_whole(field, i, say=last)]
                if not damaged:
                    return
                for i in damaged:
                    store.remove_memory(i)

    def _is_whole(self, field: int, shard: int, *, say: bool) -> bool:
        try:
            self.check_shard(field, shard, buffers=1)
            return True
        except CorruptDataError:
            if say:
                raise
            return False
