"""The planner: how far predictions are from published results and our own runs, what its choices cost, how fast it is.

    python -m benchmarks.plan [--quick]

Step times, choices and bands as `plan --validate` judges them, every group of rows by a calibration that never saw it;
memory and the fit in it (plan_memory.py); our own runs (plan_own.py); the search (plan_search.py). The published tables
lie beside the project; without them, or without a part that measures, the rows that need it are absent, and said so.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np

from benchmarks.harness import Row, Target, main, targets
from turbopump.core.errors import TurbopumpError
from turbopump.planner import fit, tables
from turbopump.planner.calibration import Calibration
from turbopump.planner.judged import score
from turbopump.planner.validate import Report, TableReport, validate

TARGETS = targets(
    Target("plan.gpt_single", "gpt_3d_parallel_runs, single node: mean error, leave one model out", "lower", 0.06,
           "fraction"),
    Target("plan.gpt_multi", "the same, multi node, calibrated without that system", "lower", 0.08, "fraction"),
    Target("plan.gpt_datasheet", "the same from the data sheet only", "lower", 0.20, "fraction"),
    Target("plan.regret_single", "strategy regret, single node", "lower", 0.03, "fraction"),
    Target("plan.regret_multi", "strategy regret, multi node", "lower", 0.03, "fraction"),
    Target("plan.mpt", "MosaicML table: mean error, leave one model out", "lower", 0.08, "fraction"),
    Target("plan.memory", "Megatron and torchtitan memory rows: mean error", "lower", 0.05, "fraction"),
    Target("plan.false_fits", "plans called fitting that do not", "lower", 0, "count"),
    Target("plan.false_rejections", "plans that ran and are called not fitting", "lower", 0.05, "fraction"),
    Target("plan.own_generic", "our own runs from the generic profile: mean error", "lower", 0.20, "fraction"),
    Target("plan.own_probed", "our own runs after probe --for: mean error", "lower", 0.10, "fraction"),
    Target("plan.band_coverage_gap", "distance of the 80 % band's coverage from 0.80 (step times, the worst part)",
           "lower", 0.05, "fraction"),
    Target("plan.band_width", "half-width of the 80 % band over the mean error (step times, the widest part)", "lower",
           2.5, "ratio"),
    Target("plan.search_s", "1e5 candidates on one core", "lower", 5.0, "s"),
)  # fmt: skip
PUBLISHED = Path(__file__).resolve().parents[1].parent / "shared" / "published"
PEERS: Mapping[str, Mapping[str, float]] = {
    "plan.gpt_single": {"vTrain": 0.084, "Calculon": 0.39},
    "plan.gpt_multi": {"vTrain": 0.147, "Calculon": 0.20},
    "plan.regret_single": {"rule of thumb": 0.05, "Calculon": 0.10},
    "plan.regret_multi": {"rule of thumb": 0.23, "Calculon": 0.013},
    "plan.mpt": {"constant MFU, A100": 0.09, "constant MFU, H100": 0.168},
}
"""Of others on the same rows: predictor_accuracy.csv, and the rule of least tensor, then least pipeline parallelism."""
BAND_ROWS = 50
"""A part with fewer rows cannot say whether 75 or 85 % are covered: one row of 10 is 10 %."""
GPT = "gpt_3d_parallel_runs"


def measure(quick: bool, published: Path = PUBLISHED) -> list[Row]:
    """All rows that can be measured here, in the order of TARGETS."""
    rows: list[Row] = []
    if published.is_dir():
        report = validate(published)
        rows += [*step_rows(report), *band_rows(report), *datasheet_rows(published)]
        rows += part("plan_memory", lambda module: memory_rows(module, published))
    else:
        note(f"no published tables at {published}: rows of step times and memory are absent")
    rows += part("plan_own", lambda module: own_rows(module, quick))
    rows += part("plan_search", lambda module: search_rows(module, quick))
    for absent in [name for name in TARGETS if name not in {row.id for row in rows}]:
        note(f"{absent} is absent")
    return sorted(rows, key=lambda row: list(TARGETS).index(row.id))


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def part(name: str, rows: Callable[[ModuleType], Iterator[Row]]) -> list[Row]:
    """The rows of `benchmarks.NAME`; none, with a note, where it is absent or cannot measure here."""
    try:
        return list(rows(importlib.import_module(f"benchmarks.{name}")))
    except (ImportError, AttributeError, TurbopumpError) as error:
        note(f"benchmarks.{name}: {error}")
        return []


# ---- published step times


def _row(row_id: str, value: float, runs: int, spread: tuple[float, float] | None = None) -> Row:
    return TARGETS[row_id].row(value, runs=runs, spread=spread, peers=PEERS.get(row_id))


def parts_of(report: Report, table: str, begin: str = "") -> list[TableReport]:
    """The parts of a table with rows, e.g. those of one node."""
    return [p for p in report.tables if p.name == table and p.part != "memory" and p.part.startswith(begin) and p.rows]


def step_rows(report: Report) -> Iterator[Row]:
    """Errors and regrets; the spread is that of the groups."""
    for error_id, regret_id, begin in (
        ("plan.gpt_single", "plan.regret_single", "single"), ("plan.gpt_multi", "plan.regret_multi", "multi"),
    ):  # fmt: skip
        for found in parts_of(report, GPT, begin):
            yield _of_groups(error_id, found)
            total = score(found.rows)
            if total.regret is not None and total.worst_regret is not None:
                yield _row(regret_id, total.regret, total.num_choices, (0.0, total.worst_regret))
    for found in parts_of(report, "mpt_throughput"):
        yield _of_groups("plan.mpt", found)


def _of_groups(row_id: str, found: TableReport) -> Row:
    errors = [group.error for group in found.groups.values()]
    return _row(row_id, score(found.rows).error, len(found.rows), (min(errors), max(errors)))


def band_rows(report: Report) -> Iterator[Row]:
    """Coverage and width of the bands of step times, over the parts with enough rows to tell; the worst counts."""
    steps = [p for name in tables.COLUMNS for p in parts_of(report, name) if len(p.rows) >= BAND_ROWS]
    totals = [total for p in steps if (total := p.total) is not None and total.coverage is not None]
    if totals:
        gaps = [round(abs((t.coverage or 0.0) - 0.80), 9) for t in totals]  # 0.75 - 0.80 is a bit more than 0.05
        widths = [t.width_over_error or 0.0 for t in totals]
        count = sum(t.num_rows for t in totals)
        yield _row("plan.band_coverage_gap", max(gaps), count, (min(gaps), max(gaps)))
        yield _row("plan.band_width", max(widths), count, (min(widths), max(widths)))


def datasheet_rows(published: Path) -> Iterator[Row]:
    """By the prior of the calibration alone: peaks and links of the catalog, what physics says of the rest."""
    rows = tables.read(published / f"{GPT}.csv").rows
    if rows:
        errors = np.abs(fit.predict(rows, Calibration.prior()) / [row.step_s for row in rows] - 1)
        groups = np.array([row.group for row in rows])
        means = [float(errors[groups == group].mean()) for group in np.unique(groups)]
        yield _row("plan.gpt_datasheet", float(errors.mean()), len(rows), (min(means), max(means)))


# ---- memory, our own runs, the search


def memory_rows(module: ModuleType, published: Path) -> Iterator[Row]:
    value, count, by_table = module.error(published)
    yield _row("plan.memory", value, count, (min(by_table.values()), max(by_table.values())))
    for row_id, found in (("plan.false_fits", module.false_fits), ("plan.false_rejections", module.false_rejections)):
        wrong, of = found(published)
        yield _row(row_id, len(wrong) / of if row_id == "plan.false_rejections" else len(wrong), of)


def own_rows(module: ModuleType, quick: bool) -> Iterator[Row]:
    """Real runs of `train` here, by a generic profile, and by one that holds their operations too."""
    found = module.own_runs(quick)
    note(module.table(found))
    for row_id, results in (("plan.own_generic", found.generic), ("plan.own_probed", found.probed)):
        errors = [abs(result.error) for result in results]
        peers = {"after calibration, leave one out": module.mean_error(found.calibrated)} if "probed" in row_id else {}
        row = _row(row_id, module.mean_error(results), len(errors), (min(errors), max(errors)))
        yield replace(row, peers=peers)


def search_rows(module: ModuleType, quick: bool) -> Iterator[Row]:
    """CPU seconds of searching 1e5 candidates of GPT-3 on 1,024 devices, the fastest of some runs."""
    runs = 1 if quick else 3
    seconds, candidates = module.search_s(runs)
    note(f"plan.search_s: {candidates:,} candidates")
    yield _row("plan.search_s", seconds, runs)


if __name__ == "__main__":
    main("plan", measure)
