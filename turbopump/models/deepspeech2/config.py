"""Deep Speech 2 (Amodei et al. 2016): 2-D convolutions, batch-normalised bidirectional recurrence, CTC."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from turbopump.core.config import PositiveInt, missing_sizes, setting
from turbopump.core.plugins import ModelKind
from turbopump.models.deepspeech2.workload import FREQUENCY_STRIDE, workload


@dataclass(frozen=True)
class DeepSpeech2Config:
    """Sizes of the model. The first convolution halves the frames, each one halves the frequencies."""

    kind: Literal["deepspeech2"] = setting("deepspeech2", "convolutions, recurrent layers and CTC for speech")
    num_labels: PositiveInt = setting(29, "labels the model can say; label 0 is CTC's blank and never a target")
    frequencies: PositiveInt = setting(161, "rows of a spectrogram; those of the dataset")
    conv_channels: PositiveInt = setting(32, "channels of each convolution")
    conv_frequencies: tuple[PositiveInt, ...] = setting((41, 21), "kernel of each convolution over frequencies; odd")
    conv_frames: tuple[PositiveInt, ...] = setting((11, 11), "kernel of each convolution over frames; odd")
    rnn: Literal["gru", "lstm"] = setting("gru", "cell of the recurrent layers")
    num_layers: PositiveInt = setting(5, "recurrent layers, each in both directions, whose outputs are added")
    hidden_size: PositiveInt = setting(800, "width of a direction of a recurrent layer")

    @property
    def rnn_inputs(self) -> int:
        """Width of what the first recurrent layer reads."""
        rows = self.frequencies
        for _ in self.conv_frequencies:
            rows = (rows - 1) // FREQUENCY_STRIDE + 1
        return self.conv_channels * rows

    def problems(self) -> list[str]:
        """Cross-field problems, each with what is given, allowed and to be done."""
        found = []
        if not self.conv_frequencies or len(self.conv_frequencies) != len(self.conv_frames):
            found.append(
                f"conv_frames: {list(self.conv_frames)} must hold one kernel for each of conv_frequencies "
                f"({list(self.conv_frequencies)}), at least one: give lists of the same length"
            )
        for name in ("conv_frequencies", "conv_frames"):
            even = [k for k in getattr(self, name) if k % 2 == 0]
            if even:
                found.append(f"{name}: {even[0]} is even, kernels must be odd: use {even[0] - 1} or {even[0] + 1}")
        if self.num_labels < 2:
            found.append(f"num_labels: {self.num_labels} leaves no label beside the blank: use at least 2")
        return found

    def misfits(self, shape: Mapping[str, int]) -> list[str]:
        """Sizes that do not fit those of the dataset's samples."""
        if missing := missing_sizes("deepspeech2", shape, ("frequencies", "frames", "labels"), '"tones"'):
            return missing
        found = []
        frequencies, labels = shape["frequencies"], shape.get("num_labels", 0)
        if self.frequencies != frequencies:
            found.append(
                f"frequencies: {self.frequencies} given; the spectrograms have {frequencies}: use {frequencies}"
            )
        if self.num_labels < labels:
            found.append(
                f"num_labels: {self.num_labels} given; the dataset has {labels}, the blank included: "
                f"use {labels} or more"
            )
        return found


KIND = ModelKind(config=DeepSpeech2Config, workload=workload, module="turbopump.models.deepspeech2.model")
