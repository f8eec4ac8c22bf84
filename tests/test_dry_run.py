"""`train --dry-run`: the resolved recipe and its sizes, checked against the data, and nothing written."""

import tomllib

import pytest

from turbopump.core.config import parse, to_table


def written(place) -> set[str]:
    return {p.relative_to(place).as_posix() for p in place.rglob("*")}


def test_it_prints_a_recipe_that_gives_the_same_run_and_writes_nothing(place, cli) -> None:
    before = written(place)
    said = cli("train", "lm.toml", "--dry-run", "optimizer.lr=0.01", "name=other")
    assert said.code == 0 and not said.err
    table, sizes = said.out.split("\n\nparameters", 1)
    config = parse(tomllib.loads(table))
    assert (config.name, config.optimizer.lr, config.model.hidden_size) == ("other", 0.01, 16)
    assert to_table(config)["data"]["path"] == "datasets/text"
    for text in ("FLOPs a token", "memory a process", "activations", "tokens a step     128", "(6 steps)"):
        assert text in sizes
    assert written(place) == before


def test_it_needs_no_data_but_checks_what_is_there(place, cli) -> None:
    assert cli("train", "lm.toml", "--dry-run", "data.path=nowhere").code == 0
    said = cli("train", "lm.toml", "--dry-run", "model.vocab_size=100")
    assert said.code == 2 and "model.vocab_size: 100 given; the dataset has 256 tokens: use 256 or more" in said.err


@pytest.mark.parametrize(
    ("recipe", "setting", "expected"),
    [
        ("convnet-digits", "model.in_channels=3", "model.in_channels: 3 given; the images have 1: use 1"),
        ("convnet-digits", "model.num_classes=4", "model.num_classes: 4 given; the dataset has 10: use 10 or more"),
        (
            "deepspeech2-tones",
            "model.frequencies=161",
            "model.frequencies: 161 given; the spectrograms have 64: use 64",
        ),
        ("deepspeech2-tones", "model.num_labels=3", "model.num_labels: 3 given; the dataset has 9"),
        ("deepspeech2-tones", "data.num_tones=20", "model.num_labels: 9 given; the dataset has 21"),
    ],
)
def test_sizes_that_do_not_fit_are_found_before_a_model_runs(cli, tmp_path, monkeypatch, recipe, setting, expected):
    from pathlib import Path

    path = Path(__file__).parents[1] / "recipes" / f"{recipe}.toml"
    monkeypatch.chdir(tmp_path)
    for more in (["--dry-run"], []):
        said = cli("train", str(path), setting, *more)
        assert said.code == 2 and expected in said.err and len(said.err.splitlines()) == 2, said.err


def test_a_model_on_data_of_another_kind(cli, tmp_path) -> None:
    for model, data in (("transformer", "tones"), ("convnet", "tones"), ("deepspeech2", "digits")):
        (tmp_path / "r.toml").write_text(f'[model]\nkind = "{model}"\n[data]\nkind = "{data}"\n')
        said = cli("train", str(tmp_path / "r.toml"), "--dry-run")
        assert said.code == 2 and f"model.kind: {model} reads samples with" in said.err and "use data.kind" in said.err


def test_a_live_model_has_no_sizes_beforehand(place, cli) -> None:
    said = cli("train", "lm.toml", "--dry-run", "--model", "tests.live_parts:build", "--loss", "tests.live_parts:loss")
    assert said.code == 0 and "not known before the live model runs" in said.out
