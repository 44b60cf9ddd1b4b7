"""Write docs/reference from the code: settings, verbs with their options, public Python names.

    python scripts/reference.py             # write the three pages
    python scripts/reference.py --check     # say which pages are stale, and fail if any is

Settings come from pydantic's fields, verbs from Typer's registered functions, Python names from the
source itself, which is parsed and not imported. Invariant: the text depends on the code alone, not
on the machine, the terminal or a library's version.
"""

import argparse
import ast
import inspect
import sys
import types
import typing
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import fulcrum
from fulcrum.cli import main as cli
from fulcrum.config import parsing
from fulcrum.config.base import Section
from fulcrum.config.experiments import Arm
from fulcrum.config.sections import TaskSettings
from fulcrum.config.settings import Settings

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "docs" / "reference"
SOURCE = ROOT / "src" / "fulcrum"
NOTE = "<!-- Made from the code by scripts/reference.py; `make docs` writes it anew. -->"

# Names beside those of `fulcrum` itself, which pages of docs/ and README.md offer: by module, in
# the order of the page.
OFFERED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("api", ("scale", "quanta", "write_report", "repeat")),
    ("experiments.finished", ("Adapter", "Evaluation", "evaluate")),
    ("report.verify", ("Verification",)),
    ("data.mix", ("Plan",)),
    ("core.types", ("Score", "Prediction", "Reject")),
    ("core.errors", ("FulcrumError", "ConfigError", "DataError", "ModelError", "StoreError")),
    (
        "mechanism.jumps",
        ("JumpTest", "jump_test", "power", "detectable", "verdict"),
    ),
    ("mechanism.row_jumps", ("RowJumps", "row_jumps")),
    ("mechanism.clusters", ("Clusters", "find")),
    ("mechanism.cluster_gains", ("Cluster", "summarise", "DensityTest", "density_test")),
)


def main(words: Sequence[str] | None = None) -> int:
    """Write the pages, or compare them; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit code 1 where a page is stale"
    )
    stale = stale_pages()
    if not parser.parse_args(words).check:
        FOLDER.mkdir(parents=True, exist_ok=True)
        for name in stale:
            (FOLDER / name).write_text(pages()[name], encoding="utf-8")
        print(
            f"docs/reference: {len(stale)} pages written, {len(pages()) - len(stale)} were up "
            "to date"
        )
        return 0
    for name in stale:
        print(
            f"docs/reference/{name} is not what the code says; write it anew with `make docs`",
            file=sys.stderr,
        )
    return 1 if stale else 0


@cache
def pages() -> dict[str, str]:
    """The text of every page, by file name."""
    made = {"settings.md": _settings(), "command-line.md": _command_line(), "python.md": _python()}
    return {name: f"{NOTE}\n\n{text.rstrip()}\n" for name, text in made.items()}


def stale_pages() -> list[str]:
    """Names of pages that are missing or differ from what the code says."""
    kept = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    return [name for name, text in pages().items() if kept.get(name) != text]


# ---- settings


def _settings() -> str:
    """A table for each section, in the order of the file; a section that stands in several places
    is told once."""
    sections = list(dict.fromkeys(_walk(Settings, "")))
    parts = [
        "# Settings",
        "A settings file is YAML. Here is every key, with what it takes and what it is without "
        "being set. Keys of sections are "
        "written with dots, as in `--set train.lora_r=8`; `task.` keys hold for each entry of "
        "`tasks:` too. How the parts of a "
        "settings file hang together is shown in the [quickstart](../quickstart.md).",
        "Wherever a list of names, numbers or sources is asked for, one value does; a source "
        "may be just its path, an anchor "
        "just its text. `[]` stands for an entry of a list: `task.dev`, `task.test` and "
        "`task.unlabeled` take what "
        "`task.train` takes. Unknown keys are errors that name the nearest known key.",
    ]
    for where, section in sections:
        parts.append(f"## {f'`{where}`' if where else 'Top level'}")
        parts.append(" ".join((section.__doc__ or "").split()))
        rows = []
        for name, field in section.model_fields.items():
            if _sections_in(field.annotation) and not field.description:
                continue  # a section has its own table
            shown = "task" if (section, name) == (Settings, "tasks") else name
            bounds = _bounds(field.metadata)
            rows.append(
                (
                    f"`{f'{where}.' if where else ''}{shown}`",
                    _kind(field.annotation) + bounds,
                    _default(field),
                    field.description,
                )
            )
        parts.append(_table(("key", "takes", "default", "what it is"), rows))
    parts.append("## Names that other trainers use")
    parts.append(
        "They are renamed when the file is read. A key that is given under both names is an error."
    )
    parts.append(
        _table(
            ("name", "means"),
            [(f"`{theirs}`", f"`{ours}`") for theirs, ours in parsing.ALIASES.items()],
        )
    )
    return "\n\n".join(parts)


def _walk(section: type[Section], where: str) -> Iterator[tuple[str, type[Section]]]:
    """A section and those in its fields, each with the dotted name under which its keys stand."""
    yield where, section
    for name, field in section.model_fields.items():
        for inner in _sections_in(field.annotation):
            own = "task" if name == "tasks" else f"{where}.{name}" if where else name
            if inner in (Arm,):
                yield from _walk(inner, f"{own}[]")
            elif inner.__name__ in ("DataSource", "GeneralSource"):
                if (section, name) in ((TaskSettings, "train"), (Settings, "general")):
                    yield from _walk(inner, f"{own}[]")
            elif (section, name) != (Arm, "anchor"):  # told where tasks have it
                yield from _walk(inner, own)


def _sections_in(kind: Any) -> list[type[Section]]:
    if isinstance(kind, type) and issubclass(kind, Section):
        return [kind]
    return [found for part in typing.get_args(kind) for found in _sections_in(part)]


def _kind(kind: Any) -> str:
    """What a field takes, in words."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _kind(parts[0]) + _bounds(kind.__metadata__)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(
            dict.fromkeys("none" if part is types.NoneType else _kind(part) for part in parts)
        )
    if origin is typing.Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list of {_kind(parts[0])}"
    if origin is dict:
        return f"mapping of {_kind(parts[0])} to {_kind(parts[1])}"
    names = {
        str: "text",
        int: "whole number",
        float: "number",
        bool: "true or false",
        Any: "anything",
    }
    if kind in names:
        return names[kind]
    named = {
        "AnchorSettings": "anchor",
        "DataSource": "source",
        "GeneralSource": "source",
        "TaskSettings": "task",
        "Arm": "arm",
    }
    return named.get(kind.__name__, "section")


