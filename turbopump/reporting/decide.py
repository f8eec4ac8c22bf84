"""Decisions: what limits a run and what to change first, each with the measured number it rests on.

`limits(Summary)` ranks where the wall time went. `changes(Summary)` names what is worth changing: a cost below
`WORTH` of the wall time is not. A saving is only ever a ceiling measured in this run (the seconds spent on it) or on
this machine (rates of `probe`, trials kept in choices.toml); where neither exists the finding says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from turbopump.core.units import human, human_seconds
from turbopump.reporting.account import Summary, run_shares, table
from turbopump.reporting.load import STEP_FIELDS, measured
from turbopump.reporting.words import KIND_NAMES, percent

WORTH = 0.02


@dataclass(frozen=True)
class Finding:
    """One decision. `saves_at_most_s` is seconds of this run's wall time, a ceiling; `basis` says where it was
    measured (`this run`, `this machine`); both None where no measurement supports a figure. `about` is `time`,
    `learning`, or `wrong`: something to put right whatever it costs."""

    title: str
    evidence: str
    action: str = ""
    setting: str | None = None
    saves_at_most_s: float | None = None
    basis: str | None = None
    about: str = "time"


def limits(summary: Summary) -> list[Finding]:
    """The parts of the wall time that matter, largest first, each with what it means."""
    shares = run_shares(summary)
    wall_s = sum(shares.values())
    if wall_s <= 0:
        return []
    ranked = sorted(((s, name) for name, s in shares.items() if s > 0), reverse=True)
    top = [(s, name) for s, name in ranked if s >= 0.05 * wall_s][:3] or ranked[:1]
    return [
        Finding(
            title=f"{percent(s / wall_s)} {KIND_NAMES[name]}",
            evidence=f"{human_seconds(s)} of {human_seconds(wall_s)}",
            action=_meaning(name, summary),
        )
        for s, name in top
    ]


def _meaning(name: str, summary: Summary) -> str:
    speed = summary.speed
    if name == "ideal" and speed.limit_flops_per_s:
        dtype = f" in {speed.limit_dtype}" if speed.limit_dtype else ""
        return (
            f"The model's arithmetic at the best rate measured on this machine, "
            f"{human(speed.limit_flops_per_s, 'FLOP/s')}{dtype}. Only fewer operations, another dtype or other "
            f"hardware would shorten it."
        )
    if name == "below_limit" and speed.compute_share_of_limit is not None:
        text = (
            f"Forward and backward run at {percent(speed.compute_share_of_limit)} of the measured limit: small or "
            f"memory-bound operations (norms, attention, activations) take this part."
        )
        default = default_route_share(summary)
        if default is not None:
            text += (
                f" The limit was reached by the route {speed.limit_route}; the library's default reaches "
                f"{percent(default)} of it here."
            )
        return text
    return {
        "compute": "Forward and backward. How near they are to the limit was not measured.",
        "steps": "Training steps; their parts were not measured.",
        "data": "The step waits for its batch: the loader is slower than the model.",
        "exposed_communication": "Processes wait for each other's gradients while nothing is computed.",
        "bubble": "Pipeline stages wait for the first and the last microbatch.",
        "optimizer": "Clipping and the update of the weights: the same for any batch size.",
        "other": "Time inside the step that no span explains.",
        "startup": "Imports, building the model, opening the dataset, restoring.",
        "evaluation": "Evaluation on held-out data while training.",
        "checkpoint": "Training stood still while a checkpoint was taken.",
        "lost": "Steps after the last checkpoint of an attempt that ended; they had to be done again.",
        "idle": "No step and no period: time between attempts, logging, or work outside the spans.",
    }.get(name, "")


def changes(summary: Summary) -> list[Finding]:
    """What to change, most urgent first: what makes the run wrong, then time by the most it can save, then advice
    without a measured gain. Empty where nothing is worth changing."""
    urgent = list(_correctness(summary))
    timed = sorted(_time(summary), key=lambda f: f.saves_at_most_s if f.saves_at_most_s is not None else -1.0)
    return urgent + timed[::-1] + list(_learning(summary))


def nothing_to_change(summary: Summary) -> str:
    """The sentence for a run without findings: the largest cost that is not arithmetic."""
    shares = {k: s for k, s in run_shares(summary).items() if k not in ("ideal", "below_limit", "compute", "steps")}
    wall_s = sum(run_shares(summary).values())
    if not shares or wall_s <= 0:
        return "Nothing can be said: the run directory holds no spans."
    name = max(shares, key=lambda k: shares[k])
    return (
        f"Nothing is worth changing: the largest cost beside arithmetic is {KIND_NAMES[name]}, "
        f"{percent(shares[name] / wall_s)} of the wall time."
    )


# ---- what makes the run wrong ---------------------------------------------------------------------------------------


def _correctness(summary: Summary) -> Iterator[Finding]:
    if summary.num_nonfinite_losses:
        yield Finding(
            title="The loss became NaN or infinite",
            evidence=f"{summary.num_nonfinite_losses} of {summary.num_steps_done} steps, the first at step "
            f"{summary.first_nonfinite_step}.",
            action="Lower the peak learning rate, lengthen the warm-up, or clip harder, and look at the records of "
            "that step's batch.",
            setting=_settings(summary, "optimizer.lr", "schedule.warmup_steps", "optimizer.clip_norm"),
            about="wrong",
        )
    speed = summary.speed
    share = speed.compute_share_of_limit
    if share is not None and share > 1.0:
        yield Finding(
            title="The limit was measured too low",
            evidence=f"Forward and backward reach {percent(share)} of it; nothing can pass 100 %.",
            action="Measure the machine again while it is otherwise idle; shares of the limit in this report are "
            "too high until then.",
            about="wrong",
        )


# ---- time -----------------------------------------------------------------------------------------------------------


def _time(summary: Summary) -> Iterator[Finding]:
    shares = run_shares(summary)
    wall_s = sum(shares.values())
    if summary.run is None or wall_s <= 0:
        return
    step = summary.steps

    def costs(name: str, least: float = WORTH) -> bool:
        return shares.get(name, 0.0) >= least * wall_s

    def rests_on(name: str) -> str:
        text = f"{human_seconds(shares[name])} of the run ({percent(shares[name] / wall_s)})"
        if step is not None and hasattr(step.mean, name):
            text += f"; {human_seconds(getattr(step.mean, name))} of a mean step of {human_seconds(step.mean_s)}"
        return text + "."

    def ceiling(name: str, title: str, action: str, *settings: str) -> Finding:
        return Finding(title, rests_on(name), action, _settings(summary, *settings), shares[name], "this run")

    if costs("data"):
        yield ceiling("data", "Feed the model faster", "Read ahead in more loader processes, or hold more steps ready.",
                      "loader.num_workers", "loader.prefetch_steps")  # fmt: skip
    if costs("checkpoint"):
        asynchronous = table(summary.config, "checkpoint").get("asynchronous", True)
        action = "Write fewer checkpoints: the copy before the background write still stops training."
        if not asynchronous:
            action = "Write checkpoints in the background, and less often."
        yield ceiling("checkpoint", "Checkpoints stop the run", action,
                      "checkpoint.asynchronous", "checkpoint.every_s", "checkpoint.every")  # fmt: skip
    if costs("lost"):
        yield ceiling("lost", "Save more often than the run is interrupted",
                      f"{summary.run.num_lost_steps} steps were done again after a restart.",
                      "checkpoint.every_s", "checkpoint.every")  # fmt: skip
    if costs("evaluation", 0.05):
        yield ceiling("evaluation", "Evaluate less often, or on fewer samples",
                      f"{len(summary.evaluations)} evaluations were run.",
                      "evaluation.every", "evaluation.max_samples")  # fmt: skip
    if costs("exposed_communication"):
        yield ceiling("exposed_communication", "Communicate less often",
                      "More microbatches a step (a larger global batch) exchange gradients less often a sample.",
                      "global_batch", "microbatch")  # fmt: skip
    if costs("bubble"):
        yield ceiling("bubble", "Fill the pipeline", "More and smaller microbatches shorten the bubble.", "microbatch")
    if costs("optimizer", 0.10):
        yield ceiling("optimizer", "The optimizer weighs much against so small a batch",
                      "It costs the same for any batch: a larger global batch spreads it over more samples (and "
                      "changes how the model learns).", "global_batch", "optimizer.kind")  # fmt: skip
    if costs("other", 0.05):
        yield ceiling("other", "Unexplained time in the step", "Wrap it in a span to see what it is.")
    if costs("startup", 0.10):
        yield ceiling("startup", "Start-up weighs much in so short a run",
                      "It is paid once an attempt: train longer, or restart less often.", "num_steps")  # fmt: skip
    yield from _idle(summary, wall_s)
    yield from _arithmetic(summary, shares, wall_s)
    yield from _uneven(summary)
    yield from _stragglers(summary)


def _idle(summary: Summary, wall_s: float) -> Iterator[Finding]:
    run = summary.run
    if run is None:
        return
    if run.idle_between_attempts_s >= WORTH * wall_s:
        yield Finding(
            "Restart sooner",
            f"{human_seconds(run.idle_between_attempts_s)} ({percent(run.idle_between_attempts_s / wall_s)}) passed "
            f"between {run.num_attempts} attempts.",
            "Let a launcher or scheduler start the run again when it ends early.",
            None,
            run.idle_between_attempts_s,
            "this run",
        )
    if run.idle_logging_s >= WORTH * wall_s:
        yield Finding(
            "Log less often",
            f"{human_seconds(run.idle_logging_s)} ({percent(run.idle_logging_s / wall_s)}) went into logging.",
            "",
            _settings(summary, "logging.every", "logging.loggers"),
            run.idle_logging_s,
            "this run",
        )
    if run.idle_unexplained_s >= 0.05 * wall_s:
        yield Finding(
            "Unexplained time outside the steps",
            f"{human_seconds(run.idle_unexplained_s)} ({percent(run.idle_unexplained_s / wall_s)}) lies in no step "
            f"and no period.",
            "Look for work in hooks, or for an attempt that was killed before its last steps were written.",
            None,
            run.idle_unexplained_s,
            "this run",
        )


def _arithmetic(summary: Summary, shares: Mapping[str, float], wall_s: float) -> Iterator[Finding]:
    compute_s = shares.get("compute", 0.0) + shares.get("ideal", 0.0) + shares.get("below_limit", 0.0)
    faster = faster_dtype(summary)
    if faster is not None and compute_s >= WORTH * wall_s:
        dtype, ratio, evidence = faster
        yield Finding(
            f"Compute in {dtype}",
            evidence,
            f"Forward and backward take {human_seconds(compute_s)} of this run; the part bound by arithmetic can get "
            f"{ratio:.2f} times as fast.",
            _settings(summary, "precision.compute"),
            compute_s * (1 - 1 / ratio),
            "this machine",
        )
    elif dtype_in_use(summary) == "fp32" and not _bf16_measured(summary) and compute_s >= 0.3 * wall_s:
        yield Finding(
            "See whether bf16 is faster here",
            f"Forward and backward take {percent(compute_s / wall_s)} of the run in fp32; bf16 was not measured.",
            'precision.compute = "auto" measures both in a few seconds and takes the faster one.',
            _settings(summary, "precision.compute"),
        )
    env = summary.env
    cores, threads = measured(env.get("num_cores")), measured(env.get("threads"))
    processes = measured(env.get("world_size")) or 1
    if cores and threads and str(env.get("device", "cpu")).startswith("cpu") and threads * processes != cores:
        many = threads * processes > cores
        yield Finding(
            "More threads than cores" if many else "Cores stand idle",
            f"{processes:.0f} processes of {threads:.0f} threads on {cores:.0f} cores.",
            "Threads that share a core wait for each other." if many else "Let every core compute.",
            _settings(summary, "launch.threads", "launch.num_processes"),
        )
    share = summary.speed.compute_share_of_limit
    if share is not None and share < 0.5 and shares.get("below_limit", 0.0) >= 0.05 * wall_s:
        yield Finding(
            "Give the processor larger pieces of work",
            f"Forward and backward reach {percent(share)} of the measured limit; "
            f"{human_seconds(shares['below_limit'])} of the run lie below it.",
            "Larger microbatches and a wider model use the processor better.",
            _settings(summary, "microbatch", "global_batch"),
        )


def _bf16_measured(summary: Summary) -> bool:
    rows = table(summary.env, "limit").get("rows")
    listed = rows if isinstance(rows, list) else []
    found = any(isinstance(row, Mapping) and _dtype_of(row) == "bf16" for row in listed)
    return found or bool(table(summary.choices, "precision"))


def _uneven(summary: Summary) -> Iterator[Finding]:
    """Steps of very different length: the machine was shared, or the batches are."""
    step = summary.steps
    if step is None or step.num_steps < 20 or step.mean_s < 1.2 * step.median_s:
        return
    slow = max(STEP_FIELDS, key=lambda name: getattr(step.mean, name) - getattr(step.median, name))
    yield Finding(
        "Steps are uneven",
        f"Half of them take less than {human_seconds(step.median_s)}, their mean is {human_seconds(step.mean_s)}, one "
        f"in ten takes more than {human_seconds(step.p90_s)}; most of the difference is {KIND_NAMES[slow]}.",
        "Look for other work on this machine, or for batches of very different length.",
        None,
        (step.mean_s - step.median_s) * step.num_steps,
        "this run",
    )


def _stragglers(summary: Summary) -> Iterator[Finding]:
    if len(summary.ranks) < 2:
        return
    own_s = {r.rank: r.mean_s - r.mean.exposed_communication for r in summary.ranks}
    slowest = max(own_s, key=lambda r: own_s[r])
    typical_s = sorted(own_s.values())[(len(own_s) - 1) // 2]
    if typical_s > 0 and own_s[slowest] > 1.05 * typical_s:
        yield Finding(
            f"Rank {slowest} holds the others up",
            f"Without communication its mean step takes {human_seconds(own_s[slowest])}, the median rank's "
            f"{human_seconds(typical_s)} ({own_s[slowest] / typical_s:.2f} times).",
            "Look at what else runs on its device or host, and whether its samples are longer.",
            None,
            (own_s[slowest] - typical_s) * summary.num_steps_done,
            "this run",
        )


def faster_dtype(summary: Summary) -> tuple[str, float, str] | None:
    """A dtype that was measured at least 1.1 times as fast as the one in use: (dtype, ratio, evidence).

    None where the dtype was chosen by measurement: that trial has answered the question.
    """
    used = dtype_in_use(summary)
    rows = table(summary.env, "limit").get("rows")
    if used is None or table(summary.choices, "precision") or not isinstance(rows, list):
        return None
    rates: dict[str, float] = {}
    for row in rows:
        if isinstance(row, Mapping) and (rate := measured(row.get("flops_per_s"))):
            dtype = _dtype_of(row)
            rates[dtype] = max(rate, rates.get(dtype, 0.0))
    others = {d: r for d, r in rates.items() if d in ("fp32", "bf16") and d != used}
    if used not in rates or not others:
        return None
    best = max(others, key=lambda d: others[d])
    ratio = others[best] / rates[used]
    if ratio < 1.1:
        return None
    evidence = (
        f"The best rate measured on this machine is {human(others[best], 'FLOP/s')} in {best} and "
        f"{human(rates[used], 'FLOP/s')} in {used}: {ratio:.2f} times."
    )
    return best, ratio, evidence


def _dtype_of(row: Mapping[str, Any]) -> str:
    """The dtype of a measured row: its own field, or that of its operation, `Gemm(...,dtype=fp32,layout=nt)`."""
    return str(row.get("dtype") or str(row.get("op", "")).partition("dtype=")[2].partition(",")[0].rstrip(")"))


def default_route_share(summary: Summary) -> float | None:
    """Best rate of the default route over the best of all routes; None where another one was not measured faster."""
    rows = table(summary.env, "limit").get("rows")
    rates: dict[str, float] = {}
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping) and (rate := measured(row.get("flops_per_s"))):
            rates[str(row.get("route"))] = max(rate, rates.get(str(row.get("route")), 0.0))
    share = rates["default"] / max(rates.values()) if "default" in rates else 1.0
    return share if share < 0.95 else None


def dtype_in_use(summary: Summary) -> str | None:
    """What forward and backward compute in: the choice made, the recipe's setting, or what was observed."""
    for tables in (summary.choices, summary.config):
        value = table(tables, "precision").get("compute")
        if isinstance(value, str) and value != "auto":
            return value
    observed = summary.env.get("dtype_in_use")
    if isinstance(observed, Mapping) and observed:  # share of the FLOPs by dtype
        return str(max(observed, key=lambda d: measured(observed[d]) or 0.0))
    return str(observed[0]) if isinstance(observed, list) and observed else None


