"""What the page does for a run: commands with a result that is read back, and the run itself, begun, stopped and gone on with.

Every command is one that the user could type in the workspace's folder; `jobs` runs it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from fulcrum import jobs, onlooker, settings_file, store
from fulcrum.chatting import CHAT
from fulcrum.errors import ConfigError, StoreError
from fulcrum.jobs import Job
from fulcrum.onlooker import INIT, RUN
from fulcrum.workspace import YAML, Run, Workspace

LOOKS = ("check", "minutes", "anchors")  # commands that look at settings and train nothing
KINDS = ("adapter", "merged", "gguf", "modelfile")
QUANTIZATIONS = ("q8_0", "f16")
_FIRST = "first.yaml"  # what `init` writes, before the page gives it its names
_EXPORT = re.compile(r"export-[a-z][a-z0-9_]*-(adapter|merged|gguf-(q8_0|f16)|modelfile)")
_ROWS = "5"  # that a look shows
_ENDS = 10.0  # seconds that what was asked to end is waited for
Verb = Literal["train", "compare", "quick"]


def first_look(workspace: Workspace, run: Run, model: str | None, columns: Mapping[str, str] | None = None) -> None:
    """Have `fulcrum init` write a run's first settings; without `model`, for the model that was named before.

    Raises ConfigError for columns that cannot be named, StoreError for a run that has settings.
    """
    if not run.is_own or run.settings.exists() or (run.desk / _FIRST).exists():
        raise StoreError("this run has settings already")
    if wrong := [name for pair in (columns or {}).items() for name in pair if set(name) & set(",=")]:
        raise ConfigError(f"{wrong[0]!r}: a column with , or = in its name; name it otherwise in the file")
    name = _from(workspace, run.desk)
    before = list(map(str, store.recalled(run.job(INIT).record).get("words", ())))
    chosen = model or before[before.index("--model") + 1]
    words = ["init", workspace.datum(run.data).path, "--out", f"{name}/{_FIRST}", "--json", str(_made(run, INIT))]
    words += ["--model", chosen]
    words += ["--columns", ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())] if columns else []
    jobs.start(run.job(INIT), words, workspace.folder)


def settle(workspace: Workspace, run: Run) -> None:
    """Give what `init` wrote the run's own names, once it is there."""
    first = run.desk / _FIRST
    if not run.is_own or run.settings.exists() or not first.exists() or jobs.is_running(run.job(INIT)):
        return
    data = settings_file.parse(first.read_text(encoding="utf-8"), YAML)
    plain = re.sub(r"[^\w-]+", "_", run.title).strip("_-")
    data["task"]["name"] = plain if plain not in ("", "default") else "task"
    workspace.write(run, data)


def look(workspace: Workspace, run: Run, name: str) -> None:
    """Begin a command that looks at the settings: what will be trained, how long it takes, how anchors score."""
    if name not in LOOKS or not run.is_own:
        raise StoreError("no such command here")
    workspace.values(run, workspace.text(run))
    made = _made(run, name)
    made.unlink(missing_ok=True)
    settings, file = _from(workspace, run.settings), _from(workspace, made)
    words = {
        "check": ["check", settings, "--rows", _ROWS, "--json", file],
        "minutes": ["check", settings, "--rows", "0", "--minutes", "--json", file],
        "anchors": ["anchor", "score", settings, "--out", file],
    }[name]
    jobs.start(run.job(name), words, workspace.folder)


def told(run: Run, name: str) -> dict[str, Any]:
    """How a command stands (none, running, done, failed, stopped), what it said last, and its result where it is done."""
    if name not in (INIT, *LOOKS) and not _EXPORT.fullmatch(name):
        raise StoreError("no such command here")
    job = run.job(name)
    if not jobs.was_started(job):
        return {"state": "none", "why": "", "log": [], "result": None}
    lines = jobs.tail(job, 12)
    if jobs.is_running(job):
        return {"state": "running", "why": "", "log": lines, "result": None}
    made = _made(run, name)
    if made.exists() and (name in (INIT, *LOOKS) or made.stat().st_mtime_ns >= job.record.stat().st_mtime_ns):
        stale = name in LOOKS and job.record.stat().st_mtime_ns < run.settings.stat().st_mtime_ns
        return {"state": "done", "why": "", "log": lines, "result": store.read_json(made), "stale": stale}
    kind, line = jobs.last_word(job)
    how = "stopped" if kind == "stopped" else "failed"
    return {"state": how, "why": line or "it ended without a word", "log": lines, "result": None}


def end(run: Run, name: str) -> dict[str, Any]:
    """Stop a command; says how it stands."""
    known = told(run, name)
    if known["state"] == "running":
        jobs.stop(run.job(name))
    return told(run, name)


