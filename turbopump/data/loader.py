"""The loader: `next(loader)` is one step of this rank, a list of device microbatches; its position is the step number.

Which samples a step holds is a function of (seed, number of samples, global batch, order, step); ranks take contiguous
slices of the global batch and microbatches contiguous slices of those. What is random in a sample is a function of
(seed, epoch, index). So any number of ranks and worker processes sees the same batches, and a resumed run goes on at
its step without reading anything before it. With workers, torch's `DataLoader` runs over the steps themselves.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, default_collate

from turbopump.core import errors
from turbopump.core.config import nearest_multiples
from turbopump.core.errors import ConfigError, DatasetError, SampleError, TurbopumpError, UsageError
from turbopump.data.order import Order, sample_key
from turbopump.data.processes import become_helper

Randomness = Literal["auto", "none", "seeded"]
_NO_END = 1 << 62


class Loader:
    """An iterator over steps. `step` is the number (from 0) of the step that `next` will return.

    `num_steps` ends the iteration before that step. `randomness`: `"seeded"` seeds the global generators of `random`,
    numpy and torch from (seed, epoch, index) before each sample (and leaves those of this process as they were);
    `"auto"` takes the source's own `randomness`, or `"seeded"` where it names none.

    Raises `ConfigError` for sizes that do not divide, `UsageError` for what is no map-style dataset, `DatasetError` for
    an empty one; `next` raises `SampleError` for a sample that fails or a worker that dies, after closing the loader.
    """

    def __init__(
        self,
        source: Any,
        *,
        global_batch: int,
        microbatch: int = 0,
        order: Literal["shuffle", "sequential"] = "shuffle",
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start_step: int = 0,
        num_steps: int | None = None,
        num_workers: int = 0,
        prefetch_steps: int = 2,
        randomness: Randomness = "auto",
        pin_memory: bool = False,
    ) -> None:
        size = _checked_size(source)
        share = _checked_share(global_batch, microbatch, world_size)
        self._order = Order(size, global_batch, order=order, seed=seed)
        self._steps = _Steps(
            _Reader(source, seed, randomness), self._order, rank * share, (rank + 1) * share, microbatch or share
        )
        self.source = source
        self.global_batch = global_batch
        self.step = start_step
        self._end = _NO_END if num_steps is None else num_steps
        self._num_workers = num_workers
        self._prefetch_steps = prefetch_steps
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._workers: _Workers | None = None
        self._closed = False

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> list[Any]:
        """The microbatches of this rank for step `self.step`, and one step further."""
        if self._closed:
            raise UsageError("the loader is closed: make a new one, with start_step set to the step to go on from")
        if self.step >= self._end:
            self._stop_workers()
            raise StopIteration
        try:
            batches = self._read_with_workers() if self._num_workers else self._read_here()
        except BaseException:
            self.close()
            raise
        self.step += 1
        return batches

    def _read_here(self) -> list[Any]:
        if not self._steps.reader.seeded:
            batches = self._steps.read(self.step)
        else:
            with kept_random_state():
                batches = self._steps.read(self.step)
        return _pinned(batches) if self._pin_memory else batches

    def _read_with_workers(self) -> list[Any]:
        if self._workers is None:
            self._workers = _Workers(
                self._steps, range(self.step, self._end), self._num_workers, self._prefetch_steps, self._pin_memory
            )
        result = self._workers.next(self.step)
        if isinstance(result, _Failure):
            raise result.error()
        return result

    def ids(self, step: int) -> list[tuple[int, int]]:
        """The (epoch, index) of every sample of the global batch of a step, in order."""
        epochs, indices = self._order.step_ids(step)
        return list(zip(epochs.tolist(), indices.tolist(), strict=True))

    def seek(self, step: int) -> None:
        """Go on from `step`; costs nothing but what workers have prefetched."""
        if step != self.step:
            self._stop_workers()
            self.step = step

    def close(self) -> None:
        """End the worker processes; harmless when called again."""
        self._closed = True
        self._stop_workers()

    def _stop_workers(self) -> None:
        workers, self._workers = self._workers, None
        if workers is not None:
            workers.close()

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
    reader = _Reader(source, 0, randomness)
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
        raise DatasetError(f"{_name(source)} has no samples")
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


def _name(source: Any) -> str:
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else type(source).__name__


class _Reader:
    """Reads and collates the samples of one microbatch."""

    def __init__(self, source: Any, seed: int, randomness: Randomness) -> None:
        self.source = source
        self._seed = seed
        if randomness == "auto":
            randomness = getattr(source, "randomness", "seeded")
        if randomness not in ("none", "seeded"):
            raise UsageError(f"randomness {randomness!r} of {_name(source)} must be 'none' or 'seeded'")
        self.seeded = randomness == "seeded"
        self._batched = not self.seeded and hasattr(source, "__getitems__")
        self._collate = getattr(source, "collate", default_collate)

    def read(self, epochs: np.ndarray, indices: np.ndarray) -> Any:
        """One microbatch as tensors, from int64 [B] epochs and sample indices."""
        if self._batched:
            try:
                got = self.source.__getitems__(indices if hasattr(self.source, "randomness") else indices.tolist())
            except TurbopumpError:
                raise
            except Exception as error:
                self._blame(epochs, indices)
                raise self._error(error, f"samples {_listed(indices)}") from error
        else:
            got = [self._sample(int(e), int(i)) for e, i in zip(epochs, indices, strict=True)]
        if not isinstance(got, list):
            return _as_tensors(got)
        try:
            return _as_tensors(self._collate(got))
        except TurbopumpError:
            raise
        except Exception as error:
            hint = "; give the dataset a collate(samples) method" if self._collate is default_collate else ""
            raise self._error(error, f"a batch of samples {_listed(indices)} cannot be made", hint) from error

    def _sample(self, epoch: int, index: int) -> Any:
        if self.seeded:
            seed_everything(sample_key(self._seed, epoch, index))
        try:
            return self.source[index]
        except TurbopumpError:
            raise
        except Exception as error:
            raise self._error(error, f"sample {index} (epoch {epoch})") from error

    def _blame(self, epochs: np.ndarray, indices: np.ndarray) -> None:
        """Raise for the first sample that fails alone."""
        for epoch, index in zip(epochs, indices, strict=True):
            self._sample(int(epoch), int(index))

    def _error(self, error: Exception, what: str, hint: str = "") -> SampleError:
        return SampleError(f"{what} of {_name(self.source)}: {type(error).__name__}: {error}{hint}")


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker: its type by name and its message."""

    kind: str
    message: str

    def error(self) -> TurbopumpError:
        cls = getattr(errors, self.kind, SampleError)
        try:
            return cls(self.message)
        except TypeError:  # a constructor with other arguments
            return SampleError(self.message)


