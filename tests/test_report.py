"""The verb: what it writes and where, that it is one closed file, that nothing a user names becomes markup."""

import base64
import gzip
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.synthetic_run import Shape, write_run
from turbopump.core.errors import UsageError
from turbopump.report import report, report_from_command_line

SHORT = Shape(num_steps=120, evaluate_every=30, checkpoint_every=50)
ROUGH = Shape(name="rough", num_steps=120, evaluate_every=30, checkpoint_every=50, killed_after=80, num_ranks=2,
              slow_rank=1, communication_s=0.02, nan_from=110, seed=1)  # fmt: skip
HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x" onerror=alert(2)>&amp;\' "]]>'


class Page(HTMLParser):
    """Elements of a page, with the text of scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.styles: list[str] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        self.open.append(name)
        if name == "script":
            self.scripts.append((dict(attributes).get("type"), ""))

    def handle_endtag(self, name):
        while self.open and self.open.pop() != name:
            pass

    def handle_data(self, data):
        inside = self.open[-1] if self.open else ""
        if inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif inside == "style":
            self.styles.append(data)
        else:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [a[name] or "" for _, a in self.elements if name in a]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "plain", SHORT)
    write_run(root / "rough", ROUGH)
    write_run(root / "hostile", SHORT, texts=HOSTILE)
    return root


def test_files_are_where_they_are_said_to_be(runs, tmp_path):
    files = report([runs / "plain"])
    assert (files.html, files.json) == (runs / "plain" / "report.html", runs / "plain" / "report.json")
    files = report([runs / "plain", runs / "rough"])
    assert files.html == runs / "plain" / "comparison.html"  # a comparison never replaces the run's own page
    assert report([runs / "plain"], output=tmp_path / "a.html").json == tmp_path / "a.json"
    assert report([runs / "plain"], output=tmp_path / "folder").html == tmp_path / "folder" / "report.html"
    assert (tmp_path / "folder" / "report.json").exists()


def test_no_run_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="not a run directory"):
        report([tmp_path])
    with pytest.raises(UsageError, match="needs a run"):
        report([])
    write_run(tmp_path / "run", SHORT)
    with pytest.raises(UsageError, match=r"\.html"):
        report([tmp_path / "run"], output=tmp_path / "page.pdf")
    assert not (tmp_path / "report.html").exists()


def test_text_for_the_terminal(runs):
    text = report_from_command_line([runs / "plain"])
    assert "was trained for 120 steps" in text and "limits this run:" in text
    assert text.splitlines()[-1] == str(runs / "plain" / "report.html")
    record = json.loads(report_from_command_line([runs / "plain"], as_json=True))
    assert record["schema_version"] == 1 and record["summary"]["num_steps_done"] == 120


@pytest.mark.parametrize("which", [("plain",), ("rough",), ("hostile",), ("plain", "rough", "hostile")])
def test_the_page_loads_nothing(runs, which):
    page = Page(report([runs / name for name in which]).html)
    assert page.attributes("src") == [] and page.attributes("href") == [] and page.attributes("srcset") == []
    names = {name for name, _ in page.elements}
    assert not names & {"link", "iframe", "object", "embed", "img", "base", "form", "video", "audio"}
    assert not [a for _, attributes in page.elements for a in attributes if a.startswith("on")]
    assert not re.search(r"@import|url\(", "".join(page.styles))
    policy = next(a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a)
    assert "default-src 'none'" in policy and "unsafe-inline" not in policy.split("style-src")[0]


def test_plotly_is_in_the_page_once_and_every_script_is_allowed_by_its_digest(runs):
    page = Page(report([runs / "hostile"]).html)
    kinds = [kind for kind, _ in page.scripts]
    assert kinds == ["application/json", "application/octet-stream", None]
    library = gzip.decompress(base64.b64decode(page.scripts[1][1])).decode()
    sources = [page.scripts[0][1], library, page.scripts[2][1]]
    assert [source.count("* plotly.js v") for source in sources] == [0, 1, 0]
    policy = next(a["content"] for n, a in page.elements if n == "meta" and "http-equiv" in a)
    for source in sources[1:]:
        assert base64.b64encode(hashlib.sha256(source.encode()).digest()).decode() in policy


@pytest.mark.parametrize("which", [("hostile",), ("plain", "hostile")])
def test_strings_of_the_user_stay_text(runs, which):
    files = report([runs / name for name in which])
    page = Page(files.html)
    assert len(page.scripts) == 3
    assert HOSTILE in page.text  # shown as it is, markup and all
    figures = json.loads(page.scripts[0][1])
    shown = json.dumps(figures)
    assert "<script" not in shown and "<img" not in shown  # plotly reads HTML in labels
    assert HOSTILE in json.dumps(json.loads(files.json.read_text()), ensure_ascii=False).replace('\\"', '"')


def test_every_picture_has_words_and_a_table(runs):
    page = Page(report([runs / "rough"]).html)
    plots = [a for _, a in page.elements if "plot" in (a.get("class") or "").split()]
    assert len(plots) == 11
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in plots)
    names = [name for name, _ in page.elements]
    assert names.count("figure") == len(plots) == names.count("figcaption")
    assert names.count("h1") == 1 and ("html", {"lang": "en"}) in page.elements
    figures = json.loads(page.scripts[0][1])
    assert {f"plot-{f}" for f in ("loss", "quality", "lr", "grad_norm", "waterfall", "kinds", "distribution",
                                  "throughput", "share", "memory", "ranks")} == set(figures)  # fmt: skip


def test_a_directory_with_nothing_but_a_recipe_says_not_measured(tmp_path):
    (tmp_path / "config.toml").write_text('name = "empty"\nnum_steps = 5\n')
    files = report([tmp_path])
    page = Page(files.html)
    assert "not measured" in page.text and "no spans" in page.text
    record = json.loads(files.json.read_text())
    assert record["summary"]["run"] is None and record["summary"]["steps"] is None
    report([tmp_path, tmp_path])


@pytest.mark.slow
def test_a_long_run_gives_a_small_file(tmp_path):
    write_run(tmp_path / "long", Shape(num_steps=20_000, evaluate_every=50, checkpoint_every=100, killed_after=15_050))
    files = report([tmp_path / "long"])
    assert files.html.stat().st_size < 3.5e6 and files.json.stat().st_size < 1e6


@pytest.mark.slow
def test_a_very_long_run_gives_a_small_file(tmp_path):
    write_run(tmp_path / "long", Shape(num_steps=200_000, evaluate_every=500, checkpoint_every=2000, log_every=100))
    files = report([tmp_path / "long"])
    assert files.html.stat().st_size < 5e6 and files.json.stat().st_size < 1e6
    assert json.loads(files.json.read_text())["summary"]["steps"]["num_steps"] == 199_997


def test_report_imports_no_torch():
    code = "import sys, turbopump.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
