"""What rows say of the machine as a whole: its device's rates, its links and its storage, as specs. Without torch.

A spec holds the best of what was measured, the rows hold all of it. What was not measured is left out, never guessed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, cast, get_args

from turbopump.hardware.processor import raise_to
from turbopump.hardware.profile import Measurement
from turbopump.hardware.specs import DeviceSpec, LinkSpec, StorageSpec

IN_MEMORY_BYTES = 1 << 27  # reading and writing this much goes beyond the caches
Level = Literal["device", "node", "rack", "pod"]


def memory_bytes_per_s(rows: Iterable[Measurement], device: str) -> float | None:
    """Best rate of copies and triads beyond the caches of a device; None where none was measured."""
    kinds = ("MemoryCopy", "MemoryTriad")
    moved = (row for row in rows if row.kind in kinds and row.device == device and row.works)
    return max((row.bytes_per_s for row in moved if row.bytes >= IN_MEMORY_BYTES), default=None)


def measured_device(device: DeviceSpec, rows: Sequence[Measurement], where: str, cores: int) -> DeviceSpec:
    """`device` ("cpu" of so many `cores`, or "cuda") with its memory's rate as measured, and peaks not below what was.

    The rate of some of the cores stands for all of them: a clock that was seen on one is taken for each.
    """
    for row in rows:
        if row.device == where and row.works and row.flops:
            device = raise_to(device, row.dtype, row.flops_per_s / _used(row, cores))
    rate = memory_bytes_per_s(rows, where)
    return device if rate is None else replace(device, memory_bytes_per_s=rate)


def with_peak_shares(
    rows: Iterable[Measurement], devices: Mapping[str, DeviceSpec], cores: int
) -> tuple[Measurement, ...]:
    """Rows with their share of the theoretical peak of the cores, or of the GPU, that they used.

    `devices` by "cpu", "cuda"; a row whose dtype has no known peak there keeps None.
    """
    shared = []
    for row in rows:
        peak = devices[row.device].flops_per_s.get(row.dtype) if row.device in devices else None
        known = peak and row.works and row.flops_per_s
        shared.append(replace(row, peak_share=row.flops_per_s / (peak * _used(row, cores))) if known and peak else row)
    return tuple(shared)


def _used(row: Measurement, cores: int) -> float:
    """The share of the device that the row's threads may use."""
    return min(1.0, row.threads / cores) if row.device == "cpu" else 1.0


def measured_links(rows: Iterable[Measurement]) -> tuple[LinkSpec, ...]:
    """A link for each level and library (the route) that collectives were measured on.

    Latency: a message's, or a step's of the ring that an all-reduce of the fewest bytes takes (2(p-1) of them);
    the rate: the best bus bandwidth, as nccl-tests defines it.
    """
    groups: dict[tuple[str, str, int], list[Measurement]] = defaultdict(list)
    for row in rows:
        level, ranks = row.op.get("level"), row.op.get("ranks")
        if row.domain == "comms" and row.works and level in get_args(Level) and isinstance(ranks, int) and ranks > 1:
            groups[row.route, str(level), ranks].append(row)
    links = []
    for (route, level, ranks), members in groups.items():
        latencies = [latency for row in members if (latency := _latency_s(row)) is not None]
        rate = max((row.bytes_per_s for row in members if row.kind != "Overlap"), default=0.0)
        if latencies and rate:
            links.append(LinkSpec(f"{route}, {ranks} ranks", cast(Level, level), rate, min(latencies), "measured",
                                  "turbopump probe"))  # fmt: skip
    return tuple(links)


def _latency_s(row: Measurement) -> float | None:
    if row.kind == "Send":
        return row.seconds
    return row.seconds / (2 * (int(row.op["ranks"]) - 1)) if row.kind == "AllReduce" else None


def measured_storage(rows: Iterable[Measurement], name: str) -> tuple[StorageSpec, ...]:
    """The storage at `name`, from reads of the device (not of the page cache); empty unless all of it was measured."""
    device = [row for row in rows if row.domain == "data" and row.works and not row.op.get("cached")]
    reads = [row.bytes_per_s for row in device if row.kind == "SequentialRead"]
    writes = [row.bytes_per_s for row in device if row.kind in ("SequentialWrite", "CheckpointWrite")]
    random = [1 / row.seconds for row in device if row.kind == "RandomRead" and row.op.get("bytes") == 4096]
    latencies = [row.seconds for row in device if row.kind == "RandomRead" and row.op.get("depth") == 1]
    if not (reads and writes and random and latencies):
        return ()
    return (StorageSpec(name, max(reads), max(writes), max(random), min(latencies), "measured", "turbopump probe"),)
