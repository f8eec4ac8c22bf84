"""Several runs side by side: curves over each other, figures with their ratio, settings that differ, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbopump.core.units import human, human_bytes, human_seconds
from turbopump.reporting import html
from turbopump.reporting.account import Summary, run_shares
from turbopump.reporting.figures import evaluation_points, smoothed_loss, stacked_bar, time_unit
from turbopump.reporting.html import Html, join, prose, tag
from turbopump.reporting.load import STEP_FIELDS, RunData, number
from turbopump.reporting.page import page_footer, tile
from turbopump.reporting.plots import RUN_COLOURS, Figure, Table, Trace, label, layout, line
from turbopump.reporting.series import sample_rows, thin
from turbopump.reporting.words import KIND_NAMES, NOT_MEASURED, headline, percent

_TICK_CHARACTERS = 18
_NOT_COMPARED = ("schema_version", "turbopump_version", "name")
_ENV_NOT_COMPARED = ("started", "run_id", "host", "pid")


@dataclass(frozen=True)
class FigureRow:
    """One figure of every run; the ratio is to the first run. `better` is "higher", "lower" or ""."""

    name: str
    unit: str
    better: str
    values: tuple[float | None, ...]

    @property
    def ratios(self) -> tuple[float | None, ...]:
        first = self.values[0]
        return tuple(v / first if v is not None and first else None for v in self.values)


@dataclass(frozen=True)
class Comparison:
    """What `report A B` says, as numbers."""

    labels: tuple[str, ...]
    summaries: tuple[Summary, ...]
    figures: tuple[FigureRow, ...]
    config: tuple[tuple[str, tuple[str, ...]], ...]
    environment: tuple[tuple[str, tuple[str, ...]], ...]
    sentences: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """The content of comparison.json beside the runs."""
        return {
            "runs": self.labels,
            "sentences": self.sentences,
            "figures": [
                {"name": r.name, "unit": r.unit, "better": r.better, "values": r.values, "ratios": r.ratios}
                for r in self.figures
            ],
            "config_differences": [{"setting": path, "values": values} for path, values in self.config],
            "environment_differences": [{"name": path, "values": values} for path, values in self.environment],
        }


def compare(runs: Sequence[RunData], summaries: Sequence[Summary]) -> Comparison:
    labels = _labels(runs)
    rows = _figure_rows(summaries)
    return Comparison(
        labels=labels,
        summaries=tuple(summaries),
        figures=rows,
        config=_differences([_without(s.config, _NOT_COMPARED) for s in summaries]),
        environment=_differences([_without(s.env, _ENV_NOT_COMPARED) for s in summaries]),
        sentences=tuple(_sentence(labels[0], labels[i], summaries[0], summaries[i]) for i in range(1, len(runs))),
    )


def _labels(runs: Sequence[RunData]) -> tuple[str, ...]:
    """Names of the runs; the directory's name, then a number, tells equal ones apart."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [run.path.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{name} ({i + 1})" for i, name in enumerate(names)]
    return tuple(names)


def _without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in names}


