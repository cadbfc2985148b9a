"""The page in a browser: silent, alone, and of use by mouse, by keyboard and without script."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fxsplit
from fxsplit.pages.page import inspection_page, report_page
from fxsplit.report import Inspection, RunReport
from fxsplit.spec import RunSpec

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
from selenium.webdriver.common.by import By  # noqa: E402 - only where selenium is
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.remote.webelement import WebElement  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    # Containers have neither a sandbox for root nor much shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def resnet() -> Inspection:
    return fxsplit.inspect(RunSpec(model="timm:resnet18", preset="l2l", parts=4, epochs=30))


@pytest.fixture
def page(browser: webdriver.Chrome, resnet: Inspection, tmp_path: Path) -> webdriver.Chrome:
    return opened(browser, inspection_page(resnet), tmp_path)


def opened(browser: webdriver.Chrome, text: str, folder: Path) -> webdriver.Chrome:
    browser.get("about:blank")
    for log in ("browser", "performance"):
        browser.get_log(log)
    (folder / "page.html").write_text(text, encoding="utf-8")
    url = (folder / "page.html").as_uri()
    browser.get(url)
    # On a busy machine `get` comes back while the page is still being read.
    loaded = [url, "complete"]
    WebDriverWait(browser, 30).until(
        lambda page: page.execute_script("return [document.URL, document.readyState]") == loaded
    )
    return browser


def events(browser: webdriver.Chrome, method: str) -> list[dict[str, Any]]:
    """What the browser tells of its network since it was last asked."""
    messages = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return [message["params"] for message in messages if message["method"] == f"Network.{method}"]


def requested(browser: webdriver.Chrome) -> list[str]:
    """Also of what the policy then kept from being sent."""
    return [event["request"]["url"] for event in events(browser, "requestWillBeSent")]


def visible(browser: webdriver.Chrome) -> list[str]:
    """The names in the rows that can be seen."""
    names = browser.find_elements(By.CSS_SELECTOR, "#network summary .name code")
    return [name.text for name in names if name.is_displayed()]


def press(browser: webdriver.Chrome, *keys: str) -> None:
    for key in keys:
        browser.switch_to.active_element.send_keys(key)


def focused(browser: webdriver.Chrome) -> WebElement:
    return browser.switch_to.active_element


def resize(browser: webdriver.Chrome, width: int, scheme: str) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def test_a_page_says_nothing_and_asks_for_nothing(page: webdriver.Chrome, tmp_path: Path) -> None:
    page.find_element(By.ID, "expand").click()
    assert page.get_log("browser") == []
    assert requested(page) == [(tmp_path / "page.html").as_uri()]


def test_what_a_name_smuggles_in_does_not_act(
    browser: webdriver.Chrome, report: RunReport, inspection: Inspection, tmp_path: Path
) -> None:
    """Even if it were not escaped: the policy holds."""
    text = report_page(report, inspection)
    smuggled = "<script>document.title = 'owned'</script><img src='http://127.0.0.1:9/x'><style>* {color: red}</style>"
    page = opened(browser, text.replace("</main>", f"{smuggled}</main>"), tmp_path)
    assert page.title == "[red]run · file[bold].py:make · fxsplit"
    assert len(page.get_log("browser")) == 3
    assert [event["blockedReason"] for event in events(page, "loadingFailed")] == ["csp"]


def test_the_page_of_a_run_is_as_silent(
    browser: webdriver.Chrome, report: RunReport, inspection: Inspection, tmp_path: Path
) -> None:
    page = opened(browser, report_page(report, inspection), tmp_path)
    assert page.get_log("browser") == []
    assert requested(page) == [(tmp_path / "page.html").as_uri()]
    curve = page.find_element(By.CSS_SELECTOR, "path.curve")
    assert curve.size["width"] > 300


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_of_a_run_fits_its_window(
    browser: webdriver.Chrome, report: RunReport, inspection: Inspection, width: int, tmp_path: Path
) -> None:
    """Its table of phases is not cut, and ticks lie beside their plots, inside of the page."""
    page = opened(browser, report_page(report, inspection), tmp_path)
    resize(page, width, "light")
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.execute_script(wide) == 0
    cut = "const region = document.querySelector('[aria-label=Phases]'); return region.scrollWidth - region.clientWidth"
    assert page.execute_script(cut) == 0
    lefts = [tick.rect["x"] for tick in page.find_elements(By.CSS_SELECTOR, ".tick.left")]
    assert len(lefts) > 10
    assert min(lefts) > 0
    plots = page.find_elements(By.CSS_SELECTOR, ".drawing")
    starts = {round(plot.rect["x"]) for plot in [*plots, *page.find_elements(By.CSS_SELECTOR, ".partition-lane > svg")]}
    assert len(starts) == 1


@pytest.mark.parametrize("width", [1280, 400])
def test_names_of_classes_stay_where_a_confusion_is_scrolled(
    browser: webdriver.Chrome, report: RunReport, inspection: Inspection, width: int, tmp_path: Path
) -> None:
    names = [f"class {number}" for number in range(30)]
    run = replace(report, data={"classes": names}, confusion={name: {name: 100} for name in names})
    page = opened(browser, report_page(run, inspection), tmp_path)
    resize(page, width, "light")
    wide = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.execute_script(wide) == 0
    region = page.find_element(By.CSS_SELECTOR, "[aria-label=Confusion]")
    page.execute_script("arguments[0].scrollLeft = 200", region)
    lefts = {name.rect["x"] for name in region.find_elements(By.CSS_SELECTOR, "th[scope=row], thead td")}
    assert lefts == {region.rect["x"]}


def test_blocks_open_and_close(page: webdriver.Chrome, resnet: Inspection) -> None:
    names = [part.name for part in resnet.partitions]
    assert visible(page) == names
    page.find_element(By.CSS_SELECTOR, ".partition summary").click()
    assert visible(page)[:4] == [names[0], "conv1", "bn1", "act1"]
    page.find_element(By.ID, "expand").click()
    assert len(visible(page)) > 60
    assert not any(op.get_attribute("open") for op in page.find_elements(By.CSS_SELECTOR, ".op"))
    page.find_element(By.ID, "collapse").click()
    assert visible(page) == names


def test_of_equal_blocks_the_first_is_expanded(browser: webdriver.Chrome, resnet: Inspection, tmp_path: Path) -> None:
    page = opened(browser, inspection_page(resnet), tmp_path)
    page.find_element(By.ID, "expand").click()
    (row, *_) = page.find_elements(By.CSS_SELECTOR, ".row > .blocks")
    inner = row.find_elements(By.XPATH, "./details")
    assert [block.get_attribute("open") for block in inner] == ["true", None]


def test_search_shows_what_it_finds_and_gives_back_what_was_open(page: webdriver.Chrome) -> None:
    page.find_element(By.CSS_SELECTOR, ".partition summary").click()
    before = visible(page)
    search = page.find_element(By.ID, "search")
    search.send_keys("LAYER3.0 downsample")
    hits = page.find_elements(By.CSS_SELECTOR, ".hit")
    assert {hit.get_attribute("data-find").split()[0] for hit in hits} == {
        "layer3.0.downsample", "layer3.0.downsample.0", "layer3.0.downsample.1",
    }  # fmt: skip
    assert page.find_element(By.ID, "found").text == "3 found"
    assert "conv1" not in visible(page)
    search.send_keys("nothing of that name")
    assert (visible(page), page.find_element(By.ID, "found").text) == ([], "0 found")
    press(page, Keys.ESCAPE)
    assert visible(page) == before
    assert search.get_attribute("value") == ""


def test_keys_are_enough(page: webdriver.Chrome, resnet: Inspection) -> None:
    names = [part.name for part in resnet.partitions]
    press(page, "/")
    assert focused(page).get_attribute("id") == "search"
    press(page, "e")
    assert focused(page).get_attribute("value") == "e"
    press(page, Keys.ESCAPE, Keys.ARROW_DOWN)
    assert names[0] in focused(page).text
    press(page, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert focused(page).text.startswith("conv1")
    press(page, Keys.ENTER)
    assert "delivers" in focused(page).find_element(By.XPATH, "..").text
    press(page, Keys.ARROW_LEFT, Keys.ARROW_LEFT)
    assert names[0] in focused(page).text
    press(page, Keys.ARROW_LEFT)
    assert visible(page) == names
    press(page, "e")
    assert len(visible(page)) > 60
    press(page, "c")
    assert visible(page) == names
    help_text = page.find_element(By.ID, "key-help")
    assert not help_text.is_displayed()
    press(page, "?")
    assert help_text.is_displayed()
    assert page.find_element(By.ID, "keys").get_attribute("aria-expanded") == "true"


def test_tab_reaches_every_row(page: webdriver.Chrome, resnet: Inspection) -> None:
    press(page, "/")
    reached = []
    for _ in range(3 + len(resnet.partitions)):
        press(page, Keys.TAB)
        reached.append(focused(page).text)
    assert reached[:3] == ["Expand all", "Collapse all", "Keys"]
    assert all(part.name in text for part, text in zip(resnet.partitions, reached[3:], strict=True))


def test_without_script_all_but_the_tools_is_there(
    browser: webdriver.Chrome, resnet: Inspection, tmp_path: Path
) -> None:
    page = opened(browser, re.sub(r"<script>.*</script>", "", inspection_page(resnet), flags=re.DOTALL), tmp_path)
    assert not page.find_element(By.CSS_SELECTOR, ".tools").is_displayed()
    assert visible(page) == [part.name for part in resnet.partitions]
    page.find_element(By.CSS_SELECTOR, ".partition summary").click()
    assert visible(page)[1] == "conv1"
    assert len([lane for lane in page.find_elements(By.CSS_SELECTOR, ".partition-lane") if lane.is_displayed()]) == 4


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400, 320])
def test_a_page_fits_its_window(page: webdriver.Chrome, width: int, scheme: str) -> None:
    resize(page, width, scheme)
    page.find_element(By.ID, "expand").click()
    press(page, "?")
    page.find_element(By.CSS_SELECTOR, ".op summary").click()
    assert (
        page.execute_script("return document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
    )
    background = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(246, 247, 249)") is (scheme == "light")
    cells = page.find_elements(By.CSS_SELECTOR, "summary .figure")
    assert len(cells) > 100
    script = "return [...document.querySelectorAll('summary .figure')].every((e) => e.scrollWidth <= e.clientWidth)"
    assert page.execute_script(script)
