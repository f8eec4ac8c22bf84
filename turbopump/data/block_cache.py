"""A cache of blocks of remote objects on local disk: bounded, shared by all processes of a host, safe under kill -9.

Three files in one directory. `blocks`: slots of `block_bytes`, never more than fit in `cache_bytes`. `table`: one row a
slot, mapped by every process, and chains from a block's hash to its row. `lock`: byte 0 is held while the table
changes, byte i by process i for as long as it lives; the kernel lets go of both when their holder dies.

A block is fetched by who *claimed* its row; a row whose claimer is dead is anybody's. Downloads and reads hold no lock:
a row's generation is odd while its slot may change and never comes twice, so a reader copies, looks at the generation
again and copies anew if it moved (a seqlock). `dirty` is 1 while chains change: whoever finds it set (the holder was
killed) makes them anew from the rows. The checksum of a block is mixed with what the block is, and checked when a
process first uses a block that it did not write itself. For local disks: network file systems share no mappings.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from turbopump.core.errors import CacheError, UsageError
from turbopump.core.files import digest, explain_os_error
from turbopump.core.units import human_bytes

BLOCK_BYTES = 1 << 20
_MAGIC, _LAYOUT = 0x7475_7262_6F63_6163, 1
_HEADER_BYTES = 4096
_FIELDS = ("magic", "layout", "block_bytes", "num_slots", "num_buckets", "dirty", "tick")
_EMPTY, _FETCHING, _READY = 0, 1, 2
_ROWS = {  # one array a column: every store is of one aligned word
    "generation": np.uint64, "file": np.uint64, "block": np.int64, "num_bytes": np.int64, "last_use": np.int64,
    "checksum": np.uint64, "state": np.int32, "row_owner": np.int32, "next": np.int32, "bucket": np.int32,
}  # fmt: skip
_ROW_BYTES = sum(np.dtype(kind).itemsize for kind in _ROWS.values()) + 16  # the chains' heads, rounded up to 2^k
_MOST_OWNERS = 4096
_FLOCK = struct.Struct("hhlli4x")  # struct flock: type, whence, start, length, process
_NEVER = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class Row:
    """Where a block is. `ready`: at `slot`, under `generation`; `claimed`: ours to fill; `busy`: another fetches it;
    `full`: there is no slot to be had; `absent`: not there, and not claimed."""

    state: Literal["ready", "claimed", "busy", "full", "absent"]
    slot: int = -1
    generation: int = 0


def default_directory(dataset_digest: str) -> Path:
    """Where the cache of a dataset is unless the recipe says otherwise; the digest is that of its manifest."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "turbopump" / "blocks" / dataset_digest


def bytes_of_cache(num_slots: int, block_bytes: int = BLOCK_BYTES) -> int:
    """The `cache_bytes` that hold so many blocks, the table included."""
    return 2 * _HEADER_BYTES + num_slots * (block_bytes + _ROW_BYTES) if num_slots else 0


def slots_there(directory: Path) -> int:
    """How many blocks the cache in `directory` was made for; 0 where there is none."""
    try:
        return _sizes(directory / "table")[0]
    except OSError:
        return 0


