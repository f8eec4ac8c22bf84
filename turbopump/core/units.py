"""Numbers as people read them: 1.2 GB, 3.4 TFLOP/s, 2 h 05 min; text that a terminal can show."""

from __future__ import annotations

import math
import re
from unicodedata import category

from turbopump.core.errors import UsageError

_PREFIXES = ("", "k", "M", "G", "T", "P", "E")


def human(value: float, unit: str = "", digits: int = 3) -> str:
    """`value` with an SI prefix and `digits` significant digits, e.g. `human(1.5e12, "FLOP/s") == "1.5 TFLOP/s"`."""
    if not math.isfinite(value):
        return f"{value} {unit}".strip()
    magnitude, prefix = abs(value), ""
    for prefix in _PREFIXES:
        if float(f"{magnitude:.{digits}g}") < 1000 or prefix == _PREFIXES[-1]:
            break
        magnitude /= 1000
    text = f"{math.copysign(magnitude, value):.{digits}g}"
    if "e+" in text:
        text = f"{float(text):.0f}"
    separator = " " if (unit or prefix) else ""
    return f"{text}{separator}{prefix}{unit}"


def human_bytes(count: float) -> str:
    return human(count, "B")


def human_seconds(seconds: float) -> str:
    """A duration: `0.8 ms`, `12.3 s`, `4 min 05 s`, `2 h 05 min`, `3 d 04 h`."""
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 0:
        return "-" + human_seconds(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    if seconds < 0.9995:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600:02d} h"


def parse_seconds(text: str, name: str = "a duration") -> float:
    """Seconds of `30s`, `5m`, `1.5h` or a bare number; raises `UsageError` for anything else, 0 too."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*(s|m|min|h)?", text.strip())
    seconds = float(match[1]) * {None: 1, "s": 1, "m": 60, "min": 60, "h": 3600}[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name}: {text!r} given, which is no positive number of s, m or h: e.g. 30s, 5m or 1h")
    return seconds


def printable(text: str) -> str:
    """`text` with control characters (and half surrogates, which cannot be encoded) replaced by U+FFFD: what a model or
    a file says must not steer the reader's terminal."""
    return "".join(c if c in "\n\t" or category(c) not in ("Cc", "Cs") else "\N{REPLACEMENT CHARACTER}" for c in text)
