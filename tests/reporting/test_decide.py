"""Decisions rest on a number of this run or this machine, and are made only where it matters."""

import pytest

from tests.synthetic_run import Shape, write_run
from turbopump.reporting.account import run_shares, summarize
from turbopump.reporting.decide import changes, faster_dtype, limits, nothing_to_change
from turbopump.reporting.load import load_run
from turbopump.reporting.words import headline, percent

CALM = Shape(num_steps=300, evaluate_every=300, evaluation_s=0.2, data_s=0.0005, optimizer_s=0.004, startup_s=1.0,
             checkpoint_every=300)  # fmt: skip


def summary_of(path, shape):
    return summarize(load_run(write_run(path / "run", shape).path))


def found(path, **changed):
    summary = summary_of(path, Shape(**{**CALM.__dict__, **changed}))
    return summary, {f.title: f for f in changes(summary)}


def test_a_good_run_is_left_alone(tmp_path):
    summary, titles = found(tmp_path)
    assert titles == {}
    assert nothing_to_change(summary).startswith("Nothing is worth changing: the largest cost beside arithmetic is opt")
    assert "the measured limit" in limits(summary)[0].title


@pytest.mark.parametrize(
    ("title", "kind", "setting", "changed"),
    [
        ("Feed the model faster", "data", "loader.num_workers (now 0)", {"data_s": 0.02}),
        ("Checkpoints stop the run", "checkpoint", "checkpoint.asynchronous (now true)",
         {"stall_s": 1.0, "checkpoint_every": 30}),
        ("Evaluate less often, or on fewer samples", "evaluation", "evaluation.every (now 30)",
         {"evaluation_s": 2.0, "evaluate_every": 30}),
        ("Communicate less often", "exposed_communication", "global_batch (now 16)", {"communication_s": 0.02}),
        ("The optimizer weighs much against so small a batch", "optimizer", "global_batch", {"optimizer_s": 0.06}),
        ("Save more often than the run is interrupted", "lost", "checkpoint.every",
         {"killed_after": 200, "checkpoint_every": 150}),
        ("Start-up weighs much in so short a run", "startup", "num_steps (now 300)", {"startup_s": 30.0}),
        ("Unexplained time in the step", "other", None, {"other_s": 0.02}),
    ],
)  # fmt: skip
def test_a_cost_that_matters_is_named_with_what_it_took(tmp_path, title, kind, setting, changed):
    summary, titles = found(tmp_path, **changed)
    finding = titles[title]
    assert finding.saves_at_most_s == pytest.approx(run_shares(summary)[kind]) and finding.basis == "this run"
    assert percent(run_shares(summary)[kind] / summary.run.wall_s) in finding.evidence
    assert setting is None or setting in finding.setting


def test_changes_are_ranked_by_the_most_they_save(tmp_path):
    summary, _ = found(tmp_path, data_s=0.03, communication_s=0.01, other_s=0.02, evaluation_s=3.0, evaluate_every=50)
    savings = [f.saves_at_most_s for f in changes(summary) if f.saves_at_most_s is not None]
    assert len(savings) >= 4 and savings == sorted(savings, reverse=True)


def test_time_between_attempts(tmp_path):
    _, titles = found(tmp_path, killed_after=300, checkpoint_every=150, num_steps=400, gap_s=30.0)
    assert titles["Restart sooner"].saves_at_most_s == pytest.approx(30.0)


def test_nan_comes_first(tmp_path):
    summary, _ = found(tmp_path, nan_from=290, data_s=0.05)
    first = changes(summary)[0]
    assert first.about == "wrong" and "11 of 300 steps, the first at step 290" in first.evidence


def rates(**by_dtype):
    rows = [{"route": "default", "op": f"Gemm(m=8,n=8,k=8,dtype={d})", "flops_per_s": r} for d, r in by_dtype.items()]
    return {"limit": {"flops_per_s": max(by_dtype.values()), "dtype": "fp32", "rows": rows}}


