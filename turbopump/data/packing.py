"""What the processes of `pack` do: one partition of the input in, one sealed part of the dataset out.

A `Task` says how to read a partition and what to write of it; it does not know processes, places or other partitions,
so that Spark or Ray could call it as well. `run_tasks` does the partitions that no earlier pack has finished, here or
in forked processes that write their shards themselves (only a part's entry comes back), and tells how far they are.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.data import corpus, text
from turbopump.data.corpus import BadTextError, Piece
from turbopump.data.inputs.protocol import Input, Keys, num_rows_of
from turbopump.data.inputs.protocol import Partition as InputPartition
from turbopump.data.manifest import Field
from turbopump.data.order import held_out
from turbopump.data.part import PartEntry, PartWriter
from turbopump.data.processes import become_helper
from turbopump.data.ragged import Ragged
from turbopump.data.writer import Staging

ENCODE_BYTES = 1 << 21  # of text that is encoded at once
REPORT_EVERY_S = 0.2

Tick = Callable[[int], None]


class Task(Protocol):
    """How one partition becomes one part. `fields` are those of the dataset."""

    @property
    def fields(self) -> tuple[Field, ...]: ...

    def write(self, partition: Any, writer: PartWriter, tick: Tick) -> int:
        """Append the rows of `partition`, calling `tick(bytes)` as input is done; the number of documents skipped."""
        ...


# ---- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RecordsTask:
    """Rows of an input as they are; the split of each by the input, else by a hash of its key."""

    input: Input
    validation: float

    @property
    def fields(self) -> tuple[Field, ...]:
        return self.input.fields

    def write(self, partition: InputPartition, writer: PartWriter, tick: Tick) -> int:
        for chunk, keys in self.input.read(partition):
            columns = [chunk[item.name] for item in self.fields]
            if partition.split:
                writer.append(partition.split, columns)
            else:
                out = is_held_out(keys, self.validation)
                for split, mine in (("train", ~out), ("validation", out)):
                    if mine.all():
                        writer.append(split, columns)
                    elif mine.any():
                        writer.append(split, [c.where(mine) if isinstance(c, Ragged) else c[mine] for c in columns])
            tick(sum(c.values.nbytes if isinstance(c, Ragged) else c.nbytes for c in columns))
        return 0


def is_held_out(keys: Keys, fraction: float) -> np.ndarray:
    """Bool per key: whether its hash puts it in the `fraction` that is held out."""
    if isinstance(keys, np.ndarray):
        return held_out(keys, fraction)
    texts = (key.decode("utf-8", "surrogateescape") if isinstance(key, bytes) else key for key in keys)
    return np.fromiter((corpus.is_held_out(key, fraction) for key in texts), bool, len(keys))


# ---- text ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextPartition:
    """Pieces of files to read, or texts at hand, one after the other; a split and an end-of-document flag for each."""

    pieces: tuple[Piece, ...]
    texts: tuple[str, ...]
    splits: tuple[str, ...]
    ends: tuple[bool, ...]
    skip_bad: bool = False

    def read(self, i: int) -> str | None:
        """The text of item `i`; None where it is to be skipped."""
        if self.texts:
            return self.texts[i]
        try:
            return corpus.read_piece(self.pieces[i])
        except BadTextError:
            if self.skip_bad:
                return None
            raise

    def documents(self) -> Iterator[tuple[str | None, str, bool]]:
        """(text, split, whether the document ends with it)."""
        return ((self.read(i), self.splits[i], self.ends[i]) for i in range(len(self.splits)))


class TokensTask:
    """Documents as one stream of tokens a split, with a separator after each. `tokenizer` as it is stored."""

    def __init__(
        self, tokenizer: text.Tokenizer, documents: Callable[[Any], Iterator[tuple[str | None, str, bool]]]
    ) -> None:
        self.fields: tuple[Field, ...] = (Field("tokens", tokenizer.dtype),)
        self._tokenizer, self._documents = tokenizer, documents

    def write(self, partition: Any, writer: PartWriter, tick: Tick) -> int:
        group: list[tuple[str | None, str, bool]] = []
        size, skipped = 0, 0
        open_sizes: dict[str, int] = {}  # of the document whose pieces are still coming
        for document in self._documents(partition):
            group.append(document)
            skipped += document[0] is None
            size += len(document[0] or "")
            if size >= ENCODE_BYTES:
                tick(self._append(group, writer, open_sizes))
                group, size = [], 0
        if group:
            tick(self._append(group, writer, open_sizes))
        return skipped

    def _append(
        self, group: Sequence[tuple[str | None, str, bool]], writer: PartWriter, open_sizes: dict[str, int]
    ) -> int:
        """Encode and append a group of texts; their bytes in UTF-8."""
        texts = [document or "" for document, _, _ in group]
        ends = np.array([end and document is not None for document, _, end in group])
        ids, counts = self._tokenizer.encode_documents(texts)
        ids = np.insert(ids, np.cumsum(counts)[ends], self._tokenizer.separator)
        counts = counts + ends
        source_bytes = np.array([len(document.encode()) for document in texts])
        splits = np.array([split for _, split, _ in group])
        for split in np.unique(splits).tolist():
            mine = splits == split
            sizes = []
            for count, end in zip(counts[mine].tolist(), ends[mine].tolist(), strict=True):
                open_sizes[split] = open_sizes.get(split, 0) + count
                if end:
                    sizes.append(open_sizes.pop(split))
            values = ids if mine.all() else ids[np.repeat(mine, counts)]
            writer.append(split, [values], source_bytes=int(source_bytes[mine].sum()), document_sizes=sizes)
        return int(source_bytes.sum())


@dataclass(frozen=True)
class InputTexts:
    """The documents of an input's column of text."""

    input: Input
    validation: float

    def __call__(self, partition: InputPartition) -> Iterator[tuple[str | None, str, bool]]:
        for chunk, keys in self.input.read(partition):
            column = chunk[self.input.fields[0].name]
            out = is_held_out(keys, self.validation) if not partition.split else np.zeros(num_rows_of(chunk), bool)
            for document, held in zip(column, out.tolist(), strict=True):
                yield document, partition.split or ("validation" if held else "train"), True


