"""A device's speed in a few numbers: what is left of its peak at a given size.

    seconds = launch + steps * step + flops / (peak * efficiency) * (1 + half_m / m) (1 + half_n / n) (1 + half_k / k)
              + the sum over operands of bytes / (bandwidth * memory_share)

`half_m` is the m at which half the efficiency is lost (Hockney's n_1/2, 1983, of each dim of the product that the
operation amounts to); FLOPs are those computed, padding included. `times` are factors of layouts, directions and the
like: one for all work or, of convolutions whose library is known (it reorders operands), one a summand. The same
formula is the trend beneath the interpolation of measured rows (peak = the best rate measured), and, with a data
sheet's peak, the prediction for a machine that nobody measured, from the numbers of a relative.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from turbopump.compute.features import Case

Array = npt.NDArray[np.float64]
SCATTER = 0.2  # of log seconds about the formula, against which the prior is weighed
ROUNDS = 60
DIMS = ("m", "n", "k")
_UNSEEN = 1e12  # of a dim that an operation does not have: no efficiency is lost to it
WORD_SPREAD, SHARED_SPREAD = 0.5, 0.7  # of the logarithms of factors: of one summand, of all work
_FIXED = ("launch", "steps")  # summands that no amount of work changes


class _Terms:
    """What the formula needs of each case."""

    def __init__(self, cases: Sequence[Case]) -> None:
        operands = [case.operands if case.library else {"bytes": case.bytes} for case in cases]
        amounts = {
            "launch": np.ones(len(cases)),
            "steps": np.array([case.steps for case in cases]),
            "flops": np.array([case.computed_flops for case in cases]),
            **{name: np.array([given.get(name, 0.0) for given in operands])
               for name in sorted({name for given in operands for name in given})},
        }  # fmt: skip
        self.amounts = {name: amount for name, amount in amounts.items() if amount.any()}
        products = [case.product for case in cases]
        self.dims = {dim: np.array([max(p.get(dim, _UNSEEN), 1e-3) for p in products]) for dim in DIMS}
        words = [case.words for case in cases]
        self.words = {f"times {name}={value}": np.array([row.get(name) == value for row in words], dtype=float)
                      for name, value in sorted({item for row in words for item in row.items()})}  # fmt: skip


def _each_s(parameters: Mapping[str, float], summand: str, peak: float, bandwidth: float) -> float:
    """Seconds of one launch, step, FLOP or byte. Operands share a `memory_share` where they have none of their own."""
    if summand in _FIXED:
        return parameters.get({"launch": "launch_s", "steps": "step_s"}[summand], 0.0)
    if summand == "flops":
        return 1.0 / (peak * parameters.get("efficiency", 1.0))
    share = parameters.get(f"memory_share of {summand}", parameters.get("memory_share", 1.0))
    return 1.0 / (bandwidth * share)


def _of(word: str, summand: str) -> str:
    """The name of a word's factor."""
    return word if summand == "flops" else f"{word} of {summand}"


def _times(parameters: Mapping[str, float], word: str, summand: str) -> float:
    """A word's factor; operands without one of their own have that of the FLOPs."""
    return parameters.get(_of(word, summand), 1.0 if summand in _FIXED else parameters.get(word, 1.0))


