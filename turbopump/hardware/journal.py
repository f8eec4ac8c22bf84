"""The rows of a probe under way, on disk as they come; and how rows measured again join those already known.

`machine.json.partial.jsonl` begins with a `Header` and has a line a row. A crash, Ctrl-C or full disk loses nothing
but the row at work: the next probe of the same machine with the same versions takes the rows as they are. It is
removed when machine.json stands. A good row is never replaced by a noisy one, nor by a failure, unless told.
"""

from __future__ import annotations

import fcntl
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from turbopump.core.errors import ProfileError, RunDirectoryError
from turbopump.core.files import JsonLines, explain_os_error, from_json_as, read_json_lines, to_json
from turbopump.core.version import VERSION
from turbopump.hardware.profile import SCHEMA, Measurement
from turbopump.hardware.timing import NOISY_SPREAD, NOISY_WAITED

LEAST_COMMON = 5  # rows that two probes must share before one is called the noisier
NOISIER = 0.2  # by this share of the common rows


@dataclass(frozen=True)
class Header:
    """What the rows of a journal depend on; rows of another header are not mixed with it."""

    name: str
    """Of the machine."""
    fingerprint: str
    software: Mapping[str, str]
    directory: str
    """Where storage was measured."""
    date: str = ""
    schema: int = SCHEMA
    written_by: str = VERSION

    def differences(self, other: Header) -> list[str]:
        """What differs from `other`, as `what: other's, not ours`."""
        ours = {"machine": f"{self.name} ({self.fingerprint})", "directory": self.directory, "schema": str(self.schema),
                "turbopump": self.written_by, **self.software}  # fmt: skip
        theirs = {"machine": f"{other.name} ({other.fingerprint})", "directory": other.directory,
                  "schema": str(other.schema), "turbopump": other.written_by, **other.software}  # fmt: skip
        return [
            f"{name}: {theirs.get(name, 'none')}, not {ours.get(name, 'none')}"
            for name in dict.fromkeys([*ours, *theirs])
            if ours.get(name) != theirs.get(name)
        ]


def journal_path(output: Path) -> Path:
    return output.with_name(output.name + ".partial.jsonl")


