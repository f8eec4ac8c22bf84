"""Tensors out of a checkpoint or a plain safetensors file, whole and verified, without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from turbopump.core import checkpoint_store as store
from turbopump.core.errors import UsageError
from turbopump.core.tensor_file import read_layout, read_tensor
from turbopump.training.checkpoint_shards import DTYPES, flat_bytes, read_full

RANK_KEY = "turbopump_rank"  # marks a file that is only one rank's share of a checkpoint
_MODEL = "model."


def read_checkpoint(path: Path | str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """All tensors of a checkpoint, whole and on the CPU, and its values; every byte is verified.

    Raises `CorruptCheckpointError` naming file and tensor.
    """
    stored = store.open_checkpoint(Path(path))
    stored.check_files()
    return {name: read_full(stored, name) for name in stored.tensors}, stored.values


def read_weights(path: Path | str) -> dict[str, torch.Tensor]:
    """The weights of `RUN`, `RUN@STEP`, a checkpoint or a plain safetensors file, named as in the model's state dict.

    Raises `UsageError` where there are none, `CorruptCheckpointError` where they are damaged.
    """
    if not Path(path).is_file():
        stored = store.open_checkpoint(store.find_checkpoint(path))
        stored.check_files()
        names = [name for name in stored.tensors if name.startswith(_MODEL)]
        return {name.removeprefix(_MODEL): read_full(stored, name) for name in names}
    path = Path(path)
    with store.reading(path):
        layout = read_layout(path)
        if RANK_KEY in layout.metadata:
            raise UsageError(f"{path} is one rank's part of a checkpoint: give the directory {path.parent}")
        tensors = {}
        for name, entry in layout.tensors.items():
            tensors[name] = torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
            read_tensor(path, name, entry, flat_bytes(tensors[name]), None)
    return tensors
