"""Arrow columns as fields and numpy arrays: views of Arrow's own buffers wherever the layout allows it.

    integers, floats            array            string, large_string, string_view          text
    bool                        array of uint8   binary, fixed_size_binary, binary_view     bytes
    timestamp, date, time       array of int64   (fixed_size_)list of numbers               ragged (array)
    dictionary                  what it encodes  struct{bytes, path} (Hugging Face media)   bytes with `media`
    member of a struct          by its path      Array2D .. Array5D (Hugging Face)          array, ragged

Nulls, whole structs, maps, decimals and nested lists of varying length raise `DatasetError` naming the column.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types

from turbopump.core.errors import DatasetError
from turbopump.core.files import from_json
from turbopump.data.inputs.protocol import Chunk, Column, Dropped, Selection
from turbopump.data.inputs.rows import LEAVE_OUT
from turbopump.data.manifest import Field
from turbopump.data.ragged import Ragged

_ARRAYS = ("Array2D", "Array3D", "Array4D", "Array5D")
_MEDIA_NAMES = {"Image": "image", "Audio": "audio"}


def fields_of_schema(schema: pa.Schema, selection: Selection, where: str) -> tuple[Field, ...]:
    """Fields of the columns that `selection` needs. Raises `UsageError`, `DatasetError` (see above)."""
    if len(set(schema.names)) < len(schema.names):
        raise DatasetError(f"{where} has two columns of one name: rename one")
    types_by_name = {field.name: field.type for field in schema}
    paths = {name: kind for name in selection.needed if (kind := _type_at(schema, name)) is not None}
    selection.check([*schema.names, *paths], where)
    media, shapes = media_of(schema), shapes_of(schema)
    kinds = {name: paths[name] for name in selection.needed} if selection.needed else types_by_name
    if not kinds:
        raise DatasetError(f"{where} has no columns: there is nothing to pack")
    return tuple(field_of(n, kind, media.get(n, ""), where, shapes.get(n)) for n, kind in kinds.items())


def _type_at(schema: pa.Schema, name: str) -> pa.DataType | None:
    """The type of a column, or of a member of structs by its path `column.member`; None where there is none."""
    if name in schema.names:
        return schema.field(name).type
    first, *path = name.split(".")
    kind = schema.field(first).type if first in schema.names else None
    for member in path:
        if kind is None or not types.is_struct(kind) or kind.get_field_index(member) < 0:
            return None
        kind = kind.field(member).type
    return kind


def _column_at(batch: pa.RecordBatch, name: str) -> Any:
    """What `_type_at` gives the type of. A member is null where the struct is."""
    if name in batch.schema.names:
        return batch.column(name)
    first, *path = name.split(".")
    batch.column(first).validate(full=True)
    return pc.struct_field(batch.column(first), path)


def shapes_of(schema: pa.Schema) -> dict[str, tuple[int | None, ...]]:
    """Shapes of `Array2D` to `Array5D` columns, which Arrow holds as lists; the first axis may be of any length."""
    found = {}
    for name, feature in huggingface_features(schema).items():
        shape = feature.get("shape")
        if str(feature.get("_type")) in _ARRAYS and isinstance(shape, list) and shape:
            first_may_vary = [shape[0] or 0, *shape[1:]]
            if all(type(size) is int and size >= 0 for size in first_may_vary):
                found[name] = tuple(shape)
    return found


def media_of(schema: pa.Schema) -> dict[str, Any]:
    """How media columns are encoded, from the features that Hugging Face writes beside the schema."""
    features = huggingface_features(schema)
    return {n: _MEDIA_NAMES[f["_type"]] for n, f in features.items() if f.get("_type") in _MEDIA_NAMES}


def class_names_of(schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    found = {}
    for name, feature in huggingface_features(schema).items():
        names = feature.get("names")
        if feature.get("_type") == "ClassLabel" and isinstance(names, list):
            found[name] = tuple(map(str, names))
    return found


def huggingface_features(schema: pa.Schema) -> dict[str, dict[str, Any]]:
    data = (schema.metadata or {}).get(b"huggingface")
    try:
        features = from_json(data)["info"]["features"] if data else {}
    except (ValueError, KeyError, TypeError):
        return {}  # a note of another tool; the schema itself still says all types
    return {n: f for n, f in features.items() if isinstance(f, dict)} if isinstance(features, dict) else {}


def field_of(
    name: str, kind: pa.DataType, media: Any, where: str, shape: tuple[int | None, ...] | None = None
) -> Field:
    """The field of one column; `shape` of its lists, where a note beside the schema states it."""
    if isinstance(kind, pa.BaseExtensionType):
        if isinstance(kind, pa.FixedShapeTensorType):
            return Field(name, _dtype(kind.value_type, name, where), tuple(kind.shape))
        kind = kind.storage_type
    if types.is_dictionary(kind):
        return field_of(name, kind.value_type, media, where, shape)
    if shape is not None:
        element = kind
        for size in shape:
            if not _is_list(element) or (size is None and types.is_fixed_size_list(element)):
                raise DatasetError(f"{where}: column {name!r} holds {kind}, but is noted as an array of shape {shape}")
            element = element.value_type
        dtype = _dtype(element, name, where)
        sizes = tuple(size or 0 for size in shape)
        return Field(name, dtype, sizes) if shape[0] is not None else Field(name, dtype, sizes[1:], "ragged")
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return Field(name, "uint8", kind="text")
    if _is_binary(kind) or _is_media(kind):
        return Field(name, "uint8", kind="bytes", media=media)
    if types.is_fixed_size_list(kind):
        dtype, shape = _element(kind, name, where)
        return Field(name, dtype, shape)
    if types.is_list(kind) or types.is_large_list(kind):
        dtype, shape = _element(kind.value_type, name, where)
        return Field(name, dtype, shape, "ragged")
    return Field(name, _dtype(kind, name, where))


def _is_list(kind: pa.DataType) -> bool:
    return types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind)


def _is_binary(kind: pa.DataType) -> bool:
    test = (types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view)
    return any(is_kind(kind) for is_kind in test)


def _is_media(kind: pa.DataType) -> bool:
    return (
        types.is_struct(kind) and sorted(f.name for f in kind) == ["bytes", "path"] and _is_binary(kind["bytes"].type)
    )


def _element(kind: pa.DataType, name: str, where: str) -> tuple[str, tuple[int, ...]]:
    """dtype and shape of an element of a list, where lists of fixed size are further axes."""
    shape = []
    while types.is_fixed_size_list(kind):
        shape.append(kind.list_size)
        kind = kind.value_type
    return _dtype(kind, name, where), tuple(shape)


def _dtype(kind: pa.DataType, name: str, where: str) -> str:
    if types.is_boolean(kind):
        return "uint8"
    if types.is_integer(kind):
        return str(kind)
    if types.is_floating(kind):
        return {"halffloat": "float16", "float": "float32", "double": "float64"}[str(kind)]
    if types.is_temporal(kind) and not types.is_interval(kind):
        return "int64"
    members = f"name its members by path ({name}.{kind[0].name}), " if types.is_struct(kind) and len(kind) else ""
    raise DatasetError(f"{where}: column {name!r} holds {kind}, which is no field of a dataset: {members}{LEAVE_OUT}")


def chunks_of_batch(
    batch: pa.RecordBatch, fields: Sequence[Field], first_row: int, where: str, dropped: Dropped | None = None, *,
    checked: bool = False,
) -> Iterator[tuple[Chunk, np.ndarray]]:  # fmt: skip
    """The columns of `fields` as a chunk, and the number of each row in its file; nothing for no rows. Rows with a null
    are left out and counted in `dropped`, or an error where that is None.

    `checked` where another check (of Parquet's decoder) already holds that offsets lie within their buffers.
    """
    if not batch.num_rows:
        return
    numbers = np.arange(first_row, first_row + batch.num_rows)
    arrays, chunk = {}, {}
    for item in fields:
        try:
            arrays[item.name] = _validated(_column_at(batch, item.name), item, numbers, where, checked)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise _damaged(item, first_row, where, error) from error
    if dropped is not None and any(array.null_count for array in arrays.values()):
        valid = functools.reduce(pc.and_, (array.is_valid() for array in arrays.values()))
        arrays = {name: array.filter(valid) for name, array in arrays.items()}
        numbers = numbers[valid.to_numpy(zero_copy_only=False)]
        dropped.rows += batch.num_rows - len(numbers)
        if not len(numbers):
            return
    for item in fields:
        try:
            chunk[item.name] = column_of(arrays[item.name], item, numbers, where)
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise _damaged(item, first_row, where, error) from error
    yield chunk, numbers


def _damaged(item: Field, first_row: int, where: str, error: Exception) -> DatasetError:
    reason = " ".join(str(error).split())[:200]
    return DatasetError(f"{where}: column {item.name!r} is damaged near row {first_row}: {reason}")


def _validated(array: Any, item: Field, numbers: np.ndarray, where: str, checked: bool) -> Any:
    """The array with its values in place of a dictionary's; raises for text that is not UTF-8, and for damage."""
    if not checked or item.kind == "text":
        _validate(array, item, numbers, where)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    return array.dictionary_decode() if types.is_dictionary(array.type) else array


def column_of(array: Any, item: Field, numbers: np.ndarray, where: str) -> Column:
    """A validated Arrow array as what `item` says; `numbers` of its rows. Raises `DatasetError` naming the null's."""
    _no_nulls(array, item, numbers, where)
    if _is_media(array.type):
        array = _media_bytes(array, item, numbers, where)
    if item.kind in ("bytes", "text"):
        return _binary(array, item.kind)
    if item.kind == "ragged":
        values = array.flatten()
        _no_nulls(values, item, numbers, where, inside=True)
        offsets: np.ndarray = np.frombuffer(array.offsets.buffers()[1], _offset_dtype(array.type))
        offsets = offsets[array.offset : array.offset + len(array) + 1].astype(np.int64)
        return Ragged(_flat(values, item, numbers, where), offsets - offsets[0])
    if item.shape:
        return _flat(array, item, numbers, where)
    return _numbers(array, item.dtype)


def _validate(array: Any, item: Field, numbers: np.ndarray, where: str) -> None:
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error) and "UTF-8" not in str(error):
            raise
        if types.is_dictionary(array.type):
            raise DatasetError(f"{where}: {item.name!r} is not UTF-8 text near row {numbers[0]}") from error
        for row, value in enumerate(pc.cast(array, pa.large_binary())):
            try:
                (value.as_py() or b"").decode()
            except UnicodeDecodeError:
                raise DatasetError(
                    f"{where}: {item.name!r} of row {numbers[row]} is not UTF-8 text: repair it or store bytes"
                ) from error
        raise


