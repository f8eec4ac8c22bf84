"""Published measurements of training steps, as cases with their machine, group and measured seconds.

    rows = read(Path("gpt_3d_parallel_runs.csv"))      every known table by the name of its file

What a table leaves unsaid (which software, what is recomputed) is written here, once, with the reason. A row that
cannot be understood becomes a `problem` with the reason, not an error: tables grow rows of new kinds.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from turbopump.core.errors import UsageError
from turbopump.hardware.accelerators import device as find_device
from turbopump.hardware.accelerators import reported_as
from turbopump.planner import rates
from turbopump.planner.cases import Case, DecoderShape, ParallelDims, Recompute
from turbopump.planner.machine import Machine, family, from_catalog

Row = Mapping[str, str]
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "gpt_3d_parallel_runs": ("set", "gpus", "global_batch", "micro_batch", "hidden", "heads", "layers", "seq_len", "tp",
                             "dp", "pp", "iter_ms"),
    "mpt_throughput": ("model", "seq_len", "gpus", "gpu", "micro_batch", "grad_accum", "tok_per_s_gpu", "precision",
                       "sharding", "act_ckpt"),
    "llm_published_runs": ("set", "params_b", "hidden", "layers", "heads", "seq_len", "tp", "pp", "gpus",
                           "global_batch", "metric", "value"),
    "torchtitan_runs": ("model", "gpus", "parallelism", "seq_len", "local_batch", "techniques", "act_ckpt",
                        "tok_per_s_gpu"),
}  # fmt: skip
MPT_SHAPES = {
    "125m": (768, 12, 12), "350m": (1024, 24, 16), "760m": (1536, 24, 12), "1b": (2048, 24, 16), "3b": (2560, 32, 20),
    "7b": (4096, 32, 32), "13b": (5120, 40, 40), "30b": (7168, 48, 56), "70b": (8192, 80, 64),
}  # fmt: skip
"""Hidden size, layers, heads: llm-foundry's own configurations; their parameters agree with the table's column."""
MEMORY_VARIANTS = {
    ("a100", "40gb"): (40 << 30, 1.555e12), ("h100", "96gb"): (96 << 30, 2.4e12), ("h100", "64gb"): (64 << 30, 2.0e12),
}  # fmt: skip
"""Memory and its rate, bytes and bytes a second, of parts that the catalog lists with another memory (data sheets)."""
LLAMA_SHAPES = {
    "8b": DecoderShape(4096, 32, 32, 128256, 14336, 8, tied=False, name="8b"),
    "70b": DecoderShape(8192, 80, 64, 128256, 28672, 8, tied=False, name="70b"),
    "405b": DecoderShape(16384, 126, 128, 128256, 53248, 8, tied=False, name="405b"),
    "7b": DecoderShape(4096, 32, 32, 32000, 11008, tied=False, name="7b"),
    "13b": DecoderShape(5120, 40, 40, 32000, 13824, tied=False, name="13b"),
}


@dataclass(frozen=True)
class Measured:
    """A measured step: the case, the machine it ran on, what must be left out together, and the seconds of a step."""

    table: str
    group: str
    """The model on its cluster: what cross-validation leaves out as one."""
    choice: str
    """Rows among which a planner would have chosen: one model, one batch, one number of devices."""
    machine: Machine
    case: Case
    step_s: float
    cluster: str = ""
    """The machine and software the row shares with others: their errors go together."""


@dataclass(frozen=True)
class Table:
    name: str
    rows: tuple[Measured, ...]
    problems: tuple[str, ...] = field(default=())
    """Rows that were not understood, each with the reason."""


def names() -> tuple[str, ...]:
    """Tables of step times that are known, by the stem of their file."""
    return tuple(COLUMNS)


def lines_of(path: Path, known: Mapping[str, Sequence[str]], what: str) -> list[dict[str, str]]:
    """The lines of a table that `known` has the columns of, by its name; raises `UsageError` as `read` does."""
    if path.stem not in known:
        raise UsageError(f"{path}: no such table of {what} (known: {', '.join(known)})")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            lines, columns = list(reader), tuple(reader.fieldnames or ())
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    needed = known[path.stem]
    if missing := [column for column in needed if column not in columns]:
        raise UsageError(f"{path} lacks {', '.join(missing)}: it needs the columns {', '.join(needed)}")
    return lines


def read(path: Path) -> Table:
    """The table at `path`, known by its name; raises `UsageError` for another name, a missing file or column."""
    name = path.stem
    lines = lines_of(path, COLUMNS, "step times")
    rows: list[Measured] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 2):
        try:
            measured = _READERS[name](line)
            rates.check_sizes(measured.case)
            if not 0 < measured.step_s < 1e6:
                raise ValueError(f"a step of {measured.step_s:g} s")
            rows.append(measured)
        except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, UsageError) as error:
            problems.append(f"{path.name}:{number}: {error}")
    return Table(name, tuple(rows), tuple(problems))


def _gpt(row: Row) -> Measured:
    """Megatron-LM on DGX A100s (vTrain's ground truth): fp16, unfused attention, all activations recomputed,
    gradients summed after the last backward. Four HDR ports a host."""
    n = {name: int(float(row[name])) for name in COLUMNS["gpt_3d_parallel_runs"][1:-1]}
    shape = _gpt_shape(n["hidden"], n["layers"], n["heads"], n["seq_len"])
    accelerator = row["set"].rpartition("_")[2].lower()
    machine = _machine(accelerator, n["gpus"], "infiniband-hdr", 4, "megatron")
    case = Case(shape, n["seq_len"], n["global_batch"], n["micro_batch"], ParallelDims(n["pp"], n["dp"], 1, 1, n["tp"]),
                recompute="full", dtype="fp16", fused_attention=False, gradient_bytes=2)  # fmt: skip
    model = f"h{n['hidden']}-l{n['layers']}"
    group = f"{row['set']}/{model}" + ("" if row["set"].startswith("single") else f"-{n['gpus']}")
    cluster = row["set"] if n["gpus"] <= machine.devices_per_node else f"{row['set']}-{n['gpus']}"
    return Measured("gpt_3d_parallel_runs", group, f"{model}/{n['gpus']}/{n['global_batch']}", machine, case,
                    float(row["iter_ms"]) / 1e3, cluster)  # fmt: skip


def _gpt_shape(hidden: int, layers: int, heads: int, seq_len: int) -> DecoderShape:
    return DecoderShape(hidden, layers, heads, 51200, 4 * hidden, gated=False, learned_positions=seq_len, biases=True,
                        name=f"gpt-{hidden}x{layers}")  # fmt: skip


def _mpt(row: Row) -> Measured:
    """llm-foundry: FSDP over all devices, FlashAttention (Triton), ALiBi or learned positions, Adam in fp32."""
    hidden, layers, heads = MPT_SHAPES[row["model"]]
    gpus, microbatch = int(row["gpus"]), int(row["micro_batch"])
    shape = DecoderShape(hidden, layers, heads, 50368, 4 * hidden, gated=False, learned_positions=int(row["seq_len"]),
                         name=row["model"])  # fmt: skip
    recompute: Recompute = "full" if row["act_ckpt"] == "True" else "none"
    sharded = row["sharding"] != "NO_SHARD"
    case = Case(shape, int(row["seq_len"]), microbatch * int(row["grad_accum"]) * gpus, microbatch,
                ParallelDims(dp_shard=gpus) if sharded else ParallelDims(dp_replicate=gpus), recompute=recompute,
                dtype="fp8" if "fp8" in row["precision"] else "bf16",
                reshard_after_forward=row["sharding"] == "FULL_SHARD")  # fmt: skip
    accelerator = row["gpu"].replace("_", "-")
    machine = _machine(accelerator, gpus, "infiniband-ndr" if "h100" in accelerator else "infiniband-hdr", 0, "foundry")
    tokens = case.global_batch * case.seq_len / gpus
    choice = f"{row['model']}/{row['gpu']}/{gpus}/{row['seq_len']}/{case.global_batch}"
    return Measured("mpt_throughput", row["model"], choice, machine, case, tokens / float(row["tok_per_s_gpu"]),
                    row["gpu"])  # fmt: skip


LLM_DEVICES = {"a100": "infiniband-hdr", "v100": "infiniband-edr", "h100": "infiniband-ndr", "h200": "infiniband-ndr"}
"""With the network of their usual hosts."""


def _llm(row: Row) -> Measured:
    """Megatron-LM's runs, on Selene (A100) unless the name of the set says another device: 16 bits, and full
    recomputation, which rates count, unless the column says otherwise.

    The microbatch was not published where the column is empty: 1 is taken, and the schedule is the plain one."""
    n = {name: int(float(row[name])) for name in ("hidden", "layers", "heads", "seq_len", "tp", "pp", "gpus",
                                                  "global_batch")}  # fmt: skip
    shape = _gpt_shape(n["hidden"], n["layers"], n["heads"], n["seq_len"])
    dims = ParallelDims(n["pp"], n["gpus"] // (n["tp"] * n["pp"]), 1, 1, n["tp"])
    microbatch = int(float(row.get("micro_batch") or 1))
    recompute = _recompute(row.get("recompute") or "full")
    accelerator = next((name for name in LLM_DEVICES if name in row["set"].lower()), "a100")
    case = Case(shape, n["seq_len"], n["global_batch"], microbatch, dims, recompute=recompute,
                dtype="fp16" if accelerator in ("a100", "v100") else "bf16", fused_attention=False, gradient_bytes=2,
                sequence_parallel="seqpar" in (row.get("recompute") or ""))  # fmt: skip
    group = f"{row['set']}/{row['params_b']}"
    machine = _machine(accelerator, n["gpus"], LLM_DEVICES[accelerator], 0, "megatron")
    step_s = rates.step_s(row["metric"], row.get("unit") or "", float(row["value"]), case, machine)
    choice = f"{group}/{n['gpus']}/{n['global_batch']}"
    return Measured("llm_published_runs", group, choice, machine, case, step_s, row["set"])


def _torchtitan(row: Row) -> Measured:
    """torchtitan: bf16 with fp32 weights, FSDP2, fused attention; H100s of 2.4 TB/s unless the row says H200."""
    size = next((key for key in LLAMA_SHAPES if f"-{key}" in row["model"].lower()), "")
    if not size:
        raise ValueError(f"the model {row['model']!r} is not known (known: {', '.join(LLAMA_SHAPES)})")
    splits = {"FSDP": 1, "TP": 1, "CP": 1, "PP": 1, "HSDP": 1}
    for part in row["parallelism"].replace("+", " ").replace(",", " ").split():
        key = part.rstrip("0123456789")
        if key not in splits or key == part:
            raise ValueError(f"the split {part!r} is not understood (known: {', '.join(splits)} with a number)")
        splits[key] = int(part[len(key) :])
    gpus = int(row["gpus"])
    dims = ParallelDims(splits["PP"], gpus // (splits["FSDP"] * splits["TP"] * splits["CP"] * splits["PP"]),
                        splits["FSDP"], splits["CP"], splits["TP"])  # fmt: skip
    local, seq_len = int(row["local_batch"]), int(row["seq_len"] or 8192)
    microbatch = local if dims.pp == 1 else 1
    techniques = row["techniques"].lower()
    case = Case(LLAMA_SHAPES[size], seq_len, local * dims.dp, microbatch, dims,
                recompute=_recompute(row["act_ckpt"]),
                dtype="fp8" if "float8" in techniques else "bf16", compiled="compile" in techniques,
                sequence_parallel=dims.tp > 1)  # fmt: skip
    machine = _machine(
        "h200" if "h200" in row["model"].lower() else "h100-96gb", gpus, "infiniband-ndr", 0, "torchtitan"
    )
    tokens = case.global_batch * seq_len / gpus
    group = f"{row['model']}/{gpus}/{row['parallelism']}"
    return Measured("torchtitan_runs", group, f"{group}/{row['techniques']}", machine, case,
                    tokens / float(row["tok_per_s_gpu"]), machine.device.name)  # fmt: skip


def _recompute(said: str) -> Recompute:
    return "full" if said == "full" else "selective" if "sel" in said else "none"


def _machine(accelerator: str, gpus: int, network: str, ports_per_node: int, software: str) -> Machine:
    """A cluster of a table's accelerator, by the catalog's name or by that of its generation."""
    known = reported_as(accelerator)
    generation, _, size = accelerator.partition("-")
    spec = known or find_device(generation)
    if not known and (rates := MEMORY_VARIANTS.get((generation, size))):
        spec = replace(spec, memory_bytes=rates[0], memory_bytes_per_s=rates[1])
    return from_catalog(spec, gpus, devices_per_node=8, network=network, ports_per_node=ports_per_node,
                        families=(family(spec), software))  # fmt: skip


_READERS: Mapping[str, Callable[[Row], Measured]] = {
    "gpt_3d_parallel_runs": _gpt, "mpt_throughput": _mpt, "llm_published_runs": _llm, "torchtitan_runs": _torchtitan,
}  # fmt: skip
