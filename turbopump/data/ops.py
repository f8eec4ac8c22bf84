"""What storage does: reads and writes of one size, cold (from the device) or cached (from the page cache). No torch.

Conventions:
- `bytes` of a cost are what the reader asked for or the writer gave, not what the device moves (whole sectors, read-
  ahead, metadata): the ratio of the two is the engine's business, and shows in its time.
- An operation is one read or one write; its time at depth `d` is the elapsed time over the number of reads while `d`
  are requested at once, so its inverse is the rate (reads/s), and latency is the time at depth 1.
"""

from __future__ import annotations

from dataclasses import dataclass

from turbopump.core.workload import Op, OpCost


@dataclass(frozen=True)
class SequentialRead(Op):
    """The next `bytes_per_read` of a file that is read from front to back, `depth` reads ahead at once."""

    bytes_per_read: int
    cached: bool = False
    depth: int = 1

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, float(self.bytes_per_read))


@dataclass(frozen=True)
class RandomRead(Op):
    """`bytes` at an unforeseeable place of a file, `depth` of such reads requested at once."""

    bytes: int
    depth: int = 1
    cached: bool = False

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, float(self.bytes))


@dataclass(frozen=True)
class SequentialWrite(Op):
    """The next `bytes_per_write` of a file that is on the device in the end: fsync has its share in each write."""

    bytes_per_write: int

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, float(self.bytes_per_write))


@dataclass(frozen=True)
class CheckpointWrite(Op):
    """A checkpoint of `bytes` hashed, written past the page cache, made durable, sealed and renamed, by one rank."""

    bytes: int

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, float(self.bytes))


@dataclass(frozen=True)
class CheckpointRead(Op):
    """The tensors of a checkpoint of `bytes` read from the device and compared with their checksum."""

    bytes: int

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, float(self.bytes))
