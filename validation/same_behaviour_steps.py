"""The commands that `same_behaviour.py` runs for each checkout, and their settings."""

from dataclasses import dataclass
from typing import Any, Literal

from same_behaviour_data import settings, task

MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Step:
    """One command line, and what is compared besides its exit code and the files that it writes.

    stdout: "text" is not compared, "exact" is, "numbers" are as a multiset, "yaml" is read
    code: the exit code that the old checkout must give; else the step proves nothing
    act: name of what `same_behaviour_run` does instead of the command alone
    """

    name: str
    args: str
    stdin: str = ""
    stdout: Literal["text", "exact", "numbers", "yaml"] = "text"
    code: int = 0
    act: str = ""


def _tell(name: str, **changes: Any) -> dict[str, Any]:
    return {"name": name, "anchored": True, "general": "pool", **changes}


OWN_ARMS = [
    _tell("by_words", select="similar"),
    _tell("by_gradient", select="gradient"),
    _tell("by_kind", select="diverse"),
    _tell("dropout", anchor_dropout=0.2, asked_anchored=False),
    _tell("cooldown", anchor_cooldown=0.2, asked_anchored=False),
    _tell("task_first", order="task_then_general"),
    _tell("replay", general_per_task=0.25),
    _tell("only_general", task_rows=False),
]
ANCHORS = [
    _tell("long", anchor="Name the colour of this animal."),
    _tell("short", anchor="Colour?"),
    _tell("system", anchor={"text": "Name it.", "placement": "system"}),
]
TINY_SETTINGS: dict[str, dict[str, Any]] = {
    "train": settings("train", mix={"general_per_task": 2, "repeats": "auto"}),
    "compare": settings(
        "compare",
        compare={
            "arms": ["base", "base_anchor", "kshot", "tfidf", "sft", "sft_anchor", "mix", "tell"],
            "seeds": [0, 1],
            "sizes": [8, 16],
            "folds": 2,
            "learning_rates": [0.01, 0.003],
        },
    ),
    "more-arms": settings(
        "more-arms",
        task=task(unlabeled="material/unlabeled.jsonl"),
        compare={
            "arms": [
                "base_anchor",
                "sft",
                "sft_matched",
                "sft_kl",
                "soup",
                "tell",
                "general_then_task",
                "placebo_permuted",
                "placebo_own_answers",
                "selfgen",
                "unlabeled",
                "pseudo_self",
                *OWN_ARMS,
            ],
            "sizes": [12],
            "folds": 2,
            "sft_epochs": [2],
        },
    ),
    "no-test": settings(
        "no-test",
        task=task(test=None),
        mix={"general_per_task": 1, "repeats": "auto", "unit": "tokens"},
        compare={"arms": ["sft_anchor", "tell"], "seeds": [0, 1], "folds": 2, "tune": "each"},
    ),
    "auto": settings(
        "auto",
        tasks=[
            task(
                train_limit=16,
                anchor={"text": "auto", "candidates": ["Colour?", "Name the colour."]},
            ),
            {
                "name": "letters",
                "train": "material/letters.jsonl",
                "train_limit": 6,
                "anchor": "First letter.",
            },
        ],
        mix={"general_per_task": "auto", "repeats": 1, "pilot_tokens": 40_000},
    ),
    "anchors": settings(
        "anchors",
        compare={
            "arms": ["sft_anchor", "tell", *ANCHORS],
            "seeds": [0, 1],
            "folds": 2,
            "sft_epochs": [2],
        },
    ),
    "scale": settings(
        "scale",
        mix={"general_per_task": 16, "repeats": 2},
        compare={"seeds": [0, 1]},
        scale={
            "ratios": [0, 0.5, 1, 2, 4, 8, 16],
            "rows": 6,
            "repeats": 2,
            "designs": ["exposures", "steps"],
        },
    ),
    "quanta": settings(
        "quanta",
        mix={"general_per_task": 1},
        quanta={"items": 60, "repeats": 2, "points": 2, "most": 6},
    ),
    "python": settings("python"),
    "python-compare": settings("python-compare", compare={"arms": ["sft", "tell"]}),
    "wrong": settings("wrong", mix={"general_per_tsk": 2}),
}

