"""Whether the figures of a machine profile can be: what `inspect --verify` checks beyond the schema.

A row that was measured has positive, finite times in order (fastest, median, 90th percentile); one that was not says
why. Rates and shares lie where such things lie. It says nothing about whether a figure is right.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from datetime import datetime

from turbopump.hardware.profile import MachineProfile, Measurement


def oddities(profile: MachineProfile) -> list[str]:
    """What cannot be in `profile`, a line each; empty where all is sane."""
    found = [f"row {number} ({row.key}): {what}" for number, row in enumerate(profile.rows) for what in _of_row(row)]
    counts = Counter(row.key for row in profile.rows)
    found += [f"{key}: {count} rows, there can be one" for key, count in counts.items() if count > 1]
    return [*found, *_of_specs(profile), *_of_whole(profile)]


def _of_row(row: Measurement) -> Iterator[str]:
    times = {"min_s": row.min_s, "median_s": row.median_s, "p90_s": row.p90_s}
    given = {name: value for name, value in times.items() if value is not None}
    if not given and not row.problem:
        yield "has neither times nor a problem"
    if given and len(given) < len(times):
        yield f"has {', '.join(given)} only, not {', '.join(n for n in times if n not in given)}"
    wall = {"wall_s": row.wall_s, "flushed_s": row.flushed_s}
    bad = {n: v for n, v in (*given.items(), *wall.items()) if v is not None and not (math.isfinite(v) and v > 0)}
    for name, value in bad.items():
        yield f"{name} is {value:g}, which is no positive time"
    if len(given) == len(times) and not bad and not given["min_s"] <= given["median_s"] <= given["p90_s"]:
        yield "min_s <= median_s <= p90_s does not hold"
    if given and (row.runs < 1 or row.calls < 1):
        yield f"has times of {row.runs} runs of {row.calls} calls"
    for name, amount in (("flops", row.flops), ("bytes", row.bytes), ("error", row.error or 0.0)):
        if not (math.isfinite(amount) and amount >= 0):
            yield f"{name} is {amount:g}"
    if not 0 <= row.waited <= 1:
        yield f"waited is {row.waited:g}, which is no share"
    if row.peak_share is not None and not (math.isfinite(row.peak_share) and row.peak_share > 0):
        yield f"peak_share is {row.peak_share:g}"
    if row.threads < 1:
        yield f"threads is {row.threads}"


def _of_specs(profile: MachineProfile) -> Iterator[str]:
    rates: list[tuple[str, float | None]] = []
    for device in profile.devices:
        rates += [(f"{device.name}: {dtype} peak", rate) for dtype, rate in device.flops_per_s.items()]
        rates += [(f"{device.name}: {name}", getattr(device, name))
                  for name in ("memory_bytes", "memory_bytes_per_s", "power_w", "clock_hz")]  # fmt: skip
    for link in profile.links:
        rates += [(f"link {link.name}: {name}", getattr(link, name)) for name in ("bytes_per_s", "latency_s")]
    for disk in profile.storage:
        names = ("read_bytes_per_s", "write_bytes_per_s", "random_reads_per_s", "latency_s")
        rates += [(f"storage {disk.name}: {name}", getattr(disk, name)) for name in names]
    for name, rate in rates:
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            yield f"{name} is {rate:g}, which must be positive"


def _of_whole(profile: MachineProfile) -> Iterator[str]:
    for name, value in profile.quality.items():
        if not (math.isfinite(value) and value >= 0):
            yield f"quality.{name} is {value:g}"
    for curve in profile.curves:
        if not all(map(math.isfinite, curve.parameters.values())):
            yield f"curve of {curve.kind} in {curve.dtype}: a parameter is not finite"
    try:
        datetime.fromisoformat(profile.date)
    except ValueError:
        yield f"date is {profile.date!r}, which is no ISO 8601 moment"
    if profile.provenance == "measured" and not profile.fingerprint:
        yield "was measured, but has no fingerprint of its machine"
