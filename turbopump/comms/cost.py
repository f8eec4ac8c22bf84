"""What a collective costs on a machine that was measured: a curve of time against size, by collective, ranks and route.

Two models of a curve compete, and the one that predicts left-out sizes better is taken (`CollectiveCurve.left_out`):
- `segments`: 1 to 4 pieces `alpha + beta * bytes` (a protocol or algorithm each), breakpoints by dynamic programming;
- `neighbours`: a straight line between the next smaller and next larger measured size, after making times monotone. In
  time against bytes, not in logarithms: it is exact for `alpha + beta * bytes`, where a line in logarithms errs by 6 %
  half-way between sizes a factor of 4 apart (published A100 and V100 tables: 1.0 % median error against 3.9 %).
Beyond the measured sizes a curve takes its form from that of the next number of ranks, if that reaches further
(DeepBench: halves the error), else it goes on as `alpha + beta * bytes`. What was never measured at all is left to
textbook.py and the links' data.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np

from turbopump.comms.curves import (
    Lines,
    Points,
    Predictor,
    Segment,
    fit_segments,
    follow_neighbours,
    follow_segments,
)
from turbopump.comms.ops import COLLECTIVES, Collective
from turbopump.comms.textbook import predict_on_link
from turbopump.core.errors import ProfileError
from turbopump.hardware.profile import Measurement, Prediction
from turbopump.hardware.specs import LinkSpec

BAND = 0.8
LEAST_HALF_WIDTH = 0.02
UNKNOWN_HALF_WIDTH = math.log(2.0)  # where too little was measured to know: a factor of 2
KINDS: Mapping[str, type[Collective]] = {kind.__name__: kind for kind in COLLECTIVES}

Model = Literal["segments", "neighbours"]


@dataclass(frozen=True)
class CollectiveCurve:
    """Time against size of one collective over `ranks` ranks of one level by one route. Made by `fit`."""

    kind: str
    ranks: int
    level: str
    dtype: str
    route: str
    device: str
    points: tuple[tuple[float, float], ...]
    """Bytes and median seconds, ascending."""
    measured: Mapping[int, tuple[float, float, float]]
    """Of a size: median, least and 90 % quantile, seconds."""
    model: Model
    left_out: Mapping[Model, float]
    """Median relative error of each model at the inner sizes, each predicted from the others; empty below 4 sizes."""
    inner: tuple[float, ...] = field(default=())
    """Errors of the chosen model at the inner sizes, as absolute logarithms."""
    outer: tuple[float, ...] = field(default=())
    """The same of the least and the largest size, predicted from the others."""

    @cached_property
    def segments(self) -> list[Segment]:
        return fit_segments(self.points)

    @cached_property
    def seconds(self) -> Predictor:
        """Seconds at a size."""
        return follow_segments(self.segments) if self.model == "segments" else follow_neighbours(self.points)

    def covers(self, size: float) -> bool:
        return self.points[0][0] <= size <= self.points[-1][0]

    def predict(self, op: Collective) -> Prediction:
        """`op`, of this curve's kind and ranks: as measured, between measured sizes, or beyond them ("curve")."""
        if op.bytes in self.measured and op.dtype == self.dtype:
            median, least, most = self.measured[op.bytes]
            return Prediction(median, least, most, "measured", self.route)
        seconds = self.seconds(op.bytes)
        basis: Literal["interpolated", "curve"] = "interpolated" if self.covers(op.bytes) else "curve"
        return banded(seconds, self.half_width(op.bytes), basis, self.route)

    def half_width(self, size: float) -> float:
        """Of the 80 % band at a size that was not measured, in the logarithm of time.

        The 80 % quantile of the errors at left-out sizes; beyond the measured sizes it grows with the distance.
        """
        inside = _quantile(self.inner)
        if self.covers(size):
            return inside
        end = self.points[-1][0] if size > self.points[-1][0] else self.points[0][0]
        distance = abs(math.log2(max(size, 1.0) / max(end, 1.0)))
        return max(inside, _quantile(self.outer)) * max(1.0, distance / 2)


def banded(seconds: float, half_width: float, basis: Literal["interpolated", "curve"], route: str) -> Prediction:
    return Prediction(seconds, seconds * math.exp(-half_width), seconds * math.exp(half_width), basis, route)


