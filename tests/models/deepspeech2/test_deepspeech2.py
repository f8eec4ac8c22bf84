import pytest
import torch

from turbopump.core.errors import DatasetError
from turbopump.models.deepspeech2 import model as module
from turbopump.models.deepspeech2.config import DeepSpeech2Config
from turbopump.models.deepspeech2.workload import workload

CONFIGS = [
    DeepSpeech2Config(hidden_size=64, num_layers=2, conv_channels=8, frequencies=40),
    DeepSpeech2Config(hidden_size=48, num_layers=3, conv_channels=4, frequencies=33, rnn="lstm"),
    DeepSpeech2Config(hidden_size=32, num_layers=1, conv_channels=4, frequencies=20, conv_frequencies=(11,),
                      conv_frames=(5,), num_labels=12),
]  # fmt: skip
FRAMES, LABELS = 120, 10


def make_batch(config, frames=FRAMES, padding=0.0, seed=0):
    """Four samples of different lengths, padded to `frames` with `padding`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([FRAMES, 100, 80, 119])
    features = torch.full((4, config.frequencies, frames), padding)
    for i, n in enumerate(lengths.tolist()):
        features[i, :, :n] = torch.randn(config.frequencies, n, generator=generator)
    labels = torch.randint(1, config.num_labels, (4, LABELS), generator=generator)
    return {"features_BFT": features, "lengths_B": lengths, "labels_BL": labels,
            "label_lengths_B": torch.tensor([10, 7, 3, 9])}  # fmt: skip


def describe(config, dtype="fp32", frames=FRAMES):
    return workload(config, 4, {"frequencies": config.frequencies, "frames": frames, "labels": LABELS}, dtype)


@pytest.mark.parametrize("config", [*CONFIGS, DeepSpeech2Config(), DeepSpeech2Config(rnn="lstm")])
def test_parameters_are_exact(config):
    with torch.device("meta"):
        model = module.build(config)
    assert describe(config).params == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_flops_are_those_torch_counts(config, counted_flops):
    torch.manual_seed(0)
    model, batch = module.build(config), make_batch(config)
    counted = sum(counted_flops(lambda: module.loss(model, batch)).values())
    assert describe(config).cost.flops == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config", CONFIGS)
def test_kept_bytes_are_what_autograd_saves(config, dtype, saved_bytes):
    torch.manual_seed(0)
    model, batch = module.build(config), make_batch(config)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return module.loss(model, batch)

    assert describe(config, dtype).kept_bytes("none") == pytest.approx(saved_bytes(model, run), rel=0.05)


@pytest.mark.parametrize("config", CONFIGS)
def test_padding_changes_neither_loss_nor_gradients(config):
    torch.manual_seed(0)
    model = module.build(config)
    results = []
    for frames, padding in ((FRAMES, 0.0), (FRAMES + 37, 5.0)):
        model.zero_grad()
        loss = module.loss(model, make_batch(config, frames, padding))
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters())])
    for short, long in zip(*results, strict=True):
        torch.testing.assert_close(long, short, rtol=1e-3, atol=1e-4)


def test_a_sample_is_evaluated_alone_as_in_a_batch():
    config = CONFIGS[0]
    torch.manual_seed(0)
    model, batch = module.build(config).eval(), make_batch(config)
    together = module.metrics(model, batch)["loss"][0]
    alone = 0.0
    for i, n in enumerate(batch["lengths_B"].tolist()):
        single = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        single["features_BFT"] = single["features_BFT"][:, :, :n]
        alone += module.metrics(model, single)["loss"][0]
    assert together == pytest.approx(alone, rel=1e-5)


def test_bf16_loss_agrees_and_is_fp32():
    config = CONFIGS[0]
    torch.manual_seed(0)
    model, batch = module.build(config), make_batch(config)
    exact = module.loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module.loss(model, batch)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)


def test_samples_without_alignment_have_no_loss_and_no_weight():
    config = CONFIGS[0]
    torch.manual_seed(0)
    model, batch = module.build(config).eval(), make_batch(config)
    whole = module.metrics(model, batch)["loss"]
    short = {**batch, "lengths_B": torch.tensor([FRAMES, 100, 80, 16])}  # 8 frames for 9 labels
    assert module.weight(batch) == 4
    assert module.weight(short) == 3
    total, count = module.metrics(model, short)["loss"]
    assert count == 3 and 0 < total < whole[0]
    repeated = {**batch, "labels_BL": torch.ones(4, LABELS, dtype=torch.int64), "lengths_B": torch.tensor([26] * 4)}
    assert module.weight(repeated) == 2  # 13 frames: 7 equal labels with blanks between just fit
    none = {**batch, "lengths_B": torch.tensor([2] * 4)}
    model.train()
    loss = module.loss(model, none)
    loss.backward()
    assert loss.item() == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_labels_beyond_the_model_are_a_typed_error():
    config = CONFIGS[0]
    model, batch = module.build(config), make_batch(config)
    batch["labels_BL"][0, 0] = config.num_labels + 3
    with pytest.raises(DatasetError, match=r"num_labels to at least 33"):
        module.loss(model, batch)


def test_greedy_reading_and_edit_distance():
    best = torch.tensor([[0, 1, 1, 0, 1, 2, 2], [3, 3, 0, 0, 3, 1, 1]]).t()
    log_probs = torch.nn.functional.one_hot(best, 4).float()
    assert module.greedy(log_probs, torch.tensor([7, 5])) == [[1, 1, 2], [3, 3]]
    assert module.edit_distance("kitten", "sitting") == 3
    assert module.edit_distance("", "abc") == module.edit_distance("abc", "") == 3
    assert module.edit_distance([1, 2], [1, 2]) == 0


def test_problems_name_value_and_remedy():
    found = DeepSpeech2Config(conv_frequencies=(40, 21), conv_frames=(11,), num_labels=1).problems()
    assert [p.split(":")[0] for p in found] == ["conv_frames", "conv_frequencies", "num_labels"]
    assert "use 39 or 41" in found[1]
    assert not DeepSpeech2Config().problems()


@pytest.mark.slow
@pytest.mark.parametrize("rnn", ["gru", "lstm"])
def test_it_learns_to_read_tones(rnn):
    """Each label is a row of the spectrogram held for 8 to 14 frames, with silence between."""
    config = DeepSpeech2Config(num_labels=6, frequencies=20, conv_channels=8, conv_frequencies=(11, 5),
                               conv_frames=(5, 5), num_layers=2, hidden_size=32, rnn=rnn)  # fmt: skip
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)

    def tones(samples):
        labels = torch.randint(1, 6, (samples, 5), generator=generator)
        lengths = torch.randint(2, 6, (samples,), generator=generator)
        features, ends = 0.3 * torch.randn(samples, 20, 100, generator=generator), []
        for i in range(samples):
            at = 4
            for label in labels[i, : lengths[i]].tolist():
                hold = int(torch.randint(8, 15, (), generator=generator))
                features[i, label * 3, at : at + hold] += 2.0
                at += hold + 4
            ends.append(at)
        return {"features_BFT": features, "lengths_B": torch.tensor(ends), "labels_BL": labels,
                "label_lengths_B": lengths}  # fmt: skip

    model = module.build(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(120):
        loss = module.loss(model, tones(16))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
    errors, count = module.metrics(model.eval(), tones(64))["label_error_rate"]
    assert errors / count < 0.1
