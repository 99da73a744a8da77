"""The stages of a run that fit heads, each kept on disk under a key of all that decides it.

In:  a recipe, the folder of the run; rows, pairs and features that `pipeline.py` hands from stage to stage.
Out: regression head and uncertainty, transform, gate, and on request joint heads and quantile heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from armorm.backbone.decoder import resolve_device
from armorm.conversation import Conversation
from armorm.data.preferences import PreferencePair
from armorm.features.store import FeatureStore
from armorm.files import plain, read_arrays, write_arrays
from armorm.heads.accumulation import RatedBlock, accumulate, blocks_of
from armorm.heads.debiasing import Debiasing, fit_debiasing, no_debiasing
from armorm.heads.gate_training import GateReport, GateSettings, RewardPairs, fit_gate
from armorm.heads.joint import JointPairs, JointReport, fit_joint
from armorm.heads.quantiles import fit_quantiles
from armorm.heads.regression import RegressionHead, RegressionReport, fit_from_statistics, fold_of
from armorm.heads.statistics import RatingStatistics
from armorm.heads.uncertainty import ENOUGH_LEVELS, Uncertainty, calibrate, error_correlation, fit_uncertainty
from armorm.model.remote_code import GatingNetwork
from armorm.reward_model import ArmoRM
from armorm.training.dataset import HELD_OUT_PAIRS, group_index, held_out_prompts, relative_margins
from armorm.training.featurize import Corpus, StoredRows, statistics_by_ray
from armorm.training.finetune.record import residuals, with_start
from armorm.training.recipe import Recipe
from armorm.training.schema import JointSection, QuantilesSection, RegressionSection
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


Blocks = Callable[[], Iterable[RatedBlock]]

STATISTICS = "statistics.safetensors"

_HEAD = ("weight", "bias", "fold_weight", "fold_bias")


@dataclass(frozen=True)
class RatedRows:
    """Rated rows whose features lie in a store.

    Attributes:
        store: of the features.
        keys: (n,) key of each row there.
        ratings: (n, k) mapped, NaN where missing.
        folds: (n,) int.
        names: (k,) objectives.
        levels: (k,) different values of each objective's ratings.
    """

    store: FeatureStore
    keys: np.ndarray
    ratings: np.ndarray
    folds: np.ndarray
    names: list[str]
    levels: list[int]

    def features(self) -> np.ndarray:
        """(n, d) float32, all of them in memory."""
        return self.store.responses(self.keys)

    def blocks(self, start: np.ndarray | None = None) -> Iterator[RatedBlock]:
        """The rows, a block at a time, in the order of the store's shards.

        Args:
            start: (k, d) weights; what they leave of the ratings is what is given then.
        """
        for places, features in self.store.blocks(self.keys):
            ratings = self.ratings[places]
            left = ratings if start is None else residuals(start, features, ratings)
            yield RatedBlock(features, left, self.folds[places])

    def stored(self, fold_count: int) -> StoredRows:
        """The rows as they travel to the tasks of a cluster, in the order of the store's shards."""
        order = self.store.order(self.keys)
        folder = str(self.store.folder.resolve())
        return StoredRows(folder, self.keys[order], self.ratings[order], self.folds[order], self.names, fold_count)


def fit_stage1(
    section: RegressionSection,
    blocks: Blocks,
    names: Sequence[str],
    hidden_size: int,
    levels: Sequence[int],
    file: Path,
    total: Callable[[], RatingStatistics] | None = None,
) -> tuple[RegressionHead, Uncertainty | None]:
    """Statistics, weights, uncertainty.

    Args:
        blocks: the training rows, from the start at every call; mapped ratings.
        names: (k,) objectives.
        levels: (k,) different values of each objective's ratings; intervals need `ENOUGH_LEVELS`.
        file: where the statistics are kept, if the section says so.
        total: sums the same rows in some other way; by default they pass by here.

    Returns:
        the head, rounded to float32, as it is served and as it trains the gate; the uncertainty, if asked for.
    """
    statistics = total() if total else accumulate(blocks(), names, section.folds, hidden_size)
    if section.keep_statistics:
        statistics.save(file)
    return fit_kept_statistics(section, statistics, blocks, levels)


def fit_kept_statistics(
    section: RegressionSection, statistics: RatingStatistics, blocks: Blocks | None, levels: Sequence[int]
) -> tuple[RegressionHead, Uncertainty | None]:
    """As `fit_stage1`, from statistics that are there; without rows to go through again there are no intervals."""
    head = fit_from_statistics(
        statistics,
        alphas=section.alphas,
        intercept=section.intercept,
        validation_folds=(0,) if section.validation == "split" else None,
        weights=section.weights,
    )
    head = replace(head, **{name: getattr(head, name).astype(np.float32).astype(np.float64) for name in _HEAD})
    if not section.uncertainty:
        return head, None
    uncertainty = fit_uncertainty(statistics, head, intercept=section.intercept, weights=section.weights)
    if blocks is not None:
        uncertainty = calibrate(uncertainty, head, blocks(), np.asarray(levels) >= ENOUGH_LEVELS)
    return head, uncertainty


