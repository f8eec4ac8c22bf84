"""The plots of a plan: where a step's time should go, all splits by time and memory, memory by rank, scale and cost.

Each function returns a `Figure`, or None where there is nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from turbopump.core.units import human, human_bytes, human_seconds
from turbopump.planner.plan_file import PlanFile
from turbopump.reporting.figures import bar_text, wrapped
from turbopump.reporting.plots import Figure, Table, Trace, label, layout
from turbopump.reporting.probe_axes import MAX_POINTS, colour, dots, rate_axis, seconds_axis, span_of
from turbopump.reporting.words import percent

GIB = 2**30
SPLITS = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star")
NAMES = {
    "ideal": "arithmetic at the data sheet's peak", "below_limit": "arithmetic below the peak",
    "compute": "forward and backward", "exposed_communication": "exposed communication", "bubble": "pipeline bubble",
    "data": "waiting for data", "optimizer": "optimizer", "other": "other work in the step",
}  # fmt: skip
ON = {"ideal": "--on-ideal", "below_limit": "--on-below-limit", "compute": "--on-compute"}
PART_COLOURS = {
    "weights": "--ideal", "gradients": "--data", "optimizer": "--optimizer", "working_weights": "--below-limit",
    "activations": "--exposed-communication", "transient": "--bubble", "allocator": "--other",
}  # fmt: skip


@dataclass(frozen=True)
class ScalePoint:
    """The best plan for a number of devices: time, money and energy to finish; None where not known."""

    num_devices: int
    step_s: float
    wall_s: float
    usd: float | None
    kwh: float | None
    split: str = ""


def waterfall_bars(plan: PlanFile) -> list[tuple[str, float]]:
    """Kinds of time with their seconds, the peak's arithmetic first; they sum to the predicted step."""
    parts = dict(plan.prediction.breakdown)
    compute_s, ideal_s = parts.pop("compute", 0.0), plan.prediction.mfu * plan.prediction.step_s
    if 0 < ideal_s <= compute_s:
        bars = [("ideal", ideal_s), ("below_limit", compute_s - ideal_s)]
    else:
        bars = [("compute", compute_s)]
    order = [name for name in NAMES if name in parts]
    return bars + [(name, parts[name]) for name in (*order, *(n for n in parts if n not in NAMES))]


def waterfall(plan: PlanFile) -> Figure | None:
    """From arithmetic at the peak, every loss on top, to the predicted step with its 80 % band."""
    p = plan.prediction
    if not p.breakdown or p.step_s <= 0:
        return None
    bars = [(n, s) for n, s in waterfall_bars(plan) if abs(s) >= 5e-4 * p.step_s or n == "ideal"]
    unit, times = ("seconds", 1.0) if p.step_s >= 2 else ("milliseconds", 1e3)
    names = [NAMES.get(name, name.replace("_", " ")) for name, _ in bars]
    widths = [s * times for _, s in bars]
    base = [sum(widths[:i]) for i in range(len(widths))]
    texts = [f"{human_seconds(s)} · {percent(s / p.step_s)}" for _, s in bars]
    band = f"{human_seconds(p.step_s)} ({human_seconds(p.low_s)} to {human_seconds(p.high_s)})"
    total, top = "predicted step", p.high_s * times
    trace: Trace = {
        "type": "bar", "orientation": "h", "y": [wrapped(n) for n in (*names, total)],
        "x": [_short(w) for w in (*widths, p.step_s * times)], "base": [_short(b) for b in (*base, 0.0)],
        "marker": {"color": [*(_colour(name) for name, _ in bars), "--measured"]},
        "customdata": [*texts, band], "hovertemplate": "%{customdata}<extra></extra>",
    }  # fmt: skip
    spread: Trace = {
        "type": "scatter", "mode": "lines", "x": [_short(p.low_s * times), _short(top)], "y": [total, total],
        "line": {"color": "--warn", "width": 3}, "hoverinfo": "skip",
    }  # fmt: skip
    notes = [bar_text(n, b, w, t, top, ON.get(k, "--ink"))
             for n, b, w, t, (k, _) in zip(names, base, widths, texts, bars)]  # fmt: skip
    notes.append({"x": 0.5 * p.step_s * times, "y": total, "text": human_seconds(p.step_s), "showarrow": False,
                  "font": {"size": 12, "color": "--on-measured"}})  # fmt: skip
    return Figure(
        id="waterfall", title="A step, from the peak to what is predicted", wide=True, data=[trace, spread],
        summary="Predicted step: " + ", ".join(f"{n} {t}" for n, t in zip(names, texts)) + f"; in all {band}.",
        layout=layout(x=unit, y="", height=70 + 44 * (len(names) + 1),
                      yaxis={"autorange": "reversed", "showgrid": False}, bargap=0.35, annotations=notes,
                      xaxis={"showgrid": True, "range": [0.0, 1.04 * max(top, p.step_s * times)]}),
        table=Table(["kind of time", "seconds", "share"],
                    [[n, human_seconds(s), percent(s / p.step_s)] for n, (_, s) in zip(names, bars)]),
        note=f"The orange line is the 80 % band of the step: {human_seconds(p.low_s)} to {human_seconds(p.high_s)}.",
    )  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _colour(name: str) -> str:
    return f"--{name.replace('_', '-')}" if name in NAMES else "--other"


