"""The block cache: bounded, least recently used, right after every kind of death."""

import fcntl
import multiprocessing
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest

from turbopump.core.errors import CacheError, UsageError
from turbopump.data import block_cache
from turbopump.data.block_cache import BlockCache, Row

BLOCK = 4096
FILE = 7


def content(block: int, file: int = FILE) -> bytes:
    return np.random.default_rng([file, block]).bytes(BLOCK)


def put(cache: BlockCache, block: int) -> Row:
    (row,) = cache.look_up(FILE, [block], claim=True)
    return cache.fill(row, FILE, block, memoryview(content(block))) if row.state == "claimed" else row


def get(cache: BlockCache, block: int) -> bytes | None:
    """What a reader gets: nothing, or bytes that were checked."""
    (row,) = cache.look_up(FILE, [block], claim=False)
    if row.state != "ready" or not cache.verify(row, FILE, block):
        return None
    data = os.pread(cache.table.blocks, BLOCK, row.slot * BLOCK)
    return data if int(cache.table.generation[row.slot]) == row.generation else None


def fresh() -> None:
    """As if this process had just begun: what it mapped and locked is let go."""
    for table in block_cache._attached.values():
        os.close(table.lock)
        os.close(table.blocks)
    block_cache._attached.clear()


@pytest.fixture
def directory(tmp_path):
    yield tmp_path / "cache"
    fresh()


def small(directory, slots: int = 4) -> BlockCache:
    return BlockCache(directory, (slots + 1) * BLOCK + slots * 100 + 8192, block_bytes=BLOCK)


def used_bytes(directory) -> int:
    return sum(path.stat().st_blocks * 512 for path in directory.iterdir())


def chains_hold(cache: BlockCache) -> None:
    """Every full row can be found, and no key is there twice."""
    table = cache.table
    full = [s for s in range(table.num_slots) if table.state[s] != 0]
    keys = [(int(table.file[s]), int(table.block[s])) for s in full]
    assert len(set(keys)) == len(keys)
    with table.locked():
        assert [table.find(*key) for key in keys] == full


def test_blocks_come_back_and_the_least_recently_used_go(directory):
    cache = small(directory, 4)
    slots = cache.num_slots
    for block in range(slots):
        put(cache, block)
    kept, (row,) = put(cache, 0), cache.look_up(FILE, [0], claim=False)
    cache.touch(np.array([kept.slot]), needed=True)
    put(cache, slots)
    assert get(cache, 0) == content(0) and get(cache, 1) is None and get(cache, slots) == content(slots)
    assert row.generation == kept.generation
    chains_hold(cache)


def test_a_long_history_stays_right_and_within_its_bytes(directory):
    cache, random_ = BlockCache(directory, 40 * BLOCK, block_bytes=BLOCK), random.Random(0)
    for _ in range(2000):
        block = random_.randrange(100)
        if random_.random() < 0.1:
            cache.drop(FILE, [block])
        put(cache, block)
        assert get(cache, block) == content(block)
    chains_hold(cache)
    assert used_bytes(directory) <= 40 * BLOCK


def test_a_new_process_finds_what_is_there(directory):
    cache = small(directory)
    put(cache, 3)
    fresh()
    assert get(small(directory), 3) == content(3)


def test_a_flipped_bit_on_the_disk_is_found_and_the_block_dropped(directory):
    cache = small(directory)
    row = put(cache, 3)
    os.pwrite(cache.table.blocks, bytes([content(3)[100] ^ 8]), row.slot * BLOCK + 100)
    assert not cache.verify(row, FILE, 3)
    assert cache.look_up(FILE, [3], claim=False)[0].state == "absent"


def test_the_right_bytes_of_another_block_do_not_pass(directory):
    cache = small(directory)
    row, other = put(cache, 3), put(cache, 4)
    os.pwrite(cache.table.blocks, content(4), row.slot * BLOCK)
    cache.table.checksum[row.slot] = cache.table.checksum[other.slot]
    assert not cache.verify(row, FILE, 3)


