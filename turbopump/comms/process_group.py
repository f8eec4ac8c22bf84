"""The process group of a run, and the few small collectives that a training loop needs.

gloo between CPU tensors, NCCL between CUDA tensors (a CUDA run has both, so that what the host has to know never waits
for the device). Every helper is synchronous, runs over all ranks and must be called by all of them in the same order;
with one process each returns at once. A collective that fails because another rank is gone raises `RankError`.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turbopump.comms.environment import RankEnvironment
from turbopump.core.errors import RankError, UsageError
from turbopump.core.files import from_json, to_json


def init_process_group(device: torch.device, timeout_s: float) -> RankEnvironment:
    """Join the other ranks that the launcher's variables describe; nothing to do for one process.

    `timeout_s`: seconds a collective waits for the slowest rank. Raises `RankError` where the others do not come and
    `UsageError` where the variables are incomplete.
    """
    place = RankEnvironment.read()
    if place.world_size == 1 or dist.is_initialized():
        return place
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(f"WORLD_SIZE is {place.world_size}, but {' and '.join(missing)} are not set: use a launcher")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    with peer_errors("joining the process group"):
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            timeout=timedelta(seconds=timeout_s),
            device_id=device if on_gpu else None,
        )
    # A group that is still open at exit aborts one launch in six: "terminate called without an active exception".
    atexit.register(destroy)
    return place


def destroy() -> None:
    """Leave the process group; nothing to do where there is none. Not a collective."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@overload
def all_reduce_sum(values: Sequence[float]) -> list[float]: ...
@overload
def all_reduce_sum(values: Tensor) -> Tensor: ...
def all_reduce_sum(values: Sequence[float] | Tensor) -> list[float] | Tensor:
    """Sums over all ranks: one all-reduce, 8 bytes a number (gloo, in float64) or the tensor's own bytes.

    Numbers come back as new numbers; a tensor is summed in place, on its device, and returned.
    """
    if isinstance(values, Tensor):
        if world_size() > 1:
            with peer_errors("all-reduce"):
                dist.all_reduce(values)
        return values
    if world_size() == 1:
        return [float(value) for value in values]
    return all_reduce_sum(torch.tensor(values, dtype=torch.float64)).tolist()


def all_reduce_max(values: Sequence[float]) -> list[float]:
    """Largest of each number over all ranks: one all-reduce, 8 bytes a number (gloo, about 0.3 ms between 2)."""
    if world_size() == 1:
        return list(values)
    numbers = torch.tensor(values, dtype=torch.float64)
    with peer_errors("all-reduce"):
        dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.tolist()


def any_rank(flag: bool) -> bool:
    """Whether `flag` is set on any rank: one all-reduce of 8 bytes."""
    return bool(all_reduce_max([float(flag)])[0])


def broadcast_json(value: Any, src: int = 0) -> Any:
    """A JSON-able value of rank `src` on all ranks: two broadcasts (gloo), its length and its bytes."""
    if world_size() == 1:
        return value
    data = to_json(value)
    length = torch.tensor([len(data)])
    broadcast([length], src)
    message = torch.zeros(int(length), dtype=torch.uint8)
    if rank() == src:
        message.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    broadcast([message], src)
    return from_json(message.numpy().tobytes())


def choose_device(wanted: str) -> torch.device:
    """The device of this rank: `cpu`, or the GPU of its place on this host; `auto` takes a GPU where there is one.

    Raises `UsageError` for `cuda` where there is none.
    """
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UsageError("launch.device: 'cuda' given, but this machine has no GPU that torch can use: use 'cpu'")
    return torch.device("cuda", RankEnvironment.read().local_rank % torch.cuda.device_count())


def barrier() -> None:
    """Wait until all ranks are here: one all-reduce of 4 bytes (gloo)."""
    any_rank(False)


def broadcast_buffers(module: nn.Module, src: int = 0) -> None:
    """Give all ranks the buffers (running statistics) of rank `src`: a broadcast of their bytes, one a buffer."""
    broadcast(list(module.buffers()), src)


def broadcast(tensors: Sequence[Tensor], src: int = 0, group: dist.ProcessGroup | None = None) -> None:
    """Overwrite `tensors` by those of rank `src`: one broadcast each, started together, no copy in between."""
    if world_size() == 1:
        return
    with torch.no_grad(), peer_errors("broadcast"):
        dense = [tensor.detach() for tensor in tensors]
        sent = [tensor.contiguous() for tensor in dense]
        for work in [dist.broadcast(tensor, src, group=group, async_op=True) for tensor in sent]:
            work.wait()
        for tensor, received in zip(dense, sent):
            if received is not tensor:
                tensor.copy_(received)


@contextmanager
def peer_errors(what: str) -> Iterator[None]:
    """Turn the errors of torch's backends (plain RuntimeErrors from C++) into a `RankError` of one line."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RankError(
            f"rank {RankEnvironment.read().rank}: {what} failed, because another rank has ended or answers more slowly "
            f"than launch.timeout_s: {reason}"
        ) from error
