"""`armorm extend`: more objectives, or more ratings, for a model that is trained already.

In:  a trained model (or the released one), rated sets with the new ratings, optionally preference pairs.
Out: a model in a folder of its own: the old rows of W and of the transform as they were, new ones beside them, a gate
     that knows the new objectives; metrics.json and a card.

The old ratings are not needed. A new objective is fitted on its own ratings. New ratings of an objective that the
model has are added to the statistics that its run kept (work/statistics.safetensors), and its row is fitted again from
both; without those statistics they are refused, since new ratings alone would forget the old ones.

New objectives are debiased against the model's own biases on the new rows. With preferences the gate is trained on
from the one it was; without, new objectives get a fixed share of the weight and the others keep their proportions.
Score mean, standard deviation and quantiles are measured anew, on the new training rows: the old reference data
are not at hand either.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from armorm.backbone.decoder import Placement
from armorm.backbone.encoding import encode_rows
from armorm.conversation import Conversation
from armorm.data.preferences import read_preferences
from armorm.data.ratings import RatedSet, RatingTable, read_ratings
from armorm.data.sources import Location
from armorm.errors import FitError
from armorm.features.extract import Features, extract
from armorm.features.store import FeatureStore
from armorm.files import plain, write_json, write_text
from armorm.heads.accumulation import RatedBlock, accumulate, blocks_of
from armorm.heads.debiasing import fit_debiasing
from armorm.heads.gate_training import GateReport, GateSettings, RewardPairs, fit_gate
from armorm.heads.regression import RegressionHead, fold_of
from armorm.heads.statistics import RatingStatistics
from armorm.heads.uncertainty import Uncertainty
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.model.remote_code import GatingNetwork
from armorm.objectives import ObjectiveSet
from armorm.reward_model import ArmoRM
from armorm.training.dataset import HELD_OUT_PAIRS, held_out_prompts, is_test
from armorm.training.pair_metrics import rating_figures
from armorm.training.pipeline import QUANTILES
from armorm.training.schema import RegressionSection
from armorm.training.stages import STATISTICS, fit_kept_statistics, rating_levels
from armorm.training.tracking import Tracking
from armorm.version import __version__

TEST_SHARE = 0.1

FOLDS = 5


@dataclass
class _Rows:
    """New rated conversations with their features, and what to do with them."""

    table: RatingTable
    features: Features
    train: np.ndarray
    test: np.ndarray
    folds: np.ndarray


def extend(
    model: str | Path,
    sets: Sequence[RatedSet],
    output: str | Path,
    *,
    preferences: Sequence[Location] = (),
    share: float | None = None,
    seed: int = 0,
    steps: int = 1000,
    quiet: bool = False,
) -> ArmoRM:
    """Extend a model.

    Args:
        model: folder, hub id or embedded name; its statistics are looked for below the folder.
        sets: rated sets; an objective of a name that the model has must have the model's scale.
        output: another folder.
        preferences: pairs to train the gate on; the split column, or the prompt, holds some out.
        share: of the weight for new objectives, without preferences; by default as much for each as 1 of k.
        steps: of the gate's training.
        quiet: say nothing on standard error but progress.

    Raises:
        FitError: for too few ratings or pairs, or new ratings of an old objective without its statistics.
        DataError: for faults in the data.
    """
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    folder = Path(output)
    if folder.resolve() == Path(model).resolve():
        raise FitError(f"{output}: is the model's own folder, expected another one")
    rm = ArmoRM.from_pretrained(model, dtype="weights")  # those of the old objectives stay as they are, to the bit
    Placement.choose("auto", str(rm.backbone.device)).apply(rm.model.model)
    table = read_ratings(sets)
    store = FeatureStore.of(folder / "work" / "features", rm.backbone)
    pairs = [pair for place in preferences for pair in read_preferences(place) if not pair.is_tie]
    pairs = [pair for pair in pairs if not is_test(pair.split, pair.prompt_key, TEST_SHARE)]
    rows = _rated_rows(rm, table, store)
    old, fresh = rm.objectives, [o for o in table.objectives if o.name not in rm.objectives.names]
    objectives = ObjectiveSet([*old, *fresh])
    added = [objective.name for objective in fresh]
    again = [name for name in table.objectives.names if name in old.names]
    console.print(f"new objectives: {', '.join(added) or 'none'}; more ratings of: {', '.join(again) or 'none'}")

    for warning in _left_behind(rm, Path(model), again):
        console.print(f"warning: {warning}")
    head, uncertainty, statistics = _stage1(rm, Path(model), rows, objectives, again)
    uncertainty = _with_old_intervals(uncertainty, rm, objectives, table.objectives.names)
    weight, bias, reports = rows_of_w(rm, head, table.objectives.names, len(objectives))
    for report in reports:
        if report["warning"]:
            console.print(f"warning: objective {report['objective']}: {report['warning']}")

    def served(features: Features, conversations: Sequence[Conversation]) -> np.ndarray:
        """Rewards (n, k) of all objectives, those fitted now out of fold where their prompt was trained on."""
        rewards = features.response.astype(np.float64) @ weight.T + bias
        seen = {rows.table.conversations[i].prompt_key for i in rows.train}
        fold = [fold_of(c.prompt_key, statistics.folds) if c.prompt_key in seen else -1 for c in conversations]
        apart = head.predict_out_of_fold(features.response, np.array(fold, np.int64))
        for position, report in enumerate(head.reports):
            if report.objective in table.objectives.names:
                rewards[:, objectives.position(report.objective)] = apart[:, position]
        return rewards

    reference = [rows.table.conversations[i] for i in rows.train]
    reference_features = rows.features.take(rows.train)
    reference_rewards = served(reference_features, reference)
    transform, penalties = extended_transform(rm, reference_rewards, reference, len(fresh))
    gate = wider_gate(rm, len(fresh), reference_features.prompt, share)
    trained: GateReport | None = None
    if pairs:
        gate, trained = _trained_gate(rm, gate, pairs, served, transform, store, folder, seed, steps)
    elif fresh:
        console.print("no preferences: new objectives share the weight by a fixed part, whatever the prompt")
    if rm.uncertainty is not None and uncertainty is None:
        console.print("warning: statistics of its old ratings are missing, so the new model carries no uncertainty")

    extended = _assemble(rm, objectives, weight, bias, transform, penalties, gate, uncertainty)
    _measure_reference(extended, reference_features, reference_rewards, transform)
    entry = {"from": str(model), "objectives": added, "more_ratings": again, "pairs": len(pairs)}
    extended.model.config.provenance["extended"] = [*rm.model.config.provenance.get("extended", []), entry]
    metrics = {
        "armorm_version": __version__,
        "extended": entry,
        "data": {"rated_train": len(rows.train), "rated_test": len(rows.test), "pairs": len(pairs)},
        "regression": reports,
        "gate": asdict(trained) if trained else None,
        "evaluation": {"ratings": _evaluation(extended, rows)},
    }
    extended.save_pretrained(folder)
    statistics.save(folder / "work" / STATISTICS)
    write_json(folder / "metrics.json", plain(metrics))
    write_text(folder / "README.md", extended_card(extended, metrics))
    console.print(f"done: {folder}")
    return ArmoRM.from_pretrained(folder)


def _left_behind(rm: ArmoRM, folder: Path, again: Sequence[str]) -> list[str]:
    """What the old model has beyond the paper's form that the new one will not have."""
    found = []
    if rm.model.config.quantiles:
        names = ", ".join(rm.model.config.quantiles["objectives"])
        found.append(f"quantile heads ({names}) are not carried over; train anew to have them")
    metrics = folder / "metrics.json"
    if again and metrics.is_file() and json.loads(metrics.read_text(encoding="utf-8")).get("joint"):
        found.append(f"the heads were trained on pairs as well; {', '.join(again)} will be fitted to ratings alone")
    return found


