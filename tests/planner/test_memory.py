"""The model of memory: the papers' formulas, published peaks, one-sided fits, the transformer's own count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from turbopump.core.errors import UsageError
from turbopump.models.transformer.config import TransformerConfig
from turbopump.models.transformer.workload import workload
from turbopump.planner import memory_tables
from turbopump.planner.cases import Case, Cases, DecoderShape, ParallelDims
from turbopump.planner.memory import FRAGMENTATION, GIB, PARTS, SOFTWARE, MemoryUse, memory_bytes

PUBLISHED = Path(__file__).parents[2].parent / "shared" / "published"
MEGATRON = SOFTWARE["megatron"]
LLAMA_8B = memory_tables.LLAMA_SHAPES["8B"]
CASE = Case(LLAMA_8B, 8192, 64, 1, ParallelDims(dp_shard=8))


def use_of(case: Case, software: str = "turbopump") -> MemoryUse:
    return memory_bytes(Cases.of([case]), SOFTWARE[software])


def worst(case: Case, software: str = "turbopump") -> float:
    return float(use_of(case, software).worst[0])


def table(name: str) -> memory_tables.MemoryTable:
    path = PUBLISHED / f"{name}.csv"
    if not path.is_file():
        pytest.skip(f"the published table {path.name} is not beside this checkout")
    return memory_tables.read(path)


@pytest.mark.parametrize(
    ("recompute", "bytes_per_sbh"),
    [
        ("none", 10 + 24 / 8 + 5 * 64 * 2048 / (6144 * 8)),  # equation 2 of arXiv:2205.05198
        ("seqpar", 34 / 8 + 5 * 64 * 2048 / (6144 * 8)),  # equation 4
        ("selective+seqpar", 34 / 8),  # equation 6
        ("full", 2),
    ],
)
def test_kept_activations_are_the_equations_of_the_paper(recompute: str, bytes_per_sbh: float) -> None:
    case = memory_tables.megatron_case("22B", recompute)
    expected = bytes_per_sbh * 2048 * 4 * 6144 * 48
    assert use_of(case, "megatron").layer_activations[0, 0] == pytest.approx(expected)


def test_interleaving_keeps_the_papers_factor_more_on_the_first_stage() -> None:
    case = memory_tables.megatron_case("530B", "selective+seqpar")
    interleaved, plain = use_of(case, "megatron"), use_of(replace(case, schedule="1f1b"), "megatron")
    ratio = interleaved.layer_activations[0, 0] / plain.layer_activations[0, 0]
    assert ratio == pytest.approx(1 + (35 - 1) / (35 * 3))


def test_a_stage_keeps_as_many_microbatches_as_are_in_flight() -> None:
    case = replace(CASE, dims=ParallelDims(pp=4, dp_shard=2), global_batch=64)
    kept = use_of(case).layer_activations[:, 0]
    assert kept / kept[2] == pytest.approx([4, 3, 1])
    few = use_of(replace(case, global_batch=4)).layer_activations[:, 0]  # two microbatches in all
    assert few / few[2] == pytest.approx([2, 2, 1])


def test_states_divide_by_what_shards_them() -> None:
    one, eight = use_of(replace(CASE, dims=ParallelDims())), use_of(CASE)
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(one, part)[0, 0] == pytest.approx(8 * getattr(eight, part)[0, 0])
    assert one.weights[0, 0] == pytest.approx(4 * LLAMA_8B.params)
    context = use_of(replace(CASE, dims=ParallelDims(dp_shard=4, cp=2)))
    assert context.weights[0, 0] == eight.weights[0, 0]
    assert one.working_weights[0, 0] == pytest.approx(2 * LLAMA_8B.params)  # autocast's copies
    assert eight.working_weights[0, 0] < one.working_weights[0, 0] / 4


def test_experts_divide_by_expert_parallelism() -> None:
    shape = DecoderShape(1024, 8, 16, 32000, 4096, experts=16, experts_per_token=2)
    whole, split = (use_of(Case(shape, 1024, 16, 1, ParallelDims(dp_replicate=8, ep=ep))) for ep in (1, 8))
    experts = 8 * 16 * 3 * 1024 * 4096
    assert whole.weights[0, 0] - split.weights[0, 0] == pytest.approx(4 * experts * 7 / 8)
    assert whole.weights[0, 0] == pytest.approx(4 * shape.params)


def test_rare_or_coarse_exchanges_keep_more_for_it() -> None:
    plain, coarse, rare = (
        use_of(replace(CASE, synchronisation=kind)) for kind in ("synchronous", "quantized", "local")
    )  # type: ignore[arg-type]
    assert coarse.optimizer[0, 0] / plain.optimizer[0, 0] == pytest.approx(1.5)
    assert rare.optimizer[0, 0] / plain.optimizer[0, 0] == pytest.approx(2)


def test_a_pipeline_that_does_not_reshard_holds_whole_gradients() -> None:
    case = replace(CASE, dims=ParallelDims(pp=2, dp_shard=8))
    held = use_of(replace(case, reshard_after_forward=False)).gradients
    assert held[1, 0] == pytest.approx(8 * use_of(case).gradients[1, 0])


def test_ends_of_the_pipeline_hold_embedding_and_head() -> None:
    use = use_of(replace(CASE, dims=ParallelDims(pp=4)))
    table_bytes = 4 * 128256 * 4096
    assert use.weights[0, 0] - use.weights[1, 0] == pytest.approx(table_bytes, rel=1e-3)
    assert use.weights[2, 0] - use.weights[1, 0] == pytest.approx(table_bytes)


def test_parts_sum_to_the_peak_and_one_stage_is_all_three_classes() -> None:
    use = use_of(CASE)
    assert use.peak == pytest.approx(sum(getattr(use, part) for part in PARTS))
    assert (use.peak == use.peak[0]).all()
    assert use.allocator / (use.peak - use.allocator) == pytest.approx(FRAGMENTATION)


@pytest.mark.parametrize("software", SOFTWARE)
def test_more_recomputation_and_more_splitting_never_need_more(software: str) -> None:
    modes = [worst(replace(CASE, recompute=mode, microbatch=4), software) for mode in ("none", "selective", "full")]
    assert modes == sorted(modes, reverse=True)
    shards = [worst(replace(CASE, dims=ParallelDims(dp_shard=n)), software) for n in (2, 8, 64)]
    assert shards == sorted(shards, reverse=True)
    tensor = [worst(replace(CASE, dims=ParallelDims(tp=n), sequence_parallel=True), software) for n in (1, 2, 8)]
    assert tensor == sorted(tensor, reverse=True)
    rows = [worst(replace(CASE, microbatch=n), software) for n in (1, 2, 8)]
    assert rows == sorted(rows)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_kept_bytes_are_those_of_our_own_model(recompute: str, dtype: str) -> None:
    config = TransformerConfig(num_layers=2, hidden_size=512, num_heads=8, vocab_size=1000, recompute="none")
    batch, seq_len = 4, 256
    layers = next(b for b in workload(config, batch, {"seq_len": seq_len}, dtype).blocks if b.name == "blocks")
    shape = DecoderShape(512, 2, 8, 1000, config.mlp_width, config.kv_heads, config.head_width)
    case = Case(shape, seq_len, batch, batch, recompute=recompute, dtype=dtype)  # type: ignore[arg-type]
    copies = 2 * 2 * (shape.attention_params + shape.mlp_params) if dtype == "bf16" and recompute != "full" else 0
    own = layers.kept_bytes[recompute] * 2 - copies  # the planner books copied weights elsewhere
    assert use_of(case).layer_activations[0, 0] == pytest.approx(own, rel=0.10 if config.qk_norm else 0.05)


@pytest.mark.parametrize("name", memory_tables.COLUMNS)
def test_published_memory_is_predicted_within_five_percent(name: str) -> None:
    rows = table(name).rows
    errors = np.abs(memory_tables.predictions(rows) / np.array([row.value for row in rows]) - 1)
    assert errors.mean() <= 0.05


def test_no_published_peak_is_said_to_fit_in_less() -> None:
    for row in table("torchtitan_runs").rows:
        use = memory_bytes(Cases.of([row.case]), row.software)
        assert not use.fits(np.floor(row.value) * GIB)[0], row
        assert use.fits(row.device_gib * GIB)[0], row


def test_the_baselines_of_the_paper_do_not_fit_and_its_own_do() -> None:
    """arXiv:2205.05198, figure 1: without recomputation all four need well over the 80 GB of an A100."""
    for model in memory_tables.MEGATRON_CASES:
        base = memory_bytes(Cases.of([memory_tables.megatron_case(model, "none")]), MEGATRON)
        ours = memory_bytes(Cases.of([memory_tables.megatron_case(model, "selective+seqpar")]), MEGATRON)
        assert not base.fits(80 * GIB)[0]
        assert ours.fits(80 * GIB)[0]


def test_the_run_that_ran_out_of_memory_does_not_fit_and_its_half_does() -> None:
    """torchtitan's docs/performance.md: Llama 2 70B, selective, on 64 A100s: batches of 1 ran, 2 did not."""
    shape = DecoderShape(8192, 80, 64, 32000, 28672, 8, tied=False)
    for batch, fits in ((1, True), (2, False)):
        case = Case(shape, 4096, 64 * batch, batch, ParallelDims(dp_shard=64), recompute="selective")
        assert use_of(case, "torchtitan-2024").fits(80 * GIB)[0] == fits


