"""The records that every peer packs and reads: one raw file, ids by a fixed rule, and a digest of what was read.

Imported by the benchmark and by the peers' processes alike, so it needs NumPy and nothing else. A raw file holds the
records one after another. Records of one length need no more; for others `<file>.offsets` holds count + 1 int64. Every
record begins with its number (uint64, little endian; shorter records with its low bytes) and goes on at random, so that
a loader that shuffles can be checked too, and so that compression gains nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

NUMBER_BYTES = 8
MIN_SHARE, MAX_SHARE = 0.5, 1.5  # lengths of records that differ, around their mean


@dataclass(frozen=True)
class Raw:
    """A raw file of `count` records of `record_bytes` each; 0: lengths differ, `<path>.offsets` says where."""

    path: str
    record_bytes: int
    count: int

    @cached_property
    def values(self) -> np.ndarray:
        """All bytes, memory-mapped: uint8 [total]."""
        return np.asarray(np.memmap(self.path, np.uint8, "r"))

    @cached_property
    def offsets(self) -> np.ndarray:
        """Where each record begins, and where the last ends: int64 [count + 1]."""
        if self.record_bytes:
            return np.arange(self.count + 1, dtype=np.int64) * self.record_bytes
        return np.fromfile(offsets_path(self.path), np.int64)

    def record(self, number: int) -> bytes:
        return self.values[self.offsets[number] : self.offsets[number + 1]].tobytes()

    def records(self) -> Iterator[bytes]:
        """All records in order, as every peer's writer is given them."""
        view = memoryview(self.values)  # type: ignore[arg-type]
        ends = iter(self.offsets.tolist())
        begin = next(ends)
        for end in ends:
            yield bytes(view[begin:end])
            begin = end


def offsets_path(path: str | Path) -> str:
    return f"{path}.offsets"


def write_raw(path: Path, record_bytes: int, count: int, *, variable: bool = False, seed: int = 0) -> Raw:
    """Make a raw file; `variable`: lengths uniform in 0.5 to 1.5 times `record_bytes`."""
    rng = np.random.default_rng(seed)
    lengths = np.full(count, record_bytes, np.int64)
    if variable:
        lengths = rng.integers(int(record_bytes * MIN_SHARE), int(record_bytes * MAX_SHARE) + 1, count, np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    values = rng.bytes(int(offsets[-1]))
    content = np.frombuffer(bytearray(values), np.uint8)
    numbers = np.arange(count, dtype="<u8").view(np.uint8).reshape(count, NUMBER_BYTES)
    for byte in range(min(NUMBER_BYTES, int(lengths.min()))):
        content[offsets[:-1] + byte] = numbers[:, byte]
    content.tofile(path)
    if variable:
        offsets.tofile(offsets_path(path))
    return Raw(str(path), 0 if variable else record_bytes, count)


def sample_ids(seed: int, batches: int, batch: int, count: int) -> np.ndarray:
    """Random record numbers, int64 [batches, batch], the same in every NumPy: SplitMix64 (Steele et al. 2014)."""
    index = np.arange(1, batches * batch + 1, dtype=np.uint64) + (np.uint64(seed) << np.uint64(32))
    mixed = index * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(count)).astype(np.int64).reshape(batches, batch)


class Digest:
    """BLAKE2b over one record of every batch, its place in the batch moving on from batch to batch."""

    def __init__(self, batch: int) -> None:
        self._batch, self._number, self._hash = batch, 0, hashlib.blake2b(digest_size=16)

    def add(self, record_at: Callable[[int], bytes]) -> None:
        """Take the next batch's record, which `record_at` finds by its place in the batch."""
        record = record_at(self._number * 61 % self._batch)
        self._hash.update(len(record).to_bytes(8, "little") + record)
        self._number += 1

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def expected_digest(raw: Raw, seed: int, batches: int, batch: int) -> str:
    """What a peer that read the right bytes reports."""
    digest = Digest(batch)
    for ids in sample_ids(seed, batches, batch, raw.count):
        digest.add(lambda place, ids=ids: raw.record(int(ids[place])))  # type: ignore[misc]
    return digest.hexdigest()
