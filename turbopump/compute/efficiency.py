"""A device's speed in a few numbers: what is left of its peak at a given size.

    seconds = launch + steps * step + (flops / (peak * efficiency) * (1 + half_m / m) (1 + half_n / n) (1 + half_k / k)
              + bytes / (bandwidth * memory_share)) * times

`half_m` is the m at which half the efficiency is lost (Hockney's n_1/2, 1983, of each dim of the product that the
operation amounts to); `times` are factors of layouts, directions and the like. The same formula is the trend beneath
the interpolation of measured rows (peak = the best rate measured), and, with a data sheet's peak, the prediction for a
machine that nobody measured, from the numbers of a relative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from turbopump.compute.features import Case

Array = npt.NDArray[np.float64]
SCATTER = 0.2  # of log seconds about the formula, against which the prior is weighed
ROUNDS = 60
DIMS = ("m", "n", "k")
_UNSEEN = 1e12  # of a dim that an operation does not have: no efficiency is lost to it


class _Terms:
    """What the formula needs of each case."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self.flops = np.array([case.flops for case in cases])
        self.bytes = np.array([case.bytes for case in cases])
        self.steps = np.array([case.steps for case in cases])
        products = [case.product for case in cases]
        self.dims = {dim: np.array([max(p.get(dim, _UNSEEN), 1e-3) for p in products]) for dim in DIMS}
        words = [case.words for case in cases]
        self.words = {f"times {name}={value}": np.array([row.get(name) == value for row in words], dtype=float)
                      for name, value in sorted({item for row in words for item in row.items()})}  # fmt: skip


def _parts(parameters: Mapping[str, float], terms: _Terms, peak: float, bandwidth: float) -> dict[str, Array]:
    """Seconds of each summand, by case."""
    lost = np.ones(len(terms.flops))
    for dim, values in terms.dims.items():
        lost = lost * (1.0 + parameters.get(f"half_{dim}", 0.0) / values)
    times = np.ones(len(terms.flops))
    for name, present in terms.words.items():
        times = times * np.where(present > 0, parameters.get(name, 1.0), 1.0)
    computing = np.zeros(len(terms.flops))
    if terms.flops.any():
        computing = terms.flops / (peak * parameters.get("efficiency", 1.0))
    return {
        "launch": np.full(len(terms.flops), parameters.get("launch_s", 0.0)),
        "steps": terms.steps * parameters.get("step_s", 0.0),
        "flops": computing * lost * times,
        "bytes": terms.bytes / (bandwidth * parameters.get("memory_share", 1.0)) * times,
    }


def seconds(parameters: Mapping[str, float], cases: Sequence[Case], peak: float, bandwidth: float) -> Array:
    """Of each case, on a device of `peak` FLOP/s and `bandwidth` bytes/s. What is not among the parameters costs 0."""
    total: Array = sum(_parts(parameters, _Terms(cases), peak, bandwidth).values())  # type: ignore[assignment]
    return total


def fit(cases: Sequence[Case], times_s: Array, peak: float, bandwidth: float) -> dict[str, float]:
    """The parameters that explain measured times best, all of one kind and dtype.

    Least squares of the logarithms, made robust (weights 1 / sqrt(1 + (r / scatter)^2)) since some sizes meet another
    kernel, about a broad prior since a handful of rows does not tell all numbers apart; Levenberg's damping.
    """
    terms, log_s = _Terms(cases), np.log(times_s)
    names, prior, spread = _prior(terms, times_s)
    values, damping = prior.copy(), 1e-2
    jacobian, off = _linear(names, values, terms, log_s, peak, bandwidth)
    best = _total(off, values, prior, spread)
    for _ in range(ROUNDS):
        weights = 1.0 / np.sqrt(1.0 + (off / SCATTER) ** 2) / SCATTER**2
        curvature = jacobian.T @ (weights[:, None] * jacobian) + np.diag(spread**-2.0)
        slope = jacobian.T @ (weights * off) + (values - prior) / spread**2
        step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), slope)
        trial = values - np.clip(step, -1.0, 1.0)
        new_jacobian, new_off = _linear(names, trial, terms, log_s, peak, bandwidth)
        total = _total(new_off, trial, prior, spread)
        if total < best:
            gained, best = best - total, total
            values, jacobian, off, damping = trial, new_jacobian, new_off, damping / 3
            if gained < 1e-6 * max(best, 1.0):
                break
        else:
            damping *= 4
            if damping > 1e8:
                break
    return {name: float(np.exp(value)) for name, value in zip(names, values)}


def _total(off: Array, values: Array, prior: Array, spread: Array) -> float:
    robust = 2.0 * (np.sqrt(1.0 + (off / SCATTER) ** 2) - 1.0)
    return float(robust.sum() + (((values - prior) / spread) ** 2).sum())


def _prior(terms: _Terms, times_s: Array) -> tuple[list[str], Array, Array]:
    """Names of the parameters, logarithms of what is expected of them, and how wide the expectation is."""
    rows = [("launch_s", float(times_s.min()) / 2, 1.0)]
    if terms.steps.any():
        stepping = terms.steps > 0
        rows.append(("step_s", float((times_s[stepping] / terms.steps[stepping]).min()) / 2, 1.0))
    if terms.flops.any():
        rows.append(("efficiency", 0.8, 0.5))
        rows += [(f"half_{dim}", 16.0, 1.5) for dim, values in terms.dims.items() if values.min() < _UNSEEN]
    if terms.bytes.any():
        rows.append(("memory_share", 0.7, 0.7))
    rows += [(name, 1.0, 0.7) for name, present in terms.words.items() if 0 < present.sum() < len(times_s)]
    return [name for name, _, _ in rows], np.log([value for _, value, _ in rows]), np.array([s for _, _, s in rows])


def _linear(
    names: Sequence[str], values: Array, terms: _Terms, log_s: Array, peak: float, bandwidth: float
) -> tuple[Array, Array]:
    """Derivatives of the logarithm of the seconds by the logarithm of each parameter, and how far it is off."""
    parameters = {name: float(np.exp(value)) for name, value in zip(names, values)}
    parts = _parts(parameters, terms, peak, bandwidth)
    total = sum(parts.values())
    share = {name: part / total for name, part in parts.items()}
    columns = []
    for name in names:
        if name in ("launch_s", "step_s"):
            columns.append(share["launch" if name == "launch_s" else "steps"])
        elif name == "efficiency":
            columns.append(-share["flops"])
        elif name == "memory_share":
            columns.append(-share["bytes"])
        elif name.startswith("half_"):
            loss = parameters[name] / terms.dims[name.removeprefix("half_")]
            columns.append(share["flops"] * loss / (1.0 + loss))
        else:
            columns.append((share["flops"] + share["bytes"]) * terms.words[name])
    return np.stack(columns, axis=1), np.log(total) - log_s
