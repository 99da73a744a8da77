"""A whole run: from a recipe to a reward model with its figures.

In:  a `Recipe`, an output folder.
Out: in that folder: the model (config.json, model.safetensors, tokenizer), README.md (its card),
     metrics.json, recipe.yaml (with every value), rejected.jsonl (rows refused, with reasons), and
     work/ (features and fitted heads, so that a run that was killed goes on where it was).

Stages: plan -> tokens -> features -> regression -> debiasing -> gate -> evaluation -> model. Data goes one
way. Rewards of rows whose prompt stage 1 was trained on come from weights that never saw that prompt
(out of fold), wherever they train the gate or measure correlation; all others come from the weights
that are served. Each stage is seeded, and its result is kept under a key of all that decides it (head_stages.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from armorm.backbone.decoder import Backbone
from armorm.conversation import Conversation
from armorm.data.measures import OWN_FUNCTION, computed_objective, measure
from armorm.data.preferences import PreferencePair
from armorm.data.ratings import RatingTable
from armorm.files import plain, write_json, write_text
from armorm.heads.debiasing import Debiasing
from armorm.heads.regression import RegressionHead, fold_of
from armorm.heads.uncertainty import Uncertainty
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.model.remote_code import GatingNetwork
from armorm.objectives import ObjectiveSet
from armorm.reward_model import ArmoRM
from armorm.training.dataset import TrainingData, read_training_data
from armorm.training.evaluate import RunFigures
from armorm.training.featurize import Corpus, read_corpus
from armorm.training.finetune.record import Finetuned, without_finetuned
from armorm.training.model_card import model_card
from armorm.training.recipe import Recipe
from armorm.training.stages import HeadStages, RatedRows, rating_levels
from armorm.version import __version__


def train(recipe: Recipe, output_dir: str | Path, *, features: str | Path | None = None, quiet: bool = False) -> ArmoRM:
    """Train a reward model.

    Args:
        output_dir: where everything goes; a run that was stopped there goes on.
        features: feature store to use, by default one inside the output folder; runs on the same backbone may share it.
        quiet: say nothing on standard error but progress.

    Raises:
        RecipeError, DataError: for faults in recipe or data, before any work.
        FitError: for data from which a head cannot be learned.
    """
    console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    start = time.monotonic()
    data = read_training_data(recipe)
    for reason, count in data.left_out.items():
        console.print(f"left out: {count:,} {reason}")
    folder = Path(output_dir)
    run = _Run(recipe, folder, Path(features) if features else folder / "work" / "features", data, console)
    model = run.train()
    console.print(f"done in {time.monotonic() - start:,.0f} s: {output_dir}")
    return model


class _Run:
    """One run; its methods are the stages, in order."""

    def __init__(self, recipe: Recipe, folder: Path, features: Path, data: TrainingData, console: Console) -> None:
        self.recipe, self.folder, self.features, self.data, self.console = recipe, folder, features, data, console
        self.work = folder / "work"
        self.heads = HeadStages(recipe, folder, console)

    def train(self) -> ArmoRM:
        recipe = self.recipe
        write_text(self.folder / "recipe.yaml", recipe.to_yaml())
        section = recipe.backbone
        finetuned = self._finetuned()
        backbone = Backbone.load(
            section.model if recipe.finetune is None else self.work / "backbone",
            dtype=section.dtype,
            device=section.device,
            revision=section.revision if recipe.finetune is None else None,
            trust_remote_code=section.trust_remote_code,
        )
        backbone.name = section.model
        if backbone.template.forgeable:
            self.console.print(
                "warning: this chat template closes turns with ordinary text, so a response can imitate a turn"
            )
        corpus = read_corpus(recipe, self.data, backbone, self.features, self.console)
        table, train_rows, test_rows = self._usable_ratings(corpus)
        table = self._with_computed(table, train_rows, corpus)
        names = table.objectives.names
        pairs = self._usable_pairs(self.data.pairs, corpus)

        key = blake2b(
            f"{recipe.hash} {backbone.fingerprint} {self._data_digest(corpus)}".encode(), digest_size=16
        ).hexdigest()
        folds = np.array(
            [fold_of(conversation.prompt_key, recipe.regression.folds) for conversation in table.conversations]
        )
        rated = RatedRows(
            corpus.store,
            corpus.keys[corpus.indices(table.conversations)[train_rows]],
            table.objectives.to_reward(table.ratings[train_rows]),
            folds[train_rows],
            names,
            rating_levels(table.ratings[train_rows]),
        )
        start = finetuned.start(table.objectives) if finetuned else None
        if start is not None and not start.any():  # it was fine-tuned on other objectives: ordinary sums, to add to
            start = None
        head, uncertainty = self.heads.regression(rated, start, key)
        computed = {objective.name for objective in table.objectives if objective.compute}
        for report in head.reports:
            if report.objective in computed:
                self.console.print(f"computed objective {report.objective}: R2 {report.r2:.2f} on held-out folds")
            if report.warning:
                self.console.print(f"warning: objective {report.objective}: {report.warning}")

        trained_prompts = {table.conversations[i].prompt_key for i in train_rows}

        def served(conversations: Sequence[Conversation]) -> np.ndarray:
            """Rewards (n, k), out of fold where stage 1 was trained on the prompt."""
            fold = [
                fold_of(c.prompt_key, recipe.regression.folds) if c.prompt_key in trained_prompts else -1
                for c in conversations
            ]
            folds, rewards = np.array(fold, np.int64), np.empty((len(conversations), len(names)))
            for places, features in corpus.store.blocks(corpus.keys[corpus.indices(conversations)]):
                rewards[places] = head.predict_out_of_fold(features, folds[places])
            return rewards

        reference = self._reference_conversations(table, train_rows, corpus)
        reference_rewards = served(reference)
        debiasing = self.heads.debiasing(reference, reference_rewards, names)
        extra: dict[str, Any] = {}
        if recipe.joint is not None:
            stage_1 = (head, uncertainty, rated)
            head, uncertainty, extra["joint"] = self.heads.joint(stage_1, pairs, served, debiasing, corpus, key)
            # From here on `served` gives the joint heads' rewards, out of fold for the pairs' prompts as well.
            trained_prompts |= {pair.prompt_key for pair in pairs}
            key = f"{key} joint"
            reference_rewards = served(reference)
            debiasing = self.heads.debiasing(reference, reference_rewards, names)
        network, gate_report = self.heads.gate(pairs, served, debiasing, corpus, key)

        model = assemble_model(
            recipe,
            backbone,
            table.objectives,
            head,
            uncertainty,
            debiasing,
            network,
            corpus.prompts(corpus.indices(reference)),
            reference_rewards,
        )
        if recipe.quantiles is not None:
            extra["quantiles"] = self.heads.quantiles(model, head, rated, key)
        figures = RunFigures(self.data, corpus, self.folder)
        metrics = {
            "recipe": {"name": recipe.name, "hash": recipe.hash},
            "armorm_version": __version__,
            "backbone": {
                "name": backbone.name,
                "dtype": str(backbone.model.dtype).removeprefix("torch."),
                "fingerprint": backbone.fingerprint,
                "finetuned": finetuned.facts if finetuned else None,
            },
            "data": {
                "counts": self.data.counts(),
                "left_out": self.data.left_out,
                "refused": len(corpus.rejected),
                "truncated": corpus.truncated,
                "conversations": len(corpus.encoded),
                "tokens": sum(len(encoded) for encoded in corpus.encoded),
            },
            "regression": [asdict(report) for report in head.reports],
            "uncertainty": figures.uncertainty(uncertainty, head, table, train_rows, test_rows),
            "debiasing": figures.debiasing(debiasing, table, test_rows, head, network),
            "gate": asdict(gate_report),
            **extra,
            "evaluation": figures.evaluation(model, table, test_rows, debiasing),
        }
        self._write(model, metrics, corpus)
        return model

    def _finetuned(self) -> Finetuned | None:
        """Fine-tune the backbone where the recipe asks for it; leave the prompts that it was fine-tuned on out."""
        folder: str | Path = self.recipe.backbone.model
        if self.recipe.finetune is not None:
            from armorm.training.finetune.run import finetune

            folder = finetune(self.recipe, self.data, self.work, self.console)
        finetuned = Finetuned.read(folder)
        if finetuned is not None:
            before = dict(self.data.left_out)
            self.data = without_finetuned(self.data, finetuned)
            for reason, count in self.data.left_out.items():
                if before.get(reason) != count:
                    self.console.print(f"left out: {count:,} {reason}")
        return finetuned

    # --- rows that can be used -------------------------------------------------------------------

    def _usable_ratings(self, corpus: Corpus) -> tuple[RatingTable, np.ndarray, np.ndarray]:
        """The table of rows that were not refused, with the rows to train and to test on."""
        order = np.concatenate([self.data.train_rows, self.data.test_rows])
        usable = corpus.indices([self.data.table.conversations[i] for i in order]) >= 0
        is_train = np.arange(len(order)) < len(self.data.train_rows)
        table = self.data.table.take(order[usable])
        return table, np.flatnonzero(is_train[usable]), np.flatnonzero(~is_train[usable])

    def _usable_pairs(self, pairs: Sequence[PreferencePair], corpus: Corpus) -> list[PreferencePair]:
        return [pair for pair in pairs if pair.chosen.key in corpus.rows and pair.rejected.key in corpus.rows]

    def _with_computed(self, table: RatingTable, train_rows: np.ndarray, corpus: Corpus) -> RatingTable:
        tokens = [corpus.encoded[i].response_tokens for i in corpus.indices(table.conversations)]
        for name, measure_name in self.data.computed:
            if measure_name.startswith(OWN_FUNCTION):
                called = measure_name.removeprefix(OWN_FUNCTION)
                self.console.print(f"computed objective {name}: calls {called}, code that the recipe names")
            raw = measure(measure_name, table.conversations, tokens)
            table = table.with_column(computed_objective(name, measure_name, raw[train_rows]), raw)
        return table

    def _reference_conversations(
        self, table: RatingTable, train_rows: np.ndarray, corpus: Corpus
    ) -> list[Conversation]:
        given = self.data.reference
        conversations = [table.conversations[i] for i in train_rows] if given is None else given
        return [conversation for conversation in conversations if conversation.key in corpus.rows]

    def _data_digest(self, corpus: Corpus) -> str:
        """Digest of every conversation, rating and pair that training reads."""
        digest = blake2b(digest_size=16)
        digest.update(self.data.table.ratings.tobytes())
        for conversation in self.data.table.conversations:
            digest.update(conversation.key.encode())
        for pair in self.data.pairs:
            digest.update(f"{pair.chosen.key} {pair.rejected.key}".encode())
        for conversation in self.data.reference or ():
            digest.update(conversation.key.encode())
        return digest.hexdigest()

    # --- model and figures -----------------------------------------------------------------------

    def _write(self, model: ArmoRM, metrics: dict[str, Any], corpus: Corpus) -> None:
        if corpus.rejected:
            places = {
                c.key: origin for c, origin in zip(self.data.table.conversations, self.data.table.origins, strict=True)
            }
            for pair in (*self.data.pairs, *self.data.test_pairs, *(p for e in self.data.evaluations for p in e.pairs)):
                places.setdefault(pair.chosen.key, pair.origin)
                places.setdefault(pair.rejected.key, pair.origin)
            lines = [
                json.dumps({"file": places.get(key, ("", 0))[0], "row": places.get(key, ("", 0))[1], "reason": reason})
                for key, reason in corpus.rejected.items()
            ]
            write_text(self.folder / "rejected.jsonl", "\n".join(lines) + "\n")
        metrics = plain(metrics)
        _save_whole(model, self.folder)
        write_json(self.folder / "metrics.json", metrics)
        write_text(self.folder / "README.md", model_card(self.recipe, metrics, model.objectives))


def _save_whole(model: ArmoRM, folder: Path) -> None:
    """Save beside the folder, then move every file to its place; config.json, which makes it a model, last."""
    temporary = folder / "work" / "model"
    model.save_pretrained(temporary)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == "config.json"):
        path.replace(folder / path.name)
    temporary.rmdir()


QUANTILES = 101


@torch.no_grad()
def assemble_model(
    recipe: Recipe,
    backbone: Backbone,
    objectives: ObjectiveSet,
    head: RegressionHead,
    uncertainty: Uncertainty | None,
    debiasing: Debiasing,
    network: GatingNetwork,
    reference: tuple[np.ndarray, np.ndarray],
    reference_rewards: np.ndarray,
) -> ArmoRM:
    """A reward model of its parts.

    Args:
        reference: of the n reference conversations, whose scores place those of others: features (m, d) of their
            prompts, and which of them each has (n,).
        reference_rewards: (n, k) rewards as stage 1 gives them, out of fold.
    """
    prompts, prompt_index = reference
    weights = network.weights(torch.from_numpy(prompts)).double().numpy()[prompt_index]
    output = weights * float(network.logit_scale)
    scores = (output * debiasing.apply(reference_rewards)).sum(1)
    names = objectives.names
    tokenizer_pad = backbone.tokenizer.pad_token_id
    config = ArmoRMConfig(
        backbone_config=backbone.model.config,
        objectives=objectives.to_dicts(),
        gating_temperature=recipe.gating.temperature,
        gating_hidden_dim=recipe.gating.hidden_size,
        gating_n_hidden=recipe.gating.hidden_layers,
        regression_bias=recipe.regression.intercept,
        gate_pattern=backbone.template.gate_pattern(),
        limits={"max_length": recipe.backbone.max_length, "overflow": recipe.backbone.overflow},
        pad_token_id=tokenizer_pad,
        reference={
            "rows": len(prompt_index),
            "score_mean": float(scores.mean()),
            "score_std": float(scores.std()),
            "score_quantiles": np.quantile(scores, np.linspace(0, 1, QUANTILES)).tolist(),
            "reward_means": reference_rewards.mean(0).tolist(),
            "gating_weights": weights.mean(0).tolist(),
        },
        debiasing={
            "against": [names[i] for i in debiasing.against],
            "metric": debiasing.metric,
            "level": debiasing.level,
            "penalties": debiasing.penalties[0].tolist()
            if len(debiasing.against) == 1
            else debiasing.penalties.tolist(),
        }
        if debiasing.against
        else {},
        uncertainty=uncertainty.settings() if uncertainty else {},
        provenance={
            "backbone": backbone.name,
            "recipe_name": recipe.name,
            "recipe_hash": recipe.hash,
            "armorm_version": __version__,
        },
    )
    model = ArmoRMForSequenceClassification.assemble(backbone.model, config)
    model.regression_layer.weight.copy_(torch.from_numpy(head.weight))
    if recipe.regression.intercept:
        model.regression_layer.bias.copy_(torch.from_numpy(head.bias))
    for name, tensor in (uncertainty.tensors() if uncertainty else {}).items():
        getattr(model, f"uncertainty_{name}").copy_(torch.from_numpy(tensor))
    model.reward_transform_matrix.copy_(torch.from_numpy(debiasing.matrix))
    model.gating.load_state_dict(network.state_dict())
    return ArmoRM(model, backbone.tokenizer, recipe.name)
