"""What leaves a run: the adapter in PEFT's format, beside a tokenizer whose chat template carries the anchor.

Whoever loads the two with plain Transformers and PEFT and calls `apply_chat_template` gets the anchor's tokens.

A Modelfile: the chat template, anchor included, in the language that Ollama reads (Go's text/template).

Jinja templates cannot be translated in general. Most chat templates have one shape, though: what opens the first question, what
stands between turns, what opens an answer. Those pieces are found by rendering, held against what the Jinja template itself
renders of other conversations, and written in Go's language; a template of another shape gets no Modelfile.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError

from fulcrum.core import store
from fulcrum.core.types import Anchor, Message
from fulcrum.data import anchor_template, encode
from fulcrum.data.encode import Format
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.registry import BUILTIN

_SYSTEM, _USERS, _ANSWERS = (
    "fulcrumsystem",
    ("fulcrumfirst", "fulcrumnext", "fulcrumlast"),
    ("fulcrumsaid", "fulcrumtold"),
)


@dataclass(frozen=True)
class Pieces:
    """The constant texts of a chat template around what is said.

    `start`: before the first question where there is no system text; else `before_system` and `after_system` stand around that.
    `answered` stands between a question and its answer in the past, `last` after the last question; `asked` between an answer
    and the next question.
    """

    start: str
    before_system: str
    after_system: str
    answered: str
    asked: str
    last: str

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation that ends with a question, put together of these pieces."""
        system = next((message.content for message in messages if message.role == "system"), None)
        found = self.start if system is None else self.before_system + system + self.after_system
        turns = [message for message in messages if message.role != "system"]
        for place, message in enumerate(turns):
            if message.role == "user":
                found += (self.asked if place else "") + message.content
                found += self.last if place == len(turns) - 1 else self.answered
            else:
                found += message.content
        return found


def pieces(form: Format) -> Pieces | None:
    """The pieces of a format's template; None where it has another shape."""
    first, second, third = (Message("user", text) for text in _USERS)
    said, told = (Message("assistant", text) for text in _ANSWERS)
    system = Message("system", _SYSTEM)
    try:
        alone, asked = _rendered([first], form), _rendered([system, first], form)
        long = _rendered([first, said, second, told, third], form)
        answered, next_asked = _between(long, first, said), _between(long, said, second)
        before, _, rest = asked.partition(_SYSTEM)
        found = Pieces(
            alone.partition(first.content)[0], before, rest.partition(first.content)[0], answered, next_asked,
            alone.partition(first.content)[2],
        )  # fmt: skip
        tries = (
            [first],
            [system, first],
            [first, said, second, told, third],
            [system, first, said, second],
        )
        return (
            found
            if all(found.render(messages) == _rendered(messages, form) for messages in tries)
            else None
        )
    except Exception:  # a template may fail in any way at conversations that nobody asked it for
        return None


def _rendered(messages: Sequence[Message], form: Format) -> str:
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


def template(found: Pieces) -> str:
    """The pieces in Go's template language. Constant texts are quoted, so that nothing in them is read as template."""

    def quoted(text: str) -> str:
        return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""

    return (
        '{{- $last := -1 }}{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}{{ $last = $i }}{{ end }}{{ end }}'
        f"{{{{ if .System }}}}{quoted(found.before_system)}{{{{ .System }}}}{quoted(found.after_system)}"
        f"{{{{ else }}}}{quoted(found.start)}{{{{ end }}}}"
        "{{ $first := true }}{{ range $i, $m := .Messages }}"
        '{{ if eq $m.Role "user" }}'
        f"{{{{ if $first }}}}{{{{ $first = false }}}}{{{{ else }}}}{quoted(found.asked)}{{{{ end }}}}"
        "{{ $m.Content }}"
        f"{{{{ if eq $i $last }}}}{quoted(found.last)}{{{{ else }}}}{quoted(found.answered)}{{{{ end }}}}"
        '{{ else if eq $m.Role "assistant" }}{{ $m.Content }}{{ end }}{{ end }}'
    )


def modelfile(base: str, form: Format, *, adapter: bool = True) -> str | None:
    """The text of a Modelfile that stands beside a saved adapter, or beside a whole model; None where the template has a shape
    that it cannot have.

    The first token of the sequence is left out where the tokenizer adds it by itself: Ollama's runner then does too.
    """
    found = pieces(form)
    if found is None:
        return None
    begin = str(form.tokenizer.special_tokens_map.get("bos_token", ""))
    adds = bool(begin) and form.tokenizer("x")["input_ids"][:1] == [
        form.tokenizer.convert_tokens_to_ids(begin)
    ]
    if adds:
        found = replace(
            found,
            start=found.start.removeprefix(begin),
            before_system=found.before_system.removeprefix(begin),
        )
    origin = (
        "# FROM is the model that this adapter was trained on: its .gguf file, or a folder with its safetensors.\n"
        f"FROM {base}\nADAPTER .\n"
    )
    return (
        f"# ollama create NAME -f Modelfile\n{origin if adapter else f'FROM {base}' + chr(10)}"
        f'TEMPLATE """{template(found)}"""\n'
        f"PARAMETER stop {json.dumps(form.end_text, ensure_ascii=False)}\n"
        "PARAMETER temperature 0\n"
    )


NOTE = (
    "The chat template saved beside the adapter adds the anchor by itself: call `apply_chat_template` and do not write the "
    "anchor into your messages. With several tasks on one adapter, choose by name: "
    "`apply_chat_template(..., chat_template=NAME)`; the default template then adds no anchor."
)


def save_adapter(
    loaded: LoadedModel, folder: Path, task_anchors: Mapping[str, Anchor | None]
) -> Path:
    """Write adapter_model.safetensors, adapter_config.json, tokenizer, generation_config.json and (where the chat template
    allows it) a Modelfile into `folder`, atomically.

    One task: its anchor is in the default chat template. Several: one named template and Modelfile a task. Raises StoreError.
    """
    template = loaded.tokenizer.chat_template

    def fill(place: Path) -> None:
        try:
            loaded.peft.save_pretrained(str(place), save_embedding_layers=False)
        except SafetensorError as error:
            raise OSError(str(error)) from error  # what the disk refused, in its library's words
        _finish_config(place / "adapter_config.json", _base_of(loaded))
        (place / "README.md").unlink(
            missing_ok=True
        )  # PEFT's empty model card; the run folder has a full one
        loaded.causal.generation_config.save_pretrained(str(place))
        for name, anchor in task_anchors.items():
            text = modelfile(_base_of(loaded), encode.make_format(loaded.tokenizer, anchor))
            if text is not None:
                file = place / ("Modelfile" if len(task_anchors) == 1 else f"Modelfile.{name}")
                file.write_text(text, encoding="utf-8")
        baked = {
            name: anchor_template.bake(template, anchor) for name, anchor in task_anchors.items()
        }
        loaded.tokenizer.chat_template = (
            next(iter(baked.values())) if len(baked) == 1 else {"default": template, **baked}
        )
        loaded.tokenizer.save_pretrained(str(place))

    try:
        store.write_folder(folder, fill)
    finally:
        loaded.tokenizer.chat_template = template
    return folder


def _base_of(loaded: LoadedModel) -> str:
    """What names the base model on other machines too: the name as written; of a folder its path, for it has no other."""
    is_folder = loaded.name not in BUILTIN and Path(loaded.name).expanduser().is_dir()
    return loaded.path if is_folder else loaded.name


def _finish_config(file: Path, base: str) -> None:
    """Name the base model (PEFT names a folder of this machine's cache) and sort what PEFT writes in the order of a hash seed:
    equal runs shall write equal bytes.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
