import json
import os
import platform
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import harness
from benchmarks.harness import Row, Target, alternating_blocks, ratio_with_interval, targets, write_results

SPAN_COST = Target("spine.span_cost", "cost of all spans of a step", "lower", 0.01, "fraction of step")
SPEED = Target("spine.speed", "steps/s over a loop", "higher", 0.99, "ratio")


def test_a_target_makes_its_row():
    row = SPAN_COST.row(0.004, runs=30, spread=(0.003, 0.005), bound=0.0, peers={"lightning": 0.3, "other": None})
    assert (row.id, row.unit, row.target, row.met) == ("spine.span_cost", "fraction of step", 0.01, True)
    assert SPAN_COST.row(0.02, runs=1).met is False
    assert SPAN_COST.row(0.02, runs=1).spread == (0.02, 0.02)
    assert SPEED.row(0.98, runs=1).met is False and SPEED.row(1.0, runs=1).met is True
    assert Target("a", "b", "lower", None, "s").row(1.0, runs=1).met is None


def test_targets_are_found_by_id():
    assert targets(SPAN_COST, SPEED)["spine.speed"] is SPEED
    with pytest.raises(ValueError, match="twice"):
        targets(SPEED, SPEED)


def test_result_files_have_exactly_the_agreed_fields(tmp_path):
    path = write_results("spine", [SPEED.row(1.0, runs=3, peers={"lightning": None})], directory=tmp_path)
    assert path.name == f"spine.{harness.machine_name()}.json"
    result = json.loads(path.read_text())
    assert list(result) == ["benchmark", "date", "commit", "machine", "rows"]
    fields = ["id", "what", "value", "unit", "better", "target", "bound", "peers", "runs", "spread"]
    assert list(result["rows"][0]) == fields
    assert result["rows"][0]["spread"] == [1.0, 1.0] and result["rows"][0]["peers"] == {"lightning": None}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", result["date"])
    assert result["machine"]["cores"] == len(os.sched_getaffinity(0))


def test_quick_runs_do_not_overwrite_full_ones(tmp_path):
    rows = [SPEED.row(1.0, runs=3)]
    assert write_results("spine", rows, quick=True, directory=tmp_path) != write_results(
        "spine", rows, directory=tmp_path
    )
    with pytest.raises(ValueError, match="twice"):
        write_results("spine", rows * 2, directory=tmp_path)
    with pytest.raises(ValueError):  # a figure that is not a number is no figure
        write_results("spine", [SPEED.row(float("nan"), runs=1)], directory=tmp_path)


def test_nothing_names_the_machine_or_its_owner():
    text = json.dumps(harness.machine()) + harness.machine_name()
    node = platform.node()
    assert len(node) < 4 or node not in text
    assert re.fullmatch(r"[a-z0-9-]+-\d+c", harness.machine_name())


def test_every_block_runs_every_contestant_and_all_take_turns_to_begin():
    calls: list[str] = []
    contestants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = alternating_blocks(contestants, blocks=6, warmup_blocks=1)
    assert {name: len(found) for name, found in times.items()} == {"a": 6, "b": 6, "c": 6}
    blocks = [calls[i : i + 3] for i in range(0, len(calls), 3)]
    assert len(blocks) == 7 and all(sorted(block) == ["a", "b", "c"] for block in blocks)
    assert {block[0] for block in blocks[1:]} == {block[-1] for block in blocks[1:]} == {"a", "b", "c"}


def test_two_contestants_begin_equally_often():
    calls: list[str] = []
    alternating_blocks({n: (lambda n=n: calls.append(n)) for n in "ab"}, blocks=8, warmup_blocks=0)
    assert sum(calls[i] == "a" for i in range(0, 16, 2)) == 4


def test_the_clock_is_the_one_given():
    now = iter(range(1000))
    times = alternating_blocks({"a": lambda: next(now)}, blocks=3, clock=lambda: float(next(now)))
    assert times["a"] == [2.0, 2.0, 2.0]


@pytest.mark.slow
@given(st.floats(0.5, 2.0), st.integers(0, 2**32), st.integers(15, 40))
def test_the_interval_finds_the_true_ratio_through_noise(truth, seed, blocks):
    """Both contestants drift together by a factor of 3, each block has 1 % noise, a tenth of the blocks are hit by
    something that takes 5 times as long."""
    rng = random.Random(seed)
    a, b = [], []
    for i in range(blocks):
        drift = 1 + 2 * i / blocks
        a.append(truth * drift * rng.gauss(1, 0.01) * (5 if i % 20 == 7 else 1))
        b.append(drift * rng.gauss(1, 0.01) * (5 if i % 20 == 13 else 1))
    ratio = ratio_with_interval(a, b, resamples=500)
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value == pytest.approx(truth, rel=0.02)
    assert ratio.half_width < 0.05 * truth and ratio.runs == blocks


def test_more_blocks_make_the_interval_narrower():
    def width(blocks):
        rng = random.Random(1)
        a, b = ([rng.gauss(1, 0.05) for _ in range(blocks)] for _ in range(2))
        return ratio_with_interval(a, b).half_width

    assert width(400) < width(25) / 2


def test_the_ratio_is_reproducible_and_the_same_times_give_one():
    assert ratio_with_interval([1.0, 2.0], [1.0, 2.0]) == harness.Ratio(1.0, 1.0, 1.0, 2)
    a, b = [1.0, 1.2, 1.1], [1.0, 1.0, 1.3]
    assert ratio_with_interval(a, b) == ratio_with_interval(a, b)
    assert ratio_with_interval(a, b).spread == (ratio_with_interval(a, b).low, ratio_with_interval(a, b).high)


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], [1.0, 2.0])])
def test_blocks_that_do_not_pair_up_are_refused(a, b):
    with pytest.raises(ValueError, match="pair up"):
        ratio_with_interval(a, b)


def test_the_table_shows_misses_and_absent_peers():
    rows = [SPEED.row(0.5, runs=3, peers={"lightning": None, "accelerate": 0.25}), SPAN_COST.row(0.001, runs=2)]
    text = harness.table(rows)
    assert "lightning absent, accelerate 0.25" in text
    assert ">= 0.99 MISSED" in text and "<= 0.01 met" in text
    assert len(text.splitlines()) == 4


def test_main_measures_prints_and_writes(tmp_path, capsys):
    asked = []

    def measure(quick: bool) -> list[Row]:
        asked.append(quick)
        return [SPEED.row(1.0, runs=1)]

    harness.main("toy", measure, ["--quick"], directory=tmp_path)
    harness.main("toy", measure, [], directory=tmp_path)
    assert asked == [True, False]
    assert len(list(tmp_path.glob("toy.*.json"))) == 2
    assert "spine.speed" in capsys.readouterr().out
