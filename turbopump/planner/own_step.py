"""One step of any recipe on a measured machine, operation by operation, as the `StepBreakdown` that `train` measures.

Each operation of the workload, and what `train` computes around it (casts of the weights, the accumulation of
gradients, clipping, the update), takes the time of its row, or that which its neighbours say (`compute/cost.py`). What
rows of single operations cannot tell is in `Structure`: a few numbers with a physical meaning, which
`run_calibration.py` refines from real runs:
- a row is warm: the operation just computed on the same operands. In a step they come from memory in part, the more
  the less the step's working set fits in the last cache. (planner.md 3.4: warm rows are low by 5 to 13 %, emptied
  caches high by up to 38 %, their mean within 4.6 %.)
- autograd, modules, allocations and code that is no longer in a cache take time at every operation, counted in
  `Launch(autograd)`;
- processes of one host share its caches and memory, and wait for the slowest.
Without torch.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from turbopump.comms.cost import CollectiveModel
from turbopump.comms.ops import AllReduce
from turbopump.compute.cost import ComputeCost
from turbopump.compute.ops import (
    BatchedGemm,
    Conv1d,
    Conv2d,
    Elementwise,
    Embedding,
    Gemm,
    Launch,
    MemoryCopy,
    Norm,
    Rnn,
)
from turbopump.core.errors import ProfileError
from turbopump.core.spans import StepBreakdown
from turbopump.core.workload import DTYPE_BYTES, Block, Op, Workload
from turbopump.hardware.profile import MachineProfile, Prediction

FP32 = DTYPE_BYTES["fp32"]
MIB = 1 << 20
FIRST_BUCKET_BYTES, BUCKET_BYTES = MIB, 25 * MIB  # of comms/data_parallel.py
TYPICAL_CACHE_BYTES = 32 * MIB
TYPICAL_LAUNCH_S = 1.5e-5  # of `Launch(autograd)`, where it was not measured
FLOOR_S = 3e-5  # of `other`: the spans themselves and the turn of the loop
SOUND = ("measured", "interpolated")
PARTS = tuple(f.name for f in fields(StepBreakdown))


@dataclass(frozen=True)
class Structure:
    """What no row of a single operation tells. `bands` holds the logarithm of each number's 80 % half-width, as
    calibrated; a number without one has that of `PRIOR_BANDS`."""

    cold: float = 0.5
    """Share of the time to bring operands from memory that an operation pays whose operands no cache holds."""
    host: float = 1.5
    """Host time at every operation, in `Launch(autograd)` (a forward and backward of two numbers)."""
    tensor: float = 1.5
    """Host time of clipping and updating one tensor, in the same unit."""
    compute: float = 1.0
    """Times the sum over forward and backward."""
    optimizer: float = 1.0
    data: float = 1.0
    communication: float = 1.0
    straggling: float = 0.02
    """Standard deviation of a process's compute time, relative: all wait for the slowest."""
    bands: Mapping[str, float] = field(default_factory=dict)

    def band(self, name: str) -> float:
        return self.bands.get(name, PRIOR_BANDS[name])


PRIOR_BANDS: Mapping[str, float] = {
    "cold": math.log(2.0), "host": math.log(2.0), "tensor": math.log(2.0),
    "compute": math.log(1.10), "optimizer": math.log(1.3),
    "data": math.log(1.5), "communication": math.log(1.6), "straggling": math.log(3.0),
}  # fmt: skip
BOUNDS: Mapping[str, tuple[float, float]] = {
    "cold": (0.05, 1.0), "host": (0.1, 6.0), "tensor": (0.1, 6.0),
    "compute": (0.7, 1.6), "optimizer": (0.4, 3.0), "data": (0.2, 5.0),
    "communication": (0.3, 4.0), "straggling": (0.002, 0.3),
}  # fmt: skip
"""Outside of which a number has no longer its meaning."""


