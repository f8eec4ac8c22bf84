"""The parts of the spine benchmark that decide what a figure means."""

import math
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks import spine, spine_checkpoints, spine_loops
from benchmarks.harness import Ratio, alternating_blocks, write_results
from turbopump.models.transformer.config import TransformerConfig
from turbopump.pack import pack


def contestant(steps: list[tuple[str, int]], name: str, thread_names: set[str]):
    def run(after_step) -> None:
        for step in range(1000):
            thread_names.add(threading.current_thread().name)
            steps.append((name, step))
            after_step()

    return run


def test_contestants_take_turns_of_so_many_steps_and_go_on_where_they_were() -> None:
    steps, threads = [], set()
    with spine_loops.Turns({name: contestant(steps, name, threads) for name in "ab"}) as turns:
        turns.take("a", 2)
        turns.take("b", 1)
        turns.take("a", 3)
    assert steps == [("a", 0), ("a", 1), ("b", 0), ("a", 2), ("a", 3), ("a", 4)]
    assert threads == {"a", "b"} and not threads & {thread.name for thread in threading.enumerate()}


@pytest.mark.slow
def test_a_turn_counts_the_cpu_time_of_its_contestant_alone() -> None:
    def busy(after_step) -> None:
        while True:
            end = time.thread_time() + 0.01
            while time.thread_time() < end:
                pass
            after_step()

    def idle(after_step) -> None:
        while True:
            time.sleep(0.01)
            after_step()

    with spine_loops.Turns({"busy": busy, "idle": idle}) as turns:
        blocks = {name: lambda name=name: turns.take(name, 3) for name in turns.names}
        seconds = alternating_blocks(blocks, blocks=2, clock=lambda: turns.cpu_s)
    assert min(seconds["busy"]) >= 0.03 > max(seconds["idle"])


def test_what_a_contestant_raises_is_raised_and_none_may_end_by_itself() -> None:
    def fails(after_step) -> None:
        after_step()
        raise ValueError("broken")

    with spine_loops.Turns({"fails": fails, "ends": lambda after_step: after_step(), "waits": fails}) as turns:
        turns.take("fails", 1)
        with pytest.raises(ValueError, match="broken"):
            turns.take("fails", 1)
        with pytest.raises(RuntimeError, match="ends ended by itself"):
            turns.take("ends", 2)


def test_train_and_the_hand_written_loop_are_contestants(tmp_path: Path) -> None:
    pack(iter(["some text to train on, " * 50] * 30), tmp_path / "data", validation=0.0)
    model = TransformerConfig(vocab_size=256, num_layers=1, hidden_size=16, num_heads=2)
    job = spine_loops.Job(model, tmp_path / "data", seq_len=16, batch=2, compute="fp32")
    assert job.batches(3)[2].shape == (2, 17)
    loops = {"ours": spine_loops.turbopump_loop(job, tmp_path), "plain": spine_loops.hand_written_loop(job)}
    with spine_loops.Turns(loops) as turns:
        for name in ("ours", "plain", "ours"):
            before = turns.cpu_s
            turns.take(name, 12)
            assert turns.cpu_s > before
    spans = [r for r in spine.read_json_lines(tmp_path / "turbopump" / "spans" / "rank0.jsonl") if r["type"] == "step"]
    assert len(spans) == 24 and not list((tmp_path / "turbopump" / "checkpoints").iterdir())


def test_the_worst_ratio_makes_the_row_and_all_are_kept() -> None:
    ratios = {
        "fp32": {"lightning, defaults": Ratio(1.3, 1.2, 1.4, 9), "lightning, off": Ratio(1.01, 1.0, 1.02, 9)},
        "bf16": {"lightning, off": Ratio(0.98, 0.97, 0.99, 9), "hand-written": Ratio(0.5, 0.4, 0.6, 9)},
    }
    row = spine.worst_row("spine.overhead_lightning", ratios, "lightning")
    assert (row.value, row.spread, row.met) == (0.98, (0.97, 0.99), False)
    assert row.peers == {"lightning, defaults, fp32": 1.3, "lightning, off, fp32": 1.01, "lightning, off, bf16": 0.98}
    assert spine.worst_row("spine.overhead_accelerate", ratios, "accelerate") is None


def test_speed_is_the_others_time_over_ours() -> None:
    ratios = spine.speed_ratios({"turbopump": [2.0, 2.0], "hand-written": [1.0, 1.0]})
    assert ratios.keys() == {"hand-written"} and ratios["hand-written"].value == 0.5


def test_the_cost_of_a_step_is_what_ours_adds() -> None:
    times = {"turbopump": [0.013, 0.012], "hand-written": [0.010, 0.010], "lightning": [0.020, 0.020]}
    row = spine.step_cost_row(times, steps=10)
    assert row.value == pytest.approx(250) and row.peers["lightning"] == pytest.approx(1000)


def test_the_cost_of_a_save_is_free_of_drift() -> None:
    """Steps that grow slower all the time, and 0.5 s more in the step after each save (at 8 and 16)."""
    stamps, now = {}, 0.0
    for step in range(1, 25):
        now += 1 + 0.01 * step + (0.5 if step in (9, 17) else 0.0)
        stamps[step] = (now, 2 * now)
    assert spine_checkpoints.extra_seconds(stamps, 4, 2, 0) == pytest.approx([0.5, 0.5])
    assert spine_checkpoints.extra_seconds(stamps, 4, 2, 1) == pytest.approx([1.0, 1.0])


def test_slowdown_is_of_the_minute_between_two_saves() -> None:
    costs = {
        "a": spine_checkpoints.SaveCost([0.3] * 5, [0.6] * 5, 10, 0.1, 1.0),
        "b": spine_checkpoints.SaveCost([1.2] * 5, [0.6] * 5, 10, 0.1, 1.0),
    }
    row = spine.slowdown_row(costs)
    assert row.value == pytest.approx(0.02) and row.met is False
    assert row.peers["a, wall"] == pytest.approx(0.005)


def test_flips_of_other_formats_are_counted(tmp_path: Path) -> None:
    found = spine_checkpoints.undetected_flips(20, tmp_path)
    assert all(10 < value <= 20 for value in found.values())


def test_the_cost_of_records_is_positive(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    assert 0 < spine._records_s(tmp_path, 20) < 1


def test_every_row_that_is_promised_is_stated_here(tmp_path: Path) -> None:
    """The rows with a target, their directions and units; a result file can hold them all."""
    promised = {
        "spine.overhead_loop": 0.99, "spine.overhead_lightning": 1.0, "spine.overhead_accelerate": 1.0,
        "spine.checkpoint_slowdown": 0.015, "spine.span_cost": 0.01, "spine.other_share": 0.05,
        "spine.kill_wrong_loads": 0, "spine.flip_undetected": 0, "spine.demo_bits": 1.9,
    }  # fmt: skip
    assert {row_id: t.target for row_id, t in spine.TARGETS.items() if t.target is not None} == promised
    write_results("spine", [target.row(math.pi, runs=1) for target in spine.TARGETS.values()], directory=tmp_path)


def test_the_demo_to_measure_can_be_named() -> None:
    measured, rest = spine.demo_argument(["--quick", "--demo", "runs/other"])
    assert measured.keywords == {"demo": Path("runs/other")} and rest == ["--quick"]
    assert spine.demo_argument([])[0] is spine.measure
