"""`manifest.json` of a dataset directory: what is in it, typed, checked on reading, printed the same every time.

    {"kind": "tokens" | "arrays", "block_bytes": 4096,
     "fields": [{"name": "tokens", "dtype": "uint16", "shape": [], "kind": "array", "media": ""}],
     "splits": {"train": {"rows": ..., "source_bytes": ..., "documents": ..., "document_sizes": {...},
                          "shards": [{"file": ..., "rows": ..., "bytes": ..., "xxh3": ..., "sums_xxh3": ...,
                                      "buffers": [[offset, bytes], ...]}]}},
     "tokenizer": {"kind": "bpe", "vocab_size": 4096, "file": "tokenizer.json", "digest": ...} | null,
     "sources": ["stdlib"], "skipped": 4, "labels": {"label": ["cat", "dog"]}, "schema_version": 2,
     "turbopump_version": ..., "digest": <XXH3-64 of all the above>}

The block checksums of a split are `<split>.sums`: uint64 for each block of each buffer of each shard, in that order.
No date and no path of the machine: the same input gives the same bytes. The digest covers the manifest itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from turbopump.core.errors import CorruptDataError, DatasetError
from turbopump.core.files import digest, from_json, from_json_as, to_json
from turbopump.core.version import VERSION

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_ITEM_BYTES = {name: int("".join(filter(str.isdigit, name))) // 8 for name in DTYPES}
_MOST = 1 << 50  # bytes or rows: 1 PB in one shard is a damaged manifest
_TINY = 1 << 31  # of one element's shape

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
        return self.item_bytes * math.prod(self.shape)

    @property
    def item_bytes(self) -> int:
        """Bytes of one number."""
        return _ITEM_BYTES[self.dtype]

    @property
    def fixed(self) -> bool:
        """Whether all rows have the same size: a shard then has one buffer for it, else offsets and values."""
        return self.kind == "array"


@dataclass(frozen=True)
class ShardEntry:
    """One Arrow IPC file: `bytes` is its size, `xxh3` the digest of all of it, `sums_xxh3` that of its block checksums.

    `buffers` holds (offset, bytes) in the file for the values of each field, or for its int64 offsets and its values.
    """

    file: str
    rows: int
    bytes: int
    xxh3: str
    sums_xxh3: str
    buffers: tuple[tuple[int, int], ...]

    def num_blocks(self, block_bytes: int) -> int:
        return sum(-(-size // block_bytes) for _, size in self.buffers)


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
    """`labels` gives names to the numbers of a field, e.g. the classes of a folder of images."""

    kind: str
    block_bytes: int
    fields: tuple[Field, ...]
    splits: Mapping[str, SplitEntry]
    tokenizer: TokenizerEntry | None = None
    sources: tuple[str, ...] = ()
    skipped: int = 0
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION
    turbopump_version: str = VERSION

    @property
    def rows(self) -> int:
        return sum(split.rows for split in self.splits.values())

    @cached_property
    def digest(self) -> str:
        """XXH3-64 of everything the manifest says, and with it of all the data (it holds their digests)."""
        return digest(to_json(self._table()))

    def dumps(self) -> bytes:
        return to_json({**self._table(), "digest": self.digest}, indent=True)

    def _table(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def bytes(self) -> int:
        """Bytes of all shards on disk."""
        return sum(shard.bytes for split in self.splits.values() for shard in split.shards)

    def field(self, name: str) -> int:
        """The number of the field `name`; raises `DatasetError` naming those there are."""
        names = [item.name for item in self.fields]
        if name not in names:
            raise DatasetError(f"no field {name!r} in the dataset (it has: {', '.join(names)})")
        return names.index(name)


def sums_name(split: str) -> str:
    return f"{split}.sums"


def num_buffers(fields: tuple[Field, ...]) -> int:
    return sum(1 if item.fixed else 2 for item in fields)


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
    return parse_manifest(data, str(file), str(path))


def parse_manifest(data: bytes, file: str, path: str) -> Manifest:
    """The manifest in `data`; `file` and `path` name it in errors."""
    try:
        manifest = from_json_as(data, Manifest)
        header = {"schema_version": manifest.schema_version, "turbopump_version": manifest.turbopump_version}
    except ValueError as error:
        header = _header(data, file, path)
        if header["schema_version"] == SCHEMA_VERSION:
            raise CorruptDataError(f"{file} is not usable: {error}; pack the dataset again") from error
    if header["schema_version"] != SCHEMA_VERSION:
        raise DatasetError(
            f"{file} has schema version {header['schema_version']!r} (written by turbopump "
            f"{header.get('turbopump_version', '?')}); this is turbopump {VERSION}, which reads version "
            f"{SCHEMA_VERSION}: pack the data again, or use the version that wrote it"
        )
    if _header(data, file, path).get("digest") != manifest.digest:
        raise CorruptDataError(f"{file} is damaged: its content differs from its own digest; pack the dataset again")
    try:
        _check(manifest)
    except ValueError as error:
        raise CorruptDataError(f"{file} is not usable: {error}; pack the dataset again") from error
    return manifest


def _header(data: bytes, file: str, path: str) -> dict[str, object]:
    """The table as it stands; raises where it is not even a manifest."""
    try:
        table = from_json(data)
    except ValueError as error:
        raise CorruptDataError(f"{file} is damaged (not valid JSON: {error}): pack the dataset again") from error
    if not isinstance(table, dict) or "schema_version" not in table:
        raise DatasetError(f"{file} is not the manifest of a turbopump dataset: {_how_to_make(path)}")
    return table


def missing_message(path: Path | str) -> str:
    what = "a folder without manifest.json" if Path(path).is_dir() else "not there"
    return f"no dataset at {path} ({what}): {_how_to_make(path)}"


def _how_to_make(path: Path | str) -> str:
    return f"make one with `turbopump pack SOURCE... {path}` (SOURCE: text files, a folder, stdlib, a .npz file)"


def _check(manifest: Manifest) -> None:
    """Raises `ValueError` for what no writer of ours would say, so that readers need not doubt a number again."""
    if not 64 <= manifest.block_bytes <= _MOST:
        raise ValueError(f"block_bytes is {manifest.block_bytes}")
    names = [item.name for item in manifest.fields]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"fields are {names}")
    for item in manifest.fields:
        if item.dtype not in DTYPES or not all(0 < size < _TINY for size in item.shape) or len(item.shape) > 32:
            raise ValueError(f"field {item.name!r} has dtype {item.dtype!r} and shape {item.shape}")
        if item.row_bytes > _MOST or (item.kind in ("bytes", "text") and (item.dtype != "uint8" or item.shape)):
            raise ValueError(f"field {item.name!r} of kind {item.kind} has dtype {item.dtype!r} and shape {item.shape}")
    if manifest.tokenizer is not None:
        check_file_name(manifest.tokenizer.file)
    if manifest.kind == "tokens" and (
        len(names) != 1
        or manifest.fields[0].kind != "array"
        or manifest.fields[0].shape
        or not manifest.fields[0].dtype.startswith("uint")
    ):
        raise ValueError(f"a dataset of tokens has one field of unsigned numbers, not {manifest.fields}")
    for name, split in manifest.splits.items():
        check_file_name(name)
        for shard in split.shards:
            _check_shard(shard, manifest)
        if not all(size.isascii() and size.isdecimal() for size in split.document_sizes):
            raise ValueError(f"document_sizes of {name!r} has keys that are no sizes")
        if split.rows != sum(shard.rows for shard in split.shards):
            raise ValueError(f"{split.rows} rows in {name!r}, but its shards hold another number")


def _check_shard(shard: ShardEntry, manifest: Manifest) -> None:
    check_file_name(shard.file)
    if len(shard.buffers) != num_buffers(manifest.fields) or not 0 < shard.rows < _MOST or not 0 <= shard.bytes < _MOST:
        raise ValueError(f"{shard.file} has {len(shard.buffers)} buffers, {shard.rows} rows and {shard.bytes} bytes")
    rest = iter(shard.buffers)
    for item in manifest.fields:
        sizes = [shard.rows * item.row_bytes] if item.fixed else [8 * (shard.rows + 1), None]
        for expected in sizes:
            offset, size = next(rest)
            wrong = size != expected if expected is not None else size % item.row_bytes
            if wrong or offset < 0 or size < 0 or offset + size > shard.bytes:
                raise ValueError(f"field {item.name!r} of {shard.file} does not fit its shard")


def check_file_name(name: str) -> None:
    """Raises `ValueError` for a name that is no plain file of the dataset's directory."""
    if not name or "/" in name or "\0" in name or name[0] == ".":
        raise ValueError(f"{name!r} is no file name")
