"""The page of a certificate: it says what the certificate holds, acts on nobody's text, and works
in a real browser."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulcrum.core.errors import StoreError
from fulcrum.report import certificate_page, run_report, wording
from fulcrum.report.run_kinds import COMPARE
from fulcrum.stats import certification, outcomes
from fulcrum.stats.certificate import AtEnd, Certificate, Chosen, Design, Inputs, Question
from fulcrum.stats.intervals import Interval
from fulcrum.stats.row_savings import Factor
from helpers.browsers import browser as browser
from helpers.certificates import QUESTION, lines, save
from helpers.commands import done, refused
from helpers.reports import folder_with, make, predictions

EVIL = "<script>alert(1)</script>"
ARMS = {
    "base": (None, (0,)),
    "sft": (0.0, (16, 32, 64, 128, 256)),
    "sft_anchor": (-0.6, (16, 64)),
    "mix": (0.7, (16, 64)),
    "tell": (1.3, (16, 32, 64)),
    "general_then_task": (0.6, (16, 64)),
    "placebo_permuted": (0.1, (16, 64)),
}


def compared(gain: float = 1.0) -> Iterator[dict[str, object]]:
    """A comparison with two metrics and all side effects; nll is better when lower."""
    rng = np.random.default_rng(1)
    for arm, (ahead, sizes) in ARMS.items():
        for size in sizes:
            for seed in range(5 if size else 1):
                level = (
                    -2.0
                    if ahead is None
                    else np.log2(size / 16) + gain * ahead + rng.normal(0, 0.1)
                )
                cell = {"arm": arm, "size": size, "seed": seed}
                yield {**cell, "dev": level, **({"tokens": 12.0 * size} if size else {})}
                for row in range(20):
                    value = level + rng.normal(0, 0.1)
                    yield {
                        **cell,
                        "metric": "nll",
                        "row": f"r{row}",
                        "outcome": 5 * (1.5 - 0.15 * value),
                        "weight": 5,
                    }
                    yield {
                        **cell,
                        "metric": "match",
                        "row": f"r{row}",
                        "outcome": 0.3 + 0.08 * value,
                    }
                    yield {
                        **cell,
                        "metric": "forgetting: pool",
                        "row": f"p{row}",
                        "outcome": 2 + row / 10 + (size > 0) * rng.normal(0.1, 0.02),
                    }
                    yield {
                        **cell,
                        "metric": "leakage",
                        "row": f"q{row}",
                        "outcome": float(rng.random() < 0.2),
                    }
                    if arm == "tell":
                        yield {
                            **cell,
                            "metric": "dependency: wrong anchor",
                            "row": f"r{row}",
                            "outcome": rng.normal(0.3, 0.05),
                        }


DESIGN = Design(2, "first", {"sft": 2, "tell": 1}, ("sft", "tell"))
NOTE = "Settings tried: sft 2, tell 1."


def certified(
    folder: Path,
    content: Iterator[dict[str, Any]],
    question: Question,
    inputs: Inputs | None = None,
) -> Path:
    """A folder with the certificate of these outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    certification.write(
        folder, outcomes.read(save(folder / "in.jsonl", content)), question, inputs or Inputs()
    )
    return folder


def rich_question(task: str = "snips") -> Question:
    return Question(
        "tell", ("base", "sft", "sft_anchor"), ("nll", "match"), ("nll",), task, 400, design=DESIGN
    )


CHOSEN = tuple(
    Chosen("sft", size, seed, {"repeats": 4 if size > 16 else 2, "kl": 0.0})
    for size in (16, 64)
    for seed in (0, 1)
)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rich")
    return certified(
        folder,
        compared(),
        rich_question(),
        Inputs(hyperparameters=CHOSEN, environment={"torch": "2.13.0"}),
    )


def known(folder: Path) -> Certificate:
    return Certificate.read(folder / "certificate.json")


