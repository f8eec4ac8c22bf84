"""`turbopump pack SOURCE... DEST`: text or arrays in, a dataset directory out.

Text is cut into partitions of whole documents (or pieces of long ones) in a fixed order; each is read and encoded by
itself, by as many processes as asked for, and written in order: the bytes written do not depend on the processes.
Memory is bounded by the partitions in flight and one shard. `DatasetWriter` makes the directory appear all at once.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from turbopump.core.errors import DatasetError, UsageError
from turbopump.data import corpus, text
from turbopump.data.arrays import pack_arrays, read_array_files, rows_of
from turbopump.data.corpus import BadTextError, Piece
from turbopump.data.manifest import Field, Manifest
from turbopump.data.processes import become_helper
from turbopump.data.writer import DatasetWriter, check_destination

PARTITION_BYTES = 1 << 21
BPE_SAMPLE_BYTES = 8_000_000
PARALLEL_FROM_BYTES = 1 << 26  # below this, starting processes and passing ids costs more than it saves
ARRAY_SUFFIXES = (".npy", ".npz")


@dataclass(frozen=True)
class PackProgress:
    """How far `pack` is: `phase` is `training the tokenizer` or `packing`; `total_bytes` None where it is unknown."""

    phase: str
    done_bytes: int
    total_bytes: int | None
    elapsed_s: float

    @property
    def bytes_per_s(self) -> float:
        return self.done_bytes / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        if not self.done_bytes or self.total_bytes is None:
            return None
        return self.elapsed_s * (self.total_bytes - self.done_bytes) / self.done_bytes


@dataclass(frozen=True)
class _Partition:
    """Pieces of files to read, or texts at hand, one after the other; a split and an end-of-document flag for each."""

    pieces: tuple[Piece, ...]
    texts: tuple[str, ...]
    splits: tuple[str, ...]
    ends: tuple[bool, ...]
    skip_bad: bool = False


@dataclass(frozen=True)
class _Encoded:
    """Ids of a partition with separators; tokens and source bytes of each item, -1 tokens where one was skipped."""

    ids: np.ndarray
    counts: np.ndarray
    source_bytes: np.ndarray


def pack(
    source: Any,
    destination: Path | str,
    *,
    tokenizer: Literal["bytes", "bpe"] = "bytes",
    vocab_size: int = 4096,
    validation: float = 0.05,
    include: Sequence[str] = (),
    num_processes: int | None = None,
    overwrite: bool = False,
    progress: Callable[[PackProgress], None] | None = None,
) -> Manifest:
    """Write a dataset directory to `destination` and return its manifest.

    `source` is one of, or a list of: a text file, a folder, a glob, the word `stdlib` (the sources of Python's standard
    library), `.npy` and `.npz` files; or a tuple or mapping of numpy arrays with one row a sample; or any other
    iterable (or map-style dataset) of strings, UTF-8 bytes, or tuples, mappings or single arrays. `validation` is the
    share held out: by a hash of the file's name (or record's number), or the end of each text where there are few.

    Raises `UsageError` (destination taken, no such source, nothing found) and `DatasetError` (not UTF-8, unreadable,
    disk full). A pack that is stopped or killed leaves nothing at `destination`.
    """
    destination = Path(destination)
    if not 0 <= validation < 1:
        raise UsageError(f"validation ({validation}) must be at least 0 and below 1: it is the share held out")
    if num_processes is not None and num_processes < 1:
        raise UsageError(f"num_processes ({num_processes}) must be at least 1")
    if tokenizer not in ("bytes", "bpe"):
        raise UsageError(f"no tokenizer {tokenizer!r} (known: bytes, bpe)")
    if tokenizer == "bpe" and vocab_size < text.MIN_VOCAB_SIZE:
        raise UsageError(f"vocab_size ({vocab_size}) must be at least {text.MIN_VOCAB_SIZE}: 256 bytes and a separator")
    check_destination(destination, overwrite)
    paths = _as_paths(source)
    if paths is not None and any(Path(p).suffix in ARRAY_SUFFIXES for p in paths):
        return pack_arrays(read_array_files(paths), destination, validation, overwrite, _names(paths))
    if paths is None:
        first, records = rows_of(source)
        if not isinstance(first, (str, bytes)):
            return pack_arrays(records, destination, validation, overwrite, ["arrays"])
        partitions, total_bytes, names = _text_partitions(records, validation), None, ["texts"]
    else:
        files, skip_bad = _find(paths, include, destination)
        partitions, total_bytes = _file_partitions(files, validation, skip_bad), sum(file.size for file in files)
        names = _names(paths)
    report = _Reporter(progress, total_bytes)
    processes = num_processes or _default_processes(tokenizer, total_bytes)
    with _Encoder(processes) as encoder:
        made, partitions = _make_tokenizer(tokenizer, vocab_size, partitions, report)
        fields = [Field("tokens", made.dtype)]
        with DatasetWriter(destination, kind="tokens", fields=fields, overwrite=overwrite) as writer:
            skipped = _write_all(encoder.encode(partitions, made), writer, report)
            writer.add_file(text.TOKENIZER_NAME, made.dumps())
            return writer.finish(tokenizer=text.tokenizer_entry(made), sources=names, skipped=skipped)


def _as_paths(source: Any) -> list[str] | None:
    if isinstance(source, (str, Path)):
        return [str(source)]
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, Path)) for item in source):
        return [str(item) for item in source]
    return None


def _names(paths: Iterable[str]) -> list[str]:
    return [Path(path).name or path for path in paths]


def _find(paths: list[str], include: Sequence[str], destination: Path) -> tuple[list[corpus.TextFile], bool]:
    if corpus.STDLIB not in paths:
        return corpus.find_files(paths, include, exclude=destination), False
    if len(paths) > 1:
        raise UsageError(f"`{corpus.STDLIB}` is packed alone: give it as the only source")
    if include:
        given = ", ".join(include)
        raise UsageError(f"include ({given}) has no effect on `{corpus.STDLIB}` (all of it is *.py): leave it out")
    return corpus.stdlib_files(), True


def _default_processes(tokenizer: str, total_bytes: int | None) -> int:
    """One for bytes, which are only copied, and where there is little or nobody knows how much there is."""
    if tokenizer == "bytes" or total_bytes is None or total_bytes < PARALLEL_FROM_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)), 16)


def _file_partitions(files: Sequence[corpus.TextFile], validation: float, skip_bad: bool) -> Iterator[_Partition]:
    group: list[Piece] = []
    size = 0
    for piece in corpus.pieces(files, validation):
        group.append(piece)
        size += piece.end - piece.begin
        if size >= PARTITION_BYTES:
            yield _of_pieces(group, skip_bad)
            group, size = [], 0
    if group:
        yield _of_pieces(group, skip_bad)


def _of_pieces(group: Sequence[Piece], skip_bad: bool) -> _Partition:
    return _Partition(tuple(group), (), tuple(p.split for p in group), tuple(p.ends_document for p in group), skip_bad)


def _text_partitions(records: Iterator[Any], validation: float) -> Iterator[_Partition]:
    """Partitions of texts at hand; few of them give the end of each to validation."""
    head = list(itertools.islice(records, corpus.FEW_DOCUMENTS))
    few = len(head) < corpus.FEW_DOCUMENTS and validation > 0
    group: list[tuple[str, str]] = []
    size = 0
    for number, record in enumerate(itertools.chain(head, records)):
        document = _as_text(record, number)
        if few:
            cut = round(len(document) * (1 - validation))
            parts = [(document[:cut], "train"), (document[cut:], "validation")]
        else:
            parts = [(document, "validation" if corpus.is_held_out(str(number), validation) else "train")]
        group += [part for part in parts if part[0]]
        size += len(document)
        if size >= PARTITION_BYTES:
            yield _of_texts(group)
            group, size = [], 0
    if group:
        yield _of_texts(group)


def _of_texts(group: Sequence[tuple[str, str]]) -> _Partition:
    return _Partition((), tuple(t for t, _ in group), tuple(s for _, s in group), (True,) * len(group))


def _as_text(record: Any, number: int) -> str:
    try:
        if isinstance(record, bytes):
            return record.decode()
        if isinstance(record, str):
            record.encode()  # a lone surrogate is no text
            return record
    except UnicodeError as error:
        raise BadTextError(f"record {number} is not UTF-8 text: {error}") from error
    raise DatasetError(f"record {number} is of type {type(record).__name__}, where the first one was text")


def _make_tokenizer(
    kind: str, vocab_size: int, partitions: Iterator[_Partition], report: _Reporter
) -> tuple[text.Tokenizer, Iterator[_Partition]]:
    """The tokenizer, and the partitions again (those of an iterator are held while it is trained)."""
    if kind == "bytes":
        return text.ByteTokenizer(), partitions
    report.phase = "training the tokenizer"
    report(0)
    held: list[_Partition] = []
    size = 0
    for partition in partitions:
        held.append(partition)
        size += sum(map(len, partition.texts))
        if size >= BPE_SAMPLE_BYTES:
            break
    made = text.train_bpe(_TrainingTexts(held), vocab_size, max_bytes=BPE_SAMPLE_BYTES)
    report.phase = "packing"
    return made, itertools.chain(held, partitions)


class _TrainingTexts(Sequence[str]):
    """The training texts of some partitions, read when they are asked for; held-out ones do not shape the tokenizer."""

    def __init__(self, partitions: Sequence[_Partition]) -> None:
        self._items = [
            (partition, i)
            for partition in partitions
            for i, split in enumerate(partition.splits)
            if split == "train"
        ]  # fmt: skip

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        partition, i = self._items[index]
        return _read(partition, i) or ""


def _read(partition: _Partition, i: int) -> str | None:
    """The text of item `i`; None where it is to be skipped."""
    if partition.texts:
        return partition.texts[i]
    try:
        return corpus.read_piece(partition.pieces[i])
    except BadTextError:
        if partition.skip_bad:
            return None
        raise


def _encode(partition: _Partition, tokenizer: text.Tokenizer) -> _Encoded:
    texts = [_read(partition, i) for i in range(len(partition.splits))]
    ids, counts = tokenizer.encode_documents([t or "" for t in texts])
    ends = np.array([end and t is not None for end, t in zip(partition.ends, texts, strict=True)])
    ids = np.insert(ids, np.cumsum(counts)[ends], tokenizer.separator)
    counts = np.where([t is None for t in texts], -1, counts + ends)
    return _Encoded(ids, counts, np.array([len((t or "").encode()) for t in texts]))


def _write_all(
    results: Iterator[tuple[_Partition, _Encoded]], writer: DatasetWriter, report: _Reporter
) -> int:  # fmt: skip
    """Append every partition in order; the number of files skipped."""
    skipped, done_bytes = 0, 0
    open_sizes = {"train": 0, "validation": 0}  # of the document whose pieces are still coming
    for partition, encoded in results:
        skipped += int((encoded.counts < 0).sum())
        counts = np.maximum(encoded.counts, 0)
        splits = np.array(partition.splits)
        for split in ("train", "validation"):
            mine = splits == split
            if not mine.any():
                continue
            sizes = []
            for count, end in zip(counts[mine].tolist(), np.array(partition.ends)[mine].tolist(), strict=True):
                open_sizes[split] += count
                if end and open_sizes[split]:
                    sizes.append(open_sizes[split])
                    open_sizes[split] = 0
            ids = encoded.ids[np.repeat(mine, counts)]
            writer.append(split, [ids], source_bytes=int(encoded.source_bytes[mine].sum()), document_sizes=sizes)
        done_bytes += int(encoded.source_bytes.sum())
        report(done_bytes)
    if not done_bytes:
        raise UsageError("nothing to pack: the source holds no text")
    return skipped


class _Reporter:
    def __init__(self, progress: Callable[[PackProgress], None] | None, total_bytes: int | None) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._begin = time.perf_counter()
        self.phase = "packing"

    def __call__(self, done_bytes: int) -> None:
        if self._progress is not None:
            elapsed_s = time.perf_counter() - self._begin
            self._progress(PackProgress(self.phase, done_bytes, self._total_bytes, elapsed_s))


class _Encoder:
    """Encodes partitions here or in processes, in order, with a bounded number in flight."""

    def __init__(self, processes: int) -> None:
        self._processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes > 1:
            # fork, so that a script or notebook needs no `if __name__ == "__main__"`; started before the tokenizer's
            # own threads
            context = multiprocessing.get_context("fork")
            self._pool = ProcessPoolExecutor(processes, context, _start_worker, (os.getpid(),))
            self._pool.submit(os.getpid).result()

    def encode(
        self, partitions: Iterator[_Partition], tokenizer: text.Tokenizer
    ) -> Iterator[tuple[_Partition, _Encoded]]:
        if self._pool is None:
            for partition in partitions:
                yield partition, _encode(partition, tokenizer)
            return
        data = tokenizer.dumps()
        flying: deque[tuple[_Partition, Future[_Encoded]]] = deque()
        try:
            for partition in partitions:
                flying.append((partition, self._pool.submit(_encode_in_worker, partition, tokenizer.kind, data)))
                if len(flying) > 2 * self._processes:
                    first, future = flying.popleft()
                    yield first, future.result()
            for first, future in flying:
                yield first, future.result()
        except BrokenProcessPool as error:
            raise DatasetError(
                "a packing process was killed (often for lack of memory): pack again with fewer (--num-processes)"
            ) from error

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _start_worker(parent: int) -> None:
    become_helper(parent)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's own switch; the processes are the parallelism


_worker_tokenizer: tuple[bytes, text.Tokenizer] | None = None


def _encode_in_worker(partition: _Partition, kind: str, data: bytes) -> _Encoded:
    global _worker_tokenizer
    if _worker_tokenizer is None or _worker_tokenizer[0] != data:
        _worker_tokenizer = data, text.from_data(kind, data)
    return _encode(partition, _worker_tokenizer[1])


__all__ = ["PackProgress", "pack"]
