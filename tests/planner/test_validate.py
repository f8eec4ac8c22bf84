"""Published tables judged: synthetic ones, hostile ones, and what cannot be predicted."""

import csv
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest

from turbopump.core.errors import ConfigError, UsageError
from turbopump.planner import fit, tables
from turbopump.planner import validate as module
from turbopump.planner.step_models import OwnModels
from turbopump.planner.validate import Report, known_tables, validate
from turbopump.reporting.validation_text import format_report

GPT = known_tables()["gpt_3d_parallel_runs"]
MPT = known_tables()["mpt_throughput"]


@dataclass
class Flat:
    """40 % of the peak, whatever the split."""

    times: float = 1.0
    band: float | None = None
    digest: str = "abc"

    def seconds(self, rows):
        return np.array([
            self.times * 6 * r.case.shape.params * r.case.seq_len * r.case.global_batch
            / (0.4 * r.machine.peak_flops_per_s(r.case.dtype) * r.machine.num_devices) for r in rows
        ])  # fmt: skip

    def half_widths(self, rows):
        return None if self.band is None else np.full(len(rows), self.band)


class FlatModels:
    """Counts what it was asked, and never sees the group that it is asked for."""

    def __init__(self):
        self.seen = []

    def shipped(self):
        return Flat(band=0.3)

    def fitted(self, rows):
        self.seen.append({row.group for row in rows})
        return Flat()

    def held_out(self, rows):
        seconds = np.full(len(rows), np.nan)
        for group in dict.fromkeys(row.group for row in rows):
            own = [row.group == group for row in rows]
            model = self.fitted([row for row, out in zip(rows, own, strict=True) if not out])
            seconds[own] = model.seconds([row for row, out in zip(rows, own, strict=True) if out])
        return seconds, None


def write(path, header, rows):
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def gpt_rows(models=((1024, 24), (2048, 12), (2048, 16)), splits=((1, 2, 4), (2, 2, 2), (2, 1, 4))):
    for hidden, layers in models:
        for tp, dp, pp in splits:
            for micro in (1, 2):
                flops = 6 * (12 * hidden**2 * layers + 51200 * hidden) * 1024 * 32
                ms = flops / (0.4 * 312e12 * 8) * 1e3 * (1 + 0.1 * tp)
                yield ["single_node_A100", 8, 32, micro, hidden, 16, layers, 1024, tp, dp, pp, f"{ms:.3f}"]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "gpt_3d_parallel_runs.csv", GPT, gpt_rows())
    return tmp_path


def table(report: Report, name, part=None):
    return next(t for t in report.tables if t.name == name and part in (None, t.part))


def test_the_own_models_predict_every_group_without_itself(folder, monkeypatch):
    rows = tables.read(folder / "gpt_3d_parallel_runs.csv").rows
    groups, seen = list(dict.fromkeys(row.group for row in rows)), []
    real = fit.fit
    monkeypatch.setattr(fit, "fit", lambda rows, *more: seen.append({r.group for r in rows}) or real(rows, *more))
    seconds, widths = OwnModels().held_out(rows)
    assert [set(groups) - others for others in seen] == [{group} for group in groups]
    assert np.isfinite(seconds).all() and (seconds > 0).all() and (widths > 0).all() and len(widths) == len(rows)


def test_the_groups_of_a_table_have_bands_and_choices(folder):
    report = validate(folder, models=FlatModels())
    found = table(report, "gpt_3d_parallel_runs")
    assert report.mode == "cross-validated" and found.part == "single_node_A100" and len(found.groups) == 3
    total = found.total
    assert total.num_rows == 18 and 0 < total.error < 0.6 and total.coverage is not None
    assert total.num_choices == 3 and total.regret is not None


def test_frozen_takes_what_ships_with_its_band(folder):
    models = FlatModels()
    report = validate(folder, frozen=True, models=models)
    found = table(report, "gpt_3d_parallel_runs")
    assert models.seen == [] and (report.mode, report.calibration) == ("frozen", "abc")
    assert all(row.high / row.predicted == pytest.approx(math.exp(0.3)) for row in found.rows)


def test_the_own_model_of_steps(folder):
    report = validate(folder)  # fitted on the other groups
    assert table(report, "gpt_3d_parallel_runs").total.error < 0.5
    frozen = validate(folder, frozen=True)
    assert table(frozen, "gpt_3d_parallel_runs").total.coverage is not None
    assert "gpt_3d_parallel_runs:" in frozen.calibration and "these very rows" not in str(frozen.to_json())


