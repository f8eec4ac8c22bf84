"""The verb `probe`: what this machine can do, per operation and route, becomes machine.json and its page.

    from turbopump.probe import probe
    profile = probe("machine.json", budget_s=60, only=("compute",))

What is measured and how is the domains' (`compute/bench.py`, `comms/bench.py`, `data/bench.py`): this file asks them,
keeps what they find, and decides what it replaces. torch is imported when measuring starts, not before.
"""

from __future__ import annotations

import importlib
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from turbopump.core.config import Config
from turbopump.core.config import load as load_recipe
from turbopump.core.errors import Interrupted, NoisyProfileError, ProfileError, TurbopumpError, UsageError
from turbopump.core.units import human_seconds
from turbopump.core.version import VERSION
from turbopump.core.workload import Op, Workload
from turbopump.hardware import budget, detect
from turbopump.hardware.here import Here, here
from turbopump.hardware.journal import Comparison, Header, Joined, Journal, compare, join, journal_path, quality
from turbopump.hardware.measured import measured_device, measured_links, measured_storage, with_peak_shares
from turbopump.hardware.measuring import Bench, ProbeProgress, Session
from turbopump.hardware.process import prepare_to_compute
from turbopump.hardware.profile import SCHEMA, Domain, MachineProfile, Request, check_same_machine, load, save
from turbopump.planner.own_run import ops_of
from turbopump.planner.summary import microbatch_workload

if TYPE_CHECKING:
    from turbopump.compute.advice import Advice

DOMAINS: tuple[Domain, ...] = get_args(Domain)
BENCHES: Mapping[str, tuple[str, tuple[Domain, ...]]] = {
    "comms": ("turbopump.comms.bench", ("comms", "host")),
    "data": ("turbopump.data.bench", ("data",)),
    "compute": ("turbopump.compute.bench", ("compute", "memory", "host")),
}
"""Whose `bench.py` is asked for which domains, in the order of their turns: the last has what the others leave."""
MOST_RANKS = 8
Suite = Literal["generic", "deepbench"]
DEFAULT_BUDGET_S = 300.0


@dataclass(frozen=True)
class Outcome:
    """A probe that ended: the profile as written, and what there is to say of how it came about."""

    profile: MachineProfile
    output: Path
    page: Path
    measured: int
    repeated: int
    resumed: int
    begun: str
    """When the probe that was resumed began."""
    elapsed_s: float
    joined: Joined
    comparison: Comparison
    """With the rows of the file that was there."""
    failures: tuple[str, ...]


def probe(
    output: Path | str = "machine.json",
    *,
    budget_s: float = DEFAULT_BUDGET_S,
    only: Sequence[str] = (),
    suite: Suite = "generic",
    recipe: Path | str | Config | None = None,
    overrides: Sequence[str] = (),
    threads: Sequence[int] = (),
    directory: Path | str | None = None,
    device: str | None = None,
    overwrite: bool = False,
    progress: Callable[[ProbeProgress], None] | None = None,
    finished: Callable[[Outcome], None] | None = None,
    domains: Mapping[str, Bench] | None = None,
) -> MachineProfile:
    """Measure this machine for about `budget_s` seconds and write `output`, and the page beside it.

    `only` are domains (compute, memory, host, comms, data; default all), `recipe` one whose operations are measured
    first, `threads` the numbers to compute with (default what `train` would use, and 1), `directory` where storage is
    measured (default that of `output`), `device` "cpu" or "cuda" (default what is there). Rows are journaled: the
    same call after a crash goes on. An existing file of this machine is extended and refreshed; `overwrite` lets
    noisy rows replace good ones, and the file of another machine or schema be replaced. `progress` is called before
    each row, `finished` with all there is to say at the end; `domains` replaces the domains' benches by others.

    Raises `UsageError`, `ProfileError` (another machine's or schema's file), `NoisyProfileError`,
    `RunDirectoryError` (a full disk, say; the rows before it stay), and `Interrupted` for Ctrl-C and SIGTERM.
    """
    output = Path(output)
    request = Request(
        threads=tuple(threads) or default_threads(), suite=suite, domains=_domains(only),
        directory=Path(directory) if directory is not None else output.parent,
    )  # fmt: skip
    _check(request, budget_s, output, device)
    existing = _existing(output, overwrite)
    ops = recipe_ops(recipe, overrides) if recipe is not None else ()
    benches = domains if domains is not None else _load_benches(request.domains)
    place = here(_device(device))
    request = replace(request, ops=ops, device=next(iter(place.devices)), max_ranks=_max_ranks(place))
    header = Header(place.name, place.fingerprint, place.software, str(request.directory.resolve()), _now())
    with Journal(journal_path(output), header, discard_foreign=overwrite) as journal:
        session = Session(benches, request, journal, budget_s, progress)
        with _stoppable(session, journal):
            session.run()
            outcome = _finish(session, journal, place, existing, output, budget_s, overwrite)
    if finished is not None:
        finished(outcome)
    return outcome.profile


