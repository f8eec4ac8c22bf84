"""Parts, staging, and packs that are killed: what is finished stays, and no half is ever taken for whole."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from tests.processes import PATIENCE_S, group_gone
from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.format import open_dataset, verify_dataset
from turbopump.data.manifest import Field, read_manifest
from turbopump.data.part import PartWriter
from turbopump.data.ragged import ragged_of
from turbopump.data.writer import DatasetWriter, Staging
from turbopump.pack import pack

FIELDS = [Field("x", "int32", (3,)), Field("t", "uint8", (), "text")]


def all_bytes(path):
    return {name: (path / name).read_bytes() for name in sorted(os.listdir(path))}


def part_columns(number):
    mine = np.random.default_rng(number)
    rows = 20 + number
    texts = ["ü" * int(n) for n in mine.integers(0, 300, rows)]
    return [mine.integers(0, 99, (rows, 3)).astype(np.int32), ragged_of(texts)]


def write_part(staging, number):
    writer = PartWriter(staging.directory, number, FIELDS, shard_bytes=4096)
    columns = part_columns(number)
    writer.append("train", columns, source_bytes=number, document_sizes=[3, 900])
    if number % 2:
        writer.append("validation", [columns[0][:3], columns[1].rows(0, 3)])
    return writer.finish(skipped=number)


def commit(staging, parts):
    return staging.commit(parts, kind="arrays", fields=FIELDS, sources=["made"])


def test_rows_may_be_changed_once_they_are_appended(tmp_path):
    numbers, texts = part_columns(3)
    with DatasetWriter(tmp_path / "data", kind="arrays", fields=FIELDS, shard_bytes=4096) as writer:
        for _ in range(2):
            writer.append("train", [numbers, texts])
            numbers[:] += 1
        writer.finish()
    data = open_dataset(tmp_path / "data").data("train")
    assert np.array_equal(data.rows(0, np.arange(len(data))), np.concatenate([numbers - 2, numbers - 1]))


def test_parts_in_any_order_give_the_same_bytes(tmp_path):
    digests = set()
    for trial, order in enumerate([range(7), reversed(range(7)), [3, 0, 6, 1, 5, 2, 4]]):
        with Staging(tmp_path / str(trial)) as staging:
            entries = [write_part(staging, number) for number in order]
            random.Random(trial).shuffle(entries)
            digests.add(commit(staging, entries).digest)
        verify_dataset(tmp_path / str(trial))
    assert len(digests) == 1
    assert all_bytes(tmp_path / "0") == all_bytes(tmp_path / "1") == all_bytes(tmp_path / "2")
    data = open_dataset(tmp_path / "0").data("train")
    batch = data.batch(np.arange(len(data)))
    assert np.array_equal(batch[0], np.concatenate([part_columns(n)[0] for n in range(7)]))
    assert list(batch[1]) == [text for n in range(7) for text in part_columns(n)[1]]
    manifest = read_manifest(tmp_path / "0")
    assert manifest.skipped == 21 and manifest.splits["train"].document_sizes == {"4": 7, "1024": 7}
    assert manifest.splits["train"].source_bytes == 21 and manifest.splits["validation"].rows == 9


def test_parts_of_an_earlier_pack_are_kept_and_damaged_ones_are_not(tmp_path):
    with Staging(tmp_path / "whole") as staging:
        commit(staging, [write_part(staging, n) for n in range(6)])
    with Staging(tmp_path / "d", key="k") as staging:
        for n in range(5):
            write_part(staging, n)
        directory = staging.directory
    assert directory.is_dir() and not (tmp_path / "d").exists()
    (directory / "part-000001.sums").write_bytes(b"12345678")
    os.truncate(directory / "part-000002-000-train.arrow", 99)
    seal = bytearray((directory / "part-000003.json").read_bytes())
    seal[seal.index(b'"rows":') + 7] ^= 1
    (directory / "part-000003.json").write_bytes(seal)
    (directory / "part-000009-000-train.arrow").write_bytes(b"begun and never sealed")
    with Staging(tmp_path / "d", key="k") as staging:
        assert sorted(staging.parts) == [0, 4]
        parts = [staging.parts.get(n) or write_part(staging, n) for n in range(6)]
        commit(staging, parts)
    assert all_bytes(tmp_path / "d") == all_bytes(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["d", "whole"]


def test_another_key_or_none_starts_anew(tmp_path):
    for key in ("other", None):
        with Staging(tmp_path / "d", key="k") as staging:
            write_part(staging, 0)
        with Staging(tmp_path / "d", key=key) as staging:
            assert not staging.parts and not list(staging.directory.glob("part-*"))
        assert not os.listdir(tmp_path)  # and leaves nothing where nothing was finished


def test_a_damaged_key_starts_anew(tmp_path):
    for damage in (b"", b"[]", b'{"key": 3}', b"\xff"):
        with Staging(tmp_path / "d", key="k") as staging:
            write_part(staging, 0)
        (tmp_path / ".d.partial" / "key.json").write_bytes(damage)
        with Staging(tmp_path / "d", key="k") as staging:
            assert not staging.parts


def test_two_at_one_place(tmp_path):
    with Staging(tmp_path / "d", key="k") as staging:
        write_part(staging, 0)
        for key in ("k", None):
            with pytest.raises(UsageError, match=r"another process is packing to .*: wait for it"):
                Staging(tmp_path / "d", key=key)
        assert (staging.directory / "part-000000.json").exists()
        commit(staging, [write_part(staging, 0)])
    with pytest.raises(UsageError, match="already holds a dataset"):
        Staging(tmp_path / "d")
    assert os.listdir(tmp_path) == ["d"]


def test_a_split_may_be_called_like_a_part(tmp_path):
    with DatasetWriter(tmp_path / "d", kind="arrays", fields=FIELDS) as writer:
        for split in ("part-000000-000-train", "key", "manifest.json"):
            writer.append(split, part_columns(3))
        writer.finish()
    verify_dataset(tmp_path / "d")
    data = open_dataset(tmp_path / "d").data("part-000000-000-train")
    assert np.array_equal(data.rows(0, np.arange(len(data))), part_columns(3)[0])


def test_what_cannot_be_read_again_is_not_written(tmp_path):
    with DatasetWriter(tmp_path / "d", kind="arrays", fields=FIELDS) as writer:
        for split in ("", "a/b", "..", ".hidden", "nul\0"):
            with pytest.raises(UsageError, match="a split cannot be called"):
                writer.append(split, part_columns(3))
        with pytest.raises(UsageError, match=r"different numbers of rows: 23, 4"):
            writer.append("train", [part_columns(3)[0], part_columns(3)[1].rows(0, 4)])
        with pytest.raises(UsageError, match="'t' is of kind text, which a ndarray is not"):
            writer.append("train", [part_columns(3)[0]] * 2)
    for fields in ([], [FIELDS[0], Field("x", "int8")]):
        with pytest.raises(UsageError, match="fields must be one or more of different names"):
            DatasetWriter(tmp_path / "d", kind="arrays", fields=fields)
    assert not os.listdir(tmp_path)


def test_overwriting_exchanges_whole_datasets(tmp_path):
    first, second = part_columns(1), part_columns(2)

    def write(columns):
        with DatasetWriter(tmp_path / "d", kind="arrays", fields=FIELDS, overwrite=True) as writer:
            writer.append("train", columns)
            writer.finish()

    write(first)
    old = open_dataset(tmp_path / "d", "mapped").data("train")
    old.batch([0])
    write(second)
    rows = np.arange(len(old))
    assert np.array_equal(old.batch(rows)[0], first[0]) and list(old.batch(rows)[1]) == list(first[1])
    new = open_dataset(tmp_path / "d", "mapped").data("train")
    assert np.array_equal(new.batch(np.arange(len(new)))[0], second[0])
    assert os.listdir(tmp_path) == ["d"]


def test_a_failed_overwrite_leaves_the_old_dataset(tmp_path):
    with DatasetWriter(tmp_path / "d", kind="arrays", fields=FIELDS) as writer:
        writer.append("train", part_columns(1))
        writer.finish()
    before = all_bytes(tmp_path / "d")
    with pytest.raises(ZeroDivisionError):
        with DatasetWriter(tmp_path / "d", kind="arrays", fields=FIELDS, overwrite=True) as writer:
            writer.append("train", part_columns(2))
            raise ZeroDivisionError
    assert all_bytes(tmp_path / "d") == before and os.listdir(tmp_path) == ["d"]


# ---- packs that are killed -------------------------------------------------------------------------------------------

PACK = textwrap.dedent("""
    import sys, time
    import turbopump.pack as packing
    packing.PARTITION_BYTES = (30_000, 30_000)
    from turbopump.core.errors import TurbopumpError
    source, place, kind, report_s = sys.argv[1:5]
    options = {"tokenizer": "bpe", "vocab_size": 300} if kind == "bpe" else {}
    try:
        packing.pack(source, place, num_processes=2, validation=0.1, shard_bytes=8192,
                     progress=lambda _: time.sleep(float(report_s)), **options)
    except TurbopumpError as error:
        sys.exit(f"{type(error).__name__}: {error}")
