"""A run in plain words: names of kinds of time, shares, the headline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from turbopump.core.units import human, human_bytes, human_seconds
from turbopump.reporting.account import Summary, run_shares, table
from turbopump.reporting.load import measured

NOT_MEASURED = "not measured"

KIND_NAMES = {
    "ideal": "arithmetic at the measured limit",
    "below_limit": "arithmetic below the limit",
    "compute": "forward and backward",
    "steps": "steps",
    "data": "waiting for data",
    "exposed_communication": "exposed communication",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "other": "other work in the step",
    "startup": "start-up",
    "evaluation": "evaluation",
    "checkpoint": "checkpoints",
    "lost": "lost steps (done again)",
    "idle": "idle",
}


def percent(share: float) -> str:
    """`0.4 %`, `7.3 %`, `81 %`."""
    if not math.isfinite(share):
        return "not measured"
    return f"{100 * share:.0f} %" if abs(share) >= 0.0995 else f"{100 * share:.1f} %"


def headline(summary: Summary) -> str:
    """One or two sentences in plain words: what was trained, how good it is now, how long it took, where time went."""
    kind = str(table(summary.config, "model").get("kind") or "model")
    model = "model of your own" if kind == "live" else kind
    size = f" of {human(summary.params)} parameters" if summary.params else ""
    steps = f"{summary.num_steps_done:,} steps"
    if summary.num_steps_planned and summary.num_steps_planned != summary.num_steps_done:
        steps = f"{summary.num_steps_done:,} of {summary.num_steps_planned:,} steps"
    parts = [f"A {model}{size} was trained for {steps}"]
    if summary.run is not None:
        parts[0] += f" in {human_seconds(summary.run.wall_s)}"
    if device := _device_text(summary.env):
        parts[0] += f" on {device}"
    parts.append(_quality_sentence(summary))
    parts.append(_yardsticks_sentence(summary.evaluated))
    shares = run_shares(summary)
    wall_s = sum(shares.values())
    if wall_s > 0:
        compute_s = sum(shares.get(k, 0.0) for k in ("ideal", "below_limit", "compute"))
        rest = {k: s for k, s in shares.items() if k not in ("ideal", "below_limit", "compute") and s >= 0.02 * wall_s}
        top = sorted(rest, key=lambda k: -rest[k])[:3]
        named = [f"{percent(compute_s / wall_s)} was forward and backward"] if compute_s else []
        named += [f"{percent(rest[k] / wall_s)} {KIND_NAMES[k]}" for k in top]
        parts.append("Of the time, " + ", ".join(named) if named else "")
    return ". ".join(p for p in parts if p) + "."


def _quality_sentence(summary: Summary) -> str:
    q = summary.quality
    if q is None:
        return "How good it is was not measured"
    where = "" if q.split == "train" else " on held-out data"
    show = percent if q.metric == "accuracy" else lambda v: f"{v:.4g}"
    if q.first_step == q.last_step:
        return f"Its {q.name}{where} is {show(q.last)}"
    return f"Its {q.name}{where} went from {show(q.first)} (step {q.first_step:,}) to {show(q.last)}"


def _yardsticks_sentence(evaluated: Mapping[str, Any]) -> str:
    """The whole split as `evaluate` saw it, beside compressors on the same text."""
    bits = measured(table(evaluated, "metrics").get("bits_per_byte"))
    others = {name: measured(value) for name, value in table(evaluated, "yardsticks").items()}
    named = " and ".join(f"{name} {value:.3g}" for name, value in others.items() if value is not None)
    if bits is None or not named:
        return ""
    return f"On the whole {evaluated.get('split')} split it needs {bits:.3g} bits per byte (on the same text, {named})"


def _device_text(env: Mapping[str, Any]) -> str:
    device = str(env.get("device") or "")
    processes = int(measured(env.get("world_size")) or 1)
    if device.startswith("cuda"):
        return f"{processes} GPU{'s' * (processes > 1)}"
    cores = measured(env.get("num_cores"))
    return f"{cores:.0f} CPU core{'s' * (cores > 1)}" if cores else ""


def memory_text(summary: Summary) -> str:
    """Peak memory of a process, or `not measured`."""
    if summary.peak_device_bytes:
        return f"{human_bytes(summary.peak_device_bytes)} on the device"
    return human_bytes(summary.peak_rss_bytes) if summary.peak_rss_bytes else "not measured"
