"""The order of samples: which (epoch, index) stands at each place of a run, as a pure function of the step.

A step takes `global_batch` consecutive places of an endless stream of epochs; where an epoch ends inside a batch the
next one begins there, so each sample is seen exactly once an epoch, whatever the batch size. Nothing here knows ranks,
workers or earlier calls, and nothing grows with the number of samples or steps.

`StepOrder` is what the loader sees; `Order` orders one dataset: "shuffle" (`permutation.permute` keyed by seed and
epoch), "blocks" (for storage that is slow at single records: blocks of neighbours are permuted, then samples within
windows of a few blocks), "sequential". Mixtures are in `mixture`, batches by length in `buckets`; `source_order`
chooses for a source, `order_quality` shows what an order costs in requests and in shuffling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.data.permutation import MAX_N, mix64, mix_int, permute, unpermute

OrderKind = Literal["shuffle", "blocks", "sequential"]
BLOCK_SAMPLES = 1024
WINDOW_BLOCKS = 16
_BLOCK_PLACES = 1 << 14  # places computed at once: numpy's cost per call is then below a nanosecond a place
_GOLDEN = 0x9E3779B97F4A7C15
_U = np.uint64


def sample_key(seed: int, epoch: int, index: int) -> int:
    """The 64-bit seed of everything random in one sample of one epoch."""
    return mix_int(mix_int(mix_int(seed + _GOLDEN) + epoch + _GOLDEN) + index)


def held_out(rows: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Bool per row number: whether its hash puts it in the `fraction` that is held out."""
    hashed = mix64(rows.astype(np.uint64) + _U(mix_int(seed + 1)))
    return (hashed >> _U(11)).astype(np.float64) * 2.0**-53 < fraction


