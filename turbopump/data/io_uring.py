"""Reads through Linux's io_uring, without a library: many reads in flight from one thread, no system call for each.

Two rings are shared with the kernel: submissions (what to read, where to) and completions (its result). The reader
fills as many submissions as slots are free, enters the kernel once, and collects what has ended. All of it is done in
NumPy for the whole batch at a time, so that Python costs about 0.5 us a read at depth 64.
Layouts and numbers are those of `include/uapi/linux/io_uring.h`; `IORING_OP_READ` needs Linux 5.6. Containers often
forbid the call: `Ring()` then raises `OSError`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from types import TracebackType
from typing import Any

import numpy as np

_SETUP, _ENTER = 425, 426  # the same on all architectures of Linux but alpha
_OFFSET_SQ, _OFFSET_CQ, _OFFSET_SQES = 0, 0x8000000, 0x10000000
_GETEVENTS = 1
_OP_READ = 22
_SQE = np.dtype(
    {"names": ["opcode", "fd", "offset", "address", "length", "user_data"],
     "formats": ["u1", "i4", "u8", "u8", "u4", "u8"], "offsets": [0, 4, 8, 16, 24, 32], "itemsize": 64}
)  # fmt: skip
_CQE = np.dtype([("user_data", "u8"), ("result", "i4"), ("flags", "u4")])
_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(*arguments: int) -> int:
    result: int = _libc.syscall(*(ctypes.c_long(a) for a in arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


class Ring:
    """A ring with room for `depth` reads at once. Use as a context manager; raises `OSError` where it is forbidden."""

    def __init__(self, depth: int) -> None:
        self.depth = depth
        params = np.zeros(30, np.uint32)  # struct io_uring_params
        self._handle = _syscall(_SETUP, depth, params.ctypes.data)
        self._maps: list[mmap.mmap] = []
        try:
            sq_entries, cq_entries = int(params[0]), int(params[1])
            sq_head, sq_tail, sq_mask, _, _, _, sq_array = (int(x) for x in params[10:17])
            cq_head, cq_tail, cq_mask, _, _, cqes = (int(x) for x in params[20:26])
            sq = self._map(sq_array + 4 * sq_entries, _OFFSET_SQ)
            cq = self._map(cqes + _CQE.itemsize * cq_entries, _OFFSET_CQ)
            self._sqes = np.frombuffer(self._map(_SQE.itemsize * sq_entries, _OFFSET_SQES), _SQE, sq_entries)
        except BaseException:
            self.close()
            raise
        self._sq_head, self._sq_tail = (np.frombuffer(sq, np.uint32, 1, at) for at in (sq_head, sq_tail))
        self._cq_head, self._cq_tail = (np.frombuffer(cq, np.uint32, 1, at) for at in (cq_head, cq_tail))
        self._sq_mask = int(np.frombuffer(sq, np.uint32, 1, sq_mask)[0])
        self._cq_mask = int(np.frombuffer(cq, np.uint32, 1, cq_mask)[0])
        self._cqes = np.frombuffer(cq, _CQE, cq_entries, cqes)
        np.frombuffer(sq, np.uint32, sq_entries, sq_array)[:] = np.arange(sq_entries)  # entry i is submission i

    def _map(self, num_bytes: int, offset: int) -> mmap.mmap:
        mapped = mmap.mmap(self._handle, num_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, offset=offset)
        self._maps.append(mapped)
        return mapped

    def read(self, handle: int, offsets: np.ndarray[Any, Any], slots: np.ndarray[Any, Any]) -> None:
        """Read at each of `offsets` (int64, bytes) of the file `handle` as many bytes as a row of `slots` has.

        `slots` is uint8 `[depth, bytes]`, contiguous. The first `depth` reads go to rows 0, 1, ...; each later one to
        a row that became free. Raises `OSError` for a read that fails or ends short, with none left in flight.
        """
        num_bytes = slots.shape[1]
        self._sqes["opcode"], self._sqes["fd"], self._sqes["length"] = _OP_READ, handle, num_bytes
        free = np.arange(min(self.depth, len(slots)), dtype=np.uint64)
        base, issued, ended = np.uint64(slots.ctypes.data), 0, 0
        try:
            while ended < len(offsets):
                count = min(len(free), len(offsets) - issued)
                if count:
                    self._prepare(offsets[issued : issued + count], free[:count], base, num_bytes)
                    free, issued = free[count:], issued + count
                # a quarter at a time: the device stays busy while the next ones are prepared
                done = self._collect(wait=min(issued - ended, max(1, self.depth // 4)))
                ended += len(done)
                _check(done["result"], num_bytes)
                free = np.concatenate([free, done["user_data"]])
        finally:
            while ended < issued:  # the kernel writes into `slots` until they have ended
                ended += len(self._collect(wait=issued - ended))

    def _prepare(self, offsets: Any, rows: Any, base: np.uint64, num_bytes: int) -> None:
        tail = int(self._sq_tail[0])
        at = (tail + np.arange(len(rows))) & self._sq_mask
        self._sqes["offset"][at] = offsets
        self._sqes["address"][at] = base + rows * np.uint64(num_bytes)
        self._sqes["user_data"][at] = rows
        self._sq_tail[0] = (tail + len(rows)) & 0xFFFFFFFF

    def _collect(self, wait: int) -> np.ndarray[Any, Any]:
        """Submit what is prepared, wait for at least `wait` ends (fewer after a signal), return a copy of them."""
        waiting = (int(self._sq_tail[0]) - int(self._sq_head[0])) & 0xFFFFFFFF
        try:
            _syscall(_ENTER, self._handle, waiting, wait, _GETEVENTS, 0, 0)
        except OSError as error:
            if error.errno not in (errno.EINTR, errno.EAGAIN, errno.EBUSY):
                raise
        head, tail = int(self._cq_head[0]), int(self._cq_tail[0])
        at = (head + np.arange((tail - head) & 0xFFFFFFFF)) & self._cq_mask
        done = self._cqes[at]
        self._cq_head[0] = tail
        return done

    def close(self) -> None:
        """Give the ring back; its memory goes with the last array on it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
        self._maps.clear()

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _check(results: np.ndarray[Any, Any], num_bytes: int) -> None:
    worst = int(results.min()) if len(results) else num_bytes
    if worst < 0:
        raise OSError(-worst, os.strerror(-worst))
    if worst < num_bytes:
        raise OSError(errno.EIO, f"a read of {num_bytes} bytes ended after {worst}")
