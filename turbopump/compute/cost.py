"""What a dense operation costs on a machine: seconds with an 80 % band, from the rows of its profile. Without torch.

In this order: a row of exactly this operation (`measured`); rows of the same kind, dtype and route around it
(`interpolated`: the efficiency formula fitted to them, and a regression on what it leaves, both in logarithms); the
formula with a relative's numbers and this device's peaks (`curve`); FLOPs and bytes at the best rates with what other
kinds lose of them (`roofline`, in a wide band). No prediction is faster than the best rates measured for its dtype.
At shapes never measured the median error on DeepBench's devices is 9 % (benchmarks/halves.py).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import exp, inf, log
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turbopump.compute import efficiency
from turbopump.compute.features import Case, Columns, Place
from turbopump.compute.regression import Regression
from turbopump.core.errors import CatalogError, ProfileError
from turbopump.core.workload import Op
from turbopump.hardware import accelerators
from turbopump.hardware.profile import Curve, MachineProfile, Measurement, Prediction
from turbopump.hardware.specs import DeviceSpec

Array = npt.NDArray[np.float64]
DOMAINS = ("compute", "memory", "host")
LEAST_ROWS = 8  # for a regression; fewer fit the formula only
NO_DTYPE = "fp32"  # operations without a dtype (CTC, optimizer steps) compute in it
BEST = "best"
FEW_ROWS_BAND = log(2.0)
ROOFLINE_BAND = log(4.0)
TYPICAL_SHARE = 0.5  # of a data sheet's peak: DeepBench's shapes reach 0.3-0.9 of it
TYPICAL_LAUNCH_S = 5e-6  # of a kernel on a GPU, where nothing was measured
BAND_OF_MEDIAN_ERROR = 1.9  # half-width that holds 80 % over the one that holds 50 %, of a normal distribution
RELATED = {
    "BatchedGemm": "Gemm", "Attention": "Gemm", "Conv1d": "Conv2d", "CrossEntropy": "Norm", "Embedding": "Elementwise",
    "OptimizerStep": "Elementwise",
}  # fmt: skip
"""Whose curve serves where a kind has none of its own."""


class _Guess(NamedTuple):
    """Logarithms of seconds and the half-width of the band."""

    log_s: float
    half_width: float


class _KindModel:
    """Seconds of one kind, dtype and route from its rows."""

    def __init__(self, rows: Sequence[Measurement]) -> None:
        self.cases = [Case.of_row(row) for row in rows]
        times_s = np.array([row.seconds for row in rows])
        self._peak = max((row.flops_per_s for row in rows), default=0.0) or 1.0
        self._bandwidth = max((row.bytes_per_s for row in rows), default=0.0) or 1.0
        self._parameters = efficiency.fit(self.cases, times_s, self._peak, self._bandwidth)
        left = np.log(times_s) - self._trend(self.cases)
        self._spread = float(np.std(left))
        self.columns = Columns(self.cases)
        self._regression: Regression | None = None
        if len(rows) >= LEAST_ROWS:
            shapes: dict[tuple[float, ...], int] = {}
            groups = [shapes.setdefault(tuple(case.sizes.values()), len(shapes)) for case in self.cases]
            self._regression = Regression(self.columns(self.cases), left, groups)

    def _trend(self, cases: Sequence[Case]) -> Array:
        seconds: Array = np.log(efficiency.seconds(self._parameters, cases, self._peak, self._bandwidth))
        return seconds

    def interpolates(self, case: Case) -> bool:
        return self._regression is not None and self.columns.knows(case)

    def __call__(self, cases: Sequence[Case]) -> list[_Guess]:
        """Of cases that this model `interpolates`."""
        assert self._regression is not None
        left, half_widths = self._regression(self.columns(cases))
        return [_Guess(float(a), float(b)) for a, b in zip(self._trend(cases) + left, half_widths)]

    def trend(self, case: Case) -> _Guess:
        """From the formula alone: too few rows, or a layout or direction that none of them has."""
        return _Guess(float(self._trend([case])[0]), max(FEW_ROWS_BAND, 2.0 * self._spread))


class ComputeCost:
    """Predicts operations on one device of a profile, in one process of `threads` threads.

    Raises `ProfileError` for a profile that says nothing of dense operations there. Models are fitted at the first
    operation that asks for them (about 0.5 s each) and predictions kept, so that asking again costs nothing.
    """

    def __init__(self, profile: MachineProfile, *, threads: int = 1, device: str = "cpu") -> None:
        rows = _rows(profile, threads, device)
        self._threads, self._device = threads, device
        self._spec = next((d for d in profile.devices if d.name == device), next(iter(profile.devices), None))
        self._curves = profile.curves
        if not rows and (self._spec is None or not self._spec.flops_per_s):
            raise ProfileError(
                f"the profile of {profile.name} has neither rows of dense operations nor a device with peaks: "
                "probe the machine (`turbopump probe`), or take a device of the catalog"
            )
        self._groups: dict[tuple[str, str, str], list[Measurement]] = defaultdict(list)
        self._exact: dict[str, dict[str, Measurement]] = defaultdict(dict)
        for row in rows:
            self._groups[row.kind, row.dtype, row.route].append(row)
            self._exact[row.op_key][row.route] = row
        self._best_flops: dict[str, float] = {}
        self._best_bytes: dict[str, float] = {}
        for row in rows:
            dtype = row.dtype or NO_DTYPE
            self._best_flops[dtype] = max(self._best_flops.get(dtype, 0.0), row.flops_per_s)
            self._best_bytes[dtype] = max(self._best_bytes.get(dtype, 0.0), row.bytes_per_s)
        self._losses = self._losses_by_dtype(rows)
        self._models: dict[tuple[str, str, str], _KindModel] = {}
        self._known: dict[tuple[Op, str | None], Prediction] = {}

    def predict(self, op: Op, route: str | None = None) -> Prediction:
        """Seconds of `op` by `route`: a name, `"best"` for the fastest, None for what a model gets without asking
        (`default`, where it was measured at all, else the fastest). Raises `ProfileError` for a route by which others
        of its kind were not measured, and for a dtype of which nothing is known."""
        return self.predict_many((op,), route)[0]

    def predict_many(self, ops: Iterable[Op], route: str | None = None) -> list[Prediction]:
        """As `predict`, of many at once, which is faster."""
        ops = list(ops)
        missing = dict.fromkeys(op for op in ops if (op, route) not in self._known)
        by_group: dict[tuple[str, str], list[Op]] = defaultdict(list)
        for op in missing:
            by_group[type(op).__name__, str(getattr(op, "dtype", ""))].append(op)
        for (kind, dtype), members in by_group.items():
            choices = [self._by_route(members, name) for name in self._routes(kind, dtype, route)]
            for op, *predictions in zip(members, *choices):
                self._known[op, route] = min(predictions, key=lambda prediction: prediction.seconds)
        return [self._known[op, route] for op in ops]

    def routes(self, op: Op) -> tuple[str, ...]:
        """The routes that were measured for operations of this kind and dtype."""
        asked = type(op).__name__, str(getattr(op, "dtype", ""))
        return tuple(name for kind, dtype, name in self._groups if (kind, dtype) == asked)

    def by_route(self, op: Op) -> list[Prediction]:
        """A prediction for every route that was measured for this kind and dtype, the fastest first."""
        routes = self._routes(type(op).__name__, str(getattr(op, "dtype", "")), BEST)
        return sorted((self._by_route([op], route)[0] for route in routes), key=lambda found: found.seconds)

    def least_s(self, op: Op) -> float:
        """FLOPs and bytes at the best rates measured for the dtype, by any kind and route; 0 where none was."""
        return self._least_s(Case.of(op))

    def _least_s(self, case: Case) -> float:
        dtype = case.dtype or NO_DTYPE
        flops_per_s, bytes_per_s = self._best_flops.get(dtype, 0.0), self._best_bytes.get(dtype, 0.0)
        compute_s = case.flops / flops_per_s if flops_per_s else 0.0
        return max(compute_s, case.bytes / bytes_per_s if bytes_per_s else 0.0)

    def _routes(self, kind: str, dtype: str, route: str | None) -> list[str]:
        measured = [name for k, d, name in self._groups if (k, d) == (kind, dtype)]
        if route is not None and route != BEST:
            if measured and route not in measured:
                raise ProfileError(f"{kind} in {dtype or NO_DTYPE} was not measured by route {route!r}, only by "
                                   f"{', '.join(measured)}: use one of these or probe again")  # fmt: skip
            return [route]
        return ["default"] if not measured or (route is None and "default" in measured) else measured

    def _by_route(self, ops: Sequence[Op], route: str) -> list[Prediction]:
        """Predictions of operations of one kind and dtype."""
        place = Place(self._device, self._threads, route)
        cases = [Case.of(op, place) for op in ops]
        found: list[Prediction | None] = [self._measured(op, route) for op in ops]
        model = None if all(found) else self._model(cases[0].kind, cases[0].dtype, route)
        asked = [i for i, case in enumerate(cases) if not found[i] and model and model.interpolates(case)]
        if asked and model:
            for i, guess in zip(asked, model([cases[i] for i in asked])):
                found[i] = self._prediction(cases[i], guess, "interpolated", route)
        return [done or self._beyond(case, route, model) for case, done in zip(cases, found)]

    def _model(self, kind: str, dtype: str, route: str) -> _KindModel | None:
        key = kind, dtype, route
        if key not in self._models and key in self._groups:
            self._models[key] = _KindModel(self._groups[key])
        return self._models.get(key)

    def _measured(self, op: Op, route: str) -> Prediction | None:
        row = self._exact[op.key].get(route) if op.key in self._exact else None
        if row is None:
            return None
        low_s, high_s = row.min_s or row.seconds, row.p90_s or row.seconds
        return Prediction(row.seconds, min(low_s, row.seconds), max(high_s, row.seconds), "measured", route)

    def _beyond(self, case: Case, route: str, model: _KindModel | None) -> Prediction:
        """Where no rows are around: a few rows of the kind, a relative's curve, or the roofline."""
        if model:
            return self._prediction(case, model.trend(case), "roofline", route)
        if guess := self._from_curve(case):
            return self._prediction(case, guess, "curve", route)
        return self._prediction(case, self._from_roofline(case), "roofline", route)

    def _prediction(self, case: Case, guess: _Guess, basis: str, route: str) -> Prediction:
        least_s = self._least_s(case)
        seconds, low_s, high_s = (
            max(exp(guess.log_s + times * guess.half_width), least_s) for times in (0.0, -1.0, 1.0)
        )
        return Prediction(seconds, low_s, high_s, basis, route)  # type: ignore[arg-type]

    def _from_curve(self, case: Case) -> _Guess | None:
        """A relative's curve with this device's peaks; of a related kind or another dtype only in a wider band."""
        dtype = case.dtype or NO_DTYPE
        curves = [c for c in self._curves if c.kind in (case.kind, RELATED.get(case.kind, ""))]
        if not curves or self._spec is None:
            return None
        curve = min(curves, key=lambda c: (c.kind != case.kind, c.dtype != dtype))
        peak = self._spec.flops_per_s.get(dtype, 0.0)
        if case.flops and not peak:
            return None
        seconds = efficiency.seconds(curve.parameters, [case], peak or inf, self._spec.memory_bytes_per_s or inf)
        strangers = (curve.kind != case.kind) + (curve.dtype != dtype)
        return _Guess(log(max(float(seconds[0]), 1e-9)), _half_width(curve, self._spec) + strangers * FEW_ROWS_BAND / 2)

    def _from_roofline(self, case: Case) -> _Guess:
        """The best rates, measured or of the data sheet, and what operations of other kinds usually lose of them."""
        dtype = case.dtype or NO_DTYPE
        if self._best_flops.get(dtype, 0.0) > 0 or (not case.flops and dtype in self._best_bytes):
            launch_s, low, middle, high = self._losses[dtype]
            log_s = log(max(self._least_s(case) + launch_s, 1e-9)) + middle
            return _Guess(log_s, max(high - middle, middle - low, FEW_ROWS_BAND))
        peak = self._spec.flops_per_s.get(dtype, 0.0) if self._spec else 0.0
        bandwidth = (self._spec.memory_bytes_per_s if self._spec else None) or max(
            self._best_bytes.values(), default=inf
        )
        if case.flops and not peak:
            known = sorted({*self._best_flops, *(self._spec.flops_per_s if self._spec else ())})
            raise ProfileError(f"nothing is known of {dtype} on this device (known: {', '.join(known)}): "
                               f"probe it, or plan {case.kind} in one of those")  # fmt: skip
        compute_s = case.flops / (peak * TYPICAL_SHARE) if case.flops else 0.0
        return _Guess(log(max(compute_s, case.bytes / (bandwidth * TYPICAL_SHARE)) + TYPICAL_LAUNCH_S), ROOFLINE_BAND)

    def _losses_by_dtype(self, rows: Sequence[Measurement]) -> dict[str, tuple[float, float, float, float]]:
        """Least time of any row, and the 10, 50 and 90 % quantiles of the logarithm of time over roofline."""
        by_dtype: dict[str, list[Measurement]] = defaultdict(list)
        for row in rows:
            by_dtype[row.dtype or NO_DTYPE].append(row)
        losses = {}
        for dtype, members in by_dtype.items():
            launch_s = min(row.seconds for row in members)
            over = [log(row.seconds / (self._least_s(Case.of_row(row)) + launch_s)) for row in members]
            low, middle, high = np.quantile(over, [0.1, 0.5, 0.9])
            losses[dtype] = (launch_s, float(low), float(middle), float(high))
        return losses


