"""Read the state of runs and start commands for them, for the page; everything is plain values.

State, losses and results come from files (`events.jsonl`, `results.json`, certificates, logs), so
that a run can be watched that was started elsewhere; a half-written file is read up to its last
whole line. What the page does for a run is a command that the user could type in the workspace's
folder; `jobs` runs it.
"""

import json
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fulcrum.config import parsing
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, FulcrumError, StoreError
from fulcrum.report import certificate_page, run_report, summary, wording
from fulcrum.report.run_kinds import Kinds, kind_of
from fulcrum.web import jobs
from fulcrum.web.chat import CHAT
from fulcrum.web.jobs import Job
from fulcrum.web.workspace import YAML, Run, Workspace

INIT = "init"  # the name of the command that reads the data
RUN = "run"  # of the one that trains
LOOKS = ("check", "minutes", "anchors")  # commands that look at settings and train nothing
EXPORTS = ("adapter", "merged", "gguf", "modelfile")
QUANTIZATIONS = ("q8_0", "f16")
State = Literal["planned", "running", "stopped", "failed", "finished"]
Verb = Literal["train", "compare", "quick"]
_COMMANDS: Mapping[Verb, tuple[str, ...]] = {  # each a verb of the command line and its options
    "train": ("train",),
    "compare": ("compare",),
    "quick": ("compare", "--quick", "--yes"),
}
_MAX_BYTES = 2**20  # of events read at once
_OVERALL = re.compile(r"comparison: ([\d,]+)/([\d,]+), (\S+) left")
_KILLED = (
    "it ended without a word: it was killed, or the machine went down; what was finished is kept"
)
_FIRST = "first.yaml"  # what `init` writes, before the page gives it its names
_EXPORT = re.compile(r"export-[a-z][a-z0-9_]*-(adapter|merged|gguf-(q8_0|f16)|modelfile)")
_ROWS = "5"  # that a look shows
_END_SECONDS = 10.0  # to wait for a command that was asked to end


# ---- the state of a run


def find_state(run: Run) -> tuple[State, str]:
    """Return a run's state, and if it failed the line that says why."""
    manifest = store.recalled(run.folder / store.MANIFEST)
    if not run.is_own:
        if "outputs" in manifest or (run.folder / "results.json").exists():
            return "finished", ""
        return ("running" if _is_held(run.folder) else "stopped"), ""
    job = run.job(RUN)
    if jobs.is_running(job):
        return "running", ""
    if "outputs" in manifest:
        return "finished", ""
    if not jobs.was_started(job):
        why = _init_error(run)
        return ("failed", why) if why else ("planned", "")
    kind, line = jobs.last_word(job)
    if kind == "stopped":
        return "stopped", ""
    return "failed", line or _KILLED


def _init_error(run: Run) -> str:
    """Return why `init` wrote no settings; "" if it did, or has not ended."""
    job = run.job(INIT)
    if run.settings.exists() or not jobs.was_started(job) or jobs.is_running(job):
        return ""
    return jobs.last_word(job)[1]


def _is_held(folder: Path) -> bool:
    """Return whether the process that took a run folder is at work."""
    # Not by trying its lock: that would hold the lock for a moment.
    owner = store.recalled(folder / ".owner.json")
    pid = owner.get("pid")
    if owner.get("host") != platform.node() or not isinstance(pid, int):
        return False
    return jobs.began(pid) is not None


def can_resume(run: Run) -> bool:
    """Return whether a run can be resumed: the page made it and it ended before its time."""
    if not run.is_own or not jobs.was_started(run.job(RUN)):
        return False
    state, _ = find_state(run)
    return state in ("stopped", "failed")


def summarize(run: Run) -> dict[str, Any]:
    """Return a line of the list of runs."""
    state, why = find_state(run)
    return {
        "id": run.id,
        "title": run.title,
        "own": run.is_own,
        "state": state,
        "why": why,
        "verb": _find_verb(run),
        "made": datetime.fromtimestamp(run.made, UTC).isoformat(timespec="seconds"),
        "report": (run.folder / certificate_page.REPORT).is_file(),
        "set": run.settings.is_file(),
        "folder": str(run.folder),
    }


