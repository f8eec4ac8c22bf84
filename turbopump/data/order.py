"""The order of samples: which (epoch, index) stands at each place of a run, as a pure function of the step.

A step takes `global_batch` consecutive places of an endless stream of epochs; where an epoch ends inside a batch the
next one begins there, so each sample is seen exactly once an epoch, whatever the batch size. Nothing here knows ranks,
workers or earlier calls, and nothing grows with the number of samples or steps.

`StepOrder` is what the loader sees; `Order` orders one dataset: "shuffle" (`permutation.permute` keyed by seed and
epoch), "blocks" (for storage that is slow at single records: blocks of neighbours are permuted, then samples within
windows of a few blocks), "sequential". What is one number an epoch or window is computed once for its run of places
(`Runs`). Mixtures are in `mixture_order`, batches by length in `buckets` and `mixture_buckets`; `source_order` chooses
for a source.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Runs:
    """Successive places of one epoch of a dataset, of several epochs and datasets one after the other.

    Of each run the dataset's samples `n` and `seed` (uint64), the epoch, the `first` place and how many; int64 [runs].
    """

    n: np.ndarray
    seed: np.ndarray
    epoch: np.ndarray
    first: np.ndarray
    count: np.ndarray

    def of_each(self, values: np.ndarray) -> int | np.ndarray:
        """One value a run as one a place; a number where there is but one run, which is cheaper."""
        return int(values[0]) if len(values) == 1 else np.repeat(values, self.count)

    @property
    def epochs(self) -> np.ndarray:
        return np.repeat(self.epoch, self.count)

    @property
    def places(self) -> np.ndarray:
        return successive(self.first, self.count)


def runs_of(first: Sequence[int], count: np.ndarray, n: np.ndarray, seed: np.ndarray) -> Runs:
    """The runs of places `first` to `first + count` (at least one each) of the endless epochs of each of some datasets.

    `first` holds Python integers: a place of a run may pass 2^63.
    """
    epoch, place = np.array([divmod(at, size) for at, size in zip(first, n.tolist())], np.int64).T
    turns = (place + count - 1) // n + 1  # epochs that a dataset's places lie in
    of, turn = np.repeat(np.arange(len(n)), turns), successive(np.zeros_like(turns), turns)
    begin = np.where(turn == 0, place[of], 0)
    end = np.minimum((place + count)[of] - turn * n[of], n[of])
    return Runs(n[of], seed[of], epoch[of] + turn, begin, end - begin)


def successive(first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The numbers from each `first` on, `count` of each, one after the other; int64."""
    ends = np.cumsum(count)
    return np.arange(ends[-1]) + np.repeat(first - ends + count, count)