def landscape(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any], capacity_bytes: float) -> Figure | None:
    """Step time against memory of the fastest candidate of each split, coloured by tensor parallelism, marked by
    stages; where these do not vary, by the next choices that do."""
    if len(rows) < 2:
        return None
    shown, more = list(rows[:MAX_POINTS]), len(rows) - MAX_POINTS
    by_colour = _varied(shown, ("tp", "dp_shard", "dp_replicate", "microbatch", "dtype"))
    by_mark = _varied(shown, ("pp", "cp", "ep", "dp_shard", "dp_replicate", "microbatch", "recompute"), by_colour)
    marked = _values(shown, by_mark)
    data = []
    for number, value in enumerate(_values(shown, by_colour)):
        mine = [r for r in shown if r.get(by_colour, 1) == value]
        trace = dots([r["peak_bytes"] / GIB for r in mine], [r["step_s"] for r in mine], [split_words(r) for r in mine],
                     name=f"{by_colour.replace('_', ' ')} {value}", colour=colour(number))  # fmt: skip
        trace["marker"]["symbol"] = [_symbol(marked.index(r.get(by_mark, 1))) for r in mine]
        data.append(trace)
    ring = dots([best["peak_bytes"] / GIB], [best["step_s"]], [f"the plan: {split_words(best)}"], name="the plan",
                colour="--ink", size=16, symbol="circle-open")  # fmt: skip
    ring["marker"]["line"] = {"width": 2, "color": "--ink"}
    times = [r["step_s"] for r in shown]
    line, note = _capacity(capacity_bytes)
    marks = ", ".join(f"{_symbol(i).removesuffix('-up')} {value}" for i, value in enumerate(marked))
    marks = f" Marks by {by_mark.replace('_', ' ')}: {marks}." if len(marked) > 1 else ""
    return Figure(
        id="landscape", title="All splits: step time against memory", wide=True, legend=True, data=[*data, ring],
        summary=f"{len(rows)} splits; the fastest takes {human_seconds(min(times))} and "
        f"{human_bytes(best['peak_bytes'])}.",
        layout=layout(x="memory of the fullest rank, GiB", y="", height=420, hovermode="closest",
                      xaxis={"showgrid": True, "rangemode": "tozero"},
                      yaxis=_time_axis(times), shapes=line, annotations=note,
                      margin={"l": 48, "r": 10, "t": 24, "b": 40}),
        table=Table(["split", "step", "memory"],
                    [[split_words(r), human_seconds(r["step_s"]), human_bytes(r["peak_bytes"])] for r in shown[:60]]),
        note=f"The fastest candidate of each split that fits.{marks}"
        + (f" {more:,} slower ones are not drawn." if more > 0 else ""),
    )  # fmt: skip


