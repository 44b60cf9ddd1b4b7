"""What must agree does: packing and accumulation, resumed and uninterrupted, one process and two,
TRL and Fulcrum."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor, Message, TrainPoint
from fulcrum.data import encode
from fulcrum.model import adapter, base_model, generate, loss, save
from fulcrum.training import loop
from helpers.tiny import FORGETFUL, TRIMMING, load_tiny, tiny_settings, tiny_tokenizer
from helpers.training import DEV, GENERAL, TASK, same, stream, tokens, train


def close(a: adapter.State, b: adapter.State, **tolerance: float) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name],
            b[name],
            **{"rtol": 1e-4, "atol": 1e-6, **tolerance},
            msg=lambda m, n=name: f"{n}: {m}",
        )


def curve(result: Any) -> list[tuple[float | None, float | None]]:
    return [(point.task_loss, point.general_loss) for point in result.history]


# One step is one step, however it is cut.


def test_batch_8_packed_is_accumulation_8_x_1(tmp_path: Path) -> None:
    packed, first = train(tmp_path, batch_size=8, pack_tokens=1000)
    alone, second = train(
        tmp_path, batch_size=8, pack_tokens=8
    )  # every example is longer than half of it: its own row
    close(packed, alone)
    np.testing.assert_allclose(curve(first), curve(second), rtol=1e-5)
    np.testing.assert_allclose(first.dev_nll, second.dev_nll, rtol=1e-5)


def test_the_loss_is_the_mean_over_the_steps_targets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the mean of row means: a step of a long and a short example weighs every token alike."""
    given: list[float] = []
    whole = loop.row_loss
    monkeypatch.setattr(
        loop,
        "row_loss",
        lambda m, row, weights, kl: (given.extend(weights.tolist()), whole(m, row, weights, kl=kl))[
            1
        ],
    )
    train(tmp_path, batch_size=24, pack_tokens=8, rows=stream(), evaluations=1)
    rows = stream()
    examples, _ = rows.step(0, 24)
    assert len(given) == sum(e.n_loss for e in examples)
    np.testing.assert_allclose(given, 1 / len(given), rtol=1e-6)


def test_task_weight_weighs_tokens_and_keeps_the_sum_at_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[float] = []
    whole = loop.row_loss
    monkeypatch.setattr(
        loop,
        "row_loss",
        lambda m, row, weights, kl: (given.extend(weights.tolist()), whole(m, row, weights, kl=kl))[
            1
        ],
    )
    train(tmp_path, batch_size=24, task_weight=3.0, evaluations=1)
    examples, is_task = stream().step(0, 24)
    own = sum(e.n_loss for e, task in zip(examples, is_task, strict=True) if task)
    other = sum(e.n_loss for e in examples) - own
    low, high = 1 / (3 * own + other), 3 / (3 * own + other)
    np.testing.assert_allclose(sorted(given), [low] * other + [high] * own, rtol=1e-5)


def test_losses_are_reported_by_source(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    examples, is_task = stream().step(0, 4)
    _, result = train(tmp_path, batch_size=4)
    for kind, found in (
        (True, result.history[0].task_loss),
        (False, result.history[0].general_loss),
    ):
        chosen = [e for e, own in zip(examples, is_task, strict=True) if own == kind]
        if chosen:
            np.testing.assert_allclose(found, generate.mean_loss(loaded, chosen), rtol=1e-5)
        else:
            assert found is None


def test_a_plan_that_no_batch_divides_is_trained_to_its_end(tmp_path: Path) -> None:
    _, result = train(tmp_path, batch_size=7)
    assert result.steps == 4  # 24 positions: 7 + 7 + 7 + 3
    assert result.train_tokens == sum(len(e) for i in range(4) for e in stream().step(i, 7)[0])
    assert result.train_tokens == 2 * sum(map(len, TASK)) + sum(map(len, GENERAL))
    assert result.share.total_tokens == result.train_tokens
    assert (result.share.task_examples, result.share.general_examples) == (8, 16)


def test_the_learning_rate_warms_up_and_decays_within_the_run() -> None:
    settings = tiny_settings(learning_rate=1.0, warmup=0.2, final_lr=0.1)
    rates = [loop.learning_rate(step, (10,), settings) for step in range(10)]
    np.testing.assert_allclose(rates, [0.5, 1.0, *(1 - 0.9 * k / 8 for k in range(1, 9))])
    assert loop.learning_rate(0, (1,), settings) == 1.0
    four = [
        loop.learning_rate(step, (8,), tiny_settings(learning_rate=1.0, warmup=4))
        for step in range(4)
    ]
    np.testing.assert_allclose(four, [0.25, 0.5, 0.75, 1.0])


def test_what_is_returned_is_the_best_of_the_dev_evaluations(tmp_path: Path) -> None:
    measured = iter([3.0, 1.0, 2.0])
    loaded, states = load_tiny(tmp_path), []

    def watch(point: TrainPoint, steps: int, dev: float | None) -> None:
        states.append(adapter.adapter_state(loaded))

    settings = tiny_settings(batch_size=4, evaluations=3)
    state, result = loop.train(
        loaded,
        stream(),
        loop.Recipe(settings, seed=0, repeats=2),
        dev_loss=lambda: next(measured),
        progress=watch,
    )
    assert result.dev_nll == ((2, 3.0), (4, 1.0), (6, 2.0))
    assert result.best_step == 4
    assert same(state, states[3])
    assert same(adapter.adapter_state(loaded), states[3])  # and it is on the model


def test_early_stopping_counts_evaluations_without_a_better_one(tmp_path: Path) -> None:
    measured = iter([3.0, 1.0, 2.0, 1.5, 0.5, 0.5])
    settings = tiny_settings(batch_size=4, evaluations=6, early_stopping_patience=2)
    _, result = loop.train(
        load_tiny(tmp_path),
        stream(),
        loop.Recipe(settings, seed=0, repeats=2),
        dev_loss=lambda: next(measured),
    )
    assert (result.steps, result.best_step, len(result.dev_nll)) == (4, 2, 4)


def test_a_run_that_diverges_is_an_error_and_not_an_untrained_adapter(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"diverged at step 2 of 6: task loss nan, .*; rows of this step: general row 13, "
            r".*learning_rate \(1e\+20\)"
        ),
    ):
        train(tmp_path, learning_rate=1e20, max_grad_norm=1e30)


