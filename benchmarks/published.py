"""DeepBench's published tables as rows of a machine profile: what devices of 2015-2019 took for real layers.

The tables lie outside the project (`../shared/published`); `tables()` says where, and raises where they are absent.
Each (platform, precision) is a device of its own. A row of the convolution and recurrent tables holds three times;
each becomes a `Measurement` of its own. DeepBench states one time without a spread.
"""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from turbopump.compute.ops import RNN_GATES, Conv2d, Gemm, Layout
from turbopump.core.errors import DatasetError
from turbopump.core.workload import DTYPE_BYTES, Op, OpCost
from turbopump.hardware.profile import Measurement, Trial

Direction = Literal["forward", "input_gradient", "weight_gradient"]
Device = tuple[str, str]
"""Platform and precision, as the tables call them."""

FILES = {"gemm": "deepbench_gemm.csv", "conv": "deepbench_conv.csv", "rnn": "deepbench_rnn.csv"}
DTYPES = {"fp32": "fp32", "fp16in_fp32math": "fp16", "fp16": "fp16", "tensorcore": "fp16"}
CELLS: dict[str, Literal["vanilla", "gru", "lstm"]] = {"Vanilla": "vanilla", "GRU": "gru", "LSTM": "lstm"}
TIMES: dict[str, Direction] = {
    "fwd_ms": "forward", "bwd_inputs_ms": "input_gradient", "bwd_params_ms": "weight_gradient",
    "bwd_weights_ms": "weight_gradient",
}  # fmt: skip
CATALOG_IDS = {
    "IA_KNL7250": "knl-7250", "NV_1080Ti": "gtx-1080-ti", "NV_M40": "m40", "NV_P100": "p100-sxm2",
    "NV_TitanX": "titan-x-maxwell", "NV_TitanX_Pascal": "titan-x-pascal", "NV_TitanXp": "titan-xp",
    "NV_V100": "v100-sxm2", "NV_T4": "t4", "AMD_MI25": "mi25", "AMD_VegaFE": "vega-fe",
}  # fmt: skip
"""Ids of `turbopump/hardware/catalog` by platform."""


@dataclass(frozen=True)
class RnnPart(Op):
    """A recurrent layer as DeepBench times it: forward, or one of its two gradients alone; inputs as wide as states."""

    kind: Literal["vanilla", "gru", "lstm"]
    batch: int
    steps: int
    hidden_size: int
    dtype: str
    direction: Direction

    @property
    def cost(self) -> OpCost:
        weights = 2 * RNN_GATES[self.kind] * self.hidden_size**2  # of input and of state
        states = 2 * self.batch * self.steps * self.hidden_size
        flops = 2.0 * self.batch * self.steps * weights
        return OpCost(flops, float((weights + states) * DTYPE_BYTES[self.dtype]))


def tables() -> Path:
    """The directory of the tables; raises `DatasetError` where they are not."""
    directory = Path(__file__).resolve().parents[1].parent / "shared" / "published"
    absent = [name for name in FILES.values() if not (directory / name).is_file()]
    if absent:
        raise DatasetError(f"no published tables ({', '.join(absent)}) beside the project: shared/published holds them")
    return directory


def deepbench(directory: Path | None = None) -> dict[Device, tuple[Measurement, ...]]:
    """All rows by (platform, precision): products, convolutions, recurrent layers."""
    directory = directory or tables()
    rows: dict[Device, list[Measurement]] = defaultdict(list)
    readers = {"gemm": _gemm, "conv": _conv, "rnn": _rnn}
    for family, name in FILES.items():
        with (directory / name).open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                device = line["platform"], line["precision"]
                for op, milliseconds in readers[family](line, DTYPES[line["precision"]]):
                    rows[device].append(_row(op, float(milliseconds) * 1e-3, device[0], line["source"]))
    return {device: tuple(found) for device, found in rows.items()}


def _row(op: Op, time_s: float, platform: str, source: str) -> Measurement:
    row = Measurement.failed(Trial(op, device=platform), "compute", "")
    return replace(row, clock="wall", runs=1, calls=1, min_s=time_s, median_s=time_s, p90_s=time_s, library=source)


def _gemm(line: Mapping[str, str], dtype: str) -> Iterator[tuple[Op, str]]:
    letters = {"N": "n", "T": "t"}
    layout: Layout = f"{letters[line['transA']]}{letters[line['transB']]}"  # type: ignore[assignment]
    yield Gemm(int(line["M"]), int(line["N"]), int(line["K"]), dtype, layout), line["time_ms"]


def _conv(line: Mapping[str, str], dtype: str) -> Iterator[tuple[Op, str]]:
    batch, channels, height, width, filters = (int(line[name]) for name in ("N", "C", "H", "W", "K"))
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w = (
        int(line[name]) for name in ("R_filter_h", "S_filter_w", "stride_h", "stride_w", "pad_h", "pad_w")
    )
    for column in ("fwd_ms", "bwd_inputs_ms", "bwd_params_ms"):
        if line[column]:
            op = Conv2d(batch, channels, height, width, filters, kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w,
                        dtype, direction=TIMES[column])  # fmt: skip
            yield op, line[column]


def _rnn(line: Mapping[str, str], dtype: str) -> Iterator[tuple[Op, str]]:
    for column in ("fwd_ms", "bwd_inputs_ms", "bwd_weights_ms"):
        if line[column]:
            op = RnnPart(CELLS[line["cell"]], int(line["batch"]), int(line["timesteps"]), int(line["hidden"]), dtype,
                         TIMES[column])  # fmt: skip
            yield op, line[column]
