"""What may not stand in a mix: damaged rows, other languages and lengths, near-duplicates, and text that task data hold too.

Each check says why a row goes, in words that can be counted. None needs a model. What depends on the pool alone (damage,
language, length, duplicates) is done once, when a pool is built; what depends on the task, whenever rows are chosen.
"""

import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate, islice, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from fulcrum.config.base import GeneralSource
from fulcrum.core.progress import Count
from fulcrum.core.types import Example, Reject
from fulcrum.data.formats import fold_text, normalise

NGRAM, SHORT_NGRAM = (
    13,
    8,
)  # words; 13 as in GPT-3's decontamination (arXiv 2005.14165, appendix C), 8 for short tasks
NEAR_ROWS = 1_000_000  # rows up to which near-duplicates are looked for; beyond, exact ones only

_PERMUTATIONS = 256
_RECALL = 0.995  # of near-duplicates at the threshold; those beyond it are found more surely
_KEPT = 2**24  # hashes of triples, of 8 bytes each, that are kept while pairs are compared
_RUN = 8  # of the rows that share a band each is compared with the first so many, and with so many of its neighbours
_FOLLOWING = 3  # bands that order those rows
_TOLD = 10_000  # pairs between two tellings
_BLOCK = 10_000  # rows whose MinHashes are in memory at a time
_LETTERS = 24  # in shorter texts a language cannot be told
_SEEN = 2000  # characters that tell a row's language
_SHARED = 0.1  # of a task's rows have what is an instruction in a system's text
_SPOKEN, _FEWEST_SHARING = (
    0.2,
    4,
)  # of its content groups, and how many at least, have one that a user says
_TELLING = 3  # words of a turn, or a pair of turns, that is a question of the task also inside another conversation

# Markers of chat templates and tokenizers, which are ids in a model's input and text only where something went wrong.
_MARKER = re.compile(
    r"<\|[\w/ .-]{2,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>|\[(?:CLS|SEP|PAD|MASK|UNK)\]"
    r"|\A<s>|</s>\Z|^### ?(?:Instruction|Response|Input):",
    re.MULTILINE,
)
_BROKEN = re.compile("[\ufffd\x00-\x08\x0b\x0e-\x1f]")

_REFUSAL = re.compile(
    r"\W*(?:(?:i'?m |i am )?(?:very |so )?sorry\b|i apologi[sz]e\b"
    r"|as an? (?:ai|(?:large )?language model)\b"
    r"|(?:unfortunately,? )?i (?:can(?:no|')t|am (?:unable|not able)|will not|won't)\b"
    r"|i'm (?:unable|not able)\b)",
    re.IGNORECASE,
)

_ASCII_WORD = re.compile(r"[^\W_]+")
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = regex.compile(rf"[{_UNSPACED}]\p{{M}}*|[\w--[_{_UNSPACED}]]+", regex.V1)


def words(text: str) -> list[str]:
    """Runs of letters and digits with their marks, fold_text; in scripts that put no spaces between words, each letter."""
    text = fold_text(text)
    found: list[str] = (_ASCII_WORD if text.isascii() else _WORD).findall(text)
    return found


def refuses(text: str) -> bool:
    """Tell whether a text begins as refusals do."""
    return bool(_REFUSAL.match(text.replace("’", "'")))


def spoken(row: Example) -> list[str]:
    """What a row's messages say, without its system's: many rows that have nothing else in common share that."""
    return [message.content for message in row.messages if message.role != "system"]


def unfit(row: Example, source: GeneralSource) -> Reject | None:
    """Why a row may not stand in any mix, by itself: damage, length, language."""
    for message in row.messages:
        if hit := _MARKER.search(message.content):
            return Reject(row.origin, "holds a template's marker", hit.group())
        if hit := _BROKEN.search(message.content):
            around = message.content[max(0, hit.start() - 20) : hit.end() + 20]
            return Reject(
                row.origin, "holds broken characters", f"U+{ord(hit.group()):04X} in {around!r}"
            )
    if source.min_words or source.max_words is not None:
        count = sum(len(words(message.content)) for message in row.messages)
        if count < source.min_words:
            return Reject(row.origin, f"under {source.min_words} words", f"{count} words")
        if source.max_words is not None and count > source.max_words:
            return Reject(row.origin, f"over {source.max_words} words", f"{count} words")
    if source.languages:
        text = " ".join(spoken(row))[:_SEEN]
        found = language(text)
        if found is not None and found not in source.languages:
            return Reject(
                row.origin, f"not in {' or '.join(source.languages)}", f"{found}: {text[:60]!r}"
            )
    return None


