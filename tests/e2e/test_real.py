"""A few facts about the real default model: its weights are right, rows are packed, and training on
a task helps."""

from pathlib import Path

import pytest
import torch

from fulcrum.config.sections import TrainSettings
from fulcrum.core.types import Anchor, Example, Message
from fulcrum.data import encode, mix
from fulcrum.data.token_stream import Stream
from fulcrum.model import adapter, base_model, generate
from fulcrum.training import loop

pytestmark = pytest.mark.real_model

TEXT = (
    "The baker opens the shop at six in the morning, long before the first bus comes. She "
    "lights the oven, weighs the flour "
    "and listens to the radio. By eight the bread is sold, and the children who pass on their "
    "way to school buy what is left "
    "of the sweet rolls. In the afternoon she cleans the tables, counts the money and writes "
    "down what has to be ordered for "
    "the week."
)


@pytest.fixture(scope="module")
def loaded(default_model_path: str) -> base_model.LoadedModel:
    return base_model.load(default_model_path, TrainSettings(dtype="float32"))


def nats_a_token(loaded: base_model.LoadedModel) -> float:
    ids = loaded.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded.causal(input_ids=ids).logits[0, :-1]
    return float(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))


def test_the_weights_are_right(loaded: base_model.LoadedModel) -> None:
    """The loss on plain text is the one measured, and the commonest fault of a conversion would
    show.

    GGUF orders the rows of the query and key matrices by rotary pairs, Transformers by halves.
    """
    assert nats_a_token(loaded) == pytest.approx(3.807, abs=0.02)
    weight = loaded.causal.model.layers[0].self_attn.q_proj.weight
    right = weight.detach().clone()
    heads = loaded.causal.config.num_attention_heads
    with torch.no_grad():
        weight.copy_(right.view(heads, 2, -1, right.shape[1]).transpose(1, 2).reshape(right.shape))
        wrong = nats_a_token(loaded)
        weight.copy_(right)
    assert wrong > 3.807 + 0.8  # one matrix of 60 costs 1.2 nats


def test_its_rows_are_packed(loaded: base_model.LoadedModel) -> None:
    assert loaded.packed
    assert loaded.split_head


def test_its_template_carries_the_anchor(loaded: base_model.LoadedModel) -> None:
    form = encode.make_format(loaded.tokenizer, Anchor("Answer with a colour."))
    text = loaded.tokenizer.decode(encode.prompt_ids((Message("user", "The sky?"),), form))
    assert text == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n"
        "<|im_start|>user\nAnswer with a colour.\n\nThe sky?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_few_steps_teach_a_format(loaded: base_model.LoadedModel, tmp_path: Path) -> None:
    """Eight rows of one pattern: the loss on an unseen row falls, and its answer has the
    pattern."""
    form = encode.make_format(loaded.tokenizer, Anchor("Write the animal in the box."))
    animals = ("cat", "dog", "horse", "cow", "sheep", "goat", "mouse", "bird")
    rows = [_row(animal, form) for animal in animals]
    unseen = _row("fish", form)
    adapter.drop_adapter(loaded)
    before = generate.mean_loss(loaded, [unseen])
    plan = mix.plan(len(rows), 0, repeats=6, general_per_task=0, order="random", seed=0)
    loop.train(
        loaded,
        Stream(plan, rows, []),
        loop.Recipe(TrainSettings(evaluations=2), seed=0, repeats=6),
        dev_loss=lambda: generate.mean_loss(loaded, [unseen]),
    )
    assert generate.mean_loss(loaded, [unseen]) < before / 2
    prompt = encode.prompt_ids((Message("user", "I saw a fish today."),), form)
    assert generate.generate(loaded, [prompt], form, max_new_tokens=12, batch_tokens=512) == [
        "[box: fish]"
    ]
    adapter.drop_adapter(loaded)


def _row(animal: str, form: encode.PromptFormat) -> encode.Tokens:
    messages = (
        Message("user", f"I saw a {animal} today."),
        Message("assistant", f"[box: {animal}]"),
    )
    return encode.encode(Example(messages, animal, f"rows:{animal}"), form)
