import dataclasses
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.processes import PATIENCE_S
from turbopump.core import spans
from turbopump.core.files import read_json_lines
from turbopump.core.spans import RunBreakdown, Spans, StepBreakdown, run_breakdown, span, step_breakdown


@pytest.fixture
def recorded(tmp_path):
    """A recorder that is current, and a function that closes it and gives its records."""
    path = tmp_path / "rank0.jsonl"
    with Spans(path) as recorder:

        def close():
            recorder.close("finished")
            return list(read_json_lines(path))

        yield recorder, close


def burn(seconds: float) -> float:
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds:
        pass
    return elapsed


def test_a_span_is_nothing_where_nobody_records():
    with span("data"), span("compute"):
        pass


def test_records_have_the_documented_form(recorded):
    recorder, close = recorded
    with recorder.period("startup"):
        pass
    recorder.restored(5)
    with recorder.step(6):
        with span("data"):
            pass
    attempt, startup, restore, step, end = close()
    assert set(attempt) == {"type", "attempt", "epoch_s", "pid", "rank", "world_size"}
    assert (startup["type"], startup["name"], startup["step"]) == ("period", "startup", None)
    assert restore == {"type": "restore", "step": 5}
    assert (step["type"], step["step"], list(step["spans"])) == ("step", 6, ["data"])
    assert (end["type"], end["reason"]) == ("end", "finished")
    assert startup["start_s"] + startup["s"] <= step["start_s"] <= step["start_s"] + step["s"] <= end["s"]


def test_inner_spans_are_taken_from_the_outer_one(recorded):
    recorder, close = recorded
    with recorder.step(1):
        with span("compute"):
            burn(0.002)
            with span("communication"):
                with span("data"):
                    inner_s = burn(0.004)
                burn(0.001)
            burn(0.002)
        with span("data"):
            inner_s += burn(0.002)
        with span("optimizer"):
            optimizer_s = burn(0.001)
    step = close()[1]
    times = step["spans"]
    assert times["data"] >= inner_s and times["optimizer"] >= optimizer_s
    assert times["compute"] >= 0.004 and times["communication"] >= 0.001
    assert sum(times.values()) <= step["s"]
    breakdown = StepBreakdown.from_spans(step["s"], times)
    assert breakdown.total == pytest.approx(step["s"], rel=1e-12)
    assert breakdown.exposed_communication == times["communication"]


def test_totals_start_anew_with_each_step(recorded):
    recorder, close = recorded
    for number in (1, 2):
        with recorder.step(number):
            with span("data" if number == 1 else "compute"):
                pass
        with span("data"):  # between steps: of no step
            pass
    records = close()
    assert [list(r["spans"]) for r in records if r["type"] == "step"] == [["data"], ["compute"]]


def test_an_exception_closes_every_span(recorded):
    recorder, close = recorded
    with pytest.raises(RuntimeError):
        with recorder.step(1):
            with span("compute"), span("communication"):
                raise RuntimeError("lost")
    with recorder.step(2):
        with span("data"):
            burn(0.001)
    first, second = (r for r in close() if r["type"] == "step")
    assert set(first["spans"]) == {"compute", "communication"}
    assert set(second["spans"]) == {"data"}
    assert recorder._stack == []


def test_an_exception_closes_a_period(recorded):
    recorder, close = recorded
    with pytest.raises(RuntimeError):
        with recorder.period("checkpoint", step=3):
            raise RuntimeError("full")
    assert close()[1]["name"] == "checkpoint"


def test_spans_of_another_thread_are_left_out(recorded):
    """They overlap the training thread, and must not disturb its stack either."""
    recorder, close = recorded
    inside, leave = threading.Event(), threading.Event()

    def write():
        with span("checkpoint"):
            inside.set()
            leave.wait(PATIENCE_S)

    writer = threading.Thread(target=write)
    with recorder.step(1):
        with span("compute"):
            writer.start()
            assert inside.wait(PATIENCE_S)
        with span("data"):
            leave.set()
            writer.join()
    assert set(close()[1]["spans"]) == {"compute", "data"}


