"""The catalog: what the data sheets say, in base units, and files of the user's own with every mistake named."""

from __future__ import annotations

import csv
import math
import tomllib
from importlib.resources import files
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbopump.core.config import to_toml
from turbopump.core.errors import CatalogError, UsageError
from turbopump.hardware import accelerators
from turbopump.hardware.accelerators import device, link, link_names, names, reported_as
from turbopump.hardware.specs import DeviceSpec

PUBLISHED = Path(__file__).parents[3] / "shared" / "published"
# rows of the published table whose name in the catalog is not made of the same letters
IDS = {
    "NVIDIA GB300 (per GPU)": "gb300",
    "NVIDIA GB200 (per GPU)": "gb200",
    "AMD MI455X (announced)": "mi455x",
    "NVIDIA Rubin SXM (announced)": "rubin-sxm",
    "Google TPU v1 (inference)": "tpu-v1",
}
HALF_PRECISION = ("NVIDIA V100 SXM2", "NVIDIA P100 SXM2", "Groq LPU v1", "Graphcore IPU Mk2")  # fp16 in column bf16
SPARSE = ("Cerebras WSE-3",)


def test_the_files_are_in_the_package() -> None:
    """As an installed program finds them."""
    found = {path.name for path in (files("turbopump") / "hardware" / "catalog").iterdir()}
    assert found >= {"nvidia.toml", "amd.toml", "google.toml", "intel.toml", "aws.toml", "others.toml", "links.toml"}


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not beside this checkout")
def test_every_published_accelerator_is_there_with_its_numbers() -> None:
    with (PUBLISHED / "accelerator_specs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 35
    for row in rows:
        name = row["accelerator"]
        spec = device(IDS.get(name, name))
        half = "fp16" if name in HALF_PRECISION else "bf16"
        columns = {"fp32_tflops": "fp32", "tf32_tflops": "tf32", "bf16_dense_tflops": half, "fp8_dense_tflops": "fp8"}
        for column, dtype in columns.items():
            if not row[column] or name in SPARSE:
                assert dtype not in spec.flops_per_s, (name, dtype)
            else:
                assert spec.flops_per_s[dtype] == pytest.approx(float(row[column]) * 1e12), (name, dtype)
        if name in HALF_PRECISION:
            assert "bf16" not in spec.flops_per_s
        if row["mem_TBps"]:
            assert spec.memory_bytes_per_s == pytest.approx(float(row["mem_TBps"]) * 1e12)
        if row["mem_GB"]:
            assert spec.memory_bytes is not None
            assert spec.memory_bytes / 2**30 == pytest.approx(float(row["mem_GB"]), rel=0.08)
        if row["clock_MHz"]:
            assert spec.clock_hz == pytest.approx(float(row["clock_MHz"]) * 1e6)
        if row["power_W"]:
            assert spec.power_w == float(row["power_W"])
        assert spec.source, name
        assert (spec.provenance == "hypothetical") == ("announced" in name), name
        assert "recalled" in spec.note or row["verified"] == "yes", name


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not beside this checkout")
def test_published_products_stay_near_or_below_the_peak_of_their_device() -> None:
    """Each platform of DeepBench is in the catalog; a cool card exceeds its data sheet's clock by up to a tenth."""
    best: dict[str, float] = {}
    with (PUBLISHED / "deepbench_gemm.csv").open() as file:
        for row in csv.DictReader(file):
            if row["precision"] == "fp32" and row["tflops"]:
                best[row["platform"]] = max(best.get(row["platform"], 0.0), float(row["tflops"]) * 1e12)
    assert len(best) >= 7
    for platform, flops_per_s in best.items():
        assert 0.5 < flops_per_s / device(platform).flops_per_s["fp32"] < 1.1, platform


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not beside this checkout")
def test_published_best_rates_are_of_devices_of_the_catalog_and_below_their_peaks() -> None:
    with (PUBLISHED / "matmul_achievable.csv").open() as file:
        for row in csv.DictReader(file):
            peak = device(row["accelerator"]).flops_per_s[row["dtype"]]
            assert 0.4 < float(row["measured_tflops"]) * 1e12 / peak < 1, row["accelerator"]


def test_every_entry_holds_and_is_found_by_all_its_names() -> None:
    assert len(names()) >= 45 and names() == sorted(names())
    for name in names():
        spec = device(name)
        assert device(spec.name.upper()) is spec
        assert all(math.isfinite(rate) and rate > 1e11 for rate in spec.flops_per_s.values()), name
        assert spec.memory_bytes is None or 1e8 < spec.memory_bytes < 1e12
        assert spec.memory_bytes_per_s is None or 1e10 < spec.memory_bytes_per_s < 1e17
        assert spec.relative in ("", *names())
    for name in link_names():
        assert 1e8 <= link(name).bytes_per_s < 2e12 and 1e-7 < link(name).latency_s < 1e-3


def test_numbers_become_base_units() -> None:
    h100 = device("h100-sxm")
    assert h100.flops_per_s["bf16"] == 989e12 and h100.flops_per_s["fp8"] == 1979e12
    assert h100.memory_bytes == 80 << 30 and h100.memory_bytes_per_s == 3.35e12
    assert h100.clock_hz == 1.83e9 and h100.power_w == 700 and h100.usd_per_hour is None
    assert device("TPU-v5p").memory_bytes == 95 << 30
    assert link("ib-ndr").bytes_per_s == 50e9 and link("infiniband-ndr").latency_s == 2.7e-6


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "NVIDIA H100 SXM"),
        ("Tesla V100-SXM2-16GB", "NVIDIA V100 SXM2"),
        ("GeForce GTX TITAN X", "NVIDIA Titan X Maxwell"),
        ("TITAN X (Pascal)", "NVIDIA Titan X Pascal"),
    ],
)
def test_a_driver_s_name_finds_its_device(said: str, name: str) -> None:
    found = reported_as(said)
    assert found is not None and found.name == name
    assert reported_as("NVIDIA H100 80GB HBM9") is None


