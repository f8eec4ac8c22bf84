"""Efficiency curves of published devices, for devices that nobody measured: writes hardware/catalog/curves.toml.

`python -m benchmarks.curves` fits the formula of `turbopump/compute/efficiency.py` to every published device, kind and
dtype, with the catalog's peak and memory rate, and prints two median errors of each: on shapes that were not fitted
(half from half), and on the other devices of the same kind and dtype, with their peaks. The second is what a borrower
must expect; it stands among the parameters as `borrowed_error`. Derived numbers only: no row of a table is copied.
Tables: DeepBench (products, convolutions, recurrent layers), LLMCompass (products, GELU and layer norm of an A100).
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.published import CATALOG_IDS, FILES, deepbench, tables
from turbopump.compute import efficiency
from turbopump.compute.features import Case
from turbopump.compute.ops import Elementwise, Gemm, Norm, Rnn
from turbopump.core.errors import CatalogError
from turbopump.core.files import digest_file, write_atomic
from turbopump.core.workload import Op
from turbopump.hardware.accelerators import device
from turbopump.hardware.profile import Curve, Measurement
from turbopump.hardware.specs import DeviceSpec

Array = npt.NDArray[np.float64]
OUTPUT = Path(__file__).parents[1] / "turbopump" / "hardware" / "catalog" / "curves.toml"
A100_FILE = "ops_a100_mi210.csv"
A100_IDS = {"A100": "a100-sxm-80", "MI210": "mi210"}
LEAST_ROWS = 16
HALVES = 5
HEADER = """# How much of its peak a measured device reaches at a given size; written by `python -m benchmarks.curves`.
# The formula stands in turbopump/compute/efficiency.py. `error`: median on shapes of the device that were not fitted;
# `borrowed_error`: on the other devices of that kind and dtype, by their own peaks. Times in seconds.
"""


@dataclass(frozen=True)
class Fitted:
    """A curve with what it was fitted to."""

    curve: Curve
    spec: DeviceSpec
    cases: tuple[Case, ...]
    times_s: Array


def published_ops(directory: Path) -> dict[tuple[str, str, str], list[tuple[Case, float]]]:
    """Operations and their seconds by (catalog id, kind, file)."""
    found: dict[tuple[str, str, str], list[tuple[Case, float]]] = defaultdict(list)
    for (platform, _), rows in deepbench(directory).items():
        relative = CATALOG_IDS[platform]
        for row in rows:
            if row.kind != "RnnPart":
                family = {"Gemm": "gemm", "Conv2d": "conv"}[row.kind]
                found[relative, row.kind, FILES[family]].append((Case.of_row(row), row.seconds))
        for layer, seconds in _recurrent(rows):
            found[relative, "Rnn", FILES["rnn"]].append((Case.of(layer), seconds))
    if (directory / A100_FILE).is_file():
        for relative, op, seconds in _llmcompass(directory / A100_FILE):
            found[relative, type(op).__name__, A100_FILE].append((Case.of(op), seconds))
    return found


def _recurrent(rows: Sequence[Measurement]) -> Iterator[tuple[Rnn, float]]:
    """Whole layers: forward, and both gradients together where both were timed."""
    gradients: dict[Rnn, list[float]] = defaultdict(list)
    for row in rows:
        if row.kind == "RnnPart":
            f = row.op
            hidden = int(f["hidden_size"])
            op = Rnn(f["kind"], int(f["batch"]), int(f["steps"]), hidden, hidden, False, row.dtype)  # type: ignore[arg-type]
            if f["direction"] == "forward":
                yield op, row.seconds
            else:
                gradients[replace(op, backward=True)].append(row.seconds)
    yield from ((op, sum(parts)) for op, parts in gradients.items() if len(parts) == 2)


def _llmcompass(path: Path) -> Iterator[tuple[str, Op, float]]:
    """Products in milliseconds, moving operations in elements a second; all in fp16."""
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            relative, m, n = A100_IDS[line["device"]], int(line["M_or_bytes"]), int(line["N"] or 1)
            if line["op"] == "matmul_fp16":
                yield relative, Gemm(m, n, int(line["K"]), "fp16", "nn"), float(line["time_ms"]) * 1e-3
            elif line["op"] in ("gelu", "layernorm"):
                op = Elementwise("gelu", m, 1, 1, "fp16") if line["op"] == "gelu" else Norm("layer", m, n, "fp16")
                yield relative, op, m * n / (float(line["value"]) * 1e9)


def fit_all(directory: Path) -> tuple[list[Fitted], list[str]]:
    """A curve per device, kind and dtype; and what could not be fitted, a line each."""
    fitted, left_out = [], []
    for (relative, kind, file), pairs in published_ops(directory).items():
        for dtype in sorted({case.dtype for case, _ in pairs}):
            members = [(case, seconds) for case, seconds in pairs if case.dtype == dtype]
            try:
                spec = device(relative)
            except CatalogError:
                left_out.append(f"{kind} {dtype} of {relative}: the catalog does not hold it")
                continue
            if dtype not in spec.flops_per_s or not spec.memory_bytes_per_s or len(members) < LEAST_ROWS:
                left_out.append(f"{kind} {dtype} of {relative}: {len(members)} rows, or no peak in the catalog")
                continue
            source = (
                f"{_table_name(file)}, {len(members)} rows of the table with digest {digest_file(directory / file)}"
            )
            fitted.append(_fit(kind, dtype, relative, source, spec, members))
    return [replace(f, curve=_with_borrowed_error(f, fitted)) for f in fitted], left_out


def _table_name(file: str) -> str:
    return "PrincetonUniversity/LLMCompass@2e015fd" if file == A100_FILE else "baidu-research/DeepBench@da81ba7"


def _fit(
    kind: str, dtype: str, relative: str, source: str, spec: DeviceSpec, members: Sequence[tuple[Case, float]]
) -> Fitted:
    cases = tuple(case for case, _ in members)
    times_s = np.array([seconds for _, seconds in members])
    errors = [_half_errors(cases, times_s, spec, dtype, seed) for seed in range(HALVES)]
    parameters = efficiency.fit(cases, times_s, spec.flops_per_s[dtype], spec.memory_bytes_per_s or 1.0)
    curve = Curve(kind, dtype, parameters, relative, source, float(np.median(np.concatenate(errors))))
    return Fitted(curve, spec, cases, times_s)


def _half_errors(cases: Sequence[Case], times_s: Array, spec: DeviceSpec, dtype: str, seed: int) -> Array:
    """Relative errors on the shapes that are not fitted."""
    shapes = sorted({tuple(case.sizes.values()) for case in cases})
    order = np.random.default_rng(seed).permutation(len(shapes))
    drawn = {shapes[i] for i in order[: len(shapes) // 2]}
    inside = np.array([tuple(case.sizes.values()) in drawn for case in cases])
    known = [case for case, one in zip(cases, inside) if one]
    asked = [case for case, one in zip(cases, inside) if not one]
    peak, bandwidth = spec.flops_per_s[dtype], spec.memory_bytes_per_s or 1.0
    parameters = efficiency.fit(known, times_s[inside], peak, bandwidth)
    return np.abs(efficiency.seconds(parameters, asked, peak, bandwidth) / times_s[~inside] - 1.0)


def borrowed_errors(lender: Fitted, others: Sequence[Fitted]) -> dict[str, float]:
    """Median error of a curve on each other device of its kind and dtype, with that device's peaks."""
    errors = {}
    for other in others:
        same = (other.curve.kind, other.curve.dtype) == (lender.curve.kind, lender.curve.dtype)
        if same and other.curve.relative != lender.curve.relative:
            peak, bandwidth = other.spec.flops_per_s[other.curve.dtype], other.spec.memory_bytes_per_s or 1.0
            predicted = efficiency.seconds(lender.curve.parameters, other.cases, peak, bandwidth)
            errors[other.curve.relative] = float(np.median(np.abs(predicted / other.times_s - 1.0)))
    return errors


