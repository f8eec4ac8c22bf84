"""Figures are valid plotly, their colours are variables of the style sheet, in light and dark."""

import re
from importlib.resources import files

import plotly.graph_objects as go
import pytest

from tests.synthetic_run import Shape, write_run
from turbopump.reporting.account import summarize
from turbopump.reporting.compare import compare, comparison_page
from turbopump.reporting.figures import run_figures
from turbopump.reporting.html import document, flatten, prose, tag
from turbopump.reporting.load import load_run
from turbopump.reporting.plots import Figure, Table, layout

ROUGH = Shape(name="rough", num_steps=150, evaluate_every=30, checkpoint_every=50, killed_after=80, num_ranks=2,
              communication_s=0.02, nan_from=140)  # fmt: skip
CSS = files("turbopump.reporting").joinpath("page.css").read_text()


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    run = load_run(write_run(tmp_path_factory.mktemp("runs") / "rough", ROUGH).path)
    return run_figures(run, summarize(run))


def coloured(value, seen):
    """The figure with every variable replaced by a colour that plotly's own check accepts."""
    if isinstance(value, dict):
        return {k: coloured(v, seen) for k, v in value.items()}
    if isinstance(value, list):
        return [coloured(v, seen) for v in value]
    if isinstance(value, str) and value.startswith("--"):
        seen.add(value)
        return "#123456"
    return value


def test_plotly_accepts_every_figure_and_the_style_sheet_knows_every_colour(figures):
    light, dark = CSS.split("@media (prefers-color-scheme: dark)")
    dark = dark.split("* { box-sizing")[0]
    for figure in figures.values():
        seen: set[str] = set()
        go.Figure(coloured({"data": figure.data, "layout": figure.layout}, seen))
        assert seen
        for name in seen:
            assert f"{name}:" in light and f"{name}:" in dark, name


def test_light_and_dark_define_the_same_variables():
    light, dark = CSS.split("@media (prefers-color-scheme: dark)")
    names = [set(re.findall(r"(--[a-z0-9-]+):", part.split("* { box-sizing")[0])) for part in (light, dark)]
    assert names[0] == names[1]


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    parts = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("text", "behind"),
    [("ink", "page"), ("ink", "card"), ("muted", "page"), ("muted", "card"), ("accent", "card"),
     ("accent", "accent-soft"), ("on-measured", "measured"), ("on-ideal", "ideal"), ("on-below-limit", "below-limit")],
)  # fmt: skip
def test_text_can_be_read(mode, text, behind):
    part = CSS.split("@media (prefers-color-scheme: dark)")[mode]
    a, b = (luminance(re.search(rf"--{name}: (#[0-9a-f]{{6}})", part).group(1)) for name in (text, behind))
    assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 4.5  # WCAG 2.2, 1.4.3


def test_nan_is_marked(figures):
    marks = [t for t in figures["loss"].data if t.get("name") == "NaN or infinite"]
    assert len(marks) == 1 and marks[0]["x"] == list(range(140, 151))


def test_the_waterfall_ends_at_the_measured_step(figures):
    trace = figures["waterfall"].data[0]
    *parts, total = trace["x"]
    assert sum(parts) == pytest.approx(total, rel=1e-3)  # bars too small to see are left out of it
    for base, width, following in zip(trace["base"], trace["x"], trace["base"][1:-1]):
        assert base + width == pytest.approx(following, rel=1e-3)


def test_attempts_are_marked(figures):
    texts = [a["text"] for a in figures["kinds"].layout["annotations"]]
    assert texts == ["attempt 2 from step 50"]


def test_elements():
    assert tag("p", "<b>", title='"x"', hidden=True, id=None) == '<p title="&quot;x&quot;" hidden>&lt;b&gt;</p>'
    assert tag("p", tag("b", "a & b"), class_="c") == '<p class="c"><b>a &amp; b</b></p>'
    assert prose("<5 %") == "&lt;5&nbsp;%"
    assert flatten({"a": {"b": [1, 2]}, "c": [{"d": True}], "e": None}) == [("a.b", "1, 2"), ("c[0].d", "true"),
                                                                         ("e", "none")]  # fmt: skip


def test_no_figure_can_end_its_script():
    figure = Figure("f", "t", "s", [{"name": "</script><script>\u2028"}], layout(x="", y=""), Table([], []))
    page = document("t", tag("main"), [figure]).decode()
    inside = page.split('id="figures">')[1].split("</script>")[0]
    assert "<" not in inside and "\u2028" not in inside and "\\u003c/script" in inside


def test_comparison_of_unlike_runs(tmp_path):
    lr = {"optimizer.lr": 0.1}
    paths = [write_run(tmp_path / "a", Shape(num_steps=60, name="same")).path,
             write_run(tmp_path / "b", Shape(num_steps=90, name="same", data_s=0.05, config=lr)).path,
             tmp_path / "c"]  # fmt: skip
    paths[2].mkdir()
    (paths[2] / "config.toml").write_text('name = "same"\n')
    runs = [load_run(path) for path in paths]
    comparison = compare(runs, [summarize(run) for run in runs])
    assert comparison.labels == ("a", "b", "c")  # equal names are told apart
    rows = {row.name: row for row in comparison.figures}
    step = rows["mean step"]
    assert step.ratios[1] == pytest.approx(step.values[1] / step.values[0]) and step.values[2] is None
    assert rows["step: waiting for data"].ratios[1] == pytest.approx(12.5, rel=0.05)
    assert ("optimizer.lr", ("0.002", "0.1", "–")) in comparison.config
    assert "most of it waiting for data" in comparison.sentences[0]
    page = comparison_page(runs, comparison).decode()
    assert "12.5× worse" in page or "12.4× worse" in page
