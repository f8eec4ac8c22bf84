import contextlib
import errno
import gc
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.processes import PATIENCE_S, wait_until
from turbopump.core.errors import ProfileError, RunDirectoryError
from turbopump.data import bench, checkpoint_bench, fio, scratch
from turbopump.data.io_uring import Ring
from turbopump.data.ops import CheckpointRead, CheckpointWrite, RandomRead, SequentialRead, SequentialWrite
from turbopump.data.read_engines import ROUTES, Reads, page_aligned
from turbopump.hardware.profile import Request, Trial

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
RANDOM, SEQUENTIAL, CACHED = RandomRead(4096, 4), SequentialRead(131072), RandomRead(4096, 4, True)


def request(directory, **more):
    return Request(**{"directory": directory, "row_s": 0.004, **more})


def measured(trials, directory, seconds=600.0, **more):
    return list(bench.measure(trials, request(directory, **more), time.monotonic() + seconds))


def number_of_descriptors():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


def io_uring_works():
    try:
        with Ring(1):
            return True
    except OSError:
        return False


needs_io_uring = pytest.mark.skipif(not io_uring_works(), reason="io_uring is forbidden here")


@contextlib.contextmanager
def mounted(directory, options):
    """A small file system of its own; skips where mounting is not permitted."""
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "none", str(directory)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=True)


# --- what is tried ---------------------------------------------------------------------------------------------------


def test_trials_are_unique_the_telling_first_and_those_of_a_recipe_before_all(tmp_path):
    found = bench.trials(request(tmp_path))
    assert len({trial.key for trial in found}) == len(found) > 150
    assert [trial.tier for trial in found] == sorted(trial.tier for trial in found)
    telling = {type(trial.op) for trial in found if trial.tier == 0}
    assert telling == {SequentialRead, RandomRead, CheckpointWrite, CheckpointRead}
    grid = {(t.op.bytes, t.op.depth) for t in found if t.tier < 2 and isinstance(t.op, RandomRead) and not t.op.cached}
    assert grid == {(size, depth) for size in bench.SIZES for depth in bench.DEPTHS}
    mine = bench.trials(request(tmp_path, ops=(RandomRead(3000, 8),)))
    assert {trial.op for trial in mine[: len(ROUTES)]} == {RandomRead(3000, 8)} and len(mine) == len(found) + len(
        ROUTES
    )
    assert bench.trials(request(tmp_path, domains=("compute",))) == []


# --- real runs -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_route_gives_a_row_and_leaves_nothing(tmp_path):
    trials = [Trial(op, route) for op in (RANDOM, SEQUENTIAL) for route in ROUTES]
    trials += [Trial(CACHED, "pread", threads=4), Trial(CACHED, "mmap"), Trial(CACHED, "io_uring")]
    trials += [Trial(RandomRead(3000, 1), route) for route in ROUTES]  # no whole sectors
    before = number_of_descriptors()
    rows = measured(trials, tmp_path)
    assert [row.key for row in rows] == [trial.key for trial in trials]
    for row in rows:
        if row.works:
            assert (
                row.clock == ("thread_cpu" if row.op["cached"] and row.threads == 1 else "wall")
                and row.runs >= 2
                and row.calls >= 8
            )
            assert 0 < row.min_s <= row.median_s <= row.p90_s
            assert row.facts["iops"] == pytest.approx(1 / row.seconds) and row.facts["engine"] == row.route
            assert row.facts["file_bytes"] >= bench.LEAST_FILE_BYTES
            assert row.bytes_per_s < 1e12
        else:  # O_DIRECT or io_uring, where the system refuses them
            assert "refused here" in row.problem and ("O_DIRECT" in row.route or "io_uring" in row.route)
    assert all(row.facts["p99_s"] > 0 for row in rows if row.route == "pread" and not row.op["cached"])
    assert {row.route for row in rows if row.works} >= {"pread", "mmap", "readahead + preadv"}
    assert list(tmp_path.iterdir()) == [] and number_of_descriptors() <= before


def test_writes_and_checkpoints_are_measured_and_removed(tmp_path):
    ops = [SequentialWrite(131072), CheckpointWrite(MIB), CheckpointRead(MIB)]
    trials = [trial for op in ops for trial in bench._all_routes(op, 0)]
    rows = measured(trials, tmp_path)
    assert [row.key for row in rows] == [trial.key for trial in trials] and len(rows) == 5
    assert all(row.works for row in rows if "O_DIRECT" not in row.route)
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_comes_back_changed_is_a_problem(tmp_path, monkeypatch):
    def save(*arguments):
        path, digests = saved(*arguments)
        with open(path / "rank0.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)[0]
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last ^ 1]))
        return path, digests

    saved = checkpoint_bench._save
    monkeypatch.setattr(checkpoint_bench, "_save", save)
    rows = measured(bench._all_routes(CheckpointRead(MIB), 0), tmp_path)
    assert len(rows) == 2 and all("differ" in row.problem and row.median_s is None for row in rows)
    assert list(tmp_path.iterdir()) == []


