from dataclasses import asdict

import numpy as np
import pytest
import torch

from turbopump.compute import on_cpu
from turbopump.compute.conditions import num_threads
from turbopump.compute.convolutions import as_conv2d
from turbopump.compute.features import Case, Place
from turbopump.compute.operands import DTYPES
from turbopump.compute.ops import Conv1d, Conv2d, Gemm


def chosen(op, threads):
    """PyTorch's own answer: does the operation go to oneDNN?"""
    c = as_conv2d(op)
    dtype = DTYPES[op.dtype]
    x = torch.empty(c.batch, c.in_channels, c.height, c.width, dtype=dtype)
    w = torch.empty(c.out_channels, c.in_channels // c.groups, c.kernel_h, c.kernel_w, dtype=dtype)
    if isinstance(op, Conv1d):
        x, w = x.squeeze(2), w.squeeze(2)
    stride, pad = ([op.stride], [op.pad]) if isinstance(op, Conv1d) else ([c.stride_h, c.stride_w], [c.pad_h, c.pad_w])
    with num_threads(threads):
        found = torch._C._select_conv_backend(
            x, w, None, stride, pad, [1] * len(pad), False, [0] * len(pad), c.groups, None
        )
    return "onednn" if "Mkldnn" in str(found) else "native"


BF16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def shapes(count):
    generator = np.random.default_rng(3)
    for _ in range(count):
        kernel, stride, groups = (int(generator.choice(given)) for given in ((1, 3, 5), (1, 2), (1, 1, 4)))
        batch, edge = int(generator.choice([1, 2, 15, 16])), int(generator.integers(5, 40))
        channels, out = (4 * int(generator.integers(1, 20)) for _ in range(2))
        dtype = "bf16" if BF16 and generator.integers(4) == 0 else "fp32"
        yield Conv2d(batch, channels, edge, edge, out, kernel, kernel, stride, stride, 1, 1, dtype, groups)
        yield Conv1d(batch, channels, 100 * edge, out, kernel, stride, 1, dtype, groups)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of PyTorch has no oneDNN")
@pytest.mark.parametrize("threads", [1, 2])
def test_the_library_is_the_one_that_pytorch_chooses(threads):
    found = [(on_cpu.library(asdict(op), threads), chosen(op, threads), op) for op in shapes(150)]
    assert {ours for ours, _, _ in found} == {"onednn", "native"}
    assert [op for ours, theirs, op in found if ours != theirs] == []


def conv(channels, out, direction="forward", stride=1, **more):
    return Conv2d(8, channels, 20, 20, out, 3, 3, stride, stride, 1, 1, "fp32", direction=direction, **more)


@pytest.mark.parametrize(
    ("op", "ratio"),
    [
        (conv(32, 48), 1.0),
        (conv(33, 48), 48 / 33),
        (conv(3, 17), 32 / 17),  # an image is read as it is
        (conv(3, 16, "weight_gradient"), 1.0),
        (conv(3, 16, "input_gradient"), 16 / 3),  # and written in blocks
        (conv(24, 24, "input_gradient"), (32 / 24) ** 2),
        (conv(24, 24, "input_gradient", stride=2), 32 / 24),
        (conv(24, 24, groups=24), 1.0),
    ],
)
def test_channels_are_padded_to_vectors(op, ratio):
    case = Case.of(op, Place("cpu"))
    assert case.computed_flops / case.flops == pytest.approx(ratio)


def test_the_rule_speaks_of_the_default_route_of_a_cpu_only():
    op = conv(33, 47)
    for place in (Place("cuda"), Place("cpu", 1, "im2col"), Place()):
        case = Case.of(op, place)
        assert case.library == "" and "library" not in case.words and case.computed_flops == case.flops
    assert Case.of(Gemm(10, 10, 10, "fp32"), Place("cpu")).library == ""
    assert Case.of(op, Place("cpu")).words == {"direction": "forward", "library": "onednn"}


@pytest.mark.parametrize("op", [conv(5, 7), Conv1d(2, 8, 50, 12, 5, 2, 2, "fp32", groups=4)])
def test_operands_are_all_the_bytes(op):
    case = Case.of(op)
    assert sum(case.operands.values()) == pytest.approx(case.bytes)
    taps = op.in_channels // op.groups * (9 if isinstance(op, Conv2d) else 5)
    assert case.operands["output"] == pytest.approx(4 * op.cost.flops / 2 / taps)
