"""What the numbers of a run add up to: `summarize(RunData)` -> `Summary`, the content of report.json.

Step times leave out the first `WARMUP_STEPS` steps of every attempt (allocation, lazy initialisation) and all lost
steps. The waterfall starts at the ideal time, model FLOPs / the best rate measured on this machine, and names each
loss on top of it until it reaches the measured mean step. `None` means: not measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from turbopump.core.spans import RunBreakdown, StepBreakdown
from turbopump.reporting.load import RUN_FIELDS, STEP_FIELDS, RankSpans, RunData, measured
from turbopump.reporting.predicted import Predicted, beside

SCHEMA_VERSION = 1
WARMUP_STEPS = 3

# Quality metrics in the order in which a reader asks for them: (field, name in words, lower is better).
QUALITY = (
    ("bits_per_byte", "bits per byte", True),
    ("accuracy", "accuracy", False),
    ("error_rate", "error rate", True),
    ("loss", "loss", True),
)


@dataclass(frozen=True)
class StepTimes:
    """Statistics over the steps of one rank that count. Mean fields sum to `mean_s`; those of the others do not."""

    num_steps: int
    num_warmup_excluded: int
    mean_s: float
    median_s: float
    p90_s: float
    mean: StepBreakdown
    median: StepBreakdown
    p90: StepBreakdown


@dataclass(frozen=True)
class WaterfallBar:
    """One loss between the ideal and the measured step."""

    name: str
    s: float


@dataclass(frozen=True)
class RunTimes:
    """The run's wall time and what it consists of. `idle_*` split `breakdown.idle`."""

    wall_s: float
    breakdown: RunBreakdown
    sum_error_s: float
    idle_between_attempts_s: float
    idle_logging_s: float
    idle_unexplained_s: float
    num_attempts: int
    num_lost_steps: int


@dataclass(frozen=True)
class Speed:
    """Rates over the steps that count (warm-up left out); `goodput_units_per_s` is over the whole wall time."""

    unit: str
    units_per_s: float | None
    goodput_units_per_s: float | None
    model_flops_per_s: float | None
    limit_flops_per_s: float | None
    limit_dtype: str | None
    limit_route: str | None
    share_of_limit: float | None
    compute_share_of_limit: float | None
    mfu: float | None


@dataclass(frozen=True)
class Quality:
    """The main metric on held-out data (or the training loss where nothing was evaluated)."""

    metric: str
    name: str
    lower_is_better: bool
    split: str
    first_step: int
    first: float
    last_step: int
    last: float
    best_step: int
    best: float


@dataclass(frozen=True)
class RankTimes:
    """One rank's mean step, to compare ranks."""

    rank: int
    mean_s: float
    mean: StepBreakdown


@dataclass(frozen=True)
class Summary:
    """One run in numbers."""

    name: str
    status: str
    num_steps_done: int
    num_steps_planned: int | None
    params: int | None
    num_nonfinite_losses: int
    first_nonfinite_step: int | None
    steps: StepTimes | None
    run: RunTimes | None
    speed: Speed
    waterfall: tuple[WaterfallBar, ...]
    quality: Quality | None
    final_train_loss: float | None
    peak_rss_bytes: float | None
    peak_device_bytes: float | None
    memory_bytes: float | None
    ranks: tuple[RankTimes, ...]
    evaluations: tuple[dict[str, Any], ...]
    checkpoints: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    choices: dict[str, Any]
    env: dict[str, Any]
    evaluated: dict[str, Any]
    notes: tuple[str, ...]
    predicted: Predicted | None = None


