"""WebDataset: tar archives in which consecutive members of one name before the first dot are a sample.

    images/0001.jpg  images/0001.cls  images/0001.json     ->  fields jpg (bytes), cls (int64), json (text)

Nothing is ever unpacked to disk. A member that is a link or device, or whose name leads out of the archive, is an
error, and so is an archive without its end: `tarfile` alone takes a damaged header for the end. An archive larger than
the target is cut between samples, found by walking its headers.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.data.inputs.files import InputFile, codec_of, open_bytes, reading
from turbopump.data.inputs.media_types import media_of_suffix
from turbopump.data.inputs.protocol import LOOK_BYTES, Chunk, FileInput, Keys, Part, Selection
from turbopump.data.inputs.rows import Row, chunk_of_rows, fields_of_rows, grouped
from turbopump.data.manifest import Field

TEXT = ("txt", "text", "transcript", "json", "caption")
INTEGERS = ("cls", "cls2", "index", "inx", "id", "count")
LOOK_SAMPLES = 20


class _Member(tarfile.TarInfo):
    """Turns headers that `tarfile` would take for the end of the archive into errors."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:  # type: ignore[override]
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # a block of zeros: the proper end
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"cut short or damaged ({error} at byte {tarfile_.offset})") from error


@dataclass
class WebDatasetInput(FileInput):
    all_fields: tuple[Field, ...] = ()

    def pieces(self, file: InputFile, target_bytes: int) -> Iterator[tuple[Part, int]]:
        begin = 0
        if codec_of(file.name) is None and file.size > target_bytes:
            for place in _sample_begins(file):
                if place - begin >= target_bytes:
                    yield Part(file, begin, place), place - begin
                    begin = place
        yield Part(file, begin, file.size), file.size - begin

    def read_part(self, part: Part) -> Iterator[tuple[Chunk, Keys]]:
        for group in grouped(_samples(part, self.selection)):
            keys = [key for _, key, _ in group]
            rows = [row for row, _, _ in group]
            yield chunk_of_rows(rows, self.all_fields, partial(_where, part.file, keys)), keys


def webdataset_input(files: tuple[InputFile, ...], selection: Selection) -> WebDatasetInput:
    """Raises `DatasetError` where the first archives hold no sample or one that becomes no row."""
    for file in files:
        samples, size = [], 0
        for row, key, row_bytes in _samples(Part(file, 0, file.size), selection):
            samples.append((row, key))
            size += row_bytes
            if len(samples) >= LOOK_SAMPLES or size >= LOOK_BYTES:
                break
        if samples:
            media = {name: media_of_suffix(f".{name.rpartition('.')[2]}") for name in samples[0][0]}
            fields = fields_of_rows(
                [row for row, _ in samples], partial(_where, file, [key for _, key in samples]), media
            )
            return WebDatasetInput("webdataset", files, selection.fields(fields), selection, all_fields=fields)
    raise DatasetError(f"nothing to pack: {files[0].path} holds no sample")


def _where(file: InputFile, keys: list[str], i: int) -> str:
    return f"{file.path} sample {keys[i]!r}"


def _samples(part: Part, selection: Selection) -> Iterator[tuple[Row, str, int]]:
    """Fields, key and bytes of each sample that begins in the part."""
    row: dict[str, Any] = {}
    key, size = "", 0
    for member, data in _members(part):
        name, field = _key_and_field(member, part.file)
        if name != key and row:
            yield _chosen(row, selection, part.file, key), key, size
            row, size = {}, 0
        if field in row:
            raise DatasetError(
                f"{part.file.path} member {member.name!r}: sample {name!r} has two {field!r}: rename one"
            )
        key = name
        row[field] = _value(field, data, part.file, member.name)
        size += len(data)
    if row:
        yield _chosen(row, selection, part.file, key), key, size


