"""Published measurements of memory, as cases with what was measured of them.

    rows = read(Path("megatron_memory.csv"))      or torchtitan_runs.csv: its rows that give GiB
    predictions(rows)                             in the unit of each row

What a table leaves unsaid is written here, once, with the reason. A row that is not understood becomes a `problem`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from turbopump.core.errors import UsageError
from turbopump.planner.cases import Case, Cases, DecoderShape, ParallelDims, Recompute
from turbopump.planner.memory import GIB, SOFTWARE, MemoryUse, Software, memory_bytes
from turbopump.planner.rates import check_sizes
from turbopump.planner.tables import lines_of

Row = Mapping[str, str]
Quantity = Literal["peak", "states", "activations", "activations_relative"]
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "megatron_memory": ("model", "recompute", "quantity", "value", "unit"),
    "torchtitan_runs": ("model", "gpus", "parallelism", "seq_len", "local_batch", "techniques", "act_ckpt",
                        "memory_GiB", "source"),
}  # fmt: skip


@dataclass(frozen=True)
class MeasuredMemory:
    """One published figure: GiB on the fullest rank, or percent of another case's activations (`relative_to`)."""

    table: str
    group: str
    """The model on its cluster: what cross-validation leaves out as one."""
    case: Case
    software: Software
    quantity: Quantity
    value: float
    device_gib: int
    """Memory of the device it ran on."""
    relative_to: Case | None = None


@dataclass(frozen=True)
class MemoryTable:
    name: str
    rows: tuple[MeasuredMemory, ...]
    problems: tuple[str, ...]
    """Rows that were not understood, each with the reason."""


def read(path: Path) -> MemoryTable:
    """The table at `path`, known by its name; raises `UsageError` for another name, a missing file or column."""
    name = path.stem
    lines = lines_of(path, COLUMNS, "memory")
    rows: list[MeasuredMemory] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 2):
        try:
            if (row := _READERS[name](line)) is not None:
                check_sizes(row.case)
                rows.append(row)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, UsageError) as error:
            problems.append(f"{path.name}:{number}: {error}")
    return MemoryTable(name, tuple(rows), tuple(problems))


def predictions(rows: Sequence[MeasuredMemory]) -> NDArray[np.float64]:
    """What the model of memory says of each row, in the row's own unit (GiB or percent)."""
    return np.array([_predict(row) for row in rows])


def _predict(row: MeasuredMemory) -> float:
    use = _use(row.case, row.software)
    if row.quantity == "peak":
        return float(use.worst[0]) / GIB
    if row.quantity == "states":  # of a stage without embedding and head: the paper's figure counts 12 h^2 a layer
        return float(use.layer_states[1, 0]) / GIB
    if row.relative_to is None:
        return float(use.layer_activations[0, 0]) / GIB
    return 100 * float((use.layer_activations / _use(row.relative_to, row.software).layer_activations)[0, 0])


def _use(case: Case, software: Software) -> MemoryUse:
    return memory_bytes(Cases.of([case]), software)


def _gpt(hidden: int, layers: int, heads: int) -> DecoderShape:
    return DecoderShape(hidden, layers, heads, 51200, 4 * hidden, gated=False, learned_positions=2048, biases=True)


MEGATRON_CASES = {
    "22B": Case(_gpt(6144, 48, 64), 2048, 4, 4, ParallelDims(tp=8)),
    "175B": Case(_gpt(12288, 96, 96), 2048, 64, 1, ParallelDims(tp=8, pp=8), schedule="interleaved", virtual_stages=3),
    "530B": Case(_gpt(20480, 105, 128), 2048, 280, 1, ParallelDims(tp=8, pp=35), schedule="interleaved",
                 virtual_stages=3),
    "1T": Case(_gpt(25600, 128, 160), 2048, 512, 1, ParallelDims(tp=8, pp=64)),
}  # fmt: skip
"""arXiv:2205.05198, table 3: batch, microbatch, tensor and pipeline parallel sizes, interleaving."""


def megatron_case(model: str, recompute: str) -> Case:
    """A row of arXiv:2205.05198, figures 1 and 7: fp16 or bf16 with fp32 masters, dropout, attention not fused."""
    base = next((MEGATRON_CASES[key] for key in MEGATRON_CASES if model.upper().startswith(key)), None)
    if base is None:
        raise ValueError(f"the model {model!r} is not known (known: {', '.join(MEGATRON_CASES)})")
    modes = {"none": "none", "seqpar": "none", "selective": "selective", "full": "full"}
    parts = recompute.split("+")
    if unknown := [part for part in parts if part not in modes]:
        raise ValueError(f"recompute {unknown[0]!r} is not known (known: {', '.join(modes)}, joined by +)")
    mode: Recompute = "full" if "full" in parts else "selective" if "selective" in parts else "none"
    return replace(base, recompute=mode, sequence_parallel="seqpar" in parts, fused_attention=False, dtype="fp16")


