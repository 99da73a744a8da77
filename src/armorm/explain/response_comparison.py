"""Comparison of two responses to one prompt: which is better, and which objectives decide.

The differences of contributions sum to the margin, so the comparison is exact. An objective *decides* if the preference
would not hold without it alone (`armorm.attribution.turning`); `decided_by` is the smallest set without which together
it would not hold (`armorm.attribution.deciding`). Objectives under 2% of the whole are one line unless all are shown.

By sentences: each counts against the mean of the two texts, for as many tokens as it has,

    difference(sentence of A) = contribution - its tokens / tokens of A's text * (sum over A's text + sum over B's) / 2

and the reverse for B. Over both texts the differences sum to the part of the margin that their tokens carry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text
from scipy.special import expit

from armorm.attribution import deciding, turning
from armorm.conversation import Conversation
from armorm.explain.bars_figure import bars_figure
from armorm.explain.explanation import HARDLY, Explanation
from armorm.explain.html import number, percent, render
from armorm.explain.text import Column, as_text, objective_table, signed, signed_bar
from armorm.explain.token_attribution import TokenAttribution
from armorm.explain.verdict import Reason, debiased_note, fold, pair_verdict, too_close
from armorm.explain.word_map import word_map
from armorm.notebook import bar, display, html_table
from armorm.steering import sentences

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_NAMED_SENTENCES = 6


@dataclass(frozen=True)
class ObjectiveComparison:
    """One objective of two responses.

    Attributes:
        name: of the objective.
        ratings: predicted ratings of A and B on the raw scale; `low` and `high` are the ends of the scale.
        uncertainties: their standard deviations, None for a model without uncertainty.
        weight: gating weight for the prompt.
        contributions: of A and B.
        difference: contribution of A minus that of B.
        decides: whether the preference would not hold without it alone.
        carries: whether it is one of the smallest set without which the preference would not hold.
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
    carries: bool = False


@dataclass(frozen=True)
class SentenceShare:
    """A sentence of A or B.

    Attributes:
        response: `A` or `B`.
        text, start, end: the sentence and its place in the response, in characters.
        difference: what it adds to the margin; above 0 speaks for A.
        differences: the same by objective.
    """

    response: str
    text: str
    start: int
    end: int
    difference: float
    differences: Mapping[str, float]


