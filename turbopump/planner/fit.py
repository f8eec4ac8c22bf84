"""Calibrations from measured steps: `fit(rows)` makes one, `cross_validated(rows)` says what it is worth elsewhere.

Levenberg-Marquardt (Marquardt 1963) on the logarithm of predicted over measured, with a soft-L1 loss and log-normal
priors: single bad rows do not pull, and what the rows say nothing about stays where physics put it. Rows of one
cluster resemble each other, so n of them count as 5 sqrt(n). All derivatives of a round are one call of the model,
with parameters along the first axis. What is left over becomes anchors; bands of parameters come from the Hessian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from turbopump.core.errors import UsageError
from turbopump.core.files import digest
from turbopump.planner.calibration import (
    KINDS,
    REGIMES,
    SIGMA_OF_BAND,
    UNKNOWN_HALF_WIDTH,
    Anchor,
    Calibration,
    features,
)  # fmt: skip
from turbopump.planner.cases import Array, Cases
from turbopump.planner.machine import Machine
from turbopump.planner.parameters import NAMES, PARAMETERS
from turbopump.planner.step import step_times, structural_times
from turbopump.planner.tables import Measured

SOFT = 0.07
"""Logarithmic error from which the loss grows in proportion instead of as a square."""
MOST_ROUNDS = 30
LONGEST_MOVE = 0.7
"""Of a parameter in one round, in the logarithm."""
ALIKE = 0.01
"""Rows whose features differ by no more than this in each are one anchor."""
FEWEST_FOR_BAND = 10
COVERED = 0.8


@dataclass(frozen=True)
class Part:
    """The rows of one machine."""

    machine: Machine
    index: NDArray[np.int64]
    cases: Cases


@dataclass(frozen=True)
class _Unknowns:
    """What is looked for: logarithms of the shared values, then of the factors of families."""

    factors: tuple[tuple[str, str], ...]
    """Family and parameter of every factor."""
    centre: Array
    spread: Array

    def constants(self, x: Array, machine: Machine) -> dict[str, Array]:
        """Parameters of a machine for every row of `x` [points, unknowns]: each [points, 1]."""
        logs = {name: x[:, i].copy() for i, name in enumerate(NAMES)}
        for i, (family, name) in enumerate(self.factors, len(NAMES)):
            if family in machine.families:
                logs[name] += x[:, i]
        return {name: np.minimum(np.exp(log), PARAMETERS[name].cap)[:, None] for name, log in logs.items()}


def parts_of(rows: Sequence[Measured]) -> list[Part]:
    """The rows by machine; how many devices a machine has is told by each case's split."""
    machines: dict[str, Machine] = {}
    positions: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        key = repr(replace(row.machine, num_devices=1))
        machines.setdefault(key, row.machine)
        positions.setdefault(key, []).append(i)
    return [
        Part(machines[key], np.array(found), Cases.of([rows[i].case for i in found]))
        for key, found in positions.items()
    ]


def predict(rows: Sequence[Measured], calibration: Calibration) -> Array:
    """Seconds of every row's step."""
    found = np.empty(len(rows))
    for part in parts_of(rows):
        found[part.index] = step_times(part.cases, part.machine, calibration).total
    return found


def fit(rows: Sequence[Measured], start: Calibration | None = None) -> Calibration:
    """A calibration fitted to `rows`, beginning at `start` (the prior by default), whose bands are its prior spreads.

    Raises `UsageError` for no rows. Bands of step times are those of `start`: only rows that were left out can say
    them (`published`).
    """
    if not rows:
        raise UsageError("there is nothing to calibrate with: give at least one measured step")
    start = start or Calibration.prior()
    parts = parts_of(rows)
    unknowns = _unknowns(parts, start)
    measured = np.log([row.step_s for row in rows])
    x, hessian = _solve(parts, unknowns, measured, weights_of(rows))
    deviation = np.sqrt(np.diag(np.linalg.inv(hessian)))
    shared = {name: min(math.exp(x[i]), PARAMETERS[name].cap) for i, name in enumerate(NAMES)}
    off = np.exp(SIGMA_OF_BAND * deviation)
    bands = {name: (shared[name] / float(off[i]), shared[name] * float(off[i])) for i, name in enumerate(NAMES)}
    families: dict[str, dict[str, float]] = {name: dict(found) for name, found in start.families.items()}
    for i, (family, name) in enumerate(unknowns.factors, len(NAMES)):
        families.setdefault(family, {})[name] = math.exp(x[i])
    fitted = Calibration(shared, families, (), start.half_widths, bands, {**start.fitted_on, **digests(rows)})
    return replace(fitted, anchors=start.anchors + anchors_of(parts, fitted, measured))


