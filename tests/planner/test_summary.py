"""Sizes of a recipe against the torch model, and what does not fit the data."""

from pathlib import Path

import pytest
import torch

from turbopump.core import plugins
from turbopump.core.config import load
from turbopump.planner.summary import format_summary, misfits, summarize

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda p: p.stem)
def test_parameters_of_every_recipe_are_those_of_its_model(path: Path) -> None:
    config = load(path)
    summary = summarize(config)
    assert summary is not None and misfits(config) == []
    with torch.device("meta"):
        model = plugins.find("turbopump.models", config.model.kind).torch_side().build(config.model)
    assert summary.params == sum(p.numel() for p in model.parameters())
    assert summary.memory_bytes > 3 * 4 * summary.params
    assert summary.flops_per_step == pytest.approx(summary.flops_per_unit * summary.units_per_step)
    assert 2.5 < summary.flops_per_unit / summary.forward_flops_per_unit < 3.5


def test_smaller_microbatches_need_less_memory_and_the_same_work() -> None:
    whole, parts = (summarize(load(RECIPES / "lm-stdlib.toml", [f"microbatch={n}"])) for n in (0, 4))
    assert whole is not None and parts is not None
    assert whole.flops_per_step == parts.flops_per_step and whole.kept_bytes > 3 * parts.kept_bytes
    ranks = summarize(load(RECIPES / "lm-stdlib.toml"), num_processes=4)
    assert ranks is not None and ranks.kept_bytes == parts.kept_bytes


def test_lines() -> None:
    config = load(RECIPES / "convnet-digits.toml")
    text = format_summary(summarize(config), config)
    assert "images a step     64" in text and "FLOPs an image" in text
    assert text.splitlines()[2].endswith("(300 steps)")