def language(text: str) -> str | None:
    """The ISO 639-1 code of a text's language (py3langid), None where it is too short to tell."""
    if sum(map(str.isalpha, text)) < _LETTERS:
        return None
    code: str = _identifier().classify(text)[0]
    return code


def languages() -> tuple[str, ...]:
    """The codes that can be told apart."""
    return tuple(sorted(str(label) for label in _identifier().labels))


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


class TaskText:
    """What of a task's text a general row may not hold: n-grams of its messages (13 words; 8 words of messages under 13), rows
    whose every message is under 8 words, whole, and what the user of a row says, whole: the same question with another answer
    teaches against the task.

    Message by message: a short question and its answer must not hide in the n-grams of the two together. What many content
    groups of one task have in common (an instruction before each question, a system's text) is no content, and general rows
    may have it too; what few share (a page that several are asked about) is. With `near` above 0, rows of at least so much
    Jaccard similarity (of word triples, those in common apart) are found too.

    With `sampled` the rows are no task's but some of a pool, held out of it: what two of them share, many of the pool's have,
    and is no content.
    """

    def __init__(
        self, tasks: Iterable[Sequence[Example]], near: float = 0.0, *, sampled: bool = False
    ) -> None:
        self._known: dict[int, set[str]] = {NGRAM: set(), SHORT_NGRAM: set()}
        self._whole, self._asked, self._common = set[str](), set[str](), set[str]()
        self._near, self._sizes, self._holders = near, list[int](), dict[str, list[int]]()
        self._sampled, self._whose = sampled, "held-out general" if sampled else "task or held-out"
        for rows in tasks:
            self._learn(rows)
            if near:
                self._learn_triples(rows)

    def _learn(self, rows: Sequence[Example]) -> None:
        spoken_by, system_of = dict[tuple[int, str], set[str]](), Counter[tuple[int, str]]()
        asked, whole = Counter[str](), Counter[str]()
        for row in rows:
            messages = [(message.role, words(message.content)) for message in row.messages]
            for role, found in messages:
                if len(found) >= SHORT_NGRAM:
                    n = NGRAM if len(found) >= NGRAM else SHORT_NGRAM
                    grams = {(n, gram) for gram in _ngrams(found, n)}
                    if role == "system":
                        system_of.update(grams)
                    else:
                        for gram in grams:
                            spoken_by.setdefault(gram, set()).add(row.group)
            said = [found for role, found in messages if role != "system"]
            questions = [found for role, found in messages if role == "user"]
            whole.update({_joined(said)} if _short(said) else ())
            asked[_joined(questions)] += 1
            if len(questions) > 1:  # what is scored of a longer conversation is its end
                last = [
                    questions[-1],
                    *(found for role, found in messages[-1:] if role == "assistant"),
                ]
                asked.update({_joined(questions[-1:])} if len(questions[-1]) >= _TELLING else ())
                whole.update(
                    {_joined(last)} if sum(map(len, last)) >= _TELLING and _short(last) else ()
                )
        limit, of_system = (
            self._instruction(rows),
            2 if self._sampled else max(2, _SHARED * len(rows)),
        )
        own = [key for key, groups in spoken_by.items() if len(groups) < limit]
        own += [key for key, count in system_of.items() if count < of_system]
        for n, text in own:
            self._known[n].add(text)
        for texts, found_in in ((self._asked, asked), (self._whole, whole)):
            texts.update(text for text, count in found_in.items() if count < 2 or not self._sampled)

    def _learn_triples(self, rows: Sequence[Example]) -> None:
        held = [shingles(spoken(row)) for row in rows]
        groups: dict[str, set[str]] = {}
        for row, own in zip(rows, held, strict=True):
            for shingle in own:
                groups.setdefault(shingle, set()).add(row.group)
        limit = self._instruction(rows)
        common = {shingle for shingle, of in groups.items() if len(of) >= limit}
        self._common |= common
        for own in held:
            for shingle in own - common:
                self._holders.setdefault(shingle, []).append(len(self._sizes))
            self._sizes.append(len(own - common))

    def _instruction(self, rows: Sequence[Example]) -> float:
        """In how many content groups a text must stand to be an instruction."""
        return (
            2 if self._sampled else max(_FEWEST_SHARING, _SPOKEN * len({row.group for row in rows}))
        )

    def shared(self, row: Example) -> Reject | None:
        """Return why a general row is too near to these rows, or None."""
        messages = [(message.role, words(message.content)) for message in row.messages]
        for n, known in self._known.items():
            grams = [gram for _, found in messages for gram in _ngrams(found, n)] if known else []
            if not known.isdisjoint(grams):
                article = "an" if n == SHORT_NGRAM else "a"
                hit = next(gram for gram in grams if gram in known)
                return Reject(row.origin, f"shares {article} {n}-gram with {self._whose} data", hit)
        said = [(role, found) for role, found in messages if role != "system"]
        pairs = [
            [one, other] for (role, one), (_, other) in pairwise(said) if role == "user"
        ]  # inside a longer conversation
        for text in map(
            _joined,
            (
                [found for _, found in said],
                *(pair for pair in pairs if sum(map(len, pair)) >= _TELLING),
            ),
        ):
            if text and text in self._whole:
                return Reject(row.origin, f"is a {self._whose} row", text)
        questions = [found for role, found in messages if role == "user"]
        for asked in (
            _joined(questions),
            *(" ".join(found) for found in questions if len(found) >= _TELLING),
        ):
            if asked and asked in self._asked:
                return Reject(row.origin, f"asks what a {self._whose} row asks", asked)
        if self._near:
            own = shingles(spoken(row)) - self._common
            common = Counter(place for shingle in own for place in self._holders.get(shingle, ()))
            for place, count in common.items():
                similarity = count / (len(own) + self._sizes[place] - count)
                if similarity >= self._near:
                    detail = f"similarity {similarity:.2f}: {' '.join(spoken(row))[:60]}"
                    return Reject(row.origin, f"nearly a {self._whose} row", detail)
        return None


