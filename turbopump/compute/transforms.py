"""Fourier transforms by other means than PyTorch's default, as routes to be measured.

`default` is `torch.fft`: MKL where PyTorch was built with it, pocketfft else; cuFFT on a GPU. Beside it:
- `pocketfft`: `numpy.fft` (Reinecke's pocketfft), which keeps fp32 as fp32; reads and writes the tensors in place;
- `dft product`: the discrete transform by its definition, one matrix product. N^2 instead of N log N operations, but
  at the rate of a product: for short transforms in large batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from turbopump.compute.kernels import Function, Route
from turbopump.compute.ops import Fft
from turbopump.core.workload import Op

LONGEST_PRODUCT = 256  # N^2 against 5 N log2 N: beyond, no product is 12 times as fast as a transform
NUMPY_DTYPES = ("fp32", "fp64")


def _pocketfft(op: Op) -> Function:
    assert isinstance(op, Fft)
    axes = tuple(range(-op.dims, 0))
    transform = np.fft.rfftn if op.kind == "real" else np.fft.fftn
    return lambda x: torch.from_numpy(transform(x.numpy(), axes=axes))


def _pocketfft_problem(op: Op, device: str) -> str:
    if not isinstance(op, Fft):
        return "not a Fourier transform"
    if device != "cpu":
        return "NumPy computes on the CPU only"
    return "" if op.dtype in NUMPY_DTYPES else f"NumPy transforms {' and '.join(NUMPY_DTYPES)} only"


def _dft_product(op: Op) -> Function:
    assert isinstance(op, Fft)
    if op.kind == "complex":
        matrix = _kept(lambda: _dft_matrix(op.length, op.length))
        return lambda x: x @ matrix(x)
    half = op.length // 2 + 1
    parts = _kept(lambda: torch.view_as_real(_dft_matrix(op.length, half)).flatten(1))  # [N, 2 * half]
    return lambda x: torch.view_as_complex((x @ parts(x)).unflatten(1, (half, 2)))


def _kept(make: Callable[[], Tensor]) -> Callable[[Tensor], Tensor]:
    """A table as a tensor is (dtype, device); made at the first call, which is not timed."""
    tables: dict[tuple[torch.dtype, torch.device], Tensor] = {}

    def like(x: Tensor) -> Tensor:
        if (x.dtype, x.device) not in tables:
            tables[x.dtype, x.device] = make().to(x.device, x.dtype)
        return tables[x.dtype, x.device]

    return like


def _dft_matrix(length: int, columns: int) -> Tensor:
    """`exp(-2 pi i j k / N)` for j of N rows and k of the first `columns`, complex128; j k is reduced first."""
    turns = torch.outer(torch.arange(length), torch.arange(columns)) % length
    angles = turns.double() * (-2 * math.pi / length)
    return torch.polar(torch.ones_like(angles), angles)


def _dft_problem(op: Op, device: str) -> str:
    if not isinstance(op, Fft):
        return "not a Fourier transform"
    if op.dims != 1 or op.length > LONGEST_PRODUCT:
        return f"a product pays for one-dimensional transforms of up to {LONGEST_PRODUCT} points"
    return "" if op.dtype in NUMPY_DTYPES else f"PyTorch has complex numbers for {' and '.join(NUMPY_DTYPES)} only"


ROUTES: tuple[Route, ...] = (
    Route("pocketfft", _pocketfft, _pocketfft_problem, library=f"NumPy {np.__version__}"),
    Route("dft product", _dft_product, _dft_problem, library="turbopump"),
)
"""Other ways to transform than `torch.fft`."""
