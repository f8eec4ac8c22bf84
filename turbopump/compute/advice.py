"""What would change for a recipe: its operations' best routes, grouped into changes a user can make. Without torch.

A change is a switch, a layout, a compiler, an algorithm, a number of threads. A *global* one holds for every operation
it touches, so those it slows down count too, and the whole step decides. A *local* one is made only where it helps.
A change of precision (bf16 instead of fp32, or a switch whose error says that it is one) gives other results and
stands apart. Gains are sums over operations measured alone: what operations cost each other (caches, launches) and
what lies between them is not in them; neither is what a compiler gains by joining neighbours.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from turbopump.compute.choice import DEFAULT, Choice, Estimate, best_route, estimates, noise_of
from turbopump.core.units import human_seconds, printable
from turbopump.core.workload import Op, Workload
from turbopump.hardware.profile import MachineProfile, Measurement

WIDEST = 100
TABLE = 72  # columns of a line of figures
LEAST_SHARE = 0.002  # of the step: less is not worth a line


@dataclass(frozen=True)
class Change:
    """What a user does to get a route."""

    name: str
    how: str
    """The code or setting."""
    scope: Literal["global", "local"] = "global"


CHANGES: Mapping[str, Change] = {
    "mkldnn.matmul.fp32_precision=bf16": Change(
        "products by oneDNN", 'torch.backends.mkldnn.matmul.fp32_precision = "bf16"'
    ),
    "mkldnn.enabled=false": Change("without oneDNN", "torch.backends.mkldnn.set_flags(False)"),
    "mkldnn._linear_pointwise": Change(
        "linear layers by oneDNN", "torch.ops.mkldnn._linear_pointwise in place of F.linear", "local"
    ),
    "channels_last": Change("channels last", "model.to(memory_format=torch.channels_last), and the images"),
    "cublas": Change("products by cuBLAS", 'torch.backends.cuda.preferred_blas_library("cublas")'),
    "cublaslt": Change("products by cuBLASLt", 'torch.backends.cuda.preferred_blas_library("cublaslt")'),
    "cudnn.benchmark=true": Change("cuDNN by trial", "torch.backends.cudnn.benchmark = True"),
    "cudnn.enabled=false": Change("without cuDNN", "torch.backends.cudnn.enabled = False"),
    "inductor": Change("compiled by inductor", "torch.compile(model)"),
    "optimizer.foreach": Change("optimizer over all tensors", "torch.optim...(foreach=True, fused=False)"),
    "optimizer.single_tensor": Change("optimizer tensor by tensor", "torch.optim...(foreach=False, fused=False)"),
}
"""By route; routes without an entry are algorithms to be called in place of PyTorch's (see `change_of`)."""

OWN_KERNELS: Mapping[str, frozenset[str]] = {"cpu": frozenset({"Attention"})}
"""Operations that the models compute by kernels of their own (models/transformer/fused.py), by device: what a switch
does to PyTorch's kernel says nothing of them. oneDNN's products make PyTorch's attention 1.4 to 1.6 times as slow in
fp32 (AMD EPYC, Zen 4), and the transformer's blocks not."""

PRECISIONS: Mapping[str, Change] = {
    "bf16": Change("bf16 products", 'precision.compute = "bf16" (torch.autocast)'),
    "tf32": Change("tf32 products", 'torch.backends.cuda.matmul.fp32_precision = "tf32"'),
}


def change_of(route: str) -> Change:
    """The change that brings a route."""
    if route in CHANGES:
        return CHANGES[route]
    if route.startswith("sdpa="):
        backend = route.removeprefix("sdpa=").upper()
        return Change(f"attention: {route}", f"torch.nn.attention.sdpa_kernel, SDPBackend.{backend}*")
    return Change(route, f"route {route!r} of turbopump.compute in place of PyTorch's function", "local")


@dataclass(frozen=True)
class Effect:
    """What a change does to one operation of the step, all its repetitions together."""

    op_key: str
    count: int
    default_s: float
    seconds: float
    noise_s: float
    error: float | None
    basis: str
    evidence: tuple[Measurement, ...] = field(repr=False)

    @property
    def saved_s(self) -> float:
        return self.default_s - self.seconds


