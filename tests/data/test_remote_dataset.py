"""Datasets in a store give what the same dataset gives from a directory, through every reader, or a typed error."""

import contextlib
import json
import os
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from tests.processes import PATIENCE_S
from tests.range_server import RangeServer
from turbopump.core.errors import CacheError, ConfigError, CorruptDataError, DatasetError, RemoteError, UsageError
from turbopump.core.files import digest, to_json
from turbopump.data import block_cache
from turbopump.data.block_cache import bytes_of_cache
from turbopump.data.format import open_dataset, verify_dataset
from turbopump.data.loader import Loader, evaluation_batches
from turbopump.data.manifest import Field
from turbopump.data.mixture import MIXTURE, ArraysPart, MixtureConfig
from turbopump.data.ragged import Ragged, ragged_of
from turbopump.data.remote_files import RemoteConfig
from turbopump.data.source_order import source_order
from turbopump.data.sources import ARRAYS, TOKENS, ArraysConfig, TokensConfig
from turbopump.data.text import ByteTokenizer, tokenizer_entry
from turbopump.data.writer import DatasetWriter
from turbopump.inspect import inspect
from turbopump.pack import pack

ROWS = 600
QUICK = {"request_s": 5, "stall_s": 0.3, "retry_s": 10, "max_tries": 2}
CACHES = {"cached": 1 << 30, "tiny cache": bytes_of_cache(2), "no cache": 0}


