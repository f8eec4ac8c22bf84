"""What the rows of a machine profile say: the best rate of each dtype, the gain of each route, names in plain words.

Rates are compared only within a *setting*, one device with one number of threads. A rate that is drawn or compared is
of the median time; a *peak* is of the fastest. Rows without usable times (a route that does not run here) are kept
for the table and counted nowhere else.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from turbopump.compute.choice import DEFAULT, compared
from turbopump.core.units import human, human_bytes
from turbopump.hardware.measured import IN_MEMORY_BYTES
from turbopump.hardware.profile import MachineProfile, Measurement

PRODUCTS = ("Gemm", "BatchedGemm")
NOMINAL = ("fft", "winograd", "strassen")
"""Kinds and routes (in lower case, a part of the name) that do fewer FLOPs than are counted: no limit for others."""
WORTH_CHANGING = 1.05
"""A gain below this is within what two measurements of one route differ by."""


@dataclass(frozen=True)
class Family:
    """Operations shown together, by the beginning of their class's name."""

    id: str
    name: str
    kinds: tuple[str, ...]
    colour: str


FAMILIES = (
    Family("products", "matrix products", ("Gemm", "BatchedGemm"), "--run0"),
    Family("convolutions", "convolutions", ("Conv",), "--run1"),
    Family("recurrent", "recurrent layers", ("Rnn", "Lstm", "Gru"), "--run2"),
    Family("attention", "attention", ("Attention",), "--run3"),
    Family("fourier", "Fourier transforms", ("Fft", "RealFft", "Rfft"), "--run4"),
    Family("moving", "element-wise, norms, look-ups, losses, updates", (), "--run5"),
)
DOMAIN_NAMES = {
    "compute": "operations of models",
    "memory": "memory",
    "host": "launch cost",
    "comms": "collectives",
    "data": "storage",
}


class Setting(NamedTuple):
    """Where rows can be compared with each other."""

    device: str
    threads: int

    @property
    def words(self) -> str:
        if self.device != "cpu":
            return self.device
        return f"{self.threads} thread{'s' * (self.threads != 1)}"


@dataclass(frozen=True)
class Peak:
    """The fastest product by one route."""

    setting: Setting
    dtype: str
    route: str
    row: Measurement
    problem: str
    """Why it does not count, e.g. a result that is not exact."""


@dataclass(frozen=True)
class Gain:
    """What another route than the default brings for one operation."""

    default: Measurement
    best: Measurement

    @property
    def ratio(self) -> float:
        return self.default.seconds / self.best.seconds


def timed(row: Measurement) -> bool:
    """Whether a row has times that can be drawn: finite, positive; also where its result does not count."""
    times = (row.min_s, row.median_s, row.p90_s)
    return all(t is not None and math.isfinite(t) and t > 0 for t in times)


def usable(row: Measurement) -> bool:
    return row.works and timed(row)


def setting_of(row: Measurement) -> Setting:
    return Setting(row.device, row.threads)


def main_settings(profile: MachineProfile) -> list[Setting]:
    """Of each device the number of threads with the most rows of operations, the device with the most rows first."""
    counted = Counter(setting_of(r) for r in profile.rows if r.domain == "compute" and usable(r))
    found: dict[str, Setting] = {}
    for setting, _ in sorted(counted.items(), key=lambda item: (-item[1], item[0])):
        found.setdefault(setting.device, setting)
    return list(found.values())


def family_of(kind: str) -> Family:
    for family in FAMILIES:
        if kind.startswith(family.kinds) if family.kinds else False:
            return family
    return FAMILIES[-1]


def dtype_order(dtypes: Iterable[str]) -> list[str]:
    known = ("fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8")
    return sorted(set(dtypes), key=lambda d: (known.index(d) if d in known else len(known), d))