def test_an_unknown_name_is_refused_with_what_is_near() -> None:
    with pytest.raises(CatalogError, match=r"no device 'h100-sxmm', did you mean 'h100-sxm'"):
        device("h100-sxmm")
    with pytest.raises(CatalogError, match=r"no device 'qqqqq' \(known: a100-pcie-80, .*wse-3.*FILE\.toml"):
        device("qqqqq")
    with pytest.raises(UsageError, match=r"no link 'nvlink', did you mean .*'nvlink4'"):
        link("nvlink")


MINE = """
source = "a napkin"
[my-chip]
name = "Mine 1"
bf16_tflops = 500
memory_gib = 48
provenance = "hypothetical"
relative = "h100-sxm"
usd_per_hour = 1.5
"""


def test_a_file_of_the_user_s_own(tmp_path: Path) -> None:
    one, two = tmp_path / "chip.toml", tmp_path / "chips.toml"
    one.write_text(MINE)
    two.write_text(MINE + '[other]\nname = "Mine 2"\nfp32_tflops = 1\naliases = ["o2"]\nsource = "a book"\n')
    wanted = DeviceSpec(
        "Mine 1", {"bf16": 5e14}, 48 << 30, usd_per_hour=1.5, provenance="hypothetical", source="a napkin",
        relative="h100-sxm",
    )  # fmt: skip
    assert device(str(one)) == device(f"{one}:my-chip") == device(f"{two}:MINE 1") == wanted
    assert device(f"{two}:o2").source == "a book"
    with pytest.raises(CatalogError, match=r"it has 2 entries: use .*chips\.toml:my-chip or .*chips\.toml:other"):
        device(str(two))
    with pytest.raises(CatalogError, match="no entry 'third'"):
        device(f"{two}:third")
    with pytest.raises(CatalogError, match="no file at"):
        device(str(tmp_path / "absent.toml"))
    (tmp_path / "wire.toml").write_text('[w]\nname="Wire"\nlevel="rack"\ngb_per_s=2\nlatency_us=10\n')
    assert link(f"{tmp_path}/wire.toml").bytes_per_s == 2e9


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bf16_tflops = -3", r"chip\.toml: 1 problem\n  x\.bf16_tflops: -3 given; a number above 0 is needed"),
        ("bf16_tflops = 0", r"x\.bf16_tflops: 0 given"),
        ('bf16_tflops = "989"', r"x\.bf16_tflops: '989' given; a number above 0 is needed, without quotes"),
        ("bf16_tflops = true", r"x\.bf16_tflops: True given"),
        ("bf16_tflops = inf", r"x\.bf16_tflops: inf given"),
        ("bf16_tflops = nan", r"x\.bf16_tflops: nan given"),
        ("bf16 = 989", r"x\.bf16: no such key \(each names its unit\); did you mean 'bf16_tflops'"),
        ("memory = 80", r"x\.memory: no such key .* did you mean 'memory_gib'"),
        ("memory_gb = 80", r"did you mean 'memory_gib'"),
        ("colour = 3", r"x\.colour: no such key .* known: fp64_tflops, "),
        ('provenance = "guess"', r"x\.provenance: 'guess' given; one of measured, datasheet, hypothetical"),
        ("note = 3", r"x\.note: 3 given; a text is needed"),
        ("aliases = 'y'", r"x\.aliases: 'y' given; a list of texts"),
        ("clock_mhz = [1]", r"x\.clock_mhz: \[1\] given"),
    ],
)
def test_a_mistake_is_named_with_file_entry_and_key(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "chip.toml").write_text(f'[x]\nname = "X 1"\n{line}\n')
    with pytest.raises(CatalogError, match=said):
        device(f"{tmp_path}/chip.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has 0 entries"),
        ("[x]\nbf16_tflops = 1", r"x\.name: this key is needed"),
        ('name = "X"', r"name: 'X' given; a table \[name\]"),
        ("[x", "not valid TOML"),
        ("source = 3\n[x]\nname='X'", r"source: 3 given; a text"),
        ("[x]\nname='A'\n[y]\nname='a'", r"y: the name 'a' belongs to another entry too"),
        ("[x]\nname='A'\n[y]\nname='B'\naliases=['x']", r"y: the name 'x' belongs to another entry"),
        ("[x]\nname='A'\nfp99_tflops=1\nfp32_tflops='a'\nmemory_gib=-1", "3 problems"),
    ],
)
def test_a_file_that_does_not_hold(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "chip.toml").write_text(text)
    with pytest.raises(CatalogError, match=said):
        device(f"{tmp_path}/chip.toml")


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.toml").mkdir()
    (tmp_path / "b.toml").write_bytes(b"\xff\xfe")
    for name in ("a.toml", "b.toml"):
        with pytest.raises(CatalogError, match="cannot read"):
            device(f"{tmp_path}/{name}")


