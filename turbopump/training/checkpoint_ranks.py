"""What ranks tell each other about checkpoints: small JSON messages over gloo groups of their own.

The writer thread and the main thread each have a group that no other thread uses, and training's group is never
touched, so neither can disturb the order of another's collectives. A rank that fails sends its error as its message
and stays in step; a rank that dies breaks the connection, which the others get as an error at once.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from turbopump.core.errors import CheckpointError, CorruptCheckpointError, TurbopumpError
from turbopump.core.files import from_json, to_json


class Ranks:
    """One thread's channel to the other ranks; making one is collective over `group` (None: all ranks)."""

    def __init__(self, rank: int, world_size: int, group: Any, timeout_s: float) -> None:
        self.rank, self.world_size = rank, world_size
        self.group: Any = None
        if world_size > 1:
            members = dist.get_process_group_ranks(group) if group is not None else None
            timeout = timedelta(seconds=timeout_s)
            alone = members is not None  # the other ranks of the job need not take part
            self.group = dist.new_group(members, timeout=timeout, backend="gloo", use_local_synchronization=alone)

    def gather(self, message: Any) -> list[Any]:
        """Everyone's message (JSON-able), in order of rank. All-gather of its bytes; raises `CheckpointError`."""
        data = to_json(message)
        if self.world_size == 1:
            return [from_json(data)]
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
            dist.all_gather(sizes, torch.tensor([len(data)]), group=self.group)
            longest = max(int(size) for size in sizes)
            mine = torch.zeros(longest, dtype=torch.uint8)
            mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            blocks = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.world_size)]
            dist.all_gather(blocks, mine, group=self.group)
        except RuntimeError as error:
            raise _lost(error) from error
        return [from_json(bytes(block[: int(size)].numpy())) for block, size in zip(blocks, sizes)]

    def attempt(self, work: Callable[[], Any] | None) -> list[Any]:
        """Everyone's result of `work` (JSON-able; a rank without work gives None).

        If it failed anywhere, every rank raises: `CorruptCheckpointError` if bytes were damaged, else
        `CheckpointError`. So no rank goes on alone, and none waits for one that stopped.
        """
        message: dict[str, Any]
        try:
            message = {"result": work() if work is not None else None}
        except TurbopumpError as error:
            message = {"error": str(error), "corrupt": isinstance(error, CorruptCheckpointError)}
        except Exception as error:
            message = {"error": f"checkpoint: {type(error).__name__}: {error}", "corrupt": False}
        answers = self.gather(message)
        failed = {rank: answer for rank, answer in enumerate(answers) if "error" in answer}
        if failed:
            texts = list(dict.fromkeys(answer["error"] for answer in failed.values()))
            where = f"rank {', '.join(map(str, failed))}: " if self.world_size > 1 else ""
            fatal = not all(answer["corrupt"] for answer in failed.values())
            raise (CheckpointError if fatal else CorruptCheckpointError)(where + "; ".join(texts))
        return [answer["result"] for answer in answers]


class Vote:
    """A question that the main threads answer once a step, without waiting for each other.

    True at the call after the one where all ranks (or, with `any_rank`, one of them) said true; for one rank at
    once. All-reduce of 8 bytes, asynchronous: sent in one call and looked at in the next, when the others have long
    sent theirs. Every rank must cast equally often; the answer is the same on all.
    """

    def __init__(self, ranks: Ranks, *, any_rank: bool = False) -> None:
        self._ranks = ranks
        self._operation = dist.ReduceOp.MAX if any_rank else dist.ReduceOp.MIN
        self._pending: tuple[torch.Tensor, Any] | None = None

    def cast(self, mine: bool) -> bool:
        if self._ranks.world_size == 1:
            return mine
        if self.withdraw():
            return True
        vote = torch.tensor([int(mine)])
        self._pending = (vote, dist.all_reduce(vote, self._operation, group=self._ranks.group, async_op=True))
        return False

    def withdraw(self) -> bool:
        """The answer to the last cast, which is then forgotten; False where there was none."""
        if self._pending is None:
            return False
        (vote, work), self._pending = self._pending, None
        try:
            work.wait()
        except RuntimeError as error:
            raise _lost(error) from error
        return bool(vote.item())


def _lost(error: RuntimeError) -> CheckpointError:
    return CheckpointError(f"checkpoint: another rank died or did not answer ({str(error).splitlines()[0][:200]})")
