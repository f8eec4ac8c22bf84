"""A foreign module as a `workload.json`: traced once, on fake tensors, so that it may be larger than this machine.

    trace_workload(model, batch, "workload.json", loss=lambda model, batch: model(batch).mean(), name="mine")

Forward and backward run without numbers: every operation that would be computed is written down as one of
turbopump.compute.ops, what autograd would keep is counted. What has no descriptor of its own counts the memory it reads
and writes. `turbopump plan workload.json` then needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from math import prod
from pathlib import Path
from typing import Any

from turbopump.compute.ops import (
    Attention,
    BatchedGemm,
    Conv2d,
    CrossEntropy,
    Elementwise,
    Embedding,
    Gemm,
    Norm,
    OptimizerStep,
    Rnn,
)
from turbopump.core.errors import MissingDependencyError, UsageError
from turbopump.core.workload import Block, Op, Workload
from turbopump.planner.workload_file import save

try:
    import torch
except ModuleNotFoundError as error:
    raise MissingDependencyError("torch", "train", "tracing a module") from error
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_DTYPES = {
    torch.float64: "fp64", torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "int8",
    torch.uint8: "int8", torch.bool: "int8", torch.int64: "int64", torch.int32: "fp32",
}  # fmt: skip
COMPUTE = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def trace_workload(
    module: nn.Module,
    batch: Any,
    path: Path | str | None = None,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    name: str = "",
    unit: str = "sample",
    units: int = 0,
    dtype: str = "fp32",
) -> Workload:
    """The operations of one training step of `module` on `batch` (a microbatch; its numbers do not matter).

    `loss(module, batch)` gives the scalar to differentiate (default: the mean of the output). `units` are what the run
    counts in this batch (default its samples, the first size of its first tensor), `dtype` that of autocast (fp32:
    none). Writes `path` where it is given. Raises `UsageError` for a batch without tensors, an unknown dtype or a loss
    that depends on no parameter.
    """
    if dtype not in COMPUTE:
        raise UsageError(f"dtype: {dtype!r} given; one of {', '.join(COMPUTE)} is needed")
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not tensors or not tensors[0].dim():
        raise UsageError("the batch holds no tensor with samples along its first axis: give one as the module takes it")
    samples = tensors[0].shape[0]
    seen, kept_bytes, params = _step(module, batch, loss, COMPUTE[dtype])
    workload = Workload(
        name or type(module).__name__.lower(), tuple(_blocks(seen, kept_bytes, params)), samples, units or samples,
        unit, dtype, optimizer_ops=(OptimizerStep("adamw", params),),
    )  # fmt: skip
    if path is not None:
        save(workload, path)
    return workload


def _step(
    module: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor] | None, compute: torch.dtype | None
) -> tuple[_Recorder, int, int]:
    """The operations of forward and backward, bytes kept in between, trained parameters."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    recorder = _Recorder()
    with mode, _fake_parameters(module, mode) as parameters:
        inputs = tree_map_only(Tensor, lambda tensor: tensor if tensor.is_meta else mode.from_tensor(tensor), batch)
        kept = _Kept(parameters)
        with recorder, torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            with torch.autocast("cpu", compute) if compute is not None else nullcontext():
                result = _result(module, inputs, loss)
            recorder.backward = True
            if not result.requires_grad:
                raise UsageError("the loss depends on no parameter that requires gradients: give another loss")
            result.backward()
    return recorder, kept.bytes, sum(p.numel() for p in parameters if p.requires_grad)


