"""The calibrated model of step times as validation takes it: the one that ships, or one fitted to given rows.

Rows are predicted machine by machine, since one call of the model is for one machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from turbopump.planner import calibration
from turbopump.planner.calibration import Calibration
from turbopump.planner.cases import Array, Cases
from turbopump.planner.choice import BAND_SIGMAS
from turbopump.planner.machine import Machine
from turbopump.planner.step import step_times
from turbopump.planner.tables import Measured


class OwnStepModel:
    """`step_times` with one calibration."""

    def __init__(self, found: Calibration, *, banded: bool) -> None:
        self._calibration, self._banded = found, banded

    @property
    def digest(self) -> str:
        return self._calibration.digest

    def seconds(self, rows: Sequence[Measured]) -> Array:
        return _by_machine(rows, lambda cases, machine: step_times(cases, machine, self._calibration).total)

    def half_widths(self, rows: Sequence[Measured]) -> Array | None:
        """Only of what ships: the errors of other groups give the band of a cross-validated row."""
        if not self._banded:
            return None
        return BAND_SIGMAS * _by_machine(rows, self._calibration.sigma)


class OwnModels:
    """Of this package."""

    def shipped(self) -> OwnStepModel:
        return OwnStepModel(calibration.shipped(), banded=True)

    def fitted(self, rows: Sequence[Measured]) -> OwnStepModel:
        return OwnStepModel(fit_rows(rows), banded=False)


def _by_machine(rows: Sequence[Measured], model: Callable[[Cases, Machine], Array]) -> Array:
    found = np.full(len(rows), np.nan)
    machines: list[tuple[Machine, list[int]]] = []
    for i, row in enumerate(rows):
        index = next((members for machine, members in machines if machine == row.machine), None)
        if index is None:
            machines.append((row.machine, [i]))
        else:
            index.append(i)
    for machine, members in machines:
        found[members] = model(Cases.of([rows[i].case for i in members]), machine)
    return found
