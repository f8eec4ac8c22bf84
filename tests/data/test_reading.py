"""What was written is read back, by every way there is to read it, mapped and directly; what is damaged is named."""

import contextlib
import multiprocessing
import os
import pickle
import subprocess
import sys
import textwrap
import threading
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.processes import PATIENCE_S
from turbopump.core.errors import CorruptDataError, UsageError
from turbopump.data.format import open_dataset, verify_dataset
from turbopump.data.gather import Reference
from turbopump.data.manifest import DTYPES, Field, read_manifest
from turbopump.data.ragged import Ragged, ragged_of
from turbopump.data.ranged import RangedSplit
from turbopump.data.sources import ArraysConfig, ArraysSource
from turbopump.data.writer import DatasetWriter

ROWS = 150
TEXTS = ["", "größe", "火と水", "a", "\N{PISTOL}\N{COMBINING ACUTE ACCENT}" * 9, "line\n\0line"]
READINGS = ("mapped", "direct", "reference")


def make_columns(rows=ROWS, seed=0):
    """Fields of all kinds, and their rows as Python values."""
    random = np.random.default_rng(seed)
    fields, columns = [], []
    for number, dtype in enumerate(DTYPES):
        shape = [(), (3,), (2, 5)][number % 3]
        fields.append(Field(f"x_{dtype}", dtype, shape))
        columns.append(random.integers(-100 if dtype[0] in "if" else 0, 100, (rows, *shape)).astype(dtype))
    fields += [
        Field("boxes", "float32", (4,), "ragged"), Field("numbers", "int64", (), "ragged"),
        Field("blob", "uint8", (), "bytes", "image"), Field("empty", "uint8", (), "bytes"),
        Field("text", "uint8", (), "text"),
    ]  # fmt: skip
    columns += [
        [random.random((n, 4), np.float32) for n in random.choice([0, 1, 7], rows)],
        [random.integers(-9, 9, n) for n in random.choice([0, 3, 200], rows)],
        [random.bytes(n) for n in random.integers(0, 900, rows)],
        [b""] * rows,
        [TEXTS[n] for n in random.integers(0, len(TEXTS), rows)],
    ]
    return tuple(fields), columns


FIELDS, COLUMNS = make_columns()


def write(path, fields=FIELDS, columns=COLUMNS, split="train", shard_bytes=1 << 15, block_bytes=256, step=37):
    with DatasetWriter(path, kind="arrays", fields=fields, shard_bytes=shard_bytes, block_bytes=block_bytes) as writer:
        for begin in range(0, len(columns[0]), step):
            part = [column[begin : begin + step] for column in columns]
            writer.append(split, [p if isinstance(p, np.ndarray) else ragged_of(p) for p in part])
        writer.finish()
    return path


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    path = write(tmp_path_factory.mktemp("stored") / "d")
    assert len(read_manifest(path).splits["train"].shards) > 5
    return path


def open_data(path, reading, split="train"):
    data = open_dataset(path, "direct" if reading == "direct" else "mapped").data(split)
    assert isinstance(data, RangedSplit) == (reading == "direct")
    if reading == "reference":
        data._kernels = Reference()
    return data


def same(batch, columns, ids):
    for item, got, column in zip(FIELDS, batch, columns):
        if item.fixed:
            assert got.dtype == item.dtype and np.array_equal(got, column[ids])
        else:
            assert isinstance(got, Ragged) and got.kind == item.kind and len(got) == len(ids)
            for mine, i in zip(got, ids):
                assert np.array_equal(mine, column[i]) if item.kind == "ragged" else mine == column[i]


@pytest.mark.parametrize("reading", READINGS)
def test_batches_of_all_kinds_of_fields(stored, reading):
    data = open_data(stored, reading)
    random = np.random.default_rng(1)
    for ids in (np.arange(ROWS), np.array([3, 3, 0]), np.empty(0, np.int64), *random.integers(0, ROWS, (5, 64))):
        same(data.batch(ids), COLUMNS, ids)
    buffers = data.buffers(64)
    for ids in random.integers(0, ROWS, (10, 64)):
        size = int(random.integers(0, 65))
        batch = data.batch(ids[:size], buffers)
        same(batch, COLUMNS, ids[:size])
        assert batch[0].base is not None and np.shares_memory(batch[0], buffers[0]) == (size > 0)
    same(data.batch([5, 6, 149]), COLUMNS, [5, 6, 149])


