"""What the numbers add up to."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.synthetic_run import Shape, write_run
from turbopump.reporting.account import WARMUP_STEPS, counted_steps, run_shares, summarize, time_bins
from turbopump.reporting.load import STEP_FIELDS, load_run

ROUGH = Shape(num_steps=120, evaluate_every=30, checkpoint_every=50, killed_after=80, num_ranks=2, slow_rank=1,
              communication_s=0.02)  # fmt: skip


def summary_of(path, shape=ROUGH, **changed):
    return summarize(load_run(write_run(path / "run", shape).path))


def test_breakdowns_sum_to_wall_time(tmp_path):
    summary = summary_of(tmp_path)
    run, steps = summary.run, summary.steps
    assert run.breakdown.total == pytest.approx(run.wall_s, rel=1e-9) and abs(run.sum_error_s) < 1e-6
    assert steps.mean.total == pytest.approx(steps.mean_s, rel=1e-9)
    assert sum(bar.s for bar in summary.waterfall) == pytest.approx(steps.mean_s, rel=1e-9)
    assert sum(run_shares(summary).values()) == pytest.approx(run.wall_s, rel=1e-9)
    idle = run.idle_between_attempts_s + run.idle_logging_s + run.idle_unexplained_s
    assert idle == pytest.approx(run.breakdown.idle)


def test_a_run_that_was_killed(tmp_path):
    run = summary_of(tmp_path).run
    assert run.num_attempts == 2 and run.num_lost_steps == 30
    assert run.idle_between_attempts_s == pytest.approx(40.0)
    assert run.breakdown.startup == pytest.approx(13.0)
    assert run.breakdown.evaluation == pytest.approx(7 * 2.4)  # one of them before the kill, and again after


def test_warm_up_and_lost_steps_are_left_out(tmp_path):
    summary = summary_of(tmp_path)
    assert summary.steps.num_warmup_excluded == 2 * WARMUP_STEPS
    assert summary.steps.num_steps == 120 - 2 * WARMUP_STEPS
    main = load_run(tmp_path / "run").ranks[0]
    left_out = main.step[~counted_steps(main) & ~main.lost].tolist()
    assert left_out == [1, 2, 3, 51, 52, 53]
    assert summary.steps.mean.compute == pytest.approx(0.118, rel=0.03)
    assert summary.steps.median.optimizer == pytest.approx(0.011, rel=0.03)


def test_a_short_attempt_keeps_most_of_its_steps(tmp_path):
    assert summary_of(tmp_path, Shape(num_steps=4)).steps.num_steps == 3


def test_shares_of_the_limit(tmp_path):
    summary = summary_of(tmp_path, Shape(num_steps=60))
    speed, steps = summary.speed, summary.steps
    assert speed.limit_flops_per_s == 1.02e12
    assert speed.share_of_limit == pytest.approx(8.6e10 / steps.mean_s / 1.02e12)
    assert speed.compute_share_of_limit == pytest.approx(8.6e10 / steps.mean.compute / 1.02e12)
    assert speed.mfu is None
    names = [bar.name for bar in summary.waterfall]
    assert names[:2] == ["ideal", "below_limit"] and summary.waterfall[0].s == pytest.approx(8.6e10 / 1.02e12)


@pytest.mark.parametrize(("scope", "factor"), [(None, 2), ("run", 1)])
def test_a_limit_of_one_process_counts_for_each(tmp_path, scope, factor):
    limit = {"flops_per_s": 4e11, "dtype": "bf16"} | ({"limit_scope": scope} if scope else {})
    shape = Shape(num_steps=40, num_ranks=2, env={"limit": limit, "datasheet_flops_per_s": 1e12})
    speed = summary_of(tmp_path, shape).speed
    assert speed.limit_flops_per_s == 4e11 * factor
    assert speed.mfu == pytest.approx(speed.model_flops_per_s / (1e12 * factor))


def test_without_a_limit_nothing_is_claimed(tmp_path):
    run = write_run(tmp_path / "run", Shape(num_steps=40))
    run.env.write_text("{}")
    summary = summarize(load_run(run.path))
    assert summary.speed.share_of_limit is None and summary.speed.mfu is None
    assert summary.waterfall[0].name == "compute"
    assert summary.params is None and summary.speed.units_per_s is not None  # from the progress records


def test_quality_is_the_first_metric_people_ask_for(tmp_path):
    quality = summary_of(tmp_path, Shape(num_steps=60, evaluate_every=20)).quality
    assert (quality.metric, quality.split, quality.first_step, quality.last_step) == (
        "bits_per_byte",
        "validation",
        0,
        60,
    )
    assert quality.last < quality.first
    run = write_run(tmp_path / "accurate", Shape(num_steps=20))
    with run.metrics.open("a") as file:
        for step, accuracy in ((10, 0.5), (15, 0.9), (20, 0.8)):
            record = {"type": "evaluation", "step": step, "split": "test", "accuracy": accuracy, "loss": 1.0}
            file.write(json.dumps(record) + "\n")
    kept = [line for line in run.metrics.read_text().splitlines() if '"validation"' not in line]
    run.metrics.write_text("\n".join(kept))
    quality = summarize(load_run(run.path)).quality
    assert (quality.metric, quality.best_step, quality.best, quality.last) == ("accuracy", 15, 0.9, 0.8)


def test_time_over_the_run_is_the_breakdown_cut_into_moments(tmp_path):
    summary = summary_of(tmp_path)
    main = load_run(tmp_path / "run").ranks[0]
    edges, kinds = time_bins(main, 37)
    assert sum(kinds.values()) == pytest.approx(np.diff(edges), rel=1e-6)
    steps_s = sum(kinds[name].sum() for name in STEP_FIELDS)
    assert steps_s == pytest.approx(summary.run.breakdown.steps)
    for name in ("startup", "evaluation", "checkpoint", "lost", "idle"):
        assert kinds[name].sum() == pytest.approx(getattr(summary.run.breakdown, name), abs=1e-6), name


def test_checkpoints_on_disk_and_pruned(tmp_path):
    run = write_run(tmp_path / "run", Shape(num_steps=100, checkpoint_every=25))
    (run.checkpoints / "step-00000050" / "manifest.json").unlink()
    rows = summarize(load_run(run.path)).checkpoints
    assert [(r["step"], r["kept"]) for r in rows] == [(25, True), (50, False), (75, True), (100, True)]


@pytest.mark.slow
@given(gap_s=st.floats(0, 1e5), killed=st.integers(1, 39), every=st.integers(1, 40), steps=st.integers(40, 50))
def test_breakdowns_sum_whatever_happens(tmp_path_factory, gap_s, killed, every, steps):
    shape = Shape(num_steps=steps, killed_after=killed, checkpoint_every=every, evaluate_every=7, gap_s=gap_s)
    summary = summary_of(tmp_path_factory.mktemp("run"), shape)
    assert summary.run.breakdown.total == pytest.approx(summary.run.wall_s, rel=1e-6)
    assert summary.steps.mean.total == pytest.approx(summary.steps.mean_s)
    assert summary.num_steps_done == steps
