"""What real runs teach the planner of this machine: `turbopump plan --calibrate RUN...`.

The few numbers of `own_step.Structure` are refined from the spans of runs, each within its bounds: Gauss-Newton with
damping (Levenberg 1944, Marquardt 1963) on the logarithms of predicted over measured parts of a step, soft-L1, with a
log-normal prior around the numbers that ship. So a single run moves only what it tells of, and ten disturbed ones do
no harm. Bands are those of the posterior (its curvature at the optimum), not narrower than what the fit leaves.
Stored in the machine file, with the digest of what was read; without torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.core.config import Config, from_toml, parse
from turbopump.core.errors import ProfileError, UsageError
from turbopump.core.files import digest, from_json, read_json_lines
from turbopump.core.rundir import open_run
from turbopump.core.spans import StepBreakdown
from turbopump.hardware.profile import MachineProfile, RunCalibration
from turbopump.planner.own_run import run_of
from turbopump.planner.own_step import BOUNDS, PRIOR_BANDS, Run, StepModel, Structure

NAMES = tuple(BOUNDS)
WARMUP_STEPS = 3
LEAST_STEPS = 5
SIGMA = 0.05  # of a measured part, relative: two runs of the same recipe differ by about this
SIGMA_SMALL_S = 2e-4  # and what is shorter than this tells nothing
PART_OF = {"data": "data", "compute": "compute", "optimizer": "optimizer", "exposed_communication": "communication"}
BAND = 1.2816  # half-width of 80 % of a normal distribution, in standard deviations
ROUNDS = 25
STEP = 1e-3


@dataclass(frozen=True)
class Observed:
    """A run: what it computes and how long its typical step took."""

    name: str
    run: Run
    step: StepBreakdown
    threads: int
    num_steps: int
    digest: str = ""


def read_run(path: Path | str, profile: MachineProfile | None = None) -> Observed:
    """What a run directory tells, its warm-up and undone steps left out.

    Raises `UsageError` where there is no run or it made too few steps, `ProfileError` where it was made on another
    machine than `profile` describes, `DatasetError` where its data is no longer there.
    """
    run = open_run(path)
    records = read_json_lines(run.spans(0))
    steps = _steps(records)
    if len(steps) < LEAST_STEPS:
        raise UsageError(f"{path} has {len(steps)} steps after its warm-up: a calibration needs {LEAST_STEPS} or more")
    config = parse(from_toml(run.config.read_text(encoding="utf-8")), where=str(run.config))
    env = _json(run.env)
    if profile is not None and env.get("cpu") not in (None, _processor(profile)):
        raise ProfileError(f"{path} was made on {env['cpu']}, and the machine file is of {_processor(profile)}: "
                           "calibrate with runs of the same machine")  # fmt: skip
    parts = {name: float(np.median([getattr(s, name) for s in steps])) for name in asdict(steps[0])}
    processes = int(env.get("world_size") or 1)
    what = digest(b"".join(file.read_bytes() for file in (run.config, run.spans(0))))
    return Observed(config.name, run_of(config, _dtype(config, run.choices), processes), StepBreakdown(**parts),
                    int(env.get("threads") or 1), len(steps), what)  # fmt: skip


def _steps(records: Iterable[dict[str, Any]]) -> list[StepBreakdown]:
    """The steps that count, once each: the last record of a step, without the first ones of every attempt."""
    found: dict[int, StepBreakdown | None] = {}
    since = 0
    for record in records:
        if record.get("type") == "attempt":
            since = 0
        elif record.get("type") == "step":
            since += 1
            warm = since > WARMUP_STEPS
            found[record["step"]] = StepBreakdown.from_spans(record["s"], record["spans"]) if warm else None
    return [step for step in found.values() if step is not None]


def _json(path: Path) -> dict[str, Any]:
    try:
        value = from_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _processor(profile: MachineProfile) -> str:
    return str(profile.machine.get("cpu") or profile.name)


def _dtype(config: Config, choices: Path) -> str:
    """The arithmetic of the run, where `auto` as it was chosen."""
    if config.precision.compute != "auto":
        return config.precision.compute
    try:
        return str(from_toml(choices.read_text(encoding="utf-8"))["precision"]["compute"])
    except (OSError, KeyError, TypeError, UsageError) as error:
        raise UsageError(f"{choices} does not say which precision the run chose: calibrate with another run") from error


# ---- fitting


def fit(observed: Sequence[Observed], profile: MachineProfile, *, device: str = "cpu") -> Structure:
    """The numbers that explain the runs best, with their bands. Raises `UsageError` without runs."""
    if not observed:
        raise UsageError("a calibration needs at least one run: give run directories that train wrote here")
    shipped = Structure()
    models = {n: StepModel(profile, threads=n, device=device) for n in {o.threads for o in observed}}
    start = np.array([math.log(getattr(shipped, name)) for name in NAMES])
    low, high = (np.array([math.log(BOUNDS[name][side]) for name in NAMES]) for side in (0, 1))
    prior = np.array([PRIOR_BANDS[name] / BAND for name in NAMES])

    def residuals(at: np.ndarray) -> np.ndarray:
        structure = structure_at(at)
        return np.array([r for o in observed for r in _residuals(o, models[o.threads], structure)])

    best, damping = start.copy(), 1e-2
    value = _loss(residuals(best), best, start, prior)
    for _ in range(ROUNDS):
        left = residuals(best)
        jacobian = _jacobian(residuals, best, left)
        weight = 1.0 / np.sqrt(1.0 + left**2)  # soft-L1: large residuals count as their absolute value
        hessian = jacobian.T @ (weight[:, None] * jacobian) + np.diag(1.0 / prior**2)
        slope = jacobian.T @ (weight * left) + (best - start) / prior**2
        move = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), -slope)
        tried = np.clip(best + move, low, high)
        new = _loss(residuals(tried), tried, start, prior)
        if new < value:
            done = value - new < 1e-6 * max(value, 1e-9)
            best, value, damping = tried, new, damping / 3
            if done:
                break
        else:
            damping *= 4
            if damping > 1e6:
                break
    return replace(structure_at(best), bands=_bands(residuals, best, prior))


def structure_at(logs: np.ndarray) -> Structure:
    values: dict[str, Any] = {name: math.exp(value) for name, value in zip(NAMES, logs)}
    return Structure(**values)


def _residuals(observed: Observed, model: StepModel, structure: Structure) -> list[float]:
    """Logarithms of predicted over measured, in standard deviations, of the parts that last long enough to tell."""
    model.structure = structure
    predicted = model.predict(observed.run).step
    total = observed.step.total
    found = []
    for part in PART_OF:
        measured_s, predicted_s = getattr(observed.step, part), getattr(predicted, part)
        if min(measured_s, predicted_s) <= 0:
            continue
        sigma = SIGMA * max(1.0, 0.1 * total / measured_s) + SIGMA_SMALL_S / measured_s
        found.append(math.log(predicted_s / measured_s) / sigma)
    return found


def _loss(residuals: np.ndarray, at: np.ndarray, start: np.ndarray, prior: np.ndarray) -> float:
    return float(np.sum(np.sqrt(1.0 + residuals**2) - 1.0) + 0.5 * np.sum(((at - start) / prior) ** 2))


def _jacobian(residuals: Any, at: np.ndarray, here: np.ndarray) -> np.ndarray:
    columns = []
    for index in range(len(at)):
        moved = at.copy()
        moved[index] += STEP
        columns.append((residuals(moved) - here) / STEP)
    return np.stack(columns, 1)


def _bands(residuals: Any, at: np.ndarray, prior: np.ndarray) -> dict[str, float]:
    left = residuals(at)
    jacobian = _jacobian(residuals, at, left)
    spread = max(1.0, float(np.median(np.abs(left))) / 0.6745) if len(left) else 1.0
    covariance = np.linalg.inv(jacobian.T @ jacobian / spread**2 + np.diag(1.0 / prior**2))
    widths = {name: BAND * float(math.sqrt(covariance[i, i])) for i, name in enumerate(NAMES)}
    # what the fit leaves of each part: a prediction of another run will miss by as much
    widths["compute"] = max(widths["compute"], BAND * SIGMA * spread)
    return {name: min(width, PRIOR_BANDS[name]) for name, width in widths.items()}


def errors(observed: Sequence[Observed], profile: MachineProfile, structure: Structure) -> list[float]:
    """Of each run's step, relative and signed."""
    found = []
    for one in observed:
        model = StepModel(profile, threads=one.threads, structure=structure)
        found.append(model.predict(one.run).total_s / one.step.total - 1.0)
    return found