def _megatron(row: Row) -> MeasuredMemory:
    quantities: Mapping[str, Quantity] = {
        "params_and_optimizer": "states", "activations": "activations", "activations_relative": "activations_relative",
    }  # fmt: skip
    if row["quantity"] not in quantities:
        raise ValueError(f"the quantity {row['quantity']!r} is not known (known: {', '.join(quantities)})")
    quantity = quantities[row["quantity"]]
    reference = megatron_case(row["model"], "none") if quantity == "activations_relative" else None
    return MeasuredMemory("megatron_memory", f"megatron/{row['model']}", megatron_case(row["model"], row["recompute"]),
                          SOFTWARE["megatron"], quantity, float(row["value"]), 80, reference)  # fmt: skip


LLAMA_SHAPES = {
    "8B": DecoderShape(4096, 32, 32, 128256, 14336, 8, tied=False),
    "70B": DecoderShape(8192, 80, 64, 128256, 28672, 8, tied=False),
    "405B": DecoderShape(16384, 126, 128, 128256, 53248, 8, tied=False),
}


def torchtitan_case(row: Row) -> Case:
    """torchtitan: bf16 with fp32 weights, FSDP2, fused attention, sequences of 8192 where none are said.

    A pipeline has by default as many microbatches as it has stages in all and does not reshard after forward; two
    stages a rank where the schedule is interleaved, since the row does not say how many.
    """
    size = next((key for key in LLAMA_SHAPES if re.search(rf"\b{key}\b", row["model"], re.IGNORECASE)), None)
    if size is None:
        raise ValueError(f"the model {row['model']!r} is not known (known: {', '.join(LLAMA_SHAPES)})")
    splits = dict.fromkeys(("FSDP", "TP", "CP", "PP"), 1)
    for part in re.split(r"[\s,+]+", row["parallelism"].strip().upper()):
        if re.fullmatch(r"[1-5]D", part):
            continue
        found = re.fullmatch(r"([A-Z]+)(\d+)", part)
        if not found or found[1] not in splits:
            raise ValueError(f"the split {part!r} is not understood (known: {', '.join(splits)} with a number)")
        splits[found[1]] = int(found[2])
    pp, inner = splits["PP"], splits["FSDP"] * splits["TP"] * splits["CP"] * splits["PP"]
    dims = ParallelDims(pp, max(1, int(row["gpus"]) // inner), splits["FSDP"], splits["CP"], splits["TP"])
    local, techniques = int(row["local_batch"]), row["techniques"].lower()
    chunks = 2 if "interleaved" in techniques else 1
    recompute: Recompute = (
        "full" if "full" in row["act_ckpt"] else "selective" if "selective" in row["act_ckpt"] else "none"
    )
    microbatch = max(1, local // (pp * chunks)) if pp > 1 else local
    return Case(
        LLAMA_SHAPES[size], int(row["seq_len"] or 8192), local * dims.dp, microbatch, dims,
        recompute=recompute, dtype="fp8" if "float8" in techniques else "bf16", compiled="compile" in techniques,
        sequence_parallel=dims.tp > 1, reshard_after_forward=pp == 1,
        schedule="interleaved" if chunks > 1 else "1f1b", virtual_stages=chunks,
    )  # fmt: skip


def _torchtitan(row: Row) -> MeasuredMemory | None:
    if not row["memory_GiB"]:
        return None  # a row of throughput alone
    month = re.search(r"_(20\d\d)-?(\d\d)_", row["source"])
    old = month is not None and month[1] + month[2] < "202503"
    memory = re.search(r"H100 (\d+) ?GB", row["source"])
    device_gib = int(memory[1]) if memory else 141 if "H200" in row["model"] + row["source"] else 80
    return MeasuredMemory("torchtitan_runs", f"{row['model']}/{row['gpus']}", torchtitan_case(row),
                          SOFTWARE["torchtitan-2024" if old else "torchtitan"], "peak", float(row["memory_GiB"]),
                          device_gib)  # fmt: skip


_READERS: Mapping[str, Callable[[Row], MeasuredMemory | None]] = {
    "megatron_memory": _megatron, "torchtitan_runs": _torchtitan,
}  # fmt: skip
