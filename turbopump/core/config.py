"""The recipe: frozen dataclasses are the configuration, TOML is their printed form.

`load` reads a recipe, applies overrides by dotted path (`model.num_layers=8`), and reports all problems at once, each
with its dotted path, the value given, what is allowed and what to do. pydantic checks types and ranges at this
boundary only; inside the program a config is a plain frozen dataclass. Nothing derived is ever written back.
A table with a `kind` (`[model]`, `[data]`) is read by the dataclass of that plug-in.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import tomli_w
from annotated_types import Ge, Gt, Le, Lt
from pydantic import Discriminator, TypeAdapter, ValidationError

from turbopump.core import plugins
from turbopump.core.errors import ConfigError, UsageError

SCHEMA_VERSION = 1

PositiveInt = Annotated[int, Ge(1)]
NonNegativeInt = Annotated[int, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
NonNegativeFloat = Annotated[float, Ge(0)]
Fraction = Annotated[float, Ge(0), Le(1)]
Probability = Annotated[float, Ge(0), Lt(1)]
BY_KIND = Discriminator("kind")  # of a union of config dataclasses: which one a table is, its `kind` says


def setting(default: Any = MISSING, doc: str = "") -> Any:
    """A field of a config dataclass with the one line that the generated reference prints."""
    if isinstance(default, type):
        return field(default_factory=default, metadata={"doc": doc})
    return field(default=default, metadata={"doc": doc})


@dataclass(frozen=True)
class OptimizerConfig:
    """How the weights are updated."""

    kind: Literal["adamw", "muon"] = setting(
        "adamw", "`adamw`, or `muon`: Muon for the matrices of the blocks, AdamW for everything else"
    )
    lr: PositiveFloat = setting(3e-4, "peak learning rate of AdamW")
    muon_lr: PositiveFloat = setting(0.02, "peak learning rate of Muon")
    beta1: Probability = setting(0.9, "decay of the first moment of AdamW")
    beta2: Probability = setting(0.95, "decay of the second moment of AdamW")
    muon_momentum: Probability = setting(0.95, "momentum of Muon")
    muon_ns_steps: PositiveInt = setting(5, "Newton-Schulz iterations of Muon; 4 are cheaper and nearly as good")
    eps: PositiveFloat = setting(1e-8, "term of AdamW that keeps its division finite")
    weight_decay: NonNegativeFloat = setting(0.1, "decoupled weight decay of matrices; vectors (norms, biases) get 0")
    clip_norm: NonNegativeFloat = setting(1.0, "largest global gradient norm; 0 does not clip")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over the run, as a multiple of the peak."""

    kind: Literal["cosine", "wsd", "constant"] = setting(
        "cosine", "`cosine`, `wsd` (warm-up, stable, linear decay) or `constant`; all after a linear warm-up"
    )
    warmup_steps: NonNegativeInt = setting(100, "steps of the linear warm-up")
    decay_fraction: Fraction = setting(0.2, "last share of the run that `wsd` decays over")
    final_fraction: Fraction = setting(0.1, "share of the peak learning rate at the last step")


@dataclass(frozen=True)
class PrecisionConfig:
    """Arithmetic of forward and backward; weights and optimizer states stay fp32."""

    compute: Literal["auto", "fp32", "bf16"] = setting(
        "fp32", "`fp32`, `bf16` (autocast), or `auto`: what a short measurement on this machine finds fastest"
    )


@dataclass(frozen=True)
class LoaderConfig:
    """How samples reach the model; nothing but the order's settings changes which samples a step sees."""

    order: Literal["shuffle", "blocks", "sequential", "bucketed"] = setting(
        "shuffle",
        "order of the samples within an epoch: `shuffle`; `blocks` for storage that is slow at single records; "
        "`sequential`; `bucketed`: batches of samples of similar length, for a dataset with a table of lengths",
    )
    block_samples: PositiveInt = setting(
        1024, "samples that stay neighbours until their window is shuffled, of `blocks`"
    )
    window_blocks: PositiveInt = setting(16, "blocks that are shuffled together, of `blocks`; more shuffle better")
    num_buckets: PositiveInt = setting(64, "parts of equal size that the lengths are divided into, of `bucketed`")
    num_workers: NonNegativeInt | Literal["auto"] = setting(
        0,
        "threads or processes that read ahead; 0 reads in the training thread, `auto` measures at the start what pays",
    )
    workers: Literal["auto", "threads", "processes"] = setting(
        "auto", "what reads ahead; `auto` takes threads for datasets that work in C without the GIL, or else processes"
    )
    prefetch_steps: PositiveInt = setting(2, "steps each worker holds ready")


