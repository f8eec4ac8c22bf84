from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import halves, published
from benchmarks.halves import op_of, profile_of
from turbopump.compute import efficiency
from turbopump.compute.cost import ComputeCost
from turbopump.compute.features import Case, Columns, Place
from turbopump.compute.ops import Attention, Conv2d, Elementwise, Gemm, Launch, Norm, OptimizerStep, Rnn
from turbopump.compute.regression import Regression
from turbopump.core.errors import DatasetError, ProfileError
from turbopump.hardware import accelerators
from turbopump.hardware.datasheet import profile_from_datasheet
from turbopump.hardware.profile import Curve, Measurement, Trial
from turbopump.hardware.specs import DeviceSpec

PEAK, BANDWIDTH, LAUNCH_S = 1e11, 2e10, 2e-6


def row(op, seconds, route="default", threads=1):
    made = Measurement.failed(Trial(op, route, threads), "compute", "")
    return replace(made, clock="thread_cpu", runs=9, calls=1, min_s=0.98 * seconds, median_s=seconds,
                   p90_s=1.05 * seconds)  # fmt: skip


def smooth_s(op):
    """A machine without cliffs."""
    lost = (1 + 20 / op.m) * (1 + 8 / op.n) * (1 + 30 / op.k)
    return LAUNCH_S + op.cost.flops / (0.8 * PEAK) * lost * {"nt": 1.0, "nn": 1.1, "tn": 1.3}[op.layout]


def cliff_s(op):
    """One with tiles of 64 in n, and another kernel for small m."""
    tiles = np.ceil(op.n / 64) * 64 / op.n
    return smooth_s(op) * tiles * (1.8 if op.m < 48 else 1.0)


def shapes(count, seed=0):
    generator = np.random.default_rng(seed)
    for _ in range(count):
        m, n, k = (int(2 ** generator.uniform(4, 11)) for _ in range(3))
        yield Gemm(m, n, k, "fp32", str(generator.choice(["nt", "nn", "tn"])))


def machine(seconds, count=120, noise=0.02):
    generator = np.random.default_rng(7)
    return profile_of("test", [row(op, seconds(op) * np.exp(noise * generator.normal())) for op in shapes(count)])


@pytest.fixture(scope="module")
def cliffs():
    return ComputeCost(machine(cliff_s))


def errors_of(cost, seconds, count=200):
    ops = list(shapes(count, seed=99))
    return np.array([p.seconds / seconds(op) - 1 for op, p in zip(ops, cost.predict_many(ops))])


def test_a_smooth_machine_is_recovered():
    assert np.median(np.abs(errors_of(ComputeCost(machine(smooth_s)), smooth_s))) < 0.03


def test_cliffs_are_found_and_the_band_holds_four_of_five(cliffs):
    ops = list(shapes(200, seed=99))
    predictions = cliffs.predict_many(ops)
    assert {p.basis for p in predictions} == {"interpolated"}
    assert np.median(np.abs(errors_of(cliffs, cliff_s))) < 0.06
    held = np.mean([p.low_s <= cliff_s(op) <= p.high_s for op, p in zip(ops, predictions)])
    assert 0.68 <= held <= 0.95
    assert np.median([p.high_s / p.low_s for p in predictions]) < 1.6, "a band that is wide everywhere says nothing"


def test_what_was_measured_is_given_as_measured(cliffs):
    profile = machine(cliff_s)
    known = profile.rows[3]
    found = cliffs.predict(op_of(known))
    assert (found.seconds, found.low_s, found.high_s) == (known.median_s, known.min_s, known.p90_s)
    assert found.basis == "measured" and found.route == "default"


def test_nothing_is_faster_than_the_best_rates(cliffs):
    """Not even far outside of what was measured, nor for kinds that never were."""
    ops = [Gemm(1, 1, 1, "fp32"), Gemm(10**6, 10**5, 10**4, "fp32"), Gemm(1, 10**6, 1, "fp32"),
           Norm("rms", 10**6, 4096, "fp32"), Conv2d(64, 3, 224, 224, 64, 7, 7, 2, 2, 3, 3, "fp32")]  # fmt: skip
    for op, found in zip(ops, cliffs.predict_many(ops)):
        assert 0 < cliffs.least_s(op) <= found.low_s <= found.seconds <= found.high_s < np.inf


def test_more_work_takes_longer(cliffs):
    for grow in ("m", "n", "k"):
        sizes = [{"m": 256, "n": 256, "k": 256, grow: size} for size in (64, 256, 1024, 4096, 16384)]
        seconds = [p.seconds for p in cliffs.predict_many([Gemm(**size, dtype="fp32") for size in sizes])]
        assert seconds == sorted(seconds), grow


