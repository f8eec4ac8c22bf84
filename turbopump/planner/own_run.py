"""A recipe on a measured machine: both Breakdowns predicted, and written into the run before its first step.

`predict_recipe` needs no torch and reads of the data a few samples: how long the source takes for them, which no
profile knows, and how long they are where lengths differ. `begin_prediction` starts that in a process of its own of
the lowest priority, since curves take seconds to fit, so that no start waits for it; prediction.json says what it
rests on, or in `problem` why there is none.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.comms.ops import AllReduce
from turbopump.core import plugins
from turbopump.core.config import Config, dumps, from_toml, parse
from turbopump.core.errors import DatasetError, ProfileError, TurbopumpError, UsageError
from turbopump.core.files import to_json, write_atomic
from turbopump.core.rundir import RunDir
from turbopump.core.spans import RunBreakdown
from turbopump.core.version import VERSION
from turbopump.core.workload import Op, Workload
from turbopump.hardware import detect
from turbopump.hardware.profile import MachineProfile, check_same_machine, load
from turbopump.planner.own_step import (
    FP32,
    Run,
    StepModel,
    StepPrediction,
    as_table,
    bucket_bytes,
    computed,
    structure_of,
    updated,
)
from turbopump.planner.summary import microbatch_workload

SCHEMA_VERSION = 1
MACHINE_FILE = "machine.json"
LONGEST_READ_S = 0.25  # of trying the source
SAMPLED_BATCHES = 4
STARTUP_S = 4.0  # imports of torch and of the model, first calls; 3 to 5 s on AMD EPYC (Zen 4), 2 shared cores
CHECKPOINT_STATES = 3  # weights and two moments
RUN_FACTOR = 2.0  # of the band of what is not steps
PATIENCE_S = 20.0  # after a run that is over before its prediction
BETWEEN_STEPS_S = 2e-4  # a line of metrics, hooks, agreeing on what is due; AMD EPYC (Zen 4), 2 shared cores
STORAGE_BYTES_PER_S = 5e8  # where storage was not measured


@dataclass(frozen=True)
class RunPrediction:
    """A step and a whole run, with the 80 % band of each part."""

    step: StepPrediction
    run: RunBreakdown
    run_low: RunBreakdown
    run_high: RunBreakdown
    run_total_low_s: float
    run_total_high_s: float
    dtype: str
    num_processes: int
    threads: int
    notes: tuple[str, ...]


def predict_recipe(
    config: Config, profile: MachineProfile, *, num_processes: int = 0, device: str = "cpu"
) -> RunPrediction:
    """Both Breakdowns of a recipe here.

    Raises `UsageError` for a live model or dataset, `DatasetError` where the data is not there, `ProfileError` where
    the profile says nothing of the dense operations of this device.
    """
    processes = num_processes or config.launch.num_processes or 1
    threads, notes = _threads(config, profile, processes, device)
    model = StepModel(profile, threads=threads, device=device, structure=structure_of(profile))
    dtypes = ("fp32", "bf16") if config.precision.compute == "auto" else (config.precision.compute,)
    found = {dtype: model.predict(run_of(config, dtype, processes)) for dtype in dtypes}
    dtype = min(found, key=lambda name: found[name].total_s)
    if len(found) > 1:
        notes.append(f"precision.compute is auto: {dtype} is predicted to be faster, and was taken")
    step = found[dtype]
    return _whole_run(config, profile, model, step, dtype, processes, threads, notes)


def run_of(config: Config, dtype: str, num_processes: int = 1) -> Run:
    """What of a recipe decides the time of its step; tries the source for its data. Raises as `predict_recipe`."""
    if config.model.kind == "live" or config.data.kind == "live":
        raise UsageError("the operations of a live model are not known before it runs: predictions are of recipes "
                         "whose model and data have a kind of their own")  # fmt: skip
    share = max(1, config.global_batch // num_processes)
    microbatch = min(config.microbatch or share, share)
    source_kind = plugins.find("turbopump.sources", config.data.kind)
    source, shape = source_kind.open(config.data, "train"), dict(source_kind.shape(config.data))
    data_s, seen = try_source(source, microbatch)
    if "frames" in shape and seen:
        shape["frames"] = min(shape["frames"], seen)
    work: Workload = plugins.find("turbopump.models", config.model.kind).workload(
        config.model, microbatch, shape, dtype
    )
    return Run(
        workload=work, num_microbatches=max(1, round(share / microbatch)), num_processes=num_processes,
        recompute=getattr(config.model, "recompute", "none"), clip=config.optimizer.clip_norm > 0,
        optimizer=config.optimizer.kind, muon_steps=config.optimizer.muon_ns_steps,
        data_s=data_s if config.loader.num_workers == 0 else 0.0,
        lone_samples=0 if config.loader.num_workers or _batched(source) else microbatch,
    )  # fmt: skip


def ops_of(config: Config, dtype: str, num_processes: int = 1) -> tuple[Op, ...]:
    """Each operation of a step once, those around the workload and between processes among them: what is worth
    measuring for this recipe. Where its data is not there yet, samples count with their largest shape."""
    try:
        run = run_of(config, dtype, num_processes)
    except DatasetError:
        work = microbatch_workload(config, num_processes=num_processes, dtype=dtype)
        assert work is not None  # `run_of` has refused a live model
        run = Run(work, num_processes=num_processes, clip=config.optimizer.clip_norm > 0,
                  optimizer=config.optimizer.kind, muon_steps=config.optimizer.muon_ns_steps)  # fmt: skip
    ops = [op for op, _ in (*computed(run), *updated(run))]
    if num_processes > 1:
        ops += [AllReduce(size, num_processes, "node") for size in (8, *bucket_bytes(run.workload))]
    return tuple(dict.fromkeys(ops))


def try_source(source: Any, microbatch: int) -> tuple[float, int]:
    """Seconds (of this thread) for one microbatch read and collated, and the mean length it is padded to (0 where
    samples have none). Reads a few batches and stops after a quarter of a second."""
    begun = time.monotonic()
    chosen = np.random.default_rng(0).permutation(len(source))
    seconds: list[float] = []
    frames: list[int] = []
    for number in range(SAMPLED_BATCHES):
        indices = chosen[np.arange(number * microbatch, (number + 1) * microbatch) % len(chosen)]
        clock = time.thread_time()
        batch = _read(source, indices)
        seconds.append(time.thread_time() - clock)
        if isinstance(batch, Mapping) and "features_BFT" in batch:
            frames.append(int(batch["features_BFT"].shape[-1]))
        if time.monotonic() - begun > LONGEST_READ_S:
            break
    return min(seconds), round(float(np.mean(frames))) if frames else 0


def _batched(source: Any) -> bool:
    return getattr(source, "randomness", "seeded") == "none" and hasattr(source, "__getitems__")


def _read(source: Any, indices: np.ndarray) -> Any:
    """As the loader does it, without torch: generators seeded before each sample where a source draws from them."""
    if _batched(source):
        got = source.__getitems__(indices)
    else:
        got = []
        seeded = getattr(source, "randomness", "seeded") == "seeded"
        states = (random.getstate(), np.random.get_state()) if seeded else None
        for index in indices:
            if seeded:
                random.seed(int(index))
                np.random.seed(int(index) % 2**32)
            got.append(source[int(index)])
        if states is not None:
            random.setstate(states[0])
            np.random.set_state(states[1])
    if not isinstance(got, list):
        return got
    collate = getattr(source, "collate", None)
    return collate(got) if collate is not None else _stacked(got)


def _stacked(samples: Sequence[Any]) -> Any:
    first = samples[0]
    if isinstance(first, Mapping):
        return {name: _stacked([sample[name] for sample in samples]) for name in first}
    if isinstance(first, tuple):
        return tuple(_stacked(part) for part in zip(*samples))
    return np.stack(samples)


def _threads(config: Config, profile: MachineProfile, processes: int, device: str) -> tuple[int, list[str]]:
    """The number of threads to predict with: the run's, or the nearest that was measured."""
    wanted = config.launch.threads or detect.num_threads(processes)
    measured = {row.threads for row in profile.rows if row.device == device and row.domain in ("compute", "memory")}
    counts = sorted(measured, key=lambda count: (abs(count - wanted), count))
    if not counts or counts[0] == wanted:
        return wanted, []
    return counts[0], [f"the machine was not measured with {wanted} threads: predicted with {counts[0]}"]


