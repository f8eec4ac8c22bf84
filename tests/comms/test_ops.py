"""Descriptors of communication: bytes by nccl-tests' conventions, keys, and what is refused."""

import pytest

from turbopump.comms.ops import (
    COLLECTIVES,
    AllGather,
    AllReduce,
    AllToAll,
    Barrier,
    Broadcast,
    Overlap,
    ReduceScatter,
    Send,
)
from turbopump.core.errors import UsageError


def test_each_rank_sends_what_the_bandwidth_optimal_algorithm_must():
    assert AllReduce(1000, 4).cost.bytes == 1500  # ring: 3 of 4 quarters, twice
    assert AllGather(1000, 4).cost.bytes == ReduceScatter(1000, 4).cost.bytes == AllToAll(1000, 4).cost.bytes == 750
    assert Broadcast(1000, 4).cost.bytes == Send(1000).cost.bytes == 1000
    assert Barrier(ranks=4).cost.bytes == 0
    assert all(kind(0 if kind is Barrier else 8, 2).cost.flops == 0 for kind in COLLECTIVES)


def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather():
    for ranks in (1, 2, 3, 8, 1000):
        whole = AllReduce(4096, ranks)
        parts = (ReduceScatter(4096, ranks), AllGather(4096, ranks))
        assert whole.cost.bytes == pytest.approx(sum(part.cost.bytes for part in parts))
        assert whole.steps == sum(part.steps for part in parts)


def test_one_rank_sends_nothing():
    for kind in (AllReduce, AllGather, ReduceScatter, AllToAll, Broadcast):
        assert kind(1 << 20, 1).cost.bytes == 0
        assert kind(1 << 20, 1).steps == 0


def test_bus_bandwidth_is_that_of_nccl_tests():
    # published with its bus bandwidth: A100, 2 ranks, 1 MiB in 44.21 us at 23.72 GB/s
    assert AllReduce(1 << 20, 2).bus_bytes_per_s(44.21e-6) == pytest.approx(23.72e9, rel=1e-3)


def test_rounds_of_trees_are_logarithms():
    assert [Broadcast(8, ranks).steps for ranks in (1, 2, 3, 4, 5, 8, 9)] == [0, 1, 2, 2, 3, 3, 4]
    assert Barrier(ranks=16).steps == 4


def test_keys_are_stable():
    assert AllReduce(64, 2).key == "AllReduce(bytes=64,ranks=2,level=node,dtype=fp32)"
    assert Send(8, level="rack").key == "Send(bytes=8,ranks=2,level=rack,dtype=fp32)"
    assert Barrier(ranks=3).key == "Barrier(bytes=0,ranks=3,level=node,dtype=int8)"
    assert Overlap(256, 1024, 2).key == "Overlap(size=256,bytes=1024,ranks=2,level=node,dtype=fp32)"


def test_overlap_costs_what_its_all_reduce_costs():
    assert Overlap(256, 1024, 2).cost == AllReduce(1024, 2).cost


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AllReduce(8, 0), "ranks"),
        (lambda: AllReduce(-1, 2), "bytes"),
        (lambda: AllReduce(8, 2, "planet"), "device, node, rack, pod"),
        (lambda: AllReduce(8, 2, dtype="fp3"), "fp32"),
        (lambda: Send(8, 3), "must be 2"),
        (lambda: Barrier(8), "must be 0"),
    ],
)
def test_what_cannot_be_is_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()
