"""`plan --validate PATH`: every published table found there, predicted and compared with what was measured.

    report = validate(Path("published"), frozen=False)     report.tables, report.ignored, report.to_json()

Cross-validated (the default), every group of rows, a model on its cluster or a device, is predicted without itself, and
its band comes from the errors in the other groups. `frozen`, all is predicted by what ships with the package (the
calibration of `planner/calibrations/`, the curves and links of the catalog): the way to judge tables never seen.
Columns are checked before anything is computed: a table that lacks one is an error that names it. A row that cannot be
predicted is counted and named with its reason; a file that is no table known here is named as ignored.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from turbopump.core.errors import ConfigError, TurbopumpError, UsageError
from turbopump.core.files import digest_file
from turbopump.hardware.datasheet import curves
from turbopump.planner import (
    cluster_tables,
    fit,
    memory,
    memory_tables,
    mlperf_table,
    nemo_table,
    operation_tables,
    tables,
)
from turbopump.planner.judged import Array, Row, Score, by_group, grouped, half_width, score
from turbopump.planner.operation_tables import read_lines
from turbopump.planner.tables import Measured

Mode = Literal["cross-validated", "frozen"]
_SEEN = ", fitted on these very rows"
STEP_TABLES = (*tables.COLUMNS, nemo_table.NAME)


class StepModel(Protocol):
    """A calibrated model of step times."""

    def seconds(self, rows: Sequence[Measured]) -> Array:
        """Predicted, [rows]."""

    def half_widths(self, rows: Sequence[Measured]) -> Array | None:
        """Of the 80 % band, in the logarithm, [rows]; None where the calibration says nothing of it."""

    @property
    def digest(self) -> str:
        """Of what it was fitted on; empty where that does not apply."""


class StepModels(Protocol):
    """Where calibrated models come from."""

    def shipped(self) -> StepModel:
        """That comes with the package."""

    def fitted(self, rows: Sequence[Measured]) -> StepModel:
        """Fitted to these rows alone."""

    def held_out(self, rows: Sequence[Measured]) -> tuple[Array, Array | None]:
        """Seconds of every row by a model that never saw its group, of two groups or more, [rows]; and half-widths of
        its band, from errors of the groups but its own, or None to leave that to the other groups of its table."""


@dataclass(frozen=True)
class TableReport:
    """One table, or one part of it whose rows are of one kind, with the predictions of its rows."""

    name: str
    part: str
    """E.g. `single_node_A100`, or `memory` of a table that holds times as well; empty for a whole table."""
    basis: str
    """How the predictions were made, in a sentence."""
    rows: tuple[Row, ...]
    not_predicted: tuple[str, ...] = ()
    """`file:line: reason` of rows that are in no figure here."""

    @property
    def title(self) -> str:
        return f"{self.name}: {self.part}" if self.part else self.name

    @property
    def total(self) -> Score | None:
        return score(self.rows) if self.rows else None

    @property
    def groups(self) -> dict[str, Score]:
        return by_group(self.rows)

    def to_json(self) -> dict[str, Any]:
        total = self.total
        return {
            "table": self.name, "part": self.part, "basis": self.basis,
            "total": _plain(total) if total else None,
            "groups": {name: _plain(found) for name, found in self.groups.items()},
            "num_not_predicted": len(self.not_predicted), "not_predicted": list(self.not_predicted),
        }  # fmt: skip


@dataclass(frozen=True)
class Report:
    """All tables of a folder."""

    path: str
    mode: Mode
    calibration: str
    """Digest of what the frozen calibration was fitted on; empty where it was fitted here."""
    tables: tuple[TableReport, ...]
    ignored: tuple[str, ...]
    """Files that are no table known here."""

    def to_json(self) -> dict[str, Any]:
        """Everything but the single rows."""
        return {
            "path": self.path, "mode": self.mode, "calibration": self.calibration,
            "tables": [table.to_json() for table in self.tables],
            "ignored": list(self.ignored),
        }  # fmt: skip


def _plain(found: Score) -> dict[str, float | int | None]:
    return {**asdict(found), "width_over_error": found.width_over_error}


def known_tables() -> dict[str, tuple[str, ...]]:
    """Columns that each known table must have, by the stem of its file; `torchtitan_runs` holds times and memory;
    the columns of Megatron-Bridge go by several names, which `nemo_table` knows."""
    found: dict[str, tuple[str, ...]] = {nemo_table.NAME: ()}
    for columns in (tables.COLUMNS, memory_tables.COLUMNS, operation_tables.COLUMNS, cluster_tables.COLUMNS,
                    mlperf_table.COLUMNS):  # fmt: skip
        for name, needed in columns.items():
            found[name] = tuple(dict.fromkeys((*found.get(name, ()), *needed)))
    return found


def validate(path: Path, *, frozen: bool = False, models: StepModels | None = None) -> Report:
    """Predicts and compares every known table of a folder (or one file).

    Raises `UsageError` where there is no such path or no known table, and `ConfigError` with every column that a table
    lacks.
    """
    files, ignored = _found(path)
    _check_columns(files)
    mode: Mode = "frozen" if frozen else "cross-validated"
    models = models or _own_models()
    step_rows, problems = _read_steps(files)
    shipped = models.shipped() if frozen else None
    judged = _judge_steps(step_rows, shipped, models, problems)
    reports: list[TableReport] = []
    for file in files:
        if file.stem in STEP_TABLES:
            basis = _steps_basis(file.stem, step_rows, shipped)
            reports += _parts(file.stem, [row for row in judged if row.table == file.stem], problems[file.stem], basis)
        if file.stem in memory_tables.COLUMNS:
            reports += _memory(file)
        if file.stem in mlperf_table.COLUMNS:
            reports.append(_mlperf(file, shipped, models, step_rows))
        judge = _JUDGES.get(file.stem)
        if judge is not None:
            rows, not_predicted = judge(file, read_lines(file)[0], frozen=frozen)
            basis = _basis(file, frozen)
            reports.append(_checked(TableReport(file.stem, "", basis, tuple(rows), tuple(not_predicted))))
    return Report(str(path), mode, shipped.digest if shipped else "", tuple(reports), tuple(ignored))


def _own_models() -> StepModels:
    from turbopump.planner.step_models import OwnModels

    return OwnModels()


# files and columns ----------------------------------------------------------------------------------------------------


def _found(path: Path) -> tuple[list[Path], list[str]]:
    known = known_tables()
    if path.is_file():
        files, ignored = ([path], []) if path.stem in known else ([], [path.name])
    elif path.is_dir():
        entries = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
        files = [entry for entry in entries if entry.suffix == ".csv" and entry.stem in known]
        ignored = [entry.name for entry in entries if entry not in files]
    else:
        raise UsageError(f"no file or folder at {path}: give a folder of published tables, e.g. shared/published")
    if not files:
        there = f" (there: {', '.join(ignored[:8])})" if ignored else ""
        raise UsageError(f"no known table at {path}{there}: known are {', '.join(f'{name}.csv' for name in known)}")
    return files, ignored


def _check_columns(files: Sequence[Path]) -> None:
    """Raises `ConfigError` with every column that a table lacks; columns that nothing reads are no matter."""
    problems, known = [], known_tables()
    for file in files:
        _, columns = read_lines(file)
        needed = known[file.stem]
        spare = [column for column in columns if column not in needed]
        for column in (column for column in needed if column not in columns):
            close = difflib.get_close_matches(column, spare, 1)
            hint = f"is it {close[0]!r}?" if close else f"it has {', '.join(columns) or 'no columns'}"
            problems.append(f"{file.name}: column {column!r} is lacking; {hint} It needs {', '.join(needed)}")
    if problems:
        raise ConfigError(problems, str(files[0].parent))


# step times -----------------------------------------------------------------------------------------------------------


def _read_steps(files: Sequence[Path]) -> tuple[list[Measured], dict[str, list[str]]]:
    rows: list[Measured] = []
    problems: dict[str, list[str]] = {}
    for file in files:
        if file.stem in STEP_TABLES:
            table = nemo_table.read(file) if file.stem == nemo_table.NAME else tables.read(file)
            problems[file.stem] = list(table.problems)
            for row in table.rows:
                try:
                    row.machine.peak_flops_per_s(row.case.dtype)
                    rows.append(row)
                except TurbopumpError as error:
                    problems[file.stem].append(f"{file.name}: {row.group}: {error}")
    return rows, problems


def _steps_basis(name: str, rows: Sequence[Measured], shipped: StepModel | None) -> str:
    if shipped is None:
        return "step times; every group by a calibration without it, its band from the errors of the other groups"
    digest = fit.digests([row for row in rows if row.table == name]).get(name)
    seen = f"{name}:{digest}" in shipped.digest.split("+")
    return f"step times by the calibration that ships{_SEEN if seen else ''}"


def _judge_steps(
    rows: Sequence[Measured], shipped: StepModel | None, models: StepModels, problems: Mapping[str, list[str]]
) -> list[Row]:
    """All step times of all tables; what cannot be predicted is added to the problems of its table."""
    if shipped is not None:
        return _predicted(rows, shipped, problems)
    if len({(row.table, row.group) for row in rows}) < 2:
        for row in rows:
            problems[row.table].append(f"{row.table}.csv: {row.group} {row.choice}: there is no other group to "
                                       "calibrate with; judge it by what ships: --frozen")  # fmt: skip
        return []
    seconds, widths = models.held_out(rows)
    judged = [_judged(row, float(s)) for row, s in zip(rows, seconds, strict=True)]
    if widths is None:
        return judged
    return [_banded(row, float(width)) for row, width in zip(judged, widths, strict=True)]


def _judged(row: Measured, seconds: float) -> Row:
    return Row(row.table, row.group, row.choice, seconds, row.step_s, "s", choice=row.choice)


def _banded(row: Row, half: float) -> Row:
    return replace(row, low=row.predicted * math.exp(-half), high=row.predicted * math.exp(half))


def _parts(name: str, rows: Sequence[Row], problems: Sequence[str], basis: str) -> list[TableReport]:
    """A report a part of the table; problems stand with the first."""
    reports = []
    for number, part in enumerate(list(dict.fromkeys(_part(row) for row in rows)) or [""]):
        members = [row for row in rows if _part(row) == part]
        if any(math.isnan(row.low) for row in members):
            members = _with_bands(members)
        reports.append(_checked(TableReport(name, part, basis, tuple(members), () if number else tuple(problems))))
    return reports


def _part(row: Row) -> str:
    """The `set` of a table of several: what stands before the slash of its groups."""
    return row.group.partition("/")[0] if row.table in ("gpt_3d_parallel_runs", "llm_published_runs") else ""


def _predicted(own: Sequence[Measured], model: StepModel, problems: Mapping[str, list[str]]) -> list[Row]:
    """Rows with predictions; machine by machine, so that one which the model refuses does not take others with it."""
    found: list[Row] = []
    by_machine: dict[str, list[Measured]] = {}
    for row in own:
        by_machine.setdefault(f"{row.machine.device.name} x {row.machine.num_devices}", []).append(row)
    for machine, members in by_machine.items():
        try:
            seconds, half_widths = model.seconds(members), model.half_widths(members)
        except TurbopumpError as error:
            for row in members:
                problems[row.table].append(f"{row.table}.csv: {row.group} {row.choice} on {machine}: {error}")
            continue
        for i, row in enumerate(members):
            judged = _judged(row, float(seconds[i]))
            found.append(judged if half_widths is None else _banded(judged, float(half_widths[i])))
    return found


def _with_bands(rows: Sequence[Row]) -> list[Row]:
    """Every group's band out of the errors of the others."""
    errors = {group: [math.log(r.predicted / r.measured) for r in members if r.predicted > 0]
              for group, members in grouped(rows).items()}  # fmt: skip
    widths = {group: half_width(errors, without=group) for group in errors}
    return [_banded(row, widths[row.group]) for row in rows]


