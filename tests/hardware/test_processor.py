"""Theoretical peaks of processors, from samples of /proc/cpuinfo, and the measured clock."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbopump.hardware import clock, processor
from turbopump.hardware.accelerators import device
from turbopump.hardware.processor import operations_per_cycle, parse_cpuinfo, processor_spec, raise_to

AVX2 = "fma avx2"
AVX512 = f"{AVX2} avx512f"
SERVER = f"{AVX512} avx512_vnni"
AMX = f"{SERVER} avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_int8"


def cpuinfo(vendor: str, family: int, model: int, flags: str, name: str = "A processor", mhz: str = "2600.0") -> str:
    return (
        f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\nmodel\t\t: {model}\nmodel name\t: {name}\n"
        f"cpu MHz\t\t: {mhz}\nflags\t\t: fpu {flags}\n\nprocessor\t: 1\nvendor_id\t: other\nflags\t: none\n"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (cpuinfo("AuthenticAMD", 0x17, 0x01, AVX2), {"fp64": 8, "fp32": 16}),  # Zen
        (cpuinfo("AuthenticAMD", 0x17, 0x31, AVX2), {"fp64": 16, "fp32": 32}),  # Rome
        (cpuinfo("AuthenticAMD", 0x19, 0x01, AVX2), {"fp64": 16, "fp32": 32}),  # Milan
        (
            cpuinfo("AuthenticAMD", 0x19, 0x11, f"{SERVER} avx512_bf16"),  # Genoa
            {"fp64": 16, "fp32": 32, "bf16": 64, "int8": 128},
        ),
        (
            cpuinfo("AuthenticAMD", 0x1A, 0x02, f"{SERVER} avx512_bf16 avx_vnni"),  # Turin
            {"fp64": 32, "fp32": 64, "bf16": 128, "int8": 256},
        ),
        (cpuinfo("AuthenticAMD", 0x1A, 0x24, AVX512), {"fp64": 16, "fp32": 32}),  # Strix Point: narrow units
        (cpuinfo("AuthenticAMD", 0x1A, 0x02, AVX2), {"fp64": 16, "fp32": 32}),  # Turin, AVX-512 hidden
        (cpuinfo("GenuineIntel", 6, 79, AVX2), {"fp64": 16, "fp32": 32}),  # Broadwell
        (cpuinfo("GenuineIntel", 6, 87, AVX512), {"fp64": 32, "fp32": 64}),  # Knights Landing
        (cpuinfo("GenuineIntel", 6, 106, SERVER), {"fp64": 32, "fp32": 64, "int8": 256}),  # Ice Lake server
        (cpuinfo("GenuineIntel", 6, 140, SERVER), {"fp64": 16, "fp32": 32, "int8": 128}),  # Tiger Lake
        (
            cpuinfo("GenuineIntel", 6, 143, AMX),  # Sapphire Rapids
            {"fp64": 32, "fp32": 64, "bf16": 1024, "fp16": 128, "int8": 2048},
        ),
        (
            cpuinfo("GenuineIntel", 6, 173, f"{AMX} amx_fp16"),  # Granite Rapids
            {"fp64": 32, "fp32": 64, "bf16": 1024, "fp16": 1024, "int8": 2048},
        ),
        (cpuinfo("GenuineIntel", 6, 143, AVX512), {"fp64": 32, "fp32": 64}),  # the same with AMX hidden
        (cpuinfo("AuthenticAMD", 0x1F, 0x01, SERVER), {}),  # not known yet
        (cpuinfo("GenuineIntel", 6, 200, SERVER), {}),
        (cpuinfo("GenuineIntel", 15, 143, SERVER), {}),
        (cpuinfo("AuthenticAMD", 0x19, 0x11, "sse2"), {}),  # no fused multiply-add shown
        (cpuinfo("HygonGenuine", 0x18, 0x01, AVX2), {}),
        ("CPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd0c\nFeatures\t: fp asimd asimdhp\n",
         {"fp64": 8, "fp32": 16, "fp16": 32}),
        ("CPU implementer\t: 0x61\nCPU architecture: 8\nCPU part\t: 0x022\nFeatures\t: fp asimd asimdhp\n", {}),
        ("", {}),
    ],
)  # fmt: skip
def test_operations_a_cycle(text: str, expected: dict[str, int]) -> None:
    assert operations_per_cycle(parse_cpuinfo(text)) == expected


@pytest.mark.parametrize(
    ("name", "fp32", "doubt"),
    [
        ("Intel(R) Xeon(R) Platinum 8280 CPU @ 2.70GHz", 64, False),
        ("Intel(R) Xeon(R) Gold 6148 CPU @ 2.40GHz", 64, False),
        ("Intel(R) Xeon(R) Gold 5218 CPU @ 2.30GHz", 32, False),
        ("Intel(R) Xeon(R) Gold 5122 CPU @ 3.60GHz", 64, False),
        ("Intel(R) Xeon(R) Silver 4114 CPU @ 2.20GHz", 32, False),
        ("Intel(R) Xeon(R) CPU @ 2.00GHz", 64, True),  # a cloud's
    ],
)
def test_the_units_of_a_skylake_server_are_told_by_its_name(name: str, fp32: int, doubt: bool) -> None:
    text = cpuinfo("GenuineIntel", 6, 85, AVX512, name)
    assert operations_per_cycle(parse_cpuinfo(text))["fp32"] == fp32
    assert ("taken for two" in processor_spec(1, text, 2e9).note) is doubt


def test_peak_is_cores_times_clock_times_operations() -> None:
    spec = processor_spec(96, cpuinfo("AuthenticAMD", 0x19, 0x11, f"{SERVER} avx512_bf16", "AMD EPYC 9654"), 3.7e9)
    assert spec.name == "AMD EPYC 9654"
    assert spec.flops_per_s["fp32"] == pytest.approx(96 * 32 * 3.7e9)
    assert spec.flops_per_s["bf16"] == pytest.approx(2 * spec.flops_per_s["fp32"])
    assert "96 x Zen 4 core" in spec.note and "3.7 GHz (given)" in spec.note
    assert "fp16" not in spec.flops_per_s and spec.memory_bytes_per_s is None


def test_an_unknown_core_has_no_peaks_and_says_so() -> None:
    spec = processor_spec(4, cpuinfo("AuthenticAMD", 0x1F, 1, SERVER), 3e9)
    assert spec.flops_per_s == {} and "family 31, model 1 is not known here" in spec.note


def test_the_highest_known_clock_counts_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = cpuinfo("AuthenticAMD", 0x19, 0x11, SERVER)
    monkeypatch.setattr(processor, "CPUFREQ", tmp_path / "max")
    monkeypatch.setattr(clock, "measured_clock_hz", lambda: 3.68e9)
    measured = processor_spec(1, text)
    assert measured.clock_hz == 3.68e9 and "measured by a chain" in measured.note
    (tmp_path / "max").write_text("3700000\n")
    assert processor_spec(1, text).clock_hz == pytest.approx(3.7e9)
    (tmp_path / "max").write_text("junk")
    monkeypatch.setattr(clock, "measured_clock_hz", lambda: None)
    reported = processor_spec(1, text)
    assert reported.clock_hz == 2.6e9 and "may be below what it really runs at" in reported.note
    unknown = processor_spec(1, cpuinfo("AuthenticAMD", 0x19, 0x11, SERVER, mhz="?"))
    assert unknown.clock_hz is None and unknown.flops_per_s == {} and "its clock is not known" in unknown.note


def test_a_measured_rate_raises_the_clock_and_all_peaks() -> None:
    spec = processor_spec(1, cpuinfo("AuthenticAMD", 0x19, 0x11, f"{SERVER} avx512_bf16"), 2.6e9)
    assert raise_to(spec, "fp32", 0.9 * spec.flops_per_s["fp32"]) is spec
    assert raise_to(spec, "fp8", 1e15) is spec  # no known peak, none made up
    raised = raise_to(spec, "fp32", 112e9)
    assert raised.flops_per_s["fp32"] == 112e9 and raised.clock_hz == pytest.approx(3.5e9)
    assert raised.flops_per_s["bf16"] == pytest.approx(224e9)
    assert "clock raised to 3.5 GHz, at least: fp32 was measured at 112 GFLOP/s" in raised.note
    assert spec.note in raised.note


def test_a_rate_that_no_clock_explains_replaces_one_peak() -> None:
    spec = processor_spec(1, cpuinfo("AuthenticAMD", 0x19, 0x11, f"{SERVER} avx512_bf16"), 3.7e9)
    raised = raise_to(spec, "bf16", 1e12)
    assert raised.flops_per_s == {**spec.flops_per_s, "bf16": 1e12} and raised.clock_hz == spec.clock_hz
    assert "must be wrong: replaced" in raised.note
    h100 = device("h100-sxm")
    assert raise_to(h100, "fp32", 1e14).flops_per_s == {**h100.flops_per_s, "fp32": 1e14}  # not a faster clock
    titan = device("titan-x-maxwell")
    assert raise_to(titan, "fp32", 6.81e12).clock_hz == pytest.approx(1075e6 * 6.81 / 6.7)


@given(
    dtype=st.sampled_from(["fp64", "fp32", "bf16", "int8", "fp16"]), rates=st.lists(st.floats(1e6, 1e16), max_size=4)
)
def test_no_share_of_the_peak_exceeds_one(dtype: str, rates: list[float]) -> None:
    spec = processor_spec(2, cpuinfo("AuthenticAMD", 0x19, 0x11, f"{SERVER} avx512_bf16"), 2.6e9)
    for rate in rates:
        spec = raise_to(spec, dtype, rate)
    if rates and dtype in spec.flops_per_s:
        assert max(rates) / spec.flops_per_s[dtype] <= 1
    assert ("fp16" in spec.flops_per_s) is False


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200))
def test_any_cpuinfo_is_read(text: str) -> None:
    assert operations_per_cycle(parse_cpuinfo(text)) == {}


def test_this_machine() -> None:
    spec = processor_spec(1)
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    assert spec.name and spec.note and all(rate > 1e9 for rate in spec.flops_per_s.values())
    assert "avx512_bf16" in flags or "amx_bf16" in flags or "bf16" not in spec.flops_per_s


def test_the_measured_clock_is_a_clock() -> None:
    hz = clock.measured_clock_hz()
    assert hz is None or 2e8 < hz < 1e10
    assert clock.measured_clock_hz() == hz  # once a process
    assert len(clock.BODY) == 195 and clock.CODE.endswith(b"\xc3")


def test_where_code_cannot_be_made_there_is_no_measured_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **options: Any) -> mmap.mmap:
        raise PermissionError("no executable memory")

    monkeypatch.setattr(clock.mmap, "mmap", refused)
    assert clock.measured_clock_hz.__wrapped__() is None
    monkeypatch.setattr(clock.platform, "machine", lambda: "aarch64")
    assert clock.measured_clock_hz.__wrapped__() is None
