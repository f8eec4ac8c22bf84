"""Plug-ins by `kind`: a recipe names one, Python entry points find it.

Groups: `turbopump.models` (a `ModelKind`), `turbopump.sources` (a `SourceKind`), `turbopump.loggers`. A bare
`module:function` is taken on the command line only; it is never read from a file.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from turbopump.core.errors import UsageError
from turbopump.core.workload import Workload


@dataclass(frozen=True)
class ModelKind:
    """A workload a recipe can name. `config` and `workload` import no torch; `module` names the torch side lazily.

    The module named has `build(config) -> nn.Module`, `loss(model, batch) -> Tensor` (the mean over the valid units
    of the batch), `weight(batch) -> int` (the number of valid units the mean was taken over) and
    `metrics(model, batch) -> dict[str, tuple[float, float]]` (a sum and a count for each metric, for evaluation).
    """

    config: type
    workload: Callable[..., Workload]  # (config, samples, shape: Mapping[str, int], dtype) -> Workload
    module: str

    def torch_side(self) -> Any:
        return importlib.import_module(self.module)


@dataclass(frozen=True)
class SourceKind:
    """A dataset a recipe can name. `config` imports no torch.

    `open(config, split)` returns a `RandomAccessDataSource` (see turbopump.data.sources); `shape(config)` the sizes of
    one sample that the model's workload needs, e.g. `{"seq_len": 256}`.
    """

    config: type
    open: Callable[[Any, str], Any]
    shape: Callable[[Any], Mapping[str, int]]


@cache
def _group(group: str) -> dict[str, Any]:
    return {point.name: point for point in entry_points(group=group)}


def names(group: str) -> list[str]:
    return sorted(_group(group))


def find(group: str, kind: str) -> Any:
    """The plug-in `kind` of `group`; raises `UsageError` naming the known ones."""
    known = _group(group)
    if kind not in known:
        close = difflib.get_close_matches(kind, known, 1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        allowed = ", ".join(sorted(known)) or "none installed"
        raise UsageError(f"no {group.removeprefix('turbopump.')} kind {kind!r}{hint} (known: {allowed})")
    try:
        return known[kind].load()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{group.removeprefix('turbopump.')} kind {kind!r} is installed but does not load "
                         f"({known[kind].value}): {error}") from error  # fmt: skip


def load_function(reference: str) -> Any:
    """The object that `module:function` names; raises `UsageError` where there is none."""
    module_name, _, attribute = reference.partition(":")
    if not attribute.isidentifier() or not all(module_name.split(".")):
        raise UsageError(f"{reference!r} is not of the form module:function")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UsageError(f"{reference}: no module {error.name!r}; is its folder on PYTHONPATH?") from error
    if not hasattr(module, attribute):
        raise UsageError(f"{reference}: module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


def load_live(references: Mapping[str, str | None]) -> dict[str, Any]:
    """Objects that `module:function` references of the command line name; all but a loss are made by calling them.

    A module beside the recipe is found as `python -m` would find it.
    """
    given = {name: text for name, text in references.items() if text}
    if given and "" not in sys.path:
        sys.path.insert(0, "")
    functions = {name: load_function(text) for name, text in given.items()}
    return {name: function if name == "loss" else function() for name, function in functions.items()}
