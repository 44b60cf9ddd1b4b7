"""Make the packaged general data with SmolLM2-135M-Instruct.

It writes instructions and then answers them (Magpie, arXiv 2406.08464).

The chat template is rendered up to the start of a user turn, the model samples the rest of an
instruction, and then answers it in a fresh conversation. Left alone, a 135M model asks the same few
things again and again, so the system turn names a topic and the user turn starts with an opening,
both drawn from `pool_topics.yaml`. That system turn is not stored; answers are sampled under the
template's own default. Every raw sample is kept or rejected with a counted reason.

Two steps: `generate` writes raw batches, one JSONL file each with its own seed (a rerun makes those
that are missing), and `package` filters them and writes

    builtin_pool.jsonl.gz   rows {prompt, completion, family: "builtin", topic}
    builtin_eval.jsonl.gz   the same, about the eval topics, which no pool row names; no prompt
                            is near one of the pool

Invariant: `package` is a pure function of the raw files. (`generate` repeats its bits only on the
same CPU and torch version.)

    python scripts/make_builtin_pool.py generate --raw pool_raw
    python scripts/make_builtin_pool.py package --raw pool_raw --out src/fulcrum/data/builtin
"""

import argparse
import gzip
import json
import random
import re
import time
from collections import Counter
from multiprocessing import Process
from pathlib import Path
from typing import Any

from pool_filters import Deduplicator, answer_fault, prompt_fault, words_of

MODEL = "smollm2-135m-instruct"
SEED = 20240401
BATCH_SIZE, WORKERS = 64, 2
MIXED_BATCHES, EVAL_BATCHES = (
    76,
    4,
)  # first batches over all topics, then some over the eval topics alone
MAX_PROMPT_TOKENS, MAX_ANSWER_TOKENS = 32, 72
# of the vocabulary; a nucleus (top-p) would sort 49,152 logits a row and cost as much as the model
# itself
TOP_K = 40
PROMPT_TEMPERATURE, ANSWER_TEMPERATURE = 0.7, 0.3
# nats for the end token right after a sentence (not in lists): half of the answers would else not
# end
END_BIAS = 8.0
ASK_SYSTEM = "You are an expert on {topic}. You answer short, simple questions about {topic}."
ROWS_PER_PREFIX = (
    60  # at most so many prompts with the same first four words: keeps one pet phrase from ruling
)
EVAL_ROWS = 128
Row = dict[str, Any]


def word_list(name: str) -> list[str]:
    """Return one of the lists of `pool_topics.yaml`."""
    import yaml

    lists = yaml.safe_load(Path(__file__).with_name("pool_topics.yaml").read_text("utf-8"))
    return [entry.strip() for entry in re.split("[;|]", lists[name])]


def names_topic(sample: Row, topics: list[str]) -> bool:
    """Tell whether prompt or answer contains a topic's word (its plural s and "the" aside)."""
    stems = "|".join(topic.removeprefix("the ").removesuffix("s") for topic in topics)
    return (
        re.search(rf"\b({stems})", sample["prompt"] + "\n" + sample.get("completion", ""), re.I)
        is not None
    )


def side_fault(sample: Row, eval_topics: list[str], n_eval: int) -> str | None:
    """Return why a sound sample does not fit on its side, or None."""
    if sample["topic"] not in eval_topics:
        return "names an eval topic" if names_topic(sample, eval_topics) else None
    if not names_topic(sample, [sample["topic"]]):
        return "eval row off its topic"
    return "eval side full" if n_eval == EVAL_ROWS else None


def package(raw: Path, out: Path) -> Counter[str]:
    """Filter the raw batches into the two packaged files; return the counts of raw samples, kept
    rows and rejects by reason."""
    lines = [
        line
        for path in sorted(raw.glob("*.jsonl"))
        for line in path.read_text("utf-8").splitlines()
    ]
    samples = [json.loads(line) for line in lines]
    eval_topics = word_list("eval_topics")
    counts: Counter[str] = Counter(raw=len(samples))
    kept: dict[str, list[Row]] = {"pool": [], "eval": []}
    seen, prefixes = Deduplicator(), Counter[str]()
    # Pool first: of two near-copies on different sides, the eval side loses its one.
    for sample in sorted(samples, key=lambda s: s["topic"] in eval_topics):
        side = "eval" if sample["topic"] in eval_topics else "pool"
        prefix = " ".join(words_of(sample["prompt"])[:4])
        fault = (
            prompt_fault(sample)
            or answer_fault(sample)
            or side_fault(sample, eval_topics, len(kept["eval"]))
        )
        if fault is None and prefixes[prefix] >= ROWS_PER_PREFIX:
            fault = "pet phrase"
        if fault is None and not seen.is_new(sample["prompt"]):
            fault = "duplicate prompt"
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
        (out / f"builtin_{side}.jsonl.gz").write_bytes(
            gzip.compress(text.encode(), compresslevel=9, mtime=0)
        )
    return counts


