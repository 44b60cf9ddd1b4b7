"""What the fuzzer drives, a function of bytes each: any input ends well, or with an error that a
user can mend.

`scripts/fuzz.py` guides bytes by coverage; `test_fuzz.py` plays inputs that once found something,
and hypothesis' own.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fulcrum.config import parsing
from fulcrum.config.base import DataSource
from fulcrum.config.settings import dump_settings, load_settings, settings_from_dict
from fulcrum.core.errors import FulcrumError
from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import encode, mix, task_data
from fulcrum.model import packing
from helpers.tiny import FORGETFUL, TRIMMING, tiny_tokenizer

T = TypeVar("T")


class Drawn:
    """Values drawn from bytes, front to back; zeros where they are used up."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        found = self.data[self.at : self.at + count]
        self.at += count
        return found

    @property
    def left(self) -> int:
        return max(0, len(self.data) - self.at)

    def integer(self, low: int, high: int) -> int:
        size = ((high - low).bit_length() + 7) // 8
        return low + int.from_bytes(self.take(size).ljust(size, b"\0"), "big") % (high - low + 1)

    def one(self, choices: Sequence[T]) -> T:
        return choices[self.integer(0, len(choices) - 1)]

    def text(self, longest: int = 24) -> str:
        """Text with what is special here among it: markers of templates, white space, odd
        characters."""
        parts = []
        for _ in range(self.integer(0, 3)):
            raw = self.take(self.integer(0, longest))
            parts.append(
                self.one((raw.decode("latin-1"), raw.decode("utf-8", "replace"), self.one(SPECIAL)))
            )
        return "".join(parts)

    def value(self, depth: int = 3) -> Any:
        """A JSON value."""
        kind = self.integer(0, 9 if depth else 6)
        if kind <= 3:
            return self.text()
        if kind == 4:
            return self.one((None, True, False, 0, -1, 2**70, 1e308, 0.5))
        if kind == 5:
            return self.integer(-1000, 1000)
        if kind == 6:
            return []
        if kind == 7:
            return [self.value(depth - 1) for _ in range(self.integer(0, 3))]
        return {self.one(KEYS): self.value(depth - 1) for _ in range(self.integer(0, 4))}


class Valid(Drawn):
    """Texts that are Unicode: reading rejects others, so that what is encoded holds no lone
    surrogates."""

    def text(self, longest: int = 24) -> str:
        return super().text(longest).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


SPECIAL = (
    "<|im_end|>",
    "<|im_start|>",
    "<|im_start|>assistant\n",
    "<s>",
    "<pad>",
    "\ufdd0",
    "\ufdd1",
    "\ufdd03\ufdd1",
    "\x00",
    "\u202e",
    "\u2028",
    "\r\n",
    " ",
    "\t",
    "\ud83d",
    "{{ messages }}",
    "{% for %}",
    "Name it.",
    "fulcrumprobe",
    "=1+1",
    "<script>",
    "\U0001f600",
    "e\u0301",
    "ﬁ",
)
KEYS = (
    "messages",
    "role",
    "content",
    "user",
    "assistant",
    "system",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "query",
    "response",
    "conversations",
    "from",
    "value",
    "group",
    "weight",
    "train",
    "chosen",
    "text",
    "history",
    "",
)
_ROLES = ("user", "assistant", "system", "human", "gpt", "model", "tool")


_MEMORY = Path("/dev/shm")  # files there cost no disk


@cache
def _file(ending: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="fuzz", dir=_MEMORY if _MEMORY.is_dir() else None))
    return folder / f"rows{ending}"


def _row(drawn: Drawn) -> Any:
    """A row as people write them, or nearly so."""
    kind = drawn.integer(0, 5)
    if kind <= 1:
        return {"prompt": drawn.text(), "completion": drawn.text()} | (
            {drawn.one(KEYS): drawn.value()} if kind else {}
        )
    if kind <= 3:
        turns = [
            {"role": drawn.one(_ROLES), "content": drawn.text()} for _ in range(drawn.integer(0, 4))
        ]
        return (
            {"messages": turns}
            if kind == 2
            else {"conversations": [{"from": t["role"], "value": t["content"]} for t in turns]}
        )
    return {drawn.one(KEYS): drawn.value() for _ in range(4)} if kind == 4 else drawn.value()


