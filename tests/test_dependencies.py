"""docs/dependencies.md is the list of what this package stands on, and of the one place where each is imported."""

import ast
import re
import sys
import tomllib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"turbopump", "tests", "benchmarks"}
PEERS = {  # benchmarks install them beside the environment
    "accelerate", "array_record", "datasets", "grain", "lightning", "litdata", "lmdb", "mosaicml-streaming", "pylance",
    "webdataset",
}  # fmt: skip


@dataclass(frozen=True)
class Listed:
    package: str
    module: str
    why: str
    places: tuple[str, ...]  # files, or folders that end in a slash

    def allows(self, file: str) -> bool:
        return any(file == place or (place.endswith("/") and file.startswith(place)) for place in self.places)


def listed() -> dict[str, Listed]:
    """Rows of the tables, by package."""
    rows = {}
    for line in (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `") and len(cells) == 4:
            package, module = cells[0].strip("`"), cells[1].strip("`")
            assert package not in rows, f"{package} is listed twice"
            rows[package] = Listed(package, module, cells[2], tuple(re.findall(r"`([^`]+)`", cells[3])))
    return rows


def declared() -> set[str]:
    """Packages that pyproject.toml names, extras and the build backend included."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    project = table["project"]
    lines = [
        *project["dependencies"],
        *chain.from_iterable(project["optional-dependencies"].values()),
        *table["build-system"]["requires"],
    ]
    return {re.split(r"[<>=!~\[; ]", line)[0] for line in lines} - {"turbopump"}


def third_party_imports(path: Path) -> set[str]:
    """Top-level modules a file imports anywhere in it, those of the standard library and our own left out."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names - set(sys.stdlib_module_names) - OURS


def source(folder: str) -> list[Path]:
    hidden = ROOT / folder / ".peers"
    return sorted(path for path in (ROOT / folder).rglob("*.py") if hidden not in path.parents)


def test_every_declared_package_is_listed_with_its_reason_and_no_other():
    rows = listed()
    wanted = {row.package for row in rows.values()}
    assert wanted - PEERS == declared()
    assert all(len(row.why) > 10 for row in rows.values())


@pytest.mark.parametrize("folder", ["turbopump", "benchmarks"])
def test_each_library_is_imported_where_the_list_says(folder):
    by_module = {row.module: row for row in listed().values()}
    for path in source(folder):
        file = path.relative_to(ROOT).as_posix()
        for module in third_party_imports(path):
            assert module in by_module, f"{file} imports {module}, which docs/dependencies.md does not list"
            assert by_module[module].allows(file), (
                f"{file} imports {module}: the list allows {by_module[module].places}"
            )


def test_tests_import_nothing_that_is_not_listed():
    known = {row.module for row in listed().values()} | {path.stem for path in source("tests")}
    for path in source("tests"):
        assert third_party_imports(path) <= known, path


def test_no_file_is_listed_for_nothing():
    for row in listed().values():
        for place in row.places:
            if (ROOT / place).is_file():
                assert row.module in third_party_imports(ROOT / place), f"{row.package} is not imported in {place}"


def test_every_pinned_version_is_exact_and_every_dependency_is_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[^=*\s]+", pin) for pin in pins)
    names = {re.sub(r"[-_.]+", "-", pin.split("==")[0]).lower() for pin in pins}
    assert declared() <= names
    assert "torch==2.13.0" in pins
    assert len(names) == len(pins)
