"""The spine: what `train` costs over other loops, what checkpoints and spans cost, what the demo learns.

    python -m benchmarks.spine [--quick] [--demo RUN]

Row by row: the loops of spine_loops.py in alternating turns of one thread; the run of spine_checkpoints.py with and
without a save; checkpoint_trials.py; and a finished demo run (runs/demo, trained here if there is none).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import shlex
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import checkpoint_trials, spine_checkpoints, spine_loops
from benchmarks.harness import Ratio, Row, Target, alternating_blocks, main, ratio_with_interval, targets
from turbopump.core.config import Config, PrecisionConfig, load
from turbopump.core.files import digest, read_json_lines
from turbopump.core.rundir import RunDir
from turbopump.core.spans import Spans, span, step_breakdown
from turbopump.data.sources import TokensConfig
from turbopump.evaluate import evaluate
from turbopump.models.transformer.config import TransformerConfig
from turbopump.pack import pack
from turbopump.train import train
from turbopump.training.metrics import JsonLogger, StepLosses

TARGETS = targets(
    Target("spine.overhead_loop", "steps/s of train over a hand-written loop (transformer ~3.5 M parameters; the worse "
           "of fp32 and bf16)", "higher", 0.99, "ratio"),
    Target("spine.overhead_lightning", "steps/s of train over Lightning (the worst of its defaults, or without logger "
           "and bar, and of fp32 and bf16)", "higher", 1.0, "ratio"),
    Target("spine.overhead_accelerate", "steps/s of train over Accelerate (the worse of fp32 and bf16)", "higher", 1.0,
           "ratio"),
    Target("spine.overhead_step_us", "CPU time a step of train adds to a hand-written loop, whatever the model (1 "
           "layer, d=32, T=16, B=2, fp32)", "lower", None, "us"),
    Target("spine.checkpoint_slowdown", "slowdown of a run by one checkpoint a minute (the worse of the demo's state "
           "and of a 50 M-parameter one)", "lower", 0.015, "fraction"),
    Target("spine.resume_s", "from the start of restoring the demo's state to its first step done (the measurement of "
           "the machine's limit left out)", "lower", None, "s"),
    Target("spine.span_cost", "cost of all spans and records of a step", "lower", 0.01, "fraction of step"),
    Target("spine.other_share", "unexplained share of step time in the demo", "lower", 0.05, "fraction"),
    Target("spine.kill_wrong_loads", "wrong or impossible loads after kill -9 at random moments of saving (>= 30)",
           "lower", 0, "count"),
    Target("spine.flip_undetected", "bit flips of checkpoint files not detected (>= 300)", "lower", 0, "count"),
    Target("spine.demo_bits", "bits per byte on held-out files after the demo's minutes", "lower", 1.9, "bits/byte"),
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "recipes" / "demo.toml"
OURS, PLAIN = "turbopump", "hand-written"
SMALL = TransformerConfig(vocab_size=1024, num_layers=4, hidden_size=256, num_heads=4)  # 3.5 M parameters
TINY = TransformerConfig(vocab_size=1024, num_layers=1, hidden_size=32, num_heads=2)
LARGE = TransformerConfig(vocab_size=4096, num_layers=10, hidden_size=640, num_heads=10)  # 52 M parameters
SECONDS_BETWEEN_SAVES = 60.0
HALF_WIDTH = 0.01  # of the intervals of overhead


@dataclass(frozen=True)
class Effort:
    """How much is measured: `blocks` at a time until the intervals are narrow, at most `max_blocks`."""

    blocks: int
    max_blocks: int
    steps: int
    tiny_steps: int
    demo_saves: int
    large_saves: int
    resumes: int
    kills: int
    flips: int


QUICK = Effort(blocks=2, max_blocks=2, steps=1, tiny_steps=40, demo_saves=2, large_saves=1, resumes=2, kills=30,
               flips=300)  # fmt: skip
FULL = Effort(blocks=10, max_blocks=40, steps=2, tiny_steps=100, demo_saves=10, large_saves=6, resumes=5, kills=60,
              flips=600)  # fmt: skip


def measure(quick: bool, demo: Path = ROOT / "runs" / "demo") -> list[Row]:
    """All rows of the benchmark."""
    effort = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = demo_config(directory / "text")
        rows = [*loop_rows(effort, directory), *checkpoint_rows(effort, config, directory), resume_row(effort, config,
                directory)]  # fmt: skip
        demo = finished_demo(demo, config, directory, quick)
        rows += [span_row(demo, directory), other_row(demo)]
        rows += [kill_row(effort), flip_row(effort, directory), bits_row(demo)]
    return sorted(rows, key=lambda row: list(TARGETS).index(row.id))


def note(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


# ---- train against other loops


def loop_rows(effort: Effort, directory: Path) -> list[Row]:
    """Overhead rows: ours over each other loop, in fp32 and bf16, and alone a step of a model that costs nothing."""
    reason = spine_loops.install_peers()
    if reason:
        note(f"peers are absent: {reason}")
    data = directory / "loops"
    package = Path(sysconfig.get_paths()["stdlib"]) / "email"
    pack([str(package)], data, tokenizer="bpe", vocab_size=1024, validation=0.0, include=["*.py"])
    jobs = {dtype: spine_loops.Job(SMALL, data, 256, 8, dtype) for dtype in ("fp32", "bf16")}
    races = {dtype: race(job, effort, effort.steps, directory / dtype) for dtype, job in jobs.items()}
    ratios = {dtype: speed_ratios(times) for dtype, times in races.items()}
    for dtype, times in races.items():
        note(f"{dtype}: ms of CPU a step: " + ", ".join(
            f"{name} {statistics.median(t) / effort.steps * 1e3:.1f}" for name, t in times.items()))  # fmt: skip
    rows = [worst_row("spine.overhead_loop", ratios, PLAIN)]
    rows += [worst_row(f"spine.overhead_{peer}", ratios, peer) for peer in ("lightning", "accelerate")]
    tiny = spine_loops.Job(TINY, data, 16, 2, "fp32")
    times = race(tiny, effort, effort.tiny_steps, directory / "tiny")
    return [*(row for row in rows if row is not None), step_cost_row(times, effort.tiny_steps)]


def race(job: spine_loops.Job, effort: Effort, steps: int, directory: Path) -> dict[str, list[float]]:
    """CPU seconds of every block of `steps` steps of each contestant, until the ratios' intervals are narrow enough."""
    spine_loops.one_heap()
    times: dict[str, list[float]] = {}
    with silence(), spine_loops.Turns(spine_loops.contestants(job, directory)) as turns:
        blocks = {name: partial(turns.take, name, steps) for name in turns.names}
        for take in blocks.values():  # the start-up, and the optimizer's states with the first update
            take()
        while not times or len(times[OURS]) < effort.max_blocks:
            more = alternating_blocks(blocks, blocks=effort.blocks, warmup_blocks=0, clock=lambda: turns.cpu_s)
            times = {name: times.get(name, []) + seconds for name, seconds in more.items()}
            if all(ratio.half_width <= HALF_WIDTH for ratio in speed_ratios(times).values()):
                break
    return times


