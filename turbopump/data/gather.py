"""Batches of records out of memory, checked when first read: the compiled gather.cpp, and its reference in NumPy.

`Store` is one buffer (a field's values, or its offsets) of all shards of a split: where each lies in memory, its block
checksums, which blocks were found good. `kernels()` is what works on stores: compiled where a compiler is at hand, else
the reference. Both have the same methods, which return a `Result`; who calls them maps what is not mapped yet, and
turns the rest into errors that name file and record.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.core.files import digest
from turbopump.data import native

AS_STORED, FROM_UNSIGNED, FROM_SIGNED = range(3)  # whether numbers are made int64, and of what
OK, UNMAPPED, OUT_OF_RANGE, MISMATCH, CUT_SHORT, TOO_SMALL, BAD_OFFSETS = range(7)
Array = np.ndarray


class Result(ctypes.Structure):
    """What became of a batch: `status`, and the place in the batch, shard and block it speaks of."""

    _fields_ = [(name, ctypes.c_int64) for name in ("status", "place", "shard", "block")]


class _Store(ctypes.Structure):
    _fields_ = [
        ("shards", ctypes.c_int64), ("block_bytes", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("bounds", "base", "bytes", "sums")),
        *((name, ctypes.c_void_p) for name in ("known", "unknown", "unsure", "hints")),
    ]  # fmt: skip


class Store:
    """One buffer of all shards. `bounds` int64 [shards + 1] are rows, `sizes` int64 [shards] the buffer's bytes."""

    def __init__(self, bounds: Array, sizes: Array, block_bytes: int) -> None:
        shards = len(sizes)
        self.bounds, self.sizes, self.block_bytes = bounds, sizes, block_bytes
        self.blocks = -(-sizes // block_bytes)
        self.memory: list[Array | None] = [None] * shards
        self.sums: list[Array | None] = [None] * shards
        self.known: list[Array | None] = [None] * shards
        self.base, self._sums, self._known = (np.zeros(shards, np.uint64) for _ in range(3))
        self.unknown, self.hints = self.blocks.copy(), np.zeros(shards, np.uint8)
        self.unsure = np.array([np.count_nonzero(self.unknown)])
        arrays = (bounds, self.base, sizes, self._sums, self._known, self.unknown, self.unsure, self.hints)
        self._struct = _Store(shards, block_bytes, *map(address, arrays))
        self.pointer = ctypes.addressof(self._struct)
        self._quick: list[Any] = []

    def quick(self, row_bytes: int, values: Store | None = None) -> int:
        """Address of gather.cpp's `Quick`."""
        made = (ctypes.c_int64 * 3)(self.pointer, row_bytes, values.pointer if values is not None else 0)
        self._quick.append(made)  # kept alive
        return ctypes.addressof(made)

    def add_sums(self, shard: int, sums: Array) -> None:
        """The checksums of a shard's blocks, uint64; none of them checked yet."""
        known = np.zeros(-(-len(sums) // 64), np.uint64)
        self.sums[shard], self.known[shard] = sums, known
        self._sums[shard], self._known[shard] = address(sums), address(known)

    def add_memory(self, shard: int, memory: Array, cold: bool) -> None:
        """Where the buffer lies, uint8 [bytes]; `cold`: its pages may have to be read first. After `add_sums`."""
        self.memory[shard] = memory
        self.hints[shard] = cold
        self.base[shard] = address(memory) if len(memory) else 64  # last: from here on it is in use

    def remove_memory(self, shard: int) -> None:
        """The opposite; nobody may be reading."""
        self.base[shard], self.memory[shard] = 0, None


def require_room(given_bytes: int, needed_bytes: int) -> None:
    """Compiled code writes where it is told to; raises `UsageError` where that would be past the end."""
    if given_bytes < needed_bytes:
        raise UsageError(
            f"the memory given has {given_bytes} bytes, this batch needs {needed_bytes}: ask for fewer rows"
        )


def address(array: Array) -> int:
    pointer: int = array.__array_interface__["data"][0]
    return pointer


class Kernels(Protocol):
    """What works on stores. Rows and windows go to `out`, contiguous; see gather.cpp for each."""

    def rows(self, store: Store, index: Array, row_bytes: int, ask: bool, out: Array, result: Result) -> None: ...

    def windows(
        self, store: Store, start: Array, items: int, item_bytes: int, wide: int, ask: bool, out: Array, result: Result
    ) -> None: ...

    def ragged(
        self, offsets: Store, values: Store, index: Array, item_bytes: int, ask: bool, out_offsets: Array, out: Array,
        result: Result,
    ) -> None: ...  # fmt: skip

    def fetched(
        self, store: Store, ranges: Fetched, item_bytes: int, wide: int, out: Array, result: Result
    ) -> None: ...

    def check(self, store: Store, shard: int, first: int, last: int, result: Result) -> None: ...

    def sums(self, data: Array, block_bytes: int) -> Array: ...

    def quick_rows(self, store: Store, row_bytes: int) -> Callable[[Array, Array], int]:
        """`read(index, out)`: `rows` with the least to do around it; not 0 where `rows` has something to tell."""
        ...

    def quick_windows(self, store: Store, item_bytes: int) -> Callable[[int, int, Array, Array], int]:
        """`read(items, wide, start, out)`, in the same way."""
        ...

    def quick_ragged(self, offsets: Store, values: Store, item_bytes: int) -> Callable[[Array, Array, Array], int]:
        """`read(index, out_offsets, out)`, in the same way."""
        ...


@dataclass(frozen=True)
class Fetched:
    """Ranges that a reader has put at addresses `at`: whole blocks of a shard from block `first` on, of which the bytes
    [skip, skip + take) go to byte `to` of the output. All int64 [n] but `at`, uint64."""

    at: Array
    shard: Array
    first: Array
    bytes: Array
    skip: Array
    take: Array
    to: Array


class Compiled:
    """gather.cpp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        library.tp_start()
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        result = ctypes.POINTER(Result)
        for name, types in {
            "tp_ragged": (pointer, pointer, number, pointer, number, number, pointer, pointer, number, result),
            "tp_fetched": (pointer, number, *(pointer,) * 7, number, number, pointer, result),
            "tp_check": (pointer, number, number, number, result),
            "tp_sums": (pointer, number, number, pointer),
        }.items():
            getattr(library, name).argtypes = types
            getattr(library, name).restype = None
        python, array = ctypes.PyDLL(library._name), ctypes.py_object  # the same library, called with Python's lock
        self._rows, self._windows = python.tp_rows, python.tp_windows
        self._quick = python.tp_quick
        self._quick.argtypes, self._quick.restype = (number, pointer), array
        self._rows.argtypes = (pointer, number, number, result, array, array)
        self._windows.argtypes = (pointer, number, number, result, number, number, array, array)
        self._rows.restype = self._windows.restype = number

    def rows(self, store: Store, index: Array, row_bytes: int, ask: bool, out: Array, result: Result) -> None:
        if self._rows(store.pointer, row_bytes, ask, result, index, out):
            require_room(out.nbytes, len(index) * row_bytes)

    def quick_rows(self, store: Store, row_bytes: int) -> Callable[[Array, Array], int]:
        return self._quick(0, store.quick(row_bytes))

    def quick_windows(self, store: Store, item_bytes: int) -> Callable[[int, int, Array, Array], int]:
        return self._quick(1, store.quick(item_bytes))

    def quick_ragged(self, offsets: Store, values: Store, item_bytes: int) -> Callable[[Array, Array, Array], int]:
        return self._quick(2, offsets.quick(item_bytes, values))

    def windows(
        self, store: Store, start: Array, items: int, item_bytes: int, wide: int, ask: bool, out: Array, result: Result
    ) -> None:
        if self._windows(store.pointer, item_bytes, ask, result, items, wide, start, out):
            require_room(out.nbytes, len(start) * items * (8 if wide else item_bytes))

    def ragged(
        self, offsets: Store, values: Store, index: Array, item_bytes: int, ask: bool, out_offsets: Array, out: Array,
        result: Result,
    ) -> None:  # fmt: skip
        self._library.tp_ragged(
            offsets.pointer, values.pointer, len(index), address(index), item_bytes, ask, address(out_offsets),
            address(out), out.nbytes // item_bytes, result,
        )  # fmt: skip

    def fetched(self, store: Store, ranges: Fetched, item_bytes: int, wide: int, out: Array, result: Result) -> None:
        r = ranges
        self._library.tp_fetched(
            store.pointer, len(r.at), *map(address, (r.at, r.shard, r.first, r.bytes, r.skip, r.take, r.to)),
            item_bytes, wide, address(out), result,
        )  # fmt: skip

    def check(self, store: Store, shard: int, first: int, last: int, result: Result) -> None:
        self._library.tp_check(store.pointer, shard, first, last, result)

    def sums(self, data: Array, block_bytes: int) -> Array:
        out = np.empty(-(-len(data) // block_bytes), np.uint64)
        self._library.tp_sums(address(data), len(data), block_bytes, address(out))
        return out


class Reference:
    """The same in NumPy: what gather.cpp is tested against, and what reads where it cannot be compiled."""

    def rows(self, store: Store, index: Array, row_bytes: int, ask: bool, out: Array, result: Result) -> None:
        require_room(out.nbytes, len(index) * row_bytes)
        spans = _find(store, index, 1, result)
        if spans is None:
            return
        flat = _flat(out)
        for place, (shard, row) in enumerate(spans):
            begin = row * row_bytes
            if not _take(store, place, shard, begin, begin + row_bytes, flat[place * row_bytes :], result):
                return

    def windows(
        self, store: Store, start: Array, items: int, item_bytes: int, wide: int, ask: bool, out: Array, result: Result
    ) -> None:
        require_room(out.nbytes, len(start) * items * (8 if wide else item_bytes))
        spans = _find(store, start, items, result)
        if spans is None:
            return
        raw = np.empty((len(start), items * item_bytes), np.uint8)
        for place, (shard, row) in enumerate(spans):
            done = 0
            while done < items:
                count = min(items - done, int(store.bounds[shard + 1] - store.bounds[shard]) - row)
                to = raw[place, done * item_bytes :]
                if not _take(store, place, shard, row * item_bytes, (row + count) * item_bytes, to, result):
                    return
                done, shard, row = done + count, shard + 1, 0
        flat = _widened(raw.reshape(-1), item_bytes, wide)
        _flat(out)[: len(flat)] = flat

    def ragged(
        self, offsets: Store, values: Store, index: Array, item_bytes: int, ask: bool, out_offsets: Array, out: Array,
        result: Result,
    ) -> None:  # fmt: skip
        spans = _find(offsets, index, 1, result)
        if spans is None:
            return
        pair = np.empty(16, np.uint8)
        places = []
        out_offsets[0] = 0
        for place, (shard, row) in enumerate(spans):
            if not _take(offsets, place, shard, row * 8, row * 8 + 16, pair, result):
                return
            begin, end = pair.view(np.int64).tolist()
            if not 0 <= begin <= end <= values.sizes[shard] // item_bytes:
                _set(result, BAD_OFFSETS, place, shard)
                return
            places.append((shard, begin, end))
            out_offsets[place + 1] = out_offsets[place] + end - begin
        if out_offsets[len(index)] * item_bytes > out.nbytes:
            _set(result, TOO_SMALL, 0, 0, int(out_offsets[len(index)]))
            return
        flat = _flat(out)
        for place, (shard, begin, end) in enumerate(places):
            to = flat[int(out_offsets[place]) * item_bytes :]
            if not _take(values, place, shard, begin * item_bytes, end * item_bytes, to, result):
                return

    def fetched(self, store: Store, ranges: Fetched, item_bytes: int, wide: int, out: Array, result: Result) -> None:
        _set(result, OK)
        flat = _flat(out)
        for place in range(len(ranges.at)):
            shard, size = int(ranges.shard[place]), int(ranges.bytes[place])
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(int(ranges.at[place])))
            sums = store.sums[shard]
            assert sums is not None  # who fetched it has added them
            for block, value in enumerate(self.sums(data, store.block_bytes), int(ranges.first[place])):
                if value != sums[block]:
                    _set(result, MISMATCH, place, shard, block)
                    return
            part = data[int(ranges.skip[place]) :][: int(ranges.take[place])]
            part = _widened(part, item_bytes, wide)
            to = int(ranges.to[place])
            flat[to : to + len(part)] = part

    def check(self, store: Store, shard: int, first: int, last: int, result: Result) -> None:
        _set(result, OK, 0, shard)
        end = min(last * store.block_bytes, int(store.sizes[shard]))
        _check(store, 0, shard, first * store.block_bytes, end, result)

    def quick_rows(self, store: Store, row_bytes: int) -> Callable[[Array, Array], int]:
        return lambda index, out: 3

    def quick_windows(self, store: Store, item_bytes: int) -> Callable[[int, int, Array, Array], int]:
        return lambda items, wide, start, out: 3

    def quick_ragged(self, offsets: Store, values: Store, item_bytes: int) -> Callable[[Array, Array, Array], int]:
        return lambda index, out_offsets, out: 3

    def sums(self, data: Array, block_bytes: int) -> Array:
        view = data.data
        return np.array(
            [int(digest(view[at : at + block_bytes]), 16) for at in range(0, len(data), block_bytes)],
            np.uint64,
        )


def _set(result: Result, status: int, place: int = 0, shard: int = 0, block: int = 0) -> None:
    result.status, result.place, result.shard, result.block = status, place, shard, block


def _flat(out: Array) -> Array:
    return out.reshape(-1).view(np.uint8)


def _widened(raw: Array, item_bytes: int, wide: int) -> Array:
    if wide == AS_STORED:
        return raw
    return raw.view(f"{'u' if wide == FROM_UNSIGNED else 'i'}{item_bytes}").astype(np.int64).view(np.uint8)


def _find(store: Store, index: Array, items: int, result: Result) -> list[tuple[int, int]] | None:
    """(shard, row in it) of each row; None where one is out of range."""
    _set(result, OK)
    outside = np.flatnonzero((index < 0) | (index > store.bounds[-1] - items))
    if len(outside):
        _set(result, OUT_OF_RANGE, int(outside[0]))
        return None
    shard = np.searchsorted(store.bounds, index, "right") - 1
    return list(zip(shard.tolist(), (index - store.bounds[shard]).tolist(), strict=True))


def _take(store: Store, place: int, shard: int, begin: int, end: int, to: Array, result: Result) -> bool:
    memory = store.memory[shard]
    if memory is None:
        _set(result, UNMAPPED, place, shard)
        return False
    if not _check(store, place, shard, begin, end, result):
        return False
    to[: end - begin] = memory[begin:end]
    return True


def _check(store: Store, place: int, shard: int, begin: int, end: int, result: Result) -> bool:
    if begin == end or not store.unknown[shard]:
        return True
    memory, known, sums = store.memory[shard], store.known[shard], store.sums[shard]
    assert memory is not None and known is not None and sums is not None  # a mapped shard has all three
    for block in range(begin // store.block_bytes, (end - 1) // store.block_bytes + 1):
        word, bit = block // 64, np.uint64(1 << block % 64)
        if known[word] & bit:
            continue
        data = memory[block * store.block_bytes : (block + 1) * store.block_bytes]
        if int(digest(data.data), 16) != sums[block]:
            _set(result, MISMATCH, place, shard, block)
            return False
        known[word] |= bit
        store.unknown[shard] -= 1
        store.unsure -= not store.unknown[shard]
    return True


@cache
def kernels() -> Any:
    """The compiled kernels, or the reference where they cannot be compiled (with a warning)."""
    library = native.load("gather")
    return Compiled(library) if library is not None else Reference()
