"""Figures that cannot be are found, each with its row; those that can are not."""

import math
from dataclasses import replace

import pytest

from tests.synthetic_profile import build, datasheet
from turbopump.hardware.profile import Curve
from turbopump.hardware.sanity import oddities
from turbopump.hardware.specs import LinkSpec, StorageSpec


@pytest.fixture(scope="module")
def profile():
    return build(("memory", "host"))


def test_sound_profiles_are_sound(profile):
    assert oddities(build()) == [] and oddities(datasheet()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"median_s": 0.0}, "median_s is 0, which is no positive time"),
        ({"p90_s": math.inf}, "p90_s is inf"),
        ({"min_s": math.nan}, "min_s is nan"),
        ({"wall_s": -1.0}, "wall_s is -1"),
        ({"min_s": 1.0, "median_s": 2.0, "p90_s": 1.5}, "min_s <= median_s <= p90_s does not hold"),
        ({"min_s": 3.0, "median_s": 2.0, "p90_s": 4.0}, "min_s <= median_s <= p90_s does not hold"),
        ({"p90_s": None}, "has min_s, median_s only, not p90_s"),
        ({"min_s": None, "median_s": None, "p90_s": None}, "has neither times nor a problem"),
        ({"runs": 0}, "has times of 0 runs"),
        ({"flops": -1.0}, "flops is -1"),
        ({"error": math.nan}, "error is nan"),
        ({"waited": 1.5}, "waited is 1.5, which is no share"),
        ({"peak_share": 0.0}, "peak_share is 0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_a_row_that_cannot_be_is_named(profile, change, said):
    rows = (profile.rows[0], replace(profile.rows[1], **change), *profile.rows[2:])
    (line,) = oddities(replace(profile, rows=rows))
    assert line.startswith(f"row 1 ({rows[1].key}): ") and said in line


def test_a_route_that_does_not_run_is_sound_with_its_reason(profile):
    row = replace(profile.rows[0], min_s=None, median_s=None, p90_s=None, wall_s=None, runs=0, problem="no AVX")
    assert oddities(replace(profile, rows=(row,))) == []


def test_specs_and_the_whole_are_looked_at_too(profile):
    device = replace(profile.devices[0], flops_per_s={"fp32": 0.0}, memory_bytes=-5)
    odd = replace(
        profile, rows=(*profile.rows, profile.rows[0]), devices=(device,), date="yesterday", fingerprint="",
        links=(LinkSpec("gloo", "node", 0.0, 1e-4),), storage=(StorageSpec("disk", 1.0, 1.0, 0.0, 1e-4),),
        quality={"noisy": math.nan}, curves=(Curve("Gemm", "fp32", {"half": math.inf}, "A100", "nowhere"),),
    )  # fmt: skip
    said = "\n".join(oddities(odd))
    for words in ("2 rows, there can be one", "fp32 peak is 0", "memory_bytes is -5", "link gloo: bytes_per_s is 0",
                  "storage disk: random_reads_per_s is 0", "quality.noisy is nan", "curve of Gemm",
                  "date is 'yesterday'", "no fingerprint"):  # fmt: skip
        assert words in said, words
