"""Extraction: encoded conversations to features, through the store where there is one.

In:  encoded conversations, a backbone, optionally a store.
Out: `Features`: response features (n, d), and the prompt features of the m distinct prompts; or, of `fill_store`,
     the same in the store alone, in memory that hardly grows with their number.

Identical conversations are computed once, across everything that was ever asked of the same store. What is left is
planned (plan.py) and computed shard after shard (engine.py); a finished shard is never computed again, and one whose
checksum fails is set aside and computed anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from armorm.backbone.chat_template import EncodedConversation
from armorm.backbone.decoder import Backbone
from armorm.features.extraction_plan import (
    BATCH_TOKENS,
    PlanFigures,
    Rows,
    Settings,
    keys_of,
    lengths_of,
    plan_extraction,
    plan_figures,
    prompt_keys_of,
)
from armorm.features.store import FeatureStore, shard_name
from armorm.features.workers import Here, Runner, Work
from armorm.progress import progress, say

SAID_TOKENS = 200_000


@dataclass(frozen=True)
class Features:
    """Features of n conversations over m distinct prompts.

    Attributes:
        response: (n, d) float32.
        prompt: (m, d) float32.
        prompt_index: (n,) int64, row of `prompt` for each conversation.
    """

    response: np.ndarray
    prompt: np.ndarray
    prompt_index: np.ndarray

    def __len__(self) -> int:
        return len(self.response)

    def take(self, rows: Sequence[int] | np.ndarray) -> Features:
        """Features of some of the conversations."""
        rows = np.asarray(rows, np.int64)
        used, index = np.unique(self.prompt_index[rows], return_inverse=True)
        return Features(self.response[rows], self.prompt[used], index)


def extract(
    backbone: Backbone,
    encoded: Sequence[EncodedConversation],
    store: FeatureStore | None = None,
    *,
    batch_tokens: int = BATCH_TOKENS,
    description: str = "features",
    sharing: bool | None = None,
    compiled: bool | None = None,
    runner: Runner | None = None,
) -> Features:
    """Compute features, or read those the store has.

    Args:
        runner: what computes the shards of the store; by default the backbone, here.
        batch_tokens: most tokens of a forward pass: of a tree of shared beginnings, or of a padded batch.
        sharing, compiled: as in `Settings`.

    Raises:
        BackboneError: for a conversation that does not fit into memory even alone.
        StoreError: for a store that cannot be written or read.
    """
    settings = Settings(batch_tokens, sharing, compiled, description)
    keys, prompt_keys = keys_of(encoded), prompt_keys_of(encoded)
    unique_prompts, prompt_index = distinct(prompt_keys)
    if store is not None:
        fill_store(runner or backbone, encoded, store, settings)
        return Features(store.responses(keys), store.prompts(unique_prompts), prompt_index)
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    plan = plan_extraction(encoded, first)
    rows = [encoded[i] for i in plan.rows]
    engine = Here(backbone).engine(rows, plan.shared, settings)
    total = int((plan.lengths - plan.shared if engine.mechanism == "tree" else plan.lengths).sum())
    with progress(description, total, "tokens") as advance:
        prompt, response = engine.features(rows, advance)
    place = np.empty(len(encoded), np.int64)
    place[plan.rows] = np.arange(len(plan.rows))
    prompts, prompt_rows = np.unique(prompt_keys[plan.rows], return_index=True)
    return Features(
        response[place[first][inverse]], prompt[prompt_rows[np.searchsorted(prompts, unique_prompts)]], prompt_index
    )


def fill_store(
    runner: Backbone | Runner,
    encoded: Sequence[EncodedConversation],
    store: FeatureStore,
    settings: Settings | None = None,
) -> PlanFigures:
    """Compute whatever of these conversations the store lacks.

    Args:
        runner: what computes the shards; a backbone computes them here.
        encoded: in memory, or on disk (tokens.py).

    Returns:
        figures of the request.
    """
    runner = Here(runner) if isinstance(runner, Backbone) else runner
    settings = settings or Settings()
    keys, prompt_keys = keys_of(encoded), prompt_keys_of(encoded)
    store.verify(keys, prompt_keys)
    figures = _fill(store, runner, encoded, keys, prompt_keys, store.missing(keys), settings)
    # (A prompt feature can be missing alone, where the shard of another request that held it was deleted.)
    prompts = store.missing_prompts(prompt_keys)
    if prompts:
        _fill(store, runner, encoded, keys, prompt_keys, prompts, settings)
    return figures


def _fill(
    store: FeatureStore,
    runner: Runner,
    encoded: Sequence[EncodedConversation],
    keys: np.ndarray,
    prompt_keys: np.ndarray,
    missing: Sequence[int],
    settings: Settings,
) -> PlanFigures:
    """Compute the conversations at the positions `missing`, shard by shard."""
    plan = plan_extraction(encoded, missing)
    figures = plan_figures(keys, prompt_keys, lengths_of(encoded), plan)
    if not len(plan.rows):
        return figures
    chosen = runner.choose(Rows(encoded, plan.rows), plan.shared, settings)
    stored = store.plan(keys, plan.rows, plan.bounds, chosen)
    order = np.argsort(keys, kind="stable")
    places = [order[np.searchsorted(keys, shard, sorter=order)] for shard in stored.shards]
    todo = [number for number in range(len(places)) if not store.has_shard(shard_name(stored.id, number))]
    shard_of = np.repeat(np.arange(len(places)), [len(rows) for rows in places])
    distinct, first = np.unique(prompt_keys[np.concatenate(places)], return_index=True)  # the first shard owns a prompt

    def owned(number: int) -> np.ndarray:
        mine = distinct[shard_of[first] == number]
        return mine[~store.has_prompts(mine, outside=f"shard-{stored.id}-")]

    computed = np.zeros(len(encoded), np.int64)
    computed[plan.rows] = plan.lengths - plan.shared if stored.settings.get("mechanism") == "tree" else plan.lengths
    work = Work(
        stored,
        todo,
        encoded,
        places,
        owned,
        store,
        settings,
        figures,
        {number: int(computed[places[number]].sum()) for number in todo},
    )
    if figures.asked_tokens >= SAID_TOKENS:
        say(f"{settings.description}: {figures}")
    runner.run(work)
    return figures


def distinct(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys in order of appearance, and the row of each key among them."""
    found, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return found[order], rank[inverse].astype(np.int64)
