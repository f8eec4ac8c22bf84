"""The page of a machine: what it can do, per operation, and which library does it best. Something to look at.

`write_page(profile, path)` writes one self-contained file in the style of a run's report. Every part stands alone: a
profile of one row, of one domain, or of a datasheet gives a page that says what was not measured and how to measure it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from turbopump.core.files import write_atomic
from turbopump.core.units import human, human_bytes, human_seconds
from turbopump.hardware.profile import Domain, MachineProfile, Measurement
from turbopump.reporting import html
from turbopump.reporting.html import Html, join, prose, tag
from turbopump.reporting.page import moment, page_footer, plots, tile
from turbopump.reporting.plots import Figure, Table
from turbopump.reporting.probe_axes import dtype_colour
from turbopump.reporting.probe_curves import borrowed_curves
from turbopump.reporting.probe_decisions import decisions
from turbopump.reporting.probe_plots import efficiencies, rooflines, routes_figure, spec_roofline
from turbopump.reporting.probe_rows import (
    DOMAIN_NAMES,
    WORTH_CHANGING,
    Gain,
    Peak,
    best_rates,
    dtype_order,
    error_words,
    gains,
    main_settings,
    memory_roofs,
    number,
    op_words,
    peaks,
    setting_of,
    timed,
    usable,
)
from turbopump.reporting.probe_table import all_rows
from turbopump.reporting.probe_transfer_plots import (
    collectives_rate,
    collectives_time,
    memory_figure,
    storage_bytes,
    storage_reads,
)
from turbopump.reporting.words import percent

NOISY_PROFILE = 0.25  # a larger share of noisy rows is said on top


def write_page(profile: MachineProfile, path: Path) -> None:
    """probe.html at `path`; raises `RunDirectoryError` where the disk does not take it."""
    write_atomic(path, probe_page(profile))


def probe_page(profile: MachineProfile) -> bytes:
    """The page as one HTML file."""
    found = gains(profile)
    figures = probe_figures(profile, found)
    main = tag("main", decisions(profile, found), *sections(profile, figures))
    body = join([page_header(profile, found), main, page_footer()])
    return html.document(f"{profile.name} · probe", body, figures.values())


def sections(profile: MachineProfile, figures: Mapping[str, Figure]) -> list[Html]:
    """The parts of the page; a profile that is none of measurements leaves out those that it cannot have."""
    roofs = [i for i in figures if i.startswith("roofline")]
    shares = [i for i in figures if i.startswith(("efficiency", "borrowed"))]
    parts = [
        html.section("Best rates", best_rates_card(profile), id_="peaks"),
        part("Rooflines", profile, "compute", figures, roofs),
        part("Efficiency against size", profile, "compute", figures, shares),
    ]
    if profile.provenance == "measured" or profile.rows:
        parts += [
            part("Routes", profile, "compute", figures, ["routes"], "No operation was measured by two routes."),
            part("Memory", profile, "memory", figures, ["memory"]),
            part("Collectives", profile, "comms", figures, ["collectives-time", "collectives-rate"]),
            part("Storage", profile, "data", figures, ["storage-reads", "storage-bytes"]),
            html.section("Small numbers", small_numbers(profile), id_="small"),
        ]
    return [*parts, html.section("Everything", everything(profile), id_="rows")]


def probe_figures(profile: MachineProfile, found: Sequence[Gain]) -> dict[str, Figure]:
    """All plots that there is data for, by id."""
    settings = main_settings(profile)
    measured: list[Figure | None] = [*rooflines(profile, settings)]
    candidates = [
        *(measured or [spec_roofline(profile)]),
        *efficiencies(profile, settings),
        *borrowed_curves(profile),
        routes_figure(list(found)),
        memory_figure(profile),
        collectives_time(profile),
        collectives_rate(profile),
        storage_reads(profile),
        storage_bytes(profile),
    ]
    return {figure.id: figure for figure in candidates if figure is not None}


def part(
    title: str, profile: MachineProfile, domain: Domain, figures: Mapping[str, Figure], ids: Sequence[str],
    otherwise: str = "",
) -> Html:  # fmt: skip
    """A section of plots, or why it has none."""
    shown = [i for i in ids if i in figures]
    content = plots(figures, *shown) if shown else not_measured(profile, domain, otherwise)
    return html.section(title, content, id_=title.split()[0].lower())


def not_measured(profile: MachineProfile, domain: Domain, otherwise: str = "") -> Html:
    rows = [r for r in profile.rows if r.domain == domain]
    broken = next((r.problem for r in rows if r.problem), "")
    if not rows:
        again = tag("code", f"turbopump probe --only {domain}")
        text = tag("p", f"{domain} ({DOMAIN_NAMES[domain]}) was not measured: ", again, class_="muted")
    elif broken and not any(usable(r) for r in rows):
        text = tag("p", f"Nothing of {domain} could be measured: {broken}", class_="muted")
    else:
        text = tag("p", otherwise or f"No row of {domain} can be drawn here.", class_="muted")
    return tag("div", text, class_="card")


# head -----------------------------------------------------------------------------------------------------------------


def page_header(profile: MachineProfile, found: Sequence[Gain]) -> Html:
    notes = notes_of(profile)
    return tag(
        "header",
        tag("h1", profile.name),
        tag("p", status_text(profile), class_="status"),
        tag("p", prose(headline(profile, found)), class_="headline"),
        tag("dl", *(tile(*t) for t in tiles(profile)), class_="tiles four"),
        tag("aside", tag("ul", *(tag("li", n) for n in notes)), class_="notes", aria_label="Notes")
        if notes
        else Html(),
    )


def status_text(profile: MachineProfile) -> str:
    cores, memory = number(profile.machine, "num_cores"), number(profile.machine, "memory_bytes")
    made = "measured" if profile.provenance == "measured" else f"from a {profile.provenance}, written"
    telling = [name for name in profile.software if name not in ("python", "turbopump")]
    software = [f"{name} {profile.software[name]}" for name in telling[:3]]
    size = human_bytes(memory) if memory else ""
    parts = [f"{made} {moment(profile.date)}", f"{cores:.0f} cores" if cores else "", size, *software]
    return " · ".join(p for p in parts if p)


def headline(profile: MachineProfile, found: Sequence[Gain]) -> str:
    best = _best_by_dtype(profile)
    if not best:
        spec = next((d for d in profile.devices if d.flops_per_s), None)
        if spec is None:
            return "The rates of this machine's products were not measured."
        dtype, top = max(spec.flops_per_s.items(), key=lambda item: item[1])
        relative = spec.relative or next((c.relative for c in profile.curves), "")
        borrowed = f"; how near it comes is borrowed from {relative}" if relative else ""
        return f"On paper {human(top, 'FLOP/s')} in {dtype}{borrowed}."
    said = ", ".join(f"{human(p.row.flops_per_s, 'FLOP/s')} in {d or 'any dtype'}" for d, p in list(best.items())[:3])
    memory = memory_roofs(profile, next(iter(best.values())).setting)[0]
    text = f"Reaches {said}" + (f", and moves {human(memory, 'B/s')} of memory." if memory else ".")
    better = [g for g in found if g.ratio >= WORTH_CHANGING]
    if better:
        median = float(np.median([g.ratio for g in better]))
        text += (
            f" For {len(better):,} of {len(found):,} operations another route than the default is faster, "
            f"{median:.2g} times in the median."
        )
    return text


def _best_by_dtype(profile: MachineProfile) -> dict[str, Peak]:
    """The best rate of each dtype over all settings, the widest dtype first."""
    best: dict[str, Peak] = {}
    for (_, dtype), peak in best_rates(profile).items():
        if dtype not in best or peak.row.flops_per_s > best[dtype].row.flops_per_s:
            best[dtype] = peak
    return {d: best[d] for d in dtype_order(best)}


def tiles(profile: MachineProfile) -> list[tuple[str, str, str]]:
    shown: list[tuple[str, str, str]] = []
    best = _best_by_dtype(profile)
    for dtype, peak in list(best.items())[:3]:
        shown.append((f"{dtype or 'best'} peak", human(peak.row.flops_per_s, "FLOP/s"), peak.route))
    if not best:
        for device in profile.devices[:1]:
            for dtype in dtype_order(device.flops_per_s)[:4]:
                shown.append((f"{dtype} peak", human(device.flops_per_s[dtype], "FLOP/s"), device.provenance))
    settings = main_settings(profile)
    from_rows = [memory_roofs(profile, s) for s in settings[:1]] or _memory_alone(profile)
    for memory, caches in from_rows:
        if memory:
            more = f"caches up to {human(caches, 'B/s')}" if caches else ""
            shown.append(("memory", human(memory, "B/s"), more))
    for name, kind, value, words in _EXTREMES:
        rows = [r for r in profile.rows if r.kind == kind and usable(r) and value(r) > 0]
        if rows:
            top = max(rows, key=value)
            shown.append((name, words(value(top)), op_words(top).removeprefix(kind).strip()))
    return shown[:8]


def _memory_alone(profile: MachineProfile) -> list[tuple[float | None, float | None]]:
    row = next((r for r in profile.rows if r.domain == "memory" and usable(r)), None)
    known = next((d.memory_bytes_per_s for d in profile.devices if d.memory_bytes_per_s), None)
    return [memory_roofs(profile, setting_of(row))] if row else [(known, None)]


_EXTREMES: tuple[tuple[str, str, Callable[[Measurement], float], Callable[[float], str]], ...] = (
    ("all-reduce", "AllReduce", lambda r: r.bytes / r.seconds, lambda v: human(v, "B/s")),
    ("random reads", "RandomRead", lambda r: 0.0 if r.op.get("cached") else 1 / r.seconds,
     lambda v: f"{human(v)}/s"),
    ("checkpoint write", "CheckpointWrite", lambda r: r.bytes / r.seconds, lambda v: human(v, "B/s")),
)  # fmt: skip


def notes_of(profile: MachineProfile) -> list[str]:
    notes = []
    if profile.provenance != "measured":
        relative = next((d.relative for d in profile.devices if d.relative), "")
        borrowed = f" Efficiency curves are borrowed from {relative}." if relative and profile.curves else ""
        notes.append(f"Nothing here was measured on this machine: rates are those of a {profile.provenance}.{borrowed}")
    elif not any(timed(r) for r in profile.rows):
        notes.append("No operation of this machine was measured: `turbopump probe` measures them.")
    rows = [r for r in profile.rows if usable(r)]
    noisy = sum(r.noisy for r in rows) / len(rows) if rows else 0.0
    if noisy > NOISY_PROFILE:
        notes.append(f"{percent(noisy)} of the rows are noisy: other work ran here. Probe again when it is quiet.")
    missing = [d for d in get_args(Domain) if not any(r.domain == d for r in profile.rows)]
    if profile.provenance == "measured" and missing and len(missing) < len(get_args(Domain)):
        names = ", ".join(f"{d} ({DOMAIN_NAMES[d]})" for d in missing)
        verb = "was" if len(missing) == 1 else "were"
        notes.append(f"{names} {verb} not measured: turbopump probe --only {','.join(missing)}")
    return notes


# best rates -----------------------------------------------------------------------------------------------------------


def best_rates_card(profile: MachineProfile) -> Html:
    """Bars of the fastest product by each route, with its error: no script needed."""
    found = peaks(profile)
    if not found:
        return _paper_rates(profile)
    top = max(p.row.flops_per_s for p in found)
    places = list(dict.fromkeys(p.setting for p in found))
    dtypes = dtype_order(p.dtype for p in found)
    blocks = []
    for place in places:
        for index, dtype in enumerate(dtypes):
            mine = [p for p in found if (p.setting, p.dtype) == (place, dtype)]
            if mine:
                where = f" · {place.words}" if len(places) > 1 else ""
                bars = [_peak_bar(p, top, dtype_colour(dtype, index)) for p in mine[:8]]
                blocks.append(tag("div", tag("h3", f"{dtype or 'any dtype'}{where}"), *bars, class_="peak-group"))
    note = "The fastest product by each route, and what is faster still. Error: relative difference from fp64."
    return tag("div", tag("div", *blocks, class_="peaks"), tag("p", note, class_="muted"), class_="card")


def _peak_bar(peak: Peak, top: float, colour: str) -> Html:
    width = f"{100 * peak.row.flops_per_s / top:.2f}%"
    error = f"error {error_words(peak.row.error)}" if peak.row.error is not None else ""
    share = f"{percent(peak.row.peak_share)} of the theoretical peak" if peak.row.peak_share else ""
    said = [peak.problem] if peak.problem else [op_words(peak.row), error, share]
    return _bar(peak.route, human(peak.row.flops_per_s, "FLOP/s"), " · ".join(s for s in said if s), width, colour,
                void=bool(peak.problem))  # fmt: skip


def _bar(name: str, value: str, said: str, width: str, colour: str, *, void: bool = False) -> Html:
    return tag(
        "div",
        tag("div", tag("code", name), tag("b", value), class_="peak-head"),
        tag("div", tag("span", style=f"width:{width};--bar:var({colour})"), class_="track void" if void else "track"),
        tag("small", prose(said)) if said else Html(),
        class_="peak",
    )


def _paper_rates(profile: MachineProfile) -> Html:
    device = next((d for d in profile.devices if d.flops_per_s), None)
    if device is None:
        return not_measured(profile, "compute", "No product was measured.")
    top = max(device.flops_per_s.values()) or 1.0
    bars = [
        tag("div", _bar(dtype, human(device.flops_per_s[dtype], "FLOP/s"), "",
                        f"{100 * device.flops_per_s[dtype] / top:.2f}%", dtype_colour(dtype, index)))
        for index, dtype in enumerate(dtype_order(device.flops_per_s))
    ]  # fmt: skip
    note = f"Not measured: {device.provenance} of {device.name}. {device.source} {device.note}".strip()
    return tag("div", tag("div", *bars, class_="peaks"),
               tag("p", note, class_="muted"), class_="card")  # fmt: skip


# the rest -------------------------------------------------------------------------------------------------------------


def small_numbers(profile: MachineProfile) -> Html:
    """Launch costs, slowdowns under communication, checkpoints: a tile each."""
    shown: list[tuple[str, str, str]] = []
    for row in profile.rows:
        if row.kind == "Launch" and usable(row):
            where = "" if row.device == "cpu" else row.device
            shown.append((f"launch: {row.op.get('name', '')}", human_seconds(row.seconds), where))
        for name, of in (("slowdown_compute", "compute"), ("slowdown_comm", "communication")):
            value = number(row.facts, name)
            if value is not None:
                size = number(row.op, "bytes")
                beside = f"beside {human_bytes(size)} by {row.route}" if size else f"by {row.route}"
                shown.append((f"{of} when both run", f"×{value:.3g}", f"of its time alone, {beside}"))
        if row.kind.startswith("Checkpoint") and usable(row):
            said = f"{human_seconds(row.seconds)}, {row.route}"
            shown.append((f"{op_words(row)}", human(row.bytes / row.seconds, "B/s"), said))
    if not shown:
        return not_measured(profile, "host", "No launch cost and no overlap was measured.")
    return tag("dl", *(tile(*t) for t in shown[:24]), class_="tiles four", style="margin-top:0")


def everything(profile: MachineProfile) -> Html:
    parts = [html.details(f"All rows ({len(profile.rows):,})", all_rows(profile.rows))] if profile.rows else []
    if profile.curves:
        rows = [[c.kind, c.dtype, c.relative, c.source, percent(c.error) if c.error is not None else "–",
                 ", ".join(f"{k} {v:.4g}" for k, v in c.parameters.items())] for c in profile.curves]  # fmt: skip
        header = ["operation", "dtype", "measured on", "source", "median error", "parameters"]
        content = html.table(Table(header, rows), kind="records", caption="Borrowed efficiency curves")
        parts.append(html.details(f"Borrowed efficiency curves ({len(rows)})", content))
    facts: dict[str, Any] = {
        "fingerprint": profile.fingerprint, "written by": profile.written_by, **profile.machine,
        "software": dict(profile.software), "asked": dict(profile.request), "quality": dict(profile.quality),
    }  # fmt: skip
    parts.append(html.details("Machine, software and what was asked", html.nested_table(facts)))
    return tag("div", *parts, class_="card")