def _rated_rows(rm: ArmoRM, table: RatingTable, store: FeatureStore) -> _Rows:
    encoded, usable = _encoded(rm, table.conversations)
    table = table.take(usable)
    keys = [conversation.prompt_key for conversation in table.conversations]
    test = np.array([is_test(split, key, TEST_SHARE) for split, key in zip(table.splits, keys, strict=True)])
    other = np.array([split == "other" for split in table.splits])
    return _Rows(
        table,
        extract(rm.backbone, encoded, store),
        np.flatnonzero(~test & ~other),
        np.flatnonzero(test),
        np.array([fold_of(key, FOLDS) for key in keys], np.int64),
    )


def _encoded(rm: ArmoRM, conversations: Sequence[Conversation]) -> tuple[list, list[int]]:
    limits = rm.model.config.limits
    found = encode_rows(
        rm.backbone.template, list(conversations), limits.get("max_length"), limits.get("overflow", "error")
    )
    return found.encoded, found.kept


def _stage1(
    rm: ArmoRM, folder: Path, rows: _Rows, objectives: ObjectiveSet, again: Sequence[str]
) -> tuple[RegressionHead, Uncertainty | None, RatingStatistics]:
    """Head and statistics of every objective with statistics: those kept with the model, and the ones rated now."""
    names, d = rows.table.objectives.names, rows.features.response.shape[1]
    kept = folder / "work" / STATISTICS
    before = RatingStatistics.load(kept) if kept.is_file() else None
    known = [] if before is None else list(before.names)
    unknown = [name for name in again if name not in known]
    if unknown:
        raise FitError(
            f"new ratings of {', '.join(unknown)}, which the model has, but {kept} "
            f"{'is not there' if before is None else 'does not have them'}: expected the statistics of the old "
            "ratings, or other names"
        )
    folds = FOLDS if before is None else before.folds
    keys = [conversation.prompt_key for conversation in rows.table.conversations]
    rows.folds = np.array([fold_of(key, folds) for key in keys], np.int64)
    order = [name for name in objectives.names if name in known or name in names]
    mapped = np.full((len(rows.table), len(order)), np.nan)
    mapped[:, [order.index(name) for name in names]] = rows.table.objectives.to_reward(rows.table.ratings)

    def blocks() -> Iterator[RatedBlock]:
        return blocks_of(rows.features.response[rows.train], mapped[rows.train], rows.folds[rows.train])

    statistics = accumulate(blocks(), order, folds, d)
    if before is not None:
        statistics = before.with_names(order) + statistics
    section = RegressionSection(
        intercept=rm.model.config.regression_bias,
        uncertainty=order == objectives.names and rm.uncertainty is not None,
    )
    levels = rating_levels(mapped[rows.train])
    head, uncertainty = fit_kept_statistics(section, statistics, blocks, levels)
    return head, uncertainty, statistics


