"""`plan --validate` as text: a line a table with its groups beneath, what was not predicted, what was ignored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from turbopump.planner.judged import Score
from turbopump.planner.validate import Report, TableReport
from turbopump.reporting.words import percent

HEAD = ("rows", "error", "median", "bias", "band covers", "half-width", "regret")
SEEN = "fitted on these very rows"
SHOWN_GROUPS, SHOWN_REASONS = 12, 4


def format_report(report: Report, *, groups: bool = True) -> str:
    """All tables as aligned text; with `groups`, those of every table, the worst first and no more than a dozen."""
    how = "as shipped, without a look at these tables" if report.mode == "frozen" else "every group without itself"
    fitted = f", fitted on {report.calibration}" if report.calibration else ""
    lines = [f"{report.path}: {report.mode} ({how}{fitted})", ""]
    table = [["", *HEAD]]
    for part in report.tables:
        table += _rows_of(part, groups)
    lines += _aligned(table)
    for part in report.tables:
        lines += _not_predicted(part)
    if seen := [part.title for part in report.tables if SEEN in part.basis]:
        lines += ["", f"{SEEN}, so their errors say little of others: {', '.join(seen)}"]
    if report.ignored:
        lines += ["", f"ignored, no table known here: {', '.join(report.ignored)}"]
    return "\n".join(lines)


def _rows_of(part: TableReport, groups: bool) -> list[list[str]]:
    total = part.total
    if total is None:
        return [[part.title, f"none of {len(part.not_predicted)}", *[""] * (len(HEAD) - 1)]]
    rows = [[part.title, *cells(total)]]
    found = sorted(part.groups.items(), key=lambda item: -item[1].error)
    if groups and len(found) > 1:
        rows += [[f"  {name}", *cells(one)] for name, one in found[:SHOWN_GROUPS]]
        if len(found) > SHOWN_GROUPS:
            rows.append([f"  and {len(found) - SHOWN_GROUPS} groups with less error", *[""] * len(HEAD)])
    return rows


def cells(found: Score) -> list[str]:
    """The figures of a score in words, in the order of HEAD."""
    regret = "" if found.regret is None else f"{percent(found.regret)} of {found.num_choices}"
    if found.false_fits is not None:
        regret = f"{found.false_fits} false fits"
        if found.false_rejections is not None:
            regret += f", {found.false_rejections} false rejections"
    return [
        f"{found.num_rows:,}", percent(found.error), percent(found.median_error),
        f"{'+' if found.bias >= 0 else ''}{percent(found.bias)}",
        "" if found.coverage is None else percent(found.coverage),
        "" if found.width is None else percent(found.width), regret,
    ]  # fmt: skip


def _not_predicted(part: TableReport) -> list[str]:
    """How many rows have no prediction, by reason: rows that differ in their number only are told as one."""
    if not part.not_predicted:
        return []
    reasons = Counter(_reason(text) for text in part.not_predicted)
    lines = ["", f"{part.title}: {len(part.not_predicted)} row{'s' * (len(part.not_predicted) > 1)} not predicted"]
    lines += [f"  {count} x {reason}" for reason, count in reasons.most_common(SHOWN_REASONS)]
    more = len(reasons) - SHOWN_REASONS
    return [*lines, f"  and {more} other reasons (--json lists them all)"] if more > 0 else lines


def _reason(text: str) -> str:
    where, _, why = text.partition(": ")
    return why if where.rpartition(":")[2].isdigit() else text


def _aligned(rows: Sequence[Sequence[str]]) -> Iterable[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows)]
    for row in rows:
        first, *rest = row
        yield "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(rest, widths[1:]))]).rstrip()