def _find_verb(run: Run) -> str:
    if not run.is_own:
        return str(store.recalled(run.folder / store.MANIFEST).get("kind", ""))
    words = store.recalled(run.job(RUN).record).get("words")
    if not isinstance(words, list) or not words:
        return ""
    return f"{words[0]} --quick" if "--quick" in words else str(words[0])


def follow(run: Run, after: int) -> dict[str, Any]:
    """Return a run's state, its events from the byte `after` on, and what its command says."""
    points, end = _read_events(run.folder / store.EVENTS, after)
    lines = jobs.tail(run.job(RUN))
    state, why = find_state(run)
    return {
        "state": state,
        "why": why,
        "points": points,
        "end": end,
        "log": lines[-60:],
        "resumable": can_resume(run),
        "asked": jobs.was_asked(run.job(RUN)),
        "overall": _find_overall(lines),
    }


def _find_overall(lines: Sequence[str]) -> dict[str, Any] | None:
    """Return how far a comparison is, by the newest line that says so."""
    for line in reversed(lines):
        match = _OVERALL.search(line)
        if match:
            done = int(match[1].replace(",", ""))
            total = int(match[2].replace(",", ""))
            return {"done": done, "all": total, "left": match[3]}
    return None


def _read_events(file: Path, after: int) -> tuple[list[dict[str, Any]], int]:
    """Read whole lines from the byte `after` on, and return where they end.

    A log that is shorter than that was begun again, and is read from its beginning.
    """
    try:
        with file.open("rb") as stream:
            start = after if 0 <= after <= file.stat().st_size else 0
            stream.seek(start)
            block = stream.read(_MAX_BYTES)
    except OSError:
        return [], 0
    whole = block[: block.rfind(b"\n") + 1]
    points = []
    for line in whole.split(b"\n"):
        try:
            point = json.loads(line)
        except ValueError:
            continue
        if isinstance(point, dict):
            points.append(point)
    return points, start + len(whole)


def read_result(run: Run, kinds: Kinds) -> dict[str, Any]:
    """Return a finished run's result: sentences, tables, usable arms, certificates' verdicts.

    Raise StoreError if its files were changed, or if its kind is none of `kinds`.
    """
    certificates = certificate_page.find(run.folder)
    results = None if run_report.has_certificate_only(run.folder) else run_report.load(run.folder)
    verdicts = []
    for certificate in certificates.values():
        glyph, kind, word = wording.badge(certificate.answer, certificate.contradiction)
        verdicts.append(
            {
                "task": certificate.question.task,
                "headline": wording.headline(certificate),
                "kind": kind,
                "word": word,
                "glyph": glyph,
            }
        )
    sentences: list[str] = []
    notes: list[str] = []
    tables: list[dict[str, Any]] = []
    seconds = None
    if results is not None:
        notes = list(dict.fromkeys(results["notes"]))
        tables = _grids(results, certified=bool(certificates))
        seconds = results["seconds"]
        if not certificates:
            try:
                sentences = kind_of(results, kinds).sentences(run.folder, results)
            except StoreError as error:  # a damaged side file must not hide the tables
                sentences = [str(error)]
    return {
        "verdicts": verdicts,
        "said": " ".join(sentences),
        "notes": notes,
        "tables": tables,
        "arms": list_arms(run),
        "folder": str(run.folder),
        "report": (run.folder / certificate_page.REPORT).is_file(),
        "certificate": bool(certificates),
        "seconds": seconds,
    }


def _grids(results: Mapping[str, Any], *, certified: bool) -> list[dict[str, Any]]:
    grids = [summary.score_grid(results, facts["name"]) for facts in results["tasks"]]
    if not certified:
        grids.append(summary.difference_grid(results, first_metric_only=True))
        grids.append(summary.forgetting_grid(results))
    tables = []
    for grid in grids:
        if grid.rows:
            tables.append({"title": grid.title, "head": grid.head, "rows": grid.rows})
    return tables


def list_arms(run: Run) -> list[str]:
    """Return the arms of which a run kept an adapter."""
    config = "adapter_config.json"
    several = run.folder / "adapters"
    if several.is_dir():
        return sorted(path.name for path in several.iterdir() if (path / config).is_file())
    if not (run.folder / "adapter" / config).is_file():
        return []
    try:
        for arm in run_report.load(run.folder)["arms"]:
            if arm.get("training") is not None:
                return [str(arm["arm"])]
    except (FulcrumError, KeyError, TypeError, AttributeError):
        pass
    return []


