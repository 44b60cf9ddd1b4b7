"""Say which rows may not be used: damaged, repeated, in task data, of another language or length.

Every check returns a reason in words that can be counted; none needs a model. What depends on the
pool alone (damage, language, length, near-duplicates) is checked once, when a pool is built; what
depends on the task, whenever rows are chosen.
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

Turn = tuple[str, list[str]]  # a message's role and words
Gram = tuple[int, str]  # n and the n words, joined by spaces
Hashes = npt.NDArray[np.int64]  # ascending, none twice

NEAR_ROWS = 1_000_000  # rows up to which near-duplicates are looked for; beyond, exact ones only

NGRAM = 13  # words, as in GPT-3's decontamination (arXiv 2005.14165, appendix C)
SHORT_NGRAM = 8  # words, for messages of fewer than `NGRAM`
_MIN_WORDS = 3  # of a turn or pair of turns that counts as the task's inside another conversation

# A text that many rows of a task share is an instruction, not content.
_SYSTEM_SHARE = 0.1  # of the rows have an instruction in a system message
_USER_SHARE = 0.2  # of the content groups have one in another message ...
_MIN_GROUPS = 4  # ... and at least so many groups

_MIN_LETTERS = 24  # in shorter texts a language cannot be told
_LANGUAGE_CHARACTERS = 2000  # from which a row's language is told

_PERMUTATIONS = 256
_RECALL = 0.995  # of near-duplicates at the threshold; more similar pairs are found more surely
_NEIGHBOURS = 8  # rows before each, among those that share a band, that it is compared with
_SORT_BANDS = 3  # further bands by which those rows are sorted
_BLOCK = 10_000  # rows whose MinHashes are in memory at a time
_CACHED_HASHES = 2**24  # of shingles, 8 bytes each, kept while pairs are compared
_PROGRESS_EVERY = 10_000  # pairs

# Markers of chat templates and tokenizers: in a model's input they are ids, in text a mistake.
_MARKER = re.compile(
    r"<\|[\w/ .-]{2,40}\|>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
    r"|\[(?:CLS|SEP|PAD|MASK|UNK)\]|\A<s>|</s>\Z|^### ?(?:Instruction|Response|Input):",
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
    """Split a folded text into runs of letters and digits with their marks.

    In scripts that put no spaces between words each letter is a word.
    """
    text = fold_text(text)
    pattern = _ASCII_WORD if text.isascii() else _WORD
    matches: list[str] = pattern.findall(text)
    return matches


def refuses(text: str) -> bool:
    """Return whether a text begins as refusals do."""
    return bool(_REFUSAL.match(text.replace("’", "'")))


def spoken(row: Example) -> list[str]:
    """Return a row's messages without the system's, which very different rows often share."""
    return [message.content for message in row.messages if message.role != "system"]


def shingles(texts: Iterable[str]) -> set[str]:
    """Return the word triples of the texts laid end to end.

    Of fewer than three words, the words are returned; of none, the texts.
    """
    texts = list(texts)
    tokens: list[str] = []
    for text in texts:
        tokens += words(text)
    return set(_ngrams(tokens, 3)) or {" ".join(tokens) or normalise(" ".join(texts))}


def unfit(row: Example, source: GeneralSource) -> Reject | None:
    """Return why a row may not be used in any mix: damage, length or language; None if it may."""
    return _damage(row) or _wrong_length(row, source) or _wrong_language(row, source)


def language(text: str) -> str | None:
    """Return the ISO 639-1 code of a text's language (py3langid), None if it is too short."""
    if sum(map(str.isalpha, text)) < _MIN_LETTERS:
        return None
    code: str = _identifier().classify(text)[0]
    return code


def languages() -> tuple[str, ...]:
    """Return the codes that can be told apart."""
    return tuple(sorted(map(str, _identifier().labels)))


