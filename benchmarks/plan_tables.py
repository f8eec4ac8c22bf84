"""How well the planner's step times agree with published measurements: the figures of targets.csv, by whole groups.

Every figure is of rows that the calibration behind it never saw: `leave_out` leaves one model (on its cluster) out at
a time, `datasheet` uses no measured step at all. `write_shipped` makes the calibration that comes with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from turbopump.core.errors import UsageError
from turbopump.planner import fit, tables
from turbopump.planner.calibration import REGIMES, Calibration, save
from turbopump.planner.cases import Array
from turbopump.planner.tables import Measured


@dataclass(frozen=True)
class TableFigures:
    """Of one part of a table: the mean of |predicted / measured - 1| and what lies behind it."""

    name: str
    rows: int
    error: float
    median: float
    bias: float
    """Mean of log(predicted / measured)."""
    regret: float
    """Mean over choices; nan where there are none."""
    worst_regret: float
    coverage: float
    """Share of rows within the 80 % band, which comes from the errors in other groups."""
    half_width: float
    by_group: dict[str, float]

    def lines(self) -> list[str]:
        """For a terminal: the figures, then every group."""
        head = (f"{self.name:<14} {self.rows:4d} rows  error {self.error:.3f}  median {self.median:.3f}  "
                f"bias {self.bias:+.3f}  regret {self.regret:.3f} (worst {self.worst_regret:.3f})  "
                f"band covers {self.coverage:.2f}, half width {self.half_width:.3f}")  # fmt: skip
        return [head, *(f"    {group:<40} {error:.3f}" for group, error in self.by_group.items())]


def read_all(folder: Path) -> list[Measured]:
    """The rows of every known table of step times in `folder`; raises `UsageError` where there is none."""
    found = [
        row for name in tables.names() if (path := folder / f"{name}.csv").exists() for row in tables.read(path).rows
    ]
    if not found:
        raise UsageError(f"no tables of step times in {folder}: give the folder that holds {tables.names()[0]}.csv")
    return found


def parts(rows: Sequence[Measured]) -> dict[str, list[int]]:
    """Positions of the rows of each figure."""
    tests: dict[str, Callable[[Measured], bool]] = {
        "gpt_single": lambda row: row.group.startswith("single"),
        "gpt_multi": lambda row: row.group.startswith("multi"),
        "mpt": lambda row: row.table == "mpt_throughput",
        "llm": lambda row: row.table == "llm_published_runs",
        "torchtitan": lambda row: row.table == "torchtitan_runs",
    }
    found = {name: [i for i, row in enumerate(rows) if test(row)] for name, test in tests.items()}
    return {name: positions for name, positions in found.items() if positions}


def leave_out(rows: Sequence[Measured]) -> dict[str, TableFigures]:
    """Every group predicted by a calibration on all the others."""
    found = fit.cross_validated(rows)
    return {name: _figures(name, rows, positions, found) for name, positions in parts(rows).items()}


def datasheet(rows: Sequence[Measured]) -> dict[str, TableFigures]:
    """Every row predicted from data sheets and priors."""
    prior, regime = Calibration.prior(), np.empty(len(rows), dtype=np.int64)
    for part in fit.parts_of(rows):
        regime[part.index] = prior.regimes(part.cases, part.machine)
    found = fit.LeftOut(fit.predict(rows, prior), regime)
    return {name: _figures(name, rows, positions, found) for name, positions in parts(rows).items()}


def without_hidden_size(rows: Sequence[Measured]) -> dict[int, float]:
    """Single node: the error where all models of one hidden size are left out, which no target asks for."""
    single = [i for i in parts(rows).get("gpt_single", [])]
    found = {}
    for hidden in sorted({rows[i].case.shape.hidden for i in single}):
        out = {i for i in single if rows[i].case.shape.hidden == hidden}
        held = [rows[i] for i in sorted(out)]
        predicted = fit.predict(held, fit.fit([row for i, row in enumerate(rows) if i not in out]))
        found[hidden] = float(np.mean(np.abs(predicted / [row.step_s for row in held] - 1)))
    return found


def worst_rows(rows: Sequence[Measured], predicted: Array, count: int = 10) -> list[str]:
    """The rows that are furthest off, a line each."""
    off = np.log(predicted / [row.step_s for row in rows])
    lines = []
    for i in np.argsort(-np.abs(off))[:count]:
        case = rows[i].case
        split = f"tp {case.dims.tp} dp {case.dims.dp} pp {case.dims.pp} microbatch {case.microbatch}"
        lines.append(f"{rows[i].group:<36} {split}: {rows[i].step_s:.3f} s measured, {predicted[i]:.3f} s predicted")
    return lines


def write_shipped(rows: Sequence[Measured], path: Path) -> Calibration:
    """Fit what ships to all rows and write it."""
    made = fit.published(rows)
    save(made, path)
    return made


def _figures(name: str, rows: Sequence[Measured], positions: Sequence[int], found: fit.LeftOut) -> TableFigures:
    own = [rows[i] for i in positions]
    guess, measured = found.step_s[positions], np.array([row.step_s for row in own])
    error, groups = np.abs(guess / measured - 1), np.array([row.group for row in own])
    regrets = list(fit.regret(own, guess).values())
    widths = _half_widths(rows, positions, found)
    return TableFigures(
        name, len(own), float(error.mean()), float(np.median(error)), float(np.log(guess / measured).mean()),
        float(np.mean(regrets)) if regrets else float("nan"), max(regrets, default=float("nan")),
        float(np.mean(np.abs(np.log(guess / measured)) <= widths)), float(widths.mean()),
        {group: float(error[groups == group].mean()) for group in dict.fromkeys(groups.tolist())},
    )  # fmt: skip


def _half_widths(rows: Sequence[Measured], positions: Sequence[int], found: fit.LeftOut) -> Array:
    """Of every row, from the errors in groups that are not its own."""
    by_group = {group: fit.half_widths(rows, found, without=group) for group in {rows[i].group for i in positions}}
    return np.array([by_group[rows[i].group][REGIMES[found.regime[i]]] for i in positions])
