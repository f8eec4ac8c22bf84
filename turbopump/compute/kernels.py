"""Computing an operation once: realistic inputs for it, and a function from them to its result.

A *route* is one way this machine offers to compute an operation: a library behind a switch, a memory layout, an
algorithm. All routes of an operation take the same inputs and give the same result within rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch import Tensor

from turbopump.core.workload import Op

Outputs = Tensor | tuple[Tensor, ...]
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class Route:
    """A way to compute operations of one or more kinds."""

    name: str
    function: Callable[[Op], Function]
    """Of an operation: a function from its `inputs` to its result."""
    problem: Callable[[Op, str], str] = lambda op, device: ""
    """Why the route does not exist for an operation on a device ("cpu", "cuda"); empty where it does."""
    prepare: Callable[[Op, tuple[Tensor, ...]], tuple[Tensor, ...]] = lambda op, inputs: inputs
    """Lays inputs out as the route wants them; not timed, since a model would keep them so."""
    setting: Callable[[], AbstractContextManager[object]] = nullcontext
    """Global switches that hold while the route computes; they are put back."""
    library: str = ""
