"""What a run writes down and shows: metrics.jsonl (the truth), a line on the terminal, and further loggers.

The loss of a step stays on the device until a line is due; then all losses since the last line are fetched at once.
A `Logger` sees every record of metrics.jsonl; the entry-point group `turbopump.loggers` names more of them.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor

from turbopump.comms import process_group
from turbopump.core.files import JsonLines
from turbopump.core.units import human, human_seconds


class Logger(Protocol):
    """Sees each record as it is written to metrics.jsonl; must be cheap, and owns what it opens until `close`."""

    def log(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLogger:
    """metrics.jsonl, flushed with every progress line, synced to disk at the end."""

    def __init__(self, path: Path) -> None:
        self._file = JsonLines(path)

    def log(self, record: Mapping[str, Any]) -> None:
        self._file.write({k: _finite(v) for k, v in record.items()})
        if record["type"] != "step":
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class TerminalLogger:
    """A live line on a terminal, plain lines elsewhere; silent when `quiet`."""

    def __init__(self, unit: str, num_steps: int, *, quiet: bool = False) -> None:
        self._unit, self._num_steps, self._quiet = unit, num_steps, quiet
        self._console = Console(stderr=False, highlight=False)
        self._live: Live | None = None
        if not quiet and self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()

    def log(self, record: Mapping[str, Any]) -> None:
        kind = record["type"]
        if self._quiet or kind == "step":
            return
        if kind == "progress":
            text = self._progress(record)
            if self._live is not None:
                self._live.update(Text(text))
                return
            self._line(text)
        elif kind == "evaluation":
            values = "  ".join(
                f"{name.replace('_', ' ')} {value:.4f}"
                for name, value in record.items()
                if isinstance(value, float) and name not in ("s", "epoch_s")
            )
            self._line(f"evaluation at step {record['step']}: {values}")
        elif kind == "checkpoint":
            size, wrote, stall = human(record["bytes"], "B"), record["write_s"], record["stall_s"]
            self._line(
                f"checkpoint at step {record['step']}: {size} in {human_seconds(wrote)}, "
                f"of which training waited {human_seconds(stall)}"
            )
        elif kind == "note":
            self._line(str(record["text"]))

    def _progress(self, record: Mapping[str, Any]) -> str:
        share = record.get("share_of_limit")
        parts = [
            f"step {record['step']}/{self._num_steps}",
            f"loss {record['loss']:.4f}",
            f"{human(record['units_per_s'])} {self._unit}s/s",
            f"{share:.{0 if share >= 0.1 else 1}%} of limit" if share is not None else "",
            f"{human_seconds(record['remaining_s'])} left",
        ]
        return "  ".join(part for part in parts if part)

    def _line(self, text: str) -> None:
        if self._live is not None:
            self._console.print(Text(text))
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
        sys.stdout.flush()


class StepLosses:
    """Losses and gradient norms of steps that no line has shown yet, kept where they were computed."""

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._pending: list[tuple[int, Tensor, Tensor, float]] = []

    def add(self, step: int, loss_share: Tensor, grad_norm: Tensor, lr: float) -> None:
        self._pending.append((step, loss_share, grad_norm, lr))

    def fetch(self) -> list[dict[str, Any]]:
        """Step records since the last call. One all-reduce of all losses (8 bytes each) where there are ranks."""
        if not self._pending:
            return []
        losses = torch.stack([loss for _, loss, _, _ in self._pending]).cpu().double()
        norms = torch.stack([norm for _, _, norm, _ in self._pending]).cpu().tolist()
        values = process_group.all_reduce_sum(losses.tolist()) if self._world_size > 1 else losses.tolist()
        records = [
            {"type": "step", "step": step, "loss": loss, "grad_norm": norm, "lr": lr}
            for (step, _, _, lr), loss, norm in zip(self._pending, values, norms)
        ]
        self._pending.clear()
        return records


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
