"""A shard's bytes to a file: the compiled pass and the reference give the same file, sums and digest, and say alike
what the disk refused."""

import errno
import os

import numpy as np
import pytest

from turbopump.core.files import digest_file
from turbopump.data import native
from turbopump.data.gather import Reference
from turbopump.data.shard_file import Compiled, reference


@pytest.fixture(scope="module")
def compiled():
    library = native.load("shard_file")
    assert library is not None, "these tests need a C++ compiler"
    return Compiled(library)


def written(write, path, parts):
    with path.open("wb", buffering=0) as file:
        return write(file.fileno(), parts)


@pytest.mark.parametrize("block_bytes", [1, 128, 1000, 4096, 1 << 19])
def test_the_compiled_pass_writes_and_sums_what_the_reference_does(compiled, tmp_path, block_bytes):
    rng = np.random.default_rng(block_bytes)
    most = 3000 if block_bytes == 1 else 3_000_000  # more than is hashed or written back in one step
    sizes = [0, 1, *rng.integers(0, most, 5).tolist(), *[7] * 200]  # many small parts in one write, too
    parts = [(rng.integers(0, 256, size).astype(np.uint8), block_bytes * (i % 3 > 0)) for i, size in enumerate(sizes)]
    whole, sums = written(compiled, tmp_path / "compiled", parts)
    other_whole, other_sums = written(reference, tmp_path / "reference", parts)
    assert (tmp_path / "compiled").read_bytes() == b"".join(part.tobytes() for part, _ in parts)
    assert (tmp_path / "reference").read_bytes() == (tmp_path / "compiled").read_bytes()
    assert whole == other_whole == digest_file(tmp_path / "compiled")
    assert np.array_equal(sums, other_sums)
    assert np.array_equal(sums, np.concatenate([Reference().sums(p, block_bytes) for p, block in parts if block]))


def test_nothing_to_write(compiled, tmp_path):
    for write in (compiled, reference):
        whole, sums = written(write, tmp_path / "empty", [])
        assert whole == digest_file(tmp_path / "empty") and len(sums) == 0


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_of_its_number(compiled):
    for write in (compiled, reference):
        with open("/dev/full", "wb", buffering=0) as file, pytest.raises(OSError) as caught:
            write(file.fileno(), [(np.zeros(5000, np.uint8), 4096)])
        assert caught.value.errno == errno.ENOSPC