@dataclass(frozen=True)
class ResponseComparison:
    """Two scores and their difference by objective.

    Attributes:
        scores: of A and B.
        margin: score of A minus score of B.
        better: `A` or `B`, None for a tie.
        probability_of_a: that A is preferred, by the Bradley-Terry model; None without a calibration.
        margin_in_std: margin in standard deviations of the reference scores, or None.
        percentiles: percentage of reference responses that score lower than A and B, 0 to 100, or None.
        shares: one per objective, in the model's order; empty for a model without objectives.
        model: its name.
        steered: settings of the steering.
        sentences: of both responses, the largest difference first; None if they were not requested. Their sum and
            `other_difference`, of template tokens and of what no token carries, are the margin.
        biases: objectives that others are debiased against.
        sides: explanations of A and B, None for a model without objectives.
    """

    scores: Mapping[str, float]
    margin: float
    better: str | None
    probability_of_a: float | None
    percentiles: Mapping[str, float | None]
    margin_in_std: float | None = None
    shares: list[ObjectiveComparison] = field(default_factory=list)
    model: str = ""
    steered: Mapping[str, Any] = field(default_factory=dict)
    sentences: list[SentenceShare] | None = None
    other_difference: float | None = None
    biases: tuple[str, ...] = ()
    sides: tuple[Explanation, Explanation] | None = None

    @property
    def shown(self) -> list[ObjectiveComparison]:
        """The ranked objectives without those under 2% of the whole, if there are two or more of them."""
        return [self.shares[i] for i in fold([share.difference for share in self.shares])[0]]

    @property
    def folded(self) -> list[ObjectiveComparison]:
        """The others."""
        return [self.shares[i] for i in fold([share.difference for share in self.shares])[1]]

    @property
    def note(self) -> str:
        """Explains the bars of objectives with hardly any weight that others are debiased against; may be empty."""
        return debiased_note([s.name for s in self.shown if s.name in self.biases and s.weight < HARDLY])

    @property
    def ranked(self) -> list[ObjectiveComparison]:
        """Objectives by the size of their difference."""
        return sorted(self.shares, key=lambda share: -abs(share.difference))

    @property
    def decided_by(self) -> list[str]:
        """The smallest set of objectives without which the preference would not hold, the strongest first."""
        return [share.name for share in self.ranked if share.carries]

    @property
    def verdict(self) -> str:
        """Which response is better, how sure that is, and the objectives that carry it."""
        return self.in_words()

    @property
    def too_close(self) -> bool:
        """Whether it is too close to call (`armorm.explain.verdict`)."""
        return too_close(self.margin, probability=self.probability_of_a, margin_in_std=self.margin_in_std)

    @property
    def likelihood(self) -> float | None:
        """Probability that the better one is preferred, or None."""
        return None if self.probability_of_a is None else max(self.probability_of_a, 1 - self.probability_of_a)

    def in_words(self, names: Mapping[str, str] | None = None) -> str:
        """The verdict with other names of the responses, by `A` and `B`."""
        first, second = (dict(names or {}).get(side, side) for side in "AB")
        reasons = [Reason(s.name, s.difference, s.ratings[0] > s.ratings[1]) for s in self.shares]
        sure = {"probability": self.probability_of_a, "margin_in_std": self.margin_in_std}
        return pair_verdict(first, second, self.margin, reasons, **sure)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        names = ("better", "scores", "margin", "margin_in_std", "probability_of_a", "percentiles", "model", "steered")
        found: dict[str, Any] = {"verdict": self.verdict} | {name: getattr(self, name) for name in names}
        if self.shares:
            found["contributions"] = {share.name: share.difference for share in self.shares}
            found["decided_by"] = self.decided_by
            found["objectives"] = [asdict(share) for share in self.shares]
        if self.sentences is not None:
            found["sentences"] = [asdict(share) for share in self.sentences]
            found["other_difference"] = self.other_difference
        return found

    def to_html(self, conversations: Sequence[Conversation] = ()) -> str:
        """One self-contained page with the prompt, the responses and, with tokens, the maps of their words.

        Args:
            conversations: the two, if the comparison does not know them.
        """
        return comparisons_page([("", self, conversations)])

    def show(self, *, every: bool = False) -> None:
        """Show it in a notebook (`_repr_html_`), or print it where there is none; `every`: no objective is folded."""
        display(self._repr_html_(every=every), lambda width: self.lines(width, every=every))

    def plot(self) -> Figure:
        """The differences as a matplotlib figure, folded as in the table."""
        rest = [sum(share.difference for share in self.folded)] if self.folded else []
        names = [share.name for share in self.shown] + [f"{len(self.folded)} others"] * len(rest)
        values = [share.difference for share in self.shown] + rest
        return bars_figure(
            names,
            values,
            self.verdict,
            "contribution of A minus that of B",
            highlighted=len(self.shown),
            sides=("for B", "for A"),
        )

    def _repr_html_(self, *, every: bool = False) -> str:
        shown, folded = (self.ranked, []) if every else (self.shown, self.folded)
        largest = max((abs(share.difference) for share in self.shares), default=0.0) or 1.0
        rows = [
            [s.name, *(number(rating, 2) for rating in s.ratings), percent(s.weight), bar(s.difference / largest),
             signed(s.difference), "decides" if s.decides else ""]
            for s in shown
        ]  # fmt: skip
        if folded:
            rows.append([_others(folded), "", "", "", "", signed(sum(s.difference for s in folded)), ""])
        columns = ["objective", "A", "B", "weight", "for B | for A", "differs", ""]
        scores = f"A {signed(self.scores['A'])}, B {signed(self.scores['B'])}, margin {signed(self.margin)}."
        table = html_table(self.verdict, columns, rows, f"{scores} {self.note}".strip())
        maps = [(n, side.tokens) for n, side in zip("AB", self.sides or (), strict=False) if side.tokens is not None]
        return table + "".join(str(word_map(tokens, f"{name}: how the score adds up")) for name, tokens in maps)

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self.lines(options.max_width)

    def lines(self, width: int, *, every: bool = False) -> list[RenderableType]:
        """What a terminal of `width` characters shows; with `every`, no objective is folded."""
        head = Text.assemble(
            (self.verdict, "bold"),
            f"\nA {signed(self.scores['A'])}, B {signed(self.scores['B'])}, margin {signed(self.margin)}",
            "" if self.margin_in_std is None else f" ({signed(self.margin_in_std, 2)} SD of reference scores)",
        )
        if self.percentiles["A"] is not None and self.percentiles["B"] is not None:
            head.append(f"\nabove {self.percentiles['A']:.0f}% and {self.percentiles['B']:.0f}% of reference responses")
        if self.steered:
            head.append(f"\nsteered: {'; '.join(sentences(self.steered))}", "yellow")
        if not self.shares:
            return [head]
        columns, others = self._columns(wide=width >= 100), None
        shown, folded = (self.ranked, []) if every else (self.shown, self.folded)
        if folded:
            others = {"objective": _others(folded), "differs": signed(sum(share.difference for share in folded))}
        found: list[RenderableType] = [head, Text(""), objective_table(shown, columns, others)]
        found += [Text(self.note, "dim")] if self.note else []
        return found if self.sentences is None else [*found, Text(""), *self._sentence_lines(width)]

    def _sentence_lines(self, width: int) -> list[Text]:
        lines = [Text("sentences that carry the margin", "bold")]
        for share in (self.sentences or [])[:_NAMED_SENTENCES]:
            text = Text(" ".join(share.text.split()), no_wrap=True, overflow="ellipsis")
            text.truncate(max(width - 13, 20), overflow="ellipsis")
            style = "green" if share.difference > 0 else "red"
            lines.append(Text.assemble((f"{signed(share.difference):>9}", style), f"  {share.response} ", text))
        rest = sum(share.difference for share in (self.sentences or [])[_NAMED_SENTENCES:])
        lines.append(Text(f"{signed(rest + (self.other_difference or 0.0)):>9}  all else"))
        return lines

    def _columns(self, wide: bool) -> list[Column]:
        right, half = {"justify": "right"}, 11 if wide else 6
        largest = max(abs(share.difference) for share in self.shares) or 1.0

        def rating(side: int) -> Any:
            def cell(share: ObjectiveComparison) -> str:
                uncertainty = share.uncertainties[side] if wide else None
                return f"{share.ratings[side]:.2f}" + ("" if uncertainty is None else f" ±{uncertainty:.2f}")

            return cell

        columns: list[Column] = [
            ("objective", lambda share: Text(share.name), "margin", {"max_width": 36, "overflow": "ellipsis"}),
            ("A", rating(0), "", right),
            ("B", rating(1), "", right),
            ("of", lambda share: f"{share.low:.3g}..{share.high:.3g}", "", {"style": "dim"}),
            ("weight", lambda share: f"{share.weight:.1%}", "", right),
            (
                "for B".center(half) + "│" + "for A".center(half),
                lambda share: signed_bar(share.difference / largest, 2 * half),
                "",
                {},
            ),
            ("differs", lambda share: signed(share.difference), signed(self.margin), right),
            ("", lambda share: Text("decides" if share.decides else "", style="bold"), "", {}),
        ]
        return [column for column in columns if wide or column[0] != "of"]


