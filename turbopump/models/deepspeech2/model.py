"""Deep Speech 2 in PyTorch: `build`, `loss`, `weight`, `metrics`.

A batch is a dict: `features_BFT` (float32, padded), `lengths_B` (frames), `labels_BL` (ids >= 1, padded; 0 is CTC's
blank), `label_lengths_B`. Padding changes no result: what lies beyond a length is set to zero before each convolution,
left out of the batch norms' statistics, and the backward direction starts at the true end. CTC is computed in fp32
whatever the autocast dtype. A sample whose labels fit into no alignment of its frames has no loss and does not count.

Shapes: B batch, F frequencies, T frames, C channels, H hidden, L labels, V labels the model can say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbopump.core.errors import DatasetError
from turbopump.models.deepspeech2.config import DeepSpeech2Config
from turbopump.models.deepspeech2.kernels import ROUTES
from turbopump.models.deepspeech2.norm import MaskedBatchNorm
from turbopump.models.deepspeech2.recurrent import BidirectionalRnn
from turbopump.models.deepspeech2.workload import FRAME_STRIDE, FREQUENCY_STRIDE

Batch = Mapping[str, Tensor]
__all__ = ["ROUTES", "build", "loss", "metrics", "weight"]
BLANK = 0
CLIP = 20.0  # largest activation of a convolution, as in the paper


class ConvNorm(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int], frame_stride: int) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(inputs, outputs, kernel, (FREQUENCY_STRIDE, frame_stride), padding, bias=False)
        self.norm = MaskedBatchNorm(outputs, dim=1, clip=CLIP)

    def forward(self, x_BCFT: Tensor, mask_BT: Tensor) -> Tensor:
        return self.norm(self.conv(x_BCFT), mask_BT[:, None, None, :])


class DeepSpeech2(nn.Module):
    def __init__(self, config: DeepSpeech2Config) -> None:
        super().__init__()
        self.config = config
        self.convs, inputs = nn.ModuleList(), 1
        for i, kernel in enumerate(zip(config.conv_frequencies, config.conv_frames, strict=True)):
            self.convs.append(ConvNorm(inputs, config.conv_channels, kernel, 1 if i else FRAME_STRIDE))
            inputs = config.conv_channels
        self.rnns, self.norms, inputs = nn.ModuleList(), nn.ModuleList(), config.rnn_inputs
        for _ in range(config.num_layers):
            self.rnns.append(BidirectionalRnn(config.rnn, inputs, config.hidden_size))
            self.norms.append(MaskedBatchNorm(config.hidden_size, dim=2))
            inputs = config.hidden_size
        self.head = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, features_BFT: Tensor, lengths_B: Tensor) -> Tensor:
        """Log-probabilities [T', B, V] in fp32, T' = `output_frames(T)`."""
        frames = torch.arange(features_BFT.shape[-1], device=features_BFT.device)
        mask_BT = frames[None, :] < lengths_B[:, None]
        x = (features_BFT * mask_BT[:, None, :]).unsqueeze(1)
        for i, conv in enumerate(self.convs):
            if i == 0:
                lengths_B = output_frames(lengths_B)
                mask_BT = frames[None, : output_frames(len(frames))] < lengths_B[:, None]
            x = conv(x, mask_BT)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        x, mask_TB1 = x.flatten(1, 2).permute(2, 0, 1).contiguous(), mask_BT.t().unsqueeze(-1)
        for rnn, norm in zip(self.rnns, self.norms, strict=True):
            x = norm(rnn(x, lengths_B, dtype), mask_TB1)
        return F.log_softmax(self.head(x).float(), -1)


def output_frames(frames: Any) -> Any:
    """Frames after the convolutions (an int or a tensor of them)."""
    return (frames + FRAME_STRIDE - 1) // FRAME_STRIDE


def build(config: DeepSpeech2Config) -> DeepSpeech2:
    """A model with random weights from the global generator, fp32, on the default device (`meta` allocates nothing)."""
    return DeepSpeech2(config)


def feasible(batch: Batch) -> Tensor:
    """Samples whose labels fit into their frames, bool [B]: repeated labels need a blank between them."""
    labels, lengths = batch["labels_BL"], batch["label_lengths_B"]
    inside = torch.arange(1, labels.shape[1], device=labels.device)[None, :] < lengths[:, None]
    repeats = ((labels[:, 1:] == labels[:, :-1]) & inside).sum(1)
    return output_frames(batch["lengths_B"].to(torch.int64)) >= lengths + repeats


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean CTC loss in nats per feasible sample, a fp32 scalar; raises `DatasetError` where batch and model differ."""
    return _ctc(_log_probs(model, batch), batch).sum() / feasible(batch).sum().clamp(min=1)


def _log_probs(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["features_BFT"], batch["lengths_B"].to(torch.int64))


def _ctc(log_probs_TBV: Tensor, batch: Batch) -> Tensor:
    """Loss of each sample, [B]; 0 for an infeasible one."""
    labels = batch["labels_BL"].to(torch.int64)
    frames, label_lengths = (batch[n].to(torch.int64) for n in ("lengths_B", "label_lengths_B"))
    inside = torch.arange(labels.shape[1], device=labels.device)[None, :] < label_lengths[:, None]
    labels = labels * inside  # padding may hold anything
    if labels.device.type == "cpu" and labels.numel() and int(labels.max()) >= log_probs_TBV.shape[-1]:
        raise DatasetError(
            f"the batch holds label {int(labels.max())}, the model says 0 to {log_probs_TBV.shape[-1] - 1}: "
            f"set model.num_labels to at least {int(labels.max()) + 1}"
        )
    with torch.autocast(log_probs_TBV.device.type, enabled=False):
        return F.ctc_loss(log_probs_TBV, labels, output_frames(frames), label_lengths, blank=BLANK, reduction="none",
                          zero_infinity=True)  # fmt: skip


def weight(batch: Batch) -> int:
    """Number of feasible samples."""
    return int(feasible(batch).sum())


@torch.no_grad()
def metrics(model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
    """`loss`: summed nats and feasible samples; `label_error_rate`: edit distance of the greedy reading and labels."""
    log_probs_TBV = _log_probs(model, batch)
    spoken = greedy(log_probs_TBV, output_frames(batch["lengths_B"]))
    labels, lengths = batch["labels_BL"].tolist(), batch["label_lengths_B"].tolist()
    errors = sum(edit_distance(said, row[:n]) for said, row, n in zip(spoken, labels, lengths, strict=True))
    return {
        "loss": (float(_ctc(log_probs_TBV, batch).sum()), float(weight(batch))),
        "label_error_rate": (float(errors), float(sum(lengths))),
    }


def greedy(log_probs_TBV: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """The likeliest label of each frame, repeats and blanks removed (Graves 2006, best path)."""
    read = []
    for best, length in zip(log_probs_TBV.argmax(-1).t().tolist(), lengths_B.tolist(), strict=True):
        frames = best[:length]
        read.append([now for before, now in zip([BLANK, *frames], frames, strict=False) if now not in (before, BLANK)])
    return read


def edit_distance(a: Sequence[int], b: Sequence[int]) -> int:
    """Fewest insertions, deletions and replacements that turn `a` into `b` (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return row[-1]
