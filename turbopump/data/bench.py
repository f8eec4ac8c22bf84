"""How storage is measured: reads of a test file by every engine, cold and cached, and the writing of checkpoints.

The file holds random bytes, is as large as disk, memory and time allow (16 MiB to 1 GiB) and has no name, so that
nothing can leave it behind (scratch.py). *Cold* means that its pages were dropped from this system's page cache before
each block of reads, or that the engine passes the cache by; no permission is needed, and whether the pages went is
looked up. What memory lies behind the device (a host's, a controller's) cannot be emptied from here: `uncertainties`
says so where it is likely. Time is the wall clock's, in blocks of many reads; that of cached reads, which wait for
nothing, the CPU time of the thread. Python's own cost per read (0.3-0.5 us) is part of it, as of a loader's.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from turbopump.core.errors import RunDirectoryError, TurbopumpError
from turbopump.core.files import explain_os_error
from turbopump.core.units import human_bytes
from turbopump.core.workload import Op
from turbopump.data import checkpoint_bench, fio
from turbopump.data.ops import CheckpointRead, CheckpointWrite, RandomRead, SequentialRead, SequentialWrite
from turbopump.data.read_engines import ROUTES, Engine, Reads, page_aligned, threads_of
from turbopump.data.scratch import BLOCK_BYTES, NO_SPACE, ScratchDirectory, ScratchFile, memory_behind, sweep, write_all
from turbopump.hardware.detect import available_bytes
from turbopump.hardware.profile import Measurement, Request, Trial
from turbopump.hardware.timing import THREAD_CPU, WALL, Clock, Timing

SIZES = (512, 4096, 12288, 32768, 131072, 1 << 20)
DEPTHS = (1, 4, 16, 64)
CHECKPOINT_BYTES = (16 << 20, 64 << 20, 256 << 20, 1 << 30)
LEAST_FILE_BYTES, MOST_FILE_BYTES = 16 << 20, 1 << 30
SHARE_OF_FREE = 4  # the test file takes at most a quarter of the free disk, and of the free memory
BLOCKS = 6
READ_AHEAD_BYTES = 16 << 20  # twice the window of the disk this was written on: a shorter block is all start
COLD_SHARE, WARM_SHARE = 0.01, 0.99
DIRECT, URING = "pread O_DIRECT", "io_uring O_DIRECT"
WRITE_ROUTES = ("write + fsync", "write O_DIRECT + fsync")
KINDS = (SequentialRead, RandomRead, SequentialWrite, CheckpointWrite, CheckpointRead)
ReadOp = SequentialRead | RandomRead


def trials(request: Request) -> list[Trial]:
    """What is worth measuring of storage, the most telling first; none unless `data` is asked for."""
    if "data" not in request.domains:
        return []
    found = [trial for op in request.ops if isinstance(op, KINDS) for trial in _all_routes(op, tier=0)]
    found += _telling() + _best_engines() + _checkpoints(request) + _other_engines()
    unique = {trial.key: trial for trial in reversed(found)}  # the first of its key stays
    order = {trial.key: number for number, trial in reversed(list(enumerate(found)))}
    return sorted(unique.values(), key=lambda trial: (trial.tier, order[trial.key]))


def _trial(op: Op, route: str, tier: int) -> Trial:
    return Trial(op, route, threads_of(route, getattr(op, "depth", 1)), tier=tier)


def _all_routes(op: Op, tier: int) -> list[Trial]:
    if isinstance(op, CheckpointWrite | CheckpointRead):
        return [_trial(op, route, tier) for route in checkpoint_bench.routes(op)]
    if isinstance(op, SequentialWrite):
        return [_trial(op, route, tier) for route in WRITE_ROUTES]
    cached = bool(getattr(op, "cached", False))
    return [_trial(op, route, tier) for route in ROUTES if not (cached and "O_DIRECT" in route)]


def _telling() -> list[Trial]:
    """Enough for a summary: bandwidth, latency, rate of small reads, of the page cache, of a checkpoint."""
    reads = [
        (SequentialRead(1 << 20), "pread"),
        (SequentialRead(1 << 20, depth=16), URING),
        *((RandomRead(4096, depth), route) for depth in (1, 64) for route in (DIRECT, URING)),
        *((RandomRead(size, 64), URING) for size in (12288, 131072)),
        *((RandomRead(size, depth, True), "mmap") for size, depth in ((4096, 1), (4096, 64), (131072, 64))),
    ]
    return [
        *(_trial(op, route, 0) for op, route in reads),
        *(trial for op in (CheckpointWrite(CHECKPOINT_BYTES[0]), CheckpointRead(CHECKPOINT_BYTES[0]))
          for trial in _all_routes(op, 0)),
    ]  # fmt: skip


def _best_engines() -> list[Trial]:
    """The engines that are the best somewhere, at all sizes and depths."""
    cold = [_trial(RandomRead(size, depth), route, 1) for depth in reversed(DEPTHS) for size in SIZES
            for route in (URING, DIRECT)]  # fmt: skip
    cold += [_trial(SequentialRead(size), route, 1) for size in SIZES for route in ("pread", DIRECT)]
    cold += [_trial(SequentialRead(size, depth=16), URING, 1) for size in SIZES]
    cached = [_trial(RandomRead(size, depth, True), "mmap", 1) for depth in DEPTHS for size in SIZES]
    cached += [_trial(RandomRead(size, 1, True), "pread", 1) for size in SIZES]
    cached += [_trial(SequentialRead(size, True), route, 1) for size in SIZES for route in ("pread", "mmap")]
    return cold + cached


def _checkpoints(request: Request) -> list[Trial]:
    """Writes; of checkpoints those sizes that a disk of 500 MB/s writes in a few times `row_s`."""
    sizes = [size for size in CHECKPOINT_BYTES[1:] if size / 5e8 <= 4 * request.row_s]
    ops: list[Op] = [kind(size) for size in sizes for kind in (CheckpointWrite, CheckpointRead)]
    ops += [SequentialWrite(size) for size in (131072, 1 << 20)]
    return [trial for op in ops for trial in _all_routes(op, 1)]


def _other_engines() -> list[Trial]:
    """For comparison: they are what many programs use."""
    found = [_trial(RandomRead(size, depth), route, 2) for route in ("pread", "readahead + preadv") for depth in DEPTHS
             for size in SIZES]  # fmt: skip
    found += [_trial(RandomRead(size), "mmap", 2) for size in SIZES]
    found += [_trial(SequentialRead(size), "mmap", 2) for size in SIZES]
    found += [_trial(RandomRead(size, depth, True), "io_uring", 2) for depth in (16, 64) for size in SIZES]
    if fio.installed():
        found += [Trial(RandomRead(size, depth), fio.ROUTE, tier=2) for depth in (1, 64) for size in SIZES]
    return found


def measure(trials: Iterable[Trial], request: Request, until: float) -> Iterator[Measurement]:
    """A row for each trial, in order, until `until` of `time.monotonic()`; trials that cannot end by then have none.

    Raises `RunDirectoryError` where `request.directory` does not exist or cannot be written. A full disk, an engine
    that is refused and a file that would be too small are rows with a problem. Leaves nothing in the directory.
    """
    storage = _Storage(request, until)
    longest_s = 0.0  # a slow device needs longer than asked: a block has no fewer reads than are requested at once
    try:
        for number, trial in enumerate(trials):
            begin = time.monotonic()
            if begin + max(longest_s, _least_s(trial, request)) > until:
                return
            row = storage.row(trial)
            if number and row.works:  # the first also made the file
                longest_s = max(longest_s, time.monotonic() - begin)
            yield row
    finally:
        storage.close()


def uncertainties(rows: Iterable[Measurement]) -> tuple[str, ...]:
    """What is less certain of `rows` than it could be, and why; each once."""
    said = (
        str(row.facts["uncertain"]).split("; ") for row in rows if row.domain == "data" and "uncertain" in row.facts
    )
    return tuple(dict.fromkeys(text for texts in said for text in texts))


def _least_s(trial: Trial, request: Request) -> float:
    if isinstance(trial.op, CheckpointWrite | CheckpointRead):
        return max(2 * request.row_s, 4 * trial.op.bytes / 5e8)
    return 2 * request.row_s


class _Storage:
    """The test file, made when it is first needed, and how each kind of operation is timed."""

    def __init__(self, request: Request, until: float) -> None:
        self._request, self._until = request, until
        self._directory = request.directory.resolve()
        sweep(self._directory)
        self._file = ScratchFile(self._directory)  # also finds a directory that cannot be written
        self._no_file = ""
        self._dropped: float | None = 1.0
        """Share of the file in the page cache since it was last dropped, if only direct reads came since; else 1."""
        self._random = np.random.default_rng(0)
        self._behind = memory_behind(self._directory)

    def close(self) -> None:
        self._file.close()

    def row(self, trial: Trial) -> Measurement:
        """The row of one trial; what the system refuses is its problem."""
        try:
            if isinstance(trial.op, SequentialRead | RandomRead):
                return self._read(trial, trial.op)
            if isinstance(trial.op, SequentialWrite):
                return self._write(trial, trial.op.bytes_per_write)
            if isinstance(trial.op, CheckpointWrite | CheckpointRead):
                return self._checkpoint(trial, trial.op)
        except OSError as error:
            if error.errno in NO_SPACE:
                return Measurement.failed(trial, "data", explain_os_error(error, self._directory))
            return Measurement.failed(trial, "data", f"{trial.route} is refused here: {error.strerror or error}")
        except TurbopumpError as error:
            return Measurement.failed(trial, "data", str(error).splitlines()[0])
        return Measurement.failed(trial, "data", f"{type(trial.op).__name__} is no operation of storage")

    # --- reads -------------------------------------------------------------------------------------------------------

    def _read(self, trial: Trial, op: ReadOp) -> Measurement:
        if problem := self._problem_of_file():
            return Measurement.failed(trial, "data", problem)
        size = int(op.cost.bytes)
        least = (2 * max(op.depth, 4) + 1) * _stride(size, op)
        if least > self._file.num_bytes:
            return Measurement.failed(
                trial, "data", f"{2 * max(op.depth, 4)} reads of {human_bytes(size)} need a test file of "
                f"{human_bytes(least)}; there was room or time for {human_bytes(self._file.num_bytes)} in "
                f"{self._directory}")  # fmt: skip
        if trial.route == fio.ROUTE:
            return self._by_fio(trial, op)
        sequential = isinstance(op, SequentialRead)
        timed = not op.cached and trial.route.startswith("pread")
        engine = ROUTES[trial.route](self._file, Reads(size, op.depth, sequential, timed))
        try:
            # a cached read waits for nothing, so that its time is what this thread computes; a cold one is mostly wait
            clock = THREAD_CPU if op.cached and trial.threads == 1 else WALL
            timing, share = self._time_reads(op, engine, clock)
        finally:
            engine.close()
        facts: dict[str, Any] = {"p99_s": float(np.quantile(engine.latencies_s, 0.99))} if engine.latencies_s else {}
        return self._row(trial, timing, share, facts)

    def _time_reads(self, op: ReadOp, engine: Engine, clock: Clock) -> tuple[Timing, float | None]:
        """Blocks of reads, and the share of the file that was in the page cache before them (the least certain one)."""
        shares: list[float | None] = []

        def prepare() -> None:
            if op.cached:
                shares.append(self._file.warm())
                self._dropped = 1.0
                return
            if engine.sector == 1 or self._dropped == 1.0:
                engine.forget()
                self._dropped = self._file.drop()
            shares.append(self._dropped)
            if engine.sector == 1:
                self._dropped = 1.0  # what it reads stays

        size = int(op.cost.bytes)
        least, most = 2 * max(op.depth, 4), self._places(op)
        if isinstance(op, SequentialRead) and not op.cached and engine.sector == 1:
            least = max(least, min(most, READ_AHEAD_BYTES // size))
        count = least
        for _ in range(2):  # the first reads also start threads and touch buffers; the second say how many make a block
            prepare()
            pilot = self._offsets(op, count)
            _, wall_s = clock.time(lambda: engine.read(pilot), 1)  # noqa: B023
            count = max(least, round(count * self._request.row_s / BLOCKS / wall_s))
            if not op.cached:
                count = min(count, most)  # no place twice between two drops
        engine.latencies_s.clear()
        seconds: list[float] = []
        walls: list[float] = []
        begin = time.monotonic()
        while len(seconds) < 2 or (
            sum(walls) < self._request.row_s and time.monotonic() - begin < 5 * self._request.row_s
        ):
            prepare()
            offsets = self._offsets(op, count)
            elapsed_s, wall_s = clock.time(lambda: engine.read(offsets), 1)  # noqa: B023
            seconds.append(elapsed_s / count)
            walls.append(wall_s)
        known = [share for share in shares if share is not None]
        worst = None if len(known) < len(shares) else min(known) if op.cached else max(known, default=0.0)
        timing = _timing(seconds, count)
        if clock is THREAD_CPU:
            waited = max(0.0, 1.0 - sum(seconds) * count / sum(walls))
            timing = replace(timing, clock=clock.name, wall_s=float(np.median(walls)) / count, waited=waited)
        return timing, worst

    def _offsets(self, op: ReadOp, count: int) -> Any:
        """Places of `count` reads: in order from somewhere, or at random with none twice while there are others."""
        size, places = int(op.cost.bytes), self._places(op)
        stride = _stride(size, op)
        if isinstance(op, SequentialRead):
            first = int(self._random.integers(places)) if op.cached or count < places // 2 else 0
            return (first + np.arange(count)) % places * stride
        ids = self._random.permutation(places)
        if count > places:
            ids = self._random.integers(0, places, count)
        return ids[:count] * stride + self._random.integers(0, stride // size, min(count, len(ids))) * size

    def _places(self, op: ReadOp) -> int:
        """Reads that the file has room for; one less, since those of whole sectors may reach beyond their record."""
        return self._file.num_bytes // _stride(int(op.cost.bytes), op) - 1

    def _by_fio(self, trial: Trial, op: ReadOp) -> Measurement:
        share = self._file.drop()
        runs = [fio.random_read_s(self._file, int(op.cost.bytes), op.depth, self._request.row_s / 3) for _ in range(3)]
        p99_s = [p99 for _, p99 in runs if p99 is not None]
        timing = _timing([seconds for seconds, _ in runs], max(1, round(self._request.row_s / 3 / runs[0][0])))
        return self._row(trial, timing, share, {"p99_s": float(np.median(p99_s))} if p99_s else {})

    def _problem_of_file(self) -> str:
        """Make the test file if there is none yet; why there can be none, else empty."""
        if self._file.num_bytes or self._no_file:
            return self._no_file
        free, memory = shutil.disk_usage(self._directory).free, available_bytes()
        wanted = min(MOST_FILE_BYTES, max(2 * LEAST_FILE_BYTES, round(self._request.row_s * 2.56e9)))
        wanted = min(wanted, free // SHARE_OF_FREE, memory // SHARE_OF_FREE) // BLOCK_BYTES * BLOCK_BYTES
        needed = human_bytes(SHARE_OF_FREE * LEAST_FILE_BYTES)
        self._no_file = (
            f"storage reads need a test file in {self._directory}: {needed} free on the disk and in memory are "
            f"needed, {human_bytes(free)} and {human_bytes(memory)} are"
        )
        now = time.monotonic()
        fill_until = now + 0.25 * (self._until - now)
        while wanted >= LEAST_FILE_BYTES:
            try:
                self._file.fill(
                    wanted, lambda: self._file.num_bytes < LEAST_FILE_BYTES or time.monotonic() < fill_until
                )
                self._no_file = ""
                break
            except OSError as error:
                if error.errno not in NO_SPACE:
                    raise
                self._no_file = explain_os_error(error, self._directory)
                wanted = max(LEAST_FILE_BYTES, wanted // 4) if wanted > LEAST_FILE_BYTES else 0
        return self._no_file

    # --- writes ------------------------------------------------------------------------------------------------------

    def _write(self, trial: Trial, size: int) -> Measurement:
        """Files of many writes, emptied and written again; each time includes that of fsync."""
        direct = "O_DIRECT" in trial.route
        data = memoryview(page_aligned(1, size)[0])
        data[:] = self._random.bytes(size)
        with ScratchFile(self._directory) as file:
            handle = file.open_again(os.O_WRONLY | os.O_DIRECT) if direct else os.dup(file.handle)
            try:

                def write(count: int) -> None:
                    os.lseek(handle, 0, os.SEEK_SET)
                    for _ in range(count):
                        write_all(handle, data)
                    os.fsync(handle)

                room = shutil.disk_usage(self._directory).free // SHARE_OF_FREE // size
                if room < 4:
                    raise RunDirectoryError(
                        f"4 writes of {human_bytes(size)} need {human_bytes(16 * size)} free in "
                        f"{self._directory}: {human_bytes(room * size * SHARE_OF_FREE)} are"
                    )
                per_write_s = _elapsed_s(lambda: write(4)) / 4
                count = min(room, max(4, round(self._request.row_s / BLOCKS / per_write_s)), (256 << 20) // size)
                seconds: list[float] = []
                while len(seconds) < 2 or sum(seconds) * count < self._request.row_s:
                    os.ftruncate(handle, 0)
                    seconds.append(_elapsed_s(lambda: write(count)) / count)
            finally:
                os.close(handle)
        return self._row(trial, _timing(seconds, count), 0.0, {})

    def _checkpoint(self, trial: Trial, op: CheckpointWrite | CheckpointRead) -> Measurement:
        free, needed = shutil.disk_usage(self._directory).free, SHARE_OF_FREE * op.bytes
        if free < needed or available_bytes() < needed:
            raise RunDirectoryError(
                f"a checkpoint of {human_bytes(op.bytes)} is tried only where {human_bytes(needed)} are free on the "
                f"disk and in memory: {self._directory} has {human_bytes(free)}"
            )
        with ScratchDirectory(self._directory) as place:
            seconds = checkpoint_bench.seconds(place, op, trial.route, self._request.row_s)
        return self._row(trial, _timing(seconds, 1), 0.0, {})

    def _row(self, trial: Trial, timing: Timing, share: float | None, facts: dict[str, Any]) -> Measurement:
        said = _doubts(bool(getattr(trial.op, "cached", False)), share)
        if self._behind and not getattr(trial.op, "cached", False):
            said.append(self._behind)
        facts = {"iops": 1.0 / timing.median_s, "engine": trial.route, "file_bytes": self._file.num_bytes, **facts}
        if said:
            facts["uncertain"] = "; ".join(said)
        library = f"Linux {platform.release()}"
        return replace(Measurement.of(trial, "data", timing, library=library), facts=facts)


def _stride(size: int, op: ReadOp) -> int:
    """Distance of two places: for random reads at least a page, so that one does not bring the next into memory."""
    return size if isinstance(op, SequentialRead) or op.cached else -(-4096 // size) * size


def _elapsed_s(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _timing(seconds: list[float], calls: int) -> Timing:
    """The `Timing` of blocks, in seconds of one operation, on the wall clock."""
    median_s = float(np.median(seconds))
    return Timing("wall", len(seconds), calls, min(seconds), median_s, float(np.quantile(seconds, 0.9)), median_s, 0.0)


def _doubts(cached: bool, share: float | None) -> list[str]:
    if share is None:
        return ["whether the test file was in the page cache could not be seen (mincore)"]
    if cached and share < WARM_SHARE:
        return ["a part of the test file did not stay in the page cache: cached reads are partly from the device"]
    if not cached and share > COLD_SHARE:
        return ["the test file did not leave the page cache (POSIX_FADV_DONTNEED): cold reads are partly from memory"]
    return []