class Sampler:
    """The model, and how it continues texts.

    Unlike `generate`, finished rows leave the batch at once (on a CPU the cost of a step is nearly
    proportional to its rows), and a sentence's end makes the end token likelier (END_BIAS).
    """

    def __init__(self, folder: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # Eager: with one query a row, plain products beat SDPA's CPU kernel by a third. One thread
        # in each of two processes beats two threads, whose barriers stall as soon as anything else
        # runs on the machine.
        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, attn_implementation="eager"
        )
        pieces = self.tokenizer.batch_decode([[i] for i in range(self.model.config.vocab_size)])
        self.closes = torch.tensor(
            [piece.rstrip("\"')*").endswith((".", "!", "?")) for piece in pieces]
        )
        # "1." opens a list item and ends no sentence.
        self.number = torch.tensor([piece.strip().isdigit() for piece in pieces])

    def render(self, messages: list[dict[str, str]], *, go_on: bool) -> str:
        """Return the chat template's text, up to inside the last message (`go_on`) or up to the
        answer's start."""
        text: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, continue_final_message=go_on, add_generation_prompt=not go_on
        )
        return text

    def sample(
        self, texts: list[str], max_new: int, temperature: float, end_bias: float
    ) -> list[tuple[str, bool]]:
        """Continue each text until the end token or `max_new` tokens; return (text, whether the end
        came), in order."""
        import torch

        end = self.tokenizer.eos_token_id
        batch = self.tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        mask, token, alive = batch.attention_mask, batch.input_ids, torch.arange(len(texts))
        out: list[list[int]] = [[] for _ in texts]
        done = [False] * len(texts)
        cache, before, listing = (
            None,
            batch.input_ids[:, -1],
            torch.zeros(len(texts), dtype=torch.bool),
        )
        with torch.inference_mode():
            for _ in range(max_new):
                positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -token.shape[1] :]
                step = self.model(
                    input_ids=token,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                    logits_to_keep=1,
                )
                cache, logits = step.past_key_values, step.logits[:, -1].float()
                if end_bias:
                    listing |= self.closes[token[:, -1]] & self.number[before]
                    logits[:, end] += end_bias * (self.closes[token[:, -1]] & ~listing)
                top = (logits / temperature).topk(TOP_K)
                new = top.indices.gather(1, torch.multinomial(top.values.softmax(-1), 1))
                for row, value in zip(alive.tolist(), new[:, 0].tolist(), strict=True):
                    done[row] = value == end
                    if value != end:
                        out[row].append(value)
                keep = (new[:, 0] != end).nonzero()[:, 0]
                if not len(keep):
                    break
                before, token, listing = token[keep, -1], new[keep], listing[keep]
                alive, mask = (
                    alive[keep],
                    torch.cat([mask[keep], torch.ones(len(keep), 1, dtype=mask.dtype)], 1),
                )
                if len(keep) < len(new):
                    cache.batch_select_indices(keep)
        return [(self.tokenizer.decode(ids), ended) for ids, ended in zip(out, done, strict=True)]


def make_batch(sampler: Sampler, number: int) -> list[Row]:
    """Return batch `number`: every instruction asked, with its answer where `prompt_fault` lets it
    through."""
    import torch

    torch.manual_seed(SEED + number)
    rng = random.Random(SEED + number)
    topics, openings = word_list("eval_topics"), word_list("openings")
    if number < MIXED_BATCHES:
        topics = word_list("pool_topics") + topics
    rows: list[Row] = [
        {"topic": rng.choice(topics), "opening": rng.choice(openings)} for _ in range(BATCH_SIZE)
    ]
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
    for row, (text, ended) in zip(
        rows, sampler.sample(asked, MAX_PROMPT_TOKENS, PROMPT_TEMPERATURE, 0.0), strict=True
    ):
        row.update(batch=number, prompt=(row.pop("opening") + text).strip(), prompt_finished=ended)
    good = [row for row in rows if prompt_fault(row) is None]
    texts = [
        sampler.render([{"role": "user", "content": row["prompt"]}], go_on=False) for row in good
    ]
    for row, (text, ended) in zip(
        good, sampler.sample(texts, MAX_ANSWER_TOKENS, ANSWER_TEMPERATURE, END_BIAS), strict=True
    ):
        row.update(completion=text.strip(), answer_finished=ended)
    return rows


def generate(raw: Path, worker: int) -> None:
    """Write batches `worker`, `worker` + WORKERS ... into `raw`, skipping those that exist."""
    from fulcrum.model.download import prepare

    raw.mkdir(parents=True, exist_ok=True)
    sampler, start = Sampler(prepare(MODEL)), time.monotonic()
    for number in range(worker, MIXED_BATCHES + EVAL_BATCHES, WORKERS):
        path = raw / f"{number:05}.jsonl"
        if path.exists():
            continue
        rows = make_batch(sampler, number)
        half = path.with_suffix(".tmp")
        half.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8"
        )
        half.replace(path)
        good = sum("completion" in row and answer_fault(row) is None for row in rows)
        print(
            f"batch {number}: {good} of {len(rows)} pass the row filters, "
            f"{time.monotonic() - start:.0f} s",
            flush=True,
        )


def main() -> None:
    """Run one of the two steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=["generate", "package"])
    parser.add_argument("--raw", type=Path, required=True, help="folder of the raw samples")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("src/fulcrum/data/builtin"),
        help="folder of the packaged files",
    )
    args = parser.parse_args()
    if args.step == "package":
        for what, n in package(args.raw, args.out).items():
            print(f"{n:6} {what}")
        return
    processes = [Process(target=generate, args=(args.raw, worker)) for worker in range(WORKERS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


if __name__ == "__main__":
    main()