@dataclass(frozen=True)
class EvaluationConfig:
    """Evaluation on held-out data while training."""

    every: NonNegativeInt = setting(0, "steps between evaluations; 0 evaluates at the end only")
    at_start: bool = setting(True, "evaluate the model before the first step, to compare with")
    max_samples: NonNegativeInt = setting(0, "samples an evaluation reads at most; 0 reads the whole split")
    split: str = setting("validation", "the split evaluated while training")
    batch: PositiveInt = setting(32, "samples a device evaluates at once")


@dataclass(frozen=True)
class CheckpointConfig:
    """What is written to come back to."""

    every: NonNegativeInt = setting(0, "steps between checkpoints; 0 leaves it to `every_s` and the end of the run")
    every_s: NonNegativeFloat = setting(300.0, "seconds between checkpoints; 0 leaves it to `every`")
    keep_last: PositiveInt = setting(2, "newest checkpoints kept")
    keep_every: NonNegativeInt = setting(0, "keep checkpoints of steps divisible by this for good; 0 keeps none")
    keep_best: bool = setting(True, "keep the checkpoint with the lowest evaluation loss")
    asynchronous: bool = setting(True, "write while training goes on; a failed write still ends the run")


@dataclass(frozen=True)
class LoggingConfig:
    """What is written down while training."""

    every: PositiveInt = setting(10, "steps between progress lines; the loss of each step is in metrics.jsonl anyway")
    loggers: tuple[str, ...] = setting((), "further loggers, e.g. `tensorboard`")
    limit_s: NonNegativeFloat = setting(
        1.0, "seconds spent at the start on measuring what this machine can do at best; 0 leaves it out"
    )


@dataclass(frozen=True)
class LaunchConfig:
    """Processes of the run on this host."""

    num_processes: NonNegativeInt = setting(0, "processes, one device each; 0 takes one per GPU, or one on CPU")
    threads: NonNegativeInt = setting(
        0, "CPU threads a process computes with; 0 takes OMP_NUM_THREADS where it is set, or an even share of the cores"
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "`auto` takes GPUs where there are any")
    timeout_s: PositiveFloat = setting(600.0, "seconds a process waits for the others before it gives up")


@dataclass(frozen=True)
class Config:
    """A training run."""

    model: Any = setting(doc="the model: `kind` and the settings of that kind")
    data: Any = setting(doc="the dataset: `kind` and the settings of that kind")
    name: str = setting("run", "name of the run; its directory is `runs/<name>`")
    seed: NonNegativeInt = setting(0, "every random number is a function of this and of its place in the run")
    num_steps: PositiveInt = setting(1000, "optimizer steps of the whole run")
    global_batch: PositiveInt = setting(32, "samples an optimizer step learns from, over all processes")
    microbatch: NonNegativeInt = setting(
        0, "samples a device computes at once; 0 takes its whole share of `global_batch`, smaller ones accumulate"
    )
    optimizer: OptimizerConfig = setting(OptimizerConfig, "how the weights are updated")
    schedule: ScheduleConfig = setting(ScheduleConfig, "learning rate over the run")
    precision: PrecisionConfig = setting(PrecisionConfig, "arithmetic of forward and backward")
    loader: LoaderConfig = setting(LoaderConfig, "how samples reach the model")
    evaluation: EvaluationConfig = setting(EvaluationConfig, "evaluation while training")
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "what is written to come back to")
    logging: LoggingConfig = setting(LoggingConfig, "what is written down while training")
    launch: LaunchConfig = setting(LaunchConfig, "processes of the run")


