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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import armorm
from armorm.backbone.decoder import Backbone
from armorm.backbone.overflow import encode_rows
from armorm.backbone.template import EncodedConversation
from armorm.conversation import Conversation
from armorm.data.computed import computed_objective, measure
from armorm.data.preferences import PreferencePair
from armorm.data.ratings import RatingTable
from armorm.evaluation.metrics import pair_figures, rating_figures
from armorm.features.extract import Features, extract
from armorm.features.store import FeatureStore
from armorm.files import plain, read_arrays, write_arrays, write_json, write_text
from armorm.heads.debias import Debiasing, correlation, fit_debiasing, no_debiasing
from armorm.heads.gating import GateReport, GateSettings, GatingNetwork, RewardPairs, fit_gate
from armorm.heads.joint import JointPairs
from armorm.heads.regression import RegressionHead, RegressionReport, fit_regression, fold_of
from armorm.model.configuration import ArmoRMConfig
from armorm.model.modeling import ArmoRMForSequenceClassification
from armorm.progress import progress
from armorm.reward_model import ArmoRM
from armorm.training.beyond import joint_head, joint_stage, pair_coefficients, quantile_stage
from armorm.training.card import model_card
from armorm.training.plan import TrainingData, plan
from armorm.training.recipe import Recipe

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
        backbone = Backbone.load(
            section.model,
            dtype=section.dtype,
            device=section.device,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
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
        mapped = table.objectives.to_reward(table.ratings)
        folds = np.array(
            [fold_of(conversation.prompt_key, recipe.regression.folds) for conversation in table.conversations]
        )
        rated = corpus.features.response[corpus.indices(table.conversations)]
        head = self._regression(rated[train_rows], mapped[train_rows], folds[train_rows], names, key)
        for report in head.reports:
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
            stage_1 = (head, rated[train_rows], mapped[train_rows], folds[train_rows])
            head, extra["joint"] = self._joint(stage_1, pairs, served, debiasing, corpus, key)
            # From here on `served` gives the joint heads' rewards, out of fold for the pairs' prompts as well.
            trained_prompts |= {pair.prompt_key for pair in pairs}
            key = f"{key} joint"
            reference_rewards = served(reference)
            debiasing = self._debiasing(reference, reference_rewards, names)
        network, gate_report = self._gate(pairs, served, debiasing, corpus, key)

        model = self._assemble(backbone, table, head, debiasing, network, reference, reference_rewards, corpus)
        if recipe.quantiles is not None:
            rewards = head.predict_out_of_fold(rated[train_rows], folds[train_rows])
            extra["quantiles"] = self._quantiles(
                model, rated[train_rows], mapped[train_rows], rewards, folds[train_rows], names, key
            )
        metrics = {
            "recipe": {"name": recipe.name, "hash": recipe.hash},
            "armorm_version": armorm.__version__,
            "backbone": {
                "name": backbone.name,
                "dtype": str(backbone.model.dtype).removeprefix("torch."),
                "fingerprint": backbone.fingerprint,
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
            "debiasing": self._debiasing_figures(debiasing, table, test_rows, corpus, head, names),
            "gate": asdict(gate_report),
            **extra,
            "evaluation": self._evaluation(model, table, test_rows, corpus, debiasing),
        }
        self._write(model, metrics, corpus)
        return model

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
        store = FeatureStore(self.features, fingerprint=backbone.fingerprint, hidden_size=backbone.hidden_size)
        features = extract(backbone, encoded, store, batch_tokens=section.batch_tokens)
        rows = {unique[i].key: row for row, i in enumerate(kept)}
        rejected = {unique[i].key: reason for i, reason in result.rejected}
        if rejected:
            self.console.print(f"refused: {len(rejected):,} of {len(unique):,} conversations, listed in rejected.jsonl")
        if result.truncated:
            self.console.print(f"truncated: the prompts of {len(result.truncated):,} of {len(unique):,} conversations")
        return _Corpus(rows, encoded, features, rejected, len(result.truncated))

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
        self, features: np.ndarray, ratings: np.ndarray, folds: np.ndarray, names: list[str], key: str
    ) -> RegressionHead:
        section = self.recipe.regression

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            head = fit_regression(features, ratings, folds, names, alphas=section.alphas, intercept=section.intercept)
            # What is served is float32; train the gate on the very same numbers.
            arrays = {
                name: getattr(head, name).astype(np.float32) for name in ("weight", "bias", "fold_weight", "fold_bias")
            }
            return arrays, [asdict(report) for report in head.reports]

        arrays, reports = _kept(self.work / "regression.safetensors", key, compute)
        wide = {name: array.astype(np.float64) for name, array in arrays.items()}
        return RegressionHead(**wide, reports=[RegressionReport(**report) for report in reports])

    def _debiasing(self, reference: Sequence[Conversation], rewards: np.ndarray, names: list[str]) -> Debiasing:
        section = self.recipe.debias
        if section is None:
            return no_debiasing(len(names))
        prompts = _group_index([conversation.prompt_key for conversation in reference])
        bias = names.index(section.against[0])
        debiasing = fit_debiasing(rewards, bias, metric=section.metric, level=section.level, groups=prompts)
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
        settings = GateSettings(**section.model_dump(), seed=self.recipe.seed)
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
            )
            network, report = fit_gate(corpus.features.prompt, reward_pairs, settings)
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
        return network.eval(), GateReport(**report)

    def _joint(
        self,
        stage_1: tuple[RegressionHead, np.ndarray, np.ndarray, np.ndarray],
        pairs: list[PreferencePair],
        served: Callable[[Sequence[Conversation]], np.ndarray],
        debiasing: Debiasing,
        corpus: _Corpus,
        key: str,
    ) -> tuple[RegressionHead, Any]:
        """Heads trained on ratings and pairs together, from the coefficients that a first gate gives the pairs."""
        recipe = self.recipe
        assert recipe.joint is not None
        section = recipe.joint

        def compute() -> tuple[dict[str, np.ndarray], Any]:
            network, _ = self._gate(pairs, served, debiasing, corpus, key)
            chosen, rejected = (corpus.indices([getattr(p, side) for p in pairs]) for side in ("chosen", "rejected"))
            features = corpus.features
            joint_pairs = JointPairs(
                features.response[chosen] - features.response[rejected],
                pair_coefficients(network, debiasing, features.prompt[features.prompt_index[chosen]]),
                np.array([fold_of(pair.prompt_key, recipe.regression.folds) for pair in pairs]),
            )
            return joint_stage(*stage_1, joint_pairs, section, recipe.regression.intercept)

        arrays, report = _kept(self.work / "joint.safetensors", key, compute)
        return joint_head(stage_1[0], arrays), report

    @torch.no_grad()
    def _quantiles(
        self,
        model: ArmoRM,
        features: np.ndarray,
        ratings: np.ndarray,
        rewards: np.ndarray,
        folds: np.ndarray,
        names: list[str],
        key: str,
    ) -> Any:
        """Fit quantile heads and put them into the model, beside the score."""
        section = self.recipe.quantiles
        assert section is not None
        arrays, report = _kept(
            self.work / "quantiles.safetensors",
            key,
            lambda: quantile_stage(features, ratings, rewards, folds, names, section),
        )
        model.model.add_quantiles(report["objectives"], report["levels"], arrays["weight"], arrays["bias"])
        return report

    # --- model and figures -----------------------------------------------------------------------

    @torch.no_grad()
    def _assemble(
        self,
        backbone: Backbone,
        table: RatingTable,
        head: RegressionHead,
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
                "penalties": debiasing.penalties.tolist(),
            }
            if debiasing.against
            else {},
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
        names: list[str],
    ) -> dict[str, Any] | None:
        """Correlation with the bias before and after, on reference data and on held-out rated rows."""
        if not debiasing.against:
            return None
        bias = debiasing.against[0]
        figures: dict[str, Any] = {
            "against": names[bias],
            "metric": debiasing.metric,
            "level": debiasing.level,
            "penalties": dict(zip(names, debiasing.penalties.tolist(), strict=True)),
            "reference": {
                "before": dict(zip(names, debiasing.before.tolist(), strict=True)),
                "after": dict(zip(names, debiasing.after.tolist(), strict=True)),
            },
        }
        if len(test_rows) >= 3:
            rows = corpus.indices([table.conversations[i] for i in test_rows])
            rewards = head.predict(corpus.features.response[rows])
            debiased = debiasing.apply(rewards)
            lengths = np.array([corpus.encoded[i].response_tokens for i in rows], np.float64)
            measured = correlation(debiasing.metric)
            for label, target in (("predicted", rewards[:, bias]), ("actual_length", lengths)):
                figures[f"held_out_against_{label}"] = {
                    "before": {name: measured(rewards[:, i], target) for i, name in enumerate(names)},
                    "after": {name: measured(debiased[:, i], target) for i, name in enumerate(names) if i != bias},
                }
        return figures

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