def test_every_engine_reads_the_right_bytes(tmp_path):
    with scratch.ScratchFile(tmp_path) as file:
        file.fill(2 * MIB)
        content = np.frombuffer(os.pread(file.handle, 2 * MIB, 0), np.uint8)
        assert len(np.unique(content)) == 256  # random, no zeros
        offsets = np.array([5, 0, 9, 17]) * 4096
        for route, make in ROUTES.items():
            try:
                engine = make(file, Reads(4096, 4, sequential=False))
            except OSError as error:
                assert error.errno in (errno.EINVAL, errno.EPERM, errno.ENOSYS) and ("_" in route)
                continue
            try:
                engine.read(offsets)
                if route in ("mmap", "io_uring", "io_uring O_DIRECT"):  # of the others threads or one buffer take turns
                    for slot, offset in zip(engine.slots, offsets):
                        assert np.array_equal(slot, content[offset : offset + 4096])
                else:
                    engine.read(offsets[:1])
                    expected = content[offsets[0] : offsets[0] + 4096]
                    assert any(np.array_equal(slot, expected) for slot in engine.slots)
            finally:
                engine.close()


@needs_io_uring
def test_io_uring_fills_rows_in_order_and_then_those_that_become_free(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, MIB, dtype=np.uint8)
    path = tmp_path / "data"
    path.write_bytes(data.tobytes())
    slots = page_aligned(5, 512)
    with path.open("rb") as file, Ring(5) as ring:
        offsets = np.random.default_rng(1).permutation(MIB // 512)[:500] * 512
        ring.read(file.fileno(), offsets[:5], slots)
        assert all(np.array_equal(slots[i], data[o : o + 512]) for i, o in enumerate(offsets[:5]))
        ring.read(file.fileno(), offsets, slots)  # the rings go round many times
        assert all(any(np.array_equal(slot, data[o : o + 512]) for o in offsets) for slot in slots)
        with pytest.raises(OSError, match="ended after 256"):
            ring.read(file.fileno(), np.array([0, MIB - 256, 512]), slots)
        with pytest.raises(OSError) as failed:
            ring.read(-1, np.array([0]), slots)
        assert failed.value.errno == errno.EBADF
        ring.read(file.fileno(), offsets[:5], slots)  # none of the failures left a read in flight
        assert all(np.array_equal(slots[i], data[o : o + 512]) for i, o in enumerate(offsets[:5]))


def test_an_engine_that_is_forbidden_is_a_row_with_the_reason(tmp_path, monkeypatch):
    def forbidden(self, depth):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Ring, "__init__", forbidden)
    refused, works = measured([Trial(RANDOM, "io_uring O_DIRECT"), Trial(RANDOM, "pread")], tmp_path)
    assert works.works and not refused.works
    assert refused.problem == "io_uring O_DIRECT is refused here: Operation not permitted"


def test_a_file_system_without_o_direct_gives_rows_with_a_problem(tmp_path, monkeypatch):
    def open_again(self, flags):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(self, flags)

    opened = scratch.ScratchFile.open_again
    monkeypatch.setattr(scratch.ScratchFile, "open_again", open_again)
    rows = measured([Trial(RANDOM, "pread O_DIRECT"), Trial(SequentialWrite(131072), "write O_DIRECT + fsync"),
                     Trial(RANDOM, "pread")], tmp_path)  # fmt: skip
    assert [row.works for row in rows] == [False, False, True]
    assert all("O_DIRECT is refused here" in row.problem.replace(" + fsync", "") for row in rows[:2])


def test_time_that_is_up_leaves_trials_out(tmp_path):
    trials = [Trial(RANDOM, "pread")] * 3
    assert measured(trials, tmp_path, seconds=0.0) == []
    assert len(measured(trials, tmp_path, seconds=600)) == 3


@pytest.mark.slow
def test_an_abandoned_measurement_gives_everything_back(tmp_path):
    before = number_of_descriptors()
    rows = bench.measure([Trial(RANDOM, "pread"), Trial(CACHED, "mmap")], request(tmp_path), time.monotonic() + 600)
    next(rows)
    rows.close()
    assert number_of_descriptors() <= before and list(tmp_path.iterdir()) == []


# --- what is said to be uncertain ------------------------------------------------------------------------------------


