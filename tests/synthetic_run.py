"""Run directories as `train` leaves them, made in milliseconds: the real span recorder under a clock that is told what
time it is. `write_run(path)` is the page to look at; its options make the runs that reports go wrong on."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.core import spans as spans_module
from turbopump.core.config import to_toml
from turbopump.core.files import JsonLines, to_json
from turbopump.core.rundir import RunDir
from turbopump.core.spans import Spans, span


class Clock:
    """Stands in for the `time` module of core.spans."""

    def __init__(self, epoch_s: float = 1_790_000_000.0) -> None:
        self.now_s = epoch_s

    def perf_counter(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s

    def pass_s(self, seconds: float) -> None:
        self.now_s += seconds


@contextmanager
def told_time(clock: Clock) -> Iterator[None]:
    real = spans_module.time
    spans_module.time = clock
    try:
        yield
    finally:
        spans_module.time = real


@dataclass(frozen=True)
class Shape:
    """What the synthetic run is like; times in seconds."""

    name: str = "demo"
    num_steps: int = 1500
    compute_s: float = 0.118
    data_s: float = 0.004
    optimizer_s: float = 0.011
    communication_s: float = 0.0
    other_s: float = 0.0012
    startup_s: float = 6.5
    evaluation_s: float = 2.4
    stall_s: float = 0.35
    evaluate_every: int = 150
    checkpoint_every: int = 750
    log_every: int = 10
    killed_after: int | None = None  # the first attempt ends here without a word; the second goes on
    gap_s: float = 40.0
    nan_from: int | None = None
    disturbed: float = 0.0  # share of the steps that take five times as long
    num_ranks: int = 1
    slow_rank: int | None = None
    seed: int = 0
    best_loss: float = 3.05
    config: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)


def write_run(path: Path, shape: Shape = Shape(), *, texts: str | None = None) -> RunDir:
    """A finished run of `shape`; `texts` replaces every string a user could have chosen."""
    run = RunDir(path)
    run.create()
    run.config.write_text(to_toml(_config(shape, texts)), encoding="utf-8")
    run.choices.write_text(to_toml(_choices(texts)), encoding="utf-8")
    run.env.write_bytes(to_json(_env(shape, texts), indent=True))
    for rank in range(shape.num_ranks):
        clock = Clock()
        with told_time(clock):
            _Writer(run, shape, rank, clock).write()
    samples = JsonLines(run.samples)
    for step in range(0, shape.num_steps + 1, max(1, shape.num_steps // 3)):
        samples.write({"step": step, "prompt": texts or "def main(", "text": texts or _sample(step, shape.num_steps)})
    samples.close()
    run.logs.mkdir()
    return run


class _Writer:
    """One rank's attempts, as the loop would have recorded them."""

    def __init__(self, run: RunDir, shape: Shape, rank: int, clock: Clock) -> None:
        self.run, self.shape, self.rank, self.clock = run, shape, rank, clock
        self.random = np.random.default_rng((shape.seed, rank))
        self.metrics = JsonLines(run.metrics) if rank == 0 else JsonLines(run.path / ".unused")
        self.slow = 1.3 if rank == shape.slow_rank else 1.0

    def write(self) -> None:
        shape = self.shape
        if shape.killed_after is None:
            self.attempt(0, 0, shape.num_steps, "finished")
        else:
            self.attempt(0, 0, shape.killed_after, None)
            self.clock.pass_s(shape.gap_s)
            restored = shape.killed_after // shape.checkpoint_every * shape.checkpoint_every
            self.attempt(1, restored, shape.num_steps, "finished")
        self.metrics.close()
        (self.run.path / ".unused").unlink(missing_ok=True)

    def attempt(self, number: int, first: int, last: int, reason: str | None) -> None:
        shape, clock = self.shape, self.clock
        with Spans(self.run.spans(self.rank), attempt=number, rank=self.rank, world_size=shape.num_ranks) as spans:
            clock.pass_s(shape.startup_s)
            spans.started()
            if number:
                spans.restored(first)
            else:
                self.evaluate(spans, 0)
            for step in range(first + 1, last + 1):
                self.step(spans, step, warm=step - first)
                if step % shape.log_every == 0:
                    self.progress(step)
                    spans.flush()
                if step % shape.evaluate_every == 0 or step == last:
                    self.evaluate(spans, step)
                if step % shape.checkpoint_every == 0 or (step == last and reason):
                    self.checkpoint(spans, step)
            if reason is not None:
                clock.pass_s(0.2)
                spans.close(reason)
            else:
                spans.flush()

    def step(self, spans: Spans, step: int, warm: int) -> None:
        shape, clock = self.shape, self.clock
        hiccup = 1.25 if self.random.random() < 0.02 else 1.0
        hiccup *= 5.0 if self.random.random() < shape.disturbed else 1.0
        noise = (hiccup * self.random.lognormal(0.0, 0.03, 4)).tolist()
        first = 4.0 if warm == 1 else 1.4 if warm == 2 else 1.0
        with spans.step(step):
            with span("data"):
                clock.pass_s(shape.data_s * noise[0])
            with span("compute"):
                clock.pass_s(shape.compute_s * noise[1] * first * self.slow)
                if shape.communication_s:
                    with span("communication"):
                        clock.pass_s(shape.communication_s * noise[2])
            with span("optimizer"):
                clock.pass_s(shape.optimizer_s * noise[3])
            clock.pass_s(shape.other_s)
        self.metrics.write({"type": "step", "step": step, "loss": self.loss(step, 0.06),
                            "grad_norm": float(0.4 + 2.0 * math.exp(-step / 60) + 0.05 * self.random.standard_normal()),
                            "lr": 2e-3 * min(1.0, step / 100) * 0.5 * (1.1 + 0.9 * math.cos(math.pi * step
                                                                                     / shape.num_steps))})  # fmt: skip

    def loss(self, step: int, noise: float = 0.0) -> float | None:
        shape = self.shape
        if shape.nan_from is not None and step >= shape.nan_from:
            return None
        done = step / shape.num_steps
        decayed = (8.32 - shape.best_loss) * (0.55 * math.exp(-done * 40) + 0.45 * math.exp(-done * 5))
        return shape.best_loss + decayed + noise * float(self.random.standard_normal())

    def progress(self, step: int) -> None:
        shape = self.shape
        step_s = shape.compute_s + shape.data_s + shape.optimizer_s + shape.communication_s + shape.other_s
        step_s *= float(self.random.lognormal(0, 0.02))
        env = _env(shape, None)
        limit = env["limit"]["flops_per_s"]
        flops_per_s = env["workload"]["flops_per_step"] / step_s
        self.metrics.write({
            "type": "progress", "step": step, "loss": self.loss(step), "epoch_s": self.clock.time(),
            "rss_bytes": int(9.1e8 + 4e7 * (1 - math.exp(-step / 50))), "device_bytes": None, "step_s": step_s,
            "units_per_s": env["workload"]["units_per_step"] / step_s, "model_flops_per_s": flops_per_s,
            "share_of_limit": flops_per_s / limit, "mfu": None, "remaining_s": step_s * (shape.num_steps - step),
        })  # fmt: skip
        self.metrics.flush()

    def evaluate(self, spans: Spans, step: int) -> None:
        with spans.period("evaluation", step):
            self.clock.pass_s(self.shape.evaluation_s)
        loss = self.loss(step)
        held_out = None if loss is None else loss + 0.12 * step / self.shape.num_steps
        self.metrics.write({"type": "evaluation", "step": step, "split": "validation", "loss": held_out,
                            "bits_per_byte": None if held_out is None else held_out / math.log(2) / 2.55,
                            "epoch_s": self.clock.time(), "s": self.shape.evaluation_s})  # fmt: skip

    def checkpoint(self, spans: Spans, step: int) -> None:
        with spans.period("checkpoint", step):
            self.clock.pass_s(self.shape.stall_s)
        if self.rank:
            return
        directory = self.run.checkpoints / f"step-{step:08d}"
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "index.json").write_bytes(b"{}")
        (directory / "manifest.json").write_bytes(b"{}")
        self.metrics.write({"type": "checkpoint", "step": step, "bytes": 57_400_000, "stall_s": self.shape.stall_s,
                            "write_s": 1.1, "epoch_s": self.clock.time()})  # fmt: skip