class _Steps:
    """The steps of one rank as a map-style dataset: item k is the list of microbatches of step k."""

    def __init__(self, reader: _Reader, order: Order, begin: int, end: int, microbatch: int) -> None:
        self.reader = reader
        self._order = order
        self._cuts = [(first, first + microbatch) for first in range(begin, end, microbatch)]

    def read(self, step: int) -> list[Any]:
        epochs, indices = self._order.step_ids(step)
        return [self.reader.read(epochs[a:b], indices[a:b]) for a, b in self._cuts]

    def __getitem__(self, step: int) -> list[Any] | _Failure:
        """For workers: an error comes back as a value, since torch would wrap its text in a traceback."""
        try:
            return self.read(step)
        except TurbopumpError as error:
            return _Failure(type(error).__name__, str(error))


class _Workers:
    """torch's `DataLoader` over steps, with an end that leaves nothing behind."""

    def __init__(self, steps: _Steps, todo: range, num_workers: int, prefetch_steps: int, pin_memory: bool) -> None:
        before = set(multiprocessing.active_children())
        with _blocked_signals(), _torch_child_handler() as self._child_handler:
            self._iterator: Any = iter(
                DataLoader(
                    steps,  # type: ignore[arg-type]
                    batch_size=None,
                    sampler=todo,
                    num_workers=num_workers,
                    prefetch_factor=prefetch_steps,
                    collate_fn=_as_it_is,
                    worker_init_fn=partial(_start_worker, os.getpid()),
                    multiprocessing_context="fork",
                    pin_memory=pin_memory,
                    generator=torch.Generator(),  # its base seed is not drawn from the training process's generator
                )
            )
        processes = [p for p in multiprocessing.active_children() if p not in before]
        self._kill = weakref.finalize(self, _kill_all, processes)  # also at exit: workers ignore SIGTERM

    def next(self, step: int) -> Any:
        try:
            with self._child_handler.active():
                return next(self._iterator)
        except RuntimeError as error:
            raise SampleError(
                f"a loader process died while reading step {step} or the steps after it ({_first_line(error)}): if it "
                f"was killed for lack of memory, use a smaller loader.num_workers or loader.prefetch_steps; "
                f"loader.num_workers=0 reads in the training process and shows the sample"
            ) from error

    def close(self) -> None:
        iterator, self._iterator = self._iterator, None
        with self._child_handler.muted():
            getattr(iterator, "_shutdown_workers", lambda: None)()
            self._kill()
        self._child_handler.remove()


