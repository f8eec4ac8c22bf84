"""Which route is best for an operation, from measured rows, with the evidence. Without torch.

A route is taken only if it is exact enough for the dtype and faster by more than the noise of both rows; else the
answer is `default`. An operation that was never measured is judged by the nearest measured shapes of its family (same
kind, dtype, layout, kernel, stride, direction): by the gains there, not by times, and the answer says so.

Noise of a row: 95 % of its median (1.25 sigma / sqrt(n)) and `REPEATS`, what a median differs between two probes of
one machine. Rows on several threads were timed by the wall clock, those on one by the thread's own; a comparison of
routes is always one of rows on the same number of threads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from turbopump.core.workload import Op
from turbopump.hardware.profile import MachineProfile, Measurement, Scalar

DEFAULT = "default"
MAX_ERROR: Mapping[str, float] = {
    "fp64": 1e-12, "fp32": 3e-6, "tf32": 2e-3, "bf16": 2e-2, "fp16": 3e-3, "fp8": 2e-2, "int8": 0.0,
}  # fmt: skip
"""Largest relative error with which a route is exact for its dtype (inputs are already rounded to it); where the
default's own is larger, that counts."""
REPEATS = 0.02
NEIGHBOURS = 3
FARTHEST = 4.0  # in powers of two, over all sizes: sixteen times in one of them
FAMILY_SIZES = frozenset(("kernel", "kernel_h", "kernel_w", "stride", "stride_h", "stride_w", "groups", "dims",
                          "reads", "writes"))  # fmt: skip
"""Sizes that decide which algorithms exist: equal within a family."""

Basis = Literal["measured", "nearest", "unknown"]


@dataclass(frozen=True)
class Choice:
    """The best route for an operation. `route` is `default` where no other is known to be better."""

    op_key: str
    route: str
    seconds: float | None
    """By `route`; None where nothing is known. Estimated where the basis is `nearest`."""
    default_seconds: float | None
    gain: float | None
    """`default_seconds / seconds`; None where the default does not work or was not measured."""
    basis: Basis
    evidence: tuple[Measurement, ...]
    error: float | None
    """Relative error of the route; the largest one of the evidence."""
    noise: float = 0.0
    """Relative uncertainty (95 %) of the gain."""
    reason: str = ""


@dataclass(frozen=True)
class Estimate:
    """What one route should take for one operation."""

    route: str
    seconds: float
    default_seconds: float
    noise: float
    exact: bool
    error: float | None
    basis: Basis
    evidence: tuple[Measurement, ...]

    @property
    def gain(self) -> float:
        return self.default_seconds / self.seconds


def best_route(
    profile: MachineProfile, op: Op, *, threads: int, max_error: float | None = None, device: str = "cpu"
) -> Choice:
    """The fastest route for `op` that is exact enough, with the rows that say so.

    `max_error` is the largest relative error allowed; without it the dtype's (`MAX_ERROR`), or that of the default
    route where that is larger. Ties and differences within the noise go to the default.
    """
    found = estimates(profile, op, threads=threads, max_error=max_error, device=device)
    if found:
        return _choose(op, found)
    rows = tuple(r for r in profile.find(op) if r.threads == threads and r.device == device)
    return _without_default(op, rows, max_error)


def estimates(
    profile: MachineProfile, op: Op, *, threads: int, max_error: float | None = None, device: str = "cpu"
) -> dict[str, Estimate]:
    """All that is known of each route of `op`, by name, `default` among them; empty where the default is not known."""
    rows = [r for r in profile.find(op) if r.threads == threads and r.device == device and r.works]
    default = next((r for r in rows if r.route == DEFAULT), None)
    if default is not None:
        return {row.route: compared(default, row, max_error) for row in rows}
    return {} if rows else _nearest(profile, op, threads, device, max_error)


def _choose(op: Op, found: Mapping[str, Estimate]) -> Choice:
    default = found[DEFAULT]
    exact = [e for e in found.values() if e.exact and e.route != DEFAULT]
    best = min(exact, key=lambda e: e.seconds, default=None)
    basis, evidence = default.basis, default.evidence
    if best is not None and best.gain > 1 + best.noise:
        reason = f"{best.gain:.2f} times as fast as the default"
        return Choice(op.key, best.route, best.seconds, best.default_seconds, best.gain, basis, best.evidence,
                      best.error, best.noise, reason)  # fmt: skip
    if best is None:
        inexact = [e.route for e in found.values() if not e.exact and e.error is not None and e.gain > 1]
        reason = f"faster, but not exact: {', '.join(inexact)}" if inexact else "no other route was measured"
        noise = 0.0
    else:
        reason, noise, evidence = "default, no measurable difference", best.noise, best.evidence
    return Choice(op.key, DEFAULT, default.seconds, default.seconds, 1.0, basis, evidence, default.error, noise, reason)


