"""How dense operations are measured: the best matrix-product rate of a dtype, and the dtype that trains fastest.

A *route* is one way this machine offers to compute a product (a library behind a switch). `measure_peak` tries every
route at several shapes in short repeated runs and takes the best rate: the limit that `share_of_limit` divides by. A
route counts only if its result is as exact as its dtype (compared with fp64): oneDNN's `fp32_precision = "bf16"` is
exact fp32 on CPUs without AMX (and twice as fast as MKL on AMD), and true bf16 on those with it.
Nothing is assumed of a dtype: what fails or is slow is a row that says so. All settings are put back.
CPU runs are timed by the CPU clock of the calling thread, so that other programs do not lower the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbopump.compute.ops import Gemm
from turbopump.core.errors import UsageError

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MAX_ERROR = {"fp64": 1e-12, "fp32": 2e-6, "bf16": 1e-2, "fp16": 2e-3}  # relative, of a sum over 512 products
CPU_SHAPES = (
    (512, 512, 512),
    (1024, 1024, 1024),
    (2048, 1024, 1024),
    (2048, 2048, 2048),
    (512, 4096, 1024),
    (4096, 4096, 4096),
)
CUDA_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 8192, 4096))
BF16_GAIN = 1.2  # least speed-up for which bf16 is chosen
REFERENCE_SIZE = 512


@dataclass(frozen=True)
class PeakRow:
    """One route at one shape; `flops_per_s` 0 with the reason in `problem` where it does not count."""

    route: str
    op: str
    flops_per_s: float
    seconds: float
    runs: int
    error: float
    problem: str = ""


@dataclass(frozen=True)
class PeakMeasurement:
    """The best rate over all routes; `route` is empty and the rate 0 where none works."""

    flops_per_s: float
    route: str
    dtype: str
    rows: tuple[dict[str, Any], ...]


def measure_peak(
    dtype: str, *, threads: int | None = None, device: str = "cpu", budget_s: float = 1.0
) -> PeakMeasurement:
    """Best dense matrix-product rate of `dtype` on `device` in FLOP/s, in about `budget_s` seconds of wall time.

    Raises `UsageError` for a dtype or device that does not exist here.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} cannot be measured: use one of {', '.join(DTYPES)}")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' given, but PyTorch sees no CUDA device here: use 'cpu'")
    routes = _routes(dtype, torch.device(device).type)
    shapes = CPU_SHAPES if torch.device(device).type == "cpu" else CUDA_SHAPES
    rows: list[PeakRow] = []
    with _threads(threads), torch.no_grad():
        for number, (route, switch) in enumerate(routes.items()):
            share_s = (budget_s - sum(r.seconds for r in rows)) / (len(routes) - number)
            with switch():
                rows += _measure_route(route, dtype, device, shapes, share_s)
    best = max(rows, key=lambda row: row.flops_per_s)
    route = best.route if best.flops_per_s else ""
    return PeakMeasurement(best.flops_per_s, route, dtype, tuple(asdict(row) for row in rows))


def _routes(dtype: str, device: str) -> dict[str, Callable[[], Any]]:
    if device == "cuda":
        return {"cublas": lambda: _setting(torch.backends.cuda.matmul, "ieee")}
    if dtype == "fp32":
        onednn: Any = torch.backends.mkldnn  # `matmul` is set on it while torch is imported
        return {
            "default": lambda: _setting(onednn.matmul, "ieee"),
            "mkldnn.matmul.fp32_precision=bf16": lambda: _setting(onednn.matmul, "bf16"),
        }
    return {"default": _nothing}


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _setting(backend: Any, value: str) -> Iterator[None]:
    before = backend.fp32_precision
    backend.fp32_precision = value
    try:
        yield
    finally:
        backend.fp32_precision = before


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure_route(
    route: str, dtype: str, device: str, shapes: tuple[tuple[int, int, int], ...], budget_s: float
) -> list[PeakRow]:
    """Rows of one route, smallest shape first; shapes that the budget has no room for are left out."""
    try:
        error = _relative_error(dtype, device)
    except (RuntimeError, NotImplementedError) as failure:
        return [PeakRow(route, "", 0.0, 0.0, 0, float("nan"), f"does not run: {str(failure).splitlines()[0]}")]
    problem = ""
    if not error <= MAX_ERROR[dtype]:
        problem = f"not exact {dtype}: relative error {error:.1e}, allowed {MAX_ERROR[dtype]:.0e}"
    rows: list[PeakRow] = []
    begin, rate = time.perf_counter(), 0.0
    for number, (m, n, k) in enumerate(shapes):
        op = Gemm(m, n, k, dtype)
        left_s = budget_s - (time.perf_counter() - begin)
        # two runs must fit, the first of which also warms up; the first shape is measured in any case
        if rows and (left_s <= 0 or (rate and 2 * op.cost.flops / rate > left_s)):
            break
        row = _measure_shape(route, op, device, error, left_s / (len(shapes) - number))
        rate = max(rate, row.flops_per_s)
        rows.append(replace(row, flops_per_s=0.0, problem=problem) if problem and not row.problem else row)
        if problem:
            break
    return rows