def _no_nulls(array: Any, item: Field, numbers: np.ndarray, where: str, *, inside: bool = False) -> None:
    if not array.null_count:
        return
    row = pc.index(array.is_null(), True).as_py()
    place = f"near row {numbers[0]}: there is a null in a list" if inside else f"of row {numbers[row]} is null"
    raise DatasetError(f"{where}: {item.name!r} {place}: fill it in or drop such rows (--nulls drop), or {LEAVE_OUT}")


def _media_bytes(array: Any, item: Field, numbers: np.ndarray, where: str) -> Any:
    data = pc.struct_field(array, "bytes")
    if data.null_count:
        row = pc.index(data.is_null(), True).as_py()
        raise DatasetError(
            f"{where}: {item.name!r} of row {numbers[row]} holds the path of a file instead of its bytes: save the "
            f"dataset with its media embedded, or pack the folder of files"
        )
    return data


def _offset_dtype(kind: pa.DataType) -> type:
    return (
        np.int64
        if types.is_large_list(kind) or types.is_large_binary(kind) or types.is_large_string(kind)
        else np.int32
    )


def _binary(array: Any, kind: Any) -> Ragged:
    if types.is_string_view(array.type) or types.is_binary_view(array.type) or types.is_fixed_size_binary(array.type):
        array = array.cast(pa.large_binary() if kind == "bytes" else pa.large_string())
    _, offset_buffer, values = array.buffers()
    dtype = np.dtype(_offset_dtype(array.type))
    if not len(array) or offset_buffer is None:
        return Ragged(np.empty(0, np.uint8), np.zeros(len(array) + 1, np.int64), kind)
    offsets = np.frombuffer(offset_buffer, dtype, len(array) + 1, array.offset * dtype.itemsize).astype(np.int64)
    flat = np.frombuffer(values, np.uint8) if values is not None and values.size else np.empty(0, np.uint8)
    return Ragged(flat[offsets[0] : offsets[-1]], offsets - offsets[0], kind)


