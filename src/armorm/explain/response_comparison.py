"""Contrast: two responses to one prompt, and which objectives decide between them.

In:  two explanations by one model; or two scores of a model that has nothing to explain.
Out: `Contrast`: prints as a table with a bar for each objective, `to_dict`, `to_html`.

The differences of contributions sum to the margin, so the two responses are compared exactly. What decides is
the smallest set of objectives without which the preference would not hold (`attribution.deciding`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from armorm.attribution import deciding
from armorm.conversation import Conversation
from armorm.explain.explanation import Explanation, as_text, signed, signed_bar
from armorm.explain.html import render
from armorm.steering import sentences


@dataclass(frozen=True)
class ObjectiveContrast:
    """One objective of two responses.

    Attributes:
        name: of the objective.
        ratings: predicted ratings of A and B on the raw scale; `low` and `high` are its ends.
        uncertainties: their standard deviations, None where the model carries none.
        weight: gating weight for the prompt.
        contributions: of A and B.
        difference: contribution of A minus that of B.
        decides: whether the preference would not hold without it.
    """

    name: str
    low: float
    high: float
    ratings: tuple[float, float]
    uncertainties: tuple[float | None, float | None]
    weight: float
    contributions: tuple[float, float]
    difference: float
    decides: bool


@dataclass(frozen=True)
class Contrast:
    """Two scores and what they differ by.

    Attributes:
        scores: of A and B.
        margin: score of A minus score of B.
        better: `A` or `B`, None for a tie.
        probability_of_a: that A is preferred, by the Bradley-Terry model.
        percentiles: share of reference responses that score lower than A and B, 0 to 100, or None.
        shares: one an objective, in the model's order; empty for a model without objectives.
        model: its name.
        steered: what was changed in its weighing.
    """

    scores: Mapping[str, float]
    margin: float
    better: str | None
    probability_of_a: float
    percentiles: Mapping[str, float | None]
    shares: list[ObjectiveContrast] = field(default_factory=list)
    model: str = ""
    steered: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ranked(self) -> list[ObjectiveContrast]:
        """Objectives by the size of their difference."""
        return sorted(self.shares, key=lambda share: -abs(share.difference))

    @property
    def decided_by(self) -> list[str]:
        """Objectives that decide, the strongest first."""
        return [share.name for share in self.ranked if share.decides]

    @property
    def verdict(self) -> str:
        """Which one is better."""
        return f"{self.better} is better" if self.better else "a tie"

    @property
    def likelihood(self) -> float:
        """Probability that the better one is preferred."""
        return max(self.probability_of_a, 1 - self.probability_of_a)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        found: dict[str, Any] = {
            "better": self.better,
            "scores": dict(self.scores),
            "margin": self.margin,
            "probability_of_a": self.probability_of_a,
            "percentiles": dict(self.percentiles),
            "model": self.model,
            "steered": dict(self.steered),
        }
        if self.shares:
            found["contributions"] = {share.name: share.difference for share in self.shares}
            found["decided_by"] = self.decided_by
            found["objectives"] = [asdict(share) for share in self.shares]
        return found

    def to_html(self, conversations: Sequence[Conversation] = ()) -> str:
        """One self-contained page, with the texts where the two conversations are given."""
        return render(
            "contrast",
            found=self,
            steered=sentences(self.steered),
            prompt=list(conversations[0].prompt) if conversations else [],
            responses={name: c.response for name, c in zip("AB", conversations, strict=False)},
        )

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        head = Text.assemble(
            (self.verdict, "bold cyan"),
            f"  A {signed(self.scores['A'])}, B {signed(self.scores['B'])}, margin {signed(self.margin)}",
            f", probability {self.likelihood:.0%}" if self.better else "",
        )
        if self.percentiles["A"] is not None and self.percentiles["B"] is not None:
            head.append(f"\nabove {self.percentiles['A']:.0f}% and {self.percentiles['B']:.0f}% of reference responses")
        if self.steered:
            head.append(f"\nsteered: {'; '.join(sentences(self.steered))}", "yellow")
        yield Group(head, Text(""), self._table(options.max_width)) if self.shares else head

    def _table(self, width: int) -> Table:
        wide = width >= 100
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), show_footer=True)
        table.footer_style = "bold"
        table.add_column("objective", "margin", max_width=36, overflow="ellipsis", no_wrap=True)
        table.add_column("A", justify="right", no_wrap=True)
        table.add_column("B", justify="right", no_wrap=True)
        if wide:
            table.add_column("of", style="dim", no_wrap=True)
        table.add_column("weight", justify="right", no_wrap=True)
        half = 11 if wide else 6
        table.add_column("for B".center(half) + "│" + "for A".center(half), no_wrap=True)
        table.add_column("differs", signed(self.margin), justify="right", no_wrap=True)
        table.add_column("")
        largest = max(abs(share.difference) for share in self.shares) or 1.0
        for share in self.ranked:
            ratings = [_rating(*pair, wide) for pair in zip(share.ratings, share.uncertainties, strict=True)]
            table.add_row(
                Text(share.name),
                *ratings,
                *([f"{share.low:.3g}..{share.high:.3g}"] if wide else []),
                f"{share.weight:.1%}",
                signed_bar(share.difference / largest, 2 * half),
                signed(share.difference),
                Text("decides" if share.decides else "", style="bold"),
            )
        return table


def contrast(first: Explanation, second: Explanation) -> Contrast:
    """What two explained responses to one prompt differ by.

    Args:
        first, second: A and B, by the same model.
    """
    differences = np.array([a.contribution - b.contribution for a, b in zip(first.shares, second.shares, strict=True)])
    decides = deciding(differences[None])[0]
    shares = [
        ObjectiveContrast(
            name=a.name,
            low=a.low,
            high=a.high,
            ratings=(a.rating, b.rating),
            uncertainties=(a.uncertainty, b.uncertainty),
            weight=a.weight,
            contributions=(a.contribution, b.contribution),
            difference=float(difference),
            decides=bool(decided),
        )
        for a, b, difference, decided in zip(first.shares, second.shares, differences, decides, strict=True)
    ]
    plain = contrast_of_scores(first.score, second.score, first.model)
    return Contrast(
        plain.scores,
        plain.margin,
        plain.better,
        plain.probability_of_a,
        {"A": first.percentile, "B": second.percentile},
        shares,
        first.model,
        first.steered or {},
    )


def contrast_of_scores(first: float, second: float, model: str = "") -> Contrast:
    """The contrast of two scores of a model that has no objectives."""
    margin = first - second
    better = "A" if margin > 0 else "B" if margin < 0 else None
    probability = 1 / (1 + math.exp(-margin)) if margin > 0 else math.exp(margin) / (1 + math.exp(margin))
    return Contrast({"A": first, "B": second}, margin, better, probability, {"A": None, "B": None}, model=model)


def _rating(value: float, uncertainty: float | None, wide: bool) -> str:
    return f"{value:.2f}" if uncertainty is None or not wide else f"{value:.2f} ±{uncertainty:.2f}"