def _others(folded: Sequence[ObjectiveComparison]) -> str:
    return f"{len(folded)} others, together"


def comparisons_page(entries: Sequence[tuple[str, ResponseComparison, Sequence[Conversation]]]) -> str:
    """Labelled comparisons as one self-contained page, each with its conversations if they are given or known."""
    found = []
    for label, shown, given in entries:
        explained = shown.sides or ()
        texts = list(given) or [side.conversation for side in explained if side.conversation is not None]
        words = {
            name: word_map(side.tokens, f"{name}: how the score adds up")
            for name, side in zip("AB", explained, strict=False)
            if side.tokens is not None
        }
        found.append(
            {
                "label": label,
                "found": shown,
                "steered": sentences(shown.steered),
                "prompt": list(texts[0].prompt) if texts else [],
                "responses": {name: c.response for name, c in zip("AB", texts, strict=False)},
                "words": words,
            }
        )
    return render("response_comparison", entries=found)


def compare_responses(
    first: Explanation, second: Explanation, *, margin_scale: float | None = None, score_std: float | None = None
) -> ResponseComparison:
    """Comparison of two explained responses, A and B, to one prompt by the same model.

    Args:
        margin_scale: factor of the margin for the probability, None without a calibration.
        score_std: standard deviation of the model's reference scores, if known.
    """
    pairs = list(zip(first.shares, second.shares, strict=True))
    differences = np.array([a.contribution - b.contribution for a, b in pairs])
    shares = [
        ObjectiveComparison(
            name=a.name,
            low=a.low,
            high=a.high,
            ratings=(a.rating, b.rating),
            uncertainties=(a.uncertainty, b.uncertainty),
            weight=a.weight,
            contributions=(a.contribution, b.contribution),
            difference=float(difference),
            decides=bool(decides),
            carries=bool(carries),
        )
        for (a, b), difference, decides, carries in zip(
            pairs, differences, turning(differences)[0], deciding(differences)[0], strict=True
        )
    ]
    by_sentence = sentence_shares(first.tokens, second.tokens) if first.tokens and second.tokens else None
    margin = first.score - second.score
    carried = None if by_sentence is None else sum(share.difference for share in by_sentence)
    return replace(
        compare_scores(first.score, second.score, first.model, margin_scale=margin_scale, score_std=score_std),
        percentiles={"A": first.percentile, "B": second.percentile},
        shares=shares,
        steered=first.steered or {},
        sentences=by_sentence,
        other_difference=None if carried is None else margin - carried,
        biases=first.biases,
        sides=(first, second),
    )


