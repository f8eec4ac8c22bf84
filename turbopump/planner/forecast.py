"""What follows from the time of a step: rate, MFU, when the run ends, what it costs, what the data must sustain.

    forecast = forecast_of(subject, choice, device, num_steps=100_000)

A step that fails or waits for a checkpoint counts too (turbopump.planner.goodput), and what is not known, a price or a
power, is named instead of guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil

from turbopump.core.errors import UsageError
from turbopump.hardware.specs import DeviceSpec, StorageSpec
from turbopump.planner.choice import Change, Choice
from turbopump.planner.goodput import Goodput, Reliability, expected_time
from turbopump.planner.money import Bill, bill_of
from turbopump.planner.recipe_cases import Subject

MONTH_S = 30 * 86400.0
"""For the interval between checkpoints where nobody said how long the run is."""
COPY_BYTES_PER_S = 10e9
"""Of a checkpoint from a device to its host's memory, which training waits for: half of PCIe 4's rate."""
STALL_S, STALL_OF_HOSTS_S = 0.05, 1.0
"""What a checkpoint takes beside that: on one host as measured on an AMD EPYC (Zen 4, 2 shared cores); between hosts,
where ranks agree on what each writes, assumed."""
COMMIT_S = 60.0
"""Until a checkpoint is safe, where the storage is not known: assumed."""
WORDS = {"data": "reading data", "compute": "compute", "exposed_communication": "exposed communication",
         "bubble": "pipeline bubble", "optimizer": "optimizer", "other": "host"}  # fmt: skip


@dataclass(frozen=True)
class Forecast:
    """Of a whole run. `mfu` and `goodput`, `bill` are None where a peak or the number of steps is not known."""

    units_per_s: float
    audio_hours_per_s: float
    mfu: float | None
    num_steps: int
    """0: not said."""
    reads_per_s: float
    read_bytes: int
    checkpoint_bytes: float
    goodput: Goodput
    """Of `num_steps`, or of a month of steps where those are not said."""
    bill: Bill | None
    bottleneck: str
    share: float
    """Of the step time that the bottleneck takes."""
    relief: tuple[str, ...] = field(default=())
    """What would relieve it, in words, the most effective first."""

    @property
    def read_bytes_per_s(self) -> float:
        """That the data system must sustain."""
        return self.reads_per_s * self.read_bytes


def steps_of(subject: Subject, steps: int | None, tokens: float | None) -> int:
    """Steps to the end, from either option or the recipe; 0 where none of them says. Raises `UsageError`."""
    if steps is not None and tokens is not None:
        raise UsageError("--steps and --tokens say the same: give one of them")
    for name, value in (("--steps", steps), ("--tokens", tokens)):
        if value is not None and not 0 < value < 1e18:
            raise UsageError(f"{name}: {value:g} given; a number above 0 is needed")
    if tokens is not None:
        return ceil(tokens / (subject.units_per_sample * subject.global_batch))
    return steps or subject.num_steps


def forecast_of(
    subject: Subject,
    choice: Choice,
    device: DeviceSpec,
    *,
    num_steps: int = 0,
    usd_per_hour: float | None = None,
    storage: StorageSpec | None = None,
    changes: Sequence[Change] = (),
    peak_flops_per_s: float | None = None,
    num_devices: int | None = None,
) -> Forecast:
    """All of it for one choice; `num_devices` are those that are paid for and may fail (default the
    plan's; processes of a host share its one)."""
    step_s, devices = choice.step_s, num_devices or choice.settings.num_devices
    samples_per_s = subject.global_batch / step_s
    flops_per_s = samples_per_s * subject.flops_per_sample
    checkpoint_bytes = subject.params * float(4 + subject.optimizer_bytes)
    run = _run_of(num_steps or max(1, round(MONTH_S / step_s)), step_s, choice, devices, checkpoint_bytes, storage)
    busy = min(1.0, (choice.breakdown["compute"] + choice.breakdown["optimizer"]) / step_s)
    bill = bill_of(device, num_devices=devices, wall_s=run.wall_s, busy=busy, idle_s=run.recovery_s,
                   usd_per_hour=usd_per_hour) if num_steps else None  # fmt: skip
    name = max(choice.breakdown, key=lambda part: choice.breakdown[part])
    return Forecast(
        units_per_s=samples_per_s * subject.units_per_sample,
        audio_hours_per_s=samples_per_s * subject.hours_per_sample,
        mfu=flops_per_s / (peak_flops_per_s * devices) if peak_flops_per_s else None,
        num_steps=num_steps, reads_per_s=samples_per_s if subject.sample_bytes else 0.0,
        read_bytes=subject.sample_bytes, checkpoint_bytes=checkpoint_bytes, goodput=run, bill=bill, bottleneck=name,
        share=choice.breakdown[name] / step_s, relief=_relief(name, choice, changes),
    )  # fmt: skip


def _run_of(
    steps: int, step_s: float, choice: Choice, devices: int, checkpoint_bytes: float, storage: StorageSpec | None
) -> Goodput:
    """The whole run, its checkpoints as often as is best, though none before the last one is safe."""
    several_hosts = choice.settings.num_devices > choice.settings.devices_per_node
    stall_s = checkpoint_bytes / devices / COPY_BYTES_PER_S + (STALL_OF_HOSTS_S if several_hosts else STALL_S)
    commit_s = checkpoint_bytes / storage.write_bytes_per_s if storage else COMMIT_S
    reliability = Reliability(checkpoint_s=stall_s, commit_s=commit_s)
    best = expected_time(steps=steps, step_s=step_s, num_devices=devices, reliability=reliability)
    if best.interval_s >= commit_s or best.interval_steps == steps:
        return best
    return expected_time(steps=steps, step_s=step_s, num_devices=devices, reliability=reliability,
                         interval_steps=ceil(commit_s / step_s))  # fmt: skip


def _relief(name: str, choice: Choice, changes: Sequence[Change]) -> tuple[str, ...]:
    """Changes that were computed and make the step at least 1 % shorter, then what is known to help."""
    found = [(1 - change.choice.step_s / choice.step_s, change.what) for change in changes if change.choice is not None]
    words = [f"{what} ({-gain:.0%})" for gain, what in sorted(found, reverse=True) if gain >= 0.01][:3]
    return (*words, *KNOWN_RELIEF.get(name, ()))


KNOWN_RELIEF: Mapping[str, tuple[str, ...]] = {
    "compute": ("more or faster devices",),
    "exposed_communication": ("a larger batch, which is exchanged as rarely",),
    "bubble": ("a larger batch, which has more microbatches to fill the pipeline with",),
    "optimizer": ("more shards of the states (dp_shard)",),
    "data": ("more loader processes (loader.num_workers), or a faster disk",),
    "other": ("a larger microbatch, which launches fewer operations",),
}
