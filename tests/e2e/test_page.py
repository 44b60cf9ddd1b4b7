"""The page in a real browser: from a data file to a certificate on a tiny model, on a desk and on a
phone, light and dark.

FULCRUM_SCREENSHOTS names a folder in which each screen is kept, to be looked at.
"""

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulcrum.report import wording
from fulcrum.stats.certificate import Certificate
from fulcrum.web import jobs
from fulcrum.web.workspace import Workspace
from helpers.browsers import browser as browser  # a fixture
from helpers.page_server import STANDING_IN, Client, served, until
from helpers.tiny import save_task

EVIL = '<img src=x onerror="window.hit=1"><script>window.hit=1</script>[[trained]]'
WIDTHS = ((1280, "light"), (1280, "dark"), (375, "light"), (375, "dark"))
QUICK: dict[str, Any] = {
    "mix": {"general_per_task": 1, "repeats": 1},
    "train": {"dtype": "float32", "device": "cpu", "lora_r": 2, "batch_size": 2},
    "eval": {"general_rows": 2, "draws": 100},
    "compare": {"arms": ["base", "sft", "tell"], "sft_epochs": [1], "folds": 2},
}


class Walk:
    """A browser that is let in, and what may be asked of any screen."""

    def __init__(self, driver: Any, client: Client, address: str) -> None:
        self.browser, self.client = driver, client
        self.base = f"http://127.0.0.1:{client.port}/"
        self.sized(1280, "light")
        driver.get_log("browser")
        driver.get(address)

    def sized(self, width: int, scheme: str, height: int = 900) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": "", "features": features}
        )
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def all(self, selector: str) -> list[Any]:
        """What is seen of it."""
        return list(self.browser.execute_script(SEEN, selector))

    def texts(self, selector: str) -> list[str]:
        """The texts of what is seen of it."""
        return list(
            self.browser.execute_script(
                SEEN.replace("return seen", "return seen.map(e => e.innerText)"), selector
            )
        )

    def one(self, selector: str) -> Any:
        """The first, once it is seen."""
        return until(lambda: self.all(selector))[0]

    def text(self) -> str:
        return str(self.browser.find_element("css selector", "main").text)

    def keys(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def tab_to(self, is_it: str) -> None:
        """Press Tab until what the expression says of `e` has the focus, which must be visible.

        One press, one look: it does not matter where a job that ends, or the page's end, sends the
        focus meanwhile.
        """
        from selenium.webdriver import Keys

        until(
            lambda: self.browser.execute_script(
                f"return [...document.querySelectorAll('*')].some(e => {is_it})"
            )
        )
        for _ in range(120):
            self.keys(Keys.TAB)
            if self.browser.execute_script(f"const e = document.activeElement; return {is_it}"):
                style, width = self.browser.execute_script(OUTLINE)
                assert style == "solid"
                assert width >= 2
                return
        raise AssertionError(f"the keyboard does not reach {is_it}")

    def looked_at(self, name: str) -> None:
        """On every width and in both colours: nothing to scroll sideways, text that can be read,
        names for what is used."""
        for width, scheme in WIDTHS:
            self.sized(width, scheme)
            wide, tall = self.browser.execute_script(SIZE)
            assert wide == width, f"{name} at {width} pixels"
            assert self.browser.execute_script(FAINT) == [], f"{name}, {scheme}"
            if folder := os.environ.get("FULCRUM_SCREENSHOTS"):
                self.sized(width, scheme, max(tall, 600))
                shot = self.browser.execute_cdp_cmd("Page.captureScreenshot", {})
                Path(folder).mkdir(parents=True, exist_ok=True)
                Path(folder, f"{name}-{width}-{scheme}.png").write_bytes(
                    base64.b64decode(shot["data"])
                )
        self.sized(1280, "light")
        assert self.browser.execute_script(NAMELESS) == [], name
        assert self.browser.execute_script("return window.hit") is None
        said = [entry["message"] for entry in self.browser.get_log("browser")]
        assert [
            text for text in said if not text.endswith("400 (Bad Request)")
        ] == []  # Chromium's own word on what was refused


OUTLINE = """
  const e = document.activeElement, style = getComputedStyle(e.closest('.verb') || e);
  return [style.outlineStyle, parseFloat(style.outlineWidth)]"""
SIZE = "const page = document.documentElement; return [page.scrollWidth, page.scrollHeight]"
CHOSEN = "return [...document.querySelectorAll('option:checked')].map(e => e.textContent)"
SEEN = """
  const seen = [...document.querySelectorAll(arguments[0])].filter(e => e.getClientRects().length);
  return seen"""
# Texts whose contrast with what lies behind them is below 4.5 (WCAG AA); controls that cannot be
# used are left out.
FAINT = """
  const rgb = (text) => {
    const [r, g, b, alpha = 1] = text.match(/[\\d.]+/g).map(Number);
    return text.startsWith('color(') ? [r * 255, g * 255, b * 255, alpha] : [r, g, b, alpha];
  };
  const light = (colour) => {
    const linear = v => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
    const [r, g, b] = colour.map(v => linear(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] > .5) return colour;
    }
    return [255, 255, 255, 1];
  };
  const left_out = 'svg, :disabled, .unseen, .jump, noscript, option, .stale';
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement, text = node.textContent.trim();
    if (!text || !e.offsetParent || e.closest(left_out)) continue;
    const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
    const ratio = (a + .05) / (b + .05);
    if (ratio < 4.5) found.push(`${text.slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return found"""
# Controls without a name for those who hear the page.
NAMELESS = """
  const named = (e) =>
    e.getAttribute('aria-label') || (e.labels && e.labels.length) || e.textContent.trim();
  return [...document.querySelectorAll('button, a, input, select, textarea, progress')]
    .filter(e => e.offsetParent && !named(e)).map(e => e.outerHTML)"""


@pytest.fixture
def walk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Walk]:
    save_task(tmp_path, 24, 6)
    rows = tmp_path / "train.jsonl"
    evil = json.dumps({"prompt": EVIL, "completion": "red"})
    rows.write_text(
        f"{evil}\n{rows.read_text()}" + '{"prompt": "colour ant 0", "completion": "red"}\n'
    )
    space = Workspace(tmp_path / "space", models=[tmp_path / "model"])
    with served(space, most_upload=2**20) as (client, told):
        driver = request.getfixturevalue("browser")
        yield Walk(driver, client, told[-1])
        driver.get(
            "about:blank"
            # else the page goes on asking a server that ends, and the next walk finds that in the
            # log
        )


