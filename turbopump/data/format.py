"""The dataset directory: `manifest.json` and Arrow IPC shards `<split>-00000.arrow`, which any Arrow tool opens.

Each shard is one uncompressed record batch; each field is one primitive buffer, read through a memory map and a numpy
view of the raw bytes (pyarrow is needed to write and to verify, not to read). `DatasetWriter` streams with one shard
per split in memory, in a staging directory that gets its name last. `Dataset` checks sizes when it is opened and the
checksum of a block of bytes when that block is first read; `verify_dataset` checks everything.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from turbopump.core.errors import CorruptDataError, DatasetError, RunDirectoryError, UsageError
from turbopump.core.files import digest, digest_file, explain_os_error, fsync_directory, write_atomic
from turbopump.data.manifest import (
    DTYPES,
    MANIFEST_NAME,
    ColumnEntry,
    Field,
    Manifest,
    ShardEntry,
    SplitEntry,
    TokenizerEntry,
    read_manifest,
)

BLOCK_BYTES = 1 << 18  # a first read checks this much: 15 microseconds at 17 GB/s
SHARD_BYTES = 1 << 26  # what the writer holds in memory for each split


class Column:
    """The rows of one field in one shard: `values` is [rows, *shape], read-only, straight from the memory map."""

    def __init__(self, path: Path, field: Field, shard: ShardEntry, entry: ColumnEntry, block_bytes: int) -> None:
        self.path = path
        self._name = field.name
        self._block_bytes = block_bytes
        self._checksums = entry.checksums
        self._row_bytes = field.row_bytes
        if entry.bytes:
            raw = np.memmap(path, mode="r", dtype=np.uint8, offset=entry.offset, shape=(entry.bytes,))
            self._bytes = np.asarray(raw)  # slices of a memmap object cost ten times those of a plain array
        else:
            self._bytes = np.empty(0, np.uint8)
        self.values = self._bytes.view(field.dtype).reshape(shard.rows, *field.shape)
        self._known_good = np.zeros(len(entry.checksums), bool)
        self.all_good = not entry.checksums

    def check_rows(self, first: np.ndarray, last: np.ndarray) -> None:
        """Check the blocks that hold the rows `first..last` (arrays, inclusive) unless they were checked before.

        Raises `CorruptDataError` naming shard and block.
        """
        if self.all_good or not len(first):
            return
        low = first * self._row_bytes // self._block_bytes
        high = ((last + 1) * self._row_bytes - 1) // self._block_bytes
        if self._known_good[low].all() and self._known_good[high].all() and (high - low).max() <= 1:
            return
        for a, b in zip(low.tolist(), high.tolist(), strict=True):
            for block in range(a, b + 1):
                if not self._known_good[block]:
                    self.check_block(block)
        self.all_good = bool(self._known_good.all())

    def check_block(self, block: int) -> None:
        begin = block * self._block_bytes
        data = self._bytes[begin : begin + self._block_bytes]
        if digest(data.data) != self._checksums[block]:
            raise CorruptDataError(
                f"{self.path}: block {block} of {self._name!r} (bytes {begin} to {begin + len(data)} of its values) "
                f"differs from its checksum: restore the file from a copy or pack the dataset again"
            )
        self._known_good[block] = True

    @property
    def num_blocks(self) -> int:
        return len(self._checksums)


class Dataset:
    """A dataset directory open for reading. Shards are mapped when they are first used."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._columns: dict[tuple[str, int, int], Column] = {}

    def split(self, name: str) -> SplitEntry:
        """The split's entry; raises `DatasetError` naming the splits there are."""
        if name not in self.manifest.splits:
            known = ", ".join(self.manifest.splits) or "none"
            raise DatasetError(f"{self.path} has no split {name!r} (it has: {known})")
        return self.manifest.splits[name]

    def column(self, split: str, shard: int, field: int = 0) -> Column:
        key = (split, shard, field)
        if key not in self._columns:
            entry = self.manifest.splits[split].shards[shard]
            self._columns[key] = Column(
                self.path / entry.file, self.manifest.fields[field], entry, entry.columns[field],
                self.manifest.block_bytes,
            )  # fmt: skip
        return self._columns[key]

    def row_bounds(self, split: str) -> np.ndarray:
        """Row numbers where the shards of a split begin, and its number of rows at the end; int64 [shards + 1]."""
        rows = [shard.rows for shard in self.split(split).shards]
        return np.concatenate([[0], np.cumsum(rows, dtype=np.int64)]).astype(np.int64)


