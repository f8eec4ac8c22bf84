"""The loader: `next(loader)` is one step of this rank, a list of microbatches; its position is the step number.

Which samples a step holds is a function of (seed, number of samples, global batch, order, step); ranks take contiguous
slices of the global batch and microbatches contiguous slices of those. What is random in a sample is a function of
(seed, epoch, index). So any number of ranks and any kind of reader sees the same batches, and a resumed run goes on at
its step without reading anything before it.

Steps are read by the caller, by threads of this process (`thread_readers`) or by forked processes (`process_readers`);
`read_choice` says which, `read_ahead` keeps them in order and in bounded memory, `step_reading` is what a step is.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch

from turbopump.core import spans
from turbopump.core.config import nearest_multiples
from turbopump.core.errors import ConfigError, DatasetError, UsageError
from turbopump.data import read_choice
from turbopump.data.order import OrderKind
from turbopump.data.process_readers import ProcessReaders
from turbopump.data.read_ahead import ReadAhead, Readers
from turbopump.data.read_choice import Choice, NumWorkers, Workers
from turbopump.data.source_order import source_order
from turbopump.data.step_reading import (
    Randomness,
    SampleReader,
    StepOrder,
    StepReader,
    kept_random_state,
    name_of,
    pinned,
    seed_everything,
)
from turbopump.data.thread_readers import ThreadReaders

__all__ = ["Loader", "evaluation_batches", "kept_random_state", "seed_everything"]

_NO_END = 1 << 62


class Loader:
    """An iterator over steps. `step` is the number (from 0) of the step that `next` will return.

    `num_steps` ends the iteration before that step. `order`: a name, or an object with `step_ids(step)`.
    `randomness`: `"seeded"` seeds the global generators of `random`, numpy and torch from (seed, epoch, index) before
    each sample (and leaves those of this process as they were); `"auto"` takes the source's own `randomness`, or
    `"seeded"` where it names none.

    `num_workers` readers (0: the caller) of the kind `workers` read ahead, `prefetch_steps` steps each; "auto" measures
    what pays, at the first step or in `start()`. `choice` is then that decision (`workers`, `num_workers`, `why`,
    `evidence`), and what another loader accepts as `choice=` to do the same without measuring.

    `copy=False` gives batches in memory that is used again: they are valid until the next call of `next`. That saves
    the page faults of fresh memory at every step, and is right where a step is all that uses its batch. The default
    gives memory of their own, since a program that keeps batches (`list(loader)`) would see others' data in them.
    With `pin_memory` (on CUDA) batches are in page-locked memory from torch's pool, which uses it again only when
    asynchronous copies from it are done; they are always copies.

    `stats` describes the step last returned: `ready_steps` (steps that were ready when it was asked for), `wait_s`
    (how long the caller waited), `read_s` (how long it took to read, per step), `restarts` (processes that died).

    Raises `ConfigError` for sizes that do not divide, `UsageError` for what is no map-style dataset, `DatasetError` for
    an empty one; `next` raises `SampleError` for a sample that fails or ends its process twice, after closing the
    loader.
    """

    def __init__(
        self,
        source: Any,
        *,
        global_batch: int,
        microbatch: int = 0,
        order: OrderKind | Literal["bucketed"] | StepOrder = "shuffle",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        num_steps: int | None = None,
        num_workers: NumWorkers = 0,
        workers: Workers = "auto",
        prefetch_steps: int = 2,
        randomness: Randomness = "auto",
        pin_memory: bool = False,
        copy: bool = True,
        choice: Mapping[str, Any] | None = None,
    ) -> None:
        _checked_size(source)
        share = _checked_share(global_batch, microbatch, world_size)
        samples = SampleReader(source, seed, randomness)
        made = source_order(source, global_batch, order=order, seed=seed) if isinstance(order, str) else order
        begin, end = rank * share, (rank + 1) * share
        self._steps = StepReader(
            samples, made, begin, end, microbatch or share, _NO_END if num_steps is None else num_steps
        )
        self.source = source
        self.global_batch = global_batch
        self.step = start_step
        self._end = _NO_END if num_steps is None else num_steps
        self._prefetch_steps = prefetch_steps
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._copy = copy
        self._trial = choice is None and num_workers == "auto"
        self.choice: Choice = (
            read_choice.candidate(samples, workers, num_workers) if choice is None else read_choice.checked(choice)
        )
        self._ahead: ReadAhead | None = None
        self._tried: dict[int, list[Any]] = {}
        self._buffers: list[list[Any]] = []
        self._closed = False
        self.stats: dict[str, float] = {}

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Any]:
        """The microbatches of this rank for step `self.step`, and one step further."""
        if self._closed:
            raise UsageError("the loader is closed: make a new one, with start_step set to the step to go on from")
        if self.step >= self._end:
            self._stop()
            raise StopIteration
        begin = time.perf_counter()
        try:
            batches = self._next()
        except BaseException:
            self.close()
            raise
        self.stats["wait_s"] = time.perf_counter() - begin
        spans.note("loader", self.stats)
        self.step += 1
        return batches

    def _next(self) -> list[Any]:
        self.start()
        if self.step in self._tried:
            self.stats = {"ready_steps": len(self._tried), "read_s": self.choice["evidence"]["read_s"], "restarts": 0}
            return self._tried.pop(self.step)
        if self._ahead is None:
            begin = time.perf_counter()
            batches = self._read_here()
            self.stats = {"ready_steps": 0, "read_s": time.perf_counter() - begin, "restarts": 0}
            return batches
        batches = self._ahead.next(self.step)
        self.stats = {"ready_steps": self._ahead.ready_steps, "read_s": self._ahead.read_s,
                      "restarts": self._ahead.readers.restarts}  # fmt: skip
        return batches

    def _read_here(self) -> list[Any]:
        if self._steps.samples.seeded:
            with kept_random_state():
                batches = self._steps.read(self.step)
        else:
            batches = self._steps.read(self.step, None if self._copy else self._steps.kept_buffers(self._buffers, 0))
        return pinned(batches) if self._pin_memory else batches

    def start(self) -> Choice:
        """Start to read ahead from `step` on, and decide who reads where that was left to measurement: `choice`.

        The first `next` does it otherwise.
        """
        if self._ahead is None and self.choice["workers"] != "none" and self.step < self._end and not self._closed:
            num_slots = self.choice["num_workers"] * self._prefetch_steps + 1
            self._ahead = ReadAhead(self._make_readers(num_slots), range(self.step, self._end), num_slots)
            if self._trial:
                self._trial = False
                self._try(num_slots)
        return self.choice

    def _make_readers(self, num_slots: int) -> Readers:
        kind, count = self.choice["workers"], self.choice["num_workers"]
        if kind == "threads":
            reuse = not self._copy or self._pin_memory  # pinning has copied before a slot is used again
            return ThreadReaders(self._steps, count, num_slots, reuse=reuse, pin_memory=self._pin_memory)
        return ProcessReaders(self._steps, count, num_slots, copy=self._copy, pin_memory=self._pin_memory)

    def _try(self, num_slots: int) -> None:
        assert self._ahead is not None
        done = self._ahead.fill()
        self.choice = read_choice.judged(self.choice, done, num_slots)
        if self.choice["workers"] == "none":
            self._stop()
            self._tried = {filled.task.first_step: filled.steps[0] for filled in done if filled.steps}

    def ids(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) of every sample of the global batch of a step, in order."""
        epochs, indices = self._steps.ids(step)
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def seek(self, step: int) -> None:
        """Go on from `step`; costs nothing but what was read ahead."""
        if step != self.step:
            self._stop()
            self.step = step

    def close(self) -> None:
        """End the threads or processes; harmless when called again."""
        self._closed = True
        self._stop()

    def _stop(self) -> None:
        ahead, self._ahead, self._tried = self._ahead, None, {}
        if ahead is not None:
            ahead.readers.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def evaluation_batches(
    source: Any,
    *,
    batch: int,
    max_samples: int = 0,
    rank: int = 0,
    world_size: int = 1,
    randomness: Randomness = "auto",
) -> Iterator[Any]:
    """Batches of up to `batch` samples in order; the ranks read disjoint contiguous parts that cover everything.

    `max_samples` takes that many, evenly spaced over the source (its first ones are rarely like the rest); 0 reads all.
    What is random in a sample is keyed by its index alone, so every evaluation is alike.
    """
    available = _checked_size(source)
    size = min(available, max_samples) if max_samples else available
    reader = SampleReader(source, 0, randomness)
    begin, end = (-(-size * number // world_size) for number in (rank, rank + 1))  # rank 0 always has the first
    for first in range(begin, end, batch):
        indices = np.arange(first, min(first + batch, end)) * available // size
        with kept_random_state():
            result = reader.read(np.zeros_like(indices), indices)
        yield result


def _checked_size(source: Any) -> int:
    if not hasattr(source, "__getitem__") or not hasattr(source, "__len__"):
        raise UsageError(
            f"{type(source).__name__} is not a map-style dataset: it needs __len__ and __getitem__ "
            f"(pack an iterable first: `from turbopump.pack import pack`)"
        )
    if not len(source):
        raise DatasetError(f"{name_of(source)} has no samples")
    return len(source)


def _checked_share(global_batch: int, microbatch: int, world_size: int) -> int:
    """Samples of one rank in a step."""
    if global_batch < 1:
        raise ConfigError([f"global_batch ({global_batch}) must be at least 1"], "loader")
    if global_batch % world_size:
        near = nearest_multiples(global_batch, world_size)
        raise ConfigError(
            [f"global_batch ({global_batch}) must be divisible by the data-parallel size ({world_size}): use {near}"],
            "loader",
        )
    if microbatch and global_batch // world_size % microbatch:
        near = nearest_multiples(global_batch, microbatch * world_size)
        raise ConfigError(
            [
                f"global_batch ({global_batch}) must be divisible by microbatch ({microbatch}) times the data-parallel "
                f"size ({world_size}): use {near}, or another microbatch"
            ],
            "loader",
        )
    return global_batch // world_size
