from contextlib import contextmanager

import pytest
import torch

from tests.compute import sample_ops
from turbopump.compute import conditions, kernels, routes, switches
from turbopump.compute.choice import MAX_ERROR
from turbopump.compute.kernels import Route
from turbopump.compute.ops import Attention, Conv2d, Gemm, OptimizerStep, Rnn

GEMM = Gemm(40, 50, 60, "fp32")
CONV = Conv2d(1, 1, 5, 5, 1, 3, 3, 1, 1, 1, 1, "bf16")
ATTENTION = Attention(1, 1, 1, 4, 4, 4, True, "fp32")
ATTENTION_ERROR = 4e-2  # of gradients in bf16, whose products are rounded


def settings_now():
    onednn, sdpa = torch.backends.mkldnn, torch.backends.cuda
    return (torch.get_num_threads(), onednn.matmul.fp32_precision, onednn.conv.fp32_precision,
            onednn.rnn.fp32_precision, torch._C._get_mkldnn_enabled(), sdpa.flash_sdp_enabled(),
            sdpa.math_sdp_enabled(), torch.get_float32_matmul_precision(), torch.is_grad_enabled())  # fmt: skip


@pytest.mark.parametrize("op", [*sample_ops.COUNTED, *sample_ops.TRANSFORMS], ids=lambda op: op.key)
def test_every_route_gives_the_exact_result_of_its_dtype(op):
    before = settings_now()
    found = routes.built_in(op, "cpu")
    assert found[0].name == "default" and len({r.name for r in found}) == len(found)
    for route in found:
        assert routes.error(op, route) <= (ATTENTION_ERROR if op.dtype == "bf16" else 3e-6), route.name
    assert settings_now() == before


@pytest.mark.parametrize("op", sample_ops.MOVING, ids=lambda op: op.key)
def test_other_operations_are_exact_too(op):
    allowed = {"fp32": 2e-5, "bf16": 2e-2}[getattr(op, "dtype", "fp32")]
    assert all(routes.error(op, route) <= allowed for route in routes.built_in(op, "cpu"))


def names(op):
    return [route.name for route in routes.built_in(op, "cpu")]


def test_which_routes_an_operation_has():
    assert names(GEMM) == ["default", "mkldnn.matmul.fp32_precision=bf16", "mkldnn._linear_pointwise"]
    assert "mkldnn._linear_pointwise" not in names(Gemm(4, 4, 4, "fp32", "nn"))
    assert names(Conv2d(1, 1, 5, 5, 1, 3, 3, 1, 1, 1, 1, "fp32")) == [
        "default",
        "mkldnn.enabled=false",
        "channels_last",
    ]
    assert names(Rnn("lstm", 1, 1, 1, 1, False, "fp32")) == ["default", "mkldnn.enabled=false"]
    assert names(Rnn("gru", 1, 1, 1, 1, False, "fp32")) == ["default", "mkldnn.matmul.fp32_precision=bf16"]
    assert {"sdpa=math", "sdpa=flash"} < set(names(ATTENTION))
    assert names(OptimizerStep("adamw", 5)) == ["default", "optimizer.foreach", "optimizer.single_tensor"]
    assert routes.find(GEMM, "cpu", "no such") is None


def test_tf32_does_not_exist_on_a_cpu():
    op = Gemm(4, 4, 4, "tf32")
    assert "CUDA" in routes.default_route(op).problem(op, "cpu")
    assert routes.default_route(op).problem(op, "cuda") == ""


def test_fp32_is_fp32_by_default_whatever_the_process_was_set_to():
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        with routes.default_route(GEMM).setting():
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "bf16"
        with routes.find(GEMM, "cpu", "mkldnn.matmul.fp32_precision=bf16").setting():
            assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("op", [GEMM, CONV, ATTENTION], ids=lambda op: type(op).__name__)
