"""Our own runs as the planner predicts them: real training steps on this machine beside `planner/own_step.py`.

A run is `train` itself: its loop, spans, schedule and guards, with evaluation, checkpoints and the limit's measurement
off. Its spans are counted in the CPU time of the training thread, and by the wall clock while that thread waits for
other processes, so that other programs lengthen nothing but the waits. Predictions are made twice: from a generic
profile, which knows nothing of the runs, and from one that holds the operations of their recipes too
(`probe --for RECIPE`). Nothing here is fitted to a run.
"""

from __future__ import annotations

import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from turbopump.comms import bench as comms_bench
from turbopump.comms import data_parallel
from turbopump.comms.ops import AllReduce, Collective, Overlap
from turbopump.compute import bench, routes
from turbopump.core import spans
from turbopump.core.config import (
    CheckpointConfig,
    Config,
    EvaluationConfig,
    LaunchConfig,
    LoggingConfig,
    PrecisionConfig,
)
from turbopump.core.files import read_json_lines
from turbopump.core.rundir import RunDir
from turbopump.core.spans import StepBreakdown
from turbopump.core.workload import Op
from turbopump.data.digits import DigitsConfig
from turbopump.data.sources import TokensConfig
from turbopump.data.tones import TonesConfig
from turbopump.hardware import detect
from turbopump.hardware.profile import SCHEMA, MachineProfile, Measurement, Request, RunCalibration, Trial
from turbopump.models.convnet.config import ConvnetConfig
from turbopump.models.deepspeech2.config import DeepSpeech2Config
from turbopump.models.transformer.config import TransformerConfig
from turbopump.pack import pack
from turbopump.planner.own_run import ops_of, run_of
from turbopump.planner.own_step import Run, StepModel, StepPrediction, Structure, structure_of
from turbopump.planner.run_calibration import Observed, fit
from turbopump.train import train
from turbopump.training import forward_backward

VOCAB = 1024
ROUTES = ("default", "transformer", "convnet", "deepspeech2")
UNUSED = ("Fft", "Conv1d", "Gather")
COMMS_SIZES = (8, 4096, 65_536, 262_144, 1 << 20, 4 << 20, 16 << 20, 64 << 20)
WARMUP_STEPS = 3


@dataclass(frozen=True)
class Measured:
    """A run: its recipe and its typical step."""

    config: Config
    step: StepBreakdown
    """Median of each part; `total` is therefore near, not equal to, the median step."""
    num_steps: int


