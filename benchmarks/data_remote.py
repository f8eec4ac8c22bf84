"""The first epoch of a remote dataset through a small cache: useful bytes a second over min(local speed, link).

A server of ranges in a process of its own waits 50 ms before each answer and sends no faster than the link; the data
are random bytes in objects of 64 MB, the cache holds a quarter of them. The order permutes blocks of 4 MiB and shuffles
12 KB records within windows of three blocks; batches of 256 are read with prefetch along that order. The link is what a
plain parallel downloader gets in the same run (the better of ranges of 1 and 4 MiB), the local speed that of the same
reader over a cache that holds everything. Each in turns, in fresh processes.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.data.block_cache import BlockCache
from turbopump.data.remote import RemoteReader
from turbopump.data.stores import MEMORY_BYTES, open_store

RECORD_BYTES, BATCH = 12 << 10, 256
ORDER_BLOCK_BYTES, WINDOW_BLOCKS = 4 << 20, 3
LATENCY_S, LINK_BYTES_PER_S = 0.05, 200 << 20
OBJECT_BYTES = 64 << 20


def measure_remote(quick: bool, link_bytes_per_s: int = LINK_BYTES_PER_S) -> dict[str, Any]:
    """Ratios and rates of every round: `ratio`, `epoch_bytes_per_s`, `link_bytes_per_s`, `local_bytes_per_s`,
    `waited_share`, `requests`, `fetched_over_data`."""
    num_objects, rounds = 4, 2 if quick else 7
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="turbopump-remote-") as scratch:
        root = Path(scratch)
        for i in range(num_objects):
            (root / str(i)).write_bytes(np.random.default_rng(i).bytes(OBJECT_BYTES))
        port, server = _start_server(root, link_bytes_per_s)
        url, data_bytes = f"http://127.0.0.1:{port}", num_objects * OBJECT_BYTES
        try:
            for _ in range(rounds):
                links = [_in_process(partial(_download, url, num_objects, part)) for part in (1 << 20, 4 << 20)]
                link = max(one["bytes_per_s"] for one in links)
                epoch = _in_process(partial(_epoch, url, num_objects, root / "cache", data_bytes // 4))
                local = _in_process(partial(_again, url, num_objects, root / "whole", data_bytes * 5 // 4))
                shutil.rmtree(root / "cache")
                bound = min(link, local["bytes_per_s"])
                row = {
                    "ratio": epoch["bytes_per_s"] / bound,
                    "epoch_bytes_per_s": epoch["bytes_per_s"],
                    "link_bytes_per_s": link,
                    "local_bytes_per_s": local["bytes_per_s"],
                    "waited_share": epoch["wait_s"] / epoch["elapsed_s"],
                    "requests": epoch["requests"],
                    "fetched_over_data": epoch["fetched_bytes"] / data_bytes,
                }
                for name, value in row.items():
                    results.setdefault(name, []).append(value)
        finally:
            server.kill()
            server.join()
    return {
        "rounds": rounds,
        "link_limit_bytes_per_s": link_bytes_per_s,
        "data_bytes": data_bytes,
        "cache_bytes": data_bytes // 4,
        **results,
    }


def order_of(num_objects: int, seed: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches (handles, offsets, lengths) of one epoch: blocks permuted, records shuffled within windows of blocks."""
    random = np.random.default_rng(seed)
    in_block, per_object = ORDER_BLOCK_BYTES // RECORD_BYTES, OBJECT_BYTES // ORDER_BLOCK_BYTES
    blocks = random.permutation(num_objects * per_object)
    records = []
    for begin in range(0, len(blocks), WINDOW_BLOCKS):
        window = blocks[begin : begin + WINDOW_BLOCKS]
        records.append(random.permutation((window[:, None] * in_block + np.arange(in_block)).ravel()))
    stream = np.concatenate(records)
    for begin in range(0, len(stream), BATCH):
        batch = stream[begin : begin + BATCH]
        handles, block = np.divmod(batch // in_block, per_object)
        offsets = block * ORDER_BLOCK_BYTES + batch % in_block * RECORD_BYTES
        yield handles.astype(np.int32), offsets, np.full(len(batch), RECORD_BYTES, np.int64)


def _epoch(url: str, num_objects: int, directory: Path, cache_bytes: int) -> dict[str, float]:
    window_bytes = WINDOW_BLOCKS * ORDER_BLOCK_BYTES
    store = open_store(url)
    reader = RemoteReader(store, BlockCache(directory, cache_bytes), window_bytes=2 * window_bytes)
    for i in range(num_objects):
        reader.open(str(i), OBJECT_BYTES)
    store.get_range("0", 0, 1)  # the helper has started
    result = _read_all(reader, list(order_of(num_objects)), ahead=2 * window_bytes // (BATCH * RECORD_BYTES) + 2)
    reader.close()
    return result


def _again(url: str, num_objects: int, directory: Path, cache_bytes: int) -> dict[str, float]:
    """The same over a cache that has all of it: the local speed."""
    if not directory.exists():
        _epoch(url, num_objects, directory, cache_bytes)
    return _epoch(url, num_objects, directory, cache_bytes)


def _read_all(reader: RemoteReader, batches: list[Any], ahead: int) -> dict[str, float]:
    begin, num_bytes = time.perf_counter(), 0
    for batch in batches[:ahead]:
        reader.prefetch(*batch)
    for i, batch in enumerate(batches):
        if i + ahead < len(batches):
            reader.prefetch(*batches[i + ahead])
        reader.read(*batch)
        num_bytes += int(batch[2].sum())
    elapsed_s = time.perf_counter() - begin
    return {**reader.statistics(), "elapsed_s": elapsed_s, "bytes_per_s": num_bytes / elapsed_s}


def _download(url: str, num_objects: int, part: int) -> dict[str, float]:
    """Every object in ranges of `part` bytes, 32 at once, in order, kept nowhere: what the link gives."""
    store = open_store(url)
    store.get_range("0", 0, 1)
    lanes = MEMORY_BYTES // (4 << 20)
    work = [(str(i), at) for i in range(num_objects) for at in range(0, OBJECT_BYTES, part)]
    begin = time.perf_counter()
    flying: list[Future[int]] = []
    for number, (key, at) in enumerate(work):
        if number >= lanes:
            flying[number - lanes].result()
        flying.append(store.fetch(key, at, at + part, number % lanes * part))
    for future in flying:
        future.result()
    elapsed_s = time.perf_counter() - begin
    store.close()
    return {"bytes_per_s": num_objects * OBJECT_BYTES / elapsed_s}


def _in_process(work: partial[dict[str, float]]) -> dict[str, float]:
    receive, send = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(work, send))
    process.start()
    send.close()
    try:
        result: dict[str, float] = receive.recv()
    finally:
        process.join()
    return result


def _run(work: partial[dict[str, float]], send: Connection) -> None:
    send.send(work())


def _start_server(root: Path, link_bytes_per_s: int) -> tuple[int, Any]:
    receive, send = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("spawn")
    server = context.Process(target=_serve, args=(root, link_bytes_per_s, send), daemon=True)
    server.start()
    return int(receive.recv()), server


def _serve(root: Path, link_bytes_per_s: int, send: Connection) -> None:
    asyncio.run(_RangeServer(root, link_bytes_per_s).run(send))


class _RangeServer:
    """GET with Range of the files in a directory, each answer after `LATENCY_S`, all together at the link's rate."""

    _SLICE = 256 << 10

    def __init__(self, root: Path, link_bytes_per_s: int) -> None:
        self._root, self._rate = root, link_bytes_per_s
        self._free_at = 0.0  # when the link has sent all that was given to it

    async def run(self, send: Connection) -> None:
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        send.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode(), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, head: str, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(LATENCY_S)
        path = head.split(" ", 2)[1].lstrip("/")
        asked = re.search(r"(?im)^range: bytes=(\d+)-(\d+)", head)
        with (self._root / path).open("rb") as file:
            size = file.seek(0, 2)
            begin, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
            status = f"206 Partial Content\r\nContent-Range: bytes {begin}-{end - 1}/{size}" if asked else "200 OK"
            date = "Thu, 01 Jan 2026 00:00:00 GMT"
            lines = f'HTTP/1.1 {status}\r\nContent-Length: {end - begin}\r\nETag: "1"\r\nLast-Modified: {date}\r\n\r\n'
            writer.write(lines.encode())
            await writer.drain()
            while begin < end:
                count = min(self._SLICE, end - begin)
                self._free_at = max(self._free_at, loop.time()) + count / self._rate
                if (wait_s := self._free_at - loop.time()) > 0.002:
                    await asyncio.sleep(wait_s)
                await loop.sendfile(writer.transport, file, begin, count, fallback=False)
                begin += count