class OverlapFilter:
    """The text of a task's rows that no general row may hold.

    A general row is refused if it shares an n-gram with a message of the task (13 words; 8 words of
    messages under 13), if it equals a row whose every message is under 8 words, or if its user asks
    what a task's user asks: the same question with another answer would teach against the task.
    With `near` above 0, rows of at least that Jaccard similarity (of word triples) are refused too.

    Texts are compared message by message, so that a short question and its answer cannot hide in
    the n-grams of the two together. Text that many content groups share (an instruction before each
    question, a system message) is not content: general rows may have it. Text that few share (a
    page that several questions are about) is.

    With `sampled` the rows are a sample of a pool, held out of it, instead of a task's rows: what
    two of them share, many rows of the pool have, so it is not content.
    """

    def __init__(
        self, tasks: Iterable[Sequence[Example]], near: float = 0.0, *, sampled: bool = False
    ) -> None:
        self._near = near
        self._sampled = sampled
        self._whose = "held-out general" if sampled else "task or held-out"
        self._grams: dict[int, set[str]] = {NGRAM: set(), SHORT_NGRAM: set()}
        self._rows: set[str] = set()  # whole rows of short messages, as words
        self._questions: set[str] = set()  # all that a row's user says, as words
        self._common_shingles: set[str] = set()
        self._shingle_rows: dict[str, list[int]] = {}  # shingle -> places of the rows that have it
        self._shingle_counts: list[int] = []  # of each row, common ones not counted
        for rows in tasks:
            conversations = [_turns(row) for row in rows]
            self._learn_grams(rows, conversations)
            self._learn_wholes(conversations)
            if near:
                self._learn_shingles(rows)

    def _learn_grams(self, rows: Sequence[Example], conversations: Sequence[list[Turn]]) -> None:
        groups_by_gram: dict[Gram, set[str]] = {}
        system_counts = Counter[Gram]()
        for row, turns in zip(rows, conversations, strict=True):
            for role, said in turns:
                if role == "system":
                    system_counts.update(_own_grams(said))
                    continue
                for gram in _own_grams(said):
                    groups_by_gram.setdefault(gram, set()).add(row.group)
        fewest_groups = self._instruction_groups(rows)
        for (n, text), groups in groups_by_gram.items():
            if len(groups) < fewest_groups:
                self._grams[n].add(text)
        fewest_rows = 2 if self._sampled else max(2, _SYSTEM_SHARE * len(rows))
        for (n, text), count in system_counts.items():
            if count < fewest_rows:
                self._grams[n].add(text)

    def _learn_wholes(self, conversations: Sequence[list[Turn]]) -> None:
        """Learn whole questions, and whole rows of short messages."""
        questions = Counter[str]()
        short_rows = Counter[str]()
        for turns in conversations:
            said = [tokens for role, tokens in turns if role != "system"]
            asked = [tokens for role, tokens in turns if role == "user"]
            questions[_joined(asked)] += 1
            if _all_short(said):
                short_rows[_joined(said)] += 1
            if len(asked) > 1:  # of a longer conversation the end is scored
                end = asked[-1:]
                if len(end[0]) >= _MIN_WORDS:
                    questions[_joined(end)] += 1
                last_role, last_words = turns[-1]
                if last_role == "assistant":
                    end.append(last_words)
                if _count_words(end) >= _MIN_WORDS and _all_short(end):
                    short_rows[_joined(end)] += 1
        self._questions |= self._content(questions)
        self._rows |= self._content(short_rows)

    def _content(self, counts: Counter[str]) -> set[str]:
        """Return the texts that are content: in a sample, those that occur once."""
        if not self._sampled:
            return set(counts)
        return {text for text, count in counts.items() if count < 2}

    def _learn_shingles(self, rows: Sequence[Example]) -> None:
        shingles_by_row = [shingles(spoken(row)) for row in rows]
        groups_by_shingle: dict[str, set[str]] = {}
        for row, own in zip(rows, shingles_by_row, strict=True):
            for shingle in own:
                groups_by_shingle.setdefault(shingle, set()).add(row.group)
        limit = self._instruction_groups(rows)
        common = {shingle for shingle, groups in groups_by_shingle.items() if len(groups) >= limit}
        self._common_shingles |= common
        for own in shingles_by_row:
            rare = own - common
            for shingle in rare:
                self._shingle_rows.setdefault(shingle, []).append(len(self._shingle_counts))
            self._shingle_counts.append(len(rare))

    def _instruction_groups(self, rows: Sequence[Example]) -> float:
        """Return how many content groups must share a text for it to be an instruction."""
        if self._sampled:
            return 2
        groups = {row.group for row in rows}
        return max(_MIN_GROUPS, _USER_SHARE * len(groups))

    def shared(self, row: Example) -> Reject | None:
        """Return why a general row is too near to these rows, or None."""
        turns = _turns(row)
        return (
            self._shares_gram(row, turns)
            or self._is_row(row, turns)
            or self._asks_same(row, turns)
            or self._is_near(row)
        )

    def _shares_gram(self, row: Example, turns: Sequence[Turn]) -> Reject | None:
        for n, task_grams in self._grams.items():
            if not task_grams:
                continue
            grams: list[str] = []
            for _, said in turns:
                grams += _ngrams(said, n)
            if not task_grams.isdisjoint(grams):
                hit = next(gram for gram in grams if gram in task_grams)
                article = "an" if n == SHORT_NGRAM else "a"
                return Reject(row.origin, f"shares {article} {n}-gram with {self._whose} data", hit)
        return None

    def _is_row(self, row: Example, turns: Sequence[Turn]) -> Reject | None:
        said = [turn for turn in turns if turn[0] != "system"]
        texts = [_joined(tokens for _, tokens in said)]
        for (role, question), (_, answer) in pairwise(said):
            pair = [question, answer]
            if role == "user" and _count_words(pair) >= _MIN_WORDS:
                texts.append(_joined(pair))
        for text in texts:
            if text and text in self._rows:
                return Reject(row.origin, f"is a {self._whose} row", text)
        return None

    def _asks_same(self, row: Example, turns: Sequence[Turn]) -> Reject | None:
        asked = [tokens for role, tokens in turns if role == "user"]
        texts = [_joined(asked)]
        for tokens in asked:
            if len(tokens) >= _MIN_WORDS:
                texts.append(" ".join(tokens))
        for text in texts:
            if text and text in self._questions:
                return Reject(row.origin, f"asks what a {self._whose} row asks", text)
        return None

    def _is_near(self, row: Example) -> Reject | None:
        if not self._near:
            return None
        own = shingles(spoken(row)) - self._common_shingles
        common = Counter[int]()
        for shingle in own:
            common.update(self._shingle_rows.get(shingle, ()))
        for place, count in common.items():
            similarity = count / (len(own) + self._shingle_counts[place] - count)
            if similarity >= self._near:
                detail = f"similarity {similarity:.2f}: {' '.join(spoken(row))[:60]}"
                return Reject(row.origin, f"nearly a {self._whose} row", detail)
        return None


