"""Functions that ranks run in the tests; importable by name in spawned processes."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path

import psutil
import torch

from turbopump.comms import process_group
from turbopump.comms.environment import RankEnvironment
from turbopump.core.errors import CheckpointError, ConfigError, Interrupted

CPU = torch.device("cpu")


def join(timeout_s: float = 300.0) -> RankEnvironment:
    return process_group.init_process_group(CPU, timeout_s)


def tell(folder: Path, name: str, value: object) -> None:
    staging = folder / f".{name}"
    staging.write_text(json.dumps(value))
    staging.replace(folder / name)


def listeners(pid: int) -> list[str]:
    found = psutil.Process(pid).net_connections("inet")
    return [c.laddr.ip for c in found if c.status == psutil.CONN_LISTEN]


def describe(folder: Path, weight: torch.nn.Module) -> None:
    """Everything that a test wants to know of a healthy rank."""
    place = join()
    total = process_group.all_reduce_sum([float(place.rank), 1.0])
    tensor = process_group.all_reduce_sum(torch.full((3,), float(place.rank + 1)))
    with torch.no_grad():  # in memory of its own: another rank must not see this
        weight.weight.add_(place.rank)
    process_group.barrier()
    tell(folder, f"rank{place.rank}", {
        "sum": total, "tensor": tensor.tolist(), "world_size": process_group.world_size(),
        "any": [process_group.any_rank(place.rank == 1), process_group.any_rank(False)],
        "threads": torch.get_num_threads(), "omp": os.environ["OMP_NUM_THREADS"], "weight": weight.weight[0, 0].item(),
        "listeners": listeners(os.getpid()) + listeners(os.getppid()), "group": os.getpgid(0) == os.getpid(),
        "restored": "TORCHELASTIC_SIGNALS_TO_HANDLE" in os.environ,
    })  # fmt: skip
    print(f"out of rank {place.rank}")
    print(f"err of rank {place.rank}", file=sys.stderr)
    process_group.barrier()


def leave_group_open(folder: Path) -> None:
    place = join()
    process_group.barrier()
    (folder / f"done{place.rank}").touch()


def forever(folder: Path) -> None:
    """Steps with a collective each until told to stop, then writes a "checkpoint" and exits as a run does."""
    place = join()
    requests: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: requests.append(n))
    tell(folder, f"pid{place.rank}", os.getpid())
    while not process_group.any_rank(bool(requests)):
        time.sleep(0.02)
    if place.rank == 0:
        time.sleep(3)  # the others are done long before rank 0 has written
    stopped = requests[0] if requests else signal.SIGINT
    tell(folder, f"stopped{place.rank}", requests)
    raise Interrupted(f"stopped by {signal.Signals(stopped).name}, checkpoint written", stopped)


def deaf(folder: Path) -> None:
    """Never ends by itself, whatever it is told; `heard<rank>` is the signal it was told with."""
    place = join()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda n, _: tell(folder, f"heard{place.rank}", n))
    tell(folder, f"pid{place.rank}", os.getpid())
    while True:
        time.sleep(1000)


def fail(how: str) -> None:
    place = join()
    process_group.barrier()
    if place.rank == 1:
        if how == "typed":
            raise ConfigError(["model.num_layers: -1 given; must be at least 1"], "recipe.toml")
        if how == "foreign":
            raise ValueError("seven is no colour")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "crash":
            ctypes.string_at(0)
        if how == "exit":
            print("giving up now", flush=True)
            os._exit(7)
        if how == "sys.exit(0)":
            sys.exit(0)
    if how == "sys.exit(0)":
        return
    process_group.barrier()  # notices that rank 1 is gone


def fail_everywhere() -> None:
    join()
    raise CheckpointError("no space left on the device")
