"""Recipes on a machine: both Breakdowns, what the source takes, and the file that train writes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import synthetic_profile
from tests.processes import PATIENCE_S
from turbopump.core.config import Config, LaunchConfig, LiveConfig, OptimizerConfig, PrecisionConfig
from turbopump.core.errors import UsageError
from turbopump.core.files import from_json
from turbopump.core.rundir import RunDir
from turbopump.data.tones import TonesConfig
from turbopump.hardware import detect
from turbopump.hardware.profile import save
from turbopump.models.deepspeech2.config import DeepSpeech2Config
from turbopump.planner import own_run
from turbopump.planner.own_run import begin_prediction, ops_of, predict_recipe, prediction_record, run_of, try_source
from turbopump.planner.own_step import PARTS

MODEL = DeepSpeech2Config(num_labels=9, frequencies=64, conv_channels=4, num_layers=2, hidden_size=32)
RECIPE = Config(model=MODEL, data=TonesConfig(validation_samples=8), global_batch=8, num_steps=50,
                launch=LaunchConfig(threads=1))  # fmt: skip


@pytest.fixture(scope="module")
def profile():
    return replace(synthetic_profile.build(), fingerprint=detect.fingerprint())


def test_both_breakdowns_with_their_bands(profile):
    found = predict_recipe(RECIPE, profile)
    assert found.step.step.data > 0 and found.step.total_low_s < found.step.total_s < found.step.total_high_s
    assert found.run.steps == pytest.approx(50 * found.step.total_s)
    assert found.run.evaluation > 0 and found.run.checkpoint > 0 and found.run.lost == 0
    assert found.run_low.startup < found.run.startup < found.run_high.startup
    assert found.run_total_low_s < found.run.total < found.run_total_high_s


def test_lengths_are_those_of_batches_not_the_longest(profile):
    longest = run_of(replace(RECIPE, data=TonesConfig(min_labels=6, max_labels=6)), "fp32").workload.units
    assert run_of(RECIPE, "fp32").workload.units < 0.98 * longest
    assert run_of(replace(RECIPE, microbatch=2), "fp32").num_microbatches == 4
    assert run_of(RECIPE, "fp32", 2).workload.samples == 4


@pytest.mark.slow
def test_auto_takes_the_faster_and_says_so(profile):
    auto = predict_recipe(replace(RECIPE, precision=PrecisionConfig("auto")), profile)
    each = {dtype: predict_recipe(replace(RECIPE, precision=PrecisionConfig(dtype)), profile)
            for dtype in ("fp32", "bf16")}  # fmt: skip
    assert auto.dtype == min(each, key=lambda dtype: each[dtype].step.total_s) and "auto" in auto.notes[0]


def test_other_thread_counts_are_said(profile):
    found = predict_recipe(replace(RECIPE, launch=LaunchConfig(threads=7)), profile)
    assert found.threads != 7 and "7 threads" in found.notes[0]


def test_a_live_model_is_refused(profile):
    with pytest.raises(UsageError, match="live model"):
        predict_recipe(replace(RECIPE, model=LiveConfig()), profile)


def test_operations_worth_measuring_are_those_of_the_step(profile):
    ops = ops_of(replace(RECIPE, optimizer=OptimizerConfig(clip_norm=0.0)), "bf16", 2)
    kinds = {type(op).__name__ for op in ops}
    assert {"Rnn", "Conv2d", "Ctc", "OptimizerStep", "MemoryCopy", "AllReduce"} <= kinds and len(ops) == len(set(ops))


class Source:
    """Draws from numpy's generator; counts what is read."""

    randomness = "seeded"

    def __init__(self) -> None:
        self.read = 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int):
        self.read += 1
        return np.full(3, index, np.float32), np.float32(np.random.rand())


def test_trying_a_source_leaves_the_generators_alone():
    np.random.seed(5)
    source, expected = Source(), np.random.RandomState(5).rand()
    seconds, frames = try_source(source, 16)
    assert seconds > 0 and frames == 0 and 16 <= source.read <= 16 * own_run.SAMPLED_BATCHES
    assert np.random.rand() == expected


def test_the_file_says_what_was_expected_or_why_not(profile, tmp_path):
    machine = tmp_path / "machine.json"
    save(profile, machine)
    record = prediction_record(RECIPE, machine, num_processes=1)
    assert set(record["step"]) == {*PARTS, "total"} and record["low"]["total"] < record["step"]["total"]
    assert record["run"]["total"] > 50 * record["step"]["total"] and "problem" not in record
    save(replace(profile, fingerprint="0" * 16), machine)
    assert "this machine is" in prediction_record(RECIPE, machine)["problem"]
    machine.write_text("{}")
    assert "not a machine file" in prediction_record(RECIPE, machine)["problem"]


@pytest.mark.slow
def test_it_is_written_beside_the_start_and_by_the_end(profile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir(tmp_path / "run")
    run.create()
    assert begin_prediction(RECIPE, run) is None  # no machine file
    save(profile, Path("machine.json"))
    monkeypatch.setattr(own_run, "PATIENCE_S", PATIENCE_S)  # it runs at the lowest priority
    with own_run.predicting(RECIPE, run):
        pass
    assert from_json(run.prediction.read_bytes())["num_steps"] == 50
    before = run.prediction.stat().st_mtime_ns
    with own_run.predicting(RECIPE, run):  # a resumed run keeps what was said of it
        pass
    assert run.prediction.stat().st_mtime_ns == before
    run.prediction.unlink()
    with pytest.raises(RuntimeError), own_run.predicting(RECIPE, run):
        raise RuntimeError("the run failed")


def test_the_start_does_not_wait_for_it_and_the_end_does(tmp_path, monkeypatch):
    endless = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    monkeypatch.setattr(own_run, "begin_prediction", lambda *_, **__: endless)
    monkeypatch.setattr(own_run, "PATIENCE_S", PATIENCE_S)
    with own_run.predicting(RECIPE, RunDir(tmp_path / "run")):
        assert endless.poll() is None
        endless.stdin.close()
    assert endless.returncode == 0


@pytest.mark.slow
def test_no_torch_is_needed():
    code = "import sys, turbopump.planner.own_run, turbopump.planner.run_calibration; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
