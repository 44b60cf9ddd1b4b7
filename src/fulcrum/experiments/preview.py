"""What a run will do, worked out with the tokenizer alone; no weights are loaded.

`check`, `mix` and `--dry-run` show it: rows, token lengths, the trainings to come with their
shares, the stream itself. The plans are those of `arm_data.resolve`, which the run uses too.
"""

import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fulcrum.config.arms import choose_from, largest_mixture, own_arm, sizes_of
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import Settings
from fulcrum.core import store
from fulcrum.core.types import Anchor, Example, IntArray, Message, Share
from fulcrum.data import anchor_template, encode, mix, run_data
from fulcrum.data.encode import PromptFormat
from fulcrum.data.run_data import RunData
from fulcrum.experiments.arm_data import ArmPlan, resolve
from fulcrum.model import download

SpanKind = Literal["prompt", "anchor", "trained", "end"]
Span = tuple[SpanKind, str]


@dataclass(frozen=True)
class Preview:
    """The rows of a run at one seed, and the model's tokenizer."""

    settings: Settings
    seed: int
    rows: RunData
    tokenizer: Any
    dev_apart: bool = True  # False for a comparison, whose dev rows are task rows


@dataclass(frozen=True)
class PlannedTraining:
    """One training to come."""

    arm: str
    size: int  # task rows
    repeats: int
    steps: int
    share: Share
    warnings: tuple[str, ...]  # advice on its mixture


def open_preview(
    settings: Settings, seed: int, chosen: Sequence[Arm] = (), *, dev_apart: bool = True
) -> Preview:
    """Read the data as a run of the arms `chosen` with this seed would.

    Raises ConfigError, DataError or ModelError.
    """
    candidates = choose_from(chosen, settings)
    tokenizer, context, facts = download.load_tokenizer(
        settings.model, settings.template, trust_remote_code=settings.trust_remote_code
    )
    if dev_apart:
        rows = run_data.prepare(settings, tokenizer, context, seed, choose_from=candidates)
    else:
        rows = run_data.of_seeds(
            settings,
            tokenizer,
            context,
            list(dict.fromkeys((seed, *settings.seeds))),
            mixed_rows=largest_mixture(settings),
            choose_from=candidates,
        )[0]
    rows = replace(rows, notes=(*facts, *rows.notes))
    return Preview(settings, seed, rows, tokenizer, dev_apart)


def trials(preview: Preview, chosen: Sequence[Arm]) -> list[PlannedTraining]:
    """Return every training on all rows of a size that may be chosen for the arms.

    It is at the preview's seed; untrained arms have none.
    """
    settings = preview.settings
    batch = settings.train.batch_size
    trainings = []
    for arm in chosen:
        if not arm.trained:
            continue
        sizes: tuple[int, ...] = (preview.rows.longest,)
        if not preview.dev_apart:
            sizes = sizes_of(settings, arm, preview.rows.longest)
        for size in sizes:
            plan = resolve(arm, preview.rows.at(size), settings)
            for repeats in dict.fromkeys(trial.repeats for trial in plan.trials):
                stream = plan.stream(preview.tokenizer, repeats, preview.seed)
                advice = tuple(mix.warnings(stream.plan, batch))
                steps = stream.steps(batch)
                trainings.append(
                    PlannedTraining(arm.name, size, repeats, steps, stream.share(), advice)
                )
    return trainings


def lengths(preview: Preview) -> Mapping[str, IntArray]:
    """Return the number of tokens of every row, anchor and template included, by source.

    Sources without rows are missing.
    """
    sources = _sources(preview)
    for _, rows, form in sources:
        encode.encode_ahead(rows, form)
    counts: dict[str, IntArray] = {}
    for name, rows, form in sources:
        if rows:
            counts[name] = np.array([len(encode.encode(row, form)) for row in rows], np.int64)
    return counts


def _sources(preview: Preview) -> list[tuple[str, Sequence[Example], PromptFormat]]:
    """Return the name, rows and prompt format of each source of rows."""
    plain = encode.make_format(preview.tokenizer, None)
    sources: list[tuple[str, Sequence[Example], PromptFormat]] = []
    for task in preview.rows.tasks:
        form = encode.make_format(preview.tokenizer, task.anchor)
        sources.append((f"{task.name} train", task.train, form))
        sources.append((f"{task.name} dev", task.dev, form))
        sources.append((f"{task.name} test", task.test, form))
    sources.append(("general", preview.rows.general, plain))
    for name, rows in preview.rows.held_out.items():
        sources.append((f"held out: {name}", rows, plain))
    return sources


def facts(preview: Preview, trainings: Sequence[PlannedTraining], rows: int) -> dict[str, Any]:
    """Return what `check` shows, as plain values for other programs.

    These are `rows` rows of each task and one general row, cut into spans; the rows' tokens; the
    trainings to come; and why rows were not used.
    """
    plain = encode.make_format(preview.tokenizer, None)
    shown = []
    for task in preview.rows.tasks:
        form = encode.make_format(preview.tokenizer, task.anchor)
        shown += [_shown(task.name, row, form) for row in task.train[:rows]]
    shown += [_shown("general", row, plain) for row in preview.rows.general[: min(rows, 1)]]
    tokens = []
    for name, counts in lengths(preview).items():
        tokens.append(
            {
                "source": name,
                "rows": len(counts),
                "median": int(np.median(counts)),
                "longest": int(counts.max()),
            }
        )
    return {
        "rows": shown,
        "tokens": tokens,
        "trainings": [asdict(training) for training in trainings],
        "left_out": dict(preview.rows.rejects),
        "notes": list(preview.rows.notes),
    }


