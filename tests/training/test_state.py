"""What survives a stop: names that plain torch knows, buffers put back, weights that must fit."""

import pytest
import torch
from torch import nn

from tests.live_parts import Net, Noisy, loss
from turbopump.core.errors import CheckpointError
from turbopump.core.rundir import RunDir
from turbopump.train import train
from turbopump.training.checkpoint import latest, read_checkpoint, read_weights
from turbopump.training.state import BufferGuard, below, load_model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    model = Net()
    path = tmp_path_factory.mktemp("run") / "r"
    train(model, Noisy(), loss=loss, run=path, num_steps=3, global_batch=8, quiet=True, logging={"limit_s": 0.0})
    return model, latest(RunDir(path).checkpoints)


def test_names_are_those_of_the_plain_module(trained) -> None:
    model, checkpoint = trained
    tensors, values = read_checkpoint(checkpoint)
    assert set(below(tensors, "model.")) == set(model.state_dict())
    moments = {name.rsplit(".", 1)[1] for name in below(tensors, "optimizer.") if name.startswith("optimizer.") or True}
    assert {"exp_avg", "exp_avg_sq", "step"} <= moments
    assert values["step"] == 3 and values["seed"] == 0
    fresh = Net()
    fresh.load_state_dict(read_weights(checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values()))


def test_weights_that_do_not_fit_are_named(trained) -> None:
    _, checkpoint = trained
    weights = read_weights(checkpoint)
    net = Net()
    net.last = nn.Linear(32, 2)
    with pytest.raises(
        CheckpointError, match=r"last\.weight is \(1, 32\) there and \(2, 32\) here.*the model they were"
    ):
        load_model(net, weights)
    with pytest.raises(CheckpointError, match=r"missing \['extra\.bias', 'extra\.weight'\]"):
        net = Net()
        net.extra = nn.Linear(1, 1)
        load_model(net, weights)
    with pytest.raises(CheckpointError, match=r"unknown \['spare'\]"):
        load_model(Net(), {**weights, "spare": torch.zeros(1)})


def test_buffers_go_back_to_where_they_were() -> None:
    norm = nn.BatchNorm1d(2)
    guard = BufferGuard(norm)
    guard.remember()
    before = {name: b.clone() for name, b in norm.named_buffers()}
    norm(torch.randn(8, 2))
    assert not torch.equal(before["running_mean"], norm.running_mean)
    guard.restore()
    assert all(torch.equal(before[name], b) for name, b in norm.named_buffers())
    BufferGuard(nn.Linear(1, 1)).restore()  # nothing to keep


def test_below_cuts_the_prefix() -> None:
    assert below({"a.b": torch.ones(1), "ab": torch.ones(1)}, "a.").keys() == {"b"}
