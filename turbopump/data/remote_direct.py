"""Ranges of remote objects without a cache: every batch asks for its own records, neighbours in one request.

Right where records are read once in an order without locality: a cache of blocks would fetch a block for each record.
The protocol is that of `remote.py`; a batch that was prefetched is recognised by its ranges.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from concurrent.futures import Future
from functools import partial

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.core.files import digest
from turbopump.data.ranges import Arena, Array, Objects
from turbopump.data.stores import MEMORY_BYTES, Store

_BLOCK_BYTES = 1 << 20


class _Batch:
    """The ranges of one `read` on their way; `left` counts requests that are not answered."""

    def __init__(self) -> None:
        self.arena = Arena()
        self.at: Array = np.zeros(0, np.int64)
        self.num_bytes = 0
        self.left = 0
        self.failure: Exception | None = None


class DirectReader:
    """Reads ranges as they are asked for. `gap_bytes` between two of them are fetched rather than asking twice;
    `ahead_bytes` bounds what is fetched before it is read."""

    def __init__(
        self,
        store: Store,
        *,
        max_requests_in_flight: int = 32,
        request_bytes: int = 4 << 20,
        gap_bytes: int = 64 << 10,
        ahead_bytes: int = 256 << 20,
    ) -> None:
        self._store, self._request_bytes = store, request_bytes
        self._gap_bytes, self._ahead_bytes = gap_bytes, ahead_bytes
        self._num_lanes = min(max_requests_in_flight, MEMORY_BYTES // request_bytes)
        if self._num_lanes < 1:
            raise UsageError(f"request_bytes ({request_bytes}) must not be more than {MEMORY_BYTES}")
        self._objects = Objects(store, _BLOCK_BYTES)
        self._start()

    def _start(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._lanes = list(range(self._num_lanes))
        self._queue: deque[tuple[_Batch, int, int, int, list[tuple[int, int, int]]]] = deque()
        self._batches: dict[str, _Batch] = {}
        self._shown: _Batch | None = None
        self._counts = dict.fromkeys(("hits", "misses", "requests", "fetched_bytes", "wait_s"), 0.0)

    def _here(self) -> None:
        if self._pid != os.getpid():
            self._start()

    def open(self, key: str, num_bytes: int | None = None) -> int:
        """The handle of an object; its size is asked for unless it is given."""
        return self._objects.open(key, num_bytes)

    def prefetch(self, handles: Array, offsets: Array, lengths: Array) -> None:
        """Start to fetch a batch, unless `ahead_bytes` are waiting to be read."""
        self._here()
        name = _name(handles, offsets, lengths)
        with self._changed:
            waiting = sum(batch.num_bytes for batch in self._batches.values())
            if name not in self._batches and waiting + int(np.sum(lengths)) <= self._ahead_bytes:
                self._batches[name] = self._begin(handles, offsets, lengths, first=False)

    def read(self, handles: Array, offsets: Array, lengths: Array) -> Array:
        """Addresses of the ranges' bytes. Raises `RemoteError` for what the store does not give."""
        self._here()
        begin = time.perf_counter()
        with self._changed:
            batch = self._batches.pop(_name(handles, offsets, lengths), None)
            self._counts["hits" if batch is not None and not batch.left else "misses"] += len(handles)
            if batch is None or batch.failure is not None:
                batch = self._begin(handles, offsets, lengths, first=True)
            while batch.left and batch.failure is None:
                self._changed.wait(0.5)
            self._counts["wait_s"] += time.perf_counter() - begin
        if batch.failure is not None:
            raise batch.failure
        self._shown = batch  # its memory is valid until the next read
        return (batch.at + batch.arena.address).astype(np.uint64)

    def refetch(self, handles: Array, offsets: Array, lengths: Array) -> Array:
        """Read anew, because the content was wrong."""
        return self.read(handles, offsets, lengths)

    def forget(self) -> None:
        """What was prefetched will not be read."""
        self._here()
        with self._changed:
            self._batches.clear()
            self._queue.clear()

    def statistics(self) -> dict[str, float]:
        """Ranges that were there (hits) and waited for (misses), bytes, requests, retries, seconds a read waited."""
        retries = {name: float(self._store.statistics[name]) for name in ("retries", "throttled")}
        return {**self._counts, **retries}

    def close(self) -> None:
        """Stop fetching and end the store's helper."""
        if self._pid == os.getpid():
            self.forget()
            self._store.close()

    def _begin(self, handles: Array, offsets: Array, lengths: Array, *, first: bool) -> _Batch:
        handles, offsets, lengths = (np.asarray(x, np.int64) for x in (handles, offsets, lengths))
        self._objects.check(handles, offsets, lengths)
        batch = _Batch()
        batch.at = batch.arena.place(lengths)
        batch.num_bytes = int(lengths.sum())
        runs = [(batch, *run) for run in self._runs(handles, offsets, lengths, batch.at)]
        batch.left = len(runs)
        if first:
            self._queue.extendleft(reversed(runs))
        else:
            self._queue.extend(runs)
        self._pump()
        return batch

    def _runs(
        self, handles: Array, offsets: Array, lengths: Array, at: Array
    ) -> list[tuple[int, int, int, list[tuple[int, int, int]]]]:
        """Requests (handle, begin, end) with the parts (begin in the request, place in the arena, bytes) of each."""
        runs: list[tuple[int, int, int, list[tuple[int, int, int]]]] = []
        for i in np.lexsort((offsets, handles)).tolist():
            handle, begin, end, place = int(handles[i]), int(offsets[i]), int(offsets[i] + lengths[i]), int(at[i])
            while begin < end:
                stop = min(end, begin + self._request_bytes)
                if runs and runs[-1][0] == handle and begin - runs[-1][2] <= self._gap_bytes:
                    _, run_begin, run_end, parts = runs[-1]
                    stop = min(end, max(run_end, run_begin + self._request_bytes))
                    if begin < stop:
                        parts.append((begin - run_begin, place, stop - begin))
                        runs[-1] = (handle, run_begin, max(run_end, stop), parts)
                        begin, place = stop, place + stop - begin
                        continue
                    stop = min(end, begin + self._request_bytes)
                runs.append((handle, begin, stop, [(0, place, stop - begin)]))
                begin, place = stop, place + stop - begin
        return runs

    def _pump(self) -> None:
        while self._lanes and self._queue:
            batch, handle, begin, end, parts = self._queue.popleft()
            lane = self._lanes.pop()
            self._counts["requests"] += 1
            future = self._store.fetch(self._objects.opened[handle].key, begin, end, lane * self._request_bytes)
            future.add_done_callback(partial(self._arrived, batch, lane, end - begin, parts))

    def _arrived(
        self, batch: _Batch, lane: int, num_bytes: int, parts: list[tuple[int, int, int]], future: Future[int]
    ) -> None:
        """Called by the thread that receives answers."""
        try:
            future.result()
            data = self._store.memory[lane * self._request_bytes :][:num_bytes]
            for begin, place, length in parts:
                batch.arena.view[place : place + length] = data[begin : begin + length]
        except Exception as error:  # given to the read that waits for it
            batch.failure = error
        with self._changed:
            self._counts["fetched_bytes"] += num_bytes if batch.failure is None else 0
            batch.left -= 1
            self._lanes.append(lane)
            self._pump()
            self._changed.notify_all()


def _name(handles: Array, offsets: Array, lengths: Array) -> str:
    return digest(b"".join(np.ascontiguousarray(x, np.int64).tobytes() for x in (handles, offsets, lengths)))
