"""The train loop: one screen, and no `if feature`.

`next(loader)` yields one step, a list of device microbatches. `forward_backward` owns accumulation and gradient
synchronisation and returns a detached loss. `optimizer` owns clipping, schedule and zero_grad. `run.step` counts the
step. Evaluation and checkpoints are outside the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbopump.core.config import Config
from turbopump.core.rundir import RunDir
from turbopump.core.spans import span
from turbopump.hardware.process import keep_freed_memory
from turbopump.training.build import Live, build_state, measure_speed, resolve_task, settle_loader
from turbopump.training.checkpoint import read_weights
from turbopump.training.metrics import Logger
from turbopump.training.run import Hook, Run
from turbopump.training.state import load_model


@dataclass(frozen=True)
class Job:
    """All a rank needs to run: the configuration, where it is written, and what was given live."""

    config: Config
    path: Path
    live: Live = Live()
    start_from: Path | None = None
    quiet: bool = False
    hooks: Sequence[Hook] = ()
    loggers: Sequence[Logger] = ()
    began_before_s: float = 0.0
    plan: str = ""
    """The text of the plan.toml that is followed."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to: its directory, the steps made, the evaluations of this attempt, and the live model."""

    path: Path
    step: int
    evaluations: tuple[dict[str, Any], ...]
    model: Any


def run_training(job: Job) -> TrainResult:
    """Train as `job` says, on this rank, from its newest checkpoint where it has one."""
    config = job.config
    with Run(config, RunDir(job.path), quiet=job.quiet, hooks=job.hooks, loggers=job.loggers,
             began_before_s=job.began_before_s, plan=job.plan) as run:  # fmt: skip
        task = resolve_task(config, job.live)
        state = build_state(config, task, run)
        restored_step = run.checkpoints.restore(state)
        if restored_step is None and job.start_from is not None:
            load_model(state.model, read_weights(job.start_from))
        run.started(state, measure_speed(config, task, run, state), restored_step)
        settle_loader(config, run, state)
        while state.step < config.num_steps and not run.stopping:
            with run.step(state):
                with span("data"):
                    microbatches = next(state.loader)
                with span("compute"):
                    loss = state.forward_backward(microbatches, state.step)
                with span("optimizer"):
                    state.optimizer.step()
            run.periodic(state, loss)
        run.finish(state)
    return TrainResult(job.path, state.step, tuple(run.evaluations), state.model)


def run_rank(job: Job) -> None:
    """The same, for a launcher that starts ranks: the result is in the run directory."""
    keep_freed_memory()
    run_training(job)
