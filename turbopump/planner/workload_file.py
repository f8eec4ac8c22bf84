"""`workload.json`: a model as operations, written where torch is (training/trace_workload.py) and read where it is not.

Every operation stands with its kind and its fields, as `core.workload.Op` names them, so that any process can write
one. A kind or field that is not known, or a value of another type, is an error with its place in the file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from turbopump.compute.ops import OPS
from turbopump.core.errors import UsageError
from turbopump.core.files import from_json, to_json, write_atomic
from turbopump.core.version import VERSION
from turbopump.core.workload import DTYPE_BYTES, Block, Op, Workload

SCHEMA = 1
KIND = "workload"
_WHOLE = ("samples", "units", "tied_params")


def is_workload(table: Any) -> bool:
    """Whether a JSON value says that it is one, of whatever schema."""
    return isinstance(table, dict) and table.get("kind") == KIND


def save(workload: Workload, path: Path | str) -> None:
    """Write workload.json in one piece; raises `RunDirectoryError` where the disk does not take it."""
    write_atomic(Path(path), to_json(to_table(workload), indent=True))


def load(path: Path | str) -> Workload:
    """The workload at `path`; raises `UsageError` for a missing or damaged file, or one of another schema."""
    path = Path(path)
    try:
        table = from_json(path.read_bytes())
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON ({error}): trace the model again") from error
    return from_table(table, str(path))


def to_table(workload: Workload) -> dict[str, Any]:
    """Plain values of a workload."""
    return {
        "schema": SCHEMA, "kind": KIND, "written_by": VERSION, "name": workload.name, "samples": workload.samples,
        "units": workload.units, "unit": workload.unit, "dtype": workload.dtype, "tied_params": workload.tied_params,
        "blocks": [
            {"name": block.name, "count": block.count, "params": block.params, "kept_bytes": dict(block.kept_bytes),
             "forward": [_op_table(op) for op in block.forward], "backward": [_op_table(op) for op in block.backward]}
            for block in workload.blocks
        ],
        "optimizer_ops": [_op_table(op) for op in workload.optimizer_ops],
    }  # fmt: skip


def _op_table(op: Op) -> dict[str, Any]:
    return {"op": type(op).__name__, **{f.name: getattr(op, f.name) for f in fields(op)}}


def from_table(table: Any, where: str = "workload") -> Workload:
    """A workload of plain values; raises `UsageError` naming the first thing that is wrong."""
    if not is_workload(table):
        raise UsageError(
            f'{where} is no workload ("kind" is not "{KIND}"): turbopump.training.trace_workload writes one'
        )
    if table.get("schema") != SCHEMA:
        raise UsageError(
            f"{where} has schema {table.get('schema')!r}, written by turbopump {table.get('written_by', 'unknown')}; "
            f"this is {VERSION}, which reads schema {SCHEMA}: trace the model again"
        )
    reader = _Reader(where)
    blocks = tuple(reader.block(row, f"blocks[{i}]") for i, row in enumerate(reader.rows(table, "blocks", "")))
    if not blocks:
        raise UsageError(f"{where}: blocks: none given; a model has at least one")
    whole = {name: reader.number(table, name, "", 0 if name == "tied_params" else 1) for name in _WHOLE}
    dtype = reader.text(table, "dtype", "")
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"{where}: dtype: {dtype!r} given; one of {', '.join(DTYPE_BYTES)} is needed")
    return Workload(
        reader.text(table, "name", ""), blocks, whole["samples"], whole["units"], reader.text(table, "unit", ""), dtype,
        whole["tied_params"], reader.ops(table, "optimizer_ops", ""),
    )  # fmt: skip


@dataclass(frozen=True)
class _Reader:
    """Reads values and says where in which file one is wrong."""

    where: str

    def wrong(self, place: str, given: Any, needed: str) -> UsageError:
        return UsageError(f"{self.where}: {place}: {given!r} given; {needed} is needed")

    def rows(self, table: Mapping[str, Any], name: str, place: str) -> list[Any]:
        value = table.get(name)
        if not isinstance(value, list):
            raise self.wrong(f"{place}{name}", value, "a list")
        return value

    def text(self, table: Mapping[str, Any], name: str, place: str) -> str:
        value = table.get(name)
        if not isinstance(value, str) or not value.strip():
            raise self.wrong(f"{place}{name}", value, "a text")
        return value

    def number(self, table: Mapping[str, Any], name: str, place: str, least: int) -> int:
        value = table.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 63:
            raise self.wrong(f"{place}{name}", value, f"a whole number of at least {least}")
        return value

    def block(self, row: Any, place: str) -> Block:
        if not isinstance(row, dict):
            raise self.wrong(place, row, "a table with name, count, params, kept_bytes, forward and backward")
        kept = row.get("kept_bytes")
        if not isinstance(kept, dict) or "none" not in kept:
            raise self.wrong(f"{place}.kept_bytes", kept, 'a table of bytes by recompute mode, with "none" at least,')
        modes = {mode: self.number(kept, mode, f"{place}.kept_bytes.", 0) for mode in kept}
        return Block(
            self.text(row, "name", f"{place}."), self.ops(row, "forward", f"{place}."),
            self.ops(row, "backward", f"{place}."), self.number(row, "params", f"{place}.", 0), modes,
            self.number(row, "count", f"{place}.", 1),
        )  # fmt: skip

    def ops(self, table: Mapping[str, Any], name: str, place: str) -> tuple[Op, ...]:
        rows = self.rows(table, name, place)
        return tuple(self.op(row, f"{place}{name}[{i}]") for i, row in enumerate(rows))

    def op(self, row: Any, place: str) -> Op:
        if not isinstance(row, dict) or row.get("op") not in OPS:
            given = row.get("op") if isinstance(row, dict) else row
            raise self.wrong(place, given, f"an operation (one of {', '.join(OPS)})")
        cls = OPS[row["op"]]
        values = {name: value for name, value in row.items() if name != "op"}
        hints = get_type_hints(cls)
        known = {f.name for f in fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise self.wrong(f"{place}.{name}", value, f"no such field; one of {', '.join(sorted(known))}")
            if hints[name] is int:
                self.number(values, name, f"{place}.", 0)
            elif type(value) is not (bool if hints[name] is bool else str):
                raise self.wrong(f"{place}.{name}", value, "true or false" if hints[name] is bool else "a text")
        try:
            op = cls(**values)
            cost = op.cost
        except (TypeError, KeyError, ValueError, ZeroDivisionError, AttributeError) as error:
            raise UsageError(f"{self.where}: {place}: {row['op']} cannot be made of these fields: {error}") from error
        if not (math.isfinite(cost.flops) and math.isfinite(cost.bytes) and min(cost.flops, cost.bytes) >= 0):
            raise self.wrong(place, row["op"], "an operation of finite FLOPs and bytes")
        return op
