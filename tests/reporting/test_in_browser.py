"""The page in a real browser: opened from disk, drawn, silent, without the network, on a phone, in light and dark."""

import json
import shutil
from pathlib import Path

import pytest

from tests.processes import wait_until
from tests.synthetic_run import Shape, write_run
from turbopump.report import report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (apt-get install -y "
                       "chromium chromium-driver)"),
]  # fmt: skip

HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x" onerror=alert(2)>'
ROUGH = Shape(name="rough", num_steps=300, evaluate_every=50, checkpoint_every=100, killed_after=180, num_ranks=2,
              slow_rank=1, communication_s=0.02, nan_from=290)  # fmt: skip


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    profile = tmp_path_factory.mktemp("profile")
    for argument in ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                     "--disable-background-networking", "--disable-component-update", "--disable-sync",
                     "--disable-dev-shm-usage", f"--user-data-dir={profile}"):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    write_run(root / "rough", ROUGH)
    write_run(root / "hostile", Shape(num_steps=300, evaluate_every=50), texts=HOSTILE)
    return {
        "run": report([root / "rough"]).html,
        "hostile": report([root / "hostile"]).html,
        "comparison": report([root / "rough", root / "hostile"]).html,
    }


def show(browser, page: Path, *, width: int = 1280, dark: bool = False) -> None:
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500})  # fmt: skip
    browser.get_log("browser"), browser.get_log("performance")
    browser.get(page.as_uri())
    wait(browser, "return document.documentElement.dataset.drawn === 'true'")


def wait(browser, script: str) -> None:
    """Until the page says true."""
    wait_until(lambda: browser.execute_script(script), script)


def requests(browser) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]


@pytest.mark.parametrize("name", ["run", "hostile", "comparison"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_silently_from_disk(browser, pages, name, width):
    show(browser, pages[name], width=width)
    assert browser.get_log("browser") == []  # no error, no warning, no refused request
    outside = [url for url in requests(browser) if not url.startswith(("file:", "data:", "blob:"))]
    assert outside == []
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg .trace, svg .bars').length)"
    )
    assert len(drawn) >= 5 and all(drawn), drawn
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.querySelectorAll('img, iframe, link').length") == 0


def test_names_are_shown_as_they_are(browser, pages):
    show(browser, pages["hostile"])
    assert browser.execute_script("return document.querySelector('h1').textContent") == HOSTILE
    assert browser.execute_script("return document.querySelectorAll('script').length") == 3
    show(browser, pages["comparison"])
    labels = browser.execute_script("return [...document.querySelectorAll('.ytick text')].map(t => t.textContent)")
    assert HOSTILE[:17] + "…" in labels  # in a plot too, where plotly would read markup
    names = browser.execute_script("return [...document.querySelectorAll('[data-trace]')].map(b => b.textContent)")
    assert HOSTILE in names


def grid_colour(browser) -> str:
    return browser.execute_script("return getComputedStyle(document.querySelector('#plot-loss .ygrid')).stroke")


def test_plots_follow_the_device_between_light_and_dark(browser, pages):
    show(browser, pages["run"])
    light, page = grid_colour(browser), browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    wait(browser, f"return getComputedStyle(document.querySelector('#plot-loss .ygrid')).stroke !== '{light}'")
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") != page
    dark = grid_colour(browser)
    show(browser, pages["run"], dark=True)
    assert grid_colour(browser) == dark


def test_steps_on_a_logarithmic_axis_and_curves_that_hide(browser, pages):
    show(browser, pages["run"])
    axis = "return document.getElementById('plot-loss')._fullLayout.xaxis.type"
    assert browser.execute_script(axis) == "linear"
    browser.execute_script("document.querySelector('[data-logx=loss]').click()")
    wait(browser, f"{axis} === 'log'")
    shown = "return document.querySelectorAll('#plot-loss .scatterlayer .trace').length"
    before = browser.execute_script(shown)
    browser.execute_script("document.querySelector('[data-figure=loss][data-trace=\"0\"]').click()")
    wait(browser, f"{shown} === {before - 1}")
    assert browser.execute_script(axis) == "log"
    assert browser.get_log("browser") == []


def test_what_can_be_pressed_is_large_enough_for_a_finger(browser, pages):
    show(browser, pages["run"], width=390)
    heights = browser.execute_script(
        "return [...document.querySelectorAll('button, summary')].map(e => e.getBoundingClientRect().height)"
        ".filter(h => h > 0)"
    )
    assert heights and min(heights) >= 24  # WCAG 2.2, 2.5.8
