import pytest
import torch

from turbopump.compute import bench
from turbopump.core.errors import UsageError


def settings_now():
    return (torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.fp32_precision)  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peak_is_the_best_row_and_settings_are_put_back(dtype):
    before = settings_now()
    peak = bench.measure_peak(dtype, threads=1, budget_s=0.2)
    assert settings_now() == before
    best = max(peak.rows, key=lambda row: row["flops_per_s"])
    assert peak.dtype == dtype
    assert peak.flops_per_s == best["flops_per_s"] > 1e8
    assert peak.route == best["route"]
    assert all(row["flops_per_s"] == 0 for row in peak.rows if row["problem"])
    assert best["op"].startswith("Gemm(") and best["runs"] >= 2


def test_fp32_tries_both_libraries_and_takes_none_that_is_not_exact(monkeypatch):
    routes = {row["route"] for row in bench.measure_peak("fp32", budget_s=0.1).rows}
    assert routes == {"default", "mkldnn.matmul.fp32_precision=bf16"}
    monkeypatch.setattr(bench, "_relative_error", lambda dtype, device: (
        1e-3 if torch.backends.mkldnn.matmul.fp32_precision == "bf16" else 1e-7))  # fmt: skip
    peak = bench.measure_peak("fp32", budget_s=0.1)  # as on a CPU with AMX, where the switch means bf16
    assert peak.route == "default"
    (refused,) = (row for row in peak.rows if row["route"] != "default")
    assert refused["flops_per_s"] == 0 and "not exact fp32: relative error 1.0e-03" in refused["problem"]


def test_relative_error_sees_the_dtype():
    assert bench._relative_error("fp64", "cpu") < 1e-12
    assert bench._relative_error("fp32", "cpu") < 2e-6
    assert 1e-4 < bench._relative_error("bf16", "cpu") < 1e-2


def test_a_dtype_that_does_not_run_is_a_row_not_an_error(monkeypatch):
    def refuse(*_):
        raise RuntimeError('"addmm_impl_cpu_" not implemented for this dtype\nstack of the library')

    monkeypatch.setattr(bench.F, "linear", refuse)
    peak = bench.measure_peak("bf16", budget_s=0.1)
    assert peak.flops_per_s == 0 and peak.route == ""
    assert peak.rows[0]["problem"].startswith("does not run") and "stack" not in peak.rows[0]["problem"]
    dtype, rows = bench.fastest_compute(budget_s=0.05)
    assert dtype == "fp32" and all("does not run" in row["problem"] for row in rows)


@pytest.mark.parametrize("gain,expected", [(3.0, "bf16"), (1.1, "fp32"), (0.01, "fp32")])
def test_bf16_is_chosen_only_where_clearly_faster(gain, expected, monkeypatch):
    monkeypatch.setattr(bench, "_shortest_s", _fixed_times(gain))
    before = settings_now()
    dtype, rows = bench.fastest_compute(budget_s=0.01)
    assert dtype == expected and settings_now() == before
    assert all(row["bf16_gain"] == pytest.approx(gain) for row in rows)


def _fixed_times(gain):
    """A clock under which bf16 takes 1 / gain of fp32's second; the work itself runs."""

    def shortest_s(run, device, budget_s, least=2):
        seen = []
        real = torch.autocast

        class Watch(real):
            def __init__(self, *args, **kwargs):
                seen.append(kwargs["enabled"])
                super().__init__(*args, **kwargs)

        torch.autocast = Watch
        try:
            run()
        finally:
            torch.autocast = real
        return (1 / gain if seen[0] else 1.0), 1

    return shortest_s


def test_unknown_dtype_or_device_is_a_usage_error():
    with pytest.raises(UsageError, match="use one of fp64, fp32, bf16, fp16"):
        bench.measure_peak("int3")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            bench.measure_peak("bf16", device="cuda")
