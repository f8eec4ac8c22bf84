"""The verb `train`: a recipe, or a live module with dataset and loss, becomes a run directory.

    from turbopump.train import train
    train("recipes/convnet-digits.toml", overrides=["num_steps=100"])
    train(model, dataset, loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]), num_steps=100)

One process trains here; several are started by launch, or are already there (torchrun and the like).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from turbopump.core import plugins
from turbopump.core.config import Config, apply_override, load, parse, validate
from turbopump.core.errors import ConfigError, PlanError, UsageError
from turbopump.core.rundir import RunDir
from turbopump.core.units import human_bytes
from turbopump.hardware.detect import available_bytes, num_cores, process_age_s
from turbopump.hardware.process import prepare_to_compute
from turbopump.planner.summary import misfits, summarize

MACHINE_FILE = "machine.json"  # of the working directory

if TYPE_CHECKING:
    from turbopump.training.loop import Job, TrainResult


def train(
    recipe: Any,
    dataset: Any = None,
    *,
    model: Any = None,
    loss: Callable[..., Any] | None = None,
    evaluation_dataset: Any = None,
    weight: Callable[[Any], int] | None = None,
    metrics: Callable[..., dict[str, tuple[float, float]]] | None = None,
    optimizer: Callable[..., Any] | Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    run: Path | str | None = None,
    start_from: Path | str | None = None,
    plan: Path | str | None = None,
    hooks: Sequence[Callable[..., None]] = (),
    loggers: Sequence[Any] = (),
    quiet: bool = False,
    began_before_s: float = 0.0,
    **settings: Any,
) -> TrainResult:
    """Train and return where the run is, its evaluations and the trained module.

    `recipe` is a path, a Config, or a live `nn.Module` (which is trained in place; `model` replaces that of a recipe
    at a path). With a live module: `dataset` is
    a map-style dataset, `loss(model, batch)` the mean over a batch (over its `weight(batch)` valid units, by default
    its samples), `metrics(model, batch)` maps names to (sum, count), and `optimizer` may be `lambda parameters: ...`.
    `settings` are those of a recipe: `num_steps=100, global_batch=32, schedule={"kind": "constant"}`. `hooks` are
    called with the TrainState after every step, `loggers` see every record. `start_from` is RUN, RUN@STEP, a
    checkpoint or a safetensors file, `plan` the plan.toml to follow. An existing run directory is gone on with.
    Raises ConfigError, ResumeError, DatasetError, CheckpointError, NonFiniteError, OutOfMemoryError, RankError,
    PlanError for a plan that is another recipe's or asks for what train cannot do.
    """
    prepare_to_compute()
    from turbopump.training.loop import Job, Live

    make_optimizer = optimizer if callable(optimizer) else None
    if isinstance(optimizer, Mapping):
        settings["optimizer"] = dict(optimizer)
    model = model if isinstance(recipe, (str, os.PathLike, Config)) else recipe
    live = Live(model, dataset, evaluation_dataset, loss, weight, metrics, make_optimizer)
    config = _resolve(recipe, live, overrides, settings)
    plan_text = ""
    if plan is not None:
        config, plan_text = _follow(plan, recipe, live, overrides, settings)
    path = Path(run) if run is not None else Path("runs") / config.name
    job = Job(
        config=config, path=path, live=live, quiet=quiet, hooks=tuple(hooks), loggers=tuple(loggers),
        start_from=None if start_from is None else find_weights(str(start_from)), began_before_s=began_before_s,
        plan=plan_text,
    )  # fmt: skip
    return _run(job)


def _resolve(recipe: Any, live: Any, overrides: Sequence[str], settings: Mapping[str, Any]) -> Config:
    """The Config of what `train` was given, with live objects named in it."""
    if isinstance(recipe, (str, os.PathLike)):
        table_overrides = [*overrides, *(f"{key}={_as_toml(value)}" for key, value in settings.items())]
        config = load(Path(recipe), table_overrides, live=_live_tables(live))
        return config
    if isinstance(recipe, Config):
        if overrides or settings:
            raise UsageError("a Config takes no overrides: use dataclasses.replace, or give the recipe's path")
        return validate(recipe)
    table: dict[str, Any] = {"name": type(recipe).__name__.lower(), **settings, **_live_tables(live)}
    for override in overrides:
        apply_override(table, override)
    return parse(table, where="train")


def _follow(
    plan: Path | str, recipe: Any, live: Any, overrides: Sequence[str], settings: Mapping[str, Any]
) -> tuple[Config, str]:
    """The Config that follows plan.toml, and the plan's text for the run directory."""
    from turbopump.planner import plan_file

    if not isinstance(recipe, (str, os.PathLike)) or live.model is not None or live.dataset is not None:
        raise PlanError("a plan is followed by the recipe it was made for: give that recipe's path, nothing live")
    made, asked = plan_file.read(plan), _resolve(recipe, live, overrides, settings)
    chosen = plan_file.settings(made, asked, _num_gpus(asked) or num_cores(), plan)
    lines = [f"{key}={_as_toml(value)}" for key, value in chosen.items()]
    config = _resolve(recipe, live, [*lines, *overrides], settings)
    plan_file.refuse_contradictions(chosen, config, plan)
    return config, plan_file.dumps(made)


