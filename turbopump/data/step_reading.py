"""Reading in one thread: the samples of a microbatch (`SampleReader`), the microbatches of a step (`StepReader`).

What is random in a sample is drawn from the global generators, seeded from (seed, epoch, index) before each sample; a
step is a function of its number. So whoever reads a step, a thread, a worker process or the caller, reads the same.
An error names the dataset, the sample and, where the source has `locate(index)`, the file and row it lies in.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch.utils.data import default_collate

from turbopump.core.errors import SampleError, TurbopumpError, UsageError
from turbopump.data.order import sample_key
from turbopump.data.ragged import Ragged

Randomness = Literal["auto", "none", "seeded"]


class StepOrder(Protocol):
    """Epochs and sample indices of each step, int64 [global_batch] each, as a function of the step alone."""

    def step_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]: ...


class SampleReader:
    """Reads and collates the samples of one microbatch.

    `at`, where it is set, is int64 [3]: epoch, index and number (0: none) of the samples being read at this moment.
    """

    def __init__(self, source: Any, seed: int, randomness: Randomness) -> None:
        self.source = source
        self.at: np.ndarray | None = None
        self._seed = seed
        if randomness == "auto":
            randomness = getattr(source, "randomness", "seeded")
        if randomness not in ("none", "seeded"):
            raise UsageError(f"randomness {randomness!r} of {name_of(source)} must be 'none' or 'seeded'")
        self.seeded = randomness == "seeded"
        self._batched = not self.seeded and hasattr(source, "__getitems__")
        self.fills_buffers = self._batched and hasattr(source, "batch_buffers")
        self._collate = getattr(source, "collate", default_collate)

    def read(self, epochs: np.ndarray, indices: np.ndarray, buffers: Any = None) -> Any:
        """One microbatch as tensors, from int64 [B] epochs and sample indices; in `buffers` of the source, if given."""
        got = self._samples_at_once(epochs, indices, buffers) if self._batched else self._samples(epochs, indices)
        if isinstance(got, list):
            got = self._collated(got, indices)
        return as_tensors(got)

    def read_alone(self, epochs: np.ndarray, indices: np.ndarray) -> None:
        """Read each sample by itself, for nothing but the error or death it may end in: `at` then names it alone."""
        if self._batched:
            self._samples(epochs, indices)

    def _samples_at_once(self, epochs: np.ndarray, indices: np.ndarray, buffers: Any) -> Any:
        if self.at is not None:
            self.at[:] = epochs[0], indices[0], len(indices)
        try:
            if buffers is not None:
                return self.source.__getitems__(indices, out=buffers)
            return self.source.__getitems__(indices if hasattr(self.source, "randomness") else indices.tolist())
        except TurbopumpError:
            raise
        except Exception as error:
            self._samples(epochs, indices)  # raises for the first sample that fails alone
            raise self._error(error, f"samples {_listed(indices)}") from error

    def _samples(self, epochs: np.ndarray, indices: np.ndarray) -> list[Any]:
        return [self._sample(int(e), int(i)) for e, i in zip(epochs, indices, strict=True)]

    def _sample(self, epoch: int, index: int) -> Any:
        if self.at is not None:
            self.at[:] = epoch, index, 1
        if self.seeded:
            seed_everything(sample_key(self._seed, epoch, index))
        try:
            return self.source[index]
        except TurbopumpError:
            raise
        except Exception as error:
            raise self._error(error, described(self.source, epoch, index)) from error

    def _collated(self, samples: list[Any], indices: np.ndarray) -> Any:
        try:
            return self._collate(samples)
        except TurbopumpError:
            raise
        except Exception as error:
            hint = "; give the dataset a collate(samples) method" if self._collate is default_collate else ""
            raise self._error(error, f"a batch of samples {_listed(indices)} cannot be made", hint) from error

    def _error(self, error: Exception, what: str, hint: str = "") -> SampleError:
        return SampleError(f"{what} of {name_of(self.source)}: {type(error).__name__}: {error}{hint}")


class StepReader:
    """Reads the steps of one rank: samples `begin` to `end` of each global batch, `microbatch` at a time."""

    def __init__(
        self, samples: SampleReader, order: StepOrder, begin: int, end: int, microbatch: int, end_step: int = 1 << 62
    ) -> None:
        self.samples = samples
        self._order, self._end_step = order, end_step
        self._order_lock = threading.Lock()  # an order keeps the steps it has just computed
        self._microbatch = microbatch
        self._cuts = [(first, first + microbatch) for first in range(begin, end, microbatch)]
        source = samples.source
        in_samples = -(-getattr(source, "samples_ahead", 0) // microbatch)
        self._ahead = max(getattr(source, "batches_ahead", 0), in_samples)
        self._announced: deque[int] = deque()  # microbatches by number, announced and not yet read
        self._announcing = threading.Lock()

    def ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample indices of a step's global batch, int64 [global_batch] each."""
        with self._order_lock:
            return self._order.step_ids(step)

    def kept_buffers(self, kept: list[list[Any]], number: int) -> list[Any]:
        """Memory for one step, one for each microbatch: `kept[number]`, made when it is first asked for."""
        make = self.samples.source.batch_buffers if self.samples.fills_buffers else lambda rows: None
        while len(kept) <= number:
            kept.append([make(self._microbatch) for _ in self._cuts])
        return kept[number]

    def read(
        self, step: int, buffers: list[Any] | None = None, one_by_one: bool = False,
        coming: Sequence[int] | None = None,
    ) -> list[Any]:  # fmt: skip
        """The microbatches of a step. `one_by_one` first reads each sample alone. `coming`: the steps that this reader
        will read next; by default all that follow."""
        epochs, indices = self.ids(step)
        if one_by_one:
            for a, b in self._cuts:
                self.samples.read_alone(epochs[a:b], indices[a:b])
        into = buffers or [None] * len(self._cuts)
        batches = []
        for number, ((a, b), memory) in enumerate(zip(self._cuts, into, strict=True)):
            if self._ahead and not one_by_one:
                self._announce(step * len(self._cuts) + number, coming)
            batches.append(self.samples.read(epochs[a:b], indices[a:b], memory))
        return batches

    def _announce(self, microbatch: int, coming: Sequence[int] | None) -> None:
        """Tell a source that fetches (from disk, from a store) of the microbatches to come, each once and in order."""
        with self._announcing:
            numbers = self._numbers(microbatch, coming)
            if not self._announced or any(a != b for a, b in zip(self._announced, numbers)):
                self.samples.source.forget()
                self._announced.clear()
            for number in numbers[len(self._announced) :]:
                step, part = divmod(number, len(self._cuts))
                a, b = self._cuts[part]
                self.samples.source.prefetch(self.ids(step)[1][a:b])
                self._announced.append(number)
            self._announced.popleft()  # it is read now

    def _numbers(self, microbatch: int, coming: Sequence[int] | None) -> Sequence[int]:
        """The microbatches that are read from `microbatch` on, as far as they are to be announced."""
        cuts = len(self._cuts)
        if coming is None:
            return range(microbatch, min(microbatch + self._ahead, max(self._end_step * cuts, microbatch + 1)))
        rest = range(microbatch, (microbatch // cuts + 1) * cuts)
        following = (step * cuts + part for step in coming for part in range(cuts))
        return list(islice(chain(rest, following), self._ahead))


def name_of(source: Any) -> str:
    name = getattr(source, "name", None)
    return name if isinstance(name, str) else type(source).__name__


def described(source: Any, epoch: int, index: int) -> str:
    """`sample 17 (epoch 0)`, and where it lies, if the source can tell."""
    text = f"sample {index} (epoch {epoch})"
    locate = getattr(source, "locate", None)
    if locate is None:
        return text
    try:
        return f"{text} at {locate(index)}"
    except Exception:  # the error that is being told matters more
        return text


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


def as_tensors(value: Any) -> Any:
    """`value` with its arrays and numpy numbers as tensors, over the same memory where that may be written to."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value if value.flags.writeable else value.copy())
    if isinstance(value, np.generic):
        return torch.as_tensor(value)
    return _mapped(as_tensors, value)


def pinned(value: Any) -> Any:
    """`value` with its tensors in page-locked memory of torch's, which keeps it until copies to a device are done."""
    return value.pin_memory() if isinstance(value, torch.Tensor) else _mapped(pinned, value)


def tensor_bytes(value: Any) -> int:
    """Bytes of all tensors in `value`."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    if isinstance(value, Ragged):
        return int(value.values.nbytes + value.offsets.nbytes)
    if isinstance(value, Mapping):
        return sum(map(tensor_bytes, value.values()))
    return sum(map(tensor_bytes, value)) if isinstance(value, (tuple, list)) else 0


def _mapped(function: Any, value: Any) -> Any:
    if isinstance(value, Ragged):
        return value if value.kind != "ragged" else Ragged(function(value.values), function(value.offsets))
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(function, value))
    return value


def _listed(indices: np.ndarray) -> str:
    shown = ", ".join(map(str, indices[:8].tolist()))
    return shown if len(indices) <= 8 else f"{shown}, ... ({len(indices)} in all)"
