"""What the harness that times an operation adds to it: `timing.measure` against a loop written by hand.

The operation takes about 10 us, the call of its library stands in the loop itself, and both take the median of as many
blocks of 2 ms. `benchmarks.probe` reports the ratio; the target is 1.02.
"""

from __future__ import annotations

import time
from statistics import median

import torch

from benchmarks.harness import Ratio, ratio_with_interval
from turbopump.compute.conditions import num_threads
from turbopump.hardware import timing

SIZE = 80  # of a matrix product of fp32: 1 MFLOP
BLOCKS = 12  # of one comparison, 2 ms each


def measure(quick: bool) -> Ratio:
    """Time of an operation by the harness over its time in a plain loop, of paired comparisons in turns."""
    a, b, out = (torch.rand(SIZE, SIZE) + 0.5 for _ in range(3))

    def run() -> torch.Tensor:
        return torch.mm(a, b, out=out)

    def by_harness() -> float:
        return timing.measure(run, clock=timing.THREAD_CPU, budget_s=BLOCKS * timing.BLOCK_S).median_s

    def by_hand() -> float:
        seconds = []
        for _ in range(BLOCKS):
            begin = time.thread_time()
            for _ in range(calls):
                torch.mm(a, b, out=out)
            seconds.append((time.thread_time() - begin) / calls)
        return median(seconds)

    with num_threads(1):
        calls = max(1, round(timing.BLOCK_S / timing.measure(run).median_s))
        pairs = []
        for turn in range(20 if quick else 200):
            first, second = (by_harness, by_hand) if turn % 2 else (by_hand, by_harness)
            found = {first: first(), second: second()}
            pairs.append((found[by_harness], found[by_hand]))
    return ratio_with_interval([harness for harness, _ in pairs], [hand for _, hand in pairs])