def read_rows(data: bytes) -> None:
    """Files of every format, of bytes as they come or of rows: each row is kept or rejected, and
    none is lost."""
    drawn = Drawn(data)
    ending = drawn.one((".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl", ".json"))
    written = None
    if drawn.integer(0, 1):
        content = drawn.take(drawn.left)
    else:
        rows = [_row(drawn) for _ in range(drawn.integer(1, 4))]
        written = len(rows)
        lines = [json.dumps(row, ensure_ascii=bool(drawn.integer(0, 1))) for row in rows]
        content = ("\n".join(lines) if ending != ".json" else f"[{','.join(lines)}]").encode(
            "utf-8", "surrogatepass"
        )
    file = _file(ending)
    file.write_bytes(content)
    try:
        kept, rejects = task_data.read([DataSource(path=str(file))])
    except FulcrumError as error:
        _sayable(error)
        return
    if written is not None and ending in (".json", ".jsonl"):
        assert len(kept) + len(rejects) == written
    for example in kept:
        for message in example.messages:
            message.content.encode()  # it can be written down again
        assert any(message.role == "assistant" for message in example.messages)
    again = task_data.read([DataSource(path=str(file))])
    assert again == (kept, rejects)


def _sayable(error: FulcrumError) -> None:
    text = str(error)
    assert text
    text.encode("utf-8", "backslashreplace")


@cache
def _tokenizer(number: int) -> Any:
    return tiny_tokenizer((True, TRIMMING, FORGETFUL, False)[number])


def encode_rows(data: bytes) -> None:
    """Conversations of any text: only the template's own markers are special, every answer and its
    end is trained."""
    drawn = Valid(data)
    number = drawn.integer(0, 3)
    tokenizer = _tokenizer(number)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = encode.plain_template(adds_bos=True)
    where: Any = drawn.one((None, "system", "user_prefix", "user_suffix", "response_prefix"))
    anchor = None if where is None else Anchor(drawn.text() or "Name it.", where)
    turns = [Message("system", drawn.text() or "s")] if drawn.integer(0, 1) else []
    for _ in range(drawn.integer(1, 3)):
        turns += [
            Message("user", drawn.text() or "q"),
            Message("assistant", drawn.text() or "a", train=drawn.integer(0, 3) > 0),
        ]
    try:
        form = encode.make_format(tokenizer, anchor)
        found = encode.encode(Example(tuple(turns), "g", "o"), form, keep=False)
        plain = [Message(m.role, "a" if m.content.strip() else m.content, m.train) for m in turns]
        bare = encode.encode(Example(tuple(plain), "g", "o"), form, keep=False)
    except FulcrumError as error:
        _sayable(error)
        return
    special = {*tokenizer.all_special_ids}
    assert found.loss_mask.any()
    assert found.ids[-1] == form.end_ids[-1]
    assert found.loss_mask[-1]
    if number != 2 and (
        anchor is None or not form.special.search(anchor.text)
    ):  # one template looks into what was said
        ours, theirs = (
            [int(token) for token in ids.ids if token in special] for ids in (found, bare)
        )
        assert ours == theirs, (ours, theirs)
    (together,) = encode.encode_many([Example(tuple(turns), "g", "o")], form)
    assert np.array_equal(together.ids, found.ids)
    assert np.array_equal(together.loss_mask, found.loss_mask)
    if number == 0 and anchor is None:  # nothing that anybody said is changed
        said = "".join(f"<|im_start|>{turn.role}\n{turn.content}<|im_end|>\n" for turn in turns)
        assert (
            tokenizer.decode(found.ids)
            == said[: said.rindex("<|im_end|>", 0, len(said)) + len("<|im_end|>")]
            or not turns[-1].train
        )


def pack_rows(data: bytes) -> None:
    """Every example is in exactly one row, whole; a row over the budget holds one example."""
    drawn = Drawn(data)
    budget = drawn.integer(-1, 64)
    lengths = [
        drawn.integer(-1 if drawn.integer(0, 50) == 50 else 1, 80)
        for _ in range(drawn.integer(0, 40))
    ]
    try:
        rows = packing.pack(lengths, budget)
    except FulcrumError as error:
        _sayable(error)
        assert budget < 1 or min(lengths) < 1
        return
    assert sorted(member for row in rows for member in row.members) == list(range(len(lengths)))
    for row in rows:
        assert row.length == sum(lengths[member] for member in row.members)
        assert row.length <= budget or len(row.members) == 1
    assert len(rows) <= len(lengths)


