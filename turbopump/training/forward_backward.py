"""Forward and backward of one step: accumulation, the global weight, model randomness, gradient synchronisation.

The loss of a step is the mean over the valid units (tokens, images) of the *global* batch: microbatch i on rank r
contributes its own mean times w_ir / sum(w). The result is a detached tensor on the device: this rank's share of the
loss (shares sum to the loss over ranks); nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from turbopump.comms import process_group
from turbopump.comms.data_parallel import GradientSync
from turbopump.core.randomness import seed_of
from turbopump.core.spans import span
from turbopump.data.ragged import Ragged

Loss = Callable[[nn.Module, Any], Tensor]
Weight = Callable[[Any], int]


class ForwardBackward:
    """Plain or accumulated forward and backward of the microbatches of one step.

    `loss(model, batch)` returns the mean over the batch's `weight(batch)` valid units.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        weight: Weight,
        *,
        device: torch.device,
        compute: str,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.model = model
        self._loss = loss
        self._weight = weight
        self.compute = compute
        self.global_weight = 0.0
        self._device = device
        self._autocast = autocast(device, compute)
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._sync = GradientSync(model) if world_size > 1 else None

    def __call__(self, microbatches: Sequence[Any], step: int) -> Tensor:
        """Gradients of one step in `.grad`; returns this rank's share of the loss, detached."""
        weights = [self._weight(batch) for batch in microbatches]
        self.global_weight = total = self._sum_over_ranks(sum(weights))
        share = torch.zeros((), device=self._device)
        for number, (batch, weight) in enumerate(zip(microbatches, weights)):
            reseed(self._device, seed_of(self._seed, "model", step, self._rank, number))
            last = number == len(microbatches) - 1
            with self._no_sync() if not last else nullcontext():
                with self._autocast:
                    loss = self._loss(self.model, to_device(batch, self._device))
                if weight != total:
                    loss = loss * (weight / total)
                loss.backward()
            share = loss.detach() if len(microbatches) == 1 else share + loss.detach()
        if self._sync is not None:
            self._sync.finish()
        return share

    def alone(self, batch: Any) -> None:
        """Gradients of one batch on this rank alone, in training's arithmetic; no collective."""
        reseed(self._device, seed_of(self._seed, "alone"))
        with self._no_sync():
            with self._autocast:
                loss = self._loss(self.model, to_device(batch, self._device))
            loss.backward()

    def _sum_over_ranks(self, weight: int) -> float:
        """All-reduce of one number (8 bytes, synchronous) where there are several ranks."""
        if self._world_size == 1:
            return weight
        with span("communication"):
            return process_group.all_reduce_sum([float(weight)])[0]

    def _no_sync(self) -> AbstractContextManager[Any]:
        return self._sync.accumulate() if self._sync is not None else nullcontext()


def autocast(device: torch.device, compute: str) -> AbstractContextManager[Any]:
    """The arithmetic of `precision.compute`: `fp32` as it is, `bf16` by torch's autocast."""
    return torch.autocast(device.type, torch.bfloat16) if compute == "bf16" else nullcontext()


def reseed(device: torch.device, seed: int) -> None:
    """Seed the generators the model draws from. `torch.manual_seed` costs 134 µs here (it visits every backend), the
    generator's own 1 µs."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, copied without waiting."""
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if isinstance(batch, Ragged) and batch.kind == "ragged":
        return Ragged(to_device(batch.values, device), to_device(batch.offsets, device))
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
