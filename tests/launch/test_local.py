from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch

from tests.launch import launch_ranks as ranks
from tests.processes import PATIENCE_S, all_gone, is_alive, wait_until
from turbopump.core.errors import CheckpointError, ConfigError, RankError, UsageError
from turbopump.launch.local import cores_per_rank, launch_local
from turbopump.launch.watch import Watch, last_lines
from turbopump.launch.worker import Job

pytestmark = pytest.mark.slow  # whole processes or a browser: not for `make check`

HERE = Path(__file__).parent


def living_ranks() -> list[psutil.Process]:
    """Processes below this one that multiprocessing spawned: not its resource tracker, which it keeps for good."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # it ended while we looked
            if "spawn_main" in " ".join(child.cmdline()):
                found.append(child)
    return found


def read(path: Path) -> object:
    return json.loads(path.read_text())


def start_launcher(function: str, folder: Path) -> subprocess.Popen[str]:
    """A launcher in a session of its own (as a terminal's)."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "launch_start.py"), function, str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def start(function: str, folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """A launcher and its two ranks, which run; their pids."""
    launcher = start_launcher(function, folder)
    wait_for_both(folder, "pid", launcher)
    return launcher, [int(str(read(folder / f"pid{rank}"))) for rank in range(2)]


def wait_for_both(folder: Path, what: str, launcher: subprocess.Popen[str]) -> None:
    """Until both ranks have written their file `what`; the launcher does not outlive a failure."""
    try:
        wait_until(lambda: (folder / f"{what}0").exists() and (folder / f"{what}1").exists(), f"{what} of both ranks")
    except AssertionError:
        launcher.kill()
        raise


def test_healthy_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)]
    environment = dict(os.environ)
    weight = torch.nn.Linear(2, 2)
    before = weight.weight[0, 0].item()
    launch_local(ranks.describe, (tmp_path, weight), num_processes=2, log_dir=tmp_path / "logs")
    told = [read(tmp_path / f"rank{rank}") for rank in range(2)]
    for rank, state in enumerate(told):
        assert isinstance(state, dict)
        assert state["sum"] == [1.0, 2.0] and state["tensor"] == [3.0, 3.0, 3.0] and state["world_size"] == 2
        assert state["any"] == [True, False]
        assert state["threads"] == int(state["omp"]) == cores_per_rank(2)
        assert state["weight"] == pytest.approx(before + rank), "the ranks share the memory of an argument"
        assert state["listeners"] and set(state["listeners"]) <= {"127.0.0.1", "::1"}
        assert state["group"], "a rank must leave the terminal's process group"
    assert weight.weight[0, 0].item() == before
    out, err = capfd.readouterr()
    assert "out of rank 0" in out and "err of rank 0" in err and "rank 1" not in out + err
    assert (tmp_path / "logs" / "rank1.log").read_text() == "out of rank 1\nerr of rank 1\n"
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)] == handlers
    assert dict(os.environ) == environment
    assert living_ranks() == []


def test_one_process_runs_here(tmp_path: Path) -> None:
    calls = []
    launch_local(lambda value: calls.append((value, os.getpid())), ("x",), num_processes=1)
    assert calls == [("x", os.getpid())]


def test_typed_error_passes_through(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError) as caught:
        launch_local(ranks.fail, ("typed",), num_processes=2, log_dir=tmp_path)
    assert str(caught.value) == "recipe.toml: 1 problem\n  model.num_layers: -1 given; must be at least 1"
    assert caught.value.exit_code == 2 and list(caught.value.problems) == [
        "model.num_layers: -1 given; must be at least 1"
    ]
    assert not caplog.records
    assert "raised on rank 1" in caught.value.__notes__[0] and "Traceback" in caught.value.__notes__[0]
    assert "Traceback" not in "".join(capfd.readouterr())
    assert living_ranks() == []


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        pytest.param("foreign", "rank 1 failed: ValueError: seven is no colour", marks=pytest.mark.slow),
        ("killed", "rank 1 was killed by SIGKILL"),
        ("crash", "rank 1 was killed by SIGSEGV (a crash in compiled code): Fatal Python error: Segmentation fault at"),
        pytest.param(
            "exit", "rank 1 ended with exit code 7 before its work was done: giving up", marks=pytest.mark.slow
        ),
    ],
)
def test_a_rank_that_fails_is_named(how: str, expected: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankError) as caught:
        launch_local(ranks.fail, (how,), num_processes=2, log_dir=tmp_path)
    assert str(caught.value).startswith(expected)
    assert str(caught.value).endswith(f": {tmp_path / 'rank1.log'}") and "\n" not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())
    assert living_ranks() == []


@pytest.mark.slow
def test_exit_code_zero_is_success(tmp_path: Path) -> None:
    """The agent alone waits for ever for the result of a rank that calls sys.exit(0)."""
    launch_local(ranks.fail, ("sys.exit(0)",), num_processes=2, log_dir=tmp_path)


@pytest.mark.slow
def test_deaf_ranks_are_ended_after_a_death(tmp_path: Path) -> None:
    launcher, pids = start("deaf", tmp_path)
    os.kill(pids[1], signal.SIGKILL)
    out, _ = launcher.communicate(timeout=PATIENCE_S)
    assert out.startswith("error: RankError: rank 1 was killed by SIGKILL") and launcher.returncode == 1
    assert not (tmp_path / "heard0").exists(), "killed by the watch, not by torch's SIGTERM and its grace of 30 s"
    assert all_gone(pids)


