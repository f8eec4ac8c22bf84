"""The page of a machine: every part stands, whatever was measured; names are text; big profiles make small pages."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from tests.reporting.test_figures import CSS, coloured
from tests.synthetic_profile import DOMAINS, ONEDNN, build, datasheet
from turbopump.core.errors import RunDirectoryError
from turbopump.hardware.profile import load, save
from turbopump.reporting.probe_page import probe_figures, probe_page, write_page
from turbopump.reporting.probe_rows import Gain, best_rates, gains, memory_roofs, of_best_route, op_words, peaks

HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x" onerror=alert(2)>'
ALL = {"roofline-0", "efficiency-products", "efficiency-convolutions", "efficiency-recurrent", "efficiency-attention",
       "efficiency-bytes", "routes", "memory", "collectives-time", "collectives-rate", "storage-reads",
       "storage-bytes"}  # fmt: skip


class Reader(HTMLParser):
    """Elements and text of a page; fails on an element closed that was not open."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.text = re.sub(r"\s+", " ", " ".join(self.words).replace("\N{NO-BREAK SPACE}", " "))

    def handle_starttag(self, name, attributes):
        self.seen.append((name, dict(attributes)))
        if name not in ("meta", "br", "input"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture(scope="module")
def profile():
    return build()


@pytest.fixture(scope="module")
def page(profile):
    return Reader(probe_page(profile).decode())


def read(profile):
    return Reader(probe_page(profile).decode())


def figures_of(profile):
    return probe_figures(profile, gains(profile))


def test_a_full_profile_has_every_part(profile, page):
    assert set(figures_of(profile)) >= ALL
    plots = {values["id"] for name, values in page.seen if values.get("class") == "plot"}
    assert plots == {f"plot-{name}" for name in figures_of(profile)}
    for words in ("How far to trust it", "What to change first", "Best rates", "of 497 rows are noisy",
                  "the page cache could not be dropped", "Left out", "launch: linear",
                  "compute when both run"):  # fmt: skip
        assert words in page.text, words
    assert "was not measured:" not in page.text and page.open == []


def test_plotly_accepts_every_figure_and_the_style_sheet_knows_every_colour(profile):
    light, dark = CSS.split("@media (prefers-color-scheme: dark)")
    dark = dark.split("* { box-sizing")[0]
    for figure in (*figures_of(profile).values(), *figures_of(datasheet()).values()):
        seen: set[str] = set()
        go.Figure(coloured({"data": figure.data, "layout": figure.layout}, seen))
        for name in seen:
            assert f"{name}:" in light and f"{name}:" in dark, name
        assert figure.table.rows and figure.summary


def test_the_peak_is_the_best_exact_route(profile, page):
    found = {(p.dtype, p.route): p for p in peaks(profile)}
    assert found["fp32", "bf16 inside"].problem.startswith("not exact fp32")
    best = {dtype: peak for (_, dtype), peak in best_rates(profile).items()}
    assert best["fp32"].route == ONEDNN and set(best) == {"fp32", "bf16", "fp16", "int8"}
    assert best["fp32"].row.flops_per_s < found["fp32", "bf16 inside"].row.flops_per_s
    assert all(peak.row.kind == "Gemm" for peak in best.values())
    voids = [values for name, values in page.seen if values.get("class") == "track void"]
    assert len(voids) == 1 and "relative error 2.4e-03" in page.text


def test_no_point_lies_above_the_roofs(profile):
    for figure in figures_of(profile).values():
        if figure.id.startswith("roofline"):
            roof = next(t for t in figure.data if t["name"] == "roof from memory")
            top = max(roof["y"])
            for trace in figure.data:
                assert max(trace["y"]) <= top * 1.0001
        if figure.id.startswith("efficiency") and figure.id != "efficiency-bytes":
            assert all(0 < share <= 100 for trace in figure.data for share in trace["y"])


def test_gains_compare_the_default_with_the_fastest_exact_route(profile):
    found = gains(profile)
    assert all(g.default.route == "default" and g.ratio >= 1 for g in found)
    assert [g.ratio for g in found] == sorted((g.ratio for g in found), reverse=True)
    assert not any(g.best.problem for g in found)
    by_op = {row.op_key: row for row in of_best_route(profile.rows)}
    changed = [g for g in found if g.best is not g.default]
    assert changed and all(g.best.seconds == by_op[g.best.op_key].seconds for g in changed)


def test_a_noisy_or_inexact_row_is_no_gain(profile):
    gain = gains(profile)[0]
    assert gain.ratio > 1.5

    def with_best(**changed: float) -> Gain:
        rows = (gain.default, replace(gain.best, **changed))
        return next(iter(gains(replace(profile, rows=rows))), Gain(gain.default, gain.default))

    assert with_best().ratio == gain.ratio
    assert with_best(p90_s=2 * gain.best.seconds).ratio == 1.0
    assert with_best(error=0.5).ratio == 1.0


def test_memory_roofs_are_those_of_memory_and_of_the_caches(profile):
    memory, caches = memory_roofs(profile, next(iter(best_rates(profile)))[0])
    assert 15e9 < memory < 20e9 and caches > 80e9
    assert memory_roofs(replace(profile, rows=()), ("cpu", 1)) == (None, None)


def test_a_copy_within_the_caches_is_not_called_memory(profile):
    small = tuple(r for r in profile.rows if r.kind != "MemoryCopy" or r.bytes < 1 << 20)
    small = tuple(r for r in small if r.kind != "MemoryTriad" or r.bytes < 1 << 20)
    setting = next(iter(best_rates(profile)))[0]
    memory, caches = memory_roofs(replace(profile, rows=small, devices=()), setting)
    assert memory is None and caches > 80e9


@pytest.mark.parametrize("domain", DOMAINS)
def test_one_domain_alone_gives_a_page_that_names_the_others(domain):
    page = read(build((domain,)))
    others = [d for d in DOMAINS if d != domain]
    assert f"were not measured: turbopump probe --only {','.join(others)}" in page.text
    if domain != "comms":
        assert "comms (collectives) was not measured: turbopump probe --only comms" in page.text


def test_a_profile_of_one_row_or_of_none_gives_a_page(profile):
    for row in (profile.rows[0], *(next(r for r in profile.rows if r.kind == k) for k in
                ("Rnn", "Norm", "MemoryCopy", "Launch", "AllReduce", "Barrier", "Overlap", "RandomRead",
                 "CheckpointWrite"))):  # fmt: skip
        page = read(replace(profile, rows=(row,), devices=()))
        assert "All rows (1)" in page.text and page.open == []
    empty = read(replace(profile, rows=(), devices=(), quality={}, left_out=(), uncertain=()))
    assert "No operation of this machine was measured" in empty.text


def test_rows_that_failed_are_in_the_table_with_their_reason(profile):
    broken = tuple(
        replace(row, min_s=None, median_s=None, p90_s=None, wall_s=None, problem="the device vanished")
        for row in profile.rows[:20]
    )
    page = read(replace(profile, rows=broken))
    assert "Nothing of compute could be measured: the device vanished" in page.text
    assert sum(name == "tr" for name, _ in page.seen) >= 21
    odd = replace(profile.rows[0], min_s=0.0, median_s=0.0, p90_s=0.0)  # a file that somebody edited
    assert "All rows (1)" in read(replace(profile, rows=(odd,))).text


def test_a_datasheet_says_that_it_is_one_and_draws_its_roofs():
    profile = datasheet()
    page = read(profile)
    figures = figures_of(profile)
    assert set(figures) == {"roofline-spec", "borrowed-gemm", "borrowed-conv2d", "borrowed-rnn"}
    for figure in figures.values():
        assert all(0 < y <= 100 for t in figure.data for y in t["y"]) or figure.id == "roofline-spec"
        assert "borrowed from NVIDIA A100 SXM" in figure.title or figure.id == "roofline-spec"
    for words in ("Nothing here was measured", "borrowed from NVIDIA A100 SXM", "989 TFLOP/s", "3.35 TB/s",
                  "NVIDIA H100 datasheet", "which has 0.32 of the peak"):  # fmt: skip
        assert words in page.text, words
    assert "was not measured: turbopump" not in page.text


def test_whatever_a_file_holds_is_text():
    page = read(build(texts=HOSTILE))
    assert sum(name == "script" for name, _ in page.seen) == 3
    assert not {"img", "iframe", "link"} & {name for name, _ in page.seen}
    assert not any(key.startswith("on") for _, values in page.seen for key in values)
    assert HOSTILE in page.text


def test_text_in_plots_is_escaped_for_plotly():
    for figure in figures_of(build(texts=HOSTILE)).values():
        for trace in figure.data:
            assert "<script" not in trace["name"] and not any("<script" in t for t in trace.get("text", ()))
        for texts in (figure.layout["yaxis"].get("ticktext", ()), [figure.layout["xaxis"]["title"]["text"]]):
            assert not any("<script" in t for t in texts)


def test_fields_of_another_version_do_not_matter(profile):
    gemm = replace(profile.rows[0], op={"rows": 3, "dtype": "fp32"})
    reading = next(r for r in profile.rows if r.kind == "RandomRead")
    other = replace(reading, op={"bytes_per_read": 4096})
    assert op_words(gemm) == "Gemm rows 3"
    page = read(replace(profile, rows=(gemm, other, replace(other, kind="NewKind", op={}))))
    assert "All rows (3)" in page.text and "NewKind" in page.text


@pytest.mark.slow
def test_a_huge_profile_is_a_small_page():
    profile = build(copies=10)
    assert len(profile.rows) > 4900
    assert len(probe_page(profile)) < 5e6  # made in 0.5 s on an AMD EPYC (Zen 4), 2 shared cores


def test_a_figure_draws_a_part_of_very_many_rows_and_says_so(profile, monkeypatch):
    monkeypatch.setattr("turbopump.reporting.probe_axes.MAX_POINTS", 40)
    roofline = figures_of(profile)["roofline-0"]
    drawn = sum(len(t["x"]) for t in roofline.data if t["mode"] == "markers" and t["name"] != "slower routes")
    assert drawn == 40 and "40 of 84 operations are drawn" in roofline.note


def test_written_in_one_piece_or_with_the_reason(profile, tmp_path):
    save(profile, tmp_path / "machine.json")
    write_page(load(tmp_path / "machine.json"), tmp_path / "probe.html")
    assert (tmp_path / "probe.html").read_bytes() == probe_page(profile)  # all of it survives the file
    (tmp_path / "file").write_text("")
    with pytest.raises(RunDirectoryError, match="a file stands where a directory is needed"):
        write_page(profile, tmp_path / "file" / "probe.html")
