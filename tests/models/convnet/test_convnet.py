import pytest
import torch

from turbopump.core.errors import DatasetError
from turbopump.models.convnet import model as module
from turbopump.models.convnet.config import ConvnetConfig
from turbopump.models.convnet.workload import workload

CONFIGS = [
    (ConvnetConfig(width=16, blocks=(1, 2), in_channels=1), 8, 8),
    (ConvnetConfig(width=8), 32, 24),
    (ConvnetConfig(width=8, blocks=(1, 2, 1), bottleneck=True, stem="imagenet"), 65, 64),
]
SAMPLES = 4


def describe(config, height, width, dtype="fp32"):
    return workload(config, SAMPLES, {"height": height, "width": width, "channels": config.in_channels}, dtype)


def make(config, height, width):
    torch.manual_seed(0)
    images = torch.randn(SAMPLES, config.in_channels, height, width)
    return module.build(config), (images, torch.arange(SAMPLES) % config.num_classes)


@pytest.mark.parametrize("config,params", [
    (ConvnetConfig(num_classes=1000, stem="imagenet"), 11_689_512),
    (ConvnetConfig(num_classes=1000, stem="imagenet", blocks=(3, 4, 6, 3), bottleneck=True), 25_557_032),
    *((c, None) for c, _, _ in CONFIGS),
])  # fmt: skip
def test_parameters_are_exact(config, params):
    """ResNet-18 and ResNet-50 have the published counts."""
    with torch.device("meta"):
        model = module.build(config)
    assert describe(config, 64, 64).params == sum(p.numel() for p in model.parameters())
    assert params in (None, describe(config, 64, 64).params)


@pytest.mark.parametrize("config,height,width", CONFIGS)
def test_flops_are_those_torch_counts(config, height, width, counted_flops):
    model, batch = make(config, height, width)
    counted = sum(counted_flops(lambda: module.loss(model, batch)).values())
    assert describe(config, height, width).cost.flops == pytest.approx(counted, rel=0.01)


def test_resnet50_flops_are_the_published_ones():
    """4.1 GMAC an image of 224 x 224 forward (torchvision's table: 4.09)."""
    config = ConvnetConfig(num_classes=1000, stem="imagenet", blocks=(3, 4, 6, 3), bottleneck=True)
    one = workload(config, 1, {"height": 224, "width": 224, "channels": 3}, "fp32")
    assert one.forward_cost.flops / 2e9 == pytest.approx(4.09, rel=0.01)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("config,height,width", CONFIGS)
def test_kept_bytes_are_what_autograd_saves(config, height, width, dtype, saved_bytes):
    model, batch = make(config, height, width)

    def run():
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return module.loss(model, batch)

    assert describe(config, height, width, dtype).kept_bytes("none") == pytest.approx(saved_bytes(model, run), rel=0.05)


def test_bf16_loss_agrees_and_is_fp32():
    model, batch = make(*CONFIGS[1])
    exact = module.loss(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = module.loss(model, batch)
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.01)


def test_metrics_count_right_labels():
    model, (images, _) = make(*CONFIGS[0])
    model.eval()
    with torch.no_grad():
        said = model(images).argmax(-1)
    wrong_first = said.clone()
    wrong_first[0] = (said[0] + 1) % 10
    assert module.metrics(model, (images, said))["accuracy"] == (4.0, 4.0)
    found = module.metrics(model, (images, wrong_first))
    assert found["accuracy"] == (3.0, 4.0)
    assert found["loss"][0] / found["loss"][1] == pytest.approx(module.loss(model, (images, wrong_first)).item())


def test_labels_beyond_the_classes_are_a_typed_error():
    model, (images, labels) = make(*CONFIGS[0])
    with pytest.raises(DatasetError, match="num_classes to at least 13"):
        module.loss(model, (images, labels + 9))


def test_problems_name_value_and_remedy():
    assert "at least one stage" in ConvnetConfig(blocks=()).problems()[0]
    assert not ConvnetConfig().problems()


@pytest.mark.slow
def test_it_learns_the_digits():
    """Over 97 % of held-out 8 x 8 digits after a plain loop of about ten seconds on one core."""
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    torch.manual_seed(0)
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16 - 0.5
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    held, rest = order[:400], order[400:]
    model = module.build(ConvnetConfig(in_channels=1, width=16, blocks=(1, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=8 * (len(rest) // 64))
    for _ in range(8):
        for batch in rest[torch.randperm(len(rest))].split(64)[: len(rest) // 64]:
            optimizer.zero_grad()
            module.loss(model, (images[batch], labels[batch])).backward()
            optimizer.step()
            schedule.step()
    right, count = module.metrics(model.eval(), (images[held], labels[held]))["accuracy"]
    assert count == 400
    assert right / count > 0.97
