"""Loaders into a consumer that does nothing: ours (`copy=False`, so many threads or none) and the peers'.

Each in a fresh process, each on its own format. All of them once, then the fastest of the peers and of ours again, in
turns; a contestant is one loader with its number of workers. The rate is that of whole tensors, uint8 [256, record] or
int64 [256, T + 1], in a shuffled order, after the first 8 batches; one batch of ours is compared with the file.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.data_own import BATCH, TOKEN, in_process, note, packed, packed_tokens
from benchmarks.data_peer_loaders import WARMUP_BATCHES
from benchmarks.data_peer_records import Raw, write_raw
from benchmarks.data_peers import Peer, PeerError, loader_rates
from benchmarks.harness import Ratio, ratio_with_interval

SEQ_LEN = 1024
TOKENS_BYTES = (SEQ_LEN + 1) * TOKEN.itemsize
RECORDS = {"12KB": (12_288, 20_000, 4_000), "tokens": (TOKENS_BYTES, 100_000, 20_000)}  # bytes, how many, if quick
OUR_WORKERS, PEER_WORKERS = (0, 1, 2), (0, 2)
FINALISTS = 3  # of the peers
QUICK_PEERS = ("HF datasets", "LMDB")  # the fastest of earlier runs: each loader takes seconds to start


@dataclass(frozen=True)
class Loaders:
    """`rates`: median records/s by contestant; `ratio`: ours at its best over the best dataset library's."""

    ratio: Ratio
    ours: str
    best: str
    rates: Mapping[str, float]


def measure_loaders(kind: str, peers: Sequence[Peer], scratch: Path, quick: bool) -> Loaders:
    """`kind`: `12KB` or `tokens`. Raises `PeerError` where no peer's loader works."""
    record_bytes, count, quick_count = RECORDS[kind]
    raw = write_raw(scratch / f"raw-loader-{kind}", record_bytes, quick_count if quick else count)
    tokens, own = kind == "tokens", scratch / "own"
    (packed_tokens if tokens else packed)(raw, own)
    budget_s, rounds = (0.5, 2) if quick else (1.5, 3)
    blocks = [peer.name for peer in peers if peer.building_block]
    note(f"loaders, {kind}: {raw.count} records; every one once, the best {rounds - 1} times more")
    rates: dict[str, list[float]] = {}
    places: dict[str, tuple[str, int, Path]] = {}
    for peer in peers:
        if not peer.absent and (not quick or peer.name in QUICK_PEERS):
            _first_round(peer, raw, scratch, tokens, budget_s, rates, places)
    if not places:
        raise PeerError("no peer's loader works: there is nothing to compare with")
    ours = [f"ours, {workers} threads" for workers in OUR_WORKERS]
    for name, workers in zip(ours, OUR_WORKERS):
        rates[name] = [in_process(own_rate, own, raw, tokens, workers, budget_s)]
        note(f"  {name}: {rates[name][0]:.0f} records/s")
    libraries = sorted((name for name in places if places[name][0] not in blocks), key=lambda name: -rates[name][0])
    finalists = libraries[:FINALISTS]
    for turn in range(1, rounds):
        order = [*ours, *finalists]
        for name in order if turn % 2 else reversed(order):
            if name in ours:
                rates[name].append(in_process(own_rate, own, raw, tokens, OUR_WORKERS[ours.index(name)], budget_s))
            else:
                who, workers, place = places[name]
                try:
                    rates[name].append(_peer_rate(who, raw, place, tokens, workers, budget_s))
                except PeerError as error:  # it worked before: it stands with what it had
                    note(f"  {name}: {error}")
                    rates[name].append(rates[name][-1])
    return judged(rates, ours, finalists)


def judged(rates: Mapping[str, Sequence[float]], ours: Sequence[str], libraries: Sequence[str]) -> Loaders:
    """Our best over the best of the libraries, both by their median, in pairs of rounds."""
    medians = {name: float(np.median(found)) for name, found in rates.items()}
    mine, best = (max(names, key=lambda name: medians[name]) for names in (ours, libraries))
    return Loaders(ratio_with_interval(rates[mine], rates[best]), mine, best, medians)


def _first_round(
    peer: Peer, raw: Raw, scratch: Path, tokens: bool, budget_s: float, rates: dict[str, list[float]],
    places: dict[str, tuple[str, int, Path]],
) -> None:  # fmt: skip
    """Pack by one peer and run its loaders once; what fails is said and left out."""
    place = scratch / peer.slug
    try:
        peer.write(raw, place, tokens=tokens)
    except PeerError as error:
        note(f"  {peer.name} is left out: {error}")
        return
    for workers in PEER_WORKERS:
        name = f"{peer.name}, {workers} workers"
        try:
            rates[name] = [_peer_rate(peer.name, raw, place, tokens, workers, budget_s)]
        except PeerError as error:
            note(f"  {name} is left out: {error}")
            continue
        places[name] = (peer.name, workers, place)
        note(f"  {name}: {rates[name][0]:.0f} records/s")


def _peer_rate(name: str, raw: Raw, place: Path, tokens: bool, workers: int, budget_s: float) -> float:
    """Of the best of a peer's loaders."""
    return max(loader_rates(name, raw, place, workers=workers, batch=BATCH, budget_s=budget_s, tokens=tokens).values())


def own_rate(directory: Path, raw: Raw, tokens: bool, workers: int, budget_s: float) -> float:
    """Steady records/s of our loader in this process, after one batch was compared with the raw file."""
    from turbopump.data.loader import Loader
    from turbopump.data.sources import ArraysConfig, ArraysSource, TokensConfig, TokensSource

    source = (
        TokensSource(TokensConfig(path=str(directory), seq_len=SEQ_LEN), "train")
        if tokens
        else ArraysSource(ArraysConfig(path=str(directory)), "train")
    )
    with Loader(source, global_batch=BATCH, num_workers=workers, copy=False) as loader:
        ids = np.array([index for _, index in loader.ids(0)])
        for number in range(WARMUP_BATCHES):
            (batch,) = next(loader)
            if number == 0 and not np.array_equal(batch.numpy(), _expected(raw, ids, tokens)):
                raise AssertionError("our loader delivers other bytes than the file has")
        batches, begin = 0, time.perf_counter()
        while (timed_s := time.perf_counter() - begin) < budget_s:
            next(loader)
            batches += 1
    return batches * BATCH / timed_s


def _expected(raw: Raw, ids: np.ndarray, tokens: bool) -> np.ndarray:
    if tokens:
        starts = ids[:, None] * SEQ_LEN + np.arange(SEQ_LEN + 1)
        return raw.values.view(TOKEN)[starts].astype(np.int64)
    return raw.values.reshape(raw.count, raw.record_bytes)[ids]