class BlockCache:
    """`cache_bytes` of blocks in `directory`, which is made if need be and belongs to one dataset (name it by digest).

    Raises `UsageError` for sizes that make no cache, `CacheError` for a directory that cannot be written or that living
    processes, or caches of this one that were not closed, use with other sizes. May be made before `fork`; each process
    attaches when it first uses it.
    """

    def __init__(self, directory: Path, cache_bytes: int, *, block_bytes: int = BLOCK_BYTES) -> None:
        if block_bytes < mmap.PAGESIZE or block_bytes % mmap.PAGESIZE:
            raise UsageError(f"block_bytes ({block_bytes}) must be a multiple of {mmap.PAGESIZE}")
        self.directory, self.block_bytes = Path(directory).resolve(), block_bytes
        self.num_slots = (cache_bytes - 2 * _HEADER_BYTES) // (block_bytes + _ROW_BYTES)
        if self.num_slots < 2:
            raise UsageError(
                f"cache_bytes ({cache_bytes}) holds no two blocks of {human_bytes(block_bytes)}: give more, or 0 for "
                "no cache"
            )
        self.table  # noqa: B018 - what is wrong with the directory is said now
        _open.add(self)

    @property
    def table(self) -> _Table:
        """The table as this process has mapped it."""
        found = _attached.get(str(self.directory))
        if found is None or not self._fits(found):
            with _attaching:
                found = _attached.get(str(self.directory))
                if found is None:
                    found = _attach(self)
                elif not self._fits(found):
                    if any(other is not self and other.directory == self.directory for other in list(_open)):
                        raise _in_use(self.directory, found.num_slots, found.block_bytes)
                    found = _table_of(self, found.lock, found.owner, found.blocks)
                _attached[str(self.directory)] = found
                _open.add(self)
        return found

    def _fits(self, table: _Table) -> bool:
        return (table.num_slots, table.block_bytes) == (self.num_slots, self.block_bytes)

    def close(self) -> None:
        """This cache is not used any more: the process may open its directory with another size."""
        _open.discard(self)

    def look_up(self, file: int, blocks: Sequence[int], *, claim: bool) -> list[Row]:
        """What there is of each of `blocks` of a file; with `claim`, rows are taken for those that are absent."""
        table = self.table
        with table.locked():
            rows = [table.row_of(file, block) for block in blocks]
            absent = [i for i, row in enumerate(rows) if row.state == "absent"]
            if claim and absent:
                slots = table.victims(len(absent), {row.slot for row in rows})
                for i, slot in zip(absent, slots):
                    rows[i] = table.claim(slot, file, blocks[i])
                for i in absent[len(slots) :]:
                    rows[i] = Row("full")
        return rows

    def fill(self, row: Row, file: int, block: int, data: memoryview) -> Row:
        """Write a claimed block and show it to all. Raises `OSError` (and gives the row up) if the disk does not take
        it."""
        table = self.table
        try:
            view, at = data, row.slot * self.block_bytes
            while view:
                written = os.pwrite(table.blocks, view, at)
                view, at = view[written:], at + written
        except OSError:
            self.abandon([row])
            raise
        checksum = _checksum(file, block, data)
        with table.locked():
            if int(table.generation[row.slot]) != row.generation:
                return Row("absent")
            table.checksum[row.slot] = checksum
            table.num_bytes[row.slot] = len(data)
            table.last_use[row.slot] = table.next_tick() + 4 * table.num_slots
            table.generation[row.slot] = row.generation + 1
            table.state[row.slot] = _READY
        return Row("ready", row.slot, row.generation + 1)

    def verify(self, row: Row, file: int, block: int) -> bool:
        """Whether a ready block is still there and has its checksum; one that differs is dropped."""
        table = self.table
        checksum, num_bytes = int(table.checksum[row.slot]), int(table.num_bytes[row.slot])
        if not 0 <= num_bytes <= self.block_bytes:
            num_bytes = 0
        data = os.pread(table.blocks, num_bytes, row.slot * self.block_bytes)
        if int(table.generation[row.slot]) != row.generation:
            return False
        if num_bytes and _checksum(file, block, data) == checksum:
            return True
        self.drop(file, [block])
        return False

    def abandon(self, rows: Sequence[Row]) -> None:
        """Give up claimed rows that were not filled."""
        table = _attached.get(str(self.directory))
        if table is None or not self._fits(table):  # closed, and made anew by another
            return
        with table.locked():
            for row in rows:
                if int(table.generation[row.slot]) == row.generation:
                    table.empty(row.slot)

    def drop(self, file: int, blocks: Sequence[int]) -> None:
        """Forget blocks, so that they are fetched again."""
        table = self.table
        with table.locked():
            for block in blocks:
                slot = table.find(file, block)
                if slot >= 0 and table.state[slot] == _READY:
                    table.empty(slot)

    def touch(self, slots: np.ndarray[Any, Any], *, needed: bool) -> None:
        """Note a use of slots. What is `needed` again soon goes after all else when room is made, until four times the
        cache has been fetched since: the wishes of the dead must not fill it for ever."""
        table = self.table
        table.last_use[slots] = int(table.header["tick"]) + (4 * table.num_slots if needed else 0)


