import pytest
import torch

from turbopump.models.deepspeech2.recurrent import BidirectionalRnn


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_output_and_gradients_are_those_of_torchs_layer_on_a_packed_sequence(kind):
    torch.manual_seed(0)
    layer = BidirectionalRnn(kind, 7, 5)
    x, lengths = torch.randn(9, 3, 7), torch.tensor([9, 4, 6])
    mask = (torch.arange(9)[:, None] < lengths).unsqueeze(-1)
    direction = torch.randn(9, 3, 5)
    results = []
    for run in (lambda x: layer(x, lengths, torch.float32), lambda x: layer.packed(x, lengths)):
        layer.zero_grad()
        given = x.clone().requires_grad_()
        y = run(given) * mask
        (y * direction).sum().backward()
        results.append([y.detach(), given.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_bf16_is_close_to_fp32(kind):
    torch.manual_seed(0)
    layer = BidirectionalRnn(kind, 32, 16)
    x, lengths = torch.randn(20, 4, 32), torch.tensor([20, 20, 11, 5])
    mask = (torch.arange(20)[:, None] < lengths).unsqueeze(-1)
    exact, rough = (layer(x, lengths, dtype) * mask for dtype in (torch.float32, torch.bfloat16))
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0, atol=0.03)
