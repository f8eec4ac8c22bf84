"""Formulas of collectives on a link, and all-reduces over levels."""

import pytest

from turbopump.comms.ops import AllGather, AllReduce, AllToAll, Barrier, Broadcast, ReduceScatter, Send
from turbopump.comms.textbook import (
    algorithms_s,
    hierarchical_all_reduce,
    lower_bound_s,
    predict_hierarchical_all_reduce,
    predict_on_link,
)
from turbopump.core.errors import UsageError
from turbopump.hardware.specs import LinkSpec

NODE = LinkSpec("nvlink", "node", 450e9, 2e-6)
RACK = LinkSpec("infiniband", "rack", 50e9, 5e-6)


def test_the_ring_is_latency_and_bytes():
    found = algorithms_s(AllReduce(8 << 20, 8), NODE)
    assert found["ring"] == pytest.approx(14 * 2e-6 + 1.75 * (8 << 20) / 450e9)
    assert "recursive doubling" not in algorithms_s(AllReduce(8, 6), NODE)  # not a power of two


@pytest.mark.parametrize("ranks", [2, 3, 4, 7, 8, 64])
@pytest.mark.parametrize("size", [8, 1 << 16, 1 << 28])
def test_nothing_beats_the_lower_bound(ranks, size):
    ops = [kind(size, ranks) for kind in (AllReduce, AllGather, ReduceScatter, AllToAll, Broadcast)]
    for op in [*ops, Send(size), Barrier(ranks=ranks)]:
        for name, seconds in algorithms_s(op, NODE).items():
            assert seconds >= lower_bound_s(op, NODE) * (1 - 1e-12), (op.key, name)


def test_few_bytes_want_few_messages_and_many_bytes_few_bytes():
    def fastest(size):
        found = algorithms_s(AllReduce(size, 64), RACK)
        return min(found, key=found.__getitem__)

    assert fastest(8) == "recursive doubling"
    assert fastest(1 << 28) == "halving and doubling"


def test_a_prediction_has_the_link_and_the_algorithm_and_a_band():
    found = predict_on_link(AllReduce(1 << 30, 8), NODE)
    assert found.basis == "roofline"
    assert found.route.startswith("nvlink: ")
    assert found.low_s == pytest.approx(1.75 * (1 << 30) / 450e9, rel=0.01)
    # 8 H100, 1 GiB: 365 to 480 GB/s of bus bandwidth were published
    assert found.low_s < 1.75 * (1 << 30) / 365e9 < found.high_s
    assert predict_on_link(AllReduce(8, 1), NODE).seconds == 0
    with pytest.raises(UsageError, match="of level rack"):
        predict_on_link(AllReduce(8, 2), RACK)


def test_levels_share_the_bytes_between_them():
    op = AllReduce(1 << 20, 32, "rack")
    parts = hierarchical_all_reduce(op, [("node", 8), ("rack", 4)])
    assert parts == [ReduceScatter(1 << 20, 8), AllReduce(1 << 17, 4, "rack"), AllGather(1 << 20, 8)]
    # together they send what one ring would
    assert sum(part.cost.bytes for part in parts) == pytest.approx(op.cost.bytes)


def test_three_levels_nest():
    parts = hierarchical_all_reduce(AllReduce(1 << 20, 64, "pod"), [("node", 4), ("rack", 4), ("pod", 4)])
    assert [part.level for part in parts] == ["node", "rack", "pod", "rack", "node"]
    assert [part.ranks for part in parts] == [4] * 5
    with pytest.raises(UsageError, match="multiply to the 64 ranks"):
        hierarchical_all_reduce(AllReduce(8, 64, "pod"), [("node", 4), ("pod", 4)])


def test_levels_are_faster_than_one_slow_ring_and_add_up():
    op = AllReduce(1 << 28, 32, "rack")
    links = {"node": NODE, "rack": RACK}
    found = predict_hierarchical_all_reduce(
        op, [("node", 8), ("rack", 4)], lambda part: predict_on_link(part, links[part.level])
    )
    assert found.seconds < predict_on_link(op, RACK).seconds / 4
    assert found.basis == "roofline"
    assert found.low_s < found.seconds < found.high_s
