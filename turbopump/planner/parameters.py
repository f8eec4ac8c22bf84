"""The structural parameters of the time model: what each means and what physics or another table says of it.

Every one is positive, with a log-normal prior. The medians come from sources that are not step times: NCCL's bus
rates on DGX A100 (allreduce_intranode.csv: 0.6-0.75 of the links, 45-90 us) and on InfiniBand (nccl-tests: 0.9-0.97
of the ports), A100 product curves (ops_a100_mi210.csv: 93 % of peak, half of it at about half a wave of tiles), the
kernels that a layer's source launches and what they read and write. A parameter that `varies` has a factor for each
device generation or each training software as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Parameter:
    """`value` is the median, `spread` the standard deviation of the logarithm, `cap` what it cannot pass."""

    value: float
    spread: float
    unit: str
    meaning: str
    varies: Literal["", "device", "software"] = ""
    family_spread: float = 0.1
    """Standard deviation of the logarithm of a family's factor, where it varies."""
    cap: float = float("inf")


PARAMETERS: Mapping[str, Parameter] = {
    "matmul_efficiency": Parameter(0.88, 0.05, "of peak", "what large products reach", "device", 0.08, 0.97),
    "matmul_half_tiles": Parameter(54.0, 0.6, "tiles", "of 128 x 128 at which a product reaches half of that"),
    "matmul_half_depth": Parameter(120.0, 0.5, "terms", "inner size at which a product reaches half of that"),
    "attention_efficiency": Parameter(0.40, 0.2, "of peak", "batched products of scores and values", cap=0.95),
    "fused_attention_efficiency": Parameter(0.33, 0.4, "of peak", "attention that never writes its scores",
                                            "device", 0.2, 0.95),
    "memory_efficiency": Parameter(0.80, 0.06, "of peak", "element-wise operations over memory", "device", 0.06, 0.97),
    "elementwise_passes": Parameter(1.0, 0.2, "x", "memory traffic of element-wise operations over that counted",
                                    "software", 0.2),
    "score_passes": Parameter(4.5, 0.15, "passes", "over attention scores that are written, forward"),
    "kernel_latency_s": Parameter(4e-6, 0.4, "s", "start and end of one kernel on the device"),
    "launch_s": Parameter(15e-6, 0.4, "s", "host time to launch one kernel from Python", "software", 0.2),
    "backward_launches": Parameter(1.6, 0.2, "x", "kernels of backward over those of forward"),
    "plain_scores": Parameter(1.3, 0.4, "x", "launches of a layer whose scores the fused softmax cannot take"),
    "launch_jitter": Parameter(0.05, 0.6, "share", "deviation of host time; tensor ranks wait for the slowest"),
    "launch_collective_s": Parameter(15e-6, 0.6, "s", "host time to start one collective"),
    "handover": Parameter(4.0, 0.4, "power", "how sharply a layer changes from waiting for the device to the host"),
    "node_efficiency": Parameter(0.80, 0.05, "of link", "collectives within a host", "device", 0.08, 0.95),
    "node_latency_s": Parameter(22e-6, 0.25, "s", "of a collective within a host, by doubling of the ranks"),
    "network_efficiency": Parameter(0.93, 0.05, "of ports", "collectives between hosts", "device", 0.1, 0.97),
    "network_latency_s": Parameter(25e-6, 0.5, "s", "of a collective between hosts, by doubling of the hosts"),
    "node_send_efficiency": Parameter(0.4, 0.5, "of link", "sends between stages within a host", cap=0.95),
    "network_send_efficiency": Parameter(0.40, 0.3, "of ports", "sends between stages on different hosts", cap=0.97),
    "head_passes": Parameter(8.0, 0.4, "passes", "of fp32 over the logits, forward and backward"),
    "unsplit_head": Parameter(1.3, 0.4, "x", "time of a head that is not split over tensor ranks, over that expected",
                              "software", 0.2),
    "microbatch_s": Parameter(1e-3, 0.7, "s", "host work of one microbatch on one stage"),
    "step_s": Parameter(5e-3, 0.7, "s", "host work of one step"),
    "gradient_exposed": Parameter(0.98, 0.05, "share", "of the sum of replicated gradients that backward does not hide",
                                  cap=1.0),
    "optimizer_efficiency": Parameter(0.6, 0.3, "of peak", "memory rate of the optimizer", cap=0.97),
    "shard_overlap": Parameter(0.8, 0.2, "share", "of compute behind which shards are gathered and scattered", cap=1.0),
    "overlap_slowdown": Parameter(0.7, 0.4, "share", "of hidden communication that compute loses to it", cap=1.0),
    "straggler": Parameter(0.02, 0.3, "share", "deviation of a device's time; the slowest of N sets the step"),
}  # fmt: skip
NAMES: tuple[str, ...] = tuple(PARAMETERS)
