"""A run directory as numbers: everything `report` knows, read once, tolerant of what is missing or damaged.

`load_run` -> `RunData`: config and choices (tables), env (plain values), metrics (`Metrics`), one `RankSpans` a rank,
checkpoints on disk, samples. What is absent stays empty or NaN and the page says "not measured"; damaged lines are
counted in `notes`. Files are streamed line by line into columns, so that a million steps fit in memory.

After a resume the steps of the undone part appear again; here only those that count are kept (`Metrics`), or are
marked (`RankSpans.lost`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.core.config import from_toml
from turbopump.core.errors import UsageError
from turbopump.core.files import from_json
from turbopump.core.rundir import RunDir, open_run
from turbopump.core.spans import STEP_SPANS, RunBreakdown, StepBreakdown, run_breakdown

STEP_FIELDS = tuple(f.name for f in fields(StepBreakdown))
RUN_FIELDS = tuple(f.name for f in fields(RunBreakdown))
_SPAN_NAMES = tuple(STEP_SPANS)
_LARGEST_SAMPLES = 200


def number(value: Any) -> float:
    """`value` as a float; NaN for anything that is not a number (JSON has no NaN, so a diverged loss is null)."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan


def measured(value: Any) -> float | None:
    """`value` as a finite float, or None: not measured."""
    found = number(value)
    return found if math.isfinite(found) else None


@dataclass(frozen=True)
class Attempt:
    """One start of the run's processes. Seconds count from the first start of the run."""

    number: int
    start_s: float
    restored_step: int | None
    last_s: float
    end_reason: str | None


@dataclass(frozen=True)
class Period:
    """Work outside steps: start-up, evaluation, checkpoint, logging."""

    name: str
    start_s: float
    s: float


@dataclass(frozen=True)
class RankSpans:
    """All spans of one rank as columns of length S; `parts` is [S, 6] in the order of `STEP_FIELDS`."""

    rank: int
    attempts: tuple[Attempt, ...]
    periods: tuple[Period, ...]
    step: np.ndarray
    start_s: np.ndarray
    step_s: np.ndarray
    parts: np.ndarray
    attempt: np.ndarray
    lost: np.ndarray
    breakdown: RunBreakdown
    wall_s: float
    first_epoch_s: float


@dataclass(frozen=True)
class Metrics:
    """metrics.jsonl: `steps` and `progress` as columns by name, the rarer records as they are."""

    steps: Mapping[str, np.ndarray]
    progress: Mapping[str, np.ndarray]
    evaluations: tuple[dict[str, Any], ...]
    checkpoints: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class RunData:
    """What a run directory holds. Nothing in it is derived."""

    path: Path
    name: str
    config: dict[str, Any]
    choices: dict[str, Any]
    env: dict[str, Any]
    evaluated: dict[str, Any]  # the last result of the verb `evaluate`
    metrics: Metrics
    ranks: tuple[RankSpans, ...]
    checkpoint_bytes: dict[int, int]
    samples: tuple[dict[str, Any], ...]
    notes: tuple[str, ...] = field(default=())
    prediction: dict[str, Any] = field(default_factory=dict)
    """What was expected of it before its first step."""


def load_run(path: Path) -> RunData:
    """Read the run directory at `path`; raises `UsageError` where there is none."""
    run = open_run(path)
    notes: list[str] = []
    config = _toml(run.config, notes)
    name = config.get("name")
    return RunData(
        path=run.path,
        name=name if isinstance(name, str) and name else run.path.resolve().name,
        config=config,
        choices=_toml(run.choices, notes, needed=False),
        env=_json_object(run.env, notes),
        evaluated=_json_object(run.evaluation, []),
        prediction=_json_object(run.prediction, []),
        metrics=_read_metrics(run.metrics, notes),
        ranks=_read_ranks(run, notes),
        checkpoint_bytes=_checkpoints_on_disk(run.checkpoints),
        samples=tuple(_lines(run.samples, notes, needed=False))[-_LARGEST_SAMPLES:],
        notes=tuple(notes),
    )


def _toml(path: Path, notes: list[str], needed: bool = True) -> dict[str, Any]:
    try:
        return from_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            notes.append(f"{path.name} is missing")
    except (OSError, UnicodeDecodeError, UsageError):
        notes.append(f"{path.name} cannot be read: it is not valid TOML")
    return {}


