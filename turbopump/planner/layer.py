"""What one layer, the head and the embedding take on one device, for many cases at once.

A product runs at `matmul_efficiency` of the peak, less where there are few tiles to fill the device or few terms to
add up, and never faster than memory delivers it. Attention is one fused kernel, or two batched products with passes
over the scores between them. Element-wise operations are memory traffic. The host launches every kernel: where the
device is quicker than that, the layer takes as long as its launches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from turbopump.planner.cases import RECOMPUTES, Array, Cases
from turbopump.planner.exchange import Constants
from turbopump.planner.machine import Machine

TILE = 128  # rows and columns of the output that one processor of the device works on
FORWARD_KERNELS = 45  # of one layer from Python, unfused: counted in Megatron-LM's and llm-foundry's layers
DEVICE_KERNELS = 12  # of these that are element-wise operations of their own
COMPILED_LAUNCHES, COMPILED_TRAFFIC = 0.3, 0.5  # of the launches and element-wise traffic that fusing leaves
HIDDEN_PASSES = 14  # over the hidden state: two norms, two sums with dropout, biases, forward
MLP_PASSES, QUERY_PASSES = 4, 2  # over the inside of the MLP and over queries, keys and values
BACKWARD_TRAFFIC = 1.6
SCORES_BACKWARD = 1.3
SOFTMAX_BATCHES = 4  # a fused softmax takes sequences x heads in fours (Megatron-LM, fused_softmax.py)
HEAD_UNIT = 64  # tensor cores take heads in blocks of this width


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer for one microbatch on one device, without communication. `host_*`: of launching it."""

    forward_s: Array
    backward_s: Array
    recompute_s: Array
    attention_forward_s: Array
    attention_backward_s: Array
    host_forward_s: Array
    host_backward_s: Array


def product_s(machine: Machine, constants: Constants, m: Array, n: Array, k: Array, peak: Array) -> Array:
    """An m x k by k x n product in 2-byte numbers, at `peak` operations a second."""
    tiles = np.ceil(m / TILE) * np.ceil(n / TILE)
    filled = tiles / (tiles + constants["matmul_half_tiles"]) * k / (k + constants["matmul_half_depth"])
    flops_s = 2 * m * n * k / (peak * constants["matmul_efficiency"] * filled)
    bytes_s = 2 * (m * k + k * n + m * n) / _memory(machine, constants)
    return np.maximum(flops_s, bytes_s) + constants["kernel_latency_s"]


def products_s(
    machine: Machine, constants: Constants, sizes: tuple[Array, Array, Array], peak: Array
) -> tuple[Array, Array]:
    """Forward and backward (gradients of input and weights) of one matrix."""
    m, n, k = sizes
    backward = product_s(machine, constants, m, k, n, peak) + product_s(machine, constants, k, n, m, peak)
    return product_s(machine, constants, m, n, k, peak), backward


def peaks(cases: Cases, machine: Machine) -> Array:
    """Operations a second of each case's dtype."""
    known = {dtype: machine.peak_flops_per_s(dtype) for dtype in set(cases.dtype)}
    return np.array([known[dtype] for dtype in cases.dtype])


def layer_times(cases: Cases, machine: Machine, constants: Constants) -> LayerTimes:
    """One layer of every case."""
    matrices_forward, matrices_backward = _matrices(cases, machine, constants)
    attention_forward, attention_backward, scores = _attention(cases, machine, constants)
    traffic = _elementwise(cases, machine, constants)
    gaps = DEVICE_KERNELS * constants["kernel_latency_s"]
    forward = matrices_forward + attention_forward + traffic + gaps
    backward = matrices_backward + attention_backward + BACKWARD_TRAFFIC * (traffic + gaps)
    full, selective = (cases.recompute == RECOMPUTES.index(kind) for kind in ("full", "selective"))
    again = np.where(full, forward, np.where(selective, np.where(cases.fused_attention > 0, traffic, scores), 0.0))
    host = _launches(cases, constants)
    return LayerTimes(forward, backward, again, attention_forward, attention_backward, host,
                      host * (constants["backward_launches"] + full))  # fmt: skip


