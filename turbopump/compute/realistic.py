"""Tensors as training meets them: normal activations, small weights, Zipf-distributed tokens; never zeros or NaN.

Values decide times: `sqrt` over negative numbers takes 20 to 60 times as long on CPU as over positive ones, and zeros
or constants flatter processors that save power by them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Values:
    """Draws tensors on `device` from `generator` (of the host, so that every device gets the same values)."""

    device: str
    generator: torch.Generator

    def normal(self, *shape: int, dtype: str, scale: float = 1.0) -> Tensor:
        """Of standard deviation `scale`; int8: uniform over -127..127."""
        if dtype == "int8":
            whole = torch.randint(-127, 128, shape, generator=self.generator, dtype=torch.int8)
            return whole.to(self.device)
        drawn = torch.empty(shape).normal_(0.0, scale, generator=self.generator)
        return drawn.to(DTYPES[dtype]).to(self.device)

    def positive(self, *shape: int, dtype: str) -> Tensor:
        """Uniform over 0.5..1.5."""
        return torch.empty(shape).uniform_(0.5, 1.5, generator=self.generator).to(DTYPES[dtype]).to(self.device)

    def tokens(self, count: int, vocab: int) -> Tensor:
        """Indices below `vocab`, the k-th as frequent as 1 / k (Zipf's law, as words are)."""
        uniform = torch.empty(count).uniform_(0.0, 1.0, generator=self.generator)
        return (uniform * math.log(vocab)).exp().long().clamp_(1, vocab).sub_(1).to(self.device)

    def indices(self, count: int, high: int) -> Tensor:
        """Uniform over 0..high - 1."""
        return torch.randint(0, high, (count,), generator=self.generator).to(self.device)
