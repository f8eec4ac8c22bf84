"""Files of an input: which, in which order, in what state; opening them (compressed or not) with typed errors."""

from __future__ import annotations

import io
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pyarrow as pa

from turbopump.core.errors import DatasetError
from turbopump.data import corpus

COMPRESSED = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}
# What the parsers behind the readers raise for damaged files. A flipped bit of a length asks for any amount of memory,
# so MemoryError and OverflowError are among them.
DAMAGE = (
    pa.ArrowException, tarfile.TarError, zlib.error, struct.error, OSError, EOFError, ValueError, KeyError, IndexError,
    TypeError, MemoryError, OverflowError, NotImplementedError, RecursionError,
)  # fmt: skip


@dataclass(frozen=True)
class InputFile:
    """`name` is relative to the source the file was found in; size and time tell whether somebody wrote to it."""

    path: str
    name: str
    size: int
    mtime_ns: int


def input_file(path: Path, name: str) -> InputFile:
    try:
        stat = path.stat()
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from error
    return InputFile(str(path), name, stat.st_size, stat.st_mtime_ns)


def find(sources: Sequence[str], include: Sequence[str] = (), exclude: Path | None = None) -> tuple[InputFile, ...]:
    """Non-empty files of folders, globs and single files as `corpus.find_files` orders them."""
    return tuple(input_file(file.path, file.key) for file in corpus.find_files(sources, include, exclude))


def check_unchanged(file: InputFile) -> None:
    """Raises `DatasetError` where the file is gone or was written to since it was found."""
    try:
        stat = os.stat(file.path)
    except OSError as error:
        raise DatasetError(
            f"{file.path} cannot be read any more ({error.strerror or error}): pack again when nobody changes it"
        ) from error
    if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
        raise DatasetError(f"{file.path} changed while it was packed: pack again when nobody writes to it")


@contextmanager
def reading(file: InputFile, what: str) -> Iterator[None]:
    """Turns what a parser raises for `file` into a `DatasetError`; `what` it should be, such as `Parquet`."""
    try:
        yield
    except DAMAGE as error:
        check_unchanged(file)
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DatasetError(f"{file.path} cannot be read as {what}: {reason}; replace it or leave it out") from error


def codec_of(name: str) -> str | None:
    return COMPRESSED.get(Path(name).suffix.lower())


def suffix_of(name: str) -> str:
    """The suffix that tells the format, in lower case, without one that tells the compression."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in (".gz", ".zst") else path.suffix


def open_bytes(file: InputFile) -> IO[bytes]:
    """The content as a stream, decompressed where the name ends in .gz or .zst."""
    codec = codec_of(file.name)
    if codec is None:
        return open(file.path, "rb")
    return io.BufferedReader(pa.input_stream(file.path, compression=codec), 1 << 20)


def map_file(file: InputFile) -> pa.NativeFile:
    return pa.memory_map(file.path, "rb")
