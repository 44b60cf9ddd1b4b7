"""Read and write GGUF files: convert one to a model folder, and put a trained model back into one.

Reading: `convert` makes a plain safetensors folder once, which from then on loads like any other
model folder. Transformers reads GGUF but refuses to save what it read, so the state dict is saved
through a fresh model of the same config. Weights are stored in bfloat16: against float32 the mean
loss moved by 0.0003 (SmolLM2-135M, Q4_1) and 0.0001 (Gemma-3-270M, Q4_K_M) nats per token on the
first 12,000 characters of the GPL-3 (standard errors 0.0003), at half the size.

Writing: `write` copies the source file's metadata and replaces the changed tensors. llama.cpp
stores some tensors in an order of its own (rotary rows of queries and keys). The order is not
looked up by architecture but found: the one in which the base model's tensor equals the source
file's. Tensors that no adapter changed keep the source's numbers, so whatever else an architecture
asks for (Gemma's norms plus one) stays as it was.

Invariant: a folder with a matching `fulcrum_source.json` is complete. That file is written last,
and the folder is renamed into place.
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

# Byte-level vocabularies by how text is split before merging, as llama.cpp names them
# (llama-vocab.cpp). The first cut every digit off and then follow GPT-2; the others are GPT-2's.
_DIGITS_FIRST = {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
_PLAIN_GPT2 = {"", "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"}
KINDS: Mapping[str, tuple[Type, gguf.LlamaFileType]] = {
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_VALUE_TYPES = {
    str: gguf.GGUFValueType.STRING,
    int: gguf.GGUFValueType.UINT32,
    bool: gguf.GGUFValueType.BOOL,
}
_ROUNDED = 2.0**-8  # relative: converted base models are stored in bfloat16
# Metadata that the writer sets itself.
_WRITTEN_ANEW = (
    gguf.Keys.General.ARCHITECTURE,
    "general.file_type",
    "general.quantization_version",
)

Array = npt.NDArray[np.float32]
Speech = Mapping[str, str | int | bool]  # metadata about prompts, by llama.cpp's names
Layout = Callable[[Array], Array]  # puts a tensor into some order of rows


def convert(gguf_file: Path, folder: Path) -> Path:
    """Write a GGUF file's model (bfloat16), tokenizer and generation settings to `folder`.

    Replace what `folder` held, and return it. Raises ModelError if Transformers cannot read the
    file or tensors are missing.
    """
    _, parameters = _read_metadata(gguf_file)
    require_space(folder.parent, 2 * parameters + 2**26, f"converting {gguf_file.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    identity = registry.converted_mark(file_sha256(gguf_file))
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new = Path(scratch, "new")
        tokenizer, model = read(gguf_file)
        # Its progress bar would tear the caller's own.
        with contextlib.redirect_stderr(io.StringIO()):
            _saveable(model).save_pretrained(new)
            tokenizer.save_pretrained(new)
        write_json(
            new / registry.MARK,
            {"file": gguf_file.name, "transformers": transformers.__version__, **identity},
        )
        if folder.exists():
            folder.replace(Path(scratch, "old"))
        new.replace(folder)
    return folder


def read(
    gguf_file: Path, dtype: torch.dtype = torch.bfloat16
) -> tuple[PreTrainedTokenizerBase, Any]:
    """Return the tokenizer and the model of a GGUF file, weights in `dtype`.

    Raises ModelError as `convert` does.
    """
    metadata, _ = _read_metadata(gguf_file)
    _refuse_unread(gguf_file, metadata)
    # It prints progress bars of three kinds; whatever matters is raised.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer, model = _read_model(gguf_file, dtype)
        _restore_split(tokenizer, metadata.get("tokenizer.ggml.pre") or "")
        model.generation_config = _generation_config(model, tokenizer, metadata)
    return tokenizer, model


def write(
    source: Path,
    target: Path,
    base: Mapping[str, Any],
    merged: Mapping[str, Any],
    kind: str,
    speech: Speech,
) -> int:
    """Write the source file's model to `target`, with the tensors that were trained replaced.

    `base` and `merged` are state dicts of float32 tensors by Transformers' names; tensors that
    differ between them are replaced. They are stored as `kind` (of KINDS) says, and prompts are
    made as `speech` says. Return how many tensors were replaced.

    Raises ModelError if a changed tensor has no place in the source, or is there in an unknown
    order.
    """
    original = _Original(source)
    replaced = original.match(base, merged)
    writer = gguf.GGUFWriter(target, original.architecture)
    _add_metadata(writer, original, kind, speech)
    for tensor in original.tensors:
        _add_tensor_info(writer, tensor, _stored_type(tensor, kind))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in original.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            values = values.astype(np.float32, copy=False)
            name = replaced.get(tensor.name)
            if name is not None:
                layout = original.layout_of(tensor.name, values, base[name].numpy())
                values = layout(merged[name].numpy())
            contiguous = np.ascontiguousarray(values)
            writer.write_tensor_data(gguf.quants.quantize(contiguous, _stored_type(tensor, kind)))
    finally:
        writer.close()
    return len(replaced)


def speech_of(form: encode.PromptFormat) -> Speech:
    """Return the metadata by which llama.cpp makes the prompts that the model was trained with.

    These are the chat template and the token that ends an answer. If the template writes no first
    token, llama.cpp's server is told to put none before it, as it otherwise would.
    """
    start = str(form.tokenizer.special_tokens_map.get("bos_token") or "")
    text = form.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}],
        chat_template=form.template,
        add_generation_prompt=True,
        tokenize=False,
    )
    speech: dict[str, str | int | bool] = {
        "tokenizer.chat_template": form.template,
        "tokenizer.ggml.eot_token_id": form.end_ids[0],
    }
    if not (start and str(text).startswith(start)):
        speech["tokenizer.ggml.add_bos_token"] = False
    return speech


# Reading


def _read_metadata(gguf_file: Path) -> tuple[dict[str, Any], int]:
    """Return the scalar metadata by llama.cpp's key names, and the number of parameters."""
    try:
        reader = gguf.GGUFReader(gguf_file)
        return _scalars(reader), sum(int(tensor.n_elements) for tensor in reader.tensors)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(
            f"{gguf_file}: not a sound GGUF file ({error}); download or convert it again"
        ) from error


