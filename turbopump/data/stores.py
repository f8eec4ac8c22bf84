"""Objects in S3, Google Cloud Storage, Azure, behind HTTP or in a directory: `open_store("s3://bucket/prefix")`.

    store.get(key)                      a whole small object
    store.size(key)                     its bytes
    store.get_range(key, begin, end)    a part of it
    store.list(prefix)                  keys and sizes, where the store can say (plain HTTP cannot)
    store.fetch(key, begin, end, at)    a part into `store.memory`, without waiting: a `Future` of the number of tries

Every answer has the length that was asked for, or is an error. The work is done by a helper process (why: see
`store_process.py`), one for each process that uses the store, started when first needed, so a store may be opened
before `fork` and used after it. The helper ends with the process it belongs to.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from turbopump.core.errors import MissingDependencyError, RemoteError, UsageError
from turbopump.data.addresses import address_problem, check_query, default_query, to_one_host

# Where a store takes its server from: the option, and the variables of the environment that obstore reads.
_ENDPOINTS = {
    "s3": ("endpoint", "AWS_ENDPOINT_URL"),
    "gs": ("base_url", "GOOGLE_BASE_URL"),
    "az": ("endpoint", "AZURE_STORAGE_ENDPOINT"),
}
MEMORY_BYTES = 128 << 20  # room for ranges under way; pages that were never used cost nothing
_LENGTH_BYTES = 4


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long a store tries. Seconds: for one request, between two pieces of its body, for all tries together, and
    what the wait before the second try is drawn from (twice as long with each further one, ten seconds at most)."""

    request_s: float = 60.0
    stall_s: float = 10.0
    retry_s: float = 120.0
    first_delay_s: float = 0.1
    max_tries: int = 10

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} ({getattr(self, name)}) must be > 0")


def open_store(
    url: str, *, anonymous: bool = False, query: str = "", limits: Mapping[str, float] | None = None, **options: Any
) -> Store:
    """The store at `url` (s3://, gs://, az://, http://, https:// or file://, with an optional prefix).

    `anonymous` asks public buckets without credentials. `query` (`sv=...&sig=...`; az, http and https) goes with every
    request, see `addresses`. `limits` are fields of `Limits`. `options` go to obstore as they are: `endpoint`,
    `region`, `account_name`, ..., and `client_options` (a proxy, a root certificate). What is not given, obstore takes
    from the usual environment (AWS_ACCESS_KEY_ID, AWS_REGION, AWS_ENDPOINT_URL, GOOGLE_..., AZURE_...). Raises
    `UsageError` for another scheme, a query of one file or wrong limits, `MissingDependencyError` without obstore.
    """
    if problem := address_problem(url):
        raise UsageError(problem)
    scheme = urlsplit(url).scheme
    if importlib.util.find_spec("obstore") is None:
        raise MissingDependencyError("obstore", "remote", f"reading {scheme}://")
    try:
        checked = msgspec.convert(dict(limits or {}), Limits, strict=False)
    except (msgspec.ValidationError, ValueError) as error:
        raise UsageError(f"limits of {url}: {error}; fields are {', '.join(Limits.__struct_fields__)}") from error
    client = dict(options.pop("client_options", {}))
    option, variable = _ENDPOINTS.get(scheme, ("", ""))
    endpoint = str(options.pop("endpoint", "") or options.pop(option, "") or os.environ.get(variable, ""))
    if endpoint and option:
        if problem := address_problem(endpoint, ("http", "https")):
            raise UsageError(f"endpoint of {url}: {problem}")
        options[option] = endpoint
    if (endpoint or url).startswith("http://"):  # who names an address without TLS means it
        client.setdefault("allow_http", True)
    if anonymous and scheme in _ENDPOINTS:
        options["skip_signature"] = True
    elif query := query or default_query(scheme):
        check_query(query, scheme)
        client |= to_one_host(url, endpoint, client)
    return Store(url.rstrip("/"), options, client, checked, query)


