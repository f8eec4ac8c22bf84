"""Damaged datasets: whatever is done to its files, a typed error or the right data, never a crash, a hang or a guess.

`python -m benchmarks.data_fuzz [--quick] [--seed N]` prints how many mutations ended how; `fuzz` gives the counts.
Mutation number n of a seed is a function of both, so that a failure can be done again alone: `mutate_and_examine`.
Each changes files of a small dataset (manifest, shards, checksums, tokenizer, the seals of a staging directory), opens
it, reads it in every way, and verifies it; the files are put back afterwards. Processes that die or stop are counted.

    error    a typed error                     right    all that was read is right (blanks in a manifest, say)
    other    a manifest whose digest was made to fit its changed content: a dataset of other data, and no crash

Any other outcome is a failure, and its name says what happened.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from turbopump.core.errors import TurbopumpError
from turbopump.core.files import digest, from_json, from_json_as
from turbopump.data import text
from turbopump.data.describe import describe_dataset
from turbopump.data.format import Dataset, open_dataset, verify_dataset
from turbopump.data.gather import Reference
from turbopump.data.manifest import MANIFEST_NAME, Field, Manifest, TokenizerEntry
from turbopump.data.part import PartEntry, PartWriter
from turbopump.data.ragged import Ragged, offsets_of, ragged_of
from turbopump.data.writer import Staging

EXPECTED = ("error", "right", "other")
HANG_S = 60.0
BLOCK_BYTES, SHARD_BYTES, ROWS = 128, 1500, 70
ROW_FIELDS = (
    Field("x", "float32", (3,)), Field("n", "int16"), Field("r", "int32", (2,), "ragged"),
    Field("t", "uint8", (), "text"), Field("b", "uint8", (), "bytes"),
)  # fmt: skip
TOKEN_FIELDS = (Field("tokens", "uint16"),)
STRANGE: tuple[Any, ...] = (
    0, 1, -1, 2, 7, 63, 64, 255, 4096, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 0.5, -0.0,
    1e308, True, False, None, "", "train", "x", "..", "a/b", "\0", "\ud800", "é" * 200, "uint8", "int16", "float64",
    "object", "array", "ragged", "text", "tokens", "arrays", "0" * 16, [], {}, [[]], [[0, 0]], [1, 2, 3], {"a": 1},
)  # fmt: skip


def fuzz(mutations: int, seed: int = 0, processes: int = 2) -> dict[str, int]:
    """Counts by outcome, of mutations 0 to `mutations` - 1."""
    context = multiprocessing.get_context("fork")
    counts: Counter[str] = Counter()
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="turbopump-fuzz-", dir=place) as directory:
        workers = [_Worker(context, Path(directory) / str(n), seed, n, mutations, processes) for n in range(processes)]
        while any(worker.go_on() for worker in workers):
            time.sleep(0.05)
        for worker in workers:
            counts.update(worker.counts)
    return dict(sorted(counts.items()))


class _Worker:
    """A process that does every `step`-th mutation, started again behind one that killed or stopped it."""

    def __init__(self, context: Any, directory: Path, seed: int, first: int, end: int, step: int) -> None:
        self.counts: Counter[str] = Counter()
        self._context, self._directory, self._seed = context, directory, seed
        self._next, self._end, self._step = first, end, step
        self._start()

    def _start(self) -> None:
        self._seen, self._seen_s = self._next, time.monotonic()
        self._results, sink = self._context.Pipe(duplex=False)
        shutil.rmtree(self._directory, ignore_errors=True)
        todo = range(self._next, self._end, self._step)
        self._process = self._context.Process(target=_work, args=(self._directory, self._seed, todo, sink), daemon=True)
        self._process.start()
        sink.close()

    def go_on(self) -> bool:
        """Take what is done; whether there is more to come."""
        with suppress(EOFError):
            while self._results.poll():
                number, outcomes = self._results.recv()
                self.counts.update(outcomes)
                self._next = number + self._step
        if self._next >= self._end:
            self._process.join()
            return False
        if self._next != self._seen:
            self._seen, self._seen_s = self._next, time.monotonic()
        stopped = time.monotonic() - self._seen_s > HANG_S
        if stopped:
            self._process.kill()
        if stopped or not self._process.is_alive():
            self._process.join()
            with suppress(EOFError):
                while self._results.poll():
                    number, outcomes = self._results.recv()
                    self.counts.update(outcomes)
                    self._next = number + self._step
            if self._next < self._end:
                how = "hang" if stopped else f"crash (exit {self._process.exitcode})"
                self.counts[f"{how} in mutation {self._next}"] += 1
                self._next += self._step
                if self._next < self._end:
                    self._start()
        return True


def _work(directory: Path, seed: int, todo: range, sink: Any) -> None:
    bench = Bench(directory)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the tokenizer library tells at length of what it did not expect
    for number in todo:
        sink.send((number, [bench.mutate_and_examine(seed, number)]))
    os._exit(0)


class Bench:
    """Good datasets in a directory, to be damaged one mutation at a time."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.rows, self.tokens = directory / "rows", directory / "tokens"
        self._columns = _row_columns()
        self._text = [f"document {i}: größe {i * i}\n" for i in range(60)]
        self._make_rows(self.rows)
        _make_tokens(self.tokens, self._text)
        self._staged = directory / "staged"
        with Staging(self._staged, key="fuzz") as staging:
            _write_parts(staging, self._columns, range(3))
        self._partial = staging.directory
        self._good = {path: _contents(path) for path in (self.rows, self.tokens, self._partial)}
        self._read = {path: _read_all(path, _open(path)) for path in (self.rows, self.tokens)}

    def _make_rows(self, path: Path) -> None:
        with Staging(path) as staging:
            _commit(staging, _write_parts(staging, self._columns, range(3)))

    def mutate_and_examine(self, seed: int, number: int) -> str:
        """The outcome of one mutation; the files are as before afterwards."""
        chance = random.Random(f"{seed}/{number}")
        path = chance.choices([self.rows, self.tokens, self._partial], [6, 4, 1])[0]
        files: dict[str, bytes | None] = {**self._good[path]}
        made_to_fit = False
        for _ in range(chance.choice([1, 1, 1, 2])):
            made_to_fit |= _mutate(chance, files)
        changed = _write_changed(path, self._good[path], files)
        try:
            if path == self._partial:
                return self._examine_staging(made_to_fit)
            return self._examine(path, chance, made_to_fit, bool(changed))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            return f"untyped {type(error).__name__} at {where} in mutation {number}: {str(error)[:80]}"
        finally:
            self._restore(path, changed)

    def _examine(self, path: Path, chance: random.Random, made_to_fit: bool, changed: bool) -> str:
        outcomes = set()
        for reading in ("compiled", "reference", "direct")[: 3 if chance.random() < 0.1 else 2]:
            outcomes.add(self._outcome(path, partial(_read, path, reading)))
        verified = self._outcome(path, lambda: verify_dataset(path) and self._read[path])
        if chance.random() < 0.2:
            with suppress(TurbopumpError):
                describe_dataset(path)
        if "other" in outcomes and not made_to_fit:
            return "wrong data was read"
        if changed and not made_to_fit and verified != "error" and not _same_manifest(path, self._good[path]):
            return "damage that verify did not see"
        return "other" if "other" in outcomes else "right" if {*outcomes, verified} == {"right"} else "error"

    def _outcome(self, path: Path, read: Callable[[], object]) -> str:
        try:
            return "right" if read() == self._read[path] else "other"
        except TurbopumpError:
            return "error"

    def _examine_staging(self, made_to_fit: bool) -> str:
        """A pack goes on from damaged parts: it makes the same dataset, or says what is wrong."""
        try:
            with Staging(self._staged, key="fuzz") as staging:
                parts = [staging.parts.get(n) or _write_parts(staging, self._columns, [n])[0] for n in range(3)]
                _commit(staging, parts)
        except TurbopumpError:
            return "error"
        if _contents(self._staged) == self._good[self.rows]:
            return "right"
        return "other" if made_to_fit else "wrong data was packed"

    def _restore(self, path: Path, changed: set[str]) -> None:
        if path == self._partial:
            shutil.rmtree(self._staged, ignore_errors=True)
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial.mkdir()
            changed = set(self._good[path])
        for name in changed:
            _remove(path / name)
            if name in self._good[path]:
                (path / name).write_bytes(self._good[path][name])


