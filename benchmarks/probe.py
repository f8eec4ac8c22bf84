"""Probe: how well measured rows predict what was not measured, whether two probes agree, whether the advice holds.

    python -m benchmarks.probe [--quick]

Row by row: fresh shapes of this machine (probe_interpolation.py), collectives (probe_collectives.py), halves of
DeepBench's published devices (halves.py), real training steps as advised (probe_advice.py), two probes one after the
other, and what the harness adds to an operation of 10 us (probe_overhead.py). One thread, by the CPU clock of the
thread that computes, save for the collectives. About a quarter of an hour; give it an otherwise idle machine.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks import halves, probe_advice, probe_collectives, probe_interpolation, probe_overhead
from benchmarks.harness import Row, Target, main, targets
from benchmarks.published import deepbench
from turbopump.core.errors import DatasetError
from turbopump.hardware.journal import compare
from turbopump.probe import probe

TARGETS = targets(
    Target("probe.interp_gemm", "median error of products at shapes never measured", "lower", 0.10, "fraction"),
    Target("probe.interp_conv", "the same for convolutions", "lower", 0.10, "fraction"),
    Target("probe.interp_rnn", "the same for recurrent layers", "lower", 0.10, "fraction"),
    Target("probe.deepbench_half", "DeepBench's published devices: half of each device's shapes from the other half "
           "(median)", "lower", 0.10, "fraction"),
    Target("probe.advice_gain", "steps/s of a recipe's training with the advised routes over PyTorch's defaults at "
           "equal results", "higher", 1.10, "ratio"),
    Target("probe.repeatability", "difference of two probes in the median row (compute and memory)", "lower", 0.05,
           "fraction"),
    Target("probe.overhead", "time of an operation of 10 us by the harness over a loop written by hand, less one",
           "lower", 0.02, "fraction"),
)  # fmt: skip
FAMILIES = ("gemm", "conv", "rnn")
SHAPE_SEED = 20  # of the shapes: none that the model was chosen by
HALVES_SEEDS = range(9000, 9006)  # likewise
REPEAT_S = 90.0


def measure(quick: bool) -> list[Row]:
    return [
        *(_interpolation(family, quick) for family in FAMILIES),
        *probe_collectives.rows(quick),
        *_deepbench(quick),
        _advice(quick),
        _repeatability(quick),
        _overhead(quick),
    ]


def _interpolation(family: str, quick: bool) -> Row:
    """Fresh shapes from a grid; beside it the roofline of the same rows."""
    size = {"grid": 40, "fresh": 12, "row_s": 0.02} if quick else {}
    found = probe_interpolation.interpolation(family, seed=SHAPE_SEED, **size)  # type: ignore[arg-type]
    return TARGETS[f"probe.interp_{family}"].row(
        float(np.median(found.errors)), runs=len(found.errors), spread=_median_interval(found.errors),
        peers={"roofline": float(np.median(found.roofline_errors)), "band holds": float(found.covered.mean()),
               "two measurements": found.apart},
    )  # fmt: skip


def _deepbench(quick: bool) -> Iterator[Row]:
    """By shape: all layouts of a product and directions of a layer on one side. Nothing where the tables are absent."""
    try:
        published = deepbench()
    except DatasetError as error:
        print(f"probe.deepbench_half is left out: {error}")
        return
    results = halves.halves(published, seeds=HALVES_SEEDS[:1] if quick else HALVES_SEEDS)
    errors = np.concatenate([result.errors for result in results])
    roofline = np.concatenate([result.roofline_errors for result in results])
    peers = {name: halves.median_of(results, family=name) for name in halves.FAMILIES.values()}
    yield TARGETS["probe.deepbench_half"].row(
        float(np.median(errors)), runs=len(errors), spread=_median_interval(errors),
        peers={**peers, "roofline": float(np.median(roofline))},
    )  # fmt: skip


def _advice(quick: bool) -> Row:
    """Raises `ValueError` where the advised routes do not compute the same: a gain would mean nothing."""
    gain = probe_advice.advice_gain(quick)
    details = gain.details
    print(details["advice"])
    print(f"losses differ by {details['loss_difference']:.2g}, gradient norms by {details['norm_difference']:.2g}; one "
          f"unit in the last place of the weights changes them by {details['loss_rounding']:.2g} and "
          f"{details['norm_rounding']:.2g}")  # fmt: skip
    if not gain.same_results:
        raise ValueError("the advised routes change losses or gradient norms by more than rounding does")
    return TARGETS["probe.advice_gain"].row(
        gain.value, runs=gain.runs, spread=(gain.low, gain.high), peers={"predicted": details["predicted"]}
    )


def _repeatability(quick: bool) -> Row:
    """Two probes into two files; the spread are the quartiles of the rows' differences."""
    with tempfile.TemporaryDirectory() as folder:
        first, second = (
            probe(Path(folder) / f"{number}.json", budget_s=10.0 if quick else REPEAT_S, only=("compute", "memory"),
                  threads=(1,), device="cpu") for number in range(2)
        )  # fmt: skip
    found = compare(first.rows, second.rows)
    before = {row.key: row for row in first.rows if row.works}
    differences = [abs(row.seconds / before[row.key].seconds - 1) for row in second.rows
                   if row.works and row.key in before]  # fmt: skip
    low, high = np.quantile(differences, [0.25, 0.75])
    return TARGETS["probe.repeatability"].row(
        found.difference, runs=found.common, spread=(float(low), float(high)), peers={"noisy rows": found.noisy_now}
    )


def _overhead(quick: bool) -> Row:
    ratio = probe_overhead.measure(quick)
    return TARGETS["probe.overhead"].row(ratio.value - 1, runs=ratio.runs, spread=(ratio.low - 1, ratio.high - 1))


def _median_interval(errors: npt.NDArray[np.float64] | Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median (Efron 1979)."""
    given = np.asarray(errors)
    picks = np.random.default_rng(0).integers(0, len(given), (1000, len(given)))
    low, high = np.quantile(np.median(given[picks], axis=1), [0.025, 0.975])
    return float(low), float(high)


if __name__ == "__main__":
    main("probe", measure)
