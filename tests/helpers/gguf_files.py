"""Write small GGUF files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import gguf as gguf_format
import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

NEWLINE, SPACE = "Ċ", "Ġ"
VOCAB = [
    "<end>",
    "<turn>",
    *(chr(b) for b in range(33, 127)),
    NEWLINE,
    SPACE,
    NEWLINE + NEWLINE,
    SPACE + "a",
]
TEMPLATE = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}<end>\n{% endfor %}"
HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 32, 2


def tiny_llama(vocabulary: int = len(VOCAB)) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(
        {key: value.bfloat16() for key, value in model.state_dict().items()}
    )  # what is stored is exact
    return model


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """llama.cpp's order of rotary rows (convert_hf_to_gguf.py, permute): the two halves of each
    head, row by row."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def write_gguf(
    path: Path,
    *,
    split: str = "smollm",
    leave_out: str = "",
    vocabulary: Sequence[str] = VOCAB,
    template: str = TEMPLATE,
    context: int = 128,
    more: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """A Llama in float32, in the names and the layout of llama.cpp, with a byte-level tokenizer of
    100 tokens."""
    model = tiny_llama(len(vocabulary))
    config = model.config
    writer = gguf_format.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(context)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(vocabulary)
    writer.add_token_types([3, 3] + [1] * (len(vocabulary) - 2))
    writer.add_token_merges([f"{NEWLINE} {NEWLINE}", f"{SPACE} a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(
        1
    )  # not the token that ends an answer in the template: that one must be found
    writer.add_pad_token_id(0)
    writer.add_chat_template(template)
    for key, text in more.items():
        writer.add_string(key, text)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
    }
    names |= {
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
    }
    names |= {
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" or key == leave_out:
            continue
        name = {
            "model.embed_tokens.weight": "token_embd.weight",
            "model.norm.weight": "output_norm.weight",
        }.get(key)
        if name is None:
            _, _, block, part = key.removesuffix(".weight").split(".", 3)
            name = f"blk.{block}.{names[part]}.weight"
            heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(names[part])
            tensor = interleave(tensor, heads) if heads else tensor
        writer.add_tensor(name, np.ascontiguousarray(tensor.numpy()))
    finish(writer)
    return path


def finish(writer: gguf_format.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GEMMA_VOCAB = [
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<end_of_turn>",
    "  ",
    "▁a",
    *(chr(b) for b in range(33, 127)),
    "▁",
    "\n",
]


def tiny_gemma() -> Gemma3ForCausalLM:
    """Six layers, because a GGUF file does not say which of them see everything: every sixth one
    does."""
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(GEMMA_VOCAB),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=16,
        sliding_window=8,
        rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 500.0}},
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    model = Gemma3ForCausalLM(config).eval()
    state = model.state_dict()
    for key in state:
        if key.endswith("norm.weight"):  # they begin as zeros, and no fault in them would show
            state[key] = 0.3 * torch.randn(state[key].shape)
    model.load_state_dict(
        {key: value.bfloat16() for key, value in state.items()}
    )  # what is stored is exact
    return model


def write_gemma(path: Path, *, forget: str = "nothing", rope_factor: float | None = None) -> Path:
    """A Gemma 3 in float32 as llama.cpp's converter writes it: the embedding unscaled, every norm
    weight plus one.

    `forget`: the norm that is written without its one, or "scale": the embedding is written scaled.
    `rope_factor`: the file says that rotary positions are scaled.
    """
    model = tiny_gemma()
    config = model.config
    writer = gguf_format.GGUFWriter(path, "gemma3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["full_attention"]["rope_theta"])
    if rope_factor is not None:
        writer.add_rope_scaling_factor(rope_factor)
    writer.add_sliding_window(config.sliding_window)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(GEMMA_VOCAB)
    writer.add_token_scores([0.0] * len(GEMMA_VOCAB))
    writer.add_token_types([3, 3, 3, 2, 3] + [1] * (len(GEMMA_VOCAB) - 5))
    writer.add_pad_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_unk_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    names = gguf_format.get_tensor_name_map(gguf_format.MODEL_ARCH.GEMMA3, config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight":
            continue
        if key.endswith("norm.weight") and not key.endswith(f"{forget}.weight"):
            tensor = tensor + 1
        if key == "model.embed_tokens.weight" and forget == "scale":
            tensor = tensor * WIDTH**0.5
        writer.add_tensor(names.get_name(key, (".weight",)), tensor.numpy())
    finish(writer)
    return path