# ---- before measuring


def _check(request: Request, budget_s: float, output: Path, device: str | None) -> None:
    """What is wrong with the arguments, before anything is started."""
    if not 0 < budget_s < float("inf"):
        raise UsageError(f"budget_s: {budget_s} given, which is no positive number of seconds")
    if request.suite not in get_args(Suite):
        raise UsageError(f"suite: {request.suite!r} given: use one of {', '.join(get_args(Suite))}")
    cores = detect.num_cores()
    if wrong := [count for count in request.threads if not 1 <= count <= cores]:
        raise UsageError(f"threads: {wrong[0]} given, this process may use {cores} cores: use 1 to {cores}")
    if not request.directory.is_dir():
        raise UsageError(f"directory: there is no directory {request.directory}: make it, or name one to measure")
    if output.is_dir():
        raise UsageError(f"{output} is a directory: give the file to write, e.g. {output / 'machine.json'}")
    if device not in (None, "cpu", "cuda"):
        raise UsageError(f"device: {device!r} given: use cpu or cuda")


def _domains(only: Sequence[str]) -> tuple[Domain, ...]:
    if wrong := [name for name in only if name not in DOMAINS]:
        raise UsageError(f"only: {wrong[0]!r} given: use some of {', '.join(DOMAINS)}")
    return tuple(domain for domain in DOMAINS if not only or domain in only)


def default_threads() -> tuple[int, ...]:
    """What one process of `train` computes with, and one."""
    return tuple(dict.fromkeys((min(detect.num_threads(), detect.num_cores()), 1)))


def recipe_ops(recipe: Path | str | Config, overrides: Sequence[str] = ()) -> tuple[Op, ...]:
    """Each operation of a step once, in fp32 and bf16 where the recipe leaves that to measurement: those of the
    workload, and what `train` computes around them."""
    config = _config(recipe, overrides)
    if microbatch_workload(config) is None:
        raise _live(config, recipe)
    processes = config.launch.num_processes or 1
    ops: dict[Op, None] = {}
    for dtype in ("fp32", "bf16") if config.precision.compute == "auto" else (config.precision.compute,):
        ops |= dict.fromkeys(ops_of(config, dtype, processes))
    return tuple(ops)


def _config(recipe: Path | str | Config, overrides: Sequence[str]) -> Config:
    return recipe if isinstance(recipe, Config) else load_recipe(Path(recipe), overrides)


def _workload(config: Config, recipe: Path | str | Config, dtype: str | None) -> Workload:
    workload = microbatch_workload(config, dtype=dtype)
    if workload is None:
        raise _live(config, recipe)
    return workload


def _live(config: Config, recipe: Path | str | Config) -> UsageError:
    name = config.name if isinstance(recipe, Config) else recipe
    return UsageError(f"{name}: the operations of a live model are not known before it runs: give a recipe whose "
                      "model and data have a kind of their own")  # fmt: skip


def _existing(output: Path, overwrite: bool) -> MachineProfile | None:
    """The file to extend; None where there is none, or one that `overwrite` lets be replaced."""
    if not output.exists():
        return None
    try:
        profile = load(output)
        check_same_machine(profile, detect.fingerprint(), detect.cpu_name(), output)
        if profile.provenance != "measured":
            raise ProfileError(f"{output} is a {profile.provenance} profile of {profile.name}, not a measured one")
    except ProfileError as error:
        if overwrite:
            return None
        text = str(error)
        raise ProfileError(
            text if "--overwrite" in text else f"{text}; give another --output, or --overwrite to replace it"
        ) from error
    return profile


