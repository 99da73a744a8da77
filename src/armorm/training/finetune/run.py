"""Fine-tuning of the backbone together with linear reward heads, before its features are computed.

    min over backbone f and W of  sum_j v_j sum over rows i rated on j  (f(x_i)^T w_j - r_ij)^2

This is the objective of the ArmoRM paper (arXiv 2406.12845, section 3.1) with weights v_j; missing ratings are masked.
`objective_weights: equal` is the paper's sum (v_j = 1); `balanced` divides by the variance of the ratings and the
square root of their number, so that small sets are not drowned by large ones. On request preference pairs are trained
on as well, as the paper's backbone was, in passes of their own before (`preference_epochs`) or in the same steps
(`preference_weight`):

    min over f and u of  mean over pairs of -log sigmoid(u^T f(chosen) - u^T f(rejected))

f is the response feature that extraction reads: of `backbone.layer`, with `backbone.pooling`. Layers above are not
computed. The lowest layers can be frozen; their states are then computed once (state_cache.py), and training starts
from these. Either all weights of the other layers are trained, or LoRA adapters (backbone/adapters.py). What is written
is the whole decoder with the changed layers, so that it is read like any other, and the adapters alone.

Only a share of the prompts is used; the others stay new to the backbone, and only they choose alpha, fit the transform
and train the gate. W is initialised by ridge regression on the original features, since a random W would first damage
them. Responses to one prompt are branches of one sequence (collator.py) if the decoder supports it. Training resumes
from the last complete checkpoint, and stops early by validation prompts (validation.py).
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from armorm.backbone.adapters import adapters_of
from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone, fast_bfloat16
from armorm.backbone.encoding import encode_rows
from armorm.backbone.lower_layers import layer_list, lower_layers_fault
from armorm.data.decontamination import prompt_groups
from armorm.data.seen_prompts import SeenPrompts
from armorm.errors import FitError, MissingExtraError
from armorm.features.engine import keys_of
from armorm.files import files_together, write_json
from armorm.heads.bradley_terry import fit_bradley_terry
from armorm.heads.regression import MIN_RATINGS, fit_regression, fold_of
from armorm.objectives import ObjectiveSet
from armorm.progress import progress
from armorm.training.cost import TRAINING_PASSES, readable_hours, resolve_frozen
from armorm.training.dataset import TrainingData, distinct_conversations, sides
from armorm.training.finetune.collator import grow_trees, model_inputs, reads_trees, tree_tensors
from armorm.training.finetune.processes import Processes
from armorm.training.finetune.record import Finetuned
from armorm.training.finetune.state_cache import cached_states
from armorm.training.finetune.trainer import (
    BatchLayout,
    Learner,
    TreeBatches,
    features_of,
    last_whole_checkpoint,
    run_trainer,
    total_steps,
)
from armorm.training.finetune.validation import LEAST_ITEMS, BestState, ValidationSets
from armorm.training.recipe import Recipe
from armorm.training.saved_stages import stage_key
from armorm.training.schema import FinetuneSection
from armorm.training.stages import add_computed

START_RATINGS = 500  # of each objective, and pairs
START_PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)  # times the mean diagonal of the Gram matrix
START_FOLDS = 5
PROBED = 64


def finetune(
    recipe: Recipe, data: TrainingData, work: Path, console: Console, processes: Processes | None = None
) -> Path:
    """Fine-tune the backbone of a recipe, unless it is already done.

    Args:
        work: work folder of the run; the backbone is written to `work/backbone`, checkpoints to `work/finetune`.
        processes: that share the work, each of which calls this; by default this one alone.

    Returns:
        folder of the fine-tuned backbone: weights, tokenizer and the fine-tuning record (record.py).

    Raises:
        MissingExtraError: without accelerate.
        FitError: if the share leaves no rated row to train on.
        BackboneError: for layers that cannot be frozen.
    """
    section = recipe.finetune
    assert section is not None
    processes = processes or Processes()
    if importlib.util.find_spec("accelerate") is None:
        raise MissingExtraError("finetune needs accelerate: pip install 'armorm[finetune]'")
    start = _load(
        recipe,
        dtype=recipe.backbone.dtype if section.method == "lora" else "weights",
        device=processes.device(recipe.backbone.device),
        layer=recipe.backbone.layer,
        pooling=recipe.backbone.pooling,
    )
    rows = _FinetuneData.select(recipe, data, start, console)
    earlier = Finetuned.read(recipe.backbone.model)
    contents = keys_of(rows.encoded), rows.rated, rows.ratings, rows.objectives.to_dicts(), rows.sources, rows.held_out
    pairs = [[pair.sides, pair.source, pair.group, pair.held_out] for pair in rows.pairs]
    settings = section, recipe.seed, start.fingerprint, rows.seen.sketches
    key = stage_key("finetune", *settings, *contents, rows.groups, pairs)
    folder, checkpoints = work / "backbone", work / "finetune" / key
    done = Finetuned.read(folder)
    if done is not None and done.key == key:
        return folder
    processes.wait()  # (The first may remove what the others have just looked for.)
    learner, curves = _train(start, rows, section, recipe.seed, work, checkpoints, console, processes)
    with processes.first():
        if not processes.is_first:
            return folder
        return _written(recipe, start, rows, learner, curves, work, key, earlier)


def _written(
    recipe: Recipe,
    start: Backbone,
    rows: _FinetuneData,
    learner: Learner,
    curves: dict[str, Any],
    work: Path,
    key: str,
    earlier: Finetuned | None,
) -> Path:
    """Write the fine-tuned backbone and its record; returns the folder."""
    section, folder = recipe.finetune, work / "backbone"
    assert section is not None
    facts = {
        "from": recipe.backbone.model,
        "readout": start.readout.settings(),
        "settings": section.model_dump(mode="json", exclude_defaults=True),
        "rated_rows": len(rows.rated),
        "pairs": len(rows.pairs),
        "tokens": sum(len(encoded) for encoded in rows.encoded),
        "ratings": {n: int(c) for n, c in zip(rows.objectives.names, (~np.isnan(rows.ratings)).sum(0), strict=True)},
        "validation": curves.get("best"),
        "before": earlier.facts if earlier else None,
    }
    temporary = work / "finetune" / "backbone"
    shutil.rmtree(temporary, ignore_errors=True)
    _write_tuned(learner, _load(recipe, dtype="weights", device="cpu"), temporary)
    write_json(temporary / "training_curve.json", curves)
    seen = rows.seen + earlier.seen if earlier else rows.seen
    Finetuned(seen, rows.objectives.to_dicts(), learner.rating_weight(), facts, key).write(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)  # atomic: a folder with a record is complete
    shutil.rmtree(work / "finetune")
    return folder


def _load(recipe: Recipe, **options: Any) -> Backbone:
    section = recipe.backbone
    backbone = Backbone.load(
        section.model, revision=section.revision, trust_remote_code=section.trust_remote_code, **options
    )
    backbone.template.reasoning = section.reasoning
    return backbone


@torch.no_grad()
def _write_tuned(learner: Learner, whole: Backbone, folder: Path) -> None:
    """Write the decoder with the trained layers, and the adapters alone.

    Args:
        whole: the decoder before training, with all its layers, in the dtype that it is stored in.
    """
    state = whole.model.state_dict()
    if learner.section.method == "lora":
        adapters = adapters_of(learner.decoder, whole.fingerprint_parts["weights"])
        adapters.merge(state)
        adapters.write(folder)
    else:
        for name, parameter in learner.decoder.named_parameters():
            if parameter.requires_grad:
                state[name].copy_(parameter)
    with files_together(folder) as temporary:
        whole.model.save_pretrained(temporary)
        whole.tokenizer.save_pretrained(temporary)


def is_chosen(group_key: str, share: float) -> bool:
    """Whether a group of prompts is fine-tuned on: by its key, independent of folds and splits."""
    return int(group_key[24:32], 16) / 2**32 < share


def is_held_out(group_key: str, share: float) -> bool:
    """Whether a chosen group of prompts is validated on instead of trained on."""
    return int(group_key[16:24], 16) / 2**32 < share


@dataclass(frozen=True)
class _Pair:
    """A preference pair to fine-tune on."""

    sides: tuple[int, int]  # positions of chosen and rejected in `encoded`
    source: str
    group: str  # key of the group of near-duplicates of the prompt
    held_out: bool  # for validation


@dataclass
class _FinetuneData:
    """The part of the training data that is fine-tuned on."""

    encoded: list[EncodedConversation]  # every conversation once
    rated: np.ndarray  # (n,) positions of the rated rows in `encoded`
    ratings: np.ndarray  # (n, k) mapped, NaN where missing
    groups: list[str]  # (n,) key of the group of near-duplicates of the prompt
    sources: list[str]  # (n,) set of each rated row
    held_out: np.ndarray  # (n,) bool, rows for validation
    objectives: ObjectiveSet  # the k objectives, computed ones last
    pairs: list[_Pair]
    seen: SeenPrompts  # all prompts used

    @classmethod
    def select(cls, recipe: Recipe, data: TrainingData, backbone: Backbone, console: Console) -> _FinetuneData:
        section, table = recipe.finetune, data.table
        assert section is not None
        unknown = sorted(set(section.source_shares) - set(table.sources))
        if unknown:
            known = ", ".join(dict.fromkeys(table.sources))
            raise FitError(f"finetune.source_shares: unknown set {unknown[0]!r}, expected one of {known}")
        held_out = partial(is_held_out, share=section.validation_share)
        shares = [section.source_shares.get(source, section.share) for source in table.sources]
        groups = prompt_groups([*(table.conversations[i] for i in data.train_rows), *(p.chosen for p in data.pairs)])
        rows = [i for i in data.train_rows if is_chosen(groups[table.conversations[i].prompt_key], shares[i])]
        uses_pairs = section.preference_epochs or section.preference_weight
        pairs = [p for p in data.pairs if uses_pairs and is_chosen(groups[p.prompt_key], section.share)]
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
            _Pair((place[p.chosen.key], place[p.rejected.key]), p.source, group, held_out(group))
            for p in pairs
            if {p.chosen.key, p.rejected.key} <= place.keys()
            for group in [groups[p.prompt_key]]
        ]
        same = [p for p in placed if len({encoded[side].prompt_key for side in p.sides}) == 1]
        skipped = len(pairs) - len(same)
        if skipped:
            console.print(f"fine-tuning skips {skipped:,} pairs (rejected, or truncated to different prompts)")
        if uses_pairs and all(p.held_out for p in same):
            raise FitError(
                f"finetune.share {section.share}: no preference pair is left for preference_epochs or preference_weight"
            )
        rated = np.array([place[table.conversations[i].key] for i in rows], np.int64)
        tokens = [encoded[i].response_tokens for i in rated]
        table = add_computed(table.take(rows), data.computed, tokens, np.arange(len(rows)))
        seen = SeenPrompts.of({"fine-tuning": [unique[i] for i in result.kept]}, groups)
        own = [groups[conversation.prompt_key] for conversation in table.conversations]
        held = np.array([held_out(group) for group in own])
        if held.all():
            raise FitError(f"finetune.validation_share {section.validation_share}: no rated row is left to train on")
        ratings = table.objectives.to_reward(table.ratings)
        return cls(encoded, rated, ratings, own, table.sources, held, table.objectives, same, seen)

    def validation(self) -> ValidationSets:
        """The held-out rows and pairs."""
        pairs: dict[str, list[tuple[int, int]]] = {}
        for pair in self.pairs:
            if pair.held_out:
                pairs.setdefault(pair.source, []).append(pair.sides)
        held = np.flatnonzero(self.held_out)
        return ValidationSets.select(self.rated[held], self.ratings[held], [self.sources[i] for i in held], pairs)


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
    start: Backbone,
    rows: _FinetuneData,
    section: FinetuneSection,
    seed: int,
    work: Path,
    checkpoints: Path,
    console: Console,
    processes: Processes,
) -> tuple[Learner, dict[str, Any]]:
    """Train on pairs if requested, then on ratings; returns the trained learner and the loss curves."""
    sets = rows.validation() if section.validation_share else None
    if sets is not None and not len(sets):
        raise FitError(
            f"finetune.validation_share {section.validation_share}: no set has {LEAST_ITEMS} ratings or pairs of "
            "validation prompts"
        )
    model = start.model if section.method == "lora" else start.model.float()
    layers = len(layer_list(model))
    frozen = resolve_frozen(section.frozen_layers, layers, start.readout.layers or layers)
    on_cpu = start.device.type == "cpu"
    autocast = section.method == "full" and (not on_cpu or fast_bfloat16())
    few_shapes = on_cpu and (autocast or model.dtype == torch.bfloat16)
    trees = partial(grow_trees, rows.encoded, most_tokens=section.tree_tokens)
    probe = sorted(trees([(row,) for row in range(len(rows.encoded))]), key=lambda tree: -len(tree.rows))[:2]
    share = len(probe[0].rows) > 1 and reads_trees(model, rows.encoded, probe)
    console.print(f"fine-tuning: each prompt is computed once{'' if share else ' per response'}")
    cache = None
    if frozen and section.cache_states:
        fault = lower_layers_fault(
            model, frozen, model_inputs(tree_tensors(rows.encoded, probe, share=share).inputs, model)
        )
        if fault:
            console.print(f"fine-tuning: frozen layers are computed in every step: {fault}")
        else:
            with processes.first():
                cache = cached_states(
                    start,
                    rows.encoded,
                    frozen,
                    work / "states",
                    share=share,
                    tree_tokens=section.tree_tokens,
                    batch_tokens=section.batch_tokens,
                    few_shapes=few_shapes,
                    autocast=autocast,
                )
    layout = BatchLayout(section.batch_tokens, share, few_shapes, start.header_tokens, cache)
    trained = rows.ratings[~rows.held_out]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the adapters
        weights = rating_weights(trained, section.objective_weights)
        learner = Learner(start, section, weights, frozen, states_given=cache is not None)

    def features(which: np.ndarray, description: str = "") -> tuple[np.ndarray, float]:
        own = np.array_split(which, processes.count)[processes.rank]
        found: tuple[np.ndarray, float] = np.zeros((0, start.response_size), np.float32), 0.0
        if len(own):
            batches = TreeBatches(rows.encoded, trees([(int(row),) for row in own], share=share), layout)
            found = features_of(learner, batches, own, autocast=autocast, description=description)
        parts, rates = zip(*processes.gather(found), strict=True)
        return np.concatenate(parts), sum(rates)

    resumed = any(last_whole_checkpoint(checkpoints / stage) for stage in ("preferences", "ratings"))
    forward_rate = _initialise(learner, rows, features, resumed=resumed)
    by_row = np.full((len(rows.encoded), rows.ratings.shape[1]), np.nan, np.float32)
    by_row[rows.rated[~rows.held_out]] = trained
    pairs = [pair.sides for pair in rows.pairs if not pair.held_out]
    rated: list[tuple[int, ...]] = [(int(row),) for row in rows.rated[~rows.held_out]]
    together = [*rated, *(pairs if section.preference_weight else [])]

    def validate(learner: Learner) -> dict[str, float]:
        assert sets is not None
        found = features(sets.rows)[0]
        weight, direction = learner.rating_weight(), learner.score.weight.detach().cpu().numpy()
        return sets.measure(found @ weight.T, found @ direction[0])

    curves: dict[str, Any] = {"shared_prompts": share, "frozen_layers": frozen, "cached_states": cache is not None}
    stages: list[tuple[str, list[tuple[int, ...]], float, np.ndarray | None, float]] = [
        ("preferences", [*pairs], section.preference_epochs, None, 1.0),
        ("ratings", together, section.epochs, by_row, section.preference_weight),
    ]
    for name, items, epochs, ratings, pair_weight in stages:
        if epochs:
            grown = trees(items, share=share)
            batches = TreeBatches(
                rows.encoded, grown, layout, seed, ratings, pair_weight, multiple=section.accumulation
            )
            tokens = total_steps(batches, section, epochs) * section.accumulation * float(np.mean(batches.tokens))
            rate = forward_rate / TRAINING_PASSES[section.method]
            console.print(
                f"fine-tuning on {name}: {tokens:,.0f} tokens, about {readable_hours(tokens / rate / 3600)} at "
                f"1/{TRAINING_PASSES[section.method]:g} of the {forward_rate:,.0f} tokens/s of a forward pass"
            )
            curves[name] = run_trainer(
                learner,
                batches,
                epochs,
                checkpoints / name,
                seed=seed,
                autocast=autocast,
                forward_rate=forward_rate,
                processes=processes,
                validate=validate if sets is not None and ratings is not None else None,
            )
    if sets is not None:
        best = BestState(checkpoints / "ratings", section.patience)
        best.resume(total_steps(batches, section, section.epochs))
        curves["validation"] = best.history
        curves["best"] = next(entry for entry in best.history if entry["step"] == best.best_step)
        first, last = best.history[0]["mean"], curves["best"]["mean"]
        console.print(
            f"fine-tuning: validation {first:.3f} before, {last:.3f} after step {best.best_step}, which is kept"
        )
    return learner, curves


def _initialise(
    learner: Learner,
    rows: _FinetuneData,
    features: Callable[[np.ndarray, str], tuple[np.ndarray, float]],
    *,
    resumed: bool,
) -> float:
    """Initialise the heads on the original features, by ridge regression and a Bradley-Terry fit, and their rate.

    Rows are taken prompt by prompt until each objective has START_RATINGS ratings, or all of them, and as many pairs.
    Penalties are chosen on other prompts: weights that overfit so few rows predict others worse than the mean does, and
    training would first have to undo them. So the validation before training is that of the frozen backbone.

    Args:
        features: response features (n, d) of conversations (n,), and tokens per second.
        resumed: the weights will be loaded from a checkpoint, so only a few features are computed.

    Returns:
        tokens per second of a forward pass of the trained layers.
    """
    usable = np.flatnonzero(~rows.held_out)
    sampled = usable[:: max(1, len(usable) // PROBED)]
    taken = [] if resumed else _starting_rows(rows, usable)
    trained = sorted((pair for pair in rows.pairs if not pair.held_out), key=lambda pair: pair.group)
    pairs = [] if resumed else trained[:START_RATINGS]
    sides = np.array([pair.sides for pair in pairs], np.int64).reshape(-1, 2)
    wanted = np.unique(np.concatenate([rows.rated[[*sampled, *taken]], sides.ravel()]))
    found, rate = features(wanted, "features for initialisation")

    def of(which: np.ndarray) -> np.ndarray:
        return found[np.searchsorted(wanted, which)].astype(np.float64)

    # A change of r / norm in every weight changes a reward by about r at most.
    norm = float(np.abs(of(rows.rated[sampled])).sum(1).mean())
    weight = np.zeros((rows.ratings.shape[1], found.shape[1]))
    if taken:
        folds = np.array([fold_of(rows.groups[row], START_FOLDS) for row in taken])
        started = of(rows.rated[taken])
        weight = np.stack([_ridge(started, column, folds) for column in rows.ratings[taken].T])
    tested = np.array([fold_of(pair.group, START_FOLDS) == 0 for pair in pairs], bool)
    score = np.zeros(found.shape[1])
    if tested.any() and not tested.all():
        score = fit_bradley_terry(of(sides[:, 0]), of(sides[:, 1]), tested)
    learner.start_from(weight, score, norm)
    return rate


def _starting_rows(rows: _FinetuneData, usable: np.ndarray) -> list[int]:
    """Rated rows for the initialisation."""
    order = sorted(usable.tolist(), key=rows.groups.__getitem__)
    present = ~np.isnan(rows.ratings)
    needed = np.minimum(START_RATINGS, present[usable].sum(0))
    taken: list[int] = []
    for row in order:
        if (present[row] & (needed > 0)).any():
            taken.append(row)
            needed = needed - present[row]
    return taken


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
