"""`manifest.json` of a dataset directory: what is in it, typed, checked on reading, printed the same every time.

    {"schema_version": 1, "turbopump_version": ..., "kind": "tokens" | "arrays", "block_bytes": 262144,
     "fields": [{"name": "tokens", "dtype": "uint16", "shape": []}],
     "tokenizer": {"kind": "bpe", "vocab_size": 4096, "file": "tokenizer.json", "digest": ...} | null,
     "sources": ["stdlib"], "skipped": 4,
     "splits": {"train": {"rows": ..., "source_bytes": ..., "documents": ..., "document_sizes": {...},
                          "shards": [{"file": ..., "rows": ..., "bytes": ..., "xxh3": ...,
                                      "columns": [{"offset": ..., "bytes": ..., "checksums": [...]}]}]}},
     "digest": <XXH3-64 of all the above>}

No date and no path of the machine: the same input gives the same bytes. The digest covers the manifest itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from turbopump.core.errors import CorruptDataError, DatasetError
from turbopump.core.files import digest, from_json, to_json
from turbopump.core.version import VERSION

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"
DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_ITEM_BYTES = {name: int("".join(filter(str.isdigit, name))) // 8 for name in DTYPES}


FieldKind = Literal["array", "ragged", "bytes", "text"]


@dataclass(frozen=True)
class Field:
    """One value of a record, by `kind`: a number or array of fixed shape (`array`), an array whose first axis differs
    from row to row and whose others are `shape` (`ragged`), `bytes`, or UTF-8 (`text`; both of dtype uint8).

    `media` tells how bytes are encoded (`image`, `audio`), where somebody decodes them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    kind: FieldKind = "array"
    media: Literal["", "image", "audio"] = ""

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, and of one element of the first axis where rows differ in length."""
        return _ITEM_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class ColumnEntry:
    """Where the raw values of one field lie in a shard; `checksums` are XXH3-64, one for each block of bytes."""

    offset: int
    bytes: int
    checksums: tuple[str, ...]


@dataclass(frozen=True)
class ShardEntry:
    """One Arrow IPC file; `bytes` is the file's size and `xxh3` the digest of all of it."""

    file: str
    rows: int
    bytes: int
    xxh3: str
    columns: tuple[ColumnEntry, ...]


@dataclass(frozen=True)
class SplitEntry:
    """`source_bytes`: UTF-8 bytes of the text the rows came from. `document_sizes`: documents by size, the key being
    the smallest power of two (in tokens) that is not less than the document."""

    rows: int = 0
    source_bytes: int = 0
    documents: int = 0
    document_sizes: Mapping[str, int] = field(default_factory=dict)
    shards: tuple[ShardEntry, ...] = ()


@dataclass(frozen=True)
class TokenizerEntry:
    kind: str
    vocab_size: int
    file: str
    digest: str


