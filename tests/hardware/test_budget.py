"""How the time of a probe is shared, and what is said of the rows it had no room for."""

import pytest

from tests.fake_domains import products, row_of
from turbopump.hardware import budget


def test_a_row_gets_more_time_of_a_larger_budget_within_limits():
    assert budget.row_s(1, 1000) == budget.LEAST_ROW_S
    assert budget.row_s(3600, 100) == budget.MOST_ROW_S
    assert budget.LEAST_ROW_S < budget.row_s(60, 300) < budget.row_s(120, 300) < budget.MOST_ROW_S
    assert budget.row_s(10, 0) == budget.MOST_ROW_S


def test_compute_has_most_and_the_last_has_all_that_is_left():
    domains = ["comms", "data", "compute"]
    shares = {name: budget.allowance_s(1000, name, domains) for name in domains}
    assert shares["compute"] > shares["data"] > shares["comms"] > 0
    assert sum(shares.values()) == pytest.approx(1000)
    assert budget.allowance_s(10, "compute", ["compute"]) == 10
    assert budget.allowance_s(-1, "compute", domains) == 0


def test_processes_have_time_to_start_where_there_is_some():
    domains = ["comms", "data", "compute"]
    assert budget.allowance_s(27, "comms", domains) == budget.LEAST_S["comms"]
    assert budget.allowance_s(5, "comms", domains) == pytest.approx(2)


def test_left_out_says_how_many_of_which_kind_and_how_long_they_take():
    fast, slow = products(6), products(4, tier=1, dtype="bf16")
    done = {trial.key: row_of(trial) for trial in (*fast[:4], slow[0])}
    walls = {trial.key: 0.5 for trial in fast[:4]} | {slow[0].key: 40.0}
    groups = budget.left_out({"compute": [*fast, *slow]}, done, walls, row_s=0.1)
    assert [(g.left, g.wanted, g.dtype, g.tier, g.left_in_tier) for g in groups] == [
        (2, 6, "fp32", 0, 2), (3, 4, "bf16", 1, 3),
    ]  # fmt: skip
    assert [g.seconds for g in groups] == [1.0, 120.0]
    assert str(groups[1]) == "compute: 3 of 4 Gemm bf16, about 2 min 00 s"
    assert budget.left_out({"compute": fast[:4]}, done, walls, row_s=0.1) == []


def test_without_any_row_the_guess_is_the_time_of_one():
    (group,) = budget.left_out({"data": products(10)}, {}, {}, row_s=0.1)
    assert group.seconds == pytest.approx(10 * 0.1 / budget.MEASURING_SHARE)


def test_the_advised_budget_is_one_to_type_and_larger_than_what_is_needed():
    def groups(seconds):
        return [budget.Group("compute", "Gemm", "fp32", 9, 9, 1, 9, seconds)]

    assert budget.advised(5, groups(5)) == "30s"
    assert budget.advised(30, groups(60)) == "5m"
    assert budget.advised(300, groups(1500)) == "2h"
    assert budget.advised(300, groups(100_000)) == "67h"
    assert budget.advised(5, groups(5000), tier=0) == "30s"
