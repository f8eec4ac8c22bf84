import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.compute import sample_ops
from turbopump.compute import bench, conditions, kernels, routes
from turbopump.compute.kernels import Route
from turbopump.compute.ops import Attention, Conv2d, Elementwise, Gather, Gemm, Launch, MemoryCopy, from_fields
from turbopump.core.errors import UsageError
from turbopump.core.files import from_json_as, to_json
from turbopump.hardware.profile import Measurement, Request, Trial

REQUEST = Request(row_s=0.001)
SMALL = Gemm(20, 30, 40, "fp32")


def far():
    return time.monotonic() + 600


def rows_of(trials, request=REQUEST):
    return list(bench.measure(trials, request, far()))


def settings_now():
    onednn = torch.backends.mkldnn
    return torch.get_num_threads(), onednn.matmul.fp32_precision, torch._C._get_mkldnn_enabled()


@pytest.mark.slow
def test_a_row_is_found_by_its_trial_and_gives_back_its_operation():
    trials = [Trial(op, route.name) for op in sample_ops.ALL[::7] for route in routes.built_in(op, "cpu")]
    before = settings_now()
    rows = rows_of(trials)
    assert settings_now() == before
    assert [row.key for row in rows] == [trial.key for trial in trials]
    assert [from_fields(row.kind, row.op) for row in rows] == [trial.op for trial in trials]
    for row in rows:
        assert row.works, row.problem
        assert 0 < row.min_s <= row.median_s <= row.p90_s and row.library.startswith("torch ")
        assert row.clock == "thread_cpu" and row.peak_share is None
        assert from_json_as(to_json(row), Measurement) == row
        if row.domain == "compute":
            assert row.error < 0.05 and row.flushed_s > 0
        else:
            assert row.error is None and row.flushed_s is None


def test_domains():
    ops = (SMALL, MemoryCopy(4096), Gather(4, 10, 64), Launch("add"))
    assert [bench.domain(op) for op in ops] == ["compute", "memory", "memory", "host"]
    for name in ("compute", "memory", "host"):
        assert {bench.domain(t.op) for t in bench.trials(Request(domains=(name,)))} == {name}
    assert bench.trials(Request(domains=("data",))) == []


