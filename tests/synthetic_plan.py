"""A plan as a search would leave it, made by hand: two splits compared over hundreds of candidates."""

from dataclasses import replace

from turbopump.planner.cases import DecoderShape, ParallelDims
from turbopump.planner.choice import Alternative, Change, Choice, Found, Settings
from turbopump.planner.plan_file import Inputs, PlanFile, Prediction, Sizes
from turbopump.reporting.plan_page import PlanView, ScalePoint

GIB = 2**30
SHAPE = DecoderShape(12288, 96, 96, 51200, 49152, gated=False, learned_positions=2048, biases=True, name="gpt3-175b")
PARTS = ("weights", "gradients", "optimizer", "working_weights", "activations", "transient", "allocator")


def choice(pp=8, tp=8, microbatch=2, *, times=1.0, recompute="selective", peak_gib=61.0, dtype="bf16"):
    dims = ParallelDims(pp=pp, dp_replicate=1024 // (pp * tp), tp=tp)
    settings = Settings(1024, 8, dtype, microbatch, 1536 // (microbatch * dims.dp), recompute, "interleaved", 4)
    breakdown = {"data": 0.0, "compute": 9.1 * times, "exposed_communication": 1.6 * times, "bubble": 0.9 * times,
                 "optimizer": 0.12 * times, "other": 0.03 * times}  # fmt: skip
    return Choice(dims, settings, breakdown, 0.06, peak_gib * GIB)


def plan(name="gpt3-175b"):
    best = choice()
    memory = {
        stage: dict(zip(PARTS, (v * GIB * share for v in (5.4, 5.4, 10.8, 2.7, 24.0, 4.1, 2.1)), strict=True))
        for stage, share in (("first", 1.1), ("middle", 0.9), ("last", 1.05))
    }
    return PlanFile(
        1, "0.1", "2026-11-23T16:00:00+00:00", Inputs("recipe.toml", "1" * 16, "h100", "2" * 16),
        Sizes(name, SHAPE.params, "token", 1536 * 2048, 1536, 1000, 2048), best.dims,
        best.settings,
        Prediction(best.step_s, best.low_s, best.high_s, 1536 * 2048 / best.step_s, 0.32, best.breakdown), memory,
        {"wall_s": 12e3, "usd": 8.9e3, "kwh": 3.1e4, "goodput": 0.96, "checkpoint_interval_s": 1800.0},
    )  # fmt: skip


def found():
    best = choice()
    rows = []
    for pp in (1, 2, 4, 8, 16):
        for tp in (1, 2, 4, 8):
            for microbatch in (1, 2, 4):
                dims = {"pp": pp, "dp_replicate": 1024 // (pp * tp), "dp_shard": 1, "cp": 1, "tp": tp, "ep": 1}
                off = 1 + 0.2 * abs(pp - 8) / 8 + 0.1 * abs(tp - 8) / 4 + 0.04 * abs(microbatch - 2)
                rows.append({**dims, "microbatch": microbatch, "recompute": "selective", "step_s": best.step_s * off,
                             "peak_bytes": 61 * GIB * (8 * 8 / (pp * tp)) ** 0.15 * microbatch**0.2})  # fmt: skip
    rows.sort(key=lambda row: row["step_s"])
    other = choice(16, 4, 1, times=1.06, recompute="full", peak_gib=44)
    changes = (
        Change("the network at half the rate", "machine", other, 0.04, True),
        Change("10 % more memory", "machine", best, 0.0, False),
        Change("10 % less memory", "machine", None, 0.0, True),
        Change("products in fp8", "training", choice(times=0.7, dtype="fp8"), 0.3, True),
    )
    alternatives = (Alternative("tp", 4, 0.06), Alternative("tp", 1, None), Alternative("microbatch", 4, 0.08))
    return Found(best, other, 1.3, 41_000, 900, alternatives, changes, tuple(rows))


def build(**changes):
    points = tuple(
        ScalePoint(n, 11.75 * (1024 / n) ** 0.92, 11750 * (1024 / n) ** 0.92, 8900 * (n / 1024) ** 0.08,
                   31e3 * (n / 1024) ** 0.1, f"tp 8, pp {max(1, n // 128)}")
        for n in (256, 512, 1024, 2048, 4096)
    )  # fmt: skip
    view = PlanView(plan(), found(), "NVIDIA H100 SXM x 1,024, InfiniBand NDR", 80e9, points)
    return replace(view, **changes)
