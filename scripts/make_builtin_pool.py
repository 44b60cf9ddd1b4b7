"""Make the packaged general data: SmolLM2-135M-Instruct writes instructions and then answers them (Magpie, arXiv 2406.08464).

The chat template is rendered up to the start of a user turn, the model samples the rest of an instruction, and then answers it
in a fresh conversation. Left alone, a 135M model asks the same few things again and again, so the system turn names one of
the topics below and the user turn starts with one of the openings. That system turn is not stored; answers are sampled under the
template's own default. Every raw sample is kept or rejected with a counted reason.

Two steps: `generate` appends batches to raw JSONL files (one line a sample; each batch has its own seed and is written whole,
and a rerun goes on behind the last one), `package` filters them and writes

    builtin_pool.jsonl.gz   rows {prompt, completion, family: "builtin", topic}
    builtin_eval.jsonl.gz   the same, from EVAL_TOPICS only: no topic, prompt or near-copy of one is shared with the pool

Invariant: `package` is a pure function of the raw files. (`generate` repeats its bits only on the same CPU and torch version.)

    python scripts/make_builtin_pool.py generate --raw pool_raw --minutes 16
    python scripts/make_builtin_pool.py package --raw pool_raw --out src/fulcrum/data
"""

import argparse
import gzip
import json
import random
import re
import time
from collections import Counter, defaultdict
from multiprocessing import Process
from pathlib import Path
from typing import Any

MODEL = "smollm2-135m-instruct"
SEED = 20240401
BATCH_SIZE, WORKERS = 64, 2
MAX_PROMPT_TOKENS, MAX_ANSWER_TOKENS = 32, 72
TOP_K = 40  # of the vocabulary; a nucleus (top-p) would sort 49,152 logits a row and cost as much as the model itself
PROMPT_TEMPERATURE, ANSWER_TEMPERATURE = 0.8, 0.5
END_BIAS = 4.0  # nats for the end token right after a sentence: half of the answers would else not end in 72 tokens
ASK_SYSTEM = "You are an expert on {topic}. You answer short, simple questions about {topic}."
NEAR_DUPLICATE = 0.6  # Jaccard overlap of the prompts' character 8-grams
ROWS_PER_PREFIX = 30  # at most so many prompts with the same first four words: keeps one pet phrase from ruling
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
When should I|Where can|Which|Is it|Are there|Can I|Can you explain|Could you tell me|Should I|Do|Does|I want to|I need|My friend|
Give me|Give an example of|Give one reason why|List three|Name two|Name one|Define|Describe|Explain|Explain why|Explain how|
Compare|Suggest a|Recommend a|Tell me about|Tell me why|Write a sentence about|Write one sentence that|Write a title for a
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
ASSISTANT_VOICE = re.compile(
    r"\b(i'?d be happy to|here'?s a|here are|sure[,!]|certainly[,!]|i can help you|your question)\b", re.I
)
SENSITIVE = re.compile(
    r"\b(sex\w*|porn\w*|rap(?:e|ist)|suicid\w*|murder\w*|kill\w*|nazi\w*|terroris\w*|bomb\w*|cocaine|heroin|covid\S*|vaccin\w*)\b",
    re.I,
)
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+ (?:[A-Z]\. )?[A-Z][a-z]+")  # a 135M model invents facts about people and firms
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
    if SENSITIVE.search(prompt):
        return "sensitive"
    if prompt.count("\n") > 2 or repeat_share(prompt) > 0.15:
        return "prompt repetition"
    if NAME.search(prompt) and not any(topic in prompt for topic in split_list(POOL_TOPICS + ";" + EVAL_TOPICS, ";")):
        return "prompt names someone"
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
    if SENSITIVE.search(answer):
        return "sensitive"
    if MISSING_CONTEXT.search(answer):
        return "answer lacks its text"
    if repeat_share(answer) > 0.2:
        return "answer repetition"
    asked, said = set(words_of(prompt)), words_of(answer)
    if answer[-1] not in ".?!\"')*":
        return "answer without end mark"
    if answer.startswith("1.") and "2." not in answer:
        return "list cut short"
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
    """Filter the raw files into the two packaged ones; return the counts of raw samples, kept rows and rejects by reason."""
    lines = [line for path in raw.glob("worker*.jsonl") for line in path.read_text("utf-8").splitlines()]
    samples = sorted(map(json.loads, lines), key=lambda row: row["batch"])
    eval_topics = set(split_list(EVAL_TOPICS, ";"))
    counts: Counter[str] = Counter(raw=len(samples))
    kept: dict[str, list[Row]] = {"pool": [], "eval": []}
    seen, prefixes = Deduplicator(), Counter[str]()
    # Pool first: a near-copy between the two sides is then dropped from the eval side.
    for sample in sorted(samples, key=lambda s: s["topic"] in eval_topics):
        side = "eval" if sample["topic"] in eval_topics else "pool"
        prefix = " ".join(words_of(sample["prompt"])[:4])
        fault = prompt_fault(sample) or answer_fault(sample)
        if fault is None and prefixes[prefix] >= ROWS_PER_PREFIX:
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