def _quantile(errors: Sequence[float]) -> float:
    """The 80 % quantile as conformal prediction takes it: rank ceil(0.8 (m + 1)), or the largest."""
    if len(errors) < 2:
        return UNKNOWN_HALF_WIDTH
    return max(LEAST_HALF_WIDTH, sorted(errors)[min(len(errors), math.ceil(BAND * (len(errors) + 1))) - 1])


def fit(rows: Iterable[Measurement]) -> CollectiveCurve:
    """The curve of rows that differ in size alone; raises `ProfileError` where they differ otherwise or none works."""
    working = [row for row in rows if row.works and row.kind in KINDS]
    groups = {_group(row) for row in working}
    if len(groups) != 1:
        raise ProfileError(f"a curve is fitted to the rows of one collective, ranks and route, not of {len(groups)}")
    kind, level, dtype, route, device, ranks = groups.pop()
    by_size: dict[int, list[Measurement]] = defaultdict(list)
    for row in working:
        by_size[int(row.op["bytes"])].append(row)
    measured = {size: _middle(by_size[size]) for size in sorted(by_size)}
    points = tuple((float(size), median) for size, (median, _, _) in measured.items())
    errors = _left_out_errors(points)
    left_out: dict[Model, float] = {
        model: float(np.median(np.expm1(inner))) for model, (inner, _) in errors.items() if len(points) >= 4
    }
    model: Model = min(left_out, key=left_out.__getitem__) if left_out else "neighbours"
    inner, outer = errors[model]
    return CollectiveCurve(kind, ranks, level, dtype, route, device, points, measured, model, left_out, inner, outer)


def _group(row: Measurement) -> tuple[str, str, str, str, str, int]:
    op = row.op
    return row.kind, str(op["level"]), str(op["dtype"]), row.route, row.device, int(op["ranks"])


def _middle(rows: Sequence[Measurement]) -> tuple[float, float, float]:
    median = float(np.median([row.seconds for row in rows]))
    least = min([row.min_s for row in rows if row.min_s is not None], default=median)
    most = float(np.median([median if row.p90_s is None else row.p90_s for row in rows]))
    return median, least, max(most, median)


