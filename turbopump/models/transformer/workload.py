"""The transformer's step as operations, without torch; compared with the model in tests/models/transformer.

N = B * T tokens, D hidden, Q = H * E query width, K key width, F inner width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from turbopump.compute.ops import Attention, CrossEntropy, Elementwise, Embedding, Gemm, Norm, OptimizerStep
from turbopump.core.workload import DTYPE_BYTES, Block, Op, Workload

if TYPE_CHECKING:
    from turbopump.models.transformer.config import TransformerConfig

FP32 = DTYPE_BYTES["fp32"]


def workload(config: TransformerConfig, samples: int, shape: Mapping[str, int], dtype: str) -> Workload:
    """One microbatch of `samples` sequences of `shape["seq_len"]` tokens, products in `dtype`.

    Kept bytes are what autograd saves: besides activations, under bf16 also the cast copy of each weight matrix
    (autocast holds it until backward). `selective` computes the MLP's inner activations again, `full` the whole block.
    """
    length = shape["seq_len"]
    tokens = samples * length
    vocab, hidden = config.vocab_size, config.hidden_size
    embedding = Block(
        name="embed",
        forward=(Embedding(tokens, vocab, hidden, "fp32"),),
        backward=(Embedding(tokens, vocab, hidden, "fp32", backward=True),),
        params=vocab * hidden,
        kept_bytes=_all_modes(tokens * DTYPE_BYTES["int64"]),
    )
    blocks = (embedding, _layer(config, samples, length, dtype), _head(config, tokens, dtype))
    tied = vocab * hidden if config.tied else 0
    params = sum(b.params * b.count for b in blocks) - tied
    return Workload(
        name="transformer",
        blocks=blocks,
        samples=samples,
        units=tokens,
        unit="token",
        dtype=dtype,
        tied_params=tied,
        optimizer_ops=(OptimizerStep("adamw", params),),
    )


def _layer(config: TransformerConfig, samples: int, length: int, dtype: str) -> Block:
    tokens, hidden, mlp = samples * length, config.hidden_size, config.mlp_width
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    products = (
        Gemm(tokens, queries, hidden, dtype),
        Gemm(tokens, keys, hidden, dtype),
        Gemm(tokens, keys, hidden, dtype),
        Gemm(tokens, hidden, queries, dtype),
        Gemm(tokens, mlp, hidden, dtype),
        Gemm(tokens, mlp, hidden, dtype),
        Gemm(tokens, hidden, mlp, dtype),
    )

    def attention(backward: bool) -> Op:
        return Attention(samples, config.num_heads, config.kv_heads, length, length, config.head_width, True, dtype,
                         backward)  # fmt: skip

    def others(backward: bool) -> tuple[Op, ...]:
        norms: tuple[Op, ...] = (Norm("rms", tokens, hidden, "fp32", backward),) * 2
        if config.qk_norm:
            heads = (config.num_heads, config.kv_heads)
            norms += tuple(Norm("rms", tokens * n, config.head_width, dtype, backward) for n in heads)
        return (
            *norms,
            Elementwise("rotate", tokens * (queries + keys), 1, 1, dtype),
            Elementwise("swiglu", tokens * mlp, 3 if backward else 2, 2 if backward else 1, dtype),
            *(Elementwise("residual", tokens * hidden, 2, 1, "fp32"),) * 2,
        )

    weights = hidden * (2 * queries + 2 * keys + 3 * mlp)
    gains = 2 * hidden + (2 * config.head_width if config.qk_norm else 0)
    return Block(
        name="blocks",
        forward=(*products, attention(False), *others(False)),
        backward=(*(g for p in products for g in p.gradients), attention(True), *others(True)),
        params=weights + gains,
        kept_bytes=_layer_kept(config, tokens, weights, dtype),
        count=config.num_layers,
    )


def _layer_kept(config: TransformerConfig, tokens: int, weights: int, dtype: str) -> dict[str, int]:
    size, hidden, mlp = DTYPE_BYTES[dtype], config.hidden_size, config.mlp_width
    queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
    stream = tokens * hidden * FP32
    row = tokens * FP32
    # two norms: their input (the stream) and scale; their output feeds the products
    kept = 2 * (stream + row + tokens * hidden * size)
    # q, k, v turned and laid out for attention; its output
    kept += tokens * (2 * queries + 2 * keys) * size
    if config.qk_norm:
        kept += tokens * (queries + keys) * size + (config.num_heads + config.kv_heads) * row
    inner = tokens * 4 * mlp * size  # gate, silu(gate), up and their product
    if config.dropout:
        kept += 2 * tokens * hidden * size  # CPU keeps the mask in the dtype of the values
    copies = weights * size if dtype != "fp32" else 0
    return {"none": kept + inner + copies, "selective": kept + copies, "full": stream}


def _head(config: TransformerConfig, tokens: int, dtype: str) -> Block:
    """Final norm, head and loss. The loss keeps its gradients (of its input, in `dtype`, and of the head, fp32)."""
    hidden, vocab, size = config.hidden_size, config.vocab_size, DTYPE_BYTES[dtype]
    product = Gemm(tokens, vocab, hidden, dtype)
    kept = tokens * hidden * FP32 + tokens * FP32 + tokens * hidden * size + vocab * hidden * FP32
    return Block(
        name="head",
        forward=(Norm("rms", tokens, hidden, "fp32"), product, CrossEntropy(tokens, vocab, dtype)),
        backward=(
            CrossEntropy(tokens, vocab, dtype, backward=True),
            *product.gradients,
            Norm("rms", tokens, hidden, "fp32", backward=True),
        ),
        params=vocab * hidden + hidden,
        kept_bytes=_all_modes(kept),
    )


def _all_modes(kept: int) -> dict[str, int]:
    return {"none": kept, "selective": kept, "full": kept}
