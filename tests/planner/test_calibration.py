"""Calibrations: values by family, corrections near anchors, bands, files."""

import math
from dataclasses import replace

import numpy as np
import pytest

from turbopump.core.errors import CatalogError
from turbopump.planner.calibration import REGIMES, Anchor, Calibration, features, load, save, shipped
from turbopump.planner.cases import Case, Cases, DecoderShape, ParallelDims
from turbopump.planner.machine import from_catalog
from turbopump.planner.parameters import NAMES, PARAMETERS

CASE = Case(DecoderShape(2048, 16, 16, 51200, 8192, gated=False), 1024, 32, 2, ParallelDims(tp=2))
CASES = Cases.of([CASE])
MACHINE = from_catalog("a100", 8, families=("a100", "megatron"))
AT = tuple(map(float, features(CASES, MACHINE)[0]))


def anchored(residual=0.2, families=("a100", "megatron")):
    return replace(Calibration.prior(), anchors=(Anchor(families, AT, residual),))


def test_the_prior_holds_every_parameter_within_its_band():
    prior = Calibration.prior()
    assert tuple(prior.shared) == NAMES and prior.digest == ""
    assert all(low < prior.shared[name] < high for name, (low, high) in prior.bands.items())
    assert all(parameter.value <= parameter.cap for parameter in PARAMETERS.values())


def test_families_multiply_and_caps_hold():
    calibration = replace(
        Calibration.prior(),
        families={"a100": {"matmul_efficiency": 9.0, "launch_s": 2.0}, "megatron": {"launch_s": 3.0}},
    )
    values = calibration.values(("a100", "megatron"))
    assert values["launch_s"] == pytest.approx(6 * PARAMETERS["launch_s"].value)
    assert values["matmul_efficiency"] == PARAMETERS["matmul_efficiency"].cap
    assert calibration.values(("never measured",)) == dict(calibration.shared)


def test_an_anchor_corrects_its_neighbours_and_nothing_far_away():
    calibration = anchored()
    near, wide = CASE, replace(CASE, shape=replace(CASE.shape, hidden=16384))
    found = calibration.correction(Cases.of([near, wide]), MACHINE)
    assert found[0] == pytest.approx(0.2, rel=0.1)
    assert abs(found[1]) < 0.01
    assert calibration.nearness(Cases.of([near, wide]), MACHINE) == pytest.approx([0.92, 0.0], abs=0.01)


def test_an_anchor_of_other_hardware_or_software_says_nothing():
    for families in (("h100", "megatron"), ("a100", "other")):
        assert anchored(families=families).correction(CASES, MACHINE)[0] == 0
    assert anchored().correction(CASES, from_catalog("a100", 8))[0] == 0


def test_bands_are_those_of_the_regime_and_the_widest_where_it_is_unknown():
    calibration = replace(anchored(), half_widths={REGIMES[0]: 0.1, REGIMES[3]: 0.02, REGIMES[2]: 0.3})
    far = replace(CASE, shape=replace(CASE.shape, hidden=16384))
    between = replace(far, dims=ParallelDims(dp_replicate=16))
    found = calibration.half_width(Cases.of([CASE, far, between]), MACHINE)
    assert found.tolist() == [0.02, 0.1, 0.3]
    assert calibration.sigma(CASES, MACHINE)[0] == pytest.approx(0.02 / 1.2816)
    assert Calibration.prior().half_width(CASES, MACHINE)[0] == pytest.approx(math.log(1.3))


def test_a_file_gives_back_what_was_saved(tmp_path):
    before = replace(
        anchored(), families={"a100": {"launch_s": 1.25}}, half_widths={REGIMES[0]: 0.05}, fitted_on={"runs": "abc"}
    )
    save(before, tmp_path / "own.toml")
    after = load(tmp_path / "own.toml")
    assert after.digest == "runs:abc" and after.families == before.families
    assert after.half_widths == before.half_widths
    assert after.anchors[0].families == ("a100", "megatron") and after.anchors[0].at == pytest.approx(AT, rel=1e-3)
    for name in NAMES:
        assert after.shared[name] == pytest.approx(before.shared[name], rel=1e-5)
        assert after.bands[name] == pytest.approx(before.bands[name], rel=1e-5)


def test_what_ships_is_complete_and_says_what_it_was_fitted_on():
    calibration = shipped()
    assert "gpt_3d_parallel_runs" in calibration.fitted_on and set(calibration.half_widths) == set(REGIMES)
    assert all(0 < width < 1 for width in calibration.half_widths.values())
    assert np.isfinite([anchor.residual for anchor in calibration.anchors]).all()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("schema = 99", "schema 99 given, 1 is needed"),
        ("schema = ", "cannot read"),
        ("schema = 1", "not a calibration"),
    ],
)
def test_a_file_that_is_none_says_why(tmp_path, text, said):
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    with pytest.raises(CatalogError, match=said):
        load(path)


def test_a_file_with_a_parameter_missing_unknown_or_negative_is_refused(tmp_path):
    path = tmp_path / "own.toml"
    save(Calibration.prior(), path)
    good = path.read_text()
    for old, new, said in (
        ("[shared.straggler]", "[shared.strangler]", "straggler"),
        ("value = 0.88\n", "value = -0.88\n", "above 0"),
    ):
        assert old in good
        path.write_text(good.replace(old, new))
        with pytest.raises(CatalogError, match=said):
            load(path)
    with pytest.raises(CatalogError, match="cannot read"):
        load(tmp_path / "absent.toml")
