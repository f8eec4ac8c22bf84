"""The pages of a plan and of a validation in a real browser: drawn, silent, without the network, on a phone."""

import pytest

from tests.reporting.test_in_browser import HOSTILE, browser, pytestmark, requests, show  # noqa: F401
from tests.reporting.test_plan_page import validation
from tests.synthetic_plan import build, plan
from turbopump.reporting.plan_page import PlanView, write_page
from turbopump.reporting.validation_page import write_validation_page

PAGES = {
    "full": lambda path: write_page(build(), path),
    "hostile": lambda path: write_page(build(plan=plan(HOSTILE), machine=HOSTILE), path),
    "read back": lambda path: write_page(PlanView(plan()), path),
    "validation": lambda path: write_validation_page(validation(HOSTILE), path),
}


@pytest.fixture(scope="module")
def plan_pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("plan")
    for name, write in PAGES.items():
        write(root / f"{name}.html")
    return {name: root / f"{name}.html" for name in PAGES}


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_draws_silently_from_disk(browser, plan_pages, name, width):  # noqa: F811
    show(browser, plan_pages[name], width=width)
    assert browser.get_log("browser") == []  # no error, no warning, no refused request
    assert [url for url in requests(browser) if not url.startswith(("file:", "data:", "blob:"))] == []
    drawn = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p.querySelectorAll('svg .trace').length)"
    )
    assert len(drawn) >= 2 and all(drawn), drawn
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.execute_script("return document.querySelectorAll('img, iframe, link').length") == 0


def test_plots_keep_their_room_on_a_phone(browser, plan_pages):  # noqa: F811
    show(browser, plan_pages["full"], width=390)
    shares = browser.execute_script(
        "return [...document.querySelectorAll('.plot')].map(p => p._fullLayout._size.w / p.clientWidth)"
    )
    assert min(shares) >= 0.5, shares


def test_the_best_cell_of_the_heat_map_stands_out_and_can_be_read(browser, plan_pages):  # noqa: F811
    for dark in (False, True):
        show(browser, plan_pages["full"], dark=dark)
        cells = browser.execute_script(
            "return [...document.querySelectorAll('td[style]')].map(c => [c.querySelector('b') !== null,"
            "getComputedStyle(c).backgroundColor])"
        )
        best = [colour for bold, colour in cells if bold]
        assert len(cells) == 20 and len(best) == 1 and len({colour for _, colour in cells}) > 5
        assert all(colour != best[0] for bold, colour in cells if not bold)


def test_points_say_what_they_are(browser, plan_pages):  # noqa: F811
    show(browser, plan_pages["full"])
    texts = browser.execute_script("return document.getElementById('plot-landscape').data.map(t => t.text[0])")
    assert all("microbatch" in text and "GB" in text for text in texts) and texts[-1].startswith("the plan: ")
