"""Fine-tuning of the backbone together with linear reward heads, before its features are computed.

    min over backbone f and W of  sum_j v_j sum over rows i rated on j  (f(x_i)^T w_j - r_ij)^2

This is the objective of the ArmoRM paper (arXiv 2406.12845, section 3.1) with weights v_j; missing ratings are masked.
`objective_weights: equal` is the paper's sum (v_j = 1); `balanced` divides by the variance of the ratings and the
square root of their number, so that small sets are not drowned by large ones. On request it is preceded by Bradley-
Terry training on preference pairs, which the paper's backbone had as well:

    min over f and u of  mean over pairs of -log sigmoid(u^T f(chosen) - u^T f(rejected))

Either all weights are trained, or LoRA adapters that are merged at the end. Only a share of the prompts is used; the
others stay new to the backbone, and only they choose alpha, fit the transform and train the gate. W is initialised by
ridge regression on the original features, since a random W would first damage them. Responses to one prompt are
branches of one sequence (collator.py) if the decoder supports it. Training resumes from the last complete checkpoint.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, fast_bfloat16, resolve_device
from armorm.backbone.encoding import encode_rows
from armorm.data.decontamination import prompt_groups
from armorm.data.seen_prompts import SeenPrompts
from armorm.errors import FitError, MissingExtraError
from armorm.features.engine import keys_of
from armorm.files import write_json
from armorm.heads.regression import MIN_RATINGS, fit_regression, fold_of
from armorm.objectives import ObjectiveSet
from armorm.progress import progress
from armorm.training.dataset import TrainingData, distinct_conversations, sides
from armorm.training.finetune.collator import grow_trees, reads_trees
from armorm.training.finetune.record import Finetuned
from armorm.training.finetune.trainer import Learner, TreeBatches, last_whole_checkpoint, run_trainer
from armorm.training.recipe import Recipe
from armorm.training.saved_stages import stage_key
from armorm.training.schema import FinetuneSection
from armorm.training.stages import add_computed

START_RATINGS = 500
START_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean diagonal of the Gram matrix
START_FOLDS = 5
PROBED = 64


def finetune(recipe: Recipe, data: TrainingData, work: Path, console: Console) -> Path:
    """Fine-tune the backbone of a recipe, unless it is already done.

    Args:
        work: work folder of the run; the backbone is written to `work/backbone`, checkpoints to `work/finetune`.

    Returns:
        folder of the fine-tuned backbone: weights, tokenizer and the fine-tuning record (record.py).

    Raises:
        MissingExtraError: without accelerate or peft.
        FitError: if the share leaves no rated row to train on.
        BackboneError: for layers that cannot be frozen.
    """
    section = recipe.finetune
    assert section is not None
    needed = ["accelerate", *(["peft"] if section.method == "lora" else [])]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(f"finetune needs {' and '.join(missing)}: pip install 'armorm[finetune]'")
    start = Backbone.load(
        recipe.backbone.model,
        dtype="weights",
        device=recipe.backbone.device,
        revision=recipe.backbone.revision,
        trust_remote_code=recipe.backbone.trust_remote_code,
    )
    rows = _FinetuneData.select(recipe, data, start, console)
    earlier = Finetuned.read(recipe.backbone.model)
    contents = keys_of(rows.encoded), rows.rated, rows.ratings, rows.objectives.to_dicts(), rows.pairs
    key = stage_key("finetune", section, recipe.seed, start.fingerprint, rows.seen.sketches, *contents)
    folder, checkpoints = work / "backbone", work / "finetune" / key
    done = Finetuned.read(folder)
    if done is not None and done.key == key:
        return folder
    stored = start.model.dtype
    learner, curves = _train(start, rows, section, recipe.seed, checkpoints, console)
    model = learner.merged().to(stored)
    facts = {
        "from": recipe.backbone.model,
        "settings": section.model_dump(mode="json", exclude_defaults=True),
        "rated_rows": len(rows.rated),
        "pairs": len(rows.pairs) if section.preference_epochs else 0,
        "tokens": sum(len(encoded) for encoded in rows.encoded),
        "ratings": {n: int(c) for n, c in zip(rows.objectives.names, (~np.isnan(rows.ratings)).sum(0), strict=True)},
        "before": earlier.facts if earlier else None,
    }
    temporary = work / "finetune" / "backbone"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    start.tokenizer.save_pretrained(temporary)
    write_json(temporary / "training_curve.json", curves)
    seen = rows.seen + earlier.seen if earlier else rows.seen
    Finetuned(seen, rows.objectives.to_dicts(), learner.rating_weight(), facts, key).write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)  # atomic: a folder with a record is complete
    shutil.rmtree(work / "finetune")
    return folder


def is_chosen(group_key: str, share: float) -> bool:
    """Whether a group of prompts is fine-tuned on: by its key, independent of folds and splits."""
    return int(group_key[24:32], 16) / 2**32 < share


@dataclass
class _FinetuneData:
    """The part of the training data that is fine-tuned on."""

    encoded: list[EncodedConversation]  # every conversation once
    rated: np.ndarray  # (n,) positions of the rated rows in `encoded`
    ratings: np.ndarray  # (n, k) mapped, NaN where missing
    groups: list[str]  # (n,) key of the group of near-duplicates of the prompt
    objectives: ObjectiveSet  # the k objectives, computed ones last
    pairs: list[tuple[int, int]]  # (chosen, rejected) positions in `encoded`
    seen: SeenPrompts  # all prompts used

    @classmethod
    def select(cls, recipe: Recipe, data: TrainingData, backbone: Backbone, console: Console) -> _FinetuneData:
        section, table = recipe.finetune, data.table
        assert section is not None
        unknown = sorted(set(section.source_shares) - set(table.sources))
        if unknown:
            known = ", ".join(dict.fromkeys(table.sources))
            raise FitError(f"finetune.source_shares: unknown set {unknown[0]!r}, expected one of {known}")
        shares = [section.source_shares.get(source, section.share) for source in table.sources]
        groups = prompt_groups([*(table.conversations[i] for i in data.train_rows), *(p.chosen for p in data.pairs)])
        rows = [i for i in data.train_rows if is_chosen(groups[table.conversations[i].prompt_key], shares[i])]
        pairs = [p for p in data.pairs if section.preference_epochs and is_chosen(groups[p.prompt_key], section.share)]
        unique = distinct_conversations([*(table.conversations[i] for i in rows), *sides(pairs)])
        limit, overflow = recipe.backbone.max_length, recipe.backbone.overflow
        with progress("tokens to fine-tune on", len(unique), "conversations") as advance:
            result = encode_rows(backbone.template, unique, limit, overflow, advance)
        encoded = result.encoded
        place = {unique[i].key: position for position, i in enumerate(result.kept)}
        rows = [i for i in rows if table.conversations[i].key in place]
        if not rows:
            raise FitError(f"finetune.share {section.share}: no rated row is left to fine-tune on")
        placed = [
            (place[p.chosen.key], place[p.rejected.key])
            for p in pairs
            if {p.chosen.key, p.rejected.key} <= place.keys()
        ]
        same = [(a, b) for a, b in placed if encoded[a].prompt_key == encoded[b].prompt_key]
        skipped = len(pairs) - len(same)
        if skipped:
            console.print(f"fine-tuning skips {skipped:,} pairs (rejected, or truncated to different prompts)")
        if section.preference_epochs and not same:
            raise FitError(f"finetune.share {section.share}: no preference pair is left for preference_epochs")
        rated = np.array([place[table.conversations[i].key] for i in rows], np.int64)
        tokens = [encoded[i].response_tokens for i in rated]
        table = add_computed(table.take(rows), data.computed, tokens, np.arange(len(rows)))
        seen = SeenPrompts.of({"fine-tuning": [unique[i] for i in result.kept]}, groups)
        own = [groups[conversation.prompt_key] for conversation in table.conversations]
        return cls(encoded, rated, table.objectives.to_reward(table.ratings), own, table.objectives, same, seen)


def rating_weights(ratings: np.ndarray, kind: str) -> np.ndarray:
    """Weights v_j (k,), scaled such that predicting each objective's mean has an average loss of 1 per rating.

    Args:
        ratings: (n, k) mapped, NaN where missing; an objective without variance or ratings gets weight 0.
        kind: `equal` or `balanced`.
    """
    count = (~np.isnan(ratings)).sum(0)
    variance = np.array([np.nanvar(column) if c > 1 else 0.0 for column, c in zip(ratings.T, count, strict=True)])
    learnable = variance > 1e-12
    weights = np.where(learnable, 1.0, 0.0)
    if kind == "balanced":
        weights[learnable] = 1 / (variance[learnable] * np.sqrt(count[learnable]))
    total = float((weights * count * variance).sum())
    if total == 0:
        raise FitError("no objective has ratings that differ among the rows to fine-tune on")
    return weights * count[learnable].sum() / total


def _train(
    start: Backbone, rows: _FinetuneData, section: FinetuneSection, seed: int, checkpoints: Path, console: Console
) -> tuple[Learner, dict[str, Any]]:
    """Train on pairs if requested, then on ratings; returns the trained learner and the loss curves."""
    model = start.model if section.method == "lora" else start.model.float()
    device = resolve_device(str(start.device))
    everything = grow_trees(rows.encoded, [(row,) for row in range(len(rows.encoded))], section.tree_tokens)
    probe = sorted(everything, key=lambda tree: -len(tree.rows))[:2]
    share = len(probe[0].rows) > 1 and reads_trees(model, rows.encoded, probe)
    console.print(f"fine-tuning: each prompt is computed once{'' if share else ' per response'}")
    resumed = any(last_whole_checkpoint(checkpoints / stage) for stage in ("preferences", "ratings"))
    shape = (rows.ratings.shape[1], start.hidden_size)
    weight = np.zeros(shape) if resumed else _starting_weight(start, rows)  # (loaded from the checkpoint)
    learner = Learner(
        model,
        section,
        torch.from_numpy(weight).float(),
        rating_weights(rows.ratings, section.objective_weights),
        _feature_norm(start, rows),
    )
    few_shapes = device.type == "cpu" and fast_bfloat16()
    autocast = device.type == "cuda" or few_shapes
    by_row = np.full((len(rows.encoded), rows.ratings.shape[1]), np.nan, np.float32)
    by_row[rows.rated] = rows.ratings
    stages: list[tuple[str, list[tuple[int, ...]], float, np.ndarray | None]] = [
        ("preferences", [*rows.pairs], section.preference_epochs, None),
        ("ratings", [(int(row),) for row in rows.rated], section.epochs, by_row),
    ]
    curves: dict[str, Any] = {"shared_prompts": share}
    for name, items, epochs, ratings in stages:
        if epochs:
            trees = grow_trees(rows.encoded, items, section.tree_tokens, share=share)
            batches = TreeBatches(rows.encoded, trees, section, seed, share, few_shapes, ratings)
            folder = checkpoints / name
            curves[name] = run_trainer(learner, batches, epochs, folder, device=device, bfloat16=autocast)
    return learner, curves


def _feature_norm(start: Backbone, rows: _FinetuneData) -> float:
    """Mean L1 norm of sampled features: a change of r / norm in every weight changes a reward by about r at most."""
    few = [rows.encoded[row] for row in rows.rated[:: max(1, len(rows.rated) // PROBED)]]
    sums = [np.abs(start.features(few[i : i + 8])[1]).sum(1) for i in range(0, len(few), 8)]
    return float(np.concatenate(sums).mean())


def _starting_weight(start: Backbone, rows: _FinetuneData) -> np.ndarray:
    """W (k, d) float64 by ridge regression on the original features.

    Rows are taken prompt by prompt until each objective has START_RATINGS ratings, or all of them. Penalties are chosen
    by cross-validation: weights that overfit so few rows predict others worse than the mean does, and training would
    first have to undo them.
    """
    order = sorted(range(len(rows.rated)), key=rows.groups.__getitem__)
    present = ~np.isnan(rows.ratings)
    needed = np.minimum(START_RATINGS, present.sum(0))
    taken: list[int] = []
    for row in order:
        if (present[row] & (needed > 0)).any():
            taken.append(row)
            needed = needed - present[row]
    taken.sort(key=lambda row: -len(rows.encoded[rows.rated[row]]))
    features = np.empty((len(taken), start.hidden_size))
    with progress("features for initialisation", len(taken), "conversations") as advance:
        for begin in range(0, len(taken), 16):
            batch = [rows.encoded[rows.rated[row]] for row in taken[begin : begin + 16]]
            features[begin : begin + len(batch)] = start.features(batch)[1]
            advance(len(batch))
    folds = np.array([fold_of(rows.groups[row], START_FOLDS) for row in taken])
    ratings = rows.ratings[taken]
    return np.stack([_ridge(features, column, folds) for column in ratings.T])


def _ridge(features: np.ndarray, ratings: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Weights (d,) of one objective with ratings (n,), NaN where missing; with too few ratings to choose a penalty, the
    largest one is used."""
    rated = ~np.isnan(ratings)
    x, r = features[rated], ratings[rated]
    if not len(r):
        return np.zeros(features.shape[1])
    gram = x.T @ x
    penalties = np.array(START_PENALTIES) * np.trace(gram) / len(gram)
    if len(r) < MIN_RATINGS or len(np.unique(folds[rated])) < START_FOLDS or r.std() == 0:
        return np.linalg.solve(gram + penalties[-1] * np.eye(len(gram)), x.T @ r)
    return fit_regression(x, r[:, None], folds[rated], ["start"], alphas=penalties.tolist()).weight[0]
