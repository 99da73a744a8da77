"""Audits: biases of the scores, which objectives decide, what the gate adds, calibration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.evaluation.audits.bias import bias_audit, quantities
from armorm.evaluation.audits.calibration import calibration
from armorm.evaluation.audits.objectives import accuracy_alone, decisions, gate
from armorm.evaluation.bootstrap import Clusters
from armorm.evaluation.examples import Item, LabelledPairs
from armorm.evaluation.scorer import Scored

SERVED, BEFORE = "as served", "before debiasing"


def run_audits(
    items: Sequence[Item],
    rows: Sequence[np.ndarray],
    conversations: Sequence[Conversation],
    scored: Scored,
    pairs: LabelledPairs,
    clusters: Clusters,
) -> dict[str, Any]:
    """All audits that apply.

    Args:
        rows: of each item, the row of each response among the conversations.

    Returns:
        `length`, `markdown`, `lists`; with pairs also `calibration`; of an interpretable model also `objectives`,
        `decisions` and `gate`.
    """
    prompts = [conversation.prompt_key for conversation in conversations]
    views = {SERVED: scored.scores} | ({BEFORE: scored.before_debiasing} if scored.is_debiased else {})
    found: dict[str, Any] = {
        name: bias_audit(quantity, views, pairs, prompts) for name, quantity in quantities(conversations).items()
    }
    if not len(pairs):
        return found
    found["calibration"] = calibration(pairs.difference(scored.scores) * (scored.margin_scale or 1.0), pairs.weight)
    found["calibration"]["calibrated"] = scored.margin_scale is not None
    if scored.batch is not None:
        subsets = [item.subset for item in items]
        found["objectives"] = accuracy_alone(scored, pairs)
        found["decisions"] = decisions(scored, pairs, subsets)
        found["gate"] = gate(scored, pairs, subsets, clusters, rows)
    return found