@dataclass(frozen=True)
class AdvisedChange:
    """A change with what it should gain of the step; `effects` are the operations concerned, helped or hurt."""

    change: Change
    route: str
    """As in the rows; of a change of precision the dtype, of threads `threads=N`."""
    exact: bool
    """The same results within the dtype's rounding."""
    effects: tuple[Effect, ...]
    step_s: float

    @property
    def saved_s(self) -> float:
        return sum(e.saved_s for e in self.effects)

    @property
    def band_s(self) -> tuple[float, float]:
        """95 %: the noise of all rows concerned."""
        half = math.sqrt(sum(e.noise_s**2 for e in self.effects))
        return self.saved_s - half, self.saved_s + half

    @property
    def share(self) -> float:
        """Of the step's time."""
        return self.saved_s / self.step_s if self.step_s else 0.0

    @property
    def pays(self) -> bool:
        return self.band_s[0] > 0 and self.share >= LEAST_SHARE

    @property
    def helped(self) -> int:
        return sum(e.saved_s > 0 for e in self.effects)

    @property
    def hurt(self) -> int:
        return len(self.effects) - self.helped

    @property
    def error(self) -> float | None:
        return max((e.error for e in self.effects if e.error is not None), default=None)

    @property
    def basis(self) -> str:
        """`measured`, or how many of the operations are judged by the nearest shapes."""
        near = sum(e.basis == "nearest" for e in self.effects)
        return "measured" if not near else f"{len(self.effects) - near} measured, {near} from the nearest shapes"


@dataclass(frozen=True)
class Advice:
    """What to change for a workload on a machine, best first."""

    workload: str
    dtype: str
    machine: str
    threads: int
    step_s: float
    """Of all operations whose default is known, one microbatch and update, by the defaults."""
    changes: tuple[AdvisedChange, ...]
    """All that were measured, those that do not pay included; by gain."""
    choices: tuple[tuple[Choice, int], ...]
    """The best route of every operation, with its repetitions."""
    missing: tuple[str, ...]
    """Operations of which nothing is known."""
    untouched: tuple[str, ...]
    """Kinds that the model computes by kernels of its own: no change is credited with them, or charged."""
    together: tuple[AdvisedChange, ...]
    """The exact changes to be made together; each with the operations it still changes after those before it."""

    @property
    def together_s(self) -> float:
        """What the changes of `together` should save."""
        return sum(c.saved_s for c in self.together)

    @property
    def together_band_s(self) -> tuple[float, float]:
        half = math.sqrt(sum(e.noise_s**2 for c in self.together for e in c.effects))
        return self.together_s - half, self.together_s + half

    @property
    def gain(self) -> float:
        """Predicted step time by the defaults over that with all exact changes."""
        return self.step_s / (self.step_s - self.together_s) if self.step_s else 1.0

    @property
    def noisy_share(self) -> float:
        """Of the rows that the changes which pay rest on."""
        rows = {row.key: row for c in self.changes if c.pays for e in c.effects for row in e.evidence}
        return sum(row.noisy for row in rows.values()) / len(rows) if rows else 0.0

    @property
    def near(self) -> int:
        return sum(choice.basis == "nearest" for choice, _ in self.choices)


def advise(
    profile: MachineProfile, workload: Workload, *, threads: int, device: str = "cpu",
    own_kernels: Collection[str] | None = None,
) -> Advice:  # fmt: skip
    """The changes that should make a step of `workload` faster, from the profile's rows on `threads` threads.

    `own_kernels` are the kinds of operations that the model does not compute by PyTorch's functions; without it those
    of Turbopump's models (`OWN_KERNELS`).
    """
    own = frozenset(OWN_KERNELS.get(device, ()) if own_kernels is None else own_kernels)
    counts: Counter[Op] = Counter()
    for op, count in workload.ops():
        counts[op] += count
    counts.update(workload.optimizer_ops)
    known = {op: estimates(profile, op, threads=threads, device=device) for op in counts}
    step_s = sum(n * known[op][DEFAULT].seconds for op, n in counts.items() if known[op])
    changes = sorted(
        (
            *_routes({op: n for op, n in counts.items() if type(op).__name__ not in own}, known, step_s),
            *_precisions(profile, counts, known, threads, device, step_s),
            *_threads(profile, counts, threads, device, step_s),
        ),
        key=lambda change: -change.saved_s,
    )
    return Advice(
        workload=workload.name, dtype=workload.dtype, machine=profile.name, threads=threads, step_s=step_s,
        changes=tuple(changes),
        choices=tuple((best_route(profile, op, threads=threads, device=device), n) for op, n in counts.items()),
        missing=tuple(op.key for op in counts if not known[op]),
        untouched=tuple(sorted({type(op).__name__ for op in counts} & own)),
        together=_together(changes),
    )  # fmt: skip


