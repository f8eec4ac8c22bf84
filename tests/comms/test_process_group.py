from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from turbopump.comms import process_group
from turbopump.core.errors import RankError, UsageError


def test_one_process_needs_no_group() -> None:
    place = process_group.init_process_group(torch.device("cpu"), 1.0)
    assert (place.rank, place.world_size) == (0, 1) and not dist.is_initialized()
    assert process_group.all_reduce_sum([1, 2.5]) == [1.0, 2.5]
    tensor = torch.ones(2)
    assert process_group.all_reduce_sum(tensor) is tensor
    assert process_group.any_rank(True) is True and process_group.any_rank(False) is False
    process_group.barrier()
    process_group.broadcast_buffers(torch.nn.BatchNorm1d(2))
    process_group.destroy()


def test_incomplete_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="WORLD_SIZE is 2, but MASTER_ADDR and MASTER_PORT are not set"):
        process_group.init_process_group(torch.device("cpu"), 1.0)


@pytest.mark.slow
def test_others_that_never_come(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RankError, match="rank 1: joining the process group failed"):
        process_group.init_process_group(torch.device("cpu"), 0.2)
