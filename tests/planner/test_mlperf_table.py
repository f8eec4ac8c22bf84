"""MLPerf's results as steps: units of throughput, frozen weights, what is left out."""

import csv

import numpy as np
import pytest

from turbopump.core.errors import UsageError
from turbopump.planner import mlperf_table
from turbopump.planner.mlperf_table import COLUMNS, GPT3, LLAMA2_70B

HEADER = COLUMNS["mlperf_training"]
LORA = dict(zip(HEADER, ("A", "box", "llama2_70b_lora", "NVIDIA H100-SXM5-80GB", 8, 1, 8, 2.1), strict=True))
PRETRAIN = {**LORA, "benchmark": "gpt3", "accelerators": 512, "nodes": 64, "global_batch": 2048,
            "tracked_throughput_median": 168.5}  # fmt: skip


class ByTensor:
    """Seconds are the tensor parallel size: the fastest option has 1, if it divides."""

    def seconds(self, rows):
        return np.array([float(r.case.dims.tp) for r in rows])

    def half_widths(self, rows):
        return np.array([0.1 * r.case.dims.tp for r in rows])


def read(tmp_path, *rows):
    path = tmp_path / "mlperf_training.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, HEADER)
        writer.writeheader()
        writer.writerows(rows)
    return mlperf_table.read(path)


def test_the_fastest_split_is_taken_and_frozen_weights_save_a_third(tmp_path):
    results, problems = read(tmp_path, LORA, PRETRAIN)
    assert problems == [] and [r.frozen_weights for r in results] == [True, False]
    assert all(not m.case.problems() for r in results for m in r.options)
    rows = mlperf_table.predict(results, ByTensor(), problems)
    least = [min(m.case.dims.tp for m in r.options) for r in results]
    assert [r.predicted for r in rows] == pytest.approx([least[0] * 2 / 3, least[1]])
    assert rows[1].high == pytest.approx(least[1] * np.exp(0.1 * least[1]))


@pytest.mark.parametrize("times", [1, 2048, 2048 / 512], ids=["samples", "tokens", "tokens of a device"])
def test_the_unit_of_a_throughput_is_the_one_that_is_possible(tmp_path, times):
    (result,), _ = read(tmp_path, {**PRETRAIN, "tracked_throughput_median": 168.5 * times})
    assert result.step_s == pytest.approx(2048 / 168.5)


def test_the_models_are_those_of_the_benchmark():
    assert GPT3.params == pytest.approx(175e9, rel=0.01) and LLAMA2_70B.params == pytest.approx(69e9, rel=0.01)


@pytest.mark.parametrize(("change", "words"), [
    ({"benchmark": "resnet"}, "resnet: its model is no transformer known here"),
    ({"tracked_throughput_median": ""}, "no throughput was tracked"),
    ({"tracked_throughput_median": "1e12"}, "possible in no unit"),
    ({"accelerator": "Abacus 3"}, "'Abacus 3' is not in the catalog"),
    ({"accelerators": 0}, "csv:2"), ({"global_batch": "x"}, "csv:2"), ({"accelerators": 7}, "none of the usual ways"),
])  # fmt: skip
def test_what_cannot_be_predicted_is_named(tmp_path, change, words):
    results, (problem,) = read(tmp_path, {**LORA, **change})
    assert results == [] and words in problem


def test_a_model_that_refuses_is_named(tmp_path):
    class Refuses(ByTensor):
        def seconds(self, rows):
            raise UsageError("not on this device")

    results, problems = read(tmp_path, LORA)
    assert mlperf_table.predict(results, Refuses(), problems) == [] and "not on this device" in problems[0]
