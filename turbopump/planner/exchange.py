"""What moving data between devices costs, for many cases at once: collectives, sends between stages, gradients.

Ranks lie as in Megatron-LM: tensor-parallel ones next to each other, then context, data, and pipeline stages. A ring
runs at the slower of the link within a host and its share of the host's network ports: a group with `local` members
on a host gets local / devices_per_node of them, because all such groups of a host are at work together.
Bytes of a ring of n ranks: (n - 1) / n of the buffer for a gather or scatter, twice that for a sum (Thakur 2005).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from turbopump.planner.cases import Array, Cases
from turbopump.planner.machine import Machine

Constants = Mapping[str, Any]
"""Parameters by name: numbers, or arrays [points, 1] that give every result a first axis (for derivatives)."""
QUANTIZED_BYTES = 1.0  # of one gradient: int8 with a scale a block
SLOWER_WHEN_FEW = 0.5
"""A ring of n on one host reaches n / (n + 0.5) of what many do: A100s with NVSwitch, allreduce_intranode.csv."""
NEVER = 1e30  # bytes a second of a link that is not there, where nothing is sent over it


def ring_s(
    machine: Machine, constants: Constants, sweeps: float, size_bytes: Array, ranks: Array, local: Array
) -> Array:
    """Seconds of `sweeps` passes round a ring of `ranks`, `local` of them a host: 1 to gather or scatter, 2 to sum."""
    hosts = np.maximum(ranks / local, 1.0)
    node = node_rate(machine, constants) * local / (local + SLOWER_WHEN_FEW)
    network = network_rate(machine, constants) * local / machine.devices_per_node
    rate = np.where(hosts > 1, np.minimum(np.where(local > 1, node, NEVER), network), node)
    latency = constants["node_latency_s"] * np.log2(2 * local) * (local > 1)
    latency = latency + constants["network_latency_s"] * np.log2(2 * hosts) * (hosts > 1)
    return np.where(ranks > 1, sweeps * ((ranks - 1) / ranks * size_bytes / rate + latency / 2), 0.0)


def node_rate(machine: Machine, constants: Constants) -> float:
    """Bytes a second of one device to others of its host. Without such a link they share the network."""
    link = machine.node or machine.network
    return link.bytes_per_s * constants["node_efficiency"] if link else NEVER


def network_rate(machine: Machine, constants: Constants) -> float:
    """Bytes a second of one host to the others; where no network is named, that of its inner link."""
    if machine.network is None:
        return node_rate(machine, constants) * machine.devices_per_node
    return machine.network_bytes_per_s * constants["network_efficiency"]


def locals_of(machine: Machine, size: Array, stride: Array) -> Array:
    """How many of a group of `size` ranks, `stride` apart, are on one host."""
    return np.clip(machine.devices_per_node / stride, 1.0, size)


def tensor_sum_s(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """The sum of one layer's half (attention or MLP) over the tensor ranks. With sequence parallelism a scatter and a
    gather take its place, which move as much (Korthikanti 2022)."""
    tokens = cases.microbatch * cases.seq_len / cases.cp
    local = locals_of(machine, cases.tp, np.ones_like(cases.tp))
    return ring_s(machine, constants, 2.0, 2 * tokens * cases.hidden, cases.tp, local)


def expert_exchange_s(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """One all-to-all of a layer's tokens to their experts; 0 without experts."""
    tokens = cases.microbatch * cases.seq_len / cases.cp * cases.experts_per_token
    local = locals_of(machine, cases.ep, cases.tp * cases.cp)
    return np.where(cases.experts > 1, ring_s(machine, constants, 1.0, 2 * tokens * cases.hidden, cases.ep, local), 0.0)


def context_ring_s(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """Keys and values of one layer once round the context ranks (ring attention, Liu 2023)."""
    size = 4 * cases.microbatch * cases.seq_len * cases.keys * cases.head_width / cases.tp
    return ring_s(machine, constants, 1.0, size, cases.cp, locals_of(machine, cases.cp, cases.tp))


def shard_gather_s(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """All-gather of one layer's bf16 parameters over `dp_shard` ranks; the scatter of its gradients costs the same."""
    held = cases.layer_params / cases.tp / np.where(cases.experts > 1, cases.ep, 1.0)
    local = locals_of(machine, cases.dp_shard, cases.tp * cases.cp)
    return ring_s(machine, constants, 1.0, 2 * held, cases.dp_shard, local)


def send_s(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """One send of a microbatch's activations to the next stage; tensor ranks send a part each between hosts.

    Stages lie dp x cp x tp devices apart: of the boundaries between them, that share of a host's devices crosses."""
    size = 2 * cases.microbatch * cases.seq_len / cases.cp * cases.hidden
    stride = cases.dp * cases.cp * cases.tp
    share = np.minimum(1.0, stride / machine.devices_per_node)
    crossing = np.where(cases.pp * stride > machine.devices_per_node, share, 0.0)
    node_link = machine.node or machine.network
    node = constants["node_send_efficiency"] * (node_link.bytes_per_s if node_link else NEVER)
    ports = machine.network_bytes_per_s / machine.devices_per_node if machine.network else node
    network = constants["network_send_efficiency"] * ports
    inside = size / node + constants["node_latency_s"]
    outside = size / cases.tp / network + constants["network_latency_s"]
    return np.where(cases.pp > 1, (1 - crossing) * inside + crossing * outside, 0.0)


def gradients_s(cases: Cases, machine: Machine, constants: Constants, params: Array) -> Array:
    """The sum of the gradients of `params` held parameters over replicas, by the case's way of synchronising.

    `local` exchanges parameters in fp32 every `sync_every` steps; `quantized` sends a byte for each gradient and
    reads and writes them all twice more."""
    local = locals_of(machine, cases.dp_replicate, cases.tp * cases.cp * cases.dp_shard)
    kind = cases.synchronisation
    width = np.where(kind == 1, QUANTIZED_BYTES, np.where(kind == 2, 4.0, cases.gradient_bytes))
    held = params / cases.dp_shard
    exchange = ring_s(machine, constants, 2.0, held * width, cases.dp_replicate, local)
    memory = machine.memory_bytes_per_s * constants["memory_efficiency"]
    coding = np.where((kind == 1) & (cases.dp_replicate > 1), 4 * held * cases.gradient_bytes / memory, 0.0)
    return (exchange * constants["gradient_exposed"] + coding) / np.where(
        kind == 2, np.maximum(cases.sync_every, 1), 1.0
    )


def tied_table_s(cases: Cases, machine: Machine, constants: Constants) -> Array:
    """First and last stage each hold a tied table of tokens and sum its gradients; 0 where that is one stage."""
    stride = cases.dp * cases.cp * cases.tp
    crosses = cases.pp * stride > machine.devices_per_node
    rate = np.where(crosses, network_rate(machine, constants) / machine.devices_per_node, node_rate(machine, constants))
    return np.where((cases.pp > 1) & (cases.tied > 0), 2 * cases.vocab * cases.hidden / cases.tp / rate, 0.0)
