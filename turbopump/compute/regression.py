"""Gaussian-process regression in NumPy: a smooth guess between measured points, and how far it may be off.

The covariance is the sum of a smooth part (squared exponential) and a rough one (Matern 3/2), each with a length per
column, so that columns which do not matter switch themselves off (Rasmussen and Williams 2006, chapters 2, 4 and 5).
Lengths, heights and the noise are those of the greatest posterior probability, found from the given points alone by
sign-based steps (Rprop) along the exact gradient. Points that stand out, as rows do that another program disturbed,
count less. A band is as wide as it takes to hold 80 % of the points of each third of the shapes when predicted from the
other two thirds, everything found anew: residuals of a fit that has seen the points flatter (on DeepBench's tables
their bands held 70 %).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
STEPS = 50  # 300 change the median error on DeepBench's tables by less than 0.001
MOST_FOR_LENGTHS = 192
MOST_POINTS = 1500
LEVEL = 1.0  # variance of the unknown mean
AT_ONCE = 512  # points that are predicted together
OUTLYING = 2.0
COVERAGE = 0.8
FOLDS = 3
FEW_POINTS_WIDTH = 2.0  # instead of 1.28: too few points to check


def _smooth(squared: Array) -> tuple[Array, Array]:
    value = np.exp(-0.5 * squared)
    return value, value


def _rough(squared: Array) -> tuple[Array, Array]:
    distance = np.sqrt(3.0 * squared)
    decay = np.exp(-distance)
    return (1.0 + distance) * decay, 3.0 * decay


_PARTS = (_smooth, _rough)
"""Each gives the covariance and minus twice its derivative, of the squared scaled distance."""


class Regression:
    """Of `y` on the standardised columns `x` `[points, columns]`; at least 2 points.

    Points of one `groups` number stay together when the band is checked: the same shape in another layout or direction
    tells nearly the answer, and is not there when a new shape is asked for. `width` is the band's, where it is known.
    """

    def __init__(self, x: Array, y: Array, groups: Sequence[int] | None = None, *, width: float | None = None) -> None:
        groups_of = np.arange(len(x)) if groups is None else np.asarray(groups)
        if len(x) > MOST_POINTS:
            kept = np.sort(np.random.default_rng(0).permutation(len(x))[:MOST_POINTS])
            x, y, groups_of = x[kept], y[kept], groups_of[kept]
        self._x, self._columns = x, x.shape[1]
        self._centre = float(np.median(y))
        self._scale = max(float(np.std(y)), 1e-4)
        values = (y - self._centre) / self._scale
        self._set_prior()
        chosen = np.random.default_rng(1).permutation(len(x))[:MOST_FOR_LENGTHS]
        self._parameters = self._most_probable(x[chosen], values[chosen])
        self._inverse = self._settled_inverse(x, values)
        self._weights = self._inverse @ values
        self._width = width if width is not None else _checked_width(x, y, groups_of)

    def _settled_inverse(self, x: Array, values: Array) -> Array:
        """Of the covariance of the points, where those that stand out have noise of their own.

        A point farther than `OUTLYING` standard deviations from what all others say of it (in closed form from the
        inverse: Rasmussen and Williams 5.4.2) was disturbed: it has as much more noise as keeps it from standing out.
        """
        covariance = self._between(x, x)
        covariance[np.diag_indices(len(x))] += self._noise(self._parameters)
        inverse = np.linalg.inv(covariance)
        variance = 1.0 / np.diag(inverse)
        off = (inverse @ values) * variance
        covariance[np.diag_indices(len(x))] += np.maximum(off**2 - OUTLYING**2 * variance, 0.0)
        return np.asarray(np.linalg.inv(covariance), dtype=np.float64)

    def _set_prior(self) -> None:
        """Logarithms of a length per column, a height, for each part; of the noise."""
        length = 1.0 + 0.5 * np.log(max(self._columns, 4) / 4)
        centre, spread = [], []
        for height in (0.9, 0.3):
            centre += [length] * self._columns + [np.log(height)]
            spread += [1.0] * self._columns + [0.7]
        self._prior, self._prior_spread = np.array([*centre, np.log(0.05)]), np.array([*spread, 1.0])

    @staticmethod
    def _noise(parameters: Array) -> float:
        return float(np.exp(2 * parameters[-1])) + 1e-6

    def _lengths_and_height(self, part: int, parameters: Array) -> tuple[Array, float]:
        at = part * (self._columns + 1)
        lengths: Array = np.exp(parameters[at : at + self._columns])
        return lengths, float(np.exp(2 * parameters[at + self._columns]))

    def _covariance(self, differences: Array, parameters: Array) -> tuple[Array, list[tuple[Array, Array, Array]]]:
        """Without noise; and of each part the covariance, its derivative and the lengths it was made of."""
        total, parts = np.full(differences.shape[:2], LEVEL), []
        for number, part in enumerate(_PARTS):
            lengths, height = self._lengths_and_height(number, parameters)
            value, slope = part(differences @ lengths**-2)
            total += height * value
            parts.append((height * value, height * slope, lengths))
        return total, parts

    def _between(self, a: Array, b: Array) -> Array:
        """Covariance of every point of `a` with every one of `b`, without noise."""
        total = np.full((len(a), len(b)), LEVEL)
        for number, part in enumerate(_PARTS):
            lengths, height = self._lengths_and_height(number, self._parameters)
            total += height * part(_squared_distances(a / lengths, b / lengths))[0]
        return total

    def _cost(self, differences: Array, y: Array, parameters: Array) -> tuple[float, Array]:
        """Minus the logarithm of the posterior probability of the parameters, and its gradient."""
        covariance, parts = self._covariance(differences, parameters)
        covariance[np.diag_indices(len(y))] += self._noise(parameters)
        factor = np.linalg.cholesky(covariance)
        half = np.linalg.inv(factor)
        inverse = half.T @ half
        weights = inverse @ y
        off = (parameters - self._prior) / self._prior_spread
        cost = 0.5 * y @ weights + np.log(np.diag(factor)).sum() + 0.5 * off @ off
        pull = inverse - np.outer(weights, weights)
        gradient, at = off / self._prior_spread, 0
        for value, slope, lengths in parts:
            by_column = np.tensordot(pull * slope, differences, axes=([0, 1], [0, 1]))
            gradient[at : at + self._columns] += 0.5 * by_column / lengths**2
            gradient[at + self._columns] += np.sum(pull * value)
            at += self._columns + 1
        gradient[-1] += np.trace(pull) * np.exp(2 * parameters[-1])
        return float(cost), gradient

    def _most_probable(self, x: Array, y: Array) -> Array:
        """Rprop (Riedmiller and Braun 1993) from the prior's centre; the best parameters met."""
        differences, parameters = _differences(x, x), self._prior.copy()
        step, last = np.full(parameters.size, 0.1), np.zeros(parameters.size)
        best_cost, best = np.inf, parameters
        for _ in range(STEPS):
            cost, gradient = self._cost(differences, y, parameters)
            if cost < best_cost:
                best_cost, best = cost, parameters
            turned = gradient * last
            step = np.clip(np.where(turned > 0, 1.2 * step, np.where(turned < 0, 0.5 * step, step)), 1e-4, 0.5)
            gradient = np.where(turned < 0, 0.0, gradient)
            parameters = np.clip(parameters - np.sign(gradient) * step, -7.0, 7.0)
            last = gradient
        return best

    def __call__(self, x: Array) -> tuple[Array, Array]:
        """At `x` `[points, columns]`: the expected value and the half-width of the 80 % band."""
        heights = [self._lengths_and_height(number, self._parameters)[1] for number in range(len(_PARTS))]
        most = LEVEL + sum(heights) + self._noise(self._parameters)
        means, variances = np.empty(len(x)), np.empty(len(x))
        for begin in range(0, len(x), AT_ONCE):
            some = slice(begin, begin + AT_ONCE)
            near = self._between(x[some], self._x)
            means[some] = near @ self._weights
            variances[some] = most - ((near @ self._inverse) * near).sum(axis=1)
        return means * self._scale + self._centre, self._width * np.sqrt(np.maximum(variances, 1e-12)) * self._scale


