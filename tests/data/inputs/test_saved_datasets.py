"""Datasets of other libraries on disk: Hugging Face's `save_to_disk` layout and MosaicML's MDS."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.inputs.reading import check_partitions, read_all
from turbopump.core.errors import DatasetError, TurbopumpError, UsageError
from turbopump.data.inputs.mds import _array
from turbopump.data.inputs.recognise import open_input

MEDIA = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
    "text": {"dtype": "string", "_type": "Value"},
}


def save_split(folder, rows, begin=0):
    """As datasets 5 writes a split: two Arrow streams, state.json and dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-00002.arrow" for i in range(2)]
    schema = pa.schema([("image", MEDIA), ("label", pa.int64()), ("text", pa.string())])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": FEATURES}})})
    for i, name in enumerate(names):
        part = rows[i * len(rows) // 2 : (i + 1) * len(rows) // 2]
        with pa.ipc.new_stream(str(folder / name), schema) as writer:
            writer.write_table(pa.Table.from_pylist(part, schema), max_chunksize=10)
    state = {"_data_files": [{"filename": n} for n in names], "_fingerprint": "0", "_split": folder.name}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def rows_of(count, begin=0):
    return [
        {"image": {"bytes": bytes([i]) * i, "path": None}, "label": i % 2, "text": f"text {i}"}
        for i in range(begin, begin + count)
    ]


def expected(count, begin=0):
    return [{**row, "image": row["image"]["bytes"]} for row in rows_of(count, begin)]


def test_one_split_of_hugging_face(tmp_path):
    save_split(tmp_path / "d", rows_of(50))
    source = open_input([str(tmp_path / "d")])
    assert source.name == "huggingface" and source.class_names == {"label": ("cat", "dog")}
    assert [(f.name, f.kind, f.media) for f in source.fields] == [
        ("image", "bytes", "image"), ("label", "array", ""), ("text", "text", ""),
    ]  # fmt: skip
    assert check_partitions(source, (1, 200, 1000)) == expected(50)


def test_splits_of_hugging_face_stay_splits(tmp_path):
    save_split(tmp_path / "d" / "train", rows_of(40))
    save_split(tmp_path / "d" / "test", rows_of(9, 40))
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    source = open_input([str(tmp_path / "d")])
    assert check_partitions(source, (1, 500)) == expected(49)
    for target in (1, 1 << 30):
        partitions = list(source.partitions(target))
        rows = {"train": 0, "test": 0}
        for partition in partitions:
            rows[partition.split] += sum(len(keys) for _, keys in source.read(partition))
        assert rows == {"train": 40, "test": 9}


def test_damaged_layouts_of_hugging_face_are_named(tmp_path):
    save_split(tmp_path / "d", [{"image": {"bytes": None, "path": "x.png"}, "label": 0, "text": ""}] * 4)
    with pytest.raises(DatasetError, match="'image' of row 0 holds the path of a file instead of its bytes"):
        read_all(open_input([str(tmp_path / "d")]))
    (tmp_path / "d" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DatasetError, match=r"cannot read .*data-00001"):
        open_input([str(tmp_path / "d")])
    (tmp_path / "d" / "state.json").write_text('{"_data_files": [{"filename": "../x.arrow"}]}')
    with pytest.raises(DatasetError, match=r"state\.json names '\.\./x\.arrow'"):
        open_input([str(tmp_path / "d")])
    (tmp_path / "d" / "state.json").write_text("{")
    with pytest.raises(DatasetError, match=r"cannot read .*state\.json"):
        open_input([str(tmp_path / "d")])


COLUMNS = {"data": "bytes", "label": "int", "score": "float32", "text": "str", "vec": "ndarray:int16:3"}


def mds_row(i):
    return {"data": bytes([i % 256]) * (i % 30), "label": i - 5, "score": i + 0.5, "text": f"é{i}", "vec": [i, 1, 2]}


def encode(row):
    data = [row["data"], np.int64(row["label"]).tobytes(), np.float32(row["score"]).tobytes(), row["text"].encode(),
            np.array(row["vec"], np.int16).tobytes()]  # fmt: skip
    return np.array([len(data[0]), len(data[3])], np.uint32).tobytes() + b"".join(data)


def write_mds(root, count, codec=None, shards=2, sample=encode):
    """The format as its own writer puts it down (compared with mosaicml-streaming 0.13.0: same bytes)."""
    root.mkdir(parents=True, exist_ok=True)
    sizes = {"data": None, "label": 8, "score": 4, "text": None, "vec": 6}
    config = {
        "column_encodings": list(COLUMNS.values()), "column_names": list(COLUMNS), "column_sizes": list(sizes.values()),
        "compression": codec, "format": "mds", "hashes": [], "size_limit": 1 << 20, "version": 2,
    }  # fmt: skip
    head = json.dumps(config, sort_keys=True).encode()
    entries = []
    for number in range(shards):
        rows = [sample(mds_row(i)) for i in range(number * count // shards, (number + 1) * count // shards)]
        offsets = np.cumsum([0, *map(len, rows)]) + 4 * (len(rows) + 2) + len(head)
        data = np.uint32(len(rows)).tobytes() + offsets.astype(np.uint32).tobytes() + head + b"".join(rows)
        name = f"shard.{number:05d}.mds"
        entry = {**config, "samples": len(rows), "raw_data": {"basename": name, "bytes": len(data), "hashes": {}}}
        entry["zip_data"] = None
        if codec is None:
            (root / name).write_bytes(data)
        else:
            packed = pa.compress(data, {"zstd": "zstd", "gz": "gzip"}[codec], asbytes=True)
            (root / f"{name}.{codec}").write_bytes(packed)
            entry["zip_data"] = {"basename": f"{name}.{codec}", "bytes": len(packed), "hashes": {}}
        entries.append(entry)
    (root / "index.json").write_text(json.dumps({"shards": entries, "version": 2}))
    return str(root)


@pytest.mark.parametrize("codec", [None, "zstd", "gz"])
def test_mds(tmp_path, codec):
    source = open_input([write_mds(tmp_path, 100, codec)])
    assert source.name == "mds" and source.num_rows == 100
    assert [(f.name, f.dtype, f.shape, f.kind) for f in source.fields] == [
        ("data", "uint8", (), "bytes"), ("label", "int64", (), "array"), ("score", "float32", (), "array"),
        ("text", "uint8", (), "text"), ("vec", "int16", (3,), "array"),
    ]  # fmt: skip
    assert check_partitions(source) == [mds_row(i) for i in range(100)]
    assert read_all(open_input([str(tmp_path)], columns=["text"], key="label"))[1] == [
        i % 2**64 for i in range(-5, 95)
    ]  # fmt: skip


def test_arrays_of_mds_that_say_their_own_shape():
    values = np.arange(6, dtype=np.int16)
    tail = values.tobytes()
    for data, kind in [
        (bytes([17, (2 << 2) | 0, 2, 3]) + tail, "ndarray"),
        (bytes([(2 << 2) | 1, 2, 0, 3, 0]) + tail, "ndarray:int16"),
        (tail, "ndarray:int16:2,3"),
    ]:
        assert np.array_equal(_array(memoryview(data), kind), values.reshape(2, 3))


def test_mds_that_is_damaged_or_refused(tmp_path):
    write_mds(tmp_path, 20)
    index = json.loads((tmp_path / "index.json").read_text())
    for change, message in [
        ({"column_encodings": ["pkl"] * 5}, "encoded as 'pkl'"),
        ({"compression": "br"}, "compression 'br'"),
        ({"raw_data": {"basename": "../x", "bytes": 1}}, "no file of the folder"),
        ({"samples": 9}, "does not hold the 9 samples"),
        ({"samples": -9}, "unexpected count"),
    ]:
        changed = {**index, "shards": [{**entry, **change} for entry in index["shards"]]}
        (tmp_path / "index.json").write_text(json.dumps(changed))
        with pytest.raises(DatasetError, match=message):
            read_all(open_input([str(tmp_path)]))
    write_mds(tmp_path, 20, sample=lambda row: encode({**row, "text": "x"})[:-1])
    with pytest.raises(DatasetError, match=r"shard\.00000\.mds sample 0 is damaged: column 'vec' would end"):
        read_all(open_input([str(tmp_path)]))
    with pytest.raises(UsageError, match="is packed alone"):
        open_input([str(tmp_path), str(tmp_path)])
    (tmp_path / "shard.00000.mds").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"shard\.00000\.mds has 0 bytes"):
        open_input([str(tmp_path)])


@settings(max_examples=80)
@given(data=st.data())
def test_flipped_bytes_give_typed_errors_only(tmp_path_factory, data):
    root = tmp_path_factory.mktemp("mds")
    codec = data.draw(st.sampled_from([None, "zstd"]))
    write_mds(root, 20, codec, shards=1)
    name = data.draw(st.sampled_from(["index.json", "shard.00000.mds" + (".zstd" if codec else "")]))
    content = bytearray((root / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (root / name).write_bytes(content)
    try:
        read_all(open_input([str(root)], format="mds"), 500)
    except TurbopumpError as error:
        assert str(root) in str(error)
