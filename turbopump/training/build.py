"""From a recipe, or from live objects, to the five standard objects of the loop.

`Task` is what is trained on what; `build_state` puts it on the device and chooses model, forward_backward, optimizer
and loader. A feature enters the product by being chosen here, never by an `if` in the loop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from turbopump.comms import process_group
from turbopump.compute.observe import ObservedCompute
from turbopump.compute.peak import fastest_compute, measure_peak
from turbopump.core import plugins
from turbopump.core.config import Config
from turbopump.core.errors import ConfigError, DatasetError, UsageError
from turbopump.core.randomness import seed_of
from turbopump.core.workload import Workload
from turbopump.data.loader import Loader, evaluation_batches
from turbopump.data.order import StepOrder
from turbopump.data.source_order import source_order
from turbopump.planner.summary import misfits
from turbopump.training.evaluation import Metrics, evaluate_model
from turbopump.training.forward_backward import ForwardBackward, Loss, Weight, reseed
from turbopump.training.optim import MakeOptimizer, build_optimizer
from turbopump.training.prepare import read_choices, write_choices, write_env
from turbopump.training.run import Run, now_iso
from turbopump.training.speed import Speed
from turbopump.training.state import BufferGuard, TrainState


@dataclass(frozen=True)
class Live:
    """Live objects given in place of a recipe's kinds; None takes the recipe's.

    `loss(model, batch)` is the mean over the `weight(batch)` valid units of a batch (default: its samples);
    `metrics(model, batch)` maps names to (sum, count), default the loss alone; `optimizer(parameters)` makes a
    torch optimizer.
    """

    model: nn.Module | None = None
    dataset: Any = None
    evaluation_dataset: Any = None
    loss: Loss | None = None
    weight: Weight | None = None
    metrics: Metrics | None = None
    optimizer: MakeOptimizer | None = None


@dataclass(frozen=True)
class Task:
    """What is trained on what, resolved."""

    build_model: Callable[[], nn.Module]
    train_source: Any
    evaluation_source: Any
    loss: Loss
    weight: Weight
    metrics: Metrics
    unit: str
    make_optimizer: MakeOptimizer | None = None
    workload: Callable[[int, str], Workload] | None = None


def resolve_task(config: Config, live: Live | None = None) -> Task:
    """The task of a recipe, with live objects in place of its kinds where given."""
    live = live or Live()
    kind = None if config.model.kind == "live" else plugins.find("turbopump.models", config.model.kind)
    side = kind.torch_side() if kind is not None else None
    source_kind = None if config.data.kind == "live" else plugins.find("turbopump.sources", config.data.kind)
    for name, value, other in (("model", live.model, kind), ("dataset", live.dataset, source_kind)):
        if value is None and other is None:
            raise UsageError(
                f"this run was made with a live {name}: give it again, from Python or with --{name} module:function"
            )
    if problems := misfits(config):
        raise ConfigError(problems, "model and dataset")
    if live.loss is None and side is None:
        raise UsageError("a live model needs a loss: loss(model, batch) -> the mean over the batch")
    weight = live.weight or (side.weight if side is not None and live.loss is None else count_samples)
    loss: Loss = live.loss or side.loss  # type: ignore[union-attr]
    default_metrics = side.metrics if side is not None and live.loss is None else loss_metric(loss, weight)
    live_model = live.model
    return Task(
        build_model=(lambda: live_model) if live_model is not None else (lambda: side.build(config.model)),  # type: ignore
        train_source=live.dataset if source_kind is None else source_kind.open(config.data, "train"),
        evaluation_source=live.evaluation_dataset if source_kind is None else _held_out(source_kind, config),
        loss=loss,
        weight=weight,
        metrics=live.metrics or default_metrics,
        unit=_unit(kind, source_kind, config),
        make_optimizer=live.optimizer,
        workload=_workload(kind, source_kind, config),
    )


def _held_out(source_kind: plugins.SourceKind, config: Config) -> Any:
    """The evaluation split, or None where the dataset was packed without one."""
    try:
        source = source_kind.open(config.data, config.evaluation.split)
    except DatasetError:
        return None
    return source if len(source) else None


def _workload(kind: Any, source_kind: Any, config: Config) -> Callable[[int, str], Workload] | None:
    if kind is None or source_kind is None:
        return None
    shape = source_kind.shape(config.data)
    return lambda samples, dtype: kind.workload(config.model, samples, shape, dtype)


def _unit(kind: Any, source_kind: Any, config: Config) -> str:
    if kind is None or source_kind is None:
        return "sample"
    return kind.workload(config.model, 1, source_kind.shape(config.data), "fp32").unit


def count_samples(batch: Any) -> int:
    """Samples of a batch: the length of its first tensor."""
    if isinstance(batch, Tensor):
        return len(batch)
    values = batch.values() if isinstance(batch, Mapping) else batch
    return count_samples(next(iter(values)))


def loss_metric(loss: Loss, weight: Weight) -> Metrics:
    """The metrics of a model that names none: its loss."""

    def metrics(model: nn.Module, batch: Any) -> dict[str, tuple[float, float]]:
        count = weight(batch)
        return {"loss": (float(loss(model, batch)) * count, count)}

    return metrics


def build_state(config: Config, task: Task, run: Run) -> TrainState:
    """Model, forward_backward, optimizer and loader on this rank's device, at step 0."""
    reseed(run.device, seed_of(config.seed, "init"))
    model = task.build_model().to(run.device)
    model.train()
    _check_vocabulary(config, task)
    compute = choose_compute(config, run)
    common: dict[str, Any] = {"rank": run.rank, "world_size": run.world_size}
    loader = Loader(
        task.train_source, global_batch=config.global_batch, microbatch=config.microbatch, order=_order(config, task),
        seed=config.seed, num_steps=config.num_steps, num_workers=config.loader.num_workers,
        choice=read_choices(run.rundir).get("loader") if config.loader.num_workers == "auto" else None,
        workers=config.loader.workers, prefetch_steps=config.loader.prefetch_steps, copy=False,
        pin_memory=run.device.type == "cuda", **common,
    )  # fmt: skip
    run.closers.append(loader.close)
    forward_backward = ForwardBackward(
        model, task.loss, task.weight, device=run.device, compute=compute, seed=config.seed, **common
    )
    if task.evaluation_source is not None:
        run.evaluate = lambda state: evaluate_model(
            state.model, task.metrics, task.evaluation_source, batch=config.evaluation.batch,
            max_samples=config.evaluation.max_samples, device=run.device, compute=compute, **common,
        )  # fmt: skip
    return TrainState(
        model=model, forward_backward=forward_backward, loader=loader, seed=config.seed,
        optimizer=build_optimizer(model, config, compute, task.make_optimizer),
    )  # fmt: skip


