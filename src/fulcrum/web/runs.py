"""What the page knows of its runs and does for them, as plain values.

What a run and its commands tell whoever looks on comes from files (`events.jsonl`, `results.json`, certificates, logs), so that
a run can be watched which nobody here started; a file that is half there is read up to its last whole line. What the page
does for a run is a command that the user could type in the workspace's folder; `jobs` runs it.
"""

import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
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
_MOST_BYTES = 2**20  # of events told at once
_OVERALL = re.compile(r"comparison: ([\d,]+)/([\d,]+), (\S+) left")
_KILLED = (
    "it ended without a word: it was killed, or the machine went down; what was finished is kept"
)
_FIRST = "first.yaml"  # what `init` writes, before the page gives it its names
_EXPORT = re.compile(r"export-[a-z][a-z0-9_]*-(adapter|merged|gguf-(q8_0|f16)|modelfile)")
_ROWS = "5"  # that a look shows
_ENDS = 10.0  # seconds that what was asked to end is waited for


# ---- what a run tells


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
        first = run.job(INIT)
        isnt_read = (
            not run.settings.exists() and jobs.was_started(first) and not jobs.is_running(first)
        )
        why = jobs.last_word(first)[1] if isnt_read else ""
        return ("failed", why) if why else ("planned", "")
    kind, line = jobs.last_word(job)
    return ("stopped", "") if kind == "stopped" else ("failed", line or _KILLED)


def _is_held(folder: Path) -> bool:
    """Tell whether the process that took a run folder is at work. Taking its lock to see would hold the lock for a moment."""
    owner = store.recalled(folder / ".owner.json")
    pid = owner.get("pid")
    if owner.get("host") != platform.node() or not isinstance(pid, int):
        return False
    return jobs.began(pid) is not None


def can_resume(run: Run) -> bool:
    """Tell whether a run can be resumed: one that the page made and that ended before its time."""
    return (
        run.is_own
        and jobs.was_started(run.job(RUN))
        and find_state(run)[0] in ("stopped", "failed")
    )


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
    """Return what is new since the byte `after` of a run's events, where these end now, and what its command says."""
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
    """Return the newest word on how far a comparison is, if there is one."""
    for line in reversed(lines):
        match = _OVERALL.search(line)
        if match:
            done, total = (int(number.replace(",", "")) for number in match.group(1, 2))
            return {"done": done, "all": total, "left": match[3]}
    return None


def _read_events(file: Path, after: int) -> tuple[list[dict[str, Any]], int]:
    """Read whole lines from a byte on; a log that is shorter than that was begun anew, and is read from its beginning."""
    try:
        with file.open("rb") as stream:
            start = after if 0 <= after <= file.stat().st_size else 0
            stream.seek(start)
            block = stream.read(_MOST_BYTES)
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
    """Return what a finished run says: sentences and tables, the arms that can be used, the certificates' verdicts.

    Raises StoreError if its files were changed, or if its kind is none of `kinds`.
    """
    certificates = certificate_page.find(run.folder)
    results = None if run_report.has_certificate_only(run.folder) else run_report.load(run.folder)
    verdicts = []
    for known in certificates.values():
        glyph, kind, word = wording.badge(known.answer, known.contradiction)
        verdicts.append(
            {
                "task": known.question.task,
                "headline": wording.headline(known),
                "kind": kind,
                "word": word,
                "glyph": glyph,
            }
        )
    sentences: list[str] = []
    if results is not None and not certificates:
        sentences = kind_of(results, kinds).sentences(run.folder, results)
    return {
        "verdicts": verdicts,
        "said": " ".join(sentences),
        "notes": [] if results is None else list(dict.fromkeys(results["notes"])),
        "tables": [] if results is None else _grids(results, certified=bool(certificates)),
        "arms": list_arms(run),
        "folder": str(run.folder),
        "report": (run.folder / certificate_page.REPORT).is_file(),
        "certificate": bool(certificates),
        "seconds": None if results is None else results["seconds"],
    }