def _with_old_intervals(
    uncertainty: Uncertainty | None, rm: ArmoRM, objectives: ObjectiveSet, rated_now: Sequence[str]
) -> Uncertainty | None:
    """Intervals of objectives that were not rated now stay what they were."""
    before = rm.uncertainty
    if uncertainty is None or before is None:
        return None
    for place, objective in enumerate(rm.objectives):
        if objective.name not in rated_now:
            column = objectives.position(objective.name)
            uncertainty.usual_leverage[column] = before.usual_leverage[place]
            for level, values in uncertainty.conformal.items():
                values[column] = before.conformal.get(level, np.full(len(rm.objectives), np.nan))[place]
    return uncertainty


def _trained_gate(
    rm: ArmoRM,
    initial: GatingNetwork,
    pairs: Sequence[Any],
    served: Any,
    transform: np.ndarray,
    store: FeatureStore,
    folder: Path,
    seed: int,
    steps: int,
) -> tuple[GatingNetwork, GateReport]:
    config = rm.model.config
    sides = [[getattr(pair, side) for pair in pairs] for side in ("chosen", "rejected")]
    encoded, usable = _encoded(rm, [*sides[0], *sides[1]])
    features = extract(rm.backbone, encoded, store)
    place = {i: row for row, i in enumerate(usable)}
    kept = [i for i in range(len(pairs)) if i in place and i + len(pairs) in place]
    rows = [np.array([place[i + offset] for i in kept], np.int64) for offset in (0, len(pairs))]
    rewards = [
        served(features.take(index), [side[i] for i in kept]) @ transform
        for index, side in zip(rows, sides, strict=True)
    ]
    reward_pairs = RewardPairs(
        chosen=rewards[0],
        rejected=rewards[1],
        chosen_prompt=features.prompt_index[rows[0]],
        rejected_prompt=features.prompt_index[rows[1]],
        held_out=held_out_prompts([pairs[i].prompt_key for i in kept], HELD_OUT_PAIRS),
    )
    settings = GateSettings(
        hidden_size=config.gating_hidden_dim,
        hidden_layers=config.gating_n_hidden,
        temperature=config.gating_temperature,
        steps=steps,
        seed=seed,
    )
    with Tracking(folder, (), "extend", {}) as tracking:
        return fit_gate(
            features.prompt,
            reward_pairs,
            settings,
            initial=initial,
            log=lambda step, figures: tracking.log("gate", step, figures),
        )


