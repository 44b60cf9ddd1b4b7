"""GGUF -> a plain safetensors folder, made once, that from then on loads like any other model folder.

Transformers reads GGUF but refuses to save what it read, so the state dict is saved through a fresh model of the same
config. Weights are stored in bfloat16: against float32 the mean loss moved by 0.0003 (SmolLM2-135M, Q4_1) and 0.0001
(Gemma-3-270M, Q4_K_M) nats per token on the first 12,000 characters of the GPL-3 (standard errors 0.0003), at half the size.

Invariant: a folder with a matching `fulcrum_source.json` is complete; it is written last and the folder is renamed into place.

A merged model as a GGUF file, for models that came as one: the source's metadata, with the changed tensors replaced.

llama.cpp stores some tensors in an order of its own (rotary rows of queries and keys). Which order a tensor has is not looked
up by architecture but found: the one in which the base model's tensor is that of the source file. Tensors that no adapter
changed are the source's own numbers, so that what else an architecture asks for (Gemma's norms plus one) is as it was.
"""

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import jinja2
import numpy as np
import numpy.typing as npt
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedTokenizerBase,
)

from fulcrum.core.errors import ModelError
from fulcrum.core.store import file_sha256, require_space, write_json
from fulcrum.data import encode
from fulcrum.model import registry

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
    identity = registry.converted_mark(file_sha256(gguf_file))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new, old = Path(scratch, "new"), Path(scratch, "old")
        tokenizer, model = read(gguf_file)
        with contextlib.redirect_stderr(
            io.StringIO()
        ):  # its progress bar would tear the caller's own
            _saveable(model).save_pretrained(new)
            tokenizer.save_pretrained(new)
        write_json(
            new / registry.MARK,
            {"file": gguf_file.name, "transformers": transformers.__version__, **identity},
        )
        if folder.exists():
            folder.replace(old)
        new.replace(folder)
    return folder


def read(
    gguf_file: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedTokenizerBase, Any]:
    """The tokenizer and the model of a GGUF file, weights in `dtype`. Raises ModelError as `convert` does."""
    metadata, _ = _read_metadata(gguf_file)
    _refuse_unread(gguf_file, metadata)
    with contextlib.redirect_stderr(
        io.StringIO()
    ):  # progress bars of three kinds; all that matters is raised
        tokenizer, model = _read_model(gguf_file, dtype)
        _restore_split(tokenizer, metadata.get("tokenizer.ggml.pre") or "")
        model.generation_config = _generation_config(model, tokenizer, metadata)
    return tokenizer, model


