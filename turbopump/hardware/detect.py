"""What this machine is, without torch: processor, cores this process may use, memory, platform."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import psutil


def cpu_name() -> str:
    """The processor's own name, e.g. `AMD EPYC 9654 96-Core Processor`."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets that decide which dtypes are fast here."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8")
    try:
        flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    except (OSError, StopIteration):
        return []
    present = set(flags.split())
    return [name for name in wanted if name in present]


def num_cores() -> int:
    """Cores this process may run on (affinity, and the limit of its control group)."""
    allowed = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            allowed = min(allowed, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):
        pass
    return allowed


def num_threads(num_processes: int = 1) -> int:
    """Threads each of `num_processes` on this host computes with: OMP_NUM_THREADS where it is set, as everywhere, or
    an even share of the cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) else max(1, num_cores() // num_processes)


def memory_bytes() -> int:
    return int(psutil.virtual_memory().total)


def cache_bytes(root: Path = Path("/")) -> dict[str, int]:
    """Bytes of the caches that the first processor sees (`L1`, `L2`, `L3`; of data), from the kernel; absent where it
    does not say."""
    found = {}
    for cache in sorted((root / "sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
        if kind != "Instruction" and size.rstrip("KM").isdecimal():
            found[f"L{level}"] = int(size.rstrip("KM")) * unit
    return found


def available_bytes() -> int:
    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Memory this process holds now."""
    return int(psutil.Process().memory_info().rss)


def process_age_s() -> float:
    """Seconds since this process was created: what came before `main`, imports among them."""
    import time

    return max(0.0, time.time() - psutil.Process().create_time())


def describe() -> dict[str, Any]:
    return {
        "host": platform.node(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "num_cores": num_cores(),
        "memory_bytes": memory_bytes(),
        "cache_bytes": cache_bytes(),
    }
