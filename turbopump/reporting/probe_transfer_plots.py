"""The plots of what moves bytes: memory by working set, collectives by message, storage by block size.

Each function returns a `Figure`, or None where nothing was measured to draw.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from turbopump.core.units import human, human_seconds
from turbopump.hardware.profile import MachineProfile, Measurement
from turbopump.reporting.plots import Figure, Table, Trace, label, layout
from turbopump.reporting.probe_axes import colour, curve, rate_axis, seconds_axis, size_axis, span_of
from turbopump.reporting.probe_rows import DEFAULT, Setting, number, setting_of, size_words, timed, usable

DASHES = ("solid", "dash", "dot", "dashdot")


def memory_figure(profile: MachineProfile) -> Figure | None:
    """Bytes a second against the working set: copy, triad, and rows gathered from a table."""
    rows = [r for r in profile.rows if r.domain == "memory" and usable(r) and r.bytes > 0]
    groups: dict[tuple[str, Setting], list[tuple[float, Measurement]]] = defaultdict(list)
    several = len({setting_of(r) for r in rows}) > 1
    for row in rows:
        groups[_memory_name(row), setting_of(row)].append((_working_set(row), row))
    if not groups:
        return None
    data = []
    ordered = sorted(groups, key=lambda g: (g[0].startswith("Gather"), g))[:16]
    colours = {name: colour(i) for i, name in enumerate(dict.fromkeys(n for n, _ in ordered))}
    dashes = {s: DASHES[i % 4] for i, s in enumerate(dict.fromkeys(s for _, s in ordered))}
    for name, setting in ordered:
        points = groups[name, setting]
        data.append(curve([s for s, _ in points], [r.bytes / r.seconds for _, r in points],
                          [f"{name} · {size_words(s)} · {human(r.bytes / r.seconds, 'B/s')}" for s, r in points],
                          name=f"{name}, {setting.words}" if several else name, colour=colours[name],
                          dash=dashes[setting]))  # fmt: skip
    sizes = [s for points in groups.values() for s, _ in points]
    shapes, notes = _cache_marks(profile, *span_of(sizes))
    return Figure(
        id="memory",
        title="Memory: bytes per second by working set",
        summary=f"Copy, triad and random gather over {size_words(min(sizes))} to {size_words(max(sizes))}.",
        data=data,
        layout=layout(x="working set", y="", height=340, hovermode="closest", xaxis=size_axis(sizes),
                      yaxis=rate_axis([r.bytes / r.seconds for r in rows], unit="B/s"), shapes=shapes,
                      annotations=notes, margin={"l": 48, "r": 10, "t": 24 if notes else 8, "b": 40}),
        table=Table(["kind", "working set", "rate", "median"],
                    [[n, size_words(s), human(r.bytes / r.seconds, "B/s"), human_seconds(r.seconds)]
                     for (n, _), points in groups.items() for s, r in points]),
        legend=True,
        wide=True,
    )  # fmt: skip


def _memory_name(row: Measurement) -> str:
    if row.kind == "Gather":
        size = number(row.op, "row_bytes")
        return f"Gather of {size_words(size)} rows" if size else "Gather"
    name = row.kind.removeprefix("Memory").lower() or row.kind
    return name if row.route == DEFAULT else f"{name} by {row.route}"


def _working_set(row: Measurement) -> float:
    """Bytes that take part, over and over: of a gather the table, of a copy or triad all that is read and written."""
    rows, size = number(row.op, "table_rows"), number(row.op, "row_bytes")
    return rows * size if rows and size else row.bytes


def _cache_marks(profile: MachineProfile, low: float, high: float) -> tuple[list[Any], list[Any]]:
    """Lines at the sizes of the caches, where the machine file knows them."""
    known = profile.machine.get("cache_bytes")
    shapes, notes = [], []
    for name, size in known.items() if isinstance(known, dict) else ():
        if isinstance(size, (int, float)) and low < size < high:
            shapes.append({"type": "line", "x0": size, "x1": size, "y0": 0, "y1": 1, "yref": "paper",
                           "line": {"color": "--muted", "width": 1, "dash": "dot"}})  # fmt: skip
            notes.append({"x": math.log10(size), "y": 1, "yref": "paper", "yanchor": "bottom", "showarrow": False,
                          "text": label(f"{name} {size_words(size)}"),
                          "font": {"size": 11, "color": "--muted"}})  # fmt: skip
    return shapes, notes


def collectives_time(profile: MachineProfile) -> Figure | None:
    """Time of a collective against its bytes."""
    rows = _collectives(profile)
    barriers = [r for r in profile.rows if r.kind == "Barrier" and usable(r)]
    note = ""
    if barriers:
        said = ", ".join(f"{int(number(r.op, 'ranks') or 0)} ranks {human_seconds(r.seconds)} ({r.route})"
                         for r in sorted(barriers, key=lambda r: r.seconds)[:4])  # fmt: skip
        note = f"A barrier: {said}."
    absent = {r.route: r.problem for r in profile.rows if r.domain == "comms" and r.problem and not timed(r)}
    note = " ".join([note, *(f"{route}: {problem}." for route, problem in list(absent.items())[:3])]).strip()
    return _collective_figure(rows, "collectives-time", "Collectives: time", lambda r: r.seconds, human_seconds,
                              "time", seconds_axis([r.seconds for r in rows]), note)  # fmt: skip


def collectives_rate(profile: MachineProfile) -> Figure | None:
    """Bus bandwidth (bytes that each rank must send, over the time: nccl-tests' doc/PERFORMANCE.md) against bytes."""
    rows = [r for r in _collectives(profile) if r.bytes > 0]
    return _collective_figure(
        rows, "collectives-rate", "Collectives: bus bandwidth", lambda r: r.bytes / r.seconds,
        lambda v: human(v, "B/s"), "bytes per second", rate_axis([r.bytes / r.seconds for r in rows], unit="B/s"),
        "Bytes that each rank must send at least, over the time: comparable with the link's rate for any number of "
        "ranks.",
    )  # fmt: skip


def _collectives(profile: MachineProfile) -> list[Measurement]:
    return [r for r in profile.rows if r.domain == "comms" and r.kind not in ("Barrier", "Overlap") and usable(r)
            and number(r.op, "bytes")]  # fmt: skip


def _collective_figure(
    rows: list[Measurement], id_: str, title: str, value: Callable[[Measurement], float],
    words: Callable[[float], str], y: str, yaxis: dict[str, Any], note: str,
) -> Figure | None:  # fmt: skip
    if not rows:
        return None
    places = sorted({_place(r) for r in rows}, key=lambda p: (-sum(_place(r) == p for r in rows), p))
    kinds = list(
        dict.fromkeys(r.kind for r in sorted(rows, key=lambda r: KINDS.index(r.kind) if r.kind in KINDS else 9))
    )
    common = [part for part in places[0] if all(part in place for place in places)]
    data = []
    for number_, place in enumerate(places):
        for index, kind in enumerate(kinds):
            mine = [r for r in rows if r.kind == kind and _place(r) == place]
            if not mine:
                continue
            name = ", ".join([kind, *(part for part in place if part not in common)])
            sizes = [number(r.op, "bytes") or 0.0 for r in mine]
            texts = [f"{kind} · {size_words(s)} · {', '.join(place)} · {words(value(r))}" for s, r in zip(sizes, mine)]
            data.append(curve(sizes, [value(r) for r in mine], texts, name=name, colour=colour(index),
                              dash=DASHES[number_ % len(DASHES)]))  # fmt: skip
    where = f" ({', '.join(common)})" if common else ""
    sizes = [number(r.op, "bytes") or 0.0 for r in rows]
    ordered = sorted(rows, key=lambda r: (r.kind, _place(r), number(r.op, "bytes") or 0.0))
    return Figure(
        id=id_, title=title + where, data=data[:24], legend=True, note=note,
        summary=f"{y} by bytes of {', '.join(kinds)}.",
        layout=layout(x="bytes", y="", height=330, hovermode="closest", xaxis=size_axis(sizes), yaxis=yaxis),
        table=Table(["collective", "bytes", "where", y],
                    [[r.kind, size_words(number(r.op, "bytes") or 0.0), ", ".join(_place(r)), words(value(r))]
                     for r in ordered]),
    )  # fmt: skip


KINDS = ("AllReduce", "AllGather", "ReduceScatter", "Broadcast", "AllToAll", "Send")


def _place(row: Measurement) -> tuple[str, ...]:
    """Ranks, level and route of a collective, in words."""
    ranks = number(row.op, "ranks")
    parts = [f"{ranks:.0f} ranks" if ranks else "", str(row.op.get("level", "")).replace("node", ""), row.route,
             row.device if row.device != "cpu" else ""]  # fmt: skip
    return tuple(p for p in parts if p)


def storage_reads(profile: MachineProfile) -> Figure | None:
    """Random reads a second against their size."""
    rows = [r for r in _reads(profile) if r.kind == "RandomRead"]
    return _storage_figure(rows, "storage-reads", "Storage: random reads per second", lambda r: 1 / r.seconds, "")


def storage_bytes(profile: MachineProfile) -> Figure | None:
    """Bytes a second of random and sequential reads against the size of a read."""
    rows = _reads(profile)
    return _storage_figure(rows, "storage-bytes", "Storage: bytes per second", lambda r: _block(r) / r.seconds, "B/s")


def _reads(profile: MachineProfile) -> list[Measurement]:
    return [r for r in profile.rows if r.domain == "data" and r.kind.endswith("Read") and "Checkpoint" not in r.kind
            and usable(r) and _block(r) > 0]  # fmt: skip


def _block(row: Measurement) -> float:
    return number(row.op, "bytes", "bytes_per_read", "bytes_per_write") or row.bytes


def _storage_figure(
    rows: list[Measurement], id_: str, title: str, value: Callable[[Measurement], float], unit: str
) -> Figure | None:
    """A curve for each depth (colour), cold or cached (line); each point is of the engine that is fastest there."""
    if not rows:
        return None
    best: dict[tuple[bool, bool, int], dict[float, Measurement]] = defaultdict(dict)
    for row in sorted(rows, key=lambda r: -r.seconds):  # so that the fastest engine stays
        key = (row.kind != "RandomRead", bool(row.op.get("cached")), _depth(row))
        best[key][_block(row)] = row
    depths = sorted({depth for _, _, depth in best})
    data: list[Trace] = []
    for (sequential, cached, depth), by_block in sorted(best.items()):
        what = f"{'sequential' if sequential else 'depth'} {depth}"
        name = f"{what}, {'cached' if cached else 'cold'}"
        mine = [by_block[block] for block in sorted(by_block)]
        texts = [f"{size_words(_block(r))} · {name} · {r.route} · {human(value(r), unit or 'reads/s')}" for r in mine]
        shade = "--measured" if sequential else colour(depths.index(depth))
        data.append(curve([_block(r) for r in mine], [value(r) for r in mine], texts, name=name, colour=shade,
                          dash="dot" if cached else "solid", width=1.5 if cached else 2.5))  # fmt: skip
    shown = [row for group in best.values() for row in group.values()]
    wins = Counter(row.route for row in shown).most_common()
    engines = ", ".join(f"{name} ({count} of {len(shown)})" for name, count in wins)
    return Figure(
        id=id_, title=title, data=data[:24], legend=True,
        summary=f"{title} by bytes of a read, {len(best)} curves of depth and cache.",
        layout=layout(x="bytes of a read", y="", height=330, hovermode="closest",
                      xaxis=size_axis([_block(r) for r in shown]),
                      yaxis=rate_axis([value(r) for r in shown], unit=unit)),
        table=_storage_table(rows, lambda r: human(value(r), unit or "reads/s")),
        note=f"Each point by its fastest engine: {engines}. Dotted: from the page cache.",
    )  # fmt: skip


def _storage_table(rows: list[Measurement], words: Callable[[Measurement], str]) -> Table:
    """Every read by every engine."""
    ordered = sorted(rows, key=lambda r: (r.kind, not r.op.get("cached"), _depth(r), _block(r)))
    return Table(
        ["read, depth", "cache", "engine", "size", "rate", "time of a read"],
        [[f"{r.kind}, {_depth(r)}", "cached" if r.op.get("cached") else "cold", r.route, size_words(_block(r)),
          words(r), human_seconds(r.seconds)] for r in ordered],
    )  # fmt: skip


def _depth(row: Measurement) -> int:
    return int(number(row.op, "depth") or 1)