def test_the_least_fits_into_half_a_minute_and_tells_of_everything():
    trials = bench.trials(Request(row_s=0.05))
    first = [t for t in trials if t.tier == 0]
    assert [t.tier for t in trials] == sorted(t.tier for t in trials)
    assert len({t.key for t in trials}) == len(trials)
    assert len(first) * (0.05 + 0.15) < 25
    kinds = {type(t.op).__name__ for t in first}
    assert kinds >= {"Gemm", "Conv2d", "Rnn", "Attention", "Fft", "Norm", "MemoryTriad", "Launch", "OptimizerStep"}
    quarter = {type(t.op).__name__ for t in first[: len(first) // 2]}
    assert len(quarter) >= 12  # the kinds take turns
    assert {t.op.dtype for t in first if isinstance(t.op, Gemm)} == {"fp32", "bf16", "int8"}
    assert 300 < sum(t.tier == 1 for t in trials) < 1500


def test_operations_of_a_recipe_come_first_with_all_routes():
    conv = Conv2d(1, 2, 6, 6, 3, 3, 3, 1, 1, 1, 1, "fp32")
    trials = bench.trials(Request(ops=(SMALL, conv, SMALL), threads=(1, 2)))
    asked = [t for t in trials if t.op in (SMALL, conv) and t.tier == 0]
    assert trials[: len(asked)] == asked
    assert [t.route for t in asked[:2]] == ["default", "default"]
    assert {t.route for t in asked if t.op == conv} >= {"default", "channels_last", "mkldnn.enabled=false"}
    assert {t.threads for t in trials if t.op == SMALL} == {1, 2}


def test_all_thread_counts_are_measured_and_put_back():
    trials = bench.trials(Request(threads=(1, 2)))
    assert {t.threads for t in trials} == {1, 2} and all(t.tier for t in trials if t.threads == 2)
    before = torch.get_num_threads()
    (row,) = rows_of([Trial(SMALL, threads=2)])
    assert row.threads == 2 and row.clock == "wall" and torch.get_num_threads() == before


def test_deepbench_is_a_suite_of_its_own():
    trials = bench.trials(Request(suite="deepbench"))
    assert Gemm(16, 1760, 1760, "fp32", "nn") in {t.op for t in trials if t.tier == 0}
    assert not any(isinstance(t.op, Attention) for t in trials)


def test_no_trial_is_begun_that_cannot_end_in_time():
    trials = [Trial(SMALL)] * 3
    assert list(bench.measure(trials, REQUEST, time.monotonic())) == []
    assert list(bench.measure(trials, Request(row_s=100.0), time.monotonic() + 50)) == []


def test_what_no_longer_fits_is_passed_over_for_what_does(monkeypatch):
    large = Gemm(500, 500, 500, "fp32")
    monkeypatch.setattr(bench._Bench, "_call_s", lambda self, trial, route: 1000.0 if trial.op == large else 0.0)
    request = replace(REQUEST, ops=(large,))
    rows = list(bench.measure([Trial(large), Trial(SMALL)], request, far()))
    assert [from_fields(row.kind, row.op) for row in rows] == [SMALL]


def test_a_core_that_others_use_makes_a_trial_longer(monkeypatch):
    bench_of = bench._Bench(replace(REQUEST, ops=(SMALL,)))
    monkeypatch.setattr(bench_of, "_call_s", lambda trial, route: 50.0)
    assert bench_of.row(Trial(SMALL), far()) is not None
    bench_of.slowdown = 10.0
    assert bench_of.row(Trial(SMALL), far()) is None


def test_long_calls_are_left_out_of_low_tiers_with_a_reason():
    huge = Gemm(20_000, 20_000, 3_000, "fp32")
    (row,) = rows_of([Trial(huge, tier=1)])
    assert not row.works and "a call would take about" in row.problem and "allowed are 1 s" in row.problem
    assert row.key == Trial(huge).key


def test_what_does_not_fit_in_memory_is_left_out_with_a_reason(monkeypatch):
    monkeypatch.setattr(conditions, "available_bytes", lambda device: 2**20)
    (row,) = rows_of([Trial(Gemm(1000, 1000, 1000, "fp32"))])
    assert "left out: needs about 24 MB" in row.problem and row.median_s is None
    assert rows_of([Trial(SMALL)])[0].works


def broken(message):
    def function(op):
        def run(*_):
            raise RuntimeError(message)

        return run

    return function


def test_what_does_not_run_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(routes, "PLUGGED", (Route("broken", broken("no kernel\nstack")),))
    before = settings_now()
    trials = [Trial(SMALL, "broken"), Trial(SMALL, "unheard of"), Trial(Gemm(4, 4, 4, "tf32")), Trial(SMALL)]
    rows = rows_of(trials)
    assert settings_now() == before
    assert [row.problem for row in rows] == ["does not run: no kernel", "this machine has no route 'unheard of' for it",
                                             "tf32 is a mode of CUDA devices", ""]  # fmt: skip
    assert [row.works for row in rows] == [False, False, False, True]


def test_wrong_results_do_not_count(monkeypatch):
    zeros = Route("zeros", lambda op: lambda a, b: (a @ b) * float("nan"))
    monkeypatch.setattr(routes, "PLUGGED", (zeros,))
    (row,) = rows_of([Trial(SMALL, "zeros")])
    assert not row.works and row.problem.startswith("wrong results here")
    assert row.error is None and from_json_as(to_json(row), Measurement) == row


def test_a_device_that_vanishes_ends_the_rows_with_the_reason(monkeypatch):
    monkeypatch.setattr(routes, "PLUGGED", (Route("gone", broken("device lost")),))
    trials = [Trial(SMALL), Trial(SMALL, "gone"), Trial(SMALL)]
    assert len(rows_of(trials)) == 3
    monkeypatch.setattr(conditions, "alive", lambda device: False)
    rows = rows_of(trials)
    assert [row.problem for row in rows] == ["", "does not run: device lost"]


def test_stopping_early_leaves_nothing_behind():
    before = settings_now()
    rows = bench.measure([Trial(SMALL, "mkldnn.matmul.fp32_precision=bf16", threads=2)] * 5, REQUEST, far())
    next(rows)
    assert settings_now() == before  # between rows, and when nobody asks for more
    rows.close()
    assert settings_now() == before


def test_a_chain_that_stands_for_an_unknown_name_is_said():
    (row,) = rows_of([Trial(Elementwise("of a plug-in", 500, 2, 1, "fp32"))])
    assert "chain" in row.facts["stands_for"]
    assert rows_of([Trial(Elementwise("relu", 500, 1, 1, "fp32"))])[0].facts == {}


def test_a_device_that_does_not_exist_is_a_usage_error():
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(UsageError, match="no CUDA device"):
        bench.trials(Request(device="cuda"))


def test_a_vanished_directory_does_not_matter(tmp_path):
    assert rows_of([Trial(SMALL)], replace(REQUEST, directory=Path(tmp_path / "gone")))[0].works


def test_inputs_are_shared_by_the_routes_of_an_operation(monkeypatch):
    drawn = []
    real = kernels.inputs
    monkeypatch.setattr(kernels, "inputs", lambda op, *rest: drawn.append(op) or real(op, *rest))
    ways = [Trial(SMALL, name) for name in ("default", "mkldnn.matmul.fp32_precision=bf16")]
    found = rows_of([*ways, *ways])
    assert all(row.works for row in found) and len(drawn) <= 7