class Journal:
    """Appends rows; `resumed` are those of an earlier probe that was stopped, the least noisy of each key.

    Raises `ProfileError` where the journal is another machine's or of other versions (`discard_foreign` drops its
    rows) or is in use, and `RunDirectoryError` where it cannot be written.
    """

    def __init__(self, path: Path, header: Header, *, discard_foreign: bool = False) -> None:
        self.path = path
        self.resumed: dict[str, Measurement] = {}
        self.begun = header.date
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunDirectoryError(explain_os_error(error, path)) from error
        try:
            self._take(header, discard_foreign)
        except BaseException:
            os.close(self._lock)
            raise

    def _take(self, header: Header, discard_foreign: bool) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ProfileError(f"another probe is writing {self.path}: wait for it, or use another --output") from error
        earlier, rows = read_journal(self.path)
        differences = header.differences(earlier) if earlier is not None else []
        if differences and rows and not discard_foreign:
            raise ProfileError(
                f"{self.path} holds {len(rows)} rows of an unfinished probe that this one cannot go on with "
                f"({'; '.join(differences)}): finish it as it was begun, give another --output, or --overwrite "
                "to discard it"
            )
        if earlier is None or differences:
            os.ftruncate(self._lock, 0)
            self._lines = JsonLines(self.path)
            self._write({"probe": header})
            return
        self._lines = JsonLines(self.path)
        self.begun = earlier.date
        for row in rows:
            known = self.resumed.get(row.key)
            self.resumed[row.key] = row if known is None else nearer(known, row)

    def append(self, row: Measurement) -> None:
        """The row is in the file, and survives a kill of this process, when this returns."""
        self._write({"row": row})

    def _write(self, record: object) -> None:
        self._lines.write(record)
        self._lines.flush()

    def remove(self) -> None:
        """Its rows stand in machine.json now."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            self._lines.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_journal(path: Path) -> tuple[Header | None, list[Measurement]]:
    """Header and rows of a journal; no header where there is none or it is not one. A line cut short is passed over."""
    header: Header | None = None
    rows: list[Measurement] = []
    for record in read_json_lines(path):
        try:
            if "probe" in record:
                header = from_json_as(to_json(record["probe"]), Header)
            elif "row" in record:
                rows.append(from_json_as(to_json(record["row"]), Measurement))
        except ValueError:
            continue  # a line of another schema: its header says so
    return header, rows


# ---- which of two rows to keep


def noise(row: Measurement) -> float:
    """How noisy a row is: above 1 it is `noisy`; infinite where nothing was measured."""
    return max(row.spread / NOISY_SPREAD, row.waited / NOISY_WAITED) if row.works else float("inf")


def nearer(known: Measurement, again: Measurement) -> Measurement:
    """Of two rows of one key measured in one probe, the one nearer to what the machine can do.

    On the clock of a thread's CPU time that is the shorter one: other programs take caches, memory and the other half
    of a core, so they only ever add. Where waiting counts, it is the less noisy one; a noisy one is never preferred.
    """
    if known.works and again.works and known.clock == again.clock == "thread_cpu":
        return min(known, again, key=lambda row: (row.noisy, row.seconds, noise(row)))
    return again if noise(again) <= noise(known) else known


def replaces(new: Measurement, old: Measurement) -> bool:
    """Whether a newer row takes the place of an older one: not if it is noisy or failed, and worse than that."""
    return (new.works and not new.noisy) or noise(new) <= noise(old)


@dataclass(frozen=True)
class Joined:
    """Rows of an existing profile with those measured now."""

    rows: tuple[Measurement, ...]
    added: int = 0
    replaced: int = 0
    kept: tuple[str, ...] = field(default=())
    """Keys whose older row was kept because the new one is noisier or failed."""


def join(old: Iterable[Measurement], new: Iterable[Measurement], *, overwrite: bool = False) -> Joined:
    """The rows of both, those measured again refreshed in place; `overwrite` takes the newer one in any case."""
    rows = {row.key: row for row in old}
    added, replaced, kept = 0, 0, []
    for row in new:
        known = rows.get(row.key)
        if known is None:
            added += 1
        elif overwrite or replaces(row, known):
            replaced += 1
        else:
            kept.append(row.key)
            continue
        rows[row.key] = row
    return Joined(tuple(rows.values()), added, replaced, tuple(kept))


# ---- how good a set of rows is


def quality(rows: Iterable[Measurement]) -> dict[str, float]:
    """`spread` and `waited` (medians over the rows that work) and `noisy` (share of them); empty without rows."""
    working = [row for row in rows if row.works]
    if not working:
        return {}
    return {
        "spread": statistics.median(row.spread for row in working),
        "waited": statistics.median(row.waited for row in working),
        "noisy": sum(row.noisy for row in working) / len(working),
    }


@dataclass(frozen=True)
class Comparison:
    """Two probes of one machine over the rows both measured."""

    common: int
    noisy_before: float
    noisy_now: float
    """Share of the common rows."""
    difference: float
    """Of the seconds, relative: the median over the rows."""

    @property
    def noisier(self) -> bool:
        """Whether the newer one is so much noisier that even its quiet rows are not to be trusted."""
        return self.common >= LEAST_COMMON and self.noisy_now > self.noisy_before + NOISIER


def compare(old: Iterable[Measurement], new: Iterable[Measurement]) -> Comparison:
    """Over rows of the same key that work in both."""
    before = {row.key: row for row in old if row.works}
    pairs = [(before[row.key], row) for row in new if row.works and row.key in before]
    if not pairs:
        return Comparison(0, 0.0, 0.0, 0.0)
    differences = [abs(b.seconds / a.seconds - 1) for a, b in pairs]
    return Comparison(
        len(pairs), sum(a.noisy for a, _ in pairs) / len(pairs), sum(b.noisy for _, b in pairs) / len(pairs),
        statistics.median(differences),
    )  # fmt: skip
