import tomllib
from dataclasses import replace
from pathlib import Path

import pytest

from turbopump.core.config import load, to_toml
from turbopump.core.errors import PlanError
from turbopump.planner.cases import ParallelDims
from turbopump.planner.choice import Settings
from turbopump.planner.plan_file import (
    SCHEMA,
    Inputs,
    PlanFile,
    Prediction,
    Sizes,
    dumps,
    read,
    refuse_contradictions,
    settings,
    write,
)
from turbopump.planner.recipe_cases import recipe_digest

RECIPE = Path(__file__).parents[2] / "recipes" / "lm-stdlib.toml"
CONFIG = load(RECIPE)
PLAN = PlanFile(
    SCHEMA, "0.1.0", "2026-01-01T00:00:00+00:00",
    Inputs("lm-stdlib.toml", recipe_digest(CONFIG), "machine.json", "0123456789abcdef"),
    Sizes("lm-stdlib", 5_300_000, "token", 4096.0, 16, 600, 256), ParallelDims(dp_replicate=2),
    Settings(2, 1, "bf16", 4, 2, "full"),
    Prediction(0.5, 0.4, 0.6, 8192.0, 0.4, {"data": 0.0, "compute": 0.4, "optimizer": 0.1}),
    {"every": {"weights": 1.0, "activations": 2.0}}, {"usd": 1.5}, {"candidates": 16},
)  # fmt: skip


def test_it_survives_its_file(tmp_path):
    write(PLAN, tmp_path / "plan.toml")
    assert read(tmp_path / "plan.toml") == PLAN
    table = tomllib.loads((tmp_path / "plan.toml").read_text())
    assert table["schema"] == SCHEMA and table["inputs"]["recipe_digest"] == recipe_digest(CONFIG)
    assert sum(table["prediction"]["breakdown"].values()) == table["prediction"]["step_s"]


def written(tmp_path: Path, **changes: object) -> Path:
    table = tomllib.loads(dumps(PLAN))
    for path, value in changes.items():
        *parents, last = path.split("__")
        where = table
        for name in parents:
            where = where[name]
        where[last] = value
    (tmp_path / "plan.toml").write_text(to_toml(table))
    return tmp_path / "plan.toml"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"schema": 9}, "has schema 9, written by turbopump 0.1.0"),
        ({"dims__tp": "four"}, "is not a valid plan"),
        ({"dims__tp": 0}, "tp: 0 given; a whole number above 0"),
        ({"settings__microbatch": -1}, "microbatch: -1 given"),
        ({"settings__recompute": "some"}, "is not a valid plan"),
        ({"settings": {}}, "is not a valid plan"),
        ({"memory__every__weights": "much"}, "is not a valid plan"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, changes, expected):
    with pytest.raises(PlanError) as caught:
        read(written(tmp_path, **changes))
    assert expected in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    with pytest.raises(PlanError, match=r"no plan at .*`turbopump plan RECIPE --output"):
        read(tmp_path / "absent.toml")
    with pytest.raises(PlanError, match="is no plan"):
        read(RECIPE)
    (tmp_path / "cut.toml").write_text(dumps(PLAN)[:40] + "[")
    with pytest.raises(PlanError, match="not valid TOML"):
        read(tmp_path / "cut.toml")
    with pytest.raises(PlanError, match="cannot read"):
        read(tmp_path)


def test_the_settings_are_the_recipes():
    assert settings(PLAN, CONFIG, 2) == {
        "microbatch": 4, "precision.compute": "bf16", "launch.num_processes": 2, "model.recompute": "full",
    }  # fmt: skip
    convnet = load(RECIPE.with_name("convnet-digits.toml"))
    plan = replace(PLAN, inputs=replace(PLAN.inputs, recipe_digest=recipe_digest(convnet)),
                   settings=replace(PLAN.settings, recompute="none"))  # fmt: skip
    assert "model.recompute" not in settings(plan, convnet, 2)
    with pytest.raises(PlanError, match=r"settings.recompute \(full\): convnet knows none"):
        settings(replace(plan, settings=replace(plan.settings, recompute="full")), convnet, 2)


def test_a_plan_of_another_recipe_is_refused():
    for override in ("model.num_layers=5", "global_batch=32", "data.seq_len=64", "optimizer.kind=muon"):
        with pytest.raises(PlanError, match="made for another model, data, batch or optimizer"):
            settings(PLAN, load(RECIPE, [override]), 2)
    assert settings(PLAN, load(RECIPE, ["num_steps=3", "optimizer.lr=1e-3"]), 2)


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        (replace(PLAN, dims=ParallelDims(tp=2)), "dims.tp (2): train splits data only: plan with --fix tp=1"),
        (replace(PLAN, dims=ParallelDims(pp=2)), "dims.pp (2)"),
        (replace(PLAN, dims=ParallelDims(dp_shard=2)), "dims.dp_shard (2)"),
        (replace(PLAN, dims=ParallelDims(cp=2)), "dims.cp (2)"),
        (replace(PLAN, dims=ParallelDims(dp_replicate=2, ep=2)), "dims.ep (2)"),
        (replace(PLAN, dims=ParallelDims(dp_replicate=8)), "dims.dp_replicate (8): train starts processes on"),
        (replace(PLAN, settings=replace(PLAN.settings, dtype="fp8")), "settings.dtype (fp8)"),
        (replace(PLAN, settings=replace(PLAN.settings, recompute="selective")), "settings.recompute (selective)"),
        (replace(PLAN, settings=replace(PLAN.settings, synchronisation="local", sync_every=16)),
         "settings.synchronisation (local)"),
        (replace(PLAN, settings=replace(PLAN.settings, virtual_stages=2)), "settings.virtual_stages (2)"),
    ],
)  # fmt: skip
def test_what_train_cannot_do_is_named(plan, expected):
    with pytest.raises(PlanError) as caught:
        settings(plan, CONFIG, 2, "my.toml")
    assert expected in str(caught.value) and str(caught.value).startswith("my.toml cannot be followed by train")


def test_all_that_train_cannot_do_is_named_at_once():
    plan = replace(PLAN, dims=ParallelDims(tp=2, pp=4), settings=replace(PLAN.settings, dtype="fp16"))
    with pytest.raises(PlanError) as caught:
        settings(plan, CONFIG, 2)
    assert all(name in str(caught.value) for name in ("dims.tp", "dims.pp", "settings.dtype"))


def test_an_override_against_the_plan_is_refused():
    chosen = settings(PLAN, CONFIG, 2)
    with pytest.raises(PlanError, match=r"microbatch: 2 given, and plan.toml says 4: leave the override"):
        refuse_contradictions(chosen, load(RECIPE, ["microbatch=2", "precision.compute=bf16"]), "plan.toml")
