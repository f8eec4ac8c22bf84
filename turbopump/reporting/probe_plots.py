"""The plots of a machine's operations: rooflines, efficiency against size, gains of routes.

Each function returns figures, or None where nothing was measured to draw. A point is one operation by its fastest
route; what hangs below and above it is the rate from the 90th percentile to the fastest time. Huge profiles are drawn
in part, and the note says so; the table of the page holds every row.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from turbopump.core.units import human, human_seconds
from turbopump.hardware.profile import MachineProfile, Measurement
from turbopump.reporting.plots import Figure, Table, Trace, label, layout
from turbopump.reporting.probe_axes import (
    MAX_POINTS,
    MAX_TABLE_ROWS,
    colour,
    curve,
    dots,
    drawn,
    dtype_colour,
    hover,
    rate_axis,
    size_axis,
    span_of,
)
from turbopump.reporting.probe_rows import (
    FAMILIES,
    WORTH_CHANGING,
    Family,
    Gain,
    Peak,
    Setting,
    best_rates,
    dtype_order,
    error_words,
    family_of,
    gain_group,
    memory_roofs,
    of_best_route,
    op_words,
    rate_words,
    setting_of,
    usable,
)
from turbopump.reporting.series import sample_rows
from turbopump.reporting.words import percent


def rooflines(profile: MachineProfile, settings: Sequence[Setting]) -> list[Figure]:
    """A figure for each setting and dtype with a peak and rows below it, those with the most rows first."""
    best = best_rates(profile)
    found: list[Figure] = []
    by_place: dict[tuple[Setting, str], list[Measurement]] = defaultdict(list)
    for row in profile.rows:
        if row.domain == "compute" and row.flops > 0 and row.bytes > 0 and usable(row):
            by_place[setting_of(row), row.dtype].append(row)
    for setting in settings:
        for dtype in dtype_order(d for s, d in by_place if s == setting):
            if (setting, dtype) in best:
                found.append(roofline(profile, best[setting, dtype], by_place[setting, dtype], len(found)))
    return found


def roofline(profile: MachineProfile, peak: Peak, rows: list[Measurement], index: int) -> Figure:
    setting, dtype = peak.setting, peak.dtype
    top = peak.row.flops_per_s
    memory, caches = memory_roofs(profile, setting)
    fastest = of_best_route(rows)
    shown, note = drawn(fastest)
    chosen = {r.key for r in fastest}
    slower, _ = drawn([r for r in rows if r.key not in chosen])
    intensity = {r.key: r.flops / r.bytes for r in (*shown, *slower)}
    rate = {r.key: r.flops / r.seconds for r in (*shown, *slower)}
    low_x, high_x = span_of([*intensity.values(), *([top / memory / 6] if memory else [])], 1.8)
    low_y = min(span_of(list(rate.values()), 1.8)[0], top / 20)
    top_y = max(top, *rate.values())
    data = _roofs(top, memory, caches, low_x, high_x)
    if slower:
        data.append(dots([intensity[r.key] for r in slower], [rate[r.key] for r in slower], [hover(r) for r in slower],
                         name="slower routes", colour="--other", size=5, symbol="circle-open"))  # fmt: skip
    for family in FAMILIES:
        mine = [r for r in shown if family_of(r.kind) == family]
        if mine:
            data.append(dots([intensity[r.key] for r in mine], [rate[r.key] for r in mine],
                             [hover(r, f"{percent(rate[r.key] / top)} of the best") for r in mine],
                             name=family.name, colour=family.colour))  # fmt: skip
    notes = [_roof_note(high_x, top, human(top, "FLOP/s"), "right", "bottom")]
    if memory:
        at = max(low_x, 1.2 * low_y / memory)
        notes.append(_roof_note(at, memory * at, f" memory {human(memory, 'B/s')}", "left", "top"))
    where = "" if setting.device == "cpu" else f" on {setting.device}"
    return Figure(
        id=f"roofline-{index}",
        title=f"Roofline, {dtype or 'any dtype'}{where}",
        summary=f"{len(shown)} operations by FLOPs per byte and FLOP/s below the best rate of {human(top, 'FLOP/s')}"
        + (f" and the memory's {human(memory, 'B/s')}." if memory else "."),
        data=data,
        layout=layout(x="FLOPs per byte", y="FLOP/s", height=340, hovermode="closest", annotations=notes,
                      xaxis={**_plain_log(low_x, high_x)}, yaxis=rate_axis([low_y * 1.35, top_y * 1.2])),
        table=rows_table(shown, top),
        legend=True,
        note=" ".join(part for part in (note, _roof_words(memory, caches, setting), _above(top_y, top)) if part),
    )  # fmt: skip


def _plain_log(low: float, high: float) -> dict[str, Any]:
    return {**rate_axis([low * 1.35, high / 1.35]), "range": [math.log10(low), math.log10(high)]}


def _roofs(top: float, memory: float | None, caches: float | None, low: float, high: float) -> list[Trace]:
    """The lines nothing can pass: the best rate, and what the memory and the caches can feed."""

    def roof(speed: float, name: str, colour: str, dash: str, width: float) -> Trace:
        x = [low, *([top / speed] if low < top / speed < high else []), high]
        y = [min(top, speed * at) for at in x]
        return curve(x, y, [""] * len(x), name=name, colour=colour, dash=dash, width=width, markers=False)

    data = []
    if caches:
        data.append(roof(caches, "roof from caches", "--muted", "dot", 1.5))
    data.append(roof(memory, "roof from memory", "--measured", "solid", 2) if memory else
                roof(math.inf, "best rate", "--measured", "solid", 2))  # fmt: skip
    return data


def _roof_note(x: float, y: float, text: str, xanchor: str, yanchor: str) -> dict[str, Any]:
    return {"x": math.log10(x), "y": math.log10(y), "text": label(text), "showarrow": False, "xanchor": xanchor,
            "yanchor": yanchor, "font": {"size": 11, "color": "--muted"}}  # fmt: skip


def _roof_words(memory: float | None, caches: float | None, setting: Setting) -> str:
    text = f"{setting.words[0].upper()}{setting.words[1:]}."
    if caches:
        text += f" Points above the memory's roof found their data in the caches (up to {human(caches, 'B/s')})."
    elif memory is None:
        text += " The memory was not measured: probe --only memory."
    return text


def _above(highest: float, top: float) -> str:
    return "Points above the best rate do fewer FLOPs than are counted." if highest > top else ""


def rows_table(rows: list[Measurement], top: float | None = None) -> Table:
    ordered = sorted(rows, key=lambda r: -(r.flops or r.bytes) / r.seconds)
    picked = [ordered[i] for i in sample_rows(len(ordered), MAX_TABLE_ROWS)]
    header = ["operation", "dtype", "route", "median", "rate", *(["of the best"] if top else [])]
    return Table(header, [
        [op_words(r), r.dtype, r.route, human_seconds(r.seconds), rate_words(r),
         *([percent(r.flops / r.seconds / top)] if top else [])] for r in picked
    ])  # fmt: skip


def spec_roofline(profile: MachineProfile) -> Figure | None:
    """What a datasheet promises: the roof of each dtype of the first device that has any."""
    device = next((d for d in profile.devices if d.flops_per_s), None)
    if device is None:
        return None
    memory = device.memory_bytes_per_s
    tops = {d: device.flops_per_s[d] for d in dtype_order(device.flops_per_s) if device.flops_per_s[d] > 0}
    if not tops:
        return None
    ridges = [top / memory for top in tops.values()] if memory else [1.0, 100.0]
    low, high = min(ridges) / 30, max(ridges) * 6
    data, notes = [], []
    for number_, (dtype, top) in enumerate(tops.items()):
        x = [low, top / memory, high] if memory else [low, high]
        data.append(curve(x, [min(top, memory * at) if memory else top for at in x], [""] * len(x), name=dtype,
                          colour=dtype_colour(dtype, number_), markers=False))  # fmt: skip
        notes.append(_roof_note(high, top, f"{dtype} {human(top, 'FLOP/s')}", "right", "bottom"))
    lowest = min(low * memory if memory else top / 10 for top in tops.values())
    return Figure(
        id="roofline-spec", title="Rooflines of the datasheet", summary="What the datasheet promises of each dtype.",
        data=data, legend=True, wide=True,
        layout=layout(x="FLOPs per byte", y="FLOP/s", height=340, hovermode="closest", annotations=notes,
                      xaxis=_plain_log(low, high), yaxis=rate_axis([lowest, max(tops.values()) * 1.2])),
        table=Table(["dtype", "peak", "memory"], [[d, human(t, "FLOP/s"), human(memory, "B/s") if memory else "–"]
                                                  for d, t in tops.items()]),
        note=f"Source: {device.source or 'not named'}." + (f" Memory: {human(memory, 'B/s')}." if memory else ""),
    )  # fmt: skip


def efficiencies(profile: MachineProfile, settings: Sequence[Setting]) -> list[Figure]:
    """Share of the best rate against size, a figure a family; those without FLOPs by the memory's rate."""
    if not settings:
        return []
    setting, best = settings[0], best_rates(profile)
    rows = of_best_route(r for r in profile.rows if r.domain == "compute" and setting_of(r) == setting)
    found = []
    for family in FAMILIES:
        mine = [r for r in rows if family_of(r.kind) == family and r.flops > 0 and (setting, r.dtype) in best]
        figure = efficiency(family, mine, {d: p.row.flops_per_s for (s, d), p in best.items() if s == setting})
        found.append(figure)
    moving = [r for r in rows if r.flops == 0 and r.bytes > 0]
    found.append(moving_figure(moving, memory_roofs(profile, setting)[0]))
    return [figure for figure in found if figure is not None]