class Store:
    """One prefix of an object store; safe in threads, and again after `fork`. Errors are `RemoteError`s.

    `statistics`: requests (tries included), tries beyond the first, answers that said to slow down, bytes.
    """

    def __init__(
        self, url: str, config: dict[str, Any], client: dict[str, Any], limits: Limits, query: str = ""
    ) -> None:
        self.url = url
        self.statistics = {"requests": 0, "retries": 0, "throttled": 0, "bytes": 0}
        self._settings = {"url": url, "config": config, "client": client, "limits": msgspec.to_builtins(limits),
                          "query": query}  # fmt: skip
        self._helper: _Helper | None = None
        self._memory: tuple[int, memoryview] | None = None
        self._lock = threading.Lock()
        _stores.add(self)

    @property
    def memory(self) -> memoryview:
        """`MEMORY_BYTES` that `fetch` writes to; of this process alone."""
        with self._lock:
            return self._shared_memory()[1]

    def get(self, key: str) -> bytes:
        """All bytes of a small object."""
        data: bytes = self._ask("get", key)
        return data

    def size(self, key: str) -> int:
        """Bytes of an object."""
        return int(self._ask("size", key))

    def get_range(self, key: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of an object."""
        return self.start_range(key, begin, end).result()

    def start_range(self, key: str, begin: int, end: int) -> Future[bytes]:
        """The same without waiting."""
        if not 0 <= begin < end:
            raise UsageError(f"{self.url}/{key}: no such range: {begin}..{end}")
        return self._send("range", key, begin, end, 0)

    def list(self, prefix: str = "") -> list[tuple[str, int]]:
        """(key, bytes) of every object below `prefix`, in order of the keys. `UsageError` for plain HTTP."""
        if self.url.startswith("http"):
            raise UsageError(f"{self.url}: plain HTTP cannot list what is there: name the objects")
        return sorted((str(key), int(size)) for key, size in self._ask("list", prefix))

    def fetch(self, key: str, begin: int, end: int, at: int) -> Future[int]:
        """Start to fetch [begin, end) to `memory[at:]`. The result is the number of tries."""
        return self._send("fetch", key, begin, end, at)

    def close(self) -> None:
        """End the helper; a later call starts another."""
        with self._lock:
            helper, self._helper = self._helper, None
        if helper is not None:
            helper.close()

    def _ask(self, op: str, key: str, begin: int = 0, end: int = 0) -> Any:
        return self._send(op, key, begin, end, 0).result()

    def _send(self, op: str, key: str, begin: int, end: int, at: int) -> Future[Any]:
        if not (op == "list" and not key):
            check_key(self.url, key)
        return self._process().send(op, key, begin, end, at)

    def _process(self) -> _Helper:
        with self._lock:
            if self._helper is None or self._helper.dead:
                self._helper = _Helper(self, self._shared_memory()[0])
            return self._helper

    def _shared_memory(self) -> tuple[int, memoryview]:
        if self._memory is None:
            handle = os.memfd_create("turbopump-ranges")
            os.ftruncate(handle, MEMORY_BYTES)
            self._memory = handle, memoryview(mmap.mmap(handle, MEMORY_BYTES))
        return self._memory

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self.statistics = dict.fromkeys(self.statistics, 0)
        if self._memory is not None:
            os.close(self._memory[0])
            self._memory = None
        if self._helper is not None:
            self._helper.leave_to_parent()
            self._helper = None


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _forked() -> None:
    for store in _stores:
        store._after_fork()


os.register_at_fork(after_in_child=_forked)


def check_key(url: str, key: str) -> None:
    """Raises `UsageError` for a key that could leave its prefix or is no name at all."""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts) or "\\" in key or any(ord(c) < 32 or c in "?#" for c in key):
        raise UsageError(f"{key!r} is no key below {url}: names divided by '/', without '.', '..', '\\', '?' or '#'")


class _Helper:
    """The helper process of this process, and the thread that hands out its answers."""

    def __init__(self, store: Store, memory: int) -> None:
        self._store = store
        self._waiting: dict[int, tuple[Future[Any], tuple[Any, ...]]] = {}
        self._lock = threading.Lock()
        self._number = 0
        self._refused_settings = ""
        self.dead = False
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-P", "-m", "turbopump.data.store_process", str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(memory,),
                env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise RemoteError(f"{store.url}: the process that reads it cannot be started: {error}") from error
        settings = {**store._settings, "memory": memory, "memory_bytes": MEMORY_BYTES}
        self._write(msgspec.msgpack.encode(settings))
        self._thread = threading.Thread(target=self._hand_out, name=f"answers of {store.url}", daemon=True)
        self._thread.start()

    def send(self, op: str, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._number += 1
            number = self._number
            self._waiting[number] = (future, (op, *arguments))
            dead = self.dead
        if dead:
            self._fail_all()
        else:
            self._write(msgspec.msgpack.encode([number, op, *arguments]))
        return future

    def close(self) -> None:
        self.dead = True
        with suppress(OSError):
            self._process.kill()
        self._process.wait()
        if threading.current_thread() is not self._thread:  # what has come is handed out before `close` returns
            self._thread.join(timeout=1)

    def leave_to_parent(self) -> None:
        """In a forked child: let go of the pipes, without a word to the process at their other end."""
        self.dead = True
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                os.close(os.dup2(os.open(os.devnull, os.O_RDWR), pipe.fileno()))
        self._process.returncode = 0  # it is not ours to wait for

    def _write(self, data: bytes) -> None:
        assert self._process.stdin is not None
        with self._lock, suppress(BrokenPipeError):  # its end is seen by who reads
            self._process.stdin.write(len(data).to_bytes(_LENGTH_BYTES, "little") + data)
            self._process.stdin.flush()

    def _hand_out(self) -> None:
        assert self._process.stdout is not None
        pipe = self._process.stdout
        while len(head := pipe.read(_LENGTH_BYTES)) == _LENGTH_BYTES:
            data = pipe.read(int.from_bytes(head, "little"))
            with suppress(msgspec.DecodeError):
                number, tries, throttled, error, final, value = msgspec.msgpack.decode(data)
                if number < 0:
                    self._refused_settings = error
                else:
                    self._finish(number, tries, throttled, error, final, value)
        self._fail_all()

    def _finish(self, number: int, tries: int, throttled: int, error: str, final: bool, value: Any) -> None:
        with self._lock:
            future, request = self._waiting.pop(number)
        counts = self._store.statistics
        counts["requests"] += tries
        counts["retries"] += tries - 1
        counts["throttled"] += throttled
        counts["bytes"] += len(value) if request[0] in ("get", "range") and not error else 0
        counts["bytes"] += request[3] - request[2] if request[0] == "fetch" and not error else 0
        if error:
            future.set_exception(_refused(self._store.url, request, tries, error, final))
        else:
            future.set_result(tries if request[0] == "fetch" else value)

    def _fail_all(self) -> None:
        with self._lock:
            self.dead = True
            waiting, self._waiting = self._waiting, {}
        url = self._store.url
        for future, _ in waiting.values():
            if self._refused_settings:
                future.set_exception(UsageError(f"{url}: an option does not fit: {self._refused_settings}"))
            else:
                future.set_exception(
                    RemoteError(f"{url}: the process that reads it has died: the next read starts one")
                )


def _refused(url: str, request: tuple[Any, ...], tries: int, error: str, final: bool) -> RemoteError:
    op, key, begin, end, _ = request
    what = f"{url}/{key}" + (f", bytes {begin}..{end}" if op in ("range", "fetch") else "")
    times = f"after {tries} tries" if tries > 1 else "at once"
    todo = (
        "check the address, the permissions and the credentials (anonymous = true for public buckets)"
        if final or any(word in error for word in ("status code: 40", "credential"))
        else "the server is not well or the network is not: try again later, or give more time (limits.retry_s)"
    )
    return RemoteError(f"{what}: given up {times}: {error}. What to do: {todo}")
