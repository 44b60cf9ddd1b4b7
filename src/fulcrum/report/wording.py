"""Say in words what a certificate holds as codes and numbers.

The terminal, the page and the run's report all take their sentences from here, so they cannot
disagree.

Invariant: every number has its interval, or says that it has none.
"""

import math

from fulcrum.report.summary import decimal, label_of
from fulcrum.stats.certificate import Answer, Budget, Certificate, Contradiction, Design, Worth
from fulcrum.stats.intervals import Interval
from fulcrum.stats.row_savings import Factor

_CONTENT = (
    "Against general rows whose answers teach nothing: what is left comes from the content of the "
    "general rows."
)
# The parts of a difference, by code: a name, the arms that are compared, how to read it.
PARTS = {
    "mixing": (
        "mixing",
        "mix − sft",
        "General rows in the stream, no anchor: what mixing alone brings.",
    ),
    "anchor_within_mix": (
        "anchor within the mix",
        "tell − mix",
        "The same mixed stream, the anchor in every task prompt: what the anchor adds to the mix.",
    ),
    "interaction": (
        "interaction of anchor and mix",
        "",
        "What the anchor brings within the mix, less what it brings without general rows. If its "
        "interval holds 0, anchor and mix were not shown to do more together than apart.",
    ),
    "shuffle": (
        "shuffle",
        "tell − general_then_task",
        "The same rows, shuffled together instead of one source after the other: what the order "
        "brings.",
    ),
    "equal_exposures": (
        "equal exposures",
        "tell − sft_matched",
        "Against SFT with the anchor and as many passes over the task rows: what general rows "
        "bring on top. SFT was not tuned here, so this is no comparison of methods.",
    ),
    "transfer_over_permuted": ("transfer", "tell − placebo_permuted", _CONTENT),
    "transfer_over_own_answers": ("transfer", "tell − placebo_own_answers", _CONTENT),
}
# How the lowest and the highest value tried are called, and what lies beyond each.
_EXTREMES = {
    "repeats": (("fewest epochs", "fewer"), ("most epochs", "more")),
    "learning_rate": (
        ("lowest learning rate", "a lower one"),
        ("highest learning rate", "a higher one"),
    ),
}
_ENOUGH_SEEDS = 5  # for intervals to be narrow


# ---- numbers


def number(value: float, *, signed: bool = False, percents: bool = False) -> str:
    """Return a number as text: "0.412", with its sign "+0.412", or "41%"; "unknown" for nan."""
    if math.isnan(value):
        return "unknown"
    if percents:
        return percent(value)
    text = decimal(value)
    is_above_0 = not text.startswith("−") and float(text) > 0
    return f"+{text}" if signed and is_above_0 else text


def percent(share: float) -> str:
    """Return a share as percent; only 0 and 1 themselves become 0% and 100%."""
    text = f"{100 * share:.0f}%"
    if text == "0%" and share > 0:
        return "<1%"
    return ">99%" if text == "100%" and share < 1 else text


def parts_of(
    interval: Interval, *, signed: bool = False, percents: bool = False
) -> tuple[str, str]:
    """Return a number and its 95% interval: "0.412" and "[0.380, 0.445]"."""
    value = number(interval.estimate, signed=signed, percents=percents)
    ends = [interval.low, interval.high]
    if not all(map(math.isfinite, (interval.estimate, *ends))):
        return value, "(no interval)"
    texts = []
    for end in ends:
        if percents:  # a draw of a share may pass 0 or 1; nobody can read a share of -2%
            end = min(max(end, 0.0), 1.0)
        texts.append(number(end, signed=signed, percents=percents))
    return value, f"[{', '.join(texts)}]"


def with_interval(interval: Interval, *, signed: bool = False, percents: bool = False) -> str:
    """Return a number with its 95% interval: "0.412 [0.380, 0.445]"."""
    return " ".join(parts_of(interval, signed=signed, percents=percents))


def difference(interval: Interval) -> str:
    """Return a difference with its interval, each with its sign: "−0.106 [−0.118, −0.092]"."""
    return with_interval(interval, signed=True)


def factor_parts(factor: Factor) -> tuple[str, str]:
    """Return a factor and its interval: "2.6×" and "[2.4, 2.8]", or "at least 4.0×"."""
    value = f"{_end(factor.estimate, factor)}×"
    if math.isnan(factor.low) or math.isnan(factor.high):
        return value, "(no interval)"
    if _is_censored_whole(factor):
        return value, "(as is its whole interval)"
    return value, f"[{_end(factor.low, factor)}, {_end(factor.high, factor)}]"


