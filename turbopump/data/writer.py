"""Making a dataset directory: parts in a staging directory beside its place, then all of it renamed at once.

A sealed part (`part`) of a stopped pack is taken as it is by a later pack of the same input (the same `key`). `commit`
numbers the shards in the order of the parts, joins their checksums, writes the manifest and moves the directory to its
place in one rename.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from turbopump.core.errors import DatasetError, RunDirectoryError, UsageError
from turbopump.core.files import (
    digest,
    digest_file,
    explain_os_error,
    from_json_as,
    fsync_directory,
    to_json,
    write_atomic,
)
from turbopump.data.manifest import MANIFEST_NAME, Field, Manifest, ShardEntry, SplitEntry, TokenizerEntry, sums_name
from turbopump.data.part import BLOCK_BYTES, SHARD_BYTES, PartEntry, PartWriter, checked_fields, fsync, sums_file

SYNC_THREADS = 8

_KEY_NAME = "key.json"


class Staging:
    """The hidden directory `.NAME.partial` beside a dataset's place, held by one process.

    With a `key`, parts that a stopped pack of the same key has finished are kept (`parts`); without, or with another
    key, what is there is removed. Leaving it as a context manager without `commit` keeps it if it has a key.
    Raises `UsageError` where the place is taken or another process is writing there.
    """

    def __init__(self, path: Path | str, *, overwrite: bool = False, key: str | None = None) -> None:
        self.path = Path(path)
        self._overwrite, self._key = overwrite, key
        check_destination(self.path, overwrite)
        self.directory = self.path.absolute().parent / f".{self.path.name}.partial"
        self._lock: int | None = None
        try:
            while self._lock is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):
                    self._lock = _lock(self.directory)
                if self._lock is not None and not _is_at(
                    self._lock, self.directory
                ):  # another pack was just moving it to its place
                    self._release()
            check_destination(self.path, overwrite)
            if key is None or not self._same_key(key):
                self._clear()
                if key is not None:
                    write_atomic(self.directory / _KEY_NAME, to_json({"key": key}))
        except UsageError:
            with suppress(OSError):
                self.directory.rmdir()  # if nothing of an earlier pack is in it
            self._release()
            raise
        except BlockingIOError as error:
            raise UsageError(
                f"another process is packing to {self.path}: wait for it, or choose another place"
            ) from error
        except OSError as error:
            raise DatasetError(explain_os_error(error, self.path)) from error
        self.parts = {entry.part: entry for entry in self._sealed()} if key is not None else {}

    def _same_key(self, key: str) -> bool:
        try:
            return from_json_as((self.directory / _KEY_NAME).read_bytes(), dict[str, str]).get("key") == key
        except (OSError, ValueError):
            return False

    def _clear(self) -> None:
        for entry in self.directory.iterdir():
            entry.unlink()

    def _sealed(self) -> Iterable[PartEntry]:
        """Parts that are whole: sealed, and all their files there as they were written."""
        for file in sorted(self.directory.glob("part-*.json")):
            try:
                data, _, seal = file.read_bytes().rpartition(b"\n")
                if digest(data).encode() != seal:
                    continue
                entry = from_json_as(data, PartEntry)
                files = {s.file: s.xxh3 for split in entry.splits.values() for s in split.shards}
                files[sums_file(entry.part)] = entry.sums_xxh3
                whole = all(digest_file(self.directory / name) == xxh3 for name, xxh3 in files.items())
                whole &= all(size.isdecimal() for split in entry.splits.values() for size in split.document_sizes)
            except (OSError, ValueError):
                whole = False
            if whole:
                yield entry

    def commit(
        self,
        parts: Iterable[PartEntry],
        *,
        kind: str,
        fields: Sequence[Field],
        block_bytes: int = BLOCK_BYTES,
        tokenizer: TokenizerEntry | None = None,
        sources: Sequence[str] = (),
        labels: Mapping[str, tuple[str, ...]] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Manifest:
        """Make the dataset of the parts, in their order; `files` are put beside the shards (the tokenizer)."""
        ordered = sorted(parts, key=lambda entry: entry.part)
        try:
            with _disk_errors():
                splits = self._join(ordered, block_bytes)
                for name, data in (files or {}).items():
                    write_atomic(self.directory / name, data)
                skipped = sum(entry.skipped for entry in ordered)
                manifest = Manifest(
                    kind, block_bytes, tuple(fields), splits, tokenizer, tuple(sources), skipped, dict(labels or {})
                )
                write_atomic(self.directory / MANIFEST_NAME, manifest.dumps())
                self._keep_only(manifest, files or {})
            self._move_in_place()
        except OSError as error:
            raise DatasetError(explain_os_error(error, self.path)) from error
        return manifest

    def _join(self, parts: Sequence[PartEntry], block_bytes: int) -> dict[str, SplitEntry]:
        """Number the shards of all parts, and join their checksums."""
        names = sorted({name for entry in parts for name in entry.splits})
        splits: dict[str, SplitEntry] = {}
        for name in names:
            shards: list[ShardEntry] = []
            sizes: Counter[str] = Counter()
            mine = [(entry, entry.splits[name]) for entry in parts if name in entry.splits]
            with (self.directory / sums_name(name)).open("wb") as sums:
                for entry, split in mine:
                    sums.write(self._sums(entry, name, block_bytes))
                    sizes.update(split.document_sizes)
                    for shard in split.shards:
                        file = f"{name}-{len(shards):05d}.arrow"
                        _second_name(self.directory / shard.file, self.directory / file)
                        shards.append(_renamed(shard, file))
            splits[name] = SplitEntry(
                sum(shard.rows for shard in shards), sum(split.source_bytes for _, split in mine),
                sum(split.documents for _, split in mine),
                dict(sorted(sizes.items(), key=lambda item: int(item[0]))), tuple(shards),
            )  # fmt: skip
        return splits

    def _sums(self, entry: PartEntry, name: str, block_bytes: int) -> bytes:
        """The checksums of a part's shards of one split; those of its splits stand one after the other."""
        data = (self.directory / sums_file(entry.part)).read_bytes()
        at = 0
        for other, split in sorted(entry.splits.items()):
            size = 8 * sum(shard.num_blocks(block_bytes) for shard in split.shards)
            if other == name:
                return data[at : at + size]
            at += size
        return b""

    def _keep_only(self, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        """Remove what is not of the dataset: seals, and what parts that were begun and never sealed have left."""
        shards = {shard.file for split in manifest.splits.values() for shard in split.shards}
        kept = {MANIFEST_NAME, *files, *map(sums_name, manifest.splits), *shards}
        for left in self.directory.iterdir():
            if left.name not in kept:
                left.unlink()

    def _move_in_place(self) -> None:
        with ThreadPoolExecutor(SYNC_THREADS) as pool:  # together they share the file system's commits of its journal
            list(pool.map(fsync, self.directory.iterdir()))
        fsync_directory(self.directory)
        if self.path.exists():
            check_destination(self.path, self._overwrite)
            old = _lock(self.path)  # so that no other pack takes the old dataset for its staging directory
            _exchange(self.directory, self.path)  # at no moment is there no dataset, or half of one
            shutil.rmtree(self.directory, ignore_errors=True)
            os.close(old)
        else:
            self.directory.rename(self.path)
        fsync_directory(self.path.absolute().parent)
        self._release()

    def discard(self) -> None:
        """Remove all of it; harmless after `commit`."""
        if self._lock is not None:
            shutil.rmtree(self.directory, ignore_errors=True)
            self._release()

    def _release(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Staging:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._key is None or not any(self.directory.glob("part-*.json")):
            self.discard()  # nothing that a later pack could go on from
        self._release()


class DatasetWriter:
    """Writes a whole dataset from one process, rows in order; nothing is at `path` until `finish`.

    Usable as a context manager: leaving it without `finish` removes what was written. Raises `UsageError` where the
    place is taken, `DatasetError` for a full disk.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        kind: str,
        fields: Sequence[Field],
        overwrite: bool = False,
        shard_bytes: int = SHARD_BYTES,
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        self.kind, self.fields, self._block_bytes = kind, checked_fields(fields), block_bytes
        self._staging = Staging(path, overwrite=overwrite)
        self._part = PartWriter(
            self._staging.directory, 0, fields, shard_bytes=shard_bytes, block_bytes=block_bytes,
            shown=self._staging.path,
        )  # fmt: skip
        self.append = self._part.append
        self._files: dict[str, bytes] = {}

    def add_file(self, name: str, data: bytes) -> None:
        """Put a small file (the tokenizer) beside the shards."""
        self._files[name] = data

    def finish(
        self,
        *,
        tokenizer: TokenizerEntry | None = None,
        sources: Sequence[str] = (),
        skipped: int = 0,
        labels: Mapping[str, tuple[str, ...]] | None = None,
    ) -> Manifest:
        """Write what is pending and the manifest, then move the directory to its place."""
        return self._staging.commit(
            [self._part.finish(skipped)], kind=self.kind, fields=self.fields, block_bytes=self._block_bytes,
            tokenizer=tokenizer, sources=sources, labels=labels, files=self._files,
        )  # fmt: skip

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part.abort()
        self._staging.discard()


@contextmanager
def _disk_errors() -> Iterator[None]:
    """A full disk met by `write_atomic` is the dataset's, not a run's."""
    try:
        yield
    except RunDirectoryError as error:
        raise DatasetError(str(error)) from error


def _renamed(shard: ShardEntry, file: str) -> ShardEntry:
    return ShardEntry(file, shard.rows, shard.bytes, shard.xxh3, shard.sums_xxh3, shard.buffers)


def check_destination(path: Path, overwrite: bool) -> None:
    """Refuse a destination that would lose something; raises `UsageError`."""
    if path.is_symlink() or not path.exists():
        if path.is_symlink():
            raise UsageError(f"{path} is a symbolic link: give the folder itself")
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file: give a folder for the dataset")
    if (path / MANIFEST_NAME).exists():
        if not overwrite:
            raise UsageError(f"{path} already holds a dataset: choose another destination or pass --overwrite")
    elif any(path.iterdir()):
        raise UsageError(f"{path} is a folder with other files in it: choose another destination")


def _lock(path: Path) -> int:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _second_name(file: Path, name: Path) -> None:
    """Give a file another name beside its own, so that a commit that is killed leaves the parts as they were; it is
    renamed where the file system has no links."""
    name.unlink(missing_ok=True)  # of a commit that was killed
    try:
        os.link(file, name)
    except OSError:
        os.replace(file, name)


_libc = ctypes.CDLL(None, use_errno=True)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def _exchange(new: Path, old: Path) -> None:
    """Swap two directories in one step (renameat2); with two renames where the file system cannot."""
    done = _libc.renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(old), _RENAME_EXCHANGE)
    if done != 0:
        aside = old.with_name(f".{old.name}.{os.getpid()}.old")
        old.rename(aside)
        new.rename(old)
        aside.rename(new)
