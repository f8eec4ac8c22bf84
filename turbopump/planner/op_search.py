"""Planning a model operation by operation, split over data only: any workload, on a measured machine or a data sheet.

    found = search_ops(subject, Place.of(profile), holds)

On a host's processors a step is what `train` would measure there (turbopump.planner.own_step). On accelerators every
operation of a microbatch is predicted from the machine's rows or curves (turbopump.compute.cost), summed gradients from
its collectives or links (turbopump.comms.cost). Choices are few: devices or processes that share the batch, microbatch,
dtype, recompute. What is left out, because the profile says nothing of it, is told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import log, sqrt
from typing import Any, cast

import numpy as np

from turbopump.comms.cost import CollectiveModel
from turbopump.comms.ops import AllReduce, Level
from turbopump.compute.cost import ComputeCost
from turbopump.core.errors import DatasetError, PlanError, ProfileError, UsageError
from turbopump.core.workload import Op, Workload
from turbopump.hardware.profile import MachineProfile, Prediction
from turbopump.planner.candidates import Holds, divisors
from turbopump.planner.cases import ParallelDims, Recompute
from turbopump.planner.choice import BAND_SIGMAS, Alternative, Choice, Found, Settings, margin_sigmas
from turbopump.planner.own_run import run_of
from turbopump.planner.own_step import Run, StepModel, structure_of
from turbopump.planner.recipe_cases import Subject
from turbopump.planner.summary import GRADIENT_BYTES, WEIGHT_BYTES

CPU = "cpu"
GIB = 1 << 30
COMMON = 0.5
"""Correlation of the errors of two operations' predictions: those of one kind err together, others do not."""
LEAST_SIGMA = 0.05
HIDDEN = 0.7
"""Share of backward behind which a GPU hides the sum of gradients."""
RESERVED = 0.1
"""Of a device's memory that a plan leaves free: allocator, libraries, the loader."""
CHOICES = ("dp_replicate", "microbatch", "dtype", "recompute")