def _differences(a: Array, b: Array) -> Array:
    """Squared, of each pair, by column: `[a, b, columns]`."""
    squared: Array = (a[:, None, :] - b[None, :, :]) ** 2
    return squared


def _squared_distances(a: Array, b: Array) -> Array:
    """Of each pair, `[a, b]`; by one product, since all differences of all columns would not fit into a cache."""
    squared: Array = (a**2).sum(axis=1)[:, None] + (b**2).sum(axis=1) - 2.0 * (a @ b.T)
    return np.maximum(squared, 0.0)


def _checked_width(x: Array, y: Array, groups: npt.NDArray[np.int64]) -> float:
    """Standard deviations to either side that hold `COVERAGE` of the points, each predicted without its fold."""
    distinct = np.unique(groups)
    if len(distinct) < 2 * FOLDS:
        return FEW_POINTS_WIDTH
    fold_of = dict(zip(distinct.tolist(), np.random.default_rng(2).permutation(len(distinct)) % FOLDS))
    fold = np.array([fold_of[group] for group in groups.tolist()])
    ratios = []
    for number in range(FOLDS):
        inside = fold == number
        mean, deviation = Regression(x[~inside], y[~inside], width=1.0)(x[inside])
        ratios.append(np.abs(y[inside] - mean) / deviation)
    return float(np.quantile(np.concatenate(ratios), COVERAGE))