# memory, MLPerf, the rest ---------------------------------------------------------------------------------------------


def _memory(file: Path) -> list[TableReport]:
    """Figures of memory; nothing in that model was fitted but two constants, so both modes are the same. The band is
    the margin that `fits` keeps, to both sides."""
    table = memory_tables.read(file)
    predicted = memory_tables.predictions(table.rows) if table.rows else np.zeros(0)
    rows = []
    for of, p in zip(table.rows, predicted, strict=True):
        label = f"{of.quantity} {of.case.recompute} {of.case.dims}"
        unit = "%" if of.quantity == "activations_relative" else "GiB"
        capacity = float(of.device_gib) if of.quantity == "peak" else math.nan
        rows.append(Row(table.name, of.group, label, float(p), of.value, unit, asked=_asked(of, float(p)),
                        capacity=capacity))  # fmt: skip
    basis = "peak memory of the fullest rank, or a part of it; nothing is fitted"
    banded = tuple(_banded(row, math.log1p(memory.MARGIN)) for row in rows)
    return [_checked(TableReport(table.name, "memory", basis, banded, table.problems))]


def _asked(row: memory_tables.MeasuredMemory, predicted_gib: float) -> float:
    """GiB that a device must have for `fits`; nan for rows of a part of a rank's memory."""
    if row.quantity != "peak":
        return math.nan
    return predicted_gib * (1 + memory.MARGIN) + memory.OUTSIDE_BYTES / memory.GIB