class _Table:
    """The mapped table of one process. All but `locked` and the plain arrays are called with the lock held."""

    def __init__(self, lock: int, owner: int, mapped: mmap.mmap, blocks: int) -> None:
        self.lock, self.owner, self.blocks = lock, owner, blocks
        self._mutex = threading.Lock()  # the file lock is the process's, not the thread's
        self.header = np.frombuffer(mapped, [(name, np.int64) for name in _FIELDS], 1)[0]
        self.num_slots, self.block_bytes = int(self.header["num_slots"]), int(self.header["block_bytes"])
        self.num_buckets = int(self.header["num_buckets"])
        at = _HEADER_BYTES
        for name, kind in _ROWS.items():
            setattr(self, name, np.frombuffer(mapped, kind, self.num_slots, at))
            at += self.num_slots * np.dtype(kind).itemsize
        self.heads = np.frombuffer(mapped, np.int32, self.num_buckets, at)

    generation: np.ndarray[Any, Any]
    file: np.ndarray[Any, Any]
    block: np.ndarray[Any, Any]
    num_bytes: np.ndarray[Any, Any]
    last_use: np.ndarray[Any, Any]
    checksum: np.ndarray[Any, Any]
    state: np.ndarray[Any, Any]
    row_owner: np.ndarray[Any, Any]
    next: np.ndarray[Any, Any]
    bucket: np.ndarray[Any, Any]

    @contextmanager
    def locked(self) -> Iterator[None]:
        with self._mutex:
            fcntl.lockf(self.lock, fcntl.LOCK_EX, 1, 0)
            try:
                if self.header["dirty"]:
                    self.rebuild()
                yield
            finally:
                fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, 0)

    def next_tick(self) -> int:
        self.header["tick"] += 1
        return int(self.header["tick"])

    def find(self, file: int, block: int) -> int:
        """The slot of a block, or -1."""
        slot = int(self.heads[_bucket(file, block, self.num_buckets)])
        for _ in range(self.num_slots + 1):
            if slot < 0 or (int(self.file[slot]) == file and int(self.block[slot]) == block):
                return slot
            slot = int(self.next[slot])
        self.rebuild()  # a circle: the file was damaged
        return self.find(file, block)

    def row_of(self, file: int, block: int) -> Row:
        slot = self.find(file, block)
        if slot < 0:
            return Row("absent")
        if self.state[slot] == _READY:
            return Row("ready", slot, int(self.generation[slot]))
        if self.alive(int(self.row_owner[slot])):
            return Row("busy", slot)
        self.empty(slot)
        return Row("absent")

    def victims(self, count: int, spared: set[int]) -> list[int]:
        """Up to `count` slots to use: empty ones, then those used least recently."""
        fetching = np.flatnonzero(self.state == _FETCHING)
        dead = {int(o) for o in np.unique(self.row_owner[fetching]) if not self.alive(int(o))}
        for slot in fetching[np.isin(self.row_owner[fetching], list(dead))] if dead else ():
            self.empty(int(slot))
        order = np.where(self.state == _FETCHING, _NEVER, self.last_use)
        order[[slot for slot in spared if slot >= 0]] = _NEVER
        count = min(count, self.num_slots)
        best = np.argpartition(order, count - 1)[:count]
        best = best[np.argsort(order[best], kind="stable")]
        return [int(slot) for slot in best if order[slot] != _NEVER]

    def claim(self, slot: int, file: int, block: int) -> Row:
        if self.state[slot] != _EMPTY:
            self.empty(slot)
        self.header["dirty"] = 1
        self.generation[slot] = generation = _next_odd(int(self.generation[slot]))
        self.file[slot], self.block[slot], self.row_owner[slot] = file, block, self.owner
        self.last_use[slot] = self.next_tick()
        self.state[slot] = _FETCHING
        bucket = _bucket(file, block, self.num_buckets)
        self.bucket[slot], self.next[slot] = bucket, self.heads[bucket]
        self.heads[bucket] = slot
        self.header["dirty"] = 0
        return Row("claimed", slot, generation)

    def empty(self, slot: int) -> None:
        self.header["dirty"] = 1
        self.generation[slot] = _next_odd(int(self.generation[slot]))
        self.state[slot] = _EMPTY
        self.last_use[slot] = -1
        bucket = int(self.bucket[slot])
        if int(self.heads[bucket]) == slot:
            self.heads[bucket] = self.next[slot]
        else:
            before = int(self.heads[bucket])
            while before >= 0 and int(self.next[before]) != slot:
                before = int(self.next[before])
            if before >= 0:
                self.next[before] = self.next[slot]
        self.header["dirty"] = 0

    def rebuild(self) -> None:
        """Make the chains anew from the rows. A ready row of an odd generation was about to be emptied."""
        self.header["dirty"] = 1
        half_done = (self.state == _READY) & (self.generation & np.uint64(1) == 1)
        self.state[half_done | (self.state < _EMPTY) | (self.state > _READY)] = _EMPTY
        empty = self.state == _EMPTY
        self.last_use[empty] = -1
        for slot in np.flatnonzero(empty & (self.generation & np.uint64(1) == 0)):
            self.generation[slot] = _next_odd(int(self.generation[slot]))
        full = np.flatnonzero(~empty)
        keys = zip(self.file[full].tolist(), self.block[full].tolist())
        buckets = np.array([_bucket(file, block, self.num_buckets) for file, block in keys], np.int32)
        self.heads[:] = -1
        self.next[:] = -1
        self.bucket[full] = buckets
        order = np.argsort(buckets, kind="stable")
        slots, of = full[order], buckets[order]
        self.heads[of] = slots  # the last of each bucket stays
        same = of[1:] == of[:-1]
        self.next[slots[1:][same]] = slots[:-1][same]
        self.header["dirty"] = 0

    def alive(self, owner: int) -> bool:
        return owner == self.owner or (0 < owner <= _MOST_OWNERS and _held(self.lock, owner, 1))

    def forget_fetches(self, owner: int | None) -> None:
        """Rows that `owner` (any, if None) was fetching are empty."""
        fetching = self.state == _FETCHING
        for slot in np.flatnonzero(fetching if owner is None else fetching & (self.row_owner == owner)):
            self.empty(int(slot))


