"""Machine profiles as `probe` leaves them, made in milliseconds from simple laws (saturating rates, cache levels,
latency and bandwidth) with a seeded scatter. `build()` is the page to look at; its options make the odd ones."""

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np

from turbopump.compute.ops import (
    Attention,
    BatchedGemm,
    Conv2d,
    CrossEntropy,
    Elementwise,
    Embedding,
    Gemm,
    Norm,
    OptimizerStep,
    Rnn,
)
from turbopump.core.workload import Op
from turbopump.hardware.profile import SCHEMA, Curve, Domain, MachineProfile, Measurement
from turbopump.hardware.specs import DeviceSpec

DOMAINS: tuple[Domain, ...] = ("compute", "memory", "host", "comms", "data")
ONEDNN = "mkldnn.matmul.fp32_precision=bf16"
# the best rate of a route, FLOP/s, and the relative error of its products
GEMM_ROUTES = {
    "fp32": {"default": (101e9, 1.9e-7), ONEDNN: (176e9, 2.6e-7)},
    "bf16": {"default": (340e9, 2.3e-3), "onednn, packed weight": (362e9, 2.3e-3)},
    "fp16": {"default": (46e9, 2.9e-4)},
    "int8": {"default": (588e9, 6.1e-3)},
}
PAPER = {"fp32": 200e9, "bf16": 400e9, "fp16": 400e9, "int8": 800e9}
CONV_ROUTES = {"default": 88e9, "channels_last": 131e9, "fft": 9e9, "winograd": 150e9}
LEVELS = ((48e3, 190e9), (1e6, 96e9), (16e6, 41e9), (float("inf"), 17.5e9))  # bytes that fit, bytes a second


class Maker:
    """Rows with a scatter that is the same in every test."""

    def __init__(self, seed: int = 5, *, threads: int = 1, texts: str = "") -> None:
        self.random = np.random.default_rng(seed)
        self.threads, self.texts = threads, texts

    def row(self, domain: Domain, op: Op | tuple[str, dict[str, Any]], route: str, ideal_s: float, *,
            flops: float = 0.0, bytes: float = 0.0, spread: float = 0.04, **more: Any) -> Measurement:  # fmt: skip
        if isinstance(op, Op):
            kind, values = type(op).__name__, {f.name: getattr(op, f.name) for f in fields(op)}
            flops, bytes = op.cost.flops, op.cost.bytes
        else:
            kind, values = op
        if domain == "compute":
            values = {**values, **({"dtype": self.texts} if self.texts and "dtype" in values else {})}
        fastest = ideal_s * float(self.random.lognormal(0.02, 0.03))
        width = spread * float(self.random.lognormal(0, 0.6))
        return Measurement(
            domain, kind, values, route if route == "default" else route + self.texts, self.threads, "cpu",
            clock="thread_cpu" if domain in ("compute", "memory") else "wall", runs=20, calls=12,
            min_s=fastest, median_s=fastest * (1 + width / 2), p90_s=fastest * (1 + width),
            wall_s=fastest * (1 + width), waited=float(self.random.uniform(0, 0.05)),
            flops=flops, bytes=bytes, library="torch 2.9.0" + self.texts, **more,
        )  # fmt: skip


def rate(flops: float, peak: float, half: float) -> float:
    """A rate that is half the peak where an operation has `half` FLOPs."""
    return peak * flops / (flops + half)


def bandwidth(size: float) -> float:
    """Bytes a second of a working set, smooth between the cache levels."""
    found, before = LEVELS[-1][1], None
    for fits, speed in reversed(LEVELS):
        if before is not None:
            found += (speed - before) / (1 + (size / fits) ** 4)
        before = speed
    return found


