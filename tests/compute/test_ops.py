import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from turbopump.compute.ops import (
    OPS,
    Attention,
    BatchedGemm,
    Conv1d,
    Conv2d,
    CrossEntropy,
    Ctc,
    Elementwise,
    Embedding,
    Fft,
    Gather,
    Gemm,
    Launch,
    MemoryCopy,
    MemoryTriad,
    Norm,
    OptimizerStep,
    Rnn,
    from_fields,
)
from turbopump.core.errors import ProfileError
from turbopump.core.workload import OpCost

SIZE = st.integers(1, 40)


def flops_of(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(SIZE, SIZE, SIZE)
def test_gemm(m, n, k):
    a, b = (torch.zeros(m, k, requires_grad=True), torch.zeros(k, n, requires_grad=True))
    op = Gemm(m, n, k, "bf16")
    assert op.cost == OpCost(flops_of(lambda: a @ b), 2 * (m * k + k * n + m * n))
    both = sum((g.cost for g in op.gradients), op.cost)
    assert both.flops == flops_of(lambda: (a @ b).sum().backward()) == 3 * op.cost.flops
    assert BatchedGemm(5, m, n, k, "bf16").cost == op.cost * 5


def test_keys_are_stable():
    assert Gemm(64, 32, 16, "bf16").key == "Gemm(m=64,n=32,k=16,dtype=bf16,layout=nt)"
    assert Gemm(1, 2, 3, "fp32") == Gemm(1, 2, 3, "fp32") and hash(Gemm(1, 2, 3, "fp32"))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 2]), st.sampled_from([1, 3, 5]), st.sampled_from([1, 2]), st.integers(5, 12),
       st.sampled_from([0, 1, 2]))  # fmt: skip
