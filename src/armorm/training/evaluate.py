"""The figures of a run, for metrics.json: what debiasing left, how sure the heads are, what the model gets right.

In:  a run's data, corpus and parts.
Out: plain values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armorm.data.preferences import PreferencePair
from armorm.data.ratings import RatingTable
from armorm.evaluation.audits.debiasing import (
    MIN_ROWS,
    prompt_kind,
    quantity_behind,
    reference_bias,
    residual_bias,
)
from armorm.evaluation.audits.uncertainty import uncertainty_audit
from armorm.evaluation.runner import evaluate
from armorm.heads.debiasing import Debiasing
from armorm.heads.regression import RegressionHead
from armorm.heads.uncertainty import Uncertainty
from armorm.model.remote_code import GatingNetwork
from armorm.reward_model import ArmoRM
from armorm.training.dataset import TrainingData, group_index
from armorm.training.featurize import Corpus
from armorm.training.pair_metrics import pair_figures, rating_figures
from armorm.training.stages import rating_levels


@dataclass(frozen=True)
class RunFigures:
    """Figures of one run.

    Attributes:
        data: of the run.
        corpus: its conversations.
        folder: of the run; results of benchmarks go to `benchmarks` in it.
    """

    data: TrainingData
    corpus: Corpus
    folder: Path

    def debiasing(
        self,
        debiasing: Debiasing,
        table: RatingTable,
        test_rows: np.ndarray,
        head: RegressionHead,
        network: GatingNetwork,
    ) -> dict[str, Any] | None:
        """Correlation with the biases before and after, on reference data and on held-out rated rows."""
        if not debiasing.against:
            return None
        figures = reference_bias(debiasing, table.objectives.names)
        if len(test_rows) >= MIN_ROWS:
            conversations = [table.conversations[i] for i in test_rows]
            rows = self.corpus.indices(conversations)
            tokens = [self.corpus.encoded[i].response_tokens for i in rows]
            features = self.corpus.features(rows)
            with torch.no_grad():
                output = network(torch.from_numpy(features.prompt)).double().numpy()[features.prompt_index]
            figures["stability"] = residual_bias(
                debiasing,
                head.predict(features.response),
                output,
                [quantity_behind(table.objectives[i], conversations, tokens) for i in debiasing.against],
                table.objectives.names,
                group_index([conversation.prompt_key for conversation in conversations]),
                [table.sources[i] for i in test_rows],
                [prompt_kind(conversation) for conversation in conversations],
            )
        return figures

    def uncertainty(
        self,
        uncertainty: Uncertainty | None,
        head: RegressionHead,
        table: RatingTable,
        train_rows: np.ndarray,
        test_rows: np.ndarray,
    ) -> dict[str, Any] | None:
        if uncertainty is None:
            return None
        features = self.corpus.responses(self.corpus.indices([table.conversations[i] for i in test_rows]))
        return uncertainty_audit(
            uncertainty,
            head.predict(features),
            features,
            table.ratings[test_rows],
            rating_levels(table.ratings[train_rows]),
            table.objectives,
            [table.sources[i] for i in test_rows],
        )

    def evaluation(
        self, model: ArmoRM, table: RatingTable, test_rows: np.ndarray, debiasing: Debiasing
    ) -> dict[str, Any]:
        names = table.objectives.names
        figures: dict[str, Any] = {}
        if self.data.evaluate_ratings and len(test_rows):
            conversations = [table.conversations[i] for i in test_rows]
            batch = model.score_features(self.corpus.features(self.corpus.indices(conversations)))
            prompts = group_index([conversation.prompt_key for conversation in conversations])
            figures["ratings"] = rating_figures(batch.rewards, table.ratings[test_rows], table.objectives, prompts)
        sets = [(evaluation.name, evaluation.pairs) for evaluation in self.data.evaluations]
        sources = dict.fromkeys(pair.source for pair in self.data.test_pairs)
        sets += [(f"{source} (test)", [p for p in self.data.test_pairs if p.source == source]) for source in sources]
        for name, pairs in sets:
            figures.setdefault("pairs", {})[name] = self._pairs(model, pairs, debiasing, names)
        for name, benchmark, places in self.data.benchmarks:
            results = evaluate(benchmark, model, places, output=self.folder / "benchmarks" / f"{name}.json", quiet=True)
            figures.setdefault("benchmarks", {})[name] = {
                "counts": dict(results.counts),
                "figures": [asdict(metric) for metric in results.metrics],
            }
        return figures

    def _pairs(
        self, model: ArmoRM, pairs: Sequence[PreferencePair], debiasing: Debiasing, names: list[str]
    ) -> dict[str, Any]:
        sides = [
            self.corpus.indices([pair.chosen for pair in pairs]),
            self.corpus.indices([pair.rejected for pair in pairs]),
        ]
        scored = (sides[0] >= 0) & (sides[1] >= 0)
        margins = np.full(len(pairs), np.nan)
        reward_margins = np.full((len(pairs), len(names)), np.nan)
        lengths = np.zeros(len(pairs))
        if scored.any():
            chosen, rejected = (model.score_features(self.corpus.features(side[scored])) for side in sides)
            margins[scored] = chosen.scores.astype(np.float64) - rejected.scores
            reward_margins[scored] = debiasing.apply(chosen.rewards.astype(np.float64) - rejected.rewards)
            tokens = [np.array([self.corpus.encoded[i].response_tokens for i in side[scored]]) for side in sides]
            lengths[scored] = tokens[0] - tokens[1]
        return pair_figures(
            margins,
            reward_margins,
            lengths,
            [pair.subset for pair in pairs],
            [pair.prompt_key for pair in pairs],
            names,
        )
