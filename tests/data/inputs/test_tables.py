"""JSONL, CSV, Parquet, Arrow, numpy arrays: rows written by their own libraries are read back, in any partitions."""

import csv
import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.inputs.reading import check_partitions, read_all
from turbopump.core.errors import DatasetError, TurbopumpError, UsageError
from turbopump.data.inputs.recognise import open_input
from turbopump.data.manifest import Field

ROWS = [
    {"name": f"row {i} é{'x' * (i % 40)}", "n": i - 50, "score": i / 3, "ids": list(range(i % 5)), "good": i % 2 == 0}
    for i in range(300)
]
FIELDS = (
    Field("name", "uint8", kind="text"),
    Field("n", "int64"),
    Field("score", "float64"),
    Field("ids", "int64", kind="ragged"),
    Field("good", "uint8"),
)


def expected(rows=ROWS):
    return [{**row, "good": int(row["good"])} for row in rows]


def write_jsonl(path, rows=ROWS, opener=open):
    with opener(path, "wt", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return str(path)


def test_json_lines(tmp_path):
    source = open_input([write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl", ROWS[:7])])
    assert source.name == "jsonl" and source.fields == FIELDS
    assert check_partitions(source, (77, 1000, 20_000)) == expected() + expected(ROWS[:7])


@pytest.mark.parametrize("codec", ["gz", "zst"])
def test_compressed_json_lines(tmp_path, codec):
    path = tmp_path / f"a.jsonl.{codec}"
    plain = write_jsonl(tmp_path / "plain.txt")
    with open(plain, "rb") as file, pa.CompressedOutputStream(str(path), {"gz": "gzip", "zst": "zstd"}[codec]) as out:
        out.write(file.read())
    assert check_partitions(open_input([str(path)])) == expected()
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(DatasetError, match=rf"a\.jsonl\.{codec}"):
        read_all(open_input([str(path)]))


def test_columns_key_and_text_field(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    source = open_input([path], columns=["n"], key="name")
    rows, keys = read_all(source, 500)
    assert source.fields == FIELDS[1:2] and rows == [{"n": row["n"]} for row in ROWS]
    assert keys == [row["name"] for row in ROWS]
    assert read_all(open_input([path], text_field="name"))[0] == [{"name": row["name"]} for row in ROWS]
    with pytest.raises(DatasetError, match="'n' holds no text"):
        open_input([path], text_field="n")
    with pytest.raises(UsageError, match="no column 'other': it has name"):
        open_input([path], columns=["other"])
    with pytest.raises(UsageError, match="no column 'other'"):
        open_input([path], key="other")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{bad", "line 2002 is not valid JSON"),
        ("[1]", "line 2002 is no object"),
        ('{"a": "x"}', "line 2002: 'a' is a str .*int64 in the first rows"),
        ('{"a": 1.5}', "line 2002: 'a' is a float"),
        ('{"a": null}', "line 2002: 'a' is null"),
        ('{"a": 99999999999999999999}', "line 2002: 'a' .*does not fit"),
        ('{"b": 1}', "line 2002 has no 'a'"),
        ('{"a": 1, "b": 1}', "line 2002 has 'b'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n' * 2000 + "\n" + line + "\n")
    source = open_input([str(path)])
    for target in (500, 1 << 20):
        with pytest.raises(DatasetError, match=rf"a\.jsonl {message}"):
            read_all(source, target)


def test_json_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": "x"}\n{"a": "\xff"}\n')
    with pytest.raises(DatasetError, match=r"a\.jsonl line 2 is not valid JSON or UTF-8"):
        open_input([str(path)])


def test_nested_values_name_the_column_and_can_be_left_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"a": 1, "deep": {"x": 1}}] * 3)
    with pytest.raises(DatasetError, match="line 1: 'deep' is a nested object"):
        open_input([path])
    assert read_all(open_input([path], columns=["a"]))[0] == [{"a": 1}] * 3


def test_sources_without_records(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(DatasetError, match=r"nothing to pack: .*a\.jsonl"):
        open_input([str(tmp_path)])
    (tmp_path / "a.jsonl").write_text("")
    with pytest.raises(UsageError, match="no files"):
        open_input([str(tmp_path)])
    write_jsonl(tmp_path / "b.jsonl")
    assert len(read_all(open_input([str(tmp_path)]))[0]) == 300  # an empty file beside others is fine


@settings(max_examples=40)
@given(st.lists(st.text(st.characters(codec="utf-8")), min_size=1), st.integers(1, 200))
def test_any_texts_come_back_from_json_lines(tmp_path_factory, texts, target):
    path = tmp_path_factory.mktemp("jsonl") / "a.jsonl"
    write_jsonl(path, [{"t": text} for text in texts])
    assert [row["t"] for row in read_all(open_input([str(path)]), target)[0]] == texts


CSV_ROWS = [
    {"name": f'row "{i}",\nsecond line' if i % 3 == 0 else f"plain {i} é", "n": i, "score": i + 0.5, "good": i % 2 == 0}
    for i in range(400)
]


def write_csv(path, rows=CSV_ROWS, delimiter=",", end="\r\n", opener=open):
    with opener(path, "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end)
        writer.writeheader()
        writer.writerows({**r, "good": str(r["good"]).lower()} if "good" in r else r for r in rows)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "end"), [("a.csv", "\r\n"), ("a.tsv", "\n")])
def test_delimited_with_quoted_line_ends(tmp_path, name, end):
    path = write_csv(tmp_path / name, delimiter="\t" if name == "a.tsv" else ",", end=end)
    source = open_input([path])
    assert source.name == name[2:]
    assert [item.kind for item in source.fields] == ["text", "array", "array", "array"]
    assert len(list(source.partitions(1000))) > 5
    rows = check_partitions(source, (1, 100, 1000, 10_000))
    assert rows == [{**row, "good": int(row["good"])} for row in CSV_ROWS]


def test_compressed_csv_and_dates_stay_text(tmp_path):
    rows = [{"day": "2020-01-01", "n": 1}, {"day": "soon", "n": 2}]
    path = write_csv(tmp_path / "a.csv.gz", rows, opener=gzip.open)
    assert check_partitions(open_input([path])) == rows


def test_blank_lines_do_not_change_row_numbers(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + "".join(f"{i},x\n{'' if i % 3 else chr(10)}" for i in range(200)))
    assert [row["a"] for row in check_partitions(open_input([str(path)]))] == list(range(200))


def test_a_quote_inside_a_value_keeps_the_file_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + '5" pipe,1\nx,2\n' * 100)
    source = open_input([str(path)])
    assert len(list(source.partitions(10))) == 1
    assert check_partitions(source) == [{"a": '5" pipe', "b": 1}, {"a": "x", "b": 2}] * 100


@settings(max_examples=60)
@given(
    st.lists(st.text(st.sampled_from('",\n\r ab;é'), min_size=1).filter(lambda t: t.strip()), min_size=1, max_size=30),
    st.integers(1, 60),
    st.sampled_from(["\n", "\r\n"]),
)
def test_any_quoting_comes_back_from_csv(tmp_path_factory, texts, target, end):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    rows = [{"t": f"t{text}", "n": i} for i, text in enumerate(texts)]
    if end == "\n":  # a return that stands alone is a line end of its own, and the writer does not quote it
        rows = [{**row, "t": row["t"].replace("\r", "")} for row in rows]
    source = open_input([write_csv(path, rows, end=end)])
    assert read_all(source, target) == read_all(source)
    assert read_all(source)[0] == rows


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x,y", r"a\.csv.*'x'"),
        (",y", r"a\.csv: 'a' of row 3000 is null"),
        ("1,2,3", r"a\.csv.*Expected 2 columns"),
    ],
)
def test_bad_rows_of_csv_are_named(tmp_path, line, message):
    path = tmp_path / "a.csv"
    path.write_text("a,b\n" + f"1,{'y' * 3000}\n" * 3000 + line + "\n")
    for target in (1 << 20, 1 << 30):
        with pytest.raises(DatasetError, match=message):
            read_all(open_input([str(path)]), target)


