"""Several processes on one host: ranks started, watched and ended through torch's elastic agent as a library.

`launch_local` runs a function on every rank and returns, or raises what a rank raised. The agent (`_Agent`) spawns;
`_Watch` decides: it passes a stop request on exactly once, kills at the second one, finds the rank that died first,
ends the others. Nothing listens beyond the loopback interface, and no process outlives the launcher. There are no
restarts: a resumed run is a new launch, so that the workers' store is always fresh.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch
from torch.distributed import HashStore, TCPStore
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.api import RendezvousHandler, RendezvousInfo, RendezvousStoreInfo

from turbopump.core.errors import RunDirectoryError, UsageError
from turbopump.core.files import explain_os_error
from turbopump.launch.watch import Watch
from turbopump.launch.worker import STOP_SIGNALS, Job, SharedBytes, run_rank

LOOPBACK = "127.0.0.1"
POLL_S = 0.1
NOT_GUARDED = (
    'this script starts the run again in every process it spawns: put the call under `if __name__ == "__main__":`, '
    "or use launch.num_processes=1"
)


def launch_local(
    function: Callable[..., None],
    args: Sequence[Any] = (),
    *,
    num_processes: int,
    threads: int = 0,
    timeout_s: float = 600.0,
    log_dir: Path | None = None,
) -> None:
    """Run `function(*args)` in `num_processes` ranks on this host (in this process where it is one).

    `threads`: CPU threads a rank computes with; 0 shares the cores evenly. `timeout_s`: seconds the ranks have to
    start. `log_dir`: rank 0 writes to the terminal, the others to `rank<r>.log` there; None: a temporary directory
    that stays when the launch fails.

    Raises what a rank raised where that is a `TurbopumpError`; `RankError` where a rank died or failed otherwise;
    `Interrupted` after SIGINT or SIGTERM; `UsageError` where `function` or `args` cannot be sent to another process.
    """
    if num_processes < 1:
        raise UsageError(f"num_processes ({num_processes}) must be at least 1")
    if num_processes == 1:
        if threads:
            torch.set_num_threads(threads)
        function(*args)
        return
    _refuse_to_start_again()
    call = SharedBytes(_pickled(function, args))
    control = Path(tempfile.mkdtemp(prefix="turbopump-"))
    logs = log_dir if log_dir is not None else control
    try:
        _make(logs)
        job = Job(call, control, logs, threads or cores_per_rank(num_processes), os.getpid(), loopback_interface())
        _run(job, num_processes, timeout_s)
    finally:
        call.close()
        if log_dir is not None or sys.exc_info()[0] is None:
            shutil.rmtree(control, ignore_errors=True)


def cores_per_rank(num_processes: int) -> int:
    """Threads for each of `num_processes` ranks: the cores this process may use, shared evenly, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // num_processes)


def loopback_interface() -> str:
    """Name of the network interface that has 127.0.0.1."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == LOOPBACK for address in addresses):
            return name
    raise UsageError(f"no network interface has {LOOPBACK}, which several processes need: use launch.num_processes=1")


def _run(job: Job, num_processes: int, timeout_s: float) -> None:
    spec = WorkerSpec(
        role="rank",
        local_world_size=num_processes,
        entrypoint=run_rank,
        args=(job,),
        rdzv_handler=_Loopback(),
        max_restarts=0,
        monitor_interval=POLL_S,
    )
    watch = Watch(job, num_processes, timeout_s)
    # The agent's log files stay empty: ranks send both their streams to one file themselves (worker.py).
    with tempfile.TemporaryDirectory(prefix="turbopump-agent-") as scratch, _quiet_agent(), _signals(watch):
        _Agent(spec, DefaultLogsSpecs(log_dir=scratch), watch, shutdown_timeout=5).run()
    watch.verdict()


class _Agent(LocalElasticAgent):
    """torch's agent for the ranks of one host, which asks `Watch` what to make of their state."""

    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, watch: Watch, shutdown_timeout: int) -> None:
        super().__init__(spec, logs_specs, shutdown_timeout=shutdown_timeout)
        self._watch = watch

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        with _birth_conditions(self._watch.job.threads):
            pids = super()._start_workers(worker_group)
        self._watch.pids = dict(pids)
        return pids

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        # The base class ends the others with SIGTERM, which a rank takes as "finish your step", and waits 30 s.
        if not self._watch.is_over():
            return RunResult(state=WorkerState.HEALTHY)
        return super()._monitor_workers(worker_group)


