"""Every way this build of PyTorch offers to compute an operation, and how exact each is.

`routes(op, device)` begins with `default`, what PyTorch does untouched (with fp32 meant as fp32). The others are those
of `switches.py`, the algorithms that the modules in `PLUGGED` bring, and what models compute by kernels of their own
(`ROUTES` of a model's torch side; predictions of its steps rest on them). A route is not trusted because of its name:
`error` compares it with fp64 on the same inputs. oneDNN's `fp32_precision = "bf16"` is exact fp32 on CPUs without AMX
(1.08 to 1.17 times as fast as MKL on AMD EPYC, Zen 4), and true bf16 on those with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import fields, replace
from functools import cache, partial

import torch
from torch import Tensor

from turbopump.compute import compiled, convolutions, kernels, switches, transforms
from turbopump.compute.kernels import Route
from turbopump.compute.ops import Attention, Conv1d, Conv2d
from turbopump.core import plugins
from turbopump.core.errors import UsageError
from turbopump.core.workload import Op

PLUGGED: tuple[Route, ...] = (*convolutions.ROUTES, *transforms.ROUTES, *compiled.ROUTES)
"""Algorithms of our own and compilers: each module's `ROUTES`."""


def routes(op: Op, device: str) -> list[Route]:
    """The routes that exist for `op` on `device` ("cpu", "cuda"), `default` first."""
    return built_in(op, device) + _existing(PLUGGED, op, device) + _existing(_of_models(), op, device)


@cache
def _of_models() -> tuple[Route, ...]:
    """What the installed models compute by kernels of their own; the route has the model's name."""
    found: list[Route] = []
    for name in plugins.names("turbopump.models"):
        with suppress(UsageError, ImportError):  # a foreign model that does not load is said where it is asked for
            found += getattr(plugins.find("turbopump.models", name).torch_side(), "ROUTES", ())
    return tuple(found)


def built_in(op: Op, device: str) -> list[Route]:
    """Those that PyTorch has built in, which cost nothing to try (a compiler takes seconds)."""
    return [default_route(op), *_existing(switches.built_in(torch.device(device).type), op, device)]


def _existing(candidates: tuple[Route, ...], op: Op, device: str) -> list[Route]:
    """Those that compute `op`, each with what every route begins with: fp32 meant as fp32."""
    return [replace(r, setting=partial(_both, op, r.setting)) for r in candidates if not r.problem(op, device)]


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


def _as_meant(op: Op) -> AbstractContextManager[None]:
    """fp32 products in the precision that the dtype's name says."""
    return switches.fp32_as("tf32" if getattr(op, "dtype", "") == "tf32" else "ieee")


@contextmanager
def _both(op: Op, setting: Callable[[], AbstractContextManager[object]]) -> Iterator[None]:
    with _as_meant(op), setting():
        yield


REDUCED = {
    "m": 96, "n": 80, "k": 512, "batch": 2, "heads": 2, "kv_heads": 1, "q_len": 64, "kv_len": 64,
    "in_channels": 32, "out_channels": 32, "height": 24, "width": 24, "length": 64, "steps": 12, "input_size": 64,
    "hidden_size": 64, "rows": 64, "dim": 128, "vocab": 512, "elements": 4096, "params": 4096, "frames": 48,
    "labels": 8, "classes": 29, "bytes": 4096, "table_rows": 256,
}  # fmt: skip
"""Largest sizes at which a route is compared with fp64: same kernels, in milliseconds."""


def reduced(op: Op, scale: int = 1) -> Op:
    """An operation of the same family (kind, dtype, layout, kernel, stride, direction) with sizes of `REDUCED` at most,
    `scale` times: at 1 it takes milliseconds in any dtype."""
    sizes = {f.name: getattr(op, f.name) for f in fields(op)}
    small = {name: min(value, scale * REDUCED.get(name, value)) for name, value in sizes.items() if type(value) is int}
    if isinstance(op, Attention):
        small["kv_heads"] = 1 if op.kv_heads < op.heads else small["heads"]
    if isinstance(op, Conv1d | Conv2d) and op.groups > 1:
        small["in_channels"], small["out_channels"] = op.in_channels, op.out_channels
    if isinstance(op, Conv1d):
        small["length"] = min(op.length, max(small["length"], op.kernel + 8 * op.stride))
    if isinstance(op, Conv2d):
        small["height"] = min(op.height, max(small["height"], op.kernel_h + 4 * op.stride_h))
        small["width"] = min(op.width, max(small["width"], op.kernel_w + 4 * op.stride_w))
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
