"""Folders of audio or images: one row a file, its encoded bytes as they are, and what belongs to it.

    metadata.csv or metadata.jsonl    a column `file_name` (Hugging Face's AudioFolder and ImageFolder); all its columns
    *.trans.txt (LibriSpeech)         `text`: lines `<name without suffix> <transcript>`
    a .txt beside each file           `text`
    folders of one class each         `label` (int64) and the classes' names, in alphabetical order, of all splits

The first of these that is there counts, for all files. The key of a row is the file's name.
"""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from turbopump.core.errors import DatasetError
from turbopump.core.files import from_json
from turbopump.data.inputs.files import InputFile
from turbopump.data.inputs.media_types import media_of_suffix
from turbopump.data.inputs.protocol import LOOK_ROWS, Chunk, FileInput, Keys, Partition, Selection, cut
from turbopump.data.inputs.rows import Row, chunk_of_rows, fields_of_rows, grouped
from turbopump.data.inputs.text import read_whole
from turbopump.data.manifest import Field

METADATA = ("metadata.csv", "metadata.jsonl")
TRANSCRIPTS = ".trans.txt"
FILE_NAME = "file_name"
Media = Literal["image", "audio"]


@dataclass
class MediaInput(FileInput):
    """`about` holds the other fields of each file, by its name; where the transcript is a file, they are read late."""

    media: Media = "image"
    about: Mapping[str, Row] = field(default_factory=dict)
    beside: Mapping[str, InputFile] = field(default_factory=dict)
    all_fields: tuple[Field, ...] = ()

    def read(self, partition: Partition) -> Iterator[tuple[Chunk, Keys]]:
        for group in grouped(self.selection.kept(self._rows(partition))):
            names = [name for _, name, _ in group]
            chunk = chunk_of_rows([row for row, _, _ in group], self.all_fields, names.__getitem__)
            yield from cut(*self.selection.apply(chunk, names))

    def _rows(self, partition: Partition) -> Iterator[tuple[Row, str, int]]:
        for part in partition.parts:
            data = read_whole(part.file)
            row = {self.media: data, **self._described(part.file)}
            yield self.selection.of_row(row, lambda: part.file.path), part.file.name, len(data)  # noqa: B023

    def _described(self, file: InputFile) -> Row:
        beside = self.beside.get(file.name)
        return self.about[file.name] if beside is None else {"text": _text_of(beside)}


def media_input(
    files: tuple[InputFile, ...], media: Media, selection: Selection, *, in_splits: bool = False
) -> MediaInput:
    """`files` are all files found, the descriptions among them; the first folder of their names may be a split's.

    Raises `DatasetError` where a file has no description, or a description no file.
    """
    wanted = tuple(file for file in files if media_of_suffix(file.name) == media)
    about, beside, class_names = _descriptions(wanted, files, media, in_splits)
    made = MediaInput(media, wanted, media=media, about=about, beside=beside, num_rows=len(wanted), selection=selection)
    made.class_names = class_names
    rows = ((file.path, {media: b"", **made._described(file)}) for file in wanted)
    chosen = ((selection.of_row(row, lambda: path), path, 0) for path, row in rows)  # noqa: B023 - used at once
    look = list(itertools.islice(selection.kept(chosen), LOOK_ROWS))
    if not look:
        raise DatasetError(f"nothing to pack: {wanted[0].path} and all other files have a null in their description")
    made.all_fields = fields_of_rows([row for row, _, _ in look], lambda i: look[i][1], {media: media})
    made.fields = selection.fields(made.all_fields)
    return made


def _descriptions(
    wanted: tuple[InputFile, ...], files: tuple[InputFile, ...], media: Media, in_splits: bool
) -> tuple[dict[str, Row], dict[str, InputFile], dict[str, tuple[str, ...]]]:
    by_name = {file.name: file for file in files}
    tables = [file for file in files if PurePosixPath(file.name).name in METADATA]
    transcripts = [file for file in files if file.name.endswith(TRANSCRIPTS)]
    if tables:
        return _complete(_from_tables(tables, by_name, media), wanted, tables[0].path), {}, {}
    if transcripts and media == "audio":
        return _complete(_from_transcripts(transcripts), wanted, transcripts[0].path, whole_name=False), {}, {}
    texts = {file.name: by_name.get(str(PurePosixPath(file.name).with_suffix(".txt"))) for file in wanted}
    if any(texts.values()):
        missing = next((name for name, text in texts.items() if text is None), None)
        if missing is not None:
            raise DatasetError(f"{by_name[missing].path} has no .txt of its name with its text, as other files have")
        return {}, {name: text for name, text in texts.items() if text is not None}, {}
    classes = {file.name: _class_of(file, in_splits) for file in wanted}
    unnamed = next((file for file in wanted if not classes[file.name]), None)
    if unnamed is not None and any(classes.values()):
        raise DatasetError(f"{unnamed.path} lies in no folder of a class, as other files do: move it or leave it out")
    names = tuple(sorted(set(classes.values())))
    if len(names) < 2:
        return {name: {} for name in classes}, {}, {}
    number = {name: i for i, name in enumerate(names)}
    return {name: {"label": number[c]} for name, c in classes.items()}, {}, {"label": names}


