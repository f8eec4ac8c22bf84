"""The command line as a user meets it: exit codes, one or two lines for an error, help, pipes, small terminals."""

import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S
from turbopump.cli import VERBS, app, main
from turbopump.core.version import VERSION

COMMAND = [sys.executable, "-m", "turbopump.cli"]
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def start(place: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, **variables}
    return subprocess.Popen([*COMMAND, *arguments], cwd=place, env=env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


def test_verbs_are_those_of_the_application() -> None:
    assert set(VERBS) == {name for name in app if not name.startswith("-")}


def test_help_and_version(cli) -> None:
    said = cli("--help")
    assert said.code == 0 and not said.err
    assert all(re.search(rf"\b{verb}\b", said.out) for verb in VERBS) and "--debug" in said.out
    assert cli("--version").out == f"{VERSION}\n"
    assert cli().out == said.out


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_shows_examples(cli, verb: str) -> None:
    said = cli(verb, "--help")
    assert said.code == 0 and "Examples:" in said.out
    assert f"    turbopump {verb} " in said.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], ['Did you mean "train"?', "see: turbopump --help"]),
        (["train"], ["RECIPE requires an argument", "see: turbopump train --help"]),
        (["train", "lm.toml", "--dry-rum"], ["--dry-rum", "Did you mean --dry-run?"]),
        (["evaluate", "runs/lm", "--step", "abc"], ["--step", '"abc"', "see: turbopump evaluate --help"]),
        (["pack", "texts"], ["a source and a destination"]),
        (["pack", "stdlib", "d", "--include", "*.md"], ["*.md", "no effect on `stdlib`", "leave it out"]),
        (["pack", "texts", "datasets/text"], ["already holds a dataset", "--overwrite"]),
        (["pack", "nowhere", "d"], ["nowhere"]),
        (["inspect", "nowhere"], ["nothing at nowhere"]),
        (["inspect", "texts"], ["texts is no artefact", "give a run, checkpoint or dataset directory"]),
        (["report"], ["turbopump report runs/demo"]),
        (["report", "texts"], ["texts is not a run directory"]),
        (["evaluate", "texts"], ["texts is not a run directory"]),
        (["evaluate", "runs/lm", "--step", "5"], ["no checkpoint of step 5 (there: 2, 4, 6)"]),
        (["evaluate", "runs/lm", "--max-samples", "-1"], ["max_samples: -1"]),
        (["evaluate", "runs/lm", "--sample", "x", "--num-tokens", "0"], ["num_tokens must be at least 1"]),
        (["train", "nowhere.toml"], ["no recipe at nowhere.toml", "recipes/"]),
        (["train", "texts"], ["texts is a directory"]),
        (["train", "lm.toml", "num_step=3"], ["num_step: no such setting; did you mean 'num_steps'?"]),
        (["train", "lm.toml", "model.num_layers"], ["not of the form key=value"]),
        (["train", "lm.toml", "name=../up"], ["'../up' names no directory below runs/"]),
        (["train", "lm.toml", "name=n", "model.kind=transfromer"], ["did you mean 'transformer'?"]),
        (["train", "lm.toml", "name=n", "--from", "runs/lm@5"], ["no checkpoint of step 5 (there: 2, 4, 6)"]),
        (["train", "lm.toml", "name=n", "--from", "nowhere"], ["at nowhere"]),
        (["train", "lm.toml", "name=n", "--model", "nowhere"], ["not of the form module:function"]),
        (["train", "lm.toml", "name=n", "--model", "nowhere:f"], ["no module 'nowhere'"]),
        (["train", "lm.toml", "name=n", "--model", "tests.live_parts:build"], ["a live model needs a loss"]),
        (["train", "lm.toml", "name=n", "launch.device=cuda"], ["launch.device: 'cuda' given", "use 'cpu'"]),
        (["train", "lm.toml", "name=n", "microbatch=3"], ["global_batch: 8 must be divisible", "use 6 or 9"]),
        (["train", "lm.toml", "name=n", "launch.num_processes=3"], ["launch.num_processes (3): use 6 or 9"]),
        (["train", "lm.toml", "name=n", "model.vocab_size=100"], ["has 256 tokens: use 256 or more"]),
        (["train", "lm.toml", "global_batch=4"], ["global_batch: 8 in the run, 4 given", "--from runs/lm"]),
    ],
)
def test_wrong_usage_says_what_was_given_and_what_to_do(place: Path, cli, arguments, expected) -> None:
    import torch

    if "launch.device=cuda" in arguments and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    said = cli(*arguments)
    assert said.code == 2 and said.err.startswith("error: ") and not said.out
    assert all(text in said.err for text in expected), said.err
    assert len(said.err.splitlines()) <= 4 and "Traceback" not in said.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "lm.toml", "name=n", "data.path=nowhere"], ["no dataset at nowhere", "turbopump pack"]),
        (["train", "lm.toml", "name=n", "data.seq_len=99999"], ["too few for one window", "smaller data.seq_len"]),
        (["evaluate", "runs/lm", "--split", "test"], ["no split 'test' (it has: train, validation)"]),
        (["train", "lm.toml", "name=n", "--from", "lm.toml"], ["lm.toml: not a safetensors file"]),
    ],
)
def test_failures_exit_with_1(place: Path, cli, arguments, expected) -> None:
    said = cli(*arguments)
    assert said.code == 1 and said.err.startswith("error: ")
    assert all(text in said.err for text in expected), said.err
    assert len(said.err.splitlines()) <= 2


