"""The safetensors file, written and read without torch and without a copy.

    8 bytes: length of the header, little endian | header: JSON | data: the tensors back to back

`plan_layout` fixes every offset before a tensor is at hand, so the host buffer of a snapshot is the image of the file;
`write_image` writes that image past the page cache (measured for 400 MB: 0.02 core-seconds, against 0.1 through a
warm page cache and 0.9 where the cache has to grow); `read_back` compares what the disk gives back. `read_layout` and
`read_tensor` read a file that nobody trusts: every size is checked against the file before memory is taken.
Format: https://github.com/huggingface/safetensors (the plain library opens every file written here).
"""

from __future__ import annotations

import errno
import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from turbopump.core.errors import CheckpointError, CorruptCheckpointError
from turbopump.core.files import digest, from_json, new_digest, to_json

# Bytes of one element, by the format's own names; wider ones are laid out first, so each tensor is aligned.
ITEM_BYTES = {
    "C64": 8, "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
PAGE_BYTES = 4096  # direct input/output moves whole pages to and from page-aligned memory
_READ_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies: `begin` and `end` are byte offsets from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """The bytes of a file: its `head` (length and header) and the place of each tensor, in file order."""

    head: bytes
    tensors: dict[str, TensorEntry]
    metadata: dict[str, str]

    @property
    def num_bytes(self) -> int:
        return max([len(self.head), *(entry.end for entry in self.tensors.values())])


@dataclass(frozen=True)
class FileDigests:
    """XXH3-64 of a whole file, of its head, and of each tensor in it; together the last two cover every byte."""

    num_bytes: int
    xxh3: str
    head_xxh3: str
    tensors: dict[str, str]


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    return ITEM_BYTES[dtype] * math.prod(shape)


def plan_layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> Layout:
    """The layout of a file with `tensors` (name to dtype and shape): widest dtype first, then by name."""
    order = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name][0]], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begin = 0
    for name in order:
        if name == "__metadata__":
            raise CheckpointError("a tensor cannot be named '__metadata__', a word of the file format: rename it")
        dtype, shape = tensors[name]
        end = begin + tensor_bytes(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = to_json(header)
    text += b" " * (-(8 + len(text)) % PAGE_BYTES)  # the format allows it; the data then starts on a page
    head = len(text).to_bytes(8, "little") + text
    return Layout(head, _entries(header, len(head)), dict(metadata))


def image_bytes(layout: Layout) -> int:
    """Bytes of a buffer that `write_image` can write directly: the file, rounded up to whole pages."""
    return -(-layout.num_bytes // PAGE_BYTES) * PAGE_BYTES


def write_image(path: Path, layout: Layout, image: memoryview) -> FileDigests:
    """Write the new file whose bytes are `image` (page-aligned, `image_bytes` long), durably; returns its digests.

    Raises `OSError`. The interpreter's lock is free while blocks are hashed and written.
    """
    size = layout.num_bytes
    tensors = {name: digest(image[entry.begin : entry.end]) for name, entry in layout.tensors.items()}
    digests = FileDigests(size, digest(image[:size]), digest(layout.head), tensors)
    handle, direct = _open_direct(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        done, end = 0, len(image) if direct else size
        while done < end:
            done += os.write(handle, image[done : min(done + _BLOCK_BYTES, end)])
            if direct and done % PAGE_BYTES:  # a nearly full device takes part of a block: the rest is not aligned
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.ftruncate(handle, size)
        os.fsync(handle)
    finally:
        os.close(handle)
    return digests


def read_back(path: Path, expected_xxh3: str) -> None:
    """Read a file just written from the device itself, past the page cache where the system allows it, and compare.

    Raises `CorruptCheckpointError` where the bytes differ, or `OSError`.
    """
    state, buffer = new_digest(), mmap.mmap(-1, _BLOCK_BYTES)  # mapped memory starts on a page
    handle = _open_direct(path, os.O_RDONLY)[0]
    try:
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        with memoryview(buffer) as view:
            while count := os.readv(handle, [view]):
                state.update(view[:count])
    finally:
        os.close(handle)
        buffer.close()
    if state.hexdigest() != expected_xxh3:
        raise CorruptCheckpointError(
            f"{path}: the bytes read back differ from those written: the disk, its driver or the memory of this "
            "machine is failing; write to another device"
        )


def hash_file(path: Path) -> str:
    """XXH3-64 of a whole file; raises `OSError`."""
    state, buffer = new_digest(), memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer):
            state.update(buffer[:count])
    return state.hexdigest()


def read_layout(path: Path) -> Layout:
    """The layout of an existing file; raises `CorruptCheckpointError` where it is no valid one, or `OSError`."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise CorruptCheckpointError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        text = file.read(length)
    try:
        header = from_json(text)
        metadata = dict(header.get("__metadata__") or {})
        layout = Layout(prefix + text, _entries(header, 8 + length), metadata)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{path}: its header is not that of a safetensors file ({error})") from error
    if layout.num_bytes != size:
        raise CorruptCheckpointError(f"{path}: {size} bytes long, its header describes {layout.num_bytes}")
    return layout


def read_tensor(path: Path, name: str, entry: TensorEntry, into: memoryview, expected_xxh3: str | None) -> None:
    """Fill the flat bytes `into` with a tensor and check them; raises `CorruptCheckpointError` or `OSError`."""
    if into.nbytes != entry.end - entry.begin:
        raise ValueError(f"{name}: a buffer of {into.nbytes} bytes for {entry.end - entry.begin}")
    state = new_digest()
    with open(path, "rb", buffering=0) as file:
        file.seek(entry.begin)
        for block in _blocks(into):
            _fill(file, block, path)
            state.update(block)
    if expected_xxh3 is not None and state.hexdigest() != expected_xxh3:
        raise CorruptCheckpointError(
            f"{path}: tensor {name!r} (bytes {entry.begin} to {entry.end}) differs from its checksum"
        )


def damaged_tensors(path: Path, layout: Layout, digests: Mapping[str, str]) -> list[str]:
    """Names of the tensors whose bytes differ from `digests`; raises `OSError`."""
    damaged = []
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        for name, entry in layout.tensors.items():
            file.seek(entry.begin)
            state, left = new_digest(), entry.end - entry.begin
            while left:
                block = buffer[: min(left, _READ_BYTES)]
                _fill(file, block, path)
                state.update(block)
                left -= block.nbytes
            if state.hexdigest() != digests.get(name):
                damaged.append(name)
    return damaged


def _entries(header: Mapping[str, object], base: int) -> dict[str, TensorEntry]:
    entries = {}
    for name, value in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]  # type: ignore[index]
        if dtype not in ITEM_BYTES:
            raise ValueError(f"tensor {name!r} has the unknown dtype {dtype!r}")
        if not all(isinstance(size, int) and size >= 0 for size in (*shape, begin, end)):
            raise ValueError(f"tensor {name!r} has a shape or offsets that are not counts")
        if end - begin != tensor_bytes(dtype, shape):
            raise ValueError(f"tensor {name!r} takes {end - begin} bytes, its shape {list(shape)} another number")
        entries[name] = TensorEntry(dtype, shape, base + begin, base + end)
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    expected = base
    for name, entry in ordered.items():
        if entry.begin != expected:
            raise ValueError(f"tensor {name!r} does not follow the one before it")
        expected = entry.end
    return ordered


def _open_direct(path: Path, flags: int) -> tuple[int, bool]:
    """A file descriptor that passes the page cache by, and whether it does: not every file system can."""
    try:
        return os.open(path, flags | os.O_DIRECT, 0o644), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    if flags & os.O_CREAT:
        path.unlink(missing_ok=True)  # some systems make the file before they refuse the flag
    return os.open(path, flags, 0o644), False


def _blocks(data: memoryview) -> Iterator[memoryview]:
    for begin in range(0, data.nbytes, _READ_BYTES):
        yield data[begin : begin + _READ_BYTES]


def _fill(file: BinaryIO, block: memoryview, path: Path) -> None:
    done = 0
    while done < block.nbytes:
        count = file.readinto(block[done:])  # type: ignore[attr-defined]
        if not count:
            raise CorruptCheckpointError(f"{path}: cut short")
        done += count
