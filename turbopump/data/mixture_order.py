"""The order of a mixture: which source, and which of its samples, stands at each place, as a pure function of the step.

Places fall into blocks of `MIX_BLOCK`; a block holds a whole number of draws from each source, its quota, shuffled
within the block by a keyed permutation. The quotas come from a rule for how many of the first T places are a source's:
the list of sources is halved again and again, and of the T places of a list its left half gets round(T * its share of
the list's weight), the right half the rest. Both never fall as T grows, all add up to T, and each rounding is off by
at most 1/2: after every block each source is within ceil(log2(sources)) / 2 samples of T * weight (and everywhere
within MIX_BLOCK more), a weight of 0.0001 as well. Weights count as the decimals they are written as, in whole numbers:
nothing drifts, and T costs O(sources).

The k-th draw of a source takes the k-th place of its own order of endless epochs. Where the weights change at a step, a
new series of blocks begins, and every source goes on at the draw it has come to.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.data.order import BLOCK_SAMPLES, WINDOW_BLOCKS, EpochOrder, OrderKind, StepOrder, runs_of, words
from turbopump.data.permutation import mix_int, permute

MIX_BLOCK = 1024
BLOCK_PLACES = 1 << 16  # places computed at once: every source costs a fixed 5 microseconds of numpy calls
_MAX_SOURCES = 1 << 16

Weights = Sequence[float | Fraction]
Schedule = Sequence[tuple[int, Weights]]


@dataclass(frozen=True)
class _Segment:
    """Steps from `start_step` on; `taken` counts the draws of each source before them."""

    start_step: int
    weights: tuple[int, ...]
    taken: tuple[int, ...]


class MixtureOrder(StepOrder):
    """Several sources of `sizes` samples as one: source s's sample i is index `offsets[s] + i`.

    `schedule` is a list of (first step, weights), the first at step 0; only the ratios of weights matter. A source of
    weight 0 rests. Epochs are each source's own. Raises `UsageError` for a schedule that does not hold.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        schedule: Schedule,
        global_batch: int,
        *,
        seed: int = 0,
        order: OrderKind = "shuffle",
        block_samples: int = BLOCK_SAMPLES,
        window_blocks: int = WINDOW_BLOCKS,
        block_places: int = BLOCK_PLACES,
    ) -> None:
        super().__init__(sum(sizes), global_batch, block_places=block_places)
        self.sizes = tuple(sizes)
        self._sizes = np.array(self.sizes, np.int64)
        self.offsets = np.concatenate([[0], np.cumsum(self.sizes)]).astype(np.int64)
        self._seed_of_blocks = mix_int(seed + 1)
        self._of_epoch = EpochOrder(order, block_samples, window_blocks)
        self._seeds = words([mix_int(seed + number + 2) for number in range(len(self.sizes))])
        problems = schedule_problems(schedule, len(self.sizes))
        if problems:
            raise UsageError(f"mixture: {problems[0]}")
        self._segments = self._segments_of(schedule)
        self.starts = [segment.start_step for segment in self._segments]

    def _segments_of(self, schedule: Schedule) -> tuple[_Segment, ...]:
        segments: list[_Segment] = []
        taken = [0] * len(self.sizes)
        for number, (start, weights) in enumerate(schedule):
            if number:
                places = (start - segments[-1].start_step) * self.global_batch
                taken = [a + b for a, b in zip(segments[-1].taken, self._taken(number - 1, segments[-1], places))]
            segments.append(_Segment(start, whole_weights(weights), tuple(taken)))
        return tuple(segments)

    def counts(self, step: int) -> np.ndarray:
        """Samples taken of each source before `step`, int64 [sources]; exact."""
        number = bisect_right(self.starts, step) - 1
        segment = self._segments[number]
        here = self._taken(number, segment, (step - segment.start_step) * self.global_batch)
        return np.array([a + b for a, b in zip(segment.taken, here)], np.int64)

    def epochs(self, step: int) -> np.ndarray:
        """Passes over each source before `step`, float64 [sources]; 1.5 is in the middle of the second."""
        return self.counts(step) / np.array(self.sizes)

    def at(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Epochs (each source's own) and indices of the places `first` to `first + count` of the run."""
        out = np.empty((2, count), np.int64)
        done = 0
        while done < count:
            number = bisect_right(self.starts, (first + done) // self.global_batch) - 1
            segment = self._segments[number]
            begin = first + done - segment.start_step * self.global_batch
            rest = min(count - done, BLOCK_PLACES)  # what is worked on stays in the cache
            if number + 1 < len(self.starts):
                rest = min(rest, self.starts[number + 1] * self.global_batch - first - done)
            self._fill(out[:, done : done + rest], number, segment, begin, begin + rest)
            done += rest
        return out[0], out[1]

    def _fill(self, out: np.ndarray, number: int, segment: _Segment, begin: int, end: int) -> None:
        """The places `begin` to `end` of a segment into `out`, int64 [2, end - begin]."""
        first_block = begin // MIX_BLOCK
        skipped = begin - first_block * MIX_BLOCK
        sources = self._sources(number, segment, first_block, -(-end // MIX_BLOCK))[: skipped + end - begin]
        draws = np.bincount(sources[:skipped], minlength=len(self.sizes)).tolist()  # of this block, before `begin`
        sources = sources[skipped:]
        by_source = np.argsort(sources, kind="stable")
        counts = np.bincount(sources, minlength=len(self.sizes))
        present = np.flatnonzero(counts)
        counts = counts[present]
        starts = taken_of(first_block * MIX_BLOCK, segment.weights)
        firsts = [segment.taken[source] + starts[source] + draws[source] for source in present.tolist()]
        runs = runs_of(firsts, counts, self._sizes[present], self._seeds[present])
        out[0, by_source] = runs.epochs
        out[1, by_source] = self._of_epoch.samples(runs) + np.repeat(self.offsets[present], counts)

    def _sources(self, number: int, segment: _Segment, first: int, end: int) -> np.ndarray:
        """The source at each place of the blocks `first` to `end` of a segment, uint16 [(end - first) * MIX_BLOCK]."""
        num_blocks = end - first
        more = np.arange(num_blocks + 1) * MIX_BLOCK
        quotas = np.diff(np.stack(taken_along(first * MIX_BLOCK, more, segment.weights)))
        all_sources = np.tile(np.arange(len(self.sizes), dtype=np.uint16), num_blocks)
        in_quotas = np.repeat(all_sources, quotas.T.reshape(-1))
        slots = np.tile(np.arange(MIX_BLOCK), num_blocks)
        streams = words([(block << 16) + number for block in range(first, end)])  # weights may change 65,536 times
        moved = permute(slots, MIX_BLOCK, self._seed_of_blocks, np.repeat(streams, MIX_BLOCK))
        moved += np.repeat(more[:-1], MIX_BLOCK)
        return in_quotas[moved]

    def _taken(self, number: int, segment: _Segment, places: int) -> list[int]:
        """Draws of each source in the first `places` of a segment."""
        block, within = divmod(places, MIX_BLOCK)
        taken = taken_of(block * MIX_BLOCK, segment.weights)
        if not within:
            return list(taken)
        partial = np.bincount(self._sources(number, segment, block, block + 1)[:within], minlength=len(self.sizes))
        return [a + b for a, b in zip(taken, partial.tolist())]


def schedule_problems(schedule: Schedule, num_sources: int) -> list[str]:
    """What does not hold of a schedule, in words; none where it is sound."""
    problems = []
    if not 1 <= num_sources < _MAX_SOURCES:
        problems.append(f"{num_sources} sources given: 1 to {_MAX_SOURCES - 1} are possible")
    starts = [start for start, _ in schedule]
    if not starts or starts[0] != 0 or any(b <= a for a, b in pairwise(starts)):
        problems.append(f"weights begin at the steps {starts}: begin at 0 and go up")
    if len(starts) >= _MAX_SOURCES:
        problems.append(f"the weights change {len(starts)} times: at most {_MAX_SOURCES - 1} changes are possible")
    for start, weights in schedule:
        if len(weights) != num_sources:
            problems.append(f"{len(weights)} weights from step {start} on for {num_sources} sources: give one each")
        elif not all(0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
            problems.append(f"weights {list(weights)} from step {start} on: numbers >= 0, not all 0, are needed")
    return problems


def whole_weights(weights: Weights) -> tuple[int, ...]:
    """The same ratios in whole numbers; a float counts as the decimal it is written as (0.1 is 1/10)."""
    exact = [weight if isinstance(weight, Fraction) else Fraction(str(weight)) for weight in weights]
    common = math.lcm(*(weight.denominator for weight in exact))
    return tuple(int(weight * common) for weight in exact)


def taken_of(places: int, weights: tuple[int, ...]) -> tuple[int, ...]:
    """How many of the first `places` each source gets: whole numbers that add up and never fall as `places` grows."""
    if len(weights) == 1:
        return (places,)
    middle = len(weights) // 2
    left, total = sum(weights[:middle]), sum(weights)
    if total == 0:  # only below a half that gets nothing
        return (0,) * len(weights)
    to_left = (2 * places * left + total) // (2 * total)  # round half up
    return taken_of(to_left, weights[:middle]) + taken_of(places - to_left, weights[middle:])


def taken_along(start: int, more: np.ndarray, weights: tuple[int, ...]) -> list[np.ndarray]:
    """`taken_of(start + m) - taken_of(start)` for each m of `more` (int64, not falling): an int64 array a source."""
    if len(weights) == 1:
        return [more]
    middle = len(weights) // 2
    left, total = sum(weights[:middle]), sum(weights)
    if total == 0:
        return [np.zeros_like(more)] * len(weights)
    start_left, rest = divmod(2 * start * left + total, 2 * total)
    fits = 2 * total * (int(more[-1]) + 1) < 1 << 63
    numbers = more if fits else more.astype(object)  # weights of 16 digits need Python's integers
    to_left = ((numbers * (2 * left) + rest) // (2 * total)).astype(np.int64, copy=False)
    return [
        *taken_along(start_left, to_left, weights[:middle]),
        *taken_along(start - start_left, more - to_left, weights[middle:]),
    ]
