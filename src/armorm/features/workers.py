"""Work: the shards that an extraction has to compute, and who computes them.

In:  a plan as the store keeps it, and the conversations of each shard.
Out: shards in the store.

`Here` computes them in this process. `ray.RayWorkers` hands them to a cluster. Both use `compute_shard`, so the bytes
of a shard do not tell where it was made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.features.engine import Engine, choose_engine, resumed_engine
from armorm.features.extraction_plan import PlanFigures, Settings, keys_of, prompt_keys_of
from armorm.features.store import FeatureStore, StoredPlan, shard_name
from armorm.progress import Advance, progress


@dataclass
class Work:
    """Shards of a plan that are not there yet.

    Attributes:
        plan: as the store keeps it.
        numbers: of the shards to compute, at least one.
        encoded: all conversations that were asked for.
        places: of each shard, the positions of its conversations among them, in order.
        owned: of each of them, the keys of the prompts that it stores.
        store: where they go.
        settings: how they are computed, where the plan says nothing.
        figures: of the whole request.
        tokens: to compute for each of them.
    """

    plan: StoredPlan
    numbers: list[int]
    encoded: Sequence[EncodedConversation]
    places: Sequence[np.ndarray]
    owned: Callable[[int], np.ndarray]
    store: FeatureStore
    settings: Settings
    figures: PlanFigures
    tokens: dict[int, int]

    def conversations(self, number: int) -> list[EncodedConversation]:
        """The conversations of a shard, in order."""
        return [self.encoded[i] for i in self.places[number]]

    @property
    def unit(self) -> str:
        """What progress is counted in."""
        saving = self.figures.saving
        return f"tokens ({saving:.1f} asked for by one)" if saving > 1.05 else "tokens"


class Runner(Protocol):
    """What computes shards."""

    def choose(
        self, encoded: Sequence[EncodedConversation], shared: np.ndarray, settings: Settings
    ) -> Mapping[str, Any]:
        """How the work is computed (`Engine.settings`): conversations in lexicographic order, and the ids that each
        has in common with the one before."""

    def run(self, work: Work) -> None:
        """Compute the shards and write them into the store."""


@dataclass
class Here:
    """Shards computed in this process, one after another."""

    backbone: Backbone

    def choose(
        self, encoded: Sequence[EncodedConversation], shared: np.ndarray, settings: Settings
    ) -> Mapping[str, Any]:
        """As in `Runner`."""
        return self.engine(encoded, shared, settings).settings()

    def engine(self, encoded: Sequence[EncodedConversation], shared: np.ndarray, settings: Settings) -> Engine:
        """The engine itself."""
        return choose_engine(
            self.backbone, encoded, shared, settings.batch_tokens, sharing=settings.sharing, compiled=settings.compiled
        )

    def run(self, work: Work) -> None:
        """As in `Runner`."""
        engine = resumed_engine(self.backbone, work.plan.settings, work.conversations(work.numbers[0]))
        with progress(work.settings.description, sum(work.tokens.values()), work.unit) as advance:
            for number in work.numbers:
                shard = compute_shard(engine, work.conversations(number), work.owned(number), advance)
                work.store.write_shard(shard_name(work.plan.id, number), **shard)


def compute_shard(
    engine: Engine, conversations: Sequence[EncodedConversation], owned: np.ndarray, advance: Advance
) -> dict[str, Any]:
    """Features of one shard, as `FeatureStore.write_shard` takes them.

    Args:
        owned: keys of the prompts that this shard stores.
    """
    prompt, response = engine.features(conversations, advance)
    keys, first = np.unique(prompt_keys_of(conversations), return_index=True)
    rows = np.sort(first[np.isin(keys, owned)])
    return {
        "response_keys": keys_of(conversations),
        "response_features": response,
        "prompt_keys": prompt_keys_of([conversations[row] for row in rows]),
        "prompt_features": prompt[rows],
        "metadata": {"budget": str(engine.budget), "halvings": str(engine.halvings)} if engine.halvings else {},
    }