def test_pages_that_do_not_leave_the_cache_are_said(tmp_path, monkeypatch):
    for share, text in ((0.5, "did not leave the page cache"), (None, "could not be seen")):
        monkeypatch.setattr(scratch.ScratchFile, "drop", lambda self, share=share: share)
        rows = measured([Trial(RANDOM, "pread"), Trial(RANDOM, "pread O_DIRECT")], tmp_path)
        said = [line for line in bench.uncertainties(rows) if text in line]
        assert len(said) == 1 and all(text in row.facts["uncertain"] for row in rows if row.works)
    assert bench.uncertainties([replace(rows[0], facts={})]) == ()


def test_a_file_can_be_dropped_and_warmed(tmp_path):
    with scratch.ScratchFile(tmp_path) as file:
        assert file.drop() == 0.0
        file.fill(8 * MIB)
        assert file.warm() == pytest.approx(1.0, abs=0.01)
        dropped = file.drop()
        if scratch.mounted(tmp_path.resolve())[0] != "tmpfs":
            assert dropped < 0.01
        assert file.warm() == pytest.approx(1.0, abs=0.01)


def test_a_directory_in_memory_is_named(tmp_path):
    with mounted(tmp_path, "size=128m"):
        rows = measured([Trial(RANDOM, "pread"), Trial(CACHED, "pread")], tmp_path)
        assert all(row.works for row in rows)
        assert any(f"{tmp_path} lies in memory (tmpfs)" in line for line in bench.uncertainties(rows))
        assert "uncertain" not in rows[1].facts  # a cached read is what it says


# --- full, refused, killed -------------------------------------------------------------------------------------------


def test_a_small_disk_is_named_with_what_is_needed_and_free(tmp_path):
    with mounted(tmp_path, "size=4m"):
        rows = measured([Trial(RANDOM, "pread"), Trial(CheckpointWrite(16 * MIB), "checkpoint writer")], tmp_path)
        assert not rows[0].works and str(tmp_path) in rows[0].problem
        assert "67.1 MB free" in rows[0].problem and "4.19 MB" in rows[0].problem
        assert str(tmp_path) in rows[1].problem and "67.1 MB" in rows[1].problem
        assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_gets_a_smaller_file_or_a_problem_and_its_space_back(tmp_path, monkeypatch):
    class Usage:
        free = 10 << 30  # as with a quota: more is said to be free than there is

    monkeypatch.setattr(bench.shutil, "disk_usage", lambda path: Usage)
    with mounted(tmp_path, "size=40m"):
        (row,) = measured([Trial(RANDOM, "pread")], tmp_path, row_s=0.05)
        assert row.works and bench.LEAST_FILE_BYTES <= row.facts["file_bytes"] <= 40 * MIB
        (tmp_path / "other").write_bytes(b"x" * (30 * MIB))
        rows = measured([Trial(RANDOM, "pread"), Trial(CACHED, "pread")], tmp_path)
        assert all("no space left on the device" in row.problem and str(tmp_path) in row.problem for row in rows)
        (write,) = measured([Trial(CheckpointWrite(16 * MIB), "checkpoint writer")], tmp_path)
        assert "no space left" in write.problem or "needed" in write.problem
        assert os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_bsize >= 9 * MIB
        assert [path.name for path in tmp_path.iterdir()] == ["other"]


LIMITED = """
import resource, sys, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
from turbopump.data import bench
from turbopump.data.ops import RandomRead, CheckpointWrite, SequentialWrite
from turbopump.hardware.profile import Request, Trial
trials = [Trial(RandomRead(4096, 4), "pread"), Trial(CheckpointWrite(4 << 20), "checkpoint writer"),
          Trial(SequentialWrite(1 << 19), "write + fsync")]
for row in bench.measure(trials, Request(directory=Path(sys.argv[1]), row_s=0.01), time.monotonic() + 600):
    print(row.problem)
"""


@pytest.mark.slow
def test_a_limit_on_file_sizes_is_a_problem_of_each_row(tmp_path):
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
                          env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)  # fmt: skip
    problems = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(problems) == 3 and all(str(tmp_path) in problem for problem in problems)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_used_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("")
    for directory, text in ((tmp_path / "none", "does not exist: make it"), (tmp_path / "file", "is not a directory")):
        with pytest.raises(RunDirectoryError, match=text) as refused:
            measured([Trial(RANDOM, "pread")], directory)
        assert str(directory) in str(refused.value)


def test_a_read_only_directory_is_a_typed_error(tmp_path):
    if os.getuid():
        tmp_path.chmod(0o500)
        with pytest.raises(RunDirectoryError, match="not writable"):
            measured([Trial(RANDOM, "pread")], tmp_path)
        tmp_path.chmod(0o700)
        return
    with mounted(tmp_path, "ro,size=1m"), pytest.raises(RunDirectoryError, match="not writable"):
        measured([Trial(RANDOM, "pread")], tmp_path)


