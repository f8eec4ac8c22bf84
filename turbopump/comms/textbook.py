"""What a collective takes by the formulas of the textbooks, from a link's latency and rate alone. Without torch.

`a`: seconds a message takes to start (`LinkSpec.latency_s`), `b`: seconds a byte (1 / `bytes_per_s`), `p` ranks, `n`
bytes, `lg` = ceil(log2 p). The time of adding numbers up is left out: it hides behind the next message. Sources:
- ring, recursive doubling, halving and doubling, pairwise, Bruck: Thakur, Rabenseifner and Gropp, "Optimization of
  Collective Communication Operations in MPICH" (2005); the ring's bound: Patarasuk and Yuan (2009)
- two binary trees: Sanders, Speck and Träff (2009), as in NCCL; chain of chunks and scatter with all-gather: Chan,
  Heimlich, Purkayastha and van de Geijn (2007)
- levels: reduce-scatter inside, all-reduce of the shares across, all-gather inside (Cho et al., BlueConnect, 2019)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from turbopump.comms.ops import (
    AllGather,
    AllReduce,
    AllToAll,
    Barrier,
    Broadcast,
    Collective,
    Level,
    ReduceScatter,
    Send,
)
from turbopump.core.errors import UsageError
from turbopump.hardware.profile import Prediction
from turbopump.hardware.specs import LinkSpec

ACHIEVED = 0.8
"""Share of a link's rate that large collectives reach: 365 of 450 GB/s in a ring over 2 to 8 H100 (nccl-tests issue
212, nccl issue 1455), 232 of 300 GB/s on 8 A100 (nccl issue 1048), 46 to 48 of 50 GB/s of a 400 Gbit/s card."""
WORST_ACHIEVED = 0.45
"""The lower end: 8 H100 a node, 2 nodes over RoCE, 216 to 231 GB/s where about 470 were expected (nccl issue 2409)."""


def algorithms_s(op: Collective, link: LinkSpec) -> dict[str, float]:
    """Seconds of `op` by every algorithm that the number of ranks allows, at the link's full rate; none for 1 rank."""
    a, b, p, n = link.latency_s, 1.0 / link.bytes_per_s, op.ranks, float(op.bytes)
    if p == 1:
        return {}
    lg, sent = (p - 1).bit_length(), op.cost.bytes
    power_of_two = p & (p - 1) == 0
    if isinstance(op, AllReduce):
        found = {"ring": 2 * (p - 1) * a + sent * b, "two trees": 2 * lg * a + 2 * n * b}
        if power_of_two:
            found |= {"recursive doubling": lg * (a + n * b), "halving and doubling": 2 * lg * a + sent * b}
        return found
    if isinstance(op, ReduceScatter):
        return {"ring": (p - 1) * a + sent * b} | ({"halving": lg * a + sent * b} if power_of_two else {})
    if isinstance(op, AllGather):
        return {"ring": (p - 1) * a + sent * b, "Bruck": lg * a + sent * b}
    if isinstance(op, AllToAll):
        return {"pairwise": (p - 1) * a + sent * b, "Bruck": lg * (a + n / 2 * b)}
    if isinstance(op, Broadcast):
        return {
            "tree": lg * (a + n * b),
            "scatter and all-gather": (lg + p - 1) * a + 2 * (p - 1) / p * n * b,
            "chain of chunks": (math.sqrt(a) * math.sqrt(p - 2) + math.sqrt(n * b)) ** 2 + a,
        }
    if isinstance(op, Send):
        return {"message": a + n * b}
    if isinstance(op, Barrier):
        return {"dissemination": lg * a}
    raise UsageError(f"no formula for {type(op).__name__}")


def lower_bound_s(op: Collective, link: LinkSpec) -> float:
    """What no algorithm can be faster than: ceil(log2 p) latencies, and the bytes each rank must send."""
    return max((op.ranks - 1).bit_length() * link.latency_s, op.cost.bytes / link.bytes_per_s)


def predict_on_link(op: Collective, link: LinkSpec) -> Prediction:
    """`op` by the fastest algorithm at the share of the link's rate that is usual; the band spans what was published.

    The link must be of the level that `op` crosses. Raises `UsageError` where it is not.
    """
    if link.level != op.level:
        raise UsageError(f"{op.key} crosses level {op.level}, and link {link.name} is of level {link.level}")

    def fastest(achieved: float) -> tuple[float, str]:
        slowed = LinkSpec(link.name, link.level, link.bytes_per_s * achieved, link.latency_s)
        return min(((s, name) for name, s in algorithms_s(op, slowed).items()), default=(0.0, "nothing"))

    seconds, name = fastest(ACHIEVED)
    return Prediction(
        seconds, min(seconds, lower_bound_s(op, link)), fastest(WORST_ACHIEVED)[0], "roofline", f"{link.name}: {name}"
    )


def hierarchical_all_reduce(op: AllReduce, widths: Sequence[tuple[Level, int]]) -> list[Collective]:
    """The parts of an all-reduce over nested levels, in the order they run; their times add up.

    `widths`: ranks of each level from the innermost outwards, e.g. `[("node", 8), ("rack", 4)]` for 32 devices. Every
    device all-reduces only its share across the outer level ("rail"). Raises `UsageError` where the widths do not
    make up the ranks.
    """
    if not widths or math.prod(width for _, width in widths) != op.ranks:
        raise UsageError(f"the widths {list(widths)} must multiply to the {op.ranks} ranks of {op.key}")
    (level, width), outer = widths[0], widths[1:]
    if not outer:
        return [AllReduce(op.bytes, width, level, op.dtype)]
    share = AllReduce(-(-op.bytes // width), op.ranks // width, op.level, op.dtype)
    return [
        ReduceScatter(op.bytes, width, level, op.dtype),
        *hierarchical_all_reduce(share, outer),
        AllGather(op.bytes, width, level, op.dtype),
    ]


def predict_hierarchical_all_reduce(
    op: AllReduce, widths: Sequence[tuple[Level, int]], predict: Callable[[Collective], Prediction]
) -> Prediction:
    """The sum of the parts' predictions; `predict` says a part's: measured curves, or `predict_on_link`.

    The bands add up as well, as if all parts were wrong in the same direction.
    """
    parts = [predict(part) for part in hierarchical_all_reduce(op, widths)]
    weakest = max((part.basis for part in parts), key=("measured", "interpolated", "curve", "roofline").index)
    return Prediction(
        sum(part.seconds for part in parts),
        sum(part.low_s for part in parts),
        sum(part.high_s for part in parts),
        weakest,
        " + ".join(dict.fromkeys(part.route for part in parts)),
    )
