"""Sources -> Examples and reasoned rejects; then splits, subsets and checks by content.

Content is what `Example.group` names: rows of equal groups are never put on two sides of a split. The order in which groups are
drawn is that of a hash of (purpose, seed, group), so it depends neither on the order of the rows nor on which other groups
there are.

Invariant: rows in = kept + rejected.
"""

import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, zip_longest

import numpy as np

from fulcrum.errors import DataError
from fulcrum.records import Example, Reject
from fulcrum.rows import content_key, digest
from fulcrum.sections import DataSource
from fulcrum.tables import open_tables


def read(
    sources: Sequence[DataSource], *, group: str | None = None, seed: int = 0, answered: bool = True
) -> tuple[list[Example], list[Reject]]:
    """Read all rows of the sources, in order: every row is in exactly one of the two lists returned.

    `group` names the column whose equal values belong together; without it a column called ``group`` is used, else a hash of
    the prompt's text. A source's `limit` draws rows by `seed` (they stay in file order). A later row with the same normalised
    texts as an earlier one is rejected as ``duplicate``. Rows that are not `answered` are inputs: they end with the user's
    message. Raises DataError for missing, empty or broken files and wrong columns.
    """
    examples: list[Example] = []
    rejects: list[Reject] = []
    first: dict[str, str] = {}
    for place, source in enumerate(sources):
        tables = open_tables(source, group=group, answered=answered)
        for table, ids in zip(tables, draw([table.size for table in tables], source.limit, (seed, place)), strict=True):
            for row in (table[int(index)] for index in ids):
                if isinstance(row, Reject):
                    rejects.append(row)
                elif (key := content_key(row)) in first:
                    rejects.append(Reject(row.origin, "duplicate", f"same as {first[key]}"))
                else:
                    first[key] = row.origin
                    examples.append(row)
    return examples, rejects


def draw(sizes: Sequence[int], limit: int | None, key: tuple[int, ...]) -> list[Sequence[int]]:
    """Draw `limit` rows of tables with these sizes, seeded by `key`: ascending row ids for each table, nested in `limit`."""
    total = sum(sizes)
    if limit is None or limit >= total:
        return [range(size) for size in sizes]
    chosen = np.sort(np.random.default_rng(key).permutation(total)[:limit]).astype(np.int64)
    ends = list(accumulate(sizes))
    parts = np.split(chosen, np.searchsorted(chosen, ends[:-1]))
    return [(part - (end - size)).tolist() for part, end, size in zip(parts, ends, sizes, strict=True)]


def require_rows(examples: Sequence[Example], rejects: Sequence[Reject], minimum: int = 2) -> None:
    """Raise DataError, counting the rejects by reason, where fewer than `minimum` rows are usable."""
    if len(examples) >= minimum:
        return
    files = sorted({origin.rpartition(":")[0] for origin in [e.origin for e in examples] + [r.origin for r in rejects]})
    counts = Counter(reject.reason for reject in rejects).most_common()
    reasons = f"; rejected: {', '.join(f'{count} {reason}' for reason, count in counts)}" if rejects else ""
    first = f" (first: {rejects[0].origin} {rejects[0].detail})" if rejects else ""
    raise DataError(
        f"{', '.join(files) or 'no source'}: {len(examples)} usable of {len(examples) + len(rejects)} rows read, "
        f"at least {minimum} are needed{reasons}{first}; add rows or mend these"
    )


