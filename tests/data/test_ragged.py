"""Rows of different lengths: those that are kept, by runs of rows or one by one."""

import numpy as np
import pytest

from turbopump.data.ragged import ragged_of


@pytest.mark.parametrize("length", [3, 5000])  # runs too short for slices, and long ones
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_rows_that_are_kept(length, share):
    rng = np.random.default_rng(length)
    rows = [rng.integers(0, 9, (int(n), 2)).astype(np.int16) for n in rng.integers(0, length, 40)]
    keep = rng.random(40) < share
    kept = ragged_of(rows).where(keep)
    assert len(kept) == keep.sum() and kept.values.dtype == np.int16 and kept.values.shape[1:] == (2,)
    wanted = [row for row, keeps in zip(rows, keep, strict=True) if keeps]
    assert all(np.array_equal(a, b) for a, b in zip(kept, wanted, strict=True))
