"""Every way this build of PyTorch offers to compute an operation, and how exact each is.

`routes(op, device)` begins with `default`, what PyTorch does untouched (with fp32 meant as fp32). The others are
switches of the libraries below it, layouts, and the algorithms that the modules in `PLUGGED` bring. A route is not
trusted because of its name: `error` compares it with fp64 on the same inputs. oneDNN's `fp32_precision = "bf16"` is
exact fp32 on CPUs without AMX (and 2.2 times as fast as MKL on AMD EPYC, Zen 4), and true bf16 on those with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import fields, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from turbopump.compute import kernels
from turbopump.compute.kernels import Route
from turbopump.compute.ops import Attention, BatchedGemm, Conv1d, Conv2d, Gemm, Rnn
from turbopump.core.workload import Op

MAX_ERROR = {"fp64": 1e-12, "fp32": 3e-6, "tf32": 2e-3, "bf16": 2e-2, "fp16": 3e-3, "fp8": 2e-2, "int8": 0.0}
"""Largest relative error with which a route counts as exact for its dtype (inputs are already rounded to it)."""

PLUGGED: tuple[Route, ...] = ()
"""Algorithms of our own and compilers: each module's `ROUTES`."""


def routes(op: Op, device: str) -> list[Route]:
    """The routes that exist for `op` on `device` ("cpu", "cuda"), `default` first."""
    found = [r for r in (*_switches(torch.device(device).type), *PLUGGED) if not r.problem(op, device)]
    return [default_route(op), *(replace(r, setting=partial(_both, op, r.setting)) for r in found)]


def default_route(op: Op) -> Route:
    """PyTorch as it comes, with fp32 computed as fp32 whatever this process was set to, and tf32 as tf32."""
    return Route("default", kernels.function, _no_tf32_on_cpu, kernels.prepare, partial(_as_meant, op))


def find(op: Op, device: str, name: str) -> Route | None:
    """The route of that name, if it exists for `op`."""
    return next((route for route in routes(op, device) if route.name == name), None)


def _no_tf32_on_cpu(op: Op, device: str) -> str:
    if getattr(op, "dtype", "") == "tf32" and torch.device(device).type != "cuda":
        return "tf32 is a mode of CUDA devices"
    return ""


@contextmanager
def _as_meant(op: Op) -> Iterator[None]:
    """fp32 products in the precision that the dtype's name says."""
    precision = "tf32" if getattr(op, "dtype", "") == "tf32" else "ieee"
    onednn: Any = torch.backends.mkldnn  # `matmul` and the others are set on it while torch is imported
    backends = [onednn.matmul, onednn.conv, onednn.rnn] if torch.backends.mkldnn.is_available() else []
    if torch.cuda.is_available():
        backends += [torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn]  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for backend in backends:
            stack.enter_context(_attribute(backend, "fp32_precision", precision))
        yield


