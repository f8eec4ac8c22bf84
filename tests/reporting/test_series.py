"""Thinning keeps what the eye would see; smoothing does not move it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbopump.reporting.series import sample_rows, significant, smooth, thin


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=4000), st.integers(1, 40))
def test_thin_keeps_extremes_and_ends(values, buckets):
    y = np.array(values)
    x = np.arange(1, len(y) + 1)
    thin_x, thin_y = thin(x, y, buckets)
    assert len(thin_x) <= 4 * buckets + 2 and (np.diff(thin_x) > 0).all()
    assert (thin_y == y[thin_x - 1]).all()
    assert {y.min(), y.max(), y[0], y[-1]} <= set(thin_y.tolist())


def test_thin_keeps_single_spikes_and_the_first_steps():
    x = np.arange(1, 1_000_001)
    y = np.ones(len(x))
    y[[123_456, 700_001]] = [50.0, -50.0]
    y[:20] = np.arange(20)
    thin_x, _ = thin(x, y)
    assert {123_457, 700_002} <= set(thin_x.tolist()) and len(thin_x) < 2500
    assert (thin_x <= 20).sum() >= 15  # a logarithmic axis shows each of them


def test_thin_leaves_out_what_is_not_finite():
    x, y = thin(np.arange(4), np.array([1.0, np.nan, np.inf, 2.0]))
    assert x.tolist() == [0, 3] and y.tolist() == [1.0, 2.0]


def test_smooth():
    y = np.array([10.0, 0.0, 2.0, np.nan, 4.0])
    assert smooth(y, 1) == pytest.approx([10.0, 4.0, 1.0, 3.0, 4.0])
    assert np.isnan(smooth(np.array([np.nan, np.nan]), 1)).all()
    assert smooth(np.full(1000, 3.0), 50) == pytest.approx(3.0)
    assert len(smooth(np.array([]), 5)) == 0


def test_rows_and_digits():
    assert sample_rows(100, 3).tolist() == [0, 50, 99] and sample_rows(2).tolist() == [0, 1] and not len(sample_rows(0))
    assert significant(np.array([1.23456789, np.nan, 1e9])) == [1.2346, None, 1e9]
    assert significant(np.array([7], dtype=np.int64)) == [7]
