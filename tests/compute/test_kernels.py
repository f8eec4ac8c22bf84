from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.compute import sample_ops
from turbopump.compute import kernels, kernels_moving, routes
from turbopump.compute.choice import MAX_ERROR
from turbopump.compute.ops import OPS, RNN_GATES, Attention, Elementwise, Gemm, Rnn
from turbopump.core.errors import UsageError
from turbopump.core.workload import Op, OpCost


def drawn(op):
    return kernels.inputs(op, "cpu", torch.Generator().manual_seed(0))


def ready(op, route="default"):
    way = routes.find(op, "cpu", route)
    with way.setting():
        return way.ready(op, drawn(op)), way.setting


def listed(outputs):
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


def test_samples_cover_every_kind():
    assert {type(op).__name__ for op in sample_ops.ALL} == set(OPS)
    assert set(kernels.KERNELS) == set(OPS.values())


@pytest.mark.parametrize("kind", OPS)
def test_every_operation_computes_finite_values_from_realistic_ones(kind):
    for op in sample_ops.ALL:
        if type(op).__name__ != kind:
            continue
        for x in drawn(op):
            assert torch.isfinite(x).all()
            assert x.numel() < 4 or not x.is_floating_point() or x.float().std() > 0 or x.stride()[-1] == 0, op.key
        run, _ = ready(op)
        for _ in range(2):  # a graph kept for backward serves again
            assert all(torch.isfinite(x).all() for x in listed(run())), op.key


@pytest.mark.parametrize("op", sample_ops.COUNTED, ids=lambda op: op.key)
def test_flops_of_the_call_alone_are_those_of_the_operation(op):
    if isinstance(op, Attention) and op.causal:
        pytest.skip("PyTorch's kernels compute masked pairs too")
    if getattr(op, "groups", 1) > 1 and op.direction != "forward":
        pytest.skip("torch 2.13 counts the gradients of grouped convolutions wrongly")
    # fused kernels are not counted: products are, where the layer is made of them
    route = "sdpa=math" if isinstance(op, Attention) else "default"
    if isinstance(op, Rnn) and op.kind == "lstm":
        route = "mkldnn.enabled=false"
    run, setting = ready(op, route)
    with setting(), FlopCounterMode(display=False) as counter:
        run()
    unneeded = 0
    if isinstance(op, Rnn) and op.backward:  # the gradient of the state that it begins with, which nobody wants
        unneeded = 2 * op.batch * op.hidden_size**2 * RNN_GATES[op.kind] * op.directions
    assert counter.get_total_flops() == op.cost.flops - unneeded


@pytest.mark.parametrize("layout", ["nn", "nt", "tn", "tt"])
def test_layouts_are_views_of_contiguous_storage(layout):
    a, b = drawn(Gemm(4, 5, 6, "fp32", layout))
    assert (a.shape, b.shape) == ((4, 6), (6, 5))
    assert [x.t().is_contiguous() for x in (a, b)] == [side == "t" for side in layout]
    assert torch.equal(a, drawn(Gemm(4, 5, 6, "fp32", "nn"))[0])  # the values are those of any other layout


@pytest.mark.parametrize("dtype", ["fp64", "fp32", "bf16", "fp16", "int8", "fp8"])
def test_products_of_every_dtype(dtype):
    if dtype == "int8" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        pytest.skip("without VNNI oneDNN adds pairs of int8 products in 16 bits, which overflow: probe tells the error")
    op = Gemm(32, 48, 64, dtype)
    assert routes.error(op, routes.default_route(op)) <= MAX_ERROR[dtype]


def test_gradients_are_of_what_a_layer_trains():
    op = Rnn("lstm", 3, 5, 8, 6, True, "fp32", backward=True)
    run, _ = ready(op)
    assert [tuple(g.shape) for g in run()] == [(5, 3, 8), *[(24, 8), (24, 6), (24,), (24,)] * 2]


def test_optimizers_change_what_they_are_given():
    for kind in ("sgd", "momentum", "adamw"):
        op = next(op for op in sample_ops.MOVING if getattr(op, "kind", "") == kind)
        given = drawn(op)
        before = given[0].clone()
        kernels.function(op)(*given)
        assert not torch.equal(given[0], before)


def test_a_name_without_a_meaning_here_is_a_chain():
    assert kernels_moving.is_chain(Elementwise("anything", 100, 2, 1, "fp32"))
    assert not kernels_moving.is_chain(Elementwise("residual", 100, 2, 1, "fp32"))
    assert not kernels_moving.is_chain(Gemm(1, 2, 3, "fp32"))
    outputs = kernels.function(Elementwise("anything", 100, 3, 4, "fp32"))(*(torch.ones(100) for _ in range(3)))
    assert len(outputs) == 4


def test_operations_of_other_domains_are_refused():
    class Foreign(Op):
        @property
        def cost(self):
            return OpCost()

    with pytest.raises(UsageError, match="not a dense operation: those are Gemm"):
        drawn(Foreign())


def test_large_tensors_repeat_their_values():
    op = replace(Elementwise("relu", 2**22 + 1000, 1, 1, "fp32"))
    (x,) = drawn(op)
    assert x.shape == (2**22 + 1000,) and torch.equal(x[-1000:], x[:1000]) and x[: 2**22].std() > 0.9
