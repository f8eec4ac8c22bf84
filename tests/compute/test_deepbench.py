import csv
from pathlib import Path

import pytest

from turbopump.compute import deepbench
from turbopump.compute.ops import Conv2d, Gemm, Rnn

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "published"


def published(name):
    path = PUBLISHED / f"deepbench_{name}.csv"
    if not path.exists():
        pytest.skip(f"no {path.name} beside the repository")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_blas_calls_read_row_by_row():
    # a linear layer's forward is T, N in a column-major library: y[batch, out] = x[batch, in] W[out, in]^T
    assert deepbench.gemm(1760, 16, 2048, "T", "N") == Gemm(16, 1760, 2048, "fp32", "nt")
    assert deepbench.gemm(1760, 16, 2048, "N", "N").layout == "nn"
    assert deepbench.gemm(1760, 7133, 2048, "N", "T", "bf16") == Gemm(7133, 1760, 2048, "bf16", "tn")


def test_convolutions_and_layers():
    op = deepbench.convolution(700, 161, 1, 4, 32, 20, 5, 0, 0, 2, 2)
    assert op == Conv2d(4, 1, 161, 700, 32, 5, 20, 2, 2, 0, 0, "fp32") and (op.out_height, op.out_width) == (79, 341)
    assert deepbench.recurrent("GRU", 2816, 32, 1500) == Rnn("gru", 32, 1500, 2816, 2816, False, "fp32")


def test_every_published_line_is_measured():
    ops = set(deepbench.ops())
    for line in published("gemm"):
        assert deepbench.gemm(*(int(line[c]) for c in "MNK"), line["transA"], line["transB"]) in ops
    columns = ["W", "H", "C", "N", "K", "S_filter_w", "R_filter_h", "pad_w", "pad_h", "stride_w", "stride_h"]
    for line in published("conv"):
        assert deepbench.convolution(*(int(float(line[c])) for c in columns)) in ops
    for line in published("rnn"):
        numbers = (int(line[c]) for c in ("hidden", "batch", "timesteps"))
        assert deepbench.recurrent(line["cell"], *numbers) in ops


def test_the_suite_begins_with_the_cheapest_and_has_every_direction():
    ops = deepbench.ops(("fp32", "bf16"))
    assert len(set(ops)) == len(ops) and {op.dtype for op in ops} == {"fp32", "bf16"}
    flops = [op.cost.flops for op in ops]
    assert flops == sorted(flops)
    convs = [op for op in ops if isinstance(op, Conv2d)]
    directions = [op.direction for op in convs]
    assert directions.count("forward") == directions.count("input_gradient") == directions.count("weight_gradient")
    assert {op.backward for op in ops if isinstance(op, Rnn)} == {False, True}
    # the published tables hold 160 or more products, 90 convolutions, 53 layers a dtype
    assert sum(isinstance(op, Gemm) for op in ops) >= 2 * 160 and len(convs) >= 2 * 3 * 90
