"""Devices and links by name: the catalog of data sheets (`catalog/*.toml`), or a file of the user's own.

    device("h100-sxm")              an id, an alias or the name in full; capitals do not matter
    device("my_chip.toml")          the one device of a file in the catalog's form
    device("chips.toml:my-chip")    one of several

In the files every number has its unit in its key (`bf16_tflops`, `memory_gib`); in memory it is in base units. A key
that is not known, a value of the wrong type or not above zero is an error with file, entry and key: a peak read wrong
would make every prediction from it wrong. Errors are `CatalogError`s.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast, get_args

from turbopump.core.errors import CatalogError
from turbopump.hardware.specs import DeviceSpec, LinkSpec, Provenance

CATALOG = files("turbopump.hardware") / "catalog"
NOT_DEVICES = ("links.toml", "curves.toml")
PEAKS = {
    "fp64_tflops": "fp64", "fp32_tflops": "fp32", "tf32_tflops": "tf32", "bf16_tflops": "bf16", "fp16_tflops": "fp16",
    "fp8_tflops": "fp8", "int8_tops": "int8",
}  # fmt: skip
LEVELS = ("device", "node", "rack", "pod")
Spec = TypeVar("Spec", DeviceSpec, LinkSpec)
Check = Callable[[Any], str]
"""What a value should be, where it is not; empty where it is right."""


def positive(value: Any) -> str:
    right = isinstance(value, int | float) and not isinstance(value, bool) and 1e-9 <= value <= 1e12
    return "" if right else "a number above 0 is needed, without quotes (leave the key out where it is not known)"


def text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else 'a text is needed, e.g. "H100 data sheet"'


def texts(value: Any) -> str:
    right = isinstance(value, list) and all(isinstance(item, str) and item.strip() for item in value)
    return "" if right else 'a list of texts is needed, e.g. ["h100"]'


def one_of(*allowed: str) -> Check:
    return lambda value: "" if value in allowed else f"one of {', '.join(allowed)} is needed"


_BOTH: dict[str, Check] = {
    "name": text, "provenance": one_of(*get_args(Provenance)), "source": text, "aliases": texts,
}  # fmt: skip
DEVICE_KEYS: dict[str, Check] = {
    **dict.fromkeys(PEAKS, positive), "memory_gib": positive, "memory_tb_per_s": positive, "clock_mhz": positive,
    "power_w": positive, "usd_per_hour": positive, "note": text, "relative": text, "reported_as": texts, **_BOTH,
}  # fmt: skip
LINK_KEYS: dict[str, Check] = {"level": one_of(*LEVELS), "gb_per_s": positive, "latency_us": positive, **_BOTH}


@dataclass(frozen=True)
class Catalog(Generic[Spec]):
    """Entries by id, with the other names they go by."""

    specs: Mapping[str, Spec]
    other_names: Mapping[str, str]
    """Alias, full name or a driver's name, in lower case, to the id."""

    def find(self, name: str) -> Spec | None:
        key = name.strip().lower()
        return self.specs.get(key) or self.specs.get(self.other_names.get(key, ""))


def names() -> list[str]:
    """Ids of all devices of the catalog."""
    return sorted(_devices().specs)


def link_names() -> list[str]:
    """Ids of all links of the catalog."""
    return sorted(_links().specs)


def device(name: str) -> DeviceSpec:
    """The device of that id, alias or name, or of a TOML file (`FILE.toml`, `FILE.toml:ENTRY`)."""
    if found := _devices().find(name):
        return found
    if ".toml" in name:
        return _of_file(name, _read_devices)
    raise _unknown("device", name, _devices())


def link(name: str) -> LinkSpec:
    """The link of that id, alias or name, or of a TOML file (`FILE.toml`, `FILE.toml:ENTRY`)."""
    if found := _links().find(name):
        return found
    if ".toml" in name:
        return _of_file(name, _read_links)
    raise _unknown("link", name, _links())


def reported_as(name: str) -> DeviceSpec | None:
    """The device that a driver calls so, e.g. `NVIDIA H100 80GB HBM3`; None where the catalog knows none."""
    return _devices().find(name)


def _unknown(what: str, name: str, catalog: Catalog[Any]) -> CatalogError:
    known = {**{key: key for key in catalog.specs}, **catalog.other_names}
    close = list(dict.fromkeys(known[match] for match in difflib.get_close_matches(name.lower(), known, 3)))
    hint = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
    listed = "" if close else f" (known: {', '.join(sorted(catalog.specs))})"
    return CatalogError(f"no {what} {name!r}{hint}{listed}; a TOML file of your own does as well: FILE.toml:ENTRY")


def _of_file(name: str, read: Callable[[Path], Catalog[Spec]]) -> Spec:
    path, _, entry = name.partition(".toml")
    catalog = read(Path(f"{path}.toml"))
    wanted = entry.removeprefix(":")
    if wanted and (found := catalog.find(wanted)):
        return found
    if not wanted and len(catalog.specs) == 1:
        return next(iter(catalog.specs.values()))
    given = f"it has no entry {wanted!r}" if wanted else f"it has {len(catalog.specs)} entries"
    allowed = " or ".join(f"{path}.toml:{key}" for key in catalog.specs) or "an entry such as [my-chip] in it"
    raise CatalogError(f"{name}: {given}: use {allowed}")