def efficiency(family: Family, rows: list[Measurement], tops: dict[str, float]) -> Figure | None:
    if not rows:
        return None
    shown, note = drawn(rows)
    data = []
    for index, dtype in enumerate(dtype_order(r.dtype for r in shown)):
        mine = [r for r in shown if r.dtype == dtype]
        share = [100 * r.flops / r.seconds / tops[dtype] for r in mine]
        data.append(dots(
            [r.flops for r in mine], share, [hover(r, f"{s:.3g} % of the best") for r, s in zip(mine, share)],
            name=dtype or "any dtype", colour=dtype_colour(dtype, index), size=6,
            low=[100 * r.flops / _p90(r) / tops[dtype] for r in mine],
            high=[100 * r.flops_per_s / tops[dtype] for r in mine],
        ))  # fmt: skip
    most = max(max(v for v in t["y"] if v is not None) for t in data)
    return Figure(
        id=f"efficiency-{family.id}",
        title=f"{family.name[0].upper()}{family.name[1:]}",
        summary=f"Share of the best rate by FLOPs of the operation, {len(shown)} operations; at most {most:.0f} %.",
        data=data,
        layout=layout(x="FLOPs of the operation", y="% of the best rate", height=290, hovermode="closest",
                      xaxis=rate_axis([r.flops for r in shown]), yaxis={"range": [0, max(105, 1.05 * most)]}),
        table=rows_table(shown),
        legend=True,
        note=note,
    )  # fmt: skip