@pytest.mark.slow
def test_second_signal_kills_at_once(tmp_path: Path) -> None:
    launcher, pids = start("deaf", tmp_path)
    launcher.send_signal(signal.SIGINT)
    wait_for_both(tmp_path, "heard", launcher)
    assert launcher.poll() is None and all(map(is_alive, pids))
    launcher.send_signal(signal.SIGINT)
    out, _ = launcher.communicate(timeout=PATIENCE_S)
    assert "Interrupted: killed at once by a second signal" in out and launcher.returncode == 130
    assert all_gone(pids)


@pytest.mark.slow
def test_sigterm_is_passed_on_and_waited_for(tmp_path: Path) -> None:
    launcher, _ = start("forever", tmp_path)
    launcher.terminate()
    out, _ = launcher.communicate(timeout=PATIENCE_S)
    assert out == "error: Interrupted: stopped by SIGTERM, checkpoint written\n" and launcher.returncode == 143
    assert [read(tmp_path / f"stopped{rank}") for rank in range(2)] == [[signal.SIGTERM]] * 2


def test_ctrl_c_at_the_terminal_reaches_each_rank_once(tmp_path: Path) -> None:
    launcher, _ = start("forever", tmp_path)
    os.killpg(launcher.pid, signal.SIGINT)  # what a terminal does
    out, _ = launcher.communicate(timeout=PATIENCE_S)
    assert out == "error: Interrupted: stopped by SIGINT, checkpoint written\n" and launcher.returncode == 130
    assert [read(tmp_path / f"stopped{rank}") for rank in range(2)] == [[signal.SIGINT]] * 2


def test_ctrl_c_while_ranks_start(tmp_path: Path) -> None:
    launcher = start_launcher("starting", tmp_path)
    wait_until(lambda: len(list(tmp_path.glob("starting*"))) == 2, "the spawning of both ranks")
    os.killpg(launcher.pid, signal.SIGINT)
    out, err = launcher.communicate(timeout=PATIENCE_S)
    assert out == "error: Interrupted: stopped by SIGINT before the ranks had started\n" and launcher.returncode == 130
    assert "Traceback" not in err


def test_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    launcher, pids = start("deaf", tmp_path)
    launcher.kill()
    launcher.communicate()
    assert all_gone(pids)


def test_what_cannot_be_sent_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be sent.*top level of a module.*num_processes=1"):
        launch_local(ranks.fail, (lambda: 0,), num_processes=2)
    with pytest.raises(UsageError, match=r"num_processes \(0\)"):
        launch_local(ranks.fail, (), num_processes=0)


def test_a_script_without_a_guard_is_told(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "launch_unguarded.py")]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout.startswith("error: UsageError: put the call that starts the run under `if __name__")
    assert "Traceback" not in done.stderr


def test_errors_of_all_ranks_and_temporary_logs() -> None:
    with pytest.raises(CheckpointError, match="no space left on the device"):
        launch_local(ranks.fail_everywhere, (), num_processes=2)


@pytest.mark.slow
def test_clean_exits(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A group that is never destroyed aborts at exit about one time in six."""
    for attempt in range(10):
        launch_local(ranks.leave_group_open, (tmp_path,), num_processes=3, log_dir=tmp_path)
        for rank in range(3):
            (tmp_path / f"done{rank}").unlink()
        said = "".join(capfd.readouterr()) + "".join(log.read_text() for log in tmp_path.glob("rank*.log"))
        assert "terminate called" not in said and not said.strip(), f"launch {attempt}: {said}"


def test_start_that_takes_too_long(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 0, 1 did not start within launch.timeout_s \(0.1 s\)"):
        launch_local(ranks.fail_everywhere, (), num_processes=2, timeout_s=0.1, log_dir=tmp_path)
    assert living_ranks() == []


def test_done_ranks_are_success_whatever_their_exit_code(tmp_path: Path) -> None:
    job = Job(None, tmp_path, tmp_path, 1, os.getpid(), "lo")
    for rank in range(2):
        job.outcome(rank).write_text('{"kind": "done"}')
    watch = Watch(job, 2, PATIENCE_S)
    processes = [subprocess.Popen([sys.executable, "-c", "import os; os.abort()"]) for _ in range(2)]
    watch.pids = {rank: process.pid for rank, process in enumerate(processes)}
    wait_until(watch.is_over, "the end")
    watch.verdict()
    for process in processes:
        process.wait()


def test_last_lines(tmp_path: Path) -> None:
    log = tmp_path / "rank1.log"
    log.write_text("an earlier run\n")
    start_bytes = log.stat().st_size
    assert last_lines(log, start_bytes) == "" and last_lines(tmp_path / "none", 0) == ""
    log.write_text('an earlier run\nhello\nFatal Python error: Aborted\n\nThread 1:\n  File "a.py", line 3 in f\n\n')
    assert last_lines(log, start_bytes) == 'Fatal Python error: Aborted at File "a.py", line 3 in f'
