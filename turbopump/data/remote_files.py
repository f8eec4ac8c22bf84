"""The files of a dataset in an object store: `[data.remote]`, and what `LocalFiles` is for a directory.

Manifest, tokenizer, checksums and offsets are fetched when they are first used and kept in memory; values come through
a reader of ranges, with a cache of blocks on local disk (`remote`) or without (`remote_direct`). Nothing is asked of a
store when a dataset is opened but its manifest: sizes come from there, and a shard that is missing, short or damaged is
an error when it is first read. What differs from its checksum is fetched once more before it is an error.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbopump.core.config import NonNegativeInt, PositiveFloat, PositiveInt, setting
from turbopump.core.errors import CacheError, CorruptDataError, DatasetError
from turbopump.core.units import human_bytes
from turbopump.data.addresses import address_problem, query_from_environment
from turbopump.data.block_cache import BLOCK_BYTES, BlockCache, bytes_of_cache, default_directory, slots_there
from turbopump.data.manifest import MANIFEST_NAME, Manifest, ShardEntry, parse_manifest
from turbopump.data.ranges import RangeReader
from turbopump.data.remote import RemoteReader
from turbopump.data.remote_direct import DirectReader
from turbopump.data.stores import Store, open_store
from turbopump.hardware.detect import available_bytes

PIECE_BYTES = 8 << 20  # the most that one request for a part asks for
PIECES_AT_ONCE = 16
CACHE_BYTES = 8 << 30
CACHE_SHARE = 0.9  # of the free disk: what the cache may fill
_SECRETS = ("secret", "password", "token", "access_key", "account_key", "master_key", "encryption_key", "key_base64",
            "sas")  # fmt: skip
Part = tuple[str, int, int]  # file, offset, bytes


@dataclass(frozen=True, kw_only=True)
class RemoteConfig:
    """How a dataset at an address (`s3://...`) is reached, and its cache on local disk; without effect on a path."""

    cache_bytes: NonNegativeInt = setting(
        CACHE_BYTES, "the most the cache fills, and never more than the dataset or 0.9 of the free disk; 0: no cache"
    )
    cache_dir: str = setting("", "where caches are, one folder a dataset; by default `~/.cache/turbopump/blocks`")
    anonymous: bool = setting(False, "ask a public bucket without credentials")
    endpoint: str = setting("", "address of the server, where it is not the provider's own")
    options: Mapping[str, str] = setting(
        dict, "further settings of the client, e.g. `region`; credentials belong in the environment"
    )
    query_env: str = setting(
        "", "environment variable that holds a query for every request, e.g. a SAS token (`sv=...&sig=...`)"
    )
    request_s: PositiveFloat = setting(60.0, "seconds a request may take before it is made again")
    stall_s: PositiveFloat = setting(10.0, "seconds without a byte before a request is made again")
    retry_s: PositiveFloat = setting(120.0, "seconds a request is made again and again before that is an error")
    max_tries: PositiveInt = setting(10, "times a request is made before that is an error")

    def problems(self, path: str = "") -> list[str]:
        """What is wrong with the address `path` and its server, and options that hold a secret: a run writes its
        settings down."""
        found = [("path", address_problem(path))] if is_url(path) else []
        found += [("remote.endpoint", address_problem(self.endpoint, ("http", "https")))] if self.endpoint else []
        return [f"{name}: {problem}" for name, problem in found if problem] + [
            f"remote.options.{name}: a credential does not belong into settings, which are written down: give it in "
            "the environment, e.g. AWS_SECRET_ACCESS_KEY"
            for name in self.options
            if any(word in name.lower() for word in _SECRETS)
        ]


def is_url(path: Path | str) -> bool:
    """Whether a dataset's path is the address of a store."""
    return "://" in str(path)


