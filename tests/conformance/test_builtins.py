"""Every built-in kind keeps its contract; kinds that do not are found out."""

import dataclasses
import pickle
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from turbopump.core import plugins
from turbopump.core.errors import UsageError
from turbopump.data.loader import Loader
from turbopump.data.mixture import TokensPart
from turbopump.data.sources import ArraysConfig, TokensConfig
from turbopump.data.tones import TonesConfig
from turbopump.pack import pack
from turbopump.training.conformance import check_logger, check_model_kind, check_source_kind

MODELS: dict[str, tuple[dict[str, Any], str, dict[str, Any]]] = {  # settings, the data it reads, settings of that
    "transformer": ({"num_layers": 2, "hidden_size": 16, "num_heads": 2, "dropout": 0.1}, "tokens", {"seq_len": 16}),
    "convnet": ({"width": 4, "blocks": (1, 1), "in_channels": 1}, "digits", {"shift": 1}),
    "deepspeech2": (
        {"num_labels": 9, "frequencies": 64, "conv_channels": 2, "num_layers": 1, "hidden_size": 8}, "tones", {},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Paths of a token dataset and an array dataset."""
    folder = tmp_path_factory.mktemp("packed")
    pack(iter([f"document {n}: the quick brown fox " * 20 for n in range(40)]), folder / "tokens")
    pack({"x": np.random.rand(64, 3).astype(np.float32), "y": np.arange(64)}, folder / "arrays")
    return folder


def data_config(name: str, packed, settings: dict[str, Any]) -> Any:
    cls = plugins.find("turbopump.sources", name).config
    if name == "mixture":
        return cls(parts=(TokensPart(path=str(packed / "tokens"), seq_len=16, weight=1.0),) * 2)
    path = {"path": str(packed / name)} if "path" in {f.name for f in dataclasses.fields(cls)} else {}
    return cls(**path, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", plugins.names("turbopump.models"))
def test_model_kinds(name: str, packed) -> None:
    settings, data, data_settings = MODELS[name]
    kind, source_kind = plugins.find("turbopump.models", name), plugins.find("turbopump.sources", data)
    config = data_config(data, packed, data_settings)
    batch = next(Loader(source_kind.open(config, "train"), global_batch=4))[0]
    check_model_kind(kind, kind.config(**settings), shape=source_kind.shape(config), batch=batch)


@pytest.mark.slow
@pytest.mark.parametrize("name", plugins.names("turbopump.sources"))
def test_source_kinds(name: str, packed) -> None:
    settings = {"shift": 1} if name == "digits" else {"seq_len": 16} if name == "tokens" else {}
    check_source_kind(plugins.find("turbopump.sources", name), data_config(name, packed, settings))


@pytest.mark.parametrize("name", plugins.names("turbopump.loggers"))
def test_loggers(name: str) -> None:
    check_logger(plugins.find("turbopump.loggers", name))


# ---- what does not conform is found out


def altered(**changes: Any) -> plugins.ModelKind:
    """The convnet with one part exchanged."""
    real = plugins.find("turbopump.models", "convnet")
    side = real.torch_side()
    parts = {name: getattr(side, name) for name in ("build", "loss", "weight", "metrics")} | changes
    workload = parts.pop("workload", real.workload)

    class Altered(plugins.ModelKind):
        def torch_side(self) -> Any:
            return SimpleNamespace(**{name: part for name, part in parts.items() if part is not None})

    return Altered(config=parts.pop("config", real.config), workload=workload, module="altered")


def spare(config: Any) -> torch.nn.Module:
    model = plugins.find("turbopump.models", "convnet").torch_side().build(config)
    model.spare = torch.nn.Linear(2, 2)
    return model


REAL = plugins.find("turbopump.models", "convnet")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrics": None}, "needs a function metrics"),
        ({"build": spare}, "the workload counts"),
        ({"weight": lambda batch: 2.0 * len(batch[0])}, "positive integer"),
        ({"weight": lambda batch: 1}, "is the weight of the batch"),
        ({"loss": lambda model, batch: model(batch[0]).sum(1)}, "one number"),
        ({"loss": lambda model, batch: model(batch[0]).sum() * torch.rand(()).item()}, "same mean"),
        ({"metrics": lambda model, batch: {"accuracy": (1.0, 4)}}, "holds `loss`"),
        ({"workload": lambda c, n, shape, dtype: REAL.workload(c, 1, shape, dtype)}, "twice the samples"),
    ],
)
def test_a_model_kind_that_breaks_its_contract(changes: dict[str, Any], expected: str) -> None:
    batch = (torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3]))
    config = REAL.config(width=4, blocks=(1, 1), in_channels=1)
    with pytest.raises(AssertionError, match=expected):
        check_model_kind(altered(**changes), config, shape={"channels": 1, "height": 8, "width": 8}, batch=batch)


class Rows:
    """A source to spoil: ten rows of three numbers."""

    randomness = "none"

    def __init__(self) -> None:
        self.rows = np.arange(1.0, 31.0).reshape(10, 3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index].copy()


class Shared(Rows):
    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index]


class Drawn(Rows):
    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index] + np.random.rand()


class Wrapped(Rows):
    def __getitem__(self, index: int) -> np.ndarray:
        return self.rows[index % 10].copy()


class Sorted(Rows):
    def __getitems__(self, indices: np.ndarray) -> np.ndarray:
        return self.rows[np.sort(indices)]


class Sealed(Rows):
    def __reduce__(self) -> Any:
        raise pickle.PicklingError("this source stays here")


def opener(cls: type, known: tuple[str, ...] = ("train",)) -> Any:
    def open_source(config: Any, split: str) -> Any:
        if split not in known:
            raise UsageError(f"no split {split!r}")
        return cls()

    return open_source


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Rows, None),
        (Shared, "fresh arrays"),
        (Drawn, "must not depend on the generators"),
        (Wrapped, "must raise IndexError"),
        (Sorted, "in the order asked for"),
    ],
)
def test_a_source_kind_that_breaks_its_contract(cls: type, expected: str | None) -> None:
    kind = plugins.SourceKind(TonesConfig, opener(cls), lambda config: {"features": 3})
    if expected is None:
        check_source_kind(kind, TonesConfig())
        return
    with pytest.raises(AssertionError, match=expected):
        check_source_kind(kind, TonesConfig())


@pytest.mark.slow
def test_sources_that_do_not_travel_or_take_any_split() -> None:
    with pytest.raises(pickle.PicklingError):
        check_source_kind(plugins.SourceKind(TonesConfig, opener(Sealed), lambda c: {"n": 3}), TonesConfig())
    anything = opener(Rows, ("train", "no such split"))
    with pytest.raises(AssertionError, match="unknown split"):
        check_source_kind(plugins.SourceKind(TonesConfig, anything, lambda c: {"n": 3}), TonesConfig())


@dataclass
class Thawed:
    kind: str = "thawed"


def test_configs_are_frozen_and_of_their_kind() -> None:
    with pytest.raises(AssertionError, match="must be a frozen dataclass"):
        check_source_kind(plugins.SourceKind(Thawed, opener(Rows), lambda c: {"n": 3}), Thawed())
    with pytest.raises(AssertionError, match="of the kind's config dataclass"):
        check_source_kind(plugins.SourceKind(TokensConfig, opener(Rows), lambda c: {}), ArraysConfig(path="x"))


def test_loggers_that_break_their_contract(tmp_path) -> None:
    class Outside:
        def __init__(self, directory) -> None:
            (directory.parent / "mine.txt").write_text("here")

        def log(self, record) -> None: ...
        def close(self) -> None: ...

    class Changing(Outside):
        def __init__(self, directory) -> None: ...
        def log(self, record) -> None:
            record["seen"] = True

    with pytest.raises(AssertionError, match="below its directory only"):
        check_logger(Outside)
    with pytest.raises(AssertionError, match="must not change the record"):
        check_logger(Changing)