def head_s(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """Head and loss of one microbatch, forward and backward, without communication."""
    tokens = cases.microbatch * cases.seq_len / cases.cp
    peak = np.minimum(peaks(cases, machine), machine.peak_flops_per_s("bf16"))  # the head is kept out of fp8
    columns = cases.vocab / cases.tp
    products = sum(products_s(machine, constants, (tokens, columns, cases.hidden), peak))
    logits = 4 * tokens * columns * constants["head_passes"] / _memory(machine, constants)
    return (products + logits) * np.where(cases.tp > 1, 1.0, constants["unsplit_head"])


def embedding_s(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """Looking tokens up and summing their gradients, of one microbatch."""
    tokens = cases.microbatch * cases.seq_len / cases.cp
    return 12 * tokens * cases.hidden / _memory(machine, constants)


def _memory(machine: Machine, constants: Constants) -> float:
    return machine.memory_bytes_per_s * constants["memory_efficiency"]


def _matrices(cases: Cases, machine: Machine, constants: Constants) -> tuple[Array, Array]:
    """The four (or five) matrices of a layer; an expert's are computed for each expert a device holds."""
    peak = peaks(cases, machine)
    tokens = cases.microbatch * cases.seq_len / cases.cp
    queries, keys = cases.heads * cases.head_width, cases.keys * cases.head_width
    experts = np.maximum(cases.experts / cases.ep, 1.0)
    routed = np.where(cases.experts > 1, tokens * cases.experts_per_token / experts, tokens)
    forward, backward = np.zeros_like(tokens), np.zeros_like(tokens)
    for sizes, times in (
        ((tokens, (queries + 2 * keys) / cases.tp, cases.hidden), 1.0),
        ((tokens, cases.hidden, queries / cases.tp), 1.0),
        ((routed, cases.mlp * (1 + cases.gated) / cases.tp, cases.hidden), experts),
        ((routed, cases.hidden, cases.mlp / cases.tp), experts),
    ):
        one, two = products_s(machine, constants, sizes, peak)
        forward, backward = forward + times * one, backward + times * two
    return forward, backward


def _attention(cases: Cases, machine: Machine, constants: Constants) -> tuple[Array, Array, Array]:
    """Forward, backward, and what selective recomputation computes again. Fused kernels skip the masked half and
    compute it 2.5 times in backward (Dao 2023); written scores take two products each way and passes over them."""
    peak = machine.peak_flops_per_s("bf16")
    latency = constants["kernel_latency_s"]
    scores = cases.microbatch * cases.heads / cases.tp * cases.seq_len * cases.seq_len / cases.cp
    fused = 2 * scores * cases.head_width / (peak * constants["fused_attention_efficiency"])
    width = np.ceil(cases.head_width / HEAD_UNIT) * HEAD_UNIT
    products = 4 * scores * width / (peak * constants["attention_efficiency"]) + 2 * latency
    passes = 2 * scores * constants["score_passes"] / _memory(machine, constants)
    plain = products + passes
    is_fused = cases.fused_attention > 0
    forward = np.where(is_fused, fused + latency, plain)
    backward = np.where(is_fused, 2.5 * fused + 2 * latency, 2 * products + SCORES_BACKWARD * passes)
    return forward, backward, plain


def _elementwise(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """Norms, sums, dropout, activation: bytes forward over the memory's rate."""
    tokens = cases.microbatch * cases.seq_len / cases.cp
    split = np.where(cases.sequence_parallel > 0, cases.tp, 1.0)
    inside = cases.mlp * (1 + cases.gated) * cases.experts_per_token / cases.tp
    heads = (cases.heads + 2 * cases.keys) * cases.head_width / cases.tp
    size = 2 * tokens * (HIDDEN_PASSES * cases.hidden / split + MLP_PASSES * inside + QUERY_PASSES * heads)
    compiled = np.where(cases.compiled > 0, COMPILED_TRAFFIC, 1.0)
    return size * compiled * constants["elementwise_passes"] / _memory(machine, constants)


def _launches(cases: Cases, constants: Constants) -> Array:
    """Host time of one layer's forward. Tensor ranks wait for the slowest host process of them."""
    batches = cases.microbatch * cases.heads / cases.tp
    plain = (cases.fused_attention == 0) & (batches % SOFTMAX_BATCHES != 0)
    jitter = 1 + constants["launch_jitter"] * np.sqrt(2 * np.log(cases.tp))
    compiled = np.where(cases.compiled > 0, COMPILED_LAUNCHES, 1.0)
    launches = FORWARD_KERNELS * compiled * np.where(plain, constants["plain_scores"], 1.0)
    return launches * constants["launch_s"] * jitter
