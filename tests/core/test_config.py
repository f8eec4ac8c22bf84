import dataclasses
import sys
import tomllib
import typing
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt
from hypothesis import given
from hypothesis import strategies as st

from turbopump.core import config, plugins
from turbopump.core.errors import ConfigError, UsageError


@dataclass(frozen=True)
class ToyModel:
    kind: Literal["toy"] = "toy"
    width: config.PositiveInt = config.setting(8, "width")
    heads: config.PositiveInt | None = None
    dropout: config.Probability = 0.0
    name_or_size: int | str = "small"
    kernel: tuple[int, ...] = (3, 3)
    stages: tuple[tuple[int, int], ...] = ()
    head: Literal["tied", "free"] = "tied"

    def problems(self) -> list[str]:
        return [] if self.width % 2 == 0 else [f"width: {self.width} must be even: use {self.width + 1}"]


@dataclass(frozen=True)
class ToyData:
    path: str
    kind: Literal["toy"] = "toy"
    length: config.PositiveInt = 16


TOY_MODEL = plugins.ModelKind(ToyModel, workload=lambda *_: None, module="json")
TOY_DATA = plugins.SourceKind(ToyData, open=lambda *_: None, shape=lambda _: {})
MINIMAL: dict[str, Any] = {"model": {"kind": "toy"}, "data": {"kind": "toy", "path": "d"}}


@pytest.fixture(autouse=True, scope="module")
def toy_kinds():
    """Entry points to the kinds of this file, in place of the installed ones."""
    groups = {
        group: {"toy": EntryPoint("toy", f"{__name__}:{name}", group)}
        for group, name in {"turbopump.models": "TOY_MODEL", "turbopump.sources": "TOY_DATA"}.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, __name__, sys.modules.get(__name__, SimpleNamespace(**globals())))
        patch.setattr(plugins, "_group", groups.__getitem__)
        yield


def problems(**changes) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        config.parse({**MINIMAL, **changes})
    return caught.value.problems


def strategy_of(hint: Any) -> st.SearchStrategy[Any]:
    """Valid values of a setting's type, limits included."""
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        limits = {type(limit): limit for limit in inside[1:]}
        low = limits[Ge].ge if Ge in limits else limits[Gt].gt if Gt in limits else None
        high = limits[Le].le if Le in limits else limits[Lt].lt if Lt in limits else None
        if inside[0] is int:
            return st.integers(low, 2**63 - 1 if high is None else high)
        return st.floats(
            low,
            high,
            exclude_min=Gt in limits,
            exclude_max=Lt in limits,
            allow_nan=False,
            allow_infinity=False,
        )
    if origin is Literal:
        return st.sampled_from(inside)
    if origin is tuple:
        if inside[1] is Ellipsis:
            return st.lists(strategy_of(inside[0]), max_size=4).map(tuple)
        return st.tuples(*map(strategy_of, inside))
    if inside:
        return st.one_of(*map(strategy_of, inside))
    if dataclasses.is_dataclass(hint):
        return configs_of(hint)
    if hint is Any:
        return st.nothing()
    plain = {int: st.integers(-(2**63), 2**63 - 1), str: st.text(), bool: st.booleans(), type(None): st.none()}
    return plain[hint]


