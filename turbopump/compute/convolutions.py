"""Algorithms for convolutions that PyTorch offers by no switch, in all three directions, as routes to be measured.

- `im2col`: every window becomes a column, the convolution one product (Chellapilla et al. 2006; what Caffe did).
- `pointwise`: a 1x1 convolution is a product; channels last, so that nothing is moved.
- `winograd F(m x m, 3 x 3)`: tiles of m x m outputs from (m + 2)^2 instead of 9 m^2 multiplications each: 2.25 times
  fewer for m = 2, 4 times for m = 4 (Lavin and Gray 2015, arXiv:1509.09308). The gradient of the input is a
  convolution with the kernel turned; that of the weight is the transposed algorithm: tiles of gradient and input are
  transformed, multiplied, summed over the tiles, and transformed back.
- `fft`: products of spectra over the whole image; its cost does not grow with the kernel.

Inputs are those of `kernels.inputs`: forward (x [B, C, H, W], weight [O, C / groups, h, w]), gradient of the input
(grad [B, O, H', W'], weight), gradient of the weight (x, grad). Conv1d is Conv2d of height 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from turbopump.compute.kernels import Function, Route
from turbopump.compute.ops import Conv2d
from turbopump.core.workload import DTYPE_BYTES, Op

COLUMN_BYTES = 64 * 2**20  # im2col takes as many images at once as have columns of this size
SPECTRUM_BYTES = 2**30  # larger spectra would not fit beside a model
FFT_TAPS = 16  # the least kernel for which whole-image transforms are worth measuring
EXACT_DTYPES = ("fp32", "fp64")  # transforms subtract: in 8 bits of mantissa little is left

# Output and kernel transforms of Lavin and Gray, section 4; the input transform stands as in their text, transposed.
_F2_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_F2_KERNEL = ((1, 0, 0), (1 / 2, 1 / 2, 1 / 2), (1 / 2, -1 / 2, 1 / 2), (0, 0, 1))
_F2_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))
_F4_INPUT = (
    (4, 0, -5, 0, 1, 0), (0, -4, -4, 1, 1, 0), (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0), (0, 2, -1, -2, 1, 0), (0, 4, 0, -5, 0, 1),
)  # fmt: skip
_F4_KERNEL = (
    (1 / 4, 0, 0), (-1 / 6, -1 / 6, -1 / 6), (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6), (1 / 24, -1 / 12, 1 / 6), (0, 0, 1),
)  # fmt: skip
_F4_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


# ---- what all routes share


def as_conv2d(op: Op) -> Conv2d | None:
    """The 2-D convolution that `op` is: itself, or for Conv1d one of height 1; None for any other operation."""
    if isinstance(op, Conv2d):
        return op
    if type(op).__name__ != "Conv1d":
        return None
    one: Any = op
    return Conv2d(one.batch, one.in_channels, 1, one.length, one.out_channels, 1, one.kernel, 1, one.stride, 0, one.pad,
                  one.dtype, one.groups, one.direction)  # fmt: skip


def _for_both(make: Callable[[Conv2d], Function]) -> Callable[[Op], Function]:
    """A route's function for Conv2d, serving Conv1d too."""

    def function(op: Op) -> Function:
        conv = as_conv2d(op)
        if conv is None:
            raise TypeError(f"{op.key} is no convolution")
        run = make(conv)
        if op is conv:
            return run
        return lambda a, b: run(a.unsqueeze(2), b.unsqueeze(2)).squeeze(2)  # type: ignore[union-attr]

    return function


def _padded(x: Tensor, op: Conv2d) -> Tensor:
    return F.pad(x, (op.pad_w, op.pad_w, op.pad_h, op.pad_h)) if op.pad_h or op.pad_w else x


# ---- im2col


