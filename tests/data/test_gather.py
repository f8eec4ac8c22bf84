"""The compiled kernels and their reference: the same bytes, the same findings."""

import os
import subprocess
import sys
import textwrap
import threading
from itertools import pairwise

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.processes import PATIENCE_S
from turbopump.data import gather, native
from turbopump.data.gather import Compiled, Fetched, Reference, Result, Store, address
from turbopump.data.ragged import offsets_of

BLOCK_BYTES = 64
MANY = 600  # rows: more than two groups of gather.cpp
FAR = [2**63 - 1, -(2**63), 2**62]


@pytest.fixture(scope="module")
def compiled():
    kernels = gather.kernels()
    assert isinstance(kernels, Compiled), "these tests need a C++ compiler"
    return kernels


def store_of(parts, rows, unmapped=(), block_bytes=BLOCK_BYTES):
    """A store of the buffers `parts` (uint8) of shards that have `rows` rows; those `unmapped` are not in memory."""
    store = Store(offsets_of(rows), np.array([len(part) for part in parts], np.int64), block_bytes)
    for shard, part in enumerate(parts):
        store.add_sums(shard, Reference().sums(part, block_bytes))
        if shard not in unmapped:
            store.add_memory(shard, part, cold=bool(shard % 2))
    return store


def as_tuple(result):
    return result.status, result.place, result.shard, result.block


def both(compiled, make, work, out):
    """What both kinds of kernels give for the same work on stores of their own: results and outputs."""
    found = []
    for kernels in (compiled, Reference()):
        result, mine = Result(), out.copy()
        work(kernels, make(), mine, result)
        found.append((as_tuple(result), mine))
    return found


def agree(found):
    (result, out), (expected, reference) = found
    assert result[0] == expected[0]
    if result[0] == gather.OK:
        assert out.tobytes() == reference.tobytes()
    elif result[0] == gather.OUT_OF_RANGE:
        assert result[1] == expected[1]
    else:
        assert result == expected
    return result[0]


shards = st.lists(st.integers(1, 70), min_size=1, max_size=6)


@settings(max_examples=150, deadline=None)
@given(
    shards, st.sampled_from([1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 100, 130]),
    st.integers(0, 2**32 - 1), st.lists(st.sampled_from([-1, *FAR]), max_size=1),
)  # fmt: skip
def test_rows(compiled, rows, row_bytes, seed, wrong):
    random = np.random.default_rng(seed)
    parts = [random.integers(0, 256, n * row_bytes, dtype=np.uint8) for n in rows]
    index = np.append(random.integers(0, sum(rows), random.integers(0, MANY)), np.array(wrong, np.int64))
    random.shuffle(index)
    out = np.zeros((len(index), row_bytes), np.uint8)
    found = both(
        compiled, lambda: store_of(parts, rows), lambda k, s, o, r: k.rows(s, index, row_bytes, True, o, r), out
    )
    assert agree(found) == (gather.OUT_OF_RANGE if wrong else gather.OK)
    if not wrong:
        assert np.array_equal(found[0][1], np.concatenate(parts).reshape(-1, row_bytes)[index])


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(
    shards, st.sampled_from(["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f4"]), st.booleans(),
    st.integers(0, 2**32 - 1), st.integers(1, 90), st.lists(st.sampled_from([-1, *FAR]), max_size=1),
)  # fmt: skip
def test_windows_over_shards(compiled, rows, dtype, wide, seed, items, wrong):
    random = np.random.default_rng(seed)
    values = random.integers(0, 256, sum(rows) * np.dtype(dtype).itemsize, dtype=np.uint8).view(dtype)
    bounds = offsets_of(rows)
    parts = [values[a:b].view(np.uint8) for a, b in pairwise(bounds)]
    fits = sum(rows) >= items
    start = random.integers(0, max(sum(rows) - items, 0) + 1, random.integers(1, MANY))
    start = np.append(start, np.array(wrong, np.int64))
    widening = {"u": gather.FROM_UNSIGNED, "i": gather.FROM_SIGNED}.get(dtype[0], 0) if wide else gather.AS_STORED
    out = np.zeros((len(start), items), np.int64 if widening else dtype)
    size = values.itemsize
    found = both(
        compiled, lambda: store_of(parts, rows),
        lambda k, s, o, r: k.windows(s, start, items, size, widening, True, o, r), out,
    )  # fmt: skip
    assert agree(found) == (gather.OUT_OF_RANGE if wrong or not fits else gather.OK)
    if fits and not wrong:
        expected = np.stack([values[i : i + items] for i in start])
        assert found[0][1].tobytes() == (expected.astype(np.int64) if widening else expected).tobytes()


