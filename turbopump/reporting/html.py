"""HTML without a template engine: `tag` builds an element and escapes every text that is not `Html` already.

`document` makes the one self-contained file: style, figures as JSON, plotly (compressed, which makes a page 1.8 MB
instead of 4.8) and the page's own script inside it. Its Content-Security-Policy allows exactly those two scripts, by
digest, and no request to anywhere.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
from collections.abc import Iterable, Sequence
from functools import cache
from html import escape
from importlib.resources import files
from typing import Any

from turbopump.core.files import to_json
from turbopump.core.units import human, human_seconds
from turbopump.core.version import VERSION
from turbopump.reporting.plots import Figure, Table, plotly_js

_VOID = {"meta", "br", "hr", "input"}


class Html(str):
    """Text that is HTML already and is not escaped again."""


def tag(name: str, /, *children: Any, **attributes: Any) -> Html:
    """`<name attributes>children</name>`. Attribute names: `class_` for class, `_` for `-`; None and False are left
    out. Children that are not `Html` are escaped."""
    shown = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        shown.append(f" {key}" if value is True else f' {key}="{escape(str(value))}"')
    inside = "".join(child if isinstance(child, Html) else escape(str(child)) for child in children)
    return Html(f"<{name}{''.join(shown)}>" if name in _VOID else f"<{name}{''.join(shown)}>{inside}</{name}>")


def prose(text: str) -> Html:
    """Text whose percent signs stay on the line of their number."""
    return Html(escape(text).replace(" %", "&nbsp;%"))


def join(parts: Iterable[Html]) -> Html:
    return Html("".join(parts))


def table(content: Table, *, caption: str = "", kind: str = "numbers", whole: bool = False) -> Html:
    """A table; the first column is the row's heading. Wide ones, and long ones unless `whole`, scroll in their box."""
    if not content.rows:
        return tag("p", "Nothing was measured.", class_="muted")
    head = tag("tr", *(tag("th", cell, scope="col") for cell in content.header))
    body = [
        tag("tr", *(tag("th", cell, scope="row") if i == 0 else tag("td", cell) for i, cell in enumerate(row)))
        for row in content.rows
    ]
    inner = tag("table", tag("caption", caption) if caption else Html(), tag("thead", head), tag("tbody", *body),
                class_=kind)  # fmt: skip
    return tag(
        "div",
        inner,
        class_="scroll whole" if whole else "scroll",
        tabindex="0",
        role="region",
        aria_label=caption or "table",
    )


def figure(content: Figure) -> Html:
    """A plot with its title, its words for those who cannot see it, and its table."""
    tools = Html()
    if content.log_x:
        tools = tag("button", "log steps", type="button", class_="toggle", data_logx=content.id, aria_pressed="false")
    return tag(
        "figure",
        tag("figcaption", tag("h3", content.title), tools),
        _legend(content) if content.legend else Html(),
        tag("div", id=f"plot-{content.id}", class_="plot", role="img", aria_label=f"{content.title}. {content.summary}",
            style=f"min-height:{content.layout.get('height', 280)}px"),
        tag("p", content.note, class_="muted") if content.note else Html(),
        details("Table", table(content.table, caption=content.title)),
        class_="card wide" if content.wide else "card",
    )  # fmt: skip


def _legend(content: Figure) -> Html:
    """Names of the curves as buttons that hide and show them; wraps on a phone, which plotly's own legend does not."""
    items = []
    for i, trace in enumerate(content.data):
        colour = trace["line" if trace["type"] == "scatter" and "line" in trace else "marker"]["color"]
        swatch = tag("span", class_="swatch", style=f"background:var({colour})")
        name = Html(trace["name"])  # escaped already, by plots.label
        items.append(tag("li", tag("button", swatch, name, type="button", data_figure=content.id, data_trace=i,
                                   aria_pressed="true")))  # fmt: skip
    return tag("ul", *items, class_="legend")


def details(summary: str, *children: Html, open_: bool = False) -> Html:
    return tag("details", tag("summary", summary), *children, open=open_)


def section(title: str, *children: Html, id_: str) -> Html:
    return tag("section", tag("h2", title, id=f"{id_}-title"), *children, id=id_, aria_labelledby=f"{id_}-title")


def nested_table(values: dict[str, Any], *, header: Sequence[str] = ("setting", "value")) -> Html:
    """A nested table of settings as rows of dotted paths."""
    return table(Table(header, [[k, v] for k, v in flatten(values)]), kind="settings")


def records_table(rows: Sequence[dict[str, Any]], caption: str) -> Html:
    """A list of records as a table with one column a key."""
    keys = list(dict.fromkeys(key for row in rows for key, value in row.items() if value not in (None, "")))
    shown = [[_cell(key, row.get(key)) for key in keys] for row in rows]
    return table(Table([key.replace("_", " ") for key in keys], shown), caption=caption, kind="records")


def _cell(key: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if key.endswith("_per_s"):
            return f"{human(value)}/s"
        return human_seconds(value) if key == "s" or key.endswith("_s") else f"{value:.6g}"
    return "" if value is None else str(value)


def flatten(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted paths and printed values of nested mappings and of lists of mappings."""
    if isinstance(values, dict):
        return [row for k, v in values.items() for row in flatten(v, f"{prefix}.{k}" if prefix else str(k))]
    if isinstance(values, list) and any(isinstance(v, dict) for v in values):
        return [row for i, v in enumerate(values) for row in flatten(v, f"{prefix}[{i}]")]
    if isinstance(values, list):
        return [(prefix, ", ".join(map(str, values)) or "none")]
    if isinstance(values, bool):
        return [(prefix, str(values).lower())]
    if isinstance(values, float):
        return [(prefix, f"{values:.6g}")]
    return [(prefix, "none" if values is None else str(values))]


def document(title: str, body: Html, figures: Iterable[Figure]) -> bytes:
    """The whole file."""
    content = {f"plot-{f.id}": {"data": f.data, "layout": f.layout} for f in figures}
    data = to_json(content).decode()
    for character in "<>&\u2028\u2029":  # so that no string in it can end the element it stands in
        data = data.replace(character, f"\\u{ord(character):04x}")
    library, script = plotly_js(), _asset("page.js")
    allowed = " ".join(f"'sha256-{_digest(source)}'" for source in (library, script))
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        f"base-uri 'none'; form-action 'none'"
    )
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=policy),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="generator", content=f"turbopump {VERSION}"),
        tag("title", title),
        tag("style", Html(_asset("page.css"))),
    )
    scripts = [
        tag("script", Html(data), type="application/json", id="figures"),
        tag("script", Html(_packed_library()), type="application/octet-stream", id="library"),
        tag("script", Html(script)),
    ]
    return ("<!doctype html>\n" + tag("html", head, tag("body", body, *scripts), lang="en") + "\n").encode()


@cache
def _packed_library() -> str:
    """plotly's source, gzipped, in base64: the page's script unpacks it."""
    return base64.b64encode(gzip.compress(plotly_js().encode(), 6, mtime=0)).decode()


def _asset(name: str) -> str:
    return files("turbopump.reporting").joinpath(name).read_text(encoding="utf-8")


def _digest(source: str) -> str:
    return base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
