"""Batches by length: every sample once an epoch, batches of one bucket, a pure function of the step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.buckets import BucketOrder, padding_share, sorted_by_length
from turbopump.data.order import Order
from turbopump.data.source_order import source_order


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=300),
    batch=st.integers(1, 70),
    num_buckets=st.integers(1, 20),
    seed=st.integers(0, 1 << 60),
)
def test_every_epoch_holds_each_sample_once(lengths, batch, num_buckets, seed):
    n = len(lengths)
    order = BucketOrder(np.array(lengths), batch, seed=seed, num_buckets=num_buckets)
    epochs, indices = order.at(0, -(-4 * n // batch) * batch)
    assert np.array_equal(epochs[: 4 * n], np.repeat(range(4), n))
    for epoch in range(4):
        assert np.array_equal(np.sort(indices[epochs == epoch][:n]), np.arange(n))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 500), batch=st.integers(1, 50), step=st.integers(0, 1 << 40), seed=st.integers(0, 99))
def test_a_step_does_not_depend_on_those_asked_before(n, batch, step, seed):
    lengths = np.arange(n) * 7919 % 101
    fresh = BucketOrder(lengths, batch, seed=seed).step_ids(step)
    used = BucketOrder(lengths, batch, seed=seed, sorted_index=sorted_by_length(lengths))
    for other in (0, step + 3, step + 4000):
        used.step_ids(other)
    assert np.array_equal(np.stack(fresh), np.stack(used.step_ids(step)))


def test_batches_are_of_one_bucket_but_for_the_leftovers():
    n, batch, num_buckets = 10_007, 32, 10
    lengths = np.random.default_rng(0).integers(1, 1000, n)
    order = BucketOrder(lengths, batch, seed=1, num_buckets=num_buckets)
    by_length = sorted_by_length(lengths)
    bucket_of = np.empty(n, np.int64)
    for number in range(num_buckets):
        bucket_of[by_length[order.starts[number] : order.starts[number + 1]]] = number
    for first in (0, 1, 5 * n // batch):
        held = [len(np.unique(bucket_of[order.step_ids(first + k)[1]])) for k in range(n // batch)]
        assert sum(number > 1 for number in held) <= num_buckets + 2  # leftovers: fewer than a batch of each bucket


def test_membership_and_the_order_of_batches_change_with_the_epoch():
    n, batch = 4096, 32
    lengths = np.arange(n)
    order = BucketOrder(lengths, batch, seed=1, num_buckets=8)
    means = np.array([[lengths[order.step_ids(e * 128 + k)[1]].mean() for k in range(128)] for e in range(2)])
    assert abs(np.corrcoef(means[0], means[1])[0, 1]) < 0.4 and abs(np.corrcoef(means[0], np.arange(128))[0, 1]) < 0.4
    together = [{frozenset(order.step_ids(e * 128 + k)[1].tolist()) for k in range(128)} for e in range(2)]
    assert not together[0] & together[1]


def test_the_samples_between_two_epochs_are_not_always_the_same():
    n, batch = 1003, 100
    order = BucketOrder(np.arange(n), batch, seed=3, num_buckets=4)
    last = []
    for epoch in range(200):
        place = (epoch + 1) * n // batch * batch
        epochs, indices = order.at(place, batch)
        last += indices[epochs == epoch].tolist()
    quarters = np.bincount(np.array(last) * 4 // n, minlength=4) / len(last)
    assert (quarters > 0.1).all()


def test_buckets_save_padding_and_more_buckets_more():
    lengths = np.random.default_rng(0).lognormal(5, 1, 20_000).astype(int)
    plain = padding_share(Order(len(lengths), 64), lengths)
    few, many = (padding_share(BucketOrder(lengths, 64, num_buckets=k), lengths) for k in (8, 64))
    assert many < few < plain - 0.2
    assert padding_share(Order(len(lengths), 64), lengths, microbatch=8, steps=range(20)) < plain
    assert padding_share(Order(10, 5), np.zeros(10, int)) == 0


def test_padding_share_counts_each_microbatch():
    assert padding_share(Order(4, 4, order="sequential"), np.array([1, 3, 2, 2])) == 1 - 8 / 12
    assert padding_share(Order(4, 4, order="sequential"), np.array([1, 3, 2, 2]), microbatch=2) == 1 - 8 / 10
    with pytest.raises(UsageError, match="does not divide"):
        padding_share(Order(4, 4), np.array([1, 3, 2, 2]), microbatch=3)


def test_boundaries_are_lengths():
    lengths = np.array([5, 1, 9, 5, 3, 30])
    assert BucketOrder(lengths, 2, boundaries=[4, 5, 10, 99]).starts.tolist() == [0, 2, 5, 6]


def test_lengths_and_index_may_lie_in_files(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 100, 1000).astype(np.uint32)
    np.save(tmp_path / "lengths.npy", lengths)
    np.save(tmp_path / "index.npy", sorted_by_length(lengths))
    mapped, index = (np.load(tmp_path / name, mmap_mode="r") for name in ("lengths.npy", "index.npy"))
    assert index.dtype == np.int32
    order = BucketOrder(mapped, 16, sorted_index=index)
    assert np.array_equal(order.step_ids(70)[1], BucketOrder(lengths, 16).step_ids(70)[1])


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (np.array([1.0, 2.0]), "one whole number a sample"),
        (np.array([[1], [2]]), "one whole number a sample"),
        (np.array([3, 4, -1, 2]), "sample 2 has length -1"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(DatasetError, match=message):
        BucketOrder(lengths, 2)


def test_bad_settings():
    lengths = np.arange(10)
    with pytest.raises(UsageError, match="1 to 2"):
        BucketOrder(lengths[:0], 2)
    with pytest.raises(UsageError, match="num_buckets: 0"):
        BucketOrder(lengths, 2, num_buckets=0)
    with pytest.raises(UsageError, match="go up"):
        BucketOrder(lengths, 2, boundaries=[5, 3])
    with pytest.raises(DatasetError, match="shape"):
        BucketOrder(lengths, 2, sorted_index=np.arange(9))


class _Rows:
    name = "rows"

    def __init__(self, size, lengths=None):
        self.size = size
        if lengths is not None:
            self.lengths = lengths

    def __len__(self):
        return self.size


def test_a_source_says_what_it_can_be_ordered_by():
    lengths = np.arange(100) % 17
    bucketed = source_order(_Rows(100, lengths), 8, order="bucketed", seed=2, num_buckets=3)
    assert np.array_equal(bucketed.step_ids(5)[1], BucketOrder(lengths, 8, seed=2, num_buckets=3).step_ids(5)[1])
    blocks = source_order(_Rows(100), 8, order="blocks", seed=2, block_samples=5, window_blocks=2)
    same = Order(100, 8, order="blocks", seed=2, block_samples=5, window_blocks=2)
    assert np.array_equal(blocks.step_ids(5)[1], same.step_ids(5)[1])
    with pytest.raises(UsageError, match="table of lengths, and rows has none"):
        source_order(_Rows(100), 8, order="bucketed")
    with pytest.raises(UsageError, match="100 lengths for 99 samples"):
        source_order(_Rows(99, lengths), 8, order="bucketed")
