"""The verb `evaluate`: the figures are those of training, of the checkpoint and split asked for; samples are a function
of their seed."""

import gzip
import json

import pytest
import torch

from tests.live_parts import Net, Noisy, loss
from turbopump.core.checkpoint_store import list_checkpoints
from turbopump.core.errors import CorruptCheckpointError, DatasetError, UsageError
from turbopump.core.files import read_json_lines
from turbopump.core.rundir import RunDir
from turbopump.evaluate import choose_checkpoint, evaluate, sample
from turbopump.train import train
from turbopump.training.build import Live


def test_the_figures_are_those_of_training(place) -> None:
    result = evaluate("runs/lm", max_samples=16)
    assert (result.step, result.split, result.samples) == (6, "validation", 16)
    during = [r for r in read_json_lines(RunDir(place / "runs/lm").metrics) if r["type"] == "evaluation"][-1]
    assert result.metrics["loss"] == pytest.approx(during["loss"], rel=1e-6)
    assert result.metrics["bits_per_byte"] == pytest.approx(during["bits_per_byte"], rel=1e-6)
    assert result.yardsticks == {}, "compressors are given the whole split only"
    kept = json.loads((place / "runs/lm/evaluation.json").read_text())
    assert kept["metrics"] == result.metrics and kept["step"] == 6


def test_compressors_stand_beside_the_whole_split(place) -> None:
    result = evaluate("runs/lm")
    text = "".join(t.read_text() for t in sorted((place / "texts").iterdir()))
    held_out = text[-len(text) // 20 :].encode()  # of the same lines: the same redundancy
    expected = 8 * len(gzip.compress(held_out, 9)) / len(held_out)
    assert result.yardsticks["gzip -9"] == pytest.approx(expected, rel=0.5)
    assert set(result.yardsticks) == {"gzip -9", "xz -9"}


def test_step_and_split_are_those_asked_for(place) -> None:
    early, late = evaluate("runs/lm", step=2), evaluate("runs/lm", step=6)
    assert early.step == 2 and early.metrics["loss"] > late.metrics["loss"]
    on_train = evaluate("runs/lm", split="train", max_samples=32)
    assert on_train.split == "train" and on_train.samples == 32
    with pytest.raises(DatasetError, match="no split 'test'"):
        evaluate("runs/lm", split="test")
    with pytest.raises(UsageError, match=r"no checkpoint of step 3 \(there: 2, 4, 6\)"):
        evaluate("runs/lm", step=3)


def test_the_best_checkpoint_is_chosen_and_a_damaged_one_is_not_hidden(place) -> None:
    rundir = RunDir(place / "runs/lm")
    measured = [c for c in list_checkpoints(rundir.checkpoints) if c.metrics]
    assert choose_checkpoint(rundir, None).step == min(measured, key=lambda c: c.metrics["loss"]).step
    (rundir.checkpoints / "step-00000006" / "rank0.safetensors").write_bytes(b"short")
    with pytest.raises(CorruptCheckpointError, match=r"has 5 bytes.*--step 2, 4"):
        evaluate("runs/lm")


def test_json_is_json(place, cli) -> None:
    said = cli("evaluate", "runs/lm", "--json", "--max-samples", "4")
    assert said.code == 0 and json.loads(said.out)["metrics"]["loss"] > 0


def test_samples_are_a_function_of_the_seed(place) -> None:
    first = sample("runs/lm", prompt="line 1", num_tokens=12, seed=1)
    assert first.startswith("line 1")
    torch.rand(3)
    assert first == sample("runs/lm", prompt="line 1", num_tokens=12, seed=1)
    assert first != sample("runs/lm", prompt="line 1", num_tokens=12, seed=2)
    greedy = [sample("runs/lm", prompt="a", num_tokens=5, temperature=0, seed=seed) for seed in (1, 2)]
    assert greedy[0] == greedy[1]
    assert sample("runs/lm", prompt="", num_tokens=2).startswith("\n"), "a model must begin with something"


def test_only_language_models_write(tmp_path) -> None:
    result = train(Net(), Noisy(32), loss=loss, run=tmp_path / "r", num_steps=1, global_batch=4, quiet=True,
                   logging={"limit_s": 0.0})  # fmt: skip
    with pytest.raises(UsageError, match=r"live model.*--model module:function"):
        sample(result.path, prompt="x")


@pytest.mark.parametrize("form", ["objects", "references"])
def test_a_live_run_is_evaluated_with_its_parts(tmp_path, cli, form: str) -> None:
    held_out = Noisy(32)
    result = train(Net(0.0), Noisy(), loss=loss, evaluation_dataset=held_out, run=tmp_path / "r", num_steps=3,
                   global_batch=8, quiet=True, logging={"limit_s": 0.0})  # fmt: skip
    if form == "objects":
        live = Live(Net(0.0), Noisy(), held_out, loss)
        assert evaluate(tmp_path / "r", live=live).metrics["loss"] == pytest.approx(
            result.evaluations[-1]["loss"], rel=0.05
        )
        with pytest.raises(UsageError, match="live model: give it again"):
            evaluate(tmp_path / "r")
        return
    parts = [f"--{name}=tests.live_parts:{function}" for name, function in
             {"model": "build", "dataset": "data", "evaluation-dataset": "data", "loss": "loss"}.items()]  # fmt: skip
    said = cli("evaluate", str(tmp_path / "r"), *parts)
    assert said.code == 0 and "96 samples" in said.out, said.err
