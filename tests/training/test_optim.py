"""Schedule, parameter groups, clipping, the skip of a non-finite update, and states by name."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from turbopump.core.config import OptimizerConfig, ScheduleConfig
from turbopump.training.optim import StepOptimizer, base_optimizers, lr_multiplier, parameter_groups


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))])
        self.head = nn.Linear(4, 10, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.blocks[0](self.embed(tokens)))


def make(kind: str = "adamw", **settings: float) -> tuple[Toy, StepOptimizer]:
    torch.manual_seed(0)
    model = Toy()
    config = OptimizerConfig(kind=kind, **settings)
    return model, StepOptimizer(base_optimizers(model, config), schedule=lambda _: 1.0, clip_norm=1.0)


def backward(model: Toy, scale: float = 1.0) -> None:
    (model(torch.arange(10)).square().mean() * scale).backward()


@given(st.sampled_from(["cosine", "wsd", "constant"]), st.integers(0, 50), st.integers(1, 200), st.floats(0, 1))
def test_multiplier_stays_between_zero_and_one(kind: str, warmup: int, num_steps: int, final: float) -> None:
    config = ScheduleConfig(kind=kind, warmup_steps=warmup, final_fraction=final)
    values = [lr_multiplier(config, step, num_steps) for step in range(num_steps)]
    assert all(0 <= v <= 1 for v in values)
    assert values[:warmup] == sorted(values[:warmup])


def test_schedules_have_their_shapes() -> None:
    cosine = ScheduleConfig(kind="cosine", warmup_steps=10, final_fraction=0.1)
    assert lr_multiplier(cosine, 0, 100) == 0.1
    assert lr_multiplier(cosine, 10, 100) == 1.0
    assert lr_multiplier(cosine, 55, 100) == pytest.approx(0.55)
    assert lr_multiplier(cosine, 100, 100) == pytest.approx(0.1)
    wsd = ScheduleConfig(kind="wsd", warmup_steps=0, decay_fraction=0.5, final_fraction=0.0)
    assert [lr_multiplier(wsd, s, 100) for s in (0, 50, 75)] == [1.0, 1.0, 0.5]


def test_vectors_get_no_weight_decay_and_muon_gets_only_inner_matrices() -> None:
    model = Toy()
    names = {id(p): n for n, p in model.named_parameters()}
    groups = parameter_groups(model, OptimizerConfig(kind="muon", weight_decay=0.3))
    assert [names[id(p)] for p in groups["muon"][0]["params"]] == ["blocks.0.0.weight"]
    decay, rest = groups["adamw"]
    assert {names[id(p)] for p in decay["params"]} == {"embed.weight", "head.weight"} and decay["weight_decay"] == 0.3
    assert all(p.ndim == 1 for p in rest["params"]) and rest["weight_decay"] == 0.0
    covered = [id(p) for g in [*groups["muon"], *groups["adamw"]] for p in g["params"]]
    assert sorted(covered) == sorted(names)


def test_clipping_is_that_of_torch() -> None:
    model, optimizer = make(lr=0.1)
    backward(model, 1e3)
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()
    assert float(optimizer.grad_norm) == float(norm) > 1
    assert all(p.grad is None for p in model.parameters())
    assert optimizer.num_updates == 1


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_non_finite_gradient_leaves_everything_as_it_was(poison: float) -> None:
    model, optimizer = make(lr=0.1)
    backward(model)
    optimizer.step()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    names = {id(p): n for n, p in model.named_parameters()}
    states = {k: v.clone() for k, v in optimizer.state_tensors(names).items()}
    backward(model, poison)
    optimizer.step()
    assert optimizer.skipped and optimizer.num_updates == 1
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(torch.equal(states[k], v) for k, v in optimizer.state_tensors(names).items())
    backward(model)  # the flag stays: nothing is updated after a step that was given up
    optimizer.step()
    assert optimizer.num_updates == 1 and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_states_by_name_go_on_bit_for_bit(kind: str) -> None:
    model, optimizer = make(kind, lr=0.01, muon_lr=0.01)
    for _ in range(3):
        backward(model)
        optimizer.step()
    names = {id(p): n for n, p in model.named_parameters()}
    twin, other = make(kind, lr=0.01, muon_lr=0.01)
    twin.load_state_dict(model.state_dict())
    other.load_state_tensors(optimizer.state_tensors(names), dict(twin.named_parameters()))
    other.num_updates = optimizer.num_updates
    for _ in range(2):
        for m, o in ((model, optimizer), (twin, other)):
            backward(m)
            o.step()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
