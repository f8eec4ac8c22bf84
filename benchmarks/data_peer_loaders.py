"""Every peer's loader in a shuffled order, delivering one contiguous tensor a batch; and its steady rate.

Runs in the peers' own environment, one loader a fresh process: iterators abandoned mid-way go on in their threads. A
way yields epochs. An epoch's first 8 batches are not timed, the rest is; what stands ready in queues when the clock
starts is a gift of at most a queue's length. Reading, shuffling, joining records into the tensor (uint8 [B, record] or
int64 [B, tokens]) and crossing from a worker process are included; what the consumer does with it is nothing.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_peer_records import NUMBER_BYTES, Raw, sample_ids
from benchmarks.data_peer_stores import STORES, TOKEN, TOKEN_STORES, LitData, NpMemmap, Store, as_tokens, joined
from benchmarks.data_peer_stores import stacked_tokens as stacked

WARMUP_BATCHES = 8
BUFFER_RECORDS = 1000  # of WebDataset's shuffle
GRAIN_THREADS, GRAIN_BUFFER = 16, 500  # its defaults
PREFETCH_BATCHES = 4  # of each DataLoader worker


@dataclass(frozen=True)
class Job:
    """Load `raw`'s records, packed in `directory` by the peer called `peer`; `tokens`: as windows of uint16."""

    peer: str
    directory: str
    raw: Raw
    tokens: bool
    workers: int
    batch: int

    def store(self) -> Store:
        found = (TOKEN_STORES if self.tokens else STORES)[self.peer]()
        found.load()
        return found

    def opened(self) -> Store:
        store = self.store()
        store.open(Path(self.directory), self.raw.record_bytes)
        return store

    def collate(self, records: list[bytes]) -> Any:
        """Records as bytes, as the batch to deliver."""
        matrix = joined(records)
        return as_tokens(matrix) if self.tokens else matrix


Epochs = Iterator[Iterable[Any]]


# ---- by number: PyTorch's DataLoader hands whole batches of ids to what reads them best


class ByNumber:
    """A map-style dataset of batches, opened in the process that reads: some libraries do not survive a fork."""

    def __init__(self, job: Job, read: Callable[[Store, np.ndarray], Any]) -> None:
        self._job, self._read = job, read
        self._store: Store | None = None
        self._process = 0

    def __getitem__(self, ids: np.ndarray) -> Any:
        if self._store is None or self._process != os.getpid():
            self._store, self._process = self._job.opened(), os.getpid()
        return self._read(self._store, ids)

    def __len__(self) -> int:
        return self._job.raw.count


class ShuffledIds:
    """Batches of ids without end, each epoch in its own order, int64 [batch]; no batch holds an id twice."""

    def __init__(self, count: int, batch: int) -> None:
        self._count, self._batch = count, batch

    def __iter__(self) -> Iterator[np.ndarray]:
        for epoch in itertools.count():
            order = np.random.default_rng(epoch).permutation(self._count)
            for begin in range(0, self._count - self._batch + 1, self._batch):
                yield order[begin : begin + self._batch]


def _matrix(store: Store, ids: np.ndarray) -> Any:
    return store.matrix(ids)


def _windows(store: Store, ids: np.ndarray) -> Any:
    return store.windows(ids)


def _as_it_is(batch: Any) -> Any:
    return batch


def by_number(job: Job) -> Epochs:
    dataset = ByNumber(job, _windows if job.tokens else _matrix)
    ids: Any = ShuffledIds(job.raw.count, job.batch)
    yield _data_loader(job, dataset, sampler=ids, batch_size=None, collate_fn=_as_it_is)


def _data_loader(job: Job, dataset: Any, **settings: Any) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(dataset, num_workers=job.workers, **_worker_settings(job), **settings)


def _worker_settings(job: Job) -> dict[str, Any]:
    return {"prefetch_factor": PREFETCH_BATCHES, "persistent_workers": True} if job.workers else {}


# ---- the libraries' own