def recipes(dataset: Path, quick: bool = False) -> list[Config]:
    """The runs: three models, fp32 and bf16, sizes, batches, lengths, accumulation, one process and two."""
    found: list[Config] = []

    def add(
        name: str, model: Any, data: Any, batch: int, dtypes: Sequence[str] = ("fp32", "bf16"), **more: Any
    ) -> None:
        for dtype in dtypes:
            processes = more.get("processes", 1)
            found.append(Config(
                model=model, data=data, name=f"{name}-{dtype}" + (f"-{processes}p" if processes > 1 else ""),
                global_batch=batch, microbatch=more.get("microbatch", 0), num_steps=more.get("num_steps", 14),
                precision=PrecisionConfig(compute=dtype),  # type: ignore[arg-type]
                evaluation=EvaluationConfig(at_start=False, max_samples=2, batch=1),
                checkpoint=CheckpointConfig(every_s=0.0, keep_best=False), 
                logging=LoggingConfig(every=10**6, limit_s=0.0),
                launch=LaunchConfig(num_processes=processes, threads=1, device="cpu"),
            ))  # fmt: skip

    def tokens(seq_len: int) -> TokensConfig:
        return TokensConfig(path=str(dataset), seq_len=seq_len)

    small = TransformerConfig(vocab_size=VOCAB, num_layers=4, hidden_size=256, num_heads=4)
    image = ConvnetConfig(in_channels=1, num_classes=10, width=16, blocks=(1, 1, 1))
    speech = DeepSpeech2Config(num_labels=9, frequencies=64, conv_channels=8, num_layers=2, hidden_size=64)
    digits, tones = DigitsConfig(shift=1), TonesConfig()
    if quick:
        add("lm", small, tokens(128), 8)
        add("digits", image, digits, 64, ("fp32",))
        add("tones", speech, tones, 16, ("fp32",))
        return found
    add("lm", small, tokens(128), 8)
    add("lm-wide", replace(small, num_layers=2, hidden_size=512, num_heads=8), tokens(256), 4)
    add("lm-long", replace(small, vocab_size=8192, num_kv_heads=2), tokens(512), 2)
    add("lm-accumulated", replace(small, hidden_size=128, num_layers=6), tokens(64), 32, ("bf16",), microbatch=8)
    add("lm-recomputed", replace(small, recompute="full"), tokens(128), 8, ("fp32",))
    add("digits", image, digits, 64)
    add("digits-wide", replace(image, width=48, blocks=(2, 2, 2)), digits, 96)
    add("tones", speech, tones, 16)
    add("tones-wide", replace(speech, hidden_size=192, num_layers=3, conv_channels=16), tones, 8)
    add("tones-lstm", replace(speech, rnn="lstm", hidden_size=128), tones, 12, ("fp32",))
    add("lm", small, tokens(128), 16, processes=2)
    add("digits-wide", replace(image, width=48, blocks=(2, 2, 2)), digits, 192, ("fp32",), processes=2)
    add("tones", speech, tones, 32, ("fp32",), processes=2)
    return found


# ---- measuring runs


class _ComputingClock:
    """CPU time of the thread, and wall time while it waits in `span("communication")`."""

    def __init__(self) -> None:
        self.waited_s = 0.0

    def perf_counter(self) -> float:
        return time.thread_time() + self.waited_s


class _WaitingSpan(spans._Open):
    """`span("communication")` that adds to the clock what the thread waited inside."""

    def __enter__(self) -> None:
        super().__enter__()
        self.wall_s, self.cpu_s = time.perf_counter(), time.thread_time()

    def __exit__(self, *details: object) -> None:
        waited_s = time.perf_counter() - self.wall_s - (time.thread_time() - self.cpu_s)
        _clock.waited_s += max(0.0, waited_s)
        super().__exit__(*details)


_clock = _ComputingClock()


def count_cpu_time(_: Any) -> None:
    """A hook for `train`: from the next step on this process's spans are of the `_ComputingClock`."""
    if isinstance(spans.time.perf_counter, type(_clock.perf_counter)):
        return
    spans.time = SimpleNamespace(perf_counter=_clock.perf_counter, time=time.time)  # type: ignore[assignment]
    data_parallel.span = forward_backward.span = _WaitingSpan  # type: ignore[assignment]


@contextmanager
def _clock_put_back() -> Iterator[None]:
    before = spans.time, data_parallel.span, forward_backward.span
    try:
        yield
    finally:
        spans.time, data_parallel.span, forward_backward.span = before


def dataset_of(directory: Path) -> Path:
    """A packed text dataset, small enough to be made in a second."""
    path = directory / "text"
    package = Path(sysconfig.get_paths()["stdlib"]) / "email"
    pack([str(package)], path, tokenizer="bpe", vocab_size=VOCAB, validation=0.1, include=["*.py"])
    return path


def measured(config: Config, directory: Path) -> Measured:
    """`train` as it comes, its warm-up left out."""
    run = RunDir(directory / config.name)
    with _clock_put_back():
        train(config, run=run.path, hooks=(count_cpu_time,), quiet=True)
    records = [r for r in read_json_lines(run.spans(0)) if r.get("type") == "step"][WARMUP_STEPS:]
    parts = [StepBreakdown.from_spans(r["s"], r["spans"]) for r in records]
    names = [f for f in StepBreakdown.__dataclass_fields__]
    typical = StepBreakdown(**{name: float(np.median([getattr(p, name) for p in parts])) for name in names})
    return Measured(config, typical, len(records))


