"""Random reads and packing beside the peers, each on its own format, in turns.

Reads: batches of 256 random records; every contestant reads enough of them for its block, and time a batch is what
counts. What each peer read is checked once by its digest. At 2 KB ours reads windows of one stream of tokens, where the
peers' records begin. Packing: the same raw file from an iterator of `bytes`, one process each, until the bytes are on
disk. Dataset libraries count; building blocks (Arrow's take, memory maps) stand beside.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.data_own import (
    BATCH,
    TOKEN,
    all_of,
    check_all,
    in_process,
    note,
    packed,
    packed_tokens,
    rows_reader,
    windows_reader,
)
from benchmarks.data_peer_records import Raw, expected_digest, sample_ids, write_raw
from benchmarks.data_peers import Peer, PeerError
from benchmarks.data_warm import OURS, SIZES, TOKENS
from benchmarks.harness import Ratio, ratio_with_interval
from turbopump.pack import pack

COUNTS = {"100B": 1_000_000, "2KB": 100_000, "12KB": 20_000, "110KB": 2_500}
"""Records, by size. 100 MB at 100 B: 250 MB take some peers minutes to write, and both are beyond the last cache."""
QUICK_COUNTS = {"100B": 400_000, "2KB": 20_000, "12KB": 4_000, "110KB": 500}
CHECKED_BATCHES = 4
BLOCK_S, QUICK_BLOCK_S = 0.2, 0.05  # of a peer
PACK_SIZE = "12KB"


@dataclass(frozen=True)
class Versus:
    """Ours over the best dataset library (speeds), and over each contestant."""

    ratio: Ratio
    best: str
    over: Mapping[str, float]


def versus(times: Mapping[str, Sequence[float]], blocks: Sequence[str]) -> Versus:
    """`times` a unit of work by contestant, round by round, one of them ours; `blocks` are shown and do not count.

    Raises `ValueError` where no dataset library is among them.
    """
    over = {
        name: ratio_with_interval(seconds, times[OURS], resamples=1).value
        for name, seconds in times.items()
        if name != OURS
    }
    libraries = [name for name in over if name not in blocks]
    if not libraries:
        raise ValueError("no dataset library is there to compare with")
    best = min(libraries, key=lambda name: float(np.median(times[name])))
    return Versus(ratio_with_interval(times[best], times[OURS]), best, over)


# ---- random reads


def measure_reads(name: str, peers: Sequence[Peer], scratch: Path, quick: bool) -> Versus:
    """Write, check and read records of one size by all peers that read by number."""
    count = (QUICK_COUNTS if quick else COUNTS)[name]
    note(f"peers, {name}: {count} records")
    raw = write_raw(scratch / f"raw-{name}", SIZES[name].record_bytes, count)
    tokens = name == TOKENS
    data = (packed_tokens if tokens else packed)(raw, scratch / "own")
    check_all(data)
    items = raw.record_bytes // TOKEN.itemsize
    read = windows_reader(data, items, wide=False) if tokens else rows_reader(data)
    batches_of = {
        peer: number for peer in peers if peer.reads and (number := _ready(peer, raw, scratch, quick)) is not None
    }
    times: dict[str, list[float]] = {OURS: [], **{peer.name: [] for peer in batches_of}}
    rounds = 1  # of ours in a block: as long as the peers', since what ran before leaves no block of a few ms alone
    for turn in range(-1, 3 if quick else 9):  # the first one warms
        ids = sample_ids(100 + turn, SIZES[name].batches, BATCH, count)
        run = all_of(read, ids * items if tokens else ids)
        order: list[Peer | None] = [None, *batches_of]
        for peer in order[turn % len(order) :] + order[: turn % len(order)]:
            if peer is None:
                begin = time.perf_counter()
                for _ in range(rounds):
                    run()
                elapsed_s = time.perf_counter() - begin
                seconds, who = elapsed_s / (rounds * len(ids)), OURS
                if turn < 0:
                    rounds = max(1, round((QUICK_BLOCK_S if quick else BLOCK_S) / elapsed_s))
            else:
                try:
                    seconds, who = peer.read(100 + turn, batches_of[peer], BATCH)[0] / batches_of[peer], peer.name
                except PeerError as error:
                    note(f"  {peer.name} is left out: {error}")
                    del batches_of[peer], times[peer.name]
                    continue
            if turn >= 0:
                times[who].append(seconds)
    for contestant, found in times.items():
        note(f"  {contestant}: {1e6 * float(np.median(found)):.0f} us a batch")
    return versus(times, [peer.name for peer in peers if peer.building_block])


def _ready(peer: Peer, raw: Raw, scratch: Path, quick: bool) -> int | None:
    """Packed, opened and checked: how many batches make a block; None for a peer that fails, which is said."""
    if peer.absent:
        note(f"  {peer.name} is absent: {peer.absent}")
        return None
    directory = scratch / peer.slug
    try:
        written = peer.write(raw, directory)
        peer.open(raw, directory)
        seconds, digest = peer.read(1, CHECKED_BATCHES, BATCH)
        if digest != expected_digest(raw, 1, CHECKED_BATCHES, BATCH):
            raise PeerError(f"{peer.name} read other bytes than were packed")
        seconds, _ = peer.read(2, CHECKED_BATCHES, BATCH)
    except PeerError as error:
        note(f"  {peer.name} is left out: {error}")
        return None
    note(f"  {peer.name} wrote in {written.seconds + written.sync_s:.1f} s")
    block_s = QUICK_BLOCK_S if quick else BLOCK_S
    return max(2, min(2000, round(block_s * CHECKED_BATCHES / seconds)))


# ---- packing


def measure_pack(peers: Sequence[Peer], scratch: Path, quick: bool) -> tuple[Versus, float]:
    """Versus the peers with records from an iterator; and ours from a mapped array over ours from the iterator."""
    count = (QUICK_COUNTS if quick else COUNTS)[PACK_SIZE]
    raw = write_raw(scratch / "raw-pack", SIZES[PACK_SIZE].record_bytes, count)
    here = [peer for peer in peers if not peer.absent]
    times: dict[str, list[float]] = {OURS: [], **{peer.name: [] for peer in here}}
    of_array = []
    for turn in range(2 if quick else 11):
        order: list[Peer | None] = [None, *here]
        for peer in order[turn % len(order) :] + order[: turn % len(order)]:
            destination = scratch / "packed"
            if peer is None:
                times[OURS].append(in_process(pack_s, raw, destination, False))
                shutil.rmtree(destination)
                of_array.append(in_process(pack_s, raw, destination, True))
            elif peer.name in times:
                try:
                    written = peer.write(raw, destination)
                    times[peer.name].append(written.seconds + written.sync_s)
                except PeerError as error:
                    note(f"  {peer.name} is left out: {error}")
                    del times[peer.name]
            shutil.rmtree(destination, ignore_errors=True)
    for who, found_s in {**times, "ours, from the array": of_array}.items():
        note(f"  {who}: {raw.values.size / float(np.median(found_s)) / 1e6:.0f} MB/s packed and on disk")
    found = versus(times, [peer.name for peer in peers if peer.building_block])
    return found, ratio_with_interval(times[OURS], of_array, resamples=1).value


def pack_s(raw: Raw, destination: Path, from_array: bool) -> float:
    """Seconds to pack in this process, the bytes on disk included; libraries are loaded before, as the peers' are."""
    pack(iter([b"1", b"2"]), destination, tokenizer="none", validation=0.0, num_processes=1)
    shutil.rmtree(destination)
    begin = time.perf_counter()
    if from_array:
        matrix = (raw.values.reshape(raw.count, raw.record_bytes),)
        pack(matrix, destination, validation=0.0, num_processes=1)
    else:
        pack(raw.records(), destination, tokenizer="none", validation=0.0, num_processes=1)
    return time.perf_counter() - begin
