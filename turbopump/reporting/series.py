"""Long series made short: a plot of a million steps carries a few thousand points and still shows every spike.

`thin` keeps the smallest and the largest value of each bucket; `smooth` is a centred mean whose window shrinks towards
the start, so that the first drop of a loss curve is not blurred by steps far away.
"""

from __future__ import annotations

import numpy as np

MAX_BUCKETS = 600


def thin(x: np.ndarray, y: np.ndarray, max_buckets: int = MAX_BUCKETS) -> tuple[np.ndarray, np.ndarray]:
    """At most `4 * max_buckets` finite points of the curve x, y [N], x ascending: the extremes of buckets that are
    even on a linear and on a logarithmic axis at once."""
    finite = np.isfinite(y)
    x, y = x[finite], y[finite]
    count = len(x)
    if count <= 4 * max_buckets:
        return x, y
    edges = np.linspace(0, count, max_buckets + 1)
    log_edges = np.geomspace(1, count, max_buckets + 1)
    starts = np.unique(np.concatenate([edges, log_edges, [0]]).astype(np.int64))
    starts = starts[starts < count]
    lows, highs = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
    bucket = np.repeat(np.arange(len(starts)), np.diff(np.append(starts, count)))
    extreme = np.flatnonzero((y == lows[bucket]) | (y == highs[bucket]))
    # of equal extremes in a bucket the first will do
    _, first = np.unique(np.column_stack([bucket[extreme], y[extreme] == highs[bucket[extreme]]]), axis=0,
                         return_index=True)  # fmt: skip
    keep = np.unique(np.concatenate([extreme[first], [0, count - 1]]))
    return x[keep], y[keep]


def smooth(y: np.ndarray, half_window: int) -> np.ndarray:
    """Mean of y over `half_window` neighbours on each side, as many as there are before near the start, those that
    there are near the end; values that are not finite are left out of it."""
    count = len(y)
    if count == 0 or half_window < 1:
        return y
    finite = np.isfinite(y)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, y, 0.0))])
    number = np.concatenate([[0], np.cumsum(finite)])
    i = np.arange(count)
    half = np.minimum(half_window, i)
    low, high = i - half, np.minimum(i + half + 1, count)
    with np.errstate(invalid="ignore", divide="ignore"):
        return (total[high] - total[low]) / (number[high] - number[low])


def sample_rows(count: int, rows: int = 20) -> np.ndarray:
    """Indices of at most `rows` rows of a table of `count`, evenly spread, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(rows, count)).round().astype(int)) if count else np.array([], int)


def significant(values: np.ndarray, digits: int = 5) -> list[float | int | None]:
    """JSON-ready numbers with `digits` significant digits (a plot shows no more); what is not finite becomes None."""
    if values.dtype.kind in "iu":
        return [int(v) for v in values]
    return [float(f"{v:.{digits}g}") if np.isfinite(v) else None for v in values.tolist()]
