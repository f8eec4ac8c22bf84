"""The page of a plan: what to run, where a step's time should go, what else there is and costs, what would change it.

    write_page(PlanView(plan, found, machine_words, capacity_bytes), Path("plan.html"))

One self-contained file in the style of a run's report. `plan` is what plan.toml holds; `found` the search behind it
(None for a plan that was read back: then the page has no landscape); `scaling` plans for other numbers of devices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from turbopump.core.files import write_atomic
from turbopump.core.units import human, human_bytes, human_seconds
from turbopump.planner.choice import Alternative, Change, Choice, Found
from turbopump.planner.plan_file import PlanFile
from turbopump.reporting import html
from turbopump.reporting.html import Html, join, prose, tag
from turbopump.reporting.page import moment, page_footer, plots, tile
from turbopump.reporting.plan_plots import (
    NAMES,
    SPLITS,
    ScalePoint,
    landscape,
    memory,
    scaling,
    waterfall,
    waterfall_bars,
)
from turbopump.reporting.plots import Figure, Table
from turbopump.reporting.words import percent

RELIEF = {
    "below_limit": "Larger microbatches or hidden sizes per device bring products nearer to the peak: less tensor "
    "parallelism, fused kernels.",
    "exposed_communication": "A faster link, fewer devices per split across hosts, or rarer and smaller exchanges.",
    "bubble": "More microbatches a step (a larger global batch), or more chunks a stage (interleaved).",
    "data": "More loader processes, a faster disk, or smaller records.",
    "optimizer": "Shard the optimizer's states over more devices.",
    "other": "Larger steps: the work of the host is the same for each.",
    "ideal": "This is the arithmetic itself: more devices, a faster one, or a narrower dtype.",
    "compute": "More devices, a faster one, or a narrower dtype.",
}
DERIVED = ("num_devices", "devices_per_node", "num_microbatches")
COST_TILES: Mapping[str, tuple[str, Callable[[float], str], str]] = {
    "wall_s": ("time to finish", human_seconds, "failures and checkpoints included"),
    "usd": ("cost", lambda v: f"${human(v)}", "to finish"),
    "kwh": ("energy", lambda v: human(v * 1e3, "Wh"), "to finish"),
    "goodput": ("goodput", percent, "of the time are steps that count"),
    "checkpoint_interval_s": ("checkpoint every", human_seconds, ""),
    "read_bytes_per_s": ("data to read", lambda v: f"{human_bytes(v)}/s", ""),
}  # fmt: skip
"""What of `cost` is shown on top, the most asked for first."""
HEATMAP_SHARE = 45  # percent of the accent at the best cell: text on it stays readable


@dataclass(frozen=True)
class PlanView:
    """All that the page shows."""

    plan: PlanFile
    found: Found | None = None
    machine: str = ""
    """The machine in words; by default as plan.toml names it."""
    capacity_bytes: float = 0.0
    """Of one device; 0 where it is not known."""
    scaling: tuple[ScalePoint, ...] = ()
    notes: tuple[str, ...] = ()


def write_page(view: PlanView, path: Path) -> None:
    """plan.html at `path`; raises `RunDirectoryError` where the disk does not take it."""
    write_atomic(path, plan_page(view))


def plan_page(view: PlanView) -> bytes:
    """The page as one HTML file."""
    figures = plan_figures(view)
    parts = [
        decisions(view),
        html.section("Where a step's time should go", plots(figures, "waterfall"), id_="time"),
        html.section("Memory", plots(figures, "memory"), id_="memory-part"),
    ]
    if view.found is not None:
        content = [plots(figures, "landscape")] if "landscape" in figures else []
        parts.append(html.section("The search", *content, heat_map(view.found), alternatives(view.found), id_="search"))
    if view.scaling:
        parts.append(html.section("How many devices", plots(figures, "scaling-usd", "scaling-kwh"),
                                  scale_table(view.scaling), id_="scaling"))  # fmt: skip
    parts.append(html.section("Everything", everything(view.plan), id_="everything"))
    body = join([page_header(view), tag("main", *parts), page_footer()])
    return html.document(f"{view.plan.model.name} · plan", body, figures.values())


def plan_figures(view: PlanView) -> dict[str, Figure]:
    """All plots that there is data for, by id."""
    candidates = [waterfall(view.plan), memory(view.plan, view.capacity_bytes)]
    if view.found is not None:
        candidates.append(landscape(view.found.landscape, row_of(view.found.best), view.capacity_bytes))
    candidates += [scaling(view.scaling, "usd"), scaling(view.scaling, "kwh")]
    return {figure.id: figure for figure in candidates if figure is not None}


def row_of(choice: Choice) -> dict[str, Any]:
    """A choice as a row of the landscape."""
    dims = {name: getattr(choice.dims, name) for name in SPLITS}
    return {**dims, "microbatch": choice.settings.microbatch, "recompute": choice.settings.recompute,
            "step_s": choice.step_s, "peak_bytes": choice.peak_bytes}  # fmt: skip


# head -----------------------------------------------------------------------------------------------------------------


def page_header(view: PlanView) -> Html:
    plan = view.plan
    status = [view.machine or plan.inputs.machine, f"planned {moment(plan.date)}", f"turbopump {plan.written_by}"]
    notes = tag("aside", tag("ul", *(tag("li", n) for n in view.notes)), class_="notes", aria_label="Notes")
    return tag(
        "header",
        tag("h1", f"{plan.model.name} on {plan.settings.num_devices:,} devices"),
        tag("p", " · ".join(part for part in status if part), class_="status"),
        tag("p", prose(headline(view)), class_="headline"),
        tag("dl", *(tile(*t) for t in tiles(view)), class_="tiles four"),
        notes if view.notes else Html(),
    )


def headline(view: PlanView) -> str:
    plan, p = view.plan, view.plan.prediction
    band = f"{human_seconds(p.low_s)} to {human_seconds(p.high_s)}"
    text = (
        f"A step should take {human_seconds(p.step_s)} (80 % band {band}): {human(p.units_per_s)} "
        f"{plan.model.unit}s a second. Split as {settings_words(plan)}."
    )
    if view.found is not None and view.found.runner_up is not None and view.found.margin_sigmas is not None:
        slower = view.found.runner_up.step_s / view.found.best.step_s - 1
        text += f" The next best is {percent(slower)} slower ({view.found.margin_sigmas:.1f} standard deviations)."
    return text


def settings_words(plan: PlanFile) -> str:
    s = plan.settings
    dims = [f"{name} {getattr(plan.dims, name)}" for name in SPLITS if getattr(plan.dims, name) > 1]
    more = [f"microbatch {s.microbatch}", f"recompute {s.recompute}", s.dtype]
    if plan.dims.pp > 1:
        more.append(s.schedule if s.virtual_stages == 1 else f"{s.schedule}, {s.virtual_stages} chunks a stage")
    if s.synchronisation != "synchronous":
        more.append(f"{s.synchronisation} exchange" + (f" every {s.sync_every} steps" if s.sync_every > 1 else ""))
    return ", ".join([*(dims or ["one device"]), *more])


def tiles(view: PlanView) -> list[tuple[str, str, str]]:
    plan, p = view.plan, view.plan.prediction
    band = (p.high_s - p.low_s) / 2 / p.step_s if p.step_s else 0.0
    shown = [("step", human_seconds(p.step_s), f"± {percent(band)}"),
             (f"{plan.model.unit}s per second", human(p.units_per_s), "")]  # fmt: skip
    if p.mfu:
        shown.append(("model FLOPs utilization", percent(p.mfu), f"{human(plan.model.params)} parameters"))
    peak = max((sum(parts.values()) for parts in plan.memory.values()), default=0.0)
    if peak:
        of = f"of {human_bytes(view.capacity_bytes)}" if view.capacity_bytes else ""
        shown.append(("memory of the fullest rank", human_bytes(peak), of))
    return (shown + [found for name in COST_TILES if (found := _cost_tile(name, plan.cost.get(name)))])[:8]


def _cost_tile(name: str, value: float | None) -> tuple[str, str, str] | None:
    """One figure of `cost`; None where it is not known."""
    if value is None:
        return None
    words, show, more = COST_TILES[name]
    return words, show(value), more


# decisions ------------------------------------------------------------------------------------------------------------


def decisions(view: PlanView) -> Html:
    """What limits the step, and what would change the answer."""
    left = tag("div", tag("h2", "What limits it"), tag("ol", *limits(view.plan)), class_="card")
    if view.found is None:
        return tag("div", left, class_="decisions one", style="margin-top:24px")
    changes = sorted((c for c in view.found.changes if c.flips), key=lambda c: (c.choice is None, -c.gain))
    items = [change_item(change, view.found.best) for change in changes]
    if same := [c.what for c in view.found.changes if not c.flips]:
        items.append(tag("li", tag("p", f"It stays the same with {', '.join(same)}.")))
    none = tag("p", "Nothing else was tried.", class_="muted")
    right = tag("div", tag("h2", "What would change the answer"), tag("ol", *items) if items else none, class_="card")
    return tag("div", left, right, class_="decisions", style="margin-top:24px")


def limits(plan: PlanFile) -> list[Html]:
    """The three largest kinds of time with what would relieve them."""
    step_s = plan.prediction.step_s
    bars = sorted(waterfall_bars(plan), key=lambda bar: -bar[1])[:3]
    return [
        tag("li", tag("h3", NAMES.get(name, name), tag("span", prose(percent(s / step_s)), class_="gain")),
            tag("p", RELIEF.get(name, "")))
        for name, s in bars if step_s and s / step_s >= 0.01
    ]  # fmt: skip


def change_item(change: Change, best: Choice) -> Html:
    if change.choice is None:
        return tag("li", tag("h3", change.what, tag("span", "nothing fits", class_="gain")))
    said = "; ".join(differences(change.choice, best)) or "the same split"
    return tag("li", tag("h3", change.what, tag("span", prose(f"{percent(change.gain)} faster"), class_="gain")),
               tag("p", prose(said)))  # fmt: skip


def differences(new: Choice, old: Choice) -> list[str]:
    """What two choices differ in: `tp 4 instead of 8`."""
    sides = [{**asdict(c.dims), **asdict(c.settings)} for c in (new, old)]
    found = [f"{name.replace('_', ' ')} {sides[0][name]} instead of {sides[1][name]}"
             for name in sides[0] if sides[0][name] != sides[1][name] and name not in DERIVED]  # fmt: skip
    return [*found, f"step {human_seconds(new.step_s)}, {human_bytes(new.peak_bytes)}"]


# the search -----------------------------------------------------------------------------------------------------------


def heat_map(found: Found) -> Html:
    """The best step time over tensor and pipeline parallel sizes, with its microbatch; a table, so that it is read."""
    cells: dict[tuple[int, int], Mapping[str, Any]] = {}
    for row in found.landscape:
        key = int(row.get("pp", 1)), int(row.get("tp", 1))
        if key not in cells or row["step_s"] < cells[key]["step_s"]:
            cells[key] = row
    stages, tensor = sorted({pp for pp, _ in cells}), sorted({tp for _, tp in cells})
    if len(cells) < 2:
        return Html()
    least, most = (of(row["step_s"] for row in cells.values()) for of in (min, max))
    head = tag("tr", tag("th", "", scope="col"), *(tag("th", f"tp {tp}", scope="col") for tp in tensor))
    body = []
    for pp in stages:
        name = tag("th", f"pp {pp}", scope="row", style="white-space:nowrap")
        body.append(tag("tr", name, *(_cell(cells.get((pp, tp)), least, most) for tp in tensor)))
    inner = tag("table", tag("caption", "Best step time by tp and pp"), tag("thead", head), tag("tbody", *body),
                class_="numbers")  # fmt: skip
    note = "The fastest candidate of each pair, with its microbatch (mb); stronger colour: nearer to the best."
    return tag("div", tag("h3", "Step time by tensor and pipeline parallel sizes"),
               tag("div", inner, class_="scroll whole", tabindex="0", role="region",
                   aria_label="Step time by tp and pp"),
               tag("p", note, class_="muted"), class_="card", style="margin-top:16px")  # fmt: skip


def _cell(row: Mapping[str, Any] | None, least: float, most: float) -> Html:
    if row is None:
        return tag("td", "–")
    worst = min(most, 2 * least)  # what takes twice as long is no choice, however long it takes
    share = HEATMAP_SHARE * max(0.0, (worst - row["step_s"]) / (worst - least)) if worst > least else HEATMAP_SHARE
    text = f"{human_seconds(row['step_s'])} · mb {row.get('microbatch', '?')}"
    colour = f"background:color-mix(in srgb, var(--accent) {share:.0f}%, transparent)"
    return tag("td", tag("b", text) if row["step_s"] == least else text, style=colour)


def alternatives(found: Found) -> Html:
    """What insisting on another value of one choice would cost."""
    ordered = sorted(found.alternatives, key=lambda a: (a.name, a.slower is None, a.slower or 0.0))
    rows = [[a.name, str(a.value), _slower(a)] for a in ordered]
    said = f"{found.num_candidates:,} candidates, {found.num_fitting:,} of which fit."
    if not rows:
        return tag("p", said, class_="muted")
    header = ["choice", "value", "step time over the plan's"]
    inner = html.details(f"What each other choice would cost ({len(rows)})",
                         html.table(Table(header, rows), caption="Other choices"))  # fmt: skip
    return tag("div", tag("p", said), inner, class_="card", style="margin-top:16px")


def _slower(alternative: Alternative) -> str:
    return "does not fit" if alternative.slower is None else f"+{percent(alternative.slower)}"


def scale_table(points: Sequence[ScalePoint]) -> Html:
    rows = [
        [f"{p.num_devices:,}", human_seconds(p.step_s), human_seconds(p.wall_s),
         "–" if p.usd is None else f"${human(p.usd)}", "–" if p.kwh is None else human(p.kwh * 1e3, "Wh"), p.split]
        for p in sorted(points, key=lambda p: p.num_devices)
    ]  # fmt: skip
    header = ["devices", "step", "time to finish", "cost", "energy", "split"]
    return tag("div", html.table(Table(header, rows), caption="By number of devices", whole=True), class_="card",
               style="margin-top:16px")  # fmt: skip


def everything(plan: PlanFile) -> Html:
    return tag("div", html.details("plan.toml", html.nested_table(asdict(plan))), class_="card")
