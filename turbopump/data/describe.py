"""What a dataset directory holds, as plain values for `turbopump inspect`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.data.format import Dataset, open_dataset
from turbopump.data.manifest import Field
from turbopump.data.ragged import Ragged
from turbopump.data.remote_files import RemoteConfig, is_url

SAMPLE_TOKENS = 64
SHOWN_BYTES = 60
SHOWN_NUMBERS = 8
FETCHED_OFFSETS_BYTES = 64 << 20  # of a remote split: more are not fetched to count sizes
_UNITS = {"bytes": "bytes", "text": "characters"}


def describe_dataset(path: Path | str, remote: RemoteConfig | None = None) -> dict[str, Any]:
    """Schema, splits, sizes, tokenizer and the first values of the dataset at `path`; an address is reached as `remote`
    says, and read without a cache.

    `splits[name]` has `rows`, `bytes` (on disk), `shards` and, for tokens, `source_bytes`, `bytes_per_token`,
    `documents`, `document_sizes` (a list of (largest size in tokens, documents), in powers of two) and `sample` (the
    first tokens decoded); for arrays `sample` is the first row as text, and `sizes` the rows by length (not of
    large remote splits: that would fetch all offsets). Raises `DatasetError` or `CorruptDataError`.
    """
    if is_url(path):
        remote = replace(remote or RemoteConfig(), cache_bytes=0)
    dataset = open_dataset(path, remote=remote)
    manifest = dataset.manifest
    tokenizer = manifest.tokenizer
    return {
        "path": str(path),
        "kind": manifest.kind,
        "schema_version": manifest.schema_version,
        "turbopump_version": manifest.turbopump_version,
        "digest": manifest.digest,
        "sources": list(manifest.sources),
        "skipped": manifest.skipped,
        "bytes": manifest.bytes,
        "rows": manifest.rows,
        "fields": [_field(item) for item in manifest.fields],
        "labels": {name: list(words) for name, words in manifest.labels.items()},
        "tokenizer": tokenizer and {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                                    "digest": tokenizer.digest},
        "splits": {name: _split(dataset, name) for name in manifest.splits},
    }  # fmt: skip


def _field(item: Field) -> dict[str, Any]:
    described: dict[str, Any] = {"name": item.name, "dtype": item.dtype, "shape": list(item.shape)}
    if item.kind != "array":
        described["kind"] = item.kind
    return {**described, "media": item.media} if item.media else described


def _split(dataset: Dataset, name: str) -> dict[str, Any]:
    entry = dataset.split(name)
    described: dict[str, Any] = {
        "rows": entry.rows,
        "bytes": sum(shard.bytes for shard in entry.shards),
        "shards": len(entry.shards),
        "sample": _sample(dataset, name) if entry.rows else "",
    }
    if sizes := _sizes(dataset, name):
        described["sizes"] = sizes
    if dataset.manifest.kind == "tokens":
        described["source_bytes"] = entry.source_bytes
        described["bytes_per_token"] = entry.source_bytes / entry.rows if entry.rows else 0.0
        described["documents"] = entry.documents
        described["document_sizes"] = sorted((int(size), count) for size, count in entry.document_sizes.items())
    return described


def _sample(dataset: Dataset, name: str) -> str:
    data = dataset.data(name)
    tokenizer = dataset.tokenizer()
    if tokenizer is not None:
        return tokenizer.decode(data.windows([0], min(SAMPLE_TOKENS, len(data)))[0])
    values = zip(dataset.manifest.fields, data.batch([0]), strict=True)
    return "\n".join(f"{field.name}: {_shown(field, column)}" for field, column in values)


def _shown(field: Field, column: np.ndarray | Ragged) -> str:
    """The first value of a column: a few of its numbers, or the beginning of its bytes or text."""
    value = column[0]
    if field.kind in ("bytes", "text"):
        return f"{value[:SHOWN_BYTES]!r}{'...' if len(value) > SHOWN_BYTES else ''} ({len(value)} {_UNITS[field.kind]})"
    numbers = value.ravel()
    more = ", ..." if len(numbers) > SHOWN_NUMBERS else ""
    shape = f" (shape {list(value.shape)})" if value.shape else ""
    return f"{', '.join(map(str, numbers[:SHOWN_NUMBERS].tolist()))}{more}{shape}"


def _sizes(dataset: Dataset, name: str) -> dict[str, list[tuple[int, int]]]:
    """For each field whose rows differ in length: (largest length, rows), in powers of two."""
    data = dataset.data(name)
    if dataset.remote and 8 * len(data) > FETCHED_OFFSETS_BYTES:
        return {}
    sizes = {}
    for number, field in enumerate(dataset.manifest.fields):
        if not field.fixed:
            bits = np.ceil(np.log2(np.maximum(data.lengths(number), 1))).astype(int)
            sizes[field.name] = [(1 << bit, int(count)) for bit, count in enumerate(np.bincount(bits)) if count]
    return sizes
