"""What `probe` measures of dense operations, memory and the host: which trials, and a row for each.

Every row has the route's error against fp64, the libraries' versions, and beside the warm time one with emptied caches
(`flushed_s`): a model's operation finds part of its operands in a cache, so the two bracket what it will take.
Nothing raises out of `measure`: what does not run here, would not fit in memory or would take too long is a row that
says so. Switches and threads are put back before a row is handed over.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import isfinite
from statistics import median
from typing import Any

import torch

from turbopump.compute import compiled, conditions, deepbench, kernels, kernels_moving, routes
from turbopump.compute.grid import grid
from turbopump.compute.kernels import Route
from turbopump.compute.ops import (
    OPS,
    Attention,
    BatchedGemm,
    Conv1d,
    Conv2d,
    Gather,
    Gemm,
    Launch,
    MemoryCopy,
    MemoryTriad,
    OptimizerStep,
    Rnn,
)
from turbopump.core.errors import UsageError
from turbopump.core.units import human_bytes, human_seconds
from turbopump.core.workload import Op
from turbopump.hardware import timing
from turbopump.hardware.profile import Domain, Measurement, Request, Scalar, Trial

LONGEST_S = {0: 0.3, 1: 1.0, 2: 5.0}
"""Of one call, by tier, of what no recipe asked for."""
CALLS = 4  # of a row at least: one warms up, one says how long a block is, two count
FLUSHED_CALLS, FLUSHED_LONGEST_S = 5, 0.05
MEMORY_SHARE = 0.25
TELLING_S = 2e-3  # a call of this length shows the rate that larger ones will have
OVERHEAD_S = 0.05  # of a row: drawing its inputs, its error
THREADED = (Gemm, BatchedGemm, Conv1d, Conv2d, Rnn, Attention, OptimizerStep, MemoryCopy, MemoryTriad)
AT_ONCE = ("default", "mkldnn.matmul.fp32_precision=bf16")
"""Routes that are measured in an operation's own tier, as models' own kernels are; the others in the next."""
DEEPBENCH_TIERS = (1e9, 2e10)  # FLOPs up to which its shapes are of tier 0 and 1


def domain(op: Op) -> Domain:
    """Which part of the machine an operation tells of."""
    if isinstance(op, Launch):
        return "host"
    return "memory" if isinstance(op, MemoryCopy | MemoryTriad | Gather) else "compute"


def trials(request: Request) -> list[Trial]:
    """What is worth measuring on `request.device`, the most telling first; a recipe's operations before all others.

    Within a tier the kinds take turns, so that a budget that ends early has seen something of each. Raises
    `UsageError` where the device does not exist.
    """
    kind = torch.device(request.device).type
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError("device 'cuda' given, but PyTorch sees no CUDA device here: use 'cpu'")
    dtypes = ("fp32", "bf16")
    suite = [(op, _deepbench_tier(op)) for op in deepbench.ops(dtypes)] if request.suite == "deepbench" else grid(kind)
    found = [*_asked_for(request), *_of_suite(suite, request)]
    wanted = [trial for trial in found if domain(trial.op) in request.domains]
    return list({trial.key: trial for trial in reversed(wanted)}.values())[::-1]


def _asked_for(request: Request) -> Iterator[Trial]:
    """All routes of the recipe's operations: the default of each first, then what could replace it."""
    ops = [op for op in dict.fromkeys(request.ops) if type(op).__name__ in OPS]
    ways = [(op, route) for op in ops for route in routes.routes(op, request.device)]
    for op, route in sorted(ways, key=lambda way: (way[1].name != "default", way[1].first_s)):
        yield Trial(op, route.name, request.threads[0], request.device, 0)
    for op in ops:
        yield from (Trial(op, "default", count, request.device, 1) for count in request.threads[1:])


def _of_suite(suite: Iterable[tuple[Op, int]], request: Request) -> list[Trial]:
    first, *more = request.threads
    found = []
    for place, op, tier in _in_turns(suite):
        for route in routes.routes(op, request.device):
            later = route.comparable and route.name not in AT_ONCE
            late = min(2, tier + later + (route.first_s > 0))
            found.append((late, place, Trial(op, route.name, first, request.device, late)))
        if isinstance(op, THREADED):
            late = min(2, tier + 1)
            found += [(late, place, Trial(op, "default", count, request.device, late)) for count in more]
    return [trial for _, _, trial in sorted(found, key=lambda item: item[:2])]


