import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbopump.core.units import human, human_bytes, human_seconds


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "", "0"),
        (0, "B", "0 B"),
        (1.5e12, "FLOP/s", "1.5 TFLOP/s"),
        (999, "B", "999 B"),
        (999.4, "B", "999 B"),
        (999.9, "B", "1 kB"),
        (1000, "", "1 k"),
        (123456, "tok/s", "123 ktok/s"),
        (-1500, "B", "-1.5 kB"),
        (0.25, "B", "0.25 B"),
        (1.23e-5, "", "1.23e-05"),
        (2e22, "B", "20000 EB"),
        (math.inf, "B", "inf B"),
        (math.nan, "", "nan"),
    ],
)
def test_human(value, unit, text):
    assert human(value, unit) == text


def test_digits_and_bytes():
    assert human(123456, "B", digits=2) == "120 kB"
    assert human(999.6, "B", digits=4) == "999.6 B"
    assert human(1234.56, "B", digits=5) == "1.2346 kB"
    assert human_bytes(2.5e9) == "2.5 GB"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (5e-7, "0.5 µs"),
        (999.9e-6, "1 ms"),
        (8e-4, "800 µs"),
        (0.0123, "12.3 ms"),
        (0.9999, "1 s"),
        (12.34, "12.3 s"),
        (99.94, "99.9 s"),
        (99.96, "1 min 40 s"),
        (245, "4 min 05 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86400 * 3 + 3600 * 4 + 5, "3 d 04 h"),
        (-245, "-4 min 05 s"),
        (math.inf, "inf"),
    ],
)
def test_human_seconds(seconds, text):
    assert human_seconds(seconds) == text


FACTORS = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}


@given(st.floats(-1e20, 1e20).filter(lambda x: x == 0 or abs(x) > 1e-12))
def test_the_text_is_the_number_to_three_digits(value):
    found = re.fullmatch(r"(\S+) ([kMGTPE]?)B", human(value, "B"))
    assert found
    assert float(found[1]) * FACTORS[found[2]] == pytest.approx(value, rel=0.0051)


@given(st.floats(1e-9, 1e8))
def test_durations_keep_their_size(seconds):
    units = {"µs": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "d": 86400}
    words = human_seconds(seconds).split()
    read_s = sum(float(number) * units[unit] for number, unit in zip(words[::2], words[1::2], strict=True))
    assert read_s == pytest.approx(seconds, rel=0.03)
    assert "e" not in words[0] or seconds < 1e-7
