"""Every architecture loads, says whether it packs, trains and generates; packed rows give what the
stock model gives alone."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as functional
from transformers import AutoModelForCausalLM, OPTConfig

from fulcrum.core.errors import ModelError
from fulcrum.core.types import Anchor, Example, Message, Tokens
from fulcrum.data import encode, mix
from fulcrum.data.token_stream import Stream
from fulcrum.model import adapter, attention, base_model, generate, loss
from fulcrum.model.packing import BLOCK, Segment
from fulcrum.training import loop
from helpers.gradients import (
    our_losses_and_gradients,
    same_gradients,
    shaken_adapter,
    sharing_examples,
    stock_losses_and_gradients,
    tokens,
)
from helpers.tiny import CONTEXT, WINDOW, load_tiny, save_tiny, tiny_settings, tiny_tokenizer

PACKED = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2"]
ALONE = ["lfm2", "mamba"]  # a convolution beside attention; a state space


@pytest.mark.parametrize("kind", PACKED)
def test_packed_rows_give_the_stock_models_losses_and_lora_gradients(
    tmp_path: Path, kind: str
) -> None:
    loaded, settings = load_tiny(tmp_path, kind), tiny_settings()
    assert loaded.packed
    assert loaded.split_head
    shaken_adapter(loaded, settings)
    examples = [
        tokens(length, seed)
        for seed, length in enumerate((5, 3 * WINDOW, 2, 5 * WINDOW + 1, WINDOW))
    ]
    nats, gradients, n_rows = our_losses_and_gradients(loaded, examples, budget=1000)
    assert n_rows == 1
    expected_nats, expected = stock_losses_and_gradients(loaded, settings, examples)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected)


@pytest.mark.parametrize("kind", PACKED)
def test_how_rows_are_packed_changes_nothing(tmp_path: Path, kind: str) -> None:
    loaded = load_tiny(tmp_path, kind)
    shaken_adapter(loaded, tiny_settings())
    examples = [tokens(length, seed) for seed, length in enumerate((9, 30, 4, 21))]
    together, gradients, n_rows = our_losses_and_gradients(loaded, examples, budget=1000)
    alone, expected, n_alone = our_losses_and_gradients(loaded, examples, budget=1)
    assert (n_rows, n_alone) == (1, 4)
    np.testing.assert_allclose(together, alone, rtol=1e-5)
    same_gradients(gradients, expected)


@pytest.mark.parametrize("kind", PACKED)
def test_shared_prefixes_give_the_stock_models_losses_and_lora_gradients(
    tmp_path: Path, kind: str
) -> None:
    loaded, settings = load_tiny(tmp_path, kind), tiny_settings()
    assert loaded.shares
    shaken_adapter(loaded, settings)
    examples = sharing_examples()
    (row,) = loss.rows(examples, loaded, 1000)
    computed, whole = row.ids.shape[1], sum(len(example) for example in examples)
    assert (
        whole - computed == 3 * BLOCK + 2 * 2 * BLOCK + 3 * BLOCK
    )  # header, anchor, the example that stands there twice
    nats, gradients, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    expected_nats, expected = stock_losses_and_gradients(loaded, settings, examples)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected)


def test_segments_of_like_size_are_computed_together_and_unlike_ones_apart() -> None:
    ends = np.cumsum([0, 80, 76, 70, 370, 8, 8, 428]).tolist()
    parts = [Segment(a, b) for a, b in itertools.pairwise(ends)]
    groups = attention._alike(attention._pieces(parts, None))
    sizes = [[(piece.end - piece.start, len(piece.context)) for piece in group] for group in groups]
    assert sizes == [[(384, 0), (370, 0)], [(80, 0), (76, 0), (70, 0)], [(44, 1)], [(8, 0), (8, 0)]]


def test_a_sliding_window_cuts_what_a_piece_cannot_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_QUERIES", 4)
    pieces = attention._pieces([Segment(20, 30, ((0, 5), (10, 13)))], window=4)
    assert pieces == [
        Segment(20, 24, ((10, 13),)),
        Segment(24, 28, ((21, 24),)),
        Segment(28, 30, ((25, 28),)),
    ]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3"])
def test_long_continuations_of_a_shared_prefix(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_QUERIES", 48)  # queries in many pieces, the last one short
    loaded, settings = load_tiny(tmp_path, kind), tiny_settings()
    shaken_adapter(loaded, settings)
    examples = sharing_examples(longest=201)
    nats, gradients, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    expected_nats, expected = stock_losses_and_gradients(loaded, settings, examples)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected, 5e-5)  # hundreds of tokens, added in another order


def test_prefixes_are_not_shared_where_asked_or_where_dropout_is_drawn_for_each_token(
    tmp_path: Path,
) -> None:
    loaded = load_tiny(tmp_path)
    (row,) = loss.rows(sharing_examples(), loaded, 1000, share=False)
    assert row.ids.shape[1] == sum(len(example) for example in sharing_examples())
    assert all(part.context == () for part in row.segments)


def test_a_model_that_cannot_share_still_packs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = save_tiny(tmp_path / "m")
    whole = attention._pieces

    def blind(parts, window):
        return whole([part._replace(context=()) for part in parts], window)

    monkeypatch.setattr(attention, "_pieces", blind)
    loaded = base_model.load(str(place), tiny_settings())
    assert (loaded.packed, loaded.shares) == (True, False)
    assert "common prefixes are computed once" not in loaded.facts


@pytest.mark.parametrize("kind", ALONE)
def test_a_model_that_mixes_neighbours_gets_one_example_per_row(tmp_path: Path, kind: str) -> None:
    loaded, settings = load_tiny(tmp_path, kind), tiny_settings()
    assert not loaded.packed
    assert any("one example per row: packed examples differ" in fact for fact in loaded.facts)
    shaken_adapter(loaded, settings)
    examples = [tokens(length, seed) for seed, length in enumerate((5, 24, 41))]
    nats, gradients, n_rows = our_losses_and_gradients(loaded, examples, budget=1000)
    assert n_rows == 3
    expected_nats, expected = stock_losses_and_gradients(loaded, settings, examples)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected)


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_long_segments_are_cut_with_the_same_result(tmp_path: Path, kind: str) -> None:
    loaded, settings = load_tiny(tmp_path, kind), tiny_settings()
    shaken_adapter(loaded, settings)
    examples = [tokens(400, 0), tokens(60, 1)]
    assert len(examples[0]) > attention._QUERIES
    nats, gradients, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    expected_nats, expected = stock_losses_and_gradients(loaded, settings, examples)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected, 5e-5)  # hundreds of tokens, added in another order


@pytest.mark.parametrize("kind", [*PACKED, *ALONE])
def test_every_architecture_trains_and_generates(tmp_path: Path, kind: str) -> None:
    loaded = load_tiny(tmp_path, kind)
    assert loaded.context == (None if kind == "mamba" else CONTEXT)
    form = encode.make_format(loaded.tokenizer, None)
    pairs = [("a", "red"), ("b", "blue"), ("c", "green"), ("d", "grey")]
    examples = [Example((Message("user", q), Message("assistant", a)), q, q) for q, a in pairs]
    own = [encode.encode(example, form) for example in examples]
    stream = Stream(mix.plan(4, 0, repeats=30, general_per_task=0, order="random", seed=0), own, [])
    settings = tiny_settings(learning_rate=2e-2, evaluations=1)
    _, result = loop.train(
        loaded,
        stream,
        loop.Recipe(settings, seed=0, repeats=30),
        dev_loss=lambda: generate.mean_loss(loaded, own),
    )
    first, last = result.history[0].task_loss, result.history[-1].task_loss
    assert result.steps == 30
    assert last < 0.6 * first
    prompts = [encode.prompt_ids((Message("user", "x y z " * n),), form) for n in (1, 7, 3)]
    asked: list[int] = []
    texts = generate.generate(
        loaded, prompts, form, max_new_tokens=8, batch_tokens=10_000, progress=asked.append
    )
    assert asked == [3]  # one padded batch
    assert texts == [greedy(loaded, prompt, form, 8) for prompt in prompts]
    assert texts == generate.generate(loaded, prompts, form, max_new_tokens=8, batch_tokens=1)
    if loaded.packed:
        assert (
            loaded.causal.config._attn_implementation == attention.NAME
        )  # switched back for training


@pytest.mark.parametrize("kind", PACKED)
def test_a_common_beginning_is_computed_once_and_changes_no_answer(
    tmp_path: Path, kind: str
) -> None:
    loaded = load_tiny(tmp_path, kind)
    form = encode.make_format(
        loaded.tokenizer, Anchor("Name the colour of the thing below; one word, no more. " * 2)
    )
    prompts = [encode.prompt_ids((Message("user", "x y z " * n),), form) for n in (1, 7, 3, 5)]
    calls: list[int] = []
    hook = loaded.body.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args[0] if args else kwargs["input_ids"]).shape[1]),
        with_kwargs=True,
    )
    texts = generate.generate(
        loaded, prompts, form, max_new_tokens=8, batch_tokens=2 * (len(prompts[1]) + 8)
    )
    hook.remove()
    # A sliding window of 8 tokens counts the padding between the beginning and the rest: those
    # models go the plain way.
    windowed = getattr(loaded.causal.config.get_text_config(), "sliding_window", None) is not None
    shared = len(prompts[0]) - len(
        prompts[0][
            next(k for k, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1) :
        ]
    )
    assert shared > 20
    assert (calls[0] == shared) == (not windowed)
    assert max(calls if windowed else calls[1:]) == len(prompts[1]) - (0 if windowed else shared)
    assert texts == [greedy(loaded, prompt, form, 8) for prompt in prompts]


@torch.no_grad()
def greedy(
    loaded: base_model.LoadedModel, prompt: list[int], form: encode.PromptFormat, longest: int
) -> str:
    """The likeliest next token, again and again, without cache, padding or `generate`."""
    ids = list(prompt)
    for _ in range(longest):
        ids.append(
            int(
                loaded.causal(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()
            )
        )
        if ids[-1] in form.end_ids:
            break
    return loaded.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", ["gemma2", "granite", "cohere", "llama"])
def test_the_head_alone_gives_the_models_own_logits(tmp_path: Path, kind: str) -> None:
    loaded = load_tiny(tmp_path, kind)
    assert loaded.split_head
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        own = loaded.head(loaded.body(input_ids=ids, use_cache=False)[0])
        torch.testing.assert_close(own, loaded.causal(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    if kind == "gemma2":
        assert float(own.abs().max()) <= 3  # its final soft-cap


def test_a_head_of_unknown_form_is_found_and_the_loss_stays_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = save_tiny(tmp_path / "m", "granite")
    expected = base_model.load(str(place), tiny_settings())
    monkeypatch.setattr(
        base_model.LoadedModel,
        "head",
        lambda self, hidden: self.causal.get_output_embeddings()(hidden),
    )
    loaded = base_model.load(str(place), tiny_settings())
    assert (expected.split_head, loaded.split_head) == (True, False)
    assert "the output head runs at every position (its own form is not known)" in loaded.facts
    monkeypatch.undo()
    example = tokens(30, 0)
    np.testing.assert_allclose(
        generate.nats(loaded, [example])[0], generate.nats(expected, [example])[0], rtol=1e-6
    )


def test_chunks_of_the_head_add_up_to_the_full_cross_entropy() -> None:
    count = 2 * loss._CHUNK + 17
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 6, generator=generator, requires_grad=True)
    weight = torch.randn(40, 6, generator=generator)
    labels = torch.randint(40, (count,), generator=generator)
    weights = torch.rand(count, generator=generator)
    total, each = loss._ChunkedLoss.apply(
        hidden, lambda part: part @ weight.T, labels, weights, None, 0.0
    )
    (2 * total).backward()
    found, hidden.grad = hidden.grad, None
    losses = functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    (2 * (losses * weights).sum()).backward()
    torch.testing.assert_close(total, (losses * weights).sum())
    torch.testing.assert_close(each, losses)
    torch.testing.assert_close(found, hidden.grad)


def test_a_row_with_more_targets_than_one_chunk(tmp_path: Path) -> None:
    loaded, settings = load_tiny(tmp_path), tiny_settings()
    shaken_adapter(loaded, settings)
    examples = [tokens(300, 0, supervised=1), tokens(280, 1, supervised=1)]
    assert sum(e.n_loss for e in examples) > 2 * loss._CHUNK
    nats, gradients, n_rows = our_losses_and_gradients(loaded, examples, budget=1000)
    expected_nats, expected = stock_losses_and_gradients(loaded, settings, examples)
    assert n_rows == 1
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected, 5e-5)  # hundreds of tokens, added in another order


def test_the_first_token_of_an_example_is_no_target(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    (row,) = loss.rows([tokens(4, 0, supervised=1), tokens(3, 1, supervised=1)], loaded, 100)
    assert row.where.tolist() == [0, 1, 2, 4, 5]
    assert row.owner.tolist() == [0, 0, 0, 1, 1]
    assert row.segments == (Segment(0, 4), Segment(4, 7))
    assert row.positions.tolist() == [[0, 1, 2, 3, 0, 1, 2]]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gemma3"])
def test_recomputing_activations_changes_no_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(attention, "_QUERIES", 48)
    monkeypatch.setattr(attention, "_WASTE", 100)  # several batches of segments in a row
    loaded = load_tiny(tmp_path, kind)
    shaken_adapter(loaded, tiny_settings())
    examples = sharing_examples(longest=120)
    assert (
        len(
            attention._alike(attention._pieces(loss.rows(examples, loaded, 1000)[0].segments, None))
        )
        > 2
    )
    nats, gradients, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    monkeypatch.setattr(loss, "_ACTIVATION_BYTES", 0)
    recomputed, again, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    assert loaded.causal.is_activation_checkpointing
    np.testing.assert_array_equal(nats, recomputed)
    same_gradients(again, gradients)
    monkeypatch.undo()
    our_losses_and_gradients(loaded, examples, budget=1000)
    assert not loaded.causal.is_activation_checkpointing


def test_a_model_that_cannot_recompute_trains_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny(tmp_path)
    shaken_adapter(loaded, tiny_settings())
    nats, gradients, _ = our_losses_and_gradients(loaded, sharing_examples(), budget=1000)
    monkeypatch.setattr(loss, "_ACTIVATION_BYTES", 0)
    monkeypatch.setattr(type(loaded.causal), "supports_gradient_checkpointing", False)
    again, same, _ = our_losses_and_gradients(loaded, sharing_examples(), budget=1000)
    assert not loaded.causal.is_activation_checkpointing
    np.testing.assert_array_equal(nats, again)
    same_gradients(same, gradients)


def test_answers_are_the_same_after_a_row_that_recomputed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that recomputes drops the key/value cache, and `generate` then sees only the newest
    token."""
    loaded = load_tiny(tmp_path)
    shaken_adapter(loaded, tiny_settings())
    form = encode.make_format(loaded.tokenizer, None)
    prompts = [encode.prompt_ids((Message("user", "x y z " * n),), form) for n in (1, 7)]
    modes = [name for name, module in loaded.causal.named_modules() if module.training]
    before = generate.generate(loaded, prompts, form, max_new_tokens=8, batch_tokens=1000)
    monkeypatch.setattr(loss, "_ACTIVATION_BYTES", 0)
    our_losses_and_gradients(loaded, [tokens(20, 0)], budget=100)
    assert loaded.causal.is_activation_checkpointing
    assert generate.generate(loaded, prompts, form, max_new_tokens=8, batch_tokens=1000) == before
    assert before == [greedy(loaded, prompt, form, 8) for prompt in prompts]
    assert [name for name, module in loaded.causal.named_modules() if module.training] == modes


