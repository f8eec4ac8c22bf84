"""The residual network in PyTorch: `build`, `loss`, `weight`, `metrics`.

A batch is `(image_BCHW float32, label_B integer)`. Initialisation: convolutions He-normal (fan out), the last batch
norm of each block zero, so that it starts as the identity (Goyal et al. 2017). Activations are channels-last, which
oneDNN and cuDNN run faster. Batch norm takes its statistics over the images a process computes at once.

Shapes: B batch, C channels, H height, W width, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbopump.core.errors import DatasetError
from turbopump.models.convnet.config import ConvnetConfig
from turbopump.models.convnet.kernels import ROUTES

Batch = tuple[Tensor, Tensor]
__all__ = ["ROUTES", "build", "loss", "metrics", "weight"]


class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.norm(self.conv(x_BCHW))


class Residual(nn.Module):
    def __init__(self, inputs: int, channels: int, stride: int, bottleneck: bool, expansion: int) -> None:
        super().__init__()
        outputs = channels * expansion
        if bottleneck:
            sizes = [(inputs, channels, 1, 1), (channels, channels, 3, stride), (channels, outputs, 1, 1)]
        else:
            sizes = [(inputs, channels, 3, stride), (channels, outputs, 3, 1)]
        self.layers = nn.ModuleList(ConvNorm(*size) for size in sizes)
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = x_BCHW
        for layer in self.layers[:-1]:
            y = F.relu(layer(y), inplace=True)
        return F.relu(self.layers[-1](y) + self.shortcut(x_BCHW), inplace=True)


class Convnet(nn.Module):
    def __init__(self, config: ConvnetConfig) -> None:
        super().__init__()
        self.config = config
        imagenet = config.stem == "imagenet"
        self.stem = ConvNorm(config.in_channels, config.width, 7 if imagenet else 3, 2 if imagenet else 1)
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()
        self.stages = nn.ModuleList()
        inputs = config.width
        for stage, count in enumerate(config.blocks):
            channels = config.width * 2**stage
            blocks = nn.Sequential()
            for i in range(count):
                stride = 2 if stage and i == 0 else 1
                blocks.append(Residual(inputs, channels, stride, config.bottleneck, config.expansion))
                inputs = channels * config.expansion
            self.stages.append(blocks)
        self.head = nn.Linear(inputs, config.num_classes)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise every weight (see the top of the file)."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Residual):
                module.layers[-1].get_submodule("norm").get_parameter("weight").zero_()
        nn.init.normal_(self.head.weight, std=0.01)
        self.head.bias.zero_()

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Logits [B, K]."""
        x = image_BCHW.contiguous(memory_format=torch.channels_last)
        x = self.pool(F.relu(self.stem(x), inplace=True))
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((2, 3)))


def build(config: ConvnetConfig) -> Convnet:
    """A model with random weights from the global generator, fp32, on the default device (`meta` allocates nothing)."""
    return Convnet(config)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats per image, a fp32 scalar; raises `DatasetError` for labels beyond the classes."""
    image, label = batch
    return _cross_entropy(model(image), label)


def _cross_entropy(logits_BK: Tensor, label_B: Tensor) -> Tensor:
    try:
        return F.cross_entropy(logits_BK.float(), label_B.to(torch.int64))
    except IndexError as error:
        raise DatasetError(
            f"the batch holds label {int(label_B.max())}, the model has {logits_BK.shape[-1]} classes (0 to "
            f"{logits_BK.shape[-1] - 1}): set model.num_classes to at least {int(label_B.max()) + 1}"
        ) from error


def weight(batch: Batch) -> int:
    """Number of images."""
    return len(batch[1])


@torch.no_grad()
def metrics(model: nn.Module, batch: Batch) -> dict[str, tuple[float, float]]:
    """`loss`: summed nats; `accuracy`: right labels; each with the number of images."""
    image, label = batch
    logits = model(image)
    count = float(weight(batch))
    right = float((logits.argmax(-1) == label).sum())
    return {"loss": (float(_cross_entropy(logits, label)) * count, count), "accuracy": (right, count)}