def weights_of(rows: Sequence[Measured]) -> Array:
    """What a row counts: n rows of a cluster together 5 sqrt(n), for they share what the model lacks."""
    clusters = [row.cluster for row in rows]
    count = {name: clusters.count(name) for name in set(clusters)}
    return np.array([5.0 / math.sqrt(count[name]) for name in clusters])


def digests(rows: Sequence[Measured]) -> dict[str, str]:
    """By table, of the rows that were used."""
    tables: dict[str, list[str]] = {}
    for row in rows:
        tables.setdefault(row.table, []).append(f"{row.group} {row.case!r} {row.step_s:.9g}")
    return {table: digest("\n".join(sorted(lines)).encode()) for table, lines in tables.items()}


def anchors_of(parts: Sequence[Part], fitted: Calibration, measured: Array) -> tuple[Anchor, ...]:
    """What structure leaves over on the rows, the median of those alike."""
    left: dict[tuple[tuple[str, ...], tuple[float, ...]], list[float]] = {}
    for part in parts:
        structural = structural_times(part.cases, part.machine, fitted.values(part.machine.families)).total
        residuals = measured[part.index] - np.log(structural)
        for at, residual in zip(np.round(features(part.cases, part.machine) / ALIKE) * ALIKE, residuals, strict=True):
            left.setdefault((part.machine.families, tuple(map(float, at))), []).append(float(residual))
    return tuple(Anchor(families, at, float(np.median(found))) for (families, at), found in left.items())


def _unknowns(parts: Sequence[Part], start: Calibration) -> _Unknowns:
    device_families = dict.fromkeys(part.machine.families[0] for part in parts if part.machine.families)
    software = dict.fromkeys(name for part in parts for name in part.machine.families[1:])
    factors = [(family, name) for family in device_families for name in NAMES if PARAMETERS[name].varies == "device"]
    factors += [(family, name) for family in software for name in NAMES if PARAMETERS[name].varies == "software"]
    centre = [math.log(start.shared[name]) for name in NAMES]
    centre += [math.log(start.families.get(family, {}).get(name, 1.0)) for family, name in factors]
    spread = [max(1e-3, math.log(start.bands[name][1] / start.bands[name][0]) / (2 * SIGMA_OF_BAND)) for name in NAMES]
    spread += [PARAMETERS[name].family_spread for _, name in factors]
    return _Unknowns(tuple(factors), np.array(centre), np.array(spread))


def _solve(parts: Sequence[Part], unknowns: _Unknowns, measured: Array, weights: Array) -> tuple[Array, Array]:
    """The unknowns of least loss, and the Hessian there (Gauss-Newton's)."""
    x, damping = unknowns.centre.copy(), 1e-2
    residual = _residuals(parts, unknowns, x[None], measured)[0]
    loss = _loss(residual, weights, x, unknowns)
    hessian = np.eye(len(x))
    for _ in range(MOST_ROUNDS):
        moved = _residuals(parts, unknowns, x + 1e-4 * np.eye(len(x)), measured)
        jacobian = (moved - residual).T / 1e-4
        pull = weights / (SOFT**2 * np.sqrt(1 + (residual / SOFT) ** 2))
        hessian = (jacobian * pull[:, None]).T @ jacobian + np.diag(unknowns.spread**-2)
        gradient = (jacobian * pull[:, None]).T @ residual + (x - unknowns.centre) / unknowns.spread**2
        before = loss
        while damping < 1e6:
            move = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -gradient)
            tried = x + np.clip(move, -LONGEST_MOVE, LONGEST_MOVE)
            at = _residuals(parts, unknowns, tried[None], measured)[0]
            now = _loss(at, weights, tried, unknowns)
            if now < loss:
                x, residual, loss, damping = tried, at, now, max(damping / 5, 1e-6)
                break
            damping *= 5
        if before - loss < 1e-4 * before:
            break
    return x, hessian


