"""The page of `plan --validate`: predicted beside measured for every row of every table, with its band; scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from turbopump.core.files import write_atomic
from turbopump.core.units import human, human_seconds
from turbopump.planner.judged import Row, Score
from turbopump.planner.validate import Report, TableReport
from turbopump.reporting import html
from turbopump.reporting.html import Html, join, prose, tag
from turbopump.reporting.page import page_footer, plots, tile
from turbopump.reporting.plots import Figure, Table, layout
from turbopump.reporting.probe_axes import MAX_POINTS, colour, dots, rate_axis, seconds_axis, span_of
from turbopump.reporting.series import sample_rows
from turbopump.reporting.validation_text import HEAD, cells
from turbopump.reporting.words import percent

TITLES = {"s": "Seconds", "GiB": "Memory, GiB", "%": "Memory, percent of another case", "W": "Power of a host, W",
          "GPU-hours": "GPU-hours between failures"}  # fmt: skip
ORDER = (("s", "steps"), ("GiB", ""), ("%", ""), ("s", "single operations"))
OPERATION_S = 0.02
"""Tables whose median time is below this are drawn apart: of single operations, not of steps."""


def write_validation_page(report: Report, path: Path) -> None:
    """validate.html at `path`; raises `RunDirectoryError` where the disk does not take it."""
    write_atomic(path, validation_page(report))


def validation_page(report: Report) -> bytes:
    """The page as one HTML file."""
    figures = validation_figures(report)
    parts = [html.section("Predicted beside measured", plots(figures, *figures), id_="scatter"),
             html.section("Scores", scores(report), id_="scores")]  # fmt: skip
    if any(part.not_predicted for part in report.tables) or report.ignored:
        parts.append(html.section("Left out", left_out(report), id_="left-out"))
    body = join([_header(report), tag("main", *parts), page_footer()])
    return html.document("plan · validation", body, figures.values())


def _header(report: Report) -> Html:
    how = "by what ships, fitted on other rows" if report.mode == "frozen" else "each group by a calibration without it"
    rows = sum(len(part.rows) for part in report.tables)
    missing = sum(len(part.not_predicted) for part in report.tables)
    totals = [(part, total) for part in report.tables if (total := part.total)]
    shown = [(part.title, percent(total.error), f"{total.num_rows:,} rows") for part, total in totals]
    fitted = f", calibration fitted on {report.calibration}" if report.calibration else ""
    text = f"{rows:,} rows of {len(report.tables)} tables predicted {how}; {missing:,} rows could not be predicted."
    return tag(
        "header", tag("h1", "Predictions beside published results"),
        tag("p", f"{report.mode} · {report.path}{fitted}", class_="status"), tag("p", prose(text), class_="headline"),
        tag("dl", *(tile(name, error, f"mean error, {count}") for name, error, count in shown), class_="tiles four"),
    )  # fmt: skip


def validation_figures(report: Report) -> dict[str, Figure]:
    """A scatter a unit; times of steps and of single operations apart."""
    kinds: dict[tuple[str, str], list[TableReport]] = {}
    for part in report.tables:
        for unit in dict.fromkeys(row.unit for row in part.rows):
            kinds.setdefault((unit, _kind(part, unit)), []).append(part)
    ordered = sorted(kinds.items(), key=lambda item: ORDER.index(item[0]) if item[0] in ORDER else len(ORDER))
    figures = [_scatter(unit, kind, parts, number) for number, ((unit, kind), parts) in enumerate(ordered)]
    return {figure.id: figure for figure in figures}


def _kind(part: TableReport, unit: str) -> str:
    if unit != "s":
        return ""
    times = sorted(row.measured for row in part.rows)
    return "single operations" if times[len(times) // 2] < OPERATION_S else "steps"


def _scatter(unit: str, kind: str, parts: Sequence[TableReport], number: int) -> Figure:
    """Log-log, colours by table; a line where they agree, dotted lines at a factor of 1.2."""
    total = sum(len(_of(part, unit)) for part in parts)
    data, values = [], []
    for index, part in enumerate(parts):
        rows = _of(part, unit)
        share = max(20, round(MAX_POINTS * len(rows) / total))
        rows = [rows[i] for i in sample_rows(len(rows), share)] if len(rows) > share else rows
        values += [v for r in rows for v in (r.predicted, r.measured)]
        data.append(
            dots([r.measured for r in rows], [r.predicted for r in rows], [_words(r) for r in rows], name=part.title,
                 colour=colour(index), size=6, low=[_end(r.low, r) for r in rows], high=[_end(r.high, r) for r in rows])
        )  # fmt: skip
        data[-1]["error_y"]["color"] = "--axis"
    low, high = span_of(values)
    lines = [_line(low, high, 1.0, "solid"), _line(low, high, 1.2, "dot"), _line(low, high, 1 / 1.2, "dot")]
    axis = seconds_axis(values) if unit == "s" else rate_axis(values)
    title = TITLES.get(unit, unit) + (f" of {kind}" if kind else "")
    scored = [(part.title, part.total) for part in parts if part.total]
    return Figure(
        id=f"scatter-{number}", title=title, legend=True, data=data, wide=True,
        summary="; ".join(f"{name}: mean error {percent(s.error)}" for name, s in scored) + ".",
        layout=layout(x="measured", y="", height=420, hovermode="closest", xaxis=axis, yaxis=dict(axis), shapes=lines),
        table=Table(["table", *HEAD], [[name, *cells(s)] for name, s in scored]),
        note="Upwards: predicted. Line: they agree; dotted: 20 % off. Bars: the 80 % band."
        + (f" {MAX_POINTS:,} of {total:,} rows are drawn, evenly." if total > MAX_POINTS else ""),
    )  # fmt: skip


def _of(part: TableReport, unit: str) -> list[Row]:
    return sorted((row for row in part.rows if row.unit == unit), key=lambda row: row.measured)


def _end(value: float, row: Row) -> float:
    return value if math.isfinite(value) else row.predicted


def _words(row: Row) -> str:
    said = human_seconds if row.unit == "s" else lambda v: f"{human(v)} {row.unit}"
    return f"{row.group} · {row.label} · predicted {said(row.predicted)}, measured {said(row.measured)}"


def _line(low: float, high: float, factor: float, dash: str) -> Mapping[str, object]:
    return {"type": "line", "x0": low, "x1": high, "y0": low * factor, "y1": high * factor, "layer": "below",
            "line": {"color": "--muted", "width": 1, "dash": dash}}  # fmt: skip


def scores(report: Report) -> Html:
    """All tables, and the groups of each in its own fold."""
    rows = [[part.title, *cells(part.total)] for part in report.tables if part.total]
    blocks = [html.table(Table(["table", *HEAD], rows), caption="Scores by table", whole=True)]
    for part in report.tables:
        groups: Mapping[str, Score] = part.groups
        if len(groups) > 1:
            ordered = sorted(groups.items(), key=lambda item: -item[1].error)
            rows = [[name, *cells(one)] for name, one in ordered]
            content = html.table(Table(["group", *HEAD], rows), caption=part.title)
            basis = tag("p", f"Predicted: {part.basis}.", class_="muted")
            blocks.append(html.details(f"{part.title}: {len(groups)} groups", basis, content))
    return tag("div", *blocks, class_="card")


def left_out(report: Report) -> Html:
    """Rows without a prediction, with the reason; files that are no table."""
    blocks = []
    for part in report.tables:
        if part.not_predicted:
            reasons = tag("ul", *(tag("li", why) for why in part.not_predicted))
            blocks.append(html.details(f"{part.title}: {len(part.not_predicted):,} rows", reasons))
    if report.ignored:
        blocks.append(tag("p", f"No table known here: {', '.join(report.ignored)}.", class_="muted"))
    return tag("div", *blocks, class_="card")
