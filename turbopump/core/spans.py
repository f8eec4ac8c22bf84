"""Where the seconds go: spans measured while training, and the two Breakdowns they add up to.

`with span("data"):` books the time inside under a name; time inside an inner span is taken from the outer one, so
names are disjoint and sum to wall time. `Spans` belongs to one process; `span` finds the current one (a no-op where
there is none, so that code with spans runs anywhere). Records go to `spans/rank<r>.jsonl`:

    {"type": "attempt", "attempt": 0, "epoch_s": <unix time>, "pid": ..., "rank": ..., "world_size": ...}
    {"type": "period", "name": "startup"|"evaluation"|"checkpoint"|"logging", "start_s": ..., "s": ..., "step": ...}
    {"type": "step", "step": 7, "start_s": ..., "s": ..., "spans": {"data": ..., "compute": ..., ...},
     "loader": {"ready_steps": ..., "wait_s": ..., "read_s": ..., "restarts": ...}}     (`note`; no part of any sum)
    {"type": "restore", "step": 5}            the attempt goes on from here; steps 6... of earlier attempts are lost
    {"type": "end", "s": ..., "reason": "finished"|"SIGINT"|...}

`start_s` counts from the attempt's start; `epoch_s` joins attempts. Frozen: see docs/decisions/.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from turbopump.core.files import JsonLines

STEP_SPANS = {
    "data": "data",
    "compute": "compute",
    "communication": "exposed_communication",
    "bubble": "bubble",
    "optimizer": "optimizer",
}


PERIODS = ("startup", "evaluation", "checkpoint")  # any other, e.g. `logging`, is idle time of the run


@dataclass(frozen=True)
class StepBreakdown:
    """Disjoint seconds of a step; they sum to its wall time."""

    data: float = 0.0
    compute: float = 0.0
    exposed_communication: float = 0.0
    bubble: float = 0.0
    optimizer: float = 0.0
    other: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())

    def __add__(self, more: StepBreakdown) -> StepBreakdown:
        return StepBreakdown(*(getattr(self, f.name) + getattr(more, f.name) for f in fields(self)))

    def __mul__(self, times: float) -> StepBreakdown:
        return StepBreakdown(*(getattr(self, f.name) * times for f in fields(self)))

    @classmethod
    def from_spans(cls, step_s: float, spans: Mapping[str, float]) -> StepBreakdown:
        """Known spans by field; unknown ones and what no span covers are `other`."""
        known = {target: spans.get(name, 0.0) for name, target in STEP_SPANS.items()}
        return cls(**known, other=max(0.0, step_s - sum(known.values())))


@dataclass(frozen=True)
class RunBreakdown:
    """Disjoint seconds of a run over all its attempts; they sum to wall time from first start to last end."""

    startup: float = 0.0
    steps: float = 0.0
    evaluation: float = 0.0
    checkpoint: float = 0.0
    lost: float = 0.0
    idle: float = 0.0

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


class Spans:
    """The span recorder of one process; `path` None records nothing on disk."""

    def __init__(
        self,
        path: Path | None = None,
        *,
        attempt: int = 0,
        rank: int = 0,
        world_size: int = 1,
        began_before_s: float = 0.0,
    ) -> None:
        """`began_before_s`: the attempt began this long ago (the process was started, libraries were imported)."""
        self._file = JsonLines(path) if path is not None else None
        self._start = time.perf_counter() - began_before_s
        self.last_step_s = 0.0
        self._stack: list[_Open] = []
        self._totals: dict[str, float] = {}
        self._notes: dict[str, Mapping[str, float]] = {}
        self._thread = threading.get_ident()
        self._before: Spans | None = None
        self._write({"type": "attempt", "attempt": attempt, "epoch_s": time.time() - began_before_s,
                     "pid": os.getpid(), "rank": rank,
                     "world_size": world_size})  # fmt: skip
        self.flush()

    def now(self) -> float:
        """Seconds since this attempt started."""
        return time.perf_counter() - self._start

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Wraps one training step, numbered from 1, and records its spans."""
        self._totals, self._notes = {}, {}
        begin = time.perf_counter()
        try:
            yield
        finally:
            elapsed = time.perf_counter() - begin
            self._write({"type": "step", "step": step, "start_s": begin - self._start, "s": elapsed,
                         "spans": self._totals, **self._notes})  # fmt: skip
            self.last_step_s = elapsed

    @contextmanager
    def period(self, name: str, step: int | None = None) -> Iterator[None]:
        """Wraps work outside steps: start-up, evaluation, checkpoint, logging."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._write({"type": "period", "name": name, "start_s": begin - self._start,
                         "s": time.perf_counter() - begin, "step": step})  # fmt: skip
            self.flush()

    def started(self) -> None:
        """Everything since the attempt began was start-up."""
        self._write({"type": "period", "name": "startup", "start_s": 0.0, "s": self.now(), "step": None})
        self.flush()

    def restored(self, step: int) -> None:
        self._write({"type": "restore", "step": step})

    def flush(self) -> None:
        if self._file is not None:
            self._file.flush()

    def close(self, reason: str) -> None:
        self._write({"type": "end", "s": self.now(), "reason": reason})
        if self._file is not None:
            self._file.close()

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(record)

    def __enter__(self) -> Spans:
        global _current
        self._before, _current = _current, self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = self._before


class _Open:
    __slots__ = ("begin", "inner", "name", "spans")

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        spans = _current
        if spans is not None and spans._thread == threading.get_ident():  # others overlap this one
            self.spans: Spans | None = spans
            spans._stack.append(self)
            self.inner = 0.0
            self.begin = time.perf_counter()
        else:
            self.spans = None

    def __exit__(self, *_: object) -> None:
        spans = self.spans
        if spans is None:
            return
        elapsed = time.perf_counter() - self.begin
        spans._stack.pop()
        spans._totals[self.name] = spans._totals.get(self.name, 0.0) + elapsed - self.inner
        if spans._stack:
            spans._stack[-1].inner += elapsed


_current: Spans | None = None


def span(name: str) -> _Open:
    """`with span("compute"):` books the time inside, less inner spans, under `name` in the current step."""
    return _Open(name)


def note(name: str, values: Mapping[str, float]) -> None:
    """Write `values` into the record of the current step, under `name`: what happened beside its spans."""
    spans = _current
    if spans is not None and spans._thread == threading.get_ident():
        spans._notes[name] = values


def step_breakdown(records: Iterable[Mapping[str, Any]]) -> StepBreakdown:
    """Mean Breakdown of the step records given (0 where there are none)."""
    total, count = StepBreakdown(), 0
    for record in records:
        if record.get("type") == "step":
            total, count = total + StepBreakdown.from_spans(record["s"], record["spans"]), count + 1
    return total * (1 / count) if count else total


def run_breakdown(records: Iterable[Mapping[str, Any]]) -> RunBreakdown:
    """Breakdown of a whole run from all records of one rank, in file order, over all attempts.

    A step is lost when it was done again: a later attempt went on from before it. A period inside another is taken
    from the outer one. `idle` is what nothing else explains: time between attempts and between periods.
    """
    seconds = dict.fromkeys((f.name for f in fields(RunBreakdown)), 0.0)
    kept: list[tuple[int, float]] = []  # (number, seconds) of the steps that no later attempt did again
    closed: list[tuple[float, float]] = []  # (start, seconds) of periods that a later record may turn out to hold
    origin_s: float | None = None
    base_s = last_s = 0.0
    for record in records:
        kind = record.get("type")
        if kind == "attempt":
            origin_s = record["epoch_s"] if origin_s is None else origin_s
            base_s = last_s = max(last_s, record["epoch_s"] - origin_s)  # also where the clock was set back
            closed.clear()
        elif kind == "restore":
            seconds["lost"] += _undo(kept, record["step"])
        elif kind in ("step", "period"):
            start_s, s = record["start_s"], record["s"]
            last_s = max(last_s, base_s + start_s + s)
            inner_s = 0.0
            while closed and closed[-1][0] >= start_s:
                inner_s += closed.pop()[1]
            closed.append((start_s, s))
            own_s = max(0.0, s - inner_s)
            if kind == "step":
                seconds["lost"] += _undo(kept, record["step"] - 1)
                kept.append((record["step"], own_s))
            elif record["name"] in PERIODS:
                seconds[record["name"]] += own_s
        elif kind == "end":
            last_s = max(last_s, base_s + record["s"])
    seconds["steps"] = sum(s for _, s in kept)
    seconds["idle"] = max(0.0, last_s - sum(s for name, s in seconds.items() if name != "idle"))
    return RunBreakdown(**seconds)


def _undo(kept: list[tuple[int, float]], last_step: int) -> float:
    """Take the steps after `last_step` away; their seconds."""
    lost_s = 0.0
    while kept and kept[-1][0] > last_step:
        lost_s += kept.pop()[1]
    return lost_s