# ---- the whole run


def _whole_run(
    config: Config, profile: MachineProfile, model: StepModel, step: StepPrediction, dtype: str, processes: int,
    threads: int, notes: list[str],
) -> RunPrediction:  # fmt: skip
    evaluation_s = _evaluation_s(config, model, dtype, processes)
    steps_s = config.num_steps * step.total_s
    values = RunBreakdown(
        startup=STARTUP_S + config.logging.limit_s + (2.0 if config.precision.compute == "auto" else 0.0),
        steps=steps_s, evaluation=evaluation_s,
        checkpoint=_checkpoint_s(config, profile, step.params, steps_s), idle=BETWEEN_STEPS_S * config.num_steps,
    )  # fmt: skip
    below, above = step.total_low_s / step.total_s, step.total_high_s / step.total_s
    low = RunBreakdown(**{name: value * (below if name == "steps" else 1 / RUN_FACTOR)
                          for name, value in asdict(values).items()})  # fmt: skip
    high = RunBreakdown(**{name: value * (above if name == "steps" else RUN_FACTOR)
                           for name, value in asdict(values).items()})  # fmt: skip
    spread = [sum((getattr(values, n) - getattr(side, n)) ** 2 for n in asdict(values)) ** 0.5 for side in (low, high)]
    return RunPrediction(step, values, low, high, values.total - spread[0], values.total + spread[1], dtype, processes,
                         threads, tuple(notes))  # fmt: skip


