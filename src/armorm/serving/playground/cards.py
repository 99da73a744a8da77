"""Results as HTML: the verdict with the objectives that carry it, and a card for each response: bars, and its words."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from armorm.attribution import turning
from armorm.explain.explanation import HARDLY
from armorm.explain.html import render
from armorm.explain.token_attribution import TokenAttribution
from armorm.explain.verdict import Reason, debiased_note, fold, pair_verdict
from armorm.explain.word_map import word_map
from armorm.serving.playground.reweighting import LETTERS, Reweighted

_ORDINALS = ("1st", "2nd", "3rd", "4th")


def results(
    reweighted: Reweighted,
    reference: tuple[float, float] | None,
    words: Sequence[TokenAttribution] = (),
    biases: Sequence[str] = (),
) -> str:
    """Verdict and cards.

    Args:
        reference: mean and standard deviation of the reference scores, if the model has them.
        words: the scores by token, under the weights of `reweighted`; empty for none.
        biases: objectives that others are debiased against.
    """
    batch = reweighted.batch
    largest = float(np.abs(batch.relative).max(initial=0.0)) or 1.0
    cards = []
    for rank, row in enumerate(reweighted.order):
        score, under = float(batch.scores[row]), ""
        if reference is not None:
            mean, deviation = reference
            side = "above" if score >= mean else "below"
            under = f"{abs(score - mean) / deviation:.1f} standard deviations {side} the reference mean"
        shown, folded = fold(batch.relative[row].tolist())
        bars, others = (
            [
                _bar(batch.names[i], float(batch.relative[row, i]), largest, f"{batch.gating_weights[row, i]:.0%}")
                | {"title": f"contribution {_signed(float(batch.contributions[row, i]), 4)}"}
                for i in rows
            ]
            for rows in (shown, folded)
        )
        hardly = [i for i in shown if batch.names[i] in biases and batch.gating_weights[row, i] < HARDLY]
        card: dict[str, Any] = {
            "letter": reweighted.letter(row),
            "score": _signed(score),
            "rank": _ORDINALS[rank],
            "under": under,
        }
        card |= {"bars": bars, "others": others, "together": _signed(float(batch.relative[row, folded].sum()))}
        card |= {"note": debiased_note([batch.names[i] for i in hardly])}
        card |= {"words": word_map(words[row]) if len(words) else ""}
        cards.append(card | {"first": rank == 0 and len(batch) > 1})
    rejected = [(LETTERS[row], reason) for row, reason in batch.rejected]
    return render("playground_cards", verdict=_verdict(reweighted, reference), cards=cards, rejected=rejected)


def welcome() -> str:
    """Placeholder before the first results."""
    return (
        '<div class="empty"><p><strong>Scores appear here.</strong></p><p>Each objective is a bar: to the right it '
        "raises the score, to the left it lowers it, compared with a response of average rewards.</p></div>"
    )


def status(text: str, kind: str = "") -> str:
    """The status line, announced by screen readers."""
    return f'<p role="status" aria-live="polite" class="status {kind}">{escape(text)}</p>'


def _signed(value: float, digits: int = 3) -> str:
    return f"{'+' if value >= 0 else chr(0x2212)}{abs(value):.{digits}f}"  # (with a typographic minus)


def _verdict(reweighted: Reweighted, reference: tuple[float, float] | None) -> dict[str, Any] | None:
    """The sentence on the first two, and what carries their difference."""
    margin = reweighted.margin
    if margin is None:
        return None
    (first, second), batch = reweighted.order[:2], reweighted.batch
    names = reweighted.letter(first), reweighted.letter(second)
    difference = batch.contributions[first] - batch.contributions[second]
    reasons = [
        Reason(name, float(value), bool(higher))
        for name, value, higher in zip(batch.names, difference, reweighted.higher(first, second), strict=True)
    ]
    in_std = None if reference is None else margin / reference[1]
    sentence = pair_verdict(*names, margin, reasons, probability=reweighted.probability, margin_in_std=in_std)
    found: dict[str, Any] = {"sentence": sentence, "first": names[0], "second": names[1], "bars": []}
    if margin == 0:
        return found
    shown, folded = fold(difference.tolist())
    decides, largest = turning(difference)[0], float(np.abs(difference).max()) or 1.0
    found["bars"] = [
        _bar(batch.names[i], float(difference[i]), largest, "decides" if decides[i] else "") for i in shown
    ]
    if folded:
        found["bars"].append(_bar(f"{len(folded)} others", float(difference[folded].sum()), largest, "together"))
    return found


def not_scored(reason: str) -> str:
    """In place of results: why there are none."""
    return f'<div class="empty"><p><strong>No score.</strong></p><p>{escape(reason)}</p></div>'


def _bar(name: str, value: float, largest: float, note: str) -> dict[str, str]:
    width, side = min(abs(value) / largest, 1.0) * 50, "for" if value >= 0 else "against"
    return {"name": name, "side": side, "width": f"{width:.2f}", "value": _signed(value), "note": note}