def sentence_shares(first: TokenAttribution, second: TokenAttribution) -> list[SentenceShare]:
    """What each sentence of A and B adds to the margin, the largest first (equation in the module's docstring)."""
    middle = (first.text_contributions + second.text_contributions) / 2
    found = []
    for side, tokens, sign in (("A", first, 1.0), ("B", second, -1.0)):
        count = int((~tokens.places.template).sum())
        for part in tokens.sentences():
            values = sign * (part.contributions - part.tokens / count * middle)
            by_name = dict(zip(tokens.names, values.tolist(), strict=True))
            found.append(SentenceShare(side, part.text, part.start, part.end, float(values.sum()), by_name))
    return sorted(found, key=lambda share: -abs(share.difference))


def compare_scores(
    first: float,
    second: float,
    model: str = "",
    *,
    margin_scale: float | None = None,
    score_std: float | None = None,
) -> ResponseComparison:
    """Comparison of two scores, A and B, of a model without objectives; arguments as of `compare_responses`."""
    margin = first - second
    return ResponseComparison(
        scores={"A": first, "B": second},
        margin=margin,
        better="A" if margin > 0 else "B" if margin < 0 else None,
        probability_of_a=None if margin_scale is None else float(expit(margin_scale * margin)),
        percentiles={"A": None, "B": None},
        margin_in_std=margin / score_std if score_std else None,
        model=model,
    )