@pytest.mark.parametrize("reading", READINGS)
def test_single_fields_whole_shards_and_lengths(stored, reading):
    data = open_data(stored, reading)
    for number, item in enumerate(FIELDS):
        parts = [data.shard_rows(number, shard) for shard in range(len(data.shards))]
        if item.fixed:
            assert np.array_equal(np.concatenate(parts), COLUMNS[number])
        else:
            rows = [row for part in parts for row in part]
            assert all(map(np.array_equal, rows, COLUMNS[number])) and len(rows) == ROWS
            lengths = [len(row.encode() if isinstance(row, str) else row) for row in COLUMNS[number]]
            assert data.lengths(number).tolist() == lengths
    for row in (0, ROWS - 1):
        shard = int(np.searchsorted(data.bounds, row, "right")) - 1
        assert data.locate(row) == f"row {row - data.bounds[shard]} of {stored / data.shards[shard].file}"


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_of_every_dtype(tmp_path, reading, dtype):
    values = np.random.default_rng(0).integers(-128, 127, 900).astype(dtype)
    write(tmp_path / "d", [Field("x", dtype)], [values], shard_bytes=256, block_bytes=64, step=100)
    data = open_data(tmp_path / "d", reading)
    for items in (1, 33, 500, 900):
        start = np.random.default_rng(1).integers(0, 900 - items + 1, 40)
        expected = np.stack([values[i : i + items] for i in start])
        wide = data.windows(start, items)
        assert wide.dtype == (dtype if dtype.startswith("float") else np.int64)
        assert wide.tobytes() == expected.astype(wide.dtype).tobytes()
        out = np.empty((40, items), dtype)
        assert data.windows(start, items, wide=False, out=out) is out and np.array_equal(out, expected)
        assert data.windows([], items).shape == (0, items)
        for wrong in (-1, 901 - items, 2**63 - 1, -(2**63)):
            with pytest.raises(IndexError):
                data.windows([0, wrong], items)
    with pytest.raises(IndexError):
        data.windows([0], 901)


@pytest.mark.parametrize("reading", READINGS)
def test_rows_that_are_not_there_and_memory_that_is_too_small(stored, reading):
    data = open_data(stored, reading)
    for wrong in (-1, ROWS, 2**63 - 1, -(2**63)):
        with pytest.raises(IndexError, match=rf"row {wrong} of split 'train' is out of range: it has rows 0 to 149"):
            data.rows(0, [3, wrong])
        with pytest.raises(IndexError, match=f"row {wrong} "):
            data.ragged(len(DTYPES), [wrong])
    buffers = data.buffers(4)
    with pytest.raises(UsageError, match=r"the memory given has 4 bytes, this batch needs 5: ask for fewer rows"):
        data.batch(np.arange(5), buffers)
    with pytest.raises(UsageError, match="the memory given"):
        data.ragged(len(DTYPES), np.arange(5), buffers[len(DTYPES)])
    with pytest.raises(UsageError, match="the memory given"):
        data.windows([0], 9, out=np.empty((1, 8), np.int64))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.data())
def test_batches_in_any_order_told_beforehand_or_not(stored, data):
    """The protocol between the split and its reader: prefetches kept, dropped, repeated, beyond what it holds."""
    ranged = open_data(stored, "direct")
    ahead = []
    for _ in range(data.draw(st.integers(1, 12))):
        move = data.draw(st.sampled_from(["prefetch", "prefetch", "read", "other", "shard", "wrong"]))
        ids = np.array(data.draw(st.lists(st.integers(0, ROWS - 1), max_size=9)), np.int64)
        if move == "prefetch" and len(ahead) < 8:
            ranged.prefetch(ids)
            ahead.append(ids)
        elif move == "read" and ahead:
            ids = ahead.pop(0)
            same(ranged.batch(ids), COLUMNS, ids)
        elif move == "other":
            same(ranged.batch(ids), COLUMNS, ids)
        elif move == "shard":
            ranged.shard_rows(len(FIELDS) - 1, 0)
        elif move == "wrong":
            with pytest.raises(IndexError):
                ranged.batch([0, ROWS])
            with pytest.raises(IndexError):
                ranged.prefetch([0, ROWS])


@pytest.mark.slow
def test_a_loader_that_was_closed_leaves_nothing_in_the_way_of_the_next(stored):
    ranged = open_data(stored, "direct")
    for begin in range(8):
        ranged.prefetch(np.arange(begin, begin + 20))
    same(ranged.batch(np.arange(0, 20)), COLUMNS, np.arange(0, 20))
    for begin in range(50, 57):  # another pass over the data begins while seven batches were never asked for
        same(ranged.batch(np.arange(begin, begin + 9)), COLUMNS, np.arange(begin, begin + 9))
        ranged.prefetch(np.arange(begin + 1, begin + 10))