""")


def start(source, place, kind="bytes", *, report_s=0.05):
    """A pack that pauses at every report, so that whoever wants to stop it in its midst comes in time."""
    return subprocess.Popen(
        [sys.executable, "-c", PACK, str(source), str(place), kind, str(report_s)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def pack_whole(source, place, kind="bytes"):
    process = start(source, place, kind, report_s=0)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, errors


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts") / "texts"
    root.mkdir()
    mine = np.random.default_rng(0)
    for number in range(48):
        words = mine.integers(0, 900, 2500)
        (root / f"{number:03d}.txt").write_text(" ".join(f"wört{w}" for w in words))
    return root


@pytest.fixture(scope="module")
def whole(texts, tmp_path_factory):
    place = tmp_path_factory.mktemp("whole") / "d"
    pack_whole(texts, place)
    return place


def sealed(staging):
    """Inode and time of every file of the parts that are sealed."""
    found = {}
    for seal in staging.glob("part-*.json"):
        for file in staging.glob(f"{seal.stem}*"):
            status = file.stat()
            found[file.name] = (status.st_ino, status.st_mtime_ns)
    return found


@pytest.mark.slow
def test_packs_killed_at_any_moment_go_on_to_the_same_bytes(texts, whole, tmp_path):
    place, expected = tmp_path / "d", all_bytes(whole)
    staging = tmp_path / ".d.partial"
    moments = random.Random(0)
    resumed = 0
    for trial in range(8):
        process = start(texts, place)
        wanted = moments.randrange(0, 18)  # sealed parts
        in_commit = trial >= 6
        while process.poll() is None and (
            not (staging / "train.sums").exists() if in_commit else len(list(staging.glob("part-*.json"))) < wanted
        ):
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.01))
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=PATIENCE_S)
        assert group_gone(process.pid), "processes of a killed pack live on"
        if not place.exists():
            before = {} if (staging / "manifest.json").exists() else sealed(staging)
            resumed += bool(before)
            pack_whole(texts, place)
            after = {(file.stat().st_ino, file.stat().st_mtime_ns) for file in place.iterdir()}
            kept = {state for name, state in before.items() if name.endswith(".arrow")}
            assert kept <= after, "a part was written again"
        assert all_bytes(place) == expected and os.listdir(tmp_path) == ["d"]
        for file in place.iterdir():
            file.unlink()
        place.rmdir()
    assert resumed >= 4


@pytest.mark.slow
def test_a_killed_worker_is_named_and_what_was_finished_stays(texts, whole, tmp_path):
    process = start(texts, tmp_path / "d")
    staging = tmp_path / ".d.partial"
    while process.poll() is None and len(list(staging.glob("part-*.json"))) < 4:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1 and "DatasetError: a packing process was killed" in errors
    assert len(sealed(staging)) >= 4
    pack_whole(texts, tmp_path / "d")
    assert all_bytes(tmp_path / "d") == all_bytes(whole)


WAITS_FOR_EVER = textwrap.dedent("""
    import multiprocessing, os, signal, sys, threading, time
    from pathlib import Path
    from turbopump.core.errors import DatasetError
    from turbopump.data.manifest import Field
    from turbopump.data.packing import run_tasks
    from turbopump.data.writer import Staging
    busy = Path(sys.argv[1]) / "busy"

    class Task:
        fields = (Field("x", "int64"),)
        def write(self, partition, writer, tick):
            busy.write_text(str(os.getpid()))
            time.sleep(10_000)

    def kill_the_idle_one():
        while not busy.exists() or not busy.read_text():
            time.sleep(0.01)
        idle, = (p for p in multiprocessing.active_children() if p.pid != int(busy.read_text()))
        os.kill(idle.pid, signal.SIGKILL)  # it waits for work, with the lock of the queue

    threading.Thread(target=kill_the_idle_one).start()
    with Staging(Path(sys.argv[1]) / "d", key="k") as staging:
        try:
            run_tasks(Task(), [0], staging, processes=2, shard_bytes=1 << 20, report=lambda done: None)
        except DatasetError as error:
            print(error)
