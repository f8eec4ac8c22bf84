"""Datasets in Azure and Google Cloud Storage: servers of their interfaces on loopback, every way to be let in."""

import json
import os
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from moto.server import ThreadedMotoServer

from tests.azurite import ACCOUNT, Azurite, find_azurite
from tests.data.test_remote_dataset import objects_of, pair_of, same, write_arrays, write_tokens
from tests.processes import PATIENCE_S
from turbopump.core.errors import RemoteError, UsageError
from turbopump.data import block_cache
from turbopump.data.format import open_dataset, verify_dataset
from turbopump.data.remote_files import RemoteConfig
from turbopump.data.stores import open_store

QUICK = {"request_s": 10, "retry_s": 10, "max_tries": 2}


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clouds")
    write_arrays(folder / "arrays")
    write_tokens(folder / "tokens")
    return folder


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AZURE_", "GOOGLE_", "AWS_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    yield
    for table in block_cache._attached.values():
        os.close(table.lock)
        os.close(table.blocks)
    block_cache._attached.clear()


@pytest.fixture(scope="module")
def azurite(local, tmp_path_factory):
    program = find_azurite()
    if program is None:
        pytest.skip("Azure's emulator is not installed: npm install --prefix build/azurite azurite")
    with Azurite(program, tmp_path_factory.mktemp("azurite")) as server:
        for container in ("bucket", "public"):
            objects = {name.removeprefix("bucket/"): data for name, data in objects_of(local).items()}
            server.upload(container, objects, public=container == "public")
        yield server


@pytest.fixture(scope="module")
def google(local):
    """moto's S3 server: the XML interface that obstore asks Google for is that of S3, but for the signature.

    All such servers of a process hold the same buckets: these have names of their own.
    """
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    for bucket, access in (("gsprivate", "private"), ("gspublic", "public-read")):
        kind = {"Content-Type": "application/octet-stream", "x-amz-acl": access}
        objects = {name.removeprefix("bucket"): data for name, data in objects_of(local).items()}
        for path, body in [("", b""), *objects.items()]:
            urlopen(Request(f"{url}/{bucket}{path}", body, kind, method="PUT"), timeout=PATIENCE_S).close()
    yield url
    server.stop()


