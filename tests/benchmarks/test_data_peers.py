"""The peers of the benchmark `data`: their records, their stores, their processes; and the bound."""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import data_bound, data_peers
from benchmarks.data_peer_loaders import Job, ShuffledIds, check_batch, read_rate, steady_rate, ways
from benchmarks.data_peer_records import Digest, expected_digest, sample_ids, write_raw
from benchmarks.data_peer_stores import STORES, TOKEN_STORES
from benchmarks.data_peer_worker import Peer, answer

LOCAL = ("Arrow take", "np.memmap")  # stores of packages that are here anyway


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("record_bytes", [6, 100, 2048])
def test_raw_records_carry_their_number_and_come_back_one_by_one(tmp_path, record_bytes, variable):
    raw = write_raw(tmp_path / "raw", record_bytes, 300, variable=variable)
    records = list(raw.records())
    assert [raw.record(number) for number in range(300)] == records and b"".join(records) == raw.values.tobytes()
    shown = min(8, *map(len, records))
    assert [int.from_bytes(record[:shown], "little") for record in records] == list(range(300))
    lengths = {len(record) for record in records}
    assert (lengths != {record_bytes}) == variable
    assert min(lengths) >= record_bytes // 2 and max(lengths) <= 1.5 * record_bytes


def test_ids_follow_a_fixed_rule():
    ids = sample_ids(3, 4, 256, 1000)
    assert ids.shape == (4, 256) and ids.dtype == np.int64 and ids.min() >= 0 and ids.max() < 1000
    assert (ids == sample_ids(3, 4, 256, 1000)).all() and (ids != sample_ids(4, 4, 256, 1000)).any()
    assert (sample_ids(3, 2, 256, 1000) == ids[:2]).all()  # more batches go on where fewer end
    # the generator's published sequence for seed 0 begins with these
    assert sample_ids(0, 1, 2, 2**64 - 1).view(np.uint64).tolist() == [[0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]]


def test_shuffled_ids_take_every_record_once_an_epoch():
    epochs = iter(ShuffledIds(10, 3))
    first, second = (np.concatenate([next(epochs) for _ in range(3)]) for _ in range(2))
    assert len(set(first)) == len(set(second)) == 9 and first.tolist() != second.tolist()


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize("name", LOCAL)
def test_a_store_reads_what_was_packed(tmp_path, name, variable):
    raw = write_raw(tmp_path / "raw", 100, 500, variable=variable)
    store = STORES[name]()
    store.load()
    store.write(raw.records(), tmp_path / "packed", raw.record_bytes)
    store.open(tmp_path / "packed", raw.record_bytes)
    seconds, digest = read_rate(store, raw, seed=5, batches=7, batch=16)
    assert digest == expected_digest(raw, 5, 7, 16) and seconds > 0
    other = write_raw(tmp_path / "other", 100, 500, variable=variable, seed=1)
    assert digest != expected_digest(other, 5, 7, 16)


def test_the_digest_sees_a_byte_and_where_records_end():
    def of(*records):
        digest = Digest(1)
        for record in records:
            digest.add(lambda place, record=record: record)
        return digest.hexdigest()

    assert len({of(b"ab", b"c"), of(b"a", b"bc"), of(b"ab", b"d"), of(b"ab")}) == 4


@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("name", LOCAL)
def test_loaders_deliver_whole_records_of_the_file(tmp_path, name, tokens):
    raw = write_raw(tmp_path / "raw", 100, 200)
    store = (TOKEN_STORES if tokens else STORES)[name]()
    store.load()
    store.write(raw.records(), tmp_path / "packed", raw.record_bytes)
    job = Job(name, str(tmp_path / "packed"), raw, tokens, workers=0, batch=8)
    for way in ways(name, tokens=tokens, workers=0):
        rate = steady_rate(job, way, budget_s=0.01)
        assert rate["batches"] >= 1 and rate["records_per_s"] > 0, way


def test_a_batch_that_is_not_of_the_file_is_found(tmp_path):
    import torch

    raw = write_raw(tmp_path / "raw", 16, 20)
    job = Job("np.memmap", "", raw, False, 0, batch=4)
    right = torch.from_numpy(raw.values.reshape(20, 16)[[3, 1, 4, 15]])
    check_batch(job, right)
    wrong_byte = right.clone()
    wrong_byte[2, 12] ^= 1
    no_number = right.clone()
    no_number[0, :8] = 255
    transposed = right.T.contiguous().T
    for batch in (wrong_byte, no_number, transposed, right[:3], right.to(torch.int64), right.numpy()):
        with pytest.raises(ValueError, match=r"np\.memmap delivers"):
            check_batch(job, batch)


def test_epochs_that_end_while_warming_up_are_refused(tmp_path, monkeypatch):
    raw = write_raw(tmp_path / "raw", 16, 20)
    batch = np.array(raw.values.reshape(20, 16)[:4])

    def short(job):
        import torch

        while True:
            yield [torch.from_numpy(batch)] * 5

    monkeypatch.setattr("benchmarks.data_peer_loaders.ways", lambda *_, **__: {"short": short})
    with pytest.raises(ValueError, match="ends within 8 batches"):
        steady_rate(Job("np.memmap", "", raw, False, 0, batch=4), "short", budget_s=0.01)


