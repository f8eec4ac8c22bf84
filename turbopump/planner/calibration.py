"""What the time model's parameters are worth: shared values, factors of families, what similar cases showed, bands.

A `Calibration` holds a value for every parameter (`parameters.py`) and, for families that were measured (a device
generation, a training software), factors on those that vary. A device that nobody measured takes the shared values.
`anchors` keep what structure left over on measured cases: a case near one, on the same device and software, is
corrected by it (Gaussian process); far from all of them the structure stands alone. Bands hold what was left over
in groups that the fit had not seen. `fit.py` makes calibrations; the one that ships lies in `calibrations/`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from turbopump.core.errors import CatalogError
from turbopump.core.files import write_atomic
from turbopump.planner.cases import Array, Cases
from turbopump.planner.machine import Machine
from turbopump.planner.parameters import NAMES, PARAMETERS

SCHEMA = 1
SHIPPED = files("turbopump.planner") / "calibrations" / "published.toml"
KINDS = ("within a host", "between hosts", "sharded")
REGIMES = (*KINDS, *(f"{kind}, like measured ones" for kind in KINDS))
LIKE_MEASURED = 0.6
"""From this nearness on a case counts as like measured ones: a case on an anchor has 0.92."""
UNKNOWN_HALF_WIDTH = math.log(1.3)  # of the 80 % band where nothing was left out to learn it from
SIGMA_OF_BAND = 1.2816  # half of an 80 % band in standard deviations, were errors normal
FEATURES = ("tp", "tokens", "hidden", "seq_len", "hosts", "recompute", "fp8")
LENGTHS = (0.6, 0.6, 1.0, 1.0, 1.0, 0.5, 0.5)
"""How far apart two cases may be, in doublings (hosts: in roots of doublings), to say much of each other."""
PRIOR_DEVIATION, NOISE_DEVIATION = 0.10, 0.03
"""Of what structure leaves over, and of that part of it that cases alike do not share."""


@dataclass(frozen=True)
class Anchor:
    """Logarithm of measured over structural seconds at one point of the features, on machines of all `families`."""

    families: tuple[str, ...]
    at: tuple[float, ...]
    residual: float


@dataclass(frozen=True)
class Calibration:
    """Values of all parameters and what is known of their errors; `prior()` before anything is measured."""

    shared: Mapping[str, float]
    families: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Factors on shared values by family and parameter."""
    anchors: tuple[Anchor, ...] = ()
    half_widths: Mapping[str, float] = field(default_factory=dict)
    """Half of the 80 % band of step times, in the logarithm, by regime."""
    bands: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """80 % bands of the shared parameters."""
    fitted_on: Mapping[str, str] = field(default_factory=dict)
    """Digest of the rows of each table."""

    @classmethod
    def prior(cls) -> Calibration:
        """What physics and data sheets say, before any step was measured."""
        wide = {name: (p.value * math.exp(-SIGMA_OF_BAND * p.spread), p.value * math.exp(SIGMA_OF_BAND * p.spread))
                for name, p in PARAMETERS.items()}  # fmt: skip
        return cls({name: p.value for name, p in PARAMETERS.items()}, bands=wide)

    @property
    def digest(self) -> str:
        """Of all that it was fitted on; empty for the prior."""
        return "+".join(f"{table}:{digest}" for table, digest in sorted(self.fitted_on.items()))

    def values(self, machine_families: Sequence[str]) -> dict[str, float]:
        """The parameters for a machine of these families, none above its cap."""
        found = dict(self.shared)
        for family in machine_families:
            for name, factor in self.families.get(family, {}).items():
                found[name] *= factor
        return {name: min(value, PARAMETERS[name].cap) for name, value in found.items()}

    def correction(self, cases: Cases, machine: Machine) -> Array:
        """Logarithm of the factor that measured cases alike suggest, [cases]; 0 far from all of them."""
        known = self._anchors_of(machine)
        if not known:
            return np.zeros(len(cases))
        return _similarity(features(cases, machine), _points(known)) @ _weights(known)

    def nearness(self, cases: Cases, machine: Machine) -> Array:
        """Share of what structure leaves over that similar measured cases tell, 0 to 1, [cases]."""
        known = self._anchors_of(machine)
        if not known:
            return np.zeros(len(cases))
        points = _points(known)
        near = _similarity(features(cases, machine), points)
        return np.sum(near * np.linalg.solve(_covariance(points), near.T).T, axis=1) / PRIOR_DEVIATION**2

    def regimes(self, cases: Cases, machine: Machine) -> NDArray[np.int64]:
        """Index in REGIMES of every case: errors within one are of a size."""
        between = cases.num_devices > machine.devices_per_node
        kind = np.where(cases.dp_shard > 1, KINDS.index("sharded"), np.where(between, KINDS.index("between hosts"), 0))
        return kind + len(KINDS) * (self.nearness(cases, machine) >= LIKE_MEASURED)

    def half_width(self, cases: Cases, machine: Machine) -> Array:
        """Half of the 80 % band of the step time, in the logarithm, [cases]."""
        widest = max(self.half_widths.values(), default=UNKNOWN_HALF_WIDTH)
        known = np.array([self.half_widths.get(regime, widest) for regime in REGIMES])
        return known[self.regimes(cases, machine)]

    def _anchors_of(self, machine: Machine) -> tuple[Anchor, ...]:
        return tuple(anchor for anchor in self.anchors if set(anchor.families) <= set(machine.families))

    def sigma(self, cases: Cases, machine: Machine) -> Array:
        """Standard deviation of the logarithm of the step time, [cases]."""
        return self.half_width(cases, machine) / SIGMA_OF_BAND


