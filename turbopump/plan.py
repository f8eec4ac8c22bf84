"""The verb `plan`: how to train a model on a machine, how long it takes, what it costs, and how sure that is.

    from turbopump.plan import plan
    made = plan("config.json", device="h100-sxm", count=1024, link="infiniband-ndr", tokens=1e12)
    made.found.best, made.forecast

Decoders on accelerators are searched over all splits (planner/search.py) by a calibrated model of a step; any other
model, and any on a host's processors, is planned operation by operation and split over data (planner/op_search.py).
Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from turbopump.core.errors import CatalogError, PlanError, UsageError
from turbopump.core.files import digest, digest_file, to_json
from turbopump.core.version import VERSION
from turbopump.hardware import accelerators
from turbopump.hardware.datasheet import profile_from_datasheet
from turbopump.hardware.profile import MachineProfile
from turbopump.hardware.profile import load as load_profile
from turbopump.hardware.profile import save as save_profile
from turbopump.hardware.specs import DeviceSpec
from turbopump.planner import plan_file
from turbopump.planner.calibration import shipped
from turbopump.planner.candidates import Holds, Space, read_holds
from turbopump.planner.cases import Cases
from turbopump.planner.choice import Choice, Found
from turbopump.planner.forecast import Forecast, forecast_of, steps_of
from turbopump.planner.machine import Machine, from_catalog, from_profile, node_link
from turbopump.planner.op_search import Place, parts_of, search_ops
from turbopump.planner.plan_file import Inputs, PlanFile, Prediction, Sizes
from turbopump.planner.predictors import decoder_models, memory_of_ranks
from turbopump.planner.recipe_cases import Subject, read_subject
from turbopump.planner.search import search
from turbopump.reporting.plan_page import PlanView, write_page
from turbopump.reporting.plan_plots import ScalePoint
from turbopump.reporting.plan_text import summary, words

DEFAULT_MACHINE = "machine.json"
DEFAULT_LINK = "infiniband-ndr"
DEVICES_PER_NODE = 8


@dataclass(frozen=True)
class Target:
    """Where to train: a measured profile, or devices of the catalog with links between them."""

    name: str
    digest: str
    device: DeviceSpec
    num_devices: int
    """0: not said, on a host's processors, where each number of processes is tried."""
    devices_per_node: int
    profile: MachineProfile | None = None
    link: str = DEFAULT_LINK

    @property
    def is_host(self) -> bool:
        """Whether it computes with the processors of a host."""
        return self.profile is not None and _computes_on_host(self.profile)

    @property
    def words(self) -> str:
        """The machine for people: what joins its devices too."""
        if self.is_host:
            return f"{self.device.name} ({self.name})"
        within = f", {self.devices_per_node} a host" if self.devices_per_node > 1 else ""
        between = (
            f", {accelerators.link(self.link).name} between hosts" if self.num_devices > self.devices_per_node else ""
        )
        return f"{self.num_devices:,} x {self.device.name}{within}{between}"

    @property
    def memory_bytes(self) -> float | None:
        """Of one device."""
        return self.place().memory_bytes if self.is_host else self.device.memory_bytes

    def machine(self) -> Machine:
        """For the model of a decoder's step."""
        if self.profile is not None:
            measured = from_profile(self.profile, self.num_devices)
            node = measured.node or accelerators.link(node_link(self.device))
            network = accelerators.link(self.link) if self.num_devices > self.devices_per_node else None
            return replace(measured, devices_per_node=self.devices_per_node, network=network,
                           node=node if self.devices_per_node > 1 else None)  # fmt: skip
        return from_catalog(self.device, self.num_devices, devices_per_node=self.devices_per_node, network=self.link)

    def place(self) -> Place:
        """For planning operation by operation."""
        if self.profile is not None:
            return Place(self.profile, self.num_devices, self.devices_per_node)
        machine = self.machine()
        links = [link for link in (machine.node, machine.network) if link is not None]
        return Place(profile_from_datasheet(self.device, links=links), self.num_devices, self.devices_per_node)


