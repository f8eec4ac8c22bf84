"""What a rank does before and after the function it was started for.

Before: dies with the launcher, leaves the terminal's process group (the launcher passes Ctrl-C on, once), sends its
output to its log (rank 0 keeps the terminal), sets threads and the loopback interface. After: leaves the process group
of torch, tells in a JSON file how it ended. A rank that failed exits at once; the launcher ends the others.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import pickle
import signal
import sys
import threading
from dataclasses import dataclass
from multiprocessing import reduction
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch

from turbopump.comms import process_group
from turbopump.comms.environment import RankEnvironment
from turbopump.core.errors import Interrupted, UsageError
from turbopump.launch.outcome import Outcome

PR_SET_PDEATHSIG = 1
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class SharedBytes:
    """Bytes in an anonymous memory file that spawned processes inherit.

    An argument of the process itself would be written through a pipe that the child reads only after importing torch:
    beyond 64 KiB the ranks would start one after the other.
    """

    def __init__(self, data: bytes) -> None:
        self._file = os.memfd_create("turbopump-arguments")
        self._size = len(data)
        with os.fdopen(os.dup(self._file), "wb") as file:
            file.write(data)

    def __reduce__(self) -> Any:
        return _read_shared, (reduction.DupFd(self._file), self._size)

    def close(self) -> None:
        os.close(self._file)


def _read_shared(inherited: Any, size: int) -> mmap.mmap:
    handle = inherited.detach()
    try:
        return mmap.mmap(handle, size, access=mmap.ACCESS_READ)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class Job:
    """What the launcher tells every rank."""

    call: Any  # SharedBytes in the launcher, a read-only mapping of them in the rank: pickled (function, args)
    control: Path
    log_dir: Path
    threads: int
    launcher_pid: int
    interface: str

    def outcome(self, rank: int) -> Path:
        return self.control / f"rank{rank}.json"

    def started(self, rank: int) -> Path:
        return self.control / f"rank{rank}.started"

    def log(self, rank: int) -> Path:
        return self.log_dir / f"rank{rank}.log"


def run_rank(job: Job) -> None:
    """Entry point of a spawned process. Returns when the function is done or was stopped; exits when it failed."""
    rank = RankEnvironment.read().rank
    die_with(job.launcher_pid)
    os.setpgid(0, 0)
    log = job.log(rank).open("a", buffering=1, encoding="utf-8", errors="replace")
    _prepare(job, rank, log)
    try:
        _call(job)
        outcome = Outcome("done")
    except BaseException as error:
        outcome = _outcome_of(error)
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)  # what is left to do is short, and the launcher waits for it
    if outcome.kind == "failed":
        log.write(outcome.traceback)
        _end(job, rank, outcome)
    try:
        process_group.destroy()
    except Exception as error:
        log.write(f"leaving the process group failed: {error}\n")
    sys.stdout.flush()
    sys.stderr.flush()
    outcome.write(job.outcome(rank))


def _prepare(job: Job, rank: int, log: IO[str]) -> None:
    if rank != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    faulthandler.enable(log)
    torch.set_num_threads(job.threads)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = job.interface
    for number in STOP_SIGNALS:
        signal.signal(number, _stop_before_training)
    # SIGINT is blocked from birth. What is pending came to the whole terminal group; if the launcher wants this rank to
    # stop before all have started, it kills it.
    signal.sigtimedwait({signal.SIGINT}, 0)
    job.started(rank).touch()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _call(job: Job) -> None:
    try:
        function, args = pickle.loads(job.call)
    except Exception as error:
        raise UsageError(
            f"the model, data or function cannot be made again in a new process ({error}): define them in a module "
            "that can be imported, or use launch.num_processes=1"
        ) from error
    function(*args)


def _stop_before_training(number: int, _: FrameType | None) -> None:
    raise Interrupted(f"stopped by {signal.Signals(number).name}", number)


def _outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return Outcome("done")
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("stopped by SIGINT", signal.SIGINT)
    return Outcome.of_error(error)


def _end(job: Job, rank: int, outcome: Outcome) -> None:
    """Without the interpreter's shutdown, which would wait for threads and collectives that never end."""
    sys.stdout.flush()
    sys.stderr.flush()
    outcome.write(job.outcome(rank))
    os._exit(outcome.exit_code or 1)


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, however that happens (Linux)."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(1)  # it ended before the line above
