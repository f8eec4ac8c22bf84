"""The verb `pack`: files, tables, text, media or anything iterable into a dataset directory. No torch.

    find the input ──> partitions ──> a process each: read, encode, write shards ──> number them, manifest, rename

The partitions and what becomes of each depend on the input alone, so the number of processes changes nothing but the
time, and a pack that was stopped goes on with the partitions that are not finished (`data/packing.py`, `writer.py`).
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from turbopump.core.errors import DatasetError, UsageError
from turbopump.core.files import digest
from turbopump.core.version import VERSION
from turbopump.data import corpus, text, tiktoken_ranks
from turbopump.data.corpus import BadTextError, Piece
from turbopump.data.inputs.protocol import Input
from turbopump.data.inputs.python import from_python
from turbopump.data.inputs.recognise import open_input
from turbopump.data.inputs.splits import held_out_share
from turbopump.data.manifest import Manifest
from turbopump.data.packing import InputTexts, RecordsTask, Task, TextPartition, TokensTask, run_tasks
from turbopump.data.part import SHARD_BYTES
from turbopump.data.remote_files import is_url
from turbopump.data.writer import Staging, check_destination

PARTITION_BYTES = (1 << 23, 1 << 28)  # of input: least and most; between them, a 64th of it all
BPE_SAMPLE_BYTES = 8_000_000
PARALLEL_FROM_BYTES = 1 << 24  # below this, starting processes costs more than it saves


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
        return self.elapsed_s * max(0, self.total_bytes - self.done_bytes) / self.done_bytes


@dataclass(frozen=True)
class _Packing:
    """What is packed: tasks and partitions, made when the tokenizer is; `identity` of the input, None where it cannot
    be read a second time."""

    partitions: Iterator[Any]
    task: Callable[[text.Tokenizer | None], Task]
    sources: tuple[str, ...]
    total_bytes: int | None
    identity: str | None
    is_text: bool
    train_texts: Callable[[list[Any]], Sequence[str]] | None = None
    labels: Mapping[str, tuple[str, ...]] | None = None


def pack(
    source: Any,
    destination: Path | str,
    *,
    tokenizer: str | None = None,
    tokenizer_pattern: str | None = None,
    vocab_size: int = 4096,
    validation: float | None = None,
    include: Sequence[str] = (),
    format: str | None = None,
    text_field: str | None = None,
    columns: Sequence[str] = (),
    key: str | None = None,
    nulls: Literal["error", "drop"] = "error",
    num_processes: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[PackProgress], None] | None = None,
) -> Manifest:
    """Write a dataset directory to `destination` and return its manifest.

    `source` is one of, or a list of: files, folders, globs of one `format` (found out by themselves; see
    docs/pack-inputs.md), the word `stdlib` (the sources of Python's standard library); or, from Python, arrays, a
    DataFrame or table, or any other iterable or map-style dataset.

    Text becomes a stream of tokens by `tokenizer`, which is `bytes` (the default), `bpe` (trained on it), a
    `tokenizer.json` or a `.tiktoken` file (`tokenizer_pattern` cuts its words: the name of an encoding or a regular
    expression), or rows as it is with `none`; of a table, the column `text_field`. Everything else becomes rows:
    all columns, or `columns`; a row with a null in them is an error, or left out and counted in the manifest's
    `skipped`, by `nulls`. `validation` is the share held out (0.05): by a hash of the column `key`, of the file's name
    or of the row's number, or the end of each text where there are few; an input's own splits (those of Hugging Face,
    and folders `train`, `val`, `test`) are kept, and none may be given then.

    Raises `UsageError` (destination taken, no such source, nothing found) and `DatasetError` (what the input holds does
    not fit, unreadable, disk full). A pack that is stopped or killed leaves no dataset, and the same call goes on from
    there.
    """
    if is_url(destination):
        bare = str(destination).partition("?")[0]  # what follows may be a secret
        raise UsageError(
            f"{bare} is the address of a store, and pack writes to a local disk: pack to a folder, then upload "
            f"all its files (e.g. `aws s3 cp --recursive FOLDER {bare}`), and give the address as data.path"
        )
    destination = Path(destination)
    _check_options(tokenizer, tokenizer_pattern, vocab_size, validation, nulls, num_processes, shard_bytes)
    check_destination(destination, overwrite)
    packing = _open(
        source, destination, tokenizer, validation, include, format, text_field, columns, key, nulls == "drop"
    )
    kind = str(tokenizer or "bytes") if packing.is_text and tokenizer != "none" else None
    given = text.read_tokenizer(Path(kind), tokenizer_pattern) if kind not in (None, "bytes", "bpe") else None
    options = [
        VERSION, kind, given and digest(given.dumps()), vocab_size, validation, shard_bytes, PARTITION_BYTES,
        list(columns), text_field, key, nulls,
    ]  # fmt: skip
    staging_key = digest(repr([packing.identity, options]).encode()) if packing.identity is not None else None
    report = _Reporter(progress, packing.total_bytes)
    with Staging(destination, overwrite=overwrite, key=staging_key) as staging:
        partitions: Iterator[Any] = packing.partitions
        made: text.Tokenizer | None = given
        if kind is not None and given is None:
            made, partitions = _make_tokenizer(kind, vocab_size, packing, report)
        processes = num_processes or _default_processes(kind, packing)
        return _write(packing, made, partitions, staging, processes, shard_bytes, report)


def _write(
    packing: _Packing, made: text.Tokenizer | None, partitions: Iterator[Any], staging: Staging, processes: int,
    shard_bytes: int, report: _Reporter,
) -> Manifest:  # fmt: skip
    """All partitions into parts, and these into the dataset."""
    task = packing.task(made)
    parts = run_tasks(task, partitions, staging, processes=processes, shard_bytes=shard_bytes, report=report)
    if not any(split.rows for part in parts for split in part.splits.values()):
        raise UsageError(f"nothing to pack: the source holds no {'text' if packing.is_text else 'record'}")
    report.finish()
    return staging.commit(
        parts, kind="arrays" if made is None else "tokens", fields=task.fields, sources=packing.sources,
        tokenizer=text.tokenizer_entry(made) if made is not None else None, labels=packing.labels,
        files={text.TOKENIZER_NAME: made.dumps()} if made is not None else {},
    )  # fmt: skip


def _check_options(
    tokenizer: str | None, tokenizer_pattern: str | None, vocab_size: int, validation: float | None,
    nulls: str, num_processes: int | None, shard_bytes: int,
) -> None:  # fmt: skip
    if validation is not None and not 0 <= validation < 1:
        raise UsageError(f"validation ({validation}) must be at least 0 and below 1: it is the share held out")
    if nulls not in ("error", "drop"):
        raise UsageError(f"nulls ({nulls!r}) must be error or drop: what becomes of a row with a null")
    if num_processes is not None and num_processes < 1:
        raise UsageError(f"num_processes ({num_processes}) must be at least 1")
    if shard_bytes < 1 << 12:
        raise UsageError(f"shard_bytes ({shard_bytes}) must be at least {1 << 12}")
    if tokenizer not in (None, "bytes", "bpe", "none") and not str(tokenizer).endswith(text.TOKENIZER_FILES):
        raise UsageError(f"no tokenizer {tokenizer!r} (known: bytes, bpe, none, a tokenizer.json or a .tiktoken file)")
    if tokenizer_pattern is not None and not str(tokenizer).endswith(tiktoken_ranks.SUFFIX):
        raise UsageError(
            f"tokenizer_pattern ({tokenizer_pattern}) cuts the words of a .tiktoken file alone: leave it out, or give "
            f"one as tokenizer (it is {tokenizer})"
        )
    if tokenizer == "bpe" and vocab_size < text.MIN_VOCAB_SIZE:
        raise UsageError(f"vocab_size ({vocab_size}) must be at least {text.MIN_VOCAB_SIZE}: 256 bytes and a separator")


# ---- what the source is ----------------------------------------------------------------------------------------------


def _open(
    source: Any, destination: Path, tokenizer: str | None, validation: float | None, include: Sequence[str],
    format: str | None, text_field: str | None, columns: Sequence[str], key: str | None, drop_nulls: bool,
) -> _Packing:  # fmt: skip
    paths = _as_paths(source)
    if paths is None:
        return _open_object(source, tokenizer, validation, text_field, columns, key, drop_nulls)
    names = tuple(Path(path).name or path for path in paths)
    if corpus.STDLIB in paths:
        if len(paths) > 1:
            raise UsageError(f"`{corpus.STDLIB}` is packed alone: give it as the only source")
        if include:
            given = ", ".join(include)
            raise UsageError(f"include ({given}) has no effect on `{corpus.STDLIB}` (all of it is *.py): leave it out")
        return _of_files(corpus.stdlib_files(), names, held_out_share(validation, ()), skip_bad=True)
    opened = open_input(
        paths, include=include, format=format, text_field=text_field, key=key, columns=columns, drop_nulls=drop_nulls,
        exclude=destination,
    )  # fmt: skip
    share = held_out_share(validation, opened.splits.values())
    if opened.name == "text" and tokenizer != "none":
        return _of_files(corpus.find_files(paths, include, exclude=destination), names, share, splits=opened.splits)
    return _of_input(opened, tokenizer, share, text_field, names)


def _of_input(
    opened: Input, tokenizer: str | None, validation: float, text_field: str | None, names: tuple[str, ...]
) -> _Packing:
    """Rows of a table, or the documents of its one column of text where somebody asked for tokens."""
    is_text = tokenizer not in (None, "none") or (text_field is not None and tokenizer is None)
    if is_text and (len(opened.fields) != 1 or opened.fields[0].kind != "text"):
        columns = ", ".join(item.name for item in opened.fields)
        raise UsageError(
            f"a tokenizer needs to know which column is the text (there is: {columns}): name it, --text-field"
        )
    target = _partition_bytes(opened.total_bytes)
    partitions = list(opened.partitions(target)) if opened.total_bytes is not None else opened.partitions(target)
    identity = digest("\n".join(p.key for p in partitions).encode()) if isinstance(partitions, list) else None
    documents = InputTexts(opened, validation)
    return _Packing(
        iter(partitions), lambda made: RecordsTask(opened, validation) if made is None else TokensTask(made, documents),
        names, opened.total_bytes, identity, is_text, lambda some: _InputTrainingTexts(documents, some),
        dict(opened.class_names),
    )  # fmt: skip


def _open_object(
    source: Any, tokenizer: str | None, validation: float | None, text_field: str | None, columns: Sequence[str],
    key: str | None, drop_nulls: bool,
) -> _Packing:  # fmt: skip
    share = held_out_share(validation, ())
    if text_field is None and tokenizer != "none" and not columns and key is None:
        first, records = _first_of(source)
        if records is not None and isinstance(first, (str, bytes)):
            partitions = _text_partitions(records, share)
            return _of_texts_task(partitions, ("texts",), None, None)
        source = records if records is not None else source
    wanted = (text_field,) if text_field is not None else columns
    opened = from_python(source, key=key, columns=wanted, drop_nulls=drop_nulls)
    return _of_input(opened, tokenizer, share, text_field, ("arrays",))


def _first_of(source: Any) -> tuple[Any, Iterator[Any] | None]:
    """The first record of an iterable and an iterator over all; None where it is arrays or a table."""
    if isinstance(source, Mapping) or not hasattr(source, "__iter__") or hasattr(source, "dtype"):
        return None, None
    if hasattr(source, "__arrow_c_stream__") or hasattr(source, "to_batches"):
        return None, None
    if isinstance(source, tuple) and source and all(hasattr(item, "dtype") for item in source):
        return None, None
    records = iter(source)
    try:
        first = next(records)
    except StopIteration:
        raise UsageError("nothing to pack: the source holds no record") from None
    return first, itertools.chain([first], records)


def _as_paths(source: Any) -> list[str] | None:
    if isinstance(source, (str, Path)):
        return [str(source)]
    if isinstance(source, (list, tuple)) and source and all(isinstance(item, (str, Path)) for item in source):
        return [str(item) for item in source]
    return None


# ---- text as partitions ----------------------------------------------------------------------------------------------


def _of_files(
    files: Sequence[corpus.TextFile], names: tuple[str, ...], validation: float, skip_bad: bool = False,
    splits: Mapping[str, str] = {},
) -> _Packing:  # fmt: skip
    total = sum(file.size for file in files)
    state = [(file.key, file.size, file.path.stat().st_mtime_ns) for file in files]
    pieces = corpus.pieces(files, validation, splits)
    partitions = _file_partitions(pieces, skip_bad, _partition_bytes(total))
    return _of_texts_task(partitions, names, total, digest(repr(state).encode()))


def _of_texts_task(
    partitions: Iterator[TextPartition], names: tuple[str, ...], total: int | None, identity: str | None
) -> _Packing:
    def task(made: text.Tokenizer | None) -> Task:
        assert made is not None  # text at hand is always encoded
        return TokensTask(made, TextPartition.documents)

    return _Packing(partitions, task, names, total, identity, True, _TrainingTexts)


def _partition_bytes(total_bytes: int | None) -> int:
    """Input bytes of one partition: enough of them to share out, each large enough for a shard of its own."""
    least, most = PARTITION_BYTES
    return min(most, max(least, (total_bytes or 0) // 64))


def _file_partitions(pieces: Iterable[Piece], skip_bad: bool, target_bytes: int) -> Iterator[TextPartition]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += piece.end - piece.begin
        if size >= target_bytes:
            yield _of_pieces(group, skip_bad)
            group, size = [], 0
    if group:
        yield _of_pieces(group, skip_bad)


def _of_pieces(group: Sequence[Piece], skip_bad: bool) -> TextPartition:
    splits, ends = tuple(p.split for p in group), tuple(p.ends_document for p in group)
    return TextPartition(tuple(group), (), splits, ends, skip_bad)


def _text_partitions(records: Iterable[Any], validation: float) -> Iterator[TextPartition]:
    """Partitions of texts at hand; few of them give the end of each to validation."""
    records = iter(records)
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
        if size >= PARTITION_BYTES[0]:
            yield _of_texts(group)
            group, size = [], 0
    if group:
        yield _of_texts(group)


def _of_texts(group: Sequence[tuple[str, str]]) -> TextPartition:
    return TextPartition((), tuple(t for t, _ in group), tuple(s for _, s in group), (True,) * len(group))


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


# ---- the tokenizer ---------------------------------------------------------------------------------------------------


def _make_tokenizer(
    kind: str, vocab_size: int, packing: _Packing, report: _Reporter
) -> tuple[text.Tokenizer, Iterator[Any]]:
    """The tokenizer, and the partitions again (those of an iterator are held while it is trained)."""
    if kind == "bytes":
        return text.ByteTokenizer(), packing.partitions
    assert packing.train_texts is not None  # text has them
    report.phase = "training the tokenizer"
    report(0)
    held: list[Any] = []
    size = 0
    for partition in packing.partitions:
        held.append(partition)
        size += sum(map(len, partition.texts)) if isinstance(partition, TextPartition) else 0
        if size >= BPE_SAMPLE_BYTES:
            break
    made = text.train_bpe(packing.train_texts(held), vocab_size, max_bytes=BPE_SAMPLE_BYTES)
    report.phase = "packing"
    return made, itertools.chain(held, packing.partitions)


class _TrainingTexts(Sequence[str]):
    """The training texts of some partitions, read when they are asked for; held-out ones do not shape the tokenizer."""

    def __init__(self, partitions: Sequence[TextPartition]) -> None:
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
        return partition.read(i) or ""


class _InputTrainingTexts(Sequence[str]):
    """The same of an input: texts of its first partitions, up to the size of the sample."""

    def __init__(self, documents: InputTexts, partitions: Sequence[Any]) -> None:
        self._texts: list[str] = []
        size = 0
        for document, split, _ in itertools.chain.from_iterable(map(documents, partitions)):
            if split == "train" and document:
                self._texts.append(document)
                size += len(document)
            if size >= BPE_SAMPLE_BYTES:
                break

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: Any) -> Any:
        return self._texts[index]


def _default_processes(tokenizer: str | None, packing: _Packing) -> int:
    """One where there is little, or nobody knows how much there is and reading it is most of the work."""
    if packing.identity is None and tokenizer != "bpe":
        return 1
    if packing.total_bytes is None or packing.total_bytes < PARALLEL_FROM_BYTES:
        return 1
    return min(len(os.sched_getaffinity(0)), 16)


class _Reporter:
    def __init__(self, progress: Callable[[PackProgress], None] | None, total_bytes: int | None) -> None:
        self._progress = progress
        self._total_bytes = total_bytes
        self._begin = time.perf_counter()
        self.phase = "packing"

    def __call__(self, done_bytes: int) -> None:
        if self._progress is not None:
            elapsed_s = time.perf_counter() - self._begin
            total = max(self._total_bytes, done_bytes) if self._total_bytes is not None else None
            self._progress(PackProgress(self.phase, done_bytes, total, elapsed_s))

    def finish(self) -> None:
        """All of it is done: what was skipped or packed before does not count again."""
        if self._total_bytes is not None:
            self(self._total_bytes)


__all__ = ["PackProgress", "pack"]
