"""A run directory before its first step: who may go on in it."""

import dataclasses
import tomllib

import pytest

from turbopump.core.checkpoint_store import list_checkpoints
from turbopump.core.config import load
from turbopump.core.errors import ResumeError, RunDirectoryError
from turbopump.core.rundir import RunDir
from turbopump.training import prepare


@pytest.fixture
def run(place) -> RunDir:
    return RunDir(place / "runs" / "lm")


def test_a_new_directory_is_made_and_does_not_resume(place) -> None:
    rundir = RunDir(place / "runs" / "new")
    assert prepare.prepare_run_directory(load("lm.toml"), rundir) is False
    assert rundir.path.is_dir() and not prepare.has_steps(rundir)
    prepare.write_config(load("lm.toml"), rundir)
    assert prepare.read_config(rundir) == load("lm.toml")


@pytest.mark.parametrize(
    "setting", ["num_steps=9", "evaluation.every=3", "checkpoint.keep_last=1", "logging.every=1", "launch.threads=2",
                "loader.num_workers=1", "loader.prefetch_steps=3", "data.path=datasets/text/"],
)  # fmt: skip
def test_what_a_resumed_run_may_change(place, run: RunDir, setting: str) -> None:
    assert prepare.prepare_run_directory(load("lm.toml", [setting]), run) is True


@pytest.mark.parametrize("setting", ["seed=1", "optimizer.lr=1.0", "model.num_layers=2", "data.seq_len=8",
                                     "loader.order=sequential", "precision.compute=bf16", "microbatch=4"])  # fmt: skip
def test_what_would_make_it_another_run_is_shown(place, run: RunDir, setting: str) -> None:
    key, _, value = setting.partition("=")
    with pytest.raises(ResumeError) as caught:
        prepare.prepare_run_directory(load("lm.toml", [setting]), run)
    assert f"  {key}: " in str(caught.value) and f"{value.strip()}" in str(caught.value)
    assert str(caught.value).endswith(f"--from {run.path} name=...") and caught.value.exit_code == 2


def test_a_run_without_a_step_may_become_another(place, run: RunDir) -> None:
    other = load("lm.toml", ["model.num_layers=2"])
    run.metrics.write_text('{"type":"evaluation","step":0,"loss":5.0}\n')
    with pytest.raises(ResumeError):  # its checkpoints would be contradicted
        prepare.prepare_run_directory(other, run)
    for info in list_checkpoints(run.checkpoints):
        info.path.rename(info.path.with_suffix(".rejected"))
    assert prepare.prepare_run_directory(other, run) is True
    run.metrics.write_text('{"type":"step","step":1,"loss":5.0}\n')
    with pytest.raises(ResumeError):
        prepare.prepare_run_directory(other, run)


def test_the_identity_survives(place, run: RunDir) -> None:
    first = prepare.attempt_identity(run)
    assert first["attempt"] == 1 and first["run_id"] == list_checkpoints(run.checkpoints)[0].run_id
    run.env.unlink()
    assert prepare.attempt_identity(run) == first
    fresh = prepare.attempt_identity(RunDir(place / "runs" / "none"))
    assert fresh["attempt"] == 0 and fresh["run_id"] != first["run_id"]


@pytest.mark.parametrize("content", [b"x = = 3", b"\xff\xfe", None])
def test_a_damaged_config_is_an_error_with_a_way_on(run: RunDir, content: bytes | None) -> None:
    run.config.unlink() if content is None else run.config.write_bytes(content)
    with pytest.raises(RunDirectoryError, match=r"config\.toml is damaged .*--from"):
        prepare.read_config(run)


def test_choices_and_environment(run: RunDir) -> None:
    assert prepare.read_choices(run) == {}
    prepare.write_choices(run, {"precision": {"compute": "bf16"}})
    assert prepare.read_choices(run)["precision"] == {"compute": "bf16"}
    assert tomllib.loads(run.choices.read_text())["schema_version"] == 1
    run.choices.write_text("no = = toml")
    assert prepare.read_choices(run) == {}
    assert prepare.read_env(run)["schema_version"] == 1
    run.env.write_text("[1]")
    assert prepare.read_env(run) == {}


def test_configs_differ_by_value_not_by_identity(place, run: RunDir) -> None:
    config = load("lm.toml")
    prepare.refuse_other_run(config, dataclasses.replace(config), run)
