"""What a published rate of training says of the seconds of a step: papers give TFLOP/s, utilization, tokens, times.

Model FLOPs are those of Narayanan 2021 (arXiv:2104.04473, eq. 3), `72 B s l h^2 (1 + s / 6h + V / 16lh)`, 96 instead of
72 where all activations are computed again and the rate counts it. A rate above the peak, or a fiftieth of it, was not
understood: an error instead of a number.
"""

from __future__ import annotations

from turbopump.planner.cases import Case
from turbopump.planner.machine import Machine

MODEL, RECOMPUTED = 72, 96
MOST = 1e9  # of any size: what a table holds beyond it is a slip
POSSIBLE = (0.02, 1.0)  # model FLOPs over those of the peak
KNOWN = ("tflops_per_gpu", "mfu_pct", "hfu_pct", "iteration_s", "iteration_ms", "tokens_per_s_per_gpu", "tokens_per_s",
         "samples_per_s")  # fmt: skip


def step_s(metric: str, unit: str, value: float, case: Case, machine: Machine) -> float:
    """Seconds of a step of `case` on `machine`; raises `ValueError` for an unknown metric or an impossible rate."""
    seconds = _step_s(metric.lower(), unit.lower(), value, case, machine)
    share = flops(case, MODEL) / (seconds * machine.peak_flops_per_s(case.dtype) * case.dims.num_devices)
    if not POSSIBLE[0] < share < POSSIBLE[1]:
        raise ValueError(f"{metric} {value:g} {unit} means {share:.3g} of the peak, which cannot be")
    return seconds


def check_sizes(case: Case) -> None:
    """Raises `ValueError` for a case with a size below 1, above all reason, or that does not divide."""
    shape, dims = case.shape, case.dims
    if shape.heads < 1:
        raise ValueError(f"heads ({shape.heads}): a size from 1 to {MOST:g} is needed")
    sizes = {
        "width of a head": shape.head_width, "mlp": shape.mlp, "vocab": shape.vocab, "hidden": shape.hidden,
        "layers": shape.layers, "seq_len": case.seq_len, "global_batch": case.global_batch,
        "microbatch": case.microbatch, "tp": dims.tp, "pp": dims.pp, "dp_replicate": dims.dp_replicate,
        "dp_shard": dims.dp_shard, "cp": dims.cp, "ep": dims.ep, "virtual_stages": case.virtual_stages,
    }  # fmt: skip
    if wrong := [f"{name} ({size})" for name, size in sizes.items() if not 1 <= size <= MOST]:
        raise ValueError(f"{', '.join(wrong)}: a size from 1 to {MOST:g} is needed")
    if problems := case.problems():
        raise ValueError("; ".join(problems))


def flops(case: Case, passes: int) -> float:
    """Of a step of a decoder with four hidden sizes in its MLP."""
    h, layers, s = case.shape.hidden, case.shape.layers, case.seq_len
    return passes * case.global_batch * s * layers * h * h * (1 + s / (6 * h) + case.shape.vocab / (16 * layers * h))


def _step_s(metric: str, unit: str, value: float, case: Case, machine: Machine) -> float:
    devices, tokens = case.dims.num_devices, float(case.global_batch * case.seq_len)
    counted = RECOMPUTED if case.recompute == "full" else MODEL
    if "tflop" in metric:
        return flops(case, MODEL if "model" in f"{metric} {unit}" else counted) / (value * 1e12 * devices)
    if "mfu" in metric or "hfu" in metric:
        share = value / 100 if "pct" in metric or "%" in unit or value > 1 else value
        rate = share * machine.peak_flops_per_s(case.dtype) * devices
        return flops(case, counted if "hfu" in metric else MODEL) / rate
    if any(word in metric for word in ("iter", "step")) and "per_s" not in metric:
        return value / 1e3 if "ms" in metric.split("_") or unit.startswith("ms") else value
    if "tok" in metric:
        return tokens / (value * (devices if "gpu" in metric or "device" in metric else 1))
    if "sample" in metric or "seq" in metric:
        return case.global_batch / value
    raise ValueError(f"the metric {metric!r} is not understood (known: {', '.join(KNOWN)})")
