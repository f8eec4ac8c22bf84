"""What a recipe's `[data]` can name: the source protocol, the built-in kinds, and token windows.

A source is a map-style dataset (PyTorch's and Grain's sense): `__len__`, `__getitem__(index)` and, for speed,
`__getitems__(indices)`. The contract, which the loader relies on:

- A sample is a function of (split, index) and, where `randomness` is "seeded", of the global random number generators
  of `random`, numpy and torch, which the loader seeds from (seed, epoch, index) before each sample.
- `__getitems__` takes an int64 array (a list of integers in a source without `randomness`) and returns a list of
  samples, or one batch already collated (an array, or a tuple or dict of arrays).
- `collate(samples)`, where there is one, makes a batch of a list of samples; else torch's default collation does.
- Samples are numpy values (no torch here), fresh arrays that the caller may write to; sources survive `fork`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from turbopump.core.config import PositiveInt, setting
from turbopump.core.errors import DatasetError, UsageError
from turbopump.core.plugins import SourceKind
from turbopump.data import text
from turbopump.data.digits import DigitsConfig, open_digits
from turbopump.data.format import Dataset, open_dataset
from turbopump.data.tones import TonesConfig, TonesSource, tones_shape


class RandomAccessDataSource(Protocol):
    """The two methods every source has; see the module's contract for the optional ones."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """Windows of a packed stream of tokens, for language models."""

    kind: Literal["tokens"] = setting("tokens", "windows of a packed stream of tokens")
    path: str = setting(doc="the dataset directory that `turbopump pack` wrote")
    seq_len: PositiveInt = setting(256, "tokens a sample is trained on; a sample holds one more, the last target")


class TokensSource:
    """Sample i is the window of `seq_len + 1` tokens from token `i * seq_len` on; int64.

    `vocab_size`, `bytes_per_token` (UTF-8 bytes of the split's text a token, separators counted as tokens),
    `encode(text)` and `decode(ids)` serve evaluation and sampling. Raises `DatasetError` for a split that is missing
    or shorter than one window, `CorruptDataError` when a block is read that differs from its checksum.
    """

    randomness = "none"

    def __init__(self, config: TokensConfig, split: str) -> None:
        self._config, self._split = config, split
        self.name = f"tokens {config.path} ({split})"
        self.seq_len = config.seq_len
        self._dataset = _open_kind(config.path, "tokens")
        self.digest = self._dataset.manifest.digest
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
        self._bounds = self._dataset.row_bounds(split)
        self._windows: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, index: int) -> np.ndarray:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """The windows `indices`, int64 [B, seq_len + 1]."""
        starts = np.asarray(indices, np.int64) * self.seq_len
        if len(starts) and (starts.min() < 0 or starts.max() >= self._len * self.seq_len):
            raise IndexError(f"window index out of range 0 to {self._len - 1}")
        if len(self._bounds) == 2:
            return self._gather(0, starts)
        out = np.empty((len(starts), self.seq_len + 1), np.int64)
        first = np.searchsorted(self._bounds, starts, "right") - 1
        last = np.searchsorted(self._bounds, starts + self.seq_len, "right") - 1
        for shard in np.unique(first[first == last]):
            mine = (first == shard) & (last == shard)
            out[mine] = self._gather(int(shard), starts[mine] - self._bounds[shard])
        for place in np.flatnonzero(first != last):
            out[place] = self._across(int(starts[place]), int(first[place]), int(last[place]))
        return out

    def _gather(self, shard: int, starts: np.ndarray) -> np.ndarray:
        """Windows that lie within one shard; `starts` are rows of the shard."""
        column = self._dataset.column(self._split, shard)
        column.check_rows(starts, starts + self.seq_len)
        if shard not in self._windows:
            self._windows[shard] = np.lib.stride_tricks.sliding_window_view(column.values, self.seq_len + 1)
        return self._windows[shard][starts].astype(np.int64)

    def _across(self, start: int, first: int, last: int) -> np.ndarray:
        """One window that begins in shard `first` and ends in shard `last`."""
        parts = []
        for shard in range(first, last + 1):
            begin = max(start, int(self._bounds[shard])) - int(self._bounds[shard])
            end = min(start + self.seq_len + 1, int(self._bounds[shard + 1])) - int(self._bounds[shard])
            column = self._dataset.column(self._split, shard)
            column.check_rows(np.array([begin]), np.array([end - 1]))
            parts.append(column.values[begin:end].astype(np.int64))
        return np.concatenate(parts)

    @property
    def tokenizer(self) -> text.Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = text.load_tokenizer(self._dataset.path, self._dataset.manifest)
            assert self._tokenizer is not None  # __init__ has seen its entry
        return self._tokenizer

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int64 [T]."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self.tokenizer.decode(ids)

    def text(self) -> bytes:
        """The whole text of the split in UTF-8, documents end to end: what a compressor would be given."""
        parts = []
        for shard in range(len(self._bounds) - 1):
            column = self._dataset.column(self._split, shard)
            if len(column.values):
                column.check_rows(np.array([0]), np.array([len(column.values) - 1]))
            parts.append(column.values[column.values != self.tokenizer.separator])
        return self.tokenizer.decode(np.concatenate(parts)).encode()

    def __reduce__(self) -> tuple[Any, ...]:  # a memory map does not travel: the other process opens its own
        return TokensSource, (self._config, self._split)


