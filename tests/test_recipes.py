"""Every ready-made recipe loads, fits its data and trains a few steps, as the README says it does."""

from pathlib import Path

import pytest

from turbopump.core.config import load
from turbopump.core.files import read_json_lines
from turbopump.core.rundir import RunDir
from turbopump.planner.summary import summarize
from turbopump.train import train

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
SHORT = ["num_steps=3", "logging.limit_s=0.2", "logging.every=1", "evaluation.max_samples=16", "evaluation.batch=8",
         "global_batch=4", "launch.device=cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from turbopump.pack import pack

    path = tmp_path_factory.mktemp("text") / "dataset"
    pack(iter(f"file {i}: " + "def f(x):\n    return x\n" * 60 for i in range(40)), path)
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_valid_and_its_size_is_known(recipe: Path) -> None:
    summary = summarize(load(recipe))
    assert summary is not None and summary.params > 10_000 and summary.flops_per_step > 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_trains(recipe: Path, processes: int, text: Path, tmp_path: Path) -> None:
    if processes == 2 and recipe.stem != "convnet-digits":
        pytest.skip("one recipe on two processes is enough")
    data = [f"data.path={text}"] if load(recipe).data.kind == "tokens" else []
    overrides = [*SHORT, *data, f"launch.num_processes={processes}"]
    train(recipe, overrides=overrides, run=tmp_path / "run", quiet=True)
    records = list(read_json_lines(RunDir(tmp_path / "run").metrics))
    assert [r["step"] for r in records if r["type"] == "step"] == [1, 2, 3]
    progress = [r for r in records if r["type"] == "progress"]
    assert all(0 < r["share_of_limit"] <= 1 for r in progress)
    evaluations = [r for r in records if r["type"] == "evaluation"]
    assert [r["step"] for r in evaluations] == [0, 3]
