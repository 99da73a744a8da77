"""Stages of training shared by `train` and `extend`: reward heads, out-of-fold rewards, gate, joint and quantile heads,
and assembly of the model. They write no files; pipeline.py saves and resumes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from armorm.conversation import Conversation
from armorm.data.measures import computed_objective, measure
from armorm.data.preferences import PreferencePair
from armorm.data.ratings import RatingTable
from armorm.heads.accumulation import accumulate, blocks_of
from armorm.heads.debiasing import Debiasing
from armorm.heads.gate_training import GateReport, RewardPairs, fit_gate
from armorm.heads.joint import JointPairs, JointReport, fit_joint
from armorm.heads.pair_weights import pair_weights
from armorm.heads.quantiles import fit_quantiles
from armorm.heads.rater_weights import rater_weights
from armorm.heads.regression import RegressionHead, RegressionReport, fit_from_statistics, fold_of
from armorm.heads.statistics import RatingStatistics
from armorm.heads.uncertainty import ENOUGH_LEVELS, Uncertainty, fit_uncertainty
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.model.remote_code import GatingNetwork
from armorm.objectives import Reliability
from armorm.reward_model import ArmoRM
from armorm.training.dataset import HELD_OUT_PAIRS, TrainingData, group_index, held_out_prompts, relative_margins
from armorm.training.featurize import Corpus, RatedRows
from armorm.training.finetune.record import with_start
from armorm.training.schema import GatingSection, JointSection, QuantilesSection, RegressionSection
from armorm.training.tracking import Tracking

STATISTICS = "statistics.safetensors"  # in the work folder of a run: sufficient statistics of its ratings
REFERENCE_QUANTILES = 101
RELIABILITY_ROWS = 4096  # conversations on which the reliability of the objectives is measured

_HEAD_ARRAYS = ("weight", "bias", "fold_weight", "fold_bias")


@dataclass(frozen=True)
class RatedSplit:
    """Rated rows that were encoded, with all objectives; `train` and `test` are row indices into the table."""

    table: RatingTable
    train: np.ndarray
    test: np.ndarray

    @property
    def train_conversations(self) -> list[Conversation]:
        return [self.table.conversations[i] for i in self.train]

    @property
    def test_conversations(self) -> list[Conversation]:
        return [self.table.conversations[i] for i in self.test]

    @property
    def reference_conversations(self) -> list[Conversation]:
        """The training rows of sets, without constructed ones."""
        return [self.table.conversations[i] for i in self.train[self.table.natural[self.train]]]

    @property
    def natural_test(self) -> np.ndarray:
        """The test rows of sets, without constructed ones."""
        return self.test[self.table.natural[self.test]]

    @property
    def train_prompts(self) -> frozenset[str]:
        """Content keys of the prompts of the training rows."""
        return frozenset(conversation.prompt_key for conversation in self.train_conversations)

    def train_rows(self, corpus: Corpus, fold_count: int, names: Sequence[str] | None = None) -> RatedRows:
        """The training rows with their features.

        Args:
            names: (k,) objectives and their order, by default those of the table; ratings of others are missing.
        """
        own, conversations = self.table.objectives.names, self.train_conversations
        names = own if names is None else list(names)
        mapped = np.full((len(conversations), len(names)), np.nan)
        mapped[:, [names.index(name) for name in own]] = self.table.objectives.to_reward(self.table.ratings[self.train])
        folds = np.array([fold_of(key, fold_count) for key in corpus.group_keys(conversations)], np.int64)
        return RatedRows(corpus.store, corpus.response_keys(conversations), mapped, folds, names)


def add_computed(
    table: RatingTable, computed: Sequence[tuple[str, str]], response_tokens: Sequence[int], train: np.ndarray
) -> RatingTable:
    """The table with computed objectives as further columns, missing for constructed rows.

    Args:
        computed: (objective name, measure).
        response_tokens: (n,) tokens of each response.
        train: rows from which the scales are taken.
    """
    natural = table.natural
    for name, measure_name in computed:
        raw = measure(measure_name, table.conversations, response_tokens)
        objective = computed_objective(name, measure_name, raw[train][natural[train]])
        table = table.with_column(objective, np.where(natural, raw, np.nan))
    return table


def rated_split(data: TrainingData, corpus: Corpus) -> RatedSplit:
    """Rated rows that were not rejected, computed objectives included."""
    train_rows, test_rows = (
        [i for i in rows if data.table.conversations[i] in corpus] for rows in (data.train_rows, data.test_rows)
    )
    table = data.table.take([*train_rows, *test_rows])
    train, test = np.split(np.arange(len(table)), [len(train_rows)])
    tokens = corpus.response_tokens(table.conversations)
    return RatedSplit(add_computed(table, data.computed, tokens, train), train, test)


@dataclass(frozen=True)
class OutOfFoldRewards:
    """Rewards of conversations by weights that were not fitted on their prompt."""

    head: RegressionHead  # fitted weights, and those without each fold
    # content keys of the prompts that the head was fitted on; prompts that are no near-duplicates of them get the
    # served weights
    trained_prompts: frozenset[str]
    corpus: Corpus  # features of the conversations

    def __call__(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Rewards (n, k) float64."""
        count = len(self.head.fold_weight)
        groups = {self.corpus.groups[key] for key in self.trained_prompts}
        folds = np.array(
            [fold_of(key, count) if key in groups else -1 for key in self.corpus.group_keys(conversations)],
            np.int64,
        )
        rewards = np.empty((len(conversations), len(self.head.weight)))
        for places, features in self.corpus.store.blocks(self.corpus.response_keys(conversations)):
            rewards[places] = self.head.predict_out_of_fold(features, folds[places])
        return rewards


