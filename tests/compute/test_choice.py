"""What is chosen from rows made by hand: the fastest exact route beyond the noise, else the default, and why."""

from dataclasses import replace

import pytest

from turbopump.compute.choice import best_route, distance, estimates
from turbopump.compute.ops import Conv2d, Elementwise, Gemm, Norm
from turbopump.hardware.profile import SCHEMA, MachineProfile, Measurement, Trial
from turbopump.hardware.timing import Timing

OP = Gemm(512, 512, 512, "fp32")
ONEDNN = "mkldnn.matmul.fp32_precision=bf16"


def row(op=OP, route="default", seconds=1e-3, *, spread=0.02, runs=20, threads=1, error=3e-7, problem=""):
    trial = Trial(op, route, threads)
    if problem:
        return Measurement.failed(trial, "compute", problem)
    low, high = seconds * (1 - spread / 2), seconds * (1 + spread / 2)
    timing = Timing("thread_cpu", runs, 1, low, seconds, high, seconds, 0.0)
    return Measurement.of(trial, "compute", timing, error=error)


def profile(*rows):
    return MachineProfile(SCHEMA, "test", "2026-01-01", "synthetic", "measured", "0", {}, {}, (), rows=rows)


def test_the_fastest_exact_route_wins_with_its_evidence():
    rows = (row(), row(route="a", seconds=0.6e-3), row(route="b", seconds=0.5e-3), row(route="c", seconds=0.9e-3))
    choice = best_route(profile(*rows), OP, threads=1)
    assert (choice.route, choice.basis, choice.op_key) == ("b", "measured", OP.key)
    assert choice.gain == pytest.approx(2.0) and choice.evidence == (rows[0], rows[2])
    assert (choice.seconds, choice.default_seconds, choice.error) == (0.5e-3, 1e-3, 3e-7)


def test_a_difference_within_the_noise_is_none():
    choice = best_route(profile(row(), row(route="a", seconds=0.98e-3)), OP, threads=1)
    assert (choice.route, choice.gain, choice.reason) == ("default", 1.0, "default, no measurable difference")
    assert len(choice.evidence) == 2
    tie = best_route(profile(row(), row(route="a")), OP, threads=1)
    assert tie.route == "default"


def test_the_noise_of_either_row_counts():
    clear = (row(), row(route="a", seconds=0.85e-3))
    assert best_route(profile(*clear), OP, threads=1).route == "a"
    for noisy in (0, 1):
        rows = list(clear)
        rows[noisy] = row(route=rows[noisy].route, seconds=rows[noisy].seconds, spread=0.6, runs=4)
        assert best_route(profile(*rows), OP, threads=1).route == "default"


def test_a_route_that_is_not_exact_is_left_and_named():
    rows = (row(), row(route="a", seconds=0.3e-3, error=2e-3))
    choice = best_route(profile(*rows), OP, threads=1)
    assert choice.route == "default" and "not exact: a" in choice.reason
    assert best_route(profile(*rows), OP, threads=1, max_error=1e-2).route == "a"
    unproven = (row(), row(route="a", seconds=0.3e-3, error=None))
    assert best_route(profile(*unproven), OP, threads=1).route == "default"


def test_as_exact_as_the_default_is_exact_enough():
    """Long sums lose digits in every route."""
    rows = (row(error=2e-5), row(route="a", seconds=0.3e-3, error=1.5e-5))
    assert best_route(profile(*rows), OP, threads=1).route == "a"
    assert best_route(profile(*rows), OP, threads=1, max_error=3e-6).route == "default"


def test_a_default_that_is_missing_or_does_not_work():
    missing = best_route(profile(row(route="a"), row(route="b", seconds=2e-3)), OP, threads=1)
    assert (missing.route, missing.gain, missing.default_seconds) == ("a", None, None)
    assert missing.reason == "the default was not measured"
    broken = best_route(profile(row(problem="no kernel"), row(route="a")), OP, threads=1)
    assert broken.route == "a" and "no kernel" in broken.reason
    alone = best_route(profile(row(problem="no kernel")), OP, threads=1)
    assert alone.route == "default" and alone.seconds is None and "no exact route" in alone.reason


def test_only_rows_of_the_same_threads_and_device():
    rows = (row(), row(route="a", seconds=0.1e-3, threads=2), replace(row(route="b", seconds=1e-4), device="cuda"))
    choice = best_route(profile(*rows), OP, threads=1)
    assert choice.route == "default" and choice.reason == "no other route was measured"


def test_the_nearest_shapes_stand_in_and_say_so():
    near, nearer = Gemm(1024, 512, 512, "fp32"), Gemm(512, 512, 640, "fp32")
    far, other = Gemm(8192, 8192, 512, "fp32"), Gemm(512, 512, 512, "fp32", "nn")
    rows = [row(near, seconds=2e-3), row(near, ONEDNN, 1e-3), row(nearer), row(nearer, ONEDNN, 0.5e-3)]
    rows += [row(far), row(far, ONEDNN, 3e-3), row(other), row(other, "x", 1e-5)]
    choice = best_route(profile(*rows), OP, threads=1)
    assert (choice.route, choice.basis) == (ONEDNN, "nearest")
    assert choice.gain == pytest.approx(2.0)
    assert choice.default_seconds == pytest.approx(0.8e-3), "that of the nearest, by its FLOPs"
    assert {r.op_key for r in choice.evidence} == {near.key, nearer.key}


def test_neighbours_that_disagree_give_no_advice():
    near, nearer = Gemm(1024, 512, 512, "fp32"), Gemm(512, 512, 640, "fp32")
    rows = (row(near), row(near, ONEDNN, 2e-3), row(nearer), row(nearer, ONEDNN, 0.5e-3))
    assert best_route(profile(*rows), OP, threads=1).route == "default"


def test_a_route_that_only_some_neighbours_have_is_not_assumed():
    near, nearer = Gemm(1024, 512, 512, "fp32"), Gemm(512, 512, 640, "fp32")
    rows = (row(near), row(near, "a", 1e-4), row(nearer))
    assert set(estimates(profile(*rows), OP, threads=1)) == {"default"}


def test_an_operation_like_none_that_was_measured():
    choice = best_route(profile(row()), Norm("rms", 64, 64, "fp32"), threads=1)
    assert (choice.route, choice.basis, choice.seconds) == ("default", "unknown", None)
    assert choice.reason == "never measured, nor anything like it"
    assert best_route(profile(), OP, threads=1).basis == "unknown"


def test_distance():
    conv = Conv2d(4, 8, 31, 31, 8, 3, 3, 1, 1, 1, 1, "fp32")
    assert distance(row(conv), conv) == 0
    assert distance(row(conv), replace(conv, height=63)) == pytest.approx(1.0)
    assert distance(row(conv), replace(conv, batch=9, height=63)) == pytest.approx(2**0.5)
    for changed in (
        {"kernel_h": 5},
        {"stride_w": 2},
        {"dtype": "bf16"},
        {"direction": "weight_gradient"},
        {"groups": 2},
    ):
        assert distance(row(conv), replace(conv, **changed)) == float("inf")
    clip = Elementwise("clip", 64, 1, 1, "fp32")
    assert distance(row(clip), replace(clip, name="relu")) == float("inf")
    assert distance(row(clip), conv) == float("inf")