def speed_ratios(times: Mapping[str, Sequence[float]]) -> dict[str, Ratio]:
    """Steps/s of ours over each of the others."""
    return {name: ratio_with_interval(seconds, times[OURS]) for name, seconds in times.items() if name != OURS}


def worst_row(row_id: str, ratios: Mapping[str, Mapping[str, Ratio]], peer: str) -> Row | None:
    """The row of the least ratio over all whose name begins with `peer`, in each dtype; all of them as its peers.

    None where the peer is absent: a row must have a figure.
    """
    found = {f"{name}, {dtype}": ratio for dtype, by_name in ratios.items() for name, ratio in by_name.items()
             if name.startswith(peer)}  # fmt: skip
    if not found:
        return None
    worst = min(found.values(), key=lambda ratio: ratio.value)
    wide = max(ratio.half_width for ratio in found.values())
    if wide > HALF_WIDTH:
        note(
            f"{row_id}: the interval is +-{wide:.1%}, wider than {HALF_WIDTH:.0%}: take more blocks, or a quiet machine"
        )
    peers = {name: ratio.value for name, ratio in found.items()}
    return TARGETS[row_id].row(worst.value, runs=worst.runs, spread=worst.spread, peers=peers)


def step_cost_row(times: Mapping[str, Sequence[float]], steps: int) -> Row:
    """Median CPU microseconds a step over the hand-written loop's: ours, and the peers'."""
    extra = {name: [(a - b) / steps * 1e6 for a, b in zip(seconds, times[PLAIN], strict=True)]
             for name, seconds in times.items() if name != PLAIN}  # fmt: skip
    found = ratio_with_interval(extra[OURS], [1.0] * len(extra[OURS]))
    peers: dict[str, float | None] = {name: statistics.median(v) for name, v in extra.items() if name != OURS}
    peers["a step of the hand-written loop"] = statistics.median(times[PLAIN]) / steps * 1e6
    return TARGETS["spine.overhead_step_us"].row(found.value, runs=found.runs, spread=found.spread, peers=peers)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """What the contestants print costs them time, and nobody sees it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield


# ---- checkpoints


def demo_config(text: Path) -> Config:
    """The demo's recipe on a part of its text, enough for everything but its learning."""
    package = Path(sysconfig.get_paths()["stdlib"]) / "email"
    pack([str(package)], text, tokenizer="bpe", vocab_size=1024, validation=0.2, include=["*.py"])
    return load(RECIPE, [f"data.path={text}"])


