"""The verb `evaluate`: metrics of a run's checkpoint on any split, and samples of a language model."""

from __future__ import annotations

import gzip
import lzma
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbopump.core import plugins
from turbopump.core.checkpoint_store import CheckpointInfo, list_checkpoints
from turbopump.core.errors import DatasetError, UsageError
from turbopump.core.files import to_json, write_atomic
from turbopump.core.rundir import RunDir, open_run
from turbopump.hardware.process import prepare_to_compute


@dataclass(frozen=True)
class EvaluationResult:
    """Metrics of one checkpoint on one split."""

    run: str
    step: int
    split: str
    samples: int
    metrics: dict[str, float]
    yardsticks: dict[str, float] = field(default_factory=dict)  # bits per byte of compressors on the same text


def evaluate(
    run: Path | str, *, step: int | None = None, split: str | None = None, max_samples: int = 0, live: Any = None
) -> EvaluationResult:
    """Metrics of a run on a split; the best checkpoint by evaluation loss unless `step` names one.

    `live` (a `training.build.Live`) gives again what the run was trained with as live objects. Raises `UsageError`,
    `DatasetError`, `CheckpointError`.
    """
    prepare_to_compute()
    import torch

    from turbopump.training.build import resolve_task
    from turbopump.training.evaluation import evaluate_model
    from turbopump.training.prepare import read_config

    rundir = open_run(run)
    config = read_config(rundir)
    split = split or config.evaluation.split
    if max_samples < 0:
        raise UsageError(f"max_samples: {max_samples} given; use 0 for all or a positive number")
    task = resolve_task(config, live)
    if config.data.kind == "live":
        source = task.train_source if split == "train" else task.evaluation_source
    else:
        source = plugins.find("turbopump.sources", config.data.kind).open(config.data, split)
    if source is None:
        raise DatasetError(f"there is no split {split!r} to evaluate")
    checkpoint = choose_checkpoint(rundir, step)
    device = torch.device("cuda" if torch.cuda.is_available() and config.launch.device != "cpu" else "cpu")
    model = _load(task, checkpoint).to(device)
    metrics = evaluate_model(
        model, task.metrics, source, batch=config.evaluation.batch, max_samples=max_samples, device=device,
        compute=_compute(rundir, config),
    )  # fmt: skip
    samples = min(len(source), max_samples or len(source))
    yardsticks = compressors(source) if "bits_per_byte" in metrics and samples == len(source) else {}
    result = EvaluationResult(str(run), checkpoint.step, split, samples, metrics, yardsticks)
    write_atomic(rundir.evaluation, to_json(result, indent=True))
    return result


def compressors(source: Any) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9` need for the text of a split: honest yardsticks of a language model."""
    text = source.text()
    sizes = {"gzip -9": len(gzip.compress(text, 9)), "xz -9": len(lzma.compress(text, preset=9))}
    return {name: 8 * size / len(text) for name, size in sizes.items()}


def sample(
    run: Path | str, *, prompt: str, step: int | None = None, num_tokens: int = 200, temperature: float = 0.8,
    top_k: int = 50, seed: int = 0,
) -> str:  # fmt: skip
    """`prompt` and what the language model writes after it. Raises `UsageError` where the run is no language model."""
    import torch

    from turbopump.training.build import resolve_task
    from turbopump.training.prepare import read_config

    rundir = open_run(run)
    config = read_config(rundir)
    if num_tokens < 1 or temperature < 0 or top_k < 0:
        raise UsageError("num_tokens must be at least 1; temperature and top_k at least 0")
    side = None if config.model.kind == "live" else plugins.find("turbopump.models", config.model.kind).torch_side()
    task = resolve_task(config)
    encode, decode = getattr(task.train_source, "encode", None), getattr(task.train_source, "decode", None)
    if side is None or not hasattr(side, "generate") or encode is None or decode is None:
        raise UsageError(f"{run} holds a {config.model.kind} on {config.data.kind}: only language models write text")
    model = _load(task, choose_checkpoint(rundir, step)).eval()
    tokens_BT = torch.tensor([list(encode(prompt or "\n"))], dtype=torch.int64)
    with torch.inference_mode():
        out_BT = side.generate(model, tokens_BT, num_tokens, temperature=temperature, top_k=top_k, seed=seed)
    return str(decode(out_BT[0].tolist()))


def choose_checkpoint(rundir: RunDir, step: int | None) -> CheckpointInfo:
    """The checkpoint of `step`, or the one with the lowest evaluation loss, or the newest."""
    found = list_checkpoints(rundir.checkpoints)
    if not found:
        raise UsageError(f"{rundir.path} has no checkpoint yet")
    if step is not None:
        for checkpoint in found:
            if checkpoint.step == step:
                return checkpoint
        raise UsageError(f"no checkpoint of step {step} (there: {', '.join(str(c.step) for c in found)})")
    measured = [(c.metrics["loss"], c.step, c) for c in found if c.metrics and "loss" in c.metrics]
    return min(measured)[2] if measured else found[-1]


def _load(task: Any, checkpoint: CheckpointInfo) -> Any:
    from turbopump.training.checkpoint import read_weights
    from turbopump.training.state import load_model

    model = task.build_model()
    load_model(model, read_weights(checkpoint.path))
    return model


def _compute(rundir: RunDir, config: Any) -> str:
    """The arithmetic the run was trained in."""
    from turbopump.training.prepare import read_choices

    chosen = read_choices(rundir).get("precision", {}).get("compute", "fp32")
    return str(chosen if config.precision.compute == "auto" else config.precision.compute)


def format_result(result: EvaluationResult, *, as_json: bool = False) -> str:
    if as_json:
        return to_json(result).decode()
    head = f"{result.run} at step {result.step}, split {result.split}, {result.samples:,} samples"
    yardsticks = [f"  {name + ' (text)':<18}{value:.4f} bits per byte" for name, value in result.yardsticks.items()]
    return "\n".join(
        [head, *(f"  {name.replace('_', ' '):<18}{value:.4f}" for name, value in result.metrics.items()), *yardsticks]
    )