# ---- good datasets ---------------------------------------------------------------------------------------------------


def _row_columns() -> list[Any]:
    mine = np.random.default_rng(0)
    return [
        mine.random((ROWS, 3), np.float32), mine.integers(-99, 99, ROWS).astype(np.int16),
        ragged_of([mine.integers(0, 9, (n, 2)).astype(np.int32) for n in mine.integers(0, 5, ROWS)]),
        ragged_of([["", "größe", "火と水" * 9][n] for n in mine.integers(0, 3, ROWS)]),
        ragged_of([mine.bytes(n) for n in mine.integers(0, 90, ROWS)]),
    ]  # fmt: skip


def _write_parts(staging: Staging, columns: list[Any], numbers: Any) -> list[PartEntry]:
    entries, bounds = [], [0, 30, 55, ROWS]
    for n in numbers:
        writer = PartWriter(staging.directory, n, ROW_FIELDS, shard_bytes=SHARD_BYTES, block_bytes=BLOCK_BYTES)
        part = [c.rows(*bounds[n : n + 2]) if isinstance(c, Ragged) else c[slice(*bounds[n : n + 2])] for c in columns]
        writer.append("train" if n else "validation", part, source_bytes=n)
        entries.append(writer.finish())
    return entries


def _commit(staging: Staging, parts: list[PartEntry]) -> None:
    labels = {"n": ("cat", "dog")}
    staging.commit(parts, kind="arrays", fields=ROW_FIELDS, block_bytes=BLOCK_BYTES, sources=["made"], labels=labels)


