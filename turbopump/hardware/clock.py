"""The clock a core really runs at, measured: a chain of additions each of which needs the one before.

Such an addition takes one cycle on every x86-64 core, so the rate of the chain is the clock. A virtual machine often
reports its time-stamp counter instead of the clock (AMD EPYC, Zen 4: 2.60 GHz reported, 3.68 GHz measured, and
products run at 3.6), and a theoretical peak made of that would lie below what is measured. The chain is 206 bytes of
machine code; where the system does not let a program make code, or on another architecture, there is no answer.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from functools import cache

CHAIN = 64
ADDITION = b"\x48\x01\xd0"  # add rax, rdx
COUNT_DOWN = b"\x48\xff\xcf"  # dec rdi
BACK = b"\x0f\x85"  # jnz, with a distance of 4 bytes
BODY = CHAIN * ADDITION + COUNT_DOWN
CODE = b"\xf3\x0f\x1e\xfa" + BODY + BACK + (-(len(BODY) + 6)).to_bytes(4, "little", signed=True) + b"\xc3"
TURNS = 40_000  # about 1 ms
REPEATS = 20
PLAUSIBLE_HZ = (2e8, 1e10)


@cache
def measured_clock_hz() -> float | None:
    """The highest clock seen in about 20 ms of one core's time, once a process; None where it cannot be measured."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except (OSError, ValueError):
        return None
    page.write(CODE)
    first = ctypes.c_char.from_buffer(page)
    run = ctypes.CFUNCTYPE(None, ctypes.c_uint64)(ctypes.addressof(first))
    seconds = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        run(TURNS)
        seconds.append(time.thread_time() - begin)
    del run, first  # the page cannot be given back while something points into it
    page.close()
    clock_hz = CHAIN * TURNS / max(min(seconds), 1e-9)
    return clock_hz if PLAUSIBLE_HZ[0] < clock_hz < PLAUSIBLE_HZ[1] else None
