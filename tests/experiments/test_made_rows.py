"""General rows that the base model makes itself: its own answers, and questions from nothing.

On a tiny model.
"""

from pathlib import Path

import pytest

from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.core.types import Example, Message
from fulcrum.data import encode
from fulcrum.experiments import made_rows, selfgen
from fulcrum.experiments.compare import run_comparison
from fulcrum.model import generate
from fulcrum.model.base_model import LoadedModel
from helpers.tiny import WORDS, comparison_settings, load_tiny, save_task


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_tiny(tmp_path_factory.mktemp("made"))


def rows() -> list[Example]:
    return [
        Example((Message("user", f"say {word}"), Message("assistant", word)), word, f"f:{word}")
        for word in WORDS
    ]


def nothing(done: int, total: int) -> None:
    """Nobody is told."""


@pytest.mark.e2e
def test_own_answers_are_the_models_greedy_ones_to_the_same_prompts(loaded: LoadedModel) -> None:
    found = made_rows.own_answers(loaded, rows(), 4096, nothing)
    form = encode.make_format(loaded.tokenizer, None)
    for row in found:
        prompt = encode.prompt_ids(row.prompt, form)
        (answer,) = generate.generate(
            loaded, [prompt], form, max_new_tokens=made_rows.ANSWER_TOKENS, batch_tokens=4096
        )
        assert row.answer == answer != ""
    given = {row.origin: row for row in rows()}
    assert all(
        (row.prompt, row.group) == (given[row.origin].prompt, given[row.origin].group)
        for row in found
    )


def test_what_stands_before_a_users_words(loaded: LoadedModel) -> None:
    form = encode.make_format(loaded.tokenizer, None)
    assert loaded.tokenizer.decode(encode.opening_ids(form)) == "<|im_start|>user\n"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    compare = {"arms": ["sft", "placebo_own_answers", "selfgen"], "folds": 2, "sft_epochs": [1]}
    mix = {"general_per_task": 1, "repeats": 1}
    return comparison_settings(
        save_task(tmp_path, 8, 4), tmp_path / "out", compare=compare, mix=mix
    )


@pytest.mark.e2e
def test_arms_train_on_made_rows_which_are_made_once(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A random model writes nothing that would be kept.
    monkeypatch.setattr(
        selfgen,
        "fault",
        lambda question, answer, language: None if question and answer != "" else "empty",
    )
    found = {arm.arm: arm for arm in run_comparison(settings).arms}
    out = Path(settings.output_dir)
    for name in ("placebo_own_answers", "selfgen"):
        made = store.read_json(out / "general" / f"{name}-seed0.json")
        assert 1 <= found[name].training.share.general_examples <= min(len(made["rows"]), 8)
    assert all(
        row["origin"].startswith("made:")
        for row in store.read_json(out / "general" / "selfgen-seed0.json")["rows"]
    )
    assert list(
        (out / "general" / "selfgen-seed0").glob("0*.json")
    )  # batches, from which a killed run goes on
    for name in ("own_answers", "from_nothing"):
        monkeypatch.setattr(made_rows, name, lambda *given: pytest.fail("made again"))
    run_comparison(settings, resume=True)
    (out / "general" / "selfgen-seed0.json").write_text('[{"origin": 1}]')
    with pytest.raises(StoreError, match=r"selfgen-seed0\.json: not the rows that were made"):
        run_comparison(settings, resume=True)
