"""The benchmark `data`: its targets, how rows are made of what was measured, and that its parts see what is wrong."""

import csv
import json
from contextlib import ExitStack
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import data, data_order, data_resume, data_versus, data_warm
from benchmarks.data_loaders import judged
from benchmarks.data_own import BATCH, all_of, check_all, packed, packed_tokens, rows_reader, windows_reader
from benchmarks.data_peer_records import expected_digest, write_raw
from benchmarks.data_resume import Schedule, Segment, differing_batches, random_schedule, samples_of, write_datasets
from benchmarks.harness import write_results
from benchmarks.plan import PUBLISHED
from turbopump.core.errors import DatasetError
from turbopump.data.ragged import ragged_of

TARGETS_FILE = PUBLISHED.parent / "targets.csv"


@pytest.mark.skipif(not TARGETS_FILE.is_file(), reason="targets.csv does not lie beside the project")
def test_the_targets_are_those_agreed_on():
    with TARGETS_FILE.open(newline="") as file:
        agreed = {row["id"]: row for row in csv.DictReader(file) if row["benchmark"] == "data"}
    assert agreed.keys() == data.TARGETS.keys()
    for name, row in agreed.items():
        target = data.TARGETS[name]
        assert (target.better, target.target, target.unit) == (row["better"], float(row["target"]), row["unit"])


# ---- rows of figures


def test_the_share_is_of_the_gather_with_the_least_median():
    times = {"ours": [4.0, 2.0, 2.0], "a, reused": [2.0, 1.0, 1.0], "a, fresh": [3.0, 1.5, 1.5]}
    share = data_warm.share_of(times, batches=10)
    assert share.best == "a, reused" and share.ratio.value == 0.5 and share.fresh == 0.75
    assert share.our_batch_s == 0.2 and share.best_batch_s == 0.1
    warm = data_warm.Warm(share, share, first_epoch=0.25, wide=None)
    row = data.warm_row("100B", warm)
    assert row.value == 0.5 and row.met is False and row.runs == 3 and row.peers["first epoch"] == 0.25
    assert "windows as int64" in data.warm_row("2KB", data_warm.Warm(share, share, 0.25, share)).peers


def test_building_blocks_do_not_count_and_the_best_library_does():
    times = {"ours": [1.0, 1.0], "LMDB": [3.0, 3.0], "HF datasets": [2.0, 2.0], "np.memmap": [0.5, 0.5]}
    found = data_versus.versus(times, blocks=["np.memmap"])
    assert (found.best, found.ratio.value) == ("HF datasets", 2.0)
    assert found.over == {"LMDB": 3.0, "HF datasets": 2.0, "np.memmap": 0.5}
    with pytest.raises(ValueError, match="no dataset library"):
        data_versus.versus({"ours": [1.0], "np.memmap": [1.0]}, blocks=["np.memmap"])


def test_the_best_of_ours_meets_the_best_of_theirs():
    rates = {"ours, 0 threads": [4, 4], "ours, 2 threads": [6, 8], "a": [2, 2], "b": [3, 3], "left behind": [1]}
    found = judged(rates, ["ours, 0 threads", "ours, 2 threads"], ["a", "b"])
    assert (found.ours, found.best) == ("ours, 2 threads", "b")
    assert found.ratio.value == pytest.approx((2 + 8 / 3) / 2) and found.rates["left behind"] == 1


def test_rounds_become_a_median_and_their_range():
    row = data.listed_row("data.remote_first_epoch", {"ratio": [0.7, 0.9, 0.8], "requests": [10, 30, 20], "rounds": 3})
    assert row.value == 0.8 and row.spread == (0.7, 0.9) and row.runs == 3 and row.met
    assert row.peers == {"requests": 20.0}


def test_rows_of_other_groups_stay(tmp_path):
    rows = [data.TARGETS[name].row(1.0, runs=1) for name in ("data.cold", "data.pack")]
    path = tmp_path / "data.json"
    earlier = [{**vars(row), "value": 2.0} for row in rows]
    path.write_text(json.dumps({"date": "then", "commit": "c", "rows": [*earlier, {"id": "data.gone"}]}))
    found = data.merged(rows[1:], path)
    assert [(row.id, row.value) for row in found] == [("data.cold", 2.0), ("data.pack", 1.0)]
    assert found[0].spread == (1.0, 1.0) and data.merged(rows, tmp_path / "absent") == rows
    assert [row.measured for row in found] == ["then at c", ""]
    later = write_results("data", found, directory=tmp_path)
    assert [row.get("measured") for row in json.loads(later.read_text())["rows"]] == ["then at c", None]
    assert data.merged(rows[1:], later)[0].measured == "then at c"  # however often it is kept


def test_a_group_that_fails_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    def broken(run):
        raise DatasetError("no such thing")
        yield

    def works(run):
        (run.scratch / "file").write_text("x")
        yield data.TARGETS["data.cold"].row(1.0, runs=1)

    monkeypatch.setattr(data, "GROUPS", {"broken": broken, "works": works})
    rows, failed = data.measure(True, ["broken", "works"], tmp_path)
    assert [row.id for row in rows] == ["data.cold"] and failed == ["broken: DatasetError: no such thing"]
    assert not list(tmp_path.iterdir())


