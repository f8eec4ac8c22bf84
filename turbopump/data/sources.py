"""What a recipe's `[data]` can name: the source protocol, the built-in kinds, and token windows.

A source is a map-style dataset (PyTorch's and Grain's sense): `__len__`, `__getitem__(index)` and, for speed,
`__getitems__(indices)`. The contract, which the loader relies on:

- A sample is a function of (split, index) and, where `randomness` is "seeded", of the global random number generators
  of `random`, numpy and torch, which the loader seeds from (seed, epoch, index) before each sample.
- `__getitems__` takes an int64 array (a list of integers in a source without `randomness`) and returns a list of
  samples, or one batch already collated (an array, or a tuple or dict of arrays).
- `collate(samples)`, where there is one, makes a batch of a list of samples; else torch's default collation does.
- Samples are numpy values (no torch here), fresh arrays that the caller may write to; sources survive `fork`.
- `batch_buffers(rows)` and `__getitems__(indices, out=buffers)`, where they are: memory for batches of up to `rows`
  samples, used again for each. `releases_gil`: batches may be read in several threads at once.
- `batches_ahead`, `prefetch(indices)`, `forget()`: so many batches may be announced before they are read, in order;
  also `samples_ahead`, in samples. `expect_order(order, window_samples)` tells the order before anything is read.
- `locate(index)` says where a sample is stored, for errors; `lengths` holds each sample's length, for buckets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np

from turbopump.core.config import PositiveInt, setting
from turbopump.core.errors import DatasetError, SampleError, UsageError
from turbopump.core.plugins import SourceKind
from turbopump.data import media, text
from turbopump.data.aligned import aligned_empty
from turbopump.data.digits import DigitsConfig, open_digits
from turbopump.data.format import Dataset, Reading, concatenated, open_dataset, read_any_manifest
from turbopump.data.manifest import Field, Manifest
from turbopump.data.ragged import Ragged
from turbopump.data.remote_files import RemoteConfig
from turbopump.data.tones import TonesConfig, TonesSource, tones_shape


class RandomAccessDataSource(Protocol):
    """The two methods every source has; see the module's contract for the optional ones."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


_PATH = "the dataset directory that `turbopump pack` wrote, or its address, e.g. `s3://bucket/prefix`"
_REMOTE = "how a dataset at an address is reached, and its cache"
_READING = (
    "`mapped` into memory, `direct` past the page cache, or `auto`: direct where the data fills most of the memory"
)


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Windows of a packed stream of tokens, for language models."""

    kind: Literal["tokens"] = setting("tokens", "windows of a packed stream of tokens")
    path: str = setting(doc=_PATH)
    seq_len: PositiveInt = setting(256, "tokens a sample is trained on; a sample holds one more, the last target")
    boundaries: bool = setting(
        False, "also give each token's document within its window, for attention within documents"
    )
    reading: Reading = setting("auto", _READING)
    remote: RemoteConfig = setting(RemoteConfig, _REMOTE)

    def problems(self) -> list[str]:
        """What does not hold between the settings."""
        return self.remote.problems(self.path)


class _Packed:
    """What sources of packed rows have in common: a split of a dataset, and batches that are announced to it."""

    randomness = "none"
    samples_ahead = 0

    def __init__(self, config: TokensConfig | ArraysConfig, split: str) -> None:
        self._config, self._split = config, split
        self.name = f"{config.kind} {config.path} ({split})"
        self._dataset = _open_kind(config)
        self.digest = self._dataset.manifest.digest
        self._data = self._dataset.data(split)

    def __len__(self) -> int:
        return len(self._data)

    @property
    def batches_ahead(self) -> int:
        """How many batches `prefetch` takes before they are read: none where shards are mapped."""
        return self._data.batches_ahead

    def expect_order(self, order: str, window_samples: int) -> None:
        """Learn the order of the reads to come; warns where a store's cache does not go with it."""
        self.samples_ahead = self._data.expect_order(order, window_samples, len(self))

    def forget(self) -> None:
        """Drop what was announced and not read."""
        self._data.forget()

    def __reduce__(self) -> tuple[Any, ...]:  # a memory map does not travel: the other process opens its own
        return type(self), (self._config, self._split)