@dataclass(frozen=True)
class LiveConfig:
    """Stands for a model or dataset that came as a live object or `module:function`, not by the name of a kind."""

    kind: str = "live"
    reference: str = ""


# What a resumed run may change; any other difference is refused (it would not be the same run).
CHANGEABLE_ON_RESUME = ("num_steps", "evaluation", "checkpoint", "logging", "launch", "loader.num_workers",
                        "loader.workers", "loader.prefetch_steps", "data.path", "data.reading",
                        "data.remote")  # fmt: skip

KIND_TABLES = {"model": "turbopump.models", "data": "turbopump.sources"}


def load(path: Path | str, overrides: Sequence[str] = (), live: Mapping[str, Any] | None = None) -> Config:
    """The recipe at `path` with `key=value` overrides; raises `ConfigError` or `UsageError`.

    `live` are tables that stand for live objects, in place of the recipe's own.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"no recipe at {path}: give a TOML file; ready ones are in recipes/") from error
    except IsADirectoryError as error:
        raise UsageError(f"{path} is a directory: give a recipe (a TOML file)") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        apply_override(table, override)
    return parse({**table, **(live or {})}, where=str(path))


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in a nested table; the value is read as TOML, or taken as a string where it is none."""
    key, equals, text = override.partition("=")
    *parents, last = (part.strip() for part in key.split("."))
    if not equals or not all((*parents, last)):
        raise UsageError(f"{override!r} is not of the form key=value, e.g. model.num_layers=8")
    try:
        value = tomllib.loads(f"v = {text}") if "\n" not in text else {"v": text}
    except tomllib.TOMLDecodeError:
        value = {"v": text}
    for name in parents:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise UsageError(f"{override!r}: {name!r} is a value, not a table")
    table[last] = value["v"]


def parse(table: Mapping[str, Any], where: str = "recipe") -> Config:
    """A validated Config of a nested table; raises `ConfigError` with every problem found."""
    table = dict(table)
    problems = _check_schema(table)
    values = dict(table)
    for name, group in KIND_TABLES.items():
        section = table.get(name)
        if not isinstance(section, Mapping) or not isinstance(section.get("kind"), str):
            known = ", ".join(plugins.names(group))
            problems.append(f'{name}: a table [{name}] with a kind is needed, e.g. kind = "..." (known: {known})')
            values[name] = None
            continue
        try:
            cls = LiveConfig if section["kind"] == "live" else plugins.find(group, section["kind"]).config
        except UsageError as error:
            problems.append(f"{name}.kind: {error}")
            values[name] = None
            continue
        values[name] = _validated(cls, dict(section), name, problems)
    config = _validated(Config, values, "", problems)
    if not problems and config is not None:
        problems += cross_check(config)
    if problems:
        raise ConfigError(problems, where)
    return config


def from_overrides(cls: type, overrides: Sequence[str], where: str) -> Any:
    """A config dataclass of its defaults and `key=value` overrides; raises `ConfigError` or `UsageError`."""
    table: dict[str, Any] = {}
    for override in overrides:
        apply_override(table, override)
    problems: list[str] = []
    config = _validated(cls, table, "", problems)
    if problems:
        raise ConfigError(problems, where)
    return config


def validate(config: Config) -> Config:
    """Check a Config made in Python as if it were read from a file; raises `ConfigError`."""
    return parse(to_table(config), where="config")


def cross_check(config: Config) -> list[str]:
    """Problems that concern several fields at once."""
    problems = []
    place = PurePath(config.name)
    if not place.name or place.is_absolute() or ".." in place.parts or "\0" in config.name:
        problems.append(f"name: {config.name!r} names no directory below runs/: use a name such as 'my-run'")
    if config.microbatch > config.global_batch:
        problems.append(
            f"microbatch: {config.microbatch} is more than global_batch ({config.global_batch}): "
            f"use at most {config.global_batch}"
        )
    elif config.microbatch and config.global_batch % config.microbatch:
        near = nearest_multiples(config.global_batch, config.microbatch)
        problems.append(
            f"global_batch: {config.global_batch} must be divisible by microbatch ({config.microbatch}): use {near}"
        )
    ranks = config.launch.num_processes
    if ranks > 1 and config.global_batch % (ranks * max(1, config.microbatch)):
        near = nearest_multiples(config.global_batch, ranks * max(1, config.microbatch))
        divisor = f"launch.num_processes ({ranks})"
        divisor += f" x microbatch ({config.microbatch})" if config.microbatch else ""
        problems.append(f"global_batch: {config.global_batch} must be divisible by {divisor}: use {near}")
    for name in ("model", "data"):
        check = getattr(getattr(config, name), "problems", None)
        problems += [f"{name}.{problem}" for problem in check()] if check else []
    return problems


