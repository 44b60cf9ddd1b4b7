"""Propose anchors of a task, score them on the frozen model, and choose one.

This is what `anchor: auto` and `fulcrum anchor` do. All of it sees training rows only, in a
comparison those of the first seed's smallest size; no anchor is scored on a row that it was made
from.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from fulcrum.anchors import propose
from fulcrum.anchors import score as scoring
from fulcrum.anchors.score import Candidate
from fulcrum.config.base import AnchorSettings
from fulcrum.config.experiments import Arm
from fulcrum.config.sections import TaskSettings
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError, StoreError
from fulcrum.core.progress import ProgressListener
from fulcrum.core.types import Anchor, AnchorScores, Example, Message, Placement, Task
from fulcrum.data import encode, run_data
from fulcrum.model import adapter, base_model, generate
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.endpoint import Endpoint

COUNT = 12  # proposals, half of them templates
FEWEST = 8  # training rows that anchors can be scored on
Source = Literal["template", "model", "endpoint"]

_TRIES = 4  # of each written proposal
_WRITTEN_TOKENS = 96
_TEMPERATURE = 0.7  # at 1 small models write nonsense; each is shown other rows anyway
_SHOWN = (5, 8)  # rows in a prompt that asks for an anchor: at least, at most


@dataclass(frozen=True)
class AnchorData:
    """What anchors are proposed from and scored on."""

    loaded: LoadedModel
    tasks: tuple[Task, ...]  # with the training rows that may be seen
    seed: int


def load_data(settings: Settings, *, compared: bool) -> AnchorData:
    """Load the model and the training rows: in a comparison the first seed's smallest size."""
    loaded = base_model.load_for(settings)
    tasks = []
    for task in settings.tasks:
        if _is_auto(task):
            task = task.model_copy(update={"anchor": None})
        tasks.append(task)
    drawn = settings.model_copy(update={"tasks": tuple(tasks), "general": ()})
    seed = settings.seeds[0] if compared else settings.seed
    rows = run_data.prepare(drawn, loaded.tokenizer, loaded.context, seed, dev_apart=not compared)
    size = _smallest_size(settings) if compared else None
    if size is not None:
        rows = rows.at(size)
    return AnchorData(loaded, rows.tasks, seed)


