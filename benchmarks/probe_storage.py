"""How well storage is predicted at sizes and depths that were never measured, and how near its rows come to fio's.

`python -m benchmarks.probe_storage [DIRECTORY]` measures the disk of DIRECTORY (here) for about a minute and prints
the figures. No target stands in the list for them: a shared disk's own rate moves by a factor of two within minutes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from turbopump.core.units import human, human_seconds
from turbopump.data import bench, cost, fio
from turbopump.data.ops import RandomRead
from turbopump.hardware.profile import Measurement, Request


def storage_rows(directory: Path, row_s: float = 0.1, budget_s: float = 60.0) -> list[Measurement]:
    """Rows of the first two tiers, and fio's where it is installed."""
    request = Request(directory=directory, row_s=row_s)
    trials = [trial for trial in bench.trials(request) if trial.tier < 2 or trial.route == fio.ROUTE]
    # fio directly behind our own rows of the same operation: what else runs on the machine changes meanwhile
    first = {trial.op: number for number, trial in reversed(list(enumerate(trials)))}
    trials.sort(key=lambda trial: first[trial.op])
    return list(bench.measure(trials, request, time.monotonic() + budget_s))


def interpolation_errors(rows: Iterable[Measurement]) -> dict[str, list[float]]:
    """Relative errors of left-out rows: `size` or `depth`, of cold and of cached reads."""
    errors: dict[str, list[float]] = {}
    for left in cost.leave_out(rows):
        name = f"{left.left}, {'cached' if 'cached=True' in left.op_key else 'cold'}"
        errors.setdefault(name, []).append(left.error)
    return errors


def shares_of_fio(rows: Iterable[Measurement]) -> dict[str, float]:
    """Our best rate over fio's at each operation that both measured; empty where fio is not installed."""
    rows = [row for row in rows if row.works and row.kind == RandomRead.__name__]
    theirs = {row.op_key: row.seconds for row in rows if row.route == fio.ROUTE}
    ours: dict[str, float] = {}
    for row in rows:
        if row.route != fio.ROUTE:
            ours[row.op_key] = min(row.seconds, ours.get(row.op_key, row.seconds))
    return {key: seconds / ours[key] for key, seconds in theirs.items() if key in ours}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_storage")
    parser.add_argument("directory", type=Path, nargs="?", default=Path("."))
    rows = storage_rows(parser.parse_args().directory)
    spec = cost.storage_spec(rows)
    print(f"reads {human(spec.read_bytes_per_s, 'B/s')}, writes {human(spec.write_bytes_per_s, 'B/s')}, "
          f"{human(spec.random_reads_per_s)} reads/s of 4 KiB, latency {human_seconds(spec.latency_s)}")  # fmt: skip
    for name, errors in interpolation_errors(rows).items():
        print(f"left out: {name}: median error {np.median(errors):.3f}, 80 % within {np.quantile(errors, 0.8):.3f}, "
              f"{len(errors)} rows")  # fmt: skip
    for key, share in shares_of_fio(rows).items():
        print(f"{key}: {share:.2f} of fio's rate")
    if not fio.installed():
        print("fio is not installed: no comparison")
    for line in bench.uncertainties(rows):
        print(f"uncertain: {line}")


if __name__ == "__main__":
    main()