def checkpoint_rows(effort: Effort, demo: Config, directory: Path) -> list[Row]:
    """Extra seconds of a save, as a fraction of the minute between two."""
    large = dataclasses.replace(
        demo, model=LARGE, data=TokensConfig(path=demo.data.path, seq_len=64), global_batch=2,
        precision=PrecisionConfig(compute="bf16"), optimizer=dataclasses.replace(demo.optimizer, kind="adamw"),
    )  # fmt: skip
    costs = {}
    for name, config, steps, saves in (("demo", demo, 8, effort.demo_saves), ("52 M parameters", large, 12,
                                       effort.large_saves)):  # fmt: skip
        costs[name] = cost = spine_checkpoints.save_cost(config, directory / "saves", window_steps=steps, saves=saves)
        note(f"a save of {name}, {cost.checkpoint_bytes / 1e6:.0f} MB: {statistics.median(cost.wall_s):.3f} s of wall "
             f"and {statistics.median(cost.cpu_s):.3f} s of CPU more; at most {cost.stall_s:.3f} s stalled, "
             f"{cost.write_s:.2f} s in the background")  # fmt: skip
    return [slowdown_row(costs)]


def slowdown_row(costs: Mapping[str, spine_checkpoints.SaveCost]) -> Row:
    """The largest slowdown of wall time; CPU time of all threads beside it, of all cores' seconds."""
    wall = {name: ratio_with_interval(cost.wall_s, [SECONDS_BETWEEN_SAVES] * len(cost.wall_s))
            for name, cost in costs.items()}  # fmt: skip
    cores = len(os.sched_getaffinity(0))
    peers = {f"{name}, wall": ratio.value for name, ratio in wall.items()}
    peers |= {f"{name}, CPU": statistics.median(cost.cpu_s) / SECONDS_BETWEEN_SAVES / cores
              for name, cost in costs.items()}  # fmt: skip
    worst = max(wall.values(), key=lambda ratio: ratio.value)
    return TARGETS["spine.checkpoint_slowdown"].row(worst.value, runs=worst.runs, spread=worst.spread, peers=peers)


def resume_row(effort: Effort, demo: Config, directory: Path) -> Row:
    """Bound: reading the checkpoint's files once and hashing them."""
    run = directory / "resume"
    found = [spine_checkpoints.resume(demo, run) for _ in range(effort.resumes)]
    begin = time.perf_counter()
    newest = max((run / "checkpoints").glob("step*"))
    for file in newest.iterdir():
        digest(file.read_bytes())
    bound = time.perf_counter() - begin
    seconds = [one.restore_s for one in found]
    peers = {"from the call of train": statistics.median(one.call_s for one in found)}
    return TARGETS["spine.resume_s"].row(statistics.median(seconds), runs=len(seconds), bound=bound, peers=peers,
                                         spread=(min(seconds), max(seconds)))  # fmt: skip


def kill_row(effort: Effort) -> Row:
    counts = checkpoint_trials.kill_trials(effort.kills)
    note(f"kills: {counts}")
    return TARGETS["spine.kill_wrong_loads"].row(counts["wrong"] + counts["unloadable"] + counts["lost"],
                                                 runs=counts["trials"])  # fmt: skip


