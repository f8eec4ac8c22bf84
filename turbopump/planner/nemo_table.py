"""Published throughput of NVIDIA's Megatron-Bridge (its performance summary) as steps to be judged.

The summary is copied under several names of its columns (`gbs`, `#-GPUs`, `Tokens / sec / GPU`): each is found by any
of its known names, after capitals and signs are dropped. What it leaves unsaid: activations are kept (no recomputation
is stated), attention is fused, GB200 and GB300 share one NVLink domain of 72. Shapes are those of the models' own
configurations; DeepSeek's latent attention is taken as grouped queries of the same head size (11 % of its parameters).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from turbopump.core.errors import CatalogError, UsageError
from turbopump.hardware.specs import DeviceSpec
from turbopump.planner.cases import Case, DecoderShape, ParallelDims
from turbopump.planner.machine import DEVICES_PER_NODE, family, from_catalog
from turbopump.planner.operation_tables import BAD_ROW, read_lines, reason, spec_of
from turbopump.planner.rates import check_sizes
from turbopump.planner.tables import Measured, Table

NAME = "nemo_megatron_bridge_runs"
COLUMN_NAMES: Mapping[str, tuple[str, ...]] = {
    "model": ("model", "modelname"),
    "gpu": ("gpu", "accelerator", "system", "device", "gputype", "hardware", "platform"),
    "gpus": ("gpus", "numgpus", "ngpus", "accelerators", "worldsize"),
    "seq_len": ("seqlen", "sequencelength", "seqlength", "seq"),
    "global_batch": ("globalbatch", "gbs", "globalbatchsize"),
    "micro_batch": ("microbatch", "mbs", "microbatchsize", "localbatch"),
    "tp": ("tp", "tensorparallel"), "pp": ("pp", "pipelineparallel"), "cp": ("cp", "contextparallel"),
    "vp": ("vp", "vpp", "virtualpipeline", "virtualstages"), "ep": ("ep", "expertparallel"),
    "fsdp": ("fsdp",),
    "precision": ("precision", "dtype", "compute"),
    "tok_per_s_gpu": ("tokpersgpu", "tokenssecgpu", "tokenspersecgpu", "tokenspersecondpergpu", "tokenspersgpu",
                      "toksgpu"),
    "tflops_per_gpu": ("modeltflopspergpu", "tflopspergpu", "modeltflopsecgpu", "modeltflopssecgpu", "tflopssecgpu"),
}  # fmt: skip
NEEDED = ("model", "gpu", "gpus", "seq_len", "global_batch", "micro_batch")
SHAPES: Mapping[str, DecoderShape] = {
    "llama3.*405b": DecoderShape(16384, 126, 128, 128256, 53248, 8, tied=False, name="llama3-405b"),
    "llama3.*70b": DecoderShape(8192, 80, 64, 128256, 28672, 8, tied=False, name="llama3-70b"),
    "llama3.*8b": DecoderShape(4096, 32, 32, 128256, 14336, 8, tied=False, name="llama3-8b"),
    "llama2.*70b": DecoderShape(8192, 80, 64, 32000, 28672, 8, tied=False, name="llama2-70b"),
    "qwen3.*30b": DecoderShape(2048, 48, 32, 151936, 768, 4, 128, tied=False, experts=128, experts_per_token=8,
                               name="qwen3-30b-a3b"),
    "qwen3.*235b": DecoderShape(4096, 94, 64, 151936, 1536, 4, 128, tied=False, experts=128, experts_per_token=8,
                                name="qwen3-235b-a22b"),
    "deepseek.*v3": DecoderShape(7168, 61, 128, 129280, 2048, 8, 128, tied=False, experts=256, experts_per_token=9,
                                 name="deepseek-v3"),
    "gptoss.*120b": DecoderShape(2880, 36, 64, 201088, 2880, 8, 64, tied=False, experts=128, experts_per_token=4,
                                 name="gpt-oss-120b"),
    "gptoss.*20b": DecoderShape(2880, 24, 64, 201088, 2880, 8, 64, tied=False, experts=32, experts_per_token=4,
                                name="gpt-oss-20b"),
    "mixtral.*8x7b": DecoderShape(4096, 32, 32, 32000, 14336, 8, tied=False, experts=8, experts_per_token=2,
                                  name="mixtral-8x7b"),
    "gpt3.*175b": DecoderShape(12288, 96, 96, 51200, 49152, gated=False, learned_positions=2048, biases=True,
                               name="gpt3-175b"),
}  # fmt: skip
NVLINK_DOMAIN = {"gb200": 72, "gb300": 72}


def read(path: Path) -> Table:
    """The table at `path`; raises `UsageError` where columns that it cannot do without have no known name."""
    lines, columns = read_lines(path)
    found = columns_of(columns)
    lacking = [name for name in NEEDED if name not in found]
    if lacking or not {"tok_per_s_gpu", "tflops_per_gpu"} & found.keys():
        lacking += [] if {"tok_per_s_gpu", "tflops_per_gpu"} & found.keys() else ["tok_per_s_gpu or tflops_per_gpu"]
        raise UsageError(f"{path}: column {', '.join(lacking)} is lacking; it has {', '.join(columns) or 'none'}")
    rows: list[Measured] = []
    problems: list[str] = []
    for number, line in enumerate(lines, 2):
        try:
            rows.append(_row({name: line[column].strip() for name, column in found.items()}))
        except BAD_ROW as error:
            problems.append(f"{path.name}:{number}: {reason(error)}")
    return Table(NAME, tuple(rows), tuple(problems))


def columns_of(columns: tuple[str, ...]) -> dict[str, str]:
    """The table's own name of every column that is known."""
    plain = {re.sub(r"[^a-z]", "", column.lower()): column for column in reversed(columns)}
    return {
        name: plain[alias] for name, aliases in COLUMN_NAMES.items() for alias in reversed(aliases) if alias in plain
    }