def test_published_runs_that_ran_are_rarely_rejected() -> None:
    tables = pytest.importorskip("turbopump.planner.tables")
    if not (PUBLISHED / "mpt_throughput.csv").is_file():
        pytest.skip("the published tables are not beside this checkout")
    rows = tables.read(PUBLISHED / "mpt_throughput.csv").rows
    use = memory_bytes(Cases.of([row.case for row in rows]), SOFTWARE["foundry"])
    device = np.array([40 if "40gb" in row.choice else 80 for row in rows]) * GIB
    rejected = sum(not use_of(row.case, "foundry").fits(gib)[0] for row, gib in zip(rows, device, strict=True))
    assert rejected <= 0.05 * len(rows)
    assert use.peak.shape == (3, len(rows))


def test_a_device_without_memory_is_an_error() -> None:
    with pytest.raises(UsageError, match="memory_gib"):
        use_of(CASE).fits(0)


def test_many_cases_at_once_are_what_each_is_alone() -> None:
    cases = [CASE, replace(CASE, recompute="full", dims=ParallelDims(pp=4, dp_shard=2)), replace(CASE, dtype="fp32"),
             memory_tables.megatron_case("175B", "selective")]  # fmt: skip
    together = memory_bytes(Cases.of(cases)).peak
    assert together.shape == (3, 4)
    assert together.T.tolist() == [use_of(case).peak[:, 0].tolist() for case in cases]


