"""The peers of the benchmark `data`: an environment of their own, a process each, and what they are asked.

    peers = installed_peers()                                  # installs once; one that fails is there, and `absent`
    raw = write_raw(scratch / "raw", 2048, 100_000)
    for peer in peers:
        if not peer.absent:
            peer.write(raw, scratch / peer.slug)               # Written(seconds, sync_s, num_bytes)
            peer.open(raw, scratch / peer.slug)
            seconds, digest = peer.read(seed, batches, 256)    # in turns with ours; digest == expected_digest(...)
    loader_rates("LMDB", raw, directory, workers=2, batch=256, budget_s=3.0)       # {way: records/s}; the best counts
    close_all(peers)

A process waits idle between questions. Its home and temporary directory are scratch ones that go when it ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.data_peer_loaders import ways
from benchmarks.data_peer_records import Raw
from benchmarks.data_peer_stores import STORES

ROOT = Path(__file__).parents[1]
ENVIRONMENT = Path(__file__).parent / ".peers" / "data-venv"
# Together: MosaicML Streaming wants numpy < 2.2 and xxhash < 4, HF datasets this fsspec. The last constraint keeps out
# torch's CUDA build, as in the Makefile.
PACKAGES = {
    "MosaicML Streaming": ("mosaicml-streaming==0.13.0",),
    "LitData": ("litdata==0.2.76",),
    "ArrayRecord": ("array_record==0.8.6",),
    "Grain": ("grain==0.2.18", "array_record==0.8.6"),
    "HF datasets": ("datasets==5.0.1",),
    "Lance": ("pylance==14.0.2",),
    "LMDB": ("lmdb==3.0.0",),
    "WebDataset": ("webdataset==1.0.2",),
    "Arrow take": ("pyarrow==26.0.1",),
    "np.memmap": ("numpy==2.1.3",),
}
SHARED = ("torch==2.13.0", "numpy==2.1.3", "pyarrow==26.0.1")
CONSTRAINTS = (*SHARED, "fsspec==2026.6.0", "s3fs==2026.6.0", "xxhash==3.8.2", "cuda-toolkit<0")
REPLY_S = 600.0  # a write of the largest set takes a minute; beyond ten something hangs
LOADER_REPLY_S = 180.0  # beyond what it measures: a loader that hangs costs no more than this
END_S = 10.0


class PeerError(RuntimeError):
    """A peer's process failed, hung, or answered with an error; the text says what."""


# ---- the environment


def install() -> dict[str, str]:
    """Make the peers' environment, once; peers that could not be installed, by name, with the reason.

    All at once; where that fails, one after another, so that one peer does not keep out the others.
    """
    stamp = ENVIRONMENT / "installed.json"
    wanted = {"packages": PACKAGES, "constraints": CONSTRAINTS}
    if stamp.exists():
        found = json.loads(stamp.read_text(encoding="utf-8"))
        if found["wanted"] == json.loads(json.dumps(wanted)):
            return found["absent"]
    made = _run(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT))
    if made:
        return dict.fromkeys(PACKAGES, made)
    constraints = ENVIRONMENT / "constraints.txt"
    constraints.write_text("\n".join(CONSTRAINTS) + "\n", encoding="utf-8")
    everything = sorted({package for some in PACKAGES.values() for package in some} | set(SHARED))
    absent = {}
    if _pip(everything):
        problem = _pip(SHARED)
        absent = {name: problem or _pip([*SHARED, *some]) for name, some in PACKAGES.items()}
    absent = {name: problem for name, problem in absent.items() if problem}
    if len(absent) < len(PACKAGES):
        stamp.write_text(json.dumps({"wanted": wanted, "absent": absent}), encoding="utf-8")
    return absent


def _pip(packages: Sequence[str]) -> str:
    """Install; the reason where that fails. Torch stays what it is, whatever a peer wants."""
    constraints = str(ENVIRONMENT / "constraints.txt")
    return _run(str(ENVIRONMENT / "bin" / "pip"), "install", "-q", "-c", constraints, *packages)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    errors = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
    return (errors or ["failed"])[-1] if done.returncode else ""


# ---- a peer


@dataclass(frozen=True)
class Written:
    """How long packing took in one process: until the writer was closed, and then until the bytes were on disk."""

    seconds: float
    sync_s: float
    num_bytes: int