def test_from_a_data_file_to_a_certificate_and_a_chat(
    walk: Walk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selenium.webdriver import Keys

    walk.one(".drop")
    walk.looked_at("1-home")
    walk.browser.find_element("css selector", "input[type=file]").send_keys(
        str(tmp_path / "train.jsonl")
    )
    assert until(lambda: walk.texts(".tile .value")) == ["25", "1", "3 labels"]
    assert "duplicate" in walk.text()
    assert walk.texts(".texts tbody td")[:2] == [EVIL, "red"]
    walk.looked_at("2-data")

    walk.tab_to("e.textContent === 'Next: task and anchor'")
    walk.keys(Keys.ENTER)
    walk.one("#f-task-anchor")
    for place, name in enumerate(("pool", "test")):
        chooser = walk.browser.find_elements("css selector", "input[type=file]")[place]
        chooser.send_keys(str(tmp_path / f"{name}.jsonl"))
        until(lambda name=name: f"{name}.jsonl" in walk.browser.execute_script(CHOSEN))
    walk.tab_to("e.id === 'f-mix-general_per_task'")
    walk.keys("-3", Keys.TAB)  # what Tab reaches is marked, and so replaced
    assert walk.one("#f-mix-general_per_task-wrong p").text.startswith("must be at least 0")
    file = walk.browser.find_element("id", "yaml")
    settings = yaml.safe_load(file.get_attribute("value"))
    assert settings["general"][0]["path"].startswith("data/")
    assert settings["task"]["test"].startswith("data/")
    settings["task"]["max_new_tokens"] = 3
    walk.browser.execute_script(
        "arguments[0].value = arguments[1]", file, yaml.safe_dump({**settings, "nonsense": 1})
    )
    walk.tab_to("e.id === 'save-yaml'")
    walk.keys(Keys.ENTER)
    until(lambda: "unknown setting 'nonsense'" in walk.one("#yaml-wrong").text)
    walk.browser.execute_script(
        "arguments[0].value = arguments[1]", file, yaml.safe_dump({**settings, **QUICK})
    )
    walk.keys(Keys.ENTER)
    until(
        lambda: (
            walk.browser.find_element("id", "f-mix-general_per_task").get_attribute("value") == "1"
        )
    )
    until(lambda: walk.all("#do-check"))  # what was looked at before the settings changed is done
    walk.one("#do-check").click()
    until(lambda: walk.all(".seen .trained") and not walk.all(".busy") and not walk.all(".stale"))
    spans = {kind: walk.texts(f".seen .{kind}")[0] for kind in ("anchor", "trained", "end")}
    assert spans["anchor"] == settings["task"]["anchor"]
    assert spans["trained"] in ("red", "blue", "green")
    assert spans["end"] == "<|im_end|>"
    walk.looked_at("3-task")

    walk.tab_to("e.textContent === 'Next: the plan'")
    walk.keys(Keys.ENTER)
    until(lambda: walk.all(".share"))
    assert walk.texts(".share .value")[0] == "50%"
    walk.tab_to("e.value === 'train'")
    walk.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert walk.browser.switch_to.active_element.get_attribute("value") == "compare"
    walk.looked_at("4-plan")
    walk.tab_to("e.id === 'start'")
    walk.keys(Keys.ENTER)

    until(lambda: walk.all(".chart svg .curve"))
    until(lambda: walk.all("a.button[href$='/result']"))
    walk.looked_at("5-run")
    walk.tab_to("e.textContent === 'See the result'")
    walk.keys(Keys.ENTER)
    headline = walk.one(".verdict .headline").text
    run = walk.browser.current_url.split("/")[-2]
    file = next((tmp_path / "space" / "runs" / run / "out").rglob("certificate.json"))
    assert headline == wording.headline(Certificate.read(file))

    monkeypatch.setattr(jobs, "COMMAND", STANDING_IN)
    walk.tab_to("e.id === 'begin-chat'")
    walk.keys(Keys.ENTER)
    walk.one("#question")
    walk.tab_to("e.id === 'question'")
    walk.keys("colour <i>ant</i>", Keys.ENTER)
    heard = [
        f"{name} heard colour <i>ant</i> <b>and</b> 1 turns" for name in ("base", "sft", "tell")
    ]
    until(lambda: [text.strip() for text in walk.texts(".answered .text")] == heard)
    walk.looked_at("6-result")

    walk.browser.get(f"{walk.base}runs/{run}/report")
    assert headline in walk.browser.find_element("css selector", "body").text
    assert [entry["message"] for entry in walk.browser.get_log("browser")] == []


def test_the_form_and_the_file_do_not_undo_each_other(walk: Walk, tmp_path: Path) -> None:
    from selenium.webdriver import Keys

    walk.one(".drop")
    walk.browser.find_element("css selector", "input[type=file]").send_keys(
        str(tmp_path / "train.jsonl")
    )
    walk.one(".tile .value")
    walk.one("a.button[href$='/task']").click()
    longest, file = walk.one("#f-task-max_new_tokens"), walk.browser.find_element("id", "yaml")
    longest.clear()
    longest.send_keys("17")
    for box in walk.all("fieldset.checks input")[1:3]:  # at once, while the number is being saved
        box.click()
    chosen = {
        box.get_attribute("value") for box in walk.all("fieldset.checks input") if box.is_selected()
    }
    until(lambda: set(yaml.safe_load(file.get_attribute("value"))["task"]["metrics"]) == chosen)
    assert yaml.safe_load(file.get_attribute("value"))["task"]["max_new_tokens"] == 17
    file.send_keys(Keys.END, "x")
    assert not longest.is_enabled()
    walk.one("a.button[href$='/plan']").click()
    assert walk.browser.current_url.endswith("/task")
    walk.one("#drop-yaml").click()
    until(lambda: longest.is_enabled())
    assert yaml.safe_load(file.get_attribute("value"))["task"]["max_new_tokens"] == 17


def test_errors_and_empty_places_are_said(walk: Walk, tmp_path: Path) -> None:
    walk.one(".drop")
    assert "No run as yet" in walk.text()
    (tmp_path / "picture.jsonl").write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    walk.browser.find_element("css selector", "input[type=file]").send_keys(
        str(tmp_path / "picture.jsonl")
    )
    assert "picture.jsonl: the file is no text in UTF-8" in walk.one(".drop .bad").text
    walk.looked_at("7-refused")
    (tmp_path / "own.csv").write_text(
        "mail,kind\n" + "".join(f"where is parcel {k}?,late\n" for k in range(12))
    )
    walk.browser.find_element("css selector", "input[type=file]").send_keys(
        str(tmp_path / "own.csv")
    )
    walk.one("#column-prompt").send_keys("mail")
    walk.looked_at("8-columns")
    walk.one("#column-completion").send_keys("kind")
    next(button for button in walk.all("button") if button.text == "Read again").click()
    assert until(lambda: walk.texts(".tile .value"))[0] == "12"
    walk.browser.get(f"{walk.base}#/run/0123456789ab/task")
    walk.browser.refresh()
    assert "no such run here" in walk.one(".say.bad").text
    walk.browser.get_log("browser")
    walk.browser.get(walk.base)
    remove = walk.one("button[aria-label='Remove own']")
    walk.looked_at("9-runs")
    remove.click()
    walk.browser.switch_to.alert.dismiss()
    assert walk.texts(".runs a") == ["own"]
    remove.click()
    walk.browser.switch_to.alert.accept()
    until(lambda: "No run as yet" in walk.text())
    assert walk.browser.switch_to.active_element.text == "Runs"
    assert not list((tmp_path / "space" / "runs").glob("[0-9a-f]*"))
