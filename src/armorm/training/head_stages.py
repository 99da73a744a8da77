"""The stages of a run that fit heads, each kept on disk under a key of all that decides it.

In:  a recipe, the folder of the run; rows, pairs and features that `pipeline.py` hands from stage to stage.
Out: regression head and uncertainty, transform, gate, and on request joint heads and quantile heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from armorm.backbone.decoder import resolve_device
from armorm.conversation import Conversation
from armorm.data.preferences import PreferencePair
from armorm.files import plain, read_arrays, write_arrays
from armorm.heads.debiasing import Debiasing, fit_debiasing, no_debiasing
from armorm.heads.gating import GateReport, GateSettings, GatingNetwork, RewardPairs, fit_gate
from armorm.heads.joint import JointPairs
from armorm.heads.regression import RegressionHead, fold_of
from armorm.heads.statistics import RatingStatistics
from armorm.heads.uncertainty import Uncertainty
from armorm.reward_model import ArmoRM
from armorm.training.beyond import joint_stage, pair_coefficients, quantile_stage
from armorm.training.corpus import Corpus
from armorm.training.finetune.record import with_start
from armorm.training.recipe import Recipe
from armorm.training.sharded import statistics_by_ray
from armorm.training.splits import HELD_OUT_PAIRS, group_index, held_out_prompts, relative_margins
from armorm.training.stage1 import STATISTICS, RatedRows, fit_stage1, from_kept, to_kept
from armorm.training.tracking import Tracking

# Rewards (n, k) of conversations, out of fold where stage 1 was trained on their prompt.
Served = Callable[[Sequence[Conversation]], np.ndarray]


class HeadStages:
    """The stages of one run; a stage whose key is on disk is read, not computed."""

    def __init__(self, recipe: Recipe, folder: Path, console: Console) -> None:
        self.recipe, self.folder, self.console = recipe, folder, console
        self.work = folder / "work"

    def regression(
        self, rated: RatedRows, start: np.ndarray | None, key: str
    ) -> tuple[RegressionHead, Uncertainty | None]:
        """Stage 1; the penalty draws towards the weights `start` (k, d), where a fine-tuned backbone brought some."""
        section = self.recipe.regression
        if start is not None:  # what is summed then are residuals, of no use to anyone who adds ratings later
            section = section.model_copy(update={"keep_statistics": False})

        def by_workers() -> RatingStatistics:
            return statistics_by_ray(rated.stored(section.folds), self.recipe.backbone.workers)

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            head, uncertainty = fit_stage1(
                section,
                partial(rated.blocks, start),
                rated.names,
                rated.store.hidden_size,
                rated.levels,
                self.work / STATISTICS,
                by_workers if self.recipe.backbone.engine == "ray" and start is None else None,
            )
            return to_kept(head if start is None else with_start(head, start, rated.ratings), uncertainty)

        return from_kept(*_kept(self.work / "regression.safetensors", key, compute))

    def debiasing(self, reference: Sequence[Conversation], rewards: np.ndarray, names: list[str]) -> Debiasing:
        """The transform, fitted on the reference's rewards (n, k)."""
        section = self.recipe.debias
        if section is None:
            return self._rounded(no_debiasing(len(names)), rewards)
        prompts = group_index([conversation.prompt_key for conversation in reference])
        debiasing = fit_debiasing(
            rewards,
            [names.index(name) for name in section.against],
            metric=section.metric,
            level=section.level,
            groups=prompts,
            method=section.method,
        )
        for warning in debiasing.warnings(names):
            self.console.print(f"warning: {warning}")
        return self._rounded(debiasing, rewards)

    def _rounded(self, debiasing: Debiasing, rewards: np.ndarray) -> Debiasing:
        """The transform as it is served: with the rewards' scales folded in if asked for, in float32."""
        if self.recipe.gating.scale_rewards:
            debiasing = debiasing.scaled(rewards)
        # The served matrix is float32: the same one trains the gate.
        return Debiasing(**{**vars(debiasing), "matrix": debiasing.matrix.astype(np.float32).astype(np.float64)})

    def gate(
        self,
        pairs: list[PreferencePair],
        served: Served,
        debiasing: Debiasing,
        corpus: Corpus,
        key: str,
    ) -> tuple[GatingNetwork, GateReport]:
        """Stage 2, on the debiased rewards of the pairs' sides."""
        section = self.recipe.gating
        own = section.model_dump(exclude={"source_weights", "scale_rewards"})
        settings = GateSettings(**own, seed=self.recipe.seed)
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        prompt_rows = corpus.prompt_index
        d = corpus.prompt.shape[1]

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            reward_pairs = RewardPairs(
                chosen=debiasing.apply(served(chosen)),
                rejected=debiasing.apply(served(rejected)),
                chosen_prompt=prompt_rows[corpus.indices(chosen)],
                rejected_prompt=prompt_rows[corpus.indices(rejected)],
                held_out=held_out_prompts([pair.prompt_key for pair in pairs], HELD_OUT_PAIRS),
                margin=relative_margins(pairs) if section.margin else None,
                weight=np.array([section.source_weights.get(pair.source, 1.0) for pair in pairs]),
            )
            device = resolve_device(self.recipe.backbone.device)
            settings_kept = self.recipe.model_dump(mode="json")
            with Tracking(self.folder, self.recipe.report_to, self.recipe.name, settings_kept) as tracking:
                log = partial(tracking.log, "gate")
                network, report = fit_gate(corpus.prompt, reward_pairs, settings, device=device, log=log)
            return {name: tensor.numpy() for name, tensor in network.state_dict().items()}, asdict(report)

        arrays, report = _kept(self.work / "gate.safetensors", key, compute)
        network = GatingNetwork(
            d,
            len(debiasing.matrix),
            hidden_size=section.hidden_size,
            hidden_layers=section.hidden_layers,
            temperature=section.temperature,
        )
        network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        found = GateReport(**report)
        if found.collapse:
            self.console.print(f"warning: the gate has collapsed: {found.collapse}; its weights do not read the prompt")
        return network.eval(), found

    def joint(
        self,
        stage_1: tuple[RegressionHead, Uncertainty | None, RatedRows],
        pairs: list[PreferencePair],
        served: Served,
        debiasing: Debiasing,
        corpus: Corpus,
        key: str,
    ) -> tuple[RegressionHead, Uncertainty | None, Any]:
        """Heads trained on ratings and pairs together, from the coefficients that a first gate gives the pairs.

        Args:
            stage_1: head and uncertainty, and the rows that they were fitted on.
        """
        recipe = self.recipe
        assert recipe.joint is not None
        section = recipe.joint
        head, uncertainty, rated = stage_1

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            network, _ = self.gate(pairs, served, debiasing, corpus, key)
            chosen, rejected = (corpus.indices([getattr(p, side) for p in pairs]) for side in ("chosen", "rejected"))
            joint_pairs = JointPairs(
                corpus.responses(chosen) - corpus.responses(rejected),
                pair_coefficients(network, debiasing, corpus.prompt[corpus.prompt_index[chosen]]),
                np.array([fold_of(pair.prompt_key, recipe.regression.folds) for pair in pairs]),
            )
            return joint_stage(
                head,
                uncertainty,
                rated.features(),
                rated.ratings,
                rated.folds,
                rated.levels,
                joint_pairs,
                section,
                recipe.regression,
            )

        arrays, report = _kept(self.work / "joint.safetensors", key, compute)
        return *from_kept(arrays, report), report["joint"]

    @torch.no_grad()
    def quantiles(self, model: ArmoRM, head: RegressionHead, rated: RatedRows, key: str) -> Any:
        """Fit quantile heads and put them into the model, beside the score."""
        section = self.recipe.quantiles
        assert section is not None

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            features = rated.features()
            rewards = head.predict_out_of_fold(features, rated.folds)
            return quantile_stage(features, rated.ratings, rewards, rated.folds, rated.names, section)

        arrays, report = _kept(self.work / "quantiles.safetensors", key, compute)
        model.model.add_quantiles(report["objectives"], report["levels"], arrays["weight"], arrays["bias"])
        return report


def _kept(
    path: Path, key: str, compute: Callable[[], tuple[dict[str, np.ndarray], Any]]
) -> tuple[dict[str, np.ndarray], Any]:
    """A stage's arrays and report: those on disk if they were made from the same things, else computed and kept."""
    from safetensors import safe_open

    if path.exists():
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        if metadata.get("key") == key:
            return read_arrays(path), json.loads(metadata["report"])
    arrays, report = compute()
    write_arrays(path, arrays, {"key": key, "report": json.dumps(plain(report))})
    return arrays, json.loads(json.dumps(plain(report)))