def compute_rows(make: Maker) -> Iterator[Measurement]:
    yield from gemm_rows(make)
    yield from conv_rows(make)
    for batch in (1, 16, 64):
        for hidden in (256, 512, 1024):
            for dtype, peak in (("fp32", 80e9), ("bf16", 120e9)):
                for backward in (False, True):
                    op = Rnn("lstm", batch, 25, hidden, hidden, False, dtype, backward)
                    reached = rate(op.cost.flops, peak, 4e8 / batch**0.5) * batch / (batch + 8)
                    yield make.row("compute", op, "default", op.cost.flops / reached, error=3e-7)
                    if dtype == "fp32":
                        yield make.row("compute", op, "mkldnn.rnn", op.cost.flops / (1.4 * reached), error=3e-7)
    for length in (64, 256, 1024, 2048):
        for dtype, peak in (("fp32", 62e9), ("bf16", 100e9)):
            for backward in (False, True):
                attention = Attention(4, 8, 8, length, length, 64, True, dtype, backward)
                reached = rate(attention.cost.flops, peak, 3e7)
                yield make.row("compute", attention, "flash", attention.cost.flops / reached, error=4e-7)
                yield make.row("compute", attention, "default", 1.6 * attention.cost.flops / reached, error=4e-7)
    for elements in (1 << 10, 1 << 14, 1 << 18, 1 << 22):
        dim = 256
        for dtype in ("fp32", "bf16"):
            moving: tuple[tuple[Op, float], ...] = (
                (Elementwise("gelu", elements, 1, 1, dtype), 0.5),
                (Norm("layer", elements // dim, dim, dtype), 0.7),
                (CrossEntropy(elements // dim, dim, dtype), 0.35),
                (Embedding(elements // dim, 32_000, dim, dtype), 0.6),
                (OptimizerStep("adamw", elements), 0.9),
            )
            for op, share in moving:
                if isinstance(op, OptimizerStep) and dtype != "fp32":
                    continue
                seconds = 2e-6 + op.cost.bytes / (share * bandwidth(op.cost.bytes))
                yield make.row("compute", op, "default", seconds)
                if isinstance(op, (Elementwise, Norm)):
                    yield make.row("compute", op, "inductor", 0.8 * seconds)


def gemm_rows(make: Maker) -> Iterator[Measurement]:
    shapes = [(m, n, n) for m in (1, 16, 128, 1024) for n in (128, 512, 1024, 2048)]
    for dtype, routes in GEMM_ROUTES.items():
        for m, n, k in shapes:
            op = Gemm(m, n, k, dtype)
            for route, (peak, error) in routes.items():
                reached = min(rate(op.cost.flops, peak, 2e6) * m / (m + 2), peak)
                seconds = max(op.cost.flops / reached, op.cost.bytes / bandwidth(op.cost.bytes))
                yield make.row("compute", op, route, seconds, error=error,
                               peak_share=op.cost.flops / seconds / PAPER[dtype])  # fmt: skip
    reduced = make.row("compute", Gemm(1024, 1024, 1024, "fp32"), "bf16 inside", 0.008, error=2.4e-3)
    yield replace(reduced, problem="not exact fp32: relative error 2.4e-03, allowed 2e-06")
    fp8 = make.row("compute", Gemm(1024, 1024, 1024, "fp8"), "default", 1.0)
    yield replace(fp8, min_s=None, median_s=None, p90_s=None, wall_s=None, runs=0,
                  problem='does not run: "addmm_impl_cpu_" not implemented for Float8_e4m3fn')  # fmt: skip
    for batch in (8, 64):
        for n in (64, 256, 512):
            batched = BatchedGemm(batch, n, n, n, "fp32")
            yield make.row("compute", batched, "default", batched.cost.flops / rate(batched.cost.flops, 92e9, 4e6))


def conv_rows(make: Maker) -> Iterator[Measurement]:
    for channels, size in ((3, 112), (32, 56), (64, 28), (128, 14)):
        for kernel in (1, 3, 5):
            for direction in ("forward", "input_gradient", "weight_gradient"):
                op = Conv2d(8, channels, size, size, 2 * channels, kernel, kernel, 1, 1, kernel // 2, kernel // 2,
                            "fp32", direction=direction)  # type: ignore[arg-type]  # fmt: skip
                for route, peak in CONV_ROUTES.items():
                    if route == "winograd" and (kernel != 3 or direction != "forward"):
                        continue
                    factor = 1.0 if direction == "forward" else 0.7
                    reached = rate(op.cost.flops, peak * factor * channels / (channels + 6), 8e6)
                    yield make.row("compute", op, route, op.cost.flops / reached, error=4e-7, spread=0.09)


def memory_rows(make: Maker) -> Iterator[Measurement]:
    for exponent in range(13, 29):
        size = 1 << exponent
        copied = {"bytes": size}  # of each array
        yield make.row(
            "memory", ("MemoryCopy", copied), "default", 2e-7 + 2 * size / bandwidth(2 * size), bytes=2.0 * size
        )
        yield make.row(
            "memory",
            ("MemoryTriad", copied),
            "default",
            2e-7 + 3 * size / (0.9 * bandwidth(3 * size)),
            bytes=3.0 * size,
        )
    for row_bytes in (64, 512, 4096):
        for exponent in (16, 20, 24, 28):
            table_rows = (1 << exponent) // row_bytes
            rows = min(table_rows, 65_536)
            op = {"rows": rows, "table_rows": table_rows, "row_bytes": row_bytes}
            speed = bandwidth(1 << exponent) * row_bytes / (row_bytes + 300)
            moved = 2.0 * rows * row_bytes
            yield make.row("memory", ("Gather", op), "default", moved / speed, bytes=moved)


def host_rows(make: Maker) -> Iterator[Measurement]:
    for name, seconds in (("empty", 0.9e-6), ("add", 1.7e-6), ("linear", 4.6e-6), ("layer_norm", 3.9e-6)):
        yield make.row("host", ("Launch", {"name": name}), "default", seconds)


def comms_rows(make: Maker) -> Iterator[Measurement]:
    laws = {"AllReduce": (90e-6, 2.4e9, 1.0), "AllGather": (70e-6, 3.1e9, 0.5), "ReduceScatter": (80e-6, 2.7e9, 0.5),
            "Broadcast": (45e-6, 3.8e9, 1.0), "AllToAll": (110e-6, 1.6e9, 0.5),
            "Send": (30e-6, 4.0e9, 1.0)}  # fmt: skip
    for kind, (latency_s, speed, share) in laws.items():
        for exponent in range(10, 27, 2):
            size = 1 << exponent
            op = {"bytes": size, "ranks": 2, "level": "node", "dtype": "fp32"}
            seconds = latency_s + size * share / speed
            yield make.row("comms", (kind, op), "gloo", seconds, bytes=size * share, spread=0.2)
    for exponent in range(10, 27, 4):
        op = {"bytes": 1 << exponent, "ranks": 2, "level": "node", "dtype": "fp32"}
        yield make.row("comms", ("AllReduce", op), "mpi", 25e-6 + (1 << exponent) / 3.3e9, bytes=1 << exponent)
    barrier = {"ranks": 2, "level": "node"}
    yield make.row("comms", ("Barrier", barrier), "gloo", 85e-6, spread=0.2)
    overlap = {"bytes": 1 << 24, "ranks": 2}
    yield make.row("comms", ("Overlap", overlap), "gloo", 0.02,
                   facts={"slowdown_compute": 1.21, "slowdown_comm": 1.64})  # fmt: skip


def data_rows(make: Maker) -> Iterator[Measurement]:
    for cached, engine, ceiling, latency_s in ((True, "pread", 4.1e9, 2e-6), (False, "io_uring", 1.3e9, 95e-6)):
        for depth in (1, 4, 16):
            for size in (512, 4096, 32_768, 262_144, 1_048_576):
                op = {"bytes": size, "depth": depth, "cached": cached}
                seconds = max(latency_s / min(depth, 2 if cached else 12), size / ceiling) + size / ceiling / 4
                yield make.row("data", ("RandomRead", op), engine, seconds, bytes=size, spread=0.15,
                               facts={"engine": engine})  # fmt: skip
        for size in (65_536, 1_048_576):
            op = {"bytes": size, "depth": 1, "cached": cached}
            yield make.row("data", ("SequentialRead", op), engine, size / ceiling, bytes=size, facts={"engine": engine})
    for size in (1 << 24, 1 << 28):
        yield make.row("data", ("CheckpointWrite", {"bytes": size}), "fsync", size / 0.9e9, bytes=size)


MAKERS = {"compute": compute_rows, "memory": memory_rows, "host": host_rows, "comms": comms_rows, "data": data_rows}
DEVICE = DeviceSpec("AMD EPYC 9654", {"fp32": 200e9, "bf16": 400e9}, memory_bytes=25_300_000_000, clock_hz=3.7e9,
                    provenance="measured")  # fmt: skip


def build(domains: tuple[str, ...] = DOMAINS, *, texts: str = "", copies: int = 1, **more: Any) -> MachineProfile:
    """A profile with the rows of `domains`; `copies` > 1 gives each a slightly other shape, `texts` is put wherever a
    file may hold text."""
    rows: list[Measurement] = []
    for copy in range(copies):
        make = Maker(copy, texts=texts)
        for domain in domains:
            for row in MAKERS[domain](make):
                size = next((k for k in ("m", "batch", "elements", "bytes", "rows") if k in row.op), "")
                op = {**row.op, size: int(row.op[size]) + copy} if size and copy else row.op
                rows.append(replace(row, op=op))
    noisy = sum(row.noisy for row in rows if row.works) / max(1, len(rows))
    values: dict[str, Any] = {
        "schema": SCHEMA, "written_by": "0.1.0", "date": "2026-03-14T09:26:53+00:00", "name": "AMD EPYC 9654, 2 cores",
        "provenance": "measured", "fingerprint": "a1b2c3d4e5f60718",
        "machine": {"host": "node-1", "cpu": "AMD EPYC 9654 96-Core Processor", "num_cores": 2,
                    "memory_bytes": 25_300_000_000, "cache_bytes": {"L1": 32_768, "L2": 1 << 20, "L3": 32 << 20}},
        "software": {"torch": "2.9.0", "mkl": "2024.2", "onednn": "3.7.1"},
        "devices": (DEVICE,), "rows": tuple(rows),
        "quality": {"spread": 0.038, "waited": 0.024, "noisy": noisy},
        "left_out": ("convolutions in bf16: 96 trials", "LSTM of 2048 units: 6 trials"),
        "uncertain": ("the page cache could not be dropped (no permission): cold reads went around it with O_DIRECT",),
        "request": {"budget_s": 300, "suite": "generic", "domains": list(domains), "threads": [1]},
    }  # fmt: skip
    if texts:
        values |= dict(name=texts, date=texts, machine={texts: texts, "cpu": texts}, software={texts: texts},
                       left_out=(texts,), uncertain=(texts,), fingerprint=texts)  # fmt: skip
    return MachineProfile(**(values | more))


def datasheet() -> MachineProfile:
    """An accelerator known from its datasheet, with the curves of a relative."""
    device = DeviceSpec("NVIDIA H100 SXM", {"fp32": 67e12, "tf32": 495e12, "bf16": 989e12, "fp8": 1979e12},
                        memory_bytes=80_000_000_000, memory_bytes_per_s=3.35e12, power_w=700.0, clock_hz=1.83e9,
                        source="NVIDIA H100 datasheet", relative="NVIDIA A100 SXM")  # fmt: skip
    curves = tuple(
        Curve(kind, dtype, {"launch_s": 4e-6, "efficiency": 0.82, "half_m": 90.0,
              "half_n": 60.0, "half_k": 40.0, "memory_share": 0.8}, "NVIDIA A100 SXM", "published measurements", 0.09)
        for kind in ("Gemm", "Conv2d", "Rnn") for dtype in ("tf32", "bf16")
    )  # fmt: skip
    return MachineProfile(
        SCHEMA,
        "0.1.0",
        "2026-03-14T09:26:53+00:00",
        "NVIDIA H100 SXM",
        "datasheet",
        "",
        {},
        {},
        (device,),
        curves=curves, uncertain=("Gemm in bf16: as NVIDIA A100 SXM reaches it, which has 0.32 of the peak",),
    )  # fmt: skip
