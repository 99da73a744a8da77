"""`armorm extend`: add objectives, or ratings of existing objectives, to a trained or the released model.

The old ratings are not needed: new ones of an existing objective are added to the sufficient statistics that its run
saved, and rejected without these. All other heads and the old block of the transform stay as they are, to the bit. New
objectives are debiased against the model's own biases on the new rows. With preference pairs the gate continues to
train from its old weights; without, new objectives get a constant share of the weight. The score's mean, standard
deviation and quantiles are measured again, on the new training rows.

Settings are those of the model's recipe (recipe.yaml in its folder), else the defaults of a recipe. Rows and pairs are
split and filtered as in `train`, without what that recipe evaluates on and what the backbone was fine-tuned on.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armorm.backbone.decoder import Placement
from armorm.conversation import Conversation
from armorm.data.decontamination import KnownPrompts
from armorm.data.preferences import read_preferences
from armorm.data.ratings import RatedSet, read_ratings
from armorm.data.rejections import Rejections
from armorm.data.seen_prompts import SeenPrompts
from armorm.data.sources import Location
from armorm.errors import DataError, FitError, RecipeError
from armorm.files import write_text
from armorm.heads.debiasing import Debiasing, fit_debiasing, no_debiasing
from armorm.heads.discount import LEAST
from armorm.heads.regression import RegressionHead
from armorm.heads.statistics import RatingStatistics
from armorm.heads.uncertainty import Uncertainty
from armorm.model.configuration import ArmoRMConfig
from armorm.model.remote_code import GatingNetwork
from armorm.objectives import ObjectiveSet
from armorm.progress import Terminal
from armorm.reward_model import ArmoRM
from armorm.training.dataset import TrainingData, group_index, read_training_data, set_locations, split_by_prompt
from armorm.training.evaluate import evaluation_metrics
from armorm.training.featurize import Corpus, build_corpus
from armorm.training.finetune.record import Finetuned, without_finetuned
from armorm.training.pipeline import save_run, write_rejected
from armorm.training.recipe import Recipe
from armorm.training.schema import RegressionSection
from armorm.training.stages import (
    STATISTICS,
    OutOfFoldRewards,
    RatedSplit,
    assemble_model,
    fit_stage1,
    objective_reliability,
    rated_split,
    reference_statistics,
    train_gate,
    with_rater_weights,
)
from armorm.training.tracking import Tracking
from armorm.version import __version__


def extend(
    model: str | Path,
    sets: Sequence[RatedSet],
    output: str | Path,
    *,
    preferences: Sequence[Location] = (),
    share: float | None = None,
    seed: int | None = None,
    steps: int | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> ArmoRM:
    """Extend a model.

    Args:
        model: folder, hub id or embedded name; its statistics are expected in `work` below the folder.
        sets: rated sets; an objective with the name of one of the model's must have the same scale.
        output: another folder.
        preferences: pairs to train the gate on; some are held out by their split column, or by prompt.
        share: share of the gating weight for new objectives, without preferences; by default 1 / all for each,
            discounted where it is less reliable than the model's objectives.
        seed, steps: of the gate's training, by default those of the model's recipe.
        strict: a row or rating cell that cannot be read is an error, instead of being left out and counted.
        quiet: print only progress.

    Raises:
        FitError: for too few ratings or pairs, or new ratings of an existing objective without its statistics.
        DataError: for invalid data.
    """
    console = Terminal(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    folder, origin = Path(output), Path(model)
    if folder.resolve() == origin.resolve():
        raise FitError(f"{output}: is the model's own folder, expected another one")
    rm = ArmoRM.from_pretrained(model, dtype="weights")  # kept to the bit for the old objectives
    Placement.choose("auto", str(rm.backbone.device)).apply(rm.model.model)
    recipe, trained_by = Recipe.model_construct(ratings=(), preferences=()), origin / "recipe.yaml"
    if trained_by.is_file():
        recipe = Recipe.from_yaml(trained_by)
        write_text(folder / "recipe.yaml", recipe.to_yaml())  # for the next extension
    data = _read_data(rm, origin, recipe, sets, preferences, console, strict)
    limits = rm.model.config.limits
    corpus = build_corpus(
        data.conversations(),
        rm.backbone,
        folder / "work" / "features",
        console,
        pairs=data.all_pairs(),
        max_length=limits.get("max_length"),
        overflow=limits.get("overflow", "error"),
        seen=rm.seen,
    )
    write_rejected(folder, corpus, data)
    rated, pairs = rated_split(data, corpus), corpus.usable(data.pairs)
    rated_names = rated.table.objectives.names
    added = [name for name in rated_names if name not in rm.objectives.names]
    again = [name for name in rated_names if name in rm.objectives.names]
    objectives = ObjectiveSet([*rm.objectives, *(o for o in rated.table.objectives if o.name in added)])
    console.print(f"new objectives: {', '.join(added) or 'none'}; additional ratings of: {', '.join(again) or 'none'}")
    for warning in _dropped_features(rm, origin, again):
        console.print(f"warning: {warning}")

    fitted, uncertainty, statistics = _fit_stage1(rm, origin, recipe.regression, rated, corpus, objectives)
    if rm.uncertainty is not None and uncertainty is None:
        console.print("warning: no uncertainty in the new model: no statistics of the old ratings")
    head = _extended_head(rm, fitted, objectives, rated_names)
    for report in head.reports:
        if report.warning:
            console.print(f"warning: objective {report.objective}: {report.warning}")
    rewards = OutOfFoldRewards(head, rated.train_prompts, corpus)
    reference = rated.train_conversations
    reference_rewards = rewards(reference)
    debiasing = _extended_debiasing(rm, recipe, reference_rewards, reference)
    found = objective_reliability(rewards, uncertainty, reference, objectives.names)
    objectives = objectives.with_reliability(found)
    known = objectives.reliability
    gate = extended_gate(rm, _relative(known, len(added)), corpus.features(reference).prompt, share)
    gate_report = None
    if pairs:
        config = rm.model.config
        shape = {"hidden_size": config.gating_hidden_dim, "hidden_layers": config.gating_n_hidden}
        settings = {"temperature": config.gating_temperature, "steps": steps or recipe.gating.steps}
        section = recipe.gating.model_copy(update=shape | settings)
        seed = recipe.seed if seed is None else seed
        with Tracking(folder, (), "extend", {}) as tracking:
            options: dict[str, Any] = {"reliability": known, "seed": seed, "initial": gate}
            gate, gate_report = train_gate(pairs, rewards, debiasing, section, tracking, **options)
    elif added:
        console.print("no preferences: new objectives get a constant share of the weight, whatever the prompt")

    entry = {"from": str(model), "objectives": added, "more_ratings": again, "pairs": len(pairs)}
    config = _extended_config(rm, objectives, uncertainty, debiasing, entry)
    config.calibration = gate_report.calibration if gate_report else None  # the old one is of other rewards
    config.reference = reference_statistics(gate, debiasing, corpus, reference, reference_rewards)
    old_means = rm.reference.get("reward_means") or []
    config.reference["reward_means"][: len(old_means)] = old_means
    extended = assemble_model(rm.model.model, rm.tokenizer, config, rm.name, head, uncertainty, debiasing, gate)
    used = {"ratings": rated.train_conversations, "pairs": [pair.chosen for pair in pairs]}
    extended.seen = rm.seen + SeenPrompts.of(used, corpus.groups)
    metrics = {
        "armorm_version": __version__,
        "extended": entry,
        "data": {
            "rated_train": len(rated.train),
            "rated_test": len(rated.test),
            "pairs": len(pairs),
            "left_out": data.left_out,
            "seen": extended.seen.count(),
        },
        "regression": [asdict(report) for report in head.reports],
        "gate": asdict(gate_report) if gate_report else None,
        "evaluation": {"ratings": {}} | evaluation_metrics(extended, data, rated, corpus, debiasing, folder),
    }
    statistics.save(folder / "work" / STATISTICS)
    save_run(extended, metrics, folder, f"{origin.name}, extended")
    console.print(f"done: {folder}")
    return ArmoRM.from_pretrained(folder)


def _read_data(
    rm: ArmoRM,
    model: Path,
    recipe: Recipe,
    sets: Sequence[RatedSet],
    preferences: Sequence[Location],
    console: Terminal,
    strict: bool,
) -> TrainingData:
    """New rows and pairs, split and filtered by the rules of the recipe."""
    rejections = Rejections(strict)
    table = read_ratings(sets, rejections=rejections)
    pairs = [
        read_preferences(location, Path(location.name).name.split(".")[0], rejections=rejections)
        for location in preferences
    ]
    rejections.report(console)
    data = split_by_prompt(recipe, table, [(part, None) for part in pairs], _evaluated(recipe, console))
    data = replace(data, left_out=rejections.counts | data.left_out, rejections=rejections)
    backbone = rm.model.config.provenance.get("backbone", "")
    finetuned = Finetuned.read(model / "work" / "backbone") or Finetuned.read(backbone)
    data = without_finetuned(data, finetuned) if finetuned else data
    seen_rows = rm.seen.find([data.table.conversations[i] for i in data.test_rows]) > 0
    seen_pairs = rm.seen.find([pair.chosen for pair in data.test_pairs]) > 0
    counts = {
        "rated test rows whose prompt was seen in training": int(seen_rows.sum()),
        "test pairs whose prompt was seen in training": int(seen_pairs.sum()),
    }
    data = replace(
        data,
        test_rows=data.test_rows[~seen_rows],
        test_pairs=[pair for pair, seen in zip(data.test_pairs, seen_pairs, strict=True) if not seen],
        left_out=data.left_out | {reason: count for reason, count in counts.items() if count},
    )
    for reason, count in data.left_out.items():
        console.print(f"excluded: {count:,} {reason}")
    return data


def _evaluated(recipe: Recipe, console: Terminal) -> KnownPrompts:
    """Prompts that the recipe evaluates on, as far as its data are available without the network."""
    if not recipe.ratings:
        return KnownPrompts()
    try:
        missing = [location.name for _, _, location, _ in set_locations(recipe) if not location.available_offline]
        if not missing:
            return read_training_data(recipe).evaluated
        problem = f"not available offline: {', '.join(missing)}"
    except (RecipeError, DataError) as error:
        problem = str(error)
    console.print(f"warning: prompts that the model's recipe evaluates on are not excluded ({problem})")
    return KnownPrompts()


def _dropped_features(rm: ArmoRM, folder: Path, again: Sequence[str]) -> list[str]:
    found = []
    if rm.model.config.quantiles:
        names = ", ".join(rm.model.config.quantiles["objectives"])
        found.append(f"quantile heads ({names}) are not carried over; train a new model to have them")
    metrics = folder / "metrics.json"
    if again and metrics.is_file() and json.loads(metrics.read_text(encoding="utf-8")).get("joint"):
        found.append(f"the heads were trained on pairs as well; {', '.join(again)} will be fitted to ratings alone")
    return found


def _fit_stage1(
    rm: ArmoRM,
    folder: Path,
    section: RegressionSection,
    rated: RatedSplit,
    corpus: Corpus,
    objectives: ObjectiveSet,
) -> tuple[RegressionHead, Uncertainty | None, RatingStatistics]:
    """Stage 1 on saved statistics of the model plus the new ratings, of every objective that has either."""
    path = folder / "work" / STATISTICS
    before = RatingStatistics.load(path) if path.is_file() else None
    saved = [] if before is None else list(before.names)
    rated_names = rated.table.objectives.names
    missing = [name for name in rated_names if name in rm.objectives.names and name not in saved]
    if missing:
        raise FitError(
            f"new ratings of {', '.join(missing)}, which the model has, but {path} "
            f"{'does not exist' if before is None else 'does not have them'}: expected the statistics of the old "
            "ratings, or other names"
        )
    names = [name for name in objectives.names if name in saved or name in rated_names]
    folds = section.folds if before is None else before.folds
    rows = rated.train_rows(corpus, folds, names)
    statistics = rows.statistics(folds)
    rows = with_rater_weights(rated, rows, section, statistics)
    statistics = rows.statistics(folds) if rows.weights else statistics
    if before is not None:
        statistics = before.with_names(names) + statistics
    has_uncertainty = names == objectives.names and rm.uncertainty is not None
    section = section.model_copy(update={"intercept": rm.model.config.regression_bias, "uncertainty": has_uncertainty})
    head, uncertainty = fit_stage1(section, statistics, rows)
    if uncertainty is not None and rm.uncertainty is not None:
        # The weights of the others stay, and so does their uncertainty: of the penalty that they were fitted with.
        # Intervals are calibrated on the new rows, unless most rows are old.
        positions = {objectives.position(name): i for i, name in enumerate(rm.objectives.names)}
        kept = {column: i for column, i in positions.items() if names[column] not in rated_names}
        few = 2 * (~np.isnan(rows.ratings)).sum(0) < statistics.counts().sum(1)
        calibrated = {column: i for column, i in positions.items() if column not in kept and few[column]}
        uncertainty = uncertainty.with_earlier(rm.uncertainty, kept, calibrated)
    return head, uncertainty, statistics


def _extended_head(
    rm: ArmoRM, fitted: RegressionHead, objectives: ObjectiveSet, rated_names: Sequence[str]
) -> RegressionHead:
    """The head of all objectives: those with new ratings as fitted (with reports), the others as they were."""
    layer = rm.model.regression_layer
    old = layer.weight.detach().cpu().double().numpy()
    k, folds = len(objectives), len(fitted.fold_weight)
    weight, bias = np.zeros((k, old.shape[1])), np.zeros(k)
    weight[: len(old)] = old
    if layer.bias is not None:
        bias[: len(old)] = layer.bias.detach().cpu().double().numpy()
    fold_weight, fold_bias = np.tile(weight, (folds, 1, 1)), np.tile(bias, (folds, 1))
    reports = []
    for position, report in enumerate(fitted.reports):
        if report.objective in rated_names:
            column = objectives.position(report.objective)
            weight[column], bias[column] = fitted.weight[position], fitted.bias[position]
            fold_weight[:, column] = fitted.fold_weight[:, position]
            fold_bias[:, column] = fitted.fold_bias[:, position]
            reports.append(report)
    return RegressionHead(weight, bias, fold_weight, fold_bias, reports)


def _extended_debiasing(
    rm: ArmoRM, recipe: Recipe, rewards: np.ndarray, reference: Sequence[Conversation]
) -> Debiasing:
    """The old transform with columns for new objectives, and `penalties` (b, new objectives) of these only.

    Args:
        rewards: (n, k) of the reference, old objectives first.
    """
    old = rm.model.reward_transform_matrix.cpu().double().numpy()
    k, before = rewards.shape[1], len(old)
    transform = np.eye(k)
    transform[:before, :before] = old
    config = rm.model.config.debiasing
    biases = [rm.objectives.position(name) for name in config.get("against", [])]
    penalties = np.zeros((len(biases), k - before))
    if biases and k > before:
        fitted = fit_debiasing(
            rewards[:, [*biases, *range(before, k)]],
            list(range(len(biases))),
            metric=config.get("metric", "spearman"),
            level=config.get("level", "pooled"),
            groups=group_index([conversation.prompt_key for conversation in reference]),
            method=recipe.debias.method if recipe.debias else "exact",
        )
        penalties = fitted.penalties[:, len(biases) :]
        transform[np.ix_(biases, range(before, k))] = -penalties
    kept = np.diagonal(old)[np.diagonal(old) != 0]
    if len(kept) and not np.allclose(kept, 1):  # the model's rewards are scaled to unit deviation
        transform[:, before:] /= np.maximum((rewards @ transform[:, before:]).std(0), 1e-12)
    matrix = transform.astype(np.float32).astype(np.float64)
    return replace(no_debiasing(k), matrix=matrix, against=tuple(biases), penalties=penalties)


def _relative(reliability: np.ndarray, new: int) -> np.ndarray:
    """Reliability of the last `new` objectives relative to the mean of the others, at most 1; to the most reliable new
    one where that of the others is unknown."""
    added, before = reliability[len(reliability) - new :], reliability[: len(reliability) - new]
    known = before[~np.isnan(before)]
    level = max(known.mean() if len(known) else added.max(initial=0.0), LEAST)
    return np.clip(added / level, LEAST, 1.0)


@torch.no_grad()
def extended_gate(rm: ArmoRM, relative: np.ndarray, prompts: np.ndarray, share: float | None) -> GatingNetwork:
    """The gate with a constant logit for each new objective, such that new objectives together have the requested mean
    share of the weight over the prompts (m, d).

    Args:
        relative: (new,) share of each new objective relative to 1 / all, 0 to 1.
    """
    temperature, k, new = rm.model.config.gating_temperature, len(rm.objectives), len(relative)
    gate = copy.deepcopy(rm.model.gating).cpu()
    layers: list[Any] = list(gate.layers)
    last = layers[-1]
    share = float(relative.sum()) / (k + new) if share is None else share
    if new and not 0 < share < 1:
        raise FitError(f"share {share:g}, expected more than 0 and less than 1")
    logits = torch.from_numpy(prompts).float()
    for layer in layers[:-1]:
        logits = torch.relu(layer(logits))
    total = torch.logsumexp(last(logits).double() / temperature, 1)
    low, high = float(total.min()) - 50.0, float(total.max()) + 50.0
    for _ in range(100):  # bisection: the mean share rises with the logit
        middle = (low + high) / 2
        mean = float(torch.sigmoid(middle - total).mean())
        low, high = (middle, high) if mean < share else (low, middle)
    logits_of_new = (low + np.log(relative / max(relative.sum(), LEAST))) * temperature
    extended = torch.nn.Linear(last.in_features, k + new)
    extended.weight.copy_(torch.cat([last.weight, torch.zeros(new, last.in_features)]))
    extended.bias.copy_(torch.cat([last.bias, torch.from_numpy(logits_of_new).float()]))
    gate.layers[-1] = extended
    return gate.eval()


def _extended_config(
    rm: ArmoRM,
    objectives: ObjectiveSet,
    uncertainty: Uncertainty | None,
    debiasing: Debiasing,
    entry: dict[str, Any],
) -> ArmoRMConfig:
    config = copy.deepcopy(rm.model.config)
    config.objectives = objectives.to_dicts()
    config.uncertainty = uncertainty.settings() if uncertainty else {}
    config.quantiles = {}  # fitted around the old rewards
    if config.debiasing.get("penalties"):
        penalties = np.concatenate([np.atleast_2d(config.debiasing["penalties"]), debiasing.penalties], 1)
        config.debiasing["penalties"] = (penalties[0] if len(penalties) == 1 else penalties).tolist()
    config.provenance["extended"] = [*config.provenance.get("extended", []), entry]
    return config
