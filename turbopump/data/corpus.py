"""Text on disk as documents: which files, in which order, which part of each is held out, and reading a piece.

Everything here is a function of the files' names (relative to the source they were found in), sizes and bytes, so that
the same input gives the same dataset on any machine and with any number of processes.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from turbopump.core.errors import DatasetError, UsageError
from turbopump.core.files import digest

STDLIB = "stdlib"
INSTALLED = ("site-packages", "dist-packages")
PIECE_BYTES = 1 << 22  # a longer file is read and encoded in pieces cut at line ends
FEW_DOCUMENTS = 20  # with fewer documents than this, the end of each is held out instead of whole documents
CUT_SEARCH_BYTES = 1 << 16


@dataclass(frozen=True)
class TextFile:
    path: Path
    key: str
    size: int


@dataclass(frozen=True)
class Piece:
    """The bytes [begin, end) of a file; `ends_document` where a separator follows."""

    file: TextFile
    begin: int
    end: int
    split: str
    ends_document: bool


class BadTextError(DatasetError):
    """A file is not UTF-8; names the file and the byte."""


def find_files(
    sources: Sequence[str | Path], include: Sequence[str] = (), exclude: Path | None = None
) -> list[TextFile]:
    """Regular, non-empty files of folders (recursive), globs and single files, ordered by source, then by name.

    Hidden files and folders, `__pycache__` and the folder `exclude` are left out. `include` are patterns on file names
    (`*.py`) that files found in folders must match. Raises `UsageError` where a source is missing or nothing is found.
    """
    found: dict[Path, TextFile] = {}
    for source in sources:
        try:
            in_folder = Path(source).is_dir()
        except OSError as error:
            raise UsageError(
                f"{str(source)[:60]!r}... is no file name ({error.strerror}): "
                f"strings are paths; for texts, give an iterator"
            ) from error
        for root, path in _expand(str(source), exclude):
            if in_folder and include and not any(fnmatch.fnmatch(path.name, pattern) for pattern in include):
                continue
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DatasetError(f"cannot read {path}: {error.strerror or error}") from error
            key = path.relative_to(root).as_posix()
            if size:
                found.setdefault(path.resolve(), TextFile(path, key, size))
    if not found:
        filters = f" that match {', '.join(include)}" if include else ""
        raise UsageError(f"no files{filters} in {', '.join(map(str, sources))}: give files, folders or patterns")
    return list(found.values())


def stdlib_files() -> list[TextFile]:
    """The sources of Python's own standard library, without installed packages, by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in _walk(root, None, INSTALLED) if path.suffix == ".py")
    files = [TextFile(path, path.relative_to(root).as_posix(), path.stat().st_size) for path in paths]
    if not files:
        raise DatasetError(f"no Python sources at {root} (the standard library is zipped or stripped here)")
    return [file for file in files if file.size]


def _expand(source: str, exclude: Path | None) -> Iterator[tuple[Path, Path]]:
    path = Path(source)
    if path.is_dir():
        yield from ((path, file) for file in _walk(path, exclude))
    elif path.exists():
        yield path.parent, path
    elif glob.has_magic(source):
        matches = [Path(match) for match in sorted(glob.glob(source, recursive=True))]
        root = Path(os.path.commonpath([m.parent for m in matches])) if matches else path
        yield from ((root, match) for match in matches if match.is_file())
    else:
        hint = "; for texts held in Python give an iterator: pack(iter(texts), ...)" if len(source) > 100 else ""
        raise UsageError(f"no file or folder {source[:100]!r}: give files, folders, patterns or `{STDLIB}`{hint}")


def _walk(root: Path, exclude: Path | None, skip: Sequence[str] = ()) -> Iterator[Path]:
    """Files below `root` by name; without hidden ones, `__pycache__`, folders named in `skip`, and `exclude` itself."""
    excluded = exclude.resolve() if exclude is not None else None
    for folder, folders, names in os.walk(root):
        here = Path(folder)
        folders[:] = sorted(
            name for name in folders
            if not name.startswith(".") and name not in ("__pycache__", *skip)
            and (excluded is None or (here / name).resolve() != excluded)
        )  # fmt: skip
        for name in sorted(names):
            if not name.startswith(".") and (here / name).is_file():
                yield here / name


def is_held_out(key: str, fraction: float) -> bool:
    return int(digest(key.encode("utf-8", "surrogateescape")), 16) < fraction * 2.0**64


def pieces(files: Sequence[TextFile], validation: float, splits: Mapping[str, str] = {}) -> Iterator[Piece]:
    """All files cut into pieces and assigned to a split, in order: by `splits` (by file key) where there are some."""
    few = len(files) < FEW_DOCUMENTS
    for file in files:
        if splits:
            yield from _cut_piece(file, 0, file.size, splits[file.key])
        elif few and validation > 0:
            cut = cut_position(file.path, file.size, round(file.size * (1 - validation)))
            yield from _cut_piece(file, 0, cut, "train")
            yield from _cut_piece(file, cut, file.size, "validation")
        else:
            yield from _cut_piece(file, 0, file.size, "validation" if is_held_out(file.key, validation) else "train")


def _cut_piece(file: TextFile, begin: int, end: int, split: str) -> Iterator[Piece]:
    while begin < end:
        stop = end if end - begin <= PIECE_BYTES else cut_position(file.path, end, begin + PIECE_BYTES)
        yield Piece(file, begin, stop, split, stop == end)
        begin = stop


def cut_position(path: Path, end: int, near: int) -> int:
    """A place at or soon after byte `near` where the text before `end` can be cut: after a line, else a character."""
    if near <= 0 or near >= end:
        return max(0, min(near, end))
    with path.open("rb") as file:
        file.seek(near)
        window = file.read(min(CUT_SEARCH_BYTES, max(8, (end - near) // 2)))
    line_end = window.find(b"\n")
    if line_end >= 0:
        return near + line_end + 1
    return near + next((i for i, byte in enumerate(window[:4]) if byte & 0xC0 != 0x80), 0)


def read_piece(piece: Piece) -> str:
    """The text of a piece. Raises `BadTextError`, or `DatasetError` where the file changed since it was listed."""
    file = piece.file
    try:
        with file.path.open("rb") as handle:
            if os.fstat(handle.fileno()).st_size != file.size:
                raise DatasetError(f"{file.path} changed while it was packed: pack again when nobody writes to it")
            handle.seek(piece.begin)
            data = handle.read(piece.end - piece.begin)
    except OSError as error:
        raise DatasetError(f"cannot read {file.path}: {error.strerror or error}") from error
    if len(data) != piece.end - piece.begin:
        raise DatasetError(f"{file.path} changed while it was packed: pack again when nobody writes to it")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BadTextError(
            f"{file.path} is not UTF-8 text (byte {piece.begin + error.start}): convert it, or leave it out by "
            f"naming the files to include (--include '*.txt')"
        ) from error
