"""What a user meets when something breaks while training: disks, data, memory, other processes, damaged files."""

import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.processes import PATIENCE_S, all_gone, wait_until
from turbopump.core.checkpoint_store import list_checkpoints
from turbopump.core.files import read_json_lines
from turbopump.core.rundir import RunDir
from turbopump.core.tensor_file import read_layout

ROOT = Path(__file__).parents[1]
ENDLESS = ("num_steps=100000", "evaluation.at_start=false")


def start(place: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return subprocess.Popen([sys.executable, "-m", "turbopump.cli", "train", "lm.toml", *arguments], cwd=place,
                            env={**os.environ, "PYTHONPATH": path}, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, **options)  # type: ignore[call-overload]  # fmt: skip


def steps(path: Path) -> list[int]:
    return [r["step"] for r in read_json_lines(RunDir(path).metrics) if r["type"] == "step"]


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_corrupt_shard_is_named_with_its_block(place: Path, cli, workers: int) -> None:
    flip(place / "datasets" / "text" / "train-00000.arrow", 4096 + 1000)  # the values begin on a page
    for arguments in (["train", "lm.toml", "name=n", f"loader.num_workers={workers}"],
                      ["inspect", "datasets/text", "--verify"]):  # fmt: skip
        said = cli(*arguments)
        assert said.code == 1
        assert "train-00000.arrow: block 0 of 'tokens'" in said.err and "pack the dataset again" in said.err
        assert len(said.err.splitlines()) == 1


def test_a_shard_cut_short_is_named(place: Path, cli) -> None:
    os.truncate(place / "datasets" / "text" / "train-00000.arrow", 100)
    said = cli("train", "lm.toml", "name=n")
    assert said.code == 1 and "train-00000.arrow has 100 bytes where" in said.err


def test_a_run_that_failed_before_its_first_step_goes_on_with_settings_put_right(place: Path, cli) -> None:
    assert cli("train", "lm.toml", "name=n", "data.path=nowhere").code == 1
    said = cli("train", "lm.toml", "name=n", "model.num_layers=2")
    assert said.code == 0, said.err
    assert steps(place / "runs" / "n") == [1, 2, 3, 4, 5, 6]
    assert "num_layers = 2" in (place / "runs" / "n" / "config.toml").read_text()
    assert cli("train", "lm.toml", "name=n").code == 2  # now it holds something that another model would contradict


def test_a_finished_run_is_not_started_again(place: Path, cli) -> None:
    run = RunDir(place / "runs" / "lm")
    attempts = run.num_attempts()
    said = cli("train", "lm.toml")
    assert said.code == 0 and "runs/lm is at step 6 of 6: nothing is left to do" in said.out
    assert run.num_attempts() == attempts
    flip(place / "runs" / "lm" / "checkpoints" / "step-00000006" / "rank0.safetensors", -1)
    said = cli("train", "lm.toml")
    assert said.code == 0 and "going on from the checkpoint of step 4" in said.out


def test_a_damaged_checkpoint_is_passed_over_and_named(place: Path, cli) -> None:
    newest = place / "runs" / "lm" / "checkpoints" / "step-00000006"
    entry = read_layout(newest / "rank0.safetensors").tensors["model.norm.weight"]
    flip(newest / "rank0.safetensors", entry.begin)
    said = cli("evaluate", "runs/lm")
    assert said.code == 1 and "tensor 'model." in said.err and said.err.endswith("--step 2, 4\n")
    said = cli("inspect", "runs/lm", "--verify")
    assert said.code == 1 and "step-00000006/rank0.safetensors: tensor 'model." in said.err
    said = cli("train", "lm.toml", "num_steps=8")
    assert said.code == 0
    assert (
        said.err.startswith("warning: the checkpoint of step 6 was passed over") and "Going on from step 4" in said.err
    )
    assert newest.with_name("step-00000006.rejected").exists()
    assert [c.step for c in list_checkpoints(newest.parent)] == [2, 4, 6, 8]


def test_no_whole_checkpoint_is_an_error_that_lists_them(place: Path, cli) -> None:
    for path in (place / "runs" / "lm" / "checkpoints").iterdir():
        os.truncate(path / "rank0.safetensors", 3000)
    said = cli("train", "lm.toml", "num_steps=8")
    assert said.code == 1 and "none of the 3 checkpoints" in said.err and "start anew under another name" in said.err
    assert said.err.count("has 3000 bytes") == 3


def test_a_damaged_config_is_named_with_a_way_on(place: Path, cli) -> None:
    config = place / "runs" / "lm" / "config.toml"
    config.write_text(config.read_text() + "x = = 3\n")
    for arguments in (["train", "lm.toml", "num_steps=8"], ["evaluate", "runs/lm"]):
        said = cli(*arguments)
        assert said.code == 1 and "runs/lm/config.toml is damaged" in said.err and "--from runs/lm" in said.err
    said = cli("inspect", "runs/lm")
    assert said.code == 0 and "runs/lm/config.toml is not valid TOML" in said.out
    assert cli("report", "runs/lm").code == 0
    assert cli("train", "lm.toml", "name=saved", "--from", "runs/lm", "num_steps=2").code == 0


def test_records_cut_short_by_a_crash_are_no_obstacle(place: Path, cli) -> None:
    run = RunDir(place / "runs" / "lm")
    for file in (run.metrics, run.spans(0)):
        os.truncate(file, file.stat().st_size - 9)
    assert cli("inspect", "runs/lm").code == 0
    said = cli("train", "lm.toml", "num_steps=8")
    assert said.code == 0, said.err
    assert steps(run.path) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert cli("report", "runs/lm").code == 0


def test_a_lost_env_json_does_not_disown_the_checkpoints(place: Path, cli) -> None:
    run = RunDir(place / "runs" / "lm")
    run.env.write_bytes(os.urandom(100))
    said = cli("train", "lm.toml", "num_steps=8")
    assert said.code == 0 and "going on from the checkpoint of step 6" in said.out
    assert len({c.run_id for c in list_checkpoints(run.checkpoints)}) == 1


def test_an_unwritable_place_is_named(place: Path, cli) -> None:
    (place / "taken").write_text("a file")
    said = cli("train", "lm.toml", "--run", "taken")
    assert said.code == 1 and "taken cannot be made, because a file stands" in said.err
    (place / "locked").mkdir(mode=0o555)
    run = "/proc/1/nowhere" if os.geteuid() == 0 else "locked/run"
    said = cli("train", "lm.toml", "--run", run)
    assert said.code == 1 and run in said.err and len(said.err.splitlines()) == 1


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[None]:
    path.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(path)],
                                           check=False, capture_output=True).returncode:  # fmt: skip
        pytest.skip("a small file system needs root")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def test_a_full_disk_leaves_nothing_half_written_and_the_run_goes_on_after_it(place: Path, cli) -> None:
    disk = place / "disk"
    with small_disk(disk, "1600k"):
        (disk / "filler").write_bytes(bytes(1_200_000))
        said = cli("train", "lm.toml", "--run", "disk/run")
        assert said.code == 1
        assert "checkpoint of step 2" in said.err and "free some space" in said.err
        assert len(said.err.splitlines()) == 1
        left = {p.relative_to(disk / "run").as_posix() for p in (disk / "run").rglob("*") if p.is_file()}
        assert left == {".lock", "config.toml", "env.json", "metrics.jsonl", "spans/rank0.jsonl"}
        (disk / "filler").unlink()
        said = cli("train", "lm.toml", "--run", "disk/run", "checkpoint.keep_last=1")
        assert said.code == 0, said.err
        whole = cli("inspect", "disk/run", "--verify")
        assert whole.code == 0
    assert steps(place / "runs" / "lm") == [1, 2, 3, 4, 5, 6]


