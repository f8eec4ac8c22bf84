"""One peer in a process of its own: JSON lines in, JSON lines out, run in the peers' environment.

    python -m benchmarks.data_peer_worker "LMDB"

    {"do": "hello"}                                                           -> {"version": "3.0.0"}
    {"do": "write", "raw": [path, record_bytes, count], "to": dir, "tokens": false}
                                                             -> {"seconds": 1.2, "sync_s": 0.3, "bytes": 104857600}
    {"do": "open", "raw": [...], "from": dir, "tokens": false}                -> {}
    {"do": "read", "seed": 1, "batches": 100, "batch": 256}                   -> {"seconds": 0.1, "digest": "..."}
    {"do": "loader", "raw": [...], "from": dir, "tokens": false, "way": name, "workers": 2, "batch": 256,
     "budget_s": 3.0}                                        -> {"records_per_s": 1e5, "timed_s": 3.0, "batches": 1200}

Any failure is {"error": "..."}. Nothing of turbopump is imported.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.data_peer_loaders import Job, read_rate, steady_rate
from benchmarks.data_peer_records import Raw
from benchmarks.data_peer_stores import STORES, TOKEN_STORES, Store

TORCH = "2.13.0"  # packages of peers have been seen to replace it


class Peer:
    """What the lines ask for, one method each."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._opened: tuple[Store, Raw] | None = None

    def hello(self) -> dict[str, Any]:
        if version("torch").split("+")[0] != TORCH:
            raise RuntimeError(f"torch {version('torch')} is installed beside the peers: {TORCH} is compared")
        store = STORES[self._name]()
        store.load()
        return {"version": version(store.package)}

    def write(self, raw: list[Any], to: str, tokens: bool) -> dict[str, Any]:
        source, store = Raw(*raw), self._store(tokens)
        begin = time.perf_counter()
        store.write(source.records(), Path(to), source.record_bytes)
        seconds = time.perf_counter() - begin
        files = [path for path in Path(to).rglob("*") if path.is_file()]
        begin = time.perf_counter()
        for path in files:
            _sync(path)
        sync_s = time.perf_counter() - begin
        return {"seconds": seconds, "sync_s": sync_s, "bytes": sum(path.stat().st_blocks * 512 for path in files)}

    def open(self, raw: list[Any], tokens: bool, **given: str) -> dict[str, Any]:
        source, store = Raw(*raw), self._store(tokens)
        store.open(Path(given["from"]), source.record_bytes)
        self._opened = store, source
        return {}

    def read(self, seed: int, batches: int, batch: int) -> dict[str, Any]:
        if self._opened is None:
            raise RuntimeError("nothing is open")
        seconds, digest = read_rate(*self._opened, seed, batches, batch)
        return {"seconds": seconds, "digest": digest}

    def loader(
        self, raw: list[Any], tokens: bool, way: str, workers: int, batch: int, budget_s: float, **given: str
    ) -> dict[str, Any]:
        job = Job(self._name, given["from"], Raw(*raw), tokens, workers, batch)
        return dict(steady_rate(job, way, budget_s))

    def _store(self, tokens: bool) -> Store:
        store = (TOKEN_STORES if tokens else STORES)[self._name]()
        store.load()
        return store


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def answer(peer: Peer, request: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to one line; whatever goes wrong in a library is its text."""
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "hello": peer.hello, "write": peer.write, "open": peer.open, "read": peer.read, "loader": peer.loader,
    }  # fmt: skip
    try:
        return actions[request["do"]](**{key: value for key, value in request.items() if key != "do"})
    except (Exception, SystemExit) as error:
        first_line = str(error).strip().split("\n")[0]
        return {"error": f"{type(error).__name__}: {first_line}"}


def main() -> None:
    warnings.filterwarnings("ignore")
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no reply
    peer = Peer(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        replies.write(json.dumps(answer(peer, request)) + "\n")
        if request["do"] == "loader":
            break  # threads and iterators of a loader that was abandoned: never another measurement in this process


if __name__ == "__main__":
    main()
