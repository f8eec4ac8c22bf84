"""What is to be planned, however it was described: a recipe, a Hugging Face `config.json`, or a `workload.json`.

    subject = read_subject(Path("recipes/lm-stdlib.toml"))
    subject.case        how a decoder would be trained as the recipe says it; None where the model is no decoder
    subject.workload    its operations: all that is known of other models, which are split over data only

A recipe says batch, sequence, precision and steps; the other two say the model alone, and the rest is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from turbopump.core import plugins
from turbopump.core.config import Config, load, to_table, to_toml
from turbopump.core.errors import ConfigError, DatasetError, UsageError
from turbopump.core.files import digest, from_json
from turbopump.core.workload import Workload
from turbopump.planner import workload_file
from turbopump.planner.cases import Case, DecoderShape
from turbopump.planner.huggingface import decoder_shape
from turbopump.planner.summary import OPTIMIZER_BYTES, misfits

DEFAULT_SEQ_LEN = 4096
DEFAULT_GLOBAL_BATCH = 512
HOP_S = 0.01  # of a frame of speech: what `tones` and nearly all recognisers use
SMALL_VOCAB = 1 << 16  # token ids that are stored in two bytes


@dataclass(frozen=True)
class Subject:
    """A model with its batch. `params` are all of them; `flops_per_sample` are model FLOPs, forward and backward."""

    name: str
    path: str
    digest: str
    """Of the model and what was said of its training, so that a plan knows its recipe again."""
    params: int
    flops_per_sample: float
    unit: str
    units_per_sample: float
    global_batch: int
    num_steps: int
    """0: not known."""
    case: Case | None
    """A decoder's: the recipe's own way to train it on one device."""
    workload: Callable[[int, str], Workload] | None = None
    """Operations of a microbatch of so many samples in a dtype; None where only the decoder's sizes are known."""
    dtypes: tuple[str, ...] = ("bf16",)
    """The first is that of the recipe; more where it leaves the choice (`auto`)."""
    microbatches: tuple[int, ...] = ()
    """The only ones that `workload` knows; () for all."""
    recomputes: tuple[str, ...] = ("none",)
    optimizer_bytes: int = 8
    """Of the states of one parameter."""
    sample_bytes: int = 0
    """Read from storage for one sample; 0 for samples that are made in memory."""
    hours_per_sample: float = 0.0
    """Of audio."""
    config: Config | None = field(default=None, compare=False)


def read_subject(
    path: Path | str, overrides: Sequence[str] = (), *, seq_len: int = 0, global_batch: int = 0, dtype: str = ""
) -> Subject:
    """What `path` describes; `seq_len` and `global_batch` are for files that say neither.

    Raises `UsageError` for what is none of the three, `ConfigError` for a wrong recipe.
    """
    path = Path(path)
    for name, value in (("--seq-len", seq_len), ("--global-batch", global_batch)):
        if value < 0:
            raise UsageError(f"{name}: {value} given; a number above 0 is needed")
    if path.suffix != ".json":
        if seq_len or global_batch:
            given = "--seq-len" if seq_len else "--global-batch"
            setting = f"data.seq_len={seq_len}" if seq_len else f"global_batch={global_batch}"
            raise UsageError(f"{given} is for a config.json or workload.json: a recipe takes {setting}")
        return of_recipe(load(path, overrides), str(path), dtype)
    if overrides:
        raise UsageError(
            f"{overrides[0]!r} is a setting of a recipe, and {path} is none: use --seq-len, --global-batch"
        )
    try:
        data = path.read_bytes()
        table = from_json(data)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error})") from error
    if workload_file.is_workload(table):
        if seq_len:
            raise UsageError(f"--seq-len: {path} was traced at one length: trace the module again at another")
        return of_workload(workload_file.from_table(table, str(path)), str(path), digest(data), global_batch, dtype)
    return of_shape(decoder_shape(table, path), str(path), seq_len or DEFAULT_SEQ_LEN,
                    global_batch or DEFAULT_GLOBAL_BATCH, dtype or "bf16")  # fmt: skip


def of_recipe(config: Config, path: str, dtype: str = "") -> Subject:
    """A recipe's model and batch. Raises `UsageError` for a live model, whose operations only a trace knows."""
    if config.model.kind == "live" or config.data.kind == "live":
        raise UsageError("a live model cannot be planned from its recipe: trace it into a workload.json (docs/plan.md)")
    if problems := misfits(config):
        raise ConfigError(problems, "model and dataset")
    source = plugins.find("turbopump.sources", config.data.kind)
    shape, kind = source.shape(config.data), plugins.find("turbopump.models", config.model.kind)

    def workload(samples: int, compute: str) -> Workload:
        made: Workload = kind.workload(config.model, samples, shape, compute)
        return made

    compute = dtype or ("fp32" if config.precision.compute == "fp32" else "bf16")
    dtypes = ("bf16", "fp32") if not dtype and config.precision.compute == "auto" else (compute,)
    step = workload(config.global_batch, compute if compute in ("fp32", "bf16") else "bf16")
    case = _recipe_case(config, shape, compute) if config.model.kind == "transformer" else None
    samples = config.global_batch
    return Subject(
        config.name, path, recipe_digest(config), step.params, step.cost.flops / samples, step.unit,
        step.units / samples, samples, config.num_steps, case, workload, dtypes,
        recomputes=("none", "full") if hasattr(config.model, "recompute") else ("none",),
        optimizer_bytes=OPTIMIZER_BYTES[config.optimizer.kind], sample_bytes=_sample_bytes(config, shape),
        hours_per_sample=step.units / samples * HOP_S / 3600 if step.unit == "frame" else 0.0, config=config,
    )  # fmt: skip


