"""Every row of a machine profile as one HTML table that the page's script sorts and filters; plain without it."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from turbopump.core.units import human_seconds
from turbopump.hardware.profile import Measurement
from turbopump.reporting.html import Html, tag
from turbopump.reporting.probe_rows import error_words, op_words, rate_words, timed, usable
from turbopump.reporting.words import percent

_COLUMNS = ("operation", "dtype", "route", "where", "median", "fastest", "p90", "rate", "error", "remark")


def all_rows(rows: Iterable[Measurement]) -> Html:
    """The table, with a field to filter it; columns of numbers carry their value in `data-v`."""
    head = "".join(f'<th scope="col"><button type="button">{name}</button></th>' for name in _COLUMNS)
    body = "".join(map(_row, rows))
    table = Html(
        f'<table class="records"><caption>All rows</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    )
    field = tag("input", type="search", placeholder="Filter: gemm bf16 …", aria_label="Filter the rows",
                autocomplete="off", spellcheck="false")  # fmt: skip
    return tag(
        "div",
        tag("p", field, tag("output", ""), class_="filter"),
        tag("div", table, class_="scroll", tabindex="0", role="region", aria_label="All rows"),
        class_="rows",
    )


def _row(row: Measurement) -> str:
    if timed(row):
        median, fastest, p90 = row.median_s or 0.0, row.min_s or 0.0, row.p90_s or 0.0
        times = (
            _number(median, human_seconds(median)),
            _number(fastest, human_seconds(fastest)),
            _number(p90, human_seconds(p90)),
        )
        rate = _number((row.flops or row.bytes) / median, rate_words(row))
    else:
        times, rate = ("<td></td>",) * 3, "<td></td>"
    error = _number(row.error, error_words(row.error)) if row.error is not None else "<td></td>"
    where = row.device if row.device != "cpu" else f"{row.threads} thread{'s' * (row.threads != 1)}"
    texts = "".join(f"<td>{escape(text)}</td>" for text in (row.dtype, row.route, where))
    return (
        f'<tr><th scope="row">{escape(op_words(row))}</th>{texts}{"".join(times)}{rate}{error}'
        f"<td>{escape(_remark(row))}</td></tr>"
    )


def _number(value: float, text: str) -> str:
    return f'<td data-v="{value:.4g}">{escape(text)}</td>'


def _remark(row: Measurement) -> str:
    """What is special about a row."""
    parts = [row.problem]
    if usable(row) and row.noisy:
        parts.append(f"noisy: spread {percent(row.spread)}, waited {percent(row.waited)}")
    parts += [f"{name.replace('_', ' ')} {value}" for name, value in list(row.facts.items())[:4]]
    return "; ".join(p for p in parts if p)
