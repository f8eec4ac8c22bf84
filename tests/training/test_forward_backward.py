"""Forward and backward of a step: the gradient is that of the mean over valid units, however the batch is cut."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from turbopump.training.forward_backward import ForwardBackward, autocast, reseed, to_device

CPU = torch.device("cpu")


def masked_loss(model: nn.Module, batch) -> torch.Tensor:
    """Mean over valid units: rows of different numbers of them, as sentences of different lengths."""
    x, mask = batch
    return (model(x).squeeze(-1).square() * mask).sum() / mask.sum()


def weight(batch) -> int:
    return int(batch[1].sum())


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 5, 3, generator=generator)
    mask = (torch.arange(5) < torch.randint(1, 6, (8, 1), generator=generator)).float()
    return x, mask


def make(model: nn.Module, **options) -> ForwardBackward:
    return ForwardBackward(model, masked_loss, weight, device=CPU, compute="fp32", seed=0, **options)


@pytest.mark.parametrize("cuts", [(0, 8), (0, 4, 8), (0, 1, 8), (0, 3, 5, 6, 8)])
def test_however_the_batch_is_cut_the_gradient_is_that_of_the_valid_units(cuts) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    x, mask = data()
    whole = masked_loss(model, (x, mask))
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    step = make(model)
    loss = step([(x[a:b], mask[a:b]) for a, b in itertools.pairwise(cuts)], 0)
    assert not loss.requires_grad and step.global_weight == mask.sum()
    assert float(loss) == pytest.approx(whole.item(), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name])


def test_randomness_is_a_function_of_step_and_microbatch() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1))
    x, mask = data()
    step = make(model)

    def losses(*numbers: int) -> list[float]:
        return [float(step([(x, mask)], number)) for number in numbers]

    first = losses(0, 1, 2)
    torch.rand(7)  # what anybody draws in between does not matter
    assert losses(2, 0, 1) == [first[2], first[0], first[1]] and len(set(first)) == 3
    assert float(make(model, rank=1)([(x, mask)], 0)) != first[0], "ranks draw differently"
    halves = [(x[:4], mask[:4]), (x[:4], mask[:4])]
    both, one = float(step(halves, 0)), float(step(halves[:1], 0))
    assert both != pytest.approx(one, rel=1e-6), "microbatches draw differently"


def test_alone_leaves_gradients_of_one_batch() -> None:
    model = nn.Linear(3, 1)
    x, mask = data()
    make(model).alone((x, mask))
    assert model.weight.grad is not None and model.weight.grad.abs().sum() > 0


def test_arithmetic() -> None:
    with autocast(CPU, "bf16"):
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert F.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_reseed_is_manual_seed() -> None:
    reseed(CPU, 17)
    a = torch.rand(3)
    torch.manual_seed(17)
    assert torch.equal(a, torch.rand(3))


def test_batches_of_any_form_are_moved() -> None:
    from collections import namedtuple

    Pair = namedtuple("Pair", "x y")
    batch = {"a": torch.ones(2), "b": [torch.zeros(1), "text"], "c": Pair(torch.ones(1), 3), "d": (1, None)}
    moved = to_device(batch, torch.device("meta"))
    assert moved["a"].device.type == moved["b"][0].device.type == moved["c"].x.device.type == "meta"
    assert isinstance(moved["c"], Pair) and moved["b"][1] == "text" and moved["d"] == (1, None)
    assert to_device(batch, CPU)["a"] is batch["a"]
