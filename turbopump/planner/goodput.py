"""How much of its time a long run spends on steps that count, when devices fail and checkpoints cost time.

    expected = expected_time(steps=100_000, step_s=2.0, num_devices=4096, reliability=Reliability(checkpoint_s=10))
    expected.wall_s, expected.goodput, expected.interval_steps

Lesson: failures come at a rate that grows with the number of devices. Checkpoints that are too rare lose work, too
frequent ones lose time: the best interval is about sqrt(2 x cost x time between failures) (Young 1974), corrected by
Daly 2006. With exponential times between failures the expected time of a run has a closed form (Daly 2006, equation
20), failures while restarting included; a simulation in the tests agrees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from turbopump.core.errors import UsageError

LLAMA3_DEVICE_HOURS = 54 * 24 * 16384 / 419
"""Between two unexpected interruptions: 419 in 54 days on 16,384 H100s (arXiv:2407.21783, table 5): 50,677."""
RSC1_DEVICE_HOURS = 1000 * 24 * 8 / 6.5
"""6.5 failures per 1000 node-days of 8 A100s (arXiv:2410.21680): 29,538; `RSC2` 2.34: 82,051. From memory."""
RSC2_DEVICE_HOURS = 1000 * 24 * 8 / 2.34
LLAMA3_CAUSES = {
    "device": 148 + 72 + 19 + 17 + 6 + 6,
    "network": 35 + 7 + 7,
    "software": 54 + 2,
    "host": 32 + 2 + 3 + 3 + 2 + 2 + 2,
}
"""Of the 419, by what failed; thermal sensors and silent corruption count as the device's, NCCL timeouts as network."""


@dataclass(frozen=True)
class Reliability:
    """How often devices fail and what a failure and a checkpoint cost."""

    device_hours_per_failure: float = LLAMA3_DEVICE_HOURS
    checkpoint_s: float = 10.0
    """That training stands still for one checkpoint; an asynchronous one stands only while it copies."""
    commit_s: float = 0.0
    """From there until the checkpoint is safe; a failure before falls back on the one before it."""
    detection_s: float = 60.0
    """From a failure until it is noticed."""
    restart_s: float = 300.0
    """From there until the first new step: processes, devices, reading the checkpoint."""

    def __post_init__(self) -> None:
        if not self.device_hours_per_failure > 0:
            raise UsageError(f"device_hours_per_failure ({self.device_hours_per_failure}) must be above 0 (inf: never)")
        for name in ("checkpoint_s", "commit_s", "detection_s", "restart_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} ({getattr(self, name)}) must be 0 or more seconds")

    def seconds_between_failures(self, num_devices: int) -> float:
        """Of the whole run, which stops with any of its devices."""
        return self.device_hours_per_failure * 3600 / num_devices

    @property
    def recovery_s(self) -> float:
        """Lost by a failure beside the steps since the last checkpoint. A checkpoint not yet safe costs `commit_s` on
        average: it is met with probability commit_s / interval and loses one interval."""
        return self.detection_s + self.restart_s + self.commit_s


@dataclass(frozen=True)
class Goodput:
    """The expected run. `useful_s + checkpoint_s + lost_s + recovery_s == wall_s`, all in expectation."""

    seconds_between_failures: float
    interval_steps: int
    """Steps between checkpoints."""
    interval_s: float
    num_failures: float
    useful_s: float
    checkpoint_s: float
    lost_s: float
    """Of steps and checkpoints that a failure undid or cut short."""
    recovery_s: float

    @property
    def wall_s(self) -> float:
        return self.useful_s + self.checkpoint_s + self.lost_s + self.recovery_s

    @property
    def goodput(self) -> float:
        """Share of the wall time spent on steps that count."""
        return self.useful_s / self.wall_s


def young_interval_s(checkpoint_s: float, seconds_between_failures: float) -> float:
    """Seconds of work between checkpoints, first order (Young 1974)."""
    return math.sqrt(2 * checkpoint_s * seconds_between_failures)


