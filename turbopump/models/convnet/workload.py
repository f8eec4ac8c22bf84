"""The residual network's step as operations, without torch; compared with the model in tests/models/convnet.

Kept for backward: the input of each convolution and of each batch norm; a ReLU works in place and shares its output
with the next convolution. Under bf16 also the cast copies of the weights, which autocast holds until backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from turbopump.compute.ops import Conv2d, CrossEntropy, Elementwise, Gemm, Norm, OptimizerStep
from turbopump.core.workload import DTYPE_BYTES, Block, Op, Workload

if TYPE_CHECKING:
    from turbopump.models.convnet.config import ConvnetConfig

FP32, INT64 = DTYPE_BYTES["fp32"], DTYPE_BYTES["int64"]


@dataclass(frozen=True)
class _Map:
    """The activations between two layers."""

    batch: int
    channels: int
    height: int
    width: int

    @property
    def elements(self) -> int:
        return self.batch * self.channels * self.height * self.width


@dataclass
class _Tally:
    """Collects one block: its operations, parameters and kept bytes."""

    dtype: str
    forward: list[Op] = field(default_factory=list)
    backward: list[Op] = field(default_factory=list)
    params: int = 0
    kept: int = 0

    def conv_norm(self, x: _Map, channels: int, kernel: int, stride: int, *, first: bool = False) -> _Map:
        """A convolution without bias and its batch norm; keeps the norm's input. The first one's input has no
        gradient."""
        op = Conv2d(x.batch, x.channels, x.height, x.width, channels, kernel, kernel, stride, stride, kernel // 2,
                    kernel // 2, self.dtype)  # fmt: skip
        y = _Map(x.batch, channels, op.out_height, op.out_width)
        positions = y.elements // channels
        self.forward += [op, Norm("batch", positions, channels, self.dtype)]
        self.backward += [
            Norm("batch", positions, channels, self.dtype, True),
            replace(op, direction="weight_gradient"),
        ]
        if not first:
            self.backward.append(replace(op, direction="input_gradient"))
        self.params += op.weights + 2 * channels
        self.kept += y.elements * DTYPE_BYTES[self.dtype] + 2 * channels * FP32 + self.copy(op.weights)
        return y

    def relu(self, x: _Map) -> None:
        """In place; its output is kept, by itself and by the convolution that follows."""
        self.forward.append(Elementwise("relu", x.elements, 1, 1, self.dtype))
        self.backward.append(Elementwise("relu", x.elements, 2, 1, self.dtype))
        self.kept += x.elements * DTYPE_BYTES[self.dtype]

    def add(self, x: _Map) -> None:
        self.forward.append(Elementwise("residual", x.elements, 2, 1, self.dtype))
        self.backward.append(Elementwise("residual", x.elements, 2, 1, self.dtype))

    def copy(self, weights: int) -> int:
        return weights * DTYPE_BYTES[self.dtype] if self.dtype != "fp32" else 0

    def block(self, name: str, count: int = 1) -> Block:
        # no part is computed again in this model: every mode keeps the same
        modes = dict.fromkeys(("none", "selective", "full"), self.kept)
        return Block(name, tuple(self.forward), tuple(self.backward), self.params, modes, count)


def workload(config: ConvnetConfig, samples: int, shape: Mapping[str, int], dtype: str) -> Workload:
    """One microbatch of `samples` images of `shape` {"height", "width", "channels"}, convolutions in `dtype`."""
    x = _Map(samples, config.in_channels, shape["height"], shape["width"])
    stem, x = _stem(config, x, dtype)
    blocks = [stem]
    for stage, count in enumerate(config.blocks):
        channels = config.width * 2**stage
        first, x = _residual(config, x, channels, 2 if stage else 1, dtype)
        blocks.append(first.block(f"stages.{stage}.first"))
        if count > 1:
            rest, x = _residual(config, x, channels, 1, dtype)
            blocks.append(rest.block(f"stages.{stage}.rest", count - 1))
    blocks.append(_head(config, x, dtype))
    params = sum(b.params * b.count for b in blocks)
    return Workload("convnet", tuple(blocks), samples, samples, "image", dtype,
                    optimizer_ops=(OptimizerStep("adamw", params),))  # fmt: skip


def _stem(config: ConvnetConfig, x: _Map, dtype: str) -> tuple[Block, _Map]:
    tally = _Tally(dtype)
    tally.kept += x.elements * DTYPE_BYTES[dtype]
    imagenet = config.stem == "imagenet"
    y = tally.conv_norm(x, config.width, 7 if imagenet else 3, 2 if imagenet else 1, first=True)
    tally.relu(y)
    if imagenet:
        pooled = _Map(y.batch, y.channels, (y.height - 1) // 2 + 1, (y.width - 1) // 2 + 1)
        tally.forward.append(Elementwise("max_pool", y.elements, 1, 1, dtype))
        tally.backward.append(Elementwise("max_pool", y.elements, 1, 1, dtype))
        tally.kept += pooled.elements * (INT64 + DTYPE_BYTES[dtype])  # where each maximum was, and the maxima
        y = pooled
    return tally.block("stem"), y


def _residual(config: ConvnetConfig, x: _Map, channels: int, stride: int, dtype: str) -> tuple[_Tally, _Map]:
    tally, out = _Tally(dtype), channels * config.expansion
    if config.bottleneck:
        y = tally.conv_norm(x, channels, 1, 1)
        tally.relu(y)
        y = tally.conv_norm(y, channels, 3, stride)
        tally.relu(y)
        y = tally.conv_norm(y, out, 1, 1)
    else:
        y = tally.conv_norm(x, channels, 3, stride)
        tally.relu(y)
        y = tally.conv_norm(y, out, 3, 1)
    if stride != 1 or x.channels != out:
        tally.conv_norm(x, out, 1, stride)
    tally.add(y)
    tally.relu(y)
    return tally, y


def _head(config: ConvnetConfig, x: _Map, dtype: str) -> Block:
    tally, classes = _Tally(dtype), config.num_classes
    product = Gemm(x.batch, classes, x.channels, dtype)
    tally.forward += [Elementwise("average", x.elements, 1, 0, dtype), product, CrossEntropy(x.batch, classes, "fp32")]
    tally.backward += [CrossEntropy(x.batch, classes, "fp32", True), *product.gradients,
                       Elementwise("average", x.elements, 0, 1, dtype)]  # fmt: skip
    tally.params = x.channels * classes + classes
    tally.kept = x.batch * (x.channels * DTYPE_BYTES[dtype] + classes * FP32 + INT64) + tally.copy(x.channels * classes)
    return tally.block("head")
