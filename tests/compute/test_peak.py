import pytest
import torch

from turbopump.compute import peak as peaks
from turbopump.compute import routes
from turbopump.core.errors import UsageError


def settings_now():
    return (torch.get_num_threads(), torch.backends.mkldnn.matmul.fp32_precision, torch.get_float32_matmul_precision(),
            torch.backends.cuda.matmul.fp32_precision)  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_peak_is_the_best_row_and_settings_are_put_back(dtype):
    before = settings_now()
    peak = peaks.measure_peak(dtype, threads=1, budget_s=0.2)
    assert settings_now() == before
    best = max(peak.rows, key=lambda row: row["flops_per_s"])
    assert peak.dtype == dtype
    assert peak.flops_per_s == best["flops_per_s"] > 1e8
    assert peak.route == best["route"]
    assert all(row["flops_per_s"] == 0 for row in peak.rows if row["problem"])
    assert best["op"].startswith("Gemm(") and best["runs"] >= 2


def test_fp32_tries_both_libraries_and_takes_none_that_is_not_exact(monkeypatch):
    tried = {row["route"] for row in peaks.measure_peak("fp32", budget_s=0.1).rows}
    assert tried == {"default", "mkldnn.matmul.fp32_precision=bf16", "mkldnn._linear_pointwise"}
    monkeypatch.setattr(routes, "error", lambda op, route, device: 1e-7 if route.name == "default" else 1e-3)
    peak = peaks.measure_peak("fp32", budget_s=0.1)  # as on a CPU with AMX, where the switch means bf16
    assert peak.route == "default"
    refused = [row for row in peak.rows if row["route"] != "default"]
    assert len(refused) == 2
    assert all(
        row["flops_per_s"] == 0 and "not exact fp32: relative error 1.0e-03" in row["problem"] for row in refused
    )


def test_a_dtype_that_does_not_run_is_a_row_not_an_error(monkeypatch):
    def refuse(*_):
        raise RuntimeError('"addmm_impl_cpu_" not implemented for this dtype\nstack of the library')

    monkeypatch.setattr(torch, "mm", refuse)
    monkeypatch.setattr(peaks.F, "linear", refuse)
    routes._errors.clear()
    peak = peaks.measure_peak("bf16", budget_s=0.1)
    assert peak.flops_per_s == 0 and peak.route == ""
    assert peak.rows[0]["problem"].startswith("does not run") and "stack" not in peak.rows[0]["problem"]
    dtype, rows = peaks.fastest_compute(budget_s=0.05)
    assert dtype == "fp32" and all("does not run" in row["problem"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("gain,expected", [(3.0, "bf16"), (1.1, "fp32"), (0.01, "fp32")])
def test_bf16_is_chosen_only_where_clearly_faster(gain, expected, monkeypatch):
    monkeypatch.setattr(peaks.conditions, "clock", lambda device: FixedClock(gain))
    before = settings_now()
    dtype, rows = peaks.fastest_compute(budget_s=0.01)
    assert dtype == expected and settings_now() == before
    assert all(row["bf16_gain"] == pytest.approx(gain) for row in rows)


class FixedClock:
    """A clock under which bf16 takes 1 / gain of fp32's second; the work itself runs."""

    def __init__(self, gain):
        self.gain = gain

    def time(self, run, calls):
        seen, real = [], torch.autocast

        class Watch(real):
            def __init__(self, *args, **kwargs):
                seen.append(kwargs["enabled"])
                super().__init__(*args, **kwargs)

        torch.autocast = Watch
        try:
            run()
        finally:
            torch.autocast = real
        return (1 / self.gain if seen[0] else 1.0), 1.0


def test_unknown_dtype_or_device_is_a_usage_error():
    with pytest.raises(UsageError, match="use one of fp64, fp32, tf32, bf16, fp16, fp8, int8"):
        peaks.measure_peak("int3")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            peaks.measure_peak("bf16", device="cuda")