def propose_anchors(
    task: Task,
    placement: Placement,
    data: AnchorData,
    *,
    wanted: int = COUNT,
    by: Sequence[Source] = ("template", "model"),
    endpoint: Endpoint | None = None,
    progress: ProgressListener | None = None,
) -> tuple[list[Candidate], dict[str, int]]:
    """Return up to `wanted` anchors for a task, from each source in turn, and rejects by reason.

    Templates are filled from the task's training rows; a model that writes sees
    `propose.source_rows` of these. Fewer come back if a small model writes nothing better.
    """
    rows = task.train
    proposals = _Proposals(rows, placement, encode.make_format(data.loaded.tokenizer, None))
    for place, source in enumerate(by, 1):
        limit = -(-wanted * place // len(by))
        if source == "template":
            proposals.add(propose.templates(rows, task.name, placement), source, limit)
            continue
        for attempt in range(_TRIES):
            missing = limit - len(proposals.accepted)
            if missing <= 0:
                break
            row_seed = store.seed_for(data.seed, f"anchors {attempt}")
            questions = _questions(rows, placement, missing, row_seed)
            if source == "endpoint":
                texts = _ask_endpoint(endpoint, questions, data.seed)
            else:
                token_seed = store.seed_for(data.seed, f"anchors written {attempt}")
                texts = _ask_model(data.loaded, questions, proposals.form, token_seed)
            proposals.add([propose.clean(text, placement) for text in texts], source, limit)
            if progress is not None:
                done = min(len(proposals.accepted), limit)
                progress.count(f"anchors by the {source}", done, limit)
    return list(proposals.accepted.values()), dict(proposals.rejects)


def score_candidates(
    candidates: Sequence[Candidate],
    task: Task,
    data: AnchorData,
    *,
    rejects: dict[str, int],
    started: float,
    choose: bool,
    progress: ProgressListener,
) -> AnchorScores:
    """Score candidates and controls on training rows that no proposal was made from.

    With `choose`, one is chosen. Another task lends its anchor as a control. `started` is when
    proposing began, on the clock of `time.perf_counter`. Raise DataError if too few rows are left,
    or there is no candidate.
    """
    rows = rows_left(task)
    if not _is_enough(rows):
        groups = len({row.group for row in rows})
        raise DataError(
            f"{task.name}: anchors are scored on training rows that none was made from; "
            f"{len(rows)} of {len(task.train)} are left ({groups} content groups); {FEWEST} are "
            "needed: write the anchor by hand, or add rows"
        )
    if not candidates:
        why = ", ".join(f"{count} × {reason}" for reason, count in rejects.items())
        raise DataError(
            f"{task.name}: no anchor to score; proposals were none, by reason: {why}; write one by "
            "hand"
        )
    other_text = None
    for other in data.tasks:
        if other.anchor is not None and other.name != task.name:
            other_text = other.anchor.text
            break
    every = [*candidates, *scoring.controls(candidates, data.loaded, other_text, data.seed)]
    count = partial(progress.count, scoring.LABEL)
    scores = scoring.score(every, rows, data.loaded, seed=data.seed, count=count)
    chosen = scoring.choose(scores) if choose else None
    return AnchorScores(
        task=task.name,
        scores=scoring.sort_scores(scores, chosen),
        rows=min(len(rows), scoring.MAX_ROWS),
        left_out=rejects,
        seconds=time.perf_counter() - started,
    )


def rows_left(task: Task) -> list[Example]:
    """Return the training rows of a task that no anchor is made from."""
    return list(task.train[len(propose.source_rows(task.train)) :])


def resolve(
    settings: Settings, *, compared: bool, progress: ProgressListener
) -> tuple[Settings, tuple[AnchorScores, ...]]:
    """Return the settings with a chosen text for every `anchor: auto`, and the scores behind it.

    Anchors of a comparison's own arms are scored too. A run that is resumed reads its scores back.
    Raise ConfigError, DataError or ModelError.
    """
    own = own_anchors(settings) if compared else []
    is_any_auto = any(_is_auto(task) for task in settings.tasks)
    if not is_any_auto and not own:
        return settings, ()
    if is_any_auto and compared:
        settings.refuse_choosing_by(
            "task.anchor: auto", "anything", "use one seed, write an anchor"
        )
    folder = Path(settings.output_dir)
    if (folder / store.ANCHORS).exists():
        stored = store.read_as(folder / store.ANCHORS, tuple[AnchorScores, ...])
        _check_same_candidates(settings, stored, folder)
        return settle(settings, stored), stored
    progress.stage("anchors: proposed and scored, before any training")
    data = load_data(settings, compared=compared)
    result = []
    for task, given in zip(data.tasks, settings.tasks, strict=True):
        started = time.perf_counter()
        auto = given.anchor if _is_auto(given) else None
        candidates = _given_candidates(task, auto, own)
        rejects: dict[str, int] = {}
        if auto is not None:
            proposed, rejects = propose_anchors(task, auto.placement, data, progress=progress)
            candidates += proposed
        elif not candidates or not _is_enough(rows_left(task)):  # nothing depends on these scores
            progress.stage(
                f"{task.name}: its anchors are not scored, which takes {FEWEST} training rows and "
                "an anchor"
            )
            continue
        scores = score_candidates(
            candidates,
            task,
            data,
            rejects=rejects,
            started=started,
            choose=auto is not None,
            progress=progress,
        )
        result.append(scores)
    adapter.drop_adapter(data.loaded)
    return settle(settings, result), tuple(result)


def own_anchors(settings: Settings) -> list[tuple[str, Anchor]]:
    """Return the anchors that a file's own arms have, with the arm's name."""
    arms = [arm for arm in settings.compare.arms if isinstance(arm, Arm)]
    return [(arm.name, arm.anchor.value) for arm in arms if arm.anchor is not None]


def settle(settings: Settings, scores: Sequence[AnchorScores]) -> Settings:
    """Return the settings with the chosen texts in place of `auto`."""
    chosen = {}
    for each in scores:
        for score in each.scores:
            if score.chosen:
                chosen[each.task] = score.text
    tasks = []
    for task in settings.tasks:
        if task.anchor is not None and task.anchor.is_auto:
            change = {"text": chosen[task.name], "candidates": ()}
            anchor = task.anchor.model_copy(update=change)
            task = task.model_copy(update={"anchor": anchor})
        tasks.append(task)
    return settings.model_copy(update={"tasks": tuple(tasks)})


def keep(scores: Sequence[AnchorScores], folder: Path | None) -> list[str]:
    """Write the scores into the run's folder; return a note on each anchor that was chosen."""
    if scores and folder is not None:
        store.write_json(folder / store.ANCHORS, scores)
    notes = []
    for each in scores:
        if any(score.chosen for score in each.scores):
            notes.append(sentence(each))
    return notes


def sentence(scores: AnchorScores) -> str:
    """Say what was chosen, in a sentence."""
    chosen = next(score for score in scores.scores if score.chosen)
    none = next(score for score in scores.scores if score.source == "control: none")
    count = sum(not score.is_control for score in scores.scores)
    worse = "; no anchor at all has a lower loss" if none.loss < chosen.loss else ""
    return (
        f"{scores.task}: of {count} anchors {chosen.text!r} ({chosen.source}) is chosen, by its "
        f"loss before training, {chosen.loss:.3f} nats per answer token on {scores.rows} training "
        f"rows ({none.loss:.3f} without anchor){worse}. {scores.seconds:.0f} s."
    )


def _smallest_size(settings: Settings) -> int | None:
    """Return the fewest task rows that an arm of a comparison gets; None if every arm gets all."""
    sizes = list(settings.compare.sizes or ())
    for own in settings.compare.sizes_of.values():
        sizes += own
    return min(sizes, default=None)


class _Proposals:
    """The proposed texts that are anchors, and the rejects by reason."""

    def __init__(
        self, rows: Sequence[Example], placement: Placement, form: encode.PromptFormat
    ) -> None:
        self.rows = rows
        self.placement = placement
        self.form = form
        self.accepted: dict[str, Candidate] = {}
        self.rejects = Counter[str]()

    def add(self, texts: Sequence[str], source: Source, limit: int) -> None:
        """Accept texts until there are `limit` of them, from this source and those before."""
        for text in texts:
            anchor = Anchor(text, self.placement)
            reason = propose.fault(anchor, self.rows, self.form, written=source != "template")
            if reason is None and text in self.accepted:
                reason = "proposed twice"
            if reason is not None:
                self.rejects[f"{source}: {reason}"] += 1
            elif len(self.accepted) < limit:
                self.accepted[text] = Candidate(anchor, source)


def _questions(
    rows: Sequence[Example], placement: Placement, count: int, seed: int
) -> list[tuple[Message, ...]]:
    """Return prompts that ask for an anchor, each with other rows or in another order."""
    rng = np.random.default_rng(seed)
    source = propose.source_rows(rows)
    fewest = min(_SHOWN[0], len(source))
    limit = min(_SHOWN[1], len(source))
    questions = []
    for _ in range(count):
        picks = rng.permutation(len(source))[: int(rng.integers(fewest, limit + 1))]
        questions.append(propose.question([source[k] for k in picks], placement))
    return questions


def _ask_endpoint(
    endpoint: Endpoint | None, questions: Sequence[tuple[Message, ...]], seed: int
) -> list[str]:
    if endpoint is None:
        raise ConfigError(
            "anchors by an endpoint need its address and model; give --endpoint and "
            "--endpoint-model"
        )
    texts = []
    for k, question in enumerate(questions):
        text = endpoint.say(question, _WRITTEN_TOKENS, _TEMPERATURE, seed + k, whole=True)
        texts.append(text or "")
    return texts


def _ask_model(
    loaded: LoadedModel,
    questions: Sequence[tuple[Message, ...]],
    form: encode.PromptFormat,
    seed: int,
) -> list[str]:
    return generate.generate(
        loaded,
        [encode.prompt_ids(question, form) for question in questions],
        form,
        max_new_tokens=_WRITTEN_TOKENS,
        batch_tokens=4096,
        decoding=generate.Decoding(seed, _TEMPERATURE),
    )


def _is_enough(rows: Sequence[Example]) -> bool:
    return len(rows) >= FEWEST and len({row.group for row in rows}) > 1


def _is_auto(task: TaskSettings) -> bool:
    return task.anchor is not None and task.anchor.is_auto


def _given_candidates(
    task: Task, auto: AnchorSettings | None, own: Sequence[tuple[str, Anchor]]
) -> list[Candidate]:
    """Return the anchors that the settings hold for a task: its own, arms' and candidates."""
    candidates = []
    if task.anchor is not None:
        candidates.append(Candidate(task.anchor, "given"))
    for name, anchor in own:
        if anchor != task.anchor:
            candidates.append(Candidate(anchor, f"given: arm {name}"))
    if auto is not None:
        for text in auto.candidates:
            candidates.append(Candidate(Anchor(text, auto.placement), "given"))
    return candidates


def _check_same_candidates(
    settings: Settings, stored: Sequence[AnchorScores], folder: Path
) -> None:
    """Raise StoreError if the run scored other candidates; its manifest holds only the chosen."""
    scored: dict[str, set[str]] = {}
    for each in stored:
        scored[each.task] = {one.text for one in each.scores if one.source == "given"}
    for task in settings.tasks:
        if task.anchor is None or not task.anchor.is_auto:
            continue
        if scored.get(task.name) != set(task.anchor.candidates):
            raise StoreError(
                f"{folder}: cannot resume, the candidates of {task.name}'s anchor changed since it "
                "started; undo that, or begin another run next to it (--force-new)"
            )
