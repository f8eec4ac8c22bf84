"""The operations that count FLOPs, by PyTorch's defaults: products, attention, convolutions, transforms, recurrence.

Inputs of each, in this order (a backward appends the gradient of the output; products of a layer's backward are
`Gemm`s of their own):
- Gemm: A [m, k], B [k, n], as views of contiguous storage in the operation's layout; fp8 also two scales
- BatchedGemm: A [batch, m, k], B [batch, k, n]
- Attention: q [B, H, T, E], k, v [B, K, S, E], as a layer leaves them (views of [B, T, H, E]); a mask where needed
- Conv1d, Conv2d: x, w; of `input_gradient`: grad_y, w; of `weight_gradient`: x, grad_y
- Fft: x [batch, length (, length)]
- Rnn: x [T, B, I], h0 (LSTM: and c0) [directions, B, H], then weights and biases as `nn.GRU` orders them
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbopump.compute.operands import Kernel, Tensors, Values
from turbopump.compute.ops import RNN_GATES, Attention, BatchedGemm, Conv1d, Conv2d, Fft, Gemm, Rnn
from turbopump.core.workload import Op

SCALE = {"fp8": 1 / 16}  # as a tensor-wise scale would be


def _gemm_inputs(op: Gemm, values: Values) -> Tensors:
    a = values.normal(op.m, op.k, dtype=op.dtype)
    b = values.normal(op.k, op.n, dtype=op.dtype, scale=op.k**-0.5 if op.dtype != "fp8" else 1.0)
    a, b = (x.t().contiguous().t() if side == "t" else x for x, side in zip((a, b), op.layout))
    if op.dtype != "fp8":
        return a, b
    return a, b, *(torch.tensor(SCALE["fp8"], device=values.device) for _ in range(2))


def _product(op: Gemm) -> Callable[..., Tensor]:
    if op.dtype == "int8":
        return lambda a, b: torch._int_mm(a, b) if a.dtype == torch.int8 else a @ b
    if op.dtype == "fp8":
        return _scaled_product
    return torch.mm


def _scaled_product(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    if a.dtype == torch.float64:  # the reference
        return (a * a_scale) @ (b * b_scale)
    return torch._scaled_mm(a, b, a_scale, b_scale, out_dtype=torch.bfloat16)


def _batched_inputs(op: BatchedGemm, values: Values) -> Tensors:
    a = values.normal(op.batch, op.m, op.k, dtype=op.dtype)
    return a, values.normal(op.batch, op.k, op.n, dtype=op.dtype, scale=op.k**-0.5)


def _attention_inputs(op: Attention, values: Values) -> Tensors:
    def heads(length: int, count: int) -> Tensor:
        return values.normal(op.batch, length, count, op.head_dim, dtype=op.dtype).transpose(1, 2)

    tensors = [heads(op.q_len, op.heads), heads(op.kv_len, op.kv_heads), heads(op.kv_len, op.kv_heads)]
    if op.causal and op.q_len != op.kv_len:  # PyTorch's own causal mask is flush left
        whole = torch.ones(op.q_len, op.kv_len, dtype=torch.bool, device=values.device)
        tensors.append(whole.tril(op.kv_len - op.q_len))
    return (*tensors, heads(op.q_len, op.heads)) if op.backward else tuple(tensors)


def _attention(op: Attention) -> Callable[..., Tensor]:
    causal, shared = op.causal and op.q_len == op.kv_len, op.heads != op.kv_heads

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=shared)

    return attend


def _conv_inputs(op: Conv1d | Conv2d, values: Values) -> Tensors:
    """See the map; the weights scaled as at the start of training, the gradient like an activation."""
    flat = isinstance(op, Conv1d)
    c = op.as_2d if isinstance(op, Conv1d) else op
    shapes = {
        "x": (c.batch, c.in_channels, c.height, c.width),
        "w": (c.out_channels, c.in_channels // c.groups, c.kernel_h, c.kernel_w),
        "y": (c.batch, c.out_channels, c.out_height, c.out_width),
    }
    wanted = {"forward": "xw", "input_gradient": "yw", "weight_gradient": "xy"}[c.direction]
    scale = {"x": 1.0, "y": 1.0, "w": (c.weights / c.out_channels) ** -0.5}
    drawn = (values.normal(*shapes[name], dtype=c.dtype, scale=scale[name]) for name in wanted)
    return tuple(x.squeeze(2) if flat else x for x in drawn)


def _convolution(op: Conv1d | Conv2d) -> Callable[..., Tensor]:
    if isinstance(op, Conv1d):
        stride, pad, dilation = [op.stride], [op.pad], [1]
        in_shape: tuple[int, ...] = (op.batch, op.in_channels, op.length)
        w_shape: tuple[int, ...] = (op.out_channels, op.in_channels // op.groups, op.kernel)
    else:
        stride, pad, dilation = [op.stride_h, op.stride_w], [op.pad_h, op.pad_w], [1, 1]
        in_shape = (op.batch, op.in_channels, op.height, op.width)
        w_shape = (op.out_channels, op.in_channels // op.groups, op.kernel_h, op.kernel_w)
    groups, backward = op.groups, torch.ops.aten.convolution_backward

    def forward(x: Tensor, w: Tensor) -> Tensor:
        return torch.convolution(x, w, None, stride, pad, dilation, False, [0], groups)

    shape_of = cache(_shape_of)  # of the tensor whose gradient is wanted only shape and layout count

    def input_gradient(grad: Tensor, w: Tensor) -> Tensor:
        x = shape_of(in_shape, grad.dtype, grad.device, _channels_last(grad))
        return backward(grad, x, w, None, stride, pad, dilation, False, [0], groups, [True, False, False])[0]

    def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
        w = shape_of(w_shape, x.dtype, x.device, _channels_last(x))
        return backward(grad, x, w, None, stride, pad, dilation, False, [0], groups, [False, True, False])[1]

    return {"forward": forward, "input_gradient": input_gradient, "weight_gradient": weight_gradient}[op.direction]


def _channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _shape_of(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, channels_last: bool) -> Tensor:
    """A tensor whose values are never read."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=device, memory_format=layout)