def test_csv_that_is_not_utf8_names_the_row(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n" + b"1,y\n" * 3000 + b"1,\xff\n")
    for target in (4000, 1 << 20):
        with pytest.raises(DatasetError, match=r"a\.csv: 'b' of row 3000 is not UTF-8"):
            read_all(open_input([str(path)]), target)


def test_csv_files_of_other_columns_are_named(tmp_path):
    first = write_csv(tmp_path / "a.csv", [{"a": 1, "b": 2}])
    second = write_csv(tmp_path / "b.csv", [{"a": 1, "c": 2}])
    with pytest.raises(DatasetError, match=r"b\.csv has the columns a, c, but a, b"):
        read_all(open_input([first, second]))


PAIRS = pa.large_list(pa.list_(pa.float32(), 2))
TABLE = pa.table(
    {
        "text": pa.array([f"text {i} é" * (i % 7) for i in range(500)]),
        "large": pa.array([f"{i}" for i in range(500)], pa.large_string()),
        "data": pa.array([bytes([i % 256]) * (i % 9) for i in range(500)]),
        "fixed": pa.array([bytes([i % 256, 1]) for i in range(500)], pa.binary(2)),
        "i16": pa.array(range(500), pa.int16()),
        "half": pa.array(np.arange(500, dtype=np.float16)),
        "flag": pa.array([i % 2 == 0 for i in range(500)]),
        "ids": pa.array([list(range(i % 4)) for i in range(500)], pa.list_(pa.int32())),
        "pairs": pa.array([[[i, j] for j in range(i % 3)] for i in range(500)], PAIRS),
        "grid": pa.array([[[i, 1, 2], [3, 4, i]] for i in range(500)], pa.list_(pa.list_(pa.int64(), 3), 2)),
        "kind": pa.array([f"kind {i % 3}" for i in range(500)]).dictionary_encode(),
        "when": pa.array(range(500), pa.timestamp("us")),
        "day": pa.array(range(500), pa.date32()),
    }
)  # fmt: skip
TABLE_FIELDS = (
    Field("text", "uint8", kind="text"),
    Field("large", "uint8", kind="text"),
    Field("data", "uint8", kind="bytes"),
    Field("fixed", "uint8", kind="bytes"),
    Field("i16", "int16"),
    Field("half", "float16"),
    Field("flag", "uint8"),
    Field("ids", "int32", kind="ragged"),
    Field("pairs", "float32", (2,), "ragged"),
    Field("grid", "int64", (2, 3)),
    Field("kind", "uint8", kind="text"),
    Field("when", "int64"),
    Field("day", "int64"),
)


def table_rows():
    when = TABLE["when"].cast(pa.int64()).to_pylist()
    day = TABLE["day"].cast(pa.int32()).to_pylist()
    return [
        {**row, "flag": int(row["flag"]), "when": when[i], "day": day[i]} for i, row in enumerate(TABLE.to_pylist())
    ]


def write_table(path, kind, table=TABLE):
    if kind == "parquet":
        pq.write_table(table, path, row_group_size=64)
    else:
        opener = {"file": pa.ipc.new_file, "stream": pa.ipc.new_stream}[kind]
        with opener(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=90)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_columnar_files(tmp_path, kind):
    names = {"parquet": "a.parquet", "file": "a.feather", "stream": "a.arrow"}
    source = open_input([write_table(tmp_path / names[kind], kind), write_table(tmp_path / f"b_{names[kind]}", kind)])
    assert source.fields == TABLE_FIELDS
    rows = check_partitions(source, (1, 1000, 30_000))
    assert rows == table_rows() * 2
    picked = open_input([str(tmp_path / names[kind])], columns=["i16", "kind"], key="large")
    found, keys = read_all(picked, 2000)
    assert found == [{"i16": row["i16"], "kind": row["kind"]} for row in table_rows()]
    assert keys == [str(i) for i in range(500)]


@pytest.mark.parametrize(("name", "kind"), [("mystery", "file"), ("mystery", "parquet")])
def test_files_without_suffix_are_known_by_their_first_bytes(tmp_path, name, kind):
    assert open_input([write_table(tmp_path / name, kind)]).name == {"file": "arrow"}.get(kind, kind)


def test_one_large_batch_is_cut_anywhere(tmp_path):
    table = pa.table({"x": np.arange(10_000)})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    source = open_input([str(tmp_path / "a.arrow")])
    assert len(list(source.partitions(8000))) == 10
    assert [row["x"] for row in read_all(source, 8000)[0]] == list(range(10_000))


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2, None]), "'x' of row 2 is null"),
        (pa.array([[1], [None]]), "'x' near row 0: there is a null in a list"),
        (pa.array([{"a": 1}]), "column 'x' holds struct"),
        (pa.array([[["a"]]]), "column 'x' holds list"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int32())), "column 'x' holds map"),
        (pa.array([1], pa.decimal128(5)), "column 'x' holds decimal"),
        (pa.array([b"\xff"]).view(pa.string()), "'x' of row 0 is not UTF-8"),
    ],
)
def test_columns_that_become_no_field(tmp_path, kind, column, message):
    path = write_table(tmp_path / f"a.{'parquet' if kind == 'parquet' else 'arrow'}", kind, pa.table({"x": column}))
    with pytest.raises(DatasetError, match=message) as raised:
        read_all(open_input([path]))
    assert path in str(raised.value)


