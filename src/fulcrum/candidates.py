"""Anchors of a task: proposed, scored on the frozen model, one chosen; what `anchor: auto` and `fulcrum anchor` do.

What is proposed and scored comes of training rows alone, those of the first seed's smallest size in a comparison; no anchor is
scored on a row that it was made from.
"""

import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fulcrum import adapter, anchor_scores, encode, generate, material, model, propose, selfgen, store
from fulcrum.anchor_scores import Candidate
from fulcrum.config import Arm, Settings
from fulcrum.endpoint import Endpoint
from fulcrum.errors import ConfigError, DataError, StoreError
from fulcrum.model import LoadedModel
from fulcrum.progress import ProgressListener
from fulcrum.records import Anchor, AnchorScores, Example, Placement, Task
from fulcrum.sections import GeneralSource

COUNT = 12  # proposals, half of them templates
FEWEST = 8  # training rows that anchors can be scored on
Source = Literal["template", "model", "endpoint"]

_TRIES = 4  # of each written proposal
_WRITTEN_TOKENS = 96
_TEMPERATURE = 0.7  # at 1 small models write nonsense; each is shown other rows anyway
_SHOWN = (5, 8)  # rows in a prompt that asks for an anchor: at least, at most


def proposals(
    task: Task, placement: Placement, loaded: LoadedModel, *, wanted: int = COUNT, seed: int = 0,
    by: Sequence[Source] = ("template", "model"), endpoint: Endpoint | None = None, progress: ProgressListener | None = None,
) -> tuple[list[Candidate], dict[str, int]]:  # fmt: skip
    """Up to `wanted` anchors for a task, from every source in turn, and those that were none by reason.

    Templates are filled from its training rows; whoever writes sees `propose.shown` of these. Fewer come back where a small
    model writes nothing better.
    """
    rows = task.train
    form = encode.make_format(loaded.tokenizer, None)
    found: dict[str, Candidate] = {}
    left_out = Counter[str]()

    def take(texts: Sequence[str], source: Source, most: int) -> None:
        for text in texts:
            anchor = Anchor(text, placement)
            reason = propose.fault(anchor, rows, form, written=source != "template")
            reason = reason or ("proposed twice" if text in found else None) or (
                "refusal" if source != "template" and selfgen.refuses(text) else None
            )  # fmt: skip
            if reason is not None:
                left_out[f"{source}: {reason}"] += 1
            elif len(found) < most:
                found[text] = Candidate(anchor, source)

    for place, source in enumerate(by, 1):
        most = -(-wanted * place // len(by))
        if source == "template":
            take(propose.templates(rows, task.name, placement), source, most)
            continue
        for attempt in range(_TRIES):
            if len(found) >= most:
                break
            number = most - len(found)
            asked = _questions(rows, placement, number, store.seed_for(seed, f"anchors {attempt}"))
            if source == "endpoint":
                if endpoint is None:
                    raise ConfigError("anchors by an endpoint need its address and model; give --endpoint and --endpoint-model")
                said = [
                    endpoint.say(one, _WRITTEN_TOKENS, _TEMPERATURE, seed + k, whole=True) or "" for k, one in enumerate(asked)
                ]
            else:
                said = generate.generate(
                    loaded, [encode.prompt_ids(one, form) for one in asked], form, max_new_tokens=_WRITTEN_TOKENS,
                    batch_tokens=4096, sample=store.seed_for(seed, f"anchors written {attempt}"), temperature=_TEMPERATURE,
                )  # fmt: skip
            take([propose.cleaned(text, placement) for text in said], source, most)
            if progress is not None:
                progress.count(f"anchors by the {source}", min(len(found), most), most)
    return list(found.values()), dict(left_out)


def _questions(rows: Sequence[Example], placement: Placement, count: int, seed: int) -> list[Any]:
    """Prompts that ask for an anchor, each with other rows or in another order."""
    rng, known = np.random.default_rng(seed), propose.shown(rows)
    least, most = (min(number, len(known)) for number in _SHOWN)
    picks = [rng.permutation(len(known))[: int(rng.integers(least, most + 1))] for _ in range(count)]
    return [propose.question([known[k] for k in pick], placement) for pick in picks]


def scored(
    candidates: Sequence[Candidate], task: Task, tasks: Sequence[Task], general: Sequence[Example], loaded: LoadedModel,
    settings: Settings, *, seed: int, left_out: dict[str, int], started: float, choose: bool, progress: ProgressListener,
) -> AnchorScores:  # fmt: skip
    """Scores of candidates and controls on training rows that no proposal was made from, and (`choose`) which is chosen.

    Another of the `tasks` lends its anchor as a control. Raises DataError where too few rows are left, or no candidate is.
    """
    left = to_score(task)
    if not _enough(left):
        raise DataError(
            f"{task.name}: anchors are scored on training rows that none was made from; {len(left)} of {len(task.train)} are "
            f"left ({len({row.group for row in left})} content groups); {FEWEST} are needed: write the anchor by hand, or add "
            "rows"
        )
    if not candidates:
        why = ", ".join(f"{count} × {reason}" for reason, count in left_out.items())
        raise DataError(f"{task.name}: no anchor to score; proposals were none, by reason: {why}; write one by hand")
    other = next((one.anchor.text for one in tasks if one.anchor is not None and one.name != task.name), None)
    every = [*candidates, *anchor_scores.controls(candidates, loaded, other, seed)]
    found = anchor_scores.score(
        every, left, general, loaded, settings.train, seed=seed, count=partial(progress.count, anchor_scores.LABEL)
    )
    ordered = anchor_scores.chosen_first(found, anchor_scores.choose(found) if choose else -1)
    return AnchorScores(
        task.name, ordered, min(len(left), anchor_scores.LOSS_ROWS), min(len(general), anchor_scores.GENERAL_ROWS), left_out,
        time.perf_counter() - started,
    )  # fmt: skip


def to_score(task: Task) -> list[Example]:
    """The training rows of a task that no anchor is made from."""
    return list(task.train[len(propose.shown(task.train)) :])


def _enough(rows: Sequence[Example]) -> bool:
    return len(rows) >= FEWEST and len({row.group for row in rows}) > 1


def resolve(
    settings: Settings, *, compared: bool, resume: bool, progress: ProgressListener
) -> tuple[Settings, tuple[AnchorScores, ...]]:
    """The settings with every `anchor: auto` settled, and the scores of all anchors in play where there are several (those of a
    file's own arms among them); read back where a run is resumed.

    Raises ConfigError, DataError or ModelError.
    """
    own = own_anchors(settings) if compared else []
    wanting = [task.name for task in settings.tasks if task.anchor is not None and task.anchor.is_auto]
    if not wanting and not own:
        return settings, ()
    if wanting and compared:
        settings.refuse_choosing_by("task.anchor: auto", "anything", "use one seed, write an anchor")
    folder = Path(settings.output_dir)
    if (folder / store.ANCHORS).exists():
        found = store.read_as(folder / store.ANCHORS, tuple[AnchorScores, ...])
        _same_question(settings, found, folder)
        return settled(settings, found), found
    progress.stage("anchors: proposed and scored, before any training")
    loaded, tasks, general, seed = rows_to_score(settings, compared=compared)
    result = []
    for task in tasks:
        started, given = time.perf_counter(), next(one.anchor for one in settings.tasks if one.name == task.name)
        candidates = [Candidate(task.anchor, "given")] if task.anchor is not None else []
        candidates += [Candidate(anchor, f"given: arm {name}") for name, anchor in own if anchor != task.anchor]
        left_out: dict[str, int] = {}
        if given is not None and given.is_auto:
            candidates += [Candidate(Anchor(text, given.placement), "given") for text in given.candidates]
            made, left_out = proposals(task, given.placement, loaded, seed=seed, progress=progress)
            candidates += made
        elif not candidates or not _enough(to_score(task)):  # nothing hangs on these scores
            progress.stage(f"{task.name}: its anchors are not scored, which takes {FEWEST} training rows and an anchor")
            continue
        result.append(
            scored(
                candidates, task, tasks, general, loaded, settings, seed=seed, left_out=left_out, started=started,
                choose=given is not None and given.is_auto,
                progress=progress,
            )
        )  # fmt: skip
    adapter.drop_adapter(loaded)
    return settled(settings, result), tuple(result)


def _same_question(settings: Settings, found: Sequence[AnchorScores], folder: Path) -> None:
    """Raise StoreError where other candidates are asked for than the run scored: its manifest says what was settled only."""
    scored_texts = {each.task: {one.text for one in each.scores if one.source == "given"} for each in found}
    for task in settings.tasks:
        if task.anchor is not None and task.anchor.is_auto and scored_texts.get(task.name) != set(task.anchor.candidates):
            raise StoreError(
                f"{folder}: cannot resume, the candidates of {task.name}'s anchor changed since it started; undo that, or "
                "begin another run beside it (--force-new)"
            )


def rows_to_score(settings: Settings, *, compared: bool) -> tuple[LoadedModel, tuple[Task, ...], tuple[Example, ...], int]:
    """The model, the tasks with the training rows that may be seen, general rows, and the seed that drew them."""
    loaded = model.load(settings.model, settings.train, trust_remote_code=settings.trust_remote_code)
    tasks = tuple(
        task.model_copy(update={"anchor": None}) if task.anchor is not None and task.anchor.is_auto else task
        for task in settings.tasks
    )
    ratio = settings.mix.general_per_task or 4.0  # a run without general data is scored beside the packaged ones
    mixed = settings.mix.model_copy(update={"general_per_task": ratio, "select": "random"})
    general = settings.general or (GeneralSource(path="builtin"),)
    drawn = settings.model_copy(update={"tasks": tasks, "general": general, "mix": mixed})
    seed = settings.seeds[0] if compared else settings.seed
    most = _smallest(settings) if compared else None
    rows = material.prepare(
        drawn, loaded.tokenizer, loaded.context, seed, dev_apart=not compared, by_fold=compared, mixed_rows=most
    )
    return loaded, (rows.at(most) if most else rows).tasks, rows.general, seed


def _smallest(settings: Settings) -> int | None:
    """The fewest task rows that an arm of a comparison is given; None where all are given all."""
    sizes = [*(settings.compare.sizes or ()), *(size for each in settings.compare.sizes_of.values() for size in each)]
    return min(sizes, default=None)


def own_anchors(settings: Settings) -> list[tuple[str, Anchor]]:
    """The anchors that a file's own arms have, by the arm's name."""
    arms = [arm for arm in settings.compare.arms if isinstance(arm, Arm)]
    return [(arm.name, arm.anchor.value) for arm in arms if arm.anchor is not None]


def settled(settings: Settings, found: Sequence[AnchorScores]) -> Settings:
    """The settings with the chosen texts in place of `auto`."""
    chosen = {each.task: score for each in found for score in each.scores if score.chosen}
    tasks = tuple(
        task.model_copy(update={"anchor": task.anchor.model_copy(update={"text": chosen[task.name].text, "candidates": ()})})
        if task.anchor is not None and task.anchor.is_auto else task
        for task in settings.tasks
    )  # fmt: skip
    return settings.model_copy(update={"tasks": tasks})


def keep(found: Sequence[AnchorScores], folder: Path | None) -> list[str]:
    """Write the scores beside the run that they settled, and say what was chosen."""
    if found and folder is not None:
        store.write_json(folder / store.ANCHORS, found)
    return [sentence(each) for each in found if any(score.chosen for score in each.scores)]


def sentence(found: AnchorScores) -> str:
    """What was chosen, in a sentence."""
    chosen = next(score for score in found.scores if score.chosen)
    none = next(score for score in found.scores if score.source == "control: none")
    own = [score for score in found.scores if not score.is_control]
    floor = "" if chosen.separates else ", though none sets the task apart from general prompts better than no anchor does"
    worse = "; no anchor at all has a lower loss" if none.loss < chosen.loss else ""
    return (
        f"{found.task}: of {len(own)} anchors {chosen.text!r} ({chosen.source}) is chosen, by its loss before training, "
        f"{chosen.loss:.3f} nats per answer token on {found.rows} training rows ({none.loss:.3f} without anchor)"
        f"{floor}{worse}. {found.seconds:.0f} s."
    )