def nearest_multiples(value: int, divisor: int) -> str:
    """`28 or 32` for 30 and 4: the allowed neighbours of a size that does not divide."""
    below, above = value // divisor * divisor, -(-value // divisor) * divisor
    return f"{below} or {above}" if below else f"{above}"


def missing_sizes(model: str, shape: Mapping[str, int], needed: Sequence[str], fitting: str) -> list[str]:
    """The problem of a model kind whose dataset names none of the sizes it reads; `fitting` are kinds that do."""
    if all(name in shape for name in needed):
        return []
    has = ", ".join(shape) or "none"
    return [
        f"kind: {model} reads samples with {', '.join(needed)}; the dataset's have {has}: use data.kind = {fitting}, "
        f"or another model.kind"
    ]


def _check_schema(table: dict[str, Any]) -> list[str]:
    version = table.pop("schema_version", SCHEMA_VERSION)
    table.pop("turbopump_version", None)
    if version != SCHEMA_VERSION:
        return [f"schema_version: {version!r} was written by another version of turbopump (this one reads "
                f"{SCHEMA_VERSION})"]  # fmt: skip
    return []


def _validated(cls: type, values: dict[str, Any], prefix: str, problems: list[str]) -> Any:
    keys = _key_problems(cls, values, prefix)
    found = dict(keys)
    try:
        config = _adapter(cls).validate_python(values)
    except ValidationError as error:
        config = None
        for item in error.errors():
            path = _dotted(cls, item["loc"], prefix)
            if path not in found and not (prefix == "" and path in KIND_TABLES):
                given = "" if item["type"] == "missing" else f"{item['input']!r} given; "
                found[path] = f"{path}: {given}{_plain(item)}"
            elif path in found and path not in keys:  # the other branches of a union
                found[path] += f", or {_plain(item)}"
    problems += found.values()
    return None if found else config


def _dotted(cls: Any, location: Sequence[int | str], prefix: str) -> str:
    """`logging.loggers.1` of pydantic's location, which also names the branches of a union."""
    path = [prefix] if prefix else []
    for part in location:
        if dataclasses.is_dataclass(cls) and part in (hints := typing.get_type_hints(cls)):
            cls = hints[str(part)]
        elif isinstance(part, int):
            cls = _element(cls)
        else:
            cls = _branch(cls, part)
            continue
        path.append(str(part))
    return ".".join(path)


def _element(hint: Any) -> Any:
    """The type of a list's elements."""
    return (typing.get_args(hint) or (hint,))[0]


def _branch(hint: Any, kind: Any) -> Any:
    """The dataclass of a union that tables of `kind` are read by; the hint itself where there is none."""
    for choice in typing.get_args(hint):
        if dataclasses.is_dataclass(choice) and kind in typing.get_args(typing.get_type_hints(choice).get("kind")):
            return choice
    return hint


def _plain(item: Any) -> str:
    if item["type"] == "missing":
        return "this setting is needed"
    if item["type"] == "dataclass_type":
        return "a table is needed"
    if item["type"] == "tuple_type":
        return "a list is needed, e.g. [1, 2]"
    return item["msg"][0].lower() + item["msg"][1:]


