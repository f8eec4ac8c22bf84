"""Forked processes that read ahead, for samples made in Python: each has a GIL, and generators, of its own.

Batches travel in shared memory (`ring.SharedSlot`), only their structure in a pipe. A process that dies is forked again
with exactly the tasks it had; the step it died in is then read sample by sample, so that a second death there names the
record, and the loader raises at that step. `MAX_RESTARTS` deaths in all are forgiven: more are the machine's fault,
most often its memory, not a record's.

What ends them: a killed process leaves no memory behind (it has no name) and no pipe. The parent kills them when it
closes the loader, forgets it or exits; they end by themselves when the parent dies (`become_helper`, and the end of
their pipe). Signals are the parent's to handle.
"""

from __future__ import annotations

import mmap
import os
import pickle
import signal
import sys
import time
import traceback
import warnings
import weakref
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait

import numpy as np
import torch

from turbopump.core import errors
from turbopump.core.errors import SampleError, TurbopumpError
from turbopump.data.processes import become_helper
from turbopump.data.read_ahead import Filled, Task
from turbopump.data.ring import Message, SharedSlot
from turbopump.data.step_reading import StepReader, described, name_of, pinned

MAX_RESTARTS = 5
_LOOK_EVERY_S = 1.0
"""The end of a pipe tells of a death at once, unless a program that the process had started holds the pipe, too."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error on its way from a process: its type by name and its message."""

    kind: str
    message: str

    def error(self) -> TurbopumpError:
        cls = getattr(errors, self.kind, SampleError)
        try:
            return cls(self.message)
        except TypeError:  # a constructor with other arguments
            return SampleError(self.message)


@dataclass
class _Worker:
    """The parent's side of a process: its number, process id, pipes, and the tasks it has, oldest first."""

    number: int
    pid: int
    tasks: Connection
    results: Connection
    has: deque[Task] = field(default_factory=deque)

    def close(self) -> None:
        self.tasks.close()
        self.results.close()


