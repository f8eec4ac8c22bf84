"""Rows that are Python values: which fields they have, and stacking them into chunks.

`fields_of_rows` looks at the first rows; `chunk_of_rows` holds all later ones to what was found. Integers are int64,
floats float64 (an integer among them is one), truth values uint8, lists of numbers ragged, arrays of one shape arrays.
`where(i)` names row i for messages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.data.inputs.protocol import CHUNK_BYTES, Chunk, Column, describe
from turbopump.data.manifest import DTYPES, Field
from turbopump.data.ragged import Ragged, offsets_of

Row = Mapping[str, Any]
Where = Callable[[int], str]
_BYTES = (bytes, bytearray, memoryview)
LEAVE_OUT = "name the columns to keep and leave it out, or convert it"


def fields_of_rows(rows: Sequence[Row], where: Where, media: Mapping[str, Any] = {}) -> tuple[Field, ...]:
    """Fields of the first rows; `media` tells by field name how its bytes are encoded.

    Raises `DatasetError` naming the row for nulls, nested values, and fields that come or go.
    """
    fields = []
    for name in rows[0]:
        values = [_get(row, name, where, i) for i, row in enumerate(rows)]
        item = _field(name, values, where)
        fields.append(Field(item.name, item.dtype, item.shape, item.kind, media.get(name, "")))
    return tuple(fields)


def chunk_of_rows(rows: Sequence[Row], fields: Sequence[Field], where: Where) -> Chunk:
    """Rows stacked by `fields`. Raises `DatasetError` naming the first row that does not fit."""
    names = {item.name for item in fields}
    for i, row in enumerate(rows):
        if len(row) != len(names):
            for name in row:
                if name not in names:
                    raise DatasetError(
                        f"{where(i)} has {name!r}, which the first rows do not have: give every row the same fields, "
                        f"or name the columns to keep ({', '.join(sorted(names))})"
                    )
    return {item.name: column_of_values(item, [_get(r, item.name, where, i) for i, r in enumerate(rows)], where)
            for item in fields}  # fmt: skip


def grouped(rows: Iterable[tuple[Row, Any, int]], max_bytes: int = CHUNK_BYTES) -> Iterator[list[tuple[Row, Any, int]]]:
    """Consecutive (row, anything, bytes) in lists of about `max_bytes`."""
    group: list[tuple[Row, Any, int]] = []
    size = 0
    for item in rows:
        if group and (size + item[2] > max_bytes or len(group) >= 1 << 16):
            yield group
            group, size = [], 0
        group.append(item)
        size += item[2]
    if group:
        yield group


def _get(row: Row, name: str, where: Where, i: int) -> Any:
    try:
        value = row[name]
    except KeyError:
        raise DatasetError(f"{where(i)} has no {name!r}: give every row the same fields, or {LEAVE_OUT}") from None
    if value is None:
        raise DatasetError(f"{where(i)}: {name!r} is null: fill it in, drop such rows (--nulls drop), or {LEAVE_OUT}")
    return value


def _field(name: str, values: list[Any], where: Where) -> Field:
    types = set(map(type, values))
    if types <= {bool}:
        return Field(name, "uint8")
    if types <= {int}:
        return Field(name, "int64")
    if types <= {int, float}:
        return Field(name, "float64")
    if types <= {str}:
        return Field(name, "uint8", kind="text")
    if types <= set(_BYTES):
        return Field(name, "uint8", kind="bytes")
    listed = types <= {list, tuple}
    arrays = [_as_array(value, name, where, i) for i, value in enumerate(values)]
    filled = [a for a in arrays if a.size] if listed else arrays  # an empty list says nothing of its elements
    if not filled:
        return Field(name, "int64", kind="ragged")
    dtypes = {a.dtype.name for a in filled}
    dtype = "float64" if listed and dtypes == {"int64", "float64"} else filled[0].dtype.name
    if dtype == "bool":
        dtype = "uint8"
    if dtype not in DTYPES:
        raise DatasetError(f"{where(0)}: {name!r} holds {dtype}, not one of {', '.join(DTYPES)}: {LEAVE_OUT}")
    shapes = {a.shape for a in filled}
    if len(shapes) == 1 and (not listed or (filled[0].ndim > 1 and len(filled) == len(arrays))):
        return Field(name, dtype, filled[0].shape)
    if filled[0].ndim == 0:
        raise DatasetError(f"{where(0)}: {name!r} is a number in some rows and not in others: {LEAVE_OUT}")
    return Field(name, dtype, filled[0].shape[1:], "ragged")


def _as_array(value: Any, name: str, where: Where, i: int) -> np.ndarray:
    """Numbers as an array; raises for nested objects, texts in lists and lists that are not rectangular."""
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError):
        array = np.empty(0, object)
    if array.dtype.kind not in "biuf":
        if isinstance(value, Mapping):
            path = f"{name}.{next(iter(value), 'name')}"
            raise DatasetError(
                f"{where(i)}: {name!r} is a nested object: name its members as columns ({path}), {LEAVE_OUT}"
            )
        what = f"a {type(value).__name__} that is no array of numbers"
        raise DatasetError(f"{where(i)}: {name!r} is {what}: {LEAVE_OUT}")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return array


def column_of_values(item: Field, values: list[Any], where: Where) -> Column:
    """One field's values stacked. Raises `DatasetError` naming the first row that does not fit."""
    if item.kind == "text":
        return _texts(item, values, where)
    if item.kind == "bytes":
        if not set(map(type, values)) <= set(_BYTES):
            for i, value in enumerate(values):
                if not isinstance(value, _BYTES):
                    raise _unlike(item, value, where(i))
        return _joined(values, "bytes")
    if item.kind == "ragged":
        return _ragged(item, values, where)
    if not item.shape and set(map(type, values)) <= _PLAIN.get(item.dtype, set()):
        try:
            return np.array(values, item.dtype)
        except OverflowError:
            i = next(i for i, v in enumerate(values) if not -(2**63) <= v < 2**63)
            raise DatasetError(f"{where(i)}: {item.name!r} ({values[i]}) does not fit into {item.dtype}") from None
    out = np.empty((len(values), *item.shape), item.dtype)
    for i, value in enumerate(values):
        if isinstance(value, (str, *_BYTES, Mapping)):
            raise _unlike(item, value, where(i))
        array = _as_array(value, item.name, where, i)
        if array.shape != item.shape or not _fits(array, item, value):
            raise _unlike(item, value, where(i))
        out[i] = array
    return out


