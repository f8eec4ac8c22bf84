"""Bills: device-hours, dollars that are never guessed, watts at the plug against MLPerf's."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from turbopump.core.errors import UsageError
from turbopump.hardware.accelerators import device
from turbopump.planner.money import Bill, bill_of, device_of, mean_error, read_power, wall_watts

POWER = Path(__file__).parents[2].parent / "shared" / "published" / "mlperf_power.csv"
H100 = device("h100-sxm")


def test_a_busy_host_of_eight_draws_what_was_measured() -> None:
    watts = wall_watts(H100, busy=1.0)
    assert watts is not None
    assert 8 * watts == pytest.approx(6850)
    waiting = wall_watts(H100, busy=0.0)
    assert waiting is not None and 0.5 < waiting / watts < 0.8


def test_mlperfs_power_is_predicted_within_eight_percent() -> None:
    if not POWER.is_file():
        pytest.skip("the published table mlperf_power.csv is not beside this checkout")
    rows = read_power(POWER)
    assert rows
    assert mean_error(rows) <= 0.08


def test_the_bill_of_mlperfs_gpt3() -> None:
    """64 hosts for 3,411 s took 1,495 MJ."""
    bill = bill_of(H100, num_devices=512, wall_s=3411, busy=1.0, usd_per_hour=2.0)
    assert bill.device_hours == pytest.approx(512 * 3411 / 3600)
    assert bill.usd == pytest.approx(2 * bill.device_hours)
    assert bill.kwh == pytest.approx(1494.9 / 3.6, rel=0.01)
    assert bill.missing == ()


def test_what_is_not_known_is_said_and_not_guessed() -> None:
    bill = bill_of(replace(H100, power_w=None, usd_per_hour=None), num_devices=8, wall_s=3600, busy=0.5)
    assert (bill.device_hours, bill.usd, bill.kwh) == (8, None, None)
    assert any("usd_per_hour" in line for line in bill.lines())
    assert any("power_w" in line for line in bill.lines())


def test_the_catalogs_price_is_taken_where_none_is_given() -> None:
    priced = replace(H100, usd_per_hour=3.0)
    assert bill_of(priced, num_devices=2, wall_s=3600, busy=1).usd == 6
    assert bill_of(priced, num_devices=2, wall_s=3600, busy=1, usd_per_hour=0.0).usd == 0


def test_idle_hours_take_less_and_the_building_more() -> None:
    def kwh(**changes: float) -> float:
        bill = bill_of(H100, num_devices=8, wall_s=3600, busy=0.8, **changes)  # type: ignore[arg-type]
        assert bill.kwh is not None
        return bill.kwh

    assert kwh(pue=1.2) == pytest.approx(1.2 * kwh())
    assert kwh(idle_s=3600) == pytest.approx(0.30 * 6.85)
    assert kwh(idle_s=3600) < kwh(idle_s=1800) < kwh()


def test_electricity_of_ones_own_is_added() -> None:
    bill = bill_of(H100, num_devices=8, wall_s=36000, busy=1, usd_per_kwh=0.1)
    assert bill.usd == pytest.approx(6.85)
    both = bill_of(H100, num_devices=8, wall_s=36000, busy=1, usd_per_kwh=0.1, usd_per_hour=1)
    assert both.usd == pytest.approx(80 + 6.85)


@pytest.mark.parametrize("wrong", [{"num_devices": 0}, {"wall_s": -1}, {"busy": 1.1}, {"idle_s": 11}, {"pue": 0.9},
                                   {"usd_per_hour": -1}, {"busy": math.nan}])  # fmt: skip
def test_figures_out_of_range_are_errors(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=next(iter(wrong))):
        bill_of(H100, **{"num_devices": 8, "wall_s": 10, "busy": 1.0, **wrong})  # type: ignore[arg-type]


def test_a_bill_as_text() -> None:
    assert Bill(1234.0, 2500.0, 12.5).lines() == ["1.23 k device-hours", "$2.5 k", "12.5 kWh"]


@pytest.mark.parametrize(
    ("system", "name"),
    [("64xSMC-H100-SXM-80GB", "NVIDIA H100 SXM"), ("dgxa100_n8", "NVIDIA A100 SXM 80"), ("8xUnheardOf-X9", None)],
)
def test_the_device_of_a_system(system: str, name: str | None) -> None:
    found = device_of(system)
    assert (found.name if found else None) == name


def test_scaling_within_a_table_says_how_busy_devices_are(tmp_path: Path) -> None:
    path = tmp_path / "mlperf_power.csv"
    path.write_text("system,benchmark,nodes,accelerators,duration_s,avg_W_per_node\n1xH100,ssd,1,8,2000,6850\n"
                    "8xH100,ssd,8,64,500,5700\n4xX9,ssd,4,32,600,1\n")  # fmt: skip
    rows = read_power(path)
    assert [row.busy for row in rows] == [1.0, 0.5]  # a device that nobody knows is left out
    assert rows[1].error == pytest.approx(6850 * 0.825 / 5700 - 1)
    path.write_text("system\n")
    with pytest.raises(UsageError, match="lacks benchmark"):
        read_power(path)
    assert math.isnan(mean_error([]))
