"""Checkpoints that cannot lie: killed writers, rotten bits, full disks, failing calls of the operating system."""

from __future__ import annotations

import errno
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from turbopump.core.checkpoint_store import latest, list_checkpoints, open_checkpoint, step_name, verify_checkpoint
from turbopump.core.config import CheckpointConfig
from turbopump.core.errors import CheckpointError, CorruptCheckpointError
from turbopump.training.checkpoint import Checkpoints, read_checkpoint

ROOT = Path(__file__).resolve().parents[2]


class State:
    """Every element of every tensor is the step."""

    def __init__(self, step: int = 0, numel: int = 1000) -> None:
        self.step, self.numel = step, numel
        self.tensors = {f"model.{i}": torch.full((numel,), float(step)) for i in range(3)}

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def checkpoint_values(self) -> dict:
        return {"step": self.step}

    def load_checkpoint(self, tensors: dict[str, torch.Tensor], values: dict) -> None:
        self.tensors, self.step = tensors, values["step"]

    def is_whole(self) -> bool:
        return all(bool((t == self.step).all()) for t in self.tensors.values())


def open_run(directory: Path, warnings: list[str] | None = None, run_id: str = "run-a", **settings) -> Checkpoints:
    collect = warnings.append if warnings is not None else None
    return Checkpoints(directory, CheckpointConfig(**settings), run_id=run_id, warn=collect)


@pytest.fixture
def saved(tmp_path) -> Path:
    """A directory with whole checkpoints of steps 1, 2 and 3."""
    checkpoints = open_run(tmp_path / "checkpoints", keep_last=10)
    for step in (1, 2, 3):
        checkpoints.save(State(step), wait=True)
    return tmp_path / "checkpoints"


