"""The best way to train a decoder on a machine: all candidates, those that fit, the fastest, and how sure that is.

    found = search(Space(case, num_devices=1024), machine, Models(times, memory, sigma))

The models of time and memory are handed in: they map `Cases` and a `Machine` to arrays. Memory is asked first, time
only for what fits, both in chunks so that a million candidates need no gigabyte. Besides the best it is told what
comes next and by how many standard deviations, what each choice is worth, and which change of the machine, the
constraints or the training itself would lead to another answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbopump.core.workload import DTYPE_BYTES
from turbopump.planner.candidates import HOLDABLE, SPLITS, SYNC_EVERY, Candidates, Space, enumerate_candidates
from turbopump.planner.cases import SYNCHRONISATIONS, Array, Cases, StepTimes
from turbopump.planner.choice import Alternative, Change, Choice, Found, Settings, margin_sigmas
from turbopump.planner.machine import Machine
from turbopump.planner.misfit import explain_misfit, explain_nothing

CHUNK = 1 << 15
WORTH_SAYING = 0.002
"""Share of the step time below which a gain is none."""
POOL = 2000
"""The fastest candidates that are timed again on a changed machine, beside the fastest of every split."""


@dataclass(frozen=True)
class Fit:
    """Peak bytes of the fullest rank of each case, and whether it fits in the machine's devices."""

    peak_bytes: Array
    fits: NDArray[np.bool_]


@dataclass(frozen=True)
class Models:
    """Predictions of cases on a machine."""

    times: Callable[[Cases, Machine], StepTimes]
    memory: Callable[[Cases, Machine], Fit]
    sigma: Callable[[Cases, Machine], Array]
    """Standard deviation of the logarithm of the step time."""


@dataclass(frozen=True)
class Ranked:
    """All candidates of a space: those that fit sorted by time, and how much memory each wants."""

    space: Space
    candidates: Candidates
    order: NDArray[np.int64]
    """Positions of those that fit, the fastest first."""
    step_s: Array
    """By position; infinite for those that do not fit."""
    peak_bytes: Array


def search(space: Space, machine: Machine, models: Models, *, changes: bool = True) -> Found:
    """The best candidate and its surroundings; `changes` also asks what would lead to another answer.

    Raises `PlanError` where no sizes divide, or nothing fits: with the nearest that do, or the least that would.
    """
    ranked = rank(space, machine, models)
    if not len(ranked.candidates):
        raise explain_nothing(space)
    if not len(ranked.order):
        raise explain_misfit(space, machine, models.memory, float(ranked.peak_bytes.min()))
    best, *rest = choices(ranked, ranked.order[:2], machine, models)
    runner_up = rest[0] if rest else None
    return Found(
        best, runner_up, margin_sigmas(best, runner_up) if runner_up else None, len(ranked.candidates),
        len(ranked.order), tuple(alternatives(ranked)), tuple(what_would_change(ranked, machine, models, best))
        if changes else (), landscape(ranked),
    )  # fmt: skip


def rank(space: Space, machine: Machine, models: Models) -> Ranked:
    """Every candidate's memory, and the time of those that fit."""
    candidates = enumerate_candidates(space)
    step_s, peak_bytes = np.full(len(candidates), np.inf), np.zeros(len(candidates))
    for start in range(0, len(candidates), CHUNK):
        part = np.arange(start, min(start + CHUNK, len(candidates)))
        cases = candidates.take(part).cases(space)
        memory = models.memory(cases, machine)
        peak_bytes[part] = memory.peak_bytes
        if memory.fits.any():
            step_s[part[memory.fits]] = models.times(cases.take(memory.fits), machine).total
    order = np.argsort(step_s, kind="stable")
    return Ranked(space, candidates, order[: int(np.isfinite(step_s).sum())], step_s, peak_bytes)


def choices(ranked: Ranked, positions: NDArray[np.int64], machine: Machine, models: Models) -> list[Choice]:
    """The candidates at `positions` with all that is predicted of them."""
    return _choices(ranked.candidates.take(positions), ranked.space, machine, models)


