"""Cold random reads: records through `DirectReader`, batches ahead of their use, beside fio's best setting.

`python -m benchmarks.data_cold [--quick] [--directory DIR]` prints the figures; `measure_cold` gives them to the
benchmark `data`, whose target `data.cold` is the ratio at 12 KB. All take turns, round by round, on one file of random
bytes without a name (nothing is left behind by any end), whose pages are dropped before each; both sides read with
O_DIRECT. fio's best is the setting with the best median; where fio is not installed there is no ratio.
CPU time is that of the whole process, user and system.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Ratio, ratio_with_interval
from turbopump.core.files import from_json
from turbopump.data.direct import DirectReader
from turbopump.data.scratch import ScratchFile

RECORD_BYTES = {"2 KB": 2048, "12 KB": 12_288, "110 KB": 112_640}
BATCH, BATCHES_AHEAD = 256, 4
FIO = {  # name: engine, depth of a job, jobs
    "fio io_uring, 16 deep": ("io_uring", 16, 1),
    "fio io_uring, 64 deep": ("io_uring", 64, 1),
    "fio io_uring, 128 deep": ("io_uring", 128, 1),
    "fio io_uring, 256 deep": ("io_uring", 256, 1),
    "fio psync, 64 jobs": ("psync", 1, 64),
}


@dataclass(frozen=True)
class Speed:
    """Rate of one run, and what it took of the processors."""

    reads_per_s: float
    cpu_s_per_read: float


@dataclass(frozen=True)
class ColdResult:
    """Records of one size: `ratio` is the rate over that of `best`, in pairs of rounds; None where fio is absent.

    `speeds` are medians over the rounds by contestant: `ours` (the engine chosen here, `engine`), `ours, threads`,
    and those of fio.
    """

    record: str
    record_bytes: int
    engine: str
    speeds: Mapping[str, Speed]
    best: str | None
    ratio: Ratio | None


def measure_cold(quick: bool, directory: Path = Path(__file__).parent) -> list[ColdResult]:
    """One result a record size."""
    with ScratchFile(directory) as file:
        file.fill((1 if quick else 3) << 30)
        return [
            _measure(file, record, rounds=3 if quick else 11, run_s=0.5 if quick else 1.0) for record in RECORD_BYTES
        ]


def _measure(file: ScratchFile, record: str, rounds: int, run_s: float) -> ColdResult:
    record_bytes = RECORD_BYTES[record]
    contestants: dict[str, Callable[[], Speed]] = {}
    chosen = DirectReader()
    pool = DirectReader(engine="threads")
    with chosen, pool:
        for name, reader in {"ours": chosen, "ours, threads": pool}.items():
            handle = reader.open(f"/proc/self/fd/{file.handle}")
            contestants[name] = lambda reader=reader, handle=handle: read_records(  # type: ignore[misc]
                reader, handle, file.num_bytes, record_bytes, run_s
            )
        if shutil.which("fio"):
            for name in FIO:
                contestants[name] = lambda name=name: fio(file, name, record_bytes, run_s)  # type: ignore[misc]
        runs = _take_turns(file, contestants, rounds)
        engine = chosen.engine
    speeds = {name: _median(speeds) for name, speeds in runs.items()}
    best = max((name for name in FIO if name in runs), key=lambda name: speeds[name].reads_per_s, default=None)
    ratio = None
    if best is not None:
        ratio = ratio_with_interval([s.reads_per_s for s in runs["ours"]], [s.reads_per_s for s in runs[best]])
    return ColdResult(record, record_bytes, engine, speeds, best, ratio)


def _take_turns(
    file: ScratchFile, contestants: Mapping[str, Callable[[], Speed]], rounds: int
) -> dict[str, list[Speed]]:
    """Every contestant once a round; who begins moves on."""
    names, runs = list(contestants), {name: list[Speed]() for name in contestants}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            file.drop()
            runs[name].append(contestants[name]())
    return runs


def read_records(reader: DirectReader, handle: int, file_bytes: int, record_bytes: int, run_s: float) -> Speed:
    """Batches of random records for `run_s`, always `BATCHES_AHEAD` under way; the last ones are waited for."""
    rng = np.random.default_rng()
    handles, lengths = np.full(BATCH, handle, np.int32), np.full(BATCH, record_bytes, np.int64)
    ahead: deque[np.ndarray] = deque()
    num_reads, begin, cpu_begin = 0, time.perf_counter(), time.process_time()
    go_on = True
    while go_on or ahead:
        while go_on and len(ahead) < BATCHES_AHEAD:
            offsets = rng.integers(0, file_bytes // record_bytes, BATCH) * record_bytes
            reader.prefetch(handles, offsets, lengths)
            ahead.append(offsets)
        reader.read(handles, ahead.popleft(), lengths)
        num_reads += BATCH
        go_on = time.perf_counter() - begin < run_s
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
    return Speed(num_reads / seconds, cpu_s / num_reads)


def fio(file: ScratchFile, name: str, record_bytes: int, run_s: float) -> Speed:
    """The same reads by fio; raises `RuntimeError` where it fails."""
    engine, depth, jobs = FIO[name]
    command = [
        "fio", "--name=cold", f"--filename=/proc/{os.getpid()}/fd/{file.handle}", f"--size={file.num_bytes}",
        "--readonly", "--rw=randread", "--direct=1", "--norandommap", "--randrepeat=0", f"--ioengine={engine}",
        f"--bs={record_bytes}", f"--iodepth={depth}", f"--numjobs={jobs}", "--group_reporting",
        "--time_based", f"--runtime={round(1000 * run_s)}ms", "--output-format=json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, timeout=60 + 10 * run_s, cwd=file.directory, check=False)
    output = done.stdout
    if done.returncode:
        raise RuntimeError(f"fio failed ({done.returncode}): {done.stderr.decode(errors='replace')[:200]}")
    (job,) = from_json(output[output.find(b"{") :])["jobs"]  # warnings may stand before it
    reads_per_s = float(job["read"]["iops"])
    return Speed(reads_per_s, (job["usr_cpu"] + job["sys_cpu"]) / 100 * jobs / reads_per_s)


def _median(speeds: list[Speed]) -> Speed:
    return Speed(
        float(np.median([s.reads_per_s for s in speeds])), float(np.median([s.cpu_s_per_read for s in speeds]))
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_cold")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter rounds, within a minute")
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent, help="whose disk is measured")
    given = parser.parse_args()
    for result in measure_cold(given.quick, given.directory):
        print(f"{result.record} records, {result.engine}")
        for name, speed in result.speeds.items():
            bytes_per_s, cpu_us = speed.reads_per_s * result.record_bytes, 1e6 * speed.cpu_s_per_read
            rate = f"{speed.reads_per_s:9,.0f} reads/s {bytes_per_s / 1e6:7,.0f} MB/s"
            print(f"  {name:24}{rate}, {cpu_us:4.1f} us of CPU a read")
        if result.ratio is None:
            print("  fio is not installed: no comparison")
        else:
            low, high = result.ratio.spread
            print(
                f"  ours / {result.best}: {result.ratio.value:.2f} [{low:.2f}, {high:.2f}], {result.ratio.runs} rounds"
            )


if __name__ == "__main__":
    main()