BROKEN = """
import sys
from tests.live_parts import Net, Noisy, loss
class Broken(Net):
    def forward(self, x):
        raise ValueError("seven is no colour\\nand more")
def build():
    return Broken()
def leave():
    sys.exit("this module had enough")
"""


def test_an_unexpected_exception_is_one_line_and_debug_shows_where(place: Path, cli, monkeypatch) -> None:
    (place / "mine.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(str(place))
    parts = ["--model", "mine:build", "--loss", "mine:loss", "--dataset", "mine:Noisy"]
    said = cli("train", "lm.toml", "name=n", *parts)
    assert said.code == 1
    assert said.err.splitlines() == [
        "error: unexpected ValueError: seven is no colour; run again with --debug for the traceback"
    ]
    with pytest.raises(ValueError, match="seven"):
        main(["train", "lm.toml", "name=n", *parts, "--debug"])
    said = cli("train", "lm.toml", "name=n", "--model", "mine:leave", "--loss", "mine:loss")
    assert (said.code, said.err) == (1, "error: this module had enough\n")


@pytest.mark.slow
def test_without_torch_the_command_to_install_it_is_named(place: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from turbopump.cli import main; sys.exit(main(sys.argv[1:]))"
    for verb in (["train", "lm.toml", "name=n"], ["evaluate", "runs/lm"]):
        done = subprocess.run([sys.executable, "-c", code, *verb], capture_output=True, text=True, check=False,
                              env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])})  # fmt: skip
        assert done.returncode == 2
        assert done.stderr == (
            f"error: turbopump {verb[0]} needs torch, which is not installed: pip install 'turbopump[train]'\n"
        )


@pytest.mark.slow
def test_debug_shows_the_traceback_of_an_error(place: Path) -> None:
    process = start(place, "inspect", "nowhere", "--debug")
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "Traceback" in err and "UsageError: nothing at nowhere" in err


def test_names_and_samples_cannot_steer_the_terminal(place: Path, cli) -> None:
    said = cli("inspect", "no\x1b[31mwhere\udcff")
    assert said.code == 2 and not CONTROL.search(said.err) and "no\N{REPLACEMENT CHARACTER}[31mwhere" in said.err
    said = cli("evaluate", "runs/lm", "--sample", "the", "--num-tokens", "40", "--temperature", "3", "--top-k", "0")
    assert said.code == 0 and said.out.startswith("the") and not CONTROL.search(said.out)


@pytest.mark.slow
def test_a_reader_that_goes_away_ends_the_command_quietly(place: Path) -> None:
    process = start(place, "train", "lm.toml", "name=piped", "num_steps=2000")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(PATIENCE_S) == 128 + signal.SIGPIPE
    assert process.stderr.read() == ""
    process.stderr.close()


@pytest.mark.slow
def test_a_pipe_gets_plain_lines(place: Path) -> None:
    process = start(place, "train", "lm.toml", "name=piped", COLUMNS="40")
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0 and not err
    assert not CONTROL.search(out)
    lines = out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["2/6", "4/6", "6/6"]
    assert lines[-1] == "6 steps are in runs/piped; next: turbopump report runs/piped"


@pytest.mark.parametrize(
    "variables",
    [{"COLUMNS": "40", "LINES": "10", "NO_COLOR": "1"}, {"TERM": "dumb"}],
)
@pytest.mark.slow
def test_a_terminal_gets_a_live_line(place: Path, variables: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TERM": "xterm", **variables}
    process = subprocess.Popen([*COMMAND, "train", "lm.toml", "name=seen"], cwd=place, env=env, stdout=theirs,
                               stderr=theirs, stdin=theirs)  # fmt: skip
    os.close(theirs)
    seen = b""
    while select.select([ours], [], [], PATIENCE_S)[0]:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the other end is closed: the command is over
            break
    os.close(ours)
    text = seen.decode()
    assert process.wait(PATIENCE_S) == 0, text
    assert "loss" in text and "report runs/seen" in text.replace("\r\n", "")
    colours = re.findall(r"\x1b\[[0-9;]*m", text)
    assert not colours
    assert ("\x1b[" in text) == ("TERM" not in variables)  # the line is rewritten in place where that is possible


def test_quiet_says_nothing(place: Path, cli) -> None:
    said = cli("train", "lm.toml", "name=quiet", "--quiet")
    assert (said.code, said.out, said.err) == (0, "", "")


def test_pack_shows_its_way(place: Path, cli) -> None:
    said = cli("pack", "texts", "datasets/new", "--tokenizer", "bpe", "--vocab-size", "300")
    assert said.code == 0 and not CONTROL.search(said.out)
    assert said.out.startswith("packed ") and "next: turbopump inspect datasets/new" in said.out
