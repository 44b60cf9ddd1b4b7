"""The explorer of clusters: what it says of each, that rows' text is inert on it, and that equal
records give equal bytes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fulcrum.core import store
from fulcrum.core.errors import StoreError
from fulcrum.mechanism import quanta_report
from fulcrum.mechanism.cluster_gains import density_test, summarise


def record(k: int = 6, per: int = 10, evil: str = "ending") -> dict[str, Any]:
    """Clusters of `per` task items each and ever more general ones, where TELL gains the more of
    these there are."""
    items, labels = [], []
    for label in range(k):
        for number in range(per + 3 * label):
            general = number >= per
            gain = 0.0 if general else 0.1 * label + 0.01 * number
            items.append(
                {
                    "general": general,
                    "origin": f"r{label}-{number}",
                    "group": "g",
                    "before": "the stem of ",
                    "text": f" {evil}",
                    "after": "\nand more",
                    "cluster": label,
                    "untrained": 4.0,
                    "losses": {"sft_anchor": [3.0, 2.0], "tell": [3.0 - gain, 2.0 - gain]},
                }
            )
            labels.append(label)
    general = np.array([item["general"] for item in items])
    gain = np.array(
        [item["losses"]["sft_anchor"][-1] - item["losses"]["tell"][-1] for item in items]
    )
    before = np.full(len(items), 4.0)
    test = density_test(summarise(labels, general, ~general, gain, before=before))
    found = {
        "k": k,
        "stability": 0.9,
        "eigenvalues": [1.0] * k + [0.2],
        "candidates": [{"k": k, "gap": 0.8, "stability": 0.9}],
    }
    return dict(
        store.plain(
            {
                "version": 1,
                "unit": "tokens",
                "seed": 0,
                "arms": ["sft_anchor", "tell"],
                "tokens": 1234,
                "steps": {"sft_anchor": [4, 8], "tell": [10, 20]},
                "gradient_seconds": 12.0,
                "clusters": found,
                "without_gradient": 0,
                "test": test,
                "items": items,
            }
        )
    )


def test_every_cluster_has_its_sizes_losses_and_gain() -> None:
    rows = quanta_report.cluster_rows(record())
    assert [(row["label"], row["size"], row["task"], row["general"]) for row in rows] == [
        (k, 10 + 3 * k, 10, 3 * k) for k in range(6)
    ]
    assert [round(row["gain"], 3) for row in rows] == [0.045, 0.145, 0.245, 0.345, 0.445, 0.545]
    own = rows[2]["losses"]["task"]
    assert own["untrained"] == 4.0
    assert own["sft_anchor"] == [3.0, 2.0]
    assert own["tell"] == pytest.approx([2.755, 1.755])
    assert "general" not in rows[0]["losses"]
    assert rows[0]["words"] == ["␣ending ×10"]


@pytest.mark.e2e
def test_the_page_says_the_verdict_and_shows_both_kinds_in_context() -> None:
    known = record()
    assert known["test"]["verdict"] == "rises"
    text = quanta_report.html(known, "inflections")
    assert known["test"]["sentence"].split(";")[0].replace("'", "&#39;") in text
    assert text.count("<details") == 6
    assert "the stem of <mark>␣ending</mark>" in text
    assert ">general</span>" in text
    assert quanta_report.html(known, "inflections") == text


def test_a_large_cluster_shows_some_of_each_kind() -> None:
    rows = quanta_report.cluster_rows(record(per=100))
    shown = [item["general"] for item in rows[5]["items"]]
    assert (len(shown), sum(shown)) == (40, 15)  # all 15 general ones, and 25 of 100
    assert rows[5]["items"][0]["origin"] == "r5-0"
    assert rows[5]["items"][24]["origin"] == "r5-99"


def test_text_of_rows_is_inert() -> None:
    text = quanta_report.html(record(evil="<script>alert(1)</script>"), "<b>t</b>")
    assert "<script" not in text
    assert "<b>t" not in text
    assert "default-src 'none'" in text


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (" a", "␣a"),
        ("a ", "a␣"),
        ("\n", "⏎"),
        ("  ", "␣␣"),
        ("a b", "a b"),
        ("\t.", "⇥."),
        ("", ""),
    ],
)
def test_white_space_is_seen(text: str, seen: str) -> None:
    assert quanta_report.shown(text) == seen


def test_no_clusters_are_said_and_a_record_of_another_version_is_refused(tmp_path: Path) -> None:
    known = record()
    known |= {
        "test": None,
        "clusters": {"k": 0, "stability": None, "eigenvalues": [1.0, 0.5], "candidates": []},
    }
    for item in known["items"]:
        item["cluster"] = None
    (said,) = quanta_report.sentences(known)
    assert said.startswith(
        "No stable clusters in 105 answer tokens (60 of the task's test rows, 45 general)"
    )
    assert "<details" not in quanta_report.html(known, "t")
    (tmp_path / store.QUANTA).write_text(json.dumps({"version": 99}))
    with pytest.raises(StoreError, match=r"quanta\.json: not a record of this version"):
        quanta_report.read(tmp_path)