def test_a_slot_that_was_used_again_shows_by_its_generation(directory):
    cache = small(directory, 2)
    row = put(cache, 0)
    for block in range(1, 10):
        put(cache, block)
    assert not cache.verify(row, FILE, 0)
    (stale,) = cache.look_up(FILE, [50], claim=True)
    cache.abandon([stale])
    assert cache.fill(stale, FILE, 50, memoryview(content(50))).state == "absent"
    assert get(cache, 50) is None


def test_claims_of_the_living_are_respected_and_those_of_the_dead_taken_over(directory):
    cache = small(directory)
    ready, go = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        cache.look_up(FILE, [5], claim=True)
        ready.send(1)
        signal.pause()
    go.recv()
    assert cache.look_up(FILE, [5], claim=True)[0].state == "busy"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert cache.look_up(FILE, [5], claim=True)[0].state == "claimed"
    chains_hold(cache)


def test_when_all_slots_are_being_fetched_there_is_no_room(directory):
    cache = small(directory, 2)
    blocks = range(cache.num_slots + 1)
    assert [row.state for row in cache.look_up(FILE, blocks, claim=True)] == ["claimed"] * cache.num_slots + ["full"]


def fill_for_ever(directory, seed: int) -> None:
    cache, random_ = BlockCache(directory, 40 * BLOCK, block_bytes=BLOCK), random.Random(seed)
    while True:
        blocks = [random_.randrange(120) for _ in range(3)]
        if random_.random() < 0.2:
            cache.drop(FILE, blocks)
        for block in blocks:
            put(cache, block)
            found = get(cache, block)
            assert found is None or found == content(block)


@pytest.mark.slow
def test_kill_at_any_moment_leaves_only_right_blocks(directory):
    """Two processes fill and empty; one is killed at a random moment; who comes later must find no wrong byte."""
    random_ = random.Random(1)
    survivor = multiprocessing.get_context("fork").Process(target=fill_for_ever, args=(directory, 99))
    survivor.start()
    try:
        for trial in range(30):
            child = os.fork()
            if child == 0:
                fill_for_ever(directory, trial)
            time.sleep(0.03 + random_.random() * 0.05)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            cache = BlockCache(directory, 40 * BLOCK, block_bytes=BLOCK)
            for block in range(120):
                assert get(cache, block) in (None, content(block))
        assert survivor.is_alive()
    finally:
        survivor.kill()
        survivor.join()
    chains_hold(cache)
    for block in range(120):
        put(cache, block)
        assert get(cache, block) == content(block)
    assert used_bytes(directory) <= 40 * BLOCK


class _StopError(BaseException):
    pass


def test_death_after_any_store_to_the_table_is_mended(directory, monkeypatch):
    """Cut a claim, an eviction and a fill off after each of their stores, as kill -9 would, and go on from there."""
    blocks = (0, 1, 2, 50, 51, 52)
    for cut in range(60):
        fresh()
        if directory.exists():
            shutil.rmtree(directory)
        cache = small(directory, 3)
        for block in range(3):
            put(cache, block)
        with monkeypatch.context() as patch:
            finished = cut_off(cache, patch, cut)
        fresh()
        cache = small(directory, 3)
        chains_hold(cache)
        for block in blocks:
            assert get(cache, block) in (None, content(block))
        for block in blocks:
            put(cache, block)
            assert get(cache, block) == content(block)
        if finished:
            break
    assert finished and cut > 15


def cut_off(cache: BlockCache, patch, cut: int) -> bool:
    """Put a block into a full cache, but stop at store number `cut` to the table."""
    table, left = cache.table, [cut]

    class Cut:
        def __init__(self, array):
            self._array = array

        def __getattr__(self, name):
            return getattr(self._array, name)

        def __setitem__(self, key, value):
            if left[0] == 0:
                raise _StopError
            left[0] -= 1
            self._array[key] = value

        def __getitem__(self, key):
            return self._array[key]

        def __array__(self, *args, **kwargs):
            return self._array

        def __eq__(self, other):
            return self._array == other

        __hash__ = None

    for name in ("generation", "file", "block", "num_bytes", "last_use", "checksum", "state", "row_owner", "next"):
        patch.setattr(table, name, Cut(getattr(table, name)))
    for name in ("bucket", "heads", "header"):
        patch.setattr(table, name, Cut(getattr(table, name)))
    try:
        put(cache, 50)
        return True
    except _StopError:
        return False


