"""The models of time and memory as the search takes them: of a machine with the calibration that ships or its own."""

from __future__ import annotations

from turbopump.core.errors import CatalogError
from turbopump.planner.calibration import Calibration
from turbopump.planner.cases import Cases, StepTimes
from turbopump.planner.machine import Machine
from turbopump.planner.memory import PARTS, RANK_CLASSES, memory_bytes
from turbopump.planner.search import Fit, Models
from turbopump.planner.step import step_times


def decoder_models(calibration: Calibration) -> Models:
    """Predictions of decoders by the shipped models with this calibration."""

    def times(cases: Cases, machine: Machine) -> StepTimes:
        return step_times(cases, machine, calibration)

    return Models(times, fit_in_memory, calibration.sigma)


def fit_in_memory(cases: Cases, machine: Machine) -> Fit:
    """Peak memory of the fullest rank, and whether it fits; raises `CatalogError` for a device of unknown memory."""
    if machine.device.memory_bytes is None:
        raise CatalogError(f"{machine.device.name}: memory_gib is not known: give it in its entry, or nothing can fit")
    use = memory_bytes(cases)
    return Fit(use.worst, use.fits(machine.device.memory_bytes))


def memory_of_ranks(cases: Cases) -> dict[str, dict[str, float]]:
    """Bytes of one case by rank class (first, middle, last stage) and part."""
    use = memory_bytes(cases)
    return {rank: {part: float(getattr(use, part)[row, 0]) for part in PARTS} for row, rank in enumerate(RANK_CLASSES)}
