"""machine.json: what is written is read back, and what is not a machine file is refused with the reason."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbopump.core.errors import ProfileError
from turbopump.core.files import from_json, to_json
from turbopump.core.workload import Op, OpCost
from turbopump.hardware.profile import (
    SCHEMA,
    Curve,
    MachineProfile,
    Measurement,
    Trial,
    check_same_machine,
    load,
    save,
)
from turbopump.hardware.specs import DeviceSpec, LinkSpec, StorageSpec
from turbopump.hardware.timing import Timing


@dataclass(frozen=True)
class Product(Op):
    """An operation of 2 m n FLOPs."""

    m: int
    n: int
    dtype: str = "fp32"

    @property
    def cost(self) -> OpCost:
        return OpCost(2.0 * self.m * self.n, 4.0 * (self.m + self.n))


TRIAL = Trial(Product(3, 5), route="default", threads=2)
TIMING = Timing("thread_cpu", runs=9, calls=4, min_s=1e-3, median_s=1.1e-3, p90_s=1.3e-3, wall_s=1.2e-3, waited=0.1)


def profile() -> MachineProfile:
    row = Measurement.of(TRIAL, "compute", TIMING, error=1e-7, library="MKL 2024.2", facts={"layout": "nt"})
    broken = Measurement.failed(Trial(Product(3, 5), "winograd"), "compute", "does not run: no such kernel")
    return MachineProfile(
        schema=SCHEMA, written_by="0.1.0", date="2026-11-01T10:00:00+00:00", name="amd-epyc-2c",
        provenance="measured", fingerprint="2bc6d27b3ce0077f", machine={"cpu": "AMD EPYC", "num_cores": 2},
        software={"torch": "2.13.0"}, devices=(DeviceSpec("AMD EPYC", {"fp32": 2e11}, memory_bytes=1 << 34),),
        links=(LinkSpec("loopback", "node", 1e9, 1e-4, "measured"),),
        storage=(StorageSpec("disk", 1e9, 5e8, 1e5, 1e-4, "measured"),), rows=(row, broken),
        curves=(Curve("Product", "fp32", {"a": 0.8}, "v100", "a table", 0.09),), quality={"spread": 0.1},
        left_out=("fp64",), uncertain=("page cache not dropped",), request={"budget_s": 30.0},
    )  # fmt: skip


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    save(profile(), tmp_path / "deep" / "machine.json")
    assert load(tmp_path / "deep" / "machine.json") == profile()
    assert load(str(tmp_path / "deep" / "machine.json")).rows[0].op == {"m": 3, "n": 5, "dtype": "fp32"}


def test_a_row_says_what_it_is_of_and_how_fast() -> None:
    row, broken = profile().rows
    assert row.key == TRIAL.key and row.op_key == TRIAL.op.key and row.dtype == "fp32"
    assert row.seconds == 1.1e-3 and row.works
    assert row.flops_per_s == pytest.approx(30 / 1e-3) and row.bytes_per_s == pytest.approx(32 / 1e-3)
    assert row.spread == pytest.approx(0.3 / 1.1) and not row.noisy
    assert replace(row, waited=0.5).noisy and replace(row, p90_s=2e-3).noisy
    assert not broken.works and broken.flops_per_s == 0 and broken.spread == 0
    with pytest.raises(ProfileError, match="no such kernel"):
        _ = broken.seconds


def test_rows_are_found_by_operation() -> None:
    whole = profile()
    assert whole.find(Product(3, 5)) == list(whole.rows) and whole.find(Product(3, 6)) == []
    assert list(whole.of_kind("Product")) == [whole.rows[0]]
    assert len(list(whole.of_kind("Product", works=False))) == 2
    assert list(whole.of_kind("Product", "bf16")) == [] and list(whole.of_kind("Other")) == []


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no machine file at .*turbopump probe --output"):
        load(tmp_path / "machine.json")
    with pytest.raises(ProfileError, match="cannot read"):
        load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"machine", b"\xff\xfe{}", b'{"schema": 1, "rows": [}'])
def test_not_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "machine.json").write_bytes(content)
    with pytest.raises(ProfileError, match="not valid JSON"):
        load(tmp_path / "machine.json")


def test_lists_too_deep_to_read(tmp_path: Path) -> None:
    for begin in (
        b"[",
        b'{"a":',
        b'{"schema": 1, "devices": [], "rows": [',
        b'{"schema": 1, "rows": [], "machine": {"a":[',
    ):
        (tmp_path / "machine.json").write_bytes(begin + b"[" * 100_000)
        with pytest.raises(ProfileError, match="not valid JSON"):
            load(tmp_path / "machine.json")


def test_a_row_of_zeros_divides_by_nothing(tmp_path: Path) -> None:
    row = replace(profile().rows[0], median_s=0.0, min_s=0.0, p90_s=0.0)
    assert (row.spread, row.flops_per_s, row.bytes_per_s) == (0, 0, 0)


@pytest.mark.parametrize("content", [b"[]", b"3", b"null", b'{"rows": []}', b'{"schema": 1}'])
def test_json_of_something_else(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "machine.json").write_bytes(content)
    with pytest.raises(ProfileError, match="not a machine file"):
        load(tmp_path / "machine.json")


def test_another_schema(tmp_path: Path) -> None:
    (tmp_path / "machine.json").write_bytes(to_json({"schema": 7, "written_by": "9.9.0", "rows": []}))
    with pytest.raises(ProfileError, match=r"schema 7, written by turbopump 9\.9\.0; .*reads schema 1"):
        load(tmp_path / "machine.json")


@pytest.mark.parametrize(
    ("change", "path"),
    [
        (lambda table: table["rows"][1].update(median_s="fast"), r"\$\.rows\[1\]\.median_s"),
        (lambda table: table["devices"][0]["flops_per_s"].update(fp32=[1]), r"\$\.devices\[0\]\.flops_per_s"),
        (lambda table: table.pop("devices"), "devices"),
        (lambda table: table.update(provenance="guessed"), r"\$\.provenance"),
        (lambda table: table["rows"][0].update(domain="magic"), r"\$\.rows\[0\]\.domain"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_by_its_path(tmp_path: Path, change: Any, path: str) -> None:
    table = from_json(to_json(profile()))
    change(table)
    (tmp_path / "machine.json").write_bytes(to_json(table))
    with pytest.raises(ProfileError, match=path):
        load(tmp_path / "machine.json")


def test_another_machine_is_refused_with_both_names() -> None:
    known = profile()
    check_same_machine(known, known.fingerprint, "amd-epyc-2c", "machine.json")
    with pytest.raises(ProfileError, match=r"amd-epyc-2c .*intel-xeon-96c .*--overwrite"):
        check_same_machine(known, "another", "intel-xeon-96c", "machine.json")
    check_same_machine(replace(known, provenance="datasheet"), "another", "intel-xeon-96c", "machine.json")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested value, as the keys that lead there."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def load_or_refuse(path: Path) -> None:
    """Reading a file gives a profile that can be worked with, or `ProfileError`; anything else fails the test."""
    try:
        found = load(path)
    except ProfileError:
        return
    for row in found.rows:
        _ = row.key, row.noisy, row.dtype, row.works and row.seconds
    save(found, path.with_name("again.json"))
    assert load(path.with_name("again.json")) == found


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), value=JSON, drop=st.booleans())
def test_any_value_anywhere_is_read_or_refused(tmp_path: Path, data: st.DataObject, value: Any, drop: bool) -> None:
    table = from_json(to_json(profile()))
    place = data.draw(st.sampled_from(places(table)))
    if not place:
        table = value
    else:
        parent = table
        for key in place[:-1]:
            parent = parent[key]
        if drop:
            del parent[place[-1]]
        else:
            parent[place[-1]] = value
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(table))
    load_or_refuse(path)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 5000), junk=st.binary(max_size=8))
def test_a_file_cut_short_or_overwritten_is_read_or_refused(tmp_path: Path, cut: int, junk: bytes) -> None:
    whole = to_json(profile())
    cut %= len(whole)
    path = tmp_path / "machine.json"
    path.write_bytes(whole[:cut] + junk)
    load_or_refuse(path)
    path.write_bytes(whole[:cut] + junk + whole[cut + len(junk) :])
    load_or_refuse(path)