def _as_toml(value: Any) -> str:
    from turbopump.core.config import to_toml

    return to_toml({"v": value}).partition("=")[2].strip()


def _live_tables(live: Any) -> dict[str, Any]:
    tables = {}
    if live.model is not None:
        tables["model"] = {"kind": "live", "reference": _name_of(live.model)}
    if live.dataset is not None:
        tables["data"] = {"kind": "live", "reference": _name_of(live.dataset)}
    return tables


def _name_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _run(job: Job) -> TrainResult:
    """In this process, or in several on this host."""
    from turbopump.training.loop import run_training
    from turbopump.training.prepare import prepare_run_directory

    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:  # a launcher has started this rank already
        if int(os.environ["RANK"]) != 0:
            return run_training(job)
        prepare_run_directory(job.config, RunDir(job.path))
        with _predicting(job, int(os.environ["WORLD_SIZE"])):
            return run_training(job)
    if prepare_run_directory(job.config, RunDir(job.path)) and (result := _finished(job)) is not None:
        return result
    num_processes = job.config.launch.num_processes or _num_devices(job.config)
    _warn_of_memory(job.config, num_processes)
    with _predicting(job, num_processes):
        return run_training(job) if num_processes == 1 else _run_ranks(job, num_processes)


def _predicting(job: Job, num_processes: int) -> AbstractContextManager[None]:
    """What the machine file of the working directory says of the run goes into it; nothing where there is none."""
    if not Path(MACHINE_FILE).is_file():
        return nullcontext()
    from turbopump.planner.own_run import predicting

    device = "cuda" if _num_gpus(job.config) else "cpu"
    return predicting(job.config, RunDir(job.path), num_processes=num_processes, device=device)


def _run_ranks(job: Job, num_processes: int) -> TrainResult:
    from turbopump.core.checkpoint_store import latest
    from turbopump.launch.local import launch_local
    from turbopump.training.loop import run_rank

    rundir, launch = RunDir(job.path), job.config.launch
    launch_local(run_rank, (job,), num_processes=num_processes, threads=launch.threads, timeout_s=launch.timeout_s,
                 log_dir=rundir.logs)  # fmt: skip
    return _result(job, latest(rundir.checkpoints), job.config.num_steps)


def _warn_of_memory(config: Config, num_processes: int) -> None:
    """Say before the start what the kernel would only say by killing the run, where nothing else bounds memory."""
    if config.launch.device == "cuda" or _num_gpus(config):
        return
    summary = summarize(config, num_processes=num_processes) if not misfits(config) else None
    free_bytes = available_bytes()
    if summary is not None and summary.memory_bytes * num_processes > free_bytes:
        needed = human_bytes(summary.memory_bytes * num_processes)
        print(
            f"warning: this run needs about {needed} of memory, {human_bytes(free_bytes)} are free: if it is killed, "
            f"use a smaller microbatch, a shorter sequence or a smaller model (see --dry-run)",
            file=sys.stderr,
        )


