"""JSON lines: one object a line. Plain files are cut at line ends by bytes alone, compressed ones are read whole.

A line belongs to the part in which its first byte lies; its key number is that byte's place in the (decompressed)
file. Lines are counted from the part's begin, and for a message from the file's begin.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import IO, Any

import numpy as np

from turbopump.core.errors import DatasetError
from turbopump.core.files import from_json
from turbopump.data.inputs.files import InputFile, codec_of, open_bytes, reading
from turbopump.data.inputs.protocol import LOOK_BYTES, LOOK_ROWS, Chunk, FileInput, Keys, Part, Selection, numbered
from turbopump.data.inputs.rows import Row, chunk_of_rows, fields_of_rows, grouped

MAX_LINE_BYTES = 1 << 30


class JsonlInput(FileInput):
    """Objects of one schema, one a line; blank lines are passed over."""

    all_fields: tuple[Any, ...] = ()

    def pieces(self, file: InputFile, target_bytes: int) -> Iterator[tuple[Part, int]]:
        step = target_bytes if codec_of(file.name) is None else file.size
        for begin in range(0, file.size, step):
            end = min(begin + step, file.size)
            yield Part(file, begin, end), end - begin

    def read_part(self, part: Part) -> Iterator[tuple[Chunk, Keys]]:
        for group in grouped(self.selection.kept(_rows(part, self.selection))):
            places = [place for _, place, _ in group]
            chunk = chunk_of_rows([row for row, _, _ in group], self.all_fields, partial(_where_of, part.file, places))
            yield chunk, numbered(part.file, np.array(places))


def jsonl_input(files: tuple[InputFile, ...], selection: Selection) -> JsonlInput:
    """Raises `DatasetError` where the first lines are no objects of numbers, texts and lists of numbers."""
    rows, places, file = _look(files, selection)
    fields = fields_of_rows(rows, partial(_where_of, file, places))
    made = JsonlInput("jsonl", files, selection.fields(fields), selection)
    made.all_fields = fields
    return made


def _look(files: tuple[InputFile, ...], selection: Selection) -> tuple[list[Row], list[int], InputFile]:
    for file in files:
        rows, places, size = [], [], 0
        for row, place, row_bytes in selection.kept(_rows(Part(file, 0, file.size), selection)):
            rows.append(row)
            places.append(place)
            size += row_bytes
            if len(rows) >= LOOK_ROWS or size >= LOOK_BYTES:
                break
        if rows:
            return rows, places, file
    without = " without a null" if selection.dropped is not None else ""
    raise DatasetError(f"nothing to pack: {files[0].path} holds no record{without}")


def _rows(part: Part, selection: Selection) -> Iterator[tuple[Row, int, int]]:
    """Each object with the columns wanted, the place of its line, and the line's bytes."""
    for line, place in _lines(part):
        if not line.strip():
            continue
        try:
            row = from_json(line)
        except ValueError as error:
            raise DatasetError(f"{_where(part.file, place)} is not valid JSON or UTF-8: {error}") from error
        if not isinstance(row, dict) or not row:
            raise DatasetError(f"{_where(part.file, place)} is no object with fields: each line must be like {{...}}")
        yield selection.of_row(row, partial(_where, part.file, place)), place, len(line)


def _lines(part: Part) -> Iterator[tuple[bytes, int]]:
    whole = codec_of(part.file.name) is not None
    with reading(part.file, "JSON lines"), open_bytes(part.file) as stream:
        place = part.begin
        if part.begin:
            stream.seek(part.begin - 1)
            place += len(_line(stream, part.file)) - 1
        while whole or place < part.end:
            line = _line(stream, part.file)
            if not line:
                return
            yield line, place
            place += len(line)


def _line(stream: IO[bytes], file: InputFile) -> bytes:
    line = stream.readline(MAX_LINE_BYTES)
    if len(line) == MAX_LINE_BYTES:
        raise DatasetError(f"{file.path} has a line of over {MAX_LINE_BYTES} bytes: is it one JSON value on one line?")
    return line


def _where_of(file: InputFile, places: list[int], i: int) -> str:
    return _where(file, places[i])


def _where(file: InputFile, place: int) -> str:
    """`FILE line N`; lines before the place are counted now, when a message needs it."""
    lines = 1
    try:
        with open_bytes(file) as stream:
            while place > 0 and (data := stream.read(min(place, 1 << 20))):
                lines += data.count(b"\n")
                place -= len(data)
    except OSError:
        return f"{file.path} byte {place}"
    return f"{file.path} line {lines}"
