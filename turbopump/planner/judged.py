"""How good predictions are: error, bias, coverage and width of the band, and what a wrong choice would have cost.

    error      mean of |predicted / measured - 1|          bias    mean of predicted / measured - 1
    coverage   share of rows measured within the band      width   mean half-width of the band over the prediction
    regret     how much slower than the best measured the choice predicted best was, over choices of two rows or more

Of memory two more. `false_fits`: rows where the planner asks for less than was used, so that there is a device size
at which it would call fitting what is not. `false_rejections`: rows where it asks for more than the device had that
the row ran on. The first stops a run, the second only hides a choice.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BAND = 0.8
LEAST_ROWS = 5  # of other groups, for a band out of them
UNKNOWN_HALF_WIDTH = math.log(2.0)  # where nothing was measured elsewhere: a factor of 2
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """One measured number beside its prediction, in one unit. `low` to `high` is the 80 % band, nan without one."""

    table: str
    group: str
    """What cross-validation leaves out as one."""
    label: str
    predicted: float
    measured: float
    unit: str
    low: float = math.nan
    high: float = math.nan
    choice: str = ""
    """Rows among which a planner would have chosen; empty where nothing was to be chosen."""
    asked: float = math.nan
    """Of memory, in the same unit: what a device must have for the planner to call it fitting."""
    capacity: float = math.nan
    """Of memory, in the same unit: what the device had that it ran on."""

    @property
    def error(self) -> float:
        return abs(self.predicted / self.measured - 1.0)

    @property
    def covered(self) -> bool:
        return self.low <= self.measured <= self.high


@dataclass(frozen=True)
class Score:
    """Of a table or of one group of it. What the rows cannot say (a band, a choice) is None."""

    num_rows: int
    error: float
    median_error: float
    bias: float
    coverage: float | None = None
    width: float | None = None
    regret: float | None = None
    worst_regret: float | None = None
    num_choices: int = 0
    false_fits: int | None = None
    false_rejections: int | None = None

    @property
    def width_over_error(self) -> float | None:
        """Half-width of the band over the mean error; an honest band of a normal error has 1.6."""
        return None if self.width is None or not self.error else self.width / self.error


def score(rows: Sequence[Row]) -> Score:
    """The score of one or more rows."""
    predicted, measured = _column(rows, "predicted"), _column(rows, "measured")
    ratio = predicted / measured
    low, high = _column(rows, "low"), _column(rows, "high")
    banded = np.isfinite(low) & np.isfinite(high)
    regrets = regrets_of(rows)
    asked, capacity = _column(rows, "asked"), _column(rows, "capacity")
    says = np.isfinite(asked)
    told = says & np.isfinite(capacity)
    return Score(
        num_rows=len(rows),
        error=float(np.mean(np.abs(ratio - 1.0))),
        median_error=float(np.median(np.abs(ratio - 1.0))),
        bias=float(np.mean(ratio - 1.0)),
        coverage=float(np.mean((low <= measured)[banded] & (measured <= high)[banded])) if banded.any() else None,
        width=float(np.mean(((high - low) / 2.0 / predicted)[banded])) if banded.any() else None,
        regret=float(np.mean(regrets)) if regrets else None,
        worst_regret=max(regrets) if regrets else None,
        num_choices=len(regrets),
        false_fits=int(np.sum(asked[says] < measured[says])) if says.any() else None,
        false_rejections=int(np.sum(asked[told] > capacity[told])) if told.any() else None,
    )


def by_group(rows: Iterable[Row]) -> dict[str, Score]:
    """A score a group, in the order they first come."""
    return {group: score(members) for group, members in grouped(rows).items()}


def grouped(rows: Iterable[Row]) -> Mapping[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    return groups


def regrets_of(rows: Iterable[Row]) -> list[float]:
    """Of every choice with at least two rows: measured of the one predicted best over the best measured, less 1.

    Where several are predicted alike, their mean: no luck of the order. Small is good, as with times.
    """
    choices: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row.choice:
            choices[row.group, row.choice].append(row)
    found = []
    for members in choices.values():
        if len(members) > 1:
            least = min(r.predicted for r in members)
            taken = [r.measured for r in members if r.predicted <= least * (1 + 1e-9)]
            found.append(sum(taken) / len(taken) / min(r.measured for r in members) - 1.0)
    return found


def half_width(log_errors: Mapping[str, Sequence[float]], without: str = "") -> float:
    """Of the 80 % band, in logarithms: the conformal quantile of |log error| over all groups but `without`.

    Errors of one group are alike, so that a group has the weight of its square root: a table of 300 rows of one model
    and one row each of ten others is not all about the one (Vovk, Gammerman and Shafer 2005, for the rank).
    """
    others = {group: errors for group, errors in log_errors.items() if group != without and len(errors)}
    if sum(map(len, others.values())) < LEAST_ROWS:
        return UNKNOWN_HALF_WIDTH
    values = np.concatenate([np.abs(np.asarray(errors, dtype=float)) for errors in others.values()])
    weights = np.concatenate([np.full(len(errors), 1.0 / math.sqrt(len(errors))) for errors in others.values()])
    order = np.argsort(values)
    reached = np.cumsum(weights[order]) / (weights.sum() + weights.mean())  # the one to come counts as the largest
    return float(values[order][min(int(np.searchsorted(reached, BAND)), len(values) - 1)])


def _column(rows: Sequence[Row], name: str) -> Array:
    return np.array([getattr(row, name) for row in rows], dtype=float)
