"""What a run will do, worked out with the tokenizer alone: rows, token lengths, plans with their shares, the stream itself.

No weights are loaded, so this is what `check`, `mix` and `--dry-run` show. The plans are those of `arm_data.resolve`, not a
second account of them.
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
from fulcrum.data.encode import Format
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
    dev_apart: bool = True


@dataclass(frozen=True)
class PlannedTraining:
    """One training run to come. `warnings` are advice on its plan."""

    arm: str
    size: int
    repeats: int
    steps: int
    share: Share
    warnings: tuple[str, ...]


def open_preview(
    settings: Settings, seed: int, chosen: Sequence[Arm] = (), *, dev_apart: bool = True
) -> Preview:
    """Read the data as a run of the arms `chosen` with this seed would (`dev_apart` False: a comparison).

    Raises ConfigError, DataError or ModelError.
    """
    among = choose_from(chosen, settings)
    tokenizer, context = download.load_tokenizer(
        settings.model, trust_remote_code=settings.trust_remote_code
    )
    if dev_apart:
        rows = run_data.prepare(settings, tokenizer, context, seed, choose_from=among)
    else:
        seeds, most = list(dict.fromkeys((seed, *settings.seeds))), largest_mixture(settings)
        rows = run_data.of_seeds(
            settings, tokenizer, context, seeds, mixed_rows=most, choose_from=among
        )[0]
    return Preview(settings, seed, rows, tokenizer, dev_apart)


def trials(preview: Preview, chosen: Sequence[Arm]) -> list[PlannedTraining]:
    """Every training on all rows of a size that the arms may come to, at the preview's seed; none for untrained arms."""
    settings, found = preview.settings, []
    for arm in chosen:
        longest = preview.rows.longest
        sizes = (longest,) if preview.dev_apart else sizes_of(settings, arm, longest)
        for size in sizes if arm.trained else ():
            plan = resolve(arm, preview.rows.at(size), settings)
            for repeats in dict.fromkeys(trial.repeats for trial in plan.trials):
                stream = plan.stream(preview.tokenizer, repeats, preview.seed)
                batch = settings.train.batch_size
                advice = tuple(mix.warnings(stream.plan, batch))
                found.append(
                    PlannedTraining(
                        arm.name, size, repeats, stream.steps(batch), stream.share(), advice
                    )
                )
    return found


def lengths(preview: Preview) -> Mapping[str, IntArray]:
    """Tokens of every row by source, anchor and template included; a source without rows is left out."""
    rows, tokenizer = preview.rows, preview.tokenizer
    plain = encode.make_format(tokenizer, None)
    sources: list[tuple[str, Sequence[Example], Format]] = []
    for task in rows.tasks:
        form = encode.make_format(tokenizer, task.anchor)
        sources += [
            (f"{task.name} {part}", getattr(task, part), form) for part in ("train", "dev", "test")
        ]
    sources.append(("general", rows.general, plain))
    sources += [(f"held out: {name}", examples, plain) for name, examples in rows.held_out.items()]
    for _, examples, form in sources:
        encode.encode_ahead(examples, form)
    return {
        name: np.array([len(encode.encode(example, form)) for example in examples], dtype=np.int64)
        for name, examples, form in sources
        if examples
    }


def spans(example: Example, form: Format) -> list[Span]:
    """Cut what the model sees into the prompt, the anchor in it, trained text and the end tokens that are trained too.

    The texts joined are the decoded row, special tokens included.
    """
    tokens = encode.encode(example, form)
    edges = np.flatnonzero(np.diff(tokens.loss_mask.astype(np.int8))) + 1
    found: list[Span] = []
    for start, stop in zip((0, *edges), (*edges, len(tokens)), strict=True):
        ids = tokens.ids[start:stop].tolist()
        if not tokens.loss_mask[start]:
            found.append(("prompt", _decode(ids, form)))
            continue
        end = len(form.end_ids) if tuple(ids[-len(form.end_ids) :]) == form.end_ids else 0
        found.append(("trained", _decode(ids[: len(ids) - end], form)))
        found += [("end", _decode(ids[-end:], form))] if end else []
    return _mark_anchor(found, form.anchor)


def _decode(ids: Sequence[int], form: Format) -> str:
    return str(
        form.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    )


