"""What a run costs: device-hours, dollars, kilowatt-hours at the wall.

    bill = bill_of(device, num_devices=512, wall_s=3411, busy=0.95, usd_per_hour=2.5)
    bill.usd, bill.kwh            None where a price or a power is not known: never guessed

Lesson: a host draws more than its devices' data sheets add up to (processors, fans, power supplies): 8 H100s of 700 W
draw 6.85 kW at the plug, 1.22 times as much. A device that waits for others still spins in a collective and saves only
a third; so scaling out a fixed problem costs energy even where it saves time.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbopump.core.errors import CatalogError, UsageError
from turbopump.core.units import human
from turbopump.hardware.accelerators import device as find_device
from turbopump.hardware.specs import DeviceSpec

NODE_OVERHEAD = 6850 / (8 * 700)
"""Watts at the plug for each watt of a device's data sheet, all busy: 1.22. MLPerf training 4.0, two runs of 8-H100
hosts at 6,840 and 6,848 W (AC readings integrated)."""
WAITING_SHARE = 0.65
"""Of that draw, while a device waits for others in a collective. MLPerf training 4.0: the same hosts at 5,122-5,845 W
on problems that do not scale to as many of them."""
IDLE_SHARE = 0.30
"""Of that draw, while a device does nothing: restarting, failed, between runs. From memory: an H100 idles at 70-90 W,
the rest of its host at about 1.5 kW."""
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Bill:
    """What a run costs. `usd` and `kwh` are None where no price or no power is known."""

    device_hours: float
    usd: float | None
    kwh: float | None
    """At the plug of the hosts, times `pue`: switches and storage are not in it."""
    missing: tuple[str, ...] = ()
    """What was not known, and what to give."""

    def lines(self) -> list[str]:
        """The bill as lines of text."""
        rows = [f"{human(self.device_hours)} device-hours"]
        rows += [f"${human(self.usd)}"] if self.usd is not None else []
        rows += [f"{human(self.kwh * 1e3, 'Wh')}"] if self.kwh is not None else []
        return rows + list(self.missing)


def bill_of(
    device: DeviceSpec,
    *,
    num_devices: int,
    wall_s: float,
    busy: float,
    idle_s: float = 0.0,
    usd_per_hour: float | None = None,
    usd_per_kwh: float | None = None,
    pue: float = 1.0,
) -> Bill:
    """The bill of `num_devices` devices for `wall_s` seconds, of which `idle_s` idle; of the rest they compute a share
    `busy` and wait for each other otherwise.

    `usd_per_hour` (of a device; default the catalog's) is what is paid to a provider; `usd_per_kwh` is added where it
    is given (own machines). `pue`: watts into the building for a watt into its hosts. Raises `UsageError` for
    figures out of range.
    """
    price = device.usd_per_hour if usd_per_hour is None else usd_per_hour
    _check(num_devices=num_devices, wall_s=wall_s, busy=busy, idle_s=idle_s, usd_per_hour=price,
           usd_per_kwh=usd_per_kwh, pue=pue)  # fmt: skip
    hours = num_devices * wall_s / 3600
    watts = wall_watts(device, busy=busy)
    missing = []
    kwh = None
    if watts is None:
        missing.append(f"energy unknown: {device.name} has no power_w in its entry")
    else:
        idle_watts = watts * IDLE_SHARE / _share(busy)
        kwh = num_devices * (watts * (wall_s - idle_s) + idle_watts * idle_s) * pue / JOULES_PER_KWH
    usd = hours * price if price is not None else None
    if usd_per_kwh is not None and kwh is not None:
        usd = (usd or 0.0) + kwh * usd_per_kwh
    if usd is None:
        missing.append("price unknown: give usd_per_hour of a device, or enter it in its catalog entry")
    return Bill(hours, usd, kwh, tuple(missing))


def wall_watts(device: DeviceSpec, *, busy: float) -> float | None:
    """Watts at the plug for one device that computes a share `busy` of its time and waits otherwise; None where its
    power is not known."""
    return None if device.power_w is None else NODE_OVERHEAD * device.power_w * _share(busy)


def _share(busy: float) -> float:
    return WAITING_SHARE + (1 - WAITING_SHARE) * busy


def _check(*, num_devices: int, wall_s: float, busy: float, idle_s: float, usd_per_hour: float | None,
           usd_per_kwh: float | None, pue: float) -> None:  # fmt: skip
    for name, value, low, high in (
        ("num_devices", num_devices, 1, math.inf), ("wall_s", wall_s, 0, 1e12), ("busy", busy, 0, 1),
        ("idle_s", idle_s, 0, wall_s), ("usd_per_hour", usd_per_hour, 0, 1e6), ("usd_per_kwh", usd_per_kwh, 0, 1e4),
        ("pue", pue, 1, 10),
    ):  # fmt: skip
        if value is not None and not low <= value <= high:
            raise UsageError(f"{name} ({value}) must be from {low} to {high}")


@dataclass(frozen=True)
class MeasuredPower:
    """A row of `mlperf_power.csv`: mean watts at the plug of a host while it trained, and what is predicted of it."""

    system: str
    benchmark: str
    nodes: int
    measured_w: float
    busy: float
    """From strong scaling within the table: the time of the smallest system over this one's, by their sizes."""
    predicted_w: float

    @property
    def error(self) -> float:
        """Of watts, and so of energy, since the duration is given."""
        return self.predicted_w / self.measured_w - 1


POWER_COLUMNS = ("system", "benchmark", "nodes", "accelerators", "duration_s", "avg_W_per_node")


def read_power(path: Path) -> list[MeasuredPower]:
    """The rows of `mlperf_power.csv` with a device of the catalog and a known power; raises `UsageError` for a missing
    file or column. The smallest system of a benchmark is taken as always busy."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lines, columns = list(reader), tuple(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    if missing := [column for column in POWER_COLUMNS if column not in columns]:
        raise UsageError(f"{path} lacks {', '.join(missing)}: it needs the columns {', '.join(POWER_COLUMNS)}")
    node_s: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        node_s.setdefault(line["benchmark"], []).append((int(line["nodes"]), float(line["duration_s"])))
    rows = []
    for line in lines:
        nodes, seconds = int(line["nodes"]), float(line["duration_s"])
        least, least_s = min(node_s[line["benchmark"]])
        busy = min(1.0, least * least_s / (nodes * seconds))
        watts = (device := device_of(line["system"])) and wall_watts(device, busy=busy)
        if watts:
            per_node = int(line["accelerators"]) / nodes
            rows.append(MeasuredPower(line["system"], line["benchmark"], nodes, float(line["avg_W_per_node"]), busy,
                                      watts * per_node))  # fmt: skip
    return rows


def device_of(system: str) -> DeviceSpec | None:
    """The catalog's device in the name of a system, e.g. `64xSMC-H100-SXM-80GB`; None where it names none."""
    words = re.split(r"[^A-Za-z0-9]+", system)
    for name in (word[start:] for word in words for start in range(max(0, len(word) - 3))):  # dgxa100: a100
        try:
            return find_device(name)
        except CatalogError:
            continue
    return None


def mean_error(rows: Sequence[MeasuredPower]) -> float:
    """Mean absolute error of the watts, a fraction; NaN without rows."""
    return float(np.mean([abs(row.error) for row in rows])) if rows else math.nan
