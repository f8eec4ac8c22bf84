"""Measuring by turns: every domain's trials tier by tier within a budget, each row journaled as it comes. No torch.

A domain's `bench.py` is a `Bench`. A session asks each for its trials, leaves out those whose rows are known, and
calls `measure` with a time to end by; then it repeats the noisy rows, looks at the others again, and takes what is left
of the budget for what was left out. A domain that keeps failing (its device is gone, say) is given up with the reason;
its rows stay.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

from turbopump.core.errors import TurbopumpError
from turbopump.hardware import budget
from turbopump.hardware.journal import Journal, nearer
from turbopump.hardware.profile import Measurement, Request, Trial

TELLING_TIER = 1  # the budget is shared out to the rows up to this tier; beyond it there are often thousands
MOST_FAILURES = 3  # exceptions, not rows with a problem, before a domain is given up


class Bench(Protocol):
    """What a domain's `bench.py` offers; see `Request`."""

    def trials(self, request: Request) -> list[Trial]: ...

    def measure(self, trials: list[Trial], request: Request, until: float) -> Iterable[Measurement]: ...


@dataclass(frozen=True)
class ProbeProgress:
    """Where a probe is: `doing` is measured now, `done` of `total` trials have a row."""

    domain: str
    doing: str
    done: int
    total: int
    noisy: int
    elapsed_s: float
    left_s: float
    """Of the budget, or until all is measured if that comes first."""


