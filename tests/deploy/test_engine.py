"""Many conversations at once are each what they are alone: on every kind of model, with every
adapter, in any order."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AttentionInterface

from fulcrum.core.errors import DataError, ModelError
from fulcrum.core.types import Anchor, Message
from fulcrum.data import encode
from fulcrum.deploy import engine, kv_cache
from fulcrum.deploy.engine import AnswerDelta, BusyError, Engine, Question, ServedModel
from fulcrum.deploy.kv_cache import KVCache
from fulcrum.model import adapter, generate
from fulcrum.model.adapter import BASE
from fulcrum.model.base_model import LoadedModel
from fulcrum.model.generate import Answer
from helpers.tiny import CONTEXT, load_tiny, tiny_settings

ANCHOR = Anchor("Sort the ticket below; answer with one JSON object.", "user_prefix")
TEXTS = (
    "Where is my parcel?",
    "I was charged twice. " * 5,
    "dog",
    "The quick brown fox jumps over the lazy dog, and sleeps.",
)
MOST = 12


def adapted(loaded: LoadedModel, seeds: dict[str, int]) -> None:
    """Adapters that change every answer, by name."""
    states = {}
    for name, seed in seeds.items():
        adapter.new_adapter(loaded, tiny_settings(), seed)
        generator = torch.Generator().manual_seed(seed)
        state = {
            key: torch.randn(value.shape, generator=generator) * 0.3
            for key, value in adapter.adapter_state(loaded).items()
        }
        states[name] = state
    adapter.put_on(loaded, {name: (state, tiny_settings()) for name, state in states.items()})


class Heard:
    """The parts of one answer, as they come."""

    def __init__(self) -> None:
        self.pieces: list[AnswerDelta] = []
        self.ended = threading.Event()

    def __call__(self, piece: AnswerDelta) -> None:
        self.pieces.append(piece)
        if piece.finish is not None:
            self.ended.set()

    @property
    def text(self) -> str:
        assert self.ended.wait(60)
        return "".join(piece.text for piece in self.pieces)

    @property
    def last(self) -> AnswerDelta:
        assert self.ended.wait(60)
        return self.pieces[-1]


def ask(running: Engine, model: str, text: str, **options: object) -> Heard:
    heard = Heard()
    prompt = encode.prompt_ids([Message("user", text)], running.served_models[model].form)
    given: dict[str, Any] = {"most": MOST, "deliver": heard, **options}
    running.submit(Question(model, prompt, **given))
    return heard


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A tiny model with two adapters on it."""
    found = load_tiny(tmp_path_factory.mktemp("engine"))
    adapted(found, {"sft": 1, "tell": 2})
    return found


@pytest.fixture(scope="module")
def served_models(loaded: LoadedModel) -> dict[str, ServedModel]:
    forms = {
        name: encode.make_format(loaded.tokenizer, anchor)
        for name, anchor in ((BASE, None), ("sft", None), ("tell", ANCHOR))
    }
    return {
        ("base" if name == BASE else name): ServedModel(name, form, MOST)
        for name, form in forms.items()
    }


@pytest.fixture(scope="module")
def alone(loaded: LoadedModel, served_models: dict[str, ServedModel]) -> dict[tuple[str, str], str]:
    """What each model answers to each text when nobody else asks, by Transformers' own
    generation."""
    found = {}
    for name, served in served_models.items():
        prompts = [encode.prompt_ids([Message("user", text)], served.form) for text in TEXTS]
        with adapter.active(loaded, served.adapter):
            answers = [
                generate.generate(
                    loaded, [prompt], served.form, max_new_tokens=MOST, batch_tokens=1
                )[0]
                for prompt in prompts
            ]
        found |= {(name, text): answer for text, answer in zip(TEXTS, answers, strict=True)}
    assert len(set(found.values())) > 6  # the adapters do change the answers
    return found


@pytest.fixture
def running(loaded: LoadedModel, served_models: dict[str, ServedModel]) -> Iterator[Engine]:
    with Engine(loaded, served_models, slots=3, waiting=20) as found:
        yield found