@pytest.mark.parametrize("kind", ["parquet", "file"])
def test_files_of_other_schemas_are_named(tmp_path, kind):
    suffix = "parquet" if kind == "parquet" else "arrow"
    first = write_table(tmp_path / f"a.{suffix}", kind, pa.table({"x": pa.array([1], pa.int32())}))
    second = write_table(tmp_path / f"b.{suffix}", kind, pa.table({"x": pa.array([1], pa.int64())}))
    with pytest.raises(DatasetError, match=rf"b\.{suffix}: column 'x' is array of int64, but array of int32 in .*a\."):
        list(open_input([first, second]).partitions(1))


def test_columns_are_views_where_they_can_be(tmp_path):
    path = write_table(tmp_path / "a.arrow", "file", pa.table({"x": np.arange(1000.0), "t": ["abc"] * 1000}))
    source = open_input([path])
    (partition,) = source.partitions(1 << 30)
    (chunk, _) = next(iter(source.read(partition)))
    assert not chunk["x"].flags.owndata and not chunk["x"].flags.writeable
    assert not chunk["t"].values.flags.owndata


def test_numpy_arrays(tmp_path):
    x, y = np.arange(600, dtype=np.float32).reshape(100, 3, 2), np.arange(100) % 2 == 0
    np.savez(tmp_path / "a.npz", x=x, y=y)
    rows = check_partitions(open_input([str(tmp_path / "a.npz")]))
    assert rows == [{"x": x[i].tolist(), "y": int(y[i])} for i in range(100)]
    np.save(tmp_path / "a.npy", x.astype(">f4"))
    np.save(tmp_path / "b.npy", x[:7])
    source = open_input([str(tmp_path / "*.npy")])
    rows, keys = read_all(source, 100, shuffle=True)
    assert [row["x"] for row in rows] == [*x.tolist(), *x[:7].tolist()] and keys == list(range(107))
    np.save(tmp_path / "c.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DatasetError, match=r"c\.npy"):
        open_input([str(tmp_path / "c.npy")])


def make(tmp_path, kind):
    table = pa.table({"x": np.arange(2000), "t": [f"text {i}" for i in range(2000)]})
    if kind == "jsonl":
        return write_jsonl(tmp_path / "a.jsonl", table.to_pylist())
    if kind == "csv":
        return write_csv(tmp_path / "a.csv", table.to_pylist())
    if kind == "npy":
        np.save(tmp_path / "a.npy", np.arange(2000))
        return str(tmp_path / "a.npy")
    return write_table(tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow"), kind, TABLE.slice(0, 150))


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "file", "stream", "npy"])
def test_a_file_that_changes_is_named(tmp_path, kind):
    path = make(tmp_path, kind)
    source = open_input([path])
    partitions = list(source.partitions(3000))
    list(source.read(partitions[0]))
    stat = os.stat(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    with pytest.raises(DatasetError, match="changed while it was packed"):
        list(source.read(partitions[0]))
    os.unlink(path)
    with pytest.raises(DatasetError, match="cannot be read any more"):
        list(source.read(partitions[-1]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet", "file", "stream", "npy"])
@settings(max_examples=40)
@given(data=st.data())
def test_flipped_bytes_give_typed_errors_only(tmp_path_factory, kind, data):
    folder = tmp_path_factory.mktemp("flips")
    path = make(folder, kind)
    with open(path, "rb") as file:
        content = bytearray(file.read())
    for _ in range(data.draw(st.integers(1, 4))):
        near_an_end = data.draw(st.booleans())
        span = min(len(content), 1500) if near_an_end else len(content)
        place = data.draw(st.integers(0, span - 1))
        content[place if data.draw(st.booleans()) else len(content) - 1 - place] ^= data.draw(st.integers(1, 255))
    keep = data.draw(st.sampled_from([1.0, 1.0, 0.5, 0.99]))
    with open(path, "wb") as file:
        file.write(content[: int(len(content) * keep)])
    try:
        read_all(open_input([path]), 5000)
    except TurbopumpError as error:
        assert "a." in str(error)