def trials():
    spec = importlib.util.spec_from_file_location("checkpoint_trials", ROOT / "benchmarks" / "checkpoint_trials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_kill_9_at_random_moments_loses_nothing_committed(count):
    counts = trials().kill_trials(count)
    assert counts["trials"] == count
    assert counts["wrong"] == counts["lost"] == counts["unloadable"] == 0, counts
    assert counts["during_a_save"] > count / 4, f"the kills hit too few saves to mean anything: {counts}"


@pytest.mark.slow
def test_300_flipped_bits_are_all_detected():
    counts = trials().flip_trials(300)
    assert counts["undetected"] == 0 and counts["detected"] + counts["harmless"] == 300, counts


# --- damage ------------------------------------------------------------


def flip(path: Path, position: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 16
    path.write_bytes(data)


def test_a_flipped_bit_names_file_and_tensor(saved):
    path = saved / step_name(3)
    flip(path / "rank0.safetensors")
    with pytest.raises(
        CorruptCheckpointError, match=r"rank0\.safetensors: tensor 'model\.2' .* differs from its checks"
    ):
        read_checkpoint(path)
    (problem,) = verify_checkpoint(path)
    assert "rank0.safetensors" in problem and "'model.2'" in problem


def test_restore_falls_back_says_so_and_sets_the_damaged_one_aside(saved):
    flip(saved / step_name(3) / "rank0.safetensors")
    warnings: list[str] = []
    state = State()
    checkpoints = open_run(saved, warnings, keep_last=10)
    assert checkpoints.restore(state) == 2 and state.is_whole() and state.step == 2
    (warning,) = warnings
    assert "step 3 was passed over" in warning and "tensor 'model.2'" in warning and "1 steps" in warning
    assert [i.step for i in list_checkpoints(saved)] == [1, 2]
    assert (saved / "step-00000003.rejected" / "rank0.safetensors").exists()
    checkpoints.save(State(3), wait=True)  # the step is done again
    state = State()
    assert open_run(saved, warnings).restore(state) == 3 and len(warnings) == 1


DAMAGES = {
    "a flipped bit in the header": lambda p: flip(p / "rank0.safetensors", 20),
    "a flipped bit in the padding of the header": lambda p: flip(p / "rank0.safetensors", 4000),
    "a flipped bit in the index": lambda p: flip(p / "index.json", 30),
    "a flipped bit in the manifest": lambda p: flip(p / "manifest.json", 60),
    "a flipped bit in the manifest's digest": lambda p: flip(p / "manifest.json", 14),
    "a file cut short": lambda p: os.truncate(p / "rank0.safetensors", 9000),
    "a file cut to nothing": lambda p: os.truncate(p / "rank0.safetensors", 0),
    "an index cut short": lambda p: os.truncate(p / "index.json", 100),
    "a manifest cut short": lambda p: os.truncate(p / "manifest.json", 10),
    "a longer file": lambda p: (p / "rank0.safetensors").open("ab").write(b"x"),
    "a missing tensor file": lambda p: (p / "rank0.safetensors").unlink(),
    "a missing index": lambda p: (p / "index.json").unlink(),
    "a missing manifest": lambda p: (p / "manifest.json").unlink(),
    "an empty directory": lambda p: [f.unlink() for f in p.iterdir()],
    "a tensor file of an older step": lambda p: shutil.copy(p.parent / step_name(2) / "rank0.safetensors", p),
    "an index of an older step": lambda p: shutil.copy(p.parent / step_name(2) / "index.json", p),
    "an older step under a newer name": lambda p: shutil.copytree(p.parent / step_name(2), p, dirs_exist_ok=True),
    "a file in the place of the directory": lambda p: (shutil.rmtree(p), p.write_text("x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_is_found_before_use(saved, damage):
    path = saved / step_name(3)
    DAMAGES[damage](path)
    assert verify_checkpoint(path)
    with pytest.raises(CorruptCheckpointError):
        read_checkpoint(path)
    state, warnings = State(), []
    assert open_run(saved, warnings).restore(state) == 2
    assert state.is_whole() and len(warnings) == 1


def test_a_checkpoint_of_another_run_is_not_taken(saved, tmp_path):
    other = tmp_path / "other"
    open_run(other, run_id="run-b").save(State(9), wait=True)
    shutil.copytree(other / step_name(9), saved / step_name(9))
    warnings: list[str] = []
    assert open_run(saved, warnings).restore(State()) == 3
    assert "belongs to another run" in warnings[0]


def test_none_whole_is_an_error_that_names_each(saved):
    for step in (1, 2, 3):
        flip(saved / step_name(step) / "rank0.safetensors")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints") as error:
        open_run(saved).restore(State())
    assert str(error.value).count("rank0.safetensors") == 3
    assert len(list_checkpoints(saved)) == 3, "nothing is moved when there is nothing to go on from"


def test_another_schema_is_an_error_not_a_fallback(saved, monkeypatch):
    monkeypatch.setattr("turbopump.core.checkpoint_store.SCHEMA_VERSION", 2)
    with pytest.raises(CheckpointError, match="schema version 1, this turbopump reads 2") as error:
        open_run(saved).restore(State())
    assert not isinstance(error.value, CorruptCheckpointError)


# --- crashes at every call that changes the disk ------------------------------------------------------------


class Crash(BaseException):
    """Ends the writer where it stands: no handler of the code under test runs on it."""


def crash(*_: object, **__: object) -> None:
    raise Crash


class Schedule:
    """Replaces a function of `os` by one that crashes, or fails with an error, at its n-th call."""

    def __init__(self, monkeypatch, at: int, effect: BaseException | None) -> None:
        self.calls: list[str] = []
        for name in ("open", "write", "fsync", "rename", "mkdir", "ftruncate"):
            self._wrap(monkeypatch, name, at, effect)

    def _wrap(self, monkeypatch, name, at, effect) -> None:
        real = getattr(os, name)

        def call(*args, **kwargs):
            if "step-" in str(args[0]) or isinstance(args[0], int):
                self.calls.append(name)
                if len(self.calls) == at and effect is not None:
                    raise effect
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)


def crash_points(directory: Path, monkeypatch) -> list[str]:
    with monkeypatch.context() as patch:
        schedule = Schedule(patch, 0, None)
        open_run(directory, keep_last=1).save(State(1), wait=True)
        first = len(schedule.calls)
        open_run(directory, keep_last=1).save(State(2), wait=True)
    return schedule.calls[first:]


def test_a_crash_at_every_call_leaves_the_old_step_or_the_new(tmp_path, monkeypatch):
    calls = crash_points(tmp_path / "count", monkeypatch)
    assert calls.count("fsync") == 5 and calls.count("rename") == 2, calls
    outcomes = []
    for at in range(1, len(calls) + 2):
        directory = tmp_path / str(at)
        open_run(directory).save(State(1), wait=True)
        job = open_run(directory, keep_last=1)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", crash)  # a dead process cleans nothing
            Schedule(patch, at, Crash())
            job.save(State(2))
            job._flight.thread.join()
        state = State()
        restored = open_run(directory).restore(state)
        assert restored in (1, 2) and state.is_whole() and state.step == restored
        assert not any(p.name.startswith(".") for p in directory.iterdir()), "the next attempt cleans up"
        outcomes.append(restored)
    assert outcomes == sorted(outcomes) and set(outcomes) == {1, 2}, outcomes


@pytest.mark.slow
def test_a_crash_while_a_step_is_replaced_loses_neither(tmp_path, monkeypatch):
    seen = set()
    for at in range(1, 24):
        directory = tmp_path / str(at)
        open_run(directory).save(State(1), metrics={"loss": 1.0}, wait=True)
        job = open_run(directory)
        with monkeypatch.context() as patch:
            patch.setattr("shutil.rmtree", crash)
            Schedule(patch, at, Crash())
            job.save(State(1), metrics={"loss": 2.0})
            job._flight.thread.join()
        assert open_run(directory).restore(State()) == 1
        (info,) = list_checkpoints(directory)
        seen.add(info.metrics["loss"])
    assert seen == {1.0, 2.0}


@pytest.mark.slow
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ESTALE, errno.EACCES])
def test_an_error_of_any_call_ends_the_save_leaves_no_litter_and_keeps_the_old_step(tmp_path, monkeypatch, code):
    failures, warnings = 0, []
    for at in range(1, 18):
        directory = tmp_path / str(at)
        checkpoints = open_run(directory, warnings, keep_last=1)
        checkpoints.save(State(1), wait=True)
        with monkeypatch.context() as patch:
            Schedule(patch, at, OSError(code, os.strerror(code)))
            checkpoints.save(State(2))
            checkpoints._flight.thread.join()
        try:
            checkpoints.wait()
        except CheckpointError as error:
            failures += 1
            assert "step 2" in str(error) and str(directory) in str(error) and "needed" in str(error), error
            assert "\n" not in str(error)
        litter = {p.suffix for p in directory.iterdir() if p.name.startswith(".")}
        assert litter <= {".trash"}, "only the old step, half deleted, may wait for the next start"
        state = State()
        restored = open_run(directory).restore(state)
        assert restored in (1, 2) and state.is_whole()
        assert not any(p.name.startswith(".") for p in directory.iterdir())
    assert failures >= 10


# --- the disk and the directory ------------------------------------------------------------


def test_a_disk_known_to_be_too_full_is_an_error_before_a_byte_is_written(tmp_path, monkeypatch):
    checkpoints = open_run(tmp_path)
    checkpoints.save(State(1), wait=True)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"1 kB free, 1\.\d+ MB are needed") as error:
        checkpoints.save(State(2), wait=True)
    assert str(tmp_path) in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == [step_name(1)]


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=10m", "tmpfs", str(place)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_keeps_the_older_checkpoints(small_disk, monkeypatch, foreseen):
    directory = small_disk / "checkpoints"
    checkpoints = open_run(directory)
    checkpoints.save(State(1, numel=500_000), wait=True)  # 6 MB of 10
    if not foreseen:
        usage = shutil.disk_usage(small_disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 40))
    free = os.statvfs(small_disk).f_bavail
    with pytest.raises(CheckpointError, match=r"free.*needed|needed.*free"):
        checkpoints.save(State(2, numel=500_000), wait=True)
    assert os.statvfs(small_disk).f_bavail == free, "the space is given back"
    state = State(numel=500_000)
    assert open_run(directory).restore(state) == 1 and state.is_whole()