def _make_tokens(path: Path, texts: list[str]) -> None:
    tokenizer = text.train_bpe(texts, 280)
    with Staging(path) as staging:
        writer = PartWriter(staging.directory, 0, TOKEN_FIELDS, shard_bytes=SHARD_BYTES // 3, block_bytes=BLOCK_BYTES)
        ids, counts = tokenizer.encode_documents(texts)
        for begin, end in zip(*(offsets_of(counts)[k:] for k in (0, 1))):
            writer.append("train", [ids[begin:end].astype(np.uint16)], source_bytes=30, document_sizes=[end - begin])
        staging.commit(
            [writer.finish()], kind="tokens", fields=TOKEN_FIELDS, block_bytes=BLOCK_BYTES,
            tokenizer=TokenizerEntry("bpe", tokenizer.vocab_size, text.TOKENIZER_NAME, digest(tokenizer.dumps())),
            files={text.TOKENIZER_NAME: tokenizer.dumps()},
        )  # fmt: skip


# ---- reading ---------------------------------------------------------------------------------------------------------


def _open(path: Path, reading: str = "compiled") -> Dataset:
    dataset = open_dataset(path, "direct" if reading == "direct" else "mapped")
    if reading == "reference":
        for split in dataset.manifest.splits:
            dataset.data(split)._kernels = Reference()
    return dataset


def _read(path: Path, reading: str) -> dict[str, list[bytes]]:
    return _read_all(path, _open(path, reading))


def _read_all(path: Path, dataset: Dataset) -> dict[str, list[bytes]]:
    """What is read of each split: batches of rows, windows, lengths, whole shards, the first text."""
    found: dict[str, list[bytes]] = {}
    for split in dataset.manifest.splits:
        data = dataset.data(split)
        ids = np.arange(len(data))[:200] * 7 % max(len(data), 1)
        data.prefetch(ids)
        parts = [*data.batch(ids), *data.batch(ids[:9], data.buffers(9))]
        for number, item in enumerate(data.fields):
            if not item.fixed:
                parts.append(data.lengths(number))
            elif not item.shape and len(data) > 40:
                parts += [data.windows([0, len(data) - 40], 40, field=number)]
        for shard in range(min(len(data.shards), 3)):
            parts += [data.shard_rows(number, shard) for number in range(len(data.fields))]
        found[split] = [array.tobytes() for part in parts for array in _arrays(part)]
    if dataset.manifest.kind == "tokens":
        tokenizer = dataset.tokenizer()
        found["tokenizer"] = [] if tokenizer is None else [tokenizer.dumps(), tokenizer.decode([70, 71, 72]).encode()]
    return found


def _arrays(part: np.ndarray | Ragged) -> list[np.ndarray]:
    return [part.offsets, part.values] if isinstance(part, Ragged) else [part]


def _same_manifest(path: Path, good: Mapping[str, bytes]) -> bool:
    """Whether only the manifest was changed, and only in what means nothing."""
    now = _contents(path)
    if {**now, MANIFEST_NAME: b""} != {**good, MANIFEST_NAME: b""}:
        return False
    with suppress(ValueError):
        return from_json_as(now[MANIFEST_NAME], Manifest) == from_json_as(good[MANIFEST_NAME], Manifest)
    return False


def _contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir()) if file.is_file()}


# ---- mutations -------------------------------------------------------------------------------------------------------


