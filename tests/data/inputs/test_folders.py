"""Folders of text, audio and images: rows, labels and transcripts, and descriptions that do not fit."""

import json

import pytest

from tests.data.inputs.reading import check_partitions, read_all
from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.corpus import BadTextError
from turbopump.data.inputs.recognise import open_input


def put(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def fields_of(source):
    return [(f.name, f.dtype, f.kind, f.media) for f in source.fields]


def test_text_files_are_documents(tmp_path):
    texts = {f"{i % 3}/{i}.md": f"document {i} é\n" * i for i in range(1, 20)}
    source = open_input([put(tmp_path, {**texts, "empty.md": ""})])
    assert source.name == "text" and fields_of(source) == [("text", "uint8", "text", "")]
    rows = check_partitions(source)
    assert {key: row["text"] for key, row in zip(read_all(source)[1], rows, strict=True)} == texts


def test_text_that_is_not_utf8_names_file_and_line(tmp_path):
    source = open_input([put(tmp_path, {"a.txt": "fine", "b.txt": b"one\ntwo \xff"})])
    with pytest.raises(BadTextError, match=r"b\.txt is not UTF-8 text \(line 2, byte 8\)"):
        read_all(source)


def test_mixed_kinds_are_refused_and_a_pattern_chooses(tmp_path):
    root = put(tmp_path, {"a.txt": "x", "b.jsonl": '{"a": 1}\n'})
    with pytest.raises(UsageError, match=r"a\.txt is text and .*b\.jsonl is jsonl: pack one kind"):
        open_input([root])
    assert open_input([root], include=["*.jsonl"]).name == "jsonl"
    assert open_input([root], format="text").num_rows == 2
    with pytest.raises(UsageError, match="no format 'pdf'"):
        open_input([root], format="pdf")
    with pytest.raises(UsageError, match="no file or folder"):
        open_input([root + "/absent"])


def test_class_folders_give_labels(tmp_path):
    files = {f"{kind}/{i}.png": f"{kind}{i}" for kind in ("dog", "cat") for i in range(3)}
    source = open_input([put(tmp_path, files)])
    assert source.name == "image" and source.class_names == {"label": ("cat", "dog")}
    assert fields_of(source) == [("image", "uint8", "bytes", "image"), ("label", "int64", "array", "")]
    rows = check_partitions(source, (1, 10, 100))
    assert rows == [{"image": f"{k}{i}".encode(), "label": n} for n, k in enumerate(("cat", "dog")) for i in range(3)]
    assert read_all(source)[1][0] == "cat/0.png"


def test_metadata_describes_files(tmp_path):
    audio = {"data/a.wav": b"1", "data/b.flac": b"2"}
    table = 'file_name,transcript,speaker\ndata/b.flac,two,7\ndata/a.wav,"one, é",9\n'
    source = open_input([put(tmp_path / "csv", {**audio, "metadata.csv": table})])
    rows = [{"audio": b"1", "transcript": "one, é", "speaker": 9}, {"audio": b"2", "transcript": "two", "speaker": 7}]
    assert source.name == "audio" and check_partitions(source, (1,)) == rows
    lines = "".join(json.dumps({"file_name": n, "transcript": n}) + "\n" for n in ("a.wav", "b.flac"))
    source = open_input([put(tmp_path / "jsonl", {**audio, "data/metadata.jsonl": lines})])
    assert [row["transcript"] for row in check_partitions(source, (1,))] == ["a.wav", "b.flac"]
    assert read_all(open_input([str(tmp_path / "csv")], columns=["audio"], key="speaker"))[1] == [9, 7]


def test_librispeech_transcripts(tmp_path):
    files = {f"1/2/1-2-{i}.flac": bytes([i]) for i in range(3)}
    lines = "".join(f"1-2-{i} TEXT {i}\n" for i in range(3))
    source = open_input([put(tmp_path, {**files, "1/2/1-2.trans.txt": lines})])
    assert check_partitions(source, (1,)) == [{"audio": bytes([i]), "text": f"TEXT {i}"} for i in range(3)]


def test_a_text_beside_each_file(tmp_path):
    source = open_input([put(tmp_path, {"a.mp3": b"1", "a.txt": "one\n", "b.mp3": b"2", "b.txt": "two"})])
    assert check_partitions(source, (1,)) == [{"audio": b"1", "text": "one"}, {"audio": b"2", "text": "two"}]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"metadata.csv": "file_name,n\na.png,1\n"}, r"metadata\.csv says nothing about .*b\.png"),
        ({"metadata.csv": "file_name,n\na.png,1\nb.png,2\nc.png,3\n"}, r"names 'c\.png', which is not there"),
        ({"metadata.csv": "file_name,n\na.png,1\na.png,2\n"}, r"line 3 names 'a\.png' a second time"),
        ({"metadata.csv": "file_name,n\n../a.png,1\n"}, "line 2: file_name .* leads out of the folder"),
        ({"metadata.csv": "file_name,n\na.png\n"}, "line 2 has not as many values"),
        ({"metadata.csv": "name,n\na.png,1\n"}, "line 2 has no 'file_name'"),
        ({"metadata.csv": "file_name,image\na.png,1\n"}, "line 2 has a column 'image'"),
        ({"metadata.csv": b"file_name,n\na.png,\xff\n"}, r"metadata\.csv is not UTF-8 text \(line 2\)"),
        ({"metadata.jsonl": '{"file_name": "a.png"}\n{bad'}, r"metadata\.jsonl line 2 is not valid JSON"),
        ({"a.txt": "x"}, r"b\.png has no \.txt"),
    ],
)
def test_descriptions_that_do_not_fit_are_named(tmp_path, files, message):
    with pytest.raises(DatasetError, match=message):
        open_input([put(tmp_path, {"a.png": b"1", "b.png": b"2", **files})])
