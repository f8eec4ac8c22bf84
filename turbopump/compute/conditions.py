"""Under what conditions a call is timed: the clock of a device, threads, emptied caches; and by which libraries."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from turbopump.hardware import detect
from turbopump.hardware.timing import THREAD_CPU, WALL, Clock

LEAST_FLUSH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class DeviceClock:
    """Time between two events on the device's stream, gaps between kernels included."""

    device: str
    name: str = "cuda_events"

    def time(self, run: Callable[[], object], calls: int) -> tuple[float, float]:
        with torch.cuda.device(self.device):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            wall = time.perf_counter()
            begin.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3, time.perf_counter() - wall


def clock(device: str, threads: int = 1) -> Clock:
    """The clock for calls on `device`: of CPUs the calling thread's own time, which other programs do not lengthen;
    the wall's with several threads, for the calling thread may sleep until the others are done."""
    if torch.device(device).type == "cuda":
        return DeviceClock(device)
    return THREAD_CPU if threads == 1 else WALL


@contextmanager
def num_threads(count: int | None) -> Iterator[None]:
    """PyTorch computes with `count` threads (None: as many as before); put back afterwards."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def cache_bytes(device: str) -> int:
    """The last-level cache that one core or device sees; 32 MiB where the system does not say."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [32 * 2**20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) * {"K": 2**10, "M": 2**20}[found[2]])
    return max(sizes)


def flusher(device: str) -> Callable[[], object]:
    """A call after which the caches of `device` hold nothing of any operand: it reads and writes a larger buffer.

    Not `zero_`: `memset` of that size goes past the caches.
    """
    size = max(LEAST_FLUSH_BYTES, 2 * cache_bytes(device))
    buffer = torch.ones(size // 4, device=device)
    return lambda: buffer.add_(1.0)


@cache
def library(device: str) -> str:
    """Versions of what computes here, e.g. `torch 2.13.0+cpu, MKL 2024.2, oneDNN 3.12.0`."""
    names = [f"torch {torch.__version__}"]
    if torch.device(device).type == "cuda":
        return ", ".join([*names, f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"])
    built = torch.__config__.show()
    for name, pattern in (("MKL", r"Math Kernel Library Version ([\d.]+)"), ("oneDNN", r"MKL-DNN v([\d.]+)")):
        if found := re.search(pattern, built):
            names.append(f"{name} {found[1]}")
    return ", ".join(names)


def available_bytes(device: str) -> int:
    """Memory that operands may still take."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return detect.available_bytes()


def alive(device: str) -> bool:
    """Whether the device still computes."""
    try:
        return bool((torch.ones(1, device=device) + 1).item() == 2)
    except (RuntimeError, AssertionError):  # the latter from a build without CUDA
        return False
