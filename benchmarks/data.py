"""The data system beside what bounds it and beside its peers: reads, loaders, packing, checks, remote, exact resume.

    python -m benchmarks.data [--quick] [--only GROUP ...] [--directory DIR]

Groups: `warm` (data_warm), `peers` and `pack` (data_versus), `loader` (data_loaders), `cold`, `verify`, `fuzz`,
`remote`, `resume`, `order` (data_GROUP). With `--only`, rows of other groups stay in the file as they were measured.
Scratch files lie below DIR and go at any end; peers are installed once, into `.peers`. A group that fails is named, its
rows are absent, the others still count, and the exit status is 1. About 25 minutes; give it an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data_cold, data_loaders, data_order, data_remote, data_resume, data_versus, data_warm
from benchmarks.data_own import in_process, note
from benchmarks.data_peers import Peer, PeerError, close_all, installed_peers
from benchmarks.harness import RESULTS, Ratio, Row, Target, print_table, targets, write_results
from turbopump.core.errors import TurbopumpError
from turbopump.core.files import from_json
from turbopump.data.scratch import ScratchDirectory, sweep
from turbopump.hardware.detect import machine_name

TARGETS = targets(
    Target("data.warm_100B", "warm batched (256) random reads of 100 B records: share of the best compiled gather",
           "higher", 0.7, "fraction of bound"),
    Target("data.warm_2KB", "the same at 2 KB (token windows, uint16 as stored)", "higher", 0.85, "fraction of bound"),
    Target("data.warm_12KB", "the same at 12 KB", "higher", 0.85, "fraction of bound"),
    Target("data.warm_110KB", "the same at 110 KB", "higher", 0.85, "fraction of bound"),
    Target("data.vs_best_100B", "over the best dataset library at 100 B (batches of 256; 1,000,000 records)", "higher",
           15, "ratio"),
    Target("data.vs_best_2KB", "the same at 2 KB (token windows)", "higher", 6, "ratio"),
    Target("data.vs_best_12KB", "the same at 12 KB", "higher", 2.2, "ratio"),
    Target("data.vs_best_110KB", "the same at 110 KB", "higher", 1.1, "ratio"),
    Target("data.cold", "cold random reads over fio at its best engine and depth (12 KB)", "higher", 0.8, "ratio"),
    Target("data.loader_12KB", "loader into a consumer that does nothing over the best peer's loader on its own format "
           "(12 KB)", "higher", 2.0, "ratio"),
    Target("data.loader_tokens", "the same for token windows (int64 [256, 1025])", "higher", 2.0, "ratio"),
    Target("data.pack", "packing speed over the best peer for the same input (12 KB records from an iterator)",
           "higher", 1.0, "ratio"),
    Target("data.verify_rate", "checksum verification over a plain read of the same bytes from memory", "higher", 0.5,
           "ratio"),
    Target("data.remote_first_epoch", "first epoch from S3 with 50 ms a request and a cache of 25 % of the data over "
           "min(local speed; link)", "higher", 0.8, "ratio"),
    Target("data.resume_exact", "global batches that differ after resuming on another number of ranks and workers "
           "(>= 200 random schedules)", "lower", 0, "count"),
)  # fmt: skip
MUTATIONS, QUICK_MUTATIONS = 100_000, 2_000
FUZZ_PARTS = 10  # a seed each, so that there is something to tell in between


@dataclass
class Run:
    """What the groups share. `failed` names what makes the exit status 1."""

    quick: bool
    directory: Path
    scratch: Path
    ends: ExitStack
    failed: list[str]

    @cached_property
    def peers(self) -> list[Peer]:
        """All peers, started when first asked for; the first time ever they are installed, which takes minutes."""
        note("peers: installing what is missing, and starting them")
        peers = installed_peers()
        self.ends.callback(close_all, peers)
        for peer in peers:
            if peer.absent:
                note(f"  {peer.name} is absent: {peer.absent}")
        return peers

    def folder(self) -> tempfile.TemporaryDirectory[str]:
        return tempfile.TemporaryDirectory(dir=self.scratch)


# ---- groups


def warm(run: Run) -> Iterator[Row]:
    for name in data_warm.SIZES:
        with run.folder() as folder:
            yield warm_row(name, data_warm.measure_warm(name, Path(folder), run.quick))


def warm_row(name: str, found: data_warm.Warm) -> Row:
    """Beside the share of the best gather: of one into fresh buffers, of records that differ in length, and more."""
    beside: dict[str, float | None] = {
        "of fresh buffers": found.fixed.fresh, "records of 0.5 to 1.5 times": found.variable.ratio.value,
        "first epoch": found.first_epoch, "us a batch": 1e6 * found.fixed.our_batch_s,
        "bound's us": 1e6 * found.fixed.best_batch_s,
    }  # fmt: skip
    if found.variable.by_offsets is not None:
        beside["of a gather that reads offsets"] = found.variable.by_offsets
    if found.wide is not None:
        beside["windows as int64"] = found.wide.ratio.value
    return _row(f"data.warm_{name}", found.fixed.ratio, bound=1.0, peers=beside)


def peers(run: Run) -> Iterator[Row]:
    for name in data_warm.SIZES:
        with run.folder() as folder:
            found = data_versus.measure_reads(name, run.peers, Path(folder), run.quick)
        yield _row(f"data.vs_best_{name}", found.ratio, peers=found.over)


def pack(run: Run) -> Iterator[Row]:
    note(f"packing, {data_versus.PACK_SIZE}")
    with run.folder() as folder:
        found, of_array = data_versus.measure_pack(run.peers, Path(folder), run.quick)
    yield _row("data.pack", found.ratio, peers={**found.over, "ours from an array over ours": of_array})


def loader(run: Run) -> Iterator[Row]:
    for kind in data_loaders.RECORDS:
        with run.folder() as folder:
            found = data_loaders.measure_loaders(kind, run.peers, Path(folder), run.quick)
        note(f"  {found.ours} over {found.best}: {found.ratio.value:.2f}")
        yield _row(f"data.loader_{kind}", found.ratio, peers=found.rates)


def cold(run: Run) -> Iterator[Row]:
    note("cold reads beside fio, some minutes" if not run.quick else "cold reads beside fio")
    for result in data_cold.measure_cold(run.quick, run.directory):
        rates: dict[str, float | None] = {
            f"{name}, reads/s": speed.reads_per_s for name, speed in result.speeds.items()
        }
        if result.ratio is None:
            note(f"  {result.record}: fio is not installed: no comparison")
            continue
        note(f"  {result.record}, {result.engine}: {result.ratio.value:.2f} of {result.best}")
        if result.record == "12 KB":
            yield _row("data.cold", result.ratio, peers=rates)


def verify(run: Run) -> Iterator[Row]:
    note("verification")
    found = importlib.import_module("benchmarks.data_verify").measure_verify(run.quick)
    rates = {
        "verify, bytes/s": found.verify_bytes_per_s, "plain read, bytes/s": found.read_bytes_per_s,
        "plain read of touched maps, bytes/s": found.touched_bytes_per_s,
    }  # fmt: skip
    yield _row("data.verify_rate", found.ratio, peers=rates)


def remote(run: Run) -> Iterator[Row]:
    note("first epoch from a slow store, a quarter of a minute a round")
    yield listed_row("data.remote_first_epoch", data_remote.measure_remote(run.quick))


def resume(run: Run) -> Iterator[Row]:
    note("exact resume")
    with run.folder() as folder:
        found = data_resume.measure_resume(Path(folder), run.quick)
    note(f"  {found.differing} of {found.batches} global batches differ, {found.schedules} schedules")
    yield TARGETS["data.resume_exact"].row(found.differing, runs=found.schedules, peers=found.figures)


def order(run: Run) -> Iterator[Row]:
    """No row: a line an order."""
    data_order.print_order_ns(run.quick)
    yield from ()


def fuzz(run: Run) -> Iterator[Row]:
    """No row: a line, and a failure where anything but a typed error or right data came of a mutation."""
    module = importlib.import_module("benchmarks.data_fuzz")
    parts, mutations = (1, QUICK_MUTATIONS) if run.quick else (FUZZ_PARTS, MUTATIONS)
    note(f"{mutations} mutations of manifests and shards")
    counts: Counter[str] = Counter()
    for seed in range(parts):
        found = in_process(module.fuzz, mutations // parts, seed)
        counts.update(found)
        note(f"  {counts.total()} of {mutations}: {dict(counts)}")
        for outcome in found.keys() - set(module.EXPECTED):
            run.failed.append(f"fuzz, seed {seed}: {outcome}")
    crashes = sum(count for outcome, count in counts.items() if outcome not in module.EXPECTED)
    print(f"fuzz: {counts.total()} mutations, {dict(counts)}, {crashes} crashes or wrong data")
    yield from ()


GROUPS: Mapping[str, Callable[[Run], Iterator[Row]]] = {
    "warm": warm, "peers": peers, "loader": loader, "pack": pack, "cold": cold, "verify": verify, "remote": remote,
    "resume": resume, "order": order, "fuzz": fuzz,
}  # fmt: skip


def _row(row_id: str, ratio: Ratio, *, bound: float | None = None, peers: Mapping[str, Any] | None = None) -> Row:
    return TARGETS[row_id].row(ratio.value, runs=ratio.runs, spread=ratio.spread, bound=bound, peers=peers)


def listed_row(row_id: str, found: Mapping[str, Any]) -> Row:
    """The median of the rounds' ratios and their range; beside it the medians of what else was measured in them."""
    ratios = found["ratio"]
    beside = {
        name: float(np.median(values)) for name, values in found.items() if isinstance(values, list) and name != "ratio"
    }
    return TARGETS[row_id].row(
        float(np.median(ratios)), runs=len(ratios), spread=(min(ratios), max(ratios)), peers=beside
    )


