"""Curves of time against size through a few measured points, for `cost.py`: pieces of straight lines, or neighbours.

Both know only bytes and seconds, never fall and are never negative. `fit_segments` finds the pieces, a protocol or an
algorithm each; `follow_segments` and `follow_neighbours` make functions of the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

MAX_SEGMENTS = 4

Points = Sequence[tuple[float, float]]  # bytes, seconds; ascending in bytes
Predictor = Callable[[float], float]


@dataclass(frozen=True)
class Segment:
    """`alpha_s + beta_s_per_byte * bytes` from one measured size to another."""

    from_bytes: float
    to_bytes: float
    alpha_s: float
    beta_s_per_byte: float

    def seconds(self, size: float) -> float:
        return self.alpha_s + self.beta_s_per_byte * size


def fit_line(points: Points, rounds: int = 8) -> tuple[float, float, float]:
    """`alpha` and `beta`, neither negative, of least squared error in the logarithm of time; and that sum of squares.

    Gauss-Newton: every round is a weighted linear least-squares problem with two unknowns; the first is relative error.
    """
    n = np.array([size for size, _ in points])
    t = np.array([seconds for _, seconds in points])
    fitted = t
    alpha = beta = 0.0
    for _ in range(rounds):
        wanted = 1.0 + np.log(t / fitted)  # of alpha / fitted + beta * n / fitted
        x, y = 1.0 / fitted, n / fitted
        alpha, beta = _two_unknowns(x, y, wanted)
        update = alpha + beta * n
        if rounds == 1 or np.allclose(update, fitted, rtol=1e-9, atol=0.0):
            break
        fitted = np.maximum(update, 0.1 * fitted)  # no step to zero or below
    error = float(np.sum(np.log(t / np.maximum(alpha + beta * n, 1e-12)) ** 2))
    return alpha, beta, error


def _two_unknowns(x: np.ndarray, y: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Not negative `a`, `b` that bring `a x + b y` closest to `wanted`."""
    xx, xy, yy, xw, yw = x @ x, x @ y, y @ y, x @ wanted, y @ wanted
    determinant = xx * yy - xy * xy
    if determinant > 1e-12 * xx * yy:
        a, b = (yy * xw - xy * yw) / determinant, (xx * yw - xy * xw) / determinant
        if a >= 0 and b >= 0:
            return float(a), float(b)
    only_a, only_b = max(0.0, xw / xx), max(0.0, yw / yy) if yy else 0.0
    error_a = np.sum((only_a * x - wanted) ** 2)
    error_b = np.sum((only_b * y - wanted) ** 2)
    return (float(only_a), 0.0) if error_a <= error_b else (0.0, float(only_b))


class Lines:
    """First rounds of `fit_line` on runs of the same points, each made once: enough to compare partitions."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[float, float], ...], tuple[float, float, float]] = {}

    def __call__(self, points: Points) -> tuple[float, float, float]:
        key = tuple(points)
        if key not in self._known:
            self._known[key] = fit_line(key, rounds=1)
        return self._known[key]


def fit_segments(points: Points, most: int = MAX_SEGMENTS, line: Lines | None = None) -> list[Segment]:
    """The best partition into segments of at least 2 points: least `m log(error / m) + 3 k log m` (BIC), k segments.

    Dynamic programming over the last breakpoint (Bellman 1961) for each number of segments.
    """
    m, line = len(points), line or Lines()
    if m == 1:
        return [Segment(points[0][0], points[0][0], points[0][1], 0.0)]
    best: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [])}]
    for _ in range(min(most, m // 2)):
        layer: dict[int, tuple[float, list[int]]] = {}
        for end in range(2, m + 1):
            tries = [(error + line(points[start:end])[2], [*cuts, start])
                     for start, (error, cuts) in best[-1].items() if start <= end - 2]  # fmt: skip
            if tries:
                layer[end] = min(tries)
        best.append(layer)
    floor = m * 1e-8  # a relative error of 1e-4 is exact: more segments cannot be wanted
    scores = [
        (m * math.log((layer[m][0] + floor) / m) + 3 * number * math.log(m), layer[m][1])
        for number, layer in enumerate(best) if number and m in layer
    ]  # fmt: skip
    cuts = min(scores)[1]
    fitted = []
    for start, end in pairwise([*cuts, m]):
        alpha, beta, _ = fit_line(points[start:end])
        fitted.append(Segment(points[start][0], points[end - 1][0], alpha, beta))
    return fitted


def follow_segments(segments: Sequence[Segment]) -> Predictor:
    """Time against size: segments, joined where they cross in the gap between them, else by a line; never falling."""

    def at(size: float) -> float:
        floor = 0.0  # no less than at the ends of the segments before
        for number, segment in enumerate(segments):
            following = segments[number + 1] if number + 1 < len(segments) else None
            if size <= segment.to_bytes or following is None:
                return max(floor, segment.seconds(size))
            floor = max(floor, segment.seconds(segment.to_bytes))
            if size < following.from_bytes:
                return max(floor, _in_the_gap(segment, following, size))
        raise AssertionError("there is no curve without segments")

    return at


def _in_the_gap(left: Segment, right: Segment, size: float) -> float:
    low, high = left.to_bytes, right.from_bytes
    before, after = left.seconds(low) - right.seconds(low), left.seconds(high) - right.seconds(high)
    if before * after < 0:  # they cross
        crossing = low + (high - low) * before / (before - after)
        return left.seconds(size) if size <= crossing else right.seconds(size)
    begin, end = left.seconds(low), right.seconds(high)
    return begin + (end - begin) * (size - low) / (high - low)


def follow_neighbours(points: Points) -> Predictor:
    """Straight lines between the points after isotonic regression; beyond them that of `fit_line` to the last three."""
    sizes = np.array([size for size, _ in points])
    seconds = isotonic(np.array([t for _, t in points]))
    level = list(zip(sizes.tolist(), seconds.tolist()))
    before, after = fit_line(level[:3]), fit_line(level[-3:])

    def at(size: float) -> float:
        if size < sizes[0]:  # through the end point, with the line's own form
            return min(float(seconds[0]), float(seconds[0]) * _form(before, size, sizes[0]))
        if size > sizes[-1]:
            return float(seconds[-1]) * _form(after, size, sizes[-1])
        return float(np.interp(size, sizes, seconds))

    return at


def _form(line: tuple[float, float, float], size: float, known: float) -> float:
    alpha, beta, _ = line
    return (alpha + beta * size) / (alpha + beta * known) if alpha + beta * known > 0 else 1.0


def isotonic(seconds: np.ndarray) -> np.ndarray:
    """The closest never falling series in the logarithm: pool adjacent violators (Ayer et al. 1955)."""
    pools: list[tuple[float, int]] = []
    for value in np.log(seconds):
        mean, count = float(value), 1
        while pools and pools[-1][0] > mean:
            previous, weight = pools.pop()
            mean, count = (previous * weight + mean * count) / (weight + count), weight + count
        pools.append((mean, count))
    return np.exp(np.concatenate([np.full(count, mean) for mean, count in pools]))
