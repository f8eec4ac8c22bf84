import math
from dataclasses import replace

import pytest

from turbopump.compute.ops import Gemm
from turbopump.core.errors import ProfileError, UsageError
from turbopump.data import cost
from turbopump.data.ops import CheckpointRead, CheckpointWrite, RandomRead, SequentialRead, SequentialWrite
from turbopump.hardware.profile import SCHEMA, MachineProfile, Measurement, Trial
from turbopump.hardware.specs import DeviceSpec, StorageSpec
from turbopump.hardware.timing import Timing

LATENCY_S, BANDWIDTH, IOPS = 1e-4, 2e9, 50_000
SIZES, DEPTHS = (512, 4096, 12288, 32768, 131072, 1 << 20), (1, 4, 16, 64)


def disk_s(num_bytes, depth):
    """A disk of known latency, bandwidth and rate."""
    return max((LATENCY_S + num_bytes / BANDWIDTH) / depth, num_bytes / BANDWIDTH, 1 / IOPS)


def row(op, seconds, route="pread"):
    timing = Timing("wall", 5, 10, 0.95 * seconds, seconds, 1.1 * seconds, seconds, 0.0)
    return Measurement.of(Trial(op, route), "data", timing)


def rows_of(read=disk_s, sizes=SIZES, depths=DEPTHS, cached=False):
    return [row(RandomRead(size, depth, cached), read(size, depth)) for size in sizes for depth in depths]


def profile_of(rows, **more):
    return MachineProfile(
        SCHEMA, "test", "2026-01-01", "a machine", "measured", "f", {}, {}, (), rows=tuple(rows), **more
    )


def test_a_measured_operation_is_its_fastest_row():
    rows = rows_of()
    fast = row(RandomRead(4096, 16), 1e-6, "io_uring O_DIRECT")
    fio = row(RandomRead(4096, 16), 1e-7, "fio io_uring O_DIRECT")  # a yardstick, no route of ours
    broken = Measurement.failed(Trial(RandomRead(4096, 16), "mmap"), "data", "refused")
    found = cost.predict(profile_of([*rows, fast, fio, broken]), RandomRead(4096, 16))
    assert (found.seconds, found.basis, found.route) == (1e-6, "measured", "io_uring O_DIRECT")
    assert found.low_s == pytest.approx(0.95e-6) and found.high_s == pytest.approx(1.1e-6)


@pytest.mark.parametrize("size", [1000, 8192, 20_000, 65_536, 500_000])
@pytest.mark.parametrize("depth", [1, 2, 8, 40, 64])
def test_sizes_and_depths_between_are_near_the_disk_that_made_the_rows(size, depth):
    found = cost.predict(profile_of(rows_of()), RandomRead(size, depth))
    assert found.basis == "interpolated" and found.low_s <= found.seconds <= found.high_s
    assert found.seconds == pytest.approx(disk_s(size, depth), rel=0.45 if depth in (2, 8) else 0.25)


def test_beyond_the_grid_latency_and_bandwidth_stay_and_depth_gains_nothing():
    profile = profile_of(rows_of())
    assert cost.predict(profile, RandomRead(16, 1)).seconds == pytest.approx(disk_s(512, 1))
    assert cost.predict(profile, RandomRead(8 << 20, 64)).seconds == pytest.approx((8 << 20) / BANDWIDTH, rel=0.01)
    assert cost.predict(profile, RandomRead(4096, 1000)).seconds == pytest.approx(disk_s(4096, 64))
    assert cost.reads_per_s(profile, 4096, 64) == pytest.approx(IOPS)


def test_no_prediction_passes_the_best_bandwidth():
    profile = profile_of(rows_of(sizes=(512, 1 << 20)))
    for size in (600, 5000, 70_000, 900_000, 10 << 20):
        found = cost.predict(profile, RandomRead(size, 64))
        assert size / found.seconds <= BANDWIDTH * 1.0001 and size / found.low_s <= BANDWIDTH / 0.95 * 1.0001


def test_cold_and_cached_are_apart_and_a_kind_without_rows_is_refused():
    cached = rows_of(lambda size, depth: 1e-6 + size / 1e10, cached=True)
    profile = profile_of([*rows_of(), *cached])
    assert cost.predict(profile, RandomRead(8192, 1, True)).seconds < 3e-6
    assert cost.predict(profile, RandomRead(8192, 1)).seconds > 5e-5
    with pytest.raises(ProfileError, match=r"no row of cached SequentialRead .*`turbopump probe --only data"):
        cost.predict(profile, SequentialRead(4096, cached=True))
    with pytest.raises(ProfileError, match="Gemm"):
        cost.predict(profile, Gemm(2, 2, 2, "fp32"))
    with pytest.raises(UsageError, match="at least 1"):
        cost.predict(profile, RandomRead(0, 1))
    with pytest.raises(UsageError, match="at least 1"):
        cost.predict(profile, RandomRead(512, 0))


