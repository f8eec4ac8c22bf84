"""The convnet's operations as a route of `probe`: activations channels last, weights as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from turbopump.compute import kernels
from turbopump.compute.kernels import Kernel, Route
from turbopump.compute.operands import DTYPES, Tensors
from turbopump.compute.ops import Conv2d, Norm
from turbopump.core.workload import Op

EPS, MOMENTUM = 1e-5, 0.1
LAYOUT = torch.channels_last


def _norm(op: Norm) -> Callable[..., Tensor]:
    mean, var = torch.zeros(op.dim), torch.ones(op.dim)
    return lambda x, gain, bias: F.batch_norm(x, mean, var, gain, bias, True, MOMENTUM, EPS)


_KERNELS: dict[type[Op], Kernel] = {Norm: Kernel(kernels.KERNELS[Norm].inputs, _norm, kernels.KERNELS[Norm].wanted)}


def _convolution(op: Conv2d) -> Callable[..., Tensor]:
    """Backward gives the gradient of a weight in the weight's own layout, as autograd keeps it."""
    stride, pad = [op.stride_h, op.stride_w], [op.pad_h, op.pad_w]
    dtype = DTYPES[op.dtype]
    x_shape = (op.batch, op.in_channels, op.height, op.width)
    x_like = torch.empty(x_shape, dtype=dtype, memory_format=LAYOUT)  # its values are never read
    w_like = torch.empty(op.out_channels, op.in_channels // op.groups, op.kernel_h, op.kernel_w, dtype=dtype)

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.convolution(x, w, None, stride, pad, [1, 1], False, [0], op.groups)

    def backward(grad: Tensor, x: Tensor, w: Tensor, mask: list[bool]) -> Tensors:
        found: Tensors = torch.ops.aten.convolution_backward(grad, x, w, None, stride, pad, [1, 1], False, [0],
                                                             op.groups, mask)  # fmt: skip
        return found

    def input_gradient(grad: Tensor, w: Tensor) -> Tensor:
        return backward(grad, x_like, w, [True, False, False])[0]

    def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
        return backward(grad, x, w_like, [False, True, False])[1].contiguous()

    return {"forward": forward, "input_gradient": input_gradient, "weight_gradient": weight_gradient}[op.direction]


def _prepare(op: Op, given: Tensors) -> Tensors:
    if isinstance(op, Conv2d):
        return tuple(x if i == 1 and op.direction != "weight_gradient" else x.contiguous(memory_format=LAYOUT)
                     for i, x in enumerate(given))  # fmt: skip
    x, gain, bias, *grad = given
    images = [t.unsqueeze(-1).contiguous(memory_format=LAYOUT) for t in (x, *grad)]
    return kernels.prepare(op, (images[0], gain, bias, *images[1:]), _KERNELS)


def _function(op: Op) -> Callable[..., Tensor | Tensors]:
    return _convolution(op) if isinstance(op, Conv2d) else kernels.function(op, _KERNELS)


def _problem(op: Op, device: str) -> str:
    batch_norm = isinstance(op, Norm) and op.kind == "batch"
    stands = (batch_norm or isinstance(op, Conv2d)) and getattr(op, "dtype", "") in ("fp32", "bf16")
    return "" if stands and torch.device(device).type == "cpu" else "the convnet has no layout of its own for it"


ROUTES = (Route("convnet", _function, _problem, _prepare, comparable=False),)
