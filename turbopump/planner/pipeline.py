"""A step of a pipeline: every event of its schedule, and the closed form for many cases at once.

`simulate` lists what each stage does in order (1F1B of Narayanan 2019; interleaved of Narayanan 2021) and starts each
event as soon as its stage is free and its input has arrived; a stage is busy while it sends. `pipelined_s` says the
same for arrays: the first microbatch passes all stages, then the slowest stage works through the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.planner.cases import Array


@dataclass(frozen=True)
class Event:
    """Forward or backward of one microbatch by one chunk of a stage; `chunk` counts over all stages in order."""

    stage: int
    chunk: int
    microbatch: int
    backward: bool
    start_s: float
    end_s: float
    """When the stage is free again: its sending included."""


@dataclass(frozen=True)
class Timeline:
    events: tuple[Event, ...]
    end_s: float
    idle_s: tuple[float, ...]
    """Of each stage."""


def simulate(
    forward_s: Sequence[float],
    backward_s: Sequence[float],
    *,
    num_stages: int,
    num_microbatches: int,
    send_s: float = 0.0,
) -> Timeline:
    """The timeline of a step. `forward_s[c]`, `backward_s[c]`: of chunk c for one microbatch; as many chunks as stages
    make 1F1B, a multiple the interleaved schedule, for which microbatches must be a multiple of the stages.

    Raises `UsageError` for sizes that do not fit.
    """  # fmt: skip
    chunks = len(forward_s)
    if num_stages < 1 or num_microbatches < 1 or chunks % num_stages or len(backward_s) != chunks:
        raise UsageError(
            f"{chunks} forward and {len(backward_s)} backward times for {num_stages} stages and {num_microbatches} "
            "microbatches: give each chunk both, a multiple of the stages, and at least one microbatch"
        )
    if chunks > num_stages and num_microbatches % num_stages:
        raise UsageError(
            f"num_microbatches ({num_microbatches}) must be divisible by the stages ({num_stages}) when interleaved"
        )
    orders = [_order(stage, num_stages, chunks // num_stages, num_microbatches) for stage in range(num_stages)]
    arrived: dict[tuple[int, int, bool], float] = {(0, m, False): 0.0 for m in range(num_microbatches)}
    free, busy, position = [0.0] * num_stages, [0.0] * num_stages, [0] * num_stages
    events: list[Event] = []
    while len(events) < 2 * chunks * num_microbatches:
        before = len(events)
        for stage, order in enumerate(orders):
            while position[stage] < len(order) and order[position[stage]] in arrived:
                chunk, microbatch, backward = order[position[stage]]
                position[stage] += 1
                start = max(free[stage], arrived[chunk, microbatch, backward])
                done = start + (backward_s if backward else forward_s)[chunk]
                following = _following(chunk, microbatch, backward, chunks)
                sends = following is not None and following[0] != chunk and num_stages > 1
                free[stage] = done + (send_s if sends else 0.0)
                if following is not None:
                    arrived[following] = free[stage]
                busy[stage] += free[stage] - start
                events.append(Event(stage, chunk, microbatch, backward, start, free[stage]))
        if len(events) == before:
            raise AssertionError("the schedule waits for itself")
    end = max(free)
    return Timeline(tuple(events), end, tuple(end - spent for spent in busy))


def _following(chunk: int, microbatch: int, backward: bool, chunks: int) -> tuple[int, int, bool] | None:
    """What the end of an event makes possible."""
    if not backward:
        return (chunk + 1, microbatch, False) if chunk + 1 < chunks else (chunk, microbatch, True)
    return (chunk - 1, microbatch, True) if chunk else None


def _order(stage: int, stages: int, per_stage: int, microbatches: int) -> list[tuple[int, int, bool]]:
    """The events of one stage in order: warm-up forwards, one forward and one backward in turn, the rest backward."""
    total = microbatches * per_stage
    if per_stage == 1:
        forward = [(stage, m, False) for m in range(microbatches)]
        backward = [(stage, m, True) for m in range(microbatches)]
        warmup = min(stages - stage - 1, total)
    else:
        forward = [_interleaved(index, stage, stages, per_stage, False) for index in range(total)]
        backward = [_interleaved(index, stage, stages, per_stage, True) for index in range(total)]
        warmup = min((stages - stage - 1) * 2 + (per_stage - 1) * stages, total)
    order = forward[:warmup]
    for index in range(total - warmup):
        order += [forward[warmup + index], backward[index]]
    return order + backward[total - warmup :]


def _interleaved(index: int, stage: int, stages: int, per_stage: int, backward: bool) -> tuple[int, int, bool]:
    """The `index`-th forward or backward of a stage: groups of `stages` microbatches pass its chunks in turn."""
    group, within = divmod(index, stages * per_stage)
    turn = within // stages
    chunk = (per_stage - 1 - turn if backward else turn) * stages + stage
    return chunk, group * stages + within % stages, backward


def pipelined_s(
    first: Array, middle: Array, last: Array, *, stages: Array, microbatches: Array, chunks: Array
) -> Array:
    """Seconds of a step from those of one microbatch on the first, middle and last stage (forward, backward, sends).

    One pass over all stages, then the slowest stage for the other microbatches (Narayanan 2021, uneven stages added);
    `chunks` a stage divide the filling and emptying of the interleaved schedule. One stage: `last` is all there is.
    """
    slowest = np.where(stages > 1, np.maximum(np.maximum(first, last), np.where(stages > 2, middle, 0.0)), last)
    passing = np.where(stages > 1, first + last + np.maximum(stages - 2, 0.0) * middle, last)
    return microbatches * slowest + (passing - slowest) / chunks