def _scalars(reader: gguf.GGUFReader) -> dict[str, Any]:
    """Return the metadata without arrays: the vocabulary holds hundreds of thousands of strings."""
    scalars = {}
    for key, field in reader.fields.items():
        if len(field.types) == 1:
            scalars[key] = field.contents()
    return scalars


def _refuse_unread(gguf_file: Path, metadata: dict[str, Any]) -> None:
    """Raise ModelError for what Transformers would drop silently.

    That is scaled rotary positions (Gemma 3 from 4B up).
    """
    for key, value in metadata.items():
        if key.endswith(".rope.scaling.factor") and float(value) != 1:
            raise ModelError(
                f"{gguf_file}: {key} is {value:g}, which Transformers {transformers.__version__} "
                "does not read from GGUF files: the model would be another one; use its "
                "safetensors folder or hub id"
            )


def _read_model(gguf_file: Path, dtype: torch.dtype) -> tuple[PreTrainedTokenizerBase, Any]:
    place: dict[str, Any] = {
        "pretrained_model_name_or_path": gguf_file.parent,
        "gguf_file": gguf_file.name,
    }
    try:
        tokenizer = AutoTokenizer.from_pretrained(**place)
        # If a GGUF kernel is installed, Transformers would otherwise leave the weights packed.
        plain: dict[str, Any] = {"dtype": dtype, "quantization_config": GgufConfig(dequantize=True)}
        loaded, report = AutoModelForCausalLM.from_pretrained(
            **place, **plain, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        # The last is raised for a quantisation that it cannot undo.
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{gguf_file}: Transformers {transformers.__version__} cannot read it: {reason}"
        ) from error
    if report["missing_keys"]:  # Transformers would fill them with random numbers
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{gguf_file}: {len(missing)} tensors are missing, the first is {missing[0]}"
        )
    return tokenizer, loaded


def _saveable(loaded: Any) -> Any:
    """Return the weights in a fresh model: Transformers does not save what it read from a GGUF."""
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the saved weights are plain
    # No memory and no random numbers for weights that are assigned at once.
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    fresh.load_state_dict(loaded.state_dict(), assign=True)
    fresh.generation_config = loaded.generation_config
    return fresh


def _restore_split(tokenizer: PreTrainedTokenizerBase, split: str) -> None:
    """Split text as the vocabulary's merges were learned; Transformers knows only GPT-2's way.

    It matters for "smollm": "\\n\\n1." then starts with both line breaks in one token, as in
    training. On a numbered list of 96 tokens the total loss of SmolLM2-135M-Instruct fell from
    192.1 to 176.6 nats.
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
            f"the GGUF file splits text in the way {split!r}, which is not known here: some tokens "
            "may differ from those the model was trained on; prefer the original model folder or "
            "hub id",
            stacklevel=3,
        )


def _generation_config(
    model: Any, tokenizer: PreTrainedTokenizerBase, metadata: dict[str, Any]
) -> GenerationConfig:
    """Return settings that stop at the end of text, of a turn, and of the template's answer."""
    named = [metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
    stops = {*named, tokenizer.eos_token_id, _answer_end(tokenizer)} - {None}
    return GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=sorted(stops),
        pad_token_id=model.config.pad_token_id,
    )


