"""The example of a `Logger`: scalars for TensorBoard, below `logs/tensorboard`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from turbopump.core.errors import MissingDependencyError


class TensorBoardLogger:
    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingDependencyError("tensorboard", "tensorboard", "the tensorboard logger") from error
        self._writer = SummaryWriter(str(directory / "tensorboard"))

    def log(self, record: Mapping[str, Any]) -> None:
        group = {"step": "train", "progress": "speed"}.get(record["type"], record["type"])
        for name, value in record.items():
            if isinstance(value, float) and name != "epoch_s":
                self._writer.add_scalar(f"{group}/{name}", value, record.get("step"))

    def close(self) -> None:
        self._writer.close()
