"""What `quanta` clusters: single answer tokens, each in its row, or whole answers; of the task's test rows and of general rows.

An item is an example whose loss is that of this token alone: the row up to it, with one target. Its gradient is then that of
the token, and rows share what they begin with, so that scoring all items costs little more than scoring their rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fulcrum import encode
from fulcrum.errors import DataError
from fulcrum.records import Anchor, Example, Tokens

_BEFORE, _AFTER = 32, 12  # tokens of context that a reader is shown


@dataclass(frozen=True)
class Item:
    """An answer token (or answer) of a row, its context in words, and the example whose only loss it is."""

    general: bool
    origin: str
    group: str
    before: str
    text: str
    after: str
    tokens: Tokens

    @property
    def key(self) -> str:
        """By which its gradient is kept."""
        return f"{self.origin} {len(self.tokens)} {self.tokens.n_loss} {'general' if self.general else 'task'}"


def draw(
    rows: Sequence[tuple[Example, Anchor | None]],
    tokenizer: encode.Tokenizer,
    unit: str,
    wanted: int,
    *,
    general: bool,
    seed: int,
) -> list[Item]:
    """Up to `wanted` items of these rows, each asked with its anchor, drawn without replacement, in the order of the rows.

    Raises DataError where there are fewer than 20.
    """
    found: list[tuple[Example, Tokens, int]] = []  # row, its tokens, the place of the token (of the first, for whole answers)
    for row, anchor in rows:
        tokens = encode.final_answer(row, encode.make_format(tokenizer, anchor))
        places = np.flatnonzero(tokens.loss_mask)
        found += [(row, tokens, int(place)) for place in (places if unit == "tokens" else places[:1])]
    kind = "held-out general rows" if general else "test rows"
    if len(found) < 20:
        raise DataError(
            f"quanta: {len(found)} {unit} in the answers of {len(rows)} {kind} are too few to cluster; give more rows "
            f"({'eval.general_rows' if general else 'task.test'}){'' if unit == 'tokens' else ', or set quanta.unit: tokens'}"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(len(found))[:wanted])
    return [_item(found[k], tokenizer, whole=unit == "rows", general=general) for k in chosen]


def _item(found: tuple[Example, Tokens, int], tokenizer: encode.Tokenizer, *, whole: bool, general: bool) -> Item:
    row, tokens, place = found
    end = len(tokens) if whole else place + 1
    mask = tokens.loss_mask[:end].copy()
    if not whole:
        mask[:place] = False

    def words(start: int, stop: int) -> str:
        return str(tokenizer.decode(tokens.ids[max(start, 0) : stop].tolist()))

    return Item(
        general, row.origin, row.group, words(place - _BEFORE, place), words(place, end), words(end, end + _AFTER),
        Tokens(tokens.ids[:end], mask),
    )  # fmt: skip
