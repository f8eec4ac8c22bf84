import os
import subprocess
import sys

import pytest

from turbopump.core.errors import RunDirectoryError, UsageError
from turbopump.core.files import JsonLines
from turbopump.core.rundir import RunDir, open_run

HOLD = """
import sys, time
from pathlib import Path
from turbopump.core.rundir import RunDir
held = RunDir(Path(sys.argv[1])).lock()
print("held", flush=True)
time.sleep(1000)
"""


def test_nothing_is_made_until_create(tmp_path):
    run = RunDir(tmp_path / "runs" / "a")
    names = [run.config, run.plan, run.choices, run.env, run.metrics, run.checkpoints, run.logs, run.samples,
             run.report_html, run.report_json, run.spans(0), run.spans(3)]  # fmt: skip
    assert len(set(names)) == len(names)
    assert all(run.path in name.parents for name in names)
    assert not (tmp_path / "runs").exists()
    run.create()
    run.create()
    assert list(run.path.iterdir()) == []


def test_a_run_exists_when_its_config_does(tmp_path):
    run = RunDir(tmp_path / "a")
    run.create()
    assert not run.exists
    with pytest.raises(UsageError, match="is not a run directory"):
        open_run(run.path)
    run.config.write_text("")
    assert open_run(str(run.path)) == run
    run.remove()
    assert not run.path.exists()


def test_a_file_in_the_way_is_explained(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(RunDirectoryError, match="a file stands where a directory is needed"):
        RunDir(tmp_path / "a" / "b").create()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_place_is_explained(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="is not writable"):
        RunDir(tmp_path / "b").create()


def test_attempts_are_counted_and_ranks_sorted_by_number(tmp_path):
    run = RunDir(tmp_path)
    assert run.num_attempts() == 0
    for _ in range(2):
        lines = JsonLines(run.spans(0))
        lines.write({"type": "attempt"})
        lines.write({"type": "step"})
        lines.close()
    assert run.num_attempts() == 2
    for rank in (10, 2, 1):
        run.spans(rank).write_text("")
    (tmp_path / "spans" / "ranks.jsonl").write_text("")
    assert [p.stem for p in run.all_spans()] == ["rank0", "rank1", "rank2", "rank10"]


def test_the_lock_is_for_one_process_and_names_its_owner(tmp_path):
    run = RunDir(tmp_path)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match=f"is in use by process {holder.pid} on .*: wait for it"):
            run.lock()
    finally:
        holder.kill()
        holder.communicate()
    held = run.lock()  # the kernel freed it, although the process was killed
    with pytest.raises(RunDirectoryError, match=f"process {os.getpid()} "):
        run.lock()
    held.close()
    run.lock().close()


def test_the_lock_of_a_directory_that_is_not_there_is_a_typed_error(tmp_path):
    with pytest.raises(RunDirectoryError, match="cannot write"):
        RunDir(tmp_path / "none").lock()
