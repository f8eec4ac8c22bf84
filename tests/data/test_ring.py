"""What lies in a slot comes out as it went in, bit for bit and layout for layout; what cannot travel is refused."""

import os
from collections import namedtuple

import numpy as np
import pytest
import torch

from turbopump.core.errors import SampleError
from turbopump.data.aligned import PAGE_BYTES, aligned_empty
from turbopump.data.ring import SharedSlot

Pair = namedtuple("Pair", "left right")


def test_any_structure_of_any_tensors_travels():
    slot = SharedSlot()
    image = torch.randn(2, 3, 40, 50).to(memory_format=torch.channels_last)
    value = [
        {"x": image, "name": ["a", "b"], "n": 3},
        Pair(torch.arange(5, dtype=torch.bfloat16), (torch.zeros(0, 4), torch.tensor(2.5))),
        torch.arange(12).reshape(3, 4).T, torch.ones(1).expand(7), torch.tensor([True, False]),
    ]  # fmt: skip
    for copy in (True, False):
        got = slot.read(slot.write(value), copy=copy)
        assert got[0]["name"] == ["a", "b"] and got[0]["n"] == 3 and type(got[1]) is Pair
        flat = [(got[0]["x"], image), (got[1].left, value[1].left), *zip(got[1].right, value[1].right, strict=True),
                *zip(got[2:], value[2:], strict=True)]  # fmt: skip
        for a, b in flat:
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert got[0]["x"].stride() == image.stride() and got[2].stride() == value[2].stride()
        assert copy or got[0]["x"].data_ptr() % PAGE_BYTES == 0
    slot.close()
    slot.close()


def test_a_slot_grows_to_what_it_holds_and_says_when_there_is_no_memory(monkeypatch):
    slot = SharedSlot()
    small = slot.read(slot.write(torch.ones(10)), copy=False)
    large = slot.read(slot.write(torch.full((100_000,), 2.0)), copy=False)
    assert bool((large == 2).all()) and len(small) == 10

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(
        SampleError, match=r"no shared memory for a batch of 4000000 bytes \(No space left.*prefetch_steps"
    ):
        slot.write(torch.ones(1_000_000))
    slot.close()


def test_a_tensor_that_is_changed_leaves_the_next_one_as_it_is():
    slot = SharedSlot()
    message = slot.write({"x": torch.ones(3)})
    slot.read(message, copy=False)["x"].requires_grad_()
    got = slot.read(message, copy=False)
    got.pop("x")
    assert not slot.read(message, copy=False)["x"].requires_grad
    slot.close()


def test_what_cannot_be_pickled_is_refused_with_the_way_out():
    slot = SharedSlot()
    with pytest.raises(SampleError, match=r"cannot be sent from a loader process .*num_workers=0"):
        slot.write({"f": lambda: 0})
    slot.close()


@pytest.mark.parametrize("shape", [(), 5, (3, 0), (7, 11)])
def test_aligned_memory_begins_on_a_page(shape):
    for dtype in (np.uint8, np.float64):
        array = aligned_empty(shape, dtype)
        assert array.shape == np.empty(shape).shape and array.dtype == dtype and array.flags.c_contiguous
        assert array.flags.writeable and (not array.size or array.ctypes.data % PAGE_BYTES == 0)
