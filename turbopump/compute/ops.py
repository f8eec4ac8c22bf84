"""What a dense operation is: descriptors with their floating-point operations and least bytes moved.

Conventions, used by every workload:
- `flops` counts matrix products and convolutions (a multiply-add is two), as "model FLOPs" are counted in the field,
  and transforms by their own field's `5 N log2 N`, which is no exact count but the unit all FFT rates are stated in.
  Everything else (norms, activations, lookups, losses, updates, copies) moves bytes and counts 0 FLOPs.
- Causal attention counts the pairs that must be computed, `T * (T + 1) / 2`, forward two products, backward four; a
  kernel that computes masked pairs, or scores again in backward, does more than is counted. So a rate made of these
  FLOPs never exceeds the hardware's (PaLM's 12*L*H*Q*T counts the whole square: twice as much).
- A convolution counts every tap of the kernel at every output position, those on the padding included.
- `bytes` reads each input once and writes each output once; parameters count in the operation's own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from math import log2
from typing import Any, Literal, get_args, get_origin, get_type_hints

from turbopump.core.errors import ProfileError
from turbopump.core.workload import DTYPE_BYTES, Op, OpCost

INDEX_BYTES = 8  # torch looks tables up with int64

RNN_GATES = {"vanilla": 1, "gru": 3, "lstm": 4}


Layout = Literal["nn", "nt", "tn", "tt"]


@dataclass(frozen=True)
class Gemm(Op):
    """`C[m, n] = A[m, k] @ B[k, n]`; `layout` says of A, then of B, whether it lies transposed in memory.

    `nt`, the default, is a linear layer: activations as they are, the weight stored `[n, k]`.
    """

    m: int
    n: int
    k: int
    dtype: str
    layout: Layout = "nt"

    @property
    def cost(self) -> OpCost:
        return BatchedGemm(1, self.m, self.n, self.k, self.dtype).cost

    @property
    def gradients(self) -> tuple[Gemm, Gemm]:
        """The two products of backward of a linear layer: gradient of its input `[m, k]`, of its weight `[n, k]`."""
        return (
            Gemm(self.m, self.k, self.n, self.dtype, "nn"),
            Gemm(self.n, self.k, self.m, self.dtype, "tn"),
        )


@dataclass(frozen=True)
class BatchedGemm(Op):
    """`batch` independent products `[m, k] @ [k, n]`."""

    batch: int
    m: int
    n: int
    k: int
    dtype: str

    @property
    def cost(self) -> OpCost:
        m, n, k = self.m, self.n, self.k
        return OpCost(2.0 * m * n * k, DTYPE_BYTES[self.dtype] * float(m * k + k * n + m * n)) * self.batch


@dataclass(frozen=True)
class Attention(Op):
    """`softmax(Q K^T) V` over `heads` query heads that share `kv_heads` key heads; causal ends flush right."""

    batch: int
    heads: int
    kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    causal: bool
    dtype: str
    backward: bool = False

    @property
    def pairs(self) -> int:
        """Query-key pairs of one head that must be computed."""
        masked = self.q_len * (self.q_len - 1) // 2 if self.causal else 0
        return self.q_len * self.kv_len - masked

    @property
    def cost(self) -> OpCost:
        products = 4 if self.backward else 2
        flops = 2.0 * products * self.batch * self.heads * self.pairs * self.head_dim
        queries = self.batch * self.heads * self.q_len * self.head_dim
        keys = self.batch * self.kv_heads * self.kv_len * self.head_dim
        # forward: Q, K, V read, O written; backward: Q, K, V, O, dO read, dQ, dK, dV written
        elements = 4 * queries + 4 * keys if self.backward else 2 * queries + 2 * keys
        return OpCost(flops, float(elements * DTYPE_BYTES[self.dtype]))


@dataclass(frozen=True)
class Conv2d(Op):
    """A 2-D convolution over `[batch, in_channels, height, width]`, or one of its two gradients."""

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int
    stride_w: int
    pad_h: int
    pad_w: int
    dtype: str
    groups: int = 1
    direction: Literal["forward", "input_gradient", "weight_gradient"] = "forward"

    @property
    def out_height(self) -> int:
        return (self.height + 2 * self.pad_h - self.kernel_h) // self.stride_h + 1

    @property
    def out_width(self) -> int:
        return (self.width + 2 * self.pad_w - self.kernel_w) // self.stride_w + 1

    @property
    def out_elements(self) -> int:
        return self.batch * self.out_channels * self.out_height * self.out_width

    @property
    def weights(self) -> int:
        return self.out_channels * self.in_channels // self.groups * self.kernel_h * self.kernel_w

    @property
    def cost(self) -> OpCost:
        taps = self.in_channels // self.groups * self.kernel_h * self.kernel_w
        in_elements = self.batch * self.in_channels * self.height * self.width
        elements = in_elements + self.weights + self.out_elements
        return OpCost(2.0 * self.out_elements * taps, float(elements * DTYPE_BYTES[self.dtype]))


@dataclass(frozen=True)
class Conv1d(Op):
    """A 1-D convolution over `[batch, in_channels, length]`, or one of its two gradients."""

    batch: int
    in_channels: int
    length: int
    out_channels: int
    kernel: int
    stride: int
    pad: int
    dtype: str
    groups: int = 1
    direction: Literal["forward", "input_gradient", "weight_gradient"] = "forward"

    @property
    def as_2d(self) -> Conv2d:
        """The same arithmetic as a convolution of height 1."""
        return Conv2d(self.batch, self.in_channels, 1, self.length, self.out_channels, 1, self.kernel, 1, self.stride,
                      0, self.pad, self.dtype, self.groups, self.direction)  # fmt: skip

    @property
    def out_length(self) -> int:
        return self.as_2d.out_width

    @property
    def cost(self) -> OpCost:
        return self.as_2d.cost


@dataclass(frozen=True)
class Fft(Op):
    """`batch` forward Fourier transforms of `length ** dims` points each; `dtype` is that of a real number.

    FLOPs by the convention of FFTW's benchmark (Frigo and Johnson 2005): `5 N log2 N`, half of it for real input,
    whose output is the non-redundant half of the spectrum (`length / 2 + 1` points of the last dim).
    """

    batch: int
    length: int
    kind: Literal["real", "complex"]
    dtype: str
    dims: int = 1

    @property
    def points(self) -> int:
        return int(self.length**self.dims)

    @property
    def cost(self) -> OpCost:
        flops = (2.5 if self.kind == "real" else 5.0) * self.batch * self.points * log2(self.points)
        half = self.points // self.length * (self.length // 2 + 1)
        elements = self.points + 2 * half if self.kind == "real" else 4 * self.points
        return OpCost(flops, float(self.batch * elements * DTYPE_BYTES[self.dtype]))


@dataclass(frozen=True)
class Rnn(Op):
    """One recurrent layer over `steps` steps; backward includes the gradients of input and weights."""

    kind: Literal["vanilla", "gru", "lstm"]
    batch: int
    steps: int
    input_size: int
    hidden_size: int
    bidirectional: bool
    dtype: str
    backward: bool = False

    @property
    def directions(self) -> int:
        return 2 if self.bidirectional else 1

    @property
    def cost(self) -> OpCost:
        rows, width = self.batch * self.steps, RNN_GATES[self.kind] * self.hidden_size
        weights = width * (self.input_size + self.hidden_size)
        forward = 2.0 * rows * weights * self.directions
        # forward: input and weights read, output written; backward: the same and their gradients
        states = rows * (self.input_size + self.directions * self.hidden_size) + self.directions * weights
        times = 2 if self.backward else 1
        return OpCost(forward * times, float(times * states * DTYPE_BYTES[self.dtype]))


@dataclass(frozen=True)
class Embedding(Op):
    """Lookup of `rows` rows of a `[vocab, dim]` table; backward writes a dense gradient of the table."""

    rows: int
    vocab: int
    dim: int
    dtype: str
    backward: bool = False

    @property
    def cost(self) -> OpCost:
        written = self.vocab * self.dim if self.backward else self.rows * self.dim
        elements = self.rows * self.dim + written
        return OpCost(0.0, float(elements * DTYPE_BYTES[self.dtype] + self.rows * INDEX_BYTES))


@dataclass(frozen=True)
class Norm(Op):
    """A normalisation of `rows` vectors of `dim` (layer, RMS) or of `dim` channels over `rows` positions (batch)."""

    kind: Literal["rms", "layer", "batch"]
    rows: int
    dim: int
    dtype: str
    backward: bool = False

    @property
    def cost(self) -> OpCost:
        elements = self.rows * self.dim * (3 if self.backward else 2)
        return OpCost(0.0, float(elements * DTYPE_BYTES[self.dtype]))


@dataclass(frozen=True)
class Elementwise(Op):
    """`name` over `elements` positions, each reading `reads` and writing `writes` values."""

    name: str
    elements: int
    reads: int
    writes: int
    dtype: str

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, float(self.elements * (self.reads + self.writes) * DTYPE_BYTES[self.dtype]))


@dataclass(frozen=True)
class CrossEntropy(Op):
    """Softmax cross-entropy of `[rows, vocab]` logits against class indices; backward writes their gradient."""

    rows: int
    vocab: int
    dtype: str
    backward: bool = False

    @property
    def cost(self) -> OpCost:
        elements = self.rows * self.vocab * (2 if self.backward else 1)
        return OpCost(0.0, float(elements * DTYPE_BYTES[self.dtype] + self.rows * INDEX_BYTES))


@dataclass(frozen=True)
class Ctc(Op):
    """Connectionist temporal classification (Graves 2006) of `[frames, batch, classes]` log-probabilities.

    The forward and backward recursions each write `[batch, frames, 2 * labels + 1]`; always in fp32.
    """

    batch: int
    frames: int
    labels: int
    classes: int
    backward: bool = False

    @property
    def cost(self) -> OpCost:
        lattice = self.batch * self.frames * (2 * self.labels + 1)
        scores = self.batch * self.frames * self.classes
        elements = 2 * lattice + 2 * scores if self.backward else lattice + scores
        return OpCost(0.0, float(elements * DTYPE_BYTES["fp32"]))


@dataclass(frozen=True)
class OptimizerStep(Op):
    """Update of `params` fp32 parameters: gradient and states read, parameters and states written."""

    kind: Literal["sgd", "momentum", "adamw"]
    params: int

    @property
    def cost(self) -> OpCost:
        states = {"sgd": 0, "momentum": 1, "adamw": 2}[self.kind]
        return OpCost(0.0, float(self.params * (3 + 2 * states) * DTYPE_BYTES["fp32"]))


@dataclass(frozen=True)
class MemoryCopy(Op):
    """Copy of `bytes` bytes of consecutive memory: as many read as written."""

    bytes: int

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, 2.0 * self.bytes)


@dataclass(frozen=True)
class MemoryTriad(Op):
    """`a = b + s * c` over fp32 arrays of `bytes` bytes each (McCalpin's STREAM triad): two read, one written."""

    bytes: int

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, 3.0 * self.bytes)