def _class_of(file: InputFile, in_splits: bool) -> str:
    """The folder a file lies in; empty where that is a split's."""
    folders = PurePosixPath(file.name).parent.parts
    if in_splits:
        return folders[-1] if len(folders) > 1 else ""
    return folders[-1] if folders else Path(file.path).parent.name


def _complete(
    found: dict[str, Row], wanted: tuple[InputFile, ...], where: str, whole_name: bool = True
) -> dict[str, Row]:
    """The descriptions by file name; raises where a file has none, or one has no file."""
    about = {}
    for file in wanted:
        key = file.name if whole_name else str(PurePosixPath(file.name).with_suffix(""))
        if key not in found:
            raise DatasetError(f"{where} says nothing about {file.path}: add it there, or remove the file")
        about[file.name] = found.pop(key)
    if found:
        raise DatasetError(f"{where} names {next(iter(found))!r}, which is not there (or empty): remove its line")
    return about


def _from_tables(tables: list[InputFile], by_name: Mapping[str, InputFile], media: Media) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for table in tables:
        folder = PurePosixPath(table.name).parent
        for line, row in _lines_of_csv(table) if table.name.endswith(".csv") else _lines_of_jsonl(table):
            where = f"{table.path} line {line}"
            name = row.pop(FILE_NAME, None)
            if not isinstance(name, str) or not name:
                raise DatasetError(f"{where} has no {FILE_NAME!r}: it must name the file that the line is about")
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                raise DatasetError(f"{where}: {FILE_NAME} {name!r} leads out of the folder: name files in it")
            if str(folder / path) in found:
                raise DatasetError(f"{where} names {name!r} a second time: remove one line")
            if media in row:
                raise DatasetError(f"{where} has a column {media!r}, as the field of the bytes is called: rename it")
            found[str(folder / path)] = row
    return found


def _lines_of_csv(table: InputFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines and rows; a column becomes integers or floats where all its values are."""
    reader = csv.DictReader(_text_of(table).splitlines(keepends=True), strict=True)
    rows, lines = [], []
    try:
        for row in reader:
            if None in row or None in row.values():
                raise DatasetError(f"{table.path} line {reader.line_num} has not as many values as there are columns")
            rows.append(dict(row))
            lines.append(reader.line_num)
    except csv.Error as error:
        raise DatasetError(f"{table.path} line {reader.line_num} cannot be read as CSV: {error}") from error
    for name in reader.fieldnames or ():
        if name != FILE_NAME:
            for row, value in zip(rows, _typed([row[name] for row in rows]), strict=True):
                row[name] = value
    return iter(list(zip(lines, rows, strict=True)))


def _typed(values: list[str]) -> list[Any]:
    for kind in (int, float):
        try:
            return [kind(value) for value in values]
        except ValueError:
            continue
    return list(values)


def _lines_of_jsonl(table: InputFile) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(_text_of(table).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
        except ValueError as error:
            raise DatasetError(f"{table.path} line {number} is not valid JSON: {error}") from error
        if not isinstance(row, dict):
            raise DatasetError(f"{table.path} line {number} is no object: each line must be like {{...}}")
        yield number, row


def _from_transcripts(transcripts: list[InputFile]) -> dict[str, Row]:
    found: dict[str, Row] = {}
    for file in transcripts:
        folder = PurePosixPath(file.name).parent
        for number, line in enumerate(_text_of(file).split("\n"), 1):
            if not line.strip():
                continue
            name, _, text = line.strip().partition(" ")
            if not text.strip() or "/" in name or str(folder / name) in found:
                raise DatasetError(f"{file.path} line {number} must be a new name, a space and its transcript")
            found[str(folder / name)] = {"text": text.strip()}
    return found


def _text_of(file: InputFile) -> str:
    data = read_whole(file)
    try:
        return data.decode().strip()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{file.path} is not UTF-8 text (line {line}): convert it") from error
