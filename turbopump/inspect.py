"""The verb `inspect`: what an artefact is, its schema, sizes and samples; `verify` checks every checksum. No torch."""

from __future__ import annotations

import tomllib
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from turbopump.core.checkpoint_store import list_checkpoints, open_checkpoint, verify_checkpoint
from turbopump.core.config import from_overrides, load, to_table
from turbopump.core.errors import CorruptCheckpointError, ProfileError, UsageError
from turbopump.core.files import from_json, read_json_lines, to_json
from turbopump.core.rundir import RunDir
from turbopump.core.spans import run_breakdown
from turbopump.core.tensor_file import read_layout
from turbopump.core.units import human, human_bytes, human_seconds, printable
from turbopump.data.describe import describe_dataset
from turbopump.data.format import chunks, open_dataset, verify_dataset
from turbopump.data.remote_files import CACHE_BYTES, RemoteConfig, is_url
from turbopump.hardware import profile as machine_file
from turbopump.hardware.sanity import oddities
from turbopump.planner import plan_file
from turbopump.planner.summary import format_summary, misfits, summarize
from turbopump.reporting.probe_rows import Setting, best_rates, dtype_order, main_settings, memory_roofs, op_words


def inspect(path: Path | str, *, verify: bool = False, remote: RemoteConfig | None = None) -> dict[str, Any]:
    """Facts about the artefact at `path`, with its `kind` first; `remote` is how a dataset at an address is reached.

    Raises `UsageError` for what is none of ours, `RemoteError` for what a store does not give, `CorruptDataError` or
    `CorruptCheckpointError` where a checksum differs, and `ProfileError` for a machine file of another schema or, with
    `verify`, of figures that cannot be; `PlanError` for a plan of another schema."""
    if is_url(path):
        if remote is not None and (remote.cache_bytes != CACHE_BYTES or remote.cache_dir):
            warnings.warn("cache_bytes and cache_dir have no effect on inspect: leave them out", stacklevel=2)
        return {"kind": "dataset", "path": str(path), **_dataset(path, verify, remote)}
    path = Path(path)
    if not path.exists():
        raise UsageError(f"nothing at {path}")
    for kind, recognises, describe in _KINDS:
        if recognises(path):
            return {"kind": kind, "path": str(path), **describe(path, verify)}
    raise UsageError(
        f"{path} is no artefact of turbopump: give a run, checkpoint or dataset directory, a recipe (.toml), "
        f"a .safetensors file or a .json artefact"
    )


def _run(path: Path, verify: bool) -> dict[str, Any]:
    rundir = RunDir(path)
    metrics = list(read_json_lines(rundir.metrics))
    last: dict[str, Any] = {}
    for record in metrics:
        last[record.get("type", "")] = record
    checkpoints = list_checkpoints(rundir.checkpoints)
    for checkpoint in checkpoints if verify else ():
        _verify_checkpoint(checkpoint.path)
    breakdown = run_breakdown(read_json_lines(rundir.spans(0)))
    return {
        **_made_of(rundir),
        "attempts": rundir.num_attempts(),
        "steps": last.get("step", {}).get("step", 0),
        "loss": last.get("step", {}).get("loss"),
        "evaluation": {k: v for k, v in last.get("evaluation", {}).items() if k not in ("type", "epoch_s", "s")},
        "seconds": {name: getattr(breakdown, name) for name in breakdown.__dataclass_fields__},
        "checkpoints": [
            {"step": c.step, "bytes": c.num_bytes, "metrics": c.metrics, "problem": c.problem} for c in checkpoints
        ],
        "verified": verify or None,
        "environment": _environment(rundir.env),
    }


def _made_of(rundir: RunDir) -> dict[str, Any]:
    """What the run trains on what, and for how long; what is wrong with its config.toml where that cannot be read."""
    try:
        config = load(rundir.config)
    except UsageError as error:
        return {"problem": str(error)}
    return {"name": config.name, "model": config.model.kind, "data": config.data.kind, "num_steps": config.num_steps}


def _checkpoint(path: Path, verify: bool) -> dict[str, Any]:
    if verify:
        _verify_checkpoint(path)
    stored = open_checkpoint(path)
    tensors = {name: f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in sorted(stored.tensors.items())}
    return {"step": stored.info.step, "world_size": stored.info.world_size, "bytes": stored.info.num_bytes,
            "values": stored.values, "metrics": stored.info.metrics, "verified": verify or None,
            "tensors": tensors}  # fmt: skip


