"""Pipelines: the list of events, and the closed form beside it."""

from itertools import pairwise

import numpy as np
import pytest

from turbopump.core.errors import UsageError
from turbopump.planner.pipeline import pipelined_s, simulate


def one(value):
    return np.array([float(value)])


def closed(first, middle, last, stages, microbatches, chunks=1):
    return pipelined_s(
        one(first), one(middle), one(last), stages=one(stages), microbatches=one(microbatches), chunks=one(chunks)
    )[0]


@pytest.mark.parametrize("stages", [2, 4, 8])
@pytest.mark.parametrize("per_stage", [1, 2, 4])
@pytest.mark.parametrize("send", [0.0, 0.02, 0.1])
@pytest.mark.parametrize("head", [0.0, 0.3, 1.0])
def test_closed_form_agrees_with_the_events_of_uneven_stages(stages, per_stage, send, head):
    forward, backward = [1.0] * stages, [2.0] * stages
    forward[0] += 0.05
    forward[-1] += head / 3
    backward[-1] += 2 * head / 3
    microbatches = stages * per_stage
    exact = simulate(forward, backward, num_stages=stages, num_microbatches=microbatches, send_s=send).end_s
    guess = closed(3.05 + send, 3 + 2 * send, 3 + head + send, stages, microbatches)
    assert guess == pytest.approx(exact, rel=0.02)


@pytest.mark.parametrize(
    ("stages", "chunks", "microbatches"), [(2, 2, 4), (4, 2, 8), (4, 3, 16), (4, 4, 4), (8, 2, 32)]
)
def test_interleaving_divides_the_bubble_by_the_chunks(stages, chunks, microbatches):
    count = stages * chunks
    exact = simulate([1 / chunks] * count, [2 / chunks] * count, num_stages=stages, num_microbatches=microbatches)
    assert exact.end_s == pytest.approx(3 * microbatches + 3 * (stages - 1) / chunks)
    assert closed(3, 3, 3, stages, microbatches, chunks) == pytest.approx(exact.end_s)


def test_events_never_overlap_on_a_stage_and_inputs_come_first():
    line = simulate([1.0, 1.5, 1.0, 1.0], [2.0, 2.0, 3.0, 2.0], num_stages=4, num_microbatches=6, send_s=0.1)
    ends = {(e.chunk, e.microbatch, e.backward): e.end_s for e in line.events}
    assert len(ends) == 4 * 6 * 2
    for stage in range(4):
        own = sorted((e for e in line.events if e.stage == stage), key=lambda e: e.start_s)
        assert all(a.end_s <= b.start_s + 1e-12 for a, b in pairwise(own))
    for event in line.events:
        before = (event.chunk + 1, True) if event.backward else (event.chunk - 1, False)
        if (before[0], event.microbatch, before[1]) in ends:
            assert ends[before[0], event.microbatch, before[1]] <= event.start_s + 1e-12
    assert all(0 <= idle < line.end_s for idle in line.idle_s)


def test_a_stage_holds_no_more_microbatches_than_stages_follow_it():
    line = simulate([1.0] * 4, [2.0] * 4, num_stages=4, num_microbatches=12)
    for stage in range(4):
        held = most = 0
        for event in sorted((e for e in line.events if e.stage == stage), key=lambda e: e.start_s):
            held += -1 if event.backward else 1
            most = max(most, held)
        assert most == 4 - stage


def test_one_stage_is_never_idle():
    line = simulate([1.0], [2.0], num_stages=1, num_microbatches=5, send_s=1.0)
    assert line.end_s == 15.0 and line.idle_s == (0.0,)
    assert closed(9, 9, 3, 1, 5) == 15.0


@pytest.mark.parametrize(
    ("chunks", "stages", "microbatches", "said"),
    [(3, 2, 4, "multiple of the stages"), (4, 2, 3, "divisible"), (2, 2, 0, "at least one")],
)
def test_sizes_that_do_not_fit_are_said(chunks, stages, microbatches, said):
    with pytest.raises(UsageError, match=said):
        simulate([1.0] * chunks, [1.0] * chunks, num_stages=stages, num_microbatches=microbatches)
