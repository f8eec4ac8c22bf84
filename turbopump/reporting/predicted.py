"""What was predicted of a run, beside what was measured: each field of both Breakdowns, and where they differ.

prediction.json is written by `train` (turbopump/planner/own_run.py). A part differs where the measured seconds lie
outside the predicted 80 % band, and by so much that it matters: `LEAST_SHARE` of the step or run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from turbopump.core.spans import RunBreakdown, StepBreakdown
from turbopump.reporting.load import RUN_FIELDS, STEP_FIELDS, measured

HOW = ("`turbopump probe --for RECIPE` measures this machine; `train`, started beside the machine.json that it writes, "
       "then says beforehand what it expects")  # fmt: skip
LEAST_SHARE = 0.01


@dataclass(frozen=True)
class Part:
    """A field of a Breakdown, or its sum (`total`)."""

    name: str
    predicted_s: float
    low_s: float
    high_s: float
    measured_s: float
    matters: bool
    """Whether the difference is worth a word."""

    @property
    def outside(self) -> bool:
        return not self.low_s <= self.measured_s <= self.high_s

    @property
    def differs(self) -> bool:
        return self.outside and self.matters


@dataclass(frozen=True)
class Predicted:
    """Predicted and measured; `problem` says why nothing was predicted, `how` what to do about it."""

    step: tuple[Part, ...] = ()
    run: tuple[Part, ...] = ()
    machine: str = ""
    measured_share: float | None = None
    """Of the operations' predicted seconds: what exactly measured operations tell."""
    calibrated_by: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    problem: str = ""
    how: str = ""

    @property
    def differing(self) -> tuple[Part, ...]:
        return tuple(part for part in (*self.step, *self.run) if part.differs)

    def part(self, name: str) -> Part | None:
        """Of the step."""
        return next((part for part in self.step if part.name == name), None)


def beside(
    record: Mapping[str, Any], step: StepBreakdown | None, run: RunBreakdown | None, *, finished: bool
) -> Predicted:
    """prediction.json beside the mean step and, where the run came to its end, the whole run."""
    if not record:
        return Predicted(problem="nothing was predicted: no machine.json lay beside the run", how=HOW)
    if problem := record.get("problem"):
        return Predicted(problem=f"nothing was predicted: {problem}", how=HOW)
    share = measured(record.get("measured_share"))
    return Predicted(
        step=_parts(record, "step", "low", "high", STEP_FIELDS, asdict(step) if step is not None else None),
        run=_parts(record, "run", "run_low", "run_high", RUN_FIELDS,
                   asdict(run) if run is not None and finished else None),
        machine=" of ".join(str(record[key]) for key in ("machine_name", "machine_date") if record.get(key)),
        measured_share=share, calibrated_by=_texts(record.get("calibrated_by")), notes=_texts(record.get("notes")),
    )  # fmt: skip


def _parts(
    record: Mapping[str, Any], middle: str, low: str, high: str, names: tuple[str, ...],
    found: Mapping[str, float] | None,
) -> tuple[Part, ...]:  # fmt: skip
    tables = [record.get(key) for key in (middle, low, high)]
    if found is None or not all(isinstance(table, Mapping) for table in tables):
        return ()
    total_s = sum(found.values())
    parts = []
    for name in (*names, "total"):
        values = [measured(table.get(name)) for table in tables if isinstance(table, Mapping)]
        if any(value is None for value in values):
            continue
        predicted_s, low_s, high_s = (float(value) for value in values if value is not None)
        measured_s = total_s if name == "total" else found[name]
        matters = abs(measured_s - predicted_s) >= LEAST_SHARE * total_s
        parts.append(Part(name, predicted_s, low_s, high_s, measured_s, matters))
    return tuple(parts)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(text) for text in value) if isinstance(value, list) else ()
