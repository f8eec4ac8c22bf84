"""Run: what surrounds the steps. Process group, threads, spans, signals, checkpoints, loggers, periodic work.

A run ends in one of four ways: finished, stopped by a signal (its step is finished, its state written), stopped by a
non-finite step (the state is the one before), or by an error. `__exit__` closes everything in each of them.
"""

from __future__ import annotations

import math
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from types import FrameType, TracebackType
from typing import IO, Any

import torch
from torch import Tensor

from turbopump.comms import process_group
from turbopump.core import plugins
from turbopump.core.config import Config
from turbopump.core.errors import Interrupted, NonFiniteError, OutOfMemoryError
from turbopump.core.files import write_atomic
from turbopump.core.rundir import RunDir
from turbopump.core.spans import Spans
from turbopump.core.units import human_bytes
from turbopump.hardware import detect
from turbopump.training.checkpoint import Checkpoints
from turbopump.training.metrics import JsonLogger, Logger, StepLosses, TerminalLogger
from turbopump.training.prepare import attempt_identity, write_config
from turbopump.training.speed import Speed
from turbopump.training.state import BufferGuard, TrainState

Hook = Callable[[TrainState], None]
Evaluate = Callable[[TrainState], dict[str, float]]


class Run:
    """`with Run(config, rundir) as run:` one attempt at a run, on this rank."""

    def __init__(
        self,
        config: Config,
        rundir: RunDir,
        *,
        quiet: bool = False,
        hooks: Sequence[Hook] = (),
        loggers: Sequence[Logger] = (),
        began_before_s: float = 0.0,
        plan: str = "",
    ) -> None:
        self.config, self.rundir, self._plan = config, rundir, plan
        self._quiet, self._hooks, self._extra_loggers = quiet, tuple(hooks), list(loggers)
        self._began_before_s = began_before_s
        self._signal = 0
        self.evaluate: Evaluate | None = None
        self.closers: list[Callable[[], None]] = []
        self.evaluations: list[dict[str, Any]] = []

    def __enter__(self) -> Run:
        launch = self.config.launch
        self.device = process_group.choose_device(launch.device)
        place = process_group.init_process_group(self.device, timeout_s=launch.timeout_s)
        self.rank, self.world_size = place.rank, place.world_size
        torch.set_num_threads(launch.threads or detect.num_threads(place.local_world_size))
        self._lock: IO[str] | None = self.rundir.lock() if self.rank == 0 else None
        if self.rank == 0:
            write_config(self.config, self.rundir)
            if self._plan:
                write_atomic(self.rundir.plan, self._plan)
        identity: dict[str, Any] = attempt_identity(self.rundir) if self.rank == 0 else {}
        identity = process_group.broadcast_json(identity)
        self.run_id, self.attempt = identity["run_id"], identity["attempt"]
        self.spans = Spans(
            self.rundir.spans(self.rank), attempt=self.attempt, rank=self.rank, world_size=self.world_size,
            began_before_s=self._began_before_s,
        )  # fmt: skip
        self.spans.__enter__()
        self.checkpoints = Checkpoints(
            self.rundir.checkpoints, self.config.checkpoint, run_id=self.run_id, rank=self.rank,
            world_size=self.world_size, timeout_s=launch.timeout_s, warn=self._warn,
        )  # fmt: skip
        self.losses = StepLosses(self.world_size)
        self.loggers: list[Logger] = []
        self._install_signals()
        return self

    # ---- around the loop

    def started(self, state: TrainState, speed: Speed, restored_step: int | None) -> None:
        """Start-up is over: open the loggers, note where the run goes on from, evaluate a fresh model."""
        self.speed = speed
        self._buffers = BufferGuard(state.model)
        self._restored_step = restored_step
        if self.rank == 0:
            self.loggers = [
                JsonLogger(self.rundir.metrics),
                TerminalLogger(speed.unit, self.config.num_steps, quiet=self._quiet),
                *(plugins.find("turbopump.loggers", name)(self.rundir.logs) for name in self.config.logging.loggers),
                *self._extra_loggers,
            ]
        self.spans.started()
        if restored_step is not None:
            self.spans.restored(restored_step)
            self.log({"type": "note", "text": f"going on from the checkpoint of step {restored_step}"})
        elif self.config.evaluation.at_start:
            self._evaluate(state)

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        """One training step: counted if its update was made. Raises `NonFiniteError` where it could not be."""
        self._buffers.remember()
        with self.spans.step(state.step + 1):
            yield
        if state.optimizer.found_inf is not None and self.device.type == "cpu":
            self._give_up(state)
        state.step += 1

    def periodic(self, state: TrainState, loss: Tensor) -> None:
        """What is due after a step: log, evaluate, checkpoint, hooks; agree on stopping and on what is due by time."""
        self.losses.add(state.step, loss, state.optimizer.grad_norm, state.optimizer.last_lr)
        self.speed.add(self.spans.last_step_s, state.forward_backward.global_weight)
        config = self.config
        last = state.step == config.num_steps
        self._signal = int(process_group.all_reduce_max([self._signal])[0])  # all ranks stop at the same step
        checkpoint_due = self.checkpoints.due(state.step, time.monotonic())
        if state.step % config.logging.every == 0 or last or self._signal:
            self._log_progress(state)
        for hook in self._hooks:
            hook(state)
        if self.evaluate and (last or (config.evaluation.every and state.step % config.evaluation.every == 0)):
            self._evaluate(state)
        if (checkpoint_due or self._is_new_best(state.step)) and not last and not self._signal:
            self.save(state)
        self._log_saved(self.checkpoints.poll())

    @property
    def stopping(self) -> bool:
        return self._signal != 0

    def finish(self, state: TrainState) -> None:
        """The last checkpoint, on disk and verified; raises `Interrupted` where a signal ended the run."""
        self.save(state, wait=True)
        if self.stopping:
            name = signal.Signals(self._signal).name
            raise Interrupted(
                f"stopped by {name} after step {state.step} of {self.config.num_steps}, all of it saved: "
                f"the same command goes on from there",
                self._signal,
            )

    def save(self, state: TrainState, *, wait: bool = False) -> None:
        if state.step in (0, self._restored_step):
            return  # a fresh start, or the checkpoint it went on from, gives the same state
        with self.spans.period("checkpoint", state.step):
            latest = self.evaluations[-1] if self.evaluations else None
            metrics = {"loss": latest["loss"]} if latest and latest["step"] == state.step else None
            self.checkpoints.save(state, metrics=metrics, wait=wait)
            if wait:
                self._log_saved(self.checkpoints.wait())

    def log(self, record: dict[str, Any]) -> None:
        for logger in self.loggers:
            logger.log(record)

    # ---- inside

    def _warn(self, text: str) -> None:
        """A line the user must see even of a quiet run, kept in metrics.jsonl too once that is open."""
        if self.rank == 0:
            print(f"warning: {text}", file=sys.stderr, flush=True)

    def _log_progress(self, state: TrainState) -> None:
        loss = self._log_losses()
        if state.optimizer.skipped:
            self._give_up(state)
        self.log({"type": "progress", "step": state.step, "loss": loss, "epoch_s": time.time(),
                  "rss_bytes": detect.resident_bytes(), "device_bytes": _device_bytes(self.device),
                  **self.speed.fetch(self.config.num_steps - state.step)})  # fmt: skip
        self.spans.flush()

    def _log_losses(self) -> float:
        """Write the steps no line has shown yet; the loss of the last of them."""
        records = self.losses.fetch()
        for record in records:
            self.log(record)
        return records[-1]["loss"] if records else math.nan

    def _evaluate(self, state: TrainState) -> None:
        if self.evaluate is None:
            return
        begin = time.perf_counter()
        with self.spans.period("evaluation", state.step):
            values = self.evaluate(state)
        record = {"type": "evaluation", "step": state.step, "split": self.config.evaluation.split, **values,
                  "epoch_s": time.time(), "s": time.perf_counter() - begin}  # fmt: skip
        self.evaluations.append(record)
        self.log(record)

    def _is_new_best(self, step: int) -> bool:
        """An evaluation just made was the lowest of this attempt: worth a checkpoint of its own."""
        if not self.config.checkpoint.keep_best or not self.evaluations or self.evaluations[-1]["step"] != step:
            return False
        return step > 0 and self.evaluations[-1]["loss"] <= min(e["loss"] for e in self.evaluations)

    def _log_saved(self, saved: Sequence[Any]) -> None:
        for item in saved:
            self.log({"type": "checkpoint", "step": item.step, "bytes": item.bytes, "stall_s": item.stall_s,
                      "write_s": item.write_s, "epoch_s": time.time()})  # fmt: skip

    def _give_up(self, state: TrainState) -> None:
        """The update of this step was skipped: undo what forward left in buffers, say which records were in it."""
        self._buffers.restore()
        state.step = state.optimizer.num_updates
        self._log_losses()
        self.save(state, wait=True)
        ids = state.loader.ids(state.step)
        shown = ", ".join(f"{index} (epoch {epoch})" for epoch, index in ids[:8])
        more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
        raise NonFiniteError(
            f"step {state.step + 1}: the loss or a gradient is NaN or infinite; the state is the one before that step "
            f"(step {state.step}). Records of its batch: {shown}{more}. Look at these records, or use a lower "
            f"optimizer.lr or precision.compute=fp32"
        )

    def _install_signals(self) -> None:
        def handle(number: int, _: FrameType | None) -> None:
            if self._signal and self.world_size > 1:
                return  # whoever launched the ranks ends them at the second signal; it may reach a rank twice
            if self._signal:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._signal = number
            if self.rank == 0 and not self._quiet:
                name = signal.Signals(number).name
                print(f"\n{name}: finishing this step and writing a checkpoint; once more stops at once", flush=True)

        self._previous_handlers: dict[int, Any] = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous_handlers[number] = signal.signal(number, handle)
            except ValueError:  # not the main thread: whoever owns it decides
                break

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        reason = "finished" if error is None else type(error).__name__
        if isinstance(error, Interrupted):
            reason = signal.Signals(error.exit_code - 128).name
        closers = [*self.closers, *(logger.close for logger in self.loggers), self.checkpoints.close]
        closers += [lambda: self.spans.close(reason), self.spans.__exit__, process_group.destroy]
        if self._lock is not None:
            closers.append(self._lock.close)
        failures = []
        for close in closers:
            try:
                close()
            except Exception as failure:
                failures.append(failure)
        if error is None and failures:
            raise failures[0]
        if _is_out_of_memory(error):
            raise OutOfMemoryError(
                f"out of memory{_asked_for(str(error))}: use a smaller microbatch "
                f"(now {self.config.microbatch or self.config.global_batch // self.world_size}; the result of a step "
                f"stays the same), a shorter sequence, or a smaller model"
            ) from error


def _is_out_of_memory(error: BaseException | None) -> bool:
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _asked_for(text: str) -> str:
    """What was wanted in vain, out of torch's message: ` (268 MB more were asked for)`."""
    match = re.search(r"[Tt]ried to allocate ([\d.]+) ?(bytes|[KMGT]iB)?", text)
    if match is None:
        return ""
    wanted = f"{match[1]} {match[2]}" if match[2] not in (None, "bytes") else human_bytes(float(match[1]))
    return f" ({wanted} more were asked for)"


def _device_bytes(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def now_iso() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
