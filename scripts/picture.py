"""Take the picture of a certificate that the README shows, from a run's report page.

    python scripts/picture.py results/map/confirm-smollm2/report.html docs/pictures/certificate.png

The picture shows the answer (verdict and main numbers) and the first learning curve. It needs
Chromium and its driver (Debian: apt-get install chromium chromium-driver) and selenium, which comes
with the development packages. `fulcrum report RUN_FOLDER` makes the page of a stored run.
"""

import base64
import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from selenium import webdriver

WIDTH = 960  # CSS pixels
SCALE = 1.5  # image pixels for each CSS pixel
MARGIN = 16  # CSS pixels below the curve
COLOURS = 128  # of the picture's palette, which keeps the file small

# Everything but the answer and the first figure is hidden. Returns the bottom of that figure in CSS
# pixels.
CROP = """
const figure = document.querySelector("main figure");
const section = figure.closest("section");
const hidden = [
  ...document.querySelectorAll(".notes, header nav, header > section:not(.certificate)"),
  ...section.querySelectorAll(":scope > h2, table, details, .skip"),
];
for (const element of hidden) {
  element.style.display = "none";
}
return figure.getBoundingClientRect().bottom + window.scrollY;
"""


def take(page: Path, picture: Path) -> None:
    """Open `page` in headless Chromium, crop it to the answer and its curve, and write `picture` as
    PNG."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which("chromium"))
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(str(shutil.which("chromedriver")))
    )
    try:
        light = [{"name": "prefers-color-scheme", "value": "light"}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": light})
        screen = {"width": WIDTH, "height": 900, "deviceScaleFactor": SCALE, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        browser.get(page.resolve().as_uri())
        bottom = browser.execute_script(CROP)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": bottom + MARGIN, "scale": 1}
        shot = browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
    finally:
        browser.quit()
    picture.parent.mkdir(parents=True, exist_ok=True)
    image = Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(picture, optimize=True)


if __name__ == "__main__":
    take(Path(sys.argv[1]), Path(sys.argv[2]))
