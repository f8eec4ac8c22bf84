"""The keyed permutation: a bijection at every n, its inverse, and statistics that a true shuffle passes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.core.errors import UsageError
from turbopump.data.order import Order
from turbopump.data.permutation import MAX_N, permute, turn_by_reference, unpermute

AWKWARD = sorted({1, 2, 3, 5, 7, 97, 257, 65537} | {(1 << k) + d for k in range(2, 17) for d in (-1, 0, 1)})


@pytest.mark.parametrize("n", AWKWARD)
def test_a_bijection_at_awkward_sizes(n):
    ids = permute(np.arange(n), n, 11, 3)
    assert np.array_equal(np.sort(ids), np.arange(n))
    assert np.array_equal(unpermute(ids, n, 11, 3), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 5000), seed=st.integers(0, 1 << 64), stream=st.integers(0, 1 << 40))
def test_a_bijection_for_any_key(n, seed, stream):
    ids = permute(np.arange(n), n, seed, stream)
    assert np.array_equal(np.sort(ids), np.arange(n))


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, MAX_N), seed=st.integers(0, 1 << 64), stream=st.integers(0, 1 << 62), data=st.data())
def test_the_inverse_leads_back_at_any_size(n, seed, stream, data):
    places = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)), np.int64)
    ids = permute(places, n, seed, stream)
    assert ids.min() >= 0 and ids.max() < n
    assert np.array_equal(unpermute(ids, n, seed, stream), places)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1 << 50), st.integers(0, 1 << 50)), min_size=1, max_size=50))
def test_one_n_and_stream_each_equal_one_for_all(pairs):
    sizes, streams = (np.array(part, np.int64) for part in zip(*pairs))
    places = sizes // 3
    together = permute(places, sizes, 5, streams)
    apart = [permute(place[None], int(n), 5, int(stream))[0] for place, n, stream in zip(places, sizes, streams)]
    assert np.array_equal(together, apart)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.tuples(st.integers(1, MAX_N) | st.integers(1, 40), st.integers(0, 1 << 63), st.integers(0, 1 << 63)),
        min_size=1,
        max_size=30,
    ),
    one_n=st.booleans(),
    one_seed=st.booleans(),
    one_stream=st.booleans(),
)
def test_compiled_code_and_the_reference_agree(rows, one_n, one_seed, one_stream):
    columns = [np.array(column, np.uint64) for column in zip(*rows)]
    n, seed, stream = (int(c[0]) if one else c for c, one in zip(columns, (one_n, one_seed, one_stream)))
    places = (columns[0] // np.uint64(2)).astype(np.int64) if not one_n else np.arange(len(rows)) % n
    there = permute(places, n, seed, stream)
    assert np.array_equal(there, turn_by_reference(places, n, seed, stream, backward=False))
    assert np.array_equal(unpermute(there, n, seed, stream), places)
    assert np.array_equal(turn_by_reference(there, n, seed, stream, backward=True), places)


def test_compiled_code_is_given_a_setting_for_each_number():
    for wrong in (np.arange(1, 3), np.ones((3, 1), np.int64)):
        with pytest.raises(ValueError, match="for 3 numbers"):
            permute(np.zeros(3, np.int64), 10, 1, wrong)


def test_long_inputs_equal_short_ones():
    n = 100_003
    whole = permute(np.arange(n), n, 1, 2)
    assert np.array_equal(whole[70_000:70_010], permute(np.arange(70_000, 70_010), n, 1, 2))


@pytest.mark.parametrize("n", [3, 4, 5, 10])
def test_every_sample_is_equally_likely_at_every_place_of_a_tiny_dataset(n):
    trials = 20_000
    ids = permute(np.tile(np.arange(n), trials), n, 7, np.repeat(np.arange(trials), n)).reshape(trials, n)
    counts = np.stack([(ids == sample).sum(axis=0) for sample in range(n)])
    chi2 = ((counts - trials / n) ** 2 / (trials / n)).sum() / (n - 1) ** 2
    assert chi2 < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("n", [10**6, (1 << 20) + 1])
@pytest.mark.parametrize("seed", [0, 1])
def test_positions_and_successive_differences_look_like_a_shuffle(n, seed):
    ids = permute(np.arange(n), n, seed, 0)
    bins = 64
    cells = np.arange(n) * bins // n * bins + ids * bins // n
    assert 0.9 < _chi2(np.bincount(cells, minlength=bins**2)) < 1.1
    differences = (np.diff(ids) % n) * 256 // n  # modulo n they are uniform but for 0
    assert 0.7 < _chi2(np.bincount(differences, minlength=256)) < 1.35
    for other in (permute(np.arange(n), n, seed + 1, 0), permute(np.arange(n), n, seed, 1), np.arange(n)):
        assert abs(np.corrcoef(ids, other)[0, 1]) < 0.005


def test_the_statistics_reject_a_weak_order():
    n = 10**6
    ids = np.arange(n) * 7919 % n  # a bijection, and no shuffle
    cells = np.arange(n) * 64 // n * 64 + ids * 64 // n
    differences = (np.diff(ids) % n) * 256 // n
    assert _chi2(np.bincount(cells, minlength=4096)) < 0.9 or _chi2(np.bincount(differences, minlength=256)) > 10


def _chi2(counts):
    expected = counts.sum() / len(counts)
    return ((counts - expected) ** 2 / expected).sum() / (len(counts) - 1)


@pytest.mark.parametrize("n", [0, -1, MAX_N + 1])
def test_sizes_that_have_no_order(n):
    with pytest.raises(UsageError, match="1 to 2\\^62"):
        Order(n, 4)
