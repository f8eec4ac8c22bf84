"""CSV and TSV, read by Arrow in blocks. The first block gives the types, and all other blocks are held to them.

A plain file is cut at line ends outside of quotes. Quotes are counted over the whole file beforehand, and rows with
them, so that a row has the same number however the file is cut. Where a quote opens in the middle of a value
(`5" pipe`) or a carriage return stands alone, counting does not tell what is a row, and the file stays whole.
"""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from pyarrow import types

from turbopump.core.errors import DatasetError
from turbopump.data.inputs.columns import chunks_of_batch, fields_of_schema
from turbopump.data.inputs.files import InputFile, codec_of, open_bytes, reading
from turbopump.data.inputs.protocol import Chunk, FileInput, Keys, Part, Selection, numbered
from turbopump.data.manifest import Field

BLOCK_BYTES = 8 << 20  # also the longest row
SCAN_BYTES = 1 << 22
_QUOTE, _LINE_END, _RETURN = b'"\n\r'


@dataclass
class DelimitedInput(FileInput):
    """`types` are the Arrow types of all columns in the file's order; text is read as binary and checked by row."""

    types: tuple[tuple[str, pa.DataType], ...] = ()
    all_fields: tuple[Field, ...] = ()
    delimiter: str = ","

    def pieces(self, file: InputFile, target_bytes: int) -> Iterator[tuple[Part, int]]:
        part = Part(file, 0, file.size)
        for place, rows in _cuts(file, target_bytes, self.delimiter):
            yield dataclasses.replace(part, end=place), place - part.begin
            part = Part(file, place, file.size, rows)
        yield part, part.end - part.begin

    def read_part(self, part: Part) -> Iterator[tuple[Chunk, Keys]]:
        row = part.first_row
        where = part.file.path if not row else f"{part.file.path} (from row {row} on)"
        with reading(part.file, f"CSV: {where}"), _open_range(part) as stream:
            for batch in self._batches(stream, part):
                for chunk, numbers in chunks_of_batch(
                    batch, self.all_fields, row, part.file.path, self.selection.dropped
                ):
                    yield chunk, numbered(part.file, numbers)
                row += batch.num_rows

    def _batches(self, stream: IO[bytes], part: Part) -> Iterator[pa.RecordBatch]:
        names = [name for name, _ in self.types]
        raw = {name: pa.binary() if types.is_string(kind) else kind for name, kind in self.types}
        reader = _reader(stream, self.delimiter, raw, names if part.begin else None)
        if reader.schema.names != names:
            raise DatasetError(
                f"{part.file.path} has the columns {', '.join(reader.schema.names)}, but {', '.join(names)} are in "
                f"{self.files[0].path}: pack files of one schema"
            )
        wanted = [item.name for item in self.all_fields]
        kinds = dict(self.types)
        for batch in reader:
            columns = [batch.column(name) for name in wanted]
            views = [c.view(pa.string()) if types.is_string(kinds[n]) else c for n, c in zip(wanted, columns)]
            yield pa.RecordBatch.from_arrays(views, names=wanted)


def delimited_input(files: tuple[InputFile, ...], selection: Selection, *, delimiter: str) -> DelimitedInput:
    """Raises `DatasetError` where the first file is no table; columns that Arrow takes for dates stay text."""
    first = files[0]
    with reading(first, "CSV"), open_bytes(first) as stream:
        schema = _reader(stream, delimiter, {}, None).schema
        guessed = [(f.name, pa.string() if _stays_text(f.type) else f.type) for f in schema]
    fields = fields_of_schema(pa.schema(guessed), selection, first.path)
    made = DelimitedInput("csv" if delimiter == "," else "tsv", files, selection.fields(fields), selection)
    made.types, made.all_fields, made.delimiter = tuple(guessed), fields, delimiter
    return made


def _stays_text(kind: pa.DataType) -> bool:
    return types.is_temporal(kind) or types.is_null(kind) or types.is_binary(kind)


def _reader(
    stream: IO[bytes], delimiter: str, kinds: dict[str, pa.DataType], names: list[str] | None
) -> pa_csv.CSVStreamingReader:
    return pa_csv.open_csv(
        stream,
        pa_csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names),
        pa_csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
        pa_csv.ConvertOptions(column_types=kinds),
    )


class _Range(io.RawIOBase):
    """The bytes [begin, end) of a file as a file."""

    def __init__(self, path: str, begin: int, end: int) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._file.seek(begin)
        self._left = end - begin

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        data = self._file.read(min(len(buffer), self._left))
        self._left -= len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        self._file.close()
        super().close()


def _open_range(part: Part) -> IO[bytes]:
    if codec_of(part.file.name) is not None:
        return open_bytes(part.file)
    return io.BufferedReader(_Range(part.file.path, part.begin, part.end), 1 << 20)


def _cuts(file: InputFile, target_bytes: int, delimiter: str) -> list[tuple[int, int]]:
    """Places about every `target_bytes` where a row begins, and that row's number; none where quotes do not tell."""
    if codec_of(file.name) is not None or file.size <= target_bytes:
        return []
    cuts: list[tuple[int, int]] = []
    opening = [ord(delimiter), _LINE_END, _QUOTE]
    begin, quotes, rows, last_end, before = 0, 0, -1, -1, _LINE_END  # -1: the header is no row
    with reading(file, "CSV"), open(file.path, "rb") as stream:
        while data := stream.read(SCAN_BYTES):
            while data[-1] == _RETURN and (more := stream.read(1)):
                data += more
            block = np.frombuffer(bytes([before]) + data, np.uint8)  # block[i + 1] is byte begin + i
            at = np.flatnonzero(block[1:] == _QUOTE)
            openers = block[at[quotes % 2 :: 2]]
            returns = np.flatnonzero(block[1:] == _RETURN)
            if not np.isin(openers, opening).all() or not (np.append(block, _LINE_END)[returns + 2] == _LINE_END).all():
                return []
            ends = np.flatnonzero(block[1:] == _LINE_END)
            ends = ends[(quotes + np.searchsorted(at, ends)) % 2 == 0]
            lengths = np.diff(ends + begin, prepend=last_end) - 1 - (block[ends] == _RETURN)
            counted = rows + np.cumsum(lengths > 0)
            wanted = range((cuts[-1][0] if cuts else 0) + target_bytes, begin + len(data), target_bytes)
            for near in wanted:
                i = int(np.searchsorted(ends, near - begin))
                if (
                    i < len(ends)
                    and begin + ends[i] + 1 < file.size
                    and (not cuts or begin + ends[i] + 1 > cuts[-1][0])
                ):
                    cuts.append((begin + int(ends[i]) + 1, int(counted[i])))
            if len(ends):
                rows, last_end = int(counted[-1]), begin + int(ends[-1])
            begin, quotes, before = begin + len(data), quotes + len(at), data[-1]
    return cuts
