"""Megatron-Bridge's table under whatever names its columns have."""

import csv

import pytest

from turbopump.core.errors import UsageError
from turbopump.planner import nemo_table

HERE = {"model": "llama3.1-70b", "gpu": "h100", "gpus": 64, "seq_len": 8192, "global_batch": 128, "micro_batch": 1,
        "tp": 4, "pp": 4, "cp": 2, "vp": 5, "ep": 1, "precision": "fp8_cs", "tok_per_s_gpu": 1600}  # fmt: skip
SUMMARY = {"Model": "LLAMA3-70B", "System": "DGX-GB200", "#-GPUs": 64, "Sequence Length": 8192, "GBS": 128, "MBS": 2,
           "TP": 1, "PP": 1, "CP": 1, "VP": "n/a", "EP": 1, "FSDP": 64, "Precision": "FP8-MX",
           "Tokens / sec / GPU": "4,200", "Model TFLOP / sec / GPU": 1900}  # fmt: skip


def read(tmp_path, *rows):
    path = tmp_path / "nemo_megatron_bridge_runs.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return nemo_table.read(path)


def test_the_names_of_this_folder(tmp_path):
    (row,) = read(tmp_path, HERE).rows
    case = row.case
    assert (case.dims.tp, case.dims.pp, case.dims.cp, case.dims.dp_replicate, case.dims.dp_shard) == (4, 4, 2, 2, 1)
    assert case.dtype == "fp8" and (case.schedule, case.virtual_stages) == ("interleaved", 5) and not case.problems()
    assert row.step_s == pytest.approx(128 * 8192 / (1600 * 64))
    assert row.group == "llama3-70b/NVIDIA H100 SXM" and row.machine.num_devices == 64


def test_the_names_of_the_summary(tmp_path):
    (row,) = read(tmp_path, SUMMARY).rows
    assert row.case.dims.dp_shard == 64 and row.case.schedule == "1f1b" and row.case.dtype == "fp8"
    assert row.machine.device.name.startswith("NVIDIA GB200") and row.machine.devices_per_node == 64
    assert row.step_s == pytest.approx(128 * 8192 / (4200 * 64))


def test_tflops_where_there_are_no_tokens(tmp_path):
    moe = {**HERE, "model": "Qwen3_235B_A22B", "tok_per_s_gpu": "", "tp": 1, "pp": 1, "cp": 1, "vp": 1, "ep": 8,
           "tflops_per_gpu": 500}  # fmt: skip
    (row,) = read(tmp_path, moe).rows
    active = 6 * 22e9 * 128 * 8192 / (500e12 * 64)
    assert row.step_s == pytest.approx(active, rel=0.1) and row.case.dims.ep == 8 and row.case.shape.experts == 128


def test_what_is_not_understood_is_named(tmp_path):
    found = read(tmp_path, HERE, {**HERE, "model": "nemotron-9000b"}, {**HERE, "gpu": "abacus"}, {**HERE, "tp": 7},
                 {**HERE, "tok_per_s_gpu": "fast"}, {**HERE, "gpus": ""})  # fmt: skip
    assert len(found.rows) == 1 and len(found.problems) == 5
    for number, words in zip((3, 4, 5, 6, 7), ("nemotron-9000b", "abacus", "tp 7", "fast", ""), strict=True):
        assert any(f"csv:{number}" in p and words in p for p in found.problems), (number, found.problems)


def test_lacking_columns_are_an_error_that_names_them(tmp_path):
    with pytest.raises(UsageError, match=r"global_batch, tok_per_s_gpu or tflops_per_gpu is lacking; it has model"):
        read(tmp_path, {k: v for k, v in HERE.items() if k not in ("global_batch", "tok_per_s_gpu")})
