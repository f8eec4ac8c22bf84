"""Goodput: the closed form against a simulation, Daly's interval against a search, published rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from turbopump.core.errors import UsageError
from turbopump.planner.goodput import (
    LLAMA3_CAUSES,
    LLAMA3_DEVICE_HOURS,
    Reliability,
    daly_interval_s,
    expected_time,
    young_interval_s,
)


def simulated_s(
    steps: int, step_s: float, every: int, between_s: float, costs: Reliability, runs: int
) -> tuple[float, float]:
    """Mean and standard error of the wall time of a run that fails at exponential times, event by event."""
    rng = np.random.default_rng(0)
    walls = []
    for _ in range(runs):
        wall, done = 0.0, 0
        fails_at = rng.exponential(between_s)
        while done < steps:
            length = min(every, steps - done) * step_s + costs.checkpoint_s
            if wall + length <= fails_at:
                wall, done = wall + length, done + min(every, steps - done)
                continue
            while True:  # recover, which may fail itself
                wall = fails_at
                fails_at = wall + rng.exponential(between_s)
                if wall + costs.recovery_s <= fails_at:
                    wall += costs.recovery_s
                    break
        walls.append(wall)
    return float(np.mean(walls)), float(np.std(walls) / math.sqrt(runs))


@pytest.mark.parametrize(
    ("num_devices", "every", "costs"),
    [
        (1, 100, Reliability(1.0, 20, 0, 30, 60)),  # a failure an hour
        (20, 40, Reliability(1.0, 5, 0, 10, 50)),  # every 3 minutes
        (60, 7, Reliability(1.0, 2, 0, 5, 20)),  # a minute: recoveries fail, too
    ],
)
def test_the_closed_form_agrees_with_a_simulation(num_devices: int, every: int, costs: Reliability) -> None:
    steps, step_s = 503, 3.0  # the last segment is a short one
    mean, error = simulated_s(steps, step_s, every, costs.seconds_between_failures(num_devices), costs, runs=1500)
    run = expected_time(steps=steps, step_s=step_s, num_devices=num_devices, reliability=costs, interval_steps=every)
    assert abs(run.wall_s - mean) <= 4 * error
    assert run.num_failures == pytest.approx(run.wall_s / run.seconds_between_failures)


@pytest.mark.parametrize("between_s", [300.0, 3600.0, 86400.0])
@pytest.mark.parametrize("checkpoint_s", [1.0, 30.0])
def test_dalys_interval_is_close_to_the_best_of_all(between_s: float, checkpoint_s: float) -> None:
    def wall_s(every: int) -> float:
        costs = Reliability(between_s / 3600, checkpoint_s, 0, 0, 60)
        return expected_time(steps=10**6, step_s=0.5, num_devices=1, reliability=costs, interval_steps=every).wall_s

    best = min(wall_s(round(every)) for every in np.geomspace(2, 20000, 400))
    daly = wall_s(round(daly_interval_s(checkpoint_s, between_s) / 0.5))
    young = wall_s(round(young_interval_s(checkpoint_s, between_s) / 0.5))
    assert daly <= 1.001 * best
    assert daly <= young * (1 + 1e-4)  # the last segment is shorter, by luck


def test_dalys_interval_at_its_limits() -> None:
    assert daly_interval_s(1.0, 1e12) == pytest.approx(young_interval_s(1.0, 1e12), rel=1e-5)
    assert daly_interval_s(500.0, 100.0) == 100.0
    assert daly_interval_s(10.0, math.inf) == math.inf
    assert daly_interval_s(0.0, 100.0) == 0.0


def test_llama3_is_what_its_paper_reports() -> None:
    """419 interruptions in 54 days, more than 90 % effective training time (arXiv:2407.21783)."""
    assert sum(LLAMA3_CAUSES.values()) == 419
    assert round(LLAMA3_DEVICE_HOURS) == 50677
    steps = 54 * 86400 // 5
    run = expected_time(steps=steps, step_s=5.0, num_devices=16384)
    assert run.num_failures == pytest.approx(419 * run.wall_s / (54 * 86400))
    assert run.goodput > 0.90


def test_the_parts_sum_and_goodput_falls_with_the_number_of_devices() -> None:
    shares = []
    for num_devices in (8, 1024, 16384, 100_000):
        run = expected_time(steps=100_000, step_s=2.0, num_devices=num_devices)
        assert min(run.useful_s, run.checkpoint_s, run.lost_s, run.recovery_s) >= 0
        assert run.useful_s == 200_000
        shares.append(run.goodput)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99


def test_without_failures_only_the_last_checkpoint_costs() -> None:
    costs = Reliability(device_hours_per_failure=math.inf, checkpoint_s=10)
    run = expected_time(steps=1000, step_s=1.0, num_devices=10_000, reliability=costs)
    assert (run.interval_steps, run.num_failures, run.wall_s) == (1000, 0.0, 1010.0)


def test_a_checkpoint_not_yet_safe_costs_its_delay_per_failure() -> None:
    given = {"steps": 10_000, "step_s": 1.0, "num_devices": 1000, "interval_steps": 500}
    safe, late = (expected_time(**given, reliability=Reliability(commit_s=s)) for s in (0.0, 100.0))  # type: ignore[arg-type]
    assert late.wall_s - safe.wall_s == pytest.approx(100 * safe.num_failures, rel=0.01)


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"step_s": 0.0}, {"num_devices": 0}, {"interval_steps": 0},
                                   {"step_s": math.inf}])  # fmt: skip
def test_figures_out_of_range_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        expected_time(**{"steps": 10, "step_s": 1.0, "num_devices": 8, **wrong})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["device_hours_per_failure", "checkpoint_s", "commit_s", "detection_s", "restart_s"])
def test_reliability_out_of_range_is_an_error(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        Reliability(**{name: -1.0})


def test_a_run_that_never_ends_is_an_error() -> None:
    with pytest.raises(UsageError, match="too often to get through"):
        expected_time(steps=1000, step_s=1e6, num_devices=10**6, interval_steps=1000)
