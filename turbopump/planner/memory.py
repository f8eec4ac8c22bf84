"""How much memory a device needs: what a rank holds all the time, what it keeps for backward, and what comes and goes.

    use = memory_bytes(Cases.of(cases))          arrays [3, cases]: first, middle and last stage of the pipeline
    use.peak, use.fits(80 * 2**30)

Lesson: three things decide. States (weights, gradients, optimizer) divide by all that shards them (ZeRO, Rajbhandari
2019); kept activations divide by tensor parallelism only where it reaches them, and multiply by the microbatches in
flight (Korthikanti 2022, arXiv:2205.05198, equations 1-6); logits of a large vocabulary alone can be a third.
What a case does not say (which products `selective` keeps, how many copies of the logits the loss makes) is
`Software`, known by name. What is kept there was read in its code; nothing in it was fitted but `FRAGMENTATION`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from turbopump.core.errors import UsageError
from turbopump.core.workload import DTYPE_BYTES
from turbopump.planner.cases import RECOMPUTES, SCHEDULES, SYNCHRONISATIONS, Array, Cases

GIB = 2**30
RANK_CLASSES = ("first", "middle", "last")
PARTS = ("weights", "gradients", "optimizer", "working_weights", "activations", "transient", "allocator")

FRAGMENTATION = 0.04
"""What the caching allocator reserves beyond what is allocated at the peak, as a share of it."""
MARGIN = 0.07
"""`fits` asks for this much more than the prediction: twice the largest under-prediction of a published row (3.5 %)."""
OUTSIDE_BYTES = 2 * GIB
"""Of a device's memory, never the allocator's: the driver's own (an 80 GiB H100 shows 79.1-79.6), the context (0.5 GiB)
and buffers of the communication library."""


@dataclass(frozen=True)
class Software:
    """What a trainer keeps that a `Case` does not say."""

    name: str
    selective: Literal["attention", "products", "mlp"]
    """What is *computed again*: the core of attention (Korthikanti 2022); every second product and all that is
    element-wise (torchtitan); what lies inside the MLP (our own)."""
    residual_bytes: int
    """Of one element of the stream between the blocks; 0: as the products."""
    dropout: bool
    """Masks of one byte an element, and the dropped scores where attention is not fused."""
    logit_bytes: int
    """Of one logit at the loss, all copies that are live or cannot be reused."""
    logit_bytes_compiled: int
    scratch_bytes: int
    """Of one parameter, while the optimizer updates all of them at once."""
    gathers_again: bool = False
    """With sequence parallelism the gathered input of a product is not kept but gathered anew for backward."""
    keeps_outputs: bool = True
    """A stage holds its outputs until their backward, the last one the logits of all microbatches (torch.distributed's
    `PipelineStage.fwd_cache` and `output_chunks`)."""


SOFTWARE: Mapping[str, Software] = {
    software.name: software
    for software in (
        # models/transformer/fused.py: the loss never holds all logits; the stream is fp32
        Software("turbopump", "mlp", 4, False, 0, 0, 4),
        # vocabulary-parallel loss in place of fp32 logits: 16-bit logits, their fp32 copy
        Software("megatron", "attention", 0, True, 6, 6, 0, gathers_again=True, keeps_outputs=False),
        # 2 (logits) + 4 (fp32 copy) + 4 (log-probabilities) + 4 (a gradient); every block is compiled, the loss was not
        # at the end of 2024 (pytorch issue 143774, torchtitan pull request 755)
        Software("torchtitan-2024", "products", 0, False, 14, 14, 4),
        # a compiled loss holds the 16-bit logits and their gradient
        Software("torchtitan", "products", 0, False, 14, 4, 4),
        # llm-foundry's default `fused_crossentropy`: 16-bit logits and their gradient; its Adam goes matrix by matrix
        Software("foundry", "products", 0, False, 4, 4, 0),
    )
}
TURBOPUMP = SOFTWARE["turbopump"]
EXCHANGE_BYTES = {"synchronous": 0, "quantized": 4, "local": 8}
"""Of a parameter, kept between exchanges: the error that quantization left; the last common weights and a momentum."""
CHUNK_LOGITS, CHUNK_ROWS = 2**27, 512
"""Our own loss holds that many fp32 logits at once, or the logits of so many rows (models/transformer/fused.py)."""


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on one device at its peak, arrays [3, cases] by RANK_CLASSES; the parts sum to `peak`.

    Where the pipeline has one stage all three are that stage; where it has two the middle is the last.
    """

    weights: Array
    """As the optimizer keeps them, this rank's shard."""
    gradients: Array
    optimizer: Array
    working_weights: Array
    """Copies in the dtype of the products: cast, or gathered from the shards."""
    activations: Array
    """Kept for backward, all microbatches in flight."""
    transient: Array
    """The largest of what comes and goes on top: the loss, a layer computed again, the optimizer's scratch."""
    allocator: Array
    """Reserved and not allocated."""
    layer_states: Array
    """Of the first four what belongs to layers, without embedding and head: what the papers' figures show."""
    layer_activations: Array

    @property
    def peak(self) -> Array:
        """Reserved bytes, [3, cases]."""
        return sum((getattr(self, part) for part in PARTS), np.zeros_like(self.weights))

    @property
    def worst(self) -> Array:
        """Reserved bytes of the fullest rank, [cases]."""
        return self.peak.max(axis=0)  # type: ignore[no-any-return]

    def fits(
        self, device_bytes: float, *, margin: float = MARGIN, outside_bytes: float = OUTSIDE_BYTES
    ) -> NDArray[np.bool_]:
        """Whether every rank fits in a device of `device_bytes`, [cases]. One-sided: in doubt it does not.

        Raises `UsageError` for a device whose memory is not a positive number.
        """
        if not device_bytes > 0:
            raise UsageError(
                f"the device's memory ({device_bytes}) must be above 0 bytes: give memory_gib in its entry"
            )
        return self.worst * (1 + margin) + outside_bytes <= device_bytes  # type: ignore[no-any-return]