@contextmanager
def _both(op: Op, setting: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    with _as_meant(op), setting():
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
    return Route(
        name, kernels.function, lambda op, device: "" if exists(op) else f"not for {op.key}", kernels.prepare, setting,
        library,
    )  # fmt: skip


@cache
def _switches(device: str) -> tuple[Route, ...]:
    if device == "cuda":
        return _cuda_routes()
    return _onednn_routes() if torch.backends.mkldnn.is_available() else ()


def _onednn_routes() -> tuple[Route, ...]:
    onednn: Any = torch.backends.mkldnn
    products = (Gemm, BatchedGemm, Rnn, Attention)

    def through_bf16(op: Op) -> bool:
        return isinstance(op, products) and op.dtype == "fp32" and not (isinstance(op, Rnn) and op.kind == "lstm")

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
        _channels_last("channels_last"),
        _switched("sdpa=math", lambda: sdpa_kernel(SDPBackend.MATH), lambda op: isinstance(op, Attention)),
        _switched("sdpa=flash", lambda: sdpa_kernel(SDPBackend.FLASH_ATTENTION), lambda op: isinstance(op, Attention)),
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
        return ""
    return "oneDNN's fused linear layer multiplies by a weight [n, k] in fp32, bf16 or fp16"


def _channels_last(name: str) -> Route:
    def prepare(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.contiguous(memory_format=torch.channels_last) for x in inputs)

    return Route(
        name, kernels.function, lambda op, device: "" if isinstance(op, Conv2d) else "for images only", prepare
    )


def _cuda_routes() -> tuple[Route, ...]:
    """cuBLAS or cuBLASLt; cuDNN with its own heuristic, by trial, or not at all; the kernels of attention."""

    def product(op: Op) -> bool:
        return isinstance(op, Gemm | BatchedGemm) and op.dtype in ("fp32", "tf32", "bf16", "fp16", "fp64")

    def convolution(op: Op) -> bool:
        return isinstance(op, Conv1d | Conv2d)

    def half(op: Op) -> bool:
        return isinstance(op, Attention) and op.dtype in ("bf16", "fp16")

    def attention(op: Op) -> bool:
        return isinstance(op, Attention)

    return (
        _switched("cublas", lambda: _blas_library("cublas"), product, "cuBLAS"),
        _switched("cublaslt", lambda: _blas_library("cublaslt"), product, "cuBLASLt"),
        _switched("cudnn.benchmark=true", lambda: torch.backends.cudnn.flags(enabled=True, benchmark=True), convolution,
                  "cuDNN"),
        _switched("cudnn.enabled=false", lambda: torch.backends.cudnn.flags(enabled=False),
                  lambda op: isinstance(op, Conv1d | Conv2d | Rnn)),
        _channels_last("channels_last"),
        _switched("sdpa=math", lambda: sdpa_kernel(SDPBackend.MATH), attention),
        _switched("sdpa=efficient", lambda: sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION), attention),
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


REDUCED = {
    "m": 96, "n": 80, "k": 512, "batch": 2, "heads": 2, "kv_heads": 1, "q_len": 64, "kv_len": 64,
    "in_channels": 32, "out_channels": 32, "height": 24, "width": 24, "length": 64, "steps": 12, "input_size": 64,
    "hidden_size": 64, "rows": 64, "dim": 128, "vocab": 512, "elements": 4096, "params": 4096, "frames": 48,
    "labels": 8, "classes": 29, "bytes": 4096, "table_rows": 256,
}  # fmt: skip
"""Largest sizes at which a route is compared with fp64: same kernels, in milliseconds."""


def reduced(op: Op) -> Op:
    """An operation of the same family (kind, dtype, layout, kernel, stride, direction) that is quickly computed."""
    sizes = {f.name: getattr(op, f.name) for f in fields(op)}
    small = {name: min(value, REDUCED.get(name, value)) for name, value in sizes.items() if type(value) is int}
    if isinstance(op, Attention):
        small["kv_heads"] = 1 if op.kv_heads < op.heads else small["heads"]
        small["q_len"] = min(op.q_len, op.kv_len, 64) if op.q_len != op.kv_len else small["q_len"]
    if isinstance(op, Conv1d | Conv2d):
        small["in_channels"], small["out_channels"] = op.in_channels, op.out_channels
        if op.groups == 1:
            small["in_channels"], small["out_channels"] = min(op.in_channels, 32), min(op.out_channels, 32)
    if isinstance(op, Conv1d):
        small["length"] = max(small["length"], min(op.length, op.kernel + 8 * op.stride))
    if isinstance(op, Conv2d):
        small["height"] = max(small["height"], min(op.height, op.kernel_h + 4 * op.stride_h))
        small["width"] = max(small["width"], min(op.width, op.kernel_w + 4 * op.stride_w))
    return replace(op, **small)


def error(op: Op, route: Route, device: str = "cpu") -> float:
    """Norm of the difference from fp64 on the same inputs, relative, over all outputs, at a reduced shape of `op`.

    Kept for the process by reduced shape, route and device. Raises what the route raises.
    """
    key = (reduced(op).key, route.name, device)
    if key not in _errors:
        _errors[key] = _error_of(reduced(op), route, device)
    return _errors[key]


_errors: dict[tuple[str, str, str], float] = {}


def _error_of(op: Op, route: Route, device: str) -> float:
    given = kernels.inputs(op, device, torch.Generator().manual_seed(0))
    with route.setting():
        outputs = route.ready(op, tuple(x.clone() for x in given))()
    wide = tuple(_widened(x) for x in given)
    with _as_meant(op):
        exact = kernels.function(op)(*kernels.prepare(op, wide))
    return _difference(_listed(outputs), _listed(exact))


def _widened(x: Tensor) -> Tensor:
    if x.is_complex():
        return x.to(torch.complex128)
    return x.to(torch.float64) if x.is_floating_point() or x.dtype == torch.int8 else x.clone()


def _listed(outputs: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def _difference(outputs: list[Tensor], exact: list[Tensor]) -> float:
    """The largest over the outputs; infinite where shapes differ or values are not finite."""
    largest = 0.0
    for got, wanted in zip(outputs, exact, strict=True):
        if got.shape != wanted.shape:
            return float("inf")
        wanted = wanted.detach()
        difference = torch.linalg.vector_norm(got.detach().to(wanted.dtype) - wanted)
        share = float(difference / torch.linalg.vector_norm(wanted).clamp_min(1e-300))
        largest = max(largest, share) if share == share else float("inf")
    return largest
