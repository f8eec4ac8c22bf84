"""Proof that a recipe resumes exactly: one run never stopped, one killed (SIGKILL) and resumed, compared bit by bit.

Both runs are whole commands in processes of their own, with the recipe's own model, data, workers and ranks. What is
compared: loss and gradient norm of every step, then every tensor of the last checkpoint by its stored checksum. The
first thing that differs is named.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from turbopump.core.checkpoint_store import latest, list_checkpoints, tensor_digests
from turbopump.core.config import load
from turbopump.core.errors import CheckpointError, UsageError
from turbopump.core.files import read_json_lines
from turbopump.core.rundir import RunDir

MAX_STEPS = 24
POLL_S = 0.02


def verify_resume(recipe: Path, overrides: Sequence[str], options: Sequence[str] = ()) -> str:
    """A line that says what was compared; raises `CheckpointError` naming the first difference."""
    live = {
        name: {"kind": "live"} for name in ("model", "data") if f"--{'dataset' if name == 'data' else name}" in options
    }
    config = load(recipe, overrides, live=live)
    num_steps = min(config.num_steps, MAX_STEPS)
    save_every = max(1, num_steps // 4)
    if num_steps < 4:
        raise UsageError(f"num_steps: {num_steps} is too short to be stopped in between: use 4 or more")
    settings = [*overrides, f"num_steps={num_steps}", f"checkpoint.every={save_every}", "checkpoint.every_s=0",
                f"checkpoint.keep_last={num_steps}", "evaluation.at_start=false", "logging.every=1",
                "logging.limit_s=0"]  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="turbopump-verify-") as folder:
        whole, stopped = RunDir(Path(folder) / "whole"), RunDir(Path(folder) / "stopped")
        print(f"1/3 a run of {num_steps} steps that is never stopped", flush=True)
        _wait(_start(recipe, settings, options, whole))
        print(f"2/3 the same run, killed (SIGKILL) after its checkpoint of step {save_every}", flush=True)
        killed_at = _kill_after(_start(recipe, settings, options, stopped), stopped, save_every)
        print(f"3/3 resumed (steps made before the kill: {killed_at})", flush=True)
        _wait(_start(recipe, settings, options, stopped))
        return _compare(whole, stopped, num_steps)


def _start(recipe: Path, settings: Sequence[str], options: Sequence[str], rundir: RunDir) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "turbopump.cli", "train", str(recipe), *settings, "--run", str(rundir.path),
               "--quiet", *options]  # fmt: skip
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)


def _wait(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise CheckpointError(f"the run itself fails: {errors.decode(errors='replace').strip()[-2000:]}")


def _kill_after(process: subprocess.Popen[bytes], rundir: RunDir, step: int) -> int:
    """SIGKILL the whole session once the checkpoint of `step` is there; the steps it had made by then."""
    while process.poll() is None:
        if any(checkpoint.step >= step for checkpoint in list_checkpoints(rundir.checkpoints)):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        time.sleep(POLL_S)
    else:
        _wait(process)
    return max(_steps(rundir), default=0)


def _steps(rundir: RunDir) -> dict[int, tuple[Any, Any]]:
    """(loss, gradient norm) by step; a step made again counts as made the last time."""
    return {
        record["step"]: (record["loss"], record["grad_norm"])
        for record in read_json_lines(rundir.metrics)
        if record.get("type") == "step"
    }


def _compare(whole: RunDir, stopped: RunDir, num_steps: int) -> str:
    attempts = stopped.num_attempts()
    if attempts < 2:
        raise CheckpointError("the run was over before it could be killed: use a recipe with more steps")
    ours, theirs = _steps(whole), _steps(stopped)
    for step in range(1, num_steps + 1):
        for name, a, b in zip(("loss", "gradient norm"), ours.get(step, (None, None)), theirs.get(step, (None, None))):
            if a != b:
                raise CheckpointError(f"the {name} of step {step} differs: {a!r} never stopped, {b!r} resumed")
    a, b = latest(whole.checkpoints), latest(stopped.checkpoints)
    assert a is not None and b is not None
    ours_digests, theirs_digests = tensor_digests(a), tensor_digests(b)
    for name in sorted(ours_digests.keys() | theirs_digests.keys()):
        if ours_digests.get(name) != theirs_digests.get(name):
            raise CheckpointError(f"tensor {name!r} differs after step {num_steps}, though every loss was equal")
    return (
        f"exact: {num_steps} losses and gradient norms and {len(ours_digests)} tensors are equal bit for bit "
        f"({attempts} attempts against 1)"
    )