def fit_stage1(
    section: RegressionSection, statistics: RatingStatistics, rows: RatedRows, start: np.ndarray | None = None
) -> tuple[RegressionHead, Uncertainty | None]:
    """Ridge heads, rounded to float32 as they are served and train the gate, and their uncertainty if requested.

    Args:
        statistics: of the rows, and possibly of earlier ones.
        rows: training rows, on which the intervals are calibrated.
        start: (k, d) weights that the penalty shrinks towards instead of zero; the statistics are then those of its
            residuals.
    """
    options: dict[str, Any] = {"intercept": section.intercept, "weights": section.weights}
    folds = (0,) if section.validation == "split" else None
    head = fit_from_statistics(statistics, alphas=section.alphas, validation_folds=folds, **options).rounded()
    uncertainty = None
    if section.uncertainty:
        intervals = np.asarray(rows.levels) >= ENOUGH_LEVELS
        uncertainty = fit_uncertainty(
            statistics, head, rows.blocks(start), intervals, max_rank=section.uncertainty_rank, **options
        )
    head = replace(head, reports=[_with_weights(report, rows) for report in head.reports])
    return head if start is None else with_start(head, start, rows.ratings), uncertainty


def _with_weights(report: RegressionReport, rows: RatedRows) -> RegressionReport:
    """The report with the range of the rows' weights, if the objective has any."""
    column = list(rows.names).index(report.objective)
    if column not in rows.weights:
        return report
    found = rows.weights[column][~np.isnan(rows.ratings[:, column])]
    return replace(report, rater_weights=(float(found.min()), float(found.max())))


