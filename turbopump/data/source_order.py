"""Which order a source is read in: the settings of `[loader]`, and what the source itself says about it.

A source may have any of these optional members:

- `make_order(global_batch, *, order, seed, block_samples, window_blocks, num_buckets) -> StepOrder`: it makes its own
  order (a mixture draws from its parts). The indices of that order are the source's; it raises `UsageError` for an
  `order` it does not know.
- `lengths`: one whole number a sample (an array or a memory map), from which "bucketed" makes its batches; and
  `sorted_index`, where it keeps `buckets.sorted_by_length(lengths)`.
- `expect_order(order, window_samples)`: it is told, to read ahead as far as the order needs.
"""

from __future__ import annotations

from typing import Any, Literal

from turbopump.data.buckets import NUM_BUCKETS, BucketOrder, lengths_of
from turbopump.data.order import BLOCK_SAMPLES, WINDOW_BLOCKS, Order, OrderKind, StepOrder


def source_order(
    source: Any,
    global_batch: int,
    *,
    order: OrderKind | Literal["bucketed"] = "shuffle",
    seed: int = 0,
    block_samples: int = BLOCK_SAMPLES,
    window_blocks: int = WINDOW_BLOCKS,
    num_buckets: int = NUM_BUCKETS,
) -> StepOrder:
    """The order of a run over `source`; raises `UsageError` where the source cannot be read in it."""
    if hasattr(source, "expect_order"):
        source.expect_order(order, block_samples * window_blocks)
    make_order = getattr(source, "make_order", None)
    if make_order is not None:
        return make_order(
            global_batch,
            order=order,
            seed=seed,
            block_samples=block_samples,
            window_blocks=window_blocks,
            num_buckets=num_buckets,
        )
    if order != "bucketed":
        return Order(
            len(source),
            global_batch,
            order=order,
            seed=seed,
            block_samples=block_samples,
            window_blocks=window_blocks,
        )
    return BucketOrder(
        lengths_of(source),
        global_batch,
        seed=seed,
        num_buckets=num_buckets,
        sorted_index=getattr(source, "sorted_index", None),
    )