def _effect(op: Op, count: int, estimate: Estimate) -> Effect:
    default_s, seconds = count * estimate.default_seconds, count * estimate.seconds
    return Effect(op.key, count, default_s, seconds, seconds * estimate.noise, estimate.error, estimate.basis,
                  estimate.evidence)  # fmt: skip


def _routes(
    counts: Mapping[Op, int], known: Mapping[Op, Mapping[str, Estimate]], step_s: float
) -> Iterator[AdvisedChange]:
    names = dict.fromkeys(name for found in known.values() for name in found if name != DEFAULT)
    for name in names:
        change = change_of(name)
        found = {op: known[op][name] for op in counts if name in known[op]}
        if change.scope == "local":
            found = {op: e for op, e in found.items() if e.exact and e.gain > 1 + e.noise}
        effects = tuple(_effect(op, counts[op], e) for op, e in found.items())
        if effects:
            yield AdvisedChange(change, name, all(e.exact for e in found.values()), effects, step_s)


def _precisions(
    profile: MachineProfile, counts: Mapping[Op, int], known: Mapping[Op, Mapping[str, Estimate]], threads: int,
    device: str, step_s: float,
) -> Iterator[AdvisedChange]:  # fmt: skip
    """Products in another dtype; the casts of operands (which autocast does once a step for weights) not counted."""
    for dtype, change in PRECISIONS.items():
        effects = []
        for op, count in counts.items():
            if getattr(op, "dtype", "") != "fp32" or not op.cost.flops or not known[op]:
                continue
            typed: Any = op
            other = estimates(profile, replace(typed, dtype=dtype), threads=threads, device=device).get(DEFAULT)
            own = known[op][DEFAULT]
            if other is not None:
                noise = sum(noise_of(e.evidence[0]) for e in (own, other)) + own.noise + other.noise
                both = "measured" if own.basis == other.basis == "measured" else "nearest"
                effects.append(Effect(op.key, count, count * own.seconds, count * other.seconds,
                                      count * other.seconds * noise, other.error, both,
                                      (*own.evidence, *other.evidence)))  # fmt: skip
        if effects:
            yield AdvisedChange(change, dtype, False, tuple(effects), step_s)


def _threads(
    profile: MachineProfile, counts: Mapping[Op, int], threads: int, device: str, step_s: float
) -> Iterator[AdvisedChange]:
    """Other numbers of threads, by the wall clock, of exactly these operations."""
    rows = {(r.op_key, r.threads): r for r in profile.rows
            if r.route == DEFAULT and r.device == device and r.works and r.wall_s}  # fmt: skip
    for other in sorted({n for _, n in rows} - {threads}):
        effects = []
        for op, count in counts.items():
            own, new = rows.get((op.key, threads)), rows.get((op.key, other))
            if own is not None and new is not None and own.wall_s and new.wall_s:
                noise_s = count * new.wall_s * (noise_of(own) + noise_of(new))
                effects.append(Effect(op.key, count, count * own.wall_s, count * new.wall_s, noise_s, new.error,
                                      "measured", (own, new)))  # fmt: skip
        if effects:
            change = Change(f"{other} threads", f"OMP_NUM_THREADS={other}")
            yield AdvisedChange(change, f"threads={other}", True, tuple(effects), step_s)