ENDLESS = """
import sys, time
from pathlib import Path
from turbopump.data import bench, scratch
from turbopump.data.ops import CheckpointWrite, RandomRead
from turbopump.hardware.profile import Request, Trial
op, route, named = sys.argv[2:5]
if named == "named":  # a file system without O_TMPFILE
    scratch.os.O_TMPFILE = 0
op = RandomRead(4096, 4) if op == "read" else CheckpointWrite(4 << 20)
request = Request(directory=Path(sys.argv[1]), row_s=0.02)
for row in bench.measure([Trial(op, route)] * 10**6, request, time.monotonic() + 600):
    print(row.problem or "row", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("op,route,named", [("read", "pread", "nameless"), ("read", "pread", "named"),
                                            ("checkpoint", "checkpoint writer", "nameless")])  # fmt: skip
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_killed(tmp_path, op, route, named, stop):
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(tmp_path), op, route, named], cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        assert [process.stdout.readline() for _ in range(3)] == ["row\n"] * 3
    finally:
        process.send_signal(stop)
        process.wait(timeout=PATIENCE_S)
        process.stdout.close()
    # of a checkpoint the process that outlives its owner removes the directory
    wait_until(lambda: not list(tmp_path.iterdir()), "the end of all that was written")


def test_what_a_dead_probe_left_is_swept_and_what_a_living_one_holds_is_not(tmp_path):
    gone = subprocess.Popen(["true"])
    gone.wait()
    host = scratch._owner().partition("-")[0]
    dead, dead_directory = (
        tmp_path / f"{scratch.PREFIX}{host}-{gone.pid}-ab",
        tmp_path / f"{scratch.PREFIX}{host}-{gone.pid}-cd",
    )
    kept = [tmp_path / f"{scratch.PREFIX}{scratch._owner()}-ab", tmp_path / f"{scratch.PREFIX}00000000-{gone.pid}-ab",
            tmp_path / f"{scratch.PREFIX}strange", tmp_path / "mine"]  # fmt: skip
    dead_directory.mkdir()
    (dead_directory / "part").write_text("x")
    for path in (dead, *kept):
        path.write_text("x")
    measured([], tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


# --- fio -------------------------------------------------------------------------------------------------------------

SAMPLE = b"""note: both iodepth >= 1 and synchronous I/O engine are selected
{
  "fio version" : "fio-3.33",
  "jobs" : [{"jobname" : "probe", "error" : 0,
    "read" : {"io_bytes" : 3215360, "bw_bytes" : 63046274, "iops" : 15392.156863, "total_ios" : 785,
      "clat_ns" : {"min" : 52318, "mean" : 63351.749045,
        "percentile" : {"50.000000" : 58112, "99.000000" : 85504, "99.900000" : 2965504}}}}]
}
"""


def test_output_of_fio_is_read_and_what_is_wrong_with_it_said():
    seconds, p99_s = fio.parse(SAMPLE)
    assert seconds == pytest.approx(1 / 15392.156863) and p99_s == pytest.approx(85.504e-6)
    assert fio.parse(SAMPLE.replace(b"99.000000", b"98.000000"))[1] is None
    for broken, text in [(b"", "not as expected"), (b'{"jobs": []}', "not as expected"),
                         (SAMPLE.replace(b'"error" : 0', b'"error" : 22'), "error 22"),
                         (SAMPLE.replace(b"15392.156863", b"0.0"), "read nothing")]:  # fmt: skip
        with pytest.raises(ProfileError, match=text):
            fio.parse(broken)


def test_fio_is_a_route_where_it_is_installed_and_its_failure_a_problem(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "fio"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    if not fio.installed():
        assert all("fio" not in trial.route for trial in bench.trials(request(tmp_path)))
    sample = tmp_path / "sample.json"
    sample.write_bytes(SAMPLE)
    program.write_text(f'#!/bin/sh\n[ -e "${{2#--filename=}}" ] && cat {sample}\n')  # sees the nameless file
    program.chmod(0o755)
    found = [trial for trial in bench.trials(request(tmp_path)) if trial.route == fio.ROUTE]
    assert len(found) == 2 * len(bench.SIZES)
    (row,) = measured([found[1]], tmp_path)
    assert row.works and row.seconds == pytest.approx(1 / 15392.156863) and row.runs == 3
    program.write_text("#!/bin/sh\necho fio: engine io_uring not loadable >&2\nexit 1\n")
    (row,) = measured([found[1]], tmp_path)
    assert row.problem == "fio failed (1): fio: engine io_uring not loadable"
