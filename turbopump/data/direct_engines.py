"""The engines behind `DirectReader`: `direct.cpp`, and the reference in Python that tests compare it with.

An engine reads batches of ranges in the order they were submitted, all in the background, and hands out the oldest.
Files are known to it by number, with their descriptor and with the bytes of which reads must be multiples: 4096 past
the page cache, 1 through it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np

from turbopump.core.errors import DatasetError

PAGE_BYTES = 4096
_WAIT_MS = 200  # how long Ctrl-C may wait


class Ranges(NamedTuple):
    """Which bytes of which files: int32, int64, int64 [n]."""

    handles: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    def same(self, other: Ranges) -> bool:
        return all(np.array_equal(mine, yours) for mine, yours in zip(self, other))


class ReadFailure(Exception):
    """Range number `range` failed with `error`, or its file ended (0), after what lies before `reached`."""

    def __init__(self, error: int, range_number: int, reached: int) -> None:
        super().__init__(error, range_number, reached)
        self.error, self.range, self.reached = error, range_number, reached


class Engine(Protocol):
    """What reads batches, in the order they were submitted."""

    def set_file(self, handle: int, descriptor: int, sector: int) -> None: ...
    def submit(self, ranges: Ranges) -> None: ...
    def collect(self) -> np.ndarray: ...  # of the oldest batch; valid until the next; raises `ReadFailure`
    def cancel(self) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class NativeEngine:
    """`direct.cpp`. Raises `OSError` where the engine is refused."""

    def __init__(self, library: ctypes.CDLL, name: str, depth: int) -> None:
        self._library, error = library, ctypes.c_int()
        library.direct_start.restype = ctypes.c_void_p
        address = library.direct_start(int(name == "io_uring"), depth, ctypes.byref(error))
        if not address:
            raise OSError(error.value, os.strerror(error.value))
        self._reader = ctypes.c_void_p(address)
        self._counts: deque[int] = deque()

    def set_file(self, handle: int, descriptor: int, sector: int) -> None:
        self._library.direct_set_file(self._reader, handle, descriptor, ctypes.c_int64(sector))

    def submit(self, ranges: Ranges) -> None:
        pointers = [ctypes.c_void_p(part.ctypes.data) for part in ranges]
        error = self._library.direct_submit(self._reader, ctypes.c_int64(len(ranges.handles)), *pointers)
        if error:
            raise _not_submitted(error, ranges)
        self._counts.append(len(ranges.handles))

    def collect(self) -> np.ndarray:
        addresses, failure = np.empty(self._counts[0], np.uint64), (ctypes.c_int64 * 3)()
        to = ctypes.c_void_p(addresses.ctypes.data)
        while (outcome := self._library.direct_collect(self._reader, _WAIT_MS, to, failure)) == 1:
            pass  # signals are handled here
        self._counts.popleft()
        if outcome:
            raise ReadFailure(max(failure[0], 0), failure[1], failure[2])
        return addresses

    def cancel(self) -> None:
        self._counts.clear()
        self._library.direct_cancel(self._reader)

    def close(self) -> None:
        self._library.direct_stop(self._reader)

    def abandon(self) -> None:
        self._library.direct_abandon(self._reader)


def _not_submitted(error: int, ranges: Ranges) -> DatasetError:
    if error == errno.ENOMEM:
        num_bytes = int(ranges.lengths.sum(dtype=np.float64))
        return DatasetError(f"no memory for a batch of {num_bytes} bytes: read fewer or shorter ranges at once")
    return DatasetError(f"reading has broken down: {os.strerror(error)}")


class PythonPool:
    """The reference: each range on its own, widened to sectors, by threads with preadv."""

    def __init__(self, depth: int) -> None:
        self._pool = ThreadPoolExecutor(depth, "direct-read")
        self._files: dict[int, tuple[int, int]] = {}
        self._batches: deque[tuple[Any, np.ndarray, list[Future[None]]]] = deque()
        self._current: Any = None

    def set_file(self, handle: int, descriptor: int, sector: int) -> None:
        self._files[handle] = descriptor, sector

    def submit(self, ranges: Ranges) -> None:
        sectors = np.array([self._files[handle][1] for handle in ranges.handles.tolist()], np.int64)
        begins = ranges.offsets // sectors * sectors
        sizes = -(-(ranges.offsets + ranges.lengths - begins) // sectors) * sectors
        phases = begins % PAGE_BYTES
        spaces = -(-(phases + sizes) // PAGE_BYTES) * PAGE_BYTES
        places = np.cumsum(spaces) - spaces + phases
        try:
            memory = np.frombuffer(mmap.mmap(-1, max(int(spaces.sum()), 1)), np.uint8)
        except (OSError, OverflowError, ValueError):
            raise _not_submitted(errno.ENOMEM, ranges) from None
        needed = ranges.offsets + ranges.lengths - begins
        columns = zip(*(column.tolist() for column in (ranges.handles, begins, needed, places, sizes)))
        futures = [
            self._pool.submit(self._read, number, handle, begin, needed, memory[place : place + size])
            for number, (handle, begin, needed, place, size) in enumerate(columns)
        ]
        addresses = (places + ranges.offsets - begins).astype(np.uint64) + np.uint64(memory.ctypes.data)
        self._batches.append((memory, addresses, futures))

    def _read(self, number: int, handle: int, begin: int, needed: int, into: np.ndarray) -> None:
        (descriptor, sector), done = self._files[handle], 0
        while done < needed:
            try:
                count = os.preadv(descriptor, [into[done:].data], begin + done)
            except OSError as error:
                raise ReadFailure(error.errno or errno.EIO, number, begin + done) from None
            done += count
            # a direct read that ends within a sector has met the end of the file, and could not go on from there
            if done < needed and (count == 0 or done % sector):
                raise ReadFailure(0, number, begin + done)

    def collect(self) -> np.ndarray:
        memory, addresses, futures = self._batches[0]
        for future in futures:
            future.exception()  # all have ended before anything is reported
        self._batches.popleft()
        self._current = memory
        for future in futures:
            future.result()
        return addresses

    def cancel(self) -> None:
        for _, _, futures in self._batches:
            for future in futures:
                future.cancel()
        self._batches.clear()  # a read under way keeps its memory

    def close(self) -> None:
        self.cancel()
        self._pool.shutdown(wait=True)

    def abandon(self) -> None:
        self._batches.clear()
