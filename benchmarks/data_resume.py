"""Exact resume: random schedules of ranks and workers against one reader without a break; and what an order costs.

A schedule runs one dataset (rows, rows that differ in length, tokens, mixtures) in one order. It stops at random steps
and goes on with another number of ranks, another kind and number of workers, other microbatches, its sources opened
anew; the global batches, put together of all ranks', are compared bit for bit.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_own import in_process, note
from turbopump.data.format import open_dataset
from turbopump.data.loader import Loader
from turbopump.data.manifest import Field
from turbopump.data.mixture import MixtureSource
from turbopump.data.order import Order
from turbopump.data.ragged import Ragged, ragged_of
from turbopump.data.sources import ArraysConfig, ArraysSource, TokensConfig, TokensSource
from turbopump.data.text import TOKENIZER_NAME, ByteTokenizer, tokenizer_entry
from turbopump.data.writer import DatasetWriter

SCHEDULES, QUICK_SCHEDULES = 240, 24
MAX_RANKS, SHARD_BYTES, SEQ_LEN = 7, 4096, 16
ORDERS = {
    "rows": ("shuffle", "blocks", "sequential"), "ragged": ("shuffle", "blocks", "sequential", "bucketed"),
    "tokens": ("shuffle", "blocks", "sequential"), "mixture": ("shuffle", "blocks", "sequential"),
    "ragged mixture": ("bucketed",),
}  # fmt: skip
WORKERS = (("auto", 0), ("threads", 1), ("threads", 2), ("processes", 1), ("processes", 2))
MANY_SHARDS = 10_000


@dataclass(frozen=True)
class Segment:
    """From step `begin` to before `end` on `ranks` ranks."""

    begin: int
    end: int
    ranks: int
    microbatch: int
    workers: str
    num_workers: int


@dataclass(frozen=True)
class Schedule:
    """`kind` and `order` are of `ORDERS`; the segments follow each other from step 0 on."""

    kind: str
    order: str
    seed: int
    global_batch: int
    segments: tuple[Segment, ...]


def random_schedule(rng: np.random.Generator) -> Schedule:
    """2 to 4 segments of 1 to 4 steps, on 1 to 7 ranks each."""
    kind = str(rng.choice(list(ORDERS)))
    ranks = [int(r) for r in rng.integers(1, MAX_RANKS + 1, rng.integers(2, 5))]
    common = math.lcm(*ranks)
    global_batch = common * int(rng.integers(1, max(2, 64 // common)))
    segments, step = [], 0
    for count in ranks:
        end = step + int(rng.integers(1, 5))
        share = global_batch // count
        microbatch = int(rng.choice([0, *(size for size in range(1, share + 1) if share % size == 0)]))
        workers, num_workers = WORKERS[rng.integers(len(WORKERS))]
        segments.append(Segment(step, end, count, microbatch, workers, num_workers))
        step = end
    return Schedule(kind, str(rng.choice(ORDERS[kind])), int(rng.integers(1 << 40)), global_batch, tuple(segments))


def differing_batches(schedule: Schedule, datasets: Path) -> tuple[int, int]:
    """Global batches that differ from the uninterrupted reader's, and how many there are."""
    last = schedule.segments[-1].end
    expected = list(_global_batches(schedule, Segment(0, last, 1, 0, "auto", 0), datasets))
    found = [batch for segment in schedule.segments for batch in _global_batches(schedule, segment, datasets)]
    same = sum(a == b for a, b in zip(expected, found, strict=True))
    return last - same, last


def _global_batches(schedule: Schedule, segment: Segment, datasets: Path) -> Iterator[list[bytes]]:
    """The samples of each step's global batch, as bytes, from a real loader a rank."""
    loaders = [
        Loader(
            open_source(schedule.kind, datasets), global_batch=schedule.global_batch, microbatch=segment.microbatch,
            order=schedule.order, seed=schedule.seed, rank=rank, world_size=segment.ranks,  # type: ignore[arg-type]
            start_step=segment.begin, num_workers=segment.num_workers, workers=segment.workers,  # type: ignore[arg-type]
        )
        for rank in range(segment.ranks)
    ]  # fmt: skip
    try:
        for _ in range(segment.begin, segment.end):
            yield [sample for loader in loaders for batch in next(loader) for sample in samples_of(batch)]
    finally:
        for loader in loaders:
            loader.close()


def samples_of(batch: Any) -> list[bytes]:
    """Every sample of a microbatch as bytes, dtypes and shapes included."""
    columns = batch if type(batch) in (tuple, list) else (batch,)
    return [b"".join(parts) for parts in zip(*map(_column, columns), strict=True)]


def _column(column: Any) -> Iterator[bytes]:
    if isinstance(column, Ragged):
        values, offsets = np.asarray(column.values), np.asarray(column.offsets).tolist()
        rows: Iterator[np.ndarray] = (values[begin:end] for begin, end in pairwise(offsets))
    elif isinstance(column, torch.Tensor):
        rows = iter(column.numpy())
    else:
        raise TypeError(f"a loader delivers a {type(column).__name__}, which is not compared here")
    return (f"{row.dtype}{row.shape}".encode() + row.tobytes() for row in rows)


