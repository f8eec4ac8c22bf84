"""One rank of a measurement of collectives: `python -m turbopump.comms.bench_worker SETTINGS`, started by bench.py.

It connects to the socket of its parent (a file in a private directory), joins the other ranks over the loopback
interface (torch: gloo or NCCL) or MPI, and then does what it is told, one JSON message a command. While it waits it
sleeps on the socket, MPI or not: nothing spins between measurements. It ends at once when the parent is gone.

Time: ranks meet at a barrier, then each takes the wall time of a block of calls. The parent takes the slowest rank of
each block. Calls of a block depend on each other (reductions in place, broadcasts from every rank in turn, a message
to and fro), so that none runs ahead. Buffers are set anew before each block: sums would overflow.
"""

from __future__ import annotations

import json
import math
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol

import numpy as np

from turbopump.comms.ops import COLLECTIVES, Collective, Overlap
from turbopump.core.workload import DTYPE_BYTES

BLOCK_S = 5e-4  # of a block of calls, where sums allow that many: short, so that other work meets few of them
MOST_BLOCKS = 400
LEAST_BLOCKS, LEAST_SLOW_BLOCKS = 7, 3
LARGEST = {"fp16": 1e4}  # what a sum may grow to
SMALLEST = {"fp16": 1e-4}
MESSAGE_BYTES = 1 << 20
KINDS: dict[str, type[Collective]] = {kind.__name__: kind for kind in COLLECTIVES}

Run = Callable[[int], None]


class Transport(Protocol):
    """A way to communicate."""

    library: str

    def barrier(self) -> None: ...

    def max(self, value: float) -> float:
        """The largest of all ranks' values."""

    def prepare(self, op: Collective) -> tuple[Run, Callable[[], None]]:
        """Of an operation: a function that does it so many times, and one that sets the buffers anew."""


