"""Corner cases that an independent writer of tests found: each was wrong once."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fulcrum import api
from fulcrum.config.arms import chosen_arms, own_arm
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import settings_from_dict
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.data import run_data
from fulcrum.experiments import finished, preview
from fulcrum.experiments.compare import run_comparison
from helpers.cells import made, row
from helpers.comparisons import Counting, settings, written
from helpers.comparisons import _own_arrow_cache as _own_arrow_cache
from helpers.comparisons import place as place
from helpers.rival_gradients import compare_gradients
from helpers.tiny import CONTEXT, load_tiny, tiny_tokenizer, write_rows


def test_tasks_of_unlike_numbers_of_groups_lose_no_dev_row() -> None:
    """Two groups beside six: each row of both tasks is judged once."""
    few = replace(
        made().tasks[0], name="few", train=tuple(row("few", k, group=f"g{k % 2}") for k in range(6))
    )
    folds = replace(made(), tasks=(few, made().tasks[0])).folds(3, 0)
    for k, task in enumerate((few, made().tasks[0])):
        dev = [example.origin for fold in folds for example in fold.tasks[k].dev]
        assert sorted(dev) == sorted(example.origin for example in task.train)


def test_the_gradient_with_the_distance_where_the_head_is_adapted_too(tmp_path: Path) -> None:
    compare_gradients(load_tiny(tmp_path), ("q_proj", "down_proj", "lm_head"))


def test_the_cap_is_that_of_the_size_at_which_arms_are_compared(
    place: Path, tmp_path: Path
) -> None:
    found = run_comparison(
        settings(place, tmp_path / "r", compare={"arms": ["sft", "tell"], "sizes": [4]})
    )
    assert found.step_cap == 3  # 4 rows and 8 general ones, 4 a step, though there are 9 rows


@pytest.mark.e2e
@pytest.mark.parametrize(
    "train", [{"use_rslora": True}, {"lora_target_modules": ["q_proj"]}, {"use_dora": True}]
)
def test_an_adapter_with_settings_of_its_own_scores_as_it_was_scored(
    place: Path, tmp_path: Path, train: dict
) -> None:
    given = written(
        place, tmp_path, ["sft", {"name": "mine", "train": train}], compare={"sft_epochs": [1]}
    )
    result = next(arm for arm in run_comparison(given).arms if arm.arm == "mine")
    (score,), _ = api.evaluate(tmp_path / "r", arm="mine")
    assert score.value == pytest.approx(result.scores["task"][0].value, rel=1e-6)


@pytest.mark.e2e
def test_no_arm_of_a_file_takes_more_steps_than_tell(place: Path, tmp_path: Path) -> None:
    given = written(place, tmp_path, ["tell", "sft", {"name": "mine", "train": {"batch_size": 2}}])
    found = run_comparison(given)
    assert max(arm.training.steps for arm in found.arms) <= found.step_cap == 7


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            [{"name": "a", "generl": "pool"}],
            r"unknown setting 'compare\.arms\[1\]\.generl'; did you mean '[^']*general'",
        ),
        (
            [{"name": "a", "train": {"learning_rat": 1}}],
            r"compare\.arms\[1\]: a: train: unknown setting 'learning_rat'; did you mean "
            r"'train\.learning_rate'",
        ),
        (
            [{"name": "a", "train": {"learning_rate": "fast"}}],
            r"compare\.arms\[1\].*learning_rate: expected a number",
        ),
        ([{"name": "A b"}], r"compare\.arms\[1\]\.name: .*\(got 'A b'\)"),
        ([{"general": "pool"}], r"'compare\.arms\[1\]\.name' is missing"),
        (
            [{"name": "a", "general": "pol"}],
            r"compare\.arms\[1\]\.general: expected 'none', 'pool'.* \(got 'pol'\)",
        ),
        (
            [{"name": "a", "members": 0}],
            r"compare\.arms\[1\]\.members: must be at least 1 \(got 0\)",
        ),
        (
            [5],
            r"compare\.arms\[1\]: expected an arm's name, or a mapping that describes one .* "
            r"\(got 5\)",
        ),
        (
            [{"name": "a", "order": "random"}],
            r"a: without general rows \(general: pool\) there is no pool, order or ratio to set",
        ),
        (
            [{"name": "a", "pool": "x.jsonl"}],
            r"a: without general rows \(general: pool\) there is no pool",
        ),
        ([{"name": "a", "task_rows": False}], r"a: without general rows \(general: pool\)"),
        (
            [{"name": "a", "trained": False, "kl": True}],
            r"a: is not trained \(trained: false\), so nothing of training can be",
        ),
        (
            [{"name": "a", "trained": False, "general": "pool"}],
            r"a: is not trained \(trained: false\), so nothing of training",
        ),
        (
            [{"name": "a", "trained": False, "train": {"lora_r": 2}}],
            r"a: is not trained \(trained: false\)",
        ),
        (
            [{"name": "a", "words": True}],
            r"unknown setting 'compare\.arms\[1\]\.words'; it is called 'tfidf' now",
        ),
        (
            [{"name": "a", "shots": True}],
            r"unknown setting 'compare\.arms\[1\]\.shots'; it is called 'few_shot' now",
        ),
        (
            [{"name": "a", "settings_of": "sft"}],
            r"\.settings_of'; it is called 'hyperparameters_of' now",
        ),
        ([{"name": "a", "colour": "red"}], r"unknown setting 'compare\.arms\[1\]\.colour'"),
        ([{"name": "a", "tfidf": True}], r"\ba: "),  # no language model, and trained
        (
            [{"name": "a", "few_shot": True}],
            r"\ba: ",
        ),  # rows in the prompt instead of training, and trained
        ([{"name": "a", "trained": False, "few_shot": True, "tfidf": True}], r"\ba: "),
    ],
)
def test_a_wrong_arm_of_a_file_is_named(own: list[Any], message: str) -> None:
    data = {
        "task": {"train": "rows.jsonl", "anchor": "Name it.", "metrics": ["accuracy"]},
        "compare": {"arms": ["sft", *own]},
    }

    def asked() -> list[Arm]:
        return chosen_arms(settings_from_dict(data))

    with pytest.raises(ConfigError, match=message):
        asked()


def test_a_rare_label_outside_a_folds_training_rows_ends_nothing(
    place: Path, tmp_path: Path
) -> None:
    """One row of four has the second label: in the fold where it is judged no row to train on has
    it."""
    train = write_rows(
        tmp_path / "train.jsonl", [("a a", "red"), ("b b", "red"), ("c c", "red"), ("d d", "blue")]
    )
    dev = write_rows(tmp_path / "dev.jsonl", [("e e", "red")])
    changes = {"task__train": train, "task__dev": dev, "task__metrics": ["nll", "accuracy"]}
    given = settings(place, tmp_path / "r", compare={"arms": ["tfidf", "base"]}, **changes)
    assert [arm.arm for arm in run_comparison(given).arms] == ["tfidf", "base"]


def test_forgetting_is_measured_against_the_untouched_model_whatever_stands_first(
    place: Path, tmp_path: Path
) -> None:
    """The first arm has no language model: it forgets nothing, and nothing is measured against
    it."""
    compare = {"arms": ["tfidf", "base", "sft"], "sft_epochs": [1]}
    changes = {"task__metrics": ["nll", "accuracy"], "eval__general_rows": 2}
    found = run_comparison(settings(place, tmp_path / "r", compare=compare, **changes))
    assert {(d.arm, d.reference) for d in found.forgetting} == {("sft", "base")}
    page = (tmp_path / "r" / "report.html").read_text()
    assert "The dashed line is base, the untrained model" in page
    assert "above base, the untrained model" in page
    assert "tfidf, the untrained model" not in page


def test_an_average_of_weight_decomposed_adapters_is_refused_before_training(
    place: Path, tmp_path: Path
) -> None:
    """Their magnitudes cannot be stacked."""
    progress = Counting()
    given = settings(
        place,
        tmp_path / "r",
        compare={"arms": ["soup", "sft"], "sft_epochs": [1]},
        train__use_dora=True,
    )
    with pytest.raises(ConfigError, match="soup"):
        run_comparison(given, progress=progress)
    assert progress.steps == 0


@pytest.mark.e2e
def test_training_on_general_rows_alone_is_an_arm(place: Path, tmp_path: Path) -> None:
    alone = {"name": "general_only", "anchored": True, "general": "pool", "task_rows": False}
    found = run_comparison(
        settings(place, tmp_path / "r", compare={"arms": ["sft", "tell", alone]})
    )
    share = next(arm.training.share for arm in found.arms if arm.arm == "general_only")
    assert (share.task_examples, share.general_examples) == (0, 18)
    assert ("tell", "general_only") in {(d.arm, d.reference) for d in found.differences}


def test_untrained_arms_alone_are_references_too(place: Path, tmp_path: Path) -> None:
    found = run_comparison(settings(place, tmp_path / "r", compare={"arms": ["base", "tell"]}))
    assert {(d.arm, d.reference) for d in found.differences} == {("tell", "base")}


def test_rows_beyond_the_size_that_was_trained_on_may_be_scored(
    place: Path, tmp_path: Path
) -> None:
    given = settings(place, tmp_path / "r", compare={"arms": ["base", "sft"], "sizes": [4]})
    run_comparison(given)
    (task,) = run_data.prepare(given, tiny_tokenizer(), CONTEXT, 0, dev_apart=False).tasks
    parts = {"own": task.train[:4], "rest": task.train[4:]}
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", [(e.question, e.answer) for e in part])
        for name, part in parts.items()
    }
    with pytest.raises(DataError, match="4 of 4 given rows have content of the task training rows"):
        finished.evaluate(tmp_path / "r", data=files["own"])
    assert len(finished.evaluate(tmp_path / "r", data=files["rest"]).predictions) == 5


def test_a_size_given_twice_for_one_arm_is_refused() -> None:
    data = {"task": {"train": "rows.jsonl"}, "compare": {"sizes_of": {"sft": [6, 4, 6]}}}
    with pytest.raises(ConfigError, match=r"compare\.sizes_of: .*6 is listed twice"):
        settings_from_dict(data)


def test_sizes_of_a_comparison_are_none_of_a_single_run(place: Path, tmp_path: Path) -> None:
    """`train`, `check` and `mix` use all training rows, whatever `compare.sizes` says."""
    seen = preview.open_preview(settings(place, tmp_path / "r", compare={"sizes": [4]}), 0)
    (trial,) = preview.trials(seen, [own_arm(seen.settings)])
    assert (trial.share.task_examples, trial.share.general_examples, trial.steps) == (6, 12, 5)