def test_answers_beside_others_are_those_given_alone(
    running: Engine, alone: dict[tuple[str, str], str]
) -> None:
    heard = {
        (name, text): ask(running, name, text) for text in TEXTS for name in running.served_models
    }
    assert {key: one.text for key, one in heard.items()} == alone
    assert {one.last.finish for one in heard.values()} <= {"stop", "length"}
    assert running.counts.parts > running.counts.steps  # they did share steps
    assert running.open == (0, 0)


def test_what_prompts_begin_with_is_read_once(
    running: Engine, alone: dict[tuple[str, str], str]
) -> None:
    before, beginning = running.counts.reused_tokens, running.served_models["tell"].beginning()
    assert ANCHOR.text in running.loaded.tokenizer.decode(beginning)
    assert ask(running, "tell", TEXTS[0]).text == alone["tell", TEXTS[0]]
    assert running.counts.reused_tokens - before == len(beginning)


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen3", "gemma2", "gemma3", "granite", "cohere", "gpt2"]
)
def test_every_kind_of_model_that_attends(tmp_path: Path, kind: str) -> None:
    """Long enough that sliding windows of 8 tokens matter, and slots are made wider."""
    loaded = load_tiny(tmp_path, kind)
    adapted(loaded, {"one": 1, "two": 2})
    ids = [
        loaded.tokenizer(text * 9)["input_ids"][: 60 + 170 * k] for k, text in enumerate(TEXTS[:3])
    ]
    ids = [(part * 20)[: 40 + 130 * k] for k, part in enumerate(ids)]
    names = [BASE, "one", "two"]
    expected = []
    for name, part in zip(names, ids, strict=True):
        with adapter.active(loaded, name), torch.no_grad():
            expected.append(
                loaded.causal(input_ids=torch.tensor([part]), use_cache=False).logits[0].float()
            )
    held = KVCache(loaded, 3)
    try:
        for cut in (30, 31, 32):  # read together at first, then a token each
            start = 0 if cut == 30 else cut - 1
            found = held.extend([0, 1, 2], [part[start:cut] for part in ids], names)
            assert torch.allclose(found, torch.stack([one[cut - 1] for one in expected]), atol=1e-3)
        found = held.extend(
            [2, 0], [ids[2][32:290], ids[0][32:36]], [names[2], names[0]]
        )  # of other lengths, not side by side
        assert torch.allclose(found, torch.stack([expected[2][289], expected[0][35]]), atol=1e-3)
        held.copy(2, 0, 100)
        found = held.extend([0], [ids[2][100:110]], ["two"])
        assert torch.allclose(found[0], expected[2][109], atol=1e-3)
    finally:
        held.close()


@pytest.mark.parametrize("kind", ["mamba", "lfm2"])
def test_a_model_without_such_a_cache_is_refused(tmp_path: Path, kind: str) -> None:
    loaded = load_tiny(tmp_path, kind)
    with pytest.raises(
        ModelError, match=r"cannot answer several conversations at once: .*; use `fulcrum chat`"
    ):
        KVCache(loaded, 2)
    assert loaded.causal.config._attn_implementation != "fulcrum_slots"


def test_a_model_whose_windows_do_not_arrive_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_tiny(tmp_path, "mistral")
    monkeypatch.setattr(
        loaded.causal.config, "sliding_window", 4096
    )  # more than a probe's few words could show
    registered = AttentionInterface._global_mapping
    monkeypatch.setitem(
        registered,
        kv_cache.NAME,
        lambda *given, sliding_window, **rest: kv_cache.slot_attention(*given, **rest),
    )
    with pytest.raises(ModelError, match="its sliding window does not reach the attention"):
        KVCache(loaded, 2)


def test_adapters_that_cannot_be_mixed_are_refused(tmp_path: Path) -> None:
    other = load_tiny(tmp_path)
    adapter.new_adapter(other, tiny_settings(use_dora=True), 0)
    with pytest.raises(ModelError, match="tell: PEFT cannot mix adapters of DoRA in a batch"):
        Engine(
            other, {"tell": ServedModel("default", encode.make_format(other.tokenizer, None), MOST)}
        )


