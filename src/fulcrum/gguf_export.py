"""A merged model as a GGUF file, for models that came as one: the source's metadata, with the changed tensors replaced.

llama.cpp stores some tensors in an order of its own (rotary rows of queries and keys). Which order a tensor has is not looked
up by architecture but found: the one in which the base model's tensor is that of the source file. Tensors that no adapter
changed are the source's own numbers, so that what else an architecture asks for (Gemma's norms plus one) is as it was.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type

from fulcrum import encode
from fulcrum.errors import ModelError

KINDS: Mapping[str, tuple[Type, gguf.LlamaFileType]] = {
    "f16": (Type.F16, gguf.LlamaFileType.MOSTLY_F16), "q8_0": (Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}  # fmt: skip

_KIND_OF = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32, bool: gguf.GGUFValueType.BOOL}
_ROUNDED = 2.0**-8  # relative: converted base models are stored in bfloat16
_WRITTEN_ANEW = (gguf.Keys.General.ARCHITECTURE, "general.file_type", "general.quantization_version")

Array = npt.NDArray[np.float32]
Speech = Mapping[str, str | int | bool]  # metadata, by llama.cpp's names
Layout = Callable[[Array], Array]


def write(source: Path, target: Path, base: Mapping[str, Any], merged: Mapping[str, Any], kind: str, speech: Speech) -> int:
    """Write `target`: the source file's model with the tensors that differ between `base` and `merged` (state dicts of float32
    tensors, Transformers' names) replaced, stored as `kind` of KINDS says, spoken to as `speech` says. Returns how many.

    Raises ModelError where a changed tensor has no place in the source, or stands there in no order that is known.
    """
    reader = gguf.GGUFReader(source)
    facts = {key: field.contents() for key, field in reader.fields.items() if len(field.types) == 1}
    architecture = str(facts["general.architecture"])
    changed = {_name(name, architecture, facts): name for name, tensor in merged.items() if not tensor.equal(base[name])}
    names = {tensor.name for tensor in reader.tensors}
    if lost := sorted(set(changed) - names):
        raise ModelError(
            f"{source.name} has no tensor {lost[0]}, which the adapter changed ({changed[lost[0]]}, {len(lost)} such); "
            "export to merged instead, or train other lora_target_modules"
        )
    writer = gguf.GGUFWriter(target, architecture)
    for field in reader.fields.values():
        # Templates for other uses (tools) go: the anchor is in none of them.
        if field.name.startswith(("GGUF.", "tokenizer.chat_template")) or field.name in (*_WRITTEN_ANEW, *speech):
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
        writer.add_tensor_info(tensor.name, _bytes_shape(shape, stored), _held(stored), size // block * width, stored)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in reader.tensors:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            if tensor.name in changed:
                name = changed[tensor.name]
                order = _order(values, base[name].numpy(), facts, architecture, f"{tensor.name} of {source.name}")
                values = order(merged[name].numpy())
            writer.write_tensor_data(gguf.quants.quantize(np.ascontiguousarray(values), _type(tensor, kind)))
    finally:
        writer.close()
    return len(changed)


def speech_of(form: encode.Format) -> Speech:
    """How llama.cpp has to speak to a model so that it reads what it read in training: the chat template, the token that ends
    an answer, and that no first token is put before a template that writes none (llama.cpp's server would)."""
    start = str(form.tokenizer.special_tokens_map.get("bos_token") or "")
    text = form.tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], chat_template=form.template, add_generation_prompt=True, tokenize=False
    )
    found: dict[str, str | int | bool] = {
        "tokenizer.chat_template": form.template, "tokenizer.ggml.eot_token_id": form.end_ids[0],
    }  # fmt: skip
    return found if start and str(text).startswith(start) else {**found, "tokenizer.ggml.add_bos_token": False}


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
    return {Type.F32: np.dtype(np.float32), Type.F16: np.dtype(np.float16)}.get(stored, np.dtype(np.uint8))


def _bytes_shape(shape: tuple[int, ...], stored: Type) -> tuple[int, ...]:
    """The shape of the array that holds a tensor: of quantised ones the last axis counts bytes."""
    return shape if stored in (Type.F32, Type.F16) else tuple(gguf.quant_shape_to_byte_shape(shape, stored))


def _order(source: Array, base: Array, facts: Mapping[str, Any], architecture: str, where: str) -> Layout:
    """The order in which `base` is what the source file holds. Raises ModelError where none is."""
    for order in _orders(facts, architecture):
        try:
            found = order(base)
        except ValueError:  # rows that these heads do not divide
            continue
        if found.shape == source.shape and bool((np.abs(found - source) <= _ROUNDED * np.abs(source) + 1e-30).all()):
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
    return tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
