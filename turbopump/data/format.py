"""The dataset, a directory or a prefix of a store (`s3://...`): `manifest.json`, Arrow IPC shards
`<split>-00000.arrow`, which any Arrow tool opens, and `<split>.sums`, the checksums of their blocks.

`open_dataset` reads the manifest and, of a directory, checks that every file is there in its size;
`Dataset.data(split)` reads rows, and checks each block of bytes when it is first read; `verify_dataset` checks
everything. `writer` makes datasets.
"""

from __future__ import annotations

import io
import os
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np

from turbopump.core.errors import ConfigError, CorruptDataError, DatasetError, UsageError
from turbopump.core.files import digest, new_digest
from turbopump.data.addresses import address_problem
from turbopump.data.manifest import Manifest, ShardEntry, SplitEntry, read_manifest, sums_name
from turbopump.data.ragged import Ragged
from turbopump.data.ranges import RangeReader
from turbopump.data.reading import RESTORE, Files, LocalFiles, SplitData
from turbopump.data.remote_files import RemoteConfig, RemoteFiles, is_url
from turbopump.data.shard import not_as_described
from turbopump.data.text import Tokenizer, from_data
from turbopump.hardware.detect import available_bytes

Reading = Literal["auto", "mapped", "direct"]
DIRECT_FROM_SHARE = 0.6  # of available memory: larger datasets would only push each other's pages out
BATCHES_AHEAD = 4  # of direct reads; 256 are in flight at once, more than a batch has
REMOTE_BATCHES_AHEAD = 16  # of a store, whatever the order: at 50 ms a request and 32 requests in flight
VERIFIED_AT_ONCE = 1 << 19  # bytes: hashed once for the file and once by block while they are in the cache


class Dataset:
    """A dataset open for reading; `path` names it. `reading`: shards of a directory are `mapped`, or read `direct`ly
    past the page cache (`auto`: where they fill most of the memory)."""

    def __init__(self, path: Path | str, files: Files, manifest: Manifest, reading: Reading = "auto") -> None:
        self.path = path
        self.manifest = manifest
        self.files = files
        self.remote = isinstance(files, RemoteFiles)
        if isinstance(files, RemoteFiles):
            self.close = weakref.finalize(self, files.close)
        elif reading == "auto":
            reading = "direct" if manifest.bytes > DIRECT_FROM_SHARE * available_bytes() else "mapped"
        self.reading = reading
        self._data: dict[str, SplitData] = {}

    def split(self, name: str) -> SplitEntry:
        """The split's entry; raises `DatasetError` naming the splits there are."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits) or "none"
            raise DatasetError(f"{self.path} has no split {name!r} (it has: {known})")
        return self.manifest.splits[name]

    def data(self, split: str) -> SplitData:
        """The rows of a split; raises `DatasetError` where there is none of that name."""
        self.split(split)
        if split not in self._data:
            self._data[split] = self._open(split)
        return self._data[split]

    def _open(self, split: str) -> SplitData:
        if self.reading == "mapped" and not self.remote:
            return SplitData(self.files, self.manifest, split)
        from turbopump.data.ranged import RangedSplit

        if isinstance(self.files, RemoteFiles):
            reader: RangeReader = self.files.reader(self.manifest)
            ahead = REMOTE_BATCHES_AHEAD
        else:
            from turbopump.data.direct import DirectReader
            from turbopump.data.direct_ranges import DirectRanges

            ahead = BATCHES_AHEAD
            reader = DirectRanges(DirectReader(max_pending=ahead * len(self.manifest.fields)))
        return RangedSplit(self.files, self.manifest, split, reader, batches_ahead=ahead)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that is stored with the tokens, or None; raises `CorruptDataError`."""
        entry = self.manifest.tokenizer
        if entry is None:
            return None
        for _ in range(1 + self.files.refetches):
            data = self.files.whole(entry.file)
            if digest(data) == entry.digest:
                return from_data(entry.kind, data)
        raise CorruptDataError(f"{self.files.location(entry.file)} differs from its checksum: {self.files.restore}")


def open_dataset(path: Path | str, reading: Reading = "auto", remote: RemoteConfig | None = None) -> Dataset:
    """The dataset at `path`, a directory or an address; its manifest read and, in a directory, the size of every file
    checked. `remote` is how an address is reached; what has no effect on `path` warns.

    Raises `DatasetError` (missing, other schema), `RemoteError` (what a store answers) or `CorruptDataError` (damaged
    manifest, shard missing or cut short).
    """
    if is_url(path):
        dataset = _open_remote(str(path), remote or RemoteConfig())
        if reading != "auto":
            warnings.warn(f"data.reading = {reading!r} has no effect on {path}: leave it out", stacklevel=2)
        return dataset
    if remote is not None and remote != RemoteConfig():
        warnings.warn(f"data.remote has no effect on {path}, which is no address: leave it out", stacklevel=2)
    path = Path(path)
    manifest = read_manifest(path)
    folder = str(path)
    for name, split in manifest.splits.items():
        blocks = 0
        for shard in split.shards:
            _check_size(os.path.join(folder, shard.file), shard.bytes)
            blocks += shard.num_blocks(manifest.block_bytes)
        if split.shards:
            _check_size(os.path.join(folder, sums_name(name)), 8 * blocks)
    return Dataset(path, LocalFiles(path), manifest, reading)