def _verify_checkpoint(path: Path) -> None:
    problems = verify_checkpoint(path)
    if problems:
        raise CorruptCheckpointError("; ".join(problems))


def _dataset(path: Path | str, verify: bool, remote: RemoteConfig | None = None) -> dict[str, Any]:
    if verify:
        verify_dataset(path, remote=remote)
    facts = describe_dataset(path, remote)
    for split in facts["splits"].values():
        sizes = split.pop("document_sizes", ())
        split["document_sizes"] = {f"up to {size:,} tokens": count for size, count in sizes}
        for name, lengths in split.pop("sizes", {}).items():
            split[f"sizes of {name}"] = {f"up to {size:,}": count for size, count in lengths}
    return {"holds": facts.pop("kind"), **facts, "verified": verify or None}


def _recipe(path: Path, verify: bool) -> dict[str, Any]:
    config = load(path)
    return {"settings": to_table(config), "sizes": format_summary(summarize(config), config).splitlines(),
            "misfits": misfits(config)}  # fmt: skip


def _is_plan(path: Path) -> bool:
    """Whether it is a plan, of whatever schema; its tables are unlike a recipe's."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")) if path.suffix == ".toml" else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError):
        return False
    return {"schema", "prediction", "dims"} <= table.keys()


def _plan(path: Path, verify: bool) -> dict[str, Any]:
    return to_table(plan_file.read(path))


def _weights(path: Path, verify: bool) -> dict[str, Any]:
    tensors = read_layout(path).tensors
    return {"tensors": {name: f"{entry.dtype} {list(entry.shape)}" for name, entry in sorted(tensors.items())}}


def _environment(path: Path) -> dict[str, Any]:
    """env.json of a run, or nothing where it is missing or damaged: the rest of the run can still be told."""
    try:
        value = from_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_machine(path: Path) -> bool:
    """Whether it is a machine file, of whatever schema."""
    if path.suffix != ".json":
        return False
    try:
        table = from_json(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(table, dict) and {"schema", "rows", "provenance"} <= table.keys()


def _machine(path: Path, verify: bool) -> dict[str, Any]:
    profile = machine_file.load(path)
    odd = oddities(profile) if verify else []
    if odd:
        more = f"\n  ... and {len(odd) - MAX_LINES} more" if len(odd) > MAX_LINES else ""
        lines = "".join(f"\n  {printable(line)}" for line in odd[:MAX_LINES])
        raise ProfileError(f"{path} holds figures that cannot be: probe the machine again{lines}{more}")
    setting = next(iter(main_settings(profile)), Setting("cpu", 1))
    memory, caches = memory_roofs(profile, setting)
    return {
        "name": profile.name, "provenance": profile.provenance, "date": profile.date, "schema": profile.schema,
        "written_by": profile.written_by, "fingerprint": profile.fingerprint,
        "peaks": _peaks(profile),
        "on_paper": [{"device": device.name, "dtype": dtype, "flops_per_s": rate}
                     for device in profile.devices for dtype, rate in device.flops_per_s.items()],
        "memory_bytes_per_s": memory, "cache_bytes_per_s": caches,
        "links": [{"name": link.name, "bytes_per_s": link.bytes_per_s, "latency_s": link.latency_s}
                  for link in profile.links],
        "storage": [{"name": s.name, "read_bytes_per_s": s.read_bytes_per_s, "random_reads_per_s": s.random_reads_per_s}
                    for s in profile.storage],
        "quality": dict(profile.quality), "uncertain": list(profile.uncertain),
        "rows": dict(Counter(row.kind for row in profile.rows).most_common()),
        "without_times": dict(Counter(row.kind for row in profile.rows if not row.works).most_common()),
        "routes": len({row.route for row in profile.rows}) or None, "curves": len(profile.curves) or None,
        "software": dict(profile.software), "left_out": list(profile.left_out), "verified": verify or None,
    }  # fmt: skip


def _peaks(profile: machine_file.MachineProfile) -> list[dict[str, Any]]:
    """The best rate over all routes of each dtype, on each device and number of threads."""
    best = best_rates(profile)
    return [
        {"dtype": dtype, "flops_per_s": peak.row.flops_per_s, "route": peak.route, "where": peak.setting.words,
         "op": op_words(peak.row), "error": peak.row.error}
        for dtype in dtype_order(d for _, d in best)
        for (_, d), peak in best.items()
        if d == dtype
    ]  # fmt: skip


def _json(path: Path, verify: bool) -> dict[str, Any]:
    try:
        return {"content": from_json(path.read_bytes())}
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error


_KINDS: tuple[tuple[str, Callable[[Path], bool], Callable[[Path, bool], dict[str, Any]]], ...] = (
    ("run", lambda p: (p / "config.toml").exists(), _run),
    ("checkpoint", lambda p: (p / "index.json").exists(), _checkpoint),
    ("dataset", lambda p: (p / "manifest.json").exists(), _dataset),
    ("plan", _is_plan, _plan),
    ("recipe", lambda p: p.suffix == ".toml", _recipe),
    ("weights", lambda p: p.suffix == ".safetensors", _weights),
    ("machine", _is_machine, _machine),
    ("json", lambda p: p.suffix == ".json", _json),
)

EXACT = ("settings", "tensors", "values")  # names and values as they are, not as people say them
MAX_LINES = 40


def format_facts(facts: Mapping[str, Any], indent: int = 0, *, exact: bool = False) -> str:
    """Facts as indented lines: bytes and seconds in people's units, long lists cut with their length said."""
    lines: list[str] = []
    pad = "  " * indent
    for name, value in facts.items():
        if value is None or (value in ({}, [], ()) and not exact):
            continue
        label = pad + (name if exact else name.replace("_", " "))
        if isinstance(value, Mapping):
            if name == "seconds":
                value = {k: human_seconds(v) for k, v in value.items()}
            shown = dict(list(value.items())[:MAX_LINES])
            lines += [label, format_facts(shown, indent + 1, exact=exact or name in EXACT)]
        elif isinstance(value, (list, tuple)) and not exact:
            lines += [label, *(f"{pad}  {_one_line(item)}" for item in value[:MAX_LINES])]
        else:
            lines.append(f"{label:<24} {_one_line(value) if exact else _readable(name, value)}")
            continue
        if len(value) > MAX_LINES:
            lines.append(f"{pad}  ... and {len(value) - MAX_LINES} more (all with --json)")
    return "\n".join(line for line in lines if line)