def peaks(profile: MachineProfile) -> list[Peak]:
    """The fastest product of each setting, dtype and route; the rates that count before those that do not, fastest
    first. Another operation stands for its dtype where it is faster than every exact product, or none was measured:
    the best rate is that of all routes and operations, so that no share of it passes 100 %."""
    best: dict[tuple[Setting, str, str], Measurement] = {}
    others: dict[tuple[Setting, str], Measurement] = {}
    for row in profile.rows:
        if row.domain != "compute" or row.flops <= 0 or not timed(row):
            continue
        place = setting_of(row)
        if row.kind in PRODUCTS:
            held = best.get((place, row.dtype, row.route))
            if held is None or (row.works, row.flops_per_s) > (held.works, held.flops_per_s):
                best[place, row.dtype, row.route] = row
        elif row.works and not any(word in (row.kind + row.route).lower() for word in NOMINAL):
            held = others.get((place, row.dtype))
            if held is None or row.flops_per_s > held.flops_per_s:
                others[place, row.dtype] = row
    found = [Peak(setting, dtype, route, row, row.problem) for (setting, dtype, route), row in best.items()]
    for (place, dtype), row in others.items():
        exact = [p for p in found if (p.setting, p.dtype) == (place, dtype) and not p.problem]
        if all(row.flops_per_s > p.row.flops_per_s for p in exact):
            found.append(Peak(place, dtype, row.route, row, ""))
    return sorted(found, key=lambda p: (bool(p.problem), -p.row.flops_per_s))


def best_rates(profile: MachineProfile) -> dict[tuple[Setting, str], Peak]:
    """The best rate over all routes of each setting and dtype."""
    found: dict[tuple[Setting, str], Peak] = {}
    for peak in peaks(profile):
        if not peak.problem:
            found.setdefault((peak.setting, peak.dtype), peak)
    return found


def of_best_route(rows: Iterable[Measurement]) -> list[Measurement]:
    """One row an operation and setting: that of its fastest route."""
    best: dict[tuple[str, Setting], Measurement] = {}
    for row in rows:
        key = (row.op_key, setting_of(row))
        if usable(row) and (key not in best or row.seconds < best[key].seconds):
            best[key] = row
    return list(best.values())


def gains(profile: MachineProfile) -> list[Gain]:
    """Of each operation measured by the default route and by another, the fastest against the default; largest first.

    By the rule of `compute.choice`: exact, and faster by more than the noise of both rows; else the gain is 1. Noisy
    rows prove nothing here: a slow default on a busy machine would make any other route look 30 times as fast.
    """
    groups: dict[tuple[str, Setting], list[Measurement]] = defaultdict(list)
    for row in profile.rows:
        if row.domain == "compute" and usable(row) and not row.noisy:
            groups[row.op_key, setting_of(row)].append(row)
    found = []
    for rows in groups.values():
        default = next((r for r in rows if r.route == DEFAULT), None)
        if default is not None and len(rows) > 1:
            better = (r for r in rows if (e := compared(default, r)).exact and e.gain > 1 + e.noise)
            found.append(Gain(default, min(better, key=lambda r: r.seconds, default=default)))
    return sorted(found, key=lambda g: -g.ratio)


def gain_group(row: Measurement) -> str:
    """What routes are chosen for together: kind, direction and dtype."""
    if row.op.get("backward") is True:
        what = " backward"
    else:
        direction = str(row.op.get("direction", "forward"))
        what = "" if direction == "forward" else f" {direction.replace('_', ' ')}"
    return f"{row.kind}{what} {row.dtype}".strip()


def copy_rates(profile: MachineProfile, setting: Setting) -> list[tuple[float, float]]:
    """Bytes read and written, and the best bytes a second of copy and triad, smallest first: in the setting itself,
    else as the device was measured."""
    rows = [r for r in profile.rows if r.kind in ("MemoryCopy", "MemoryTriad") and usable(r) and r.bytes_per_s > 0
            and r.device == setting.device]  # fmt: skip
    rows = [r for r in rows if r.threads == setting.threads] or rows
    best: dict[float, float] = {}
    for row in rows:
        best[row.bytes] = max(best.get(row.bytes, 0.0), row.bytes_per_s)
    return sorted(best.items())