def moving_figure(rows: list[Measurement], memory: float | None) -> Figure | None:
    """Operations that move bytes and count no FLOPs: bytes a second against bytes, with the memory's own rate."""
    if not rows:
        return None
    shown, note = drawn(rows)
    kinds = sorted({r.kind for r in shown}, key=lambda k: (-sum(r.kind == k for r in shown), k))
    data = []
    if memory:
        low, high = span_of([r.bytes for r in shown])
        data.append(curve([low, high], [memory, memory], ["", ""], name="memory", colour="--measured", width=1.5,
                          markers=False))  # fmt: skip
    for index, kind in enumerate(kinds):
        mine = [r for r in shown if r.kind == kind]
        data.append(dots([r.bytes for r in mine], [r.bytes / r.seconds for r in mine], [hover(r) for r in mine],
                         name=kind, colour=colour(index), size=6,
                         low=[r.bytes / _p90(r) for r in mine], high=[r.bytes_per_s for r in mine]))  # fmt: skip
    speeds = [r.bytes / r.seconds for r in shown] + ([memory] if memory else [])
    return Figure(
        id="efficiency-bytes",
        title="Bytes per second of what counts no FLOPs: norms, element-wise, look-ups, losses, updates",
        summary=f"Bytes a second by bytes moved of {len(shown)} operations that count no FLOPs.",
        data=data,
        layout=layout(x="bytes moved", y="", height=290, hovermode="closest",
                      xaxis=size_axis([r.bytes for r in shown]), yaxis=rate_axis(speeds, unit="B/s")),
        table=rows_table(shown),
        legend=True,
        note=note,
    )  # fmt: skip


def _p90(row: Measurement) -> float:
    return row.p90_s or row.seconds