# ---- commands that look at data and settings


def start_init(
    workspace: Workspace, run: Run, model: str | None, columns: Mapping[str, str] | None = None
) -> None:
    """Have `fulcrum init` write a run's first settings; by default, for the model named before.

    Raise ConfigError for columns that cannot be named, StoreError for a run that has settings.
    """
    if not run.is_own or run.settings.exists() or (run.desk / _FIRST).exists():
        raise StoreError("this run has settings already")
    columns = columns or {}
    for name in (*columns, *columns.values()):
        if set(name) & set(",="):
            raise ConfigError(
                f"{name!r}: a column with , or = in its name; name it otherwise in the file"
            )
    if model is None:
        before = store.recalled(run.job(INIT).record).get("words", ())
        model = str(before[before.index("--model") + 1])
    out = f"{_relative(workspace, run.desk)}/{_FIRST}"
    words = ["init", workspace.datum(run.data).path, "--out", out]
    words += ["--json", str(_result_file(run, INIT)), "--model", model]
    if columns:
        pairs = [f"{ours}={theirs}" for ours, theirs in columns.items()]
        words += ["--columns", ",".join(pairs)]
    jobs.start(run.job(INIT), words, workspace.folder)


def settle(workspace: Workspace, run: Run) -> None:
    """Make the run's settings from what `init` wrote, once it has ended."""
    first = run.desk / _FIRST
    if not run.is_own or run.settings.exists() or not first.exists():
        return
    if jobs.is_running(run.job(INIT)):
        return
    data = parsing.parse(first.read_text(encoding="utf-8"), YAML)
    name = re.sub(r"[^\w-]+", "_", run.title).strip("_-")
    data["task"]["name"] = "task" if name in ("", "default") else name
    workspace.write(run, data)


def start_look(workspace: Workspace, run: Run, name: str) -> None:
    """Begin a command of LOOKS: what will be trained, how long it takes, how anchors score."""
    if name not in LOOKS or not run.is_own:
        raise StoreError("no such command here")
    workspace.values(run, workspace.text(run))
    result = _result_file(run, name)
    result.unlink(missing_ok=True)
    settings = _relative(workspace, run.settings)
    out = _relative(workspace, result)
    words = {
        "check": ["check", settings, "--rows", _ROWS, "--json", out],
        "minutes": ["check", settings, "--rows", "0", "--minutes", "--json", out],
        "anchors": ["anchor", "score", settings, "--out", out],
    }
    jobs.start(run.job(name), words[name], workspace.folder)


def read_job(run: Run, name: str) -> dict[str, Any]:
    """Return a command's state, what it said last, and its result if it is done.

    States: none, running, done, failed, stopped.
    """
    is_look = name in LOOKS
    if name != INIT and not is_look and not _EXPORT.fullmatch(name):
        raise StoreError("no such command here")
    job = run.job(name)
    if not jobs.was_started(job):
        return {"state": "none", "why": "", "log": [], "result": None}
    lines = jobs.tail(job, 12)
    if jobs.is_running(job):
        return {"state": "running", "why": "", "log": lines, "result": None}
    result = _result_file(run, name)
    begun = job.record.stat().st_mtime_ns
    # An earlier export's result stays until a new one is whole; the others' go when they begin.
    is_export = name != INIT and not is_look
    if result.exists() and (not is_export or result.stat().st_mtime_ns >= begun):
        return {
            "state": "done",
            "why": "",
            "log": lines,
            "result": store.read_json(result),
            "stale": is_look and begun < run.settings.stat().st_mtime_ns,
        }
    kind, line = jobs.last_word(job)
    state = "stopped" if kind == "stopped" else "failed"
    return {"state": state, "why": line or "it ended without a word", "log": lines, "result": None}


def stop_job(run: Run, name: str) -> dict[str, Any]:
    """Stop a command, and return its state."""
    before = read_job(run, name)
    if before["state"] == "running":
        jobs.stop(run.job(name))
    return read_job(run, name)


def _result_file(run: Run, name: str) -> Path:
    """Return the file that a command writes last."""
    if name.startswith("export-"):
        return export_folder(run, name) / "export.json"
    return run.desk / "jobs" / f"{name}.json"


def _relative(workspace: Workspace, path: Path) -> str:
    return path.relative_to(workspace.folder).as_posix()


