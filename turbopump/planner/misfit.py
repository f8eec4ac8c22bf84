"""Why there is no plan, and the nearest that there is: sizes that do not divide, a model that fits nowhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from turbopump.core.errors import PlanError
from turbopump.core.units import human
from turbopump.planner.candidates import Candidates, Space, divisors, enumerate_candidates, even_enough
from turbopump.planner.machine import DEVICES_PER_NODE, Machine

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
    counts, batches = _counts_that_divide(space), _batches_that_divide(space)
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
    count = _fewest_that_fit(space, machine, memory)
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


def _fewest_that_fit(space: Space, machine: Machine, memory: Callable[..., Any]) -> int | None:
    """The least number of devices above today's that hold it, by bisection: more devices hold what fewer do. Beyond a
    host only whole hosts count."""
    several_hosts = machine.num_devices > machine.devices_per_node
    per_node = machine.devices_per_node if several_hosts else max(machine.devices_per_node, DEVICES_PER_NODE)
    counts = [n for n in _counts(space) if n > space.num_devices and (n <= per_node or n % per_node == 0)]
    if not counts or not _some_fit(replace(space, num_devices=counts[-1]), machine, memory):
        return None
    low, high = -1, len(counts) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if _some_fit(replace(space, num_devices=counts[middle]), machine, memory):
            high = middle
        else:
            low = middle
    return counts[high]


def _counts(space: Space) -> list[int]:
    """Numbers of devices that tensor, pipeline and data ranks can come to, ascending."""
    shape = space.shape
    stages = [n for n in range(1, shape.layers + 1) if even_enough(shape.layers, n)]
    found = {tp * pp * dp for tp in divisors(shape.heads) for pp in stages for dp in divisors(space.base.global_batch)}
    return sorted(n for n in found if n <= MOST_DEVICES)


def _counts_that_divide(space: Space) -> list[int]:
    """The next smaller and larger number of devices that some split divides."""
    below = [n for n in reversed(_counts(space)) if n < space.num_devices]
    above = [n for n in _counts(space) if n > space.num_devices]
    return [found for side in (below, above) if (found := _first_that_divides(space, side))]


def _first_that_divides(space: Space, counts: list[int]) -> int | None:
    return next((n for n in counts[:MOST_TRIED] if len(enumerate_candidates(replace(space, num_devices=n)))), None)


def _batches_that_divide(space: Space) -> list[int]:
    """The next smaller and larger global batch that the data ranks of some split share."""
    shape, batch = space.shape, space.base.global_batch
    shares = {
        space.num_devices // tp // pp for tp in divisors(shape.heads) for pp in range(1, shape.layers + 1)
        if even_enough(shape.layers, pp) and space.num_devices % (tp * pp) == 0
    }  # fmt: skip
    below = max((batch // dp * dp for dp in shares), default=0)
    above = min((-(-batch // dp) * dp for dp in shares), default=0)
    return [number for number in dict.fromkeys((below, above)) if number]


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
