"""The physical bound of batched random reads: the best compiled gather of the same bytes, measured in the same run.

    found = bound(records, batches)            # uint8 [n, R], or (values, offsets); ids int64 [batches, batch]
    times = alternating_blocks({"ours": ours, **found.gathers}, clock=time.perf_counter)
    best = min(np.median(times[name]) for name in found.gathers)

Three loops (`memcpy`; with prefetch; a vector loop with prefetch), each into a reused and into fresh buffers. Starts
and lengths are known to them beforehand, nothing is checked, and one compiled call gathers all batches. A destination
begins 1024 bytes past a page unless told: `memcpy` is several times slower where (destination - source) mod 4096 is 1
to 31, so `phase` says for how many of the copies that is so. Give batches of more bytes than the last cache holds, else
the second call finds them there.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

PAGE = 4096
DESTINATION_OFFSET = 1024  # bytes past a page
SLOW_PHASES = (1, 31)  # of memcpy on processors with fast short `rep movs`
COPIES = ("memcpy", "memcpy, prefetch", "vectors, prefetch")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-shared", "-fPIC")

Records = np.ndarray | tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Phase:
    """(destination - source) mod 4096 over all copies into the reused buffer."""

    low: int
    high: int
    slow_share: float  # of the copies, in SLOW_PHASES

    def __str__(self) -> str:
        return f"page phase {self.low} to {self.high}, {self.slow_share:.1%} in {SLOW_PHASES[0]}..{SLOW_PHASES[1]}"


@dataclass(frozen=True)
class Bound:
    """Gathers of all batches by name, and the reused destination, which holds the last batch after a call."""

    gathers: dict[str, Callable[[], None]]
    destination: np.ndarray
    num_bytes: int  # that one call copies
    phase: Phase
    by_offsets: Callable[[], None] | None = None  # records of different lengths: a gather that reads the offsets too


def bound(records: Records, batches: np.ndarray, *, destination_offset: int = DESTINATION_OFFSET) -> Bound:
    """Compiled gathers of random batches, int64 [batches, batch], from records in memory (a memory map is memory).

    Raises `RuntimeError` where nothing can be compiled, `ValueError` for ids outside of the records.
    """
    values, starts, lengths = _spans(records, batches)
    capacity = int(lengths.sum(axis=1).max())
    destination = page_aligned(capacity, destination_offset)
    arrays = (values, starts, lengths, destination)  # the gathers keep them alive
    gathers = {}
    for copy, name in enumerate(COPIES):
        gathers[f"{name}, reused"] = _gather(copy, arrays, destination.ctypes.data, destination_offset)
        gathers[f"{name}, fresh"] = _gather(copy, arrays, None, destination_offset)
    by_offsets = _by_offsets(*records, batches, destination) if isinstance(records, tuple) else None
    return Bound(gathers, destination, int(lengths.sum()), _phase(values, starts, lengths, destination), by_offsets)


def page_aligned(size: int, offset: int) -> np.ndarray:
    """Memory for `size` bytes that begins `offset` bytes past a page, touched once: uint8 [size]."""
    block = np.zeros(size + offset + PAGE, np.uint8)
    begin = -block.ctypes.data % PAGE + offset
    block[:] = 1
    return block[begin : begin + size]


def _spans(records: Records, batches: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Bytes [total]; start and length of every record to gather: int64 [batches, batch] both."""
    ids = np.ascontiguousarray(batches, np.int64)
    count = len(records[1]) - 1 if isinstance(records, tuple) else len(records)
    if ids.ndim != 2 or not ids.size or ids.min() < 0 or ids.max() >= count:
        raise ValueError(f"batches must be [batches, batch] of ids below {count}, at least one: {ids.shape} given")
    if isinstance(records, tuple):
        values, offsets = records
        return values, offsets[ids].astype(np.int64), (offsets[ids + 1] - offsets[ids]).astype(np.int64)
    if records.dtype != np.uint8 or records.ndim != 2 or not records.flags.c_contiguous:
        raise ValueError(f"records must be contiguous uint8 [n, bytes]: {records.dtype} {records.shape} given")
    width = records.shape[1]
    return records.reshape(-1), ids * width, np.full(ids.shape, width, np.int64)


def _gather(copy: int, arrays: tuple[np.ndarray, ...], to: int | None, offset: int) -> Callable[[], None]:
    run = _library().gather_batches
    values, starts, lengths, destination = arrays
    given = (
        copy,
        values.ctypes.data,
        starts.ctypes.data,
        lengths.ctypes.data,
        *starts.shape,
        to,
        len(destination),
        offset,
    )

    def gather(_alive: tuple[np.ndarray, ...] = arrays) -> None:
        if run(*given):
            raise MemoryError(f"no memory for a batch of {len(destination)} bytes")

    return gather


def _by_offsets(values: np.ndarray, offsets: np.ndarray, batches: np.ndarray, to: np.ndarray) -> Callable[[], None]:
    run = _library().gather_by_offsets
    offsets, ids = np.ascontiguousarray(offsets, np.int64), np.ascontiguousarray(batches, np.int64)
    places = np.empty((2, ids.shape[1]), np.int64)
    arrays = (values, offsets, ids, places, to)
    given = (
        values.ctypes.data,
        offsets.ctypes.data,
        ids.ctypes.data,
        *ids.shape,
        *(p.ctypes.data for p in places),
        to.ctypes.data,
    )

    def gather(_alive: tuple[np.ndarray, ...] = arrays) -> None:
        run(*given)

    return gather


def _phase(values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, destination: np.ndarray) -> Phase:
    placed = np.cumsum(lengths, axis=1) - lengths + destination.ctypes.data
    phases = (placed - starts - values.ctypes.data) % PAGE
    slow = (phases >= SLOW_PHASES[0]) & (phases <= SLOW_PHASES[1])
    return Phase(int(phases.min()), int(phases.max()), float(slow.mean()))


@cache
def _library() -> ctypes.CDLL:
    """The compiled `data_bound.cpp`; loaded, its file is no longer needed."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise RuntimeError("the bound of reading needs a C++ compiler (c++, g++, clang++): none is on PATH")
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / "data_bound.so"
        source = Path(__file__).with_suffix(".cpp")
        command = [compiler, *FLAGS, str(source), "-o", str(built)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile: {done.stderr.strip()[:500]}")
        library = ctypes.CDLL(str(built))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.gather_batches.argtypes = [ctypes.c_int, pointer, pointer, pointer, size, size, pointer, size, size]
    library.gather_batches.restype = ctypes.c_int
    library.gather_by_offsets.argtypes = [pointer, pointer, pointer, size, size, pointer, pointer, pointer]
    library.gather_by_offsets.restype = None
    return library
