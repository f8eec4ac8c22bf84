"""The transformer's kernels as routes: they compute what the model does, at shapes of any size."""

import pytest
import torch

from turbopump.compute import kernels, routes
from turbopump.compute.ops import Attention, CrossEntropy, Gemm, Norm
from turbopump.models.transformer.kernels import ROUTES


def run(op, name="transformer"):
    given = kernels.inputs(op, "cpu", torch.Generator().manual_seed(0))
    route = routes.find(op, "cpu", name)
    with route.setting():
        out = route.ready(op, tuple(x.clone() for x in given))()
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("op", [
    Attention(2, 4, 2, 48, 48, 16, True, "fp32"), Attention(2, 4, 2, 48, 48, 16, True, "fp32", backward=True),
    Norm("rms", 24, 32, "fp32"), Norm("rms", 24, 32, "fp32", backward=True),
])  # fmt: skip
def test_they_give_what_pytorchs_functions_do(op):
    for ours, theirs in zip(run(op), run(op, "default"), strict=True):
        assert torch.allclose(ours, theirs, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_two_halves_of_the_loss(dtype):
    op = CrossEntropy(16, 50, dtype)
    _, _, losses = run(op)
    (mean,) = run(op, "default")
    assert float(losses.mean()) == pytest.approx(float(mean), rel=1e-2)
    (grad,) = run(CrossEntropy(16, 50, dtype, backward=True))
    (theirs,) = run(CrossEntropy(16, 50, dtype, backward=True), "default")
    assert torch.allclose(grad.float(), theirs.float(), atol=2e-3)


def test_for_what_they_stand():
    assert routes.find(Attention(1, 2, 2, 8, 16, 8, True, "fp32"), "cpu", "transformer") is None
    assert routes.find(Gemm(8, 8, 8, "fp32"), "cpu", "transformer") is None
    assert all(not route.comparable and route.problem(Norm("rms", 8, 8, "fp32"), "cuda") for route in ROUTES[:1])
