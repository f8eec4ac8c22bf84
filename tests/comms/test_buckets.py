from __future__ import annotations

import torch
from torch import nn

from turbopump.comms.data_parallel import MIB, layout, split_into_buckets


def of(*sizes: int, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.empty(size, dtype=dtype)) for size in sizes]


def test_buckets_are_in_reverse_order_and_bounded() -> None:
    parameters = of(100, 100, 100, 50, 1000)
    buckets = split_into_buckets(parameters, bucket_bytes=800)
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[1000], [50, 100], [100, 100]]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in reversed(parameters)]
    assert all(sum(p.numel() * 4 for p in bucket) <= 800 or len(bucket) == 1 for bucket in buckets)
    assert split_into_buckets([], 800) == []


def test_first_bucket_is_small() -> None:
    quarter = MIB // 16  # elements of a quarter of a MiB
    buckets = split_into_buckets(of(*[quarter] * 20), bucket_bytes=2 * MIB)
    assert [len(bucket) for bucket in buckets] == [4, 8, 8]


def test_one_dtype_a_bucket() -> None:
    mixed = [p for pair in zip(of(10, 10, 10), of(10, 10, 10, dtype=torch.bfloat16)) for p in pair]
    buckets = split_into_buckets(mixed, 800)
    assert [{p.dtype for p in bucket} for bucket in buckets] == [{torch.bfloat16}, {torch.float32}]
    assert [len(bucket) for bucket in buckets] == [3, 3]


def test_layout_follows_dense_strides() -> None:
    image = torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert layout(image) == (image.shape, image.stride())
    assert layout(torch.empty(3, 4).T) == (torch.Size([4, 3]), (1, 4))
    assert layout(torch.empty(4, 8)[:, ::2])[1] == (4, 1)  # with gaps
    assert layout(torch.empty(1, 4).expand(3, 4))[1] == (4, 1)  # overlapping
    assert layout(torch.empty(()))[1] == ()
