"""Preview of a steering: how it changes accuracy, rankings, length bias and mean weights on preference pairs.

The backbone runs once: steering does not change anything before the gate, so the steered scores are computed from the
features of the unsteered ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from armorm.conversation import Conversation
from armorm.data.sources import find_sources, places_of
from armorm.evaluation.audits.bias import bias_audit, lengths
from armorm.evaluation.benchmarks import pairs as preference_pairs
from armorm.evaluation.bootstrap import Clusters, differences
from armorm.evaluation.examples import Example, LabelledPairs
from armorm.evaluation.runner import distinct, load_examples
from armorm.evaluation.scorer import Scored, deciding_objectives
from armorm.evaluation.scorers import ArmoRMScorer
from armorm.features.extract import Features

if TYPE_CHECKING:
    from armorm.reward_model import ArmoRM

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Flip:
    """A pair whose ranking the steering reverses."""

    file: str
    row: int
    subset: str
    before: float  # margin of the better response
    after: float
    decided_by: list[str]  # objectives that decide the new ranking, strongest first
    better: Conversation
    worse: Conversation

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without texts."""
        return {name: value for name, value in vars(self).items() if name not in ("better", "worse")}


@dataclass(frozen=True)
class Preview:
    """Effect of a steering on a set of preference pairs."""

    steering: dict[str, Any]  # the settings
    pairs: int
    prompts: int
    refused: int  # unscored pairs, which count as wrong before and after
    # Of all pairs and by subset: `before`, `after`, `difference`, `interval` (95%, of the difference, None below 50
    # prompts), `p`, `pairs`.
    accuracy: dict[str, dict[str, Any]]
    flips: dict[str, float]  # number of pairs by `to_right`, `to_wrong`; `share` of all scored pairs
    by_subset: dict[str, dict[str, int]]  # the same two numbers for each subset
    by_length: dict[str, int]  # number of flips `to_shorter` (the longer response won before) and `to_longer`
    # By `before` and `after` as in `bias_audit`: accuracy where the longer response is better and worse, how often it
    # wins, correlation pooled and within prompts.
    length: dict[str, dict[str, float]]
    weights: dict[str, tuple[float, float]]  # by objective the mean gating weight before and after, over the prompts
    changed: list[Flip]  # largest change of margin first

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without texts."""
        found = {name: value for name, value in vars(self).items() if name != "changed"}
        return found | {"changed": [flip.to_dict() for flip in self.changed]}

    def lines(self) -> list[str]:
        """A summary in Markdown for the model card."""
        overall = self.accuracy["all"]
        before, after = self.length[BEFORE], self.length[AFTER]
        return [
            f"On {self.pairs:,} preference pairs, the model as trained and as steered:",
            "",
            "| | as trained | as steered |",
            "|---|---|---|",
            f"| accuracy | {overall['before']:.3f} | {overall['after']:.3f} |",
            f"| accuracy where the longer response is better | {before['more_is_better']:.3f} "
            f"| {after['more_is_better']:.3f} |",
            f"| accuracy where the longer response is worse | {before['more_is_worse']:.3f} "
            f"| {after['more_is_worse']:.3f} |",
            f"| correlation of score and length | {before['correlation']:+.3f} | {after['correlation']:+.3f} |",
            "",
            f"Rankings that flip: {self.flips['to_right'] + self.flips['to_wrong']:,.0f} "
            f"({self.flips['to_right']:,.0f} to right, {self.flips['to_wrong']:,.0f} to wrong).",
        ]


def preview(rm: ArmoRM, steered: ArmoRM, data: Any, *, features: str | Path | None = None) -> Preview:
    """Compare a model with a steered one on preference rows of any layout.

    Args:
        rm: the model to compare with, such as the model as trained.
        steered: of the same weights.
        features: feature store to read and fill.

    Raises:
        DataError: for rows that are not preference pairs.
    """
    examples = load_examples(preference_pairs.BENCHMARK, find_sources(places_of(data))).examples
    unique, rows = distinct(examples)
    before = ArmoRMScorer(rm, Path(features) if features else None).score(unique, rows)
    return compared(examples, unique, rows, before, scored_under(steered, before), steered.model.config.steering)


def scored_under(steered: ArmoRM, scored: Scored) -> Scored:
    """Scores of the same conversations under another steering of the same weights."""
    if scored.batch is None or scored.prompts is None:
        return scored
    features, index = scored.prompts
    # The gate depends on the prompt alone, and rewards are not steered: no response features are needed.
    response = np.zeros((len(features), steered.backbone.response_size), np.float32)
    by_prompt = steered.score_features(Features(response, features, np.arange(len(features))))

    def of_rows(values: np.ndarray) -> np.ndarray:
        return np.where(index[:, None] >= 0, values[np.maximum(index, 0)].astype(np.float64), np.nan)

    coefficients = of_rows(by_prompt.coefficients)
    contributions = coefficients * scored.batch.rewards
    batch = replace(
        scored.batch,
        scores=contributions.sum(1),
        gating_weights=of_rows(by_prompt.gating_weights),
        gating_output=of_rows(by_prompt.gating_output),
        coefficients=coefficients,
        contributions=contributions,
        relative=contributions - of_rows(by_prompt.contributions - by_prompt.relative),
    )
    return replace(scored, scores=batch.scores, batch=batch, transform=steered.transform)


def compared(
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    rows: Sequence[np.ndarray],
    before: Scored,
    after: Scored,
    steering: dict[str, Any],
) -> Preview:
    """The preview of examples scored before and after; arguments as `distinct` returns them."""
    items = [example.item for example in examples]
    pairs = LabelledPairs.of(items, rows)
    old, new = pairs.difference(before.scores), pairs.difference(after.scores)
    scored = ~np.isnan(old) & ~np.isnan(new)
    to_right, to_wrong = scored & (old <= 0) & (new > 0), scored & (old > 0) & (new <= 0)
    sizes = lengths(conversations)
    longer = pairs.difference(sizes)
    # After a flip to right the better response wins, which is the shorter one if the difference is negative.
    to_shorter = (to_right & (longer < 0)) | (to_wrong & (longer > 0))
    to_longer = (to_right & (longer > 0)) | (to_wrong & (longer < 0))
    subsets = np.array([items[i].subset for i in pairs.item], dtype=object)
    prompts = [conversation.prompt_key for conversation in conversations]
    audit = bias_audit(sizes, {BEFORE: before.scores, AFTER: after.scores}, pairs, prompts)
    clusters = Clusters.of_items([item.prompt for item in items], [item.subset for item in items])

    def counts(rows: np.ndarray) -> dict[str, int]:
        return {"to_right": int(to_right[rows].sum()), "to_wrong": int(to_wrong[rows].sum())}

    weights: dict[str, tuple[float, float]] = {}
    changed: list[Flip] = []
    if before.batch is not None and after.batch is not None:
        names, prompt_rows = after.batch.names, before.prompt_rows
        means = [batch.gating_weights[prompt_rows].mean(0).tolist() for batch in (before.batch, after.batch)]
        weights = dict(zip(names, zip(*means, strict=True), strict=True))
        contributions = pairs.difference(after.batch.contributions)
        for place in sorted(np.flatnonzero(to_right | to_wrong), key=lambda p: -abs(new[p] - old[p])):
            example, (better, worse) = examples[pairs.item[place]], (pairs.better[place], pairs.worse[place])
            decided_by = [name for name, _ in deciding_objectives(names, contributions[place])]
            margins, sides = (float(old[place]), float(new[place])), (conversations[better], conversations[worse])
            file, row = example.origin
            changed.append(Flip(file, row, example.item.subset, *margins, decided_by, *sides))
    return Preview(
        steering=steering,
        pairs=len(items),
        prompts=len(clusters.strata),
        refused=int((~scored).sum()),
        accuracy=_accuracy(examples, rows, before, after, clusters),
        flips=counts(np.ones(len(pairs), bool)) | {"share": float((to_right | to_wrong).sum() / max(scored.sum(), 1))},
        by_subset={name: counts(subsets == name) for name in sorted({subset for subset in subsets if subset})},
        by_length={"to_shorter": int(to_shorter.sum()), "to_longer": int(to_longer.sum())},
        length=audit["views"],
        weights=weights,
        changed=changed,
    )


def _accuracy(
    examples: Sequence[Example], rows: Sequence[np.ndarray], before: Scored, after: Scored, clusters: Clusters
) -> dict[str, dict[str, Any]]:
    items = [example.item for example in examples]
    new, old = (
        preference_pairs.measure(items, [np.append(scored.scores, np.nan)[at] for at in rows])
        for scored in (after, before)
    )
    found = {}
    for entry in differences(preference_pairs.metrics(new), new, old, clusters):
        name = "all" if entry.level == "overall" else entry.name
        found[name] = {
            "before": entry.second,
            "after": entry.first,
            "difference": entry.difference,
            "interval": entry.interval,
            "p": entry.p,
            "pairs": sum(name in ("all", item.subset) for item in items),
        }
    return found