def flip_row(effort: Effort, directory: Path) -> Row:
    counts = checkpoint_trials.flip_trials(effort.flips)
    note(f"flips: {counts}")
    peers = spine_checkpoints.undetected_flips(effort.flips, directory)
    return TARGETS["spine.flip_undetected"].row(counts["undetected"], runs=counts["trials"], peers=peers)


# ---- the demo


def finished_demo(run: Path, config: Config, directory: Path, quick: bool) -> Path:
    """A finished run of the demo's recipe: `run`, or made anew by the demo's own verbs (a few steps only if quick)."""
    if any(r.get("type") == "end" and r.get("reason") == "finished" for r in read_json_lines(RunDir(run).spans())):
        return run
    if quick:
        note(f"no finished demo in {run}: the rows of the demo are of 20 steps on a part of its text")
        train(dataclasses.replace(config, num_steps=20), run=directory / "demo", quiet=True)
        return directory / "demo"
    recipe = tomllib.loads(RECIPE.read_text())
    data = ROOT / recipe["data"]["path"]
    if not (data / "manifest.json").exists():
        _turbopump(
            "pack", "stdlib", str(data), "--tokenizer", "bpe", "--vocab-size", str(recipe["model"]["vocab_size"])
        )
    _turbopump("train", str(RECIPE), "--run", str(run))
    return run


def _turbopump(*words: str) -> None:
    note(f"turbopump {shlex.join(words)}")
    subprocess.run([sys.executable, "-m", "turbopump.cli", *words], cwd=ROOT, check=True)


def span_row(demo: Path, directory: Path) -> Row:
    """Spans, step records and progress lines alone in a tight loop, over the step of the demo."""
    step_s = statistics.median(r["s"] for r in read_json_lines(RunDir(demo).spans()) if r.get("type") == "step")
    costs = [_records_s(directory / "spans", 2000) / step_s for _ in range(5)]
    return TARGETS["spine.span_cost"].row(statistics.median(costs), runs=len(costs), spread=(min(costs), max(costs)))


def _records_s(directory: Path, steps: int) -> float:
    """Seconds of all that one step books and records."""
    losses, logger = StepLosses(1), JsonLogger(directory / "metrics.jsonl")
    loss, norm = torch.tensor(1.0), torch.tensor(1.0)
    with Spans(directory / "spans.jsonl") as spans:
        begin = time.perf_counter()
        for step in range(1, steps + 1):
            with spans.step(step):
                for name in ("data", "compute", "optimizer"):
                    with span(name):
                        pass
            losses.add(step, loss, norm, 1e-3)
            if step % 10 == 0:
                for record in losses.fetch():
                    logger.log(record)
                logger.log({"type": "progress", "step": step, "loss": 1.0, "epoch_s": time.time()})
                spans.flush()
        return (time.perf_counter() - begin) / steps


def other_row(demo: Path) -> Row:
    """`other` of the mean step, and its range over tenths of the run."""
    steps = [r for r in read_json_lines(RunDir(demo).spans()) if r.get("type") == "step"]
    tenth = max(1, len(steps) // 10)
    parts = [step_breakdown(steps[i : i + tenth]) for i in range(0, len(steps) - tenth + 1, tenth)]
    shares = [part.other / part.total for part in parts]
    whole = step_breakdown(steps)
    return TARGETS["spine.other_share"].row(whole.other / whole.total, runs=len(steps),
                                            spread=(min(shares), max(shares)))  # fmt: skip


def bits_row(demo: Path) -> Row:
    """The whole validation split; compressors on the same text."""
    result = evaluate(demo)
    return TARGETS["spine.demo_bits"].row(result.metrics["bits_per_byte"], runs=1, peers=result.yardsticks)


def demo_argument(arguments: Sequence[str]) -> tuple[Callable[[bool], list[Row]], list[str]]:
    """`--demo RUN` taken from the arguments; the rest is the harness's."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--demo", type=Path)
    given, rest = parser.parse_known_args(arguments)
    return (partial(measure, demo=given.demo) if given.demo else measure), rest


if __name__ == "__main__":
    measured, rest = demo_argument(sys.argv[1:])
    main("spine", measured, rest)
