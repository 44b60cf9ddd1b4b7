"""Make the packaged general data: SmolLM2-135M-Instruct writes instructions and then answers them (Magpie, arXiv 2406.08464).

The chat template is rendered up to the start of a user turn, the model samples the rest of an instruction, and then answers it
in a fresh conversation. Left alone, a 135M model asks the same few things again and again, so the system turn names one of
the topics below and the user turn starts with one of the openings; neither system turn is stored. Every raw sample is kept or
rejected with a counted reason.

Two steps: `generate` appends batches to a raw JSONL file (one line a sample; a batch is written whole, and a rerun goes on
behind the last whole batch, each batch having its own seed), `package` filters the raw file and writes

    builtin_pool.jsonl.gz   rows {prompt, completion, family: "builtin", topic}
    builtin_eval.jsonl.gz   the same, from EVAL_TOPICS only: no topic, prompt or near-copy of one is shared with the pool

Invariant: `package` is a pure function of the raw file. (`generate` repeats its bits only on the same CPU and torch version.)

    python scripts/make_builtin_pool.py generate --raw pool_raw.jsonl --minutes 16
    python scripts/make_builtin_pool.py package --raw pool_raw.jsonl --out src/fulcrum/data
"""

import argparse
import gzip
import json
import random
import re
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

SEED = 20240401
BATCH_SIZE = 64
MAX_PROMPT_TOKENS, MAX_ANSWER_TOKENS = 60, 80
PROMPT_SAMPLING = {"temperature": 0.9, "top_p": 0.95, "top_k": 0}
ANSWER_SAMPLING = {"temperature": 0.6, "top_p": 0.9, "top_k": 0}
ASK_SYSTEM = "The user asks a short, clear question about {topic}."
ANSWER_SYSTEM = "You are a helpful assistant. Answer in one or two short sentences."
NEAR_DUPLICATE = 0.6  # Jaccard overlap of the prompts' character 8-grams
POOL_ROWS_PER_PREFIX = 40  # at most so many prompts with the same first four words: keeps one pet phrase from ruling
EVAL_ROWS = 96

