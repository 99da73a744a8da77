"""Results as HTML: the verdict, what decides it, and a card of signed bars for each response.

In:  `Weighed`, `Scored`. Out: HTML, every text escaped. Colours are the page's own variables, so that light and dark
     are the page's affair; every bar has its number beside it, so that nothing hangs on colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from armorm.serving.playground.reweighting import Scored, Weighed

_BARS = 8  # objectives of a card shown at once; the rest unfolds
_MINUS = "\N{MINUS SIGN}"


def results(scored: Scored, weighed: Weighed, names: Sequence[str], reference: tuple[float, float] | None) -> str:
    """Everything that was found.

    Args:
        names: of the k objectives.
        reference: mean and standard deviation of reference scores, where the model has them.
    """
    parts = [_verdict(weighed, names)] if weighed.letters else []
    largest = float(np.abs(weighed.relative).max()) or 1.0 if weighed.letters else 1.0
    parts.append('<div class="cards">')
    for rank, place in enumerate(weighed.order):
        parts.append(_card(weighed, place, rank, names, largest, reference))
    parts += [
        f'<article class="card refused"><h3><span class="letter">{letter}</span> no score</h3>'
        f"<p>{escape(reason)}</p></article>"
        for letter, reason in scored.refused.items()
    ]
    return "".join([*parts, "</div>"])


def welcome() -> str:
    """What stands where results will be."""
    return (
        '<div class="empty"><p><strong>Scores will stand here.</strong></p><p>Each objective is a bar: to the right it '
        "speaks for the response, to the left against it, as against a response of average rewards.</p></div>"
    )


def status(text: str, kind: str = "") -> str:
    """The line that says what the page is doing; screen readers speak it."""
    return f'<p role="status" aria-live="polite" class="status {kind}">{escape(text)}</p>'


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    return f"{'+' if value >= 0 else _MINUS}{abs(value):.{digits}f}"


def _verdict(weighed: Weighed, names: Sequence[str]) -> str:
    letters = [weighed.letters[place] for place in weighed.order]
    margin = weighed.margin
    if margin is None:
        return ""
    if margin == 0:
        return f'<section class="verdict"><h2>{letters[0]} and {letters[1]} are level</h2></section>'
    probability = 1 / (1 + np.exp(-margin))
    title = f"{letters[0]} is better than {letters[1]}"
    difference = weighed.contributions[weighed.order[0]] - weighed.contributions[weighed.order[1]]
    ranked = sorted(range(len(names)), key=lambda i: -abs(difference[i]))
    shown = [*weighed.deciding, *[i for i in ranked if i not in weighed.deciding]][: max(6, len(weighed.deciding))]
    largest = float(np.abs(difference).max()) or 1.0
    rows = "".join(
        _bar(names[i], float(difference[i]), largest, note="decides" if i in weighed.deciding else "") for i in shown
    )
    named = ", ".join(names[i] for i in weighed.deciding[:3])
    more = f" and {len(weighed.deciding) - 3} more" if len(weighed.deciding) > 3 else ""
    return (
        f'<section class="verdict"><h2>{title}</h2><p>By {margin:.3f}, which is a probability of {probability:.0%}. '
        f"Decided by <strong>{escape(named)}{more}</strong>.</p>"
        f'<table class="bars"><caption>Why: contributions to {letters[0]} less those to {letters[1]}</caption>'
        f"<tbody>{rows}</tbody></table></section>"
    )


def _card(
    weighed: Weighed,
    place: int,
    rank: int,
    names: Sequence[str],
    largest: float,
    reference: tuple[float, float] | None,
) -> str:
    score, values = float(weighed.scores[place]), weighed.relative[place]
    ranked = sorted(range(len(names)), key=lambda i: -abs(values[i]))
    rows = [
        _bar(
            names[i],
            float(values[i]),
            largest,
            title=_title(weighed, place, i),
            note=f"{weighed.gating_weights[place, i]:.0%}",
        )
        for i in ranked
    ]
    under = ""
    if reference is not None:
        mean, deviation = reference
        side = "above" if score >= mean else "below"
        under = f"{abs(score - mean) / deviation:.1f} standard deviations {side} the reference mean"
    rest = rows[_BARS:]
    unfold = (
        f"<details><summary>{len(rest)} more objectives</summary>"
        f'<table class="bars"><tbody>{"".join(rest)}</tbody></table></details>'
        if rest
        else ""
    )
    crown = " first" if rank == 0 and len(weighed.order) > 1 else ""
    return (
        f'<article class="card{crown}"><h3><span class="letter">{weighed.letters[place]}</span>'
        f'<span class="score">{signed(score)}</span><span class="rank">{_ORDINALS[rank]}</span></h3>'
        f'<p class="under">{under}</p><table class="bars">'
        "<caption>Against an average response; share of the gate</caption>"
        f"<tbody>{''.join(rows[:_BARS])}</tbody></table>{unfold}</article>"
    )


def _title(weighed: Weighed, place: int, i: int) -> str:
    return f"contribution {signed(float(weighed.contributions[place, i]), 4)}"


def _bar(name: str, value: float, largest: float, *, title: str = "", note: str = "") -> str:
    width = min(abs(value) / largest, 1.0) * 50
    side = "for" if value >= 0 else "against"
    return (
        f'<tr{f" title={chr(34)}{escape(title)}{chr(34)}" if title else ""}><th scope="row">{escape(name)}</th>'
        f'<td class="track" aria-hidden="true"><span class="bar {side}" style="width:{width:.2f}%"></span></td>'
        f'<td class="value">{signed(value)}</td><td class="note">{escape(note)}</td></tr>'
    )


_ORDINALS = ("1st", "2nd", "3rd", "4th")
