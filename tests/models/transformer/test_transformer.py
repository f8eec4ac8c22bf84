import math

import pytest
import torch

from turbopump.core.errors import DatasetError
from turbopump.models.transformer import model as module
from turbopump.models.transformer.config import TransformerConfig
from turbopump.models.transformer.workload import workload

CONFIGS = [
    TransformerConfig(hidden_size=64, num_layers=2),
    TransformerConfig(hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, tied=False, qk_norm=True),
    TransformerConfig(hidden_size=48, num_layers=1, num_heads=3, num_kv_heads=1, head_dim=32, mlp_size=100,
                      vocab_size=777, tied=False),
    TransformerConfig(hidden_size=64, num_layers=2, num_kv_heads=1, dropout=0.1, recompute="full"),
    TransformerConfig(hidden_size=64, num_layers=2, dropout=0.1),
]  # fmt: skip
LLAMA3_70B = TransformerConfig(vocab_size=128256, num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8,
                               mlp_size=28672, tied=False, rope_theta=500000.0)  # fmt: skip
SAMPLES, LENGTH = 3, 96


def build(config, seed=0):
    """A model whose zero-initialised projections are random, so that every path matters."""
    torch.manual_seed(seed)
    model = module.build(config)
    for name, parameter in model.named_parameters():
        if name.endswith("out.weight"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def make_batch(config, length=LENGTH):
    return torch.randint(0, config.vocab_size, (SAMPLES, length + 1), generator=torch.Generator().manual_seed(1))


def loss_of(model, batch, dtype):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
        return module.loss(model, batch)


@pytest.mark.parametrize("config", [*CONFIGS, LLAMA3_70B])
def test_parameters_are_exact(config):
    with torch.device("meta"):
        model = module.build(config)
    found = workload(config, 1, {"seq_len": 8}, "fp32").params
    assert found == sum(p.numel() for p in model.parameters())
    if config is LLAMA3_70B:
        assert found == 70_553_706_496  # as published with the weights


@pytest.mark.parametrize("config", [c for c in CONFIGS if c.recompute == "none"])
def test_flops_are_those_torch_counts(config, counted_flops):
    """On the meta device PyTorch's attention is batched products over the whole square, which its counter sees; of
    these, causal attention needs (T + 1) / 2T."""
    with torch.device("meta"):
        model = module.build(config)
        batch = torch.zeros(SAMPLES, LENGTH + 1, dtype=torch.int64)
        counted = counted_flops(lambda: module.loss(model, batch))
    attention = counted.pop("aten.bmm")
    expected = sum(counted.values()) + attention * (LENGTH + 1) / (2 * LENGTH)
    described = workload(config, SAMPLES, {"seq_len": LENGTH}, "fp32")
    assert attention > 0.02 * expected
    assert described.cost.flops == pytest.approx(expected, rel=0.01)
    assert described.forward_cost.flops * 3 == pytest.approx(described.cost.flops)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_kept_bytes_are_what_autograd_saves(config, dtype, saved_bytes):
    model, batch = build(config), make_batch(config)
    described = workload(config, SAMPLES, {"seq_len": LENGTH}, dtype)
    saved = saved_bytes(model, lambda: loss_of(model, batch, dtype))
    assert described.kept_bytes(config.recompute) == pytest.approx(saved, rel=0.05)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_recompute_changes_nothing(dtype):
    results = []
    for recompute in ("none", "full"):
        config = TransformerConfig(hidden_size=64, num_layers=2, dropout=0.1, recompute=recompute)
        model = build(config)
        torch.manual_seed(5)
        loss = loss_of(model, make_batch(config), dtype)
        loss.backward()
        results.append([loss.detach(), *(p.grad for p in model.parameters())])
    for plain, again in zip(*results, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=0)


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_bf16_loss_agrees_and_is_fp32(config):
    model, batch = build(config), make_batch(config)
    exact, rough = loss_of(model, batch, "fp32"), loss_of(model, batch, "bf16")
    assert rough.dtype == exact.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.005)
    grads = []
    for loss in (exact, rough):
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_loss_is_the_cross_entropy_of_the_logits(config):
    model, batch = build(config), make_batch(config)
    logits = model(batch[:, :-1])
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(module.loss(model, batch), expected)