def test_rows_that_the_calibration_was_fitted_on_are_told(folder):
    class Seen(FlatModels):
        def shipped(self):
            rows = tables.read(folder / "gpt_3d_parallel_runs.csv").rows
            return Flat(band=0.1, digest=f"other:1+gpt_3d_parallel_runs:{fit.digests(rows)['gpt_3d_parallel_runs']}")

    found = table(validate(folder, frozen=True, models=Seen()), "gpt_3d_parallel_runs")
    assert "fitted on these very rows" in found.basis


def test_json_and_text_say_the_same(folder):
    (folder / "notes.txt").write_text("hello")
    report = validate(folder, models=FlatModels())
    plain = json.loads(json.dumps(report.to_json()))
    only = plain["tables"][0]
    assert only["total"]["num_rows"] == 18 and len(only["groups"]) == 3 and plain["ignored"] == ["notes.txt"]
    text = format_report(report)
    assert "gpt_3d_parallel_runs: single_node_A100" in text and "single_node_A100/h1024-l24" in text
    assert "notes.txt" in text and "nan" not in text
    assert "h1024-l24" not in format_report(report, groups=False)


def test_a_lacking_column_is_named_with_what_it_may_be(tmp_path):
    write(tmp_path / "gpt_3d_parallel_runs.csv", [c if c != "iter_ms" else "iters_ms" for c in GPT], gpt_rows())
    write(tmp_path / "deepbench_gemm.csv", ["platform", "M"], [["NV_P100", 64]])
    with pytest.raises(ConfigError) as caught:
        validate(tmp_path, models=FlatModels())
    text = str(caught.value)
    assert "gpt_3d_parallel_runs.csv: column 'iter_ms' is lacking; is it 'iters_ms'?" in text
    assert "deepbench_gemm.csv: column 'precision'" in text  # all problems at once


def test_more_columns_are_no_matter(tmp_path):
    write(tmp_path / "gpt_3d_parallel_runs.csv", [*GPT, "extra"], [[*row, "<b>"] for row in gpt_rows()])
    assert table(validate(tmp_path, models=FlatModels()), "gpt_3d_parallel_runs").total.num_rows == 18


@pytest.mark.parametrize(("column", "value"), [
    ("hidden", "many"), ("iter_ms", ""), ("iter_ms", "nan"), ("iter_ms", "-3"), ("iter_ms", "1e99"), ("heads", "0"),
    ("tp", "0"), ("tp", "3"), ("gpus", "-8"), ("micro_batch", "7"), ("set", "single_node_TPUv9"), ("seq_len", "1e400"),
])  # fmt: skip
def test_a_hostile_row_is_named_and_takes_no_other_with_it(tmp_path, column, value):
    rows = [dict(zip(GPT, row, strict=True)) for row in gpt_rows()]
    rows[4][column] = value
    write(tmp_path / "gpt_3d_parallel_runs.csv", GPT, [row.values() for row in rows])
    found = table(validate(tmp_path, models=FlatModels()), "gpt_3d_parallel_runs")
    assert found.total.num_rows == 17, found.not_predicted
    assert len(found.not_predicted) == 1 and "gpt_3d_parallel_runs.csv:6" in found.not_predicted[0]


def test_a_row_that_ends_early_is_named(tmp_path):
    known = known_tables()
    for name, columns in known.items():
        good = columns or ("model", "gpu", "gpus", "seq_len", "global_batch", "micro_batch", "tok_per_s_gpu")
        write(tmp_path / f"{name}.csv", good, [["x"], [], ["1", "2"], ["<script>", *["\x00"] * (len(good) + 3)]])
    for frozen in (False, True):
        report = validate(tmp_path, frozen=frozen, models=FlatModels())
        assert {t.name for t in report.tables} == set(known)
        assert all(t.total is None and t.not_predicted for t in report.tables)
        format_report(report)


def test_an_unknown_gpu_is_counted_and_named(tmp_path):
    row = ["7b", 2048, 64, "quantum_80gb", 8, 1, 4000, "bf16", "FULL_SHARD", "True"]
    good = ["7b", 2048, 64, "a100_80gb", 8, 1, 2000, "bf16", "FULL_SHARD", "True"]
    other = ["13b", 2048, 64, "h100_80gb", 8, 1, 2500, "bf16", "FULL_SHARD", "True"]
    write(tmp_path / "mpt_throughput.csv", MPT, [row, good, other, ["9000b", *good[1:]]])
    found = table(validate(tmp_path, models=FlatModels()), "mpt_throughput")
    assert found.total.num_rows == 2 and len(found.not_predicted) == 2
    assert "quantum" in " ".join(found.not_predicted) and "9000b" in " ".join(found.not_predicted)