def memory_bytes(cases: Cases, software: Software = TURBOPUMP) -> MemoryUse:
    """Peak memory of every case on its first, middle and last pipeline stage."""
    sizes = _sizes(cases)
    index, has_head = _stages(cases)
    layers = np.ceil(cases.layers / cases.pp)  # of the fullest stage where they do not divide
    tables = _tables(cases, index, has_head) / cases.tp
    own, expert = layers * _dense_layer(cases) / cases.tp, layers * _experts(cases) / (cases.tp * cases.ep)
    shards = cases.dp_shard * cases.cp  # both FSDP2 and Megatron's distributed optimizer shard over cp, too
    expert_shards = np.maximum(shards / cases.ep, 1.0)
    sharded, reshard = shards > 1, cases.reshard_after_forward > 0
    held = (own + tables) / shards + expert / expert_shards
    whole = own + tables + expert
    # without resharding a pipeline sums whole gradients over its microbatches and reduces them after the last one
    unreduced = sharded & ~reshard & (cases.pp > 1)
    gradients = np.where(unreduced, whole, held) * cases.gradient_bytes

    exchange = np.array([EXCHANGE_BYTES[kind] for kind in SYNCHRONISATIONS], dtype=np.float64)
    states = cases.optimizer_bytes + exchange[cases.synchronisation]
    layer = (_dense_layer(cases) + _experts(cases) / cases.ep) / cases.tp
    gathered = np.minimum(tables + 2 * layer, whole)  # the root's group stays; one layer in use, the next on its way
    copied = np.where(sharded, np.where(reshard, gathered, whole), np.where(sizes < cases.weight_bytes, whole, 0.0))
    kept, kept_all = _kept_by_layer(cases, software, sizes)
    tokens = cases.microbatch * cases.seq_len / cases.cp
    flight = _in_flight(cases, index)
    in_layers = tokens * kept * layers * flight
    activations = in_layers + tokens * _kept_at_ends(cases, software, sizes, index, has_head, flight)

    backward = tokens * (kept_all - kept + _gradient_widths(cases, sizes))
    backward = backward + np.where(sharded, layer * (sizes + cases.gradient_bytes), 0.0)
    loss = has_head * _loss(cases, software, sizes, tokens)
    scratch = software.scratch_bytes * held - activations
    transient = np.maximum(np.maximum(backward, loss), scratch) + _communication(cases, sizes, tokens)

    always = held * (cases.weight_bytes + states) + gradients + copied * sizes
    return MemoryUse(
        weights=held * cases.weight_bytes,
        gradients=gradients,
        optimizer=held * states,
        working_weights=copied * sizes,
        activations=activations,
        transient=transient,
        allocator=FRAGMENTATION * (always + activations + transient),
        layer_states=always * layers * layer / whole,
        layer_activations=in_layers,
    )