_PLAIN: dict[str, set[type]] = {"int64": {int}, "float64": {float, int}, "uint8": {bool}}


def _fits(array: np.ndarray, item: Field, value: Any) -> bool:
    if array.dtype == bool:
        return item.dtype == "uint8"
    if array.dtype.name == item.dtype:
        return True
    plain = isinstance(value, (int, float, list, tuple))  # 1 among 1.5 is 1.0
    return plain and item.dtype == "float64" and array.dtype.kind in "iu"


def _ragged(item: Field, values: list[Any], where: Where) -> Ragged:
    if not item.shape and set(map(type, values)) <= {list, tuple}:
        lengths = np.fromiter(map(len, values), np.int64, count=len(values))
        if set(map(type, itertools.chain.from_iterable(values))) <= _PLAIN.get(item.dtype, set()):
            try:
                flat = np.fromiter(itertools.chain.from_iterable(values), item.dtype, count=int(lengths.sum()))
                return Ragged(flat, offsets_of(lengths))
            except OverflowError:
                pass  # below, where the row is named
    arrays = []
    for i, value in enumerate(values):
        if isinstance(value, (str, *_BYTES, Mapping)):
            raise _unlike(item, value, where(i))
        array = _as_array(value, item.name, where, i)
        if not array.size and isinstance(value, (list, tuple)):
            array = np.empty((0, *item.shape), item.dtype)
        if array.ndim == 0 or array.shape[1:] != item.shape or not _fits(array, item, value):
            raise _unlike(item, value, where(i))
        arrays.append(array.astype(item.dtype, copy=False))
    return Ragged(np.concatenate(arrays), offsets_of([len(array) for array in arrays]))


def _texts(item: Field, values: list[Any], where: Where) -> Ragged:
    if set(map(type, values)) == {str} and (text := "".join(values)).isascii():  # lengths in letters are those in bytes
        lengths = np.fromiter(map(len, values), np.int64, count=len(values))
        return Ragged(np.frombuffer(text.encode(), np.uint8), offsets_of(lengths), "text")
    return _joined([_encoded(v, item, where, i) for i, v in enumerate(values)], "text")


def _encoded(value: Any, item: Field, where: Where, i: int) -> bytes:
    if not isinstance(value, str):
        raise _unlike(item, value, where(i))
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise DatasetError(
            f"{where(i)}: {item.name!r} is not UTF-8 text ({error.reason}): repair it or leave it out"
        ) from None


def _joined(parts: list[Any], kind: Any) -> Ragged:
    values = np.frombuffer(b"".join(parts), np.uint8)
    return Ragged(values, offsets_of(np.fromiter(map(len, parts), np.int64, count=len(parts))), kind)


def _unlike(item: Field, value: Any, where: str) -> DatasetError:
    shape = f" of shape {list(value.shape)} and {value.dtype}" if isinstance(value, np.ndarray) else ""
    shown = "" if isinstance(value, (np.ndarray, *_BYTES)) else f" ({str(value)[:40]!r})"
    return DatasetError(
        f"{where}: {item.name!r} is a {type(value).__name__}{shape}{shown}, but {describe(item)} in the first rows: "
        f"give it one type in all rows, or leave it out by naming the columns to keep"
    )
