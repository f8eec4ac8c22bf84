"""The calibrated model of step times as validation takes it: the one that ships, or one fitted to given rows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from turbopump.planner import calibration, fit
from turbopump.planner.calibration import REGIMES, Calibration
from turbopump.planner.cases import Array
from turbopump.planner.tables import Measured


class OwnStepModel:
    """`step_times` with one calibration."""

    def __init__(self, found: Calibration, *, banded: bool) -> None:
        self._calibration, self._banded = found, banded

    @property
    def digest(self) -> str:
        return self._calibration.digest

    def seconds(self, rows: Sequence[Measured]) -> Array:
        return fit.predict(rows, self._calibration)

    def half_widths(self, rows: Sequence[Measured]) -> Array | None:
        """Only of what ships: the errors of other groups give the band of a cross-validated row."""
        if not self._banded:
            return None
        found = np.empty(len(rows))
        for part in fit.parts_of(rows):
            found[part.index] = self._calibration.half_width(part.cases, part.machine)
        return found


class OwnModels:
    """Of this package."""

    def shipped(self) -> OwnStepModel:
        return OwnStepModel(calibration.shipped(), banded=True)

    def fitted(self, rows: Sequence[Measured]) -> OwnStepModel:
        return OwnStepModel(fit.fit(rows), banded=False)

    def held_out(self, rows: Sequence[Measured]) -> tuple[Array, Array]:
        """By calibrations without the row's group, with bands by regime as the one that ships has them."""
        left_out = fit.cross_validated(rows)
        groups = np.array([row.group for row in rows])
        widths = np.empty(len(rows))
        for group in dict.fromkeys(groups.tolist()):
            by_regime = fit.half_widths(rows, left_out, without=group)
            mine = groups == group
            widths[mine] = np.array([by_regime[name] for name in REGIMES])[left_out.regime[mine]]
        return left_out.step_s, widths
