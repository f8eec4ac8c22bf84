"""plan, report, inspect, --help and all configuration must work where torch is not installed."""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BLOCK = """
import importlib.abc, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""

NEEDS_NO_TORCH = (
    "__init__",
    "cli",
    "plan",
    "report",
    "inspect",
    "core/*",
    "hardware/*",
    "planner/*",
    "reporting/*",
    "*/ops",
    "*/cost",
    "models/*/config",
    "models/*/workload",
    "*/__init__",
    "models/*/__init__",
)


def modules() -> list[str]:
    """Modules that exist and must do without torch."""
    paths = {p for pattern in NEEDS_NO_TORCH for p in (ROOT / "turbopump").glob(f"{pattern}.py")}
    names = (".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in paths)
    return sorted(names)


def python(code: str, executable: str = sys.executable, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_the_block_blocks():
    assert python(BLOCK + "import torch").returncode == 1


@pytest.mark.slow
def test_modules_import_with_torch_blocked():
    names = modules()
    assert {"turbopump", "turbopump.core.config", "turbopump.core.spans"} <= set(names)
    code = f"""
import importlib, traceback
failed = []
for name in {names!r}:
    try:
        importlib.import_module(name)
    except Exception:
        failed.append(name)
        traceback.print_exc()
assert "torch" not in sys.modules
print("FAILED", *failed)
"""
    done = python(BLOCK + code)
    assert done.stdout.strip() == "FAILED", f"{done.stdout}\n{done.stderr[-4000:]}"


def test_package_files_are_empty():
    """Importing a module must not import its neighbours; only the package itself may hold a line."""
    full = [p for p in (ROOT / "turbopump").rglob("__init__.py") if p.parent.name != "turbopump" and p.read_text()]
    assert not full


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "turbopump" / "cli.py").exists(), reason="there is no command line yet")
@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["report", "--help"], ["inspect", "--help"]])
def test_help_needs_no_torch(arguments):
    done = python(
        f"{BLOCK}\nsys.argv = ['turbopump', *{arguments!r}]\nfrom turbopump.cli import main\nsys.exit(main())"
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Usage" in done.stdout


@pytest.mark.slow
def test_kinds_are_found_with_torch_blocked():
    """The reference of all recipe keys reads the configuration of every model and dataset."""
    done = python(BLOCK + "from turbopump.core.reference import recipe_reference; recipe_reference()")
    assert done.returncode == 0, done.stderr[-4000:]
    assert not re.search("torch|safetensors", done.stderr), done.stderr


@pytest.mark.slow
def test_a_bare_installation(tmp_path):
    """`pip install .` without extras, in an environment of its own."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    executable = str(home / "bin" / "python")
    clean = {**os.environ, "PYTHONPATH": "", "PIP_CONSTRAINT": str(ROOT / "constraints.txt")}
    install = [executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--retries", "1", str(ROOT)]
    done = subprocess.run(install, capture_output=True, text=True, env=clean, check=False)
    if done.returncode and re.search("No matching distribution|NewConnectionError|Max retries", done.stderr):
        pytest.skip("no package index is reachable")
    assert done.returncode == 0, done.stderr[-4000:]
    code = f"""
import importlib, importlib.util
assert importlib.util.find_spec("torch") is None
for name in {modules()!r}:
    importlib.import_module(name)
import turbopump
print(turbopump.__file__)
"""
    done = subprocess.run(
        [executable, "-c", code], capture_output=True, text=True, env=clean, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert str(home) in done.stdout
    assert list(home.rglob("turbopump/py.typed"))
    if (ROOT / "turbopump" / "cli.py").exists():
        tool = str(home / "bin" / "turbopump")
        done = subprocess.run([tool, "--help"], capture_output=True, text=True, env=clean, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