def _sizes(cases: Cases) -> Array:
    """Bytes of an activation: that of the products, 2 under fp8 (only what enters a product is cast)."""
    return np.array([max(2, DTYPE_BYTES.get(dtype, 2)) for dtype in cases.dtype], dtype=np.float64)


def _stages(cases: Cases) -> tuple[Array, Array]:
    """Of every rank class its stage and whether it has the head, [3, cases]."""
    last = cases.pp - 1
    index = np.stack([np.zeros_like(last), np.minimum(1.0, last), last])
    return index, (index == last).astype(np.float64)


def _experts(cases: Cases) -> Array:
    """Parameters of a layer that `ep` splits."""
    return np.where(cases.experts > 1, cases.experts * cases.mlp_params, 0.0)


def _dense_layer(cases: Cases) -> Array:
    return cases.layer_params - _experts(cases)


def _tables(cases: Cases, index: Array, has_head: Array) -> Array:
    """Parameters outside the layers: embedding (and positions) on the first stage, the head on the last.

    A tied head is a second copy where the ends of the pipeline are two stages.
    """
    outside = cases.params - cases.layers * cases.layer_params
    head = cases.vocab * cases.hidden
    first = np.where(cases.tied > 0, outside, outside - head)
    both = np.where(cases.tied > 0, outside, first + head)
    return np.where(cases.pp == 1, both, np.where(index == 0, first, has_head * head))


def _in_flight(cases: Cases, index: Array) -> Array:
    """Microbatches whose activations a stage keeps at once, as multiples of all its layers.

    1F1B: what has gone forward and not come back (Narayanan 2021). Interleaved: 2 (pp - 1 - stage) + (chunks - 1) pp
    + 1 chunks of 1/chunks of the layers each: on the first stage pp times Korthikanti's 1 + (pp - 1) / (pp chunks).
    """
    chunks = np.where(cases.schedule == SCHEDULES.index("interleaved"), cases.virtual_stages, 1.0)
    plain = cases.pp - index
    interleaved = (2 * (cases.pp - 1 - index) + (chunks - 1) * cases.pp + 1) / chunks
    return np.minimum(np.where(chunks > 1, interleaved, plain), np.maximum(cases.num_microbatches, 1.0))


def _kept_by_layer(cases: Cases, software: Software, size: Array) -> tuple[Array, Array]:
    """Bytes a token that one layer keeps as the case recomputes, and that it would keep without.

    Korthikanti's equation 2 with 16-bit activations and dropout: 10 h outside the tensor-parallel region (inputs of two
    norms and of two products, two masks), 24 h / tp inside, 5 a s / tp for scores that are written to memory; sequence
    parallelism (equation 4) divides all by tp.
    """
    stream = software.residual_bytes or size
    hidden, queries, keys = cases.hidden, cases.heads * cases.head_width, cases.keys * cases.head_width
    outer = np.where(cases.sequence_parallel > 0, cases.tp, 1.0)
    routed = cases.experts_per_token
    outside = (2 * stream + 2 * software.dropout) * hidden / outer
    inputs = (1 + routed) * size * hidden / (outer if software.gathers_again else 1.0)
    attention = (2 * queries + 2 * keys) * size
    fused = cases.fused_attention > 0
    core = np.where(fused, 4.0 * cases.heads, cases.heads * cases.seq_len * (size + software.dropout * (1 + size)))
    wide = np.where(cases.gated > 0, np.where(cases.compiled > 0, 3.0, 4.0), 2.0) * cases.mlp * routed * size
    none = outside + inputs + (attention + core + wide) / cases.tp
    if software.selective == "attention":
        selective = none - np.where(fused, 0.0, core / cases.tp)
    elif software.selective == "mlp":
        selective = none - wide / cases.tp
    else:
        selective = _kept_products(cases, stream, size, outer, core)
    full = stream * hidden / outer
    kept = np.choose(cases.recompute, [none, selective, full])
    return kept, none


