"""Results as HTML: the verdict with the objectives that decide it, and a card of signed bars for each response.

All texts are escaped. Colours are variables of the page, so that it defines light and dark; every bar has its number
next to it, so that nothing depends on colour.
"""

from __future__ import annotations

from html import escape

import numpy as np

from armorm.serving.playground.reweighting import LETTERS, Reweighted

_BARS = 8  # objectives shown on a card; the others are folded
_MINUS = "\N{MINUS SIGN}"
_ORDINALS = ("1st", "2nd", "3rd", "4th")


def results(reweighted: Reweighted, reference: tuple[float, float] | None) -> str:
    """Verdict and cards; `reference` is mean and standard deviation of the reference scores, if the model has them."""
    batch = reweighted.batch
    largest = float(np.abs(batch.relative).max(initial=0.0)) or 1.0
    parts = [_verdict(reweighted), '<div class="cards">']
    parts += [_card(reweighted, rank, largest, reference) for rank in range(len(batch))]
    parts += [
        f'<article class="card refused"><h3><span class="letter">{LETTERS[row]}</span> no score</h3>'
        f"<p>{escape(reason)}</p></article>"
        for row, reason in batch.rejected
    ]
    return "".join([*parts, "</div>"])


def welcome() -> str:
    """Placeholder before the first results."""
    return (
        '<div class="empty"><p><strong>Scores appear here.</strong></p><p>Each objective is a bar: to the right it '
        "raises the score, to the left it lowers it, compared with a response of average rewards.</p></div>"
    )


def status(text: str, kind: str = "") -> str:
    """The status line, announced by screen readers."""
    return f'<p role="status" aria-live="polite" class="status {kind}">{escape(text)}</p>'


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign."""
    return f"{'+' if value >= 0 else _MINUS}{abs(value):.{digits}f}"


def _verdict(reweighted: Reweighted) -> str:
    margin = reweighted.margin
    if margin is None:
        return ""
    first, second = reweighted.order[:2]
    letters = reweighted.letter(first), reweighted.letter(second)
    if margin == 0:
        return f'<section class="verdict"><h2>{letters[0]} and {letters[1]} are tied</h2></section>'
    names, deciding = reweighted.batch.names, reweighted.deciding
    difference = reweighted.batch.contributions[first] - reweighted.batch.contributions[second]
    ranked = np.argsort(-np.abs(difference), kind="stable").tolist()
    shown = [*deciding, *[i for i in ranked if i not in deciding]][: max(6, len(deciding))]
    largest = float(np.abs(difference).max()) or 1.0
    rows = "".join(
        _bar(names[i], float(difference[i]), largest, note="decides" if i in deciding else "") for i in shown
    )
    named = ", ".join(names[i] for i in deciding[:3])
    more = f" and {len(deciding) - 3} more" if len(deciding) > 3 else ""
    probability = "" if reweighted.probability is None else f", a probability of {reweighted.probability:.0%}"
    return (
        f'<section class="verdict"><h2>{letters[0]} is better than {letters[1]}</h2>'
        f"<p>Margin {margin:.3f}{probability}. "
        f"Decided by <strong>{escape(named)}{more}</strong>.</p>"
        f'<table class="bars"><caption>Contributions to {letters[0]} minus those to {letters[1]}</caption>'
        f"<tbody>{rows}</tbody></table></section>"
    )


def _card(reweighted: Reweighted, rank: int, largest: float, reference: tuple[float, float] | None) -> str:
    batch, row = reweighted.batch, reweighted.order[rank]
    score, values = float(batch.scores[row]), batch.relative[row]
    bars = [
        _bar(
            batch.names[i],
            float(values[i]),
            largest,
            title=f"contribution {signed(float(batch.contributions[row, i]), 4)}",
            note=f"{batch.gating_weights[row, i]:.0%}",
        )
        for i in np.argsort(-np.abs(values), kind="stable").tolist()
    ]
    against_reference = folded = ""
    if reference is not None:
        mean, deviation = reference
        side = "above" if score >= mean else "below"
        against_reference = f"{abs(score - mean) / deviation:.1f} standard deviations {side} the reference mean"
    if bars[_BARS:]:
        folded = (
            f"<details><summary>{len(bars) - _BARS} more objectives</summary>"
            f'<table class="bars"><tbody>{"".join(bars[_BARS:])}</tbody></table></details>'
        )
    first = " first" if rank == 0 and len(batch) > 1 else ""
    return (
        f'<article class="card{first}"><h3><span class="letter">{reweighted.letter(row)}</span>'
        f'<span class="score">{signed(score)}</span><span class="rank">{_ORDINALS[rank]}</span></h3>'
        f'<p class="under">{against_reference}</p><table class="bars">'
        "<caption>Compared with an average response; gating weight</caption>"
        f"<tbody>{''.join(bars[:_BARS])}</tbody></table>{folded}</article>"
    )


def _bar(name: str, value: float, largest: float, *, title: str = "", note: str = "") -> str:
    width = min(abs(value) / largest, 1.0) * 50
    side = "for" if value >= 0 else "against"
    return (
        f'<tr{f" title={chr(34)}{escape(title)}{chr(34)}" if title else ""}><th scope="row">{escape(name)}</th>'
        f'<td class="track" aria-hidden="true"><span class="bar {side}" style="width:{width:.2f}%"></span></td>'
        f'<td class="value">{signed(value)}</td><td class="note">{escape(note)}</td></tr>'
    )
