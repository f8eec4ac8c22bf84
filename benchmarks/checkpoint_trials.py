"""Do checkpoints survive `kill -9` and rotten bits? `kill_trials(n)` and `flip_trials(n)` count.

`python benchmarks/checkpoint_trials.py kill 200` (or `flip 300`) prints the counts as JSON. A kill trial forks a
process that saves without pause, one value of the whole state a step; it is killed at a random moment, and what a new
process then restores is compared with what had been reported as committed. A flip trial inverts one random bit of one
random file of a checkpoint and reads it back in every way there is.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

_STATE_FLOATS = 1_000_000  # 4 MB: a save takes about as long as the moment of the kill is spread over


def kill_trials(trials: int, seed: int = 0) -> dict[str, Any]:
    """Counts: `trials`, `wrong` (restored other bits than were saved), `lost` (a committed step is gone),
    `unloadable`, `during_a_save` (kills that left a staging directory). Runs in a process of its own."""
    return _in_own_process("kill", trials, seed)


def flip_trials(trials: int, seed: int = 0) -> dict[str, Any]:
    """Counts: `trials`, `detected`, `harmless` (read back bit for bit all the same), `undetected`."""
    return _in_own_process("flip", trials, seed)


def _in_own_process(kind: str, trials: int, seed: int) -> dict[str, Any]:
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, __file__, kind, str(trials), str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"checkpoint trials failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class _State:
    """A state whose every element says its step."""

    def __init__(self) -> None:
        import torch

        self.step = 0
        self.weights = {
            "model.a": torch.zeros(_STATE_FLOATS // 2),
            "model.b": torch.zeros(_STATE_FLOATS // 4, 2),
            "optimizer.a.step": torch.zeros((), dtype=torch.int64),
        }

    def advance(self, step: int) -> None:
        self.step = step
        for tensor in self.weights.values():
            tensor.fill_(step)

    def is_whole(self) -> bool:
        return all(bool((tensor == self.step).all()) for tensor in self.weights.values())

    def checkpoint_tensors(self) -> dict[str, Any]:
        return self.weights

    def checkpoint_values(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_checkpoint(self, tensors: dict[str, Any], values: dict[str, Any]) -> None:
        self.weights, self.step = tensors, values["step"]


def _run_kill_trials(trials: int, seed: int) -> dict[str, Any]:
    counts = {"trials": 0, "wrong": 0, "lost": 0, "unloadable": 0, "during_a_save": 0, "steps": 0}
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        directory, committed = Path(name) / "checkpoints", 0
        for _ in range(trials):
            committed = max(committed, _save_until_killed(directory, draw.uniform(0, 0.15)))
            counts["trials"] += 1
            counts["during_a_save"] += any(p.name.startswith(".") for p in directory.iterdir())
            state = _State()
            try:
                restored = _checkpoints(directory).restore(state)
            except Exception:
                counts["unloadable"] += 1
                continue
            counts["lost"] += (restored or 0) < committed
            counts["wrong"] += restored is not None and not (state.is_whole() and state.step == restored)
            counts["steps"] = restored or 0
    return counts


def _save_until_killed(directory: Path, delay_s: float) -> int:
    """Fork a process that saves step after step, kill it; the last step it reported as committed."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _save_for_ever(directory, writer)
        finally:
            os._exit(1)
    os.close(writer)
    first = os.read(reader, 8)  # after the first commit of this attempt, so that every kill can lose something
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    reports = first
    while block := os.read(reader, 1 << 16):
        reports += block
    os.close(reader)
    return int.from_bytes(reports[len(reports) // 8 * 8 - 8 :][:8], "little")


def _save_for_ever(directory: Path, report: int) -> None:
    checkpoints, state = _checkpoints(directory), _State()
    checkpoints.restore(state)
    while True:
        state.advance(state.step + 1)
        checkpoints.save(state, metrics={"loss": 1 / state.step})
        for saved in checkpoints.poll() if state.step % 3 else checkpoints.wait():
            os.write(report, saved.step.to_bytes(8, "little"))


def _checkpoints(directory: Path) -> Any:
    from turbopump.core.config import CheckpointConfig
    from turbopump.training.checkpoint import Checkpoints

    return Checkpoints(directory, CheckpointConfig(keep_last=2), run_id="trial")


def _run_flip_trials(trials: int, seed: int) -> dict[str, Any]:
    import torch

    from turbopump.core.checkpoint_store import latest, verify_checkpoint
    from turbopump.core.errors import CheckpointError
    from turbopump.training.checkpoint import read_checkpoint

    counts = {"trials": 0, "detected": 0, "harmless": 0, "undetected": 0}
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        state = _State()
        state.weights = {f"model.{i}": torch.randn(37 * i + 1).to(d) for i, d in enumerate(
            (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool))}  # fmt: skip
        state.step = 100
        checkpoints = _checkpoints(Path(name) / "checkpoints")
        checkpoints.save(state, metrics={"loss": 0.5}, wait=True)
        path = latest(Path(name) / "checkpoints")
        assert path is not None
        files = sorted(path.iterdir())
        for _ in range(trials):
            file = draw.choice(files)
            data = bytearray(file.read_bytes())
            good = bytes(data)
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
            file.write_bytes(data)
            counts["trials"] += 1
            noticed = bool(verify_checkpoint(path))
            try:
                tensors, values = read_checkpoint(path)
                same = values == {"step": 100} and all(
                    torch.equal(tensors[k].view(torch.uint8), v.view(torch.uint8)) for k, v in state.weights.items()
                )
                noticed_by_reader = False
            except CheckpointError:
                noticed_by_reader, same = True, False
            counts["detected"] += noticed and noticed_by_reader
            counts["harmless"] += same and not noticed
            counts["undetected"] += (not noticed_by_reader and not same) or noticed != noticed_by_reader
            file.write_bytes(good)
        assert not verify_checkpoint(path)
        shutil.rmtree(path)
    return counts


if __name__ == "__main__":
    kind, number = sys.argv[1], int(sys.argv[2])
    import torch

    torch.set_num_threads(1)  # the kill trials fork
    run = {"kill": _run_kill_trials, "flip": _run_flip_trials}[kind]
    print(json.dumps(run(number, int(sys.argv[3]) if len(sys.argv) > 3 else 0)))
