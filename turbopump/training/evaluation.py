"""Evaluation: sums and counts of metrics over a split, each rank a disjoint part, added over ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from turbopump.comms import process_group
from turbopump.data.loader import evaluation_batches
from turbopump.training.forward_backward import autocast, to_device

Metrics = Callable[[nn.Module, Any], dict[str, tuple[float, float]]]


def evaluate_model(
    model: nn.Module,
    metrics: Metrics,
    source: Any,
    *,
    batch: int,
    max_samples: int = 0,
    device: torch.device,
    compute: str = "fp32",
    rank: int = 0,
    world_size: int = 1,
) -> dict[str, float]:
    """Mean of each metric over `source` (all of it, or the first `max_samples`), the same on every rank.

    Running statistics are those of rank 0 (broadcast). A language-model source with `bytes_per_token` adds
    `bits_per_byte` = loss / ln 2 / bytes_per_token. Communicates one all-reduce of two numbers a metric.
    """
    if world_size > 1:
        process_group.broadcast_buffers(model)
    batches = evaluation_batches(source, batch=batch, max_samples=max_samples, rank=rank, world_size=world_size)
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), autocast(device, compute):
            totals = _totals(metrics, model, (to_device(b, device) for b in batches))
    finally:
        model.train(was_training)
    if world_size > 1:
        totals = _over_ranks(totals)
    means = {name: total / count if count else math.nan for name, (total, count) in totals.items()}
    bytes_per_token = getattr(source, "bytes_per_token", None)
    if bytes_per_token and "loss" in means:
        means["bits_per_byte"] = means["loss"] / math.log(2) / bytes_per_token
    return means


def _totals(metrics: Metrics, model: nn.Module, batches: Iterable[Any]) -> dict[str, tuple[float, float]]:
    totals: dict[str, tuple[float, float]] = {}
    for batch in batches:
        for name, (value, count) in metrics(model, batch).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + float(value), before[1] + float(count))
    return totals


def _over_ranks(totals: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """A rank that had no batch knows no names: rank 0's order (it always has the first samples) is everyone's."""
    names = process_group.broadcast_json(list(totals))
    flat = [number for name in names for number in totals.get(name, (0.0, 0.0))]
    added = process_group.all_reduce_sum(flat)
    return {name: (added[2 * i], added[2 * i + 1]) for i, name in enumerate(names)}
