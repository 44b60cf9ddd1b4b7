"""What tests for a jump come to, in a word and a sentence, no surer than what such an experiment could have found."""

from collections.abc import Mapping, Sequence

from fulcrum.emergence import LEAST_AICC, LEAST_LEVELS, LEAST_P, JumpTest, detectable, power

MOVED = 0.05  # p of the F test below which the level means are said to differ


def verdict(
    continuous: JumpTest, hard: Mapping[str, JumpTest] | Sequence[JumpTest] = (), *, worth: float = 0.0
) -> tuple[str, str]:
    """One of "jump", "smooth", "metric artefact", "not enough data", and a sentence that says why, with its numbers.

    `hard` are other metrics of the same runs that move in steps (exact match, accuracy): a jump in one of these alone is what
    thresholds make of a smooth curve (Schaeffer et al. 2023, arXiv 2304.15004). "jump" may be a worsening; the sentence then
    says so first. "not enough data": fewer than 7 levels or 2 seeds, or no jump found where one as large as all that the
    curve moves would be missed more often than found; unless the level means do not differ (F test) and one of `worth`, in the
    metric, would be found in 80%: a flat curve moves by noise alone, and may be known well.
    """
    named = dict(hard) if isinstance(hard, Mapping) else {f"hard metric {i + 1}": test for i, test in enumerate(hard)}
    n, seeds = len(continuous.ratios), continuous.seeds
    if n < LEAST_LEVELS or seeds < 2:
        return "not enough data", (
            f"{_flat(continuous)}{n} levels of general data and {seeds} seed{'s' * (seeds != 1)} can show no jump: it takes "
            f"{LEAST_LEVELS} levels, and 2 seeds that agree."
        )
    if continuous.abrupt:
        return "jump", _told(continuous)
    least = detectable(continuous.ratios, continuous.noise, seeds)
    chance = power(continuous.ratios, continuous.noise, seeds, continuous.moves)
    why = _why_not(continuous)
    if chance < 0.5 and not (continuous.still >= MOVED and least <= worth):
        return "not enough data", (
            f"{_flat(continuous)}No jump is shown ({why}), but one as large as all that the curve moves "
            f"({continuous.moves:.3g}) would be found in {chance:.0%} of such experiments only; one of {least:.3g} in 80%. "
            "More levels decide, or more seeds."
        )
    limit = (
        f"A jump of {least:.3g} between the middle levels, flat elsewhere, would be found in 80% of such experiments."
        if continuous.noise
        else "Seeds do not differ, so nothing can be said of what jump would be found."
    )
    artefacts = [f"{name} ({_at(test)})" for name, test in named.items() if test.abrupt]
    if artefacts:
        return "metric artefact", (
            f"{'; '.join(artefacts)} jump{'s' * (len(artefacts) == 1)}, but the continuous metric does not ({why}): the step "
            f"is the hard metric's, not the model's. {limit}"
        )
    if continuous.failed == ("AICc",):  # a step on a slope, as a sigmoid has none to offer; the rule stands, the doubt is said
        return "smooth", (
            f"No jump is claimed ({why}), but an abrupt curve fits better than any smooth one, by more than noise: more levels "
            f"decide. {limit}"
        )
    return "smooth", f"{_flat(continuous)}General data makes no jump in this curve ({why}). {limit}"


def _flat(test: JumpTest) -> str:
    if not test.still >= MOVED:  # nan with one seed, which shows no noise to compare with
        return ""
    return f"No change with general data is shown (F test of the levels, p {_p(test.still)}). "


def _at(test: JumpTest) -> str:
    low, high = test.between
    return (
        f"{test.size:+.3g} at ratio {test.location:.3g}, between the measured {low:g} and {high:g}; "
        f"ΔAICc {test.statistic:.1f}, p {_p(test.p)}"
    )


def _told(test: JumpTest) -> str:
    kind = "An improvement by a jump" if test.improves else "A worsening jump"
    first, second = test.halves
    return (
        f"{kind}: {_at(test)}. Halves of the seeds place it at {first:.3g} and {second:.3g}. The score changes faster there "
        f"than any smooth curve that fits the other levels."
    )


def _why_not(test: JumpTest) -> str:
    """Every condition with its number, and what it lacks where it fails."""
    first, second = test.halves
    aicc_lacks = f", needs {LEAST_AICC:g} over the power law" if "AICc" in test.failed else ""
    p_lacks = f", needs below {LEAST_P:g} against smooth curves" if "p" in test.failed else ""
    told = [f"ΔAICc {test.statistic:.1f}{aicc_lacks}", f"p {_p(test.p)}{p_lacks}"]
    if "replication" in test.failed and test.moves:
        told.append(f"halves of the seeds do not agree on a place or a direction: ratio {first:.3g} and {second:.3g}")
    return "; ".join(told)


def _p(p: float) -> str:
    return f"{p:.2g}" if p >= 0.001 else "below 0.001"
