"""`plan.toml`: how to train, what that was predicted to cost, and from what; `train --plan` follows it.

`settings` turns a plan into settings of its recipe. What `train` cannot do yet (it splits data over the processes of
one host) is an error that names the setting and the --fix under which to plan again: half a plan is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbopump.core.config import Config, from_toml, to_table, to_toml
from turbopump.core.errors import PlanError, UsageError
from turbopump.core.files import from_json_as, to_json, write_atomic
from turbopump.core.version import VERSION
from turbopump.planner.cases import ParallelDims
from turbopump.planner.choice import Settings
from turbopump.planner.recipe_cases import recipe_digest

SCHEMA = 1
PRECISIONS = {"fp32": "fp32", "bf16": "bf16"}
"""What `train` computes in, by the dtype of the products."""


@dataclass(frozen=True)
class Inputs:
    """What a plan was made of, each with its digest: another digest, another plan."""

    recipe: str
    recipe_digest: str
    machine: str
    machine_digest: str
    calibration: str = ""
    calibration_digest: str = ""


@dataclass(frozen=True)
class Sizes:
    """The model and its batch."""

    name: str
    params: int
    unit: str
    units_per_step: float
    global_batch: int
    num_steps: int = 0
    """0: not said."""
    seq_len: int = 0


@dataclass(frozen=True)
class Prediction:
    """Of one step: seconds with their 80 % band, units a second, share of the data sheet's peak (0: no peak known)."""

    step_s: float
    low_s: float
    high_s: float
    units_per_s: float
    mfu: float
    breakdown: Mapping[str, float] = field(default_factory=dict)
    """Seconds of the parts of a step, which sum to `step_s`."""


@dataclass(frozen=True)
class PlanFile:
    """A plan as it is written. `memory` has bytes by rank class and part; `cost` names its units."""

    schema: int
    written_by: str
    date: str
    inputs: Inputs
    model: Sizes
    dims: ParallelDims
    settings: Settings
    prediction: Prediction
    memory: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cost: Mapping[str, float] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)


def dumps(plan: PlanFile) -> str:
    """The plan as TOML."""
    return to_toml(to_table(plan))


def write(plan: PlanFile, path: Path | str) -> None:
    """Write plan.toml in one piece; raises `RunDirectoryError` where the disk does not take it."""
    write_atomic(Path(path), dumps(plan))


def read(path: Path | str) -> PlanFile:
    """The plan at `path`; raises `PlanError` for a missing or damaged file, or one of another schema."""
    path = Path(path)
    try:
        table = from_toml(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PlanError(f"no plan at {path}: write one with `turbopump plan RECIPE --output {path}`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read {path}: {error}") from error
    except UsageError as error:
        raise PlanError(f"{path}: {error}") from error
    if "schema" not in table or "prediction" not in table:
        raise PlanError(
            f"{path} is no plan (it has no schema and prediction): `turbopump plan RECIPE --output` writes one"
        )
    if table["schema"] != SCHEMA:
        raise PlanError(
            f"{path} has schema {table['schema']!r}, written by turbopump {table.get('written_by', 'unknown')}; this "
            f"is {VERSION}, which reads schema {SCHEMA}: plan again"
        )
    try:
        plan: PlanFile = from_json_as(to_json(table), PlanFile)
    except (ValueError, TypeError) as error:
        raise PlanError(f"{path} is not a valid plan ({error}): plan again") from error
    for name, value in {**to_table(plan.dims), **to_table(plan.settings)}.items():
        if isinstance(value, int) and value < 1:
            raise PlanError(f"{path}: {name}: {value} given; a whole number above 0 is needed")
    return plan


def settings(plan: PlanFile, config: Config, num_devices_here: int, where: Path | str = "plan.toml") -> dict[str, Any]:
    """The recipe's settings, by dotted path, that follow the plan on this host.

    Raises `PlanError` for a plan of another recipe, and naming all that `train` cannot do.
    """
    if plan.inputs.recipe_digest != recipe_digest(config):
        raise PlanError(
            f"{where} was made for another model, data, batch or optimizer ({plan.inputs.recipe}): plan this recipe, "
            f"with the same overrides: turbopump plan RECIPE --output {where}"
        )
    if problems := list(_beyond_train(plan, config, num_devices_here)):
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise PlanError(f"{where} cannot be followed by train:\n{lines}")
    chosen: dict[str, Any] = {
        "microbatch": plan.settings.microbatch, "precision.compute": PRECISIONS[plan.settings.dtype],
        "launch.num_processes": plan.dims.dp_replicate,
    }  # fmt: skip
    if hasattr(config.model, "recompute"):
        chosen["model.recompute"] = plan.settings.recompute
    return chosen


def _beyond_train(plan: PlanFile, config: Config, num_devices_here: int) -> Sequence[str]:
    """What `train` cannot do, a line each: setting, value, what to plan instead."""
    found = [
        f"dims.{name} ({getattr(plan.dims, name)}): train splits data only: plan with --fix {name}=1"
        for name in ("pp", "dp_shard", "cp", "tp", "ep")
        if getattr(plan.dims, name) > 1
    ]
    chosen = plan.settings
    if plan.dims.dp_replicate > num_devices_here:
        found.append(
            f"dims.dp_replicate ({plan.dims.dp_replicate}): train starts processes on this host only, which has "
            f"{num_devices_here} devices: plan with --count {num_devices_here} or less"
        )
    if chosen.dtype not in PRECISIONS:
        found.append(f"settings.dtype ({chosen.dtype}): train computes in {' or '.join(PRECISIONS)}: "
                     f"plan with --fix dtype=bf16")  # fmt: skip
    modes = ("none", "full") if hasattr(config.model, "recompute") else ("none",)
    if chosen.recompute not in modes:
        found.append(f"settings.recompute ({chosen.recompute}): {config.model.kind} knows {' and '.join(modes)}: "
                     f"plan with --fix recompute={','.join(modes)}")  # fmt: skip
    if chosen.synchronisation != "synchronous":
        found.append(f"settings.synchronisation ({chosen.synchronisation}): train exchanges whole gradients at every "
                     f"step: plan with --fix synchronisation=synchronous")  # fmt: skip
    if chosen.virtual_stages > 1:
        found.append(f"settings.virtual_stages ({chosen.virtual_stages}): train has no pipeline: plan with --fix pp=1")
    return found


def refuse_contradictions(chosen: Mapping[str, Any], config: Config, where: Path | str) -> None:
    """Raise `PlanError` where the final configuration says otherwise than the plan: an override was given too."""
    for path, value in chosen.items():
        owner: Any = config
        for part in path.split("."):
            owner = getattr(owner, part)
        if owner != value:
            raise PlanError(f"{path}: {owner!r} given, and {where} says {value!r}: leave the override or the plan out")