def _left_out_errors(points: Points) -> dict[Model, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Of each model the errors at inner sizes and at both ends, as absolute logarithms."""
    line = Lines()
    models: dict[Model, Callable[[Points], Predictor]] = {
        "neighbours": follow_neighbours,
        "segments": lambda rest: follow_segments(fit_segments(rest, line=line)),
    }
    errors: dict[Model, tuple[tuple[float, ...], tuple[float, ...]]] = {}
    for name, model in models.items():
        found = [
            abs(math.log(max(model([*points[:i], *points[i + 1 :]])(size), 1e-12) / seconds))
            for i, (size, seconds) in enumerate(points) if len(points) > 1
        ]  # fmt: skip
        errors[name] = (tuple(found[1:-1]), tuple(found[:1] + found[-1:]))
    return errors


@dataclass(frozen=True)
class CollectiveModel:
    """All curves of a machine, and its links for what was not measured."""

    curves: tuple[CollectiveCurve, ...]
    links: tuple[LinkSpec, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[Measurement], links: Iterable[LinkSpec] = ()) -> CollectiveModel:
        """From a profile's rows; those of other operations are left aside."""
        groups: dict[tuple, list[Measurement]] = defaultdict(list)
        for row in rows:
            if row.works and row.kind in KINDS:
                groups[_group(row)].append(row)
        return cls(tuple(fit(group) for group in groups.values()), tuple(links))

    def predict(self, op: Collective, route: str | None = None) -> Prediction:
        """Seconds of `op` by `route`, by default the one that is expected to be fastest; 0 for one rank.

        Basis: `measured`, `interpolated` (between sizes or numbers of ranks), `curve` (beyond them, or of another
        dtype), `roofline` (a link's data). Raises `ProfileError` where neither rows nor links tell.
        """
        if op.ranks == 1:
            return Prediction(0.0, 0.0, 0.0, "curve", route or "default")
        families: dict[tuple[str, str], list[CollectiveCurve]] = defaultdict(list)
        for curve in self.curves:
            if curve.kind == type(op).__name__ and curve.level == op.level and route in (None, curve.route):
                families[curve.route, curve.device].append(curve)
        found = [_in_family(op, _of_dtype(family, op.dtype)) for family in families.values()]
        if not found and route is None:
            found = [predict_on_link(op, link) for link in self.links if link.level == op.level]
        if not found:
            raise ProfileError(
                f"nothing is known of {op.key}{f' by {route}' if route else ''}: probe a machine with such ranks "
                f"(`turbopump probe --only comms`) or give the cluster a link of level {op.level}"
            )
        return min(found, key=lambda prediction: prediction.seconds)


def _of_dtype(family: list[CollectiveCurve], dtype: str) -> list[CollectiveCurve]:
    """Curves of the dtype, else of that with the most sizes: bytes decide, the adding up little."""
    same = [curve for curve in family if curve.dtype == dtype]
    widest = max(family, key=lambda curve: len(curve.points)).dtype
    return same or [curve for curve in family if curve.dtype == widest]


def _in_family(op: Collective, curves: list[CollectiveCurve]) -> Prediction:
    """`op` from curves that differ in ranks alone."""
    by_ranks = {curve.ranks: curve for curve in curves}
    if op.ranks in by_ranks:
        curve = by_ranks[op.ranks]
        if curve.covers(op.bytes) or op.bytes in curve.measured:
            found = curve.predict(op)
            return found if op.dtype == curve.dtype else Prediction(found.seconds, found.low_s, found.high_s, "curve",
                                                                    found.route)  # fmt: skip
        return _beyond(op, curve, [other for other in curves if other is not curve])
    fewer, more = [p for p in by_ranks if p < op.ranks], [p for p in by_ranks if p > op.ranks]
    if fewer and more:
        return _between(op, by_ranks[max(fewer)], by_ranks[min(more)])
    return _other_ranks(op, by_ranks[max(fewer) if fewer else min(more)])


def _beyond(op: Collective, curve: CollectiveCurve, others: list[CollectiveCurve]) -> Prediction:
    """A size beyond the curve's: from its nearest end by the form of curves of other ranks that reach both sizes."""
    end = curve.points[-1] if op.bytes > curve.points[-1][0] else curve.points[0]
    reaching = [other for other in others if len(other.points) > 1 and other.covers(op.bytes) and other.covers(end[0])]
    if not reaching:
        return curve.predict(op)
    distance = [abs(math.log(other.ranks / op.ranks)) for other in reaching]
    nearest = sorted(zip(distance, reaching), key=lambda pair: pair[0])[:2]
    weights = [1 / away for away, _ in nearest]
    forms = [math.log(other.seconds(op.bytes) / other.seconds(end[0])) for _, other in nearest]
    form = sum(weight * f for weight, f in zip(weights, forms)) / sum(weights)
    doubt = max(_quantile(curve.inner), max(forms) - min(forms), 0.1 * abs(math.log(op.bytes / end[0])))
    return banded(end[1] * math.exp(form), doubt, "curve", curve.route)


def _between(op: Collective, fewer: CollectiveCurve, more: CollectiveCurve) -> Prediction:
    """Between two numbers of ranks, at the same bytes sent by each rank: a line in the logarithms of ranks and time."""
    (below, below_width), (above, above_width) = (_same_sent(op, curve) for curve in (fewer, more))
    share = math.log(op.ranks / fewer.ranks) / math.log(more.ranks / fewer.ranks)
    width = max(below_width, above_width, 0.2 * abs(math.log(above / below)))
    return banded(below ** (1 - share) * above**share, width, "interpolated", fewer.route)


def _other_ranks(op: Collective, curve: CollectiveCurve) -> Prediction:
    """More (or fewer) ranks than measured: latency grows with the algorithm's steps, the rest with the bytes sent."""
    seconds, width = _same_sent(op, curve)
    latency = min(seconds, curve.points[0][1])
    steps = op.steps / max(1, _with_ranks(op, curve.ranks).steps)
    grown = latency * steps + (seconds - latency)
    return banded(grown, max(width, 0.2) + 0.2 * abs(math.log2(op.ranks / curve.ranks)), "curve", curve.route)


def _same_sent(op: Collective, curve: CollectiveCurve) -> tuple[float, float]:
    """Seconds on the curve, and half-width, where each of its ranks sends as much as each of `op` does."""
    there = _with_ranks(op, curve.ranks).sent_share
    size = op.bytes * op.sent_share / there if there else float(op.bytes)
    return curve.seconds(size), curve.half_width(size)


def _with_ranks(op: Collective, ranks: int) -> Collective:
    return KINDS[type(op).__name__](op.bytes, ranks, op.level, op.dtype)