def factor(worth: Worth, unit: str = "rows") -> str:
    """Return a row saving or gain in `unit` with its interval, or that it is not identifiable."""
    if not worth.identifiable:
        return "not identifiable"
    in_unit = worth.tokens if unit == "tokens" else worth.rows
    return "" if in_unit is None else " ".join(factor_parts(in_unit))


def _end(value: float, factor: Factor) -> str:
    if value == 0:
        return f"below {factor.least:.1f}"
    if value == math.inf:
        return f"at least {factor.most:.1f}"
    return "unknown" if math.isnan(value) else f"{value:.1f}"


def _is_censored_whole(factor: Factor) -> bool:
    return factor.low == factor.high == factor.estimate and factor.low in (0, math.inf)


def saved_rows(saving: Factor, n: int, *, short: bool = False) -> str:
    """Say how many rows would have sufficed: "40 of 64 rows would have sufficed (28 to 53)"."""
    if saving.most <= 1:
        return f"not measured: no smaller size than {n} rows"
    span = ""
    if not math.isnan(saving.low) and not math.isnan(saving.high):
        span = f" ({_needed(saving.high, saving, n)} to {_needed(saving.low, saving, n)})"
    if saving.low == saving.high and saving.estimate in (0, math.inf):
        span = ""
    if saving.estimate == 0:
        return f"not even all {n:,} rows suffice{span}"
    sufficed = "" if short else " would have sufficed"
    if saving.estimate == math.inf:
        return f"{n / saving.most:,.0f} of {n:,} rows or fewer{sufficed}{span}"
    return f"{_needed(saving.estimate, saving, n)} of {n:,} rows{sufficed}{span}"


def _needed(value: float, saving: Factor, n: int) -> str:
    if value == math.inf:
        return f"≤{n / saving.most:,.0f}"
    if value == 0:
        return f"more than {n:,}"
    return "unknown" if math.isnan(value) else f"{n / value:,.0f}"


def gained_rows(gain: Factor, size: int, arm: str) -> str:
    """Say what `size` rows of an arm were worth in rows without general data."""
    span = ""
    is_known = not math.isnan(gain.low) and not math.isnan(gain.high)
    if is_known and not (gain.low == gain.high and gain.low in (0, math.inf)):
        span = f" ({_worth(gain.low, gain, size)} to {_worth(gain.high, gain, size)})"
    worth = _worth(gain.estimate, gain, size)
    return f"{size:,} rows of {arm} were worth {worth}{span} rows without general data"


def _worth(value: float, gain: Factor, size: int) -> str:
    if value == math.inf:
        return f"at least {size * gain.most:,.0f}"
    if value == 0:
        return f"fewer than {size * gain.least:,.0f}"
    return "unknown" if math.isnan(value) else f"{size * value:,.0f}"


# ---- verdicts


def headline(certificate: Certificate) -> str:
    """Return what the certificate says, in a sentence or two."""
    answer, question = certificate.answer, certificate.question
    best = answer.reference.arm
    moved = f"{_moved(answer)} at {answer.rows} rows against {best}"
    if answer.seeds == 1:
        moved += "; intervals are given this one seed and say nothing of another training run"
    contradiction = certificate.contradiction
    if answer.verdict == "unknown":
        why = "nothing varied between seeds and test groups"
        return f"Can't tell: {why}. {question.arm}: {moved}."
    if answer.verdict != "gain":
        lead = "No gain shown" if answer.verdict == "no_gain" else "Worse"
        but = "" if contradiction is None else f", although {contradicted(contradiction)}"
        return f"{lead}: use {best}{but}. {question.arm}: {moved}."
    if contradiction is not None:
        return (
            f"Mixed: {contradicted(contradiction)}. We therefore state no row saving. "
            f"{question.arm}: {moved}."
        )
    if answer.saving.identifiable and answer.saving.rows.most > 1:
        return f"{_saved(answer.saving.rows, answer.rows)}; {moved}."
    if answer.gain is not None:
        return f"{_gained(answer.gain.rows, answer.rows)}; {moved}."
    why = f"{question.arm} was measured at no smaller size"
    if not answer.saving.identifiable:
        why = not_identifiable(answer)
    return (
        f"Better than {best}, but we can't say how many rows that is worth: {why}. "
        f"{question.arm}: {moved}."
    )


def _moved(answer: Answer) -> str:
    return f"{label_of(answer.metric)} {difference(answer.difference)}"


