"""How fast the run is: units a second, model FLOPs a second, and their share of what this machine can do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Speed:
    """Throughput between two progress lines, from the time of steps alone (evaluation and checkpoints left out).

    `flops_per_sample` are model FLOPs of forward and backward; `limit_flops_per_s` the best dense rate measured on
    this machine for the dtype in use, over all processes of the run; None where it is not known.
    """

    unit: str
    global_batch: int
    flops_per_sample: float | None = None
    limit_flops_per_s: float | None = None
    datasheet_flops_per_s: float | None = None
    _steps_s: float = field(default=0.0, init=False)
    _num_steps: int = field(default=0, init=False)
    _units: float = field(default=0.0, init=False)

    def add(self, step_s: float, units: float) -> None:
        self._steps_s += step_s
        self._units += units
        self._num_steps += 1

    def fetch(self, remaining_steps: int) -> dict[str, Any]:
        """The figures since the last call; starts anew."""
        step_s = self._steps_s / max(1, self._num_steps)
        units_per_s = self._units / self._steps_s if self._steps_s else 0.0
        flops_per_s = self.flops_per_sample * self.global_batch / step_s if self.flops_per_sample and step_s else None
        self._steps_s, self._num_steps, self._units = 0.0, 0, 0.0
        if flops_per_s and self.limit_flops_per_s:  # what the run itself reached, the machine can do
            self.limit_flops_per_s = max(self.limit_flops_per_s, flops_per_s)
        return {
            "step_s": step_s,
            "units_per_s": units_per_s,
            "model_flops_per_s": flops_per_s,
            "share_of_limit": flops_per_s / self.limit_flops_per_s if flops_per_s and self.limit_flops_per_s else None,
            "mfu": flops_per_s / self.datasheet_flops_per_s if flops_per_s and self.datasheet_flops_per_s else None,
            "remaining_s": step_s * remaining_steps,
        }