# ---- measuring the machine


def profile_of(rows: Iterable[Measurement], calibration: RunCalibration | None = None) -> MachineProfile:
    """A machine file's content that holds these rows."""
    kept = tuple({row.key: row for row in rows}.values())
    return MachineProfile(SCHEMA, "benchmarks", "", detect.cpu_name(), "measured", detect.fingerprint(),
                          {"cache_bytes": detect.cache_bytes()}, {}, (), rows=kept,
                          calibration=calibration)  # fmt: skip


def generic_rows(*, tiers: int = 1, row_s: float = 0.03, every: int = 1) -> list[Measurement]:
    """What a short `turbopump probe` knows: the generic grid's lower tiers in fp32 and bf16, by PyTorch's defaults and
    the models' own kernels, and all-reduces of two processes. `every` thins the grid out."""
    request = Request(row_s=row_s, domains=("compute", "memory", "host"))
    chosen = [t for t in bench.trials(request)
              if t.tier <= tiers and t.route in ROUTES and getattr(t.op, "dtype", "fp32") in ("fp32", "bf16")
              and type(t.op).__name__ not in UNUSED]  # fmt: skip
    small = [t for number, t in enumerate(chosen) if t.tier == 0 or number % every == 0]
    return [row for row in bench.measure(small, request, time.monotonic() + 150.0) if row.works]


def comms_rows(sizes: Sequence[int] = COMMS_SIZES, *, row_s: float = 0.05) -> list[Measurement]:
    """All-reduces of two processes, and what computing beside one costs."""
    request = Request(row_s=row_s, max_ranks=2, domains=("comms", "host"),
                      ops=tuple(AllReduce(size, 2, "node") for size in sizes))  # fmt: skip
    wanted = [t for t in comms_bench.trials(request)
              if t.route == "gloo" and (isinstance(t.op, Overlap) or t.op in request.ops)]  # fmt: skip
    overlap = [t for t in comms_bench.trials(request) if isinstance(t.op, Overlap)]
    trials = list(dict.fromkeys([*wanted, *overlap]))
    return [row for row in comms_bench.measure(trials, request, time.monotonic() + 60.0) if row.works]


def own_rows(configs: Iterable[Config], *, row_s: float = 0.04) -> list[Measurement]:
    """What `probe --for` measures of the recipes: their operations, by the routes that their models take."""
    ops: dict[tuple[Op, str], None] = {}
    for config in configs:
        for op in ops_of(config, config.precision.compute, config.launch.num_processes or 1):
            if not isinstance(op, Collective):
                own = routes.find(op, "cpu", config.model.kind)
                ops[op, own.name if own is not None else "default"] = None
    request = Request(row_s=row_s, ops=tuple(op for op, _ in ops), domains=("compute", "memory", "host"))
    trials = [Trial(op, route) for op, route in ops]
    return [row for row in bench.measure(trials, request, time.monotonic() + 150.0) if row.works]


# ---- judging


@dataclass(frozen=True)
class Compared:
    """A run as a profile predicts it."""

    name: str
    measured: StepBreakdown
    predicted: StepPrediction

    @property
    def error(self) -> float:
        """Signed, relative to the measured step."""
        return self.predicted.total_s / self.measured.total - 1.0

    @property
    def covered(self) -> bool:
        return self.predicted.total_low_s <= self.measured.total <= self.predicted.total_high_s


def compared(runs: Sequence[Measured], profile: MachineProfile) -> list[Compared]:
    """Every run as `profile` predicts it."""
    model = StepModel(profile, structure=structure_of(profile))
    found = []
    for run in runs:
        config = run.config
        predicted = model.predict(_run_of(config))
        found.append(Compared(config.name, run.step, predicted))
    return found


