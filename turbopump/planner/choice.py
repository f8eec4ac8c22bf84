"""What a search comes to: choices with their predictions, and what surrounds the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log, sqrt
from typing import Any

from turbopump.planner.cases import Case, ParallelDims, Recompute, Schedule, Synchronisation

BAND_SIGMAS = 1.2816  # half of the 80 % band of a normal distribution


@dataclass(frozen=True)
class Settings:
    """How each device computes, and how they exchange gradients."""

    num_devices: int
    devices_per_node: int
    dtype: str
    microbatch: int
    num_microbatches: int
    recompute: Recompute = "none"
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    synchronisation: Synchronisation = "synchronous"
    sync_every: int = 1


@dataclass(frozen=True)
class Choice:
    """One candidate with its prediction; `breakdown` has the parts of a step, in seconds, by name."""

    dims: ParallelDims
    settings: Settings
    breakdown: Mapping[str, float]
    sigma: float
    """Standard deviation of the logarithm of the step time."""
    peak_bytes: float
    """Of the fullest rank."""
    case: Case | None = None
    """Of a decoder."""

    def same_as(self, other: Choice) -> bool:
        """Whether both train in the same way."""
        return (self.dims, self.settings) == (other.dims, other.settings)

    @property
    def step_s(self) -> float:
        return sum(self.breakdown.values())

    @property
    def low_s(self) -> float:
        """Lower end of the 80 % band."""
        return self.step_s * exp(-BAND_SIGMAS * self.sigma)

    @property
    def high_s(self) -> float:
        return self.step_s * exp(BAND_SIGMAS * self.sigma)


@dataclass(frozen=True)
class Alternative:
    """The best candidate with another value of one choice; `slower` is its step time over the best one's, less 1."""

    name: str
    value: Any
    slower: float | None
    """None: nothing with that value fits in memory."""


@dataclass(frozen=True)
class Change:
    """What if: the step time of the best plan then over that of today's plan then, less 1 (0: it stays the best)."""

    what: str
    kind: str
    """`machine` (another link or memory), `constraint` (a --fix taken away) or `training` (other results)."""
    choice: Choice | None
    """The best plan then; None where nothing would fit."""
    gain: float
    """Share of the step time that the new plan saves, then, against keeping today's."""
    flips: bool


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    best: Choice
    runner_up: Choice | None
    margin_sigmas: float | None
    """Of the logarithm of the ratio of both times, their errors taken as independent: the real margin is wider, since
    most of the error is common to both."""
    num_candidates: int
    num_fitting: int
    alternatives: tuple[Alternative, ...]
    changes: tuple[Change, ...]
    landscape: tuple[Mapping[str, Any], ...]
    """The fastest candidate of each split, fastest first: dims, step_s, peak_bytes."""
    notes: tuple[str, ...] = ()
    """What was left out, and why."""


def margin_sigmas(best: Choice, other: Choice) -> float:
    """How many standard deviations lie between two choices, the errors of both taken as independent."""
    both = sqrt(best.sigma**2 + other.sigma**2)
    return log(other.step_s / best.step_s) / both if both else 0.0