@pytest.mark.parametrize("reading", READINGS)
def test_threads_share_a_split(stored, reading):
    data, wrong = open_data(stored, reading), []

    def read(seed):
        for ids in np.random.default_rng(seed).integers(0, ROWS, (8, 30)):
            try:
                same(data.batch(ids), COLUMNS, ids)
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_any_arrow_tool_opens_every_shard(stored):
    for shard in read_manifest(stored).splits["train"].shards:
        with pa.memory_map(str(stored / shard.file)) as file:
            table = pa.ipc.open_file(file).read_all()
            table.validate(full=True)
        assert table.num_rows == shard.rows and table.column_names == [item.name for item in FIELDS]
    table = pa.concat_tables([_table(stored / s.file) for s in read_manifest(stored).splits["train"].shards])
    assert table["text"].to_pylist() == COLUMNS[-1] and table["blob"].to_pylist() == COLUMNS[-3]
    boxes = [row.reshape(-1, 4).tolist() for row in COLUMNS[len(DTYPES)]]
    assert table["boxes"].to_pylist() == boxes


def test_pandas_opens_a_shard(stored):
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_feather(stored / "train-00000.arrow")
    assert list(frame["text"]) == COLUMNS[-1][: len(frame)]


def _table(file):
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_file(source).read_all()


# ---- damage ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def flipped(file, place, bit=3):
    good = file.read_bytes()
    data = bytearray(good)
    data[place] ^= 1 << bit
    file.write_bytes(data)
    yield
    file.write_bytes(good)


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
def test_a_flipped_bit_in_values_or_offsets_is_found_on_the_first_read(tmp_path, reading):
    write(tmp_path / "d")
    manifest = read_manifest(tmp_path / "d")
    buffers = [(f, part) for f, item in enumerate(FIELDS) for part in range(1 if item.fixed else 2)]
    for shard_number in (0, 3):
        shard = manifest.splits["train"].shards[shard_number]
        first = sum(s.rows for s in manifest.splits["train"].shards[:shard_number])
        for (field, _), (offset, size) in zip(buffers, shard.buffers):
            if not size:
                continue
            with flipped(tmp_path / "d" / shard.file, offset + size - 1):
                data = open_data(tmp_path / "d", reading)
                ids = np.arange(first, first + shard.rows)
                with pytest.raises(CorruptDataError, match=rf"{shard.file}.* of '{FIELDS[field].name}'"):
                    data.batch(ids)
                others = np.setdiff1d(np.arange(ROWS), ids)
                same(data.batch(others), COLUMNS, others)
                with pytest.raises(CorruptDataError, match=rf"{shard.file}: block .* of '{FIELDS[field].name}'"):
                    verify_dataset(tmp_path / "d")
    verify_dataset(tmp_path / "d")


@pytest.mark.parametrize("reading", READINGS)
def test_an_error_names_the_row_it_was_met_at(tmp_path, reading):
    values = np.arange(1000, dtype=np.uint32)
    write(tmp_path / "d", [Field("x", "uint32")], [values], shard_bytes=400, block_bytes=64)
    shard = read_manifest(tmp_path / "d").splits["train"].shards[4]
    with flipped(tmp_path / "d" / shard.file, shard.buffers[0][0] + 70):  # block 1: rows 16 to 31 of 100
        data = open_data(tmp_path / "d", reading)
        with pytest.raises(CorruptDataError, match=rf"{shard.file}: block 1 of 'x' .* met at row 420 of the split"):
            data.rows(0, [3, 420, 7])
        with pytest.raises(CorruptDataError, match=r"block 1 of 'x' .* met at row 380 of the split"):
            data.windows([0, 380], 50)
        assert np.array_equal(data.rows(0, [415, 432]), [415, 432])


@pytest.mark.slow
@pytest.mark.parametrize("reading", READINGS)
def test_flipped_bits_in_the_checksums_and_the_manifest(tmp_path, reading):
    write(tmp_path / "d")
    with flipped(tmp_path / "d" / "train.sums", 5):
        data = open_data(tmp_path / "d", reading)
        with pytest.raises(CorruptDataError, match=r"train.sums: the checksums of train-00000.arrow are damaged"):
            data.batch([0])
        same(data.batch([ROWS - 1]), COLUMNS, [ROWS - 1])
        with pytest.raises(CorruptDataError, match=r"train.sums: the checksums of train-00000.arrow are damaged"):
            verify_dataset(tmp_path / "d")
    size = (tmp_path / "d" / "manifest.json").stat().st_size
    for place in np.random.default_rng(0).integers(0, size, 60):
        with flipped(tmp_path / "d" / "manifest.json", place, bit=int(place) % 8):
            with contextlib.suppress(CorruptDataError):
                assert open_dataset(tmp_path / "d").manifest.digest == read_manifest(tmp_path / "d").digest
                same(open_data(tmp_path / "d", reading).batch([7]), COLUMNS, [7])  # between tokens: blanks


