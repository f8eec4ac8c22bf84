"""The planner's benchmark: every row it can measure, and the names of those it cannot."""

import csv
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import plan
from turbopump.core.errors import UsageError
from turbopump.planner.judged import Row
from turbopump.planner.validate import Report, TableReport

TARGETS_FILE = plan.PUBLISHED.parent / "targets.csv"


def rows_of(table, group, count, *, off=0.1, measured=1.0, half=0.2):
    """Every other row off by `off`, the rest exact; choices of two."""
    return tuple(
        Row(table, group, f"{i}", measured * (1 + off * (i % 2)), measured, "s", measured * (1 + off * (i % 2)) - half,
            measured * (1 + off * (i % 2)) + half, choice=f"{i // 2}")
        for i in range(count)
    )  # fmt: skip


def report():
    def part(name, part_name, rows):
        return TableReport(name, part_name, "", rows)

    return Report("p", "cross-validated", "", (
        part(plan.GPT, "single_node_A100", (*rows_of(plan.GPT, "a", 60), *rows_of(plan.GPT, "b", 60, off=0.3))),
        part(plan.GPT, "multi_node_A100", rows_of(plan.GPT, "c", 10)),
        part("mpt_throughput", "", rows_of("mpt_throughput", "7b", 80, half=0.05)),
        part("torchtitan_runs", "memory", rows_of("torchtitan_runs", "8b", 90)),
        part("torchtitan_runs", "", rows_of("torchtitan_runs", "8b", 4)),
    ), ())  # fmt: skip


@pytest.mark.skipif(not TARGETS_FILE.is_file(), reason="targets.csv does not lie beside the project")
def test_the_targets_are_those_agreed_on():
    with TARGETS_FILE.open(newline="") as file:
        agreed = {row["id"]: row for row in csv.DictReader(file) if row["benchmark"] == "plan"}
    assert agreed.keys() <= plan.TARGETS.keys()
    for name, row in agreed.items():
        target = plan.TARGETS[name]
        assert (target.better, target.target, target.unit) == (row["better"], float(row["target"]), row["unit"])


def test_errors_and_regrets_by_part():
    rows = {row.id: row for row in plan.step_rows(report())}
    assert rows.keys() == {"plan.gpt_single", "plan.gpt_multi", "plan.regret_single", "plan.regret_multi", "plan.mpt"}
    single = rows["plan.gpt_single"]
    assert single.value == pytest.approx(0.1) and single.spread == pytest.approx((0.05, 0.15)) and single.runs == 120
    assert rows["plan.regret_single"].value == 0 and rows["plan.regret_single"].runs == 60
    assert single.peers["vTrain"] == 0.084 and single.met is False


def test_bands_count_where_there_are_rows_enough():
    rows = {row.id: row for row in plan.band_rows(report())}
    gap = rows["plan.band_coverage_gap"]
    assert gap.runs == 200  # neither the 10 rows of several nodes, nor memory
    assert gap.value == pytest.approx(0.3)  # half of the MosaicML rows lie outside
    assert rows["plan.band_width"].value == pytest.approx(0.2 * 0.5 * (1 + (1 / 1.1 + 1 / 1.3) / 2) / 0.1, rel=0.05)
    assert list(plan.band_rows(Report("p", "frozen", "", (), ()))) == []


def test_an_absent_part_is_named_and_takes_no_other_with_it(capsys):
    assert plan.part("plan_nothing_of_that_name", lambda module: iter(())) == []
    assert "plan_nothing_of_that_name" in capsys.readouterr().err

    def fails(module):
        raise UsageError("no clock")

    assert plan.part("harness", fails) == [] and "no clock" in capsys.readouterr().err


def test_rows_of_the_parts(tmp_path):
    memory = SimpleNamespace(error=lambda p: (0.02, 30, {"a": 0.01, "b": 0.03}), false_fits=lambda p: ([], 500),
                             false_rejections=lambda p: (["x"], 200))  # fmt: skip
    rows = {row.id: row for row in plan.memory_rows(memory, tmp_path)}
    assert rows["plan.memory"].spread == (0.01, 0.03) and rows["plan.false_fits"].value == 0
    assert rows["plan.false_rejections"].value == pytest.approx(0.005) and all(row.met for row in rows.values())
    (search,) = plan.search_rows(SimpleNamespace(search_s=lambda runs: (1.5, 120_000)), True)
    assert search.value == 1.5 and search.runs == 1


def test_own_runs_are_judged_by_both_profiles():
    run = lambda error: SimpleNamespace(name="a", error=error)  # noqa: E731
    found = SimpleNamespace(generic=[run(0.3), run(-0.1)], probed=[run(0.1), run(-0.1)], calibrated=[run(0.05)])
    module = SimpleNamespace(
        own_runs=lambda quick: found, table=lambda found: "table",
        mean_error=lambda results: sum(abs(r.error) for r in results) / len(results),
    )  # fmt: skip
    generic, probed = plan.own_rows(module, True)
    assert (generic.id, generic.value, generic.runs) == ("plan.own_generic", pytest.approx(0.2), 2)
    assert (probed.id, probed.value) == ("plan.own_probed", pytest.approx(0.1))
    assert list(probed.peers.values()) == [pytest.approx(0.05)] and not generic.peers


def test_without_tables_the_rows_are_absent_and_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plan, "part", lambda name, rows: [])
    assert plan.measure(True, Path(tmp_path / "absent")) == []
    said = capsys.readouterr().err
    assert "no published tables" in said and all(f"{name} is absent" in said for name in plan.TARGETS)
