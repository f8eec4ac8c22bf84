"""The shapes that are measured where no recipe asks for its own: log-spaced, forward and backward, without torch.

Tier 0 is the least that tells machines apart (20 s), tier 1 what curves are fitted to (5 minutes), tier 2 fills
the gaps (an hour). Sizes are those that deep learning uses, powers of two and others (100, 1000, 1760, 2560, as in
DeepBench: libraries treat them differently), small batches and large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from turbopump.compute.ops import (
    Attention,
    BatchedGemm,
    Conv1d,
    Conv2d,
    CrossEntropy,
    Ctc,
    Elementwise,
    Embedding,
    Fft,
    Gather,
    Gemm,
    Launch,
    Layout,
    MemoryCopy,
    MemoryTriad,
    Norm,
    OptimizerStep,
    Rnn,
)
from turbopump.core.workload import Op

Tiered = tuple[Op, int]
LAYOUTS: tuple[Layout, ...] = ("nt", "nn", "tn")  # forward, gradient of the input, gradient of the weight
KIB, MIB = 2**10, 2**20


def grid(device: str) -> list[Tiered]:
    """Operations with their tier for a kind of device ("cpu", "cuda"), the lower tiers first."""
    main: tuple[str, ...] = ("fp32", "bf16")
    others: tuple[str, ...] = ("int8", "fp16", "fp8", "fp64")
    if device == "cuda":
        main, others = ("bf16", "fp32"), ("tf32", "fp16", "fp8", "int8", "fp64")
    larger = 4 if device == "cuda" else 1
    found: dict[Op, int] = {}
    for op, tier in (
        *_launches(), *_products(main, others, larger), *_convolutions(main, larger), *_recurrent(main, larger),
        *_attention(main, larger), *_memory(device), *_transforms(larger), *_moving(main, larger),
    ):  # fmt: skip
        found[op] = min(tier, found.get(op, tier))
    return sorted(found.items(), key=lambda item: item[1])


def _launches() -> Iterator[Tiered]:
    for name in ("add", "linear", "autograd"):
        yield Launch(name), 0  # type: ignore[arg-type]


# m, n, k of layers and their gradients; batches of 16 to 128 rows as recurrent layers and decoding have them
GEMMS = (
    (128, 128, 128), (512, 512, 512), (1024, 1024, 1024), (16, 2560, 2560), (64, 1760, 1760), (2048, 512, 512),
    (256, 256, 4096), (100, 1000, 512), (512, 2048, 512), (64, 64, 1024),
)  # fmt: skip
MORE_GEMMS = (
    (16, 16, 16), (32, 1024, 1024), (128, 2560, 2560), (1, 4096, 4096), (2048, 2048, 2048), (4096, 1024, 1024),
    (1024, 4096, 1024), (1000, 1000, 1000), (100, 100, 100), (7000, 1760, 1760), (256, 10_000, 256),
    (4096, 256, 1024), (512, 512, 1760), (1760, 128, 1760), (300, 700, 500), (2560, 64, 2560), (4096, 64, 64),
)  # fmt: skip


def _products(main: tuple[str, ...], others: tuple[str, ...], larger: int) -> Iterator[Tiered]:
    for (number, (m, n, k)), dtype in product(enumerate(GEMMS), main):
        for layout in LAYOUTS:
            first = layout == "nt" or (number in (1, 4, 5) and dtype == main[0])
            yield Gemm(larger * m, n * larger, k * larger, dtype, layout), 0 if first else 1
    for (m, n, k), dtype, layout in product(MORE_GEMMS, main, LAYOUTS):
        yield Gemm(larger * m, n * larger, k * larger, dtype, layout), 1
    yield Gemm(512 * larger, 512 * larger, 512 * larger, others[0]), 0
    for (number, (m, n, k)), dtype in product(enumerate(GEMMS), others):
        yield Gemm(larger * m, n * larger, k * larger, dtype), 1 if number in (1, 2, 5) else 2
    # every fourth power of two in all directions, layouts in turns; then every power, thinned out, with odd sizes
    for number, (m, n, k) in enumerate(product((16, 64, 256, 1024, 4096), repeat=3)):
        yield Gemm(m, n, k, main[number % 2], LAYOUTS[number % 3]), 1
        yield from ((Gemm(m, n, k, dtype, layout), 2) for dtype in main for layout in LAYOUTS)
    sizes = (16, 32, 64, 100, 128, 256, 512, 1000, 1024, 1760, 2048, 2560, 4096)
    for number, (m, n, k) in enumerate(product(sizes, repeat=3)):
        if number % 3 == 0:
            yield Gemm(m, n, k, main[number // 3 % 2], LAYOUTS[number // 3 % 3]), 2
    for (batch, m, n, k), dtype in product(
        ((16, 64, 64, 64), (32, 256, 64, 256), (8, 512, 512, 64), (64, 128, 128, 64), (4, 1024, 1024, 64)), main
    ):
        yield BatchedGemm(batch * larger, m, n, k, dtype), 0 if (batch, dtype) == (32, main[0]) else 1


# batch, channels in, height, width, channels out, kernel, stride, pad: residual networks, VGG, spectrograms
CONVS = (
    (8, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1)), (8, 256, 14, 14, 256, (3, 3), (1, 1), (1, 1)),
    (8, 256, 56, 56, 64, (1, 1), (1, 1), (0, 0)), (4, 1, 161, 700, 32, (5, 20), (2, 2), (0, 0)),
)  # fmt: skip
MORE_CONVS = (
    (8, 3, 224, 224, 64, (7, 7), (2, 2), (3, 3)), (16, 16, 32, 32, 16, (3, 3), (1, 1), (1, 1)),
    (16, 64, 8, 8, 64, (3, 3), (1, 1), (1, 1)), (8, 128, 28, 28, 128, (3, 3), (1, 1), (1, 1)),
    (8, 128, 56, 56, 128, (3, 3), (2, 2), (1, 1)), (8, 512, 7, 7, 512, (3, 3), (1, 1), (1, 1)),
    (8, 512, 28, 28, 128, (1, 1), (1, 1), (0, 0)), (8, 192, 28, 28, 32, (5, 5), (1, 1), (2, 2)),
    (4, 32, 79, 341, 32, (5, 10), (2, 2), (0, 0)), (2, 32, 80, 200, 32, (21, 11), (2, 1), (10, 5)),
    (2, 16, 64, 64, 16, (11, 11), (1, 1), (5, 5)), (8, 1, 81, 200, 32, (41, 11), (2, 2), (20, 5)),
    (1, 64, 56, 56, 64, (3, 3), (1, 1), (1, 1)), (2, 3, 224, 224, 64, (3, 3), (1, 1), (1, 1)),
    (8, 100, 30, 30, 100, (3, 3), (1, 1), (1, 1)),
    # shortcut and expansion of residual networks, patches, a stem of small images, U-Net, uneven channels and edges
    (8, 256, 56, 56, 512, (1, 1), (2, 2), (0, 0)), (8, 128, 28, 28, 512, (1, 1), (1, 1), (0, 0)),
    (16, 1024, 14, 14, 256, (1, 1), (1, 1), (0, 0)), (4, 3, 224, 224, 192, (16, 16), (16, 16), (0, 0)),
    (16, 3, 32, 32, 64, (3, 3), (1, 1), (1, 1)), (1, 32, 128, 128, 64, (3, 3), (1, 1), (1, 1)),
    (3, 20, 57, 57, 50, (5, 5), (1, 1), (2, 2)), (5, 72, 19, 19, 40, (3, 3), (2, 2), (1, 1)),
    (8, 40, 28, 28, 24, (1, 1), (2, 2), (0, 0)),
)  # fmt: skip
# batch, channels, edge, kernel, stride: MobileNet, EfficientNet, ConvNeXt
DEPTHWISE = ((4, 64, 28, 3, 1), (4, 256, 28, 3, 1), (4, 144, 56, 3, 2), (8, 672, 14, 5, 1), (2, 96, 56, 7, 1))
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")


def _convolutions(main: tuple[str, ...], larger: int) -> Iterator[Tiered]:
    for (number, shape), dtype in product(enumerate(CONVS + MORE_CONVS), main):
        batch, channels, height, width, out, kernel, stride, pad = shape
        op = Conv2d(batch * larger, channels, height, width, out, *kernel, *stride, *pad, dtype)
        for direction in DIRECTIONS:
            tier = 0 if number < 2 and (dtype == main[0] or direction == "forward") else 1
            yield replace(op, direction=direction), tier  # type: ignore[arg-type]
            for more in (replace(op, batch=2 * op.batch), replace(op, out_channels=2 * out), replace(op, batch=1)):
                yield replace(more, direction=direction), 2  # type: ignore[arg-type]
    for (batch, channels, edge, taps, step), dtype, direction in product(DEPTHWISE, main, DIRECTIONS):
        op = Conv2d(batch * larger, channels, edge, edge, channels, taps, taps, step, step, taps // 2, taps // 2, dtype,
                    groups=channels)  # fmt: skip
        yield replace(op, direction=direction), 1 if channels in (64, 144) else 2  # type: ignore[arg-type]
    for (batch, channels, length, window), dtype, direction in product(
        ((8, 80, 1000, 3), (8, 256, 500, 11), (2, 256, 1000, 31)), main, DIRECTIONS
    ):
        line = Conv1d(batch * larger, channels, length, 256, window, 1, window // 2, dtype)
        yield replace(line, direction=direction), 1  # type: ignore[arg-type]


def _recurrent(main: tuple[str, ...], larger: int) -> Iterator[Tiered]:
    """Steps are few: the time of a step is what changes between machines."""
    shapes = ((16, 25, 512, 512), (4, 50, 256, 256), (32, 25, 800, 800), (64, 12, 1024, 1024), (8, 100, 128, 128),
              (16, 25, 1312, 800), (128, 12, 512, 512), (32, 12, 1760, 1760), (1, 50, 1024, 1024))  # fmt: skip
    for (number, (batch, steps, inputs, hidden)), kind, both, dtype, backward in product(
        enumerate(shapes), ("gru", "lstm", "vanilla"), (False, True), main, (False, True)
    ):
        op = Rnn(kind, batch * larger, steps, inputs, hidden, both, dtype, backward)  # type: ignore[arg-type]
        tier = 1 + (number > 3) + (kind == "vanilla" and number > 1)
        yield op, 0 if number == 0 and not both and kind != "vanilla" and dtype == main[0] else min(tier, 2)


def _attention(main: tuple[str, ...], larger: int) -> Iterator[Tiered]:
    shapes = ((4, 4, 4, 256, 64), (1, 8, 8, 1024, 64), (8, 4, 2, 128, 64), (2, 12, 12, 512, 64), (1, 8, 2, 2048, 128),
              (16, 6, 6, 64, 32))  # fmt: skip
    for (number, (batch, heads, kv_heads, length, width)), dtype, backward in product(
        enumerate(shapes), main, (False, True)
    ):
        op = Attention(batch * larger, heads, kv_heads, length, length, width, True, dtype, backward)
        yield op, 0 if number == 0 else 1
        yield replace(op, causal=False), 1 if number < 2 else 2
    for dtype in main:  # one new token against what came before
        yield Attention(8 * larger, 8, 8, 1, 1024, 64, True, dtype), 1


def _transforms(larger: int) -> Iterator[Tiered]:
    for length, kind in product((128, 256, 400, 512, 1000, 1024, 4096, 16384, 65536, 1009), ("real", "complex")):
        batch = max(1, larger * 2**19 // length)
        tier = 0 if (length, kind) in ((512, "real"), (4096, "complex")) else 1
        yield Fft(batch, length, kind, "fp32"), tier  # type: ignore[arg-type]
        yield Fft(max(1, batch // 64), length, kind, "fp32"), 2  # type: ignore[arg-type]
    for side in (16, 32, 64, 256, 1024):
        yield Fft(max(1, 2**18 // side**2), side, "real", "fp32", 2), 1 if side in (32, 256) else 2


def _moving(main: tuple[str, ...], larger: int) -> Iterator[Tiered]:
    """What counts no FLOPs; sizes from within a cache to far beyond it."""
    for (rows, width), kind, dtype, backward in product(
        ((512, 256), (4096, 512), (16384, 1024)), ("rms", "layer", "batch"), main, (False, True)
    ):
        first = rows == 4096 and kind != "layer" and dtype == "fp32"
        yield Norm(kind, rows * larger, width, dtype, backward), 0 if first else 1  # type: ignore[arg-type]
    names = (("residual", 2, 1), ("swiglu", 2, 1), ("swiglu", 3, 2), ("relu", 1, 1), ("relu", 2, 1), ("gelu", 1, 1),
             ("gelu", 2, 1), ("rotate", 1, 1), ("clip", 1, 1), ("clip", 2, 1), ("max_pool", 1, 1), ("average", 1, 0),
             ("average", 0, 1), ("chain", 3, 1))  # fmt: skip
    for (name, reads, writes), elements, dtype in product(names, (2**14, 2**17, 2**20, 2**23), main):
        first = elements == 2**20 and name in ("residual", "swiglu") and dtype == "fp32"
        tier = 0 if first else 1 if elements in (2**17, 2**23) else 2
        yield Elementwise(name, elements * larger, reads, writes, dtype), tier
    for (rows, vocab, width), backward in product(((4096, 8192, 256), (1024, 50_257, 768)), (False, True)):
        yield Embedding(rows * larger, vocab, width, "fp32", backward), 0 if vocab == 8192 else 1
    for (rows, vocab), dtype, backward in product(
        ((256, 8192), (4096, 256), (512, 50_257), (1024, 1000)), main, (False, True)
    ):
        yield CrossEntropy(rows * larger, vocab, dtype, backward), 0 if (vocab, dtype) == (8192, "fp32") else 1
    for (batch, frames, labels), backward in product(((8, 200, 40), (16, 500, 100), (2, 100, 20)), (False, True)):
        yield Ctc(batch, frames, labels, 29, backward), 0 if batch == 8 else 1
    for params, kind in product((10_000, 300_000, 3_000_000, 30_000_000), ("adamw", "momentum", "sgd")):
        first = (params, kind) == (3_000_000, "adamw")
        yield OptimizerStep(kind, params), 0 if first else 1  # type: ignore[arg-type]


def _memory(device: str) -> Iterator[Tiered]:
    """Arrays within each cache and beyond all."""
    for size in (16 * KIB, 256 * KIB, 4 * MIB, 16 * MIB, 64 * MIB, 256 * MIB):
        first = size in (16 * KIB, 256 * KIB, 64 * MIB)
        yield MemoryTriad(size), 0 if first else 1
        yield MemoryCopy(size), 0 if first else 1
    if device == "cuda":
        yield MemoryCopy(1024 * MIB), 1
    for table, row in product((4 * MIB, 512 * MIB), (64, 512, 4096)):
        yield Gather(min(65_536, 16 * MIB // row), table // row, row), 0 if row == 512 else 1
