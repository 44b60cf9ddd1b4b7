"""Whole comparisons on a tiny model: sizes, which cells there are, arms of a file's own, rivals,
and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fulcrum import api
from fulcrum.config.arms import chosen_arms
from fulcrum.config.experiments import Arm
from fulcrum.config.settings import load_settings, settings_from_dict
from fulcrum.core import store
from fulcrum.core.errors import ConfigError, DataError
from fulcrum.core.types import Results
from fulcrum.data import run_data
from fulcrum.experiments import baselines
from fulcrum.experiments.compare import run_comparison
from fulcrum.report import run_report, summary
from helpers.comparisons import Counting, settings, written
from helpers.comparisons import _own_arrow_cache as _own_arrow_cache
from helpers.comparisons import place as place
from helpers.runs import KillAfter, Killed, lines
from helpers.tiny import CONTEXT, WORDS, tiny_tokenizer, write_rows

MINE = {
    "name": "mine",
    "general": "pool",
    "order": "random",
    "anchored": True,
    "train": {"learning_rate": 0.001},
}


def cells(folder: Path) -> set[str]:
    return {file.stem for file in (folder / "cells").iterdir()}


# Sizes, and where settings are chosen.


@pytest.mark.e2e
@pytest.mark.parametrize("tune", ["first", "each"])
def test_settings_are_chosen_once_or_for_each_seed(place: Path, tmp_path: Path, tune: str) -> None:
    compare = {
        "arms": ["base", "sft"],
        "seeds": [5, 2],
        "sizes": [4, 6],
        "sft_epochs": [1, 2],
        "tune": tune,
    }
    found = run_comparison(settings(place, tmp_path / "r", compare=compare))
    tried_at = (5, 2) if tune == "each" else (5,)
    trials = {
        f"sft-{size}-seed{seed}-repeats{n}" for size in (4, 6) for seed in tried_at for n in (1, 2)
    }
    finals = {f"sft-{size}-seed{seed}" for size in (4, 6) for seed in (5, 2)}
    assert cells(tmp_path / "r") == {"base-0-seed5-repeats1", "base-0-seed5"} | trials | finals
    tried = {(arm.size, arm.seed): arm.tried for arm in found.arms if arm.arm == "sft"}
    assert all(len(each) == 2 for each in tried.values())
    for size in (4, 6):
        assert (tried[size, 5] == tried[size, 2]) == (tune == "first")
    assert found.size == 6
    assert {(d.arm, d.reference, d.n_seeds) for d in found.differences} == {("sft", "base", 2)}
    assert not list(
        (tmp_path / "r").glob("**/certificate.json")
    )  # no arm has general rows: nothing is asked


def test_an_arm_may_have_sizes_of_its_own(place: Path, tmp_path: Path) -> None:
    compare = {
        "arms": ["base", "sft", "tell"],
        "sizes": [6],
        "sizes_of": {"sft": [8, 4, 6]},
        "sft_epochs": [1],
    }
    found = run_comparison(settings(place, tmp_path / "r", compare=compare))
    assert sorted((arm.arm, arm.size) for arm in found.arms) == [
        ("base", 0),
        ("sft", 4),
        ("sft", 6),
        ("sft", 8),
        ("tell", 6),
    ]
    assert found.size == 6  # the most that an arm with general rows had
    shown = run_report.load(tmp_path / "r")
    assert {name: len(arm) for name, arm in summary.by_arm(shown).items()} == {
        "base": 1,
        "sft": 1,
        "tell": 1,
    }
    steps = {(arm.arm, arm.size): arm.training.steps for arm in found.arms if arm.training}
    assert steps == {
        ("sft", 4): 1,
        ("sft", 6): 2,
        ("sft", 8): 2,
        ("tell", 6): 5,
    }  # 6 rows and 12 general ones, 4 a step
    points = json.loads((tmp_path / "r" / "certificate.json").read_text())["answers"][0]["points"]
    assert sorted((point["arm"], point["size"]) for point in points) == sorted(
        (a.arm, a.size) for a in found.arms
    )
    streams = {(row["arm"], row["size"]) for row in lines(tmp_path / "r" / "predictions.jsonl")}
    assert streams == {(arm.arm, arm.size) for arm in found.arms}


@pytest.mark.e2e
def test_a_killed_comparison_by_sizes_goes_on_to_the_same_certificate(
    place: Path, tmp_path: Path
) -> None:
    """Killed in the middle of its trials, and once more in its last training."""
    compare = {
        "arms": ["base_anchor", "kshot", "sft", "tell"],
        "sizes": [4, 6],
        "sft_epochs": [1, 2],
    }
    changes = {
        "compare": compare,
        "task__metrics": ["nll", "accuracy"],
        "train__lora_dropout": 0.1,
        "eval__general_rows": 2,
    }
    counting = Counting()
    run_comparison(settings(place, tmp_path / "whole", **changes), progress=counting)
    files = [
        path.relative_to(tmp_path / "whole")
        for path in sorted((tmp_path / "whole").rglob("*"))
        if path.is_file()
    ]
    proof = [name for name in files if name.name in ("certificate.json", "outcomes.jsonl")]
    assert [str(name) for name in proof] == ["certificate.json", "outcomes.jsonl"]
    kept = [
        name for name in files if name.name in ("adapter_model.safetensors", "predictions.jsonl")
    ]
    assert len(kept) == 3
    folder = tmp_path / "killed"
    third = counting.steps // 3
    for steps, resume in ((third, False), (counting.steps - third, True)):
        with pytest.raises(Killed):
            run_comparison(
                settings(place, folder, **changes), resume=resume, progress=KillAfter(steps)
            )
        assert not (folder / "certificate.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}
    assert before
    run_comparison(settings(place, folder, **changes), resume=True)
    assert (
        before.items()
        <= {path: path.stat().st_mtime_ns for path in (folder / "cells").iterdir()}.items()
    )
    assert cells(folder) == cells(tmp_path / "whole")
    for name in (*proof, *kept):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("compare", "kind", "message"),
    [
        (
            {"sizes": [4, 10]},
            DataError,
            r"compare\.sizes: 10 rows are asked for, task has 9 \(train and dev together\); lower",
        ),
        (
            {"sizes_of": {"sft": [12]}},
            DataError,
            r"compare\.sizes: 12 rows are asked for, task has 9",
        ),
        (
            {"sizes_of": {"stf": [4]}},
            ConfigError,
            r"compare\.sizes_of: 'stf' is not among compare\.arms; did you mean 'sft'",
        ),
        (
            {"sizes": [3]},
            ConfigError,
            r"compare\.sizes: 3 rows cannot be cut into folds; use 4 or more",
        ),
        (
            {"sizes_of": {"sft": [8, 2]}},
            ConfigError,
            r"compare\.sizes_of: 2 rows cannot be cut into folds; use 4 or more",
        ),
        ({"sizes": [6, 4, 6]}, ConfigError, r"compare\.sizes: 6 is listed twice"),
        (
            {"sizes": [4, 6], "sft_epochs": [4]},
            ConfigError,
            r"4 epochs of \d rows are over TELL's \d steps; use at most 3",
        ),
    ],
)
def test_sizes_that_cannot_be_are_refused_before_training(
    place: Path, tmp_path: Path, compare: dict, kind: type[Exception], message: str
) -> None:
    progress = Counting()

    def asked() -> Results:
        given = settings(place, tmp_path / "r", compare={"arms": ["sft", "tell"], **compare})
        return run_comparison(given, progress=progress)

    with pytest.raises(kind, match=message):
        asked()
    assert progress.steps == 0
    assert not (tmp_path / "r").exists()


@pytest.mark.e2e
def test_an_arm_of_a_file_runs_and_is_set_against_sft(place: Path, tmp_path: Path) -> None:
    other = {"name": "other", "general": "pool", "pool": str(place / "other.jsonl")}
    given = written(place, tmp_path, ["sft", MINE, other])
    rows = run_data.prepare(given, tiny_tokenizer(), CONTEXT, 0, dev_apart=False)
    assert {row.origin.partition(":")[0] for row in rows.own_general["other"]} == {
        str(place / "other.jsonl")
    }
    assert len(rows.own_general["other"]) == len(rows.general) == 18
    found = {arm.arm: arm for arm in run_comparison(given).arms}
    assert list(found) == ["sft", "mine", "other"]
    for name in ("mine", "other"):
        share = found[name].training.share
        assert (share.task_examples, share.general_examples) == (9, 18)
    assert max(point.learning_rate for point in found["mine"].training.history) == 0.001
    assert max(point.learning_rate for point in found["other"].training.history) == 0.01
    shown = run_report.load(tmp_path / "r")
    assert {(d["arm"], d["reference"]) for d in shown["differences"]} == {
        ("mine", "sft"),
        ("other", "sft"),
    }
    for name, anchor in (("mine", "Name it."), ("other", None)):
        adapter = api.load_adapter(tmp_path / "r", arm=name)
        assert (adapter.arm, adapter.anchor() and adapter.anchor().text) == (name, anchor)
    assert load_settings(tmp_path / "r" / "config.yaml").compare == given.compare


@pytest.mark.parametrize("train", [{"lora_r": 2}, {"lora_alpha": 20.0}])
def test_an_adapter_with_settings_of_its_own_scores_as_it_was_scored(
    place: Path, tmp_path: Path, train: dict
) -> None:
    given = written(
        place, tmp_path, ["sft", {"name": "mine", "train": train}], compare={"sft_epochs": [1]}
    )
    result = next(arm for arm in run_comparison(given).arms if arm.arm == "mine")
    (score,), _ = api.evaluate(tmp_path / "r", arm="mine")
    assert score.value == pytest.approx(result.scores["task"][0].value, rel=1e-6)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            [{"name": "tell", "general": "pool"}],
            r"compare\.arms: 'tell' is an arm that is there already; give yours another",
        ),
        (["mix", {"name": "mix"}], r"compare\.arms: 'mix' is listed twice"),
        ([{"name": "a"}, {"name": "a", "anchored": True}], r"compare\.arms: 'a' is listed twice"),
        (["mien", MINE], r"compare\.arms: no arm 'mien'; did you mean 'mine'"),
    ],
)
def test_two_arms_of_one_name_are_refused(own: list[Any], message: str) -> None:
    data = {
        "task": {"train": "rows.jsonl", "anchor": "Name it."},
        "compare": {"arms": ["sft", *own]},
    }

    def asked() -> list[Arm]:
        return chosen_arms(settings_from_dict(data))

    with pytest.raises(ConfigError, match=message):
        asked()


def test_a_pool_that_is_too_small_for_its_arm_is_named(place: Path, tmp_path: Path) -> None:
    small = write_rows(tmp_path / "small.jsonl", [(f"sing {word}", "la") for word in WORDS[:5]])
    given = written(place, tmp_path, ["sft", {"name": "other", "general": "pool", "pool": small}])
    with pytest.raises(
        DataError,
        match=(
            r"^compare\.arms: other: the mix needs 18 general rows, its pool has 5 "
            r"usable \(of 5\)"
        ),
    ):
        run_comparison(given)


# Rivals.


@pytest.fixture(scope="module")
def rivals(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Results]:
    folder = tmp_path_factory.mktemp("runs") / "rivals"
    names = ["tfidf", "base", "sft", "tell", "soup", "sft_kl"]
    metrics = ["nll", "accuracy", "exact_match"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", place / "arrow")
        found = run_comparison(
            settings(
                place,
                folder,
                compare={"arms": names, "sft_epochs": [1]},
                task__metrics=metrics,
                eval__general_rows=2,
            )
        )
    return folder, found


@pytest.mark.e2e
def test_words_alone_are_an_arm_of_a_task_of_labels(
    place: Path, rivals: tuple[Path, Results]
) -> None:
    folder, results = rivals
    found = next(arm for arm in results.arms if arm.arm == "tfidf")
    assert (found.size, found.training, len(found.tried), found.general_nll) == (9, None, 1, {})
    rows = {
        row["origin"]: row for row in lines(folder / "predictions.jsonl") if row["arm"] == "tfidf"
    }
    (task,) = run_data.prepare(
        load_settings(folder / "config.yaml"), tiny_tokenizer(), CONTEXT, 0, dev_apart=False
    ).tasks
    expected, nats = baselines.classify(task.train, task.test)
    assert [rows[example.origin]["output"] for example in task.test] == expected
    assert [rows[example.origin]["nll_sum"] for example in task.test] == pytest.approx(
        nats.tolist()
    )
    tokens = {
        row["origin"]: row["n_tokens"]
        for row in lines(folder / "predictions.jsonl")
        if row["arm"] == "sft"
    }
    assert {origin: row["n_tokens"] for origin, row in rows.items()}.items() <= tokens.items()
    assert {d.reference for d in results.differences if d.arm == "tell"} == {
        "tfidf",
        "base",
        "sft",
        "soup",
        "sft_kl",
    }
    certificate = store.read_json(folder / "certificate.json")
    assert set(certificate["question"]["references"]) == {"tfidf", "base", "sft", "soup", "sft_kl"}


def test_words_alone_are_refused_where_answers_are_no_labels(place: Path, tmp_path: Path) -> None:
    message = (
        r"compare\.arms: tfidf is for answers that are labels, and task has no metric of labels "
        r"\(accuracy, balanced_accu"
    )
    with pytest.raises(ConfigError, match=message):
        run_comparison(settings(place, tmp_path / "r", compare={"arms": ["tfidf", "sft"]}))


@pytest.mark.e2e
def test_a_saved_average_answers_as_predicted(rivals: tuple[Path, Results]) -> None:
    folder, results = rivals
    rows = [
        row
        for row in lines(folder / "predictions.jsonl")
        if (row["arm"], row["task"]) == ("soup", "task")
    ]
    adapter = api.load_adapter(folder, arm="soup")
    assert adapter.answer([row["prompt"] for row in rows]) == [row["output"] for row in rows]
    scores, _ = api.evaluate(folder, arm="soup", metric_names=["nll"])
    known = next(arm for arm in results.arms if arm.arm == "soup").scores["task"][0]
    assert scores[0].value == pytest.approx(known.value, rel=1e-6)
    assert json.loads((folder / "adapters" / "soup" / "adapter_config.json").read_text())["r"] == 12