@dataclass(frozen=True)
class Gather(Op):
    """`rows` rows of `row_bytes` bytes at random places of a table of `table_rows` rows, copied side by side."""

    rows: int
    table_rows: int
    row_bytes: int

    @property
    def cost(self) -> OpCost:
        return OpCost(0.0, float(self.rows * (2 * self.row_bytes + INDEX_BYTES)))


@dataclass(frozen=True)
class Launch(Op):
    """What the host spends on a tiny operation: an `add` of one element, a `linear` layer of one weight, or an
    `autograd` step (forward and backward of one product of two elements). Costs nothing but time."""

    name: Literal["add", "linear", "autograd"]

    @property
    def cost(self) -> OpCost:
        return OpCost()


OPS: dict[str, type[Op]] = {
    op.__name__: op
    for op in (
        Gemm, BatchedGemm, Attention, Conv1d, Conv2d, Fft, Rnn, Embedding, Norm, Elementwise, CrossEntropy, Ctc,
        OptimizerStep, MemoryCopy, MemoryTriad, Gather, Launch,
    )
}  # fmt: skip
"""The operations of this domain by name."""


def from_fields(kind: str, values: Mapping[str, Any]) -> Op:
    """The operation that a row describes by its `kind` and `op`; raises `ProfileError` where there is no such one."""
    if kind not in OPS:
        raise ProfileError(f"no operation is called {kind!r}: the dense operations are {', '.join(OPS)}")
    known = {f.name: f for f in fields(OPS[kind])}
    absent = [name for name, f in known.items() if f.default is MISSING and name not in values]
    if absent or not values.keys() <= known.keys():
        raise ProfileError(f"{kind} has the fields {', '.join(known)}; given were {', '.join(values) or 'none'}")
    hints = get_type_hints(OPS[kind])
    for name, value in values.items():
        allowed = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
        if name == "dtype":
            allowed = tuple(DTYPE_BYTES)
        if (value not in allowed) if allowed else (type(value) is not hints[name]):
            wanted = " or ".join(map(str, allowed)) if allowed else f"of type {hints[name].__name__}"
            raise ProfileError(f"{kind}: {name} must be {wanted}, {value!r} given")
    return OPS[kind](**values)