POOL_TOPICS = """
apples; bread baking; breakfast; cheese; chocolate; cooking rice; herbs and spices; soup; vegetables; tea and coffee; pizza;
table manners; grocery shopping; food safety; vegetarian meals; restaurants; cleaning the kitchen; laundry; house plants;
gardening; compost; furniture; painting a room; home repairs; saving electricity; saving water; recycling; moving house;
neighbours; pets; dogs; cats; birds; fish; horses; bees; butterflies; elephants; whales; sharks; snakes; frogs; dinosaurs;
farm animals; endangered species; forests; deserts; rivers; oceans; mountains; islands; volcanoes; earthquakes; storms; clouds;
rain and snow; the seasons; the climate; air pollution; renewable energy; solar panels; wind power; batteries; electricity;
magnets; light and colour; sound; heat and temperature; gravity; atoms; chemical reactions; metals; water; the human heart;
the brain; bones and muscles; the skin; the eyes; sleep; stress; headaches; the common cold; vitamins; healthy eating;
walking and running; yoga; swimming; football; basketball; tennis; chess; board games; card games; puzzles; video games;
the Olympic Games; cycling; hiking; camping; fishing; photography; drawing; painting; sculpture; museums; architecture; bridges;
poetry; short stories; novels; fairy tales; libraries; newspapers; journalism; films; the theatre; dance; singing; the piano;
the guitar; classical music; jazz; festivals; holidays; birthdays; gifts; weddings; friendship; family; parenting; teachers;
schools; homework; exams; learning a language; English grammar; spelling; synonyms; punctuation; writing emails; letters;
public speaking; meetings; teamwork; leadership; job interviews; a first job; time management; motivation; goal setting; habits;
budgeting; saving money; banks; taxes; insurance; prices; small businesses; advertising; customer service; online shopping;
computers; the internet; passwords; email spam; smartphones; printers; spreadsheets; websites; programming; Python; databases;
algorithms; artificial intelligence; robots; video calls; social media; data privacy; addition and subtraction; multiplication;
fractions; percentages; geometry; probability; averages; measuring length; telling the time; calendars; maps; compasses;
trains; buses; airports; cars; bicycles; road safety; ships; space travel; the moon; the sun; planets; stars; telescopes;
ancient Egypt; ancient Rome; the Middle Ages; the Renaissance; explorers; inventions; the printing press; the steam engine;
kings and queens; democracy; elections; laws; courts; human rights; charity; volunteering; cities; villages; parks; Africa;
Asia; Europe; South America; Australia; capitals of countries; flags; languages of the world; traditional clothes; shoes; hats
"""
EVAL_TOPICS = """
honey; ice cream; umbrellas; lighthouses; penguins; owls; spiders; mushrooms; glaciers; rainbows; the lungs; teeth; first aid;
volleyball; skiing; kites; pottery; knitting; the violin; opera; comic books; diaries; proverbs; nicknames; telephones;
clocks; keyboards; search engines; prime numbers; triangles; elevators; tunnels; comets; the Vikings; Japan; Canada
"""
OPENINGS = """
What is|What are|What does|What do|What happens when|How do I|How do|How does|How can|How many|How long|Why do|Why is|Why are|
When did|When should I|Where can|Which|Who|Is it|Are there|Can I|Can you explain|Could you tell me|Should I|Do|Does|
I want to|I need|My friend|Give me|Give an example of|Give one reason why|List three|Name two|Name a|Define|Describe|Explain|
Explain why|Explain how|Compare|Suggest a|Recommend|Tell me|Write a sentence about|Write a short|Write one|Write a title for|
Summarize in one sentence|Complete this sentence:|Fix this sentence:|Rewrite this sentence:|Turn this sentence into a question:|
True or false:|Choose the correct word:|Make a list of|Help me
"""

REFUSAL = re.compile(
    r"\b(as an ai|language model|i'?m sorry|i apologi[sz]e|i can(?:no|')t (?:help|assist|provide|answer|access|fulfill|do)"
    r"|i am unable|i'm unable|i don'?t have (?:access|the ability|personal|enough))\b",
    re.I,
)
TEMPLATE_DAMAGE = re.compile(
    r"<\||\|>|</?s>|\[/?INST|^(?:system|user|assistant)\b\s*[:\n]|\n(?:system|user|assistant|human|ai)\b\s*[:\n]", re.I
)
MISSING_CONTEXT = re.compile(
    r"\b(the following|given (?:text|passage|sentence|paragraph|list)|the (?:text|passage|paragraph|image|picture|article) (?:above|below)"
    r"|this (?:text|passage|paragraph|image|picture|article))\b|\[[^\]]*\]|_{3,}",
    re.I,
)
ASSISTANT_VOICE = re.compile(r"\b(i'?d be happy to|here'?s a|here are|sure[,!]|certainly[,!]|i can help you|your question)\b", re.I)
Row = dict[str, Any]


def split_list(text: str, separator: str) -> list[str]:
    """Return the entries of one of the lists above."""
    return [entry.strip() for entry in text.replace("\n", " ").split(separator) if entry.strip()]


def words_of(text: str) -> list[str]:
    """Return the lower-case words and numbers of a text."""
    return re.findall(r"[a-z0-9']+", text.lower())


def repeat_share(text: str, n: int = 3) -> float:
    """Return the share of word n-grams that occurred before in the text, in [0, 1]; 0 for texts of fewer than 8 words."""
    words = words_of(text)
    if len(words) < 8:
        return 0.0
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def is_garbled(text: str) -> bool:
    """Tell whether a text holds control or non-Latin characters, or too few letters to be an English sentence."""
    odd = sum(not (c.isascii() and (c.isprintable() or c == "\n")) and c not in "‘’“”–—…°é×÷²³€£½" for c in text)
    letters = sum(c.isalpha() for c in text)
    return odd > 0 or "http" in text or "www." in text or (len(text) > 12 and letters < 0.55 * len(text))


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
    if prompt.count("\n") > 2 or repeat_share(prompt) > 0.15:
        return "prompt repetition"
    return None


