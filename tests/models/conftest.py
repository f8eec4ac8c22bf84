"""Counts what a torch model really does, to hold the torch-free workloads against."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode


def count_flops(run: Callable[[], Tensor]) -> dict[str, int]:
    """FLOPs of forward and backward by operator (`aten.mm`, ...), as torch's counter sees aten calls."""
    with FlopCounterMode(display=False) as counter:
        run().backward()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


def count_saved_bytes(model: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that autograd saves in `run`, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values())


@pytest.fixture
def counted_flops() -> Callable[..., dict[str, int]]:
    return count_flops


@pytest.fixture
def saved_bytes() -> Callable[..., int]:
    return count_saved_bytes