def _with_borrowed_error(fitted: Fitted, others: Sequence[Fitted]) -> Curve:
    errors = borrowed_errors(fitted, others)
    if not errors:
        return fitted.curve  # no other device of the kind was measured: how well it lends is not known
    parameters = {**fitted.curve.parameters, "borrowed_error": float(np.median(list(errors.values())))}
    return replace(fitted.curve, parameters=parameters)


def as_toml(curves: Sequence[Curve]) -> str:
    """The file, numbers to four digits."""
    parts = [HEADER]
    for curve in curves:
        error = "" if curve.error is None else f"error = {_number(curve.error)}\n"
        parameters = "".join(f"{_key(name)} = {_number(value)}\n" for name, value in curve.parameters.items())
        parts.append(
            f'[[curve]]\nkind = "{curve.kind}"\ndtype = "{curve.dtype}"\nrelative = "{curve.relative}"\n'
            f'source = "{curve.source}"\n{error}[curve.parameters]\n{parameters}'
        )
    return "\n".join(parts)


def _key(name: str) -> str:
    return f'"{name}"' if " " in name else name


def _number(value: float) -> str:
    text = f"{value:.4g}"
    return text if any(mark in text for mark in ".e") else f"{text}.0"


def rows_of_table(fitted: Sequence[Fitted]) -> list[Mapping[str, object]]:
    """One line a curve: its errors at home and abroad."""
    return [
        {"relative": f.curve.relative, "kind": f.curve.kind, "dtype": f.curve.dtype, "rows": len(f.cases),
         "error": f.curve.error, "borrowed_error": f.curve.parameters.get("borrowed_error"),
         "worst_borrower": max(borrowed_errors(f, fitted).values(), default=None)}
        for f in fitted
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    fitted, left_out = fit_all(tables())
    for line in rows_of_table(fitted):
        print(
            "  ".join(f"{v:.3f}" if isinstance(v, float) else str(v if v is not None else "-") for v in line.values())
        )
    for reason in left_out:
        print(f"left out: {reason}")
    write_atomic(output, as_toml([f.curve for f in fitted]))
    print(f"{len(fitted)} curves in {output.name}")


if __name__ == "__main__":
    main()