def shown(
    content: Iterator[dict[str, Any]], folder: Path, question: Question = QUESTION
) -> dict[str, Any]:
    return certificate_page.view(known(certified(folder, content, question)))


# ---- what is said


def test_a_gain(tmp_path: Path) -> None:
    view = shown(lines(), tmp_path)
    assert (view["glyph"], view["kind"], view["word"]) == ("▲", "gain", "Gain")
    difference, saving, more = view["tiles"]
    assert difference[0] == "quality, higher is better: tell − sft at 64 rows"
    ends = known(tmp_path).answer.difference
    assert difference[1:] == (f"+{ends.estimate:.3f}", f"[+{ends.low:.3f}, +{ends.high:.3f}]")
    assert saving[1] == "2.0×"
    assert re.fullmatch(
        r"\[1\.\d, 2\.\d\]: 3\d of 64 rows would have sufficed \(\d\d to \d\d\)", saving[2]
    )
    assert more[1:] == ("Can't tell", "The reference was not measured with so many (64 + 50).")
    names = [(found["name"], found["size"]) for found in view["answers"][0]["factors"]]
    assert names == [("row saving", 64), ("row gain", 16), ("row gain", 32)]


@pytest.mark.parametrize(
    ("tell", "sft", "kind", "word", "saving"),
    [
        (0.0, 1.0, "none", "No gain shown", "1.0×"),
        (-1.0, 1.0, "loss", "Loss", "below 1.0×"),
        (1.0, 0.0, "unclear", "Gain, its worth in rows not identifiable", "not identifiable"),
        (9.0, 1.0, "gain", "Gain", "at least 4.0×"),
    ],
)
def test_verdicts(
    tmp_path: Path, tell: float, sft: float, kind: str, word: str, saving: str
) -> None:
    view = shown(lines(tell, sft), tmp_path)
    assert (view["kind"], view["word"], view["tiles"][1][1]) == (kind, word, saving)
    text = certificate_page.html({"certificate.json": known(tmp_path)})
    assert f"</span>{word}</p>" in text
    assert (view["answers"][0]["reading"] is None) == (kind in ("loss", "unclear"))
    assert (
        "Not identifiable, because more rows do not clearly improve the reference (quality" in text
    ) == (kind == "unclear")


def test_a_gain_is_read_where_a_saving_cannot_be(tmp_path: Path) -> None:
    view = shown((line for line in lines() if line["arm"] == "sft" or line["size"] == 16), tmp_path)
    assert (view["kind"], view["word"]) == ("gain", "Gain")
    name, value, text = view["tiles"][1]
    assert (name, re.sub(r"\d", "0", value)) == ("Row gain", "0.0×")
    assert re.fullmatch(
        r"\[1\.\d, 2\.\d\]: 16 rows of tell were worth 3\d \(\d\d to \d\d\) rows without "
        r"general data",
        text,
    )
    saving, gain = view["answers"][0]["factors"]
    assert (saving["factors"], saving["words"]) == (["not identifiable"] * 2, "")
    assert gain["factors"][0].startswith(value)
    assert "The row saving is not identifiable, because the reference was measured" not in (
        text := certificate_page.html({"certificate.json": known(tmp_path)})
    )
    assert (
        "The row saving is not identifiable, because more rows improve the reference as a "
        "whole (quality" in text
    )


def test_a_contradiction_stands_beside_the_headline(tmp_path: Path) -> None:
    def both() -> Iterator[dict[str, object]]:
        yield from lines(1.0)
        yield from ({**line, "metric": "taste"} for line in lines(-9.0) if "row" in line)

    view = shown(both(), tmp_path, Question("tell", ("sft",), ("quality", "taste")))
    assert view["word"] == "Gain by the first metric, contradicted by another"
    text = certificate_page.html({"certificate.json": known(tmp_path)})
    assert "<b>Contradiction:</b> quality is better, and taste is worse." in text
    _, value, both_of = view["tiles"][1]
    assert value == "none stated"
    assert both_of.startswith("quality 2")
    assert "; taste below 1.0×" in both_of
    assert [answer["verdict"] for answer in view["answers"]] == ["▲ Gain", "▼ Loss"]


