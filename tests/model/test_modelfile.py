"""A Modelfile's template says what the Jinja template says, wherever the anchor stands; none is
made where it cannot."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
from tokenizers import processors

from fulcrum.core.types import Anchor, Message, Placement
from fulcrum.data import encode
from fulcrum.data.encode import plain_template
from fulcrum.model import save
from helpers.saved_adapters import saved
from helpers.tiny import CHATML, FORGETFUL, TRIMMING, load_tiny, tiny_tokenizer

ASK, SAID, AGAIN = (
    Message("user", "One {{ .System }}?"),
    Message("assistant", "1"),
    Message("user", "Two?"),
)
SYSTEM = Message("system", "Be brief.")
TALKS = (
    [ASK],
    [SYSTEM, ASK],
    [ASK, SAID, AGAIN],
    [SYSTEM, ASK, SAID, AGAIN, Message("assistant", "2"), Message("user", "3?")],
)
WORDS = 'Say "it" in {{ braces }}, """thrice""", \\n and ü.'


def go(template: str, messages: Sequence[Message]) -> str:
    """What Go's text/template makes of the few actions that are used: literals, fields, if, else,
    range and assignment."""
    parts = re.findall(
        r'\{\{-? ?((?:"(?:[^"\\]|\\.)*"|[^"}])*?) ?\}\}|((?:(?!\{\{).)+)', template, re.DOTALL
    )
    variables: dict[str, Any] = {}

    def value(word: str) -> Any:
        if word.startswith('"'):
            return json.loads(word)
        if word == ".System":
            return "\n\n".join(message.content for message in messages if message.role == "system")
        if word.lstrip("-").isdigit() or word in ("true", "false"):
            return json.loads(word)
        name, _, field = word.partition(".")
        found = variables[name]
        return {"Role": found.role, "Content": found.content}[field] if field else found

    def holds(condition: str) -> bool:
        words = re.findall(r'"(?:[^"\\]|\\.)*"|\S+', condition)
        return value(words[1]) == value(words[2]) if words[0] == "eq" else bool(value(words[0]))

    def run(place: int, *, live: bool) -> tuple[str, int, str]:
        """Output, the place after, and the action (else or end) that stopped it."""
        out = ""
        while place < len(parts):
            action, text = parts[place]
            place += 1
            if text:
                out += text if live else ""
            elif action.startswith("range "):
                start = place
                for index, message in enumerate(messages if live else ()):
                    variables.update({"$i": index, "$m": message})
                    said, place, _ = run(start, live=True)
                    out += said
                if not live or not messages:
                    _, place, _ = run(start, live=False)
            elif action.startswith("if "):
                chosen, done, condition = "", False, action[3:]
                while True:
                    now = live and not done and (condition is None or holds(condition))
                    said, place, stop = run(place, live=now)
                    chosen, done = chosen + said, done or now
                    if stop == "end":
                        break
                    condition = stop[8:] if stop.startswith("else if ") else None
                out += chosen
            elif action == "end" or action.startswith("else"):
                return out, place, action
            elif live and "=" in action:
                name, word = re.split(r" :?= ", action)
                variables[name] = value(word)
            elif live:
                out += str(value(action))
        return out, place, ""

    return run(0, live=True)[0]


def jinja(form: encode.PromptFormat, messages: Sequence[Message]) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return str(
        form.tokenizer.apply_chat_template(
            turns, chat_template=form.template, add_generation_prompt=True, tokenize=False
        )
    )


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize(
    "template", [CHATML, TRIMMING, plain_template(True), plain_template(False)]
)
@pytest.mark.parametrize("placement", [None, *get_args(Placement)])
def test_go_says_what_jinja_says(
    placement: Placement | None, template: str, talk: list[Message]
) -> None:
    tokenizer = tiny_tokenizer(template)
    form = encode.make_format(tokenizer, None if placement is None else Anchor(WORDS, placement))
    found = save.pieces(form)
    assert found is not None
    assert go(save.template(found), talk) == jinja(form, talk)
    assert '"""' not in save.template(found)  # it would end Ollama's quotation


def test_a_conversation_has_the_same_tokens_wherever_it_is_rendered(tmp_path: Path) -> None:
    """Fulcrum, plain Transformers with the saved tokenizer, and the Modelfile; its runner adds the
    first token itself."""
    from transformers import AutoTokenizer

    loaded = load_tiny(tmp_path, template=CHATML)
    anchor = Anchor("Sort the ticket below.", "user_prefix")
    folder = saved(loaded, tmp_path / "adapter", {"task": anchor})
    form = encode.make_format(loaded.tokenizer, anchor)
    talk = [SYSTEM, Message("user", "Where is my parcel?"), SAID, AGAIN]
    ours = encode.prompt_ids(talk, form)
    plain = AutoTokenizer.from_pretrained(folder)
    turns = [{"role": message.role, "content": message.content} for message in talk]
    assert plain.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == ours
    text = (folder / "Modelfile").read_text()
    (quoted,) = re.findall(r'TEMPLATE """(.*)"""', text)
    assert plain(go(quoted, talk), add_special_tokens=False)["input_ids"] == ours
    assert jinja(form, talk).count(anchor.text) == go(quoted, talk).count(anchor.text) == 1
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert "ADAPTER ." in text
    assert text.splitlines()[2].startswith("FROM ")


@pytest.mark.parametrize("adds", [True, False])
def test_the_first_token_is_left_to_a_runner_that_adds_it(adds: bool) -> None:
    tokenizer = tiny_tokenizer(False)
    tokenizer.chat_template = TRIMMING
    if not adds:  # as SmolLM2's, whose first token is one of the template's
        tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    form = encode.make_format(tokenizer, None)
    begin = tokenizer.special_tokens_map["bos_token"]
    assert (tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id) == adds
    text = save.modelfile("base", form)
    assert text is not None
    (quoted,) = re.findall(r'TEMPLATE """(.*)"""', text)
    assert jinja(form, [ASK]).startswith(begin)
    assert go(quoted, [ASK]) == (
        jinja(form, [ASK]).removeprefix(begin) if adds else jinja(form, [ASK])
    )


def test_a_template_of_another_shape_has_no_modelfile(tmp_path: Path) -> None:
    counts = CHATML.replace("'<|im_end|>\\n'", "'<|im_end|>' + loop.index|string + '\\n'")
    assert save.modelfile("base", encode.make_format(tiny_tokenizer(counts), None)) is None
    loaded = load_tiny(tmp_path, template=counts)
    assert not (saved(loaded, tmp_path / "adapter", {"task": None}) / "Modelfile").exists()


def test_several_tasks_have_one_each(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path, template=FORGETFUL)
    folder = saved(
        loaded, tmp_path / "adapter", {"one": Anchor("First."), "two": Anchor("Second.")}
    )
    assert "First." in (folder / "Modelfile.one").read_text()
    assert "Second." in (folder / "Modelfile.two").read_text()