def _parts(parameters: Mapping[str, float], terms: _Terms, peak: float, bandwidth: float) -> dict[str, Array]:
    """Seconds of each summand, by case."""
    parts = {}
    for summand, amount in terms.amounts.items():
        part = amount * _each_s(parameters, summand, peak, bandwidth)
        for word, present in terms.words.items():
            part = part * np.where(present > 0, _times(parameters, word, summand), 1.0)
        parts[summand] = part
    for dim, values in terms.dims.items():
        if "flops" in parts:
            parts["flops"] = parts["flops"] * (1.0 + parameters.get(f"half_{dim}", 0.0) / values)
    return parts


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
    unknown = _unknown(terms, times_s)
    prior, spread = np.log([u.expected for u in unknown]), np.array([u.spread for u in unknown])
    values, damping = prior.copy(), 1e-2
    jacobian, off = _linear(unknown, values, terms, log_s, peak, bandwidth)
    best = _total(off, values, prior, spread)
    for _ in range(ROUNDS):
        weights = 1.0 / np.sqrt(1.0 + (off / SCATTER) ** 2) / SCATTER**2
        curvature = jacobian.T @ (weights[:, None] * jacobian) + np.diag(spread**-2.0)
        slope = jacobian.T @ (weights * off) + (values - prior) / spread**2
        step = np.linalg.solve(curvature + damping * np.diag(np.diag(curvature)), slope)
        trial = values - np.clip(step, -1.0, 1.0)
        new_jacobian, new_off = _linear(unknown, trial, terms, log_s, peak, bandwidth)
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
    return {u.name: float(np.exp(value)) for u, value in zip(unknown, values)}


def _total(off: Array, values: Array, prior: Array, spread: Array) -> float:
    robust = 2.0 * (np.sqrt(1.0 + (off / SCATTER) ** 2) - 1.0)
    return float(robust.sum() + (((values - prior) / spread) ** 2).sum())


class _Unknown(NamedTuple):
    """A parameter: what is expected of it, how wide the expectation of its logarithm is, and what it changes."""

    name: str
    expected: float
    spread: float
    summands: tuple[str, ...]
    sign: float = 1.0
    """-1 where more of it means less time."""
    word: str = ""
    dim: str = ""


def _unknown(terms: _Terms, times_s: Array) -> list[_Unknown]:
    found = [_Unknown("launch_s", float(times_s.min()) / 2, 1.0, ("launch",))]
    operands = [name for name in terms.amounts if name not in (*_FIXED, "flops")]
    if "steps" in terms.amounts:
        steps = terms.amounts["steps"]
        found.append(_Unknown("step_s", float((times_s[steps > 0] / steps[steps > 0]).min()) / 2, 1.0, ("steps",)))
    if "flops" in terms.amounts:
        found.append(_Unknown("efficiency", 0.8, 0.5, ("flops",), -1.0))
        found += [_Unknown(f"half_{dim}", 16.0, 1.5, ("flops",), dim=dim)
                  for dim, values in terms.dims.items() if values.min() < _UNSEEN]  # fmt: skip
    for name in operands:
        share = "memory_share" if len(operands) == 1 else f"memory_share of {name}"
        found.append(_Unknown(share, 0.7, 0.7, (name,), -1.0))
    telling = [word for word, present in terms.words.items() if 0 < present.sum() < len(times_s)]
    if len(operands) > 1:
        return found + [_Unknown(_of(word, name), 1.0, WORD_SPREAD, (name,), word=word)
                        for word in telling for name in terms.amounts]  # fmt: skip
    working = tuple(name for name in terms.amounts if name not in _FIXED)
    return found + [_Unknown(word, 1.0, SHARED_SPREAD, working, word=word) for word in telling]


def _linear(
    unknown: Sequence[_Unknown], values: Array, terms: _Terms, log_s: Array, peak: float, bandwidth: float
) -> tuple[Array, Array]:
    """Derivatives of the logarithm of the seconds by the logarithm of each parameter, and how far it is off."""
    parameters = {u.name: float(np.exp(value)) for u, value in zip(unknown, values)}
    parts = _parts(parameters, terms, peak, bandwidth)
    total = sum(parts.values())
    columns = []
    for u in unknown:
        column = u.sign * sum(parts[name] for name in u.summands) / total
        if u.word:
            column = column * terms.words[u.word]
        if u.dim:
            loss = parameters[u.name] / terms.dims[u.dim]
            column = column * loss / (1.0 + loss)
        columns.append(column)
    return np.stack(columns, axis=1), np.log(total) - log_s
