"""Which process of how many this is, in torchrun's variables (other launchers are made to set the same).

No torch here, so that anything may ask.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from turbopump.core.errors import UsageError


@dataclass(frozen=True)
class RankEnvironment:
    """Place of this process among all (`rank` of `world_size`) and among those of this host (`local_*`)."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def read(cls, variables: Mapping[str, str] | None = None) -> RankEnvironment:
        """From RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process where none is set.

        Raises `UsageError` for values that are no numbers or do not fit each other.
        """
        variables = os.environ if variables is None else variables
        rank = _number(variables, "RANK", 0)
        world_size = _number(variables, "WORLD_SIZE", 1)
        local_rank = _number(variables, "LOCAL_RANK", rank if "LOCAL_WORLD_SIZE" not in variables else 0)
        local_world_size = _number(variables, "LOCAL_WORLD_SIZE", world_size)
        for name, place, size in (("RANK", rank, world_size), ("LOCAL_RANK", local_rank, local_world_size)):
            if place >= size:
                raise UsageError(f"{name} ({place}) must be less than the number of processes ({size})")
        return cls(rank, world_size, local_rank, local_world_size)


def _number(variables: Mapping[str, str], name: str, default: int) -> int:
    text = variables.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise UsageError(f"{name}={text!r} must be a whole number from 0: unset it or start through a launcher")
    return int(text)
