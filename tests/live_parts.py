"""A user's own model, dataset and loss, as a script would have them; importable by spawned ranks and by --model."""

import random

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_SAMPLES = 96


class Noisy(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Regression data with augmentation drawn from every global generator there is."""

    def __init__(self, num_samples: int = NUM_SAMPLES, poison: int | None = None) -> None:
        generator = torch.Generator().manual_seed(7)
        self.x = torch.randn(num_samples, 8, generator=generator)
        self.y = self.x.sum(1, keepdim=True).sin()
        if poison is not None:
            self.x[poison, 3] = torch.nan

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        jitter = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return self.x[index] + 0.01 * jitter, self.y[index]


class Net(nn.Module):
    """Dropout and running statistics: what a resume gets wrong when it is wrong."""

    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.norm = nn.BatchNorm1d(32)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(32, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(F.gelu(self.norm(self.first(x)))))


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.mse_loss(model(x), y)


def build() -> Net:
    return Net()


def data() -> Noisy:
    return Noisy()


class Forgetful(Net):
    """Keeps state that no checkpoint holds: its resume cannot be exact, and must be found out."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * (1 + 0.01 * self.calls)


def forgetful() -> Forgetful:
    return Forgetful()
