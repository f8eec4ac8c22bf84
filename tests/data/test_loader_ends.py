"""Every kind of end leaves nothing behind: no process, thread, open file or shared memory."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from tests.processes import PATIENCE_S, all_gone, held, nothing_left
from turbopump.data.loader import Loader

KINDS = ["threads", "processes"]


class Data:
    """Reads slowly enough that an end meets readers at work."""

    randomness = "none"

    def __len__(self):
        return 1000

    def __getitem__(self, index):
        time.sleep(0.001)
        return torch.zeros(3)


def named_memory(pid):
    """Shared memory that would stay behind if `pid` were killed now."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [line for line in lines if "/dev/shm/" in line and not line.endswith("(deleted)")]


def opened(workers):
    return Loader(Data(), global_batch=8, num_workers=2, workers=workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", KINDS)
def test_an_end_within_the_program_leaves_nothing(workers):
    next(opened(workers))  # what is made once and stays
    before = held()
    loader = opened(workers)
    next(loader)
    assert {kind for kind, _ in held() - before} >= {"thread" if workers == "threads" else "process"}
    assert not named_memory(os.getpid())
    loader.close(), loader.close()
    assert nothing_left(before)

    assert len(list(Loader(Data(), global_batch=8, num_steps=5, num_workers=2, workers=workers))) == 5
    assert nothing_left(before)

    with pytest.raises(ZeroDivisionError), opened(workers) as loader:
        for _ in loader:
            1 / 0  # noqa: B018
    assert nothing_left(before)

    loader = opened(workers)
    batches = next(loader)
    del loader  # abandoned
    assert nothing_left(before) and batches[0].shape == (8, 3)

    loader = opened(workers)
    next(loader)
    loader.seek(50)
    assert nothing_left(before)
    next(loader)
    loader.close()
    assert nothing_left(before)


SCRIPT = textwrap.dedent("""
    import os, psutil, signal, sys, threading, time
    sys.path[:0] = PATHS
    from test_loader_ends import opened
    loader = opened(WORKERS)
    next(loader)
    print(threading.active_count() - 1, *[p.pid for p in psutil.Process().children()], flush=True)
    for batch in loader: pass
""")


def start_script(workers, end=None):
    body = SCRIPT.replace("WORKERS", repr(workers)).replace("PATHS", repr([str(Path(__file__).parent), *sys.path]))
    if end is not None:
        body = body.replace("for batch in loader: pass", end)
    process = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)  # fmt: skip
    threads, *pids = map(int, process.stdout.readline().split())
    assert (threads, len(pids)) == ((2, 0) if workers == "threads" else (0, 2))
    assert end is not None or not any(named_memory(pid) for pid in (process.pid, *pids))  # with an end they may be gone
    return process, pids


@pytest.mark.slow
@pytest.mark.parametrize("workers", KINDS)
def test_ctrl_c_leaves_no_process_behind(workers):
    process, pids = start_script(workers)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers, too
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert all_gone(pids)
    assert stderr.count("KeyboardInterrupt") == 1  # the workers printed no traceback of their own


@pytest.mark.slow
@pytest.mark.parametrize("workers", KINDS)
@pytest.mark.parametrize("end", ["sys.exit(3)", "os._exit(3)"])
def test_an_end_without_close_does_not_hang(workers, end):
    process, pids = start_script(workers, end)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 3 and all_gone(pids) and not stderr


@pytest.mark.slow
@pytest.mark.parametrize("workers", KINDS)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_training_process_takes_its_workers_with_it(workers, number):
    process, pids = start_script(workers)
    process.send_signal(number)
    process.communicate(timeout=PATIENCE_S)
    assert process.returncode == -number and all_gone(pids)


@pytest.mark.slow
def test_workers_of_a_process_with_busy_threads_do_not_hang():
    script = textwrap.dedent("""
        import sys, torch
        sys.path[:0] = PATHS
        from turbopump.data.loader import Loader
        torch.set_num_threads(4)
        class Data:
            def __len__(self): return 100
            def __getitem__(self, index):
                return (torch.ones(300, 300) @ torch.ones(300, 300)).sum()
        torch.ones(2000, 2000) @ torch.ones(2000, 2000)
        with Loader(Data(), global_batch=4, num_steps=5, num_workers=2) as loader:
            print(len([batch for batch in loader if torch.ones(1000, 1000).sum() == 1e6]))
    """).replace("PATHS", repr(sys.path))
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S,
                          env=environment, check=False)  # fmt: skip
    assert done.stdout == "5\n", done.stderr
