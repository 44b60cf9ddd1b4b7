"""Tiny random language models of many architectures, with a real tokenizer, made on the spot in
some hundredths of a second.

`save_tiny` writes a model folder, `load_tiny` opens one as Fulcrum does. Weights are drawn from a
fixed seed and are large (standard deviation 0.2), so that attention, windows and soft-caps change
the logits visibly.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    GPT2Config,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from fulcrum.config.arms import ARMS, recipe
from fulcrum.config.experiments import Arm
from fulcrum.config.sections import TrainSettings
from fulcrum.config.settings import Settings, settings_from_dict
from fulcrum.core.progress import Silent
from fulcrum.experiments.cell import Session
from fulcrum.model import base_model
from fulcrum.model.base_model import LoadedModel

torch.set_num_threads(
    1
)  # thread hand-over costs more than these matrices, and results then repeat on every machine

WINDOW = 8  # tokens of the sliding window, where an architecture has one
CONTEXT = 512

CHATML = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

# As Gemma's: content is trimmed, the assistant is called model, a system text joins the first user
# turn.
TRIMMING = (
    "{{- bos_token -}}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{%- set first = messages[0]['content'] + '\\n\\n' -%}{%- set messages = messages[1:] -%}"
    "{%- else -%}{%- set first = '' -%}{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + ('model' if message['role'] == 'assistant' else message['role']) + "
    "'\\n' -}}"
    "{{- (first if loop.first else '') + message['content'] | trim + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>model\\n' -}}{%- endif -%}"
)

# As those of reasoning models: what an earlier answer thought is dropped from past turns.
FORGETFUL = (
    "{%- for message in messages -%}"
    "{%- set text = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and not loop.last -%}{%- set text = "
    "text.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Sort the ticket below; answer with one JSON object: refund, delivery or login.",
    "What is the capital of France? The capital of France is Paris.",
    "system user assistant model Input: Output: question and answer",
    "Where is my parcel? I was charged twice. I cannot sign in to my account.",
)

_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT}


def _configuration(kind: str, vocabulary: dict[str, int]) -> Any:
    """A tiny configuration of one architecture.

    Soft-caps and scales are set so that leaving them out would show.
    """
    if kind == "llama":
        return LlamaConfig(**_GROUPED, **vocabulary)
    if kind == "mistral":
        return MistralConfig(**_GROUPED, head_dim=8, sliding_window=WINDOW, **vocabulary)
    if kind == "qwen3":
        return Qwen3Config(**_GROUPED, head_dim=8, tie_word_embeddings=True, **vocabulary)
    if kind == "gemma2":
        return Gemma2Config(
            **_GROUPED,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=3.0,
            **vocabulary,
        )
    if kind == "gemma3":
        layers = ["sliding_attention", "full_attention"]
        return Gemma3TextConfig(
            **_GROUPED,
            head_dim=8,
            query_pre_attn_scalar=8,
            sliding_window=WINDOW,
            layer_types=layers,
            **vocabulary,
        )
    if kind == "granite":
        return GraniteConfig(
            **_GROUPED,
            logits_scaling=4.0,
            embedding_multiplier=2.0,
            residual_multiplier=0.5,
            **vocabulary,
        )
    if kind == "cohere":
        return CohereConfig(**_GROUPED, logit_scale=0.25, **vocabulary)
    if kind == "gpt2":
        return GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **vocabulary)
    if kind == "lfm2":
        return Lfm2Config(
            **_GROUPED,
            layer_types=["conv", "full_attention"],
            block_auto_adjust_ff_dim=False,
            conv_L_cache=3,
            **vocabulary,
        )
    if kind == "mamba":
        return MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **vocabulary)
    raise ValueError(kind)


def tiny_tokenizer(template: bool | str = True) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML's markers; `template` is its chat template, False for
    a base model.

    A base model's tokenizer starts every text with <s>, as Llama's and Gemma's do.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=360,
        special_tokens=["<pad>", "<s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(_SENTENCES, trainer)
    if template is False:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    if template is not False:
        tokenizer.chat_template = CHATML if template is True else template
    return tokenizer


def save_tiny(folder: Path, kind: str = "llama", *, template: bool | str = True) -> Path:
    """Write a tiny random causal language model of an architecture, and its tokenizer, into
    `folder`; returns the folder."""
    tokenizer = tiny_tokenizer(template)
    vocabulary = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    configuration = _configuration(kind, vocabulary)
    configuration.initializer_range = 0.2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        causal = AutoModelForCausalLM.from_config(configuration)
    causal.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    causal.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def load_tiny(
    folder: Path, kind: str = "llama", *, template: bool | str = True, **train_settings: Any
) -> base_model.LoadedModel:
    """Save a tiny model below `folder` and load it through Fulcrum, in fp32 on the CPU unless
    `train_settings` differ."""
    place = folder / f"tiny-{kind}"
    if not place.exists():
        save_tiny(place, kind, template=template)
    return base_model.load(str(place), tiny_settings(**train_settings))


def tiny_settings(**changes: Any) -> TrainSettings:
    """Trainer settings that suit a tiny model."""
    return TrainSettings(
        **{
            "dtype": "float32",
            "device": "cpu",
            "lora_r": 4,
            "lora_alpha": 8.0,
            "batch_size": 4,
            **changes,
        }
    )


def write_rows(path: Path, pairs: Iterable[tuple[str, str]]) -> str:
    """Write prompt-completion rows as JSON lines; returns the path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": a, "completion": b}) + "\n" for a, b in pairs))
    return str(path)


WORDS = (
    "ant",
    "bee",
    "cow",
    "dog",
    "eel",
    "fox",
    "gnu",
    "hen",
    "ibis",
    "jay",
    "kiwi",
    "lynx",
    "mole",
    "newt",
    "owl",
    "pig",
)


def save_task(folder: Path, train: int, test: int, *, pool: int = 1) -> Path:
    """Write a tiny model, a task of colours (train.jsonl, test.jsonl) and a pool of 256 x `pool`
    rows into `folder`."""
    save_tiny(folder / "model")
    rows = [
        (f"colour {word} {k}", ("red", "blue", "green")[(k + n) % 3])
        for k in range(4)
        for n, word in enumerate(WORDS)
    ]
    write_rows(folder / "train.jsonl", rows[:train])
    write_rows(folder / "test.jsonl", rows[train : train + test])
    said = [(f"say {a} and {b} {k}", f"{b} {a}") for k in range(pool) for a in WORDS for b in WORDS]
    write_rows(folder / "pool.jsonl", said)
    return folder


def comparison_settings(folder: Path, output: Path, **changes: Any) -> Settings:
    """Settings of a comparison on what `save_task` wrote; `changes` are sections."""
    data: dict[str, Any] = {
        "model": str(folder / "model"),
        "task": {
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "anchor": "Name it.",
            "metrics": ["nll"],
            "max_new_tokens": 4,
        },
        "general": str(folder / "pool.jsonl"),
        "mix": {"general_per_task": 2, "repeats": 1},
        "train": tiny_settings().model_dump(),
        "eval": {"general_rows": 2, "draws": 100},
        "output_dir": str(output),
        **changes,
    }
    return settings_from_dict(data)


def arm_named(name: str) -> Arm:
    """Return a built-in arm, or one that docs/recipes/arms.md describes."""
    return ARMS[name] if name in ARMS else Arm(**yaml.safe_load(recipe(name)))


def session(loaded: LoadedModel, settings: Settings, folder: Path | None = None) -> Session:
    """Return a session that nobody listens to."""
    return Session(loaded, settings, folder, Silent())
