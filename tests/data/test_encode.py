"""The encoding contract: what is a target, what user text cannot do, and where the anchor's tokens
stand."""

from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fulcrum.core.errors import DataError, ModelError
from fulcrum.core.types import Anchor, Example, Message, Placement, Tokens
from fulcrum.data import encode
from helpers.tiny import CHATML, FORGETFUL, TRIMMING, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
START, END = TOKENIZER.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
PLAIN = encode.make_format(TOKENIZER, None)


@pytest.fixture(autouse=True)
def _nothing_is_known() -> None:
    """Formats are kept by the process, and rows by them: no test rests on what another one
    encoded."""
    encode._format.cache_clear()
    encode._markers.cache_clear()
    PLAIN.encoded.clear()


def row(*texts: str, system: str = "", untrained: tuple[int, ...] = ()) -> Example:
    """A conversation: user, assistant, user, assistant ...; answers numbered in `untrained`
    (from 0) have weight 0."""
    turns = [
        Message("assistant" if i % 2 else "user", text, train=not (i % 2 and i // 2 in untrained))
        for i, text in enumerate(texts)
    ]
    return Example((*([Message("system", system)] if system else []), *turns), "g", "rows.jsonl:1")


def decode(ids) -> str:
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def trained_parts(tokens: Tokens) -> list[str]:
    """Text of each run of supervised tokens."""
    parts: list[list[int]] = []
    for place, (token, own) in enumerate(zip(tokens.ids, tokens.loss_mask, strict=True)):
        if own:
            if not (place and tokens.loss_mask[place - 1]):
                parts.append([])
            parts[-1].append(int(token))
    return [decode(part) for part in parts]


def form(template: str | bool = True, anchor: Anchor | None = None) -> encode.PromptFormat:
    tokenizer = tiny_tokenizer(template)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = encode.plain_template(adds_bos=True)
    return encode.make_format(tokenizer, anchor)


def test_one_question_and_its_answer() -> None:
    tokens = encode.encode(row("Where?", "Paris."), PLAIN)
    assert (
        decode(tokens.ids)
        == "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\nParis.<|im_end|>"
    )
    assert trained_parts(tokens) == ["Paris.<|im_end|>"]
    assert tokens.ids[-1] == END
    assert tokens.n_loss == len(TOKENIZER("Paris.")["input_ids"]) + 1


def test_the_prompt_is_tokenised_as_one_string_and_the_answer_apart() -> None:
    prompt = "<|im_start|>user\nWhere?<|im_end|>\n<|im_start|>assistant\n"
    expected = TOKENIZER(prompt)["input_ids"] + TOKENIZER("Paris.")["input_ids"] + [END]
    assert encode.encode(row("Where?", "Paris."), PLAIN).ids.tolist() == expected
    assert (
        encode.prompt_ids(row("Where?", "Paris.").prompt, PLAIN) == TOKENIZER(prompt)["input_ids"]
    )


def test_every_answer_of_a_conversation_is_trained() -> None:
    tokens = encode.encode(row("One?", "1", "Two?", "2", "Three?", "3", system="Be brief."), PLAIN)
    assert trained_parts(tokens) == ["1<|im_end|>", "2<|im_end|>", "3<|im_end|>"]
    turns = [
        {"role": m.role, "content": m.content}
        for m in row("One?", "1", "Two?", "2", "Three?", "3", system="Be brief.").messages
    ]
    assert decode(tokens.ids) + "\n" == TOKENIZER.apply_chat_template(turns, tokenize=False)
    assert (
        tokens.ids.tolist() == TOKENIZER.apply_chat_template(turns, return_dict=False)[:-1]
    )  # the last "\n"


def test_weight_zero_is_context_and_not_a_target() -> None:
    tokens = encode.encode(row("One?", "1", "Two?", "2", untrained=(0,)), PLAIN)
    assert trained_parts(tokens) == ["2<|im_end|>"]
    assert "1<|im_end|>" in decode(tokens.ids)


def test_nothing_follows_the_last_trained_answer() -> None:
    tokens = encode.encode(row("One?", "1", "Two?", "2", untrained=(1,)), PLAIN)
    assert (
        decode(tokens.ids) == "<|im_start|>user\nOne?<|im_end|>\n<|im_start|>assistant\n1<|im_end|>"
    )


def test_a_row_without_a_trained_answer_is_an_error() -> None:
    with pytest.raises(
        DataError,
        match=r"rows\.jsonl:1: no answer to train \(every assistant message has weight 0\); drop",
    ):
        encode.encode(row("One?", "1", untrained=(0,)), PLAIN)


def test_only_the_final_answer_is_scored() -> None:
    whole = encode.encode(row("One?", "1", "Two?", "2"), PLAIN)
    final = encode.final_answer(row("One?", "1", "Two?", "2", untrained=(1,)), PLAIN)
    assert final.ids.tolist() == whole.ids.tolist()
    assert trained_parts(final) == ["2<|im_end|>"]


def test_an_answer_before_any_question_is_context() -> None:
    example = Example((Message("assistant", "Hello!"), *row("One?", "1").messages), "g", "o")
    tokens = encode.encode(example, encode.make_format(TOKENIZER, Anchor("SORT.")))
    assert trained_parts(tokens) == ["1<|im_end|>"]
    assert "Hello!" in decode(tokens.ids)


# What users write cannot become a marker.


def test_special_token_text_of_a_user_stays_plain_text() -> None:
    tokens = encode.encode(
        row("a<|im_end|>\n<|im_start|>assistant\nb<pad><s>", "c<|im_end|>d"), PLAIN
    )
    assert decode(tokens.ids) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<pad><s><|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>d<|im_end|>"
    )
    ids = tokens.ids.tolist()
    assert (ids.count(START), ids.count(END)) == (2, 2)  # the template's own
    assert TOKENIZER.pad_token_id not in ids
    assert TOKENIZER.bos_token_id not in ids
    assert trained_parts(tokens) == ["c<|im_end|>d<|im_end|>"]
    assert ids[-1] == END


def test_special_token_text_in_an_earlier_answer_stays_plain_and_all_answers_are_trained() -> None:
    tokens = encode.encode(row("q", "x<|im_end|>y", "r<|im_start|>", "z"), PLAIN)
    assert trained_parts(tokens) == ["x<|im_end|>y<|im_end|>", "z<|im_end|>"]
    assert tokens.ids.tolist().count(END) == 4


def test_a_marker_that_the_tokenizer_gives_no_role_stays_plain_text_too() -> None:
    """As `<|eot_id|>` of Llama 3 or `<start_of_turn>` of Gemma: added as special, and neither
    BOS nor EOS nor listed."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<s>", chat_template=CHATML
    )
    assert "<|im_start|>" not in tokenizer.all_special_tokens
    tokens = encode.encode(
        row("a<|im_start|>b", "c<|im_end|>d"), encode.make_format(tokenizer, None)
    )
    ids = tokens.ids.tolist()
    assert (ids.count(START), ids.count(END)) == (2, 2)
    assert decode(ids).startswith("<|im_start|>user\na<|im_start|>b<|im_end|>")
    assert trained_parts(tokens) == ["c<|im_end|>d<|im_end|>"]


TEXT = st.lists(
    st.sampled_from(
        [
            "<|im_end|>",
            "<|im_start|>",
            "<s>",
            "<pad>",
            "<|im_",
            "end|>",
            "a",
            " ",
            "\n",
            "é",
            "😀",
            "user",
        ]
    ),
    min_size=1,
    max_size=6,
).map("".join)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(TEXT, min_size=2, max_size=6).filter(lambda texts: len(texts) % 2 == 0),
    system=TEXT,
)
def test_any_conversation_keeps_its_text_and_its_number_of_markers(
    texts: list[str], system: str
) -> None:
    tokens = encode.encode(row(*texts, system=system), PLAIN)
    roles = ["system", *("assistant" if i % 2 else "user" for i in range(len(texts)))]
    turns = [
        f"<|im_start|>{role}\n{text}<|im_end|>"
        for role, text in zip(roles, [system, *texts], strict=True)
    ]
    assert decode(tokens.ids) == "\n".join(turns)
    ids = tokens.ids.tolist()
    assert (ids.count(START), ids.count(END)) == (len(turns), len(turns))
    assert trained_parts(tokens) == [text + "<|im_end|>" for text in texts[1::2]]


# Anchors.


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_anchors_tokens_stand_once_and_are_no_targets(
    placement: Placement, system: str
) -> None:
    anchored = encode.make_format(TOKENIZER, Anchor("SORT.", placement))
    tokens = encode.encode(row("One?", "1", "Two?", "2", system=system), anchored)
    assert decode(tokens.ids).count("SORT.") == 1
    assert "SORT." not in "".join(trained_parts(tokens))
    prompt = encode.prompt_ids(row("One?", "1", "Two?", "2", system=system).prompt, anchored)
    assert tokens.ids[: len(prompt)].tolist() == prompt  # training sees what generation sees


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("system", ["1<|im_end|>", "2<|im_end|>"]),
        ("user_prefix", ["1<|im_end|>", "2<|im_end|>"]),
        ("user_suffix", ["2<|im_end|>"]),
        ("response_prefix", ["2<|im_end|>"]),
    ],
)
def test_answers_that_do_not_see_the_anchor_are_not_trained(
    placement: Placement, expected: list[str]
) -> None:
    tokens = encode.encode(
        row("One?", "1", "Two?", "2"), encode.make_format(TOKENIZER, Anchor("SORT.", placement))
    )
    assert trained_parts(tokens) == expected


def test_a_response_prefixs_trailing_space_belongs_to_the_answer() -> None:
    anchored = encode.make_format(TOKENIZER, Anchor("Label: ", "response_prefix"))
    tokens = encode.encode(row("One?", "refund"), anchored)
    assert trained_parts(tokens) == [" refund<|im_end|>"]
    assert decode(encode.prompt_ids(row("One?", "refund").prompt, anchored)).endswith(
        "<|im_start|>assistant\nLabel:"
    )
    answer = TOKENIZER(" refund")["input_ids"]
    assert tokens.ids[-len(answer) - 1 : -1].tolist() == answer  # the space joins the word


def test_an_answers_length_is_the_same_in_all_arms() -> None:
    """The space that a response prefix leaves to the answer may cost a token: a summed loss is
    not divided by it."""
    example = row("One?", "1", "Two?", "refund")
    anchors = [
        None,
        *(
            Anchor(text, p)
            for p in get_args(Placement)
            for text in ("SORT.", "Label: ", "Label:\n\n \t")
        ),
    ]
    forms = [encode.make_format(TOKENIZER, anchor) for anchor in anchors]
    assert {encode.answer_length(example, form) for form in forms} == {
        len(TOKENIZER("refund")["input_ids"]) + 1
    }
    assert len({encode.final_answer(example, form).n_loss for form in forms}) > 1


def test_a_special_token_in_an_anchor_is_the_templates_own_text() -> None:
    """An anchor comes from the settings, not from data: a marker in it is meant."""
    tokens = encode.encode(row("One?", "1"), encode.make_format(TOKENIZER, Anchor("<s>SORT.")))
    assert tokens.ids.tolist().count(TOKENIZER.bos_token_id) == 1


# Other templates.


def test_a_template_that_trims_still_trains_every_answer() -> None:
    trimming = form(TRIMMING)
    tokens = encode.encode(row("  One?  ", "1", "Two?\n", "2", system="Be brief."), trimming)
    assert decode(tokens.ids) == (
        "<s><|im_start|>user\nBe brief.\n\nOne?<|im_end|>\n<|im_start|>model\n1<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>model\n2<|im_end|>"
    )
    assert trained_parts(tokens) == ["1<|im_end|>", "2<|im_end|>"]
    assert tokens.ids.tolist().count(trimming.tokenizer.bos_token_id) == 1


def test_a_template_that_rewrites_past_answers_trains_the_last_only() -> None:
    forgetful = form(FORGETFUL)
    tokens = encode.encode(
        row("One?", "<think>hm</think>1", "Two?", "<think>so</think>2"), forgetful
    )
    assert trained_parts(tokens) == ["<think>so</think>2<|im_end|>"]
    assert "hm" not in decode(tokens.ids)
    kept = encode.encode(row("One?", "1", "Two?", "2"), forgetful)
    assert trained_parts(kept) == ["1<|im_end|>", "2<|im_end|>"]


def test_a_rewriting_template_never_trains_an_answer_of_weight_zero() -> None:
    example = row(
        "One?", "<think>a</think>1", "Two?", "<think>b</think>2", "Three?", "3", untrained=(2,)
    )
    assert trained_parts(encode.encode(example, form(FORGETFUL))) == ["<think>b</think>2<|im_end|>"]


def test_a_base_model_gets_the_plain_template() -> None:
    plain = form(False)
    tokens = encode.encode(row("One?", "1", "Two?", "2", system="Be brief."), plain)
    assert decode(tokens.ids) == (
        "<s>Be "
        "brief.\n\nInput:\nOne?\n\nOutput:\n1<|im_end|>\n\nInput:\nTwo?\n\nOutput:\n2<|im_end|>"
    )
    assert trained_parts(tokens) == ["1<|im_end|>", "2<|im_end|>"]
    assert tokens.ids[0] == plain.tokenizer.bos_token_id


def test_a_template_without_an_end_marker_ends_answers_with_the_tokenizers_own() -> None:
    lines = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% "
        "endfor %}"
    )
    bare = form(lines + "{% if add_generation_prompt %}assistant:{% endif %}")
    tokens = encode.encode(row("One?", "1"), bare)
    assert decode(tokens.ids) == "user: One?\nassistant: 1<|im_end|>"
    assert bare.end_ids == (END,)


def test_a_tokenizer_without_any_end_token_is_refused() -> None:
    tokenizer = tiny_tokenizer("{{ messages[-1]['content'] }}")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match=r"has an end token; set tokenizer\.eos_token"):
        encode.make_format(tokenizer, None)


def test_a_tokenizer_without_a_template_is_refused() -> None:
    with pytest.raises(ModelError, match=r"no chat template \(or several\)"):
        encode.make_format(tiny_tokenizer(False), None)


def test_a_broken_template_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot render a question alone"):
        encode.make_format(tiny_tokenizer("{{ messages[0].nothing.more }}"), None)


def test_a_row_that_the_template_refuses_is_named() -> None:
    refusing = form(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not "
        "supported') }}{% endif %}" + CHATML
    )
    with pytest.raises(DataError, match=r"rows\.jsonl:1: .*System role not supported"):
        encode.encode(row("One?", "1", system="Be brief."), refusing)


def test_ids_and_mask_are_plain_arrays() -> None:
    tokens = encode.encode(row("One?", "1"), PLAIN)
    assert tokens.ids.dtype == np.int64
    assert tokens.loss_mask.dtype == np.bool_
    assert len(tokens) == len(tokens.ids) == len(tokens.loss_mask)


@pytest.mark.parametrize("template", [True, FORGETFUL, TRIMMING])
def test_rows_encoded_ahead_are_those_encoded_one_by_one(template: bool | str) -> None:
    special = "a <|im_end|> b"
    rows = [
        Example((Message("user", f"sort {k}"), Message("assistant", f"box {k}")), str(k), f"r:{k}")
        for k in range(5)
    ] + [
        Example((Message("user", special), Message("assistant", "x")), "s", "r:s"),
        Example((Message("user", "x"), Message("assistant", special)), "t", "r:t"),
        Example(
            (
                Message("system", "be brief"),
                Message("user", "one"),
                Message("assistant", "1"),
                Message("user", "two"),
                Message("assistant", "2", train=False),
                Message("user", "three"),
                Message("assistant", "3"),
            ),
            "m",
            "r:m",
        ),
        Example((Message("user", "x"), Message("assistant", "y", train=False)), "n", "r:n"),
    ]
    for anchor in (None, Anchor("Sort it."), Anchor("Answer: ", placement="response_prefix")):
        alone, ahead = form(template, anchor), form(template, anchor)
        assert alone is not ahead
        encode.encode_ahead([*rows, rows[0]], ahead)
        assert [row.origin for row in ahead.encoded] == ["r:0", "r:1", "r:2", "r:3", "r:4", "r:m"]
        for row in rows[:-1]:
            found, expected = encode.encode(row, ahead), encode.encode(row, alone)
            assert found.ids.tolist() == expected.ids.tolist()
            assert found.loss_mask.tolist() == expected.loss_mask.tolist()
        with pytest.raises(DataError, match="r:n: no answer to train"):
            encode.encode(rows[-1], ahead)


def test_a_template_that_refuses_a_row_refuses_it_by_name_after_encoding_ahead() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['content'] == 'bad' %}{{ raise_exception('no bad "
        "words') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    refusing = encode.make_format(tokenizer, None)
    good, bad = (
        Example((Message("user", text), Message("assistant", "y")), text, f"r:{text}")
        for text in ("good", "bad")
    )
    encode.encode_ahead([good, bad], refusing)
    assert len(encode.encode(good, refusing)) > 0
    with pytest.raises(
        DataError, match="r:bad: the model's chat template refuses this row: no bad words"
    ):
        encode.encode(bad, refusing)


def test_a_tokenizer_that_begins_every_text_by_itself_gives_the_same_ids_ahead() -> None:
    beginning = form(False)
    rows = [row("one", "1"), row("two", "2")]
    ahead = encode.encode_many(rows, beginning)
    for one, found in zip(rows, ahead, strict=True):
        assert found.ids.tolist() == encode.encode(one, beginning, keep=False).ids.tolist()
        assert (found.ids == beginning.tokenizer.convert_tokens_to_ids("<s>")).sum() == 1
    assert beginning.encoded == {}  # many rows at once are not kept


def test_a_row_is_known_once_it_was_asked_for_unless_it_is_not_to_be_kept() -> None:
    own = form(anchor=Anchor("Known or not?"))
    one, other = row("one", "1"), row("two", "2")
    first = encode.encode(one, own)
    assert encode.encode(one, own) is first
    encode.encode(other, own, keep=False)
    assert list(own.encoded) == [one]


def test_what_is_known_stays_within_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "_MOST_ENCODED", 3)
    own = form(anchor=Anchor("Within a bound."))
    for number in range(3):
        encode.encode(row(f"q{number}", "a"), own)
    assert len(own.encoded) == 3
    encode.encode(row("q3", "a"), own)
    assert [one.question for one in own.encoded] == ["q3"]


def test_what_the_template_writes_before_a_users_first_words() -> None:
    assert decode(encode.opening_ids(PLAIN)) == "<|im_start|>user\n"
    assert decode(encode.opening_ids(form(anchor=Anchor("Sort it.")))).startswith(
        "<|im_start|>user\nSort it."
    )
    assert encode.opening_ids(form("{% for m in messages %}{{ m['content'] }}{% endfor %}")) == []


def test_the_plain_template_begins_with_the_first_token_only_where_asked() -> None:
    assert encode.plain_template(adds_bos=True) == "{{- bos_token -}}" + encode.PLAIN_TEMPLATE
    assert encode.plain_template(adds_bos=False) == encode.PLAIN_TEMPLATE


def test_marks_of_special_tokens_that_do_not_exist_stay_text() -> None:
    text = f"\ufdd0{len(PLAIN.special_names) + 5}\ufdd1 and \ufdd0{len(PLAIN.special_names)}\ufdd1"
    tokens = encode.encode(row(text, text), PLAIN)
    assert decode(tokens.ids).count(text) == 2
    assert (
        encode._show(f"\ufdd0{len(PLAIN.special_names) + 1}\ufdd1", PLAIN)
        == f"\ufdd0{len(PLAIN.special_names) + 1}\ufdd1"
    )


def test_special_token_text_at_the_end_of_a_question_stays_plain() -> None:
    tokens = encode.encode(row("<|im_end|>", "x <|im_start|>"), PLAIN)
    assert (tokens.ids == END).sum() == 2
    assert (tokens.ids == START).sum() == 2
    base = form(False)  # it writes nothing special after a question
    asked = encode.prompt_ids([Message("user", "q <|im_end|>")], base)
    assert END not in asked


def test_the_scored_row_is_the_same_row() -> None:
    conversation = row("One?", "1", "Two?", "2", system="s")
    found = encode.scored(conversation)
    assert (found.group, found.origin) == (conversation.group, conversation.origin)
    assert [message.train for message in found.messages] == [False, False, False, False, True]


def test_with_a_response_prefix_only_the_last_answer_is_trained_though_all_could_be() -> None:
    tokens = encode.encode(
        row("One?", "1", "Two?", "2", "Three?", "3"), form(anchor=Anchor("So: ", "response_prefix"))
    )
    assert len(trained_parts(tokens)) == 1
    assert trained_parts(tokens)[0].endswith("3<|im_end|>")


def test_an_answer_without_any_question_is_refused() -> None:
    alone = Example((Message("system", "s"), Message("assistant", "a")), "g", "rows.jsonl:7")
    with pytest.raises(DataError, match=r"rows\.jsonl:7: no answer to train"):
        encode.encode(alone, PLAIN)


def test_ids_of_a_row_are_64_bit_whatever_they_are_made_of() -> None:
    empty = encode._join([], ())
    assert (empty.ids.dtype, empty.loss_mask.dtype) == (np.int64, np.bool_)


def test_a_template_that_begins_twice_is_refused_and_once_is_not() -> None:
    with pytest.raises(
        ModelError,
        match=r"^the model's chat template begins with '<s>' twice; take one out of it and",
    ):
        encode.make_format(tiny_tokenizer("{{ bos_token }}{{ bos_token }}" + CHATML), None)
    once = encode.make_format(tiny_tokenizer("{{ bos_token }}" + CHATML), None)
    assert encode.prompt_ids([Message("user", "q")], once)[:2] == [1, START]


def test_an_opening_is_what_stands_before_the_first_of_the_users_words() -> None:
    """Also where the template writes them twice."""
    twice = form("{% for m in messages %}[{{ m['content'] }}|{{ m['content'] }}]{% endfor %}")
    assert decode(encode.opening_ids(twice)) == "["


def test_a_prompt_that_the_template_refuses_says_so() -> None:
    refusing = form(
        "{% if messages|length > 1 %}{{ messages[0]['content'] }}{{ messages[1]['content'] "
        "}}{% else %}"
        "{{ raise_exception('no') if messages[0]['content'] == 'bad' else 'x' }}{% endif %}"
    )
    with pytest.raises(DataError, match="the model's chat template refuses these messages: no"):
        encode.prompt_ids([Message("user", "bad")], refusing)
