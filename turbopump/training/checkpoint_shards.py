"""Which rank writes which box of which tensor, and how boxes become tensors again on any number of ranks.

A plain tensor is the same on all ranks: one of them writes it. A DTensor is written by the ranks that hold its
shards; where it is also replicated, one replica writes. Both rules are computed by every rank alone, without a
message. Reading fills a box of the wanted tensor from all stored pieces that overlap it, so 1, 2 or 4 ranks, sharded
or not, read each other's checkpoints.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeGuard

import torch

from turbopump.core.checkpoint_store import StoredCheckpoint, StoredTensor
from turbopump.core.errors import CheckpointError, CorruptCheckpointError
from turbopump.core.tensor_file import tensor_bytes

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

DTYPE_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class Box:
    """A part of a tensor of `global_shape`: `shape` elements from `offsets` on."""

    global_shape: tuple[int, ...]
    dtype: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def plan_boxes(tensors: Mapping[str, torch.Tensor], rank: int, world_size: int) -> dict[str, Box]:
    """The boxes that `rank` writes; raises `CheckpointError` for a tensor that cannot be stored."""
    replicated: dict[str, Box] = {}
    boxes: dict[str, Box] = {}
    for ordinal, (name, tensor) in enumerate(sorted(tensors.items())):
        if tensor.dtype not in DTYPE_NAMES or tensor.layout is not torch.strided:
            raise CheckpointError(f"tensor {name!r} ({tensor.dtype}, {tensor.layout}) has no place in safetensors: "
                                  "keep it out of the checkpoint, or as dense numbers of another dtype")  # fmt: skip
        shape, dtype = tuple(tensor.shape), DTYPE_NAMES[tensor.dtype]
        if not is_sharded(tensor) or not tensor.numel():
            replicated[name] = Box(shape, dtype, (0,) * len(shape), shape)
        elif _writes(tensor, ordinal, name):
            local_shape, offsets = local_box(tensor)
            if math.prod(local_shape):
                boxes[name] = Box(shape, dtype, offsets, local_shape)
    return boxes | {name: replicated[name] for name in _dealt(replicated, rank, world_size)}


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    """Whether `tensor` is a DTensor; without the 0.6 s that importing DTensor takes where nobody has made one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_box(tensor: DTensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and global offsets of the part of `tensor` that this rank holds."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(shape), tuple(offsets)


def local_data(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor


def read_full(stored: StoredCheckpoint, name: str) -> torch.Tensor:
    """A whole tensor on the CPU, verified."""
    tensor = stored.tensors[name]
    full = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype])
    _fill(full, (0,) * len(tensor.shape), stored, name)
    return full


def read_like(stored: StoredCheckpoint, name: str, template: torch.Tensor) -> torch.Tensor:
    """A whole tensor or, where `template` is a DTensor, this rank's part placed like it; verified."""
    if not is_sharded(template):
        return read_full(stored, name)
    from torch.distributed.tensor import DTensor

    shape, offsets = local_box(template)
    local = torch.empty(shape, dtype=template.dtype)
    _fill(local, offsets, stored, name)
    return DTensor.from_local(local.to(template.device), template.device_mesh, template.placements, run_check=False,
                              shape=template.shape, stride=template.stride())  # fmt: skip


def differences(stored: Mapping[str, StoredTensor], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """What keeps stored tensors from becoming the state's: missing ones, other shapes or dtypes."""
    lines = []
    for name, tensor in tensors.items():
        if name not in stored:
            lines.append(f"{name} is not in the checkpoint")
            continue
        shape, dtype = tuple(tensor.shape), DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        if (stored[name].shape, stored[name].dtype) != (shape, dtype):
            lines.append(f"{name} is {stored[name].dtype}{list(stored[name].shape)} in the checkpoint, "
                         f"{dtype}{list(shape)} in this run")  # fmt: skip
    return lines


def flat_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _writes(tensor: DTensor, ordinal: int, name: str) -> bool:
    """Of equal replicas one writes; which one turns with the tensor, so that the work is spread."""
    from torch.distributed.tensor import Partial, Replicate

    coordinate = tensor.device_mesh.get_coordinate()
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise CheckpointError(f"tensor {name!r} is a partial sum: reduce it before it is stored")
    return coordinate is not None and all(
        not isinstance(placement, Replicate) or coordinate[axis] == ordinal % tensor.device_mesh.size(axis)
        for axis, placement in enumerate(tensor.placements)
    )


def _dealt(boxes: Mapping[str, Box], rank: int, world_size: int) -> list[str]:
    """Names that `rank` gets when each box, the largest first, goes to the rank with the fewest bytes so far."""
    loads = [0] * world_size
    mine = []
    sizes = {name: tensor_bytes(box.dtype, box.shape) for name, box in boxes.items()}
    for name in sorted(boxes, key=lambda name: (-sizes[name], name)):
        owner = min(range(world_size), key=loads.__getitem__)
        loads[owner] += sizes[name]
        if owner == rank:
            mine.append(name)
    return mine


def _fill(target: torch.Tensor, offsets: tuple[int, ...], stored: StoredCheckpoint, name: str) -> None:
    filled = 0
    for piece in stored.tensors[name].pieces:
        begin = [max(a, b) for a, b in zip(offsets, piece.offsets)]
        end = [min(a + s, b + t) for a, s, b, t in zip(offsets, target.shape, piece.offsets, piece.shape)]
        overlap = math.prod(max(0, e - b) for b, e in zip(begin, end))
        if (piece.offsets, piece.shape) == (offsets, tuple(target.shape)):
            stored.read_piece(piece, flat_bytes(target))
        elif overlap:
            source = torch.empty(piece.shape, dtype=target.dtype)
            stored.read_piece(piece, flat_bytes(source))
            inside = tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, piece.offsets))
            target[tuple(slice(b - o, e - o) for b, e, o in zip(begin, end, offsets))] = source[inside]
        filled += overlap
    if filled != target.numel():
        raise CorruptCheckpointError(f"{stored.info.path}: the pieces of tensor {name!r} do not cover it")
