"""TrainState: everything that must survive a stop, and its form in a checkpoint.

Names are those of the plain model's `state_dict` below `model.`, and of the parameter they belong to below
`optimizer.`. The loader's position and the schedule are functions of the step, random numbers of their place, so the
step is all that is left to store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from turbopump.core.errors import CheckpointError, ResumeError
from turbopump.data.loader import Loader
from turbopump.training.forward_backward import ForwardBackward
from turbopump.training.optim import StepOptimizer


@dataclass
class TrainState:
    """The live objects of a run. `step` counts finished optimizer steps."""

    model: nn.Module
    forward_backward: ForwardBackward
    optimizer: StepOptimizer
    loader: Loader
    seed: int
    step: int = 0

    def checkpoint_tensors(self) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        tensors = {
            f"model.{name}": value.detach()
            for name, value in get_model_state_dict(self.model).items()
            if isinstance(value, Tensor)
        }
        tensors |= {f"optimizer.{name}": value for name, value in self.optimizer.state_tensors(names).items()}
        return tensors

    def checkpoint_values(self) -> dict[str, Any]:
        return {"step": self.step, "seed": self.seed, "dataset": getattr(self.loader.source, "digest", None)}

    def load_checkpoint(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Raises `ResumeError` where the dataset is another one, `CheckpointError` where the model is."""
        before, now = values.get("dataset"), getattr(self.loader.source, "digest", None)
        if before != now:
            raise ResumeError(
                f"the dataset has changed since this run's last checkpoint (digest {before} then, {now} now): "
                f"give the dataset it was trained on, or start a new run with --from"
            )
        load_model(self.model, below(tensors, "model."))
        self.optimizer.load_state_tensors(below(tensors, "optimizer."), dict(self.model.named_parameters()))
        self.step = self.optimizer.num_updates = int(values["step"])
        self.loader.seek(self.step)

    def rewind_buffers(self) -> BufferGuard:
        return BufferGuard(self.model)


class BufferGuard:
    """Keeps what forward writes into buffers (running statistics), so that a step that is given up leaves no trace."""

    def __init__(self, model: nn.Module) -> None:
        persistent = set(model.state_dict(keep_vars=True))
        self._buffers = [b for name, b in model.named_buffers() if name in persistent]
        self._before = [torch.empty_like(b) for b in self._buffers]

    def remember(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    def restore(self) -> None:
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)


def below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_model(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a complete state dict; raises `CheckpointError` naming what is missing, extra or of another shape."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{name} is {tuple(weights[name].shape)} there and {tuple(own[name].shape)} here"
        for name in own.keys() & weights.keys()
        if own[name].shape != weights[name].shape
    ]
    problems = [f"missing {missing[:3]}"] if missing else []
    problems += [f"unknown {extra[:3]}"] if extra else []
    problems += shapes[:3]
    if problems:
        raise CheckpointError(
            f"the weights do not fit this model: {'; '.join(problems)}: use the model they were made by"
        )
    model.load_state_dict(weights)