def _read_metadata(gguf_file: Path) -> tuple[dict[str, Any], int]:
    """Return the scalar metadata by llama.cpp's key names, and the number of parameters."""
    try:
        reader = gguf.GGUFReader(gguf_file)
        # Arrays (the vocabulary) stay unread: they hold hundreds of thousands of strings.
        scalars = {
            key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1
        }
        return scalars, sum(int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(
            f"{gguf_file}: not a sound GGUF file ({error}); download or convert it again"
        ) from error


def _refuse_unread(gguf_file: Path, metadata: dict[str, Any]) -> None:
    """Raise ModelError for what Transformers would drop without a word: scaled rotary positions (Gemma 3 from 4B up)."""
    scaled = [
        key
        for key, value in metadata.items()
        if key.endswith(".rope.scaling.factor") and float(value) != 1
    ]
    if scaled:
        raise ModelError(
            f"{gguf_file}: {scaled[0]} is {metadata[scaled[0]]:g}, which Transformers {transformers.__version__} does not read "
            "from GGUF files: the model would be another one; use its safetensors folder or hub id"
        )


def _read_model(gguf_file: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, Any]:
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf_file.parent,
        "gguf_file": gguf_file.name,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        # Where a GGUF kernel is installed, Transformers would else leave the weights in their packed form.
        plain: dict[str, Any] = {"dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
        loaded, report = AutoModelForCausalLM.from_pretrained(
            **place, **plain, output_loading_info=True
        )
    except (
        OSError,
        ValueError,
        KeyError,
        NotImplementedError,
    ) as error:  # the last: a quantisation it cannot undo
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{gguf_file}: Transformers {transformers.__version__} cannot read it: {reason}"
        ) from error
    if report["missing_keys"]:  # Transformers would fill them with random numbers and go on
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{gguf_file}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    return tokenizer, loaded


def _saveable(loaded: Any) -> Any:
    """The same weights in a fresh model: Transformers refuses to save what it read from a GGUF file."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the saved weights are plain
    with torch.device(
        "meta"
    ):  # no memory and no random numbers for weights that are assigned at once
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
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), byte_level]
        )
    elif split not in _PLAIN_GPT2:
        warnings.warn(
            f"the GGUF file splits text in the way {split!r}, which is not known here: some tokens may differ from those the "
            "model was trained on; prefer the original model folder or hub id",
            stacklevel=3,
        )


def _generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]
) -> GenerationConfig:
    """Stop at the end of text, at the end of turn that the file names, and at what the chat template puts after an answer."""
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    stops = {*named, tokenizer.eos_token_id, _answer_end(tokenizer)} - {None}
    return GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=sorted(stops),
        pad_token_id=model.config.pad_token_id,
    )


def _answer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the marker token that follows an answer in the chat template, if there is a template and a marker."""
    if tokenizer.chat_template is None:
        return None
    turns = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "the-answer"},
    ]
    try:
        after = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition("the-answer")[
            2
        ]
    except jinja2.TemplateError as error:
        raise ModelError(
            f"the chat template in the GGUF file cannot lay out a question and an answer: {error}"
        ) from error
    ids = tokenizer.encode(after, add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


KINDS: Mapping[str, tuple[Type, gguf.LlamaFileType]] = {
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16), "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}  # fmt: skip

_KIND_OF = {
    str: gguf.GGUFValueType.STRING,
    int: gguf.GGUFValueType.UINT32,
    bool: gguf.GGUFValueType.BOOL,
}
_ROUNDED = 2.0**-8  # relative: converted base models are stored in bfloat16
_WRITTEN_ANEW = (
    gguf.Keys.General.ARCHITECTURE,
    "general.file_type",
    "general.quantization_version",
)

Array = npt.NDArray[np.float32]
Speech = Mapping[str, str | int | bool]  # metadata, by llama.cpp's names
Layout = Callable[[Array], Array]


def write(
    source: Path,
    target: Path,
    base: Mapping[str, Any],
    merged: Mapping[str, Any],
    kind: str,
    speech: Speech,
) -> int:
    """Write `target`: the source file's model with the tensors that differ between `base` and `merged` (state dicts of float32
    tensors, Transformers' names) replaced, stored as `kind` of KINDS says, spoken to as `speech` says. Returns how many.

    Raises ModelError where a changed tensor has no place in the source, or stands there in no order that is known.
    """
    reader = gguf.GGUFReader(source)
    facts = {key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1}
    architecture = str(facts["general.architecture"])
    changed = {
        _name(name, architecture, facts): name
        for name, tensor in merged.items()
        if not tensor.equal(base[name])
    }
    names = {tensor.name for tensor in reader.tensors}
    if lost := sorted(set(changed) - names):
        raise ModelError(
            f"{source.name} has no tensor {lost[0]}, which the adapter changed ({changed[lost[0]]}, {len(lost)} such); "
            "export to merged instead, or train other lora_target_modules"
        )
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        # Templates for other uses (tools) go: the anchor is in none of them.
        if field.name.startswith(("GGUF.", "tokenizer.chat_template")) or field.name in (
            *_WRITTEN_ANEW,
            *speech,
        ):
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(KINDS[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in speech.items():
        writer.add_key_value(key, value, _KIND_OF[type(value)])
    for tensor in reader.tensors:
        shape, stored = tuple(int(n) for n in reversed(tensor.shape)), _type(tensor, kind)
        size = int(np.prod(shape, dtype=np.int64))
        block, width = gguf.GGML_QUANT_SIZES[stored]
        writer.add_tensor_info(
            tensor.name, _bytes_shape(shape, stored), _held(stored), size // block * width, stored
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(
                np.float32, copy=False
            )
            if tensor.name in changed:
                name = changed[tensor.name]
                order = _order(
                    values,
                    base[name].numpy(),
                    facts,
                    architecture,
                    f"{tensor.name} of {source.name}",
                )
                values = order(merged[name].numpy())
            writer.write_tensor_data(
                gguf.quants.quantize(np.ascontiguousarray(values), _type(tensor, kind))
            )
    finally:
        writer.close()
    return len(changed)


def speech_of(form: encode.Format) -> Speech:
    """How llama.cpp has to speak to a model so that it reads what it read in training: the chat template, the token that ends
    an answer, and that no first token is put before a template that writes none (llama.cpp's server would)."""
    start = str(form.tokenizer.special_tokens_map.get("bos_token") or "")
    text = form.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}],
        chat_template=form.template,
        add_generation_prompt=True,
        tokenize=False,
    )
    found: dict[str, str | int | bool] = {
        "tokenizer.chat_template": form.template, "tokenizer.ggml.eot_token_id": form.end_ids[0],
    }  # fmt: skip
    return (
        found
        if start and str(text).startswith(start)
        else {**found, "tokenizer.ggml.add_bos_token": False}
    )


def _name(name: str, architecture: str, facts: Mapping[str, Any]) -> str:
    """llama.cpp's name of a tensor; Transformers' where it has none."""
    known = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(known[architecture], int(facts[f"{architecture}.block_count"]))
    return str(names.get_name(name, (".weight", ".bias")) or name)


def _type(tensor: Any, kind: str) -> Type:
    """How a tensor is stored: vectors (norms, biases) as they were; rows that blocks do not divide in 16-bit floats."""
    if len(tensor.shape) == 1:
        return Type.F32
    wanted = KINDS[kind][0]
    return wanted if int(tensor.shape[0]) % gguf.GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def _held(stored: Type) -> Any:
    return {Type.F32: np.dtype(np.float32), Type.F16: np.dtype(np.float16)}.get(
        stored, np.dtype(np.uint8)
    )


def _bytes_shape(shape: tuple[int, ...], stored: Type) -> tuple[int, ...]:
    """The shape of the array that holds a tensor: of quantised ones the last axis counts bytes."""
    return (
        shape
        if stored in (Type.F32, Type.F16)
        else tuple(gguf.quant_shape_to_byte_shape(shape, stored))
    )


def _order(
    source: Array, base: Array, facts: Mapping[str, Any], architecture: str, where: str
) -> Layout:
    """The order in which `base` is what the source file holds. Raises ModelError where none is."""
    for order in _orders(facts, architecture):
        try:
            found = order(base)
        except ValueError:  # rows that these heads do not divide
            continue
        if found.shape == source.shape and bool(
            (np.abs(found - source) <= _ROUNDED * np.abs(source) + 1e-30).all()
        ):
            return order
    raise ModelError(
        f"{where}: the base model's own tensor is not what stands there, in any order that is known here; is it the file that "
        "the model was made from? Export to merged, and convert that with llama.cpp"
    )


def _orders(facts: Mapping[str, Any], architecture: str) -> Iterator[Layout]:
    """As it is, or with the rotary rows of as many heads as queries or keys have in llama.cpp's order."""
    yield np.asarray
    for key in ("head_count", "head_count_kv"):
        heads = facts.get(f"{architecture}.attention.{key}")
        if isinstance(heads, int):
            yield partial(_interleaved, heads)


def _interleaved(heads: int, tensor: Array) -> Array:
    """The two halves of each head, row by row, as its converter's `permute` has them."""
    rows = tensor.shape[0]
    return (
        tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
        .swapaxes(1, 2)
        .reshape(tensor.shape)
    )