def to_kept(head: RegressionHead, uncertainty: Uncertainty | None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays (float32) and a report."""
    arrays = {name: getattr(head, name).astype(np.float32) for name in _HEAD}
    report: dict[str, Any] = {"objectives": [asdict(entry) for entry in head.reports], "uncertainty": None}
    if uncertainty is not None:
        arrays |= {f"uncertainty.{name}": tensor for name, tensor in uncertainty.tensors().items()}
        report["uncertainty"] = uncertainty.settings()
    return arrays, report


def from_kept(arrays: dict[str, np.ndarray], report: dict[str, Any]) -> tuple[RegressionHead, Uncertainty | None]:
    """Inverse of `to_kept`."""
    reports = [RegressionReport(**entry) for entry in report["objectives"]]
    head = RegressionHead(**{name: arrays[name].astype(np.float64) for name in _HEAD}, reports=reports)
    if report["uncertainty"] is None:
        return head, None
    tensors = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith("uncertainty.")}
    return head, Uncertainty.from_settings(report["uncertainty"], tensors)


def rating_levels(ratings: np.ndarray) -> list[int]:
    """Different values of each column of ratings (n, k), missing ones (NaN) left out."""
    return [len(np.unique(column[~np.isnan(column)])) for column in ratings.T]


_HEAD_ARRAYS = ("weight", "bias", "fold_weight", "fold_bias")


@torch.no_grad()
def pair_coefficients(network: GatingNetwork, debiasing: Debiasing, prompt_features: np.ndarray) -> np.ndarray:
    """What the score multiplies each reward by (p, k), for the prompt features (p, d) of pairs."""
    output = network(torch.from_numpy(prompt_features)).double().numpy()
    return output @ debiasing.matrix.T


def joint_stage(
    head: RegressionHead,
    uncertainty: Uncertainty | None,
    features: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    levels: Sequence[int],
    pairs: JointPairs,
    section: JointSection,
    regression: RegressionSection,
) -> tuple[dict[str, np.ndarray], Any]:
    """Heads trained on ratings and pairs together, float32 as they are served, kept in the form of stage 1.

    Args:
        head, uncertainty: stage 1's, of these rows.
        levels: (k,) different values of each objective's ratings.
        regression: as stage 1 was given it.
    """
    joint, report = fit_joint(
        head,
        features,
        ratings,
        folds,
        pairs,
        pair_weights=section.pair_weights,
        intercept=regression.intercept,
        weights=regression.weights,
        r2_price=section.r2_price,
    )
    rounded: dict[str, Any] = {
        name: getattr(joint, name).astype(np.float32).astype(np.float64) for name in _HEAD_ARRAYS
    }
    joint = replace(joint, **rounded)
    if uncertainty is not None:
        uncertainty = _measured_again(uncertainty, joint, report, features, ratings, folds, levels)
    arrays, kept = to_kept(joint, uncertainty)
    return arrays, {**kept, "joint": asdict(report)}


def _measured_again(
    uncertainty: Uncertainty,
    joint: RegressionHead,
    report: JointReport,
    features: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    levels: Sequence[int],
) -> Uncertainty:
    """Noise, correlation of errors and intervals of the joint heads, by their own errors on held-out folds.

    Leverage stays that of the ratings: what the pairs say besides is left out, which errs on the large side.
    """
    names = [entry.objective for entry in joint.reports]
    statistics = accumulate(blocks_of(features, ratings, folds), names, len(joint.fold_weight), features.shape[1])
    growth = (1 - np.array(report.r2_after)) / (1 - np.array(report.r2_before))
    measured = replace(
        uncertainty,
        noise=uncertainty.noise * np.sqrt(growth),
        correlation=error_correlation(statistics, joint),
    )
    return calibrate(measured, joint, blocks_of(features, ratings, folds), np.asarray(levels) >= ENOUGH_LEVELS)


def quantile_stage(
    features: np.ndarray,
    ratings: np.ndarray,
    rewards: np.ndarray,
    folds: np.ndarray,
    names: Sequence[str],
    section: QuantilesSection,
) -> tuple[dict[str, np.ndarray], Any]:
    """Quantile heads; the report names their objectives and levels.

    Args:
        rewards: (n, k) by weights that never saw the row's prompt.
    """
    found = fit_quantiles(features, ratings, rewards, folds, names, levels=section.levels)
    arrays = {
        "weight": found.weight.reshape(-1, features.shape[1]).astype(np.float32),
        "bias": found.bias.ravel().astype(np.float32),
    }
    report = {
        "objectives": found.objectives,
        "levels": list(found.levels),
        "heads": [asdict(entry) for entry in found.reports],
    }
    return arrays, report