def _answer_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the marker token that follows an answer in the chat template, if there is one."""
    if tokenizer.chat_template is None:
        return None
    turns = [
        {"role": "user", "content": "question"},
        {"role": "assistant", "content": "the-answer"},
    ]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except jinja2.TemplateError as error:
        raise ModelError(
            f"the chat template in the GGUF file cannot lay out a question and an answer: {error}"
        ) from error
    _, _, after = text.rpartition("the-answer")
    ids = tokenizer.encode(after, add_special_tokens=False)
    return ids[0] if ids and ids[0] in tokenizer.added_tokens_decoder else None


# Writing


class _Original:
    """The source file: its metadata, and its tensors by llama.cpp's names."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.file = path.name
        self.fields = list(reader.fields.values())
        self.tensors = reader.tensors
        self.facts = _scalars(reader)
        self.architecture = str(self.facts["general.architecture"])

    def match(self, base: Mapping[str, Any], merged: Mapping[str, Any]) -> dict[str, str]:
        """Return the tensors that differ: llama.cpp's name to Transformers'.

        Raises ModelError if the file lacks one.
        """
        changed = {}
        for name, tensor in merged.items():
            if not tensor.equal(base[name]):
                changed[self._name_of(name)] = name
        lost = sorted(set(changed) - {tensor.name for tensor in self.tensors})
        if lost:
            raise ModelError(
                f"{self.file} has no tensor {lost[0]}, which the adapter changed "
                f"({changed[lost[0]]}, {len(lost)} such); export to merged instead, or train other "
                "lora_target_modules"
            )
        return changed

    def _name_of(self, name: str) -> str:
        """Return llama.cpp's name of a tensor, or Transformers' if it has none."""
        numbers = {text: number for number, text in gguf.MODEL_ARCH_NAMES.items()}
        blocks = int(self.facts[f"{self.architecture}.block_count"])
        names = gguf.get_tensor_name_map(numbers[self.architecture], blocks)
        return str(names.get_name(name, (".weight", ".bias")) or name)

    def layout_of(self, name: str, stored: Array, base: Array) -> Layout:
        """Return the order in which `base` is what the file stores. Raise ModelError if none is."""
        for layout in self._layouts():
            try:
                ordered = layout(base)
            except ValueError:  # the rows are not a multiple of these heads
                continue
            if ordered.shape != stored.shape:
                continue
            if (np.abs(ordered - stored) <= _ROUNDED * np.abs(stored) + 1e-30).all():
                return layout
        raise ModelError(
            f"{name} of {self.file}: the base model's own tensor is not what stands there, in any "
            "order that is known here; is it the file that the model was made from? Export to "
            "merged, and convert that with llama.cpp"
        )

    def _layouts(self) -> Iterator[Layout]:
        """Yield the known orders: as it is, and with rotary rows of the queries' or keys' heads."""
        yield np.asarray
        for key in ("head_count", "head_count_kv"):
            heads = self.facts.get(f"{self.architecture}.attention.{key}")
            if isinstance(heads, int):
                yield partial(_interleave, heads)


def _interleave(heads: int, tensor: Array) -> Array:
    """Interleave the two halves of each head row by row, as llama.cpp's `permute` does."""
    rows = tensor.shape[0]
    halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def _add_metadata(writer: gguf.GGUFWriter, original: _Original, kind: str, speech: Speech) -> None:
    for field in original.fields:
        # Templates for other uses (tools) are dropped, because the anchor is in none of them.
        if field.name.startswith(("GGUF.", "tokenizer.chat_template")):
            continue
        if field.name in _WRITTEN_ANEW or field.name in speech:
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(KINDS[kind][1])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in speech.items():
        writer.add_key_value(key, value, _VALUE_TYPES[type(value)])


def _add_tensor_info(writer: gguf.GGUFWriter, tensor: Any, stored: Type) -> None:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    block, width = gguf.GGML_QUANT_SIZES[stored]
    size = int(np.prod(shape, dtype=np.int64)) // block * width
    held = {Type.F32: np.dtype(np.float32), Type.F16: np.dtype(np.float16)}.get(stored)
    if held is None:  # quantised: the last axis counts bytes
        held = np.dtype(np.uint8)
        shape = tuple(gguf.quant_shape_to_byte_shape(shape, stored))
    writer.add_tensor_info(tensor.name, shape, held, size, stored)


def _stored_type(tensor: Any, kind: str) -> Type:
    """Return how a tensor is stored.

    Vectors are in float32, and rows that blocks do not divide in float16.
    """
    if len(tensor.shape) == 1:
        return Type.F32
    wanted = KINDS[kind][0]
    fits = int(tensor.shape[0]) % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    return wanted if fits else Type.F16