def test_the_models_own_generation_settings_change_no_greedy_answer(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    form = encode.make_format(loaded.tokenizer, None)
    prompts = [encode.prompt_ids((Message("user", "x y z " * n),), form) for n in (1, 7, 3)]
    shipped = loaded.causal.generation_config
    shipped.update(
        repetition_penalty=5.0,
        no_repeat_ngram_size=1,
        min_new_tokens=12,
        do_sample=True,
        temperature=9.0,
    )
    answers = generate.generate(loaded, prompts, form, max_new_tokens=8, batch_tokens=1000)
    assert answers == [greedy(loaded, prompt, form, 8) for prompt in prompts]
    assert loaded.causal.generation_config is shipped


def test_a_model_knows_the_end_that_its_template_writes(tmp_path: Path) -> None:
    """Else whoever generates with what was saved of it gets answers that go on."""
    save_tiny(tmp_path)
    file = tmp_path / "generation_config.json"
    file.write_text(file.read_text().replace('"eos_token_id": 3', '"eos_token_id": 1'))
    loaded = base_model.load(str(tmp_path), tiny_settings())
    assert loaded.causal.generation_config.eos_token_id == [1, 3]


def test_the_heads_input_is_contiguous(tmp_path: Path) -> None:
    """For a slice PyTorch would copy the head's weights once a row: gigabytes for a batch of
    prompts."""
    loaded = load_tiny(tmp_path)
    base_model.generation_attention(loaded)
    seen: list[bool] = []
    loaded.causal.get_output_embeddings().register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous())
    )
    ids = torch.arange(4, 28).reshape(3, 8)
    with torch.no_grad():
        assert not loaded.body(input_ids=ids, use_cache=False)[0][:, -1:].is_contiguous()
        last = loaded.causal(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        torch.testing.assert_close(
            last, loaded.causal(input_ids=ids, use_cache=False).logits[:, -1:]
        )
    assert seen == [True, True]


@pytest.mark.parametrize("name", ["s_aux", "position_bias"])
def test_packed_attention_refuses_what_it_cannot_do(name: str) -> None:
    part = torch.ones(1, 2, 4, 8)
    with pytest.raises(ModelError, match=f"cannot apply '{name}'"):
        attention.segment_attention(
            torch.nn.Module(), part, part, part, None, **{name: torch.ones(2)}
        )


def test_weights_that_need_pickle_are_refused(tmp_path: Path) -> None:
    place = save_tiny(tmp_path / "m")
    torch.save({}, place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors; convert the weights to safetensors"):
        base_model.load(str(place), tiny_settings())


def test_a_damaged_weight_file_is_one_line(tmp_path: Path) -> None:
    place = save_tiny(tmp_path / "m")
    (place / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(ModelError, match="cannot load: Error while deserializing header"):
        base_model.load(str(place), tiny_settings())


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ModelError, match=r"device 'cuda' was asked for and PyTorch sees no GPU; set train\.device"
    ):
        load_tiny(tmp_path, device="cuda")


def test_four_bits_need_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="load_in_4bit needs a GPU"):
        load_tiny(tmp_path, load_in_4bit=True)


def test_bf16_keeps_adapters_in_fp32_and_agrees(tmp_path: Path) -> None:
    exact = load_tiny(tmp_path)
    rough = load_tiny(tmp_path, dtype="bfloat16")
    assert rough.packed
    adapter.new_adapter(rough, tiny_settings(), 0)
    assert {p.dtype for p in rough.peft.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in rough.peft.parameters() if not p.requires_grad} == {torch.bfloat16}
    examples = [tokens(30, seed) for seed in range(8)]
    np.testing.assert_allclose(
        generate.mean_loss(rough, examples), generate.mean_loss(exact, examples), rtol=0.02
    )


@pytest.mark.parametrize("kind", PACKED)
def test_in_bf16_the_fast_path_is_as_near_to_fp32_as_the_stock_model(
    tmp_path: Path, kind: str
) -> None:
    """Shared prefixes, padded batches, fused adapters and the chunked head together, against one
    example at a time."""
    rough, settings = load_tiny(tmp_path, kind, dtype="bfloat16"), tiny_settings()
    assert rough.shares
    adapter.new_adapter(rough, settings, 0)
    generator = torch.Generator().manual_seed(1)
    state = adapter.adapter_state(rough)
    adapter.set_adapter_state(
        rough, {n: 0.1 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    )
    examples = sharing_examples() + [tokens(length, 50 + length) for length in range(20, 60, 3)]
    exact_nats, exact = stock_losses_and_gradients(rough, settings, examples)
    stock_nats, stock = stock_losses_and_gradients(rough, settings, examples, dtype="bfloat16")
    nats, gradients, _ = our_losses_and_gradients(rough, examples, budget=1000)

    def distance(found, expected) -> float:
        return float(
            sum(((found[n] - expected[n]) ** 2).sum() for n in expected)
            / sum((g**2).sum() for g in expected.values())
        )

    ours, theirs = (
        float(np.mean(np.subtract(found, exact_nats) ** 2)) for found in (nats, stock_nats)
    )
    assert ours < 2 * theirs
    assert distance(gradients, exact) < 1.5 * distance(stock, exact)


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("lm_head",)])
def test_an_adapter_on_the_head_has_its_gradient(tmp_path: Path, targets: tuple[str, ...]) -> None:
    loaded, settings = load_tiny(tmp_path), tiny_settings(lora_target_modules=targets)
    shaken_adapter(loaded, settings)
    examples = [tokens(length, seed) for seed, length in enumerate((9, 20))]
    nats, gradients, _ = our_losses_and_gradients(loaded, examples, budget=1000)
    expected_nats, expected = stock_losses_and_gradients(loaded, settings, examples)
    assert any("lm_head" in name for name in gradients)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected)


