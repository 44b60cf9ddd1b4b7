"""Open pages in a real browser."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

NEEDS_BROWSER = "FULCRUM_NEEDS_BROWSER"  # set where a missing browser is a fault, as in .ci/run


# ---- in a real browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium that keeps what it says and asks for."""
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        missing = (
            "no chromium with chromium-driver here (Debian: apt-get install chromium "
            "chromium-driver)"
        )
        if os.environ.get(NEEDS_BROWSER):
            pytest.fail(missing)
        pytest.skip(
            missing
            # a newcomer needs no browser; .ci/run installs one, and sets the variable that makes
            # this fail
        )
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = str(programs[0])
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--hide-scrollbars",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(str(programs[1])))
    yield driver
    driver.quit()