def test_a_directory_that_cannot_be_made_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="a file stands where a directory is needed"):
        open_run(tmp_path / "file" / "checkpoints")


def test_a_failed_asynchronous_save_is_raised_by_poll(tmp_path):
    checkpoints = open_run(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("x")
    checkpoints.save(State(1))
    checkpoints._flight.thread.join()
    with pytest.raises(CheckpointError, match="step 1"):
        checkpoints.poll()
    assert checkpoints.poll() == []


@pytest.mark.parametrize("end", ["save", "wait", "close"])
def test_a_failed_asynchronous_save_is_never_silent(tmp_path, end):
    checkpoints = open_run(tmp_path / "a")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "a").write_text("x")
    checkpoints.save(State(1))
    with pytest.raises(CheckpointError):
        getattr(checkpoints, end)(*[State(2)] if end == "save" else [])


def test_bytes_changed_on_their_way_to_the_disk_are_noticed_before_the_commit(tmp_path, monkeypatch):
    checkpoints = open_run(tmp_path)
    checkpoints.save(State(1), wait=True)
    real = os.fsync

    def rot(handle):
        real(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.name == "rank0.safetensors":
            flip(path)

    monkeypatch.setattr(os, "fsync", rot)
    with pytest.raises(CheckpointError, match="read back differ"):
        checkpoints.save(State(2), wait=True)
    assert [p.name for p in tmp_path.iterdir()] == [step_name(1)]


def test_an_old_checkpoint_that_cannot_be_deleted_is_warned_about(tmp_path, monkeypatch):
    warnings: list[str] = []
    checkpoints = open_run(tmp_path, warnings, keep_last=1)
    checkpoints.save(State(1), wait=True)

    def refuse(path):
        raise OSError(errno.EPERM, "not allowed")

    monkeypatch.setattr("turbopump.core.checkpoint_commit.remove", refuse)
    checkpoints.save(State(2), wait=True)
    assert len(warnings) == 1 and step_name(1) in warnings[0]
    assert latest(tmp_path) == tmp_path / step_name(2)


def test_names_in_an_index_cannot_leave_the_directory(saved):
    from turbopump.core import checkpoint_commit as store
    from turbopump.core.files import digest, from_json, to_json

    path = saved / step_name(3)
    for bad in ("../step-00000002/rank0.safetensors", "/etc/passwd", "rank0.safetensors/../x", "rank1.safetensors"):
        index = from_json((path / "index.json").read_bytes())
        index["tensors"]["model.0"]["pieces"][0]["file"] = bad
        data = to_json(index)
        manifest = from_json((path / "manifest.json").read_bytes())
        del manifest["digest"]
        manifest["index"] = {"num_bytes": len(data), "xxh3": digest(data)}
        manifest["files"][bad] = manifest["files"]["rank0.safetensors"]
        (path / "index.json").write_bytes(data)
        (path / "manifest.json").write_bytes(store._sealed(manifest))
        with pytest.raises(CorruptCheckpointError):
            open_checkpoint(path).check_files()
        del manifest["files"][bad]