def _choices(candidates: Candidates, space: Space, machine: Machine, models: Models) -> list[Choice]:
    cases = candidates.cases(space)
    times, peak = models.times(cases, machine), models.memory(cases, machine).peak_bytes
    sigma = models.sigma(cases, machine)
    found = []
    for i in range(len(candidates)):
        case = candidates.case(space, i)
        settings = Settings(
            case.dims.num_devices, min(machine.devices_per_node, case.dims.num_devices), case.dtype, case.microbatch,
            case.num_microbatches, case.recompute, case.schedule, case.virtual_stages, case.synchronisation,
            case.sync_every,
        )  # fmt: skip
        parts = {f.name: float(getattr(times, f.name)[i]) for f in fields(times)}
        found.append(Choice(case.dims, settings, parts, float(sigma[i]), float(peak[i]), case))
    return found


def alternatives(ranked: Ranked) -> Iterator[Alternative]:
    """For each choice that was free, the best with each other value: what a user would lose by insisting on it."""
    best = ranked.order[0]
    for name in HOLDABLE:
        column = ranked.candidates.values(name)
        for value in np.unique(column):
            if value == column[best]:
                continue
            members = np.flatnonzero(column == value)
            fastest = members[np.argmin(ranked.step_s[members])]
            slower = ranked.step_s[fastest] / ranked.step_s[best] - 1
            yield Alternative(name, ranked.candidates.value(name, int(fastest)),
                              float(slower) if np.isfinite(slower) else None)  # fmt: skip


def landscape(ranked: Ranked) -> tuple[Mapping[str, Any], ...]:
    rows = []
    for position in _fastest_of_each_split(ranked):
        dims = {name: ranked.candidates.value(name, int(position)) for name in (*SPLITS, "microbatch", "recompute")}
        rows.append({**dims, "step_s": float(ranked.step_s[position]),
                     "peak_bytes": float(ranked.peak_bytes[position])})  # fmt: skip
    return tuple(rows)


def _fastest_of_each_split(ranked: Ranked) -> NDArray[np.int64]:
    """Positions, the fastest first."""
    splits = np.stack([getattr(ranked.candidates, name)[ranked.order] for name in SPLITS])
    _, first = np.unique(splits, axis=1, return_index=True)
    return ranked.order[np.sort(first)]


# ---- what would change the answer


def what_would_change(ranked: Ranked, machine: Machine, models: Models, best: Choice) -> Iterator[Change]:
    """The machine a little different, each constraint taken away, the training changed: which plan is best then?"""
    pool = np.unique(np.concatenate([ranked.order[:POOL], _fastest_of_each_split(ranked)]))
    for what, changed in _other_machines(machine):
        yield _on_another_machine(ranked, pool, what, changed, models, best)
    yield _with_more_memory(ranked, machine, models, best)
    for name in ranked.space.holds:
        freed = rank(ranked.space.without(name), machine, models)
        choice = choices(freed, freed.order[:1], machine, models)[0]
        held = ",".join(map(str, ranked.space.holds[name]))
        yield _change(f"without --fix {name}={held}", "constraint", choice, best)
    for what, candidates in _other_training(ranked, machine):
        members = candidates.cases(ranked.space)
        fits = np.flatnonzero(models.memory(members, machine).fits)
        if not len(fits):
            continue
        fastest = fits[[int(np.argmin(models.times(members.take(fits), machine).total))]]
        yield _change(what, "training", _choices(candidates.take(fastest), ranked.space, machine, models)[0], best)


def _change(what: str, kind: str, choice: Choice, best: Choice) -> Change:
    gain = 1 - choice.step_s / best.step_s
    return Change(what, kind, choice, gain, not choice.same_as(best) and gain > WORTH_SAYING)


