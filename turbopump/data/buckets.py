"""Batches of samples of similar length, as a pure function of the step: `BucketOrder`, and what it saves in padding.

The samples, sorted by length once, are cut into buckets. In every epoch each bucket is permuted anew and cut into
batches; what is left of a bucket joins a pool in order of length, which gives batches of neighbouring buckets; all
these batches stand in an order permuted anew. Where an epoch does not end with a batch, its last samples share one
with the first of the next epoch; these come from the pool too (one batch is dissolved where it holds too few), from a
part of it that differs from epoch to epoch. So every sample is used once an epoch and none is dropped.
Memory: the sorted index, 4 bytes a sample (8 from 2^31 samples on), which may be memory-mapped; once it is made, a
restart costs O(1).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.order import Runs, StepOrder, runs_of, successive, words
from turbopump.data.permutation import mix64, mix_int, permute

NUM_BUCKETS = 64
_MAX_BUCKETS = 1 << 16
_U = np.uint64


def sorted_by_length(lengths: np.ndarray) -> np.ndarray:
    """Sample numbers from the shortest to the longest (equal ones in their order), int32 [n], int64 from 2^31 on.

    Takes O(n log n) time and 8 bytes a sample on top; a caller may keep the result in a file and map it.
    Raises `DatasetError` for lengths that are not a list of whole numbers >= 0.
    """
    lengths = check_lengths(lengths)
    return np.argsort(lengths, kind="stable").astype(np.int32 if len(lengths) < 1 << 31 else np.int64)


def check_lengths(lengths: np.ndarray, of: str = "") -> np.ndarray:
    """The same as an array; raises `DatasetError`, begun by `of`, where they are no list of whole numbers >= 0."""
    lengths = np.asarray(lengths)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or not len(lengths):
        raise DatasetError(
            f"{of}lengths of shape {lengths.shape} and dtype {lengths.dtype}: one whole number a sample is needed"
        )
    if lengths.min() < 0:
        first = int(np.flatnonzero(lengths < 0)[0])
        raise DatasetError(f"{of}sample {first} has length {lengths[first]}: lengths are at least 0")
    return lengths


def lengths_of(source: Any) -> np.ndarray:
    """The `lengths` of a source, one a sample; raises `UsageError` where it has none or not so many."""
    lengths = getattr(source, "lengths", None)
    name = getattr(source, "name", type(source).__name__)
    if lengths is None:
        raise UsageError(
            f'loader.order = "bucketed" needs a table of lengths, and {name} has none: use "shuffle", "blocks" or '
            f'"sequential"'
        )
    if len(lengths) != len(source):
        raise UsageError(
            f"{name} has {len(lengths)} lengths for {len(source)} samples: its `lengths` must hold one for each"
        )
    return np.asarray(lengths)


def check_num_buckets(num_buckets: int) -> None:
    """Raises `UsageError` for a number of buckets that is not possible."""
    if not 1 <= num_buckets <= _MAX_BUCKETS:
        raise UsageError(f"num_buckets: {num_buckets} given; 1 to {_MAX_BUCKETS} are possible")


@dataclass(frozen=True)
class _Epochs:
    """What holds for each of some epochs, int64 [epochs] (`dissolved` is bool).

    `head` places come before its first whole batch, then `whole` batches, the first `from_buckets` numbers of them from
    one bucket and the others pooled. Where a batch is `dissolved` it is the last of bucket `lost`. The `pool` holds so
    many samples and begins at its sample `turn`.
    """

    epoch: np.ndarray
    head: np.ndarray
    whole: np.ndarray
    from_buckets: np.ndarray
    dissolved: np.ndarray
    lost: np.ndarray
    pool: np.ndarray
    turn: np.ndarray


class BucketOrder(StepOrder):
    """Batches of `global_batch` samples of similar `lengths` (one whole number a sample; an array or memory map).

    `num_buckets` equal parts, or parts that begin at the lengths `boundaries`; more buckets pad less and mix less.
    `sorted_index` is the result of `sorted_by_length`, where it was kept. `lengths` is not held.
    Raises `DatasetError` for bad lengths or an index of another size, `UsageError` for bad settings.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        global_batch: int,
        *,
        seed: int = 0,
        num_buckets: int = NUM_BUCKETS,
        boundaries: Sequence[int] | None = None,
        sorted_index: np.ndarray | None = None,
    ) -> None:
        super().__init__(len(lengths), global_batch)
        self.seed = seed
        self._sorted = sorted_by_length(lengths) if sorted_index is None else sorted_index
        if self._sorted.shape != (self.n,):
            raise DatasetError(f"the index by length is of shape {self._sorted.shape}, the samples are {self.n}")
        cuts = _equal_cuts(self.n, num_buckets) if boundaries is None else _cuts(lengths, self._sorted, boundaries)
        self.starts = np.unique(np.concatenate([[0], cuts, [self.n]])).astype(np.int64)  # no empty buckets
        self._sizes = np.diff(self.starts)
        self._batches = np.concatenate([[0], np.cumsum(self._sizes // global_batch)])  # full ones before each bucket
        self._leftovers = np.concatenate([[0], np.cumsum(self._sizes % global_batch)])  # in the pool before each bucket
        self._seeds = [mix_int(seed + number + 1) for number in range(4)]

    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs and sample indices of the places `first` to `first + count` of the run, each int64 [count]."""
        runs = runs_of([first], np.array([count]), np.array([self.n]), words([self.seed]))
        epochs = self._epochs(runs.epoch)
        buckets, within = self._found(runs, epochs)
        each = runs.epochs
        moved = permute(within, self._sizes[buckets], self._seeds[1], each * _MAX_BUCKETS + buckets)
        moved += self.starts[buckets]
        return each, self._sorted[moved].astype(np.int64)

    def _epochs(self, epoch: np.ndarray) -> _Epochs:
        head = np.minimum(-((epoch % self.global_batch) * (self.n % self.global_batch)) % self.global_batch, self.n)
        whole, rest = np.divmod(self.n - head, self.global_batch)
        dissolved = head + rest > self._leftovers[-1]
        drawn = (_hashed(epoch, self._seeds[2]) % _U(max(1, int(self._batches[-1])))).astype(np.int64)
        lost = np.minimum(np.searchsorted(self._batches, drawn, "right") - 1, len(self._sizes) - 1)
        pool = np.maximum(self._leftovers[-1] + dissolved * self.global_batch, 1)
        turn = (_hashed(epoch, self._seeds[3]) % pool.astype(_U)).astype(np.int64)
        return _Epochs(epoch, head, whole, self._batches[-1] - dissolved, dissolved, lost, pool, turn)

    def _found(self, runs: Runs, epochs: _Epochs) -> tuple[np.ndarray, np.ndarray]:
        """Bucket, and place within it before it is permuted, of each place of `runs`; int64 each.

        All but the pool's are worked out once a batch.
        """
        batch = self.global_batch
        ends = runs.first + runs.count
        first, last = (runs.first - epochs.head) // batch, (ends - 1 - epochs.head) // batch  # -1 is the head
        of, numbers = np.repeat(np.arange(len(first)), last - first + 1), successive(first, last - first + 1)
        head, whole, from_buckets = epochs.head[of], epochs.whole[of], epochs.from_buckets[of]
        begins = np.maximum(runs.first[of], head + numbers * batch)
        counts = np.minimum(ends[of], head + (numbers + 1) * batch) - begins
        rows = begins - head - numbers * batch
        in_whole = (numbers >= 0) & (numbers < whole)
        numbers[in_whole] = permute(numbers[in_whole], whole[in_whole], self._seeds[0], epochs.epoch[of[in_whole]])
        buckets, within = self._of_batches(numbers, rows, epochs.dissolved[of], epochs.lost[of])
        pooled = ~(in_whole & (numbers < from_buckets))
        if not pooled.any():
            return np.repeat(buckets, counts), successive(within, counts)
        edge = (whole - from_buckets) * batch  # the pool's places after its whole batches: head, then rest
        at_edge = edge + np.where(begins < head, begins, begins - whole * batch)
        in_pool = np.where(in_whole, (numbers - from_buckets) * batch + rows, at_edge)
        buckets, within, where = np.repeat(buckets, counts), successive(within, counts), np.repeat(pooled, counts)
        in_pool = successive(in_pool[pooled], counts[pooled])
        buckets[where], within[where] = self._of_pool(in_pool, epochs, np.repeat(of[pooled], counts[pooled]))
        return buckets, within

    def _of_batches(
        self, numbers: np.ndarray, rows: np.ndarray, dissolved: np.ndarray, lost: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Bucket and place within it of row `rows` of the whole batch `numbers`."""
        numbers = numbers + (dissolved & (numbers >= self._batches[lost + 1] - 1))
        buckets = np.clip(np.searchsorted(self._batches, numbers, "right") - 1, 0, len(self._sizes) - 1)
        return buckets, (numbers - self._batches[buckets]) * self.global_batch + rows

    def _of_pool(self, in_pool: np.ndarray, epochs: _Epochs, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bucket and place within it of the places `in_pool` of the pools of the epochs `of`."""
        batch = self.global_batch
        dissolved, lost, size = epochs.dissolved[of], epochs.lost[of], epochs.pool[of]
        turned = in_pool + epochs.turn[of]
        turned -= size * (turned >= size)
        # a dissolved batch stands before the leftovers of its bucket, as its places do
        after_lost = dissolved & (turned >= self._leftovers[lost + 1] + batch)
        in_lost = dissolved & (turned >= self._leftovers[lost]) & ~after_lost
        turned -= after_lost * batch
        buckets = np.clip(np.searchsorted(self._leftovers, turned, "right") - 1, 0, len(self._sizes) - 1)
        buckets = np.where(in_lost, lost, buckets)
        full = self._batches[buckets + 1] - self._batches[buckets] - in_lost
        return buckets, full * batch + turned - self._leftovers[buckets]


def _hashed(epochs: np.ndarray, seed: int) -> np.ndarray:
    return mix64(epochs.astype(np.uint64) + _U(seed))


def _equal_cuts(n: int, num_buckets: int) -> np.ndarray:
    check_num_buckets(num_buckets)
    return np.array([number * n // num_buckets for number in range(1, num_buckets)], np.int64)


def _cuts(lengths: np.ndarray, by_length: np.ndarray, boundaries: Sequence[int]) -> np.ndarray:
    """Places in the sorted index where the lengths `boundaries` begin; a binary search that reads few lengths."""
    if list(boundaries) != sorted(set(boundaries)) or len(boundaries) >= _MAX_BUCKETS:
        raise UsageError(f"boundaries {list(boundaries)}: lengths that go up are needed, fewer than {_MAX_BUCKETS}")
    low = np.zeros(len(boundaries), np.int64)
    high = np.full(len(boundaries), len(by_length))
    while (low < high).any():
        middle = (low + high) // 2
        below = np.asarray(lengths[by_length[np.minimum(middle, len(by_length) - 1)]]) < np.asarray(boundaries)
        low, high = np.where((low < high) & below, middle + 1, low), np.where((low < high) & ~below, middle, high)
    return low


def padding_share(
    order: StepOrder, lengths: np.ndarray, *, steps: Iterable[int] | None = None, microbatch: int = 0
) -> float:
    """Share of a batch that is padding where each microbatch is padded to its longest sample.

    Over `steps`, by default those of the first epoch; `microbatch` samples are padded together, by default the
    whole batch. 0 where all samples are empty.
    """
    lengths = np.asarray(lengths)
    rows = microbatch or order.global_batch
    if order.global_batch % rows:
        raise UsageError(f"microbatch: {rows} does not divide global_batch ({order.global_batch})")
    used = padded = 0
    for step in range(-(-order.n // order.global_batch)) if steps is None else steps:
        taken = lengths[order.step_ids(step)[1]].reshape(-1, rows).astype(np.int64)
        used += int(taken.sum())
        padded += int(taken.max(axis=1).sum()) * rows
    return 1 - used / padded if padded else 0.0
