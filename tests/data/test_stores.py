"""Stores: real S3 on loopback, every fault a server can show, forks, keys that must not pass."""

import os
import signal
import socket
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from moto.server import ThreadedMotoServer

from tests.processes import PATIENCE_S, wait_until
from tests.range_server import RangeServer
from turbopump.core.errors import RemoteError, UsageError
from turbopump.data.stores import Store, check_key, open_store

DATA = bytes(range(256)) * 400
LIMITS = {"request_s": 5, "stall_s": 0.3, "retry_s": 20, "first_delay_s": 0.01, "max_tries": 4}


@pytest.fixture(scope="module")
def server():
    with RangeServer({"bucket/set/a.bin": DATA}) as running:
        yield running


OPTIONS = {"s3": {"region": "us-east-1"}, "gs": {}, "az": {"account_name": "account"}}


@pytest.fixture(params=["http", "s3", "gs", "az"])
def store(server, request):
    server.heal()
    if request.param == "http":
        opened = open_store(f"{server.url}/bucket/set", limits=LIMITS)
    else:
        options = {"endpoint": server.url, "anonymous": True, **OPTIONS[request.param]}
        opened = open_store(f"{request.param}://bucket/set", limits=LIMITS, **options)
    yield opened
    opened.close()
    server.heal()


def test_whole_objects_sizes_and_ranges(store):
    assert store.get("a.bin") == DATA
    assert store.size("a.bin") == len(DATA)
    assert store.get_range("a.bin", 1000, 1003) == DATA[1000:1003]
    store.fetch("a.bin", 10, 300, at=64).result()
    assert store.memory[64 : 64 + 290] == DATA[10:300]


TRANSIENT = ["error 500", "slow down 503", "too many 429", "truncated", "short", "whole", "stalled", "shifted",
             "unlabelled", "compressed"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("fault", TRANSIENT)
def test_what_passes_is_tried_again_and_the_bytes_are_right(store, server, fault):
    server.fail(fault, times=2)
    assert store.get_range("a.bin", 1000, 13288) == DATA[1000:13288]
    assert store.statistics["retries"] == 2
    assert store.statistics["throttled"] == (2 if fault in ("slow down 503", "too many 429") else 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["error 500", "slow down 503", "truncated", "short", "whole", "shifted", "compressed"]
)
def test_what_stays_is_an_error_that_says_what_was_asked_and_answered(store, server, fault):
    server.fail(fault, times=None)
    with pytest.raises(RemoteError, match=r"a\.bin, bytes 1000\.\.13288: given up after 4 tries: .*What to do"):
        store.get_range("a.bin", 1000, 13288)
    server.heal()
    assert store.get_range("a.bin", 1000, 1003) == DATA[1000:1003]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["missing 404", "denied 403"])
def test_what_will_not_change_is_not_asked_twice(store, server, fault):
    server.fail(fault, times=None)
    with pytest.raises(RemoteError, match="given up at once"):
        store.get("a.bin")
    assert store.statistics["retries"] == 0


def test_a_whole_object_that_is_cut_short_is_asked_again(store, server):
    server.fail("truncated")
    assert store.get("a.bin") == DATA


def test_a_whole_object_that_comes_compressed_is_an_error_that_says_so(store, server):
    server.fail("compressed", times=None)
    with pytest.raises(RemoteError, match="given up at once: the server sent it compressed"):
        store.get("a.bin")


def test_a_redirect_is_followed_where_there_is_no_secret(store, server):
    with RangeServer({"bucket/set/a.bin": DATA}) as other:
        server.elsewhere = other.url
        server.fail("redirected", times=2)
        assert store.get("a.bin") == DATA and store.get_range("a.bin", 5, 90) == DATA[5:90]
        assert len(other.addresses) == 2


QUERY = "sv=2023-11-03&sr=c&sig=aB%2Bc%2F9d8e7f6%3D"


def test_a_query_goes_with_every_request_and_never_to_another_host(server):
    server.heal()
    server.addresses.clear()
    store = open_store(f"{server.url}/bucket/set".replace("127.0.0.1", "localhost"), query=QUERY, limits=LIMITS)
    assert store.get("a.bin") == DATA and store.size("a.bin") == len(DATA)
    assert store.get_range("a.bin", 5, 90) == DATA[5:90]
    assert server.addresses == [f"/bucket/set/a.bin?{QUERY} "] * 3
    with RangeServer({"bucket/set/a.bin": DATA}) as other:
        server.elsewhere = other.url
        server.fail("redirected", times=None)
        for ask in (store.get, lambda key: store.get_range(key, 5, 90)):
            with pytest.raises(RemoteError, match="redirects to another one, which is not followed") as caught:
                ask("a.bin")
            assert "a.bin?***" in str(caught.value) and "aB" not in str(caught.value)
        assert other.addresses == []
    server.heal()
    store.close()