def configs_of(cls: Any, **fixed: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(cls, include_extras=True)
    settings = {name: strategy_of(hint) for name, hint in hints.items() if name not in fixed}
    return st.builds(cls, **settings, **fixed)


def valid_configs() -> st.SearchStrategy[config.Config]:
    microbatches = st.tuples(st.integers(0, 64), st.integers(1, 64))
    names = st.from_regex(r"[a-z][a-z0-9_.-]{0,9}", fullmatch=True)
    models = configs_of(ToyModel, width=st.integers(1, 100).map(lambda n: 2 * n))
    plain = configs_of(config.Config, model=models, data=configs_of(ToyData), name=names)

    def fitting(c: config.Config, sizes: tuple[int, int]) -> config.Config:
        launch = dataclasses.replace(c.launch, num_processes=min(c.launch.num_processes, 64))
        batch = max(sizes[0], 1) * sizes[1] * max(launch.num_processes, 1)
        return dataclasses.replace(c, microbatch=sizes[0], global_batch=batch, launch=launch)

    return st.builds(fitting, plain, microbatches)


@pytest.mark.slow
@given(valid_configs())
def test_toml_gives_back_every_valid_config(original):
    text = config.dumps(original)
    read = config.parse(tomllib.loads(text))
    assert read == original
    assert config.differences(original, read) == []
    assert config.validate(original) == original


def test_a_minimal_recipe_takes_the_defaults(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('[model]\nkind = "toy"\n[data]\nkind = "toy"\npath = "d"\n')
    read = config.load(path)
    assert read == config.Config(ToyModel(), ToyData("d"))
    assert read.optimizer.lr == 3e-4
    assert tomllib.loads(config.dumps(read))["schema_version"] == config.SCHEMA_VERSION


def test_all_problems_are_reported_at_once_each_with_its_path():
    found = problems(
        num_steps=0,
        optimizer={"lr": -1, "kind": "sgd"},
        model={"kind": "toy", "width": "x", "dropout": 1.0},
        data={"kind": "toy"},
        loader={"num_workers": -1},
    )
    assert [p.split(":")[0] for p in found] == [
        "model.width",
        "model.dropout",
        "data.path",
        "num_steps",
        "optimizer.kind",
        "optimizer.lr",
        "loader.num_workers",
    ]
    assert "'x' given" in found[0] and "needed" in found[2] and "'adamw' or 'muon'" in found[4]


def test_no_problem_is_reported_twice():
    found = problems(
        optimizer={"lrr": 1, "lr": float("nan")}, model={"kind": "toy", "widht": 3, "name_or_size": [1]}, num_step=3
    )
    paths = [p.split(":")[0] for p in found]
    assert sorted(paths) == ["model.name_or_size", "model.widht", "num_step", "optimizer.lr", "optimizer.lrr"]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ({"num_step": 3}, "num_step: no such setting; did you mean 'num_steps'?"),
        ({"optimizer": {"weight_deacy": 0.1}}, "optimizer.weight_deacy: no such setting; did you mean 'weight_decay'?"),
        ({"model": {"kind": "toy", "widht": 3}}, "model.widht: no such setting; did you mean 'width'?"),
        ({"zzz": 3}, "zzz: no such setting; known: model, data, name"),
        ({"optimizer": 3}, "optimizer: 3 given; a table is needed"),
        ({"optimizer": [{"lr": 1.0}]}, "optimizer: [{'lr': 1.0}] given; a table is needed"),
        ({"optimizer": "adamw"}, "optimizer: 'adamw' given; a table is needed"),
        ({"logging": {"loggers": "tensorboard"}}, "logging.loggers: 'tensorboard' given; a list is needed"),
        ({"logging": {"loggers": ["tensorboard", 3]}}, "logging.loggers.1: 3 given"),
        ({"num_steps": True}, "num_steps: true given; a number is needed"),
        ({"optimizer": {"lr": False}}, "optimizer.lr: false given; a number is needed"),
        ({"model": {"kind": "toy", "heads": True}}, "model.heads: true given; a number is needed"),
        ({"optimizer": {"lr": float("inf")}}, "optimizer.lr: inf given; a finite number is needed"),
        ({"optimizer": {"eps": float("nan")}}, "optimizer.eps: nan given; a finite number is needed"),
        ({"seed": 2**63}, "seed: 9223372036854775808 given; a number of at most 64 bits is needed"),
        ({"num_steps": 1.5}, "num_steps: 1.5 given"),
        ({"name": 3}, "name: 3 given"),
        ({"checkpoint": {"keep_best": "perhaps"}}, "checkpoint.keep_best: 'perhaps' given"),
        ({"model": 3}, "model: a table [model] with a kind is needed"),
        ({"model": {"kind": 3}}, "model: a table [model] with a kind is needed"),
        ({"model": {}}, "(known: toy)"),
        ({"model": {"kind": "toi"}}, "model.kind: no models kind 'toi', did you mean 'toy'? (known: toy)"),
        ({"model": {"kind": "live", "bad": 1}}, "model.bad: no such setting; known: kind, reference"),
        ({"data": {"kind": "live", "reference": 3}}, "data.reference: 3 given"),
        ({"schema_version": 99}, "schema_version: 99 was written by another version"),
        ({"name": ""}, "name: '' names no directory below runs/"),
        ({"name": "../x"}, "name: '../x' names no directory below runs/"),
        ({"name": "/x"}, "name: '/x' names no directory below runs/"),
        ({"microbatch": 64}, "microbatch: 64 is more than global_batch (32): use at most 32"),
        ({"microbatch": 5}, "global_batch: 32 must be divisible by microbatch (5): use 30 or 35"),
        ({"model": {"kind": "toy", "width": 3}}, "model.width: 3 must be even: use 4"),
    ],
)
def test_a_wrong_recipe_is_explained(table, expected):
    found = problems(**table)
    assert len(found) == 1
    assert expected in found[0]