def test_switches_are_put_back_after_an_error(op):
    before = settings_now()
    for route in routes.built_in(op, "cpu"):
        with pytest.raises(ZeroDivisionError), route.setting():
            raise ZeroDivisionError
        assert settings_now() == before, route.name
    with pytest.raises(ZeroDivisionError), conditions.num_threads(2):
        raise ZeroDivisionError
    assert settings_now() == before


def test_a_wrong_route_is_found_out(monkeypatch):
    routes_to_try = {
        "half": lambda op: lambda a, b: a[:, : op.k // 2] @ b[: op.k // 2],
        "rounded": lambda op: lambda a, b: (a.bfloat16() @ b.bfloat16()).float(),
        "shape": lambda op: lambda a, b: (a @ b)[:-1],
        "nan": lambda op: lambda a, b: a @ b * float("nan"),
    }
    errors = {name: routes.error(GEMM, Route(f"test {name}", f)) for name, f in routes_to_try.items()}
    assert errors["half"] > 0.5 and 1e-3 < errors["rounded"] < 1e-2
    assert errors["shape"] == errors["nan"] == float("inf")


def test_error_is_computed_once_a_family(monkeypatch):
    calls = []

    def counted(op):
        calls.append(op)
        return torch.mm

    route = Route("test counted", counted)
    large, larger = Gemm(1000, 2000, 3000, "fp32"), Gemm(1500, 2500, 3500, "fp32")
    assert routes.error(large, route) == routes.error(larger, route)
    assert len(calls) == 1 and calls[0].cost.flops < 1e8


def test_plugged_routes_take_part_with_their_settings(monkeypatch):
    seen = []

    @contextmanager
    def setting():
        seen.append(torch.backends.mkldnn.matmul.fp32_precision)
        yield

    mine = Route("mine", kernels.function, lambda op, device: "" if isinstance(op, Gemm) else "no", setting=setting)
    monkeypatch.setattr(routes, "PLUGGED", (mine,))
    assert routes.routes(GEMM, "cpu")[-1].name == "mine" and "mine" not in names(GEMM)
    assert routes.error(GEMM, routes.find(GEMM, "cpu", "mine")) < 1e-6 and seen == ["ieee"]
    assert routes.find(OptimizerStep("sgd", 4), "cpu", "mine") is None


def test_reduced_shapes_keep_their_family():
    small = routes.reduced(Conv2d(32, 512, 7, 7, 1024, 3, 3, 2, 2, 1, 1, "bf16", direction="weight_gradient"))
    assert (small.kernel_h, small.stride_h, small.dtype, small.direction) == (3, 2, "bf16", "weight_gradient")
    assert small.out_height > 0 and small.cost.flops < 1e8
    deep = routes.reduced(Conv2d(1, 1, 81, 300, 32, 41, 11, 2, 2, 20, 5, "fp32"))
    assert deep.height >= 41 and deep.width >= 11
    grouped = routes.reduced(Conv2d(1, 64, 8, 8, 64, 3, 3, 1, 1, 1, 1, "fp32", groups=64))
    assert grouped.in_channels == grouped.groups == 64
    assert routes.reduced(Gemm(1, 2, 3, "fp32")) == Gemm(1, 2, 3, "fp32")


def test_the_cuda_table_can_be_made_without_the_device():
    found = {route.name for route in switches.built_in("cuda")}
    assert {"cublas", "cublaslt", "cudnn.benchmark=true", "sdpa=cudnn", "channels_last"} <= found
    half = Attention(1, 1, 1, 4, 4, 4, True, "bf16")
    exists = {r.name for r in switches.built_in("cuda") if not r.problem(half, "cuda")}
    assert exists == {"sdpa=math", "sdpa=efficient", "sdpa=flash", "sdpa=cudnn"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["fp32", "tf32", "bf16", "fp16"])
def test_routes_of_a_gpu_are_as_exact_as_their_dtype(dtype):
    op = Gemm(256, 256, 512, dtype)
    for route in routes.built_in(op, "cuda"):
        assert routes.error(op, route, "cuda") <= MAX_ERROR[dtype], route.name
