"""Threads of this process that read ahead, for sources that work in C without the GIL.

Each slot of the ring keeps the source's `batch_buffers` for its steps and fills them again and again: fresh memory for
every batch costs a page fault a page. The threads know the queues, not the loader, so a loader that is forgotten ends
them; they are daemons that are stopped at exit before the interpreter goes.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Sequence
from queue import Empty, SimpleQueue
from typing import Any

import torch

from turbopump.core.errors import UsageError
from turbopump.data.read_ahead import Filled, Task
from turbopump.data.step_reading import StepReader, name_of, pinned, tensor_bytes

_JOIN_S = 5.0
"""A read cannot be broken off; a thread still in one after this long is left behind, to end after it."""


class ThreadReaders:
    """`num_threads` threads over `num_slots` slots. `reuse`: batches lie in the slots; else they are fresh memory."""

    restarts: int = 0  # a thread does not die alone

    def __init__(self, steps: StepReader, num_threads: int, num_slots: int, *, reuse: bool, pin_memory: bool) -> None:
        if steps.samples.seeded:
            raise UsageError(
                f"{name_of(steps.samples.source)} draws from the global random number generators, which threads share: "
                f"use loader.workers=processes, or randomness 'none' if it draws nothing"
            )
        self._todo: SimpleQueue[Task | None] = SimpleQueue()
        self._done: SimpleQueue[Filled] = SimpleQueue()
        stopping = threading.Event()
        slots: list[list[list[Any]]] = [[] for _ in range(num_slots)]
        arguments = (steps, self._todo, self._done, stopping, slots if reuse else None, pin_memory)
        if pin_memory:
            arguments = (*arguments, torch.cuda.current_device())  # type: ignore[assignment]
        self._threads = [
            threading.Thread(target=_read_tasks, args=arguments, name=f"turbopump-reader-{number}", daemon=True)
            for number in range(num_threads)
        ]
        self._stop = weakref.finalize(self, _stop_threads, os.getpid(), self._threads, self._todo, stopping)
        for thread in self._threads:
            thread.start()

    def submit(self, task: Task) -> None:
        self._todo.put(task)

    def finished(self, *, wait: bool) -> list[Filled]:
        found = [self._done.get()] if wait else []
        try:
            while True:
                found.append(self._done.get_nowait())
        except Empty:
            return found

    def close(self) -> None:
        self._stop()


def _read_tasks(
    steps: StepReader,
    todo: SimpleQueue[Task | None],
    done: SimpleQueue[Filled],
    stopping: threading.Event,
    slots: list[list[list[Any]]] | None,
    pin_memory: bool,
    device: int | None = None,
) -> None:
    if device is not None:
        torch.cuda.set_device(device)  # where pinned memory is known first; a thread begins on device 0
    while (task := todo.get()) is not None:
        read: list[list[Any]] = []
        failed: BaseException | None = None
        begin = time.perf_counter()
        try:
            for number in range(task.num_steps):
                if stopping.is_set():
                    return
                buffers = None if slots is None else steps.kept_buffers(slots[task.slot], number)
                batches = steps.read(task.first_step + number, buffers)
                read.append(pinned(batches) if pin_memory else batches)
        except BaseException as error:  # raised again by the loader, at its step
            failed = error
        end = time.perf_counter()
        nbytes = tensor_bytes(read[:1]) * len(read)
        done.put(Filled(task, read, end - begin, nbytes, end, failed))
        del read, failed  # a waiting thread holds no batch


def _stop_threads(
    pid: int, threads: Sequence[threading.Thread], todo: SimpleQueue[Task | None], stopping: threading.Event
) -> None:
    if os.getpid() != pid:  # in a forked child: these threads are not there
        return
    stopping.set()
    for _ in threads:
        todo.put(None)
    end = time.monotonic() + _JOIN_S
    for thread in threads:
        if thread.ident is not None and thread is not threading.current_thread():
            thread.join(max(0.0, end - time.monotonic()))