def plan_streams(data: bytes) -> None:
    """Every task row stands in a plan as often as asked, no general row twice, wherever it is
    cut."""
    drawn = Drawn(data)
    task, general = drawn.integer(-1, 40), drawn.integer(0, 200)
    if drawn.integer(0, 9) == 9:
        general += 10 ** drawn.integer(5, 18)
    ratio = drawn.one(
        (
            0.0,
            0.5,
            1.0,
            1 / 3,
            2.0,
            7.7,
            -1.0,
            float("nan"),
            float("inf"),
            1e308,
            drawn.integer(0, 5000) / 100,
        )
    )
    order = drawn.one((*mix.ORDERS, *mix.ORDERS, "randm"))
    try:
        plan = mix.plan(
            task,
            general,
            repeats=drawn.integer(0, 9),
            general_per_task=ratio,
            order=order,
            seed=drawn.integer(0, 2**40),
        )
    except FulcrumError as error:
        _sayable(error)
        return
    mix.warnings(plan, drawn.integer(1, 64))
    start = drawn.integer(0, len(plan))
    stop = min(len(plan), start + drawn.integer(0, 300))
    is_task, rows = plan.slice(start, stop)
    assert len(is_task) == len(rows) == stop - start
    for position in range(start, min(stop, start + 3)):
        assert plan[position] == (
            "task" if is_task[position - start] else "general",
            rows[position - start],
        )
    if len(plan) <= 4000:
        is_task, rows = plan.slice(0, len(plan))
        assert np.bincount(rows[is_task], minlength=task).tolist() == [plan.repeats] * task
        shown = rows[~is_task]
        assert len(np.unique(shown)) == len(shown) == plan.general_used
        assert not len(shown) or (shown.min() >= 0 and shown.max() < general)


_NAMES = (
    "model",
    "task",
    "tasks",
    "train",
    "test",
    "dev",
    "anchor",
    "text",
    "placement",
    "general",
    "path",
    "mix",
    "general_per_task",
    "repeats",
    "order",
    "learning_rate",
    "lora_r",
    "output_dir",
    "seed",
    "metrics",
    "compare",
    "arms",
    "sizes",
    "name",
    "eval",
    "unit",
    "columns",
    "limit",
    "weight",
    "clean",
    "group",
    "max_new_tokens",
    "batch_size",
    "seeds",
)


def _setting(drawn: Drawn, depth: int = 3) -> Any:
    kind = drawn.integer(0, 5 if depth else 3)
    if kind == 0:
        return drawn.one(
            ("rows.jsonl", "auto", "none", "user_prefix", "nll", "builtin", "random", drawn.text())
        )
    if kind <= 3:
        return drawn.one((0, 1, 2, 4.0, -1, 1e-4, None, True, "1e-4", 10**30, float("nan")))
    if kind == 4:
        return [_setting(drawn, depth - 1) for _ in range(drawn.integer(0, 3))]
    return {drawn.one(_NAMES): _setting(drawn, depth - 1) for _ in range(drawn.integer(0, 4))}


def read_settings(data: bytes) -> None:
    """Settings files of any text: settings that are written and read back the same, or an error
    in words."""
    drawn = Drawn(data)
    kind = drawn.integer(0, 2)
    file = _file(".yaml")
    if kind == 0:
        file.write_bytes(drawn.take(drawn.left))
    else:
        base = (
            {"task": {"train": "rows.jsonl"}, "model": "m", "general": "builtin", "output_dir": "o"}
            if kind == 1
            else {}
        )
        for _ in range(drawn.integer(0, 5)):
            where, name = drawn.one((*_NAMES, *base)), drawn.one(_NAMES)
            inner = base.get(where)
            base[where] = (
                {**inner, name: _setting(drawn)} if isinstance(inner, dict) else _setting(drawn)
            )
        file.write_text(json.dumps(base), encoding="utf-8", errors="surrogatepass")
    overrides = (
        [f"{drawn.one(_NAMES)}.{drawn.one(_NAMES)}={drawn.text()}"]
        if drawn.integer(0, 3) == 3
        else []
    )
    try:
        found = load_settings(file, overrides)
    except FulcrumError as error:
        _sayable(error)
        return
    written = dump_settings(found)
    assert settings_from_dict(parsing.parse(written, "again")) == found or "nan" in written


TARGETS: dict[str, Callable[[bytes], None]] = {
    "ingest": read_rows,
    "encode": encode_rows,
    "pack": pack_rows,
    "plan": plan_streams,
    "config": read_settings,
}
