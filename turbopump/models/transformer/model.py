"""The transformer in PyTorch: `build`, `loss`, `weight`, `metrics`, `generate`.

A batch is an integer tensor [B, T + 1] of any integer dtype; position t predicts t + 1. Negative ids are padding: no
loss is taken there. Weights and the residual stream are fp32; under autocast the products (and what is kept for them)
are bf16. Initialisation (Karpathy's nanochat, after modded-nanogpt): matrices uniform with standard deviation
1 / sqrt(inputs), output projections of attention and MLP zero, so that each block starts as the identity; embedding
normal, 1.0 (0.02 where it is the head too); untied head normal, 0.001.

Shapes: B batch, T positions, D hidden, H query heads, K key heads, E head width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turbopump.core.errors import DatasetError
from turbopump.models.transformer.config import TransformerConfig
from turbopump.models.transformer.fused import block_causal_attention, linear_cross_entropy, rms_norm, rotate
from turbopump.models.transformer.kernels import ROUTES

KeyValues = tuple[Tensor, Tensor]
__all__ = ["ROUTES", "build", "generate", "loss", "metrics", "weight"]


def compute_dtype(device: torch.device) -> torch.dtype:
    """The dtype of matrix products here: autocast's where it is on, else fp32 (always on `meta`, which has none)."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return torch.float32
    return torch.get_autocast_dtype(device.type)


class RmsNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, compute_dtype(x.device))


