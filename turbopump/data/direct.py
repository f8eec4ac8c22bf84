"""Cold reads: many byte ranges of files at once, past the page cache (`direct.cpp`), and batches ahead of their use.

    io_uring    one thread keeps `depth` reads in flight, across batches; containers often forbid it
    threads     a pool of threads with pread, where io_uring is refused
    python      the reference, where nothing can be compiled: a pool of Python threads

All read with O_DIRECT, which takes whole sectors: a range is widened to 4 KiB, and its bytes lie in memory at the page
phase that they have in the file (a copy is several times slower between phases 1 to 31 bytes apart). Where a file
system refuses O_DIRECT the page cache is used, without read-ahead, and `engine` says so. `auto` takes the first engine
that works; `reason` says why it is not the first.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import stat
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from turbopump.core.errors import CorruptDataError, DatasetError, UsageError
from turbopump.data import native
from turbopump.data.direct_engines import Engine, NativeEngine, PythonPool, Ranges, ReadFailure

# what any disk takes; 512 where a disk takes that too read as fast (ratio at 2, 12, 110 KB: 1.04, 1.02, 0.89)
SECTOR_BYTES = 4096
MAX_DEPTH, MAX_THREADS = 4096, 64
MAX_OFFSET, MAX_LENGTH = 1 << 60, 1 << 40  # beyond is damage; sums of millions stay in 64 bits
EngineName = Literal["auto", "io_uring", "threads", "python"]


class DirectReader:
    """Reads many byte ranges of files at once; a context manager. Not to be used by two threads at the same time.

    At most `max_pending` batches are prefetched; memory is that of one more, as large as the largest were. A forked
    child goes on with the same files and nothing prefetched. `engine` says what was chosen. `depth` reads are in flight
    (measured, 12 KB, virtual disk: 256 against 64 1.15 x; on busy cores 256 against 128 1.3 x; 512 gave no more).
    """

    def __init__(self, *, depth: int = 256, engine: EngineName = "auto", max_pending: int = 8) -> None:
        if not 1 <= depth <= MAX_DEPTH:
            raise UsageError(f"depth ({depth}) must be 1 to {MAX_DEPTH}: 256 suits most disks")
        if max_pending < 1:
            raise UsageError(f"max_pending ({max_pending}) must be at least 1")
        self.depth, self.max_pending = depth, max_pending
        self.reason = ""
        self._files: list[tuple[str, int, int]] = []  # path, descriptor, sector (1: through the page cache)
        self._direct: dict[int, bool] = {}  # whether a device's file system reads past the page cache
        self._pending: deque[Ranges] = deque()
        self._pid = os.getpid()
        self._engine: Engine | None = None
        self._engine, self._name = self._start(engine)

    @property
    def engine(self) -> str:
        """What was chosen, e.g. `io_uring O_DIRECT, 256 deep`."""
        cached = sum(sector == 1 for _, _, sector in self._files)
        if not cached:
            how = "O_DIRECT"
        else:
            how = f"through the page cache (O_DIRECT is refused by {cached} of {len(self._files)} files)"
        return f"{self._name} {how}, {_deep(self._name, self.depth)} deep"

    def open(self, path: str | Path) -> int:
        """A handle of the file for `read`; raises `DatasetError` where it cannot be opened."""
        engine = self._living()
        try:
            descriptor, direct = _open(path)
        except OSError as error:
            raise DatasetError(_not_opened(error, path)) from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            if direct and not self._reads_direct(descriptor):
                os.close(descriptor)
                descriptor, direct = _open(path, direct=False)
            if not direct:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # read-ahead would read megabytes a range
        except OSError as error:
            with suppress(OSError):
                os.close(descriptor)
            raise DatasetError(_not_opened(error, path)) from error
        handle = len(self._files)
        sector = SECTOR_BYTES if direct else 1
        self._files.append((str(path), descriptor, sector))
        engine.set_file(handle, descriptor, sector)
        return handle

    def read(self, handles: ArrayLike, offsets: ArrayLike, lengths: ArrayLike) -> np.ndarray:
        """Address of each range's bytes, uint64 [n], valid until the next `read`.

        Takes what was prefetched first; raises `UsageError` where that was of other ranges, `CorruptDataError` for
        a range past the end of its file, and `DatasetError` for one that the system cannot read.
        """
        engine, ranges = self._living(), self._ranges(handles, offsets, lengths)
        if self._pending and not self._pending[0].same(ranges):
            raise UsageError(
                f"these {len(ranges.handles)} ranges are not those prefetched first ({len(self._pending[0].handles)} "
                "ranges): read what was prefetched, in its order, or drop it with cancel()"
            )
        try:
            if self._pending:
                self._pending.popleft()
            else:
                engine.submit(ranges)
            return engine.collect()
        except ReadFailure as failure:
            raise self._explained(failure, ranges) from None
        except BaseException:  # Ctrl-C, wherever it came: what is under way belongs to nobody
            self.cancel()
            raise

    def prefetch(self, handles: ArrayLike, offsets: ArrayLike, lengths: ArrayLike) -> None:
        """Start reading these ranges, for a later `read` of the same; raises `UsageError` beyond `max_pending`."""
        engine, ranges = self._living(), self._ranges(handles, offsets, lengths, copy=True)
        if len(self._pending) >= self.max_pending:
            raise UsageError(f"{len(self._pending)} batches are prefetched, max_pending allows no more: read one first")
        try:
            engine.submit(ranges)
            self._pending.append(ranges)
        except DatasetError:
            raise  # this one was refused, the others go on
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Drop what was prefetched and not read."""
        engine = self._living()
        self._pending.clear()
        engine.cancel()

    def close(self) -> None:
        """End the reads, give memory and descriptors back. Addresses become invalid. Twice is once."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close() if self._pid == os.getpid() else engine.abandon()
        while self._files:
            with suppress(OSError):
                os.close(self._files.pop()[1])

    def __enter__(self) -> DirectReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_engine", None) is not None:
            self.close()

    def _start(self, name: EngineName) -> tuple[Engine, str]:
        if name not in ("auto", "io_uring", "threads", "python"):
            raise UsageError(f"no engine {name!r} (known: auto, io_uring, threads, python)")
        library = None if name == "python" else native.load("direct")
        reasons: list[str] = []
        for candidate in ("io_uring", "threads"):
            if name not in ("auto", candidate):
                continue
            try:
                if library is None:
                    raise OSError(errno.ENOSYS, "direct.cpp is not compiled here")
                engine = NativeEngine(library, candidate, _deep(candidate, self.depth))
                self.reason = "; ".join(reasons)
                return engine, candidate
            except OSError as error:
                reasons.append(f"{candidate}: {error.strerror}")
        if name in ("auto", "python"):
            self.reason = "; ".join(reasons)
            return PythonPool(_deep("python", self.depth)), "python"
        raise UsageError(f"engine {name!r} does not work here ({reasons[0]}): set it to auto, threads or python")

    def _living(self) -> Engine:
        """The engine of this process: threads and rings do not survive a fork, open files do."""
        if self._engine is None:
            raise UsageError("the reader is closed: make another")
        if self._pid != os.getpid():
            self._engine.abandon()
            self._pid = os.getpid()
            self._pending.clear()
            self._engine, self._name = self._start(self._name)  # type: ignore[arg-type]
            for handle, (_, descriptor, sector) in enumerate(self._files):
                self._engine.set_file(handle, descriptor, sector)
        return self._engine

    def _ranges(self, handles: ArrayLike, offsets: ArrayLike, lengths: ArrayLike, *, copy: bool = False) -> Ranges:
        make: Callable[..., np.ndarray] = np.array if copy else np.asarray
        given = Ranges(make(handles, np.int32), make(offsets, np.int64), make(lengths, np.int64))
        n = len(given.handles)
        if any(part.shape != (n,) for part in given):
            shapes = ", ".join(str(part.shape) for part in given)
            raise UsageError(f"handles, offsets and lengths must have one shape [n]: {shapes} given")
        if n and not (given.handles.min() >= 0 and given.handles.max() < len(self._files)):
            raise UsageError(f"handles must be 0 to {len(self._files) - 1}, as `open` gave them")
        bad = (given.offsets.view(np.uint64) > MAX_OFFSET) | (given.lengths.view(np.uint64) > MAX_LENGTH)  # or negative
        if bad.any():
            i = int(np.argmax(bad))
            raise CorruptDataError(
                f"{self._files[given.handles[i]][0]}: {given.lengths[i]} bytes at {given.offsets[i]} is no range "
                "of a file: its offsets are damaged; pack the dataset anew or copy it again"
            )
        return Ranges(*map(np.ascontiguousarray, given))

    def _reads_direct(self, descriptor: int) -> bool:
        """Whether direct reads of whole sectors work, and not only opening for them; tried once a device."""
        device = os.fstat(descriptor).st_dev
        if device not in self._direct:
            self._direct[device] = _reads_direct(descriptor)
        return self._direct[device]

    def _explained(self, failure: ReadFailure, ranges: Ranges) -> DatasetError:
        handle, offset, length = (int(part[failure.range]) for part in ranges)
        path, descriptor, _ = self._files[handle]
        if failure.error:
            return DatasetError(
                f"{path}: bytes {offset} to {offset + length} cannot be read: {os.strerror(failure.error)}"
            )
        size = min(os.fstat(descriptor).st_size, failure.reached)
        return CorruptDataError(
            f"{path}: bytes {offset} to {offset + length} were asked for, but the file ends at {size}: "
            "it was cut short; copy it again or pack the dataset anew"
        )


def _deep(engine: str, depth: int) -> int:
    """Reads in flight: each costs the pools a thread."""
    return depth if engine == "io_uring" else min(depth, MAX_THREADS)


def _open(path: str | Path, *, direct: bool = True) -> tuple[int, bool]:
    """A descriptor, and whether it reads past the page cache. Raises `OSError`."""
    flags = os.O_RDONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | (os.O_DIRECT if direct else 0)), direct
    except OSError as error:
        if error.errno == errno.EMFILE and _more_descriptors():
            return _open(path, direct=direct)
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP) and direct:
            return _open(path, direct=False)
        raise


def _more_descriptors() -> bool:
    """Use what the administrator allows: the soft limit of 1024 is there for programs that call select(2)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == hard:
        return False
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] > soft


def _not_opened(error: OSError, path: str | Path) -> str:
    if error.errno == errno.EMFILE:
        return f"{path} cannot be opened: this process has too many files open; raise the limit with ulimit -n"
    return f"{path} cannot be opened: {error.strerror or error}"


def _reads_direct(descriptor: int) -> bool:
    """Whether a direct read of one sector works; raises `OSError` for other troubles than that."""
    with mmap.mmap(-1, SECTOR_BYTES) as memory:
        try:
            os.preadv(descriptor, [memory], 0)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return False
            raise
    return True