def test_recorders_nest(tmp_path):
    with Spans(tmp_path / "a.jsonl") as outer:
        with outer.step(1):
            with Spans(tmp_path / "b.jsonl") as inner, inner.step(1), span("data"):
                pass
            with span("optimizer"):
                pass
        outer.close("finished")
        inner.close("finished")
    for name, expected in (("a", ["optimizer"]), ("b", ["data"])):
        steps = [r for r in read_json_lines(tmp_path / f"{name}.jsonl") if r["type"] == "step"]
        assert [list(r["spans"]) for r in steps] == [expected]
    with span("data"):
        pass


def test_a_recorder_without_a_file_still_times_steps():
    with Spans() as recorder:
        assert recorder.last_step_s == 0.0
        with recorder.step(1), span("data"):
            burn(0.001)
        recorder.flush()
        recorder.close("finished")
    assert recorder.last_step_s >= 0.001


def test_the_step_breakdown_is_the_mean_and_knows_its_names():
    records = [
        {"type": "attempt", "epoch_s": 0.0},
        {"type": "step", "step": 1, "start_s": 0.0, "s": 4.0, "spans": {"data": 1.0, "compute": 2.0, "odd": 0.5}},
        {"type": "step", "step": 2, "start_s": 4.0, "s": 2.0, "spans": {"communication": 1.0, "bubble": 0.5}},
    ]
    mean = step_breakdown(records)
    assert mean == StepBreakdown(
        data=0.5, compute=1.0, exposed_communication=0.5, bubble=0.25, optimizer=0.0, other=0.75
    )
    assert mean.total == 3.0
    assert step_breakdown([]) == StepBreakdown()
    assert set(spans.STEP_SPANS.values()) | {"other"} == {f.name for f in dataclasses.fields(StepBreakdown)}


times = st.floats(0.001, 50.0)


@given(st.dictionaries(st.sampled_from([*spans.STEP_SPANS, "odd", "checkpoint"]), times), st.floats(0, 10))
def test_fields_of_a_step_sum_to_its_wall_time(inside, rest_s):
    step_s = sum(inside.values()) + rest_s
    breakdown = StepBreakdown.from_spans(step_s, inside)
    assert breakdown.total == pytest.approx(step_s)
    assert min(dataclasses.astuple(breakdown)) >= 0


def test_steps_after_the_restored_one_are_lost():
    records = [
        {"type": "attempt", "epoch_s": 1000.0},
        {"type": "period", "name": "startup", "start_s": 0.0, "s": 2.0},
        *({"type": "step", "step": n, "start_s": 1.0 + n, "s": 1.0, "spans": {}} for n in range(1, 6)),
        {"type": "period", "name": "checkpoint", "start_s": 7.0, "s": 0.5, "step": 3},
        # killed; 10 s later
        {"type": "attempt", "epoch_s": 1017.5},
        {"type": "period", "name": "startup", "start_s": 0.0, "s": 3.0},
        {"type": "restore", "step": 3},
        *({"type": "step", "step": n, "start_s": n - 1.0, "s": 1.0, "spans": {}} for n in range(4, 8)),
        {"type": "period", "name": "evaluation", "start_s": 7.0, "s": 2.0},
        {"type": "period", "name": "logging", "start_s": 9.0, "s": 0.25},
        {"type": "end", "s": 9.5, "reason": "finished"},
    ]
    assert run_breakdown(records) == RunBreakdown(
        startup=5.0, steps=7.0, evaluation=2.0, checkpoint=0.5, lost=2.0, idle=10.5
    )


def test_steps_done_again_without_a_checkpoint_are_lost_too():
    step = {"type": "step", "s": 1.0, "spans": {}}
    records = [
        {"type": "attempt", "epoch_s": 0.0},
        {**step, "step": 1, "start_s": 0.0},
        {**step, "step": 2, "start_s": 1.0},
        {"type": "attempt", "epoch_s": 2.0},
        {**step, "step": 1, "start_s": 0.0},
        {"type": "end", "s": 1.0, "reason": "finished"},
    ]
    assert run_breakdown(records) == RunBreakdown(steps=1.0, lost=2.0)


