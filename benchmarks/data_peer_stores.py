"""How each peer packs records and reads them by number: its own format, at the best settings known for random reads.

Runs in the peers' own environment only; nothing of turbopump is imported. A store packs from an iterator of `bytes`
in one process, opens what it packed, and reads a batch of ids in whatever form the library gives, as long as the bytes
were copied: a view of mapped memory reads nothing. `matrix` and `windows` are what loaders deliver: one contiguous
tensor, uint8 [B, record] or int64 [B, tokens], the conversion included.

Trials (2 KB and 12 KB): LMDB `get` over `getmulti` 1.1x; HF Arrow format over Python's 1.1x; ArrayRecord uncompressed
over its default 1.4x; Lance 2.0 ("stable") with 64-bit binaries as good as 2.1, 2.2 and fixed-size ones.
"""

from __future__ import annotations

import itertools
import struct
import sys
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import numpy as np

WRITE_ROWS = 1000  # records a call, where a writer takes many
TOKEN = np.dtype(np.uint16)


class Store:
    """One peer's format. `reads`: it can read by number at all; `package`: the distribution whose version counts."""

    package = ""
    reads = True
    building_block = False  # no dataset library: shown beside

    def load(self) -> None:
        """Import what is needed; raises whatever the import raises."""
        raise NotImplementedError

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        """Pack all records; they are readable when this returns. `record_bytes` 0: their lengths differ."""
        raise NotImplementedError

    def open(self, directory: Path, record_bytes: int) -> None:
        raise NotImplementedError

    def read(self, ids: np.ndarray) -> Any:
        """A batch as the library gives it, in the order of `ids`; int64 [B]."""
        raise NotImplementedError

    def record(self, found: Any, place: int) -> bytes:
        """One record of what `read` gave."""
        return bytes(found[place])

    def matrix(self, ids: np.ndarray) -> Any:
        """A batch of records of one length: uint8 [B, record_bytes]."""
        return joined(self.read(ids))

    def windows(self, ids: np.ndarray) -> Any:
        """A batch of token windows: int64 [B, tokens]."""
        return as_tokens(self.matrix(ids))


def joined(records: Sequence[bytes]) -> Any:
    """Records of one length as one tensor, uint8 [B, record_bytes]: one copy (torch warns that it is not writable)."""
    import torch

    return torch.frombuffer(b"".join(records), dtype=torch.uint8).view(len(records), -1)


def as_tokens(matrix_BR: Any) -> Any:
    """Bytes [B, R] as tokens: int64 [B, R / 2]."""
    import torch

    return torch.from_numpy(matrix_BR.numpy().view(TOKEN).astype(np.int64))


def column_matrix(column: Any) -> Any:
    """An Arrow array of binaries of one length, 32-bit, 64-bit or fixed, as uint8 [B, record_bytes] without a copy."""
    import pyarrow as pa
    import torch

    values, start, width = column.buffers()[-1], column.offset, 0
    if pa.types.is_fixed_size_binary(column.type):
        width = column.type.byte_width
        start *= width
    else:
        dtype = np.int64 if pa.types.is_large_binary(column.type) else np.int32
        offsets = np.frombuffer(column.buffers()[1], dtype)[column.offset :]
        start, width = int(offsets[0]), int(offsets[1] - offsets[0])
    found = torch.frombuffer(values, dtype=torch.uint8, offset=start, count=len(column) * width)
    return found.view(len(column), width)


def chunks(records: Iterator[bytes], size: int = WRITE_ROWS) -> Iterator[list[bytes]]:
    while some := list(itertools.islice(records, size)):
        yield some


# ---- dataset libraries


class Mds(Store):
    """MosaicML Streaming: shards of 64 MB (its default), no compression, no hashes. No batched call."""

    package = "mosaicml-streaming"

    def load(self) -> None:
        stub_torchvision()
        import streaming

        self._library = streaming

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        with self._library.MDSWriter(out=str(directory), columns=self.columns(record_bytes)) as writer:
            for record in records:
                writer.write(self.sample(record))

    def columns(self, record_bytes: int) -> dict[str, str]:
        return {"record": "bytes"}

    def sample(self, record: bytes) -> dict[str, Any]:
        return {"record": record}

    def open(self, directory: Path, record_bytes: int) -> None:
        self._dataset = self._library.LocalDataset(str(directory))

    def read(self, ids: np.ndarray) -> list[bytes]:
        dataset = self._dataset
        return [dataset[number]["record"] for number in ids.tolist()]