def _config(shape: Shape, texts: str | None) -> dict[str, Any]:
    config: dict[str, Any] = {
        "schema_version": 1,
        "name": texts or shape.name,
        "seed": shape.seed,
        "num_steps": shape.num_steps,
        "global_batch": 16,
        "microbatch": 0,
        "model": {"kind": texts or "transformer", "vocab_size": 4096, "num_layers": 4, "hidden_size": 256},
        "data": {"kind": "tokens", "path": texts or "datasets/stdlib", "seq_len": 256},
        "optimizer": {"kind": "adamw", "lr": 2e-3, "clip_norm": 1.0, "weight_decay": 0.1},
        "schedule": {"kind": "cosine", "warmup_steps": 100},
        "precision": {"compute": "auto"},
        "loader": {"num_workers": 0, "prefetch_steps": 2},
        "evaluation": {"every": shape.evaluate_every, "max_samples": 0, "split": "validation"},
        "checkpoint": {"every": shape.checkpoint_every, "every_s": 0.0, "asynchronous": True},
        "launch": {"num_processes": shape.num_ranks, "threads": 0},
    }
    for path, value in shape.config.items():
        *parents, last = path.split(".")
        node = config
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return config


def _choices(texts: str | None) -> dict[str, Any]:
    rows = [
        {
            "op": texts or "linear forward and backward, m=1024 n=512 k=512",
            "fp32_s": 0.0093,
            "bf16_s": 0.0031,
            "bf16_gain": 3.0,
            "runs": 40,
            "problem": "",
        },
        {
            "op": "linear forward and backward, m=2048 n=1024 k=512",
            "fp32_s": 0.0362,
            "bf16_s": 0.0117,
            "bf16_gain": 3.1,
            "runs": 22,
            "problem": "",
        },
    ]
    return {"schema_version": 1, "precision": {"compute": "bf16", "evidence": rows}}