class _Loopback(RendezvousHandler):
    """A rendezvous of this host with itself: no network for the agent, a loopback TCPStore for the workers.

    torch's own rendezvous listen on all interfaces and hand the agent's store on to the workers.
    """

    def __init__(self) -> None:
        self._run_id = uuid.uuid4().hex
        self._workers_store: TCPStore | None = None

    def get_backend(self) -> str:
        return "loopback"

    @property
    def use_agent_store(self) -> bool:
        return True  # workers connect to the store made here instead of serving one, which would listen everywhere

    def next_rendezvous(self) -> RendezvousInfo:
        listener = socket.create_server((LOOPBACK, 0), backlog=1024)
        port = listener.getsockname()[1]
        self._workers_store = TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=60),
            master_listen_fd=listener.detach(),
        )
        return RendezvousInfo(HashStore(), 0, 1, RendezvousStoreInfo(LOOPBACK, port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        return

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        self._workers_store = None
        return True


@contextmanager
def _birth_conditions(threads: int) -> Iterator[None]:
    """What spawned processes inherit: the number of threads, read while torch is imported, and SIGINT blocked, so that
    Ctrl-C at the terminal does not hit them before they have left its process group."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    resource_tracker.ensure_running()  # starting it unblocks SIGINT
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


@contextmanager
def _signals(watch: Watch) -> Iterator[None]:
    """Stop signals go to `watch` while the ranks run; the handlers before it come back afterwards."""
    variable = "TORCHELASTIC_SIGNALS_TO_HANDLE"
    before = os.environ.get(variable)
    os.environ[variable] = "SIGUSR2"  # the agent insists on a handler of its own: let it take one that is not needed
    handlers: dict[int, Any] = {}

    def handle(number: int, _: FrameType | None) -> None:
        watch.request_stop(number)

    try:
        for taken in (*STOP_SIGNALS, signal.SIGUSR2):
            handlers[taken] = signal.getsignal(taken)
        for taken in STOP_SIGNALS:
            signal.signal(taken, handle)
    except ValueError:  # not the main thread: signals stay with whoever handles them there
        handlers.clear()
    try:
        yield
    finally:
        for restored, handler in handlers.items():
            signal.signal(restored, handler)
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before


@contextmanager
def _quiet_agent() -> Iterator[None]:
    """The agent logs a traceback for each rank that ends badly, and events; the launcher says it in one line."""

    def drop(_: logging.LogRecord) -> bool:
        return False

    names = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    loggers = [logging.getLogger(name) for name in [*names, "torchelastic-events-null"]]
    for logger in loggers:
        logger.addFilter(drop)  # not a level: the agent sets levels itself, late
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(drop)


def _make(log_dir: Path) -> None:
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(explain_os_error(error, log_dir)) from error


def _pickled(function: Callable[..., None], args: Sequence[Any]) -> bytes:
    """In memory only. Plain pickle: multiprocessing's would move tensors to memory that all ranks share."""
    try:
        return pickle.dumps((function, tuple(args)))
    except Exception as error:
        raise UsageError(
            f"the model, data or function cannot be sent to other processes ({error}): define classes and functions at "
            "the top level of a module instead of inside a function, or use launch.num_processes=1"
        ) from error


def _refuse_to_start_again() -> None:
    """A spawned process imports the main script; one without a guard comes back here."""
    if getattr(multiprocessing.process.current_process(), "_inheriting", False):
        print(NOT_GUARDED, file=sys.stderr, flush=True)
        os._exit(UsageError.exit_code)
