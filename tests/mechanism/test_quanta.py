"""Items, the losses of both arms along the way, and the record of `quanta`, on a tiny model."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulcrum.core import store
from fulcrum.core.errors import DataError
from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import encode
from fulcrum.mechanism import quanta_report
from fulcrum.mechanism.quanta import draw, run_quanta
from fulcrum.model import adapter, base_model, generate
from fulcrum.report import run_report
from fulcrum.training import gradients
from helpers.runs import KillAfter, Killed
from helpers.tiny import comparison_settings, load_tiny, save_task, tiny_settings

ANCHOR = Anchor("Name it.")


def example(question: str, answer: str, origin: str) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), origin, origin)


ROWS = [(example(f"colour {k}", "red and blue", f"t:{k}"), ANCHOR) for k in range(8)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_task(tmp_path_factory.mktemp("quanta"), 12, 24)


def settings(place: Path, output: Path, **changes: Any) -> Any:
    asked = {
        "quanta": {"items": 60, "repeats": 2, "points": 2, "most": 6},
        "mix": {"general_per_task": 1},
        **changes,
    }
    return comparison_settings(place, output, **asked)


# Items.


def test_an_item_is_its_row_up_to_one_token_with_that_token_as_only_target(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    found = draw(ROWS, loaded.tokenizer, "tokens", 10_000, general=False, seed=0)
    whole = encode.final_answer(ROWS[0][0], encode.make_format(loaded.tokenizer, ANCHOR))
    own = [item for item in found if item.origin == "t:0"]
    assert len(own) == whole.n_loss  # every answer token, the end of the turn among them
    assert all(item.tokens.n_loss == 1 and item.tokens.loss_mask[-1] for item in own)
    assert all((item.tokens.ids == whole.ids[: len(item.tokens)]).all() for item in own)
    assert "".join(item.text for item in own) == "red and blue<|im_end|>"
    assert own[0].before.endswith("Name it.\n\ncolour 0<|im_end|>\n<|im_start|>assistant\n")
    assert own[-1].after == ""


def test_losses_of_items_add_up_to_their_rows(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    found = draw(ROWS, loaded.tokenizer, "tokens", 10_000, general=False, seed=0)
    single = generate.nats(loaded, [item.tokens for item in found])[0]
    whole = generate.nats(
        loaded,
        [encode.final_answer(row, encode.make_format(loaded.tokenizer, ANCHOR)) for row, _ in ROWS],
    )[0]
    for k, (row, _) in enumerate(ROWS):
        assert sum(
            single[i] for i, item in enumerate(found) if item.origin == row.origin
        ) == pytest.approx(whole[k], rel=1e-5)


def test_whole_answers_are_items_too(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    many = [
        (replace(row, origin=f"{row.origin}-{k}"), anchor) for k in range(3) for row, anchor in ROWS
    ]
    found = draw(many, loaded.tokenizer, "rows", 22, general=True, seed=1)
    assert len(found) == len({item.key for item in found}) == 22
    assert {item.text for item in found} == {"red and blue<|im_end|>"}
    assert all(item.general and item.tokens.n_loss > 1 for item in found)


def test_the_draw_is_the_seeds_and_too_few_are_refused(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    keys = [
        [i.key for i in draw(ROWS, loaded.tokenizer, "tokens", 30, general=False, seed=s)]
        for s in (0, 0, 1)
    ]
    assert keys[0] == keys[1] != keys[2]
    with pytest.raises(
        DataError,
        match=r"8 rows in the answers of 8 test rows are too few .*task.test.*unit: tokens",
    ):
        draw(ROWS, loaded.tokenizer, "rows", 30, general=False, seed=0)


# The run.


@pytest.fixture(scope="module")
def done(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("done") / "run"
    run_quanta(settings(place, output))
    return output


def test_every_item_has_its_losses_in_both_arms_along_the_way(done: Path, place: Path) -> None:
    record = quanta_report.read(done)
    assert record["arms"] == ["sft_anchor", "tell"]
    assert record["steps"] == {
        "sft_anchor": [3, 6],
        "tell": [6, 12],
    }  # 12 rows twice in batches of 4; as many general ones
    assert [item["general"] for item in record["items"]] == [False] * 30 + [True] * 30
    loaded = base_model.load(str(place / "model"), settings(place, done).train)
    task, general = record["items"][0], record["items"][-1]
    assert task["origin"].endswith("test.jsonl:" + task["origin"].rpartition(":")[2])
    assert "pool.jsonl" in general["origin"]
    assert np.isfinite(
        [value for item in record["items"] for own in item["losses"].values() for value in own]
    ).all()
    tested = run_report.load(done)["arms"]
    assert [(arm["arm"], arm["size"], arm["training"]["steps"]) for arm in tested] == [
        ("sft_anchor", 12, 6),
        ("tell", 12, 12),
    ]
    form = encode.make_format(loaded.tokenizer, None)
    assert form.tokenizer.decode(loaded.tokenizer(task["text"])["input_ids"]) == task["text"]


def test_general_items_are_of_rows_that_no_arm_was_trained_on(done: Path) -> None:
    record, results = quanta_report.read(done), run_report.load(done)
    held_out = {item["origin"] for item in record["items"] if item["general"]}
    assert len(held_out) <= results["settings"]["eval"]["general_rows"]
    lines = [json.loads(line) for line in (done / "predictions.jsonl").read_text().splitlines()]
    assert held_out <= {line["origin"] for line in lines if line["task"] == "general: pool"}


@pytest.mark.e2e
def test_a_killed_run_ends_in_the_same_record(done: Path, place: Path, tmp_path: Path) -> None:
    changed = settings(
        place, tmp_path / "run", train={**settings(place, done).train.model_dump(), "save_every": 2}
    )
    with pytest.raises(Killed):
        run_quanta(changed, progress=KillAfter(9))  # in the second arm, beyond its first look
    run_quanta(changed, resume=True)
    before, after = (
        json.loads((folder / store.QUANTA).read_text()) for folder in (done, tmp_path / "run")
    )
    for record in (before, after):
        record.pop("gradient_seconds")
    assert before == after


def test_random_weights_have_no_skills_and_the_page_says_so(done: Path) -> None:
    record = quanta_report.read(done)
    text = (done / quanta_report.PAGE).read_text()
    if record["clusters"]["k"] == 0:
        assert "No stable clusters" in text
        assert record["test"] is None
    assert "<script" not in text


def test_items_without_a_gradient_are_left_out_and_counted(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gradients.sketch_in_blocks

    def sure_of_three(*given: Any, **named: Any) -> Any:
        found, seconds = real(*given, **named)
        found[[0, 31, 59]] = 0
        return found, seconds

    monkeypatch.setattr(gradients, "sketch_in_blocks", sure_of_three)
    run_quanta(settings(place, tmp_path / "run"))
    record = quanta_report.read(tmp_path / "run")
    assert record["without_gradient"] == 3
    assert [item["general"] for item in record["items"]] == [False] * 29 + [True] * 28
    assert (
        "3 more have a gradient of zero and are left out"
        in (tmp_path / "run" / quanta_report.PAGE).read_text()
    )


def test_few_items_make_few_clusters_and_no_error(place: Path, tmp_path: Path) -> None:
    run_quanta(settings(place, tmp_path / "run", quanta={"items": 40, "repeats": 1, "points": 1}))
    record = quanta_report.read(tmp_path / "run")
    assert len(record["items"]) == 40
    assert max(one["k"] for one in record["clusters"]["candidates"]) <= 19


def test_gradients_of_items_are_their_rows(tmp_path: Path) -> None:
    """The gradient of a row's summed loss is the sum of its tokens' gradients, sketched too."""
    loaded = load_tiny(tmp_path)
    adapter.new_adapter(loaded, settings(tmp_path, tmp_path).train, 0)
    row = ROWS[0]
    own = [
        item.tokens
        for item in draw([row] * 8, loaded.tokenizer, "tokens", 10_000, general=False, seed=0)
    ]
    whole = encode.final_answer(row[0], encode.make_format(loaded.tokenizer, ANCHOR))
    options = gradients.SketchOptions(seed=3)
    single = gradients.sketch(loaded, own[: whole.n_loss], options)
    adapter.new_adapter(loaded, settings(tmp_path, tmp_path).train, 0)
    mean = gradients.sketch(loaded, [whole], options)[0]
    np.testing.assert_allclose(
        single.sum(axis=0) / whole.n_loss, mean, atol=1e-4 * np.abs(mean).max()
    )


def test_two_items_of_one_key_have_a_sketch_each(tmp_path: Path) -> None:
    """Two tasks that read other columns of one file name their rows alike."""
    loaded = load_tiny(tmp_path)
    form = encode.make_format(loaded.tokenizer, None)
    first, second = (encode.encode(row, form) for row, _ in ROWS[:2])
    sketches, _ = gradients.sketch_in_blocks(
        loaded,
        [("rows.jsonl:1", first), ("rows.jsonl:1", second)],
        gradients.SketchOptions(256, seed=0, normalise=True),
        put_adapter=lambda: adapter.new_adapter(loaded, tiny_settings(), 0),
        folder=tmp_path / "stored",
        count=lambda done, total: None,
    )
    assert len(sketches) == 2
    assert not np.array_equal(sketches[0], sketches[1])
