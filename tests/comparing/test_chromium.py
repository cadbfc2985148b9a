"""The page of a comparison in a browser: silent, and no wider than the window."""

from __future__ import annotations

from pathlib import Path

import pytest

from fxsplit.comparison import Comparison
from fxsplit.pages.comparison_page import comparison_page
from tests.pages.test_chromium import browser, opened, pytestmark, webdriver

__all__ = ["browser", "pytestmark"]


@pytest.mark.parametrize("width", [1280, 400])
def test_it_is_silent_and_no_wider_than_the_window(
    comparison: Comparison,
    tmp_path: Path,
    width: int,
    browser: webdriver.Chrome,
) -> None:
    opened(browser, comparison_page(comparison), tmp_path)
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        assert browser.get_log("browser") == []
        charts = browser.execute_script("return document.querySelectorAll('figure.chart').length")
        assert charts == 8 * len(comparison.tables)
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
