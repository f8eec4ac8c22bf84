"""The bytes of a shard's buffers while it is gathered: pieces of memory that are used again for the next shards.

Rows are copied once, to where they are hashed and written from. The pages of a piece are faulted in once for a whole
part, in huge ones where the kernel has them: for fresh memory that takes several times as long as the copying itself.
A piece holds whole blocks of checksums, so that the sums of a buffer are those of its pieces, one after the other.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import suppress

import numpy as np

PIECE_BYTES = 1 << 22


class Pool:
    """Pieces of `piece_bytes` that wait for their next use; one thread may take them while another gives some back."""

    def __init__(self, piece_bytes: int) -> None:
        self.piece_bytes = piece_bytes
        self._free: list[np.ndarray] = []

    def take(self) -> np.ndarray:
        with suppress(IndexError):
            return self._free.pop()
        memory = mmap.mmap(-1, self.piece_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared has small pages
        if hasattr(mmap, "MADV_HUGEPAGE") and self.piece_bytes >= PIECE_BYTES:
            with suppress(OSError):  # a kernel without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, np.uint8)

    def give(self, pieces: list[np.ndarray]) -> None:
        self._free += pieces


class Pieces:
    """One buffer: `append` copies bytes to its end."""

    def __init__(self, pool: Pool) -> None:
        self.size = 0
        self._pool = pool
        self._pieces: list[np.ndarray] = []

    def append(self, data: np.ndarray) -> None:
        """Add the bytes of a C-contiguous array."""
        rest = data.reshape(-1).view(np.uint8)
        while len(rest):
            at = self.size % self._pool.piece_bytes
            if at == 0:
                self._pieces.append(self._pool.take())
            part = rest[: self._pool.piece_bytes - at]
            self._pieces[-1][at : at + len(part)] = part
            self.size += len(part)
            rest = rest[len(part) :]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The bytes in order, uint8 [at most `piece_bytes`]."""
        left = self.size
        for piece in self._pieces:
            yield piece[:left]
            left -= len(piece)

    def free(self) -> None:
        """Give the memory back; nothing of it may be in use."""
        self._pool.give(self._pieces)
        self._pieces, self.size = [], 0


def pool_for(shard_bytes: int, block_bytes: int, num_buffers: int) -> Pool:
    """Pieces of whole blocks, so small that those of all buffers that hold little are no more than a shard."""
    size = min(PIECE_BYTES, shard_bytes // num_buffers)
    return Pool(max(1, size // block_bytes) * block_bytes)