# ---- learning -------------------------------------------------------------------------------------------------------


def _learning(summary: Summary) -> Iterator[Finding]:
    quality = summary.quality
    if quality is None or quality.split == "train":
        return
    points = [
        (r["step"], v)
        for r in summary.evaluations
        if r["split"] == quality.split and (v := measured(r.get(quality.metric))) is not None
    ]
    if len(points) < 3:
        return
    sign = 1 if quality.lower_is_better else -1
    worse = sign * (quality.last - quality.best) / max(abs(quality.best), 1e-12)
    if worse > 0.01:
        yield Finding(
            "The model was better before the end",
            f"{quality.name} on {quality.split} was {quality.best:.4g} at step {quality.best_step} and is "
            f"{quality.last:.4g} at step {quality.last_step}.",
            "Use the checkpoint nearest to its best step, train for fewer steps, or add data.",
            _settings(summary, "num_steps", "optimizer.weight_decay"),
            about="learning",
        )
        return
    late = [p for p in points if p[0] >= 0.75 * quality.last_step]
    gain = sign * (late[0][1] - late[-1][1]) / max(abs(late[0][1]), 1e-12) if len(late) > 1 else 0.0
    if gain > 0.01:
        yield Finding(
            "Train longer: it was still learning",
            f"{quality.name} on {quality.split} went from {late[0][1]:.4g} at step {late[0][0]} to "
            f"{late[-1][1]:.4g} at step {late[-1][0]}, the last quarter of the run ({percent(gain)}).",
            "What more steps would bring was not measured.",
            _settings(summary, "num_steps"),
            about="learning",
        )


def _settings(summary: Summary, *paths: str) -> str | None:
    """The settings a finding is about with their present values: `loader.num_workers (now 0), ...`."""
    found = []
    for path in paths:
        value: Any = summary.config
        for part in path.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        shown = str(value).lower() if isinstance(value, bool) else value
        found.append(path if value is None else f"{path} (now {shown})")
    return ", ".join(found) or None