def ragged_parts(random, rows, item_bytes):
    lengths = [random.choice([0, 0, 1, 3, 40], n) for n in rows]
    if len(rows) > 1:
        lengths[0][:] = 0  # a shard without a value
    offsets = [offsets_of(part) for part in lengths]
    values = [random.integers(0, 256, int(o[-1]) * item_bytes, dtype=np.uint8) for o in offsets]
    return offsets, values


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(shards, st.sampled_from([1, 4, 16, 24]), st.integers(0, 2**32 - 1), st.integers(0, 8000))
def test_ragged_rows_and_too_little_room(compiled, rows, item_bytes, seed, room):
    random = np.random.default_rng(seed)
    offsets, values = ragged_parts(random, rows, item_bytes)
    index = random.integers(0, sum(rows), random.integers(0, MANY))
    lengths = np.concatenate([np.diff(o) for o in offsets])[index]
    texts = [v[o[i] * item_bytes : o[i + 1] * item_bytes] for o, v in zip(offsets, values) for i in range(len(o) - 1)]
    out = np.zeros(room * item_bytes, np.uint8)
    tables = []

    def work(kernels, stores, mine, result):
        tables.append(np.zeros(len(index) + 1, np.int64))
        kernels.ragged(*stores, index, item_bytes, True, tables[-1], mine, result)

    found = both(
        compiled, lambda: (store_of([o.view(np.uint8) for o in offsets], rows), store_of(values, rows)), work, out
    )
    total = int(lengths.sum())
    if total > room:
        assert agree(found) == gather.TOO_SMALL and found[0][0][3] == total
    else:
        assert agree(found) == gather.OK and np.array_equal(tables[0], tables[1])
        assert np.array_equal(tables[0], offsets_of(lengths))
        expected = b"".join(texts[i].tobytes() for i in index)
        assert found[0][1].tobytes()[: len(expected)] == expected


@settings(max_examples=60, deadline=None)
@given(shards, st.sampled_from([1, 4, 24]), st.integers(0, 2**32 - 1), st.integers(0, 8000), st.integers(-2, 2))
def test_ragged_rows_the_quick_way_or_a_refusal(compiled, rows, item_bytes, seed, room, spare):
    random = np.random.default_rng(seed)
    offsets, values = ragged_parts(random, rows, item_bytes)
    stores = store_of([o.view(np.uint8) for o in offsets], rows), store_of(values, rows)
    index = random.integers(0, sum(rows), random.integers(0, MANY))
    tables = np.full((2, len(index) + 3), -1)
    outs, result = np.zeros((2, room * item_bytes), np.uint8), Result()
    refused = compiled.quick_ragged(*stores, item_bytes)(index, tables[0, : max(len(index) + 1 + spare, 0)], outs[0])
    Reference().ragged(*stores, index, item_bytes, True, tables[1], outs[1], result)
    assert bool(refused) == (spare < 0 or result.status == gather.TOO_SMALL)
    assert (tables[0, len(index) + 1 :] == -1).all()
    if not refused:
        total = int(tables[1, len(index)]) * item_bytes
        assert np.array_equal(tables[0], tables[1]) and np.array_equal(outs[0, :total], outs[1, :total])
        assert not outs[0, total:].any()
    far = np.array(FAR)
    assert compiled.quick_ragged(*stores, item_bytes)(far, np.zeros(4, np.int64), outs[0]) == gather.OUT_OF_RANGE
    assert compiled.quick_ragged(*stores, item_bytes)(index, tables[0][::2], outs[0])  # no contiguous memory