def _row(cells: Mapping[str, str]) -> Measured:
    def number(name: str, otherwise: int = 1) -> int:
        text = cells.get(name, "").replace(",", "")
        return int(float(text)) if text and text.lower() not in ("n/a", "none", "-", "0") else otherwise

    spec, gpus = _device(cells["gpu"]), number("gpus", 0)
    domain = next((size for key, size in NVLINK_DOMAIN.items() if key in spec.name.lower()), DEVICES_PER_NODE)
    machine = from_catalog(spec, gpus, devices_per_node=min(domain, gpus), network="infiniband-ndr",
                           families=(family(spec), "megatron"))  # fmt: skip
    shape = _shape(cells["model"])
    tp, pp, cp, ep = (number(name) for name in ("tp", "pp", "cp", "ep"))
    if gpus % (tp * pp * cp):
        raise ValueError(f"{gpus} devices are not split by tp {tp} x pp {pp} x cp {cp}")
    dp, virtual = gpus // (tp * pp * cp), number("vp")
    sharded = number("fsdp", 0) > 0
    dims = ParallelDims(pp, 1 if sharded else dp, dp if sharded else 1, cp, tp, ep if shape.experts > 1 else 1)
    interleaved = virtual > 1 and pp > 1 and shape.layers % (pp * virtual) == 0
    case = Case(shape, number("seq_len", 0), number("global_batch", 0), number("micro_batch"), dims,
                dtype="fp8" if "fp8" in cells.get("precision", "").lower() else "bf16",
                schedule="interleaved" if interleaved else "1f1b", virtual_stages=virtual if interleaved else 1,
                sequence_parallel=tp > 1)  # fmt: skip
    check_sizes(case)
    step_s = _step_s(case, cells, gpus)
    if not 0 < step_s < 1e6:
        raise ValueError(f"a step of {step_s:g} s")
    group = f"{shape.name}/{spec.name}"
    choice = f"{group}/{gpus}/{case.seq_len}/{case.global_batch}/{case.dtype}"
    return Measured(NAME, group, choice, machine, case, step_s, cluster=f"{NAME}/{spec.name}")


def _step_s(case: Case, cells: Mapping[str, str], gpus: int) -> float:
    tokens = case.global_batch * case.seq_len
    if rate := cells.get("tok_per_s_gpu", "").replace(",", ""):
        return tokens / (float(rate) * gpus)
    shape = case.shape
    idle = shape.layers * (shape.experts - shape.experts_per_token) * shape.mlp_params if shape.experts > 1 else 0
    flops = 6.0 * tokens * (shape.params - idle)
    return flops / (float(cells["tflops_per_gpu"].replace(",", "")) * 1e12 * gpus)


def _device(text: str) -> DeviceSpec:
    name = text.strip().removeprefix("DGX").removeprefix("-").replace("NVIDIA", "").strip(" -")
    try:
        return spec_of(text)
    except CatalogError:
        return spec_of(name.lower())


def _shape(model: str) -> DecoderShape:
    plain = re.sub(r"[^a-z0-9]", "", model.lower().replace("llama3.1", "llama3").replace("llama-3.1", "llama3"))
    found = next((shape for pattern, shape in SHAPES.items() if re.search(pattern, plain)), None)
    if found is None:
        raise ValueError(f"the model {model!r} is not known (known: {', '.join(s.name for s in SHAPES.values())})")
    return found