class Session:
    """One probe under way. `rows` are the best of each key (`journal.nearer`), those of the journal among them."""

    def __init__(
        self,
        benches: Mapping[str, Bench],
        request: Request,
        journal: Journal,
        budget_s: float,
        progress: Callable[[ProbeProgress], None] | None = None,
    ) -> None:
        self.begin_s = time.monotonic()
        self.end_s = self.begin_s + budget_s
        self.benches = benches
        self.trials = {name: _distinct(bench.trials(request)) for name, bench in benches.items()}
        self.total = sum(map(len, self.trials.values()))
        self.rows = dict(journal.resumed)
        self.resumed = len(self._wanted_keys() & self.rows.keys())
        telling = sum(t.tier <= TELLING_TIER and t.key not in self.rows for ts in self.trials.values() for t in ts)
        self.request = replace(request, row_s=budget.row_s(budget_s, telling))
        self.walls_s: dict[str, float] = {}
        """By key, preparation included; without the first rows of turns, which wait for processes and files."""
        self.failures: dict[str, list[str]] = {}
        """By domain: what went wrong, one line each."""
        self.measured = self.repeated = 0
        """Rows that came, and those among them that came again because they were noisy."""
        self.looks: Counter[str] = Counter()
        """How often each key was measured here."""
        self._journal = journal
        self._progress = progress
        self._set_aside: set[str] = set()

    def run(self) -> None:
        """Measure until the budget is spent or nothing is left; what `journal` raises is raised."""
        self._measure_pending(self.end_s, most_tier=0)
        self._measure_pending(self.end_s - budget.AGAIN_SHARE * (self.end_s - self.begin_s))
        self._repeat_noisy()
        self._look_again()
        self._measure_pending(self.end_s)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin_s

    @property
    def left_out(self) -> list[budget.Group]:
        return budget.left_out(self.trials, self.rows, self.walls_s, self.request.row_s)

    def _wanted_keys(self) -> set[str]:
        return {trial.key for trials in self.trials.values() for trial in trials}

    def _pending(self, name: str) -> list[Trial]:
        if self.given_up(name):
            return []
        return [trial for trial in self.trials[name] if trial.key not in self.rows and trial.key not in self._set_aside]

    def given_up(self, name: str) -> bool:
        """Whether a domain failed too often to be asked for more."""
        return len(self.failures.get(name, ())) >= MOST_FAILURES

    def _measure_pending(self, until: float, most_tier: float = float("inf")) -> None:
        """Tier by tier; once more as long as there is time and rows come."""
        while time.monotonic() < until:
            before = len(self.rows) + len(self._set_aside)
            tiers = {trial.tier for name in self.trials for trial in self._pending(name)}
            for tier in sorted(tier for tier in tiers if tier <= most_tier):
                wanted = {name: [t for t in self._pending(name) if t.tier == tier] for name in self.trials}
                self._by_turns(wanted, until)
            if len(self.rows) + len(self._set_aside) == before:
                return

    def _repeat_noisy(self) -> None:
        for _ in range(budget.MOST_REPEATS):
            noisy = {
                name: [t for t in trials if (row := self.rows.get(t.key)) and row.noisy and not self.given_up(name)]
                for name, trials in self.trials.items()
            }
            if time.monotonic() >= self.end_s or not any(noisy.values()):
                return
            self.repeated += self._by_turns(noisy, self.end_s)

    def _look_again(self) -> None:
        """Measure what the CPU clock timed a second and third time, some while after the first.

        What slows a shared machine down lasts for seconds: one look, however long, may lie within it altogether. Two
        probes of one look each differed by 8 to 11 % in the median row (AMD EPYC, Zen 4, 2 shared cores).
        """
        for most in range(1, budget.MOST_LOOKS):
            wanted = {
                name: [t for t in trials if self._timed_by_cpu(t) and self.looks[t.key] <= most]
                for name, trials in self.trials.items()
                if not self.given_up(name)
            }
            if time.monotonic() >= self.end_s or not any(wanted.values()):
                return
            self._by_turns(wanted, self.end_s)

    def _timed_by_cpu(self, trial: Trial) -> bool:
        row = self.rows.get(trial.key)
        return row is not None and row.works and row.clock == "thread_cpu" and trial.tier <= TELLING_TIER

    def _by_turns(self, wanted: Mapping[str, list[Trial]], until: float) -> int:
        """Let each domain measure within its share of the time until `until`; the number of rows that came."""
        names = [name for name, trials in wanted.items() if trials]
        count = 0
        for number, name in enumerate(names):
            now = time.monotonic()
            share_s = budget.allowance_s(until - now, name, names[number:])
            if share_s > 0:
                count += self._measure(name, wanted[name], now + share_s)
        return count

    def _measure(self, name: str, trials: list[Trial], until: float) -> int:
        """Journal the rows of a domain as they come; go on behind a trial at which it fails. The number of rows."""
        count = 0
        while trials and not self.given_up(name):
            at = 0
            # closed, on Ctrl-C too, so that a bench has put everything back before the next one begins
            with closing(self._rows_of(name, trials, until)) as rows:
                while True:
                    current = trials[min(at, len(trials) - 1)]
                    self._say(name, current)
                    began_s = time.monotonic()
                    try:
                        row = next(rows)
                    except StopIteration:
                        return count
                    except Exception as error:  # whatever a driver throws: the other rows are still worth having
                        self.failures.setdefault(name, []).append(f"{current.key}: {_one_line(error)}")
                        self._set_aside.add(current.key)
                        break
                    at = next((n + 1 for n in range(at, len(trials)) if trials[n].key == row.key), at)
                    self._take(row)
                    if at > 1:
                        self.walls_s.setdefault(row.key, time.monotonic() - began_s)
                    count += 1
            trials = trials[at + 1 :]
        return count

    def _rows_of(self, name: str, trials: list[Trial], until: float) -> Generator[Measurement, None, None]:
        yield from self.benches[name].measure(list(trials), self.request, until)

    def _take(self, row: Measurement) -> None:
        self._journal.append(row)
        self.measured += 1
        self.looks[row.key] += 1
        known = self.rows.get(row.key)
        self.rows[row.key] = row if known is None else nearer(known, row)

    def _say(self, name: str, trial: Trial) -> None:
        if self._progress is None:
            return
        done = len(self._wanted_keys() & self.rows.keys())
        left_s = max(0.0, self.end_s - time.monotonic())
        if self.walls_s and done < self.total:
            left_s = min(left_s, sum(self.walls_s.values()) / len(self.walls_s) * (self.total - done))
        noisy = sum(row.noisy for row in self.rows.values())
        self._progress(ProbeProgress(name, f"{trial.op.key} by {trial.route}", done, self.total, noisy, self.elapsed_s,
                                     left_s))  # fmt: skip


def _distinct(trials: list[Trial]) -> list[Trial]:
    """Each key once, where it came first: a recipe's operation may stand in the grid too."""
    return list({trial.key: trial for trial in reversed(trials)}.values())[::-1]


def _one_line(error: Exception) -> str:
    """Of an error that is meant for users its text; of any other its type too."""
    lines = str(error).strip().splitlines()
    if lines and isinstance(error, TurbopumpError):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
