"""Published times of single operations as rows to be judged: products, convolutions, recurrent layers, softmax, rates.

    rows, problems = judge(Path("deepbench_gemm.csv"), frozen=False)

Predicted by the efficiency curves that the catalog ships (`hardware/catalog/curves.toml`), as for any machine that was
not probed. Cross-validated, a device is predicted without its own curves, from those of its relatives; curves are
fitted to one device each, so that leaving its own out is the whole of it. Frozen, a device's own curve is used where
it ships: rows of a device that has one were seen by it.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from turbopump.compute.cost import ComputeCost
from turbopump.compute.ops import Conv2d, Elementwise, Gemm, Norm, Rnn
from turbopump.core.errors import CatalogError, ProfileError, UsageError
from turbopump.core.workload import Op
from turbopump.hardware.accelerators import device as find_device
from turbopump.hardware.accelerators import reported_as
from turbopump.hardware.datasheet import curves, profile_from_datasheet
from turbopump.hardware.specs import DeviceSpec
from turbopump.planner.judged import Row
from turbopump.planner.rates import MOST

Line = Mapping[str, str]
BAD_ROW = (ValueError, KeyError, ArithmeticError, UsageError)
"""What reading a row of a table may raise, whatever stands in it; a `CatalogError` is a `UsageError`."""
DTYPES = {"fp32": "fp32", "fp16in_fp32math": "fp16", "fp16": "fp16", "tensorcore": "fp16", "fp16_tensorcore": "fp16",
          "bf16": "bf16", "fp8": "fp8", "int8": "int8", "tf32": "tf32"}  # fmt: skip
PLATFORMS = {"IA_KNL7250": "knl-7250", "NV_M40": "m40", "NV_T4": "t4", "AMD_MI25": "mi25", "AMD_VegaFE": "vega-fe",
             "AMD_Vega_FE": "vega-fe", "NV_1080Ti": "gtx-1080-ti", "IA_KNL": "knl-7250"}  # fmt: skip
"""DeepBench's names that are no alias of the catalog."""
CELLS = {"Vanilla": "vanilla", "GRU": "gru", "LSTM": "lstm"}
PASSES = {"fwd_ms": "forward", "bwd_inputs_ms": "input_gradient", "bwd_params_ms": "weight_gradient"}
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "deepbench_gemm": ("platform", "precision", "M", "N", "K", "transA", "transB", "time_ms"),
    "deepbench_conv": ("platform", "precision", "W", "H", "C", "N", "K", "S_filter_w", "R_filter_h", "pad_w", "pad_h",
                       "stride_w", "stride_h", "fwd_ms", "bwd_inputs_ms", "bwd_params_ms"),
    "deepbench_rnn": ("platform", "precision", "cell", "hidden", "batch", "timesteps", "fwd_ms", "bwd_inputs_ms",
                      "bwd_weights_ms"),
    "ops_a100_mi210": ("device", "op", "M_or_bytes", "N", "K", "time_ms", "value", "value_unit"),
    "matmul_achievable": ("dtype", "accelerator", "measured_tflops", "best_MxNxK"),
}  # fmt: skip


@dataclass(frozen=True)
class Timed:
    """An operation on a device, and its seconds."""

    group: str
    device: DeviceSpec
    op: Op
    seconds: float


def judge(path: Path, lines: Sequence[Line], *, frozen: bool) -> tuple[list[Row], list[str]]:
    """All operations of a table with predictions, in seconds; and the rows that were not understood, with why."""
    timed, problems = _read(path, lines)
    groups: dict[tuple[str, str, str], list[Timed]] = defaultdict(list)
    for row in timed:
        groups[row.group, row.device.name, getattr(row.op, "dtype", "")].append(row)
    rows: list[Row] = []
    for (group, _, _), members in groups.items():
        try:
            predictions = _cost(members[0].device, frozen).predict_many([m.op for m in members])
        except (CatalogError, ProfileError) as error:
            problems += [f"{path.name}: {group}, {m.op.key}: {error}" for m in members]
            continue
        rows += [
            Row(path.stem, group, m.op.key, p.seconds, m.seconds, "s", p.low_s, p.high_s)
            for m, p in zip(members, predictions)
        ]
    return rows, problems


def _cost(spec: DeviceSpec, frozen: bool) -> ComputeCost:
    known = [c for c in curves() if frozen or not _same(c.relative, spec)]
    return ComputeCost(profile_from_datasheet(spec, known=known), device=spec.name)


def _same(relative: str, spec: DeviceSpec) -> bool:
    try:
        return find_device(relative).name == spec.name
    except CatalogError:
        return False


def _read(path: Path, lines: Sequence[Line]) -> tuple[list[Timed], list[str]]:
    timed: list[Timed] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 2):
        try:
            found = [row for row in _READERS[path.stem](line) if 0 < row.seconds < math.inf]
            if not found:
                raise ValueError("no time is given")
            for row in found:
                _check(row.op)
            timed += found
        except BAD_ROW as error:
            problems.append(f"{path.name}:{number}: {reason(error)}")
    return timed, problems


