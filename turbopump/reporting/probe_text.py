"""A machine profile in a screen of the terminal: peaks, memory, storage, collectives, and how far to trust them.

Never wider than 100 columns and, for one device, no longer than 24 lines; all rows are on the page and in
machine.json.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from turbopump.core.units import human, human_bytes, human_seconds, printable
from turbopump.hardware.profile import MachineProfile, Measurement
from turbopump.hardware.specs import LinkSpec, StorageSpec
from turbopump.reporting.probe_rows import (
    DEFAULT,
    best_rates,
    dtype_order,
    main_settings,
    memory_roofs,
    peaks,
    setting_of,
    usable,
)

WIDEST = 100
INDENT = 13
MOST_LINES = 3  # of a list that can be long: what was left out, what is uncertain
MOST_LINKS = 3
TRANSFERS = {"SequentialRead": "read", "SequentialWrite": "write", "RandomRead": "random reads",
             "CheckpointWrite": "checkpoint write", "CheckpointRead": "checkpoint read"}  # fmt: skip


def summary(profile: MachineProfile, columns: int = 80) -> str:
    """The profile as lines of at most `columns` (40 to 100) characters."""
    width = max(40, min(columns, WIDEST))
    sections: list[tuple[str, Iterable[str]]] = [
        ("products", _products(profile)),
        ("memory", _memory(profile)),
        ("storage", map(_storage, profile.storage) if profile.storage else _reads(profile)),
        ("collectives", _links(profile.links)),
        ("launch", _launch(profile)),
        ("quality", _quality(profile)),
        ("left out", short_list(profile.left_out)),
        ("uncertain", short_list(profile.uncertain)),
    ]
    lines = [textwrap.fill(printable(_title(profile)), width)]
    for name, items in sections:
        lines += listed(name, items, width)
    return "\n".join(lines)


def listed(name: str, items: Iterable[str], columns: int) -> list[str]:
    """Items below each other, `name` before the first, each wrapped to `columns`."""
    width = max(40, min(columns, WIDEST))
    return [_wrapped(name if number == 0 else "", item, width) for number, item in enumerate(items)]


def short_list(items: Sequence[str]) -> list[str]:
    """The first few, and how many there are besides."""
    if len(items) <= MOST_LINES + 1:
        return list(items)
    return [*items[:MOST_LINES], f"... and {len(items) - MOST_LINES} more (in the file)"]


def _wrapped(name: str, item: str, width: int) -> str:
    return textwrap.fill(printable(item), width, initial_indent=f"{name:<{INDENT}}", subsequent_indent=" " * INDENT,
                         break_on_hyphens=False)  # fmt: skip


def _title(profile: MachineProfile) -> str:
    cores, memory = profile.machine.get("num_cores"), profile.machine.get("memory_bytes")
    facts = [f"{cores} core{'s' * (cores != 1)}" if isinstance(cores, int) else "",
             human_bytes(memory) if isinstance(memory, (int, float)) else "",
             *(f"{name} {version}" for name, version in profile.software.items() if name == "torch")]  # fmt: skip
    working = sum(row.works for row in profile.rows)
    return f"{profile.name} ({', '.join(filter(None, facts))}): {working:,} rows of {profile.date[:10]}"


def _products(profile: MachineProfile) -> Iterable[str]:
    """Per dtype the best rate and its route, beside that of the default."""
    best, every = best_rates(profile), peaks(profile)
    for setting in main_settings(profile):
        for dtype in dtype_order(d for s, d in best if s == setting):
            peak = best[setting, dtype]
            line = f"{dtype:<5}{human(peak.row.flops_per_s, 'FLOP/s'):>12}"
            if peak.row.peak_share:
                line += f"  {peak.row.peak_share:4.0%} of peak"
            line += f"  {setting.words}"
            if peak.route != DEFAULT:
                line += f", {peak.route}"
                default = next((p for p in every if (p.setting, p.dtype, p.route) == (setting, dtype, DEFAULT)), None)
                if default is not None and not default.problem:
                    line += f" (default {human(default.row.flops_per_s, 'FLOP/s')})"
            yield line


def _memory(profile: MachineProfile) -> Iterable[str]:
    settings = main_settings(profile)
    if not settings:  # only memory was asked for
        settings = list(dict.fromkeys(setting_of(row) for row in profile.rows if row.domain == "memory"))
    for setting in settings:
        memory, caches = memory_roofs(profile, setting)
        rates = [human(memory, "B/s")] if memory else []
        rates += [f"caches {human(caches, 'B/s')}"] if caches else []
        if rates:
            yield f"{', '.join(rates)}, {setting.words}"


def _storage(spec: StorageSpec) -> str:
    return (f"read {human(spec.read_bytes_per_s, 'B/s')}, write {human(spec.write_bytes_per_s, 'B/s')}, "
            f"{human(spec.random_reads_per_s)} reads/s of 4 KiB, latency {human_seconds(spec.latency_s)}")  # fmt: skip


def _reads(profile: MachineProfile) -> Iterable[str]:
    """The best of each kind, where not enough was measured for a StorageSpec."""
    best: dict[str, Measurement] = {}
    for row in profile.rows:
        read = row.domain == "data" and usable(row) and row.bytes and not row.op.get("cached")
        if read and (row.kind not in best or row.bytes_per_s > best[row.kind].bytes_per_s):
            best[row.kind] = row
    if best:
        yield ", ".join(f"{TRANSFERS.get(kind, kind)} {human(row.bytes_per_s, 'B/s')}" for kind, row in best.items())


def _links(links: Sequence[LinkSpec]) -> Iterable[str]:
    for link in links[:MOST_LINKS]:
        yield f"{link.name}: latency {human_seconds(link.latency_s)}, {human(link.bytes_per_s, 'B/s')} ({link.level})"
    if len(links) > MOST_LINKS:
        yield f"... and {len(links) - MOST_LINKS} more (in the file)"


def _launch(profile: MachineProfile) -> Iterable[str]:
    """The shortest call, and what computing loses to communication beside it."""
    calls = [row for row in profile.rows if row.domain == "host" and usable(row) and row.kind != "Overlap"]
    slowed = [row.facts["slowdown_compute"] for row in profile.rows if "slowdown_compute" in row.facts and row.works]
    parts = []
    if calls:
        least, most = min(r.seconds for r in calls), max(r.seconds for r in calls)
        parts.append(f"{human_seconds(least)} to {human_seconds(most)} a call" if len(calls) > 1 else
                     f"{human_seconds(least)} a call")  # fmt: skip
    if slowed:
        parts.append(f"products take {max(map(float, slowed)):.2f} times as long beside an all-reduce")
    if parts:
        yield "; ".join(parts)


def _quality(profile: MachineProfile) -> Iterable[str]:
    if not profile.quality:
        return
    noisy = sum(row.noisy for row in profile.rows)
    failed = sum(not row.works for row in profile.rows)
    spread, waited = profile.quality["spread"], profile.quality["waited"]
    more = f", {failed} could not be measured" if failed else ""
    yield f"spread {spread:.1%}, waited {waited:.1%} (medians), {noisy} of {len(profile.rows)} rows noisy{more}"