def _result(module: nn.Module, inputs: Any, loss: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    try:
        return loss(module, inputs) if loss is not None else _mean(module(inputs))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UsageError(
            f"the module or its loss asks for the numbers of a tensor ({error}), and a trace has none: give a module "
            f"whose operations depend on sizes alone"
        ) from error


def _mean(output: Any) -> Tensor:
    found = [leaf.float().mean() for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    return torch.stack(found).sum() if found else torch.zeros(())


@contextmanager
def _fake_parameters(module: nn.Module, mode: FakeTensorMode) -> Iterator[list[nn.Parameter]]:
    """The module with parameters and buffers without numbers; its own are put back however it ends."""
    stored: list[tuple[dict[str, Any], str, Any]] = []
    made: dict[int, Any] = {}
    for part in module.modules():
        for owner in (part._parameters, part._buffers):
            for key, tensor in owner.items():
                if tensor is not None:
                    stored.append((owner, key, tensor))
    try:
        for owner, key, tensor in stored:
            if id(tensor) not in made:
                fake = mode.from_tensor(tensor.detach())
                parameter = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if parameter else fake
            owner[key] = made[id(tensor)]
        yield [tensor for tensor in made.values() if isinstance(tensor, nn.Parameter)]
    finally:
        for owner, key, tensor in stored:
            owner[key] = tensor


class _Kept:
    """Counts the storages that autograd keeps, parameters aside; each once."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self._seen = {p.untyped_storage()._cdata for p in parameters}
        self._held: list[Any] = []  # or an address could be given out again
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._held.append(storage)
            self.bytes += storage.nbytes()
        return tensor


class _Recorder(TorchDispatchMode):
    """Writes down every operation, of forward until `backward` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.backward = False
        self.ops: dict[bool, Counter[Op]] = {False: Counter(), True: Counter()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        names = [argument.name for argument in func._schema.arguments]
        given = {**dict(zip(names, args)), **(kwargs or {})}
        made = _DESCRIBE.get(func._schema.name.removeprefix("aten::"), _moved)
        for op in made(func, given, out):
            self.ops[self.backward][op] += 1
        return out


def _blocks(recorder: _Recorder, kept_bytes: int, params: int) -> Iterator[Block]:
    """Operations that occur as often in one block, so that a file has each once."""
    counts = sorted({1, *recorder.ops[False].values(), *recorder.ops[True].values()})
    for count in counts:
        forward, backward = (
            tuple(op for op, n in recorder.ops[phase].items() if n == count) for phase in (False, True)
        )
        first = count == 1
        yield Block("once" if first else f"times {count}", forward, backward, params if first else 0,
                    {"none": kept_bytes if first else 0}, count)  # fmt: skip


# ---- descriptors of torch's operations; each takes (func, arguments by name, result)


def _dtype(tensor: Tensor) -> str:
    return _DTYPES.get(tensor.dtype, "fp32")


def _layout(tensor: Tensor) -> str:
    return "t" if tensor.stride(-2) == 1 and tensor.stride(-1) != 1 else "n"


def _product(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    a, b = (given["mat1"], given["mat2"]) if "mat1" in given else (given["self"], given["mat2"])
    yield Gemm(a.shape[0], b.shape[1], a.shape[1], _dtype(a), _layout(a) + _layout(b))  # type: ignore[arg-type]


def _products(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    a, b = (given["batch1"], given["batch2"]) if "batch1" in given else (given["self"], given["mat2"])
    yield BatchedGemm(a.shape[0], a.shape[1], b.shape[2], a.shape[2], _dtype(a))


def _attention(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    query, key = given["query"], given["key"]
    backward = "backward" in func._schema.name
    batch, heads, length, width = query.shape
    yield Attention(batch, heads, key.shape[1], length, key.shape[2], width, bool(given.get("is_causal")),
                    _dtype(query), backward)  # fmt: skip


def _convolution(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    if "output_mask" in given:
        directions = [
            name for name, wanted in zip(("input_gradient", "weight_gradient"), given["output_mask"]) if wanted
        ]
        x, y = given["input"], given["grad_output"]
    else:
        directions, x, y = ["forward"], given["input"], out
    weight = given["weight"]
    if weight.dim() > 4:
        taps = prod(weight.shape[1:])
        for _ in directions:
            yield Gemm(y.shape[0] * prod(y.shape[2:]), y.shape[1], taps, _dtype(weight))
        return
    if given["transposed"]:  # it computes what the gradient of a convolution's input is, and the other way round
        x, y = y, x
        swapped = {"forward": "input_gradient", "input_gradient": "forward", "weight_gradient": "weight_gradient"}
        directions = [swapped[name] for name in directions]
    (height, width), (stride_h, stride_w) = _two(x.shape[2:]), _two(given["stride"])
    kernel = _two(weight.shape[2:])
    # a dilated kernel covers more, which is less padding to the sizes of the result
    pad_h, pad_w = [max(0, p - (d - 1) * (k - 1) // 2) for p, d, k in
           zip(_two(given["padding"], 0), _two(given["dilation"]), kernel)]  # fmt: skip
    for direction in directions:
        yield Conv2d(x.shape[0], x.shape[1], height, width, y.shape[1], kernel[0], kernel[1], stride_h, stride_w, pad_h,
                     pad_w, _dtype(weight), given["groups"], direction)  # type: ignore[arg-type]  # fmt: skip


def _two(sizes: Any, missing: int = 1) -> tuple[int, int]:
    """Of a plane; a row is a plane of height 1."""
    *height, width = (int(size) for size in sizes)
    return (height[0] if height else missing), width


def _norm(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    name, x = func._schema.name, given["input"]
    backward = "backward" in name
    if "batch_norm" in name:
        yield Norm("batch", x.numel() // x.shape[1], x.shape[1], _dtype(x), backward)
    elif "group_norm" in name:
        rows = x.shape[0] * given["group"]
        yield Norm("layer", rows, x.numel() // rows, _dtype(x), backward)
    else:
        dim = prod(given["normalized_shape"])
        yield Norm("rms" if "rms" in name else "layer", x.numel() // dim, dim, _dtype(x), backward)


def _embedding(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    if "grad_output" in given:
        grad = given["grad_output"]
        yield Embedding(given["indices"].numel(), int(given["num_weights"]), grad.shape[-1], _dtype(grad), True)
    else:
        weight = given["weight"]
        yield Embedding(given["indices"].numel(), weight.shape[0], weight.shape[1], _dtype(weight))


def _cross_entropy(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    vocab = out.shape[given["dim"]]
    yield CrossEntropy(out.numel() // vocab, vocab, _dtype(out), "backward" in func._schema.name)


def _lstm(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    x, hidden = given["input"], int(given["hidden_size"])
    steps, batch = x.shape[:2]
    yield Rnn("lstm", batch, steps, x.shape[2], hidden, False, _dtype(x), "backward" in func._schema.name)


def _moved(func: Any, given: dict[str, Any], out: Any) -> Iterator[Op]:
    """Anything else: what it reads and writes. Views and what only makes room move nothing."""
    name = func._schema.name.removeprefix("aten::")
    results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    if (
        func.is_view
        or not results
        or name.startswith(("empty", "new_empty", "detach", "alias", "_unsafe_view", "lift"))
    ):
        return
    inputs = [leaf for leaf in tree_leaves(list(given.values())) if isinstance(leaf, Tensor)]
    sizes = [tensor.numel() for tensor in (*inputs, *results)]
    if elements := max(sizes):
        reads = sum(tensor.numel() for tensor in inputs) / elements
        writes = sum(tensor.numel() for tensor in results) / elements
        yield Elementwise(name, elements, round(reads), round(writes), _dtype(results[0]))


_DESCRIBE: dict[str, Callable[..., Iterator[Op]]] = {
    "mm": _product, "addmm": _product, "bmm": _products, "baddbmm": _products,
    "convolution": _convolution, "convolution_backward": _convolution,
    **dict.fromkeys(("embedding", "embedding_dense_backward"), _embedding),
    **dict.fromkeys(("_log_softmax", "_log_softmax_backward_data"), _cross_entropy),
    **dict.fromkeys(("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"), _lstm),
    **{f"{norm}{end}": _norm for end in ("", "_backward") for norm in (
        "native_layer_norm", "native_batch_norm", "_native_batch_norm_legit", "native_group_norm", "_fused_rms_norm")},
    **{f"_scaled_dot_product_{kind}{end}": _attention for end in ("", "_backward") for kind in (
        "flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")},
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention,
}  # fmt: skip
