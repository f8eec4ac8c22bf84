"""A slot of the ring that worker processes fill: shared memory without a name, and the batches that lie in it.

`write` copies the tensors of any Python value into the slot and returns a short message: the value with a number in
place of each tensor, and where each lies. `read`, in the process that was forked from, makes the value again with
tensors over the slot. The memory is a memfd made before the fork: no file system knows it, so it is gone with the last
process that has it open, whatever ended that process. It grows to the largest batch it has held.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from turbopump.core.errors import SampleError
from turbopump.data.aligned import PAGE_BYTES

_LINE_BYTES = 64
_Layout = list[tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]]  # offset in bytes, dtype, shape, strides


@dataclass(frozen=True, slots=True)
class Message:
    """What travels beside the slot: the value without its tensors, their layout (both pickled), their bytes."""

    value: bytes
    layout: bytes
    nbytes: int


class SharedSlot:
    """Memory that a parent and its forked children share; one of them uses it at a time."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("turbopump-loader")
        self._memory: Tensor | None = None  # uint8, the whole slot
        self._layout = b""
        self._tensors: list[Tensor] = []  # of that layout

    def write(self, value: Any) -> Message:
        """Raises `SampleError` for a value that cannot travel, or for want of memory."""
        text = io.BytesIO()
        pickler = _Pickler(text)
        try:
            pickler.dump(value)
        except Exception as error:
            raise SampleError(
                f"a batch cannot be sent from a loader process ({type(error).__name__}: {error}): "
                f"collate to tensors, numbers and strings, or use loader.num_workers=0"
            ) from error
        layout, nbytes = _laid_out(pickler.tensors)
        self._reserve(nbytes)
        written = pickle.dumps(layout)
        for target, tensor in zip(self._views(written, nbytes), pickler.tensors, strict=True):
            target.copy_(tensor)
        return Message(text.getvalue(), written, nbytes)

    def read(self, message: Message, *, copy: bool) -> Any:
        """The value of a message, its tensors over the slot; `copy` gives them memory of their own."""
        views = self._views(message.layout, message.nbytes)
        # each time another tensor over the same memory: the caller may change what is not data, such as requires_grad
        return _Unpickler(message.value, [view.clone() if copy else view.detach() for view in views]).load()

    def close(self) -> None:
        """Tensors that were read stay valid."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._memory, self._tensors, self._layout = -1, None, [], b""

    def _reserve(self, nbytes: int) -> None:
        if nbytes > os.fstat(self._fd).st_size:
            try:
                os.posix_fallocate(self._fd, 0, -(-nbytes * 5 // 4 // PAGE_BYTES) * PAGE_BYTES)  # batches differ
            except OSError as error:
                raise SampleError(
                    f"no shared memory for a batch of {nbytes} bytes ({error.strerror}): "
                    f"use a smaller loader.num_workers or loader.prefetch_steps"
                ) from error

    def _views(self, layout: bytes, nbytes: int) -> list[Tensor]:
        if layout != self._layout:
            if nbytes and (self._memory is None or len(self._memory) < nbytes):
                self._memory = torch.frombuffer(mmap.mmap(self._fd, os.fstat(self._fd).st_size), dtype=torch.uint8)
            self._tensors = [self._view(*place) for place in pickle.loads(layout)]
            self._layout = layout
        return self._tensors

    def _view(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        count = 1
        for size in shape:
            count *= size
        if not count:
            return torch.empty(shape, dtype=dtype)
        assert self._memory is not None
        flat = self._memory[offset : offset + count * dtype.itemsize].view(dtype)
        return flat.as_strided(shape, strides)


def _laid_out(tensors: list[Tensor]) -> tuple[_Layout, int]:
    layout: _Layout = []
    end = 0
    for tensor in tensors:
        unit = PAGE_BYTES if tensor.nbytes >= PAGE_BYTES else _LINE_BYTES
        begin = -(-end // unit) * unit
        strides = torch.empty_like(tensor, device="meta").stride()  # its own where they leave no gaps
        layout.append((begin, tensor.dtype, tuple(tensor.shape), tuple(strides)))
        end = begin + tensor.nbytes
    return layout, end


class _Pickler(pickle.Pickler):
    """Plain tensors in CPU memory are left out and collected; anything else travels in the message."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> int | None:
        if type(value) is not Tensor or value.layout is not torch.strided or value.device.type != "cpu":
            return None
        if value.is_quantized or value.is_conj() or value.is_neg():
            return None
        self.tensors.append(value.detach())
        return len(self.tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, value: bytes, tensors: list[Tensor]) -> None:
        super().__init__(io.BytesIO(value))
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]
