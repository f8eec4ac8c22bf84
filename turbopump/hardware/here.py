"""This machine as a profile names it: what it is called and known again by, its devices on paper, what is uncertain."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from turbopump.hardware import detect, gpus
from turbopump.hardware.processor import processor_spec
from turbopump.hardware.specs import DeviceSpec

BUSY_CORES = 0.5  # of the cores, taken by others while nothing of ours ran
STOLEN = 0.05
WAITING = 0.2


@dataclass(frozen=True)
class Here:
    """The head of a `MachineProfile`."""

    name: str
    """Of the device that computes."""
    fingerprint: str
    machine: Mapping[str, Any]
    software: Mapping[str, str]
    devices: Mapping[str, DeviceSpec]
    """By where an operation runs: "cpu", "cuda"; the one that computes comes first."""
    uncertain: tuple[str, ...]
    """What the machine itself makes less certain, a line each."""


def here(device: str) -> Here:
    """This machine, where `device` ("cpu", "cuda") computes; that it exists is for the caller to know.

    A GPU that PyTorch uses and no driver's tool names (in some containers) is here without a name and a peak.
    """
    installed = gpus.installed()
    devices = {"cpu": processor_spec()}
    if device == "cuda":
        devices = {"cuda": gpus.spec_of(installed[0] if installed else gpus.Gpu("unnamed GPU")), **devices}
    busy = detect.contention()
    return Here(
        name=devices["cuda"].name if "cuda" in devices else detect.cpu_name(),
        fingerprint=detect.fingerprint(installed),
        machine={**detect.describe(), "settings": detect.settings(), "contention": busy,
                 "gpus": [gpu.name for gpu in installed]},
        software=detect.software_versions(),
        devices=devices,
        uncertain=(*_contention(busy), *_clocks(detect.settings(), device)),
    )  # fmt: skip


def _contention(found: Mapping[str, float]) -> list[str]:
    """Other work on the machine, before the probe began."""
    lines = []
    if found.get("load_per_core", 0.0) > BUSY_CORES:
        lines.append(f"other work runs here: a load of {found['load_per_core']:.1f} a core when the probe began")
    if found.get("cpu_pressure", 0.0) > WAITING:
        lines.append(f"processes waited for a core in {found['cpu_pressure']:.0%} of the 10 s before the probe")
    if found.get("cpu_stolen", 0.0) > STOLEN:
        lines.append(f"other virtual machines took {found['cpu_stolen']:.0%} of the processor's time since the start")
    return lines


def _clocks(settings: Mapping[str, str | int], device: str) -> list[str]:
    if device == "cuda":
        return ["the GPU's clocks are not locked (that needs an administrator): rates follow its temperature and power"]
    governor = settings.get("governor")
    if governor is None:
        return ["the clock is not locked, its governor is hidden (a virtual machine?): rates follow what others do"]
    fixed = governor == "performance"
    return [] if fixed else [f"the clock is not locked (governor {governor}): rates follow the load"]