def routes_figure(found: list[Gain]) -> Figure | None:
    """Dots of the gain of the fastest route over the default, an operation each, kinds by their median gain."""
    if not found:
        return None
    groups: dict[str, list[Gain]] = defaultdict(list)
    for gain in found:
        groups[gain_group(gain.best)].append(gain)
    names = sorted(groups, key=lambda g: float(np.median([x.ratio for x in groups[g]])))[-24:]
    ordered = sorted((g for name in names for g in groups[name]), key=lambda g: g.ratio)
    picked = [ordered[i] for i in sample_rows(len(ordered), MAX_POINTS)]
    wins: dict[str, float] = defaultdict(float)
    for gain in picked:
        if gain.ratio >= WORTH_CHANGING:
            wins[gain.best.route] += math.log(gain.ratio)
    routes = sorted(wins, key=lambda r: -wins[r])
    data = []
    same = [g for g in picked if g.ratio < WORTH_CHANGING]
    if same:
        data.append(_gain_dots(same, names, "default is as good", "--other"))
    for index, route in enumerate(routes[:5]):
        mine = [g for g in picked if g.ratio >= WORTH_CHANGING and g.best.route == route]
        data.append(_gain_dots(mine, names, route, colour(index)))
    others = [g for g in picked if g.ratio >= WORTH_CHANGING and g.best.route in routes[5:]]
    if others:
        data.append(_gain_dots(others, names, f"{len(routes) - 5} other routes", colour(5)))
    ratios = [g.ratio for g in picked]
    axis = {**rate_axis([0.95, *ratios], unit=""), "tickvals": (ticks := _ratio_ticks(max(ratios))),
            "ticktext": [f"×{t:g}" for t in ticks],
            "range": [math.log10(0.93), math.log10(max(1.3, 1.1 * max(ratios)))]}  # fmt: skip
    line = {"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper",
            "line": {"color": "--muted", "width": 1, "dash": "dot"}}  # fmt: skip
    return Figure(
        id="routes",
        title="Gain of the fastest route over the default",
        summary=f"{len(found)} operations; the fastest route takes 1/{max(ratios):.3g} of the default's time at best.",
        data=data,
        layout=layout(x="gain over the default route", y="", height=90 + 32 * len(names), hovermode="closest",
                      xaxis=axis, shapes=[line],
                      yaxis={"tickvals": list(range(len(names))), "ticktext": [_two_lines(n) for n in names],
                             "range": [-0.6, len(names) - 0.4], "zeroline": False}),
        table=gains_table(found),
        legend=True,
        wide=True,
        note="A dot is one operation; the colour is the route that wins: exact, and faster by more than the noise. "
        "Noisy rows do not compete."
        + (f" {len(picked):,} of {len(found):,} operations are drawn." if len(picked) < len(found) else ""),
    )  # fmt: skip


def _two_lines(name: str) -> str:
    """Long names over two lines: a phone has no room for them beside the dots."""
    words = name.split()
    if len(name) < 16 or len(words) < 3:
        return label(name)
    return label(words[0]) + "<br>" + label(" ".join(words[1:]))


def _gain_dots(gains: list[Gain], names: list[str], name: str, colour: str) -> Trace:
    # dots of one row are spread over its height by a fixed pattern, so that they do not cover each other
    y = [names.index(gain_group(g.best)) + 0.5 * ((0.618034 * i) % 1 - 0.5) for i, g in enumerate(gains)]
    texts = [
        f"{op_words(g.best)} {g.best.dtype} · ×{g.ratio:.3g} · {g.best.route} {human_seconds(g.best.seconds)}, "
        f"default {human_seconds(g.default.seconds)}"
        for g in gains
    ]
    return dots([g.ratio for g in gains], y, texts, name=name, colour=colour, size=8, opacity=0.75)


def _ratio_ticks(most: float) -> list[float]:
    ticks = [1, 1.2, 1.5, 2] if most < 2.5 else [1, 1.5, 2, 3, 5, 7] if most < 8 else [1, 2, 5, 10, 20, 50, 100, 1000]
    return [t for t in ticks if t <= 1.2 * most]


def gains_table(found: list[Gain], most: int = MAX_TABLE_ROWS) -> Table:
    return Table(
        ["operation", "dtype", "fastest route", "gain", "time", "default", "error"],
        [[op_words(g.best), g.best.dtype, g.best.route, f"×{g.ratio:.3g}", human_seconds(g.best.seconds),
          human_seconds(g.default.seconds), error_words(g.best.error)] for g in found[:most]],
    )  # fmt: skip
