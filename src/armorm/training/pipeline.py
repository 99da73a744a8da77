"""A whole run: from a recipe to a reward model with its figures.

In:  a `Recipe`, an output folder.
Out: in that folder: the model (config.json, model.safetensors, tokenizer), README.md (its card),
     metrics.json, recipe.yaml (with every value), rejected.jsonl (rows refused, with reasons), and
     work/ (features and fitted heads, so that a run that was killed goes on where it was).

Stages: plan -> tokens -> features -> regression -> debiasing -> gate -> evaluation -> model. Data goes one
way. Rewards of rows whose prompt stage 1 was trained on come from weights that never saw that prompt
(out of fold), wherever they train the gate or measure correlation; all others come from the weights
that are served. Each stage is seeded, and its result is kept under a key of all that decides it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import armorm
from armorm.backbone.decoder import Backbone, resolve_device
from armorm.backbone.overflow import encode_rows
from armorm.backbone.template import EncodedConversation
from armorm.conversation import Conversation
from armorm.data.computed import OWN_FUNCTION, computed_objective, measure
from armorm.data.preferences import PreferencePair
from armorm.data.ratings import RatingTable
from armorm.evaluation.metrics import pair_figures, rating_figures
from armorm.evaluation.runner import evaluate
from armorm.features.extract import Features, extract
from armorm.features.store import FeatureStore
from armorm.features.work import Runner
from armorm.files import plain, read_arrays, write_arrays, write_json, write_text
from armorm.heads.accumulation import RatedBlock, blocks_of
from armorm.heads.debias import Debiasing, fit_debiasing, no_debiasing
from armorm.heads.gating import GateReport, GateSettings, GatingNetwork, RewardPairs, fit_gate
from armorm.heads.joint import JointPairs
from armorm.heads.regression import RegressionHead, fold_of
from armorm.heads.uncertainty import Uncertainty
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.progress import progress
from armorm.reward_model import ArmoRM
from armorm.training.beyond import joint_stage, pair_coefficients, quantile_stage
from armorm.training.card import model_card
from armorm.training.finetuned import Finetuned, residuals, with_start, without_finetuned
from armorm.training.plan import TrainingData, plan
from armorm.training.recipe import Recipe
from armorm.training.stability import MIN_ROWS, debiasing_figures, prompt_kind, quantity_behind, stability_figures
from armorm.training.stage1 import STATISTICS, fit_stage1, from_kept, rating_levels, to_kept
from armorm.training.tracking import Tracking
from armorm.training.uncertainty_figures import uncertainty_figures

HELD_OUT_PAIRS = 0.1
QUANTILES = 101


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
    data = plan(recipe)
    for reason, count in data.left_out.items():
        console.print(f"left out: {count:,} {reason}")
    folder = Path(output_dir)
    run = _Run(recipe, folder, Path(features) if features else folder / "work" / "features", data, console)
    model = run.train()
    console.print(f"done in {time.monotonic() - start:,.0f} s: {output_dir}")
    return model


@dataclass
class _Corpus:
    """All conversations of a run, each once, with encodings and features.

    Attributes:
        rows: row of each conversation by its content key; absent where it was refused.
        encoded: encodings by row.
        features: features by row.
        rejected: reason of each refused conversation by its content key.
        truncated: conversations that lost prompt tokens.
    """

    rows: dict[str, int]
    encoded: list[EncodedConversation]
    features: Features
    rejected: dict[str, str]
    truncated: int

    def indices(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Row of each conversation, -1 where it was refused."""
        return np.array([self.rows.get(conversation.key, -1) for conversation in conversations], np.int64)