def bands(rows: Iterable[set[str]], threshold: float) -> npt.NDArray[np.uint64]:
    """Return hashes of each row's MinHash bands: (rows, bands).

    Rows that share one are candidates for near-duplicates (Leskovec, Rajaraman and Ullman, "Mining
    of Massive Datasets", 3.4).
    """
    from datasketch import MinHash

    width = _band_width(threshold)
    count = _PERMUTATIONS // width
    encoded = ([shingle.encode() for shingle in row] for row in rows)
    sketches = MinHash.generator(encoded, num_perm=_PERMUTATIONS)
    blocks = [np.empty((0, count), dtype=np.uint64)]
    while block := list(islice(sketches, _BLOCK)):
        hashes = np.array([sketch.hashvalues for sketch in block], dtype=np.uint64)
        values = hashes[:, : count * width].reshape(len(block), count, width)
        mixed = np.zeros(values.shape[:2], dtype=np.uint64)
        for column in range(width):  # FNV-1a over the band's values
            mixed = (mixed ^ values[:, :, column]) * np.uint64(0x100000001B3)
            mixed += np.uint64(0x9E3779B97F4A7C15)
        blocks.append(mixed)
    return np.concatenate(blocks)


def near_duplicates(
    keys: npt.NDArray[np.uint64],
    shingles_of: Callable[[int], tuple[set[str], ...]],
    threshold: float,
    progress: Count = lambda done, total: None,
) -> list[tuple[int, int, float]]:
    """Return the rows to drop: (row, the earlier row that is kept, their similarity), by row.

    `keys` are the rows' `bands`, which say what pairs are compared. `shingles_of(i)` gives the
    shingles of row i, one set for each way to look at it; the similarity of two rows is the least
    of their exact Jaccard similarities. A row is dropped if it is at least `threshold` similar to
    an earlier one that is kept.
    """
    dropped: list[tuple[int, int, float]] = []
    gone: set[int] = set()
    hashes = _HashedRows(shingles_of)
    pairs = _pairs(keys)
    for done, pair in enumerate(pairs):
        if done % _PROGRESS_EVERY == 0:
            progress(done, len(pairs))
        later, earlier = divmod(int(pair), len(keys))
        if later in gone or earlier in gone:
            continue
        similarity = min(map(_jaccard, hashes[later], hashes[earlier]))
        if similarity >= threshold:
            gone.add(later)
            dropped.append((later, earlier, similarity))
    progress(len(pairs), len(pairs))
    return dropped


def _damage(row: Example) -> Reject | None:
    for message in row.messages:
        marker = _MARKER.search(message.content)
        if marker:
            return Reject(row.origin, "holds a template's marker", marker.group())
        broken = _BROKEN.search(message.content)
        if broken:
            around = message.content[max(0, broken.start() - 20) : broken.end() + 20]
            detail = f"U+{ord(broken.group()):04X} in {around!r}"
            return Reject(row.origin, "holds broken characters", detail)
    return None


