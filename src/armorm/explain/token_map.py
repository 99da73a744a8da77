"""A response in the terminal (and in numbers for other displays), its words coloured by what they add to the score.

Colours show deviations: contributions minus those of an average token of the text, so that a long response of many
small contributions is readable. Blue raises the mean over the text, red lowers it; the sentences with the largest sums
are named below, so nothing depends on colour. The last line says what this is not: the place of a fault
(docs/attribution.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from armorm.errors import nearest
from armorm.explain.text import signed
from armorm.explain.token_attribution import TextPart, TokenAttribution
from armorm.objectives import ObjectiveError

_NAMED = 3  # sentences of each sign
_LONGEST = 72  # characters of a sentence that are shown
_NOTE = "what the score is made of, not where the fault is; `rm.occlude` scores the response without each sentence"
# From weak to strong; the strongest that lower it are underlined too.
_RAISES = ("blue", "bold blue", "bold white on blue")
_LOWERS = ("red", "underline red", "bold underline white on red")
_LEAST = 0.00005  # a value that is printed as more than zero


@dataclass(frozen=True)
class ShadedWord:
    """A word of a map.

    Attributes:
        part: the word.
        value: its deviation, of the shown objective or the score.
        level: shade, -3 to 3: its value per token against the largest one of the response; 0 for none.
    """

    part: TextPart
    value: float
    level: int


@dataclass(frozen=True)
class TokenMap:
    """How an attribution is shown: as text in a terminal, and by `armorm.explain.word_map` as HTML.

    Attributes:
        attribution: of the response.
        objective: whose contributions are shown; None for the score.

    Raises:
        ObjectiveError: for an unknown objective.
    """

    attribution: TokenAttribution
    objective: str | None = None

    def __post_init__(self) -> None:
        names = self.attribution.names
        if self.objective is not None and self.objective not in names:
            hint = nearest(self.objective, names)
            raise ObjectiveError(f"unknown objective {self.objective!r}{hint}; there are {', '.join(names)}")

    def value(self, values: np.ndarray) -> float:
        """The shown objective's of values (k,), or their sum."""
        if self.objective is None:
            return float(values.sum())
        return float(values[self.attribution.names.index(self.objective)])

    def best_and_worst(self, parts: Sequence[TextPart]) -> tuple[list[TextPart], list[TextPart]]:
        """Up to three parts that are highest per token, and three that are lowest.

        Per token, a planted insult is found more often than by sums, an off-topic sentence about as often
        (docs/attribution.md).
        """
        ranked = sorted(parts, key=lambda part: -self.value(part.deviations) / max(part.tokens, 1e-9))
        best = [part for part in ranked[:_NAMED] if self.value(part.deviations) >= _LEAST]
        return best, [part for part in ranked[::-1][:_NAMED] if self.value(part.deviations) <= -_LEAST]

    def shaded(self, words: Sequence[TextPart]) -> list[ShadedWord]:
        """The words of the response with their shades."""
        values = [self.value(word.deviations) for word in words]
        by_token = [value / word.tokens if word.tokens else 0.0 for word, value in zip(words, values, strict=True)]
        largest = max(map(abs, by_token), default=0.0)
        if largest < _LEAST:  # a single word, up to rounding
            return [ShadedWord(word, value, 0) for word, value in zip(words, values, strict=True)]
        levels = [round(3 * value / largest) for value in by_token]
        return [ShadedWord(*found) for found in zip(words, values, levels, strict=True)]

    @property
    def exactness(self) -> str:
        """Which part of the score the map shows, and how exactly."""
        found = self.attribution
        if found.exact_share == 1:
            return "an exact sum over tokens"
        read = f"{signed(self.value(found.last_contributions))} is read from the last token"
        share = f"{found.exact_share:.0%} of it is an exact sum over tokens, " if found.exact_share else ""
        if found.completeness_error is None:
            return f"{share}{read}, not shown below"
        estimate = f"attributed by integrated gradients (completeness error {found.completeness_error:.2g})"
        return f"{share}{read}, {estimate}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        found = self.attribution
        of = "score" if self.objective is None else self.objective
        yield Text.assemble((f"how the {of} adds up over the response", "bold"), f"   {self.exactness}")
        yield Text("")
        yield self._coloured()
        yield Text("")
        for title, parts, style in zip(
            ("raises it most per token, against an average token:", "lowers it most per token:"),
            self.best_and_worst(found.sentences()),
            ("blue", "red"),
            strict=True,
        ):
            if parts:
                yield Text(title, "bold")
            for part in parts:
                text = " ".join(part.text.split())
                shown = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
                yield Text.assemble((f"  {signed(self.value(part.deviations))}  ", style), shown)
        yield Text(_NOTE, "dim")

    def _coloured(self) -> Text:
        text = Text(self.attribution.places.text)
        for word in self.shaded(self.attribution.words()):
            if word.level:
                styles = _RAISES if word.level > 0 else _LOWERS
                text.stylize(styles[abs(word.level) - 1], word.part.start, word.part.end)
        return text