class Peer:
    """One peer in a process of its own. `absent` says why it is not there; `reads`: it can read by number at all."""

    def __init__(self, name: str, absent: str | None = None) -> None:
        self.name, self.absent, self.version = name, absent, ""
        self.slug = slug(name)
        self.reads, self.building_block = STORES[name].reads, STORES[name].building_block
        self._process: _Process | None = None
        if absent is None:
            try:
                self._process = _Process(name)
                self.version = self._ask("hello")["version"]
            except PeerError as error:
                self.absent = str(error)
                self.close()

    def write(self, raw: Raw, directory: Path, *, tokens: bool = False) -> Written:
        """Pack the records of a raw file into a directory that does not exist yet, in one process."""
        reply = self._ask("write", raw=_raw(raw), to=str(directory), tokens=tokens)
        return Written(reply["seconds"], reply["sync_s"], reply["bytes"])

    def open(self, raw: Raw, directory: Path, *, tokens: bool = False) -> None:
        """Open what was packed; `read` reads from it."""
        self._ask("open", **{"raw": _raw(raw), "from": str(directory), "tokens": tokens})

    def read(self, seed: int, batches: int, batch: int) -> tuple[float, str]:
        """Read `batches` random batches: seconds, and the digest that `expected_digest` foretells."""
        reply = self._ask("read", seed=seed, batches=batches, batch=batch)
        return reply["seconds"], reply["digest"]

    def close(self) -> None:
        if self._process is not None:
            self._process.end()
            self._process = None

    def _ask(self, do: str, **given: Any) -> dict[str, Any]:
        if self._process is None:
            raise PeerError(f"{self.name} is absent: {self.absent or 'closed'}")
        return self._process.ask({"do": do, **given})


def installed_peers(names: Sequence[str] = tuple(STORES)) -> list[Peer]:
    """All peers, started; those that did not install or do not load are there too, and `absent`."""
    absent = install()
    return [Peer(name, absent.get(name)) for name in names]


def close_all(peers: Sequence[Peer]) -> None:
    for peer in peers:
        peer.close()


def loader_rates(
    name: str, raw: Raw, directory: Path, *, workers: int, batch: int, budget_s: float, tokens: bool = False
) -> dict[str, float]:
    """Steady records/s of each of a peer's loaders, by its name, each in a fresh process. Ways that fail are left out.

    Raises `PeerError` where none works.
    """
    rates, problem = {}, ""
    for way in ways(name, tokens=tokens, workers=workers):
        process = _Process(name)
        try:
            request: dict[str, Any] = {
                "do": "loader",
                "raw": _raw(raw),
                "from": str(directory),
                "tokens": tokens,
                "way": way,
            }
            request |= {"workers": workers, "batch": batch, "budget_s": budget_s}
            reply = process.ask(request, LOADER_REPLY_S + 5 * budget_s)
            rates[way] = reply["records_per_s"]
        except PeerError as error:
            problem = str(error)
            print(f"{name}, {way}, {workers} workers: {problem}", file=sys.stderr)
        finally:
            process.end()
    if not rates:
        raise PeerError(problem)
    return rates


def slug(name: str) -> str:
    """A name as part of a path."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _raw(raw: Raw) -> list[Any]:
    return [raw.path, raw.record_bytes, raw.count]


class _Process:
    """A worker, its scratch directory, and the lines between."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._scratch = tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True)
        scratch = self._scratch.name
        self._errors = open(Path(scratch) / "stderr", "w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        environment = {key: value for key, value in os.environ.items() if key not in ("OMP_NUM_THREADS", "PYTHONPATH")}
        environment |= {"HOME": scratch, "TMPDIR": scratch, "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": scratch}
        python = str(ENVIRONMENT / "bin" / "python")
        try:
            self._process = subprocess.Popen(
                [python, "-m", "benchmarks.data_peer_worker", name], cwd=ROOT, env=environment, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            self._scratch.cleanup()
            raise PeerError(f"{name} does not start: {error}") from error

    def ask(self, request: dict[str, Any], reply_s: float | None = None) -> dict[str, Any]:
        """The reply to one request; `PeerError` for an error, an end, or none within `reply_s` (`REPLY_S`)."""
        reply_s = REPLY_S if reply_s is None else reply_s
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerError(f"{self._name} ended: {self._last_error()}") from None
        if not select.select([self._process.stdout], [], [], reply_s)[0]:
            self._kill()
            raise PeerError(f"{self._name} did not answer {request['do']!r} within {reply_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise PeerError(f"{self._name} ended: {self._last_error()}")
        reply = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self._name}: {reply['error']}")
        return reply

    def end(self) -> None:
        """Let it end by itself, then end it and whatever it started."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_S)
        self._kill()
        self._process.stdout.close()
        self._errors.close()
        self._scratch.cleanup()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its own session: nothing else is in it
        self._process.wait()

    def _last_error(self) -> str:
        time.sleep(0.05)
        self._errors.flush()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return lines[-1][:300] if lines else "without a word"