def _half_width(curve: Curve, spec: DeviceSpec) -> float:
    """Of the 80 % band, from the median error: on the device that was fitted, or on those that borrow from it."""
    error = curve.error
    if _name_of(curve.relative) != spec.name and error is not None:
        error = max(error, curve.parameters.get("borrowed_error", 2.0 * error))
    return BAND_OF_MEDIAN_ERROR * log(1.0 + error) if error is not None else ROOFLINE_BAND


def _name_of(relative: str) -> str:
    """The catalog's full name; as written where the catalog does not hold it."""
    try:
        return accelerators.device(relative).name
    except CatalogError:
        return relative


def _rows(profile: MachineProfile, threads: int, device: str) -> list[Measurement]:
    """What was measured there; raises `ProfileError` where rows exist, but none for this device and thread count."""
    rows = [row for row in profile.rows if row.domain in DOMAINS and row.works and row.seconds > 0]
    chosen = [row for row in rows if (row.device, row.threads) == (device, threads)]
    if rows and not chosen:
        measured = sorted({f"{row.threads} threads on {row.device}" for row in rows})
        raise ProfileError(f"{profile.name} was not measured with {threads} threads on {device}, only with "
                           f"{', '.join(measured)}: choose one of these or probe again")  # fmt: skip
    return chosen
