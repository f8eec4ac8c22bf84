"""Half of a device's rows predicted from the other half: the error of `ComputeCost` on DeepBench's published devices.

`halves(rows)` draws the halves anew for each seed and predicts every row that was not drawn; nothing of those is used,
not for a length, a rate or a word. The halves are drawn of shapes: all layouts of a product and all directions of a
layer lie on one side (`by="row"` parts these, but never the same operation measured twice). The form of the model
(kernels, priors, columns) was chosen by looking at the errors of all these devices, with seeds 0-5, 50-52 and 100-103:
no device is untouched by that choice, and a figure should be drawn with other seeds.
`with_others` lends a device what the other devices took for the same shapes: honest for a published device, no help to
`probe`. `nearest_sibling` is a naive predictor to compare with: the same layer at the nearest other batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks.published import Device, RnnPart
from turbopump.compute import efficiency
from turbopump.compute.cost import ComputeCost
from turbopump.compute.features import Case, Columns
from turbopump.compute.ops import OPS
from turbopump.compute.regression import Regression
from turbopump.core.version import VERSION
from turbopump.core.workload import Op
from turbopump.hardware.profile import SCHEMA, MachineProfile, Measurement, Prediction

Array = npt.NDArray[np.float64]
By = Literal["shape", "row"]
FAMILIES = {"Gemm": "products", "Conv2d": "convolutions", "RnnPart": "recurrent layers"}
WORDS = ("layout", "direction")


@dataclass(frozen=True)
class Halves:
    """Of every row predicted, over all seeds: relative errors, and whether the 80 % band held it."""

    device: Device
    family: str
    errors: Array
    roofline_errors: Array
    covered: Array

    @property
    def median(self) -> float:
        return float(np.median(self.errors))


def op_of(row: Measurement) -> Op:
    """The operation that a row describes."""
    fields: Any = dict(row.op)
    return RnnPart(**fields) if row.kind == "RnnPart" else OPS[row.kind](**fields)


def profile_of(name: str, rows: Sequence[Measurement]) -> MachineProfile:
    """A profile that holds these rows and nothing else."""
    return MachineProfile(SCHEMA, VERSION, "", name, "measured", "", {}, {}, (), rows=tuple(rows))


def halves(tables: Mapping[Device, Sequence[Measurement]], *, seeds: Sequence[int], by: By = "shape") -> list[Halves]:
    """For every device and family, predicted from the device's own other half."""
    found: dict[tuple[Device, str], list[Array]] = defaultdict(list)
    for device, rows in tables.items():
        for seed in seeds:
            known, asked = split(rows, seed, by)
            cost = ComputeCost(profile_of(device[0], known), device=device[0])
            predictions = cost.predict_many([op_of(row) for row in asked])
            roofline_s = [cost.least_s(op_of(row)) for row in asked]
            for row, prediction, least_s in zip(asked, predictions, roofline_s):
                found[device, FAMILIES[row.kind]].append(_judged(row, prediction, least_s))
    return [Halves(device, family, *np.array(rows).T) for (device, family), rows in found.items()]


def _judged(row: Measurement, prediction: Prediction, least_s: float) -> Array:
    time_s = row.seconds
    held = prediction.low_s <= time_s <= prediction.high_s
    return np.array([abs(prediction.seconds / time_s - 1.0), abs(least_s / time_s - 1.0), float(held)])


