"""The report states what results.json holds, and nothing of the user's text can act in the page."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.core.types import (
    Difference,
    TaskFacts,
)
from fulcrum.report import run_report, summary
from fulcrum.report.run_kinds import COMPARE, TRAIN, Chapter, RunKind, kind_of
from fulcrum.report.summary import Record
from helpers.reports import (
    arm_result,
    folder_with,
    make,
    predictions,
)

EVIL = "<script>alert(1)</script>"


def terminal(results: dict, width: int = 240) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(*run_report.tables(results))
    return capture.get()


class TestHeadline:
    def test_a_gain_is_stated_against_the_best_arm_without_general_data(self):
        assert summary.headline(make()) == (
            "tell is better than sft_anchor by 0.115 nats per answer token (95% interval 0.030 "
            "to 0.200; n=60 test rows, "
            "one seed: differences between seeds are not covered)."
        )

    def test_an_interval_over_0_shows_no_gain_and_advises_sft(self):
        assert summary.headline(make(bounds=(-0.2, 0.04))) == (
            "No gain shown: tell's advantage over sft_anchor is 0.080 nats per answer token "
            "(95% interval −0.040 to 0.200; "
            "n=60 test rows, one seed: differences between seeds are not covered). Use SFT "
            "with the anchor."
        )

    def test_a_loss_is_said_plainly(self):
        assert summary.headline(make(seeds=(0, 1), bounds=(0.03, 0.2))) == (
            "tell is worse than sft_anchor by 0.115 nats per answer token (95% interval 0.030 "
            "to 0.200; n=60 test rows, "
            "2 seeds). Use SFT with the anchor."
        )

    def test_the_direction_of_the_metric_counts(self):
        results = make()
        for arm in results["arms"]:
            arm["scores"]["tickets"].reverse()  # exact_match first
        assert (
            "tell is better than sft_anchor by 0.115 in exact match (95% interval 0.030 to 0.200;"
            in summary.headline(results)
        )

    def test_an_unknown_interval_is_no_gain(self):
        results = make()
        for difference in results["differences"]:
            difference["low"] = difference["high"] = None
        assert summary.headline(results).startswith(
            "No gain shown: tell's advantage over sft_anchor is 0.115"
        )

    def test_the_arm_to_beat_is_the_one_best_on_dev_not_on_test(self):
        results = make()
        sft = next(arm for arm in results["arms"] if arm["arm"] == "sft")
        sft["tried"][sft["chosen"]]["dev_nll"] = 1.47  # sft_anchor has 1.48, and less on test
        assert summary.headline(results).startswith("tell is better than sft by 0.115")

    def test_an_untrained_model_that_wins_is_recommended(self):
        extra = Difference("tickets", "nll", "tell", "base_anchor", 0.4, 0.3, 0.5, 1, False)
        results = make(differences=(extra,))
        assert summary.headline(results).endswith("Use the base model with the anchor, untrained.")

    def test_every_task_has_its_say(self):
        text = summary.headline(make(tasks=("a", "b")))
        assert text.startswith("a: tell is better")
        assert " b: tell is better" in text

    def test_without_differences_the_scores_are_stated(self):
        text = summary.headline(make(kind="train", differences=()))
        assert text.startswith(
            "NLL in nats per answer token [95% interval]: base 2.310 [2.210, 2.410]; base_anchor"
        )
        assert text.endswith(
            "tell 1.260 [1.160, 1.360] (n=60 test rows, one seed: differences between seeds "
            "are not covered)."
        )
        assert "better" not in text

    def test_groups_are_named_where_they_are_fewer_than_rows(self):
        results = make()
        for arm in results["arms"]:
            arm["scores"]["tickets"][0]["n_groups"] = 20
        assert "n=60 test rows in 20 groups" in summary.headline(results)


class TestNumbers:
    def test_one_seed_keeps_the_bootstrap_interval(self):
        rows = {row[0]: row for row in summary.score_grid(make(), "tickets").rows}
        assert rows["tell"] == ("tell", "1.260 [1.160, 1.360]", "0.550 [0.450, 0.650]")

    @pytest.mark.parametrize("seeds", [(0,), (0, 1)])
    def test_forgetting_stands_as_stored_once_for_all_tasks(self, seeds):
        grid = summary.forgetting_grid(
            make(seeds=seeds)
        )  # paired over rows and seeds when it was stored
        rows = {row[0]: row[1:] for row in grid.rows}
        assert rows["tell"] == ("−0.020 [−0.050, 0.020]",)
        assert rows["sft"] == ("0.300 [0.270, 0.340]",)
        assert rows["base_anchor"] == ("0.000 [−0.030, 0.040]",)
        assert "base" not in rows

    def test_two_seeds_give_a_t_interval_for_trained_arms_only(self):
        rows = {row[0]: row for row in summary.score_grid(make(seeds=(0, 1)), "tickets").rows}
        # values 1.26 and 1.28: mean 1.27, standard error 0.01, t(1 df) = 12.706
        assert rows["tell"][1] == "1.270 [1.143, 1.397]"
        assert rows["base"][1] == "2.310 [2.210, 2.410]"

    def test_a_missing_value_is_a_dash_and_spoils_no_other(self):
        results = make()
        results["arms"][2]["scores"]["tickets"][0].update(value=None, low=None, high=None)
        grid = summary.score_grid(results, "tickets")
        assert grid.rows[2][1] == "–"
        assert grid.marks == ("base", "base", "", "", "", "best")

    def test_shares_steps_and_cost(self):
        for kind, best in (("train", "75"), ("compare", "120")):
            rows = {row[0]: row[1:] for row in summary.training_grid(make(kind=kind)).rows}
            assert rows["tell"] == ("20%", "8%", "3%", "192", "768", "4", best, "120", "110,000")
            assert "base" not in rows

    def test_cost_counts_every_trial_and_training_once(self):
        rows = {row[0]: row for row in summary.cost_grid(make(seeds=(0, 1))).rows}
        # Two seeds of two trials of 220,000 tokens and 100 s, and a training of 110,000 and 130 s.
        assert rows["tell"] == ("tell", "2", "4", "1,100,000", "0.440", "660")
        assert rows["base"] == ("base", "1", "1", "0", "0.000", "132")
        # `train` keeps what it tried: no training comes after its trials.
        assert summary.cost_grid(make(kind="train")).rows[5] == (
            "tell",
            "1",
            "2",
            "220,000",
            "0.088",
            "130",
        )

    def test_trials_of_one_seed_that_stand_for_all_are_paid_for_once(self):
        results = make(seeds=(0, 1))
        first, other = (result for result in results["arms"] if result["arm"] == "tell")
        other["tried"] = first["tried"]
        rows = {row[0]: row for row in summary.cost_grid(results).rows}
        assert rows["tell"] == ("tell", "2", "2", "660,000", "0.264", "460")

    def test_other_sizes_cost_and_are_not_compared(self):
        results = make()
        tell = next(result for result in results["arms"] if result["arm"] == "tell")
        small = json.loads(json.dumps(tell)) | {"size": 30}
        small["scores"]["tickets"][0]["value"] = 9.9
        small["tried"] = [one | {"seconds": 50.0} for one in small["tried"]]
        results["arms"].insert(0, small)
        assert "9.9" not in str(summary.score_grid(results, "tickets").rows)
        assert [len(arm) for arm in summary.by_arm(results).values()] == [1] * 6
        assert summary.headline(results) == summary.headline(make())
        rows = {row[0]: row for row in summary.cost_grid(results).rows}
        assert rows["tell"] == ("tell", "2", "4", "1,100,000", "0.440", "560")
        shown = run_report.examples(
            results,
            [row | {"size": 30, "output": "small"} for row in predictions()] + predictions(),
        )
        assert all(text != "small" for row in shown["tickets"] for _, text, _ in row["outputs"])

    def test_seeds_that_differ_are_shown_as_a_range(self):
        results = make(seeds=(0, 1))
        results["arms"][-1]["training"]["steps"] = 90
        assert summary.training_grid(results).rows[-1][-2] == "90–120"

    def test_verdicts(self):
        assert summary.verdict(0.1, 0.2, higher_is_better=True) == "better"
        assert summary.verdict(0.1, 0.2, higher_is_better=False) == "worse"
        assert summary.verdict(-0.2, -0.1, higher_is_better=False) == "better"
        assert summary.verdict(0.0, 0.2, higher_is_better=True) == "no difference shown"
        assert (
            summary.verdict(float("nan"), float("nan"), higher_is_better=True)
            == "no difference shown"
        )


class TestTerminal:
    def test_one_table_a_task_and_three_of_the_run(self):
        results = make(tasks=("a", "b"))
        assert [str(table.title) for table in run_report.tables(results)] == [
            "a",
            "b",
            "Paired differences (first metric; the report has the others)",
            "Training and cost",
            "Forgetting: general rows held out, nats per answer token above the base model",
        ]
        text = terminal(results)
        assert "1.260 [1.160, 1.360]" in text
        assert re.search(
            r"tell +20% +8% +3% +120 +110,000 +330\n", re.sub(" +\n", "\n", text)
        )  # 2 trials, 1 training
        assert re.search(r"base +– +– +– +– +– +132\n", re.sub(" +\n", "\n", text))
        assert re.search(r"tell − sft_anchor +a +NLL +−0.115 \[−0.200, −0.030\] +1 +better", text)
        assert not re.search(r"tell − sft_anchor +a +exact match", text)
        assert ("tell − sft_anchor", "a", "exact match") in [
            row[:3] for row in summary.difference_grid(results).rows
        ]

    def test_a_narrow_terminal_loses_no_digit(self):
        text = terminal(make(), width=80)
        assert "…" not in text
        assert text.count("1.360]") == 1  # tell's upper bound

    def test_six_arms_and_four_metrics_stand_in_100_columns_one_line_an_arm(self):
        results = make()
        for arm in results["arms"]:
            nll, match = arm["scores"]["tickets"]
            match.update(value=0.5, low=0.4, high=0.6)
            arm["scores"]["tickets"] = [
                nll,
                match,
                match | {"metric": "rouge_l"},
                match | {"metric": "json_valid"},
            ]
        lines = [line.rstrip() for line in terminal(results, width=100).splitlines()]
        half = "0.500 [0.400, 0.600]"
        assert f"tell         1.260 [1.160, 1.360]  {half}  {half}  {half}" in lines
        assert (
            "arm          task share: examples  tokens  loss tokens  steps  train tokens  seconds"
            in lines
        )
        assert (
            "tell                          20%      8%           3%    120       110,000      330"
            in lines
        )

    def test_names_are_no_markup(self):
        assert "[red]a[/red]" in terminal(make(tasks=("[red]a[/red]",)))

    def test_a_run_without_differences_has_no_empty_table(self):
        found = run_report.tables(make(kind="train", differences=(), forgetting=()))
        assert [str(table.title) for table in found] == ["tickets", "Training and cost"]


class TestPage:
    def test_user_text_is_inert_everywhere(self):
        anchor = TaskFacts(EVIL, EVIL, "user_prefix", 1, 1, 60, 60, 10)
        results = make(
            tasks=(EVIL,),
            notes=(EVIL,),
            rejects={EVIL: 1},
            environment={EVIL: EVIL},
            settings={"model": EVIL},
        )
        results["tasks"] = [store.plain(anchor)]
        results["arms"][0]["general_nll"] = {EVIL: results["arms"][0]["general_nll"]["builtin"]}
        rows = predictions(EVIL, EVIL)
        for row in rows:
            row.update(output=EVIL, gold=EVIL, origin=f"{EVIL}{row['origin']}")
        page = run_report.html(results, rows, COMPARE)
        assert "<script" not in page.lower()
        assert page.count("&lt;script&gt;") > 20

    def test_the_page_asks_no_network(self, tmp_path: Path):
        page = run_report.html(make(), predictions(), COMPARE)
        assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
        assert not re.search(r"url\((?!#)|@import|<(link|iframe|img|object|script)\b", page)
        assert "default-src 'none'" in page

    def test_equal_inputs_give_an_equal_file_below_a_megabyte(self, tmp_path: Path):
        results = make(seeds=(0, 1), tasks=("tickets", "mails"))
        folder = folder_with(
            tmp_path, results, predictions(text="x" * 5000) + predictions("mails", "y" * 5000)
        )
        path = run_report.write(folder, COMPARE)
        first = path.read_bytes()
        assert path == folder / "report.html"
        assert len(first) < 1_000_000
        run_report.write(folder, COMPARE)
        assert path.read_bytes() == first

    def test_all_sections_and_figures_have_names(self):
        page = run_report.html(make(), predictions(), COMPARE)
        for name in (
            "scores",
            "training",
            "forgetting",
            "examples",
            "data",
            "method",
            "cost",
            "settings",
        ):
            assert page.count(f'id="{name}"') == 1
        assert len(re.findall(r'role="img" aria-label="[^"]{40,}"', page)) == 3
        assert "the last step’s weights count" in page
        single = run_report.html(make(kind="train"), predictions(), TRAIN)
        assert "The weights of the step with the best dev NLL are kept" in single
        ids = re.findall(r'<h2 id="([^"]+)"', page)
        assert len(ids) == len(set(ids)) == 9
        for words in (
            "tell is better than sft_anchor by 0.115",
            "duplicate of a test row",
            "shared a 13-gram",
            "1,500 MiB",
        ):
            assert words in page
        assert "no trial of any arm took more than 120 optimizer steps" in page

    def test_forgetting_is_measured_against_the_first_untrained_arm_and_names_it(self):
        arms = tuple(
            arm_result(arm, 0, ("tickets",), 0, "train") for arm in ("base_anchor", "tell")
        )
        fallen = Difference("builtin", "nll", "tell", "base_anchor", -0.02, -0.05, 0.02, 1, False)
        results = make(kind="train", arms=arms, differences=(), forgetting=(fallen,))
        page = run_report.html(results, [], TRAIN)
        assert "The dashed line is base_anchor, the untrained model: to its right" in page
        assert (
            "Nats per answer token above base_anchor, the untrained model, on general rows" in page
        )
        assert (
            "minus that of base_anchor, the untrained model, on the same held-out general "
            "rows.</li>" in page
        )
        assert "the changes against base_anchor are in the table above" in page
        assert run_report.forgetting_plot(results).count("stroke-dasharray") == 1
        assert "against base_anchor, the untrained model" in run_report.card(results, TRAIN, "")

    def test_without_an_untrained_arm_there_is_no_dashed_line_and_no_word_of_it(self):
        arms = tuple(arm_result(arm, 0, ("tickets",), 0) for arm in ("sft", "tell"))
        results = make(arms=arms, differences=(), forgetting=())
        page = run_report.html(results, [], COMPARE)
        assert "NLL on held-out general rows, with 95% intervals.\n" in page
        assert not re.search("dashed|untrained|are in the table above|Forgetting is", page)
        assert "stroke-dasharray" not in run_report.forgetting_plot(results)

    @pytest.mark.parametrize("seeds", [(0,), (0, 1)])
    def test_forgetting_has_its_intervals_and_no_word_against_them(self, seeds: tuple[int, ...]):
        page = run_report.html(make(seeds=seeds), [], COMPARE)
        assert "−0.020 [−0.050, 0.020]" in page
        assert "without an interval" not in page

    def test_the_step_cap_is_claimed_only_where_it_held(self):
        # A run without general data takes the epochs that it was told, over any cap.
        for cap, said in ((120, True), (119, False)):
            assert (
                "Step cap: no trial of any arm" in run_report.html(make(step_cap=cap), [], COMPARE)
            ) is said

    def test_examples_are_the_rows_where_tell_and_sft_differ_most(self):
        shown = run_report.examples(make(), predictions())["tickets"]
        assert len(shown) == 10
        assert shown[0]["origin"] == "tickets.jsonl:14"
        assert shown[0]["outputs"][5] == ("tell", "tell says 14", "4.060")
        assert shown[0]["prompt"] == "Printer on floor 3 is out of toner. #14"

    def test_long_texts_are_cut_and_say_so(self):
        shown = run_report.examples(make(), predictions(text="x" * 5000))["tickets"]
        assert shown[0]["prompt"].endswith("x … (4,304 more characters)")

    def test_a_run_without_predictions_or_training_still_has_a_page(self, tmp_path: Path):
        arms = tuple(
            replace(arm_result(arm, 0, ("tickets",), 0), general_nll={})
            for arm in ("base", "base_anchor")
        )
        folder = folder_with(tmp_path, make(arms=arms, differences=(), notes=(), rejects={}), [])
        (folder / "predictions.jsonl").unlink()
        page = run_report.write(folder, COMPARE).read_text()
        assert "No predictions are stored" in page
        assert "No arm was trained" in page
        assert "No row was rejected" in page

    def test_a_line_separator_inside_a_row_breaks_no_line(self, tmp_path: Path):
        folder = folder_with(tmp_path, make(), predictions(text="a\u2028b\x85c"))
        assert "a\u2028b\x85c #14" in run_report.write(folder, COMPARE).read_text()

    def test_scored_rows_without_text_say_so(self):
        rows = [row | {"output": None} for row in predictions()]
        assert "only scored, no text generated" in run_report.html(make(), rows, COMPARE)


class TestLoad:
    def test_what_was_written_is_read(self, tmp_path: Path):
        assert run_report.load(folder_with(tmp_path, make(), [])) == make()

    def test_a_missing_folder_or_file(self, tmp_path: Path):
        with pytest.raises(StoreError, match="no such run folder"):
            run_report.load(tmp_path / "nowhere")
        with pytest.raises(StoreError, match=r"no results\.json and no certificate\.json"):
            run_report.load(tmp_path)

    def test_another_version(self, tmp_path: Path):
        with pytest.raises(StoreError, match="has version 2, this Fulcrum reads 3"):
            run_report.load(folder_with(tmp_path, make() | {"version": 2}, []))

    def test_a_damaged_file(self, tmp_path: Path):
        (tmp_path / "results.json").write_text('{"version": 3')
        with pytest.raises(StoreError, match="not readable as JSON"):
            run_report.load(tmp_path)
        store.write_json(tmp_path / "results.json", [1])
        with pytest.raises(StoreError, match="has version None"):
            run_report.load(tmp_path)
        store.write_json(tmp_path / "results.json", {"version": 3, "arms": []})
        with pytest.raises(StoreError, match="lacks differences, environment, forgetting, kind"):
            run_report.load(tmp_path)

    def test_a_damaged_prediction_names_its_line(self, tmp_path: Path):
        folder = folder_with(tmp_path, make(), predictions()[:1])
        with (folder / "predictions.jsonl").open("a") as stream:
            stream.write('{"arm": "te')
        with pytest.raises(StoreError, match=r"predictions\.jsonl:2: not readable as JSON"):
            run_report.write(folder, COMPARE)


class TestCard:
    def test_it_says_what_how_and_how_well(self):
        text = run_report.card(make(), COMPARE, "The tokenizer's chat template adds the anchor.")
        assert text.startswith("---\nlibrary_name: peft\n")
        assert "\n# tickets: a LoRA adapter for smollm2-135m-instruct\n" in text
        assert "```text\nSort the ticket below; answer with one JSON object.\n```" in text
        assert "placement `user_prefix`" in text
        assert "| tell | 1.260 [1.160, 1.360] | 0.550 [0.450, 0.650] |" in text
        assert "| tell | −0.020 [−0.050, 0.020] |" in text
        assert "| tickets | 48 | 12 | 60 | 60 | 5,321 |" in text
        assert "apply_chat_template" in text
        assert "for one training seed" in text
        assert "LoRA r=16" in text
        assert (
            "chosen by cross-validation inside the task rows; the last step's weights were "
            "kept. All settings" in text
        )
        assert "with the best dev NLL were kept. All settings: `config.yaml`" in run_report.card(
            make(kind="train"), TRAIN, ""
        )
        assert "empty answer 2, duplicate of a test row 1." in text
        assert "\n\n\n\n" not in text

    def test_an_anchor_cannot_leave_its_fence(self):
        results = make()
        results["tasks"][0]["anchor"] = "a ```` b\n```\n<b>"
        assert "`````text\na ```` b\n```\n<b>\n`````" in run_report.card(results, COMPARE, "")

    @pytest.mark.parametrize(
        ("model", "says", "loads"),
        [
            ("org/name", "from the Hugging Face hub. ", '"org/name"'),
            (
                "smollm2-135m-instruct",
                "one of Fulcrum's built-in models: `prepare` fetches it, so",
                'prepare("smollm2-135m-instruct")',
            ),
            (
                "/gone/folder",
                "a local folder. It is no part of this adapter: have the same model at hand",
                '"/gone/folder"',
            ),
            (
                "/gone/a.gguf",
                "a local file. It is no part of this adapter: have the same file at hand",
                'prepare("/gone/a.gguf")',
            ),
        ],
    )
    def test_it_says_how_to_come_by_the_base_model(self, model: str, says: str, loads: str):
        text = run_report.card(make(settings={"model": model}), COMPARE, "NOTE")
        assert f"\nThe base model is `{model}`, {says}" in text
        assert f"\nbase = AutoModelForCausalLM.from_pretrained({loads})\n" in text
        assert ("\nfrom fulcrum.model.download import prepare\n" in text) == loads.startswith(
            "prepare"
        )
        assert '\nmodel = PeftModel.from_pretrained(base, "adapters/tell")\n' in text

    def test_of_several_tasks_one_is_chosen_by_name(self):
        text = run_report.card(make(tasks=("Größe", "b", "c")), COMPARE, "")
        assert '\ntask = "Größe"  # or "b", "c"\n' in text
        assert "\n    messages, chat_template=task, add_generation_prompt=True, " in text
        assert "chat_template=" not in run_report.card(make(), COMPARE, "")

    def test_without_anchor_there_is_no_anchor_section(self):
        results = make()
        results["tasks"][0].update(anchor=None, placement=None)
        assert "## Anchor" not in run_report.card(results, COMPARE, "")


def test_the_report_needs_no_torch():
    code = (
        "import sys, fulcrum.report.run_report; assert not {'torch', 'matplotlib', 'jinja2', "
        "'rich'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_kind_of_a_run_is_looked_up_by_its_name():
    kinds = {kind.name: kind for kind in (TRAIN, COMPARE)}
    assert kind_of(make(kind="train"), kinds) is TRAIN
    with pytest.raises(
        StoreError,
        match="unknown kind of run 'walk', this Fulcrum knows train, compare; use the Fulcrum that",
    ):
        kind_of(make(kind="walk"), kinds)


def test_a_kind_of_run_opens_its_report_with_a_chapter_of_its_own(tmp_path: Path):
    def write_chapter(folder: Path, results: Record, predictions: Sequence[Record]) -> Chapter:
        (folder / "own.json").write_text(str(len(predictions)))
        return Chapter(
            "<p>One finding.</p>", '<a href="#own">Own</a>', '<section id="own"></section>'
        )

    kind = RunKind("walk", "A walk", "none", write_chapter=write_chapter)
    folder = folder_with(tmp_path, make(kind="walk"), predictions())
    page = run_report.write(folder, kind).read_text()
    assert (folder / "own.json").read_text() == str(len(predictions()))
    assert "<p>A walk with smollm2-135m-instruct</p>" in page
    assert page.count("<p>One finding.</p>") == 1
    assert 'class="claim' not in page
    assert (
        page.index('<a href="#own">Own</a>')
        < page.index('<section id="own">')
        < page.index('id="scores"')
    )
    assert "Nothing is chosen: there are no trials and no dev rows" in page


def test_a_training_without_trials_is_counted_in_its_cost():
    arms = tuple(
        replace(arm_result(arm, 0, ("tickets",), 0), tried=(), chosen=None)
        for arm in ("sft", "tell")
    )
    rows = summary.cost_grid(make(arms=arms, differences=(), forgetting=())).rows
    assert [(row[0], row[2], row[3]) for row in rows] == [
        ("sft", "0", "52,000"),
        ("tell", "0", "110,000"),
    ]
