"""The step of Deep Speech 2 as operations, without torch; compared with the model in tests/models/deepspeech2.

Every sample counts with the padded frames of `shape`: that is what is computed. Kept for backward: input of each
convolution and batch norm, input, gates and states of each recurrent layer, scores and lattice of CTC.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from turbopump.compute.ops import RNN_GATES, Conv2d, Ctc, Elementwise, Gemm, Norm, OptimizerStep, Rnn
from turbopump.core.workload import DTYPE_BYTES, Block, Op, Workload

if TYPE_CHECKING:
    from turbopump.models.deepspeech2.config import DeepSpeech2Config

FREQUENCY_STRIDE = 2  # of each convolution
FRAME_STRIDE = 2  # of the first convolution; the others keep all frames
FP32, INT64 = DTYPE_BYTES["fp32"], DTYPE_BYTES["int64"]
RNN_KEPT = {"gru": 5, "lstm": 6}  # gates, candidates and states, each of the hidden width, of a direction and frame


def workload(config: DeepSpeech2Config, samples: int, shape: Mapping[str, int], dtype: str) -> Workload:
    """One microbatch of `samples` spectrograms of `shape` {"frequencies", "frames", "labels"}, products in `dtype`."""
    convs, frames = _convolutions(config, samples, shape["frames"], dtype)
    blocks = [*convs, _recurrent("rnns.first", config, samples, frames, config.rnn_inputs, dtype)]
    if config.num_layers > 1:
        rest = _recurrent("rnns.rest", config, samples, frames, config.hidden_size, dtype)
        blocks.append(replace(rest, count=config.num_layers - 1))
    blocks.append(_head(config, samples, frames, shape["labels"], dtype))
    params = sum(b.params * b.count for b in blocks)
    return Workload("deepspeech2", tuple(blocks), samples, samples * shape["frames"], "frame", dtype,
                    optimizer_ops=(OptimizerStep("adamw", params),))  # fmt: skip


def _convolutions(config: DeepSpeech2Config, samples: int, frames: int, dtype: str) -> tuple[list[Block], int]:
    size, blocks, channels, rows = DTYPE_BYTES[dtype], [], 1, config.frequencies
    for i, (tall, wide) in enumerate(zip(config.conv_frequencies, config.conv_frames)):
        op = Conv2d(samples, channels, rows, frames, config.conv_channels, tall, wide, FREQUENCY_STRIDE,
                    1 if i else FRAME_STRIDE, tall // 2, wide // 2, dtype)  # fmt: skip
        gradients = [replace(op, direction="weight_gradient")]
        gradients += [replace(op, direction="input_gradient")] if i else []
        positions = op.out_elements // op.out_channels
        kept = (samples * channels * rows * frames + op.out_elements) * size  # inputs of the convolution and norm
        kept += op.weights * size if dtype != "fp32" else 0
        forward: tuple[Op, ...] = (op, Norm("batch", positions, op.out_channels, dtype),
                                   Elementwise("clip", op.out_elements, 1, 1, dtype))  # fmt: skip
        backward = (Elementwise("clip", op.out_elements, 2, 1, dtype),
                    Norm("batch", positions, op.out_channels, dtype, True), *gradients)  # fmt: skip
        blocks.append(Block(f"convs.{i}", forward, backward, op.weights + 2 * op.out_channels, _all_modes(kept)))
        channels, rows, frames = op.out_channels, op.out_height, op.out_width
    return blocks, frames


def _recurrent(name: str, config: DeepSpeech2Config, samples: int, frames: int, inputs: int, dtype: str) -> Block:
    size, hidden, rows = DTYPE_BYTES[dtype], config.hidden_size, samples * frames
    op = Rnn(config.rnn, samples, frames, inputs, hidden, True, dtype)
    kept = rows * inputs * size + RNN_KEPT[config.rnn] * 2 * rows * hidden * size
    kept += rows * hidden * size + rows * INT64  # input of the batch norm; order of the backward direction
    return Block(
        name=name,
        forward=(op, Norm("batch", rows, hidden, dtype)),
        backward=(Norm("batch", rows, hidden, dtype, backward=True), replace(op, backward=True)),
        params=2 * RNN_GATES[config.rnn] * hidden * (inputs + hidden + 2) + 2 * hidden,
        kept_bytes=_all_modes(kept),
    )


def _head(config: DeepSpeech2Config, samples: int, frames: int, labels: int, dtype: str) -> Block:
    size, hidden, classes, rows = DTYPE_BYTES[dtype], config.hidden_size, config.num_labels, samples * frames
    product = Gemm(rows, classes, hidden, dtype)
    kept = rows * hidden * size + rows * classes * FP32 + rows * (2 * labels + 1) * FP32
    kept += hidden * classes * size if dtype != "fp32" else 0
    return Block(
        name="head",
        forward=(product, Ctc(samples, frames, labels, classes)),
        backward=(Ctc(samples, frames, labels, classes, backward=True), *product.gradients),
        params=hidden * classes + classes,
        kept_bytes=_all_modes(kept),
    )


def _all_modes(kept: int) -> dict[str, int]:
    """No part of this model is computed again: every recompute mode keeps the same."""
    return dict.fromkeys(("none", "selective", "full"), kept)
