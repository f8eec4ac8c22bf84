"""From recipe or live objects to the task: what is taken from where, what is refused, and what observing leaves."""

from pathlib import Path

import pytest
import torch

from tests.live_parts import Net, Noisy, loss
from turbopump.core.config import LiveConfig, load, parse
from turbopump.core.errors import ConfigError, DatasetError, UsageError
from turbopump.core.rundir import RunDir
from turbopump.training.build import Live, build_state, count_samples, loss_metric, measure_speed, observe, resolve_task
from turbopump.training.run import Run


def live_config(**settings):
    tables = {"model": {"kind": "live"}, "data": {"kind": "live"}}
    return parse({**tables, "num_steps": 2, "global_batch": 4, "logging": {"limit_s": 0}, **settings})


def made(path: Path) -> RunDir:
    rundir = RunDir(path)
    rundir.create()
    return rundir


def test_a_recipes_task(place) -> None:
    task = resolve_task(load("lm.toml"))
    assert task.unit == "token" and task.make_optimizer is None
    assert len(task.train_source) > len(task.evaluation_source) > 0
    assert task.workload is not None and task.workload(8, "fp32").units == 8 * 16
    torch.manual_seed(0)
    model = task.build_model()
    assert {"loss"} <= set(task.metrics(model.eval(), torch.zeros(2, 17, dtype=torch.int64)))


def test_live_parts_take_the_place_of_the_recipes(place) -> None:
    model, data = Net(), Noisy()
    task = resolve_task(live_config(), Live(model, data, None, loss))
    assert task.build_model() is model and task.train_source is data and task.evaluation_source is None
    assert (task.unit, task.workload) == ("sample", None)
    batch = (data.x[:6], data.y[:6])
    assert task.weight(batch) == 6
    total, count = torch.no_grad()(task.metrics)(model.eval(), batch)["loss"]
    assert count == 6 and total / 6 == pytest.approx(loss(model, batch).item())
    own = resolve_task(load("lm.toml"), Live(loss=lambda model, batch: model(batch).mean()))
    assert own.weight(torch.zeros(3, 17)) == 3, "the mean of an own loss is over samples unless a weight is given"


def test_what_is_missing_is_said() -> None:
    with pytest.raises(UsageError, match=r"live model: give it again.*--model module:function"):
        resolve_task(live_config())
    with pytest.raises(UsageError, match="live dataset: give it again"):
        resolve_task(live_config(), Live(model=Net(), loss=loss))
    with pytest.raises(UsageError, match=r"a live model needs a loss: loss\(model, batch\)"):
        resolve_task(live_config(), Live(Net(), Noisy()))


def test_data_that_does_not_fit_is_refused_before_a_model_is_built(place) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab_size: 9 given; the dataset has 256 tokens"):
        resolve_task(load("lm.toml", ["model.vocab_size=9"]))
    with pytest.raises(DatasetError, match="no dataset at nowhere"):
        resolve_task(load("lm.toml", ["data.path=nowhere"]))

    class Words(Noisy):
        vocab_size = 300

    config = load("lm.toml", live={"data": {"kind": "live"}})
    assert isinstance(config.data, LiveConfig)
    with Run(config, made(place / "w"), quiet=True) as run:
        with pytest.raises(ConfigError, match=r"model\.vocab_size: 256 given; the dataset has 300 tokens"):
            build_state(config, resolve_task(config, Live(dataset=Words())), run)


def test_a_dataset_without_the_split_is_not_evaluated(place) -> None:
    assert resolve_task(load("lm.toml", ["evaluation.split=absent"])).evaluation_source is None


@pytest.mark.parametrize(
    ("batch", "samples"),
    [
        (torch.zeros(3, 2), 3),
        ((torch.zeros(4), torch.zeros(5)), 4),
        ({"a": torch.zeros(2, 9)}, 2),
        ([[torch.ones(7)]], 7),
    ],
)
def test_samples_of_a_batch(batch, samples: int) -> None:
    assert count_samples(batch) == samples


def test_the_loss_as_a_metric() -> None:
    metric = loss_metric(lambda model, batch: batch.mean(), lambda batch: 2 * len(batch))
    assert metric(Net(), torch.tensor([1.0, 3.0])) == {"loss": (8.0, 4)}


def test_observing_leaves_no_trace_and_measures_what_runs(tmp_path) -> None:
    config = live_config(seed=3)
    task = resolve_task(config, Live(Net(), Noisy(), None, loss))
    with Run(config, made(tmp_path / "r"), quiet=True) as run:
        state = build_state(config, task, run)
        before = {name: t.clone() for name, t in state.model.state_dict().items()}
        flops, samples = observe(state, task)
        assert samples == 2 and set(flops) == {"fp32"}
        assert flops["fp32"] == 2 * (3 * 2 * (8 * 32 + 32) - 2 * 8 * 32)
        assert all(torch.equal(before[name], t) for name, t in state.model.state_dict().items())
        assert all(p.grad is None for p in state.model.parameters())
        speed = measure_speed(config, task, run, state)
        assert speed.flops_per_sample == flops["fp32"] / 2 and speed.limit_flops_per_s is None


def test_weights_at_the_start_are_a_function_of_the_seed(place) -> None:
    def first_weights(seed: int) -> torch.Tensor:
        config = load("lm.toml", [f"seed={seed}", "name=w"])
        with Run(config, made(place / f"w{seed}"), quiet=True) as run:
            torch.rand(seed + 1)
            return build_state(config, resolve_task(config), run).model.embed.weight.detach().clone()

    assert torch.equal(first_weights(1), first_weights(1)) and not torch.equal(first_weights(1), first_weights(2))
