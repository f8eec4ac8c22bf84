"""Dataset directories: what is written is read, what is damaged is named, what is unfinished does not exist."""

import contextlib
import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from turbopump.core.errors import CorruptDataError, DatasetError, UsageError
from turbopump.core.files import digest, to_json
from turbopump.data.format import open_dataset, verify_dataset
from turbopump.data.manifest import DTYPES, Field, read_manifest
from turbopump.data.writer import DatasetWriter


def write(path, rows=1000, shard_bytes=800, block_bytes=128, **options):
    values = np.arange(rows, dtype=np.uint16)
    fields = [Field("tokens", "uint16")]
    with DatasetWriter(
        path, kind="tokens", fields=fields, shard_bytes=shard_bytes, block_bytes=block_bytes, **options
    ) as writer:
        for begin in range(0, rows, 333):
            writer.append("train", [values[begin : begin + 333]], source_bytes=333, document_sizes=[333])
        writer.finish()
    return values


def read_all(path, split="train", field=0):
    data = open_dataset(path).data(split)
    return data.rows(field, np.arange(len(data)))


def test_round_trip_over_shards(tmp_path):
    values = write(tmp_path / "d")
    assert len(open_dataset(tmp_path / "d").split("train").shards) == 3
    assert np.array_equal(read_all(tmp_path / "d"), values)
    assert verify_dataset(tmp_path / "d") == open_dataset(tmp_path / "d").manifest.bytes
    assert open_dataset(tmp_path / "d").data("train").bounds.tolist() == [0, 400, 800, 1000]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_and_any_arrow_tool_reads_it(tmp_path, dtype):
    values = np.arange(60).reshape(10, 2, 3).astype(dtype)
    with DatasetWriter(tmp_path / "d", kind="arrays", fields=[Field("x", dtype, (2, 3))]) as writer:
        writer.append("train", [values])
        writer.finish()
    assert np.array_equal(read_all(tmp_path / "d"), values)
    with pa.memory_map(str(tmp_path / "d" / "train-00000.arrow")) as source:
        table = pa.ipc.open_file(source).read_all()
        assert table["x"].to_pylist() == values.reshape(10, 6).tolist()


def test_the_same_input_gives_the_same_bytes(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b")
    for name in sorted(os.listdir(tmp_path / "a")):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_flipped_bit_is_found_when_its_block_is_read(tmp_path):
    values = write(tmp_path / "d", shard_bytes=1 << 20)
    dataset = open_dataset(tmp_path / "d")
    shard = dataset.split("train").shards[0]
    file = tmp_path / "d" / shard.file
    data = bytearray(file.read_bytes())
    data[shard.buffers[0][0] + 5 * 128 + 7] ^= 16  # block 5: rows 320 to 383
    file.write_bytes(data)
    rows = open_dataset(tmp_path / "d").data("train")
    good = np.r_[0:320, 384:1000]
    assert np.array_equal(rows.rows(0, good), values[good])
    with pytest.raises(CorruptDataError, match=r"train-00000.arrow: block 5 .* met at row 330 "):
        rows.rows(0, [310, 330])
    with pytest.raises(CorruptDataError, match=r"train-00000.arrow: block 5 "):
        verify_dataset(tmp_path / "d")


@pytest.mark.slow
def test_every_flip_anywhere_is_found_by_verify(tmp_path):
    write(tmp_path / "d")
    random = np.random.default_rng(0)
    for file in sorted((tmp_path / "d").iterdir()):
        good = file.read_bytes()
        for place in random.integers(0, len(good), 40):
            data = bytearray(good)
            data[place] ^= 1 << int(random.integers(8))
            file.write_bytes(data)
            try:
                verify_dataset(tmp_path / "d")
            except DatasetError:
                continue
            assert file.name == "manifest.json" and json.loads(data) == json.loads(good)  # a flip in white space
        file.write_bytes(good)
    verify_dataset(tmp_path / "d")


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_made_up_by_anyone_gives_only_typed_errors(tmp_path, data):
    path = tmp_path / "d"
    if not path.exists():
        write(path)
        shutil.copy(path / "manifest.json", tmp_path / "good.json")
    table = json.loads((tmp_path / "good.json").read_bytes())
    odd = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.floats(), st.lists(st.integers(), max_size=2),
                    st.just("../x"), st.just(10**30), st.just({}))  # fmt: skip
    node = table
    while True:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        child = node[key]
        if not isinstance(child, (dict, list)) or not child or data.draw(st.booleans()):
            node[key] = data.draw(odd)
            break
        node = child
    table.pop("digest", None)
    try:
        text = to_json({**table, "digest": digest(to_json(table))})
    except (TypeError, ValueError, OverflowError):
        return
    (path / "manifest.json").write_bytes(text)
    with contextlib.suppress(DatasetError):
        verify_dataset(path)


def test_a_truncated_or_missing_shard_is_found_at_open(tmp_path):
    write(tmp_path / "d")
    file = tmp_path / "d" / "train-00001.arrow"
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(CorruptDataError, match=r"train-00001.arrow has .* bytes where"):
        open_dataset(tmp_path / "d")
    file.unlink()
    with pytest.raises(CorruptDataError, match=r"train-00001.arrow is missing"):
        open_dataset(tmp_path / "d")


def test_a_missing_dataset_names_the_path_and_the_command(tmp_path):
    with pytest.raises(DatasetError, match=r"no dataset at .*nowhere .*turbopump pack SOURCE"):
        open_dataset(tmp_path / "nowhere")
    with pytest.raises(DatasetError, match=r"a folder without manifest.json"):
        open_dataset(tmp_path)


def test_another_schema_names_both_versions(tmp_path):
    write(tmp_path / "d")
    table = json.loads((tmp_path / "d" / "manifest.json").read_bytes())
    table["schema_version"], table["turbopump_version"] = 7, "9.9"
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(table))
    with pytest.raises(DatasetError, match=r"schema version 7 \(written by turbopump 9\.9\).*reads version 2"):
        open_dataset(tmp_path / "d")


def test_nothing_stands_at_the_place_before_finish(tmp_path):
    path = tmp_path / "d"
    with pytest.raises(ZeroDivisionError):
        with DatasetWriter(path, kind="tokens", fields=[Field("tokens", "uint8")]) as writer:
            writer.append("train", [np.zeros(10, np.uint8)])
            assert not path.exists()
            raise ZeroDivisionError
    assert not os.listdir(tmp_path)


def test_what_stands_there_is_not_overwritten_unasked(tmp_path):
    write(tmp_path / "d", rows=100)
    with pytest.raises(UsageError, match=r"already holds a dataset.*--overwrite"):
        write(tmp_path / "d", rows=200)
    write(tmp_path / "d", rows=200, overwrite=True)
    assert read_manifest(tmp_path / "d").rows == 200
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(UsageError, match="other files in it"):
        write(tmp_path / "mine", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["d", "mine"]


def test_an_unwritable_destination_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DatasetError, match="a file stands where a directory is needed"):
        write(tmp_path / "file" / "d")


def test_rows_of_another_shape_are_refused(tmp_path):
    with DatasetWriter(tmp_path / "d", kind="arrays", fields=[Field("x", "int8", (3,))]) as writer:
        with pytest.raises(UsageError, match=r"rows of shape \(2,\) given, \(3,\) expected"):
            writer.append("train", [np.zeros((4, 2), np.int8)])
    with pytest.raises(UsageError, match="complex64"):
        DatasetWriter(tmp_path / "e", kind="arrays", fields=[Field("x", "complex64")])
