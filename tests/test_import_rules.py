import os
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
LINT = Path(sys.executable).with_name("lint-imports")


def lint(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(directory), "COLUMNS": "200"}
    command = [str(LINT), "--no-cache", "--no-logo", *arguments]
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=False)


def test_import_rules_hold():
    """Who may import whom: the contracts in pyproject.toml."""
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_rules_can_fail(tmp_path):
    """A copy of the package in which the core imports torch through another module is refused."""
    for path in (ROOT / "turbopump").rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (tmp_path / "turbopump" / "hardware" / "secret.py").write_text("import torch\n")
    (tmp_path / "turbopump" / "core" / "sly.py").write_text("import turbopump.hardware.secret\n")
    done = lint(tmp_path)
    assert done.returncode == 1
    assert "turbopump.core.sly -> turbopump.hardware.secret" in done.stdout
    assert "turbopump.hardware.secret -> torch" in done.stdout


def test_verbs_without_torch_are_in_the_rules():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    listed = next(c["source_modules"] for c in contracts if c["type"] == "forbidden")
    for verb in ("plan", "report", "inspect"):
        if (ROOT / "turbopump" / f"{verb}.py").exists():
            assert f"turbopump.{verb}" in listed, "add it to the contract in pyproject.toml"
