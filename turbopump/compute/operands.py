"""What operations are computed from: tensors as training meets them, never zeros or NaN.

Normal activations, small weights, Zipf-distributed tokens. `Kernel` is the form in which the families of
`kernels.py` state the inputs and the function of an operation.

Values decide times: `sqrt` over negative numbers takes 20 to 60 times as long on CPU as over positive ones, and zeros
or constants flatter processors that save power by them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]
DTYPES: dict[str, torch.dtype] = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "int64": torch.int64,
}
"""In memory; tf32 is a way to multiply fp32 tensors."""


POOL = 2**22
"""Values drawn at most; larger tensors repeat them (a gibibyte of normal numbers would take seconds)."""


@dataclass(frozen=True)
class Values:
    """Draws tensors on `device` from `generator`, on the generator's own device."""

    device: str
    generator: torch.Generator

    def normal(self, *shape: int, dtype: str, scale: float = 1.0) -> Tensor:
        """Of standard deviation `scale`; int8: uniform over -127..127."""
        count = min(math.prod(shape), POOL)
        drawn = self._empty(count).normal_(0.0, scale, generator=self.generator)
        if dtype == "int8":
            drawn = self._empty(count).uniform_(-127.49, 127.49, generator=self.generator).round_()
        return self._repeated(drawn.to(DTYPES[dtype]), shape)

    def positive(self, *shape: int, dtype: str) -> Tensor:
        """Uniform over 0.5..1.5."""
        drawn = self._empty(min(math.prod(shape), POOL)).uniform_(0.5, 1.5, generator=self.generator)
        return self._repeated(drawn.to(DTYPES[dtype]), shape)

    def tokens(self, count: int, vocab: int) -> Tensor:
        """Indices below `vocab`, the k-th as frequent as 1 / k (Zipf's law, as words are)."""
        uniform = self._empty(count).uniform_(0.0, 1.0, generator=self.generator)
        return (uniform * math.log(vocab)).exp().long().clamp_(1, vocab).sub_(1).to(self.device)

    def indices(self, count: int, high: int) -> Tensor:
        """Uniform over 0..high - 1."""
        drawn = torch.randint(0, high, (count,), generator=self.generator, device=self.generator.device)
        return drawn.to(self.device)

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, device=self.generator.device)

    def _repeated(self, drawn: Tensor, shape: tuple[int, ...]) -> Tensor:
        """`drawn` over and over in a tensor of its own."""
        count = math.prod(shape)
        if count > len(drawn):
            filled = drawn.new_empty(count)
            whole = count // len(drawn) * len(drawn)
            filled[:whole].view(-1, len(drawn)).copy_(drawn)
            filled[whole:].copy_(drawn[: count - whole])
            drawn = filled
        return drawn.view(shape).to(self.device)


@dataclass(frozen=True)
class Kernel:
    """How operations of one class are computed by PyTorch's defaults."""

    inputs: Callable[[Any, Values], Tensors]
    forward: Callable[[Any], Callable[..., Tensor | Tensors]]
    wanted: Callable[[Any], tuple[int, ...]] = lambda op: ()
    """Which inputs of the forward the backward gives gradients of."""
