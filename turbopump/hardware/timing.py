"""How long a call takes, measured so that a shared machine and the harness itself distort it least. Without torch.

A call is timed in blocks of at least a few milliseconds, so that reading the clock and turning the loop cost nothing
beside it (`benchmarks.probe` measures what they cost). On CPU the clock is the CPU time of the calling thread: what
other programs take is not counted, and the wall clock beside it says how much they took. Where waiting belongs to the
question (storage, collectives) the clock is the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

import numpy as np

BLOCK_S = 2e-3  # a block is at least this long
LEAST_BLOCKS = 5
SETTLED = 0.01  # a median known this well (standard error, relative) needs no more blocks
NOISY_SPREAD = 0.35
NOISY_WAITED = 0.25


class Clock(Protocol):
    """Measures `calls` calls of `run`."""

    @property
    def name(self) -> str: ...

    def time(self, run: Callable[[], object], calls: int) -> tuple[float, float]:
        """Seconds of all calls together on this clock, and on the wall clock."""


@dataclass(frozen=True)
class HostClock:
    """A clock of the host: `thread_cpu` counts what the calling thread computes, `wall` all that passes."""

    name: str

    def time(self, run: Callable[[], object], calls: int) -> tuple[float, float]:
        clock = time.thread_time if self.name == "thread_cpu" else time.perf_counter
        wall, begin = time.perf_counter(), clock()
        for _ in repeat(None, calls):
            run()
        elapsed = clock() - begin
        return elapsed, time.perf_counter() - wall


THREAD_CPU = HostClock("thread_cpu")
WALL = HostClock("wall")


@dataclass(frozen=True)
class Timing:
    """Seconds of one call over `runs` blocks of `calls` calls each."""

    clock: str
    runs: int
    calls: int
    min_s: float
    median_s: float
    p90_s: float
    wall_s: float
    """Median on the wall clock."""
    waited: float
    """Share of the wall time in which the thread had no core, 0 to 1; 0 where the clock is the wall's."""

    @property
    def spread(self) -> float:
        """`(p90 - min) / median`."""
        return (self.p90_s - self.min_s) / self.median_s

    @property
    def noisy(self) -> bool:
        """Whether other work on the machine, or the operation itself, made this too uncertain to build on."""
        return self.spread > NOISY_SPREAD or self.waited > NOISY_WAITED


def measure(
    run: Callable[[], object],
    *,
    clock: Clock = THREAD_CPU,
    budget_s: float = 0.1,
    before_block: Callable[[], object] | None = None,
    single: bool = False,
) -> Timing:
    """Time `run` in blocks for at most about `budget_s` of wall time; less when the median is known well enough.

    One block is run first and not counted. At least `LEAST_BLOCKS` count where the budget has room for them, and at
    least 2 in any case. `before_block` runs, untimed, before each (to flush the caches); `single` takes blocks of one
    call, however short. What `run` raises is raised.
    """
    begin = time.perf_counter()
    if before_block:
        before_block()
    clock.time(run, 1)  # warms up: allocations, caches, kernels made at first use
    calls = 1 if single else _calls_of_a_block(run, clock)
    seconds: list[float] = []
    walls: list[float] = []
    while len(seconds) < 2 or time.perf_counter() - begin < budget_s:
        if before_block:
            before_block()
        elapsed, wall = clock.time(run, calls)
        seconds.append(elapsed / calls)
        walls.append(wall / calls)
        if len(seconds) >= 4 * LEAST_BLOCKS and _settled(seconds):
            break
    waited = 0.0 if clock.name != "thread_cpu" else max(0.0, 1.0 - sum(seconds) / sum(walls))
    return Timing(
        clock=clock.name,
        runs=len(seconds),
        calls=calls,
        min_s=min(seconds),
        median_s=float(np.median(seconds)),
        p90_s=float(np.quantile(seconds, 0.9)),
        wall_s=float(np.median(walls)),
        waited=waited,
    )


def _calls_of_a_block(run: Callable[[], object], clock: Clock) -> int:
    """How many calls last `BLOCK_S`."""
    calls = 1
    while True:
        _, wall = clock.time(run, calls)
        if wall >= BLOCK_S / 4:
            return max(1, round(calls * BLOCK_S / wall))
        calls = max(2 * calls, min(round(calls * BLOCK_S / max(wall, 1e-7)), 100 * calls))


def _settled(seconds: list[float]) -> bool:
    """Whether the standard error of the median (1.25 sigma / sqrt(n), sigma from the quartiles) is small."""
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    sigma = (high - low) / 1.349
    return bool(1.2533 * sigma / len(seconds) ** 0.5 < SETTLED * median)
