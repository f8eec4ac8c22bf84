"""This machine as a profile names it."""

import pytest

from turbopump.hardware import detect, gpus
from turbopump.hardware.here import here


@pytest.fixture
def machine(monkeypatch):
    """A machine with these counters and settings and without GPUs."""

    def make(contention=None, settings=None, installed=()):
        monkeypatch.setattr(detect, "contention", lambda: contention or {})
        monkeypatch.setattr(detect, "settings", lambda: settings or {"governor": "performance"})
        monkeypatch.setattr(gpus, "installed", lambda: installed)

    return make


def test_a_quiet_machine_with_a_fixed_clock_is_certain(machine):
    machine()
    found = here("cpu")
    assert found.uncertain == () and found.name == detect.cpu_name() and list(found.devices) == ["cpu"]
    assert found.fingerprint == detect.fingerprint(()) and found.software["python"]


@pytest.mark.parametrize(
    ("contention", "settings", "said"),
    [
        ({"load_per_core": 3.3}, None, "a load of 3.3 a core"),
        ({"cpu_pressure": 0.5}, None, "in 50% of the 10 s before"),
        ({"cpu_stolen": 0.2}, None, "other virtual machines took 20%"),
        (None, {"governor": "schedutil"}, "the clock is not locked (governor schedutil)"),
        (None, {"kernel": "6.1"}, "governor is hidden"),
    ],
)
def test_what_makes_it_less_certain_is_said(machine, contention, settings, said):
    machine(contention, settings)
    (line,) = here("cpu").uncertain
    assert said in line


def test_the_gpu_computes_and_comes_first(machine):
    machine(installed=(gpus.Gpu("NVIDIA H100 80GB HBM3", 80 << 30),))
    found = here("cuda")
    assert list(found.devices) == ["cuda", "cpu"] and found.name == found.devices["cuda"].name
    assert "clocks are not locked" in found.uncertain[0]
    assert list(here("cpu").devices) == ["cpu"]