def test_a_question_that_nobody_waits_for_frees_its_slot(
    running: Engine, alone: dict[tuple[str, str], str]
) -> None:
    """Three hold all slots for good; they leave, and the one who waited is answered."""
    gate, begun = threading.Event(), [threading.Event() for _ in range(3)]
    questions = []
    for k in range(3):

        def deliver(piece: AnswerDelta, k: int = k) -> None:
            begun[k].set()
            gate.wait(60)

        prompt = encode.prompt_ids([Message("user", TEXTS[k])], running.served_models["base"].form)
        questions.append(Question("base", prompt, 300, deliver, temperature=5.0, seed=k))
        running.submit(questions[-1])
    assert begun[0].wait(60)
    waits = ask(running, "sft", TEXTS[0])
    assert running.open[1] >= 1
    for question in questions:
        question.cancel()
    gate.set()
    assert waits.text == alone["sft", TEXTS[0]]


def test_who_cannot_be_told_any_more_has_left(
    running: Engine, alone: dict[tuple[str, str], str]
) -> None:
    def broken(piece: AnswerDelta) -> None:
        raise RuntimeError("the connection is gone")

    prompt = encode.prompt_ids([Message("user", "dog")], running.served_models["base"].form)
    question = Question("base", prompt, 300, broken, temperature=5.0, seed=1)
    running.submit(question)
    assert ask(running, "sft", TEXTS[0]).text == alone["sft", TEXTS[0]]
    assert question.cancelled


def test_time_runs_out(running: Engine) -> None:
    assert ask(running, "base", "dog", seconds=-1.0).last.finish == "timeout"


def test_too_many_and_too_long_are_refused(
    loaded: LoadedModel, served_models: dict[str, ServedModel]
) -> None:
    stopped = Engine(loaded, served_models, slots=1, waiting=1)  # not running: what comes waits
    ask(stopped, "base", "dog")  # for which a slot is free
    ask(stopped, "base", "dog")
    with pytest.raises(BusyError, match="2 questions wait already"):
        ask(stopped, "base", "dog")
    with pytest.raises(
        DataError,
        match=rf"prompt tokens and {CONTEXT} answer tokens exceed the context \({CONTEXT}\)",
    ):
        ask(stopped, "base", "dog", most=CONTEXT)
    with pytest.raises(DataError, match="the prompt is empty"):
        stopped.submit(Question("base", [], 3, Heard()))
    with stopped:
        pass  # leaving it answers who waited
    with pytest.raises(BusyError, match="the server stops"):
        ask(stopped, "base", "dog")


@pytest.mark.parametrize(
    "drawn", [{"temperature": 1e-39}, {"temperature": 1.0, "top_p": 1e-50}, {"temperature": 5e-4}]
)
def test_numbers_at_the_edge_draw_the_likeliest_and_end_nobody_elses_answer(
    running: Engine, alone: dict[tuple[str, str], str], drawn: dict[str, float]
) -> None:
    other = ask(running, "sft", TEXTS[0])
    assert ask(running, "tell", TEXTS[1], **drawn).text == alone["tell", TEXTS[1]]
    assert other.text == alone["sft", TEXTS[0]]


def test_a_stop_text_ends_an_answer_at_its_last_allowed_token_too(
    running: Engine, alone: dict[tuple[str, str], str]
) -> None:
    text = alone["tell", TEXTS[1]]
    heard = ask(running, "tell", TEXTS[1], stop=(text[-3:],))
    assert (heard.last.finish, heard.text) == ("stop", text[: text.find(text[-3:])].rstrip())