def _im2col(op: Conv2d) -> Function:
    kernel, stride, padding = (op.kernel_h, op.kernel_w), (op.stride_h, op.stride_w), (op.pad_h, op.pad_w)
    taps, positions = op.in_channels * op.kernel_h * op.kernel_w, op.out_height * op.out_width
    images = max(1, COLUMN_BYTES // (taps * positions * DTYPE_BYTES[op.dtype]))

    def columns(x: Tensor) -> Tensor:
        """[b, groups, C / groups * h * w, H' * W']"""
        return F.unfold(x, kernel, 1, padding, stride).unflatten(1, (op.groups, -1))

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1).unflatten(0, (op.groups, -1))
        parts = [(matrix @ columns(part)).flatten(1, 2) for part in x.split(images)]
        return torch.cat(parts).unflatten(2, (op.out_height, op.out_width))

    def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
        matrix = weight.flatten(1).unflatten(0, (op.groups, -1)).transpose(1, 2)
        parts = [
            F.fold((matrix @ part.flatten(2).unflatten(1, (op.groups, -1))).flatten(1, 2), (op.height, op.width),
                   kernel, 1, padding, stride)
            for part in grad.split(images)
        ]  # fmt: skip
        return torch.cat(parts)

    def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
        total: Tensor | None = None
        for part, images_x in zip(grad.split(images), x.split(images)):
            rows = part.flatten(2).unflatten(1, (op.groups, -1))
            share = torch.einsum("bgop,bgkp->gok", rows, columns(images_x))
            total = share if total is None else total.add_(share)
        assert total is not None
        return total.reshape(op.out_channels, op.in_channels // op.groups, *kernel)

    return {"forward": forward, "input_gradient": input_gradient, "weight_gradient": weight_gradient}[op.direction]


def _im2col_problem(op: Op, device: str) -> str:
    conv = as_conv2d(op)
    if conv is None:
        return "not a convolution"
    if (conv.kernel_h, conv.kernel_w, conv.pad_h, conv.pad_w) == (1, 1, 0, 0):
        return "a 1 x 1 kernel has nothing to gather: its route is `pointwise`"
    return ""


# ---- 1 x 1


def _pointwise(op: Conv2d) -> Function:
    """Of inputs that lie channels last: views of them are the matrices."""

    def rows(image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])

    def images(matrix: Tensor) -> Tensor:
        return matrix.view(op.batch, op.height, op.width, -1).permute(0, 3, 1, 2)

    return {
        "forward": lambda x, weight: images(F.linear(rows(x), weight.flatten(1))),
        "input_gradient": lambda grad, weight: images(rows(grad) @ weight.flatten(1)),
        "weight_gradient": lambda x, grad: (rows(grad).t() @ rows(x))[:, :, None, None],
    }[op.direction]


def _pointwise_problem(op: Op, device: str) -> str:
    conv = as_conv2d(op)
    if conv is None:
        return "not a convolution"
    if (conv.kernel_h, conv.kernel_w, conv.stride_h, conv.stride_w, conv.pad_h, conv.pad_w) != (1, 1, 1, 1, 0, 0):
        return "only a 1 x 1 kernel of stride 1 without padding is a product"
    return _no_groups(conv)


def _channels_last(op: Op, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if inputs[0].ndim == 4:
        return tuple(t.contiguous(memory_format=torch.channels_last) for t in inputs)
    return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in inputs)


def _no_groups(conv: Conv2d) -> str:
    return f"{conv.groups} groups: only whole convolutions are done by this route" if conv.groups > 1 else ""


# ---- Winograd


