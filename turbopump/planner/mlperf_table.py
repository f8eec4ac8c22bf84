"""MLPerf's training results as steps to be judged, where the transformer is known: GPT-3, Llama 2 70B by LoRA.

The minutes of a result hold luck of convergence; the throughput that the run tracked does not, so that is judged. The
split over devices is not in the table: the fastest of the usual ones is taken, as a submitter would have tuned it.
Frozen weights (LoRA) need no gradient of them: of the three products of a training step two are computed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from turbopump.core.errors import CatalogError, TurbopumpError
from turbopump.hardware.specs import DeviceSpec
from turbopump.planner.cases import Case, DecoderShape, ParallelDims
from turbopump.planner.judged import Array, Row
from turbopump.planner.machine import Machine, family, from_catalog
from turbopump.planner.operation_tables import BAD_ROW, Line, read_lines, reason, spec_of
from turbopump.planner.tables import Measured

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "mlperf_training": ("submitter", "system", "benchmark", "accelerator", "accelerators", "nodes", "global_batch",
                        "tracked_throughput_median"),
}  # fmt: skip
GPT3 = DecoderShape(12288, 96, 96, 51200, 49152, gated=False, learned_positions=2048, biases=True, name="gpt3-175b")
LLAMA2_70B = DecoderShape(8192, 80, 64, 32000, 28672, 8, tied=False, name="llama2-70b")
SHAPES = {"gpt3": (GPT3, 2048, False), "gpt-3": (GPT3, 2048, False), "llama2_70b_lora": (LLAMA2_70B, 8192, True)}
"""Shape, sequence length, whether the weights are frozen: the rules of the benchmark."""
FROZEN_SHARE = 2 / 3
PLAUSIBLE = (0.02, 1.0)  # share of the peak by which the unit of a throughput is told


@dataclass(frozen=True)
class Result:
    """One result: the options of splitting it, all of one machine, and the measured seconds of a step."""

    label: str
    group: str
    options: tuple[Measured, ...]
    frozen_weights: bool
    step_s: float


def read(path: Path) -> tuple[list[Result], list[str]]:
    """Results whose transformer is known; all others as problems, with the reason."""
    results: list[Result] = []
    problems: list[str] = []
    for number, line in enumerate(read_lines(path)[0], 2):
        try:
            results.append(_result(line))
        except BAD_ROW as error:
            problems.append(f"{path.name}:{number}: {reason(error)}")
    return results, problems


class StepModel(Protocol):
    """What predicts the options, as in `validate.StepModel`."""

    def seconds(self, rows: Sequence[Measured]) -> Array: ...

    def half_widths(self, rows: Sequence[Measured]) -> Array | None: ...


def predict(results: Sequence[Result], model: StepModel, problems: list[str]) -> list[Row]:
    """Seconds a step of the fastest option of each result, with its band where the model has one."""
    rows = []
    for result in results:
        try:
            times_s, widths = model.seconds(result.options), model.half_widths(result.options)
        except TurbopumpError as error:
            problems.append(f"mlperf_training.csv: {result.label}: {error}")
            continue
        first = int(np.argmin(np.where(np.isfinite(times_s), times_s, np.inf)))
        predicted_s = float(times_s[first]) * (FROZEN_SHARE if result.frozen_weights else 1.0)
        off = math.nan if widths is None else float(widths[first])
        rows.append(Row("mlperf_training", result.group, result.label, predicted_s, result.step_s, "s",
                        predicted_s * math.exp(-off), predicted_s * math.exp(off)))  # fmt: skip
    return rows


def _result(line: Line) -> Result:
    benchmark = line["benchmark"].lower()
    if benchmark not in SHAPES:
        raise ValueError(f"{line['benchmark']}: its model is no transformer known here (known: {', '.join(SHAPES)})")
    if not line["tracked_throughput_median"]:
        raise ValueError("no throughput was tracked, and minutes to converge hold luck")
    shape, seq_len, frozen = SHAPES[benchmark]
    spec = _accelerator(line["accelerator"])
    devices, nodes, batch = int(line["accelerators"]), max(1, int(line["nodes"] or 1)), int(line["global_batch"])
    machine = from_catalog(spec, devices, devices_per_node=max(1, devices // nodes), network="infiniband-ndr",
                           families=(family(spec), "megatron"))  # fmt: skip
    step_s = _step_s(line, shape, seq_len, batch, machine)
    group, label = f"{benchmark}/{spec.name}/{devices}", f"{line['submitter']} {line['system']}"
    options = tuple(
        Measured("mlperf_training", group, label, machine, case, step_s)
        for case in _options(shape, seq_len, batch, machine)
    )
    if not options:
        raise ValueError(f"a batch of {batch} over {devices} devices is split by none of the usual ways")
    return Result(label, group, options, frozen, step_s)


def _accelerator(name: str) -> DeviceSpec:
    """`NVIDIA H100-SXM5-80GB (...)` as the catalog writes it."""
    words = name.replace("(R)", "").split("(")[0].replace(" AI Accelerator", "").strip()
    kinds = words.replace("-SXM5", "-sxm").replace("-SXM4", "-sxm").replace("NVIDIA ", "").lower().split("-")
    tried = [name, words, "-".join(kinds), "-".join(kinds[:2]), kinds[0]]
    for attempt in tried:
        try:
            return spec_of(attempt)
        except CatalogError:
            continue
    raise CatalogError(f"the accelerator {name!r} is not in the catalog (tried: {', '.join(dict.fromkeys(tried))})")


def _step_s(line: Line, shape: DecoderShape, seq_len: int, batch: int, machine: Machine) -> float:
    """Submitters track samples a second, tokens a second or tokens a second and device: only one of them is possible,
    since they differ by the length of a sequence and the number of devices."""
    rate, flops = float(line["tracked_throughput_median"]), 6.0 * shape.params * seq_len
    peak = machine.peak_flops_per_s("fp8") * machine.num_devices
    tokens = rate / seq_len
    readings = {"samples/s": rate, "tokens/s": tokens, "tokens/s of a device": tokens * machine.num_devices}
    possible = [samples for samples in readings.values() if PLAUSIBLE[0] < samples * flops / peak < PLAUSIBLE[1]]
    if not possible:
        raise ValueError(f"a throughput of {rate:g} is possible in no unit known here ({', '.join(readings)})")
    return batch / possible[0]


def _options(shape: DecoderShape, seq_len: int, batch: int, machine: Machine) -> list[Case]:
    """Tensor parallelism within a host, pipelines, context parallelism; microbatches of one sequence; what divides."""
    found = []
    dtype = "fp8" if "fp8" in machine.device.flops_per_s else "bf16"
    for tp in (t for t in (1, 2, 4, 8) if t <= machine.devices_per_node):
        for pp in (1, 2, 4, 8, 16):
            for cp in (1, 2, 4):
                inner = tp * pp * cp
                if machine.num_devices % inner or machine.num_devices < inner:
                    continue
                dims = ParallelDims(pp, machine.num_devices // inner, 1, cp, tp)
                case = Case(shape, seq_len, batch, 1, dims, dtype=dtype, sequence_parallel=tp > 1)
                if not case.problems() and _holds(case, machine):
                    found.append(case)
    return found


def _holds(case: Case, machine: Machine) -> bool:
    """Whether 16-bit weights leave a quarter of the device free: what is fast but impossible is no option."""
    held = 2.0 * case.shape.params / (case.dims.tp * case.dims.pp)
    return machine.device.memory_bytes is None or held < 0.75 * machine.device.memory_bytes