def answer_fault(row: Row) -> str | None:
    """Return why an answer is not kept (a short reason that is counted), or None."""
    prompt, answer = row["prompt"], row["completion"]
    if not row["answer_finished"]:
        return "answer unfinished"
    if not answer:
        return "answer empty"
    if TEMPLATE_DAMAGE.search(answer):
        return "template damage"
    if is_garbled(answer):
        return "answer garbled"
    if REFUSAL.search(answer):
        return "refusal"
    if MISSING_CONTEXT.search(answer):
        return "answer lacks its text"
    if repeat_share(answer) > 0.2:
        return "answer repetition"
    asked, said = set(words_of(prompt)), words_of(answer)
    if "?" in answer[-2:] or " ".join(said).startswith(" ".join(words_of(prompt))) or len(asked | set(said)) <= len(asked) + 1:
        return "question echoed"
    return None


def shingles(text: str, n: int = 8) -> set[str]:
    """Return the character n-grams of the normalised text."""
    plain = " ".join(words_of(text))
    return {plain[i : i + n] for i in range(max(1, len(plain) - n + 1))}


class Deduplicator:
    """Prompts seen so far, indexed by shingle, so that a new one is compared only with those that share some."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.holders: dict[str, list[int]] = defaultdict(list)

    def is_new(self, prompt: str) -> bool:
        """Tell whether no earlier prompt reaches Jaccard overlap NEAR_DUPLICATE, and remember the prompt if so."""
        own = shingles(prompt)
        shared = Counter(i for gram in own for i in self.holders.get(gram, ()))
        if any(n / (len(own) + self.sizes[i] - n) >= NEAR_DUPLICATE for i, n in shared.items()):
            return False
        for gram in own:
            self.holders[gram].append(len(self.sizes))
        self.sizes.append(len(own))
        return True


def package(raw: Path, out: Path) -> Counter[str]:
    """Filter the raw file into the two packaged files; return the number of raw samples, kept rows and rejects by reason."""
    samples = [json.loads(line) for line in raw.read_text(encoding="utf-8").splitlines()]
    eval_topics = set(split_list(EVAL_TOPICS, ";"))
    counts: Counter[str] = Counter(raw=len(samples))
    kept: dict[str, list[Row]] = {"pool": [], "eval": []}
    seen, prefixes = Deduplicator(), Counter[str]()
    # Pool first: a near-copy between the two sides is then dropped from the eval side.
    for sample in sorted(samples, key=lambda s: s["topic"] in eval_topics):
        side = "eval" if sample["topic"] in eval_topics else "pool"
        prefix = " ".join(words_of(sample["prompt"])[:4])
        fault = prompt_fault(sample) or answer_fault(sample)
        if fault is None and prefixes[prefix] >= POOL_ROWS_PER_PREFIX:
            fault = "pet phrase"
        if fault is None and not seen.is_new(sample["prompt"]):
            fault = "duplicate prompt"
        if fault is None and side == "eval" and len(kept["eval"]) == EVAL_ROWS:
            fault = "eval full"
        if fault is not None:
            counts[f"reject: {fault}"] += 1
            continue
        prefixes[prefix] += 1
        row = {key: sample[key] for key in ("prompt", "completion")}
        kept[side].append(row | {"family": "builtin", "topic": sample["topic"]})
    for side, rows in kept.items():
        counts[f"kept: {side}"] = len(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        # mtime 0: equal rows give equal bytes
        (out / f"builtin_{side}.jsonl.gz").write_bytes(gzip.compress(text.encode(), compresslevel=9, mtime=0))
    return counts