@dataclass(frozen=True)
class Plan:
    """What is to be trained, where, how, and what follows."""

    subject: Subject
    target: Target
    found: Found
    forecast: Forecast
    file: PlanFile
    """As `plan.toml` holds it."""

    def to_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        best = asdict(self.file)
        return {
            **best,
            "forecast": {**asdict(self.forecast), "read_bytes_per_s": self.forecast.read_bytes_per_s,
                         "wall_s": self.forecast.goodput.wall_s, "goodput_share": self.forecast.goodput.goodput},
            "best": _choice_table(self.found.best),
            "runner_up": _choice_table(self.found.runner_up) if self.found.runner_up else None,
            "margin_sigmas": self.found.margin_sigmas,
            "alternatives": [asdict(one) for one in self.found.alternatives],
            "changes": [{"what": c.what, "kind": c.kind, "gain": c.gain, "flips": c.flips,
                         "choice": _choice_table(c.choice) if c.choice else None} for c in self.found.changes],
            "landscape": list(self.found.landscape),
            "notes": list(self.found.notes),
        }  # fmt: skip


def plan(
    recipe: Path | str,
    overrides: Sequence[str] = (),
    *,
    on: Path | str | None = None,
    device: str | None = None,
    count: int | None = None,
    link: str | None = None,
    devices_per_node: int | None = None,
    fix: Sequence[str] = (),
    seq_len: int = 0,
    global_batch: int = 0,
    steps: int | None = None,
    tokens: float | None = None,
    usd_per_hour: float | None = None,
) -> Plan:
    """Plan the training of `recipe`: a recipe, a Hugging Face config.json or a workload.json.

    `on` is a machine.json or a device of the catalog, `device` the latter alone, `count` how many of them (processes on
    a host's processors), `link` what joins hosts of `devices_per_node` devices; with none of these the machine.json
    of the working directory. `fix` holds choices (`"tp=4"`), `usd_per_hour` is the price of a device.

    Raises `UsageError` (`ConfigError`, `CatalogError`, `ProfileError`) for wrong input and `PlanError` where there is
    no plan: sizes that do not divide, a model that fits nowhere.
    """
    holds = read_holds(fix)
    target = find_target(on, device, count, link, devices_per_node)
    held_dtype = str(holds["dtype"][0]) if "dtype" in holds else ""
    subject = read_subject(recipe, overrides, seq_len=seq_len, global_batch=global_batch, dtype=held_dtype)
    return _plan(subject, target, holds, steps_of(subject, steps, tokens), usd_per_hour)


def _plan(
    subject: Subject, target: Target, holds: Holds, num_steps: int, usd_per_hour: float | None, *, changes: bool = True
) -> Plan:
    """The search that suits the model and the place, and what follows from its best."""
    if subject.case is not None and not target.is_host:
        calibration, machine = shipped(), target.machine()
        space = Space(subject.case, machine.num_devices, holds)
        found = search(space, machine, decoder_models(calibration), changes=changes)
        peak: float | None = machine.peak_flops_per_s(found.best.settings.dtype)
        assert found.best.case is not None
        memory = memory_of_ranks(Cases.of([found.best.case]))
        based_on = ("shipped", calibration.digest)
    else:
        if subject.workload is None:
            raise UsageError(
                f"{subject.path} gives the sizes of a decoder, which is planned on accelerators: name one with --device"
            )
        found = search_ops(subject, target.place(), holds)
        peak = target.device.flops_per_s.get(found.best.settings.dtype)
        memory = {"every": parts_of(subject, found.best)}
        runs = target.profile.calibration if target.profile else None
        based_on = (f"{len(runs.runs)} runs", runs.digest) if runs else ("", "")
    forecast = forecast_of(
        subject, found.best, target.device, num_steps=num_steps, usd_per_hour=usd_per_hour,
        storage=target.profile.storage[0] if target.profile and target.profile.storage else None,
        changes=found.changes, peak_flops_per_s=peak, num_devices=1 if target.is_host else None,
    )  # fmt: skip
    return Plan(subject, target, found, forecast, _file(subject, target, found, forecast, memory, based_on))


