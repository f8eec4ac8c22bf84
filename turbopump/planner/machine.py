"""What the planner knows of a machine: one kind of device, how many, and the links within and between hosts.

A `Machine` is made of catalog entries (`from_catalog`) or of a measured `machine.json` (`from_profile`). Its `families`
name the calibrations that apply to it: the device's own, and the software that ran there, where that is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from turbopump.core.errors import CatalogError
from turbopump.hardware.accelerators import device as find_device
from turbopump.hardware.accelerators import link as find_link
from turbopump.hardware.profile import MachineProfile
from turbopump.hardware.specs import DeviceSpec, LinkSpec

NODE_LINKS = (
    ("rubin", "nvlink6"), ("b200", "nvlink5"), ("b300", "nvlink5"), ("gb", "nvlink5"), ("h100", "nvlink4"),
    ("h200", "nvlink4"), ("a100", "nvlink3"), ("v100 sxm", "nvlink2"), ("p100", "nvlink1"),
    ("mi3", "infinity-fabric-mi300x"),
)  # fmt: skip
"""The link within a host that devices of that name come with; PCIe 4 where none of them is said."""
DEVICES_PER_NODE = 8
STAND_IN_DTYPES = {"bf16": ("fp16", "fp32"), "fp16": ("bf16", "fp32"), "fp8": ("int8", "bf16", "fp16", "fp32"),
                   "tf32": ("fp32",), "fp32": ("tf32", "bf16")}  # fmt: skip
"""Whose peak is taken where the data sheet has none for a dtype: the units that would compute it."""


@dataclass(frozen=True)
class Machine:
    """`num_devices` devices, `devices_per_node` on a host. A link's rate is that of one port, one direction."""

    device: DeviceSpec
    num_devices: int = 1
    devices_per_node: int = DEVICES_PER_NODE
    node: LinkSpec | None = None
    """Between devices of a host; None where a host has one device."""
    network: LinkSpec | None = None
    """Between hosts; None where there is one host."""
    ports_per_node: int = 0
    """Network ports of a host, shared by its devices; 0: one a device."""
    families: tuple[str, ...] = field(default=())
    """Calibrations that apply, the more general first."""

    def __post_init__(self) -> None:
        for what, value in (("num_devices", self.num_devices), ("devices_per_node", self.devices_per_node)):
            if value < 1:
                raise CatalogError(f"{what} ({value}) must be at least 1: give the number of devices there are")
        if not self.device.flops_per_s:
            raise CatalogError(f"{self.device.name}: no peak is known: give e.g. bf16_tflops in its entry")
        if self.device.memory_bytes_per_s is None:
            raise CatalogError(f"{self.device.name}: memory_tb_per_s is not known: a step cannot be timed without it")

    @property
    def network_bytes_per_s(self) -> float:
        """Of one host to the others, one direction, all ports; 0 without a network."""
        return self.network.bytes_per_s * (self.ports_per_node or self.devices_per_node) if self.network else 0.0

    @property
    def memory_bytes_per_s(self) -> float:
        assert self.device.memory_bytes_per_s is not None  # checked when made
        return self.device.memory_bytes_per_s

    def peak_flops_per_s(self, dtype: str) -> float:
        """Dense peak of products in `dtype`, or of the dtype that the device would use in its place."""
        peaks = self.device.flops_per_s
        for name in (dtype, *STAND_IN_DTYPES.get(dtype, ())):
            if name in peaks:
                return peaks[name]
        raise CatalogError(
            f"{self.device.name} has no peak for {dtype} (known: {', '.join(peaks)}): give {dtype}_tflops in its entry"
        )


def from_catalog(
    device: str | DeviceSpec,
    num_devices: int = 1,
    *,
    devices_per_node: int = DEVICES_PER_NODE,
    network: str = "infiniband-ndr",
    ports_per_node: int = 0,
    families: tuple[str, ...] = (),
) -> Machine:
    """A machine of a catalog device and a catalog link between hosts; raises `CatalogError` for names it lacks."""
    spec = find_device(device) if isinstance(device, str) else device
    node = find_link(node_link(spec)) if devices_per_node > 1 else None
    return Machine(spec, num_devices, devices_per_node, node, find_link(network), ports_per_node,
                   families or (family(spec),))  # fmt: skip


def from_profile(profile: MachineProfile, num_devices: int | None = None) -> Machine:
    """The machine that was probed: its first device, its links by level."""
    if not profile.devices:
        raise CatalogError(f"{profile.name}: the machine file names no device: probe the machine again")
    spec = profile.devices[0]
    per_node = max(1, len(profile.devices))
    levels = {link.level: link for link in reversed(profile.links)}
    return Machine(spec, num_devices or per_node, per_node, levels.get("node") or levels.get("device"),
                   levels.get("rack") or levels.get("pod"), families=(family(spec),))  # fmt: skip


def node_link(spec: DeviceSpec) -> str:
    """The catalog's link that joins such devices within a host."""
    name = spec.name.lower()
    pcie = "pcie" in name
    return next((link for part, link in NODE_LINKS if part in name and not pcie), "pcie4-x16")


def family(spec: DeviceSpec) -> str:
    """The calibration a device falls under: its generation, e.g. `a100` for all A100s."""
    name = spec.name.lower()
    known = ("a100", "h100", "h200", "h800", "a800", "v100", "b200", "b300", "gb200", "gb300", "mi300x", "p100")
    return next((part for part in known if part in name), name)
