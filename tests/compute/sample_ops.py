"""One small operation of every kind, dtype family and direction, for the tests of this folder."""

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
    MemoryCopy,
    MemoryTriad,
    Norm,
    OptimizerStep,
    Rnn,
)

BOTH = (False, True)
MAIN = ("fp32", "bf16")
DIRECTIONS = ("forward", "input_gradient", "weight_gradient")
NAMES = (("rotate", 1, 1), ("swiglu", 2, 1), ("swiglu", 3, 2), ("residual", 2, 1), ("relu", 1, 1), ("relu", 2, 1),
         ("gelu", 1, 1), ("gelu", 2, 1), ("clip", 1, 1), ("clip", 2, 1), ("max_pool", 1, 1), ("average", 1, 0),
         ("average", 0, 1), ("anything", 3, 2), ("anything", 0, 1), ("anything", 1, 0))  # fmt: skip

PRODUCTS = [Gemm(20, 28, 36, dtype, layout) for dtype, layout in product(MAIN, ("nn", "nt", "tn", "tt"))]
PRODUCTS += [BatchedGemm(3, 20, 28, 36, dtype) for dtype in MAIN]
CONVOLUTIONS = [
    replace(op, dtype=dtype, direction=direction)
    for op in (Conv2d(2, 4, 9, 8, 6, 3, 5, 2, 1, 1, 2, "fp32"), Conv2d(2, 4, 9, 8, 6, 3, 3, 1, 1, 1, 1, "fp32", 2),
               Conv1d(2, 4, 30, 6, 5, 2, 2, "fp32"))
    for dtype, direction in product(MAIN, DIRECTIONS)
]  # fmt: skip
RECURRENT = [Rnn(kind, 3, 5, 8, 6, both, dtype, backward)
             for kind, both, dtype, backward in product(("vanilla", "gru", "lstm"), BOTH, MAIN, BOTH)]  # fmt: skip
ATTENTION = [Attention(2, 4, kv_heads, q_len, 24, 8, causal, dtype, backward)
             for kv_heads, q_len, causal, dtype, backward in product((4, 2), (24, 5), BOTH, MAIN, BOTH)]  # fmt: skip
TRANSFORMS = [Fft(3, 20, kind, "fp32", dims) for kind, dims in product(("real", "complex"), (1, 2))]
MOVING = [
    *(Norm(kind, 24, 20, dtype, backward) for kind, dtype, backward in product(("rms", "layer", "batch"), MAIN, BOTH)),
    *(Elementwise(name, elements, reads, writes, dtype)
      for (name, reads, writes), elements, dtype in product(NAMES, (3136, 1001), MAIN)),
    *(Embedding(30, 50, 8, "fp32", backward) for backward in BOTH),
    *(CrossEntropy(30, 50, dtype, backward) for dtype, backward in product(MAIN, BOTH)),
    *(Ctc(2, 30, 5, 9, backward) for backward in BOTH),
    *(OptimizerStep(kind, 300) for kind in ("sgd", "momentum", "adamw")),
    MemoryCopy(4096), MemoryTriad(4096), Gather(20, 100, 64),
    *(Launch(name) for name in ("add", "linear", "autograd")),
]  # fmt: skip
COUNTED = [*PRODUCTS, *CONVOLUTIONS, *RECURRENT, *ATTENTION]
ALL = [*COUNTED, *TRANSFORMS, *MOVING]
