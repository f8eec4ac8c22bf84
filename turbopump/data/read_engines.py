"""The ways this machine offers to read a file, each as a route that `bench` times.

    pread                  system calls, through the page cache; `depth` threads
    pread O_DIRECT         the same past the page cache
    mmap                   copies out of a mapping; from depth 2 on, `depth` records by one `np.take`
    readahead + preadv     POSIX_FADV_WILLNEED `depth` reads ahead, then system calls from one thread
    io_uring (O_DIRECT)    `depth` reads in flight from one thread, no system call for each

All advise the kernel of the order, since its own guess ruins random reads (measured on a disk with 8 MiB read-ahead:
12 KiB records at 1 % of what the device gives). Buffers are made before and used again, and start on a page. What a
file system or a container refuses is an `OSError`, and becomes a row that says so.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from turbopump.data.io_uring import Ring
from turbopump.data.scratch import PAGE_BYTES, ScratchFile

SECTOR_BYTES = 512
Offsets = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Reads:
    """What an engine is to do: reads of `num_bytes`, `depth` at once, in file order or not, timed one by one or not."""

    num_bytes: int
    depth: int
    sequential: bool
    latencies: bool = False


class Engine(ABC):
    """Reads a file in one way. Raises `OSError` for a read that the system refuses or cuts short."""

    def __init__(self, file: ScratchFile, reads: Reads, *, direct: bool = False) -> None:
        self.reads = reads
        self.latencies_s: list[float] = []
        self.read_bytes, self.sector = reads.num_bytes, 1
        if direct:
            self.sector = SECTOR_BYTES
            if reads.num_bytes % SECTOR_BYTES:  # whole sectors around the record
                self.read_bytes = -(-(reads.num_bytes + SECTOR_BYTES - 1) // SECTOR_BYTES) * SECTOR_BYTES
        self.slots = page_aligned(reads.depth, self.read_bytes)
        self.handle = file.open_again(os.O_RDONLY | (os.O_DIRECT if direct else 0))
        try:
            advice = os.POSIX_FADV_SEQUENTIAL if reads.sequential else os.POSIX_FADV_RANDOM
            os.posix_fadvise(self.handle, 0, 0, advice)
            self.start(file)
        except BaseException:
            os.close(self.handle)
            raise

    def start(self, file: ScratchFile) -> None:  # noqa: B027 - most need nothing
        """What an engine prepares once."""

    @abstractmethod
    def read(self, offsets: Offsets) -> None:
        """Read at each of `offsets` (bytes, multiples of `reads.num_bytes`) into `slots`."""

    def forget(self) -> None:  # noqa: B027
        """Let go of pages of the file, so that they can be dropped."""

    def close(self) -> None:
        os.close(self.handle)


def page_aligned(rows: int, num_bytes: int) -> np.ndarray[Any, Any]:
    """`[rows, num_bytes]` of uint8 that starts on a page; all of it touched."""
    memory = mmap.mmap(-1, -(-rows * num_bytes // PAGE_BYTES) * PAGE_BYTES)
    array = np.frombuffer(memory, np.uint8, rows * num_bytes).reshape(rows, num_bytes)
    array[:] = 1
    return array


class Pread(Engine):
    """One thread at depth 1, else `depth` of them that take the next offset each."""

    def start(self, file: ScratchFile) -> None:
        self._pool = ThreadPoolExecutor(self.reads.depth) if self.reads.depth > 1 else None

    def read(self, offsets: Offsets) -> None:
        if self.sector > 1:
            offsets = offsets // self.sector * self.sector
        shared = iter(offsets.tolist())  # `next` of a list's iterator is atomic
        work: Callable[..., None] = self._timed if self.reads.latencies else self._plain
        if self._pool is None:
            work(shared, self.slots[0])
            return
        for future in [self._pool.submit(work, shared, slot) for slot in self.slots]:
            future.result()

    def _plain(self, offsets: Iterator[int], slot: np.ndarray[Any, Any]) -> None:
        handle, buffers, size, preadv = self.handle, [slot.data], self.read_bytes, os.preadv
        for offset in offsets:
            if preadv(handle, buffers, offset) != size:
                raise _short(size)

    def _timed(self, offsets: Iterator[int], slot: np.ndarray[Any, Any]) -> None:
        handle, buffers, size, clock = self.handle, [slot.data], self.read_bytes, time.perf_counter
        for offset in offsets:
            begin = clock()
            if os.preadv(handle, buffers, offset) != size:
                raise _short(size)
            self.latencies_s.append(clock() - begin)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
        super().close()


class Readahead(Engine):
    """The kernel is told of each read `depth` reads before it comes."""

    def read(self, offsets: Offsets) -> None:
        handle, buffers, size, ahead = self.handle, [self.slots[0].data], self.read_bytes, self.reads.depth
        told = [*offsets.tolist(), *[None] * ahead]
        for offset in told[:ahead]:
            if offset is not None:
                os.posix_fadvise(handle, offset, size, os.POSIX_FADV_WILLNEED)
        for offset, later in zip(told, told[ahead:]):
            if os.preadv(handle, buffers, offset or 0) != size:
                raise _short(size)
            if later is not None:
                os.posix_fadvise(handle, later, size, os.POSIX_FADV_WILLNEED)


class Mapped(Engine):
    """Pages are read by the faults of the copy."""

    def start(self, file: ScratchFile) -> None:
        self._mapped = mmap.mmap(self.handle, file.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)
        self._mapped.madvise(mmap.MADV_SEQUENTIAL if self.reads.sequential else mmap.MADV_RANDOM)
        whole = file.num_bytes // self.read_bytes
        flat = np.frombuffer(self._mapped, np.uint8, whole * self.read_bytes)
        self._records = flat.reshape(whole, self.read_bytes)

    def read(self, offsets: Offsets) -> None:
        ids, slots, depth = offsets // self.read_bytes, self.slots, self.reads.depth
        if depth == 1:
            records, slot = self._records, slots[0]
            for i in ids.tolist():
                slot[:] = records[i]
            return
        for begin in range(0, len(ids), depth):
            batch = ids[begin : begin + depth]
            np.take(self._records, batch, axis=0, out=slots[: len(batch)], mode="clip")  # `raise` copies twice

    def forget(self) -> None:
        self._mapped.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        del self._records  # a mapping with views on it cannot be closed
        with suppress(BufferError):  # after Ctrl-C the traceback holds one: it goes with that
            self._mapped.close()
        super().close()


class Uring(Engine):
    """One ring, one thread."""

    def start(self, file: ScratchFile) -> None:
        self._ring = Ring(self.reads.depth)

    def read(self, offsets: Offsets) -> None:
        self._ring.read(self.handle, offsets // self.sector * self.sector, self.slots)

    def close(self) -> None:
        self._ring.close()
        super().close()


def _short(num_bytes: int) -> OSError:
    return OSError(errno.EIO, f"a read of {num_bytes} bytes was cut short")


ROUTES: dict[str, Callable[[ScratchFile, Reads], Engine]] = {
    "pread": Pread,
    "pread O_DIRECT": partial(Pread, direct=True),
    "mmap": Mapped,
    "readahead + preadv": Readahead,
    "io_uring": Uring,
    "io_uring O_DIRECT": partial(Uring, direct=True),
}


def threads_of(route: str, depth: int) -> int:
    """Threads that a route reads with."""
    return depth if route.startswith("pread") else 1