def _without_default(op: Op, rows: tuple[Measurement, ...], max_error: float | None) -> Choice:
    """The fastest exact row where the default does not work here or was not measured."""
    exact = [r for r in rows if r.works and is_exact(r, None, max_error)]
    if not exact:
        reason = "no exact route was measured" if rows else "never measured, nor anything like it"
        return Choice(op.key, DEFAULT, None, None, None, "measured" if rows else "unknown", rows, None, reason=reason)
    best = min(exact, key=lambda r: r.seconds)
    default = next((r for r in rows if r.route == DEFAULT), None)
    reason = f"the default does not work: {default.problem}" if default else "the default was not measured"
    return Choice(op.key, best.route, best.seconds, None, None, "measured", rows, best.error, noise_of(best), reason)


def is_exact(row: Measurement, default: Measurement | None, max_error: float | None = None) -> bool:
    """Whether a row's error is within what is allowed. The default is exact by definition, unless `max_error` says
    otherwise; another route whose error was not measured is not."""
    if row.route == DEFAULT and max_error is None:
        return True
    if row.error is None:
        return False
    if max_error is not None:
        return row.error <= max_error
    own = (default.error or 0.0) if default is not None else 0.0
    return row.error <= max(MAX_ERROR.get(row.dtype, MAX_ERROR["fp32"]), own)


def noise_of(row: Measurement) -> float:
    """Relative uncertainty of a row's median (95 %)."""
    if row.median_s is None or row.p90_s is None or row.min_s is None:
        return 0.0
    sigma = max((row.p90_s - row.median_s) / 1.2816, (row.median_s - row.min_s) / 2.0) / row.median_s
    return math.hypot(REPEATS, 1.96 * 1.2533 * sigma / math.sqrt(max(1, row.runs)))


def compared(default: Measurement, row: Measurement, max_error: float | None = None) -> Estimate:
    """What a route's row says beside that of the default, of one operation and number of threads."""
    same = row is default
    noise = 0.0 if same else noise_of(default) + noise_of(row)
    evidence = (default,) if same else (default, row)
    exact = is_exact(row, default, max_error)
    return Estimate(row.route, row.seconds, default.seconds, noise, exact, row.error, "measured", evidence)


# ---- operations never measured


def distance(row: Measurement, op: Op) -> float:
    """How far a row's shape lies from an operation's: Euclidean, in powers of two of each size. Infinite between
    families."""
    if row.kind != type(op).__name__:
        return math.inf
    total = 0.0
    for name, theirs in row.op.items():
        ours: Scalar = getattr(op, name)
        if type(ours) is int and name not in FAMILY_SIZES:
            total += math.log2((1 + ours) / (1 + float(theirs))) ** 2
        elif ours != theirs:
            return math.inf
    return math.sqrt(total)


def _nearest(
    profile: MachineProfile, op: Op, threads: int, device: str, max_error: float | None
) -> dict[str, Estimate]:
    """Each route's gain at the nearest shapes, as a mean of logarithms weighted by nearness; the noise is theirs and
    how far they disagree."""
    shapes: defaultdict[str, list[Measurement]] = defaultdict(list)
    for row in profile.of_kind(type(op).__name__):
        if row.threads == threads and row.device == device and distance(row, op) <= FARTHEST:
            shapes[row.op_key].append(row)
    near = sorted(
        ((distance(rows[0], op), rows) for rows in shapes.values() if any(r.route == DEFAULT for r in rows)),
        key=lambda found: found[0],
    )[:NEIGHBOURS]
    if not near:
        return {}
    pairs: defaultdict[str, list[tuple[float, Measurement, Measurement]]] = defaultdict(list)
    for far, rows in near:
        default = next(r for r in rows if r.route == DEFAULT)
        for row in rows:
            pairs[row.route].append((1 / (0.25 + far), default, row))
    closest = pairs[DEFAULT][0][1]
    seconds = closest.seconds * _work_ratio(op, closest)
    # a route that exists at only some of these shapes may not exist for this one
    return {
        route: _pooled(route, seconds, found, max_error) for route, found in pairs.items() if len(found) == len(near)
    }


def _work_ratio(op: Op, row: Measurement) -> float:
    """How much more there is to do than in the row: in FLOPs, or in bytes where none are counted."""
    cost = op.cost
    return cost.flops / row.flops if row.flops else cost.bytes / row.bytes if row.bytes else 1.0


def _pooled(
    route: str, seconds: float, found: Iterable[tuple[float, Measurement, Measurement]], max_error: float | None
) -> Estimate:
    found = list(found)
    weight = sum(w for w, _, _ in found)
    logs = [math.log(default.seconds / row.seconds) for _, default, row in found]
    mean = sum(w * x for (w, _, _), x in zip(found, logs)) / weight
    noise = 0.0 if route == DEFAULT else max(noise_of(default) + noise_of(row) for _, default, row in found)
    noise += max(abs(x - mean) for x in logs)
    exact = all(is_exact(row, default, max_error) for _, default, row in found)
    errors = [row.error for _, _, row in found if row.error is not None]
    evidence = tuple(row for _, default, row in found) if route == DEFAULT else tuple(
        row for _, default, row in found for row in (default, row))  # fmt: skip
    return Estimate(route, seconds / math.exp(mean), seconds, noise, exact, max(errors, default=None), "nearest",
                    evidence)  # fmt: skip
