"""What the tests of all inputs share: every row of an input as Python values, whichever way it is partitioned."""

import pickle
import random
from typing import Any

import numpy as np

from turbopump.data.inputs.protocol import CHUNK_BYTES, Input, bytes_of, num_rows_of
from turbopump.data.ragged import Ragged


def values_of(column: Any) -> list[Any]:
    if isinstance(column, Ragged):
        return [value.tolist() if isinstance(value, np.ndarray) else value for value in column]
    return column.tolist()


def read_all(source: Input, target_bytes: int = 1 << 30, shuffle: bool = False) -> tuple[list[dict[str, Any]], list]:
    """Rows and keys of all partitions in order; read in any order, by a copy that another process could have."""
    partitions = list(source.partitions(target_bytes))
    assert [p.index for p in partitions] == list(range(len(partitions)))
    assert len({p.key for p in partitions}) == len(partitions)
    order = list(range(len(partitions)))
    if shuffle:
        random.Random(target_bytes).shuffle(order)
    found: dict[int, tuple[list, list]] = {}
    for index in order:
        copy, partition = pickle.loads(pickle.dumps((source, partitions[index])))
        rows: list[dict[str, Any]] = []
        keys: list[Any] = []
        for chunk, chunk_keys in copy.read(partition):
            assert set(chunk) == {item.name for item in source.fields}
            assert all(len(column) == num_rows_of(chunk) == len(chunk_keys) for column in chunk.values())
            assert num_rows_of(chunk) == 1 or sum(map(bytes_of, chunk.values())) <= CHUNK_BYTES
            for item in source.fields:
                column = chunk[item.name]
                values = column.values if isinstance(column, Ragged) else column
                assert values.dtype == item.dtype and values.shape[1:] == item.shape
                assert isinstance(column, Ragged) == (item.kind != "array")
            columns = {name: values_of(column) for name, column in chunk.items()}
            rows += [{n: values[i] for n, values in columns.items()} for i in range(num_rows_of(chunk))]
            keys += list(chunk_keys)
        found[index] = rows, keys
    return [r for i in sorted(found) for r in found[i][0]], [k for i in sorted(found) for k in found[i][1]]


def check_partitions(source: Input, targets: tuple[int, ...] = (1, 100, 1000, 10_000)) -> list[dict[str, Any]]:
    """The rows, after finding that rows and keys are the same for any target size and order of reading."""
    rows, keys = read_all(source)
    assert len(set(map(str, keys))) == len(keys)
    for target in targets:
        assert read_all(source, target, shuffle=True) == (rows, keys), target
    if source.num_rows is not None:
        assert source.num_rows == len(rows)
    return rows
