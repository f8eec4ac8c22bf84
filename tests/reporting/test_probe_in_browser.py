"""The page of a machine in a real browser: drawn, silent, without the network, on a phone, light and dark."""

import pytest

from tests.reporting.test_in_browser import HOSTILE, browser, pytestmark, requests, show, wait  # noqa: F401
from tests.synthetic_profile import build, datasheet
from turbopump.reporting.probe_page import write_page

PROFILES = {
    "full": build,
    "hostile": lambda: build(texts=HOSTILE),
    "datasheet": datasheet,
    "memory": lambda: build(("memory", "host")),
}


@pytest.fixture(scope="module")
def probe_pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("probe")
    for name, make in PROFILES.items():
        write_page(make(), root / f"{name}.html")
    return {name: root / f"{name}.html" for name in PROFILES}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_silently_from_disk(browser, probe_pages, name, width):  # noqa: F811
    show(browser, probe_pages[name], width=width)
    assert browser.get_log("browser") == []  # no error, no warning, no refused request
    assert [url for url in requests(browser) if not url.startswith(("file:", "data:", "blob:"))] == []
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg .trace').length)"
    )
    assert len(drawn) >= 1 and all(drawn), drawn
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.querySelectorAll('img, iframe, link').length") == 0
    assert browser.execute_script("return document.querySelectorAll('script').length") == 3


def test_plots_keep_their_room_on_a_phone(browser, probe_pages):  # noqa: F811
    show(browser, probe_pages["full"], width=390)
    shares = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p._fullLayout._size.w / p.clientWidth)"
    )
    assert min(shares) >= 0.5, shares  # labels leave the marks at least half of the width


def test_points_say_what_they_are(browser, probe_pages):  # noqa: F811
    show(browser, probe_pages["full"])
    texts = browser.execute_script(
        "return document.getElementById('plot-roofline-0').data.map(t => (t.text || [''])[0])"
    )
    assert any("Gemm" in text and "FLOP/s" in text and "of the best" in text for text in texts)


def test_the_page_follows_the_device_between_light_and_dark(browser, probe_pages):  # noqa: F811
    colours = []
    for dark in (False, True):
        show(browser, probe_pages["full"], dark=dark)
        colours.append(browser.execute_script(
            "const line = document.querySelector('#plot-memory .ygrid'), bar = document.querySelector('.track span');"
            "return [line, bar].map(e => getComputedStyle(e).stroke + getComputedStyle(e).backgroundColor)"
        ))  # fmt: skip
    assert all(light != dark for light, dark in zip(*colours))


def test_the_table_sorts_and_filters(browser, probe_pages):  # noqa: F811
    show(browser, probe_pages["full"])
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    shown = "[...document.querySelectorAll('.rows tbody tr')].filter(r => !r.hidden)"
    total = browser.execute_script(f"return {shown}.length")
    browser.execute_script(
        "const field = document.querySelector('.rows input'); field.value = 'gemm FP16';"
        "field.dispatchEvent(new Event('input'))"
    )
    assert browser.execute_script(f"return {shown}.length") == 16
    said = browser.execute_script("return document.querySelector('.rows output').textContent")
    assert said == f"16 of {total}"
    median = "[...document.querySelectorAll('.rows thead button')].find(b => b.textContent === 'median')"
    values = f"return {shown}.map(r => Number(r.cells[4].dataset.v))"
    browser.execute_script(f"{median}.click()")
    ascending = browser.execute_script(values)
    assert ascending == sorted(ascending) and len(set(ascending)) > 10
    browser.execute_script(f"{median}.click()")
    assert browser.execute_script(values) == ascending[::-1]
    names = browser.execute_script("return [...document.querySelectorAll('[aria-sort]')].map(e => e.ariaSort)")
    assert names == ["descending"]
    # rows without a time stay at the end, whatever the order
    browser.execute_script("const f = document.querySelector('.rows input'); f.value = '';"
                           "f.dispatchEvent(new Event('input'))")  # fmt: skip
    assert browser.execute_script(f"return {shown}.at(-1).cells[4].textContent") == ""


def test_what_can_be_pressed_is_large_enough_for_a_finger(browser, probe_pages):  # noqa: F811
    show(browser, probe_pages["full"], width=390)
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true })")
    heights = browser.execute_script(
        "return [...document.querySelectorAll('button, summary, input')].map(e => e.getBoundingClientRect().height)"
        ".filter(h => h > 0)"
    )
    assert heights and min(heights) >= 24  # WCAG 2.2, 2.5.8
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390


def test_a_browser_without_decompression_says_so(browser, probe_pages):  # noqa: F811
    browser.execute_cdp_cmd("Page.enable", {})
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument",
                                     {"source": "delete globalThis.DecompressionStream"})  # fmt: skip
    try:
        browser.get(probe_pages["memory"].as_uri())
        wait(browser, "return document.querySelector('.plot').textContent.includes('too old to draw')")
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": script["identifier"]})