def recipe_digest(config: Config) -> str:
    """Of what a plan rests on: model, data, batch, optimizer. Precision, recompute and processes are the plan's."""
    table = to_table(config)
    kept: dict[str, Any] = {name: dict(table[name]) for name in ("model", "data")}
    kept["model"].pop("recompute", None)
    kept["data"].pop("path", None)
    return digest(to_toml({**kept, "global_batch": config.global_batch, "optimizer": config.optimizer.kind}).encode())


def _recipe_case(config: Config, shape: Mapping[str, int], dtype: str) -> Case:
    model = config.model
    decoder = DecoderShape(
        model.hidden_size, model.num_layers, model.num_heads, model.vocab_size, model.mlp_width, model.kv_heads,
        model.head_width, gated=True, tied=model.tied, name=config.name,
    )  # fmt: skip
    return Case(
        decoder, shape["seq_len"], config.global_batch, config.microbatch or config.global_batch,
        recompute=model.recompute, dtype=dtype, optimizer_bytes=OPTIMIZER_BYTES[config.optimizer.kind],
    )  # fmt: skip


def _sample_bytes(config: Config, shape: Mapping[str, int]) -> int:
    """Of a packed dataset; samples of other kinds are made or held in memory."""
    if config.data.kind == "tokens":
        vocab = shape.get("vocab_size", getattr(config.model, "vocab_size", 0))
        return (shape["seq_len"] + 1) * (1 if vocab <= 256 else 2 if vocab <= SMALL_VOCAB else 4)
    if config.data.kind == "arrays":
        from turbopump.data.sources import manifest_of

        try:
            fields = manifest_of(config.data).fields
        except DatasetError:
            return 0
        return sum(item.row_bytes for item in fields)
    return 0


def of_workload(workload: Workload, path: str, digest: str, global_batch: int = 0, dtype: str = "") -> Subject:
    """A traced module: it is known at the microbatch and in the dtype of the trace only."""
    if dtype and dtype != workload.dtype:
        raise UsageError(f"{path} was traced in {workload.dtype}, not {dtype}: trace the module in {dtype}")
    batch = global_batch or workload.samples
    if batch % workload.samples:
        below = batch // workload.samples * workload.samples
        near = " or ".join(str(n) for n in (below, below + workload.samples) if n)
        raise UsageError(
            f"--global-batch ({batch}) must be divisible by the {workload.samples} samples of the trace: use {near}"
        )

    def at(samples: int, compute: str) -> Workload:
        if (samples, compute) != (workload.samples, workload.dtype):
            raise UsageError(f"{path} is known for {workload.samples} samples in {workload.dtype} only")
        return workload

    modes = tuple(mode for mode in ("none", "selective", "full")
                  if all(mode in block.kept_bytes for block in workload.blocks))  # fmt: skip
    hours = workload.units / workload.samples * HOP_S / 3600 if workload.unit == "frame" else 0.0
    return Subject(
        workload.name, path, digest, workload.params, workload.cost.flops / workload.samples, workload.unit,
        workload.units / workload.samples, batch, 0, None, at, (workload.dtype,), (workload.samples,), modes,
        hours_per_sample=hours,
    )  # fmt: skip


def of_shape(shape: DecoderShape, path: str, seq_len: int, global_batch: int, dtype: str) -> Subject:
    """A decoder of which nothing but its sizes is known, trained as most are: AdamW with fp32 states."""
    shape = replace(shape, learned_positions=max(shape.learned_positions, seq_len) if shape.learned_positions else 0)
    case = Case(shape, seq_len, global_batch, 1, dtype=dtype)
    return Subject(
        shape.name, path, digest(repr((shape, seq_len, global_batch)).encode()), shape.params,
        model_flops(shape, seq_len), "token", seq_len, global_batch, 0, case, dtypes=(dtype,),
        sample_bytes=(seq_len + 1) * (2 if shape.vocab <= SMALL_VOCAB else 4),
    )  # fmt: skip


def model_flops(shape: DecoderShape, seq_len: int) -> float:
    """Of one sequence, forward and backward: products with active weights, causal attention (half of the square)."""
    router = shape.hidden * shape.experts if shape.experts > 1 else 0
    layer = shape.attention_params + shape.experts_per_token * shape.mlp_params + router
    products = 6.0 * seq_len * (shape.layers * layer + shape.hidden * shape.vocab)
    pairs = seq_len * (seq_len + 1) / 2
    return products + 12.0 * shape.layers * shape.heads * shape.head_width * pairs
