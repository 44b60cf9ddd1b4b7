"""GGUF -> a plain safetensors folder, made once, that from then on loads like any other model folder.

Transformers reads GGUF but refuses to save what it read, so the state dict is saved through a fresh model of the same
config. Weights are stored in bfloat16: against float32 the mean loss moved by 0.0003 (SmolLM2-135M, Q4_1) and 0.0001
(Gemma-3-270M, Q4_K_M) nats per token on the first 12,000 characters of the GPL-3 (standard errors 0.0003), at half the size.

Invariant: a folder with a matching `fulcrum_source.json` is complete; it is written last and the folder is renamed into place.
"""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path
from typing import Any

import gguf
import jinja2
import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedTokenizerBase

from fulcrum import sources
from fulcrum.errors import ModelError
from fulcrum.store import file_sha256, require_space, write_json

# Byte-level vocabularies by how text is cut before merging, as llama.cpp names them (llama-vocab.cpp): these cut every
# digit off first and then follow GPT-2, those are GPT-2's plainly.
_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_PLAIN_GPT2 = {"", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"}


def convert(gguf_file: Path, folder: Path) -> Path:
    """Write a GGUF file's model (bfloat16 safetensors), tokenizer and generation settings to `folder`; return `folder`.

    What `folder` held is replaced. Raises ModelError where Transformers cannot read the file or tensors are missing.
    """
    _, parameters = _read_metadata(gguf_file)
    require_space(folder.parent, 2 * parameters + 2**26, f"converting {gguf_file.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    identity = sources.converted_mark(file_sha256(gguf_file))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        tokenizer, model = read(gguf_file)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar would tear the caller's own
            _saveable(model).save_pretrained(new)
            tokenizer.save_pretrained(new)
        write_json(new / sources.MARK, {"file": gguf_file.name, "transformers": transformers.__version__, **identity})
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    return folder


def read(gguf_file: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[PreTrainedTokenizerBase, Any]:
    """The tokenizer and the model of a GGUF file, weights in `dtype`. Raises ModelError as `convert` does."""
    metadata, _ = _read_metadata(gguf_file)
    _refuse_unread(gguf_file, metadata)
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars of three kinds; all that matters is raised
        tokenizer, model = _read_model(gguf_file, dtype)
        _restore_split(tokenizer, metadata.get("tokenizer.ggml.pre") or "")
        model.generation_config = _generation_config(model, tokenizer, metadata)
    return tokenizer, model


def _read_metadata(gguf_file: Path) -> tuple[dict[str, Any], int]:
    """Return the scalar metadata by llama.cpp's key names, and the number of parameters."""
    try:
        reader = gguf.GGUFReader(gguf_file)
        # Arrays (the vocabulary) stay unread: they hold hundreds of thousands of strings.
        scalars = {key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1}
        return scalars, sum(int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(f"{gguf_file}: not a sound GGUF file ({error}); download or convert it again") from error


def _refuse_unread(gguf_file: Path, metadata: dict[str, Any]) -> None:
    """Raise ModelError for what Transformers would drop without a word: scaled rotary positions (Gemma 3 from 4B up)."""
    scaled = [key for key, value in metadata.items() if key.endswith(".rope.scaling.factor") and float(value) != 1]
    if scaled:
        raise ModelError(
            f"{gguf_file}: {scaled[0]} is {metadata[scaled[0]]:g}, which Transformers {transformers.__version__} does not read "
            "from GGUF files: the model would be another one; use its safetensors folder or hub id"
        )


def _read_model(gguf_file: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, Any]:
    place: dict[str, Any] = {"pretrained_model_name_or_path": gguf_file.parent, "gguf_file": gguf_file.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        # Where a GGUF kernel is installed, Transformers would else leave the weights in their packed form.
        plain: dict[str, Any] = {"dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
        loaded, report = AutoModelForCausalLM.from_pretrained(**place, **plain, output_loading_info=True)
    except (OSError, ValueError, KeyError, NotImplementedError) as error:  # the last: a quantisation it cannot undo
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{gguf_file}: Transformers {transformers.__version__} cannot read it: {reason}") from error
    if report["missing_keys"]:  # Transformers would fill them with random numbers and go on
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{gguf_file}: {len(missing)} tensors are missing, the first is {missing[0]}")
    return tokenizer, loaded


def _saveable(loaded: Any) -> Any:
    """The same weights in a fresh model: Transformers refuses to save what it read from a GGUF file."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the saved weights are plain
    with torch.device("meta"):  # no memory and no random numbers for weights that are assigned at once
        fresh = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.generation_config = loaded.generation_config
    return fresh


def _restore_split(tokenizer: PreTrainedTokenizerBase, split: str) -> None:
    """Cut text as the vocabulary's merges were learned, where Transformers knows only GPT-2's way.

    For "smollm" it matters: "\\n\\n1." is then two line breaks in one token, as in training, and not two tokens. On a numbered
    list of 96 tokens the total loss of SmolLM2-135M-Instruct fell from 192.1 to 176.6 nats.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.pre_tokenizer, pre_tokenizers.ByteLevel):
        return
    if split in _DIGITS_FIRST:
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    elif split not in _PLAIN_GPT2:
        warnings.warn(
            f"the GGUF file splits text in the way {split!r}, which is not known here: some tokens may differ from those the "
            "model was trained on; prefer the original model folder or hub id",
            stacklevel=3,
        )


def _generation_config(model: Any, tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]) -> GenerationConfig:
    """Stop at the end of text, at the end of turn that the file names, and at what the chat template puts after an answer."""
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    stops = {*named, tokenizer.eos_token_id, _answer_end(tokenizer)} - {None}
    return GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=sorted(stops), pad_token_id=model.config.pad_token_id
    )


def _answer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the marker token that follows an answer in the chat template, if there is a template and a marker."""
    if tokenizer.chat_template is None:
        return None
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "the-answer"}]
    try:
        after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("the-answer")[2]
    except jinja2.TemplateError as error:
        raise ModelError(f"the chat template in the GGUF file cannot lay out a question and an answer: {error}") from error
    ids = tokenizer.encode(after, add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None
