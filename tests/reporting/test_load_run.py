"""Reading a run directory: resumes, NaN, what is missing and what is damaged."""

import json
import shutil

import numpy as np
import pytest

from tests.synthetic_run import Shape, write_run
from turbopump.core.errors import UsageError
from turbopump.core.files import read_json_lines
from turbopump.core.spans import StepBreakdown, run_breakdown, step_breakdown
from turbopump.reporting.load import STEP_FIELDS, load_run

KILLED = Shape(num_steps=100, evaluate_every=20, checkpoint_every=40, killed_after=70)


def test_columns_agree_with_the_records_read_by_core(tmp_path):
    run = write_run(tmp_path / "run", Shape(num_steps=60, communication_s=0.01))
    main = load_run(run.path).ranks[0]
    records = list(read_json_lines(run.spans(0)))
    assert main.breakdown == run_breakdown(records)
    mean = StepBreakdown(**dict(zip(STEP_FIELDS, main.parts.mean(0))))
    for name in STEP_FIELDS:
        assert getattr(mean, name) == pytest.approx(getattr(step_breakdown(records), name), rel=1e-9)
    assert main.parts.sum(1) == pytest.approx(main.step_s)


def test_steps_done_again_are_lost_and_the_later_record_counts(tmp_path):
    loaded = load_run(write_run(tmp_path / "run", KILLED).path)
    main = loaded.ranks[0]
    assert [a.restored_step for a in main.attempts] == [None, 40]
    assert [a.end_reason for a in main.attempts] == [None, "finished"]
    assert main.step[main.lost].tolist() == list(range(41, 71))
    assert main.step[~main.lost].tolist() == list(range(1, 101))
    assert main.attempt[~main.lost].tolist() == [0] * 40 + [1] * 60
    assert loaded.metrics.steps["step"].tolist() == list(range(1, 101))
    assert [r["step"] for r in loaded.metrics.evaluations] == [0, 20, 40, 60, 80, 100]
    records = [
        r for r in read_json_lines(tmp_path / "run" / "metrics.jsonl") if r["type"] == "step" and r["step"] == 50
    ]
    assert len(records) == 2 and loaded.metrics.steps["loss"][49] == records[1]["loss"]


def test_a_run_cut_back_and_ended_early_shows_only_what_counts(tmp_path):
    run = write_run(tmp_path / "run", Shape(num_steps=30))
    with run.metrics.open("a") as file:
        for step in range(21, 24):
            file.write(json.dumps({"type": "step", "step": step, "loss": 9.0, "grad_norm": 1.0, "lr": 0.1}) + "\n")
    steps = load_run(run.path).metrics.steps
    assert steps["step"].tolist() == list(range(1, 24)) and steps["loss"][20:].tolist() == [9.0] * 3


def test_an_attempt_that_starts_over_without_a_restore_loses_the_first(tmp_path):
    run = write_run(tmp_path / "run", KILLED)
    lines = [line for line in run.spans(0).read_text().splitlines() if '"restore"' not in line]
    run.spans(0).write_text("\n".join(lines) + "\n")
    assert load_run(run.path).ranks[0].step[~load_run(run.path).ranks[0].lost].tolist() == list(range(1, 101))


def test_null_losses_are_nan(tmp_path):
    loss = load_run(write_run(tmp_path / "run", Shape(num_steps=30, nan_from=25)).path).metrics.steps["loss"]
    assert np.isfinite(loss[:24]).all() and np.isnan(loss[24:]).all()


def test_damaged_lines_are_passed_over_with_a_note(tmp_path):
    run = write_run(tmp_path / "run", Shape(num_steps=30))
    for path in (run.metrics, run.spans(0)):
        with path.open("ab") as file:
            file.write(b'{"type": "step", "st\n\xff\xfe\n[1, 2]\n\n{"type": "step"}\n')
    loaded = load_run(run.path)
    assert loaded.metrics.steps["step"].tolist() == loaded.ranks[0].step.tolist() == list(range(1, 31))
    assert "metrics.jsonl: 3 damaged lines passed over" in loaded.notes
    assert "rank0.jsonl: 3 damaged lines passed over" in loaded.notes
    assert "rank0.jsonl: 1 records without the expected fields passed over" in loaded.notes


@pytest.mark.parametrize("name", ["env.json", "choices.toml", "spans", "metrics.jsonl", "checkpoints", "samples.jsonl"])
def test_anything_may_be_missing(tmp_path, name):
    run = write_run(tmp_path / "run", Shape(num_steps=30))
    path = run.path / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    loaded = load_run(run.path)
    assert loaded.name == "demo"
    optional = name in ("choices.toml", "checkpoints", "samples.jsonl")
    assert (loaded.notes == ()) == optional


@pytest.mark.parametrize("content", ["[]", "null", "{", '{"workload": 3, "limit": [], "world_size": "two"}'])
def test_env_of_any_shape(tmp_path, content):
    run = write_run(tmp_path / "run", Shape(num_steps=30))
    run.env.write_text(content)
    load_run(run.path)


def test_no_run(tmp_path):
    with pytest.raises(UsageError, match="not a run directory"):
        load_run(tmp_path)


def test_ranks_are_sorted_by_number(tmp_path):
    run = write_run(tmp_path / "run", Shape(num_steps=12, num_ranks=2))
    shutil.copy(run.spans(1), run.spans(10))
    assert [r.rank for r in load_run(run.path).ranks] == [0, 1, 10]