def test_more_rows_or_general_data(rich: Path) -> None:
    answer = known(rich).answer
    more = answer.more_rows
    short, brief, text = wording.more_rows(answer)
    assert short == "General data"
    assert brief.startswith(f"general data − labelling: −{-more.advantage.estimate:.3f} [−")
    assert brief.endswith("in NLL, lower is better")
    assert f"general data with 64 rows −{-answer.difference.estimate:.3f} [−" in text
    assert f"50 more labelled rows without it (sft) −{-more.labelling.estimate:.3f} [−" in text


def test_one_seed_is_said_and_nothing_is_said_of_side_effects(tmp_path: Path) -> None:
    certified(tmp_path, lines(seeds=1), QUESTION)
    text = certificate_page.html({"certificate.json": known(tmp_path)})
    assert "One seed: intervals say nothing of another training run." in text
    assert "with one seed only the groups vary" in text
    assert (
        "Not measured: the outcomes hold neither forgetting nor drift, leakage or dependency "
        "on the anchor." in text
    )
    assert "Nothing more can be told: the arms that would tell" in text
    assert " seeds: " not in text


def test_every_score_and_every_part_stands_in_the_page_with_its_interval(rich: Path) -> None:
    certified_ = known(rich)
    text = certificate_page.html({"certificate.json": certified_})
    assert wording.headline(certified_) in text
    for answer in certified_.answers:
        name = {"nll": "NLL"}.get(answer.metric, answer.metric)
        for point in answer.points:
            score = "{:.3f} [{:.3f}, {:.3f}]".format(*point.score).replace("-", "−")
            where = f"{point.size} rows" if point.size else "untrained"
            assert (
                text.count(f"<title>{point.arm}, {where}\n{name} {score}") == 2
            )  # wide and narrow
            assert f"<td>{score}</td>" in text
        for part in answer.attribution:
            low = part.difference.low
            assert f"[{'+' if low > 0 else ''}{low:.3f}, ".replace("-", "−") in text
    for words in (
        "interaction of anchor and mix",
        "tell − placebo_permuted",
        "the order brings",
        "Forgetting: pool",
        "Leakage",
    ):
        assert words in text
    assert (
        text.index("Forgetting: pool")
        < text.index("<h3>Leakage")
        < text.index("Dependency on the anchor: wrong anchor")
    )
    assert "with another anchor" in text
    assert "<td>16</td><td>repeats 2</td>" in text  # of two seeds that agree
    assert certified_.sha256 in text
    assert "fulcrum verify certificate.json" in text


def test_the_reference_is_ringed_and_its_share_is_said(rich: Path) -> None:
    answer = known(rich).answer
    lines = certificate_page.lines_of(answer, known(rich).question)
    marks = {(line.arm, mark.size): mark for line in lines for mark in line.marks}
    for selection in answer.references:
        chosen, size = max(selection.shares, key=selection.shares.__getitem__), selection.size
        assert [arm for (arm, at), mark in marks.items() if at == size and mark.ringed] == [chosen]
        assert marks[chosen, size].title.splitlines()[-1].startswith("reference in ")
    assert marks["sft", 64].title.splitlines()[2].startswith("5 seeds: ")
    assert "768 task tokens" in marks["sft", 64].title


@pytest.mark.e2e
def test_equal_certificates_give_equal_bytes_below_a_megabyte(rich: Path) -> None:
    first = certificate_page.write(rich).read_bytes()
    assert certificate_page.write(rich).read_bytes() == first
    assert len(first) < 1_000_000


def test_the_page_runs_nothing_and_asks_no_network(rich: Path) -> None:
    text = certificate_page.html({"certificate.json": known(rich)})
    assert not re.search(
        r"""(src|href)\s*=\s*["'](?!#)|https?:|url\((?!#)|@import"""
        r"|<(script|link|iframe|img|object)\b",
        text,
    )
    assert "default-src 'none'" in text


