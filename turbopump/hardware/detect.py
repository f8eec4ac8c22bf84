"""What this machine is, without torch: processor, cores this process may use, memory, platform.

`describe` is what decides how fast it computes, `fingerprint` a digest of that by which a profile knows its machine
again, `settings` what the operating system adds (kernel, limits, governor), `contention` what others take right now.
What cannot be read is left out.
"""

from __future__ import annotations

import os
import platform
import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from turbopump.core.files import digest, to_json
from turbopump.hardware import gpus

SPEED_PACKAGES = (
    "turbopump", "torch", "numpy", "triton", "mkl", "intel-openmp", "mpi4py", "pyarrow", "safetensors",
    "nvidia-cublas-cu12", "nvidia-cudnn-cu12", "nvidia-cufft-cu12", "nvidia-nccl-cu12",
    "nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-nccl-cu13",
)  # fmt: skip


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
    wanted = (
        "fma", "avx2", "avx_vnni", "avx512f", "avx512_bf16", "avx512_fp16", "avx512_vnni",
        "amx_tile", "amx_bf16", "amx_fp16", "amx_int8",
    )  # fmt: skip
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


def num_physical_cores() -> int:
    """Of `num_cores`, those with arithmetic units of their own: two hardware threads of a core share them.

    A virtual machine may hide which of its processors are such a pair; then each counts.
    """
    units = set()
    for cpu in os.sched_getaffinity(0):
        siblings = _line(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))
        units.add(siblings or str(cpu))
    return max(1, min(num_cores(), len(units)))


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


def machine_name() -> str:
    """Short name of the kind of machine, fit for a file name: processor and cores, e.g. `amd-epyc-7b13-2c`."""
    words = re.sub(r"\(r\)|\(tm\)|@.*|\bcpu\b|\bprocessor\b|\d+-core", " ", cpu_name().lower())
    return f"{re.sub(r'[^a-z0-9]+', '-', words).strip('-')[:40].strip('-') or 'cpu'}-{num_cores()}c"


def fingerprint(installed: Sequence[gpus.Gpu] | None = None) -> str:
    """16 digits that change when what is measured here would: processor, instruction sets, cores, memory, GPUs.

    Neither the host's name nor the kernel, nor anything that changes from run to run. `installed` are the GPUs where
    the caller has asked for them already. Fewer cores (an affinity, a limit of the control group) are another machine.
    """
    counted = Counter(gpu.name for gpu in (gpus.installed() if installed is None else installed))
    parts = {
        "architecture": platform.machine(),
        "cpu": cpu_name(),
        "cpu_features": cpu_features(),
        "num_cores": num_cores(),
        "memory_gib": round(memory_bytes() / (1 << 30)),
        "gpus": sorted(counted.items()),
    }
    return digest(to_json(parts))


def software_versions() -> dict[str, str]:
    """Versions of what computes and moves data here, from the packages' own records: nothing is imported."""
    found = {"python": platform.python_version()}
    for package in SPEED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def settings(root: Path = Path("/")) -> dict[str, str | int]:
    """What the operating system has set that speed depends on; what it does not say is left out."""
    found: dict[str, str | int] = {"kernel": platform.release()}
    nodes = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    lines = {
        "governor": root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
        "tcp_congestion_control": root / "proc/sys/net/ipv4/tcp_congestion_control",
        "cgroup_cpu_max": root / "sys/fs/cgroup/cpu.max",
        "cgroup_memory_max": root / "sys/fs/cgroup/memory.max",
        "smt": root / "sys/devices/system/cpu/smt/control",
    }
    found |= {key: line for key, path in lines.items() if (line := _line(path))}
    if pages := re.search(r"\[(\w+)\]", _line(root / "sys/kernel/mm/transparent_hugepage/enabled")):
        found["transparent_huge_pages"] = pages[1]
    if nodes:
        found["numa_nodes"] = len(nodes)
    if kind := _container(root):
        found["container"] = kind
    return found


def _container(root: Path) -> str:
    """The kind of container that this process runs in; empty where there is no sign of one."""
    for mark, kind in ((".dockerenv", "docker"), ("run/.containerenv", "podman")):
        if (root / mark).exists():
            return kind
    groups = _line(root / "proc/1/cgroup", whole=True)
    return next((kind for kind in ("kubepods", "docker", "lxc", "podman", "containerd") if kind in groups), "")


def contention(root: Path = Path("/")) -> dict[str, float]:
    """What the machine's own counters say of other work on it, at this moment; what they do not say is left out.

    `load_per_core` is the load average of a minute, this process included. `cpu_pressure` is the share of the last
    10 s in which some process waited for a core (Linux PSI), `cpu_stolen` the share of all time since the start that
    other virtual machines took.
    """
    found = {}
    if load := re.match(r"[\d.]+", _line(root / "proc/loadavg")):
        found["load_per_core"] = float(load[0]) / num_cores()
    if pressure := re.match(r"some avg10=([\d.]+)", _line(root / "proc/pressure/cpu")):
        found["cpu_pressure"] = float(pressure[1]) / 100
    ticks = _line(root / "proc/stat").split()
    if ticks[:1] == ["cpu"] and len(ticks) > 8:
        user_to_steal = [int(tick) for tick in ticks[1:9]]  # guest time is part of the user's
        found["cpu_stolen"] = user_to_steal[7] / max(1, sum(user_to_steal))
    return found


def _line(path: Path, *, whole: bool = False) -> str:
    """The first line of a small file (or all of it), empty where it cannot be read."""
    try:
        content = path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
    return content if whole else content.partition("\n")[0]