def _key_problems(cls: type, values: Mapping[Any, Any], prefix: str) -> dict[str, str]:
    """Problems by dotted path that pydantic lets pass: unknown keys, `true` for a number, numbers too big."""
    problems = {}
    hints = typing.get_type_hints(cls)
    for key, value in values.items():
        path = f"{prefix}.{key}" if prefix else str(key)
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, 1)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(hints)}"
            problems[path] = f"{path}: no such setting; {hint}"
        elif dataclasses.is_dataclass(hints[key]) and isinstance(value, Mapping):
            problems |= _key_problems(typing.cast(type, hints[key]), value, path)
        elif isinstance(value, Sequence) and not isinstance(value, str):
            for number, item in enumerate(value):
                inner = _branch(_element(hints[key]), item.get("kind")) if isinstance(item, Mapping) else None
                if dataclasses.is_dataclass(inner):
                    problems |= _key_problems(typing.cast(type, inner), item, f"{path}.{number}")
        elif isinstance(value, bool) and _is_number(hints[key]):
            problems[path] = f"{path}: {str(value).lower()} given; a number is needed"
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            problems[path] = f"{path}: {value} given; a number of at most 64 bits is needed"
        elif isinstance(value, float) and not math.isfinite(value):
            problems[path] = f"{path}: {value} given; a finite number is needed"
    return problems


def _is_number(hint: Any) -> bool:
    choices = typing.get_args(hint) or (hint,)
    return bool not in choices and (int in choices or float in choices)


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def json_schema(cls: type) -> dict[str, Any]:
    """JSON Schema of a config dataclass, as pydantic sees it (turbopump.core.reference adds the words)."""
    return _adapter(cls).json_schema()


def to_table(config: Any) -> dict[str, Any]:
    """A nested plain table of a config dataclass; `None` and empty values that TOML cannot hold are left out."""
    table: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if value is None:
            continue
        table[item.name] = _as_lists(value)
    return table


def _as_lists(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_table(value)
    return [_as_lists(item) for item in value] if isinstance(value, tuple | list) else value


def to_toml(table: Mapping[str, Any]) -> str:
    """TOML text of a nested table, plain values before tables."""
    plain = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    nested = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    return tomli_w.dumps({**plain, **nested})


def from_toml(text: str) -> dict[str, Any]:
    """Nested table of TOML text; raises `UsageError`."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"not valid TOML: {error}") from error


def dumps(config: Config) -> str:
    """The fully resolved recipe as TOML, with the schema version."""
    from turbopump.core.version import VERSION

    return to_toml({"schema_version": SCHEMA_VERSION, "turbopump_version": VERSION, **to_table(config)})


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """Settings that differ, as (dotted path, old, new)."""
    return _differences(to_table(old), to_table(new), "")


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[tuple[str, Any, Any]]:
    found = []
    for key in dict.fromkeys([*old, *new]):
        path = f"{prefix}.{key}" if prefix else key
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += _differences(a, b, path)
        elif a != b:
            found.append((path, a, b))
    return found


def may_change_on_resume(path: str) -> bool:
    return any(path == allowed or path.startswith(allowed + ".") for allowed in CHANGEABLE_ON_RESUME)


def describe_type(hint: Any) -> str:
    """The type of a setting as the reference prints it, e.g. `integer >= 1` or `"cosine" | "wsd"`."""
    if typing.get_origin(hint) is Annotated:
        base, *limits = typing.get_args(hint)
        signs = {Ge: (">=", "ge"), Gt: (">", "gt"), Le: ("<=", "le"), Lt: ("<", "lt")}
        shown = [(signs[type(limit)], limit) for limit in limits if type(limit) in signs]
        text = " and ".join(f"{sign} {getattr(limit, name)}" for (sign, name), limit in shown)
        return f"{describe_type(base)} {text}".strip()
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " | ".join(tomli_w.dumps({"v": value})[4:].strip() for value in inside if value is not None)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(describe_type(choice) for choice in inside if choice is not type(None)))
    if origin in (tuple, list):
        same = origin is list or (len(inside) == 2 and inside[1] is Ellipsis)
        return f"list of {describe_type(inside[0])}" if same else f"[{', '.join(map(describe_type, inside))}]"
    plain = {int: "integer", float: "number", str: "string", bool: "true | false", tuple: "list", list: "list"}
    return plain.get(hint, "table")
