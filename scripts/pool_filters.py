"""Say why an instruction or an answer of SmolLM2-135M-Instruct is not kept, and which are new.

Rules of thumb, set by reading some hundred samples. A sample is a dict with `prompt`,
`prompt_finished` and, once answered, `completion`, `answer_finished`. Nothing here judges whether
an answer is true.
"""

import re
from collections import Counter, defaultdict
from typing import Any

REFUSAL = re.compile(
    r"\b(as an ai|language model|chatbot|smollm|i'?m sorry|i apologi[sz]e"
    r"|i can(?:no|')t (?:help|assist|provide|answer|access|fulfill|do)"
    r"|i am unable|i'm unable|i don'?t have (?:access|the ability|personal|enough))\b",
    re.I,
)
TEMPLATE_DAMAGE = re.compile(
    r"<\||\|>|</?s>|\[/?INST|^(?:system|user|assistant)\b\s*[:\n]"
    r"|\n(?:system|user|assistant|human|ai)\b\s*[:\n]",
    re.I,
)
MISSING_CONTEXT = re.compile(
    r"\b(the following|given (?:text|passage|sentence|paragraph|list)"
    r"|the (?:text|passage|paragraph|image|picture|article) (?:above|below)"
    r"|this (?:text|passage|paragraph|image|picture|article))\b|\[[^\]]*\]|_{3,}",
    re.I,
)
ASSISTANT_VOICE = re.compile(
    r"\b(i'?d be happy to|here'?s a|here are|sure[,!]|certainly[,!]|i can help you"
    r"|your question)\b",
    re.I,
)
SENSITIVE = re.compile(
    r"\b(sex\w*|porn\w*|vagina|penis|nude|abortion|genocide|slave\w*|racis\w*"
    r"|rap(?:e|ist)|suicid\w*|murder\w*|kill\w*"
    r"|nazi\w*|terroris\w*|bomb\w*|cocaine|heroin|covid\S*|vaccin\w*)\b",
    re.I,
)
# A 135M model invents facts about people and firms; places and topics of the list may be named.
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+ (?:[A-Z]\. )?[A-Z][a-z]+")
PLACE = re.compile(
    r"Olympic|(?:North|South|West|East|Middle|Central|New|United|Great|Solar|Ancient|Los|San"
    r"|Roman|Industrial) [A-Z]"
)
EMPTY_TALK = re.compile(
    r"^(?:the age-old|the eternal|the right answer|the game of life|the art of [^.]*\.$|what a "
    r"|that's a |a great idea"
    r"|a wonderful way|sounds like|it's a pleasure|ah[,!]|alright)",
    re.I,
)
STAMMER = re.compile(r"\b(\w{3,}) \1\b", re.I)
ODD_BUT_FINE = "‘’“”–—…°é×÷²³€£½"
NEAR_DUPLICATE = 0.6  # Jaccard overlap of the prompts' character 8-grams
Row = dict[str, Any]


def words_of(text: str) -> list[str]:
    """Return the lower-case words and numbers of a text."""
    return re.findall(r"[a-z0-9']+", text.lower())


def repeat_share(text: str, n: int = 3) -> float:
    """Return the share of word n-grams that occurred before in the text, in [0, 1]; 0 for texts of
    fewer than 8 words."""
    words = words_of(text)
    if len(words) < 8:
        return 0.0
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def is_garbled(text: str) -> bool:
    """Tell whether a text holds control or non-Latin characters, or too few letters to be an
    English sentence."""
    odd = sum(
        not (c.isascii() and (c.isprintable() or c == "\n")) and c not in ODD_BUT_FINE for c in text
    )
    letters = sum(c.isalpha() for c in text)
    return (
        odd > 0
        or "http" in text
        or "www." in text
        or (len(text) > 12 and letters < 0.55 * len(text))
    )


def prompt_fault(row: Row) -> str | None:
    """Return why an instruction is not kept (a short reason that is counted), or None."""
    prompt = row["prompt"]
    if not row["prompt_finished"]:
        return "prompt unfinished"
    if not 4 <= len(words_of(prompt)) <= 45:
        return "prompt length"
    if TEMPLATE_DAMAGE.search(prompt):
        return "template damage"
    if is_garbled(prompt):
        return "prompt garbled"
    if ASSISTANT_VOICE.search(prompt) or REFUSAL.search(prompt):
        return "prompt is an answer"
    if MISSING_CONTEXT.search(prompt):
        return "prompt lacks its text"
    if prompt[-1] not in ".?!\"'":
        return "prompt without end mark"
    if re.search(r"\b(the user|user's)\b", prompt, re.I):
        return "prompt talks of the user"
    if SENSITIVE.search(prompt):
        return "sensitive"
    if prompt.count("\n") > 2 or STAMMER.search(prompt) or repeat_share(prompt) > 0.15:
        return "prompt repetition"
    if any(not PLACE.match(name[0]) for name in NAME.finditer(prompt)):
        return "prompt names someone"
    return None


def answer_fault(row: Row) -> str | None:
    """Return why an answer is not kept (a short reason that is counted), or None."""
    if "completion" not in row:
        return "prompt turned down by earlier filters"
    prompt, answer = row["prompt"], row["completion"]
    if not row["answer_finished"]:
        return "answer unfinished"
    if len(words_of(answer)) < 6:
        return "answer length"
    if EMPTY_TALK.search(answer):
        return "answer is empty talk"
    if TEMPLATE_DAMAGE.search(answer):
        return "template damage"
    if is_garbled(answer):
        return "answer garbled"
    if REFUSAL.search(answer):
        return "refusal"
    if SENSITIVE.search(answer):
        return "sensitive"
    if re.search(r"\bI(?:'m|'ve|'d|'ll)?\b", answer):
        return "answer in the first person"  # a made-up person's life, most of the time
    if MISSING_CONTEXT.search(answer):
        return "answer lacks its text"
    if STAMMER.search(answer) or repeat_share(answer) > 0.2:
        return "answer repetition"
    if answer[-1] not in ".?!\"')*":
        return "answer without end mark"
    if answer.startswith("1.") and "2." not in answer:
        return "list cut short"
    if "?" in answer[-2:]:
        return "answer asks back"
    asked, said = words_of(prompt), words_of(answer)
    if said[: len(asked)] == asked or len(set(said) - set(asked)) <= 1:
        return "question echoed"
    return None


def shingles(text: str, n: int = 8) -> set[str]:
    """Return the character n-grams of the normalised text."""
    plain = " ".join(words_of(text))
    return {plain[i : i + n] for i in range(max(1, len(plain) - n + 1))}


class Deduplicator:
    """Prompts seen so far, indexed by shingle, so that a new one is compared only with those that
    share some."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.holders: dict[str, list[int]] = defaultdict(list)

    def is_new(self, prompt: str) -> bool:
        """Tell whether no earlier prompt reaches Jaccard overlap NEAR_DUPLICATE, and remember the
        prompt if so."""
        own = shingles(prompt)
        shared = Counter(i for gram in own for i in self.holders.get(gram, ()))
        if any(n / (len(own) + self.sizes[i] - n) >= NEAR_DUPLICATE for i, n in shared.items()):
            return False
        for gram in own:
            self.holders[gram].append(len(self.sizes))
        self.sizes.append(len(own))
        return True
