"""Ranking of several responses to one prompt: best first, with the verdict between the best two.

Positions are those of the input, from 0. Equal scores keep the order of the input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from armorm.explain.explanation import Explanation
from armorm.explain.response_comparison import ResponseComparison, compare_responses
from armorm.explain.text import as_text, signed
from armorm.notebook import display, html_table, shortened


@dataclass(frozen=True)
class Ranking:
    """Ranked responses.

    Attributes:
        explanations: one per response, in the order of the input.
        order: positions, best first.
        comparison: of the best response, A, and the second, B; None for a single response.
    """

    explanations: list[Explanation]
    order: list[int]
    comparison: ResponseComparison | None

    @property
    def scores(self) -> np.ndarray:
        """(n,) float64, in the order of the input."""
        return np.array([explanation.score for explanation in self.explanations])

    @property
    def best(self) -> int:
        """Position of the best response."""
        return self.order[0]

    @property
    def verdict(self) -> str:
        """How sure it is that the best response is better than the second, and which objectives carry that."""
        if self.comparison is None:
            return self.explanations[0].verdict
        first, second = self.order[:2]
        return self.comparison.in_words({"A": f"Response {first}", "B": f"response {second}"})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without texts."""
        found: dict[str, Any] = {"verdict": self.verdict, "best": self.best, "order": self.order}
        found["scores"] = self.scores.tolist()
        return found if self.comparison is None else {**found, "comparison": self.comparison.to_dict()}

    def show(self) -> None:
        """Show it in a notebook (`_repr_html_`), or print it where there is none."""
        display(self._repr_html_(), lambda width: self.lines())

    def lines(self) -> list[RenderableType]:
        """What a terminal shows."""
        table = Table(box=None, pad_edge=False, header_style="bold")
        for title, side in (("rank", "right"), ("response", "right"), ("score", "right"), ("text", "left")):
            table.add_column(title, justify=side, no_wrap=True, overflow="ellipsis")  # type: ignore[arg-type]
        for row in self._rows():
            table.add_row(*map(Text, row))
        return [Text(self.verdict, "bold"), Text(""), table]

    def _rows(self) -> list[list[str]]:
        found = []
        for rank, position in enumerate(self.order, 1):
            shown = self.explanations[position]
            text = "" if shown.conversation is None else shortened(shown.conversation.response)
            found.append([str(rank), str(position), signed(shown.score), text])
        return found

    def _repr_html_(self) -> str:
        return html_table(self.verdict, ["rank", "response", "score", "text"], self._rows(), left=[3])

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines()


def rank_responses(explanations: Sequence[Explanation], **options: Any) -> Ranking:
    """Ranking of explained responses to one prompt by the same model; options as of `compare_responses`."""
    scores = np.array([explanation.score for explanation in explanations])
    order = np.argsort(-scores, kind="stable").tolist()
    if len(order) < 2:
        return Ranking(list(explanations), order, None)
    comparison = compare_responses(explanations[order[0]], explanations[order[1]], **options)
    return Ranking(list(explanations), order, comparison)
