"""What a run folder, and the commands at work for it, tell whoever looks on: state, losses, result; as plain values.

Everything comes from files (`events.jsonl`, `results.json`, certificates, logs), so that a run can be watched which nobody here
started. Nothing is written, and a file that is half there is read up to its last whole line.
"""

import json
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fulcrum import certificate_page, jobs, report, store, summary, wording
from fulcrum.errors import FulcrumError
from fulcrum.workspace import Run

INIT = "init"  # the name of the command that reads the data
RUN = "run"  # of the one that trains
State = Literal["planned", "running", "stopped", "failed", "finished"]
_MOST_BYTES = 2**20  # of events told at once
_OVERALL = re.compile(r"comparison: ([\d,]+)/([\d,]+), (\S+) left")
_KILLED = "it ended without a word: it was killed, or the machine went down; what was finished is kept"


def state(run: Run) -> tuple[State, str]:
    """A run's state, and for one that failed the line that says why."""
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
        isnt_read = not run.settings.exists() and jobs.was_started(first) and not jobs.is_running(first)
        why = jobs.last_word(first)[1] if isnt_read else ""
        return ("failed", why) if why else ("planned", "")
    kind, line = jobs.last_word(job)
    return ("stopped", "") if kind == "stopped" else ("failed", line or _KILLED)


def _is_held(folder: Path) -> bool:
    """Whether the process that took a run folder is at work. Looking for its lock would hold the lock for a moment."""
    owner = store.recalled(folder / ".owner.json")
    pid = owner.get("pid")
    if owner.get("host") != platform.node() or not isinstance(pid, int):
        return False
    return jobs.began(pid) is not None


def can_resume(run: Run) -> bool:
    """Whether going on is possible: an own run that ended before its time."""
    return run.is_own and jobs.was_started(run.job(RUN)) and state(run)[0] in ("stopped", "failed")


def card(run: Run) -> dict[str, Any]:
    """A line of the list of runs."""
    found, why = state(run)
    verb = _verb(run)
    return {
        "id": run.id, "title": run.title, "own": run.is_own, "state": found, "why": why, "verb": verb,
        "made": datetime.fromtimestamp(run.made, UTC).isoformat(timespec="seconds"),
        "report": (run.folder / certificate_page.REPORT).is_file(), "set": run.settings.is_file(),
        "folder": str(run.folder),
    }  # fmt: skip


def _verb(run: Run) -> str:
    if run.is_own:
        words = store.recalled(run.job(RUN).record).get("words")
        return " ".join(word for word in words if word in ("train", "compare", "--quick")) if isinstance(words, list) else ""
    return str(store.recalled(run.folder / store.MANIFEST).get("kind", ""))


def watched(run: Run, after: int) -> dict[str, Any]:
    """What is new since the byte `after` of the run's log of events, where that log ends now, and what its command says."""
    points, end = _events(run.folder / store.EVENTS, after)
    lines = jobs.tail(run.job(RUN))
    overall = next((match for line in reversed(lines) if (match := _OVERALL.search(line))), None)
    found, why = state(run)
    return {
        "state": found, "why": why, "points": points, "end": end, "log": lines[-60:], "resumable": can_resume(run),
        "asked": jobs.was_asked(run.job(RUN)),
        "overall": None if overall is None else {"done": _number(overall[1]), "all": _number(overall[2]), "left": overall[3]},
    }  # fmt: skip


def _number(text: str) -> int:
    return int(text.replace(",", ""))


def _events(file: Path, after: int) -> tuple[list[dict[str, Any]], int]:
    """Whole lines from a byte on. A log that is shorter than that byte was begun anew and is told from its beginning."""
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


def result(run: Run) -> dict[str, Any]:
    """What a finished run says: a sentence and tables, the arms that can be used, the certificates' verdicts.

    Raises StoreError where its files were changed.
    """
    certificates = certificate_page.find(run.folder)
    results = report.load(run.folder) if not report.has_certificate_only(run.folder) else None
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
    grids = [] if results is None else _grids(results, certified=bool(certificates))
    said = "" if results is None or certificates or results["kind"] in ("scale", "quanta") else summary.headline(results)
    return {
        "verdicts": verdicts, "said": said, "notes": [] if results is None else list(dict.fromkeys(results["notes"])),
        "tables": grids, "arms": arms(run), "folder": str(run.folder),
        "report": (run.folder / certificate_page.REPORT).is_file(), "certificate": bool(certificates),
        "seconds": None if results is None else results["seconds"],
    }  # fmt: skip


def _grids(results: Mapping[str, Any], *, certified: bool) -> list[dict[str, Any]]:
    grids = [summary.score_grid(results, facts["name"]) for facts in results["tasks"]]
    if not certified:
        grids += [summary.difference_grid(results, first_metric_only=True), summary.forgetting_grid(results)]
    return [{"title": grid.title, "head": grid.head, "rows": grid.rows} for grid in grids if grid.rows]


def arms(run: Run) -> list[str]:
    """The arms of which the run kept an adapter."""
    several = run.folder / "adapters"
    if several.is_dir():
        return sorted(path.name for path in several.iterdir() if (path / "adapter_config.json").is_file())
    if not (run.folder / "adapter" / "adapter_config.json").is_file():
        return []
    try:
        names = [str(arm["arm"]) for arm in report.load(run.folder)["arms"] if arm.get("training") is not None]
    except (FulcrumError, KeyError, TypeError, AttributeError):
        return []
    return names[:1]
