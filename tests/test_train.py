"""The verb `train` with a user's own module, dataset and loss: what it returns, writes, refuses and survives."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.live_parts import Net, Noisy, loss
from tests.processes import PATIENCE_S, wait_until
from turbopump.core.checkpoint_store import latest, tensor_digests
from turbopump.core.errors import ConfigError, Interrupted, NonFiniteError, ResumeError, SampleError, UsageError
from turbopump.core.files import read_json_lines
from turbopump.core.rundir import RunDir
from turbopump.core.spans import run_breakdown
from turbopump.train import train

COMMON = {"num_steps": 12, "global_batch": 16, "quiet": True, "logging": {"limit_s": 0.0, "every": 4},
          "checkpoint": {"every": 4, "every_s": 0.0}, "schedule": {"warmup_steps": 2},
          "optimizer": {"lr": 0.01}}  # fmt: skip


def run(path: Path, *, model: Net | None = None, dataset: Noisy | None = None, **settings: object):
    torch.manual_seed(3)
    return train(model or Net(), dataset or Noisy(), loss=loss, run=path, **{**COMMON, **settings})


def steps(path: Path) -> dict[int, tuple[float, float]]:
    records = read_json_lines(RunDir(path).metrics)
    return {r["step"]: (r["loss"], r["grad_norm"]) for r in records if r["type"] == "step"}


def digests(path: Path) -> dict[str, str]:
    return tensor_digests(latest(RunDir(path).checkpoints))


def test_a_live_module_is_trained_in_place_and_its_run_is_complete(tmp_path: Path) -> None:
    model = Net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = run(tmp_path / "run", model=model, evaluation_dataset=Noisy(32))
    assert result.step == 12 and result.model is model
    assert not torch.equal(before["last.weight"], model.last.weight)
    assert set(steps(tmp_path / "run")) == set(range(1, 13))
    assert [e["step"] for e in result.evaluations] == [0, 12]
    assert result.evaluations[1]["loss"] < result.evaluations[0]["loss"]
    rundir = RunDir(tmp_path / "run")
    env = json.loads(rundir.env.read_text())
    assert env["dtype_in_use"] == {"fp32": 1.0}
    products = 3 * 2 * (8 * 32 + 32 * 1) - 2 * 8 * 32  # forward, and backward twice but for the input's gradient
    assert env["workload"]["flops_per_step"] == pytest.approx(16 * products)
    seconds = run_breakdown(read_json_lines(rundir.spans(0)))
    assert seconds.startup > 0 and seconds.steps > 0 and seconds.evaluation > 0 and seconds.checkpoint > 0
    assert seconds.lost == 0


def test_the_same_seed_gives_the_same_run_and_another_seed_does_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(tmp_path / name, seed=seed)
    assert steps(tmp_path / "a") == steps(tmp_path / "b") != steps(tmp_path / "c")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


class Stop:
    """Ends the run from a hook at a step, as a crash would: nothing after it runs."""

    def __init__(self, step: int) -> None:
        self.step = step

    def __call__(self, state) -> None:
        if state.step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_at", [5, 8, 11])
def test_a_run_that_crashed_goes_on_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", hooks=[Stop(stop_at)])
    result = run(tmp_path / "cut")
    assert result.step == 12
    assert steps(tmp_path / "cut") == steps(tmp_path / "whole")
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")
    assert run_breakdown(read_json_lines(RunDir(tmp_path / "cut").spans(0))).lost > 0


def test_accumulated_microbatches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    class Plain(Net):  # without dropout and batch statistics the microbatches' sum is the batch's
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.first(x)))

    for name, microbatch in (("whole", 0), ("parts", 4)):
        torch.manual_seed(3)
        train(Plain(), Noisy(), loss=loss, run=tmp_path / name, microbatch=microbatch, **COMMON)
    for (a, norm_a), (b, norm_b) in zip(steps(tmp_path / "whole").values(), steps(tmp_path / "parts").values()):
        assert a == pytest.approx(b, rel=1e-5) and norm_a == pytest.approx(norm_b, rel=1e-4)


def test_loader_workers_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "none")
    run(tmp_path / "two", loader={"num_workers": 2})
    assert steps(tmp_path / "none") == steps(tmp_path / "two")


def test_a_finished_run_is_left_as_it_is_and_can_be_prolonged(tmp_path: Path) -> None:
    run(tmp_path / "r", schedule={"kind": "constant"})
    before = digests(tmp_path / "r")
    assert run(tmp_path / "r", schedule={"kind": "constant"}).step == 12
    assert digests(tmp_path / "r") == before
    assert run(tmp_path / "r", schedule={"kind": "constant"}, num_steps=16).step == 16
    assert max(steps(tmp_path / "r")) == 16


def test_another_configuration_is_refused_and_shown(tmp_path: Path) -> None:
    run(tmp_path / "r")
    with pytest.raises(ResumeError, match=r"global_batch: 16 in the run, 8 given") as caught:
        run(tmp_path / "r", global_batch=8)
    assert "--from" in str(caught.value)


def test_all_configuration_errors_come_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path / "r", num_step=3, global_batch=-1, optimizer={"lrr": 1})
    text = str(caught.value)
    assert "did you mean 'num_steps'" in text and "global_batch: -1" in text and "did you mean 'lr'" in text
    assert not (tmp_path / "r").exists()


def test_a_nan_record_stops_the_run_before_its_step(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError) as caught:
        run(tmp_path / "r", dataset=Noisy(poison=5), num_steps=30, global_batch=4)
    made = max(steps(tmp_path / "r"), default=0)
    text = str(caught.value)
    assert "5 (epoch 0)" in text
    assert f"step {made + 1}:" in text and " (epoch 0)" in text
    newest = latest(RunDir(tmp_path / "r").checkpoints)
    if made:
        assert newest is not None and newest.name.endswith(f"{made:08d}")
        from turbopump.training.checkpoint import read_weights

        assert all(bool(torch.isfinite(t).all()) for t in read_weights(newest).values() if t.is_floating_point())


class OneBad(Noisy):
    def __getitem__(self, index: int):
        if index == 11:
            raise ValueError("this record is rotten")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_that_raises_is_named(tmp_path: Path, num_workers: int) -> None:
    with pytest.raises(SampleError, match=r"(?s)11.*this record is rotten"):
        run(tmp_path / "r", dataset=OneBad(), num_steps=30, loader={"num_workers": num_workers})


def test_a_new_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    run(tmp_path / "first")
    model = Net()
    run(tmp_path / "second", model=model, start_from=f"{tmp_path / 'first'}@8", num_steps=1, optimizer={"lr": 1e-12})
    from turbopump.train import find_weights
    from turbopump.training.checkpoint import read_weights

    eight = read_weights(find_weights(f"{tmp_path / 'first'}@8"))
    assert torch.allclose(model.first.weight, eight["first.weight"])
    with pytest.raises(UsageError, match=r"no checkpoint of step 7 \(there: .*8, 12"):
        find_weights(f"{tmp_path / 'first'}@7")


def test_own_optimizer_metrics_hooks_and_loggers(tmp_path: Path) -> None:
    seen: list[int] = []
    records: list[str] = []

    class Collect:
        def log(self, record) -> None:
            records.append(record["type"])

        def close(self) -> None:
            records.append("closed")

    result = run(
        tmp_path / "r",
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        evaluation_dataset=Noisy(32),
        metrics=lambda model, batch: {"loss": (float(loss(model, batch)) * len(batch[0]), len(batch[0])),
                                      "largest": (float(model(batch[0]).abs().max()), 1)},
        hooks=[lambda state: seen.append(state.step)],
        loggers=[Collect()],
    )  # fmt: skip
    assert seen == list(range(1, 13))
    assert "largest" in result.evaluations[-1]
    assert records[-1] == "closed" and {"step", "progress", "evaluation", "checkpoint"} <= set(records)


def test_a_parameter_no_loss_reaches_is_no_obstacle(tmp_path: Path) -> None:
    class Spare(Net):
        def __init__(self) -> None:
            super().__init__()
            self.spare = torch.nn.Linear(3, 3)

    assert run(tmp_path / "r", model=Spare()).step == 12
    assert run(tmp_path / "r", model=Spare(), num_steps=14, schedule=COMMON["schedule"]).step == 14


SCRIPT = """
import sys, torch
from tests.live_parts import Net, Noisy, loss
from turbopump.train import train
from turbopump.core.errors import TurbopumpError
import time
torch.manual_seed(3)
try:
    train(Net(), Noisy(), loss=loss, run=sys.argv[1], num_steps=100000, global_batch=16,
          logging={"limit_s": 0.0, "every": 1}, checkpoint={"every_s": 0.0}, hooks=[lambda state: time.sleep(0.01)])
except TurbopumpError as error:
    print("error:", error)
    sys.exit(error.exit_code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_saves_and_says_so(tmp_path: Path, number: signal.Signals) -> None:
    path = tmp_path / "r"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(path)], stdout=subprocess.PIPE, text=True,
                               cwd=Path(__file__).parents[1])  # fmt: skip
    wait_until(lambda: len(steps(path)) >= 3 or process.poll() is not None, "the third step")
    process.send_signal(number)
    out, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number, out
    made = max(steps(path))
    newest = latest(RunDir(path).checkpoints)
    assert newest is not None and newest.name.endswith(f"{made:08d}")
    assert f"stopped by {number.name} after step {made}" in out


def test_interrupted_carries_the_conventional_exit_code() -> None:
    assert Interrupted("x", signal.SIGTERM).exit_code == 143
