"""HTML heat map of the words of a response: one component for pages, report cards, the playground and notebooks.

The response is drawn once for the score and once for each objective that moves it; radio buttons switch between them
by style sheet alone, so that the component needs no script and no other file. A word that lowers the mean over the text
is underlined (the stronger, the thicker) as well as coloured, so the map reads in greyscale; the sentences with the
largest sums are named below it as text, for screen readers. Hovering over (or tapping) a word shows the word, the
objective and the amount. Texts are escaped by the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from armorm.explain.html import render
from armorm.explain.text import signed
from armorm.explain.token_attribution import TextPart, TokenAttribution
from armorm.explain.token_map import ShadedWord, TokenMap
from armorm.explain.verdict import fold

MOST_OBJECTIVES = 10
MOST_WORDS = 12_000  # in all drawings of a map together: about a megabyte
_LONGEST = 160  # characters of a named sentence


@dataclass(frozen=True)
class Drawing:
    """The response shaded for the score or one objective.

    Attributes:
        name: of the objective, or `score`.
        css_name: the name as a CSS string.
        total: its contribution.
        words: each with the text between the previous word and it.
        end: text after the last word.
        exactness: how exact the map is.
        raises, lowers: parts that raise and lower the mean over the text most, each with its sum.
    """

    name: str
    css_name: str
    total: str
    words: list[tuple[str, ShadedWord]]
    end: str
    exactness: str
    raises: list[tuple[str, str]]
    lowers: list[tuple[str, str]]


def word_map(attribution: TokenAttribution, title: str = "How the score adds up") -> Markup:
    """The map of a response, with its style sheet, as part of a page.

    Args:
        title: heading of the map.
    """
    words, sentences = attribution.words(), attribution.sentences()
    chosen = shown_objectives(attribution)[: max(0, min(MOST_OBJECTIVES, MOST_WORDS // max(len(words), 1) - 1))]
    named = sentences if len(sentences) > 2 else words
    drawings = [_drawing(TokenMap(attribution, name), words, named) for name in (None, *chosen)]
    hidden = len(attribution.names) - len(chosen)
    return Markup(render("word_map", title=title, drawings=drawings, hidden=hidden))


def shown_objectives(attribution: TokenAttribution) -> list[str]:
    """Objectives whose words move the score, the one that moves it most first; those under 2% of all are left out."""
    moved = np.abs(attribution.token_deviations).sum(0)
    return [attribution.names[i] for i in fold(moved.tolist())[0]]


def _drawing(shown: TokenMap, words: Sequence[TextPart], named: Sequence[TextPart]) -> Drawing:
    text, at, drawn = shown.attribution.places.text, 0, []
    for word in shown.shaded(words):
        drawn.append((text[at : word.part.start], word))
        at = word.part.end
    best, worst = shown.best_and_worst(named)
    name = shown.objective or "score"
    return Drawing(
        name,
        _css_string(name),
        signed(shown.value(shown.attribution.contributions)),
        drawn,
        text[at:],
        shown.exactness,
        _named(shown, best),
        _named(shown, worst),
    )


def _named(shown: TokenMap, parts: Sequence[TextPart]) -> list[tuple[str, str]]:
    found = []
    for part in parts:
        text = " ".join(part.text.split())
        value = signed(shown.value(part.deviations))
        found.append((text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…", value))
    return found


def _css_string(text: str) -> str:
    """A text as a CSS string that no text can end early."""
    return '"' + "".join(c if c.isalnum() or c in " -_" else f"\\{ord(c):x} " for c in text) + '"'
