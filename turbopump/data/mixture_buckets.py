"""Batches of samples of similar length out of a mixture, as a pure function of the step: `MixtureBucketOrder`.

The mixture decides, as without buckets, which samples are drawn. The steps fall into windows of `num_buckets` steps
(shorter ones before a step at which the weights change): the samples drawn for a window are sorted by length and cut
into its batches, which stand in an order permuted anew in each window. So each batch holds one part in `num_buckets` of
the lengths, as with `buckets.BucketOrder`; samples only move within a window, and each is accounted for as before.
Memory: the lengths, 1 to 8 bytes a sample as the longest needs, and some windows; a restart costs one window.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.data.buckets import NUM_BUCKETS, check_lengths, check_num_buckets
from turbopump.data.mixture_order import BLOCK_PLACES, MixtureOrder
from turbopump.data.order import StepOrder
from turbopump.data.permutation import mix_int, permute


class MixtureBucketOrder(StepOrder):
    """The samples of `mixed` in batches of similar `lengths`: of each source an array, one whole number a sample.

    Raises `DatasetError` for bad lengths or not one a sample, `UsageError` for a `num_buckets` that is not possible.
    """

    def __init__(
        self, mixed: MixtureOrder, lengths: Sequence[np.ndarray], *, seed: int = 0, num_buckets: int = NUM_BUCKETS
    ) -> None:
        check_num_buckets(num_buckets)
        window_places = num_buckets * mixed.global_batch
        super().__init__(mixed.n, mixed.global_batch, block_places=-(-BLOCK_PLACES // window_places) * window_places)
        self.mixed = mixed
        self.num_buckets = num_buckets
        self._seed = mix_int(seed)
        lengths = [check_lengths(part, f"source {number}: ") for number, part in enumerate(lengths)]
        sizes = [len(part) for part in lengths]
        if tuple(sizes) != mixed.sizes:
            raise DatasetError(f"lengths of {sizes} samples for sources of {list(mixed.sizes)}: one a sample is needed")
        longest = max(int(part.max()) for part in lengths)
        self._lengths = np.concatenate(lengths, dtype=np.min_scalar_type(longest), casting="unsafe")

    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs (each source's own) and indices of the places `first` to `first + count` of the run."""
        if not count:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        batch = self.global_batch
        begin = self._window_around(first // batch)[0]
        end = self._window_around((first + count - 1) // batch)[1]
        drawn = self.mixed.at(begin * batch, (end - begin) * batch)
        lengths = self._lengths[drawn[1]]
        moved = np.empty(len(lengths), np.int64)
        step = begin
        while step < end:
            window_end = self._window_around(step)[1]
            places = slice((step - begin) * batch, (window_end - begin) * batch)
            moved[places] = self._by_batch(lengths[places], step) + places.start
            step = window_end
        moved = moved[first - begin * batch :][:count]
        return drawn[0][moved], drawn[1][moved]

    def counts(self, step: int) -> np.ndarray:
        """Samples taken of each source before `step`, int64 [sources]; exact."""
        begin, _ = self._window_around(step)
        indices = self.at(begin * self.global_batch, (step - begin) * self.global_batch)[1]
        sources = np.searchsorted(self.mixed.offsets, indices, "right") - 1
        return self.mixed.counts(begin) + np.bincount(sources, minlength=len(self.mixed.sizes))

    def _window_around(self, step: int) -> tuple[int, int]:
        """First step of the window that `step` is in, and of the next: no window holds two weightings."""
        starts = self.mixed.starts
        begin = step // self.num_buckets * self.num_buckets
        number = bisect_right(starts, step)
        end = min([begin + self.num_buckets, *starts[number : number + 1]])
        return max(begin, starts[number - 1]), end

    def _by_batch(self, lengths: np.ndarray, begin: int) -> np.ndarray:
        """Places of a window's draws by the batch they go to, and there in the order they were drawn; int64.

        `lengths` are the draws', `begin` is the window's first step.
        """
        num_batches = len(lengths) // self.global_batch
        batches = permute(np.arange(num_batches), num_batches, self._seed, begin)  # of the shortest, of the next ones
        batch_of = np.empty(len(lengths), np.uint16)
        batch_of[stable_argsort(lengths)] = np.repeat(batches.astype(np.uint16), self.global_batch)
        return np.argsort(batch_of, kind="stable")


def stable_argsort(numbers: np.ndarray) -> np.ndarray:
    """`numpy.argsort(numbers, kind="stable")` of whole numbers >= 0, by 16 bits a pass: those NumPy sorts by radix."""
    order = np.argsort(numbers.astype(np.uint16, copy=False), kind="stable")
    longest = int(numbers.max(initial=0))
    for shift in range(16, longest.bit_length(), 16):
        order = order[np.argsort((numbers[order] >> shift).astype(np.uint16), kind="stable")]
    return order
