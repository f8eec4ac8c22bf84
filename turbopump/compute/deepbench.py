"""DeepBench's training operations as this domain's: the shapes of Baidu's benchmark, without torch.

Restated from baidu-research/DeepBench (Apache-2.0): `code/kernels/{gemm,conv,rnn}_problems.h`, training sets, as its
published results of 2016 to 2018 list them. Its products are column-major BLAS calls `C[M, N] = op(A) op(B)`; the
same memory read row by row is `C[N, M] = op(B) op(A)`. Its recurrent layers have as many inputs as hidden units and
one direction, its backward is measured as two calls (inputs, weights), which are one operation here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal

from turbopump.compute.ops import Conv2d, Gemm, Rnn
from turbopump.core.workload import Op

TRANSPOSED = {"N": "n", "T": "t"}
CELLS: dict[str, Literal["vanilla", "gru", "lstm"]] = {"Vanilla": "vanilla", "GRU": "gru", "LSTM": "lstm"}


def gemm(m: int, n: int, k: int, a: str, b: str, dtype: str = "fp32") -> Gemm:
    """The product of a line of its table: M, N, K, and whether A and B are transposed ("N", "T")."""
    return Gemm(n, m, k, dtype, TRANSPOSED[b] + TRANSPOSED[a])  # type: ignore[arg-type]


def convolution(
    w: int, h: int, c: int, n: int, k: int, s: int, r: int, pad_w: int, pad_h: int, stride_w: int, stride_h: int,
    dtype: str = "fp32",
) -> Conv2d:  # fmt: skip
    """The forward convolution of a line: image W, H, channels C, batch N, filters K of width S and height R."""
    return Conv2d(n, c, h, w, k, r, s, stride_h, stride_w, pad_h, pad_w, dtype)


def recurrent(cell: str, hidden: int, batch: int, steps: int, dtype: str = "fp32") -> Rnn:
    """The forward of a line: "Vanilla", "GRU" or "LSTM"."""
    return Rnn(CELLS[cell], batch, steps, hidden, hidden, False, dtype)


# M, K, transposed A, transposed B: values of N
GEMMS: tuple[tuple[int, int, str, str, tuple[int, ...]], ...] = (
    (35, 1760, "N", "N", (8457,)), (35, 1760, "T", "N", (8457,)), (35, 2048, "N", "N", (8457,)),
    (35, 2048, "T", "N", (8457,)), (35, 2560, "N", "N", (8457,)), (35, 2560, "T", "N", (8457,)),
    (35, 4096, "N", "N", (8457,)), (35, 4096, "T", "N", (8457,)), (512, 512, "N", "N", (16, 32)),
    (512, 512, "N", "T", (16, 32)), (512, 1530, "N", "N", (24000, 48000)), (512, 1530, "T", "N", (24000, 48000)),
    (512, 2048, "N", "N", (24000, 48000)), (512, 2048, "T", "N", (24000, 48000)), (512, 2560, "N", "N", (24000, 48000)),
    (512, 2560, "T", "N", (24000, 48000)), (512, 2816, "N", "N", (24000, 48000)), (512, 2816, "T", "N", (24000, 48000)),
    (512, 500000, "N", "N", (8, 16)), (512, 500000, "T", "N", (8, 16)), (1024, 512, "N", "N", (16, 32, 700)),
    (1024, 512, "N", "T", (16, 32)), (1024, 512, "T", "N", (700,)), (1024, 1530, "N", "N", (24000, 48000)),
    (1024, 1530, "T", "N", (24000, 48000)), (1024, 2048, "N", "N", (24000, 48000)),
    (1024, 2048, "T", "N", (24000, 48000)), (1024, 2560, "N", "N", (24000, 48000)),
    (1024, 2560, "T", "N", (24000, 48000)), (1024, 2816, "N", "N", (24000, 48000)),
    (1024, 2816, "T", "N", (24000, 48000)), (1024, 500000, "N", "N", (8, 16)), (1024, 500000, "T", "N", (8, 16)),
    (1760, 1760, "N", "N", (16, 32, 64, 128, 7000)), (1760, 1760, "N", "T", (7133,)),
    (1760, 1760, "T", "N", (16, 32, 64, 128, 7000)), (2048, 2048, "N", "N", (16, 32, 64, 128, 7000)),
    (2048, 2048, "N", "T", (6574, 7133)), (2048, 2048, "T", "N", (16, 32, 64, 128, 7000)),
    (2560, 2560, "N", "N", (16, 32, 64, 128, 7000)), (2560, 2560, "N", "T", (7133, 10376)),
    (2560, 2560, "T", "N", (16, 32, 64, 128, 7000)), (3072, 1024, "N", "N", (16, 32, 64, 128, 24000, 48000)),
    (3072, 1024, "N", "T", (7435,)), (3072, 1024, "T", "N", (16, 32, 64, 128, 24000, 48000)),
    (4096, 4096, "N", "N", (16, 32, 64, 128, 7000)), (4096, 4096, "N", "T", (7133, 8935)),
    (4096, 4096, "T", "N", (16, 32, 64, 128, 7000)), (4608, 1536, "N", "N", (16, 32, 24000, 48000)),
    (4608, 1536, "T", "N", (16, 32, 24000, 48000)), (5124, 1760, "N", "N", (9124,)), (5124, 1760, "T", "N", (9124,)),
    (5124, 2048, "N", "N", (9124,)), (5124, 2048, "T", "N", (9124,)), (5124, 2560, "N", "N", (9124,)),
    (5124, 2560, "T", "N", (9124,)), (5124, 4096, "N", "N", (9124,)), (5124, 4096, "T", "N", (9124,)),
    (6144, 2048, "N", "N", (16, 32, 24000, 48000)), (6144, 2048, "T", "N", (16, 32, 24000, 48000)),
    (7680, 2560, "N", "N", (16, 32, 64, 128, 24000, 48000)), (7680, 2560, "N", "T", (5481,)),
    (7680, 2560, "T", "N", (16, 32, 64, 128, 24000, 48000)), (8448, 2816, "N", "N", (16, 32, 24000, 48000)),
    (8448, 2816, "T", "N", (16, 32, 24000, 48000)),
)  # fmt: skip

# W, H, C, K, S, R, pad W, pad H, stride W, stride H: values of N
CONVOLUTIONS: tuple[tuple[int, int, int, int, int, int, int, int, int, int, tuple[int, ...]], ...] = (
    (7, 7, 256, 512, 3, 3, 1, 1, 1, 1, (8,)), (7, 7, 512, 512, 1, 1, 0, 0, 1, 1, (8, 16)),
    (7, 7, 512, 512, 3, 3, 1, 1, 1, 1, (8, 16)), (7, 7, 512, 2048, 1, 1, 0, 0, 1, 1, (8, 16)),
    (7, 7, 832, 128, 5, 5, 2, 2, 1, 1, (16,)), (7, 7, 832, 256, 1, 1, 0, 0, 1, 1, (16,)),
    (7, 7, 2048, 512, 1, 1, 0, 0, 1, 1, (8, 16)), (7, 7, 2048, 512, 1, 1, 3, 3, 2, 2, (8, 16)),
    (14, 14, 128, 256, 3, 3, 1, 1, 1, 1, (8,)), (14, 14, 256, 256, 1, 1, 0, 0, 1, 1, (8, 16)),
    (14, 14, 256, 256, 3, 3, 1, 1, 1, 1, (8, 16)), (14, 14, 256, 1024, 1, 1, 0, 0, 1, 1, (8, 16)),
    (14, 14, 256, 1024, 1, 1, 0, 0, 2, 2, (8, 16)), (14, 14, 512, 48, 5, 5, 2, 2, 1, 1, (16,)),
    (14, 14, 512, 192, 1, 1, 0, 0, 1, 1, (16,)), (14, 14, 512, 512, 3, 3, 1, 1, 1, 1, (8, 16)),
    (14, 14, 1024, 256, 1, 1, 0, 0, 1, 1, (8, 16)), (14, 14, 1024, 512, 1, 1, 0, 0, 2, 2, (8, 16)),
    (14, 14, 1024, 2048, 1, 1, 0, 0, 2, 2, (8, 16)), (27, 27, 128, 128, 3, 3, 1, 1, 1, 1, (8,)),
    (28, 28, 128, 128, 3, 3, 1, 1, 1, 1, (8, 16)), (28, 28, 128, 512, 1, 1, 0, 0, 1, 1, (8, 16)),
    (28, 28, 128, 512, 1, 1, 0, 0, 2, 2, (8, 16)), (28, 28, 192, 32, 5, 5, 2, 2, 1, 1, (16,)),
    (28, 28, 192, 64, 1, 1, 0, 0, 1, 1, (16,)), (28, 28, 256, 512, 3, 3, 1, 1, 1, 1, (8, 16)),
    (28, 28, 512, 128, 1, 1, 0, 0, 1, 1, (8, 16)), (28, 28, 512, 256, 1, 1, 0, 0, 2, 2, (8, 16)),
    (28, 28, 512, 1024, 1, 1, 0, 0, 2, 2, (8, 16)), (42, 10, 512, 512, 3, 3, 1, 1, 1, 1, (16,)),
    (54, 54, 64, 64, 3, 3, 1, 1, 1, 1, (8,)), (56, 56, 64, 64, 3, 3, 1, 1, 1, 1, (8, 16)),
    (56, 56, 64, 256, 1, 1, 0, 0, 1, 1, (8, 16)), (56, 56, 64, 256, 1, 1, 0, 0, 2, 2, (8, 16)),
    (56, 56, 128, 256, 3, 3, 1, 1, 1, 1, (8, 16)), (56, 56, 256, 64, 1, 1, 0, 0, 1, 1, (8, 16)),
    (56, 56, 256, 128, 1, 1, 0, 0, 2, 2, (8, 16)), (60, 6, 64, 128, 3, 3, 1, 1, 1, 1, (16,)),
    (84, 20, 256, 256, 3, 3, 1, 1, 1, 1, (16,)), (84, 20, 256, 512, 5, 5, 1, 1, 2, 2, (16,)),
    (108, 108, 3, 64, 3, 3, 1, 1, 2, 2, (8,)), (112, 112, 64, 64, 1, 1, 0, 0, 1, 1, (8, 16)),
    (112, 112, 64, 128, 3, 3, 1, 1, 1, 1, (8, 16)), (120, 12, 32, 64, 3, 3, 1, 1, 1, 1, (16,)),
    (175, 40, 128, 128, 3, 3, 1, 1, 1, 1, (16,)), (175, 40, 128, 256, 5, 5, 1, 1, 2, 2, (16,)),
    (224, 224, 3, 64, 3, 3, 1, 1, 1, 1, (8, 16)), (224, 224, 3, 64, 7, 7, 3, 3, 2, 2, (16,)),
    (240, 24, 16, 32, 3, 3, 1, 1, 1, 1, (16,)), (341, 79, 32, 32, 10, 5, 0, 0, 2, 2, (4, 8, 16, 32)),
    (350, 80, 64, 64, 3, 3, 1, 1, 1, 1, (16,)), (350, 80, 64, 128, 5, 5, 1, 1, 2, 2, (16,)),
    (480, 48, 1, 16, 3, 3, 1, 1, 1, 1, (16,)), (700, 161, 1, 32, 20, 5, 0, 0, 2, 2, (4, 8, 16, 32)),
    (700, 161, 1, 64, 5, 5, 1, 1, 2, 2, (16,)),
)  # fmt: skip

# cell, hidden, steps: values of the batch
RECURRENT: tuple[tuple[str, int, int, tuple[int, ...]], ...] = (
    ("GRU", 512, 1, (32,)), ("GRU", 1024, 1500, (32, 64)), ("GRU", 1536, 187, (32,)), ("GRU", 1536, 375, (32,)),
    ("GRU", 1536, 750, (32,)), ("GRU", 1536, 1500, (32,)), ("GRU", 2048, 187, (32,)), ("GRU", 2048, 375, (32,)),
    ("GRU", 2048, 750, (32,)), ("GRU", 2048, 1500, (32,)), ("GRU", 2560, 187, (32,)), ("GRU", 2560, 375, (32,)),
    ("GRU", 2560, 750, (32,)), ("GRU", 2560, 1500, (32,)), ("GRU", 2816, 187, (32,)), ("GRU", 2816, 375, (32,)),
    ("GRU", 2816, 750, (32,)), ("GRU", 2816, 1500, (32,)), ("LSTM", 256, 150, (16, 32, 64)),
    ("LSTM", 512, 25, (16, 32, 64, 128)), ("LSTM", 1024, 25, (16, 32, 64, 128)), ("LSTM", 1536, 50, (8, 16, 32)),
    ("LSTM", 2048, 25, (16, 32, 64, 128)), ("LSTM", 4096, 25, (16, 32, 64, 128)),
    ("Vanilla", 1760, 50, (16, 32, 64, 128)), ("Vanilla", 2048, 50, (16, 32, 64, 128)),
    ("Vanilla", 2560, 50, (16, 32, 64, 128)),
)  # fmt: skip


def ops(dtypes: tuple[str, ...] = ("fp32",)) -> list[Op]:
    """Every operation of training, forward and backward, the cheapest first."""
    found = [op for dtype in dtypes for op in _ops(dtype)]
    return sorted(found, key=lambda op: op.cost.flops)


def _ops(dtype: str) -> Iterator[Op]:
    for m, k, a, b, sizes in GEMMS:
        yield from (gemm(m, n, k, a, b, dtype) for n in sizes)
    for w, h, c, filters, s, r, pad_w, pad_h, stride_w, stride_h, sizes in CONVOLUTIONS:
        for n in sizes:
            op = convolution(w, h, c, n, filters, s, r, pad_w, pad_h, stride_w, stride_h, dtype)
            yield from (op, replace(op, direction="input_gradient"), replace(op, direction="weight_gradient"))
    for cell, hidden, steps, batches in RECURRENT:
        for batch in batches:
            layer = recurrent(cell, hidden, batch, steps, dtype)
            yield from (layer, replace(layer, backward=True))