def _squared(matrix: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    """The transform of both axes of a tile as one matrix: the Kronecker square."""
    one = torch.tensor(matrix, dtype=torch.float64)
    return torch.kron(one, one).to(like)


def _winograd(m: int) -> Callable[[Conv2d], Function]:
    to_input, to_kernel, to_output = {
        2: (_F2_INPUT, _F2_KERNEL, _F2_OUTPUT), 4: (_F4_INPUT, _F4_KERNEL, _F4_OUTPUT),
    }[m]  # fmt: skip
    n = m + 2

    def tiles(x: Tensor, pad_h: int, pad_w: int) -> tuple[Tensor, int, int]:
        """Overlapping tiles of a padded image, transformed, [n * n, C, B * tiles]; tiles of a column, of a row."""
        height, width = x.shape[2] + 2 * pad_h - 2, x.shape[3] + 2 * pad_w - 2  # of the output
        down, across = -(-height // m), -(-width // m)
        x = F.pad(x, (pad_w, across * m - width + pad_w, pad_h, down * m - height + pad_h))
        windows = x.unfold(2, n, m).unfold(3, n, m).permute(4, 5, 1, 0, 2, 3)  # [n, n, C, B, down, across]
        flat = windows.reshape(n * n, -1)
        return (_squared(to_input, x) @ flat).view(n * n, x.shape[1], -1), down, across

    def convolve(x: Tensor, weight: Tensor, pad_h: int, pad_w: int) -> Tensor:
        batch, out = x.shape[0], weight.shape[0]
        height, width = x.shape[2] + 2 * pad_h - 2, x.shape[3] + 2 * pad_w - 2
        inputs, down, across = tiles(x, pad_h, pad_w)
        kernels = (_squared(to_kernel, x) @ weight.permute(2, 3, 0, 1).reshape(9, -1)).view(n * n, out, -1)
        products = torch.bmm(kernels, inputs)
        y = (_squared(to_output, x) @ products.view(n * n, -1)).view(m, m, out, batch, down, across)
        y = y.permute(3, 2, 4, 0, 5, 1).reshape(batch, out, down * m, across * m)
        return y[:, :, :height, :width]

    def weight_gradient(x: Tensor, grad: Tensor, pad_h: int, pad_w: int) -> Tensor:
        inputs, down, across = tiles(x, pad_h, pad_w)
        batch, out, height, width = grad.shape
        grad = F.pad(grad, (0, across * m - width, 0, down * m - height))
        parts = grad.view(batch, out, down, m, across, m).permute(3, 5, 1, 0, 2, 4).reshape(m * m, -1)
        outputs = (_squared(to_output, x).t() @ parts).view(n * n, out, -1)
        products = torch.bmm(outputs, inputs.transpose(1, 2))  # [n * n, O, C]
        gradient = _squared(to_kernel, x).t() @ products.view(n * n, -1)
        return gradient.view(3, 3, out, -1).permute(2, 3, 0, 1).contiguous()

    def make(op: Conv2d) -> Function:
        pad_h, pad_w = op.pad_h, op.pad_w
        if op.direction == "forward":
            return lambda x, weight: convolve(x, weight, pad_h, pad_w)
        if op.direction == "weight_gradient":
            return lambda x, grad: weight_gradient(x, grad, pad_h, pad_w)
        return lambda grad, weight: convolve(grad, weight.flip(2, 3).transpose(0, 1), 2 - pad_h, 2 - pad_w)

    return make


def _winograd_problem(op: Op, device: str) -> str:
    conv = as_conv2d(op)
    if conv is None:
        return "not a convolution"
    if (conv.kernel_h, conv.kernel_w, conv.stride_h, conv.stride_w) != (3, 3, 1, 1):
        return "Winograd's tiles here are for 3 x 3 kernels of stride 1"
    if max(conv.pad_h, conv.pad_w) > 2:
        return "padding beyond the kernel (more than 2) is not done by this route"
    return _dtype_problem(conv) or _no_groups(conv)


def _dtype_problem(conv: Conv2d) -> str:
    if conv.dtype not in EXACT_DTYPES:
        return f"{conv.dtype}: its transforms add and subtract, which only {' and '.join(EXACT_DTYPES)} survive"
    return ""


# ---- FFT


def fast_size(least: int) -> int:
    """The smallest length >= `least` with no prime factor beyond 5: transforms of it are fast in every library."""
    return next(size for size in _sizes_from(least) if _smooth(size))


def _sizes_from(least: int) -> Iterator[int]:
    size = max(1, least)
    while True:
        yield size
        size += 1


def _smooth(size: int) -> bool:
    for prime in (2, 3, 5):
        while size % prime == 0:
            size //= prime
    return size == 1


def _fft_sizes(conv: Conv2d) -> tuple[int, int]:
    return fast_size(conv.height + 2 * conv.pad_h), fast_size(conv.width + 2 * conv.pad_w)


def _fft(op: Conv2d) -> Function:
    """The padded image is as long as the transform at least, so that what wraps around is never read."""
    sizes = _fft_sizes(op)

    def spectrum(x: Tensor) -> Tensor:
        """[frequencies, dim 0, dim 1]"""
        return torch.fft.rfft2(x, sizes).flatten(2).permute(2, 0, 1)

    def image(spectrum_: Tensor) -> Tensor:
        whole = spectrum_.permute(1, 2, 0).unflatten(2, (sizes[0], -1))
        return torch.fft.irfft2(whole, sizes)

    def spread(grad: Tensor) -> Tensor:
        """The gradient with the positions a stride left out as zeros."""
        if op.stride_h == op.stride_w == 1:
            return grad
        height, width = (grad.shape[2] - 1) * op.stride_h + 1, (grad.shape[3] - 1) * op.stride_w + 1
        full = grad.new_zeros(*grad.shape[:2], height, width)
        full[:, :, :: op.stride_h, :: op.stride_w] = grad
        return full

    def forward(x: Tensor, weight: Tensor) -> Tensor:
        y = image(torch.bmm(spectrum(_padded(x, op)), spectrum(weight).conj().transpose(1, 2)))
        height, width = op.out_height * op.stride_h, op.out_width * op.stride_w
        return y[:, :, : height : op.stride_h, : width : op.stride_w].contiguous()

    def input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
        x = image(torch.bmm(spectrum(spread(grad)), spectrum(weight)))
        return x[:, :, op.pad_h : op.pad_h + op.height, op.pad_w : op.pad_w + op.width].contiguous()

    def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
        gradient = image(torch.bmm(spectrum(spread(grad)).conj().transpose(1, 2), spectrum(_padded(x, op))))
        return gradient[:, :, : op.kernel_h, : op.kernel_w].contiguous()

    return {"forward": forward, "input_gradient": input_gradient, "weight_gradient": weight_gradient}[op.direction]


def _fft_problem(op: Op, device: str) -> str:
    conv = as_conv2d(op)
    if conv is None:
        return "not a convolution"
    if conv.kernel_h * conv.kernel_w < FFT_TAPS:
        return f"a kernel of {conv.kernel_h} x {conv.kernel_w}: transforms pay from {FFT_TAPS} taps on"
    height, width = _fft_sizes(conv)
    channels = conv.batch * (conv.in_channels + conv.out_channels) + conv.in_channels * conv.out_channels
    needed = 2.0 * channels * height * (width // 2 + 1) * 2 * DTYPE_BYTES[conv.dtype]  # spectra, and once more turned
    if needed > SPECTRUM_BYTES:
        return f"its spectra would take {needed / 1e9:.1f} GB, allowed {SPECTRUM_BYTES / 1e9:.1f} GB"
    return _dtype_problem(conv) or _no_groups(conv)


ROUTES: tuple[Route, ...] = (
    Route("im2col", _for_both(_im2col), _im2col_problem, library="turbopump"),
    Route("pointwise", _for_both(_pointwise), _pointwise_problem, _channels_last, library="turbopump"),
    Route("winograd F(2x2,3x3)", _for_both(_winograd(2)), _winograd_problem, library="turbopump"),
    Route("winograd F(4x4,3x3)", _for_both(_winograd(4)), _winograd_problem, library="turbopump"),
    Route("fft", _for_both(_fft), _fft_problem, library="turbopump"),
)
"""Own algorithms for Conv2d and Conv1d, beside what PyTorch's switches give."""
