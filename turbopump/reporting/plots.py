"""The one place that knows plotly: what a figure is, how all figures look, and the library that draws them.

Figures are plain dictionaries in plotly's own schema (a test lets plotly validate them). A colour is the name of a
CSS variable (`"--compute"`): the page's script looks it up when it draws, and again when the reader's device changes
between light and dark. So a kind of time has one colour everywhere, kept in page.css.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from typing import Any

import numpy as np
from plotly.offline import get_plotlyjs

from turbopump.reporting.series import significant

Trace = dict[str, Any]

# Line colours of runs in a comparison, in order.
RUN_COLOURS = ("--run0", "--run1", "--run2", "--run3", "--run4", "--run5")


@dataclass(frozen=True)
class Table:
    """The same as a figure in cells; all plain text, escaped where it is written."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """One plot of the page. `summary` says in words what it shows (for those who cannot see it)."""

    id: str
    title: str
    summary: str
    data: list[Trace]
    layout: dict[str, Any]
    table: Table
    log_x: bool = False
    wide: bool = False
    legend: bool = False
    note: str = ""


@cache
def plotly_js() -> str:
    """The library's own source, to be embedded once."""
    return get_plotlyjs()


def label(text: str) -> str:
    """Text from a user in a plot: plotly reads some HTML in labels, so it is escaped like everything else."""
    return escape(text, quote=False)


def layout(*, x: str, y: str, height: int = 280, **more: Any) -> dict[str, Any]:
    """The look of every plot: no box, faint grid, legend above, room for a phone."""
    axis = {
        "gridcolor": "--grid",
        "zerolinecolor": "--grid",
        "linecolor": "--axis",
        "tickfont": {"color": "--muted"},
        "automargin": True,
    }
    base: dict[str, Any] = {
        "height": height,
        "margin": {"l": 48, "r": 10, "t": 8, "b": 40},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "--ink"},
        "hoverlabel": {"bgcolor": "--card", "bordercolor": "--axis", "font": {"color": "--ink"}},
        "xaxis": {
            **axis,
            "title": {"text": x, "font": {"color": "--muted"}},
            "showline": True,
            "showgrid": False,
            "rangemode": "nonnegative",
        },
        "yaxis": {**axis, "title": {"text": y, "font": {"color": "--muted"}}},
        "showlegend": False,
        "uirevision": "keep",
    }
    for name in ("xaxis", "yaxis"):
        base[name].update(more.pop(name, None) or {})
    return {**base, **more}


def line(
    x: np.ndarray,
    y: np.ndarray,
    *,
    name: str,
    colour: str,
    width: float = 2.0,
    markers: bool = False,
    hover: bool = True,
    dash: str = "solid",
    unit: str = "",
) -> Trace:
    """A curve of x, y [N]; `name` is plain text."""
    trace: Trace = {
        "type": "scatter",
        "mode": "lines+markers" if markers else "lines",
        "x": significant(x, 8),
        "y": significant(y),
        "name": label(name),
        "line": {"color": colour, "width": width, "dash": dash},
        "connectgaps": True,
    }
    if markers:
        trace["marker"] = {"color": colour, "size": 7}
    if hover:
        trace["hovertemplate"] = f"%{{y:.5~g}}{unit}"
    else:
        trace["hoverinfo"] = "skip"
    return trace


def points(x: np.ndarray, y: np.ndarray, *, name: str, colour: str, symbol: str = "x") -> Trace:
    """Single marks at x, y [N]."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": significant(x, 8),
        "y": significant(y),
        "name": label(name),
        "marker": {"color": colour, "size": 9, "symbol": symbol},
        "hovertemplate": "%{x}",
    }


def log_ticks(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis over low..high with ticks at 1, 2 and 5 times the powers of ten, written out."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high < 1000 * low else (1,)
    ticks = [m * 10.0**d for d in decades for m in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{t:g}" for t in ticks]}


def mark(at: float, text: str, *, end: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dotted vertical line with a small text above the plot, ending or beginning at it: (shape, annotation)."""
    shape = {
        "type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper",
        "line": {"color": "--muted", "width": 1, "dash": "dot"},
    }  # fmt: skip
    note = {
        "x": at, "y": 1, "yref": "paper", "text": label(text), "showarrow": False, "yanchor": "bottom",
        "xanchor": "right" if end else "left", "font": {"size": 11, "color": "--muted"},
    }  # fmt: skip
    return shape, note


def marked(marks: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """What a layout needs to show marks, with room for their texts."""
    if not marks:
        return {}
    return {
        "shapes": [shape for shape, _ in marks],
        "annotations": [note for _, note in marks],
        "margin": {"l": 48, "r": 10, "t": 24, "b": 40},
    }