@dataclass(frozen=True)
class Run:
    """What of a run decides the time of its step, beside the workload of one microbatch."""

    workload: Workload
    num_microbatches: int = 1
    num_processes: int = 1
    recompute: str = "none"
    clip: bool = True
    optimizer: str = "adamw"
    muon_steps: int = 5
    data_s: float = 0.0
    """Of one microbatch: reading and collating it in the training process."""
    lone_samples: int = 0
    """Samples of a microbatch that are read one by one: generators are seeded, tensors made for each."""


@dataclass(frozen=True)
class KindTime:
    """Seconds of all operations of one kind in a step."""

    kind: str
    seconds: float
    count: int
    basis: str
    """Of the most of it: `measured`, `interpolated`, `curve` or `roofline`."""
    half_width: float
    """Of the 80 % band, in the logarithm."""


@dataclass(frozen=True)
class StepPrediction:
    """The predicted step with its 80 % band, part by part; `low` and `high` of the parts do not sum to the total's."""

    step: StepBreakdown
    low: StepBreakdown
    high: StepBreakdown
    total_low_s: float
    total_high_s: float
    kinds: tuple[KindTime, ...]
    measured_share: float
    """Of the operations' seconds: what rows of exactly these operations tell."""
    params: int = 0

    @property
    def total_s(self) -> float:
        return self.step.total


