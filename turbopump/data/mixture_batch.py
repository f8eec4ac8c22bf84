"""One batch out of the parts that several sources gave for it, and what makes two sources' samples alike.

A part is what `__getitems__` returns: an array, `Ragged`, a tuple or mapping of such, or a list of samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.core.files import digest
from turbopump.data.ragged import Ragged, joined, offsets_of


class BatchMemory:
    """Arrays of up to `rows` rows, kept by the path of the field they hold, and the sources' own memory."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.of_sources: dict[int, Any] = {}
        self._arrays: dict[str, np.ndarray] = {}

    def array(self, path: str, rows: int, like: np.ndarray) -> np.ndarray:
        """An array [rows, *like.shape[1:]] of `like`'s dtype, its content undefined."""
        if rows > self.rows:
            raise ValueError(f"{rows} rows do not fit buffers of {self.rows}")
        kept = self._arrays.get(path)
        if kept is None or kept.shape[1:] != like.shape[1:] or kept.dtype != like.dtype:
            kept = self._arrays[path] = np.empty((self.rows, *like.shape[1:]), like.dtype)
        return kept[:rows]


def placed(
    parts: Sequence[Any], wheres: Sequence[np.ndarray], names: Sequence[str], memory: BatchMemory, path: str = ""
) -> Any:
    """The batch whose rows `wheres[k]` are the rows of `parts[k]`; `names` are the sources', for errors.

    Raises `DatasetError` where the parts differ in kind, keys, dtype or shape of a row.
    """
    first = parts[0]
    _check_parts(parts, names, path)
    if isinstance(first, np.ndarray):
        out = memory.array(path, sum(map(len, wheres)), first)
        for part, where in zip(parts, wheres):
            out[where] = part
        return out
    if isinstance(first, Ragged):
        return _rows_of(joined(parts), np.argsort(np.concatenate(wheres)))
    if isinstance(first, list):
        rows: list[Any] = [None] * sum(map(len, wheres))
        for part, where in zip(parts, wheres):
            for row, value in zip(where.tolist(), part, strict=True):
                rows[row] = value
        return rows
    if isinstance(first, Mapping):
        return {key: placed([part[key] for part in parts], wheres, names, memory, _below(path, key)) for key in first}
    values = [
        placed([part[number] for part in parts], wheres, names, memory, _below(path, number))
        for number in range(len(first))
    ]
    return type(first)(*values) if hasattr(first, "_fields") else tuple(values)


def _check_parts(parts: Sequence[Any], names: Sequence[str], path: str) -> None:
    forms = [_form(part) for part in parts]
    for name, form in zip(names, forms):
        if form is None:
            raise DatasetError(
                f"{name} returns {type(parts[forms.index(None)]).__name__}{f' as {path}' if path else ''}: a mixture "
                f"takes arrays, Ragged, lists, and tuples or mappings of them"
            )
        if form != forms[0]:
            raise DatasetError(
                f"{names[0]} and {name} cannot be mixed: {path or 'a batch'} is {forms[0]} from the one and {form} "
                f"from the other"
            )


def _form(part: Any) -> str | None:
    """What must be alike between the parts of a batch, in words."""
    if isinstance(part, np.ndarray):
        return f"{part.dtype} {list(part.shape[1:])}"
    if isinstance(part, Ragged):
        return f"{part.kind} {part.values.dtype} {list(part.values.shape[1:])}"
    if isinstance(part, Mapping):
        return f"a mapping of {', '.join(map(str, part))}"
    if isinstance(part, tuple):
        return f"{type(part).__name__} of {len(part)}"
    return "a list" if isinstance(part, list) else None


def _below(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _rows_of(ragged: Ragged, rows: np.ndarray) -> Ragged:
    """The given rows, in that order, copied."""
    lengths = ragged.lengths[rows]
    offsets = offsets_of(lengths)
    taken = np.arange(offsets[-1]) + np.repeat(ragged.offsets[:-1][rows] - offsets[:-1], lengths)
    return Ragged(ragged.values[taken], offsets, ragged.kind)


def sample_schema(source: Any) -> dict[str, str]:
    """What two sources must have in common to be mixed, in words by name: fields, sizes, tokenizer.

    The fields are the source's `fields` or, where it names none, those of its first sample; with a `collate` of its
    own a source may give samples of different shapes.
    """
    schema = {}
    if hasattr(source, "fields"):
        for field in source.fields:
            schema[f"field {field.name}"] = f"{field.kind} {field.dtype} {list(field.shape)}"
    else:
        _describe_value(source[0], "", hasattr(source, "collate"), schema)
    for name in ("seq_len", "vocab_size"):
        if hasattr(source, name):
            schema[name] = str(getattr(source, name))
    if hasattr(source, "tokenizer"):
        schema["tokenizer"] = digest(source.tokenizer.dumps())
    schema["collate"] = "its own" if hasattr(source, "collate") else "none"
    return schema


def _describe_value(value: Any, path: str, any_shape: bool, schema: dict[str, str]) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _describe_value(item, _below(path, key), any_shape, schema)
    elif isinstance(value, tuple):
        for number, item in enumerate(value):
            _describe_value(item, _below(path, number), any_shape, schema)
    else:
        known = isinstance(value, (np.ndarray, np.generic))
        words = f"{value.dtype} {value.ndim if any_shape else list(value.shape)}" if known else type(value).__name__
        schema[f"field {path}" if path else "a sample"] = words