def _short(messages: Sequence[Sequence[str]]) -> bool:
    return all(len(found) < SHORT_NGRAM for found in messages)


def _joined(messages: Iterable[Sequence[str]]) -> str:
    return " ".join(word for found in messages for word in found)


def _ngrams(found: Sequence[str], n: int) -> list[str]:
    """All runs of n words, as slices of the joined text: several times faster than joining each run."""
    text = " ".join(found)
    starts = [0, *accumulate(len(word) + 1 for word in found)]
    return [text[start : end - 1] for start, end in zip(starts, starts[n:], strict=False)]


def shingles(texts: Iterable[str]) -> set[str]:
    """The word triples of texts, one after the other; of fewer than three words, the words; of none, the texts."""
    texts = list(texts)
    found = [word for text in texts for word in words(text)]
    return set(_ngrams(found, 3)) or {" ".join(found) or normalise(" ".join(texts))}


def bands(rows: Iterable[set[str]], threshold: float) -> npt.NDArray[np.uint64]:
    """Hashes of each row's MinHash bands: (rows, bands). Rows that share one are candidates (Leskovec, Rajaraman and Ullman,
    "Mining of Massive Datasets", 3.4): bands are as wide as still find `_RECALL` of the pairs at `threshold`.
    """
    from datasketch import MinHash

    wide = [
        r
        for r in range(1, _PERMUTATIONS)
        if 1 - (1 - threshold**r) ** (_PERMUTATIONS // r) >= _RECALL
    ]
    width = max(wide, default=1)
    count = _PERMUTATIONS // width
    texts = ([shingle.encode() for shingle in row] for row in rows)
    sketches = MinHash.generator(texts, num_perm=_PERMUTATIONS)
    blocks = [np.empty((0, count), dtype=np.uint64)]
    while found := [sketch.hashvalues[: count * width] for sketch in islice(sketches, _BLOCK)]:
        values = np.array(found, dtype=np.uint64).reshape(len(found), count, width)
        mixed = np.zeros(values.shape[:2], dtype=np.uint64)
        for column in range(width):  # FNV-1a over the band's values
            mixed = (mixed ^ values[:, :, column]) * np.uint64(0x100000001B3) + np.uint64(
                0x9E3779B97F4A7C15
            )
        blocks.append(mixed)
    return np.concatenate(blocks)


def near_duplicates(
    keys: npt.NDArray[np.uint64],
    of: Callable[[int], tuple[set[str], ...]],
    threshold: float,
    progress: Count = lambda done, total: None,
) -> list[tuple[int, int, float]]:
    """Rows to leave out: (row, the earlier row that stays, their similarity), by row.

    `of(i)` gives the shingles of row i, as often as there are ways to see it; the similarity of two rows is the least of their
    Jaccard similarities, exactly computed. A row goes where an earlier one that stays is at least `threshold` like it; which
    pairs are looked at the `bands` say (see `_pairs`).
    """
    found: list[tuple[int, int, float]] = []
    gone: set[int] = set()
    of_row = _Hashed(of)
    pairs = _pairs(keys)
    for done, pair in enumerate(pairs):
        if done % _TOLD == 0:
            progress(done, len(pairs))
        later, earlier = divmod(int(pair), len(keys))
        if later in gone or earlier in gone:
            continue
        similarity = min(map(_jaccard, of_row[later], of_row[earlier]))
        if similarity >= threshold:
            gone.add(later)
            found.append((later, earlier, similarity))
    progress(len(pairs), len(pairs))
    return found


Hashes = npt.NDArray[np.int64]  # ascending, none twice


class _Hashed:
    """Rows' shingles as hashes of 64 bits; the latest stay in memory, up to `_KEPT` numbers."""

    def __init__(self, of: Callable[[int], tuple[set[str], ...]]) -> None:
        self._of, self._known, self._size = of, OrderedDict[int, tuple[Hashes, ...]](), 0

    def __getitem__(self, row: int) -> tuple[Hashes, ...]:
        if row in self._known:
            self._known.move_to_end(row)
            return self._known[row]
        own = tuple(np.sort(np.fromiter(map(hash, view), dtype=np.int64)) for view in self._of(row))
        self._known[row] = own
        self._size += sum(map(len, own))
        while self._size > _KEPT and len(self._known) > 1:
            self._size -= sum(map(len, self._known.popitem(last=False)[1]))
        return own


def _jaccard(a: Hashes, b: Hashes) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _pairs(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """The pairs to compare, ascending: (later row) * (number of rows) + (earlier row).

    Where many rows share a band, as those of one template do, each meets the first `_RUN` of them and its `_RUN` neighbours in
    the order of the bands that follow: rows that share these too stand side by side (as in an LSH forest; Bawa, Condie and
    Ganesan, WWW 2005).
    """
    rows, count = keys.shape
    pairs = np.empty(0, dtype=np.int64)
    for place in range(count):
        band = keys[:, place]
        by_row = np.argsort(band, kind="stable")
        starts = np.append(True, np.diff(band[by_row]) != 0)
        first = np.flatnonzero(starts)[np.cumsum(starts) - 1]  # where the run of each begins
        following = [
            keys[:, (place + step) % count] for step in range(min(_FOLLOWING, count), 0, -1)
        ]
        alike = np.lexsort((*following, band))
        own = [pairs]
        for step in range(_RUN):
            has = first + step < np.arange(rows)
            own.append(by_row[has] * rows + by_row[first[has] + step])
        for step in range(1, _RUN + 1):
            a, b = alike[step:], alike[:-step]
            same = band[a] == band[b]
            own.append(np.maximum(a, b)[same] * rows + np.minimum(a, b)[same])
        pairs = np.unique(np.concatenate(own))
    return pairs
