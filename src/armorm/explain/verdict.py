"""Verdicts: the plain sentence that opens every display, and which rows of a table are shown.

A comparison is *too close to call* if the calibrated probability that the better response is preferred is below 0.60;
without a calibration, if the margin is below a quarter of the standard deviation of the reference scores. An objective
*decides* if the verdict would turn without it alone (`armorm.attribution.turning`); the sentence names the two or three
objectives that carry the verdict. Rows under 2% of the total are folded into one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

CLOSE_PROBABILITY = 0.60
CLOSE_STD = 0.25  # standard deviations of reference scores
FOLDED = 0.02  # of the sum of sizes
NAMED = 3  # objectives of a sentence
_CARRIES = 0.1  # of what speaks for the better response, or against it: the least that is named


@dataclass(frozen=True)
class Reason:
    """An objective in a verdict.

    Attributes:
        name: of the objective.
        value: what it adds to the margin of the first response; of a single response, against an average one.
        higher: whether the first response (or the single one) is rated higher; None if unknown.
    """

    name: str
    value: float
    higher: bool | None = None


def too_close(margin: float, *, probability: float | None = None, margin_in_std: float | None = None) -> bool:
    """Whether a comparison is too close to call.

    Args:
        margin: of the scores.
        probability: that the first response is preferred, from a calibration.
        margin_in_std: the margin in standard deviations of reference scores.
    """
    if probability is not None:
        return max(probability, 1 - probability) < CLOSE_PROBABILITY
    return margin == 0 or (margin_in_std is not None and abs(margin_in_std) < CLOSE_STD)


def pair_verdict(
    first: str,
    second: str,
    margin: float,
    reasons: Iterable[Reason] = (),
    *,
    probability: float | None = None,
    margin_in_std: float | None = None,
) -> str:
    """Which of two responses is better, how sure that is, and the objectives that carry it.

    Args:
        first, second: what the responses are called.
        margin: score of the first minus that of the second; the next three are of the first response too.
        reasons, probability, margin_in_std: as in `too_close` and `Reason`.
    """
    if margin == 0:
        return f"{first} and {second} get the same score."
    if margin < 0:
        turned = [Reason(r.name, -r.value, None if r.higher is None else not r.higher) for r in reasons]
        other = None if probability is None else 1 - probability
        in_std = None if margin_in_std is None else -margin_in_std
        return pair_verdict(second, first, -margin, turned, probability=other, margin_in_std=in_std)
    given = list(reasons)
    carrying = carried_by(given)
    against = carried_by([Reason(r.name, -r.value, r.higher) for r in given])[: NAMED - 1]
    if too_close(margin, probability=probability, margin_in_std=margin_in_std):
        sure = (
            f"{first} is ahead by {margin_in_std:.2f} standard deviations of reference scores"
            if probability is None
            else f"{first} is better with probability {int(100 * probability)}%"  # (59.9% is not 60%)
        )
        sides = ((carrying, first), (against, second))
        speak = [f"for {side}: {listed([reason.name for reason in of])}" for of, side in sides if of]
        return f"Too close to call: {sure}." + (f" Strongest {'; '.join(speak)}." if speak else "")
    verb = "is better than" if probability is not None or margin_in_std is not None else "scores higher than"
    how = ""
    if probability is not None:
        how = f" (probability {'over 99%' if probability > 0.99 else f'{probability:.0%}'})"
    elif margin_in_std is not None:
        how = f" by {margin_in_std:.2f} standard deviations of reference scores"
    why = f": {_rated(carrying)}" if carrying else ""
    but = f", in spite of {listed([r.name for r in against])}" if carrying and _heavy(against, carrying) else ""
    return f"{first} {verb} {second}{how}{why}{but}."


def score_verdict(
    normalised: float | None, percentile: float | None, reasons: Iterable[Reason], corrections: Collection[str] = ()
) -> str:
    """How one response does against the reference responses, and what raises and lowers its score.

    Args:
        normalised: score in standard deviations from the reference mean, None without reference.
        percentile: percentage of reference responses that score lower, 0 to 100, or None.
        reasons: what each objective adds, against a response of average rewards.
        corrections: names of objectives whose part is the debiasing correction; they come last in the sentence.
    """
    parts = []
    if percentile is not None:
        parts.append(f"This response scores higher than {percentile:.0f}% of reference responses.")
    elif normalised is not None:
        near = abs(normalised) < CLOSE_STD
        place = "close to" if near else "above" if normalised > 0 else "below"
        parts.append(f"This response scores {place} the mean of the reference responses.")
    given = list(reasons)
    raising = carried_by(given)[:2]
    lowering = carried_by([Reason(r.name, -r.value) for r in given])[:2]
    sides = [f"raised most by {_named(raising, corrections)}"] if raising else []
    sides += [f"lowered most by {_named(lowering, corrections)}"] if lowering else []
    if sides:
        parts.append(f"It is {', '.join(sides)}.")
    return " ".join(parts) or "This response has average rewards."


def carried_by(reasons: Sequence[Reason]) -> list[Reason]:
    """The one to three largest positive reasons; after the first, only those of at least a tenth of their sum."""
    positive = sorted((reason for reason in reasons if reason.value > 0), key=lambda reason: -reason.value)
    least = _CARRIES * sum(reason.value for reason in positive)
    return positive[:1] + [reason for reason in positive[1:NAMED] if reason.value >= least]


def fold(values: Sequence[float], least: float = FOLDED) -> tuple[list[int], list[int]]:
    """Positions of the rows that are shown, largest first, and of those that are folded: two or more under 2% each."""
    order = sorted(range(len(values)), key=lambda i: -abs(values[i]))
    bound = least * sum(map(abs, values))
    small = [i for i in order if abs(values[i]) < bound]
    return (order, []) if len(small) < 2 else (order[: -len(small)], small)


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


def debiased_note(names: Sequence[str]) -> str:
    """Why objectives that others are debiased against have bars at hardly any weight; empty for none."""
    if not names:
        return ""
    if len(names) == 1:
        said, it = f"{names[0]} has hardly any weight of its own. Its bar is", "it"
    else:
        said, it = f"{listed(names)} have hardly any weight of their own. Their bars are", "them"
    return f"{said} the debiasing correction: the part of the other rewards that varies with {it} is subtracted."


def _named(reasons: Sequence[Reason], corrections: Collection[str]) -> str:
    corrected = [reason.name for reason in reasons if reason.name in corrections]
    others = [reason.name for reason in reasons if reason.name not in corrections]
    return listed([*others, *([f"the correction for {listed(corrected)}"] if corrected else [])])


def _rated(carrying: Sequence[Reason]) -> str:
    higher = [reason.name for reason in carrying if reason.higher]
    lower = [reason.name for reason in carrying if reason.higher is False]
    if len(higher) + len(lower) < len(carrying):
        return f"because of {listed([reason.name for reason in carrying])}"
    sides = [f"higher on {listed(higher)}"] if higher else []
    sides += [f"lower on {listed(lower)}"] if lower else []
    return f"it is rated {' and '.join(sides)}"


def _heavy(against: Sequence[Reason], carrying: Sequence[Reason]) -> bool:
    return sum(r.value for r in against) > 0.5 * sum(r.value for r in carrying)
