"""Deep Speech 2's own kernels as a route of `probe`: recurrent layers of both directions, norms under a mask.

Of a recurrent layer all lengths are full; of a norm all positions count. The arithmetic is the same with shorter ones.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from turbopump.compute import kernels
from turbopump.compute.kernels import KERNELS, Route, route_of_model
from turbopump.compute.operands import DTYPES, Kernel, Tensors
from turbopump.compute.ops import Norm, Rnn
from turbopump.core.workload import Op
from turbopump.models.deepspeech2.norm import MaskedBatchNorm
from turbopump.models.deepspeech2.recurrent import bidirectional


def _recurrence(op: Rnn) -> Callable[..., Tensor]:
    """Takes the default's inputs; the initial states are always zero here."""
    lengths = torch.full((op.batch,), op.steps)
    states = 2 if op.kind == "lstm" else 1

    def recur(x: Tensor, *rest: Tensor) -> Tensor:
        return bidirectional(op.kind, x, lengths, rest[states:], DTYPES[op.dtype])

    return recur


def _norm(op: Norm) -> Callable[..., Tensor]:
    norm, masks = MaskedBatchNorm(op.dim, dim=1), {}

    def run(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        if x.shape not in masks:
            masks[x.shape] = torch.ones(x.shape[0], 1, x.shape[2], dtype=torch.bool)
        return functional_call(norm, {"weight": gain, "bias": bias}, (x, masks[x.shape]))

    return run


def _of_floats(op: Any) -> bool:
    return op.dtype in ("fp32", "bf16")


_KERNELS: dict[type[Op], Kernel] = {Rnn: Kernel(KERNELS[Rnn].inputs, _recurrence, KERNELS[Rnn].wanted)}


def _added(op: Op, given: Tensors) -> Tensors:
    """As `kernels.prepare`; the directions are added here, so the output's gradient is as wide as one."""
    if isinstance(op, Rnn) and op.backward:
        given = (*given[:-1], given[-1][..., : op.hidden_size].contiguous())
    return kernels.prepare(op, given, _KERNELS)


def _no_layer(op: Op, device: str) -> str:
    stands = isinstance(op, Rnn) and op.bidirectional and op.kind in ("gru", "lstm") and _of_floats(op)
    return "" if stands and torch.device(device).type == "cpu" else "Deep Speech 2 has no kernel of its own for it"


ROUTES = (
    Route("deepspeech2", partial(kernels.function, kernels=_KERNELS), _no_layer, _added, comparable=False),
    route_of_model(
        "deepspeech2",
        {
            Norm: (
                Kernel(KERNELS[Norm].inputs, _norm, KERNELS[Norm].wanted),
                lambda op: op.kind == "batch" and _of_floats(op),
            ),
        },
    ),
)