def _kept_products(cases: Cases, stream: int | Array, size: Array, outer: Array, core: Array) -> Array:
    """Bytes a token under torchtitan's policy: the block's input, what attention returns, and every second product.

    Of q, k, v, out, gate, up, down those are q, v, gate and down; without a gate q, v and up. The last product of a
    tensor-parallel MLP is a partial sum of full width, and its reduce-scatter is kept as well.
    """
    hidden, queries, keys = cases.hidden, cases.heads * cases.head_width, cases.keys * cases.head_width
    split = cases.tp > 1
    down = np.where(cases.gated > 0, hidden, 0.0)
    products = (queries + keys + cases.mlp * cases.experts_per_token) / cases.tp + down
    reduced = np.where(split, 2 * hidden / cases.tp, 0.0)
    attention = (size * queries + np.where(cases.fused_attention > 0, core, 0.0)) / cases.tp
    return stream * hidden / outer + size * (products + reduced) + attention


def _kept_at_ends(cases: Cases, software: Software, size: Array, index: Array, has_head: Array, flight: Array) -> Array:
    """Bytes a token kept beside the layers: the embedding's mask, the inputs of last norm and head, outputs."""
    outer = np.where(cases.sequence_parallel > 0, cases.tp, 1.0)
    embedding = (index == 0) * flight * software.dropout * cases.hidden / outer
    head = has_head * ((software.residual_bytes or size) + size) * cases.hidden / outer
    if not software.keeps_outputs:
        return embedding + head
    stream = flight * (software.residual_bytes or size) * cases.hidden / outer
    others = (
        np.maximum(cases.num_microbatches - 1, 0) * (size if software.logit_bytes else 0.0) * cases.vocab / cases.tp
    )
    return embedding + head + np.where(cases.pp > 1, np.where(has_head > 0, others, stream), 0.0)


def _gradient_widths(cases: Cases, size: Array) -> Array:
    """Bytes a token of the gradients that live while one layer goes backward: of the MLP's insides and the stream."""
    scores = np.where(cases.fused_attention > 0, 0.0, cases.heads * cases.seq_len) / cases.tp
    return size * (2 * cases.hidden + 2 * cases.mlp * cases.experts_per_token / cases.tp + scores)


def _loss(cases: Cases, software: Software, size: Array, tokens: Array) -> Array:
    """Bytes of logits and what the loss makes of them; the vocabulary is split by tp."""
    each = np.where(cases.compiled > 0, software.logit_bytes_compiled, software.logit_bytes)
    whole = each * tokens * cases.vocab / cases.tp
    chunk = np.minimum(np.maximum(CHUNK_LOGITS, CHUNK_ROWS * cases.vocab), tokens * cases.vocab)
    gradients = tokens * cases.hidden * size + cases.vocab * cases.hidden / cases.tp * 4  # of its input, of the head
    return np.where(each > 0, whole, chunk * (4 + 2 * size) + gradients)


def _communication(cases: Cases, size: Array, tokens: Array) -> Array:
    """Bytes of buffers: of a stage's neighbours, tensor parallelism's gathered sequence, keys that go round a ring."""
    stream = tokens * cases.hidden * size
    stages = np.where(cases.pp > 1, 2 * stream, 0.0)
    sequence = np.where((cases.tp > 1) & (cases.sequence_parallel > 0), 2 * stream, 0.0)
    keys = cases.keys * cases.head_width / np.minimum(cases.tp, cases.keys)
    ring = np.where(cases.cp > 1, 4 * tokens * keys * size, 0.0)
    return stages + sequence + ring


assert RECOMPUTES == ("none", "selective", "full")  # the order `np.choose` takes them in