def mds_streaming(job: Job) -> Epochs:
    """StreamingDataset, shuffled by its default algorithm, through the DataLoader."""
    job.store()
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()

    def collate(samples: list[dict[str, Any]]) -> Any:
        if job.tokens:
            return stacked([sample["tokens"] for sample in samples])
        return job.collate([sample["record"] for sample in samples])

    dataset = StreamingDataset(local=job.directory, shuffle=True, batch_size=job.batch, predownload=8 * job.batch)
    loader = _data_loader(job, dataset, batch_size=job.batch, drop_last=True, collate_fn=collate)
    while True:
        yield loader


def litdata_streaming(job: Job) -> Epochs:
    """StreamingDataset, shuffled, through StreamingDataLoader."""
    store = job.store()
    assert isinstance(store, LitData)
    import litdata

    dataset = store.streaming(Path(job.directory), job.raw.record_bytes, shuffle=True, drop_last=True)
    collate = stacked if job.tokens else job.collate
    while True:
        yield litdata.StreamingDataLoader(
            dataset, batch_size=job.batch, num_workers=job.workers, collate_fn=collate, drop_last=True,
            **({"prefetch_factor": PREFETCH_BATCHES} if job.workers else {}),
        )  # fmt: skip


def grain_items(job: Job) -> Epochs:
    """Grain's documented order: items read ahead by threads, then batched."""
    grain, source = _grain(job)
    options = grain.ReadOptions(num_threads=GRAIN_THREADS, prefetch_buffer_size=GRAIN_BUFFER)
    items = source.seed(0).shuffle().repeat().to_iter_dataset(options)
    yield _grain_workers(job, items.batch(job.batch, batch_fn=job.collate))


def grain_batches(job: Job) -> Epochs:
    """Batches put together inside the threads that read ahead."""
    grain, source = _grain(job)
    batches = source.seed(0).shuffle().repeat().batch(job.batch, batch_fn=job.collate)
    options = grain.ReadOptions(num_threads=GRAIN_THREADS, prefetch_buffer_size=GRAIN_THREADS)
    yield _grain_workers(job, batches.to_iter_dataset(options))


class BatchSource:
    """A Grain source whose item is a batch of records in one random order, read by ArrayRecord's batched call."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._dataset = ByNumber(job, _windows if job.tokens else _matrix)
        order = np.random.default_rng(0).permutation(job.raw.count)
        self._ids_NB = order[: len(order) // job.batch * job.batch].reshape(-1, job.batch)

    def __len__(self) -> int:
        return len(self._ids_NB)

    def __getitem__(self, number: int) -> Any:
        return self._dataset[self._ids_NB[number]]


def grain_whole_batches(job: Job) -> Epochs:
    """One item is one batch, as many threads as cores."""
    job.store()
    import grain

    threads = len(os.sched_getaffinity(0))
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    items = grain.MapDataset.source(BatchSource(job)).seed(0).shuffle().repeat()
    yield _grain_workers(job, items.to_iter_dataset(options))


def _grain(job: Job) -> tuple[Any, Any]:
    job.store()
    import grain

    path = str(Path(job.directory) / "records.array_record")
    return grain, grain.MapDataset.source(grain.sources.ArrayRecordDataSource([path]))


def _grain_workers(job: Job, dataset: Any) -> Any:
    import grain

    if not job.workers:
        return dataset
    return dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=job.workers))


def webdataset_tar(job: Job) -> Epochs:
    """Shards shuffled, then records in a buffer of 1000; WebLoader passes whole batches on."""
    job.store()
    import webdataset

    shards = sorted(str(path) for path in Path(job.directory).glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), empty_check=False)
        .shuffle(BUFFER_RECORDS)
        .map(_tar_record)
        .batched(job.batch, collation_fn=job.collate, partial=False)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=job.workers, **_worker_settings(job))
    while True:
        yield loader


def _tar_record(sample: dict[str, Any]) -> bytes:
    return sample["bin"]


def token_slices(job: Job) -> Epochs:
    """nanoGPT's `get_batch`: windows cut from a memory map one by one, stacked. No worker processes."""
    import torch

    NpMemmap().load()
    tokens = np.memmap(Path(job.directory) / "values", TOKEN, "r")
    length = job.raw.record_bytes // TOKEN.itemsize

    def batches() -> Iterator[Any]:
        for ids in ShuffledIds(job.raw.count, job.batch):
            starts = (ids * length).tolist()
            yield torch.stack([torch.from_numpy(tokens[i : i + length].astype(np.int64)) for i in starts])

    yield batches()


