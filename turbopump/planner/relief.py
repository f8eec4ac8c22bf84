"""What would make a model fit that does not: more recomputation, a smaller microbatch, or the least number of devices.

Lesson: on the devices there are, recomputation and a microbatch of one are free of charge but for time; beyond that
only more devices help, and which way of splitting needs the fewest is found by trying all of them (a few hundred cases
a count, one call of the model of memory each).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.planner.cases import RECOMPUTES, Case, Cases, ParallelDims
from turbopump.planner.memory import GIB, TURBOPUMP, Software, memory_bytes

MOST_DEVICES = 2**16
TENSOR_PARALLEL = (1, 2, 4, 8)
"""Within a host: across hosts its collectives cost more than they save."""


@dataclass(frozen=True)
class Relief:
    """A case that fits where another does not, the bytes of its fullest rank, and what to say."""

    case: Case
    peak_bytes: float
    text: str


def smallest_that_fits(
    case: Case, device_bytes: float, *, software: Software = TURBOPUMP, most_devices: int = MOST_DEVICES
) -> Relief | None:
    """The least change that lets `case` fit in devices of `device_bytes`; None where no number of them does.

    In this order: nothing; on as many devices the least recomputation, at a microbatch as given or else of one; the
    least number of devices (doubled from the given one, every split of tensor, pipeline and sharded parallelism).
    """
    same = [replace(case, recompute=mode, microbatch=m) for m in sorted({case.microbatch, 1}, reverse=True)
            for mode in RECOMPUTES[RECOMPUTES.index(case.recompute):]]  # fmt: skip
    if found := _first(same, device_bytes, software):
        return Relief(*found, _of_same(case, found[0], found[1]))
    num_devices = case.dims.num_devices
    while num_devices <= most_devices:
        candidates = sorted(_splits(case, num_devices), key=lambda c: RECOMPUTES.index(c.recompute))
        if candidates and (found := _first(candidates, device_bytes, software)):
            return Relief(*found, f"{num_devices} such devices would hold it: {describe(found[0])} "
                                  f"({found[1] / GIB:.1f} GiB a device)")  # fmt: skip
        num_devices *= 2
    return None


def does_not_fit(
    case: Case, device_bytes: float, *, device: str = "the device", software: Software = TURBOPUMP
) -> UsageError:
    """The error for a case that does not fit: what it needs, what there is, and what would do."""
    use = memory_bytes(Cases.of([case]), software)
    relief = smallest_that_fits(case, device_bytes, software=software)
    advice = relief.text if relief else (
        f"no split over up to {MOST_DEVICES} devices does: shorten seq_len ({case.seq_len}), split it (cp), "
        "or take a device with more memory"
    )  # fmt: skip
    return UsageError(
        f"{case.shape.name or 'the model'} needs {use.worst[0] / GIB:.1f} GiB a device split as {describe(case)}; "
        f"{device} has {device_bytes / GIB:.0f} GiB: {advice}"
    )


def describe(case: Case) -> str:
    """How a case is split, as the recipe spells it: `tp=8 dp_shard=4 microbatch=1 recompute=full`."""
    dims = (f"{name}={getattr(case.dims, name)}" for name in ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep")
            if getattr(case.dims, name) > 1)  # fmt: skip
    return " ".join([*dims, f"microbatch={case.microbatch}", f"recompute={case.recompute}"])


def _of_same(case: Case, found: Case, peak_bytes: float) -> str:
    if found == case:
        return f"it fits as it is ({peak_bytes / GIB:.1f} GiB a device)"
    changes = [f"recompute={found.recompute}"] if found.recompute != case.recompute else []
    changes += [f"microbatch={found.microbatch}"] if found.microbatch != case.microbatch else []
    return f"{' with '.join(changes)} would do ({peak_bytes / GIB:.1f} GiB a device)"


def _first(candidates: list[Case], device_bytes: float, software: Software) -> tuple[Case, float] | None:
    """The first of the candidates that fits, with the bytes of its fullest rank."""
    use = memory_bytes(Cases.of(candidates), software)
    fitting = np.flatnonzero(use.fits(device_bytes))
    return (candidates[fitting[0]], float(use.worst[fitting[0]])) if len(fitting) else None


def _splits(case: Case, num_devices: int) -> Iterator[Case]:
    """Every way to split over that many devices: microbatches of one, sharded data parallelism over what is left."""
    shape = case.shape
    for tp in (tp for tp in TENSOR_PARALLEL if shape.heads % tp == 0 and num_devices % tp == 0):
        stages = (pp for pp in range(1, shape.layers + 1) if shape.layers % pp == 0 and num_devices // tp % pp == 0)
        for pp in stages:
            shards = num_devices // (tp * pp * case.dims.cp)
            if not shards:
                continue
            ep = case.dims.ep if shards % case.dims.ep == 0 else 1
            dims = ParallelDims(pp=pp, dp_shard=shards, cp=case.dims.cp, tp=tp, ep=ep)
            batch = -(-case.global_batch // shards) * shards
            for mode in RECOMPUTES:
                yield replace(case, dims=dims, global_batch=batch, microbatch=1, recompute=mode, virtual_stages=1,
                              schedule="1f1b", sequence_parallel=tp > 1)  # fmt: skip