class StepModel:
    """Predicts steps on one machine. Raises `ProfileError` where the profile says nothing of its dense operations."""

    def __init__(
        self, profile: MachineProfile, *, threads: int = 1, device: str = "cpu", structure: Structure | None = None
    ) -> None:
        self.structure = structure or Structure()
        self._cost = ComputeCost(profile, threads=threads, device=device)
        self._rows = [row for row in profile.rows if (row.device, row.threads) == (device, threads) and row.works]
        self._flushed = {(row.op_key, row.route): row for row in self._rows if row.flushed_s}
        self._profile = profile
        caches = profile.machine.get("cache_bytes") or {}
        self._cache_bytes = max([float(size) for size in caches.values()], default=TYPICAL_CACHE_BYTES)
        self._seconds: dict[tuple[Op, str], tuple[Prediction, float]] = {}

    # ---- one operation

    @cached_property
    def launch_s(self) -> float:
        """Of `Launch(autograd)`."""
        rows = [row.seconds for row in self._rows if row.op_key == Launch("autograd").key]
        return min(rows) if rows else TYPICAL_LAUNCH_S

    @cached_property
    def _cold(self) -> tuple[float, float]:
        """What emptied caches cost more: seconds a call and seconds a byte, over all rows that tell."""
        pairs = [(r.bytes, (r.flushed_s or 0.0) - r.seconds, r.seconds) for r in self._flushed.values() if r.bytes]
        if len(pairs) < 8:
            bandwidth = max((row.bytes_per_s for row in self._rows if row.bytes > 4 * MIB), default=1e10)
            return 0.0, 1.0 / bandwidth
        size, extra, warm = (np.array(column) for column in zip(*pairs))
        weight = 1.0 / (warm + 1e-5)
        columns = np.stack([np.ones_like(size), size], 1) * weight[:, None]
        wanted = np.clip(extra, 0.0, None) * weight
        for _ in range(4):  # few rows that other work disturbed must not decide
            left = np.abs(columns @ np.linalg.lstsq(columns, wanted, rcond=None)[0] - wanted)
            trusted = 1.0 / np.maximum(left, np.median(left) + 1e-12) ** 0.5
            solution = np.linalg.lstsq(columns * trusted[:, None], wanted * trusted, rcond=None)[0]
        return max(0.0, float(solution[0])), max(0.0, float(solution[1]))

    def _of_op(self, op: Op, model: str) -> tuple[Prediction, float]:
        """Warm seconds by the model's own kernel where that was measured, and what cold operands cost more."""
        if (op, model) not in self._seconds:
            found = self._cost.predict(op)
            if model in self._cost.routes(op):
                own = self._cost.predict(op, model)
                if own.basis in SOUND:  # a few rows of a route tell less than the default's
                    found = own
            a_call, a_byte = self._cold
            row = self._flushed.get((op.key, found.route))
            extra_s = a_byte * op.cost.bytes
            if row is not None and row.flushed_s:
                extra_s = min(max(0.0, row.flushed_s - row.seconds - a_call), 4.0 * extra_s)
            self._seconds[op, model] = found, extra_s
        return self._seconds[op, model]

    # ---- a step

    def predict(self, run: Run) -> StepPrediction:
        """The mean step of `run`, by the wall clock of its processes."""
        structure, work = self.structure, run.workload
        coldness = structure.cold * self.coldness(run)
        compute = self._sum(computed(run), work.name, coldness, structure.host)
        update = self._sum(updated(run), work.name, coldness, 0.0)
        tensors_s = structure.tensor * self.launch_s * tensors(work)
        compute_s = structure.compute * compute.seconds
        optimizer_s = structure.optimizer * (update.seconds + tensors_s)
        sample_s = run.data_s + self.launch_s * run.lone_samples
        data_s = structure.data * sample_s * run.num_microbatches
        waited_s, waited_width = self._communication(run, compute, compute_s)
        step = StepBreakdown(data_s, compute_s, waited_s, 0.0, optimizer_s, FLOOR_S)
        widths = {
            "data": structure.band("data"),
            "compute": math.hypot(compute.half_width, structure.band("compute"),
                                  structure.band("cold") * compute.cold_share,
                                  structure.band("host") * compute.host_share),
            "exposed_communication": math.hypot(waited_width, structure.band("communication")),
            "bubble": 0.0,
            "optimizer": math.hypot(update.half_width, structure.band("optimizer")),
            "other": math.log(2.0),
        }  # fmt: skip
        return replace(_banded(step, widths, compute, update), params=work.params)

    def coldness(self, run: Run) -> float:
        """Share of operands that come from memory: what a step touches between two uses of the same bytes, against
        the last cache, which the processes of a host share."""
        held = run.workload.kept_bytes(run.recompute) + 2 * FP32 * run.workload.params
        cache = self._cache_bytes / run.num_processes
        return held / (held + cache)

    def _sum(self, ops: Iterable[tuple[Op, int]], model: str, coldness: float, host: float) -> _Sum:
        total = _Sum()
        for op, count in ops:
            found, cold_s = self._of_op(op, model)
            width = math.log(max(found.high_s, found.seconds) / min(found.low_s, found.seconds)) / 2
            host_s = host * self.launch_s
            total.add(op, count, found, coldness * cold_s, host_s, width)
        return total

    # ---- between processes

    def _communication(self, run: Run, compute: _Sum, compute_s: float) -> tuple[float, float]:
        """Exposed seconds and their band: what of the all-reduces ends after backward, and waiting for the slowest.

        Buckets go out in the order backward finishes them, one after the other, while backward goes on.
        """
        ranks = run.num_processes
        if ranks == 1:
            return 0.0, 0.0
        model = self._all_reduce
        slowdown = self._overlap_slowdown(ranks)
        ready = _bucket_times(run.workload, compute_s / run.num_microbatches)
        end_s, width = 0.0, 0.0
        for bucket_bytes, ready_s in ready:
            found = model.predict(AllReduce(bucket_bytes, ranks, "node"))
            seconds = self.structure.communication * found.seconds
            start_s = max(end_s, ready_s)
            beside_s = max(0.0, min(seconds * slowdown, -start_s))  # backward ends at 0
            end_s = start_s + beside_s + max(0.0, seconds - beside_s / slowdown)
            width = max(width, math.log(found.high_s / found.low_s) / 2)
        tiny = model.predict(AllReduce(8, ranks, "node")).seconds
        slowest_s = self.structure.straggling * compute_s * math.sqrt(2.0 * math.log(ranks))
        return max(0.0, end_s) + tiny + slowest_s, width

    @cached_property
    def _all_reduce(self) -> CollectiveModel:
        return CollectiveModel.of(self._profile.of_kind("AllReduce"), self._profile.links)

    def _overlap_slowdown(self, ranks: int) -> float:
        """How much longer an all-reduce takes while its processes compute (`Overlap` rows)."""
        found = [float(row.facts["slowdown_comm"]) for row in self._profile.rows
                 if row.kind == "Overlap" and row.works and "slowdown_comm" in row.facts]  # fmt: skip
        return max(1.0, float(np.median(found))) if found else 1.5


