"""Ranges of remote objects as memory: `RemoteReader` reads through a cache of blocks (without: `remote_direct.py`).

    reader.open(key, num_bytes)                    a handle
    reader.prefetch(handles, offsets, lengths)     start to fetch what a later read will want, in that order
    reader.read(handles, offsets, lengths)         addresses of the ranges' bytes, valid until the next read
    reader.refetch(handles, offsets, lengths)      drop the blocks of ranges whose content is wrong, and read anew

What is prefetched is kept until it was read: give the same ranges to `read` later, or call `forget`. Blocks that
stand together in the order and in the object are one request; the reads of now go before those of later. Requests are
made by the store's helper process; its answers are put into the cache by the thread that receives them.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from concurrent.futures import Future
from contextlib import suppress

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.core.files import explain_os_error
from turbopump.core.units import human_bytes
from turbopump.data.block_cache import BlockCache, Row
from turbopump.data.ranges import Arena, Array, Object, Objects, Pieces, cut
from turbopump.data.stores import MEMORY_BYTES, Store

REQUEST_BYTES = 4 << 20  # the most one request of cached blocks asks for; a store gives one connection 50-100 MB/s
_BUSY_POLL_S, _BUSY_LIMIT_S = 0.004, 60.0
_MOST_LOOSE_BYTES = 64 << 20  # fetched ahead into memory where the cache takes nothing


class RemoteReader:
    """Reads through `cache`. For use by one thread at a time of each process; a forked child starts anew.

    `window_bytes` is what the order touches between the prefetch of a record and its read; `ahead_bytes` is how much of
    the cache what was prefetched may fill (by default three quarters; with several processes on one cache give each
    its share). Raises `UsageError` if the cache is less than the window and what is under way.
    """

    def __init__(
        self,
        store: Store,
        cache: BlockCache,
        *,
        max_requests_in_flight: int = 32,
        request_bytes: int = REQUEST_BYTES,
        window_bytes: int = 0,
        ahead_bytes: int | None = None,
    ) -> None:
        block, slots = cache.block_bytes, cache.num_slots
        self._store, self._cache, self._block_bytes = store, cache, block
        self._lane_bytes = max(block, request_bytes // block * block)
        self._num_lanes = min(max_requests_in_flight, MEMORY_BYTES // self._lane_bytes)
        if self._num_lanes < 1:
            raise UsageError(f"block_bytes ({block}) must not be more than {MEMORY_BYTES}, nor requests in flight none")
        self._most_ahead = max(1, slots * 3 // 4 if ahead_bytes is None else ahead_bytes // block)
        if window_bytes > min(slots, self._most_ahead) * block:
            raise UsageError(
                f"the cache of {human_bytes(slots * block)} may hold {human_bytes(self._most_ahead * block)} fetched "
                f"ahead, but the order needs {human_bytes(window_bytes)}: give more cache_bytes or a smaller window"
            )
        self._objects = Objects(store, block)
        self._start()

    @property
    def block_bytes(self) -> int:
        return self._block_bytes

    @property
    def cache_bytes(self) -> int:
        """What the cache holds."""
        return self._cache.num_slots * self._block_bytes

    @property
    def ahead_bytes(self) -> int:
        """What may be in the cache of what was prefetched and not yet read."""
        return self._most_ahead * self._block_bytes

    def _start(self) -> None:
        self._pid = os.getpid()
        self._arena = Arena()
        self._changed = threading.Condition()
        self._urgent: dict[int, None] = {}  # blocks that a read waits for
        self._wanted: dict[int, None] = {}  # blocks that a later read will want, in that order
        self._flying: set[int] = set()
        self._ahead: set[int] = set()  # blocks prefetched and not yet read
        self._loose: dict[int, bytes] = {}  # blocks that the cache had no place for
        self._failed: dict[int, Exception] = {}
        self._awaited: set[int] = set()
        self._past: set[int] = set()  # awaited blocks that are to come past the cache
        self._lanes = list(range(self._num_lanes))
        self._through = False  # the cache's disk takes no more
        # Of every block: where this process saw it last (generation 0: nowhere), whether its checksum was right, and
        # how many ranges of it will be read.
        self._slot = np.zeros(0, np.int32)
        self._generation = np.zeros(0, np.uint64)
        self._checked = np.zeros(0, np.bool_)
        self._pending = np.zeros(0, np.int32)
        self._counts = dict.fromkeys(("hits", "misses", "requests", "fetched_bytes", "wait_s"), 0.0)
        self._calls = self._num_reads = 0

    def _here(self) -> None:
        if self._pid != os.getpid():
            self._start()

    def open(self, key: str, num_bytes: int | None = None) -> int:
        """The handle of an object; its size is asked for unless it is given."""
        self._here()
        return self._objects.open(key, num_bytes)

    def prefetch(self, handles: Array, offsets: Array, lengths: Array) -> None:
        """Start to fetch the blocks of these ranges, after those of earlier calls. Never waits, never raises for what
        the store says: the read will."""
        self._here()
        pieces = self._pieces(handles, offsets, lengths)
        blocks, first = np.unique(pieces.block, return_index=True)
        with self._changed:
            np.add.at(self._pending, pieces.block, 1)
            here = self._valid(blocks)
            self._ahead.update(blocks[here].tolist())
            missing, first = blocks[~here], first[~here]
            for block in missing[np.argsort(first)].tolist():
                if block not in self._flying and block not in self._loose:
                    self._wanted.setdefault(block)
            self._hold()
            self._pump()

    def read(self, handles: Array, offsets: Array, lengths: Array) -> Array:
        """Addresses of the ranges' bytes. Raises `RemoteError` for what the store does not give."""
        self._here()
        pieces = self._pieces(handles, offsets, lengths)
        at = self._arena.place(np.asarray(lengths, np.int64))
        blocks, of_piece = np.unique(pieces.block, return_inverse=True)
        missed = ~self._valid(blocks)
        self._counts["misses"] += int(missed.sum())
        self._counts["hits"] += len(blocks) - int(missed.sum())
        self._num_reads += 1
        at_once = max(1, self._cache.num_slots // 2)
        for begin in range(0, len(blocks), at_once):
            chosen = np.flatnonzero((of_piece >= begin) & (of_piece < begin + at_once))
            self._copy(pieces, at, chosen)
        self._was_read(pieces, blocks)
        return (at + self._arena.address).astype(np.uint64)

    def refetch(self, handles: Array, offsets: Array, lengths: Array) -> Array:
        """Drop the blocks of these ranges from the cache, because their content is wrong, and read anew."""
        self._here()
        blocks = np.unique(self._pieces(handles, offsets, lengths).block)
        for block in blocks.tolist():
            known, number = self._where(block)
            self._cache.drop(known.file, [number])
        with self._changed:
            self._generation[blocks] = 0
            for block in blocks.tolist():
                self._loose.pop(block, None)
        return self.read(handles, offsets, lengths)

    def forget(self) -> None:
        """What was prefetched will not be read: another order begins."""
        self._here()
        with self._changed:
            self._wanted.clear()
            self._ahead.clear()
            self._loose.clear()
            self._pending[:] = 0

    def statistics(self) -> dict[str, float]:
        """Blocks found (hits) and waited for (misses), bytes fetched, requests, retries, seconds a read waited."""
        retries = {name: float(self._store.statistics[name]) for name in ("retries", "throttled")}
        return {**self._counts, **retries, "ahead_blocks": float(len(self._ahead))}

    def close(self) -> None:
        """Stop fetching, end the store's helper and close the cache; what is in it stays."""
        if self._pid == os.getpid():
            self.forget()
            self._store.close()
        self._cache.close()

    # ---- which blocks -------------------------------------------------------------------------------------------

    def _pieces(self, handles: Array, offsets: Array, lengths: Array) -> Pieces:
        handles, offsets, lengths = (np.asarray(x, np.int64) for x in (handles, offsets, lengths))
        self._objects.check(handles, offsets, lengths)
        if self._objects.num_blocks > len(self._slot):
            self._grow(self._objects.num_blocks * 5 // 4)
        return cut(self._objects.first[handles], offsets, lengths, self._block_bytes)

    def _grow(self, num_blocks: int) -> None:
        with self._changed:
            for name in ("_slot", "_generation", "_checked", "_pending"):
                before = getattr(self, name)
                after = np.zeros(num_blocks, before.dtype)  # memory only where there is something
                after[: len(before)] = before
                setattr(self, name, after)

    def _where(self, block: int) -> tuple[Object, int]:
        """The object of a block, and its number therein."""
        index = int(np.searchsorted(self._objects.first, block, side="right")) - 1
        known = self._objects.opened[index]
        return known, block - known.first

    def _valid(self, blocks: Array) -> Array:
        """Which blocks are where this process saw them last."""
        generations = self._generation[blocks]
        return (generations > 0) & (self._cache.table.generation[self._slot[blocks]] == generations)

    def _was_read(self, pieces: Pieces, blocks: Array) -> None:
        with self._changed:
            np.subtract.at(self._pending, pieces.block, 1)
            self._pending[blocks] = np.maximum(self._pending[blocks], 0)
            done = blocks[self._pending[blocks] == 0]
            for block in done.tolist():
                self._ahead.discard(block)
                self._loose.pop(block, None)
                self._wanted.pop(block, None)
            self._cache.touch(self._slot[done[self._valid(done)]], needed=False)
            self._hold()
            self._pump()

    def _hold(self) -> None:
        """Now and then tell the cache what is still needed."""
        self._calls += 1
        if self._ahead and self._calls % 8 == 0:
            blocks = np.fromiter(self._ahead, np.int64, len(self._ahead))
            self._cache.touch(self._slot[blocks[self._valid(blocks)]], needed=True)

    # ---- from the cache to the arena ---------------------------------------------------------------------------

    def _copy(self, pieces: Pieces, at: Array, chosen: Array) -> None:
        for attempt in range(1 << 30):
            blocks = np.unique(pieces.block[chosen])
            self._wait_for(blocks, outside=attempt > 3)
            with self._changed:  # slot and generation belong together
                slots, generations = self._slot[pieces.block[chosen]], self._generation[pieces.block[chosen]]
            source = slots.astype(np.int64) * self._block_bytes + pieces.begin[chosen]
            target = at[pieces.range[chosen]] + pieces.at[chosen]
            loose, whole = self._copied(pieces.block[chosen], source, target, pieces.length[chosen])
            same = (generations > 0) & (self._cache.table.generation[slots] == generations)
            chosen = chosen[~(loose | (same & whole))]
            if not len(chosen):
                return

    def _copied(self, blocks: Array, source: Array, target: Array, lengths: Array) -> tuple[Array, Array]:
        """Which pieces were copied of loose blocks, and which whole from a slot (that may have changed meanwhile)."""
        view, handle, preadv = self._arena.view, self._cache.table.blocks, os.preadv
        loose, whole = np.zeros((2, len(source)), np.bool_)
        rows = zip(blocks.tolist(), source.tolist(), target.tolist(), lengths.tolist())
        for i, (block, begin, to, length) in enumerate(rows):
            if (data := self._loose.get(block)) is not None:
                begin %= self._block_bytes
                view[to : to + length] = data[begin : begin + length]
                loose[i] = True
            else:
                whole[i] = preadv(handle, [view[to : to + length]], begin) == length
        return loose, whole

    def _wait_for(self, blocks: Array, *, outside: bool) -> None:
        """Until every block is in the cache as far as this process can see, or loose. `outside`: others push out of the
        cache what this process needs, faster than it can copy: the blocks come past it."""
        begin = time.perf_counter()
        with self._changed:
            self._awaited = set(blocks.tolist())
            try:
                while True:
                    left = [b for b in blocks[~self._valid(blocks)].tolist() if b not in self._loose]
                    for block in left:
                        if (error := self._failed.pop(block, None)) is not None:
                            raise error
                        if block not in self._flying:
                            self._wanted.pop(block, None)
                            self._urgent.setdefault(block)
                    if not left and not (left := self._unchecked(blocks)):
                        return
                    if outside:
                        self._past.update(left)
                    busy = self._pump()
                    outside = outside or (busy and time.perf_counter() - begin > _BUSY_LIMIT_S)
                    self._changed.wait(_BUSY_POLL_S if busy else 0.5)
            finally:
                self._awaited, self._past = set(), set()
                self._urgent.clear()
                self._failed.clear()
                self._counts["wait_s"] += time.perf_counter() - begin

    def _unchecked(self, blocks: Array) -> list[int]:
        """Check blocks that others wrote, when first used here; those that differ are to be fetched again."""
        wrong = []
        for block in blocks[~self._checked[blocks] & (self._generation[blocks] > 0)].tolist():
            known, number = self._where(block)
            row = Row("ready", int(self._slot[block]), int(self._generation[block]))
            if self._cache.verify(row, known.file, number):
                self._checked[block] = True
            else:
                self._generation[block] = 0
                wrong.append(block)
        return wrong

    # ---- from the store to the cache ----------------------------------------------------------------------------

    def _pump(self) -> bool:
        """Start what may be started. Returns whether another process fetches what a read here waits for."""
        busy = full = False
        refused: set[int] = set()
        while self._lanes:
            urgent = [b for b in self._urgent if b not in refused]
            if not urgent and (full or not self._wanted or len(self._ahead) >= self._may_be_ahead()):
                break
            run = self._next_run(urgent[0] if urgent else next(iter(self._wanted)), refused)
            rows = self._rows(run)
            claimed: list[tuple[int, Row]] = []
            for block, row in zip(run, rows):
                waited_for = block in self._urgent
                if row.state == "busy" and waited_for:
                    busy = True
                    refused.add(block)
                    continue
                if row.state == "full" and not waited_for and not self._through:
                    full = True  # no room for what comes later: this process will look again
                    continue
                self._urgent.pop(block, None)
                self._wanted.pop(block, None)
                if self._pending[block]:
                    self._ahead.add(block)
                if row.state == "ready":
                    self._slot[block], self._generation[block] = row.slot, row.generation
                    self._checked[block] = False
                    self._changed.notify_all()
                elif row.state in ("claimed", "full"):
                    claimed.append((block, row))
            for group in _adjacent(claimed):
                self._send(group)
        return busy

    def _may_be_ahead(self) -> int:
        return min(self._most_ahead, _MOST_LOOSE_BYTES // self._block_bytes) if self._through else self._most_ahead

    def _next_run(self, block: int, refused: set[int]) -> list[int]:
        """The block and those beside it in its object that are wanted too, in one request: what waits is
        spread over the requests that may be made."""
        known, _ = self._where(block)
        last = known.first + -(-known.num_bytes // self._block_bytes)
        queued = len(self._urgent) + len(self._wanted)
        most = max(1, min(self._lane_bytes // self._block_bytes, -(-queued // len(self._lanes))))
        if block not in self._urgent:
            most = min(most, self._may_be_ahead() - len(self._ahead))
        run = [block]
        while len(run) < most and run[-1] + 1 < last:
            beside = run[-1] + 1
            if beside in refused or not (beside in self._urgent or beside in self._wanted):
                break
            run.append(beside)
        return run

    def _rows(self, run: list[int]) -> list[Row]:
        if self._through or not self._past.isdisjoint(run):
            return [Row("full") for _ in run]
        known, number = self._where(run[0])
        return self._cache.look_up(known.file, range(number, number + len(run)), claim=True)

    def _send(self, group: list[tuple[int, Row]]) -> None:
        if not self._lanes:  # the run fell into more groups than there are lanes: the rest will be asked for again
            self._cache.abandon([row for _, row in group if row.state == "claimed"])
            for block, _ in group:
                (self._urgent if block in self._awaited else self._wanted).setdefault(block)
            return
        known, number = self._where(group[0][0])
        begin = number * self._block_bytes
        end = min(begin + len(group) * self._block_bytes, known.num_bytes)
        lane = self._lanes.pop()
        self._flying.update(block for block, _ in group)
        self._counts["requests"] += 1
        future = self._store.fetch(known.key, begin, end, lane * self._lane_bytes)
        asked_by = self._num_reads if self._awaited else -1
        future.add_done_callback(lambda done: self._arrived(done, group, lane, end - begin, asked_by))

    def _arrived(
        self, future: Future[int], group: list[tuple[int, Row]], lane: int, num_bytes: int, asked_by: int
    ) -> None:
        """Called by the thread that receives answers. A failure is for the read that asked; another asks again."""
        failure: Exception | None = None
        filled: dict[int, Row] = {}
        try:
            future.result()
            self._counts["fetched_bytes"] += num_bytes
            data = self._store.memory[lane * self._lane_bytes :][:num_bytes]
            for i, (block, row) in enumerate(group):
                part = data[i * self._block_bytes : (i + 1) * self._block_bytes]
                filled[block] = self._kept(block, row, part)
        except Exception as error:  # given to the read that waits for it
            failure = error
            with suppress(OSError):
                self._cache.abandon([row for block, row in group if row.state == "claimed" and block not in filled])
        with self._changed:
            self._lanes.append(lane)
            for block, _ in group:
                self._flying.discard(block)
                row = filled.get(block, Row("absent"))
                if row.state == "ready":
                    self._slot[block], self._generation[block], self._checked[block] = row.slot, row.generation, True
                elif failure is not None and block in self._awaited and asked_by == self._num_reads:
                    self._failed[block] = failure
                elif block not in self._loose:
                    self._ahead.discard(block)
            self._pump()
            self._changed.notify_all()

    def _kept(self, block: int, row: Row, data: memoryview) -> Row:
        """Put a block into the cache, or beside it where the cache has no room or its disk no space."""
        known, number = self._where(block)
        if row.state == "claimed":
            try:
                return self._cache.fill(row, known.file, number, data)
            except OSError as error:
                if not self._through:
                    said = explain_os_error(error, self._cache.directory)
                    warnings.warn(f"the cache takes no more, reading goes on without it: {said}", stacklevel=2)
                self._through = True
        self._loose[block] = bytes(data)
        return Row("full")


def _adjacent(claimed: list[tuple[int, Row]]) -> list[list[tuple[int, Row]]]:
    """Blocks in order, in groups without a gap."""
    groups: list[list[tuple[int, Row]]] = []
    for block, row in claimed:
        if groups and groups[-1][-1][0] + 1 == block:
            groups[-1].append((block, row))
        else:
            groups.append([(block, row)])
    return groups
