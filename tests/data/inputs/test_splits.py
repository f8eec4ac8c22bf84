"""Folders that name splits are splits, all or nothing."""

import io
import json
import shutil
import tarfile
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.inputs.reading import check_partitions
from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.inputs.recognise import open_input
from turbopump.data.inputs.splits import splits_by_folder
from turbopump.pack import pack

SIZES = {"train": 9, "val": 3, "test": 2}


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def tar_of(folder, numbers):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for i in numbers:
            member = tarfile.TarInfo(f"{folder}{i}.txt")
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    return buffer.getvalue()


def mds_of(path, texts):
    samples = [text.encode() for text in texts]
    begin = 4 * (len(samples) + 2)
    offsets = np.cumsum([begin, *(4 + len(s) for s in samples)])
    data = np.array([len(samples), *offsets], "<u4").tobytes()
    data += b"".join(len(s).to_bytes(4, "little") + s for s in samples)
    write(path / "shard.00000.mds", data)
    shard = {
        "format": "mds", "samples": len(samples), "compression": None, "zip_data": None, "column_names": ["t"],
        "column_encodings": ["str"], "column_sizes": [None], "raw_data":
        {"basename": "shard.00000.mds", "bytes": len(data)},
    }  # fmt: skip
    write(path / "index.json", json.dumps({"version": 2, "shards": [shard]}).encode())


def filled(root, kind):
    """`train`, `val` and `test` below `root`, with SIZES rows each."""
    for split, count in SIZES.items():
        names = [f"{split} {i}" for i in range(count)]
        if kind == "image":
            for i in range(count):
                write(root / split / ("cat" if i % 2 else "dog") / f"{i}.jpg", f"{split} {i}".encode())
        elif kind == "text":
            for i, name in enumerate(names):
                write(root / split / f"{i}.txt", name.encode())
        elif kind == "jsonl":
            write(root / split / "x.jsonl", b"".join(json.dumps({"t": name}).encode() + b"\n" for name in names))
        elif kind == "parquet":
            (root / split).mkdir(parents=True)
            pq.write_table(pa.table({"t": names}), root / split / "x.parquet")
        elif kind == "webdataset":
            write(root / split / "0.tar", tar_of(split, range(count)))
        elif kind == "mds":
            mds_of(root / split, names)
        else:
            for i in range(count):
                write(root / split / f"{i}.wav", b"RIFF")
    return root


@pytest.mark.parametrize("kind", ["image", "audio", "text", "jsonl", "parquet", "webdataset", "mds"])
def test_folders_of_every_kind_are_splits(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("turbopump.pack.PARTITION_BYTES", (40, 40))
    root = filled(tmp_path / "d", kind)
    check_partitions(open_input([str(root)]))
    for name, processes in (("one", 1), ("many", 2)):
        manifest = pack(root, tmp_path / name, tokenizer="none", num_processes=processes)
        rows = {split: entry.rows for split, entry in manifest.splits.items()}
        assert rows == {"train": 9, "validation": 3, "test": 2}
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "many" / file.name).read_bytes()
    with pytest.raises(
        UsageError, match=r"validation \(0.1\) has no effect on a source with its own splits \(test, tr"
    ):
        pack(root, tmp_path / "x", validation=0.1)
    alone = pack(root / "train", tmp_path / "alone", tokenizer="none", validation=0.0)
    assert {split: entry.rows for split, entry in alone.splits.items() if entry.rows} == {"train": 9}


def test_text_in_splits_becomes_tokens_of_splits(tmp_path):
    root = filled(tmp_path / "d", "text")
    manifest = pack(root, tmp_path / "p")
    assert {split: entry.documents for split, entry in manifest.splits.items()} == {
        "train": 9,
        "validation": 3,
        "test": 2,
    }
    trained = pack(root, tmp_path / "q", tokenizer="bpe", vocab_size=260)
    assert trained.splits["test"].documents == 2


def test_classes_are_those_of_all_splits(tmp_path):
    root = filled(tmp_path / "d", "image")
    shutil.rmtree(root / "val" / "cat")
    manifest = pack(root, tmp_path / "p")
    assert manifest.labels == {"label": ("cat", "dog")}
    write(root / "test" / "flat.jpg", b"x")
    with pytest.raises(DatasetError, match=r"flat\.jpg lies in no folder of a class"):
        pack(root, tmp_path / "x")


def test_images_straight_in_splits_have_no_class(tmp_path):
    for split in ("train", "valid"):
        write(tmp_path / "d" / split / "1.jpg", b"x")
    source = open_input([str(tmp_path / "d")])
    assert [item.name for item in source.fields] == ["image"]
    assert set(source.splits.values()) == {"train", "validation"}


def test_descriptions_may_lie_beside_or_above_the_splits(tmp_path):
    root = tmp_path / "d"
    for split in ("train", "test"):
        write(root / split / "1.jpg", b"x")
        write(root / split / "metadata.jsonl", b'{"file_name": "1.jpg", "caption": "one"}')
    assert set(open_input([str(root)]).splits.values()) == {"train", "test"}
    for split in ("train", "test"):
        (root / split / "metadata.jsonl").unlink()
    write(root / "metadata.csv", b"file_name,caption\ntrain/1.jpg,one\ntest/1.jpg,two\n")
    source = open_input([str(root)])
    assert set(source.splits.values()) == {"train", "test"} and check_partitions(source)[1]["caption"] == "one"


def test_all_or_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert splits_by_folder(["train/a", "valid/b/c", "test/d"]) == {
            "train/a": "train", "valid/b/c": "validation", "test/d": "test"
        }  # fmt: skip
        for names in (
            ["train/a"],
            ["val/a", "test/b"],
            ["train", "val"],
            ["a/train/x", "a/val/x"],
            ["train/a", "car/b"],
            [],
        ):
            assert splits_by_folder(names) == {}
    with pytest.warns(UserWarning, match="extra/c lies in none of the folders train, val"):
        assert splits_by_folder(["train/a", "val/b", "extra/c"]) == {}


def test_saved_splits_keep_their_names_and_take_no_validation(tmp_path):
    root = tmp_path / "d"
    for split in ("train", "validation"):
        (root / split).mkdir(parents=True)
        table = pa.table({"t": [split] * 4})
        with pa.ipc.new_stream(root / split / "data.arrow", table.schema) as sink:
            sink.write_table(table)
        (root / split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    (root / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    assert set(pack(root, tmp_path / "p").splits) == {"train", "validation"}
    with pytest.raises(UsageError, match=r"its own splits \(train, validation\): leave it out"):
        pack(root, tmp_path / "x", validation=0.2)


def test_mds_beside_other_folders_is_no_set_of_splits(tmp_path):
    root = filled(tmp_path / "d", "mds")
    mds_of(root / "extra", ["x"])
    with pytest.raises(UsageError, match="is no mds dataset"):
        open_input([str(root)], format="mds")