class TokensSource(_Packed):
    """Sample i is the window of `seq_len + 1` tokens from token `i * seq_len` on; int64.

    `vocab_size`, `bytes_per_token` (UTF-8 bytes of the split's text a token, separators counted as tokens),
    `encode(text)` and `decode(ids)` serve evaluation and sampling. Raises `DatasetError` for a split that is missing
    or shorter than one window, `CorruptDataError` when a block is read that differs from its checksum.
    """

    def __init__(self, config: TokensConfig, split: str) -> None:
        super().__init__(config, split)
        self.seq_len, self._boundaries = config.seq_len, config.boundaries
        entry = self._dataset.split(split)
        self.num_tokens = entry.rows
        self._len = max(0, (entry.rows - 1) // config.seq_len)
        if not self._len:
            raise DatasetError(
                f"split {split!r} of {config.path} has {entry.rows} tokens, too few for one window of seq_len + 1 = "
                f"{config.seq_len + 1}: pack more text or use a smaller data.seq_len"
            )
        self.bytes_per_token = entry.source_bytes / entry.rows
        tokenizer = self._dataset.manifest.tokenizer
        if tokenizer is None:
            raise DatasetError(f"{config.path} names no tokenizer: pack it again")
        self.vocab_size = tokenizer.vocab_size
        self._tokenizer: text.Tokenizer | None = None
        self.releases_gil = not config.boundaries

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> np.ndarray:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> Any:
        """The windows `indices`, int64 [B, seq_len + 1]; with `boundaries` also the number of each token's document
        within its window."""
        starts = np.asarray(indices, np.int64) * self.seq_len
        self._check(indices, starts)
        windows = self._data.windows(starts, self.seq_len + 1, out=None if out is None else out[: len(starts)])
        return (windows, self._documents(windows)) if self._boundaries else windows

    def _check(self, indices: Sequence[int] | np.ndarray, starts: np.ndarray) -> None:
        if len(starts) and (starts.min() < 0 or starts.max() >= self._len * self.seq_len):
            wrong = int(starts[(starts < 0) | (starts >= self._len * self.seq_len)][0]) // self.seq_len
            raise IndexError(f"window index {wrong} out of range 0 to {self._len - 1}")

    def _documents(self, windows: np.ndarray) -> np.ndarray:
        """Which document of its window each token belongs to, from 0 on, int32; a separator ends the one before it."""
        ends = windows[:, :-1] == self.tokenizer.separator
        return np.concatenate([np.zeros((len(windows), 1), np.int32), np.cumsum(ends, axis=1, dtype=np.int32)], axis=1)

    def batch_buffers(self, rows: int) -> np.ndarray:
        """Memory for `__getitems__(indices, out=...)` of up to `rows` windows."""
        return aligned_empty((rows, self.seq_len + 1), np.int64)

    def prefetch(self, indices: Sequence[int] | np.ndarray) -> None:
        """Tell of a batch to come: its reads start now where the dataset is read directly or from a store."""
        self._data.prefetch_windows(np.asarray(indices, np.int64) * self.seq_len, self.seq_len + 1)

    def locate(self, index: int) -> str:
        """Where window `index` begins, for errors."""
        return self._data.locate(index * self.seq_len)

    @property
    def tokenizer(self) -> text.Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._dataset.tokenizer()
            assert self._tokenizer is not None  # __init__ has seen its entry
        return self._tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int64 [T]."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.tokenizer.decode(ids)

    def text(self) -> bytes:
        """The whole text of the split in UTF-8, documents end to end: what a compressor would be given."""
        values = concatenated(self._data)
        return self.tokenizer.decode(values[values != self.tokenizer.separator]).encode()


@dataclass(frozen=True, kw_only=True)
class ArraysConfig:
    """Rows of packed arrays, e.g. inputs and targets from an `.npz` file."""

    kind: Literal["arrays"] = setting("arrays", "rows of packed arrays")
    path: str = setting(doc=_PATH)
    reading: Reading = setting("auto", _READING)
    decode: bool = setting(True, "decode images and audio; else their encoded bytes are the sample")
    remote: RemoteConfig = setting(RemoteConfig, _REMOTE)

    def problems(self) -> list[str]:
        """What does not hold between the settings."""
        return self.remote.problems(self.path)


class ArraysSource(_Packed):
    """Sample i is row i of each field, in the order they were packed: a tuple, or the value where there is one.

    A batch holds arrays, and `Ragged` for fields whose rows differ in length. A decoded image is uint8 [H, W, C],
    decoded audio a pair: float32 [T, channels] and its rate in Hz. Those of one shape are stacked, others stay a list.
    """

    def __init__(self, config: ArraysConfig, split: str) -> None:
        super().__init__(config, split)
        self.fields = self._dataset.manifest.fields
        self._decoded = [i for i, item in enumerate(self.fields) if item.media and config.decode]
        self.releases_gil = not self._decoded

    def __getitem__(self, index: int) -> Any:
        return _first(self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int] | np.ndarray, out: tuple[Any, ...] | None = None) -> Any:
        """The rows `indices` of each field, [B, *shape] in its own dtype."""
        batch = self._data.batch(indices, out)
        if self._decoded:
            batch = tuple(
                self._decode(self.fields[i], column, indices) if i in self._decoded else column
                for i, column in enumerate(batch)
            )
        return batch if len(batch) > 1 else batch[0]

    def _decode(self, item: Field, column: Ragged, indices: Sequence[int] | np.ndarray) -> Any:
        """The images or sounds of a column; raises `SampleError` naming the row of one that is damaged."""
        found: list[Any] = []
        for place, data in enumerate(column):
            try:
                found.append(media.decode_image(data) if item.media == "image" else media.decode_audio(data))
            except SampleError as error:
                index = int(indices[place])
                raise SampleError(f"{item.name!r} of {self.name}, {self.locate(index)}: {error}") from error
        if item.media == "image":
            return _stacked(found)
        return _stacked([sound for sound, _ in found]), np.array([rate for _, rate in found])

    def batch_buffers(self, rows: int) -> tuple[Any, ...]:
        """Memory for `__getitems__(indices, out=...)` of up to `rows` rows."""
        return self._data.buffers(rows)

    def prefetch(self, indices: Sequence[int] | np.ndarray) -> None:
        """Tell of a batch to come: its reads start now where the dataset is read directly or from a store."""
        self._data.prefetch(indices)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Length of every sample by the first field whose rows differ in length, int64: from the stored offsets.

        There is no such attribute where all rows have the same length.
        """
        ragged = [i for i, item in enumerate(self.fields) if not item.fixed]
        if not ragged:
            raise AttributeError("all rows have the same length")
        return self._data.lengths(ragged[0])

    def locate(self, index: int) -> str:
        """Where row `index` is stored, for errors."""
        return self._data.locate(index)


def _first(batch: Any) -> Any:
    """The first sample of a batch of columns, of which audio is a pair."""
    return tuple(map(_first, batch)) if isinstance(batch, tuple) else batch[0]


def _stacked(arrays: list[np.ndarray]) -> np.ndarray | list[np.ndarray]:
    return np.stack(arrays) if len({array.shape for array in arrays}) == 1 else arrays


def _open_kind(config: TokensConfig | ArraysConfig) -> Dataset:
    dataset = open_dataset(config.path, config.reading, config.remote)
    _check_kind(dataset.manifest, config)
    return dataset


def manifest_of(config: TokensConfig | ArraysConfig) -> Manifest:
    """The manifest of a recipe's dataset. Raises `DatasetError`, where it is of another kind, too."""
    manifest = read_any_manifest(config.path, config.remote)
    _check_kind(manifest, config)
    return manifest