@dataclass(frozen=True)
class EpochOrder:
    """The order of the samples of one epoch of a dataset, in any of three ways.

    "blocks": blocks of `block_samples` consecutive samples are permuted, then the samples of every `window_blocks`
    blocks that then follow each other. A batch so reads from one or two windows at a time.
    """

    order: OrderKind = "shuffle"
    block_samples: int = BLOCK_SAMPLES
    window_blocks: int = WINDOW_BLOCKS

    def __post_init__(self) -> None:
        if self.order not in ("shuffle", "blocks", "sequential"):
            raise UsageError(
                f"order {self.order!r} is none of shuffle, blocks, sequential"
                + (": bucketed needs a source with lengths" if self.order == "bucketed" else "")
            )
        if self.block_samples < 1 or self.window_blocks < 1:
            raise UsageError(
                f"block_samples ({self.block_samples}) and window_blocks ({self.window_blocks}) must be at least 1"
            )

    def samples(self, runs: Runs) -> np.ndarray:
        """The sample at each place of `runs`, int64."""
        if self.order == "sequential":
            return runs.places
        if self.order == "shuffle":
            return permute(runs.places, *map(runs.of_each, (runs.n, runs.seed, runs.epoch)))
        return self._shuffled_in_blocks(runs)

    def _shuffled_in_blocks(self, runs: Runs) -> np.ndarray:
        """Blocks stand in slots; all hold `block_samples`, but for the last block, which is `missing` short.

        Where its slot is (it differs from epoch to epoch) all later slots begin `missing` places earlier.
        """
        size = self.block_samples
        num_blocks = -(-runs.n // size)
        missing = num_blocks * size - runs.n
        seeds_of_blocks = mix64(runs.seed + _U(_GOLDEN))
        short = unpermute(num_blocks - 1, num_blocks, seeds_of_blocks, runs.epoch)
        ends = runs.first + runs.count
        first, end = (_slots(at, size, missing, short) // self.window_blocks for at in (runs.first, ends - 1))
        end += 1
        moved = self._shuffled_in_windows(runs, first, end, num_blocks, missing, short)
        # as if no slot were short: a sample is then as far from its slot's first place as from its block's first
        moved += runs.of_each(missing) * (moved >= runs.of_each(_end_of_short(size, missing, short)))
        slots = moved // size
        moved += size * (self._blocks(slots, runs, first, end, num_blocks, seeds_of_blocks) - slots)
        return moved

    def _blocks(
        self, slots: np.ndarray, runs: Runs, first: np.ndarray, end: np.ndarray, num_blocks: np.ndarray,
        seeds: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """The block in each slot, through a table of all slots of the windows `first` to `end` where they are few."""
        lowest = first * self.window_blocks
        counts = np.minimum(end * self.window_blocks, num_blocks) - lowest
        if counts.sum() > len(slots):
            return permute(slots, *map(runs.of_each, (num_blocks, seeds, runs.epoch)))
        of = np.repeat(np.arange(len(counts)), counts)
        table = permute(successive(lowest, counts), num_blocks[of], seeds[of], runs.epoch[of])
        return table[slots + runs.of_each(np.cumsum(counts) - counts - lowest)]

    def _shuffled_in_windows(
        self, runs: Runs, first: np.ndarray, end: np.ndarray, num_blocks: np.ndarray, missing: np.ndarray,
        short: np.ndarray,
    ) -> np.ndarray:  # fmt: skip
        """The places of `runs`, permuted within their windows `first` to `end`: each part in a window has one key."""
        size = self.block_samples
        counts, ends = end - first, runs.first + runs.count
        of, windows = np.repeat(np.arange(len(counts)), counts), successive(first, counts)
        slots = windows * self.window_blocks
        begins = _starts(slots, size, missing[of], short[of])
        lengths = _starts(np.minimum(slots + self.window_blocks, num_blocks[of]), size, missing[of], short[of]) - begins
        # epochs and windows in one number: equal ones of different pairs would need 2^62 windows
        streams = runs.epoch[of].astype(np.uint64) * _U(_GOLDEN) + windows.astype(np.uint64)
        within = np.maximum(runs.first[of] - begins, 0)
        parts = Runs(lengths, runs.seed[of], streams, within, np.minimum(ends[of] - begins, lengths) - within)
        moved = permute(parts.places, *map(parts.of_each, (parts.n, parts.seed, parts.epoch)))
        moved += parts.of_each(begins)
        return moved


def _end_of_short(size: int, missing: np.ndarray, short: np.ndarray) -> np.ndarray:
    return (short + 1) * size - missing


def _slots(places: np.ndarray, size: int, missing: np.ndarray, short: np.ndarray) -> np.ndarray:
    """The slot that each place lies in."""
    return (places + missing * (places >= _end_of_short(size, missing, short))) // size


def _starts(slots: np.ndarray, size: int, missing: np.ndarray, short: np.ndarray) -> np.ndarray:
    """The first place of each slot."""
    return slots * size - missing * (slots > short)


class Order(StepOrder):
    """One dataset of `n` samples, in one of the three orders of `EpochOrder`."""

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
        self.seed = seed
        self._of_epoch = EpochOrder(order, block_samples, window_blocks)

    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample indices of the places `first` to `first + count` of the run, each int64 [count]."""
        runs = runs_of([first], np.array([count]), np.array([self.n]), words([self.seed]))
        return runs.epochs, self._of_epoch.samples(runs)


def words(numbers: Sequence[int]) -> np.ndarray:
    """Any integers, modulo 2^64, as uint64."""
    return np.array([number % (1 << 64) for number in numbers], np.uint64)


def step_ids(
    step: int, *, n: int, global_batch: int, order: OrderKind = "shuffle", seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Epochs and sample indices of one step (from 0), each int64 [global_batch]: a pure function of its arguments."""
    return Order(n, global_batch, order=order, seed=seed, block_places=1).step_ids(step)
