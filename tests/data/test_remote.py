"""Readers of remote ranges: right bytes through every fault, with and without cache, in several processes."""

import ctypes
import multiprocessing
import os
import signal
import time
import warnings

import numpy as np
import pytest

from tests.processes import PATIENCE_S
from tests.range_server import RangeServer
from turbopump.core.errors import CacheError, DatasetError, RemoteError, UsageError
from turbopump.data import block_cache
from turbopump.data.block_cache import BlockCache
from turbopump.data.remote import RemoteReader
from turbopump.data.remote_direct import DirectReader
from turbopump.data.stores import open_store

BLOCK = 16 << 10
LIMITS = {"request_s": 5, "stall_s": 0.3, "retry_s": 20, "first_delay_s": 0.01, "max_tries": 4}
OBJECTS = {f"set/{i}": np.random.default_rng(i).bytes(size) for i, size in enumerate((700_001, BLOCK, 5, 400_000))}


@pytest.fixture(scope="module")
def server():
    with RangeServer({f"bucket/{key}": data for key, data in OBJECTS.items()}) as running:
        yield running


@pytest.fixture(autouse=True)
def healthy(server):
    server.heal()
    server.requests.clear()
    yield
    for table in block_cache._attached.values():
        os.close(table.lock)
        os.close(table.blocks)
    block_cache._attached.clear()


def reader_of(server, directory, *, blocks=20, limits=LIMITS, **options):
    store = open_store(f"{server.url}/bucket", limits=limits)
    if not blocks:
        reader = DirectReader(store, gap_bytes=4096, **options)
    else:
        cache = BlockCache(directory, (blocks + 1) * BLOCK, block_bytes=BLOCK)
        reader = RemoteReader(store, cache, request_bytes=4 * BLOCK, **options)
    for key in OBJECTS:
        reader.open(key)
    return reader


@pytest.fixture(params=[20, 0], ids=["cached", "direct"])
def reader(server, tmp_path, request):
    opened = reader_of(server, tmp_path / "cache", blocks=request.param)
    yield opened
    opened.close()


def some_ranges(seed: int, count: int = 60, largest: int = 40_000):
    random = np.random.default_rng(seed)
    handles = random.integers(0, len(OBJECTS), count).astype(np.int32)
    sizes = np.array([len(data) for data in OBJECTS.values()])[handles]
    offsets = (random.random(count) * sizes).astype(np.int64)
    lengths = np.minimum(random.integers(1, largest, count), sizes - offsets)
    return handles, offsets, lengths


def is_right(addresses, handles, offsets, lengths) -> bool:
    data = list(OBJECTS.values())
    return all(
        ctypes.string_at(int(a), int(n)) == data[h][o : o + n]
        for a, h, o, n in zip(addresses, handles, offsets, lengths, strict=True)
    )


def test_ranges_come_back_with_and_without_prefetch(reader):
    for seed in range(6):
        ranges = some_ranges(seed)
        if seed % 2:
            reader.prefetch(*ranges)
        assert is_right(reader.read(*ranges), *ranges)
    counts = reader.statistics()
    assert counts["fetched_bytes"] > 0 and counts["requests"] > 0 and counts["hits"] + counts["misses"] > 0


def test_the_first_address_is_a_page(reader):
    assert int(reader.read(np.array([0]), np.array([5]), np.array([100]))[0]) % 4096 == 0


@pytest.mark.slow
def test_what_is_in_the_cache_is_not_asked_for_again(server, tmp_path):
    reader = reader_of(server, tmp_path / "cache", blocks=100)
    ranges = some_ranges(1)
    reader.read(*ranges)
    server.requests.clear()
    assert is_right(reader.read(*ranges), *ranges)
    reader.close()
    other = reader_of(server, tmp_path / "cache", blocks=100)
    assert is_right(other.read(*ranges), *ranges)
    assert server.requests == []
    other.close()


def test_blocks_side_by_side_are_one_request(server, tmp_path):
    reader = reader_of(server, tmp_path / "cache", blocks=60, max_requests_in_flight=2)
    ranges = np.zeros(1, np.int32), np.zeros(1, np.int64), np.array([8 * BLOCK])
    assert is_right(reader.read(*ranges), *ranges)
    assert sorted(server.requests) == [("bucket/set/0", 0, 4 * BLOCK), ("bucket/set/0", 4 * BLOCK, 8 * BLOCK)]
    reader.close()


