"""How PyTorch computes a convolution on a CPU by itself, from the shape alone: by which library, over what channels.

`library` is PyTorch's own rule (`use_mkldnn` in ATen's Convolution.cpp, which tests compare it with): oneDNN, but its
native columns and product for 1 x 1 kernels of small batches in one thread and for single small images. oneDNN computes
blocks of 16 channels (a vector of AVX-512), and padded ones take as long as others: `padding`, from what its verbose
log shows of version 3.12. Without torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from turbopump.hardware.profile import Scalar

BLOCK = 16
SMALL_BATCH = 16  # below, 1 x 1 kernels are native in one thread
SMALL_IMAGE = 20_480  # elements up to which a single image is native
SMALL_KERNEL = 3  # a single image of larger kernels is oneDNN's always


def library(fields: Mapping[str, Scalar], threads: int) -> str:
    """`onednn` or `native`, of the fields of a `Conv1d` or `Conv2d` in fp32 or bf16; empty of other operations."""
    if "out_channels" not in fields or fields["dtype"] not in ("fp32", "bf16"):
        return ""
    c = _as_2d(fields)
    if fields["dtype"] == "bf16":
        return "onednn"
    plain = c["kernel_h"] == c["kernel_w"] == c["stride_h"] == c["stride_w"] == 1
    if plain and c["batch"] < SMALL_BATCH and threads == 1:
        return "native"
    small = c["batch"] * c["in_channels"] * c["height"] * c["width"] <= SMALL_IMAGE
    small_kernel = min(c["kernel_h"], c["kernel_w"]) <= SMALL_KERNEL
    return "native" if c["batch"] == 1 and c["groups"] == 1 and small and small_kernel else "onednn"


def padding(fields: Mapping[str, Scalar]) -> float:
    """FLOPs that oneDNN computes over those that count, at least 1. Groups are computed in several ways: counted as 1.

    Images of fewer channels than a block (the first layer's) are read as they are, unless they are the output; the
    gradient of the input through a stride does not pad what it sums over.
    """
    c = _as_2d(fields)
    if c["groups"] > 1:
        return 1.0
    waste_in, waste_out = _padded(c["in_channels"]), _padded(c["out_channels"])
    if fields["direction"] == "input_gradient":
        return waste_in * (waste_out if c["stride_h"] == c["stride_w"] == 1 else 1.0)
    return waste_out * (waste_in if c["in_channels"] >= BLOCK else 1.0)


def _padded(channels: int) -> float:
    return -(-channels // BLOCK) * BLOCK / channels


def _as_2d(fields: Mapping[str, Scalar]) -> dict[str, Any]:
    """The sizes as those of a Conv2d; a Conv1d is one of height 1."""
    given: Any = dict(fields)
    if "length" not in given:
        return given  # type: ignore[no-any-return]
    return {**given, "height": 1, "width": given["length"], "kernel_h": 1, "kernel_w": given["kernel"], "stride_h": 1,
            "stride_w": given["stride"]}  # fmt: skip
