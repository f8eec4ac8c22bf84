"""What a step really computes: FLOPs from the shapes of the operations that ran, by the dtype they ran in.

torch's own counter gives 0 for attention and recurrent layers on CPU, so their formulas are added here. Observed on
one microbatch, not assumed: a recipe may say bf16 while an operation runs in fp32.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_DTYPE_NAMES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8",
}  # fmt: skip


def _attention(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Two products over all pairs of positions (torch's own convention for the CUDA kernels: no credit for a mask)."""
    batch, heads, queries, width = query.shape
    return 2 * batch * heads * queries * key.shape[2] * (width + value.shape[3])


def _attention_forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return _attention(query, key, value)


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Scores again, then gradients of values, probabilities, queries and keys: five products for the forward's two."""
    return _attention(query, key, value) * 5 // 2


def _rnn_layer(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    steps = prod(x.shape[:-1])
    return 2 * steps * (w_input.numel() + w_hidden.numel())


def _rnn_layer_backward(x: Tensor, w_input: Tensor, w_hidden: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _rnn_layer(x, w_input, w_hidden)


_aten = torch.ops.aten
_MORE: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten.mkldnn_rnn_layer: _rnn_layer,
    _aten.mkldnn_rnn_layer_backward: _rnn_layer_backward,
}


class ObservedCompute(TorchDispatchMode):
    """`with ObservedCompute() as seen: ...` counts the FLOPs that run inside, by dtype, in `seen.flops`."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.flops.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in _MORE:
            self._count(_MORE[packet](*args, **(kwargs or {})), args)
        elif packet in flop_registry:
            self._count(flop_registry[packet](*args, **(kwargs or {}), out_val=out), args)
        return out

    def _count(self, flops: int, args: tuple[Any, ...]) -> None:
        # addmm's first argument is the bias; the product's own operands are the last tensors in every signature
        dtypes = [a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()]
        dtype = dtypes[min(1, len(dtypes) - 1)] if dtypes else torch.float32
        self.flops[_DTYPE_NAMES.get(dtype, str(dtype).removeprefix("torch."))] += int(flops)
