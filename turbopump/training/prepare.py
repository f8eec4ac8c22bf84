"""A run directory before its first step: may this recipe go on in it, who is this attempt, what did it run on."""

from __future__ import annotations

import tomllib
import uuid
from typing import Any

import torch

from turbopump.core.config import Config, differences, dumps, from_toml, may_change_on_resume, parse, to_toml
from turbopump.core.errors import ConfigError, ResumeError
from turbopump.core.files import from_json, read_json_lines, to_json, write_atomic
from turbopump.core.rundir import RunDir
from turbopump.core.version import VERSION
from turbopump.hardware import detect


def prepare_run_directory(config: Config, rundir: RunDir) -> bool:
    """Make the directory, or check that `config` goes on with the run in it; True where it resumes.

    Raises `ResumeError` listing every difference that would make it another run.
    """
    rundir.create()
    if rundir.exists:
        refuse_other_run(read_config(rundir), config, rundir)
    return rundir.exists


def write_config(config: Config, rundir: RunDir) -> None:
    """The fully resolved configuration; only by who holds the run directory's lock."""
    write_atomic(rundir.config, dumps(config))


def read_config(rundir: RunDir) -> Config:
    """The configuration a run was made with; raises `ConfigError` where it cannot be read."""
    try:
        return parse(from_toml(rundir.config.read_text(encoding="utf-8")), where=str(rundir.config))
    except OSError as error:
        raise ConfigError([str(error)], str(rundir.config)) from error


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
    stored = read_env(rundir)
    attempts = sum(1 for record in read_json_lines(rundir.spans(0)) if record.get("type") == "attempt")
    return {"run_id": stored.get("run_id") or uuid.uuid4().hex, "attempt": attempts}


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
    write_atomic(rundir.choices, to_toml({"schema_version": 1, "turbopump_version": VERSION, **choices}))