class MdsTokens(Mds):
    """A sample is a window: an array of uint16 of fixed shape."""

    def columns(self, record_bytes: int) -> dict[str, str]:
        return {"tokens": f"ndarray:uint16:{record_bytes // TOKEN.itemsize}"}

    def sample(self, record: bytes) -> dict[str, Any]:
        return {"tokens": np.frombuffer(record, TOKEN)}

    def windows(self, ids: np.ndarray) -> Any:
        dataset = self._dataset
        return stacked_tokens([dataset[number]["tokens"] for number in ids.tolist()])


class LitData(Store):
    """LitData: its writer alone (what `optimize` runs in each process), chunks of 64 MB. Reads one by one."""

    package = "litdata"

    def load(self) -> None:
        import litdata
        from litdata.streaming import item_loader, writer

        self._library, self._loaders, self._writer = litdata, item_loader, writer

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        directory.mkdir(parents=True)
        options = self.options(record_bytes)
        writer = self._writer.BinaryWriter(str(directory), chunk_bytes="64MB", **options)
        for number, record in enumerate(records):
            writer[number] = self.sample(record)
        writer.done()
        writer.merge(1)

    def options(self, record_bytes: int) -> dict[str, Any]:
        return {}

    def sample(self, record: bytes) -> Any:
        return record

    def open(self, directory: Path, record_bytes: int) -> None:
        self._dataset = self.streaming(directory, record_bytes)

    def streaming(self, directory: Path, record_bytes: int, **settings: Any) -> Any:
        return self._library.StreamingDataset(str(directory), **self.options(record_bytes), **settings)

    def read(self, ids: np.ndarray) -> list[bytes]:
        dataset = self._dataset
        return [bytes(dataset[number]) for number in ids.tolist()]  # items may be views


