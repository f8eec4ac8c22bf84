"""Batch norm that leaves padding out: over the valid positions only, with a clip behind it where that is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class _MaskedNorm(torch.autograd.Function):
    """Batch norm over the positions of a mask, zero elsewhere, then a clip to 0...`clip` where that is > 0.

    Keeps its input and two numbers a channel; statistics of a training batch (`count` given) pass gradients too.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mask: Tensor, mean: Tensor, scale: Tensor, gain: Tensor, bias: Tensor,
        count: Tensor | None, clip: float
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, mask, mean, scale, gain, bias, count)
        ctx.clip = clip
        factor = gain * scale
        y = torch.addcmul(bias - mean * factor, x, factor)
        if clip:
            y.clamp_(0.0, clip)
        return y.mul_(mask).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, mask, mean, scale, gain, bias, count = ctx.saved_tensors
        grad, unit = grad * mask.to(torch.float32), (x - mean).mul_(scale)
        if ctx.clip:
            y = torch.addcmul(bias, unit, gain)
            grad.mul_((y > 0) & (y < ctx.clip))
        dims = [d for d in range(x.ndim) if mean.shape[d] == 1]
        grad_gain, grad_bias = (grad * unit).sum(dims, keepdim=True), grad.sum(dims, keepdim=True)
        if count is not None:  # training: mean and scale are functions of x
            grad = grad.addcmul_(unit, grad_gain / count, value=-1).sub_(grad_bias / count)
        return (grad * (gain * scale)).mul_(mask).to(x.dtype), None, None, None, grad_gain, grad_bias, None, None


class MaskedBatchNorm(nn.Module):
    """Batch norm along `dim` over valid positions only (sequence-wise: over all frames of all samples)."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, dim: int, clip: float = 0.0, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.clip, self.momentum, self.eps = dim, clip, momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """`mask` (bool) broadcasts against x and has size 1 along the channels."""
        shape = [1] * x.ndim
        shape[self.dim] = -1
        mean, var, count = self.running_mean.view(shape), self.running_var.view(shape), None
        if self.training:
            mean, var, count = self._statistics(x.detach(), mask)
        scale = torch.rsqrt(var + self.eps)
        gain, bias = self.weight.view(shape), self.bias.view(shape)
        return _MaskedNorm.apply(x, mask, mean, scale, gain, bias, count, self.clip)

    @torch.no_grad()
    def _statistics(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        dims = [d for d in range(x.ndim) if d != self.dim % x.ndim]
        repeats = x.numel() // (mask.numel() * x.shape[self.dim])  # positions one mask element stands for
        count = mask.sum().mul_(repeats).clamp_(min=1)
        mean = (x * mask.float()).sum(dims, keepdim=True).div_(count)
        var = (x - mean).mul_(mask).square_().sum(dims, keepdim=True).div_(count)
        unbiased = var.flatten() * (count / (count - 1).clamp_(min=1))
        self.running_mean.lerp_(mean.flatten(), self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        return mean, var, count
