"""The best matrix-product rate of a dtype on this machine, and the dtype that trains fastest here.

`measure_peak` tries every route that PyTorch has built in (turbopump.compute.switches) at several shapes and takes the
best rate: the limit that `share_of_limit` divides by. A route counts only if its result is as exact as its dtype.
Nothing is assumed of a dtype: what fails or is slow is a row that says so. All settings are put back.
CPU runs are timed by the CPU clock of the calling thread, so that other programs do not lower the limit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbopump.compute import conditions, kernels, routes
from turbopump.compute.choice import MAX_ERROR
from turbopump.compute.kernels import Route
from turbopump.compute.ops import Gemm
from turbopump.core.errors import UsageError
from turbopump.hardware import timing

DTYPES = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8")
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
CALLS = 3  # of a shape: one warms up, two count


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
    shapes = CPU_SHAPES if torch.device(device).type == "cpu" else CUDA_SHAPES
    found = routes.built_in(Gemm(*shapes[0], dtype), device)
    rows: list[PeakRow] = []
    with conditions.num_threads(threads), torch.no_grad():
        for number, route in enumerate(found):
            share_s = (budget_s - sum(r.seconds for r in rows)) / (len(found) - number)
            rows += _measure_route(route, dtype, device, shapes, share_s)
    best = max(rows, key=lambda row: row.flops_per_s)
    return PeakMeasurement(
        best.flops_per_s, best.route if best.flops_per_s else "", dtype, tuple(asdict(row) for row in rows)
    )


def _measure_route(
    route: Route, dtype: str, device: str, shapes: tuple[tuple[int, int, int], ...], budget_s: float
) -> list[PeakRow]:
    """Rows of one route, smallest shape first; shapes that the budget has no room for are left out."""
    begin, rate = time.perf_counter(), 0.0
    error, problem = _exactness(Gemm(*shapes[0], dtype), route, device)
    if problem:
        return [PeakRow(route.name, "", 0.0, time.perf_counter() - begin, 0, error, problem)]
    rows: list[PeakRow] = []
    for number, (m, n, k) in enumerate(shapes):
        op = Gemm(m, n, k, dtype)
        left_s = budget_s - (time.perf_counter() - begin)
        # the first shape is measured in any case
        if rows and (left_s <= 0 or (rate and CALLS * op.cost.flops / rate > left_s)):
            break
        row = _measure_shape(route, op, device, error, left_s / (len(shapes) - number))
        rate = max(rate, row.flops_per_s)
        rows.append(row)
    return rows


def _exactness(op: Gemm, route: Route, device: str) -> tuple[float, str]:
    """The route's error, and why it does not count, if it does not."""
    if problem := route.problem(op, device):
        return float("nan"), f"does not run: {problem}"
    try:
        error = routes.error(op, route, device)
    except (RuntimeError, NotImplementedError) as failure:
        return float("nan"), f"does not run: {str(failure).splitlines()[0]}"
    allowed = MAX_ERROR[op.dtype]
    if not error <= allowed:
        return error, f"not exact {op.dtype}: relative error {error:.1e}, allowed {allowed:.0e}"
    return error, ""


def _measure_shape(route: Route, op: Gemm, device: str, error: float, budget_s: float) -> PeakRow:
    begin, on_cpu = time.perf_counter(), torch.device(device).type == "cpu"
    try:
        inputs = kernels.inputs(op, device, torch.Generator(device).manual_seed(0))
        with route.setting():
            run = route.ready(op, inputs)
            # these shapes last milliseconds on a CPU: every call is a block; the thread's own time on all of them
            timed = timing.measure(run, clock=conditions.clock(device), budget_s=budget_s, single=on_cpu)
    except (RuntimeError, NotImplementedError) as failure:
        problem = f"does not run: {str(failure).splitlines()[0]}"
        return PeakRow(route.name, op.key, 0.0, time.perf_counter() - begin, 0, error, problem)
    elapsed_s = time.perf_counter() - begin
    return PeakRow(route.name, op.key, op.cost.flops / timed.min_s, elapsed_s, timed.runs * timed.calls, error)


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
    clock = conditions.clock(device)
    begin, turns = time.perf_counter(), 0
    while turns < 2 or time.perf_counter() - begin < budget_s:
        for dtype in times_s:
            if turns and times_s["bf16"] > 4 * times_s["fp32"]:
                return turns  # an emulated bf16: no need to wait for more of it
            seconds, _ = clock.time(partial(run, dtype), 1)
            times_s[dtype] = min(times_s[dtype], seconds)
        turns += 1
    return turns