@dataclass(frozen=True, kw_only=True)
class ArraysConfig:
    """Rows of packed arrays, e.g. inputs and targets from an `.npz` file."""

    kind: Literal["arrays"] = setting("arrays", "rows of packed arrays")
    path: str = setting(doc="the dataset directory that `turbopump pack` wrote")


class ArraysSource:
    """Sample i is row i of each field, in the order they were packed: a tuple, or the array where there is one."""

    randomness = "none"

    def __init__(self, config: ArraysConfig, split: str) -> None:
        self._config, self._split = config, split
        self.name = f"arrays {config.path} ({split})"
        self._dataset = _open_kind(config.path, "arrays")
        self.digest = self._dataset.manifest.digest
        self._bounds = self._dataset.row_bounds(split)
        self.fields = self._dataset.manifest.fields

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, index: int) -> Any:
        batch = self.__getitems__([index])
        return tuple(array[0] for array in batch) if isinstance(batch, tuple) else batch[0]

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> Any:
        """The rows `indices` of each field, [B, *shape] in its own dtype."""
        rows = np.asarray(indices, np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"row index out of range 0 to {len(self) - 1}")
        shard = np.searchsorted(self._bounds, rows, "right") - 1
        batch = tuple(np.empty((len(rows), *field.shape), field.dtype) for field in self.fields)
        for number in np.unique(shard):
            mine = shard == number
            local = rows[mine] - self._bounds[number]
            for i, out in enumerate(batch):
                column = self._dataset.column(self._split, int(number), i)
                column.check_rows(local, local)
                out[mine] = column.values[local]
        return batch if len(batch) > 1 else batch[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return ArraysSource, (self._config, self._split)


def _open_kind(path: str, kind: str) -> Dataset:
    dataset = open_dataset(path)
    if dataset.manifest.kind != kind:
        raise DatasetError(f"{path} holds {dataset.manifest.kind}, not {kind}: set data.kind to match, or pack it anew")
    return dataset


def arrays_shape(config: ArraysConfig) -> Mapping[str, int]:
    """Sizes of the first field: `channels`, `height`, `width` of an image, `features` of a vector, else by number."""
    shape = _open_kind(config.path, "arrays").manifest.fields[0].shape
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


TOKENS = SourceKind(TokensConfig, TokensSource, lambda config: {"seq_len": config.seq_len})
DIGITS = SourceKind(DigitsConfig, _digits, lambda config: {"channels": 1, "height": 8, "width": 8, "classes": 10})
TONES = SourceKind(TonesConfig, open_tones, tones_shape)
ARRAYS = SourceKind(ArraysConfig, ArraysSource, arrays_shape)
