"""Muon against torch's own, its fixed point, and its states."""

import pytest
import torch

from turbopump.training.muon import Muon, orthogonalize

SHAPES = [(24, 24), (48, 16), (16, 48), (24, 24)]


def parameters() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def test_the_update_is_that_of_torch() -> None:
    ours, theirs = parameters(), parameters()
    settings = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
    a = Muon(ours, **settings, dtype=torch.bfloat16)
    b = torch.optim.Muon(theirs, **settings)
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        for p, q in zip(ours, theirs):
            p.grad = torch.randn(p.shape, generator=generator)
            q.grad = p.grad.clone()
        before = [p.detach().clone() for p in ours]
        a.step()
        b.step()
        for p, q, old in zip(ours, theirs, before):
            moved = (q - old).norm()
            assert (p - q).norm() < 0.02 * moved  # bf16 iterations in another order


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 40, 8), (2, 8, 40)])
def test_singular_values_come_near_one(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    values = torch.linalg.svdvals(orthogonalize(x, 8))
    assert values.min() > 0.6 and values.max() < 1.25
    u, _, v = torch.linalg.svd(x, full_matrices=False)
    alignment = torch.einsum("nrk,nrc,nkc->nk", u, orthogonalize(x, 8), v)
    assert alignment.min() > 0.6  # the singular vectors are kept


def test_a_parameter_without_gradient_stays() -> None:
    first, second = parameters()[:2]
    second_before = second.detach().clone()
    first.grad = torch.ones_like(first)
    optimizer = Muon([first, second], weight_decay=0.5)
    optimizer.step()
    assert torch.equal(second, second_before) and second not in optimizer.state