def test_records_side_by_side_are_one_request_without_cache(server, tmp_path):
    reader = reader_of(server, tmp_path / "cache", blocks=0)
    ranges = np.zeros(3, np.int32), np.array([9000, 0, 100_000]), np.array([5000, 6000, 10])
    assert is_right(reader.read(*ranges), *ranges)
    assert sorted(server.requests) == [("bucket/set/0", 0, 14_000), ("bucket/set/0", 100_000, 100_010)]
    reader.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["error 500", "slow down 503", "too many 429", "truncated", "short", "whole", "stalled"]
)
def test_faults_that_pass_give_right_bytes(reader, server, fault):
    for seed in range(2):
        server.fail(fault, times=2)
        ranges = some_ranges(seed)
        if seed:
            reader.prefetch(*ranges)
        assert is_right(reader.read(*ranges), *ranges)
    assert reader.statistics()["retries"] >= 1


def test_faults_that_stay_are_an_error_and_end_with_it(reader, server):
    ranges = some_ranges(0)
    server.fail("error 500", times=None)
    reader.prefetch(*ranges)
    with pytest.raises(RemoteError, match=r"given up after 4 tries.*500"):
        reader.read(*ranges)
    server.heal()
    assert is_right(reader.read(*ranges), *ranges)


def test_a_wrong_bit_that_the_caller_finds_is_fetched_again(reader, server):
    ranges = np.zeros(1, np.int32), np.zeros(1, np.int64), np.array([2 * BLOCK])
    server.fail("flipped")
    assert not is_right(reader.read(*ranges), *ranges)
    assert is_right(reader.refetch(*ranges), *ranges)
    assert is_right(reader.read(*ranges), *ranges)


@pytest.mark.slow
def test_a_bit_that_flips_in_the_cache_is_found_by_the_next_process(server, tmp_path):
    ranges = some_ranges(3)
    reader = reader_of(server, tmp_path / "cache", blocks=100)
    reader.read(*ranges)
    table = reader._cache.table
    for slot in range(0, 20, 3):
        byte = os.pread(table.blocks, 1, slot * BLOCK)[0]
        os.pwrite(table.blocks, bytes([byte ^ 1]), slot * BLOCK)
    reader.close()
    reader = reader_of(server, tmp_path / "cache", blocks=100)
    assert is_right(reader.read(*ranges), *ranges)
    reader.close()


def test_a_batch_larger_than_the_cache_is_read(server, tmp_path):
    reader = reader_of(server, tmp_path / "cache", blocks=4)
    ranges = some_ranges(0, count=300)
    reader.prefetch(*ranges)
    assert is_right(reader.read(*ranges), *ranges)
    reader.close()


def test_prefetching_far_ahead_stays_within_its_share(server, tmp_path):
    reader = reader_of(server, tmp_path / "cache", blocks=20, ahead_bytes=6 * BLOCK)
    batches = [some_ranges(seed, count=10) for seed in range(12)]
    for ranges in batches:
        reader.prefetch(*ranges)
        assert reader.statistics()["ahead_blocks"] <= 6
    for ranges in batches:
        assert is_right(reader.read(*ranges), *ranges)
    assert reader.statistics()["ahead_blocks"] == 0
    for ranges in batches:
        reader.prefetch(*ranges)
    reader.forget()
    assert is_right(reader.read(*batches[5]), *batches[5])
    reader.close()


def test_the_order_of_requests_is_that_of_the_batches(server, tmp_path):
    reader = reader_of(server, tmp_path / "cache", blocks=60, max_requests_in_flight=1)
    blocks = [7, 3, 20, 11, 0, 15]
    for block in blocks:
        reader.prefetch(np.zeros(1, np.int32), np.array([block * BLOCK]), np.array([10]))
    for block in blocks:
        reader.read(np.zeros(1, np.int32), np.array([block * BLOCK]), np.array([10]))
    assert [begin // BLOCK for _, begin, _ in server.requests] == blocks
    reader.close()


def test_a_forked_child_reads_with_a_helper_of_its_own(reader):
    ranges = some_ranges(0)
    assert is_right(reader.read(*ranges), *ranges)
    reader.prefetch(*some_ranges(1))
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE_S))
        good = False
        try:
            good = all(is_right(reader.read(*some_ranges(seed)), *some_ranges(seed)) for seed in (0, 1, 2))
        finally:
            os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    ranges = some_ranges(1)
    assert is_right(reader.read(*ranges), *ranges)


@pytest.mark.slow
def test_a_helper_killed_while_it_fetches_is_replaced(server, reader):
    server.latency_s = 0.1
    try:
        ranges = some_ranges(0)
        reader.prefetch(*ranges)
        reader._store._helper._process.kill()
        time.sleep(0.2)
        assert is_right(reader.read(*ranges), *ranges)
    finally:
        server.latency_s = 0.0


