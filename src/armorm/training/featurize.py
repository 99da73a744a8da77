"""The conversations of a run, each once, with their tokens and features.

In:  a recipe, its plan, the backbone.
Out: `Corpus`.

Features of the prompts are in memory; those of the responses stay in the store, and are read a block at a time, in
the order of its shards: what a run holds does not grow with hidden size times rated rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.backbone.encoding import encode_rows
from armorm.conversation import Conversation
from armorm.errors import MissingExtraError
from armorm.features.engine import keys_of, prompt_keys_of
from armorm.features.extract import Features, distinct, fill_store
from armorm.features.store import BLOCK_ROWS, FeatureStore, read_manifest
from armorm.features.workers import ExtractionSettings, Workers
from armorm.heads.accumulation import RatedBlock, accumulate
from armorm.heads.statistics import RatingStatistics
from armorm.progress import progress
from armorm.training.dataset import TrainingData
from armorm.training.recipe import Recipe
from armorm.training.schema import BackboneSection


@dataclass(frozen=True)
class Corpus:
    """All conversations of a run, each once, with encodings and features.

    Attributes:
        rows: row of each conversation by its content key; absent where it was refused.
        encoded: n encodings by row.
        store: holds the features of every row.
        keys: (n,) under which it holds the responses'.
        prompt: (m, d) float32 features of the distinct prompts.
        prompt_index: (n,) int64, row of `prompt` for each conversation.
        rejected: reason of each refused conversation by its content key.
        truncated: conversations that lost prompt tokens.
    """

    rows: dict[str, int]
    encoded: list[EncodedConversation]
    store: FeatureStore
    keys: np.ndarray
    prompt: np.ndarray
    prompt_index: np.ndarray
    rejected: dict[str, str]
    truncated: int

    def indices(self, conversations: Sequence[Conversation]) -> np.ndarray:
        """Row of each conversation, -1 where it was refused."""
        return np.array([self.rows.get(conversation.key, -1) for conversation in conversations], np.int64)

    def responses(self, rows: np.ndarray) -> np.ndarray:
        """Response features (len(rows), d) float32, in memory."""
        return self.store.responses(self.keys[rows])

    def prompts(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Features (p, d) of the distinct prompts of rows, and which of them each row has (len(rows),)."""
        used, index = np.unique(self.prompt_index[rows], return_inverse=True)
        return self.prompt[used], index

    def features(self, rows: np.ndarray) -> Features:
        """Features of rows, in memory."""
        return Features(self.responses(rows), *self.prompts(rows))


def read_corpus(recipe: Recipe, data: TrainingData, backbone: Backbone, store: Path, console: Console) -> Corpus:
    """Encode every conversation of the run once, and compute its features, or read them from the store at a path."""
    rated = [data.table.conversations[i] for i in (*data.train_rows, *data.test_rows)]
    sides = [
        side
        for pairs in (data.pairs, data.test_pairs, *(evaluation.pairs for evaluation in data.evaluations))
        for pair in pairs
        for side in (pair.chosen, pair.rejected)
    ]
    unique = list({c.key: c for c in (*rated, *sides, *(data.reference or ()))}.values())
    section = recipe.backbone
    with progress("tokens", len(unique), "conversations") as advance:
        result = encode_rows(backbone.template, unique, section.max_length, section.overflow, advance)
    encoded = result.encoded
    feature_store = FeatureStore.of(store, backbone)
    fill_store(
        _workers(section, backbone) or backbone, encoded, feature_store, ExtractionSettings(section.batch_tokens)
    )
    prompts, prompt_index = distinct(prompt_keys_of(encoded))
    rows = {unique[i].key: row for row, i in enumerate(result.kept)}
    rejected = {unique[i].key: reason for i, reason in result.rejected}
    if rejected:
        console.print(f"refused: {len(rejected):,} of {len(unique):,} conversations, listed in rejected.jsonl")
    if result.truncated:
        console.print(f"truncated: the prompts of {len(result.truncated):,} of {len(unique):,} conversations")
    features = feature_store.prompts(prompts)
    truncated = len(result.truncated)
    return Corpus(rows, encoded, feature_store, keys_of(encoded), features, prompt_index, rejected, truncated)


def _workers(section: BackboneSection, backbone: Backbone) -> Workers | None:
    """Who extracts features, where that is not this process."""
    if section.engine == "local":
        return None
    from armorm.features.ray_workers import BackboneSource, RayWorkers

    # (Workers load what this process did: after fine-tuning that is another backbone than the recipe's.)
    source = BackboneSource(backbone.name, section.dtype, section.device, section.revision, section.trust_remote_code)
    return RayWorkers(source, section.workers, section.gpus_per_worker)


@dataclass(frozen=True)
class StoredRows:
    """Rated rows whose features a store holds; plain data that travels to a task.

    Attributes:
        folder: of the store.
        keys: (n,) key of each conversation.
        ratings: (n, k) mapped ratings, NaN where missing.
        folds: (n,) int.
        names: (k,) objectives.
        fold_count: number of folds.
    """

    folder: str
    keys: Sequence[bytes]
    ratings: np.ndarray
    folds: np.ndarray
    names: Sequence[str]
    fold_count: int

    def parts(self, count: int) -> list[StoredRows]:
        """The rows in `count` runs of about equal length."""
        ends = np.linspace(0, len(self.keys), count + 1).astype(int)
        return [
            StoredRows(self.folder, self.keys[a:b], self.ratings[a:b], self.folds[a:b], self.names, self.fold_count)
            for a, b in zip(ends, ends[1:], strict=False)
        ]

    def blocks(self, store: FeatureStore) -> Iterator[RatedBlock]:
        """The rows, a block at a time."""
        for start in range(0, len(self.keys), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            yield RatedBlock(store.responses(self.keys[rows]), self.ratings[rows], self.folds[rows])


def statistics_of(rows: StoredRows) -> RatingStatistics:
    """Statistics of some rows, in this process."""
    from pathlib import Path

    manifest = read_manifest(Path(rows.folder))
    store = FeatureStore(rows.folder, fingerprint=manifest["fingerprint"], hidden_size=manifest["hidden_size"])
    return accumulate(rows.blocks(store), rows.names, rows.fold_count, store.hidden_size)


def statistics_by_ray(rows: StoredRows, tasks: int | None = None) -> RatingStatistics:
    """The same, as Ray tasks; connects to a running cluster, or starts Ray on this machine.

    The store's folder must be one that every machine of the cluster sees.

    Args:
        tasks: how many, with an equal share of the cluster's cores each; by default one for each machine.

    Raises:
        MissingExtraError: where Ray is not installed.
    """
    try:
        import ray
    except ImportError:
        raise MissingExtraError("Ray is not installed; pip install 'armorm[ray]'") from None
    if not ray.is_initialized():
        ray.init(log_to_driver=False)

    tasks = tasks or sum(1 for node in ray.nodes() if node["Alive"])
    cores = max(1, int(ray.cluster_resources().get("CPU", 1)) // tasks)
    task = ray.remote(_arrays_of).options(num_cpus=cores)
    waiting = [task.remote(part) for part in rows.parts(tasks)]
    total: RatingStatistics | None = None
    while waiting:  # in order of completion, so that few parts are held at a time
        done, waiting = ray.wait(waiting)
        part = RatingStatistics.from_arrays(*ray.get(done[0]))
        total = part if total is None else total + part
    assert total is not None
    return total


def _arrays_of(rows: StoredRows) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    return statistics_of(rows).to_arrays()
