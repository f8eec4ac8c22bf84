"""What all tests share: reproducible Hypothesis examples, no deadlines (shared machines), one thread of torch.

`place` is a user's folder with a dataset, a recipe and a trained run; `cli` runs a command there as the shell would.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "turbopump", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("turbopump")

RECIPE = """
name = "lm"
num_steps = 6
global_batch = 8
[model]
kind = "transformer"
num_layers = 1
hidden_size = 16
num_heads = 2
[data]
kind = "tokens"
path = "datasets/text"
seq_len = 16
[schedule]
warmup_steps = 2
[evaluation]
max_samples = 16
[checkpoint]
every = 2
every_s = 0
keep_last = 9
[logging]
every = 2
limit_s = 0
[launch]
threads = 1
"""


@dataclass(frozen=True)
class Said:
    """How a command ended and what it said."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="session")
def trained_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with texts/, datasets/text, lm.toml and runs/lm: 6 steps, checkpoints of steps 2, 4 and 6."""
    from turbopump.pack import pack
    from turbopump.train import train

    place = tmp_path_factory.mktemp("place")
    (place / "texts").mkdir()
    for number in range(4):
        (place / "texts" / f"t{number}.txt").write_text(f"line {number}: the quick brown fox\n" * 100)
    pack(str(place / "texts"), place / "datasets" / "text")
    (place / "lm.toml").write_text(RECIPE)
    before = Path.cwd()
    os.chdir(place)
    try:
        train("lm.toml", quiet=True)
    finally:
        os.chdir(before)
    return place


@pytest.fixture
def place(trained_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own copy of `trained_place`, as the working directory."""
    copy = tmp_path / "place"
    shutil.copytree(trained_place, copy)
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """`cli("train", "lm.toml")`: the command in this process, its exit code and what it printed."""
    from turbopump.cli import main

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(list(arguments))
        return Said(code, *capsys.readouterr())

    return run
