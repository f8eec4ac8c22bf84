"""Warm batched random reads beside the bound: ours over the best compiled gather of the same bytes, in turns.

One block of ours is one Python call a batch; one of the bound is one compiled call for all of them. All blocks of the
data are checked before (a first read also hashes them: `first_epoch`), everything lies in the page cache, buffers are
reused and ours begin on a page. The bound reads the raw file's map, ours that of the shards.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from benchmarks.data_bound import Bound, Records, bound
from benchmarks.data_own import (
    BATCH,
    TOKEN,
    Read,
    all_of,
    check_all,
    note,
    opened,
    packed,
    packed_tokens,
    rows_reader,
    windows_reader,
)
from benchmarks.data_peer_records import Raw, write_raw
from benchmarks.harness import Ratio, alternating_blocks, ratio_with_interval
from turbopump.data.ragged import Ragged
from turbopump.data.reading import SplitData

OURS, BY_OFFSETS = "ours", "by offsets"


@dataclass(frozen=True)
class Size:
    """Records of one size. A block of `batches` touches more bytes than the last cache holds, `count` several times
    more."""

    record_bytes: int
    count: int
    quick_count: int
    batches: int


SIZES = {
    "100B": Size(100, 2_500_000, 600_000, 1500),
    "2KB": Size(2048, 120_000, 40_000, 160),
    "12KB": Size(12_288, 20_000, 7_000, 30),
    "110KB": Size(112_640, 2_500, 800, 4),
}
TOKENS = "2KB"  # the size that stands for windows of tokens


@dataclass(frozen=True)
class Share:
    """Ours as a fraction of the best gather. `fresh`: of the best gather into fresh buffers; `by_offsets`: of one that
    reads the offsets of records of different lengths too, as a reader must."""

    ratio: Ratio
    best: str
    fresh: float
    our_batch_s: float
    best_batch_s: float
    by_offsets: float | None = None


@dataclass(frozen=True)
class Warm:
    """All figures of one record size; `wide` (tokens only): with int64 windows as the result."""

    fixed: Share
    variable: Share
    first_epoch: float
    wide: Share | None


def measure_warm(name: str, scratch: Path, quick: bool) -> Warm:
    """Pack and read records of one size."""
    size, blocks = SIZES[name], 7 if quick else 30
    count = size.quick_count if quick else size.count
    rng = np.random.default_rng(1)
    note(f"warm {name}: {count} records")
    raw = write_raw(scratch / f"raw-{name}", size.record_bytes, count)
    tokens = name == TOKENS
    data = (packed_tokens if tokens else packed)(raw, scratch / f"own-{name}")
    first_epoch = _first_epoch(raw, data, scratch / f"own-{name}", tokens)
    check_all(data)
    wide = None
    if tokens:
        items = size.record_bytes // TOKEN.itemsize
        starts = rng.integers(0, raw.values.size // TOKEN.itemsize - items + 1, (size.batches, BATCH))
        limit = _bound_of_windows(raw, starts, items)
        fixed = _share(f"{name}, windows", windows_reader(data, items, wide=False), starts, limit, blocks)
        wide = _share(f"{name}, windows as int64", windows_reader(data, items, wide=True), starts, limit, blocks)
    else:
        ids = rng.integers(0, count, (size.batches, BATCH))
        fixed = _share(name, rows_reader(data), ids, bound(_matrix(raw), ids), blocks)
    del data
    variable = write_raw(scratch / f"raw-{name}-variable", size.record_bytes, count, variable=True)
    data = packed(variable, scratch / f"own-{name}-variable")
    check_all(data)
    ids = rng.integers(0, count, (size.batches, BATCH))
    limit = bound((variable.values, variable.offsets), ids)
    return Warm(fixed, _share(f"{name}, 0.5 to 1.5 times", rows_reader(data), ids, limit, blocks), first_epoch, wide)


def _matrix(raw: Raw) -> np.ndarray:
    return raw.values.reshape(raw.count, raw.record_bytes)


def _bound_of_windows(raw: Raw, starts: np.ndarray, items: int) -> Bound:
    """Windows are records whose begins and ends stand in pairs."""
    begins = starts.reshape(-1) * TOKEN.itemsize
    pairs = np.stack([begins, begins + items * TOKEN.itemsize], axis=1).reshape(-1)
    records: Records = (raw.values, pairs)
    return replace(bound(records, 2 * np.arange(starts.size).reshape(starts.shape)), by_offsets=None)


def _share(what: str, read: Read, batches: np.ndarray, limit: Bound, blocks: int) -> Share:
    _check(what, read(batches[-1]), limit)
    contestants: dict[str, Callable[[], object]] = {OURS: all_of(read, batches), **limit.gathers}
    if limit.by_offsets is not None:
        contestants[BY_OFFSETS] = limit.by_offsets
    share = share_of(alternating_blocks(contestants, blocks=blocks), len(batches))
    beside = f", {share.by_offsets:.2f} of one that reads offsets" if share.by_offsets is not None else ""
    note(
        f"  {what}: {share.ratio.value:.2f} [{share.ratio.low:.2f}, {share.ratio.high:.2f}] of {share.best} "
        f"({share.fresh:.2f} of one into fresh buffers{beside}); a batch {1e6 * share.our_batch_s:.1f} us, bound "
        f"{1e6 * share.best_batch_s:.1f} us; bound {limit.phase}, ours begin on a page"
    )
    return share


def share_of(times: dict[str, list[float]], batches: int) -> Share:
    """The best gather is the one with the least median, whatever its buffers."""
    medians = {name: float(np.median(seconds)) for name, seconds in times.items()}
    gathers = [name for name in times if name not in (OURS, BY_OFFSETS)]
    best = min(gathers, key=lambda name: medians[name])
    fresh = min((name for name in gathers if "fresh" in name), key=lambda name: medians[name])
    return Share(
        ratio_with_interval(times[best], times[OURS]), best, ratio_with_interval(times[fresh], times[OURS]).value,
        medians[OURS] / batches, medians[best] / batches,
        ratio_with_interval(times[BY_OFFSETS], times[OURS]).value if BY_OFFSETS in times else None,
    )  # fmt: skip


def _check(what: str, found: np.ndarray | Ragged, limit: Bound) -> None:
    """Ours and the bound read the same bytes."""
    for gather in (*limit.gathers.values(), limit.by_offsets):
        if gather is not None:
            gather()
    values = np.ascontiguousarray(found.values if isinstance(found, Ragged) else found)
    if values.dtype == np.int64:
        values = values.astype(TOKEN)
    mine = values.reshape(-1).view(np.uint8)
    if not np.array_equal(mine, limit.destination[: len(mine)]):
        raise AssertionError(f"{what}: ours and the compiled gather read different bytes")


def _first_epoch(raw: Raw, data: SplitData, path: Path, tokens: bool) -> float:
    """The share of the bound in an epoch that maps, checks and reads every block for the first time."""
    ids = np.random.default_rng(2).permutation(raw.count)[: raw.count // BATCH * BATCH].reshape(-1, BATCH)
    items = raw.record_bytes // TOKEN.itemsize
    run = all_of(windows_reader(data, items, wide=False), ids * items) if tokens else all_of(rows_reader(data), ids)
    begin = time.thread_time()
    run()
    ours = time.thread_time() - begin
    times = alternating_blocks(bound(_matrix(raw), ids).gathers, blocks=2)
    best = min(map(min, times.values()))
    begin = time.thread_time()
    check_all(opened(path))
    apart = best + time.thread_time() - begin
    share = best / ours
    note(
        f"  first epoch, every block mapped and hashed: {share:.2f} of the bound, {apart / ours:.2f} of the bound and "
        "a check of all blocks in order before it"
    )
    return share
