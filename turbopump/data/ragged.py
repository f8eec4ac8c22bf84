"""Rows of different lengths as two arrays: what a batch of texts, encoded images or sequences is in memory.

Row i is `values[offsets[i]:offsets[i + 1]]`. The same form is stored (the two buffers of an Arrow large list), read
(one gather), and handed to a model's `collate`; single Python objects are made only where someone asks for a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

RaggedKind = Literal["ragged", "bytes", "text"]
_SHORT_RUN = 1000  # values: shorter ones are faster picked out one by one than as slices (measured)


@dataclass(frozen=True)
class Ragged:
    """`values` [total, *shape] and `offsets` int64 [rows + 1] from 0 on; bytes and UTF-8 text are uint8 [total].

    Indexing gives one row: an array, `bytes` or `str` by `kind`. A batch of the loader holds tensors instead of arrays
    where `kind` is "ragged": what `torch.nested.nested_tensor_from_jagged(values, offsets)` takes.
    """

    values: np.ndarray
    offsets: np.ndarray
    kind: RaggedKind = "ragged"

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row, int64 [rows]."""
        return self.offsets[1:] - self.offsets[:-1]

    def __getitem__(self, row: int) -> Any:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        values = self.values[self.offsets[row] : self.offsets[row + 1]]
        if self.kind == "ragged":
            return values
        return values.tobytes() if self.kind == "bytes" else values.tobytes().decode()

    def __iter__(self) -> Iterator[Any]:
        return (self[row] for row in range(len(self)))

    def rows(self, begin: int, end: int) -> Ragged:
        """Rows `begin` to `end` as views."""
        offsets = self.offsets[begin : end + 1]
        return Ragged(self.values[offsets[0] : offsets[-1]], offsets - offsets[0], self.kind)

    def where(self, keep: np.ndarray) -> Ragged:
        """The rows for which `keep` (bool [rows]) holds, copied."""
        lengths = self.lengths
        edges = np.flatnonzero(np.diff(keep, prepend=False, append=False))  # a run of rows begins, ends, begins ...
        if len(edges) * _SHORT_RUN > 2 * len(self.values):
            values = self.values[np.repeat(keep, lengths)]
        else:
            runs = (self.values[begin:end] for begin, end in self.offsets[edges].reshape(-1, 2).tolist())
            values = np.concatenate([self.values[:0], *runs])
        return Ragged(values, offsets_of(lengths[keep]), self.kind)


def offsets_of(lengths: np.ndarray | Sequence[int]) -> np.ndarray:
    """int64 [rows + 1] from the length of each row."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ragged_of(rows: Sequence[Any]) -> Ragged:
    """From arrays [length, *shape] of one dtype and shape, `bytes`, or `str`: all of one type."""
    first = rows[0]
    if isinstance(first, (bytes, str)):
        parts = [row.encode() if isinstance(row, str) else row for row in rows]
        values = np.frombuffer(b"".join(parts), np.uint8)
        return Ragged(values, offsets_of([len(part) for part in parts]), "text" if isinstance(first, str) else "bytes")
    return Ragged(np.concatenate(rows), offsets_of([len(row) for row in rows]))


def joined(parts: Sequence[Ragged]) -> Ragged:
    """The rows of all parts, in order."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])
    return Ragged(np.concatenate([part.values for part in parts]), offsets_of(lengths), parts[0].kind)