def _chosen(row: dict[str, Any], selection: Selection, file: InputFile, key: str) -> Row:
    if selection.needed or selection.key:
        selection.check(list(row), f"{file.path} sample {key!r}")
    return {name: row[name] for name in selection.needed} if selection.needed else row


def _members(part: Part) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Regular members whose header lies in the part, with their content."""
    whole = codec_of(part.file.name) is not None
    with reading(part.file, "a tar archive"), open_bytes(part.file) as stream:
        if not whole:
            stream.seek(part.begin)
        with _tar(stream, whole) as archive:
            while (member := archive.next()) is not None and (whole or member.offset < part.end):
                archive.members = []  # type: ignore[attr-defined]  # it would keep the header of every member
                if _is_wanted(member, part.file):
                    opened = archive.extractfile(member)
                    data = b"" if opened is None else opened.read()
                    if len(data) != member.size:
                        raise EOFError(f"member {member.name!r} is cut short")
                    yield member, data


def _tar(stream: Any, as_stream: bool) -> tarfile.TarFile:
    return tarfile.open(fileobj=stream, mode="r|" if as_stream else "r:", tarinfo=_Member, errorlevel=2)


def _sample_begins(file: InputFile) -> Iterator[int]:
    """Where each sample after the first begins; nothing where global headers hold for what follows them."""
    last = None
    with reading(file, "a tar archive"), open_bytes(file) as stream, _tar(stream, False) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]
            if archive.pax_headers:
                return
            if _is_wanted(member, file):
                key, _ = _key_and_field(member, file)
                if last is not None and key != last:
                    yield member.offset
                last = key


def _is_wanted(member: tarfile.TarInfo, file: InputFile) -> bool:
    """Whether it is a file of a sample. Raises `DatasetError` for names that lead out, links and devices."""
    path = PurePosixPath(member.name)
    if path.is_absolute() or ".." in path.parts or "\0" in member.name or "\\" in member.name:
        raise DatasetError(
            f"{file.path} member {member.name!r} leads out of the archive: do not trust it, pack it anew"
        )
    if member.isdir():
        return False
    if not member.isreg():
        raise DatasetError(f"{file.path} member {member.name!r} is a link or device: archive the files themselves")
    if member.issparse():
        raise DatasetError(f"{file.path} member {member.name!r} is a sparse file: archive it as a plain one")
    return not path.name.startswith(".")


def _key_and_field(member: tarfile.TarInfo, file: InputFile) -> tuple[str, str]:
    folder, _, base = member.name.rpartition("/")
    stem, dot, extension = base.partition(".")
    try:
        member.name.encode()
    except UnicodeEncodeError:
        raise DatasetError(f"{file.path} member {member.name!r}: its name is not UTF-8: rename it") from None
    if not dot or not stem or not extension:
        raise DatasetError(
            f"{file.path} member {member.name!r} has no extension, which would name its field: rename it"
        )
    return (f"{folder}/{stem}" if folder else stem), extension.lower()


def _value(field: str, data: bytes, file: InputFile, name: str) -> Any:
    kind = field.rpartition(".")[2]
    try:
        if kind in TEXT:
            return data.decode()
        if kind in INTEGERS:
            return int(data)
        if kind == "npy":
            return _array_of_npy(data)
    except (ValueError, EOFError, OSError, MemoryError, OverflowError, SyntaxError, TypeError, KeyError) as error:
        what = "UTF-8 text" if kind in TEXT else "an integer" if kind in INTEGERS else "a numpy array without objects"
        raise DatasetError(
            f"{file.path} member {name!r} is not {what}: {str(error)[:100]}; repair or remove it"
        ) from error
    return data


def _array_of_npy(data: bytes) -> np.ndarray:
    """The array of a `.npy` file's content; its header is believed only where it fits the bytes."""
    stream = io.BytesIO(data)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, fortran, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    array = np.frombuffer(data, dtype, offset=stream.tell())
    return array.reshape(shape, order="F" if fortran else "C")