def scaling(made: Plan, usd_per_hour: float | None = None) -> tuple[ScalePoint, ...]:
    """The best plan for a quarter to four times as many devices, where those make a plan: time, dollars, energy.

    None for a run whose length was not said, or on a host.
    """
    target, steps = made.target, made.forecast.num_steps
    if target.is_host or target.profile is not None or not steps:
        return ()
    points = []
    for count in sorted({max(1, round(target.num_devices * times)) for times in (0.25, 0.5, 1, 2, 4)}):
        per_node = min(count, target.devices_per_node)
        try:
            other = made if count == target.num_devices else _plan(
                made.subject, replace(target, num_devices=count, devices_per_node=per_node), {}, steps, usd_per_hour,
                changes=False)  # fmt: skip
        except (PlanError, CatalogError):
            continue
        best, bill = other.found.best, other.forecast.bill
        usd, kwh = (bill.usd, bill.kwh) if bill else (None, None)
        points.append(ScalePoint(count, best.step_s, other.forecast.goodput.wall_s, usd, kwh, words(best)))
    return tuple(points)


def find_target(
    on: Path | str | None = None, device: str | None = None, count: int | None = None, link: str | None = None,
    devices_per_node: int | None = None,
) -> Target:  # fmt: skip
    """The machine that the options name; raises `UsageError`, `CatalogError`, `ProfileError` for what is none."""
    for name, value in (("--count", count), ("--devices-per-node", devices_per_node)):
        if value is not None and not 1 <= value <= 1 << 20:
            raise UsageError(f"{name}: {value} given; a whole number from 1 to {1 << 20} is needed")
    if on is not None and device is not None:
        raise UsageError(f"--on {on} and --device {device} both name a machine: give one of them")
    named = str(on) if on is not None else device
    if named is None or (device is None and _is_machine_file(named)):
        if devices_per_node is not None:
            raise UsageError("--devices-per-node is for devices of the catalog: a machine file says how many it has")
        return _measured(Path(named or DEFAULT_MACHINE), count, link)
    spec = accelerators.device(named)
    if link is not None:
        accelerators.link(link)
    num_devices = count or 1
    per_node = devices_per_node or min(DEVICES_PER_NODE, num_devices)
    if num_devices > per_node and num_devices % per_node:
        below = num_devices // per_node * per_node
        raise UsageError(
            f"--count ({num_devices}) must be divisible by --devices-per-node ({per_node}): "
            f"use {below} or {below + per_node}"
        )
    facts = to_json({"device": asdict(spec), "count": num_devices, "link": link or DEFAULT_LINK, "node": per_node})
    return Target(spec.name, digest(facts), spec, num_devices, per_node, None, link or DEFAULT_LINK)


def _is_machine_file(name: str) -> bool:
    """Rather than a device of the catalog, or of a TOML file in its form."""
    return name.endswith(".json") or (Path(name).is_file() and ".toml" not in name)


def _computes_on_host(profile: MachineProfile) -> bool:
    """Whether it was probed with the processors of a host; rows of its disk and processes say nothing of that."""
    return {row.device for row in profile.rows if row.domain in ("compute", "memory")} == {"cpu"}


def _measured(path: Path, count: int | None, link: str | None) -> Target:
    profile = load_profile(path)
    if not profile.devices:
        raise CatalogError(f"{path} names no device: probe the machine again")
    host = _computes_on_host(profile)
    per_node = 1 if host else max(1, len(profile.machine.get("gpus", ())))
    if host and link is not None:
        raise UsageError(f"--link joins hosts of accelerators, and {path} is a host without any: leave it out")
    num_devices = count or (0 if host else per_node)
    if not host and num_devices > per_node:
        if link is None:
            raise UsageError(
                f"--count ({num_devices}) is more than the {per_node} devices of {path}: say with --link what joins "
                f"such hosts (known: {', '.join(accelerators.link_names())})"
            )
        if num_devices % per_node:
            near = num_devices // per_node * per_node
            raise UsageError(
                f"--count ({num_devices}) must be divisible by the {per_node} devices of a host: "
                f"use {near} or {near + per_node}"
            )
    if link is not None:
        accelerators.link(link)
    return Target(
        str(path), digest_file(path), profile.devices[0], num_devices, per_node, profile, link or DEFAULT_LINK
    )


