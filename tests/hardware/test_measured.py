"""What rows say of the machine as a whole."""

from dataclasses import replace

import pytest

from tests.fake_domains import products, row_of
from turbopump.comms.ops import AllReduce, Overlap, Send
from turbopump.compute.ops import Gemm, MemoryCopy
from turbopump.core.workload import Op
from turbopump.data.ops import RandomRead, SequentialRead, SequentialWrite
from turbopump.hardware.measured import measured_device, measured_links, measured_storage, with_peak_shares
from turbopump.hardware.profile import Measurement, Trial
from turbopump.hardware.specs import DeviceSpec

CPU = DeviceSpec("A processor", {"fp32": 200e9}, clock_hz=3e9, source="design of the core")


def row(op: Op, seconds: float, domain="compute", route="default", **trial) -> Measurement:
    return replace(row_of(Trial(op, route, **trial), seconds=seconds), domain=domain)


def test_the_share_of_the_peak_is_of_the_cores_used():
    one, two = (row(Gemm(1000, 1000, 1000, "fp32"), 0.02, threads=n) for n in (1, 2))  # 100 GFLOP/s
    other = row(Gemm(1000, 1000, 1000, "fp16"), 0.02)
    failed = Measurement.failed(products(1)[0], "compute", "no")
    shares = [r.peak_share for r in with_peak_shares([one, two, other, failed], {"cpu": CPU}, cores=2)]
    assert shares == [pytest.approx(1.0), pytest.approx(0.5), None, None]
    assert with_peak_shares([replace(one, device="cuda")], {"cpu": CPU}, cores=2)[0].peak_share is None


def test_a_peak_is_never_below_what_was_measured():
    fast = row(Gemm(1000, 1000, 1000, "fp32"), 1 / 75, threads=1)  # 150 GFLOP/s on one of two cores
    raised = measured_device(CPU, [fast], "cpu", cores=2)
    assert raised.flops_per_s["fp32"] == pytest.approx(300e9) and "raised" in raised.note
    assert with_peak_shares([fast], {"cpu": raised}, cores=2)[0].peak_share == pytest.approx(1.0)
    assert measured_device(CPU, [replace(fast, device="cuda")], "cpu", cores=2) == CPU


def test_the_memorys_rate_comes_from_copies_beyond_the_caches():
    cached, beyond = (row(MemoryCopy(size), size / 10e9, "memory") for size in (1 << 16, 1 << 28))
    assert measured_device(CPU, [cached], "cpu", cores=2).memory_bytes_per_s is None
    found = measured_device(CPU, [row(MemoryCopy(1 << 16), 1e-7, "memory"), beyond], "cpu", cores=2)
    assert found.memory_bytes_per_s == pytest.approx(beyond.bytes_per_s)


def test_a_link_a_route_with_the_latency_of_a_message():
    rows = [
        row(Send(8), 20e-6, "comms", "gloo"),
        row(AllReduce(8, 2), 60e-6, "comms", "gloo"),
        row(AllReduce(1 << 26, 2), 0.05, "comms", "gloo"),
        row(Overlap(256, 1 << 24, 2), 1e-5, "host", "gloo"),
        row(AllReduce(1 << 20, 2), 0.001, "comms", "mpi"),
        Measurement.failed(Trial(AllReduce(8, 2), "nccl"), "comms", "no devices"),
    ]
    gloo, mpi = measured_links(rows)
    assert (gloo.name, gloo.level) == ("gloo, 2 ranks", "node") and gloo.latency_s == pytest.approx(20e-6, rel=0.05)
    assert gloo.bytes_per_s == pytest.approx((1 << 26) / 0.05) and gloo.provenance == "measured"
    assert mpi.name == "mpi, 2 ranks"


def test_storage_only_where_all_of_it_was_measured_past_the_cache():
    rows = [
        row(SequentialRead(1 << 20), 1e-3, "data"), row(SequentialRead(1 << 20, cached=True), 1e-5, "data"),
        row(SequentialWrite(1 << 20), 2e-3, "data"), row(RandomRead(4096, 64), 1e-5, "data"),
        row(RandomRead(4096, 1, cached=True), 1e-6, "data"),
    ]  # fmt: skip
    assert measured_storage(rows, "/data") == ()
    (spec,) = measured_storage([*rows, row(RandomRead(4096), 1e-4, "data")], "/data")
    assert spec.read_bytes_per_s == pytest.approx((1 << 20) / 1e-3)
    assert spec.random_reads_per_s == pytest.approx(1e5, rel=0.05) and spec.latency_s == pytest.approx(1e-4, rel=0.05)