@pytest.mark.parametrize("fault", ["error 500", "denied 403", "whole", "short", "truncated"])
def test_no_error_holds_a_query(server, fault):
    store = open_store(f"{server.url}/bucket/set", query=QUERY, limits=LIMITS)
    server.fail(fault, times=None)
    with pytest.raises(RemoteError) as caught:
        store.get_range("a.bin", 5, 90)
    server.heal()
    store.close()
    said = str(caught.value)
    assert "given up" in said and not any(secret in said for secret in ("aB%2B", "aB+c", "9d8e", "2023-11-03"))


def test_a_query_is_not_read_through_a_proxy(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with pytest.raises(UsageError, match=r"not read through a proxy.*add 127\.0\.0\.1 to NO_PROXY"):
        open_store(f"{server.url}/bucket", query=QUERY)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    store = open_store(f"{server.url}/bucket/set", query=QUERY, limits=LIMITS)
    assert store.get("a.bin") == DATA
    store.close()


def test_a_store_used_before_fork_serves_the_child_too(store):
    assert store.get_range("a.bin", 0, 5) == DATA[:5]
    child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE_S))
        os._exit(0 if store.get_range("a.bin", 5, 10) == DATA[5:10] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.get_range("a.bin", 10, 15) == DATA[10:15]


def test_a_helper_that_is_killed_is_replaced(store):
    store.get("a.bin")
    killed = store._helper._process
    killed.kill()
    killed.wait()
    wait_until(lambda: store._helper.dead, "word of the helper's death")
    assert store.get_range("a.bin", 0, 5) == DATA[:5]


def test_the_helper_ends_with_its_process(server):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        opened = open_store(f"{server.url}/bucket/set", limits=LIMITS)
        opened.get("a.bin")
        os.write(write, str(opened._helper._process.pid).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    helper = int(os.read(read, 20))
    wait_until(lambda: not command_of(helper), "the end of the helper")


def command_of(pid: int) -> str:
    """What a helper was started as; empty if there is none of this number (any more)."""
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
    except OSError:
        return ""
    return command if "store_process" in command else ""


def test_an_empty_port_is_a_clear_error():
    with socket.socket() as taken, pytest.raises(RemoteError, match="given up after 2 tries"):
        taken.bind(("127.0.0.1", 0))  # and never listens: nobody else can either
        open_store(f"http://127.0.0.1:{taken.getsockname()[1]}/x", limits={"max_tries": 2}).get("a")


def test_a_directory_is_a_store(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a").write_bytes(DATA)
    store = open_store(f"file://{tmp_path}")
    assert store.get("sub/a") == DATA and store.get_range("sub/a", 3, 9) == DATA[3:9]
    assert store.list() == [("sub/a", len(DATA))]
    with pytest.raises(RemoteError, match="nothing"):
        store.get("nothing")
    store.close()


@pytest.mark.slow
def test_a_real_s3_server(monkeypatch):
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        url = "http://{}:{}".format(*server.get_host_and_port())
        for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("REGION", "us-east-1")):
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        kind = {"Content-Type": "application/octet-stream"}  # else it is taken for a form
        for path, body in [("", b""), *((f"/set/{i}.bin", DATA[i:]) for i in range(3))]:
            urlopen(Request(f"{url}/bucket{path}", body, kind, method="PUT"), timeout=PATIENCE_S).close()
        store = open_store("s3://bucket/set", limits=LIMITS)  # credentials and address from the environment
        assert store.list() == [(f"{i}.bin", len(DATA) - i) for i in range(3)]
        assert store.get("1.bin") == DATA[1:] and store.size("2.bin") == len(DATA) - 2
        assert store.get_range("2.bin", 50_000, 50_100) == DATA[50_002:50_102]
        with pytest.raises(RemoteError, match=r"s3://bucket/set/no\.bin"):
            store.get("no.bin")
        store.close()
    finally:
        server.stop()


@pytest.mark.parametrize("key", ["", "../x", "a/../b", "/a", "a//b", "a\\b", "a\n", "a?b", "a#b", ".", "a/"])
def test_keys_that_leave_their_prefix_are_refused(key):
    with pytest.raises(UsageError, match="no key"):
        check_key("s3://b", key)


def test_wrong_addresses_and_options_are_refused():
    for url in ("ftp://x/y", "bucket", "s3://", "memory:///"):
        with pytest.raises(UsageError, match="no address of a store"):
            open_store(url)
    with pytest.raises(UsageError, match="limits"):
        open_store("s3://b", limits={"nonsense": 1})
    with pytest.raises(UsageError, match="retry_s"):
        open_store("s3://b", limits={"retry_s": -1})
    with pytest.raises(UsageError, match="nonsense"):
        open_store("s3://b", nonsense=1).get("a")
    with pytest.raises(UsageError, match="cannot list"):
        open_store("http://127.0.0.1:9/x").list()
    store: Store = open_store("http://127.0.0.1:9/x")
    with pytest.raises(UsageError, match="no such range"):
        store.get_range("a", 5, 5)
