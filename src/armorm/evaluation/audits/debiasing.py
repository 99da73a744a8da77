"""What debiasing left of each bias on held-out data: by objective, of the gated score, by source and kind of prompt.

The transform is fitted on reference data against the predicted bias. That guarantees nothing for other prompts,
for the actual quantity (such as the length in tokens), or for differences within a prompt, which decide a ranking;
all three are measured here.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.correlation import Metric, correlation, within_groups
from armorm.data.measures import measure
from armorm.heads.debiasing import Debiasing
from armorm.objectives import Objective

MIN_ROWS = 10
_CODE = re.compile(r"```|^\s*(?:def |class |import |#include|SELECT )|\b(?:python|javascript|code|sql)\b", re.M)
_QUESTION = re.compile(r"\?\s*$")


def prompt_kind(conversation: Conversation) -> str:
    """A coarse kind of prompt: `several turns`, `code`, `question` (ends with a question mark) or `other`."""
    turns = [message for message in conversation.prompt if message.role == "user"]
    if len(turns) > 1:
        return "several turns"
    text = turns[-1].content if turns else ""
    if _CODE.search(text):
        return "code"
    return "question" if _QUESTION.search(text) else "other"


def residual_bias(
    debiasing: Debiasing,
    rewards: np.ndarray,
    gating_output: np.ndarray,
    actual: Sequence[tuple[str, np.ndarray]],
    names: Sequence[str],
    prompts: np.ndarray,
    sources: Sequence[str],
    kinds: Sequence[str],
) -> dict[str, Any]:
    """Remaining correlations with every bias.

    Args:
        rewards: (n, k) before the transform, of the served regression weights.
        gating_output: (n, k).
        actual: for each bias, the name and value (n,) of the quantity behind it, such as ("response tokens", lengths).
        names: (k,) objectives.
        prompts, sources, kinds: (n,) prompt, set and kind of prompt of each row.

    Returns:
        by bias: `predicted` and `actual`, each with `pooled` and `within_prompt`: `objectives` (`before`, `after` by
        name) and `score` (`before`, `after`); `score_by_source` and `score_by_kind`, pooled, with `n`; `measured_by`.
        None for fewer than `MIN_ROWS` rows.
    """
    debiased = debiasing.apply(rewards)
    scores = {"before": (gating_output * rewards).sum(1), "after": (gating_output * debiased).sum(1)}
    found: dict[str, Any] = {}
    for bias, (measured_by, quantity) in zip(debiasing.against, actual, strict=True):
        kept = [i for i in range(len(names)) if i not in debiasing.against]
        entry: dict[str, Any] = {"measured_by": measured_by}
        for label, target in (("predicted", rewards[:, bias]), ("actual", quantity)):
            entry[label] = {
                level: {
                    "objectives": {
                        names[i]: {
                            when: _remaining(values[:, i], target, debiasing.metric, level, prompts)
                            for when, values in (("before", rewards), ("after", debiased))
                        }
                        for i in kept
                    },
                    "score": {
                        when: _remaining(s, target, debiasing.metric, level, prompts) for when, s in scores.items()
                    },
                }
                for level in ("pooled", "within_prompt")
            }
        for key, groups in (("score_by_source", sources), ("score_by_kind", kinds)):
            entry[key] = {}
            for group in dict.fromkeys(groups):
                rows = np.array([name == group for name in groups])
                targets = (("predicted", rewards[:, bias]), ("actual", quantity))
                entry[key][group] = {"n": int(rows.sum())} | {
                    label: _remaining(scores["after"][rows], target[rows], debiasing.metric, "pooled", prompts[rows])
                    for label, target in targets
                }
        found[names[bias]] = entry
    return found


def _remaining(first: np.ndarray, second: np.ndarray, metric: Metric, level: str, prompts: np.ndarray) -> float | None:
    both = np.column_stack([first, second])
    if level == "within_prompt":
        both = within_groups(both, prompts)
    return correlation(metric)(both[:, 0], both[:, 1]) if len(both) >= MIN_ROWS else None


def reference_bias(debiasing: Debiasing, names: Sequence[str]) -> dict[str, Any]:
    """Correlations with the biases on the reference data, before and after the transform.

    Returns:
        `against` (text), `metric`, `level`, `method`, `explained` (R^2 by objective), `warnings`, `biases`: by bias,
        `penalties`, and `before` and `after` by objective; as a summary by objective `penalties`, and under `reference`
        `before` and `after`: of the bias with the largest absolute value.
    """
    by_bias = {
        names[bias]: {
            label: dict(zip(names, values[place].tolist(), strict=True))
            for label, values in (
                ("penalties", debiasing.penalties), ("before", debiasing.before), ("after", debiasing.after)
            )
        }
        for place, bias in enumerate(debiasing.against)
    }  # fmt: skip

    def largest(values: np.ndarray) -> dict[str, float]:
        place = np.abs(np.nan_to_num(values)).argmax(0)
        return dict(zip(names, values[place, np.arange(len(names))].tolist(), strict=True))

    return {
        "against": " and ".join(names[i] for i in debiasing.against),
        "metric": debiasing.metric,
        "level": debiasing.level,
        "method": debiasing.method,
        "penalties": largest(debiasing.penalties),
        "reference": {"before": largest(debiasing.before), "after": largest(debiasing.after)},
        "explained": dict(zip(names, debiasing.explained.tolist(), strict=True)),
        "biases": by_bias,
        "warnings": debiasing.warnings(names),
    }


def quantity_behind(
    objective: Objective, conversations: Sequence[Conversation], tokens: Sequence[int]
) -> tuple[str, np.ndarray]:
    """The quantity behind a bias: the measure of a computed objective, otherwise the tokens of the response.

    Returns:
        its name and values (n,).
    """
    if objective.compute is not None and objective.compute != "response_length":
        return objective.compute, measure(objective.compute, conversations, tokens)
    return "response tokens", np.asarray(tokens, np.float64)
