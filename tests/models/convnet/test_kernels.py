"""The convnet's operations in its layout: the same numbers as PyTorch's functions."""

from dataclasses import replace

import pytest
import torch

from turbopump.compute import kernels, routes
from turbopump.compute.ops import Conv2d, Norm

OP = Conv2d(4, 8, 8, 8, 16, 3, 3, 2, 2, 1, 1, "fp32")


def run(op, name):
    given = kernels.inputs(op, "cpu", torch.Generator().manual_seed(0))
    route = routes.find(op, "cpu", name)
    with route.setting():
        out = route.ready(op, tuple(x.clone() for x in given))()
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("op", [
    *(replace(OP, direction=d) for d in ("forward", "input_gradient", "weight_gradient")),
    Norm("batch", 64, 8, "fp32"), Norm("batch", 64, 8, "fp32", backward=True),
])  # fmt: skip
def test_they_give_what_pytorchs_functions_do(op):
    for ours, theirs in zip(run(op, "convnet"), run(op, "default"), strict=True):
        assert torch.allclose(ours.reshape(theirs.shape), theirs, atol=1e-4, rtol=1e-3)


def test_a_weights_gradient_has_the_weights_layout():
    (grad,) = run(replace(OP, direction="weight_gradient"), "convnet")
    assert grad.is_contiguous() and routes.find(Norm("rms", 8, 8, "fp32"), "cpu", "convnet") is None
    (y,) = run(replace(OP, dtype="bf16"), "convnet")
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == torch.bfloat16