def test_the_base_has_no_dropout_not_even_where_its_layers_are_told_that_they_train(
    tmp_path: Path,
) -> None:
    config = OPTConfig(
        vocab_size=400,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        word_embed_proj_dim=32,
        max_position_embeddings=128,
        dropout=0.5,
    )
    torch.manual_seed(0)
    loaded = base_model.adopt(
        "opt", "opt", AutoModelForCausalLM.from_config(config), tiny_tokenizer(), torch.float32
    )
    adapter.new_adapter(loaded, tiny_settings(), 0)
    example = [tokens(40, 0)]
    before = generate.mean_loss(loaded, example)
    (row,) = loss.rows(example, loaded, 1000)
    loss.set_checkpointing(loaded, True)
    values = {float(loss.row_loss(loaded, row, torch.ones(len(row.labels)))[0]) for _ in range(3)}
    loss.set_checkpointing(loaded, True)
    assert len(values) == 1
    assert {generate.mean_loss(loaded, example) for _ in range(3)} == {before}


def test_gradients_of_shared_places_are_added_in_a_fixed_order(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    shaken_adapter(loaded, tiny_settings())
    prompt = tokens(2 * BLOCK, 0)
    answers = [np.concatenate([prompt.ids, np.full(2, token)]) for token in range(10, 60)]
    examples = [Tokens(ids, np.arange(len(ids)) >= len(prompt)) for ids in answers]
    (row,) = loss.rows(examples, loaded, 1000)
    assert len(set(row.where.tolist())) < len(row.where)
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        found = [our_losses_and_gradients(loaded, examples, budget=1000)[1] for _ in range(5)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(again[name], found[0][name]) for again in found for name in again)


def test_packed_attention_refuses_what_it_cannot_compute(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    with pytest.raises(ModelError, match="one row without a key/value cache"):
        loaded.causal(input_ids=torch.ones(2, 5, dtype=torch.int64))
    with pytest.raises(ModelError, match=r"generate with `fulcrum\.generate`"):
        loaded.causal.generate(torch.ones(1, 5, dtype=torch.int64), max_new_tokens=3)


def test_a_window_that_does_not_reach_the_attention_forbids_packing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = save_tiny(tmp_path / "m", "mistral")
    known = attention.Segments.plan
    monkeypatch.setattr(
        attention.Segments, "plan", lambda self, h, k, window, *rest: known(self, h, k, None, *rest)
    )
    loaded = base_model.load(str(place), tiny_settings())
    assert not loaded.packed
    assert (
        "one example per row: its sliding window or chunked attention does not reach the "
        "packed attention" in loaded.facts
    )


def test_dropping_the_adapter_leaves_the_base_model_untouched(tmp_path: Path) -> None:
    loaded, settings = load_tiny(tmp_path), tiny_settings()
    before = {n: p.clone() for n, p in loaded.causal.named_parameters()}
    nats = generate.mean_loss(loaded, [tokens(20, 0)])
    shaken_adapter(loaded, settings)
    assert generate.mean_loss(loaded, [tokens(20, 0)]) != nats
    adapter.drop_adapter(loaded)
    assert generate.mean_loss(loaded, [tokens(20, 0)]) == nats
    for name, parameter in loaded.causal.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    loaded, settings = load_tiny(tmp_path), tiny_settings()
    adapter.new_adapter(loaded, settings, 0)
    state = adapter.adapter_state(loaded)
    other = load_tiny(tmp_path, "gpt2")
    with pytest.raises(ModelError, match="adapter does not fit"):
        adapter.use(other, state, settings)
    lost = state.popitem()[0]
    with pytest.raises(ModelError, match=rf"unknown weights \[\], missing \['{lost}'\]"):
        adapter.use(loaded, state, settings)


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"use_rslora": True}, {"lora_target_modules": ("q_proj",)}]
)
def test_variants_of_lora_agree_with_the_stock_model(tmp_path: Path, change: dict) -> None:
    loaded, settings = load_tiny(tmp_path), tiny_settings(**change)
    adapter.new_adapter(loaded, settings, 0)
    generator = torch.Generator().manual_seed(1)
    state = {
        n: 0.3 * torch.randn(t.shape, generator=generator) if "lora_B" in n else t
        for n, t in adapter.adapter_state(loaded).items()
    }
    adapter.set_adapter_state(loaded, state)
    examples = [tokens(20, 0), tokens(12, 1)]
    nats, gradients, _ = our_losses_and_gradients(loaded, examples, budget=100)
    expected_nats, expected = stock_losses_and_gradients(loaded, settings, examples)
    np.testing.assert_allclose(nats, expected_nats, rtol=1e-5)
    same_gradients(gradients, expected)


def test_a_beginning_longer_than_a_row_is_computed_for_many_examples_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny(tmp_path, "llama")
    rng = np.random.default_rng(0)
    shots = rng.integers(10, 200, 60)
    tails = [rng.integers(10, 200, 9) for _ in range(6)]
    examples = [Tokens(np.append(shots, tail), np.arange(69) >= 65) for tail in tails]
    apart = [generate.nats(loaded, [example])[0][0] for example in examples]
    computed: list[int] = []
    real = generate.row_nats
    monkeypatch.setattr(
        generate,
        "row_nats",
        lambda model, row, at: computed.append(row.ids.shape[1]) or real(model, row, at),
    )
    together, _ = generate.nats(loaded, examples, budget=40)
    assert together == pytest.approx(apart, rel=1e-5)
    assert computed == [
        56 + 4 * 13,
        56 + 2 * 13,
    ]  # instead of 6 x 69: as many tails as the beginning is long, in whole blocks
