"""Curves through points: exact pieces come back exactly, nothing falls or is negative."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbopump.comms.curves import fit_line, fit_segments, follow_neighbours, follow_segments, isotonic

SIZES = [1 << power for power in range(3, 27)]


def two_protocols(size):
    """100 us + 1 GB/s up to 64 KiB, then 400 us + 4 GB/s."""
    return 100e-6 + size / 1e9 if size <= 1 << 16 else 400e-6 + size / 4e9


def test_a_line_comes_back_exactly():
    alpha, beta, error = fit_line([(float(n), 50e-6 + n / 2e9) for n in SIZES])
    assert alpha == pytest.approx(50e-6, rel=1e-6)
    assert beta == pytest.approx(1 / 2e9, rel=1e-6)
    assert error < 1e-10


def test_a_line_is_never_negative():
    assert fit_line([(1.0, 2.0), (2.0, 1.0)])[1] == 0.0  # falling: no slope
    alpha, beta, _ = fit_line([(1.0, 1.0), (4.0, 16.0)])  # steeper than proportional: no latency
    assert alpha == 0.0
    assert beta > 0


def test_pieces_come_back_exactly():
    segments = fit_segments([(float(n), two_protocols(n)) for n in SIZES])
    assert len(segments) == 2
    assert segments[0].to_bytes == 1 << 16
    assert [s.alpha_s for s in segments] == pytest.approx([100e-6, 400e-6], rel=1e-5)
    assert [s.beta_s_per_byte for s in segments] == pytest.approx([1e-9, 0.25e-9], rel=1e-5)


def test_a_kink_between_two_sizes_is_where_the_lines_cross():
    segments = fit_segments([(float(n), max(100e-6, n / 1e9)) for n in SIZES])
    at = follow_segments(segments)
    for size in (90e3, 100e3, 110e3, 5e6):
        assert at(size) == pytest.approx(max(100e-6, size / 1e9), rel=1e-4)


@given(st.lists(st.floats(1e-6, 10.0), min_size=2, max_size=12))
def test_no_curve_falls_or_is_negative(seconds):
    points = [(float(n), t) for n, t in zip(SIZES, seconds)]
    for at in (follow_neighbours(points), follow_segments(fit_segments(points))):
        times = [at(float(size)) for size in np.geomspace(2, 1e9, 60)]
        assert all(t >= 0 for t in times)
        assert all(later >= earlier * (1 - 1e-9) for earlier, later in pairwise(times))


def test_isotonic_pools_only_what_falls():
    assert isotonic(np.array([1.0, 2.0, 3.0])).tolist() == pytest.approx([1, 2, 3])
    assert isotonic(np.array([1.0, 4.0, 1.0, 8.0])).tolist() == pytest.approx([1, 2, 2, 8])
