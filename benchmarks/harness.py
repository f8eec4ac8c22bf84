"""The language all benchmarks speak: targets, rows, paired blocks, ratios with an interval, one form of result file.

A benchmark states its `Target`s in its own source, measures, and ends with `main(NAME, measure)`:

    TARGETS = targets(Target("spine.span_cost", "cost of all spans of a step", "lower", 0.01, "fraction of step"), ...)

    def measure(quick: bool) -> list[Row]:
        times = alternating_blocks({"with": run_with, "without": run_without}, blocks=5 if quick else 30)
        ratio = ratio_with_interval(times["with"], times["without"])
        return [TARGETS["spine.span_cost"].row(ratio.value - 1, runs=ratio.runs)]

Contestants are compared block by block, in turns, so that what slows the machine down for a while slows all of them.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from turbopump.hardware.detect import cpu_name, machine_name

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measured figure, as it stands in the result file. `bound` is measured in the same run, in the same unit;
    `measured` is the date and commit of a row that was kept from an earlier run, else empty: those of the file."""

    id: str
    what: str
    value: float
    unit: str
    better: Literal["higher", "lower"]
    target: float | None
    bound: float | None
    peers: Mapping[str, float | None]
    runs: int
    spread: tuple[float, float]
    measured: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None where there is none."""
        if self.target is None:
            return None
        return self.value >= self.target if self.better == "higher" else self.value <= self.target


@dataclass(frozen=True)
class Target:
    """What a benchmark promises for one row, written down before it is measured."""

    id: str
    what: str
    better: Literal["higher", "lower"]
    target: float | None
    unit: str

    def row(
        self,
        value: float,
        *,
        runs: int,
        spread: tuple[float, float] | None = None,
        bound: float | None = None,
        peers: Mapping[str, float | None] | None = None,
    ) -> Row:
        """The row of a measured value; `spread` is its 95 % interval or the range of its runs."""
        low, high = spread if spread is not None else (value, value)
        return Row(
            self.id, self.what, value, self.unit, self.better, self.target, bound, peers or {}, runs, (low, high)
        )


def targets(*given: Target) -> dict[str, Target]:
    """Targets by id; raises `ValueError` for an id given twice."""
    found = {target.id: target for target in given}
    if len(found) != len(given):
        raise ValueError("a target id is given twice")
    return found


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of paired blocks, with its bootstrap interval."""

    value: float
    low: float
    high: float
    runs: int

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2

    @property
    def spread(self) -> tuple[float, float]:
        return (self.low, self.high)


def alternating_blocks(
    contestants: Mapping[str, Callable[[], object]],
    *,
    blocks: int = 20,
    warmup_blocks: int = 1,
    clock: Callable[[], float] = time.thread_time,
) -> dict[str, list[float]]:
    """Seconds of every contestant in every block, by name; block i of one is to be paired with block i of another.

    In each block all contestants run once; who begins moves on from block to block. The clock is the CPU time of this
    thread, so contestants must compute in one thread; where waiting belongs to the question, give `time.perf_counter`.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for block in range(-warmup_blocks, blocks):
        first = block % len(names)
        order = names[first:] + names[:first]
        for name in reversed(order) if block // len(names) % 2 else order:
            gc.collect(1)  # what one leaves behind is not charged to the next; the whole heap would take 0.1 s
            begin = clock()
            contestants[name]()
            elapsed = clock() - begin
            if block >= 0:
                seconds[name].append(elapsed)
    return seconds


def ratio_with_interval(
    a: Sequence[float], b: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Ratio:
    """Median of a[i] / b[i] with its percentile-bootstrap interval (Efron 1979), blocks resampled in pairs.

    The median of paired ratios does not follow single slow blocks, nor a drift that both contestants share.
    For speed of X over Y give the times of Y first. Raises `ValueError` for lists that do not pair up.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"blocks must pair up: {len(a)} and {len(b)} given")
    ratios = np.asarray(a, dtype=float) / np.asarray(b, dtype=float)
    picks = np.random.default_rng(seed).integers(0, len(ratios), (resamples, len(ratios)))
    medians = np.median(ratios[picks], axis=1)
    low, high = np.quantile(medians, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def machine() -> dict[str, Any]:
    """What decides a figure of this machine; nothing that names it or its owner."""
    packages = ("turbopump", "torch", "numpy", "safetensors", "pyarrow")
    return {
        "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in packages if (found := _version(name))},
    }


def write_results(name: str, rows: Sequence[Row], *, quick: bool = False, directory: Path = RESULTS) -> Path:
    """Write `NAME.<machine>.json`; a quick run goes to `NAME.<machine>.quick.json`, which is not committed."""
    if len({row.id for row in rows}) != len(rows):
        raise ValueError("a row id is given twice")
    result = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": machine(),
        "rows": [{name: value for name, value in asdict(row).items() if name != "measured" or value} for row in rows],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.{machine_name()}{'.quick' if quick else ''}.json"
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


@dataclass
class _Table:
    head: tuple[str, ...]
    lines: list[tuple[str, ...]] = field(default_factory=list)

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.lines)]
        rows = [self.head, tuple("-" * width for width in widths), *self.lines]
        return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text, one line each."""
    shown = _Table(("id", "value", "95 % or range", "target", "bound", "runs", "peers"))
    for row in rows:
        wish = {"higher": ">=", "lower": "<="}[row.better]
        verdict = {True: "met", False: "MISSED", None: ""}[row.met]
        target = f"{wish} {row.target:g} {verdict}" if row.target is not None else ""
        peers = ", ".join(
            f"{name} {'absent' if value is None else f'{value:.4g}'}" for name, value in row.peers.items()
        )
        bound = "" if row.bound is None else f"{row.bound:.4g}"
        spread = f"{row.spread[0]:.4g} .. {row.spread[1]:.4g}"
        shown.lines.append((row.id, f"{row.value:.4g} {row.unit}", spread, target, bound, str(row.runs), peers))
    return shown.text()


def print_table(rows: Sequence[Row]) -> None:
    print(table(rows))


def main(
    name: str,
    measure: Callable[[bool], Sequence[Row]],
    arguments: Sequence[str] | None = None,
    directory: Path = RESULTS,
) -> None:
    """Run one benchmark from the command line: measure, print the table, write the result file."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}")
    parser.add_argument("--quick", action="store_true", help="the same rows from fewer runs, within a minute")
    quick = parser.parse_args(arguments).quick
    rows = measure(quick)
    print_table(rows)
    print(f"written to {write_results(name, rows, quick=quick, directory=directory)}")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Commit of the source, with `+` where the working tree differs from it; empty outside a repository."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no", ":(top)turbopump", ":(top)benchmarks/*.py")
    return f"{commit}{'+' if changed else ''}"
