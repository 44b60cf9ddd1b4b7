"""Save a trained adapter for use elsewhere: in PEFT's format, with a tokenizer and a Modelfile.

The tokenizer's chat template holds the anchor. Whoever loads adapter and tokenizer with plain
Transformers and PEFT and calls `apply_chat_template` gets the anchor's tokens.

A Modelfile holds the chat template, anchor included, in the language that Ollama reads (Go's
text/template). Jinja templates cannot be translated in general. Most chat templates have one shape,
though: a text that opens the first question, texts between turns, and one that opens an answer.
Those pieces are found by rendering, compared with what the Jinja template renders for other
conversations, and written in Go's language. A template of another shape gets no Modelfile.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from fulcrum.core import store
from fulcrum.core.types import Anchor, Message
from fulcrum.data import anchor_template, encode
from fulcrum.data.encode import PromptFormat
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.registry import BUILTIN

# A conversation that is rendered to find the pieces of a template.
_SYSTEM = Message("system", "fulcrumsystem")
_FIRST = Message("user", "fulcrumfirst")
_SAID = Message("assistant", "fulcrumsaid")
_NEXT = Message("user", "fulcrumnext")
_TOLD = Message("assistant", "fulcrumtold")
_LAST = Message("user", "fulcrumlast")

NOTE = (
    "The chat template saved beside the adapter adds the anchor by itself: call "
    "`apply_chat_template` and do not write the anchor into your messages. With several tasks on "
    "one adapter, choose by name: `apply_chat_template(..., chat_template=NAME)`; the default "
    "template then adds no anchor."
)


@dataclass(frozen=True)
class Pieces:
    """The constant texts of a chat template around the messages."""

    start: str  # before the first question if there is no system text
    before_system: str
    after_system: str  # up to the first question
    answered: str  # between a question and its answer in the past
    asked: str  # between an answer and the next question
    last: str  # after the last question

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation that ends with a question, put together of these pieces."""
        text = self.start
        for message in messages:
            if message.role == "system":
                text = self.before_system + message.content + self.after_system
                break
        turns = [message for message in messages if message.role != "system"]
        for place, message in enumerate(turns):
            if message.role == "user" and place:
                text += self.asked
            text += message.content
            if message.role == "user":
                text += self.last if place == len(turns) - 1 else self.answered
        return text


def save_adapter(
    loaded: LoadedModel, folder: Path, task_anchors: Mapping[str, Anchor | None]
) -> Path:
    """Write adapter, tokenizer, generation settings and Modelfile into `folder`, atomically.

    One task: its anchor is in the default chat template. Several: one named template and Modelfile
    a task. There is no Modelfile if the chat template does not allow it. Return `folder`. Raises
    StoreError.
    """
    template = loaded.tokenizer.chat_template

    def fill(place: Path) -> None:
        try:
            loaded.peft.save_pretrained(str(place), save_embedding_layers=False)
        except SafetensorError as error:
            raise OSError(str(error)) from error  # what the disk refused, in its library's words
        base = _base_of(loaded)
        _finish_config(place / "adapter_config.json", base)
        # PEFT's empty model card; the run folder has a full one.
        (place / "README.md").unlink(missing_ok=True)
        loaded.causal.generation_config.save_pretrained(str(place))
        templates = {}
        for name, anchor in task_anchors.items():
            templates[name] = anchor_template.bake(template, anchor)
            text = modelfile(base, encode.make_format(loaded.tokenizer, anchor))
            if text is not None:
                file = place / ("Modelfile" if len(task_anchors) == 1 else f"Modelfile.{name}")
                file.write_text(text, encoding="utf-8")
        if len(templates) == 1:
            (loaded.tokenizer.chat_template,) = templates.values()
        else:
            loaded.tokenizer.chat_template = {"default": template, **templates}
        loaded.tokenizer.save_pretrained(str(place))

    try:
        store.write_folder(folder, fill)
    finally:
        loaded.tokenizer.chat_template = template
    return folder


