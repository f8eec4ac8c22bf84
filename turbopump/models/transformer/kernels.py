"""The transformer's own kernels as a route of `probe`, so that a step is predicted from what it really computes.

The loss is computed in chunks, forward and gradient at once (fused.py): its operations are those of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turbopump.compute.kernels import KERNELS, Route, route_of_model
from turbopump.compute.operands import DTYPES, Kernel, Tensors
from turbopump.compute.ops import Attention, CrossEntropy, Norm
from turbopump.core.workload import Op
from turbopump.models.transformer.fused import block_causal_attention, rms_norm

EPS = 1e-6


def _attention(op: Attention) -> Callable[..., Tensor]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_causal_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


def _norm(op: Norm) -> Callable[..., Tensor]:
    return lambda x, gain: rms_norm(x, gain, EPS, x.dtype)


def _loss(op: Any) -> Callable[..., Tensors]:
    """Half of a chunk each: the losses, or the gradient of the logits from their exponentials."""

    def losses(logits: Tensor, index: Tensor) -> Tensors:
        wide = logits.float() if logits.dtype != torch.float32 else logits.clone()
        wide = wide.sub_(wide.amax(-1, keepdim=True))
        chosen = wide.gather(1, index[:, None])
        total = wide.exp_().sum(-1, keepdim=True)
        return wide, total, total.log() - chosen

    def gradient(wide: Tensor, weight: Tensor, index: Tensor) -> Tensors:
        grad = torch.mul(wide, weight).scatter_add_(1, index, -weight)
        return (grad.to(DTYPES[op.dtype]),)

    return gradient if op.backward else losses


def _halves(op: Any, given: Tensors) -> Tensors:
    if not op.backward:
        return given
    logits, index, _ = given
    wide = logits.float().softmax(-1)
    return wide, torch.full((op.rows, 1), 1.0 / op.rows, device=logits.device), index[:, None]


def _no_loss(op: Op, device: str) -> str:
    return "" if isinstance(op, CrossEntropy) and op.dtype in ("fp32", "bf16") else "only the transformer's loss"


ROUTES = (
    route_of_model(
        "transformer",
        {
            Attention: (
                Kernel(KERNELS[Attention].inputs, _attention, KERNELS[Attention].wanted),
                lambda op: op.causal and op.q_len == op.kv_len and op.dtype in ("fp32", "bf16"),
            ),
            Norm: (
                Kernel(KERNELS[Norm].inputs, _norm, KERNELS[Norm].wanted),
                lambda op: op.kind == "rms" and op.dtype in ("fp32", "bf16"),
            ),
        },
    ),
    Route("transformer", _loss, _no_loss, _halves, comparable=False),
)
