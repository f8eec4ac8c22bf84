"""Batches by length out of a mixture: the mixture's own draws, a window at a time, and a pure function of the step."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.buckets import BucketOrder, padding_share
from turbopump.data.mixture import MixtureSource
from turbopump.data.mixture_buckets import MixtureBucketOrder, stable_argsort
from turbopump.data.mixture_order import MixtureOrder
from turbopump.data.source_order import source_order


@st.composite
def orders(draw):
    """The order, and all lengths in one array."""
    sizes = draw(st.lists(st.integers(1, 200), min_size=1, max_size=4))
    weights = st.lists(st.integers(0, 9), min_size=len(sizes), max_size=len(sizes)).filter(sum)
    schedule = [(start, draw(weights)) for start in [0, *sorted(draw(st.sets(st.integers(1, 90), max_size=3)))]]
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    lengths = [rng.integers(0, draw(st.sampled_from([1, 60, 70_000, 1 << 40])), size) for size in sizes]
    mixed = MixtureOrder(sizes, schedule, draw(st.integers(1, 30)), seed=draw(st.integers(0, 99)))
    order = MixtureBucketOrder(mixed, lengths, seed=draw(st.integers(0, 99)), num_buckets=draw(st.integers(1, 20)))
    return order, np.concatenate(lengths)


def windows(order, num_steps):
    starts = {
        *range(0, num_steps + 1, order.num_buckets),
        *(start for start in order.mixed.starts if start < num_steps),
    }
    starts = sorted(starts)
    return list(pairwise(starts))


@settings(max_examples=60, deadline=None)
@given(orders())
def test_a_window_holds_the_draws_of_the_mixture_in_batches_by_length(made):
    order, lengths = made
    batch = order.global_batch
    for begin, end in windows(order, 60):
        drawn = np.stack(order.mixed.at(begin * batch, (end - begin) * batch))
        found = np.stack(order.at(begin * batch, (end - begin) * batch))
        assert sorted(zip(*drawn.tolist())) == sorted(zip(*found.tolist()))
        batches = np.sort(lengths[found[1]].reshape(end - begin, batch), axis=1)
        in_turn = batches[np.lexsort((batches[:, -1], batches[:, 0]))]
        assert np.array_equal(in_turn.reshape(-1), np.sort(lengths[drawn[1]]))


@settings(max_examples=60, deadline=None)
@given(orders(), st.lists(st.integers(0, 100), min_size=1, max_size=5))
def test_every_sample_is_accounted_for_at_every_step(made, steps):
    order, _ = made
    indices = np.concatenate([order.step_ids(step)[1] for step in range(100)])
    for step in steps:
        sources = np.searchsorted(order.mixed.offsets, indices[: step * order.global_batch], "right") - 1
        assert order.counts(step).tolist() == np.bincount(sources, minlength=len(order.mixed.sizes)).tolist()


@settings(max_examples=40, deadline=None)
@given(orders(), st.integers(0, 1 << 40), st.integers(1, 50), st.integers(0, 40))
def test_a_step_does_not_depend_on_those_asked_before(made, step, count, skipped):
    order, _ = made
    late = np.stack(order.step_ids(step))
    order.step_ids(0)
    first = step * order.global_batch
    assert np.array_equal(late, np.stack(order.at(first, order.global_batch)))
    assert np.array_equal(
        np.stack(order.at(first, skipped + count))[:, skipped:], np.stack(order.at(first + skipped, count))
    )


def test_padding_is_saved_as_with_one_dataset():
    rng = np.random.default_rng(0)
    lengths = [rng.lognormal(mean, 1, 20_000).astype(int) for mean in (4, 6)]
    mixed = MixtureOrder([20_000, 20_000], [(0, [0.5, 0.5])], 64)
    together = np.concatenate(lengths)
    plain, found = (padding_share(order, together) for order in (mixed, MixtureBucketOrder(mixed, lengths)))
    alone = padding_share(BucketOrder(together, 64), together)
    assert found < alone + 0.05 < plain - 0.2


def test_ranks_do_not_differ_in_the_lengths_they_get():
    lengths = np.random.default_rng(0).integers(1, 1000, 10_000)
    order = MixtureBucketOrder(MixtureOrder([10_000], [(0, [1])], 32), [lengths], num_buckets=4)
    halves = np.array([lengths[order.step_ids(step)[1]].reshape(2, -1).mean(axis=1) for step in range(300)])
    assert abs(halves[:, 0].mean() - halves[:, 1].mean()) < 20


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1 << 50) | st.integers(0, 3) | st.integers(0, 1 << 17), max_size=60))
def test_numbers_are_sorted_stably(numbers):
    numbers = np.array(numbers, np.int64)
    assert np.array_equal(stable_argsort(numbers), np.argsort(numbers, kind="stable"))


class _Rows:
    def __init__(self, name, lengths=None, size=None):
        self.name, self.size = name, len(lengths) if size is None else size
        if lengths is not None:
            self.lengths = np.array(lengths)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return np.int64(index)


def test_a_mixture_of_sources_with_lengths_is_bucketed():
    sources = [_Rows("a", np.arange(50)), _Rows("b", np.arange(70) * 2)]
    source = MixtureSource(sources, [(0, [1, 2]), (10, [3, 1])])
    order = source_order(source, 6, order="bucketed", seed=3, num_buckets=5)
    mixed = MixtureOrder([50, 70], [(0, [1, 2]), (10, [3, 1])], 6, seed=3)
    same = MixtureBucketOrder(mixed, [source.lengths for source in sources], seed=3, num_buckets=5)
    for step in (0, 9, 10, 12, 1000):
        assert np.array_equal(order.step_ids(step)[1], same.step_ids(step)[1])


@pytest.mark.parametrize(
    ("sources", "error", "message"),
    [
        ([_Rows("a", [1, 2]), _Rows("b", size=5)], UsageError, "table of lengths, and b has none"),
        ([_Rows("a", [1, 2]), _Rows("b", [3, 4], size=3)], UsageError, "b has 2 lengths for 3 samples"),
        ([_Rows("a", [1, 2]), _Rows("b", [3, -4])], DatasetError, "source 1: sample 1 has length -4"),
        ([_Rows("a", [1.5, 2])], DatasetError, "one whole number a sample"),
    ],
)
def test_sources_that_cannot_be_bucketed(sources, error, message):
    with pytest.raises(error, match=message):
        source_order(MixtureSource(sources), 4, order="bucketed")


def test_bad_settings():
    mixed = MixtureOrder([2, 2], [(0, [1, 1])], 4)
    with pytest.raises(UsageError, match="num_buckets: 0"):
        MixtureBucketOrder(mixed, [np.arange(2), np.arange(2)], num_buckets=0)
    with pytest.raises(DatasetError, match=r"\[2, 3\] samples for sources of \[2, 2\]"):
        MixtureBucketOrder(mixed, [np.arange(2), np.arange(3)])
