import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import Prediction, Score
from fulcrum.stats.metrics import HIGHER_IS_BETTER, METRICS, needs_generation, score


def rows(*pairs: tuple[str | None, str], nll: tuple[float, int] = (2.0, 4)) -> list[Prediction]:
    return [
        Prediction(f"t.jsonl:{i + 1}", f"g{i}", "question", gold, output, *nll)
        for i, (output, gold) in enumerate(pairs)
    ]


def one(metric: str, *pairs: tuple[str | None, str]) -> Score:
    return score(rows(*pairs), [metric], draws=50)[0]


WORDS = [
    "the cat sat",
    "a black dog ran home",
    "",
    "Hello, world!",
    "the dog sat on the mat",
    "cat",
    "ran home to the black dog",
]


def random_pairs(n: int, vocabulary: list[str], seed: int = 0) -> list[tuple[str, str]]:
    rng = np.random.default_rng(seed)
    return [(str(rng.choice(vocabulary)), str(rng.choice(vocabulary))) for _ in range(n)]


def test_nll_is_nats_over_tokens_and_keeps_nats_per_token_of_each_row():
    predictions = [
        Prediction("a:1", "g1", "q", "x", None, 2.0, 1),
        Prediction("a:2", "g2", "q", "y", None, 30.0, 9),
    ]
    result = score(predictions, ["nll"])[0]
    assert result == Score("nll", 3.2, 2.0, 30 / 9, 2, 2, False, (2.0, 30 / 9))


def test_exact_match_forgives_outer_space_and_unicode_form_only():
    result = one(
        "exact_match",
        (" yes\n", "yes"),
        ("cafe\u0301", "caf\u00e9"),
        ("Yes", "yes"),
        ("yes.", "yes"),
        ("a  b", "a b"),
    )
    assert result.outcomes == (1, 1, 0, 0, 0)
    assert result.value == 0.4
    assert result.higher_is_better


@pytest.mark.parametrize(
    ("output", "gold", "f1"),
    [
        ("The cat sat!", "a cat, sat", 1.0),
        ("cat cat dog", "cat mouse", 2 * 1 / (3 + 2)),
        ("cat cat", "cat cat cat", 2 * 2 / 5),
        ("dog", "cat", 0.0),
        ("the", "a", 1.0),  # nothing is left of either
        ("the", "cat", 0.0),
    ],
)
def test_token_f1_by_hand(output, gold, f1):
    assert one("token_f1", (output, gold)).value == pytest.approx(f1)


def test_rouge_l_by_hand_and_by_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    # longest common subsequence "the sat mat" of 3 and 6 words: precision 1, recall 1/2
    assert one("rouge_l", ("the sat mat", "the dog sat on the mat")).value == pytest.approx(2 / 3)
    pairs = random_pairs(20, WORDS)
    scorer = RougeScorer(["rougeL"])
    assert one("rouge_l", *pairs).outcomes == tuple(
        scorer.score(g, o)["rougeL"].fmeasure for o, g in pairs
    )


def test_rouge_l_refuses_a_script_that_it_cannot_read():
    with pytest.raises(DataError, match=r"ASCII letters and digits only.*t\.jsonl:1.*Use chrf"):
        one("rouge_l", ("привет", "привет"))


def test_chrf_is_the_mean_of_sacrebleus_sentences():
    import sacrebleu

    pairs = random_pairs(20, WORDS)
    result = one("chrf", *pairs)
    assert result.outcomes == tuple(sacrebleu.sentence_chrf(o, [g]).score for o, g in pairs)
    assert result.value == pytest.approx(np.mean(result.outcomes))
    assert one("chrf", ("same text", "same text")).value == pytest.approx(100)


@pytest.mark.parametrize("seed", range(5))
def test_bleu_is_sacrebleus_corpus_bleu(seed):
    import sacrebleu

    pairs = random_pairs(15, WORDS, seed)
    result = one("bleu", *pairs)
    assert result.value == pytest.approx(
        sacrebleu.corpus_bleu([o for o, _ in pairs], [[g for _, g in pairs]]).score
    )
    assert result.low <= result.value <= result.high
    assert result.outcomes == ()


def test_bleu_without_a_single_match_is_zero():
    assert one("bleu", ("", "the cat sat"), ("dog", "cat")).value == 0


