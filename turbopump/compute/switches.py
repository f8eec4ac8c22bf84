"""The ways of computing that PyTorch has built in: switches of the libraries below it, layouts, other kernels.

Each is a `Route`; which of them exist for an operation its `problem` says, how exact it is `routes.error`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbopump.compute import kernels, kernels_moving
from turbopump.compute.kernels import Route
from turbopump.compute.ops import Attention, BatchedGemm, Conv1d, Conv2d, Gemm, OptimizerStep, Rnn
from turbopump.core.workload import Op


@cache
def built_in(kind: str) -> tuple[Route, ...]:
    """All there are on a kind of device ("cpu", "cuda") besides PyTorch's defaults."""
    if kind == "cuda":
        return _cuda_routes() + _optimizer_routes()
    onednn = _onednn_routes() if torch.backends.mkldnn.is_available() else ()
    return onednn + _attention_routes() + _optimizer_routes()


@contextmanager
def fp32_as(precision: str) -> Iterator[None]:
    """fp32 operations of CUDA's libraries compute in `precision` ("ieee", "tf32"), those of oneDNN in fp32."""
    onednn: Any = torch.backends.mkldnn  # `matmul` and the others are set on it while torch is imported
    wanted = []
    if torch.backends.mkldnn.is_available():
        wanted += [(backend, "ieee") for backend in (onednn.matmul, onednn.conv, onednn.rnn)]
    if torch.cuda.is_available():
        cudnn: Any = torch.backends.cudnn
        wanted += [(backend, precision) for backend in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]
    with ExitStack() as stack:
        for backend, value in wanted:
            stack.enter_context(_attribute(backend, "fp32_precision", value))
        yield


@contextmanager
def _attribute(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _switched(
    name: str,
    setting: Callable[[], AbstractContextManager[object]],
    exists: Callable[[Any], bool],
    library: str = "",
) -> Route:
    """PyTorch's own function under a switch, for operations of which `exists` is true."""

    def problem(op: Op, device: str) -> str:
        return "" if exists(op) else f"{name} does not concern {op.key}"

    return Route(name, kernels.function, problem, kernels.prepare, setting, library)


def _onednn_routes() -> tuple[Route, ...]:
    onednn: Any = torch.backends.mkldnn

    def through_bf16(op: Op) -> bool:
        if isinstance(op, Rnn) and op.kind == "lstm":  # its layer is not made of products
            return False
        return isinstance(op, Gemm | BatchedGemm | Rnn | Attention) and op.dtype == "fp32"

    def by_onednn(op: Op) -> bool:
        """What PyTorch gives to oneDNN by itself; all else is its own kernels or MKL already."""
        if isinstance(op, Conv1d | Conv2d) or (isinstance(op, Rnn) and op.kind == "lstm"):
            return op.dtype in ("fp32", "bf16")
        return isinstance(op, Gemm | BatchedGemm) and op.dtype == "bf16"

    return (
        _switched("mkldnn.matmul.fp32_precision=bf16", lambda: _attribute(onednn.matmul, "fp32_precision", "bf16"),
                  through_bf16, "oneDNN"),
        _switched("mkldnn.enabled=false", _without_onednn, by_onednn),
        Route("mkldnn._linear_pointwise", _linear_pointwise, _pointwise_problem, library="oneDNN"),
        _channels_last(),
    )  # fmt: skip


@contextmanager
def _without_onednn() -> Iterator[None]:
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` sets more, and warns of TF32
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


def _linear_pointwise(op: Op) -> Callable[..., Tensor]:
    return lambda a, b: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def _pointwise_problem(op: Op, device: str) -> str:
    if isinstance(op, Gemm) and op.layout == "nt" and op.dtype in ("fp32", "bf16", "fp16"):
        onednn = torch.ops.mkldnn
        has = {"bf16": onednn._is_mkldnn_bf16_supported, "fp16": onednn._is_mkldnn_fp16_supported}
        return "" if op.dtype == "fp32" or has[op.dtype]() else f"oneDNN has no {op.dtype} on this processor"
    return "oneDNN's fused linear layer multiplies by a weight [n, k] in fp32, bf16 or fp16"


def _channels_last() -> Route:
    def prepare(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)

    def problem(op: Op, device: str) -> str:
        return "" if isinstance(op, Conv2d) else "only images have this layout"

    return Route("channels_last", kernels.function, problem, prepare)


def _attention(op: Op) -> bool:
    return isinstance(op, Attention)


def _attention_routes() -> tuple[Route, ...]:
    return (
        _switched("sdpa=math", lambda: sdpa_kernel(SDPBackend.MATH), _attention),
        _switched("sdpa=flash", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION), _attention),
    )


def _optimizer_routes() -> tuple[Route, ...]:
    """`default` is fused, which `train` uses."""

    def problem(op: Op, device: str) -> str:
        return "" if isinstance(op, OptimizerStep) else "only optimizers have these"

    def route(name: str, foreach: bool) -> Route:
        def function(op: Any) -> Callable[..., tuple[Tensor, ...]]:
            return kernels_moving.optimizer_step(op, fused=False, foreach=foreach)

        return Route(name, function, problem)

    return (route("optimizer.foreach", True), route("optimizer.single_tensor", False))


def _cuda_routes() -> tuple[Route, ...]:
    """cuBLAS or cuBLASLt; cuDNN with its own heuristic, by trial, or not at all; the kernels of attention."""

    def product(op: Op) -> bool:
        return isinstance(op, Gemm | BatchedGemm) and op.dtype in ("fp32", "tf32", "bf16", "fp16", "fp64")

    def convolution(op: Op) -> bool:
        return isinstance(op, Conv1d | Conv2d)

    def half(op: Op) -> bool:
        return isinstance(op, Attention) and op.dtype in ("bf16", "fp16")

    return (
        _switched("cublas", lambda: _blas_library("cublas"), product, "cuBLAS"),
        _switched("cublaslt", lambda: _blas_library("cublaslt"), product, "cuBLASLt"),
        _switched("cudnn.benchmark=true", lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True), convolution,
                  "cuDNN"),
        _switched("cudnn.enabled=false", lambda: torch.backends.cudnn.flags(enabled=False),
                  lambda op: isinstance(op, Conv1d | Conv2d | Rnn)),
        _channels_last(),
        _switched("sdpa=math", lambda: sdpa_kernel(SDPBackend.MATH), _attention),
        _switched("sdpa=efficient", lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), _attention),
        _switched("sdpa=flash", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION), half),
        _switched("sdpa=cudnn", lambda: sdpa_kernel(SDPBackend.CUDNN_ATTENTION), half, "cuDNN"),
    )  # fmt: skip


@contextmanager
def _blas_library(name: str) -> Iterator[None]:
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(name)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)