def _bounds(metadata: Sequence[Any]) -> str:
    words = {"ge": "at least {:g}", "gt": "above {:g}", "le": "at most {:g}", "lt": "below {:g}"}
    said = [
        form.format(getattr(item, key))
        for item in metadata
        for key, form in words.items()
        if hasattr(item, key)
    ]
    said += [
        f"{item.min_length} or more" for item in metadata if getattr(item, "min_length", 0) > 1
    ]
    return f" ({', '.join(said)})" if said else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, tuple) and value and isinstance(value[0], Section):
        value = tuple(item.path for item in value)
    if value is None or value in ((), {}):
        return "none"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(_plain, value))}]`"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and abs(value) < 1e6 else str(value)


# ---- the command line


def _command_line() -> str:
    """Every verb with its arguments and options, from the functions that Typer was given."""
    parts = [
        "# Command line",
        "Every verb, as `fulcrum VERB --help` tells it. Options stand after the verb, in any "
        "order. Errors that you can mend "
        "are one line on stderr and exit code 2; a fault of Fulcrum itself is exit code 1, "
        "Ctrl-C 130. `--debug` shows "
        "tracebacks and what libraries say, before or after the verb.",
        "`fulcrum --version` prints the version; `fulcrum --install-completion` teaches the "
        "shell the verbs, and "
        "`--show-completion` prints what it would be taught.",
    ]
    for name, function in verbs():
        own = [
            parameter
            for parameter in inspect.signature(function).parameters.values()
            if parameter.name != "ctx"
        ]
        told = [(parameter, typing.get_args(parameter.annotation)[1]) for parameter in own]
        arguments = [(p, info) for p, info in told if type(info).__name__ == "ArgumentInfo"]
        usage = " ".join(_optional(_metavar(p, info), p) for p, info in arguments)
        parts.append(f"## `fulcrum {name}`")
        parts.append(
            "`fulcrum "
            f"{' '.join(filter(None, (name, usage, '[OPTIONS]' * (len(told) > len(arguments)))))}`"
        )
        parts.append(inspect.cleandoc(function.__doc__ or ""))
        rows = [
            (
                f"`{_spelt(p, info)}`",
                "" if p.default in (p.empty, None, "", False) else f"`{_plain(p.default)}`",
                _limited(info),
            )
            for p, info in told
        ]
        if rows:
            parts.append(_table(("argument or option", "default", "what it is"), rows))
    return "\n\n".join(parts)


def verbs() -> Iterator[tuple[str, Any]]:
    """Every verb in the order of `fulcrum --help`, those of groups as `pool build`, with its
    function."""
    for command in cli.app.registered_commands:
        yield _named(command), command.callback
    for group in cli.app.registered_groups:
        inner = group.typer_instance
        callback = inner.registered_callback if inner is not None else None
        if callback is not None and inner is not None and inner.info.invoke_without_command is True:
            yield str(group.name), callback.callback
        for command in inner.registered_commands if inner is not None else ():
            yield f"{group.name} {_named(command)}", command.callback