class _Run:
    """One run; its methods are the stages, in order."""

    def __init__(self, recipe: Recipe, folder: Path, features: Path, data: TrainingData, console: Console) -> None:
        self.recipe, self.folder, self.features, self.data, self.console = recipe, folder, features, data, console
        self.work = folder / "work"

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
        corpus = self._corpus(backbone)
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
        rated = corpus.features.response[corpus.indices(table.conversations)]
        start = finetuned.start(table.objectives) if finetuned else None
        head, uncertainty = self._regression(rated, table, train_rows, folds, key, start)
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
            return head.predict_out_of_fold(
                corpus.features.response[corpus.indices(conversations)], np.array(fold, np.int64)
            )

        reference = self._reference_conversations(table, train_rows, corpus)
        reference_rewards = served(reference)
        debiasing = self._debiasing(reference, reference_rewards, names)
        extra: dict[str, Any] = {}
        if recipe.joint is not None:
            stage_1 = (head, uncertainty, rated[train_rows], table.take(train_rows), folds[train_rows])
            head, uncertainty, extra["joint"] = self._joint(stage_1, pairs, served, debiasing, corpus, key)
            # From here on `served` gives the joint heads' rewards, out of fold for the pairs' prompts as well.
            trained_prompts |= {pair.prompt_key for pair in pairs}
            key = f"{key} joint"
            reference_rewards = served(reference)
            debiasing = self._debiasing(reference, reference_rewards, names)
        network, gate_report = self._gate(pairs, served, debiasing, corpus, key)

        model = self._assemble(
            backbone, table, head, uncertainty, debiasing, network, reference, reference_rewards, corpus
        )
        if recipe.quantiles is not None:
            extra["quantiles"] = self._quantiles(
                model, head, rated[train_rows], table.take(train_rows), folds[train_rows], key
            )
        metrics = {
            "recipe": {"name": recipe.name, "hash": recipe.hash},
            "armorm_version": armorm.__version__,
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
            "uncertainty": self._uncertainty_figures(uncertainty, head, table, train_rows, test_rows, corpus),
            "debiasing": self._debiasing_figures(debiasing, table, test_rows, corpus, head, network),
            "gate": asdict(gate_report),
            **extra,
            "evaluation": self._evaluation(model, table, test_rows, corpus, debiasing),
        }
        self._write(model, metrics, corpus)
        return model

    def _finetuned(self) -> Finetuned | None:
        """Fine-tune the backbone where the recipe asks for it; leave the prompts that it was fine-tuned on out."""
        folder: str | Path = self.recipe.backbone.model
        if self.recipe.finetune is not None:
            from armorm.training.finetune import finetune

            folder = finetune(self.recipe, self.data, self.work, self.console)
        finetuned = Finetuned.read(folder)
        if finetuned is not None:
            before = dict(self.data.left_out)
            self.data = without_finetuned(self.data, finetuned)
            for reason, count in self.data.left_out.items():
                if before.get(reason) != count:
                    self.console.print(f"left out: {count:,} {reason}")
        return finetuned

    # --- tokens and features ---------------------------------------------------------------------

    def _corpus(self, backbone: Backbone) -> _Corpus:
        """Encode every conversation of the run once, and compute its features."""
        data = self.data
        rated = [data.table.conversations[i] for i in (*data.train_rows, *data.test_rows)]
        sides = [
            side
            for pairs in (data.pairs, data.test_pairs, *(evaluation.pairs for evaluation in data.evaluations))
            for pair in pairs
            for side in (pair.chosen, pair.rejected)
        ]
        unique = list({c.key: c for c in (*rated, *sides, *(data.reference or ()))}.values())
        section = self.recipe.backbone
        with progress("tokens", len(unique), "conversations") as advance:
            result = encode_rows(backbone.template, unique, section.max_length, section.overflow, advance)
        kept = [i for i, row in enumerate(result.rows) if row is not None]
        encoded = [row for row in result.rows if row is not None]
        store = FeatureStore.of(self.features, backbone)
        features = extract(backbone, encoded, store, batch_tokens=section.batch_tokens, runner=self._runner(backbone))
        rows = {unique[i].key: row for row, i in enumerate(kept)}
        rejected = {unique[i].key: reason for i, reason in result.rejected}
        if rejected:
            self.console.print(f"refused: {len(rejected):,} of {len(unique):,} conversations, listed in rejected.jsonl")
        if result.truncated:
            self.console.print(f"truncated: the prompts of {len(result.truncated):,} of {len(unique):,} conversations")
        return _Corpus(rows, encoded, features, rejected, len(result.truncated))

    def _runner(self, backbone: Backbone) -> Runner | None:
        """Who extracts features, where that is not this process."""
        section = self.recipe.backbone
        if section.engine == "local":
            return None
        from armorm.features.ray import BackboneSource, RayWorkers

        # (Workers load what this process did: after fine-tuning that is another backbone than the recipe's.)
        source = BackboneSource(
            backbone.name, section.dtype, section.device, section.revision, section.trust_remote_code
        )
        return RayWorkers(source, section.workers, section.gpus_per_worker)

    def _usable_ratings(self, corpus: _Corpus) -> tuple[RatingTable, np.ndarray, np.ndarray]:
        """The table of rows that were not refused, with the rows to train and to test on."""
        order = np.concatenate([self.data.train_rows, self.data.test_rows])
        usable = corpus.indices([self.data.table.conversations[i] for i in order]) >= 0
        is_train = np.arange(len(order)) < len(self.data.train_rows)
        table = self.data.table.take(order[usable])
        return table, np.flatnonzero(is_train[usable]), np.flatnonzero(~is_train[usable])

    def _usable_pairs(self, pairs: Sequence[PreferencePair], corpus: _Corpus) -> list[PreferencePair]:
        return [pair for pair in pairs if pair.chosen.key in corpus.rows and pair.rejected.key in corpus.rows]

    def _with_computed(self, table: RatingTable, train_rows: np.ndarray, corpus: _Corpus) -> RatingTable:
        tokens = [corpus.encoded[i].response_tokens for i in corpus.indices(table.conversations)]
        for name, measure_name in self.data.computed:
            if measure_name.startswith(OWN_FUNCTION):
                called = measure_name.removeprefix(OWN_FUNCTION)
                self.console.print(f"computed objective {name}: calls {called}, code that the recipe names")
            raw = measure(measure_name, table.conversations, tokens)
            table = table.with_column(computed_objective(name, measure_name, raw[train_rows]), raw)
        return table

    def _reference_conversations(
        self, table: RatingTable, train_rows: np.ndarray, corpus: _Corpus
    ) -> list[Conversation]:
        given = self.data.reference
        conversations = [table.conversations[i] for i in train_rows] if given is None else given
        return [conversation for conversation in conversations if conversation.key in corpus.rows]

    def _data_digest(self, corpus: _Corpus) -> str:
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

    # --- heads -----------------------------------------------------------------------------------

    def _regression(
        self,
        features: np.ndarray,
        table: RatingTable,
        rows: np.ndarray,
        folds: np.ndarray,
        key: str,
        start: np.ndarray | None,
    ) -> tuple[RegressionHead, Uncertainty | None]:
        """Stage 1 on the training rows of the table, features (n, d) and folds (n,) of all of it; the penalty draws
        towards the weights `start` (k, d), where a fine-tuned backbone brought some."""
        names, mapped = table.objectives.names, table.objectives.to_reward(table.ratings)
        section = self.recipe.regression
        ratings = mapped[rows] if start is None else residuals(start, features[rows], mapped[rows])
        if start is not None:  # what is summed then are residuals, of no use to anyone who adds ratings later
            section = section.model_copy(update={"keep_statistics": False})

        def blocks() -> Iterator[RatedBlock]:
            return blocks_of(features[rows], ratings, folds[rows])

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            levels, file = rating_levels(table.ratings[rows]), self.work / STATISTICS
            head, uncertainty = fit_stage1(section, blocks, names, features.shape[1], levels, file)
            return to_kept(head if start is None else with_start(head, start, mapped[rows]), uncertainty)

        return from_kept(*_kept(self.work / "regression.safetensors", key, compute))

    def _debiasing(self, reference: Sequence[Conversation], rewards: np.ndarray, names: list[str]) -> Debiasing:
        section = self.recipe.debias
        if section is None:
            return self._rounded(no_debiasing(len(names)), rewards)
        prompts = _group_index([conversation.prompt_key for conversation in reference])
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

    def _gate(
        self,
        pairs: list[PreferencePair],
        served: Callable[[Sequence[Conversation]], np.ndarray],
        debiasing: Debiasing,
        corpus: _Corpus,
        key: str,
    ) -> tuple[GatingNetwork, GateReport]:
        section = self.recipe.gating
        own = section.model_dump(exclude={"source_weights", "scale_rewards"})
        settings = GateSettings(**own, seed=self.recipe.seed)
        chosen, rejected = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
        prompt_rows = corpus.features.prompt_index
        d = corpus.features.prompt.shape[1]

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
                network, report = fit_gate(corpus.features.prompt, reward_pairs, settings, device=device, log=log)
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

    def _joint(
        self,
        stage_1: tuple[RegressionHead, Uncertainty | None, np.ndarray, RatingTable, np.ndarray],
        pairs: list[PreferencePair],
        served: Callable[[Sequence[Conversation]], np.ndarray],
        debiasing: Debiasing,
        corpus: _Corpus,
        key: str,
    ) -> tuple[RegressionHead, Uncertainty | None, Any]:
        """Heads trained on ratings and pairs together, from the coefficients that a first gate gives the pairs.

        Args:
            stage_1: head and uncertainty, and the training rows: features (n, d), table, folds (n,).
        """
        recipe = self.recipe
        assert recipe.joint is not None
        section = recipe.joint
        head, uncertainty, rated, table, folds = stage_1

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            network, _ = self._gate(pairs, served, debiasing, corpus, key)
            chosen, rejected = (corpus.indices([getattr(p, side) for p in pairs]) for side in ("chosen", "rejected"))
            features = corpus.features
            joint_pairs = JointPairs(
                features.response[chosen] - features.response[rejected],
                pair_coefficients(network, debiasing, features.prompt[features.prompt_index[chosen]]),
                np.array([fold_of(pair.prompt_key, recipe.regression.folds) for pair in pairs]),
            )
            mapped, levels = table.objectives.to_reward(table.ratings), rating_levels(table.ratings)
            return joint_stage(head, uncertainty, rated, mapped, folds, levels, joint_pairs, section, recipe.regression)

        arrays, report = _kept(self.work / "joint.safetensors", key, compute)
        return *from_kept(arrays, report), report["joint"]

    @torch.no_grad()
    def _quantiles(
        self,
        model: ArmoRM,
        head: RegressionHead,
        features: np.ndarray,
        table: RatingTable,
        folds: np.ndarray,
        key: str,
    ) -> Any:
        """Fit quantile heads and put them into the model, beside the score."""
        section = self.recipe.quantiles
        assert section is not None

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            rewards, mapped = head.predict_out_of_fold(features, folds), table.objectives.to_reward(table.ratings)
            return quantile_stage(features, mapped, rewards, folds, table.objectives.names, section)

        arrays, report = _kept(self.work / "quantiles.safetensors", key, compute)
        model.model.add_quantiles(report["objectives"], report["levels"], arrays["weight"], arrays["bias"])
        return report

    # --- model and figures -----------------------------------------------------------------------

    @torch.no_grad()
    def _assemble(
        self,
        backbone: Backbone,
        table: RatingTable,
        head: RegressionHead,
        uncertainty: Uncertainty | None,
        debiasing: Debiasing,
        network: GatingNetwork,
        reference: Sequence[Conversation],
        reference_rewards: np.ndarray,
        corpus: _Corpus,
    ) -> ArmoRM:
        recipe = self.recipe
        features = corpus.features.take(corpus.indices(reference))
        weights = network.weights(torch.from_numpy(features.prompt)).double().numpy()[features.prompt_index]
        output = weights * float(network.logit_scale)
        scores = (output * debiasing.apply(reference_rewards)).sum(1)
        names = table.objectives.names
        tokenizer_pad = backbone.tokenizer.pad_token_id
        config = ArmoRMConfig(
            backbone_config=backbone.model.config,
            objectives=table.objectives.to_dicts(),
            gating_temperature=recipe.gating.temperature,
            gating_hidden_dim=recipe.gating.hidden_size,
            gating_n_hidden=recipe.gating.hidden_layers,
            regression_bias=recipe.regression.intercept,
            gate_pattern=backbone.template.gate_pattern(),
            limits={"max_length": recipe.backbone.max_length, "overflow": recipe.backbone.overflow},
            pad_token_id=tokenizer_pad,
            reference={
                "rows": len(reference),
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
                "armorm_version": armorm.__version__,
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

    def _debiasing_figures(
        self,
        debiasing: Debiasing,
        table: RatingTable,
        test_rows: np.ndarray,
        corpus: _Corpus,
        head: RegressionHead,
        network: GatingNetwork,
    ) -> dict[str, Any] | None:
        """Correlation with the biases before and after, on reference data and on held-out rated rows."""
        if not debiasing.against:
            return None
        figures = debiasing_figures(debiasing, table.objectives.names)
        if len(test_rows) >= MIN_ROWS:
            conversations = [table.conversations[i] for i in test_rows]
            rows = corpus.indices(conversations)
            tokens = [corpus.encoded[i].response_tokens for i in rows]
            features = corpus.features.take(rows)
            with torch.no_grad():
                output = network(torch.from_numpy(features.prompt)).double().numpy()[features.prompt_index]
            figures["stability"] = stability_figures(
                debiasing,
                head.predict(features.response),
                output,
                [quantity_behind(table.objectives[i], conversations, tokens) for i in debiasing.against],
                table.objectives.names,
                _group_index([conversation.prompt_key for conversation in conversations]),
                [table.sources[i] for i in test_rows],
                [prompt_kind(conversation) for conversation in conversations],
            )
        return figures

    def _uncertainty_figures(
        self,
        uncertainty: Uncertainty | None,
        head: RegressionHead,
        table: RatingTable,
        train_rows: np.ndarray,
        test_rows: np.ndarray,
        corpus: _Corpus,
    ) -> dict[str, Any] | None:
        if uncertainty is None:
            return None
        features = corpus.features.response[corpus.indices([table.conversations[i] for i in test_rows])]
        return uncertainty_figures(
            uncertainty,
            head.predict(features),
            features,
            table.ratings[test_rows],
            rating_levels(table.ratings[train_rows]),
            table.objectives,
            [table.sources[i] for i in test_rows],
        )

    def _evaluation(
        self, model: ArmoRM, table: RatingTable, test_rows: np.ndarray, corpus: _Corpus, debiasing: Debiasing
    ) -> dict[str, Any]:
        names = table.objectives.names
        figures: dict[str, Any] = {}
        if self.data.evaluate_ratings and len(test_rows):
            conversations = [table.conversations[i] for i in test_rows]
            batch = model.score_features(corpus.features.take(corpus.indices(conversations)))
            prompts = _group_index([conversation.prompt_key for conversation in conversations])
            figures["ratings"] = rating_figures(batch.rewards, table.ratings[test_rows], table.objectives, prompts)
        sets = [(evaluation.name, evaluation.pairs) for evaluation in self.data.evaluations]
        sources = dict.fromkeys(pair.source for pair in self.data.test_pairs)
        sets += [(f"{source} (test)", [p for p in self.data.test_pairs if p.source == source]) for source in sources]
        for name, pairs in sets:
            figures.setdefault("pairs", {})[name] = self._pair_figures(model, pairs, corpus, debiasing, names)
        for name, benchmark, places in self.data.benchmarks:
            results = evaluate(benchmark, model, places, output=self.folder / "benchmarks" / f"{name}.json", quiet=True)
            figures.setdefault("benchmarks", {})[name] = {
                "counts": dict(results.counts),
                "figures": [asdict(figure) for figure in results.figures],
            }
        return figures

    def _pair_figures(
        self, model: ArmoRM, pairs: Sequence[PreferencePair], corpus: _Corpus, debiasing: Debiasing, names: list[str]
    ) -> dict[str, Any]:
        sides = [corpus.indices([pair.chosen for pair in pairs]), corpus.indices([pair.rejected for pair in pairs])]
        scored = (sides[0] >= 0) & (sides[1] >= 0)
        margins = np.full(len(pairs), np.nan)
        reward_margins = np.full((len(pairs), len(names)), np.nan)
        lengths = np.zeros(len(pairs))
        if scored.any():
            chosen, rejected = (model.score_features(corpus.features.take(side[scored])) for side in sides)
            margins[scored] = chosen.scores.astype(np.float64) - rejected.scores
            reward_margins[scored] = debiasing.apply(chosen.rewards.astype(np.float64) - rejected.rewards)
            tokens = [np.array([corpus.encoded[i].response_tokens for i in side[scored]]) for side in sides]
            lengths[scored] = tokens[0] - tokens[1]
        return pair_figures(
            margins,
            reward_margins,
            lengths,
            [pair.subset for pair in pairs],
            [pair.prompt_key for pair in pairs],
            names,
        )

    def _write(self, model: ArmoRM, metrics: dict[str, Any], corpus: _Corpus) -> None:
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


def relative_margins(pairs: Sequence[PreferencePair]) -> np.ndarray:
    """Margin (p,) of each pair over the mean margin of its source, 0 where it has none: sources have scales of their
    own. A negative margin (the data says that rejected is better) counts as 0."""
    margins = np.array([max(pair.margin or 0.0, 0.0) for pair in pairs])
    for source in {pair.source for pair in pairs}:
        rows = np.array([pair.source == source for pair in pairs]) & (margins > 0)
        if rows.any():
            margins[rows] /= margins[rows].mean()
    return margins


def held_out_prompts(prompt_keys: Sequence[str], share: float) -> np.ndarray:
    """Mask of the pairs of some prompts, at least `share` of all pairs; the prompts' content decides which."""
    counts: dict[str, int] = {}
    for key in prompt_keys:
        counts[key] = counts.get(key, 0) + 1
    held: set[str] = set()
    taken = 0
    for key in sorted(counts, key=lambda key: key[8:]):
        if taken >= share * len(prompt_keys):
            break
        held.add(key)
        taken += counts[key]
    return np.array([key in held for key in prompt_keys], bool)


def _group_index(keys: Sequence[str]) -> np.ndarray:
    """Number of each key, in order of appearance."""
    rows: dict[str, int] = {}
    return np.array([rows.setdefault(key, len(rows)) for key in keys], np.int64)