@pytest.mark.parametrize("pair", [(5, 3), (-1, 2), (0, 10**6), (2**62, 2**63 - 1), (-(2**63), 2**63 - 1)])
def test_offsets_out_of_order_are_named_and_never_followed(compiled, pair):
    values = [np.arange(40, dtype=np.uint8)] * 2
    offsets = [np.array([0, 5, 10, 40]), np.array([0, *pair, 40])]
    rows, index, out = [3, 3], np.array([0, 2, 4, 1]), np.zeros(200, np.uint8)
    found = both(
        compiled, lambda: (store_of([o.view(np.uint8) for o in offsets], rows), store_of(values, rows)),
        lambda k, s, o, r: k.ragged(*s, index, 1, True, np.zeros(5, np.int64), o, r), out,
    )  # fmt: skip
    assert found[0][0] == found[1][0] and found[0][0][:3] == (gather.BAD_OFFSETS, 2, 1)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2), st.integers(0, 599), st.integers(0, 7), st.integers(0, 2**32 - 1))
def test_a_flipped_bit_names_its_block_and_what_is_good_stays_readable(compiled, shard, byte, bit, seed):
    random = np.random.default_rng(seed)
    parts = [random.integers(0, 256, 600, dtype=np.uint8) for _ in range(3)]

    def make():
        store = store_of([part.copy() for part in parts], [200] * 3)
        store.memory[shard][byte] ^= 1 << bit
        return store

    index = random.permutation(600)
    out = np.zeros((600, 3), np.uint8)
    found = both(compiled, make, lambda k, s, o, r: k.rows(s, index, 3, False, o, r), out)
    assert agree(found) == gather.MISMATCH
    _, place, bad_shard, block = found[0][0]
    assert (bad_shard, block) == (shard, byte // BLOCK_BYTES) and index[place] // 200 == shard
    begin, end = index[place] % 200 * 3, index[place] % 200 * 3 + 3
    assert begin // BLOCK_BYTES <= block <= (end - 1) // BLOCK_BYTES
    rows = np.arange(600)
    touches = (rows // 200 == shard) & (rows % 200 * 3 // 64 <= block) & ((rows % 200 * 3 + 2) // 64 >= block)
    good = rows[~touches]
    out = np.zeros((len(good), 3), np.uint8)
    found = both(compiled, make, lambda k, s, o, r: k.rows(s, good, 3, False, o, r), out)
    assert agree(found) == gather.OK and np.array_equal(found[0][1], np.concatenate(parts).reshape(-1, 3)[good])
    for first, last in [(0, 10), (block, block + 1)]:
        found = both(compiled, make, lambda k, s, o, r, a=first, b=last: k.check(s, shard, a, b, r), out)
        assert agree(found) == gather.MISMATCH and found[0][0][3] == block
    found = both(compiled, make, lambda k, s, o, r: k.check(s, shard, block + 1, 10, r), out)
    assert agree(found) == gather.OK


def test_what_was_found_good_is_remembered_and_counted(compiled):
    for kernels in (compiled, Reference()):
        store, result = store_of([np.zeros(600, np.uint8)], [600]), Result()
        assert store.unknown.tolist() == [10]
        kernels.rows(store, np.array([0, 63, 64]), 1, False, np.zeros(3, np.uint8), result)
        assert store.unknown.tolist() == [8] and store.known[0].tolist() == [0b11]
        kernels.check(store, 0, 0, 10, result)
        assert result.status == gather.OK and store.unknown.tolist() == [0]
        store.memory[0][5] = 1  # it is not hashed a second time
        kernels.check(store, 0, 0, 10, result)
        assert result.status == gather.OK


def test_shards_that_are_not_mapped_are_asked_for_one_by_one(compiled):
    parts = [np.full(30, n, np.uint8) for n in range(4)]
    for kernels in (compiled, Reference()):
        for work in ("rows", "windows"):
            store, asked, result = store_of(parts, [30] * 4, unmapped=range(4)), [], Result()
            while True:
                if work == "rows":
                    out = np.zeros(3, np.uint8)
                    kernels.rows(store, np.array([100, 5, 40]), 1, True, out, result)
                else:
                    out = np.zeros((1, 80), np.uint8)
                    kernels.windows(store, np.array([25]), 80, 1, gather.AS_STORED, True, out, result)
                if result.status != gather.UNMAPPED:
                    break
                asked.append(result.shard)
                store.add_memory(result.shard, parts[result.shard], cold=True)
            assert result.status == gather.OK
            assert asked == ([3, 0, 1] if work == "rows" else [0, 1, 2, 3])
            assert np.array_equal(out.reshape(-1), [3, 0, 1] if work == "rows" else np.repeat(range(4), 30)[25:105])


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans(), st.sampled_from(["u1", "u2", "u4", "u8", "i2"]), st.booleans())
def test_fetched_ranges(compiled, seed, wide, dtype, damaged):
    random = np.random.default_rng(seed)
    size = np.dtype(dtype).itemsize
    parts = [random.integers(0, 256, 80 * size, dtype=np.uint8) for _ in range(3)]
    n = 12
    shard, first = random.integers(0, 3, n), random.integers(0, 80, n)
    count = 1 + random.integers(0, 80, n) % (80 - first)
    begin, end = first * size, (first + count) * size
    block = begin // BLOCK_BYTES
    stop = np.minimum(-(-end // BLOCK_BYTES) * BLOCK_BYTES, 80 * size)
    held = [parts[s][b * BLOCK_BYTES : e].copy() for s, b, e in zip(shard, block, stop)]
    if damaged:
        held[7][-1] ^= 1
    widening = {"u": gather.FROM_UNSIGNED, "i": gather.FROM_SIGNED}[dtype[0]] if wide else gather.AS_STORED
    out_bytes = 8 if wide else size
    to = offsets_of(count) * out_bytes
    ranges = Fetched(
        np.array([address(part) for part in held], np.uint64), shard, block, stop - block * BLOCK_BYTES,
        begin - block * BLOCK_BYTES, end - begin, to[:-1].copy(),
    )  # fmt: skip
    found = both(
        compiled, lambda: store_of(parts, [80] * 3, unmapped=range(3)),
        lambda k, s, o, r: k.fetched(s, ranges, size, widening, o, r), np.zeros(int(to[-1]), np.uint8),
    )  # fmt: skip
    if damaged:
        assert found[0][0] == found[1][0] == (gather.MISMATCH, 7, shard[7], (stop[7] - 1) // BLOCK_BYTES)
        return
    assert agree(found) == gather.OK
    expected = np.concatenate([parts[s].view(dtype)[f : f + c] for s, f, c in zip(shard, first, count)])
    assert found[0][1].tobytes() == (expected.astype(np.int64) if wide else expected).tobytes()


def test_sums_are_xxh3_whatever_the_length(compiled):
    data = np.random.default_rng(0).integers(0, 256, 3_000_000, dtype=np.uint8)
    for size in [*range(601), 4095, 4096, 4097, 100_003, len(data)]:
        mine = data[size % 7 : size % 7 + size]
        if size:
            assert compiled.sums(mine, size).tolist() == [xxhash.xxh3_64_intdigest(mine.data)]
        for block_bytes in (64, 4096):
            assert np.array_equal(compiled.sums(mine, block_bytes), Reference().sums(mine, block_bytes))


def test_no_shards_and_no_rows(compiled):
    for kernels in (compiled, Reference()):
        store, result = store_of([], []), Result()
        kernels.rows(store, np.empty(0, np.int64), 4, True, np.empty((0, 4), np.uint8), result)
        assert result.status == gather.OK
        kernels.rows(store, np.zeros(1, np.int64), 4, True, np.empty((1, 4), np.uint8), result)
        assert result.status == gather.OUT_OF_RANGE


def test_threads_share_a_store(compiled):
    random = np.random.default_rng(0)
    parts = [random.integers(0, 256, 1 << 18, dtype=np.uint8) for _ in range(2)]
    values = np.concatenate(parts).reshape(-1, 16)
    store, wrong = store_of(parts, [1 << 14] * 2), []

    def read(seed):
        mine = np.random.default_rng(seed)
        for _ in range(60):
            index, result = mine.integers(0, 1 << 15, 300), Result()
            out = np.zeros((300, 16), np.uint8)
            compiled.rows(store, index, 16, True, out, result)
            if result.status != gather.OK or not np.array_equal(out, values[index]):
                wrong.append(as_tuple(result))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    known = sum(int(np.bitwise_count(part).sum()) for part in store.known)
    assert known + int(store.unknown.sum()) == 2 * (1 << 18) // BLOCK_BYTES  # no block was counted twice


CUT_SHORT = textwrap.dedent("""
    import os, sys, threading
    import numpy as np
    from turbopump.core.errors import CorruptDataError
    from turbopump.data.format import open_dataset
    path = sys.argv[1]
    data = open_dataset(path, "mapped").data("train")
    file = os.path.join(path, data.shards[0].file)
    data.rows(0, [0])
    def read():
        for field, what in [(0, data.rows), (1, data.ragged)]:
            try:
                what(field, np.arange(len(data)))
            except CorruptDataError as error:
                sys.stdout.write(f"{error}\\n")
    os.truncate(file, 4096 * 2)
    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    read()
    print("alive")
""")


@pytest.mark.slow
def test_a_file_cut_short_under_its_map_is_an_error_and_not_the_end(tmp_path, compiled):
    from turbopump.data.manifest import Field
    from turbopump.data.ragged import ragged_of
    from turbopump.data.writer import DatasetWriter

    with DatasetWriter(
        tmp_path / "d", kind="arrays", fields=[Field("x", "int64", (8,)), Field("t", "uint8", (), "bytes")]
    ) as writer:
        writer.append("train", [np.arange(80_000).reshape(-1, 8), ragged_of([b"text" * 9] * 10_000)])
        writer.finish()
    command = [sys.executable, "-X", "faulthandler", "-c", CUT_SHORT, str(tmp_path / "d")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[-1] == "alive", done.stderr
    assert len(lines) == 7
    assert all(
        "train-00000.arrow was cut short or its disk failed while it was read, met at row " in x for x in lines[:-1]
    )


SIGBUS_ELSEWHERE = textwrap.dedent("""
    import mmap, os, sys
    from turbopump.data import gather
    gather.kernels()
    with open(sys.argv[1], "w+b") as file:
        file.truncate(8192)
        memory = mmap.mmap(file.fileno(), 8192)
        file.truncate(0)
        memory[5000]
""")


def test_a_bus_error_that_is_not_ours_still_ends_the_process(tmp_path, compiled):
    command = [sys.executable, "-c", SIGBUS_ELSEWHERE, str(tmp_path / "f")]
    assert subprocess.run(command, capture_output=True, timeout=PATIENCE_S, check=False).returncode == -7


@pytest.fixture
def without_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path))
    native.load.cache_clear()
    gather.kernels.cache_clear()
    yield
    native.load.cache_clear()
    gather.kernels.cache_clear()


def test_without_a_compiler_the_reference_takes_over_and_says_so(without_compiler, tmp_path):
    with pytest.warns(RuntimeWarning, match=r"no C\+\+ compiler .*apt install g\+\+.* several times slower"):
        kernels = gather.kernels()
    assert isinstance(kernels, Reference) and not os.path.exists(tmp_path / "cache" / "turbopump" / "gather.so")
    store, result, out = store_of([np.arange(90, dtype=np.uint8)], [30]), Result(), np.zeros((2, 3), np.uint8)
    kernels.rows(store, np.array([29, 1]), 3, True, out, result)
    assert out.tolist() == [[87, 88, 89], [3, 4, 5]] and result.status == gather.OK
