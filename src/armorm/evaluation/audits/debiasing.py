"""What is left of a bias on held-out data: by objective, of the gated score, by source and by kind of prompt.

In:  rewards, gating weights, and the quantities behind the biases, of n held-out rated rows.
Out: for each bias, correlations with its predicted reward and with the actual quantity, pooled and within prompts.

The transform is fitted on reference data against predicted biases. It says nothing by itself about other prompts,
about the actual length, or about differences within a prompt, which alone move a ranking: this does.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from armorm.conversation import Conversation
from armorm.correlation import Metric, correlation
from armorm.data.measures import measure
from armorm.heads.debiasing import Debiasing, within_groups
from armorm.objectives import Objective

MIN_ROWS = 10
_CODE = re.compile(r"```|^\s*(?:def |class |import |#include|SELECT )|\b(?:python|javascript|code|sql)\b", re.M)
_QUESTION = re.compile(r"\?\s*$")


def prompt_kind(conversation: Conversation) -> str:
    """A coarse kind of prompt: `several turns`, `code`, `question` (its last turn ends with one), or `other`."""
    turns = [message for message in conversation.prompt if message.role == "user"]
    if len(turns) > 1:
        return "several turns"
    text = turns[-1].content if turns else ""
    if _CODE.search(text):
        return "code"
    return "question" if _QUESTION.search(text) else "other"


def stability_figures(
    debiasing: Debiasing,
    rewards: np.ndarray,
    gating_output: np.ndarray,
    actual: Sequence[tuple[str, np.ndarray]],
    names: Sequence[str],
    prompts: np.ndarray,
    sources: Sequence[str],
    kinds: Sequence[str],
) -> dict[str, Any]:
    """Figures of every bias.

    Args:
        rewards: (n, k) before the transform, by the weights that are served.
        gating_output: (n, k).
        actual: for each bias, what is behind it and its value (n,), such as ("response tokens", lengths).
        names: (k,) objectives.
        prompts, sources, kinds: (n,) prompt, set and kind of prompt of each row.

    Returns:
        by bias: `predicted` and `actual`, each with `pooled` and `within_prompt`: `objectives` (`before`, `after` by
        name) and `score` (`before`, `after`); `score_by_source` and `score_by_kind`, pooled, with `n`; `measured_by`.
        None where fewer than `MIN_ROWS` rows say something.
    """
    debiased = debiasing.apply(rewards)
    scores = {"before": (gating_output * rewards).sum(1), "after": (gating_output * debiased).sum(1)}
    figures: dict[str, Any] = {}
    for bias, (measured_by, quantity) in zip(debiasing.against, actual, strict=True):
        kept = [i for i in range(len(names)) if i not in debiasing.against]
        entry: dict[str, Any] = {"measured_by": measured_by}
        for label, target in (("predicted", rewards[:, bias]), ("actual", quantity)):
            entry[label] = {
                level: {
                    "objectives": {
                        names[i]: {
                            when: _left(values[:, i], target, debiasing.metric, level, prompts)
                            for when, values in (("before", rewards), ("after", debiased))
                        }
                        for i in kept
                    },
                    "score": {when: _left(s, target, debiasing.metric, level, prompts) for when, s in scores.items()},
                }
                for level in ("pooled", "within_prompt")
            }
        for key, groups in (("score_by_source", sources), ("score_by_kind", kinds)):
            entry[key] = {}
            for group in dict.fromkeys(groups):
                rows = np.array([name == group for name in groups])
                targets = (("predicted", rewards[:, bias]), ("actual", quantity))
                entry[key][group] = {"n": int(rows.sum())} | {
                    label: _left(scores["after"][rows], target[rows], debiasing.metric, "pooled", prompts[rows])
                    for label, target in targets
                }
        figures[names[bias]] = entry
    return figures


def _left(first: np.ndarray, second: np.ndarray, metric: Metric, level: str, prompts: np.ndarray) -> float | None:
    both = np.column_stack([first, second])
    if level == "within_prompt":
        both = within_groups(both, prompts)
    return correlation(metric)(both[:, 0], both[:, 1]) if len(both) >= MIN_ROWS else None


def debiasing_figures(debiasing: Debiasing, names: Sequence[str]) -> dict[str, Any]:
    """What the transform does on reference data.

    Returns:
        `against` (text), `metric`, `level`, `method`, `explained` (R^2 by objective), `warnings`, `biases`: by bias,
        `penalties`, and `before` and `after` by objective; and for one line a model, `penalties`, and under `reference`
        `before` and `after`: those of the only bias, or of several the one whose value is largest.
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
    """What a bias stands for, measured: a computed objective's own measure, else the response's tokens.

    Returns:
        its name, and values (n,).
    """
    if objective.compute is not None and objective.compute != "response_length":
        return objective.compute, measure(objective.compute, conversations, tokens)
    return "response tokens", np.asarray(tokens, np.float64)