def test_a_kind_never_measured_is_a_roofline_in_a_wide_band(cliffs):
    for op in (Attention(2, 4, 4, 128, 128, 64, True, "fp32"), OptimizerStep("adamw", 10**6), Launch("add"),
               Elementwise("gelu", 10**6, 1, 1, "fp32")):  # fmt: skip
        found = cliffs.predict(op)
        assert found.basis == "roofline" and found.high_s / found.low_s > 2


def test_a_layout_never_measured_is_not_called_interpolated(cliffs):
    assert cliffs.predict(Gemm(100, 100, 100, "fp32", "tt")).basis == "roofline"


def test_a_few_rows_scale_but_do_not_interpolate():
    op = Gemm(128, 128, 128, "fp32")
    cost = ComputeCost(profile_of("few", [row(op, 1e-4), row(Gemm(256, 256, 256, "fp32"), 7e-4)]))
    found = cost.predict(Gemm(512, 512, 512, "fp32"))
    assert found.basis == "roofline" and found.low_s < 5.6e-3 < found.high_s


def test_routes_are_told_apart():
    ops = list(shapes(40))
    rows = [row(op, smooth_s(op)) for op in ops] + [row(op, 0.5 * smooth_s(op), "onednn") for op in ops]
    cost = ComputeCost(profile_of("two routes", rows))
    new = Gemm(333, 444, 555, "fp32")
    default, best = cost.predict(new), cost.predict(new, "best")
    assert (default.route, best.route) == ("default", "onednn")
    assert best.seconds == pytest.approx(0.5 * default.seconds, rel=0.1)
    assert [p.route for p in cost.by_route(new)] == ["onednn", "default"]
    assert cost.predict(ops[0], "onednn").basis == "measured"
    with pytest.raises(ProfileError, match="not measured by route 'mkl', only by default, onednn"):
        cost.predict(new, "mkl")


def test_a_profile_that_says_nothing_is_refused():
    with pytest.raises(ProfileError, match="neither rows of dense operations nor a device with peaks"):
        ComputeCost(profile_of("empty", []))
    failed = Measurement.failed(Trial(Gemm(1, 1, 1, "fp8")), "compute", "does not run")
    with pytest.raises(ProfileError, match="neither rows"):
        ComputeCost(profile_of("nothing works", [failed]))


def test_other_threads_and_devices_are_refused_with_what_there_is():
    profile = profile_of("one", [row(op, smooth_s(op)) for op in shapes(10)])
    with pytest.raises(ProfileError, match="not measured with 4 threads on cpu, only with 1 threads on cpu"):
        ComputeCost(profile, threads=4)
    with pytest.raises(ProfileError, match="1 threads on cuda"):
        ComputeCost(profile, device="cuda")


def test_a_dtype_of_which_nothing_is_known_is_refused(cliffs):
    with pytest.raises(ProfileError, match="nothing is known of fp8 on this device"):
        cliffs.predict(Gemm(64, 64, 64, "fp8"))


CHIP = DeviceSpec("chip", {"fp32": 1e13, "bf16": 4e13}, memory_bytes_per_s=1e12)


def test_a_datasheet_is_predicted_by_a_relatives_curve():
    parameters = {"efficiency": 0.5, "launch_s": 1e-5, "half_m": 64.0, "borrowed_error": 0.3}
    curve = Curve("Gemm", "fp32", parameters, "cousin", "test", 0.2)
    profile = replace(profile_of("sheet", []), devices=(CHIP,), curves=(curve,), provenance="datasheet")
    cost = ComputeCost(profile, device="chip")
    op = Gemm(64, 4096, 4096, "fp32")
    found = cost.predict(op)
    assert found.basis == "curve"
    assert found.seconds == pytest.approx(1e-5 + op.cost.flops / 1e13 / 0.5 * 2 + op.cost.bytes / 1e12)
    assert found.high_s / found.seconds == pytest.approx(1.3**1.9)
    at_home = ComputeCost(replace(profile, curves=(replace(curve, relative="chip"),)), device="chip").predict(op)
    assert at_home.high_s / at_home.seconds == pytest.approx(1.2**1.9)
    other = cost.predict(replace(op, dtype="bf16"))
    assert other.basis == "curve" and other.seconds < found.seconds
    assert other.high_s / other.low_s > found.high_s / found.low_s, "another dtype is less certain"
    assert cost.predict(Norm("rms", 1000, 1000, "fp32")).basis == "roofline"


