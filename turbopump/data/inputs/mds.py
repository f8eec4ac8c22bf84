"""MosaicML's MDS: `index.json` names shards, each a table of offsets before its samples.

    uint32 samples; uint32 offsets [samples + 1] from the file's begin; JSON of the columns; samples
    sample: uint32 size of each column without a fixed one; the columns' bytes in the order of their names

All numbers are little-endian. From the format's description and its writer (mosaicml-streaming 0.13). `pkl` is refused:
unpickling runs what the file says. A shard compressed with gzip or zstd is decompressed as a whole.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
import pyarrow as pa

from turbopump.core.errors import DatasetError
from turbopump.core.files import from_json
from turbopump.data.inputs.files import InputFile, input_file, reading
from turbopump.data.inputs.protocol import LOOK_BYTES, Chunk, FileInput, Keys, Part, Selection, numbered
from turbopump.data.inputs.rows import Row, chunk_of_rows, fields_of_rows, grouped
from turbopump.data.inputs.splits import FOLDERS, splits_by_folder
from turbopump.data.manifest import DTYPES, Field

INDEX = "index.json"
LOOK_SAMPLES = 100
CODECS = {"gz": "gzip", "zstd": "zstd"}
_TEXT = ("str", "json", "str_int", "str_float", "str_decimal")
_IMAGES = ("jpeg", "png", "jpeg_array")
_VALUE_DTYPES = {8: "uint8", 9: "int8", 16: "uint16", 17: "int16", 18: "float16", 32: "uint32", 33: "int32",
                 34: "float32", 64: "uint64", 65: "int64", 66: "float64"}  # fmt: skip


@dataclass(frozen=True)
class Shard:
    """What the index says of a shard; `columns` are (name, encoding, size or None); `raw_bytes` decompressed."""

    samples: int
    raw_bytes: int
    codec: str | None
    columns: tuple[tuple[str, str, int | None], ...]


@dataclass
class MdsInput(FileInput):
    shards: Mapping[str, Shard] = field(default_factory=dict)
    all_fields: tuple[Field, ...] = ()

    def pieces(self, file: InputFile, target_bytes: int) -> Iterator[tuple[Part, int]]:
        shard = self.shards[file.name]
        if shard.codec is not None:
            yield Part(file, 0, shard.samples), file.size
            return
        step = max(1, shard.samples * target_bytes // max(1, file.size))
        for begin in range(0, shard.samples, step):
            end = min(begin + step, shard.samples)
            yield Part(file, begin, end), file.size * (end - begin) // shard.samples

    def read_part(self, part: Part) -> Iterator[tuple[Chunk, Keys]]:
        for group in grouped(_samples(part, self.shards[part.file.name], self.selection)):
            first = group[0][1]
            rows = [row for row, _, _ in group]
            chunk = chunk_of_rows(rows, self.all_fields, partial(_where, part.file, first))
            yield chunk, numbered(part.file, np.arange(first, first + len(rows)))


def is_mds(path: Path) -> bool:
    """Whether the folder has an index of this format, or a folder for each split with one."""
    return bool(_folders(path))


def _folders(root: Path) -> list[str]:
    """The folders below `root` that hold an index: itself, or those of the splits where there are no others."""
    if _has_index(root):
        return [""]
    try:
        names = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []
    return names if set(names) <= set(FOLDERS) and all(_has_index(root / name) for name in names) else []


def _has_index(path: Path) -> bool:
    try:
        return b'"mds"' in (path / INDEX).read_bytes()
    except OSError:
        return False


def mds_input(root: Path, selection: Selection) -> MdsInput:
    """Raises `DatasetError` where index and shards do not fit together or the columns become no fields."""
    files: list[InputFile] = []
    shards: dict[str, Shard] = {}
    for folder in _folders(root):
        for file, shard in _read_index(root / folder):
            files.append(dataclasses.replace(file, name=str(PurePosixPath(folder, file.name))))
            shards[files[-1].name] = shard
            if shard.columns != shards[files[0].name].columns:
                raise DatasetError(f"{file.path} has other columns than {files[0].path}: pack them one by one")
    with_rows = [file for file in files if shards[file.name].samples]
    if not with_rows:
        raise DatasetError(f"nothing to pack: the index of {root} counts no sample")
    first = with_rows[0]
    selection.check([name for name, _, _ in shards[first.name].columns], first.path)
    rows, size = [], 0
    for row, _, row_bytes in _samples(Part(first, 0, shards[first.name].samples), shards[first.name], selection):
        rows.append(row)
        size += row_bytes
        if len(rows) >= LOOK_SAMPLES or size >= LOOK_BYTES:
            break
    media: dict[str, str] = {n: "image" for n, kind, _ in shards[first.name].columns if kind in _IMAGES}
    fields = fields_of_rows(rows, partial(_where, first, 0), media)
    num_rows = sum(shard.samples for shard in shards.values())
    made = MdsInput("mds", tuple(with_rows), selection.fields(fields), selection, num_rows)
    made.shards, made.all_fields = shards, fields
    made.splits = splits_by_folder(shards)
    return made


def _read_index(root: Path) -> list[tuple[InputFile, Shard]]:
    path = root / INDEX
    try:
        table = from_json(path.read_bytes())
        entries = table["shards"]
        if table.get("version", 2) != 2 or not isinstance(entries, list):
            raise ValueError("not version 2 with a list of shards")
        described = [_shard(entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path} cannot be read as an MDS index: {error!r}; write the dataset again") from error
    found = []
    for raw_name, zip_name, shard in described:
        plain = root / raw_name
        name = raw_name if plain.is_file() or zip_name is None else zip_name
        file = input_file(root / name, name)
        shard = dataclasses.replace(shard, codec=None) if name == raw_name else shard
        if name == raw_name and file.size != shard.raw_bytes:
            raise DatasetError(f"{file.path} has {file.size} bytes, but {path} says {shard.raw_bytes}: copy it again")
        found.append((file, shard))
    return found


def _shard(entry: dict[str, Any]) -> tuple[str, str | None, Shard]:
    if entry["format"] != "mds":
        raise ValueError(f"a shard of format {entry['format']!r}, not mds")
    raw, packed = entry["raw_data"], entry.get("zip_data")
    compression = entry.get("compression")
    codec = None
    if compression is not None:
        codec = CODECS.get(str(compression).partition(":")[0])
        if codec is None:
            raise ValueError(f"compression {compression!r} is not one of {', '.join(CODECS)}: decompress the shards")
    names, kinds, sizes = entry["column_names"], entry["column_encodings"], entry["column_sizes"]
    columns = tuple(zip(names, kinds, sizes, strict=True))
    if not columns or not all(isinstance(n, str) and isinstance(k, str) for n, k, _ in columns):
        raise ValueError("no columns, or one without a name")
    for name, kind, size in columns:
        if size is not None and (type(size) is not int or size < 0):
            raise ValueError(f"column {name!r} has size {size!r}")
        _check_kind(name, kind)
    shard = Shard(_count(entry["samples"]), _count(raw["bytes"]), codec, columns)
    zip_name = _base(packed["basename"]) if packed else None
    return _base(raw["basename"]), zip_name, shard


def _check_kind(name: str, kind: str) -> None:
    head = kind.partition(":")[0]
    known = (*_TEXT, *_IMAGES, *DTYPES, "bytes", "int", "ndarray")
    if head not in known:
        raise ValueError(
            f"column {name!r} is encoded as {kind!r}, not one of {', '.join(known)}: leave it out or convert"
        )


def _where(file: InputFile, first: int, i: int) -> str:
    return f"{file.path} sample {first + i}"


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 40:
        raise ValueError(f"unexpected count {value!r}")
    return value


def _base(name: Any) -> str:
    if not isinstance(name, str) or not name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{name!r} is no file of the folder")
    return name


def _samples(part: Part, shard: Shard, selection: Selection) -> Iterator[tuple[Row, int, int]]:
    """Columns wanted, number and bytes of each sample of the part."""
    file = part.file
    with reading(file, "MDS"), _open(file, shard) as stream:
        offsets = _offsets(stream, shard, file)
        stream.seek(offsets[part.begin])
        for number in range(part.begin, part.end):
            size = offsets[number + 1] - offsets[number]
            data = stream.read(size)
            if len(data) != size:
                raise EOFError(f"sample {number} is cut short")
            try:
                row = _decode(memoryview(data), shard.columns, selection.needed)
            except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
                raise DatasetError(f"{file.path} sample {number} is damaged: {error}; copy the shard again") from error
            yield row, number, size


def _open(file: InputFile, shard: Shard) -> IO[bytes]:
    if shard.codec is None:
        return open(file.path, "rb")
    with pa.input_stream(file.path, compression=shard.codec) as stream:
        data = stream.read(shard.raw_bytes + 1)
    if len(data) != shard.raw_bytes:
        raise ValueError(f"{len(data)} bytes decompressed, {shard.raw_bytes} expected")
    return io.BytesIO(data)


def _offsets(stream: IO[bytes], shard: Shard, file: InputFile) -> list[int]:
    """Where each sample begins, and the end; raises where they do not fit the file or the index."""
    table_bytes = 4 * (shard.samples + 2)
    if table_bytes > shard.raw_bytes:
        raise ValueError(f"{shard.samples} samples in {shard.raw_bytes} bytes")
    table = stream.read(table_bytes)
    if len(table) != table_bytes or int.from_bytes(table[:4], "little") != shard.samples:
        raise DatasetError(f"{file.path} does not hold the {shard.samples} samples of its index: copy it again")
    offsets = np.frombuffer(table[4:], "<u4").astype(np.int64)
    if offsets[0] < table_bytes or offsets[-1] != shard.raw_bytes or (np.diff(offsets) < 0).any():
        raise DatasetError(f"{file.path} is damaged: its offsets do not fit its {shard.raw_bytes} bytes; copy it again")
    return offsets.tolist()


def _decode(data: memoryview, columns: Sequence[tuple[str, str, int | None]], wanted: Sequence[str]) -> dict[str, Any]:
    place = 4 * sum(size is None for _, _, size in columns)
    if len(data) < place:
        raise ValueError(f"{len(data)} bytes are too few for the sizes of its columns")
    sizes = iter(np.frombuffer(data[:place], "<u4").tolist())
    row = {}
    for name, kind, fixed in columns:
        size = next(sizes) if fixed is None else fixed
        if place + size > len(data):
            raise ValueError(f"column {name!r} would end at byte {place + size} of {len(data)}")
        if not wanted or name in wanted:
            row[name] = _value(data[place : place + size], kind)
        place += size
    if place != len(data):
        raise ValueError(f"its columns hold {place} bytes, but it has {len(data)}")
    return row


def _value(data: memoryview, kind: str) -> Any:
    if kind in _TEXT:
        text = bytes(data).decode()
        return int(text) if kind == "str_int" else float(text) if kind in ("str_float", "str_decimal") else text
    if kind == "bytes" or kind in _IMAGES:
        return bytes(data)
    if kind == "int":
        return int(np.frombuffer(data, "<i8", count=1)[0]) if len(data) == 8 else _bad_size(data)
    if kind in DTYPES:
        (value,) = np.frombuffer(data, np.dtype(kind).newbyteorder("<")).astype(kind)
        return value
    return _array(data, kind)


def _bad_size(data: memoryview) -> Any:
    raise ValueError(f"an integer of {len(data)} bytes")


def _array(data: memoryview, kind: str) -> np.ndarray:
    """`ndarray`, `ndarray:dtype` or `ndarray:dtype:shape`; what the name leaves open stands before the values."""
    _, *given = kind.split(":")
    if given:
        dtype = np.dtype(given[0])
    else:
        dtype, data = np.dtype(_VALUE_DTYPES[data[0]]), data[1:]
    if len(given) > 1:
        shape = tuple(map(int, given[1].split(",")))
    else:
        item_bytes = 1 << (data[0] % 4)
        end = 1 + (data[0] >> 2) * item_bytes
        shape = tuple(np.frombuffer(data[1:end], f"<u{item_bytes}").tolist())
        data = data[end:]
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array of shape {list(shape)} in {len(data)} bytes")
    return np.frombuffer(data, dtype.newbyteorder("<")).reshape(shape)