class Torch:
    """torch.distributed: gloo between CPU tensors or NCCL between one CUDA device a rank."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        import torch.distributed as dist

        self._torch, self._dist = torch, dist
        self.rank, self.ranks = settings["rank"], settings["ranks"]
        self.device = torch.device("cuda", self.rank) if settings["route"] == "nccl" else torch.device("cpu")
        torch.set_num_threads(settings["threads"])
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        dist.init_process_group(
            settings["route"],
            store=dist.FileStore(settings["store"], self.ranks),
            rank=self.rank,
            world_size=self.ranks,
            timeout=timedelta(seconds=settings["timeout_s"]),
        )
        self.library = f"gloo in torch {torch.__version__}"
        if self.device.type == "cuda":
            self.library = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"

    def barrier(self) -> None:
        self._dist.barrier()
        self.wait()

    def wait(self) -> None:
        if self.device.type == "cuda":
            self._torch.cuda.synchronize()

    def wait_for_products(self) -> None:
        if self.device.type == "cuda":
            self._torch.cuda.current_stream().synchronize()

    def all_reduce(self, tensor: Any) -> Any:
        """Start the sum of `tensor` over all ranks, its bytes, asynchronous: what is returned has to be waited for."""
        return self._dist.all_reduce(tensor, async_op=True)

    def max(self, value: float) -> float:
        tensor = self._torch.tensor([value], dtype=self._torch.float64, device=self.device)
        self._dist.all_reduce(tensor, self._dist.ReduceOp.MAX)
        return float(tensor)

    def buffer(self, dtype: str, elements: int) -> Any:
        torch = self._torch
        types = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16,
                 "int8": torch.int8, "int64": torch.int64}  # fmt: skip
        if dtype not in types:
            raise ValueError(f"{dtype} is not measured: use one of {', '.join(types)}")
        values = torch.rand(elements, device=self.device) + 0.5
        small = dtype not in ("int8", "int64")
        return (values * SMALLEST.get(dtype, 1e-15) if small else values + 0.5).to(types[dtype])

    def prepare(self, op: Collective) -> tuple[Run, Callable[[], None]]:
        dist, ranks = self._dist, self.ranks
        share = max(1, math.ceil(op.bytes / DTYPE_BYTES[op.dtype] / ranks))
        elements = max(1, op.bytes // DTYPE_BYTES[op.dtype])
        if type(op).__name__ in ("AllGather", "ReduceScatter", "AllToAll"):
            elements = share * ranks
        source, whole = self.buffer(op.dtype, elements), self.buffer(op.dtype, elements)
        mine, other = whole[:share].clone(), self._torch.empty_like(whole)

        def message(_: int) -> None:
            for sender in (0, 1):
                if self.rank == sender:
                    dist.send(whole, 1 - sender)
                else:
                    dist.recv(whole, sender)

        once: dict[str, Callable[[int], object]] = {
            "AllReduce": lambda _: dist.all_reduce(whole),
            "AllGather": lambda _: dist.all_gather_single(whole, mine),
            "ReduceScatter": lambda _: dist.reduce_scatter_single(mine, whole),
            "AllToAll": lambda _: dist.all_to_all_single(other, whole),
            "Broadcast": lambda call: dist.broadcast(whole, call % ranks),
            "Send": message,
            "Barrier": lambda _: dist.barrier(),
        }
        call = once[type(op).__name__]

        def run(calls: int) -> None:
            for number in range(calls):
                call(number)
            self.wait()

        def restore() -> None:
            whole.copy_(source)

        return run, restore

    def close(self) -> None:
        self._dist.destroy_process_group()


class Mpi:
    """MPI through mpi4py, between arrays of numpy."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from mpi4py import MPI

        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self.rank, self.ranks = self._world.Get_rank(), self._world.Get_size()
        self.library = MPI.Get_library_version().split(",")[0].splitlines()[0].strip()
        if self.ranks != settings["ranks"]:
            raise RuntimeError(
                f"mpi4py's library ({self.library}) sees {self.ranks} ranks, and {settings['mpiexec']} started "
                f"{settings['ranks']}: they belong to different MPIs"
            )

    def barrier(self) -> None:
        self._world.Barrier()

    def max(self, value: float) -> float:
        return float(self._world.allreduce(value, self._mpi.MAX))

    def prepare(self, op: Collective) -> tuple[Run, Callable[[], None]]:
        types = {"fp64": np.float64, "fp32": np.float32, "int8": np.int8, "int64": np.int64}
        if op.dtype not in types:
            raise ValueError(f"MPI has no {op.dtype}: use one of {', '.join(types)}")
        world, in_place, ranks = self._world, self._mpi.IN_PLACE, self.ranks
        share = max(1, math.ceil(op.bytes / DTYPE_BYTES[op.dtype] / ranks))
        elements = max(1, op.bytes // DTYPE_BYTES[op.dtype])
        if type(op).__name__ in ("AllGather", "ReduceScatter", "AllToAll"):
            elements = share * ranks
        values = np.random.default_rng(0).random(elements) + 0.5
        source = (values * 1e-15 if op.dtype.startswith("fp") else values + 0.5).astype(types[op.dtype])
        whole = source.copy()
        mine, other = whole[:share].copy(), np.ones_like(whole)

        def message(_: int) -> None:
            for sender in (0, 1):
                if self.rank == sender:
                    world.Send(whole, 1 - sender)
                else:
                    world.Recv(whole, sender)

        once: dict[str, Callable[[int], object]] = {
            "AllReduce": lambda _: world.Allreduce(in_place, whole),
            "AllGather": lambda _: world.Allgather(mine, whole),
            "ReduceScatter": lambda _: world.Reduce_scatter_block(whole, mine),
            "AllToAll": lambda _: world.Alltoall(whole, other),
            "Broadcast": lambda call: world.Bcast(whole, call % ranks),
            "Send": message,
            "Barrier": lambda _: world.Barrier(),
        }
        call = once[type(op).__name__]

        def run(calls: int) -> None:
            for number in range(calls):
                call(number)

        return run, lambda: np.copyto(whole, source)

    def close(self) -> None:
        self._mpi.Finalize()


def measure(transport: Transport, op: Collective, budget_s: float) -> dict[str, Any]:
    """Seconds of one call in each block, on this rank; all ranks take the same number of blocks of the same length."""
    run, restore = transport.prepare(op)
    ways = 2 if type(op).__name__ == "Send" else 1
    run(2)  # buffers are touched, connections made
    most_calls = calls_before_overflow(op) if type(op).__name__ == "AllReduce" else 1 << 10
    tries = []
    for _ in range(3):
        restore()
        tries.append(_timed(run, min(2, most_calls), transport))
    calls = max(1, min(most_calls, math.ceil(BLOCK_S / transport.max(min(tries)))))
    seconds: list[float] = []
    begin, elapsed_s = time.perf_counter(), 0.0
    while len(seconds) < MOST_BLOCKS and (elapsed_s < budget_s or few_blocks(len(seconds), elapsed_s, budget_s)):
        for _ in range(LEAST_SLOW_BLOCKS):
            restore()
            seconds.append(_timed(run, calls, transport) / ways)
        elapsed_s = transport.max(time.perf_counter() - begin)  # all ranks must go on, or none
    return {"seconds": seconds, "calls": calls}


def few_blocks(blocks: int, elapsed_s: float, budget_s: float) -> bool:
    """Whether slow blocks are too few to be a row though the time is over; nothing takes more than 4 times its time."""
    return blocks < LEAST_BLOCKS and elapsed_s < 4 * budget_s


def calls_before_overflow(op: Collective) -> int:
    """Sums in place grow by the number of ranks each time."""
    largest, smallest = LARGEST.get(op.dtype, 1e30), SMALLEST.get(op.dtype, 1e-15)
    return max(1, int(math.log(largest / smallest) / math.log(max(2, op.ranks))))


def _timed(run: Run, calls: int, transport: Transport, *, per_call: bool = True) -> float:
    transport.barrier()
    begin = time.perf_counter()
    run(calls)
    elapsed = time.perf_counter() - begin
    return elapsed / calls if per_call else elapsed


def measure_overlap(transport: Torch, op: Overlap, budget_s: float) -> dict[str, Any]:
    """Seconds of an all-reduce and of a product: each alone, and both at once. Three phases a round, in turns.

    While the all-reduce runs, products are computed one after the other until it has ended: both are then under way all
    the time. Its end is noticed after the product at hand: half of one is taken off.
    """
    import torch

    whole = transport.buffer(op.dtype, op.bytes // DTYPE_BYTES[op.dtype])
    source = whole.clone()
    x, y = (transport.buffer(op.dtype, op.size**2).reshape(op.size, op.size) for _ in range(2))
    x, y, out = x / x.mean(), y / y.mean(), torch.empty_like(x)

    def products(going_on: Callable[[int], bool]) -> tuple[float, float]:
        """Seconds of all, and of one."""
        begin, number = time.perf_counter(), 0
        while going_on(number) or not number:
            torch.mm(x, y, out=out)
            transport.wait_for_products()
            number += 1
        elapsed = time.perf_counter() - begin
        return elapsed, elapsed / number

    def communicate(_: int) -> None:
        transport.all_reduce(whole).wait()
        transport.wait()

    def one_round() -> tuple[float, float, float, float]:
        whole.copy_(source)
        alone_s = _timed(communicate, 1, transport)
        whole.copy_(source)
        transport.barrier()
        until = time.perf_counter() + alone_s
        _, product_alone_s = products(lambda _: time.perf_counter() < until)
        transport.barrier()
        work = transport.all_reduce(whole)
        both_s, product_s = products(lambda _: not work.is_completed())
        work.wait()
        return alone_s, both_s - product_s / 2, product_alone_s, product_s

    one_round()
    begin = time.perf_counter()
    one_round()
    round_s = transport.max(time.perf_counter() - begin)
    rounds = max(LEAST_BLOCKS, min(MOST_BLOCKS, int(budget_s / round_s)))
    return {"rounds": [one_round() for _ in range(rounds)]}


def _obey(channel: socket.socket, transport: Any, commands: queue.SimpleQueue[bytes]) -> None:
    while (command := json.loads(commands.get()))["do"] != "stop":
        cpu_s = time.process_time()
        try:
            if command["do"] == "overlap":
                answer = measure_overlap(transport, Overlap(**command["op"]), command["budget_s"])
            else:
                op = KINDS[command["kind"]](**command["op"])
                answer = measure(transport, op, command["budget_s"])
        except Exception as error:
            answer = {"problem": (str(error).splitlines() or [type(error).__name__])[0][:300]}
        answer["cpu_s"] = time.process_time() - cpu_s
        channel.send(json.dumps(answer).encode())


def _listen(channel: socket.socket, commands: queue.SimpleQueue[bytes]) -> None:
    while message := channel.recv(MESSAGE_BYTES):
        commands.put(message)
    os._exit(1)  # the parent is gone: even when a collective hangs


def main(argument: str) -> None:
    settings = json.loads(argument)
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.connect(settings["address"])
    commands: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(channel, commands), daemon=True).start()
    hello: dict[str, Any] = {"pid": os.getpid(), "rank": settings["rank"]}
    try:
        transport = Mpi(settings) if settings["route"] == "mpi" else Torch(settings)
    except Exception as error:
        channel.send(json.dumps({**hello, "problem": str(error)[:300] or type(error).__name__}).encode())
        os._exit(1)
    channel.send(json.dumps({**hello, "rank": transport.rank, "library": transport.library}).encode())
    _obey(channel, transport, commands)
    transport.close()
    sys.stdout.flush()
    os._exit(0)  # not through the interpreter's end: the thread that listens would hold it up


if __name__ == "__main__":
    main(sys.argv[1])
