"""Tokens and features of a run's conversations, each computed once and kept in the feature store.

Prompt features are in memory. Response features stay in the store and are read a block at a time, in the order of its
shards, so memory does not grow with hidden size times the number of rated rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.encoding import encode_rows, same_prompts
from armorm.conversation import Conversation
from armorm.data.preferences import PreferencePair
from armorm.data.seen_prompts import SeenPrompts
from armorm.errors import MissingExtraError
from armorm.features.engine import BATCH_TOKENS, keys_of, prompt_keys_of
from armorm.features.extract import Features, distinct, fill_store
from armorm.features.ray_workers import BackboneSource, RayWorkers
from armorm.features.store import FeatureStore
from armorm.features.workers import ExtractionSettings, Workers
from armorm.heads.accumulation import RatedBlock, accumulate
from armorm.heads.statistics import RatingStatistics
from armorm.progress import progress
from armorm.training.finetune.record import residuals
from armorm.training.schema import BackboneSection


@dataclass(frozen=True)
class Corpus:
    """The conversations of a run that could be encoded, with tokens and features."""

    rows: dict[str, int]  # row of each conversation by its content key
    encoded: list[EncodedConversation]  # (n,) token ids, of `rows` and then of `shared`
    store: FeatureStore
    keys: np.ndarray  # (n,) keys of the response features in the store
    prompt: np.ndarray  # (m, d) float32 features of the distinct prompts
    prompt_index: np.ndarray  # (n,) int64, row of `prompt` for each conversation
    rejected: dict[str, str]  # reason of each rejected conversation by its content key
    truncated: int  # number of conversations that lost prompt tokens
    # key of the group of near-duplicates of each prompt, by its content key; folds and hold-outs go by it
    groups: dict[str, str]
    # rows of sides of pairs that lost more of the prompt than alone, None for one that cannot be scored so
    shared: dict[str, int | None]

    @cached_property
    def of_pairs(self) -> Corpus:
        """The same conversations as sides of pairs: both sides of a pair have the same prompt, however truncated."""
        if not self.shared:
            return self
        rows = {key: row for key, row in (self.rows | self.shared).items() if row is not None}
        return replace(self, rows=rows)

    def __contains__(self, conversation: Conversation) -> bool:
        return conversation.key in self.rows

    def usable(self, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
        """The pairs of which neither side was rejected."""
        rows = self.of_pairs
        return [pair for pair in pairs if pair.chosen in rows and pair.rejected in rows]

    def group_keys(self, conversations: Iterable[Conversation]) -> list[str]:
        """Key of each prompt's group."""
        return [self.groups[conversation.prompt_key] for conversation in conversations]

    def indices(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Row (c,) of each conversation, none of which may be rejected; likewise below."""
        return np.array([self.rows[conversation.key] for conversation in conversations], np.int64)

    def response_keys(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Key (c,) of each response's features in the store."""
        return self.keys[self.indices(conversations)]

    def response_tokens(self, conversations: Sequence[Conversation]) -> list[int]:
        """Number of tokens of each response, template tokens excluded."""
        return [self.encoded[row].response_tokens for row in self.indices(conversations)]

    def responses(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Response features (c, d) float32, in memory."""
        return self.store.responses(self.response_keys(conversations))

    def prompt_rows(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Row (c,) of each conversation's prompt in `prompt`."""
        return self.prompt_index[self.indices(conversations)]

    def features(self, conversations: Sequence[Conversation]) -> Features:
        """Prompt and response features, in memory."""
        used, index = np.unique(self.prompt_rows(conversations), return_inverse=True)
        return Features(self.responses(conversations), self.prompt[used], index)


def build_corpus(
    conversations: Sequence[Conversation],
    backbone: Backbone,
    store: Path,
    console: Console,
    *,
    max_length: int | None,
    overflow: Literal["error", "truncate_prompt", "skip"],
    pairs: Iterable[PreferencePair] = (),
    batch_tokens: int = BATCH_TOKENS,
    workers: Workers | None = None,
    seen: SeenPrompts | None = None,
) -> Corpus:
    """Encode distinct conversations, and compute their features or read them from the store.

    Args:
        store: folder of the feature store.
        pairs: of some of the conversations.
        workers: compute the features elsewhere, by default the backbone in this process.
        seen: prompts of an earlier run, whose folds their near-duplicates take.
    """
    with progress("tokens", len(conversations), "conversations") as advance:
        result = encode_rows(backbone.template, conversations, max_length, overflow, advance)
    rows = {conversations[i].key: row for row, i in enumerate(result.kept)}
    place = {conversation.key: i for i, conversation in enumerate(conversations)} if result.truncated else {}
    sides = ((place[pair.chosen.key], place[pair.rejected.key]) for pair in pairs)
    together = same_prompts(backbone.template, conversations, result, sides, max_length)
    encoded, shared = list(result.encoded), {}
    for i in (i for i in result.kept if together.rows[i] is not result.rows[i]):
        row = together.rows[i]
        shared[conversations[i].key] = None if row is None else len(encoded)
        encoded += [] if row is None else [row]
    feature_store = FeatureStore.of(store, backbone)
    fill_store(workers or backbone, encoded, feature_store, ExtractionSettings(batch_tokens))
    prompts, prompt_index = distinct(prompt_keys_of(encoded))
    if result.rejected:
        count = f"{len(result.rejected):,} of {len(conversations):,}"
        console.print(f"rejected: {count} conversations, listed in rejected.jsonl")
    if result.truncated:
        console.print(f"truncated: the prompts of {len(result.truncated):,} of {len(conversations):,} conversations")
    return Corpus(
        rows=rows,
        encoded=encoded,
        store=feature_store,
        keys=keys_of(encoded),
        prompt=feature_store.prompts(prompts),
        prompt_index=prompt_index,
        rejected={conversations[i].key: reason for i, reason in result.rejected},
        truncated=len(result.truncated),
        groups=(seen or SeenPrompts()).prompt_groups(conversations),
        shared=shared,
    )


def source_of(section: BackboneSection, tuned: Path | None = None) -> BackboneSource:
    """Where a recipe's backbone is loaded from, by this process or by workers.

    Args:
        tuned: folder of the fine-tuned backbone, if there is one.
    """
    names = ("dtype", "device", "layer", "pooling", "prompt_pooling", "trust_remote_code")
    options = {name: getattr(section, name) for name in names}
    return BackboneSource(str(tuned or section.model), revision=None if tuned else section.revision, **options)


def ray_workers(section: BackboneSection, source: BackboneSource) -> Workers | None:
    """Ray workers for `engine: ray`, else None."""
    if section.engine == "local":
        return None
    return RayWorkers(source, section.workers, section.gpus_per_worker)


@dataclass(frozen=True)
class RatedRows:
    """Rated rows whose features are in a store."""

    store: FeatureStore
    keys: np.ndarray  # (n,) key of each row in the store
    ratings: np.ndarray  # (n, k) mapped, NaN where missing
    folds: np.ndarray  # (n,) int
    names: Sequence[str]  # (k,) objectives
    weights: Mapping[int, np.ndarray] = field(default_factory=dict)  # by column, (n,) of squared errors; 1 for others

    @property
    def levels(self) -> list[int]:
        """Number of distinct ratings of each objective (k,)."""
        return rating_levels(self.ratings)

    def take(self, rows: np.ndarray) -> RatedRows:
        """Some of the rows."""
        weights = {column: values[rows] for column, values in self.weights.items()}
        kept = {name: getattr(self, name)[rows] for name in ("keys", "ratings", "folds")}
        return replace(self, **kept, weights=weights)

    def features(self) -> np.ndarray:
        """(n, d) float32, all of them in memory."""
        return self.store.responses(self.keys)

    def blocks(self, start: np.ndarray | None = None) -> Iterator[RatedBlock]:
        """The rows, a block at a time, in the order of the store's shards.

        Args:
            start: (k, d) weights; the blocks then hold the residuals of their predictions instead of the ratings.
        """
        for places, features in self.store.blocks(self.keys):
            ratings = self.ratings[places]
            left = ratings if start is None else residuals(start, features, ratings)
            weights = {column: values[places] for column, values in self.weights.items()}
            yield RatedBlock(features, left, self.folds[places], weights)

    def statistics(self, fold_count: int, start: np.ndarray | None = None) -> RatingStatistics:
        """Sufficient statistics of the rows, or of the residuals of `start`, in this process."""
        return accumulate(self.blocks(start), self.names, fold_count, self.store.response_size)


def rating_levels(ratings: np.ndarray) -> list[int]:
    """Number of distinct values in each column of ratings (n, k), NaN excluded."""
    return [len(np.unique(column[~np.isnan(column)])) for column in ratings.T]


def statistics_by_ray(rows: RatedRows, fold_count: int, tasks: int | None = None) -> RatingStatistics:
    """`rows.statistics` as Ray tasks; connects to a running cluster, or starts Ray on this machine.

    The store's folder must be visible to every machine of the cluster.

    Args:
        tasks: number of tasks, each with an equal share of the cluster's cores; by default one per machine.

    Raises:
        MissingExtraError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("Ray is not installed; pip install 'armorm[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)

    tasks = tasks or sum(1 for node in ray.nodes() if node["Alive"])
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)) // tasks)
    task = ray.remote(_part_statistics).options(num_cpus=cores)
    folder = str(rows.store.folder.resolve())
    parts = [rows.take(part) for part in np.array_split(rows.store.order(rows.keys), tasks)]
    waiting = [
        task.remote(folder, part.keys, part.ratings, part.folds, part.names, fold_count, part.weights) for part in parts
    ]
    total: RatingStatistics | None = None
    while waiting:  # in order of completion, so that few parts are held at a time
        done, waiting = ray.wait(waiting)
        part = RatingStatistics.from_arrays(*ray.get(done[0]))
        total = part if total is None else total + part
    assert total is not None
    return total


def _part_statistics(
    folder: str,
    keys: np.ndarray,
    ratings: np.ndarray,
    folds: np.ndarray,
    names: Sequence[str],
    fold_count: int,
    weights: Mapping[int, np.ndarray],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Statistics of some rows as plain arrays, in a Ray task, which opens the store itself."""
    store = FeatureStore.existing(folder)
    return RatedRows(store, keys, ratings, folds, names, weights).statistics(fold_count).to_arrays()