# Seeds.


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_one_seed_gives_one_adapter_and_another_seed_another(
    tmp_path: Path, dropout: float
) -> None:
    first, _ = train(tmp_path, seed=1, lora_dropout=dropout)
    again, _ = train(tmp_path, seed=1, lora_dropout=dropout)
    other, _ = train(tmp_path, seed=2, lora_dropout=dropout)
    assert same(first, again)
    assert not same(first, other)


def test_dropout_is_on_in_training_and_off_in_scoring(tmp_path: Path) -> None:
    without, _ = train(tmp_path)
    with_dropout, _ = train(tmp_path, lora_dropout=0.3)
    assert not same(without, with_dropout)
    loaded = load_tiny(tmp_path, lora_dropout=0.3)
    adapter.new_adapter(loaded, tiny_settings(lora_dropout=0.3), 0)
    adapter.set_adapter_state(loaded, with_dropout)
    assert generate.mean_loss(loaded, DEV) == generate.mean_loss(loaded, DEV)


def test_a_second_run_on_one_model_starts_from_the_untouched_base(tmp_path: Path) -> None:
    loaded, settings = load_tiny(tmp_path), tiny_settings(learning_rate=5e-3)
    recipe = loop.Recipe(settings, seed=0, repeats=2)
    dev_loss = partial(generate.mean_loss, loaded, DEV)
    first, _ = loop.train(loaded, stream(), recipe, dev_loss=dev_loss)
    again, _ = loop.train(loaded, stream(), recipe, dev_loss=dev_loss)
    assert same(first, again)


