"""The GPUs of this host by name, as the NVIDIA driver reports them: without torch, without CUDA.

`nvidia-smi` says most; where it is missing (a container without the tools) the driver's files below /proc still give
the names. What the catalog knows of a GPU is looked up by the driver's name, exactly.
"""

from __future__ import annotations

import csv
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

from turbopump.hardware.accelerators import reported_as
from turbopump.hardware.specs import DeviceSpec

QUERY = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
PROC = Path("/proc/driver/nvidia/gpus")
TIMEOUT_S = 20.0  # the first call after a boot starts the driver


@dataclass(frozen=True)
class Gpu:
    """One GPU, as its driver names it."""

    name: str
    memory_bytes: int | None = None
    driver: str = ""


def installed(proc: Path = PROC) -> tuple[Gpu, ...]:
    """The GPUs of this host, hidden ones (CUDA_VISIBLE_DEVICES) included; empty where there are none."""
    try:
        done = subprocess.run(QUERY, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
        found = parse_nvidia_smi(done.stdout)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        found = ()
    if found:
        return found
    try:
        texts = [(path / "information").read_text() for path in sorted(proc.iterdir())]
    except (OSError, UnicodeDecodeError):
        return ()
    return tuple(gpu for text in texts if (gpu := parse_information(text)))


def parse_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    """GPUs of `nvidia-smi --query-gpu=name,memory.total,driver_version`; what it does not know is `[N/A]` there.

    Lines of another form (messages of a driver that failed) are passed over.
    """
    gpus = []
    for row in csv.reader(text.splitlines(), skipinitialspace=True):
        if len(row) == 3 and row[0].strip():
            name, memory_mib, driver = (cell.strip() for cell in row)
            memory = int(memory_mib) << 20 if memory_mib.isdecimal() and int(memory_mib) else None
            gpus.append(Gpu(name, memory, "" if driver.startswith("[") else driver))
    return tuple(gpus)


def parse_information(text: str) -> Gpu | None:
    """The GPU of a file /proc/driver/nvidia/gpus/*/information."""
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "Model" and value.strip() and value.strip() != "Unknown":
            return Gpu(value.strip())
    return None


def spec_of(gpu: Gpu) -> DeviceSpec:
    """What is known of a GPU: its data sheet with the memory it really has, or its name and memory alone."""
    known = reported_as(gpu.name)
    if known is None:
        return DeviceSpec(gpu.name, {}, gpu.memory_bytes, source="the driver", note="not in the catalog: no peak known")
    return replace(known, memory_bytes=gpu.memory_bytes or known.memory_bytes)
