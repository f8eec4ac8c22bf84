"""A decoder-only transformer: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU; 1 M to 70 B."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from turbopump.core.config import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    missing_sizes,
    nearest_multiples,
    setting,
)
from turbopump.core.plugins import ModelKind
from turbopump.models.transformer.workload import workload

MLP_MULTIPLE = 64


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the model. Sequence length belongs to the data: positions are rotary and need no table."""

    kind: Literal["transformer"] = setting("transformer", "decoder-only language model")
    vocab_size: PositiveInt = setting(256, "number of token ids; at least the largest id of the dataset + 1")
    num_layers: PositiveInt = setting(4, "blocks of attention and MLP")
    hidden_size: PositiveInt = setting(256, "width of the residual stream")
    num_heads: PositiveInt = setting(4, "query heads; must divide `hidden_size` unless `head_dim` is given")
    num_kv_heads: NonNegativeInt = setting(0, "key and value heads, shared by groups of query heads; 0 takes num_heads")
    head_dim: NonNegativeInt = setting(0, "width of a head; 0 takes hidden_size / num_heads")
    mlp_size: NonNegativeInt = setting(0, "inner width of the MLP; 0 takes 8/3 hidden_size, rounded up to 64")
    tied: bool = setting(True, "use the embedding matrix as the output head too")
    qk_norm: bool = setting(False, "RMSNorm of queries and keys before rotation; allows higher learning rates")
    rope_theta: PositiveFloat = setting(10000.0, "longest wavelength of the rotary positions, over 2 pi")
    norm_eps: PositiveFloat = setting(1e-6, "term of RMSNorm that keeps its division finite")
    dropout: Probability = setting(0.0, "share of each block's output that is dropped in training")
    recompute: Literal["none", "full"] = setting(
        "none", "`none` keeps activations for backward, `full` keeps the input of each block and computes it again"
    )

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def mlp_width(self) -> int:
        return self.mlp_size or -(-8 * self.hidden_size // (3 * MLP_MULTIPLE)) * MLP_MULTIPLE

    def problems(self) -> list[str]:
        """Cross-field problems, each with what is given, allowed and to be done."""
        found = []
        if not self.head_dim and self.hidden_size % self.num_heads:
            near = nearest_multiples(self.hidden_size, self.num_heads)
            found.append(
                f"hidden_size: {self.hidden_size} must be divisible by num_heads ({self.num_heads}): "
                f"use {near}, or give head_dim"
            )
        elif self.head_width % 2:
            found.append(
                f"head_dim: {self.head_width} must be even, rotary positions turn pairs: "
                f"use {nearest_multiples(self.head_width, 2)}"
            )
        if self.num_heads % self.kv_heads:
            allowed = [n for n in range(1, self.num_heads + 1) if self.num_heads % n == 0]
            found.append(
                f"num_kv_heads: {self.kv_heads} must divide num_heads ({self.num_heads}): "
                f"use one of {', '.join(map(str, allowed))}"
            )
        return found

    def misfits(self, shape: Mapping[str, int]) -> list[str]:
        """Sizes that do not fit those of the dataset's samples."""
        if missing := missing_sizes("transformer", shape, ("seq_len",), '"tokens"'):
            return missing
        needed = shape.get("vocab_size", 0)
        if self.vocab_size < needed:
            return [f"vocab_size: {self.vocab_size} given; the dataset has {needed} tokens: use {needed} or more"]
        return []


KIND = ModelKind(config=TransformerConfig, workload=workload, module="turbopump.models.transformer.model")