def _load_benches(domains: Sequence[Domain]) -> dict[str, Bench]:
    """The domains' own benches; imports torch."""
    prepare_to_compute()
    wanted = {name: module for name, (module, offers) in BENCHES.items() if set(offers) & set(domains)}
    return {name: importlib.import_module(module) for name, module in wanted.items()}


def _device(asked: str | None) -> str:
    """What computes: as asked, or a GPU where PyTorch sees one."""
    if asked == "cpu":
        return asked
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if asked == "cuda":
        raise UsageError("device: 'cuda' given, but PyTorch sees no CUDA device here: use cpu, or a CUDA build of "
                         "PyTorch and a driver that fits it")  # fmt: skip
    return "cpu"


def _max_ranks(place: Here) -> int:
    """Processes to measure collectives between: one a GPU, or a core, and at least two."""
    count = len(place.machine["gpus"]) if "cuda" in place.devices else detect.num_cores()
    return max(2, min(count, MOST_RANKS))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


# ---- while and after measuring


@contextmanager
def _stoppable(session: Session, journal: Journal) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the probe after it has put everything back, and say how to go on."""
    received = [signal.SIGINT]

    def stop(number: int, _: Any) -> None:
        received[0] = signal.Signals(number)
        raise KeyboardInterrupt

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted; {len(session.rows)} of {session.total} rows are in {journal.path}, and the same command "
            "goes on from there", received[0],
        ) from None  # fmt: skip
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _finish(
    session: Session, journal: Journal, place: Here, existing: MachineProfile | None, output: Path, budget_s: float,
    overwrite: bool,
) -> Outcome:  # fmt: skip
    """Join the rows with those of the file that is there, and write it unless what is there is better."""
    if not any(row.works for row in session.rows.values()):
        journal.remove()
        raise _nothing_measured(session, budget_s)
    new = tuple(session.rows.values())
    old = existing.rows if existing is not None else ()
    comparison = compare(old, new)
    refused = comparison.noisier and not overwrite
    joined = join(() if refused else old, new, overwrite=overwrite)
    profile = _profile(session, place, joined, existing, budget_s)
    target = output.with_name(f"{output.stem}.noisy.json") if refused else output
    save(profile, target)
    journal.remove()
    if refused:
        raise NoisyProfileError(
            f"{comparison.noisy_now:.0%} of the {comparison.common} rows that {output} holds too came out noisy, "
            f"{comparison.noisy_before:.0%} of its own are: it stays as it was, and the new rows are in {target}. "
            "Probe again when the machine has less to do, or take them with --overwrite"
        )
    return Outcome(
        profile, output, _write_page(profile, output), len(session.looks), session.repeated, session.resumed,
        journal.begun, session.elapsed_s, joined, comparison, tuple(_failures(session)),
    )  # fmt: skip


def _write_page(profile: MachineProfile, output: Path) -> Path:
    from turbopump.reporting.probe_page import write_page

    path = output.with_name("probe.html") if output.name == "machine.json" else output.with_suffix(".html")
    write_page(profile, path)
    return path


def _nothing_measured(session: Session, budget_s: float) -> TurbopumpError:
    problems = Counter(row.problem for row in session.rows.values())
    if session.failures or problems:
        said = [*_failures(session), *(f"{count} rows: {problem}" for problem, count in problems.most_common(3))]
        return TurbopumpError("nothing could be measured. " + "; ".join(said))
    if not session.total:
        return UsageError(f"there is nothing to measure of {', '.join(session.request.domains)} on this machine: ask "
                          f"for others of {', '.join(DOMAINS)}")  # fmt: skip
    return UsageError(
        f"a budget of {human_seconds(budget_s)} holds none of {session.total} rows: give --budget 30s or more"
    )


def _failures(session: Session) -> Iterator[str]:
    for name, lines in session.failures.items():
        given_up = ", and was given up" if session.given_up(name) else ""
        yield f"{name} failed {len(lines)} times{given_up}; first at {lines[0]}"


def _profile(
    session: Session, place: Here, joined: Joined, existing: MachineProfile | None, budget_s: float
) -> MachineProfile:
    request = session.request
    cores = detect.num_physical_cores()
    devices = {where: measured_device(spec, joined.rows, where, cores) for where, spec in place.devices.items()}
    rows = with_peak_shares(joined.rows, devices, cores)
    asked = {
        "budget_s": budget_s, "suite": request.suite, "domains": list(request.domains), "device": request.device,
        "threads": list(request.threads), "directory": str(request.directory), "row_s": request.row_s,
        "recipe_ops": [op.key for op in request.ops],
    }  # fmt: skip
    return MachineProfile(
        schema=SCHEMA, written_by=VERSION, date=_now(), name=place.name, provenance="measured",
        fingerprint=place.fingerprint, machine=place.machine, software=place.software, devices=tuple(devices.values()),
        links=measured_links(rows), storage=measured_storage(rows, str(request.directory.resolve())), rows=rows,
        quality=quality(rows), left_out=tuple(_left_out(session)),
        uncertain=tuple(_uncertain(session, place, joined, existing)), request=asked,
        calibration=existing.calibration if existing is not None else None,
    )  # fmt: skip


def _left_out(session: Session) -> Iterator[str]:
    """What the budget had no room for, a line a group; first of all that not even the first tier fitted."""
    groups = session.left_out
    if first := [group for group in groups if group.tier == 0]:
        count = sum(group.left_in_tier for group in first)
        yield (f"the budget is too small for the first tier, {count} rows of which are left out: give --budget "
               f"{budget.advised(session.elapsed_s, groups, tier=0)} or more")  # fmt: skip
    if groups:
        yield (f"{sum(group.left for group in groups)} of {session.total} rows; all should fit in "
               f"--budget {budget.advised(session.elapsed_s, groups)}")  # fmt: skip
    yield from map(str, groups)


def _uncertain(session: Session, place: Here, joined: Joined, existing: MachineProfile | None) -> Iterator[str]:
    """What is less certain than it could be: by how this profile came about, by the machine, by what rows say."""
    yield from _failures(session)
    if joined.kept:
        yield f"{len(joined.kept)} older rows were kept, because they came out noisy or failed this time"
    if existing is not None and dict(existing.software) != dict(place.software):
        changed = [f"{name} {version} (now {place.software.get(name, 'none')})"
                   for name, version in existing.software.items() if place.software.get(name) != version]  # fmt: skip
        older = sum(row.key not in session.rows for row in existing.rows)
        if older and changed:
            yield f"{older} rows were measured with {', '.join(changed)}: probe again with what they need"
    yield from place.uncertain
    said = (str(row.facts["uncertain"]).split("; ") for row in joined.rows if row.facts.get("uncertain"))
    yield from dict.fromkeys(text for texts in said for text in texts)


# ---- the command line's forms


def notes(outcome: Outcome) -> list[str]:
    """What happened, line by line: how much was measured, what was resumed, joined, kept, and how alike it came out."""
    joined, comparison = outcome.joined, outcome.comparison
    lines = []
    if outcome.resumed:
        lines.append(f"went on with {outcome.resumed} rows of the probe begun {outcome.begun}")
    again = f", {outcome.repeated} of them again because they were noisy" if outcome.repeated else ""
    lines.append(f"measured {outcome.measured} rows in {human_seconds(outcome.elapsed_s)}{again}")
    if joined.replaced or joined.kept:
        kept = f", {len(joined.kept)} kept, the new ones being noisier" if joined.kept else ""
        lines.append(f"of the rows that were there {joined.replaced} were renewed{kept}; {joined.added} are new")
    if comparison.common:
        lines.append(f"the median of {comparison.common} rows measured before differs by {comparison.difference:.1%}")
    return lines


def format_outcome(outcome: Outcome, columns: int = 80) -> str:
    """The summary of the profile, what happened, and where to look."""
    from turbopump.reporting.probe_text import listed, summary

    lines = [summary(outcome.profile, columns), *listed("done", notes(outcome), columns)]
    lines += listed("written", [f"{outcome.output}; to look at: {outcome.page}"], columns)
    return "\n".join(lines)


def advise(recipe: Path | str | Config, machine: Path | str = "machine.json", overrides: Sequence[str] = ()) -> Advice:
    """What should make a recipe's step faster, by the rows of a machine file; measures nothing.

    Raises `ProfileError` where there is no such file, `UsageError` for a live model.
    """
    from turbopump.compute.advice import advise

    config = _config(recipe, overrides)
    profile = load(machine)
    counts = profile.request.get("threads") or [default_threads()[0]]
    dtype = "fp32" if config.precision.compute == "auto" else None
    return advise(profile, _workload(config, recipe, dtype), threads=int(counts[0]),
                  device=str(profile.request.get("device", "cpu")))  # fmt: skip
