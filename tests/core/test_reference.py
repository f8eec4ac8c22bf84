import dataclasses
import json
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from turbopump.core import config, plugins, reference

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class PartConfig:
    """A part."""

    size: config.PositiveInt = config.setting(3, "size of the part")


@dataclass(frozen=True)
class ToyConfig:
    """A toy."""

    path: str = config.setting(doc="where | it is")
    kind: Literal["toy"] = config.setting("toy", "the toy")
    heads: config.PositiveInt | None = config.setting(None, "heads")
    part: PartConfig = config.setting(PartConfig, "a part")


def test_the_committed_reference_is_up_to_date():
    for name, content in reference.render().items():
        committed = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert committed == content, f"docs/{name} is out of date: python -m turbopump.core.reference"


def test_every_key_is_in_the_reference_and_in_the_schema():
    text, schema = reference.recipe_reference(), reference.recipe_schema()

    def check(cls: Any, node: dict[str, Any], path: str) -> None:
        assert node["additionalProperties"] is False, path
        hints = typing.get_type_hints(cls)
        for item in dataclasses.fields(cls):
            assert f"| `{item.name}` |" in text, path
            inner = node["properties"][item.name]
            assert inner["description"] == item.metadata["doc"]
            if dataclasses.is_dataclass(hints[item.name]):
                check(hints[item.name], inner, f"{path}.{item.name}")

    check(config.Config, schema, "")
    assert set(schema["required"]) == {"model", "data"}
    assert "$ref" not in json.dumps(schema)


def test_kinds_are_a_choice_told_apart_by_their_name(monkeypatch):
    kind = plugins.ModelKind(ToyConfig, workload=lambda *_: None, module="json")
    monkeypatch.setattr(plugins, "names", lambda group: ["toy"])
    monkeypatch.setattr(plugins, "find", lambda group, name: kind)
    schema = reference.recipe_schema()
    (toy,) = schema["properties"]["model"]["oneOf"]
    assert toy["properties"]["kind"]["const"] == "toy"
    assert toy["required"] == ["kind", "path"] and toy["additionalProperties"] is False
    assert toy["properties"]["part"]["properties"]["size"]["minimum"] == 1
    text = reference.recipe_reference()
    assert '## `[model]` with `kind = "toy"`\n\nA toy.\n' in text
    assert "| `path` | string | needed | where \\| it is |" in text
    assert "| `heads` | integer >= 1 | none | heads |" in text


def accepts(schema: dict[str, Any], value: Any) -> bool:
    """The part of JSON Schema that a recipe's schema uses."""
    if "const" in schema:
        return value == schema["const"]
    if "enum" in schema:
        return value in schema["enum"]
    for word, combine in (("oneOf", lambda hits: sum(hits) == 1), ("anyOf", any)):
        if word in schema and not combine([accepts(choice, value) for choice in schema[word]]):
            return False
    types = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int, "number": (int, float)}
    if "type" in schema and schema["type"] in types and not isinstance(value, types[schema["type"]]):
        return False
    if isinstance(value, dict) and "properties" in schema:
        known = schema["properties"]
        return (
            (set(value) <= set(known) or schema.get("additionalProperties") is not False)
            and set(schema.get("required", ())) <= set(value)
            and all(accepts(known[key], inner) for key, inner in value.items() if key in known)
        )
    return True


RECIPES = sorted((ROOT / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_valid_for_the_program_and_for_the_schema(path):
    read = config.load(path)
    schema = reference.recipe_schema()
    assert accepts(schema, config.from_toml(path.read_text(encoding="utf-8")))
    assert accepts(schema, config.from_toml(config.dumps(read)))


def test_the_schema_refuses_what_the_program_refuses():
    schema = reference.recipe_schema()
    base = {"model": {}, "data": {}}
    for name in ("model", "data"):
        schema["properties"][name].pop("oneOf", None)
    assert accepts(schema, {**base, "num_steps": 5, "optimizer": {"lr": 0.1}})
    for wrong in ({"num_step": 5}, {"optimizer": {"lrr": 1}}, {"optimizer": 3}, {"optimizer": {"kind": "sgd"}}):
        assert not accepts(schema, {**base, **wrong})


def test_the_files_are_written(tmp_path, capsys):
    reference.main(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.md", "recipe.schema.json"]
    assert json.loads((tmp_path / "recipe.schema.json").read_text())["title"] == "Turbopump recipe"