def test_a_recipe_without_model_and_data_names_both():
    with pytest.raises(ConfigError) as caught:
        config.parse({})
    assert [p.split(":")[0] for p in caught.value.problems] == ["model", "data"]


def test_whole_numbers_may_be_written_as_floats_and_back():
    read = config.parse({**MINIMAL, "num_steps": 1e3, "optimizer": {"lr": 1}})
    assert read.num_steps == 1000 and isinstance(read.num_steps, int)
    assert read.optimizer.lr == 1.0


def test_live_models_are_read_back():
    read = config.parse({**MINIMAL, "model": {"kind": "live", "reference": "mine:build"}})
    assert read.model == config.LiveConfig(reference="mine:build")


def test_parse_leaves_the_table_as_it_was():
    table = {**MINIMAL, "schema_version": config.SCHEMA_VERSION}
    before = dict(table)
    config.parse(table)
    assert table == before


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("num_steps=7", ("num_steps",), 7),
        ("a.b.c=7", ("a", "b", "c"), 7),
        ("a.b=-3", ("a", "b"), -3),
        ("a.b=1e-3", ("a", "b"), 1e-3),
        ("a.b = 1_000", ("a", "b"), 1000),
        ("a.b=true", ("a", "b"), True),
        ("a.b=[1, 2]", ("a", "b"), [1, 2]),
        ('a.b=["x","y"]', ("a", "b"), ["x", "y"]),
        ("a.b={c = 1}", ("a", "b"), {"c": 1}),
        ("a.b=text", ("a", "b"), "text"),
        ('a.b="quoted text"', ("a", "b"), "quoted text"),
        ("a.b='7'", ("a", "b"), "7"),
        ("a.b=x=y", ("a", "b"), "x=y"),
        ("a.b=", ("a", "b"), ""),
        ("a.b=/some/path.txt", ("a", "b"), "/some/path.txt"),
        ("a.b=[1, 2", ("a", "b"), "[1, 2"),
        ("a.b=1\nc = 2", ("a", "b"), "1\nc = 2"),
    ],
)
def test_overrides(override, path, value):
    table: dict[str, Any] = {}
    config.apply_override(table, override)
    for name in path:
        table = table[name]
    assert table == value


@pytest.mark.parametrize("override", ["num_steps", "=3", "a..b=3", ".a=3", "a.=3", "", " = "])
def test_malformed_overrides(override):
    with pytest.raises(UsageError, match="not of the form key=value"):
        config.apply_override({}, override)


def test_an_override_cannot_go_below_a_value():
    with pytest.raises(UsageError, match="'num_steps' is a value, not a table"):
        config.apply_override({"num_steps": 3}, "num_steps.x=1")


def test_overrides_reach_the_config_and_its_errors(tmp_path):
    path = tmp_path / "r.toml"
    path.write_text('num_steps = 5\n[model]\nkind = "toy"\n[data]\nkind = "toy"\npath = "d"\n')
    read = config.load(path, ["num_steps=6", "model.width=10", "optimizer.lr=.5", "model.kernel=[1, 2, 3]"])
    assert (read.num_steps, read.model.width, read.optimizer.lr, read.model.kernel) == (6, 10, 0.5, (1, 2, 3))
    with pytest.raises(ConfigError, match=r"r\.toml: 2 problems"):
        config.load(path, ["num_steps=many", "model.widht=10"])


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"[model\n", b"a = 1\na = 2\n"])
def test_a_file_that_is_no_toml_is_a_usage_error(tmp_path, content):
    path = tmp_path / "r.toml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"r\.toml"):
        config.load(path)


