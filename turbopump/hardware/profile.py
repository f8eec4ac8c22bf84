"""What a machine can do, as measured: `machine.json` in memory. Without torch.

A `Trial` is one thing to measure: an operation, by one route, with so many threads. Its `Measurement` is a row of
the profile. Each domain (compute, comms, data) makes its own trials and rows and owns what they mean; this file only
keeps them. docs/machine-json.md describes every field.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from turbopump.core.errors import ProfileError
from turbopump.core.files import from_json, from_json_as, to_json, write_atomic
from turbopump.core.version import VERSION
from turbopump.core.workload import Op
from turbopump.hardware.specs import DeviceSpec, LinkSpec, Provenance, StorageSpec
from turbopump.hardware.timing import NOISY_SPREAD, NOISY_WAITED, Timing

SCHEMA = 1
Scalar = int | float | bool | str


@dataclass(frozen=True)
class Trial:
    """An operation to be measured by `route`; `tier` 0 comes first and is measured in the shortest budget too."""

    op: Op
    route: str = "default"
    threads: int = 1
    device: str = "cpu"
    tier: int = 1

    @property
    def key(self) -> str:
        """What a row is found by: the operation and how it was computed."""
        return f"{self.op.key} by {self.route} on {self.device}, {self.threads} threads"


Domain = Literal["compute", "memory", "host", "comms", "data"]


@dataclass(frozen=True)
class Request:
    """What `probe` asks of a domain's `bench.py`, which has two functions:

    - `trials(request) -> list[Trial]`: what is worth measuring here, the most telling first (tier 0 before 1 before 2);
    - `measure(trials, request, until) -> Iterator[Measurement]`: a row a trial, in order; it starts none that cannot
      end by `until` (of `time.monotonic()`), and cleans up after itself however it ends.
    """

    device: str = "cpu"
    threads: tuple[int, ...] = (1,)
    """Of one process: each count is measured; the first is what `train` would use."""
    suite: Literal["generic", "deepbench"] = "generic"
    ops: tuple[Op, ...] = ()
    """The operations of a recipe: measured before all others."""
    row_s: float = 0.1
    """Wall time for one row, beside its preparation."""
    directory: Path = Path(".")
    """Where storage is measured."""
    max_ranks: int = 2
    domains: tuple[Domain, ...] = ("compute", "memory", "host", "comms", "data")


@dataclass(frozen=True)
class Measurement:
    """One row: how long an operation took by one route. A route that does not work has a `problem` and no times."""

    domain: Domain
    kind: str
    """The operation's class, e.g. `Gemm`."""
    op: Mapping[str, Scalar]
    """The operation's fields."""
    route: str
    threads: int
    device: str
    clock: str = ""
    runs: int = 0
    calls: int = 0
    min_s: float | None = None
    median_s: float | None = None
    p90_s: float | None = None
    wall_s: float | None = None
    waited: float = 0.0
    flushed_s: float | None = None
    """Median with the caches emptied before each call, where that was measured."""
    flops: float = 0.0
    bytes: float = 0.0
    error: float | None = None
    """Relative difference (of norms) from the same operation in fp64 on the same inputs."""
    library: str = ""
    peak_share: float | None = None
    """FLOPs over the fastest time, over the device's theoretical peak for the dtype."""
    facts: Mapping[str, Scalar] = field(default_factory=dict)
    """What else the domain has to say of the row, e.g. the engine of a read."""
    problem: str = ""

    @classmethod
    def of(cls, trial: Trial, domain: Domain, timing: Timing, **more: Any) -> Measurement:
        """The row of a trial that was timed."""
        return replace(
            cls.failed(trial, domain, ""), clock=timing.clock, runs=timing.runs, calls=timing.calls,
            min_s=timing.min_s, median_s=timing.median_s, p90_s=timing.p90_s, wall_s=timing.wall_s,
            waited=timing.waited, **more,
        )  # fmt: skip

    @classmethod
    def failed(cls, trial: Trial, domain: Domain, problem: str) -> Measurement:
        """The row of a trial that does not work here, with the reason in one line."""
        op = {f.name: getattr(trial.op, f.name) for f in fields(trial.op)}
        cost = trial.op.cost
        return cls(domain, type(trial.op).__name__, op, trial.route, trial.threads, trial.device,
                   flops=cost.flops, bytes=cost.bytes, problem=problem)  # fmt: skip

    @property
    def op_key(self) -> str:
        """As `Op.key`."""
        return f"{self.kind}({','.join(f'{name}={value}' for name, value in self.op.items())})"

    @property
    def key(self) -> str:
        """As `Trial.key`."""
        return f"{self.op_key} by {self.route} on {self.device}, {self.threads} threads"

    @property
    def dtype(self) -> str:
        return str(self.op.get("dtype", ""))

    @property
    def works(self) -> bool:
        return self.median_s is not None and not self.problem

    @property
    def seconds(self) -> float:
        """The typical time, which predictions are made from: the median."""
        if self.median_s is None:
            raise ProfileError(f"{self.key} was not measured: {self.problem}")
        return self.median_s

    @property
    def spread(self) -> float:
        if not self.median_s or self.min_s is None or self.p90_s is None:
            return 0.0
        return (self.p90_s - self.min_s) / self.median_s

    @property
    def noisy(self) -> bool:
        return self.spread > NOISY_SPREAD or self.waited > NOISY_WAITED

    @property
    def flops_per_s(self) -> float:
        """The best rate; 0 where nothing was measured or the operation counts no FLOPs."""
        return self.flops / self.min_s if self.min_s else 0.0

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.min_s if self.min_s else 0.0


