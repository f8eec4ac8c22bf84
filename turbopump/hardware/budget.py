"""How a probe spends its time: so much a row, so much a domain, and what to say of the rows it had no room for.

Tier 0 of every domain comes before tier 1 of any, so that the shortest budget knows a little of everything. Within a
tier each domain may take its share of the time that is left; what one does not spend, those after it and the later
tiers have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from turbopump.core.units import human_seconds
from turbopump.hardware.profile import Measurement, Trial

SHARES: Mapping[str, float] = {"compute": 0.6, "data": 0.25, "comms": 0.15}
"""By domain; compute includes memory and host."""
LEAST_S: Mapping[str, float] = {"comms": 9.0, "data": 4.0}
"""What a turn needs to be of any use (processes to start, a file to write), where there is as much to spare."""
MOST_OF_LEAST = 0.4  # of the time left
AGAIN_SHARE = 0.5  # of the budget, to measure rows again; what they do not need goes to the rows left out
MOST_REPEATS = 2  # of noisy rows
MOST_LOOKS = 4  # at a row
LEAST_ROW_S, MOST_ROW_S = 0.03, 0.5  # a settled median ends a row sooner; below the least there are too few blocks
MEASURING_SHARE = 0.5  # of the time of a row: the other half makes inputs, warms up and finds the error
BUDGETS_S = (30, 60, 120, 300, 600, 900, 1200, 1800, 2700, 3600, 7200, 14400, 28800)
"""What one would type; an advised budget is one of these."""


def row_s(budget_s: float, num_trials: int) -> float:
    """Wall time of one row, beside its preparation, with which `num_trials` about fill the budget."""
    return min(MOST_ROW_S, max(LEAST_ROW_S, MEASURING_SHARE * budget_s / max(1, num_trials)))


def allowance_s(left_s: float, domain: str, domains: Sequence[str]) -> float:
    """What `domain` may take of the time left, where `domains` (it among them) still want some in this tier."""
    left_s = max(0.0, left_s)
    least_s = min(LEAST_S.get(domain, 0.0), MOST_OF_LEAST * left_s)
    return max(least_s, left_s * _share(domain) / sum(_share(name) for name in domains))


def _share(domain: str) -> float:
    return SHARES.get(domain, 0.15)


@dataclass(frozen=True)
class Group:
    """Trials of one kind and dtype of a domain."""

    domain: str
    kind: str
    dtype: str
    wanted: int
    left: int
    tier: int
    """The lowest of those left."""
    left_in_tier: int
    seconds: float
    """What those left would take, guessed from the rows there are."""

    def __str__(self) -> str:
        dtype = f" {self.dtype}" if self.dtype else ""
        return f"{self.domain}: {self.left} of {self.wanted} {self.kind}{dtype}, about {human_seconds(self.seconds)}"


def left_out(
    trials: Mapping[str, Sequence[Trial]], rows: Mapping[str, Measurement], walls_s: Mapping[str, float], row_s: float
) -> list[Group]:
    """The groups of trials that have no row; `walls_s` is how long each row took, preparation included, by key."""
    groups = []
    for domain, wanted in trials.items():
        by_group: dict[tuple[str, str], list[Trial]] = {}
        for trial in wanted:
            by_group.setdefault((type(trial.op).__name__, str(getattr(trial.op, "dtype", ""))), []).append(trial)
        default_s = _typical_s((t.key for t in wanted), walls_s) or row_s / MEASURING_SHARE
        for (kind, dtype), members in by_group.items():
            left = [trial for trial in members if trial.key not in rows]
            if left:
                each_s = _typical_s((t.key for t in members), walls_s) or default_s
                tier = min(trial.tier for trial in left)
                groups.append(Group(domain, kind, dtype, len(members), len(left), tier,
                                    sum(t.tier == tier for t in left), max(each_s, row_s) * len(left)))  # fmt: skip
    return groups


def _typical_s(keys: Iterable[str], walls_s: Mapping[str, float]) -> float:
    """The mean, not the median: a sum is wanted."""
    known = [walls_s[key] for key in keys if key in walls_s]
    return sum(known) / len(known) if known else 0.0


def advised(spent_s: float, groups: Sequence[Group], tier: int | None = None) -> str:
    """A budget, as one types it, in which also these groups (up to `tier`) should fit."""
    wanted = [g.seconds * (1.0 if tier is None else g.left_in_tier / g.left) for g in groups
              if tier is None or g.tier <= tier]  # fmt: skip
    needed_s = 1.2 * (spent_s + sum(wanted)) / (1 - AGAIN_SHARE)
    budget_s = next((known for known in BUDGETS_S if known >= needed_s), 3600 * math.ceil(needed_s / 3600))
    if budget_s < 60:
        return f"{budget_s}s"
    return f"{budget_s // 60}m" if budget_s % 3600 else f"{budget_s // 3600}h"
