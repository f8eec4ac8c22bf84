import pytest
import torch

from turbopump.compute import conditions
from turbopump.hardware.timing import THREAD_CPU, WALL


def test_clocks():
    assert conditions.clock("cpu") is THREAD_CPU and conditions.clock("cpu", threads=2) is WALL
    assert conditions.clock("cuda").name == "cuda_events"


def test_threads_are_put_back():
    before = torch.get_num_threads()
    with conditions.num_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    with conditions.num_threads(None):
        assert torch.get_num_threads() == before
    assert torch.get_num_threads() == before


def test_the_buffer_that_empties_caches_is_larger_than_they_are():
    buffer = conditions.flusher("cpu")()
    assert buffer.nbytes >= max(64 * 2**20, 2 * conditions.cache_bytes("cpu")) and bool((buffer == 2).all())


def test_the_library_names_versions():
    found = conditions.library("cpu")
    assert found.startswith(f"torch {torch.__version__}") and "unknown" not in found


def test_a_device_that_computes_is_alive_and_one_that_is_not_there_is_not():
    assert conditions.alive("cpu") and conditions.available_bytes("cpu") > 2**20
    if not torch.cuda.is_available():
        assert not conditions.alive("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_clock_of_a_gpu_counts_all_calls():
    x = torch.rand(2048, 2048, device="cuda")
    clock = conditions.clock("cuda")
    clock.time(lambda: x @ x, 3)
    one, ten = clock.time(lambda: x @ x, 1)[0], clock.time(lambda: x @ x, 50)[0]
    assert ten > 5 * one > 0