def _shown(source: str, row: Example, form: PromptFormat) -> dict[str, Any]:
    return {"source": source, "origin": row.origin, "spans": spans(row, form)}


# Spans.


def spans(example: Example, form: PromptFormat) -> list[Span]:
    """Cut what the model sees into prompt, anchor, trained text and trained end tokens.

    The texts joined are the decoded row, special tokens included.
    """
    tokens = encode.encode(example, form)
    edges = np.flatnonzero(np.diff(tokens.loss_mask.astype(np.int8))) + 1
    n_end = len(form.end_ids)
    parts: list[Span] = []
    for start, stop in zip((0, *edges), (*edges, len(tokens)), strict=True):
        ids = tokens.ids[start:stop].tolist()
        if not tokens.loss_mask[start]:
            parts.append(("prompt", _decode(ids, form)))
        elif n_end and tuple(ids[-n_end:]) == form.end_ids:
            parts.append(("trained", _decode(ids[:-n_end], form)))
            parts.append(("end", _decode(ids[-n_end:], form)))
        else:
            parts.append(("trained", _decode(ids, form)))
    return _mark_anchor(parts, form.anchor)


def _decode(ids: Sequence[int], form: PromptFormat) -> str:
    return str(
        form.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _mark_anchor(parts: list[Span], anchor: Anchor | None) -> list[Span]:
    """Cut the anchor out of the prompt that holds it: the first or last one, by its placement."""
    if anchor is None:
        return parts
    text = anchor.text
    if anchor.placement == "response_prefix":
        text = text.rstrip()
    places = [k for k, (kind, part) in enumerate(parts) if kind == "prompt" and text in part]
    if not places:  # a tokenizer that does not decode to the text that it encoded
        return parts
    if anchor.placement in ("system", "user_prefix"):
        place = places[0]
        before, _, after = parts[place][1].partition(text)
    else:
        place = places[-1]
        before, _, after = parts[place][1].rpartition(text)
    marked = parts[:place]
    if before:
        marked.append(("prompt", before))
    marked.append(("anchor", text))
    if after:
        marked.append(("prompt", after))
    return marked + parts[place + 1 :]


# The stream, for other trainers.


def stream_rows(preview: Preview, repeats: int) -> Iterator[dict[str, Any]]:
    """Give the stream of the settings' own arm in training order, one plain dict a position.

    `repeat` counts from 0 how often the row was shown before. Messages carry the anchor, and
    ``weight: 0`` if an answer is not trained.
    """
    arm = _own_plan(preview)
    stream = arm.stream(preview.tokenizer, repeats, preview.seed)
    plan = stream.plan
    bare = stream.is_bare(0, len(plan))
    task_rows = [(task.name, row) for task in preview.rows.tasks for row in task.train]
    shown: Counter[int] = Counter()
    for position, (is_task, row) in enumerate(zip(*plan.slice(0, len(plan)), strict=True)):
        task: str | None = None
        anchor: Anchor | None = None
        if is_task:
            task, example = task_rows[row]
            if not bare[position]:
                anchor = arm.train_anchors[task]
        else:
            example = arm.general_rows[row]
        yield {
            "position": position,
            "source": "task" if is_task else "general",
            "task": task,
            "origin": example.origin,
            "repeat": shown[row] if is_task else 0,
            "messages": _plain_messages(example, anchor),
        }
        if is_task:
            shown[int(row)] += 1


def stream_facts(preview: Preview, repeats: int) -> dict[str, Any]:
    """Return what belongs to a stream besides its rows: its order, the task's shares, its steps."""
    own = _own_plan(preview)
    batch = preview.settings.train.batch_size
    stream = own.stream(preview.tokenizer, repeats, preview.seed)
    anchors = {}
    for task in preview.rows.tasks:
        anchors[task.name] = None if task.anchor is None else asdict(task.anchor)
    return {
        "arm": own.arm.name,
        "plan": asdict(stream.plan),
        "plan_sha256": stream.plan.fingerprint,
        "share": asdict(stream.share()),
        "batch_size": batch,
        "steps": stream.steps(batch),
        "anchors": anchors,
    }


def write_stream(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], file: Path) -> None:
    """Write stream rows and their facts, atomically, as Parquet or JSON lines by the file's name.

    Parquet holds `facts` in its metadata; of JSON lines they are in a file next to them. Raises
    StoreError.
    """
    if file.suffix != ".parquet":
        store.write_jsonl(file, rows)
        store.write_json(file.with_suffix(".facts.json"), facts)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(list(rows))
    table = table.replace_schema_metadata({"fulcrum": json.dumps(store.plain(facts))})
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    store.write_bytes(file, buffer.getvalue())


def _own_plan(preview: Preview) -> ArmPlan:
    return resolve(own_arm(preview.settings), preview.rows, preview.settings)


def _plain_messages(example: Example, anchor: Anchor | None) -> list[dict[str, Any]]:
    messages = example.messages
    if anchor_template.last_answer_only(anchor):
        untrained = [replace(message, train=False) for message in messages[:-1]]
        messages = (*untrained, messages[-1])
    return [_plain_message(message) for message in anchor_template.apply(messages, anchor)]


def _plain_message(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "assistant" and not message.train:
        plain["weight"] = 0
    return plain