@dataclass(frozen=True)
class Curve:
    """An efficiency curve that was fitted to another machine's rows; the domain that fitted it knows its parameters."""

    kind: str
    dtype: str
    parameters: Mapping[str, float]
    relative: str
    """The device it was measured on."""
    source: str
    error: float | None = None
    """Median relative error on rows that were not fitted."""


@dataclass(frozen=True)
class RunCalibration:
    """What real runs on this machine have taught the planner (`turbopump plan --calibrate RUN...`)."""

    values: Mapping[str, float]
    """Structural numbers of the planner, by name."""
    bands: Mapping[str, float]
    """Half-width of each one's 80 % band, in the logarithm."""
    digest: str
    """Of the runs' records that were read."""
    runs: tuple[str, ...]
    """Their names."""
    num_steps: int
    date: str
    error_before: float
    """Mean relative error of the predicted steps by the numbers that ship."""
    error: float
    """The same by these numbers; of each run by those that the others taught, where there are several."""


@dataclass(frozen=True)
class MachineProfile:
    """All that is known of a machine's speed. `rows` are measured; a datasheet profile has `curves` instead."""

    schema: int
    written_by: str
    date: str
    name: str
    provenance: Provenance
    fingerprint: str
    """Of the hardware (turbopump.hardware.detect.fingerprint): another machine has another one."""
    machine: Mapping[str, Any]
    software: Mapping[str, str]
    devices: tuple[DeviceSpec, ...]
    links: tuple[LinkSpec, ...] = ()
    storage: tuple[StorageSpec, ...] = ()
    rows: tuple[Measurement, ...] = ()
    curves: tuple[Curve, ...] = ()
    quality: Mapping[str, float] = field(default_factory=dict)
    """`spread`, `waited` (medians over the rows) and `noisy` (share of rows)."""
    left_out: tuple[str, ...] = ()
    """What the budget had no room for, a line a group."""
    uncertain: tuple[str, ...] = ()
    """What is less certain than it could be, and why (page cache not dropped, clocks not locked)."""
    request: Mapping[str, Any] = field(default_factory=dict)
    """What `probe` was asked: budget, suites, domains, threads."""
    calibration: RunCalibration | None = None

    def of_kind(self, kind: str, dtype: str | None = None, *, works: bool = True) -> Iterator[Measurement]:
        """Rows of one operation class, e.g. `Gemm`."""
        for row in self.rows:
            if row.kind == kind and (dtype is None or row.dtype == dtype) and (row.works or not works):
                yield row

    def find(self, op: Op) -> list[Measurement]:
        """All rows of exactly this operation, by any route."""
        key = op.key
        return [row for row in self.rows if row.op_key == key]


def save(profile: MachineProfile, path: Path | str) -> None:
    """Write machine.json in one piece; raises `RunDirectoryError` where the disk does not take it."""
    write_atomic(Path(path), to_json(profile, indent=True))


def load(path: Path | str) -> MachineProfile:
    """The profile at `path`; raises `ProfileError` for a missing, damaged or foreign file."""
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ProfileError(f"no machine file at {path}: write one with `turbopump probe --output {path}`") from error
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        table = from_json(data)
    except ValueError as error:
        raise ProfileError(f"{path} is not valid JSON ({error}): probe the machine again") from error
    if not isinstance(table, dict) or "schema" not in table or "rows" not in table:
        raise ProfileError(f"{path} is not a machine file: it has no schema and rows; `turbopump probe` writes one")
    if table["schema"] != SCHEMA:
        raise ProfileError(
            f"{path} has schema {table['schema']!r}, written by turbopump {table.get('written_by', 'unknown')}; "
            f"this is {VERSION}, which reads schema {SCHEMA}: probe the machine again"
        )
    try:
        profile: MachineProfile = from_json_as(data, MachineProfile)
    except ValueError as error:
        raise ProfileError(f"{path} is not a valid machine file ({error}): probe the machine again") from error
    return profile


def check_same_machine(profile: MachineProfile, fingerprint: str, here: str, path: Path | str) -> None:
    """Raise `ProfileError` if the profile was measured on another machine than this one, called `here`."""
    if profile.provenance == "measured" and profile.fingerprint != fingerprint:
        raise ProfileError(
            f"{path} was measured on {profile.name} ({profile.fingerprint}), and this machine is {here} "
            f"({fingerprint}): give another --output, or --overwrite to replace it"
        )


@dataclass(frozen=True)
class Prediction:
    """How long an operation should take, with its 80 % band, and what that rests on."""

    seconds: float
    low_s: float
    high_s: float
    basis: Literal["measured", "interpolated", "curve", "roofline"]
    route: str = "default"
