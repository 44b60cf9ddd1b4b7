"""A certificate's numbers in words: intervals, factors that are censored, what cannot be said and why."""

from collections.abc import Mapping
from typing import Any

from fulcrum.summary import decimal, label_of

Ends = Mapping[str, Any]  # estimate, low, high; None for an unknown end


def percent(share: float) -> str:
    """A share as percent, never rounded to a 0 or a 100 that it is not."""
    text = f"{100 * share:.0f}%"
    return "<1%" if text == "0%" and share > 0 else ">99%" if text == "100%" and share < 1 else text


def ends(interval: Ends, sign: int = 1, *, percents: bool = False) -> str:
    """ "0.412 [0.380, 0.445]" in the metric's own direction, or "0.412 (no interval)"."""
    show = percent if percents else decimal
    if interval["estimate"] is None:
        return "unknown"
    value = show(sign * interval["estimate"])
    if interval["low"] is None or interval["high"] is None:
        return f"{value} (no interval)"
    # A draw of a share may lie beyond 0 or 1; nobody can read a share of -2%.
    low, high = sorted(
        min(max(sign * interval[key], 0.0), 1.0) if percents else sign * interval[key] for key in ("low", "high")
    )
    return f"{value} [{show(low)}, {show(high)}]"


def signed(interval: Ends, sign: int = 1) -> tuple[str, str]:
    """A difference and its interval, each with its sign: "−0.106" and "[−0.118, −0.092]"."""
    if interval["estimate"] is None:
        return "unknown", "(no interval)"
    value = _plus(sign * interval["estimate"])
    if interval["low"] is None or interval["high"] is None:
        return value, "(no interval)"
    low, high = sorted(sign * interval[key] for key in ("low", "high"))
    return value, f"[{_plus(low)}, {_plus(high)}]"


def _plus(value: float) -> str:
    text = decimal(value)
    return text if text.startswith("−") or not float(text) else f"+{text}"


def verdict_of(answer: Mapping[str, Any], contradiction: str | None) -> tuple[str, str, str]:
    """A sign, a kind (for its colour) and words for a verdict; none of them says it alone."""
    if answer["verdict"] == "gain":
        if contradiction:
            return "≠", "unclear", "Gain by the first metric, contradicted by another"
        if not answer["identifiable"] and gain_of(answer) is None:
            return "▲", "unclear", "Gain, its worth in rows not identifiable"
        return "▲", "gain", "Gain"
    if answer["verdict"] == "loss":
        return "▼", "loss", "Loss"
    return ("?", "unknown", "Cannot be said") if answer["verdict"] == "cannot be said" else ("=", "none", "No gain shown")


def gain_of(answer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row gain of all rows, where the reference was measured with more and rises there."""
    return next((gain for gain in answer["gain"] if gain["size"] == answer["rows"] and gain["identifiable"]), None)


def not_identifiable(answer: Mapping[str, Any]) -> str:
    """Why no factor is stated, after "because"."""
    slope, sign = answer["slope"], -1 if answer["lower_is_better"] else 1
    if slope["estimate"] is None:
        return "the reference was measured with one number of rows only"
    known = f"{label_of(answer['metric'])} {' '.join(signed(slope, sign))} with each doubling"
    if slope["low"] is None:
        return f"nothing is known of other seeds and test groups ({known})"
    if slope["low"] <= 0:
        return f"the reference does not clearly get better with its rows ({known})"
    return f"the reference, which gets better as a whole ({known}), does not clearly do so towards {answer['rows']} rows"


def _end(value: Any, factor: Mapping[str, Any]) -> str:
    if value == "under":
        return f"below {factor['least']:.1f}"
    return f"at least {factor['most']:.1f}" if value == "over" else "unknown" if value is None else f"{value:.1f}"


def factor_text(factor: Mapping[str, Any]) -> tuple[str, str]:
    """A factor and its interval: "2.6×" and "[2.4, 2.8]", or "at least 4.0×"."""
    value = f"{_end(factor['estimate'], factor)}×"
    if factor["low"] is None or factor["high"] is None:
        return value, "(no interval)"
    if factor["low"] == factor["high"] == factor["estimate"] and isinstance(factor["low"], str):
        return value, "(as is its whole interval)"
    return value, f"[{_end(factor['low'], factor)}, {_end(factor['high'], factor)}]"


def in_rows(factor: Mapping[str, Any], size: int, *, gain: str | None = None, short: bool = False) -> str:
    """A factor in rows: what would have sufficed of `size` rows, or what they were worth to the arm `gain`."""
    if factor["most"] <= 1 and gain is None:
        return f"not measured: no smaller size than {size} rows"
    estimate, low, high = (factor[key] for key in ("estimate", "low", "high"))
    if gain is not None:
        censored = low == high and isinstance(low, str)
        span = (
            "" if low is None or high is None or censored else f" ({_worth(low, factor, size)} to {_worth(high, factor, size)})"
        )
        return f"{size:,} rows of {gain} were worth {_worth(estimate, factor, size)}{span} rows without general data"
    span = "" if low is None or high is None else f" ({_needed(high, factor, size)} to {_needed(low, factor, size)})"
    if estimate == "under":
        return f"not even all {size:,} rows suffice{'' if low == high else span}"
    if estimate == "over":
        text, span = f"{size / factor['most']:,.0f} of {size:,} rows or fewer", "" if low == high else span
    else:
        text = f"{_needed(estimate, factor, size)} of {size:,} rows"
    return f"{text}{'' if short else ' would have sufficed'}{span}"


def _needed(value: Any, factor: Mapping[str, Any], n: int) -> str:
    if isinstance(value, str):
        return f"≤{n / factor['most']:,.0f}" if value == "over" else f"more than {n:,}"
    return "unknown" if value is None else f"{n / value:,.0f}"


def _worth(value: Any, factor: Mapping[str, Any], size: int) -> str:
    if isinstance(value, str):
        return f"at least {size * factor['most']:,.0f}" if value == "over" else f"fewer than {size * factor['least']:,.0f}"
    return "unknown" if value is None else f"{size * value:,.0f}"


def more_rows_text(answer: Mapping[str, Any]) -> tuple[str, str, str]:
    """Would more labelled rows have brought more? A word or two, the advantage of general data, and a sentence."""
    more, n, metric = answer["more_rows"], answer["rows"], label_of(answer["metric"])
    if "advantage" not in more:
        short, _, why = more["answer"].partition(": ")
        why = f"{_capital(why)} ({n:,} + {more['rows']})." if why else ""
        return _capital(short), why, why
    names = {"general data": "General data", "labelling": "More labelled rows"}
    brought, labelled, advantage = (
        " ".join(signed(part)) for part in (answer["difference"], more["labelling"], more["advantage"])
    )
    return (
        names.get(more["answer"], _capital(more["answer"])),
        f"general data over labelling: {advantage} in {metric}, above 0 is better",
        f"Improvement of {metric}, above 0 is better: general data with {n:,} rows {brought}; {more['rows']} more labelled "
        f"rows without it ({' or '.join(more['by'])}) {labelled}; general data over labelling {advantage}.",
    )


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