def summarize(run: RunData) -> Summary:
    """Everything the page shows as numbers."""
    main = run.ranks[0] if run.ranks else None
    steps = step_times(main) if main is not None else None
    loss = run.metrics.steps["loss"]
    bad = run.metrics.steps["step"][~np.isfinite(loss)]
    finite = loss[np.isfinite(loss)]
    workload = table(run.env, "workload")
    params = measured(workload.get("params"))
    speed = _speed(run, main, steps)
    return Summary(
        name=run.name,
        status=_status(run, main),
        num_steps_done=_steps_done(run, main),
        num_steps_planned=_integer(run.config.get("num_steps")),
        params=int(params) if params is not None else None,
        num_nonfinite_losses=len(bad),
        first_nonfinite_step=int(bad[0]) if len(bad) else None,
        steps=steps,
        run=_run_times(main) if main is not None else None,
        speed=speed,
        waterfall=waterfall(steps, measured(workload.get("flops_per_step")), speed.limit_flops_per_s),
        quality=_quality(run),
        final_train_loss=float(finite[-min(50, len(finite)) :].mean()) if len(finite) else None,
        peak_rss_bytes=_peak(run.metrics.progress["rss_bytes"]),
        peak_device_bytes=_peak(run.metrics.progress["device_bytes"]),
        memory_bytes=measured(run.env.get("memory_bytes")),
        ranks=_rank_times(run),
        evaluations=run.metrics.evaluations,
        checkpoints=_checkpoints(run),
        config=run.config,
        choices=run.choices,
        env=run.env,
        evaluated=run.evaluated,
        notes=run.notes,
        predicted=beside(
            run.prediction,
            steps.mean if steps is not None else None,
            main.breakdown if main is not None else None,
            finished=_status(run, main) == "finished",
        ),
    )