""")


def test_workers_that_are_left_end_with_the_one_that_was_killed(tmp_path):
    command = [sys.executable, "-c", WAITS_FOR_EVER, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
    assert "a packing process was killed" in done.stdout


def stopped_at(count):
    """A progress function that ends a pack after some reports."""

    def progress(_):
        nonlocal count
        count -= 1
        if count < 0:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def small_partitions(monkeypatch):
    monkeypatch.setattr("turbopump.pack.PARTITION_BYTES", (30_000, 30_000))


def stop_after_some(texts, place, **options):
    with pytest.raises(KeyboardInterrupt):
        pack(texts, place, num_processes=1, progress=stopped_at(9), **options)
    kept = sealed(place.with_name(f".{place.name}.partial"))
    assert kept
    return kept


@pytest.mark.slow
def test_other_options_and_changed_sources_are_packed_anew(texts, tmp_path, small_partitions):
    place = tmp_path / "d"
    stop_after_some(texts, place, validation=0.1)
    pack(texts, place, num_processes=1, validation=0.2)
    pack(texts, tmp_path / "straight", num_processes=1, validation=0.2)
    assert all_bytes(place) == all_bytes(tmp_path / "straight")

    source = tmp_path / "source"
    source.mkdir()
    for file in sorted(texts.iterdir())[:30]:
        (source / file.name).write_bytes(file.read_bytes())
    stop_after_some(source, tmp_path / "e")
    changed = source / "000.txt"
    changed.write_bytes(changed.read_bytes().replace(b"w", b"W"))  # of the same size
    os.utime(changed, ns=(1, changed.stat().st_mtime_ns + 1))
    pack(source, tmp_path / "e", num_processes=1)
    pack(source, tmp_path / "f", num_processes=1)
    assert all_bytes(tmp_path / "e") == all_bytes(tmp_path / "f")


def test_changed_tables_are_packed_anew(tmp_path, small_partitions):
    source = tmp_path / "rows"
    source.mkdir()
    for number in range(12):
        lines = [f'{{"x": {i}, "t": "text {i} of {number}"}}\n' for i in range(1500)]
        (source / f"{number:02d}.jsonl").write_text("".join(lines))
    stop_after_some(source, tmp_path / "d")
    changed = source / "00.jsonl"
    changed.write_text(changed.read_text().replace("text", "TEXT"))
    os.utime(changed, ns=(1, changed.stat().st_mtime_ns + 1))
    pack(source, tmp_path / "d", num_processes=1)
    pack(source, tmp_path / "e", num_processes=1)
    assert all_bytes(tmp_path / "d") == all_bytes(tmp_path / "e")
    data = open_dataset(tmp_path / "d").data("train")
    assert str(data.ragged(1, [0])[0]).startswith("TEXT")


@pytest.mark.slow
def test_two_packs_at_one_place(texts, tmp_path):
    first = start(texts, tmp_path / "d")
    while first.poll() is None and not list(tmp_path.glob(".d.partial/part-*.json")):
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    second = start(texts, tmp_path / "d")
    _, errors = second.communicate(timeout=PATIENCE_S)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 1 and "UsageError: another process is packing to" in errors
    _, errors = first.communicate(timeout=PATIENCE_S)
    assert first.returncode == 0, errors
    verify_dataset(tmp_path / "d")


def test_packs_that_race_leave_one_whole_dataset(tmp_path):
    """Many that begin and end at once: each finishes or says why not; what stands there is always whole."""

    def race(number, results):
        for trial in range(12):
            try:
                with DatasetWriter(tmp_path / "d", kind="arrays", fields=FIELDS, overwrite=True) as writer:
                    writer.append("train", part_columns(number + trial))
                    writer.finish()
                results.put("written")
            except UsageError:
                results.put("refused")
            except BaseException as error:
                results.put(repr(error))

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=race, args=(number, results)) for number in range(3)]
    for process in processes:
        process.start()
    outcomes = [results.get(timeout=PATIENCE_S) for _ in range(36)]
    for process in processes:
        process.join()
    assert set(outcomes) <= {"written", "refused"} and "written" in outcomes
    verify_dataset(tmp_path / "d")
    assert os.listdir(tmp_path) == ["d"]


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_finished(texts, tmp_path):
    script = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n" + PACK.replace(
        "shard_bytes=8192", "shard_bytes=1 << 20"
    )
    command = [sys.executable, "-c", script, str(texts), str(tmp_path / "d"), "bytes", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 1 and f"DatasetError: cannot write {tmp_path / 'd'}" in done.stderr
    assert not (tmp_path / "d").exists() and not list(tmp_path.glob(".d.partial/part-*.json"))
    with pytest.raises(DatasetError):
        open_dataset(tmp_path / "d")