def test_the_worker_answers_every_line_and_reports_what_fails(tmp_path):
    raw = write_raw(tmp_path / "raw", 100, 300)
    peer, given, packed = Peer("np.memmap"), [raw.path, 100, 300], str(tmp_path / "packed")
    assert answer(peer, {"do": "read", "seed": 1, "batches": 1, "batch": 1}) == {
        "error": "RuntimeError: nothing is open"
    }
    written = answer(peer, {"do": "write", "raw": given, "to": packed, "tokens": False})
    assert written["bytes"] >= 30_000 and written["seconds"] > 0 and written["sync_s"] >= 0
    assert answer(peer, {"do": "open", "raw": given, "from": packed, "tokens": False}) == {}
    read = answer(peer, {"do": "read", "seed": 1, "batches": 3, "batch": 8})
    assert read["digest"] == expected_digest(raw, 1, 3, 8)
    assert answer(peer, {"do": "open", "raw": given, "from": str(tmp_path / "none"), "tokens": False})["error"]
    assert answer(peer, {"do": "dance"}) == {"error": "KeyError: 'dance'"}


def test_a_process_of_another_torch_is_refused(monkeypatch):
    monkeypatch.setattr("benchmarks.data_peer_worker.version", lambda package: "2.15.0")
    assert "torch 2.15.0 is installed beside the peers" in answer(Peer("np.memmap"), {"do": "hello"})["error"]


@pytest.fixture
def this_environment(monkeypatch):
    """The environment of the tests in the place of the peers'."""
    monkeypatch.setattr(data_peers, "ENVIRONMENT", Path(sys.prefix))
    monkeypatch.setattr(data_peers, "install", dict)


