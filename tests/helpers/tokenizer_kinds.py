"""Tokenizers of the kinds that are in use, trained on a few sentences on the spot."""

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from helpers.tiny import CHATML

SENTENCES = [
    "Where is my kettle? It was due on Monday.",
    "The lamp came late and the box was open.",
    "refund delivery login half cup user assistant system",
]
BYTES = [f"<0x{number:02X}>" for number in range(256)]
# As Llama 2's and Mistral's: a blank before each answer, which is no part of the prompt.
INST = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}{{- '[INST] ' + message['content'] + ' [/INST]' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] + eos_token -}}"
    "{%- else -%}{{- '[INST] ' + message['content'] + '\\n[/INST]' -}}{%- endif -%}"
    "{%- endfor -%}"
)


def byte_level(template: str = CHATML, *, rstrip: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2's, Llama 3's and Qwen's; `rstrip`: the end token swallows white space after it."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "<|im_start|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(SENTENCES, trainer)
    core.add_special_tokens([AddedToken("<|im_end|>", rstrip=rstrip, special=True)])
    return _finished(core, template)


def normalising() -> PreTrainedTokenizerFast:
    """A byte-level one that changes text to Unicode's form NFKC."""
    tokenizer = byte_level()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


def sentencepiece(template: str = CHATML, *, prepends: bool = True) -> PreTrainedTokenizerFast:
    """As Llama 2's, which puts a blank before each text; as Gemma's, if it does not."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    ends: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if prepends:
        steps.insert(0, normalizers.Prepend("▁"))
        ends.append(decoders.Strip(" ", 1, 0))
    core.normalizer = normalizers.Sequence(steps)
    core.decoder = decoders.Sequence(ends)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<unk>", "<pad>", "<s>", "<|im_start|>", "<|im_end|>", *BYTES],
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES * 3, trainer)
    return _finished(core, template, unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """As BERT's: words and their pieces, white space forgotten."""
    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300,
        special_tokens=["<unk>", "<pad>", "<s>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES, trainer)
    return _finished(core, CHATML, unk_token="<unk>")


def _finished(core: Tokenizer, template: str, **tokens: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        **tokens,
    )
    tokenizer.chat_template = template
    return tokenizer
