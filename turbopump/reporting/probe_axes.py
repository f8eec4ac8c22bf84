"""Axes and marks that a machine's plots share: logarithmic axes in people's units, points that say what they are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from turbopump.core.units import human, human_seconds
from turbopump.hardware.profile import Measurement
from turbopump.reporting.plots import Trace, label
from turbopump.reporting.probe_rows import op_words, rate_words, size_words
from turbopump.reporting.series import sample_rows, significant

MAX_POINTS = 1200  # of a figure: a browser draws more only slowly, and an eye tells no more apart
MAX_TABLE_ROWS = 60
DTYPE_COLOURS = {
    "fp64": "--run5", "fp32": "--run0", "tf32": "--run3", "bf16": "--run1", "fp16": "--run2", "fp8": "--run4",
    "int8": "--run3",
}  # fmt: skip
COLOURS = ("--run0", "--run1", "--run2", "--run3", "--run4", "--checkpoint")


def colour(index: int) -> str:
    """Of the curve or group with that number."""
    return COLOURS[index % len(COLOURS)]


def dtype_colour(dtype: str, index: int = 0) -> str:
    return DTYPE_COLOURS.get(dtype, colour(index))


def rate_axis(values: Sequence[float], *, unit: str = "") -> dict[str, Any]:
    """A logarithmic axis over the values with people's prefixes at its ticks (`10 G`)."""
    low, high = span_of(values)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 30 * low else (1, 3) if high < 300 * low else (1,)
    ticks = [m * 10.0**d for d in decades for m in steps]
    return _log_axis(ticks, [human(t, unit) if t >= 1 else f"{t:g}" for t in ticks], low, high)


def seconds_axis(values: Sequence[float]) -> dict[str, Any]:
    low, high = span_of(values)
    ticks = [10.0**d for d in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    return _log_axis(ticks, [human_seconds(t) for t in ticks], low, high)


def size_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis of bytes with ticks at powers of two, as blocks and messages come."""
    low, high = span_of(values)
    powers = range(math.floor(math.log2(low)), math.ceil(math.log2(high)) + 1)
    every = next(step for step in (1, 2, 3, 4, 5, 10, 20) if len(powers) / step <= 5 or step == 20)
    ticks = [2.0**p for p in powers if p % every == 0]
    return _log_axis(ticks, [size_words(t) for t in ticks], low, high)


def span_of(values: Sequence[float], margin: float = 1.35) -> tuple[float, float]:
    """Smallest and largest positive value with some room around them."""
    shown = [v for v in values if v > 0 and math.isfinite(v)]
    return (min(shown) / margin, max(shown) * margin) if shown else (0.5, 2.0)


def _log_axis(ticks: list[float], texts: list[str], low: float, high: float) -> dict[str, Any]:
    return {"type": "log", "tickvals": ticks, "ticktext": texts, "showgrid": True, "zeroline": False, "tickangle": 0,
            "range": [math.log10(low), math.log10(high)]}  # fmt: skip


def dots(x: Sequence[float], y: Sequence[float], texts: Sequence[str], *, name: str, colour: str, size: int = 7,
         symbol: str = "circle", opacity: float = 0.85, low: Sequence[float] | None = None,
         high: Sequence[float] | None = None) -> Trace:  # fmt: skip
    """Marks at x, y [N] that tell `texts` under the pointer; `low` and `high` [N] are the ends of bars of spread."""
    trace: Trace = {
        "type": "scatter", "mode": "markers", "x": significant(np.asarray(x, float)),
        "y": significant(np.asarray(y, float)), "name": label(name), "text": [label(t) for t in texts],
        "hovertemplate": "%{text}<extra></extra>",
        "marker": {"color": colour, "size": size, "symbol": symbol, "opacity": opacity},
    }  # fmt: skip
    if low is not None and high is not None:
        trace["error_y"] = {
            "type": "data", "symmetric": False, "array": significant(np.asarray(high) - np.asarray(y), 3),
            "arrayminus": significant(np.asarray(y) - np.asarray(low), 3), "color": colour, "thickness": 1,
            "width": 0,
        }  # fmt: skip
    return trace


def curve(x: Sequence[float], y: Sequence[float], texts: Sequence[str], *, name: str, colour: str,
          dash: str = "solid", width: float = 2.0, markers: bool = True) -> Trace:  # fmt: skip
    """A line over x, y [N], sorted by x, that tells `texts` under the pointer."""
    order = sorted(range(len(x)), key=lambda i: x[i])
    trace: Trace = {
        "type": "scatter", "mode": "lines+markers" if markers else "lines",
        "x": significant(np.array([x[i] for i in order], float)),
        "y": significant(np.array([y[i] for i in order], float)), "name": label(name),
        "line": {"color": colour, "width": width, "dash": dash},
    }  # fmt: skip
    if markers:
        trace["marker"] = {"color": colour, "size": 6}
        trace["text"] = [label(texts[i]) for i in order]
        trace["hovertemplate"] = "%{text}<extra></extra>"
    else:
        trace["hoverinfo"] = "skip"
    return trace


def drawn(rows: list[Measurement]) -> tuple[list[Measurement], str]:
    """The rows of a figure and what to say of those that are not drawn."""
    if len(rows) <= MAX_POINTS:
        return rows, ""
    ordered = sorted(rows, key=lambda r: (r.flops, r.bytes))
    return [ordered[i] for i in sample_rows(len(rows), MAX_POINTS)], (
        f"{MAX_POINTS:,} of {len(rows):,} operations are drawn, evenly over their sizes."
    )


def hover(row: Measurement, *more: str) -> str:
    """What a point tells: operation, route, time, rate."""
    parts = [op_words(row), row.route, human_seconds(row.seconds), rate_words(row), *more]
    return " · ".join(part for part in parts if part)