def features(cases: Cases, machine: Machine) -> Array:
    """Where a case lies among others, [cases, FEATURES], in doublings."""
    hosts = np.maximum(cases.num_devices / machine.devices_per_node, 1.0)
    tokens = cases.microbatch * cases.seq_len / cases.cp
    return np.stack([
        np.log2(cases.tp), np.log2(tokens), np.log2(cases.hidden), np.log2(cases.seq_len), np.sqrt(np.log2(hosts)),
        cases.recompute.astype(float), np.array([dtype == "fp8" for dtype in cases.dtype], float),
    ], axis=1)  # fmt: skip


def _points(anchors: Sequence[Anchor]) -> Array:
    return np.array([anchor.at for anchor in anchors])


def _similarity(one: Array, other: Array) -> Array:
    """Covariance of what structure leaves over at two sets of points: squared exponential."""
    a, b = one / LENGTHS, other / LENGTHS
    squared = (a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T
    return PRIOR_DEVIATION**2 * np.exp(-0.5 * np.maximum(squared, 0.0))


@lru_cache(maxsize=8)
def _weights(anchors: tuple[Anchor, ...]) -> Array:
    """Of each anchor in the mean of the Gaussian process (Rasmussen and Williams 2006, eq. 2.25)."""
    return np.linalg.solve(_covariance(_points(anchors)), np.array([anchor.residual for anchor in anchors]))


def _covariance(points: Array) -> Array:
    return _similarity(points, points) + NOISE_DEVIATION**2 * np.eye(len(points))


@cache
def shipped() -> Calibration:
    """The calibration that comes with the package, fitted on published tables."""
    return load(SHIPPED)


def save(calibration: Calibration, path: Path) -> None:
    """Write the TOML; raises `RunDirectoryError` where the disk does not take it."""
    lines = ["# What the planner's time model learned from measured steps: turbopump/planner/fit.py wrote it.",
             f"schema = {SCHEMA}", "", "[fitted_on]"]  # fmt: skip
    lines += [f'"{table}" = "{digest}"' for table, digest in sorted(calibration.fitted_on.items())]
    lines += ["", "[half_widths]", *(f'"{k}" = {v:.4f}' for k, v in calibration.half_widths.items())]
    for name in NAMES:
        low, high = calibration.bands.get(name, (calibration.shared[name],) * 2)
        lines += ["", f"[shared.{name}]  # {PARAMETERS[name].unit}: {PARAMETERS[name].meaning}",
                  f"value = {_number(calibration.shared[name])}",
                  f"band = [{_number(low)}, {_number(high)}]"]  # fmt: skip
    for family, factors in calibration.families.items():
        lines += ["", f'[families."{family}"]', *(f"{name} = {_number(f)}" for name, f in factors.items())]
    groups: dict[tuple[str, ...], list[Anchor]] = {}
    for anchor in calibration.anchors:
        groups.setdefault(anchor.families, []).append(anchor)
    for names, anchors in groups.items():
        quoted = ", ".join(f'"{name}"' for name in names)
        lines += ["", "[[anchors]]", f"families = [{quoted}]", f"# {', '.join(FEATURES)}; residual", "points = ["]
        lines += ["  [" + ", ".join(f"{value:.4g}" for value in (*a.at, a.residual)) + "]," for a in anchors]
        lines += ["]"]
    write_atomic(path, "\n".join(lines) + "\n")


def _number(value: float) -> str:
    return f"{value:.6g}" if any(mark in f"{value:.6g}" for mark in ".e") else f"{value:.6g}.0"


def load(path: Path | Traversable) -> Calibration:
    """The calibration of a file; raises `CatalogError` that says what is wrong with it."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if table.get("schema") != SCHEMA:
            raise CatalogError(f"{path}: schema {table.get('schema')!r} given, {SCHEMA} is needed: calibrate again")
        return _of_table(table)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise CatalogError(f"cannot read the calibration {path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CatalogError(f"{path} is not a calibration ({error!r}): calibrate again") from error


def _of_table(table: Mapping[str, Any]) -> Calibration:
    rows = table["shared"]
    if missing := [name for name in NAMES if name not in rows]:
        raise KeyError(f"shared.{missing[0]} is missing")
    if unknown := [name for name in rows if name not in PARAMETERS]:
        raise KeyError(f"shared.{unknown[0]} is no parameter")
    numbers = [value for row in rows.values() for value in (row["value"], *row["band"])]
    numbers += [value for factors in table.get("families", {}).values() for value in factors.values()]
    if not all(isinstance(value, int | float) and 0 < value < math.inf for value in numbers):
        raise ValueError("every value must be a number above 0")
    return Calibration(
        shared={name: float(rows[name]["value"]) for name in NAMES},
        families={family: {name: float(factors[name]) for name in factors if name in PARAMETERS}
                  for family, factors in table.get("families", {}).items()},
        anchors=tuple(Anchor(tuple(group["families"]), tuple(map(float, point[:-1])), float(point[-1]))
                      for group in table.get("anchors", []) for point in group["points"]),
        half_widths={str(k): float(v) for k, v in table.get("half_widths", {}).items()},
        bands={name: (float(rows[name]["band"][0]), float(rows[name]["band"][1])) for name in NAMES},
        fitted_on=dict(table.get("fitted_on", {})),
    )  # fmt: skip