# The same loss as TRL.


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_loss_and_gradients_on_one_batch_are_trls(tmp_path: Path, kind: str) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    loaded, settings = load_tiny(tmp_path, kind), tiny_settings()
    shake(loaded, settings)
    batch = [TASK[0], GENERAL[3], TASK[3], GENERAL[9], GENERAL[15]]
    rows = loss.rows(batch, loaded, 1000)
    total = sum(len(row.labels) for row in rows)
    ours = torch.zeros(())
    for row in rows:
        value, _ = loss.row_loss(loaded, row, torch.full((len(row.labels),), 1 / total))
        value.backward()
        ours += value.detach()
    gradients = {name: p.grad for name, p in loaded.peft.named_parameters() if p.requires_grad}

    save.save_adapter(loaded, tmp_path / "adapter", {"task": None})
    causal = AutoModelForCausalLM.from_pretrained(loaded.path, dtype=torch.float32)
    peft = PeftModel.from_pretrained(causal, tmp_path / "adapter", is_trainable=True)
    records = [
        {"input_ids": e.ids.tolist(), "completion_mask": e.loss_mask.astype(int).tolist()}
        for e in batch
    ]
    trainer = SFTTrainer(
        peft,
        SFTConfig(
            str(tmp_path / "trl"),
            use_cpu=True,
            per_device_train_batch_size=5,
            max_length=None,
            bf16=False,
            completion_only_loss=True,
            gradient_checkpointing=False,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(records),
        processing_class=loaded.tokenizer,
    )
    prepared = trainer.data_collator([trainer.train_dataset[i] for i in range(5)])
    theirs = trainer.compute_loss(trainer.model, prepared)
    theirs.backward()
    assert prepared["input_ids"].shape == (5, max(map(len, batch)))
    np.testing.assert_allclose(float(ours), float(theirs.detach()), rtol=1e-5)
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert gradients.keys() == found.keys()
    for name in found:
        torch.testing.assert_close(gradients[name], found[name], rtol=1e-3, atol=1e-5)


def shake(loaded: base_model.LoadedModel, settings: Any) -> None:
    """An adapter far from its beginning, where B is zero."""
    adapter.new_adapter(loaded, settings, 0)
    generator = torch.Generator().manual_seed(1)
    state = adapter.adapter_state(loaded)
    adapter.set_adapter_state(
        loaded, {n: 0.3 * torch.randn(t.shape, generator=generator) for n, t in state.items()}
    )


# What is saved is what was trained.


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("llama", {}),
        ("gemma2", {}),
        ("lfm2", {}),
        ("mamba", {}),
        ("gpt2", {}),
        ("qwen3", {"use_rslora": True}),
        ("llama", {"use_dora": True}),
    ],
)
def test_plain_peft_loads_the_adapter_and_gives_the_same_outputs(
    tmp_path: Path, kind: str, options: dict
) -> None:
    loaded, settings = load_tiny(tmp_path, kind), tiny_settings(**options)
    ids = torch.as_tensor(tokens(20, 0).ids)[None]
    with torch.no_grad():
        base = loaded.causal(input_ids=ids).logits
        shake(loaded, settings)
        expected = loaded.causal(input_ids=ids).logits
    folder = save.save_adapter(loaded, tmp_path / "adapter", {"task": None})
    assert not (folder / "README.md").exists()
    causal = AutoModelForCausalLM.from_pretrained(
        loaded.path, dtype=torch.float32, attn_implementation="eager"
    )
    plain = PeftModel.from_pretrained(causal, folder).eval()
    with torch.no_grad():
        found = plain(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((expected - base).abs().max()) > 0.1


QUESTION, ANSWER, AGAIN = (
    Message("user", "  One? "),
    Message("assistant", "1"),
    Message("user", "Two?\n"),
)
SYSTEM = Message("system", "Be brief.")


@pytest.mark.parametrize("placement", ["system", "user_prefix", "user_suffix", "response_prefix"])
@pytest.mark.parametrize(
    "template", [True, TRIMMING, FORGETFUL, False], ids=["chatml", "trimming", "forgetful", "base"]
)
def test_the_saved_tokenizer_gives_training_ids(
    tmp_path: Path, placement: Any, template: str | bool
) -> None:
    loaded = load_tiny(tmp_path, template=template)
    adapter.new_adapter(loaded, tiny_settings(), 0)
    anchor = Anchor('Sort the ticket;\nanswer "so" {{ not }}: ', placement)
    save.save_adapter(loaded, tmp_path / "adapter", {"task": anchor})
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    form = encode.make_format(loaded.tokenizer, anchor)
    for messages in (
        (QUESTION,),
        (SYSTEM, QUESTION),
        (QUESTION, ANSWER, AGAIN),
        (SYSTEM, QUESTION, ANSWER, AGAIN),
    ):
        turns = [{"role": m.role, "content": m.content} for m in messages]
        found = saved.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        assert found == encode.prompt_ids(messages, form)
        assert (
            loaded.tokenizer.apply_chat_template(
                turns, add_generation_prompt=True, return_dict=False
            )
            != found
        )


def test_several_tasks_get_named_templates_and_the_default_has_no_anchor(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    adapter.new_adapter(loaded, tiny_settings(), 0)
    tasks = {"sort": Anchor("SORT."), "label": Anchor("LABEL.", "system"), "plain": None}
    save.save_adapter(loaded, tmp_path / "adapter", tasks)
    saved = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    turns = [{"role": "user", "content": "One?"}]
    for name, anchor in tasks.items():
        found = saved.apply_chat_template(
            turns, chat_template=name, add_generation_prompt=True, return_dict=False
        )
        assert found == encode.prompt_ids(
            (Message("user", "One?"),), encode.make_format(loaded.tokenizer, anchor)
        )
    plain = tiny_tokenizer().apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert saved.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) == plain
    assert isinstance(loaded.tokenizer.chat_template, str)  # the one in memory is as it was


def test_an_adapter_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    loaded = load_tiny(tmp_path)
    adapter.new_adapter(loaded, tiny_settings(), 0)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "left over").touch()
    names = {
        path.name
        for path in save.save_adapter(loaded, tmp_path / "adapter", {"task": None}).iterdir()
    }
    assert {
        "adapter_model.safetensors",
        "adapter_config.json",
        "generation_config.json",
        "tokenizer.json",
    } <= names
    assert "left over" not in names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)


@pytest.mark.parametrize(
    ("options", "shared"),
    [({}, True), ({"share_prefixes": False}, False), ({"lora_dropout": 0.1}, False)],
)
def test_prefixes_are_shared_unless_switched_off_or_dropout_is_drawn_for_each_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], shared: bool
) -> None:
    asked: list[bool] = []
    known = loop.rows
    monkeypatch.setattr(
        loop, "rows", lambda *a, share, **k: (asked.append(share), known(*a, share=share, **k))[1]
    )
    train(tmp_path, **options)
    assert set(asked) == {shared}