# ---- the run itself


def can_change(run: Run) -> bool:
    """Return whether settings can still be changed: nothing was made that rests on them."""
    if not run.is_own or (run.folder / store.MANIFEST).exists():
        return False
    return not jobs.is_running(run.job(RUN))


def begin(workspace: Workspace, run: Run, verb: Verb, minutes: int | None) -> None:
    """Begin a run, a comparison within so many minutes if they are given.

    Raise StoreError if it was begun before.
    """
    if not can_change(run):
        raise StoreError(
            "this run was begun already; go on with it, or make another with the same settings"
        )
    if minutes is not None and verb != "compare":
        raise ConfigError("minutes: a budget is for a comparison")
    workspace.values(run, workspace.text(run))
    command, *options = _COMMANDS[verb]
    words = [command, _relative(workspace, run.settings), *options]
    if minutes is not None:
        words += ["--budget", f"{minutes}m", "--yes"]
    jobs.start(run.job(RUN), words, workspace.folder)


def resume(workspace: Workspace, run: Run) -> None:
    """Resume a run that ended before its time. Raise StoreError if there is none."""
    if not can_resume(run):
        raise StoreError("there is nothing to go on with")
    words = [str(word) for word in store.recalled(run.job(RUN).record).get("words", ())]
    if "--resume" not in words:
        words.append("--resume")
    jobs.start(run.job(RUN), words, workspace.folder)


def stop(run: Run) -> None:
    """Ask the run to stop: it finishes its step and saves.

    Raise StoreError for a run that the page did not begin.
    """
    if not run.is_own:
        raise StoreError("this run was begun elsewhere; stop it there")
    jobs.stop(run.job(RUN))


def remove(workspace: Workspace, run: Run) -> None:
    """Remove a run and all that was made for it; a chat with it ends.

    Raise StoreError for one in the user's own folders, and while any other command works on it.
    """
    if not run.is_own:
        raise StoreError("this run's folder is the user's own; remove it there")
    chat = run.job(CHAT)
    folder = run.desk / "jobs"
    for job in jobs.started_in(folder):
        if job != chat and not jobs.was_asked(job):
            _refuse_at_work(job)
    jobs.stop(chat)
    for job in jobs.started_in(folder):
        jobs.wait(job, _END_SECONDS)
    with jobs.none_begins():
        for job in jobs.started_in(folder):
            _refuse_at_work(job)
        workspace.remove(run)


def _refuse_at_work(job: Job) -> None:
    if jobs.is_running(job):
        raise StoreError(f"{job.name}: still at work on this run; stop it first")


# ---- exports


def export(workspace: Workspace, run: Run, to: str, arm: str, quantization: str) -> str:
    """Begin an export of an arm, and return the name of the command.

    Raise ConfigError for an arm or kind that is not there.
    """
    if to not in EXPORTS or quantization not in QUANTIZATIONS or arm not in list_arms(run):
        raise ConfigError(f"no export of {arm!r} to {to!r} ({quantization!r}) here")
    workspace.check_trusted(run)
    name = f"export-{arm}-{to}"
    if to == "gguf":
        name = f"{name}-{quantization}"
    out = str(export_folder(run, name))  # an earlier one is replaced once the new one is whole
    words = ["export", str(run.folder), "--to", to, "--arm", arm, "--quantization", quantization]
    words += ["--out", out]
    jobs.start(run.job(name), words, workspace.place(run))
    return name


def list_exports(run: Run) -> list[dict[str, Any]]:
    """Return every export that was begun, with its state, its folder and its files."""
    exports = []
    for job in jobs.started_in(run.desk / "jobs"):
        if _EXPORT.fullmatch(job.name):
            folder = export_folder(run, job.name)
            place = {"folder": str(folder), "files": list_files(folder)}
            exports.append({"name": job.name, **read_job(run, job.name), **place})
    return exports


def export_folder(run: Run, name: str) -> Path:
    """Return where an export is written. Raise StoreError for a name that is none."""
    if not _EXPORT.fullmatch(name):
        raise StoreError("no such export here")
    return run.desk / "export" / name


def list_files(folder: Path) -> Sequence[dict[str, Any]]:
    """Return the files of a folder with their sizes in bytes."""
    files = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            files.append({"name": name, "size": path.stat().st_size})
    return files
