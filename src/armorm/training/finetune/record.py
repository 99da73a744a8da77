"""What a fine-tuned backbone remembers of its training, in a file beside its weights.

In:  the prompts that it was fine-tuned on, and the linear rewards that were learned with it.
Out: `finetuned.safetensors` in the backbone's folder; `without_finetuned`, which takes those prompts out of a plan.

Features of rows that a backbone was fine-tuned on fit their ratings better than those of any other row. Heads that
saw them would trust them too much: penalties too small, a gate that follows what was memorised, figures that flatter.
So wherever such a backbone is used, in the run that made it or in any later one, its prompts are left out and counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from armorm.embedded import embedded_path
from armorm.errors import CheckpointError, FitError
from armorm.files import write_arrays
from armorm.heads.regression import RegressionHead
from armorm.objectives import ObjectiveSet
from armorm.training.dataset import EvaluationSet, TrainingData

FILE = "finetuned.safetensors"
_KEY_DIGITS = 16  # of a prompt's 32: ten million prompts collide with a chance of 3e-6


@dataclass(frozen=True)
class Finetuned:
    """The record of a fine-tuned backbone.

    Attributes:
        prompts: first 16 hex digits of each prompt's content key.
        objectives: those that were learned, as dictionaries.
        weight: (k, d) float32, the linear rewards that were learned with the backbone.
        facts: settings and figures of the training.
        key: of all that decided it.
    """

    prompts: frozenset[str]
    objectives: list[dict[str, Any]]
    weight: np.ndarray
    facts: dict[str, Any]
    key: str = ""

    def has(self, prompt_key: str) -> bool:
        """Whether the backbone was fine-tuned on a prompt."""
        return prompt_key[:_KEY_DIGITS] in self.prompts

    def start(self, objectives: ObjectiveSet) -> np.ndarray:
        """Weights (k, d) float64 to start from, zero where an objective, or its scale, is another."""
        rows = {json.dumps(entry, sort_keys=True): row for row, entry in enumerate(self.objectives)}
        weight = np.zeros((len(objectives), self.weight.shape[1]))
        for place, objective in enumerate(objectives.to_dicts()):
            row = rows.get(json.dumps(objective, sort_keys=True))
            if row is not None:
                weight[place] = self.weight[row]
        return weight

    def write(self, folder: Path) -> None:
        """Write the record, whole."""
        keys = np.frombuffer(bytes.fromhex("".join(sorted(self.prompts))), np.uint8).reshape(-1, _KEY_DIGITS // 2)
        metadata = {"objectives": json.dumps(self.objectives), "facts": json.dumps(self.facts), "key": self.key}
        write_arrays(folder / FILE, {"prompts": keys, "weight": self.weight.astype(np.float32)}, metadata)

    @classmethod
    def read(cls, backbone: str | Path) -> Finetuned | None:
        """The record of a backbone (folder, or name of an embedded one), None for one that has none.

        Raises:
            CheckpointError: for a damaged record.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(embedded_path(str(backbone)) or backbone) / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
                prompts, weight = file.get_tensor("prompts"), file.get_tensor("weight")
            return cls(
                frozenset(row.tobytes().hex() for row in prompts),
                json.loads(metadata["objectives"]),
                weight,
                json.loads(metadata["facts"]),
                metadata["key"],
            )
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged record of fine-tuning ({error})") from None


def short_keys(prompt_keys: list[str]) -> frozenset[str]:
    """Prompt keys as the record holds them."""
    return frozenset(key[:_KEY_DIGITS] for key in prompt_keys)


def without_finetuned(data: TrainingData, record: Finetuned) -> TrainingData:
    """A plan without the prompts that the backbone was fine-tuned on; each kind of row left out is counted.

    Raises:
        FitError: where no rated row, or no pair, is left for the heads.
    """
    conversations = data.table.conversations
    known = np.array([record.has(conversation.prompt_key) for conversation in conversations], bool)
    train_rows, test_rows = data.train_rows[~known[data.train_rows]], data.test_rows[~known[data.test_rows]]
    pairs = [pair for pair in data.pairs if not record.has(pair.prompt_key)]
    test_pairs = [pair for pair in data.test_pairs if not record.has(pair.prompt_key)]
    evaluations = [
        EvaluationSet(entry.name, [pair for pair in entry.pairs if not record.has(pair.prompt_key)])
        for entry in data.evaluations
    ]
    for kind, before, after in (("rated rows", data.train_rows, train_rows), ("pairs", data.pairs, pairs)):
        if len(before) and not len(after):
            raise FitError(
                f"the backbone was fine-tuned on the prompts of all {len(before):,} training {kind}; expected some "
                "that are new to it, for the heads (finetune.share)"
            )
    counts = {
        "rated training rows whose prompt the backbone was fine-tuned on": len(data.train_rows) - len(train_rows),
        "rated test rows whose prompt the backbone was fine-tuned on": len(data.test_rows) - len(test_rows),
        "training pairs whose prompt the backbone was fine-tuned on": len(data.pairs) - len(pairs),
        "test pairs whose prompt the backbone was fine-tuned on": len(data.test_pairs) - len(test_pairs),
        "evaluation pairs whose prompt the backbone was fine-tuned on": sum(
            len(before.pairs) - len(after.pairs) for before, after in zip(data.evaluations, evaluations, strict=True)
        ),
    }
    return replace(
        data,
        train_rows=train_rows,
        test_rows=test_rows,
        pairs=pairs,
        test_pairs=test_pairs,
        evaluations=evaluations,
        left_out={**data.left_out, **{reason: count for reason, count in counts.items() if count}},
    )


def fit_from(
    start: np.ndarray,
    fit: Callable[[np.ndarray, np.ndarray, np.ndarray, Sequence[str]], RegressionHead],
    features: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    names: Sequence[str],
) -> RegressionHead:
    """Stage 1 whose penalty draws towards given weights rather than to zero: alpha |w - start|^2.

    The rows that a backbone was not fine-tuned on are few; the weights that were learned with it know the rest. Alpha,
    chosen on prompts that neither saw, says how far to leave them. (The residuals of `start` are fitted, and `start` is
    added; it never saw these rows, so that the weights of each fold stay out of fold.)

    Args:
        start: (k, d) weights; a row of zeros is ordinary ridge.
        fit: stage 1, as `fit_regression`.
    """
    return with_start(fit(features, residuals(start, features, ratings), folds, names), start, ratings)


def residuals(start: np.ndarray, features: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Ratings (n, k) less what the weights `start` (k, d) say of features (n, d), float64."""
    return ratings - features.astype(np.float64) @ start.T


def with_start(head: RegressionHead, start: np.ndarray, ratings: np.ndarray) -> RegressionHead:
    """A head that was fitted on residuals with `start` added, its R^2 against the spread of the ratings (n, k)."""
    variance = np.nanvar(ratings.astype(np.float64), axis=0)
    reports = []
    for report, spread in zip(head.reports, variance, strict=True):
        r2 = float(1 - min(report.validation_errors) / spread) if spread else report.r2
        warning = "" if r2 > 0 else "held-out error is no better than always predicting the mean"
        reports.append(replace(report, r2=r2, warning=warning))
    return replace(head, weight=head.weight + start, fold_weight=head.fold_weight + start, reports=reports)