def _saved(saving: Factor, n: int) -> str:
    """Say a row saving: "40 of your 64 rows would have sufficed: row saving 1.6× [1.2, 2.3]"."""
    fewer = f"{n / saving.most:.0f} of your {n} rows or fewer"
    if math.isfinite(saving.estimate):
        fewer = f"{n / saving.estimate:.0f} of your {n} rows"
    return f"{fewer} would have sufficed: row saving {' '.join(factor_parts(saving))}"


def _gained(gain: Factor, n: int) -> str:
    """Say a row gain: "Your 32 rows were worth 94 without general data: row gain 2.9× [2.1, 4]"."""
    worth = _worth(gain.estimate, gain, n)
    times = " ".join(factor_parts(gain))
    return f"Your {n} rows were worth {worth} without general data: row gain {times}"


def contradicted(contradiction: Contradiction) -> str:
    """Say how two metrics contradict each other."""
    first, second = map(label_of, contradiction.metrics)
    if contradiction.code == "verdicts":
        return f"{first} is better, and {second} is worse"
    what = {"savings": "row savings", "gains": "row gains"}[contradiction.code]
    return f"the {what} by {first} and by {second} contradict each other"


def badge(answer: Answer, contradiction: Contradiction | None = None) -> tuple[str, str, str]:
    """Return a sign, a kind (for its colour) and words for a verdict: none says it alone."""
    if answer.verdict == "loss":
        return "▼", "loss", "Loss"
    if answer.verdict == "unknown":
        return "?", "unknown", "Can't tell"
    if answer.verdict == "no_gain":
        return "=", "none", "No gain shown"
    if contradiction is not None:
        return "≠", "unclear", "Gain by the first metric, contradicted by another"
    if not answer.saving.identifiable and answer.gain is None:
        return "▲", "unclear", "Gain, its worth in rows not identifiable"
    return "▲", "gain", "Gain"


def direction(answer: Answer) -> str:
    """Say which way is better."""
    return "lower is better" if answer.lower_is_better else "higher is better"


def selected_by(answer: Answer) -> str:
    """Say by which scores the reference was selected."""
    if answer.selected_on == "test":
        return "test scores, which favours the reference"
    return "dev scores"


def not_identifiable(answer: Answer) -> str:
    """Say why no factor is stated, after "because"."""
    slope = answer.slope
    if math.isnan(slope.estimate):
        return "the reference was measured with one number of rows only"
    doubling = f"{label_of(answer.metric)} {difference(slope)} with each doubling"
    if math.isnan(slope.low):
        return f"nothing is known of other seeds and test groups ({doubling})"
    if answer.improvement(slope).low <= 0:
        return f"more rows do not clearly improve the reference ({doubling})"
    return (
        f"more rows improve the reference as a whole ({doubling}), but not clearly towards "
        f"{answer.rows} rows"
    )


def more_rows(answer: Answer) -> tuple[str, str, str]:
    """Say whether more labelled rows would have brought more: in a word, briefly, in full."""
    more, n, metric = answer.more_rows, answer.rows, label_of(answer.metric)
    if more.choice == "unmeasured":
        why = f"The reference was not measured with so many ({n:,} + {more.rows})."
        return "Can't tell", why, why
    short = {
        "general_data": "General data",
        "labelling": "More labelled rows",
        "undecided": "Cannot be told apart",
    }[more.choice]
    advantage = difference(more.advantage)
    return (
        short,
        f"general data − labelling: {advantage} in {metric}, {direction(answer)}",
        f"Change of {metric}, {direction(answer)}: general data with {n:,} rows "
        f"{difference(answer.difference)}; {more.rows} more labelled rows without it "
        f"({' or '.join(more.references)}) {difference(more.labelling)}; general data − labelling "
        f"{advantage}.",
    )


# ---- notes


def notes(certificate: Certificate) -> list[str]:
    """Return what a reader must know about how a run made the outcomes; nothing without a run."""
    design, answer = certificate.question.design, certificate.answer
    if design is None:
        return []
    texts = [_tuning(design)]
    if answer.selected_on == "test":
        texts.append(
            "The reference is the best arm without general data by its test scores, selected anew "
            "in each draw: that favours it, and intervals allow for it."
        )
    if "nll_tempered" in certificate.question.metrics:
        texts.append(
            "nll_tempered is the loss after each arm's logits are divided by a temperature, fitted "
            "where its settings were chosen: a gain by nll that it does not show is one of "
            "calibration. (An arm that takes another's settings takes its temperature; word counts "
            "have none.)"
        )
    trials = [f"{arm} {count}" for arm, count in design.trials.items()]
    texts.append(f"Settings tried: {', '.join(trials)}.")
    texts += _favoured(design)
    texts += dict.fromkeys(_best_at_end(design))
    for cell in design.diverged:
        texts.append(
            f"{cell.arm} at {cell.size} rows, seed {cell.seed}: the training on all rows diverged "
            f"with {cell.trial}, which was best; the next best setting was used."
        )
    if design.all_rows is not None:
        texts.append(
            f"{design.all_rows} rows are all that there are: at this size intervals hold given "
            "these rows."
        )
    if answer.seeds < _ENOUGH_SEEDS:
        seeds = "1 seed" if answer.seeds == 1 else f"{answer.seeds} seeds"
        texts.append(f"{seeds}: fewer than the {_ENOUGH_SEEDS} that make intervals narrow.")
    if design.budget is not None:
        texts.append(left_out(design.budget))
    if design.test_rows is not None:
        each = "apart from training"
        if answer.seeds > 1:
            each = "each of them at one seed, where nothing was trained on it"
        texts.append(f"No test file: {design.test_rows} of the rows were test rows, {each}.")
    return texts


