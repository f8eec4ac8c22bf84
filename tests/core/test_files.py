import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from turbopump.core import files
from turbopump.core.errors import RunDirectoryError

ROOT = os.geteuid() == 0
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.text()
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
records = st.lists(st.dictionaries(st.text(max_size=5), plain, max_size=3), max_size=6)


def test_write_atomic_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "er" / "a.json"
    files.write_atomic(path, "first")
    files.write_atomic(path, b"second")
    assert path.read_bytes() == b"second"
    assert os.listdir(path.parent) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_write_atomic_keeps_the_old_content_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_atomic(path, "old")
    for failure, seen in [
        (OSError(errno.ENOSPC, "full"), RunDirectoryError),
        (OSError(errno.EROFS, "ro"), RunDirectoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ]:

        def fail(_, error=failure):
            raise error

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(seen):
            files.write_atomic(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_where_a_directory_is_needed_is_explained(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirectoryError, match="a file stands where a directory is needed"):
        files.write_atomic(tmp_path / "file" / "a.json", "x")
    with pytest.raises(RunDirectoryError, match="a file stands where"):
        files.JsonLines(tmp_path / "file" / "a.jsonl")


@pytest.mark.skipif(ROOT, reason="root may write everywhere")
def test_a_directory_that_is_not_writable_is_explained(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RunDirectoryError, match="is not writable"):
        files.write_atomic(tmp_path / "a.json", "x")


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EACCES, "is not writable"),
        (errno.EROFS, "is not writable"),
        (errno.ENOTDIR, "a file stands"),
        (errno.EIO, "cannot write /x: Input/output error"),
    ],
)
def test_system_errors_are_explained(number, text):
    assert text in files.explain_os_error(OSError(number, os.strerror(number)), Path("/x"))


@given(plain)
def test_json_gives_back_plain_values(value):
    assert files.from_json(files.to_json(value)) == value
    assert files.from_json(files.to_json(value, indent=True)) == value


def test_json_of_dataclasses_and_of_garbage():
    @dataclass
    class Row:
        a: int
        b: str

    assert files.to_json(Row(1, "x")) == b'{"a":1,"b":"x"}'
    for bad in (b"", b"{", b"\xff", b'{"a": "\xff"}', "nope"):
        with pytest.raises(ValueError):
            files.from_json(bad)


@pytest.mark.slow
@settings(max_examples=50)
@given(records, st.data())
def test_a_file_cut_anywhere_gives_all_whole_lines(tmp_path_factory, written, data):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    with_close(path, written)
    content = path.read_bytes()
    assert list(files.read_json_lines(path)) == written
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = content[:cut].count(b"\n")
    read = list(files.read_json_lines(path))
    assert read[:whole] == written[:whole]
    assert len(read) <= whole + 1 and read == written[: len(read)]
    with_close(path, [{"after": 1}])  # a restart does not glue its first line to the one cut short
    assert list(files.read_json_lines(path)) == [*read, {"after": 1}]


def with_close(path, written):
    lines = files.JsonLines(path)
    for record in written:
        lines.write(record)
    lines.close()


@pytest.mark.slow
@settings(max_examples=50)
@given(records.filter(bool), st.data())
def test_a_flipped_byte_costs_at_most_its_own_lines(tmp_path_factory, written, data):
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    with_close(path, written)
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    assert len(list(files.read_json_lines(path))) >= len(written) - 2


def test_lines_appear_at_flush_and_not_before(tmp_path):
    lines = files.JsonLines(tmp_path / "a.jsonl")
    lines.write({"a": 1})
    assert list(files.read_json_lines(tmp_path / "a.jsonl")) == []
    lines.flush()
    assert list(files.read_json_lines(tmp_path / "a.jsonl")) == [{"a": 1}]
    lines.close()
    lines.close()
    assert list(files.read_json_lines(tmp_path / "none.jsonl")) == []


def test_a_full_disk_is_a_typed_error_at_flush_and_at_close():
    lines = files.JsonLines(Path("/dev/full"))
    lines.write({"a": 1})
    with pytest.raises(RunDirectoryError, match="no space left"):
        lines.flush()
    with pytest.raises(RunDirectoryError):
        lines.close()
    lines.close()


def test_a_killed_writer_leaves_whole_lines(tmp_path):
    code = """
import os, sys
from pathlib import Path
from turbopump.core.files import JsonLines
lines = JsonLines(Path(sys.argv[1]))
for i in range(1000):
    lines.write({"i": i, "pad": "x" * 100})
    if i % 10 == 9:
        lines.flush()
    if i == 555:
        os.kill(os.getpid(), 9)
"""
    path = tmp_path / "a.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -9
    assert [r["i"] for r in files.read_json_lines(path)] == list(range(550))


@given(st.binary(max_size=300), st.integers(1, 64))
def test_digests_agree_with_the_library_however_the_bytes_come(tmp_path_factory, data, chunk):
    path = tmp_path_factory.mktemp("digest") / "a"
    path.write_bytes(data)
    running = files.new_digest()
    for start in range(0, len(data), chunk):
        running.update(data[start : start + chunk])
    expected = xxhash.xxh3_64(data).hexdigest()
    assert files.digest(data) == files.digest_file(path, chunk) == running.hexdigest() == expected
    assert files.digest(memoryview(data)) == files.digest(bytearray(data)) == expected


def test_a_flipped_bit_changes_the_digest():
    data = bytes(range(256))
    flipped = {files.digest(data[:i] + bytes([data[i] ^ 1 << b]) + data[i + 1 :]) for i in range(256) for b in range(8)}
    assert len(flipped) == 2048 and files.digest(data) not in flipped