def mean_error(results: Sequence[Compared]) -> float:
    return float(np.mean([abs(result.error) for result in results]))


@dataclass(frozen=True)
class OwnRuns:
    """All runs, as the machine file of a short generic probe predicts them, as one with their own operations does, and
    as the latter does when each is predicted with what the other recipes' runs have taught (leave one out)."""

    generic: list[Compared]
    probed: list[Compared]
    calibrated: list[Compared]

    @property
    def covered(self) -> float:
        """Share of all predictions whose band holds the measured step."""
        return float(np.mean([r.covered for r in (*self.generic, *self.probed, *self.calibrated)]))


def own_runs(quick: bool = False) -> OwnRuns:
    """Measure and predict: `quick` three small models within a minute; in full 22 runs within six.

    Each recipe's operations are measured right before and after its run, so that a machine whose speed drifts spoils
    both alike.
    """
    with _one_thread(), tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        chosen = recipes(dataset_of(directory), quick)
        generic = generic_rows(tiers=1, row_s=0.02, every=10 if quick else 1)
        comms = comms_rows() if any(c.launch.num_processes > 1 for c in chosen) else []
        own: list[Measurement] = []
        runs: list[Measured] = []
        for config in chosen:
            before = own_rows([config], row_s=0.02 if quick else 0.04)
            runs.append(measured(config, directory))
            after = [] if quick else own_rows([config], row_s=0.02)
            own += _joined(before, after)
        general = profile_of([*generic, *comms])
        probed = profile_of([*generic, *comms, *own])
        return OwnRuns(compared(runs, general), compared(runs, probed), leave_one_out(runs, probed))


def leave_one_out(runs: Sequence[Measured], profile: MachineProfile) -> list[Compared]:
    """Each run predicted with the structure that the runs of the other models' recipes have taught: a recipe in another
    dtype, or on two processes, is left out with it."""
    observed = [Observed(run.config.name, _run_of(run.config), run.step, 1, run.num_steps) for run in runs]
    model = StepModel(profile)
    found = []
    for run, mine in zip(runs, observed):
        others = [o for o, r in zip(observed, runs) if _family(r.config) != _family(run.config)]
        model.structure = fit(others, profile) if others else Structure()
        found.append(Compared(run.config.name, run.step, model.predict(mine.run)))
    return found


def _run_of(config: Config) -> Run:
    return run_of(config, config.precision.compute, config.launch.num_processes or 1)


def _family(config: Config) -> str:
    """The recipe's name without dtype and processes."""
    return config.name.removesuffix("-2p").removesuffix("-bf16").removesuffix("-fp32")


def _joined(before: Sequence[Measurement], after: Sequence[Measurement]) -> list[Measurement]:
    """Rows measured before and after a run: the mean of the two, since the run lay between them."""
    later = {row.key: row for row in after}
    return [_between(row, later[row.key]) if row.key in later else row for row in before]


def _between(a: Measurement, b: Measurement) -> Measurement:
    flushed = [row.flushed_s for row in (a, b) if row.flushed_s is not None]
    return replace(a, median_s=(a.seconds + b.seconds) / 2, flushed_s=sum(flushed) / len(flushed) if flushed else None)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def table(results: OwnRuns) -> str:
    """A line a run, for the terminal."""
    lines = [f"{'run':<24}{'measured':>10}{'generic':>9}{'probed':>9}{'calibrated':>12}"]
    for generic, probed, calibrated in zip(results.generic, results.probed, results.calibrated):
        lines.append(f"{generic.name:<24}{1e3 * generic.measured.total:>7.1f} ms{generic.error:>+9.1%}"
                     f"{probed.error:>+9.1%}{calibrated.error:>+12.1%}")  # fmt: skip
    lines.append(f"{'mean error':<34}{mean_error(results.generic):>9.1%}{mean_error(results.probed):>9.1%}"
                 f"{mean_error(results.calibrated):>12.1%}")  # fmt: skip
    return "\n".join(lines)
