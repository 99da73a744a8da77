"""All audits of one evaluation.

In:  items, scored conversations, comparisons.
Out: a dictionary: `length`, `markdown`, `lists`, `calibration`; of an interpretable model also
     `objectives`, `decisions` and `gate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.evaluation.audits.bias import bias_audit, quantities
from armorm.evaluation.audits.calibration import calibration
from armorm.evaluation.audits.objectives import alone, decisions, gate
from armorm.evaluation.bootstrap import Clusters
from armorm.evaluation.examples import Comparisons, Item
from armorm.evaluation.scorers import Parts, Scored

SERVED, BEFORE = "as served", "before debiasing"


def audits(
    items: Sequence[Item],
    rows: Sequence[np.ndarray],
    conversations: Sequence[Conversation],
    scored: Scored,
    comparisons: Comparisons,
    clusters: Clusters,
) -> dict[str, Any]:
    """Run those that apply.

    Args:
        rows: of each item, the row of each response among the conversations.
    """
    prompts = [conversation.prompt_key for conversation in conversations]
    seen = views(scored)
    found: dict[str, Any] = {
        name: bias_audit(quantity, seen, comparisons, prompts) for name, quantity in quantities(conversations).items()
    }
    if not len(comparisons):
        return found
    found["calibration"] = calibration(comparisons.difference(scored.scores), comparisons.weight)
    if scored.parts is not None:
        subsets = [item.subset for item in items]
        found["objectives"] = alone(scored.parts, comparisons)
        found["decisions"] = decisions(scored.parts, comparisons, scored.scores, subsets)
        found["gate"] = gate(scored.parts, comparisons, scored.scores, subsets, clusters, rows)
    return found


def views(scored: Scored) -> dict[str, np.ndarray]:
    """Scores (n,) as served, and, of a debiased model, as they would be without the transform."""
    found = {SERVED: scored.scores}
    if scored.parts is not None and scored.parts.is_debiased:
        found[BEFORE] = before_debiasing(scored.parts)
    return found


def before_debiasing(parts: Parts) -> np.ndarray:
    """Scores (n,) of the plain rewards under the same weights."""
    return (parts.outputs * parts.rewards).sum(1)
