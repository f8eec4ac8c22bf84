"""A residual network (He et al. 2016, "v1.5": a bottleneck strides in its 3x3 convolution, as MLPerf's ResNet-50)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from turbopump.core.config import PositiveInt, missing_sizes, setting
from turbopump.core.plugins import ModelKind
from turbopump.models.convnet.workload import workload

BOTTLENECK_EXPANSION = 4


@dataclass(frozen=True)
class ConvnetConfig:
    """Sizes of the model. ResNet-18: blocks [2, 2, 2, 2]; ResNet-50: blocks [3, 4, 6, 3] with bottleneck = true.

    Image size belongs to the data: the last map is averaged over its positions, so any size fits.
    """

    kind: Literal["convnet"] = setting("convnet", "residual network for images")
    num_classes: PositiveInt = setting(10, "number of labels")
    in_channels: PositiveInt = setting(3, "channels of the images: 1 grey, 3 colour")
    width: PositiveInt = setting(64, "channels of the first stage; each further stage doubles them")
    blocks: tuple[PositiveInt, ...] = setting((2, 2, 2, 2), "residual blocks of each stage; stages halve the map")
    bottleneck: bool = setting(False, "1x1, 3x3, 1x1 blocks with 4 times the channels outside (ResNet-50 and deeper)")
    stem: Literal["small", "imagenet"] = setting(
        "small", "`small`: a 3x3 convolution, for images up to about 64; `imagenet`: 7x7 stride 2 and a 3x3 max-pool"
    )

    @property
    def expansion(self) -> int:
        return BOTTLENECK_EXPANSION if self.bottleneck else 1

    def problems(self) -> list[str]:
        """Cross-field problems, each with what is given, allowed and to be done."""
        if not self.blocks:
            return ["blocks: [] given; at least one stage is needed: use e.g. [2, 2, 2, 2]"]
        return []

    def misfits(self, shape: Mapping[str, int]) -> list[str]:
        """Sizes that do not fit those of the dataset's samples."""
        if missing := missing_sizes("convnet", shape, ("channels", "height", "width"), '"digits" or "arrays"'):
            return missing
        found = []
        channels, classes = shape["channels"], shape.get("classes", 0)
        if self.in_channels != channels:
            found.append(f"in_channels: {self.in_channels} given; the images have {channels}: use {channels}")
        if self.num_classes < classes:
            found.append(f"num_classes: {self.num_classes} given; the dataset has {classes}: use {classes} or more")
        return found


KIND = ModelKind(config=ConvnetConfig, workload=workload, module="turbopump.models.convnet.model")