class StepOrder(ABC):
    """The global batch of each step, made of `at`; `n` is the number of samples an index can name.

    Keeps the two blocks of steps last asked for: one for who reads, one for who reads ahead. Threads may share it.
    """

    def __init__(self, n: int, global_batch: int, *, block_places: int = _BLOCK_PLACES) -> None:
        if n < 1 or n > MAX_N:
            raise UsageError(f"an order of {n} samples was asked for: 1 to 2^62 are possible")
        if global_batch < 1:
            raise UsageError(f"global_batch: {global_batch} given; at least 1 is needed")
        self.n = n
        self.global_batch = global_batch
        self._block_steps = max(1, block_places // global_batch)
        self._kept: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()

    @abstractmethod
    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample indices of the places `first` to `first + count` of the run, each int64 [count].

        A pure function. Both numbers are multiples of `global_batch` when a step is asked for.
        """

    def step_ids(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample indices of step `step` (from 0), each int64 [global_batch], read-only."""
        block, row = divmod(step, self._block_steps)
        _, epochs, indices = self._block(block)
        return epochs[row], indices[row]

    def ahead(self, step: int, num_steps: int) -> np.ndarray:
        """Sample indices of the steps `step` to `step + num_steps` in order of use, int64 [num_steps * batch]."""
        parts = [np.empty(0, np.int64)]
        end = step + num_steps
        while step < end:
            block, row = divmod(step, self._block_steps)
            rows = min(self._block_steps - row, end - step)
            parts.append(self._block(block)[2][row : row + rows].reshape(-1))
            step += rows
        return np.concatenate(parts)

    def _block(self, block: int) -> tuple[int, np.ndarray, np.ndarray]:
        kept = self._kept  # one read of the attribute: another thread may replace the tuple, never change it
        for entry in kept:
            if entry[0] == block:
                return entry
        count = self._block_steps * self.global_batch
        # Python integers: step * global_batch may pass 2**63 long before the run does anything wrong
        parts = [part.reshape(self._block_steps, self.global_batch) for part in self.at(block * count, count)]
        for part in parts:
            part.flags.writeable = False
        entry = (block, parts[0], parts[1])
        self._kept = (entry, *kept[:1])
        return entry


class Order(StepOrder):
    """One dataset of `n` samples, in one of three orders.

    "blocks": blocks of `block_samples` consecutive samples are permuted, then the samples of every `window_blocks`
    blocks that then follow each other. A batch so reads from one or two windows at a time.
    """

    def __init__(
        self,
        n: int,
        global_batch: int,
        *,
        order: OrderKind = "shuffle",
        seed: int = 0,
        block_samples: int = BLOCK_SAMPLES,
        window_blocks: int = WINDOW_BLOCKS,
        block_places: int = _BLOCK_PLACES,
    ) -> None:
        super().__init__(n, global_batch, block_places=block_places)
        if order not in ("shuffle", "blocks", "sequential"):
            raise UsageError(
                f"order {order!r} is none of shuffle, blocks, sequential"
                + (": bucketed needs a source with lengths" if order == "bucketed" else "")
            )
        if block_samples < 1 or window_blocks < 1:
            raise UsageError(f"block_samples ({block_samples}) and window_blocks ({window_blocks}) must be at least 1")
        self.order = order
        self.seed = seed
        self.block_samples = block_samples
        self.window_blocks = window_blocks

    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample indices of the places `first` to `first + count` of the run, each int64 [count]."""
        epochs, places = epochs_and_places(first, count, self.n)
        if self.order == "sequential":
            return epochs, places
        if self.order == "shuffle":
            return epochs, permute(places, self.n, self.seed, _one_of(epochs))
        return epochs, self._shuffled_in_blocks(places, epochs)

    def _shuffled_in_blocks(self, places: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Blocks stand in slots; all hold `block_samples`, but for the last block, which is `missing` short.

        Where its slot is (it differs from epoch to epoch) all later slots begin `missing` places earlier.
        """
        n, size, window_blocks = self.n, self.block_samples, self.window_blocks
        num_blocks = -(-n // size)
        missing = num_blocks * size - n
        seed_of_blocks = mix_int(self.seed + _GOLDEN)
        each = np.arange(epochs[0], epochs[-1] + 1) if len(epochs) else epochs
        short_slots = unpermute(np.full(len(each), num_blocks - 1), num_blocks, seed_of_blocks, each)
        short = short_slots[epochs - epochs[:1]]

        def start_of(slots: np.ndarray) -> np.ndarray:
            return slots * size - np.where(slots > short, missing, 0)

        def slot_of(at: np.ndarray) -> np.ndarray:
            return np.where(at < (short + 1) * size - missing, at, at + missing) // size

        windows = slot_of(places) // window_blocks
        begin = start_of(windows * window_blocks)
        lengths = start_of(np.minimum((windows + 1) * window_blocks, num_blocks)) - begin
        # epochs and windows in one number: equal ones of different pairs would need 2^62 windows
        streams = (epochs.astype(np.uint64) * _U(_GOLDEN) + windows.astype(np.uint64)).view(np.int64)
        moved = begin + permute(places - begin, _one_of(lengths), self.seed, streams)
        slots = slot_of(moved)
        blocks = _permuted_once_each(slots, num_blocks, seed_of_blocks, _one_of(epochs))
        return blocks * size + (moved - start_of(slots))


def _one_of(values: np.ndarray) -> int | np.ndarray:
    """The number that all are, where they are alike: cheaper than one each."""
    return int(values[0]) if len(values) and (values == values[0]).all() else values


def _permuted_once_each(slots: np.ndarray, n: int, seed: int, stream: int | np.ndarray) -> np.ndarray:
    """`permute`, through a table where few slots come again and again."""
    first = int(slots.min(initial=n))
    span = int(slots.max(initial=first - 1)) + 1 - first
    if isinstance(stream, int) and span < len(slots):
        return permute(np.arange(first, first + span), n, seed, stream)[slots - first]
    return permute(slots, n, seed, stream)


def epochs_and_places(first: int, count: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Epoch, and place within it, of the places `first` to `first + count` of a run; each int64 [count]."""
    epoch, place = divmod(first, n)
    places = place + np.arange(count, dtype=np.int64)
    if place + count <= n:
        return np.full(count, epoch, np.int64), places
    turns = places // n
    return epoch + turns, places - turns * n


def step_ids(
    step: int, *, n: int, global_batch: int, order: OrderKind = "shuffle", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and sample indices of one step (from 0), each int64 [global_batch]: a pure function of its arguments."""
    return Order(n, global_batch, order=order, seed=seed, block_places=1).step_ids(step)