def _named(command: Any) -> str:
    return str(command.name or command.callback.__name__.replace("_", "-"))


def _metavar(parameter: inspect.Parameter, info: Any) -> str:
    return str(info.metavar or parameter.name.upper())


def _optional(metavar: str, parameter: inspect.Parameter) -> str:
    return metavar if parameter.default is parameter.empty else f"[{metavar}]"


def _spelt(parameter: inspect.Parameter, info: Any) -> str:
    if type(info).__name__ == "ArgumentInfo":
        return _metavar(parameter, info)
    # Typer takes the first word for a default until it has seen that it stands in an Annotated.
    names = ", ".join(
        word for word in (info.default, *(info.param_decls or ())) if isinstance(word, str)
    )
    parts = [str(part) for part in typing.get_args(parameter.annotation)[:1]]
    if parts == [str(bool)]:
        return names
    kind = {"int": "N", "float": "NUMBER"}.get(
        next((k for k in ("int", "float") if k in parts[0]), ""), "TEXT"
    )
    return f"{names} {info.metavar or ('PATH' if 'Path' in parts[0] else kind)}"


def _limited(info: Any) -> str:
    ends = (("at least", info.min), ("at most", info.max))
    limits = [f"{words} {end:,g}" for words, end in ends if end is not None]
    return " ".join(filter(None, (info.help, f"({', '.join(limits)})" if limits else "")))


# ---- Python


def _python() -> str:
    """Every public name with its signature and docstring, read from the source."""
    parts = [
        "# Python",
        "`import fulcrum` costs next to nothing: each name is loaded when it is first used. "
        "Keywords of `train`, `compare`, "
        "`scale` and `quanta` are the keys of the [settings file](settings.md). Errors that "
        "you can mend are `FulcrumError`s.",
        "## `fulcrum`",
    ]
    for name in fulcrum.__all__:
        module, _, attribute = fulcrum._HOME[name].rpartition(".")
        parts.append(_told_name(name, module, attribute))
    for module, names in OFFERED:
        parts.append(f"## `fulcrum.{module}`")
        parts += [_told_name(f"{module}.{name}", module, name) for name in names]
    return "\n\n".join(parts)


def _told_name(shown: str, module: str, attribute: str) -> str:
    tree = ast.parse((SOURCE / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8"))
    node = next((node for node in tree.body if getattr(node, "name", None) == attribute), None)
    if isinstance(node, ast.ClassDef):
        return _told_class(shown, node)
    if isinstance(node, ast.FunctionDef):
        return f"### `fulcrum.{shown}`\n\n```python\n{_signature(node)}\n```\n\n{_doc(node)}"
    raise LookupError(f"fulcrum.{module} defines no {attribute}; scripts/reference.py names it")


def _told_class(shown: str, node: ast.ClassDef) -> str:
    """A class: its fields, and the methods and properties that callers may use."""
    lines = [f"### `fulcrum.{shown}`", _doc(node)]
    if "Section" in map(ast.unparse, node.bases):
        place = {"MixSettings": "mix", "TaskSettings": "task"}[node.name]
        return "\n\n".join(
            (*lines, f"Its fields are the keys of [`{place}`](settings.md#{place}).")
        )
    fields = [
        ast.unparse(part)
        for part in node.body
        if isinstance(part, ast.AnnAssign) and not ast.unparse(part).startswith("_")
    ]
    if fields:
        lines.append("```python\n" + "\n".join(fields) + "\n```")
    members = []
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and not part.name.startswith("_"):
            is_property = any(ast.unparse(one) == "property" for one in part.decorator_list)
            head = (
                f"{part.name}: {ast.unparse(part.returns) if part.returns else 'Any'}"
                if is_property
                else _signature(part)[4:]
            )
            members.append(f"- `{head}`: {' '.join(_doc(part).split())}")
    return "\n\n".join((*lines, *(["\n".join(members)] if members else [])))


def _signature(node: ast.FunctionDef) -> str:
    arguments = ast.unparse(node.args)
    own = arguments.removeprefix("self, ").removeprefix("self")
    return f"def {node.name}({own}) -> {ast.unparse(node.returns) if node.returns else 'Any'}"


def _doc(node: ast.ClassDef | ast.FunctionDef) -> str:
    return ast.get_docstring(node) or ""


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        texts = [str(cell or "").replace("|", r"\|") for cell in cells]
        return f"| {' | '.join(' '.join(text.split()) for text in texts)} |"

    return "\n".join((line(head), line(["---"] * len(head)), *map(line, rows)))


if __name__ == "__main__":
    sys.exit(main())