def table(parent: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A sub-table, or an empty one where it is missing or no table."""
    value = parent.get(name)
    return value if isinstance(value, Mapping) else {}


def counted_steps(rank: RankSpans) -> np.ndarray:
    """Mask [S] of the steps that statistics are made of: neither lost nor warm-up of an attempt."""
    keep = ~rank.lost
    for number in range(len(rank.attempts)):
        mine = np.flatnonzero(rank.attempt == number)
        keep[mine[: min(WARMUP_STEPS, len(mine) // 4)]] = False
    return keep


def step_times(rank: RankSpans) -> StepTimes | None:
    """Mean, median and 90th percentile of the step and of its parts; None without steps."""
    keep = counted_steps(rank)
    if not keep.any():
        return None
    step_s, parts = rank.step_s[keep], rank.parts[keep]
    return StepTimes(
        num_steps=int(keep.sum()),
        num_warmup_excluded=int((~rank.lost & ~keep).sum()),
        mean_s=float(step_s.mean()),
        median_s=float(np.median(step_s)),
        p90_s=float(np.percentile(step_s, 90)),
        mean=_breakdown(parts.mean(0)),
        median=_breakdown(np.median(parts, 0)),
        p90=_breakdown(np.percentile(parts, 90, axis=0)),
    )


def _breakdown(values: np.ndarray) -> StepBreakdown:
    return StepBreakdown(**dict(zip(STEP_FIELDS, map(float, values))))


def waterfall(
    steps: StepTimes | None, flops_per_step: float | None, limit_flops_per_s: float | None
) -> tuple[WaterfallBar, ...]:
    """The mean step as a sum: ideal time at the limit, what compute lost below it, then everything else.

    Without a measured limit the first bar is all of compute. A negative "arithmetic below the limit" says that the
    limit was measured too low.
    """
    if steps is None:
        return ()
    mean = steps.mean
    if flops_per_step and limit_flops_per_s:
        ideal_s = flops_per_step / limit_flops_per_s
        head = [WaterfallBar("ideal", ideal_s), WaterfallBar("below_limit", mean.compute - ideal_s)]
    else:
        head = [WaterfallBar("compute", mean.compute)]
    rest = ("data", "exposed_communication", "bubble", "optimizer", "other")
    return (*head, *(WaterfallBar(name, getattr(mean, name)) for name in rest))


def _run_times(rank: RankSpans) -> RunTimes:
    between_s = sum(max(0.0, b.start_s - a.last_s) for a, b in zip(rank.attempts, rank.attempts[1:]))
    logging_s = sum(p.s for p in rank.periods if p.name not in RUN_FIELDS)
    idle_s = rank.breakdown.idle
    between_s = min(between_s, idle_s)
    logging_s = min(logging_s, idle_s - between_s)
    return RunTimes(
        wall_s=rank.wall_s,
        breakdown=rank.breakdown,
        sum_error_s=rank.breakdown.total - rank.wall_s,
        idle_between_attempts_s=between_s,
        idle_logging_s=logging_s,
        idle_unexplained_s=idle_s - between_s - logging_s,
        num_attempts=len(rank.attempts),
        num_lost_steps=int(rank.lost.sum()),
    )


def _speed(run: RunData, main: RankSpans | None, steps: StepTimes | None) -> Speed:
    env, workload, limit = run.env, table(run.env, "workload"), table(run.env, "limit")
    scope = env.get("limit_scope", limit.get("limit_scope"))
    processes = 1 if scope == "run" else max(1, _integer(env.get("world_size")) or 1)
    per_process, datasheet = measured(limit.get("flops_per_s")), measured(env.get("datasheet_flops_per_s"))
    limit_flops_per_s = per_process * processes if per_process else None
    flops, units = measured(workload.get("flops_per_step")), measured(workload.get("units_per_step"))
    step_s = steps.mean_s if steps is not None and steps.mean_s > 0 else _typical(run.metrics.progress["step_s"])
    flops_per_s = flops / step_s if flops and step_s else None
    compute_s = steps.mean.compute if steps is not None else 0.0
    num_good = int((~main.lost).sum()) if main is not None else 0
    wall_s = main.wall_s if main is not None else 0.0
    return Speed(
        unit=str(workload.get("unit") or "unit"),
        units_per_s=units / step_s if units and step_s else _typical(run.metrics.progress["units_per_s"]),
        goodput_units_per_s=units * num_good / wall_s if units and wall_s else None,
        model_flops_per_s=flops_per_s,
        limit_flops_per_s=limit_flops_per_s,
        limit_dtype=_text(limit.get("dtype")),
        limit_route=_text(limit.get("route")),
        share_of_limit=flops_per_s / limit_flops_per_s if flops_per_s and limit_flops_per_s else None,
        compute_share_of_limit=flops / limit_flops_per_s / compute_s
        if flops and limit_flops_per_s and compute_s
        else None,
        mfu=flops_per_s / (datasheet * processes) if flops_per_s and datasheet else None,
    )


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _integer(value: Any) -> int | None:
    found = measured(value)
    return int(found) if found is not None else None


def _typical(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _peak(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) else None


def main_split(run: RunData) -> str | None:
    """The split that curves and headline speak of: the one evaluated while training, else the most frequent."""
    splits = [r["split"] for r in run.metrics.evaluations]
    wanted = table(run.config, "evaluation").get("split")
    if wanted in splits:
        return str(wanted)
    return max(dict.fromkeys(splits), key=splits.count) if splits else None


def _quality(run: RunData) -> Quality | None:
    split = main_split(run)
    rows = [r for r in run.metrics.evaluations if r["split"] == split]
    for metric, name, lower in QUALITY:
        points = [(r["step"], value) for r in rows if (value := measured(r.get(metric))) is not None]
        if points:
            best = (min if lower else max)(points, key=lambda p: p[1])
            return Quality(metric, name, lower, split or "", *points[0], *points[-1], *best)
    step, loss = run.metrics.steps["step"], run.metrics.steps["loss"]
    finite = np.flatnonzero(np.isfinite(loss))
    if not len(finite):
        return None
    first, last, best_i = finite[0], finite[-1], finite[np.argmin(loss[finite])]
    point = [(int(step[i]), float(loss[i])) for i in (first, last, best_i)]
    return Quality("loss", "training loss", True, "train", *point[0], *point[1], *point[2])


def _steps_done(run: RunData, main: RankSpans | None) -> int:
    step = run.metrics.steps["step"]
    from_metrics = int(step[-1]) if len(step) else 0
    survived = main.step[~main.lost] if main is not None else np.array([])
    return int(survived.max()) if len(survived) else from_metrics


def _status(run: RunData, main: RankSpans | None) -> str:
    if main is None:
        return "not started"
    reason = main.attempts[-1].end_reason
    return reason if reason is not None else "running, or killed: its last attempt wrote no end"


def _rank_times(run: RunData) -> tuple[RankTimes, ...]:
    found = [(rank.rank, step_times(rank)) for rank in run.ranks]
    return tuple(RankTimes(number, times.mean_s, times.mean) for number, times in found if times is not None)


def _checkpoints(run: RunData) -> tuple[dict[str, Any], ...]:
    """Checkpoints written, in order, with `kept`: whether the directory is still there."""
    rows = [r | {"kept": r["step"] in run.checkpoint_bytes} for r in run.metrics.checkpoints]
    known = {r["step"] for r in rows}
    rows += [{"step": s, "bytes": b, "kept": True} for s, b in run.checkpoint_bytes.items() if s not in known]
    return tuple(sorted(rows, key=lambda r: r["step"]))


def time_bins(rank: RankSpans, num_bins: int = 100) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges [B+1] over the wall time and, by kind of time, the seconds [B] spent in each bin.

    Kinds: start-up, the six parts of a step, evaluation, checkpoint, lost, idle. The intervals of a kind are disjoint,
    so its seconds up to any moment are a piecewise linear function; a bin is the difference of two of its values.
    """
    wall_s = max(rank.wall_s, 1e-9)
    edges = np.linspace(0.0, wall_s, num_bins + 1)
    kept = ~rank.lost
    start_s, end_s = rank.start_s[kept], rank.start_s[kept] + rank.step_s[kept]
    kinds = {"startup": _period_seconds(rank, "startup", edges)}
    for i, name in enumerate(STEP_FIELDS):
        kinds[name] = _seconds_in_bins(edges, start_s, end_s, rank.parts[kept, i])
    kinds["evaluation"] = _period_seconds(rank, "evaluation", edges)
    kinds["checkpoint"] = _period_seconds(rank, "checkpoint", edges)
    lost_start_s, lost_s = rank.start_s[rank.lost], rank.step_s[rank.lost]
    kinds["lost"] = _seconds_in_bins(edges, lost_start_s, lost_start_s + lost_s, lost_s)
    kinds["idle"] = np.maximum(0.0, np.diff(edges) - sum(kinds.values()))
    return edges, kinds


def _period_seconds(rank: RankSpans, name: str, edges: np.ndarray) -> np.ndarray:
    mine = [p for p in rank.periods if p.name == name]
    start_s = np.array([p.start_s for p in mine])
    length_s = np.array([p.s for p in mine])
    return _seconds_in_bins(edges, start_s, start_s + length_s, length_s)


def _seconds_in_bins(edges: np.ndarray, start_s: np.ndarray, end_s: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    if not len(start_s):
        return np.zeros(len(edges) - 1)
    order = np.argsort(start_s, kind="stable")
    until = np.cumsum(seconds[order])
    moments = np.column_stack([start_s[order], end_s[order]]).ravel()
    values = np.column_stack([until - seconds[order], until]).ravel()
    return np.diff(np.interp(edges, np.maximum.accumulate(moments), values))


def run_shares(summary: Summary) -> dict[str, float]:
    """Seconds of wall time by kind, steps split into the waterfall's parts; they sum to the wall time.

    Warm-up steps are spread over the parts of the mean step, so that the parts sum to `breakdown.steps`.
    """
    if summary.run is None:
        return {}
    run = asdict(summary.run.breakdown)
    shares = {"startup": run["startup"]}
    mean_s = sum(bar.s for bar in summary.waterfall)
    if mean_s > 0:
        scale = run["steps"] / mean_s
        shares |= {bar.name: bar.s * scale for bar in summary.waterfall}
    else:
        shares["steps"] = run["steps"]
    shares |= {name: run[name] for name in ("evaluation", "checkpoint", "lost", "idle")}
    return {name: s for name, s in shares.items() if math.isfinite(s)}
