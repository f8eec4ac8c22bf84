"""Computing an operation once: realistic inputs for it, and a function from them to its result.

A *route* is one way this machine offers to compute an operation: a library behind a switch, a memory layout, an
algorithm. All routes of an operation take the same `inputs` and give the same result within rounding. The families
(`kernels_dense`, `kernels_moving`) say what the inputs are; here is what they have in common.

Backward operations are timed alone: `prepare` computes the forward once, untimed, and keeps its graph. Forward
functions run as in training (batch norm with the batch's statistics, recurrent layers that keep their gates), but
their inputs ask for no gradients, so autograd's own bookkeeping is not in their time (`Launch("autograd")` is).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from turbopump.compute import kernels_dense, kernels_moving
from turbopump.compute.operands import Kernel, Values
from turbopump.compute.ops import OPS
from turbopump.core.errors import UsageError
from turbopump.core.workload import Op

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]
KERNELS = {**kernels_dense.KERNELS, **kernels_moving.KERNELS}


@dataclass(frozen=True)
class Route:
    """A way to compute operations of one or more kinds."""

    name: str
    function: Callable[[Op], Function]
    """Of an operation: a function from its (prepared) `inputs` to its result."""
    problem: Callable[[Op, str], str] = lambda op, device: ""
    """Why the route does not exist for an operation on a device ("cpu", "cuda"); empty where it does."""
    prepare: Callable[[Op, tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda op, inputs: inputs
    """Lays inputs out as the route wants them; not timed, since a model would keep them so."""
    setting: Callable[[], AbstractContextManager[object]] = nullcontext
    """Global switches that hold while the route prepares and computes; they are put back."""
    library: str = ""
    first_s: float = 0.0
    """About what the first use of an operation costs beyond its calls, e.g. the seconds of a compiler."""
    comparable: bool = True
    """False where its results are no other way to the default's: a model's own kernel, which does a part of its
    neighbours' work too. It is timed, never compared nor advised."""

    def ready(self, op: Op, inputs: tuple[Tensor, ...]) -> Callable[[], Outputs]:
        """A call without arguments that computes `op`: what is timed. To be made and called within `setting`."""
        return partial(self.function(op), *self.prepare(op, inputs))


def inputs(op: Op, device: str, generator: torch.Generator) -> tuple[Tensor, ...]:
    """What `op` is computed from, with realistic values; for a backward, the forward's and the output's gradient.

    Raises `UsageError` for an operation of another domain, and what PyTorch raises where they do not fit.
    """
    if type(op) not in KERNELS:
        raise UsageError(f"{op.key} is not a dense operation: those are {', '.join(OPS)}")
    return KERNELS[type(op)].inputs(op, Values(device, generator))


def function(op: Op, kernels: Mapping[type[Op], Kernel] = KERNELS) -> Function:
    """PyTorch's default route: a function of the inputs, or for a backward of what `prepare` makes of them."""
    return _gradients if getattr(op, "backward", False) else kernels[type(op)].forward(op)


def prepare(op: Op, given: tuple[Tensor, ...], kernels: Mapping[type[Op], Kernel] = KERNELS) -> tuple[Tensor, ...]:
    """For a backward the forward's output, its gradient, and the leaves whose gradients are wanted; else `given`."""
    if not getattr(op, "backward", False):
        return given
    kernel = kernels[type(op)]
    *forward_inputs, grad = given
    wanted = kernel.wanted(op)
    leaves = [x.detach().requires_grad_() if i in wanted else x for i, x in enumerate(forward_inputs)]
    with torch.enable_grad():
        output = kernel.forward(op)(*leaves)
    first = output if isinstance(output, Tensor) else output[0]
    return (first, grad, *(leaves[i] for i in wanted))


def route_of_model(
    name: str, own: Mapping[type[Op], tuple[Kernel, Callable[[Any], bool]]], devices: tuple[str, ...] = ("cpu",)
) -> Route:
    """The route called as a model, by the kernels that the model has in place of PyTorch's functions.

    `own` has, by class of operation, the kernel (its `inputs` are not asked for: all routes share the default's) and
    for which operations it stands.
    """
    kernels = {kind: kernel for kind, (kernel, _) in own.items()}

    def problem(op: Op, device: str) -> str:
        stands = type(op) in own and own[type(op)][1](op) and torch.device(device).type in devices
        return "" if stands else f"the model {name} has no kernel of its own for it"

    return Route(name, partial(function, kernels=kernels), problem, partial(prepare, kernels=kernels),
                 comparable=False)  # fmt: skip


def _gradients(output: Tensor, grad: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(output, leaves, grad, retain_graph=True)