def _flat(array: Any, item: Field, numbers: np.ndarray, where: str) -> np.ndarray:
    """Numbers [-1, *shape] of lists within lists; raises where one has not as many elements as the shape says."""
    length, sizes = len(array), iter(item.shape)
    while _is_list(array.type):
        size = next(sizes)
        if not types.is_fixed_size_list(array.type):
            other = np.flatnonzero(array.value_lengths().to_numpy(zero_copy_only=False) != size)
            if len(other):
                near = numbers[int(other[0]) * len(numbers) // len(array)] if item.kind == "array" else numbers[0]
                raise DatasetError(
                    f"{where}: {item.name!r} of row {near} or soon after has a list of another length than {size}, as "
                    f"its shape {list(item.shape)} says: {LEAVE_OUT}"
                )
        array = array.flatten()
        _no_nulls(array, item, numbers, where, inside=True)
    return _numbers(array, item.dtype).reshape(length, *item.shape)


def _numbers(array: Any, dtype: str) -> np.ndarray:
    if types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    elif types.is_temporal(array.type):
        array = (array.cast(pa.int32()) if array.type.bit_width == 32 else array).cast(pa.int64())
    return array.to_numpy(zero_copy_only=True).astype(dtype, copy=False)


def check_batch_schema(batch: pa.RecordBatch, names: Mapping[str, Any], where: str) -> None:
    """Raises `DatasetError` where a batch lacks a column or holds it as another type."""
    for name, kind in names.items():
        index = batch.schema.get_field_index(name)
        if index < 0 or batch.schema.field(index).type != kind:
            have = "nothing" if index < 0 else batch.schema.field(index).type
            raise DatasetError(f"{where}: column {name!r} is {have}, where {kind} came first: give it one type")
