"""Make the packaged demo task: mails to a small shop in, one JSON object out.

There are 240 training, 40 dev and 120 test rows.

    {"desk": "bench", "rush": "p1", "item": "Brevo kettle", "ask": "swap"}

The conventions are the shop's own, so a model has to learn them from the rows:

- `desk` (who handles it): ledger = money and invoices, bench = broken things, dock = parcels,
  shelf = questions before buying, gate = cancelling, or sending back what works
- `rush`: p1 if the customer names a date by which it must be done, or writes for the third time or
  more; else p3. An angry tone, the word "urgent", a second mail and the date of the purchase do
  not count, and occur in both classes
- `item`: the thing it is about, copied as the mail has it (another thing of the shop may be
  mentioned too)
- `ask` (what is wanted): refund, swap = another one sent, mend, tell = information, stop = a
  cancellation

A scenario is one line ``desk | ask | text`` whose ``[a/b]`` are alternatives; a mail is a scenario
with cues, distractions, typos, greeting and name. Dev and test are apart by content, not by chance:
each split has its own scenarios, brands, kinds of thing, customers, greetings, cues and
distractions. Column `group` is the scenario's id. Rows come in rounds over all scenarios, so that
the first n rows of a file are as mixed as the whole.

Invariant: the files are a pure function of this script (no model, no data, no clock).

    python scripts/make_demo_task.py --out src/fulcrum/data/builtin/demo
"""

import argparse
import json
import random
import re
from pathlib import Path

SEED = 7
ROWS = {"train": 240, "dev": 40, "test": 120}
FIELDS = ("desk", "rush", "item", "ask")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
TEXTS = Path(__file__).with_name("demo_texts.yaml")
Row = dict[str, str]


def entries(text: str) -> list[str]:
    """Return the lines of a block, or the parts of a comma-separated list."""
    return [part.strip() for part in (text.splitlines() if "\n" in text else text.split(", "))]


def fill(template: str, rng: random.Random, slots: dict[str, str]) -> str:
    """Choose one of each ``[a/b]``, then fill the slots."""
    chosen = re.sub(r"\[([^]]*)\]", lambda match: rng.choice(match[1].split("/")), template)
    return chosen.format(**slots)


def add_typos(text: str, keep: str, rng: random.Random) -> str:
    """Swap or drop a letter inside one or two lower-case words of five letters or more, never
    inside `keep`."""
    start = text.index(keep)
    spots = [
        m
        for m in re.finditer(r"\b[a-z]{5,}\b", text)
        if not start - len(keep) < m.start() < start + len(keep)
    ]
    for spot in sorted(
        rng.sample(spots, min(len(spots), rng.choice((1, 1, 2)))), key=lambda m: -m.start()
    ):
        at = spot.start() + rng.randint(1, len(spot[0]) - 3)
        swapped = text[at + 1] + text[at] if rng.random() < 0.5 else text[at]
        text = text[:at] + swapped + text[at + 2 :]
    return text


def make_row(scenario: str, group: str, split: dict[str, list[str]], rng: random.Random) -> Row:
    """Return one mail of a scenario with its answer."""
    desk, ask, body = (part.strip() for part in scenario.split(" | "))
    item = f"{rng.choice(split['brands'])} {rng.choice(split['kinds'])}"
    other_brand = rng.choice([brand for brand in split["brands"] if brand not in item])
    other_kind = rng.choice([kind for kind in split["kinds"] if kind not in item])
    slots = {
        "item": item,
        "other": f"{other_brand} {other_kind}",
        "span": rng.choice(("two days", "a week", "ten days", "three weeks", "two months")),
        "date": f"{rng.randint(1, 28)} {rng.choice(MONTHS)}",
        "sum": str(rng.randint(9, 240)),
        "order": str(rng.randint(20000, 99999)),
    }
    pressing = rng.random() < 0.45
    after = []
    if pressing:
        after.append(rng.choice(split[rng.choice(("deadlines", "contacts"))]))
    # A p1 mail gets no "second mail": with a third contact it would be false, and alone it must
    # mean p3.
    lookalikes = split["tones"] if pressing else split["tones"] + split["seconds"]
    if rng.random() < (0.2 if pressing else 0.65):
        after.append(rng.choice(lookalikes))
    if rng.random() < 0.3:
        after.append(rng.choice(split["asides"]))
    rng.shuffle(after)
    # Some of it may come first, except what leans on the thing having been named.
    before = (
        [after.pop()]
        if after and rng.random() < 0.25 and not re.search(r"\b(it|that|this)\b", after[-1], re.I)
        else []
    )
    text = " ".join(fill(part, rng, slots) for part in (*before, body, *after))
    if rng.random() < 0.4:
        text = add_typos(text, item, rng)
    if rng.random() < 0.12:
        text, item = text.lower(), item.lower()
    if rng.random() < 0.6:
        text = rng.choice(split["greetings"]) + rng.choice((" ", "\n")) + text
    if rng.random() < 0.6:
        text += rng.choice(("\n", " ", "\nThanks, ", "\nBest, ")) + rng.choice(split["names"])
    answer = dict(zip(FIELDS, (desk, "p1" if pressing else "p3", item, ask), strict=True))
    return {"prompt": text, "completion": json.dumps(answer), "group": group}


def split_texts(name: str) -> dict[str, list[str]]:
    """Return the texts of one split by kind: scenarios, brands, names, deadlines …"""
    import yaml

    return {
        key: entries(text) for key, text in yaml.safe_load(TEXTS.read_text("utf-8"))[name].items()
    }


def make_split(name: str, seed: int = SEED) -> list[Row]:
    """Return the rows of one split: rounds over its scenarios, each round in a new order, no prompt
    twice."""
    split = split_texts(name)
    rng = random.Random(f"{seed}-{name}")
    groups = {
        f"{name}-{number:02}": scenario
        for number, scenario in enumerate(split["scenarios"], start=1)
    }
    rows: dict[str, Row] = {}
    while len(rows) < ROWS[name]:
        for group, scenario in rng.sample(sorted(groups.items()), len(groups)):
            row = make_row(scenario, group, split, rng)
            while row["prompt"] in rows:
                row = make_row(scenario, group, split, rng)
            if len(rows) < ROWS[name]:
                rows[row["prompt"]] = row
    return list(rows.values())


def main() -> None:
    """Write the three files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("src/fulcrum/data/builtin/demo"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ROWS:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in make_split(name)]
        (args.out / f"{name}.jsonl").write_text("".join(lines), "utf-8")
        print(f"{len(lines):4} {name}")


if __name__ == "__main__":
    main()