def left_out(budget: Budget) -> str:
    """Say what a comparison has less of than the full design."""
    aim = "Compared with the full design"
    if budget.seconds is not None:
        aim = f"To fit {budget.seconds / 60:.0f} minutes"
    return f"{aim}: {', '.join(budget.left_out)}."


def _tuning(design: Design) -> str:
    where = "each seed"
    if design.tune == "first":
        where = "the first seed, for all seeds"
    return (
        f"Settings were chosen by {design.folds}-fold cross-validation inside the task rows of "
        f"{where}, so on {design.folds - 1}/{design.folds} of the rows; test rows were scored once."
    )


def _favoured(design: Design) -> list[str]:
    trials = {arm: design.trials[arm] for arm in design.trained}
    most = max(trials.values(), default=0)
    favoured = [arm for arm, count in trials.items() if count == most]
    if not favoured or len(favoured) == len(trials):
        return []
    return [
        f"More settings were tried for {', '.join(favoured)} than for other trained arms, which "
        "favours them."
    ]


def _best_at_end(design: Design) -> list[str]:
    texts = []
    for end in design.at_end:
        lowest, highest = _EXTREMES[end.name]
        extreme, more = highest if end.chosen == end.most else lowest
        texts.append(
            f"{end.arm} at {end.size} rows was best with the {extreme} tried "
            f"({end.chosen:g}, of {end.least:g} to {end.most:g}); {more} might be better."
        )
    return texts


# ---- a quick look


def quick_answer(answer: Answer) -> str:
    """Say go, no go, or that nobody can tell yet, and how sure that is."""
    steepness = "one number of rows alone does not show what more rows bring"
    if not math.isnan(answer.slope.estimate):
        doubling = difference(answer.slope)
        steepness = f"without general data each doubling of the rows changes it by {doubling}"
    metric = label_of(answer.metric)
    return (
        f"{_advise(answer)}. General data changed {metric} by {difference(answer.difference)} at "
        f"{answer.rows} rows ({direction(answer)}); {steepness}. {_certainty(answer)}"
    )


def _advise(answer: Answer) -> str:
    slope = answer.improvement(answer.slope)
    moved = answer.improvement(answer.difference)
    more_rows_help = slope.low > 0
    if any(map(math.isnan, (slope.low, slope.high, moved.low, moved.high))):
        return "Can't tell"
    if answer.verdict == "gain":
        return "Go" if more_rows_help else "Go for the gain, though not for its worth in rows"
    if answer.verdict == "loss":
        return "No go"
    if slope.high <= 0:
        return "No go: more rows bring nothing here, so that none can be saved"
    return "Can't tell yet" if more_rows_help else "Can't tell yet, nor whether more rows help"


def _certainty(answer: Answer) -> str:
    if answer.seeds == 1:
        return "One seed says nothing of other seeds."
    low, high = answer.difference.low, answer.difference.high
    if math.isnan(low) or math.isnan(high):
        return f"{answer.seeds} seeds give no interval here."
    half = (high - low) / 2
    expected = _half_width_at(_ENOUGH_SEEDS, half, answer.seeds)
    return (
        f"{answer.seeds} seeds leave ±{half:.3f}; {_ENOUGH_SEEDS} would leave about "
        f"±{expected:.3f}, at best."
    )


def _half_width_at(wanted: int, half: float, seeds: int) -> float:
    """Return the half width of a t interval with `wanted` seeds; test rows may keep it wider."""
    from scipy.special import stdtrit

    t_wanted, t_now = stdtrit(wanted - 1, 0.975), stdtrit(seeds - 1, 0.975)
    return float(half * math.sqrt(seeds / wanted) * t_wanted / t_now)
