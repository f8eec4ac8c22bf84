"""What a communication operation is: collectives with the bytes they must move, and computing while communicating.

Conventions, those of nccl-tests (its doc/PERFORMANCE.md), so that figures compare:
- `bytes` is the size of the whole array: all-reduce and broadcast: the buffer that every rank holds; all-gather: what
  every rank ends with; reduce-scatter: what every rank begins with; all-to-all: what every rank sends, its own share
  included; send: the message. (FSDP's all-gather of a layer has the layer's bytes, on any number of ranks.)
- `cost.bytes` is what each rank must send at least, which a bandwidth-optimal algorithm does: 2(p-1)/p of an
  all-reduce (ring: Patarasuk and Yuan 2009), (p-1)/p of an all-gather, reduce-scatter or all-to-all, all of a
  broadcast or send. Divided by seconds it is the bus bandwidth, comparable with the link's rate for any p.
- the additions of a reduction count 0 FLOPs, as everything that is no product does (turbopump/compute/ops.py).
- `level` is the widest connection that is crossed: between the parts of a `device`, the devices or processes of a
  `node`, the nodes of a `rack`, the racks of a `pod`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from turbopump.core.errors import UsageError
from turbopump.core.workload import DTYPE_BYTES, Op, OpCost

Level = Literal["device", "node", "rack", "pod"]
LEVELS: tuple[Level, ...] = ("device", "node", "rack", "pod")


@dataclass(frozen=True)
class Collective(Op):
    """An operation of `ranks` ranks over `bytes` bytes of `dtype`. Raises `UsageError` for what cannot be."""

    bytes: int
    ranks: int
    level: Level = "node"
    dtype: str = "fp32"

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.ranks < 1:
            raise UsageError(f"{kind}.ranks ({self.ranks}) must be at least 1")
        if self.bytes < 0:
            raise UsageError(f"{kind}.bytes ({self.bytes}) must not be negative")
        if self.level not in LEVELS:
            raise UsageError(f"{kind}.level ({self.level!r}) must be one of {', '.join(LEVELS)}")
        if self.dtype not in DTYPE_BYTES:
            raise UsageError(f"{kind}.dtype ({self.dtype!r}) must be one of {', '.join(DTYPE_BYTES)}")

    @property
    def sent_share(self) -> float:
        """Bytes that each rank must send, as a share of `bytes`: the factor of the bus bandwidth."""
        raise NotImplementedError

    @property
    def steps(self) -> int:
        """Messages one after the other that a bandwidth-optimal algorithm needs: how often it pays the latency."""
        raise NotImplementedError

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, self.bytes * self.sent_share)

    def bus_bytes_per_s(self, seconds: float) -> float:
        """Bus bandwidth of nccl-tests: what every rank sent a second."""
        return self.cost.bytes / seconds


@dataclass(frozen=True)
class AllReduce(Collective):
    """Every rank gets the sum of all ranks' buffers."""

    @property
    def sent_share(self) -> float:
        return 2.0 * (self.ranks - 1) / self.ranks

    @property
    def steps(self) -> int:
        return 2 * (self.ranks - 1)


@dataclass(frozen=True)
class _OfShares(Collective):
    """Each rank sends one share (`bytes / ranks`) for each other, in a ring or pairwise."""

    @property
    def sent_share(self) -> float:
        return (self.ranks - 1) / self.ranks

    @property
    def steps(self) -> int:
        return self.ranks - 1


@dataclass(frozen=True)
class AllGather(_OfShares):
    """Every rank gets the shares (`bytes / ranks` each) of all."""


@dataclass(frozen=True)
class ReduceScatter(_OfShares):
    """Every rank gets its share (`bytes / ranks`) of the sum of all ranks' buffers."""


@dataclass(frozen=True)
class AllToAll(_OfShares):
    """Every rank gets from each other a share of its own (`bytes / ranks` a pair)."""


@dataclass(frozen=True)
class Broadcast(Collective):
    """Every rank gets the buffer of one: `ceil(log2 p)` rounds, or a pipelined chain that sends it once."""

    @property
    def sent_share(self) -> float:
        return 1.0 if self.ranks > 1 else 0.0

    @property
    def steps(self) -> int:
        return (self.ranks - 1).bit_length()


@dataclass(frozen=True)
class Send(Collective):
    """One message from one rank to another; its time is half of a round trip."""

    ranks: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ranks != 2:
            raise UsageError(f"Send.ranks ({self.ranks}) must be 2: it goes from one rank to one other")

    @property
    def sent_share(self) -> float:
        return 1.0

    @property
    def steps(self) -> int:
        return 1


@dataclass(frozen=True)
class Barrier(Collective):
    """Nobody goes on before all have come: `ceil(log2 p)` rounds (dissemination: Hensgen, Finkel and Manber 1988)."""

    bytes: int = 0
    ranks: int = 2
    dtype: str = "int8"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bytes:
            raise UsageError(f"Barrier.bytes ({self.bytes}) must be 0: it carries nothing")

    @property
    def sent_share(self) -> float:
        return 0.0

    @property
    def steps(self) -> int:
        return (self.ranks - 1).bit_length()


@dataclass(frozen=True)
class Overlap(Op):
    """On every rank, square products of `size` computed while an asynchronous all-reduce of `bytes` runs.

    Its row's time is that of the all-reduce then. What matters stands in the row's `facts`: `slowdown_compute`, time
    of a product while communicating over its time alone, and `slowdown_comm`, the same of the all-reduce.
    """

    size: int
    bytes: int
    ranks: int
    level: Level = "node"
    dtype: str = "fp32"

    @property
    def all_reduce(self) -> AllReduce:
        return AllReduce(self.bytes, self.ranks, self.level, self.dtype)

    @property
    def cost(self) -> OpCost:
        """The bytes of the all-reduce; how many products go beside it is what is measured, so they count 0."""
        return self.all_reduce.cost


COLLECTIVES: tuple[type[Collective], ...] = (AllReduce, AllGather, ReduceScatter, AllToAll, Broadcast, Send, Barrier)
