"""What to change first on a machine, and how far to trust what is said: the two cards on top of its page."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from turbopump.hardware.profile import MachineProfile, Measurement
from turbopump.reporting import html
from turbopump.reporting.html import Html, join, prose, tag
from turbopump.reporting.probe_rows import WORTH_CHANGING, Gain, error_words, gain_group, op_words, usable
from turbopump.reporting.words import percent

_FIRST = 4  # changes and left-out groups shown at once


def decisions(profile: MachineProfile, found: Sequence[Gain]) -> Html:
    shown = tag("section", tag("h2", "How far to trust it", id="trust-title"), *trust(profile), class_="card",
                id="trust", aria_labelledby="trust-title")  # fmt: skip
    if not profile.rows:
        doubts = profile.uncertain or profile.left_out
        return tag("div", shown, class_="decisions one", style="margin-top:24px") if doubts else Html()
    return tag(
        "div",
        shown,
        tag("section", tag("h2", "What to change first", id="changes-title"), changes(found), class_="card",
            id="changes", aria_labelledby="changes-title"),
        class_="decisions", style="margin-top:24px",
    )  # fmt: skip


def trust(profile: MachineProfile) -> list[Html]:
    """How noisy the rows are, what is uncertain, what was left out."""
    rows = [r for r in profile.rows if usable(r)]
    parts = [_meters(profile, rows)] if rows else []
    failed = sum(not r.works for r in profile.rows)
    if failed:
        parts.append(
            tag("p", f"{failed} trials could not be measured or are not exact; the table says why.", class_="muted")
        )
    for title, lines in (("Less certain than it could be", profile.uncertain), ("Left out", profile.left_out)):
        if lines:
            shown = tag("ul", *(tag("li", prose(text)) for text in lines[:_FIRST]), class_="plain")
            more = tag("ul", *(tag("li", prose(text)) for text in lines[_FIRST:]), class_="plain")
            parts += [tag("h3", title), shown]
            parts += [html.details(f"{len(lines) - _FIRST} more", more)] if len(lines) > _FIRST else []
    return parts


def _meters(profile: MachineProfile, rows: Sequence[Measurement]) -> Html:
    noisy = sum(r.noisy for r in rows) / len(rows)
    spread = profile.quality.get("spread", float(np.median([r.spread for r in rows])))
    waited = profile.quality.get("waited", float(np.median([r.waited for r in rows])))
    facts = (
        (noisy, f"of {len(rows):,} rows are noisy"),
        (spread, "spread of the median row (fastest to 90th percentile)"),
        (waited, "of the median row's time its core was taken by others"),
    )
    return tag("ul", *(
        tag("li", tag("div", tag("b", prose(percent(share))), Html(" "), name),
            tag("div", tag("span", style=f"width:{100 * min(1.0, max(0.0, share)):.1f}%"), class_="meter"))
        for share, name in facts
    ), class_="meters")  # fmt: skip


def changes(found: Sequence[Gain]) -> Html:
    """Routes to change to, those that gain most over the operations measured first."""
    groups: dict[tuple[str, str], list[Gain]] = defaultdict(list)
    for gain in found:
        if gain.ratio >= WORTH_CHANGING:
            groups[gain_group(gain.best), gain.best.route].append(gain)
    ordered = sorted(groups.items(), key=lambda item: -float(np.log([g.ratio for g in item[1]]).sum()))
    if not ordered:
        text = "No route is faster than the default by more than the noise of the rows." if found else (
            "No operation was measured by two routes, so there is nothing to compare."
        )  # fmt: skip
        return tag("p", text)
    items = [change_item(group, route, mine, found) for (group, route), mine in ordered[: _FIRST * 5]]
    shown = tag("ol", *items[:_FIRST])
    if len(items) > _FIRST:
        more = tag("ol", *items[_FIRST:], style="margin-top:8px")
        return join([shown, html.details(f"{len(items) - _FIRST} more", more)])
    return shown


def change_item(group: str, route: str, mine: Sequence[Gain], found: Sequence[Gain]) -> Html:
    of = sum(gain_group(g.best) == group for g in found)
    median, top = float(np.median([g.ratio for g in mine])), max(mine, key=lambda g: g.ratio)
    errors = [g.best.error for g in mine if g.best.error is not None]
    exact = f" Largest error {error_words(max(errors))}." if errors else ""
    text = f"Fastest for {len(mine)} of {of} shapes; at most ×{top.ratio:.3g}, {op_words(top.best)}.{exact}"
    return tag(
        "li",
        tag("h3", group, tag("span", f"×{median:.3g} in the median", class_="gain")),
        tag("p", prose(text)),
        tag("p", tag("code", route)),
    )
