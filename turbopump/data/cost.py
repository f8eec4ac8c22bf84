"""How long storage takes, from the rows that `bench` measured. Without torch.

At each measured size and depth the fastest route counts; cold and cached reads are two surfaces. Between two sizes the
time lies between a straight line (latency + bytes / bandwidth, too low where the bandwidth grows) and a power law (too
high where latency ends): their geometric mean is taken (median error, sizes left out, on a shared virtual disk: 0.11
and 0.14; the line 0.13 and 0.17, the power law 0.13 and 0.16). Between two depths the rate is linear in log(depth).
Below the smallest size a read costs as much as the smallest (latency), above the largest the bandwidth stays; beyond
the measured depths nothing is gained. No prediction passes the best bandwidth seen. The band is what this does on the
machine's own rows, each left out in turn (`leave_out`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from turbopump.core.errors import ProfileError, UsageError
from turbopump.core.workload import Op
from turbopump.data.ops import RandomRead
from turbopump.hardware.profile import MachineProfile, Measurement, Prediction
from turbopump.hardware.specs import StorageSpec

Point = tuple[float, int]
"""Bytes and depth."""
DEFAULT_BAND = 1.5  # as a factor, where there are too few rows to leave one out


@dataclass(frozen=True)
class LeftOut:
    """A measured row predicted from rows of other sizes (or depths) only."""

    op_key: str
    left: str
    """What was left out: `size` or `depth`."""
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Relative to the measured time."""
        return abs(self.predicted_s - self.measured_s) / self.measured_s


def predict(profile: MachineProfile, op: Op) -> Prediction:
    """Seconds of one read or write of `turbopump.data.ops`, with its 80 % band.

    From rows of the same kind, or for reads and writes of a profile without such rows from its `StorageSpec`. Raises
    `UsageError` for an operation without bytes or depth, `ProfileError` where the profile says nothing of the kind.
    """
    num_bytes, depth = op.cost.bytes, int(getattr(op, "depth", 1))
    if num_bytes <= 0 or depth <= 0:
        raise UsageError(f"{op.key}: bytes and depth must be at least 1")
    kind, cached = type(op).__name__, bool(getattr(op, "cached", False))
    points = _fastest(profile.rows, kind, cached)
    if not points:
        return _of_spec(profile, op, num_bytes, depth, cached)
    exact = points.get((num_bytes, depth))
    if exact is not None:
        return Prediction(exact.seconds, exact.min_s or exact.seconds, max(exact.p90_s or 0.0, exact.seconds),
                          "measured", exact.route)  # fmt: skip
    seconds = _surface({point: row.seconds for point, row in points.items()}, num_bytes, depth)
    factor = _band(points)
    floor_s = num_bytes / max(row.bytes_per_s for row in points.values())
    return Prediction(seconds, max(floor_s, seconds / factor), seconds * factor, "interpolated",
                      _nearest(points, num_bytes, depth).route)  # fmt: skip


def reads_per_s(profile: MachineProfile, num_bytes: int, depth: int, *, cached: bool = False) -> float:
    """Random reads of `num_bytes` a second with `depth` requested at once; raises as `predict`."""
    return 1.0 / predict(profile, RandomRead(num_bytes, depth, cached)).seconds


def storage_spec(rows: Iterable[Measurement], name: str = "storage") -> StorageSpec:
    """The summary of measured rows: cold bandwidth, writing, 4 KiB reads at the best depth and their latency.

    Raises `ProfileError` naming the rows that are missing.
    """
    rows = [row for row in rows if row.domain == "data" and row.works and not row.route.startswith("fio")]
    cold = [row for row in rows if row.kind in ("SequentialRead", "RandomRead") and not row.op["cached"]]
    small = [row for row in cold if row.kind == "RandomRead" and row.bytes == 4096]
    single = [row for row in small if row.op["depth"] == 1]
    written = [row for row in rows if row.kind in ("SequentialWrite", "CheckpointWrite")]
    wanted = {"cold reads": cold, "cold random reads of 4 KiB": small, "those at depth 1": single, "writes": written}
    missing = [what for what, found in wanted.items() if not found]
    if missing:
        raise ProfileError(
            f"storage was not measured: no row of {', '.join(missing)}; use `turbopump probe --only data`"
        )
    return StorageSpec(
        name=name,
        read_bytes_per_s=max(row.bytes / row.seconds for row in cold),
        write_bytes_per_s=max(row.bytes / row.seconds for row in written),
        random_reads_per_s=max(1.0 / row.seconds for row in small),
        latency_s=min(row.seconds for row in single),
        provenance="measured",
    )


