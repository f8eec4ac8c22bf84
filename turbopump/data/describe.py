"""What a dataset directory holds, as plain values for `turbopump inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from turbopump.data.format import Dataset, open_dataset
from turbopump.data.text import load_tokenizer

SAMPLE_TOKENS = 64


def describe_dataset(path: Path | str) -> dict[str, Any]:
    """Schema, splits, sizes, tokenizer and the first values of the dataset at `path`.

    `splits[name]` has `rows`, `bytes` (on disk), `shards` and, for tokens, `source_bytes`, `bytes_per_token`,
    `documents`, `document_sizes` (a list of (largest size in tokens, documents), in powers of two) and `sample` (the
    first tokens decoded); for arrays `sample` is the first row as text. Raises `DatasetError` or `CorruptDataError`.
    """
    dataset = open_dataset(path)
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
        "fields": [{"name": f.name, "dtype": f.dtype, "shape": list(f.shape)} for f in manifest.fields],
        "tokenizer": tokenizer and {"kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size,
                                    "digest": tokenizer.digest},
        "splits": {name: _split(dataset, name) for name in manifest.splits},
    }  # fmt: skip


def _split(dataset: Dataset, name: str) -> dict[str, Any]:
    entry = dataset.split(name)
    described: dict[str, Any] = {
        "rows": entry.rows,
        "bytes": sum(shard.bytes for shard in entry.shards),
        "shards": len(entry.shards),
        "sample": _sample(dataset, name) if entry.rows else "",
    }
    if dataset.manifest.kind == "tokens":
        described["source_bytes"] = entry.source_bytes
        described["bytes_per_token"] = entry.source_bytes / entry.rows if entry.rows else 0.0
        described["documents"] = entry.documents
        described["document_sizes"] = sorted((int(size), count) for size, count in entry.document_sizes.items())
    return described


def _sample(dataset: Dataset, name: str) -> str:
    last = np.array([min(SAMPLE_TOKENS, dataset.split(name).shards[0].rows) - 1])
    tokenizer = load_tokenizer(dataset.path, dataset.manifest)
    if tokenizer is not None:
        column = dataset.column(name, 0)
        column.check_rows(np.zeros(1, np.int64), last)
        return tokenizer.decode(column.values[: int(last[0]) + 1])
    first = np.zeros(1, np.int64)
    rows = []
    for number, field in enumerate(dataset.manifest.fields):
        column = dataset.column(name, 0, number)
        column.check_rows(first, first)
        values = column.values[0].ravel()
        more = ", ..." if len(values) > 8 else ""
        rows.append(f"{field.name} {list(field.shape)}: {', '.join(map(str, values[:8].tolist()))}{more}")
    return "\n".join(rows)