def _seeded_groups(examples: Sequence[Example], purpose: str, seed: int) -> dict[str, list[Example]]:
    """Rows by group, groups in seeded order, rows of a group in the order given."""
    members: dict[str, list[Example]] = {}
    for example in examples:
        members.setdefault(example.group, []).append(example)
    order = sorted(members, key=lambda group: hashlib.sha256(f"{purpose}\0{seed}\0{group}".encode()).digest())
    return {group: members[group] for group in order}


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Hold out `share` (in (0, 1)) of the groups, at least one and never all: returns (rest, held out), in the order given.

    Raises DataError where there are fewer than two groups.
    """
    groups = list(_seeded_groups(examples, "split", seed))
    _require_two(examples, groups)
    held = set(groups[: min(max(round(share * len(groups)), 1), len(groups) - 1)])
    return [e for e in examples if e.group not in held], [e for e in examples if e.group in held]


def fold(examples: Sequence[Example], number: int, count: int) -> tuple[list[Example], list[Example]]:
    """Hold out the groups of one of `count` folds (fewer, where there are fewer groups): returns (rest, held out), in the
    order given. Every group is in one fold; the largest are dealt out first, each to the fold that has fewest rows.

    Raises DataError where there are fewer than two groups, or fewer than the fold's number says.
    """
    from sklearn.model_selection import GroupKFold

    groups = _seeded_groups(examples, "split", 0)
    _require_two(examples, list(groups))
    if number >= len(groups):
        raise DataError(
            f"{len(examples)} rows in {len(groups)} group(s): without a test file each of {count} seeds holds out other "
            f"groups; use at most {len(groups)} seeds, give a `test:` file, or name another column with `group:`"
        )
    place = {group: k for k, group in enumerate(groups)}
    folds = GroupKFold(min(count, len(groups))).split(examples, groups=[place[e.group] for e in examples])
    rest, held = next(itertools.islice(folds, number, None))
    return [examples[k] for k in rest], [examples[k] for k in held]


def _require_two(examples: Sequence[Example], groups: Sequence[str]) -> None:
    if len(groups) < 2:
        raise DataError(
            f"{len(examples)} rows in {len(groups)} group(s) cannot be split by content: two groups are needed; "
            "give `dev:` and `test:` files, add rows with other content, or name another column with `group:`"
        )


def subset(examples: Sequence[Example], limit: int, seed: int) -> list[Example]:
    """Return `limit` rows (all, where there are fewer): the first ones of a single seeded order.

    The order takes one row of every group, then a second one of those that have it, and so on: few rows still cover as many
    groups as they can. Subsets are nested: a smaller one is the beginning of a larger one.
    """
    rounds = zip_longest(*_seeded_groups(examples, "subset", seed).values())
    return [example for row in rounds for example in row if example is not None][:limit]


def check_overlap(
    train: Sequence[Example], held_out: Sequence[Example], name: str, *, of: str = "training", by_group: bool = True
) -> None:
    """Refuse held-out rows (`name`: dev or test) whose content is in `train` (`of`: its name). Raises DataError with places.

    Content is the same where the normalised prompt is the same (its turns in one text, the system's included), or prompt and
    answer together, or, with `by_group`, the group. Switch `by_group` off where group values were not meant to be compared
    between files, as where each file numbers its groups from 0.
    """

    def keys(example: Example) -> list[str]:
        texts = [message.content for message in example.messages]
        found = ["prompt " + digest(" ".join(texts[:-1])), "text " + digest(" ".join(texts))]
        return [*found, "group " + example.group] if by_group else found

    known = {key: example.origin for example in reversed(train) for key in keys(example)}
    hits = [(row, next((key for key in keys(row) if key in known), None)) for row in held_out]
    shared = [(row, key) for row, key in hits if key is not None]
    if shared:
        kinds = Counter(key.split()[0] for _, key in shared)
        pairs = ", ".join(f"{row.origin} = {known[key]}" for row, key in shared[:3])
        raise DataError(
            f"{len(shared)} of {len(held_out)} {name} rows have content of the {of} rows "
            f"({', '.join(f'{count} the same {kind}' for kind, count in kinds.items())}): {pairs}"
            f"{' ...' if len(shared) > 3 else ''}; remove them from one side, "
            f"or leave `{name}:` out, and rows are held out by content"
            + ("; if group values restart in every file, make them unique" if kinds["group"] else "")
        )