def test_a_single_group_cannot_be_left_out_and_says_so(tmp_path):
    write(tmp_path / "gpt_3d_parallel_runs.csv", GPT, gpt_rows(models=((1024, 24),)))
    found = table(validate(tmp_path, models=FlatModels()), "gpt_3d_parallel_runs")
    assert found.total is None and len(found.not_predicted) == 6 and "--frozen" in found.not_predicted[0]
    assert "none of 6" in format_report(validate(tmp_path, models=FlatModels()))
    assert table(validate(tmp_path, frozen=True, models=FlatModels()), "gpt_3d_parallel_runs").total.num_rows == 6


def test_a_model_that_refuses_a_machine_loses_only_its_rows(folder):
    class Refusing(FlatModels):
        def shipped(self):
            class Model(Flat):
                def seconds(self, rows):
                    if rows[0].case.shape.hidden == 1024:
                        raise UsageError("no such width")
                    return super().seconds(rows)

            return Model(band=0.1)

    more = [*gpt_rows(), *([*r[:1], 4, *r[2:8], 1, 1, 4, r[11]] for r in gpt_rows() if r[4] == 1024)]
    write(folder / "gpt_3d_parallel_runs.csv", GPT, sorted(more, key=lambda r: (r[1], r[4])))
    found = table(validate(folder, frozen=True, models=Refusing()), "gpt_3d_parallel_runs")
    assert len(found.not_predicted) >= 6 and all("no such width" in why for why in found.not_predicted)


def test_predictions_that_are_no_numbers_are_named(folder):
    class Broken(FlatModels):
        def fitted(self, rows):
            return Flat(times=math.nan)

    found = table(validate(folder, models=Broken()), "gpt_3d_parallel_runs")
    assert found.total is None and len(found.not_predicted) == 18 and "predicted nan" in found.not_predicted[0]


