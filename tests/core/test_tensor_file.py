"""The safetensors layout: equal to the plain library's reading, and closed to files that lie."""

from __future__ import annotations

import json
import mmap
import random
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from turbopump.core.errors import CheckpointError, CorruptCheckpointError
from turbopump.core.tensor_file import (
    PAGE_BYTES,
    damaged_tensors,
    hash_file,
    image_bytes,
    plan_layout,
    read_back,
    read_layout,
    read_tensor,
    write_image,
)


def write(path: Path):
    layout = plan_layout({"b": ("F32", (3, 2)), "a": ("U8", (5,)), "empty": ("I64", (0, 4))}, {"format": "pt"})
    image = mmap.mmap(-1, image_bytes(layout))
    image[: len(layout.head)] = layout.head
    entry = layout.tensors["b"]
    image[entry.begin : entry.end] = np.arange(6, dtype=np.float32).tobytes()
    return layout, write_image(path, layout, memoryview(image))


def test_the_plain_library_reads_what_is_written_and_the_layout_comes_back(tmp_path):
    layout, digests = write(tmp_path / "f")
    arrays = load_file(tmp_path / "f")
    assert arrays["b"].tolist() == [[0, 1], [2, 3], [4, 5]] and arrays["empty"].shape == (0, 4)
    assert read_layout(tmp_path / "f") == layout and len(layout.head) % PAGE_BYTES == 0
    assert digests.num_bytes == (tmp_path / "f").stat().st_size and digests.xxh3 == hash_file(tmp_path / "f")
    read_back(tmp_path / "f", digests.xxh3)
    assert damaged_tensors(tmp_path / "f", layout, digests.tensors) == []


def test_files_of_the_plain_library_are_read(tmp_path):
    array = np.arange(12, dtype=np.float16).reshape(3, 4)
    (tmp_path / "f").write_bytes(save({"x": array}, {"k": "v"}))
    layout = read_layout(tmp_path / "f")
    into = np.empty((3, 4), np.float16)
    read_tensor(tmp_path / "f", "x", layout.tensors["x"], memoryview(into.reshape(-1).view(np.uint8)), None)
    assert (into == array).all() and layout.metadata == {"k": "v"}


def test_a_new_file_never_replaces_an_old_one(tmp_path):
    write(tmp_path / "f")
    with pytest.raises(FileExistsError):
        write(tmp_path / "f")


def test_the_reserved_name_is_refused():
    with pytest.raises(CheckpointError, match="rename it"):
        plan_layout({"__metadata__": ("U8", (1,))}, {})


def lying(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(dtype: object, shape: object, begin: object, end: object) -> dict:
    return {"x": {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"1234567",
        (1 << 63).to_bytes(8, "little") + b"{}",
        lying(b"[]"),
        lying(b"{"),
        lying(b"null"),
        lying(tensor("F32", [1 << 60], 0, 1 << 62)),
        lying(tensor("F32", [-1, -1], 0, 4), b"1234"),
        lying(tensor("F99", [1], 0, 4), b"1234"),
        lying(tensor("U8", [4], 4, 8), b"12345678"),
        lying(tensor("U8", [4], -4, 0), b""),
        lying(tensor("U8", [4], 0, 4), b"123"),
        lying(tensor("U8", [4], 0, 4), b"12345"),
        lying(tensor("U8", [4.0], 0, 4), b"1234"),
        lying(tensor(["U8"], 4, 0, 4), b"1234"),
        lying({"x": 3}),
        lying({"__metadata__": [1]}),
        lying(tensor("U8", [4], 0, 4) | {"y": tensor("U8", [4], 0, 4)["x"]}, b"1234"),
    ],
)
def test_a_file_that_lies_is_one_typed_error(tmp_path, content):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(CorruptCheckpointError):
        read_layout(tmp_path / "f")


@pytest.mark.slow
def test_mutated_files_are_read_or_refused_and_nothing_else(tmp_path):
    write(tmp_path / "f")
    good = (tmp_path / "f").read_bytes()
    header_end = good.index(b"   ")
    draw, refused = random.Random(1), 0
    for _ in range(1500):
        data = bytearray(good)
        for _ in range(draw.choice((1, 2, 8))):
            data[draw.randrange(header_end)] = draw.randrange(256)
        (tmp_path / "g").write_bytes(data)
        try:
            read_layout(tmp_path / "g")
        except CorruptCheckpointError:
            refused += 1
    assert refused > 1000
