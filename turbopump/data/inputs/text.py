"""Text files as documents: one row a file, with one field `text`; the file's name is the key. Documents are not cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from turbopump.data.corpus import BadTextError
from turbopump.data.inputs.files import InputFile, check_unchanged, open_bytes, reading
from turbopump.data.inputs.protocol import CHUNK_BYTES, Chunk, FileInput, Keys, Partition
from turbopump.data.manifest import Field
from turbopump.data.ragged import Ragged, offsets_of


class TextInput(FileInput):
    """Whole files as documents of UTF-8, many in one chunk."""

    def read(self, partition: Partition) -> Iterator[tuple[Chunk, Keys]]:
        group: list[tuple[InputFile, bytes]] = []
        size = 0
        for part in partition.parts:
            data = read_whole(part.file)
            _check_utf8(part.file, data)
            if group and size + len(data) > CHUNK_BYTES:
                yield _chunk(group)
                group, size = [], 0
            group.append((part.file, data))
            size += len(data)
        if group:
            yield _chunk(group)


def text_input(files: tuple[InputFile, ...]) -> TextInput:
    return TextInput("text", files, (Field("text", "uint8", kind="text"),), num_rows=len(files))


def read_whole(file: InputFile) -> bytes:
    """The content (decompressed) of a file that is what it was when it was found; raises `DatasetError`."""
    check_unchanged(file)
    with reading(file, "a file"), open_bytes(file) as stream:
        data = stream.read()
    check_unchanged(file)
    return data


def _check_utf8(file: InputFile, data: bytes) -> None:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadTextError(
            f"{file.path} is not UTF-8 text (line {line}, byte {error.start}): convert it, or leave it out by naming "
            f"the files to include (--include '*.txt')"
        ) from error


def _chunk(group: list[tuple[InputFile, bytes]]) -> tuple[Chunk, Keys]:
    values = np.frombuffer(b"".join(data for _, data in group), np.uint8)
    text = Ragged(values, offsets_of([len(data) for _, data in group]), "text")
    return {"text": text}, [file.name for file, _ in group]
