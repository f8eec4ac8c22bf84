"""The verb `report`: where every second of a run went, what limits it, what to change first. No torch.

One run gives its page; several give a comparison. The page is one HTML file that opens without a network; the same
figures stand in the JSON file beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbopump.core.errors import UsageError
from turbopump.core.files import to_json, write_atomic
from turbopump.core.rundir import RunDir
from turbopump.core.version import VERSION
from turbopump.reporting.account import SCHEMA_VERSION, Summary, run_shares, summarize
from turbopump.reporting.compare import compare, comparison_page, comparison_text
from turbopump.reporting.decide import changes, limits, nothing_to_change
from turbopump.reporting.load import load_run
from turbopump.reporting.page import run_page
from turbopump.reporting.predicted_page import predicted_lines
from turbopump.reporting.words import headline


@dataclass(frozen=True)
class ReportFiles:
    """What `report` wrote."""

    html: Path
    json: Path


def report(runs: Sequence[Path | str], *, output: Path | None = None) -> ReportFiles:
    """Write the page of one run, or the comparison of several; returns its files.

    `output` is the page to write (`page.html`, its JSON beside it as `page.json`) or a directory; by default
    `report.html` in the run directory, `comparison.html` in the first of several. Raises `UsageError` where there is
    no run, `RunDirectoryError` where nothing can be written.
    """
    return _write(runs, output)[0]


def report_from_command_line(runs: Sequence[Path], *, output: Path | None = None, as_json: bool = False) -> str:
    """`report`, and what to print: headline, decisions and where to look, or the JSON itself."""
    files, text = _write(runs, output)
    return files.json.read_text(encoding="utf-8").rstrip() if as_json else f"{text}\n\n{files.html}"


def _write(runs: Sequence[Path | str], output: Path | None) -> tuple[ReportFiles, str]:
    if isinstance(runs, (str, Path)):
        runs = [runs]
    if not runs:
        raise UsageError("report needs a run directory: report(['runs/demo'])")
    files = _targets(RunDir(Path(runs[0])), output, several=len(runs) > 1)
    loaded = [load_run(Path(run)) for run in runs]
    summaries = [summarize(run) for run in loaded]
    if len(loaded) == 1:
        page, content, text = run_page(loaded[0], summaries[0]), run_record(summaries[0]), run_text(summaries[0])
    else:
        comparison = compare(loaded, summaries)
        page, text = comparison_page(loaded, comparison), comparison_text(comparison)
        content = {
            "schema_version": SCHEMA_VERSION,
            "turbopump_version": VERSION,
            "comparison": comparison.record(),
            "runs": [run_record(summary) for summary in summaries],
        }
    write_atomic(files.html, page)
    write_atomic(files.json, to_json(content, indent=True))
    return files, text


def _targets(first: RunDir, output: Path | None, *, several: bool) -> ReportFiles:
    if output is None:
        page = first.path / "comparison.html" if several else first.report_html
    elif output.suffix in (".html", ".htm"):
        page = output
    elif output.suffix == "" or output.is_dir():
        page = output / ("comparison.html" if several else "report.html")
    else:
        raise UsageError(f"{output} is no page: give a name that ends in .html, or a directory")
    return ReportFiles(html=page, json=page.with_suffix(".json"))


def run_record(summary: Summary) -> dict[str, Any]:
    """The content of report.json for one run."""
    return {
        "schema_version": SCHEMA_VERSION,
        "turbopump_version": VERSION,
        "headline": headline(summary),
        "limits": limits(summary),
        "changes": changes(summary),
        "wall_time_s_by_kind": run_shares(summary),
        "summary": summary,
    }


def run_text(summary: Summary) -> str:
    """The report in a few lines, for the terminal."""
    lines = [headline(summary), ""]
    lines += [f"limits this run: {f.title} ({f.evidence})" for f in limits(summary)]
    found = changes(summary)
    lines += [f"change: {f.title}. {f.evidence}" + (f" [{f.setting}]" if f.setting else "") for f in found[:3]]
    if not found:
        lines.append(nothing_to_change(summary))
    lines += predicted_lines(summary.predicted)
    lines += [f"note: {note}" for note in summary.notes]
    return "\n".join(lines)