TINY = (
    Step("models", "models"),
    Step(
        "init",
        "init material/train.jsonl --test material/test.jsonl --model material/model"
        " --json init.json",
    ),
    Step(
        "init: columns",
        "init material/renamed.csv --columns prompt=text,completion=label --json columns.json",
    ),
    Step("init: chats", "init material/letters.jsonl --json letters.json"),
    Step("init: taken", "init material/train.jsonl", code=2),
    Step("check", "check settings/train.yaml --rows 4 --json check.json"),
    Step("pool build", "pool build material/pool.jsonl", stdout="numbers"),
    Step("pool info", "pool info material/pool.jsonl", stdout="numbers"),
    Step("pool sample", "pool sample material/pool.jsonl --rows 9 --seed 4", stdout="numbers"),
    Step("pool check", "pool check settings/train.yaml --examples 5", stdout="numbers"),
    Step("mix", "mix settings/train.yaml --out mix.jsonl --seed 5 --set mix.repeats=3"),
    Step("mix: parquet", "mix settings/train.yaml --out mix.parquet --set mix.order=random"),
    Step("mix: similar", "mix settings/train.yaml --out similar.jsonl --set mix.select=similar"),
    Step("mix: diverse", "mix settings/train.yaml --out diverse.jsonl --set mix.select=diverse"),
    Step("train: dry run", "train settings/train.yaml --dry-run --seed 4", stdout="yaml"),
    Step("train: wrong key", "train settings/wrong.yaml", code=2),
    Step("train: no file", "train settings/none.yaml", code=2),
    Step("train", "train settings/train.yaml"),
    Step("train: taken", "train settings/train.yaml", code=2),
    Step("train: new", "train settings/train.yaml --force-new --seed 9 --set train.use_dora=true"),
    Step(
        "train: gradient",
        "train settings/train.yaml --output-dir runs/gradient --set mix.select=gradient",
    ),
    Step("train: auto", "train settings/auto.yaml"),
    Step("eval", "eval runs/train"),
    Step(
        "eval: data",
        "eval runs/train --data material/more.jsonl --metrics nll,chrf,token_f1 --out eval.jsonl",
    ),
    Step("eval: trained on", "eval runs/train --data material/train.jsonl", code=2),
    Step("compare: dry run", "compare settings/compare.yaml --dry-run", stdout="yaml"),
    Step("compare: budget", "compare settings/compare.yaml --quick --dry-run"),
    Step("compare", "compare settings/compare.yaml"),
    Step("compare: arms", "compare settings/more-arms.yaml"),
    Step("compare: no test", "compare settings/no-test.yaml --jobs 2"),
    Step("compare: anchors", "compare settings/anchors.yaml"),
    Step("compare: resume", "compare settings/compare.yaml --resume"),
    Step(
        "chat",
        "chat runs/train",
        stdin="colour ant 8\nand now?\n/anchor off\ncolour owl 9\n/reset\n/history\nsay\n/quit\n",
        stdout="exact",
    ),
    Step(
        "chat: arms",
        "chat runs/compare --with base,sft",
        stdin="colour ant 8\nand now?\n",
        stdout="exact",
    ),
    Step(
        "anchor propose",
        "anchor propose settings/train.yaml --out proposed.jsonl -n 4 --placement system",
    ),
    Step("anchor score", "anchor score settings/train.yaml proposed.jsonl --out anchors.json"),
    Step("anchor outcome", "anchor outcome runs/anchors"),
    Step("scale", "scale settings/scale.yaml"),
    Step("quanta", "quanta settings/quanta.yaml"),
    Step("selfgen", "selfgen selfgen.jsonl --rows 8 --model material/model --seed 2"),
    Step(
        "certify", "certify material/outcomes.jsonl --out certificate --metric score --metric nll"
    ),
    Step(
        "certify: taken", "certify material/outcomes.jsonl --out certificate --metric score", code=2
    ),
    Step("verify: certificate", "verify certificate/certificate.json"),
    Step("verify", "verify runs/compare"),
    Step("verify: again", "verify runs/train --again"),
    Step("report", "report runs/compare"),
    Step("report: certificate", "report certificate"),
    Step("export: adapter", "export runs/compare --to adapter --arm mix --rows 4"),
    Step("export: merged", "export runs/train --to merged --dtype float32 --rows 4"),
    Step("export: rounded", "export runs/train --to merged --rows 0"),
    Step("export: modelfile", "export runs/train --to modelfile --rows 4"),
    Step(
        "export: gguf", "export runs/train --to gguf", code=2
    ),  # of safetensors llama.cpp makes it
    Step("serve", "serve runs/compare --port 0 --threads 1", act="serve"),
    Step("ui", "ui --no-browser --port 0 --folder page --runs runs", act="ui"),
    Step("python", "", act="python"),
)

REAL_SETTINGS = {
    name: settings(
        name,
        model=MODEL,
        task=task(train_limit=6, dev_limit=2, test_limit=8),
        general="builtin",
        eval={"general_rows": 4, "draws": 200},
        mix={"general_per_task": 1, "repeats": 2},
        compare={"arms": ["base", "sft", "sft_anchor", "tell"], "folds": 2, "sft_epochs": [2]},
    )
    for name in ("real-train", "real-compare")
}
ALL_SETTINGS = {**TINY_SETTINGS, **REAL_SETTINGS}
REAL = (
    Step("real: train", "train settings/real-train.yaml"),
    Step("real: compare", "compare settings/real-compare.yaml"),
    Step("real: gguf", "export runs/real-train --to gguf --quantization q8_0 --rows 2"),
)
