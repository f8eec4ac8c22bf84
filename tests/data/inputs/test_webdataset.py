"""WebDataset archives: samples come back; what leads out of an archive or is damaged is a typed error."""

import gzip
import io
import tarfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.inputs.reading import check_partitions, read_all
from turbopump.core.errors import DatasetError, TurbopumpError
from turbopump.data.inputs.recognise import open_input


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def members(count, begin=0):
    for i in range(begin, begin + count):
        yield f"part/{i:04d}.jpg", bytes([i % 256]) * (i % 700)
        yield f"part/{i:04d}.cls", str(i % 10).encode()
        yield f"part/{i:04d}.seg.txt", f"text {i} é".encode()
        yield f"part/{i:04d}.npy", npy(np.arange(6, dtype=np.float32).reshape(2, 3) + i)


def expected(count, begin=0):
    for i in range(begin, begin + count):
        values = (np.arange(6).reshape(2, 3) + i).astype(float).tolist()
        yield {"jpg": bytes([i % 256]) * (i % 700), "cls": i % 10, "seg.txt": f"text {i} é", "npy": values}


def write(path, items, mode="w", form=tarfile.PAX_FORMAT):
    with tarfile.open(path, mode, format=form) as archive:
        for name, data in items:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(path)


def test_samples_come_back_and_archives_are_cut_between_them(tmp_path):
    write(tmp_path / "a.tar", members(40))
    write(tmp_path / "b.tar", members(9, 40))
    source = open_input([str(tmp_path / "*.tar")])
    assert [(f.name, f.kind, f.shape, f.media) for f in source.fields] == [
        ("jpg", "bytes", (), "image"), ("cls", "array", (), ""), ("seg.txt", "text", (), ""),
        ("npy", "array", (2, 3), ""),
    ]  # fmt: skip
    assert len(list(source.partitions(10_000))) > 8
    assert check_partitions(source) == list(expected(49))
    assert read_all(source)[1][:2] == ["part/0000", "part/0001"]


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz"])
def test_formats_and_compression(tmp_path, form, suffix):
    path = tmp_path / f"a.{suffix}"
    write(path, members(20), "w" if suffix == "tar" else "w:gz", form)
    assert check_partitions(open_input([str(path)])) == list(expected(20))


def test_long_names(tmp_path):
    name = "folder/" * 20 + "é" * 90
    path = write(tmp_path / "a.tar", [(f"{name}{i}.txt", b"x") for i in range(9)])
    assert check_partitions(open_input([path]), (1, 600, 5000)) == [{"txt": "x"}] * 9


def linked(kind, target):
    info = tarfile.TarInfo("a.txt")
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("member", "message"),
    [
        ("../x.txt", r"member '\.\./x\.txt' leads out"),
        ("a/../../x.txt", "leads out"),
        ("/etc/x.txt", r"member '/etc/x\.txt' leads out"),
        (linked(tarfile.SYMTYPE, "/etc/passwd"), "is a link or device"),
        (linked(tarfile.LNKTYPE, "0.txt"), "is a link or device"),
        (linked(tarfile.CHRTYPE, ""), "is a link or device"),
        (linked(tarfile.FIFOTYPE, ""), "is a link or device"),
        ("noextension", "has no extension"),
    ],
)
def test_members_that_are_refused_are_named(tmp_path, member, message):
    path = write(tmp_path / "a.tar", [(f"{i}.txt", b"x" * 1000) for i in range(30)] + [(member, b"")])
    for target in (2000, 1 << 20):
        with pytest.raises(DatasetError, match=rf"a\.tar member .*{message}|{message}"):
            read_all(open_input([path]), target)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("a.cls", b"one")], r"member 'a\.cls' is not an integer"),
        ([("a.txt", b"\xff")], r"member 'a\.txt' is not UTF-8 text"),
        ([("a.npy", npy(np.array([{}], dtype=object)))], r"member 'a\.npy' is not a numpy array without objects"),
        ([("a.npy", npy(np.arange(9))[:-8])], r"member 'a\.npy' is not a numpy array"),
        ([("a.txt", b"x"), ("a.TXT", b"x")], "has two 'txt'"),
        ([("a.txt", b"x"), ("b.cls", b"1")], "sample 'b' has no 'txt'"),
        ([("a.txt", b"x"), ("b.txt", b"x"), ("b.cls", b"1")], "sample 'b' has 'cls'"),
        ([], "holds no sample"),
    ],
)
def test_bad_samples_are_named(tmp_path, items, message):
    with pytest.raises(DatasetError, match=message):
        read_all(open_input([write(tmp_path / "a.tar", items)]))


@pytest.mark.parametrize("keep", [0.9, 0.5])
def test_an_archive_cut_short_is_no_whole_one(tmp_path, keep):
    path = tmp_path / "a.tar"
    write(path, members(30))
    content = path.read_bytes()
    for size in (int(len(content) * keep), int(len(content) * keep) // 512 * 512, 512):
        path.write_bytes(content[:size])
        with pytest.raises(DatasetError, match=r"a\.tar"):
            read_all(open_input([str(path)]))


def test_a_damaged_header_is_not_the_end(tmp_path):
    path = tmp_path / "a.tar"
    write(path, [(f"{i}.txt", b"x") for i in range(60)])
    content = bytearray(path.read_bytes())
    content[50 * 1024 + 3] ^= 1
    path.write_bytes(content)
    for target in (2000, 1 << 20):
        with pytest.raises(DatasetError, match=r"a\.tar cannot be read as a tar archive: cut short or damaged"):
            read_all(open_input([str(path)]), target)


@pytest.mark.slow
@settings(max_examples=80)
@given(data=st.data())
def test_flipped_bytes_give_typed_errors_only(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("tar") / "a.tar"
    write(path, members(8), form=data.draw(st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        block = data.draw(st.integers(0, len(content) // 512 - 1)) * 512
        content[block + data.draw(st.integers(0, 511))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(gzip.compress(content, 0) if data.draw(st.booleans()) else content)
    try:
        read_all(open_input([str(path)], format="webdataset"), 5000)
    except TurbopumpError as error:
        assert "a.tar" in str(error)
