"""What each order costs: CPU nanoseconds an index, step by step through the middle of a run, as a loader asks for them.

    python -m benchmarks.data --only order [--quick]

Orders of one dataset, mixtures, and batches by length of both; the first step of a run is not counted, but all that
later ones compute is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from benchmarks.data_own import note
from turbopump.data.buckets import BucketOrder
from turbopump.data.mixture_buckets import MixtureBucketOrder
from turbopump.data.mixture_order import MixtureOrder
from turbopump.data.order import Order, OrderKind, StepOrder

BATCHES = (256, 8192)
SAMPLES = (10**6, 10**12)
KINDS: tuple[OrderKind, ...] = ("sequential", "shuffle", "blocks")
NUM_SOURCES = (2, 8, 64)
INDICES, ROUNDS, QUICK_ROUNDS = 1 << 19, 9, 3


def print_order_ns(quick: bool) -> None:
    """A line an order: the median of some rounds, and their range, for each batch size."""
    note(f"orders, CPU ns an index in batches of {' and '.join(map(str, BATCHES))}: median (lowest to highest)")
    for name, make in orders():
        found = [order_ns(make(batch), QUICK_ROUNDS if quick else ROUNDS) for batch in BATCHES]
        note(f"  {name}: " + ", ".join(f"{statistics.median(ns):.0f} ({min(ns):.0f} to {max(ns):.0f})" for ns in found))


def order_ns(order: StepOrder, rounds: int) -> list[float]:
    """One figure a round, of `INDICES` or more indices, each round at another part of the run."""
    steps = max(8, INDICES // order.global_batch)
    found = []
    for number in range(1, rounds + 1):
        first = number * 1_000_003
        order.step_ids(first - 1)
        begin = time.thread_time()
        for step in range(first, first + steps):
            order.step_ids(step)
        found.append((time.thread_time() - begin) * 1e9 / (steps * order.global_batch))
    return found


def orders() -> Iterator[tuple[str, Callable[[int], StepOrder]]]:
    """A name, and what makes the order for a global batch."""
    rng = np.random.default_rng(0)
    weights = {sources: rng.integers(1, 100, sources).tolist() for sources in NUM_SOURCES}
    for kind in KINDS:
        for n in SAMPLES:
            yield f"{kind}, {n:.0e} samples", partial(Order, n, order=kind)
    for sources in NUM_SOURCES:
        for kind in KINDS[1:]:
            for n in SAMPLES:
                sizes = [n // sources + number for number in range(sources)]
                make = partial(MixtureOrder, sizes, [(0, weights[sources])], order=kind)
                yield f"mixture of {sources}, {kind}, {n:.0e} samples", make
    lengths = rng.lognormal(5, 1, 10**6).astype(np.int64)
    yield "bucketed, 1e+06 lengths", partial(BucketOrder, lengths)
    for sources in NUM_SOURCES:
        parts = np.array_split(lengths, sources)
        yield f"mixture of {sources}, bucketed, 1e+06 lengths", partial(_bucketed_mixture, parts, weights[sources])


def _bucketed_mixture(lengths: list[np.ndarray], weights: list[int], global_batch: int) -> StepOrder:
    mixed = MixtureOrder([len(part) for part in lengths], [(0, weights)], global_batch)
    return MixtureBucketOrder(mixed, lengths)