def _check_kind(manifest: Manifest, config: TokensConfig | ArraysConfig) -> None:
    if manifest.kind != config.kind:
        raise DatasetError(
            f"{config.path} holds {manifest.kind}, not {config.kind}: set data.kind to match, or pack it anew"
        )


def tokens_shape(config: TokensConfig) -> Mapping[str, int]:
    """`seq_len`, and `vocab_size` where the dataset is there to tell."""
    with suppress(DatasetError):  # sizes and FLOPs need no data; opening it says what is wrong with it
        tokenizer = read_any_manifest(config.path, config.remote).tokenizer
        if tokenizer is not None:
            return {"seq_len": config.seq_len, "vocab_size": tokenizer.vocab_size}
    return {"seq_len": config.seq_len}


def arrays_shape(config: ArraysConfig) -> Mapping[str, int]:
    """Sizes of the first field: `channels`, `height`, `width` of an image, `features` of a vector, else by number."""
    shape = manifest_of(config).fields[0].shape
    names = {1: ("features",), 3: ("channels", "height", "width")}.get(len(shape), [f"dim{i}" for i in range(9)])
    return dict(zip(names, shape, strict=False))


def open_tones(config: TonesConfig, split: str) -> TonesSource:
    _known_split(split)
    return TonesSource(config, split)


def _known_split(split: str) -> None:
    if split not in ("train", "validation"):
        raise UsageError(f"no split {split!r} (known: train, validation)")


def _digits(config: DigitsConfig, split: str) -> Any:
    _known_split(split)
    return open_digits(config, split)


TOKENS = SourceKind(TokensConfig, TokensSource, tokens_shape)
DIGITS = SourceKind(DigitsConfig, _digits, lambda config: {"channels": 1, "height": 8, "width": 8, "classes": 10})
TONES = SourceKind(TonesConfig, open_tones, tones_shape)
ARRAYS = SourceKind(ArraysConfig, ArraysSource, arrays_shape)
