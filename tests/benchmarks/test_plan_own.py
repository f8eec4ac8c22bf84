"""The benchmark of our own runs: its recipes, its clock, what it leaves behind. Its figures are its own business."""

import time

import pytest

from benchmarks import plan_own
from tests import synthetic_profile
from turbopump.comms import data_parallel
from turbopump.core import spans
from turbopump.core.spans import StepBreakdown
from turbopump.planner.own_step import Run, StepModel


def test_the_runs_are_those_that_were_promised(tmp_path):
    chosen = plan_own.recipes(tmp_path)
    assert len({c.name for c in chosen}) == len(chosen) >= 12
    assert {c.model.kind for c in chosen} == {"transformer", "convnet", "deepspeech2"}
    assert {c.precision.compute for c in chosen} == {"fp32", "bf16"}
    assert {c.launch.num_processes for c in chosen} == {1, 2}
    assert 3 <= len(plan_own.recipes(tmp_path, quick=True)) < 6


def test_the_clock_counts_computing_and_waiting_but_not_other_programs():
    before = spans.time, data_parallel.span
    with plan_own._clock_put_back():
        plan_own.count_cpu_time(None)
        plan_own.count_cpu_time(None)  # at every step: once is enough
        recorder = spans.Spans()
        with recorder, recorder.step(1):
            time.sleep(0.05)  # as if another program had the core
            begin = time.perf_counter()
            with data_parallel.span("communication"):
                time.sleep(0.05)
            wall_s = time.perf_counter() - begin
        waited_s = recorder._totals["communication"]
        assert 0.05 <= waited_s <= wall_s and waited_s <= recorder.last_step_s < waited_s + 0.05
    assert (spans.time, data_parallel.span) == before


@pytest.mark.slow
def test_a_small_run_is_measured_and_compared(tmp_path):
    dataset = plan_own.dataset_of(tmp_path)
    config = next(c for c in plan_own.recipes(dataset, quick=True) if c.name == "digits-fp32")
    run = plan_own.measured(config, tmp_path)
    assert run.step.compute > 0 and run.num_steps == config.num_steps - plan_own.WARMUP_STEPS
    (found,) = plan_own.compared([run], synthetic_profile.build())
    assert found.predicted.total_s > 0 and found.error == found.predicted.total_s / run.step.total - 1


def test_a_family_is_left_out_whole(tmp_path):
    names = {plan_own._family(c) for c in plan_own.recipes(tmp_path)}
    assert "lm" in names and not any(name.endswith(("fp32", "bf16", "2p")) for name in names)


def test_errors_are_means_of_sizes():
    predicted = StepModel(synthetic_profile.build()).predict
    run = _run()
    found = predicted(run)
    results = [plan_own.Compared("a", StepBreakdown(compute=found.total_s * f), found) for f in (0.5, 2.0)]
    assert plan_own.mean_error(results) == pytest.approx((1.0 + 0.5) / 2)
    assert not results[0].covered


def _run() -> Run:
    from turbopump.models.convnet.config import KIND, ConvnetConfig

    image = ConvnetConfig(in_channels=1, num_classes=10, width=4, blocks=(1, 1, 1))
    return Run(KIND.workload(image, 4, {"channels": 1, "height": 8, "width": 8}, "fp32"))
