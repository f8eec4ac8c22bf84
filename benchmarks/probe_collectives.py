"""How well collectives are predicted at sizes that were never measured: rows of `benchmarks.probe`.

Here: all-reduce over gloo on a dense grid (about three sizes to a factor of 2), again and again in alternating order;
every second size is predicted from the others. Published: NVLink nodes (vTrain's tables) and DeepBench's all-reduce;
every size of a number of ranks is left out in turn and predicted from all other rows of the device. Smallest and
largest sizes are left out too, so part of that is extrapolation. A straight line between neighbours in logarithms, and
one `alpha + beta * bytes` for all sizes, are the peers.
"""

from __future__ import annotations

import csv
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, Target
from turbopump.comms.bench import measure
from turbopump.comms.cost import CollectiveModel
from turbopump.comms.curves import fit_line
from turbopump.comms.ops import AllReduce
from turbopump.core.errors import TurbopumpError
from turbopump.hardware.profile import Measurement, Request, Trial
from turbopump.hardware.timing import Timing

PUBLISHED = Path(__file__).parents[1].parent / "shared" / "published"
TARGET = Target(
    "probe.interp_collective", "the same for collectives at sizes never measured", "lower", 0.10, "fraction"
)
INTRANODE = Target("probe.interp_collective_intranode", "published: A100 and V100 nodes (vTrain)", "lower", None,
                   "fraction")  # fmt: skip
DEEPBENCH = Target("probe.interp_collective_deepbench", "published: DeepBench's all-reduce, 5 platforms", "lower", None,
                   "fraction")  # fmt: skip