def _differences(tables: Sequence[dict[str, Any]]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    flat = [dict(html.flatten(t)) for t in tables]
    paths = dict.fromkeys(path for f in flat for path in f)
    rows = [(path, tuple(f.get(path, "–") for f in flat)) for path in paths]
    return tuple((path, values) for path, values in rows if len(set(values)) > 1)


def _figure_rows(summaries: Sequence[Summary]) -> tuple[FigureRow, ...]:
    def row(name: str, unit: str, better: str, get: Any) -> FigureRow:
        return FigureRow(name, unit, better, tuple(get(s) for s in summaries))

    metrics = {s.quality.metric for s in summaries if s.quality is not None}
    rows = []
    if len(metrics) == 1:
        quality = next(s.quality for s in summaries if s.quality is not None)
        better = "lower" if quality.lower_is_better else "higher"
        rows.append(row(f"{quality.name}, last", "", better, lambda s: s.quality and s.quality.last))
        rows.append(row(f"{quality.name}, best", "", better, lambda s: s.quality and s.quality.best))
    rows += [
        row("training loss, last", "", "lower", lambda s: s.final_train_loss),
        row("steps", "", "", lambda s: s.num_steps_done),
        row("wall time", "s", "lower", lambda s: s.run and s.run.wall_s),
        row("mean step", "s", "lower", lambda s: s.steps and s.steps.mean_s),
        *(row(f"step: {KIND_NAMES[p]}", "s", "lower", lambda s, p=p: s.steps and getattr(s.steps.mean, p))
          for p in STEP_FIELDS),
        row("throughput", "/s", "higher", lambda s: s.speed.units_per_s),
        row("throughput over the wall time", "/s", "higher", lambda s: s.speed.goodput_units_per_s),
        row("share of the limit", "%", "higher", lambda s: s.speed.share_of_limit),
        *(row(KIND_NAMES[k], "s", "lower", lambda s, k=k: s.run and getattr(s.run.breakdown, k))
          for k in ("startup", "evaluation", "checkpoint", "lost", "idle")),
        row("peak memory of the process", "B", "lower", lambda s: s.peak_rss_bytes),
        row("peak memory of the device", "B", "lower", lambda s: s.peak_device_bytes),
        row("parameters", "", "", lambda s: s.params),
    ]  # fmt: skip
    return tuple(r for r in rows if any(v for v in r.values))


def _sentence(label_a: str, label_b: str, a: Summary, b: Summary) -> str:
    """What differs between two runs, and which part of the step makes the difference."""
    parts = []
    if a.steps is not None and b.steps is not None and b.steps.mean_s > 0:
        ratio = a.steps.mean_s / b.steps.mean_s
        word = "faster" if ratio >= 1 else "slower"
        shown = ratio if ratio >= 1 else 1 / ratio
        parts.append(
            f"a step of {label_b} is {shown:.2f} times {word} than one of {label_a} "
            f"({human_seconds(b.steps.mean_s)} against {human_seconds(a.steps.mean_s)})"
            if shown >= 1.01
            else f"a step takes the same time ({human_seconds(b.steps.mean_s)} against {human_seconds(a.steps.mean_s)})"
        )
        change_s = {p: getattr(b.steps.mean, p) - getattr(a.steps.mean, p) for p in STEP_FIELDS}
        most = max(change_s, key=lambda p: abs(change_s[p]))
        if shown >= 1.01:
            more = "more" if change_s[most] > 0 else "less"
            parts[-1] += f", most of it {KIND_NAMES[most]}: {human_seconds(abs(change_s[most]))} {more}"
    if a.quality is not None and b.quality is not None and a.quality.metric == b.quality.metric:
        parts.append(
            f"{b.quality.name} ends at {b.quality.last:.4g} after {b.num_steps_done:,} steps, against "
            f"{a.quality.last:.4g} after {a.num_steps_done:,}"
        )
    if a.run is not None and b.run is not None:
        parts.append(f"wall time {human_seconds(b.run.wall_s)} against {human_seconds(a.run.wall_s)}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else f"{label_b} and {label_a} have no figure in common."


def comparison_text(comparison: Comparison) -> str:
    """For the terminal: the sentences and the settings that differ."""
    lines = list(comparison.sentences)
    lines += [f"{path}: {' | '.join(values)}" for path, values in comparison.config[:20]]
    return "\n".join(lines)


# ---- the page -------------------------------------------------------------------------------------------------------


def comparison_page(runs: Sequence[RunData], comparison: Comparison) -> bytes:
    """comparison.html"""
    figures = [
        f
        for f in (
            loss_overlay(runs, comparison),
            quality_overlay(runs, comparison, by_time=False),
            quality_overlay(runs, comparison, by_time=True),
            step_bars(comparison),
            wall_bars(comparison),
            throughput_overlay(runs, comparison),
        )
        if f is not None
    ]
    table = html.table(figure_table(comparison), caption="Figures of the runs", whole=True)
    body = join(
        [
            _header(comparison),
            tag(
                "main",
                html.section("Figures", tag("div", table, class_="card"), id_="figures-table"),
                html.section("Curves and time", tag("div", *map(html.figure, figures), class_="grid"), id_="curves"),
                html.section("What differs", _differences_html(comparison), id_="differences"),
                html.section("Each run", *map(_each, comparison.labels, comparison.summaries), id_="runs"),
            ),
            page_footer(),
        ]
    )  # fmt: skip
    return html.document(" and ".join(comparison.labels[:3]) + " · comparison", body, figures)


def _header(comparison: Comparison) -> Html:
    tiles = []
    for i, (name, summary) in enumerate(zip(comparison.labels, comparison.summaries)):
        steps = human_seconds(summary.steps.mean_s) if summary.steps else NOT_MEASURED
        quality = f"{summary.quality.name} {summary.quality.last:.4g}" if summary.quality else ""
        swatch = tag("span", class_="swatch", style=f"background:var({RUN_COLOURS[i % len(RUN_COLOURS)]})")
        tiles.append(tile(join([swatch, Html(html.escape(name))]), f"{steps} a step", quality))
    return tag(
        "header",
        tag("h1", " against ".join(comparison.labels[:3]) + (" …" if len(comparison.labels) > 3 else "")),
        *(tag("p", prose(sentence), class_="headline") for sentence in comparison.sentences),
        tag("dl", *tiles, class_="tiles"),
    )


def figure_table(comparison: Comparison) -> Table:
    header = ["", comparison.labels[0]]
    for name in comparison.labels[1:]:
        header += [name, "ratio"]
    rows = []
    for row in comparison.figures:
        cells = [row.name, _shown(row.values[0], row.unit)]
        for value, ratio in zip(row.values[1:], row.ratios[1:]):
            cells += [_shown(value, row.unit), _ratio(ratio, row.better)]
        rows.append(cells)
    return Table(header, rows)


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return NOT_MEASURED
    if unit == "s":
        return human_seconds(value)
    if unit == "B":
        return human_bytes(value)
    if unit == "%":
        return percent(value)
    if unit == "/s":
        return f"{human(value)}/s"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _ratio(ratio: float | None, better: str) -> str:
    if ratio is None:
        return "–"
    mark = ""
    if better and abs(ratio - 1) >= 0.005:
        mark = " better" if (ratio > 1) == (better == "higher") else " worse"
    return f"{ratio:.3g}×{mark}"


def _differences_html(comparison: Comparison) -> Html:
    header = ["setting", *comparison.labels]
    parts = []
    for title, rows in (("Configuration", comparison.config), ("Environment", comparison.environment)):
        content = Table(header, [[path, *values] for path, values in rows])
        shown = (
            html.table(content, caption=title, kind="settings") if rows else tag("p", "No difference.", class_="muted")
        )
        opened = title == "Configuration" or 0 < len(rows) <= 12
        parts.append(html.details(f"{title} ({len(rows)})", shown, open_=opened))
    return tag("div", *parts, class_="card")


def _each(name: str, summary: Summary) -> Html:
    return tag("div", tag("h3", name), tag("p", prose(headline(summary))), class_="card", style="margin-bottom:12px")


def _colour(i: int) -> str:
    return RUN_COLOURS[i % len(RUN_COLOURS)]


def loss_overlay(runs: Sequence[RunData], comparison: Comparison) -> Figure | None:
    data: list[Trace] = []
    rows = []
    for i, (run, name) in enumerate(zip(runs, comparison.labels)):
        step, smoothed, _ = smoothed_loss(run)
        if not np.isfinite(smoothed).any():
            continue
        data.append(line(*thin(step, smoothed), name=name, colour=_colour(i)))
        rows += [[name, f"{step[k]:,}", f"{smoothed[k]:.4g}"] for k in sample_rows(len(step), 8)]
    if not data:
        return None
    return Figure(
        id="loss",
        title="Training loss, smoothed",
        summary="Smoothed training loss of the runs by step.",
        data=data,
        layout=layout(x="step", y="loss", height=340, hovermode="x unified"),
        table=Table(["run", "step", "loss"], rows),
        log_x=True,
        wide=True,
        legend=True,
    )


def quality_overlay(runs: Sequence[RunData], comparison: Comparison, *, by_time: bool) -> Figure | None:
    """The held-out metric of all runs by step, or by the time since each run started."""
    qualities = [s.quality for s in comparison.summaries if s.quality is not None and s.quality.split != "train"]
    if not qualities or len({q.metric for q in qualities}) > 1:
        return None
    longest_s = max(s.run.wall_s for s in comparison.summaries if s.run is not None) if by_time and any(
        s.run is not None for s in comparison.summaries) else 1.0  # fmt: skip
    unit_s, unit = time_unit(longest_s)
    data: list[Trace] = []
    rows = []
    for i, (run, name) in enumerate(zip(runs, comparison.labels)):
        x, value = _quality_points(run, qualities[0].metric, unit_s if by_time else None)
        if len(x) > 1:
            data.append(line(x, value, name=name, colour=_colour(i), markers=True))
            rows += [[name, f"{x[k]:,.4g}", f"{value[k]:.4g}"] for k in sample_rows(len(x), 10)]
    if not data:
        return None
    axis = unit if by_time else "step"
    return Figure(
        id="quality-time" if by_time else "quality",
        title=f"{qualities[0].name} by {'time' if by_time else 'step'}",
        summary=f"{qualities[0].name} of the runs by {axis}.",
        data=data,
        layout=layout(x=axis, y=qualities[0].name, hovermode="x unified"),
        table=Table(["run", axis, qualities[0].name], rows),
        log_x=not by_time,
        legend=True,
    )


def _quality_points(run: RunData, metric: str, unit_s: float | None) -> tuple[np.ndarray, np.ndarray]:
    step, value = evaluation_points(run, metric)
    if unit_s is None:
        return step, value
    begin_s = run.ranks[0].first_epoch_s if run.ranks else np.nan
    at_s = {r["step"]: number(r.get("epoch_s")) - begin_s for r in run.metrics.evaluations}
    seconds = np.array([at_s[s] for s in step.tolist()])
    known = np.isfinite(seconds)
    return seconds[known] / unit_s, value[known]


def step_bars(comparison: Comparison) -> Figure | None:
    """Mean step of every run, stacked by kind of time."""
    found = [(n, s.steps.mean, s.steps.mean_s) for n, s in zip(comparison.labels, comparison.summaries) if s.steps]
    if not found:
        return None
    names = _ticks([n for n, _, _ in found])
    data = [stacked_bar(names, [1e3 * getattr(m, p) for _, m, _ in found], p) for p in STEP_FIELDS
            if any(getattr(m, p) > 0 for _, m, _ in found)]  # fmt: skip
    rows = [[n, human_seconds(t), *(human_seconds(getattr(m, p)) for p in STEP_FIELDS)] for n, m, t in found]
    return Figure(
        id="steps",
        title="A mean step",
        summary="Mean step of each run by kind of time.",
        data=data,
        layout=_bars_layout(len(names), "milliseconds"),
        table=Table(["run", "step", *(KIND_NAMES[p] for p in STEP_FIELDS)], rows),
        wide=True,
        legend=True,
    )


def wall_bars(comparison: Comparison) -> Figure | None:
    """Wall time of every run, stacked by kind of time."""
    shares = [(n, run_shares(s)) for n, s in zip(comparison.labels, comparison.summaries) if s.run is not None]
    if not shares:
        return None
    unit_s, unit = time_unit(max(sum(s.values()) for _, s in shares))
    names = _ticks([n for n, _ in shares])
    kinds = [k for k in KIND_NAMES if any(s.get(k, 0.0) > 0 for _, s in shares)]
    data = [stacked_bar(names, [s.get(k, 0.0) / unit_s for _, s in shares], k, unit) for k in kinds]
    rows = [[n, *(human_seconds(s.get(k, 0.0)) for k in kinds)] for n, s in shares]
    return Figure(
        id="wall",
        title="Wall time",
        summary="Wall time of each run by kind of time.",
        data=data,
        layout=_bars_layout(len(names), unit),
        table=Table(["run", *(KIND_NAMES[k] for k in kinds)], rows),
        wide=True,
        legend=True,
    )


def _ticks(names: Sequence[str]) -> list[str]:
    """Names of runs beside bars: cut where a phone has no room for them, numbered where that makes them equal."""
    short = [name if len(name) <= _TICK_CHARACTERS else name[: _TICK_CHARACTERS - 1] + "…" for name in names]
    if len(set(short)) < len(short):
        short = [f"{i + 1}: {name}" for i, name in enumerate(short)]
    return [label(name) for name in short]


def _bars_layout(count: int, unit: str) -> dict[str, Any]:
    return layout(x=unit, y="", height=130 + 38 * count, barmode="stack",
                  yaxis={"autorange": "reversed", "showgrid": False}, xaxis={"showgrid": True})  # fmt: skip


def throughput_overlay(runs: Sequence[RunData], comparison: Comparison) -> Figure | None:
    units = {s.speed.unit for s in comparison.summaries}
    if len(units) > 1:
        return None
    unit = f"{units.pop()}s/s"
    data: list[Trace] = []
    rows = []
    for i, (run, name) in enumerate(zip(runs, comparison.labels)):
        step, rate = run.metrics.progress["step"], run.metrics.progress["units_per_s"]
        if np.isfinite(rate).sum() > 1:
            data.append(line(*thin(step, rate), name=name, colour=_colour(i), width=1.5))
            rows += [[name, f"{step[k]:,}", human(rate[k])] for k in sample_rows(len(step), 8)]
    if not data:
        return None
    return Figure(
        id="throughput",
        title="Throughput",
        summary=f"{unit} of the runs by step.",
        data=data,
        layout=layout(x="step", y=label(unit), hovermode="x unified", yaxis={"rangemode": "tozero"}),
        table=Table(["run", "step", unit], rows),
        wide=True,
        legend=True,
    )
