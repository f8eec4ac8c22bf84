"""The order is a bijection an epoch and a pure function of the step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.data.order import Order, held_out, permute, step_ids


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 1 << 64), epoch=st.integers(0, 1 << 40))
def test_permute_is_a_bijection(n, seed, epoch):
    ids = permute(np.arange(n), n, seed, epoch)
    assert np.array_equal(np.sort(ids), np.arange(n))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 200),
    batch=st.integers(1, 64),
    seed=st.integers(0, 1000),
    order=st.sampled_from(["shuffle", "sequential"]),
)
def test_each_sample_once_an_epoch_whatever_the_batch(n, batch, seed, order):
    steps = -(-3 * n // batch)
    places = Order(n, batch, order=order, seed=seed, block_places=300)
    ids = [places.step_ids(k) for k in range(steps)]
    epochs, indices = (np.concatenate(parts)[: 3 * n] for parts in zip(*ids))
    assert np.array_equal(epochs, np.repeat([0, 1, 2], n))
    for epoch in range(3):
        assert np.array_equal(np.sort(indices[epochs == epoch]), np.arange(n))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 1 << 45), batch=st.integers(1, 3000), step=st.integers(0, 1 << 40))
def test_a_step_does_not_depend_on_those_asked_before(n, batch, step):
    fresh = step_ids(step, n=n, global_batch=batch)
    used = Order(n, batch)
    used.step_ids(step + 5)
    used.step_ids(0)
    again = used.step_ids(step)
    assert np.array_equal(fresh[0], again[0]) and np.array_equal(fresh[1], again[1])
    assert fresh[1].min() >= 0 and fresh[1].max() < n


def test_epochs_and_seeds_differ():
    n = 1000
    orders = {tuple(permute(np.arange(n), n, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_mixed_block_equals_one_epoch_at_a_time():
    n = 37
    epochs = np.repeat(np.arange(4), n)
    together = permute(np.tile(np.arange(n), 4), n, 5, epochs)
    apart = np.concatenate([permute(np.arange(n), n, 5, epoch) for epoch in range(4)])
    assert np.array_equal(together, apart)


def test_the_shuffle_leaves_no_trace_of_the_place():
    n = 1 << 16
    ids = permute(np.arange(n), n, 1, 0)
    counts = np.histogram2d(np.arange(n), ids, bins=32)[0]
    chi2 = ((counts - n / 1024) ** 2 / (n / 1024)).sum() / 1023
    assert 0.8 < chi2 < 1.2
    assert abs(np.corrcoef(np.arange(n), ids)[0, 1]) < 0.02


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5])
def test_held_out_takes_the_fraction(fraction):
    assert held_out(np.arange(100_000), fraction).mean() == pytest.approx(fraction, abs=0.005)