class Attention(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.head_width = config.head_width
        queries, keys = config.num_heads * config.head_width, config.kv_heads * config.head_width
        self.q = nn.Linear(config.hidden_size, queries, bias=False)
        self.k = nn.Linear(config.hidden_size, keys, bias=False)
        self.v = nn.Linear(config.hidden_size, keys, bias=False)
        self.out = nn.Linear(queries, config.hidden_size, bias=False)
        self.q_norm = RmsNorm(config.head_width, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RmsNorm(config.head_width, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x_BTD: Tensor, turns: Tensor, past: KeyValues | None, keep: bool) -> tuple[Tensor, Any]:
        q, k, v = (layer(x_BTD).unflatten(-1, (-1, self.head_width)) for layer in (self.q, self.k, self.v))
        q, k = rotate(self.q_norm(q), turns), rotate(self.k_norm(k), turns)
        if past is not None:
            k, v = torch.cat((past[0], k), 1), torch.cat((past[1], v), 1)
        return self.out(attend(q, k, v).flatten(2)), (k, v) if keep else None


def attend(q_BTHE: Tensor, k_BSKE: Tensor, v_BSKE: Tensor) -> Tensor:
    """Causal attention of the last T of S positions, [B, T, H, E].

    On CPU, PyTorch's kernel takes 1.8 times the time of our blocks in bf16 (the same in fp32): it serves other devices.
    """
    T, S = q_BTHE.shape[1], k_BSKE.shape[1]
    if q_BTHE.device.type == "cpu" and T == S:
        return block_causal_attention(q_BTHE, k_BSKE, v_BSKE)
    q, k, v = (x.transpose(1, 2) for x in (q_BTHE, k_BSKE, v_BSKE))
    shared = q.shape[1] != k.shape[1]
    mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril_(S - T)
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=T == S and T > 1, enable_gqa=shared)
    return out.transpose(1, 2)


class Mlp(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.up = nn.Linear(config.hidden_size, config.mlp_width, bias=False)
        self.out = nn.Linear(config.mlp_width, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.out(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.mlp = Mlp(config)
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor, turns: Tensor, past: KeyValues | None, keep: bool) -> tuple[Tensor, Any]:
        mixed, present = self.attention(self.attention_norm(x_BTD), turns, past, keep)
        x_BTD = x_BTD + self._drop(mixed)
        return x_BTD + self._drop(self.mlp(self.mlp_norm(x_BTD))), present

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.training and self.dropout else x


class Transformer(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RmsNorm(config.hidden_size, config.norm_eps)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tied:
            self.head.weight = self.embed.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every weight (see the top of the file for the rule and its source)."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            elif name.endswith(".out.weight"):
                parameter.zero_()
            elif name == "embed.weight":
                parameter.normal_(std=0.02 if self.config.tied else 1.0)
            elif name == "head.weight":
                parameter.normal_(std=0.001)
            else:
                bound = (3 / parameter.shape[1]) ** 0.5
                parameter.uniform_(-bound, bound)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor | None = None, cache: list[Any] | None = None) -> Tensor:
        """Mean loss over targets >= 0 (fp32 scalar) where targets are given, else logits [B, T, V].

        `cache`, a list of one entry a layer (at first `None`), makes tokens continue those it has seen.
        """
        self._check_ids(tokens_BT, targets_BT)
        start = cache[0][0].shape[1] if cache and cache[0] is not None else 0
        turns = self._turns(start, tokens_BT.shape[1], tokens_BT.device)
        x_BTD = self.embed(tokens_BT)
        again = self.config.recompute == "full" and torch.is_grad_enabled() and cache is None
        for i, block in enumerate(self.blocks):
            if again:
                x_BTD, _ = checkpoint(block, x_BTD, turns, None, False, use_reentrant=False)
                continue
            x_BTD, present = block(x_BTD, turns, cache[i] if cache else None, cache is not None)
            if cache is not None:
                cache[i] = present
        x_BTD = self.norm(x_BTD)
        if targets_BT is None:
            return self.head(x_BTD)
        dtype = compute_dtype(x_BTD.device)
        return linear_cross_entropy(x_BTD.flatten(0, 1), self.head.weight, targets_BT.flatten(), dtype)

    def _check_ids(self, *ids: Tensor | None) -> None:
        """A typed error on CPU, where looking costs microseconds; a GPU's own assertion stops the process."""
        largest = max((int(x.max()) for x in ids if x is not None and x.device.type == "cpu" and x.numel()), default=0)
        if largest >= self.config.vocab_size:
            raise DatasetError(
                f"the batch holds token id {largest}, the model knows 0 to {self.config.vocab_size - 1}: "
                f"set model.vocab_size to at least {largest + 1}, or use the tokenizer of the model"
            )

    def _turns(self, start: int, length: int, device: torch.device) -> Tensor:
        """Unit complex numbers [T, 1, E / 2] by which positions `start`... turn (fp32 angles)."""
        width = self.config.head_width
        rates = self.config.rope_theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float32) / width)
        angles = torch.outer(torch.arange(start, start + length, device=device, dtype=torch.float32), rates)
        return torch.polar(torch.ones_like(angles), angles).unsqueeze(1)


def build(config: TransformerConfig) -> Transformer:
    """A model with random weights from the global generator, fp32, on the default device (`meta` allocates nothing)."""
    return Transformer(config)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats per target token, a fp32 scalar; raises `DatasetError` for unknown token ids."""
    tokens = batch.to(torch.int64)
    return model(tokens[:, :-1].clamp(min=0), tokens[:, 1:].contiguous())


def weight(batch: Tensor) -> int:
    """Number of target tokens that count: ids >= 0 after the first position."""
    targets = batch[:, 1:]
    return int((targets >= 0).sum()) if targets.dtype.is_signed else targets.numel()


@torch.no_grad()
def metrics(model: nn.Module, batch: Tensor) -> dict[str, tuple[float, float]]:
    """`loss`: summed nats and number of tokens."""
    count = weight(batch)
    return {"loss": (float(loss(model, batch)) * count, float(count))}


@torch.no_grad()
def generate(
    model: nn.Module, tokens_BT: Tensor, num_tokens: int, *, temperature: float = 1.0, top_k: int = 0, seed: int = 0
) -> Tensor:
    """`tokens_BT` (int64, T >= 1) continued by `num_tokens` sampled ones, [B, T + num_tokens], with a KV cache.

    `temperature` 0 takes the likeliest token, `top_k` 0 samples from all. The same seed gives the same text on the
    same device. Positions beyond the trained length are rotated on as they come; quality falls there.
    """
    generator = torch.Generator(tokens_BT.device).manual_seed(seed)
    tokens, cache = tokens_BT.to(torch.int64), [None] * sum(1 for _ in model.get_submodule("blocks").children())
    with _evaluating(model):
        new = tokens
        for _ in range(num_tokens):
            logits_BV = model(new, cache=cache)[:, -1].float()
            new = _sample(logits_BV, temperature, top_k, generator)
            tokens = torch.cat((tokens, new), 1)
    return tokens


def _sample(logits_BV: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    logits_BV = logits_BV / temperature
    if 0 < top_k < logits_BV.shape[-1]:
        least = logits_BV.topk(top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least, float("-inf"))
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