def _one_line(item: Any) -> str:
    if isinstance(item, Mapping):
        return "  ".join(f"{key} {_readable(key, value)}" for key, value in item.items() if value not in (None, ""))
    return printable(str(item).replace("\n", "\\n"))


def _readable(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return _one_line(value)
    if name.endswith(("flops_per_s", "bytes_per_s")):
        return human(value, "FLOP/s" if "flops" in name else "B/s")
    if name.endswith("bytes"):
        return human_bytes(value)
    if name.endswith("_s") and not name.endswith("per_s"):
        return human_seconds(value)
    return human(value, digits=4) if isinstance(value, float) else f"{value:,}"


def export(
    path: Path | str, destination: Path | str | None = None, *, remote: RemoteConfig | None = None
) -> list[Path]:
    """Write each split of the dataset at `path` as `<split>.parquet` into `destination` (default: PATH.parquet).

    Raises `UsageError` where the destination holds something, `DatasetError` where there is no dataset or no space.
    """
    from turbopump.data.export import export_parquet

    dataset = open_dataset(path, remote=remote)
    if is_url(path) and destination is None:
        raise UsageError(f"{path} is an address: name the folder to write with --to")
    folder = Path(destination) if destination is not None else Path(f"{str(path).rstrip('/')}.parquet")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is not an empty folder: give another one with --to")
    written = []
    for name in dataset.manifest.splits:
        file = folder / f"{name}.parquet"
        export_parquet(chunks(dataset, name), dataset.manifest.fields, file)
        written.append(file)
    return written


def remote_of(path: Path | str, overrides: Sequence[str]) -> RemoteConfig | None:
    """Settings of `[data.remote]` that were given on the command line; raises `UsageError` where there is no use."""
    if not overrides:
        return None
    if not is_url(path):
        raise UsageError(f"{overrides[0]!r} given, which is how an address is reached, and {path} is none")
    config: RemoteConfig = from_overrides(RemoteConfig, overrides, "remote settings")
    return config


def inspect_from_command_line(
    path: Path | str, *, verify: bool, as_json: bool, remote: RemoteConfig | None = None
) -> str:
    facts = inspect(path, verify=verify, remote=remote)
    return to_json(facts, indent=True).decode().rstrip() if as_json else format_facts(facts)