def _wrong_length(row: Example, source: GeneralSource) -> Reject | None:
    if not source.min_words and source.max_words is None:
        return None
    count = sum(len(words(message.content)) for message in row.messages)
    if count < source.min_words:
        return Reject(row.origin, f"under {source.min_words} words", f"{count} words")
    if source.max_words is not None and count > source.max_words:
        return Reject(row.origin, f"over {source.max_words} words", f"{count} words")
    return None


def _wrong_language(row: Example, source: GeneralSource) -> Reject | None:
    if not source.languages:
        return None
    text = " ".join(spoken(row))[:_LANGUAGE_CHARACTERS]
    code = language(text)
    if code is None or code in source.languages:
        return None
    return Reject(row.origin, f"not in {' or '.join(source.languages)}", f"{code}: {text[:60]!r}")


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def _turns(row: Example) -> list[Turn]:
    return [(message.role, words(message.content)) for message in row.messages]


def _joined(messages: Iterable[Sequence[str]]) -> str:
    return " ".join(word for tokens in messages for word in tokens)


def _count_words(messages: Iterable[Sequence[str]]) -> int:
    return sum(map(len, messages))


def _all_short(messages: Iterable[Sequence[str]]) -> bool:
    return all(len(tokens) < SHORT_NGRAM for tokens in messages)


def _own_grams(tokens: Sequence[str]) -> set[Gram]:
    """Return the n-grams of a message, as long as its length allows."""
    if len(tokens) < SHORT_NGRAM:
        return set()
    n = NGRAM if len(tokens) >= NGRAM else SHORT_NGRAM
    return {(n, gram) for gram in _ngrams(tokens, n)}


def _ngrams(tokens: Sequence[str], n: int) -> list[str]:
    """Return all runs of n words.

    They are slices of the joined text, several times faster than joining each run.
    """
    text = " ".join(tokens)
    starts = [0, *accumulate(len(word) + 1 for word in tokens)]
    return [text[start : end - 1] for start, end in zip(starts, starts[n:], strict=False)]


def _band_width(threshold: float) -> int:
    """Return the widest band with which `_RECALL` of the pairs at `threshold` are found."""
    widest = 1
    for width in range(1, _PERMUTATIONS):
        missed = (1 - threshold**width) ** (_PERMUTATIONS // width)
        if 1 - missed >= _RECALL:
            widest = width
    return widest


class _HashedRows:
    """Rows' shingles as hashes of 64 bits; the latest stay in memory, up to `_CACHED_HASHES`."""

    def __init__(self, shingles_of: Callable[[int], tuple[set[str], ...]]) -> None:
        self._shingles_of = shingles_of
        self._cache = OrderedDict[int, tuple[Hashes, ...]]()
        self._size = 0  # hashes in the cache

    def __getitem__(self, row: int) -> tuple[Hashes, ...]:
        if row in self._cache:
            self._cache.move_to_end(row)
            return self._cache[row]
        views = []
        for view in self._shingles_of(row):
            views.append(np.sort(np.fromiter(map(hash, view), dtype=np.int64)))
        hashes = tuple(views)
        self._cache[row] = hashes
        self._size += sum(map(len, hashes))
        while self._size > _CACHED_HASHES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._size -= sum(map(len, oldest))
        return hashes


def _jaccard(a: Hashes, b: Hashes) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _pairs(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the pairs to compare, ascending: (later row) * (number of rows) + (earlier row).

    If many rows share a band, as those of one template do, each is compared with the first
    `_NEIGHBOURS` of them and with its `_NEIGHBOURS` neighbours in the order of the next bands:
    rows that share these too are sorted next to each other (as in an LSH forest; Bawa, Condie and
    Ganesan, WWW 2005).
    """
    rows, count = keys.shape
    pairs = np.empty(0, dtype=np.int64)
    for place in range(count):
        band = keys[:, place]
        by_band = np.argsort(band, kind="stable")
        starts = np.append(True, np.diff(band[by_band]) != 0)
        first = np.flatnonzero(starts)[np.cumsum(starts) - 1]  # where each row's run begins
        sort_keys = [band]  # last is first, as `lexsort` wants it
        for step in range(1, min(_SORT_BANDS, count) + 1):
            sort_keys.insert(0, keys[:, (place + step) % count])
        by_bands = np.lexsort(sort_keys)
        blocks = [pairs]
        for step in range(_NEIGHBOURS):
            in_run = first + step < np.arange(rows)
            blocks.append(by_band[in_run] * rows + by_band[first[in_run] + step])
        for step in range(1, _NEIGHBOURS + 1):
            a = by_bands[step:]
            b = by_bands[:-step]
            same = band[a] == band[b]
            blocks.append(np.maximum(a, b)[same] * rows + np.minimum(a, b)[same])
        pairs = np.unique(np.concatenate(blocks))
    return pairs
