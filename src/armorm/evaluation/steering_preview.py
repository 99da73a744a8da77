"""What a steering does, before it is kept: on preference pairs, the model as it is against the model as it would be.

In:  a reward model, a steered one with the same weights, preference pairs.
Out: `Preview`: accuracy before and after with a paired interval, rankings that flip (which way, of which subsets, from
     the longer to the shorter response or back), how scores go with length, mean weights.

The backbone runs once: steering changes nothing before the gate, so the steered scores are computed from the
features of the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from armorm.attribution import deciding
from armorm.conversation import Conversation
from armorm.data.sources import find_sources
from armorm.evaluation.audits.bias import bias_audit, lengths
from armorm.evaluation.bootstrap import Clusters, differences
from armorm.evaluation.examples import Comparisons, Example, numbered
from armorm.evaluation.loaders import load_pairs
from armorm.evaluation.registry import find_benchmark
from armorm.evaluation.runner import distinct
from armorm.evaluation.scorers import ArmoRMScorer, Parts, Scored
from armorm.features.extract import Features

if TYPE_CHECKING:
    from armorm.reward_model import ArmoRM

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class Flip:
    """A pair whose ranking the steering turns round.

    Attributes:
        file, row: where it stands.
        subset: of it.
        before, after: margins of the better response.
        decides: objectives that decide the new ranking, the strongest first.
        better, worse: its conversations.
    """

    file: str
    row: int
    subset: str
    before: float
    after: float
    decides: list[str]
    better: Conversation
    worse: Conversation

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without texts."""
        found = {name: getattr(self, name) for name in ("file", "row", "subset", "before", "after")}
        return found | {"decided_by": self.decides}


