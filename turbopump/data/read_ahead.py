"""Steps read ahead by threads or processes: in order to the consumer, in any order behind it, in bounded memory.

A `Task` is a few consecutive steps that one reader reads into one slot of the ring. There are as many slots as tasks
under way or waiting, plus the one in the consumer's hands: a slot is given out again when the consumer asks for the
step after its last one, and no sooner. That is the back-pressure, too. Readers compute everything from the step's
number, so only the order of delivery is decided here.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

HANDOFF_BYTES = 1 << 20
HANDOFF_READ_S = 1e-3
"""A hand-off costs up to 0.1 ms of Python: small and quick steps are handed over several at once, up to these."""


@dataclass(frozen=True, slots=True)
class Task:
    """Steps `first_step` to `first_step + num_steps - 1`, to be read into slot `slot`."""

    first_step: int
    num_steps: int
    slot: int
    one_by_one: bool = False


@dataclass(frozen=True, slots=True)
class Filled:
    """A task done: the microbatches of its steps, up to the one that failed with `error`."""

    task: Task
    steps: list[list[Any]]
    read_s: float
    nbytes: int
    end_s: float
    error: BaseException | None = None


class Readers(Protocol):
    """Threads or processes that read tasks; `finished` returns those done since, or at least one if it may wait."""

    @property
    def restarts(self) -> int:
        """Readers that died and were replaced."""

    def submit(self, task: Task) -> None: ...

    def finished(self, *, wait: bool) -> list[Filled]: ...

    def close(self) -> None: ...


class ReadAhead:
    """The steps `todo`, one after the other, through `num_slots` slots of `readers`.

    `ready_steps`: how many were ready when the last one was asked for; `read_s`: how long reading that one took.
    """

    def __init__(self, readers: Readers, todo: range, num_slots: int) -> None:
        self.readers = readers
        self.ready_steps = 0
        self.read_s = 0.0
        self._next, self._end = todo.start, todo.stop
        self._free = deque(range(num_slots))
        self._num_slots = num_slots
        self._steps_per_task = 1
        self._filled: dict[int, Filled] = {}
        self._current: Filled | None = None
        self._place = self._left = 0
        self._submit()

    def next(self, step: int) -> list[Any]:
        """The microbatches of `step`, which is the one after that of the last call. Raises what reading it raised."""
        current = self._current
        if current is None or self._place == current.task.num_steps:
            current = self._advance(step)
        else:
            self.ready_steps = self._left
        if self._place == len(current.steps):
            assert current.error is not None
            raise current.error
        self._place += 1
        self._left -= 1
        return current.steps[self._place - 1]

    def _advance(self, step: int) -> Filled:
        """Gives the slot in hand back and takes the one that begins with `step`, when it is filled."""
        if self._current is not None:
            self._free.append(self._current.task.slot)
            self._current = None
        self._submit()
        self._collect(wait=False)
        waited = step not in self._filled
        while step not in self._filled:
            self._collect(wait=True)
        self._left = sum(len(filled.steps) for filled in self._filled.values())
        self.ready_steps = 0 if waited else self._left
        current = self._current = self._filled.pop(step)
        self._place = 0
        self.read_s = current.read_s / max(1, len(current.steps))
        if current.steps:
            self._steps_per_task = _steps_per_task(current)
        return current

    def _submit(self) -> None:
        while self._free and self._next < self._end:
            count = min(self._steps_per_task, self._end - self._next)
            self.readers.submit(Task(self._next, count, self._free.popleft()))
            self._next += count

    def _collect(self, *, wait: bool) -> None:
        for filled in self.readers.finished(wait=wait):
            self._filled[filled.task.first_step] = filled

    def fill(self) -> list[Filled]:
        """Wait until every slot is filled or one has failed; what they hold, in the order in which they were done."""
        under_way = self._num_slots - len(self._free)
        while len(self._filled) < under_way and not any(filled.error for filled in self._filled.values()):
            self._collect(wait=True)
        return sorted(self._filled.values(), key=lambda filled: filled.end_s)


def _steps_per_task(filled: Filled) -> int:
    count = len(filled.steps)
    by_bytes = math.ceil(HANDOFF_BYTES * count / max(1, filled.nbytes))
    by_time = math.ceil(HANDOFF_READ_S * count / max(1e-6, filled.read_s))
    return max(1, min(by_bytes, by_time))