def _as_it_is(value: Any) -> Any:
    return value


def _start_worker(parent_pid: int, worker: int) -> None:
    become_helper(parent_pid)


def _kill_all(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Signals wait while workers are started, so that none meets a worker that does not ignore them yet."""
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)


class _ChildHandler:
    """torch's SIGCHLD handler raises wherever the program happens to be; this one waits for the loader to be asked.

    Otherwise a worker's death could break an optimizer step in the middle.
    """

    def __init__(self) -> None:
        self._torch: Any = None
        self._waiting = self._muted = self._missed = False

    def install(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._torch = signal.getsignal(signal.SIGCHLD)
            signal.signal(signal.SIGCHLD, self._handle)

    def remove(self) -> None:
        if self._torch is not None and signal.getsignal(signal.SIGCHLD) == self._handle:
            signal.signal(signal.SIGCHLD, self._torch)

    def _handle(self, number: int, frame: Any) -> None:
        if self._waiting and callable(self._torch):
            self._torch(number, frame)
        self._missed = not self._muted

    @contextmanager
    def active(self) -> Iterator[None]:
        self._waiting = True
        try:
            if self._missed and callable(self._torch):
                self._missed = False
                self._torch(signal.SIGCHLD, None)
            yield
        finally:
            self._waiting = False

    @contextmanager
    def muted(self) -> Iterator[None]:
        self._muted = True
        try:
            yield
        finally:
            self._muted = False


@contextmanager
def _torch_child_handler() -> Iterator[_ChildHandler]:
    handler = _ChildHandler()
    yield handler
    handler.install()


def seed_everything(key: int) -> None:
    """Seed `random`, numpy's global generator and torch's default one from a 64-bit key."""
    random.seed(key)
    np.random.seed([key & 0xFFFFFFFF, key >> 32])
    torch.default_generator.manual_seed(key)


@contextmanager
def kept_random_state() -> Iterator[None]:
    """The three global generators are afterwards as they were before."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _as_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, np.generic):
        return torch.as_tensor(value)
    if isinstance(value, Mapping):
        return {key: _as_tensors(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_as_tensors, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_as_tensors, value))
    return value


def _pinned(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.pin_memory()
    if isinstance(value, Mapping):
        return {key: _pinned(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_pinned, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(_pinned, value))
    return value


def _listed(indices: np.ndarray) -> str:
    shown = ", ".join(map(str, indices[:8].tolist()))
    return shown if len(indices) <= 8 else f"{shown}, ... ({len(indices)} in all)"