def _finished(job: Job) -> TrainResult | None:
    """What a run came to whose last step is made and whole on disk: another attempt would only add to its time."""
    from turbopump.core.checkpoint_store import latest, step_of, verify_checkpoint

    rundir = RunDir(job.path)
    newest = latest(rundir.checkpoints)
    step = step_of(newest) if newest is not None else None
    if newest is None or step is None or step < job.config.num_steps:
        return None
    with rundir.lock():
        if verify_checkpoint(newest):
            return None
    if not job.quiet:
        print(
            f"{job.path} is at step {step} of {job.config.num_steps}: nothing is left to do; a larger num_steps goes on"
        )
    return _result(job, newest, step)


def _result(job: Job, checkpoint: Path | None, step: int) -> TrainResult:
    """The result of a run that is on disk, its weights in the live model where there is one."""
    from turbopump.core.files import read_json_lines
    from turbopump.training.checkpoint import read_weights
    from turbopump.training.loop import TrainResult
    from turbopump.training.state import load_model

    if job.live.model is not None and checkpoint is not None:
        load_model(job.live.model, read_weights(checkpoint))
    records = read_json_lines(RunDir(job.path).metrics)
    evaluations = tuple(record for record in records if record.get("type") == "evaluation")
    return TrainResult(job.path, step, evaluations, job.live.model)


def _num_devices(config: Config) -> int:
    """One process a GPU, or one on CPU."""
    return max(1, _num_gpus(config))


def _num_gpus(config: Config) -> int:
    if config.launch.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def find_weights(reference: str) -> Path:
    """The checkpoint or weights file that RUN, RUN@STEP or a path names; raises `UsageError`."""
    from turbopump.core.checkpoint_store import latest, list_checkpoints

    name, _, step = reference.rpartition("@") if "@" in reference else (reference, "", "")
    path = Path(name)
    if (path / "checkpoints").is_dir():
        if not step:
            newest = latest(path / "checkpoints")
            if newest is None:
                raise UsageError(f"{path} has no checkpoint yet")
            return newest
        for checkpoint in list_checkpoints(path / "checkpoints"):
            if str(checkpoint.step) == step:
                return Path(checkpoint.path)
        steps = ", ".join(str(c.step) for c in list_checkpoints(path / "checkpoints")) or "none"
        raise UsageError(f"{path} has no checkpoint of step {step} (there: {steps})")
    if not path.exists():
        raise UsageError(f"no run, checkpoint or weights file at {reference}")
    return path


# ---- the command line's forms


def _load_live(references: Mapping[str, str | None]) -> dict[str, Any]:
    prepare_to_compute()
    return plugins.load_live(references)


def train_from_command_line(
    recipe: Path,
    *,
    overrides: Sequence[str],
    live: Mapping[str, str | None],
    run: Path | None,
    start_from: str | None,
    quiet: bool,
    plan: Path | None = None,
) -> None:
    result = train(recipe, overrides=overrides, run=run, start_from=start_from, quiet=quiet, plan=plan,
                   began_before_s=process_age_s(), **_load_live(live))  # fmt: skip
    if not quiet:
        print(f"{result.step} steps are in {result.path}; next: turbopump report {result.path}")


def dry_run(recipe: Path, *, overrides: Sequence[str] = (), live: Mapping[str, str | None] | None = None) -> str:
    """The resolved configuration, sizes, FLOPs and memory estimate, as text; of the data it reads the sizes only.

    Raises `ConfigError` where they do not fit the model's.
    """
    from turbopump.core.config import dumps
    from turbopump.planner.summary import format_summary

    objects = SimpleNamespace(**{"model": None, "dataset": None, **_load_live(live or {})})
    config = load(recipe, overrides, live=_live_tables(objects))
    if problems := misfits(config):
        raise ConfigError(problems, "model and dataset")
    return dumps(config) + "\n" + format_summary(summarize(config), config)


def verify_resume(recipe: Path, *, overrides: Sequence[str] = (), live: Mapping[str, str | None] | None = None) -> None:
    """Kill the recipe's run, resume it, compare it bit by bit with one never stopped; raises where they differ."""
    from turbopump.launch.verify_resume import verify_resume as verify

    options = [part for name, text in (live or {}).items() if text for part in (f"--{name.replace('_', '-')}", text)]
    print(verify(recipe, list(overrides), options))
