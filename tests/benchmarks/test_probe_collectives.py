"""The benchmark of predicted collectives, on rows that are made up and on the published tables."""

import pytest

from benchmarks import probe_collectives as probe
from turbopump.comms.ops import AllReduce
from turbopump.core.errors import TurbopumpError


def rows(noise: float = 0.0):
    return [
        probe._published(AllReduce(size, 2), (1e-4 + size / 1e9) * (1 + noise * (-1) ** number))
        for number, size in enumerate(probe.SIZES)
    ]


@pytest.mark.slow
def test_every_second_size_is_predicted_from_the_others(monkeypatch):
    monkeypatch.setattr(probe, "measure_here", lambda sizes, rounds: [[row] for row in rows()])
    errors = probe.errors_here(quick=False)
    assert set(errors) == {"ours", "line_in_logarithms", "one_alpha_beta", "of_medians"}
    assert len(errors["ours"]) == len(probe.SIZES) // 2 - (len(probe.SIZES) % 2 == 0)
    assert max(errors["ours"]) < 1e-3
    monkeypatch.setattr(probe, "measure_here", lambda sizes, rounds: [[row] for row in rows(noise=0.1)])
    assert max(probe.errors_here(quick=False)["ours"]) > 0.1  # the figure can be bad


def test_a_size_that_is_asked_is_never_among_those_given(monkeypatch):
    seen = []
    monkeypatch.setattr(probe, "_in_logarithms", lambda given, op: seen.append((given, op)) or 1.0)
    probe.errors_published({"here": rows()[:6]})
    assert len(seen) == 6
    for given, op in seen:
        assert len(given) == 5
        assert op.bytes not in {row.op["bytes"] for row in given}


def test_quiet_rounds_are_chosen_by_what_others_did_not_by_the_result():
    fast, slow = (probe._published(AllReduce(8, 2), seconds) for seconds in (1.0, 2.0))
    found = probe._of_quiet([probe.replace(fast, waited=0.5), probe.replace(slow, waited=0.1)])
    assert found.seconds == 2.0


def test_a_machine_without_the_collective_is_no_figure(monkeypatch):
    failed = probe.Measurement.failed(probe.Trial(AllReduce(8, 2), "gloo"), "comms", "gone")
    monkeypatch.setattr(probe, "measure", lambda *_: iter([failed]))
    with pytest.raises(TurbopumpError, match="gone"):
        probe.measure_here([8], 1)


@pytest.mark.skipif(not probe.PUBLISHED.is_dir(), reason="the published tables are not beside this checkout")
def test_published_tables_are_read_and_predicted_better_than_by_one_line():
    devices = probe.read_intranode(probe.PUBLISHED)
    assert set(devices) == {"a100", "v100"}
    assert len(probe.read_deepbench(probe.PUBLISHED)) == 5
    row = probe._row(probe.INTRANODE, probe.errors_published({"a100": devices["a100"][:14]}))
    assert row.value < row.peers["one_alpha_beta"]
    assert row.spread[0] <= row.value <= row.spread[1]