def write_arrays(path: Path) -> None:
    """Rows of every kind of field, some of them empty, in seven shards."""
    random = np.random.default_rng(0)
    sizes = random.integers(0, 900, ROWS) * (random.random(ROWS) < 0.8)
    fields = [
        Field("number", "int64"),
        Field("image", "uint8", (3, 5)),
        Field("wave", "float32", (2,), "ragged"),
        Field("sound", "uint8", (), "bytes"),
        Field("said", "uint8", (), "text"),
    ]
    columns = [
        np.arange(ROWS),
        random.integers(0, 256, (ROWS, 3, 5)).astype(np.uint8),
        ragged_of([random.random((n // 4, 2), np.float32) for n in sizes]),
        ragged_of([random.bytes(int(n)) for n in sizes[::-1]]),
        ragged_of(["é" * int(n % 7) for n in sizes]),
    ]
    with DatasetWriter(path, kind="arrays", fields=fields, shard_bytes=150_000) as writer:
        writer.append("train", columns)
        writer.append("validation", [column[:40] if isinstance(column, np.ndarray) else column.rows(0, 40)
                                     for column in columns])  # fmt: skip
        writer.finish()


def write_tokens(path: Path) -> None:
    tokens = np.random.default_rng(1).integers(1, 256, 60_000).astype(np.uint8)
    with DatasetWriter(path, kind="tokens", fields=[Field("tokens", "uint8")], shard_bytes=13_000) as writer:
        for split, part in (("train", tokens[:50_000]), ("validation", tokens[50_000:])):
            writer.append(split, [part], source_bytes=len(part))
        writer.add_file("tokenizer.json", ByteTokenizer().dumps())
        writer.finish(tokenizer=tokenizer_entry(ByteTokenizer()))


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("local")
    write_arrays(folder / "arrays")
    write_tokens(folder / "tokens")
    return folder


def objects_of(local: Path) -> dict[str, bytes]:
    return {f"bucket/{file.relative_to(local)}": file.read_bytes() for file in local.rglob("*.*") if file.is_file()}


@pytest.fixture(scope="module")
def http(local):
    with RangeServer(objects_of(local)) as running:
        yield running


@pytest.fixture(scope="module")
def s3(local):
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    kind = {"Content-Type": "application/octet-stream"}  # else it is taken for a form
    for path, body in [("bucket", b""), *objects_of(local).items()]:
        urlopen(Request(f"{url}/{path}", body, kind, method="PUT"), timeout=PATIENCE_S).close()
    yield url
    server.stop()


@pytest.fixture(autouse=True)
def healthy(http, local, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    http.heal()
    http.requests.clear()
    http.objects, http.etag = objects_of(local), "1"
    yield
    for table in block_cache._attached.values():
        os.close(table.lock)
        os.close(table.blocks)
    block_cache._attached.clear()


def remote_of(where: str, request, cache_bytes: int = 1 << 30) -> tuple[str, RemoteConfig]:
    """The address of the datasets' folder, and how it is reached."""
    if where == "s3":
        options = {"endpoint": request.getfixturevalue("s3"), "options": {"region": "us-east-1"}}
        return "s3://bucket", RemoteConfig(cache_bytes=cache_bytes, **options)
    return f"{request.getfixturevalue('http').url}/bucket", RemoteConfig(cache_bytes=cache_bytes, **QUICK)


def same(here, there) -> bool:
    if isinstance(here, (tuple, list)):
        return len(here) == len(there) and all(map(same, here, there))
    if isinstance(here, Ragged) or hasattr(here, "offsets"):
        return same(here.values, there.values) and same(here.offsets, there.offsets)
    return here.dtype == there.dtype and bool((np.asarray(here) == np.asarray(there)).all())


@contextlib.contextmanager
def pair_of(kind: str, local: Path, url: str, remote: RemoteConfig, **settings):
    """The same source from the directory and from the store."""
    plugin, config = (TOKENS, TokensConfig) if kind == "tokens" else (ARRAYS, ArraysConfig)
    extra = {"seq_len": 64} if kind == "tokens" else {}
    here = plugin.open(config(path=str(local / kind), **extra), "train")
    there = plugin.open(config(path=f"{url}/{kind}", remote=remote, **extra, **settings), "train")
    try:
        yield here, there
    finally:
        there._dataset.close()


@pytest.mark.slow
@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("kind", ["tokens", "arrays"])
@pytest.mark.parametrize("where", ["s3", "http"])
def test_what_is_read_from_a_store_is_what_is_in_the_directory(where, kind, cache, local, request):
    with pair_of(kind, local, *remote_of(where, request, CACHES[cache])) as (here, there):
        assert here.digest == there.digest and len(here) == len(there)
        random = np.random.default_rng(2)
        for step in range(4):
            index = random.integers(0, len(here), 30)
            if step % 2:
                there.prefetch(index)
            if step == 3:  # something else than what was announced
                there.prefetch(index[:5])
                assert same(here.__getitems__(index[::-1]), there.__getitems__(index[::-1]))
            memory = there.batch_buffers(40)
            assert same(here.__getitems__(index), there.__getitems__(index, out=memory))
        assert same(here.__getitems__(np.arange(len(here))), there.__getitems__(np.arange(len(here))))
        assert here.locate(7).split(" of ")[0] == there.locate(7).split(" of ")[0]
        with pytest.raises(IndexError):
            there.__getitems__([len(here)])
        if kind == "tokens":
            assert here.text() == there.text()
        else:
            assert np.array_equal(here.lengths, there.lengths)


READERS = [{"num_workers": 0}, {"num_workers": 1, "workers": "threads"}, {"num_workers": 2, "workers": "processes"}]


@pytest.mark.slow
@pytest.mark.parametrize("cache", list(CACHES))
@pytest.mark.parametrize("kind", ["tokens", "arrays"])
def test_steps_of_a_store_are_those_of_the_directory(kind, cache, local, request):
    url, remote = remote_of("http", request, CACHES[cache])
    with pair_of(kind, local, url, remote) as (here, there):
        expected = list(Loader(here, global_batch=12, microbatch=4, num_steps=10, order="sequential"))
        for reader in READERS:
            with Loader(there, global_batch=12, microbatch=4, num_steps=10, order="sequential", **reader) as loader:
                assert same(expected, list(loader))
        with Loader(there, global_batch=12, microbatch=4, num_steps=10, order="sequential") as loader:
            next(loader), next(loader)
            loader.seek(7)
            assert same(expected[7], next(loader))
            there.__getitems__([3])  # in between
            assert same(expected[8], next(loader))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokens", "arrays"])
@pytest.mark.parametrize("order", ["shuffle", "blocks"])
def test_direct_reading_gives_the_steps_of_mapped_reading(kind, order, local):
    plugin, config = (TOKENS, TokensConfig) if kind == "tokens" else (ARRAYS, ArraysConfig)
    extra = {"seq_len": 64} if kind == "tokens" else {}
    mapped, direct = (
        plugin.open(config(path=str(local / kind), reading=how, **extra), "train") for how in ("mapped", "direct")
    )
    assert direct.batches_ahead == 4 and mapped.batches_ahead == 0
    expected = list(Loader(mapped, global_batch=20, microbatch=5, num_steps=8, order=order))
    for reader in READERS:
        with Loader(direct, global_batch=20, microbatch=5, num_steps=8, order=order, **reader) as loader:
            assert same(expected, list(loader))
    with Loader(direct, global_batch=20, microbatch=5, num_steps=8, order=order) as loader:
        for step in (0, 1, 5, 2, 3):
            loader.seek(step)
            assert same(expected[step], next(loader))
            direct.__getitems__([1, 2])
    assert same(list(evaluation_batches(mapped, batch=50)), list(evaluation_batches(direct, batch=50)))


def test_direct_reading_goes_on_ahead_after_something_unannounced(local):
    source = ARRAYS.open(ArraysConfig(path=str(local / "arrays"), reading="direct"), "train")
    batches = [np.arange(10 * i, 10 * i + 10) for i in range(4)]
    for batch in batches:
        source.prefetch(batch)
    announced = source._data._reader.statistics()["announced"]
    source.__getitems__([599])
    assert source._data._reader.statistics()["announced"] == announced > 4
    for batch in batches:
        source.__getitems__(batch)
    assert source._data._reader.statistics()["announced"] == 0


def test_a_mixture_of_stores_and_directories_reads_ahead(local, request):
    url, remote = remote_of("http", request)
    parts = [ArraysPart(path=f"{url}/arrays", remote=remote, weight=2.0),
             ArraysPart(path=str(local / "arrays"), weight=1.0)]  # fmt: skip
    here = MIXTURE.open(MixtureConfig(parts=tuple(ArraysPart(path=str(local / "arrays"), weight=p.weight)
                                                  for p in parts)), "train")  # fmt: skip
    there = MIXTURE.open(MixtureConfig(parts=tuple(parts)), "train")
    assert there.batches_ahead > 0
    expected = list(Loader(here, global_batch=12, num_steps=5))
    for reader in READERS:
        with Loader(there, global_batch=12, num_steps=5, **reader) as loader:
            assert same(expected, list(loader))
    there.sources[0]._dataset.close()


def spoiled(objects: dict[str, bytes], name: str, at: int) -> dict[str, bytes]:
    data = bytearray(objects[name])
    data[at] ^= 8
    return {**objects, name: bytes(data)}


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["cached", "no cache"])
@pytest.mark.parametrize("field", [0, 2, 3])
def test_a_byte_that_is_wrong_in_the_store_names_object_and_block(field, cache, http, local, request, tmp_path):
    for number in (0, 1) if field else (0,):  # offsets, then values
        url, remote = remote_of("http", request, CACHES[cache])
        remote = replace(remote, cache_dir=str(tmp_path / f"cache {number}"))
        with pair_of("arrays", local, url, remote) as (here, there):
            shard, row = there._data.shards[1], int(there._data.bounds[1])
            at = shard.buffers[there._data._first[field] + number][0] + 9
            http.objects = spoiled(objects_of(local), f"bucket/arrays/{shard.file}", at)
            with pytest.raises(CorruptDataError, match=rf"{shard.file}: block 0 of '.*' .*fetched twice; upload"):
                there.__getitems__(np.arange(row, row + 20))
            http.objects = objects_of(local)
            assert same(here.__getitems__([row, 1]), there.__getitems__([row, 1]))


@pytest.mark.parametrize("cache", ["cached", "no cache"])
@pytest.mark.parametrize("kind", ["tokens", "arrays"])
def test_a_bit_that_flips_on_the_way_once_does_no_harm(kind, cache, http, local, request):
    url, remote = remote_of("http", request, CACHES[cache])
    with pair_of(kind, local, url, remote) as (here, there):
        index = np.arange(0, len(here), 7)
        for _ in range(3):  # checksums, offsets, values
            http.fail("flipped", times=1)
            assert same(here.__getitems__(index), there.__getitems__(index))
        http.fail("flipped", times=1)


@pytest.mark.slow
def test_a_shard_that_is_missing_or_short_is_an_error_when_it_is_read(http, local, request):
    url, remote = remote_of("http", request)
    objects = objects_of(local)
    shard = open_dataset(local / "arrays").split("train").shards[2].file
    for broken in ({k: v for k, v in objects.items() if shard not in k},
                   {**objects, f"bucket/arrays/{shard}": objects[f"bucket/arrays/{shard}"][:-5000]}):  # fmt: skip
        http.objects = broken
        with pair_of("arrays", local, url, remote) as (here, there):
            row = int(there._data.bounds[2])
            assert same(here.__getitems__([0, 1]), there.__getitems__([0, 1]))
            with pytest.raises(RemoteError, match=rf"{shard}.*What to do"):
                there.__getitems__(np.arange(row, int(there._data.bounds[3])))
            assert same(here.__getitems__([0, 1]), there.__getitems__([0, 1]))
        with pytest.raises(CorruptDataError, match=shard):
            verify_dataset(f"{url}/arrays", remote=remote)


def test_a_manifest_that_is_damaged_or_missing_is_an_error_at_open(http, local, request):
    url, remote = remote_of("http", request)
    objects = objects_of(local)
    name = "bucket/arrays/manifest.json"
    http.objects = {**objects, name: objects[name][: len(objects[name]) // 2]}
    with pytest.raises(CorruptDataError, match=r"manifest\.json is damaged"):
        open_dataset(f"{url}/arrays", remote=remote)
    http.objects = {}
    with pytest.raises(RemoteError, match=r"arrays/manifest\.json"):
        open_dataset(f"{url}/arrays", remote=remote)
    http.objects = {**objects, "bucket/tokens/tokenizer.json": b"{}"}
    with pytest.raises(CorruptDataError, match=r"tokenizer\.json differs"):
        open_dataset(f"{url}/tokens", remote=remote).tokenizer()


def with_manifest(objects: dict[str, bytes], change) -> dict[str, bytes]:
    """The objects with a manifest that was changed and has the digest of what it says."""
    name = "bucket/tokens/manifest.json"
    table = json.loads(objects[name])
    change(table)
    del table["digest"]
    return {**objects, name: json.dumps({**table, "digest": digest(to_json(table))}).encode()}


def rename_shard(to: str):
    return lambda table: table["splits"]["train"]["shards"][0].update(file=to)


EVIL = ["../arrays/secret.arrow", "/etc/passwd", "http://elsewhere/x.arrow", "..", ".hidden", "a/../../b", "a\0b"]


@pytest.mark.parametrize("name", EVIL)
def test_a_manifest_that_names_files_elsewhere_is_refused_and_asks_for_none(name, http, local, request):
    url, remote = remote_of("http", request)
    http.addresses.clear()
    for change in (
        rename_shard(name),
        lambda table: table["tokenizer"].update(file=name),
        lambda table: table["splits"].update({name: table["splits"].pop("train")}),
    ):
        http.objects = with_manifest(objects_of(local), change)
        with pytest.raises(CorruptDataError, match=r"manifest\.json is not usable: .* is no file name"):
            open_dataset(f"{url}/tokens", remote=remote)
    assert {asked.split("?")[0].strip() for asked in http.addresses} == {"/bucket/tokens/manifest.json"}


@pytest.mark.parametrize("name", ["a?x=y", "a#b", "a\\b", "a%2Fb", "train 0.arrow"])
def test_a_shard_of_an_odd_name_is_read_or_refused_but_never_another_file(name, http, local, request):
    url, remote = remote_of("http", request, 0)
    http.objects = with_manifest(objects_of(local), rename_shard(name))
    dataset = open_dataset(f"{url}/tokens", remote=remote)
    http.addresses.clear()
    with pytest.raises((RemoteError, UsageError), match=r"given up at once|is no key below"):
        dataset.data("train").windows([0], 20)
    dataset.close()
    assert all("/bucket/tokens/" in asked and "/../" not in asked for asked in http.addresses)


def with_rows(rows: int):
    def change(table):
        split = table["splits"]["train"]
        shard = split["shards"][0]
        split["rows"] += rows - shard["rows"]
        (offset, _), shard["rows"] = shard["buffers"][0], rows
        shard["buffers"], shard["bytes"] = [[offset, rows]], rows + offset + 64

    return change


@pytest.mark.parametrize("rows", [10**12, 1 << 49])
def test_a_manifest_of_sizes_that_cannot_be_ends_at_once(rows, http, local, request):
    url, remote = remote_of("http", request)
    http.objects = with_manifest(objects_of(local), with_rows(rows))
    with contextlib.closing(open_dataset(f"{url}/tokens", remote=remote)) as dataset:
        with pytest.raises(DatasetError, match=r"train\.sums.*(do not trust the manifest|given up)"):
            dataset.data("train").windows([0], 20)
    with pytest.raises(CorruptDataError, match=r"train-00000\.arrow has .* were written"):
        verify_dataset(f"{url}/tokens", remote=remote)
    http.objects = with_manifest(objects_of(local), with_rows(1 << 60))
    with pytest.raises(CorruptDataError, match="1152921504606846976 rows"):
        open_dataset(f"{url}/tokens", remote=remote)


@pytest.mark.parametrize("cache", ["cached", "no cache"])
def test_a_dataset_replaced_while_it_is_read_gives_its_own_bytes_or_an_error(cache, http, local, request, tmp_path):
    url, remote = remote_of("http", request, CACHES[cache])
    tokens = (np.arange(60_000) % 250).astype(np.uint8)
    with DatasetWriter(tmp_path / "tokens", kind="tokens", fields=[Field("tokens", "uint8")],
                       shard_bytes=13_000) as writer:  # fmt: skip
        for split, part in (("train", tokens[:50_000]), ("validation", tokens[50_000:])):
            writer.append(split, [part], source_bytes=len(part))
        writer.add_file("tokenizer.json", ByteTokenizer().dumps())
        writer.finish(tokenizer=tokenizer_entry(ByteTokenizer()))
    here, there = open_dataset(local / "tokens").data("train"), open_dataset(f"{url}/tokens", remote=remote)
    data, start = there.data("train"), there.split("train").shards[0].rows
    assert same(here.windows([5], 30), data.windows([5], 30))  # the checksums of the first shard are here
    http.etag, http.objects = "2", objects_of(tmp_path)
    for at in (9_000, start + 9_000):
        try:
            assert same(here.windows([at], 30), data.windows([at], 30))  # was fetched before
        except CorruptDataError as error:
            assert "fetched twice; upload" in str(error)
        else:
            assert cache == "cached" and at < start
    there.close()
    with contextlib.closing(open_dataset(f"{url}/tokens", remote=remote)) as new:
        assert same(new.data("train").windows([5], 30, wide=False), tokens[None, 5:35])


@pytest.mark.parametrize("fault", ["whole", "shifted", "unlabelled", "compressed"])
def test_answers_that_do_not_fit_the_question_are_errors(fault, http, local, request):
    url, remote = remote_of("http", request, 0)
    dataset = open_dataset(f"{url}/tokens", remote=replace(remote, stall_s=5.0))
    http.fail(fault, times=None)
    with pytest.raises(RemoteError, match=r"given up after 2 tries"):
        dataset.data("train").windows([0], 20)
    http.heal()
    assert same(open_dataset(local / "tokens").data("train").windows([0], 20), dataset.data("train").windows([0], 20))
    http.fail("compressed", times=None)
    with pytest.raises(RemoteError, match="sent it compressed"):
        open_dataset(f"{url}/tokens", remote=remote)
    dataset.close()


def test_one_dataset_with_two_sizes_of_its_cache_in_one_process(local, request):
    url, remote = remote_of("http", request, bytes_of_cache(4))
    other = replace(remote, cache_bytes=bytes_of_cache(2))
    first, same_size, second = (open_dataset(f"{url}/arrays", remote=r) for r in (remote, remote, other))
    expected = open_dataset(local / "arrays").data("train").rows(0, [3, 500])
    assert same(expected, first.data("train").rows(0, [3, 500]))
    assert same(expected, same_size.data("train").rows(0, [3, 500]))
    with pytest.raises(CacheError, match=r"in use with 4 blocks .*same cache_bytes.*data\.remote\.cache_dir"):
        second.data("train")
    first.close()
    same_size.close()
    assert same(expected, second.data("train").rows(0, [3, 500]))
    second.close()


def test_closing_a_dataset_ends_what_it_fetches_ahead(http, local, request):
    url, remote = remote_of("http", request)
    http.latency_s = 0.05
    try:
        dataset = open_dataset(f"{url}/arrays", remote=remote)
        data = dataset.data("train")
        data.rows(0, [1])
        data._reader._most_ahead = 1  # so that most of it still waits
        for at in range(0, ROWS, 50):
            data.prefetch(np.arange(at, at + 50))
        store = data._reader._store
        dataset.close()
        assert store._helper is None and not data._reader._wanted
    finally:
        http.latency_s = 0.0


def test_inspect_takes_the_settings_of_remote(s3, http, local, tmp_path, cli):
    way = [f"endpoint={s3}", "options.region=us-east-1"]
    said = cli("inspect", "s3://bucket/tokens", *way, "--verify", "--json")
    assert said.code == 0 and json.loads(said.out)["holds"] == "tokens"
    assert cli("inspect", "s3://bucket/arrays", *way, "--export", "parquet", "--to", str(tmp_path / "out")).code == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["train.parquet", "validation.parquet"]
    address = f"{http.url}/bucket/tokens"
    for given, told in (
        (["endpont=x"], "endpont: no such setting; did you mean 'endpoint'?"),
        (["max_tries=0"], "max_tries: 0 given"),
        (["endpoint"], "'endpoint' is not of the form key=value"),
        (["options.secret_access_key=hush"], "a credential does not belong into settings"),
        (["query_env=NOT_THERE"], "environment variable NOT_THERE is not set"),
    ):
        said = cli("inspect", address, *given)
        assert said.code == 2 and told in said.err and "hush" not in said.err
    said = cli("inspect", str(local / "tokens"), "anonymous=true")
    assert said.code == 2 and "'anonymous=true' given, which is how an address is reached" in said.err
    with pytest.warns(UserWarning, match="cache_bytes and cache_dir have no effect on inspect"):
        inspect(address, remote=RemoteConfig(cache_bytes=5))


@pytest.mark.slow
def test_inspect_describes_and_verifies_an_address(http, s3, local, monkeypatch, cli):
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    for kind in ("tokens", "arrays"):
        here, there = inspect(local / kind), inspect(f"s3://bucket/{kind}", verify=True)
        for facts in (here, there):
            facts.pop("path"), facts.pop("verified")
        assert here == there
    assert verify_dataset("s3://bucket/arrays") == open_dataset(local / "arrays").manifest.bytes
    said = cli("inspect", "s3://bucket/tokens", "--json")
    assert said.code == 0 and json.loads(said.out)["holds"] == "tokens"
    said = cli("inspect", f"{http.url}/bucket/nothing")
    assert said.code == 1 and "nothing/manifest.json" in said.err
    shard = open_dataset(local / "tokens").split("train").shards[1]
    http.objects = spoiled(objects_of(local), f"bucket/tokens/{shard.file}", shard.buffers[0][0] + 5000)
    said = cli("inspect", f"{http.url}/bucket/tokens", "--verify")
    assert said.code == 1 and f"{shard.file}: block 1 " in said.err


def test_export_of_an_address(http, local, tmp_path, cli):
    assert cli("inspect", f"{http.url}/bucket/arrays", "--export", "parquet", "--to", str(tmp_path / "out")).code == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["train.parquet", "validation.parquet"]
    assert "--to" in cli("inspect", f"{http.url}/bucket/arrays", "--export", "parquet").err


def test_pack_to_an_address_says_what_to_do(tmp_path):
    with pytest.raises(UsageError, match=r"pack to a folder, then upload"):
        pack(np.arange(4), "s3://bucket/new")


def test_settings_without_effect_warn_and_secrets_are_refused(local, request):
    url, remote = remote_of("http", request)
    with pytest.warns(UserWarning, match=r"data\.remote has no effect on"):
        open_dataset(local / "tokens", remote=remote)
    with pytest.warns(UserWarning, match=r"data\.reading = 'mapped' has no effect on http"):
        open_dataset(f"{url}/tokens", "mapped", remote).close()
    with pytest.raises(ConfigError, match=r"secret_access_key: a credential does not belong into settings"):
        open_dataset(f"{url}/tokens", remote=RemoteConfig(options={"secret_access_key": "s"}))
    with pytest.raises(UsageError, match="no address of a store"):
        open_dataset("ftp://somewhere/tokens")


def test_shapes_and_kinds_at_an_address(local, request):
    url, remote = remote_of("s3", request)
    assert TOKENS.shape(TokensConfig(path=f"{url}/tokens", seq_len=64, remote=remote)) == {
        "seq_len": 64, "vocab_size": 256,
    }  # fmt: skip
    assert ARRAYS.shape(ArraysConfig(path=f"{url}/arrays", remote=remote)) == {}
    with pytest.raises(DatasetError, match="holds tokens, not arrays"):
        ARRAYS.shape(ArraysConfig(path=f"{url}/tokens", remote=remote))


def test_an_order_that_does_not_go_with_the_cache_warns(local, request, tmp_path):
    url, remote = remote_of("http", request, CACHES["tiny cache"])
    with pair_of("arrays", local, url, remote) as (_, there):
        there._data._reader._block_bytes = 4096  # or nothing so small would be more than a cache
        with pytest.warns(UserWarning, match=r'"shuffle" about .* of the samples .* loader.order = "blocks"'):
            source_order(there, 8, order="shuffle")
        assert there.samples_ahead == 0
        with pytest.warns(UserWarning, match=r"less than two windows"):
            source_order(there, 8, order="blocks", block_samples=64, window_blocks=4)
        assert there.samples_ahead == 2 * 64 * 4
    url, remote = remote_of("http", request)
    large = replace(remote, cache_dir=str(tmp_path / "large"))
    with pair_of("arrays", local, url, large) as (_, there), warnings.catch_warnings():
        warnings.simplefilter("error")
        source_order(there, 8, order="shuffle")


def test_the_cache_is_what_fits_on_the_disk(local, request, monkeypatch):
    url, remote = remote_of("http", request)
    free = shutil.disk_usage("/")._replace(free=5 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.warns(UserWarning, match=r"cache_bytes \(1073741824\): .* has room for"):
        with pair_of("arrays", local, url, remote) as (here, there):
            assert there._data._reader.cache_bytes < 5 << 20
            assert same(here.__getitems__(np.arange(ROWS)), there.__getitems__(np.arange(ROWS)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=3 << 20))
    with pytest.warns(UserWarning, match="has room for"):  # taken as it is
        with pair_of("arrays", local, url, remote) as (here, there):
            assert same(here.__getitems__([5]), there.__getitems__([5]))


RECIPE = """
name = "{name}"
num_steps = 20
global_batch = 8
[model]
kind = "transformer"
num_layers = 1
hidden_size = 16
num_heads = 2
[data]
kind = "tokens"
path = "{path}"
seq_len = 64
[data.remote]
endpoint = "{endpoint}"
options = {{ region = "us-east-1" }}
[loader]
order = "blocks"
num_workers = 1
[schedule]
kind = "constant"
warmup_steps = 2
[evaluation]
max_samples = 16
[checkpoint]
every = 10
every_s = 0
[logging]
limit_s = 0
[launch]
threads = 1
"""


def losses_of(folder: Path) -> dict[int, float]:
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if record["type"] == "step"}


def test_a_run_writes_down_no_query(local, http, tmp_path, monkeypatch):
    from turbopump.train import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DATASET_QUERY", "sv=2021-12-02&sr=c&sig=5ec2e75ec2e7%3D")
    text = RECIPE.format(name="signed", path=f"{http.url}/bucket/tokens", endpoint="")
    text = text.replace('endpoint = ""\noptions = { region = "us-east-1" }', 'query_env = "DATASET_QUERY"')
    Path("signed.toml").write_text(text.replace("[logging]", '[logging]\nloggers = ["tensorboard"]'))
    http.addresses.clear()
    train("signed.toml", overrides=["num_steps=4", "checkpoint.every=2"], quiet=True)
    assert all("sig=5ec2e75ec2e7%3D" in asked for asked in http.addresses) and len(http.addresses) > 3
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(written) > 8 and not any(b"5ec2e75ec2e7" in file.read_bytes() for file in written)


@pytest.mark.slow
def test_training_from_a_store_is_training_from_the_directory(local, s3, tmp_path, monkeypatch):
    from turbopump.train import train

    monkeypatch.chdir(tmp_path)
    recipes = {"here": (local / "tokens", ""), "there": ("s3://bucket/tokens", s3)}
    for name, (path, endpoint) in recipes.items():
        text = RECIPE.format(name=name, path=path, endpoint=endpoint)
        if not endpoint:
            text = text[: text.index("[data.remote]")] + text[text.index("[loader]") :]
        Path(f"{name}.toml").write_text(text)
    train("here.toml", quiet=True)
    train("there.toml", overrides=["num_steps=10"], quiet=True)
    train("there.toml", overrides=["data.remote.cache_bytes=0"], quiet=True)  # goes on, without a cache now
    here, there = losses_of(Path("runs/here")), losses_of(Path("runs/there"))
    assert len(here) == 20 and here == {**there}