def _check(op: Op) -> None:
    """Raises `ValueError` for an operation of sizes that cannot be."""
    for name, value in ((f.name, getattr(op, f.name)) for f in fields(op)):
        least = 0 if name.startswith("pad") else 1
        if isinstance(value, int) and not isinstance(value, bool) and not least <= value <= MOST:
            raise ValueError(f"{name} ({value}): a size from {least} to {MOST:g} is needed")
    if not 0 < op.cost.bytes < math.inf:
        raise ValueError(f"{op.key} moves {op.cost.bytes:g} bytes")


def reason(error: Exception) -> str:
    return f"no such value: {error}" if isinstance(error, KeyError) else str(error)


def spec_of(name: str) -> DeviceSpec:
    """A table's accelerator in the catalog; raises `CatalogError` where it has none of that name."""
    return reported_as(name) or find_device(PLATFORMS.get(name, name))


def _dtype(line: Line) -> str:
    if line["precision"] not in DTYPES:
        raise ValueError(f"the precision {line['precision']!r} is not known (known: {', '.join(DTYPES)})")
    return DTYPES[line["precision"]]


def _gemm(line: Line) -> Iterator[Timed]:
    layout = "".join({"N": "n", "T": "t"}[line[f"trans{side}"]] for side in "AB")
    op = Gemm(int(line["M"]), int(line["N"]), int(line["K"]), _dtype(line), layout)  # type: ignore[arg-type]
    yield Timed(_platform(line), spec_of(line["platform"]), op, float(line["time_ms"]) / 1e3)


def _conv(line: Line) -> Iterator[Timed]:
    names = ("N", "C", "H", "W", "K", "R_filter_h", "S_filter_w", "stride_h", "stride_w", "pad_h", "pad_w")
    sizes, spec = [int(line[name]) for name in names], spec_of(line["platform"])
    for column, direction in PASSES.items():
        if line[column]:
            op = Conv2d(*sizes, _dtype(line), direction=direction)  # type: ignore[call-arg, arg-type, misc]
            yield Timed(_platform(line), spec, op, float(line[column]) / 1e3)


def _rnn(line: Line) -> Iterator[Timed]:
    """The whole layer: forward; and both gradients together, where both were timed."""
    if line["cell"] not in CELLS:
        raise ValueError(f"the cell {line['cell']!r} is not known (known: {', '.join(CELLS)})")
    hidden, spec = int(line["hidden"]), spec_of(line["platform"])
    op = Rnn(CELLS[line["cell"]], int(line["batch"]), int(line["timesteps"]), hidden, hidden, False,  # type: ignore[arg-type]
             _dtype(line))  # fmt: skip
    if line["fwd_ms"]:
        yield Timed(_platform(line), spec, op, float(line["fwd_ms"]) / 1e3)
    if line["bwd_inputs_ms"] and line["bwd_weights_ms"]:
        both_s = (float(line["bwd_inputs_ms"]) + float(line["bwd_weights_ms"])) / 1e3
        yield Timed(_platform(line), spec, replace(op, backward=True), both_s)


def _platform(line: Line) -> str:
    return f"{line['platform']}/{line['precision']}"


def _ops(line: Line) -> Iterator[Timed]:
    """LLMCompass' own measurements, in fp16: products in milliseconds, the others in elements a second."""
    kind, spec, m = line["op"], spec_of(line["device"]), int(line["M_or_bytes"])
    group = f"{line['device']}/{kind}"
    if kind == "matmul_fp16":
        yield Timed(group, spec, Gemm(m, int(line["N"]), int(line["K"]), "fp16", "nn"), float(line["time_ms"]) / 1e3)
        return
    n = int(line["N"] or 1)
    made: Mapping[str, Op] = {
        "gelu": Elementwise("gelu", m * n, 1, 1, "fp16"),
        "layernorm": Norm("layer", m, n, "fp16"),
        "softmax": Elementwise("softmax", m * n, 1, 1, "fp16"),
    }
    if kind not in made:
        raise ValueError(f"the operation {kind!r} is not understood (known: matmul_fp16, {', '.join(made)})")
    yield Timed(group, spec, made[kind], m * n / (float(line["value"]) * 1e9))


def _achievable(line: Line) -> Iterator[Timed]:
    """The best rate anybody reached on an accelerator, with its shape."""
    m, n, k = (int(size) for size in line["best_MxNxK"].split("x"))
    op = Gemm(m, n, k, line["dtype"], "nn")
    yield Timed(f"{line['accelerator']}/{line['dtype']}", spec_of(line["accelerator"]), op,
                op.cost.flops / (float(line["measured_tflops"]) * 1e12))  # fmt: skip


_READERS: Mapping[str, Callable[[Line], Iterator[Timed]]] = {
    "deepbench_gemm": _gemm, "deepbench_conv": _conv, "deepbench_rnn": _rnn, "ops_a100_mi210": _ops,
    "matmul_achievable": _achievable,
}  # fmt: skip


def read_lines(path: Path) -> tuple[list[dict[str, str]], tuple[str, ...]]:
    """Rows and columns of a CSV file; raises `UsageError` where it cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            lines = [{k: v or "" for k, v in line.items() if k is not None} for line in reader]
            return lines, tuple(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
