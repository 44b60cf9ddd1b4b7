"""A tiny language model, rows and settings for `same_behaviour.py`, all drawn from fixed seeds."""

import csv
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

COLOURS = ("red", "blue", "green")
ANIMALS = ("ant", "bee", "cow", "dog", "eel", "fox", "gnu", "hen", "jay", "owl", "pig", "yak")
CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)


def save_model(folder: Path) -> None:
    """Write a Llama of two layers with random weights, and a byte-level tokenizer for it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sentences = [f"colour {animal} say {animal} and Name it. system user" for animal in ANIMALS]
    core.train_from_iterator([*sentences, *COLOURS, "assistant Input: Output: question"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHATML
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(0)
    causal = AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=64,
            max_position_embeddings=512,
            initializer_range=0.2,  # so large that each part of the model shows in its logits
            **ids,
        )
    )
    _teach(causal, tokenizer)
    causal.generation_config = GenerationConfig(**ids)
    causal.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _teach(causal: Any, tokenizer: Any) -> None:
    """Train a little on turns of words: of noise `selfgen` would keep nothing."""
    draw = random.Random(0)
    optimizer = torch.optim.AdamW(causal.parameters(), lr=3e-3)
    for _ in range(200):
        said = [draw.choices(ANIMALS, k=draw.randint(3, 6)) for _ in range(8)]
        turns = [
            [
                {"role": "user", "content": "say " + " and ".join(animals)},
                {"role": "assistant", "content": " ".join(reversed(animals))},
            ]
            for animals in said
        ]
        texts = tokenizer.apply_chat_template(turns, tokenize=False)
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
        causal(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save_rows(folder: Path) -> None:
    """Write the rows of a task of colours and of general data, in several formats.

    Each general row has a number that no other row has, so that numbers tell which rows are meant.
    """
    folder.mkdir(parents=True, exist_ok=True)
    task = [
        {
            "prompt": f"colour {animal} {number}",
            "completion": COLOURS[(number + place) % 3],
            "group": f"{animal} {number // 2}",
        }
        for number in range(6)
        for place, animal in enumerate(ANIMALS)
    ]
    _write_lines(folder / "train.jsonl", task[:24])
    _write_lines(folder / "test.jsonl", task[24:48])
    _write_lines(folder / "more.jsonl", task[48:60])
    _write_lines(folder / "unlabeled.jsonl", ({"prompt": row["prompt"]} for row in task[60:]))
    second = [
        {
            "messages": [
                {"role": "user", "content": f"letter of {animal} {number}"},
                {"role": "assistant", "content": animal[0]},
            ]
        }
        for number in range(2)
        for animal in ANIMALS
    ]
    _write_lines(folder / "letters.jsonl", second)
    with (folder / "renamed.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("text", "label"))
        writer.writerows((row["prompt"], row["completion"]) for row in task[:24])
    general = []
    for number in range(600):
        one, other = ANIMALS[number % 12], ANIMALS[number // 12 % 12]
        row = {"prompt": f"say {one} and {other} {1000 + number}", "completion": f"{other} {one}"}
        general.append({**row, "family": ("short", "long")[number % 2]})
    general += [general[7], {"prompt": "colour ant 0", "completion": "red", "family": "short"}]
    _write_lines(folder / "pool.jsonl", general)
    _write_lines(folder / "outcomes.jsonl", _outcomes())


def _write_lines(path: Path, rows: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _outcomes() -> Iterable[dict[str, Any]]:
    """Yield outcomes as another trainer has them: a metric that rises and one that falls."""
    draw = torch.Generator().manual_seed(1)
    for arm, gain in (("sft", 0.0), ("sft_anchor", 0.05), ("tell", 0.25)):
        for size in (16, 32, 64, 128):
            for seed in range(3):
                score = 0.1 * size**0.35 + gain + 0.02 * float(torch.randn((), generator=draw))
                cell = {"arm": arm, "size": size, "seed": seed}
                yield {**cell, "dev": score, "tokens": 50 * size + seed}
                for row in range(20):
                    noise = 0.1 * float(torch.randn((), generator=draw))
                    about = {**cell, "row": f"t{row}", "group": f"g{row // 2}"}
                    yield {**about, "metric": "score", "outcome": score + noise}
                    yield {**about, "metric": "nll", "outcome": 3 - score + noise, "weight": 2}


def settings(name: str, **changes: Any) -> dict[str, Any]:
    """Return settings for the tiny model; `changes` replace sections."""
    base: dict[str, Any] = {
        "model": "material/model",
        "task": task(),
        "general": "material/pool.jsonl",
        "mix": {"general_per_task": 2, "repeats": 2},
        "train": {
            "dtype": "float32",
            "device": "cpu",
            "compile": "never",
            "learning_rate": 0.01,
            "batch_size": 4,
            "lora_r": 4,
            "lora_alpha": 8,
            "pack_tokens": 256,
        },
        "eval": {"general_rows": 8, "draws": 200},
        "output_dir": f"runs/{name}",
        "seed": 3,
    }
    if "tasks" in changes:
        del base["task"]
    return {**base, **changes}


def task(**changes: Any) -> dict[str, Any]:
    """Return the section of the task of colours; `changes` replace its keys."""
    return {
        "name": "colours",
        "train": "material/train.jsonl",
        "test": "material/test.jsonl",
        "group": "group",
        "anchor": "Name it.",
        "metrics": ["nll", "exact_match", "accuracy"],
        "max_new_tokens": 4,
        **changes,
    }
