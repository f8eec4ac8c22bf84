"""Batches of rows of one split through a reader of byte ranges: direct reads past the page cache, or an object store.

The whole blocks around a batch's rows are fetched, many at once, checked, and the rows copied out of them; `prefetch`
tells the reader of batches to come. The same batches as `reading` gives. Offsets of rows of different lengths are kept
in memory for each shard that was used (8 bytes a row). The reader's memory holds one batch, so batches go one by one.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.data import gather
from turbopump.data.gather import Fetched, Result, require_room
from turbopump.data.manifest import Manifest
from turbopump.data.ragged import Ragged, offsets_of
from turbopump.data.reading import Files, Index, RaggedBuffers, SplitData, widening_of


class RangeReader(Protocol):
    """Reads many byte ranges of files at once; see `direct` and `remote`."""

    def open(self, path: str) -> int: ...

    def read(self, handles: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray: ...

    def prefetch(self, handles: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> None: ...

    def close(self) -> None: ...


class RangedSplit(SplitData):
    """The rows of one split, fetched by `reader`; see `SplitData`."""

    ranged = True

    def __init__(self, files: Files, manifest: Manifest, split: str, reader: RangeReader) -> None:
        super().__init__(files, manifest, split)
        self._reader = reader
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
        for number, item in enumerate(self.fields):
            if item.fixed:
                shard, row = self._locate(ids)
                places = shard, row * item.row_bytes, (row + 1) * item.row_bytes
            else:
                places = self._ragged_places(number, ids)
            self._ask(number, 0 if item.fixed else 1, *places)

    def prefetch_windows(self, start: Index, items: int) -> None:
        shard, first, last, _ = self._pieces(np.ascontiguousarray(start, np.int64), items)
        size = self.fields[0].item_bytes
        self._ask(0, 0, shard, first * size, last * size)

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
            with self._lock:
                self._add_sums(one)
                self._handles[one] = self._reader.open(self._name(one))
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
        handles, offsets, lengths, first, skip = self._blocks(field, buffer, shard, begin, end)
        store = self._stores[self._first[field] + buffer]
        item_bytes = self.fields[field].item_bytes if wide else 1
        with self._lock:
            for attempt in range(2):
                at = self._read(handles, offsets, lengths)
                ranges = Fetched(at, shard, first, lengths, skip, end - begin, np.ascontiguousarray(to))
                result = Result()
                self._kernels.fetched(store, ranges, item_bytes, wide, out, result)
                again = getattr(self._reader, "refetch", None)
                if result.status == gather.OK or again is None or attempt:
                    break
                again(handles, offsets, lengths)  # a copy on the way may be damaged where the original is not
        self._raise(field, result, ids)

    def _read(self, handles: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads; where others were prefetched (by a loader that was closed, or for rows asked for in another order),
        those are dropped."""
        try:
            return self._reader.read(handles, offsets, lengths)
        except UsageError:
            cancel = getattr(self._reader, "cancel", None)
            if cancel is None:
                raise
            cancel()
            return self._reader.read(handles, offsets, lengths)

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
        for one in np.unique(shard).tolist():
            self.check_shard(field, one, buffers=1)
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
