"""Nulls are an error or dropped and counted; members of nested objects by path; lists of lists as arrays."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.inputs.reading import check_partitions, read_all
from turbopump.core.errors import DatasetError, UsageError
from turbopump.data.format import open_dataset
from turbopump.data.inputs.python import from_python
from turbopump.data.inputs.recognise import open_input
from turbopump.pack import pack


def rows_with_nulls(count=300):
    return [
        {"id": i, "text": None if i % 7 == 3 else f"text {i}", "score": None if i % 11 == 5 else i / 2, "other": None}
        for i in range(count)
    ]


KEPT = [{n: r[n] for n in ("id", "text", "score")} for r in rows_with_nulls() if None not in (r["text"], r["score"])]
COLUMNS = ("id", "text", "score")


def written(folder, kind):
    rows, path = rows_with_nulls(), folder / f"rows.{kind}"
    table = pa.table({"id": [r["id"] for r in rows], "text": [r["text"] for r in rows],
                      "score": [r["score"] for r in rows], "other": pa.nulls(len(rows), pa.int8())})  # fmt: skip
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(table, path, row_group_size=40)
    else:
        with pa.ipc.new_file(path, table.schema) as sink:
            sink.write_table(table, 50)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_rows_with_a_null_in_what_is_kept_are_dropped(tmp_path, kind):
    path = written(tmp_path, kind)
    source = open_input([str(path)], columns=COLUMNS, drop_nulls=True)
    source.num_rows = None
    assert check_partitions(source) == KEPT
    # the keys of the rows that stay are those they have where nothing is dropped
    whole = open_input([str(path)], columns=["id"])
    key_of = {row["id"]: key for row, key in zip(*read_all(whole), strict=True)}
    assert [key_of[row["id"]] for row in KEPT] == read_all(source)[1]
    with pytest.raises(DatasetError, match=rf"rows\.{kind}.*'?(text|score)'?.* null.*--nulls drop"):
        read_all(open_input([str(path)], columns=COLUMNS))


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_what_was_dropped_is_counted_whatever_the_number_of_processes(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("turbopump.pack.PARTITION_BYTES", (1000, 1000))
    path = written(tmp_path, kind)
    for name, processes in (("one", 1), ("many", 2)):
        manifest = pack(path, tmp_path / name, columns=COLUMNS, nulls="drop", num_processes=processes)
        assert (manifest.rows, manifest.skipped) == (len(KEPT), 300 - len(KEPT))
        texts = pack(path, tmp_path / f"{name}-text", text_field="text", nulls="drop", num_processes=processes)
        assert texts.skipped == sum(i % 7 == 3 for i in range(300))
    for name in ("one", "one-text"):
        for file in (tmp_path / name).iterdir():
            assert file.read_bytes() == (tmp_path / name.replace("one", "many") / file.name).read_bytes()


@pytest.mark.parametrize("text_field", [None, "text"])
def test_a_pack_that_was_stopped_goes_on_with_the_same_count(tmp_path, monkeypatch, text_field):
    monkeypatch.setattr("turbopump.pack.PARTITION_BYTES", (1000, 1000))
    path = written(tmp_path, "jsonl")
    options = {"columns": () if text_field else COLUMNS, "text_field": text_field, "nulls": "drop", "num_processes": 1}
    whole = pack(path, tmp_path / "whole", **options)
    calls = iter(range(1000))

    def stop(_):
        if next(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(path, tmp_path / "d", progress=stop, **options)
    assert not (tmp_path / "d").exists() and list((tmp_path / ".d.partial").iterdir())
    again = pack(path, tmp_path / "d", **options)
    assert again == whole and again.skipped > 0


def test_values_of_csv_and_python_that_are_missing(tmp_path):
    (tmp_path / "t.csv").write_text("a,b\n1,x\n,y\n3,\n")
    with pytest.raises(DatasetError, match=r"t\.csv: 'a' of row 1 is null"):
        read_all(open_input([str(tmp_path / "t.csv")]))
    rows, _ = read_all(open_input([str(tmp_path / "t.csv")], drop_nulls=True))
    assert rows == [{"a": 1, "b": "x"}, {"a": 3, "b": ""}]
    for given_rows in (pa.Table.from_pylist(rows_with_nulls()), iter(rows_with_nulls())):
        manifest = pack(given_rows, tmp_path / "d", columns=COLUMNS, nulls="drop", overwrite=True)
        assert (manifest.rows, manifest.skipped) == (len(KEPT), 300 - len(KEPT))
    with pytest.raises(DatasetError, match=r"first 2 samples has a null"):
        from_python(iter([{"a": None}, {"a": None}]), drop_nulls=True)
    with pytest.raises(UsageError, match=r"nulls \('skip'\) must be error or drop"):
        pack(tmp_path / "t.csv", tmp_path / "x", nulls="skip")


def test_nothing_but_nulls_is_nothing(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"a": null}\n' * 9)
    with pytest.raises(DatasetError, match="no record without a null"):
        open_input([str(tmp_path / "t.jsonl")], drop_nulls=True)
    table = pa.table({"a": pa.array([None] * 9, pa.int64())})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UsageError, match="nothing to pack"):
        pack(tmp_path / "t.parquet", tmp_path / "d", nulls="drop")


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_members_of_nested_objects_by_path(tmp_path, kind):
    rows = [
        {"text": f"t{i}", "meta": {"lang": "de" if i % 2 else "en", "at": {"line": i}}, "a.b": i} for i in range(60)
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    source = open_input([str(path)], columns=["text", "meta.lang", "meta.at.line", "a.b"])
    wanted = [
        {"text": r["text"], "meta.lang": r["meta"]["lang"], "meta.at.line": i, "a.b": i} for i, r in enumerate(rows)
    ]
    assert check_partitions(source) == wanted
    assert check_partitions(open_input([str(path)], columns=["text"], key="meta.at.line"))
    with pytest.raises(DatasetError, match=r"'meta'.*(meta\.lang|meta\.at)"):
        open_input([str(path)])
    for name in ("meta.none", "meta.lang.x", "none.lang", "meta.", "meta..lang"):
        with pytest.raises(UsageError, match=f"no column '{name}'"):
            open_input([str(path)], columns=[name])
    with pytest.raises(DatasetError, match=r"'meta'|meta"):
        open_input([str(path)], columns=["meta"])
    manifest = pack(path, tmp_path / "d", columns=["meta.lang"], validation=0.0)
    assert [item.name for item in manifest.fields] == ["meta.lang"] and manifest.rows == 60


def test_a_member_of_an_object_that_is_null_is_null(tmp_path):
    rows = [{"meta": {"n": 1}}, {"meta": None}, {"meta": {"n": 3}}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "t.parquet")
    for name in ("t.jsonl", "t.parquet"):
        found, _ = read_all(open_input([str(tmp_path / name)], columns=["meta.n"], drop_nulls=True))
        assert found == [{"meta.n": 1}, {"meta.n": 3}]
        with pytest.raises(DatasetError, match=r"'meta\.n'.* null"):
            read_all(open_input([str(tmp_path / name)], columns=["meta.n"]))


def features(**columns):
    return {b"huggingface": json.dumps({"info": {"features": columns}}).encode()}


def hf_file(path, values, kind, feature):
    """A saved dataset whose column x is `values` (lists) of an Arrow type."""
    schema = pa.schema([("x", kind)], metadata=features(x=feature))
    path.mkdir()
    table = pa.Table.from_arrays([pa.array(values, kind)], schema=schema)
    with pa.ipc.new_stream(path / "data.arrow", schema) as sink:
        sink.write_table(table, 3)
    (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    return path


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 3), (1, 2, 3, 2), (2, 1, 1, 2, 3)])
@pytest.mark.parametrize("first_varies", [False, True])
def test_arrays_of_hugging_face_have_their_shape(tmp_path, shape, first_varies):
    kind = pa.float32()
    for _ in shape:
        kind = pa.list_(kind)
    rng = np.random.default_rng(0)
    sizes = [(i % 4 if first_varies else shape[0], *shape[1:]) for i in range(10)]
    arrays = [rng.random(size, np.float32) for size in sizes]
    stated = {
        "shape": [None if first_varies else shape[0], *shape[1:]],
        "dtype": "float32",
        "_type": f"Array{len(shape)}D",
    }
    source = open_input([str(hf_file(tmp_path / "d", [a.tolist() for a in arrays], kind, stated))])
    (item,) = source.fields
    assert (item.shape, item.kind) == ((shape[1:], "ragged") if first_varies else (shape, "array"))
    rows = check_partitions(source)
    assert [row["x"] for row in rows] == [a.tolist() for a in arrays]


def test_arrays_of_another_shape_than_stated_are_named(tmp_path):
    kind = pa.list_(pa.list_(pa.int64()))
    stated = {"shape": [2, 2], "dtype": "int64", "_type": "Array2D"}
    good = [[1, 2], [3, 4]]
    for name, bad in (("inner", [[1, 2], [3]]), ("outer", [[1, 2]]), ("empty", [])):
        source = open_input([str(hf_file(tmp_path / name, [good, good, good, good, bad], kind, stated))])
        with pytest.raises(DatasetError, match=r"data\.arrow: 'x' of row 4 or soon after.*\[2, 2\]"):
            read_all(source)
    for name, bad in (("none", [None, [1, 2]]), ("hole", [[1, None], [3, 4]])):
        source = open_input([str(hf_file(tmp_path / name, [good, bad], kind, stated))])
        with pytest.raises(DatasetError, match=r"'x' near row 0: there is a null in a list"):
            read_all(source)


@pytest.mark.parametrize("shape", [[2, 2, 2], [None, 2, 2], [None], ["2", 2], [-1, 2], [True, 2], 5, [2, None]])
@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.int64(), pa.string(), pa.list_(pa.list_(pa.int64()), 2)])
def test_a_note_of_another_shape_than_the_column_is_a_typed_error(tmp_path, shape, kind):
    path = hf_file(tmp_path / "d", [], kind, {"shape": shape, "dtype": "int64", "_type": "Array2D"})
    try:
        assert open_input([str(path)]).fields[0].name == "x"  # a note that is none is passed over
    except DatasetError as error:
        assert "'x'" in str(error)


def test_nested_lists_of_fixed_size_are_arrays(tmp_path):
    kind = pa.list_(pa.list_(pa.list_(pa.int16(), 2), 3), 2)
    values = np.arange(10 * 12, dtype=np.int16).reshape(10, 2, 3, 2)
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
    table = pa.table({"x": pa.array(values.tolist(), kind), "t": tensors})
    with pa.ipc.new_file(tmp_path / "t.arrow", table.schema) as sink:
        sink.write_table(table, 4)
    source = open_input([str(tmp_path / "t.arrow")])
    assert [(item.shape, item.dtype) for item in source.fields] == [((2, 3, 2), "int16")] * 2
    assert [row["x"] for row in check_partitions(source)] == values.tolist() == [r["t"] for r in read_all(source)[0]]


def test_lists_of_lists_of_one_shape_in_json_are_arrays(tmp_path):
    values = np.arange(40 * 6).reshape(40, 2, 3).tolist()
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"x": value}) + "\n" for value in values))
    source = open_input([str(path)])
    assert (source.fields[0].shape, source.fields[0].kind) == ((2, 3), "array")
    assert [row["x"] for row in check_partitions(source)] == values
    for other in ([[1, 2, 3]], [[1, 2], [3, 4]], [[1, 2, 3], [4, 5]], 5):
        path.write_text("".join(json.dumps({"x": value}) + "\n" for value in [*values * 30, other]))
        source = open_input([str(path)])
        with pytest.raises(DatasetError, match=r"t\.jsonl line 1201: 'x'"):
            read_all(source)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab."), inner, max_size=3),
    max_leaves=8,
)


@given(rows=st.lists(st.dictionaries(st.sampled_from("ab."), JSON, max_size=3), max_size=6), drop=st.booleans(),
       columns=st.lists(st.sampled_from(["a", "b", "a.b", "a.b.a", ".", "a."]), max_size=2, unique=True))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_objects_are_rows_or_a_typed_error(tmp_path_factory, rows, drop, columns):
    path = tmp_path_factory.mktemp("j") / "t.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    try:
        found, _ = read_all(open_input([str(path)], columns=columns, drop_nulls=drop))
    except (DatasetError, UsageError):
        return
    assert len(found) <= len(rows)


def test_rows_of_arrays_are_dropped_by_their_nulls_too(tmp_path):
    rows = [{"x": np.full(3, i), "y": None if i % 3 == 1 else i} for i in range(9)]
    manifest = pack(iter(rows), tmp_path / "d", nulls="drop", validation=0.0)
    x, y = open_dataset(tmp_path / "d").data("train").batch(range(6))
    assert manifest.skipped == 3 and y.tolist() == [0, 2, 3, 5, 6, 8] and (x == y[:, None]).all()


def test_a_null_between_texts_is_dropped_or_named(tmp_path):
    texts = ["a", "b" * 9] * 40_000 + [None, "c"]
    manifest = pack(iter(texts), tmp_path / "d", tokenizer="none", nulls="drop", validation=0.0)
    assert (manifest.rows, manifest.skipped) == (80_001, 1)
    assert open_dataset(tmp_path / "d").data("train").batch([80_000])[0][0] == "c"
    with pytest.raises(DatasetError, match="sample 80000"):
        pack(iter(texts), tmp_path / "e", tokenizer="none")
