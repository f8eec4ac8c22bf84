"""Other transforms than torch's give what torch's give, in the same dtype; refuse what they cannot do."""

import pytest
import torch

from turbopump.compute.ops import Fft, Gemm
from turbopump.compute.transforms import ROUTES

CASES = (
    Fft(5, 64, "real", "fp64"),
    Fft(5, 45, "real", "fp64"),
    Fft(3, 1, "real", "fp64"),
    Fft(5, 48, "complex", "fp64"),
    Fft(3, 16, "real", "fp64", dims=2),
    Fft(3, 12, "complex", "fp64", dims=2),
    Fft(7, 240, "real", "fp32"),
    Fft(7, 200, "complex", "fp32"),
)


@pytest.mark.parametrize("op", CASES, ids=lambda op: op.key)
def test_every_route_transforms(op):
    torch.manual_seed(0)
    real = torch.float64 if op.dtype == "fp64" else torch.float32
    shape = (op.batch, *(op.length,) * op.dims)
    x = torch.randn(shape, dtype=real)
    x = x if op.kind == "real" else torch.complex(x, torch.randn(shape, dtype=real))
    dims = tuple(range(-op.dims, 0))
    theirs = torch.fft.rfftn(x, dim=dims) if op.kind == "real" else torch.fft.fftn(x, dim=dims)
    routes = [route for route in ROUTES if not route.problem(op, "cpu")]
    assert [r.name for r in routes] == (["pocketfft", "dft product"] if op.dims == 1 else ["pocketfft"])
    for route in routes:
        run = route.function(op)
        for _ in range(2):  # the second call uses what the first one kept
            ours = run(x)
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            error = float((ours - theirs).norm() / theirs.norm())
            assert error < (1e-14 if op.dtype == "fp64" else 1e-6), route.name


def test_problems_say_why():
    pocketfft, product = (route.problem for route in ROUTES)
    assert "CPU" in pocketfft(Fft(2, 64, "real", "fp32"), "cuda")
    assert "fp32 and fp64" in pocketfft(Fft(2, 64, "real", "bf16"), "cpu")
    assert "256 points" in product(Fft(2, 512, "real", "fp32"), "cpu")
    assert pocketfft(Gemm(2, 2, 2, "fp32"), "cpu") and product(Gemm(2, 2, 2, "fp32"), "cpu")