def test_a_checkpoint_within_an_evaluation_is_counted_once():
    records = [
        {"type": "attempt", "epoch_s": 0.0},
        {"type": "period", "name": "checkpoint", "start_s": 1.0, "s": 2.0},
        {"type": "period", "name": "evaluation", "start_s": 0.0, "s": 5.0},
        {"type": "end", "s": 5.0, "reason": "finished"},
    ]
    assert run_breakdown(records) == RunBreakdown(evaluation=3.0, checkpoint=2.0)


def test_no_records_no_time():
    assert run_breakdown([]) == RunBreakdown()


@st.composite
def histories(draw):
    """Records of a few attempts as training writes them, and the wall time from first start to last record."""
    records, clock_s, reached, skew_s = [], 0.0, 0, 0.0
    for attempt in range(draw(st.integers(1, 4))):
        start_s = clock_s
        records.append({"type": "attempt", "attempt": attempt, "epoch_s": 1.7e9 + clock_s + skew_s})
        if reached and draw(st.booleans()):
            reached = draw(st.integers(0, reached))
            records.append({"type": "restore", "step": reached})
        else:
            reached = 0
        for _ in range(draw(st.integers(0, 6))):
            clock_s += draw(st.floats(0, 2))  # nobody knows what
            begin_s, length_s = clock_s - start_s, draw(times)
            name = draw(st.sampled_from(["step", "startup", "evaluation", "checkpoint", "logging", "nested"]))
            clock_s += length_s
            if name == "step":
                reached += 1
                records.append({"type": "step", "step": reached, "start_s": begin_s, "s": length_s, "spans": {}})
                continue
            if name == "nested":
                name = "evaluation"
                inner = {"type": "period", "name": "checkpoint", "start_s": begin_s + length_s / 4, "s": length_s / 2}
                records.append(inner)
            records.append({"type": "period", "name": name, "start_s": begin_s, "s": length_s})
        if draw(st.booleans()):
            records.append({"type": "end", "s": clock_s - start_s, "reason": "finished"})
        else:
            clock_s = max([start_s, *(start_s + r["start_s"] + r["s"] for r in records_of(records) if "s" in r)])
        clock_s += draw(st.floats(0, 100))  # until somebody starts it again
    return records


def records_of(records):
    """Records of the last attempt."""
    last = max(i for i, r in enumerate(records) if r["type"] == "attempt")
    return records[last + 1 :]


def wall_s(records):
    origin = records[0]["epoch_s"]
    base, end = 0.0, 0.0
    for record in records:
        if record["type"] == "attempt":
            base = record["epoch_s"] - origin
            end = max(end, base)
        elif record["type"] in ("step", "period"):
            end = max(end, base + record["start_s"] + record["s"])
        elif record["type"] == "end":
            end = max(end, base + record["s"])
    return end


@pytest.mark.slow
@given(histories())
def test_a_run_sums_to_its_wall_time_whatever_happened(records):
    breakdown = run_breakdown(records)
    assert min(dataclasses.astuple(breakdown)) >= 0
    assert breakdown.total == pytest.approx(wall_s(records), abs=1e-5)
    done = sum(r["s"] for r in records if r["type"] == "step")
    assert breakdown.steps + breakdown.lost == pytest.approx(done)


@given(histories(), st.integers(1, 10**6))
def test_a_clock_set_back_between_attempts_does_no_harm(records, back_s):
    starts = [i for i, r in enumerate(records) if r["type"] == "attempt"]
    last = records[starts[-1]]
    moved = [{**r, "epoch_s": r["epoch_s"] - back_s} if r is last and len(starts) > 1 else r for r in records]
    breakdown, honest = run_breakdown(moved), run_breakdown(records)
    assert breakdown.total <= honest.total + 1e-5
    assert dataclasses.replace(breakdown, idle=0) == dataclasses.replace(honest, idle=0)
    assert breakdown.idle >= 0


@given(histories(), st.data())
def test_a_history_cut_anywhere_still_sums(records, data):
    cut = records[: data.draw(st.integers(1, len(records)))]
    assert run_breakdown(cut).total == pytest.approx(wall_s(cut), abs=1e-5)
