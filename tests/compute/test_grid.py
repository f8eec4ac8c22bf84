import pytest

from turbopump.compute.grid import grid
from turbopump.compute.ops import OPS, Gemm, from_fields
from turbopump.core.workload import DTYPE_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_grid_covers_every_kind_once(device):
    tiered = grid(device)
    ops = [op for op, _ in tiered]
    assert len(set(ops)) == len(ops) and {tier for _, tier in tiered} == {0, 1, 2}
    assert {type(op).__name__ for op in ops} == set(OPS)
    for op in ops:
        assert op.cost.flops >= 0 and op.cost.bytes >= 0
        assert from_fields(type(op).__name__, vars(op)) == op
        assert getattr(op, "dtype", "fp32") in DTYPE_BYTES


def test_products_are_spread_over_sizes_layouts_and_dtypes():
    gemms = [op for op, tier in grid("cpu") if isinstance(op, Gemm) and tier <= 1]
    for name in ("m", "n", "k"):
        sizes = {getattr(op, name) for op in gemms}
        assert {16, 64, 100, 256, 1024, 4096} <= sizes and sizes & {1000, 1760, 2560}
    assert {op.layout for op in gemms} == {"nt", "nn", "tn"}
    assert {op.dtype for op in gemms} >= {"fp32", "bf16", "int8"}
    assert max(op.cost.flops for op in gemms) < 2e11