@torch.no_grad()
def _assemble(
    rm: ArmoRM,
    objectives: ObjectiveSet,
    weight: np.ndarray,
    bias: np.ndarray,
    transform: np.ndarray,
    penalties: np.ndarray,
    gate: GatingNetwork,
    uncertainty: Uncertainty | None,
) -> ArmoRM:
    config = copy.deepcopy(rm.model.config)
    config.objectives = objectives.to_dicts()
    config.uncertainty = uncertainty.settings() if uncertainty else {}
    config.quantiles = {}  # those were fitted around the rewards as they were
    if config.debiasing.get("penalties"):
        given = np.atleast_2d(config.debiasing["penalties"])
        both = np.concatenate([given, penalties], 1)
        config.debiasing["penalties"] = (both[0] if len(both) == 1 else both).tolist()
    model = ArmoRMForSequenceClassification.assemble(rm.model.model, config)
    model.regression_layer.weight.copy_(torch.from_numpy(weight))
    if config.regression_bias:
        model.regression_layer.bias.copy_(torch.from_numpy(bias))
    model.reward_transform_matrix.copy_(torch.from_numpy(transform))
    model.gating.load_state_dict(gate.state_dict())
    for name, tensor in (uncertainty.tensors() if uncertainty else {}).items():
        getattr(model, f"uncertainty_{name}").copy_(torch.from_numpy(tensor))
    return ArmoRM(model, rm.tokenizer, rm.name)


def _measure_reference(rm: ArmoRM, features: Features, rewards: np.ndarray, transform: np.ndarray) -> None:
    """Score, rewards and weights over the new training rows, into the config."""
    old = rm.reference.get("reward_means") or []
    rm.model.config.reference = {}  # that of fewer objectives
    batch = rm.score_features(features)
    scores = (batch.gating_output.astype(np.float64) * (rewards @ transform)).sum(1)
    means = rewards.mean(0)
    means[: len(old)] = old
    rm.model.config.reference = {
        "rows": len(features),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std()),
        "score_quantiles": np.quantile(scores, np.linspace(0, 1, QUANTILES)).tolist(),
        "reward_means": means.tolist(),
        "gating_weights": batch.gating_weights.mean(0).tolist(),
    }


def _evaluation(rm: ArmoRM, rows: _Rows) -> dict[str, Any]:
    if not len(rows.test):
        return {}
    batch = rm.score_features(rows.features.take(rows.test))
    columns = [rm.objectives.position(name) for name in rows.table.objectives.names]
    keys = [rows.table.conversations[i].prompt_key for i in rows.test]
    prompts = np.unique(keys, return_inverse=True)[1]
    return rating_figures(batch.rewards[:, columns], rows.table.ratings[rows.test], rows.table.objectives, prompts)


def rows_of_w(
    rm: ArmoRM, head: RegressionHead, rated_now: Sequence[str], k: int
) -> tuple[np.ndarray, np.ndarray, list[dict[str, Any]]]:
    """W (k, d) and intercepts (k,): old rows as they are, those of the objectives rated now from the fit."""
    layer = rm.model.regression_layer
    old = layer.weight.detach().cpu().double().numpy()
    weight, bias = np.zeros((k, old.shape[1])), np.zeros(k)
    weight[: len(old)] = old
    if layer.bias is not None:
        bias[: len(old)] = layer.bias.detach().cpu().double().numpy()
    fresh = [name for name in rated_now if name not in rm.objectives.names]
    order, reports = [*rm.objectives.names, *fresh], []
    for position, report in enumerate(head.reports):
        if report.objective in rated_now:
            column = order.index(report.objective)
            weight[column], bias[column] = head.weight[position], head.bias[position]
            reports.append(asdict(report))
    return weight, bias, reports


