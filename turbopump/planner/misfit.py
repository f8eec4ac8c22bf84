"""Why there is no plan, and the nearest that there is: sizes that do not divide, a model that fits nowhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from turbopump.core.errors import PlanError
from turbopump.core.units import human
from turbopump.planner.candidates import Candidates, Space, enumerate_candidates
from turbopump.planner.machine import Machine

GIB = 1 << 30
MOST_DEVICES = 1 << 17
MOST_TRIED = 64


def explain_nothing(space: Space) -> PlanError:
    """The error of a space without candidates: which held value leaves none and what it may be, else which number of
    devices or batch would divide."""
    for name, values in space.holds.items():
        others = enumerate_candidates(space.without(name))
        if len(others):
            allowed = ", ".join(map(str, _near(_values(others, name), values[0])))
            given = ",".join(map(str, values))
            return PlanError(
                f"--fix {name}={given} leaves nothing that divides {_sizes(space)} on {space.num_devices} devices: "
                f"use {name}={allowed.replace(', ', f', {name}=')}"
            )
    if space.holds:
        held = " ".join(f"--fix {name}={','.join(map(str, values))}" for name, values in space.holds.items())
        return PlanError(
            f"{held} leave nothing that divides {_sizes(space)} on {space.num_devices} devices: take one of them away"
        )
    counts = _nearest(space.num_devices, lambda count: replace(space, num_devices=count))
    batches = _nearest(
        space.base.global_batch, lambda batch: replace(space, base=replace(space.base, global_batch=batch))
    )
    return PlanError(
        f"no split of {space.num_devices} devices divides {_sizes(space)}: use {_either(counts)} devices"
        + (f", or a global batch of {_either(batches)}" if batches else "")
    )


def explain_misfit(space: Space, machine: Machine, memory: Callable[..., Any], least_bytes: float) -> PlanError:
    """The error of a model that fits nowhere: what it needs, and the fewest devices or the choice that would do."""
    limit = machine.device.memory_bytes or 0
    name = space.shape.name or f"a model of {human(space.shape.params)} parameters"
    head = (
        f"{name} does not fit on {space.num_devices} x {machine.device.name}: at best it needs "
        f"{least_bytes / GIB:.1f} GiB a device, of {limit / GIB:.1f} GiB"
    )
    ways = [f"take away --fix {held}={','.join(map(str, space.holds[held]))}" for held in space.holds
            if _some_fit(space.without(held), machine, memory)]  # fmt: skip
    if "recompute" in space.holds and ways and (full := _recompute_that_fits(space, machine, memory)):
        ways[next(i for i, way in enumerate(ways) if "recompute" in way)] = f"use --fix recompute={full}"
    counts = (n for n in _more_devices(space, machine) if _some_fit(replace(space, num_devices=n), machine, memory))
    count = next(counts, None)
    if count is not None:
        ways.append(f"use {count} devices or more")
    if not ways:
        ways = ["it would not fit on any number of them: use a device with more memory, or a smaller model or sequence"]
    return PlanError(f"{head}: {', or '.join(ways)}")


def _recompute_that_fits(space: Space, machine: Machine, memory: Callable[..., Any]) -> str | None:
    free = space.without("recompute")
    for mode in ("selective", "full"):
        if _some_fit(replace(free, holds={**free.holds, "recompute": (mode,)}), machine, memory):
            return mode
    return None


def _some_fit(space: Space, machine: Machine, memory: Callable[..., Any]) -> bool:
    """Whether the most frugal candidates fit: smallest microbatch, all recomputed, no extra stages."""
    frugal: dict[str, tuple[Any, ...]] = {"recompute": ("full",), "virtual_stages": (1,), "microbatch": (1,)}
    candidates = enumerate_candidates(replace(space, holds={**frugal, **space.holds}))
    if not len(candidates):
        return False
    changed = replace(machine, num_devices=space.num_devices)
    return bool(np.any(memory(candidates.cases(space), changed).fits))


def _more_devices(space: Space, machine: Machine) -> Iterator[int]:
    """Numbers of devices above today's, the smallest first: whole hosts, then coarser as they grow."""
    count, step = space.num_devices, 1 if space.num_devices < machine.devices_per_node else machine.devices_per_node
    for tried in range(MOST_TRIED):
        count += step
        if count > MOST_DEVICES:
            return
        if count >= machine.devices_per_node:
            step = max(machine.devices_per_node, 1 << max(0, count.bit_length() - 4)) if tried > 4 else step
        yield count


def _nearest(value: int, changed: Callable[[int], Space]) -> list[int]:
    """The next smaller and larger values with which something divides."""
    found = []
    for direction in (-1, 1):
        for step in range(1, value + 1):
            other = value + direction * step
            if other >= 1 and len(enumerate_candidates(changed(other))):
                found.append(other)
                break
            if step > 4 * MOST_TRIED:
                break
    return found


def _values(candidates: Candidates, name: str) -> list[Any]:
    column = candidates.values(name)
    _, first = np.unique(column, return_index=True)
    return [candidates.value(name, int(position)) for position in first]


def _near(values: list[Any], given: Any) -> list[Any]:
    """The two nearest numbers around the one given, or all words."""
    if not isinstance(given, int):
        return values
    below, above = [v for v in values if v < given], [v for v in values if v > given]
    return [*below[-1:], *above[:1]] or values


def _either(values: list[int]) -> str:
    return " or ".join(map(str, values)) or "another number of"


def _sizes(space: Space) -> str:
    shape = space.shape
    experts = f", {shape.experts} experts" if shape.experts > 1 else ""
    return (
        f"{shape.layers} layers, {shape.heads} heads of {shape.keys} groups{experts}, "
        f"{space.base.seq_len} tokens and a batch of {space.base.global_batch}"
    )
