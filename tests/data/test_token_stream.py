"""Tokenised rows on disk: what `encode` gives, written once, mapped, made anew where damaged, done
without where impossible."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import encode, token_stream
from helpers.tiny import tiny_tokenizer


def rows(number: int = 600, word: str = "sort") -> tuple[Example, ...]:
    texts = [(f"{word} {k}", f"box {k % 7}") for k in range(number - 1)] + [("a <|im_end|> b", "c")]
    return tuple(Example((Message("user", a), Message("assistant", b)), a, a) for a, b in texts)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path))
    token_stream.tokenised.cache_clear()
    return tmp_path / "tokens"


def same(found, examples, form) -> None:
    assert len(found) == len(examples)
    for own, example in zip(found, examples, strict=True):
        expected = encode.encode(example, form, keep=False)
        np.testing.assert_array_equal(own.ids, expected.ids)
        np.testing.assert_array_equal(own.loss_mask, expected.loss_mask)
        assert (own.ids.dtype, own.loss_mask.dtype) == (
            expected.ids.dtype,
            expected.loss_mask.dtype,
        )


def test_many_rows_are_stored_once_and_mapped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    found = token_stream.tokenised(rows(), form)
    same(found, rows(), form)
    assert isinstance(found, token_stream.Stored)
    assert [row.ids.tolist() for row in found[2:4]] == [
        found[2].ids.tolist(),
        found[3].ids.tolist(),
    ]
    assert pa.total_allocated_bytes() < 10_000  # the file's pages, not a copy of them
    (file,) = cache.iterdir()
    assert form.encoded == {}

    def fails(*_: object) -> None:
        raise AssertionError("tokenised again")

    token_stream.tokenised.cache_clear()  # as in another process
    monkeypatch.setattr(encode, "encode_many", fails)
    again = token_stream.tokenised(rows(), encode.make_format(tiny_tokenizer(), None))
    assert [row.ids.tolist() for row in again] == [row.ids.tolist() for row in found]
    assert list(cache.iterdir()) == [file]


def test_other_rows_templates_and_anchors_have_files_of_their_own(cache: Path) -> None:
    plain, anchored = (
        encode.make_format(tiny_tokenizer(), anchor) for anchor in (None, Anchor("Sort it."))
    )
    other = tiny_tokenizer()
    other.add_tokens(["box"])
    grown = encode.make_format(other, None)
    renamed = tiny_tokenizer()
    renamed.bos_token = "<pad>"  # not in the vocabulary's own file, and templates may write it
    roles = encode.make_format(renamed, None)
    for examples, form in (
        (rows(), plain),
        (rows(word="put"), plain),
        (rows(), anchored),
        (rows(), grown),
        (rows(), roles),
    ):
        same(token_stream.tokenised(examples, form), examples, form)
    assert len(list(cache.iterdir())) == 5


def test_a_template_that_writes_the_date_is_not_stored(cache: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% if strftime_now is defined %}{{ strftime_now('%d') }}{% endif %}"
        + tokenizer.chat_template
    )
    form = encode.make_format(tokenizer, None)
    same(token_stream.tokenised(rows(), form), rows(), form)
    assert not cache.exists()


@pytest.mark.parametrize("damage", [b"", b"ARROW1 and then nothing"])
def test_a_damaged_file_is_made_anew(cache: Path, damage: bytes) -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    token_stream.tokenised(rows(), form)
    (file,) = cache.iterdir()
    file.write_bytes(damage)
    token_stream.tokenised.cache_clear()
    same(token_stream.tokenised(rows(), form), rows(), form)


def test_few_rows_need_no_file_and_a_cache_that_cannot_be_written_is_done_without(
    cache: Path,
) -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    same(token_stream.tokenised(rows(20), form), rows(20), form)
    assert not cache.exists()
    cache.write_text("a file where the folder would be")
    same(token_stream.tokenised(rows(), form), rows(), form)


def test_what_was_not_used_for_longest_goes_first(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = encode.make_format(tiny_tokenizer(), None)
    token_stream.tokenised(rows(word="old"), form)
    (old,) = cache.iterdir()
    monkeypatch.setattr(token_stream, "KEPT_BYTES", int(1.5 * old.stat().st_size))
    token_stream.tokenised(rows(word="new"), form)
    (left,) = cache.iterdir()
    assert left != old