def modelfile(base: str, form: PromptFormat, *, adapter: bool = True) -> str | None:
    """Return the Modelfile for a saved adapter next to it, or for a whole model.

    None if the chat template has another shape. The first token of the sequence is omitted if the
    tokenizer adds it, because Ollama's runner then does too.
    """
    parts = pieces(form)
    if parts is None:
        return None
    begin = str(form.tokenizer.special_tokens_map.get("bos_token", ""))
    if begin:
        first_ids = form.tokenizer("x")["input_ids"][:1]
        if first_ids == [form.tokenizer.convert_tokens_to_ids(begin)]:
            parts = replace(
                parts,
                start=parts.start.removeprefix(begin),
                before_system=parts.before_system.removeprefix(begin),
            )
    origin = f"FROM {base}\n"
    if adapter:
        origin = (
            "# FROM is the model that this adapter was trained on: its .gguf file, or a folder "
            f"with its safetensors.\n{origin}ADAPTER .\n"
        )
    return (
        f"# ollama create NAME -f Modelfile\n{origin}"
        f'TEMPLATE """{template(parts)}"""\n'
        f"PARAMETER stop {json.dumps(form.end_text, ensure_ascii=False)}\n"
        "PARAMETER temperature 0\n"
    )


def pieces(form: PromptFormat) -> Pieces | None:
    """Return the pieces of a format's template, or None if it has another shape."""
    conversations = (
        [_FIRST],
        [_SYSTEM, _FIRST],
        [_FIRST, _SAID, _NEXT, _TOLD, _LAST],
        [_SYSTEM, _FIRST, _SAID, _NEXT],
    )
    try:
        alone, with_system, long, short = (_render(messages, form) for messages in conversations)
        start, _, last = alone.partition(_FIRST.content)
        before_system, _, rest = with_system.partition(_SYSTEM.content)
        parts = Pieces(
            start=start,
            before_system=before_system,
            after_system=rest.partition(_FIRST.content)[0],
            answered=_between(long, _FIRST, _SAID),
            asked=_between(long, _SAID, _NEXT),
            last=last,
        )
    except Exception:  # a template may fail in any way at conversations that it was not made for
        return None
    expected = [alone, with_system, long, short]
    is_same = [parts.render(messages) for messages in conversations] == expected
    return parts if is_same else None


def template(pieces: Pieces) -> str:
    """Return the pieces in Go's template language.

    Constant texts are quoted, so that nothing in them is read as template.
    """

    def quoted(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

    return (
        "{{- $last := -1 }}{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "user" }}{{ $last = $i }}{{ end }}{{ end }}'
        "{{ if .System }}"
        f"{quoted(pieces.before_system)}{{{{ .System }}}}{quoted(pieces.after_system)}"
        f"{{{{ else }}}}{quoted(pieces.start)}{{{{ end }}}}"
        "{{ $first := true }}{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "user" }}'
        "{{ if $first }}{{ $first = false }}"
        f"{{{{ else }}}}{quoted(pieces.asked)}{{{{ end }}}}"
        "{{ $m.Content }}"
        f"{{{{ if eq $i $last }}}}{quoted(pieces.last)}"
        f"{{{{ else }}}}{quoted(pieces.answered)}{{{{ end }}}}"
        '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}{{ end }}{{ end }}'
    )


def _render(messages: Sequence[Message], form: PromptFormat) -> str:
    """Return what the template renders. Raise ValueError if a message is not in it once."""
    turns = [{"role": message.role, "content": message.content} for message in messages]
    text = str(
        form.tokenizer.apply_chat_template(
            turns, chat_template=form.template, add_generation_prompt=True, tokenize=False
        )
    )
    if any(text.count(message.content) != 1 for message in messages):
        raise ValueError("a message is missing, or stands there twice")
    return text


def _between(text: str, one: Message, other: Message) -> str:
    return text.partition(one.content)[2].partition(other.content)[0]


def _base_of(loaded: LoadedModel) -> str:
    """Return what names the base model on other machines too: its name as written.

    For a folder that is its path, because it has no other name.
    """
    is_folder = loaded.name not in BUILTIN and Path(loaded.name).expanduser().is_dir()
    return loaded.path if is_folder else loaded.name


def _finish_config(file: Path, base: str) -> None:
    """Name the base model and sort the file, so that equal runs write equal bytes.

    PEFT names a folder of this machine's cache, and writes lists in the order of a hash seed.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