def _grids(results: Mapping[str, Any], *, certified: bool) -> list[dict[str, Any]]:
    grids = [summary.score_grid(results, facts["name"]) for facts in results["tasks"]]
    if not certified:
        grids += [
            summary.difference_grid(results, first_metric_only=True),
            summary.forgetting_grid(results),
        ]
    return [
        {"title": grid.title, "head": grid.head, "rows": grid.rows} for grid in grids if grid.rows
    ]


def list_arms(run: Run) -> list[str]:
    """Return the arms of which a run kept an adapter."""
    several = run.folder / "adapters"
    if several.is_dir():
        return sorted(
            path.name for path in several.iterdir() if (path / "adapter_config.json").is_file()
        )
    if not (run.folder / "adapter" / "adapter_config.json").is_file():
        return []
    try:
        names = [
            str(arm["arm"])
            for arm in run_report.load(run.folder)["arms"]
            if arm.get("training") is not None
        ]
    except (FulcrumError, KeyError, TypeError, AttributeError):
        return []
    return names[:1]


# ---- commands that look at data and settings


def start_init(
    workspace: Workspace, run: Run, model: str | None, columns: Mapping[str, str] | None = None
) -> None:
    """Have `fulcrum init` write a run's first settings; without `model`, for the model that was named before.

    Raises ConfigError for columns that cannot be named, StoreError for a run that has settings.
    """
    if not run.is_own or run.settings.exists() or (run.desk / _FIRST).exists():
        raise StoreError("this run has settings already")
    if wrong := [
        name for pair in (columns or {}).items() for name in pair if set(name) & set(",=")
    ]:
        raise ConfigError(
            f"{wrong[0]!r}: a column with , or = in its name; name it otherwise in the file"
        )
    name = _from(workspace, run.desk)
    before = list(map(str, store.recalled(run.job(INIT).record).get("words", ())))
    chosen = model or before[before.index("--model") + 1]
    words = [
        "init",
        workspace.datum(run.data).path,
        "--out",
        f"{name}/{_FIRST}",
        "--json",
        str(_made(run, INIT)),
    ]
    words += ["--model", chosen]
    words += (
        ["--columns", ",".join(f"{ours}={theirs}" for ours, theirs in columns.items())]
        if columns
        else []
    )
    jobs.start(run.job(INIT), words, workspace.folder)


def settle(workspace: Workspace, run: Run) -> None:
    """Give what `init` wrote the run's own names, once it is there."""
    first = run.desk / _FIRST
    if (
        not run.is_own
        or run.settings.exists()
        or not first.exists()
        or jobs.is_running(run.job(INIT))
    ):
        return
    data = parsing.parse(first.read_text(encoding="utf-8"), YAML)
    plain = re.sub(r"[^\w-]+", "_", run.title).strip("_-")
    data["task"]["name"] = plain if plain not in ("", "default") else "task"
    workspace.write(run, data)


def start_look(workspace: Workspace, run: Run, name: str) -> None:
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


def read_job(run: Run, name: str) -> dict[str, Any]:
    """Return how a command stands (none, running, done, failed, stopped), what it said last, and its result if it is done."""
    if name not in (INIT, *LOOKS) and not _EXPORT.fullmatch(name):
        raise StoreError("no such command here")
    job = run.job(name)
    if not jobs.was_started(job):
        return {"state": "none", "why": "", "log": [], "result": None}
    lines = jobs.tail(job, 12)
    if jobs.is_running(job):
        return {"state": "running", "why": "", "log": lines, "result": None}
    made = _made(run, name)
    if made.exists() and (
        name in (INIT, *LOOKS) or made.stat().st_mtime_ns >= job.record.stat().st_mtime_ns
    ):
        stale = name in LOOKS and job.record.stat().st_mtime_ns < run.settings.stat().st_mtime_ns
        return {
            "state": "done",
            "why": "",
            "log": lines,
            "result": store.read_json(made),
            "stale": stale,
        }
    kind, line = jobs.last_word(job)
    how = "stopped" if kind == "stopped" else "failed"
    return {"state": how, "why": line or "it ended without a word", "log": lines, "result": None}


