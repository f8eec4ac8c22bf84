"""Checkpoints of several ranks (real gloo processes): any number reads what another wrote; errors reach all."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from turbopump.core.checkpoint_store import latest, list_checkpoints, open_checkpoint, verify_checkpoint
from turbopump.core.config import CheckpointConfig
from turbopump.core.errors import CheckpointError
from turbopump.training.checkpoint import Checkpoints, read_checkpoint
from turbopump.training.checkpoint_shards import Box, _dealt

pytestmark = pytest.mark.slow  # whole processes or a browser: not for `make check`

PLAIN, SHARDED, TWO_AXES = "plain", "sharded", "two axes"


def full_tensors() -> dict[str, torch.Tensor]:
    """The same on every rank: sizes that 2 and 4 do not divide, a scalar, an empty one, fewer rows than ranks."""
    make = torch.Generator().manual_seed(7)
    shapes = {"model.a": (7, 5), "model.b": (4, 6), "model.c": (3,), "model.d": (1, 9), "optimizer.a.exp_avg": (7, 5)}
    tensors = {name: torch.randn(shape, generator=make) for name, shape in shapes.items()}
    tensors["model.half"] = torch.randn(10, 3, generator=make).bfloat16()
    return tensors | {"optimizer.step": torch.tensor(3), "model.none": torch.empty(0, 2)}


class State:
    def __init__(self, tensors: dict[str, torch.Tensor], step: int = 0) -> None:
        self.tensors, self.step, self.values = tensors, step, {"position": 12}

    def checkpoint_tensors(self):
        return self.tensors

    def checkpoint_values(self):
        return self.values

    def load_checkpoint(self, tensors, values):
        self.tensors, self.values = tensors, values


def placed(tensors: dict[str, torch.Tensor], how: str, world_size: int) -> dict[str, torch.Tensor]:
    """Plain, sharded over all ranks (rows, or columns), or replicated over one mesh axis and sharded over the other."""
    if how == PLAIN:
        return tensors
    if how == SHARDED:
        mesh = init_device_mesh("cpu", (world_size,))
        placements = {"model.b": [Shard(1)], "optimizer.step": [Replicate()]}
        default = [Shard(0)]
    else:
        mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replicate", "shard"))
        placements = {"model.b": [Shard(0), Shard(1)], "optimizer.step": [Replicate(), Replicate()]}
        default = [Replicate(), Shard(0)]
    plain = {"model.c": tensors["model.c"]}
    return {n: distribute_tensor(t, mesh, placements.get(n, default)) for n, t in tensors.items()} | plain


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def open_run(directory: str, rank: int, world_size: int, **settings) -> Checkpoints:
    return Checkpoints(Path(directory), CheckpointConfig(**settings), run_id="run", rank=rank, world_size=world_size,
                       timeout_s=300)  # fmt: skip


def run_ranks(work, world_size: int, directory: str) -> None:
    handle, rendezvous = tempfile.mkstemp(prefix="rendezvous", dir=Path(directory).parent)
    os.close(handle)
    multiprocessing.set_forkserver_preload(["torch._dynamo", "turbopump.training.checkpoint", "pytest"])
    mp.start_processes(_rank, (world_size, rendezvous, work, directory), world_size, start_method="forkserver")


def _rank(rank: int, world_size: int, rendezvous: str, work, directory: str) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    try:
        work(rank, world_size, directory)
    finally:
        dist.destroy_process_group()


def write_and_read(rank: int, world_size: int, directory: str) -> None:
    """Reads everything written so far in every placement, then writes in every placement."""
    expected = full_tensors()
    hows = [PLAIN, SHARDED] + ([TWO_AXES] if world_size == 4 else [])
    for how in hows:
        found = [i.step for i in list_checkpoints(Path(directory))]
        zeros = placed({n: torch.zeros_like(t) for n, t in expected.items()}, how, world_size)
        state = State(zeros)
        checkpoints = open_run(directory, rank, world_size, keep_last=100)
        assert checkpoints.restore(state) == (max(found) if found else None)
        for name in expected if found else ():
            got = state.tensors[name]
            assert isinstance(got, DTensor) == isinstance(zeros[name], DTensor)
            if isinstance(got, DTensor):
                assert got.placements == zeros[name].placements and got.shape == expected[name].shape
            assert torch.equal(whole(got), expected[name]), (name, how, world_size)
        state = State(placed(expected, how, world_size), (max(found) if found else 0) + 1)
        checkpoints.save(state, metrics={"loss": 1.0})
        (saved,) = checkpoints.wait()
        assert saved.num_bytes == list_checkpoints(Path(directory))[-1].num_bytes
        checkpoints.close()
        dist.barrier()


def test_1_2_and_4_ranks_sharded_or_not_read_each_others_checkpoints(tmp_path):
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    for world_size in (2, 4, 1, 4, 2):
        run_ranks(write_and_read, world_size, str(directory))
    infos = list_checkpoints(directory)
    assert [i.world_size for i in infos] == [2, 2, 4, 4, 4, 1, 1, 4, 4, 4, 2, 2]
    for info in infos:
        assert not verify_checkpoint(info.path)
        tensors, values = read_checkpoint(info.path)
        assert values == {"position": 12}
        assert all(torch.equal(tensors[n], t) for n, t in full_tensors().items())
        stored = open_checkpoint(info.path)
        assert sum(f.tensors != {} for f in stored.digests.values()) == info.world_size, "every rank takes part"
    assert len({t.file for t in open_checkpoint(infos[-1].path).tensors["model.a"].pieces}) == 2


def test_replicated_tensors_are_dealt_evenly_and_each_to_one_rank():
    boxes = {f"t{i}": Box((i * 10,), "F32", (0,), (i * 10,)) for i in range(1, 40)}
    shares = [_dealt(boxes, rank, 4) for rank in range(4)]
    assert sorted(name for share in shares for name in share) == sorted(boxes)
    loads = [sum(boxes[n].shape[0] for n in share) for share in shares]
    assert max(loads) - min(loads) <= 400 / 10


def fail_on_one_rank(rank: int, world_size: int, directory: str) -> None:
    checkpoints = open_run(directory, rank, world_size)
    state = State(full_tensors(), 1)
    checkpoints.save(state, wait=True)
    if rank == 1:  # the disk of this rank fails, in its writer thread only
        real = os.fsync
        os.fsync = lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    state.step = 2
    checkpoints.save(state)
    raised_at = None
    for step in range(2, 20_000):  # the training loop: ranks are held together once a step
        try:
            checkpoints.poll()
        except CheckpointError as error:
            assert "rank 1" in str(error) and "Input/output error" in str(error), error
            raised_at = step
            break
        time.sleep(0.01)
        dist.all_reduce(torch.zeros(1))
    steps = [torch.zeros(1, dtype=torch.int64) for _ in range(world_size)]
    dist.all_gather(steps, torch.tensor([raised_at or -1]))
    assert len({int(s) for s in steps}) == 1 and int(steps[0]) > 0, steps
    if rank == 1:
        os.fsync = real
    dist.barrier()
    assert [p.name for p in Path(directory).iterdir()] == ["step-00000001"]
    state.step = 3
    checkpoints.save(state, wait=True)  # the groups are still in order
    checkpoints.close()


def test_a_failure_of_one_rank_is_raised_on_all_at_the_same_step(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    run_ranks(fail_on_one_rank, 2, str(tmp_path / "checkpoints"))
    assert latest(tmp_path / "checkpoints").name == "step-00000003"


def die_while_saving(rank: int, world_size: int, directory: str) -> None:
    checkpoints = open_run(directory, rank, world_size)
    state = State(full_tensors(), 1)
    checkpoints.save(state, wait=True)
    real = os.fsync

    def slow(handle):
        if rank == 1:
            os._exit(0)  # gone without a word, as after kill -9
        time.sleep(0.3)
        return real(handle)

    os.fsync = slow
    state.step = 2
    checkpoints.save(state)
    with pytest.raises(CheckpointError, match=r"another rank died .*[cC]onnection"):  # and not "Timed out waiting"
        checkpoints.wait()
    os._exit(0)


def test_a_rank_that_dies_is_an_error_on_the_others_and_not_a_hang(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    run_ranks(die_while_saving, 2, str(tmp_path / "checkpoints"))
    assert latest(tmp_path / "checkpoints").name == "step-00000001"


def fall_back_together(rank: int, world_size: int, directory: str) -> None:
    expected = full_tensors()
    state = State(placed({n: torch.zeros_like(t) for n, t in expected.items()}, SHARDED, world_size))
    lines: list[str] = []
    checkpoints = Checkpoints(Path(directory), CheckpointConfig(), run_id="run", rank=rank, world_size=world_size,
                              warn=lines.append)  # fmt: skip
    assert checkpoints.restore(state) == 1
    assert len(lines) == (rank == 0)
    assert all(torch.equal(whole(state.tensors[n]), t) for n, t in expected.items())


def save_two(rank: int, world_size: int, directory: str) -> None:
    checkpoints = open_run(directory, rank, world_size)
    for step in (1, 2):
        checkpoints.save(State(placed(full_tensors(), SHARDED, world_size), step), wait=True)


def test_damage_that_one_rank_sees_makes_all_fall_back(tmp_path):
    directory = tmp_path / "checkpoints"
    directory.mkdir()
    run_ranks(save_two, 2, str(directory))
    file = directory / "step-00000002" / "rank1.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run_ranks(fall_back_together, 2, str(directory))


def due_together(rank: int, world_size: int, directory: str) -> None:
    checkpoints = open_run(directory, rank, world_size, every=0, every_s=10)
    skew = 0.0 if rank == 0 else 500.0  # clocks do not agree
    answers = [checkpoints.due(step, skew + step * 1.0) for step in range(30)]
    assert [step for step, due in enumerate(answers) if due] == [11, 22], answers
    checkpoints.close()


def different_states(rank: int, world_size: int, directory: str) -> None:
    checkpoints = open_run(directory, rank, world_size)
    with pytest.raises(CheckpointError, match="different steps or tensors"):
        checkpoints.save(State({"model.w": torch.zeros(2 + rank)}, 1), wait=True)


@pytest.mark.parametrize("work", [due_together, different_states])
def test_ranks_agree(tmp_path, work):
    (tmp_path / "checkpoints").mkdir()
    run_ranks(work, 2, str(tmp_path / "checkpoints"))
