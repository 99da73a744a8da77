"""Training: from a recipe to a reward model with its metrics.

The output folder gets the model (config.json, model.safetensors, tokenizer), README.md (model card), metrics.json,
recipe.yaml (with every value), rejected.jsonl (rejected rows with reasons), and work/ (features and fitted stages, from
which an interrupted run resumes). Every stage is seeded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from armorm.backbone.adapters import Adapters
from armorm.backbone.decoder import Backbone
from armorm.backbone.devices import resolve_device
from armorm.backbone.locate import backbone_source
from armorm.conversation import Conversation
from armorm.data.measures import OWN_FUNCTION
from armorm.data.preferences import PreferencePair
from armorm.data.seen_prompts import SeenPrompts
from armorm.files import plain, write_json, write_text
from armorm.heads.debiasing import Debiasing, fit_debiasing, no_debiasing
from armorm.heads.discount import constant_gate, discount_of
from armorm.heads.gate_training import GateReport
from armorm.heads.rated_record import FILE as RATED_RECORD
from armorm.heads.regression import RegressionHead
from armorm.heads.statistics import RatingStatistics
from armorm.heads.uncertainty import Uncertainty
from armorm.locks import locked
from armorm.model.configuration import ArmoRMConfig
from armorm.model.remote_code import GatingNetwork
from armorm.objectives import Objective, ObjectiveSet
from armorm.progress import Terminal, silence
from armorm.reward_model import ArmoRM
from armorm.training.dataset import TrainingData, enough_for_gate, group_index, read_training_data
from armorm.training.evaluate import debiasing_metrics, evaluation_metrics, uncertainty_metrics
from armorm.training.featurize import (
    Corpus,
    RatedRows,
    build_corpus,
    ray_workers,
    source_of,
    statistics_by_ray,
)
from armorm.training.finetune.processes import Processes
from armorm.training.finetune.record import Finetuned, without_finetuned
from armorm.training.model_card import model_card, weak_sentence
from armorm.training.preference_objectives import with_preference_objectives
from armorm.training.recipe import Recipe
from armorm.training.recipe_draft import too_few_pairs
from armorm.training.relevance import LIKELIHOODS, label_relevance
from armorm.training.row_record import row_record, weights_from_arrays, weights_to_arrays
from armorm.training.saved_stages import Fitted, SavedStages, stage_keys
from armorm.training.stages import (
    STATISTICS,
    OutOfFoldRewards,
    RatedSplit,
    assemble_model,
    fit_stage1,
    heads_from_arrays,
    heads_to_arrays,
    joint_pairs,
    objective_reliability,
    rated_split,
    reference_statistics,
    train_gate,
    train_joint_heads,
    train_quantile_heads,
    with_rater_weights,
)
from armorm.training.tracking import Tracking
from armorm.version import __version__

GATE_SHAPE = {"hidden_size", "hidden_layers", "temperature"}
POOR = 0.2  # reliability below which an objective is named
Heads = tuple[RegressionHead, Uncertainty | None]


def train(
    recipe: Recipe,
    output_dir: str | Path,
    *,
    features: str | Path | None = None,
    strict: bool = False,
    quiet: bool = False,
) -> ArmoRM:
    """Train a reward model.

    Args:
        output_dir: output folder; an interrupted run in it is resumed.
        features: feature store, by default one inside the output folder; runs on the same backbone may share it.
        strict: a row or rating cell that cannot be read is an error; by default it is left out, counted, and listed in
            `rejected.jsonl`.
        quiet: print only progress.

    In several processes (`torchrun`, `accelerate launch`) the first calls this and the others `take_part`.

    Raises:
        RecipeError, DataError: for invalid recipes or data, before any work.
        FitError: for data from which a head cannot be learned.
    """
    processes = Processes.join()
    console = Terminal(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
    start = time.monotonic()
    folder = Path(output_dir)
    store = Path(features) if features else folder / "work" / "features"
    with locked(folder / "work"):
        model = _Run(recipe, folder, store, console, strict, processes).train()
    processes.wait()
    console.print(f"done in {time.monotonic() - start:,.0f} s: {output_dir}")
    return model


def take_part(recipe: Recipe, output_dir: str | Path, *, strict: bool = False) -> None:
    """Fine-tune with the first of several processes, and wait until it has written the model; arguments as of `train`.

    Nothing is printed.
    """
    silence()
    processes, folder = Processes.join(), Path(output_dir)
    _Run(recipe, folder, folder / "work" / "features", Terminal(quiet=True), strict, processes).read_data()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    processes.wait()


class _Run:
    """One training run, a method for each stage."""

    def __init__(
        self, recipe: Recipe, folder: Path, features: Path, console: Terminal, strict: bool, processes: Processes
    ) -> None:
        self.recipe, self.folder, self.features, self.console, self.strict = recipe, folder, features, console, strict
        self.work, self.processes = folder / "work", processes
        self.source = source_of(recipe.backbone, self.work / "backbone" if recipe.finetune else None)

    def train(self) -> ArmoRM:
        recipe = self.recipe
        data, finetuned = self.read_data()
        section, backbone = recipe.backbone, self.load_backbone()
        corpus = build_corpus(
            data.conversations(),
            backbone,
            self.features,
            self.console,
            pairs=data.all_pairs(),
            max_length=section.max_length,
            overflow=section.overflow,
            batch_tokens=section.batch_tokens,
            workers=ray_workers(section, self.source),
        )
        for name, measure in data.computed:
            if measure.startswith(OWN_FUNCTION):
                function = measure.removeprefix(OWN_FUNCTION)
                self.console.print(f"computed objective {name}: calls {function}, a function named in the recipe")
        rated, pairs = rated_split(data, corpus), corpus.usable(data.pairs)
        names = rated.table.objectives.names
        given = data.reference
        reference = rated.reference_conversations if given is None else [c for c in given if c in corpus]
        start = finetuned.start(rated.table.objectives, backbone.readout) if finetuned else None
        if start is not None and not start.any():  # it was fine-tuned on other objectives
            start = None
        self.saved = SavedStages(self.work, stage_keys(recipe, rated, pairs, reference, corpus, start))

        rows = rated.train_rows(corpus, recipe.regression.folds)
        head, uncertainty = self.fit_regression(rated, rows, start)
        prompts = rated.train_prompts
        if recipe.preference_objectives:
            head, uncertainty, fitted_to = self.fit_preference_objectives((head, uncertainty), pairs, corpus)
            rated = replace(rated, table=rated.table.with_unrated(fitted_to))
            names, rows = rated.table.objectives.names, rated.train_rows(corpus, recipe.regression.folds)
            prompts |= {pair.prompt_key for pair in pairs}
        rewards = OutOfFoldRewards(head, prompts, corpus)
        debiasing = self.fit_debiasing(rewards(reference), reference, names)
        extra: dict[str, Any] = {}
        if recipe.joint is not None:
            heads = head, uncertainty
            objectives = self.with_reliability(rated.table.objectives, rewards, uncertainty, reference)
            reliability = objectives.reliability
            head, uncertainty, extra["joint"] = self.fit_joint(rows, heads, rewards, pairs, debiasing, reliability)
            rewards = OutOfFoldRewards(head, rewards.trained_prompts | {pair.prompt_key for pair in pairs}, corpus)
            debiasing = self.fit_debiasing(rewards(reference), reference, names)
        objectives = self.with_reliability(rated.table.objectives, rewards, uncertainty, reference)
        gate_report: GateReport | None = None
        made = all(entry.from_ratings for entry in recipe.preferences)  # so nobody said that these are enough
        if recipe.preferences and (recipe.joint or not made or enough_for_gate(len(pairs))):
            network, gate_report = self.fit_gate("gate", pairs, rewards, debiasing, objectives.reliability)
        else:
            self.console.print(too_few_pairs(len(pairs)), markup=False)
            network = self.constant_gate(corpus, debiasing.without_biases(objectives.reliability))
        gate = network, gate_report.calibration if gate_report else None
        model = self.build_model(backbone, objectives, rewards, uncertainty, debiasing, gate, reference)
        used = {"ratings": rated.train_conversations, "pairs": [pair.chosen for pair in pairs]}
        model.seen = SeenPrompts.of(used, corpus.groups) + (finetuned.seen if finetuned else SeenPrompts())
        if recipe.quantiles is not None:
            extra["quantiles"] = self.fit_quantiles(model, head, rows)

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
                "counts": data.counts(),
                "seen": model.seen.count(),
                "left_out": data.left_out,
                "constructs": [asdict(report) for report in data.constructs],
                "rater_spreads": data.table.rater_spreads,
                "refused": len(corpus.rejected),
                "truncated": corpus.truncated,
                "conversations": len(corpus.rows),
                "tokens": sum(len(corpus.encoded[row]) for row in corpus.rows.values()),
            },
            "regression": [asdict(report) for report in head.reports],
            "uncertainty": uncertainty_metrics(uncertainty, rated, corpus, head),
            "debiasing": debiasing_metrics(debiasing, rated, corpus, head, network),
            "gate": asdict(gate_report) if gate_report else None,
            **extra,
            "evaluation": evaluation_metrics(model, data, rated, corpus, debiasing, self.folder),
        }
        write_rejected(self.folder, corpus, data)
        save_run(model, metrics, self.folder, recipe.name)
        return model

    def read_data(self) -> tuple[TrainingData, Finetuned | None]:
        """Training data; the backbone is fine-tuned on some of it if requested, and those prompts are then excluded."""
        data = read_training_data(self.recipe, strict=self.strict)
        data.rejections.report(self.console)
        self._print_excluded(data.left_out)
        with self.processes.first():
            if self.processes.is_first:
                write_text(self.folder / "recipe.yaml", self.recipe.to_yaml())
            data = label_relevance(self.recipe, data, self.work / LIKELIHOODS)
        folder: str | Path = self.recipe.backbone.model
        if self.recipe.finetune is not None:
            from armorm.training.finetune.run import finetune

            folder = finetune(self.recipe, data, self.work, self.console, self.processes)
        finetuned = Finetuned.read(folder)
        if finetuned is None:
            return data, None
        remaining = without_finetuned(data, finetuned)
        self._print_excluded({reason: n for reason, n in remaining.left_out.items() if data.left_out.get(reason) != n})
        return remaining, finetuned

    def _print_excluded(self, counts: dict[str, int]) -> None:
        for reason, count in counts.items():
            self.console.print(f"excluded: {count:,} {reason}")

    def load_backbone(self) -> Backbone:
        section, backbone = self.recipe.backbone, self.source.load()
        backbone.name, backbone.template.reasoning = section.model, section.reasoning
        if backbone.template.forgeable:
            self.console.print(
                "warning: this chat template closes turns with ordinary text, so a response can imitate a turn"
            )
        return backbone

    def fit_regression(self, rated: RatedSplit, rows: RatedRows, start: np.ndarray | None) -> Heads:
        """Stage 1; its penalty shrinks towards `start`, the weights that a fine-tuned backbone was trained with."""
        section, backbone = self.recipe.regression, self.recipe.backbone

        def sums(rows: RatedRows) -> RatingStatistics:
            if backbone.engine == "ray" and start is None:
                return statistics_by_ray(rows, section.folds, backbone.workers)
            return rows.statistics(section.folds, start)

        def fit() -> Fitted:
            statistics = sums(rows)
            weighted = with_rater_weights(rated, rows, section, statistics) if start is None else rows
            if weighted.weights:
                statistics = sums(weighted)
            (self.work / STATISTICS).unlink(missing_ok=True)
            if section.keep_statistics and start is None:  # ratings can be added later, but not to residuals
                statistics.save(self.work / STATISTICS)
            arrays, report = heads_to_arrays(*fit_stage1(section, statistics, weighted, start))
            return arrays | weights_to_arrays(weighted), report

        arrays, values = self.saved.get("regression", fit)
        head, uncertainty = heads_from_arrays(arrays, values)
        record = row_record(rated, weights_from_arrays(rows, arrays), head.reports, section, start, self.work)
        record.save(self.work / RATED_RECORD, self.saved.keys["regression"])
        for objective, report in zip(rated.table.objectives, head.reports, strict=True):
            if report.rater_weights:
                weights = "{:.2f} to {:.2f}".format(*report.rater_weights)
                self.console.print(f"objective {report.objective}: rows weighted by their raters' spread, {weights}")
            if objective.compute:
                self.console.print(f"computed objective {objective.name}: R2 {report.r2:.2f} on held-out folds")
            if report.warning:
                self.console.print(f"warning: objective {objective.name}: {report.warning}")
        return head, uncertainty

    def fit_preference_objectives(
        self, heads: Heads, pairs: list[PreferencePair], corpus: Corpus
    ) -> tuple[RegressionHead, Uncertainty | None, list[Objective]]:
        """The heads with a column for each objective that is fitted to pairs, and these objectives."""
        entries, gating = self.recipe.preference_objectives, self.recipe.gating

        def fit() -> Fitted:
            head, uncertainty, objectives = with_preference_objectives(*heads, entries, pairs, corpus, gating)
            arrays, values = heads_to_arrays(head, uncertainty)
            return arrays, {**values, "fitted_to_pairs": ObjectiveSet(objectives).to_dicts()}

        arrays, values = self.saved.get("preferences", fit)
        head, uncertainty = heads_from_arrays(arrays, values)
        objectives = list(ObjectiveSet.from_dicts(values["fitted_to_pairs"]))
        for report in head.reports[-len(objectives) :]:
            loss = f"{min(report.validation_errors):.4f} nats on held-out folds ({np.log(2):.4f} is chance)"
            self.console.print(f"objective {report.objective}, fitted to {report.ratings:,} pairs: loss {loss}")
        return head, uncertainty, objectives

    def fit_debiasing(self, rewards: np.ndarray, reference: Sequence[Conversation], names: list[str]) -> Debiasing:
        """The transform fitted on the reference's rewards (n, k), rounded to float32 as it is served."""
        section = self.recipe.debias
        debiasing = no_debiasing(len(names))
        if section is not None:
            debiasing = fit_debiasing(
                rewards,
                [names.index(name) for name in section.against],
                metric=section.metric,
                level=section.level,
                groups=group_index([conversation.prompt_key for conversation in reference]),
                method=section.method,
                keep={names.index(n): [names.index(bias) for bias in biases] for n, biases in section.keep.items()},
            )
            for warning in debiasing.warnings(names):
                self.console.print(f"warning: {warning}")
        if self.recipe.gating.scale_rewards:
            debiasing = debiasing.scaled(rewards)
        return replace(debiasing, matrix=debiasing.matrix.astype(np.float32).astype(np.float64))

    def with_reliability(
        self,
        objectives: ObjectiveSet,
        rewards: OutOfFoldRewards,
        uncertainty: Uncertainty | None,
        reference: Sequence[Conversation],
    ) -> ObjectiveSet:
        """The objectives with the reliability of their rewards, which the gate discounts them by."""
        fitted_to_pairs = {o.name: o.scale for o in objectives if o.name in self.recipe.preference_objectives}
        found = objectives.with_reliability(
            objective_reliability(rewards, uncertainty, reference, objectives.names, fitted_to_pairs)
        )
        poor = [f"{o.name} {o.reliability.value:.2f}" for o in found if o.reliability and o.reliability.value < POOR]
        if poor:
            self.console.print(f"reliability below {POOR:g}: {', '.join(poor)}")
        return found

    def fit_gate(
        self,
        stage: str,
        pairs: list[PreferencePair],
        rewards: OutOfFoldRewards,
        debiasing: Debiasing,
        reliability: np.ndarray,
    ) -> tuple[GatingNetwork, GateReport]:
        """Stage 2, saved as `stage`."""
        recipe, section = self.recipe, self.recipe.gating

        def fit() -> Fitted:
            device = resolve_device(recipe.backbone.device)
            with Tracking(self.folder, recipe.report_to, recipe.name, recipe.stored()) as tracking:
                options: dict[str, Any] = {"reliability": reliability, "seed": recipe.seed, "device": device}
                gate, report = train_gate(pairs, rewards, debiasing, section, tracking, **options)
            return {name: tensor.numpy() for name, tensor in gate.state_dict().items()}, asdict(report)

        arrays, values = self.saved.get(stage, fit)
        shape = section.model_dump(include=GATE_SHAPE)
        network = GatingNetwork(rewards.corpus.prompt.shape[1], len(debiasing.matrix), **shape)
        network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
        report = GateReport(**values)
        if report.weak:
            self.console.print(weak_sentence(report.weak))
        if report.collapse:
            self.console.print(f"warning: the gate has collapsed: {report.collapse}; its weights ignore the prompt")
        return network.eval(), report

    def constant_gate(self, corpus: Corpus, reliability: np.ndarray) -> GatingNetwork:
        """The gate without (enough) pairs, for objectives of a reliability (k,), NaN for biases."""
        section = self.recipe.gating
        power = section.reliability[0] if len(section.reliability) == 1 else 1.0
        weights = discount_of(reliability, power)
        return constant_gate(corpus.prompt.shape[1], weights, **section.model_dump(include=GATE_SHAPE))

    def fit_joint(
        self,
        rows: RatedRows,
        heads: Heads,
        rewards: OutOfFoldRewards,
        pairs: list[PreferencePair],
        debiasing: Debiasing,
        reliability: np.ndarray,
    ) -> tuple[RegressionHead, Uncertainty | None, Any]:
        """Heads trained on ratings and pairs together, with the coefficients that a first gate gives the pairs."""
        joint, regression = self.recipe.joint, self.recipe.regression
        assert joint is not None

        def fit() -> Fitted:
            network, _ = self.fit_gate("first_gate", pairs, rewards, debiasing, reliability)
            differences = joint_pairs(pairs, network, debiasing, rewards.corpus, regression.folds, self.recipe.gating)
            head, uncertainty, report = train_joint_heads(*heads, rows, differences, joint, regression)
            arrays, values = heads_to_arrays(head, uncertainty)
            return arrays, {**values, "joint": asdict(report)}

        arrays, values = self.saved.get("joint", fit)
        return *heads_from_arrays(arrays, values), values["joint"]

    def build_model(
        self,
        backbone: Backbone,
        objectives: ObjectiveSet,
        rewards: OutOfFoldRewards,
        uncertainty: Uncertainty | None,
        debiasing: Debiasing,
        gate: tuple[GatingNetwork, dict[str, Any] | None],
        reference: Sequence[Conversation],
    ) -> ArmoRM:
        """The model; `gate` is the network and the calibration of its scale."""
        recipe, (network, calibration) = self.recipe, gate
        penalties = debiasing.penalties[0] if len(debiasing.against) == 1 else debiasing.penalties
        config = ArmoRMConfig(
            backbone_config=backbone.model.config,
            objectives=objectives.to_dicts(),
            gating_temperature=recipe.gating.temperature,
            gating_hidden_dim=recipe.gating.hidden_size,
            gating_n_hidden=recipe.gating.hidden_layers,
            regression_bias=bool(recipe.regression.intercept or rewards.head.bias.any()),
            gate_pattern=backbone.template.gate_pattern(),
            limits=recipe.backbone.model_dump(include={"max_length", "overflow", "reasoning"}),
            pad_token_id=backbone.tokenizer.pad_token_id,
            reference=reference_statistics(network, debiasing, rewards.corpus, reference, rewards(reference)),
            debiasing={
                "against": [objectives.names[i] for i in debiasing.against],
                "metric": debiasing.metric,
                "level": debiasing.level,
                "penalties": penalties.tolist(),
            }
            if debiasing.against
            else {},
            uncertainty=uncertainty.settings() if uncertainty else {},
            calibration=calibration,
            readout=backbone.readout.settings(),
            backbone_source=backbone.source,
            provenance={
                "backbone": backbone.name,
                "recipe_name": recipe.name,
                "recipe_hash": recipe.hash,
                "armorm_version": __version__,
            },
        )
        adapters = None
        if recipe.finetune is not None and recipe.finetune.method == "lora":
            adapters = Adapters.read(self.work / "backbone")
            config.adapters = adapters.settings()
            config.backbone_source = backbone_source(recipe.backbone.model, revision=recipe.backbone.revision)
        model = assemble_model(
            backbone.model, backbone.tokenizer, config, recipe.name, rewards.head, uncertainty, debiasing, network
        )
        model.model.adapters = adapters
        return model

    def fit_quantiles(self, model: ArmoRM, head: RegressionHead, rows: RatedRows) -> Any:
        """Fit quantile heads and add them to the model; they do not change the score."""
        section = self.recipe.quantiles
        assert section is not None
        arrays, report = self.saved.get("quantiles", partial(train_quantile_heads, head, rows, section))
        model.model.add_quantiles(report["objectives"], report["levels"], arrays["weight"], arrays["bias"])
        return report


def write_rejected(folder: Path, corpus: Corpus, data: TrainingData) -> None:
    """Write file, row and reason of each rejected conversation, and of each row and cell that could not be read, to
    rejected.jsonl, if any."""
    origins = {side.key: pair.origin for pair in reversed([*data.all_pairs()]) for side in (pair.chosen, pair.rejected)}
    origins |= {c.key: origin for c, origin in zip(data.table.conversations, data.table.origins, strict=True)}
    found = [(error.file, error.row or 0, error.reason) for error in data.rejections.errors]
    found += [(*origins.get(key, ("", 0)), reason) for key, reason in corpus.rejected.items()]
    lines = (json.dumps({"file": file, "row": row, "reason": reason}) + "\n" for file, row, reason in found)
    if found:
        write_text(folder / "rejected.jsonl", "".join(lines))


def save_run(model: ArmoRM, metrics: dict[str, Any], folder: Path, name: str) -> None:
    """Write the model, metrics.json and the model card."""
    metrics = plain(metrics)
    model.save_pretrained(folder)
    write_json(folder / "metrics.json", metrics)
    write_text(folder / "README.md", model_card(name, metrics, model.objectives, model.reference))
