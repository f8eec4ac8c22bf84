"""How well this machine's rows predict operations at shapes that were never measured: products, convolutions, RNNs.

`interpolation(family)` measures two sets with one thread: what the model is made of, a grid of which one half are
usual sizes (powers of two and those of networks) and the other uneven ones, since kernels work in blocks of 8 and 16
and a grid of usual sizes alone never sees the rest of one; and fresh shapes between its ends, drawn log-uniformly, none
of them on the grid, which it has to predict. `folds` leaves each fifth of the grid out instead. A row is the least time
of several passes: beside other programs two medians of CPU time differed by 5 to 10 % and more, least times by 1 to 8 %
(AMD EPYC, Zen 4, 2 shared cores). Functions only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.halves import profile_of
from turbopump.compute import conditions, kernels, routes
from turbopump.compute.cost import ComputeCost
from turbopump.compute.ops import OPS, Conv2d, Gemm, Rnn
from turbopump.core.workload import Op
from turbopump.hardware import timing
from turbopump.hardware.profile import Measurement, Trial

Array = npt.NDArray[np.float64]
Draw = Callable[[Any, bool], Op]
MOST_FLOPS = 2e9  # some 20 ms on one core of 2024
LEAST_FLOPS = 1e5
GRID = {"gemm": 150, "conv": 300, "rnn": 150}  # a convolution has nine sizes and three directions
FRESH = 60
PASSES = 4
ROW_S = 0.03
FOLDS = 5
USUAL = (16, 24, 32, 48, 64, 80, 96, 100, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1000, 1024, 1280, 1536, 1760,
         2048, 2560, 3072, 4096)  # fmt: skip


@dataclass(frozen=True)
class Judged:
    """Of every row predicted: relative errors of the prediction and of the roofline; whether the band held it."""

    errors: Array
    roofline_errors: Array
    covered: Array
    apart: float
    """Median difference of the two shortest times of a row: no model can do much better."""

    @property
    def median(self) -> float:
        return float(np.median(self.errors))


def _size(generator: Any, low: float, high: float, usual: bool) -> int:
    """Between the ends, uniform in its logarithm; `usual` takes the nearest of the usual sizes there."""
    value = float(np.exp(generator.uniform(np.log(low), np.log(high))))
    near = [size for size in USUAL if low <= size <= high] if usual else []
    return min(near, key=lambda size: abs(np.log(size / value))) if near else max(1, round(value))


def _product(generator: Any, usual: bool) -> Op:
    m, n, k = (_size(generator, 16, 4096, usual) for _ in range(3))
    return Gemm(m, n, k, "fp32", str(generator.choice(["nt", "nn", "tn"])))  # type: ignore[arg-type]


def _convolution(generator: Any, usual: bool) -> Op:
    kernel, stride = int(generator.choice([1, 3, 5, 7], p=[0.25, 0.45, 0.15, 0.15])), int(generator.choice([1, 2]))
    channels, out = _size(generator, 3, 256, usual), _size(generator, 16, 256, usual)
    edge = int(generator.choice([7, 14, 28, 56, 112])) if usual else _size(generator, 7, 112, False)
    batch = int(generator.choice([1, 2, 4, 8, 16])) if usual else _size(generator, 1, 16, False)
    direction = str(generator.choice(["forward", "input_gradient", "weight_gradient"]))
    return Conv2d(batch, channels, edge, edge, out, kernel, kernel, stride, stride, kernel // 2, kernel // 2, "fp32",
                  direction=direction)  # type: ignore[arg-type]  # fmt: skip


def _recurrent(generator: Any, usual: bool) -> Op:
    kind = str(generator.choice(["gru", "lstm", "vanilla"]))
    batch = int(generator.choice([1, 2, 4, 8, 16, 32, 64])) if usual else _size(generator, 1, 64, False)
    steps = int(generator.choice([5, 10, 20, 50])) if usual else _size(generator, 5, 50, False)
    inputs, hidden = (_size(generator, 64, 1024, usual) for _ in range(2))
    backward = bool(generator.integers(2))
    return Rnn(kind, batch, steps, inputs, hidden, False, "fp32", backward)  # type: ignore[arg-type]


FAMILIES: dict[str, Draw] = {"gemm": _product, "conv": _convolution, "rnn": _recurrent}


def ops(family: str, count: int, *, usual: bool, seed: int, never: Sequence[Op] = ()) -> list[Op]:
    """`count` different operations of a family of moderate size; none of those in `never`."""
    generator = np.random.default_rng(seed)
    found: dict[Op, None] = {}
    while len(found) < count:
        op = FAMILIES[family](generator, usual)
        if LEAST_FLOPS <= op.cost.flops <= MOST_FLOPS and op not in never:
            found[op] = None
    return list(found)


def grid_of(family: str, count: int | None = None, *, seed: int = 0) -> list[Op]:
    """What is measured to predict from: half usual sizes, half uneven ones."""
    count = GRID[family] if count is None else count
    usual = ops(family, count // 2, usual=True, seed=seed)
    return usual + ops(family, count - len(usual), usual=False, seed=seed + 500, never=usual)


def measured(chosen: Sequence[Op], *, route: str = "default", row_s: float = ROW_S) -> list[Measurement]:
    """Rows of the operations with one thread, each the least time of `PASSES` apart: other programs only ever add."""
    passes = [{op: _timed(op, route, row_s) for op in chosen} for _ in range(PASSES)]
    return [_least([rows[op] for rows in passes]) for op in chosen]


def _timed(op: Op, route: str, row_s: float) -> Measurement:
    """Without the error and the flushed time that `compute.bench` adds. Raises where there is no such route."""
    way = routes.find(op, "cpu", route)
    if way is None:
        raise ValueError(f"{op.key} has no route {route!r} here: take another")
    inputs = kernels.inputs(op, "cpu", torch.Generator().manual_seed(0))
    with conditions.num_threads(1), way.setting():
        timed = timing.measure(way.ready(op, inputs), budget_s=row_s)
    return Measurement.of(Trial(op, route), "compute", timed)


def _least(rows: Sequence[Measurement]) -> Measurement:
    """`apart` says how far the two shortest are from each other: no prediction can be expected to be nearer."""
    least, next_s = min(rows, key=_min_s), sorted(map(_min_s, rows))[1]
    return replace(least, median_s=_min_s(least), facts={"apart": next_s / _min_s(least) - 1.0})


def _min_s(row: Measurement) -> float:
    return row.min_s or row.seconds


def judged(known: Sequence[Measurement], asked: Sequence[Measurement]) -> Judged:
    """The rows `asked` as the rows `known` predict them."""
    cost = ComputeCost(profile_of("here", known))
    wanted = [_op(row) for row in asked]
    seconds = np.array([row.seconds for row in asked])
    predictions = cost.predict_many(wanted, known[0].route)
    if any(p.basis == "measured" for p in predictions):
        raise ValueError("an operation to be predicted was among those measured: draw others")
    errors = np.abs(np.array([p.seconds for p in predictions]) / seconds - 1.0)
    roofline = np.abs(np.array([cost.least_s(op) for op in wanted]) / seconds - 1.0)
    covered = np.array([p.low_s <= s <= p.high_s for p, s in zip(predictions, seconds)], dtype=float)
    return Judged(errors, roofline, covered, _apart(asked))


def _apart(rows: Sequence[Measurement]) -> float:
    """0 for rows that were measured once."""
    return float(np.median([row.facts.get("apart", 0.0) for row in rows]))  # type: ignore[arg-type]


def interpolation(
    family: str, *, grid: int | None = None, fresh: int = FRESH, seed: int = 0, row_s: float = ROW_S
) -> Judged:
    """Measures a grid and fresh shapes of a family (`gemm`, `conv`, `rnn`) and judges; about a minute."""
    on_grid = grid_of(family, grid, seed=seed)
    off_grid = ops(family, fresh, usual=False, seed=seed + 1000, never=on_grid)
    return judged(measured(on_grid, row_s=row_s), measured(off_grid, row_s=row_s))


def folds(rows: Sequence[Measurement], *, seed: int = 0) -> Judged:
    """Each fifth of the rows as the others predict it."""
    order = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    parts = []
    for fold in range(FOLDS):
        known = [row for row, place in zip(rows, order) if place != fold]
        parts.append(judged(known, [row for row, place in zip(rows, order) if place == fold]))
    errors, roofline, covered = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("errors", "roofline_errors", "covered")
    )
    return Judged(errors, roofline, covered, _apart(rows))


def _op(row: Measurement) -> Op:
    fields: Any = dict(row.op)
    return OPS[row.kind](**fields)
