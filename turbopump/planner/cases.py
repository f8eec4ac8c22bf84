"""What is planned, one by one and many at once: a decoder, a batch, and a way to split them over devices. No torch.

A `Case` is one way to train one model. `Cases` are many of them as arrays of equal length, so that the models of time
and memory are written once, in NumPy, for one case and for 1e5. Sizes are those of the whole model; what a device
holds follows from the split.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from turbopump.core.errors import UsageError

Recompute = Literal["none", "selective", "full"]
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "full")
Schedule = Literal["1f1b", "interleaved"]
SCHEDULES: tuple[Schedule, ...] = ("1f1b", "interleaved")
Synchronisation = Literal["synchronous", "quantized", "local"]
SYNCHRONISATIONS: tuple[Synchronisation, ...] = ("synchronous", "quantized", "local")
Array = NDArray[np.float64]


@dataclass(frozen=True)
class DecoderShape:
    """A decoder-only transformer: `layers` of attention and MLP between an embedding and a head."""

    hidden: int
    layers: int
    heads: int
    vocab: int
    mlp: int
    kv_heads: int = 0
    """0: as many as `heads`."""
    head_dim: int = 0
    """0: hidden / heads."""
    gated: bool = True
    """The MLP has three matrices (SwiGLU) instead of two (GELU)."""
    tied: bool = True
    learned_positions: int = 0
    """Rows of a learned table of positions; 0 for rotary positions or ALiBi."""
    biases: bool = False
    experts: int = 1
    experts_per_token: int = 1
    name: str = ""

    @property
    def keys(self) -> int:
        """Key heads."""
        return self.kv_heads or self.heads

    @property
    def head_width(self) -> int:
        return self.head_dim or self.hidden // self.heads

    @property
    def attention_params(self) -> int:
        """Of one layer, without biases."""
        queries, keys = self.heads * self.head_width, self.keys * self.head_width
        return self.hidden * (2 * queries + 2 * keys)

    @property
    def mlp_params(self) -> int:
        """Of one layer and one expert, without biases."""
        return (3 if self.gated else 2) * self.hidden * self.mlp

    @property
    def layer_params(self) -> int:
        """Of one layer, all experts, router, norms and biases."""
        experts = self.experts * self.mlp_params + (self.hidden * self.experts if self.experts > 1 else 0)
        norms = (4 if self.biases else 2) * self.hidden
        queries, keys = self.heads * self.head_width, self.keys * self.head_width
        biases = queries + 2 * keys + self.hidden + self.mlp + self.hidden if self.biases else 0
        return self.attention_params + experts + norms + biases

    @property
    def params(self) -> int:
        tables = self.vocab * self.hidden * (1 if self.tied else 2) + self.learned_positions * self.hidden
        return self.layers * self.layer_params + tables + (2 if self.biases else 1) * self.hidden


@dataclass(frozen=True)
class ParallelDims:
    """How many ways each axis is split (the field's own names). `ep` splits experts within the `dp` ranks."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def dp(self) -> int:
        return self.dp_replicate * self.dp_shard

    @property
    def num_devices(self) -> int:
        return self.pp * self.dp * self.cp * self.tp


@dataclass(frozen=True)
class Case:
    """One way to train one decoder. `global_batch` and `microbatch` count sequences."""

    shape: DecoderShape
    seq_len: int
    global_batch: int
    microbatch: int
    dims: ParallelDims = field(default_factory=ParallelDims)
    recompute: Recompute = "none"
    dtype: str = "bf16"
    """Of the products; fp8 keeps bf16 around them."""
    schedule: Schedule = "1f1b"
    virtual_stages: int = 1
    """Chunks of layers a stage holds with the interleaved schedule."""
    sequence_parallel: bool = False
    """Activations between the tensor-parallel regions are split over `tp` (Korthikanti 2022)."""
    fused_attention: bool = True
    """Scores are never written to memory (FlashAttention)."""
    compiled: bool = False
    """Element-wise chains are fused, and launching costs little."""
    reshard_after_forward: bool = True
    """Sharded parameters are gathered anew for backward (FULL_SHARD); otherwise kept (SHARD_GRAD_OP)."""
    synchronisation: Synchronisation = "synchronous"
    sync_every: int = 1
    """Steps between exchanges, with `local`."""
    weight_bytes: int = 4
    """Of one parameter as the optimizer keeps it."""
    gradient_bytes: int = 4
    optimizer_bytes: int = 8
    """Of the optimizer's states of one parameter."""

    @property
    def num_microbatches(self) -> int:
        return self.global_batch // (self.microbatch * self.dims.dp)

    def problems(self) -> list[str]:
        """Sizes that do not divide, each with the nearest that do."""
        shape, dims = self.shape, self.dims
        found = []
        for what, value, by, divisor in (
            ("heads", shape.heads, "tp", dims.tp), ("kv heads", shape.keys, "tp", min(dims.tp, shape.keys)),
            ("layers", shape.layers, "pp x virtual_stages", dims.pp * self.virtual_stages),
            ("global_batch", self.global_batch, "dp x microbatch", dims.dp * self.microbatch),
            ("experts", shape.experts, "ep", dims.ep), ("seq_len", self.seq_len, "cp", dims.cp),
            ("dp", dims.dp, "ep", dims.ep),
        ):  # fmt: skip
            if value % divisor:
                below, above = value // divisor * divisor, -(-value // divisor) * divisor
                near = f"{below} or {above}" if below else f"{above}"
                found.append(f"{what} ({value}) must be divisible by {by} ({divisor}): use {near}")
        return found


_NUMBERS = ("seq_len", "global_batch", "microbatch", "virtual_stages", "sync_every", "weight_bytes", "gradient_bytes",
            "optimizer_bytes", "sequence_parallel", "fused_attention", "compiled", "reshard_after_forward",
            "num_microbatches")  # fmt: skip


@dataclass(frozen=True)
class Cases:
    """Many cases as float arrays of one length: what `Case`, its `shape` and its `dims` hold, by the same names."""

    hidden: Array
    layers: Array
    heads: Array
    keys: Array
    head_width: Array
    mlp: Array
    vocab: Array
    gated: Array
    tied: Array
    experts: Array
    experts_per_token: Array
    attention_params: Array
    mlp_params: Array
    layer_params: Array
    params: Array
    pp: Array
    dp_replicate: Array
    dp_shard: Array
    cp: Array
    tp: Array
    ep: Array
    seq_len: Array
    global_batch: Array
    microbatch: Array
    virtual_stages: Array
    sync_every: Array
    weight_bytes: Array
    gradient_bytes: Array
    optimizer_bytes: Array
    sequence_parallel: Array
    fused_attention: Array
    compiled: Array
    reshard_after_forward: Array
    num_microbatches: Array
    recompute: NDArray[np.int64]
    """Index in RECOMPUTES; `schedule` and `synchronisation` likewise."""
    schedule: NDArray[np.int64]
    synchronisation: NDArray[np.int64]
    dtype: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def dp(self) -> Array:
        return self.dp_replicate * self.dp_shard

    @property
    def num_devices(self) -> Array:
        return self.pp * self.dp * self.cp * self.tp

    @classmethod
    def of(cls, cases: Sequence[Case]) -> Cases:
        """The arrays of a list of cases; raises `UsageError` for an empty one."""
        if not cases:
            raise UsageError("there is nothing to plan: give at least one case")
        columns: dict[str, object] = {}
        for name in (f.name for f in fields(cls)):
            if name == "dtype":
                columns[name] = tuple(case.dtype for case in cases)
            elif name in ("recompute", "schedule", "synchronisation"):
                known: tuple[str, ...] = {"recompute": RECOMPUTES, "schedule": SCHEDULES}.get(name, SYNCHRONISATIONS)
                columns[name] = np.array([known.index(getattr(case, name)) for case in cases])
            else:
                owner = "case" if name in _NUMBERS else "dims" if hasattr(ParallelDims(), name) else "shape"
                columns[name] = np.array(
                    [float(getattr(case if owner == "case" else getattr(case, owner), name)) for case in cases]
                )
        return cls(**columns)  # type: ignore[arg-type]

    def take(self, index: NDArray[np.int64] | NDArray[np.bool_]) -> Cases:
        """The cases at `index` (positions or a mask)."""
        positions = np.flatnonzero(index) if index.dtype == bool else index
        columns: dict[str, object] = {
            f.name: getattr(self, f.name)[positions] for f in fields(self) if f.name != "dtype"
        }
        return Cases(**columns, dtype=tuple(self.dtype[i] for i in positions))  # type: ignore[arg-type]


@dataclass(frozen=True)
class StepTimes:
    """Predicted seconds of one step, an array entry a case; the parts are those of `StepBreakdown` and sum to it."""

    data: Array
    compute: Array
    exposed_communication: Array
    bubble: Array
    optimizer: Array
    other: Array

    @property
    def total(self) -> Array:
        return self.data + self.compute + self.exposed_communication + self.bubble + self.optimizer + self.other