@dataclass
class Place:
    """Where it runs: a profile, the devices to be had, and the models of its operations, each made once."""

    profile: MachineProfile
    num_devices: int = 0
    """0: on a host's processors, as many processes as it has cores or fewer, whatever is best."""
    devices_per_node: int = 1
    _steps: dict[int, StepModel] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """Where rows were measured: `cpu`, or the device's name."""
        return next((row.device for row in self.profile.rows if row.domain == "compute"),
                    self.profile.devices[0].name if self.profile.devices else CPU)  # fmt: skip

    @property
    def is_host(self) -> bool:
        """Whether its one device is the processors of a host, which processes share."""
        return self.device == CPU

    @property
    def num_cores(self) -> int:
        return int(self.profile.machine.get("num_cores", 1)) if self.is_host else 1

    @property
    def memory_bytes(self) -> float | None:
        """Of one device."""
        known = self.profile.devices[0].memory_bytes if self.profile.devices else None
        return known or self.profile.machine.get("memory_bytes")

    def threads(self, processes: int) -> int:
        """Of each of `processes` processes, as `train` starts them."""
        return max(1, self.num_cores // processes)

    def steps(self, threads: int) -> StepModel:
        """Of the host's own steps, in processes of so many threads."""
        if threads not in self._steps:
            sums = [
                row for row in self.profile.rows if row.domain != "comms" or row.kind in (AllReduce.__name__, "Overlap")
            ]
            lean = replace(self.profile, rows=tuple(sums))  # other collectives need not be fitted
            self._steps[threads] = StepModel(lean, threads=threads, structure=structure_of(self.profile))
        return self._steps[threads]

    @cached_property
    def cost(self) -> ComputeCost:
        """Of operations on an accelerator."""
        return ComputeCost(self.profile, device=self.device)

    @cached_property
    def collectives(self) -> CollectiveModel:
        rows = [row for row in self.profile.rows if row.kind == AllReduce.__name__]
        return CollectiveModel.of(rows, self.profile.links)


def search_ops(subject: Subject, place: Place, holds: Holds | None = None) -> Found:
    """The fastest way to train `subject` at `place`, and what surrounds it.

    Raises `PlanError` where nothing divides or fits, `UsageError` for held choices that a split over data does not
    have, `ProfileError` where the profile says nothing of the operations.
    """
    holds = dict(holds or {})
    _check(holds)
    unknown: list[str] = []
    made = (_tried(subject, place, option, unknown) for option in _options(subject, place, holds))
    tried = [choice for choice in made if choice is not None]
    if not tried:
        raise ProfileError(unknown[0]) if unknown else _nothing_divides(subject, place, holds)
    fitting = sorted((c for c in tried if _fits(c, place)), key=lambda c: c.step_s)
    if not fitting:
        raise _misfit(subject, place, tried, holds)
    best, runner_up = fitting[0], fitting[1] if len(fitting) > 1 else None
    return Found(best, runner_up, margin_sigmas(best, runner_up) if runner_up else None, len(tried), len(fitting),
                 tuple(_alternatives(best, tried, fitting)), (), tuple(_landscape(fitting)),
                 tuple(dict.fromkeys(unknown)))  # fmt: skip


@dataclass(frozen=True)
class Option:
    """One way to train by data parallelism alone."""

    processes: int
    microbatch: int
    dtype: str
    recompute: Recompute


def _check(holds: Holds) -> None:
    for name, values in holds.items():
        neutral = {"schedule": "1f1b", "synchronisation": "synchronous"}.get(name, 1)
        if name not in CHOICES and values != (neutral,):
            raise UsageError(
                f"--fix {name}={','.join(map(str, values))}: this model is planned operation by operation and split "
                f"over data only (choices: {', '.join(CHOICES)}): leave it out"
            )


def _options(subject: Subject, place: Place, holds: Holds) -> Iterator[Option]:
    counts = [place.num_devices] if place.num_devices else divisors(place.num_cores)
    for processes in holds.get("dp_replicate", counts):
        share, rest = divmod(subject.global_batch, processes)
        if rest or not share or (place.num_devices and processes != place.num_devices):
            continue
        sizes = subject.microbatches or tuple(n for n in divisors(share) if n <= 8 or n & (n - 1) == 0 or n == share)
        for microbatch in holds.get("microbatch", sizes):
            if microbatch < 1 or share % microbatch or (subject.microbatches and microbatch not in sizes):
                continue
            for dtype in holds.get("dtype", subject.dtypes):
                for mode in holds.get("recompute", subject.recomputes):
                    if mode in subject.recomputes:
                        yield Option(processes, microbatch, dtype, cast(Recompute, mode))


def _tried(subject: Subject, place: Place, option: Option, unknown: list[str]) -> Choice | None:
    """The prediction of one option; None, with the reason in `unknown`, where the profile says nothing of it."""
    try:
        return predict_option(subject, place, option)
    except ProfileError as error:
        unknown.append(str(error))
        return None


def predict_option(subject: Subject, place: Place, option: Option) -> Choice:
    """Time and memory of a step; raises `ProfileError` for operations of which the profile says nothing."""
    assert subject.workload is not None
    workload = subject.workload(option.microbatch, option.dtype)
    num_microbatches = subject.global_batch // option.processes // option.microbatch
    predict = _step_on_host if place.is_host else _step_on_accelerators
    breakdown, sigma = predict(subject, place, option, workload, num_microbatches)
    settings = Settings(option.processes, min(option.processes, max(1, place.devices_per_node)), option.dtype,
                        option.microbatch, num_microbatches, option.recompute)  # fmt: skip
    memory = sum(memory_parts(subject, workload, option).values())
    return Choice(ParallelDims(dp_replicate=option.processes), settings, breakdown, max(sigma, LEAST_SIGMA), memory)


def _step_on_host(
    subject: Subject, place: Place, option: Option, workload: Workload, num_microbatches: int
) -> tuple[dict[str, float], float]:
    """As `train` on this host would measure it (turbopump.planner.own_step)."""
    found = place.steps(place.threads(option.processes)).predict(_run(subject, option, workload, num_microbatches))
    return asdict(found.step), log(found.total_high_s / found.total_low_s) / (2 * BAND_SIGMAS)


def _run(subject: Subject, option: Option, workload: Workload, num_microbatches: int) -> Run:
    """What decides the time of a step; reading its samples too, where there are any to try."""
    plain = Run(workload, num_microbatches, option.processes, option.recompute)
    if subject.config is None:
        return plain
    model = subject.config.model
    model = replace(model, recompute=option.recompute) if hasattr(model, "recompute") else model
    try:
        return run_of(
            replace(subject.config, model=model, microbatch=option.microbatch), option.dtype, option.processes
        )
    except DatasetError:  # a plan may come before its data
        optimizer = subject.config.optimizer
        return replace(
            plain, clip=optimizer.clip_norm > 0, optimizer=optimizer.kind, muon_steps=optimizer.muon_ns_steps
        )


def _step_on_accelerators(
    subject: Subject, place: Place, option: Option, workload: Workload, num_microbatches: int
) -> tuple[dict[str, float], float]:
    """The sum of its operations, each on an idle device that the host keeps busy; gradients hide behind backward."""
    cost = place.cost
    forward, backward, again = (
        _sum(cost, ops) for ops in (_forward(workload), _backward(workload), _again(workload, option.recompute))
    )
    optimizer = _sum(cost, [(op, 1) for op in workload.optimizer_ops])
    exchange = _exchange(place, workload.params, option.processes)
    breakdown = {
        "data": 0.0, "compute": num_microbatches * (forward + backward + again).seconds,
        "exposed_communication": max(0.0, exchange.seconds - HIDDEN * backward.seconds), "bubble": 0.0,
        "optimizer": optimizer.seconds, "other": 0.0,
    }  # fmt: skip
    whole = (forward + backward + again) * num_microbatches + optimizer
    variance = (whole.sigma * whole.seconds) ** 2 + (_sigma(exchange) * breakdown["exposed_communication"]) ** 2
    return breakdown, sqrt(variance) / max(sum(breakdown.values()), 1e-12)


def memory_parts(subject: Subject, workload: Workload, option: Option) -> dict[str, float]:
    """Bytes of one process: fp32 weights, gradients (twice where they are summed: buckets), states, activations."""
    buckets = workload.params * GRADIENT_BYTES if option.processes > 1 else 0
    return {
        "weights": float(workload.params * WEIGHT_BYTES), "gradients": float(workload.params * GRADIENT_BYTES),
        "optimizer": float(workload.params * subject.optimizer_bytes), "buffers": float(buckets),
        "activations": float(workload.kept_bytes(option.recompute)),
    }  # fmt: skip


def parts_of(subject: Subject, choice: Choice) -> dict[str, float]:
    """`memory_parts` of a choice."""
    chosen = choice.settings
    assert subject.workload is not None
    option = Option(choice.dims.dp_replicate, chosen.microbatch, chosen.dtype, chosen.recompute)
    return memory_parts(subject, subject.workload(chosen.microbatch, chosen.dtype), option)


# ---- sums of predictions


@dataclass(frozen=True)
class _Sum:
    """Seconds, and the relative standard deviation of their error."""

    seconds: float = 0.0
    sigma: float = 0.0

    def __add__(self, other: _Sum) -> _Sum:
        seconds = self.seconds + other.seconds
        a, b = self.sigma * self.seconds, other.sigma * other.seconds
        return _Sum(seconds, sqrt(a * a + b * b + 2 * COMMON * a * b) / seconds if seconds else 0.0)

    def __mul__(self, times: float) -> _Sum:
        return replace(self, seconds=self.seconds * times)


def _sigma(prediction: Prediction) -> float:
    """Of the logarithm, from the 80 % band."""
    if prediction.low_s <= 0 or prediction.high_s <= prediction.low_s:
        return 0.0
    return log(prediction.high_s / prediction.low_s) / (2 * BAND_SIGMAS)


def _sum(cost: ComputeCost, ops: Sequence[tuple[Op, int]]) -> _Sum:
    predictions = cost.predict_many([op for op, _ in ops])
    errors = np.array([_sigma(p) * p.seconds * count for p, (_, count) in zip(predictions, ops)])
    seconds = sum(p.seconds * count for p, (_, count) in zip(predictions, ops))
    variance = (1 - COMMON) * float(np.sum(errors**2)) + COMMON * float(np.sum(errors)) ** 2
    return _Sum(seconds, sqrt(variance) / seconds if seconds else 0.0)


def _forward(workload: Workload) -> list[tuple[Op, int]]:
    return [(op, block.count) for block in workload.blocks for op in block.forward]


def _backward(workload: Workload) -> list[tuple[Op, int]]:
    return [(op, block.count) for block in workload.blocks for op in block.backward]


def _again(workload: Workload, recompute: str) -> list[tuple[Op, int]]:
    """Forward of the blocks that keep less in this mode; with `selective` a part of it, by what is not kept."""
    if recompute == "none":
        return []
    blocks = [block for block in workload.blocks if block.kept_bytes[recompute] < block.kept_bytes["none"]]
    return [(op, block.count) for block in blocks for op in block.forward]


def _exchange(place: Place, params: int, processes: int) -> Prediction:
    """The sum of all gradients over the processes."""
    if processes == 1:
        return Prediction(0.0, 0.0, 0.0, "measured")
    level: Level = "node" if processes <= place.devices_per_node else "rack"
    levels = {link.level for link in place.profile.links}
    if level not in levels:
        level = cast(Level, next((name for name in ("rack", "pod", "node") if name in levels), level))
    return place.collectives.predict(AllReduce(params * GRADIENT_BYTES, processes, level))


# ---- what fits, and what surrounds the best


def _fits(choice: Choice, place: Place) -> bool:
    if place.memory_bytes is None:
        return True
    on_a_device = choice.dims.dp_replicate if place.is_host else 1
    return choice.peak_bytes * on_a_device <= (1 - RESERVED) * place.memory_bytes


def _alternatives(best: Choice, tried: list[Choice], fitting: list[Choice]) -> Iterator[Alternative]:
    for name in CHOICES:
        for value in dict.fromkeys(_value(choice, name) for choice in tried):
            if value != _value(best, name):
                times_s = [choice.step_s for choice in fitting if _value(choice, name) == value]
                yield Alternative(name, value, min(times_s) / best.step_s - 1 if times_s else None)


def _value(choice: Choice, name: str) -> Any:
    return getattr(choice.dims if name == "dp_replicate" else choice.settings, name)


def _landscape(fitting: list[Choice]) -> Iterator[dict[str, Any]]:
    for choice in fitting:
        yield {**{name: _value(choice, name) for name in CHOICES}, "step_s": choice.step_s,
               "peak_bytes": choice.peak_bytes}  # fmt: skip


def _nothing_divides(subject: Subject, place: Place, holds: Holds) -> PlanError:
    """What batch, number of devices or microbatch would do."""
    if "recompute" in holds and not set(holds["recompute"]) & set(subject.recomputes):
        return PlanError(f"--fix recompute={','.join(holds['recompute'])}: this model can be computed again in these "
                         f"modes only: {', '.join(subject.recomputes)}")  # fmt: skip
    if "microbatch" in holds:
        count = place.num_devices or 1
        allowed = subject.microbatches or tuple(divisors(max(1, subject.global_batch // count)))
        return PlanError(f"--fix microbatch={','.join(map(str, holds['microbatch']))}: a batch of "
                         f"{subject.global_batch} on {count} devices takes {', '.join(map(str, allowed))}")  # fmt: skip
    count = place.num_devices or next(iter(holds.get("dp_replicate", (1,))))
    below, above = subject.global_batch // count * count, -(-subject.global_batch // count) * count
    near = [n for n in divisors(subject.global_batch) if n <= count][-1]
    batches = " or ".join(str(n) for n in dict.fromkeys((below, above)) if n)
    return PlanError(f"a batch of {subject.global_batch} cannot be shared by {count} devices: use {near} devices, or a "
                     f"global batch of {batches}")  # fmt: skip


def _misfit(subject: Subject, place: Place, tried: list[Choice], holds: Holds) -> PlanError:
    """Splitting over data does not divide the model: what helps is a smaller microbatch, recompute, another device."""
    least = min(tried, key=lambda choice: choice.peak_bytes)
    ways = []
    if "recompute" in holds and "full" in subject.recomputes and "full" not in holds["recompute"]:
        ways.append("use --fix recompute=full")
    if "microbatch" in holds and min(holds["microbatch"]) > 1:
        ways.append("use a smaller --fix microbatch")
    ways.append("take a device with more memory, or a smaller model: splitting over data does not divide it")
    usable = (1 - RESERVED) * (place.memory_bytes or 0)
    return PlanError(
        f"{subject.name} does not fit on {place.profile.name}: at best a process needs {least.peak_bytes / GIB:.2f} "
        f"GiB, of {usable / GIB:.2f} GiB that a plan may use: {', or '.join(ways)}"
    )
