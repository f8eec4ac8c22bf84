"""What hardware can do on paper: devices, links, storage, and clusters of them. Plain facts with their source.

`provenance` says where a number comes from: `measured` here by `probe`, a `datasheet`, or `hypothetical` (imagined).
A rate that is not known is None or absent, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Provenance = Literal["measured", "datasheet", "hypothetical"]


@dataclass(frozen=True)
class DeviceSpec:
    """One accelerator, or the processors of one host."""

    name: str
    flops_per_s: Mapping[str, float]
    """Dense peak by dtype (fp64, fp32, tf32, bf16, fp16, fp8, int8): operations a second, a multiply-add is two."""
    memory_bytes: int | None = None
    memory_bytes_per_s: float | None = None
    power_w: float | None = None
    clock_hz: float | None = None
    usd_per_hour: float | None = None
    provenance: Provenance = "datasheet"
    source: str = ""
    note: str = ""
    relative: str = ""
    """The measured device whose efficiency curves this one borrows."""


@dataclass(frozen=True)
class LinkSpec:
    """A connection between devices (`level` node) or hosts (`rack`, `pod`)."""

    name: str
    level: Literal["device", "node", "rack", "pod"]
    bytes_per_s: float
    """One direction, of one device."""
    latency_s: float
    provenance: Provenance = "datasheet"
    source: str = ""


@dataclass(frozen=True)
class StorageSpec:
    """Where datasets and checkpoints lie."""

    name: str
    read_bytes_per_s: float
    write_bytes_per_s: float
    random_reads_per_s: float
    """Of 4 KiB, at the best queue depth."""
    latency_s: float
    provenance: Provenance = "datasheet"
    source: str = ""


@dataclass(frozen=True)
class ClusterSpec:
    """`num_devices` devices, `devices_per_node` on a host, joined by `links` from the innermost outwards."""

    device: DeviceSpec
    num_devices: int
    devices_per_node: int
    links: tuple[LinkSpec, ...]
    storage: StorageSpec | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
