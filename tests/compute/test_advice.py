"""Changes a user can make, from rows made by hand: weighed over the whole step, told apart by what they do."""

from dataclasses import replace

import pytest

from turbopump.compute.advice import advise, change_of, format_advice
from turbopump.compute.ops import Attention, Conv2d, Gemm, Norm, OptimizerStep
from turbopump.core.workload import Block, Workload
from turbopump.hardware.profile import SCHEMA, MachineProfile, Measurement, Trial
from turbopump.hardware.timing import Timing

ONEDNN = "mkldnn.matmul.fp32_precision=bf16"
BIG, SMALL = Gemm(1024, 1024, 1024, "fp32"), Gemm(8, 8, 8, "fp32")
NORM, CONV = Norm("rms", 1024, 1024, "fp32"), Conv2d(4, 8, 32, 32, 8, 3, 3, 1, 1, 1, 1, "fp32")
STEP = OptimizerStep("adamw", 1000)


def row(op, route="default", seconds=1e-3, *, error=3e-7, threads=1):
    timing = Timing("thread_cpu", 30, 1, seconds * 0.99, seconds, seconds * 1.01, seconds, 0.0)
    return Measurement.of(Trial(op, route, threads), "compute", timing, error=error)


def profile(*rows):
    return MachineProfile(SCHEMA, "test", "2026-01-01", "synthetic", "measured", "0", {}, {}, (), rows=rows)


def workload(*ops, count=1):
    block = Block("block", tuple(ops), (), 0, {"none": 0}, count)
    return Workload("model", (block,), 1, 1, "token", "fp32", optimizer_ops=(STEP,))


def test_a_switch_is_weighed_over_the_whole_step():
    """It doubles the large product and hurts the small one: which is more depends on how many there are."""
    rows = (row(BIG, seconds=10e-3), row(BIG, ONEDNN, 5e-3), row(SMALL), row(SMALL, ONEDNN, 2e-3), row(STEP))
    advice = advise(profile(*rows), workload(BIG, SMALL), threads=1)
    (change,) = advice.changes
    assert (change.route, change.helped, change.hurt, change.pays, change.exact) == (ONEDNN, 1, 1, True, True)
    assert change.saved_s == pytest.approx(4e-3) and advice.step_s == pytest.approx(12e-3)
    assert change.share == pytest.approx(1 / 3) and change.band_s[0] < change.saved_s < change.band_s[1]
    assert advice.gain == pytest.approx(12 / 8)

    many = advise(profile(*rows), workload(BIG, *(SMALL,) * 6), threads=1)
    assert not many.changes[0].pays and many.together == () and many.gain == 1.0
    text = format_advice(many)
    assert "nothing to gain" in text and "no gain over the step: products by oneDNN (-5.9%)" in text


def test_a_local_change_is_made_only_where_it_helps():
    rows = (row(CONV), row(CONV, "fft", 3e-3), row(CONV, "im2col", 0.4e-3), row(STEP))
    advice = advise(profile(*rows), workload(CONV, count=3), threads=1)
    assert [c.route for c in advice.changes] == ["im2col"]
    assert advice.changes[0].saved_s == pytest.approx(3 * 0.6e-3)
    choice, count = advice.choices[0]
    assert (choice.route, count) == ("im2col", 3)


def test_other_results_stand_apart():
    """A dtype, and a switch whose error shows that it is one (oneDNN's on a CPU with AMX)."""
    bf16 = replace(BIG, dtype="bf16")
    rows = (row(BIG), row(BIG, ONEDNN, 0.3e-3, error=2e-3), row(bf16, seconds=0.2e-3, error=3e-3), row(STEP))
    advice = advise(profile(*rows), workload(BIG), threads=1)
    assert [(c.route, c.exact, c.pays) for c in advice.changes] == [("bf16", False, True), (ONEDNN, False, True)]
    assert advice.together == () and advice.gain == 1.0
    text = format_advice(advice)
    assert text.index("same results: nothing to gain") < text.index("other precision: results change")
    assert 'precision.compute = "bf16"' in text


