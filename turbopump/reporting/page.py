"""The page of one run: headline, decisions, curves, time, memory, checkpoints, samples, ranks, configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any

from turbopump.core.units import human, human_bytes, human_seconds
from turbopump.core.version import VERSION
from turbopump.reporting import html
from turbopump.reporting.account import Summary, run_shares
from turbopump.reporting.decide import Finding, changes, limits, nothing_to_change
from turbopump.reporting.figures import run_figures
from turbopump.reporting.html import Html, join, prose, tag
from turbopump.reporting.load import RUN_FIELDS, STEP_FIELDS, RunData, measured
from turbopump.reporting.plots import Figure, Table
from turbopump.reporting.predicted_page import predicted_card
from turbopump.reporting.words import KIND_NAMES, NOT_MEASURED, headline, memory_text, percent

_SHOWN_SAMPLES = 6
_SAMPLE_CHARACTERS = 3000
_FIRST = 4  # changes shown at once


def run_page(run: RunData, summary: Summary) -> bytes:
    """report.html of one run."""
    figures = run_figures(run, summary)
    parts = [
        decisions(summary),
        html.section(
            "Learning", plots(figures, "loss", "quality", "lr", "grad_norm"), evaluations(summary), id_="learning"
        ),
        html.section(
            "Where the time went",
            wall_time(summary),
            plots(figures, "waterfall", "kinds", "distribution", "throughput", "share", "memory"),
            step_table(summary),
            predicted_card(summary.predicted),
            id_="time",
        ),
    ]
    if "ranks" in figures:
        parts.append(html.section("Ranks", plots(figures, "ranks"), id_="ranks"))
    parts.append(html.section("Checkpoints", checkpoints(summary), id_="checkpoints"))
    if run.samples:
        parts.append(html.section("Samples", samples(run), id_="samples"))
    parts.append(html.section("Configuration and environment", configuration(summary), id_="configuration"))
    body = join([page_header(summary), tag("main", *parts), page_footer()])
    return html.document(f"{summary.name} · report", body, figures.values())


def page_header(summary: Summary) -> Html:
    speed, steps, quality = summary.speed, summary.steps, summary.quality
    tiles: list[tuple[str, str, str]] = []
    if quality is not None:
        show = percent if quality.metric == "accuracy" else lambda v: f"{v:.4g}"
        was = f"was {show(quality.first)} at step {quality.first_step:,}"
        tiles.append((quality.name, show(quality.last), was if quality.first_step != quality.last_step else ""))
    tiles.append(("wall time", human_seconds(summary.run.wall_s) if summary.run else NOT_MEASURED,
                  f"{summary.num_steps_done:,} steps"))  # fmt: skip
    over_all = f"{human(speed.goodput_units_per_s)} over the wall time" if speed.goodput_units_per_s else ""
    units = human(speed.units_per_s) if speed.units_per_s else NOT_MEASURED
    tiles.append((f"{speed.unit}s per second", units, over_all))
    tiles.append(("step", human_seconds(steps.mean_s) if steps else NOT_MEASURED,
                  f"median {human_seconds(steps.median_s)}" if steps else ""))  # fmt: skip
    limit = f"of {human(speed.limit_flops_per_s, 'FLOP/s')} measured" if speed.limit_flops_per_s else ""
    share = percent(speed.share_of_limit) if speed.share_of_limit is not None else NOT_MEASURED
    mfu = f"; MFU {percent(speed.mfu)}" if speed.mfu is not None else ""
    tiles.append(("share of the limit", share, limit + mfu))
    of = f"of {human_bytes(summary.memory_bytes)}" if summary.memory_bytes else ""
    tiles.append(("peak memory", memory_text(summary), of))
    notes = Html()
    if summary.notes:
        notes = tag("aside", tag("ul", *(tag("li", n) for n in summary.notes)), class_="notes", aria_label="Notes")
    return tag(
        "header",
        tag("h1", summary.name),
        tag("p", status_text(summary), class_="status"),
        tag("p", prose(headline(summary)), class_="headline"),
        tag("dl", *(tile(*t) for t in tiles), class_="tiles"),
        notes,
    )


def tile(name: str, value: str, more: str) -> Html:
    small = tag("small", more) if more else Html()
    return tag("div", tag("dt", name), tag("dd", value, small), class_="tile")


def status_text(summary: Summary) -> str:
    started = summary.env.get("started")
    parts = [f"started {moment(started)}" if isinstance(started, str) else "", f"ended: {summary.status}"]
    if summary.run is not None and summary.run.num_attempts > 1:
        parts.append(f"{summary.run.num_attempts} attempts")
    return " · ".join(p for p in parts if p)


def moment(text: str) -> str:
    """An ISO moment as people write it; as it is where it is none."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return text


