"""Results as HTML: the verdict with the objectives that decide it, and a card of signed bars for each response."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from armorm.explain.html import render
from armorm.serving.playground.reweighting import LETTERS, Reweighted

_BARS = 8  # objectives shown on a card; the others are folded
_ORDINALS = ("1st", "2nd", "3rd", "4th")


def results(reweighted: Reweighted, reference: tuple[float, float] | None) -> str:
    """Verdict and cards; `reference` is mean and standard deviation of the reference scores, if the model has them."""
    batch = reweighted.batch
    largest = float(np.abs(batch.relative).max(initial=0.0)) or 1.0
    cards = []
    for rank, row in enumerate(reweighted.order):
        score, under = float(batch.scores[row]), ""
        if reference is not None:
            mean, deviation = reference
            side = "above" if score >= mean else "below"
            under = f"{abs(score - mean) / deviation:.1f} standard deviations {side} the reference mean"
        bars = [
            _bar(batch.names[i], float(batch.relative[row, i]), largest, f"{batch.gating_weights[row, i]:.0%}")
            | {"title": f"contribution {_signed(float(batch.contributions[row, i]), 4)}"}
            for i in np.argsort(-np.abs(batch.relative[row]), kind="stable")
        ]
        card = {"letter": reweighted.letter(row), "score": _signed(score), "rank": _ORDINALS[rank], "under": under}
        cards.append(card | {"bars": bars, "first": rank == 0 and len(batch) > 1})
    rejected = [(LETTERS[row], reason) for row, reason in batch.rejected]
    return render("playground_cards", verdict=_verdict(reweighted), cards=cards, rejected=rejected, shown=_BARS)


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


def _verdict(reweighted: Reweighted) -> dict[str, Any] | None:
    """Which of the first two is better, with a bar for each deciding objective and at least six bars."""
    margin = reweighted.margin
    if margin is None:
        return None
    (first, second), deciding, names = reweighted.order[:2], reweighted.deciding, reweighted.batch.names
    found: dict[str, Any] = {"first": reweighted.letter(first), "second": reweighted.letter(second), "margin": ""}
    if margin == 0:
        return found
    difference = reweighted.batch.contributions[first] - reweighted.batch.contributions[second]
    ranked = np.argsort(-np.abs(difference), kind="stable").tolist()
    shown = [*deciding, *[i for i in ranked if i not in deciding]][: max(6, len(deciding))]
    largest = float(np.abs(difference).max()) or 1.0
    more = f" and {len(deciding) - 3} more" if len(deciding) > 3 else ""
    return found | {
        "margin": f"{margin:.3f}",
        "probability": None if reweighted.probability is None else f"{reweighted.probability:.0%}",
        "deciding": ", ".join(names[i] for i in deciding[:3]) + more,
        "bars": [_bar(names[i], float(difference[i]), largest, "decides" if i in deciding else "") for i in shown],
    }


def _bar(name: str, value: float, largest: float, note: str) -> dict[str, str]:
    width, side = min(abs(value) / largest, 1.0) * 50, "for" if value >= 0 else "against"
    return {"name": name, "side": side, "width": f"{width:.2f}", "value": _signed(value), "note": note}