def test_verify_lists_all_that_is_wrong_and_reads_on(tmp_path):
    write(tmp_path / "d")
    shards = read_manifest(tmp_path / "d").splits["train"].shards
    with (
        flipped(tmp_path / "d" / shards[1].file, shards[1].buffers[1][0]),
        flipped(tmp_path / "d" / shards[2].file, 9),
        flipped(tmp_path / "d" / "train.sums", 3),
    ):
        with pytest.raises(CorruptDataError) as caught:
            verify_dataset(tmp_path / "d")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "checksums of train-00000" in lines[0] and "train-00001.arrow: block 0" in lines[1]
    assert "train-00002.arrow: bytes outside the values" in lines[2]


def test_a_schema_that_is_not_the_manifests_is_found_by_verify(tmp_path):
    write(tmp_path / "d")
    manifest = read_manifest(tmp_path / "d")
    fields = (replace(manifest.fields[0], dtype="int8"), *manifest.fields[1:])  # of the same size
    (tmp_path / "d" / "manifest.json").write_bytes(replace(manifest, fields=fields).dumps())
    with pytest.raises(CorruptDataError, match=r"train-00000.arrow: its schema differs from the fields"):
        verify_dataset(tmp_path / "d")


@pytest.mark.parametrize("reading", READINGS)
def test_truncated_missing_and_replaced_shards(tmp_path, reading):
    write(tmp_path / "d")
    file = tmp_path / "d" / "train-00001.arrow"
    data, good = open_data(tmp_path / "d", reading), file.read_bytes()
    os.truncate(file, 100)  # after it was opened, before it is read
    first = int(data.bounds[1])
    with pytest.raises(CorruptDataError, match=r"train-00001.arrow"):
        data.batch([first])
    with pytest.raises(CorruptDataError, match=r"train-00001.arrow has 100 bytes where \d+ were written"):
        open_dataset(tmp_path / "d")
    file.write_bytes((tmp_path / "d" / "train-00002.arrow").read_bytes().ljust(len(good))[: len(good)])
    with pytest.raises(CorruptDataError, match=r"train-00001.arrow"):
        open_data(tmp_path / "d", reading).batch([first])
    file.unlink()
    with pytest.raises(CorruptDataError, match=r"train-00001.arrow is missing"):
        open_dataset(tmp_path / "d")


# ---- shapes of datasets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", READINGS)
def test_a_record_larger_than_a_shard(tmp_path, reading):
    texts = ["small", "x" * 100_000, "", "y" * 70_000, "small too"]
    write(tmp_path / "d", [Field("t", "uint8", (), "text")], [texts], shard_bytes=4096)
    data = open_data(tmp_path / "d", reading)
    assert list(data.ragged(0, np.arange(5))) == texts and len(data.shards) >= 3
    verify_dataset(tmp_path / "d")


@pytest.mark.parametrize("reading", READINGS)
def test_rows_that_hold_nothing(tmp_path, reading):
    fields = [Field("t", "uint8", (), "text"), Field("r", "float32", (4,), "ragged")]
    columns = [[""] * 9, [np.empty((0, 4), np.float32)] * 9]
    write(tmp_path / "d", fields, columns, step=2)
    data = open_data(tmp_path / "d", reading)
    data.prefetch([1, 2])
    text, ragged = data.batch([1, 2])
    assert list(text) == ["", ""] and ragged.values.shape == (0, 4) and ragged.offsets.tolist() == [0, 0, 0]
    assert data.lengths(0).tolist() == [0] * 9 and len(data.shard_rows(1, 0)) == 9
    verify_dataset(tmp_path / "d")


