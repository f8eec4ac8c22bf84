"""Published tables as cases, and what the planner's figures on them are."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import plan_tables
from turbopump.core.errors import UsageError
from turbopump.planner import fit, tables
from turbopump.planner.calibration import Calibration, shipped

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "published"
GPT = "set,gpus,global_batch,micro_batch,hidden,heads,layers,seq_len,tp,dp,pp,iter_ms,source\n"
MPT = "model,seq_len,gpus,gpu,micro_batch,grad_accum,tok_per_s_gpu,precision,sharding,act_ckpt,source\n"
needs_tables = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no published tables at {PUBLISHED}")


def table(tmp_path, name, text):
    path = tmp_path / f"{name}.csv"
    path.write_text(text)
    return tables.read(path)


def test_a_row_of_a_split_run(tmp_path):
    found = table(tmp_path, "gpt_3d_parallel_runs", GPT + "multi_node_A100,64,512,2,3072,32,30,2048,4,16,1,4500,x\n")
    (row,) = found.rows
    assert row.step_s == 4.5 and row.case.dims.tp == 4 and row.case.dims.dp_replicate == 16
    assert row.case.num_microbatches == 16 and row.case.recompute == "full"
    assert row.machine.network_bytes_per_s == 100e9 and row.cluster == "multi_node_A100-64"
    assert row.group == "multi_node_A100/h3072-l30-64" and not found.problems


def test_a_row_of_a_sharded_run(tmp_path):
    text = MPT + "7b,2048,8,a100_40gb,6,2,4641,bf16,FULL_SHARD,False,x\n"
    (row,) = table(tmp_path, "mpt_throughput", text).rows
    assert row.case.dims.dp_shard == 8 and row.case.global_batch == 96 and row.case.reshard_after_forward
    assert row.step_s == pytest.approx(6 * 2 * 2048 / 4641)
    assert row.machine.device.memory_bytes_per_s == 1.555e12 and row.machine.families == ("a100", "foundry")


def test_rows_of_other_devices_and_counts_are_understood_and_predicted(tmp_path):
    gpt = table(tmp_path, "gpt_3d_parallel_runs", GPT + (
        "single_node_V100,8,32,2,1536,16,20,1024,2,2,2,800,x\nmulti_node_H100,1536,2304,1,12288,96,80,2048,8,24,8,9000,x\n"
    ))  # fmt: skip
    mpt = table(tmp_path, "mpt_throughput", MPT + (
        "350m,2048,1024,h100_80gb,8,1,90000,amp_fp8,SHARD_GRAD_OP,False,x\n3b,512,24,h200_141gb,8,1,9000,bf16,FULL_SHARD,True,x\n"
    ))  # fmt: skip
    rows = [*gpt.rows, *mpt.rows]
    assert len(rows) == 4
    for calibration in (Calibration.prior(), shipped()):
        predicted = fit.predict(rows, calibration)
        assert np.isfinite(predicted).all() and (predicted > 0).all()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("single_node_A100,8,32,2,1000,16,20,1024,2,2,3,80,x", "layers"),
        ("single_node_B7,8,32,2,1024,16,20,1024,2,2,2,80,x", "B7|b7"),
        ("single_node_A100,8,32,2,1024,16,twenty,1024,2,2,2,80,x", "twenty"),
        ("single_node_A100,8,32,2,1024,16,20,1024,2,2,2,0,x", "a step of 0 s"),
        ("single_node_A100,8,32,2,1024,16,20,1024,2,0,2,80,x", ":2:"),
    ],
)
def test_a_row_that_is_not_understood_is_a_problem_with_its_line(tmp_path, line, said):
    found = table(tmp_path, "gpt_3d_parallel_runs", GPT + line + "\n")
    assert not found.rows
    (problem,) = found.problems
    assert problem.startswith("gpt_3d_parallel_runs.csv:2:")
    assert any(part in problem for part in said.split("|"))


def test_an_unknown_model_or_split_is_a_problem(tmp_path):
    text = MPT + "9t,2048,8,a100_40gb,6,2,4641,bf16,FULL_SHARD,False,x\n"
    assert len(table(tmp_path, "mpt_throughput", text).problems) == 1
    titan = ",".join(tables.COLUMNS["torchtitan_runs"]) + "\nllama3-8B,8,FSDP8 XP2,8192,2,FSDP,none,5000\n"
    (problem,) = table(tmp_path, "torchtitan_runs", titan).problems
    assert "XP2" in problem


def test_unknown_tables_and_missing_columns_are_errors(tmp_path):
    with pytest.raises(UsageError, match="no such table of step times"):
        table(tmp_path, "prices", "a,b\n1,2\n")
    with pytest.raises(UsageError, match="lacks iter_ms"):
        table(tmp_path, "gpt_3d_parallel_runs", GPT.replace("iter_ms", "iteration_ms"))
    with pytest.raises(UsageError, match="cannot read"):
        tables.read(tmp_path / "mpt_throughput.csv")


@needs_tables
def test_every_published_row_is_understood():
    for name in tables.names():
        found = tables.read(PUBLISHED / f"{name}.csv")
        assert found.rows and not found.problems


@needs_tables
def test_data_sheets_alone_predict_the_split_runs():
    figures = plan_tables.datasheet(plan_tables.read_all(PUBLISHED))
    assert figures["gpt_single"].error <= 0.20 and figures["gpt_multi"].error <= 0.20


@needs_tables
@pytest.mark.slow
def test_figures_with_whole_groups_left_out():
    figures = plan_tables.leave_out(plan_tables.read_all(PUBLISHED))
    assert figures["gpt_single"].error <= 0.06 and figures["gpt_single"].regret <= 0.03
    assert figures["gpt_multi"].error <= 0.08 and figures["gpt_multi"].regret <= 0.03
    assert figures["mpt"].error <= 0.08
    for name in ("gpt_single", "gpt_multi", "mpt"):
        assert 0.7 <= figures[name].coverage <= 0.9
        assert figures[name].half_width <= 2.5 * figures[name].error


@needs_tables
def test_what_ships_was_fitted_on_these_tables():
    rows = plan_tables.read_all(PUBLISHED)
    assert fit.digests(rows) == dict(shipped().fitted_on)