def _measure_shape(route: str, op: Gemm, device: str, error: float, budget_s: float) -> PeakRow:
    begin = time.perf_counter()
    try:
        # F.linear with the weight transposed: the layout of a model's products
        x = torch.randn(op.m, op.k, device=device).to(DTYPES[op.dtype])
        weight = torch.randn(op.n, op.k, device=device).to(DTYPES[op.dtype])
        best_s, runs = _shortest_s(lambda: F.linear(x, weight), device, budget_s)
    except (RuntimeError, NotImplementedError) as failure:
        elapsed_s = time.perf_counter() - begin
        return PeakRow(route, op.key, 0.0, elapsed_s, 0, error, f"does not run: {str(failure).splitlines()[0]}")
    return PeakRow(route, op.key, op.cost.flops / best_s, time.perf_counter() - begin, runs, error)


def _shortest_s(run: Callable[[], Any], device: str, budget_s: float, least: int = 2) -> tuple[float, int]:
    """Shortest time of `run` and how often it ran: at least `least` times, for `budget_s` of wall time."""
    cuda = torch.device(device).type == "cuda"
    clock = time.perf_counter if cuda else time.thread_time
    best_s, runs, begin = float("inf"), 0, time.perf_counter()
    while runs < least or time.perf_counter() - begin < budget_s:
        start = clock()
        run()
        if cuda:
            torch.cuda.synchronize()
        best_s, runs = min(best_s, clock() - start), runs + 1
    return best_s, runs


def _relative_error(dtype: str, device: str) -> float:
    """Norm of the difference from the fp64 product of the same (already rounded) inputs, relative."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(REFERENCE_SIZE, REFERENCE_SIZE, generator=generator).to(device, DTYPES[dtype])
                 for _ in range(2))  # fmt: skip
    exact = x.double() @ weight.double().t()
    return float((F.linear(x, weight).double() - exact).norm() / exact.norm())


def fastest_compute(device: str = "cpu", budget_s: float = 1.0) -> tuple[str, tuple[dict[str, Any], ...]]:
    """`"bf16"` or `"fp32"`: the faster one for training here, and the rows that say so.

    Measures forward and backward of `F.linear` on fp32 weights, under bf16 autocast and without, in alternating turns;
    bf16 is chosen only if it is more than 1.2 times faster, since it costs accuracy.
    """
    shapes = ((1024, 512, 512), (2048, 1024, 512)) if torch.device(device).type == "cpu" else ((8192, 4096, 4096),)
    rows: list[dict[str, Any]] = []
    gains = []
    for m, n, k in shapes:
        times_s, problem = {"fp32": float("inf"), "bf16": float("inf")}, ""
        try:
            runs = _alternate(_training_step(m, n, k, device), times_s, device, budget_s / len(shapes))
        except (RuntimeError, NotImplementedError) as failure:
            runs, problem = 0, f"does not run: {str(failure).splitlines()[0]}"
        gain = times_s["fp32"] / times_s["bf16"] if times_s["bf16"] < float("inf") and not problem else 0.0
        gains.append(gain)
        rows.append({"op": f"linear forward and backward, m={m} n={n} k={k}", "fp32_s": times_s["fp32"],
                     "bf16_s": times_s["bf16"], "bf16_gain": gain, "runs": runs, "problem": problem})  # fmt: skip
    return ("bf16" if min(gains) > BF16_GAIN else "fp32"), tuple(rows)


def _training_step(m: int, n: int, k: int, device: str) -> Callable[[str], None]:
    x = torch.randn(m, k, device=device, requires_grad=True)
    weight = torch.randn(n, k, device=device, requires_grad=True)
    grad = torch.randn(m, n, device=device)
    grads = {"fp32": grad, "bf16": grad.to(torch.bfloat16)}

    def run(dtype: str) -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=dtype == "bf16"):
            y: Tensor = F.linear(x, weight)
        torch.autograd.grad(y, (x, weight), grads[dtype])

    return run


def _alternate(run: Callable[[str], None], times_s: dict[str, float], device: str, budget_s: float) -> int:
    """Shortest times of each dtype, taken in turns so that a busy machine disturbs both; returns the turns."""
    begin, turns = time.perf_counter(), 0
    while turns < 2 or time.perf_counter() - begin < budget_s:
        for dtype in times_s:
            if turns and times_s["bf16"] > 4 * times_s["fp32"]:
                return turns  # an emulated bf16: no need to wait for more of it
            seconds, _ = _shortest_s(lambda dtype=dtype: run(dtype), device, 0.0, least=1)  # type: ignore[misc]
            times_s[dtype] = min(times_s[dtype], seconds)
        turns += 1
    return turns