def _env(shape: Shape, texts: str | None) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "turbopump_version": "0.1.0",
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "platform": texts or "Linux x86_64",
        "host": texts or "machine",
        "cpu": texts or "Example CPU with AVX512 and AMX",
        "num_cores": 2,
        "threads": 2 // shape.num_ranks or 1,
        "world_size": shape.num_ranks,
        "device": "cpu",
        "dtype_in_use": {"bf16": 0.97, "fp32": 0.03},
        "memory_bytes": 16_800_000_000,
        "started": "2026-03-01T09:00:00+00:00",
        "workload": {
            "params": 4_990_000,
            "flops_per_step": 8.6e10,
            "forward_flops_per_step": 2.87e10,
            "units_per_step": 4096,
            "unit": texts or "token",
        },
        "limit": {
            "flops_per_s": 1.02e12,
            "dtype": "bf16",
            "route": texts or "default",
            "rows": [
                {"route": texts or "default", "op": "Gemm(m=2048,n=1024,k=1024,dtype=bf16)", "flops_per_s": 1.02e12},
                {"route": texts or "default", "op": "Gemm(m=512,n=512,k=512,dtype=bf16)", "flops_per_s": 7.4e11},
            ],
            "limit_scope": "run",
        },
        **shape.env,
    }


def _sample(step: int, num_steps: int) -> str:
    if step == 0:
        return "�tx imp\x0ewj7 ]]= qz__ (o\n  retu 0x,,, fffl"
    if step < num_steps // 2:
        return "self, value):\n    self.name = self.name\n    if self.name is None:\n        return self.name"
    return (
        'args=None):\n    """Run the command line."""\n    parser = argparse.ArgumentParser(description=__doc__)\n'
        "    parser.add_argument('-v', '--verbose', action='store_true')\n    options = parser.parse_args(args)\n"
        "    return 0 if options.verbose else 1\n"
    )