_attached: dict[str, _Table] = {}
_open: weakref.WeakSet[BlockCache] = weakref.WeakSet()
_attaching = threading.RLock()


def _forked() -> None:
    """Locks on files are not inherited: a child attaches anew. Closing copies lets go of nothing of the parent's."""
    global _attaching
    _attaching = threading.RLock()
    for table in _attached.values():
        os.close(table.lock)
        os.close(table.blocks)
    _attached.clear()


os.register_at_fork(after_in_child=_forked)


def _attach(cache: BlockCache) -> _Table:
    directory = cache.directory
    lock = blocks = -1
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
        owner = _own(lock, directory)
        blocks = os.open(directory / "blocks", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        table = _table_of(cache, lock, owner, blocks)
        os.posix_fadvise(blocks, 0, 0, os.POSIX_FADV_RANDOM)
        return table
    except BaseException as error:
        for handle in (lock, blocks):
            with suppress(OSError):
                os.close(handle)
        if isinstance(error, OSError):
            raise CacheError(f"the cache: {explain_os_error(error, directory)}") from error
        raise


def _table_of(cache: BlockCache, lock: int, owner: int, blocks: int) -> _Table:
    """The table in the directory, made anew where it is of other sizes and no other process uses it."""
    directory = cache.directory
    fcntl.lockf(lock, fcntl.LOCK_EX, 1, 0)
    try:
        alone = not _held(lock, 1, _MOST_OWNERS)
        found = _sizes(directory / "table")
        if found != (cache.num_slots, cache.block_bytes):
            if not alone:
                raise _in_use(directory, *found)
            _make_table(directory / "table", cache.num_slots, cache.block_bytes)
            os.ftruncate(blocks, 0)
        os.ftruncate(blocks, cache.num_slots * cache.block_bytes)
        with (directory / "table").open("r+b") as file:
            table = _Table(lock, owner, mmap.mmap(file.fileno(), 0), blocks)
        if alone or table.header["dirty"]:
            table.rebuild()
        table.forget_fetches(None if alone else owner)
        return table
    except OSError as error:
        raise CacheError(f"the cache: {explain_os_error(error, directory)}") from error
    finally:
        fcntl.lockf(lock, fcntl.LOCK_UN, 1, 0)


def _own(lock: int, directory: Path) -> int:
    for owner in range(1, _MOST_OWNERS + 1):
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, owner)
            return owner
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
    raise CacheError(f"the cache {directory} is used by {_MOST_OWNERS} processes: give some of them another directory")


