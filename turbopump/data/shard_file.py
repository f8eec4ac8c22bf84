"""A shard to the disk: one pass over its bytes that takes the checksums of blocks, the digest of the file, and writes.

`write_parts` is compiled where a compiler is at hand (shard_file.cpp), else `reference`, which gives the same.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np

from turbopump.core.files import new_digest
from turbopump.data import native
from turbopump.data.gather import kernels

Part = tuple[np.ndarray, int]  # bytes, uint8 [any]; the bytes of a block of checksums, 0 for none
Write = Callable[[int, Sequence[Part]], tuple[str, np.ndarray]]


def write_parts(handle: int, parts: Sequence[Part]) -> tuple[str, np.ndarray]:
    """Append the parts to the open, empty file `handle`; the digest of all bytes (as of `digest_file`), and the
    checksums of the blocks of each part in turn, uint64. Raises `OSError`.

    Durable after an `fsync` only, whose work has begun.
    """
    return _writer()(handle, parts)


def reference(handle: int, parts: Sequence[Part]) -> tuple[str, np.ndarray]:
    """What shard_file.cpp is tested against, and what writes where it cannot be compiled."""
    whole = new_digest()
    sums = [np.empty(0, np.uint64)]
    for data, block_bytes in parts:
        if block_bytes:
            sums.append(kernels().sums(data, block_bytes))
        whole.update(data)
        while len(data):
            data = data[os.write(handle, data.data) :]
    return whole.hexdigest(), np.concatenate(sums)


@cache
def _writer() -> Write:
    library = native.load("shard_file")
    return reference if library is None else Compiled(library)


class Compiled:
    """shard_file.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._write = library.tp_write
        self._write.argtypes = (ctypes.c_int64, ctypes.c_int64, *(ctypes.c_void_p,) * 5)
        self._write.restype = ctypes.c_int64

    def __call__(self, handle: int, parts: Sequence[Part]) -> tuple[str, np.ndarray]:
        base = np.array([data.ctypes.data for data, _ in parts], np.uint64)
        sizes = np.array([len(data) for data, _ in parts], np.int64)
        blocks = np.array([block_bytes for _, block_bytes in parts], np.int64)
        sums = np.empty(sum(-(-len(data) // block) for data, block in parts if block), np.uint64)
        whole = np.empty(1, np.uint64)
        arrays = (array.ctypes.data for array in (base, sizes, blocks, sums, whole))
        error = self._write(handle, len(parts), *arrays)
        if error:
            raise OSError(error, os.strerror(error))
        return f"{int(whole[0]):016x}", sums