@dataclass(frozen=True)
class Manifest:
    kind: str
    block_bytes: int
    fields: tuple[Field, ...]
    splits: Mapping[str, SplitEntry]
    tokenizer: TokenizerEntry | None = None
    sources: tuple[str, ...] = ()
    skipped: int = 0
    schema_version: int = SCHEMA_VERSION
    turbopump_version: str = VERSION

    @property
    def rows(self) -> int:
        return sum(split.rows for split in self.splits.values())

    @property
    def digest(self) -> str:
        """XXH3-64 of everything the manifest says, and with it of all the data (it holds their digests)."""
        return digest(to_json(dataclasses.asdict(self)))

    def dumps(self) -> bytes:
        return to_json({**dataclasses.asdict(self), "digest": self.digest}, indent=True)

    @property
    def bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.bytes for split in self.splits.values() for shard in split.shards)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the dataset directory `path`.

    Raises `DatasetError` where there is none or it is of another schema, `CorruptDataError` where it was damaged.
    """
    file = path / MANIFEST_NAME
    try:
        data = file.read_bytes()
    except FileNotFoundError as error:
        raise DatasetError(missing_message(path)) from error
    except OSError as error:
        raise DatasetError(f"cannot read {file}: {error.strerror or error}") from error
    try:
        table = from_json(data)
    except ValueError as error:
        raise CorruptDataError(f"{file} is damaged (not valid JSON: {error}): pack the dataset again") from error
    if not isinstance(table, dict) or "schema_version" not in table:
        raise DatasetError(f"{file} is not the manifest of a turbopump dataset: {_how_to_make(path)}")
    if table["schema_version"] != SCHEMA_VERSION:
        raise DatasetError(
            f"{file} has schema version {table['schema_version']!r} (written by turbopump "
            f"{table.get('turbopump_version', '?')}); this is turbopump {VERSION}, which reads version "
            f"{SCHEMA_VERSION}: pack the data again, or use the version that wrote it"
        )
    stored = table.pop("digest", None)
    if stored != digest(to_json(table)):
        raise CorruptDataError(f"{file} is damaged: its content differs from its own digest; pack the dataset again")
    try:
        return _parse(table)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptDataError(f"{file} is not usable: {error!r}; pack the dataset again") from error


def missing_message(path: Path) -> str:
    what = "a folder without manifest.json" if path.is_dir() else "not there"
    return f"no dataset at {path} ({what}): {_how_to_make(path)}"


def _how_to_make(path: Path) -> str:
    return f"make one with `turbopump pack SOURCE... {path}` (SOURCE: text files, a folder, stdlib, a .npz file)"


def _parse(table: dict[str, Any]) -> Manifest:
    fields = tuple(Field(_text(f["name"]), _dtype(f["dtype"]), tuple(map(_count, f["shape"]))) for f in table["fields"])
    block_bytes = _count(table["block_bytes"])
    if not fields or not block_bytes:
        raise ValueError("no fields or block_bytes of 0")
    splits = {_file_name(name): _split(entry, fields, block_bytes) for name, entry in table["splits"].items()}
    entry = table["tokenizer"]
    tokenizer = None
    if entry is not None:
        tokenizer = TokenizerEntry(
            _text(entry["kind"]), _count(entry["vocab_size"]), _file_name(entry["file"]), _text(entry["digest"])
        )
    return Manifest(
        _text(table["kind"]), block_bytes, fields, splits, tokenizer, tuple(map(_text, table["sources"])),
        _count(table["skipped"]), SCHEMA_VERSION, _text(table["turbopump_version"]),
    )  # fmt: skip


def _split(entry: dict[str, Any], fields: tuple[Field, ...], block_bytes: int) -> SplitEntry:
    shards = tuple(_shard(shard, fields, block_bytes) for shard in entry["shards"])
    sizes = {_text(key): _count(count) for key, count in entry["document_sizes"].items()}
    rows = _count(entry["rows"])
    if rows != sum(shard.rows for shard in shards):
        raise ValueError(f"{rows} rows, but the shards hold {sum(shard.rows for shard in shards)}")
    return SplitEntry(rows, _count(entry["source_bytes"]), _count(entry["documents"]), sizes, shards)


def _shard(entry: dict[str, Any], fields: tuple[Field, ...], block_bytes: int) -> ShardEntry:
    file, rows, size = _file_name(entry["file"]), _count(entry["rows"]), _count(entry["bytes"])
    if len(entry["columns"]) != len(fields):
        raise ValueError(f"{file} has {len(entry['columns'])} columns for {len(fields)} fields")
    columns = []
    for item, column in zip(fields, entry["columns"], strict=True):
        offset, length = _count(column["offset"]), _count(column["bytes"])
        checksums = tuple(map(_text, column["checksums"]))
        if length != rows * item.row_bytes or offset + length > size or len(checksums) != -(-length // block_bytes):
            raise ValueError(f"column {item.name!r} of {file} does not fit its shard")
        columns.append(ColumnEntry(offset, length, checksums))
    return ShardEntry(file, rows, size, _text(entry["xxh3"]), tuple(columns))


def _checked(expected: type, test: Callable[[Any], bool]) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if type(value) is not expected or not test(value):
            raise ValueError(f"unexpected value {value!r}")
        return value

    return check


_text = _checked(str, lambda value: True)
_count = _checked(int, lambda value: 0 <= value < 1 << 62)
_dtype = _checked(str, lambda value: value in DTYPES)
_file_name = _checked(str, lambda value: bool(value) and "/" not in value and "\0" not in value and value[0] != ".")
