"""Our side of the benchmark `data`: records packed, rows read into reused buffers, and a process of its own for a call.

Datasets are packed from an Arrow table, whatever the records: the pack that is compared with the peers' is that of
`data_versus`.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from benchmarks.data_peer_records import Raw
from turbopump.data.aligned import aligned_empty
from turbopump.data.format import open_dataset
from turbopump.data.manifest import Field
from turbopump.data.reading import SplitData
from turbopump.data.text import TOKENIZER_NAME, ByteTokenizer, tokenizer_entry
from turbopump.data.writer import DatasetWriter
from turbopump.pack import pack

BATCH = 256
TOKEN = np.dtype(np.uint16)
T = TypeVar("T")

Read = Callable[[np.ndarray], Any]


def note(text: str) -> None:
    """A line of what is being measured, or of a figure beside the rows."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def as_table(raw: Raw) -> pa.Table:
    """The records as one column: fixed-size lists, or binaries."""
    values = pa.py_buffer(raw.values)
    if raw.record_bytes:
        flat = pa.Array.from_buffers(pa.uint8(), raw.values.size, [None, values])
        return pa.table({"x": pa.FixedSizeListArray.from_arrays(flat, raw.record_bytes)})
    return pa.table(
        {"x": pa.Array.from_buffers(pa.large_binary(), raw.count, [None, pa.py_buffer(raw.offsets), values])}
    )


def packed(raw: Raw, directory: Path) -> SplitData:
    """The records packed and opened, nothing of them checked yet."""
    pack(as_table(raw), directory, validation=0.0)
    return opened(directory)


def packed_tokens(raw: Raw, directory: Path) -> SplitData:
    """The whole raw file as one stream of uint16 tokens. The tokenizer is there for form's sake: nothing is decoded."""
    tokenizer = ByteTokenizer()
    with DatasetWriter(directory, kind="tokens", fields=[Field("tokens", TOKEN.name)]) as writer:
        writer.add_file(TOKENIZER_NAME, tokenizer.dumps())
        writer.append("train", [raw.values.view(TOKEN)])
        writer.finish(tokenizer=tokenizer_entry(tokenizer))
    return opened(directory)


def opened(directory: Path) -> SplitData:
    return open_dataset(directory, "mapped").data("train")


def check_all(data: SplitData) -> None:
    """Check every block, as a first epoch does."""
    for shard in range(len(data.shards)):
        data.check_shard(0, shard)


def rows_reader(data: SplitData) -> Read:
    """Batches of rows into one buffer: bytes [BATCH, record], or ragged."""
    (out,) = data.buffers(BATCH)
    if data.fields[0].fixed:
        return lambda ids: data.rows(0, ids, out)
    return lambda ids: data.ragged(0, ids, out)


def windows_reader(data: SplitData, items: int, *, wide: bool) -> Read:
    """Windows from given starts into one buffer: [BATCH, items], uint16 or (`wide`) int64."""
    out = aligned_empty((BATCH, items), np.int64 if wide else TOKEN)
    return lambda starts: data.windows(starts, items, wide=wide, out=out)


def all_of(read: Read, batches: np.ndarray) -> Callable[[], None]:
    """Read all batches, one call each."""
    given = list(batches)

    def run() -> None:
        for ids in given:
            read(ids)

    return run


def in_process(work: Callable[..., T], *given: Any) -> T:
    """`work(*given)` in a fresh process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()