def open_dataset(path: Path | str) -> Dataset:
    """The dataset at `path`, its manifest read and the size of every shard checked.

    Raises `DatasetError` (missing, other schema) or `CorruptDataError` (damaged manifest, shard missing or cut short).
    """
    path = Path(path)
    manifest = read_manifest(path)
    for split in manifest.splits.values():
        for shard in split.shards:
            try:
                size = os.stat(path / shard.file).st_size
            except OSError as error:
                raise CorruptDataError(f"{path / shard.file} is missing or unreadable: {error.strerror}") from error
            if size != shard.bytes:
                raise CorruptDataError(
                    f"{path / shard.file} has {size} bytes where {shard.bytes} were written (cut short or replaced): "
                    f"restore it from a copy or pack the dataset again"
                )
    return Dataset(path, manifest)


def verify_dataset(path: Path | str, progress: Callable[[int, int], None] | None = None) -> int:
    """Read everything and check every checksum; the number of bytes checked.

    `progress(done_bytes, total_bytes)` is called after each shard. Raises `CorruptDataError` that lists every bad
    block, by shard and number.
    """
    import pyarrow as pa

    dataset = open_dataset(path)
    problems, done = [], 0
    for name, split in dataset.manifest.splits.items():
        for index, shard in enumerate(split.shards):
            bad = _bad_blocks(dataset, name, index)
            if not bad and digest_file(dataset.path / shard.file) != shard.xxh3:
                bad = [f"{dataset.path / shard.file}: bytes outside the values differ from the file's checksum"]
            if not bad:
                with pa.memory_map(str(dataset.path / shard.file)) as source:
                    rows = pa.ipc.open_file(source).get_batch(0).num_rows
                bad = [] if rows == shard.rows else [f"{shard.file}: {rows} rows where {shard.rows} are expected"]
            problems += bad
            done += shard.bytes
            if progress is not None:
                progress(done, dataset.manifest.bytes)
    entry = dataset.manifest.tokenizer
    if entry is not None:
        file = dataset.path / entry.file
        if not file.is_file() or digest_file(file) != entry.digest:
            problems.append(f"{file} is missing or differs from its checksum")
    if problems:
        raise CorruptDataError("\n".join(problems))
    return done


def _bad_blocks(dataset: Dataset, split: str, shard: int) -> list[str]:
    bad = []
    for field in range(len(dataset.manifest.fields)):
        column = dataset.column(split, shard, field)
        for block in range(column.num_blocks):
            try:
                column.check_block(block)
            except CorruptDataError as error:
                bad.append(str(error))
    return bad


class _Pending:
    """Rows of one split that wait for their shard to be full, as a list of blocks a field."""

    def __init__(self, fields: int) -> None:
        self.parts: list[list[np.ndarray]] = [[] for _ in range(fields)]
        self.rows = 0
        self.shards: list[ShardEntry] = []
        self.source_bytes = 0
        self.documents = 0
        self.document_sizes: Counter[int] = Counter()


