"""Opens HTML reports from disk in a real browser, of a correct port and of a broken one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement

from porting.families.van import VanFamily
from porting.files.weights_file import assign_weights, variable_shapes
from porting.mapping.convert import convert
from porting.parity.compare import check_parity
from porting.references.van import VAN
from porting.reports import render

pytestmark = pytest.mark.slow

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
BROKEN = "block2.0.attn.spatial_gating_unit.conv_spatial"


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    if BROWSER is None or DRIVER is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have Chromium and its driver")
        pytest.skip("needs Chromium and its driver: Debian's packages chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield chrome
    chrome.quit()


@pytest.fixture(scope="module")
def pages(reference: VAN, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    family = VanFamily()
    model = family.build("nano", 10)
    state_dict = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    weights = dict(convert(state_dict, family.key_map(family.spec("nano")), variable_shapes(model)).weights)
    images = np.random.default_rng(0).normal(size=(1, 64, 48, 3)).astype(np.float32)
    folder = tmp_path_factory.mktemp("pages")
    kernel = BROKEN.replace(".", "/").replace("block2/0", "block2_0") + "/kernel"
    for name in ("healthy", "broken"):
        if name == "broken":
            weights[kernel] = weights[kernel].swapaxes(0, 1)
        assign_weights(model, weights)
        report = check_parity(reference, model, images)
        assert report.passed == (name == "healthy")
        (folder / f"{name}.html").write_text(render(report, "html"))
    return {path.stem: path for path in folder.iterdir()}


def opened(browser: webdriver.Chrome, page: Path) -> list[WebElement]:
    """Open the page and return the rows of its table of layers."""
    browser.get(page.as_uri())
    return browser.find_elements(By.CSS_SELECTOR, "#layers tbody tr:not(.detail)")


def shown(browser: webdriver.Chrome) -> list[list[str]]:
    """The cells of the visible rows, in the order on the screen."""
    rows = browser.find_elements(By.CSS_SELECTOR, "#layers tbody tr:not([hidden]):not(.detail)")
    return [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]


def sort_by(browser: webdriver.Chrome, heading: str) -> None:
    browser.find_element(By.XPATH, f"//th/button[text()='{heading}']").click()


def text_of(browser: webdriver.Chrome, identity: str) -> str:
    return browser.find_element(By.ID, identity).text


def next_to_details(browser: webdriver.Chrome) -> str:
    """The layer in the row above the details."""
    row = browser.find_element(By.XPATH, "//tr[@class='detail']/preceding-sibling::tr[1]")
    return str(row.find_elements(By.TAG_NAME, "td")[1].text)


def complaints(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


def test_a_healthy_port(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    rows = opened(browser, pages["healthy"])
    assert text_of(browser, "verdict").startswith("AT PARITY")
    assert browser.find_elements(By.CSS_SELECTOR, "tr.failed, td.failed") == []
    assert text_of(browser, "hint") == "Select a layer for its details."
    assert text_of(browser, "count") == f"{len(rows)} of {len(rows)}"
    assert browser.find_element(By.CSS_SELECTOR, ".plot.wide svg").size["height"] > 100
    assert "limit in float32" in browser.find_element(By.CSS_SELECTOR, ".plot.wide svg").text
    assert complaints(browser) == []


def test_a_broken_port_shows_its_first_divergence(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    opened(browser, pages["broken"])
    assert text_of(browser, "verdict").startswith("NOT AT PARITY")
    findings = text_of(browser, "findings")
    assert BROKEN in findings
    assert "height and width" in findings
    browser.find_element(By.ID, "only-failed").click()
    failed = shown(browser)
    assert failed
    assert failed[0][1] == f"{BROKEN} culprit"
    assert text_of(browser, "count").startswith(f"{len(failed)} of ")
    # Its details are also shown without a click, below its row and within the visible part of the table.
    assert next_to_details(browser).startswith(BROKEN)
    assert text_of(browser, "numbers").startswith("Keras path")
    box, details = (browser.find_element(By.ID, each).rect for each in ("layers", "details"))
    assert box["y"] <= details["y"] <= box["y"] + box["height"]
    assert complaints(browser) == []


def test_search(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    opened(browser, pages["healthy"])
    browser.find_element(By.ID, "search").send_keys("PROJ_1")
    found = shown(browser)
    assert found
    assert all("proj_1" in cells[1] for cells in found)
    browser.find_element(By.ID, "search").send_keys(" no such layer")
    assert shown(browser) == []


def test_sort(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    opened(browser, pages["broken"])
    sort_by(browser, "exact")
    upwards = [float(cells[4]) for cells in shown(browser) if cells[4] not in {"-", ""}]
    assert upwards == sorted(upwards)
    sort_by(browser, "exact")
    downwards = shown(browser)
    assert [float(cells[4]) for cells in downwards if cells[4] not in {"-", ""}] == upwards[::-1]
    sort_by(browser, "#")
    assert [int(cells[0]) for cells in shown(browser)] == list(range(1, len(downwards) + 1))


def test_a_chosen_layer(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    opened(browser, pages["healthy"])
    browser.find_element(By.XPATH, "//td[text()='block1.0.mlp.fc1']").click()
    assert next_to_details(browser) == "block1.0.mlp.fc1"
    assert "cosine\n1 - " in text_of(browser, "numbers")
    assert "block1_0/mlp/fc1" in text_of(browser, "numbers")
    bars = browser.find_elements(By.CSS_SELECTOR, "#bars div")
    assert max(bar.size["height"] for bar in bars) > 50


def test_a_point_of_the_plot_leads_to_its_layer(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    rows = opened(browser, pages["healthy"])
    point = browser.find_element(By.CSS_SELECTOR, ".plot.wide .point[data-index='100']")
    browser.execute_script("arguments[0].dispatchEvent(new MouseEvent('click', {bubbles: true}))", point)
    assert next_to_details(browser) == rows[100].find_elements(By.TAG_NAME, "td")[1].text
    title = point.find_element(By.TAG_NAME, "title").get_attribute("textContent")
    assert str(title).startswith(next_to_details(browser))
    # The axis counts as the table does.
    assert rows[0].find_elements(By.TAG_NAME, "td")[0].text == "1"
    labels = [text.text for text in browser.find_elements(By.CSS_SELECTOR, ".plot.wide svg > text")]
    assert "1" in labels
    assert "0" not in labels


def test_a_phone_scrolls_only_inside_the_table(browser: webdriver.Chrome, pages: dict[str, Path]) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    )
    try:
        opened(browser, pages["broken"])
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
        row = browser.find_element(By.CSS_SELECTOR, "#layers tr.failed")
        cells = [cell for cell in row.find_elements(By.TAG_NAME, "td") if cell.is_displayed()]
        assert [cell.rect["x"] + cell.rect["width"] <= 390 for cell in cells] == [True, True, True]
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