MALICIOUS = {
    "not a number": "NaN",
    "infinite": '{"a": -Infinity}',
    "key twice": '{"a": 1, "a": 2}',
    "key twice, deeper": '[{"b": {"a": 1, "a": 1}}]',
    "deep list": "[" * 100_000,
    "deep closed list": "[" * 100_000 + "]" * 100_000,
    "deep object": '{"a":' * 100_000 + "1" + "}" * 100_000,
    "text around": 'Sure: {"a": 1}',
    "fence": '```json\n{"a": 1}\n```',
    "two values": "{} {}",
    "single quotes": "{'a': 1}",
    "trailing comma": "[1,]",
    "huge integer": "9" * 10_000,
    "bare control character": '"a\x00b"',
    "byte order mark": "\ufeff{}",
    "empty": "",
}


@pytest.mark.parametrize("output", MALICIOUS.values(), ids=MALICIOUS.keys())
def test_what_is_no_strict_json_counts_as_invalid(output):
    scores = score(rows((output, '{"a": 1}')), ["json_valid", "json_fields"], draws=10)
    assert [s.value for s in scores] == [0, 0]


def test_json_valid_accepts_any_json_value():
    assert (
        one("json_valid", (' {"a": [1, null]}\n', ""), ("3", ""), ('"x"', ""), ("[]", "")).value
        == 1
    )


@pytest.mark.parametrize(
    ("output", "gold", "f1"),
    [
        ('{"b": 2, "a": 1}', '{"a": 1, "b": 2}', 1.0),
        ('{"a": 1}', '{"a": 1, "b": 2}', 2 * 1 / (1 + 2)),
        (
            '{"a": 1, "b": 3, "c": {"d": "x"}}',
            '{"a": 1, "b": 2, "c": {"d": "x", "e": []}}',
            2 * 2 / (3 + 4),
        ),
        ("[1, 2, 3]", "[1, 3, 2]", 2 * 1 / 6),  # positions are paths
        ("[true]", "[1]", 0.0),
        ("[1.0]", "[1]", 1.0),
        ('["1"]', "[1]", 0.0),
        ("null", "false", 0.0),
        ("{}", "[]", 0.0),
        ("{}", "{}", 1.0),
        ('"dict"', "{}", 0.0),
        ('{"0": "x"}', '["x"]', 0.0),
        ('{"n": "cafe\u0301"}', '{"n": "caf\u00e9"}', 1.0),
        ("[" * 500 + "]" * 500, "[]", 0.0),
    ],
)
def test_json_fields_by_hand(output, gold, f1):
    assert one("json_fields", (output, gold)).value == pytest.approx(f1)


def test_json_fields_names_the_row_whose_gold_is_no_json():
    with pytest.raises(
        DataError, match=r"t\.jsonl:2: json_fields needs JSON as the gold answer, got 'oops'"
    ):
        one("json_fields", ("{}", "{}"), ("{}", "oops"))


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(json_values)
def test_json_fields_of_a_value_with_itself_is_one(value):
    text = json.dumps(value)
    assert [s.value for s in score(rows((text, text)), ["json_valid", "json_fields"], draws=1)] == [
        1,
        1,
    ]


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_no_output_crashes_a_metric(text):
    scores = score(rows((text, '{"a": 1}')), METRICS, draws=1)
    assert all(math.isfinite(s.value) for s in scores)


def test_accuracy_forgives_case_and_outer_space():
    assert one(
        "accuracy", (" POSITIVE", "positive"), ("STRASSE", "straße"), ("positive.", "positive")
    ).outcomes == (1, 1, 0)


LABELS = ["red", "green", "blue"]


@pytest.mark.parametrize("seed", range(8))
def test_label_metrics_agree_with_scikit_learn_also_on_outputs_that_are_no_label(seed):
    from sklearn.metrics import balanced_accuracy_score, matthews_corrcoef

    rng = np.random.default_rng(seed)
    gold = rng.choice(LABELS, size=40, p=[0.6, 0.3, 0.1])
    output = np.where(
        rng.random(40) < 0.5, gold, rng.choice([*LABELS, "purple", "I think red"], size=40)
    )
    balanced, mcc = score(
        rows(*zip(output, gold, strict=True)), ["balanced_accuracy", "mcc"], draws=200
    )
    known = [label if label in set(gold) else "other" for label in output]
    assert balanced.value == pytest.approx(balanced_accuracy_score(gold, output))
    assert mcc.value == pytest.approx(matthews_corrcoef(gold, known))
    assert balanced.low < balanced.value < balanced.high
    assert mcc.low < mcc.value < mcc.high
    assert balanced.outcomes == mcc.outcomes == ()


def test_a_constant_answer_earns_nothing_beyond_chance():
    pairs = [("no", "no")] * 8 + [("no", "yes")] * 2
    accuracy, balanced, mcc = score(
        rows(*pairs), ["accuracy", "balanced_accuracy", "mcc"], draws=50
    )
    assert (accuracy.value, balanced.value, mcc.value) == (0.8, 0.5, 0.0)


