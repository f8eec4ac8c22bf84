"""The process that talks to an object store on behalf of another: requests come by a pipe, answers go back by one.

It is a process of its own because the runtime of `obstore` (tokio) does not survive `fork`: a forked loader worker that
uses it after its parent did hangs for ever (measured, obstore 0.12.1). It also keeps TLS and HTTP out of the trainer's
interpreter. `stores.py` is the other end. Messages are msgpack behind a length of 4 bytes; the bytes of large ranges go
through shared memory that the other end made and inherits to this one.

Every request is tried again with exponential back-off and full jitter (Brooker, "Exponential Backoff And Jitter",
AWS 2015) until it succeeded, its time is over or its tries are; a server that throttles pauses all requests.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import struct
import sys
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import msgspec
import obstore
from obstore import exceptions
from obstore.store import from_url

from turbopump.data.addresses import masked
from turbopump.data.processes import become_helper

LENGTH = struct.Struct("<I")
GZIP = b"\x1f\x8b"
_LONGEST_DELAY_S = 10.0
_THROTTLED = (
    "status code: 503",
    "status code: 429",
    "SlowDown",
    "Slow Down",
    "TooManyRequests",
    "Too Many Requests",
    "RequestLimitExceeded",
)
_FINAL = (
    FileNotFoundError,
    exceptions.NotFoundError,
    exceptions.PermissionDeniedError,
    exceptions.UnauthenticatedError,
    exceptions.InvalidPathError,
    exceptions.UnknownConfigurationKeyError,
    ValueError,
)


class Request(msgspec.Struct, array_like=True):
    """`op`: get, size, range (answer in the message), fetch (answer in shared memory at `at`) or list."""

    number: int
    op: str
    key: str
    begin: int = 0
    end: int = 0
    at: int = 0


class Answer(msgspec.Struct, array_like=True):
    """`error` is what the server (or the library) said last, empty for a success."""

    number: int
    tries: int = 0
    throttled: int = 0
    error: str = ""
    final: bool = False
    value: Any = None


class Limits(msgspec.Struct):
    """How long to try; the fields are those of `stores.Limits`."""

    request_s: float
    stall_s: float
    retry_s: float
    first_delay_s: float
    max_tries: int


class Settings(msgspec.Struct):
    """What the process is started with. `memory_bytes` of shared memory are at file descriptor `memory`. `query` goes
    with every request, and is masked in every answer."""

    url: str
    config: dict[str, Any]
    client: dict[str, Any]
    limits: Limits
    memory: int
    memory_bytes: int
    query: str = ""


class _WrongLengthError(Exception):
    pass


class _CompressedError(ValueError):
    pass


class StoreServer:
    """Answers requests of one store; `answer` never raises."""

    def __init__(self, settings: Settings) -> None:
        limits, self._query = settings.limits, settings.query
        self._limits = limits
        self._paused_until = 0.0
        self._memory = memoryview(mmap.mmap(settings.memory, settings.memory_bytes))
        if settings.url.startswith("file:"):
            self._store: Any = from_url(settings.url)
            return
        client = {
            "timeout": timedelta(seconds=limits.request_s),
            "read_timeout": timedelta(seconds=limits.stall_s),
            **settings.client,
        }
        options: dict[str, Any] = {"client_options": client, "retry_config": {"max_retries": 0}}
        url, config = settings.url, settings.config
        if self._query and url.startswith("az:"):
            config = {**config, "sas_key": self._query}
        elif self._query:
            url = f"{url}?{self._query}"
        if config:
            options["config"] = config
        self._store = from_url(url, **options)

    async def answer(self, request: Request) -> Answer:
        work: Callable[[Request], Awaitable[Any]] = {
            "get": self._get, "size": self._size, "range": self._range, "fetch": self._fetch, "list": self._list,
        }[request.op]  # fmt: skip
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._limits.retry_s
        answer = Answer(request.number)
        while True:
            await asyncio.sleep(max(0.0, self._paused_until - clock()))
            answer.tries += 1
            try:
                async with asyncio.timeout(self._limits.request_s):
                    answer.value = await work(request)
                answer.error = ""
                return answer
            except TimeoutError:
                answer.error = f"no complete answer in {self._limits.request_s:g} s"
            except _FINAL as error:
                answer.error, answer.final = _said(error, self._query), True
                return answer
            except Exception as error:  # whatever else comes out of the library is the server's or the network's
                answer.error = _said(error, self._query)
            delay = min(_LONGEST_DELAY_S, self._limits.first_delay_s * 2**answer.tries) * random.random()
            if any(word in answer.error for word in _THROTTLED):
                answer.throttled += 1
                self._paused_until = max(self._paused_until, clock() + delay / 2)
            if answer.tries >= self._limits.max_tries or clock() + delay >= deadline:
                return answer
            await asyncio.sleep(delay)

    async def _get(self, request: Request) -> bytes:
        found = await obstore.get_async(self._store, request.key)
        data = bytes(await found.bytes_async())
        if found.attributes.get("Content-Encoding", "identity") != "identity" and data[:2] == GZIP:
            raise _CompressedError(
                "the server sent it compressed (Content-Encoding): store and serve the files of a dataset as they are"
            )
        if len(data) != found.meta["size"]:
            raise _WrongLengthError(f"{len(data)} bytes came of an object of {found.meta['size']}")
        return data

    async def _size(self, request: Request) -> int:
        return int((await obstore.head_async(self._store, request.key))["size"])

    async def _range(self, request: Request) -> Any:
        data = await obstore.get_range_async(self._store, request.key, start=request.begin, end=request.end)
        if len(data) != request.end - request.begin:
            raise _WrongLengthError(f"{len(data)} bytes came of {request.end - request.begin}")
        return data if request.op == "fetch" else bytes(data)

    async def _fetch(self, request: Request) -> None:
        data = memoryview(await self._range(request))
        self._memory[request.at : request.at + len(data)] = data

    async def _list(self, request: Request) -> list[tuple[str, int]]:
        found = []
        async for page in obstore.list(self._store, request.key or None):
            found += [(entry["path"], entry["size"]) for entry in page]
        return found


def _said(error: BaseException, query: str) -> str:
    """What a person can use of an error of the library: its first paragraph, in one line, without the query."""
    text = " ".join(str(error).split("\n\nDebug source")[0].split()) or type(error).__name__
    if query:
        text = masked(text, query)
        if "error sending request" in text:
            text += " (the server is not there, or redirects to another one, which is not followed with a query)"
    return text if len(text) <= 600 else text[:600] + "..."


async def serve(settings: Settings) -> None:
    """Answer what comes on standard input until it ends."""
    loop = asyncio.get_running_loop()
    encode, decode = msgspec.msgpack.encode, msgspec.msgpack.Decoder(Request).decode
    requests: asyncio.Queue[Request | None] = asyncio.Queue()
    try:
        server = StoreServer(settings)
    except Exception as error:  # an option of the wrong name or form
        _write(encode(Answer(-1, error=_said(error, settings.query), final=True)))
        return

    def receive() -> None:
        while (data := _read()) is not None:
            loop.call_soon_threadsafe(requests.put_nowait, decode(data))
        loop.call_soon_threadsafe(requests.put_nowait, None)

    async def work(request: Request) -> None:
        _write(encode(await server.answer(request)))

    threading.Thread(target=receive, daemon=True).start()
    at_work = set()
    while (request := await requests.get()) is not None:
        task = asyncio.create_task(work(request))
        at_work.add(task)
        task.add_done_callback(at_work.discard)


def _read() -> bytes | None:
    head = sys.stdin.buffer.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    data = sys.stdin.buffer.read(length)
    return data if len(data) == length else None


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(LENGTH.pack(len(data)) + data)
    sys.stdout.buffer.flush()


def main() -> None:
    """The one argument is the process to end with; the first message is the settings."""
    become_helper(int(sys.argv[1]))
    first = _read()
    if first is not None:
        with suppress(BrokenPipeError):  # nobody waits for answers any more
            asyncio.run(serve(msgspec.msgpack.decode(first, type=Settings)))
    os._exit(0)  # without waiting for requests under way


if __name__ == "__main__":
    main()
