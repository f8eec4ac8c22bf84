"""The plots of one run. Each function returns a `Figure`, or None where nothing was measured to draw."""

from __future__ import annotations

from typing import Any

import numpy as np

from turbopump.core.units import human, human_bytes, human_seconds
from turbopump.reporting.account import QUALITY, WARMUP_STEPS, Summary, counted_steps, main_split, time_bins
from turbopump.reporting.load import STEP_FIELDS, RankSpans, RunData, measured
from turbopump.reporting.plots import Figure, Table, Trace, label, layout, line, log_ticks, mark, marked, points
from turbopump.reporting.series import sample_rows, smooth, thin
from turbopump.reporting.words import KIND_NAMES, percent

NUM_BINS = 100


def run_figures(run: RunData, summary: Summary) -> dict[str, Figure]:
    """All plots of the page that there is data for, by id."""
    main = run.ranks[0] if run.ranks else None
    candidates = [
        loss_figure(run),
        quality_figure(run, summary),
        metric_figure(run, "lr", "Learning rate", "learning rate", "--curve2"),
        metric_figure(run, "grad_norm", "Gradient norm", "gradient norm", "--curve3", log_y=True),
        waterfall_figure(summary),
        kinds_figure(main) if main is not None else None,
        distribution_figure(main) if main is not None else None,
        throughput_figure(run, summary),
        limit_figure(run, summary),
        memory_figure(run),
        ranks_figure(summary),
    ]
    return {figure.id: figure for figure in candidates if figure is not None}