def _in_turns(suite: Iterable[tuple[Op, int]]) -> list[tuple[float, Op, int]]:
    """Each operation with its place in its tier, 0 to 1, at which the kinds are evenly mixed."""
    tiered = list(suite)
    sizes = Counter((type(op), tier) for op, tier in tiered)
    seen: Counter[Any] = Counter()
    placed = []
    for op, tier in tiered:
        group = (type(op), tier)
        seen[group] += 1
        placed.append(((seen[group] - 0.5) / sizes[group], op, tier))
    return placed


def _deepbench_tier(op: Op) -> int:
    return sum(op.cost.flops > limit for limit in DEEPBENCH_TIERS)


def measure(trials: Iterable[Trial], request: Request, until: float) -> Iterator[Measurement]:
    """A row a trial, in order, until `until` (of `time.monotonic()`); no trial is begun that would last longer.

    A trial that no longer fits has no row (it can be measured next time). When the device vanishes the row says so
    and is the last.
    """
    bench = _Bench(request)
    for trial in trials:
        if time.monotonic() >= until:
            return
        row = bench.row(trial, until)
        if row is None:
            continue
        yield row
        if row.problem and not conditions.alive(trial.device):
            return


class _Bench:
    """Measures trials one after the other and learns how fast each kind is, to know what will fit."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.asked_for = frozenset(request.ops)
        self.rates: dict[tuple[object, ...], float] = {}
        self.slowdown = 1.0  # wall time over the thread's own: what other programs take of the core
        self.prepared: tuple[Op | None, tuple[torch.Tensor, ...]] = (None, ())
        self.flushers: dict[str, Callable[[], object]] = {}

    def row(self, trial: Trial, until: float) -> Measurement | None:
        """The row of `trial`, or None where the time does not suffice for it."""
        kind = domain(trial.op)
        try:
            route = routes.find(trial.op, trial.device, trial.route)
            if route is None:
                return Measurement.failed(trial, kind, f"this machine has no route {trial.route!r} for it")
            problem = route.problem(trial.op, trial.device) or self._too_large(trial)
            if problem:
                return Measurement.failed(trial, kind, problem)
            with conditions.num_threads(trial.threads):
                return self._measured(trial, route, kind, until)
        except Exception as failure:  # whatever a library does not do here is a finding, not the end
            return Measurement.failed(trial, kind, f"does not run: {_one_line(failure)}")

    def _measured(self, trial: Trial, route: Route, kind: Domain, until: float) -> Measurement | None:
        op, device = trial.op, trial.device
        call_s = self._call_s(trial, route)
        longest_s = float("inf") if op in self.asked_for else LONGEST_S[min(trial.tier, 2)]
        if call_s > longest_s:
            problem = (
                f"left out: a call would take about {human_seconds(call_s)}, allowed are {human_seconds(longest_s)}"
            )
            return Measurement.failed(trial, kind, problem)
        needed_s = max(self.request.row_s, CALLS * call_s * self.slowdown) + OVERHEAD_S + route.first_s
        if time.monotonic() + needed_s > until:
            return None
        error = routes.error(op, route, device) if kind == "compute" and route.comparable else None
        inputs = self._inputs(op, device)
        clock = conditions.clock(device, trial.threads)
        with route.setting():
            run = route.ready(op, inputs)
            timed = timing.measure(run, clock=clock, budget_s=self.request.row_s)
            flushed_s = (
                self._flushed_s(run, clock, device) if kind == "compute" and self._cacheable(op, timed) else None
            )
        self._learn(trial, timed)
        row = Measurement.of(trial, kind, timed, flushed_s=flushed_s, library=conditions.library(device), error=error,
                             facts=_facts(op, route))  # fmt: skip
        if error is not None and not error < 1.0:
            problem = f"wrong results here: they differ from fp64 by {error:.1e} of their norm"
            return replace(row, error=error if isfinite(error) else None, problem=problem)
        return row

    def _inputs(self, op: Op, device: str) -> tuple[torch.Tensor, ...]:
        """Shared by the routes of an operation, which follow one another."""
        if self.prepared[0] != op:
            self.prepared = (None, ())  # frees the last one's first
            generator = torch.Generator(device).manual_seed(0)
            self.prepared = (op, kernels.inputs(op, device, generator))
        return self.prepared[1]

    def _too_large(self, trial: Trial) -> str:
        needed, there = _operand_bytes(trial.op), conditions.available_bytes(trial.device)
        if needed <= MEMORY_SHARE * there:
            return ""
        return f"left out: needs about {human_bytes(needed)}, a quarter of the free {human_bytes(there)} is allowed"

    def _cacheable(self, op: Op, timed: timing.Timing) -> bool:
        """Whether emptied caches can matter, and the calls to find out are short."""
        return timed.wall_s < FLUSHED_LONGEST_S and op.cost.bytes < 4 * conditions.cache_bytes(self.request.device)

    def _flushed_s(self, run: Any, clock: timing.Clock, device: str) -> float:
        if device not in self.flushers:
            self.flushers[device] = conditions.flusher(device)
        seconds = []
        for _ in range(FLUSHED_CALLS):
            self.flushers[device]()
            seconds.append(clock.time(run, 1)[0])
        return median(seconds)

    def _call_s(self, trial: Trial, route: Route) -> float:
        """About how long a call takes: by the best rate seen of its like, or else by that of smaller shapes."""
        work, group = _work(trial.op), _group(trial)
        if not work:
            return 0.0
        if group not in self.rates:
            self._try_smaller(trial, route)
        return work / self.rates[group]

    def _try_smaller(self, trial: Trial, route: Route) -> None:
        """Learns a rate from calls of growing shapes, up to one of some milliseconds."""
        clock = conditions.clock(trial.device, trial.threads)
        for scale in (1, 2, 4, 8):
            small = routes.reduced(trial.op, scale)
            inputs = kernels.inputs(small, trial.device, torch.Generator(trial.device).manual_seed(0))
            with route.setting():
                run = route.ready(small, inputs)
                run()
                seconds, _ = clock.time(run, 1)
            self.rates[_group(trial)] = _work(small) / max(seconds, 1e-9)
            if seconds > TELLING_S or small == trial.op:
                return

    def _learn(self, trial: Trial, timed: timing.Timing) -> None:
        group = _group(trial)
        self.rates[group] = max(self.rates.get(group, 0.0), _work(trial.op) / max(timed.min_s, 1e-9))
        self.slowdown = max(1.0, (self.slowdown + timed.wall_s / timed.median_s) / 2)


def _group(trial: Trial) -> tuple[object, ...]:
    """What trials have in common whose rates are alike."""
    op: Any = trial.op
    names = ("dtype", "kind", "name", "direction", "backward")
    return (type(op), *(getattr(op, name, None) for name in names), trial.route, trial.threads, trial.device)


def _work(op: Op) -> float:
    return op.cost.flops or op.cost.bytes


def _operand_bytes(op: Op) -> float:
    """What the operands and the routes' own buffers may take, generously."""
    if isinstance(op, MemoryCopy | MemoryTriad):
        return op.cost.bytes
    if isinstance(op, Gather):
        return float(op.table_rows * op.row_bytes) + op.cost.bytes
    extra = 0.0
    if isinstance(op, Attention):  # scores, where a route keeps them
        extra = 4.0 * 3 * op.batch * op.heads * op.q_len * op.kv_len
    if isinstance(op, Conv2d):  # columns of an image's windows
        extra = 4.0 * op.in_channels * op.kernel_h * op.kernel_w * op.out_height * op.out_width
    if isinstance(op, Rnn):  # gates of every step
        extra = 4.0 * 8 * op.batch * op.steps * op.hidden_size * op.directions
    return 2 * op.cost.bytes + extra


def _facts(op: Op, route: Route) -> dict[str, Scalar]:
    facts: dict[str, Scalar] = {"by": route.library} if route.library else {}
    if route.name == compiled.NAME:
        facts |= compiled.facts(op)
    if kernels_moving.is_chain(op):
        facts["stands_for"] = "a chain of additions with as many reads and writes"
    return facts


def _one_line(failure: Exception) -> str:
    lines = str(failure).strip().splitlines()
    return lines[0][:200] if lines else type(failure).__name__
