"""Figures of the planner's memory: its error against published measurements, plans wrongly called fitting or not.

    error(published), false_fits(published), false_rejections(published)     plain numbers; `plan` makes rows of them

What cannot fit is known from four sources: runs whose measured peak is larger than a device (asked for every whole GiB
below it); the baselines of arXiv:2205.05198, figure 1, all "well over" 80 GB without recomputation; Llama 2 70B with
batches of 2, which torchtitan's docs/performance.md reports out of memory on 64 A100s where 1 ran; states that alone
exceed the device. What does fit: every published run that ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbopump.planner import memory_tables, tables
from turbopump.planner.cases import Case, Cases, DecoderShape, ParallelDims
from turbopump.planner.memory import GIB, SOFTWARE, Software, memory_bytes

LLAMA2_13B = DecoderShape(5120, 40, 40, 32000, 13824, tied=False, name="llama2-13b")
LLAMA2_70B = DecoderShape(8192, 80, 64, 32000, 28672, 8, tied=False, name="llama2-70b")
LLAMA3_8B, LLAMA3_70B = memory_tables.LLAMA_SHAPES["8B"], memory_tables.LLAMA_SHAPES["70B"]
SOFTWARE_OF = {"gpt_3d_parallel_runs": "megatron", "llm_published_runs": "megatron", "mpt_throughput": "foundry"}


@dataclass(frozen=True)
class Trial:
    """A case on a device, of which it is known whether it fits."""

    case: Case
    software: Software
    device_gib: float
    why: str


def error(published: Path) -> tuple[float, int, dict[str, float]]:
    """Mean absolute error of all memory rows, how many there are, and the mean by table."""
    by_table: dict[str, float] = {}
    errors: list[float] = []
    for name in memory_tables.COLUMNS:
        rows = memory_tables.read(published / f"{name}.csv").rows
        of_table = [abs(p / row.value - 1) for p, row in zip(memory_tables.predictions(rows), rows, strict=True)]
        by_table[name] = float(np.mean(of_table)) if of_table else float("nan")
        errors += of_table
    return float(np.mean(errors)), len(errors), by_table


def false_fits(published: Path) -> tuple[list[Trial], int]:
    """Trials known not to fit that the planner says do, and the number of trials."""
    trials = [*_over_measured(published), *_known_not_to_fit(), *_states_alone(published)]
    return [trial for trial in trials if _fits(trial)], len(trials)


def false_rejections(published: Path) -> tuple[list[Trial], int]:
    """Trials known to have run that the planner says do not fit, and the number of trials."""
    trials = [*_known_to_fit(), *_measured(published), *_ran(published)]
    return [trial for trial in trials if not _fits(trial)], len(trials)


def _fits(trial: Trial) -> bool:
    return bool(memory_bytes(Cases.of([trial.case]), trial.software).fits(trial.device_gib * GIB)[0])


def _peaks(published: Path) -> tuple[memory_tables.MeasuredMemory, ...]:
    return tuple(row for row in memory_tables.read(published / "torchtitan_runs.csv").rows if row.quantity == "peak")


def _over_measured(published: Path) -> Iterator[Trial]:
    for row in _peaks(published):
        for gib in range(8, int(np.ceil(row.value))):
            yield Trial(row.case, row.software, gib, f"{row.group}: {row.value} GiB measured")


def _measured(published: Path) -> Iterator[Trial]:
    for row in _peaks(published):
        yield Trial(row.case, row.software, row.device_gib, f"{row.group}: {row.value} GiB measured")


def _known_not_to_fit() -> Iterator[Trial]:
    for model in memory_tables.MEGATRON_CASES:
        case = memory_tables.megatron_case(model, "none")
        yield Trial(case, SOFTWARE["megatron"], 80, f"{model} without recomputation (arXiv:2205.05198, figure 1)")
    case = Case(LLAMA2_70B, 4096, 128, 2, ParallelDims(dp_shard=64), recompute="selective")
    yield Trial(case, SOFTWARE["torchtitan-2024"], 80, "Llama 2 70B, selective, batches of 2 (docs/performance.md)")


def _known_to_fit() -> Iterator[Trial]:
    for model in memory_tables.MEGATRON_CASES:
        case = memory_tables.megatron_case(model, "selective+seqpar")
        yield Trial(case, SOFTWARE["megatron"], 80, f"{model}, the present work (arXiv:2205.05198, figure 1)")
    for shape, seq_len, batch, recompute in (
        (LLAMA3_8B, 8192, 1, "selective"), (LLAMA3_70B, 8192, 1, "full"), (LLAMA2_13B, 4096, 2, "none"),
        (LLAMA2_13B, 4096, 2, "selective"), (LLAMA2_70B, 4096, 1, "selective"), (LLAMA2_70B, 4096, 2, "full"),
    ):  # fmt: skip
        case = Case(shape, seq_len, 64 * batch, batch, ParallelDims(dp_shard=64), recompute=recompute)  # type: ignore[arg-type]
        yield Trial(
            case, SOFTWARE["torchtitan-2024"], 80, f"{shape.params / 1e9:.0f}B {recompute} (docs/performance.md)"
        )


def _ran(published: Path) -> Iterator[Trial]:
    for name, software in SOFTWARE_OF.items():
        for row in tables.read(published / f"{name}.csv").rows:
            gib = 40.0 if "40gb" in row.choice else (row.machine.device.memory_bytes or 80 * GIB) / GIB
            yield Trial(row.case, SOFTWARE[software], gib, f"{name} {row.choice}")


def _states_alone(published: Path) -> Iterator[Trial]:
    """Published runs as they would be without any sharding of their states, where those alone exceed the device."""
    for trial in _ran(published):
        states = trial.case.shape.params * (
            trial.case.weight_bytes + trial.case.gradient_bytes + trial.case.optimizer_bytes
        )
        if states > trial.device_gib * GIB:
            case = Case(trial.case.shape, trial.case.seq_len, 8, 1, ParallelDims(dp_replicate=8), recompute="full")
            yield Trial(case, trial.software, trial.device_gib, f"{trial.why}: {states / GIB:.0f} GiB of states")
