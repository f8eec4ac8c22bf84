"""A machine profile made of a data sheet alone: its peaks, and the efficiency of the nearest device that was measured.

What a device reaches of its peak depends on operation and size; a data sheet does not say. `catalog/curves.toml`
holds efficiency curves that were fitted to published measurements (`turbopump.compute.cost` knows their form;
`python -m benchmarks.curves` writes them). A device without measurements borrows them: from the relative that its
entry names, else from the device of its vendor that is nearest in peak and memory rate, else from the nearest of
all. Every borrowed curve says whose it is, and the profile lists under `uncertain` what rests on it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from turbopump.core.errors import CatalogError
from turbopump.core.version import VERSION
from turbopump.hardware.accelerators import CATALOG, Check, device, invalid, positive, problems_of, read_toml, text
from turbopump.hardware.profile import SCHEMA, Curve, MachineProfile
from turbopump.hardware.specs import DeviceSpec, LinkSpec

STAND_INS = {"bf16": "fp16", "fp16": "bf16"}
"""The same units at the same rate, where tensor cores have both."""
UNKNOWN_RATIO = math.log(1000)  # a relative that cannot be compared is as far away as one 1000 times as fast


def _number_table(value: Any) -> str:
    numbers = isinstance(value, dict) and all(
        isinstance(item, int | float) and not isinstance(item, bool) and math.isfinite(item) for item in value.values()
    )
    return "" if numbers else "a table of finite numbers is needed"


CURVE_KEYS: dict[str, Check] = {
    "kind": text, "dtype": text, "relative": text, "source": text, "error": positive, "parameters": _number_table,
}  # fmt: skip


def curves(path: Path | Traversable | None = None) -> tuple[Curve, ...]:
    """The curves of a file (the catalog's by default; none where that is not there); raises `CatalogError`."""
    if path is None:
        path = CATALOG / "curves.toml"
        if not path.is_file():
            return ()
    table = read_toml(path)
    rows = table.pop("curve", [])
    problems = [f"{key}: only [[curve]] tables are allowed here" for key in table]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise invalid(path, [*problems, "curve: [[curve]] tables are needed, in double brackets"])
    for number, row in enumerate(rows, 1):
        needed = tuple(key for key in CURVE_KEYS if key != "error")
        problems += problems_of(row, CURVE_KEYS, needed, f"curve {number}")
    if problems:
        raise invalid(path, problems)
    places: dict[tuple[str, ...], int] = {}
    for number, row in enumerate(rows, 1):
        first = places.setdefault((row["kind"], row["dtype"], row["relative"]), number)
        if first != number:
            twice = f"{row['kind']} {row['dtype']} of {row['relative']}"
            raise invalid(path, [f"curve {number}: {twice} stands in curve {first} too: one of them is needed"])
    return tuple(
        Curve(row["kind"], row["dtype"], {key: float(value) for key, value in row["parameters"].items()},
              row["relative"], row["source"], row.get("error"))
        for row in rows
    )  # fmt: skip


def profile_from_datasheet(
    spec: DeviceSpec, *, links: Sequence[LinkSpec] = (), known: Iterable[Curve] | None = None
) -> MachineProfile:
    """The profile of a device that nobody measured here, with the curves of its nearest measured relatives.

    `known` are the curves to choose from: those of the catalog by default. Raises `CatalogError` where `spec` names a
    relative that the catalog does not hold.
    """
    available = tuple(curves() if known is None else known)
    chosen, uncertain = _borrowed(spec, available)
    return MachineProfile(
        schema=SCHEMA,
        written_by=VERSION,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        name=spec.name,
        provenance=spec.provenance,
        fingerprint="",
        machine={"device": spec.name, "source": spec.source},
        software={},
        devices=(spec,),
        links=tuple(links),
        curves=chosen,
        uncertain=(*([f"{spec.name}: {spec.note}"] if spec.note else []), *uncertain),
    )


def _borrowed(spec: DeviceSpec, available: Sequence[Curve]) -> tuple[tuple[Curve, ...], list[str]]:
    """A curve a kind and dtype of the device, each from the first in the order of relatives that has one."""
    order = relatives(spec, available)
    by_relative: dict[str, dict[tuple[str, str], Curve]] = {}
    for curve in available:
        by_relative.setdefault(curve.relative, {}).setdefault((curve.kind, curve.dtype), curve)
    chosen: list[Curve] = []
    uncertain: list[str] = []
    for kind in dict.fromkeys(curve.kind for curve in available):
        found = {dtype: _first(by_relative, order, kind, dtype) for dtype in spec.flops_per_s}
        for dtype, best in found.items():
            if best is not None:
                uncertain.append(_said(spec, dtype, best))
                chosen.append(replace(best, dtype=dtype))
        if lacking := [dtype for dtype, best in found.items() if best is None]:
            uncertain.append(
                f"{kind} in {', '.join(lacking)}: measured nowhere; its times are those of the peaks alone"
            )
    if not available:
        uncertain.append(
            "no efficiency curves: times are those of the peaks alone, the median error of which was 30-54 % on "
            "DeepBench's devices"
        )
    return tuple(chosen), uncertain


def _first(
    by_relative: Mapping[str, Mapping[tuple[str, str], Curve]], order: Sequence[str], kind: str, dtype: str
) -> Curve | None:
    for wanted in (dtype, STAND_INS.get(dtype)):
        for relative in order:
            if wanted and (curve := by_relative[relative].get((kind, wanted))):
                return curve
    return None


def relatives(spec: DeviceSpec, available: Iterable[Curve]) -> list[str]:
    """Devices that curves were measured on, the best to borrow from first.

    First the device itself, then `spec.relative`, then those of its vendor by `distance`, then all others. A relative
    that the catalog does not hold (a host) cannot be compared and stands last, unless `spec.relative` names it.
    """
    named = spec.relative and _full_name(spec.relative)
    candidates = list(dict.fromkeys(curve.relative for curve in available))
    if named and named not in map(_full_name, candidates):
        device(spec.relative)  # a relative that exists nowhere is a mistake of the entry, and said

    def rank(relative: str) -> tuple[int, float, str]:
        other = _find(relative)
        if _full_name(relative) == spec.name:
            return 0, 0.0, relative
        if named == _full_name(relative):
            return 1, 0.0, relative
        if other is None:
            return 4, 0.0, relative
        return (2 if _vendor(other) == _vendor(spec) else 3), distance(spec, other), relative

    return sorted(candidates, key=rank)


def distance(one: DeviceSpec, other: DeviceSpec) -> float:
    """How unlike two devices are: |log| of the ratio of their peaks (the mean over the dtypes that both have, bf16 and
    fp16 taken for each other where they share none), plus that of their memory rates."""
    common = [(dtype, dtype) for dtype in one.flops_per_s if dtype in other.flops_per_s]
    pairs = common or [(a, b) for a, b in STAND_INS.items() if a in one.flops_per_s and b in other.flops_per_s]
    ratios = [abs(math.log(one.flops_per_s[a] / other.flops_per_s[b])) for a, b in pairs]
    peak = sum(ratios) / len(ratios) if ratios else UNKNOWN_RATIO
    if one.memory_bytes_per_s and other.memory_bytes_per_s:
        return peak + abs(math.log(one.memory_bytes_per_s / other.memory_bytes_per_s))
    return peak + UNKNOWN_RATIO


def _said(spec: DeviceSpec, dtype: str, curve: Curve) -> str:
    """The line of `uncertain` for a borrowed curve: whose it is, how far away that is, how good it was there."""
    other = _find(curve.relative)
    line = f"{curve.kind} {dtype}: efficiency of {other.name if other else curve.relative} ({curve.source})"
    if curve.dtype != dtype:
        line += f" in {curve.dtype}"
    if curve.error is not None:
        line += f", off by {curve.error:.0%} there (median)"
    if other is None:
        return f"{line}; it is not in the catalog, so how alike they are is not known"
    if _full_name(curve.relative) == spec.name:
        return line
    ratios = []
    if dtype in spec.flops_per_s and curve.dtype in other.flops_per_s:
        ratios.append(f"{spec.flops_per_s[dtype] / other.flops_per_s[curve.dtype]:.2g} times its peak")
    if spec.memory_bytes_per_s and other.memory_bytes_per_s:
        ratios.append(f"{spec.memory_bytes_per_s / other.memory_bytes_per_s:.2g} times its memory rate")
    return f"{line}; this device has {' and '.join(ratios)}" if ratios else line


def _find(relative: str) -> DeviceSpec | None:
    try:
        return device(relative)
    except CatalogError:
        return None


def _full_name(relative: str) -> str:
    """The catalog's name of a relative, however it was written; as written where the catalog does not hold it."""
    found = _find(relative)
    return found.name if found else relative


def _vendor(spec: DeviceSpec) -> str:
    """The first word of the name, as the catalog writes names: `NVIDIA H100 SXM`."""
    return spec.name.partition(" ")[0].lower()