def test_user_text_is_inert(tmp_path: Path) -> None:
    odd = {"sft": f"{EVIL}sft", "tell": f"{EVIL}tell"}
    content = (
        {**line, "arm": odd[line["arm"]], **({"metric": EVIL} if "row" in line else {})}
        for line in lines()
    )
    design = Design(2, "first", {EVIL: 2}, (EVIL,), at_end=(AtEnd(EVIL, 16, "repeats", 2, 1, 2),))
    question = Question(odd["tell"], (odd["sft"],), (EVIL,), task=EVIL, design=design)
    chosen = (Chosen(EVIL, 16, 0, {EVIL: EVIL, "repeats": EVIL}), Chosen(EVIL, 32, 0, None))
    certified(tmp_path, content, question, Inputs(files={EVIL: EVIL}, hyperparameters=chosen))
    text = certificate_page.html({EVIL: known(tmp_path)})
    assert "<script" not in text.lower()
    assert text.count("&lt;script&gt;") > 40


def test_what_is_no_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no certificate\.json in it"):
        certificate_page.write(tmp_path)
    (tmp_path / "certificate.json").write_text('{"format": 1}')
    with pytest.raises(StoreError, match=r"not a certificate of format 3 \(found 1\)"):
        certificate_page.write(tmp_path)


# ---- run folders and commands


@pytest.mark.e2e
def test_a_runs_report_opens_with_its_certificate_in_place_of_claims(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, make(notes=("another note",)), predictions())
    assert 'class="claim' in run_report.write(folder, COMPARE).read_text()
    certified(folder, compared(), rich_question())
    text = run_report.write(folder, COMPARE).read_text()
    assert wording.headline(known(folder)) in text
    assert 'class="claim' not in text
    assert text.count(NOTE) == 1
    assert "another note" in text
    for name in (
        "c1-curves",
        "c1-rows",
        "c1-parts",
        "c1-effects",
        "c1-method",
        "scores",
        "training",
        "examples",
        "settings",
    ):
        assert text.count(f'id="{name}"') == 1
    assert text.index('id="c1-curves"') < text.index('id="scores"')


@pytest.mark.e2e
def test_each_task_of_a_run_has_its_certificate(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, make(tasks=("a", "b")), predictions())
    for task in ("b", "a"):
        certified(
            folder / "certificates" / task,
            lines(),
            Question("tell", ("sft",), ("quality",), task=task),
        )
    text = run_report.write(folder, COMPARE).read_text()
    assert re.findall(r'<h2 id="(c\d)-curves">(.*?): ', text) == [("c1", "a"), ("c2", "b")]
    assert "fulcrum verify certificates/b/certificate.json" in text
    ids = re.findall(r'\bid="(c\d-[^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_certify_writes_the_page_and_report_writes_it_anew(tmp_path: Path) -> None:
    file = save(tmp_path / "in.jsonl", lines())
    out = tmp_path / "out"
    assert f"report: {out / 'report.html'}" in done("certify", file, "--out", out)
    first = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    said = done("report", out)
    assert wording.headline(known(out)) in said
    assert f"report: {out / 'report.html'}" in said
    assert (out / "report.html").read_bytes() == first
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "report.html").write_text("mine")
    assert "report.html: exists already and is not overwritten" in refused(
        "certify", file, "--out", tmp_path / "full"
    )


# ---- what is drawn