def test_changes_of_the_same_operation_are_not_added():
    rows = (row(CONV), row(CONV, "im2col", 0.4e-3), row(CONV, "fft", 0.5e-3), row(NORM), row(NORM, "inductor", 0.5e-3))
    advice = advise(profile(*rows, row(STEP)), workload(CONV, NORM), threads=1)
    assert [c.route for c in advice.together] == ["im2col", "inductor"]
    assert advice.together_s == pytest.approx(1.1e-3) and advice.step_s == pytest.approx(3e-3)


def test_threads_are_compared_by_the_wall_clock():
    rows = (row(BIG), row(BIG, threads=2, seconds=0.55e-3), row(STEP), row(STEP, threads=2))
    advice = advise(profile(*rows), workload(BIG), threads=1)
    (change,) = advice.changes
    assert (change.route, change.change.how) == ("threads=2", "OMP_NUM_THREADS=2")
    assert change.saved_s == pytest.approx(0.45e-3) and advice.together == ()


def test_what_is_not_known_is_said():
    near = replace(BIG, m=2048)
    advice = advise(profile(row(near), row(near, ONEDNN, 0.5e-3)), workload(BIG, NORM), threads=1)
    assert advice.missing == (NORM.key, STEP.key) and advice.near == 1
    text = format_advice(advice, "recipes/lm.toml")
    assert "3 different operations: 0 measured, 1 from the nearest measured shapes, 2 unknown" in text.replace(
        "\n    ", " "
    )
    assert "probe --for recipes/lm.toml" in text and "0 measured, 1 from the nearest shapes" in text
    nothing = advise(profile(), workload(BIG), threads=1)
    assert nothing.step_s == 0 and nothing.gain == 1.0
    assert format_advice(nothing, "r.toml").startswith("nothing is known of model on synthetic: probe --for r.toml")


def test_the_table_fits_and_is_in_order():
    rows = [row(BIG, seconds=10e-3), row(BIG, ONEDNN, 6e-3), row(NORM), row(NORM, "inductor", 0.2e-3), row(STEP)]
    rows += [row(BIG, f"route {n} of a rather long name, longer than any column", 9e-3) for n in range(12)]
    advice = advise(profile(*rows), workload(BIG, NORM), threads=1)
    for columns, most in ((40, 72), (80, 80), (300, 100)):
        assert max(map(len, format_advice(advice, columns=columns).splitlines())) <= most
    text = format_advice(advice)
    assert text.index("products by oneDNN") < text.index("route 0") and "1 operation faster; measured" in text
    assert "torch.backends.mkldnn.matmul.fp32_precision" in text


def test_a_models_own_kernels_are_left_out():
    attention = Attention(1, 2, 2, 64, 64, 32, True, "fp32")
    rows = (row(BIG), row(BIG, ONEDNN, 0.6e-3), row(attention), row(attention, ONEDNN, 3e-3), row(STEP))
    advice = advise(profile(*rows), workload(BIG, attention), threads=1)
    assert advice.changes[0].pays and advice.untouched == ("Attention",) and advice.step_s == pytest.approx(3e-3)
    assert "left as it is, by the model's own kernel: Attention" in format_advice(advice)
    assert not advise(profile(*rows), workload(BIG, attention), threads=1, own_kernels=()).changes[0].pays


def test_every_route_has_a_change():
    assert change_of(ONEDNN).scope == "global" and change_of("winograd F(2x2,3x3)").scope == "local"
    assert "SDPBackend.MATH" in change_of("sdpa=math").how


def test_noisy_rows_behind_a_gain_are_told():
    good, noisy = row(BIG, ONEDNN, 0.3e-3), replace(row(BIG, ONEDNN, 0.3e-3), p90_s=0.42e-3)
    assert noisy.noisy and not good.noisy
    for best, share in ((good, 0.0), (noisy, 0.5)):
        advice = advise(profile(row(BIG), best, row(STEP)), workload(BIG), threads=1)
        assert advice.noisy_share == share and advice.changes[0].pays
        assert ("50% of the rows behind these gains are noisy" in format_advice(advice)) == bool(share)
