"""A profile of a data sheet: whose curves it borrows, and that it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbopump.core.errors import CatalogError
from turbopump.hardware import datasheet
from turbopump.hardware.accelerators import device, link, names
from turbopump.hardware.datasheet import curves, distance, profile_from_datasheet, relatives
from turbopump.hardware.profile import Curve, check_same_machine, load, save
from turbopump.hardware.specs import DeviceSpec


def curve(relative: str, kind: str = "Gemm", dtype: str = "fp32", a: float = 0.5) -> Curve:
    return Curve(kind, dtype, {"a": a}, relative, f"table of {relative}", 0.09)


KNOWN = (
    curve("v100", a=0.7), curve("v100", dtype="fp16", a=0.6), curve("k40", a=0.9), curve("mi25", a=0.4),
    curve("a100", dtype="bf16", a=0.8), curve("v100", "Conv2d", a=0.3), curve("AMD EPYC (Zen 4)", "Norm", a=0.2),
)  # fmt: skip
FILE = """
[[curve]]
kind = "Gemm"
dtype = "fp32"
relative = "v100"
source = "a table"
error = 0.09
[curve.parameters]
peak = 0.8
half_k = 300

[[curve]]
kind = "Gemm"
dtype = "fp16"
relative = "t4"
source = "another"
parameters = { peak = 0.5 }
"""


def borrowed(name: str, known: tuple[Curve, ...] = KNOWN) -> dict[tuple[str, str], str]:
    return {(one.kind, one.dtype): one.relative for one in profile_from_datasheet(device(name), known=known).curves}


def test_the_nearest_of_the_vendor_lends_its_curves() -> None:
    h100 = borrowed("h100-sxm")
    assert h100[("Gemm", "fp32")] == "v100"  # not k40, which is further away
    assert h100[("Gemm", "bf16")] == "a100"
    assert borrowed("m40")[("Gemm", "fp32")] == "k40"
    assert borrowed("mi300x")[("Gemm", "fp32")] == "mi25"  # the vendor's, though v100 is nearer
    assert borrowed("gaudi3")[("Gemm", "fp32")] in ("v100", "k40", "mi25")  # no vendor's own: the nearest of all


def test_a_measured_device_keeps_its_own_curves() -> None:
    assert borrowed("v100-sxm2")[("Gemm", "fp16")] == "v100"
    assert borrowed("k40")[("Gemm", "fp32")] == "k40"


def test_the_named_relative_comes_first_and_others_fill_its_gaps() -> None:
    spec = replace(device("h100-sxm"), relative="k40")
    found = {(one.kind, one.dtype): one.relative for one in profile_from_datasheet(spec, known=KNOWN).curves}
    assert found[("Gemm", "fp32")] == "k40" and found[("Gemm", "bf16")] == "a100"
    assert relatives(spec, KNOWN)[0] == "k40"
    host = replace(spec, relative="AMD EPYC (Zen 4)")
    assert relatives(host, KNOWN)[0] == "AMD EPYC (Zen 4)"
    with pytest.raises(CatalogError, match="no device 'h1000'"):
        profile_from_datasheet(replace(spec, relative="h1000"), known=KNOWN)


def test_fp16_stands_in_for_bf16_and_the_curve_says_whose_it_is() -> None:
    known = tuple(one for one in KNOWN if one.dtype != "bf16")
    profile = profile_from_datasheet(device("h100-sxm"), known=known)
    (bf16,) = (one for one in profile.curves if one.dtype == "bf16")
    assert bf16 == replace(curve("v100", dtype="fp16", a=0.6), dtype="bf16")
    (said,) = (line for line in profile.uncertain if line.startswith("Gemm bf16"))
    assert said == (
        "Gemm bf16: efficiency of NVIDIA V100 SXM2 (table of v100) in fp16, off by 9% there (median); "
        "this device has 7.9 times its peak and 3.7 times its memory rate"
    )


def test_every_borrowed_curve_is_marked_and_every_missing_one_said() -> None:
    profile = profile_from_datasheet(device("h100-sxm"), known=KNOWN)
    assert profile.provenance == "datasheet" and profile.rows == () and profile.devices == (device("h100-sxm"),)
    for one in profile.curves:
        assert one.relative and any(line.startswith(f"{one.kind} {one.dtype}: effic") for line in profile.uncertain)
    assert any(line.startswith("Gemm in fp64, tf32, fp8, int8: measured nowhere") for line in profile.uncertain)
    assert any("it is not in the catalog" in line for line in profile.uncertain if line.startswith("Norm fp32"))
    assert any("(recalled)" in line for line in profile.uncertain)  # the entry's own note


def test_without_curves_there_are_peaks_alone_and_that_is_said() -> None:
    profile = profile_from_datasheet(device("tpu-v5p"), known=())
    assert profile.curves == () and any("those of the peaks alone" in line for line in profile.uncertain)


def test_an_announced_device_makes_a_hypothetical_profile() -> None:
    profile = profile_from_datasheet(device("rubin-sxm"), links=[link("nvlink6"), link("ib-xdr")], known=KNOWN)
    assert profile.provenance == "hypothetical" and [one.level for one in profile.links] == ["node", "rack"]


@pytest.mark.parametrize("name", names())
def test_every_device_of_the_catalog_makes_a_machine_file(name: str, tmp_path: Path) -> None:
    profile = profile_from_datasheet(device(name), known=KNOWN)
    save(profile, tmp_path / "machine.json")
    assert load(tmp_path / "machine.json") == profile
    check_same_machine(profile, "anything", "here", "machine.json")  # it is of no machine that could differ
    assert len({(one.kind, one.dtype) for one in profile.curves}) == len(profile.curves)


rates = st.floats(1e11, 1e16)
specs = st.builds(
    DeviceSpec, name=st.sampled_from(["A 1", "B 2"]),
    flops_per_s=st.dictionaries(st.sampled_from(["fp32", "bf16", "fp16"]), rates),
    memory_bytes_per_s=st.none() | rates,
)  # fmt: skip


@given(specs, specs)
def test_distance_is_symmetric_and_zero_to_oneself(one: DeviceSpec, other: DeviceSpec) -> None:
    assert distance(one, other) == pytest.approx(distance(other, one)) and distance(one, other) >= 0
    if one.flops_per_s and one.memory_bytes_per_s:
        assert distance(one, one) == 0


def test_a_file_of_curves(tmp_path: Path) -> None:
    (tmp_path / "curves.toml").write_text(FILE)
    first, second = curves(tmp_path / "curves.toml")
    assert first == Curve("Gemm", "fp32", {"peak": 0.8, "half_k": 300.0}, "v100", "a table", 0.09)
    assert second.error is None and second.parameters == {"peak": 0.5}


def test_the_catalog_s_own_curves_hold_where_there_are_any(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for one in curves():
        assert one.parameters and one.relative
    monkeypatch.setattr(datasheet, "CATALOG", tmp_path)
    assert curves() == ()
    (tmp_path / "curves.toml").write_text("")
    assert curves() == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (FILE.replace('kind = "Gemm"\n', "", 1), r"1 problem\n  curve 1\.kind: this key is needed"),
        (FILE.replace("half_k = 300", 'half_k = "300"'), r"curve 1\.parameters: .*a table of finite numbers"),
        (FILE.replace("half_k = 300", "half_k = nan"), r"curve 1\.parameters"),
        (FILE.replace("error = 0.09", "error = -1"), r"curve 1\.error: -1 given"),
        (FILE.replace('relative = "t4"', 'relation = "t4"'), r"2 problems\n.*\n.*did you mean 'relative'"),
        (
            FILE.replace('"t4"', '"v100"').replace('"fp16"', '"fp32"'),
            "curve 2: Gemm fp32 of v100 stands in curve 1 too",
        ),
        (FILE + "\n[extra]\nx = 1\n", r"extra: only \[\[curve\]\] tables"),
        ("[curve]\nkind = 'Gemm'\n", r"\[\[curve\]\] tables are needed, in double brackets"),
        ("curve = [1]\n", r"\[\[curve\]\] tables are needed"),
        ("[[curve", "not valid TOML"),
    ],
)
def test_a_mistake_in_a_file_of_curves(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "curves.toml").write_text(text)
    with pytest.raises(CatalogError, match=said):
        curves(tmp_path / "curves.toml")
    with pytest.raises(CatalogError, match="no file at"):
        curves(tmp_path / "absent.toml")