@pytest.mark.parametrize(
    ("saving", "rows", "fewest", "most"),
    [
        ((2.0, 1.6, 3.2), 32, 20, 40),
        ((math.inf, math.inf, math.inf), 16, None, 16),
        ((math.inf, 2.0, math.inf), 16, None, 32),
        ((2.0, 0.0, math.inf), 32, None, None),
    ],
)
def test_the_reading_goes_no_further_than_what_was_measured(
    rich: Path,
    saving: tuple[float, float, float],
    rows: float,
    fewest: float | None,
    most: float | None,
) -> None:
    whole = known(rich).answer
    worth = replace(whole.saving, identifiable=True, rows=Factor(*saving, least=1.0, most=4.0))
    answer = replace(whole, saving=worth)
    reading = certificate_page.reading_of(answer, known(rich).question)
    assert reading is not None
    assert (reading.rows, reading.fewest, reading.most, reading.smallest) == (
        rows,
        fewest,
        most,
        16,
    )
    scores = {point.arm: point.score.estimate for point in answer.points if point.size == 64}
    assert reading.value == pytest.approx(scores["sft"])
    assert scores["tell"] < scores["sft"]


def test_a_part_without_an_interval_is_drawn_and_a_share_ends_at_0(rich: Path) -> None:
    whole = known(rich)
    effects = {effect.metric: effect for effect in whole.side_effects}
    first, second, *others = effects["leakage"].arms
    bare = replace(first, score=Interval(0.0, math.nan, math.nan))
    wide = replace(second, score=Interval(0.5, -0.5, 0.75))
    leakage = replace(effects["leakage"], arms=(bare, wide, *others))
    changed = replace(whole, side_effects=(leakage,))
    (shown,) = certificate_page.view_effects(changed)
    texts = [row["text"] for row in shown["plot"]["rows"]]
    assert {"0% (no interval)", "50% [0%, 75%]"} <= set(texts)
    ticks = re.findall(r">(−?[0-9.]+)</text>", shown["plot"]["svg"])
    assert ticks
    assert not any(tick.startswith("−") for tick in ticks)


def opened(browser: Any, path: Path, width: int = 1100, **media: str) -> None:
    """Open a page on a screen of this width."""
    features = [
        {"name": name.replace("_", "-"), "value": value}
        for name, value in media.items()
        if name != "kind"
    ]
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"media": media.get("kind", ""), "features": features}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


def visible(browser: Any, selector: str) -> list[Any]:
    return [
        element
        for element in browser.find_elements("css selector", selector)
        if element.is_displayed()
    ]


@pytest.fixture(scope="module")
def written(rich: Path) -> Path:
    return certificate_page.write(rich)


def test_it_opens_without_a_word_and_asks_for_nothing(
    browser: Any, written: Path, rich: Path
) -> None:
    browser.get_log("performance")
    opened(browser, written)
    assert browser.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [
        entry["params"]["request"]["url"]
        for entry in sent
        if entry["method"] == "Network.requestWillBeSent"
    ]
    assert asked == [written.as_uri()]
    assert browser.find_element("css selector", ".headline").text == wording.headline(known(rich))
    charts = visible(browser, ".panel .plot svg")
    assert len(charts) == 2
    assert all(chart.size["height"] > 300 for chart in charts)
    assert (
        len(visible(browser, ".forest svg")) == 5
    )  # two attributions, forgetting, leakage, dependency
    titles = browser.find_elements("css selector", ".plot.wide title")
    assert len(titles) == sum(len(answer.points) for answer in known(rich).answers)


def expected(rich: Path) -> str:
    """The NLL of tell at 64 rows as a reader should see it."""
    score = next(
        point.score
        for point in known(rich).answer.points
        if (point.arm, point.size) == ("tell", 64)
    )
    return f"NLL {score.estimate:.3f} [{score.low:.3f}, {score.high:.3f}]"


def test_a_mark_under_the_mouse_has_its_value_as_title(
    browser: Any, written: Path, rich: Path
) -> None:
    opened(browser, written)
    under = """
      const titles = [...document.querySelectorAll('.plot.wide title')];
      const mark = titles.find(t => t.textContent.startsWith('tell, 64 rows')).parentElement;
      mark.scrollIntoView({block: 'center'});
      const box = mark.getBoundingClientRect();
      const hit = document.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2);
      return hit.closest('g:has(> title)').querySelector('title').textContent.split('\\n')"""
    text = browser.execute_script(under)
    assert text[:2] == ["tell, 64 rows", expected(rich)]
    assert text[2].startswith("5 seeds: ")
    assert text[3] == "768 task tokens"


