"""Runs the code blocks of README.md and docs/**/*.md, page by page, top to bottom, in an empty directory with recipes/.

```python                 is executed
```python file=mine.py    (any language) is written to that file, for later blocks of the page
```console                lines `$ turbopump ...` and `$ python ...` are executed; the other lines are their output
```console no-run         is left alone; NOT_RUN below gives the reason
"""

import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
TIMEOUT_S = 600

# (page, how the first line of the block begins): why it is not run. Installing and `make` are what runs these tests.
NOT_RUN: dict[tuple[str, str], str] = {
    ("README.md", "make demo"): (
        "installs and trains for minutes"
    ),
    ("README.md", "$ turbopump pack stdlib"): (
        "is what `make demo` runs; tests/test_recipes.py makes a few steps of it"
    ),
    ("docs/probe.md", "$ turbopump probe --suite deepbench"): (
        "takes an hour and tables that are not part of the project; tests/test_probe.py runs it on small ones"
    ),
    ("README.md", "turbopump probe"): (
        "takes minutes; tests/test_probe.py, tests/test_recipes.py and tests/dist run the same in short"
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        return next((word.removeprefix("file=") for word in self.words if word.startswith("file=")), None)


def blocks_of(page: str, text: str) -> list[Block]:
    found = []
    for match in re.finditer(r"^(```+)([^\n`]*)\n(.*?)^\1[ \t]*$", text, re.MULTILINE | re.DOTALL):
        language, *words = match[2].split() or [""]
        found.append(Block(page, text[: match.start()].count("\n") + 1, language, tuple(words), match[3]))
    return found


def commands_of(block: Block) -> list[list[str]]:
    """Argument lists of the block; raises `ValueError` for one that the tests cannot run."""
    if block.language == "python":
        return [[sys.executable, "-c", block.text]]
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if line.startswith("$ "):
            program, *arguments = shlex.split(line[2:], comments=True)
            if program not in ("turbopump", "python"):
                raise ValueError(f"{block.place}: {line!r} cannot be run by the tests: mark the block no-run")
            start = [sys.executable, "-m", "turbopump.cli"] if program == "turbopump" else [sys.executable]
            commands.append([*start, *arguments])
    return commands


def run_page(page: str, text: str, directory: Path) -> int:
    """Run all blocks of a page; the number of commands run."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    count = 0
    for block in blocks_of(page, text):
        if "no-run" in block.words:
            continue
        if block.file is not None:
            (directory / block.file).write_text(block.text, encoding="utf-8")
        elif block.language in ("python", "console", "sh"):
            for command in commands_of(block):
                done = subprocess.run(
                    command, cwd=directory, env=env, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
                )
                said = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
                assert done.returncode == 0, f"{block.place}: {command[1:]} gave {done.returncode}\n{said}"
                count += 1
    return count


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def has_commands(path: Path) -> bool:
    blocks = blocks_of(name_of(path), path.read_text(encoding="utf-8"))
    return any(b.language in ("python", "console", "sh") and "no-run" not in b.words for b in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("path", [p for p in PAGES if has_commands(p)], ids=name_of)
def test_code_blocks_run(path, tmp_path):
    if (ROOT / "recipes").exists():
        shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    run_page(name_of(path), path.read_text(encoding="utf-8"), tmp_path)


def test_every_block_left_out_has_its_reason():
    left_out = {
        (block.page, block.text.splitlines()[0])
        for path in PAGES
        for block in blocks_of(name_of(path), path.read_text(encoding="utf-8"))
        if "no-run" in block.words
    }
    explained = {b for b in left_out if any(b[0] == page and b[1].startswith(line) for page, line in NOT_RUN)}
    assert left_out == explained and len(NOT_RUN) == len(left_out)
    assert all(NOT_RUN.values())


def test_links_between_pages_lead_somewhere():
    for path in [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{name_of(path)} links to {target}"


def test_a_script_is_brought_in_by_five_lines():
    path = ROOT / "docs" / "bring-your-own.md"
    scripts = {block.file: block.text for block in blocks_of(path.name, path.read_text(encoding="utf-8")) if block.file}
    before, after = (scripts[name].splitlines() for name in ("before.py", "after.py"))
    assert len([line for line in before if line]) >= 20
    new = [line for line in difflib.ndiff(before, after) if line.startswith("+ ") and line[2:].strip()]
    assert len(new) <= 5, new


PAGE = """# A page
```python file=mine.py
print(6 * 7)
```
```console
$ python mine.py
42
$ python -c \\
    "open('seen', 'w').close()"
```
```python
from pathlib import Path
assert Path("seen").exists()
```
```sh no-run
$ rm -rf everything
```
"""


def test_the_runner_runs_in_order(tmp_path):
    assert run_page("page.md", PAGE, tmp_path) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n```python\nassert False\n```\n", r"page\.md:2"),
        ("```console\n$ python -c 'exit(3)'\n```\n", "gave 3"),
        ("```console\n$ turbopump no-such-verb\n```\n", "gave"),
    ],
)
def test_the_runner_fails_where_a_block_does(tmp_path, text, expected):
    with pytest.raises(AssertionError, match=expected):
        run_page("page.md", text, tmp_path)


def test_other_commands_must_be_marked(tmp_path):
    with pytest.raises(ValueError, match="mark the block no-run"):
        run_page("page.md", "```console\n$ make demo\n```\n", tmp_path)