def _mark_anchor(found: list[Span], anchor: Anchor | None) -> list[Span]:
    """Cut the anchor out of the prompt part that holds it: the first for anchors that stand first, else the last."""
    if anchor is None:
        return found
    text = anchor.text.rstrip() if anchor.placement == "response_prefix" else anchor.text
    places = [i for i, (kind, part) in enumerate(found) if kind == "prompt" and text in part]
    if not places:  # a tokenizer that does not give back what it was given
        return found
    first = anchor.placement in ("system", "user_prefix")
    place = places[0] if first else places[-1]
    before, _, after = (
        found[place][1].partition(text) if first else found[place][1].rpartition(text)
    )
    parts: list[Span] = [("prompt", before), ("anchor", text), ("prompt", after)]
    return [*found[:place], *(part for part in parts if part[1]), *found[place + 1 :]]


def facts(preview: Preview, found: Sequence[PlannedTraining], rows: int) -> dict[str, Any]:
    """What `check` shows, as plain values for other programs: `rows` of each task and one general row cut into spans, tokens of
    the rows, the trainings to come, what was left out.
    """
    plain = encode.make_format(preview.tokenizer, None)
    shown = [
        (task.name, encode.make_format(plain.tokenizer, task.anchor), task.train[:rows])
        for task in preview.rows.tasks
    ]
    shown.append(("general", plain, preview.rows.general[: min(rows, 1)]))
    return {
        "rows": [
            {"source": name, "origin": example.origin, "spans": spans(example, form)}
            for name, form, examples in shown for example in examples
        ],
        "tokens": [
            {"source": name, "rows": len(counts), "median": int(np.median(counts)), "longest": int(counts.max())}
            for name, counts in lengths(preview).items()
        ],
        "trainings": [asdict(trial) for trial in found],
        "left_out": dict(preview.rows.rejects), "notes": list(preview.rows.notes),
    }  # fmt: skip


def _own_plan(preview: Preview) -> ArmPlan:
    return resolve(own_arm(preview.settings), preview.rows, preview.settings)


def stream_rows(preview: Preview, repeats: int) -> Iterator[dict[str, Any]]:
    """The stream of the settings' own arm in training order, for other trainers: one plain dict a position.

    `repeat` counts from 0 how often the row was shown before; messages carry the anchor, and ``weight: 0`` where an
    answer is not trained.
    """
    arm = _own_plan(preview)
    stream = arm.stream(preview.tokenizer, repeats, preview.seed)
    plan, bare = stream.plan, stream.is_bare(0, len(stream.plan))
    general = arm.general_rows
    own = [
        (task.name, arm.train_anchors[task.name], example)
        for task in preview.rows.tasks
        for example in task.train
    ]
    shown: Counter[int] = Counter()
    for position, (is_task, row) in enumerate(zip(*plan.slice(0, len(plan)), strict=True)):
        task, anchor, example = own[row] if is_task else (None, None, general[row])
        yield {
            "position": position, "source": "task" if is_task else "general", "task": task, "origin": example.origin,
            "repeat": shown[row] if is_task else 0, "messages": _plain_messages(example, None if bare[position] else anchor),
        }  # fmt: skip
        shown[int(row)] += bool(is_task)


def _plain_messages(example: Example, anchor: Anchor | None) -> list[dict[str, Any]]:
    messages = example.messages
    if anchor_template.last_answer_only(anchor):
        messages = (*(replace(message, train=False) for message in messages[:-1]), messages[-1])
    return [_plain_message(message) for message in anchor_template.apply(messages, anchor)]


def _plain_message(message: Message) -> dict[str, Any]:
    silent = message.role == "assistant" and not message.train
    return {"role": message.role, "content": message.content, **({"weight": 0} if silent else {})}


def stream_facts(preview: Preview, repeats: int) -> dict[str, Any]:
    """What belongs to a stream beside its rows: its order, the realised shares of the task, the batches that are its steps."""
    own, settings = _own_plan(preview), preview.settings
    stream = own.stream(preview.tokenizer, repeats, preview.seed)
    return {
        "arm": own.arm.name,
        "plan": asdict(stream.plan),
        "plan_sha256": stream.plan.fingerprint,
        "share": asdict(stream.share()),
        "batch_size": settings.train.batch_size,
        "steps": stream.steps(settings.train.batch_size),
        "anchors": {
            task.name: None if task.anchor is None else asdict(task.anchor)
            for task in preview.rows.tasks
        },
    }


def write_stream(rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any], file: Path) -> None:
    """Write stream rows as .parquet, `facts` in its metadata, or else as JSON lines, `facts` in a file beside; atomically.

    Raises StoreError.
    """
    if file.suffix != ".parquet":
        store.write_jsonl(file, rows)
        store.write_json(file.with_suffix(".facts.json"), facts)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.Table.from_pylist(list(rows))
    pq.write_table(
        table.replace_schema_metadata({"fulcrum": json.dumps(store.plain(facts))}), buffer
    )
    store.write_bytes(file, buffer.getvalue())