SIZES = sorted({int(2 ** (power / 3)) // 4 * 4 for power in range(9, 79)})  # 8 B to 64 MiB
Errors = list[float]


def rows(quick: bool) -> list[Row]:
    """The figure of this machine, and of the published tables where they stand beside the project."""
    found = [_row(TARGET, errors_here(quick))]
    for target, read in ((INTRANODE, read_intranode), (DEEPBENCH, read_deepbench)):
        if PUBLISHED.is_dir():
            found.append(_row(target, errors_published(read(PUBLISHED))))
    return found


def _row(target: Target, errors: Mapping[str, Errors]) -> Row:
    """Medians; the spread is the bootstrap interval of ours."""
    ours = np.array(errors["ours"])
    picks = np.random.default_rng(0).integers(0, len(ours), (4000, len(ours)))
    low, high = np.quantile(np.median(ours[picks], axis=1), [0.025, 0.975])
    peers = {name: float(np.median(found)) for name, found in errors.items() if name != "ours"}
    return target.row(float(np.median(ours)), runs=len(ours), spread=(float(low), float(high)), peers=peers)


def errors_here(quick: bool) -> dict[str, Errors]:
    """Relative errors at every second size of gloo between 2 processes, each known by its least time over the rounds.

    That is the rule of `probe_interpolation` too: other programs only ever add. `of_medians` is what it would be were
    each size known by the median over those rounds in which others took least of the machine. Raises `TurbopumpError`
    where gloo does not run here.
    """
    sizes = SIZES[::3] if quick else SIZES
    rounds = measure_here(sizes, rounds=3 if quick else 12)
    errors = _second_sizes([_least(found) for found in rounds])
    return {**errors, "of_medians": _second_sizes([_of_quiet(found) for found in rounds])["ours"]}


def _second_sizes(measured: Sequence[Measurement]) -> dict[str, Errors]:
    given, asked = measured[::2], measured[1::2]
    return _errors((given, row) for row in asked if int(row.op["bytes"]) < int(given[-1].op["bytes"]))


def measure_here(sizes: Sequence[int], rounds: int, row_s: float = 0.04) -> list[list[Measurement]]:
    """`rounds` rows a size, sizes ascending; measured up and down in turns."""
    forward = [Trial(AllReduce(size, 2), "gloo") for size in sizes]
    order = [trial for number in range(rounds) for trial in (forward if number % 2 == 0 else forward[::-1])]
    until = time.monotonic() + 60 + 10 * len(order) * row_s
    by_size: dict[int, list[Measurement]] = defaultdict(list)
    for row in measure(order, Request(max_ranks=2, row_s=row_s), until):
        if not row.works:
            raise TurbopumpError(f"{row.key}: {row.problem}")
        by_size[int(row.op["bytes"])].append(row)
    return [found for _, found in sorted(by_size.items())]


def _least(found: Sequence[Measurement]) -> Measurement:
    least = min(found, key=lambda row: row.min_s or row.seconds)
    return replace(least, median_s=least.min_s or least.seconds)


def _of_quiet(found: Sequence[Measurement]) -> Measurement:
    quiet = sorted(found, key=lambda row: row.waited)[: -(-len(found) // 2)]
    return replace(quiet[0], median_s=float(np.median([row.seconds for row in quiet])))


def errors_published(devices: Mapping[str, Sequence[Measurement]]) -> dict[str, Errors]:
    """Relative errors of all sizes of numbers of ranks with at least 3, each from all other rows of its device."""

    def left_out() -> Iterator[tuple[Sequence[Measurement], Measurement]]:
        for found in devices.values():
            for row in found:
                if sum(other.op["ranks"] == row.op["ranks"] for other in found) >= 3:
                    yield [other for other in found if other is not row], row

    return _errors(left_out())


def _errors(cases: Iterable[tuple[Sequence[Measurement], Measurement]]) -> dict[str, Errors]:
    errors: dict[str, Errors] = {"ours": [], "line_in_logarithms": [], "one_alpha_beta": []}
    known: tuple[Sequence[Measurement], CollectiveModel] | None = None
    for given, row in cases:
        if known is None or known[0] is not given:
            known = given, CollectiveModel.of(given)
        op = AllReduce(int(row.op["bytes"]), int(row.op["ranks"]))
        for name, seconds in (
            ("ours", known[1].predict(op).seconds),
            ("line_in_logarithms", _in_logarithms(given, op)),
            ("one_alpha_beta", _one_line(given, op)),
        ):
            errors[name].append(abs(seconds / row.seconds - 1))
    return errors


def _points(given: Sequence[Measurement], op: AllReduce) -> list[tuple[float, float]]:
    return sorted((float(row.op["bytes"]), row.seconds) for row in given if row.op["ranks"] == op.ranks)


def _in_logarithms(given: Sequence[Measurement], op: AllReduce) -> float:
    """A line in logarithms through the two nearest sizes, beyond the ends through the last two."""
    sizes, seconds = np.log(_points(given, op)).T
    upper = int(np.clip(np.searchsorted(sizes, np.log(op.bytes)), 1, len(sizes) - 1))
    slope = (seconds[upper] - seconds[upper - 1]) / (sizes[upper] - sizes[upper - 1])
    return float(np.exp(seconds[upper] + slope * (np.log(op.bytes) - sizes[upper])))


def _one_line(given: Sequence[Measurement], op: AllReduce) -> float:
    alpha, beta, _ = fit_line(_points(given, op))
    return alpha + beta * op.bytes


def read_intranode(directory: Path) -> dict[str, list[Measurement]]:
    """By GPU: all-reduces within a node, of vTrain's tables."""
    found: dict[str, list[Measurement]] = defaultdict(list)
    with (directory / "allreduce_intranode.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            op = AllReduce(int(line["bytes"]), int(line["ranks"]))
            found[line["gpu"]].append(_published(op, float(line["time_us"]) * 1e-6))
    return found


def read_deepbench(directory: Path) -> dict[str, list[Measurement]]:
    """By platform: DeepBench's all-reduces of fp32; of several libraries the fastest at a size and number of ranks."""
    fastest: dict[str, dict[AllReduce, float]] = defaultdict(dict)
    with (directory / "deepbench_allreduce.csv").open(newline="") as file:
        for line in csv.DictReader(file):
            op, seconds = AllReduce(4 * int(line["floats"]), int(line["processors"])), float(line["time_ms"]) * 1e-3
            known = fastest[line["platform"]]
            known[op] = min(seconds, known.get(op, seconds))
    return {name: [_published(op, seconds) for op, seconds in known.items()] for name, known in fastest.items()}


def _published(op: AllReduce, seconds: float) -> Measurement:
    timing = Timing("wall", 1, 1, seconds, seconds, seconds, seconds, 0.0)
    return Measurement.of(Trial(op, "published", device="cuda"), "comms", timing)