def test_another_dtype_only_where_this_machine_was_measured_to_be_faster(tmp_path):
    def summary(name, env, compute="fp32"):
        run = write_run(tmp_path / name, Shape(num_steps=60, env=env, config={"precision.compute": compute}))
        run.choices.unlink()
        return summarize(load_run(run.path))

    fast = summary("fast", rates(fp32=1e12, bf16=2.5e12))
    dtype, ratio, evidence = faster_dtype(fast)
    assert (dtype, ratio) == ("bf16", 2.5) and "2.50 times" in evidence
    finding = next(f for f in changes(fast) if f.title == "Compute in bf16")
    assert finding.basis == "this machine" and finding.saves_at_most_s < fast.run.breakdown.steps * 0.6
    assert faster_dtype(summary("same", rates(fp32=1e12, bf16=1.05e12))) is None
    only = summary("only", rates(fp32=1e12))
    assert faster_dtype(only) is None
    advice = next(f for f in changes(only) if f.title == "See whether bf16 is faster here")
    assert advice.saves_at_most_s is None and advice.setting == "precision.compute (now fp32)"
    assert faster_dtype(summary("used", rates(fp32=1e12, bf16=2.5e12), "bf16")) is None
    chosen = write_run(tmp_path / "chosen", Shape(num_steps=60, env=rates(fp32=1e12, bf16=2e12)))
    assert faster_dtype(summarize(load_run(chosen.path))) is None  # a trial has answered the question


def test_a_limit_that_is_passed_is_called_wrong(tmp_path):
    _, titles = found(tmp_path, env={"limit": {"flops_per_s": 1e11, "dtype": "bf16"}})
    assert "The limit was measured too low" in titles


def test_a_route_that_is_faster_than_the_default_is_named(tmp_path):
    rows = [{"route": "default", "flops_per_s": 5e11}, {"route": "other", "flops_per_s": 1e12}]
    limit = {"flops_per_s": 1e12, "dtype": "bf16", "route": "other", "rows": rows}
    below = next(f for f in limits(found(tmp_path, env={"limit": limit})[0]) if "below" in f.title)
    assert "the route other; the library's default reaches 50 % of it" in below.action


def test_a_machine_that_was_shared(tmp_path):
    summary, titles = found(tmp_path, disturbed=0.15)
    finding = titles["Steps are uneven"]
    assert "most of the difference is forward and backward" in finding.evidence
    steps = summary.steps
    assert finding.saves_at_most_s == pytest.approx((steps.mean_s - steps.median_s) * steps.num_steps)


def test_a_slow_rank(tmp_path):
    _, titles = found(tmp_path, num_ranks=2, slow_rank=1)
    assert "Rank 1 holds the others up" in titles
    assert "Rank 1 holds the others up" not in found(tmp_path / "even", num_ranks=2)[1]


def test_cores(tmp_path):
    _, titles = found(tmp_path, env={"threads": 1})
    assert titles["Cores stand idle"].saves_at_most_s is None  # no gain is named that was not measured
    assert "1 processes of 1 threads on 2 cores" in titles["Cores stand idle"].evidence


def test_learning(tmp_path):
    _, titles = found(tmp_path, evaluate_every=25, num_steps=300)
    overfit = write_run(tmp_path / "overfit", Shape(num_steps=100, evaluate_every=10))
    text = overfit.metrics.read_text().splitlines()
    text.append('{"type":"evaluation","step":100,"split":"validation","loss":9.0,"bits_per_byte":9.0}')
    overfit.metrics.write_text("\n".join(text))
    titles = [f.title for f in changes(summarize(load_run(overfit.path)))]
    assert "The model was better before the end" in titles


def test_headline(tmp_path):
    text = headline(summary_of(tmp_path, Shape(num_steps=1500)))
    assert text.startswith("A transformer of 4.99 M parameters was trained for 1,500 steps in 3 min")
    assert "bits per byte on held-out data went from 4.707 (step 0) to 1.8" in text
    assert "forward and backward" in text


def test_percent():
    assert [percent(v) for v in (0.004, 0.0734, 0.0996, 0.81)] == ["0.4 %", "7.3 %", "10 %", "81 %"]
    assert percent(float("nan")) == "not measured"