def _open_remote(url: str, remote: RemoteConfig) -> Dataset:
    if problem := address_problem(url):
        raise UsageError(problem)
    if problems := remote.problems():
        raise ConfigError([f"data.{problem}" for problem in problems], url)
    files = RemoteFiles(url, remote)
    try:
        return Dataset(url, files, files.manifest())
    except BaseException:
        files.close()
        raise


def read_any_manifest(path: str, remote: RemoteConfig) -> Manifest:
    """The manifest at a path or an address, and nothing else looked at."""
    if not is_url(path):
        return read_manifest(Path(path))
    dataset = _open_remote(path, remote)
    dataset.close()
    return dataset.manifest


def _check_size(file: str, expected: int) -> None:
    try:
        size = os.stat(file).st_size
    except OSError as error:
        raise CorruptDataError(f"{file} is missing or unreadable: {error.strerror}") from error
    if size != expected:
        raise CorruptDataError(
            f"{file} has {size} bytes where {expected} were written (cut short or replaced): {RESTORE}"
        )


def verify_dataset(
    path: Path | str, progress: Callable[[int, int], None] | None = None, remote: RemoteConfig | None = None
) -> int:
    """Read everything and check every checksum; the number of bytes checked.

    `progress(done_bytes, total_bytes)` is called after each shard. Raises `CorruptDataError` that lists every bad
    block, by shard and number.
    """
    dataset = open_dataset(path, remote=remote) if is_url(path) else open_dataset(path, "mapped")
    problems, done = [], 0
    for name, split in dataset.manifest.splits.items():
        data = SplitData(dataset.files, dataset.manifest, name)
        for number, shard in enumerate(split.shards):
            try:
                with dataset.files.held(shard) if isinstance(dataset.files, RemoteFiles) else nullcontext():
                    problems += _problems(dataset, data, number)
            except DatasetError as error:
                problems.append(str(error))
            if dataset.remote:
                data.release(number)
            done += shard.bytes
            if progress is not None:
                progress(done, dataset.manifest.bytes)
    try:
        dataset.tokenizer()
    except DatasetError as error:
        problems.append(str(error))
    if problems:
        raise CorruptDataError("\n".join(problems))
    return done


def _problems(dataset: Dataset, data: SplitData, number: int) -> list[str]:
    """What is wrong with a shard: its blocks, its other bytes, its schema and rows as Arrow reads them."""
    shard = data.shards[number]
    file = dataset.files.location(shard.file)
    remote, whole = dataset.remote, np.empty(0, np.uint8)
    try:
        if remote:
            whole, _ = dataset.files.buffer(shard, 0, shard.bytes)
        with io.BytesIO(whole.data) if remote else open(file, "rb", buffering=0) as handle:
            if not remote:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
            problems, found = _bad_blocks(handle, file, shard, data, number, dataset.manifest.block_bytes)
    except CorruptDataError as error:
        return [str(error)]
    except OSError as error:
        return [f"{file} is unreadable ({error.strerror}): {RESTORE}"]
    if not problems and found != shard.xxh3:
        problems = [f"{file}: bytes outside the values differ from the file's checksum: {dataset.files.restore}"]
    return problems or not_as_described(file, shard, dataset.manifest.fields, whole if remote else None)


def _bad_blocks(
    handle: Any, file: str, shard: ShardEntry, data: SplitData, number: int, block_bytes: int
) -> tuple[list[str], str]:
    """Blocks that differ from their checksum, and the digest of the file, in one pass over it.

    It is read, not mapped: a map that is cut short meanwhile would end the process, and one of a cold file is read a
    page at a time.
    """
    problems, state = [], new_digest()
    step = max(VERIFIED_AT_ONCE // block_bytes, 1) * block_bytes
    memory = np.empty(min(step, max(shard.bytes, 1)), np.uint8)

    def pieces(end: int) -> Iterator[np.ndarray]:
        while (at := handle.tell()) < end:
            size = handle.readinto(memory[: min(step, end - at)].data)
            while 0 < size < min(step, end - at) and (more := handle.readinto(memory[size : end - at].data)):
                size += more
            if size < min(step, end - at):
                raise CorruptDataError(f"{file} was cut short while it was read: {RESTORE}")
            state.update(memory[:size].data)
            yield memory[:size]

    for buffer, (offset, size) in enumerate(shard.buffers):
        if offset < handle.tell() and size:  # buffers lie in order in what we write
            raise CorruptDataError(f"{file}: its buffers overlap: {RESTORE}")
        for _ in pieces(offset if size else 0):
            pass
        for place, piece in enumerate(pieces(offset + size if size else 0)):
            problems += data.bad_blocks(number, buffer, place * (step // block_bytes), piece)
    for _ in pieces(shard.bytes):
        pass
    return problems, state.hexdigest()


def concatenated(data: SplitData, field: int = 0) -> np.ndarray:
    """All values of a field of fixed rows, checked, in one array in memory: for small splits."""
    parts = [data.shard_rows(field, number) for number in range(len(data.shards))]
    return np.concatenate([part for part in parts if isinstance(part, np.ndarray)])


def chunks(dataset: Dataset, split: str) -> Iterator[dict[str, np.ndarray | Ragged]]:
    """All rows of a split in order, checked, a shard at once."""
    data = dataset.data(split)
    for number in range(len(data.shards)):
        yield {item.name: data.shard_rows(i, number) for i, item in enumerate(dataset.manifest.fields)}
        if dataset.remote:
            data.release(number)