def test_every_device_of_the_catalog_can_be_predicted():
    """Each kind of a transformer's step, by the committed curves; larger products take longer."""
    spec = accelerators.device("h100-sxm")
    cost = ComputeCost(profile_from_datasheet(spec), device=spec.name)
    ops = [Gemm(2**i, 4096, 4096, "bf16") for i in range(6, 14)]
    ops += [Attention(1, 32, 8, 4096, 4096, 128, True, "bf16"), Norm("rms", 4096, 4096, "bf16")]
    found = cost.predict_many(ops)
    assert {p.basis for p in found} == {"curve"}
    seconds = [p.seconds for p in found[:8]]
    assert seconds == sorted(seconds)
    share = ops[7].cost.flops / seconds[-1] / spec.flops_per_s["bf16"]
    assert 0.4 < share < 1.0, "H100s reach 0.80 of it on the largest products (stas00/ml-engineering)"


def test_a_datasheet_without_curves_is_a_roofline():
    cost = ComputeCost(replace(profile_of("sheet", []), devices=(CHIP,)))
    op = Gemm(4096, 4096, 4096, "bf16")
    found = cost.predict(op)
    assert found.basis == "roofline" and found.low_s < op.cost.flops / 4e13 < found.high_s
    with pytest.raises(ProfileError, match="nothing is known of fp8"):
        cost.predict(Gemm(64, 64, 64, "fp8"))


def test_operations_without_flops_dtype_or_size():
    """Memory, launch and recurrent rows live beside products; each finds its own."""
    rows = [row(OptimizerStep("sgd", 2**i), 1e-6 + 2**i * 12 / BANDWIDTH) for i in range(8, 24)]
    rows += [row(Launch(name), 3e-6) for name in ("add", "linear")]
    rows += [row(Rnn("gru", b, s, 64, h, False, "fp32"), 1e-5 + s * (1e-5 + 6.0 * b * h * (h + 64) / PEAK))
             for b in (4, 16, 64) for s in (1, 10, 100) for h in (64, 256, 1024)]  # fmt: skip
    cost = ComputeCost(profile_of("mixed", rows))
    found = cost.predict(OptimizerStep("sgd", 100_000))
    assert found.basis == "interpolated" and found.seconds == pytest.approx(1e-6 + 1.2e6 / BANDWIDTH, rel=0.05)
    assert cost.predict(Launch("linear")).seconds == 3e-6
    op = Rnn("gru", 8, 30, 64, 512, False, "fp32")
    assert cost.predict(op).seconds == pytest.approx(1e-5 + 30 * (1e-5 + 6.0 * 8 * 512 * 576 / PEAK), rel=0.15)


def test_many_are_predicted_as_one_by_one(cliffs):
    ops = list(shapes(30, seed=5))
    again = ComputeCost(machine(cliff_s))
    for op, together in zip(ops, cliffs.predict_many(ops)):
        assert again.predict(op).seconds == pytest.approx(together.seconds, rel=1e-9)


def test_the_formula_recovers_its_own_numbers():
    truth = {"efficiency": 0.6, "half_m": 40.0, "half_n": 10.0, "half_k": 25.0, "launch_s": 4e-6, "memory_share": 0.8,
             "times layout=nn": 1.0, "times layout=nt": 1.0, "times layout=tn": 1.5}  # fmt: skip
    cases = [Case.of(op) for op in shapes(300)]
    seconds = efficiency.seconds(truth, cases, PEAK, BANDWIDTH)
    fitted = efficiency.fit(cases, seconds, PEAK, BANDWIDTH)
    again = efficiency.seconds(fitted, cases, PEAK, BANDWIDTH)
    assert np.abs(again / seconds - 1).max() < 0.05
    assert fitted["times layout=tn"] / fitted["times layout=nt"] == pytest.approx(1.5, rel=0.03)


def test_columns_know_padding_of_zero_tiles_and_words():
    ops = [Conv2d(2, 8, 32, 32, 64, 3, 3, 1, 1, pad, pad, "fp32", direction=d)
           for pad in (0, 1) for d in ("forward", "weight_gradient")]  # fmt: skip
    columns = Columns([Case.of(op) for op in ops])
    matrix = columns([Case.of(op) for op in ops])
    assert np.isfinite(matrix).all() and np.linalg.matrix_rank(matrix - matrix.mean(axis=0)) == 2
    assert not columns.knows(Case.of(replace(ops[0], direction="input_gradient")))


