"""Parquet, and Arrow IPC files and streams (also `.feather`): parts are ranges of rows.

Parquet is cut between row groups; an Arrow file anywhere (batches are views of the memory map, and slices cost
nothing); an Arrow stream between its batches, which are found by reading the headers of all once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from turbopump.core.errors import DatasetError
from turbopump.data.inputs.columns import chunks_of_batch, class_names_of, fields_of_schema
from turbopump.data.inputs.files import InputFile, map_file, reading
from turbopump.data.inputs.protocol import CHUNK_BYTES, Chunk, FileInput, Keys, Part, Selection, numbered, same_fields
from turbopump.data.manifest import Field

MAGIC = b"ARROW1"
PARQUET_MAGIC = b"PAR1"


@dataclass
class ArrowInput(FileInput):
    """IPC files and streams, by what each file begins with."""

    all_fields: tuple[Field, ...] = ()

    def pieces(self, file: InputFile, target_bytes: int) -> Iterator[tuple[Part, int]]:
        with reading(file, "Arrow IPC"), map_file(file) as source:
            schema, batches = _open(source)
            self._check(file, schema)
            row = 0
            for batch in batches:
                size = _bytes_of(batch)
                step = max(1, batch.num_rows * target_bytes // size)
                for begin in range(0, batch.num_rows, step):
                    end = min(begin + step, batch.num_rows)
                    yield Part(file, row + begin, row + end), size * (end - begin) // batch.num_rows
                row += batch.num_rows

    def read_part(self, part: Part) -> Iterator[tuple[Chunk, Keys]]:
        with reading(part.file, "Arrow IPC"), map_file(part.file) as source:
            row = 0
            for batch in _open(source)[1]:
                begin, end = max(part.begin, row), min(part.end, row + batch.num_rows)
                if begin < end:
                    step = max(1, batch.num_rows * CHUNK_BYTES // _bytes_of(batch))
                    yield from self._chunks(batch.slice(begin - row, end - begin), part.file, begin, step)
                row += batch.num_rows
                if row >= part.end:
                    return

    def _chunks(self, batch: pa.RecordBatch, file: InputFile, row: int, step: int) -> Iterator[tuple[Chunk, Keys]]:
        for begin in range(0, batch.num_rows, step):
            for chunk, numbers in chunks_of_batch(
                batch.slice(begin, step), self.all_fields, row + begin, file.path, self.selection.dropped
            ):
                yield chunk, numbered(file, numbers)

    def _check(self, file: InputFile, schema: pa.Schema) -> None:
        same_fields(self.all_fields, fields_of_schema(schema, self.selection, file.path), file, self.files[0])


def arrow_input(
    files: tuple[InputFile, ...], selection: Selection, *, name: str = "arrow", splits: dict[str, str] | None = None
) -> ArrowInput:
    """Raises `DatasetError` where the first file is no Arrow file or holds columns that become no field."""
    with reading(files[0], "Arrow IPC"), map_file(files[0]) as source:
        schema, _ = _open(source)
        fields = fields_of_schema(schema, selection, files[0].path)
    return ArrowInput(
        name, files, selection.fields(fields), selection, class_names=class_names_of(schema), all_fields=fields,
        splits=splits or {},
    )  # fmt: skip


def _open(source: pa.NativeFile) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """Schema and record batches of a mapped file or stream."""
    head = source.read(len(MAGIC))
    source.seek(0)
    if head == MAGIC:
        file = pa.ipc.open_file(source)
        return file.schema, (file.get_batch(i) for i in range(file.num_record_batches))
    stream = pa.ipc.open_stream(source)
    return stream.schema, iter(stream)


def _bytes_of(batch: pa.RecordBatch) -> int:
    """Bytes of a batch's buffers. `nbytes` would follow offsets that nothing has checked yet."""
    batch.validate()
    return max(1, batch.get_total_buffer_size())


@dataclass
class ParquetInput(FileInput):
    all_fields: tuple[Field, ...] = ()

    def pieces(self, file: InputFile, target_bytes: int) -> Iterator[tuple[Part, int]]:
        with reading(file, "Parquet"), _open_parquet(file) as opened:
            same_fields(
                self.all_fields, fields_of_schema(opened.schema_arrow, self.selection, file.path), file, self.files[0]
            )
            row = 0
            for size, rows in _row_groups(opened):
                yield Part(file, row, row + rows), size
                row += rows

    def read_part(self, part: Part) -> Iterator[tuple[Chunk, Keys]]:
        with reading(part.file, "Parquet"), _open_parquet(part.file) as opened:
            row = 0
            for group, (size, rows) in enumerate(_row_groups(opened)):
                if part.begin <= row and row + rows <= part.end:
                    yield from self._read_group(
                        opened, group, row, max(1, rows * CHUNK_BYTES // max(1, size)), part.file
                    )
                row += rows

    def _read_group(
        self, opened: pq.ParquetFile, group: int, row: int, batch_rows: int, file: InputFile
    ) -> Iterator[tuple[Chunk, Keys]]:
        expected = opened.metadata.row_group(group).num_rows
        names = [item.name for item in self.all_fields]
        done = 0
        for batch in opened.iter_batches(batch_rows, [group], names, use_threads=False):
            for chunk, numbers in chunks_of_batch(
                batch, self.all_fields, row + done, file.path, self.selection.dropped
            ):
                yield chunk, numbered(file, numbers)
            done += batch.num_rows
        if done != expected:
            raise DatasetError(
                f"{file.path} is damaged: row group {group} holds {done} rows, its footer says {expected}"
            )


def parquet_input(files: tuple[InputFile, ...], selection: Selection) -> ParquetInput:
    """Raises `DatasetError` where the first file is not Parquet or holds columns that become no field."""
    rows = 0
    schema = None
    for file in files:
        with reading(file, "Parquet"), _open_parquet(file) as opened:
            rows += opened.metadata.num_rows
            schema = opened.schema_arrow if schema is None else schema
    assert schema is not None
    with reading(files[0], "Parquet"):
        fields = fields_of_schema(schema, selection, files[0].path)
    return ParquetInput(
        "parquet", files, selection.fields(fields), selection, rows, class_names_of(schema), all_fields=fields
    )


def _open_parquet(file: InputFile) -> pq.ParquetFile:
    return pq.ParquetFile(file.path, page_checksum_verification=True, memory_map=False)


def _row_groups(opened: pq.ParquetFile) -> Iterator[tuple[int, int]]:
    """Decoded bytes and rows of each row group."""
    for i in range(opened.metadata.num_row_groups):
        group = opened.metadata.row_group(i)
        yield group.total_byte_size, group.num_rows
