"""What of an operation its time may depend on, as numbers, for any kind of operation.

A `Case` is an operation as a row of a profile describes it. `Columns` turns cases into a matrix: logarithms of FLOPs,
bytes, sizes, operands and of the matrix product the operation amounts to; how full tiles of 16 and 64 are and how often
a size can be halved (kernels are chosen by these, and their cliffs stand there); a 0/1 column for each value of a word
or switch. Nothing is known of particular fields but the product, so a new kind of operation needs no change here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from turbopump.compute.ops import RNN_GATES
from turbopump.core.workload import Op
from turbopump.hardware.profile import Measurement, Scalar

Array = npt.NDArray[np.float64]
TILES = (16, 64)  # what vector units of a CPU and thread blocks of a GPU work in
LARGE = 32  # a size that never passes this has no tiles
NAMED = ("dtype",)  # rows of different dtypes are never mixed


@dataclass(frozen=True)
class Case:
    """An operation: its kind, its fields, its FLOPs and bytes."""

    kind: str
    fields: Mapping[str, Scalar]
    flops: float
    bytes: float

    @classmethod
    def of(cls, op: Op) -> Case:
        cost = op.cost
        values = {f.name: getattr(op, f.name) for f in fields(op)}
        return cls(type(op).__name__, values, cost.flops, cost.bytes)

    @classmethod
    def of_row(cls, row: Measurement) -> Case:
        return cls(row.kind, row.op, row.flops, row.bytes)

    @property
    def dtype(self) -> str:
        return str(self.fields.get("dtype", ""))

    @property
    def words(self) -> dict[str, str]:
        """Fields that name a choice: layout, direction, kind of cell, causal or not."""
        return {
            name: str(value)
            for name, value in self.fields.items()
            if isinstance(value, bool | str) and name not in NAMED
        }

    @property
    def sizes(self) -> dict[str, float]:
        return {name: float(v) for name, v in self.fields.items() if not isinstance(v, bool | str)}

    @property
    def product(self) -> dict[str, float]:
        """`m, n, k` of the matrix product the operation amounts to, by the fields it has; empty where to none."""
        given: Any = self.fields
        if {"m", "n", "k"} <= given.keys():
            return {name: float(given[name]) for name in "mnk"}
        if "out_channels" in given:  # m output positions of n channels, each a sum over k taps
            taps = prod(float(v) for name, v in given.items() if name.startswith("kernel"))
            n, k = float(given["out_channels"]), float(given["in_channels"]) / float(given.get("groups", 1)) * taps
            return {"m": self.flops / (2 * n * k), "n": n, "k": k}
        if "hidden_size" in given:  # of one step, and so many steps after one another
            return {
                "m": float(given["batch"]),
                "n": RNN_GATES[str(given["kind"])] * float(given["hidden_size"]),
                "k": float(given["hidden_size"]),
            }
        if "head_dim" in given:
            return {"m": float(given["q_len"]), "n": float(given["kv_len"]), "k": float(given["head_dim"])}
        return {}

    @property
    def steps(self) -> float:
        """Steps that must follow one another."""
        return float(self.fields.get("steps", self.fields.get("frames", 0)))


def _raw(case: Case) -> dict[str, float]:
    """Every number that may become a column, by a name that says how it is made."""
    raw = {f"size.{name}": value for name, value in case.sizes.items()}
    product = case.product
    raw |= {f"product.{name}": value for name, value in product.items()}
    if "out_channels" in case.fields:  # which operand is the large one decides between algorithms
        raw["output"], raw["weights"] = product["m"] * product["n"], product["n"] * product["k"]
        raw["input"] = prod(case.sizes.get(name, 1.0) for name in ("batch", "in_channels", "height", "width", "length"))
    if case.flops:
        raw["flops"] = case.flops
    if case.bytes:
        raw["bytes"] = case.bytes
    return raw


class Columns:
    """The columns that tell the given cases apart, standardised; made once, used for every prediction after."""

    def __init__(self, cases: Sequence[Case]) -> None:
        raw = [_raw(case) for case in cases]
        self._names = [n for n in raw[0] if all(n in row for row in raw) and len({row[n] for row in raw}) > 1]
        values = np.array([[row[name] for name in self._names] for row in raw], dtype=float)
        self._add = (values <= 0).any(axis=0).astype(float)  # padding may be 0: log(1 + x)
        self._drop_twins(values)
        self._tiled = [i for i, name in enumerate(self._names) if name.startswith("size.")
                       and (values[:, i] == np.round(values[:, i])).all() and values[:, i].max() > LARGE]  # fmt: skip
        words = [case.words for case in cases]
        self.words = {name: sorted({row[name] for row in words}) for name in words[0]}
        matrix = self._matrix(values, words)
        self._centre, spread = matrix.mean(axis=0), matrix.std(axis=0)
        self._kept = spread > 1e-9
        self._scale = np.where(self._kept, spread, 1.0)

    def _drop_twins(self, values: Array) -> None:
        """A product's m, n, k may be fields as well: the first stays (the list and the matrix are cut in place)."""
        seen: set[bytes] = set()
        self._twins = np.zeros(len(self._names), dtype=bool)
        for i in range(len(self._names)):
            column = values[:, i].tobytes()
            self._twins[i] = column in seen
            seen.add(column)

    def _matrix(self, values: Array, words: Sequence[Mapping[str, str]]) -> Array:
        logs = np.log(np.maximum(values + self._add, 1e-9))[:, ~self._twins]
        columns = [logs]
        for i in self._tiled:
            size = np.maximum(values[:, i], 1.0)
            columns += [np.log(np.ceil(size / tile) * tile / size)[:, None] for tile in TILES]
            columns.append(_halvings(size)[:, None])
        for name, known in self.words.items():
            columns.append(np.array([[row.get(name) == value for value in known] for row in words], dtype=float))
        return np.concatenate(columns, axis=1)

    def __call__(self, cases: Sequence[Case]) -> Array:
        """`[cases, columns]`."""
        raw = [_raw(case) for case in cases]
        values = np.array([[row[name] for name in self._names] for row in raw], dtype=float)
        matrix = self._matrix(values.reshape(len(cases), len(self._names)), [case.words for case in cases])
        scaled: Array = ((matrix - self._centre) / self._scale)[:, self._kept]
        return scaled

    def knows(self, case: Case) -> bool:
        """Whether every word of the case was among those the columns were made of (a layout, a direction)."""
        return all(value in self.words.get(name, ()) for name, value in case.words.items())


def _halvings(size: Array) -> Array:
    """How often a whole size can be halved, up to the larger tile's 6 times, in units of log 2."""
    times = np.zeros(len(size))
    for power in range(1, TILES[-1].bit_length()):
        times += size % (1 << power) == 0
    result: Array = times * np.log(2.0)
    return result