@pytest.mark.parametrize(
    ("parallelism", "dims"),
    [
        ("FSDP8", ParallelDims(dp_shard=8)), ("FSDP4 TP2", ParallelDims(dp_shard=4, tp=2)),
        ("2D FSDP2, TP2, PP2", ParallelDims(dp_shard=2, tp=2, pp=2)), ("FSDP1 CP8", ParallelDims(cp=8)),
    ],
)  # fmt: skip
def test_torchtitan_rows_are_read(parallelism: str, dims: ParallelDims) -> None:
    row = {"model": "llama3-8B", "gpus": "8", "parallelism": parallelism, "seq_len": "", "local_batch": "4",
           "techniques": "FSDP+compile+float8", "act_ckpt": "full"}  # fmt: skip
    case = memory_tables.torchtitan_case(row)
    assert (case.dims, case.seq_len, case.compiled, case.dtype) == (dims, 8192, True, "fp8")
    assert case.microbatch == 4 // dims.pp
    assert np.isfinite(worst(case, "torchtitan"))


def test_rows_not_understood_are_problems_and_missing_columns_errors(tmp_path: Path) -> None:
    path = tmp_path / "megatron_memory.csv"
    path.write_text("model,recompute,quantity,value,unit\n9B,none,activations,1,GiB\n22B,half,activations,1,GiB\n"
                    "22B,none,heat,1,GiB\n22B,none,activations,59,GiB\n")  # fmt: skip
    read = memory_tables.read(path)
    assert len(read.rows) == 1
    assert [problem.partition(" ")[0] for problem in read.problems] == [f"megatron_memory.csv:{n}:" for n in (2, 3, 4)]
    path.write_text("model,value\n")
    with pytest.raises(UsageError, match="lacks recompute, quantity, unit"):
        memory_tables.read(path)
    with pytest.raises(UsageError, match="no such table"):
        memory_tables.read(tmp_path / "other.csv")
    with pytest.raises(UsageError, match="cannot read"):
        memory_tables.read(tmp_path / "torchtitan_runs.csv")