def split(rows: Sequence[Measurement], seed: int, by: By) -> tuple[list[Measurement], list[Measurement]]:
    """Two random halves of each family; an operation that was measured twice lies on one side."""
    generator = np.random.default_rng(seed)
    sides: tuple[list[Measurement], list[Measurement]] = ([], [])
    for family in FAMILIES:
        members = [row for row in rows if row.kind == family]
        keys = sorted({_key(row, by) for row in members})
        drawn = {keys[i] for i in generator.permutation(len(keys))[: len(keys) // 2]}
        for row in members:
            sides[0 if _key(row, by) in drawn else 1].append(row)
    return sides


def _key(row: Measurement, by: By) -> str:
    return str([value for name, value in row.op.items() if by == "row" or name not in WORDS])


def median_of(results: Sequence[Halves], **which: object) -> float:
    """Median error over all rows of the chosen device or family (all of them by default)."""
    chosen = [r.errors for r in results if all(getattr(r, name) == value for name, value in which.items())]
    return float(np.median(np.concatenate(chosen)))


def with_others(tables: Mapping[Device, Sequence[Measurement]], *, seeds: Sequence[int]) -> list[Halves]:
    """As `halves`, with what the other devices took for the same operation as the trend beneath the regression."""
    logs = {device: {_twin(row): np.log(row.seconds) for row in rows} for device, rows in tables.items()}
    results = []
    for device, rows in tables.items():
        for kind, family in FAMILIES.items():
            others = [name for name in tables if name != device and any(row.kind == kind for row in tables[name])]
            errors: list[Array] = []
            for seed in seeds:
                known, asked = ([r for r in side if r.kind == kind] for side in split(rows, seed, "shape"))
                if known:
                    predicted = _lent(known, asked, [logs[name] for name in others])
                    errors.append(np.abs(predicted / [row.seconds for row in asked] - 1.0))
            if errors:
                joined = np.concatenate(errors)
                results.append(Halves(device, family, joined, np.zeros(0), np.zeros(0)))
    return results


def _twin(row: Measurement) -> str:
    return row.kind + str([value for name, value in row.op.items() if name != "dtype"])


def _lent(known: Sequence[Measurement], asked: Sequence[Measurement], others: Sequence[Mapping[str, float]]) -> Array:
    """Seconds of `asked`: the device's own formula, a weighted mean (ridge) of how far the others are from it, and a
    regression on what is left. A device that did not measure an operation counts as average there."""
    cases, asked_cases = [Case.of_row(row) for row in known], [Case.of_row(row) for row in asked]
    times_s = np.array([row.seconds for row in known])
    peak, bandwidth = max(row.flops_per_s for row in known), max(row.bytes_per_s for row in known)
    parameters = efficiency.fit(cases, times_s, peak, bandwidth)

    def apart(rows: Sequence[Measurement], trend: Array) -> Array:
        table = np.array([[other.get(_twin(row), np.nan) for other in others] for row in rows])
        return np.asarray(table - trend[:, None])

    trend = np.log(efficiency.seconds(parameters, cases, peak, bandwidth))
    asked_trend = np.log(efficiency.seconds(parameters, asked_cases, peak, bandwidth))
    x = apart(known, trend)
    middle = np.nanmean(x, axis=0)
    x, asked_x = (np.nan_to_num(table - middle, nan=0.0) for table in (x, apart(asked, asked_trend)))
    left = np.log(times_s) - trend
    pull = np.full(len(others), 1.0 / len(others))
    ridge = 0.01 * len(known) * np.eye(len(others))
    weights = pull + np.linalg.solve(x.T @ x + ridge, x.T @ (left - left.mean() - x @ pull))
    columns = Columns(cases)
    regression = Regression(columns(cases), left - x @ weights, width=1.0)
    rest, _ = regression(columns(asked_cases))
    return np.asarray(np.exp(asked_trend + asked_x @ weights + rest))


def nearest_sibling(rows: Sequence[Measurement], kind: str) -> tuple[float, int]:
    """Median error of a naive predictor, and of how many rows: the time of the sibling nearest in size (the same but
    for the batch, of a product its n) in the ratio of FLOPs, with all other rows in hand.
    """
    sibling: dict[str, list[Measurement]] = defaultdict(list)
    name = {"Gemm": "n", "Conv2d": "batch", "RnnPart": "batch"}[kind]
    for row in rows:
        if row.kind == kind:
            sibling[str([v for key, v in row.op.items() if key != name])].append(row)
    errors = []
    for members in sibling.values():
        for row in members:
            near = [m for m in members if m.op[name] != row.op[name]]
            if near:
                best = min(near, key=lambda m: abs(np.log(float(m.op[name]) / float(row.op[name]))))
                errors.append(abs(best.seconds * row.flops / best.flops / row.seconds - 1.0))
    return (float(np.median(errors)), len(errors)) if errors else (float("nan"), 0)
