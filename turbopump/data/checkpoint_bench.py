"""Checkpoints written and read through the code that `train` uses, of random bytes, by one rank, without torch."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.core import checkpoint_commit as committing
from turbopump.core.checkpoint_store import StoredCheckpoint, open_checkpoint
from turbopump.core.tensor_file import FileDigests, Layout, image_bytes, plan_layout, read_back, write_image
from turbopump.data.ops import CheckpointRead, CheckpointWrite
from turbopump.data.read_engines import page_aligned

WRITE = "checkpoint writer"
READ_BACK, RESTORE = "read back", "restore"
_FILE = "rank0.safetensors"
_TENSORS = 16


def routes(op: CheckpointWrite | CheckpointRead) -> tuple[str, ...]:
    """`read back` is the check behind each save (past the page cache where possible), `restore` what a resume does."""
    return (WRITE,) if isinstance(op, CheckpointWrite) else (READ_BACK, RESTORE)


def seconds(place: Path, op: CheckpointWrite | CheckpointRead, route: str, row_s: float) -> list[float]:
    """Times of saves or reads of one checkpoint in `place`, at least 2, for about `row_s`; the first is not counted.

    Raises `OSError`, or `CheckpointError` where the disk has no room or gives back other bytes.
    """
    rows = -(-op.bytes // (4 * _TENSORS))
    layout = plan_layout({f"tensor{i}": ("F32", (rows,)) for i in range(_TENSORS)}, {"format": "pt"})
    image = page_aligned(1, image_bytes(layout))[0]
    image[:] = np.frombuffer(np.random.Generator(np.random.SFC64()).bytes(len(image)), np.uint8)
    image[: len(layout.head)] = np.frombuffer(layout.head, np.uint8)
    times: list[float] = []
    if isinstance(op, CheckpointWrite):
        for step in _turns(times, row_s):
            begin = time.perf_counter()
            info, _ = _save(place, step, layout, memoryview(image))
            times.append(time.perf_counter() - begin)
            shutil.rmtree(info)
        return times[1:]
    path, digests = _save(place, 0, layout, memoryview(image))
    into = memoryview(image)  # its bytes are on disk: the memory is used again
    for _ in _turns(times, row_s):
        _drop(path / _FILE)
        begin = time.perf_counter()
        if route == READ_BACK:
            read_back(path / _FILE, digests.xxh3)
        else:
            _restore(open_checkpoint(path), into)
        times.append(time.perf_counter() - begin)
    return times[1:]


def _turns(times: list[float], row_s: float) -> Any:
    """Numbers of turns: one to warm up and at least two more, until those took `row_s`."""
    turn = 0
    while len(times) < 3 or sum(times[1:]) < row_s:
        yield turn
        turn += 1


def _save(directory: Path, step: int, layout: Layout, image: memoryview) -> tuple[Path, FileDigests]:
    """As `training.checkpoint` saves, less the reading back, which is an operation of its own."""
    num_bytes = layout.num_bytes
    staging = committing.stage(directory, step, num_bytes)
    with committing.writing(staging, step, num_bytes):
        digests = write_image(staging / _FILE, layout, image)
        tensors = {
            name: {"shape": entry.shape, "dtype": entry.dtype, "pieces": [
                {"file": _FILE, "key": name, "offsets": (0,) * len(entry.shape), "shape": entry.shape}]}
            for name, entry in layout.tensors.items()
        }  # fmt: skip
        index = {"run_id": "probe", "step": step, "world_size": 1, "metrics": {}, "values": {}, "tensors": tensors}
        return committing.commit(staging, index, {_FILE: digests}).path, digests


def _restore(stored: StoredCheckpoint, into: memoryview) -> None:
    stored.check_files()
    begin = 0
    for tensor in stored.tensors.values():
        for piece in tensor.pieces:
            num_bytes = 4 * piece.shape[0]
            stored.read_piece(piece, into[begin : begin + num_bytes])
            begin += num_bytes


def _drop(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