def test_no_text_of_a_plot_covers_another_sticks_out_or_is_too_small(
    browser: Any, written: Path
) -> None:
    faults = """
      const box = e => e.getBoundingClientRect();
      const cross = (a, b) => a.left < b.right - 1 && b.left < a.right - 1
        && a.top < b.bottom - 3 && b.top < a.bottom - 3;
      const found = [];
      for (const plot of [...document.querySelectorAll('.plot svg')].filter(p => box(p).width)) {
        const texts = [...plot.querySelectorAll('text')], field = box(plot);
        if (texts.length < 5) found.push('a plot without labels');
        texts.forEach((text, place) => {
          const own = box(text), name = text.textContent;
          if (own.right > field.right + 1 || own.left < field.left - 1)
            found.push(name + ' sticks out');
          if (own.height < 10) found.push(name + ' is too small');
          for (const other of texts.slice(place + 1))
            if (cross(own, box(other))) found.push(name + ' / ' + other.textContent);
        });
      }
      return found"""
    for width in (1100, 390):
        opened(browser, written, width)
        assert browser.execute_script(faults) == []


def test_a_phone_needs_no_sideways_scrolling(browser: Any, written: Path) -> None:
    opened(browser, written, 390)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert visible(browser, ".plot.wide") == []
    assert len(visible(browser, ".plot.narrow")) == 2
    wider = (
        "return [...document.querySelectorAll('.plot, .forest')].filter(p => p.scrollWidth > "
        "p.clientWidth).length"
    )
    assert browser.execute_script(wider) == 0


def test_dark_pages_are_dark(browser: Any, written: Path) -> None:
    lightness = (
        "return getComputedStyle(document.body)[arguments[0]].match(/\\d+/g)"
        ".slice(0, 3).reduce((a, b) => a + +b, 0) / 3"
    )
    for scheme in ("light", "dark"):
        opened(browser, written, prefers_color_scheme=scheme)
        paper, ink = (
            browser.execute_script(lightness, name) for name in ("backgroundColor", "color")
        )
        assert (paper < 60 and ink > 200) if scheme == "dark" else (paper > 240 and ink < 60)
        label = "return getComputedStyle(document.querySelector('.forest text')).fill"
        assert browser.execute_script(label) == (
            "rgb(230, 232, 234)" if scheme == "dark" else "rgb(34, 34, 34)"
        )


def test_on_paper_tables_stand_open_and_nothing_is_cut(browser: Any, written: Path) -> None:
    opened(browser, written, 720, kind="print", prefers_color_scheme="dark")
    assert (
        browser.execute_script(
            "return getComputedStyle(document.querySelector('.forest text')).fill"
        )
        == "rgb(34, 34, 34)"
    )
    assert len(visible(browser, ".plot.wide")) == 2
    tables = browser.find_elements("css selector", "details table")
    assert len(tables) == 4
    assert all(table.size["height"] > 40 for table in tables)
    assert browser.execute_script("return document.documentElement.scrollWidth") == 720
    wide = (
        "return [...document.querySelectorAll('.scroll')]"
        ".filter(s => s.firstElementChild.scrollWidth > s.clientWidth).length"
    )
    assert browser.execute_script(wide) == 0
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"paperWidth": 8.27, "paperHeight": 11.69})
    assert len(printed["data"]) > 50_000


def test_a_runs_whole_report_is_quiet_and_fits_a_phone(browser: Any, tmp_path: Path) -> None:
    folder = folder_with(tmp_path, make(), predictions())
    certified(folder, compared(0.0), rich_question())
    path = run_report.write(folder, COMPARE)
    assert path.stat().st_size < 1_000_000
    opened(browser, path, 390)
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth") == 390
    assert browser.find_element("css selector", ".badge").text.endswith("No gain shown")
