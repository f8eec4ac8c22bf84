"""Settings of this process that decide how fast it computes and that no library sets: threads that wait, freed memory.

Both are measured (docs/log.md); a value that the user has set in the environment is kept.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's malloc.h
LARGEST_KEPT_BYTES = 32 << 20  # the highest threshold that glibc takes
TRIM_BYTES = (1 << 31) - 1
TOP_PAD_BYTES = 64 << 20
SPINS = "10000"


def prepare_to_compute() -> None:
    """To be called before torch is imported; what comes too late has no effect and does no harm."""
    yield_while_waiting()
    keep_freed_memory()


def yield_while_waiting() -> None:
    """Let the threads of a parallel region sleep when they have waited for each other for some microseconds.

    By default they spin for milliseconds. On a machine with other work one of them is often not running, and all
    others burn their time until it is: a transformer step took 5 times longer than with threads that sleep. Sleeping
    at once costs a third of the speed where nobody else runs; a short spin costs nothing there (docs/log.md).
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def keep_freed_memory() -> None:
    """Have malloc keep freed memory instead of giving it back to the kernel, which clears it page by page each time.

    A step allocates and frees the same temporaries again and again: 9 % less time for a step of the demo (AMD EPYC).
    Allocations above 32 MiB still go back. Only with glibc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in (
        (M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES), (M_TRIM_THRESHOLD, TRIM_BYTES), (M_TOP_PAD, TOP_PAD_BYTES),
    ):  # fmt: skip
        mallopt(option, value)