OWN: dict[str, dict[str, Callable[[Job], Epochs]]] = {
    "MosaicML Streaming": {"StreamingDataset": mds_streaming, "LocalDataset by number": by_number},
    "LitData": {"StreamingDataset": litdata_streaming},
    "Grain": {"items": grain_items, "batches in threads": grain_batches, "a batch an item": grain_whole_batches},
    "WebDataset": {"tar": webdataset_tar},
}


def ways(peer: str, *, tokens: bool, workers: int) -> dict[str, Callable[[Job], Epochs]]:
    """The loaders of a peer by name; the best of them counts."""
    found = dict(OWN.get(peer, {"by number": by_number}))
    if peer == "np.memmap" and tokens and not workers:
        found["slices"] = token_slices
    return found


# ---- the steady rate


def steady_rate(job: Job, way: str, budget_s: float) -> dict[str, float]:
    """Records/s over at least `budget_s` timed seconds (fewer where the start of epochs takes most of the time).

    Raises `ValueError` for a batch that is not what it should be, or data too small for one timed batch an epoch.
    """
    batches, timed_s = 0, 0.0
    give_up = time.perf_counter() + 4 * budget_s + 20
    checked = False
    for epoch in ways(job.peer, tokens=job.tokens, workers=job.workers)[way](job):
        iterator = iter(epoch)
        for batch in itertools.islice(iterator, WARMUP_BATCHES):
            if not checked:
                check_batch(job, batch)
                checked = True
        begin = now = time.perf_counter()
        for _ in iterator:
            batches += 1
            now = time.perf_counter()
            if timed_s + now - begin >= budget_s:
                break
        timed_s += now - begin
        if timed_s >= budget_s or now > give_up:
            break
        if not batches:
            raise ValueError(f"an epoch of {job.raw.count} records ends within {WARMUP_BATCHES} batches: give more")
    return {"records_per_s": batches * job.batch / timed_s, "timed_s": timed_s, "batches": batches}


def check_batch(job: Job, batch: Any) -> None:
    """Raise `ValueError` unless a batch holds records of the raw file, whole, as one contiguous tensor."""
    import torch

    width = job.raw.record_bytes // TOKEN.itemsize if job.tokens else job.raw.record_bytes
    dtype = torch.int64 if job.tokens else torch.uint8
    if not isinstance(batch, torch.Tensor) or batch.dtype != dtype or tuple(batch.shape) != (job.batch, width):
        raise ValueError(
            f"{job.peer} delivers {type(batch)} {getattr(batch, 'shape', '')} {getattr(batch, 'dtype', '')}"
        )
    if not batch.is_contiguous():
        raise ValueError(f"{job.peer} delivers a batch that is not contiguous")
    rows = batch.numpy()
    found = rows.astype(TOKEN).view(np.uint8) if job.tokens else rows
    numbers = np.ascontiguousarray(found[:, :NUMBER_BYTES]).view("<u8")[:, 0]
    for number, row in zip(numbers.tolist(), found):
        if number >= job.raw.count or job.raw.record(number) != row.tobytes():
            raise ValueError(f"{job.peer} delivers a record that is none of the file's")


def read_rate(store: Store, raw: Raw, seed: int, batches: int, batch: int) -> tuple[float, str]:
    """Seconds that random batches take, one after another, and the digest of what was read (not timed)."""
    from benchmarks.data_peer_records import Digest

    digest, seconds = Digest(batch), 0.0
    for ids in sample_ids(seed, batches, batch, raw.count):
        begin = time.perf_counter()
        found = store.read(ids)
        seconds += time.perf_counter() - begin
        digest.add(lambda place, found=found: store.record(found, place))  # type: ignore[misc]
        begin = time.perf_counter()
        del found  # giving the memory back is part of the work
        seconds += time.perf_counter() - begin
    return seconds, digest.hexdigest()