def _fft_inputs(op: Fft, values: Values) -> Tensors:
    shape = (op.batch, *(op.length,) * op.dims)
    real = values.normal(*shape, dtype=op.dtype)
    return (real,) if op.kind == "real" else (torch.complex(real, values.normal(*shape, dtype=op.dtype)),)


def _transform(op: Fft) -> Callable[..., Tensor]:
    dims = tuple(range(-op.dims, 0))
    transform = torch.fft.rfftn if op.kind == "real" else torch.fft.fftn
    return lambda x: transform(x, dim=dims)


def _rnn_inputs(op: Rnn, values: Values) -> Tensors:
    states = [values.normal(op.directions, op.batch, op.hidden_size, dtype=op.dtype)
              for _ in range(2 if op.kind == "lstm" else 1)]  # fmt: skip
    gates, scale = RNN_GATES[op.kind] * op.hidden_size, (3 * op.hidden_size) ** -0.5  # that of uniform +-1 / sqrt(H)
    shapes = [(gates, op.input_size), (gates, op.hidden_size), (gates,), (gates,)] * op.directions
    weights = [values.normal(*shape, dtype=op.dtype, scale=scale) for shape in shapes]
    if torch.device(values.device).type == "cuda" and torch.backends.cudnn.is_acceptable(weights[0]):
        _into_one_chunk(op, weights)
    x = values.normal(op.steps, op.batch, op.input_size, dtype=op.dtype)
    width = op.directions * op.hidden_size
    grads = [values.normal(op.steps, op.batch, width, dtype=op.dtype)] if op.backward else []
    return (x, *states, *weights, *grads)


def _into_one_chunk(op: Rnn, weights: list[Tensor]) -> None:
    """Lays the weights one behind the other in place, as `nn.RNN` does: cuDNN would copy them at every call."""
    mode = torch._C._cudnn.RNNMode  # type: ignore[attr-defined]
    modes = {"vanilla": mode.rnn_tanh, "gru": mode.gru, "lstm": mode.lstm}
    torch._cudnn_rnn_flatten_weight(weights, 4, op.input_size, int(modes[op.kind]), op.hidden_size, 0, 1, False,
                                    op.bidirectional)  # fmt: skip


def _recurrence(op: Rnn) -> Callable[..., Tensors]:
    run: Any = {"vanilla": torch._VF.rnn_tanh, "gru": torch._VF.gru, "lstm": torch._VF.lstm}[op.kind]  # type: ignore[attr-defined]

    def recur(x: Tensor, h0: Tensor, *rest: Tensor) -> Tensors:
        state, weights = ((h0, rest[0]), rest[1:]) if op.kind == "lstm" else (h0, rest)
        # biases, layers, dropout, train, bidirectional, batch first
        return tuple(run(x, state, list(weights), True, 1, 0.0, True, bool(op.bidirectional), False))

    return recur


def _rnn_wanted(op: Rnn) -> tuple[int, ...]:
    first = 3 if op.kind == "lstm" else 2
    return (0, *range(first, first + 4 * op.directions))


KERNELS: dict[type[Op], Kernel] = {
    Gemm: Kernel(_gemm_inputs, _product),
    BatchedGemm: Kernel(_batched_inputs, lambda op: torch.bmm),
    Attention: Kernel(_attention_inputs, _attention, lambda op: (0, 1, 2)),
    Conv1d: Kernel(_conv_inputs, _convolution),
    Conv2d: Kernel(_conv_inputs, _convolution),
    Fft: Kernel(_fft_inputs, _transform),
    Rnn: Kernel(_rnn_inputs, _recurrence, _rnn_wanted),
}