def _varied(rows: Sequence[Mapping[str, Any]], names: Sequence[str], without: str = "") -> str:
    """The first of the names with several values, else the last."""
    left = [name for name in names if name != without]
    return next((name for name in left if len(_values(rows, name)) > 1), left[-1])


def _values(rows: Sequence[Mapping[str, Any]], name: str) -> list[Any]:
    return sorted({row.get(name, 1) for row in rows}, key=lambda v: (str(type(v)), v))


def _symbol(index: int) -> str:
    return SYMBOLS[min(index, len(SYMBOLS) - 1)]


def split_words(row: Mapping[str, Any]) -> str:
    """`tp 8 · pp 2 · microbatch 4 · recompute full · 1.2 s · 61 GB`, without sizes of one."""
    parts = [f"{name} {row[name]}" for name in ("tp", *(n for n in SPLITS if n != "tp")) if int(row.get(name, 1)) > 1]
    parts = parts or ["not split"]
    if "microbatch" in row:
        parts.append(f"microbatch {row['microbatch']}")
    if row.get("recompute", "none") != "none":
        parts.append(f"recompute {row['recompute']}")
    return " · ".join([*parts, human_seconds(row["step_s"]), human_bytes(row["peak_bytes"])])


def _time_axis(times: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis with ticks where people have names for times, and enough of them on a short one."""
    axis, (low, high) = seconds_axis(times), span_of(times)
    if high > 60 and high / low < 1e4:
        whole: tuple[int, ...] = (1, 10, 60, 600, 3600, 4 * 3600, 86400, 4 * 86400, 16 * 86400, 64 * 86400, 256 * 86400)
        if high / low < 100:
            whole = (*whole, 30, 120, 1800, 2 * 3600, 8 * 3600, 2 * 86400, 8 * 86400, 32 * 86400)
        ticks = sorted(float(t) for t in whole if low <= t <= high)
        return axis | {"tickvals": ticks, "ticktext": [_round_time(t) for t in ticks]}
    return axis | _dense(low, high, human_seconds)


def _round_time(seconds: float) -> str:
    """Without the smaller unit, which is none here: a phone has no room for it."""
    return human_seconds(seconds).removesuffix(" 00 min").removesuffix(" 00 s").removesuffix(" 00 h")


def _dense(low: float, high: float, words: Callable[[float], str]) -> dict[str, Any]:
    """Ticks of a logarithmic axis that has one even within a factor of 1.5."""
    steps: tuple[float, ...] = (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
    if high >= 4 * low:
        steps = (1, 1.5, 2, 3, 4, 6, 8) if high < 10 * low else (1, 2, 5) if high < 300 * low else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [t for d in decades for m in steps if low <= (t := m * 10.0**d) <= high]
    return {"tickvals": ticks, "ticktext": [words(t) for t in ticks]}


def _capacity(size: float) -> tuple[list[Any], list[Any]]:
    """A line at the device's memory, on an axis of GiB."""
    if not size > 0 or not math.isfinite(size):
        return [], []
    x = size / GIB
    shape = {"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper",
             "line": {"color": "--lost", "width": 2, "dash": "dash"}}  # fmt: skip
    note = {"x": x, "y": 1, "yref": "paper", "yanchor": "bottom", "xanchor": "right",
            "showarrow": False, "text": label(f"the device has {x:.3g} GiB"),
            "font": {"size": 11, "color": "--muted"}}  # fmt: skip
    return [shape], [note]


def memory(plan: PlanFile, capacity_bytes: float) -> Figure | None:
    """Memory of each rank class by parts, with the device's."""
    held = {name: parts for name, parts in plan.memory.items() if parts}
    if len({tuple(parts.items()) for parts in held.values()}) == 1:
        held = {"every": next(iter(held.values()))}  # one stage: all ranks alike
    classes = list(held)
    parts = list(dict.fromkeys(part for name in classes for part in held[name]))
    if not parts:
        return None
    data: list[Trace] = []
    for number, part in enumerate(parts):
        values = [held[name].get(part, 0.0) for name in classes]
        words = part.replace("_", " ")
        data.append({
            "type": "bar", "orientation": "h", "name": label(words), "y": [_class_words(name) for name in classes],
            "x": [_short(v / GIB) for v in values], "marker": {"color": PART_COLOURS.get(part, colour(number))},
            "customdata": [f"{words}: {human_bytes(v)}" for v in values],
            "hovertemplate": "%{customdata}<extra></extra>",
        })  # fmt: skip
    totals = {name: sum(held[name].values()) for name in classes}
    line, note = _capacity(capacity_bytes)
    top = max([*totals.values(), capacity_bytes if capacity_bytes > 0 else 0.0]) / GIB
    return Figure(
        id="memory", title="Memory of a device by its stage of the pipeline", wide=True, legend=True, data=data,
        summary="; ".join(f"{_class_words(name)} {human_bytes(total)}" for name, total in totals.items()) + ".",
        layout=layout(x="GiB", y="", height=110 + 52 * len(classes), barmode="stack", bargap=0.35, shapes=line,
                      annotations=note, yaxis={"autorange": "reversed", "showgrid": False},
                      xaxis={"showgrid": True, "range": [0, 1.06 * top]}, margin={"l": 48, "r": 10, "t": 24, "b": 40}),
        table=Table(["part", *(_class_words(name) for name in classes)],
                    [[p.replace("_", " "), *(human_bytes(held[n].get(p, 0.0)) for n in classes)] for p in parts]
                    + [["in all", *(human_bytes(totals[n]) for n in classes)]]),
    )  # fmt: skip


def _class_words(name: str) -> str:
    return "every rank" if name == "every" else f"{name} stage"


def scaling(points: Sequence[ScalePoint], what: str) -> Figure | None:
    """Time to finish against `usd` or `kwh` over numbers of devices; those that no other beats in both are joined."""
    value = {"usd": lambda p: p.usd, "kwh": lambda p: p.kwh}[what]
    shown = sorted((p for p in points if value(p)), key=lambda p: p.wall_s)
    if len(shown) < 2:
        return None
    unit = (lambda v: f"${human(v)}") if what == "usd" else (lambda v: human(v * 1e3, "Wh"))
    front = [p for i, p in enumerate(shown) if all(value(p) < value(q) for q in shown[:i])]
    texts = [f"{p.num_devices:,} devices · {human_seconds(p.wall_s)} · {unit(value(p))} · {p.split}" for p in shown]
    x, y = [p.wall_s for p in shown], [value(p) for p in shown]
    line: Trace = {"type": "scatter", "mode": "lines", "x": [_short(p.wall_s) for p in front],
                   "y": [_short(value(p)) for p in front], "line": {"color": "--curve2", "width": 2},
                   "name": "no other is better in both", "hoverinfo": "skip"}  # fmt: skip
    marks = dots(x, y, texts, name="best plan of a number of devices", colour="--curve1", size=9)
    marks |= {"mode": "markers+text", "textposition": "top center", "text": [f"{p.num_devices:,}" for p in shown],
              "customdata": [label(t) for t in texts], "hovertemplate": "%{customdata}<extra></extra>",
              "textfont": {"size": 11, "color": "--muted"}}  # fmt: skip
    name = {"usd": "Dollars", "kwh": "Energy"}[what]
    axis = rate_axis([v for v in y if v])
    axis |= _dense(*span_of([v for v in y if v]), unit)
    return Figure(
        id=f"scaling-{what}", title=f"{name} against the time to finish", legend=True, data=[line, marks],
        summary="; ".join(texts) + ".",
        layout=layout(x="time to finish", y="", height=320, hovermode="closest", xaxis=_time_axis(x), yaxis=axis),
        table=Table(["devices", "time", "step", name.lower(), "split"],
                    [[f"{p.num_devices:,}", human_seconds(p.wall_s), human_seconds(p.step_s), unit(value(p)), p.split]
                     for p in shown]),
        note="A number at a point: its devices.",
    )  # fmt: skip