def test_perfect_and_opposite_answers():
    assert one("mcc", ("a", "a"), ("b", "b")).value == 1
    assert one("mcc", ("b", "a"), ("a", "b")).value == -1
    assert (
        one("mcc", ("a", "a"), ("a", "a")).value == 0
    )  # constant: undefined, 0 as in scikit-learn


def test_mcc_interval_is_the_resampled_statistic():
    from sklearn.metrics import matthews_corrcoef

    pairs = [("a", "a")] * 12 + [("b", "a")] * 3 + [("b", "b")] * 10 + [("x", "b")] * 5
    result = score(rows(*pairs), ["mcc"], draws=4000)[0]
    rng = np.random.default_rng(0)
    output, gold = map(np.array, zip(*pairs, strict=True))
    draws = [matthews_corrcoef(gold[i], output[i]) for i in rng.integers(30, size=(1500, 30))]
    assert (result.low, result.high) == pytest.approx(
        tuple(np.quantile(draws, [0.022, 0.978])), abs=0.04
    )


def test_groups_and_rows_are_counted_and_one_group_has_no_interval():
    predictions = [
        Prediction(f"f:{i}", f"document {i // 2}", "q", "x", "x", 1.0, 1) for i in range(6)
    ]
    assert (
        score(predictions, ["accuracy"])[0].n,
        score(predictions, ["accuracy"])[0].n_groups,
    ) == (6, 3)
    alone = score(predictions[:2], ["bleu"])[0]
    assert math.isnan(alone.low)
    assert math.isnan(alone.high)


def test_all_metrics_in_the_order_asked_and_the_same_again():
    predictions = rows(('{"a": 1}', '{"a": 1}'), ("x", "[1]"), ("[1]", "[1]"))
    assert tuple(s.metric for s in score(predictions, METRICS, draws=50)) == METRICS
    assert score(predictions, METRICS, draws=50, seed=3) == score(
        predictions, METRICS, draws=50, seed=3
    )
    assert {name for name, higher in HIGHER_IS_BETTER.items() if not higher} == {"nll"}


def test_only_nll_does_without_outputs():
    assert not needs_generation(["nll"])
    assert not needs_generation([])
    assert all(needs_generation(["nll", name]) for name in METRICS if name != "nll")
    with pytest.raises(
        ConfigError,
        match=r"1 of 2 predictions have no output \(the first: t\.jsonl:2\), which chrf, mcc need",
    ):
        score(rows(("x", "x"), (None, "y")), ["nll", "chrf", "mcc"])


def test_unknown_metric_names_the_nearest_and_all():
    with pytest.raises(
        ConfigError,
        match=r"unknown metric 'exact-match'; did you mean 'exact_match'\? Known: nll, .*mcc",
    ):
        score(rows(("x", "x")), ["exact-match"])
    with pytest.raises(ConfigError, match="unknown metric 'zzz'; known: accuracy, "):
        needs_generation(["zzz"])


def test_what_cannot_be_scored_is_named():
    with pytest.raises(DataError, match="no predictions to score by nll, bleu"):
        score([], ["nll", "bleu"])
    with pytest.raises(
        DataError,
        match=r"t\.jsonl:1: nll needs a finite sum over at least one answer token, got 0.0 over 0",
    ):
        score(rows(("", ""), nll=(0.0, 0)), ["nll"])
    with pytest.raises(DataError, match="got nan over 4"):
        score(rows(("x", "x"), nll=(math.nan, 4)), ["nll"])


def test_a_draw_without_a_rare_class_averages_over_the_classes_it_has():
    # Recalls 8/9 and 1: a draw without the rare class has the recall of the nine a's alone.
    found = score(
        rows(*[("a", "a")] * 8, ("b", "a"), ("rare", "rare")), ["balanced_accuracy"], draws=2000
    )[0]
    assert found.value == pytest.approx((8 / 9 + 1) / 2)
    assert found.high == 1
    assert (
        found.low > 0.5
    )  # a missing class that counted as recall 0 would bring a third of the draws below


def test_where_nothing_varies_there_is_no_interval():
    for pairs in (
        [("a", "a"), ("a", "b")] * 10,
        [*[("a", "a")] * 52, *[("a", "b")] * 8],
    ):  # one of two labels, always
        for metric, value in (("balanced_accuracy", 0.5), ("mcc", 0.0)):
            found = score(rows(*pairs), [metric], draws=2000)[
                0
            ]  # the rare draw without any b has 1.0
            assert found.value == value
            assert np.isnan([found.low, found.high]).all()
