"""Who reads: the calling thread, threads, or processes, and how many; measured where "auto" is asked for.

The trial costs no step: the kind that could pay is started and fills its ring once, and these are the first steps that
are used. Threads are tried only for sources that say `releases_gil = True` (which says too that threads may read at
once: no measurement could show that); for all others processes, so that a source is never opened in the parent before
they are forked. What was found is a plain table, to be kept and given back as `choice`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal

from turbopump.core.errors import ConfigError
from turbopump.data.read_ahead import Filled
from turbopump.data.step_reading import SampleReader

Workers = Literal["auto", "threads", "processes"]
NumWorkers = int | Literal["auto"]
Choice = dict[str, Any]

QUICK_READ_S = 3e-4
"""A step read in less is read by the caller: waking another thread or process for it costs about as much."""
MOST_WORKERS = 8


def candidate(samples: SampleReader, workers: Workers, num_workers: NumWorkers) -> Choice:
    """What `workers` and `num_workers` come to before any measurement. Raises `ConfigError`."""
    if workers not in ("auto", "threads", "processes"):
        raise ConfigError([f"workers: {workers!r} given; allowed: 'auto', 'threads', 'processes'"], "loader")
    if num_workers != "auto" and (type(num_workers) is not int or num_workers < 0):
        raise ConfigError([f"num_workers: {num_workers!r} given; allowed: 0, 1, 2, ... or 'auto'"], "loader")
    if num_workers == 0:
        return caller("loader.num_workers is 0")
    if workers == "auto":
        releases = getattr(samples.source, "releases_gil", False) and not samples.seeded
        workers, why = ("threads", "the source works without the GIL") if releases else (
            "processes", "the source may hold the GIL or draws random numbers")  # fmt: skip
    else:
        why = f"loader.workers is {workers}"
    count = min(MOST_WORKERS, len(os.sched_getaffinity(0))) if num_workers == "auto" else num_workers
    if workers == "threads" and getattr(samples.source, "batches_ahead", None):
        count, why = 1, f"{why}, and fetches many records at once by itself"
    return {"workers": workers, "num_workers": count, "why": why}


def caller(why: str) -> Choice:
    return {"workers": "none", "num_workers": 0, "why": why}


def checked(choice: Mapping[str, Any]) -> Choice:
    """A choice of an earlier run. Raises `ConfigError` where it is none."""
    workers, count = choice.get("workers"), choice.get("num_workers")
    reads_ahead = workers in ("threads", "processes") and isinstance(count, int) and count > 0
    if not (reads_ahead or (workers == "none" and count == 0)):
        raise ConfigError(
            [f"choice: workers {workers!r} with num_workers {count!r} is none of this loader's"], "loader"
        )
    return dict(choice)


def judged(tried: Choice, done: Sequence[Filled], num_slots: int) -> Choice:
    """Whether the candidate pays, from the `num_slots` tasks of one step each that it did, in the order of their end.

    It does where steps come at least as fast as the caller would read them. The time between the end of the first
    `num_workers` tasks and the last leaves out how long it took to start.
    """
    reads = sorted(filled.read_s for filled in done)
    read_s = median(reads)
    evidence: dict[str, Any] = {"read_s": read_s, "step_bytes": done[-1].nbytes}
    took = f"a step is read in {1e3 * read_s:.3g} ms"
    if reads[len(reads) // 4] < QUICK_READ_S:  # the least disturbed: readers that start get into each other's way
        return {**caller(f"{took}: too quick for others to pay"), "evidence": evidence}
    head = min(tried["num_workers"], len(done) - 1)
    if head > 0 and len(done) == num_slots:
        ahead_s = (done[-1].end_s - done[head - 1].end_s) / (len(done) - head)
        evidence["ahead_s"] = ahead_s
        what = f"{took}; {tried['num_workers']} {tried['workers']} give one every {1e3 * ahead_s:.3g} ms"
        return {**(tried if ahead_s <= read_s else caller("")), "why": what, "evidence": evidence}
    return {**tried, "why": f"{took}; too few steps to measure more", "evidence": evidence}