@pytest.mark.slow
def test_peers_in_their_processes(tmp_path, this_environment):
    raw = write_raw(tmp_path / "raw", 100, 400)
    peers = data_peers.installed_peers(["np.memmap", "LMDB"])
    try:
        memmap, lmdb = peers
        assert memmap.absent is None and memmap.version == np.__version__ and memmap.building_block
        assert lmdb.absent is not None and "lmdb" in lmdb.absent and not lmdb.building_block
        with pytest.raises(data_peers.PeerError, match="LMDB is absent"):
            lmdb.read(1, 1, 1)
        packed = tmp_path / memmap.slug
        written = memmap.write(raw, packed)
        assert written.num_bytes >= 40_000
        memmap.open(raw, packed)
        for seed in (1, 2):
            assert memmap.read(seed, 3, 16)[1] == expected_digest(raw, seed, 3, 16)
        with pytest.raises(data_peers.PeerError, match="FileNotFoundError"):
            memmap.open(raw, tmp_path / "none")
    finally:
        data_peers.close_all(peers)
    with pytest.raises(data_peers.PeerError, match="closed"):
        memmap.read(1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_in_fresh_processes(tmp_path, this_environment, workers):
    raw = write_raw(tmp_path / "raw", 100, 1000)
    store = STORES["np.memmap"]()
    store.write(raw.records(), tmp_path / "packed", raw.record_bytes)
    settings = {"workers": workers, "batch": 16, "budget_s": 0.05}
    rates = data_peers.loader_rates("np.memmap", raw, tmp_path / "packed", tokens=True, **settings)
    assert set(rates) == ({"by number"} if workers else {"by number", "slices"}) and min(rates.values()) > 0
    with pytest.raises(data_peers.PeerError, match="ModuleNotFoundError"):
        data_peers.loader_rates("LMDB", raw, tmp_path / "packed", **settings)


def test_a_process_that_ends_or_hangs_is_named(tmp_path, this_environment, monkeypatch):
    process = data_peers._Process("no such peer")
    try:
        with pytest.raises(data_peers.PeerError, match="no such peer: KeyError"):
            process.ask({"do": "hello"})
        os.kill(process._process.pid, signal.SIGSTOP)
        monkeypatch.setattr(data_peers, "REPLY_S", 0.0)
        with pytest.raises(data_peers.PeerError, match="did not answer"):
            process.ask({"do": "hello"})
        with pytest.raises(data_peers.PeerError, match="ended"):
            process.ask({"do": "hello"})
    finally:
        process.end()


def test_one_peer_that_does_not_install_leaves_the_others(tmp_path, monkeypatch):
    commands = []

    def run(*command):
        commands.append(command)
        if "venv" in command:
            (tmp_path / "environment").mkdir()
        return "no wheel of lance" if any("pylance" in word for word in command) else ""

    monkeypatch.setattr(data_peers, "ENVIRONMENT", tmp_path / "environment")
    monkeypatch.setattr(data_peers, "_run", run)
    assert data_peers.install() == {"Lance": "no wheel of lance"}
    installs = [command for command in commands if "install" in command]
    assert all("torch==2.13.0" in command and "-c" in command for command in installs)
    constraints = (tmp_path / "environment" / "constraints.txt").read_text().split()
    assert "torch==2.13.0" in constraints and "cuda-toolkit<0" in constraints
    commands.clear()
    assert data_peers.install() == {"Lance": "no wheel of lance"} and not commands  # kept
    stamp = tmp_path / "environment" / "installed.json"
    stamp.write_text(json.dumps({"wanted": {}, "absent": {}}))
    monkeypatch.setattr(data_peers, "_run", lambda *command: "no network")
    assert data_peers.install() == dict.fromkeys(STORES, "no network")


def test_every_peer_has_its_pinned_package():
    assert set(data_peers.PACKAGES) == set(STORES) == set(TOKEN_STORES)
    for name, store in STORES.items():
        assert any(pin.split("==")[0] == store.package for pin in data_peers.PACKAGES[name])
    assert len({data_peers.slug(name) for name in STORES}) == len(STORES)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
@pytest.mark.parametrize("name", STORES)
def test_an_installed_peer_reads_and_loads_what_it_packed(tmp_path, name, tokens):
    if not (data_peers.ENVIRONMENT / "installed.json").exists():
        pytest.skip("the peers are not installed: the benchmark installs them")
    [peer] = data_peers.installed_peers([name])
    if peer.absent:
        pytest.skip(peer.absent)
    raw = write_raw(tmp_path / "raw", 100, 1000)
    try:
        peer.write(raw, tmp_path / "packed", tokens=tokens)
        if peer.reads and not tokens:
            peer.open(raw, tmp_path / "packed")
            assert peer.read(1, 3, 16)[1] == expected_digest(raw, 1, 3, 16)
            other = write_raw(tmp_path / "variable", 100, 1000, variable=True)
            peer.write(other, tmp_path / "other")
            peer.open(other, tmp_path / "other")
            assert peer.read(2, 3, 16)[1] == expected_digest(other, 2, 3, 16)
    finally:
        peer.close()
    settings = {"workers": 0, "batch": 16, "budget_s": 0.05, "tokens": tokens}
    rates = data_peers.loader_rates(name, raw, tmp_path / "packed", **settings)
    assert set(rates) == set(ways(name, tokens=tokens, workers=0))


# ---- the bound


@pytest.mark.parametrize("lengths", [(1,), (31, 32, 33), (100,), (127, 128, 129, 160, 5000), (4096,)])
def test_every_gather_of_the_bound_copies_the_records(lengths):
    rng = np.random.default_rng(0)
    every = np.resize(np.array(lengths, np.int64), 200)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(every)])
    values = rng.integers(0, 256, offsets[-1], np.uint8)
    ids = rng.integers(0, 200, (3, 20))
    found = data_bound.bound((values, offsets), ids)
    wanted = b"".join(values[offsets[i] : offsets[i + 1]].tobytes() for i in ids[-1].tolist())
    assert len(found.gathers) == 6 and found.num_bytes == every[ids].sum()
    for name, gather in found.gathers.items():
        found.destination[:] = 0
        gather()
        copied = found.destination[: len(wanted)].tobytes()
        assert copied == (wanted if name.endswith("reused") else bytes(len(wanted))), name
    assert found.destination.ctypes.data % data_bound.PAGE == data_bound.DESTINATION_OFFSET


def test_the_bound_of_fixed_records_states_its_page_phase():
    records = data_bound.page_aligned(64 * 4096, 0).reshape(64, 4096)
    records[:] = np.arange(64, dtype=np.uint8)[:, None]
    ids = np.array([[5, 3], [7, 63]])
    found = data_bound.bound(records, ids)
    assert (found.phase.low, found.phase.high, found.phase.slow_share) == (1024, 1024, 0.0)
    found.gathers["vectors, prefetch, reused"]()
    assert found.destination[[0, 4096]].tolist() == [7, 63]
    assert data_bound.bound(records, ids, destination_offset=16).phase.slow_share == 1.0
    assert "100.0% in 1..31" in str(data_bound.bound(records, ids, destination_offset=16).phase)


@pytest.mark.parametrize("ids", [[[0, 64]], [[-1, 0]], [[]], [0]])
def test_the_bound_refuses_ids_that_are_not_there(ids):
    with pytest.raises(ValueError, match="ids below 64"):
        data_bound.bound(np.zeros((64, 8), np.uint8), np.array(ids, np.int64))
    with pytest.raises(ValueError, match="contiguous uint8"):
        data_bound.bound(np.zeros((64, 8), np.int64), np.array([[0]]))


def test_the_bound_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(data_bound.shutil, "which", lambda name: None)
    data_bound._library.cache_clear()
    with pytest.raises(RuntimeError, match=r"needs a C\+\+ compiler"):
        data_bound.bound(np.zeros((4, 8), np.uint8), np.array([[0]]))