def test_a_missing_recipe_or_a_directory_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no recipe at"):
        config.load(tmp_path / "none.toml")
    with pytest.raises(UsageError, match="is a directory"):
        config.load(tmp_path)
    with pytest.raises(UsageError, match="not valid TOML"):
        config.from_toml("a = ")


def test_differences_name_path_old_and_new():
    old = config.parse({**MINIMAL, "num_steps": 5})
    new = config.parse({**MINIMAL, "num_steps": 6, "model": {"kind": "toy", "heads": 2}, "logging": {"every": 3}})
    assert config.differences(old, new) == [("model.heads", None, 2), ("num_steps", 5, 6), ("logging.every", 10, 3)]


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("num_steps", True),
        ("evaluation.every", True),
        ("checkpoint.keep_last", True),
        ("launch.num_processes", True),
        ("loader.num_workers", True),
        ("data.path", True),
        ("loader.order", False),
        ("data.length", False),
        ("optimizer.lr", False),
        ("seed", False),
        ("num_steps_more", False),
        ("launching", False),
        ("data", False),
    ],
)
def test_what_may_change_on_resume(path, allowed):
    assert config.may_change_on_resume(path) is allowed


def test_the_list_of_what_may_change_names_existing_settings():
    for path in config.CHANGEABLE_ON_RESUME:
        cls: Any = config.Config
        for part in path.split("."):
            if cls is Any:
                break
            cls = typing.get_type_hints(cls)[part]


@pytest.mark.parametrize(
    ("hint", "text"),
    [
        (int, "integer"),
        (float, "number"),
        (str, "string"),
        (bool, "true | false"),
        (config.PositiveInt, "integer >= 1"),
        (config.PositiveFloat, "number > 0"),
        (config.Fraction, "number >= 0 and <= 1"),
        (config.Probability, "number >= 0 and < 1"),
        (Literal["a", "b"], '"a" | "b"'),
        (Literal[1, 2], "1 | 2"),
        (int | None, "integer"),
        (config.PositiveInt | None, "integer >= 1"),
        (int | str, "integer | string"),
        (tuple[str, ...], "list of string"),
        (tuple[int, int], "[integer, integer]"),
        (tuple[tuple[int, int], ...], "list of [integer, integer]"),
        (list[int], "list of integer"),
        (dict[str, int], "table"),
        (config.OptimizerConfig, "table"),
        (Any, "table"),
    ],
)
def test_types_are_described(hint, text):
    assert config.describe_type(hint) == text


def test_every_setting_has_a_line_for_the_reference():
    def check(cls):
        for item in dataclasses.fields(cls):
            assert item.metadata["doc"].strip(), f"{cls.__name__}.{item.name}"
            hint = typing.get_type_hints(cls)[item.name]
            if dataclasses.is_dataclass(hint):
                check(hint)

    check(config.Config)


@given(st.integers(1, 10**6), st.integers(1, 10**4))
def test_nearest_multiples_are_allowed_and_near(value, divisor):
    for near in config.nearest_multiples(value, divisor).split(" or "):
        assert int(near) > 0 and int(near) % divisor == 0 and abs(int(near) - value) < divisor


def test_recipes_in_the_repository_are_toml():
    for path in Path(__file__).parents[2].glob("recipes/*.toml"):
        assert config.from_toml(path.read_text())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"global_batch": 8, "ranks": 3}, "global_batch: 8 must be divisible by launch.num_processes (3): use 6 or 9"),
        (
            {"global_batch": 12, "microbatch": 4, "ranks": 2},
            "global_batch: 12 must be divisible by launch.num_processes (2) x microbatch (4): use 8 or 16",
        ),
        ({"global_batch": 30, "microbatch": 4, "ranks": 1}, "must be divisible by microbatch (4): use 28 or 32"),
    ],
)
def test_sizes_that_ranks_cannot_share_are_found_before_any_is_started(sizes, expected):
    table = {
        "model": {"kind": "toy"},
        "data": {"kind": "toy", "path": "d"},
        "launch": {"num_processes": sizes.pop("ranks")},
    }
    with pytest.raises(ConfigError) as caught:
        config.parse({**table, **sizes})
    assert expected in str(caught.value)
