"""Explanation: one score, taken apart for a person.

In:  the attribution of one conversation, the objectives, figures of the reference data.
Out: `Explanation`: prints as a table with signed bars, `to_dict`, `to_html`; one page of several.

What people see first is `relative`: each objective's contribution against a response of average
rewards, signed, so that a bar to the right says what speaks for this response. The exact
contributions beside it sum to the score.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from armorm.conversation import Conversation
from armorm.explain.html import render
from armorm.objectives import Objective
from armorm.steering import sentences

_BAR, _SHORT_BAR = 24, 10
_NAME = 20
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_RIGHT_EIGHTHS = " ▕▐█"


@dataclass(frozen=True)
class ObjectiveShare:
    """What one objective does to the score.

    Attributes:
        name: of the objective.
        rating: predicted rating on the raw scale; `low` and `high` are its ends.
        reward: the same on the mapped scale.
        weight: gating weight for this prompt.
        average_weight: its mean over the reference data, or None without reference.
        coefficient: weight of the reward in the score, after the transform.
        contribution: coefficient * reward.
        relative: coefficient * (reward - reference mean).
        uncertainty: epistemic standard deviation of the rating, raw scale; None where the model carries none.
    """

    name: str
    rating: float
    low: float
    high: float
    reward: float
    weight: float
    average_weight: float | None
    coefficient: float
    contribution: float
    relative: float
    uncertainty: float | None = None


@dataclass(frozen=True)
class Explanation:
    """A score and the objectives it is made of.

    Attributes:
        score: the sum of the contributions.
        normalised: the score in standard deviations from the reference mean, or None without reference.
        percentile: share of reference responses that score lower, 0 to 100, or None.
        shares: one an objective, in the model's order.
        model: name of the model.
        steered: what was changed in its weighing, empty for none.
        score_std: standard deviation of the score, None where the model carries none.
    """

    score: float
    normalised: float | None
    percentile: float | None
    shares: list[ObjectiveShare]
    model: str = ""
    steered: Mapping[str, Any] | None = None
    score_std: float | None = None

    @property
    def ranked(self) -> list[ObjectiveShare]:
        """Shares by the size of their relative contribution."""
        return sorted(self.shares, key=lambda share: -abs(share.relative))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return asdict(self)

    def to_html(self, conversation: Conversation | None = None) -> str:
        """One self-contained page, with the text where a conversation is given."""
        return explanations_page([("", self, conversation)])

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        wide = options.max_width >= 112
        unsure = any(share.uncertainty is not None for share in self.shares)
        table = Table(
            box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold", show_footer=True, footer_style="bold"
        )

        def add_column(title: str, footer: str = "", **options: Any) -> None:
            table.add_column(title, footer, no_wrap=True, **options)

        longest = max(len(share.name) for share in self.shares)
        ranges = wide or longest <= _NAME  # where they leave the sums their place
        table.add_column("objective", "score", no_wrap=True, overflow="ellipsis", max_width=None if wide else 31)
        add_column("rating", justify="right")
        if unsure and wide:
            add_column("±", justify="right", style="dim")
        if ranges:
            add_column("of", style="dim")
        add_column("weight", justify="right")
        if wide:
            add_column("average", justify="right", style="dim")
        add_column("against an average response" if wide else "")  # centring would strip the bars' blanks
        add_column(
            "relative" if wide else "rel.", signed(sum(share.relative for share in self.shares)), justify="right"
        )
        add_column("contribution" if wide else "contr.", signed(self.score), justify="right")
        largest = max(abs(share.relative) for share in self.shares) or 1.0
        for share in self.ranked:
            cells: list[Any] = [Text(share.name), f"{share.rating:.2f}"]
            if unsure and wide:
                cells.append("" if share.uncertainty is None else f"{share.uncertainty:.2f}")
            elif unsure and share.uncertainty is not None:
                cells[-1] += f"±{share.uncertainty:.2f}"
            cells += [f"{share.low:.3g}..{share.high:.3g}"] if ranges else []
            cells.append(f"{share.weight:.1%}")
            if wide:
                cells.append("" if share.average_weight is None else f"{share.average_weight:.1%}")
            cells += [
                signed_bar(share.relative / largest, _BAR if wide else _SHORT_BAR),
                signed(share.relative),
                signed(share.contribution),
            ]
            table.add_row(*cells)
        yield Group(self._headline(), Text(""), table)

    def _headline(self) -> Text:
        text = Text.assemble(("score ", "bold"), (signed(self.score), "bold cyan"))
        if self.score_std is not None:
            text.append(f" ± {self.score_std:.4f}")
        if self.normalised is not None:
            text.append(f"   {self.normalised:+.2f} standard deviations from the reference mean")
        if self.percentile is not None:
            text.append(f", above {self.percentile:.0f}% of reference responses")
        if self.steered:
            text.append("   (steered)", "yellow")
            text.append(f"\nsteered: {'; '.join(sentences(self.steered))}", "yellow")
        return text


def explanations_page(entries: Sequence[tuple[str, Explanation, Conversation | None]]) -> str:
    """Explanations as one self-contained page.

    Args:
        entries: of each a label, the explanation, and the conversation where its text is to be shown.
    """
    return render(
        "explanation",
        entries=[
            {"label": label, "shown": shown, "messages": list(conversation.messages) if conversation else []}
            for label, shown, conversation in entries
        ],
        sentences=[sentences(shown.steered or {}) for _, shown, _ in entries],
    )


def as_text(printable: Any) -> str:
    """What rich prints of it, 120 columns wide, without colours."""
    console = Console(width=120, file=io.StringIO())
    with console.capture() as captured:
        console.print(printable)
    return captured.get()


def signed(value: float) -> str:
    """A number with its sign and four digits; what rounds to zero is +0.0000."""
    return f"{round(value, 4) + 0.0:+.4f}"


def signed_bar(value: float, width: int) -> Text:
    """A bar from the middle, to the right and green for value > 0, to the left and red for value < 0.

    Args:
        value: -1 to 1.
        width: characters, even.
    """
    half = width // 2
    eighths = round(min(abs(value), 1.0) * half * 8)
    full, rest = divmod(eighths, 8)
    if value >= 0:
        right = "█" * full + (_EIGHTHS[rest] if rest else "")
        return Text.assemble((" " * half, ""), ("│", "dim"), (right.ljust(half), "green"))
    left = (_RIGHT_EIGHTHS[(rest + 2) // 3] if rest else "") + "█" * full
    return Text.assemble((left.rjust(half), "red"), ("│", "dim"), (" " * half, ""))


def explain_row(
    objectives: list[Objective],
    *,
    score: float,
    rewards: np.ndarray,
    weights: np.ndarray,
    coefficients: np.ndarray,
    contributions: np.ndarray,
    relative: np.ndarray,
    reference: Mapping[str, Any],
    model: str = "",
    steered: Mapping[str, Any] | None = None,
    uncertainty: np.ndarray | None = None,
    score_std: float | None = None,
) -> Explanation:
    """The explanation of one scored row; arrays are (k,).

    Args:
        uncertainty: standard deviations of the rewards, mapped scale.
        reference: as in `ArmoRMConfig.reference`; may be empty.
    """
    averages = reference.get("gating_weights") or [None] * len(objectives)
    shares = [
        ObjectiveShare(
            name=objective.name,
            rating=float(objective.to_raw(rewards[i])),
            low=objective.low,
            high=objective.high,
            reward=float(rewards[i]),
            weight=float(weights[i]),
            average_weight=averages[i],
            coefficient=float(coefficients[i]),
            contribution=float(contributions[i]),
            relative=float(relative[i]),
            uncertainty=None if uncertainty is None else float(uncertainty[i]) * abs(objective.scale),
        )
        for i, objective in enumerate(objectives)
    ]
    normalised = percentile = None
    if reference.get("score_std"):
        normalised = (score - reference["score_mean"]) / reference["score_std"]
    if reference.get("score_quantiles"):
        percentile = float(
            np.interp(score, reference["score_quantiles"], np.linspace(0, 100, len(reference["score_quantiles"])))
        )
    return Explanation(score, normalised, percentile, shares, model, steered, score_std)
