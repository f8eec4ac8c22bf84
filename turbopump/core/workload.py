"""What a training step consists of, without torch: operations, their cost, and the blocks of a model.

One descriptor serves four times: `probe` measures an `Op`, `plan` predicts it, `train` spends it, `report` explains
it. Each physical domain (compute, comms, data) defines its own `Op`s. A `Workload` lists the operations of one
microbatch on one device: blocks, each repeated `count` times, with forward and backward operations.
Frozen: changing a type here takes a page in docs/decisions/.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

DTYPE_BYTES: Mapping[str, int] = {
    "fp64": 8,
    "fp32": 4,
    "tf32": 4,
    "bf16": 2,
    "fp16": 2,
    "fp8": 1,
    "int8": 1,
    "int64": 8,
}


@dataclass(frozen=True, slots=True)
class OpCost:
    """Work of an operation: floating-point operations and bytes moved to and from memory. Adds and multiplies."""

    flops: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: OpCost) -> OpCost:
        return OpCost(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> OpCost:
        return OpCost(self.flops * times, self.bytes * times)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Op:
    """An operation on one device or group. Subclasses are frozen dataclasses; their fields are the descriptor."""

    @property
    @abstractmethod
    def cost(self) -> OpCost:
        """Floating-point operations (a multiply-add counts two) and the least bytes moved."""

    @property
    def key(self) -> str:
        """Stable text of the descriptor, e.g. `Gemm(m=64,n=64,k=64,dtype=bf16,layout=nt)`."""
        inside = ",".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))
        return f"{type(self).__name__}({inside})"


@dataclass(frozen=True)
class Block:
    """A part of the model that is repeated `count` times, e.g. one transformer layer.

    `kept_bytes` are the activations kept for backward by one repetition for one microbatch, by recompute mode
    (`none`, `selective`, `full`); `params` counts the parameters of one repetition.
    """

    name: str
    forward: tuple[Op, ...]
    backward: tuple[Op, ...]
    params: int
    kept_bytes: Mapping[str, int]
    count: int = 1


@dataclass(frozen=True)
class Workload:
    """One microbatch of one model: `samples` samples that hold `units` of what the run counts (`unit`: token, image,
    frame). `tied_params` are counted by two blocks but stored once."""

    name: str
    blocks: tuple[Block, ...]
    samples: int
    units: int
    unit: str
    dtype: str
    tied_params: int = 0
    optimizer_ops: tuple[Op, ...] = field(default=())

    @property
    def params(self) -> int:
        return sum(b.params * b.count for b in self.blocks) - self.tied_params

    def ops(self) -> Iterator[tuple[Op, int]]:
        """All forward and backward operations with their number of repetitions."""
        for block in self.blocks:
            for op in (*block.forward, *block.backward):
                yield op, block.count

    @property
    def forward_cost(self) -> OpCost:
        return sum((op.cost * b.count for b in self.blocks for op in b.forward), OpCost())

    @property
    def cost(self) -> OpCost:
        """Model FLOPs and bytes of forward and backward, without recomputation."""
        return sum((op.cost * count for op, count in self.ops()), OpCost())

    def kept_bytes(self, recompute: str = "none") -> int:
        """Activation bytes kept for backward by one microbatch."""
        return sum(b.kept_bytes[recompute] * b.count for b in self.blocks)
