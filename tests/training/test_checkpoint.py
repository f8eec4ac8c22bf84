"""Checkpoints of one process: what is saved comes back bit for bit, when it is due, what is kept."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from turbopump.core.checkpoint_store import find_checkpoint, list_checkpoints, step_name, verify_checkpoint
from turbopump.core.config import CheckpointConfig
from turbopump.core.errors import CheckpointError, CorruptCheckpointError, UsageError
from turbopump.training.checkpoint import Checkpoints, check_json_able, latest, read_checkpoint, read_weights


class State:
    """A minimal state: tensors and values as given."""

    def __init__(self, tensors: dict[str, torch.Tensor] | None = None, step: int = 0) -> None:
        self.tensors = tensors if tensors is not None else {"model.w": torch.zeros(3, 4)}
        self.values: dict = {"position": [1, 2.5, None, "ü"]}
        self.step = step

    def checkpoint_tensors(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def checkpoint_values(self) -> dict:
        return self.values

    def load_checkpoint(self, tensors: dict[str, torch.Tensor], values: dict) -> None:
        self.tensors, self.values = tensors, values


def open_run(directory: Path, run_id: str = "run-a", **settings) -> Checkpoints:
    return Checkpoints(directory, CheckpointConfig(**settings), run_id=run_id)


def save_steps(checkpoints: Checkpoints, steps, losses=None) -> None:
    for step in steps:
        state = State({"model.w": torch.full((3, 4), float(step))}, step)
        checkpoints.save(state, metrics={"loss": losses[step]} if losses else None, wait=True)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    bytes_a, bytes_b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bytes_a, bytes_b)


MANY_KINDS = {
    "model.fp32": torch.randn(5, 7),
    "model.bf16": torch.randn(5, 3).bfloat16(),
    "model.fp16": torch.randn(9).half(),
    "model.fp64": torch.randn(2, 2, dtype=torch.float64),
    "model.complex": torch.randn(3, dtype=torch.complex64),
    "model.fp8": torch.randn(3).to(torch.float8_e4m3fn),
    "model.nan": torch.tensor([math.nan, math.inf, -0.0]),
    "optimizer.int64": torch.arange(4) - 2,
    "optimizer.uint8": torch.arange(255, dtype=torch.uint8),
    "optimizer.bool": torch.tensor([True, False, True]),
    "optimizer.scalar": torch.tensor(7),
    "optimizer.empty": torch.empty(0, 3),
    "optimizer.transposed": torch.randn(4, 6).t(),
    "optimizer.ünïcode name/with.dots": torch.ones(1),
}


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip_is_bitwise_for_all_dtypes(tmp_path, asynchronous):
    checkpoints = open_run(tmp_path, asynchronous=asynchronous)
    assert checkpoints.restore(State()) is None
    checkpoints.save(State(MANY_KINDS, 42), metrics={"loss": 1.5})
    (saved,) = checkpoints.wait()
    checkpoints.close()
    assert (saved.step, saved.path) == (42, tmp_path / "step-00000042") and saved.stall_s > 0
    state = State({name: torch.zeros_like(t) for name, t in MANY_KINDS.items()})
    assert open_run(tmp_path).restore(state) == 42
    assert state.values == State().values
    assert all(same_bits(state.tensors[name], t) for name, t in MANY_KINDS.items())
    tensors, values = read_checkpoint(saved.path)
    assert values == State().values and all(same_bits(tensors[name], t) for name, t in MANY_KINDS.items())


def test_every_tensor_file_opens_with_plain_safetensors_and_nothing_is_pickled(tmp_path):
    open_run(tmp_path).save(State(MANY_KINDS, 1), wait=True)
    path = tmp_path / step_name(1)
    assert sorted(p.name for p in path.iterdir()) == ["index.json", "manifest.json", "rank0.safetensors"]
    with safe_open(path / "rank0.safetensors", "pt") as file:
        assert set(file.keys()) == set(MANY_KINDS)
        assert all(same_bits(file.get_tensor(name), t) for name, t in MANY_KINDS.items())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), max_size=30).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(["float32", "bfloat16", "bool", "int8"]), st.lists(st.integers(0, 5), max_size=4)),
        max_size=8,
    )
)
def test_round_trip_of_any_names_and_shapes(tmp_path, kinds):
    tensors = {name: torch.randn(shape).to(getattr(torch, dtype)) for name, (dtype, shape) in kinds.items()}
    step = len(list_checkpoints(tmp_path)) + 1
    checkpoints = open_run(tmp_path, keep_last=1000)
    checkpoints.save(State(tensors, step), wait=True)
    restored = read_checkpoint(tmp_path / step_name(step))[0]
    assert restored.keys() == tensors.keys()
    assert all(same_bits(restored[name], t) for name, t in tensors.items())
    with safe_open(tmp_path / step_name(step) / "rank0.safetensors", "pt") as file:
        assert set(file.keys()) == set(tensors)


def test_a_snapshot_is_of_the_moment_of_save(tmp_path):
    weight = torch.zeros(100_000)
    state = State({"model.w": weight}, 1)
    checkpoints = open_run(tmp_path)
    checkpoints.save(state)
    weight.fill_(9)  # training goes on while the thread writes
    state.values["position"].append("later")
    checkpoints.wait()
    tensors, values = read_checkpoint(tmp_path / step_name(1))
    assert not tensors["model.w"].any()
    assert values["position"] == [1, 2.5, None, "ü"]


def test_a_second_save_waits_for_the_first_and_both_are_reported(tmp_path):
    checkpoints = open_run(tmp_path)
    state = State({"model.w": torch.randn(2_000_000)})
    for state.step in (1, 2):
        checkpoints.save(state)
    assert [s.step for s in checkpoints.wait()] == [1, 2]
    assert checkpoints.poll() == [] == checkpoints.wait()
    assert [i.step for i in list_checkpoints(tmp_path)] == [1, 2]


def test_a_step_saved_already_is_not_written_again_unless_it_brings_metrics(tmp_path):
    checkpoints = open_run(tmp_path)
    state = State(step=5)
    checkpoints.save(state)
    checkpoints.save(state, wait=True)
    assert len(checkpoints.wait()) == 1
    checkpoints.save(state, metrics={"loss": 0.25}, wait=True)
    assert len(checkpoints.wait()) == 1
    (info,) = list_checkpoints(tmp_path)
    assert info.metrics == {"loss": 0.25} and not verify_checkpoint(info.path)
    assert [p.name for p in tmp_path.iterdir()] == [step_name(5)]


def test_due_by_step_and_by_time(tmp_path):
    checkpoints = open_run(tmp_path, every=10, every_s=60)
    assert [step for step in range(1, 31) if checkpoints.due(step, step * 1.0)] == [10, 20, 30]
    assert not checkpoints.due(31, 89.0)
    assert checkpoints.due(32, 90.0), "60 s after the save of step 30"
    assert not checkpoints.due(33, 91.0)
    never = open_run(tmp_path, every=0, every_s=0)
    assert not any(never.due(step, step * 1e6) for step in range(100))


def test_a_restored_step_is_not_due_again(tmp_path):
    save_steps(open_run(tmp_path), [10])
    checkpoints = open_run(tmp_path, every=5)
    assert checkpoints.restore(State()) == 10
    assert not checkpoints.due(10, 0.0) and checkpoints.due(15, 1.0)


def test_keep_last_multiples_and_best(tmp_path):
    losses = {step: 1.0 for step in range(1, 11)} | {3: 0.5, 7: math.nan, 8: -math.inf}
    save_steps(open_run(tmp_path, keep_last=2, keep_every=5), range(1, 11), losses)
    assert [i.step for i in list_checkpoints(tmp_path)] == [3, 5, 9, 10]


def test_without_keep_best_only_the_newest_stay(tmp_path):
    save_steps(open_run(tmp_path, keep_last=1, keep_best=False), [1, 2, 3], {1: 0.1, 2: 0.2, 3: 0.3})
    assert [i.step for i in list_checkpoints(tmp_path)] == [3]


def test_old_checkpoints_go_only_after_the_new_one_is_committed(tmp_path, monkeypatch):
    from turbopump.core import checkpoint_commit as store

    events = []
    real_commit, real_remove = store.commit, store.remove
    monkeypatch.setattr(store, "commit", lambda *a: events.append("commit") or real_commit(*a))
    monkeypatch.setattr(store, "remove", lambda path: events.append(path.name) or real_remove(path))
    save_steps(open_run(tmp_path, keep_last=1), [1, 2])
    assert events == ["commit", "commit", step_name(1)]


def test_metrics_and_sizes_are_listed_without_torch(tmp_path):
    save_steps(open_run(tmp_path), [1, 2], {1: 3.0, 2: 2.0})
    code = (
        "import sys; from pathlib import Path; from turbopump.core.checkpoint_store import *\n"
        "infos = list_checkpoints(Path(sys.argv[1]))\n"
        "print([(i.step, i.metrics['loss'], i.world_size, i.num_bytes > 0, verify_checkpoint(i.path))"
        " for i in infos])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "[(1, 3.0, 1, True, []), (2, 2.0, 1, True, [])]", done.stderr


def test_another_shape_dtype_or_name_is_an_error_not_a_fallback(tmp_path):
    save_steps(open_run(tmp_path), [1, 2])
    with pytest.raises(CheckpointError, match=r"model\.w is F32\[3, 4\] in the checkpoint, BF16\[3, 4\] in this run"):
        open_run(tmp_path).restore(State({"model.w": torch.zeros(3, 4).bfloat16()}))
    with pytest.raises(CheckpointError, match=r"model\.other is not in the checkpoint"):
        open_run(tmp_path).restore(State({"model.other": torch.zeros(3, 4)}))
    assert len(list_checkpoints(tmp_path)) == 2


def test_tensors_the_state_has_not_made_yet_are_given_whole(tmp_path):
    tensors = {"model.w": torch.ones(2), "optimizer.w.exp_avg": torch.ones(2)}
    open_run(tmp_path).save(State(tensors, 1), wait=True)
    state = State({"model.w": torch.zeros(2)})
    open_run(tmp_path).restore(state)
    assert torch.equal(state.tensors["optimizer.w.exp_avg"], torch.ones(2))


@pytest.mark.parametrize("value", [{1: 2}, {"a": math.nan}, {"a": [object()]}, {"a": 1 << 64}, {"a": b"x"}, {"a": {1}}])
def test_values_that_json_would_change_are_refused(tmp_path, value):
    state = State(step=1)
    state.values = value
    with pytest.raises(CheckpointError, match="cannot be kept"):
        open_run(tmp_path).save(state)
    check_json_able({"a": [1, (2,), None, True, {"b": 0.1}, (1 << 64) - 1]})


def test_sparse_tensors_are_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"'model\.s'"):
        open_run(tmp_path).save(State({"model.s": torch.eye(3).to_sparse()}, 1))


def test_weights_from_a_run_a_step_a_checkpoint_or_a_plain_file(tmp_path):
    directory = tmp_path / "runs" / "a" / "checkpoints"
    save_steps(open_run(directory), [1, 2])
    for reference, value in [("@1", 1.0), ("@2", 2.0), ("", 2.0), ("/checkpoints", 2.0)]:
        weights = read_weights(f"{directory.parent}{reference}")
        assert set(weights) == {"w"} and bool((weights["w"] == value).all())
    assert read_weights(latest(directory))["w"][0, 0] == 2
    save_file({"w": torch.arange(3), "s": torch.tensor(1.5)}, tmp_path / "plain.safetensors")
    plain = read_weights(tmp_path / "plain.safetensors")
    assert torch.equal(plain["w"], torch.arange(3)) and plain["s"] == 1.5


def test_wrong_weights_are_named(tmp_path):
    directory = tmp_path / "run" / "checkpoints"
    save_steps(open_run(directory), [1])
    with pytest.raises(UsageError, match=r"no checkpoint of step 7: it has 1"):
        read_weights(f"{tmp_path / 'run'}@7")
    with pytest.raises(UsageError, match="no checkpoint in"):
        find_checkpoint(tmp_path / "nothing")
    with pytest.raises(UsageError, match="one rank's part"):
        read_weights(latest(directory) / "rank0.safetensors")
    (tmp_path / "old.pt").write_bytes(b"PK\x03\x04 not this format")
    with pytest.raises(CorruptCheckpointError, match="not a safetensors file"):
        read_weights(tmp_path / "old.pt")


def test_closing_gives_the_buffer_back_and_does_no_harm_twice(tmp_path):
    checkpoints = open_run(tmp_path)
    checkpoints.save(State(step=1))
    checkpoints.close()
    checkpoints.close()
    checkpoints.save(State(step=2), wait=True)
    assert [i.step for i in list_checkpoints(tmp_path)] == [1, 2]
