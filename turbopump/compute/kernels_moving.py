"""The operations that count no FLOPs, by PyTorch's defaults: lookups, norms, element-wise, losses, updates, memory.

Inputs of each, in this order (a backward appends the gradient of the output):
- Embedding: indices [rows], table [vocab, dim]
- Norm: x [rows, dim], gain (layer: and bias) [dim]; batch: x [N, dim, rows / N], gain, bias, both in fp32
- Elementwise: `reads` tensors, shaped as the name wants them; names without an entry in `_NAMED` are a plain chain
  of additions that reads and writes as many values
- CrossEntropy: logits [rows, vocab], classes [rows]
- Ctc: log-probabilities [frames, batch, classes], labels [batch, labels], lengths of both
- OptimizerStep: parameters, gradients, states, count of steps; changed in place, as in training
- MemoryCopy: source, target; MemoryTriad: a, b, c; Gather: table, indices, target
- Launch: two tensors of one or two elements
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from turbopump.compute.operands import DTYPES, Kernel, Tensors, Values
from turbopump.compute.ops import (
    CrossEntropy,
    Ctc,
    Elementwise,
    Embedding,
    Gather,
    Launch,
    MemoryCopy,
    MemoryTriad,
    Norm,
    OptimizerStep,
)
from turbopump.core.workload import DTYPE_BYTES, Op

EPS = 1e-5
CLIP = 20.0  # of Deep Speech's rectifier
LR, DECAY, BETAS, MOMENTUM = 1e-3, 0.1, (0.9, 0.95), 0.9
aten = torch.ops.aten


def _embedding_inputs(op: Embedding, values: Values) -> Tensors:
    table = values.normal(op.vocab, op.dim, dtype=op.dtype)
    grads = (values.normal(op.rows, op.dim, dtype=op.dtype),) if op.backward else ()
    return (values.tokens(op.rows, op.vocab), table, *grads)


def _norm_inputs(op: Norm, values: Values) -> Tensors:
    shape: tuple[int, ...] = (op.rows, op.dim)
    if op.kind == "batch":
        samples = _divisor(op.rows, 32)
        shape = (samples, op.dim, op.rows // samples)
    x = values.normal(*shape, dtype=op.dtype)
    gains = "fp32" if op.kind == "batch" and op.dtype != "fp64" else op.dtype  # autocast keeps those of a batch norm
    affine = [values.positive(op.dim, dtype=gains)]
    if op.kind != "rms":
        affine.append(values.normal(op.dim, dtype=gains))
    return (x, *affine, *((values.normal(*shape, dtype=op.dtype),) if op.backward else ()))


def _norm(op: Norm) -> Callable[..., Tensor]:
    if op.kind == "rms":
        return lambda x, gain: F.rms_norm(x, (op.dim,), gain, EPS)
    if op.kind == "layer":
        return lambda x, gain, bias: F.layer_norm(x, (op.dim,), gain, bias, EPS)
    return lambda x, gain, bias: F.batch_norm(x, None, None, gain, bias, training=True, eps=EPS)


def _divisor(count: int, most: int) -> int:
    """The largest power of two up to `most` that divides `count`."""
    return max(d for d in (2**i for i in range(most.bit_length())) if d <= most and count % d == 0)


def _rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Neighbouring pairs turned in fp32, as rotary positions are (one complex product)."""
    wide = x if x.dtype == torch.float64 else x.float()
    return torch.view_as_real(torch.view_as_complex(wide.unflatten(-1, (-1, 2))) * turns).flatten(-2).to(x.dtype)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor, act: Tensor) -> Tensors:
    """`act` is silu(gate), which autograd keeps."""
    return aten.silu_backward(grad * up, gate), grad * act


