"""Timing with a clock that the test owns: block sizes, when enough is enough, what counts as noisy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import cycle

import pytest

from turbopump.hardware import timing
from turbopump.hardware.timing import BLOCK_S, LEAST_BLOCKS, THREAD_CPU, WALL, Timing, measure


class FakeTime:
    """Stands for `time.perf_counter`: it passes only when something is run."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


class FakeClock:
    """A call takes the next of `seconds`; on the wall `wall_factor` times that. Keeps the blocks that were run."""

    def __init__(self, now: FakeTime, seconds: Iterator[float], *, name: str = "thread_cpu", wall_factor: float = 1.0):
        self.now, self.seconds, self._name, self.wall_factor = now, seconds, name, wall_factor
        self.blocks: list[int] = []

    @property
    def name(self) -> str:
        return self._name

    def time(self, run: Callable[[], object], calls: int) -> tuple[float, float]:
        run()
        self.blocks.append(calls)
        elapsed = calls * next(self.seconds)
        self.now.now += elapsed * self.wall_factor
        return elapsed, elapsed * self.wall_factor


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    fake = FakeTime()
    monkeypatch.setattr(timing.time, "perf_counter", fake.perf_counter)
    return fake


def nothing() -> None:
    """The operation: the clock says what it takes."""


@pytest.mark.parametrize("call_s", [1e-8, 1e-6, 3e-5, 1.9e-3])
def test_a_block_lasts_a_few_milliseconds_however_short_the_call(now: FakeTime, call_s: float) -> None:
    clock = FakeClock(now, cycle([call_s]))
    measured = measure(nothing, clock=clock, budget_s=0.1)
    assert 0.5 * BLOCK_S <= measured.calls * call_s <= 2 * BLOCK_S
    assert measured.min_s == pytest.approx(call_s) and measured.median_s == pytest.approx(call_s)
    assert sum(clock.blocks[: -measured.runs]) * call_s < 3 * BLOCK_S  # what finding the size cost


def test_a_long_call_is_a_block_and_runs_twice_at_least(now: FakeTime) -> None:
    measured = measure(nothing, clock=FakeClock(now, cycle([7.0])), budget_s=0.1)
    assert (measured.calls, measured.runs) == (1, 2)


def test_single_takes_blocks_of_one_call(now: FakeTime) -> None:
    clock = FakeClock(now, cycle([1e-4]))
    measured = measure(nothing, clock=clock, budget_s=0.1, single=True)
    assert measured.calls == 1 and set(clock.blocks) == {1}


def test_a_steady_median_ends_before_the_budget(now: FakeTime) -> None:
    measured = measure(nothing, clock=FakeClock(now, cycle([1e-3])), budget_s=100.0)
    assert measured.runs == 4 * LEAST_BLOCKS
    assert measured.spread == 0 and not measured.noisy


def test_an_unsteady_one_takes_the_budget_and_no_more(now: FakeTime) -> None:
    clock = FakeClock(now, cycle([1e-3, 1.6e-3, 2.4e-3]))
    measured = measure(nothing, clock=clock, budget_s=0.5)
    assert 0.5 <= now.now < 0.5 + 3 * 2.4e-3
    assert measured.runs > 4 * LEAST_BLOCKS and measured.noisy
    assert measured.min_s < measured.median_s < measured.p90_s


def test_what_waits_for_a_core_is_noisy_however_steady(now: FakeTime) -> None:
    measured = measure(nothing, clock=FakeClock(now, cycle([1e-3]), wall_factor=2.0))
    assert measured.waited == pytest.approx(0.5) and measured.noisy and measured.spread == 0
    assert measured.wall_s == pytest.approx(2e-3)


def test_waiting_is_part_of_the_question_on_the_wall_clock(now: FakeTime) -> None:
    measured = measure(nothing, clock=FakeClock(now, cycle([1e-3]), name="wall", wall_factor=1.0))
    assert measured.waited == 0 and measured.clock == "wall"


@pytest.mark.parametrize(
    ("spread", "waited", "noisy"), [(0.3, 0.2, False), (0.4, 0.0, True), (0.0, 0.3, True), (0.34, 0.25, False)]
)
def test_noisy(spread: float, waited: float, noisy: bool) -> None:
    row = Timing("thread_cpu", 9, 1, min_s=1.0, median_s=1.0, p90_s=1.0 + spread, wall_s=1.0, waited=waited)
    assert row.spread == pytest.approx(spread) and row.noisy is noisy


def test_the_caches_are_emptied_before_each_block_and_outside_the_time(now: FakeTime) -> None:
    events: list[str] = []

    def flush() -> None:
        now.now += 1e-3
        events.append("flush")

    measured = measure(
        lambda: events.append("run"), clock=FakeClock(now, cycle([1e-4])), single=True, before_block=flush
    )
    assert measured.median_s == pytest.approx(1e-4)
    assert events == ["flush", "run"] * (measured.runs + 1)  # the first pair warms up


def test_what_the_call_raises_is_raised() -> None:
    def fails() -> None:
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        measure(fails, budget_s=0.01)


def test_the_clocks_count_what_they_say() -> None:
    """Sleeping is time on the wall and none on the processor."""
    cpu, wall_of_cpu = THREAD_CPU.time(lambda: time.sleep(0.02), 1)
    wall, wall_of_wall = WALL.time(lambda: time.sleep(0.02), 1)
    assert cpu < 0.02 <= wall_of_cpu
    assert wall >= 0.02 and wall_of_wall >= 0.02
    calls: list[int] = []
    THREAD_CPU.time(lambda: calls.append(1), 7)
    assert len(calls) == 7