def calibrate(profile: MachineProfile, runs: Sequence[Path | str]) -> MachineProfile:
    """The profile with what `runs` have taught; raises as `read_run` and `fit`.

    `error` is that of each run by the numbers the others taught, where there are several.
    """
    if profile.provenance != "measured":
        raise ProfileError(f"{profile.name} is a {profile.provenance} profile: only a measured one can be calibrated")
    observed = [read_run(path, profile) for path in runs]
    structure = fit(observed, profile)
    before = np.abs(errors(observed, profile, Structure()))
    if len(observed) > 1:
        after = [abs(errors([one], profile, fit([o for o in observed if o is not one], profile))[0])
                 for one in observed]  # fmt: skip
    else:
        after = [abs(error) for error in errors(observed, profile, structure)]
    values = {name: getattr(structure, name) for name in NAMES}
    calibration = RunCalibration(
        values=values, bands=dict(structure.bands), digest=digest("".join(o.digest for o in observed).encode()),
        runs=tuple(o.name for o in observed), num_steps=sum(o.num_steps for o in observed),
        date=time.strftime("%Y-%m-%dT%H:%M:%S%z"), error_before=float(before.mean()), error=float(np.mean(after)),
    )  # fmt: skip
    return replace(profile, calibration=calibration)


def describe(calibration: RunCalibration) -> str:
    """In a few lines, for the terminal."""
    lines = [f"{len(calibration.runs)} runs, {calibration.num_steps} steps: mean error of a step "
             f"{calibration.error_before:.1%} before, {calibration.error:.1%} after"]  # fmt: skip
    for name, value in calibration.values.items():
        band = math.exp(calibration.bands[name])
        lines.append(f"  {name:<14}{value:7.3f}  ({value / band:.3f} to {value * band:.3f}; "
                     f"{getattr(Structure(), name):g} ships)")  # fmt: skip
    return "\n".join(lines)
