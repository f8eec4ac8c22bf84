import pytest
import torch
import torch.nn.functional as F

from turbopump.models.transformer import fused

DTYPES = [(torch.float32, 1e-5), (torch.bfloat16, 0.03)]


def gradients(run, *inputs):
    """Output of `run` and the gradients of a fixed random projection of it."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = run(*leaves)
    torch.manual_seed(9)
    (y * torch.randn(y.shape).to(y.dtype)).sum().backward()
    return [y.detach(), *(x.grad for x in leaves)]


def assert_same(ours, plain, tolerance):
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance * float(b.abs().max()))


@pytest.mark.parametrize("dtype,tolerance", DTYPES)
def test_rms_norm(dtype, tolerance):
    torch.manual_seed(0)
    x, gain = torch.randn(3, 5, 16), torch.rand(16) + 0.5
    ours = gradients(lambda x, g: fused.rms_norm(x, g, 1e-6, dtype), x, gain)
    plain = gradients(lambda x, g: F.rms_norm(x, (16,), g, 1e-6).to(dtype), x, gain)
    assert ours[0].dtype == dtype
    assert_same(ours, plain, tolerance)


def test_rotate_turns_pairs_by_their_angle_and_keeps_lengths():
    angle = torch.tensor([[[0.5, 2.0]]])
    x = torch.tensor([1.0, 0.0, 0.0, 3.0]).view(1, 1, 1, 4)
    y = fused.rotate(x, torch.polar(torch.ones_like(angle), angle)).flatten()
    expected = torch.stack((angle[0, 0, 0].cos(), angle[0, 0, 0].sin(), -3 * angle[0, 0, 1].sin(),
                            3 * angle[0, 0, 1].cos()))  # fmt: skip
    torch.testing.assert_close(y, expected)


def naive_attention(q, k, v):
    """The definition: scores, mask, softmax, mean of values; in fp64."""
    groups = q.shape[2] // k.shape[2]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    mask = torch.ones(scores.shape[-2:]).tril().bool()
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(1, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype,tolerance", DTYPES)
@pytest.mark.parametrize("heads,key_heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 150, 600])
def test_attention_is_that_of_the_definition(length, heads, key_heads, dtype, tolerance):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, h, 8).to(dtype) for h in (heads, key_heads, key_heads))
    ours = gradients(fused.block_causal_attention, q, k, v)
    plain = gradients(lambda *x: naive_attention(*x).to(dtype), q, k, v)
    assert ours[0].dtype == dtype
    assert_same(ours, plain, tolerance)


def test_attention_agrees_with_pytorchs_kernel():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 100, 4, 16) for _ in range(3))
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(fused.block_causal_attention(q, k, v), theirs)


@pytest.mark.parametrize("dtype,tolerance", DTYPES)
@pytest.mark.parametrize("at_once", [40, 200, 10**6])
def test_linear_cross_entropy(dtype, tolerance, at_once, monkeypatch):
    monkeypatch.setitem(fused.LOGITS_AT_ONCE, "cpu", at_once)
    monkeypatch.setattr(fused, "LEAST_ROWS", 1)
    torch.manual_seed(0)
    x, head, targets = torch.randn(23, 8).to(dtype).float(), torch.randn(20, 8).to(dtype).float(), torch.arange(23) % 20
    targets[[3, 17]] = -1
    ours = gradients(lambda x, h: fused.linear_cross_entropy(x, h, targets, dtype), x, head)
    plain = gradients(lambda x, h: F.cross_entropy(x @ h.t(), targets, ignore_index=-1), x, head)
    assert ours[0].dtype == torch.float32
    assert_same(ours, plain, tolerance)


def test_linear_cross_entropy_without_targets_or_gradients():
    x, head = torch.randn(4, 8), torch.randn(20, 8)
    assert fused.linear_cross_entropy(x, head, torch.full((4,), -1), torch.float32).item() == 0
    x.requires_grad_()
    fused.linear_cross_entropy(x, head, torch.zeros(4, dtype=torch.int64), torch.float32).backward()
    assert head.grad is None and x.grad.abs().sum() > 0


def test_linear_cross_entropy_is_stable_for_large_logits():
    x, head = torch.full((2, 4), 100.0), torch.tensor([[100.0] * 4, [-100.0] * 4])
    loss = fused.linear_cross_entropy(x, head, torch.tensor([0, 1]), torch.float32)
    assert loss.item() == pytest.approx(40000)
