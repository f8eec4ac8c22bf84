"""A plan in a screen of the terminal: the step and its parts, what follows from it, and what would change the answer.

Never wider than 100 columns. All of it, every alternative and the landscape of the search too, is in `--json`.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator

from turbopump.core.units import human, human_bytes, human_seconds, printable
from turbopump.planner.choice import Choice, Found
from turbopump.planner.forecast import WORDS, Forecast
from turbopump.planner.plan_file import PlanFile
from turbopump.planner.recipe_cases import Subject

WIDEST = 100
INDENT = 12
BAR = 30
GIB = 1 << 30
MOST_VALUES = 5
NEAR = 0.5
"""Alternatives that are slower than that are left out of the text."""


def summary(subject: Subject, target: str, found: Found, forecast: Forecast, file: PlanFile, columns: int = 100) -> str:
    """The plan as lines of at most `columns` (60 to 100) characters."""
    width = max(60, min(columns, WIDEST))
    sections: list[tuple[str, Iterable[str]]] = [
        ("model", [_model(subject)]),
        ("machine", [_machine(target, file)]),
        ("best", [words(found.best)]),
        ("step", [_step(found.best)]),
        ("", _parts(found.best, width)),
        ("speed", [_speed(subject, found.best, forecast)]),
        ("memory", [_memory(file)]),
        ("to finish", list(_finish(forecast, found.best))),
        ("data", [_data(subject, forecast)]),
        ("bottleneck", [_bottleneck(forecast)]),
        ("runner-up", [_runner_up(found)]),
        ("changes", list(_changes(found))),
        ("choices", list(_choices(found))),
        ("left out", [*found.notes[:2], *([f"and {len(found.notes) - 2} more"] if len(found.notes) > 2 else [])]),
    ]
    return "\n".join(line for name, items in sections for line in _section(name, items, width))


def _section(name: str, items: Iterable[str], width: int) -> Iterator[str]:
    for number, item in enumerate(items):
        label = f"{name if number == 0 else '':<{INDENT}}"
        yield textwrap.fill(printable(item), width, initial_indent=label, subsequent_indent=" " * INDENT,
                            drop_whitespace=True, break_on_hyphens=False)  # fmt: skip


def words(choice: Choice) -> str:
    """A choice in one line: what is split, and how each device computes."""
    dims, chosen = choice.dims, choice.settings
    sizes = (("dp_replicate", dims.dp_replicate), ("dp_shard", dims.dp_shard), ("tp", dims.tp), ("pp", dims.pp),
             ("cp", dims.cp), ("ep", dims.ep))  # fmt: skip
    split = " x ".join(f"{name} {size}" for name, size in sizes if size > 1) or "one device"
    times = "time" if chosen.num_microbatches == 1 else "times"
    parts = [split, f"microbatch {chosen.microbatch} ({chosen.num_microbatches} {times})", chosen.dtype]
    if chosen.recompute != "none":
        parts.append(f"recompute {chosen.recompute}")
    chunks = dims.pp * chosen.virtual_stages
    if choice.case is not None and choice.case.shape.layers % chunks:
        parts.append(f"at most {-(-choice.case.shape.layers // chunks)} layers a stage")
    if chosen.virtual_stages > 1:
        parts.append(f"interleaved, {chosen.virtual_stages} chunks a stage")
    if chosen.synchronisation == "quantized":
        parts.append("gradients quantized")
    if chosen.synchronisation == "local":
        parts.append(f"local updates, exchanged every {chosen.sync_every}")
    return ", ".join(parts)


def _model(subject: Subject) -> str:
    batch = subject.units_per_sample * subject.global_batch
    return (f"{subject.name}: {human(subject.params)} parameters, {subject.global_batch:,} samples a step "
            f"({human(batch)} {subject.unit}s)")  # fmt: skip


def _machine(target: str, file: PlanFile) -> str:
    based = f"; calibration: {file.inputs.calibration}" if file.inputs.calibration else ""
    return f"{target}{based}"


def _step(best: Choice) -> str:
    return (f"{human_seconds(best.step_s)}, with 80 % certainty between {human_seconds(best.low_s)} and "
            f"{human_seconds(best.high_s)}")  # fmt: skip


def _parts(best: Choice, width: int) -> Iterator[str]:
    longest = min(BAR, width - INDENT - 43)
    for name, seconds in best.breakdown.items():
        share = seconds / best.step_s
        if share >= 0.001:
            bar = "#" * max(1, round(longest * share))
            yield f"{WORDS[name]:<22}{human_seconds(seconds):>9}  {share:>6.1%}  {bar}"


def _speed(subject: Subject, best: Choice, forecast: Forecast) -> str:
    devices = best.settings.num_devices
    parts = [f"{human(forecast.units_per_s)} {subject.unit}s/s"]
    if devices > 1:
        parts.append(f"{human(forecast.units_per_s / devices)} a device")
    if forecast.audio_hours_per_s:
        parts.append(f"{human(forecast.audio_hours_per_s)} hours of audio a second")
    if forecast.mfu is not None:
        parts.append(f"MFU {forecast.mfu:.1%}" if forecast.mfu >= 0.01 else f"MFU {forecast.mfu:.1g}")
    return ", ".join(parts)


def _memory(file: PlanFile) -> str:
    totals = {rank: sum(parts.values()) for rank, parts in file.memory.items()}
    if len({round(total) for total in totals.values()}) == 1:
        rank, total = next(iter(totals.items()))
        most = sorted(file.memory[rank].items(), key=lambda item: -item[1])[:3]
        listed = ", ".join(f"{name.replace('_', ' ')} {_gib(size)}" for name, size in most)
        return f"{_gib(total)} {'a device' if len(totals) > 1 else 'a process'} ({listed})"
    return ", ".join(f"{rank} stage {_gib(total)}" for rank, total in totals.items()) + " a device"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB / 10 else f"{size / (1 << 20):.1f} MiB"


def _finish(forecast: Forecast, best: Choice) -> Iterator[str]:
    run = forecast.goodput
    if forecast.num_steps:
        yield f"{forecast.num_steps:,} steps in {human_seconds(run.wall_s)}"
    else:
        yield "how long it is was not said: give --steps or --tokens for time, dollars and energy"
    if forecast.bill is not None:
        yield "; ".join(forecast.bill.lines()).replace("usd_per_hour of a device", "--price")
    failures = f"{run.num_failures:.1f} failures expected" if run.num_failures >= 0.05 else "no failure expected"
    when = "" if forecast.num_steps else " in a month"
    every = f"every {run.interval_steps:,} steps ({human_seconds(run.interval_s)})"
    if run.num_failures < 0.05 and forecast.num_steps:
        every = "at the end is enough"
    yield f"goodput {run.goodput:.1%}: {failures}{when}; checkpoint {every}"


def _data(subject: Subject, forecast: Forecast) -> str:
    if not forecast.read_bytes:
        return "samples are made or held in memory: nothing is read, or the file does not say how much"
    return (f"{human(forecast.reads_per_s)} random reads/s of {human_bytes(forecast.read_bytes)} "
            f"({human_bytes(forecast.read_bytes_per_s)}/s)")  # fmt: skip


def _bottleneck(forecast: Forecast) -> str:
    relief = f"; relieved by {'; '.join(forecast.relief)}" if forecast.relief else ""
    return f"{WORDS[forecast.bottleneck]}, {forecast.share:.0%} of the step{relief}"


def _runner_up(found: Found) -> str:
    counted = f"{found.num_candidates:,} candidates, of which {found.num_fitting:,} fit"
    if found.runner_up is None or found.margin_sigmas is None:
        return f"none: {counted}"
    slower = found.runner_up.step_s / found.best.step_s - 1
    how = f"+{slower:.1%}, {found.margin_sigmas:.2f} sigma"
    verdict = " (as good, as far as is known)" if found.margin_sigmas < 1 else ""
    return f"{words(found.runner_up)}: {how}{verdict}; {counted}"


def _changes(found: Found) -> Iterator[str]:
    """Those that lead to another plan, and in one line those that do not."""
    same = [change.what for change in found.changes if not change.flips and change.kind != "training"]
    for change in found.changes:
        if change.choice is None:
            yield f"{change.what}: nothing would fit"
        elif change.flips:
            step = change.choice.step_s / found.best.step_s - 1
            saved = f", {change.gain:.1%} less than by keeping the plan" if change.kind == "machine" else ""
            yield f"{change.what}: {words(change.choice)}; step {step:+.1%}{saved}"
    if same:
        yield f"the same plan with {', '.join(same)}"


def _choices(found: Found) -> Iterator[str]:
    names = dict.fromkeys(one.name for one in found.alternatives)
    for name in names:
        near = [one for one in found.alternatives if one.name == name and one.slower is not None and one.slower <= NEAR]
        misfits = [str(one.value) for one in found.alternatives if one.name == name and one.slower is None]
        near.sort(key=lambda one: one.slower or 0.0)
        listed = ", ".join(f"{one.value} +{one.slower:.1%}" for one in near[:MOST_VALUES])
        unfit = f"{', '.join(misfits[:MOST_VALUES])} would not fit" if misfits else ""
        if listed or unfit:
            yield f"{name}: {'; '.join(filter(None, (listed, unfit)))}"