def _json_object(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        value = from_json(path.read_bytes())
        if isinstance(value, dict):
            return value
        notes.append(f"{path.name} holds no JSON object")
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: device, limit and model size are not known")
    except (OSError, ValueError):
        notes.append(f"{path.name} cannot be read: it is not valid JSON")
    return {}


def _lines(path: Path, notes: list[str], needed: bool = True) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file; damaged lines are counted into one note. Blank lines mend a line cut by a crash."""
    if not path.is_file():
        if needed:
            notes.append(f"{path.name} is missing")
        return
    damaged = 0
    with path.open("rb") as file:
        for line in file:
            try:
                record = from_json(line)
            except ValueError:  # UnicodeDecodeError is one too
                damaged += bool(line.strip())
                continue
            if isinstance(record, dict):
                yield record
            else:
                damaged += 1
    if damaged:
        notes.append(f"{path.name}: {damaged} damaged line{'s' * (damaged > 1)} passed over")


# ---- spans ----------------------------------------------------------------------------------------------------------


class _Reader:
    """Collects the records of one rank into columns while `run_breakdown` consumes them."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.attempts: list[dict[str, Any]] = []
        self.periods: list[Period] = []
        self.step = array("q")
        self.start_s, self.step_s = array("d"), array("d")
        self.spans = array("d")
        self.attempt = array("i")
        self.restores: list[tuple[int, int]] = []  # (steps read so far, step the run went back to)
        self.rejected = 0
        self._first_epoch_s = self._base_s = 0.0
        self._last_step = 0

    def take(self, records: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The valid records, plus a restore where an attempt repeats steps without having said so."""
        for record in records:
            kind = record.get("type")
            if kind == "step" and self._valid(record, "step", "start_s", "s") and self.attempts:
                record["spans"] = {k: _seconds(v) for k, v in _mapping(record.get("spans")).items()}
                if record["step"] <= self._last_step:
                    yield self._restore(int(record["step"]) - 1)
                self._take_step(record)
            elif kind == "attempt" and self._valid(record, "epoch_s"):
                self._take_attempt(record)
            elif kind == "restore" and self._valid(record, "step") and self.attempts:
                yield self._restore(int(record["step"]))
                continue
            elif kind == "period" and self._valid(record, "start_s", "s") and self.attempts:
                record["name"] = str(record.get("name"))
                begin_s = self._base_s + record["start_s"]
                self.periods.append(Period(record["name"], begin_s, record["s"]))
                self._seen(begin_s + record["s"])
            elif kind == "end" and self._valid(record, "s") and self.attempts:
                self.attempts[-1]["end_reason"] = str(record.get("reason", "ended"))
                self._seen(self._base_s + record["s"])
            else:
                self.rejected += 1
                continue
            yield record

    def _valid(self, record: Mapping[str, Any], *names: str) -> bool:
        return all(math.isfinite(number(record.get(name))) for name in names)

    def _seen(self, at_s: float) -> None:
        self.attempts[-1]["last_s"] = max(self.attempts[-1]["last_s"], at_s)

    def _take_attempt(self, record: Mapping[str, Any]) -> None:
        if not self.attempts:
            self._first_epoch_s = record["epoch_s"]
        before_s = max((a["last_s"] for a in self.attempts), default=0.0)
        self._base_s = max(before_s, record["epoch_s"] - self._first_epoch_s)  # also where the clock was set back
        self.attempts.append({"start_s": self._base_s, "last_s": self._base_s, "restored_step": None,
                              "end_reason": None})  # fmt: skip

    def _restore(self, step: int) -> dict[str, Any]:
        self.restores.append((len(self.step), step))
        self.attempts[-1]["restored_step"] = step
        self._last_step = step
        return {"type": "restore", "step": step}

    def _take_step(self, record: Mapping[str, Any]) -> None:
        begin_s = self._base_s + record["start_s"]
        self._last_step = int(record["step"])
        self.step.append(self._last_step)
        self.start_s.append(begin_s)
        self.step_s.append(record["s"])
        spans = record["spans"]
        self.spans.extend([spans.get(name, 0.0) for name in _SPAN_NAMES])
        self.attempt.append(len(self.attempts) - 1)
        self._seen(begin_s + record["s"])

    def finish(self, breakdown: RunBreakdown) -> RankSpans:
        step_s = np.array(self.step_s)
        known = np.array(self.spans).reshape(-1, len(_SPAN_NAMES))
        other = np.maximum(0.0, step_s - known.sum(1))
        step = np.array(self.step, dtype=np.int64)
        lost = np.zeros(len(step), dtype=bool)
        for count, restored in self.restores:
            lost[:count] |= step[:count] > restored
        attempts = tuple(Attempt(number=i, **a) for i, a in enumerate(self.attempts))
        return RankSpans(
            rank=self.rank,
            attempts=attempts,
            periods=tuple(self.periods),
            step=step,
            start_s=np.array(self.start_s),
            step_s=step_s,
            parts=np.column_stack([known, other]),
            attempt=np.array(self.attempt, dtype=np.int32),
            lost=lost,
            breakdown=breakdown,
            wall_s=max((a.last_s for a in attempts), default=0.0),
            first_epoch_s=self._first_epoch_s,
        )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _seconds(value: Any) -> float:
    found = number(value)
    return found if math.isfinite(found) else 0.0


def _read_ranks(run: RunDir, notes: list[str]) -> tuple[RankSpans, ...]:
    found = []
    for path in sorted((run.path / "spans").glob("rank*.jsonl")):
        digits = path.stem.removeprefix("rank")
        if not digits.isdecimal():
            continue
        reader = _Reader(int(digits))
        breakdown = run_breakdown(reader.take(_lines(path, notes)))
        if reader.rejected:
            notes.append(f"{path.name}: {reader.rejected} records without the expected fields passed over")
        if reader.attempts:
            found.append(reader.finish(breakdown))
    if not found:
        notes.append("no spans: where the time went was not measured")
    return tuple(sorted(found, key=lambda r: r.rank))


# ---- metrics --------------------------------------------------------------------------------------------------------

_STEP_COLUMNS = ("loss", "grad_norm", "lr")
_PROGRESS_COLUMNS = ("loss", "units_per_s", "step_s", "share_of_limit", "mfu", "epoch_s", "rss_bytes", "device_bytes")


class _Columns:
    """Records of one type as columns, with the line each came from."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.line, self.step = array("q"), array("q")
        self.values = array("d")

    def take(self, line: int, step: int, record: Mapping[str, Any]) -> None:
        self.line.append(line)
        self.step.append(step)
        self.values.extend([number(record.get(name)) for name in self.names])

    def finish(self, rewinds: list[tuple[int, int]]) -> dict[str, np.ndarray]:
        line, step = np.array(self.line), np.array(self.step, dtype=np.int64)
        values = np.array(self.values).reshape(-1, len(self.names))
        keep = np.ones(len(step), dtype=bool)
        for rewind_line, first in rewinds:
            keep &= (line >= rewind_line) | (step < first)
        return {"step": step[keep], **{name: values[keep, i] for i, name in enumerate(self.names)}}


def _read_metrics(path: Path, notes: list[str]) -> Metrics:
    steps, progress = _Columns(_STEP_COLUMNS), _Columns(_PROGRESS_COLUMNS)
    evaluations: list[tuple[int, dict[str, Any]]] = []
    checkpoints: list[dict[str, Any]] = []
    rewinds: list[tuple[int, int]] = []  # (line, step that was done again there)
    last = 0
    for line, record in enumerate(_lines(path, notes)):
        kind, at = record.get("type"), number(record.get("step"))
        if not math.isfinite(at):
            continue
        step = int(at)
        if kind == "step":
            if step <= last:
                rewinds.append((line, step))
            last = step
            steps.take(line, step, record)
        elif kind == "progress":
            progress.take(line, step, record)
        elif kind == "evaluation":
            evaluations.append((line, record | {"step": step, "split": str(record.get("split", "validation"))}))
        elif kind == "checkpoint":
            checkpoints.append(record | {"step": step})
    kept = {
        (r["split"], r["step"]): r
        for line, r in evaluations
        if not any(line < rewind_line and r["step"] >= first for rewind_line, first in rewinds)
    }
    return Metrics(
        steps=steps.finish(rewinds),
        progress=progress.finish(rewinds),
        evaluations=tuple(sorted(kept.values(), key=lambda r: r["step"])),
        checkpoints=tuple(checkpoints),
    )


def _checkpoints_on_disk(path: Path) -> dict[int, int]:
    """Bytes of every checkpoint that is there, by step."""
    found = {}
    for entry in sorted(path.glob("step-*")):
        digits = entry.name.removeprefix("step-")
        if digits.isdecimal() and (entry / "manifest.json").is_file():
            found[int(digits)] = sum(f.stat().st_size for f in entry.rglob("*") if f.is_file())
    return found