def with_rater_weights(
    rated: RatedSplit, rows: RatedRows, section: RegressionSection, statistics: RatingStatistics
) -> RatedRows:
    """Training rows with the weights of objectives that several people rated (`armorm.heads.rater_weights`).

    Args:
        rows: of `rated.train_rows`, without weights.
        statistics: of these rows, for the error of the unweighted fit.
    """
    table = rated.table.take(rated.train)
    if table.spreads is None or table.raters is None or not (table.raters > 1).any():
        return rows
    folds = (0,) if section.validation == "split" else None
    options: dict[str, Any] = {"intercept": section.intercept, "weights": section.weights, "validation_folds": folds}
    reports = fit_from_statistics(statistics, alphas=section.alphas, **options).reports
    errors = {report.objective: min(report.validation_errors) for report in reports}
    weights: dict[int, np.ndarray] = {}
    for place, objective in enumerate(table.objectives):
        column = list(rows.names).index(objective.name)
        spreads = table.spreads[:, place] / abs(objective.scale)
        found = rater_weights(
            table.raters[:, place], spreads, ~np.isnan(rows.ratings[:, column]), errors.get(objective.name, np.nan)
        )
        weights |= {} if found is None else {column: found}
    return replace(rows, weights=weights)


def objective_reliability(
    rewards: OutOfFoldRewards,
    uncertainty: Uncertainty | None,
    conversations: Sequence[Conversation],
    names: Sequence[str],
    fitted_to_pairs: Mapping[str, float] | None = None,
) -> dict[str, Reliability]:
    """Reliability of each objective with a report, by name.

    Args:
        conversations: training conversations, over which epistemic variance is averaged; every n-th is read if there
            are more than `RELIABILITY_ROWS`.
        names: (k,) objectives of the rewards.
        fitted_to_pairs: objectives fitted to pairs, with the log-odds of a reward of 1. Calibrated margins of variance
            v in log-odds lower the loss by v / 8 (to second order) from log 2, and v is twice that of a reward.
    """
    rows = conversations[:: -(-len(conversations) // RELIABILITY_ROWS) or 1]
    epistemic = np.full(len(names), np.nan)
    if uncertainty is not None:
        epistemic = (uncertainty.epistemic_std(uncertainty.leverage(rewards.corpus.responses(rows))) ** 2).mean(0)
    found = {}
    for report in rewards.head.reports:
        column, r2 = list(names).index(report.objective), float(report.r2)
        error = None if np.isnan(epistemic[column]) else float(epistemic[column])
        if fitted_to_pairs and report.objective in fitted_to_pairs:
            signal = 4 * np.log(2) * r2 / fitted_to_pairs[report.objective] ** 2
        else:  # the error on held-out folds is (1 - R^2) times the variance of the ratings
            signal = r2 / max(1 - r2, 1e-9) * min(report.validation_errors)
        found[report.objective] = Reliability(r2, float(max(signal, 0.0)), error)
    return found


def heads_to_arrays(
    head: RegressionHead, uncertainty: Uncertainty | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Float32 arrays and a plain report, as they are saved."""
    arrays = {name: getattr(head, name).astype(np.float32) for name in _HEAD_ARRAYS}
    report: dict[str, Any] = {"objectives": [asdict(entry) for entry in head.reports], "uncertainty": None}
    if uncertainty is not None:
        arrays |= {f"uncertainty.{name}": tensor for name, tensor in uncertainty.tensors().items()}
        report["uncertainty"] = uncertainty.settings()
    return arrays, report


def heads_from_arrays(
    arrays: Mapping[str, np.ndarray], report: Mapping[str, Any]
) -> tuple[RegressionHead, Uncertainty | None]:
    """Inverse of `heads_to_arrays`."""
    reports = [RegressionReport(**entry) for entry in report["objectives"]]
    head = RegressionHead(**{name: arrays[name].astype(np.float64) for name in _HEAD_ARRAYS}, reports=reports)
    if report["uncertainty"] is None:
        return head, None
    tensors = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith("uncertainty.")}
    return head, Uncertainty.from_settings(report["uncertainty"], tensors)


def train_gate(
    pairs: Sequence[PreferencePair],
    rewards: OutOfFoldRewards,
    debiasing: Debiasing,
    section: GatingSection,
    tracking: Tracking,
    *,
    reliability: np.ndarray,
    seed: int,
    device: str | torch.device = "cpu",
    initial: GatingNetwork | None = None,
) -> tuple[GatingNetwork, GateReport]:
    """Stage 2: train the gate, or continue from `initial`, on the debiased rewards of both sides of the pairs.

    Sets marked weak are trained on only if that lowers the loss on the stopping pairs, which are of the other sets; a
    gate is trained without and with them. Weak pairs of held-out prompts are left out.

    Args:
        reliability: (k,) of the objectives, NaN where unknown.
    """
    corpus = rewards.corpus.of_pairs
    rewards = replace(rewards, corpus=corpus)
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    groups, weak = corpus.group_keys(chosen), np.array([pair.weak for pair in pairs], bool)
    held_out = held_out_prompts(groups, HELD_OUT_PAIRS, ~weak)
    reward_pairs = RewardPairs(
        chosen=debiasing.apply(rewards(chosen)),
        rejected=debiasing.apply(rewards(rejected)),
        chosen_prompt=corpus.prompt_rows(chosen),
        rejected_prompt=corpus.prompt_rows(rejected),
        held_out=held_out,
        margin=relative_margins(pairs) if section.margin else None,
        weight=np.array([pair.weight for pair in pairs]),
        sources=group_index([pair.source for pair in pairs]),
        groups=group_index(groups),
    )
    log = partial(tracking.log, "gate")
    known = debiasing.without_biases(reliability)
    options: dict[str, Any] = {"reliability": known, "seed": seed, "initial": initial, "device": device}
    fit = partial(fit_gate, corpus.prompt, settings=section, log=log, **options)
    without = fit(pairs=reward_pairs.take(np.flatnonzero(~weak)))
    usable = ~(weak & held_out)
    if not (weak & usable).any():
        return without
    with_weak = fit(pairs=reward_pairs.take(np.flatnonzero(usable)))
    gain = with_weak[1].stopping_loss < without[1].stopping_loss
    network, report = with_weak if gain else without
    decision = {
        "sets": list(dict.fromkeys(pair.source for pair in pairs if pair.weak)),
        "pairs": int((weak & usable).sum()),
        "loss_without": without[1].stopping_loss,
        "loss_with": with_weak[1].stopping_loss,
        "used": gain,
    }
    return network, replace(report, weak=decision)


@torch.no_grad()
def train_joint_heads(
    head: RegressionHead,
    uncertainty: Uncertainty | None,
    rows: RatedRows,
    pairs: JointPairs,
    section: JointSection,
    regression: RegressionSection,
) -> tuple[RegressionHead, Uncertainty | None, JointReport]:
    """Heads trained on ratings and preference pairs together, rounded to float32.

    Args:
        head, uncertainty: of stage 1, fitted on the same rows.
        regression: settings of stage 1.
    """
    features, ratings, folds = rows.features(), rows.ratings, rows.folds
    options: dict[str, Any] = {"intercept": regression.intercept, "weights": regression.weights}
    joint, report = fit_joint(head, features, ratings, folds, pairs, **section.model_dump(), **options)
    joint = joint.rounded()
    if uncertainty is not None:
        # Noise, error correlation and intervals are measured anew on held-out folds. Leverage and design effect stay
        # those of the ratings: they ignore what the pairs add, which errs on the large side.
        blocks = partial(blocks_of, features, ratings, folds)
        statistics = accumulate(blocks(), rows.names, len(joint.fold_weight), features.shape[1])
        intervals = np.asarray(rows.levels) >= ENOUGH_LEVELS
        options |= {"design_effect": uncertainty.design_effect, "max_rank": regression.uncertainty_rank}
        uncertainty = fit_uncertainty(statistics, joint, blocks(), intervals, **options)
    return joint, uncertainty, report


@torch.no_grad()
def joint_pairs(
    pairs: Sequence[PreferencePair],
    network: GatingNetwork,
    debiasing: Debiasing,
    corpus: Corpus,
    fold_count: int,
    section: GatingSection,
) -> JointPairs:
    """Feature differences of the pairs, with the coefficients that a gate gives them, weighted as for the gate; without
    sets marked weak."""
    corpus, pairs = corpus.of_pairs, [pair for pair in pairs if not pair.weak]
    chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    groups = corpus.group_keys(chosen)
    output = network(torch.from_numpy(corpus.prompt[corpus.prompt_rows(chosen)])).double().numpy()
    return JointPairs(
        corpus.responses(chosen) - corpus.responses(rejected),
        output @ debiasing.matrix.T,
        np.array([fold_of(key, fold_count) for key in groups]),
        pair_weights(
            np.array([pair.weight for pair in pairs]),
            group_index(groups),
            group_index([pair.source for pair in pairs]),
            section.prompt_cap,
            section.balance,
        ),
    )


def train_quantile_heads(
    head: RegressionHead, rows: RatedRows, section: QuantilesSection
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Quantile heads around out-of-fold rewards, as arrays; the report names their objectives and levels."""
    features = rows.features()
    rewards = head.predict_out_of_fold(features, rows.folds)
    found = fit_quantiles(features, rows.ratings, rewards, rows.folds, rows.names, levels=section.levels)
    weight, bias = found.weight.reshape(-1, features.shape[1]), found.bias.ravel()
    heads = [asdict(entry) for entry in found.reports]
    report = {"objectives": found.objectives, "levels": list(found.levels), "heads": heads}
    return {"weight": weight.astype(np.float32), "bias": bias.astype(np.float32)}, report


@torch.no_grad()
def reference_statistics(
    network: GatingNetwork,
    debiasing: Debiasing,
    corpus: Corpus,
    reference: Sequence[Conversation],
    rewards: np.ndarray,
) -> dict[str, Any]:
    """Distribution of score, rewards and gating weights over n reference conversations, for the model's config.

    Args:
        rewards: (n, k) out-of-fold rewards of the reference.
    """
    prompts, index = np.unique(corpus.prompt_rows(reference), return_inverse=True)
    weights = network.weights(torch.from_numpy(corpus.prompt[prompts])).double().numpy()[index]
    scores = (weights * float(network.logit_scale) * debiasing.apply(rewards)).sum(1)
    return {
        "rows": len(reference),
        "digest": reference_digest(reference),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "score_quantiles": np.quantile(scores, np.linspace(0, 1, REFERENCE_QUANTILES)).tolist(),
        "reward_means": rewards.mean(0).tolist(),
        "gating_weights": weights.mean(0).tolist(),
    }


def reference_digest(reference: Sequence[Conversation]) -> str:
    """Hash of reference conversations in any order, 16 hex digits: models that share it share a normalised scale."""
    return blake2b("".join(sorted(c.key for c in reference)).encode(), digest_size=8).hexdigest()


@torch.no_grad()
def assemble_model(
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: ArmoRMConfig,
    name: str,
    head: RegressionHead,
    uncertainty: Uncertainty | None,
    debiasing: Debiasing,
    network: GatingNetwork,
) -> ArmoRM:
    """The reward model of a backbone and fitted heads."""
    model = ArmoRMForSequenceClassification.assemble(backbone, config)
    model.regression_layer.weight.copy_(torch.from_numpy(head.weight))
    if config.regression_bias:
        model.regression_layer.bias.copy_(torch.from_numpy(head.bias))
    model.reward_transform_matrix.copy_(torch.from_numpy(debiasing.matrix))
    model.gating.load_state_dict(network.state_dict())
    for tensor, values in (uncertainty.tensors() if uncertainty else {}).items():
        getattr(model, f"uncertainty_{tensor}").copy_(torch.from_numpy(values))
    return ArmoRM(model, tokenizer, name)