def decisions(summary: Summary) -> Html:
    """What limits this run, what to change first."""
    found, limiting = changes(summary), limits(summary)
    left = [tag("li", tag("h3", prose(f.title)), tag("p", prose(f"{f.evidence}. {f.action}"))) for f in limiting]
    right = tag("ol", *map(change_item, found[:_FIRST])) if found else tag("p", prose(nothing_to_change(summary)))
    if len(found) > _FIRST:
        more = tag("ol", *map(change_item, found[_FIRST:]), style="margin-top:8px")
        right = join([right, html.details(f"{len(found) - _FIRST} more", more)])
    return tag(
        "div",
        tag("section", tag("h2", "What limits this run", id="limits-title"),
            tag("ol", *left) if left else tag("p", "Where the time went was not measured."),
            class_="card", id="limits", aria_labelledby="limits-title"),
        tag("section", tag("h2", "What to change first", id="changes-title"), right,
            class_="card", id="changes", aria_labelledby="changes-title"),
        class_="decisions", style="margin-top:24px",
    )  # fmt: skip


def change_item(finding: Finding) -> Html:
    if finding.saves_at_most_s is not None:
        where = "measured in this run" if finding.basis == "this run" else "measured on this machine"
        gain = tag("span", f"saves at most {human_seconds(finding.saves_at_most_s)}", class_="gain", title=where)
    else:
        gain = tag("span", "gain not measured", class_="gain none") if finding.about == "time" else Html()
    setting = tag("p", tag("code", finding.setting)) if finding.setting else Html()
    text = f"{finding.evidence} {finding.action}".strip()
    return tag("li", tag("h3", finding.title, gain), tag("p", prose(text)), setting)


def plots(figures: Mapping[str, Figure], *ids: str) -> Html:
    """The cards of the figures that exist; a half-width card without a neighbour is made wide by being last."""
    shown = [figures[i] for i in ids if i in figures]
    narrow = [figure.id for figure in shown if not figure.wide]
    alone = narrow[-1] if len(narrow) % 2 else None
    found = [html.figure(replace(figure, wide=True) if figure.id == alone else figure) for figure in shown]
    if not found:
        return tag("p", "Not measured.", class_="muted")
    noscript = Html()
    if "loss" in ids:
        noscript = tag("noscript", tag("p", "The plots need JavaScript; the tables hold the same figures."))
    return join([noscript, tag("div", *found, class_="grid")])


def wall_time(summary: Summary) -> Html:
    """The run's wall time as one bar, with its legend: no script needed."""
    shares = run_shares(summary)
    wall_s = sum(shares.values())
    if summary.run is None or wall_s <= 0:
        return tag("p", "Not measured: the run directory holds no spans.", class_="muted")
    shown = {name: s for name, s in shares.items() if s > 0}
    bar = tag(
        "div",
        *(
            tag("span", style=f"flex:{s / wall_s:.5f} 1 0;background:var(--{name.replace('_', '-')})")
            for name, s in shown.items()
        ),
        class_="bar",
        role="img",
        aria_label="Wall time by kind: "
        + ", ".join(f"{KIND_NAMES[n]} {percent(s / wall_s)}" for n, s in shown.items()),
    )
    legend = tag("ul", *(legend_item(n, s, wall_s) for n, s in shown.items()), class_="legend")
    run = summary.run
    rows = [[name.replace("startup", "start-up"), human_seconds(s), percent(s / run.wall_s)]
            for name in RUN_FIELDS for s in [getattr(run.breakdown, name)]]  # fmt: skip
    rows.append(["sum", human_seconds(run.breakdown.total), percent(run.breakdown.total / run.wall_s)])
    rows.append(["wall time", human_seconds(run.wall_s), "100 %"])
    note = (
        f"Idle: {human_seconds(run.idle_between_attempts_s)} between attempts, {human_seconds(run.idle_logging_s)} "
        f"logging, {human_seconds(run.idle_unexplained_s)} in no span. "
    )
    off = abs(run.sum_error_s)
    note += (
        "The parts sum to the wall time."
        if off <= 1e-6 * run.wall_s + 1e-6
        else f"The parts sum to {human_seconds(off)} {'more' if run.sum_error_s > 0 else 'less'} than the wall time: "
        f"spans overlap, or the clock was set."
    )
    return tag(
        "div",
        tag("h3", f"{human_seconds(run.wall_s)} of wall time"),
        tag("div", bar, style="margin-top:10px"),
        legend,
        html.details("Table", html.table(Table(["part of the run", "time", "share"], rows), caption="Wall time"),
                     tag("p", note, class_="muted")),
        class_="card", style="margin-bottom:16px",
    )  # fmt: skip


def legend_item(name: str, s: float, wall_s: float) -> Html:
    swatch = tag("span", class_="swatch", style=f"background:var(--{name.replace('_', '-')})")
    return tag("li", swatch, KIND_NAMES[name], Html(" "), tag("b", percent(s / wall_s)))


def step_table(summary: Summary) -> Html:
    steps = summary.steps
    if steps is None:
        return Html()
    rows = [
        [KIND_NAMES[f], *(human_seconds(getattr(b, f)) for b in (steps.mean, steps.median, steps.p90))]
        for f in STEP_FIELDS
    ]
    rows.append(["step", human_seconds(steps.mean_s), human_seconds(steps.median_s), human_seconds(steps.p90_s)])
    content = Table(["part of a step", "mean", "median", "p90"], rows)
    note = "The parts of the mean sum to the step; medians and percentiles do not."
    return tag(
        "div",
        html.details("Mean, median and 90th percentile of the step", html.table(content, caption="Step time"),
                     tag("p", note, class_="muted")),
        class_="card", style="margin-top:16px",
    )  # fmt: skip