# ---- all of it


def measure(quick: bool, only: Sequence[str], directory: Path) -> tuple[list[Row], list[str]]:
    """The rows of the groups `only`, and what failed."""
    rows: list[Row] = []
    sweep(directory)
    with ScratchDirectory(directory) as scratch, ExitStack() as ends:
        run = Run(quick, directory, scratch, ends, [])
        for name in only:
            begin = time.perf_counter()
            try:
                rows += GROUPS[name](run)
            except (ArithmeticError, AssertionError, ImportError, OSError, PeerError, RuntimeError, TurbopumpError,
                    ValueError) as error:  # fmt: skip
                run.failed.append(f"{name}: {type(error).__name__}: {error}")
            note(f"{name}: {time.perf_counter() - begin:.0f} s")
    return rows, run.failed


def merged(rows: Sequence[Row], path: Path) -> list[Row]:
    """The rows, and those of an earlier result file that were not measured now; in the order of TARGETS."""
    found = {row.id: row for row in rows}
    if path.is_file():
        earlier = from_json(path.read_bytes())
        kept = [row for row in earlier["rows"] if row["id"] in TARGETS and row["id"] not in found]
        if kept:
            note(f"{len(kept)} rows stay as they were measured before")
        stamp = f"{earlier['date']} at {earlier['commit']}"
        for row in kept:
            measured = row.get("measured") or stamp
            found[row["id"]] = Row(**{**row, "spread": tuple(row["spread"]), "measured": measured})
    return [found[name] for name in TARGETS if name in found]


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data")
    parser.add_argument("--quick", action="store_true", help="smaller data, fewer rounds, within three minutes or so")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=[], metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--directory", type=Path, default=Path(__file__).parent, help="where scratch files may lie")
    given = parser.parse_args(None if arguments is None else list(arguments))
    rows, failed = measure(given.quick, given.only or list(GROUPS), given.directory)
    path = RESULTS / f"data.{machine_name()}{'.quick' if given.quick else ''}.json"
    rows = merged(rows, path) if given.only else sorted(rows, key=lambda row: list(TARGETS).index(row.id))
    print_table(rows)
    for absent in [name for name in TARGETS if name not in {row.id for row in rows}]:
        note(f"{absent} is absent")
    if rows:
        print(f"written to {write_results('data', rows, quick=given.quick)}")
    for problem in failed:
        print(f"FAILED {problem}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