# ---- doing them ------------------------------------------------------------------------------------------------------


def run_tasks(
    task: Task,
    partitions: Iterable[Any],
    staging: Staging,
    *,
    processes: int,
    shard_bytes: int,
    report: Callable[[int], None],
) -> list[PartEntry]:
    """All parts, in order: those that are sealed already, and the others by `processes` (1: this one).

    `report(done_bytes)` is called a few times a second. Raises what the tasks raise, and `DatasetError` where a process
    was killed.
    """
    numbered = ((n, partition) for n, partition in enumerate(partitions))
    if processes == 1:
        done = [0]

        def tick(size: int) -> None:
            done[0] += size
            report(done[0])

        return [
            staging.parts.get(n) or _write(task, n, partition, staging, shard_bytes, tick) for n, partition in numbered
        ]
    return _Pool(task, staging, processes, shard_bytes, report).run(numbered)


def _write(task: Task, number: int, partition: Any, staging: Staging, shard_bytes: int, tick: Tick) -> PartEntry:
    writer = PartWriter(staging.directory, number, task.fields, shard_bytes=shard_bytes, shown=staging.path)
    try:
        return writer.finish(task.write(partition, writer, tick))
    finally:
        writer.abort()


class _Pool:
    """Forked processes, a bounded number of partitions in flight."""

    def __init__(
        self, task: Task, staging: Staging, processes: int, shard_bytes: int, report: Callable[[int], None]
    ) -> None:
        self._staging, self._processes, self._report = staging, processes, report
        self._done = np.frombuffer(mmap.mmap(-1, mmap.PAGESIZE), np.int64)  # bytes by process, shared, of no name
        # fork, so that a script or notebook needs no `if __name__ == "__main__"`, and nothing of the task is pickled
        self._pool = ProcessPoolExecutor(
            processes, multiprocessing.get_context("fork"), _start_worker,
            (os.getpid(), task, staging, shard_bytes, self._done, multiprocessing.get_context("fork").Value("i", 0)),
        )  # fmt: skip

    def run(self, numbered: Iterable[tuple[int, Any]]) -> list[PartEntry]:
        entries: list[PartEntry] = []
        flying: deque[Future[PartEntry]] = deque()
        try:
            for number, partition in numbered:
                if (sealed := self._staging.parts.get(number)) is not None:
                    entries.append(sealed)
                    continue
                flying.append(self._pool.submit(_in_worker, number, partition))
                while len(flying) > 2 * self._processes:
                    self._collect(flying, entries)
            while flying:
                self._collect(flying, entries)
        except BrokenProcessPool as error:
            for process in list(self._pool._processes.values()):  # `kill_workers()` of Python 3.14
                process.kill()  # they ignore the pool's SIGTERM, and may wait for a lock that died with its holder
            raise DatasetError(
                "a packing process was killed (often for lack of memory): pack again with fewer (--num-processes); "
                "what is finished is kept"
            ) from error
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
        return entries

    def _collect(self, flying: deque[Future[PartEntry]], entries: list[PartEntry]) -> None:
        """The next part, when it is done; reports meanwhile."""
        while not flying[0].done():
            wait([flying[0]], timeout=REPORT_EVERY_S, return_when=FIRST_COMPLETED)
            self._report(int(self._done.sum()))
        entries.append(flying.popleft().result())
        self._report(int(self._done.sum()))


_job: tuple[Task, Staging, int, Tick] | None = None


def _start_worker(parent: int, task: Task, staging: Staging, shard_bytes: int, done: np.ndarray, numbers: Any) -> None:
    global _job
    become_helper(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's own switch; the processes are the parallelism
    with numbers.get_lock():
        slot = numbers.value
        numbers.value += 1

    def tick(size: int) -> None:
        done[slot] += size

    _job = task, staging, shard_bytes, tick


def _in_worker(number: int, partition: Any) -> PartEntry:
    assert _job is not None  # the initializer ran first
    task, staging, shard_bytes, tick = _job
    return _write(task, number, partition, staging, shard_bytes, tick)
