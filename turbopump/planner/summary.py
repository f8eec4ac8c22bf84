"""How big a run is, from its recipe alone: parameters, FLOPs, memory. No torch, no data, no measurement."""

from __future__ import annotations

from dataclasses import dataclass

from turbopump.core import plugins
from turbopump.core.config import Config
from turbopump.core.errors import DatasetError
from turbopump.core.units import human, human_bytes
from turbopump.core.workload import Workload

WEIGHT_BYTES = GRADIENT_BYTES = 4  # fp32 in every precision there is: bf16 is autocast
OPTIMIZER_BYTES = {"adamw": 8, "muon": 4}  # two fp32 moments, or one momentum for the matrices


@dataclass(frozen=True)
class Summary:
    """Sizes of one run. Memory is per process; `kept_bytes` the activations of one microbatch kept for backward."""

    params: int
    unit: str
    units_per_step: int
    flops_per_step: float
    flops_per_unit: float
    forward_flops_per_unit: float
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    kept_bytes: int

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.optimizer_bytes + self.kept_bytes


def misfits(config: Config) -> list[str]:
    """Sizes of the model that do not fit the dataset's, each with what is given, needed and to be done.

    A dataset that is not there yet is not compared: its own error comes when it is opened.
    """
    if config.model.kind == "live" or config.data.kind == "live":
        return []
    try:
        shape = plugins.find("turbopump.sources", config.data.kind).shape(config.data)
    except DatasetError:
        return []
    check = getattr(config.model, "misfits", None)
    return [f"model.{problem}" for problem in check(shape)] if check else []


def microbatch_workload(config: Config, *, num_processes: int = 0, dtype: str | None = None) -> Workload | None:
    """The operations of one microbatch of a recipe on one device; None for a live model, which only its code knows."""
    processes = num_processes or config.launch.num_processes or 1
    return _workload(config, config.microbatch or max(1, config.global_batch // processes), dtype)


def _workload(config: Config, samples: int, dtype: str | None = None) -> Workload | None:
    if config.model.kind == "live" or config.data.kind == "live":
        return None
    shape = plugins.find("turbopump.sources", config.data.kind).shape(config.data)
    made: Workload = plugins.find("turbopump.models", config.model.kind).workload(
        config.model, samples, shape, dtype or ("bf16" if config.precision.compute == "bf16" else "fp32")
    )
    return made


def summarize(config: Config, *, num_processes: int = 0) -> Summary | None:
    """The sizes of a recipe; None for a live model, whose shapes only its own code knows."""
    step, micro = _workload(config, config.global_batch), microbatch_workload(config, num_processes=num_processes)
    if step is None or micro is None:
        return None
    recompute = getattr(config.model, "recompute", "none")
    return Summary(
        params=step.params,
        unit=step.unit,
        units_per_step=step.units,
        flops_per_step=step.cost.flops,
        flops_per_unit=step.cost.flops / step.units,
        forward_flops_per_unit=step.forward_cost.flops / step.units,
        weight_bytes=step.params * WEIGHT_BYTES,
        gradient_bytes=step.params * GRADIENT_BYTES,
        optimizer_bytes=step.params * OPTIMIZER_BYTES[config.optimizer.kind],
        kept_bytes=micro.kept_bytes(recompute),
    )


def format_summary(summary: Summary | None, config: Config) -> str:
    """The summary as lines of text."""
    if summary is None:
        return "sizes: not known before the live model runs; the report of a run shows what was observed"
    unit = summary.unit
    rows = [
        ("parameters", human(summary.params)),
        (f"{unit}s a step", f"{summary.units_per_step:,}"),
        (f"{unit}s in all", f"{human(summary.units_per_step * config.num_steps)} ({config.num_steps:,} steps)"),
        (
            f"FLOPs {'an' if unit[0] in 'aeiou' else 'a'} {unit}",
            f"{human(summary.flops_per_unit)} (forward {human(summary.forward_flops_per_unit)})",
        ),
        ("FLOPs a step", human(summary.flops_per_step)),
        ("FLOPs in all", human(summary.flops_per_step * config.num_steps)),
        ("memory a process", f"{human_bytes(summary.memory_bytes)}, estimated:"),
        ("  weights", human_bytes(summary.weight_bytes)),
        ("  gradients", human_bytes(summary.gradient_bytes)),
        ("  optimizer", human_bytes(summary.optimizer_bytes)),
        ("  activations", f"{human_bytes(summary.kept_bytes)} for one microbatch"),
    ]
    return "\n".join(f"{name:<18}{value}" for name, value in rows)
