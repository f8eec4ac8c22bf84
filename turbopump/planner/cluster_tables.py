"""Published measurements of clusters as rows to be judged: all-reduces, the power of hosts, failures.

Cross-validated, an all-reduce of a device over so many ranks is predicted from the same device's other numbers of
ranks, as on a probed machine (`comms/cost.py`), where these have several sizes; the power of a host and the time
between failures from the other systems. Frozen, from the links of the catalog and the calibration that ships, and from
the constants below: failures of one large published run, power of a data sheet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from turbopump.comms.cost import CollectiveModel
from turbopump.comms.ops import AllReduce
from turbopump.core.errors import CatalogError
from turbopump.hardware.profile import Measurement, Prediction, Trial
from turbopump.hardware.specs import DeviceSpec
from turbopump.planner import calibration, exchange
from turbopump.planner.judged import Row
from turbopump.planner.machine import Machine, from_catalog
from turbopump.planner.operation_tables import BAD_ROW, Line, reason, spec_of
from turbopump.planner.rates import MOST

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "allreduce_intranode": ("gpu", "ranks", "bytes", "time_us"),
    "deepbench_allreduce": ("platform", "floats", "processors", "time_ms", "library"),
    "mlperf_power": ("system", "benchmark", "nodes", "accelerators", "avg_W_per_node"),
    "failures": ("system", "cause_or_metric", "value", "unit"),
}  # fmt: skip
HOST_SHARE = 1.25
"""Power of a training host over that of its devices on paper: a DGX H100 takes 10.2 kW at most (data sheet) for 8
devices of 700 W, and training takes about 70 % of that."""
HOST_BAND = math.log(1.4)
FAILURES_BAND = math.log(4.0)  # published systems differ by that much from each other
GPU_HOURS_BETWEEN_FAILURES = 50_000.0  # 419 unplanned stops in 54 days of 16,384 H100 (arXiv:2407.21783, table 5)
DEVICES_PER_NODE = 8
NETWORK = "infiniband-edr"  # of DeepBench's clusters of 2016-2017; their table does not say it
RING = ("node_efficiency", "network_efficiency", "node_latency_s", "network_latency_s")


def judge(path: Path, lines: Sequence[Line], *, frozen: bool) -> tuple[list[Row], list[str]]:
    """The rows of a table of COLUMNS with predictions, and those that could not be predicted, with the reason."""
    return _JUDGES[path.stem](path, lines, frozen)


# all-reduce -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sum:
    """A measured all-reduce: of what device, by which library, over which machine."""

    device: str
    route: str
    machine: Machine
    op: AllReduce
    seconds: float
    doubt: float = math.log(1.35)
    """Half-width of the band at least, in the logarithm, where it is predicted by what ships."""


def _intranode(path: Path, lines: Sequence[Line], frozen: bool) -> tuple[list[Row], list[str]]:
    def read(line: Line) -> Sum:
        op = AllReduce(int(line["bytes"]), int(line["ranks"]), "node")
        machine = from_catalog(spec_of(line["gpu"]), op.ranks, devices_per_node=op.ranks)
        return Sum(line["gpu"], "default", machine, op, float(line["time_us"]) / 1e6)

    return _collectives(path, lines, read, frozen)


def _deepbench(path: Path, lines: Sequence[Line], frozen: bool) -> tuple[list[Row], list[str]]:
    """Every library is a route. `Single` is on one host, whatever else may lie on several of 8 over a network that the
    table does not say."""

    def read(line: Line) -> Sum:
        spec, ranks = spec_of(line["platform"]), int(line["processors"])
        op = AllReduce(4 * int(line["floats"]), ranks, "node" if "Single" in line["library"] else "rack")
        per_node = ranks if op.level == "node" else min(ranks, DEVICES_PER_NODE)
        machine = from_catalog(spec, ranks, devices_per_node=per_node, network=NETWORK)
        return Sum(line["platform"], line["library"], machine, op, float(line["time_ms"]) / 1e3, math.log(4.0))

    return _collectives(path, lines, read, frozen)


def _collectives(
    path: Path, lines: Sequence[Line], read: Callable[[Line], Sum], frozen: bool
) -> tuple[list[Row], list[str]]:
    found: list[Sum] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 2):
        try:
            one = read(line)
            if not 0 < one.seconds < math.inf:
                raise ValueError("no time is given")
            if one.op.ranks < 2 or not 1 <= one.op.bytes <= MOST**2:
                raise ValueError(f"{one.op.bytes} bytes over {one.op.ranks} ranks is no all-reduce")
            found.append(one)
        except BAD_ROW as error:
            problems.append(f"{path.name}:{number}: {reason(error)}")
    rows = []
    for one in found:
        others = [] if frozen else _others(one, found)
        p = CollectiveModel.of(others).predict(one.op, one.route) if others else _as_shipped(one)
        name = one.device if one.route == "default" else f"{one.device}/{one.route}"
        rows.append(Row(path.stem, f"{name}/{one.op.ranks} ranks", one.op.key, p.seconds, one.seconds, "s", p.low_s,
                        p.high_s))  # fmt: skip
    return rows, problems


def _others(one: Sum, found: Sequence[Sum]) -> list[Measurement]:
    """Of the same device and library over other numbers of ranks, where these have several sizes: one size says nothing
    of another."""
    same = [o for o in found if (o.device, o.route) == (one.device, one.route) and o.op.ranks != one.op.ranks]
    sizes = Counter(o.op.ranks for o in same)
    return [_measurement(o.op, o.seconds, o.route, o.device) for o in same if sizes[o.op.ranks] > 1]


def _as_shipped(one: Sum) -> Prediction:
    """A ring as the model of steps times it, by the calibration that ships; its bands are those of its parameters."""
    known = calibration.shipped()
    middle = known.values(one.machine.families)

    def seconds(faster: float) -> float:
        """At that share of the way to the fast end of the bands of all parameters; below 0 to the slow end."""
        end = dict(middle)
        for name in RING:
            low, high = known.bands[name]
            fast, slow = (high, low) if name.endswith("efficiency") else (low, high)
            end[name] *= (fast if faster > 0 else slow) / known.shared[name] if faster else 1.0
        sizes = [np.array([float(v)]) for v in (one.op.bytes, one.op.ranks, one.machine.devices_per_node)]
        return float(exchange.ring_s(one.machine, end, 2.0, *sizes)[0])

    at = seconds(0.0)
    low, high = (min(seconds(1.0), at * math.exp(-one.doubt)), max(seconds(-1.0), at * math.exp(one.doubt)))
    return Prediction(at, low, high, "curve", one.route)


def _measurement(op: AllReduce, seconds: float, route: str, device: str) -> Measurement:
    row = Measurement.failed(Trial(op, route, device=device), "comms", "")
    return replace(row, clock="wall", runs=1, calls=1, min_s=seconds, median_s=seconds, p90_s=seconds)


# power and failures ---------------------------------------------------------------------------------------------------


def _power(path: Path, lines: Sequence[Line], frozen: bool) -> tuple[list[Row], list[str]]:
    """Watts of a host, by the power of its devices on paper. The system's name must hold that of its accelerator."""
    read: list[tuple[str, str, float, float]] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 2):
        try:
            spec = _named_in(line["system"])
            if spec.power_w is None:
                raise ValueError(f"the power of {spec.name} is not in the catalog")
            per_node = float(line["accelerators"]) / float(line["nodes"])
            read.append((line["benchmark"], line["system"], spec.power_w * per_node, float(line["avg_W_per_node"])))
        except BAD_ROW as error:
            problems.append(f"{path.name}:{number}: {reason(error)}")
    rows = []
    for group, label, paper_w, measured_w in read:
        shares = [] if frozen else [w / p for g, _, p, w in read if g != group]
        predicted_w = paper_w * (median(shares) if shares else HOST_SHARE)
        rows.append(Row(path.stem, group, label, predicted_w, measured_w, "W", predicted_w * math.exp(-HOST_BAND),
                        predicted_w * math.exp(HOST_BAND)))  # fmt: skip
    return rows, problems


