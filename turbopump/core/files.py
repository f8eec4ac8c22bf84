"""Writing files so that a crash leaves the old content or the new, and reading back what a crash cut short."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import xxhash

from turbopump.core.errors import RunDirectoryError

T = TypeVar("T")

_encode = msgspec.json.Encoder().encode


def write_atomic(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content`: a staging file beside it, fsync, rename, fsync of the directory."""
    data = content.encode() if isinstance(content, str) else content
    staging: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, staging = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
        os.fchmod(handle, 0o644)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staging, path)
        fsync_directory(path.parent)
    except BaseException as error:  # also Ctrl-C: no staging file may stay behind
        if staging is not None:
            Path(staging).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise RunDirectoryError(explain_os_error(error, path)) from error
        raise


def fsync_directory(path: Path) -> None:
    """Make renames and new names in `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explain_os_error(error: OSError, path: Path) -> str:
    """One line for the user: what failed, where, and what to do about it."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the device that holds {path}: free some space there or choose another directory"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{path} is not writable: choose a directory you may write to"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"{path} cannot be made, because a file stands where a directory is needed: remove it or choose another"
    return f"cannot write {path}: {error.strerror or error}"


def to_json(value: Any, *, indent: bool = False) -> bytes:
    """JSON bytes of plain values, dataclasses and msgspec structs."""
    data = _encode(value)
    return msgspec.json.format(data, indent=2) + b"\n" if indent else data


def from_json(data: bytes | str) -> Any:
    """Plain values of JSON bytes; raises `ValueError` on malformed input."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def from_json_as(data: bytes | str, cls: type[T]) -> T:
    """A dataclass (and those within it) of JSON bytes; raises `ValueError` that names the path of what does not fit."""
    try:
        return msgspec.json.decode(data, type=cls)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file; a line cut short by a crash (the last before a restart) is passed over."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError):
                continue
            if isinstance(record, dict):
                yield record


class JsonLines:
    """An append-only JSONL file; whole lines only, written at `flush`, on disk after `close`."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
        except OSError as error:
            raise RunDirectoryError(explain_os_error(error, path)) from error
        self._path = path
        self._lines: list[bytes] = []
        if self._file.tell() and not _ends_with_newline(path):
            self._lines.append(b"")  # a crash cut the last line short: do not glue the next one to it

    def write(self, record: Any) -> None:
        self._lines.append(_encode(record))

    def flush(self) -> None:
        if not self._lines:
            return
        block = b"\n".join(self._lines) + b"\n"
        try:
            self._file.write(block)
            self._file.flush()
            self._lines.clear()
        except OSError as error:
            self._lines.clear()
            raise RunDirectoryError(explain_os_error(error, self._path)) from error

    def close(self) -> None:
        if self._file.closed:
            return
        try:
            self.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise RunDirectoryError(explain_os_error(error, self._path)) from error
        finally:
            if not self._file.closed:
                self._file.raw.close()  # what the disk did not take stays behind, and was reported


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def digest(data: bytes | bytearray | memoryview) -> str:
    """XXH3-64 of a buffer as 16 hexadecimal digits (measured in the reliability notes: ten times SHA-256)."""
    return xxhash.xxh3_64_hexdigest(data)


def digest_file(path: Path, chunk_bytes: int = 1 << 22) -> str:
    """XXH3-64 of a file's content, read in chunks."""
    state = xxhash.xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(chunk_bytes):
            state.update(chunk)
    return state.hexdigest()


def new_digest() -> Any:
    """A running XXH3-64 with `update(bytes)` and `hexdigest()`."""
    return xxhash.xxh3_64()