def leave_out(rows: Iterable[Measurement]) -> tuple[LeftOut, ...]:
    """Every inner size, then every inner depth, predicted from the rows of the others: cold and cached, each kind.

    Inner: with smaller and larger ones measured, as an operation that was never measured usually lies. A size is left
    out at all depths at once, so that its neighbours in depth do not give it away.
    """
    rows = list(rows)
    surfaces = dict.fromkeys((row.kind, bool(row.op.get("cached", False))) for row in rows if row.domain == "data")
    found: list[LeftOut] = []
    for kind, cached in surfaces:
        found += _leave_out(_fastest(rows, kind, cached))
    return tuple(found)


def _leave_out(points: Mapping[Point, Measurement]) -> list[LeftOut]:
    seconds = {point: row.seconds for point, row in points.items()}
    found = []
    for axis, left in enumerate(("size", "depth")):
        for value in sorted({point[axis] for point in points})[1:-1]:
            others = {point: s for point, s in seconds.items() if point[axis] != value}
            for point, row in points.items():
                if point[axis] == value:
                    found.append(LeftOut(row.op_key, left, _surface(others, *point), row.seconds))
    return found


def _fastest(rows: Iterable[Measurement], kind: str, cached: bool) -> dict[Point, Measurement]:
    """The row of the fastest route by bytes and depth; fio's rows are a yardstick, not a way for us to read."""
    best: dict[Point, Measurement] = {}
    for row in rows:
        if (
            row.kind == kind
            and row.works
            and not row.route.startswith("fio")
            and bool(row.op.get("cached", False)) == cached
        ):
            point = (row.bytes, int(row.op.get("depth", 1)))
            if point not in best or row.seconds < best[point].seconds:
                best[point] = row
    return best


def _surface(seconds: Mapping[Point, float], num_bytes: float, depth: int) -> float:
    """Time at a size and depth from those at others; no faster than the best bandwidth among them."""
    columns: dict[int, dict[float, float]] = {}
    for (size, at_depth), value in seconds.items():
        columns.setdefault(at_depth, {})[size] = value
    # where the budget ended early, some depths have few sizes: those that reach around this one say more
    around = {d: c for d, c in columns.items() if min(c) <= num_bytes <= max(c)}
    columns = around or columns
    depths = sorted(columns)
    rates = [1.0 / _column_s(columns[d], num_bytes) for d in depths]
    rate = float(np.interp(math.log(depth), np.log(depths), rates))
    return max(1.0 / rate, num_bytes / max(size / value for (size, _), value in seconds.items()))


def _column_s(column: Mapping[float, float], num_bytes: float) -> float:
    """Time at a size from those at others, all of one depth."""
    sizes = sorted(column)
    seconds = [column[size] for size in sizes]
    if num_bytes > sizes[-1]:
        return seconds[-1] * num_bytes / sizes[-1]
    line = float(np.interp(num_bytes, sizes, seconds))
    power = math.exp(float(np.interp(math.log(num_bytes), np.log(sizes), np.log(seconds))))
    return math.sqrt(line * power)


def _band(points: Mapping[Point, Measurement]) -> float:
    """The factor within which four in five of the left-out rows lie."""
    ratios = [abs(math.log(left.predicted_s / left.measured_s)) for left in _leave_out(points)]
    return math.exp(float(np.quantile(ratios, 0.8))) if len(ratios) >= 3 else DEFAULT_BAND


def _nearest(points: Mapping[Point, Measurement], num_bytes: float, depth: int) -> Measurement:
    near = min(points, key=lambda p: abs(math.log(p[0] / num_bytes)) + abs(math.log(p[1] / depth)))
    return points[near]


def _of_spec(profile: MachineProfile, op: Op, num_bytes: float, depth: int, cached: bool) -> Prediction:
    """From the datasheet: latency and bandwidth of the device, or of memory (read and written) where it is cached."""
    kind = type(op).__name__
    bandwidth = next((device.memory_bytes_per_s for device in profile.devices if device.memory_bytes_per_s), None)
    if kind in ("SequentialRead", "RandomRead") and cached and bandwidth:
        seconds = 2 * num_bytes / bandwidth
    elif profile.storage and kind in ("SequentialRead", "RandomRead", "CheckpointRead") and not cached:
        spec = profile.storage[0]
        seconds = num_bytes / spec.read_bytes_per_s
        if kind == "RandomRead":
            seconds = max(seconds, 1.0 / spec.random_reads_per_s, (spec.latency_s + seconds) / depth)
    elif profile.storage and kind in ("SequentialWrite", "CheckpointWrite"):
        seconds = num_bytes / profile.storage[0].write_bytes_per_s
    else:
        temperature = " cached" if cached else ""
        raise ProfileError(
            f"the profile of {profile.name} has no row of{temperature} {kind} and no storage specification: measure "
            "it with `turbopump probe --only data`"
        )
    return Prediction(seconds, seconds, 4 * seconds, "roofline")