def test_regression_goes_through_exact_points_and_knows_where_it_does_not_know():
    x = np.linspace(-1, 1, 15)[:, None]
    regression = Regression(x, np.sin(3 * x[:, 0]))
    mean, half_width = regression(np.array([[0.05], [9.0]]))
    assert mean[0] == pytest.approx(np.sin(0.15), abs=0.02)
    assert half_width[1] > 10 * half_width[0]


def test_a_disturbed_row_does_not_bend_its_neighbourhood():
    """One of 60 points on a line was measured while another program ran: 1.6 times as long."""
    x = np.linspace(-2, 2, 60)[:, None]
    y = x[:, 0].copy()
    y[30] += np.log(1.6)
    mean, _ = Regression(x, y)(x[28:33])
    assert np.abs(mean - x[28:33, 0]).max() < 0.02


def test_many_points_are_predicted_in_parts_as_together():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(1100, 2))
    regression = Regression(x[:40], x[:40].sum(axis=1) + 0.1 * generator.normal(size=40))
    mean, half_width = regression(x)
    alone = [regression(point[None, :]) for point in x[[0, 511, 512, 1099]]]
    assert [float(m[0]) for m, _ in alone] == pytest.approx(mean[[0, 511, 512, 1099]])
    assert [float(w[0]) for _, w in alone] == pytest.approx(half_width[[0, 511, 512, 1099]])


def test_a_word_may_change_one_summand_alone():
    """A direction that computes as fast as the other but moves three times the bytes."""
    ops = [Conv2d(b, c, 28, 28, 64, k, k, 1, 1, 0, 0, "fp32", direction=d) for b in (1, 4, 16) for c in (1, 8, 64, 256)
           for k in (1, 3) for d in ("forward", "input_gradient")]  # fmt: skip
    cases = [Case.of(op, Place("cpu", 2)) for op in ops]
    moves = [3.0 if op.direction == "input_gradient" else 1.0 for op in ops]
    times_s = np.array(
        [LAUNCH_S + c.computed_flops / (0.8 * PEAK) + m * c.bytes / BANDWIDTH for c, m in zip(cases, moves)]
    )
    fitted = efficiency.fit(cases, times_s, PEAK, BANDWIDTH)
    assert np.median(np.abs(efficiency.seconds(fitted, cases, PEAK, BANDWIDTH) / times_s - 1)) < 0.05
    forward, gradient = (fitted[f"times direction={d} of output"] for d in ("forward", "input_gradient"))
    assert gradient / forward > 1.5 > fitted["times direction=input_gradient"] / fitted["times direction=forward"] > 0.7


def test_operands_of_an_older_curve_share_what_it_says():
    """Curves of the catalog have one memory share, and factors for computing and moving alike."""
    case = Case.of(Conv2d(4, 8, 28, 28, 64, 3, 3, 1, 1, 1, 1, "fp32"))
    parameters = {"efficiency": 0.5, "memory_share": 0.7, "launch_s": 1e-6, "times direction=forward": 1.3}
    expected = 1e-6 + 1.3 * (case.flops / (0.5 * PEAK) + case.bytes / (0.7 * BANDWIDTH))
    assert efficiency.seconds(parameters, [case], PEAK, BANDWIDTH)[0] == pytest.approx(expected)


@pytest.fixture(scope="module")
def tables():
    try:
        return published.deepbench()
    except DatasetError as error:
        pytest.skip(str(error))


def test_half_of_a_published_device_from_its_other_half(tables):
    """The first device of the figure `probe.deepbench_half`, one seed; the benchmark takes all."""
    device = ("NV_TitanXp", "fp32")
    results = halves.halves({device: tables[device]}, seeds=(0,))
    assert halves.median_of(results) <= 0.10
    assert all(np.median(r.roofline_errors) > 3 * r.median for r in results)
    assert 0.65 <= np.concatenate([r.covered for r in results]).mean() <= 0.95


def test_halves_share_no_shape(tables):
    for rows in tables.values():
        known, asked = halves.split(rows, 3, "shape")
        assert len(known) + len(asked) == len(rows) and 0.4 < len(known) / len(rows) < 0.6

        def shape(r):
            return (r.kind, *(v for name, v in r.op.items() if name not in ("layout", "direction")))

        assert not {shape(r) for r in known} & {shape(r) for r in asked}


def test_absent_tables_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "__file__", str(tmp_path / "project" / "benchmarks" / "published.py"))
    with pytest.raises(DatasetError, match="no published tables"):
        published.tables()
    assert not Path(tmp_path / "shared").exists()
