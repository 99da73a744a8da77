"""Who computes the shards of an extraction: `LocalWorker` in this process, `ray_workers.RayWorkers` on a cluster.

Both call `compute_shard`, so the bytes of a shard do not depend on where it was computed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.features.engine import BATCH_TOKENS, Engine, choose_engine, keys_of, prompt_keys_of, resumed_engine
from armorm.features.store import FeatureStore, StoredPlan, part_path, shard_name
from armorm.progress import Advance, progress


@dataclass(frozen=True)
class ExtractionSettings:
    """How features are computed."""

    batch_tokens: int = BATCH_TOKENS  # most tokens of a forward pass: of a tree, or of a plain batch with its padding
    sharing: bool | None = None  # share prefixes; by default if that is exact for the model and pays
    compiled: bool | None = None  # compile layers; by default if that pays
    description: str = "features"  # of the progress line


@dataclass
class Work:
    """Shards of a plan that are not stored yet."""

    store: FeatureStore  # where they go
    plan: StoredPlan
    numbers: list[int]  # of the shards to compute, at least one
    encoded: Sequence[EncodedConversation]  # all requested conversations
    places: Sequence[np.ndarray]  # positions in `encoded` of the conversations of each shard, in order
    owned: Callable[[int], np.ndarray]  # keys of the prompts that a shard stores
    tokens: Mapping[int, int]  # to compute for each of `numbers`
    description: str  # of the progress line
    unit: str


class Workers(Protocol):
    """What computes shards."""

    def choose(
        self, encoded: Sequence[EncodedConversation], shared: np.ndarray, settings: ExtractionSettings
    ) -> Mapping[str, Any]:
        """Settings of the engine (`Engine.settings`) for conversations in lexicographic order.

        `shared` (n,) is the number of ids that each has in common with the previous one.
        """

    def run(self, work: Work) -> None:
        """Compute the shards and write them to the store."""


@dataclass
class LocalWorker:
    """Computes shards in this process, one after another."""

    backbone: Backbone

    def choose(
        self, encoded: Sequence[EncodedConversation], shared: np.ndarray, settings: ExtractionSettings
    ) -> Mapping[str, Any]:
        return choose_engine(
            self.backbone, encoded, shared, settings.batch_tokens, sharing=settings.sharing, compiled=settings.compiled
        ).settings()

    def run(self, work: Work) -> None:
        engine: Engine | None = None
        with progress(work.description, sum(work.tokens.values()), work.unit) as advance:
            for number in work.numbers:
                conversations = [work.encoded[i] for i in work.places[number]]
                engine = engine or resumed_engine(self.backbone, work.plan.settings, conversations)
                name = shard_name(work.plan.id, number)
                part = part_path(work.store.folder / name)
                shard = compute_shard(engine, conversations, work.owned(number), advance, part)
                work.store.write_shard(name, **shard)
                part.unlink(missing_ok=True)


def compute_shard(
    engine: Engine,
    conversations: Sequence[EncodedConversation],
    owned: np.ndarray,
    advance: Advance,
    part: Path | None = None,
) -> dict[str, Any]:
    """Features of one shard as arguments of `store.write_shard`.

    Args:
        owned: keys of the prompts that the shard stores.
        part: as of `Engine.features`.
    """
    prompt, response = engine.features(conversations, advance, part)
    keys, first = np.unique(prompt_keys_of(conversations), return_index=True)
    rows = np.sort(first[np.isin(keys, owned)])
    return {
        "response_keys": keys_of(conversations),
        "response_features": response,
        "prompt_keys": prompt_keys_of([conversations[row] for row in rows]),
        "prompt_features": prompt[rows],
        "metadata": {"budget": str(engine.budget), "halvings": str(engine.halvings)} if engine.halvings else {},
    }
