"""Explanation: one score as a sum over objectives, printed as a table, JSON, a web page or a notebook's output.

A sentence comes first (`armorm.explain.verdict`); objectives under 2% of the whole are one line unless all are shown.

People see `relative` first: the contribution of each objective against a response of average rewards. A bar to the
right speaks for this response, a bar to the left against it. The exact contributions next to it sum to the score.
With `tokens`, the same sum over the tokens of the response (`armorm.explain.token_attribution`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from armorm.conversation import Conversation
from armorm.errors import ArmormError
from armorm.explain.bars_figure import bars_figure
from armorm.explain.html import number, percent, render
from armorm.explain.text import Column, as_text, objective_table, signed, signed_bar
from armorm.explain.token_attribution import TextPart, TokenAttribution
from armorm.explain.token_map import TokenMap
from armorm.explain.verdict import Reason, debiased_note, fold, score_verdict
from armorm.explain.word_map import word_map
from armorm.notebook import bar, display, html_table
from armorm.objectives import Objective
from armorm.score_batch import ScoreBatch
from armorm.steering import sentences

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

_BAR, _SHORT_BAR = 24, 10
_NAME = 20
HARDLY = 0.05  # weight below which the bar of an objective that others are debiased against is explained


@dataclass(frozen=True)
class ObjectiveShare:
    """One objective of a score."""

    name: str
    rating: float  # predicted, on the raw scale
    low: float  # ends of the raw scale
    high: float
    reward: float  # the rating on the mapped scale
    weight: float  # gating weight for this prompt
    average_weight: float | None  # its mean over the reference data, or None without reference
    coefficient: float  # weight of the reward in the score, after the transform
    contribution: float  # coefficient * reward
    relative: float  # coefficient * (reward - reference mean)
    uncertainty: float | None = None  # epistemic standard deviation of the rating, raw scale; None if unknown


@dataclass(frozen=True)
class Explanation:
    """A score and its objectives.

    Attributes:
        score: the sum of the contributions.
        normalised: the score in standard deviations from the reference mean, or None without reference.
        percentile: percentage of reference responses that score lower, 0 to 100, or None.
        shares: one per objective, in the model's order.
        model: name of the model.
        steered: settings of the steering, empty for none.
        score_std: standard deviation of the score, None for a model without uncertainty.
        approximate: by objective, the largest relative error of a standard deviation that is stored approximately.
        tokens: the score by tokens, if it was requested.
        biases: objectives that others are debiased against.
        conversation: that was scored, if it is known.
    """

    score: float
    normalised: float | None
    percentile: float | None
    shares: list[ObjectiveShare]
    model: str = ""
    steered: Mapping[str, Any] | None = None
    score_std: float | None = None
    approximate: Mapping[str, float] | None = None
    tokens: TokenAttribution | None = None
    biases: tuple[str, ...] = ()
    conversation: Conversation | None = None

    @property
    def verdict(self) -> str:
        """How the response does against reference responses, and the objectives that raise and lower its score most."""
        reasons = [Reason(share.name, share.relative) for share in self.shares]
        return score_verdict(self.normalised, self.percentile, reasons, self._corrections(self.shares))

    @property
    def average(self) -> float | None:
        """Score of a response to this prompt with the average rewards of the reference data, None without reference."""
        return None if self.normalised is None else self.score - sum(share.relative for share in self.shares)

    @property
    def shown(self) -> list[ObjectiveShare]:
        """The ranked shares without those under 2% of the whole, if there are two or more of them."""
        return [self.shares[i] for i in fold([share.relative for share in self.shares])[0]]

    @property
    def folded(self) -> list[ObjectiveShare]:
        """The others."""
        return [self.shares[i] for i in fold([share.relative for share in self.shares])[1]]

    @property
    def note(self) -> str:
        """Explains the bars of objectives with hardly any weight that others are debiased against; may be empty."""
        return debiased_note(self._corrections(self.shown))

    def _corrections(self, shares: Sequence[ObjectiveShare]) -> list[str]:
        return [share.name for share in shares if share.name in self.biases and share.weight < HARDLY]

    @property
    def ranked(self) -> list[ObjectiveShare]:
        """Shares by the size of their relative contribution."""
        return sorted(self.shares, key=lambda share: -abs(share.relative))

    @property
    def token_contributions(self) -> np.ndarray:
        """(t, k) float64, of the response's tokens; this and the next four need `rm.explain(..., tokens=True)`."""
        return self._by_token.token_contributions

    def words(self) -> list[TextPart]:
        """Contributions of the response's words."""
        return self._by_token.words()

    def sentences(self) -> list[TextPart]:
        """Contributions of the response's sentences and lines."""
        return self._by_token.sentences()

    def spans(self, spans: Iterable[tuple[int, int]]) -> list[TextPart]:
        """Contributions of parts of the response, each given by start and end in characters."""
        return self._by_token.spans(spans)

    def to_pandas(self) -> pandas.DataFrame:
        """One row per token, as `TokenAttribution.to_pandas`."""
        return self._by_token.to_pandas()

    @property
    def _by_token(self) -> TokenAttribution:
        if self.tokens is None:
            raise ArmormError("the explanation has no tokens; expected one made by `rm.explain(..., tokens=True)`")
        return self.tokens

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, with the verdict; with `tokens` if they were requested."""
        found = asdict(replace(self, tokens=None, conversation=None))
        for name in ("tokens", "biases", "conversation"):
            del found[name]
        found["verdict"] = self.verdict
        return found if self.tokens is None else {**found, "tokens": self.tokens.to_dict()}

    def to_html(self, conversation: Conversation | None = None) -> str:
        """One self-contained page with prompt, response and, with tokens, the map of its words.

        Args:
            conversation: whose text is shown if the explanation does not know it.
        """
        return explanations_page([("", self, conversation)])

    def show(self, *, every: bool = False) -> None:
        """Show it in a notebook (`_repr_html_`), or print it where there is none; `every`: no objective is folded."""
        display(self._repr_html_(every=every), lambda width: self.lines(width, every=every))

    def plot(self) -> Figure:
        """The relative contributions as a matplotlib figure, folded as in the table."""
        rest = [sum(share.relative for share in self.folded)] if self.folded else []
        names = [share.name for share in self.shown] + [f"{len(self.folded)} others"] * len(rest)
        values = [share.relative for share in self.shown] + rest
        return bars_figure(names, values, self.verdict, "against an average response", highlighted=len(self.shown))

    def _repr_html_(self, *, every: bool = False) -> str:
        shown, folded = (self.ranked, []) if every else (self.shown, self.folded)
        largest = max((abs(share.relative) for share in self.shares), default=0.0) or 1.0
        rows = [
            [s.name, number(s.rating, 2), f"{s.low:.3g}..{s.high:.3g}", percent(s.weight), bar(s.relative / largest),
             signed(s.relative), signed(s.contribution)]
            for s in shown
        ]  # fmt: skip
        if folded:
            sums = [signed(sum(getattr(s, of) for s in folded)) for of in ("relative", "contribution")]
            rows.append([f"{len(folded)} others, together", "", "", "", "", *sums])
        columns = ["objective", "rating", "of", "weight", "against an average response", "relative", "contribution"]
        average = f", of a response with average ratings {signed(self.average)}" if self.average is not None else ""
        table = html_table(self.verdict, columns, rows, f"score {signed(self.score)}{average}. {self.note}".strip())
        return table + (str(word_map(self.tokens)) if self.tokens else "")

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width)

    def lines(self, width: int, *, every: bool = False) -> list[RenderableType]:
        """What a terminal of `width` characters shows; with `every`, no objective is folded."""
        columns = self._columns(wide=width >= 112)
        shown, folded = (self.ranked, []) if every else (self.shown, self.folded)
        others = None
        if folded:
            others = {
                "objective": f"{len(folded)} others, together",
                columns[-2][0]: signed(sum(share.relative for share in folded)),
                columns[-1][0]: signed(sum(share.contribution for share in folded)),
            }
        found: list[RenderableType] = [Text(self.verdict, "bold"), self._headline(), Text("")]
        found.append(objective_table(shown, columns, others))
        notes = [self.note, approximate_sentence(self.approximate) if self.approximate else ""]
        found += [Text(note, "dim") for note in notes if note]
        return found if self.tokens is None else [*found, Text(""), TokenMap(self.tokens)]

    def _columns(self, wide: bool) -> list[Column]:
        right, dim = {"justify": "right"}, {"justify": "right", "style": "dim"}
        largest = max(abs(share.relative) for share in self.shares) or 1.0
        relative_sum = signed(sum(share.relative for share in self.shares))
        ranges = wide or max(len(share.name) for share in self.shares) <= _NAME  # room for the sums

        def rating(share: ObjectiveShare) -> str:
            return f"{share.rating:.2f}" + ("" if wide or share.uncertainty is None else f"±{share.uncertainty:.2f}")

        columns: list[Column | None] = [
            ("objective", lambda s: Text(s.name), "score", {"overflow": "ellipsis", "max_width": None if wide else 31}),
            ("rating", rating, "", right),
            ("±", lambda s: number(s.uncertainty, 2), "", dim) if wide and self.score_std is not None else None,
            ("of", lambda s: f"{s.low:.3g}..{s.high:.3g}", "", {"style": "dim"}) if ranges else None,
            ("weight", lambda s: percent(s.weight), "", right),
            ("average", lambda s: percent(s.average_weight), "", dim) if wide else None,
            (
                "against an average response" if wide else "",
                lambda s: signed_bar(s.relative / largest, _BAR if wide else _SHORT_BAR),
                "",
                {},
            ),
            ("relative" if wide else "rel.", lambda s: signed(s.relative), relative_sum, right),
            ("contribution" if wide else "contr.", lambda s: signed(s.contribution), signed(self.score), right),
        ]
        return [column for column in columns if column is not None]

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
        if self.average is not None:
            difference = self.score - self.average
            text.append(
                f"\na response to this prompt with average ratings would score {signed(self.average)}; this one is "
            )
            text.append(f"{abs(difference):.4f} {'above' if difference >= 0 else 'below'}")
        return text


def approximate_sentence(bounds: Mapping[str, float]) -> str:
    """How to read standard deviations that are stored approximately, from the error bounds of objectives by name."""
    worst = max(bounds, key=lambda name: bounds[name])
    which, place = (worst, "") if len(bounds) == 1 else (f"{len(bounds)} objectives", f" ({worst})")
    return (
        f"The ± of {which} is approximate: right on average over rated responses, but for a single one it may be off "
        f"by up to {bounds[worst]:.0%}{place}."
    )


def explanations_page(entries: Sequence[tuple[str, Explanation, Conversation | None]]) -> str:
    """Labelled explanations as one self-contained page, each with its conversation if it is given or known."""
    found = []
    for label, shown, given in entries:
        conversation, tokens = given or shown.conversation, shown.tokens
        messages = list(conversation.messages) if conversation else []
        words = None if tokens is None else word_map(tokens)
        found.append({"label": label, "shown": shown, "messages": messages, "words": words})
    return render(
        "explanation",
        entries=found,
        largest=max((abs(share.relative) for _, shown, _ in entries for share in shown.shares), default=0.0) or 1.0,
        sentences=[sentences(shown.steered or {}) for _, shown, _ in entries],
        approximate=[approximate_sentence(shown.approximate) if shown.approximate else "" for _, shown, _ in entries],
    )


def explain_row(
    batch: ScoreBatch,
    row: int,
    objectives: Sequence[Objective],
    reference: Mapping[str, Any],
    *,
    model: str = "",
    steered: Mapping[str, Any] | None = None,
    approximate: Mapping[str, float] | None = None,
    biases: Sequence[str] = (),
    conversation: Conversation | None = None,
) -> Explanation:
    """The explanation of one row of a batch, of its plain score; `reference` is that of the config, or empty."""
    averages = reference.get("gating_weights") or [None] * len(objectives)
    score = float(batch.contributions[row].sum())
    shares = [
        ObjectiveShare(
            name=objective.name,
            rating=float(objective.to_raw(batch.rewards[row, i])),
            low=objective.low,
            high=objective.high,
            reward=float(batch.rewards[row, i]),
            weight=float(batch.gating_weights[row, i]),
            average_weight=averages[i],
            coefficient=float(batch.coefficients[row, i]),
            contribution=float(batch.contributions[row, i]),
            relative=float(batch.relative[row, i]),
            uncertainty=None if batch.uncertainty is None else float(batch.uncertainty[row, i]) * abs(objective.scale),
        )
        for i, objective in enumerate(objectives)
    ]
    normalised = percentile = None
    if reference.get("score_std"):
        normalised = (score - reference["score_mean"]) / reference["score_std"]
    if reference.get("score_quantiles"):
        percents = np.linspace(0, 100, len(reference["score_quantiles"]))
        percentile = float(np.interp(score, reference["score_quantiles"], percents))
    score_std = None if batch.score_std is None else float(batch.score_std[row])
    return Explanation(
        score,
        normalised,
        percentile,
        shares,
        model,
        steered,
        score_std,
        approximate,
        biases=tuple(biases),
        conversation=conversation,
    )
