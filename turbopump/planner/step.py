"""How long a training step takes, for many cases at once: `step_times(cases, machine, calibration)`.

Layers (layer.py) and the data they exchange (exchange.py) make the stages of a pipeline (pipeline.py); gradients and
the optimizer follow. What is left between this and what was measured on similar cases corrects the sum
(`Calibration.correction`). Many cases are worked through in parts to keep memory low.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turbopump.planner.calibration import Calibration
from turbopump.planner.cases import RECOMPUTES, Array, Cases, StepTimes
from turbopump.planner.exchange import (
    Constants,
    context_ring_s,
    expert_exchange_s,
    gradients_s,
    send_s,
    shard_gather_s,
    tensor_sum_s,
    tied_table_s,
)  # fmt: skip
from turbopump.planner.layer import LayerTimes, embedding_s, head_s, layer_times
from turbopump.planner.machine import Machine
from turbopump.planner.pipeline import pipelined_s

CASES_AT_ONCE = 20_000
PARTS = ("data", "compute", "exposed_communication", "bubble", "optimizer", "other")


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one microbatch on the first, a middle and the last stage; `last` is the whole model where there is
    one stage. `communication` is the exposed part of the slowest of them."""

    first: Array
    middle: Array
    last: Array
    communication: Array


def step_times(
    cases: Cases, machine: Machine, calibration: Calibration, *, data_s: float = 0.0, stall_s: float = 0.0
) -> StepTimes:
    """The parts of a step, an array entry a case. `data_s`: waiting for input; `stall_s`: for checkpoints, a step."""
    parts = []
    for start in range(0, len(cases), CASES_AT_ONCE):
        some = cases.take(np.arange(start, min(start + CASES_AT_ONCE, len(cases))))
        factor = np.exp(calibration.correction(some, machine))
        times = structural_times(some, machine, calibration.values(machine.families))
        parts.append([factor * getattr(times, name) for name in PARTS])
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    data, compute, communication, bubble, optimizer, other = columns
    return StepTimes(data + data_s, compute, communication, bubble, optimizer, other + stall_s)


def structural_times(cases: Cases, machine: Machine, constants: Constants) -> StepTimes:
    """The parts of a step by structure alone, without what similar cases have shown."""
    stages = stage_times(cases, machine, constants)
    microbatches = np.maximum(cases.num_microbatches, 1.0)
    chunks = np.where(cases.schedule == 1, np.maximum(cases.virtual_stages, 1.0), 1.0)
    pipeline = pipelined_s(stages.first, stages.middle, stages.last, stages=cases.pp, microbatches=microbatches,
                           chunks=chunks)  # fmt: skip
    slowest = np.maximum(stages.last, np.where(cases.pp > 1, np.maximum(stages.first, stages.middle), 0.0))
    held = _held_params(cases)
    exchange = gradients_s(cases, machine, constants, held) + tied_table_s(cases, machine, constants)
    zero = np.zeros_like(pipeline)
    return StepTimes(
        data=zero,
        compute=microbatches * (slowest - stages.communication),
        exposed_communication=microbatches * stages.communication + exchange,
        bubble=np.maximum(pipeline - microbatches * slowest, 0.0),
        optimizer=_optimizer_s(cases, machine, constants, held),
        other=zero + constants["step_s"],
    )


def stage_times(cases: Cases, machine: Machine, constants: Constants) -> StageTimes:
    """One microbatch on each kind of stage."""
    layer = layer_times(cases, machine, constants)
    slowdown = 1 + constants["straggler"] * np.sqrt(2 * np.log(np.maximum(cases.num_devices, 1.0)))
    compute = layer.forward_s * slowdown, (layer.backward_s + layer.recompute_s) * slowdown
    exposed = _exposed(cases, machine, constants, layer, compute)
    starts = np.where(cases.tp > 1, 2 * constants["launch_collective_s"], 0.0)
    full = cases.recompute == RECOMPUTES.index("full")
    sharp = constants["handover"]
    forward = _both(compute[0] + exposed[0], layer.host_forward_s + starts, sharp)
    backward = _both(compute[1] + exposed[1], layer.host_backward_s + starts * (1.0 + full), sharp)
    chunks = np.where(cases.schedule == 1, np.maximum(cases.virtual_stages, 1.0), 1.0)
    sends = 2 * chunks * send_s(cases, machine, constants)
    per_stage = cases.layers / cases.pp
    layers = per_stage * (forward + backward) + constants["microbatch_s"]
    sums = tensor_sum_s(cases, machine, constants)
    embedding = embedding_s(cases, machine, constants)
    one = cases.pp == 1
    first = layers + embedding + sends / 2  # an end stage has one neighbour
    last = layers + head_s(cases, machine, constants) + sums + np.where(one, embedding, sends / 2)
    communication = per_stage * (exposed[0] + exposed[1]) + sends / 2 + sums
    return StageTimes(first, layers + sends, last, communication)


def _exposed(
    cases: Cases, machine: Machine, constants: Constants, layer: LayerTimes, compute: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Communication of one layer that compute does not hide, forward and backward (with what is computed again)."""
    full = (cases.recompute == RECOMPUTES.index("full")) * 1.0
    blocking = 2 * tensor_sum_s(cases, machine, constants) + 2 * expert_exchange_s(cases, machine, constants)
    ring = context_ring_s(cases, machine, constants)
    ring_forward = np.maximum(ring - layer.attention_forward_s, 0.0)
    ring_backward = np.maximum(2 * ring - layer.attention_backward_s, 0.0)
    gather = shard_gather_s(cases, machine, constants)
    again = np.where(cases.reshard_after_forward > 0, gather, 0.0)
    forward = blocking + ring_forward + _behind(gather, compute[0], constants)
    backward = blocking * (1 + full) + ring_backward + full * ring_forward
    return forward, backward + _behind(again + gather, compute[1], constants)


def _behind(communication: Array, compute: Array, constants: Constants) -> Array:
    """What is left of communication that runs beside compute: the part too long for it, and what compute loses."""
    exposed = np.maximum(communication - constants["shard_overlap"] * compute, 0.0)
    return exposed + constants["overlap_slowdown"] * (communication - exposed)


def _both(device: Array, host: Array, sharpness: float) -> Array:
    """The longer of two that run side by side; near equality they wait for each other in turn, and it takes longer."""
    longer, shorter = np.maximum(device, host), np.minimum(device, host)
    return longer * (1 + (shorter / longer) ** sharpness) ** (1 / sharpness)


def _held_params(cases: Cases) -> Array:
    """Parameters of a device before sharding: its layers, and the table of tokens on an end stage."""
    experts = np.where(cases.experts > 1, (cases.layer_params - cases.attention_params) / cases.ep, 0.0)
    layer = np.where(cases.experts > 1, cases.attention_params + experts, cases.layer_params)
    return (cases.layers / cases.pp * layer + cases.vocab * cases.hidden) / cases.tp


def _optimizer_s(cases: Cases, machine: Machine, constants: Constants, held: Array) -> Array:
    """Weights and states read and written, gradients read for their norm, scaled and read again."""
    size = 2 * cases.weight_bytes + 2 * cases.optimizer_bytes + 3 * cases.gradient_bytes
    return held / cases.dp_shard * size / (machine.memory_bytes_per_s * constants["optimizer_efficiency"])