def _named_in(system: str) -> DeviceSpec:
    """The catalog's device whose name a system's name holds; raises `CatalogError` where none of its parts is one."""
    parts = system.replace("_", "-").split("-")
    for length in (3, 2, 1):
        for begin in range(len(parts) - length + 1):
            try:
                return spec_of("-".join(parts[begin : begin + length]))
            except CatalogError:
                continue
    raise CatalogError(f"the system {system!r} names no accelerator of the catalog")


def _failures(path: Path, lines: Sequence[Line], frozen: bool) -> tuple[list[Row], list[str]]:
    """GPU-hours between failures, as far as a row says them; counts of single causes are parts of the same figure."""
    read: list[tuple[str, str, float]] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 2):
        try:
            read.append((line["system"], line["cause_or_metric"], _gpu_hours(line)))
        except BAD_ROW as error:
            problems.append(f"{path.name}:{number}: {reason(error)}")
    rows = []
    for system, metric, hours in read:
        others = [] if frozen else [math.log(h) for s, _, h in read if s.split()[0] != system.split()[0]]
        predicted = math.exp(median(others)) if others else GPU_HOURS_BETWEEN_FAILURES
        rows.append(Row(path.stem, system, metric, predicted, hours, "GPU-hours", predicted * math.exp(-FAILURES_BAND),
                        predicted * math.exp(FAILURES_BAND)))  # fmt: skip
    return rows, problems


def _gpu_hours(line: Line) -> float:
    metric, unit = line["cause_or_metric"].lower(), line["unit"].lower()
    if unit == "gpu-hours":
        return float(line["value"])
    if "per 1000 node-days" in metric:
        return 1000 * 24 * DEVICES_PER_NODE / float(line["value"])
    if "mttf of a" in metric and unit == "h":
        return float(line["value"]) * float(metric.split("mttf of a ")[1].split("-gpu")[0])
    raise ValueError(f"{line['cause_or_metric']!r} in {line['unit'] or 'no unit'} is no time between failures")


_JUDGES: Mapping[str, Callable[[Path, Sequence[Line], bool], tuple[list[Row], list[str]]]] = {
    "allreduce_intranode": _intranode, "deepbench_allreduce": _deepbench, "mlperf_power": _power, "failures": _failures,
}  # fmt: skip