def test_a_link_needs_all_of_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "wire.toml").write_text('[w]\nname = "Wire"\nlevel = "planet"\n')
    with pytest.raises(CatalogError, match=r"3 problems\n.*gb_per_s.*\n.*latency_us.*\n.*one of device, node, rack"):
        link(f"{tmp_path}/wire.toml")


def test_a_name_twice_over_two_files_of_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.toml").write_text('[x]\nname = "X"\n')
    (tmp_path / "b.toml").write_text('[y]\nname = "Y"\naliases = ["x"]\n')
    monkeypatch.setattr(accelerators, "CATALOG", tmp_path)
    with pytest.raises(CatalogError, match="'x' stands in another file too"):
        accelerators._devices.__wrapped__()


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.text(max_size=3))


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    row=st.dictionaries(st.sampled_from([*accelerators.DEVICE_KEYS, "x", "memory"]), VALUES, max_size=6),
    kind=st.sampled_from(["device", "link"]),
)
def test_any_entry_is_read_or_refused(tmp_path: Path, row: dict[str, object], kind: str) -> None:
    path = tmp_path / "fuzz.toml"
    text = to_toml({"x": {key: value for key, value in row.items() if value is not None}})
    path.write_text(text, encoding="utf-8", errors="replace")
    try:
        found = device(str(path)) if kind == "device" else link(str(path))
    except CatalogError:
        return
    assert isinstance(found, DeviceSpec) and found.name == tomllib.loads(path.read_text())["x"]["name"]
    assert all(0 < rate < math.inf for rate in found.flops_per_s.values())