def extended_transform(
    rm: ArmoRM, rewards: np.ndarray, reference: Sequence[Conversation], fresh: int
) -> tuple[np.ndarray, np.ndarray]:
    """The transform (k, k) with columns for new objectives, and their penalties (b, fresh)."""
    old = rm.model.reward_transform_matrix.cpu().double().numpy()
    k, before = rewards.shape[1], len(old)
    transform = np.eye(k)
    transform[:before, :before] = old
    config = rm.model.config.debiasing
    biases = [rm.objectives.position(name) for name in config.get("against", [])]
    penalties = np.zeros((len(biases), fresh))
    if biases and fresh:
        columns = [*biases, *range(before, k)]
        groups = np.unique([conversation.prompt_key for conversation in reference], return_inverse=True)[1]
        debiasing = fit_debiasing(
            rewards[:, columns],
            list(range(len(biases))),
            metric=config.get("metric", "spearman"),
            level=config.get("level", "pooled"),
            groups=groups,
        )
        penalties = debiasing.penalties[:, len(biases) :]
        transform[np.ix_(biases, range(before, k))] = -penalties
    kept = np.diagonal(old)[np.diagonal(old) != 0]
    if len(kept) and not np.allclose(kept, 1):  # the model's rewards are scaled to unit deviation
        transform[:, before:] /= np.maximum((rewards @ transform[:, before:]).std(0), 1e-12)
    return transform.astype(np.float32).astype(np.float64), penalties


@torch.no_grad()
def wider_gate(rm: ArmoRM, fresh: int, prompts: np.ndarray, share: float | None) -> GatingNetwork:
    """The gate with outputs for new objectives: constant logits that give them their share over the prompts (m, d)."""
    config, old = rm.model.config, rm.model.gating
    k = len(rm.objectives)
    gate = GatingNetwork(
        config.hidden_size,
        k + fresh,
        hidden_size=config.gating_hidden_dim,
        hidden_layers=config.gating_n_hidden,
        temperature=config.gating_temperature,
    )
    state = {name: tensor.clone().cpu() for name, tensor in old.state_dict().items()}
    last = f"layers.{config.gating_n_hidden}"
    wanted = fresh / (k + fresh) if share is None else share
    if fresh and not 0 < wanted < 1:
        raise FitError(f"share {wanted:g}, expected more than 0 and less than 1")
    logits = torch.from_numpy(prompts).float()
    for layer in old.layers[:-1]:
        logits = torch.relu(layer.cpu()(logits))
    logits = old.layers[-1].cpu()(logits).double() / config.gating_temperature
    total = torch.logsumexp(logits, 1)
    low, high = float(total.min()) - 50.0, float(total.max()) + 50.0
    for _ in range(100):  # the mean share rises with the logit
        middle = (low + high) / 2
        mean = float(torch.sigmoid(middle - total).mean())
        low, high = (middle, high) if mean < wanted else (low, middle)
    each = (low - np.log(max(fresh, 1))) * config.gating_temperature
    state[f"{last}.weight"] = torch.cat([state[f"{last}.weight"], torch.zeros(fresh, state[f"{last}.weight"].shape[1])])
    state[f"{last}.bias"] = torch.cat([state[f"{last}.bias"], torch.full((fresh,), each)])
    gate.load_state_dict(state)
    return gate.eval()


def extended_card(rm: ArmoRM, metrics: dict[str, Any]) -> str:
    """The card of an extended model."""
    entry, rated = metrics["extended"], metrics["evaluation"]["ratings"]
    gate = metrics["gate"]
    shared = "The gate gives new objectives a fixed share of the weight."
    if gate:
        shared = (
            f"The gate was trained on from its old weights on {gate['pairs']:,} pairs: accuracy {gate['accuracy']:.3f} "
            f"on {gate['held_out_pairs']:,} held out by prompt ({gate['uniform_accuracy']:.3f} by uniform weights)."
        )
    lines = [
        "---",
        "library_name: armorm",
        "pipeline_tag: text-classification",
        "tags: [reward-model, armorm, interpretable]",
        "---",
        "",
        f"# {Path(entry['from']).name}, extended",
        "",
        f"{len(rm.objectives)} objectives; new here: {', '.join(entry['objectives']) or 'none'}; more ratings of: "
        f"{', '.join(entry['more_ratings']) or 'none'}. All else is that of `{entry['from']}`.",
        "",
        "| objective | ratings | alpha | R2 | test n | Spearman |",
        "|---|---|---|---|---|---|",
    ]
    for report in metrics["regression"]:
        test = rated.get(report["objective"], {})
        spearman = test.get("spearman", float("nan"))
        lines.append(
            f"| {report['objective']} | {report['ratings']:,} | {report['alpha']:g} | {report['r2']:.3f} "
            f"| {test.get('n', '')} | {'' if np.isnan(spearman) else f'{spearman:.3f}'} |"
        )
    return "\n".join([*lines, "", shared]) + "\n"
