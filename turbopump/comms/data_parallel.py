"""Gradient synchronisation of data parallelism: buckets that never change, summed while backward goes on.

Parameters are put in buckets in the reverse of their order in the module, about the order in which backward finishes
them. A bucket is one flat tensor; it is all-reduced (asynchronously, over the group, SUM) once all its gradients are
there and all buckets before it have started, so that ranks never disagree on the order. Afterwards each `.grad` is a
view of its bucket: gradients are copied in, never out. `finish` waits, in `span("communication")`: that is the exposed
part on CPU; on CUDA it only makes the current stream wait. Why not DistributedDataParallel: docs/decisions/0002.

Each bucket ends in one number a parameter, 1 where this rank has a gradient: a parameter without one on all ranks
keeps `grad = None`, as in one process, and is left alone by the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turbopump.comms import process_group
from turbopump.comms.process_group import peer_errors
from turbopump.core.errors import UsageError
from turbopump.core.files import digest, to_json
from turbopump.core.spans import span

MIB = 1 << 20
ALIGNMENT_BYTES = 64


class GradientSync:
    """Sums the gradients of `module` over the ranks of `group`, overlapped with backward.

    Construction is collective: it compares the parameters of all ranks (16 bytes) and broadcasts parameters and
    buffers from rank 0. Only parameters that require gradients now take part. Reentrant recomputation
    (`checkpoint(use_reentrant=True)`) is not supported: it runs a parameter's hook more than once.
    """

    def __init__(
        self, module: nn.Module, *, group: dist.ProcessGroup | None = None, bucket_bytes: int = 25 * MIB
    ) -> None:
        self._group = group
        check_same_parameters(module, group)
        process_group.broadcast([*module.parameters(), *module.buffers()], 0, group)
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
        self._buckets = [_Bucket(part) for part in split_into_buckets(trained, bucket_bytes)]
        self._started = 0
        self._accumulating = False
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, bucket, index))
            for bucket in self._buckets
            for index, parameter in enumerate(bucket.parameters)
        ]

    @property
    def grad_bytes(self) -> int:
        """Bytes all-reduced in a step."""
        return sum(bucket.flat.numel() * bucket.flat.element_size() for bucket in self._buckets)

    @property
    def bucket_sizes(self) -> list[int]:
        """Parameters in each bucket, in the order the buckets are sent."""
        return [len(bucket.parameters) for bucket in self._buckets]

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward inside only adds to `.grad` on this rank; for all microbatches of a step but the last."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def finish(self) -> None:
        """Wait until every `.grad` is the sum over ranks; to be called once a step by all ranks.

        Raises `RankError` where another rank is gone.
        """
        if any(parameter.requires_grad for parameter in self._frozen):
            raise UsageError(
                "a parameter that was frozen when training began requires gradients now: unfreeze before train()"
            )
        with span("communication"), peer_errors("all-reduce of gradients"):
            for bucket in self._buckets[self._started :]:
                bucket.start(self._group)
            for bucket in self._buckets:
                bucket.finish()
            self._started = 0

    def remove(self) -> None:
        """Take the hooks off the module, which is then as before."""
        for hook in self._hooks:
            hook.remove()

    def _arrived(self, bucket: _Bucket, index: int, _: Tensor) -> None:
        if self._accumulating:
            return
        if index not in bucket.awaited:
            raise UsageError(
                "backward ran twice in one step: run all microbatches but the last inside GradientSync.accumulate()"
            )
        bucket.awaited.remove(index)
        with peer_errors("all-reduce of gradients"):
            while self._started < len(self._buckets) and not self._buckets[self._started].awaited:
                self._buckets[self._started].start(self._group)
                self._started += 1


class _Bucket:
    """Some parameters' gradients in one flat tensor, and the state of its all-reduce."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        first = self.parameters[0]
        aligned = ALIGNMENT_BYTES // first.element_size()  # else vectorised kernels take their slow path
        starts, size = [], 0
        for parameter in self.parameters:
            starts.append(size)
            size += -(-parameter.numel() // aligned) * aligned
        self.flat = torch.zeros(size + len(starts), dtype=first.dtype, device=first.device)
        self.views = [self.flat[start:].as_strided(*layout(p)) for start, p in zip(starts, self.parameters)]
        self.present = self.flat[size:]
        self._work: dist.Work | None = None
        self._reset()

    def _reset(self) -> None:
        self.awaited = set(range(len(self.parameters)))
        self.missing: list[int] = []

    @torch.no_grad()
    def start(self, group: dist.ProcessGroup | None) -> None:
        """Gather the gradients and start their all-reduce (SUM, the bucket's bytes, asynchronous)."""
        self.present.fill_(1)
        targets, sources = [], []
        for index, (parameter, view) in enumerate(zip(self.parameters, self.views)):
            grad = parameter.grad
            if grad is None:
                self.missing.append(index)
                self.present[index] = 0
                view.zero_()
            elif grad is not view:
                if grad.layout != torch.strided:
                    raise UsageError("sparse gradients cannot be synchronised: use nn.Embedding(sparse=False)")
                targets.append(view)
                sources.append(grad)
                parameter.grad = view
        if targets:
            torch._foreach_copy_(targets, sources)
        self._work = dist.all_reduce(self.flat, group=group, async_op=True)

    def finish(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work = None
        if self.missing:
            present = self.present.tolist()  # waits for the device, only where this rank had no gradient of its own
            for index in self.missing:
                self.parameters[index].grad = self.views[index] if present[index] else None
        self._reset()


def split_into_buckets(parameters: Sequence[nn.Parameter], bucket_bytes: int) -> list[list[nn.Parameter]]:
    """Parameters in reverse order, in runs of one dtype and device of at most `bucket_bytes` (or one parameter).

    A function of the parameters alone: the same on every rank and after every resume. As in DistributedDataParallel
    the first bucket is small (1 MiB), so that communication starts early.
    """
    buckets: list[list[nn.Parameter]] = []
    open_buckets: dict[tuple[torch.dtype, torch.device], tuple[list[nn.Parameter], int]] = {}
    limit = min(bucket_bytes, MIB)
    for parameter in reversed(parameters):
        kind = (parameter.dtype, parameter.device)
        size = parameter.numel() * parameter.element_size()
        bucket, used = open_buckets.get(kind, (None, 0))
        if bucket is None or used + size > limit:
            if bucket is not None:
                limit = bucket_bytes
            bucket, used = [], 0
            buckets.append(bucket)
        bucket.append(parameter)
        open_buckets[kind] = (bucket, used + size)
    return buckets


def layout(parameter: Tensor) -> tuple[torch.Size, tuple[int, ...]]:
    """Size and strides of the parameter where it is dense (also channels-last), else of a contiguous tensor."""
    extent = 1
    for stride, size in sorted(zip(parameter.stride(), parameter.shape)):
        if size > 1 and stride != extent:
            return parameter.shape, torch.empty(parameter.shape, device="meta").stride()
        extent *= size
    return parameter.shape, parameter.stride()


def check_same_parameters(module: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Raise `UsageError` on all ranks unless all have the same parameters (an all-reduce of 16 bytes, synchronous).

    Without this, ranks that differ hang or add up what does not belong together.
    """
    described = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in module.named_parameters()]
    mine = int(digest(to_json(described)), 16) >> 1
    low_high = torch.tensor([mine, -mine], dtype=torch.int64)
    with peer_errors("comparing the models of all ranks"):
        dist.all_reduce(low_high, dist.ReduceOp.MIN, group=group)
    if low_high[0].item() != -low_high[1].item():
        raise UsageError(
            "the ranks have built different models (names, shapes, dtypes or requires_grad differ): "
            "build the same one everywhere, independent of the rank"
        )
