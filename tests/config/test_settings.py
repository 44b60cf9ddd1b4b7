"""Settings are read as they are meant, or refused with the key, the value and the nearest
remedy."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from fulcrum.config import parsing
from fulcrum.config.settings import Settings, dump_settings, load_settings, settings_from_dict
from fulcrum.core.errors import ConfigError
from fulcrum.core.types import Anchor

TASK = {"train": "tickets.jsonl"}


def settings(**changes: object) -> Settings:
    return settings_from_dict({"task": TASK, **changes})


def test_the_shortest_file_has_the_documented_defaults() -> None:
    found = settings()
    assert found.model == "smollm2-135m-instruct"
    assert [source.path for source in found.general] == ["builtin"]
    assert (found.mix.general_per_task, found.mix.unit, found.mix.order) == (
        4.0,
        "examples",
        "auto",
    )
    assert found.mix.candidates == (1, 2, 4, 8)
    assert (
        found.train.learning_rate,
        found.train.lora_r,
        found.train.lora_alpha,
        found.train.batch_size,
    ) == (5e-4, 16, 32, 8)
    assert found.tasks[0].metrics == ("nll", "exact_match")
    assert not found.trust_remote_code


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: folder\n"
        "task:\n  train: [a.jsonl, {path: b.csv, columns: {prompt: text}, limit: 5}]\n  "
        "anchor: Sort.\n"
        "general:\n  - path: builtin\n  - org/name\n"
        "mix: {general_per_task: 2, repeats: 3}\ntrain: {learning_rate: 5.0e-4}\noutput_dir: "
        "runs/x\n"
    )
    found = load_settings(file)
    assert [(s.path, s.limit) for s in found.tasks[0].train] == [("a.jsonl", None), ("b.csv", 5)]
    assert [s.path for s in found.general] == ["builtin", "org/name"]
    assert found.tasks[0].anchor_value() == Anchor("Sort.", "user_prefix")
    assert found.mix.candidates == (3,)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, None),
        ("none", None),
        ("Sort.", Anchor("Sort.")),
        ({"text": "Sort.", "placement": "system"}, Anchor("Sort.", "system")),
        (Anchor("Sort.", "response_prefix"), Anchor("Sort.", "response_prefix")),
    ],
)
def test_an_anchor_is_text_or_both_or_none(given: object, expected: Anchor | None) -> None:
    assert settings(task={**TASK, "anchor": given}).tasks[0].anchor_value() == expected


def test_names_of_other_trainers_are_understood() -> None:
    found = settings(
        model_name_or_path="m",
        lr=1e-3,
        num_train_epochs=3,
        **{"per-device-train-batch-size": 4},
        cutoff_len=256,
        lora_rank=8,
    )
    assert (found.model, found.train.learning_rate, found.mix.repeats) == ("m", 1e-3, 3)
    assert (found.train.batch_size, found.train.max_length, found.train.lora_r) == (4, 256, 8)


@pytest.mark.parametrize(
    "names",
    [("lora_r", "train", "max_new_tokens", "task"), ("task", "max_new_tokens", "train", "lora_r")],
)
def test_an_alias_joins_the_section_that_is_given(names: tuple[str, ...]) -> None:
    given = {"task": TASK, "train": {"batch_size": 2}, "lora_r": 8, "max_new_tokens": 9}
    found = settings_from_dict({name: given[name] for name in names})
    assert (found.train.batch_size, found.train.lora_r) == (2, 8)
    assert (found.tasks[0].max_new_tokens, found.tasks[0].train[0].path) == (9, "tickets.jsonl")


def test_settings_given_are_not_changed() -> None:
    given = {"task": dict(TASK), "train": {"batch_size": 2}, "lora_r": 8, "max_new_tokens": 9}
    settings_from_dict(given)
    assert given == {"task": TASK, "train": {"batch_size": 2}, "lora_r": 8, "max_new_tokens": 9}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "settings: no `task:` section; write one, or start from `fulcrum init DATA_FILE`"),
        ({"task": TASK, "tasks": [TASK]}, "both `task` and `tasks` are given"),
        ({"task": {}}, r"'task\.train' is missing"),
        ({"task": TASK, "modle": "x"}, r"unknown setting 'modle'; did you mean .*'model'"),
        (
            {"task": {**TASK, "achor": "x"}},
            r"unknown setting 'task\.achor'; did you mean 'task\.anchor'",
        ),
        (
            {"task": TASK, "train": {"learning_rat": 1}},
            r"unknown setting 'train\.learning_rat'; did you mean 'train\.learning_rate'",
        ),
        (
            {"task": TASK, "general": [{"pth": "x"}]},
            r"unknown setting 'general\[0\]\.pth'; did you mean 'general\[0\]\.path'",
        ),
        (
            {"task": {**TASK, "anchor": {"text": "x", "place": "system"}}},
            r"unknown setting 'task\.anchor\.place'; did you mean 'task\.anchor\.placement'",
        ),
        (
            {"task": {**TASK, "anchor": {"text": "x", "placement": "middle"}}},
            r"task\.anchor\.placement: .*'system'.*got 'middle'",
        ),
        ({"task": {**TASK, "anchor": ""}}, r"task\.anchor\.text: must not be empty"),
        (
            {"task": {**TASK, "anchor": " \u200b"}},
            r"task\.anchor\.text: an anchor needs words, ' \\u200b' shows none",
        ),
        (
            {"task": TASK, "mix": {"repeats": 0}},
            r"mix\.repeats: repeats is 0; every task row must be shown at least once",
        ),
        (
            {"task": TASK, "mix": {"repeats": "some"}},
            r"^settings: mix\.repeats: expected a whole number or 'auto' \(got 'some'\)$",
        ),
        (
            {"task": TASK, "mix": {"repeats": True}},
            r"mix\.repeats: takes no truth value .*yes, no, on and off.*got True",
        ),
        ({"task": TASK, "compare": {"seeds": [1, True]}}, r"compare\.seeds: takes no truth value"),
        (
            {"task": TASK, "train": {"use_dora": "x"}},
            r"train\.use_dora: expected true or false \(got 'x'\)",
        ),
        (
            {"task": TASK, "train": {"learning_rate": float("inf")}},
            r"train\.learning_rate: expected a finite number \(got inf\)",
        ),
        (
            {"task": TASK, "train": {"lora_target_modules": 5}},
            r"train\.lora_target_modules: expected a text or a list \(got 5\)",
        ),
        (
            {"task": TASK, "compare": {"seeds": [0, "x"]}},
            r"compare\.seeds\[1\]: expected a whole number \(got 'x'\)",
        ),
        ({"task": TASK, "output_dir": None}, r"output_dir: expected a text \(got nothing\)"),
        ({"task": TASK, "output_dir": ""}, r"output_dir: must not be empty \(got nothing\)"),
        ({"task": {"train": []}}, r"task\.train: needs at least 1 entry \(got nothing\)"),
        ({"task": {"train": None}}, r"task\.train: needs at least 1 entry"),
        (
            {"task": {"trian": "a.jsonl"}},
            r"unknown setting 'task\.trian'; did you mean 'task\.train'",
        ),
        (
            {"task": TASK, "train": {"lr": 1}},
            r"unknown setting 'train\.lr'; did you mean 'train\.learning_rate'\?",
        ),
        (
            {"task": TASK, "train": {"repeats": 1}},
            r"unknown setting 'train\.repeats'; did you mean 'mix\.repeats' or "
            r"'compare\.arms\.repeats' or 'scale\.repeats'\?",
        ),
        (
            {"task": TASK, "metrics": "nll"},
            r"unknown setting 'metrics'; did you mean 'task\.metrics'\?",
        ),
        (
            {"task": TASK, "learnin_rate": 1},
            r"unknown setting 'learnin_rate'; did you mean 'train\.learning_rate'",
        ),
        (
            {"task": TASK, "eval": {"zzz": 1}},
            r"unknown setting 'eval\.zzz'; known: anchored, batch_tokens, draws, general_rows$",
        ),
        (
            {"tasks": [TASK, {**TASK, "name": "b", "dev_limit": 0}]},
            r"tasks\[1\]\.dev_limit: must be at least 1 \(got 0\)",
        ),
        (
            {"task": {"train": {"path": "a", "columns": {"prompt": 5}}}},
            r"task\.train\[0\]\.columns: expected a text \(got 5\)",
        ),
        (
            {"task": TASK, "mix": {"order": "sorted"}},
            r"mix\.order: .*'epoch_stratified'.*got 'sorted'",
        ),
        (
            {"task": TASK, "mix": {"general_per_task": -1}},
            r"mix\.general_per_task: must be at least 0 \(got -1\)",
        ),
        (
            {"task": TASK, "train": {"learning_rate": "fast"}},
            r"train\.learning_rate: .*number.*got 'fast'",
        ),
        ({"task": TASK, "train": {"batch_size": 1.5}}, r"train\.batch_size: .*got 1\.5"),
        (
            {"task": TASK, "train": 5},
            r"train: expected a mapping with learning_rate, batch_size, .*\(got 5\)",
        ),
        (
            {"task": "a.jsonl"},
            r"task is a mapping: write `task: \{train: a\.jsonl\}` \(got 'a\.jsonl'\)",
        ),
        (
            {"tasks": [{**TASK, "name": "a"}, {**TASK, "name": "a"}]},
            r"tasks need different names, got \['a', 'a'\]; set tasks\[i\]\.name",
        ),
        ({"task": TASK, "compare": {"seeds": []}}, r"compare\.seeds: .*at least 1"),
        (
            {"task": TASK, "train": {"lora_r": 8}, "lora_rank": 4},
            r"'lora_rank' and 'train\.lora_r' .* are both given; keep one",
        ),
        (
            {"task": TASK, "base_model": "a", "model_name_or_path": "b"},
            r"and 'model' .* are both given; keep one",
        ),
    ],
)
def test_a_wrong_setting_is_named(data: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings_from_dict(data)


@pytest.mark.parametrize("name", ["../up", "a/b", "", ".", "a\0b", "default"])
def test_a_task_name_must_do_for_a_file(name: str) -> None:
    with pytest.raises(ConfigError, match=r"task\.name"):
        settings(task={**TASK, "name": name})


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("train.learning_rate=2e-4", ("train", "learning_rate"), 2e-4),
        ("lr=2e-4", ("train", "learning_rate"), 2e-4),
        ("mix.repeats=auto", ("mix", "repeats"), "auto"),
        ("output_dir=runs/a=b", ("output_dir",), "runs/a=b"),
        ("compare.seeds=[0, 1]", ("compare", "seeds"), (0, 1)),
        ("train.early_stopping_patience=null", ("train", "early_stopping_patience"), None),
        ("lora-r=4", ("train", "lora_r"), 4),
    ],
)
def test_flags_beat_the_file(
    tmp_path: Path, override: str, path: tuple[str, ...], expected: object
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: {train: a.jsonl}\nlearning_rate: 1.0\ncompare: {seeds: [5]}\n")
    found: object = load_settings(file, [override])
    for name in path:
        found = getattr(found, name)
    assert found == expected


def test_flags_reach_into_the_task(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: {train: a.jsonl}\n")
    assert load_settings(file, ["task.anchor=Sort.", "max_new_tokens=5"]).tasks[
        0
    ].anchor_value() == Anchor("Sort.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: [", r"run\.yaml:1:8: .*; a bracket is not closed"),
        ("task: 'a", r"run\.yaml:1:9: .*; a quote is not closed"),
        (
            "task:\n  train: a\n  anchor: Sort: this\n",
            r"run\.yaml:3:15: mapping values are not allowed here; put quotes around",
        ),
        ("task:\n\ttrain: a\n", r"run\.yaml:2:1: found character '\\t' .*; indent with spaces"),
        (
            "task: {train: a}\nmodel: @x\n",
            r"run\.yaml:2:8: .*; put quotes around a text that begins so",
        ),
        (
            "task: {train: a}\nmodel: *x\n",
            r"run\.yaml:2:8: .*; put quotes around a text that begins with \*",
        ),
        (
            "model: a\ntask: {train: a}\nmodel: b\n",
            r"run\.yaml:3:1: 'model' is given twice, first in line 1; keep one",
        ),
        (
            "task:\n  train: a\n  dev: b\n  train: c\n",
            r"run\.yaml:4:3: 'train' is given twice, first in line 2",
        ),
        ("- a\n", "expected a mapping of settings, found a list"),
        ("words", "expected a mapping of settings, found 'words'"),
        ("", "run.yaml: is empty; write settings with `fulcrum init DATA_FILE`"),
        ("# nothing\n", "run.yaml: is empty"),
        ("task: {train: a}\nmodel: a\x00b\n", "run.yaml: not readable as YAML: "),
        (
            "task: {train: a}\nmodel: !!python/object/apply:os.system [ls]\n",
            r"run\.yaml:2:8: could not determine a constructor",
        ),
    ],
)
def test_a_broken_file_says_so(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(tmp_path / "run.yaml")


def test_a_missing_file_and_a_broken_flag_say_so(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="no such settings file; write one with `fulcrum init DATA_FILE`"
    ):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="is a folder; give a settings file"):
        load_settings(tmp_path)
    (tmp_path / "run.yaml").write_text("task: {train: a}\nmodel: m\n")
    for flag in ("seed", "=3", " = 3"):
        with pytest.raises(
            ConfigError, match=r"expected key=value, e\.g\. --set train\.learning_rate=2e-4"
        ):
            load_settings(tmp_path / "run.yaml", [flag])
    with pytest.raises(
        ConfigError, match=r"^--set 'seed=\[1': value:1:3: .*a bracket is not closed"
    ):
        load_settings(tmp_path / "run.yaml", ["seed=[1"])
    with pytest.raises(ConfigError, match="'model' already holds 'm' and cannot take 'name'"):
        load_settings(tmp_path / "run.yaml", ["model.name=x"])


@pytest.mark.parametrize(
    "anchor", ["none", "é\nline", {"text": "x ", "placement": "response_prefix"}]
)
def test_what_is_dumped_is_loaded_again(tmp_path: Path, anchor: object) -> None:
    tasks = [
        {**TASK, "name": "a", "anchor": anchor, "dev": "d.csv"},
        {**TASK, "name": "b", "metrics": ["nll"]},
    ]
    before = settings_from_dict(
        {
            "tasks": tasks,
            "mix": {"repeats": 2},
            "train": {"lora_target_modules": ["q_proj", "v_proj"]},
        }
    )
    (tmp_path / "config.yaml").write_text(dump_settings(before))
    assert load_settings(tmp_path / "config.yaml") == before


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings().train.lora_r = 5


def test_a_wrong_flag_is_blamed_and_not_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("task: {train: a}\nmix: {order: random}\n")
    for flags, message in [
        (["lr=fast"], r"^--set 'lr=fast': train\.learning_rate: expected a number \(got 'fast'\)$"),
        (
            ["train.lr=1"],
            r"^--set 'train\.lr=1': unknown setting 'train\.lr'; did you mean "
            r"'train\.learning_rate'\?$",
        ),
        (["task.train=[]"], r"^--set 'task\.train=\[\]': task\.train: needs at least 1 entry"),
        (["output_dir="], r"^--set 'output_dir=': output_dir: expected a text \(got nothing\)$"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_settings(file, flags)
    with pytest.raises(ConfigError, match=r"^--output-dir: output_dir: must not be empty"):
        load_settings(file, ["seed=1"], {"output_dir": ""})
    assert load_settings(file, ["seed=1"], {"seed": 3}).seed == 3
    orders = "'auto', 'random', 'epoch_stratified', 'general_then_task' or 'task_then_general'"
    for order in ("sorted", "ramp", "systematic"):
        file.write_text(f"task: {{train: a}}\nmix: {{order: {order}}}\n")
        with pytest.raises(
            ConfigError, match=rf"^.*run\.yaml: mix\.order: expected {orders} \(got '{order}'\)$"
        ):
            load_settings(file, ["mix.repeats=1"])


def test_one_name_does_where_a_list_is_asked() -> None:
    found = settings(
        task={**TASK, "metrics": "json_fields"}, compare={"arms": "sft, tell", "seeds": 3}
    )
    assert (found.tasks[0].metrics, found.compare.arms, found.compare.seeds) == (
        ("json_fields",),
        ("sft", "tell"),
        (3,),
    )
    assert settings(train={"lora_target_modules": "q_proj"}).train.lora_target_modules == "q_proj"


def test_every_setting_is_described() -> None:
    def undescribed(section: type[BaseModel]) -> Iterator[str]:
        for name, field in section.model_fields.items():
            inner = parsing.section_in(field.annotation)
            if inner is not None:
                yield from undescribed(inner)
            elif not field.description:
                yield f"{section.__name__}.{name}"

    assert list(undescribed(Settings)) == []


def test_every_alias_leads_to_a_setting() -> None:
    assert set(parsing.ALIASES.values()) <= set(parsing.dotted_names(Settings))