@dataclass(frozen=True)
class Preview:
    """What a steering does to a preference set.

    Attributes:
        steering: the settings.
        pairs, prompts, refused: that were read; refused pairs count as wrong before and after.
        accuracy: of all pairs and by subset: `before`, `after`, `difference`, `interval` (95%, of the difference,
            None below thirty prompts), `p`, `pairs`.
        flips: number of pairs by `to_right`, `to_wrong`; `share` of all scored pairs.
        by_subset: the same two numbers for each subset.
        by_length: flips `to_shorter` (the longer response won before) and `to_longer`.
        length: by `before` and `after` as in `bias_audit`: accuracy where the longer response is better and worse,
            how often it wins, correlation pooled and within prompts.
        weights: by objective the mean gating weight before and after, over the prompts.
        changed: the flips, the largest change of margin first.
    """

    steering: dict[str, Any]
    pairs: int
    prompts: int
    refused: int
    accuracy: dict[str, dict[str, Any]]
    flips: dict[str, float]
    by_subset: dict[str, dict[str, int]]
    by_length: dict[str, int]
    length: dict[str, dict[str, float]]
    weights: dict[str, tuple[float, float]]
    changed: list[Flip]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, without texts."""
        found = {name: value for name, value in vars(self).items() if name != "changed"}
        return found | {"changed": [flip.to_dict() for flip in self.changed]}

    def lines(self) -> list[str]:
        """What it comes to, as lines of Markdown for a model card."""
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
            f"| accuracy where it is worse | {before['more_is_worse']:.3f} | {after['more_is_worse']:.3f} |",
            f"| correlation of score and length | {before['correlation']:+.3f} | {after['correlation']:+.3f} |",
            "",
            f"Rankings that flip: {self.flips['to_right'] + self.flips['to_wrong']:,.0f} "
            f"({self.flips['to_right']:,.0f} to right, {self.flips['to_wrong']:,.0f} to wrong).",
        ]


def preview(
    rm: ArmoRM, steered: ArmoRM, data: str | Path | Sequence[str | Path], *, features: str | Path | None = None
) -> Preview:
    """Compare a model with a steered one on preference rows of any layout.

    Args:
        rm: the model to compare with, such as the model as trained.
        steered: of the same weights.
        features: feature store to read and fill.

    Raises:
        DataError: for rows that are no preference pairs.
    """
    places = [data] if isinstance(data, (str, Path)) else list(data)
    examples = numbered(load_pairs(find_sources(places)).examples)
    unique, rows = distinct(examples)
    before = ArmoRMScorer(rm, Path(features) if features else None).score(unique)
    return compared(examples, unique, rows, before, scored_under(steered, before), steered.model.config.steering)


def scored_under(steered: ArmoRM, scored: Scored) -> Scored:
    """Scores of the same conversations under another steering of the same weights."""
    parts = scored.parts
    if parts is None:
        return scored
    prompts = parts.prompt_features
    # The gate sees the prompt alone, and rewards are not steered: no response feature is needed.
    batch = steered.score_features(Features(np.zeros_like(prompts), prompts, np.arange(len(prompts))))
    known = parts.prompt_index >= 0

    def spread(values: np.ndarray) -> np.ndarray:
        return np.where(known[:, None], values[np.maximum(parts.prompt_index, 0)].astype(np.float64), np.nan)

    found = Parts(
        names=parts.names,
        rewards=parts.rewards,
        weights=spread(batch.gating_weights),
        outputs=spread(batch.gating_output),
        transform=steered.transform,
        raw=parts.raw,
        prompt_features=prompts,
        prompt_index=parts.prompt_index,
    )
    return Scored(found.contributions.sum(1), scored.refused, scored.truncated, found)


def compared(
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    rows: Sequence[np.ndarray],
    before: Scored,
    after: Scored,
    steering: dict[str, Any],
) -> Preview:
    """The preview of examples that are scored both ways; arguments as `distinct` gives them."""
    items = [example.item for example in examples]
    comparisons = Comparisons.of(items, rows)
    old, new = comparisons.difference(before.scores), comparisons.difference(after.scores)
    scored = ~np.isnan(old) & ~np.isnan(new)
    to_right, to_wrong = scored & (old <= 0) & (new > 0), scored & (old > 0) & (new <= 0)
    sizes = lengths(conversations)
    longer = comparisons.difference(sizes)
    # A flip to right goes to the better response, which is the shorter one where the difference is negative.
    to_shorter = (to_right & (longer < 0)) | (to_wrong & (longer > 0))
    to_longer = (to_right & (longer > 0)) | (to_wrong & (longer < 0))
    subsets = np.array([items[i].subset for i in comparisons.item], dtype=object)
    audit = bias_audit(
        sizes,
        {BEFORE: before.scores, AFTER: after.scores},
        comparisons,
        [conversation.prompt_key for conversation in conversations],
    )
    clusters = Clusters.of_items([item.prompt for item in items], [item.subset for item in items])
    return Preview(
        steering=steering,
        pairs=len(items),
        prompts=len(clusters.strata),
        refused=int((~scored).sum()),
        accuracy=_accuracy(examples, rows, before, after, clusters),
        flips={
            "to_right": int(to_right.sum()),
            "to_wrong": int(to_wrong.sum()),
            "share": float((to_right | to_wrong).sum() / max(scored.sum(), 1)),
        },
        by_subset={
            str(subset): {
                "to_right": int(to_right[subsets == subset].sum()),
                "to_wrong": int(to_wrong[subsets == subset].sum()),
            }
            for subset in sorted({subset for subset in subsets if subset})
        },
        by_length={"to_shorter": int(to_shorter.sum()), "to_longer": int(to_longer.sum())},
        length=audit["views"],
        weights=_weights(before, after),
        changed=_changed(examples, conversations, comparisons, to_right | to_wrong, old, new, after),
    )


def _accuracy(
    examples: Sequence[Example], rows: Sequence[np.ndarray], before: Scored, after: Scored, clusters: Clusters
) -> dict[str, dict[str, Any]]:
    benchmark = find_benchmark("pairs")
    items = [example.item for example in examples]
    new, old = (
        benchmark.measure(items, [np.append(scored.scores, np.nan)[at] for at in rows]) for scored in (after, before)
    )
    found = {}
    for entry in differences(benchmark.figures(new), new, old, clusters):
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


def _weights(before: Scored, after: Scored) -> dict[str, tuple[float, float]]:
    if before.parts is None or after.parts is None:
        return {}
    known = before.parts.prompt_index
    first = np.unique(known[known >= 0], return_index=True)[1]
    rows = np.flatnonzero(known >= 0)[first]
    means = [parts.weights[rows].mean(0).tolist() for parts in (before.parts, after.parts)]
    return dict(zip(before.parts.names, zip(*means, strict=True), strict=True))


def _changed(
    examples: Sequence[Example],
    conversations: Sequence[Conversation],
    comparisons: Comparisons,
    flipped: np.ndarray,
    old: np.ndarray,
    new: np.ndarray,
    after: Scored,
) -> list[Flip]:
    order = sorted(np.flatnonzero(flipped), key=lambda p: -abs(new[p] - old[p]))
    if after.parts is None or not order:
        return []
    differences_after = comparisons.difference(after.parts.contributions)
    flips = []
    for place in order:
        example = examples[comparisons.item[place]]
        strength = differences_after[place]
        columns = sorted(np.flatnonzero(deciding(strength[None])[0]), key=lambda c: -abs(strength[c]))
        file, row = example.origin
        flips.append(
            Flip(
                file,
                row,
                example.item.subset,
                float(old[place]),
                float(new[place]),
                [after.parts.names[c] for c in columns],
                conversations[comparisons.better[place]],
                conversations[comparisons.worse[place]],
            )
        )
    return flips