def stop_job(run: Run, name: str) -> dict[str, Any]:
    """Stop a command, and return how it stands."""
    known = read_job(run, name)
    if known["state"] == "running":
        jobs.stop(run.job(name))
    return read_job(run, name)


def _made(run: Run, name: str) -> Path:
    """Return the file that a command makes last."""
    return (
        export_folder(run, name) / "export.json"
        if name.startswith("export-")
        else run.desk / "jobs" / f"{name}.json"
    )


def _from(workspace: Workspace, path: Path) -> str:
    return path.relative_to(workspace.folder).as_posix()


# ---- the run itself


def can_change(run: Run) -> bool:
    """Tell whether a run's settings can still be changed: it has made nothing that rests on them."""
    return (
        run.is_own
        and not (run.folder / store.MANIFEST).exists()
        and not jobs.is_running(run.job(RUN))
    )


def begin(workspace: Workspace, run: Run, verb: Verb, minutes: int | None) -> None:
    """Begin a run, a comparison within so many minutes if they are given. Raises StoreError if it was begun before."""
    if not can_change(run):
        raise StoreError(
            "this run was begun already; go on with it, or make another with the same settings"
        )
    if minutes is not None and verb != "compare":
        raise ConfigError("minutes: a budget is for a comparison")
    workspace.values(run, workspace.text(run))
    command, *options = _COMMANDS[verb]
    words = [command, _from(workspace, run.settings), *options]
    words += ["--budget", f"{minutes}m", "--yes"] if minutes is not None else []
    jobs.start(run.job(RUN), words, workspace.folder)


def resume(workspace: Workspace, run: Run) -> None:
    """Resume a run that ended before its time. Raises StoreError if there is none."""
    if not can_resume(run):
        raise StoreError("there is nothing to go on with")
    words = [str(word) for word in store.recalled(run.job(RUN).record).get("words", ())]
    if "--resume" not in words:
        words.append("--resume")
    jobs.start(run.job(RUN), words, workspace.folder)


def stop(run: Run) -> None:
    """Ask the run to stop: it finishes its step and saves. Raises StoreError for a run that the page did not begin."""
    if not run.is_own:
        raise StoreError("this run was begun elsewhere; stop it there")
    jobs.stop(run.job(RUN))


def remove(workspace: Workspace, run: Run) -> None:
    """Remove a run and all that was made for it; a chat with it ends.

    Raises StoreError for one in the user's own folders, and while anything else is at work on it, from whatever terminal.
    """
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
    """Begin an export of an arm, and return the name of the command. Raises ConfigError for what is not there."""
    if to not in EXPORTS or quantization not in QUANTIZATIONS or arm not in list_arms(run):
        raise ConfigError(f"no export of {arm!r} to {to!r} ({quantization!r}) here")
    workspace.check_trusted(run)
    name = f"export-{arm}-{to}" + f"-{quantization}" * (to == "gguf")
    words = ["export", str(run.folder), "--to", to, "--arm", arm, "--quantization", quantization]
    words += [
        "--out",
        str(export_folder(run, name)),
    ]  # which takes the place of an earlier one once it is whole
    jobs.start(run.job(name), words, workspace.place(run))
    return name


def list_exports(run: Run) -> list[dict[str, Any]]:
    """Return every export that was begun, with how it stands, its folder and its files."""
    found = []
    for job in jobs.started_in(run.desk / "jobs"):
        if _EXPORT.fullmatch(job.name):
            folder = export_folder(run, job.name)
            state = read_job(run, job.name)
            found.append(
                {"name": job.name, **state, "folder": str(folder), "files": list_files(folder)}
            )
    return found


def export_folder(run: Run, name: str) -> Path:
    """Return where an export is written. Raises StoreError for a name that is none."""
    if not _EXPORT.fullmatch(name):
        raise StoreError("no such export here")
    return run.desk / "export" / name


def list_files(folder: Path) -> Sequence[dict[str, Any]]:
    """Return the files of a folder with their bytes."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        {"name": path.relative_to(folder).as_posix(), "size": path.stat().st_size} for path in found
    ]