def test_a_model_whose_numbers_break_down_is_said_and_spoils_no_slot(
    loaded: LoadedModel, served_models: dict[str, ServedModel], alone: dict[tuple[str, str], str]
) -> None:
    """Keys that are no numbers would be seen through any mask."""
    first = next(weight for name, weight in loaded.peft.named_parameters() if "lora_B.tell" in name)
    before = first.detach().clone()
    with Engine(
        loaded, {name: served_models[name] for name in ("base", "tell")}, slots=2
    ) as running:
        torch.nn.init.constant_(first, float("nan"))
        broken = [ask(running, "tell", "ant " * 30) for _ in range(4)]
        assert {heard.last.finish for heard in broken} == {"error"}
        assert broken[0].last.wrong == "the model produced NaN for this prompt"
        first.data.copy_(before)
        assert [ask(running, "base", text).text for text in TEXTS] == [
            alone["base", text] for text in TEXTS
        ]


def test_room_grows_no_further_than_the_context_and_where_memory_is_short_nothing_breaks(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = kv_cache.KVCache(loaded, 2, most=300)
    held.extend([0], [[5, 6, 7]], [BASE])
    known = kv_cache._Layer.widen
    failing = iter([False, True])

    def short(layer: kv_cache._Layer, room: int) -> None:
        if next(failing, False):
            raise MemoryError("not now")
        known(layer, room)

    monkeypatch.setattr(kv_cache._Layer, "widen", short)
    held.lengths[0] = 250
    for attempt in range(2):
        if attempt == 0:
            with pytest.raises(MemoryError):
                held.extend([0], [[5] * 20], [BASE])
        else:
            held.extend([0], [[5] * 20], [BASE])
    assert held.room == 300
    held.close()


def test_stopping_lets_open_answers_end_and_tells_who_waits(
    loaded: LoadedModel, served_models: dict[str, ServedModel]
) -> None:
    with Engine(loaded, served_models, slots=1) as running:
        first, begun, gate = Heard(), threading.Event(), threading.Event()

        def slow(piece: AnswerDelta) -> None:
            begun.set()
            gate.wait(60)
            first(piece)

        prompt = encode.prompt_ids([Message("user", TEXTS[0])], served_models["base"].form)
        running.submit(Question("base", prompt, 3, slow, temperature=5.0, seed=3))
        assert begun.wait(60)  # a question that still waits when the engine stops gets no answer
        second = ask(running, "base", "dog")
        stopping = threading.Thread(target=running.stop, args=(60,))
        stopping.start()
        while running._until is None:  # only then may the first answer end and free the slot
            stopping.join(0.01)
        gate.set()
        stopping.join(60)
        assert first.last.finish in ("stop", "length")
        assert second.last.finish == "error"
        assert running.open == (0, 0)


def test_a_step_that_fails_costs_its_answers_and_no_others(
    running: Engine, alone: dict[tuple[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running._cache.extend
    failing = iter([True])

    def extend(
        slots: Sequence[int], ids: Sequence[Sequence[int]], names: Sequence[str]
    ) -> torch.Tensor:
        if next(failing, False):
            raise RuntimeError("out of memory")
        return real(slots, ids, names)

    monkeypatch.setattr(running._cache, "extend", extend)
    lost = ask(running, "tell", TEXTS[0])
    assert (lost.last.finish, lost.last.wrong) == ("error", "RuntimeError: out of memory")
    assert ask(running, "tell", TEXTS[0]).text == alone["tell", TEXTS[0]]


def test_drawn_answers_repeat_by_their_seed_whoever_else_asks(running: Engine) -> None:
    drawn = {"temperature": 3.0, "top_p": 0.9}
    first = ask(running, "tell", TEXTS[0], seed=7, **drawn).text
    others = [ask(running, "sft", text, seed=1, **drawn) for text in TEXTS[1:]]
    assert ask(running, "tell", TEXTS[0], seed=7, **drawn).text == first
    assert ask(running, "tell", TEXTS[0], seed=8, **drawn).text != first
    assert all(other.text is not None for other in others)


def test_top_p_keeps_the_likeliest_tokens_that_hold_it() -> None:
    logits = torch.log(torch.tensor([0.1, 0.5, 0.3, 0.1]))
    question = Question("base", [1], 1, Heard(), temperature=1.0, top_p=0.6)
    generator = torch.Generator().manual_seed(0)
    drawn = [engine._draw(logits, question, generator) for _ in range(300)]
    assert set(drawn) == {1, 2}  # 0.5 does not hold 0.6, with 0.3 it does
    assert 150 < drawn.count(1) < 230  # 0.625 of 300 is 187


def spoken(
    parts: Sequence[str], stop: Sequence[str] = (), *, strip: bool = True
) -> tuple[list[str], bool]:
    """What is said after each token, and at the end, where tokens are texts; and whether a stop
    text was met."""
    table: list[str] = list(parts)

    def decode(ids: list[int]) -> str:
        return b"".join(table[k].encode("latin-1") for k in ids).decode("utf-8", errors="replace")

    answer = Answer(decode, stop, strip=strip)
    said = []
    for token in range(len(table)):
        said.append(answer.add(token))
        if answer.stopped:
            return said, True
    return [*said, answer.end()], answer.stopped


@pytest.mark.parametrize(
    ("parts", "stop", "expected"),
    [
        (["Hel", "lo", " you"], (), (["Hel", "lo", " you", ""], False)),
        (
            [" ", " a", " ", "b ", " "],
            (),
            (["", "a", "", " b", "", ""], False),
        ),  # white space inside, none around
        (
            ["caf", "\xc3", "\xa9", "!"],
            (),
            (["caf", "", "é", "!", ""], False),
        ),  # never half a character
        (["ab", "\xc3"], (), (["ab", "", "\ufffd"], False)),  # what is broken is said at the end
        (["one E", "N", "D two"], ("END",), (["one", "", ""], True)),
        (["one E", "N", "O"], ("END",), (["one", "", " ENO", ""], False)),
        (["one E", "N"], ("END",), (["one", "", " EN"], False)),
        (["xyz"], ("z", "y"), (["x"], True)),  # the first that comes
        (["\n", "a"], ("\n",), ([""], True)),  # before the white space around an answer is left out
        ([" ", "\n", "\na"], ("\n\n",), (["", "", ""], True)),
        (["one", " END\xc3"], ("END",), (["one", "", ""], True)),  # found in what was held back
    ],
)
def test_text_is_said_once_it_is_certain(
    parts: list[str], stop: tuple[str, ...], expected: tuple[list[str], bool]
) -> None:
    assert spoken(parts, stop) == expected


@given(
    st.lists(st.text("ab \n", max_size=3), max_size=12),
    st.lists(st.text("ab \n", min_size=1, max_size=3), max_size=3),
    st.booleans(),
)
def test_what_is_said_is_the_text_up_to_the_first_stop_text(
    parts: list[str], stop: list[str], strip: bool
) -> None:
    whole, cut = "", None
    for part in parts:
        whole += part
        if ends := [place for text in stop if (place := whole.find(text)) >= 0]:
            cut = min(ends)
            break
    said, stopped = spoken(parts, stop, strip=strip)
    assert stopped == (cut is not None)
    assert "".join(said) == (whole[:cut].strip() if strip else whole[:cut])


def test_text_that_is_not_stripped_keeps_its_spaces() -> None:
    assert spoken([" ", " a ", "\n"], strip=False) == ([" ", " a ", "\n", ""], False)


def test_a_question_that_cannot_begin_costs_no_other(
    running: Engine, alone: dict[tuple[str, str], str]
) -> None:
    lost = ask(
        running, "tell", TEXTS[0], temperature=1.0, seed=2**70
    )  # more than a generator takes
    assert lost.last.finish == "error"
    assert ask(running, "tell", TEXTS[0]).text == alone["tell", TEXTS[0]]
    assert running.alive


def test_a_narrower_context_than_the_models_holds(
    loaded: LoadedModel, served_models: dict[str, ServedModel]
) -> None:
    refused = pytest.raises(DataError, match=r"and 35 answer tokens exceed the context \(40\)")
    with Engine(loaded, served_models, slots=1, context=40) as narrow, refused:
        ask(narrow, "base", TEXTS[1], most=35)
    with Engine(loaded, served_models, slots=1, context=10_000) as wide:
        assert wide.context == CONTEXT