def test_the_digest_is_that_of_content_and_not_of_how_it_was_handed_over(tmp_path):
    paths = [write(tmp_path / str(step), step=step) for step in (150, 37, 1)]
    assert len({read_manifest(path).digest for path in paths}) == 1
    names = sorted(os.listdir(paths[0]))
    assert all((paths[0] / n).read_bytes() == (path / n).read_bytes() for n in names for path in paths[1:])
    other = [column.copy() if isinstance(column, np.ndarray) else list(column) for column in COLUMNS]
    other[0][17] += 1
    assert read_manifest(write(tmp_path / "other", columns=other)).digest != read_manifest(paths[0]).digest
    renamed = (replace(FIELDS[0], name="y"), *FIELDS[1:])
    assert read_manifest(write(tmp_path / "names", renamed)).digest != read_manifest(paths[0]).digest


def many_shards(path, num_shards):
    """A dataset of one small shard under many names."""
    write(path, [Field("x", "float32", (4,))], [np.arange(32, dtype=np.float32).reshape(8, 4)])
    manifest = read_manifest(path)
    (shard,) = manifest.splits["train"].shards
    shards = tuple(replace(shard, file=f"train-{number:05d}.arrow") for number in range(num_shards))
    for entry in shards[1:]:
        os.link(path / shard.file, path / entry.file)
    (path / "train.sums").write_bytes((path / "train.sums").read_bytes() * num_shards)
    split = replace(manifest.splits["train"], rows=8 * num_shards, shards=shards)
    (path / "manifest.json").write_bytes(replace(manifest, splits={"train": split}).dumps())


@pytest.mark.slow
def test_ten_thousand_shards(tmp_path):
    many_shards(tmp_path / "d", 10_000)
    data = open_dataset(tmp_path / "d", "mapped").data("train")
    ids = np.random.default_rng(0).integers(0, len(data), 256)
    assert np.array_equal(data.rows(0, ids), np.arange(32).reshape(8, 4)[ids % 8])
    assert len(data._files._maps) == len(np.unique(ids // 8)), "only shards of the batch are mapped"


def test_a_first_batch_over_many_shards_is_copied_once(tmp_path, monkeypatch):
    many_shards(tmp_path / "d", 200)
    data = open_dataset(tmp_path / "d", "mapped").data("train")
    calls, rows = [], data._kernels.rows
    monkeypatch.setattr(data, "_kernels", type("Counted", (), {"rows": lambda *a: calls.append(1) or rows(*a[1:])})())
    data.rows(0, np.arange(0, 1600, 8))
    assert len(calls) == 2  # finds shards that are not mapped; then all are


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reading", ["mapped", "direct"])
def test_sources_travel_by_pickle_and_fork(stored, reading):
    source = ArraysSource(ArraysConfig(path=str(stored), reading=reading, decode=False), "train")
    ids = np.arange(0, ROWS, 7)
    same(source.__getitems__(ids), COLUMNS, ids)
    copied = pickle.loads(pickle.dumps(source))
    same(copied.__getitems__(ids), COLUMNS, ids)
    source.prefetch(ids)
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def child():
        try:
            same(source.__getitems__(ids + 1), COLUMNS, ids + 1)
            results.put("fine")
        except BaseException as error:
            results.put(repr(error))

    ids = ids[:-1]
    process = context.Process(target=child)
    process.start()
    assert results.get(timeout=PATIENCE_S) == "fine"
    process.join()
    same(source.__getitems__(ids), COLUMNS, ids)


@pytest.mark.slow
def test_the_reference_gives_the_same_batches_where_nothing_can_be_compiled(stored, tmp_path):
    script = textwrap.dedent("""
        import sys, warnings
        import numpy as np
        from turbopump.core.files import digest
        from turbopump.data import native
        if sys.argv[2] == "none":
            native._cache_directory = lambda: native.Path(sys.argv[3])
            native.tempfile.gettempdir = lambda: sys.argv[3]
            native.shutil.which = lambda name: None
        from turbopump.data.format import open_dataset, verify_dataset
        from turbopump.data.gather import kernels
        from turbopump.data.ragged import Ragged
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            kind = type(kernels()).__name__
        data = open_dataset(sys.argv[1], "mapped").data("train")
        batch = data.batch(np.random.default_rng(0).integers(0, len(data), 300))
        parts = [p for c in batch for p in ([c.offsets, c.values] if isinstance(c, Ragged) else [c])]
        print(kind, len(caught), digest(b"".join(part.tobytes() for part in parts)), verify_dataset(sys.argv[1]))
    """)
    lines = []
    for compiler in ("some", "none"):
        command = [sys.executable, "-c", script, str(stored), compiler, str(tmp_path)]
        lines.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert lines[0][:2] == ["Compiled", "0"] and lines[1][:2] == ["Reference", "1"] and lines[0][2:] == lines[1][2:]
