"""Fitting: known parameters are found again, bad rows do not pull, unseen groups are judged."""

import math
from dataclasses import replace

import numpy as np
import pytest

from turbopump.core.errors import UsageError
from turbopump.planner import fit as fitting
from turbopump.planner.calibration import REGIMES, Calibration
from turbopump.planner.cases import Case, DecoderShape, ParallelDims
from turbopump.planner.machine import from_catalog
from turbopump.planner.tables import Measured

MACHINE = from_catalog("a100", 8, families=("a100", "ours"))


def rows_of(truth, hiddens=(1024, 2048, 4096), noise=0.0):
    random = np.random.default_rng(0)
    rows = []
    for hidden in hiddens:
        for tp in (1, 2, 4):
            for microbatch in (1, 4):
                shape = DecoderShape(hidden, 16, 16, 51200, 4 * hidden, gated=False)
                case = Case(shape, 1024, 64, microbatch, ParallelDims(dp_replicate=8 // tp, tp=tp))
                rows.append(Measured("runs", f"h{hidden}", f"h{hidden}", MACHINE, case, 1.0, "here"))
    step_s = fitting.predict(rows, truth) * np.exp(noise * random.standard_normal(len(rows)))
    return [replace(row, step_s=float(s)) for row, s in zip(rows, step_s, strict=True)]


def slower_launches(factor=1.8):
    prior = Calibration.prior()
    return replace(prior, shared={**prior.shared, "launch_s": factor * prior.shared["launch_s"]})


def test_a_parameter_that_the_rows_show_is_found():
    found = fitting.fit(rows_of(slower_launches()))
    launch = found.values(MACHINE.families)["launch_s"] * found.shared["backward_launches"]
    prior = Calibration.prior().shared
    assert launch / (prior["launch_s"] * prior["backward_launches"]) == pytest.approx(1.8, rel=0.2)
    low, high = found.bands["launch_s"]
    assert low < found.shared["launch_s"] < high
    assert high / low < Calibration.prior().bands["launch_s"][1] / Calibration.prior().bands["launch_s"][0]


def test_what_rows_say_nothing_about_stays_at_the_prior():
    found = fitting.fit(rows_of(slower_launches()))
    for name in ("network_efficiency", "fused_attention_efficiency", "shard_overlap"):
        expected = Calibration.prior().values(MACHINE.families)[name]
        assert found.values(MACHINE.families)[name] == pytest.approx(expected, rel=0.1)


def test_an_unseen_group_is_predicted_better_than_by_the_prior():
    rows = rows_of(slower_launches(), noise=0.02)
    measured = np.array([row.step_s for row in rows])
    left_out = fitting.cross_validated(rows)
    before = np.abs(fitting.predict(rows, Calibration.prior()) / measured - 1).mean()
    after = np.abs(left_out.step_s / measured - 1).mean()
    assert after < 0.5 * before and after < 0.06


def test_one_bad_row_does_not_pull_the_others():
    rows = rows_of(Calibration.prior())
    rows[3] = replace(rows[3], step_s=4 * rows[3].step_s)
    structure = replace(fitting.fit(rows), anchors=())
    others = np.delete(np.arange(len(rows)), 3)
    off = fitting.predict(rows, structure)[others] / [rows[i].step_s for i in others] - 1
    assert np.abs(off).mean() < 0.05


def test_a_few_rows_refine_a_calibration_and_keep_what_it_knew():
    start = replace(Calibration.prior(), half_widths={REGIMES[0]: 0.07}, fitted_on={"published": "1234"})
    rows = rows_of(slower_launches())[:4]
    found = fitting.fit(rows, start)
    assert found.half_widths == start.half_widths and set(found.fitted_on) == {"published", "runs"}
    measured = np.array([row.step_s for row in rows])
    assert np.abs(fitting.predict(rows, found) / measured - 1).max() < 0.05


def test_the_result_does_not_depend_on_the_order_of_rows():
    rows = rows_of(slower_launches(), noise=0.02)
    one, two = fitting.fit(rows), fitting.fit(rows[::-1])
    assert one.fitted_on == two.fitted_on
    for name, value in one.shared.items():
        assert two.shared[name] == pytest.approx(value, rel=1e-4)


def test_half_widths_cover_four_fifths_and_fall_back_to_the_widest():
    rows = rows_of(Calibration.prior())
    errors = np.linspace(0.01, 0.18, len(rows))
    step_s = np.array([row.step_s for row in rows]) * np.exp(errors)
    left_out = fitting.LeftOut(step_s, np.zeros(len(rows), dtype=np.int64))
    widths = fitting.half_widths(rows, left_out)
    assert 0.8 <= np.mean(errors <= widths[REGIMES[0]]) <= 0.9
    assert set(widths.values()) == {widths[REGIMES[0]]}
    assert fitting.half_widths(rows, left_out, without="h4096")[REGIMES[0]] < widths[REGIMES[0]]
    few = fitting.LeftOut(step_s[:3], left_out.regime[:3])
    assert fitting.half_widths(rows[:3], few)[REGIMES[0]] == pytest.approx(math.log(1.3))


def test_regret_is_of_the_measured_time_of_what_would_be_chosen():
    rows = [replace(row, choice=choice) for row, choice in zip(rows_of(Calibration.prior())[:3], "aab", strict=True)]
    rows = [replace(row, step_s=s) for row, s in zip(rows, (2.0, 1.0, 5.0), strict=True)]
    assert fitting.regret(rows, np.array([1.0, 3.0, 1.0])) == {"a": 1.0}
    assert fitting.regret(rows, np.array([3.0, 1.0, 1.0])) == {"a": 0.0}


def test_too_few_rows_are_said():
    with pytest.raises(UsageError, match="at least one measured step"):
        fitting.fit([])
    with pytest.raises(UsageError, match="at least two"):
        fitting.cross_validated(rows_of(Calibration.prior(), hiddens=(1024,)))