class ProcessReaders:
    """`num_workers` forked processes over `num_slots` slots; `copy` gives every batch memory of its own."""

    def __init__(self, steps: StepReader, num_workers: int, num_slots: int, *, copy: bool, pin_memory: bool) -> None:
        self._steps = steps
        self._copy, self._pin_memory = copy and not pin_memory, pin_memory  # pinning copies
        self._slots = [SharedSlot() for _ in range(num_slots)]
        self._at = np.frombuffer(mmap.mmap(-1, num_workers * 24), np.int64).reshape(num_workers, 3)
        self._deaths: Counter[int] = Counter()
        self._workers: list[_Worker] = []
        self._end = weakref.finalize(self, _end_workers, os.getpid(), self._workers, self._slots)
        try:
            for number in range(num_workers):
                self._workers.append(self._start(number))
        except OSError as error:
            self.close()
            raise SampleError(
                f"a loader process cannot be started ({error.strerror}): use a smaller loader.num_workers"
            ) from error

    @property
    def restarts(self) -> int:
        return self._deaths.total()

    def submit(self, task: Task) -> None:
        if self._workers:  # else the last one was given up: its error waits at a step before this one
            self._give(min(self._workers, key=lambda worker: len(worker.has)), task)

    def finished(self, *, wait: bool) -> list[Filled]:
        found = self._received(0.0)
        while wait and not found:
            found = self._received(_LOOK_EVERY_S)
        return found

    def close(self) -> None:
        self._end()

    def _give(self, worker: _Worker, task: Task) -> None:
        worker.has.append(task)
        with suppress(BrokenPipeError):  # it has died: its tasks are given to the next one when that is seen
            worker.tasks.send(task)

    def _received(self, timeout_s: float) -> list[Filled]:
        ready = wait([worker.results for worker in self._workers], timeout_s)
        found: list[Filled] = []
        for worker in tuple(self._workers):
            if worker.results in ready:
                try:
                    found.append(self._filled(worker, worker.results.recv_bytes()))
                except (EOFError, OSError):
                    found += self._replace(worker)
            elif timeout_s and not ready and _has_ended(worker.pid):
                found += self._replace(worker)
        return found

    def _filled(self, worker: _Worker, received: bytes) -> Filled:
        message, failure, read_s, end_s = pickle.loads(received)
        task = worker.has.popleft()
        steps = self._slots[task.slot].read(message, copy=self._copy)
        if self._pin_memory:
            steps = pinned(steps)
        return Filled(task, steps, read_s, message.nbytes, end_s, None if failure is None else failure.error())

    def _start(self, number: int) -> _Worker:
        tasks_out, tasks_in = Pipe(duplex=False)
        results_out, results_in = Pipe(duplex=False)
        parent = os.getpid()
        sys.stdout.flush(), sys.stderr.flush()  # or the child writes it once more
        with _blocked_signals():  # so that none meets a child that does not ignore them yet
            pid = os.fork()
            if not pid:
                try:
                    for pipe in (tasks_in, results_out, *(p for w in self._workers for p in (w.tasks, w.results))):
                        pipe.close()
                    become_helper(parent)
                    torch.set_num_threads(1)  # the parent's OpenMP threads are not here: waiting for them is for ever
                    self._work(number, tasks_out, results_in)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
        tasks_out.close()
        results_in.close()
        return _Worker(number, pid, tasks_in, results_out)

    def _work(self, number: int, tasks: Connection, results: Connection) -> None:
        """A process reads its tasks, one after the other, until its parent has gone or kills it."""
        self._steps.samples.at = self._at[number]
        buffers: list[list[object]] = []
        has: deque[Task] = deque()
        with suppress(EOFError, OSError):
            while True:
                while not has or tasks.poll():
                    has.append(tasks.recv())
                task = has.popleft()
                coming = [step for later in has for step in _steps(later)]
                results.send_bytes(pickle.dumps(self._read(task, coming, buffers)))
                sys.stdout.flush()  # what a transform prints; this process is killed in the end

    def _read(
        self, task: Task, coming: list[int], buffers: list[list[object]]
    ) -> tuple[Message, Failure | None, float, float]:
        assert self._steps.samples.at is not None
        read: list[object] = []
        failure = None
        begin = time.perf_counter()
        try:
            for number, step in enumerate(_steps(task)):
                into = self._steps.kept_buffers(buffers, number)
                following = [*_steps(task)[number + 1 :], *coming]
                read.append(self._steps.read(step, into, task.one_by_one, following))
        except BaseException as error:  # a value: the parent raises it, at its step
            failure = _failure(error)
        end = time.perf_counter()
        self._steps.samples.at[2] = 0
        try:
            message = self._slots[task.slot].write(read)
        except SampleError as error:
            message, failure = self._slots[task.slot].write([]), _failure(error)
        return message, failure, end - begin, time.perf_counter()

    def _replace(self, dead: _Worker) -> list[Filled]:
        """Fork another process for the tasks of one that died; or, where that is given up, the error at its step."""
        how = _ended(dead.pid)
        dead.close()
        self._workers.remove(dead)
        step = dead.has[0].first_step if dead.has else -1
        self._deaths[step] += 1
        again = step >= 0 and self._deaths[step] > 1
        said = f"a loader process {how} {self._reading(dead)}"
        if again or self.restarts > MAX_RESTARTS:
            error = SampleError(
                f"{said}, {'again' if again else f'death {self.restarts} of this loader'}: if it was killed for lack "
                f"of memory, use a smaller loader.num_workers or loader.prefetch_steps; otherwise look at that sample"
            )
            if not dead.has:
                raise error
            return [Filled(dead.has[0], [], 0.0, 0, time.perf_counter(), error)]
        warnings.warn(f"{said}; it is started again with the same work", RuntimeWarning, stacklevel=2)
        worker = self._start(dead.number)
        self._workers.append(worker)
        for place, task in enumerate(dead.has):
            self._give(worker, replace(task, one_by_one=True) if place == 0 else task)
        return []

    def _reading(self, worker: _Worker) -> str:
        epoch, index, count = self._at[worker.number].tolist()
        source = self._steps.samples.source
        if not worker.has:
            return f"while it waited for work on {name_of(source)}"
        if not count:
            return f"at step {worker.has[0].first_step} of {name_of(source)}, between samples"
        more = f" or one of the {count - 1} read with it" if count > 1 else ""
        return f"while reading {described(source, epoch, index)}{more} of {name_of(source)}"


def _steps(task: Task) -> range:
    return range(task.first_step, task.first_step + task.num_steps)


def _failure(error: BaseException) -> Failure:
    if isinstance(error, TurbopumpError):
        return Failure(type(error).__name__, str(error))
    return Failure("SampleError", f"{type(error).__name__}: {error}")


def _has_ended(pid: int) -> bool:
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:  # someone else has asked for its status
        return True


def _ended(pid: int) -> str:
    """How a process ended, which it now has for good."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)  # does nothing to one that is dead
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:
        return "died"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _end_workers(parent: int, workers: list[_Worker], slots: Sequence[SharedSlot]) -> None:
    if os.getpid() != parent:  # in a forked child these are no children
        return
    for worker in workers:
        _ended(worker.pid)
        worker.close()
    workers.clear()
    for slot in slots:
        slot.close()


@contextmanager
def _blocked_signals() -> Iterator[None]:
    old = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
