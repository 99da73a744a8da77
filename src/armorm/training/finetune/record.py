"""Fine-tuning record: prompts the backbone was trained on, so later stages can exclude them.

Features of rows that a backbone was fine-tuned on fit their ratings better than those of other rows. Heads fitted on
them would overfit: penalties too small, a gate that follows what was memorised, metrics too good. So wherever such a
backbone is used, in the run that made it or in a later one, its prompts and near-duplicates of them are excluded and
counted. The record, `finetuned.safetensors` next to the weights, also has the linear reward heads that were trained
with the backbone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from armorm.backbone.locate import backbone_path
from armorm.backbone.readout import Readout
from armorm.data.preferences import PreferencePair
from armorm.data.seen_prompts import SeenPrompts
from armorm.errors import CheckpointError, FitError
from armorm.files import read_arrays, write_arrays
from armorm.heads.regression import RegressionHead
from armorm.objectives import ObjectiveSet
from armorm.training.dataset import TrainingData

FILE = "finetuned.safetensors"


@dataclass(frozen=True)
class Finetuned:
    """The record of a fine-tuned backbone."""

    seen: SeenPrompts  # the prompts
    objectives: list[dict[str, Any]]  # the trained objectives, as dictionaries
    weight: np.ndarray  # (k, d) float32 reward heads that were trained with the backbone
    facts: dict[str, Any]  # settings and dataset sizes
    key: str = ""  # digest of everything that decided the result

    def start(self, objectives: ObjectiveSet, readout: Readout) -> np.ndarray | None:
        """Trained weights (k, d) float64 of objectives; zero for those that were not trained, or on another scale.

        None if there is no other, or if features are read from another layer, or pooled otherwise, than in training.
        """
        trained = Readout.from_settings(self.facts.get("readout", {}))
        if (trained.layer, trained.pooling) != (readout.layer, readout.pooling):
            return None
        rows = {json.dumps(entry, sort_keys=True): row for row, entry in enumerate(self.objectives)}
        weight = np.zeros((len(objectives), self.weight.shape[1]))
        for place, objective in enumerate(objectives.to_dicts()):
            row = rows.get(json.dumps(objective, sort_keys=True))
            if row is not None:
                weight[place] = self.weight[row]
        return weight if weight.any() else None

    def write(self, folder: Path) -> None:
        metadata = {"objectives": json.dumps(self.objectives), "facts": json.dumps(self.facts), "key": self.key}
        write_arrays(folder / FILE, {**self.seen.arrays(), "weight": self.weight.astype(np.float32)}, metadata)

    @classmethod
    def read(cls, backbone: str | Path) -> Finetuned | None:
        """The record of a backbone (folder or embedded name), or None.

        Raises:
            CheckpointError: for a damaged record.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(backbone_path(backbone)) / FILE
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="np") as file:
                metadata: Mapping[str, str] = file.metadata() or {}
            objectives, facts = json.loads(metadata["objectives"]), json.loads(metadata["facts"])
            arrays = read_arrays(path)
            return cls(SeenPrompts.of_arrays(arrays), objectives, arrays["weight"], facts, metadata["key"])
        except (SafetensorError, KeyError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged fine-tuning record ({error})") from None


def without_finetuned(data: TrainingData, record: Finetuned) -> TrainingData:
    """The data without prompts that the backbone was fine-tuned on; excluded rows are counted in `left_out`.

    Raises:
        FitError: if no rated row or no pair remains for the heads.
    """
    known = record.seen.find(data.table.conversations) > 0

    def new(pairs: list[PreferencePair]) -> list[PreferencePair]:
        seen = record.seen.find([pair.chosen for pair in pairs])
        return [pair for pair, roles in zip(pairs, seen, strict=True) if not roles]

    remaining = replace(
        data,
        train_rows=data.train_rows[~known[data.train_rows]],
        test_rows=data.test_rows[~known[data.test_rows]],
        pairs=new(data.pairs),
        test_pairs=new(data.test_pairs),
        evaluations={name: new(pairs) for name, pairs in data.evaluations.items()},
        left_out=dict(data.left_out),
    )
    before, after = (
        {
            "rated training rows": len(part.train_rows),
            "rated test rows": len(part.test_rows),
            "training pairs": len(part.pairs),
            "test pairs": len(part.test_pairs),
            "evaluation pairs": sum(map(len, part.evaluations.values())),
        }
        for part in (data, remaining)
    )
    for kind, count in before.items():
        if count and not after[kind] and kind in ("rated training rows", "training pairs"):
            raise FitError(
                f"the backbone was fine-tuned on the prompts of all {count:,} {kind}; expected some others, to fit the "
                "heads on (finetune.share)"
            )
        if count > after[kind]:
            reason = f"{kind} whose prompt the backbone was fine-tuned on"
            remaining.left_out[reason] = count - after[kind]
    return remaining


def residuals(start: np.ndarray, features: np.ndarray, ratings: np.ndarray) -> np.ndarray:
    """Ratings (n, k) minus the predictions of weights `start` (k, d) for features (n, d), float64."""
    return ratings - features.astype(np.float64) @ start.T


def with_start(head: RegressionHead, start: np.ndarray, ratings: np.ndarray) -> RegressionHead:
    """The head of the ratings (n, k), from one fitted to the residuals of `start`: ridge with the penalty
    alpha |w - start|^2. R^2 is relative to the variance of the ratings.

    Few rows are new to a fine-tuned backbone, while the weights that were trained with it have seen the rest; alpha,
    chosen on new prompts, says how far to move from them. `start` never saw these rows, so fold weights stay out of
    fold.
    """
    variance = np.nanvar(ratings.astype(np.float64), axis=0)
    reports = []
    for report, spread in zip(head.reports, variance, strict=True):
        r2 = float(1 - min(report.validation_errors) / spread) if spread else report.r2
        warning = "" if r2 > 0 else "held-out error is no better than always predicting the mean"
        reports.append(replace(report, r2=r2, warning=warning))
    return replace(head, weight=head.weight + start, fold_weight=head.fold_weight + start, reports=reports)