class Sampler:
    """The model, and how it continues texts.

    Unlike `generate`, finished rows leave the batch at once (on a CPU the cost of a step is nearly proportional to its rows),
    and a sentence's end makes the end token likelier (END_BIAS).
    """

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # Eager: with one query a row, plain products beat SDPA's CPU kernel by a third. One thread in each of two processes
        # beats two threads, whose barriers stall as soon as anything else runs on the machine.
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
        pieces = self.tokenizer.batch_decode([[i] for i in range(self.model.config.vocab_size)])
        self.closes = torch.tensor([piece.rstrip("\"')*").endswith((".", "!", "?")) for piece in pieces])
        # "1." opens a list item and ends no sentence.
        self.number = torch.tensor([piece.strip().isdigit() for piece in pieces])

    def render(self, messages: list[dict[str, str]], *, go_on: bool) -> str:
        """Return the chat template's text, up to inside the last message (`go_on`) or up to the answer's start."""
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=go_on, add_generation_prompt=not go_on
        )
        return text

    def sample(self, texts: list[str], max_new: int, temperature: float, end_bias: float) -> list[tuple[str, bool]]:
        """Continue each text until the end token or `max_new` tokens; return (text, whether the end came), in order."""
        import torch

        end = self.tokenizer.eos_token_id
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        mask, token, alive = batch.attention_mask, batch.input_ids, torch.arange(len(texts))
        out: list[list[int]] = [[] for _ in texts]
        done = [False] * len(texts)
        cache, before = None, batch.input_ids[:, -1]
        with torch.inference_mode():
            for _ in range(max_new):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -token.shape[1] :]
                step = self.model(
                    input_ids=token, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
                )
                cache, logits = step.past_key_values, step.logits[:, -1].float()
                if end_bias:
                    logits[:, end] += end_bias * (self.closes[token[:, -1]] & ~self.number[before])
                top = (logits / temperature).topk(TOP_K)
                new = top.indices.gather(1, torch.multinomial(top.values.softmax(-1), 1))
                for row, value in zip(alive.tolist(), new[:, 0].tolist(), strict=True):
                    done[row] = value == end
                    if value != end:
                        out[row].append(value)
                keep = (new[:, 0] != end).nonzero()[:, 0]
                if not len(keep):
                    break
                before, token = token[keep, -1], new[keep]
                alive, mask = alive[keep], torch.cat([mask[keep], torch.ones(len(keep), 1, dtype=mask.dtype)], 1)
                if len(keep) < len(new):
                    cache.batch_select_indices(keep)
        return [(self.tokenizer.decode(ids), ended) for ids, ended in zip(out, done, strict=True)]


def make_batch(sampler: Sampler, number: int) -> list[Row]:
    """Return batch `number`: every instruction asked, with its answer where `prompt_fault` lets it through."""
    import torch

    torch.manual_seed(SEED + number)
    rng = random.Random(SEED + number)
    # The eval topics' share of the raw samples is twice their share of the list: a few must fill EVAL_ROWS.
    topics = split_list(POOL_TOPICS, ";") + 2 * split_list(EVAL_TOPICS, ";")
    openings = split_list(OPENINGS, "|")
    rows: list[Row] = [{"topic": rng.choice(topics), "opening": rng.choice(openings)} for _ in range(BATCH_SIZE)]
    asked = [
        sampler.render(
            [
                {"role": "system", "content": ASK_SYSTEM.format(topic=row["topic"])},
                {"role": "user", "content": row["opening"]},
            ],
            go_on=True,
        )
        for row in rows
    ]
    for row, (text, ended) in zip(rows, sampler.sample(asked, MAX_PROMPT_TOKENS, PROMPT_TEMPERATURE, 0.0), strict=True):
        row.update(batch=number, prompt=(row.pop("opening") + text).strip(), prompt_finished=ended)
    good = [row for row in rows if prompt_fault(row) is None]
    texts = [sampler.render([{"role": "user", "content": row["prompt"]}], go_on=False) for row in good]
    for row, (text, ended) in zip(good, sampler.sample(texts, MAX_ANSWER_TOKENS, ANSWER_TEMPERATURE, END_BIAS), strict=True):
        row.update(completion=text.strip(), answer_finished=ended)
    return rows


def generate(raw: Path, worker: int, minutes: float) -> None:
    """Append batches `worker`, `worker` + WORKERS, … to this worker's raw file until the time is up."""
    from fulcrum.gguf import prepare

    raw.mkdir(parents=True, exist_ok=True)
    path = raw / f"worker{worker}.jsonl"
    whole = [json.loads(line) for line in path.read_text("utf-8").splitlines()] if path.exists() else []
    number = max((row["batch"] for row in whole), default=worker - WORKERS) + WORKERS
    sampler, start = Sampler(str(prepare(MODEL))), time.monotonic()
    while time.monotonic() - start < 60 * minutes:
        rows = make_batch(sampler, number)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        good = sum("completion" in row and answer_fault(row) is None for row in rows)
        print(f"batch {number}: {good} of {len(rows)} pass the row filters, {time.monotonic() - start:.0f} s", flush=True)
        number += WORKERS


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["generate", "package"])
    parser.add_argument("--raw", type=Path, required=True, help="folder of the raw samples")
    parser.add_argument("--out", type=Path, default=Path("src/fulcrum/data"), help="folder of the packaged files")
    parser.add_argument("--minutes", type=float, default=16.0, help="stop after this time (default: 16)")
    args = parser.parse_args()
    if args.step == "package":
        for what, n in package(args.raw, args.out).items():
            print(f"{n:6} {what}")
        return
    processes = [Process(target=generate, args=(args.raw, worker, args.minutes)) for worker in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
