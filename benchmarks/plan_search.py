"""How long the search takes: at least 1e5 candidates of one model on one machine, on one core.

    seconds, candidates = search_s()          the fastest of three runs, by the CPU time of the thread

All of it is timed that makes a plan: listing the candidates, the memory of each, the time of those that fit, the best
and what surrounds it (`rank`, without asking what would change the answer, which is told apart).
"""

from __future__ import annotations

import time

from turbopump.planner.calibration import shipped
from turbopump.planner.candidates import Space
from turbopump.planner.cases import Case, DecoderShape
from turbopump.planner.machine import from_catalog
from turbopump.planner.predictors import decoder_models
from turbopump.planner.search import search

GPT3 = DecoderShape(12288, 96, 96, 51200, 49152, gated=False, learned_positions=2048, biases=True, name="gpt3-175b")
NUM_DEVICES = 1024
CANDIDATES = 100_000
HOLDS = {
    "dtype": ("bf16", "fp8"), "synchronisation": ("synchronous", "quantized", "local"), "cp": (1, 2, 4, 8),
}  # fmt: skip
"""Choices that change the results, and splits of short sequences, are searched too where they are named."""


def search_s(runs: int = 3) -> tuple[float, int]:
    """Seconds for 1e5 candidates, the fastest of `runs`, and how many candidates there really were."""
    space = Space(Case(GPT3, 2048, 1536, 1), NUM_DEVICES, HOLDS)
    machine, models = from_catalog("h100-sxm", NUM_DEVICES), decoder_models(shipped())
    best_s, count = float("inf"), 0
    for _ in range(runs):
        begin = time.thread_time()
        found = search(space, machine, models, changes=False)
        count = found.num_candidates
        best_s = min(best_s, (time.thread_time() - begin) * CANDIDATES / count)
    if count < CANDIDATES:
        raise AssertionError(f"only {count} candidates: the figure is for {CANDIDATES}")
    return best_s, count


if __name__ == "__main__":
    print("{:.2f} s for 1e5 candidates ({:,} searched)".format(*search_s()))
