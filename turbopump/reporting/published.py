"""Our figures beside those published for DeepBench: what the devices of 2015-2019 took for the same operations.

The tables are not part of the project: a directory with deepbench_gemm.csv, deepbench_conv.csv or deepbench_rnn.csv,
whose columns docs/probe.md lists. A line of them is matched by its operation, dtype aside: it is the time of our best
route that works, in fp32, or in bf16 beside published tensor-core and half-precision times.
"""

from __future__ import annotations

import csv
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from turbopump.compute import deepbench
from turbopump.core.errors import UsageError
from turbopump.core.units import human, human_seconds
from turbopump.core.workload import Op
from turbopump.hardware.profile import MachineProfile, Measurement
from turbopump.reporting.probe_rows import op_words, usable

DTYPES = {"fp32": "fp32", "fp16in_fp32math": "bf16", "fp16": "bf16", "tensorcore": "bf16"}
"""Ours, by the precision of the tables."""
LABEL, CELL = 38, 10
Line = Mapping[str, str]


@dataclass(frozen=True)
class Published:
    """One published time: of a platform ("NV_P100 fp32"), for an operation of ours."""

    platform: str
    op: Op
    seconds: float


def read(directory: Path) -> list[Published]:
    """All times of the tables there are; raises `UsageError` where there are none, or not in this form."""
    readers: dict[str, Callable[[Line, str], Iterator[tuple[Op, float]]]] = {
        "gemm": _gemm, "conv": _convolution, "rnn": _recurrent,
    }  # fmt: skip
    found: list[Published] = []
    for family, reader in readers.items():
        path = directory / f"deepbench_{family}.csv"
        if not path.is_file():
            continue
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for line in csv.DictReader(file):
                    for op, seconds in reader(line, DTYPES[line["precision"]]):
                        found.append(Published(f"{line['platform']} {line['precision']}", op, seconds))
        except (KeyError, ValueError, TypeError, UnicodeDecodeError) as error:
            raise UsageError(f"--published: {path} is not in the form of docs/probe.md: {type(error).__name__} "
                             f"{error}") from error  # fmt: skip
    if not found:
        raise UsageError(f"--published: no DeepBench tables in {directory}: give a directory with deepbench_gemm.csv, "
                         "deepbench_conv.csv or deepbench_rnn.csv, in the form of docs/probe.md")  # fmt: skip
    return found


def _gemm(line: Line, dtype: str) -> Iterator[tuple[Op, float]]:
    op = deepbench.gemm(int(line["M"]), int(line["N"]), int(line["K"]), line["transA"], line["transB"], dtype)
    yield op, float(line["time_ms"]) * 1e-3


def _convolution(line: Line, dtype: str) -> Iterator[tuple[Op, float]]:
    w, h, c, n, k, s, r, pad_w, pad_h, stride_w, stride_h = (
        int(line[name]) for name in ("W", "H", "C", "N", "K", "S_filter_w", "R_filter_h", "pad_w", "pad_h", "stride_w",
                                     "stride_h")
    )  # fmt: skip
    op = deepbench.convolution(w, h, c, n, k, s, r, pad_w, pad_h, stride_w, stride_h, dtype)
    if line["fwd_ms"]:
        yield op, float(line["fwd_ms"]) * 1e-3
    if line["bwd_inputs_ms"]:
        yield replace(op, direction="input_gradient"), float(line["bwd_inputs_ms"]) * 1e-3
    if line["bwd_params_ms"]:
        yield replace(op, direction="weight_gradient"), float(line["bwd_params_ms"]) * 1e-3


def _recurrent(line: Line, dtype: str) -> Iterator[tuple[Op, float]]:
    op = deepbench.recurrent(line["cell"], int(line["hidden"]), int(line["batch"]), int(line["timesteps"]), dtype)
    if line["fwd_ms"]:
        yield op, float(line["fwd_ms"]) * 1e-3
    if line["bwd_inputs_ms"] and line["bwd_weights_ms"]:
        yield replace(op, backward=True), (float(line["bwd_inputs_ms"]) + float(line["bwd_weights_ms"])) * 1e-3


# ---- beside ours


def beside(profile: MachineProfile, published: list[Published], columns: int = 100) -> str:
    """A line an operation, ours and theirs, and how much faster each platform is in the median, by kind."""
    ours = _best(profile)
    matched: dict[str, dict[str, list[Published]]] = defaultdict(lambda: defaultdict(list))  # kind and dtype, operation
    for time in published:
        if (row := ours.get(time.op.key)) is not None:
            matched[f"{row.kind} {row.dtype}"][row.op_key].append(time)
    if not matched:
        return "none of the published operations was measured here: probe --suite deepbench measures them"
    lines = []
    for group, by_op in sorted(matched.items()):
        lines += [*_lines(group, by_op, ours, columns), ""]
    return "\n".join([*lines, *_medians(matched, ours)])


def _best(profile: MachineProfile) -> dict[str, Measurement]:
    """Our fastest row of each operation."""
    best: dict[str, Measurement] = {}
    for row in profile.rows:
        if usable(row) and (row.op_key not in best or row.seconds < best[row.op_key].seconds):
            best[row.op_key] = row
    return best


def _lines(
    group: str, by_op: Mapping[str, list[Published]], ours: Mapping[str, Measurement], columns: int
) -> Iterator[str]:
    """As many platforms as there is room for, those with most of the operations first."""
    counts: dict[str, int] = defaultdict(int)
    for times in by_op.values():
        for platform in {time.platform for time in times}:
            counts[platform] += 1
    shown = sorted(counts, key=lambda name: (-counts[name], name))[: max(1, (columns - LABEL) // CELL - 1)]
    yield _line(group, ["ours", *map(_short, shown)])
    for key, times in by_op.items():
        row, by_platform = ours[key], {time.platform: time.seconds for time in times}
        cells = [human_seconds(by_platform[name]) if name in by_platform else "" for name in shown]
        yield _line(op_words(row).removeprefix(row.kind).strip(), [human_seconds(row.seconds), *cells])


def _short(platform: str) -> str:
    name, precision = platform.split()
    return _clip(name.partition("_")[2] + ("" if precision == "fp32" else f" {precision[:4]}"), CELL - 1)


def _clip(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _line(name: str, cells: Iterable[str]) -> str:
    return (f"{_clip(name, LABEL - 1):<{LABEL}}" + "".join(f"{cell:>{CELL}}" for cell in cells)).rstrip()


def _medians(matched: Mapping[str, Mapping[str, list[Published]]], ours: Mapping[str, Measurement]) -> Iterator[str]:
    ratios: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for group, by_op in matched.items():
        kind = group.split()[0]
        for key, times in by_op.items():
            for time in times:
                ratios[time.platform][kind].append(ours[key].seconds / time.seconds)
    kinds = sorted({kind for by_kind in ratios.values() for kind in by_kind})
    yield _line("times as fast as this machine, median", kinds)
    for platform, by_kind in sorted(ratios.items()):
        yield _line(platform, (human(statistics.median(by_kind[kind])) if kind in by_kind else "" for kind in kinds))