# ---- datasets


def write_datasets(datasets: Path) -> None:
    """One of each kind, of odd sizes, in several small shards; and a second one of rows for the mixture."""
    rng = np.random.default_rng(0)
    for name, rows in (("rows", 401), ("more-rows", 173)):
        fields = [Field("x", "float32", (5, 7)), Field("y", "int64")]
        columns = [rng.standard_normal((rows, 5, 7)).astype(np.float32), rng.integers(0, 1 << 60, rows)]
        _write(datasets / name, "arrays", fields, columns)
    fields = [Field("x", "int16", (), "ragged"), Field("y", "int32")]
    for name, rows in (("ragged", 307), ("more-ragged", 131)):
        parts = [rng.integers(0, 1 << 15, int(length)).astype(np.int16) for length in rng.integers(0, 90, rows)]
        _write(datasets / name, "arrays", fields, [ragged_of(parts), np.arange(rows, dtype=np.int32)])
    tokens = rng.integers(0, 256, 359 * SEQ_LEN + 1).astype(np.uint8)
    _write(datasets / "tokens", "tokens", [Field("tokens", "uint8")], [tokens])


def _write(path: Path, kind: str, fields: Sequence[Field], columns: Sequence[Any], shard: int = SHARD_BYTES) -> None:
    tokenizer = ByteTokenizer()
    with DatasetWriter(path, kind=kind, fields=fields, shard_bytes=shard) as writer:
        if kind == "tokens":
            writer.add_file(TOKENIZER_NAME, tokenizer.dumps())
        writer.append("train", columns)
        writer.finish(tokenizer=tokenizer_entry(tokenizer) if kind == "tokens" else None)


def open_source(kind: str, datasets: Path) -> Any:
    if kind == "tokens":
        return TokensSource(TokensConfig(path=str(datasets / kind), seq_len=SEQ_LEN), "train")
    if "mixture" in kind:
        names = ("ragged", "more-ragged") if kind == "ragged mixture" else ("rows", "more-rows")
        sources = [ArraysSource(ArraysConfig(path=str(datasets / name)), "train") for name in names]
        return MixtureSource(sources, [(0, (0.7, 0.3)), (3, (0.2, 0.8))])
    return ArraysSource(ArraysConfig(path=str(datasets / kind)), "train")


# ---- the figures


@dataclass(frozen=True)
class Resumed:
    """Global batches that differ, of how many, over all schedules; `figures` of the order and of opening."""

    differing: int
    batches: int
    schedules: int
    figures: Mapping[str, float]


def measure_resume(scratch: Path, quick: bool) -> Resumed:
    """Run all schedules; what differs is printed with its schedule."""
    datasets = scratch / "resume"
    datasets.mkdir()
    write_datasets(datasets)
    number, differing, total = QUICK_SCHEDULES if quick else SCHEDULES, 0, 0
    rng = np.random.default_rng(4)
    begin = time.perf_counter()
    for done in range(number):
        schedule = random_schedule(rng)
        wrong, batches = differing_batches(schedule, datasets)
        differing, total = differing + wrong, total + batches
        if wrong:
            note(f"  {wrong} of {batches} batches differ: {schedule}")
        if done % 40 == 39:
            note(f"  {done + 1} of {number} schedules, {time.perf_counter() - begin:.0f} s")
    figures = {f"ns an index of {n:.0e}": order_ns(n) for n in (10**6, 10**12)}
    shards, opening_s = opening(MANY_SHARDS // 10 if quick else MANY_SHARDS)
    figures[f"CPU s to open {shards} shards and read a batch"] = opening_s
    for name, value in figures.items():
        note(f"  {name}: {value:.3g}")
    return Resumed(differing, total, number, figures)


def order_ns(n: int, global_batch: int = 256, steps: int = 4096) -> float:
    """CPU nanoseconds an index of a shuffled order, step by step."""
    order = Order(n, global_batch, seed=1)
    begin = time.thread_time()
    for step in range(steps):
        order.step_ids(step)
    return (time.thread_time() - begin) * 1e9 / (steps * global_batch)


def opening(shards: int) -> tuple[int, float]:
    """How many shards there are, and the CPU seconds of a fresh process to open them and read a batch.

    They lie in memory where there is a place for that: CPU time is asked for, and each is synced when it is written.
    """
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        path = Path(folder) / "many"
        _write(path, "arrays", [Field("x", "uint8", (1024,))], [np.zeros((4 * shards, 1024), np.uint8)])
        return in_process(open_cpu_s, path)


def open_cpu_s(path: Path) -> tuple[int, float]:
    """Shards, and CPU seconds of this process to open the dataset and read 256 random rows."""
    begin = time.process_time()
    data = open_dataset(path, "mapped").data("train")
    data.rows(0, np.random.default_rng(0).integers(0, len(data), 256))
    return len(data.shards), time.process_time() - begin
