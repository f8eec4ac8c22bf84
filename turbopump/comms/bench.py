"""How communication is measured: collectives between processes of this host, by every route that it offers.

Routes: `gloo` (CPU tensors over loopback TCP), `nccl` (a CUDA device a rank), `mpi` (mpi4py, where installed). One that
is absent is said once, in the row of an 8-byte all-reduce. Sizes go from 8 B to 64 MiB. A row's time is the median over
blocks of the slowest rank's wall time, a call; `Send` is half a round trip. Its `waited` is the share of the ranks'
cores that other programs took meanwhile, as /proc/stat tells. One row of domain `host` says what computing and
communicating cost each other (`Overlap`).

The ranks of a route stay while its rows follow each other. A row whose rank dies or hangs says so, and the next begins
with new ones. bench_ranks.py has the processes, bench_worker.py what they do.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from turbopump.comms.bench_ranks import HostBusy, Ranks, congestion_control, loopback, mpi_problem
from turbopump.comms.ops import (
    AllGather,
    AllReduce,
    AllToAll,
    Barrier,
    Broadcast,
    Collective,
    Overlap,
    ReduceScatter,
    Send,
)
from turbopump.core.errors import RankError
from turbopump.core.workload import DTYPE_BYTES, Op
from turbopump.hardware.profile import Measurement, Request, Scalar, Trial
from turbopump.hardware.timing import Timing

SIZES = tuple(1 << power for power in range(3, 27))  # 8 B to 64 MiB
FEW = tuple(1 << power for power in (3, 12, 18, 22, 26))
MORE = tuple(1 << power for power in (7, 10, 14, 16, 20, 24))
KEPT_ROUTES = 2  # groups of ranks that wait at the same time
FAILURES = 2  # after so many a group is not started again
LEAST_BYTES_PER_S = 2e8  # a slow link, for guessing whether a row can end in time
START_S = 6.0
OVERLAP_BYTES, OVERLAP_SIZE = 16 << 20, 256
CUDA_OVERLAP_BYTES, CUDA_OVERLAP_SIZE = 256 << 20, 2048


def trials(request: Request) -> list[Trial]:
    """What is worth measuring between 2 to `request.max_ranks` processes, the most telling first."""
    found: list[Trial] = []
    if request.max_ranks >= 2 and "comms" in request.domains:
        for op in request.ops:
            if isinstance(op, Collective) and op.ranks > 1:
                found += [Trial(op, route, 1, _device(route), 0) for route in _routes(op.ranks, op.dtype)]
        for route in ("nccl", "gloo", "mpi") if request.device == "cuda" else ("gloo", "mpi", "nccl"):
            found += _of_route(route, request)
    if request.max_ranks >= 2 and "host" in request.domains:
        found.append(_overlap(request))
    return sorted(dict.fromkeys(found), key=lambda trial: trial.tier)


def _of_route(route: str, request: Request) -> list[Trial]:
    found = []
    for ranks in _rank_counts(request.max_ranks):
        if _absent(route, ranks):
            if ranks == 2:
                found.append(Trial(AllReduce(8, ranks), route, 1, _device(route), 0))  # its row says why
            continue
        tier_more = 0 if ranks == 2 else 1
        found += [
            Trial(op, route, 1, _device(route), tier) for op, tier in _grid(ranks, tier_more)
        ]  # fmt: skip
    return found


def _grid(ranks: int, tier: int) -> Iterator[tuple[Collective, int]]:
    least = ranks * DTYPE_BYTES["fp32"]  # so that every rank has a share
    if ranks == 2:
        yield Send(8), 0
    yield Barrier(ranks=ranks), tier
    for size in SIZES:
        size_tier = tier if size in FEW else max(1, tier) if size in MORE else 2
        if size >= least:
            yield AllReduce(size, ranks), size_tier
    for kind in (AllGather, ReduceScatter, Broadcast, AllToAll):
        yield from ((kind(size, ranks), 2) for size in sorted({*FEW, *MORE}) if size >= least)
    if ranks == 2:
        yield from ((Send(size), 2) for size in sorted({*FEW[1:], *MORE}))


def _overlap(request: Request) -> Trial:
    if request.device == "cuda" and not _absent("nccl", 2):
        op = Overlap(CUDA_OVERLAP_SIZE, CUDA_OVERLAP_BYTES, 2, dtype="bf16")
        return Trial(op, "nccl", 1, "cuda", 1)
    threads = max(1, min(request.threads[0], _cores() // 2))
    return Trial(Overlap(OVERLAP_SIZE, OVERLAP_BYTES, 2), "gloo", threads, "cpu", 1)


def _rank_counts(most: int) -> list[int]:
    """2, 4, 8 ... and `most` itself."""
    counts = [1 << power for power in range(1, most.bit_length()) if 1 << power <= most]
    return sorted({*counts, most})


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _device(route: str) -> str:
    return "cuda" if route == "nccl" else "cpu"


def _routes(ranks: int, dtype: str) -> list[str]:
    return [route for route in ("gloo", "mpi", "nccl") if not _absent(route, ranks)] or ["gloo"]


def _absent(route: str, ranks: int) -> str:
    """Why a route cannot be measured here with so many ranks; empty where it can."""
    if route == "mpi":
        return mpi_problem(ranks, _cores())
    try:
        import torch
        import torch.distributed as dist
    except ImportError:
        return f"{route} comes with PyTorch, which is not installed: pip install 'turbopump[train]'"
    if route == "gloo":
        return "" if dist.is_available() and dist.is_gloo_available() else "this PyTorch was built without gloo"
    if not dist.is_available() or not dist.is_nccl_available():
        return "this PyTorch was built without NCCL"
    devices = torch.cuda.device_count()
    return "" if devices >= ranks else f"{ranks} ranks need as many CUDA devices: PyTorch sees {devices}"


def measure(trials: Sequence[Trial], request: Request, until: float) -> Iterator[Measurement]:
    """A row for each trial that can end by `until` (of `time.monotonic()`), in order; no process is left behind."""
    with _Kept() as kept:
        for trial in trials:
            problem = _why_not(trial, request)
            if problem:
                yield Measurement.failed(trial, _domain(trial.op), problem)
                continue
            needed_s = 2.5 * request.row_s + 12 * trial.op.cost.bytes / LEAST_BYTES_PER_S
            if time.monotonic() + needed_s + kept.start_s(trial) > until:
                continue
            yield _row(kept, trial, request, until)


def _why_not(trial: Trial, request: Request) -> str:
    op: Any = trial.op
    if op.ranks > request.max_ranks:
        return f"{op.ranks} ranks: measured are up to {request.max_ranks} processes of this host"
    if op.level != "node":
        return f"level {op.level} crosses more than this host"
    return _absent(trial.route, op.ranks)


def _domain(op: Op) -> Literal["comms", "host"]:
    return "host" if isinstance(op, Overlap) else "comms"


def _row(kept: _Kept, trial: Trial, request: Request, until: float) -> Measurement:
    domain = _domain(trial.op)
    try:
        ranks = kept.ranks(trial, until)
        command = {"do": "overlap" if domain == "host" else "measure", "kind": type(trial.op).__name__,
                   "op": asdict(trial.op), "budget_s": request.row_s}  # fmt: skip
        busy = HostBusy()
        answers = ranks.ask(command, max(1.0, until - time.monotonic()))
        waited = busy.waited(len(answers), sum(answer["cpu_s"] for answer in answers))
    except RankError as error:
        kept.give_up(trial, str(error))
        return Measurement.failed(trial, domain, str(error))
    problems = [answer["problem"] for answer in answers if "problem" in answer]
    if problems:
        return Measurement.failed(trial, domain, problems[0])
    facts = _facts(trial, ranks.library)
    if domain == "host":
        timing, slowdowns = _overlap_of(answers, waited)
        return Measurement.of(trial, domain, timing, library=ranks.library, facts=facts | slowdowns)
    slowest = np.max([answer["seconds"] for answer in answers], axis=0)
    timing = _timing(slowest, int(answers[0]["calls"]), waited)
    return Measurement.of(trial, domain, timing, library=ranks.library, facts=facts)


def _timing(seconds: np.ndarray, calls: int, waited: float) -> Timing:
    median, p90 = float(np.median(seconds)), float(np.quantile(seconds, 0.9))
    return Timing("wall", len(seconds), calls, float(seconds.min()), median, p90, median, waited)


def _overlap_of(answers: Sequence[dict[str, Any]], waited: float) -> tuple[Timing, dict[str, Scalar]]:
    """Times of the all-reduce beside products; slowdowns as medians over rounds of ratios within a round."""
    rounds = np.array([answer["rounds"] for answer in answers])  # ranks, rounds, (comm, comm with, product, with)
    comm, comm_with = rounds[:, :, 0].max(axis=0), rounds[:, :, 1].max(axis=0)
    product, product_with = rounds[:, :, 2].mean(axis=0), rounds[:, :, 3].mean(axis=0)
    return _timing(comm_with, 1, waited), {
        "slowdown_compute": float(np.median(product_with / product)),
        "slowdown_comm": float(np.median(comm_with / comm)),
        "comm_alone_s": float(np.median(comm)),
        "product_alone_s": float(np.median(product)),
    }


def _facts(trial: Trial, library: str) -> dict[str, Scalar]:
    """What decides the figures beside the sizes."""
    ranks: int = trial.op.ranks  # type: ignore[attr-defined]
    facts: dict[str, Scalar] = {"ranks_per_core": ranks / _cores()} if trial.device == "cpu" else {}
    if trial.route == "gloo":
        facts |= {"interface": loopback(), "congestion_control": congestion_control()}
        if isinstance(trial.op, AllReduce | Overlap):
            facts["algorithm"] = "ring"  # gloo/allreduce.cc; torch asks for no other
    return facts | {"library": library}


class _Kept:
    """Groups of ranks that stay between rows, the last ones used; all are ended at the end of the `with` block."""

    def __init__(self) -> None:
        self._groups: dict[tuple[str, int, int], Ranks] = {}
        self._failures: dict[tuple[str, int, int], list[str]] = {}

    def __enter__(self) -> _Kept:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with ExitStack() as stack:  # the end of one must not keep another from its end
            for ranks in self._groups.values():
                stack.callback(ranks.close, at_once=kind is not None)

    def start_s(self, trial: Trial) -> float:
        return 0.0 if _group(trial) in self._groups else START_S

    def ranks(self, trial: Trial, until: float) -> Ranks:
        """The ranks that measure `trial`, started if need be. Raises `RankError` where they failed too often."""
        group = _group(trial)
        failed = self._failures.get(group, [])
        if len(failed) >= FAILURES:
            raise RankError(f"not tried again after {len(failed)} failures: {failed[-1]}")
        if group in self._groups:
            self._groups[group] = self._groups.pop(group)  # the last one used comes last
        else:
            while len(self._groups) >= KEPT_ROUTES:
                self._groups.pop(next(iter(self._groups))).close()
            left_s = max(1.0, until - time.monotonic())
            self._groups[group] = Ranks(*group, start_s=min(60.0, left_s), call_s=left_s)
        return self._groups[group]

    def give_up(self, trial: Trial, problem: str) -> None:
        group = _group(trial)
        if len(self._failures.get(group, [])) < FAILURES:
            self._failures.setdefault(group, []).append(problem)
        if group in self._groups:
            self._groups.pop(group).close(at_once=True)


def _group(trial: Trial) -> tuple[str, int, int]:
    return trial.route, trial.op.ranks, trial.threads  # type: ignore[attr-defined]
