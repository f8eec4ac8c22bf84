"""Deep Speech 2's kernels as routes of probe: layers of both directions, norms under a mask."""

import pytest
import torch

from turbopump.compute import kernels, routes
from turbopump.compute.ops import Norm, Rnn


def run(op, name):
    given = kernels.inputs(op, "cpu", torch.Generator().manual_seed(0))
    route = routes.find(op, "cpu", name)
    with route.setting():
        out = route.ready(op, tuple(x.clone() for x in given))()
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_both_directions_and_their_gradients(kind, dtype):
    op = Rnn(kind, 3, 7, 12, 16, True, dtype)
    (y,) = run(op, "deepspeech2")
    assert y.shape == (7, 3, 16) and y.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    gradients = run(Rnn(kind, 3, 7, 12, 16, True, dtype, backward=True), "deepspeech2")
    assert len(gradients) == 9 and gradients[0].shape == (7, 3, 12)
    assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("backward", [False, True])
def test_a_norm_whose_mask_holds_all_is_a_batch_norm(backward):
    op = Norm("batch", 64, 8, "fp32", backward)
    for ours, theirs in zip(run(op, "deepspeech2"), run(op, "default"), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-3)


def test_for_what_they_stand():
    assert routes.find(Rnn("gru", 3, 7, 12, 16, False, "fp32"), "cpu", "deepspeech2") is None
    assert routes.find(Rnn("vanilla", 3, 7, 12, 16, True, "fp32"), "cpu", "deepspeech2") is None
