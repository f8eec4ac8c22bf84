"""Damaged datasets, some hundred of them here; the benchmark `data_fuzz` does a hundred thousand."""

import os
import signal
import time
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import data_fuzz
from benchmarks.data_fuzz import EXPECTED, Bench, fuzz


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("fuzz") / "bench")


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 2**31))
def test_damage_is_a_typed_error_or_does_not_matter(bench, seed, number):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # numbers that overflow are a failure, too
        outcome = bench.mutate_and_examine(seed, number)
    assert outcome in EXPECTED, f"seed {seed}: {outcome}"


@pytest.mark.slow
def test_processes_do_their_share_and_every_outcome_is_met():
    counts = fuzz(300, seed=5)
    assert sum(counts.values()) == 300 and set(counts) == set(EXPECTED), counts
    assert counts["error"] > 100


@pytest.mark.slow
@pytest.mark.parametrize("end", ["crash", "hang", "untyped", "blind"])
def test_a_failure_is_counted_and_the_rest_is_done(monkeypatch, end):
    """The benchmark can fail: a reader that dies, stops, raises something else, or does not check."""
    examine = Bench._examine
    ends = {
        "crash": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hang": lambda: time.sleep(60),
        "untyped": lambda: 1 / 0,
    }

    def broken(self, *given):
        if end == "blind":
            monkeypatch.setattr(data_fuzz, "verify_dataset", lambda path: 1)
        elif self.broken == 0:
            ends[end]()
        self.broken -= 1
        return examine(self, *given)

    monkeypatch.setattr(Bench, "_examine", broken)
    monkeypatch.setattr(Bench, "broken", 3, raising=False)
    monkeypatch.setattr(data_fuzz, "HANG_S", 1.0)
    counts = fuzz(12 if end != "blind" else 60, processes=1)
    failures = {outcome: count for outcome, count in counts.items() if outcome not in EXPECTED}
    assert sum(counts.values()) == (12 if end != "blind" else 60)
    named = {
        "crash": "crash (exit -9) in mutation",
        "hang": "hang in mutation",
        "untyped": "untyped ZeroDivisionError at",
        "blind": "damage that verify did not see",
    }[end]
    assert failures and all(outcome.startswith(named) for outcome in failures)
