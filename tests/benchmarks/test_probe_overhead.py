import pytest

from benchmarks import probe_overhead


@pytest.mark.slow
def test_the_ratio_is_of_like_things():
    ratio = probe_overhead.measure(quick=True)
    assert ratio.runs == 20 and 0.5 < ratio.low <= ratio.value <= ratio.high < 2