def _together(changes: Iterable[AdvisedChange]) -> tuple[AdvisedChange, ...]:
    """Exact changes that pay, best first, each counted only for operations that none before it has changed: nobody
    measured two on one. Threads stay as they are."""
    taken: set[str] = set()
    kept = []
    for change in changes:
        if not change.exact or change.route.startswith("threads="):
            continue
        rest = replace(change, effects=tuple(e for e in change.effects if e.op_key not in taken))
        if rest.effects and rest.pays:
            kept.append(rest)
            taken |= {e.op_key for e in rest.effects}
    return tuple(kept)


# ---- for the terminal


def format_advice(advice: Advice, recipe: str = "RECIPE", columns: int = 80) -> str:
    """The advice as text of at most `columns` (72 to 100), ordered by gain; says what is not known."""
    width = max(TABLE, min(columns, WIDEST))
    if not advice.step_s:
        text = f"nothing is known of {advice.workload} on {advice.machine}: probe --for {recipe} measures it"
        return "\n".join(_folded(printable(text), width))
    lines = [
        f"{advice.workload} in {advice.dtype} on {advice.machine}, {advice.threads} thread"
        f"{'s' * (advice.threads != 1)}: a step's operations take {human_seconds(advice.step_s)} by PyTorch's defaults",
        *_known(advice, recipe), "",
    ]  # fmt: skip
    exact = [c for c in advice.changes if c.exact and c.pays]
    lines += _table("same results", exact) if exact else ["same results: nothing to gain beyond the noise of the rows"]
    if advice.together:
        low, high = (s / advice.step_s for s in advice.together_band_s)
        lines += ["", f"together ({', '.join(c.change.name for c in advice.together)}): "
                  f"{human_seconds(advice.together_s)}, {advice.together_s / advice.step_s:.1%} of the step "
                  f"({low:.1%} to {high:.1%}), {advice.gain:.2f} times as fast"]  # fmt: skip
    if other := [c for c in advice.changes if not c.exact and c.pays]:
        lines += ["", *_table("other precision: results change", other)]
    if advice.noisy_share > 0:
        share = f"{advice.noisy_share:.0%}"
        lines += ["", f"{share} of the rows behind these gains are noisy: probe again when the machine has less to do"]
    if advice.untouched:
        lines += ["", f"left as it is, by the model's own kernel: {', '.join(advice.untouched)}"]
    if rest := [c for c in advice.changes if not c.pays]:
        lines += ["", "no gain over the step: " + ", ".join(f"{c.change.name} ({c.share:+.1%})" for c in rest)]
    return "\n".join(part for line in lines for part in _folded(printable(line), width))


def _known(advice: Advice, recipe: str) -> Iterator[str]:
    measured = len(advice.choices) - advice.near - len(advice.missing)
    text = f"{len(advice.choices)} different operations: {measured} measured"
    if advice.near:
        text += f", {advice.near} from the nearest measured shapes"
    if advice.missing:
        text += f", {len(advice.missing)} unknown"
    yield text
    if advice.near or advice.missing:
        yield f"probe --for {recipe} measures them"


def _table(title: str, changes: Iterable[AdvisedChange]) -> list[str]:
    lines = [f"{title:<31}{'saves':>9}  {'of the step':<25}error", "-" * TABLE]
    for c in changes:
        low, high = (s / c.step_s for s in c.band_s)
        band = f"{c.share:.1%} ({low:.1%} to {high:.1%})"
        error = f"{c.error:.0e}" if c.error is not None else ""
        lines.append(f"{c.change.name[:30]:<31}{human_seconds(c.saved_s):>9}  {band:<25}{error}".rstrip())
        lines.append(f"    {c.change.how}")
        hurt = f", {c.hurt} slower" if c.hurt else ""
        lines.append(f"    {c.helped} operation{'s' * (c.helped != 1)} faster{hurt}; {c.basis}")
    return lines


def _folded(line: str, width: int) -> list[str]:
    """The line broken at spaces so that it fits; figures stay in their columns."""
    return textwrap.wrap(line, width, subsequent_indent="    ", break_on_hyphens=False) if len(line) > width else [line]
