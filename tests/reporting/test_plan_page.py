"""The page of a plan and that of a validation: every part stands, names are text, figures are valid."""

import math
from dataclasses import replace

import plotly.graph_objects as go
import pytest

from tests.reporting.test_figures import CSS, coloured
from tests.reporting.test_probe_page import HOSTILE, Reader
from tests.synthetic_plan import build, choice, found, plan
from turbopump.core.errors import RunDirectoryError
from turbopump.planner.judged import Row
from turbopump.planner.validate import Report, TableReport
from turbopump.reporting.plan_page import PlanView, plan_figures, plan_page, write_page
from turbopump.reporting.plan_plots import split_words, waterfall_bars
from turbopump.reporting.validation_page import validation_figures, validation_page, write_validation_page
from turbopump.reporting.validation_text import format_report


def validation(text=""):
    steps = tuple(
        Row("mpt_throughput", f"{text}model {i % 3}", f"{text}row {i}", 1.0 + 0.01 * i, 1.1, "s", 0.9, 1.3, f"c{i % 2}")
        for i in range(30)
    )
    ops = tuple(Row("deepbench_gemm", "P100", f"Gemm({i})", 1e-6 * (i + 1), 1.2e-6 * (i + 1), "s") for i in range(2000))
    memory = (Row("torchtitan_runs", "8B", "peak", 40.0, 41.0, "GiB", 38.0, 42.0, asked=44.0, capacity=80.0),)
    parts = (
        TableReport("mpt_throughput", "", "step times", steps, (f"mpt_throughput.csv:7: {text}no such model",)),
        TableReport("deepbench_gemm", "", "operations", ops),
        TableReport("torchtitan_runs", "memory", "memory", memory),
        TableReport("failures", "", "rates", (), ("failures.csv:2: 'x' is no rate",)),
    )  # fmt: skip
    return Report(f"{text}published", "frozen", "1234", parts, (f"{text}other.csv",))


def read(view):
    return Reader(plan_page(view).decode())


def test_a_full_plan_has_every_part():
    page, figures = read(build()), plan_figures(build())
    assert set(figures) == {"waterfall", "memory", "landscape", "scaling-usd", "scaling-kwh"}
    plots = {values["id"] for name, values in page.seen if values.get("class") == "plot"}
    assert plots == {f"plot-{name}" for name in figures} and page.open == []
    for words in ("gpt3-175b on 1,024 devices", "What limits it", "arithmetic below the peak", "80 % band",
                  "the network at half the rate", "tp 4 instead of 8", "recompute full instead of selective",
                  "nothing fits", "It stays the same with 10 % more memory", "dtype fp8 instead of bf16",
                  "41,000 candidates, 900 of which fit", "pp 16",
                  "does not fit", "How many devices", "The next best is 6.0 % slower"):  # fmt: skip
        assert words in page.text, words


@pytest.mark.parametrize("view", [build(), PlanView(plan()), build(found=None, scaling=(), capacity_bytes=0.0),
                                  build(plan=replace(plan(), memory={}, cost={}))])  # fmt: skip
def test_a_plan_that_knows_less_has_a_page_too(view):
    page = read(view)
    assert page.open == [] and "nan" not in page.text and "What limits it" in page.text
    if view.found is None:
        assert "The search" not in page.text and "landscape" not in plan_figures(view)


def test_plotly_accepts_every_figure_and_the_style_sheet_knows_every_colour():
    light = CSS.split("@media (prefers-color-scheme: dark)")[0]
    figures = [*plan_figures(build()).values(), *validation_figures(validation()).values()]
    for figure in figures:
        seen: set[str] = set()
        data, layout = coloured(figure.data, seen), coloured(figure.layout, seen)
        go.Figure(data=data, layout=layout)
        assert seen and all(f"{name}:" in light for name in seen), (figure.id, seen)


def test_the_waterfall_sums_to_the_prediction():
    made = plan()
    bars = dict(waterfall_bars(made))
    assert sum(bars.values()) == pytest.approx(made.prediction.step_s)
    assert bars["ideal"] == pytest.approx(made.prediction.mfu * made.prediction.step_s)
    trace = plan_figures(build())["waterfall"].data[0]
    *parts, total = trace["x"]
    assert sum(parts) == pytest.approx(total, rel=1e-3)
    above = replace(made, prediction=replace(made.prediction, mfu=0.99))  # a peak that cannot be: not drawn as one
    assert "ideal" not in dict(waterfall_bars(above))