def evaluation_points(run: RunData, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values [E] of a metric on the split evaluated while training."""
    split = main_split(run)
    rows = [
        (r["step"], v)
        for r in run.metrics.evaluations
        if r["split"] == split and (v := measured(r.get(metric))) is not None
    ]
    return np.array([s for s, _ in rows], dtype=np.int64), np.array([v for _, v in rows], dtype=float)


def smoothed_loss(run: RunData) -> tuple[np.ndarray, np.ndarray, int]:
    """Steps and smoothed loss of all steps [S], and the half window in steps."""
    step, loss = run.metrics.steps["step"], run.metrics.steps["loss"]
    half = max(1, len(loss) // 50)
    return step, smooth(loss, half), half


def loss_figure(run: RunData) -> Figure | None:
    step, loss = run.metrics.steps["step"], run.metrics.steps["loss"]
    finite = np.isfinite(loss)
    if not finite.any():
        return None
    _, smoothed, half = smoothed_loss(run)
    data = [
        line(*thin(step, loss), name="each step", colour="--raw", width=1, hover=False),
        line(*thin(step, smoothed), name=f"mean of {2 * half + 1} steps", colour="--curve1"),
    ]
    eval_step, eval_loss = evaluation_points(run, "loss")
    if len(eval_step):
        data.append(line(eval_step, eval_loss, name=main_split(run) or "", colour="--curve2", markers=True))
    if not finite.all():
        bad = step[~finite]
        bad = bad[sample_rows(len(bad), 200)]
        floor = np.full(len(bad), np.nanmin(loss[finite]))
        data.append(points(bad, floor, name="NaN or infinite", colour="--lost"))
    rows = sample_rows(len(step))
    evaluated = dict(zip(eval_step.tolist(), eval_loss.tolist()))
    every = sorted({*step[rows].tolist(), *eval_step[sample_rows(len(eval_step))].tolist()})
    at = dict(zip(step.tolist(), zip(loss.tolist(), smoothed.tolist()))) if len(step) < 5000 else {
        int(step[i]): (float(loss[i]), float(smoothed[i])) for i in np.flatnonzero(np.isin(step, every))
    }  # fmt: skip
    first, last = np.flatnonzero(finite)[[0, -1]]
    return Figure(
        id="loss",
        title="Loss",
        summary=f"Training loss by step: {loss[first]:.4g} at step {step[first]}, {smoothed[last]:.4g} at step "
        f"{step[last]}" + (f"; evaluated {len(eval_step)} times." if len(eval_step) else "."),
        data=data,
        layout=layout(x="step", y="loss", height=340, hovermode="x unified"),
        legend=True,
        table=Table(
            ["step", "loss", "smoothed", "held-out loss"],
            [[f"{s:,}", *(_value(v) for v in at.get(s, (None, None))), _value(evaluated.get(s))] for s in every],
        ),
        log_x=True,
        wide=True,
    )


def _value(value: float | None) -> str:
    return "–" if value is None or not np.isfinite(value) else f"{value:.4g}"


def quality_figure(run: RunData, summary: Summary) -> Figure | None:
    """The main held-out metric where it is another one than the loss."""
    quality = summary.quality
    if quality is None or quality.metric == "loss":
        return None
    step, value = evaluation_points(run, quality.metric)
    if len(step) < 2:
        return None
    name = next(words for field, words, _ in QUALITY if field == quality.metric)
    return Figure(
        id="quality",
        title=f"{name[0].upper()}{name[1:]} on held-out data",
        summary=f"{name} by step: from {value[0]:.4g} to {value[-1]:.4g}.",
        data=[line(step, value, name=name, colour="--curve2", markers=True)],
        layout=layout(x="step", y=name, hovermode="x unified"),
        table=Table(["step", name], [[f"{s:,}", f"{v:.4g}"] for s, v in zip(step, value)][:200]),
        log_x=True,
    )


def metric_figure(
    run: RunData, column: str, title: str, name: str, colour: str, *, log_y: bool = False
) -> Figure | None:
    """A column of the step records over the steps."""
    step, value = run.metrics.steps["step"], run.metrics.steps[column]
    if np.isfinite(value).sum() < 2:
        return None
    finite = value[np.isfinite(value)]
    log_y = log_y and bool((finite > 0).all())
    rows = [i for i in sample_rows(len(step)) if np.isfinite(value[i])]
    return Figure(
        id=column,
        title=title,
        summary=f"{name} by step: between {finite.min():.3g} and {finite.max():.3g}.",
        data=[line(*thin(step, value), name=name, colour=colour, width=1.5)],
        layout=layout(
            x="step",
            y=name,
            hovermode="x unified",
            height=240,
            yaxis=log_ticks(finite.min(), finite.max()) if log_y else None,
        ),
        table=Table(["step", name], [[f"{step[i]:,}", f"{value[i]:.4g}"] for i in rows]),
        log_x=True,
    )


def waterfall_figure(summary: Summary) -> Figure | None:
    """Ideal time at the limit, every loss on top, the measured step: horizontal, so that a phone can show it."""
    if summary.steps is None or not summary.waterfall:
        return None
    total_s = sum(bar.s for bar in summary.waterfall)
    bars = [(bar.name, bar.s) for bar in summary.waterfall if abs(bar.s) >= 5e-4 * total_s or bar.name == "ideal"]
    names, base, widths, colours, texts = [], [], [], [], []
    at_ms = 0.0
    for name, s in bars:
        names.append(KIND_NAMES[name])
        base.append(at_ms)
        widths.append(1e3 * s)
        colours.append(f"--{name.replace('_', '-')}")
        texts.append(f"{human_seconds(s)} · {percent(s / total_s)}")
        at_ms += 1e3 * s
    names.append("measured step")
    base.append(0.0)
    widths.append(1e3 * total_s)
    colours.append("--measured")
    texts.append(human_seconds(total_s))
    trace: Trace = {
        "type": "bar",
        "orientation": "h",
        "y": [wrapped(n) for n in names],
        "x": [float(f"{w:.5g}") for w in widths],
        "base": [float(f"{b:.5g}") for b in base],
        "marker": {"color": colours},
        "text": texts,
        "textposition": "none",
        "customdata": texts,
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    notes = [bar_text(n, b, w, t, 1e3 * total_s) for n, b, w, t in zip(names[:-1], base, widths, texts)]
    notes.append({"x": 0.5e3 * total_s, "y": names[-1], "text": texts[-1], "showarrow": False,
                  "font": {"size": 12, "color": "--on-measured"}})  # fmt: skip
    return Figure(
        id="waterfall",
        title="A step, from the limit to what was measured",
        summary="Mean step: " + ", ".join(f"{n} {t}" for n, t in zip(names, texts)) + ".",
        data=[trace],
        layout=layout(
            x="milliseconds", y="", height=70 + 44 * len(names), yaxis={"autorange": "reversed", "showgrid": False},
            xaxis={"showgrid": True, "range": [min(0.0, *base), 1.02e3 * total_s]}, annotations=notes, bargap=0.35,
        ),
        table=waterfall_table(summary),
        wide=True,
        note=waterfall_note(summary),
    )  # fmt: skip


def bar_text(name: str, base: float, width: float, text: str, total: float, on: str = "") -> dict[str, Any]:
    """The figures of a bar of the waterfall: to its right, to its left, or inside, wherever there is room; `on` is the
    colour of text on it."""
    note = {"y": wrapped(name), "text": text, "showarrow": False, "font": {"size": 12, "color": "--ink"}}
    left, right = min(base, base + width), max(base, base + width)
    if right < 0.55 * total:
        return note | {"x": right, "xanchor": "left", "xshift": 6}
    if left > 0.45 * total:
        return note | {"x": left, "xanchor": "right", "xshift": -6}
    return note | {"x": (left + right) / 2, "font": {"size": 12, "color": on or f"--on-{_css(name)}"}}


def _css(words: str) -> str:
    """The style sheet's word for a kind of time named in words."""
    return next((kind.replace("_", "-") for kind, named in KIND_NAMES.items() if named == words), "measured")


def wrapped(name: str) -> str:
    """Two lines for long names: a phone has no room for them beside the bars."""
    if len(name) < 16:
        return name
    words = name.split()
    half = (len(words) + 1) // 2
    return " ".join(words[:half]) + "<br>" + " ".join(words[half:])


def waterfall_table(summary: Summary) -> Table:
    total_s = sum(bar.s for bar in summary.waterfall)
    rows = [[KIND_NAMES[b.name], human_seconds(b.s), percent(b.s / total_s)] for b in summary.waterfall]
    return Table(
        ["part of the mean step", "time", "share"], [*rows, ["measured step", human_seconds(total_s), "100 %"]]
    )


def waterfall_note(summary: Summary) -> str:
    steps = summary.steps
    if steps is None:
        return ""
    text = (
        f"Mean of {steps.num_steps:,} steps; the first {WARMUP_STEPS} steps of each attempt are left out as warm-up "
        f"({steps.num_warmup_excluded} in all)."
    )
    if summary.speed.limit_flops_per_s:
        dtype = f" in {summary.speed.limit_dtype}" if summary.speed.limit_dtype else ""
        text += f" The limit is {human(summary.speed.limit_flops_per_s, 'FLOP/s')}{dtype}, measured on this machine."
    else:
        text += " The machine's limit was not measured."
    return text


def kinds_figure(main: RankSpans) -> Figure | None:
    """Seconds by kind of time over the run, stacked to 100 %, with its attempts."""
    if main.wall_s <= 0:
        return None
    edges, kinds = time_bins(main, NUM_BINS)
    centre, width_s = (edges[:-1] + edges[1:]) / 2, np.diff(edges)
    unit_s, unit = time_unit(main.wall_s)
    data: list[Trace] = []
    for name, seconds in kinds.items():
        if seconds.sum() < 1e-4 * main.wall_s:
            continue
        data.append(
            {
                "type": "bar",
                "x": [float(f"{v:.6g}") for v in centre / unit_s],
                "y": [float(f"{v:.4g}") for v in 100 * seconds / width_s],
                "width": float(width_s[0] / unit_s),
                "name": KIND_NAMES[name],
                "marker": {"color": f"--{name.replace('_', '-')}", "line": {"width": 0}},
                "hovertemplate": "%{y:.1f} %",
            }
        )
    totals = {name: float(seconds.sum()) for name, seconds in kinds.items()}
    marks = []
    for attempt in main.attempts[1:8]:
        at_step = f" from step {attempt.restored_step}" if attempt.restored_step is not None else ""
        marks.append(mark(attempt.start_s / unit_s, f"attempt {attempt.number + 1}{at_step}",
                          end=attempt.start_s > main.wall_s / 2))  # fmt: skip
    return Figure(
        id="kinds",
        title="Where the time went, over the run",
        summary="Share of each moment by kind of time; the totals are in the table of the run's wall time.",
        data=data,
        layout=layout(x=unit, y="% of the time", height=320, barmode="stack", bargap=0,
                      hovermode="x unified", yaxis={"range": [0, 100]},
                      xaxis={"range": [0, main.wall_s / unit_s]}, **marked(marks)),
        table=Table(["kind", "time", "share"],
                    [[KIND_NAMES[k], human_seconds(t), percent(t / main.wall_s)] for k, t in totals.items()]),
        wide=True,
        legend=True,
    )  # fmt: skip


def time_unit(wall_s: float) -> tuple[float, str]:
    """Seconds a unit and its name, for an axis of time."""
    if wall_s < 180:
        return 1.0, "seconds"
    return (60.0, "minutes") if wall_s < 3 * 3600 else (3600.0, "hours")


def distribution_figure(main: RankSpans) -> Figure | None:
    """Histogram of the step time; the slowest 1 % share the last bar."""
    step_ms = 1e3 * main.step_s[counted_steps(main)]
    if len(step_ms) < 8:
        return None
    low, high = float(step_ms.min()), float(np.percentile(step_ms, 99))
    high = max(high, low * 1.0001 + 1e-9)
    counts, edges = np.histogram(np.minimum(step_ms, high), bins=min(60, max(12, len(step_ms) // 20)),
                                 range=(low, high))  # fmt: skip
    median, p90, slowest = float(np.median(step_ms)), float(np.percentile(step_ms, 90)), float(step_ms.max())
    marks = [mark(median, "median ", end=True)]
    if p90 - median > 0.1 * (high - low):
        marks.append(mark(p90, " p90"))
    return Figure(
        id="distribution",
        title="Step time",
        summary=f"Median {median:.4g} ms, 90th percentile {p90:.4g} ms, slowest {slowest:.4g} ms.",
        data=[
            {
                "type": "bar",
                "x": [float(f"{v:.5g}") for v in (edges[:-1] + edges[1:]) / 2],
                "y": counts.tolist(),
                "width": float(edges[1] - edges[0]),
                "name": "steps",
                "marker": {"color": "--compute", "line": {"width": 0}},
                "hovertemplate": "%{y} steps near %{x:.4~g} ms<extra></extra>",
            }
        ],
        layout=layout(
            x="milliseconds",
            y="steps",
            bargap=0.02,
            height=260,
            **marked(marks),
        ),
        table=Table(
            ["", "ms"],
            [
                ["fastest", f"{low:.4g}"],
                ["median", f"{median:.4g}"],
                ["p90", f"{p90:.4g}"],
                ["p99", f"{high:.4g}"],
                ["slowest", f"{slowest:.4g}"],
            ],
        ),
        note=f"The slowest 1 % (up to {slowest:.4g} ms) share the last bar.",
    )


def throughput_figure(run: RunData, summary: Summary) -> Figure | None:
    step, rate = run.metrics.progress["step"], run.metrics.progress["units_per_s"]
    if np.isfinite(rate).sum() < 2:
        return None
    unit = f"{summary.speed.unit}s/s"
    finite = rate[np.isfinite(rate)]
    rows = [i for i in sample_rows(len(step)) if np.isfinite(rate[i])]
    return Figure(
        id="throughput",
        title="Throughput",
        summary=f"{unit} by step: median {human(float(np.median(finite)))}, lowest {human(float(finite.min()))}.",
        data=[line(*thin(step, rate), name=unit, colour="--curve1", width=1.5)],
        layout=layout(x="step", y=label(unit), hovermode="x unified", height=260, yaxis={"rangemode": "tozero"}),
        table=Table(["step", unit], [[f"{step[i]:,}", human(rate[i])] for i in rows]),
    )


def limit_figure(run: RunData, summary: Summary) -> Figure | None:
    progress = run.metrics.progress
    step = progress["step"]
    named = [("share_of_limit", "share of the measured limit", "--curve1"), ("mfu", "MFU (datasheet)", "--curve3")]
    data = [
        line(*thin(step, 100 * progress[column]), name=name, colour=colour, width=1.5)
        for column, name, colour in named
        if np.isfinite(progress[column]).sum() >= 2
    ]
    if not data:
        return None
    shares = progress["share_of_limit"]
    rows = [i for i in sample_rows(len(step)) if np.isfinite(shares[i]) or np.isfinite(progress["mfu"][i])]
    return Figure(
        id="share",
        title="Share of the limit",
        summary=f"Model FLOP/s over the best rate measured on this machine: "
        f"{percent(summary.speed.share_of_limit) if summary.speed.share_of_limit is not None else 'not measured'} on "
        f"average.",
        data=data,
        layout=layout(x="step", y="%", hovermode="x unified", height=260,
                      yaxis={"range": [0, max(100.0, 1.05 * max(max(v for v in t["y"]) for t in data))]}),
        table=Table(["step", "share of limit", "MFU"],
                    [[f"{step[i]:,}", percent(shares[i]), percent(progress["mfu"][i])] for i in rows]),
        legend=len(data) > 1,
    )  # fmt: skip


def memory_figure(run: RunData) -> Figure | None:
    progress = run.metrics.progress
    step = progress["step"]
    data = [
        line(*thin(step, progress[column] / 1e9), name=name, colour=colour, width=1.5, unit=" GB")
        for column, name, colour in (("rss_bytes", "process", "--curve1"), ("device_bytes", "device", "--curve2"))
        if np.isfinite(progress[column]).sum() >= 2
    ]
    if not data:
        return None
    rows = sample_rows(len(step))
    both = [progress["rss_bytes"], progress["device_bytes"]]
    cells = [[f"{step[i]:,}", *(human_bytes(v[i]) if np.isfinite(v[i]) else "–" for v in both)] for i in rows]
    peak = max(float(np.nanmax(v)) for v in both if np.isfinite(v).any())
    return Figure(
        id="memory",
        title="Memory",
        summary=f"Memory by step; at most {human_bytes(peak)}.",
        data=data,
        layout=layout(x="step", y="GB", hovermode="x unified", height=260, yaxis={"rangemode": "tozero"}),
        table=Table(["step", "process", "device"], cells),
        legend=len(data) > 1,
    )


def ranks_figure(summary: Summary) -> Figure | None:
    """The mean step of every rank, stacked, to see who waits for whom."""
    if len(summary.ranks) < 2:
        return None
    names = [f"rank {r.rank}" for r in summary.ranks]
    data: list[Trace] = []
    for part in STEP_FIELDS:
        values = [1e3 * getattr(r.mean, part) for r in summary.ranks]
        if max(values) > 0:
            data.append(stacked_bar(names, values, part))
    header = ["rank", "step", *(KIND_NAMES[p] for p in STEP_FIELDS)]
    rows = [
        [str(r.rank), human_seconds(r.mean_s), *(human_seconds(getattr(r.mean, p)) for p in STEP_FIELDS)]
        for r in summary.ranks
    ]
    return Figure(
        id="ranks",
        title="Ranks side by side",
        summary="Mean step of each rank by kind of time.",
        data=data,
        layout=layout(x="milliseconds", y="", height=90 + 34 * len(names), barmode="stack",
                      yaxis={"autorange": "reversed", "showgrid": False}, xaxis={"showgrid": True}),
        table=Table(header, rows),
        wide=True,
        legend=True,
    )  # fmt: skip


def stacked_bar(names: list[str], values: list[float], part: str, unit: str = "ms") -> dict[str, Any]:
    """One kind of time of several ranks or runs, stacked on the kinds before it."""
    return {
        "type": "bar",
        "orientation": "h",
        "y": names,
        "x": [float(f"{v:.5g}") for v in values],
        "name": KIND_NAMES[part],
        "marker": {"color": f"--{part.replace('_', '-')}", "line": {"width": 0}},
        "hovertemplate": f"%{{x:.4~g}} {unit}",
    }