def _mutate(chance: random.Random, files: dict[str, bytes | None]) -> bool:
    """Change `files` (None: a folder in its place); whether checksums were made to fit."""
    names = sorted(name for name, data in files.items() if data)
    tables = [name for name in names if name.endswith(".json") and name != "key.json"]
    kind = chance.choices(["table", "bytes", "cut", "swap", "gone"], [10, 8, 3, 2, 1])[0]
    if kind == "table" and tables:
        return _mutate_table(chance, files, chance.choice(tables))
    name = chance.choice(names)
    data = files[name] or b""
    if kind == "cut":
        end = chance.randrange(len(data))
        files[name] = chance.choice([data[:end], data[end:], data + data[:end], data[:end] + bytes(len(data) - end)])
    elif kind == "swap":
        other = chance.choice(names)
        files[name], files[other] = files[other], data
    elif kind == "gone":
        files[name] = None if chance.random() < 0.3 else b""
        if chance.random() < 0.5:
            del files[name]
    else:
        changed = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 30])):
            changed[chance.randrange(len(data))] = chance.choice([0, 0xFF, chance.randrange(256)])
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        files[name] = bytes(changed)
    return False


def _mutate_table(chance: random.Random, files: dict[str, bytes | None], name: str) -> bool:
    """Change the meaning of a JSON file, and its digest with it, so that the checks behind the digest are reached."""
    data = files[name] or b""
    sealed = name.startswith("part-")
    try:
        table = from_json(data.rpartition(b"\n")[0] if sealed else data)
    except ValueError:
        return False  # damaged before
    places = list(_places(table))
    for _ in range(chance.choice([1, 1, 2])):
        if not places:
            return False
        holder, key = chance.choice(places)
        with suppress(LookupError, TypeError):
            _change(chance, holder, key, places)
    try:
        if sealed:
            changed = _json(table)
            files[name] = changed + b"\n" + digest(changed).encode()
        elif name == MANIFEST_NAME:
            with suppress(ValueError, OverflowError):
                table["digest"] = from_json_as(_json(table), Manifest).digest
            files[name] = _json(table)
        else:
            files[name] = _json(table)
            _fit_manifest(files, name)
    except (ValueError, TypeError):  # the table holds itself, or is no table any more
        return False
    return True


def _json(table: Any) -> bytes:
    """JSON that ours would not write, too: lone surrogates, numbers of any size, NaN."""
    return json.dumps(table).encode()


def _fit_manifest(files: dict[str, bytes | None], name: str) -> None:
    with suppress(ValueError, KeyError, TypeError, AttributeError):
        table = from_json(files[MANIFEST_NAME] or b"")
        table["tokenizer"]["digest"] = digest(files[name] or b"")
        table["digest"] = from_json_as(_json(table), Manifest).digest
        files[MANIFEST_NAME] = _json(table)


def _change(chance: random.Random, holder: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    value = holder[key]
    kind = chance.choice(["strange", "strange", "near", "near", "delete", "double", "other"])
    if kind == "delete":
        del holder[key]
    elif kind == "double" and isinstance(holder, list):
        holder.insert(key, value)
    elif kind == "other":
        other, where = chance.choice(places)
        holder[key] = copy.deepcopy(other[where])
    elif kind == "near" and isinstance(value, int):
        holder[key] = chance.choice(
            [value + 1, value - 1, value * 2, value // 2, -value, value + 8, value + BLOCK_BYTES]
        )
    elif kind == "near" and isinstance(value, str) and value:
        at = chance.randrange(len(value))
        holder[key] = value[:at] + chance.choice("az09/._\0 é") + value[at + 1 :]
    else:
        holder[key] = chance.choice(STRANGE)


def _places(table: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything in a table, itself excepted."""
    items = table.items() if isinstance(table, dict) else enumerate(table) if isinstance(table, list) else ()
    for key, value in items:
        yield table, key
        yield from _places(value)


def _write_changed(path: Path, good: Mapping[str, bytes], files: Mapping[str, bytes | None]) -> set[str]:
    changed = {name for name in {*good, *files} if name not in files or good.get(name) != files[name]}
    for name in changed:
        _remove(path / name)
        if name in files:
            data = files[name]
            (path / name).mkdir() if data is None else (path / name).write_bytes(data)
    return changed


def _remove(file: Path) -> None:
    shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.data_fuzz")
    parser.add_argument("--quick", action="store_true", help="2,000 mutations where 100,000 are done")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("error", RuntimeWarning)  # an overflow is a failure, too
    begin = time.monotonic()
    counts = fuzz(2000 if options.quick else 100_000, options.seed)
    for outcome, count in counts.items():
        print(f"{count:8d}  {outcome}")
    print(f"{sum(counts.values())} mutations in {time.monotonic() - begin:.0f} s")
    raise SystemExit(1 if set(counts) - set(EXPECTED) else 0)


if __name__ == "__main__":
    main()
