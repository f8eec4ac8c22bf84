"""A run directory before its first step: may this recipe go on in it, who is this attempt, what did it run on."""

from __future__ import annotations

import tomllib
import uuid
from typing import Any

import torch

from turbopump.core.checkpoint_store import checkpoint_paths, list_checkpoints
from turbopump.core.config import Config, differences, dumps, from_toml, may_change_on_resume, parse, to_toml
from turbopump.core.errors import ResumeError, RunDirectoryError, UsageError
from turbopump.core.files import from_json, read_json_lines, to_json, write_atomic
from turbopump.core.rundir import RunDir
from turbopump.core.version import VERSION
from turbopump.hardware import detect


def prepare_run_directory(config: Config, rundir: RunDir) -> bool:
    """Make the directory, or check that `config` goes on with the run in it; True where it resumes.

    A run that came to an end before its first step was kept may go on with other settings: there is nothing yet that
    they could contradict. Raises `ResumeError` listing every difference that would make it another run.
    """
    rundir.create()
    if rundir.exists and has_steps(rundir):
        refuse_other_run(read_config(rundir), config, rundir)
    return rundir.exists


def has_steps(rundir: RunDir) -> bool:
    """Whether the run has anything to go on from, or to contradict."""
    written = any(record.get("type") == "step" for record in read_json_lines(rundir.metrics))
    return written or bool(checkpoint_paths(rundir.checkpoints))


def write_config(config: Config, rundir: RunDir) -> None:
    """The fully resolved configuration; only by who holds the run directory's lock."""
    write_atomic(rundir.config, dumps(config))


def read_config(rundir: RunDir) -> Config:
    """The configuration a run was made with.

    Raises `RunDirectoryError` where config.toml is damaged, `ConfigError` where it is of another version.
    """
    try:
        table = from_toml(rundir.config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, UsageError) as error:
        raise RunDirectoryError(
            f"{rundir.config} is damaged ({error}): bring back a copy, or start a new run from the weights: "
            f"train RECIPE --from {rundir.path} name=..."
        ) from error
    return parse(table, where=str(rundir.config))


def refuse_other_run(stored: Config, given: Config, rundir: RunDir) -> None:
    changed = [d for d in differences(stored, given) if not may_change_on_resume(d[0])]
    if changed:
        lines = "\n".join(f"  {path}: {old!r} in the run, {new!r} given" for path, old, new in changed)
        raise ResumeError(
            f"{rundir.path} holds a run of another configuration:\n{lines}\n"
            f"go on with its own settings, choose another name (name=...), or start a new run from its weights: "
            f"--from {rundir.path} name=..."
        )


def attempt_identity(rundir: RunDir) -> dict[str, Any]:
    """The run's id (kept over all attempts) and the number of this attempt, from 0."""
    run_id = read_env(rundir).get("run_id") or _run_id_of_checkpoints(rundir)
    attempts = sum(1 for record in read_json_lines(rundir.spans(0)) if record.get("type") == "attempt")
    return {"run_id": run_id or uuid.uuid4().hex, "attempt": attempts}


def _run_id_of_checkpoints(rundir: RunDir) -> str | None:
    """Whose the checkpoints are, where env.json was lost: without it none of them would count as this run's."""
    return next((info.run_id for info in reversed(list_checkpoints(rundir.checkpoints)) if info.run_id), None)


def read_env(rundir: RunDir) -> dict[str, Any]:
    try:
        value = from_json(rundir.env.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def write_env(rundir: RunDir, more: dict[str, Any]) -> None:
    """What this attempt runs on and with; the run's id and first start survive from earlier attempts."""
    record = {
        "schema_version": 1,
        "turbopump_version": VERSION,
        "torch": str(torch.__version__),
        **detect.describe(),
        "threads": torch.get_num_threads(),
        **more,
    }
    write_atomic(rundir.env, to_json(record, indent=True))


def read_choices(rundir: RunDir) -> dict[str, Any]:
    try:
        return tomllib.loads(rundir.choices.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError):
        return {}


def write_choices(rundir: RunDir, choices: dict[str, Any]) -> None:
    """Add choices to those that are kept there."""
    header = {"schema_version": 1, "turbopump_version": VERSION}
    write_atomic(rundir.choices, to_toml({**read_choices(rundir), **header, **choices}))
