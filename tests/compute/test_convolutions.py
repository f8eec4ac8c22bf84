"""Every route gives what PyTorch's own convolution gives, in all three directions; refuses what it cannot do."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from turbopump.compute import convolutions
from turbopump.compute.convolutions import ROUTES, fast_size
from turbopump.compute.ops import Conv2d, Gemm

DIRECTIONS = ("forward", "input_gradient", "weight_gradient")
CASES = {
    "same": Conv2d(3, 5, 13, 10, 7, 3, 3, 1, 1, 1, 1, "fp64"),
    "valid, tiles cut": Conv2d(2, 4, 11, 9, 6, 3, 3, 1, 1, 0, 0, "fp64"),
    "wide padding": Conv2d(2, 3, 6, 7, 4, 3, 3, 1, 1, 2, 1, "fp64"),
    "smaller than a tile": Conv2d(1, 2, 3, 4, 3, 3, 3, 1, 1, 0, 0, "fp64"),
    "large kernel, stride": Conv2d(2, 3, 33, 27, 4, 11, 5, 2, 3, 5, 2, "fp64"),
    "even kernel": Conv2d(2, 3, 12, 12, 4, 4, 4, 1, 1, 0, 0, "fp64"),
    "rows left over": Conv2d(2, 3, 24, 18, 4, 5, 5, 2, 2, 0, 1, "fp64"),
    "groups": Conv2d(2, 6, 9, 8, 4, 3, 3, 2, 1, 1, 1, "fp64", groups=2),
    "1 x 1": Conv2d(3, 5, 6, 7, 8, 1, 1, 1, 1, 0, 0, "fp64"),
    "1 x 1 strided": Conv2d(3, 5, 6, 7, 8, 1, 1, 2, 2, 0, 0, "fp64"),
}
DTYPE = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}


def expected(op: Conv2d, *, seed: int = 0) -> tuple[tuple[Tensor, ...], Tensor]:
    """Inputs of `op` and autograd's result."""
    torch.manual_seed(seed)
    shape = (op.out_channels, op.in_channels // op.groups, op.kernel_h, op.kernel_w)
    x = torch.randn(op.batch, op.in_channels, op.height, op.width).to(DTYPE[op.dtype])
    weight = torch.randn(shape).to(DTYPE[op.dtype])
    x, weight = x.requires_grad_(), weight.requires_grad_()
    y = F.conv2d(x, weight, None, (op.stride_h, op.stride_w), (op.pad_h, op.pad_w), 1, op.groups)
    grad = torch.randn(y.shape).to(y.dtype)
    to_x, to_weight = torch.autograd.grad(y, (x, weight), grad)
    x, weight = x.detach(), weight.detach()
    return {
        "forward": ((x, weight), y.detach()),
        "input_gradient": ((grad, weight), to_x),
        "weight_gradient": ((x, grad), to_weight),
    }[op.direction]


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("case", CASES)
def test_every_route_that_exists_is_exact(case, direction):
    op = replace(CASES[case], direction=direction)
    inputs, theirs = expected(op)
    routes = [route for route in ROUTES if not route.problem(op, "cpu")]
    assert routes or case == "1 x 1 strided"
    for route in routes:
        ours = route.function(op)(*route.prepare(op, inputs))
        assert difference(ours, theirs) < 1e-13, route.name


def test_which_routes_exist():
    names = {case: [r.name for r in ROUTES if not r.problem(op, "cpu")] for case, op in CASES.items()}
    assert names["same"] == ["im2col", "winograd F(2x2,3x3)", "winograd F(4x4,3x3)"]
    assert names["large kernel, stride"] == names["even kernel"] == ["im2col", "fft"]
    assert (names["groups"], names["1 x 1 strided"]) == (["im2col"], [])
    assert names["1 x 1"] == ["pointwise"]


def test_problems_say_why():
    said = {route.name: route.problem for route in ROUTES}
    assert "stride 1" in said["winograd F(2x2,3x3)"](CASES["large kernel, stride"], "cpu")
    assert "2 groups" in said["winograd F(4x4,3x3)"](replace(CASES["groups"], stride_h=1), "cpu")
    assert "bf16" in said["winograd F(4x4,3x3)"](replace(CASES["same"], dtype="bf16"), "cpu")
    assert "3 x 3: transforms pay" in said["fft"](CASES["same"], "cpu")
    assert "GB" in said["fft"](Conv2d(256, 64, 224, 224, 64, 5, 5, 1, 1, 2, 2, "fp32"), "cpu")
    assert "padding" in said["winograd F(2x2,3x3)"](replace(CASES["same"], pad_h=3), "cpu")
    assert all(problem(Gemm(8, 8, 8, "fp32"), "cpu") for problem in said.values())


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_error_of_fp32_is_that_of_fp32(direction):
    """The larger Winograd tile loses about a digit, and says so by its error; none loses two."""
    small = Conv2d(2, 32, 24, 24, 32, 3, 3, 1, 1, 1, 1, "fp32", direction=direction)
    large = Conv2d(2, 8, 24, 24, 8, 7, 7, 1, 1, 3, 3, "fp32", direction=direction)
    for op in (small, large):
        inputs, _ = expected(op)
        doubled = tuple(t.double() for t in inputs)
        for route in ROUTES:
            if not route.problem(op, "cpu"):
                function = route.function(op)
                exact = convolutions.ROUTES[0].function(op)(*doubled)
                assert difference(function(*route.prepare(op, inputs)).double(), exact) < 5e-6, route.name


def test_im2col_in_parts_is_im2col_in_one(monkeypatch):
    op = replace(CASES["same"], batch=5)
    for direction in DIRECTIONS:
        part = replace(op, direction=direction)
        inputs, theirs = expected(part)
        monkeypatch.setattr(convolutions, "COLUMN_BYTES", 1)
        assert difference(ROUTES[0].function(part)(*inputs), theirs) < 1e-13


def test_sizes_of_transforms():
    assert [fast_size(n) for n in (0, 1, 7, 11, 13, 97, 1023)] == [1, 1, 8, 12, 15, 100, 1024]