class TokenHandler(BaseHTTPRequestHandler):
    """Gives a token to whoever brings a signed claim, as Google's does."""

    def do_POST(self) -> None:
        claim = self.rfile.read(int(self.headers["Content-Length"]))
        body = json.dumps({"access_token": "let-me-in", "token_type": "Bearer", "expires_in": 3600}).encode()
        self.send_response(200 if b"assertion=" in claim else 400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def service_account(tmp_path_factory):
    """The file of a Google service account, whose tokens come from a server here."""
    server = HTTPServer(("127.0.0.1", 0), TokenHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = tmp_path_factory.mktemp("account") / "account.json"
    file.write_text(json.dumps({
        "type": "service_account", "client_email": "trainer@example.com", "private_key_id": "1",
        "private_key": key.decode(), "token_uri": f"http://127.0.0.1:{server.server_address[1]}/token",
    }))  # fmt: skip
    yield file
    server.shutdown()
    server.server_close()


def way_of(how: str, request, monkeypatch) -> tuple[str, RemoteConfig]:
    """The address of the datasets' folder, and how it is reached; secrets go into the environment."""
    cloud, _, key = how.partition(" ")
    if cloud == "google":
        remote = RemoteConfig(endpoint=request.getfixturevalue("google"), anonymous=key == "anonymous", **QUICK)
        if key == "account":
            monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT", str(request.getfixturevalue("service_account")))
        return "gs://gspublic" if remote.anonymous else "gs://gsprivate", remote
    azurite = request.getfixturevalue("azurite")
    remote = RemoteConfig(endpoint=azurite.url, options={"account_name": ACCOUNT}, **QUICK)
    if key == "key":
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", azurite.key)
    elif key == "anonymous":
        return "az://public", replace(remote, anonymous=True)
    elif key == "token":
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", azurite.token("bucket"))
    else:
        monkeypatch.setenv("DATASET_QUERY", "?" + azurite.token("bucket"))
        remote = replace(remote, query_env="DATASET_QUERY")
    if key == "query over http":
        return f"{azurite.url}/bucket", RemoteConfig(query_env="DATASET_QUERY", **QUICK)
    return "az://bucket", remote


WAYS = ["google account", "google anonymous", "azure key", "azure anonymous", "azure token", "azure query",
        "azure query over http"]  # fmt: skip


@pytest.mark.parametrize("how", WAYS)
def test_what_is_read_from_a_cloud_is_what_is_in_the_directory(how, local, request, monkeypatch):
    url, remote = way_of(how, request, monkeypatch)
    for kind, cache_bytes in (("tokens", 1 << 30), ("arrays", 0)):
        with pair_of(kind, local, url, replace(remote, cache_bytes=cache_bytes)) as (here, there):
            for seed in range(3):
                index = np.random.default_rng(seed).integers(0, len(here), 30)
                if seed:
                    there.prefetch(index)
                assert same(here.__getitems__(index), there.__getitems__(index))
        assert verify_dataset(f"{url}/{kind}", remote=remote) == open_dataset(local / kind).manifest.bytes
    with pytest.raises(RemoteError, match=r"nothing/manifest\.json: given up"):
        open_dataset(f"{url}/nothing", remote=remote)


@pytest.mark.parametrize("how", ["google account", "azure key", "azure query"])
def test_a_cloud_lists_and_measures(how, local, request, monkeypatch):
    url, remote = way_of(how, request, monkeypatch)
    query = os.environ.get("DATASET_QUERY", "").lstrip("?")
    store = open_store(f"{url}/tokens", endpoint=remote.endpoint, query=query, **remote.options)
    files = {file.name: file.stat().st_size for file in (local / "tokens").iterdir()}
    assert dict(store.list()) == files
    assert store.size("manifest.json") == files["manifest.json"]
    assert store.get_range("manifest.json", 5, 9) == (local / "tokens" / "manifest.json").read_bytes()[5:9]
    store.close()


@pytest.mark.parametrize("how", ["google anonymous", "azure key", "azure query"])
def test_inspect_takes_the_settings_of_remote(how, local, request, monkeypatch, cli):
    url, remote = way_of(how, request, monkeypatch)
    given = [f"endpoint={remote.endpoint}", *(f"options.{name}={value}" for name, value in remote.options.items())]
    given += ["anonymous=true"] * remote.anonymous + [f"query_env={remote.query_env}"] * bool(remote.query_env)
    said = cli("inspect", f"{url}/tokens", *given, "--verify", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["rows"] == open_dataset(local / "tokens").manifest.rows


def test_who_is_not_let_in_is_told_without_the_secret(azurite, monkeypatch):
    remote = RemoteConfig(endpoint=azurite.url, options={"account_name": ACCOUNT}, query_env="DATASET_QUERY", **QUICK)
    over, other = azurite.token("bucket", until="2020-01-01T00:00:00Z"), azurite.token("public")
    for query in (over, other, over.replace("sig=", "sig=A")):
        monkeypatch.setenv("DATASET_QUERY", query)
        over_http = f"{azurite.url}/bucket/tokens", RemoteConfig(query_env="DATASET_QUERY", **QUICK)
        for url, how in (("az://bucket/tokens", remote), over_http):
            with pytest.raises(RemoteError, match=r"given up at once: .*40[13].*permissions") as caught:
                open_dataset(url, remote=how)
            assert "sig=" not in str(caught.value).replace("sig=***", "") and query not in str(caught.value)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", azurite.key)
    with pytest.raises(UsageError, match="AZURE_STORAGE_ACCOUNT_KEY is set too"):
        open_dataset("az://bucket/tokens", remote=remote)


def test_no_files_of_a_cache_hold_a_query(azurite, tmp_path, monkeypatch):
    monkeypatch.setenv("DATASET_QUERY", azurite.token("bucket"))
    remote = RemoteConfig(query_env="DATASET_QUERY", cache_dir=str(tmp_path / "cache"), **QUICK)
    dataset = open_dataset(f"{azurite.url}/bucket/arrays", remote=remote)
    dataset.data("train").rows(0, [1, 2, 3])
    dataset.close()
    signature = azurite.token("bucket").partition("sig=")[2]
    files = [file for file in Path(tmp_path).rglob("*") if file.is_file()]
    assert files and not any(signature in str(file) or signature.encode() in file.read_bytes() for file in files)
