"""Rates as papers state them, as seconds of a step."""

from dataclasses import replace

import pytest

from turbopump.planner.cases import Case, DecoderShape, ParallelDims
from turbopump.planner.machine import from_catalog
from turbopump.planner.rates import KNOWN, MODEL, flops, step_s

SHAPE = DecoderShape(12288, 96, 96, 51200, 49152, gated=False, learned_positions=2048, biases=True)
CASE = Case(SHAPE, 2048, 1536, 1, ParallelDims(pp=8, dp_replicate=16, tp=8), recompute="full", dtype="fp16")
MACHINE = from_catalog("a100", 1024)
REAL_S = 40.0
MODEL_TFLOPS = flops(CASE, MODEL) / REAL_S / 1024 / 1e12


def test_model_flops_are_about_six_a_parameter_and_token():
    assert flops(CASE, MODEL) == pytest.approx(6 * SHAPE.params * 2048 * 1536, rel=0.05)


@pytest.mark.parametrize(("metric", "unit", "value"), [
    ("tflops_per_gpu", "TFLOP/s (incl. recompute)", MODEL_TFLOPS * 96 / 72),
    ("model_tflops_per_gpu", "", MODEL_TFLOPS), ("tflops_per_gpu", "model TFLOP/s", MODEL_TFLOPS),
    ("mfu_pct", "%", MODEL_TFLOPS / 3.12), ("mfu", "", MODEL_TFLOPS / 312), ("hfu", "%", MODEL_TFLOPS * 96 / 72 / 3.12),
    ("iteration_s", "s", REAL_S), ("iter_ms", "", REAL_S * 1e3), ("step_time", "ms", REAL_S * 1e3),
    ("tokens_per_s_per_gpu", "", 1536 * 2048 / REAL_S / 1024), ("tokens_per_s", "", 1536 * 2048 / REAL_S),
    ("samples_per_s", "", 1536 / REAL_S), ("sequences_per_s", "", 1536 / REAL_S),
])  # fmt: skip
def test_every_way_to_say_it(metric, unit, value):
    assert step_s(metric, unit, value, CASE, MACHINE) == pytest.approx(REAL_S)


def test_rates_without_recomputation_do_not_count_it():
    assert step_s("tflops_per_gpu", "", MODEL_TFLOPS, replace(CASE, recompute="none"), MACHINE) == pytest.approx(REAL_S)


@pytest.mark.parametrize("value", [1e-6, 1e6])
@pytest.mark.parametrize("metric", KNOWN)
def test_an_impossible_rate_is_an_error(metric, value):
    with pytest.raises(ValueError, match="of the peak, which cannot be"):
        step_s(metric, "", value, CASE, MACHINE)


def test_an_unknown_metric_names_those_known():
    with pytest.raises(ValueError, match=r"'happiness' is not understood \(known: tflops_per_gpu"):
        step_s("happiness", "", 3.0, CASE, MACHINE)