def test_a_depth_that_the_budget_left_with_one_size_does_not_bend_the_others():
    few = [*rows_of(depths=(1, 64)), row(RandomRead(4096, 16), disk_s(4096, 16))]
    whole = cost.predict(profile_of(rows_of(depths=(1, 64))), RandomRead(1 << 19, 64))
    assert cost.predict(profile_of(few), RandomRead(1 << 19, 64)).seconds == pytest.approx(whole.seconds)
    assert cost.predict(profile_of([few[-1]]), RandomRead(8192, 4)).seconds > 0  # one row is enough to say something


def test_leaving_out_knows_only_other_sizes_or_other_depths():
    left = cost.leave_out(rows_of())
    assert len(left) == 4 * len(DEPTHS) + 2 * len(SIZES)
    assert sorted(error.error for error in left)[len(left) // 2] < 0.2
    spoiled = [replace(r, median_s=50 * r.seconds) if r.bytes == 12288 else r for r in rows_of()]
    worst = [error for error in cost.leave_out(spoiled) if error.left == "size" and "12288" in error.op_key]
    assert all(error.error > 0.9 for error in worst)  # its own rows, at any depth, did not help
    assert cost.leave_out(rows_of(sizes=(512, 4096), depths=(1, 4))) == ()


def test_the_band_is_what_leaving_out_shows():
    smooth = cost.predict(profile_of(rows_of()), RandomRead(8192, 1))
    rough = [replace(r, median_s=r.seconds * (3 if i % 2 else 1)) for i, r in enumerate(rows_of(depths=(1,)))]
    wide = cost.predict(profile_of(rough), RandomRead(8192, 1))
    assert wide.high_s / wide.seconds > smooth.high_s / smooth.seconds > 1
    few = cost.predict(profile_of(rows_of(sizes=(512, 1 << 20), depths=(1,))), RandomRead(8192, 1))
    assert few.high_s / few.seconds == pytest.approx(cost.DEFAULT_BAND)


def test_summary_of_rows():
    rows = [*rows_of(), row(SequentialRead(1 << 20), (1 << 20) / 3e9), row(CheckpointWrite(1 << 24), (1 << 24) / 1e9)]
    rows += rows_of(lambda size, depth: 1e-9, cached=True)
    spec = cost.storage_spec(rows, "disk")
    assert spec == StorageSpec("disk", pytest.approx(3e9), pytest.approx(1e9), pytest.approx(IOPS),
                               pytest.approx(disk_s(4096, 1)), "measured")  # fmt: skip
    with pytest.raises(ProfileError, match="no row of writes"):
        cost.storage_spec(rows_of())
    with pytest.raises(
        ProfileError, match="no row of cold reads, cold random reads of 4 KiB, those at depth 1, writes"
    ):
        cost.storage_spec([])


def test_a_profile_from_a_datasheet_predicts_from_its_storage():
    device = DeviceSpec("chip", {"fp32": 1e12}, memory_bytes_per_s=1e11)
    disk = StorageSpec("disk", BANDWIDTH, 1e9, IOPS, LATENCY_S)
    profile = replace(profile_of([]), provenance="datasheet", devices=(device,), storage=(disk,))
    for op, seconds in [
        (RandomRead(4096, 1), disk_s(4096, 1)),
        (RandomRead(4096, 64), 1 / IOPS),
        (RandomRead(1 << 20, 64), (1 << 20) / BANDWIDTH),
        (SequentialRead(1 << 20), (1 << 20) / BANDWIDTH),
        (RandomRead(1 << 20, 1, True), 2 * (1 << 20) / 1e11),
        (CheckpointWrite(10**9), 1.0),
        (SequentialWrite(10**9), 1.0),
        (CheckpointRead(2 * 10**9), 1.0),
    ]:
        found = cost.predict(profile, op)
        assert found.seconds == pytest.approx(seconds, rel=1e-3) and found.basis == "roofline"
        assert found.low_s <= found.seconds < found.high_s and math.isfinite(found.high_s)