def _file(
    subject: Subject, target: Target, found: Found, forecast: Forecast, memory: Mapping[str, Mapping[str, float]],
    calibration: tuple[str, str],
) -> PlanFile:  # fmt: skip
    best, run, bill = found.best, forecast.goodput, forecast.bill
    known: dict[str, float | None] = {"wall_s": run.wall_s, "usd": bill.usd, "kwh": bill.kwh} if bill else {}
    known |= {
        "goodput": run.goodput, "checkpoint_interval_s": run.interval_s,
        "checkpoint_interval_steps": float(run.interval_steps), "device_hours": bill.device_hours if bill else None,
        "reads_per_s": forecast.reads_per_s, "read_bytes_per_s": forecast.read_bytes_per_s,
    }  # fmt: skip
    cost = {name: value for name, value in known.items() if value is not None}
    runner_up = found.runner_up
    return PlanFile(
        plan_file.SCHEMA, VERSION, datetime.now(UTC).isoformat(timespec="seconds"),
        Inputs(subject.path, subject.digest, target.name, target.digest, *calibration),
        Sizes(subject.name, subject.params, subject.unit, subject.units_per_sample * subject.global_batch,
              subject.global_batch, forecast.num_steps, subject.case.seq_len if subject.case else 0),
        best.dims, best.settings,
        Prediction(best.step_s, best.low_s, best.high_s, forecast.units_per_s, forecast.mfu or 0.0,
                   dict(best.breakdown)),
        memory, cost,
        {"candidates": found.num_candidates, "fitting": found.num_fitting,
         **({"runner_up": words(runner_up), "runner_up_step_s": runner_up.step_s,
             "margin_sigmas": found.margin_sigmas} if runner_up else {})},
    )  # fmt: skip


def _choice_table(choice: Choice) -> dict[str, Any]:
    return {
        "dims": asdict(choice.dims), "settings": asdict(choice.settings), "step_s": choice.step_s,
        "low_s": choice.low_s, "high_s": choice.high_s, "breakdown": dict(choice.breakdown),
        "peak_bytes": choice.peak_bytes, "words": words(choice),
    }  # fmt: skip


def plan_from_command_line(
    recipe: Path, overrides: Sequence[str], *, output: Path | None, as_json: bool, columns: int = 100, **options: Any
) -> str:
    """The plan as text or JSON; writes `output` and the page beside it where that is given."""
    made = plan(recipe, overrides, **options)
    ends = []
    if output is not None:
        page = output.with_suffix(".html")
        plan_file.write(made.file, output)
        write_page(PlanView(made.file, made.found, machine=made.target.words, notes=made.found.notes,
                            capacity_bytes=float(made.target.memory_bytes or 0),
                            scaling=scaling(made, options.get("usd_per_hour"))), page)  # fmt: skip
        ends = [f"{output} and {page} are written; next: turbopump train {recipe} --plan {output}"]
    if as_json:
        return to_json(made.to_json(), indent=True).decode().rstrip()
    return "\n".join([summary(made.subject, made.target.words, made.found, made.forecast, made.file, columns), *ends])


def validate(path: Path, *, frozen: bool = False, page: Path | None = None, as_json: bool = False) -> str:
    """Every published table at `path`, predicted and compared; as text or JSON. Raises `UsageError`, `ConfigError`."""
    from turbopump.planner.validate import validate as judge
    from turbopump.reporting.validation_page import write_validation_page
    from turbopump.reporting.validation_text import format_report

    report = judge(path, frozen=frozen)
    if page is not None:
        write_validation_page(report, page)
    return to_json(report.to_json(), indent=True).decode().rstrip() if as_json else format_report(report)


def calibrate(runs: Sequence[Path], machine: Path | str | None = None, *, as_json: bool = False) -> str:
    """Refine the machine file by what `runs` of this machine took; what was learned, as text or JSON.

    Raises `UsageError` where they tell too little, `ProfileError` for runs or profiles of another machine.
    """
    from turbopump.planner import run_calibration

    path = Path(machine or DEFAULT_MACHINE)
    refined = run_calibration.calibrate(load_profile(path), runs)
    save_profile(refined, path)
    assert refined.calibration is not None
    if as_json:
        return to_json(refined.calibration, indent=True).decode().rstrip()
    return f"{run_calibration.describe(refined.calibration)}\nwritten to {path}"
