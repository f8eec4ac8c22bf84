"""Machines of catalog entries and of probed profiles."""

from dataclasses import replace

import pytest

from turbopump.core.errors import CatalogError
from turbopump.hardware.accelerators import device, link
from turbopump.hardware.datasheet import profile_from_datasheet
from turbopump.hardware.specs import DeviceSpec
from turbopump.planner.machine import Machine, family, from_catalog, from_profile, node_link


def test_a_catalog_device_brings_the_link_of_its_generation():
    machine = from_catalog("a100", 64, network="infiniband-hdr", ports_per_node=4)
    assert machine.node == link("nvlink3") and machine.families == ("a100",)
    assert machine.network_bytes_per_s == 100e9
    assert node_link(device("h100")) == "nvlink4" and node_link(device("h100-pcie")) == "pcie4-x16"


def test_one_device_a_host_has_no_link_within():
    assert from_catalog("h100", 4, devices_per_node=1).node is None


def test_a_dtype_without_a_peak_takes_that_of_the_units_that_compute_it():
    v100 = from_catalog("v100")
    assert v100.peak_flops_per_s("bf16") == v100.device.flops_per_s["fp16"]
    with pytest.raises(CatalogError, match="no peak for int4"):
        v100.peak_flops_per_s("int4")


@pytest.mark.parametrize(
    ("change", "said"), [({"memory_bytes_per_s": None}, "memory_tb_per_s"), ({"flops_per_s": {}}, "bf16_tflops")]
)
def test_a_device_that_cannot_be_timed_says_which_number_is_lacking(change, said):
    with pytest.raises(CatalogError, match=said):
        Machine(replace(device("a100"), **change))


def test_no_devices_is_an_error():
    with pytest.raises(CatalogError, match="num_devices"):
        Machine(device("a100"), 0)


def test_a_profile_becomes_a_machine_with_its_links_by_level():
    profile = profile_from_datasheet(device("h100"), links=[link("nvlink4"), link("infiniband-ndr")])
    machine = from_profile(profile, 16)
    assert machine.node == link("nvlink4") and machine.network == link("infiniband-ndr") and machine.num_devices == 16
    with pytest.raises(CatalogError, match="names no device"):
        from_profile(replace(profile, devices=()))


def test_family_is_the_generation_or_else_the_name():
    assert family(device("a100-pcie")) == "a100"
    assert family(DeviceSpec("My Chip", {"bf16": 1e15})) == "my chip"