_NAMED: dict[tuple[str, int, int], Callable[..., Any]] = {
    ("rotate", 1, 1): _rotate,
    ("swiglu", 2, 1): lambda gate, up: F.silu(gate) * up,
    ("swiglu", 3, 2): _swiglu_backward,
    ("residual", 2, 1): torch.add,
    ("relu", 1, 1): torch.relu,
    ("relu", 2, 1): lambda grad, y: aten.threshold_backward(grad, y, 0.0),
    ("gelu", 1, 1): F.gelu,
    ("gelu", 2, 1): aten.gelu_backward,
    ("clip", 1, 1): lambda x: x.clamp(0.0, CLIP),
    ("clip", 2, 1): lambda grad, x: aten.hardtanh_backward(grad, x, 0.0, CLIP),
    ("max_pool", 1, 1): lambda x: F.max_pool2d(x, 3, 2, 1),
    ("average", 1, 0): lambda x: x.mean(-1),
    ("average", 0, 1): lambda grad, shape: grad.expand_as(shape) / shape.shape[-1],
}
"""By name, values read and values written: forward and backward share a name. The pooling's backward, which reads and
writes as much as its forward, is measured as the forward."""


def _elementwise_inputs(op: Elementwise, values: Values) -> Tensors:
    if (op.name, op.reads, op.writes) not in _NAMED:
        return tuple(values.normal(op.elements, dtype=op.dtype) for _ in range(max(1, op.reads)))
    if op.name == "rotate":
        width = _divisor(op.elements, 64)
        positions = _divisor(op.elements // width, 256)
        angles = values.normal(positions, max(1, width // 2), dtype="fp32")
        x = values.normal(op.elements // width // positions, positions, width, dtype=op.dtype)
        return x, torch.polar(torch.ones_like(angles), angles)
    if op.name == "max_pool":
        side = next((s for s in (112, 56, 32, 28, 16, 14, 8, 4, 2) if op.elements % (s * s) == 0), 1)
        return (values.normal(1, op.elements // side**2, side, side, dtype=op.dtype),)
    if op.name == "average":
        places = next(s for s in (64, 49, 16, 4, 1) if op.elements % s == 0)
        if op.reads:
            return (values.normal(op.elements // places, places, dtype=op.dtype),)
        grad = values.normal(op.elements // places, 1, dtype=op.dtype)
        return grad, grad.expand(-1, places)
    if (op.name, op.reads) == ("swiglu", 3):
        grad, gate, up = (values.normal(op.elements, dtype=op.dtype) for _ in range(3))
        return grad, gate, up, F.silu(gate)
    return tuple(values.normal(op.elements, dtype=op.dtype) for _ in range(op.reads))


def _elementwise(op: Elementwise) -> Callable[..., Any]:
    if op.name == "rotate" and op.elements % 2:  # no pairs
        return _chain(op)
    return _NAMED.get((op.name, op.reads, op.writes)) or _chain(op)


def _chain(op: Elementwise) -> Callable[..., Any]:
    """Reads all inputs and writes as many outputs, one PyTorch operation after the other."""

    def run(first: Tensor, *rest: Tensor) -> Tensor | Tensors:
        if not op.writes:
            return sum((x.sum() for x in rest), first.sum())
        if not op.reads:
            return tuple(torch.full_like(first, 0.5) for _ in range(op.writes))
        total = first * 0.5 if not rest else first
        for x in rest:
            total = total + x
        return (total, *(total * 0.5**i for i in range(1, op.writes)))

    return run


def _cross_entropy_inputs(op: CrossEntropy, values: Values) -> Tensors:
    logits = values.normal(op.rows, op.vocab, dtype=op.dtype)
    grad = (torch.ones((), dtype=DTYPES[op.dtype], device=values.device),) if op.backward else ()
    return (logits, values.tokens(op.rows, op.vocab), *grad)


def _ctc_inputs(op: Ctc, values: Values) -> Tensors:
    scores = values.normal(op.frames, op.batch, op.classes, dtype="fp32").log_softmax(-1)
    kinds = op.classes - 1  # 0 is the blank
    steps = values.indices(op.batch * op.labels, max(1, kinds - 1)).view(op.batch, op.labels) + 1
    labels = steps.cumsum(1) % max(1, kinds) + 1  # never the same twice in a row, so that `labels` frames suffice
    lengths = (torch.full((op.batch,), n, dtype=torch.int64) for n in (op.frames, op.labels))
    return (scores, labels, *lengths, *((torch.ones((), device=values.device),) if op.backward else ()))


def _ctc(op: Ctc) -> Callable[..., Tensor]:
    return lambda scores, labels, frames, lengths: F.ctc_loss(scores, labels, frames, lengths, reduction="sum")


def _optimizer_inputs(op: OptimizerStep, values: Values) -> Tensors:
    params = values.normal(op.params, dtype="fp32", scale=0.02)
    grads = values.normal(op.params, dtype="fp32", scale=1e-3)
    if op.kind == "sgd":
        return params, grads
    average = values.normal(op.params, dtype="fp32", scale=1e-4)
    if op.kind == "momentum":
        return params, grads, average
    squares = values.positive(op.params, dtype="fp32") * 1e-6
    return params, grads, average, squares, torch.ones((), device=values.device)


def optimizer_step(op: OptimizerStep, *, fused: bool, foreach: bool) -> Callable[..., Tensors]:
    """`torch.optim`'s own functions, over one tensor; returns what it changed."""

    def momentum(params: Tensor, grads: Tensor, *states: Tensor) -> Tensors:
        sgd([params], [grads], list(states) or [None], weight_decay=0.0, momentum=MOMENTUM if states else 0.0, lr=LR,
            dampening=0.0, nesterov=False, maximize=False, fused=fused, foreach=foreach)  # fmt: skip
        return params, *states

    def adam(params: Tensor, grads: Tensor, average: Tensor, squares: Tensor, count: Tensor) -> Tensors:
        adamw([params], [grads], [average], [squares], [], [count], foreach=foreach, fused=fused, amsgrad=False,
              beta1=BETAS[0], beta2=BETAS[1], lr=LR, weight_decay=DECAY, eps=1e-8, maximize=False)  # fmt: skip
        return params, average, squares

    return adam if op.kind == "adamw" else momentum


def _copy_inputs(op: MemoryCopy, values: Values) -> Tensors:
    count = max(1, op.bytes // DTYPE_BYTES["fp32"])
    return values.normal(count, dtype="fp32"), values.normal(count, dtype="fp32")


def _triad_inputs(op: MemoryTriad, values: Values) -> Tensors:
    count = max(1, op.bytes // DTYPE_BYTES["fp32"])
    return tuple(values.normal(count, dtype="fp32") for _ in range(3))


def _gather_inputs(op: Gather, values: Values) -> Tensors:
    width = max(1, op.row_bytes // DTYPE_BYTES["fp32"])
    table = values.normal(op.table_rows, width, dtype="fp32")
    return table, values.indices(op.rows, op.table_rows), table.new_empty(op.rows, width)


def _launch_inputs(op: Launch, values: Values) -> Tensors:
    shape = {"add": (1,), "linear": (1, 1), "autograd": (2,)}[op.name]
    x, y = (values.normal(*shape, dtype="fp32") for _ in range(2))
    return x.requires_grad_(op.name == "autograd"), y


def _launch(op: Launch) -> Callable[..., Any]:
    def step(x: Tensor, y: Tensor) -> Tensors:
        return torch.autograd.grad(x * y, x, y)

    functions: dict[str, Callable[..., Any]] = {"add": torch.add, "linear": F.linear, "autograd": step}
    return functions[op.name]


def is_chain(op: Op) -> bool:
    """Whether an element-wise operation's name says nothing here, so that a plain chain stands for it."""
    return isinstance(op, Elementwise) and _elementwise(op) not in _NAMED.values()


KERNELS: dict[type[Op], Kernel] = {
    Embedding: Kernel(_embedding_inputs, lambda op: F.embedding, lambda op: (1,)),
    Norm: Kernel(_norm_inputs, _norm, lambda op: (0, 1) if op.kind == "rms" else (0, 1, 2)),
    Elementwise: Kernel(_elementwise_inputs, _elementwise),
    CrossEntropy: Kernel(_cross_entropy_inputs, lambda op: F.cross_entropy, lambda op: (0,)),
    Ctc: Kernel(_ctc_inputs, _ctc, lambda op: (0,)),
    OptimizerStep: Kernel(_optimizer_inputs, lambda op: optimizer_step(op, fused=True, foreach=False)),
    MemoryCopy: Kernel(_copy_inputs, lambda op: lambda source, target: target.copy_(source)),
    MemoryTriad: Kernel(_triad_inputs, lambda op: lambda a, b, c: torch.add(b, c, alpha=3.0, out=a)),
    Gather: Kernel(_gather_inputs, lambda op: lambda table, rows, to: torch.index_select(table, 0, rows, out=to)),
    Launch: Kernel(_launch_inputs, _launch),
}