class DatasetWriter:
    """Writes a dataset directory, shard after shard; nothing is at `path` until `finish` has put all of it there.

    Usable as a context manager: leaving it without `finish` removes the staging directory. A killed writer leaves only
    a hidden `.NAME.*.partial` beside `path`, which the next writer to the same place removes.
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
        self.path = Path(path)
        self.kind = kind
        self.fields = tuple(fields)
        self._block_bytes = block_bytes
        for field in self.fields:
            if field.dtype not in DTYPES:
                raise UsageError(f"field {field.name!r} has dtype {field.dtype}; allowed: {', '.join(DTYPES)}")
            if 0 in field.shape:
                raise UsageError(f"field {field.name!r} has rows of shape {field.shape}, which hold nothing")
        row_bytes = sum(field.row_bytes for field in self.fields)
        self._shard_rows = max(1, shard_bytes // max(1, row_bytes))
        self._splits: dict[str, _Pending] = {}
        self._overwrite = overwrite
        check_destination(self.path, overwrite)
        self._lock: int | None
        self._staging, self._lock = _make_staging(self.path)

    def append(
        self,
        split: str,
        values: Sequence[np.ndarray],
        *,
        source_bytes: int = 0,
        document_sizes: Sequence[int] | np.ndarray = (),
    ) -> None:
        """Add rows to a split: one array [rows, *shape] a field. The arrays must not be changed afterwards."""
        pending = self._splits.setdefault(split, _Pending(len(self.fields)))
        pending.source_bytes += source_bytes
        pending.documents += len(document_sizes)
        pending.document_sizes.update((max(1, int(n)) - 1).bit_length() for n in document_sizes)
        rows = len(values[0])
        for field, array in zip(self.fields, values, strict=True):
            if array.shape != (rows, *field.shape):
                raise UsageError(f"field {field.name!r}: rows of shape {array.shape[1:]} given, {field.shape} expected")
        begin = 0
        while begin < rows:
            end = min(rows, begin + self._shard_rows - pending.rows)
            for parts, field, array in zip(pending.parts, self.fields, values, strict=True):
                parts.append(np.ascontiguousarray(array[begin:end], dtype=field.dtype))
            pending.rows += end - begin
            begin = end
            if pending.rows == self._shard_rows:
                self._write_shard(split, pending)

    def add_file(self, name: str, data: bytes) -> None:
        """Put a small file (the tokenizer) beside the shards."""
        write_atomic(self._staging / name, data)

    def finish(
        self, *, tokenizer: TokenizerEntry | None = None, sources: Sequence[str] = (), skipped: int = 0
    ) -> Manifest:
        """Write what is pending and the manifest, then move the directory to its place."""
        for name, pending in self._splits.items():
            if pending.rows:
                self._write_shard(name, pending)
        splits = {
            name: SplitEntry(
                sum(shard.rows for shard in p.shards), p.source_bytes, p.documents,
                {str(1 << size): count for size, count in sorted(p.document_sizes.items())}, tuple(p.shards),
            )
            for name, p in sorted(self._splits.items())
        }  # fmt: skip
        manifest = Manifest(self.kind, self._block_bytes, self.fields, splits, tokenizer, tuple(sources), skipped)
        write_atomic(self._staging / MANIFEST_NAME, manifest.dumps())
        self._move_in_place()
        return manifest

    def abort(self) -> None:
        """Remove what was written; harmless after `finish`."""
        if self._lock is not None:
            shutil.rmtree(self._staging, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def _write_shard(self, split: str, pending: _Pending) -> None:
        name = f"{split}-{len(pending.shards):05d}.arrow"
        values = [parts[0] if len(parts) == 1 else np.concatenate(parts) for parts in pending.parts]
        file = self._staging / name
        try:
            offsets = _write_arrow(file, self.fields, values)
            columns = []
            for offset, array in zip(offsets, values, strict=True):
                raw = array.reshape(-1).view(np.uint8).data
                blocks = range(0, len(raw), self._block_bytes)
                checksums = tuple(digest(raw[begin : begin + self._block_bytes]) for begin in blocks)
                columns.append(ColumnEntry(offset, len(raw), checksums))
            entry = ShardEntry(name, pending.rows, file.stat().st_size, digest_file(file), tuple(columns))
        except OSError as error:
            raise DatasetError(explain_os_error(error, self.path)) from error
        pending.shards.append(entry)
        pending.parts = [[] for _ in self.fields]
        pending.rows = 0

    def _move_in_place(self) -> None:
        aside: Path | None = None
        try:
            fsync_directory(self._staging)
            if self.path.exists():
                check_destination(self.path, self._overwrite)
                aside = self.path.with_name(f".{self.path.name}.{os.getpid()}.old")
                self.path.rename(aside)
            self._staging.rename(self.path)
            fsync_directory(self.path.parent)
        except OSError as error:
            raise DatasetError(explain_os_error(error, self.path)) from error
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)

    def __enter__(self) -> DatasetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()
        if isinstance(error, RunDirectoryError):  # a full disk met by write_atomic
            raise DatasetError(str(error)) from error


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


def _make_staging(path: Path) -> tuple[Path, int]:
    """A new hidden directory beside `path`, locked while this process lives; those of dead writers are removed."""
    try:
        parent = path.absolute().parent
        parent.mkdir(parents=True, exist_ok=True)
        for old in parent.glob(f".{_escaped(path.name)}.*.partial"):
            _remove_if_abandoned(old)
        staging = parent / f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.partial"
        staging.mkdir()
        return staging, _lock_directory(staging)
    except OSError as error:
        raise DatasetError(explain_os_error(error, path)) from error


def _lock_directory(path: Path) -> int:
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_if_abandoned(path: Path) -> None:
    try:
        handle = _lock_directory(path)
    except OSError:
        return  # its writer lives
    shutil.rmtree(path, ignore_errors=True)
    os.close(handle)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _write_arrow(file: Path, fields: Sequence[Field], values: Sequence[np.ndarray]) -> list[int]:
    """One record batch, uncompressed; the offset of each field's raw values in the file."""
    import pyarrow as pa

    columns = []
    for field, array in zip(fields, values, strict=True):
        column = pa.array(array.reshape(-1))
        if field.shape:
            column = pa.FixedSizeListArray.from_arrays(column, int(np.prod(field.shape)))
        columns.append(column)
    metadata = {f"{field.name}.shape": ",".join(map(str, field.shape)) for field in fields}
    schema = pa.schema(
        [pa.field(field.name, column.type) for field, column in zip(fields, columns, strict=True)], metadata=metadata
    )
    with file.open("wb") as sink:
        with pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))
        sink.flush()
        os.fsync(sink.fileno())
    with pa.memory_map(str(file)) as source:
        base = source.read_buffer(source.size()).address
        batch = pa.ipc.open_file(source).get_batch(0)
        return [_raw_values(column).address - base for column in batch.columns]


def _raw_values(column: Any) -> Any:
    return column.buffers()[-1]