def evaluations(summary: Summary) -> Html:
    if not summary.evaluations:
        return tag("p", "The run was not evaluated.", class_="muted")
    known = [m for m in dict.fromkeys(k for r in summary.evaluations for k in r)
             if m not in ("type", "step", "split", "epoch_s", "s")]  # fmt: skip
    metrics = [m for m in known if any(measured(r.get(m)) is not None for r in summary.evaluations)]
    rows = [
        [f"{r['step']:,}", r["split"], *(number_text(r.get(m)) for m in metrics), seconds_text(r.get("s"))]
        for r in summary.evaluations[-500:]
    ]
    header = ["step", "split", *(m.replace("_", " ") for m in metrics), "took"]
    content = html.table(Table(header, rows), caption="Evaluations")
    return tag("div", html.details(f"All evaluations ({len(rows)})", content), class_="card", style="margin-top:16px")


def number_text(value: Any) -> str:
    found = measured(value)
    return "–" if found is None else f"{found:.5g}"


def seconds_text(value: Any) -> str:
    found = measured(value)
    return "–" if found is None else human_seconds(found)


def checkpoints(summary: Summary) -> Html:
    if not summary.checkpoints:
        return tag("p", "No checkpoint was written.", class_="muted")
    rows = [
        [
            f"{r['step']:,}",
            human_bytes(size) if (size := measured(r.get("bytes"))) is not None else "–",
            seconds_text(r.get("stall_s")),
            seconds_text(r.get("write_s")),
            "on disk" if r.get("kept") else "pruned",
        ]
        for r in summary.checkpoints[-500:]
    ]
    header = ["step", "size", "training stood still", "written in", "state"]
    return tag("div", html.table(Table(header, rows), caption="Checkpoints"), class_="card")


def samples(run: RunData) -> Html:
    """What the model said, newest first; strings only, whatever they are called."""
    shown = [sample(record) for record in reversed(run.samples)]
    older = shown[_SHOWN_SAMPLES:]
    more = html.details(f"Older samples ({len(older)})", *older[:60]) if older else Html()
    return tag("div", *shown[:_SHOWN_SAMPLES], more, class_="card")


def sample(record: Mapping[str, Any]) -> Html:
    step = measured(record.get("step"))
    title = f"Step {step:,.0f}" if step is not None else "Sample"
    extra = [
        f"{k} {v}" for k, v in record.items()
        if k not in ("step", "type") and isinstance(v, (int, float)) and not isinstance(v, bool)
    ]  # fmt: skip
    prompt = record.get("prompt")
    head = tag("span", prompt[:_SAMPLE_CHARACTERS], class_="prompt") if isinstance(prompt, str) else Html()
    texts = [v for k, v in record.items() if isinstance(v, str) and k not in ("prompt", "type")]
    body = "\n".join(texts)[:_SAMPLE_CHARACTERS]
    if isinstance(prompt, str) and body.startswith(prompt):
        body = body.removeprefix(prompt)
    return tag("div", tag("p", " · ".join([title, *extra]), class_="muted"), tag("div", head, body, class_="sample"))


def configuration(summary: Summary) -> Html:
    config = {k: v for k, v in summary.config.items() if k not in ("schema_version", "turbopump_version")}
    env = {k: v for k, v in summary.env.items() if k != "limit"}
    limit = summary.env.get("limit")
    parts = []
    if summary.choices:
        note = tag("p", "Settings that the recipe left to a measurement on this machine.", class_="muted")
        parts.append(html.details("Chosen by measurement", note, *_choices(summary.choices), open_=True))
    parts.append(html.details("Configuration", html.nested_table(config) if config else missing("config.toml")))
    parts.append(html.details("Environment", html.nested_table(env) if env else missing("env.json")))
    shown = _with_records(limit) if isinstance(limit, dict) and limit else [missing("the limit")]
    parts.append(html.details("Measured limit", *shown))
    return tag("div", *parts, class_="card")


def _choices(choices: Mapping[str, Any]) -> list[Html]:
    """What was chosen, each with the rows of its measurement."""
    found = []
    for name, values in choices.items():
        if isinstance(values, dict):
            found += [tag("h3", name.replace("_", " ")), *_with_records(values)]
    return found


def _with_records(values: dict[str, Any]) -> list[Html]:
    """Plain values as settings, lists of records as tables below them."""
    lists = {k: v for k, v in values.items() if isinstance(v, list) and v and all(isinstance(r, dict) for r in v)}
    plain = html.nested_table({k: v for k, v in values.items() if k not in lists})
    return [plain, *(html.records_table(rows[:200], name) for name, rows in lists.items())]


def missing(what: str) -> Html:
    return tag("p", f"Not measured: {what} is not there.", class_="muted")


def page_footer() -> Html:
    return tag(
        "footer", f"Written by turbopump {VERSION}. Opens without a network; nothing in it is loaded from outside."
    )
