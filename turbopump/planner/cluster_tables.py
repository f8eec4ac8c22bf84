"""Published measurements of clusters as rows to be judged: all-reduces, the power of hosts, failures.

Cross-validated, an all-reduce of a device over so many ranks is predicted from the same device's other numbers of
ranks, as on a probed machine (`comms/cost.py`), or from the link where these have one size alone; the power of a host
and the time between failures from the other systems. Frozen, from the catalog's links and power and from the constants
below: failures of one large published run, power of a data sheet.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

from turbopump.comms.cost import CollectiveModel
from turbopump.comms.ops import AllReduce
from turbopump.comms.textbook import predict_on_link
from turbopump.core.errors import CatalogError, ProfileError, UsageError
from turbopump.hardware.accelerators import link as find_link
from turbopump.hardware.profile import Measurement, Prediction, Trial
from turbopump.hardware.specs import DeviceSpec
from turbopump.planner.judged import Row
from turbopump.planner.machine import node_link
from turbopump.planner.operation_tables import BAD_ROW, Line, reason, spec_of

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
NETWORKS = ("infiniband-edr",)  # of DeepBench's clusters of 2016-2017; their table does not say it


def judge(path: Path, lines: Sequence[Line], *, frozen: bool) -> tuple[list[Row], list[str]]:
    """The rows of a table of COLUMNS with predictions, and those that could not be predicted, with the reason."""
    return _JUDGES[path.stem](path, lines, frozen)


# all-reduce -----------------------------------------------------------------------------------------------------------


def _intranode(path: Path, lines: Sequence[Line], frozen: bool) -> tuple[list[Row], list[str]]:
    def read(line: Line) -> tuple[str, str, AllReduce, float, str]:
        spec = spec_of(line["gpu"])
        op = AllReduce(int(line["bytes"]), int(line["ranks"]), "node")
        return line["gpu"], "default", op, float(line["time_us"]) / 1e6, node_link(spec)

    return _collectives(path, lines, read, frozen)


def _deepbench(path: Path, lines: Sequence[Line], frozen: bool) -> tuple[list[Row], list[str]]:
    """Every library is a route. On one host as far as `Single` says so or 4 ranks do, else over the network."""

    def read(line: Line) -> tuple[str, str, AllReduce, float, str]:
        spec, ranks = spec_of(line["platform"]), int(line["processors"])
        alone = "Single" in line["library"]
        op = AllReduce(4 * int(line["floats"]), ranks, "node" if alone else "rack")
        link = node_link(spec) if alone else NETWORKS[0]
        return line["platform"], line["library"], op, float(line["time_ms"]) / 1e3, link

    return _collectives(path, lines, read, frozen)


def _collectives(
    path: Path, lines: Sequence[Line], read: Callable[[Line], tuple[str, str, AllReduce, float, str]], frozen: bool
) -> tuple[list[Row], list[str]]:
    found: list[tuple[str, str, AllReduce, float, str]] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 2):
        try:
            device, route, op, seconds, link = read(line)
            if not 0 < seconds < math.inf:
                raise ValueError("no time is given")
            found.append((device, route, op, seconds, link))
        except BAD_ROW as error:
            problems.append(f"{path.name}:{number}: {reason(error)}")
    rows = []
    for device, route, op, seconds, link in found:
        others = [_measurement(o, s, r, d) for d, r, o, s, _ in found
                  if (d, r) == (device, route) and o.ranks != op.ranks]  # fmt: skip
        try:
            p = _all_reduce(op, route, [] if frozen else others, link)
        except (ProfileError, UsageError) as error:
            problems.append(f"{path.name}: {device} {op.key} by {route}: {error}")
            continue
        name = device if route == "default" else f"{device}/{route}"
        rows.append(Row(path.stem, f"{name}/{op.ranks} ranks", op.key, p.seconds, seconds, "s", p.low_s, p.high_s))
    return rows, problems


def _all_reduce(op: AllReduce, route: str, others: Sequence[Measurement], link: str) -> Prediction:
    sizes = Counter(row.op["ranks"] for row in others)
    if known := [row for row in others if sizes[row.op["ranks"]] > 1]:  # one size says nothing of another
        return CollectiveModel.of(known).predict(op, route)
    spec = find_link(link)
    return predict_on_link(op, spec if spec.level == op.level else replace(spec, level=op.level))


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
