"""The house stands: a file imports only files below it, and what must answer at once never loads torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "fulcrum"

# From the ground up: a file imports only files listed before it.
FLOORS = (
    ("errors",),
    (
        "records",
        "progress",
        "settings_file",
        "sections",
        "experiments",
        "config",
        "store",
        "run_folder",
        "stopping",
        "intervals",
        "scaling_fits",
        "emergence",
        "verdicts",
        "row_jumps",
        "row_savings",
        "outcomes",
        "clusters",
    ),
    (
        "rows",
        "tables",
        "clean",
        "processes",
        "origins",
        "shards",
        "repeats",
        "starter",
        "ingest",
        "pool",
        "anchor",
        "choose",
        "mix",
        "pack",
        "prefix",
        "encode",
        "modelfile",
        "propose",
        "metrics",
        "answer",
        "labelled",
        "general_rows",
        "material",
        "sources",
        "endpoint",
        "tokens",
        "arms",
        "arm_data",
        "ladder",
        "shots",
        "words",
    ),
    (
        "gguf",
        "gguf_export",
        "fetch",
        "attention",
        "launched",
        "model",
        "lora",
        "adapter",
        "merge",
        "checkpoint",
        "loss",
        "compiled",
        "training",
        "generate",
        "slots",
        "engine",
        "scoring",
        "llamacpp",
        "artefact",
        "export",
        "cell",
        "selfgen",
        "selfmade",
        "pseudo",
        "probe",
        "items",
        "anchor_scores",
        "candidates",
        "pilot",
    ),
    (
        "summary",
        "plots",
        "learning_plots",
        "research_plots",
        "certificate",
        "certification",
        "verify",
        "wording",
        "exhibit",
        "anchor_outcomes",
        "page",
        "run_kinds",
        "scale_report",
        "quanta_report",
        "run_report",
        "materials",
        "identity",
        "run",
    ),
    ("preview", "proof", "units", "workers", "comparison", "presets", "budget", "scale", "quanta"),
    (
        "trackers",
        "finished",
        "speakers",
        "openai_api",
        "serve",
        "shipping",
        "api",
        "terminal",
        "talk",
        "watch",
        "jobs",
        "workspace",
        "chatting",
        "runs",
        "guard",
        "web",
        "cli_group",
        "cli_start",
        "cli_export",
        "cli_serve",
        "cli_models",
        "cli_pool",
        "cli_anchor",
        "cli_selfgen",
        "cli_certificate",
        "cli_budget",
        "cli_ui",
        "cli",
        "__main__",
        "__init__",
    ),
)
ORDER = [name for floor in FLOORS for name in floor]
HEAVY = {"torch", "transformers", "peft", "accelerate", "safetensors"}
FIRST_HEAVY = ORDER.index("gguf")
# They stand high and need results.json or a certificate only.
READERS = {*FLOORS[4]} - {"identity", "run"}
# All that answers a command at once: the last floor, without what holds a model or its libraries.
LIGHT = {*READERS, "llamacpp", *FLOORS[-1]} - {"trackers", "finished", "speakers", "serve", "shipping"}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports(name: str, *, at_import: bool) -> set[str]:
    """Modules that a file imports ("torch", "fulcrum.mix"): anywhere in it, or only those that importing it loads."""
    found: set[str] = set()
    open_nodes: list[ast.AST] = [ast.parse((SOURCE / f"{name}.py").read_text(encoding="utf-8"))]
    while open_nodes:
        node = open_nodes.pop()
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found.update([f"fulcrum.{alias.name}" for alias in node.names] if module == "fulcrum" else [module])
        deferred = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_type_checking(node)
        if not (at_import and deferred):
            open_nodes.extend(ast.iter_child_nodes(node))
    return found


def test_every_file_has_a_floor() -> None:
    assert {path.stem for path in SOURCE.glob("*.py")} - set(ORDER) == set(), "give each new file its place in FLOORS"


@pytest.mark.parametrize("place", range(len(ORDER)), ids=ORDER)
def test_a_file_imports_only_files_below_it(place: int) -> None:
    if (SOURCE / f"{ORDER[place]}.py").exists():
        own = {
            name.partition(".")[2].partition(".")[0]
            for name in imports(ORDER[place], at_import=False)
            if name[:8] == "fulcrum."
        }
        assert own <= set(ORDER[:place])


@pytest.mark.parametrize("place", range(len(ORDER)), ids=ORDER)
def test_models_are_touched_from_the_third_floor_on(place: int) -> None:
    name = ORDER[place]
    if (place < FIRST_HEAVY or name in READERS) and (SOURCE / f"{name}.py").exists():
        assert {module.partition(".")[0] for module in imports(name, at_import=False)} & HEAVY == set()


@pytest.mark.parametrize("start", sorted({"intervals", *LIGHT} - {"__main__"}))
def test_what_must_answer_at_once_loads_no_model_library(start: str) -> None:
    """Transitively, at import."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        modules = imports(name, at_import=True)
        assert {module.partition(".")[0] for module in modules} & HEAVY == set(), f"{start} loads {name}"
        own = {module.partition(".")[2].partition(".")[0] for module in modules if module.startswith("fulcrum.")}
        waiting += sorted(own & set(ORDER))


def test_python_agrees() -> None:
    code = "import sys, fulcrum, fulcrum.cli, fulcrum.api, fulcrum.stats; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY & set(done.stdout.split()) == set()


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.stem)
def test_no_file_is_over_500_lines(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