def _order(config: Config, task: Task) -> StepOrder:
    settings = config.loader
    return source_order(
        task.train_source, config.global_batch, order=settings.order, seed=config.seed,
        block_samples=settings.block_samples, window_blocks=settings.window_blocks, num_buckets=settings.num_buckets,
    )  # fmt: skip


def _check_vocabulary(config: Config, task: Task) -> None:
    given, needed = getattr(config.model, "vocab_size", None), getattr(task.train_source, "vocab_size", None)
    if given is not None and needed is not None and given < needed:
        raise ConfigError([f"model.vocab_size: {given} given; the dataset has {needed} tokens: use {needed} or more"])


def choose_compute(config: Config, run: Run) -> str:
    """`precision.compute`, where `auto` is measured once by rank 0 and kept in choices.toml for every resume."""
    if config.precision.compute != "auto":
        return config.precision.compute
    choice = None
    if run.rank == 0:
        choice = read_choices(run.rundir).get("precision")
        if choice is None:
            compute, rows = fastest_compute(run.device.type)
            choice = {"compute": compute, "evidence": rows}
            write_choices(run.rundir, {"precision": choice})
    return str(process_group.broadcast_json(choice)["compute"])


def settle_loader(config: Config, run: Run, state: TrainState) -> None:
    """Start to read ahead; where `loader.num_workers` is "auto", what rank 0 found is kept for every resume."""
    choice = state.loader.start()
    if config.loader.num_workers == "auto" and run.rank == 0:
        write_choices(run.rundir, {"loader": choice})


def measure_speed(config: Config, task: Task, run: Run, state: TrainState) -> Speed:
    """Model FLOPs from the workload (or from shapes observed), this machine's limit by measurement; writes env.json."""
    compute = state.forward_backward.compute
    observed, samples = observe(state, task)
    observed_flops = observed.total() / samples * config.global_batch
    workload = task.workload(config.global_batch, compute) if task.workload is not None else None
    flops = workload.cost.flops if workload is not None else observed_flops
    limit: dict[str, Any] | None = None
    if config.logging.limit_s:
        peak = measure_peak(compute, device=run.device.type, budget_s=config.logging.limit_s)
        limit = {"flops_per_s": peak.flops_per_s * run.world_size, "dtype": compute, "route": peak.route,
                 "rows": peak.rows, "limit_scope": "run"}  # fmt: skip
    if run.rank == 0:
        write_env(run.rundir, {
            "run_id": run.run_id, "started": now_iso(), "world_size": run.world_size, "device": str(run.device),
            "dtype_in_use": {name: count / observed.total() for name, count in observed.most_common()},
            "workload": {
                "params": sum(p.numel() for p in state.model.parameters()),
                "flops_per_step": flops,
                "observed_flops_per_step": observed_flops,
                "forward_flops_per_step": workload.forward_cost.flops if workload is not None else None,
                "units_per_step": workload.units if workload is not None else config.global_batch,
                "unit": task.unit,
                "source": "workload" if workload is not None else "observed",
            },
            "limit": limit,
        })  # fmt: skip
    return Speed(
        unit=task.unit, global_batch=config.global_batch, flops_per_sample=flops / config.global_batch,
        limit_flops_per_s=limit["flops_per_s"] if limit else None,
    )  # fmt: skip


def observe(state: TrainState, task: Task) -> tuple[Counter[str], int]:
    """FLOPs of two samples by the dtype they ran in, and the number of samples: a forward and backward thrown away.

    Leaves no trace: gradients are cleared, buffers restored, and generators are seeded anew for every microbatch.
    """
    batch = next(iter(evaluation_batches(task.train_source, batch=2, max_samples=2, rank=0, world_size=1)))
    guard = BufferGuard(state.model)
    guard.remember()
    with ObservedCompute() as seen:
        state.forward_backward.alone(batch)
    state.model.zero_grad(set_to_none=True)
    guard.restore()
    return seen.flops, count_samples(batch)