def _evaluation_s(config: Config, model: StepModel, dtype: str, processes: int) -> float:
    """Forward passes over the held-out samples, as often as they are due; 0 where there are none."""
    kind = plugins.find("turbopump.sources", config.data.kind)
    try:
        count = len(kind.open(config.data, config.evaluation.split))
    except DatasetError:
        return 0.0
    count = min(count, config.evaluation.max_samples or count)
    last = config.num_steps
    times = int(config.evaluation.at_start) + (last // config.evaluation.every if config.evaluation.every else 0)
    times += int(not config.evaluation.every or last % config.evaluation.every != 0)
    batch = min(config.evaluation.batch, max(1, count))
    work = plugins.find("turbopump.models", config.model.kind).workload(
        config.model, batch, kind.shape(config.data), dtype
    )
    forward = replace(work, blocks=tuple(replace(block, backward=()) for block in work.blocks), optimizer_ops=())
    each_s = model.predict(Run(forward, clip=False)).step.compute
    return times * (count / batch / processes) * each_s


def _checkpoint_s(config: Config, profile: MachineProfile, params: int, steps_s: float) -> float:
    """Of the last one, which is waited for: written, then read back; of those before it, the copies they are of."""
    state_bytes = CHECKPOINT_STATES * FP32 * params
    storage = profile.storage[0] if profile.storage else None
    write = storage.write_bytes_per_s if storage else STORAGE_BYTES_PER_S
    copies = max([row.bytes_per_s for row in profile.of_kind("MemoryCopy") if row.bytes > 2**24], default=5e9)
    between = config.num_steps // config.checkpoint.every if config.checkpoint.every else 0
    between += int(steps_s // config.checkpoint.every_s) if config.checkpoint.every_s else 0
    return state_bytes / write + 2 * state_bytes * (1 + between) / copies


# ---- into the run directory


def prediction_record(config: Config, machine: Path, *, num_processes: int = 0, device: str = "cpu") -> dict[str, Any]:
    """The content of prediction.json; with `problem` where nothing can be predicted."""
    head = {"schema_version": SCHEMA_VERSION, "turbopump_version": VERSION, "machine": str(machine)}
    try:
        profile = load(machine)
        check_same_machine(profile, detect.fingerprint(), detect.cpu_name(), machine)
        if profile.provenance != "measured":
            raise ProfileError(f"{machine} is a {profile.provenance} profile, not one of this machine")
        found = predict_recipe(config, profile, num_processes=num_processes, device=device)
    except TurbopumpError as error:
        return {**head, "problem": str(error)}
    run = {
        "run": asdict(found.run) | {"total": found.run.total},
        "run_low": asdict(found.run_low) | {"total": found.run_total_low_s},
        "run_high": asdict(found.run_high) | {"total": found.run_total_high_s},
    }
    calibration = profile.calibration
    return {
        **head, "machine_name": profile.name, "machine_date": profile.date, "dtype": found.dtype,
        "num_processes": found.num_processes, "threads": found.threads, "num_steps": config.num_steps,
        "calibrated_by": list(calibration.runs) if calibration else [], "notes": list(found.notes),
        **as_table(found.step), **run,
    }  # fmt: skip


def begin_prediction(
    config: Config, rundir: RunDir, *, num_processes: int = 1, device: str = "cpu", machine: Path | None = None
) -> subprocess.Popen[bytes] | None:
    """Start writing prediction.json, where a machine file lies in the working directory; None where there is none.

    Costs the caller a few milliseconds; whoever calls waits for the process in the end.
    """
    machine = machine or Path(MACHINE_FILE)
    if not machine.is_file() or config.model.kind == "live" or config.data.kind == "live":
        return None
    command = [sys.executable, "-m", "turbopump.planner.own_run", str(machine), str(rundir.prediction),
               str(num_processes), device]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.stdin is not None
    try:
        process.stdin.write(dumps(config).encode())
        process.stdin.close()
    except BrokenPipeError:  # it ended at once: its exit status says so
        pass
    return process


@contextmanager
def predicting(config: Config, rundir: RunDir, *, num_processes: int = 1, device: str = "cpu") -> Iterator[None]:
    """Around a run: the prediction is begun before it, once a run, and waited for where the run is over first."""
    process = None
    if not rundir.prediction.exists():
        process = begin_prediction(config, rundir, num_processes=num_processes, device=device)
    try:
        yield
        if process is not None:
            process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:  # the run's own result counts
        pass
    finally:
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


def main(machine: str, output: str, num_processes: str, device: str) -> None:
    """The process that `begin_prediction` starts: the recipe on its standard input."""
    os.nice(19)
    config = parse(from_toml(sys.stdin.read()), where="the run's recipe")
    record = prediction_record(config, Path(machine), num_processes=int(num_processes), device=device)
    write_atomic(Path(output), to_json(record, indent=True))


if __name__ == "__main__":
    main(*sys.argv[1:])