def _made(run: Run, name: str) -> Path:
    """The file that a command makes last."""
    return export_folder(run, name) / "export.json" if name.startswith("export-") else run.desk / "jobs" / f"{name}.json"


def _from(workspace: Workspace, path: Path) -> str:
    return path.relative_to(workspace.folder).as_posix()


# ---- the run itself


def may_change(run: Run) -> bool:
    """Whether a run's settings may still be changed: it has made nothing that rests on them."""
    return run.is_own and not (run.folder / store.MANIFEST).exists() and not jobs.is_running(run.job(RUN))


def begin(workspace: Workspace, run: Run, verb: Verb, minutes: int | None) -> None:
    """Begin the run, a comparison within so many minutes where they are given. Raises StoreError where it was begun before."""
    if not may_change(run):
        raise StoreError("this run was begun already; go on with it, or make another with the same settings")
    if minutes is not None and verb != "compare":
        raise ConfigError("minutes: a budget is for a comparison")
    workspace.values(run, workspace.text(run))
    words = ["train" if verb == "train" else "compare", _from(workspace, run.settings)]
    words += ["--quick", "--yes"] if verb == "quick" else []
    words += ["--budget", f"{minutes}m", "--yes"] if minutes is not None else []
    jobs.start(run.job(RUN), words, workspace.folder)


def resume(workspace: Workspace, run: Run) -> None:
    """Go on with a run that ended before its time. Raises StoreError where there is nothing to go on with."""
    if not onlooker.can_resume(run):
        raise StoreError("there is nothing to go on with")
    words = [str(word) for word in store.recalled(run.job(RUN).record).get("words", ())]
    jobs.start(run.job(RUN), [*words, *([] if "--resume" in words else ["--resume"])], workspace.folder)


def stop(run: Run) -> None:
    """Ask the run to stop: it finishes its step and saves. Raises StoreError for a run that the page did not begin."""
    if not run.is_own:
        raise StoreError("this run was begun elsewhere; stop it there")
    jobs.stop(run.job(RUN))


def remove(workspace: Workspace, run: Run) -> None:
    """Remove a run and all that was made for it; a chat with it ends. Raises StoreError for one in the user's own folders, and
    while anything else is at work on it, from whatever terminal."""
    if not run.is_own:
        raise StoreError("this run's folder is the user's own; remove it there")
    chat, own = run.job(CHAT), run.desk / "jobs"
    _refuse_at_work(job for job in jobs.started_in(own) if job != chat and not jobs.was_asked(job))
    jobs.stop(chat)
    for job in jobs.started_in(own):
        jobs.wait(job, _ENDS)
    with jobs.none_begins():
        _refuse_at_work(jobs.started_in(own))
        workspace.remove(run)


def _refuse_at_work(commands: Iterable[Job]) -> None:
    for job in commands:
        if jobs.is_running(job):
            raise StoreError(f"{job.name}: still at work on this run; stop it first")


# ---- exports


def export(workspace: Workspace, run: Run, to: str, arm: str, quantization: str) -> str:
    """Begin an export of an arm; returns the name of the command. Raises ConfigError for what is not there."""
    if to not in KINDS or quantization not in QUANTIZATIONS or arm not in onlooker.arms(run):
        raise ConfigError(f"no export of {arm!r} to {to!r} ({quantization!r}) here")
    workspace.check_trusted(run)
    name = f"export-{arm}-{to}" + f"-{quantization}" * (to == "gguf")
    words = ["export", str(run.folder), "--to", to, "--arm", arm, "--quantization", quantization]
    words += ["--out", str(export_folder(run, name))]  # which takes the place of an earlier one once it is whole
    jobs.start(run.job(name), words, workspace.place(run))
    return name


def exports(run: Run) -> list[dict[str, Any]]:
    """Every export that was begun, with how it stands, its folder and its files."""
    names = [job.name for job in jobs.started_in(run.desk / "jobs")]
    return [
        {"name": name, **told(run, name), "folder": str(export_folder(run, name)), "files": files_of(export_folder(run, name))}
        for name in names if _EXPORT.fullmatch(name)
    ]  # fmt: skip


def export_folder(run: Run, name: str) -> Path:
    """Where an export is written. Raises StoreError for a name that is none."""
    if not _EXPORT.fullmatch(name):
        raise StoreError("no such export here")
    return run.desk / "export" / name


def files_of(folder: Path) -> Sequence[dict[str, Any]]:
    """The files of a folder with their bytes."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [{"name": path.relative_to(folder).as_posix(), "size": path.stat().st_size} for path in found]