class RemoteFiles:
    """The files at `url`. `close` ends the processes that fetch; see `reading.Files`."""

    refetches = True
    restore = "it was fetched twice; upload the file again from a copy, or pack the dataset again"

    def __init__(self, url: str, remote: RemoteConfig) -> None:
        self.url, self._remote = url.rstrip("/"), remote
        self._stores: list[Store] = [self._open_store()]
        self._readers: list[RemoteReader | DirectReader] = []  # each with a store, for its memory, the first with ours
        self._held: tuple[str, np.ndarray] | None = None

    def _open_store(self) -> Store:
        remote = self._remote
        limits = {name: getattr(remote, name) for name in ("request_s", "stall_s", "retry_s", "max_tries")}
        options = {**remote.options, **({"endpoint": remote.endpoint} if remote.endpoint else {})}
        query = query_from_environment(remote.query_env) if remote.query_env else ""
        return open_store(self.url, anonymous=remote.anonymous, query=query, limits=limits, **options)

    def close(self) -> None:
        for opened in (*self._readers, *self._stores):
            opened.close()

    def location(self, file: str) -> str:
        return f"{self.url}/{file}"

    def key(self, file: str) -> str:
        return file

    def whole(self, file: str) -> bytes:
        return self._stores[0].get(file)

    def part(self, file: str, offset: int, size: int) -> np.ndarray:
        return next(self.parts([(file, offset, size)]))

    def parts(self, wanted: Iterable[Part]) -> Iterator[np.ndarray]:
        """A copy of each of the parts, in order; several requests are under way at once."""
        waiting: deque[tuple[int, list[Future[bytes]]]] = deque()
        for file, offset, size in wanted:
            waiting.append((size, self._pieces(file, offset, size)))
            while sum(len(pieces) for _, pieces in waiting) >= PIECES_AT_ONCE:
                yield _joined(*waiting.popleft())
        while waiting:
            yield _joined(*waiting.popleft())

    def _pieces(self, file: str, offset: int, size: int) -> list[Future[bytes]]:
        if size > (free := available_bytes()):
            raise DatasetError(
                f"{self.location(file)}: by the manifest {human_bytes(size)} of it are to be in memory, where "
                f"{human_bytes(free)} are free: pack into smaller shards, or do not trust the manifest"
            )
        end = offset + size
        return [
            self._stores[0].start_range(file, begin, min(begin + PIECE_BYTES, end))
            for begin in range(offset, end, PIECE_BYTES)
        ]

    def buffer(self, shard: ShardEntry, offset: int, size: int) -> tuple[np.ndarray, bool]:
        if self._held is not None and self._held[0] == shard.file:
            return self._held[1][offset : offset + size], False
        return self.part(shard.file, offset, size), False

    @contextmanager
    def held(self, shard: ShardEntry) -> Iterator[None]:
        """The whole shard is in memory meanwhile. Raises `CorruptDataError` where it is longer than it was written."""
        size = self._stores[0].size(shard.file)
        if size != shard.bytes:
            raise CorruptDataError(
                f"{self.location(shard.file)} has {size} bytes where {shard.bytes} were written: {self.restore}"
            )
        self._held = shard.file, self.part(shard.file, 0, size)
        try:
            yield
        finally:
            self._held = None

    def manifest(self) -> Manifest:
        """The dataset's manifest; damaged on the way, it is fetched once more."""
        for attempt in range(2):
            try:
                return parse_manifest(self.whole(MANIFEST_NAME), self.location(MANIFEST_NAME), self.url)
            except CorruptDataError:
                if attempt:
                    raise
        raise AssertionError  # the second attempt has returned or raised

    def reader(self, manifest: Manifest) -> RangeReader:
        """What fetches ranges of the shards."""
        if self._readers:
            self._stores.append(self._open_store())
        store, remote = self._stores[-1], self._remote
        reader = RemoteReader(store, _open_cache(manifest, remote)) if remote.cache_bytes else DirectReader(store)
        self._readers.append(reader)
        return reader


