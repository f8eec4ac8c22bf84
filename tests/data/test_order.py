"""The order is a bijection an epoch and a pure function of the step."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.core.errors import UsageError
from turbopump.data.order import Order, held_out, step_ids
from turbopump.data.order_quality import describe_order, order_quality, true_shuffle
from turbopump.data.permutation import permute

KINDS = st.sampled_from(["shuffle", "blocks", "sequential"])


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 200),
    batch=st.integers(1, 64),
    seed=st.integers(0, 1000),
    order=KINDS,
    block_samples=st.integers(1, 40),
    window_blocks=st.integers(1, 9),
)
def test_each_sample_once_an_epoch_whatever_the_batch(n, batch, seed, order, block_samples, window_blocks):
    steps = -(-3 * n // batch)
    places = Order(
        n,
        batch,
        order=order,
        seed=seed,
        block_samples=block_samples,
        window_blocks=window_blocks,
        block_places=300,
    )
    ids = [places.step_ids(k) for k in range(steps)]
    epochs, indices = (np.concatenate(parts)[: 3 * n] for parts in zip(*ids))
    assert np.array_equal(epochs, np.repeat([0, 1, 2], n))
    for epoch in range(3):
        assert np.array_equal(np.sort(indices[epochs == epoch]), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 1 << 45), batch=st.integers(1, 3000), step=st.integers(0, 1 << 40), order=KINDS)
def test_a_step_does_not_depend_on_those_asked_before(n, batch, step, order):
    fresh = step_ids(step, n=n, global_batch=batch, order=order)
    used = Order(n, batch, order=order)
    used.step_ids(step + 5)
    used.step_ids(0)
    again = used.step_ids(step)
    assert np.array_equal(fresh[0], again[0]) and np.array_equal(fresh[1], again[1])
    assert fresh[1].min() >= 0 and fresh[1].max() < n


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(1, 1 << 40),
    batch=st.integers(1, 100),
    step=st.integers(0, 1 << 40),
    num_steps=st.integers(0, 30),
    order=KINDS,
)
def test_what_is_ahead_is_what_comes(n, batch, step, num_steps, order):
    ahead = Order(n, batch, order=order, block_places=500).ahead(step, num_steps)
    order = Order(n, batch, order=order)
    coming = [order.step_ids(k)[1] for k in range(step, step + num_steps)]
    assert np.array_equal(ahead, np.concatenate([np.empty(0, np.int64), *coming]))


def test_reading_ahead_does_not_make_the_order_compute_twice(monkeypatch):
    order = Order(10_000, 10, block_places=100)
    asked = []
    monkeypatch.setattr(order, "at", lambda first, count: asked.append(first) or Order.at(order, first, count))
    for step in range(100):
        order.step_ids(step)
        order.ahead(step + 10, 1)
    assert len(asked) == len(set(asked)) == 11


def test_ids_cannot_be_written_to():
    epochs, indices = Order(100, 10).step_ids(3)
    for ids in (epochs, indices):
        with pytest.raises(ValueError, match="read-only"):
            ids[0] = 1


def test_epochs_and_seeds_differ():
    n = 1000
    for kind in ("shuffle", "blocks"):
        orders = {
            tuple(Order(n, 1, order=kind, seed=seed, block_samples=8).at(epoch * n, n)[1])
            for seed in range(3)
            for epoch in range(3)
        }
        assert len(orders) == 9


def test_a_mixed_block_equals_one_epoch_at_a_time():
    n = 37
    epochs = np.repeat(np.arange(4), n)
    together = permute(np.tile(np.arange(n), 4), n, 5, epochs)
    apart = np.concatenate([permute(np.arange(n), n, 5, epoch) for epoch in range(4)])
    assert np.array_equal(together, apart)


@pytest.mark.parametrize("n", [1600, 1601, 1599, 1593])
def test_a_window_holds_its_blocks_and_no_others(n):
    """In blocks of 16 and windows of 5 blocks, 80 successive places hold 5 whole blocks (the short one moves along)."""
    size, window = 16, 5
    indices = Order(n, 1, order="blocks", seed=3, block_samples=size, window_blocks=window).at(0, n)[1]
    num_windows = 0
    while len(indices):
        blocks = np.unique(indices[: window * size - (-n % size)] // size)
        samples = (blocks[:, None] * size + np.arange(size)).reshape(-1)
        samples = samples[samples < n]
        assert len(blocks) <= window
        assert np.array_equal(np.sort(indices[: len(samples)]), samples)
        assert len(samples) < 2 or not np.array_equal(indices[: len(samples)], samples)
        indices, num_windows = indices[len(samples) :], num_windows + 1
    assert num_windows == -(-n // (size * window))


def test_blocks_touch_few_blocks_and_still_shuffle():
    n, batch = 100_000, 256
    shuffle, blocks, sequential, true = describe_order(n, batch, block_samples=100, window_blocks=10)
    assert sequential["requests a batch"] == 1 and sequential["neighbours that stay so"] == 1
    assert blocks["blocks a batch"] <= 20 < 200 < shuffle["blocks a batch"]
    for name, value in true.items():
        if name != "order":
            assert shuffle[name] == pytest.approx(value, rel=0.1, abs=0.001)
    assert blocks["distance from storage order"] == pytest.approx(1 / 3, abs=0.05)
    assert [row["order"] for row in (shuffle, blocks, sequential, true)] == [
        "shuffle",
        "blocks",
        "sequential",
        "true shuffle",
    ]


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 500), batch=st.integers(1, 600), order=KINDS)
def test_quality_has_figures_at_any_size(n, batch, order):
    quality = order_quality(Order(n, batch, order=order, block_samples=7), block_samples=7)
    assert 1 <= quality.requests <= min(n, batch) and 1 <= quality.blocks <= min(-(-n // 7), batch)
    assert 0 <= quality.neighbours <= 1 and 0 <= quality.distance < 1 and 0 <= quality.spread < 1
    assert true_shuffle(n, batch, block_samples=7).blocks <= -(-n // 7)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"order": "random"}, "none of shuffle, blocks, sequential"),
        ({"order": "bucketed"}, "needs a source with lengths"),
        ({"block_samples": 0}, "at least 1"),
        ({"window_blocks": 0}, "at least 1"),
        ({"global_batch": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_hold(wrong, message):
    with pytest.raises(UsageError, match=message):
        Order(**{"n": 10, "global_batch": 2, **wrong})


@pytest.mark.parametrize("fraction", [0.0, 0.05, 0.5])
def test_held_out_takes_the_fraction(fraction):
    assert held_out(np.arange(100_000), fraction).mean() == pytest.approx(fraction, abs=0.005)
