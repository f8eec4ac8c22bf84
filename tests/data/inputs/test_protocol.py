"""Partitions and recognition, apart from any one format."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.inputs.reading import read_all
from turbopump.core.errors import UsageError
from turbopump.data.inputs.files import InputFile
from turbopump.data.inputs.protocol import FileInput, Part, Partition
from turbopump.data.inputs.recognise import open_input


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.integers(1, 400))
def test_partitions_cover_every_byte_once(sizes, target):
    class Cut(FileInput):
        def pieces(self, file, target_bytes):
            for begin in range(0, file.size, 100):
                yield Part(file, begin, min(begin + 100, file.size)), min(100, file.size - begin)

    files = tuple(InputFile(f"/x/{i}", str(i), size, 0) for i, size in enumerate(sizes))
    partitions = list(Cut("cut", files).partitions(target))
    parts = [part for partition in partitions for part in partition.parts]
    places = [(int(p.file.name), p.begin) for p in parts]
    assert places == sorted(places)
    covered = {file: sum(p.end - p.begin for p in parts if p.file == file) for file in files}
    assert covered == {file: file.size for file in files}
    assert all(sum(p.end - p.begin for p in partition.parts) < target + 100 for partition in partitions)


def test_a_partition_is_known_by_its_files_and_ranges():
    file = InputFile("/one/a", "a", 10, 5)
    moved = InputFile("/two/a", "a", 10, 5)
    written = InputFile("/one/a", "a", 10, 6)
    key = Partition(0, (Part(file, 0, 10),)).key
    assert key == Partition(3, (Part(moved, 0, 10),)).key
    others = [(Part(written, 0, 10),), (Part(file, 0, 9),), (Part(file, 0, 10), Part(file, 0, 10)), ()]
    assert len({key, *(Partition(0, parts).key for parts in others)}) == 5


def test_target_bytes_must_be_positive(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"target_bytes \(0\)"):
        list(open_input([str(tmp_path)]).partitions(0))


def test_long_rows_make_chunks_of_their_own(tmp_path):
    texts = ["x" * (3 << 20), "short", "y" * (9 << 20), *(["z" * (1 << 20)] * 9)]
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"t": text}) + "\n" for text in texts)
    assert [row["t"] for row in read_all(open_input([str(tmp_path)]), 1 << 20)[0]] == texts
