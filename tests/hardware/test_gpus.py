"""What the NVIDIA driver says, from samples of its output; no GPU is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from turbopump.hardware import gpus
from turbopump.hardware.gpus import Gpu, installed, parse_information, parse_nvidia_smi, spec_of

SMI = """NVIDIA H100 80GB HBM3, 81559, 550.54.15
NVIDIA H100 80GB HBM3, 81559, 550.54.15
"""
INFORMATION = """Model: \t\t NVIDIA A100-SXM4-80GB
IRQ:   \t\t 45
GPU UUID: \t GPU-12345678-aaaa-bbbb-cccc-1234567890ab
Video BIOS: \t 92.00.45.00.05
Bus Type: \t PCIe
DMA Size: \t 47 bits
Device Minor: \t 0
GPU Excluded:\t No
"""


def test_nvidia_smi() -> None:
    assert parse_nvidia_smi(SMI) == (Gpu("NVIDIA H100 80GB HBM3", 81559 << 20, "550.54.15"),) * 2
    assert parse_nvidia_smi("NVIDIA GB10, [N/A], 580.95\n") == (Gpu("NVIDIA GB10", None, "580.95"),)
    assert parse_nvidia_smi("Tesla T4, 15360, [N/A]") == (Gpu("Tesla T4", 15360 << 20, ""),)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "No devices were found\n",
        "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n",
        "Failed to initialize NVML: Driver/library version mismatch\n",
        "Unable to determine the device handle for GPU0000:04:00.0: GPU is lost.  Reboot the system to recover\n",
    ],
)
def test_messages_are_no_gpus(text: str) -> None:
    assert parse_nvidia_smi(text) == ()


def test_one_lost_gpu_does_not_hide_the_others() -> None:
    text = "Unable to determine the device handle for GPU 1: Unknown Error\nTesla T4, 15360, 550.54.15\n"
    assert [gpu.name for gpu in parse_nvidia_smi(text)] == ["Tesla T4"]


def test_the_driver_s_own_file() -> None:
    assert parse_information(INFORMATION) == Gpu("NVIDIA A100-SXM4-80GB")
    assert parse_information("Model: \t Unknown\n") is None
    assert parse_information("") is None


def test_the_catalog_knows_it() -> None:
    (gpu, _) = parse_nvidia_smi(SMI)
    spec = spec_of(gpu)
    assert spec.name == "NVIDIA H100 SXM" and spec.flops_per_s["bf16"] == 989e12
    assert spec.memory_bytes == 81559 << 20  # what is there, not what the data sheet says
    assert spec_of(Gpu("NVIDIA A100-SXM4-80GB")).memory_bytes == 80 << 30


def test_one_that_the_catalog_does_not_know_has_no_peaks() -> None:
    spec = spec_of(Gpu("NVIDIA XYZ 9000", 1 << 34))
    assert spec.flops_per_s == {} and spec.memory_bytes == 1 << 34 and "not in the catalog" in spec.note


def test_without_nvidia_smi_the_driver_s_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in (("0000:04:00.0", INFORMATION), ("0000:05:00.0", "")):
        (tmp_path / "gpus" / name).mkdir(parents=True)
        (tmp_path / "gpus" / name / "information").write_text(text)

    def absent(*arguments: Any, **options: Any) -> Any:
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(gpus.subprocess, "run", absent)
    assert installed(tmp_path / "gpus") == (Gpu("NVIDIA A100-SXM4-80GB"),)
    assert installed(tmp_path / "absent") == ()


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("nvidia-smi", 1), subprocess.CalledProcessError(9, "x")])
def test_a_driver_that_hangs_or_fails_is_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*arguments: Any, **options: Any) -> Any:
        assert options["timeout"] <= 60
        raise error

    monkeypatch.setattr(gpus.subprocess, "run", fails)
    assert installed(tmp_path) == ()