def daly_interval_s(checkpoint_s: float, seconds_between_failures: float) -> float:
    """Seconds of work between checkpoints, higher order (Daly 2006, equation 37)."""
    if checkpoint_s >= 2 * seconds_between_failures:
        return seconds_between_failures
    if math.isinf(seconds_between_failures) or not checkpoint_s:
        return math.inf if checkpoint_s else 0.0
    ratio = checkpoint_s / (2 * seconds_between_failures)
    root = math.sqrt(2 * checkpoint_s * seconds_between_failures)
    return root * (1 + math.sqrt(ratio) / 3 + ratio / 9) - checkpoint_s


def expected_time(
    *,
    steps: int,
    step_s: float,
    num_devices: int,
    reliability: Reliability | None = None,
    interval_steps: int | None = None,
) -> Goodput:
    """Expected time of a run of `steps` steps with a checkpoint every `interval_steps` (None: Daly's) and at its end.

    Per segment of x = work + checkpoint seconds, M seconds between failures and R of recovery: M exp(R / M) (exp(x / M)
    - 1) (Daly 2006, equation 20): a segment is begun again until it passes without a failure, recovery likewise.
    Raises `UsageError` where a figure is out of range, or failures are so frequent that the run would never end.
    """
    reliability = reliability or Reliability()
    for name, value in (("steps", steps), ("num_devices", num_devices), ("interval_steps", interval_steps)):
        if value is not None and value < 1:
            raise UsageError(f"{name} ({value}) must be at least 1")
    if not 0 < step_s < math.inf:
        raise UsageError(f"step_s ({step_s}) must be above 0 seconds")
    between_s = reliability.seconds_between_failures(num_devices)
    if interval_steps is None:
        best_s = daly_interval_s(reliability.checkpoint_s, between_s)
        interval_steps = steps if best_s >= steps * step_s else max(1, round(best_s / step_s))
    interval_steps = min(interval_steps, steps)
    whole, rest = divmod(steps, interval_steps)
    failures = lost_s = recovery_s = 0.0
    for count, length in ((whole, interval_steps), (1, rest)):
        if length:
            segment = _segment(length * step_s + reliability.checkpoint_s, reliability.recovery_s, between_s)
            failures, lost_s, recovery_s = (
                a + count * b for a, b in zip((failures, lost_s, recovery_s), segment, strict=True)
            )
    if not math.isfinite(lost_s + recovery_s):
        raise UsageError(
            f"{num_devices} devices fail every {between_s:.0f} s, too often to get through {interval_steps} steps and "
            f"a checkpoint ({interval_steps * step_s + reliability.checkpoint_s:.0f} s) or a restart "
            f"({reliability.recovery_s:.0f} s): use fewer devices, cheaper checkpoints or shorter intervals"
        )
    num_checkpoints = whole + (rest > 0)
    return Goodput(
        seconds_between_failures=between_s,
        interval_steps=interval_steps,
        interval_s=interval_steps * step_s,
        num_failures=failures,
        useful_s=steps * step_s,
        checkpoint_s=num_checkpoints * reliability.checkpoint_s,
        lost_s=lost_s,
        recovery_s=recovery_s,
    )


def _segment(length_s: float, recovery_s: float, between_s: float) -> tuple[float, float, float]:
    """Expected failures, seconds lost and seconds of recovery until `length_s` pass without a failure.

    The parts of Daly's formula: the segment is begun exp(x / M) times, takes M (exp(x / M) - 1) in all, and every
    failure in it is followed by M (exp(R / M) - 1) of recovery, in which there are exp(R / M) - 1 further failures.
    """
    if math.isinf(between_s):
        return 0.0, 0.0, 0.0
    try:
        again, recovering = math.expm1(length_s / between_s), math.expm1(recovery_s / between_s)
        return again * (1 + recovering), between_s * again - length_s, again * between_s * recovering
    except OverflowError:
        return math.inf, math.inf, math.inf