@cache
def _devices() -> Catalog[DeviceSpec]:
    """All device files of the package as one; an id or alias given twice is an error."""
    paths = [path for path in CATALOG.iterdir() if path.name.endswith(".toml") and path.name not in NOT_DEVICES]
    specs: dict[str, DeviceSpec] = {}
    other_names: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: path.name):
        part = _read_devices(path)
        twice = (specs.keys() | other_names.keys()) & (part.specs.keys() | part.other_names.keys())
        if twice:
            raise CatalogError(f"{path}: {sorted(twice)[0]!r} stands in another file too: names must differ")
        specs |= part.specs
        other_names |= part.other_names
    return Catalog(specs, other_names)


@cache
def _links() -> Catalog[LinkSpec]:
    return _read_links(CATALOG / "links.toml")


def _read_devices(path: Path | Traversable) -> Catalog[DeviceSpec]:
    return _read(path, DEVICE_KEYS, ("name",), _device_of)


def _read_links(path: Path | Traversable) -> Catalog[LinkSpec]:
    return _read(path, LINK_KEYS, ("name", "level", "gb_per_s", "latency_us"), _link_of)


def _device_of(row: Mapping[str, Any]) -> DeviceSpec:
    def scaled(key: str, unit: float) -> float | None:
        return float(f"{row[key] * unit:.12g}") if key in row else None

    return DeviceSpec(
        name=row["name"],
        flops_per_s={dtype: cast(float, scaled(key, 1e12)) for key, dtype in PEAKS.items() if key in row},
        memory_bytes=round(row["memory_gib"] * (1 << 30)) if "memory_gib" in row else None,
        memory_bytes_per_s=scaled("memory_tb_per_s", 1e12),
        power_w=scaled("power_w", 1.0),
        clock_hz=scaled("clock_mhz", 1e6),
        usd_per_hour=scaled("usd_per_hour", 1.0),
        provenance=row.get("provenance", "datasheet"),
        source=row.get("source", ""),
        note=row.get("note", ""),
        relative=row.get("relative", ""),
    )


def _link_of(row: Mapping[str, Any]) -> LinkSpec:
    return LinkSpec(
        name=row["name"],
        level=row["level"],
        bytes_per_s=float(f"{row['gb_per_s'] * 1e9:.12g}"),
        latency_s=float(f"{row['latency_us'] * 1e-6:.12g}"),
        provenance=row.get("provenance", "datasheet"),
        source=row.get("source", ""),
    )


def _read(
    path: Path | Traversable, keys: Mapping[str, Check], needed: tuple[str, ...], make: Callable[[Any], Spec]
) -> Catalog[Spec]:
    """The entries of one file, all checked; raises `CatalogError` with every problem of it."""
    table = read_toml(path)
    source = table.pop("source", None)
    problems = [] if source is None or not text(source) else [f"source: {source!r} given; {text(source)}"]
    rows: dict[str, dict[str, Any]] = {}
    for key, row in table.items():
        if not isinstance(row, dict):
            problems.append(f"{key}: {row!r} given; a table [{key}] with {', '.join(needed)} is needed")
            continue
        problems += problems_of(row, keys, needed, key)
        rows[key.lower()] = {"source": source, **row} if source else row
    if problems:
        raise invalid(path, problems)
    other_names: dict[str, str] = {}
    for key, name in [(entry, name.lower()) for entry in rows for name in _other_names(rows[entry])]:
        if other_names.setdefault(name, key) != key or (name in rows and name != key):
            raise invalid(path, [f"{key}: the name {name!r} belongs to another entry too: names must differ"])
    return Catalog({key: make(rows[key]) for key in rows}, other_names)


def _other_names(row: Mapping[str, Any]) -> list[str]:
    return [row["name"], *row.get("aliases", []), *row.get("reported_as", [])]


def read_toml(path: Path | Traversable) -> dict[str, Any]:
    """The table of a TOML file; raises `CatalogError` where there is none."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CatalogError(f"no file at {path}: give one with entries in the form of the catalog's files") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise CatalogError(f"{path} is not valid TOML: {error}") from error


def problems_of(row: Mapping[str, Any], keys: Mapping[str, Check], needed: tuple[str, ...], where: str) -> list[str]:
    """What is wrong with one entry, a line a key: unknown keys, missing ones, values that are not allowed."""
    problems = [f"{where}.{key}: this key is needed" for key in needed if key not in row]
    for key, value in row.items():
        if key not in keys:
            close = difflib.get_close_matches(key, keys, 1) or [k for k in keys if k.startswith(f"{key}_")][:1]
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(keys)}"
            problems.append(f"{where}.{key}: no such key (each names its unit); {hint}")
        elif wrong := keys[key](value):
            problems.append(f"{where}.{key}: {value!r} given; {wrong}")
    return problems


def invalid(path: Path | Traversable, problems: list[str]) -> CatalogError:
    """The error of a file with these problems."""
    head = f"{path}: {len(problems)} problem{'s' if len(problems) != 1 else ''}"
    return CatalogError("\n".join([head, *(f"  {problem}" for problem in problems)]))