class LitDataTokens(LitData):
    """One stream of uint16 that `TokensLoader` cuts into windows."""

    def options(self, record_bytes: int) -> dict[str, Any]:
        return {"item_loader": self._loaders.TokensLoader(block_size=record_bytes // TOKEN.itemsize)}

    def sample(self, record: bytes) -> Any:
        return np.frombuffer(record, TOKEN)

    def windows(self, ids: np.ndarray) -> Any:
        dataset = self._dataset
        return stacked_tokens([dataset[number] for number in ids.tolist()])


class ArrayRecord(Store):
    """ArrayRecord: one record a group, uncompressed; no read-ahead: what its documentation says for random reads."""

    package = "array_record"
    file = "records.array_record"

    def load(self) -> None:
        from array_record.python import array_record_module

        self._module = array_record_module

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        directory.mkdir(parents=True)
        writer = self._module.ArrayRecordWriter(str(directory / self.file), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
        writer.close()

    def open(self, directory: Path, record_bytes: int) -> None:
        options = "readahead_buffer_size:0,max_parallelism:0"
        self._reader = self._module.ArrayRecordReader(str(directory / self.file), options)

    def read(self, ids: np.ndarray) -> list[bytes]:
        return self._reader.read(ids.tolist())


class Grain(ArrayRecord):
    """Grain reads ArrayRecord's files through a source of its own."""

    package = "grain"

    def load(self) -> None:
        super().load()
        import grain

        self._library = grain

    def open(self, directory: Path, record_bytes: int) -> None:
        self._source = self._library.sources.ArrayRecordDataSource([str(directory / self.file)])

    def read(self, ids: np.ndarray) -> list[bytes]:
        return self._source.__getitems__(ids.tolist())


class HfDatasets(Store):
    """HF datasets: its Arrow writer in batches; `dataset[ids]` in the Arrow format, one-row pieces then combined."""

    package = "datasets"
    file = "records.arrow"

    def load(self) -> None:
        import datasets
        import datasets.arrow_writer

        library: Any = datasets  # mypy takes the folder of packed data for this package
        self._library, self._writer = library, library.arrow_writer

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        directory.mkdir(parents=True)
        features = self._library.Features(record=self.feature(record_bytes))
        writer = self._writer.ArrowWriter(path=str(directory / self.file), features=features)
        for some in chunks(records):
            writer.write_batch({"record": self.column(some)})
        writer.finalize()

    def feature(self, record_bytes: int) -> Any:
        return self._library.Value("large_binary")

    def column(self, records: list[bytes]) -> Any:
        return records

    def open(self, directory: Path, record_bytes: int) -> None:
        self._dataset = self._library.Dataset.from_file(str(directory / self.file)).with_format("arrow")

    def read(self, ids: np.ndarray) -> Any:
        return self._dataset[ids].column(0).combine_chunks()

    def record(self, found: Any, place: int) -> bytes:
        return found[place].as_py()

    def matrix(self, ids: np.ndarray) -> Any:
        return column_matrix(self.read(ids))


class HfTokens(HfDatasets):
    """Rows are lists of uint16 of fixed length."""

    def feature(self, record_bytes: int) -> Any:
        return self._library.Sequence(self._library.Value("uint16"), length=record_bytes // TOKEN.itemsize)

    def column(self, records: list[bytes]) -> Any:
        return np.frombuffer(b"".join(records), TOKEN).reshape(len(records), -1)

    def windows(self, ids: np.ndarray) -> Any:
        import torch

        tokens = self.read(ids).flatten().to_numpy()
        return torch.from_numpy(tokens.astype(np.int64)).view(len(ids), -1)


class Lance(Store):
    """Lance: 64-bit binaries; `take` of sorted ids without repeats, put back in order by Arrow's `take`."""

    package = "pylance"

    def load(self) -> None:
        import lance
        import pyarrow

        self._library, self._arrow = lance, pyarrow

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        arrow = self._arrow
        schema = arrow.schema([arrow.field("record", arrow.large_binary())])
        batches = (
            arrow.record_batch([arrow.array(some, arrow.large_binary())], schema=schema) for some in chunks(records)
        )
        reader = arrow.RecordBatchReader.from_batches(schema, batches)
        self._library.write_dataset(reader, str(directory), data_storage_version="stable")

    def open(self, directory: Path, record_bytes: int) -> None:
        self._dataset = self._library.dataset(str(directory))

    def read(self, ids: np.ndarray) -> tuple[Any, np.ndarray]:
        unique, places = np.unique(ids, return_inverse=True)
        return self._dataset.take(unique).column(0).combine_chunks(), places  # in the order of `unique`

    def record(self, found: tuple[Any, np.ndarray], place: int) -> bytes:
        column, places = found
        return column[int(places[place])].as_py()

    def matrix(self, ids: np.ndarray) -> Any:
        column, _ = self.read(ids)  # ids of a loader's batch do not repeat; any order is as good
        return column_matrix(column)


class Lmdb(Store):
    """LMDB: 64-bit integer keys appended in one transaction; a loop of `get` in one read transaction copies."""

    package = "lmdb"

    def load(self) -> None:
        import lmdb

        self._library = lmdb

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        environment = self._library.open(
            str(directory), map_size=1 << 40, max_dbs=1, writemap=True, map_async=True, sync=False, metasync=False
        )
        database = environment.open_db(b"records", integerkey=True)
        with environment.begin(write=True, db=database) as transaction:
            for number, record in enumerate(records):
                transaction.put(struct.pack("=Q", number), record, append=True)
        environment.close()

    def open(self, directory: Path, record_bytes: int) -> None:
        self._environment = self._library.open(str(directory), max_dbs=1, readonly=True, lock=False, readahead=False)
        database = self._environment.open_db(b"records", integerkey=True, create=False)
        self._transaction = self._environment.begin(db=database)

    def read(self, ids: np.ndarray) -> list[bytes]:
        keys, get = ids.tobytes(), self._transaction.get
        return [get(keys[begin : begin + 8]) for begin in range(0, len(keys), 8)]


class WebDataset(Store):
    """WebDataset: tar files of one eighth of the data or 64 MB. Sequential: it reads nothing by number."""

    package = "webdataset"
    reads = False

    def load(self) -> None:
        import webdataset

        self._library = webdataset

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        directory.mkdir(parents=True)
        pattern = str(directory / "%06d.tar")
        with self._library.ShardWriter(pattern, maxcount=10**9, maxsize=1 << 26, verbose=0) as writer:
            for number, record in enumerate(records):
                writer.write({"__key__": f"{number:012d}", "bin": record})


# ---- building blocks


class ArrowTake(Store):
    """Arrow IPC of one record batch, memory-mapped, and `take`: fixed-size or 64-bit binaries."""

    package = "pyarrow"
    building_block = True
    file = "records.arrow"

    def load(self) -> None:
        import pyarrow

        self._arrow = pyarrow

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        arrow = self._arrow
        directory.mkdir(parents=True)
        dtype = arrow.binary(record_bytes) if record_bytes else arrow.large_binary()
        pieces = [arrow.array(some, dtype) for some in chunks(records)]
        table = arrow.record_batch([arrow.concat_arrays(pieces)], names=["record"])
        with arrow.ipc.new_file(str(directory / self.file), table.schema) as writer:
            writer.write_batch(table)

    def open(self, directory: Path, record_bytes: int) -> None:
        mapped = self._arrow.memory_map(str(directory / self.file))
        self._column = self._arrow.ipc.open_file(mapped).get_batch(0).column(0)

    def read(self, ids: np.ndarray) -> Any:
        return self._column.take(self._arrow.array(ids))

    def record(self, found: Any, place: int) -> bytes:
        return found[place].as_py()

    def matrix(self, ids: np.ndarray) -> Any:
        return column_matrix(self.read(ids))


class NpMemmap(Store):
    """The bytes in one file, memory-mapped: `array[ids]` for one length, joined slices for several."""

    package = "numpy"
    building_block = True

    def load(self) -> None:
        pass

    def write(self, records: Iterator[bytes], directory: Path, record_bytes: int) -> None:
        directory.mkdir(parents=True)
        lengths = [0]
        with open(directory / "values", "wb") as file:
            for record in records:
                lengths.append(file.write(record))
        if not record_bytes:
            np.cumsum(lengths).astype(np.int64).tofile(directory / "offsets")

    def open(self, directory: Path, record_bytes: int) -> None:
        values = np.asarray(np.memmap(directory / "values", np.uint8, "r"))
        self._view = memoryview(values)  # type: ignore[arg-type]
        self._matrix = values.reshape(-1, record_bytes) if record_bytes else None
        self._offsets: Any = None if record_bytes else np.fromfile(directory / "offsets", np.int64)

    def read(self, ids: np.ndarray) -> Any:
        if self._matrix is not None:
            return self._matrix[ids]
        begins, ends, view = self._offsets[ids].tolist(), self._offsets[ids + 1].tolist(), self._view
        return b"".join([view[begin:end] for begin, end in zip(begins, ends)]), ids

    def record(self, found: Any, place: int) -> bytes:
        if self._matrix is not None:
            return found[place].tobytes()
        values, ids = found
        ends = np.cumsum(self._offsets[ids + 1] - self._offsets[ids])
        return values[ends[place - 1] if place else 0 : ends[place]]

    def matrix(self, ids: np.ndarray) -> Any:
        import torch

        return torch.from_numpy(self.read(ids))


STORES: dict[str, type[Store]] = {
    "MosaicML Streaming": Mds,
    "LitData": LitData,
    "ArrayRecord": ArrayRecord,
    "Grain": Grain,
    "HF datasets": HfDatasets,
    "Lance": Lance,
    "LMDB": Lmdb,
    "WebDataset": WebDataset,
    "Arrow take": ArrowTake,
    "np.memmap": NpMemmap,
}
TOKEN_STORES: dict[str, type[Store]] = {
    **STORES,
    "MosaicML Streaming": MdsTokens,
    "LitData": LitDataTokens,
    "HF datasets": HfTokens,
}


def stacked_tokens(windows: Sequence[np.ndarray]) -> Any:
    """Windows of uint16 as one tensor, int64 [B, tokens]."""
    import torch

    return torch.from_numpy(np.stack(windows).astype(np.int64))


def stub_torchvision() -> None:
    """Streaming imports torchvision, which does not load beside torch's CPU build, for images nobody asks for here."""
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__spec__ = ModuleSpec(name, None)  # transformers asks for it
    datasets: Any = sys.modules["torchvision.datasets"]
    datasets.VisionDataset = datasets.CIFAR10 = type("VisionDataset", (), {})
    functional: Any = sys.modules["torchvision.transforms.functional"]
    functional.to_tensor = None
