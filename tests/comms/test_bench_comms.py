"""Measuring collectives between real processes of this host: rows, failures said in rows, nothing left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from tests.processes import all_gone, is_alive, wait_until
from turbopump.comms import bench, bench_ranks
from turbopump.comms.bench import measure, trials
from turbopump.comms.bench_ranks import Ranks, mpi_problem
from turbopump.comms.bench_worker import calls_before_overflow
from turbopump.comms.ops import AllGather, AllReduce, AllToAll, Barrier, Broadcast, Overlap, ReduceScatter, Send
from turbopump.core.errors import RankError
from turbopump.core.workload import Op
from turbopump.hardware.profile import Request, Trial

QUICK = Request(max_ranks=2, row_s=0.02)


def soon(seconds: float = 600.0) -> float:
    return time.monotonic() + seconds


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """Every group of ranks that is started, and their directory, which must be empty afterwards."""
    started: list[Ranks] = []
    place = Path(tempfile.mkdtemp(prefix="tp", dir=os.path.realpath("/tmp")))  # short: a socket's path has 107 bytes
    monkeypatch.setattr(bench_ranks.tempfile, "tempdir", str(place))

    class Seen(Ranks):
        def __init__(self, *args, **more):
            started.append(self)
            super().__init__(*args, **more)

    monkeypatch.setattr(bench, "Ranks", Seen)
    yield started
    assert all_gone([pid for ranks in started for pid in ranks.pids.values()])
    assert not list(place.iterdir())
    place.rmdir()


def gloo(*ops: Op) -> list[Trial]:
    return [Trial(op, "gloo") for op in ops]


@pytest.mark.slow
def test_every_operation_is_measured_between_two_ranks_or_says_why_not(groups):
    ops = (AllReduce(1 << 16, 2), AllGather(4096, 2), ReduceScatter(4096, 2), AllToAll(4096, 2), Broadcast(4096, 2),
           Send(8), Barrier(ranks=2), AllReduce(4096, 2, dtype="bf16"))  # fmt: skip
    overlap, refused = Overlap(64, 1 << 20, 2), AllReduce(64, 2, dtype="fp8")
    *rows, host, no, again = measure(gloo(*ops, overlap, refused, ops[0]), QUICK, soon())
    assert [row.op_key for row in rows] == [op.key for op in ops]
    for row in rows:
        assert row.works, row.problem
        assert row.domain == "comms"
        assert row.clock == "wall"
        assert 0 < row.min_s <= row.median_s <= row.p90_s
        assert row.library.startswith("gloo in torch")
        assert row.facts["interface"] == "lo"
    assert rows[0].bytes == 1 << 16
    assert rows[0].facts["algorithm"] == "ring"
    assert host.works, host.problem
    assert host.domain == "host"
    for name in ("slowdown_compute", "slowdown_comm", "comm_alone_s", "product_alone_s"):
        assert host.facts[name] > 0
    assert "fp8 is not measured" in no.problem
    assert again.works
    assert len(groups) == 1  # the ranks stayed, also after they had to say no


@pytest.mark.slow
def test_a_killed_rank_is_a_row_and_the_next_row_has_new_ranks(groups):
    long = Request(max_ranks=2, row_s=30.0)

    def kill_one():
        wait_until(lambda: groups and len(groups[0].pids) == 2, "the start of two ranks")
        time.sleep(0.2)  # at some moment of its start or its work
        os.kill(groups[0].pids[1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    rows = measure(gloo(AllReduce(1 << 20, 2)), long, soon())
    row = next(rows)
    killer.join()
    rows.close()
    assert not row.works
    assert "rank 1 was killed by SIGKILL" in row.problem or "onnection" in row.problem
    (row,) = measure(gloo(AllReduce(64, 2)), QUICK, soon())
    assert row.works


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended_at_the_time_limit(groups):
    with pytest.raises(RankError, match="no answer within"), bench.Ranks("gloo", 2, 1) as ranks:
        os.kill(ranks.pids[0], signal.SIGSTOP)
        ranks.ask({"do": "measure", "kind": "Barrier", "op": {"ranks": 2}, "budget_s": 0.01}, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError, GeneratorExit])
def test_no_rank_outlives_an_interrupted_measurement(groups, how):
    rows = measure(gloo(AllReduce(64, 2), AllReduce(128, 2)), QUICK, soon())
    assert next(rows).works
    pids = list(groups[0].pids.values())
    assert all(map(is_alive, pids))
    if how is GeneratorExit:
        rows.close()
    else:
        with pytest.raises(how):
            rows.throw(how("stop"))
    assert all_gone(pids)


@pytest.mark.slow
def test_ranks_end_when_the_parent_is_killed(tmp_path):
    code = (
        "import sys, time\n"
        "from turbopump.comms.bench_ranks import Ranks\n"
        "ranks = Ranks('gloo', 2, 1)\n"
        "print(*ranks.pids.values(), ranks._directory, flush=True)\n"
        "time.sleep(1000)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
                              env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})  # fmt: skip
    with parent:
        *pids, directory = parent.stdout.readline().split()
        try:
            assert all(is_alive(int(pid)) for pid in pids)
            parent.kill()
            assert all_gone([int(pid) for pid in pids])
        finally:
            subprocess.run(["rm", "-r", "--", directory], check=False)


def test_ranks_that_cannot_start_are_said_twice_and_then_no_more(groups, monkeypatch):
    monkeypatch.setattr(bench_ranks.sys, "executable", "/bin/false")
    rows = list(measure(gloo(*(AllReduce(size, 2) for size in (8, 16, 32))), QUICK, soon()))
    assert "exit code 1" in rows[0].problem
    assert "not tried again after 2 failures" in rows[2].problem
    assert len(groups) == 2


def test_no_row_is_begun_that_cannot_end_in_time(groups):
    assert list(measure(gloo(AllReduce(64, 2)), QUICK, soon(0.5))) == []
    assert not groups


def test_what_is_absent_is_said_once_and_never_started(groups, monkeypatch):
    monkeypatch.setattr(bench_ranks, "find_spec", lambda name: None)
    absent = [trial for trial in trials(QUICK) if trial.route != "gloo"]
    assert sorted(trial.route for trial in absent) == ["mpi", "nccl"]
    rows = list(measure(absent, QUICK, soon()))
    assert "pip install 'turbopump[mpi]'" in next(row.problem for row in rows if row.route == "mpi")
    assert all(row.problem for row in rows)
    assert not groups


def test_a_spinning_mpi_never_has_more_ranks_than_cores(monkeypatch):
    monkeypatch.setattr(bench_ranks, "find_spec", lambda name: object())
    monkeypatch.setattr(bench_ranks, "mpiexec", lambda: "/bin/true")
    monkeypatch.setattr(bench_ranks.os, "geteuid", lambda: 1000)
    assert mpi_problem(2, 2) == ""
    assert "4 ranks on 2 cores" in mpi_problem(4, 2)


def test_open_mpi_is_not_made_to_start_as_root(monkeypatch, tmp_path):
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text("#!/bin/sh\necho 'mpiexec (Open MPI) 5.0.11'\n")
    mpiexec.chmod(0o755)
    monkeypatch.setattr(bench_ranks, "find_spec", lambda name: object())
    monkeypatch.setattr(bench_ranks, "mpiexec", lambda: str(mpiexec))
    monkeypatch.setattr(bench_ranks.os, "geteuid", lambda: 0)
    for name in bench_ranks.OPEN_MPI_ROOT:
        monkeypatch.delenv(name, raising=False)
    assert "OMPI_ALLOW_RUN_AS_ROOT" in mpi_problem(2, 2)
    for name in bench_ranks.OPEN_MPI_ROOT:
        monkeypatch.setenv(name, "1")
    assert mpi_problem(2, 2) == ""


def test_trials_begin_with_the_most_telling_and_keep_to_what_was_asked():
    found = trials(Request(max_ranks=4))
    assert [trial.tier for trial in found] == sorted(trial.tier for trial in found)
    assert len({trial.key for trial in found}) == len(found)
    assert {trial.op.ranks for trial in found if trial.route == "gloo"} == {2, 4}
    assert {type(trial.op).__name__ for trial in found if trial.tier == 0} == {"Send", "Barrier", "AllReduce"}
    assert sum(isinstance(trial.op, Overlap) for trial in found) == 1
    assert trials(Request(max_ranks=1)) == []
    assert trials(Request(domains=("compute",))) == []
    assert all(isinstance(trial.op, Overlap) for trial in trials(Request(domains=("host",))))


def test_the_operations_of_a_recipe_come_first_and_what_this_host_cannot_have_says_so(groups):
    request = Request(max_ranks=2, row_s=0.02, ops=(AllReduce(12344, 2), AllReduce(8, 64, "rack")))
    first = [trial for trial in trials(request) if trial.op in request.ops]
    assert trials(request)[0].op == AllReduce(12344, 2)
    problems = {row.op["ranks"]: row.problem for row in measure(first[-1:], request, soon())}
    assert "up to 2 processes" in problems[64]


def test_sums_in_place_do_not_overflow():
    for dtype, limit in (("fp32", 3e38), ("bf16", 3e38), ("fp16", 6e4)):
        for ranks in (2, 8, 64):
            calls = calls_before_overflow(AllReduce(8, ranks, dtype=dtype))
            assert calls >= 1
            assert 1.5 * (1e-4 if dtype == "fp16" else 1e-15) * ranks**calls < limit


def test_others_are_charged_only_for_cores_that_the_ranks_need(monkeypatch):
    monkeypatch.setattr(bench_ranks.os, "sched_getaffinity", lambda _: range(4))
    clock, busy = [0.0], [100.0]
    monkeypatch.setattr(bench_ranks.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(bench_ranks, "_busy_s", lambda: busy[0])
    host = bench_ranks.HostBusy()
    clock[0], busy[0] = 10.0, 100.0 + 15.0 + 25.0  # ours and, on 2.5 of 4 cores, theirs
    assert host.waited(2, own_cpu_s=15.0) == pytest.approx(0.25)
    assert host.waited(1, own_cpu_s=15.0) == 0
    assert host.waited(2, own_cpu_s=40.0) == 0


def test_the_kernel_tells_how_long_cores_were_busy():
    assert bench_ranks._busy_s() > 0
    assert bench_ranks.loopback() in [name for _, name in bench_ranks.socket.if_nameindex()]