def test_a_disk_without_any_room_is_an_error_at_once(place: Path, cli) -> None:
    with small_disk(place / "disk", "4k"):
        (place / "disk" / "filler").write_bytes(bytes(4096))
        said = cli("train", "lm.toml", "--run", "disk/run")
        assert said.code == 1 and "no space left on the device" in said.err and "disk/run" in said.err


@pytest.mark.slow
def test_a_run_in_use_is_refused_by_name_and_goes_on(place: Path, cli) -> None:
    process = start(place, "name=busy", *ENDLESS)
    wait_until(lambda: steps(place / "runs" / "busy") or process.poll() is not None, "a step")
    for more in ((), ("num_steps=2",)):
        said = cli("train", "lm.toml", "name=busy", *ENDLESS, *more)
        assert said.code == 1
        assert f"runs/busy is in use by process {process.pid}" in said.err and "choose another name" in said.err
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 143 and err.startswith("error: stopped by SIGTERM after step")


@pytest.mark.slow
def test_a_rank_that_is_killed_is_named_in_the_last_line(place: Path) -> None:
    process = start(place, "name=pair", *ENDLESS, "launch.num_processes=2")
    wait_until(lambda: len(steps(place / "runs" / "pair")) > 4 or process.poll() is not None, "five steps")
    spans = [RunDir(place / "runs" / "pair").spans(rank) for rank in (0, 1)]
    ranks = [next(read_json_lines(file))["pid"] for file in spans]
    os.kill(ranks[1], signal.SIGKILL)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert err.splitlines() == ["error: rank 1 was killed by SIGKILL (kill -9); its output: runs/pair/logs/rank1.log"]
    assert all_gone(ranks)
    assert list_checkpoints(place / "runs" / "pair" / "checkpoints")


@pytest.mark.slow
def test_out_of_memory_says_what_to_reduce(place: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    process = start(place, "name=large", "model.hidden_size=1024", "model.mlp_size=2097152", preexec_fn=limited)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    last = err.splitlines()[-1]
    assert (
        last.startswith("error: out of memory (") and "more were asked for): use a smaller microbatch (now 8;" in last
    )
    assert "a shorter sequence, or a smaller model" in last and "Traceback" not in err


def test_a_run_larger_than_the_memory_is_warned_of(place: Path, cli, monkeypatch) -> None:
    monkeypatch.setattr("turbopump.train.available_bytes", lambda: 10_000)
    said = cli("train", "lm.toml", "name=n")
    assert said.code == 0
    assert said.err.startswith("warning: this run needs about ") and "10 kB are free" in said.err


@pytest.mark.slow
def test_an_interrupted_run_says_how_it_goes_on(place: Path) -> None:
    process = start(place, "name=cut", *ENDLESS)
    wait_until(lambda: len(steps(place / "runs" / "cut")) > 2 or process.poll() is not None, "three steps")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130
    assert "SIGINT: finishing this step and writing a checkpoint; once more stops at once" in out
    assert err.startswith("error: stopped by SIGINT after step") and "the same command goes on from there" in err


def test_a_copied_run_directory_is_still_a_run(place: Path, cli) -> None:
    shutil.copytree(place / "runs" / "lm", place / "elsewhere")
    said = cli("train", "lm.toml", "num_steps=8", "--run", "elsewhere")
    assert said.code == 0 and "going on from the checkpoint of step 6" in said.out