def test_scratch_goes_when_interrupted(tmp_path, monkeypatch):
    def interrupted(run):
        with run.folder() as folder:
            write_raw(data.Path(folder) / "raw", 100, 10)
            raise KeyboardInterrupt
        yield

    monkeypatch.setattr(data, "GROUPS", {"interrupted": interrupted})
    with pytest.raises(KeyboardInterrupt):
        data.measure(True, ["interrupted"], tmp_path)
    assert not list(tmp_path.iterdir())


def fuzzed(number, seed):
    return {"error": number - seed, "right": 1}


def fuzzed_badly(number, seed):
    return {"error": number, "crash (exit -11) in mutation 3": 1}


@pytest.mark.parametrize(("how", "failed"), [
    (fuzzed, []), (fuzzed_badly, ["fuzz, seed 0: crash (exit -11) in mutation 3"]),
])  # fmt: skip
def test_a_crash_in_the_fuzz_fails_the_run(tmp_path, monkeypatch, capsys, how, failed):
    module = SimpleNamespace(fuzz=how, EXPECTED=("error", "right", "other"))
    monkeypatch.setattr(data.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(data, "in_process", lambda work, *given: work(*given))
    run = data.Run(True, tmp_path, tmp_path, ExitStack(), [])
    assert list(data.fuzz(run)) == [] and run.failed == failed
    assert f"{len(failed)} crashes" in capsys.readouterr().out


# ---- our side


@pytest.mark.parametrize("variable", [False, True])
def test_ours_reads_what_the_peers_are_given(tmp_path, variable):
    raw = write_raw(tmp_path / "raw", 100, 2000, variable=variable)
    opened = packed(raw, tmp_path / "own")
    check_all(opened)
    ids = np.random.default_rng(0).integers(0, raw.count, BATCH)
    found = rows_reader(opened)(ids)
    assert [bytes(found[place]) for place in range(BATCH)] == [raw.record(number) for number in ids]
    assert expected_digest(raw, 1, 2, 4)  # of the same records


@pytest.mark.parametrize("wide", [False, True])
def test_windows_are_those_of_the_file(tmp_path, wide):
    raw = write_raw(tmp_path / "raw", 2048, 300)
    opened = packed_tokens(raw, tmp_path / "own")
    read = windows_reader(opened, 1024, wide=wide)
    starts = np.random.default_rng(0).integers(0, 299 * 1024, BATCH)
    expected = raw.values.view(np.uint16)[starts[:, None] + np.arange(1024)]
    found = read(starts)
    assert found.dtype == (np.int64 if wide else np.uint16) and (found == expected).all()
    given = []
    all_of(given.append, np.stack([starts, starts]))()
    assert len(given) == 2


# ---- schedules


def test_schedules_can_be_run_and_differ():
    rng = np.random.default_rng(0)
    schedules = [random_schedule(rng) for _ in range(200)]
    assert {schedule.kind for schedule in schedules} == set(data_resume.ORDERS)
    assert {segment.ranks for schedule in schedules for segment in schedule.segments} == set(range(1, 8))
    for schedule in schedules:
        assert schedule.order in data_resume.ORDERS[schedule.kind]
        for segment, following in zip(schedule.segments, schedule.segments[1:]):
            assert segment.end == following.begin
        for segment in schedule.segments:
            share, rest = divmod(schedule.global_batch, segment.ranks)
            assert (
                rest == 0
                and segment.end > segment.begin
                and (not segment.microbatch or share % segment.microbatch == 0)
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "order"),
    [("ragged", "bucketed"), ("tokens", "shuffle"), ("mixture", "blocks"), ("ragged mixture", "bucketed")],
)
def test_a_schedule_agrees_with_an_uninterrupted_reader(tmp_path, kind, order):
    write_datasets(tmp_path)
    segments = (Segment(0, 2, 3, 2, "threads", 1), Segment(2, 4, 1, 0, "auto", 0), Segment(4, 5, 2, 3, "auto", 0))
    assert differing_batches(Schedule(kind, order, 1, 12, segments), tmp_path) == (0, 5)


def test_what_each_order_costs_is_printed(monkeypatch, capsys):
    made = [(name, make) for name, make in data_order.orders() if "64" in name or "bucketed" in name]
    monkeypatch.setattr(data_order, "orders", lambda: iter(made))
    monkeypatch.setattr(data_order, "INDICES", 1)
    data_order.print_order_ns(quick=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 + len(made) and all(name in line for (name, _), line in zip(made, lines[1:]))


def test_a_batch_that_differs_is_counted(tmp_path, monkeypatch):
    write_datasets(tmp_path)
    loader = data_resume.Loader
    monkeypatch.setattr(
        data_resume, "Loader", lambda source, **given: loader(source, **{**given, "seed": given["world_size"]})
    )
    segments = (Segment(0, 2, 1, 0, "auto", 0), Segment(2, 4, 2, 0, "auto", 0))
    assert differing_batches(Schedule("rows", "shuffle", 1, 8, segments), tmp_path) == (2, 4)


def test_samples_are_compared_with_their_dtypes_and_lengths():
    import torch

    one = samples_of((torch.tensor([1, 2]), ragged_of([np.array([1, 2]), np.array([3])])))
    other = samples_of((torch.tensor([1, 2]), ragged_of([np.array([1]), np.array([2, 3])])))
    assert len(one) == 2 and one != other
    assert samples_of(torch.tensor([1], dtype=torch.int32)) != samples_of(torch.tensor([1], dtype=torch.int64))
    with pytest.raises(TypeError, match="list"):
        samples_of(([1, 2],))
