"""What readers of byte ranges share: the protocol, the objects they opened, and memory for a batch's ranges."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.core.files import digest
from turbopump.data.stores import Store, check_key

Array = np.ndarray[Any, Any]
_ALIGN = 64


class RangeReader(Protocol):
    """What both readers are; handles int32 [n], offsets and lengths int64 [n] in bytes, addresses uint64 [n]."""

    def open(self, key: str, num_bytes: int | None = None) -> int: ...
    def read(self, handles: Array, offsets: Array, lengths: Array) -> Array: ...
    def refetch(self, handles: Array, offsets: Array, lengths: Array) -> Array: ...
    def prefetch(self, handles: Array, offsets: Array, lengths: Array) -> None: ...
    def forget(self) -> None: ...
    def statistics(self) -> dict[str, float]: ...
    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Object:
    key: str
    num_bytes: int
    file: int  # its number in the cache
    first: int  # its first block among all blocks of the reader


class Objects:
    """The objects that were opened, and their arrays for checking whole batches of ranges."""

    def __init__(self, store: Store, block_bytes: int) -> None:
        self._store, self.block_bytes = store, block_bytes
        self.opened: list[Object] = []
        self.num_blocks = 0
        self._by_key: dict[str, int] = {}
        self._files: set[int] = set()
        self._arrays = np.zeros((2, 0), np.int64)

    @property
    def first(self) -> Array:
        """The first block of each object, int64 [objects]."""
        return self._as_arrays()[0]

    def _as_arrays(self) -> Array:
        if self._arrays.shape[1] != len(self.opened):  # made when needed: 10,000 objects are opened one by one
            self._arrays = np.array([[x.first for x in self.opened], [x.num_bytes for x in self.opened]], np.int64)
        return self._arrays

    def open(self, key: str, num_bytes: int | None) -> int:
        check_key(self._store.url, key)
        if key not in self._by_key:
            size = self._store.size(key) if num_bytes is None else num_bytes
            file = int(digest(key.encode()), 16)
            if file in self._files:
                raise DatasetError(f"{self._store.url}: {key} has the XXH3 of another key: rename it")
            self._files.add(file)
            self._by_key[key] = len(self.opened)
            self.opened.append(Object(key, size, file, self.num_blocks))
            self.num_blocks += -(-size // self.block_bytes)
        return self._by_key[key]

    def check(self, handles: Array, offsets: Array, lengths: Array) -> None:
        """Raises `DatasetError` for a range that is not within its object."""
        wrong = (handles < 0) | (handles >= len(self.opened))
        ends = offsets + lengths
        sizes = np.append(self._as_arrays()[1], 0)[np.where(wrong, -1, handles)]
        wrong |= (offsets < 0) | (lengths < 0) | (ends > sizes)
        if wrong.any():
            i = int(np.flatnonzero(wrong)[0])
            known = 0 <= handles[i] < len(self.opened)
            name = self.opened[int(handles[i])].key if known else f"handle {handles[i]}"
            raise DatasetError(
                f"{self._store.url}/{name}: bytes {offsets[i]}..{ends[i]} are not within its {sizes[i]} bytes"
            )


class Arena:
    """Memory that starts on a page and grows to what the largest batch needed."""

    def __init__(self) -> None:
        self._mapped, self.view, self.address = None, memoryview(b""), 0

    def place(self, lengths: Array) -> Array:
        """Where ranges of these lengths go; the memory before is lost."""
        at = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(-(-lengths // _ALIGN) * _ALIGN, out=at[1:])
        if len(self.view) < at[-1]:
            self.view = memoryview(mmap.mmap(-1, int(at[-1]) * 5 // 4 + mmap.PAGESIZE))
            self.address = np.frombuffer(self.view, np.uint8).ctypes.data
        return at[:-1]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Ranges cut where blocks end; arrays of one element a piece. `at` is where it lies in its range, `begin` where in
    its block."""

    range: Array
    block: Array
    begin: Array
    length: Array
    at: Array


def cut(first_block: Array, offsets: Array, lengths: Array, block_bytes: int) -> Pieces:
    """The pieces of ranges in objects whose blocks count from `first_block`."""
    first, last = offsets // block_bytes, (offsets + lengths - 1) // block_bytes
    count = np.where(lengths > 0, last - first + 1, 0)
    of_range = np.repeat(np.arange(len(offsets)), count)
    number = first[of_range] + np.arange(len(of_range)) - np.repeat(np.cumsum(count) - count, count)
    low = np.maximum(offsets[of_range], number * block_bytes)
    high = np.minimum((offsets + lengths)[of_range], (number + 1) * block_bytes)
    begin = low - number * block_bytes
    return Pieces(of_range, first_block[of_range] + number, begin, high - low, low - offsets[of_range])
