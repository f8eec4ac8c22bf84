"""Runs refine the structure: within bounds, towards what made them, and with the digest of what was read."""

import math
from dataclasses import replace

import pytest

from tests import synthetic_profile
from tests.synthetic_run import Shape, write_run
from turbopump.core.errors import ProfileError, TurbopumpError, UsageError
from turbopump.hardware.profile import load, save
from turbopump.models.transformer.config import KIND, TransformerConfig
from turbopump.planner import run_calibration
from turbopump.planner.own_step import BOUNDS, PRIOR_BANDS, Run, StepModel, Structure, structure_of
from turbopump.planner.run_calibration import Observed, calibrate, describe, errors, fit, read_run


@pytest.fixture(scope="module")
def profile():
    return synthetic_profile.build()


def observed(profile, structure: Structure, *, times: float = 1.0) -> list[Observed]:
    """Runs as `structure` makes them, `times` as slow."""
    threads = next(row.threads for row in profile.rows if row.domain == "compute")
    model = StepModel(profile, threads=threads, structure=structure)
    found = []
    for hidden, batch in ((64, 4), (128, 8), (256, 2), (64, 32)):
        config = TransformerConfig(vocab_size=512, num_layers=2, hidden_size=hidden, num_heads=2)
        run = Run(KIND.workload(config, batch, {"seq_len": 64}, "fp32"), data_s=2e-3)
        found.append(Observed(f"{hidden}x{batch}", run, model.predict(run).step * times, threads, 50, "0" * 16))
    return found


@pytest.mark.slow
def test_it_finds_what_made_the_runs(profile):
    made = Structure(compute=1.08, optimizer=1.4, data=0.7, tensor=2.5)
    runs = observed(profile, made)
    found = fit(runs, profile)
    assert found.compute == pytest.approx(1.08, rel=0.05) and found.data == pytest.approx(0.7, rel=0.1)
    before, after = (max(map(abs, errors(runs, profile, s))) for s in (Structure(), found))
    assert after < 0.03 < before


@pytest.mark.slow
def test_numbers_stay_within_bounds_and_bands_within_the_priors(profile):
    found = fit(observed(profile, Structure(), times=50.0), profile)
    for name, (low, high) in BOUNDS.items():
        assert low * 0.999 <= getattr(found, name) <= high * 1.001
        assert 0 < found.band(name) <= PRIOR_BANDS[name] + 1e-9


@pytest.mark.slow
def test_what_no_run_tells_of_keeps_its_number_and_band(profile):
    found = fit(observed(profile, Structure(compute=1.05)), profile)  # of one process each
    assert found.communication == pytest.approx(1.0) and found.straggling == pytest.approx(Structure().straggling)
    assert found.band("communication") == pytest.approx(PRIOR_BANDS["communication"], rel=1e-3)
    assert found.band("data") < PRIOR_BANDS["data"]


def test_one_disturbed_run_does_not_decide(profile):
    runs = observed(profile, Structure())
    runs[0] = replace(runs[0], step=runs[0].step * 4.0)
    assert abs(math.log(fit(runs, profile).compute)) < math.log(1.15)


@pytest.mark.slow
def test_calibrating_stores_values_bands_and_digest(profile, tmp_path, monkeypatch):
    runs = {one.name: one for one in observed(profile, Structure(compute=1.2))}
    monkeypatch.setattr(run_calibration, "read_run", lambda path, profile: runs[str(path)])
    done = calibrate(profile, list(runs))
    save(done, tmp_path / "machine.json")
    again = load(tmp_path / "machine.json")
    assert again.calibration == done.calibration and done.calibration.num_steps == 200
    assert done.calibration.error < done.calibration.error_before and len(done.calibration.digest) == 16
    assert structure_of(again).compute > 1.05
    assert "4 runs, 200 steps" in describe(done.calibration)
    with pytest.raises(ProfileError, match="datasheet"):
        calibrate(synthetic_profile.datasheet(), list(runs))
    with pytest.raises(UsageError, match="at least one run"):
        fit([], profile)


def test_a_run_that_tells_nothing_is_refused(tmp_path, profile):
    with pytest.raises(UsageError, match="not a run directory"):
        read_run(tmp_path / "none")
    run = write_run(tmp_path / "short", Shape(num_steps=5))
    with pytest.raises(UsageError, match="needs 5"):
        read_run(run.path)


def test_a_run_of_another_machine_is_refused(tmp_path, profile):
    run = write_run(tmp_path / "other", Shape(num_steps=60))
    with pytest.raises(TurbopumpError):
        read_run(run.path, replace(profile, machine={"cpu": "another processor"}))