class _Sum:
    """Seconds of operations, with what they rest on."""

    def __init__(self) -> None:
        self.seconds = self.cold_s = self.host_s = 0.0
        self._kinds: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])  # seconds, seconds x width, count
        self._bases: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def add(self, op: Op, count: int, found: Prediction, cold_s: float, host_s: float, width: float) -> None:
        seconds = count * (found.seconds + cold_s + host_s)
        self.seconds += seconds
        self.cold_s += count * cold_s
        self.host_s += count * host_s
        kind = self._kinds[type(op).__name__]
        kind[0] += seconds
        kind[1] += count * found.seconds * width
        kind[2] += count
        self._bases[type(op).__name__][found.basis] += count * found.seconds

    @property
    def cold_share(self) -> float:
        return self.cold_s / self.seconds if self.seconds else 0.0

    @property
    def host_share(self) -> float:
        return self.host_s / self.seconds if self.seconds else 0.0

    @property
    def half_width(self) -> float:
        """Errors of one kind are alike and add up; those of different kinds do not."""
        return math.hypot(*(kind[1] for kind in self._kinds.values())) / self.seconds if self.seconds else 0.0

    @property
    def measured_s(self) -> float:
        return sum(bases.get("measured", 0.0) for bases in self._bases.values())

    @property
    def kinds(self) -> Iterator[KindTime]:
        for name, (seconds, weighted, count) in sorted(self._kinds.items(), key=lambda item: -item[1][0]):
            bases = self._bases[name]
            yield KindTime(name, seconds, int(count), max(bases, key=bases.__getitem__), weighted / seconds)


def _banded(step: StepBreakdown, widths: Mapping[str, float], compute: _Sum, update: _Sum) -> StepPrediction:
    """The band of each part; the total's from its parts', which err independently."""
    values = asdict(step)
    low = StepBreakdown(**{name: value * math.exp(-widths[name]) for name, value in values.items()})
    high = StepBreakdown(**{name: value * math.exp(widths[name]) for name, value in values.items()})
    below = math.hypot(*(values[name] - getattr(low, name) for name in PARTS))
    above = math.hypot(*(getattr(high, name) - values[name] for name in PARTS))
    known_s = compute.measured_s + update.measured_s
    all_s = sum(sum(bases.values()) for part in (compute, update) for bases in part._bases.values())
    return StepPrediction(step, low, high, step.total - below, step.total + above, (*compute.kinds, *update.kinds),
                          known_s / all_s if all_s else 0.0)  # fmt: skip


# ---- what train computes


