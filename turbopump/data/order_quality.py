"""What an order costs a storage in requests, and how far it is from a true shuffle: two sides of one choice.

`order_quality` measures an order over some of its steps; `describe_order` sets the three orders of a dataset beside
each other, as plain rows for a table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turbopump.data.order import BLOCK_SAMPLES, WINDOW_BLOCKS, Order, OrderKind, StepOrder

_KINDS: tuple[OrderKind, ...] = ("shuffle", "blocks", "sequential")


@dataclass(frozen=True)
class OrderQuality:
    """Means over the batches looked at; what a true shuffle gives stands in `true_shuffle`.

    `requests`: contiguous runs of samples a batch reads, each one request to a storage.
    `blocks`: blocks of `block_samples` neighbours that a batch touches, what a cache of blocks must hold.
    `distance`: |place in the epoch - sample number| / samples.
    `neighbours`: share of the batch's successive samples that are neighbours in the storage too.
    `spread`: mean distance of two samples of a batch in the storage / samples.
    """

    requests: float
    blocks: float
    distance: float
    neighbours: float
    spread: float


def order_quality(order: StepOrder, *, block_samples: int = BLOCK_SAMPLES, num_batches: int = 64) -> OrderQuality:
    """Measured over up to `num_batches` steps, evenly spaced over the first epoch."""
    steps_an_epoch = max(1, order.n // order.global_batch)
    chosen = np.unique(np.arange(min(num_batches, steps_an_epoch)) * steps_an_epoch // num_batches)
    return OrderQuality(*np.mean([_of_batch(order, int(step), block_samples) for step in chosen], axis=0).tolist())


def _of_batch(order: StepOrder, step: int, block_samples: int) -> tuple[float, float, float, float, float]:
    indices = order.step_ids(step)[1]
    places = (step * order.global_batch + np.arange(len(indices))) % order.n
    ascending = np.unique(indices)
    count = len(indices)
    # sum of |a - b| over all pairs of a sorted list: each gap lies between `i` on its left and the others on its right
    left = np.arange(1, len(ascending))
    pairs = float((np.diff(ascending) * (left * (len(ascending) - left)).astype(float)).sum())
    return (
        1 + int(np.count_nonzero(np.diff(ascending) != 1)),
        len(np.unique(indices // block_samples)),
        float(np.abs(places - indices).mean()) / order.n,
        int(np.count_nonzero(np.abs(np.diff(indices)) == 1)) / max(1, count - 1),
        pairs / max(1, len(left) * (len(left) + 1) // 2) / order.n,
    )


def true_shuffle(n: int, global_batch: int, *, block_samples: int = BLOCK_SAMPLES) -> OrderQuality:
    """What is expected of a batch of distinct samples drawn with equal chances, for batches of at most `n`."""
    batch, num_blocks = min(n, global_batch), -(-n // block_samples)
    return OrderQuality(
        requests=batch * (1 - (batch - 1) / n),  # a run begins where the sample before is not in the batch
        blocks=num_blocks * (1 - _chance_of_none(n, batch, min(block_samples, n))),
        distance=(1 - 1 / n**2) / 3,
        neighbours=2 / n if n > 1 else 0.0,
        spread=(1 + 1 / n) / 3 if n > 1 else 0.0,
    )


def _chance_of_none(n: int, batch: int, block: int) -> float:
    """That none of `batch` distinct samples of `n` lies in a given block."""
    if batch + block > n:
        return 0.0
    return float(np.exp(np.log1p(-block / (n - np.arange(batch, dtype=float))).sum()))


def describe_order(
    n: int,
    global_batch: int,
    *,
    seed: int = 0,
    block_samples: int = BLOCK_SAMPLES,
    window_blocks: int = WINDOW_BLOCKS,
    num_batches: int = 64,
) -> list[dict[str, str | float]]:
    """A row for each order of a dataset of `n` samples and for a true shuffle; the keys are the columns."""
    rows: list[dict[str, str | float]] = []
    for kind in _KINDS:
        order = Order(n, global_batch, order=kind, seed=seed, block_samples=block_samples, window_blocks=window_blocks)
        rows.append(_row(kind, order_quality(order, block_samples=block_samples, num_batches=num_batches)))
    return [*rows, _row("true shuffle", true_shuffle(n, global_batch, block_samples=block_samples))]


def _row(name: str, quality: OrderQuality) -> dict[str, str | float]:
    return {
        "order": name,
        "requests a batch": quality.requests,
        "blocks a batch": quality.blocks,
        "distance from storage order": quality.distance,
        "neighbours that stay so": quality.neighbours,
        "spread of a batch": quality.spread,
    }
