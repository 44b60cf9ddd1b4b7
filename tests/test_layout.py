"""Packages import in one direction, and what must answer at once loads no model library."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SOURCE = TESTS.parent / "src" / "fulcrum"

# A package or module at the top -> what it may import. docs/architecture.md says what each is.
MAY_IMPORT = {
    "core": set(),
    "stats": {"core"},
    "config": {"core", "stats.metrics"},
    "data": {"core", "stats", "config"},
    "model": {"core", "stats", "config", "data"},
    "training": {"core", "stats", "config", "data", "model"},
    "anchors": {"core", "stats", "config", "data", "model", "training"},
    "report": {"core", "stats", "config", "data", "model.registry"},
    "experiments": {
        "core",
        "stats",
        "config",
        "data",
        "model",
        "training",
        "anchors",
        "report",
    },
    "mechanism": {
        "core",
        "stats",
        "config",
        "data",
        "model",
        "training",
        "report",
        "experiments",
    },
    "deploy": {"core", "stats", "config", "data", "model", "report", "experiments"},
    "api": {"core", "stats", "config", "data", "report", "experiments", "mechanism"},
    "web": {"core", "stats", "config", "report", "model.registry"},
    "cli": {
        "core",
        "stats",
        "config",
        "data",
        "model",
        "anchors",
        "report",
        "experiments",
        "mechanism",
        "deploy",
        "api",
        "web",
    },
}
MODEL_LIBRARIES = {"torch", "transformers", "peft", "accelerate", "safetensors"}
WITHOUT_MODELS = ("core", "stats", "config", "data", "report", "web")
FILES = sorted(SOURCE.rglob("*.py"))


def names_imported(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere in it: "torch", "fulcrum.data.mix" ..."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def is_allowed(name: str, package: str) -> bool:
    """Say whether a package may import `name`, as "fulcrum.model.registry.locate"."""
    _, _, inside = name.partition(".")
    allowed = MAY_IMPORT[package] | {package}
    return any(inside == one or inside.startswith(f"{one}.") for one in allowed)


def test_every_package_has_a_row() -> None:
    packages = {package_of(path) for path in FILES} - {"__init__", "__main__"}
    assert packages == set(MAY_IMPORT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_package_imports_only_what_its_row_allows(path: Path) -> None:
    package = package_of(path)
    if package in MAY_IMPORT:
        own = {name for name in names_imported(path) if name.split(".")[0] == "fulcrum"}
        assert {name for name in own if not is_allowed(name, package)} == set()


@pytest.mark.parametrize("package", WITHOUT_MODELS)
def test_models_are_not_touched(package: str) -> None:
    for path in (SOURCE / package).rglob("*.py"):
        libraries = {name.split(".")[0] for name in names_imported(path)}
        assert libraries & MODEL_LIBRARIES == set(), path


@pytest.mark.parametrize(
    "module", ["fulcrum", "fulcrum.cli.main", "fulcrum.api", "fulcrum.web.app"]
)
def test_what_must_answer_at_once_loads_no_model_library(module: str) -> None:
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert MODEL_LIBRARIES & set(done.stdout.split()) == set()


def test_no_folder_has_more_than_twenty_modules() -> None:
    for folder in {path.parent for path in FILES}:
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= 20


def test_packages_open_empty() -> None:
    """Code in an `__init__.py` would be run by every import of the package."""
    for path in SOURCE.glob("*/__init__.py"):
        assert path.read_text(encoding="utf-8") == ""


def test_no_test_file_imports_another() -> None:
    """What tests share is in tests/helpers."""
    for path in TESTS.rglob("*.py"):
        imported = {name.split(".")[0] for name in names_imported(path)}
        assert not {name for name in imported if name.startswith("test_")}, path
