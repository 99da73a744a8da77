"""Notices: what a reader of a report should know first, in plain words.

In:  the figures of a report.
Out: `Notice`s, each a name and one or two sentences with the numbers that it rests on.

A threshold is a judgement, so each is written down here, and the sentence says the figure itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MOSTLY_LENGTH = 0.6  # |correlation| with the length from which on an objective is mostly that
STILL_LENGTH = 0.3  # the same for what debiasing, or the whole score, should have kept down
COLLAPSED = 0.9  # mean weight of one objective
BLIND = 0.02  # standard deviation of a weight over prompts, below which a gate does not look at them
UNNEEDED = (0.005, 0.02)  # mean and largest weight below which nobody needs an objective
UNPREDICTED = 0.05  # R^2
GAP = 0.1  # accuracy where the longer response is better, less that where it is worse
FEW = 30


@dataclass(frozen=True)
class Notice:
    """One of them.

    Attributes:
        title: what is wrong.
        text: with which figures, and what may be done.
    """

    title: str
    text: str


def of_steering(sentences: Sequence[str]) -> list[Notice]:
    """A model that weighs otherwise than it was trained to."""
    return [Notice("This model is steered", "; ".join(sentences) + ".")] if sentences else []


def of_gate(names: Sequence[str], weights: np.ndarray, biases: Sequence[str]) -> list[Notice]:
    """A collapsed gate, a blind one, objectives without weight.

    Args:
        weights: (m, k) of distinct prompts.
    """
    found = []
    mean, largest = weights.mean(0), weights.max(0)
    top = int(mean.argmax())
    if mean[top] >= COLLAPSED and len(names) > 1:
        found.append(
            Notice(
                "The gate has collapsed",
                f"{names[top]} has {mean[top]:.0%} of the weight on average, whatever is asked: "
                "the score is little more than this one objective.",
            )
        )
    elif len(weights) >= FEW and weights.std(0).max() < BLIND:
        found.append(
            Notice(
                "The gate does not look at the prompt",
                f"No weight varies by more than {weights.std(0).max():.3f} (standard deviation) over {len(weights):,} "
                "prompts: fixed weights would do the same.",
            )
        )
    idle = [
        name
        for name, average, most in zip(names, mean, largest, strict=True)
        if average < UNNEEDED[0] and most < UNNEEDED[1] and name not in biases
    ]
    if idle:
        found.append(
            Notice(
                f"Nobody needs {_listed(idle)}",
                f"On none of {len(weights):,} prompts does the gate give {'it' if len(idle) == 1 else 'one of them'} "
                f"{UNNEEDED[1]:.0%} of the weight.",
            )
        )
    return found


def of_training(gate: Mapping[str, Any]) -> list[Notice]:
    """A gate that was no better than none on its own held-out pairs."""
    accuracy, uniform = gate.get("accuracy"), gate.get("uniform_accuracy")
    if accuracy is None or uniform is None or accuracy > uniform:
        return []
    return [
        Notice(
            "The gate is no better than equal weights",
            f"On the pairs held out in training it is right in {accuracy:.1%}, equal weights in {uniform:.1%}.",
        )
    ]


def of_score(score: float, gap: tuple[float, float, int] | None, *, debiased: bool) -> list[Notice]:
    """A score that goes with length, and one that is right where length is.

    Args:
        score: its pooled correlation with the length of the response.
        gap: accuracy where the longer response is better, where it is worse, pairs on the smaller side.
        debiased: whether a transform takes anything out of the objectives.
    """
    found = []
    if abs(score) >= STILL_LENGTH:
        remedy = "steer its debias_strength" if debiased else "drop what is mostly length, or train it with debias"
        found.append(
            Notice(
                f"The score goes with length ({score:+.2f})",
                f"{'Longer' if score > 0 else 'Shorter'} responses score higher, whatever they say: {remedy}.",
            )
        )
    if gap is not None and gap[2] >= FEW and abs(gap[0] - gap[1]) >= GAP:
        long, short, _ = gap
        found.append(
            Notice(
                f"It is right more often where the {'longer' if long > short else 'shorter'} response is better",
                f"{long:.1%} of the pairs whose better response is the longer one, "
                f"{short:.1%} of those whose better response is the shorter one.",
            )
        )
    return found


def of_length(names: Sequence[str], before: np.ndarray, after: np.ndarray, biases: Sequence[str]) -> list[Notice]:
    """Objectives that are mostly length, the strongest first.

    Args:
        before, after: (k,) pooled correlations of rewards with the length of the response, as predicted and debiased.
        biases: objectives that others are debiased against.
    """
    found, taken_out = [], []
    for column in np.argsort(-np.abs(before), kind="stable"):
        name, plain, debiased = names[column], before[column], after[column]
        if name in biases:
            continue
        mostly = abs(plain) >= MOSTLY_LENGTH
        stays = abs(plain) >= STILL_LENGTH and abs(debiased) >= STILL_LENGTH
        if mostly and not stays:
            taken_out.append((name, plain, debiased))
        elif mostly or stays:
            title = f"{name} is mostly length" if mostly else f"{name} goes with length"
            rest = f"after debiasing {debiased:+.2f}" if biases else "and nothing takes it out"
            found.append(Notice(title, f"Its rewards correlate {plain:+.2f} with the length of the response, {rest}."))
    if taken_out:
        title = f"{_listed([name for name, _, _ in taken_out])} {'is' if len(taken_out) == 1 else 'are'} mostly length"
        figures = "; ".join(f"{plain:+.2f}, after debiasing {debiased:+.2f}" for _, plain, debiased in taken_out)
        subject = "Its rewards correlate" if len(taken_out) == 1 else "In this order, rewards correlate"
        found.append(
            Notice(title, f"{subject} {figures} with the length of the response: debiasing takes most of it out.")
        )
    return found


def of_objectives(reports: Sequence[Mapping[str, Any]]) -> list[Notice]:
    """Objectives that are hardly predicted, and what stage 1 warned of."""
    poor = [entry["objective"] for entry in reports if entry.get("r2") is not None and entry["r2"] < UNPREDICTED]
    found = []
    if poor:
        found.append(
            Notice(
                f"Hardly predicted: {_listed(poor)}",
                f"On held-out folds less than {UNPREDICTED:.0%} of the variance of the ratings is explained (R2).",
            )
        )
    found += [
        Notice(f"{entry['objective']}: a fit to distrust", f"{entry['warning']}.")
        for entry in reports
        if entry.get("warning")
    ]
    return found


def of_accuracy(accuracy: float, interval: tuple[float, float] | None, pairs: int) -> list[Notice]:
    """Preferences no better than chance."""
    if interval is None or interval[0] > 0.5:
        return []
    return [
        Notice(
            "Preferences are predicted no better than by chance",
            f"{accuracy:.1%} of {pairs:,} pairs, 95% interval {interval[0]:.1%} to {interval[1]:.1%}.",
        )
    ]


def of_rows(refused: int, truncated: int, conversations: int) -> list[Notice]:
    """Rows that were not scored, or not whole."""
    found = []
    if refused:
        found.append(Notice(f"{refused:,} of {conversations:,} responses were refused", "They count as wrong."))
    if truncated:
        found.append(
            Notice(
                f"{truncated:,} of {conversations:,} conversations were cut",
                "They lost the beginning of a prompt that was too long.",
            )
        )
    return found


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0]
