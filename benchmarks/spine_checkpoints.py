"""What checkpoints cost a run, how long a resume takes, and how other formats take a flipped bit.

The cost of a save is taken inside one run that saves every 2 W steps: the W steps after a save, while its writer shares
the cores, against the mean of the W steps before and after them. What drifts over minutes cancels in every such triple.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import CheckpointException

from turbopump.core.config import CheckpointConfig, Config, EvaluationConfig, LoggingConfig
from turbopump.core.rundir import RunDir
from turbopump.train import train

Stamp = tuple[float, float]  # seconds: wall, CPU of the whole process


@dataclass(frozen=True)
class SaveCost:
    """Extra seconds of each save, of wall and of CPU time over all threads; all saves ended within their window."""

    wall_s: list[float]
    cpu_s: list[float]
    checkpoint_bytes: int
    stall_s: float
    write_s: float


class _Enough(Exception):
    """Ends a run without the checkpoint of its end."""


class _Watch:
    """A hook that stamps every step and ends the run after the last; a logger that sees what was saved."""

    def __init__(self, last_step: int) -> None:
        self.stamps: dict[int, Stamp] = {}
        self.saved: list[Mapping[str, Any]] = []
        self._last_step = last_step

    def __call__(self, state: Any) -> None:
        self.stamps[state.step] = (time.perf_counter(), time.process_time())
        if state.step == self._last_step:
            raise _Enough

    def log(self, record: Mapping[str, Any]) -> None:
        if record["type"] == "checkpoint":
            self.saved.append(record)

    def close(self) -> None:
        pass


def save_cost(config: Config, directory: Path, *, window_steps: int, saves: int) -> SaveCost:
    """Train `config` with `saves` checkpoints, two windows apart; on all cores, as a user would."""
    period = 2 * window_steps
    last_step = period * (saves + 1)
    config = dataclasses.replace(
        config,
        num_steps=10 * last_step,
        evaluation=EvaluationConfig(at_start=False),
        checkpoint=CheckpointConfig(every=period, every_s=0.0),
        logging=LoggingConfig(limit_s=0.0),
    )
    watch = _Watch(last_step)
    try:
        train(config, run=directory, quiet=True, hooks=[watch], loggers=[watch])
    except _Enough:
        pass
    finally:
        RunDir(directory).remove()
    window_s = min(_span(watch.stamps, at, window_steps, 0) for at in range(period, last_step, period))
    write_s, stall_s = (max(record[name] for record in watch.saved) for name in ("write_s", "stall_s"))
    if write_s + stall_s > window_s:
        print(f"note: a save took {write_s + stall_s:.1f} s, its window {window_s:.1f} s: its cost is understated",
              file=sys.stderr)  # fmt: skip
    return SaveCost(
        extra_seconds(watch.stamps, window_steps, saves, 0),
        extra_seconds(watch.stamps, window_steps, saves, 1),
        int(watch.saved[-1]["bytes"]), stall_s, write_s,
    )  # fmt: skip


def extra_seconds(stamps: Mapping[int, Sequence[float]], window_steps: int, saves: int, clock: int) -> list[float]:
    """For each save at a multiple of `2 * window_steps`: the seconds of the window after it, less the mean of the
    windows before it and after that one."""
    found = []
    for at in range(2 * window_steps, 2 * window_steps * (saves + 1), 2 * window_steps):
        before = _span(stamps, at - window_steps, window_steps, clock)
        during = _span(stamps, at, window_steps, clock)
        after = _span(stamps, at + window_steps, window_steps, clock)
        found.append(during - (before + after) / 2)
    return found


def _span(stamps: Mapping[int, Sequence[float]], start: int, steps: int, clock: int) -> float:
    return stamps[start + steps][clock] - stamps[start][clock]


@dataclass(frozen=True)
class Resume:
    """Seconds until the first step of a resumed run is done: from the start of `restore`, and from the call."""

    restore_s: float
    call_s: float


def resume(config: Config, directory: Path) -> Resume:
    """Train two steps in `directory` if nothing is there yet, then go on by one step and time that."""
    found = RunDir(directory)
    done = len(found.all_spans()) and found.num_attempts()
    moments: dict[str, float] = {}

    def adamw(parameters: Any) -> torch.optim.Optimizer:  # made last of all that is restored
        moments["restore"] = time.perf_counter()
        return torch.optim.AdamW(parameters, fused=True)

    def first_step(_: Any) -> None:
        moments.setdefault("step", time.perf_counter())

    config = dataclasses.replace(
        config, evaluation=EvaluationConfig(at_start=False, max_samples=1),
        checkpoint=CheckpointConfig(every_s=0.0), logging=LoggingConfig(limit_s=0.0), num_steps=2 + done,
    )  # fmt: skip
    begin = time.perf_counter()
    train(config, run=directory, optimizer=adamw, hooks=[first_step], quiet=True)
    if not done:
        return resume(config, directory)
    return Resume(moments["step"] - moments["restore"], moments["step"] - begin)


# ---- other formats


def undetected_flips(trials: int, directory: Path, seed: int = 0) -> dict[str, float | None]:
    """Of `trials` random bit flips in a file of tensors, those that load as other tensors without an error."""
    draw = random.Random(seed)
    tensors = {f"layer{i}.weight": torch.randn(64, 64) for i in range(8)}
    return {
        "torch.distributed.checkpoint": _flips_of_dcp(trials, directory / "dcp", tensors, draw),
        "safetensors": _flips_of_safetensors(trials, directory / "flips.safetensors", tensors, draw),
    }


def _flips_of_safetensors(trials: int, path: Path, tensors: dict[str, torch.Tensor], draw: random.Random) -> int:
    from safetensors.torch import load_file, save_file

    save_file(tensors, path)
    return _wrong_loads(trials, path, tensors, draw, lambda: load_file(path))


def _flips_of_dcp(trials: int, path: Path, tensors: dict[str, torch.Tensor], draw: random.Random) -> int:
    import torch.distributed.checkpoint as dcp

    dcp.save(tensors, checkpoint_id=path, no_dist=True)

    def load() -> dict[str, torch.Tensor]:
        found = {name: torch.zeros_like(value) for name, value in tensors.items()}
        dcp.load(found, checkpoint_id=path, no_dist=True)
        return found

    return _wrong_loads(trials, next(path.glob("*.distcp")), tensors, draw, load)


def _wrong_loads(trials: int, path: Path, tensors: dict[str, torch.Tensor], draw: random.Random, load: Any) -> int:
    good = path.read_bytes()
    wrong = 0
    for _ in range(trials):
        data = bytearray(good)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        try:
            found = load()
        except (Exception, CheckpointException):  # the latter is no Exception
            continue  # any error is a detection
        wrong += found.keys() != tensors.keys() or any(
            not torch.equal(found[name].view(torch.int32), value.view(torch.int32)) for name, value in tensors.items()
        )
    return wrong