def test_convolution_and_its_gradients(groups, kernel, stride, size, pad):
    op = Conv2d(2, 4, size, size + 1, 6, kernel, kernel, stride, stride, pad, pad, "fp32", groups)
    x = torch.zeros(2, 4, size, size + 1, requires_grad=True)
    w = torch.zeros(6, 4 // groups, kernel, kernel, requires_grad=True)
    y = F.conv2d(x, w, stride=stride, padding=pad, groups=groups)
    assert y.shape == (2, 6, op.out_height, op.out_width) and y.numel() == op.out_elements
    assert op.weights == w.numel()
    assert op.cost.flops == flops_of(lambda: F.conv2d(x, w, stride=stride, padding=pad, groups=groups))
    assert op.cost.bytes == 4 * (x.numel() + w.numel() + y.numel())
    if groups == 1:  # torch 2.13 counts the gradients of grouped convolutions wrongly
        assert 2 * op.cost.flops == flops_of(lambda: y.sum().backward())


def test_attention_counts_the_pairs_that_must_be_computed():
    whole, causal = (Attention(2, 4, 2, 6, 6, 8, flag, "fp32") for flag in (False, True))
    q, k = torch.zeros(2 * 4, 6, 8), torch.zeros(2 * 4, 6, 8)
    assert whole.cost.flops == flops_of(lambda: (q @ k.mT) @ k)
    assert causal.pairs == int(torch.ones(6, 6).tril().sum()) and whole.pairs == 36
    assert Attention(1, 1, 1, 2, 5, 8, True, "fp32").pairs == int(torch.ones(2, 5).tril(3).sum())
    backward = Attention(2, 4, 2, 6, 6, 8, True, "fp32", backward=True)
    assert backward.cost.flops == 2 * causal.cost.flops
    assert causal.cost.bytes == 4 * 2 * 6 * 8 * (2 * 4 + 2 * 2)


@pytest.mark.parametrize("kind,layer", [("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_recurrent_layer(kind, layer, bidirectional):
    op = Rnn(kind, 3, 7, 5, 4, bidirectional, "fp32")
    with torch.device("meta"):  # where PyTorch composes it of products
        module, x = layer(5, 4, bidirectional=bidirectional), torch.zeros(7, 3, 5)
        assert op.cost.flops == flops_of(lambda: module(x))
    assert Rnn(kind, 3, 7, 5, 4, bidirectional, "fp32", backward=True).cost.flops == 2 * op.cost.flops


@pytest.mark.parametrize("op,expected", [
    (Embedding(10, 50, 8, "fp32"), 2 * 10 * 8 * 4 + 80),
    (Embedding(10, 50, 8, "fp32", backward=True), (10 + 50) * 8 * 4 + 80),
    (Norm("rms", 10, 8, "bf16"), 2 * 80 * 2),
    (Norm("batch", 10, 8, "bf16", backward=True), 3 * 80 * 2),
    (Elementwise("add", 100, 2, 1, "fp32"), 1200),
    (CrossEntropy(10, 50, "bf16"), 500 * 2 + 80),
    (CrossEntropy(10, 50, "bf16", backward=True), 1000 * 2 + 80),
    (Ctc(2, 30, 5, 9), 4 * 2 * 30 * (11 + 9)),
    (Ctc(2, 30, 5, 9, backward=True), 8 * 2 * 30 * (11 + 9)),
    (OptimizerStep("adamw", 1000), 28_000),
    (OptimizerStep("momentum", 1000), 20_000),
    (OptimizerStep("sgd", 1000), 12_000),
    (MemoryCopy(1000), 2000),
    (MemoryTriad(1000), 3000),
    (Gather(10, 1000, 64), 10 * (2 * 64 + 8)),
    (Launch("add"), 0),
])  # fmt: skip
def test_operations_that_only_move_bytes(op, expected):
    assert op.cost == OpCost(0.0, expected)


@pytest.mark.parametrize("direction", ["forward", "input_gradient", "weight_gradient"])
def test_a_line_costs_what_an_image_of_height_one_costs(direction):
    op = Conv1d(2, 4, 31, 6, 5, 2, 2, "bf16", 2, direction)
    x, w = torch.zeros(2, 4, 31), torch.zeros(6, 2, 5)
    y = F.conv1d(x, w, stride=2, padding=2, groups=2)
    assert y.shape[-1] == op.out_length
    assert op.cost.flops == flops_of(lambda: F.conv1d(x, w, stride=2, padding=2, groups=2))
    assert op.cost.bytes == 2 * (x.numel() + w.numel() + y.numel())
    assert op.as_2d.direction == direction


def test_transforms_count_by_their_convention():
    assert Fft(3, 1024, "complex", "fp32").cost == OpCost(3 * 5 * 1024 * 10, 3 * 1024 * 2 * 2 * 4)
    half = torch.fft.rfft2(torch.zeros(3, 16, 16))
    plane = Fft(3, 16, "real", "fp32", 2)
    assert plane.points == 256 and plane.cost == OpCost(3 * 2.5 * 256 * 8, 4 * (3 * 256 + 2 * half.numel()))


@pytest.mark.parametrize("op", [Gemm(1, 2, 3, "fp32", "tn"), Rnn("gru", 1, 2, 3, 4, True, "bf16"), Launch("add"),
                                Elementwise("anything", 5, 1, 1, "fp32")], ids=lambda op: op.key)  # fmt: skip
def test_an_operation_from_the_fields_of_its_row(op):
    assert from_fields(type(op).__name__, vars(op)) == op
    assert OPS[type(op).__name__] is type(op)


@pytest.mark.parametrize("kind,values,message", [
    ("Gem", {}, "no operation is called 'Gem': the dense operations are Gemm"),
    ("Gemm", {"m": 1}, "Gemm has the fields m, n, k, dtype, layout; given were m"),
    ("Launch", {"name": "add", "age": 3}, "given were name, age"),
    ("Launch", {"name": "jump"}, "name must be add or linear or autograd, 'jump' given"),
    ("MemoryCopy", {"bytes": "many"}, "bytes must be of type int, 'many' given"),
    ("MemoryCopy", {"bytes": True}, "bytes must be of type int, True given"),
    ("Embedding", {"rows": 1, "vocab": 1, "dim": 1, "dtype": "fp31"}, "dtype must be fp64 or fp32"),
])  # fmt: skip
def test_fields_that_make_no_operation(kind, values, message):
    with pytest.raises(ProfileError, match=message):
        from_fields(kind, values)