def _other_machines(machine: Machine) -> Iterator[tuple[str, Machine]]:
    for name, what in (("network", "the network"), ("node", "the link within a host")):
        link = getattr(machine, name)
        several_hosts = machine.num_devices > machine.devices_per_node
        if link is not None and machine.num_devices > 1 and (name == "node" or several_hosts):
            for times, words in ((0.5, "at half the rate"), (2.0, "at twice the rate")):
                changed = replace(link, bytes_per_s=link.bytes_per_s * times)
                yield f"{what} {words}", replace(machine, **{name: changed})
    if (memory := machine.device.memory_bytes) is not None:
        yield "10 % less memory", _with_memory(machine, round(memory * 0.9))


def _with_memory(machine: Machine, memory_bytes: int) -> Machine:
    return replace(machine, device=replace(machine.device, memory_bytes=memory_bytes))


def _on_another_machine(
    ranked: Ranked, pool: NDArray[np.int64], what: str, machine: Machine, models: Models, best: Choice
) -> Change:
    cases = ranked.candidates.take(pool).cases(ranked.space)
    fits = models.memory(cases, machine).fits
    if not fits.any():
        return Change(what, "machine", None, 0.0, True)
    step_s = np.where(fits, models.times(cases, machine).total, np.inf)
    winner = int(np.argmin(step_s))
    choice = choices(ranked, pool[[winner]], machine, models)[0]
    kept = int(np.flatnonzero(pool == ranked.order[0])[0])
    if not np.isfinite(step_s[kept]):
        return Change(what, "machine", choice, 1 - choice.step_s / best.step_s, True)
    gain = 1 - float(step_s[winner] / step_s[kept])
    return Change(what, "machine", choice, gain, not choice.same_as(best) and gain > WORTH_SAYING)


def _with_more_memory(ranked: Ranked, machine: Machine, models: Models, best: Choice) -> Change:
    """What does not fit today, by a tenth at most."""
    what, memory = "10 % more memory", machine.device.memory_bytes or 0
    changed = _with_memory(machine, round(memory * 1.1))
    near = np.flatnonzero(np.isinf(ranked.step_s) & (ranked.peak_bytes <= memory * 1.1))
    cases = ranked.candidates.take(near).cases(ranked.space) if len(near) else None
    fits = np.flatnonzero(models.memory(cases, changed).fits) if cases is not None else near
    if cases is None or not len(fits):
        return Change(what, "machine", best, 0.0, False)
    winner = fits[int(np.argmin(models.times(cases.take(fits), changed).total))]
    choice = choices(ranked, near[[winner]], changed, models)[0]
    return _change(what, "machine", choice, best) if choice.step_s < best.step_s else Change(
        what, "machine", best, 0.0, False)  # fmt: skip


def _other_training(ranked: Ranked, machine: Machine) -> Iterator[tuple[str, Candidates]]:
    """The fastest candidates with fp8 products, quantized or rare exchanges: faster, and another run."""
    pool = ranked.candidates.take(ranked.order[:POOL])
    base = ranked.space.base
    known = "fp8" in machine.device.flops_per_s and "dtype" not in ranked.space.holds
    if known and base.dtype != "fp8" and DTYPE_BYTES[base.dtype] <= 2:
        yield "products in fp8", replace(pool, dtypes=("fp8",), dtype=np.zeros_like(pool.dtype))
    if "synchronisation" in ranked.space.holds:
        return
    several = pool.take(pool.dp_replicate * pool.dp_shard > 1)
    if len(several):
        quantized = np.full(len(several), SYNCHRONISATIONS.index("quantized"), np.int64)
        yield "gradients exchanged quantized", replace(several, synchronisation=quantized)
    copies = pool.take(pool.dp_replicate > 1)
    for every in SYNC_EVERY if len(copies) else ():
        local = np.full(len(copies), SYNCHRONISATIONS.index("local"), np.int64)
        yield (f"local updates, exchanged every {every} steps",
               replace(copies, synchronisation=local, sync_every=np.full(len(copies), every, np.int64)))  # fmt: skip
