"""Efficiency curves that a machine borrows from a measured relative, over typical shapes and marked as borrowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

from turbopump.compute import efficiency
from turbopump.compute.features import Case
from turbopump.compute.ops import Attention, Conv2d, Gemm, Rnn
from turbopump.core.units import human, human_seconds
from turbopump.core.workload import Op
from turbopump.hardware.profile import Curve, MachineProfile
from turbopump.reporting.plots import Figure, Table, Trace, layout
from turbopump.reporting.probe_axes import dots, dtype_colour, rate_axis
from turbopump.reporting.probe_rows import dtype_order, family_of
from turbopump.reporting.words import percent


def _sizes(low: int, high: int) -> list[int]:
    """Doubling, with the size half-way between."""
    found = []
    while low <= high:
        found += [low, low * 3 // 2]
        low *= 2
    return found[:-1]


SWEEPS: dict[str, tuple[str, Callable[[str], Sequence[Op]]]] = {
    "Gemm": ("n×n×n", lambda dtype: [Gemm(n, n, n, dtype) for n in _sizes(64, 8192)]),
    "Conv2d": (
        "3×3 on 28×28, batch 32, channels from 16 to 1024",
        lambda dtype: [Conv2d(32, c, 28, 28, c, 3, 3, 1, 1, 1, 1, dtype) for c in _sizes(16, 1024)],
    ),
    "Rnn": (
        "LSTM, batch 64, 50 steps, 128 to 4096 units",
        lambda dtype: [Rnn("lstm", 64, 50, h, h, False, dtype) for h in _sizes(128, 4096)],
    ),
    "Attention": (
        "causal, batch 4, 16 heads of 128, 128 to 8192 positions",
        lambda dtype: [Attention(4, 16, 16, t, t, 128, True, dtype) for t in _sizes(128, 8192)],
    ),
}


def borrowed_curves(profile: MachineProfile) -> list[Figure]:
    """A figure a kind with borrowed curves: share of the peak against size, a curve a dtype."""
    found = []
    for kind in dict.fromkeys(curve.kind for curve in profile.curves):
        if kind in SWEEPS and profile.devices:
            figure = _figure(profile, kind)
            found += [figure] if figure is not None else []
    return found


def _figure(profile: MachineProfile, kind: str) -> Figure | None:
    device = profile.devices[0]
    words, sweep = SWEEPS[kind]
    own = {curve.dtype: curve for curve in profile.curves if curve.kind == kind}
    data: list[Trace] = []
    rows: list[list[str]] = []
    for index, dtype in enumerate(d for d in dtype_order(own) if device.flops_per_s.get(d)):
        ops, peak = sweep(dtype), device.flops_per_s[dtype]
        times_s = efficiency.seconds(
            own[dtype].parameters, [Case.of(op) for op in ops], peak, device.memory_bytes_per_s or inf
        ).tolist()
        data.append(_trace(ops, times_s, peak, own[dtype], index))
        rows += [[op.key, human_seconds(s), percent(op.cost.flops / s / peak)] for op, s in zip(ops, times_s)]
    if not data:
        return None
    relatives = ", ".join(dict.fromkeys(own[d].relative for d in dtype_order(own)))
    family = family_of(kind).name
    bars = "; bars: the median error" if any(curve.error for curve in own.values()) else ""
    return Figure(
        id=f"borrowed-{kind.lower()}",
        title=f"{family[0].upper()}{family[1:]}, borrowed from {relatives}",
        summary=f"Share of the datasheet's peak by FLOPs, as {relatives} reaches it.",
        data=data,
        layout=layout(x="FLOPs of the operation", y="% of the peak", height=290, hovermode="closest",
                      xaxis=rate_axis([x for t in data for x in t["x"]]), yaxis={"range": [0, 105]}),
        table=Table(["operation", "time", "of the peak"], rows),
        legend=True,
        note=f"Not measured on this machine. {words}{bars}.",
    )  # fmt: skip


def _trace(ops: Sequence[Op], times_s: Sequence[float], peak: float, curve: Curve, index: int) -> Trace:
    flops = [op.cost.flops for op in ops]
    share = [100 * f / s / peak for f, s in zip(flops, times_s)]
    texts = [
        f"{op.key} · {human_seconds(s)} · {human(f / s, 'FLOP/s')} · borrowed from {curve.relative}"
        for op, s, f in zip(ops, times_s, flops)
    ]
    off, colour = 1 + (curve.error or 0.0), dtype_colour(curve.dtype, index)
    trace = dots(flops, share, texts, name=f"{curve.dtype}, borrowed", colour=colour, size=6, symbol="circle-open",
                 low=[value / off for value in share], high=[value * off for value in share])  # fmt: skip
    return trace | {"mode": "lines+markers", "line": {"color": colour, "dash": "dash", "width": 1}}