def test_memory_is_drawn_with_the_devices():
    figure = plan_figures(build())["memory"]
    assert len(figure.layout["shapes"]) == 1 and len(figure.data) == 7
    assert sum(t["x"][0] for t in figure.data) == pytest.approx(sum(plan().memory["first"].values()) / 2**30, rel=1e-3)
    assert plan_figures(build(capacity_bytes=0.0))["memory"].layout["shapes"] == []
    alike = dict.fromkeys(("first", "middle", "last"), plan().memory["first"])  # one stage
    assert plan_figures(build(plan=replace(plan(), memory=alike)))["memory"].data[0]["y"] == ["every rank"]


def test_the_landscape_follows_the_choices_that_vary():
    rows = tuple(dict(r, tp=1, pp=1, dp_shard=2**i) for i, r in enumerate(found().landscape[:4]))
    figure = plan_figures(build(found=replace(found(), landscape=rows)))["landscape"]
    assert [t["name"] for t in figure.data] == ["dp shard 1", "dp shard 2", "dp shard 4", "dp shard 8", "the plan"]
    no_splits = tuple({k: r[k] for k in ("dp_replicate", "microbatch", "step_s", "peak_bytes")} for r in rows)
    view = build(found=replace(found(), landscape=no_splits))  # of a model that is split over data alone
    assert "landscape" in plan_figures(view) and read(view).open == []
    many = found().landscape * 40
    assert "not drawn" in plan_figures(build(found=replace(found(), landscape=many)))["landscape"].note


def test_words_of_a_split():
    best = {"tp": 8, "pp": 2, "dp_shard": 1, "microbatch": 4, "recompute": "full", "step_s": 1.25, "peak_bytes": 6e10}
    assert split_words(best) == "tp 8 · pp 2 · microbatch 4 · recompute full · 1.25 s · 60 GB"
    assert split_words({"step_s": 1, "peak_bytes": 1e9}).startswith("not split")


def test_names_are_text():
    view = build(plan=plan(HOSTILE), machine=HOSTILE, notes=(HOSTILE,))
    for page in (read(view), Reader(validation_page(validation(HOSTILE)).decode())):
        assert page.open == [] and not [1 for name, _ in page.seen if name in ("img", "iframe")]
        assert HOSTILE in page.text and [name for name, _ in page.seen].count("script") == 3


def test_a_change_without_a_choice_and_a_runner_up():
    alone = replace(found(), runner_up=None, margin_sigmas=None, changes=(), alternatives=())
    page = read(build(found=alone))
    assert "Nothing else was tried" in page.text and "next best" not in page.text


def test_the_page_of_a_validation():
    report = validation()
    page, figures = Reader(validation_page(report).decode()), validation_figures(report)
    assert len(figures) == 3 and page.open == []
    drawn = sum(len(t["x"]) for f in figures.values() for t in f.data)
    assert drawn <= 1200 + 31 + 60
    for words in ("frozen", "calibration fitted on 1234", "no such model", "other.csv", "model 2", "0 false fits",
                  "2 rows could not be predicted"):  # fmt: skip
        assert words in page.text, words
    assert "model 2" in format_report(report)


def test_a_validation_of_nothing():
    report = Report("p", "cross-validated", "", (TableReport("failures", "", "", (), ("failures.csv:2: no",)),), ())
    page = Reader(validation_page(report).decode())
    assert page.open == [] and validation_figures(report) == {}


def test_pages_are_written_whole_or_not(tmp_path):
    write_page(build(), tmp_path / "plan.html")
    write_validation_page(validation(), tmp_path / "validate.html")
    assert all(p.read_bytes().startswith(b"<!doctype html>") for p in tmp_path.iterdir())
    assert (tmp_path / "plan.html").stat().st_size < 2.5e6
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError):
        write_page(build(), tmp_path / "file" / "plan.html")


def test_the_band_is_that_of_the_choice():
    best = choice()
    assert math.log(best.high_s / best.step_s) == pytest.approx(1.2816 * 0.06)