def computed(run: Run) -> Iterator[tuple[Op, int]]:
    """Forward and backward of a step with their repetitions, as `train` computes them: the workload's operations, a
    recomputed block's forward once more, casts of weights and their gradients, sums over microbatches."""
    work, times = run.workload, run.num_microbatches
    for block in work.blocks:
        again = run.recompute != "none" and block.kept_bytes[run.recompute] < block.kept_bytes["none"]
        for op in block.forward:
            yield op, times * block.count * (2 if again else 1)
        for op in block.backward:
            yield op, times * block.count
    if work.dtype in ("bf16", "fp16"):  # autocast, forward and backward: 4 bytes to 2 and back
        for block in work.blocks:
            elements = sum(_weights_of(block))
            if elements:
                yield MemoryCopy(elements * (FP32 + DTYPE_BYTES[work.dtype]) // 2), 2 * times * block.count
    if times > 1:
        yield Elementwise("residual", work.params, 2, 1, "fp32"), times - 1


def _weights_of(block: Block) -> Iterator[int]:
    """Elements of the weight matrices that autocast casts: those that linear layers and convolutions multiply by."""
    for op in block.backward:
        if isinstance(op, Gemm) and op.layout == "tn":
            yield op.m * op.n
        elif getattr(op, "direction", "") == "weight_gradient":
            yield int(getattr(op, "weights", 0))


def tensors(workload: Workload) -> int:
    """Parameters as tensors, by the operations that have some; each takes host time in clipping and update."""
    return sum(block.count * sum(_tensors_of(op) for op in block.forward) for block in workload.blocks)


def _tensors_of(op: Op) -> int:
    if isinstance(op, Rnn):
        return 4 * op.directions
    if isinstance(op, Norm):
        return 1 if op.kind == "rms" else 2
    return int(isinstance(op, Gemm | Conv1d | Conv2d | Embedding))


def updated(run: Run) -> Iterator[tuple[Op, int]]:
    """Norm of the gradients, clipping, and the update."""
    params = run.workload.params
    yield Elementwise("average", params, 1, 0, "fp32"), 1
    if run.clip:
        yield MemoryCopy(params * FP32), 1
    if run.optimizer == "muon":
        yield from _muon(run)
    yield from ((op, 1) for op in run.workload.optimizer_ops)


def _muon(run: Run) -> Iterator[tuple[Op, int]]:
    """Newton-Schulz iterations over the matrices of the repeated blocks, in the dtype of the run (training/muon.py)."""
    shapes: dict[tuple[int, int], int] = defaultdict(int)
    for block in run.workload.blocks:
        if block.count > 1 or block.name == "blocks":
            for op in block.backward:
                if isinstance(op, Gemm) and op.layout == "tn":
                    shapes[min(op.m, op.n), max(op.m, op.n)] += block.count
    dtype = run.workload.dtype
    for (small, large), count in shapes.items():
        yield BatchedGemm(count, small, small, large, dtype), run.muon_steps
        yield BatchedGemm(count, small, small, small, dtype), run.muon_steps
        yield BatchedGemm(count, small, large, small, dtype), run.muon_steps


def bucket_bytes(workload: Workload) -> list[int]:
    """Bytes of the buckets in which gradients are summed over processes."""
    return [size for size, _ in _bucket_times(workload, 0.0)]


def _bucket_times(workload: Workload, microbatch_s: float) -> Sequence[tuple[int, float]]:
    """Bytes of each bucket of gradients, and when it is ready, in seconds before the end of backward (negative).

    Backward of the blocks takes a share of the microbatch as their FLOPs are of all; a block's gradients are there
    when it is done.
    """
    whole = max(workload.cost.flops, 1.0)
    left_s = microbatch_s * (1.0 - workload.forward_cost.flops / whole)
    found: list[tuple[int, float]] = []
    open_bytes, limit = 0, FIRST_BUCKET_BYTES
    for block in reversed(workload.blocks):
        each_s = microbatch_s * sum(op.cost.flops for op in block.backward) / whole
        for _ in range(block.count):
            left_s -= each_s
            open_bytes += FP32 * block.params
            if open_bytes >= limit:
                found.append((open_bytes, -max(0.0, left_s)))
                open_bytes, limit = 0, BUCKET_BYTES
    if open_bytes:
        found.append((open_bytes, 0.0))
    tied = FP32 * workload.tied_params  # counted by two blocks, sent once, with the last
    if tied and found:
        found[0] = (max(FP32, found[0][0] - tied), found[0][1])
    return found


def structure_of(profile: MachineProfile) -> Structure:
    """The numbers calibrated by runs on this machine, or the ones that ship."""
    calibrated = profile.calibration
    if calibrated is None:
        return Structure()
    known = {f.name for f in fields(Structure)} - {"bands"}
    if strange := sorted(set(calibrated.values) - known):
        raise ProfileError(f"the calibration of {profile.name} has {', '.join(strange)}, which this version does not "
                           "know: calibrate again with `turbopump plan --calibrate RUN`")  # fmt: skip
    return replace(Structure(), **dict(calibrated.values), bands=dict(calibrated.bands))


def as_table(prediction: StepPrediction) -> dict[str, Any]:
    """Plain values, as prediction.json holds them."""
    return {
        "step": asdict(prediction.step) | {"total": prediction.total_s},
        "low": asdict(prediction.low) | {"total": prediction.total_low_s},
        "high": asdict(prediction.high) | {"total": prediction.total_high_s},
        "kinds": [asdict(kind) for kind in prediction.kinds],
        "measured_share": prediction.measured_share,
    }