def _held(lock: int, begin: int, length: int) -> bool:
    """Whether another process holds a lock in these bytes."""
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, begin, length, 0)
    return bool(_FLOCK.unpack(fcntl.fcntl(lock, fcntl.F_GETLK, asked))[0] != fcntl.F_UNLCK)


def _sizes(path: Path) -> tuple[int, int]:
    """Slots and bytes a block of a table file; zeros for one that is none, or not whole."""
    try:
        with path.open("rb") as file:
            head = file.read(8 * len(_FIELDS))
            num_bytes = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return 0, 0
    if len(head) < 8 * len(_FIELDS):
        return 0, 0
    magic, layout, block_bytes, num_slots, num_buckets, _, _ = np.frombuffer(head, np.int64).tolist()
    whole = magic == _MAGIC and layout == _LAYOUT and num_buckets == _num_buckets(num_slots)
    return (num_slots, block_bytes) if whole and num_bytes == _table_bytes(num_slots) else (0, 0)


def _make_table(path: Path, num_slots: int, block_bytes: int) -> None:
    """A table of empty rows, put in place by rename; its space is taken now: a mapping cannot report a full disk."""
    staging = path.with_suffix(".new")
    with staging.open("w+b") as file:
        os.posix_fallocate(file.fileno(), 0, _table_bytes(num_slots))
        header = np.array([_MAGIC, _LAYOUT, block_bytes, num_slots, _num_buckets(num_slots), 1, 0], np.int64)
        file.write(header.tobytes())  # dirty: the first that attaches makes the chains
    os.replace(staging, path)


def _table_bytes(num_slots: int) -> int:
    rows = sum(np.dtype(kind).itemsize for kind in _ROWS.values()) * num_slots
    return _HEADER_BYTES + rows + 4 * _num_buckets(num_slots)


def _num_buckets(num_slots: int) -> int:
    return 1 << max(1, num_slots).bit_length()


def _in_use(directory: Path, num_slots: int, block_bytes: int) -> CacheError:
    return CacheError(
        f"the cache {directory} is in use with {num_slots} blocks of {human_bytes(block_bytes)}: "
        "give the same cache_bytes to all that use it at once, or another directory (data.remote.cache_dir)"
    )


def _next_odd(generation: int) -> int:
    return generation + 1 + (generation & 1)


def _bucket(file: int, block: int, num_buckets: int) -> int:
    return ((file ^ (block * 0x9E37_79B9_7F4A_7C15)) * 0xD6E8_FEB8_6659_FD93 >> 40) % num_buckets


def _checksum(file: int, block: int, data: bytes | memoryview) -> int:
    """XXH3-64, mixed with what the block is: the right bytes of another block do not pass."""
    return int(digest(data), 16) ^ ((file ^ (block + 1) * 0x9E37_79B9_7F4A_7C15) & 0xFFFF_FFFF_FFFF_FFFF)