def _loss(residual: Array, weights: Array, x: Array, unknowns: _Unknowns) -> float:
    soft = 2 * (np.sqrt(1 + (residual / SOFT) ** 2) - 1)
    return float(weights @ soft + np.sum(((x - unknowns.centre) / unknowns.spread) ** 2))


def _residuals(parts: Sequence[Part], unknowns: _Unknowns, x: Array, measured: Array) -> Array:
    """Logarithm of predicted over measured, [points, rows]."""
    found = np.empty((len(x), len(measured)))
    for part in parts:
        constants = unknowns.constants(x, part.machine)
        found[:, part.index] = np.log(structural_times(part.cases, part.machine, constants).total)
    return found - measured


@dataclass(frozen=True)
class LeftOut:
    """Every row predicted by a calibration that never saw its group, [rows]."""

    step_s: Array
    regime: NDArray[np.int64]
    """Index in REGIMES, as that calibration saw the row."""


def cross_validated(rows: Sequence[Measured]) -> LeftOut:
    """Leave one group out at a time. Raises `UsageError` where there are fewer than two."""
    groups = np.array([f"{row.table}/{row.group}" for row in rows])
    if len(set(groups.tolist())) < 2:
        raise UsageError("leaving a group out needs at least two: give rows of several models or clusters")
    step_s, regime = np.empty(len(rows)), np.empty(len(rows), dtype=np.int64)
    for group in dict.fromkeys(groups.tolist()):
        held = np.flatnonzero(groups == group)
        calibration = fit([row for row, name in zip(rows, groups, strict=True) if name != group])
        for part in parts_of([rows[int(i)] for i in held]):
            step_s[held[part.index]] = step_times(part.cases, part.machine, calibration).total
            regime[held[part.index]] = calibration.regimes(part.cases, part.machine)
    return LeftOut(step_s, regime)


def half_widths(rows: Sequence[Measured], left_out: LeftOut, *, without: str = "") -> dict[str, float]:
    """Half of the 80 % band by regime, from errors on groups that were left out (split conformal, Vovk 2005).

    Cases like measured ones with few rows to judge them take the band of their kind; kinds with few rows take the
    widest. `without` leaves a group's own errors out.
    """
    keep = np.array([row.group != without for row in rows])
    errors = np.abs(np.log(left_out.step_s / [row.step_s for row in rows]))
    own = [errors[keep & (left_out.regime == i)] for i in range(len(REGIMES))]
    widths = [_covering(found) if len(found) >= FEWEST_FOR_BAND else math.nan for found in own]
    widest = max((width for width in widths if not math.isnan(width)), default=UNKNOWN_HALF_WIDTH)
    kinds = [widest if math.isnan(width) else width for width in widths[: len(KINDS)]]
    alike = [kinds[i] if math.isnan(width) else width for i, width in enumerate(widths[len(KINDS) :])]
    return dict(zip(REGIMES, kinds + alike, strict=True))


def _covering(errors: Array) -> float:
    """The smallest half width that covers the share wanted of these errors and one more."""
    return float(np.quantile(errors, min(1.0, COVERED * (len(errors) + 1) / len(errors)), method="higher"))


def published(rows: Sequence[Measured]) -> Calibration:
    """The calibration that ships: fitted on all rows, its bands from leaving out every group in turn."""
    return replace(fit(rows), half_widths=half_widths(rows, cross_validated(rows)))


def regret(rows: Sequence[Measured], predicted: Array) -> Mapping[str, float]:
    """By choice (one model, batch and number of devices): measured time of the row predicted fastest over that of the
    fastest, minus 1. Choices of one row are left out."""
    found = {}
    choices = np.array([row.choice for row in rows])
    measured = np.array([row.step_s for row in rows])
    for choice in dict.fromkeys(choices.tolist()):
        among = np.flatnonzero(choices == choice)
        if len(among) > 1:
            found[choice] = float(measured[among][np.argmin(predicted[among])] / measured[among].min() - 1)
    return found