def _joined(size: int, pieces: list[Future[bytes]]) -> np.ndarray:
    out, at = np.empty(size, np.uint8), 0
    for piece in pieces:
        data = piece.result()
        out[at : at + len(data)] = np.frombuffer(data, np.uint8)
        at += len(data)
    return out


def _open_cache(manifest: Manifest, remote: RemoteConfig) -> BlockCache:
    """The cache of a dataset. Where the disk has no room for it, what an earlier process made there is taken as it is:
    the free space changes all the time, and all who use a cache at once must agree on its size."""
    folder = Path(remote.cache_dir).expanduser() / manifest.digest if remote.cache_dir else None
    directory = folder or default_directory(manifest.digest)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    blocks = sum(-(-shard.bytes // BLOCK_BYTES) for shard in shards)
    wanted = min(remote.cache_bytes, bytes_of_cache(blocks + 2))
    room = _room(directory)
    if wanted <= room:
        return BlockCache(directory, wanted)
    size = 1 << max(0, int(room).bit_length() - 1)
    if 0 < (there := bytes_of_cache(slots_there(directory))) <= wanted:
        size = there
    warnings.warn(
        f"data.remote.cache_bytes ({remote.cache_bytes}): {directory} has room for {human_bytes(room)}, and the cache "
        f"is made of {human_bytes(size)}: give another data.remote.cache_dir for more",
        stacklevel=2,
    )
    try:
        return BlockCache(directory, size)
    except CacheError:  # another process made it at this moment
        return BlockCache(directory, bytes_of_cache(slots_there(directory)))


def _room(directory: Path) -> float:
    """Bytes that a cache in `directory` may fill: what is free, and what it has already."""
    above = directory
    while not above.exists() and above != above.parent:
        above = above.parent
    used = 0
    with suppress(OSError):
        used = (directory / "blocks").stat().st_blocks * 512
    try:
        return CACHE_SHARE * (shutil.disk_usage(above).free + used)
    except OSError:
        return float(os.sysconf("SC_PAGE_SIZE"))  # what is wrong with the directory the cache says


class OrderAdvice:
    """What the order of a run means for a cached remote split of `num_bytes` in `num_samples` samples."""

    def __init__(self, name: str, num_bytes: int, num_samples: int, reader: RemoteReader) -> None:
        self._name, self._num_bytes, self._num_samples, self._reader = name, num_bytes, num_samples, reader

    def samples_ahead(self, order: str, window_samples: int) -> int:
        """How many samples to announce: two windows of the order, for all blocks of a window are wanted at its begin
        and are to be fetched while the one before it is read. Random orders have no windows."""
        return 2 * window_samples if order in ("blocks", "sequential") else 0

    def warning(self, order: str, window_samples: int) -> str:
        """What to say of an order that does not go with the cache; empty where it does."""
        cache, block = self._reader.cache_bytes, self._reader.block_bytes
        if self._num_bytes <= cache:
            return ""
        sample_bytes = self._num_bytes / self._num_samples
        has = f"{self._name} has {human_bytes(self._num_bytes)} and its cache {human_bytes(cache)}"
        if order in ("shuffle", "bucketed"):
            missed = 1 - cache / self._num_bytes
            times = max(1.0, missed * block / sample_bytes)
            return (
                f'{has}: in loader.order = "{order}" about {missed:.0%} of the samples ({human_bytes(sample_bytes)} '
                f"each) fetch a block of {human_bytes(block)}, {times:,.0f} times the bytes that are used: set "
                'loader.order = "blocks", or data.remote.cache_bytes to all of it, or to 0 for no cache'
            )
        windows = 2 * window_samples * sample_bytes
        if order == "blocks" and windows > self._reader.ahead_bytes:
            return (
                f"{has}, less than two windows of the order ({human_bytes(windows)}): blocks will be fetched more than "
                "once: give more data.remote.cache_bytes or a smaller loader.window_blocks"
            )
        return ""
