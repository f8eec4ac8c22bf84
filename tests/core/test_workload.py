import dataclasses
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbopump.core.workload import DTYPE_BYTES, Block, Op, OpCost, Workload


@dataclass(frozen=True)
class Square(Op):
    n: int
    dtype: str

    @property
    def cost(self) -> OpCost:
        return OpCost(2.0 * self.n**3, 3.0 * self.n**2 * DTYPE_BYTES[self.dtype])


def toy(count: int = 3) -> Workload:
    op = Square(10, "fp32")
    layer = Block("layer", (op,), (op, op), params=100, kept_bytes={"none": 40, "full": 4}, count=count)
    head = Block("head", (Square(20, "bf16"),), (), params=50, kept_bytes={"none": 8, "full": 8})
    return Workload("toy", (layer, head), samples=2, units=64, unit="token", dtype="fp32", tied_params=25)


costs = st.builds(OpCost, st.integers(0, 10**12).map(float), st.integers(0, 10**12).map(float))


@given(costs, costs, st.integers(0, 1000))
def test_costs_add_and_multiply(a, b, n):
    assert a + b == b + a
    assert a + OpCost() == a
    assert n * (a + b) == n * a + n * b
    assert a * n == n * a


def test_a_key_is_stable_text_of_the_descriptor():
    assert Square(64, "bf16").key == "Square(n=64,dtype=bf16)"
    assert Square(64, "bf16") == Square(64, "bf16") and len({Square(64, "bf16"), Square(64, "bf16")}) == 1


def test_blocks_count_as_often_as_they_are_repeated():
    work = toy()
    assert work.params == 3 * 100 + 50 - 25
    assert work.forward_cost == OpCost(3 * 2000.0 + 16000.0, 3 * 1200.0 + 2400.0)
    assert work.cost == OpCost(9 * 2000.0 + 16000.0, 9 * 1200.0 + 2400.0)
    assert work.cost == sum((op.cost * n for op, n in work.ops()), OpCost())
    assert work.kept_bytes() == 3 * 40 + 8
    assert work.kept_bytes("full") == 3 * 4 + 8
    assert [n for _, n in work.ops()] == [3, 3, 3, 1]


def test_descriptors_cannot_be_changed():
    for value, name in ((Square(1, "fp32"), "n"), (OpCost(), "flops"), (toy(), "units"), (toy().blocks[0], "count")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(value, name, 3)


def test_the_dtypes_have_their_sizes():
    assert DTYPE_BYTES["fp32"] == 4 and DTYPE_BYTES["bf16"] == DTYPE_BYTES["fp16"] == 2 and DTYPE_BYTES["fp8"] == 1