def test_paths(tmp_path, folder):
    with pytest.raises(UsageError, match="no file or folder"):
        validate(tmp_path / "absent")
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.csv").write_text("a\n1\n")
    with pytest.raises(UsageError, match=r"no known table.*x\.csv.*known are"):
        validate(other)
    assert len(validate(folder / "gpt_3d_parallel_runs.csv", models=FlatModels()).tables) == 1
    (folder / "gpt_3d_parallel_runs.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError):
        validate(folder, models=FlatModels())


def test_an_empty_table_has_no_rows(tmp_path):
    write(tmp_path / "gpt_3d_parallel_runs.csv", GPT, [])
    report = validate(tmp_path, models=FlatModels())
    assert table(report, "gpt_3d_parallel_runs").total is None and "none of 0" in format_report(report)


def test_operations_leave_out_the_device_itself(tmp_path):
    header = known_tables()["deepbench_gemm"]
    rows = [[p, "fp32", m, 64, 1024, "N", "T", 0.1] for p in ("NV_P100", "NV_M40") for m in (512, 2048)]
    rows += [["NV_H9000", "fp32", 64, 64, 64, "N", "N", 0.1], ["NV_P100", "int3", 64, 64, 64, "N", "N", 0.1],
             ["NV_P100", "fp32", 64, 64, 64, "N", "N", ""], ["NV_P100", "fp32", 64, 64, 64, "Q", "N", 1.0]]  # fmt: skip
    write(tmp_path / "deepbench_gemm.csv", header, rows)
    held_out, frozen = (
        table(validate(tmp_path, frozen=f, models=FlatModels()), "deepbench_gemm") for f in (False, True)
    )
    assert set(held_out.groups) == {"NV_P100/fp32", "NV_M40/fp32"} and len(held_out.not_predicted) == 4
    assert [r.predicted for r in held_out.rows] != [r.predicted for r in frozen.rows]
    assert all(r.low < r.predicted < r.high for r in held_out.rows)


def test_other_operations(tmp_path):
    known = known_tables()
    cells = [
        ["LSTM", "", 512, 16, 25, 2, 3, 1],
        ["QRNN", "", 512, 16, 25, 2, 3, 1],
        ["GRU", "", 512, 16, 25, 2, "", ""],
    ]
    header = ("platform", "precision", "cell", "application", "hidden", *known["deepbench_rnn"][4:])
    write(tmp_path / "deepbench_rnn.csv", header, [["NV_P100", "fp32", *row] for row in cells])
    conv = dict.fromkeys(known["deepbench_conv"], 1) | {"platform": "NV_P100", "precision": "fp32", "W": 28, "H": 28}
    no_stride = conv | {"stride_w": 0}
    write(tmp_path / "deepbench_conv.csv", conv, [(conv | {"bwd_inputs_ms": ""}).values(), no_stride.values()])
    write(tmp_path / "ops_a100_mi210.csv", known["ops_a100_mi210"], [["A100", "matmul_fp16", 64, 512, 512, 0.1, "", ""],
          ["MI210", "gelu", 4096, "", "", "", 50, "G"], ["A100", "sort", 4, "", "", "", 1, ""]])  # fmt: skip
    write(tmp_path / "matmul_achievable.csv", known["matmul_achievable"], [["bf16", "NVIDIA H100 SXM", 794, "64x64x64"],
          ["bf16", "NVIDIA H100 SXM", 794, "big"], ["bf16", "NVIDIA Z1", 7, "64x64x64"],
          ["fp8", "Tesla T4", 9, "64x64x64"]])  # fmt: skip
    report = validate(tmp_path, models=FlatModels())
    counts = {t.name: (len(t.rows), len(t.not_predicted)) for t in report.tables}
    assert counts == {"deepbench_conv": (2, 1), "deepbench_rnn": (3, 1), "matmul_achievable": (1, 3),
                      "ops_a100_mi210": (2, 1)}  # fmt: skip


def test_clusters(tmp_path):
    known = known_tables()
    sizes = [(ranks, size) for ranks in (2, 4, 8) for size in (1 << 20, 1 << 24, 1 << 26)]
    sums = [["a100", ranks, size, size * (ranks - 1) / ranks / 1e5 + 20] for ranks, size in sizes]
    bad = [["zx81", 2, 1024, 3.0], ["a100", 2, 1024, 0]]
    write(tmp_path / "allreduce_intranode.csv", known["allreduce_intranode"], [*sums, *bad])
    write(tmp_path / "mlperf_power.csv", known["mlperf_power"], [["8xABC-H100-SXM-80GB", "ssd", 1, 8, 6800],
          ["8xABC-H100-SXM-80GB", "gpt3", 1, 8, 6400], ["mystery", "ssd", 1, 8, 6800]])  # fmt: skip
    write(tmp_path / "failures.csv", known["failures"], [["A", "MTBF per GPU", 40000, "GPU-hours"],
          ["B 1", "MTTF of a 1024-GPU job", 40, "h"], ["C", "failures per 1000 node-days", 4, ""],
          ["A", "cosmic rays", 3, "events"], ["A", "MTTF of a dog", "x", "h"]])  # fmt: skip
    for frozen in (False, True):
        report = validate(tmp_path, frozen=frozen, models=FlatModels())
        counts = {t.name: (len(t.rows), len(t.not_predicted)) for t in report.tables}
        assert counts == {"allreduce_intranode": (9, 2), "failures": (3, 2), "mlperf_power": (2, 1)}
        assert all(math.isfinite(r.predicted) and r.predicted > 0 for t in report.tables for r in t.rows)
    held_out = table(validate(tmp_path, models=FlatModels()), "allreduce_intranode")
    assert held_out.total.error < 0.3  # from the other numbers of ranks


def test_memory_says_whether_plans_fit(tmp_path):
    known = known_tables()
    header = [*dict.fromkeys([*known["torchtitan_runs"], "memory_GiB", "source"])]
    base = {"model": "llama3.1-8B", "gpus": 8, "parallelism": "FSDP8", "seq_len": 8192, "local_batch": 2,
            "techniques": "FSDP", "act_ckpt": "selective", "tok_per_s_gpu": 5762, "memory_GiB": 70,
            "source": "H100 96GB"}  # fmt: skip
    rows = [base, base | {"memory_GiB": 95.9}, base | {"memory_GiB": ""}, base | {"model": "llama9-9B"}]
    write(tmp_path / "torchtitan_runs.csv", header, [[row[name] for name in header] for row in rows])
    memory = table(validate(tmp_path, frozen=True, models=FlatModels()), "torchtitan_runs", "memory")
    assert memory.total.num_rows == 2 and memory.total.false_fits is not None
    assert any("llama9" in why for why in memory.not_predicted)
    steps = table(validate(tmp_path, frozen=True, models=FlatModels()), "torchtitan_runs", "")
    assert steps.total.num_rows == 3


def test_every_known_table_is_one_that_something_judges():
    judged = {*module.STEP_TABLES, *module._JUDGES, "megatron_memory", "mlperf_training"}
    assert set(known_tables()) == judged