def _mlperf(file: Path, shipped: StepModel | None, models: StepModels, step_rows: Sequence[Measured]) -> TableReport:
    """Throughput of rows whose transformer is known, by the fastest split that the step model finds."""
    measured, problems = mlperf_table.read(file)
    not_predicted, rows = list(problems), []
    if measured and shipped is None and not step_rows:
        why = "no table of step times to calibrate with; judge it by what ships: --frozen"
        not_predicted += [f"{file.name}: {m.label}: {why}" for m in measured]
    elif measured:
        rows = mlperf_table.predict(measured, shipped or models.fitted(step_rows), not_predicted)
    if any(math.isnan(row.low) for row in rows):
        rows = _with_bands(rows)
    basis = "seconds a step of the fastest split that divides (the table says none), by the model of step times"
    return _checked(TableReport(file.stem, "", basis, tuple(rows), tuple(not_predicted)))


def _basis(file: Path, frozen: bool) -> str:
    if file.stem in operation_tables.COLUMNS:
        if not frozen:
            return "seconds of an operation by the curves of a device's relatives, without its own"
        seen = any(digest_file(file) in curve.source for curve in curves())
        return f"seconds of an operation by the curves that ship{_SEEN if seen else ''}"
    how = "links, power and failure rates that ship" if frozen else "the table's other groups"
    return f"by {how}"


def _checked(report: TableReport) -> TableReport:
    """Without rows whose prediction or measurement is no positive number: they are named instead."""
    good = [row for row in report.rows if _positive(row.predicted) and _positive(row.measured)]
    bad = [f"{report.name}.csv: {row.group} {row.label}: predicted {row.predicted:g}, measured {row.measured:g}"
           for row in report.rows if not (_positive(row.predicted) and _positive(row.measured))]  # fmt: skip
    return replace(report, rows=tuple(good), not_predicted=(*report.not_predicted, *bad))


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


_Judge = Callable[..., tuple[list[Row], list[str]]]
_JUDGES: Mapping[str, _Judge] = {
    **dict.fromkeys(operation_tables.COLUMNS, operation_tables.judge),
    **dict.fromkeys(cluster_tables.COLUMNS, cluster_tables.judge),
}