def test_a_lock_held_by_the_dead_is_free(directory):
    cache = small(directory)
    child = os.fork()
    if child == 0:
        fcntl.lockf(cache.table.lock, fcntl.LOCK_EX, 1, 0)
        cache.table.header["dirty"] = 1
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    put(cache, 1)
    assert get(cache, 1) == content(1)
    assert not cache.table.header["dirty"]


@pytest.mark.parametrize("name", ["table", "blocks"])
@pytest.mark.parametrize("harm", ["gone", "cut", "noise"])
def test_damaged_files_of_a_cache_nobody_uses_are_made_anew_or_found_out(directory, name, harm):
    cache = small(directory)
    for block in range(4):
        put(cache, block)
    fresh()
    path = directory / name
    if harm == "gone":
        path.unlink()
    else:
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2] if harm == "cut" else np.random.default_rng(0).bytes(len(whole)))
    cache = small(directory)
    for block in range(4):
        assert get(cache, block) in (None, content(block))
        put(cache, block)
        assert get(cache, block) == content(block)


def test_noise_in_the_rows_is_found_out(directory):
    for seed in range(20):
        cache = small(directory)
        for block in range(4):
            put(cache, block)
        fresh()
        path, noise = directory / "table", np.random.default_rng(seed)
        whole = bytearray(path.read_bytes())
        for at in noise.integers(4096, len(whole), 30):
            whole[at] = noise.integers(256)
        path.write_bytes(whole)
        cache = small(directory)
        for block in range(4):
            assert get(cache, block) in (None, content(block))
            put(cache, block)
            assert get(cache, block) == content(block)


def test_sizes_and_directories_that_do_not_do(directory, tmp_path):
    with pytest.raises(UsageError, match="no two blocks"):
        BlockCache(directory, BLOCK, block_bytes=BLOCK)
    with pytest.raises(UsageError, match="multiple"):
        BlockCache(directory, 1 << 20, block_bytes=1000)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="file"):
        BlockCache(tmp_path / "file" / "cache", 1 << 20, block_bytes=BLOCK)


def test_other_sizes_wait_until_nobody_uses_the_cache(directory):
    ready, go = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        put(small(directory, 4), 1)
        ready.send(1)
        signal.pause()
    go.recv()
    with pytest.raises(CacheError, match="same cache_bytes"):
        small(directory, 8)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    cache = small(directory, 8)
    put(cache, 1)
    assert get(cache, 1) == content(1)


def test_two_sizes_of_one_process_are_refused_until_the_first_is_closed(directory):
    first, again = small(directory, 4), small(directory, 4)
    put(first, 1)
    with pytest.raises(CacheError, match=r"in use with 5 blocks .* give the same cache_bytes .* or another directory"):
        small(directory, 8)
    first.close()
    with pytest.raises(CacheError, match="in use with 5 blocks"):
        small(directory, 8)
    assert get(again, 1) == content(1)
    again.close()
    larger = small(directory, 8)
    for block in range(8):
        put(larger, block)
    assert [get(larger, block) for block in range(8)] == [content(block) for block in range(8)]
    with pytest.raises(CacheError, match="in use with 9 blocks"):  # what was closed cannot touch the new one
        put(first, 1)
    first.abandon([Row("claimed", 0, 1)])
    chains_hold(larger)
    larger.close()
    assert small(directory, 4).num_slots == 5


def test_another_size_waits_for_other_processes_too(directory):
    cache = small(directory, 4)
    ready, go = multiprocessing.Pipe()
    child = os.fork()
    if child == 0:
        put(small(directory, 4), 1)
        ready.send(1)
        signal.pause()
    go.recv()
    cache.close()
    with pytest.raises(CacheError, match="same cache_bytes"):
        small(directory, 8)
    assert get(small(directory, 4), 1) == content(1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