def memory_roofs(profile: MachineProfile, setting: Setting) -> tuple[float | None, float | None]:
    """Bytes a second of the memory (the best beyond the caches; the data sheet's where no copy was measured) and of
    the caches (the best of all, where it is another); None where it is not known."""
    rates = copy_rates(profile, setting)
    if not rates:
        return next((d.memory_bytes_per_s for d in profile.devices if d.memory_bytes_per_s), None), None
    memory = max((rate for size, rate in rates if size >= IN_MEMORY_BYTES), default=None)
    fastest = max(rate for _, rate in rates)
    return memory, fastest if fastest > 1.3 * (memory or 0.0) else None


def number(values: Mapping[str, object], *names: str) -> float | None:
    """The first of the fields that is a positive number."""
    for name in names:
        value = values.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0:
            return float(value)
    return None


def op_words(row: Measurement) -> str:
    """An operation as people write it: `Gemm 1024×512×512 nt`, without its dtype."""
    op = row.op
    shown: str
    try:
        if row.kind == "Gemm":
            shown = f"{op['m']}×{op['n']}×{op['k']} {op.get('layout', '')}"
        elif row.kind == "BatchedGemm":
            shown = f"{op['batch']} of {op['m']}×{op['n']}×{op['k']}"
        elif row.kind == "Conv2d":
            shown = (
                f"{op['batch']}×{op['in_channels']}×{op['height']}×{op['width']} to {op['out_channels']}, "
                f"{op['kernel_h']}×{op['kernel_w']}{_stride(op)}{_direction(op)}"
            )
        elif row.kind == "Rnn":
            ways = ", both ways" if op.get("bidirectional") else ""
            shown = f"{op['kind']} {op['batch']}×{op['steps']}, {op['input_size']} to {op['hidden_size']}{ways}"
        elif row.kind == "Attention":
            shown = f"{op['batch']}×{op['heads']}, {op['q_len']}×{op['kv_len']}, width {op['head_dim']}"
        else:
            shown = _plain(op)
    except KeyError:  # a profile of another version: its fields as they are
        shown = _plain(op)
    backward = " backward" if op.get("backward") is True else ""
    return f"{row.kind} {shown}".strip() + backward


def _stride(op: Mapping[str, object]) -> str:
    return f" step {op['stride_h']}" if op.get("stride_h") not in (None, 1) else ""


def _direction(op: Mapping[str, object]) -> str:
    direction = str(op.get("direction", "forward"))
    return "" if direction == "forward" else f", {direction.replace('_', ' ')}"


def _plain(op: Mapping[str, object]) -> str:
    parts = []
    for name, value in op.items():
        if name in ("dtype", "backward") or value in (None, "", False):
            continue
        if name.endswith("bytes") and isinstance(value, (int, float)):
            parts.append(size_words(value) if name == "bytes" else f"{name[:-6] or 'row'} {size_words(value)}")
        else:
            parts.append(name.replace("_", " ") if value is True else f"{name.replace('_', ' ')} {value}")
    return ", ".join(parts)


def size_words(count: float) -> str:
    """Bytes of a block or message: binary units where they are whole (`4 KiB`), else as `human_bytes`."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if count >= 2**power and count % 2 ** (power - 4) == 0:
            return f"{count / 2**power:.4g} {unit}"
    return human_bytes(count)


def rate_words(row: Measurement) -> str:
    """The rate of the median time: FLOP/s where FLOPs are counted, else bytes a second, else nothing."""
    if not timed(row):
        return ""
    if row.flops > 0:
        return human(row.flops / row.seconds, "FLOP/s")
    return human(row.bytes / row.seconds, "B/s") if row.bytes > 0 else ""


def error_words(error: float | None) -> str:
    """`2.6e-7`."""
    if not error:
        return "" if error is None else "0"
    digits, _, power = f"{error:.1e}".partition("e")
    return f"{digits}e{int(power)}" if power else digits