def read_for_ever(server, directory, seed: int) -> None:
    reader = reader_of(server, directory, blocks=20)
    while True:
        ranges, later = some_ranges(seed, count=12), some_ranges(seed + 1, count=12)
        reader.prefetch(*later)
        if not is_right(reader.read(*ranges), *ranges):
            os._exit(3)
        seed += 1


@pytest.mark.slow
def test_kill_while_filling_leaves_a_cache_that_gives_right_bytes(server, tmp_path):
    directory, random = tmp_path / "cache", np.random.default_rng(0)
    for trial in range(12):
        child = os.fork()
        if child == 0:
            read_for_ever(server, directory, trial)
        time.sleep(0.35 + random.random() * 0.2)  # a helper starts in 0.3 s
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
    reader = reader_of(server, directory, blocks=20)
    for key, data in enumerate(OBJECTS.values()):
        ranges = np.array([key], np.int32), np.zeros(1, np.int64), np.array([len(data)])
        assert is_right(reader.read(*ranges), *ranges)
    assert sum(path.stat().st_blocks * 512 for path in directory.iterdir()) <= 21 * BLOCK
    reader.close()


def read_some(server, directory, seed: int) -> None:
    reader = reader_of(server, directory, blocks=20, ahead_bytes=5 * BLOCK)
    batches = [some_ranges(1000 * seed + i, count=15) for i in range(8)]
    for i, ranges in enumerate(batches):
        for later in batches[i + 1 : i + 2]:
            reader.prefetch(*later)
        if not is_right(reader.read(*ranges), *ranges):
            os._exit(3)
    reader.close()


@pytest.mark.slow
def test_four_processes_on_a_cache_smaller_than_the_data_read_right_bytes(server, tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=read_some, args=(server, tmp_path / "cache", seed)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
    assert [worker.exitcode for worker in workers] == [0] * 4


@pytest.mark.slow
def test_a_block_is_fetched_once_by_two_processes(server, tmp_path):
    context = multiprocessing.get_context("fork")
    server.latency_s = 0.2
    try:
        workers = [context.Process(target=read_same, args=(server, tmp_path / "cache")) for _ in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(PATIENCE_S)
        assert [worker.exitcode for worker in workers] == [0] * 3
    finally:
        server.latency_s = 0.0
    asked = [begin for key, begin, _ in server.requests if key == "bucket/set/0"]
    assert len(asked) == len(set(asked))


def read_same(server, directory) -> None:
    reader = reader_of(server, directory, blocks=100, limits={})
    ranges = np.zeros(1, np.int32), np.zeros(1, np.int64), np.array([700_000])
    os._exit(0 if is_right(reader.read(*ranges), *ranges) else 3)


def test_a_full_disk_is_said_once_and_reading_goes_on(server, tmp_path, monkeypatch):
    reader = reader_of(server, tmp_path / "cache")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for seed in range(4):
            ranges = some_ranges(seed)
            reader.prefetch(*ranges)
            assert is_right(reader.read(*ranges), *ranges)
    assert sum("no space left" in str(warning.message) for warning in said) == 1
    reader.close()


def test_a_directory_that_cannot_be_made_is_an_error(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError):
        reader_of(server, tmp_path / "file")


def test_ranges_outside_their_object_are_refused(reader):
    for handle, offset, length in [(0, 700_000, 2), (0, -1, 5), (9, 0, 1), (-1, 0, 1), (0, 0, -1), (2, 4, 2)]:
        with pytest.raises(DatasetError, match="not within"):
            reader.read(np.array([handle], np.int32), np.array([offset]), np.array([length]))


def test_ranges_of_nothing_are_read_too(reader):
    ranges = np.array([0, 2, 0], np.int32), np.array([0, 5, 40_000]), np.array([0, 0, 10])
    reader.prefetch(*ranges)
    assert is_right(reader.read(*ranges), *ranges)


def test_opening_many_objects_asks_nothing_of_the_store(server, tmp_path):
    reader = reader_of(server, tmp_path / "cache")
    handles = [reader.open(f"many/{i}", 1 << 20) for i in range(10_000)]
    assert handles == list(range(len(OBJECTS), len(OBJECTS) + 10_000))
    ranges = some_ranges(0)
    assert is_right(reader.read(*ranges), *ranges)
    reader.close()


def test_a_window_larger_than_the_cache_is_refused(server, tmp_path):
    with pytest.raises(UsageError, match="order needs"):
        reader_of(server, tmp_path / "cache", window_bytes=30 * BLOCK)
