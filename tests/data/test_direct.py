import ctypes
import errno
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.processes import PATIENCE_S, held, nothing_left
from turbopump.core.errors import CorruptDataError, DatasetError, UsageError
from turbopump.data import direct, native
from turbopump.data.direct import DirectReader
from turbopump.data.scratch import ScratchFile, mounted

ROOT = Path(__file__).parents[2]
SIZES = (0, 1, 511, 4096, 5000, 300_000, 1_000_003)
MIB = 1 << 20


def engine_works(name):
    try:
        DirectReader(engine=name).close()
    except UsageError:
        return False
    return True


NATIVE = [
    pytest.param(name, marks=pytest.mark.skipif(not engine_works(name), reason=f"{name} does not work here"))
    for name in ("io_uring", "threads")
]
ENGINES = [*NATIVE, "python"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Paths and contents of files of all `SIZES`."""
    directory, found = tmp_path_factory.mktemp("direct"), []
    for i, size in enumerate(SIZES):
        content = np.random.default_rng(i).bytes(size)
        path = directory / f"{i}.bin"
        path.write_bytes(content)
        found.append((path, content))
    return found


def opened(engine, files, **more):
    reader = DirectReader(engine=engine, **more)
    assert [reader.open(path) for path, _ in files] == list(range(len(files)))
    return reader


def columns(ranges):
    return tuple(np.array([r[i] for r in ranges], np.int64) for i in range(3))


def taken(reader, ranges):
    """The bytes of each (handle, offset, length), copied."""
    addresses = reader.read(*columns(ranges))
    assert addresses.dtype == np.uint64 and addresses.shape == (len(ranges),)
    return [ctypes.string_at(int(address), length) for address, (_, _, length) in zip(addresses, ranges)]


def expected(files, ranges):
    return [files[handle][1][offset : offset + length] for handle, offset, length in ranges]


def random_ranges(rng, n, longest=200_000):
    ranges = []
    for _ in range(n):
        handle = int(rng.integers(3, len(SIZES)))
        offset = int(rng.integers(0, SIZES[handle]))
        ranges.append((handle, offset, int(rng.integers(0, min(longest, SIZES[handle] - offset) + 1))))
    return ranges


def run_alone(code):
    """Run a script in a process of its own, since it changes what all of a process shares; its output."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        env=environment,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


@st.composite
def batches(draw):
    """Batches of ranges within the files: any length, many at the end of a file, near each other, or twice."""
    one = st.integers(0, len(SIZES) - 1).flatmap(
        lambda handle: st.tuples(
            st.just(handle),
            st.one_of(st.integers(0, SIZES[handle]), st.integers(max(0, SIZES[handle] - 600), SIZES[handle])),
            st.one_of(st.integers(0, 600), st.integers(0, 200_000)),
        )
    )
    batch = st.lists(one.map(lambda r: (r[0], r[1], min(r[2], SIZES[r[0]] - r[1]))), max_size=40)
    return draw(st.lists(batch, min_size=1, max_size=4))


# --- the same bytes by every engine --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("depth", [1, 7, 256])
def test_bytes_are_those_of_the_files(files, engine, depth):
    with opened(engine, files, depth=depth) as reader:

        @given(batches())
        @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        def compare(given_batches):
            for batch in given_batches:
                reader.prefetch(*columns(batch))
            for batch in given_batches:
                assert taken(reader, batch) == expected(files, batch)
            assert taken(reader, given_batches[0]) == expected(files, given_batches[0])  # and not prefetched

        compare()


@pytest.mark.parametrize("engine", ENGINES)
def test_files_that_refuse_direct_reads_are_read_through_the_page_cache_and_it_is_said(files, engine, monkeypatch):
    with opened(engine, files) as reader:
        assert "O_DIRECT" in reader.engine and "page cache" not in reader.engine
    monkeypatch.setattr(direct, "_reads_direct", lambda descriptor: False)
    ranges = random_ranges(np.random.default_rng(1), 50)
    with opened(engine, files) as reader:
        assert f"through the page cache (O_DIRECT is refused by {len(files)} of {len(files)} files)" in reader.engine
        assert taken(reader, ranges) == expected(files, ranges)
    monkeypatch.undo()
    plain_open = os.open

    def refusing(path, flags, *more, **named):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return plain_open(path, flags, *more, **named)

    monkeypatch.setattr(direct.os, "open", refusing)
    with opened(engine, files) as reader:
        assert "through the page cache" in reader.engine
        assert taken(reader, ranges) == expected(files, ranges)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_cache_stays_empty(tmp_path, engine):
    if mounted(tmp_path)[0] in ("tmpfs", "ramfs"):
        pytest.skip("a file system in memory")
    with ScratchFile(tmp_path) as file, DirectReader(engine=engine) as reader:
        file.fill(4 * MIB)
        file.drop()
        if "page cache" in reader.engine or file.resident_share() != 0:
            pytest.skip("this file system does not read past the page cache")
        handle = reader.open(f"/proc/self/fd/{file.handle}")
        reader.read([handle] * 100, np.arange(100) * 40_000, [12_288] * 100)
        assert file.resident_share() == 0


@pytest.mark.parametrize("engine", ENGINES)
def test_ranges_keep_the_page_phase_of_the_file(files, engine):
    ranges = random_ranges(np.random.default_rng(2), 200)
    with opened(engine, files) as reader:
        addresses = reader.read(*columns(ranges))
    assert (addresses % 4096 == columns(ranges)[1] % 4096).all()


@pytest.mark.parametrize("engine", NATIVE)
def test_ranges_near_each_other_are_read_once(files, engine):
    last = len(SIZES) - 1
    ranges = [(last, 8192, 100), (last, 4000, 96), (last, 8192, 100), (last, 900_000, 1), (last, 4096, 4096)]
    with opened(engine, files) as reader:
        addresses = reader.read(*columns(ranges)).astype(np.int64)
    assert addresses[0] == addresses[2] == addresses[1] + 4192 == addresses[4] + 4096
    assert abs(addresses[3] - addresses[0]) < 100_000  # far apart in the file, not in memory


@pytest.mark.parametrize("engine", NATIVE)
def test_memory_is_bounded_by_the_batches_ahead(files, engine):
    batch = [(len(SIZES) - 1, 50_000 * i, 12_288) for i in range(10)]
    seen = set()
    with opened(engine, files, max_pending=3) as reader:
        for _ in range(3):
            reader.prefetch(*columns(batch))
        for _ in range(50):
            seen.add(int(reader.read(*columns(batch))[0]))
            reader.prefetch(*columns(batch))
    assert len(seen) <= 4


# --- batches ahead -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_read_must_be_what_was_prefetched_first(files, engine):
    rng = np.random.default_rng(3)
    first, second, third = (random_ranges(rng, n) for n in (300, 5, 5))
    with opened(engine, files, max_pending=2) as reader:
        reader.prefetch(*columns(first))
        reader.prefetch(*columns(second))
        with pytest.raises(UsageError, match="max_pending"):
            reader.prefetch(*columns(third))
        with pytest.raises(UsageError, match="not those prefetched first"):
            reader.read(*columns(second))
        assert taken(reader, first) == expected(files, first)  # the mistake cost nothing
        reader.cancel()
        assert taken(reader, third) == expected(files, third)
        reader.cancel()
        assert taken(reader, second) == expected(files, second)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_batch_stays_while_later_ones_are_read(files, engine):
    rng = np.random.default_rng(4)
    plan = [random_ranges(rng, 60, 5000) for _ in range(12)]
    with opened(engine, files) as reader:
        for ahead in range(3):
            reader.prefetch(*columns(plan[ahead]))
        for now, batch in enumerate(plan):
            addresses = reader.read(*columns(batch))
            if now + 3 < len(plan):
                reader.prefetch(*columns(plan[now + 3]))
            got = [ctypes.string_at(int(at), length) for at, (_, _, length) in zip(addresses, batch)]
            assert got == expected(files, batch)


@pytest.mark.parametrize("engine", ENGINES)
def test_interrupted_reads_leave_a_usable_reader(files, engine, monkeypatch):
    ranges = random_ranges(np.random.default_rng(5), 100)
    with opened(engine, files) as reader:
        with monkeypatch.context() as patch:
            patch.setattr(reader._engine, "collect", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                reader.read(*columns(ranges))
        assert taken(reader, ranges[:50]) == expected(files, ranges[:50])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_closing_with_reads_under_way_leaves_nothing(files, engine):
    before = held()
    reader = opened(engine, files)
    for seed in range(4):
        reader.prefetch(*columns(random_ranges(np.random.default_rng(seed), 500)))
    reader.close()
    reader.close()
    assert nothing_left(before)
    with pytest.raises(UsageError, match="closed"):
        reader.read([0], [0], [1])
    reader = opened(engine, files)
    reader.prefetch([6], [0], [100])
    del reader
    assert nothing_left(before)


# --- several threads, several processes ----------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_two_threads_with_a_reader_each(files, engine):
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        with opened(engine, files) as reader:
            for _ in range(20):
                ranges = random_ranges(rng, 30)
                if taken(reader, ranges) != expected(files, ranges):
                    wrong.append(ranges)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_child_reads_on(files, engine):
    rng = np.random.default_rng(6)
    ahead, other = random_ranges(rng, 300), random_ranges(rng, 100)
    with opened(engine, files) as reader:
        reader.prefetch(*columns(ahead))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(3):  # nothing is prefetched here, and the descriptors still hold
                    status = int(taken(reader, other) != expected(files, other))
                reader.close()
            finally:
                os._exit(status)
        assert taken(reader, ahead) == expected(files, ahead)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert taken(reader, other) == expected(files, other)


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("left", [0, 1000, 4096, 20_000, 40_960])
def test_a_file_cut_short_while_open(tmp_path, engine, left):
    path, content = tmp_path / "shard.bin", np.random.default_rng(7).bytes(50_000)
    path.write_bytes(content)
    with DirectReader(engine=engine) as reader:
        handle = reader.open(path)
        os.truncate(path, left)
        reader.prefetch([handle] * 2, [0, 40_000], [0, 10_000])
        with pytest.raises(CorruptDataError, match=f"{path}: bytes 40000 to 50000 .* ends at {left}: .* cut short"):
            reader.read([handle] * 2, [0, 40_000], [0, 10_000])
        whole = min(left, 900)
        address = int(reader.read([handle], [0], [whole])[0])  # goes on with what is there
        assert ctypes.string_at(address, whole) == content[:whole]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_range_past_the_end_is_named_among_many(files, engine):
    last, size = len(SIZES) - 1, SIZES[-1]
    ranges = [(last, size - 10, 10), (last, size - 30, 31), (last, size - 50, 50), (5, 10, 10)]
    with opened(engine, files) as reader:
        with pytest.raises(CorruptDataError, match=f"bytes {size - 30} to {size + 1} .* ends at {size}"):
            reader.read(*columns(ranges))
        with pytest.raises(CorruptDataError, match=r"5\.bin: bytes 400000 to 400001"):
            reader.read([5], [400_000], [1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_file_removed_or_replaced_while_open_stays_the_one_that_was_opened(tmp_path, engine):
    path = tmp_path / "shard.bin"
    path.write_bytes(b"old" * 10_000)
    with DirectReader(engine=engine) as reader:
        handle = reader.open(path)
        path.unlink()
        path.write_bytes(b"new" * 10_000)
        assert ctypes.string_at(int(reader.read([handle], [3000], [3])[0]), 3) == b"old"


@pytest.mark.parametrize("engine", ENGINES)
def test_a_read_that_the_system_refuses(files, engine):
    with opened(engine, files) as reader:
        handle = reader.open("/proc/self/mem")  # nothing lies at its first page: EIO
        assert "1 of 8 files" in reader.engine
        with pytest.raises(DatasetError, match="/proc/self/mem: bytes 0 to 100 cannot be read: Input/output error"):
            reader.read([6, handle], [0, 0], [100, 100])
        assert taken(reader, [(6, 0, 100)]) == [files[6][1][:100]]


def test_files_that_cannot_be_opened(tmp_path):
    with DirectReader(engine="python") as reader:
        with pytest.raises(DatasetError, match=r"absent\.bin cannot be opened: No such file"):
            reader.open(tmp_path / "absent.bin")
        with pytest.raises(DatasetError, match="no regular file"):
            reader.open(tmp_path)


@pytest.mark.parametrize("engine", ENGINES)
def test_ranges_that_are_none(files, engine):
    with opened(engine, files) as reader:
        for offset, length in [(-1, 1), (0, -1), (1 << 62, 1), (0, 1 << 41), (np.iinfo(np.int64).max, 1)]:
            with pytest.raises(CorruptDataError, match=r"6\.bin: .* offsets are damaged"):
                reader.read([0, 6], [0, offset], [0, length])
        with pytest.raises(DatasetError):  # no memory, or past the end: by what the system promises
            reader.read([6] * 100, [0] * 100, [1 << 40] * 100)
        for handle in (-1, len(SIZES)):
            with pytest.raises(UsageError, match="handles must be 0 to 6"):
                reader.read([handle], [0], [1])
        with pytest.raises(UsageError, match="one shape"):
            reader.prefetch([1], [0, 1], [1, 2])
        assert taken(reader, []) == []


def test_wrong_settings():
    for wrong in ({"depth": 0}, {"depth": 1 << 20}, {"max_pending": 0}, {"engine": "aio"}):
        with pytest.raises(UsageError):
            DirectReader(**wrong)


def test_without_a_compiler_python_reads(files, monkeypatch):
    monkeypatch.setattr(native, "load", lambda name: None)
    with opened("auto", files) as reader:
        assert reader.engine == "python O_DIRECT, 64 deep"
        assert reader.reason.startswith("io_uring: direct.cpp is not compiled here; threads: ")
        assert taken(reader, [(6, 7, 70)]) == [files[6][1][7:77]]
    with pytest.raises(UsageError, match=r"io_uring.*does not work here"):
        DirectReader(engine="io_uring")


@pytest.mark.skipif(not engine_works("io_uring"), reason="io_uring does not work here")
def test_where_io_uring_is_forbidden_threads_read(files):
    out = run_alone(f"""
        import ctypes, struct
        from turbopump.data.direct import DirectReader
        libc = ctypes.CDLL(None, use_errno=True)
        # a filter as containers have it: io_uring_setup (425) fails with EPERM, all else is allowed
        rules = [(0x20, 0, 0, 0), (0x15, 0, 1, 425), (6, 0, 0, 0x00050001), (6, 0, 0, 0x7FFF0000)]
        code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
        program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(code)))
        assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
        with DirectReader() as reader:
            handle = reader.open({str(files[6][0])!r})
            address = int(reader.read([handle], [5], [5])[0])
            print(reader.engine, "|", reader.reason, "|", ctypes.string_at(address, 5).hex())
    """)
    assert out.strip() == (f"threads O_DIRECT, 64 deep | io_uring: Operation not permitted | {files[6][1][5:10].hex()}")


@pytest.mark.skipif(not engine_works("io_uring"), reason="io_uring does not work here")
def test_a_ring_that_breaks_is_an_error_and_no_hang(files):
    out = run_alone(f"""
        import os
        from turbopump.core.errors import DatasetError
        from turbopump.data.direct import DirectReader
        reader = DirectReader(engine="io_uring")
        handle = reader.open({str(files[6][0])!r})
        for name in os.listdir("/proc/self/fd"):
            try:
                if "io_uring" in os.readlink(f"/proc/self/fd/{{name}}"):
                    os.close(int(name))
            except FileNotFoundError:
                pass
        for _ in range(2):
            try:
                reader.read([handle] * 3, [0, 50_000, 100_000], [10, 20, 30])
            except DatasetError as error:
                print(error)
        reader.close()
    """)
    first, second = out.strip().splitlines()
    assert "bytes 0 to 10 cannot be read: Bad file descriptor" in first
    assert second == "reading has broken down: Bad file descriptor"


def test_more_files_than_the_soft_limit(files):
    out = run_alone(f"""
        import resource
        from turbopump.core.errors import DatasetError
        from turbopump.data.direct import DirectReader
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 80))
        with DirectReader() as reader:
            try:
                for i in range(100):
                    reader.open({str(files[6][0])!r})
            except DatasetError as error:
                print(i > 40, error)
            assert len(reader.read([i - 1], [0], [10])) == 1
    """)
    assert out.startswith("True ") and "too many files open; raise the limit with ulimit -n" in out
