"""Generated tone sequences with exact transcripts, for speech models where no speech is at hand.

Each label is a tone of its own pitch; tones of random length and loudness stand in noise with random pauses between,
so that utterances have truly different lengths. A sample is a function of (seed, split, index) alone. Features are
the log power spectrum of overlapping Hann windows, normalised over the utterance as Deep Speech 2 does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from turbopump.core.config import NonNegativeFloat, NonNegativeInt, PositiveInt, setting

SAMPLE_RATE_HZ = 8000
WINDOW = 128  # 16 ms
HOP = 80  # 10 ms
FREQUENCIES = WINDOW // 2  # bins above 0 Hz
TONE_S = (0.06, 0.16)
PAUSE_S = (0.03, 0.08)
PITCH_HZ = (400.0, 3600.0)
_SPLIT_CODES = {"train": 0, "validation": 1}


@dataclass(frozen=True, kw_only=True)
class TonesConfig:
    """Generated tone sequences with transcripts, for speech models."""

    kind: Literal["tones"] = setting("tones", "generated tone sequences with transcripts")
    num_tones: PositiveInt = setting(8, "different tones; the labels are 1 to this, 0 is the blank of CTC")
    min_labels: PositiveInt = setting(2, "tones of the shortest utterance")
    max_labels: PositiveInt = setting(6, "tones of the longest utterance")
    noise: NonNegativeFloat = setting(0.1, "standard deviation of the noise; tones have an amplitude of 0.5 to 1")
    train_samples: PositiveInt = setting(4096, "utterances of the split `train`")
    validation_samples: PositiveInt = setting(256, "utterances of the split `validation`")
    seed: NonNegativeInt = setting(0, "another seed makes other utterances")

    def problems(self) -> list[str]:
        if self.min_labels <= self.max_labels:
            return []
        return [f"min_labels: {self.min_labels} is more than max_labels ({self.max_labels})"]


class TonesSource:
    """Sample i is a dict of `features` (float32 [F, T]) and `labels` (int64 [L], 1 to `num_tones`)."""

    randomness = "none"
    blank = 0

    def __init__(self, config: TonesConfig, split: str) -> None:
        self.name = f"tones ({split})"
        self.num_classes = config.num_tones + 1
        self._config = config
        self._split_code = _SPLIT_CODES[split]
        self._len = config.train_samples if split == "train" else config.validation_samples
        self._pitches_hz = np.geomspace(*PITCH_HZ, config.num_tones)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self._len:
            raise IndexError(f"utterance index out of range 0 to {self._len - 1}")
        random = np.random.default_rng([self._config.seed, self._split_code, int(index)])
        count = random.integers(self._config.min_labels, self._config.max_labels + 1)
        labels = random.integers(1, self._config.num_tones + 1, count)
        return {"features": log_spectrogram(self._sound(labels, random)), "labels": labels.astype(np.int64)}

    def _sound(self, labels_L: np.ndarray, random: np.random.Generator) -> np.ndarray:
        parts = [np.zeros(_duration(random, PAUSE_S))]
        for label in labels_L:
            size = _duration(random, TONE_S)
            fade = np.minimum(1.0, np.minimum(np.arange(size), np.arange(size)[::-1]) / 40)  # 5 ms: no clicks
            turns = self._pitches_hz[label - 1] / SAMPLE_RATE_HZ * np.arange(size)
            tone = np.sin(2 * np.pi * (turns + random.random()))
            parts += [random.uniform(0.5, 1.0) * fade * tone, np.zeros(_duration(random, PAUSE_S))]
        sound = np.concatenate(parts)
        return sound + self._config.noise * random.standard_normal(len(sound))

    @staticmethod
    def collate(samples: Sequence[Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """One batch, padded with zeros: `features_BFT` (float32) and `labels_BL`, with `lengths_B` (frames) and
        `label_lengths_B`, all int64."""
        lengths = np.array([sample["features"].shape[1] for sample in samples], np.int64)
        label_lengths = np.array([len(sample["labels"]) for sample in samples], np.int64)
        features = np.zeros((len(samples), samples[0]["features"].shape[0], lengths.max()), np.float32)
        labels = np.zeros((len(samples), label_lengths.max()), np.int64)
        for i, sample in enumerate(samples):
            features[i, :, : lengths[i]] = sample["features"]
            labels[i, : label_lengths[i]] = sample["labels"]
        return {"features_BFT": features, "lengths_B": lengths, "labels_BL": labels, "label_lengths_B": label_lengths}


def _duration(random: np.random.Generator, range_s: tuple[float, float]) -> int:
    return round(random.uniform(*range_s) * SAMPLE_RATE_HZ)


def log_spectrogram(sound_S: np.ndarray) -> np.ndarray:
    """Log power of each frequency and frame, float32 [FREQUENCIES, T], with mean 0 and variance 1."""
    frames = np.lib.stride_tricks.sliding_window_view(sound_S, WINDOW)[::HOP] * np.hanning(WINDOW)
    power = np.abs(np.fft.rfft(frames)[:, 1:]) ** 2
    features = np.log(power + 1e-6)
    return ((features - features.mean()) / (features.std() + 1e-6)).T.astype(np.float32)


def tones_shape(config: TonesConfig) -> dict[str, int]:
    """The largest sample: `frequencies`, `frames` and `labels`; `num_labels` are the different ones and the blank."""
    longest_s = config.max_labels * (TONE_S[1] + PAUSE_S[1]) + PAUSE_S[1]
    frames = (round(longest_s * SAMPLE_RATE_HZ) + config.max_labels - WINDOW) // HOP + 1
    return {"frequencies": FREQUENCIES, "frames": frames, "labels": config.max_labels,
            "num_labels": config.num_tones + 1}  # fmt: skip