def test_a_new_model_predicts_nearly_evenly():
    """A tied head starts by favouring the token it has just read: up to half a nat more."""
    for tied, surplus in ((True, 0.6), (False, 0.01)):
        config = TransformerConfig(tied=tied)
        torch.manual_seed(0)
        loss = module.loss(module.build(config), make_batch(config)).item()
        assert 0 < loss - math.log(config.vocab_size) + 0.01 < surplus + 0.01


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.uint16])
def test_any_integer_dtype_and_only_padding_is_left_out(dtype):
    config = CONFIGS[0]
    model, batch = build(config), make_batch(config)
    assert module.loss(model, batch.to(dtype)) == module.loss(model, batch)
    assert module.weight(batch.to(dtype)) == SAMPLES * LENGTH


def test_negative_ids_are_padding():
    config = CONFIGS[0]
    model, batch = build(config), make_batch(config)
    padded = batch.clone()
    padded[:, 50:] = -1
    assert module.weight(padded) == SAMPLES * 49
    torch.testing.assert_close(module.loss(model, padded), module.loss(model, batch[:, :50]))
    total, count = module.metrics(model, padded)["loss"]
    assert count == SAMPLES * 49
    assert total / count == pytest.approx(module.loss(model, padded).item())


def test_ids_beyond_the_vocabulary_are_a_typed_error():
    config = CONFIGS[0]
    batch = make_batch(config)
    batch[0, 3] = 300
    with pytest.raises(DatasetError, match="vocab_size to at least 301"):
        module.loss(build(config), batch)
    batch[0, 3] = 0
    batch[0, -1] = 300  # a target only
    with pytest.raises(DatasetError, match="vocab_size to at least 301"):
        module.loss(build(config), batch)


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_cached_logits_are_those_of_the_whole_sequence(config):
    model = build(config).eval()
    tokens = make_batch(config)[:, :20]
    with torch.no_grad():
        whole, cache, parts = model(tokens), [None] * config.num_layers, []
        for part in tokens.split([5, 1, 7, 1, 6], 1):
            parts.append(model(part, cache=cache))
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS[:3])
def test_greedy_generation_is_that_of_the_whole_forward(config):
    model, tokens = build(config), make_batch(config)[:, :6]
    expected = tokens
    with torch.no_grad():
        for _ in range(10):
            expected = torch.cat((expected, model.eval()(expected)[:, -1:].argmax(-1)), 1)
    model.train()
    found = module.generate(model, tokens, 10, temperature=0)
    assert torch.equal(found, expected)
    assert model.training


def test_sampling_depends_on_the_seed_alone_and_keeps_to_top_k():
    config = CONFIGS[0]
    model, tokens = build(config), make_batch(config)[:, :4]

    def sample(seed, top_k=0):
        return module.generate(model, tokens, 12, temperature=1.5, top_k=top_k, seed=seed)

    torch.rand(3)
    assert torch.equal(sample(1), sample(1))
    assert not torch.equal(sample(1), sample(2))
    assert torch.equal(sample(3, top_k=1), module.generate(model, tokens, 12, temperature=0))


def test_only_earlier_tokens_matter():
    config = CONFIGS[1]
    model, tokens = build(config).eval(), make_batch(config)[:, :LENGTH]
    changed = tokens.clone()
    changed[:, 70:] = 0
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :70], after[:, :70])
    assert not torch.allclose(before[:, 70:], after[:, 70:])


def test_dropout_acts_in_training_only():
    config = TransformerConfig(hidden_size=64, num_layers=2, dropout=0.5)
    model, batch = build(config), make_batch(config)
    assert module.loss(model, batch) != module.loss(model, batch)
    model.eval()
    assert module.loss(model, batch) == module.loss(model, batch)


def test_problems_name_value_and_remedy():
    assert "use 96 or 99" in TransformerConfig(hidden_size=98, num_heads=3).problems()[0]
    assert "head_dim: 33 must be even" in TransformerConfig(hidden_size=66, num_heads=2).problems()[0]
    assert "use one of 1, 2, 4" in TransformerConfig(num_heads=4, num_kv_heads=3).problems()[0]
    assert not LLAMA3_70B.problems()


@pytest.mark.slow
def test_it_learns_to_copy():
    """The second half of a sequence repeats the first: only attention can know, and the loss falls to near zero."""
    config = TransformerConfig(vocab_size=16, hidden_size=64, num_layers=2, num_heads=2)
    torch.manual_seed(0)
    model = module.build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for _ in range(300):
        half = torch.randint(0, 16, (32, 12))
        batch = torch.cat((half, half), 1)
        batch[:, :12] = half
        loss = module.loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.55 * math.log(16)  # 11 of 23 targets cannot be known
