"""Data of the ablation: the data sets of a recipe as arrays, with features from a store on disk.

Subsets keep whole prompts, selected by content, so that they are the same on every backbone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from armorm.backbone.encoding import encode_rows
from armorm.conversation import Conversation
from armorm.data.decontamination import prompt_groups
from armorm.data.measures import computed_objective, measure
from armorm.data.preferences import PreferencePair
from armorm.data.ratings import sample_by_prompt
from armorm.features.extract import Features, extract
from armorm.features.store import FeatureStore
from armorm.heads.regression import fold_of
from armorm.objectives import ObjectiveSet
from armorm.progress import progress
from armorm.training.dataset import TrainingData, read_training_data
from armorm.training.featurize import source_of
from armorm.training.finetune.record import Finetuned, without_finetuned
from armorm.training.recipe import Recipe


@dataclass(frozen=True)
class Rated:
    """Rated rows.

    Attributes:
        rows: (n,) rows of the features.
        ratings: (n, k) mapped ratings, NaN where missing.
        folds: (n,) fold of each prompt.
        prompts: (n,) prompt keys.
        sources: (n,) set of each row.
    """

    rows: np.ndarray
    ratings: np.ndarray
    folds: np.ndarray
    prompts: np.ndarray
    sources: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, index: np.ndarray) -> Rated:
        return Rated(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Pairs:
    """Preference pairs.

    Attributes:
        chosen, rejected: (p,) rows of the features.
        folds, prompts, sources: (p,) as in `Rated`.
        longer: (p,) response tokens of chosen minus those of rejected.
    """

    chosen: np.ndarray
    rejected: np.ndarray
    folds: np.ndarray
    prompts: np.ndarray
    sources: np.ndarray
    longer: np.ndarray

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, index: np.ndarray) -> Pairs:
        return Pairs(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class Corpus:
    """All data of the ablation.

    Attributes:
        objectives: the k objectives, computed ones last.
        features: features of every distinct conversation.
        lengths: (n,) response tokens.
        train, test: rated rows.
        pairs: training pairs.
        test_pairs: held-out pairs of the training sets.
        benchmarks: pairs of sets that nothing is trained on, by set.
        bias: index of the objective that is debiased against.
        refused: number of rejected conversations.
        backbone: name and fingerprint.
        start: (k, d) weights that a fine-tuned backbone was trained with; the prompts of that training are excluded.
    """

    objectives: ObjectiveSet
    features: Features
    lengths: np.ndarray
    train: Rated
    test: Rated
    pairs: Pairs
    test_pairs: Pairs
    benchmarks: dict[str, Pairs]
    bias: int
    refused: int
    backbone: dict[str, str]
    start: np.ndarray | None = None

    def responses(self, rows: np.ndarray) -> np.ndarray:
        """Response features (n, d)."""
        return self.features.response[rows]

    def counts(self) -> dict[str, int]:
        return {
            "rated_train": len(self.train),
            "rated_test": len(self.test),
            "pairs_train": len(self.pairs),
            "pairs_test": len(self.test_pairs),
            **{f"pairs_{name}": len(pairs) for name, pairs in self.benchmarks.items()},
            "conversations": len(self.features),
            "refused": self.refused,
        }


def load(recipe: Recipe, store: Path, train_rows: int | None, benchmark_pairs: int | None) -> Corpus:
    """Read, encode and embed everything; stored features are reused.

    Args:
        store: folder of feature stores, one per backbone.
        train_rows: approximate number of training rows per rated set and of training pairs per preference set; None
            for all.
        benchmark_pairs: approximate number of pairs per benchmark; None for all.
    """
    if recipe.debias is None:
        raise SystemExit("the recipe has no debias section, expected one with the objective to debias against")
    section, data = recipe.backbone, read_training_data(recipe)
    finetuned = Finetuned.read(section.model)
    if finetuned is not None:
        data = without_finetuned(data, finetuned)
    data = selected(data, train_rows, benchmark_pairs)
    backbone = source_of(section).load()
    groups = conversations(data)
    unique = list({c.key: c for group in groups for c in group}.values())
    with progress("tokens", len(unique), "conversations") as advance:
        encoded = encode_rows(backbone.template, unique, section.max_length, section.overflow, advance)
    row_of = {unique[i].key: row for row, i in enumerate(encoded.kept)}
    kept = encoded.encoded
    folder = FeatureStore.of(store / backbone.fingerprint[:16], backbone)
    for number, group in enumerate(groups):  # one by one, so that an interrupted store holds whole sets
        part = [kept[i] for i in dict.fromkeys(row_of[c.key] for c in group if c.key in row_of)]
        print(f"set {number + 1} of {len(groups)}: {len(part):,} conversations", file=sys.stderr, flush=True)
        extract(backbone, part, folder, batch_tokens=section.batch_tokens)
    features = extract(backbone, kept, folder, batch_tokens=section.batch_tokens)
    lengths = np.array([row.response_tokens for row in kept], np.int64)
    table = data.table
    usable = [
        np.array([i for i in rows if table.conversations[i].key in row_of], np.int64)
        for rows in (data.train_rows, data.test_rows)
    ]
    for name, measure_name in data.computed:
        tokens = [lengths[row_of[c.key]] if c.key in row_of else 0 for c in table.conversations]
        raw = measure(measure_name, table.conversations, tokens)
        table = table.with_column(computed_objective(name, measure_name, raw[usable[0]]), raw)
    mapped = table.objectives.to_reward(table.ratings)
    near = prompt_groups(unique)

    def rated(rows: np.ndarray) -> Rated:
        taken = [table.conversations[i] for i in rows]
        return Rated(
            np.array([row_of[c.key] for c in taken]),
            mapped[rows],
            np.array([fold_of(near[c.prompt_key], recipe.regression.folds) for c in taken]),
            np.array([c.prompt_key for c in taken]),
            np.array([_stem(table.origins[i][0]) for i in rows]),
        )

    def paired(pairs: Sequence[PreferencePair]) -> Pairs:
        found = [p for p in pairs if p.chosen.key in row_of and p.rejected.key in row_of]
        chosen, rejected = (np.array([row_of[getattr(p, s).key] for p in found]) for s in ("chosen", "rejected"))
        return Pairs(
            chosen,
            rejected,
            np.array([fold_of(near[p.prompt_key], recipe.regression.folds) for p in found]),
            np.array([p.prompt_key for p in found]),
            np.array([p.source for p in found]),
            lengths[chosen] - lengths[rejected],
        )

    return Corpus(
        table.objectives,
        features,
        lengths,
        rated(usable[0]),
        rated(usable[1]),
        paired(data.pairs),
        paired(data.test_pairs),
        {name: paired(pairs) for name, pairs in data.evaluations.items()},
        table.objectives.names.index(recipe.debias.against[0]),
        len(unique) - len(kept),
        {"name": backbone.name, "fingerprint": backbone.fingerprint},
        finetuned.start(table.objectives, backbone.readout) if finetuned is not None else None,
    )


def selected(data: TrainingData, train_rows: int | None, benchmark_pairs: int | None) -> TrainingData:
    """Subsample training rows, training pairs and benchmark pairs; test sets are kept whole."""
    table = data.table
    by_set: dict[str, list[int]] = {}
    for row in data.train_rows:
        by_set.setdefault(table.origins[row][0], []).append(int(row))
    kept: list[int] = []
    for rows in by_set.values():
        kept += [rows[i] for i in sample_by_prompt([table.conversations[r].prompt_key for r in rows], train_rows)]
    dropped = {table.conversations[r].key for r in set(data.train_rows.tolist()) - set(kept)}
    data.train_rows = np.array(sorted(kept), np.int64)
    usable = [p for p in data.pairs if p.chosen.key not in dropped and p.rejected.key not in dropped]
    data.pairs = []
    for source in dict.fromkeys(pair.source for pair in usable):
        pairs = [pair for pair in usable if pair.source == source]
        data.pairs += [pairs[i] for i in sample_by_prompt([pair.prompt_key for pair in pairs], train_rows)]
    for name, pairs in data.evaluations.items():
        keys = [pair.prompt_key for pair in pairs]
        data.evaluations[name] = [pairs[i] for i in sample_by_prompt(keys, benchmark_pairs)]
    return data


def conversations(data: TrainingData) -> list[list[Conversation]]:
    """Sets of conversations in the order in which they are embedded: test sets first."""

    def sides(pairs: Sequence[PreferencePair]) -> list[Conversation]:
        return [side for pair in pairs for side in (pair.chosen, pair.rejected)]

    rated: dict[str, list[Conversation]] = {}
    for row in data.train_rows:
        rated.setdefault(data.table.origins[row][0], []).append(data.table.conversations[row])
    return [
        sides(data.test_pairs),
        [data.table.conversations[i] for i in data.test_rows],
        sides(data.pairs),
        *rated.values(),
        *(sides(pairs) for pairs in data.evaluations.values()),
    ]


def _stem(file: str) -> str:
    return Path(file).name.split(".")[0]
