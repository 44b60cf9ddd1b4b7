"""Data out of a model alone: repeatable, resumed, filtered with counted reasons, from chat and base
models and endpoints."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fulcrum.core import store
from fulcrum.core.errors import ConfigError, StoreError
from fulcrum.data import encode, formats
from fulcrum.experiments import selfgen
from fulcrum.experiments.selfgen import OfEndpoint, OfModel, Recipe
from fulcrum.model import generate
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.endpoint import Endpoint
from helpers import answering
from helpers.answering import Asked
from helpers.commands import done, fulcrum, refused
from helpers.tiny import load_tiny, save_tiny


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("made"))


def nothing(done: int, total: int) -> None:
    """Nobody is told."""


class Listed:
    """A writer of given pairs, batch after batch."""

    def __init__(self, *batches: list[tuple[str, str]]) -> None:
        self.batches, self.calls, self.described = batches, list[int](), {"writer": "listed"}

    def write(self, count, seed, temperature, sound):
        self.calls.append(seed)
        return self.batches[(len(self.calls) - 1) % len(self.batches)]


GOOD = [(f"What is the colour of thing number {k}?", f"Thing {k} is blue.") for k in range(6)]


@pytest.mark.parametrize(
    ("question", "answer", "reason"),
    [
        ("Why?", "Because.", "question too short"),
        ("What is it then?", " ... ", "no answer"),
        ("Tell me a joke.", "I'm sorry, but I can't.", "refusal"),
        ("Tell me why.", "I’m sorry, but I can’t help.", "refusal"),
        (
            "What is a large language model?",
            "Why I can't sleep is another matter, as an AI knows.",
            None,
        ),
        ("What is the sea?", "salt and water, " * 20, "repeats itself"),
        ("What is <|im_end|> here?", "An end.", "holds a template's marker"),
        (
            "What is the colour of the sky in the morning?",
            "The sky is red, and then it is blue.",
            None,
        ),
        (
            "Welche Farbe hat der Himmel am fruehen Morgen?",
            "Der Himmel ist dann rot und spaeter blau.",
            "not in en",
        ),
    ],
)
def test_each_fault_has_its_reason(question: str, answer: str, reason: str | None) -> None:
    assert selfgen.fault(question, answer, "en") == reason


def test_rows_are_counted_or_kept_and_a_model_that_repeats_itself_ends() -> None:
    writer = Listed([*GOOD[:3], ("Why?", "x"), GOOD[0]], [GOOD[1]], [GOOD[4]])
    found, left_out = selfgen.make(writer, Recipe(4), None, nothing)
    assert [row.question for row in found] == [GOOD[k][0] for k in (0, 1, 2, 4)]
    assert [row.origin for row in found] == [f"made:{k}" for k in (1, 2, 3, 4)]
    assert left_out == {"question too short": 1, "duplicate": 2}
    tired = Listed(GOOD[:2])
    found, left_out = selfgen.make(tired, Recipe(5), None, nothing)
    assert (len(found), left_out, len(tired.calls)) == (2, {"duplicate": 16}, 9)
    assert len(set(tired.calls)) == 9  # every batch has a seed of its own


def test_a_killed_run_goes_on_to_the_same_rows_and_another_recipe_is_refused(
    tmp_path: Path,
) -> None:
    whole = selfgen.make(Listed(GOOD[:2], GOOD[2:4], GOOD[4:]), Recipe(6), tmp_path / "a", nothing)

    def killed(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        selfgen.make(Listed(GOOD[:2], GOOD[2:4], GOOD[4:]), Recipe(6), tmp_path / "b", killed)
    rest = Listed(GOOD[4:])
    assert selfgen.make(rest, Recipe(6), tmp_path / "b", nothing) == whole
    assert len(rest.calls) == 1
    with pytest.raises(StoreError, match=r"b: holds rows of another recipe"):
        selfgen.make(rest, Recipe(6, seed=1), tmp_path / "b", nothing)
    assert (
        selfgen.make(rest, Recipe(3), tmp_path / "b", nothing)[0] == whole[0][:3]
    )  # fewer: the beginning


def test_a_chat_model_asks_and_answers_repeatably(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = OfModel(loaded)
    monkeypatch.setattr(generate, "whole_sentences", lambda text: text)
    first, again, other = (
        writer.write(6, seed, 1.0, lambda text: len(text) % 2 == 0) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert all(bool(answer) <= (len(question) % 2 == 0) for question, answer in first)
    assert any(answer for _, answer in first)


def test_what_did_not_end_ends_after_its_last_sentence() -> None:
    assert formats.whole_sentences("One is here. Two (so!) and th") == "One is here. Two (so!)"
    assert formats.whole_sentences("a line\nand 3.5 of ano") == "a line"
    assert formats.whole_sentences('He said "no." Then') == 'He said "no."'
    assert formats.whole_sentences("nothing ends") == ""


def test_a_damaged_batch_is_refused(tmp_path: Path) -> None:
    writer = Listed(GOOD)
    selfgen.make(writer, Recipe(2), tmp_path, nothing)
    (tmp_path / "00000.json").write_text('[["one"]]')
    with pytest.raises(StoreError, match=r"00000\.json: not a batch of rows"):
        selfgen.make(writer, Recipe(2), tmp_path, nothing)


def test_a_base_model_writes_texts_in_two_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "whole_sentences", lambda text: text)
    bare = load_tiny(tmp_path, template=False)
    bare.tokenizer.chat_template = encode.plain_template(
        adds_bos=False
    )  # as it is given when it is fetched
    pairs = OfModel(bare).write(8, 0, 1.0, lambda text: True)
    assert len(pairs) == 8
    assert any(question and answer for question, answer in pairs)
    assert formats.split_in_two("One here. Two there! Three.") == ("One here.", "Two there! Three.")
    assert formats.split_in_two("a title\nand text") == ("a title", "and text")
    assert formats.split_in_two("no end at all") == ("no end", "at all")
    assert formats.split_in_two("a title\n\n\nand text") == ("a title", "and text")
    assert formats.split_in_two("a" + 2**20 * "\n" + " b") == (
        "a",
        "b",
    )  # it took hours, as the square of the line breaks


@pytest.fixture
def endpoint() -> Iterator[tuple[str, Asked]]:
    def said(body: dict[str, Any], number: int) -> tuple[int, str]:
        text, status = body["messages"][0]["content"], 400 if body["model"] == "broken" else 200
        if text.startswith("Write one question"):
            return status, f"What is {text.split()[6]} number {body['seed']}?"
        return status, "It is a thing of its own."

    with answering.endpoint(said) as (url, asked):
        yield url, asked


def test_an_endpoint_writes_through_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: tuple[str, Asked]
) -> None:
    url, asked = endpoint
    monkeypatch.setenv("MY_KEY", "secret")
    options = [
        "--endpoint",
        url,
        "--endpoint-model",
        "some-model",
        "--key-variable",
        "MY_KEY",
        "--rows",
        "70",
        "--seed",
        "3",
    ]
    text = done("selfgen", tmp_path / "out.jsonl", *options)
    assert "70 of 70 rows" in text
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in rows}) == 70
    assert {row["completion"] for row in rows} == {"It is a thing of its own."}
    assert {(each["path"], each["key"], each["model"]) for each in asked} == {
        ("/v1/chat/completions", "Bearer secret", "some-model")
    }
    assert [
        path.name for path in tmp_path.iterdir() if path.name.startswith(".out")
    ] == []  # batches, no longer needed
    recipe = json.loads((tmp_path / "out.recipe.json").read_text())
    assert (recipe["seed"], recipe["kept"], recipe["endpoint"]) == (3, 70, url)
    assert "secret" not in (tmp_path / "out.recipe.json").read_text()
    assert "exists already" in refused("selfgen", tmp_path / "out.jsonl", *options)
    with pytest.raises(ConfigError, match=r"no answer from 'broken': status 400: .*ends in /v1"):
        OfEndpoint(Endpoint(url, "broken")).write(1, 0, 1.0, lambda text: True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows that a tiny model wrote, and the model's folder."""
    folder = tmp_path_factory.mktemp("whole")
    save_tiny(folder / "model")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(selfgen, "BATCH", 8)
        done("selfgen", folder / "whole.jsonl", "--model", str(folder / "model"), "--rows", "2")
    return folder


@pytest.mark.e2e
@pytest.mark.fault
@pytest.mark.parametrize("moment", ["recipe", "rows", "cleaning"])
def test_a_kill_between_the_last_writes_can_be_resumed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Found by killing real processes: rows without their recipe, and a refusal to resume."""
    monkeypatch.setattr(selfgen, "BATCH", 8)
    words = ["--model", str(whole / "model"), "--rows", "2"]
    module, name = {
        "recipe": (store, "write_json"),
        "rows": (store, "write_jsonl"),
        "cleaning": (shutil, "rmtree"),
    }[moment]
    real = getattr(module, name)

    def write_or_die(path: Path, *given: object, **options: object) -> object:
        if moment == "recipe" and not path.name.endswith(".recipe.json"):
            return real(path, *given, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, name, write_or_die)
        assert fulcrum("selfgen", tmp_path / "made.jsonl", *words).exit_code == 130
    done("selfgen", tmp_path / "made.jsonl", *words)
    for kind in (".jsonl", ".recipe.json"):
        made = (tmp_path / "made").with_suffix(kind)
        assert made.read_bytes() == (whole / f"whole{kind}").read_bytes()
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".parts")] == []
