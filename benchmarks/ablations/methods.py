"""Methods of the ablation: each turns the same features into margins of the same held-out pairs.

A margin is the score of chosen minus that of rejected. Rewards of training pairs come from out-of-fold weights, which
were not fitted on their prompt; rewards of evaluated pairs come from the final weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ablations.corpus import Corpus, Pairs
from ablations.published import fit_published
from armorm.heads.bradley_terry import fit_bradley_terry
from armorm.heads.debiasing import Debiasing, fit_debiasing, no_debiasing
from armorm.heads.gate_training import GateReport, RewardPairs, fit_gate
from armorm.heads.joint import JointPairs, JointReport, fit_joint
from armorm.heads.regression import RegressionHead, fit_regression
from armorm.model.remote_code import GatingNetwork
from armorm.training.dataset import HELD_OUT_PAIRS, held_out_prompts
from armorm.training.finetune.record import residuals, with_start
from armorm.training.recipe import Recipe

# A gate whose weights are the same for every prompt: only the bias of its last layer is trained, at a higher rate.
CONSTANT_GATE = {"hidden_layers": 0, "temperature": 1.0, "dropout": 0.0, "learning_rate": 0.02}


@dataclass(frozen=True)
class Rewards:
    """Raw rewards of both sides of training pairs (p, k) and evaluated pairs (e, k), and of reference rows (n, k)."""

    chosen: np.ndarray
    rejected: np.ndarray
    test_chosen: np.ndarray
    test_rejected: np.ndarray
    reference: np.ndarray


class Bench:
    """Corpus, heads and settings that the methods share.

    Attributes:
        tests: all evaluated pairs: held-out pairs of the training sets, then the benchmarks.
        sets: (e,) set of each evaluated pair.
        held_out: (p,) training pairs held out by prompt for early stopping, calibration and penalty selection.
        head: stage 1, starting from the weights of a fine-tuned backbone, if any.
        plain_head: stage 1 fitted on these rows alone.
    """

    def __init__(self, corpus: Corpus, recipe: Recipe) -> None:
        self.corpus, self.recipe = corpus, recipe
        self.names = corpus.objectives.names
        parts = [corpus.test_pairs, *corpus.benchmarks.values()]
        self.tests = Pairs(
            *(np.concatenate([getattr(part, name) for part in parts]) for name in Pairs.__dataclass_fields__)
        )
        self.sets = np.concatenate(
            [corpus.test_pairs.sources, *(np.full(len(pairs), name) for name, pairs in corpus.benchmarks.items())]
        )
        self.held_out = held_out_prompts(corpus.pairs.prompts.tolist(), HELD_OUT_PAIRS)
        self.plain_head = self._regression(corpus.responses(corpus.train.rows), corpus.train.ratings)
        self.head = self.plain_head if corpus.start is None else self._regression_from(corpus.start)
        self.rewards = self.rewards_of(self.head, set(corpus.train.prompts.tolist()))
        self.debiasing = self.debias(self.rewards.reference)

    def _regression(self, features: np.ndarray, ratings: np.ndarray, *_: object) -> RegressionHead:
        return fit_regression(
            features,
            ratings,
            self.corpus.train.folds,
            self.names,
            alphas=self.recipe.regression.alphas,
            intercept=self.recipe.regression.intercept,
            weights=self.recipe.regression.weights,
        )

    def _regression_from(self, start: np.ndarray) -> RegressionHead:
        train = self.corpus.train
        features = self.corpus.responses(train.rows)
        left = residuals(start, features, train.ratings)
        return with_start(self._regression(features, left, train.folds, self.names), start, train.ratings)

    def rewards_of(self, head: RegressionHead, seen: set[str], *, out_of_fold: bool = True) -> Rewards:
        """Rewards of a head that was trained on the prompts `seen`."""
        corpus, pairs = self.corpus, self.corpus.pairs
        folds = np.where([out_of_fold and key in seen for key in pairs.prompts], pairs.folds, -1)
        return Rewards(
            head.predict_out_of_fold(corpus.responses(pairs.chosen), folds),
            head.predict_out_of_fold(corpus.responses(pairs.rejected), folds),
            head.predict(corpus.responses(self.tests.chosen)),
            head.predict(corpus.responses(self.tests.rejected)),
            head.predict_out_of_fold(corpus.responses(corpus.train.rows), corpus.train.folds),
        )

    def debias(
        self,
        reference: np.ndarray,
        prompts: np.ndarray | None = None,
        *,
        metric: str = "spearman",
        level: str = "pooled",
    ) -> Debiasing:
        """Debiasing transform against response length, fitted on reference rewards (n, k)."""
        groups = np.unique(self.corpus.train.prompts if prompts is None else prompts, return_inverse=True)[1]
        return fit_debiasing(reference, self.corpus.bias, metric=metric, level=level, groups=groups)  # type: ignore[arg-type]

    def gate(
        self,
        rewards: Rewards,
        debiasing: Debiasing,
        *,
        seed: int = 0,
        constant: bool = False,
        rows: np.ndarray | None = None,
        **changes: object,
    ) -> tuple[GatingNetwork, GateReport]:
        """Train a gate on the training pairs, or on the subset `rows`."""
        pairs = self.corpus.pairs
        index = np.arange(len(pairs)) if rows is None else rows
        prompt_index = self.corpus.features.prompt_index
        prompt = self.corpus.features.prompt
        held_out = self.held_out[index] if rows is None else held_out_prompts(
            pairs.prompts[index].tolist(), HELD_OUT_PAIRS
        )  # fmt: skip
        reward_pairs = RewardPairs(
            debiasing.apply(rewards.chosen)[index],
            debiasing.apply(rewards.rejected)[index],
            prompt_index[pairs.chosen[index]],
            prompt_index[pairs.rejected[index]],
            held_out,
        )
        if constant:
            prompt, changes = np.zeros_like(prompt), {**CONSTANT_GATE, **changes}
        return fit_gate(prompt, reward_pairs, self.recipe.gating.model_copy(update=changes), seed=seed)

    @torch.no_grad()
    def weights(self, network: GatingNetwork, rows: np.ndarray, constant: bool = False) -> np.ndarray:
        """Gating weights (n, k) for conversations."""
        prompts, index = np.unique(self.corpus.features.prompt_index[rows], return_inverse=True)
        features = self.corpus.features.prompt[prompts]
        found = network.weights(torch.from_numpy(np.zeros_like(features) if constant else features))
        return found.double().numpy()[index]

    def gated(
        self, network: GatingNetwork, rewards: Rewards, debiasing: Debiasing, constant: bool = False
    ) -> np.ndarray:
        """Margins (e,) of a gate."""
        scale = float(network.logit_scale.detach())
        sides = []
        for rows, values in ((self.tests.chosen, rewards.test_chosen), (self.tests.rejected, rewards.test_rejected)):
            sides.append(scale * (self.weights(network, rows, constant) * debiasing.apply(values)).sum(1))
        return sides[0] - sides[1]

    def joint(self) -> tuple[RegressionHead, JointReport]:
        """Heads trained jointly on ratings and pairs, with the coefficients of the gate on stage 1."""
        network, _ = self.gate(self.rewards, self.debiasing)
        corpus, pairs = self.corpus, self.corpus.pairs
        output = self.weights(network, pairs.chosen) * float(network.logit_scale.detach())
        return fit_joint(
            self.head,
            corpus.responses(corpus.train.rows),
            corpus.train.ratings,
            corpus.train.folds,
            JointPairs(
                corpus.responses(pairs.chosen) - corpus.responses(pairs.rejected),
                output @ self.debiasing.matrix.T,
                pairs.folds,
            ),
            intercept=self.recipe.regression.intercept,
            weights=self.recipe.regression.weights,
        )


def compare(bench: Bench, seeds: Sequence[int], published_steps: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Margins (seeds, e) of every way to weight the objectives, and notes on their training."""
    corpus, raw = bench.corpus, no_debiasing(len(bench.names))
    rewards = bench.rewards
    margins: dict[str, np.ndarray] = {}
    notes: dict[str, Any] = {}
    for suffix, debiasing in (("", bench.debiasing), (", not debiased", raw)):
        fits = [bench.gate(rewards, debiasing, seed=seed) for seed in seeds]
        margins[f"gate{suffix}"] = np.stack([bench.gated(network, rewards, debiasing) for network, _ in fits])
        notes[f"gate{suffix}"] = [
            {"accuracy": r.accuracy, "entropy": r.mean_entropy, "scale": r.logit_scale, "best_step": r.best_step}
            for _, r in fits
        ]
        network, _ = bench.gate(rewards, debiasing, constant=True)
        margins[f"fixed weights{suffix}"] = bench.gated(network, rewards, debiasing, constant=True)[None]
        notes[f"fixed weights{suffix}"] = dict(
            zip(bench.names, bench.weights(network, np.array([0]), True)[0].tolist(), strict=True)
        )
        training = debiasing.apply(rewards.chosen - rewards.rejected)
        test = debiasing.apply(rewards.test_chosen - rewards.test_rejected)
        linear = fit_bradley_terry(training, np.zeros_like(training), bench.held_out)
        margins[f"fixed weights of either sign{suffix}"] = (test @ linear)[None]
        margins[f"uniform weights{suffix}"] = test.mean(1)[None]
        alone = np.where(np.arange(len(bench.names)) == corpus.bias, -1.0, (training > 0).mean(0))
        best = int(alone.argmax())
        margins[f"best single objective{suffix}"] = test[:, best][None]
        notes[f"best single objective{suffix}"] = bench.names[best]
    in_sample = bench.rewards_of(bench.head, set(), out_of_fold=False)
    network, _ = bench.gate(in_sample, bench.debiasing)
    margins["gate trained on rewards seen in stage 1"] = bench.gated(network, rewards, bench.debiasing)[None]
    chosen, rejected = corpus.responses(corpus.pairs.chosen), corpus.responses(corpus.pairs.rejected)
    plain = fit_bradley_terry(chosen, rejected, bench.held_out)
    tests = corpus.responses(bench.tests.chosen).astype(np.float64) - corpus.responses(bench.tests.rejected)
    margins["plain Bradley-Terry head"] = (tests @ plain)[None]
    for label, axis in (("published script", 1), ("published script, right axis", -1)):
        found = fit_published(
            corpus.features.prompt,
            corpus.features.prompt_index[corpus.pairs.chosen],
            rewards.chosen,
            rewards.rejected,
            axis=axis,
            steps=published_steps,
        )
        prompts = corpus.features.prompt[corpus.features.prompt_index[bench.tests.chosen]]
        output = found.weights(prompts)
        margins[label] = (output[:, 0] * rewards.test_chosen - output[:, 1] * rewards.test_rejected).sum(1)[None]
        scale = float(found.network.logit_scale.detach())
        notes[label] = {"scale": scale, "steps": published_steps}
        if axis == 1:
            notes[label] |= {"furthest_weight_from_half": float(np.abs(output / scale - 0.5).max())}
    margins["always the longer response"] = bench.tests.longer.astype(np.float64)[None]
    return margins, notes
